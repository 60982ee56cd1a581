"""A folder of output that is replaced in one step: a run that is killed leaves the old one whole."""

import contextlib
import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError


@contextlib.contextmanager
def replacing(output: Path, names: set[str]) -> Iterator[Path]:
    """Give a new folder that takes the place of `output`, in one step, when the block ends without an error.

    It grows in `<output>.partial`, which holds a lock, too. A run that is killed leaves `output` as it was; the next
    run clears up. Raises UserError when `output` holds anything but files of these `names`, or is being written.
    """
    work = output.parent / f"{output.name}.partial"
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(lock.fileno()).st_nlink > 0  # 0: the run that held it has just removed it
        except BlockingIOError:
            held = False
        if not held:
            raise UserError(f"another run is writing {output}; wait for its end, or choose another --output_dir")
        clear(work, output)
        try:
            if output.exists() and not is_replaceable(output, names):
                raise UserError(f"{output} is there and is no dataset of this script; choose another --output_dir")
            new = work / "new"
            new.mkdir()
            yield new
            if not output.exists():
                new.rename(output)
            elif not exchange(new, output):
                output.rename(work / "old")
                new.rename(output)
        finally:
            clear(work, output)
            (work / "lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another run may have begun
                work.rmdir()


def clear(work: Path, output: Path) -> None:
    """Remove what a run leaves in its work folder. The old dataset goes back if nothing has taken its place."""
    if (work / "old").exists() and not output.exists():
        (work / "old").rename(output)
    for name in ("new", "old"):
        shutil.rmtree(work / name, ignore_errors=True)


def is_replaceable(output: Path, names: set[str]) -> bool:
    """Whether `output` is an empty folder, or holds `names` and nothing else."""
    return output.is_dir() and {path.name for path in output.iterdir()} in (set(), names)


def exchange(first: Path, second: Path) -> bool:
    """Let two folders swap their names in one step (Linux's renameat2). False where system or file system cannot."""
    at_fdcwd, rename_exchange = -100, 2  # from linux/fcntl.h and linux/fs.h
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0
