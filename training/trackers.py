"""Send a run's figures to experiment trackers: TensorBoard, Weights & Biases.

Each gets the numbers of train-log.jsonl and no text, so nothing of a dialogue or note. TensorBoard writes files beside
the log. Weights & Biases also gets the name of the run's folder and what its own library collects, such as the names of
user, machine and command, and the load of CPU and GPU; WANDB_MODE=offline keeps all of it in the folder.
"""

import contextlib
import importlib.util
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

Name = Literal["tensorboard", "wandb"]

PROJECT = "soap-notes"


class Tracker(Protocol):
    """A place for the numbers of a run."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Add the values of a step."""

    def close(self) -> None:
        """Wait until all values are written."""


def check_installed(names: Iterable[Name]) -> None:
    """Raise ValueError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{name} is not installed; run `pip install {name}`, or leave it out")


def start_tracker(name: Name, folder: Path, resumed: bool) -> Tracker:
    """Start a tracker for the run whose log is in `folder`; a resumed run continues the earlier one's curves."""
    return TensorBoard(folder) if name == "tensorboard" else WeightsAndBiases(folder, resumed)


class TensorBoard:
    """Writes event files to `folder`/tensorboard; TensorBoard shows them with `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to the server and account that wandb's own environment variables choose, without console output or code."""

    def __init__(self, folder: Path, resumed: bool):
        import wandb

        self._run = wandb.init(
            project=PROJECT,
            name=folder.name,
            id=run_id(folder, resumed),
            resume="allow",
            dir=str(folder),
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True, disable_job_creation=True),
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def run_id(folder: Path, resumed: bool) -> str:
    """Return the run's id for Weights & Biases, kept in `folder`/wandb-id."""
    path = folder / "wandb-id"
    if resumed:
        with contextlib.suppress(FileNotFoundError):
            return path.read_text()
    path.write_text(secrets.token_hex(4))
    return path.read_text()
