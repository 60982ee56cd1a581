"""The end of a worker: all its processes, and the shared memory that they leave."""

import contextlib
import os
import time

import psutil


def kill_group(group: int, patience: float = 10.0) -> None:
    """SIGKILL every process of a group but the caller, and wait until they are gone.

    Python's resource tracker is spared for `patience` seconds. It removes the shared memory of the others - hundreds
    of MB, and prompts among it, where vLLM spreads a model over GPUs - and ends by itself, with the last of them.
    """
    spared_until = time.monotonic() + patience
    while rest := _others(group):
        late = time.monotonic() > spared_until
        victims = [process for process in rest if late or not _is_tracker(process)]
        if not victims and os.getpgrp() == group:  # the tracker waits for the caller, too
            return
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.01)


def _others(group: int) -> list[psutil.Process]:
    """Processes of the group without the caller and without zombies, which hold nothing."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            ours = os.getpgid(process.pid) == group and process.pid != os.getpid()
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _is_tracker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return any("multiprocessing.resource_tracker" in word for word in process.cmdline())
    return False
