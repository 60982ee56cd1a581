"""Test that experiment trackers get the figures of the log, and nothing else."""

import time
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from training import settings, trackers
from training.progress import Progress, StepRecord

FIGURES = {"epoch", "loss", "gradient_norm", "lr", "tokens", "seconds", "validation_loss"}


def run_three_steps(folder: Path, names: list[str], done: int = 0) -> Progress:
    """Log three steps and a validation; return the closed Progress."""
    progress = Progress(folder / "train-log.jsonl", 3 + done, done, names)
    for step in range(done + 1, done + 4):
        record = StepRecord(step=step, epoch=0, rate=1e-3, tokens=100, labelled=50, time=time.perf_counter())
        progress.step(record, loss=3 / step, gradient_norm=1.0)
    progress.validation(done + 3, loss=0.5, best=True)
    progress.close()
    return progress


def payload(path: Path) -> bytes:
    """Return the contents of wandb's file: LevelDB's log format, blocks of 32 KiB with a header before each part."""
    data, place, parts = path.read_bytes(), 7, []  # after wandb's own header
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # a header does not cross blocks
            place += 32768 - place % 32768
            continue
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
    return b"".join(parts)


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    progress = run_three_steps(tmp_path, ["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == FIGURES
    losses = [(event.step, round(event.value, 5)) for event in events.Scalars("loss")]
    assert losses == [(line["step"], round(line["loss"], 5)) for line in progress.records if "loss" in line]
    assert [(event.step, event.value) for event in events.Scalars("validation_loss")] == [(3, 0.5)]


def test_a_resumed_run_continues_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_three_steps(tmp_path, ["tensorboard"])
    run_three_steps(tmp_path, ["tensorboard"], done=3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_wandb_gets_the_numbers_of_the_log_and_no_console_output(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    print("Patient: My chest hurts.")
    run_three_steps(tmp_path, ["wandb"])
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    (run,) = folder.glob("run-*.wandb")
    assert all(name.encode() in payload(run) for name in FIGURES)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and not any(b"chest hurts" in path.read_bytes() for path in files)
    assert not [path.name for path in files if path.suffix in (".py", ".patch") or path.name == "output.log"]


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
