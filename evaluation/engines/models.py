"""Find the models and adapters that the user names, and check that they are complete before an engine starts.

The checks read JSON files, safetensors headers and the weights of adapters. They never run a model's own code.
"""

import hashlib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import adapters
from common.errors import UserError
from common.hub import download
from common.rope import check_rope

DEFAULT_LENGTH = 8192  # tokens of prompt and answer; a larger value leaves cache for fewer dialogues at once

CHAT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # blocks that the fingerprint reads from each file, and their size


@dataclass(frozen=True)
class Model:
    """A folder with config.json, tokenizer and safetensors. `weight_bytes` is 0 if the weights were not needed."""

    name: str
    path: Path
    config: dict
    weight_bytes: int
    fingerprint: str


@dataclass(frozen=True)
class Adapter:
    """A folder with adapter_config.json and adapter_model.safetensors."""

    name: str
    path: Path
    rank: int
    fingerprint: str


def resolve_model(name: str, need_weights: bool = True, print_line: Callable[[str], None] = print) -> Model:
    """Return the model that `name` means: a folder, the newest complete global_step_N folder in it, or a hub model.

    `need_weights` is False if the engine uses dummy weights. Raises UserError.
    """
    path = find_model(name, need_weights, print_line) or _from_hub(name, need_weights)
    config = _read_json(path / "config.json")
    check_rope(name, config)
    _check_chat(path)
    weights = _weight_files(path, "model") if need_weights else []
    weight_bytes = sum(file.stat().st_size for file in weights)
    chat_files = [path / name for name in CHAT_FILES if (path / name).is_file()]
    return Model(name, path, config, weight_bytes, _fingerprint(path, "config.json", [*chat_files, *weights]))


def find_model(name: str, need_weights: bool, print_line: Callable[[str], None]) -> Path | None:
    """Return the complete local checkpoint that `name` means, or None if it may be a hub model. Raises UserError."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = _newest_step(path, "config.json", "model", need_weights, print_line)
        if need_weights:
            _weight_files(path, "model")
        return path
    if path.exists():
        raise UserError(f"{name} is a file; give the model's folder")
    if name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such folder; train first, or correct the path")
    return None


def find_adapter(name: str, print_line: Callable[[str], None]) -> Path:
    """Return the complete adapter that `name` means: a folder, or the newest global_step_N in it. Raises UserError."""
    path = Path(name).expanduser()
    if not path.is_dir():
        raise UserError(
            f"--lora_path {name}: no such folder; train first, or give the folder that contains adapter_config.json"
        )
    path = _newest_step(path, "adapter_config.json", "adapter_model", True, print_line)
    _weight_files(path, "adapter_model")
    return path


def resolve_adapter(
    name: str, model: Model, print_line: Callable[[str], None] = print, at_run_time: bool = False
) -> Adapter:
    """Return the LoRA adapter in folder `name`, or in its newest complete global_step_N, checked against `model`.

    `at_run_time`: vLLM will apply the adapter, instead of a merge into the weights. Raises UserError.
    """
    path = find_adapter(name, print_line)
    config = _read_json(path / "adapter_config.json")
    try:
        adapters.check_settings(config, saved=True)
    except adapters.AdapterError as error:
        raise UserError(f"{path / 'adapter_config.json'}: {error}") from None
    file = path / "adapter_model.safetensors"
    _check_shapes(file, config, model)
    _check_weights(name, file, config, model, print_line, at_run_time)
    if not at_run_time and model.config.get("quantization_config"):
        raise UserError(
            f"{model.name} is quantised, so an adapter cannot be merged into it; "
            "pass --engine_args '{\"enable_lora\": true}' to let vLLM apply the adapter at run time"
        )
    if base := _other_base(config, model):
        print_line(f"{name} was trained on {base}; its shapes fit {model.name}, so it is used")
    return Adapter(name, path, config["r"], _fingerprint(path, "adapter_config.json", [file]))


def context_length(asked: int | None, model: Model) -> int:
    """Return the tokens of prompt and answer: `asked`, or else DEFAULT_LENGTH or the model's limit if that is lower.

    Raises UserError if `asked` is above the model's limit.
    """
    limit = model.config.get("max_position_embeddings", DEFAULT_LENGTH)
    if asked and asked > limit and not model.config.get("rope_scaling"):
        raise UserError(f"--max_model_len {asked}: {model.name} supports at most {limit}; give a smaller value")
    return asked or min(limit, DEFAULT_LENGTH)


def vllm_rank(rank: int) -> int:
    """Return the smallest max_lora_rank that vLLM accepts for an adapter of `rank`."""
    return next(limit for limit in adapters.LORA_RANKS if limit >= rank)


def _newest_step(path: Path, config: str, stem: str, need_weights: bool, print_line: Callable[[str], None]) -> Path:
    """Return `path` if it contains `config`, otherwise its complete global_step_N folder with the latest `config`.

    That is not always the highest N: a shorter training may have reused the folder. The higher N wins if both were
    written in the same second.
    """
    if (path / config).is_file():
        return path
    steps = [
        (int(match[1]), child) for child in path.iterdir() if (match := re.fullmatch(r"global_step_(\d+)", child.name))
    ]
    reasons, newest_first = [], sorted(steps, key=lambda item: (_written(item[1] / config), item[0]), reverse=True)
    for place, (number, step) in enumerate(newest_first, 1):
        try:
            _read_json(step / config)
            if need_weights:
                _weight_files(step, stem)
        except UserError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            print_line(f"skipped an incomplete checkpoint: {reason}")
        older = ", ".join(child.name for n, child in newest_first[place:] if n > number)
        skipped = f"; skipped because older: {older}" if older else ""
        print_line(f"{path}: {step.name} is the newest complete checkpoint{skipped}")
        return step
    if reasons:
        raise UserError(reasons[0])
    other = "adapter_config.json" if config == "config.json" else "config.json"
    if (path / other).is_file() or any((step / other).is_file() for _, step in steps):
        hint = (
            "an adapter; give its base model, and this folder as --lora_path"
            if stem == "model"
            else "a whole model; give it without --lora_path"
        )
        raise UserError(f"{path} contains {hint}")
    raise UserError(
        f"{path} contains neither {config} nor a global_step_N folder with one; give the folder of a checkpoint"
    )


def _written(file: Path) -> int:
    """Return the file's modification time in seconds, or its folder's if the file does not exist."""
    return int((file if file.is_file() else file.parent).stat().st_mtime)


def _from_hub(name: str, need_weights: bool) -> Path:
    """Download the safetensors and text files of a hub model, and return their folder. Raises UserError."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return download(name, *(["*.safetensors"] if need_weights else []))
    except GatedRepoError:  # a subclass of RepositoryNotFoundError
        raise UserError(f"{name} requires a licence; accept it on the hub, then run `huggingface-cli login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{name} is neither a folder here nor a model on the hub; check the spelling") from None
    except ConnectionError as error:
        raise UserError(f"{name}: {error}; give a local folder") from None
    except OSError as error:
        cause = type(error.__cause__ or error).__name__
        raise UserError(
            f"{name}: no such folder, and the model hub cannot be reached ({cause}); give a local folder"
        ) from None


def _check_chat(path: Path) -> None:
    """Raise UserError if a model's folder has no tokenizer or no chat template."""
    config = path / "tokenizer_config.json"
    if not config.is_file():
        raise UserError(f"{path} has no tokenizer (tokenizer_config.json); copy it from the model it was trained from")
    templates = (path / "chat_template.jinja", path / "chat_template.json")
    if not _read_json(config).get("chat_template") and not any(file.is_file() for file in templates):
        raise UserError(f"{path} has no chat template; give a chat model")


def tensors_of(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Return the type and shape of each tensor in a model's folder. Raises UserError if a file is incomplete."""
    headers = [_read_header(file) for file in _weight_files(path, "model")]
    return {name: (tensor["dtype"], tensor["shape"]) for header in headers for name, tensor in header.items()}


def _weight_files(path: Path, stem: str) -> list[Path]:
    """Return the safetensors files in `path`. Raises UserError if one is missing or cut off."""
    index = path / f"{stem}.safetensors.index.json"
    single = path / f"{stem}.safetensors"
    if index.is_file():
        files = sorted({path / name for name in _read_json(index).get("weight_map", {}).values()})
    elif single.is_file():
        files = [single]
    else:
        files = sorted(path.glob(f"{stem}*.safetensors"))
    if not files:
        others = [f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in path.glob(pattern)]
        found = (
            f" (only {others[0]}, which can run code when loaded; save the model with safe_serialization=True)"
            if others
            else ""
        )
        raise UserError(f"{path} has no {stem}.safetensors{found}; the checkpoint is incomplete")
    for file in files:
        _read_header(file)
    return files


def _read_header(file: Path) -> dict:
    """Return a safetensors file's header: tensor name -> dtype, shape, data_offsets. Raises UserError if it is cut off.

    Format: the header's length in 8 little-endian bytes, the header in JSON, the data.
    https://github.com/huggingface/safetensors#format
    """
    if not file.is_file():
        raise UserError(f"{file} is missing; the checkpoint is incomplete")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            header = json.loads(stream.read(length)) if length + 8 <= size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise UserError(f"{file} is not a safetensors file, or is cut off; copy or save the checkpoint again")
    header.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if 8 + length + end != size:
        raise UserError(f"{file} is cut off ({size} bytes of {8 + length + end}); copy or save the checkpoint again")
    return header


def _check_shapes(file: Path, config: dict, model: Model) -> None:
    """Raise UserError if an adapter was made for a model of another size."""
    hidden = model.config.get("hidden_size")
    for name, tensor in _read_header(file).items():
        reads_hidden = re.search(r"\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.lora_A", name)
        if hidden and reads_hidden and tensor["shape"][-1] != hidden:
            base = config.get("base_model_name_or_path")
            raise UserError(
                f"{file}: made for a model with hidden_size {tensor['shape'][-1]} ({base}), "
                f"but {model.name} has {hidden}; give the adapter's own base model"
            )
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= model.config.get("num_hidden_layers", 1 << 30):
            raise UserError(
                f"{file}: has weights for layer {layer[1]}, which {model.name} does not have; "
                "give the adapter's own base model"
            )


def _check_weights(
    name: str, file: Path, config: dict, model: Model, print_line: Callable[[str], None], at_run_time: bool
) -> None:
    """Raise UserError if an adapter's tensors do not match its settings and `model`, or contain inf or nan."""
    try:
        adapted = adapters.adapted_model(config, model.path)
        adapters.check_tensors({name: tensor["shape"] for name, tensor in _read_header(file).items()}, adapted)
        untrained, modules = adapters.count_untrained(file)
    except adapters.AdapterError as error:
        raise UserError(f"{file}: {error}") from None
    if at_run_time and adapters.adapts_embeddings(adapted):
        raise UserError(f"{file}: vLLM cannot apply adapters of embed_tokens or lm_head; leave out enable_lora")
    if untrained:
        print_line(f"{name}: in {untrained} of {modules} modules the adapter is zero, i.e. untrained")


def _other_base(config: dict, model: Model) -> str | None:
    """Return the base that an adapter's configuration names, or None if its names and files match `model`."""
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base:
        return None
    folder = Path(base)
    if (folder / "config.json").is_file():
        try:
            own, trained_on = (
                _fingerprint(path, "config.json", _weight_files(path, "model")) for path in (model.path, folder)
            )
        except UserError:  # its files are no longer complete
            return base
        return None if own == trained_on else base
    if revision:
        return f"{base}, revision {revision}"
    if not Path(model.name).exists():  # two names on the hub
        return None if base == model.name else base
    return None if folder.name in (Path(model.name).name, model.path.name) else base


def _fingerprint(path: Path, config: str, files: list[Path]) -> str:
    """Return 12 hex digits that change with the config and, almost certainly, with the content of any file.

    Only blocks spread over each file are read: reading an 8B model would take longer than evaluating it, and training
    changes every block.
    """
    digest = hashlib.sha256((path / config).read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for k in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * k // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12]


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; the checkpoint is incomplete") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); copy or save the checkpoint again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; copy or save the checkpoint again")
    return value
