"""A user's mistake ends a run with one line and status 2.

arctic_training calls this project's code, not the other way round: what it or a library raises can only be met in
`sys.excepthook`.
"""

import errno
import os
import re
import sys
from traceback import walk_tb
from types import TracebackType
from typing import NoReturn

import torch
from arctic_training.exceptions import RegistryError
from pydantic import ValidationError
from safetensors import SafetensorError

from training.attention import UnsupportedAttention

OUT_OF_MEMORY = (
    "set `model.disable_activation_checkpoint: false` in the YAML, which an unfinished run goes on with, "
    "then lower `data.max_length`"
)

# Functions of libraries that take a setting as it is in the YAML: their ValueErrors and TypeErrors are about it. All
# others are faults of the program, which keep their traceback.
_READS_SETTING = {
    "get_peft_model": "model.peft_config",
    "peft_config_obj": "model.peft_config",
    "get_scheduler": "scheduler",
    "filter_dataset_length": "data.max_length",
    "pack_dataset": "data",
}
_OF_PROCESSES = (ConnectionError, ChildProcessError, ProcessLookupError, InterruptedError, BlockingIOError)


def fail(problem: str, remedy: str, alone: bool = False) -> NoReturn:
    """End the run with one line for the user.

    A machine's first process tells it for all of them, but for what a process may have met `alone`.
    """
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (process {rank})"
        print("error:", *f"{problem.rstrip('.')}{where}: {remedy}".split(), file=sys.stderr, flush=True)
    raise SystemExit(2)


def explain(error: BaseException) -> tuple[str, str] | None:
    """What is wrong and what to do about it, or None for what is no mistake of the user."""
    if isinstance(error, ValidationError):
        # pydantic also lists the values that it could not make up because of the first one
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        return f"{key + ': ' if key else ''}{first['msg']}", "correct the YAML"
    if isinstance(error, RegistryError):
        name, _, known = str(error).partition(". Ensure that ")
        return f"{name} (there are {known.rpartition(': ')[2]})", "correct the YAML"
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory ({str(error)[:100]})", OUT_OF_MEMORY
    if isinstance(error, SafetensorError) or re.search("PytorchStreamWriter|inline_container", str(error)):
        return f"a file of weights is damaged or cannot be written ({error})", "save it again, or make room on the disk"
    if isinstance(error, torch.distributed.DistNetworkError):
        return f"the run's processes cannot connect ({error})", "if the port is taken, --master_port N names another"
    if isinstance(error, UnsupportedAttention):
        return error.problem, error.remedy
    if isinstance(error, OSError) and not isinstance(error, _OF_PROCESSES):
        if error.errno == errno.ENOSPC:
            return str(error), "make room on the disk"
        return str(error), "correct that file or folder, or name another one in the YAML"
    if isinstance(error, ValueError | TypeError) and (setting := _setting_read_in(error.__traceback__)):
        return str(error), f"correct `{setting}` in the YAML"
    return None


def _setting_read_in(traceback: TracebackType | None) -> str | None:
    """The setting that was made into an object when an error was raised."""
    for frame, _ in walk_tb(traceback):
        if setting := _READS_SETTING.get(frame.f_code.co_name):
            return setting
    return None


def report_in_one_line() -> None:
    """From here on, what `explain` knows is told in one line; all else keeps its traceback."""
    show = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        explanation = explain(error)
        if explanation:
            sys.stderr = sys.__stderr__  # torch.distributed collects what a hook prints, and SystemExit would lose it
            print(file=sys.stderr)  # below a progress bar
            fail(*explanation, alone=not isinstance(error, ValidationError | RegistryError))  # all read one YAML
        show(kind, error, traceback)

    sys.excepthook = hook
