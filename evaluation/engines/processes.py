"""End a worker: kill all its processes, and remove the shared memory that they leave behind."""

import contextlib
import os
import re
import time
from collections.abc import Collection
from pathlib import Path

import psutil

# In /proc/PID/maps: match shared writable mappings of files directly under /dev/shm, even if since unlinked. A user's
# files there, such as a model, are mapped read-only, or lie in folders.
_SHARED = re.compile(r"^\S+ rw.s \S+ \S+ (\d+) +/dev/shm/[^/\n]+$", re.MULTILINE)


def kill_groups(*groups: int, patience: float = 30.0) -> None:
    """Kill every process of the groups except the caller, wait for them to end, and remove their shared memory.

    A model that vLLM splits over GPUs shares hundreds of MB, including prompts. That memory outlives the processes:
    Python's resource tracker is killed with them, and does not know the memory of vLLM's C++ code. A process that does
    not end within `patience` seconds, e.g. because it waits for a driver, is left running.
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
    """Return the processes of the groups, except the caller and zombies, which hold no memory."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            ours = os.getpgid(process.pid) in groups and process.pid != os.getpid()
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _shared_memory(pid: int) -> set[int]:
    """Return the inodes of the memory and semaphores that a process shares; none if it has ended."""
    with contextlib.suppress(OSError):
        return {int(inode) for inode in _SHARED.findall(Path(f"/proc/{pid}/maps").read_text(errors="replace"))}
    return set()
