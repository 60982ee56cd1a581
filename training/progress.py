"""What a person sees of a run: a bar with the time left, a log of losses, and their curve as a picture."""

import fcntl
import json
import time
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from training.errors import fail


class Progress:
    """Progress bar on the console, one JSON line a step in `log_path`, and `loss.png` beside it.

    A line has step, epoch, loss (mean over the step's packs), lr, tokens (of all packs, padding left out) and seconds
    (wall time since the line before), all of them over all processes; a validation has a line with validation_loss.
    """

    def __init__(self, log_path: Path, total_steps: int, done_steps: int) -> None:
        self.log_path = log_path
        lines = log_path.read_text().splitlines() if done_steps and log_path.exists() else []
        self.records = [record for line in lines if (record := _read_line(line)) and record["step"] <= done_steps]
        log_path.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        self.bar = tqdm(total=total_steps, initial=done_steps, desc="training", unit="step", dynamic_ncols=True)
        self.shown: dict[str, str] = {}
        self.last_time = time.perf_counter()

    def step(self, step: int, epoch: int, loss: float, lr: float, tokens: int) -> None:
        now = time.perf_counter()
        record = {
            "step": step,
            "epoch": epoch,
            "loss": loss,
            "lr": lr,
            "tokens": tokens,
            "seconds": now - self.last_time,
        }
        self.last_time = now
        self._append(record)
        self.shown["loss"] = f"{loss:.3f}"
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def validation(self, step: int, loss: float) -> None:
        """Log a validation loss; its time is not counted to any step."""
        self._append({"step": step, "validation_loss": loss})
        self.shown["validation"] = f"{loss:.3f}"
        self.bar.set_postfix(self.shown)
        self.draw()
        self.last_time = time.perf_counter()

    def close(self) -> None:
        self.bar.close()
        self.draw()

    def draw(self) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
        for key, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
            points = [(record["step"], record[key]) for record in self.records if key in record]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, alpha=0.8, markersize=4)
        if axes.lines:
            axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(self.log_path.with_name("loss.png"), dpi=120)

    def _append(self, record: dict[str, float]) -> None:
        self.records.append(record)
        with self.log_path.open("a") as log:
            log.write(json.dumps(record) + "\n")


def lock_run(log: Path) -> TextIO:
    """The log of a run, locked as long as the process lives: two runs in one folder would spoil each other's files."""
    lock = log.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is writing {log}", "wait for its end, or give this run folders of its own in the YAML")
    if not _is_log(log):
        fail(f"{log} is there and is no log of training", "give another `train_log_metrics_path` in the YAML")
    return lock


def _is_log(path: Path) -> bool:
    """Whether a file begins as Progress writes it, as far as a kill let it: what may be replaced."""
    beginning = '{"step"'
    with path.open(errors="replace") as file:
        found = file.read(len(beginning))
    return beginning.startswith(found)


def _read_line(line: str) -> dict[str, float] | None:
    """The record, or None for a line that a killed run left half written."""
    try:
        return json.loads(line)
    except ValueError:
        return None
