"""Text and JSON objects as a language model writes them."""


def encodable(text: str) -> str:
    """Return the text with "?" for each lone surrogate, such as JSON's "\\ud800", which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the JSON object with these keys, as a decoder's `object_pairs_hook`. Raises ValueError if one repeats."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key appears twice")
    return value
