"""The end of a worker: all its processes, and the shared memory that they leave."""

import contextlib
import os
import re
import time
from collections.abc import Collection
from pathlib import Path

import psutil

# In /proc/PID/maps: what is written to by several and has, or had at first, a name right below /dev/shm. Files that a
# user keeps there, such as a model, are mapped to be read only, or lie in folders.
_SHARED = re.compile(r"^\S+ rw.s \S+ \S+ (\d+) +/dev/shm/[^/\n]+$", re.MULTILINE)


def kill_groups(*groups: int, patience: float = 30.0) -> None:
    """SIGKILL every process of the groups but the caller, wait until they are gone, and remove the memory they shared.

    Where vLLM spreads a model over GPUs that is hundreds of MB, and prompts among it. Its name outlives the killed:
    Python's own resource tracker is killed with them, and does not know of what vLLM's C++ code shares. A process that
    does not end, such as one that waits for a driver, is left behind after `patience` seconds.
    """
    deadline = time.monotonic() + patience
    shared = _shared_memory(os.getpid()) if os.getpgrp() in groups else set()
    while (rest := _others(groups)) and time.monotonic() < deadline:
        for process in rest:
            shared |= _shared_memory(process.pid)
        for process in rest:
            with contextlib.suppress(psutil.Error, OSError):
                process.kill()
        time.sleep(0.01)
    for path in Path("/dev/shm").iterdir() if shared else ():
        with contextlib.suppress(OSError):
            if path.stat().st_ino in shared:
                path.unlink()


def _others(groups: Collection[int]) -> list[psutil.Process]:
    """Processes of the groups without the caller and without zombies, which hold nothing."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            ours = os.getpgid(process.pid) in groups and process.pid != os.getpid()
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _shared_memory(pid: int) -> set[int]:
    """The inodes of memory and semaphores that a process shares; none of one that has ended."""
    with contextlib.suppress(OSError):
        return {int(inode) for inode in _SHARED.findall(Path(f"/proc/{pid}/maps").read_text(errors="replace"))}
    return set()
