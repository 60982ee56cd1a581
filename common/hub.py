"""Download models from the hub: text files and safetensors only, never code."""

from pathlib import Path

TEXT_FILES = ("*.json", "*.txt", "*.jinja", "*.model")


def download(name: str, *more_patterns: str) -> Path:
    """Return the folder of a hub model's text files and of the files that match `more_patterns`.

    Raises ConnectionError at once if the hub cannot be reached (transformers would retry for half a minute per file),
    and huggingface_hub's errors for names that it does not know or does not give.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[*TEXT_FILES, *more_patterns]))
    except LocalEntryNotFoundError as error:
        cause = type(error.__cause__ or error).__name__
        raise ConnectionError(f"no such folder, and the model hub cannot be reached ({cause})") from None
