"""Run vLLM in separate processes, one per replica. They end with this process and leave nothing behind."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from evaluation.engines.base import LanguageModel, Request
from evaluation.engines.processes import kill_groups
from evaluation.engines.reload import can_reload
from evaluation.engines.vllm_worker import explain_by_log

_ROOT = Path(__file__).resolve().parents[2]
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # all files are local by now
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM's own engine process would cost a second start
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with threads can hang
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # nvidia-smi's order
    "VLLM_HOST_IP": "127.0.0.1",  # vLLM would look up this machine's address through 8.8.8.8, and listen there
}

VLLM_DEFAULTS = {"seed": 0, "enable_prefix_caching": True}  # vLLM's own, passed so that the manifest records them


@dataclass(frozen=True)
class EngineSpec:
    """Settings of an engine.

    With `merge_into`, the adapter in `lora_path` is merged into a copy of the weights in that folder. Otherwise vLLM
    applies the adapter at run time.
    """

    model: Path
    vllm_args: dict[str, Any]
    sampling: dict[str, Any]
    lora_path: Path | None = None
    merge_into: Path | None = None
    check_first: tuple[Path, ...] = ()  # other models of this call; the worker checks their chat templates first


@dataclass(frozen=True)
class _Load:
    """A request to replica `group` to load other weights: the fields of an EngineSpec that name them."""

    group: int
    weights: dict[str, Path | None]


def _weights(spec: EngineSpec) -> dict[str, Path | None]:
    return {name: getattr(spec, name) for name in ("model", "lora_path", "merge_into")}


class Engine(LanguageModel):
    """Replicas of one vLLM engine, each in its own process.

    `devices` has one entry per replica: the GPUs that it may see, e.g. ["0", "1"], or [""] without a GPU. The output of
    libraries goes to the file `log`.
    """

    def __init__(self, name: str, spec: EngineSpec, log: Path, devices: Iterable[str] = ("",), window: int = 4096):
        devices = list(devices)
        super().__init__(name, window, _settings(spec, devices))
        self._spec, self._devices = spec, devices
        log_start = log.stat().st_size if log.exists() else 0
        self._processes = [_start(spec, device, log) for device in devices]
        self._unsent: list[list[str]] = [[] for _ in devices]  # lines for each process
        for process in self._processes:
            threading.Thread(target=_read_events, args=(process, log, log_start, self.report), daemon=True).start()

    async def load(self, spec: EngineSpec) -> bool:
        """Load the weights of `spec` into all replicas, or return False if the engine has to be started again."""
        if not can_reload(self._spec, spec):
            return False
        self.started = time.monotonic()
        weights = _weights(spec)
        try:
            await asyncio.gather(*(self._submit(_Load(replica, weights)) for replica in range(len(self._processes))))
        except UserError as error:
            self.report({"line": f"{error}; it starts again, because it could not load {spec.model}"})
            return False
        self.ready = time.monotonic()
        self._spec, self.settings = spec, _settings(spec, self._devices)
        return True

    def merge_ahead(self, spec: EngineSpec) -> None:
        """Begin to merge the adapter of `spec`, for a later `load`."""
        if spec.merge_into and can_reload(self._spec, spec):
            for lines in self._unsent:
                lines.append(f"{json.dumps({'kind': 'merge', 'weights': _weights(spec)}, default=str)}\n")
            self._write_unsent()

    def close(self) -> None:
        """Kill the processes and their children, which frees their memory. Calling it twice is safe."""
        processes, self._processes = self._processes, []  # once they end, their process ids may be reused
        kill_groups(*(process.pid for process in processes))
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
        super().close()

    def _send(self, number: int, request: Request | _Load) -> None:
        if not any(self._unsent):  # one write for all requests of this iteration of the event loop
            asyncio.get_running_loop().call_soon(self._write_unsent)
        kind = "load" if isinstance(request, _Load) else "chat"
        line = json.dumps({"id": number, "kind": kind, **vars(request)}, default=str)
        self._unsent[request.group % len(self._unsent)].append(f"{line}\n")

    def _write_unsent(self) -> None:
        for process, lines in zip(self._processes, self._unsent, strict=False):  # no process once closed
            with contextlib.suppress(BrokenPipeError):  # it died: the thread that reads from it reports the cause
                process.stdin.write("".join(lines))
                process.stdin.flush()
        for lines in self._unsent:
            lines.clear()


def _settings(spec: EngineSpec, devices: list[str]) -> dict[str, Any]:
    """Return all that determines the answers, for the manifest."""
    merged = bool(spec.merge_into)
    return {"vllm_args": spec.vllm_args, "sampling": spec.sampling, "merged": merged, "devices": devices}


def compiles_nothing(vllm_args: dict[str, Any]) -> bool:
    """Return whether these arguments of vLLM turn torch.compile off."""
    compilation = vllm_args.get("compilation_config")
    mode = compilation.get("mode") if isinstance(compilation, dict) else compilation
    return bool(vllm_args.get("enforce_eager")) or mode in (0, "NONE")


def _start(spec: EngineSpec, device: str, log: Path) -> subprocess.Popen:
    """Start a worker in a session of its own, and send it the specification."""
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": path}
    if compiles_nothing(spec.vllm_args):
        # vLLM would still compile a few small functions. On a CPU that is most of a start.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    if device:
        environment["CUDA_VISIBLE_DEVICES"] = device
    with log.open("a", encoding="utf-8") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "evaluation.engines.vllm_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            env=environment,
            start_new_session=True,
            text=True,
            encoding="utf-8",
        )
    process.stdin.write(json.dumps(asdict(spec), default=str) + "\n")
    process.stdin.flush()
    return process


def _read_events(
    process: subprocess.Popen, log: Path, log_start: int, report: Callable[[dict[str, Any]], None]
) -> None:
    for line in process.stdout:
        event = json.loads(line)
        if "failed" in event:
            written = log.read_bytes()[log_start:].decode(errors="replace") if log.exists() else ""
            event["failed"] = f"{explain_by_log(event['failed'], written)} (log: {log})"
        report(event)
    with contextlib.suppress(ChildProcessError):  # already closed
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # keep the process id reserved until `close`
        status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        report({"failed": f"{_how_it_ended(status)} (log: {log})"})


def _how_it_ended(status: int) -> str:
    if status == -signal.SIGKILL:
        return "killed by the system, most often for memory; try a smaller --max_model_len or a smaller model"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
