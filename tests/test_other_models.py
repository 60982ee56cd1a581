"""Test complete runs with models, layers and templates that this machine or packing does not support."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import rows, save_dataset
from launcher import TRAINING, Ended, Launcher
from test_chat_template import DATE_STRING, DROPPED
from test_packing_check import tiny
from test_tokens import QWEN3_LIKE
from test_train import read_log, write_config
from transformers import AutoTokenizer

SHORT = {"epochs": 1, "gradient_accumulation_steps": 1, "eval_interval": 100}


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher(HF_HUB_OFFLINE="1") as running:
        yield running


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_dataset(tmp_path / "soap_dataset", {"train": rows(8), "validation": rows(10)[8:]})
    return tmp_path


def model_folder(place: Path, tiny_model: Path, name: str | None, template: str = QWEN3_LIKE) -> Path:
    """Write a random model of this type, or the tiny Qwen3 if None, with this chat template; return its folder."""
    path = place / "model"
    if name is None:
        shutil.copytree(tiny_model, path)
    else:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        model, _ = tiny(name, vocab_size=len(tokenizer))
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(template)
    return path


def train(launcher: Launcher, place: Path, model: dict, **data: object) -> Ended:
    import yaml

    config = write_config(place, Path(model["name_or_path"]), "run", **SHORT)
    values = yaml.safe_load(config.read_text())
    values["model"] |= {key: str(value) for key, value in model.items()}
    values["data"] |= data
    config.write_text(yaml.safe_dump(values))
    return launcher.run([TRAINING, config.name], place)


def error_line(ended: Ended) -> str:
    assert ended.status == 2, ended.errors[-3000:]
    assert "Traceback" not in ended.errors
    (line,) = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    return line


def test_without_a_gpu_liger_becomes_plain_layers_with_a_notice(launcher, place, tiny_model):
    ended = train(launcher, place, {"name_or_path": model_folder(place, tiny_model, None), "type": "liger"})
    assert ended.status == 0, ended.errors[-3000:]
    assert "layers: huggingface instead of liger, because there is no GPU\n" in ended.output
    assert "attention: sdpa instead of varlen, because there is no GPU\n" in ended.output


@pytest.mark.parametrize("name", ["falcon", "mamba"])
def test_a_model_that_mixes_samples_trains_only_without_packing(launcher, place, tiny_model, name):
    model = {"name_or_path": model_folder(place, tiny_model, name)}
    for packing in ("best_fit_packing", "pack_samples"):
        chosen = {"best_fit_packing": False, "pack_samples": False, packing: True}
        line = error_line(train(launcher, place, model, **chosen))
        assert line.startswith(f"error: {name} models let a sample see the others in its pack")
    ended = train(launcher, place, model, best_fit_packing=False)
    assert ended.status == 0, ended.errors[-3000:]
    assert read_log(place / "run")[-1]["step"] == 8


def test_training_fixes_the_date_of_a_template_and_prints_a_notice(launcher, place, tiny_model):
    ended = train(launcher, place, {"name_or_path": model_folder(place, tiny_model, None, DATE_STRING)})
    assert ended.status == 0, ended.errors[-3000:]
    assert ended.output.count("the chat template inserts the date: training and evaluation both use 26 Jul 2024\n") == 1


def test_a_template_that_drops_the_system_prompt_stops_training(launcher, place, tiny_model):
    ended = train(launcher, place, {"name_or_path": model_folder(place, tiny_model, None, DROPPED)})
    assert "drops the system message" in error_line(ended)
