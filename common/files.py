"""Locks that end with the process, and files that are replaced in one step."""

import fcntl
from pathlib import Path
from typing import IO


def lock(path: Path, wait: bool = False) -> IO[str]:
    """Open `path` and lock it for as long as the returned file stays open, at most until this process ends.

    The file is created if it does not exist, and never truncated. Raises BlockingIOError if another process holds the
    lock, unless `wait`; OSError if the file cannot be opened.
    """
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        file.close()
        raise
    return file


def write_atomically(path: Path, text: str) -> None:
    """Replace the file at `path` in one step; a kill leaves the old one or the new one.

    Half a surrogate pair, which a model can write but which is no character, becomes "?".
    """
    draft = path.with_name(path.name + ".new")
    draft.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    draft.replace(path)
