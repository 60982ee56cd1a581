"""Send a run's figures to experiment trackers: TensorBoard, Weights & Biases, Trackio.

Each gets the numbers of train-log.jsonl and no text, so nothing of a dialogue or note. TensorBoard writes files beside
the log. Weights & Biases also gets the name of the run's folder and the data that its own library collects, such as the
names of user, machine and command, and the load of CPU and GPU; WANDB_MODE=offline keeps all of it in the folder.
Trackio also gets the name of the run's folder, and writes a database on this machine unless TRACKIO_SPACE_ID names a
Space of Hugging Face.
"""

import contextlib
import importlib.util
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

Name = Literal["tensorboard", "wandb", "trackio"]

PROJECT = "soap-notes"
# Newer releases of Trackio require huggingface_hub 1, which transformers 4 does not support.
PACKAGES = {"trackio": "'trackio<0.21' 'huggingface_hub<1'"}


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
            raise ValueError(f"{name} is not installed; run `pip install {PACKAGES.get(name, name)}`, or leave it out")


def start_tracker(name: Name, folder: Path, done_steps: int) -> Tracker:
    """Start a tracker for the run whose log is in `folder`; a run resumed after `done_steps` continues the curves.

    A killed run may have logged steps beyond its last saved state, which the resumed run repeats. TensorBoard then
    hides the earlier values; Weights & Biases and Trackio keep both.
    """
    match name:
        case "tensorboard":
            return TensorBoard(folder, done_steps)
        case "wandb":
            return WeightsAndBiases(folder, done_steps > 0)
        case "trackio":
            return Trackio(folder, done_steps > 0)


class TensorBoard:
    """Writes event files to `folder`/tensorboard; TensorBoard shows them with `tensorboard --logdir FOLDER`.

    It hides steps after `done_steps` of earlier runs in the folder, so a new run replaces the curves there.
    """

    def __init__(self, folder: Path, done_steps: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done_steps + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to the server and account that wandb's own environment variables choose, without console output or code.

    The step is a metric and the x-axis of all others: wandb ignores values at a step of its own before the latest one.
    """

    def __init__(self, folder: Path, resumed: bool):
        import wandb

        self._run = wandb.init(
            project=PROJECT,
            name=folder.name,
            id=run_id(folder, "wandb", resumed),
            resume="allow",
            dir=str(folder),
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True, disable_job_creation=True),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # finish alone may return before wandb's own process has written its file


class Trackio:
    """Logs to Trackio's database in $TRACKIO_DIR (default: trackio in Hugging Face's cache), or to $TRACKIO_SPACE_ID.

    `trackio show` opens the dashboard. A Space that Trackio creates is private.
    """

    def __init__(self, folder: Path, resumed: bool):
        import trackio

        if not os.environ.get("TRACKIO_SPACE_ID"):
            # Trackio would ask Hugging Face for the name of the user whose token is stored on this machine.
            trackio.Run._get_username = lambda _run: None
        self._run = trackio.init(
            project=PROJECT,
            name=f"{folder.name}-{run_id(folder, 'trackio', resumed)}",
            resume="allow",
            private=True,
            embed=False,
            auto_log_gpu=False,
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def run_id(folder: Path, tracker: Name, resumed: bool) -> str:
    """Return the run's id for a tracker, kept in `folder`/TRACKER-id; a run that is not resumed gets a new one."""
    path = folder / f"{tracker}-id"
    if resumed:
        with contextlib.suppress(FileNotFoundError):
            return path.read_text()
    path.write_text(secrets.token_hex(4))
    return path.read_text()
