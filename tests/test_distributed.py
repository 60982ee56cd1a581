"""Test train.py in two processes on the CPU: same loss as one process, one checkpoint, one log; and ZeRO-3."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, rows, save_dataset
from test_tokens import QWEN3_LIKE
from test_train import (
    error_lines,
    free_port,
    kill_when_resumable,
    load_model,
    losses,
    read_log,
    run,
    start,
    validation_losses,
    write_config,
)

TWO = ("--num_gpus", "2")  # the launcher's name for processes
SINGLE_STEP = {"epochs": 3, "gradient_accumulation_steps": 2}  # 8 packs per epoch: 12 steps
SHARED_STEP = {"epochs": 3, "gradient_accumulation_steps": 1}
RUN_FILES = ["global_step_12", "loss.png", "train-log.jsonl"]
YAMLS = ["Qwen3-1.7B-ZeRO3.yaml", "Qwen3-1.7B-LoRA-ZeRO3.yaml"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write a dataset of 8 training packs and one validation pack, fewer than processes; use the CPU."""
    folder = tmp_path_factory.mktemp("runs")
    save_dataset(folder / "soap_dataset", {"train": rows(24), "validation": rows(26)[24:]})
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
    """Assert that the steps, losses, rates, tokens and validation losses of two logs agree within rounding."""
    assert list(losses(one)) == list(losses(other)) == list(range(1, 13))
    assert list(losses(one).values()) == pytest.approx(list(losses(other).values()), rel=1e-4)
    assert len(validation_losses(one)) == 2
    assert validation_losses(one) == pytest.approx(validation_losses(other), rel=1e-4)
    norms = [[line["gradient_norm"] for line in log if "gradient_norm" in line] for log in (one, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    for key in ("lr", "tokens", "epoch"):
        assert [line[key] for line in one if key in line] == [line[key] for line in other if key in line], key


def assert_same_weights(one: Path, other: Path) -> None:
    import torch

    weights, expected = load_model(one).state_dict(), load_model(other).state_dict()
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_two_processes_train_like_one_that_accumulates_two_packs(single, double):
    assert_same_course(double.log, single.log)
    assert_same_weights(double.folder / "global_step_12", single.folder / "global_step_12")


@pytest.mark.slow
def test_two_processes_leave_one_checkpoint_and_print_each_line_once(double):
    assert sorted(path.name for path in double.folder.iterdir()) == RUN_FILES
    for line in (
        "data: 24 rows, 0 longer",
        "best validation loss",
        "attention: sdpa instead of varlen",
        "*** Training finished normally.",
    ):
        assert double.output.count(line) == 1, line


@pytest.mark.slow
def test_two_killed_processes_resume_and_end_like_an_uninterrupted_run(workplace, model_path, double):
    config = write_config(workplace, model_path, "killed", **SHARED_STEP)
    kill_when_resumable(config, *TWO)
    status, output = run(config)
    assert status == 2, "one process must not resume a state of two"
    assert len(error_lines(output)) == 1 and "a different world_size (2, now 1)" in error_lines(output)[0]
    resumed = finished(config, *TWO)
    assert re.findall(r"resumed at step \d+ of 12", resumed.output) != []
    assert_same_course(resumed.log, double.log)
    assert sorted(path.name for path in resumed.folder.iterdir()) == RUN_FILES


@pytest.mark.slow
def test_mixed_adamw_sharded_over_two_processes_resumes_after_a_kill(workplace, model_path, double):
    optimizer = {"type": "mixed_adamw", "learning_rate": 1e-3, "weight_decay": 0.0}
    config = write_config(workplace, model_path, "spread", optimizer=optimizer, **SHARED_STEP)
    kill_when_resumable(config, *TWO)
    resumed = finished(config, *TWO)
    assert re.findall(r"resumed at step \d+ of 12", resumed.output) != []
    assert_same_course(resumed.log, double.log)
    assert_same_weights(resumed.folder / "global_step_12", double.folder / "global_step_12")


@pytest.mark.slow
def test_two_machines_with_a_shared_folder_leave_one_run(workplace, model_path, double):
    """Start one launcher per machine. Each starts one process, the first one of its machine."""
    config = write_config(workplace, model_path, "machines", **SHARED_STEP)
    settings = yaml.safe_load(config.read_text())
    settings["data"]["cache_fs_type"] = "shared"  # detected automatically for a folder that machines share
    config.write_text(yaml.safe_dump(settings))
    (workplace / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    machines = ["--hostfile", str(workplace / "hosts"), "--no_ssh", "--master_addr", "127.0.0.1"]
    machines += ["--master_port", str(free_port()), "--node_rank"]
    statuses = [process.wait(timeout=900) for process in [start(config, *machines, rank) for rank in ("1", "0")]]
    output = config.with_suffix(".log").read_text()
    assert statuses == [0, 0], output[-3000:]
    assert_same_course(read_log(workplace / "machines"), double.log)
    assert sorted(path.name for path in (workplace / "machines").iterdir()) == RUN_FILES
    assert output.count("data: 24 rows, 0 longer") == output.count("*** Training finished normally.") == 1


# Only the second of two processes sees the stop file, as may happen on a shared file system.
SWITCH = """
import sys
from pathlib import Path
import torch
from training.processes import StepTotals
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
answers = []
for switch in ("none", sys.argv[1] if rank else "none"):
    totals = StepTotals(torch.tensor(1.5 + rank), Path(switch).exists())
    loss_sum, stop = totals.read()
    assert loss_sum == 4.0
    answers.append(stop)
sys.stdout.write(f"{answers}\\n")
torch.distributed.destroy_process_group()
"""


def in_two_processes(folder: Path, script: str, *arguments: str) -> list[str]:
    """Run a script in two processes; return the lines it prints."""
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), "script.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_kill_switch_seen_by_one_process_stops_all(workplace):
    (workplace / "stop").touch()
    assert in_two_processes(workplace, SWITCH, "stop") == ["[False, True]"] * 2


# Validate packs with known losses and numbers of labelled tokens, using the trainer's own code.
VALIDATION = """
import sys
from types import SimpleNamespace
import torch
import train
from training import plan, trainer as train
torch.distributed.init_process_group("gloo")
rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
for packs in (1, 2, 3):
    sampler = plan.SharedPacks([[number] for number in range(packs)], rank, processes)
    rows = [{"number": number, "labels": torch.tensor([[-100] + [5] * (number + 1)])} for number in range(packs)]
    loader = torch.utils.data.DataLoader(rows, batch_sampler=sampler, collate_fn=lambda pack: pack[0])
    seen, trainer = [], train.SOAPTrainer.__new__(train.SOAPTrainer)
    trainer.model, trainer.unlogged, trainer.global_step = SimpleNamespace(eval=lambda: None), None, 1
    trainer.device, trainer.eval_dataloader, trainer.best = torch.device("cpu"), loader, train.BestStep()
    trainer.config = SimpleNamespace(early_stopping_patience=0, keep_best=False)
    trainer.loss = lambda batch: torch.tensor(float(10 * batch["number"] + 1))
    trainer.progress = SimpleNamespace(validation=lambda step, loss, best: seen.append(loss))
    train.SOAPTrainer.evaluate.__wrapped__(trainer)
    expected = sum((10 * n + 1) * (n + 1) for n in range(packs)) / sum(n + 1 for n in range(packs))
    assert abs(seen[0] - expected) < 1e-9, (seen, expected)
sys.stdout.write("right\\n")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_each_validation_pack_counts_once_on_two_processes(workplace):
    assert in_two_processes(workplace, VALIDATION) == ["right"] * 2


# --- the variants in configs/ ----------------------------------------------------------------------------------------


def sharded_block(name: str, offload: bool = False) -> dict:
    """Return the DeepSpeed block of a YAML for several GPUs; `offload` uncomments its offload lines."""
    text = (ROOT / "configs" / name).read_text()
    return yaml.safe_load(text.replace("# offload", "offload") if offload else text)["deepspeed"]


@pytest.mark.parametrize("name", YAMLS)
def test_the_zero_3_yamls_shard_weights_and_offer_offloading(name):
    assert sharded_block(name)["zero_optimization"]["stage"] == 3
    added = sharded_block(name, offload=True)["zero_optimization"].keys() - sharded_block(name)["zero_optimization"]
    assert added == {"offload_optimizer", "offload_param"}


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_a_model_sharded_over_two_processes_learns_and_is_saved_whole(workplace, model_path, double, offload):
    from evaluation.engines.models import resolve_model

    block = sharded_block(YAMLS[0], offload)
    sharded = finished(write_config(workplace, model_path, f"sharded-{offload}", deepspeed=block, **SHARED_STEP), *TWO)
    assert_same_course(sharded.log, double.log)
    assert sorted(path.name for path in sharded.folder.iterdir()) == RUN_FILES
    checkpoint = sharded.folder / "global_step_12"
    assert_same_weights(checkpoint, double.folder / "global_step_12")
    model = load_model(checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "this model ties its weights"
    assert (checkpoint / "generation_config.json").exists()
    assert resolve_model(str(checkpoint)).weight_bytes > 0


@pytest.mark.slow
def test_an_adapter_of_a_sharded_model_resumes_after_a_kill(workplace, model_path):
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


@pytest.mark.slow
def test_the_24_gb_variant_trains_like_the_plain_run_within_rounding(workplace, model_path, single):
    whole = yaml.safe_load((ROOT / "configs/Qwen3-1.7B-24GB.yaml").read_text())
    block = {section: whole[section] for section in ("model", "deepspeed", "optimizer")}
    assert block["model"].pop("type") == "liger", "needs a GPU"
    block["model"]["name_or_path"] = str(model_path)
    block["optimizer"]["learning_rate"] = 1e-3  # as in the plain run
    variant = finished(write_config(workplace, model_path, "variant", **block, **SINGLE_STEP))
    assert losses(variant.log) == pytest.approx(losses(single.log), rel=0.01)
    assert validation_losses(variant.log) == pytest.approx(validation_losses(single.log), rel=0.01)
    assert sorted(path.name for path in variant.folder.iterdir()) == RUN_FILES
