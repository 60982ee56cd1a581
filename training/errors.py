"""End a run with one line and status 2 when the user made a mistake.

arctic_training calls this project's code, so its errors and those of libraries can be caught only in `sys.excepthook`.
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
    "set `model.disable_activation_checkpoint: false` in the YAML, with which an unfinished run can resume, "
    "then lower `data.max_length`"
)

# Library functions that read a setting straight from the YAML: their ValueErrors and TypeErrors concern that setting.
# All other such errors are bugs, and keep their traceback.
_SETTING_READERS = {
    "get_peft_model": "model.peft_config",
    "peft_config_obj": "model.peft_config",
    "get_scheduler": "scheduler",
    "filter_dataset_length": "data.max_length",
    "pack_dataset": "data",
}
_PROCESS_ERRORS = (ConnectionError, ChildProcessError, ProcessLookupError, InterruptedError, BlockingIOError)


def fail(problem: str, remedy: str, one_process: bool = False) -> NoReturn:
    """Print one line for the user and exit with status 2.

    Only the first process of each machine prints, unless the error may occur in `one_process` only.
    """
    if one_process or os.environ.get("LOCAL_RANK", "0") == "0":
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (process {rank})"
        print("error:", *f"{problem.rstrip('.')}{where}: {remedy}".split(), file=sys.stderr, flush=True)
    raise SystemExit(2)


def explain(error: BaseException) -> tuple[str, str] | None:
    """Return the problem and its remedy, or None if the error is not a user's mistake."""
    if isinstance(error, ValidationError):
        # later errors may only follow from the first one
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        return f"{key + ': ' if key else ''}{first['msg']}", "correct the YAML"
    if isinstance(error, RegistryError):
        name, _, known = str(error).partition(". Ensure that ")
        return f"{name} (choose from {known.rpartition(': ')[2]})", "correct the YAML"
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory ({str(error)[:100]})", OUT_OF_MEMORY
    if isinstance(error, SafetensorError) or re.search("PytorchStreamWriter|inline_container", str(error)):
        return f"a file of weights is damaged or cannot be written ({error})", "replace it, or make room on the disk"
    if isinstance(error, torch.distributed.DistNetworkError):
        return f"the run's processes cannot connect ({error})", "if the port is in use, set another --master_port"
    if isinstance(error, UnsupportedAttention):
        return error.problem, error.remedy
    if isinstance(error, OSError) and not isinstance(error, _PROCESS_ERRORS):
        if error.errno == errno.ENOSPC:
            return str(error), "make room on the disk"
        return str(error), "correct that file or folder, or set a different one in the YAML"
    if isinstance(error, ValueError | TypeError) and (setting := _setting_read_in(error.__traceback__)):
        return str(error), f"correct `{setting}` in the YAML"
    return None


def _setting_read_in(traceback: TracebackType | None) -> str | None:
    """Return the setting that a library was reading when it raised the error, if any."""
    for frame, _ in walk_tb(traceback):
        if setting := _SETTING_READERS.get(frame.f_code.co_name):
            return setting
    return None


def report_in_one_line() -> None:
    """From now on, report errors that `explain` recognises in one line; others keep their traceback."""
    show = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        explanation = explain(error)
        if explanation:
            sys.stderr = sys.__stderr__  # torch.distributed captures a hook's output, which SystemExit would lose
            print(file=sys.stderr)  # start below a progress bar
            common = isinstance(error, ValidationError | RegistryError)  # all processes read the same YAML
            fail(*explanation, one_process=not common)
        show(kind, error, traceback)

    sys.excepthook = hook
