"""Define the supported LoRA adapters: their settings, and the tensors that a weight file must contain.

Training applies these rules to the YAML before it starts, and evaluation applies them to the adapter's folder. So every
adapter that can be trained can also be evaluated. PEFT itself decides which modules a setting targets.
"""

import difflib
import math
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# vLLM's accepted values of max_lora_rank; a limit far above the adapter's rank slows every step.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

SUPPORTED_INITIALISATIONS = (True, False, "gaussian", "orthogonal")  # these do not change the base weights


class AdapterError(UserError):
    """An unsupported adapter or setting. The message is one line: the problem, then the remedy."""

    def __init__(self, problem: str, remedy: str):
        super().__init__(f"{problem}; {remedy}")
        self.problem, self.remedy = problem, remedy


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LORA_RANKS[-1]


def _anything(value: Any) -> bool:
    return True


# Settings that may differ from PEFT's defaults: a check of the value, and the allowed values in words. All others must
# keep their defaults, including any that a later version of PEFT adds. PEFT itself checks the settings that select
# modules.
SUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, f"a whole number from 1 to {LORA_RANKS[-1]}"),
    "lora_alpha": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "fan_in_fan_out": (lambda value: isinstance(value, bool), "true or false"),  # PEFT corrects it for each layer
    "init_lora_weights": (
        lambda value: isinstance(value, bool | str) and value in SUPPORTED_INITIALISATIONS,
        "true, false, gaussian or orthogonal (others change the base weights, which are not saved with an adapter)",
    ),
    "task_type": (lambda value: value in (None, "CAUSAL_LM"), "CAUSAL_LM or null"),
    "target_modules": (_anything, ""),
    "exclude_modules": (_anything, ""),
    "layers_to_transform": (_anything, ""),
    "layers_pattern": (_anything, ""),
}
# PEFT records these in each configuration that it saves. In a YAML they are harmful or useless.
RECORDED_BY_PEFT = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")

MEANING = {
    "alpha_pattern": "scales that differ between layers",
    "bias": "trained biases",
    "layer_replication": "layers used more than once",
    "lora_bias": "a bias in each adapted layer",
    "modules_to_save": "whole weights saved with the adapter",
    "rank_pattern": "ranks that differ between layers",
    "target_parameters": "adapted parameters outside linear layers",
    "trainable_token_indices": "trained embedding rows",
    "use_dora": "a DoRA adapter",
}
LEAVE_OUT = "leave it out"
MERGE_FIRST = "merge it into the base model (peft: merge_and_unload, save_pretrained) and give the merged folder"


def check_settings(settings: Mapping[str, Any], saved: bool) -> None:
    """Raise AdapterError for the first unsupported setting.

    `settings` come from an adapter_config.json if `saved`, otherwise from a YAML's `peft_config`.
    """
    from peft import LoraConfig

    kind = settings.get("peft_type")
    if str(kind).upper() != "LORA":
        only = "only LORA adapters can be evaluated"
        raise AdapterError(f"peft_type is {kind!r}; {only}", "train one" if saved else "set `peft_type: Lora`")
    defaults, remedy = LoraConfig().to_dict(), MERGE_FIRST if saved else LEAVE_OUT
    if saved:
        for key in ("r", "lora_alpha", "target_modules"):
            if key not in settings:
                raise AdapterError(f"{key} is missing", "save the adapter again")
    for key, value in settings.items():
        if key == "peft_type" or (saved and key in RECORDED_BY_PEFT):
            continue
        if key in SUPPORTED:
            check, values = SUPPORTED[key]
            if not check(value):
                problem = f"rank {value!r}" if key == "r" else f"{key} {value!r}"
                raise AdapterError(
                    f"{problem} is not {values}", "train another adapter" if saved else f"correct `{key}`"
                )
        elif key not in defaults and not saved:
            close = difflib.get_close_matches(key, SUPPORTED, 1)
            raise AdapterError(f"LoRA has no setting {key}", f"did you mean {close[0]}?" if close else remedy)
        elif not _same(value, defaults.get(key)):
            raise AdapterError(f"{key} is {value!r} ({MEANING.get(key, 'which is not supported')})", remedy)


def _same(value: Any, default: Any) -> bool:
    """Return whether a setting has its default value. All false values, such as None and [], count as the same."""
    return value == default or (not value and not default)


def adapted_model(settings: Mapping[str, Any], base: str | Path) -> "PreTrainedModel":
    """Return the model in folder `base` with the adapter that `settings` describe, both without weights (device meta).

    Raises AdapterError, e.g. if the settings target no module.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    known = LoraConfig().to_dict()
    settings = {key: value for key, value in settings.items() if key in known and key not in RECORDED_BY_PEFT}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
        except Exception as error:  # e.g. an unknown architecture or a damaged configuration
            problem = f"transformers cannot build the base model ({_first_line(error)})"
            raise AdapterError(problem, "adapters of such models cannot be checked") from None
        try:
            return get_peft_model(model, LoraConfig(**{**settings, "init_lora_weights": True}))
        except Exception as error:  # from PEFT, or from Python for an invalid pattern or type
            raise AdapterError(f"PEFT rejects the adapter ({_first_line(error)})", "correct `target_modules`") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def unmatched(settings: Mapping[str, Any], adapted: "PreTrainedModel") -> str | None:
    """Return the first name or number in `settings` that matches no module of `adapted`, as "key: value", or None.

    PEFT ignores such entries.
    """
    from peft.tuners.lora import LoraLayer

    targets = [
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, LoraLayer)
    ]
    modules = [name.removeprefix("base_model.model.") for name, _ in adapted.named_modules()]
    for key, names in (("target_modules", targets), ("exclude_modules", modules)):
        for part in [] if isinstance(settings.get(key), str) else settings.get(key) or []:
            if not any(f".{name}".endswith(f".{part}") for name in names):
                return f"{key}: {part!r}"
    pattern = settings.get("exclude_modules")
    if isinstance(pattern, str) and not any(re.fullmatch(pattern, name) for name in modules):
        return f"exclude_modules: {pattern!r}"  # PEFT itself rejects such a pattern in target_modules
    layers = settings.get("layers_to_transform")
    layers = [] if layers is None else [layers] if isinstance(layers, int) else layers
    for layer in layers:
        if not any(f".{layer}." in name for name in targets):
            return f"layers_to_transform: {layer!r}"
    return None


def expected_tensors(adapted: "PreTrainedModel") -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Return the names and shapes of the tensors that PEFT always saves for `adapted`, and of those that it may save.

    The latter are the base weights of adapted embeddings.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    always = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    copies = {}
    for layer in (adapted.get_input_embeddings(), adapted.get_output_embeddings()):
        if isinstance(layer, LoraLayer):
            (name,) = (name for name, module in adapted.named_modules() if module is layer)
            copies[f"{name}.base_layer.weight"] = layer.get_base_layer().weight
    return tuple({name: list(tensor.shape) for name, tensor in part.items()} for part in (always, copies))


def adapts_embeddings(adapted: "PreTrainedModel") -> bool:
    """Return whether the adapter changes the input or output embedding."""
    from peft.tuners.lora import LoraLayer

    return any(
        isinstance(layer, LoraLayer) for layer in (adapted.get_input_embeddings(), adapted.get_output_embeddings())
    )


def check_tensors(found: Mapping[str, list[int]], adapted: "PreTrainedModel") -> None:
    """Raise AdapterError if a tensor is missing, unexpected or of the wrong shape. `found`: name -> shape.

    PEFT and vLLM silently ignore tensors with other names, so the base model would be evaluated instead.
    """
    always, copies = expected_tensors(adapted)
    remedy = "save the adapter again with save_pretrained, or give its own base model"
    for name, shape in found.items():
        expected = always.get(name) or copies.get(name)
        if expected is None:
            close = difflib.get_close_matches(name, [name for name in always if name not in found], 1, cutoff=0)
            instead = f"{close[0]} is expected" if close else "target_modules does not select it"
            raise AdapterError(f"contains {name}, but {instead}", remedy)
        if shape != expected:
            raise AdapterError(f"{name} has shape {shape}, but {expected} is expected", remedy)
    missing = [name for name in always if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise AdapterError(f"lacks {missing[0]}{more}", remedy)


def count_untrained(file: Path) -> tuple[int, int]:
    """Return (how many of an adapter's modules have a zero matrix, and so no effect; how many modules it has).

    Read all tensors. Raise AdapterError for one that is not floating point, or that contains inf or nan.
    """
    from safetensors import safe_open

    zero: dict[str, bool] = {}
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            tensor = tensors.get_tensor(name)
            if not tensor.is_floating_point():
                raise AdapterError(f"{name} is of type {tensor.dtype}", "save it as float32, float16 or bfloat16")
            least, greatest = (value.item() for value in tensor.aminmax()) if tensor.numel() else (0, 0)
            if not (math.isfinite(least) and math.isfinite(greatest)):
                raise AdapterError(
                    f"{name} contains inf or nan", "train the adapter again, or save it in a type with a larger range"
                )
            if ".lora_" in name:
                module = name[: name.index(".lora_")]
                zero[module] = zero.get(module, False) or least == greatest == 0
    return sum(zero.values()), len(zero)
