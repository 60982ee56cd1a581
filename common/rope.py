"""Refuse models whose rotary embedding the installed transformers would read wrongly."""

import copy
import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from common.errors import UserError, short_cause

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_OUTSIDE_SCALING = ("rope_theta", "partial_rotary_factor")  # keys of rope_parameters that version 4 has beside it

# Their classes in version 4 want "type" in place of "rope_type".
_OLD_NAME = ("hunyuan_v1_dense", "hunyuan_v1_moe", "olmo", "olmo2", "phi3", "phi4_multimodal", "phimoe")


def check_rope(name: str, config: dict[str, Any]) -> None:
    """Raise UserError if the installed transformers would read another rotary embedding than `config` describes.

    `config` is the content of config.json. transformers 5 writes "rope_parameters" in place of "rope_theta",
    "partial_rotary_factor", "rope_local_base_freq" and "rope_scaling". Version 4 ignores it and falls back to the
    defaults of the model's class, in silence, and vLLM 0.23 follows it: a Qwen3 with a theta of 1,000,000 would run
    with 10,000. Version 4 reads the other settings of text models that version 5 writes as they are meant (compared
    for 37 classes of transformers 5.24.0 and 4.57.6).
    """
    if int(version("transformers").partition(".")[0]) >= 5:
        return
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get("rope_parameters") and (misread := _misread(name, part)):
            settings = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in misread.items())
            raise UserError(
                f"{name}: transformers 5 wrote its config.json, and version 4 ignores rope_parameters; "
                f"add {settings} {'' if part is config else 'in text_config '}to a copy of it"
            )


def _misread(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of version 4 that `config` lacks, as far as they differ from those that would be used."""
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return {}  # it cannot be loaded anyway
    try:
        used = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))  # it may change its argument
    except Exception as error:  # each class has its own checks
        raise UserError(f"{name}: transformers cannot read its config.json ({short_cause(error)})") from None
    parameters = config["rope_parameters"]
    local = parameters.get("sliding_attention") or {}  # some models have one entry for each type of layer
    whole = parameters.get("full_attention") or local or parameters
    theta, share = _OUTSIDE_SCALING
    if hasattr(used, "rotary_emb_base"):  # GPT-NeoX
        theta, share = "rotary_emb_base", "rotary_pct"
    wanted = {
        theta: (whole.get("rope_theta"), getattr(used, theta, None)),
        share: (whole.get("partial_rotary_factor"), getattr(used, share, 1.0)),
    }
    if hasattr(used, "rope_local_base_freq"):  # Gemma 3
        wanted["rope_local_base_freq"] = (local.get("rope_theta"), used.rope_local_base_freq)
    misread = {key: value for key, (value, read) in wanted.items() if value is not None and value != read}
    scaling = _scaling(whole, used)
    if scaling != _scaling(getattr(used, "rope_scaling", None) or {}, used):
        misread["rope_scaling"] = scaling
    return misread


def _scaling(values: dict[str, Any], used: "PretrainedConfig") -> dict[str, Any] | None:
    """Return version 4's rope_scaling from it or from rope_parameters; None if the embedding is not scaled.

    Values that version 4 has beside rope_scaling, such as Phi-3's original_max_position_embeddings, are left out.
    """
    scaling = {
        key: value
        for key, value in values.items()
        if key not in ("type", "rope_type", *_OUTSIDE_SCALING) and (value is None or getattr(used, key, None) != value)
    }
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default" and not scaling:
        return None
    return {"type" if used.model_type in _OLD_NAME else "rope_type": kind} | scaling
