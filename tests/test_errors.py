"""Test that user mistakes in training are reported in one line, and that bugs keep their traceback."""

import errno
import os
from types import SimpleNamespace

import pytest
import torch
from pydantic import BaseModel

from training.attention import UnsupportedAttention
from training.errors import explain


def raised(function, *arguments, **keywords) -> BaseException:
    with pytest.raises(Exception) as caught:
        function(*arguments, **keywords)
    return caught.value


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Expected input batch_size (3) to match target batch_size (4)."),
        TypeError("forward() got an unexpected keyword argument 'position_ids'"),
        KeyError("packed_sample_seqlens"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_program_bug_keeps_its_traceback(error):
    assert explain(raised(fail, error)) is None


def test_an_error_from_a_library_names_the_setting_it_read():
    from peft import LoraConfig, get_peft_model
    from transformers import get_scheduler

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = raised(get_peft_model, model, LoraConfig(target_modules=["no_proj"]))
    schedule = raised(get_scheduler, "cosinus", optimizer)
    assert explain(adapter)[1] == "correct `model.peft_config` in the YAML" and "no_proj" in explain(adapter)[0]
    assert explain(schedule)[1] == "correct `scheduler` in the YAML" and "cosinus" in explain(schedule)[0]


def test_a_length_limit_that_drops_every_row_names_its_setting():
    from arctic_training.data.sft_factory import filter_dataset_length
    from datasets import Dataset

    factory = SimpleNamespace(config=SimpleNamespace(filter_samples=True, max_length=1, num_proc=1))
    error = raised(filter_dataset_length, factory, Dataset.from_list([{"input_ids": [1, 2]}]))
    assert explain(error) == (str(error), "correct `data.max_length` in the YAML")


def test_an_invalid_yaml_value_is_reported_with_its_key():
    class Settings(BaseModel):
        epochs: int

    problem, remedy = explain(raised(Settings, epochs="many"))
    assert problem.startswith("epochs: ") and remedy == "correct the YAML"


def test_an_unusable_file_is_reported_with_its_name(tmp_path):
    problem, remedy = explain(raised((tmp_path / "none").read_text))
    assert "none" in problem and "set a different one in the YAML" in remedy
    full = raised(fail, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors"))
    assert explain(full)[1] == "make room on the disk"


def test_unsupported_attention_is_reported_with_the_setting_to_use():
    assert explain(UnsupportedAttention("`s_aux`"))[1] == "set `model.attn_implementation: eager`"
