"""Lock files until the process ends, and replace files atomically."""

import fcntl
from pathlib import Path
from typing import IO


def lock(path: Path, wait: bool = False) -> IO[str]:
    """Open `path` and lock it until the returned file is closed or this process ends.

    The file is created if it does not exist, and never truncated. With `wait`, wait for another process to release the
    lock; otherwise raise BlockingIOError. Raises OSError if the file cannot be opened.
    """
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        file.close()
        raise
    return file


def write_atomically(path: Path, text: str) -> None:
    """Replace the file at `path` atomically: if the process is killed, the old or the new file remains.

    Lone surrogates, which a model can write but UTF-8 cannot encode, become "?".
    """
    draft = path.with_name(path.name + ".new")
    draft.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    draft.replace(path)
