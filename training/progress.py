"""Show the progress of a run: a bar with the time left, a log of losses, a plot of them, and experiment trackers."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from common.files import lock
from training.errors import fail
from training.trackers import Name, start_tracker


@dataclass(frozen=True)
class StepRecord:
    """The facts about a step that are known before the GPU has run it."""

    step: int
    epoch: int
    rate: float  # learning rate
    tokens: int  # in all packs, without padding
    labelled: int
    time: float  # time.perf_counter() when it was queued


class Progress:
    """A progress bar on the console, one JSON line per step in `log_path`, and `loss.png` beside it.

    A step's line has step, epoch, loss (mean over the step's labelled tokens), gradient_norm (before clipping), lr (of
    this step), tokens (in all packs, without padding) and seconds (wall time since the previous step), over all
    processes. A validation's line has step, validation_loss, and best (whether it is the best so far). The trackers get
    the same numbers.
    """

    def __init__(self, log_path: Path, total_steps: int, done_steps: int, trackers: Sequence[Name] = ()) -> None:
        self.log_path = log_path
        lines = log_path.read_text().splitlines() if done_steps and log_path.exists() else []
        self.records = [record for line in lines if (record := _read_line(line)) and record["step"] <= done_steps]
        log_path.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        self.bar = tqdm(total=total_steps, initial=done_steps, desc="training", unit="step", dynamic_ncols=True)
        self.shown: dict[str, str] = {}
        self.trackers = [start_tracker(name, log_path.parent, done_steps) for name in trackers]
        self.last_time = time.perf_counter()

    def step(self, record: StepRecord, loss: float, gradient_norm: float) -> None:
        line = {
            "step": record.step,
            "epoch": record.epoch,
            "loss": loss,
            "gradient_norm": gradient_norm,
            "lr": record.rate,
            "tokens": record.tokens,
            "seconds": record.time - self.last_time,
        }
        self.last_time = record.time
        self._append(line)
        self.shown["loss"] = f"{loss:.3f}"
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def validation(self, step: int, loss: float, best: bool) -> None:
        """Log a validation loss. Validation time is excluded from step times."""
        self._append({"step": step, "validation_loss": loss, "best": best})
        self.shown["validation"] = f"{loss:.3f}"
        self.bar.set_postfix(self.shown)
        self.draw()
        self.last_time = time.perf_counter()

    def close(self) -> None:
        self.bar.close()
        self.draw()
        for tracker in self.trackers:
            tracker.close()

    def draw(self) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 6), layout="constrained")
        losses, norms = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        losses.set_ylabel("loss (nats per token)")
        norms.set(ylabel="gradient norm", xlabel="step", yscale="log")
        curves = (
            (losses, "loss", "training", "-"),
            (losses, "validation_loss", "validation", "o-"),
            (norms, "gradient_norm", "gradient norm", "-"),
        )
        for axes, key, label, style in curves:
            points = [(record["step"], record[key]) for record in self.records if key in record]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, alpha=0.8, markersize=4)
        if losses.lines:
            losses.legend()
        for axes in (losses, norms):
            axes.grid(alpha=0.3)
        figure.savefig(self.log_path.with_name("loss.png"), dpi=120)

    def _append(self, record: dict[str, float]) -> None:
        self.records.append(record)
        with self.log_path.open("a") as log:
            log.write(json.dumps(record) + "\n")
        values = {name: value for name, value in record.items() if name not in ("step", "best")}
        for tracker in self.trackers:
            tracker.log(values, record["step"])


def lock_run(log: Path) -> IO[str]:
    """Return the log of a run, locked for the life of this process, so that no second run writes to the same folder."""
    try:
        held = lock(log)
    except BlockingIOError:
        fail(f"another run is writing {log}", "wait until it ends, or give this run its own folders in the YAML")
    if not _is_log(log):
        fail(f"{log} exists but is not a training log", "set another `train_log_metrics_path` in the YAML")
    return held


def _is_log(path: Path) -> bool:
    """Return whether a file starts like a log of Progress, even one cut short by a kill, and so may be overwritten."""
    beginning = '{"step"'
    with path.open(errors="replace") as file:
        found = file.read(len(beginning))
    return beginning.startswith(found)


def _read_line(line: str) -> dict[str, float] | None:
    """Return the record, or None for a line that a killed run left half written."""
    try:
        return json.loads(line)
    except ValueError:
        return None
