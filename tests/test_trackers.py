"""Test that experiment trackers get the figures of the log, and nothing else."""

import json
import time
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from training import settings, trackers
from training.progress import Progress, StepRecord

FIGURES = {"epoch", "loss", "gradient_norm", "lr", "tokens", "seconds", "validation_loss"}


def run_steps(folder: Path, names: list[str], last: int = 3, done: int = 0) -> Progress:
    """Log the steps from `done` + 1 to `last` and a validation; return the closed Progress."""
    progress = Progress(folder / "train-log.jsonl", last, done, names)
    for step in range(done + 1, last + 1):
        record = StepRecord(step=step, epoch=0, rate=1e-3, tokens=100, labelled=50, time=time.perf_counter())
        progress.step(record, loss=3 / step, gradient_norm=1.0)
    progress.validation(last, loss=0.5, best=True)
    progress.close()
    return progress


def wandb_records(path: Path, kind: str) -> list:
    """Return the records of a kind in wandb's file: LevelDB's log format, blocks of 32 KiB of parts with a header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record, found = path.read_bytes(), 7, b"", []  # after wandb's own header
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # a header does not cross blocks
            place += 32768 - place % 32768
            continue
        length, part = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # a whole record, or the last part of one
            parsed, record = Record.FromString(record), b""
            if parsed.WhichOneof("record_type") == kind:
                found.append(getattr(parsed, kind))
    return found


def wandb_history(path: Path) -> list[dict[str, float]]:
    rows = (
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.item}
        for record in wandb_records(path, "history")
    )
    return [{name: value for name, value in row.items() if name in {"step", *FIGURES}} for row in rows]


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    progress = run_steps(tmp_path, ["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == FIGURES
    losses = [(event.step, round(event.value, 5)) for event in events.Scalars("loss")]
    assert losses == [(line["step"], round(line["loss"], 5)) for line in progress.records if "loss" in line]
    assert [(event.step, event.value) for event in events.Scalars("validation_loss")] == [(3, 0.5)]


def tensorboard_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) that TensorBoard shows of each figure."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    names = events.Tags()["scalars"]
    return {name: [(event.step, round(event.value, 5)) for event in events.Scalars(name)] for name in names}


@pytest.mark.parametrize("saved", [3, 2, 1])  # the step of the last saved state; the run was killed at step 3
def test_a_resumed_run_replaces_the_steps_that_it_repeats_in_tensorboard(saved, tmp_path):
    run_steps(tmp_path, ["tensorboard"])
    progress = run_steps(tmp_path, ["tensorboard"], last=6, done=saved)
    curves = tensorboard_curves(tmp_path)
    assert [step for step, _ in curves["loss"]] == [1, 2, 3, 4, 5, 6]
    shown = [(line["step"], line["validation_loss"]) for line in progress.records if "validation_loss" in line]
    assert curves["validation_loss"] == shown == [(3, 0.5), (6, 0.5)][saved < 3 :]


def test_a_new_run_in_the_same_folder_replaces_the_curves_in_tensorboard(tmp_path):
    run_steps(tmp_path, ["tensorboard"], last=5)
    run_steps(tmp_path, ["tensorboard"], last=2)
    curves = tensorboard_curves(tmp_path)
    assert curves["loss"] == [(1, 3.0), (2, 1.5)]
    assert curves["validation_loss"] == [(2, 0.5)]


def test_wandb_gets_the_numbers_of_the_log_and_no_console_output(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    print("Patient: My chest hurts.")
    progress = run_steps(tmp_path, ["wandb"])
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    (run,) = folder.glob("run-*.wandb")
    logged = [{name: value for name, value in line.items() if name != "best"} for line in progress.records]
    assert wandb_history(run) == [pytest.approx(line) for line in logged]
    axes = {record.glob_name or record.name: record.step_metric for record in wandb_records(run, "metric")}
    assert axes["step"] == "" and {axes.get(name, axes["*"]) for name in FIGURES} == {"step"}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and not any(b"chest hurts" in path.read_bytes() for path in files)
    assert not [path.name for path in files if path.suffix in (".py", ".patch") or path.name == "output.log"]


def test_wandb_gets_steps_before_its_latest_one(tmp_path, monkeypatch):
    """On its server, a resumed run has the counter of steps that the killed run had."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = trackers.start_tracker("wandb", tmp_path, done_steps=0)
    for step in (1, 2, 3, 2, 3, 4):
        tracker.log({"loss": 3 / step}, step)
    tracker.close()
    (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert [row["step"] for row in wandb_history(run)] == [1, 2, 3, 2, 3, 4]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_run_keeps_its_id_when_it_is_resumed(tracker, tmp_path):
    first = trackers.run_id(tmp_path, tracker, resumed=False)
    assert trackers.run_id(tmp_path, tracker, resumed=True) == first
    assert trackers.run_id(tmp_path, tracker, resumed=False) != first


def test_nothing_is_reported_by_default():
    assert settings.SOAPTrainerConfig.model_fields["report_to"].get_default(call_default_factory=True) == []


@pytest.mark.parametrize(
    ("tracker", "packages"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("trackio", "'trackio<0.21' 'huggingface_hub<1'")],
)
def test_a_tracker_that_is_not_installed_is_refused_in_one_line(tracker, packages, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as error:
        settings.SOAPTrainerConfig.validate_trackers([tracker])
    assert str(error.value) == f"{tracker} is not installed; run `pip install {packages}`, or leave it out"


def test_an_unknown_tracker_is_refused():
    field = settings.SOAPTrainerConfig.model_fields["report_to"]
    with pytest.raises(ValidationError, match="tensorboard"):
        TypeAdapter(field.annotation).validate_python(["mlflow"])
