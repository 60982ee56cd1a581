"""train.py in two processes on the CPU: the loss of one process, one checkpoint, one log; and spread over both."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, rows, save_dataset
from test_tokens import QWEN3_LIKE
from test_train import (
    error_lines,
    kill_when_resumable,
    load_model,
    losses,
    read_log,
    run,
    validation_losses,
    write_config,
)

TWO = ("--num_gpus", "2")  # the launcher's name for processes
SINGLE_STEP = {"epochs": 3, "gradient_accumulation_steps": 2}  # of 8 packs: 12 steps
SHARED_STEP = {"epochs": 3, "gradient_accumulation_steps": 1}
RUN_FILES = ["global_step_12", "loss.png", "train-log.jsonl"]
YAMLS = ["Qwen3-1.7B-config.yaml", "Qwen3-1.7B-LoRA-config.yaml"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A dataset of 8 packs, an even number, so that no pack comes twice in an epoch; processes that take the CPU."""
    folder = tmp_path_factory.mktemp("runs")
    save_dataset(folder / "soap_dataset", {"train": rows(24), "validation": rows(30)[24:]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


@pytest.fixture(scope="module")
def model_path(tiny_model: Path, workplace: Path) -> Path:
    path = workplace / "tiny"
    shutil.copytree(tiny_model, path)
    (path / "chat_template.jinja").write_text(QWEN3_LIKE)
    return path


def finished(config: Path, *arguments: str) -> SimpleNamespace:
    status, output = run(config, *arguments)
    assert status == 0, output[-3000:]
    folder = config.with_suffix("")
    return SimpleNamespace(folder=folder, output=output, log=read_log(folder))


@pytest.fixture(scope="module")
def single(workplace: Path, model_path: Path) -> SimpleNamespace:
    return finished(write_config(workplace, model_path, "single", **SINGLE_STEP))


@pytest.fixture(scope="module")
def double(workplace: Path, model_path: Path) -> SimpleNamespace:
    return finished(write_config(workplace, model_path, "double", **SHARED_STEP), *TWO)


def assert_same_course(one: list[dict], other: list[dict]) -> None:
    """Steps, losses, rates, tokens and validation losses of two logs agree within rounding."""
    assert list(losses(one)) == list(losses(other)) == list(range(1, 13))
    assert list(losses(one).values()) == pytest.approx(list(losses(other).values()), rel=1e-4)
    assert len(validation_losses(one)) == 2
    assert validation_losses(one) == pytest.approx(validation_losses(other), rel=1e-4)
    for key in ("lr", "tokens", "epoch"):
        assert [line[key] for line in one if key in line] == [line[key] for line in other if key in line], key


def assert_same_weights(one: Path, other: Path) -> None:
    import torch

    weights, expected = load_model(one).state_dict(), load_model(other).state_dict()
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_two_processes_learn_as_one_that_accumulates_two_packs(single, double):
    assert_same_course(double.log, single.log)
    assert_same_weights(double.folder / "global_step_12", single.folder / "global_step_12")


@pytest.mark.slow
def test_two_processes_leave_one_checkpoint_and_tell_everything_once(double):
    assert sorted(path.name for path in double.folder.iterdir()) == RUN_FILES
    for line in ("data: 24 rows, 0 longer", "attention: sdpa instead of varlen", "*** Training finished normally."):
        assert double.output.count(line) == 1, line


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on_and_end_as_unbroken_ones(workplace, model_path, double):
    config = write_config(workplace, model_path, "killed", **SHARED_STEP)
    kill_when_resumable(config, *TWO)
    status, output = run(config)
    assert status == 2, "a state of two processes is none for one"
    assert len(error_lines(output)) == 1 and "another world_size (2, now 1)" in error_lines(output)[0]
    resumed = finished(config, *TWO)
    assert re.findall(r"resumed at step \d+ of 12", resumed.output) != []
    assert_same_course(resumed.log, double.log)
    assert sorted(path.name for path in resumed.folder.iterdir()) == RUN_FILES


# --- the commented block of the YAMLs --------------------------------------------------------------------------------


def sharded_block(name: str, offload: bool = False) -> dict:
    """What stands in the YAML's comment, taken out of it."""
    (comment,) = re.findall(r"^# deepspeed:\n(?:#  .*\n)+", (ROOT / name).read_text(), re.MULTILINE)
    block = re.sub(r"^# ", "", comment, flags=re.MULTILINE)
    return yaml.safe_load(block.replace("# offload", "offload") if offload else block)["deepspeed"]


@pytest.mark.parametrize("name", YAMLS)
def test_both_yamls_hold_a_variant_for_models_that_do_not_fit_one_gpu(name):
    assert sharded_block(name) == {"zero_optimization": {"stage": 3}}
    assert sharded_block(name, offload=True)["zero_optimization"].keys() > {"offload_optimizer", "offload_param"}


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_a_model_spread_over_two_processes_learns_and_is_saved_as_a_whole_one(workplace, model_path, double, offload):
    from evaluation.models import resolve_model

    block = sharded_block(YAMLS[0], offload)
    sharded = finished(write_config(workplace, model_path, f"sharded-{offload}", deepspeed=block, **SHARED_STEP), *TWO)
    assert_same_course(sharded.log, double.log)
    assert sorted(path.name for path in sharded.folder.iterdir()) == RUN_FILES
    checkpoint = sharded.folder / "global_step_12"
    assert_same_weights(checkpoint, double.folder / "global_step_12")
    model = load_model(checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "the tied weights of this model"
    assert (checkpoint / "generation_config.json").exists()
    assert resolve_model(str(checkpoint)).weight_bytes > 0


@pytest.mark.slow
def test_an_adapter_of_a_model_spread_over_two_processes_goes_on_after_a_kill(workplace, model_path):
    from peft import PeftModel

    lora = {"peft_type": "Lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = {"name_or_path": str(model_path), "dtype": "fp32", "attn_implementation": "sdpa", "peft_config": lora}
    courses = {}
    for name, block in (("adapter", None), ("sharded-adapter", sharded_block(YAMLS[1]))):
        changes = {"deepspeed": block} if block else {}
        config = write_config(workplace, model_path, name, model=model, **SHARED_STEP, **changes)
        if block:
            kill_when_resumable(config, *TWO)
        courses[name] = finished(config, *TWO)
    assert "resumed at step" in courses["sharded-adapter"].output
    assert_same_course(courses["sharded-adapter"].log, courses["adapter"].log)
    adapted = PeftModel.from_pretrained(load_model(model_path), workplace / "sharded-adapter" / "global_step_12")
    moved = [parameter.abs().max().item() for name, parameter in adapted.named_parameters() if "lora_B" in name]
    assert len(moved) == 6 and min(moved) > 0
