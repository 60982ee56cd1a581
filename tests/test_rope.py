"""Test that a configuration written by transformers 5 is refused where version 4 would compute another model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.rope import check_rope

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
BY_LAYER = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
}


def default(theta: float, **more: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


# Class, rope_parameters as transformers 5.24 writes them, the settings that version 4 needs.
CASES = [
    ("qwen3", default(1000000.0), {"rope_theta": 1000000.0}),
    ("llama", default(500000.0) | LLAMA3, {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    ("qwen2", default(10000.0) | YARN, {"rope_scaling": YARN}),
    ("gpt_neox", default(25000.0, partial_rotary_factor=0.5), {"rotary_emb_base": 25000.0, "rotary_pct": 0.5}),
    ("glm4", default(10000.0, partial_rotary_factor=0.25), {"partial_rotary_factor": 0.25}),
    ("llama", default(10000.0, partial_rotary_factor=0.5), {"partial_rotary_factor": 0.5}),
    ("persimmon", default(10000.0, partial_rotary_factor=0.5), {"rope_theta": 10000.0}),  # version 4: 25,000
    (
        "phi3",
        {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096, **LONG},
        {"rope_scaling": {"type": "longrope", **LONG}},
    ),
    (
        "olmo2",
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    (
        "gemma3_text",
        BY_LAYER,
        {
            "rope_theta": 500000.0,
            "rope_local_base_freq": 20000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    ("gpt_oss", default(150000.0), {"rope_scaling": None}),  # version 4 scales by default
]
# Class and rope_parameters that say what version 4 uses without them.
SAME = [
    ("qwen3", default(10000.0)),
    ("qwen3", default(10000)),
    ("smollm3", default(2000000.0)),
    ("ernie4_5", default(500000.0)),
    ("gpt_neox", default(10000.0, partial_rotary_factor=0.25)),
    ("gemma3_text", {"full_attention": default(1000000.0), "sliding_attention": default(10000.0)}),
    ("phi3", default(10000.0, partial_rotary_factor=1.0)),
]


def written_by_5(kind: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": kind, **SIZES, "pad_token_id": 0, "rope_parameters": parameters}


@pytest.mark.parametrize(("kind", "parameters", "needed"), CASES)
def test_an_embedding_that_version_4_would_misread_is_refused_with_what_to_add(kind, parameters, needed):
    config = written_by_5(kind, parameters)
    with pytest.raises(UserError) as refusal:
        check_rope("a/model", config)
    message = str(refusal.value)
    assert message.startswith("a/model: transformers 5 wrote its config.json, and version 4 ignores rope_parameters; ")
    advice = json.loads("{" + re.search(r"; add (.*) to a copy of it$", message)[1] + "}")
    assert advice == needed
    check_rope("a/model", config | advice)
    check_rope("a/model", {"text_config": config | advice})
    with pytest.raises(UserError, match="in text_config to a copy of it"):
        check_rope("a/model", {"model_type": "gemma3", "text_config": config})


@pytest.mark.parametrize(("kind", "parameters"), SAME)
def test_an_embedding_that_equals_version_4s_default_is_accepted(kind, parameters):
    check_rope("a/model", written_by_5(kind, parameters))


@pytest.mark.parametrize("config", [{}, {"model_type": "qwen3"}, {"rope_parameters": {}}, {"rope_parameters": None}])
def test_a_configuration_without_the_new_form_or_of_an_unknown_class_is_accepted(config):
    check_rope("a/model", config | {"rope_theta": 1000000.0})


def test_a_configuration_that_its_class_refuses_is_one_line():
    config = written_by_5("phi3", default(1000000.0)) | {"rope_scaling": {"type": "longrope"}}
    with pytest.raises(UserError, match=r"a/model: transformers cannot read its config.json \(`rope_scaling`"):
        check_rope("a/model", config)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt_neox"])
def test_the_advice_gives_the_frequencies_that_version_5_means(kind):
    import importlib

    import torch
    from transformers import AutoConfig

    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    (name,) = (name for name in dir(module) if name.endswith("RotaryEmbedding"))
    needed = {"rotary_emb_base": 500000.0, "rotary_pct": 1.0} if kind == "gpt_neox" else {"rope_theta": 500000.0}
    config = written_by_5(kind, default(500000.0, partial_rotary_factor=1.0)) | needed
    check_rope("a/model", config)
    found = getattr(module, name)(AutoConfig.for_model(**config)).inv_freq
    torch.testing.assert_close(found, 500000.0 ** -(torch.arange(0, 16, 2) / 16))


def test_version_4_reads_the_other_settings_that_version_5_writes():
    """These are the keys whose names or defaults changed. transformers 5.24 wrote the form."""
    import torch
    from transformers import AutoConfig

    types = ["sliding_attention", "full_attention"]
    config = written_by_5("qwen3", default(10000.0)) | {"dtype": "bfloat16", "tie_word_embeddings": True}
    config |= {"layer_types": types, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    read = AutoConfig.for_model(**config)
    assert (read.dtype, read.tie_word_embeddings, read.layer_types) == (torch.bfloat16, True, types)
    assert (read.sliding_window, read.head_dim) == (8, 16)


def save_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_training_refuses_such_a_model_in_one_line_before_it_loads(tmp_path, capsys):
    from arctic_training.config.model import ModelConfig

    from training import settings

    def validate(folder: Path, **more: Any) -> None:
        model = ModelConfig(name_or_path=folder, dtype="fp32", type="huggingface", **more)
        settings.SOAPTrainerConfig.validate_model(model)

    config = written_by_5("qwen3", default(1000000.0))
    with pytest.raises(SystemExit) as stop:
        validate(save_config(tmp_path / "new", config))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'new'}: transformers 5 wrote") and error.count("\n") == 1
    assert error.endswith(': add "rope_theta": 1000000.0 to a copy of it\n')
    validate(tmp_path / "new", hf_config_kwargs={"rope_theta": 1000000.0})
    validate(save_config(tmp_path / "same", written_by_5("qwen3", default(10000.0))))
