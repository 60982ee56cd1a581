"""A user's mistake ends a run with one line and status 2.

arctic_training calls this project's code, not the other way round: what it or a library raises can only be met in
`sys.excepthook`.
"""

import os
import re
import sys
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
from arctic_training.exceptions import RegistryError
from pydantic import ValidationError
from safetensors import SafetensorError

OUT_OF_MEMORY = (
    "set `model.disable_activation_checkpoint: false` in the YAML, which an unfinished run goes on with, "
    "then lower `data.max_length`"
)


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
    """What is wrong and what to do about it, or None for what is no user's mistake."""
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
    if isinstance(error, OSError):
        return str(error), "mend that, or correct the YAML"
    if isinstance(error, ValueError):
        return f"{error} ({raised_in(error.__traceback__)})", "correct the YAML"
    return None


def raised_in(traceback: TracebackType | None) -> str:
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return f"{Path(traceback.tb_frame.f_code.co_filename).name}:{traceback.tb_lineno}" if traceback else "?"


def tell_in_one_line() -> None:
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
