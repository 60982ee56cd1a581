"""Run the project's commands in forks of a process that has already loaded the heavy libraries.

A command starts in a tenth of a second instead of ten seconds. Otherwise it runs as from a shell, with its own memory,
working directory, umask, exit status and output.

    with Launcher() as launcher:
        status, output, errors = launcher.run(["eval.py", "model"], cwd=folder)
"""

import ctypes
import gc
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TRAINING = "arctic_training"


class Ended(NamedTuple):
    status: int
    output: str
    errors: str


class Launcher:
    """`run` may be called from several threads at once."""

    def __init__(self, **environment: str):
        self._folder = tempfile.TemporaryDirectory()
        self._address = f"{self._folder.name}/socket"
        # For arctic_training: one process, and any free port.
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, self._address]
        self._server = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE)
        assert b"ready\n" in self._server.stdout, "the libraries did not load"

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.wait()
        self._server.stdout.close()
        self._folder.cleanup()

    def run(self, command: Sequence[str], cwd: Path, largest_file: int | None = None) -> Ended:
        """Run a script of the project, or `arctic_training`, with arguments. Files can grow to `largest_file` bytes."""
        with Client(self._address) as connection:
            connection.send((list(command), str(cwd), largest_file))
            return Ended(*connection.recv())


def serve(address: str) -> tuple[list[str], str, int | None]:
    """Fork for each command that arrives. In the fork, return the command."""
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)  # end with the tests, even if they are killed
    gc.freeze()  # a garbage collection in a fork would copy all memory
    listener = Listener(address, backlog=16)
    print("ready", flush=True)
    while True:
        connection = listener.accept()
        if os.fork() == 0:
            listener.close()
            return run_in_fork(connection)
        connection.close()


def run_in_fork(connection: Connection) -> tuple[list[str], str, int | None]:
    """Fork once more: one process waits for the command and reports its end, the other becomes the command."""
    request = connection.recv()
    streams = [os.memfd_create(name) for name in ("output", "errors")]
    command = os.fork()
    if command:
        _, status = os.waitpid(command, 0)
        texts = [os.pread(stream, 1 << 24, 0).decode(errors="replace") for stream in streams]
        connection.send((os.waitstatus_to_exitcode(status), *texts))
        os._exit(0)
    connection.close()
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
    return request


def give_up_privileges() -> None:
    """Drop root's capabilities, so that file permissions apply as for any other user."""
    version_3, this_process, no_capabilities = 0x20080522, 0, (ctypes.c_uint32 * 6)()  # linux/capability.h
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(version_3, this_process), no_capabilities)


def become(name: str, arguments: list[str]) -> None:
    """Run the command in this process."""
    import arctic_training.entrypoint

    if name == TRAINING:
        sys.argv = [name, "--config", *arguments]
        arctic_training.entrypoint.launch()
        return
    sys.argv = [str(ROOT / name), *arguments]
    sys.path[0] = str(ROOT)
    runpy.run_path(sys.argv[0], run_name="__main__")


def exit_status(run: Callable[[], None]) -> int:
    """Call `run` and return the exit status that the interpreter would give."""
    try:
        run()
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        return exit_status(lambda: sys.excepthook(*sys.exc_info())) or 1
    return 0


def main() -> None:
    import arctic_training.entrypoint  # noqa: F401
    import datasets  # noqa: F401
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    (name, *arguments), folder, largest_file = serve(sys.argv[1])
    os.chdir(folder)
    give_up_privileges()
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    status = exit_status(lambda: become(name, arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a normal interpreter shutdown would copy all memory, object by object


if __name__ == "__main__":
    main()
