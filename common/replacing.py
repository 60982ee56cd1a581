"""Replace a folder of output in one step, so that a killed run leaves the old one whole."""

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from common.files import lock


@contextlib.contextmanager
def replacing(output: Path, names: set[str]) -> Iterator[Path]:
    """Yield a new folder that replaces `output`, in one step, when the block ends without an error.

    The new folder and a lock are in `<output>.partial`. A killed run leaves `output` as it was; the next run cleans up.
    Raises UserError if `output` contains anything other than `names`, or if another run is writing it.
    """
    work = output.parent / f"{output.name}.partial"
    work.mkdir(parents=True, exist_ok=True)
    busy = UserError(f"another run is writing {output}; wait until it ends, or choose another --output_dir")
    try:
        lock_file = lock(work / "lock")
    except BlockingIOError:
        raise busy from None
    with lock_file:
        if os.fstat(lock_file.fileno()).st_nlink == 0:  # the run that held the lock has just removed it
            raise busy
        clean_up(work, output)
        try:
            if output.exists() and not is_replaceable(output, names):
                raise UserError(f"{output} exists but was not written by this script; choose another --output_dir")
            new = work / "new"
            new.mkdir()
            yield new
            if not output.exists():
                new.rename(output)
            elif not exchange(new, output):
                output.rename(work / "old")
                new.rename(output)
        finally:
            clean_up(work, output)
            (work / "lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another run may have begun
                work.rmdir()


def clean_up(work: Path, output: Path) -> None:
    """Empty the work folder of a killed run. Restore the old dataset if no new one has replaced it."""
    if (work / "old").exists() and not output.exists():
        (work / "old").rename(output)
    for name in ("new", "old"):
        shutil.rmtree(work / name, ignore_errors=True)


def is_replaceable(output: Path, names: set[str]) -> bool:
    """Return whether `output` is an empty folder, or contains `names` and nothing else."""
    return output.is_dir() and {path.name for path in output.iterdir()} in (set(), names)


def exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step with Linux's renameat2. Return False if the system or file system cannot."""
    at_fdcwd, rename_exchange = -100, 2  # from linux/fcntl.h and linux/fs.h
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0
