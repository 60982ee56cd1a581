"""Language models to send chats to: the interface, and vLLM in processes of its own that leave nothing behind."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import prompts
from evaluation.errors import UserError
from evaluation.processes import kill_groups
from evaluation.worker import explain_by_log

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # all files are local by now
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM's own engine process would cost a second start
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with threads can hang
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # nvidia-smi's order
    "VLLM_HOST_IP": "127.0.0.1",  # vLLM would find out this machine's own address by way of 8.8.8.8, and listen there
}


@dataclass(frozen=True)
class Request:
    """One chat. `tag` comes back with the answer; `group` keeps chats that share a prefix on one replica.

    `sampling` goes over the sampling parameters that all requests share.
    """

    tag: Any
    messages: prompts.Messages
    group: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """The answer to a Request. finish_reason: stop, length, prompt_too_long or error."""

    tag: Any
    text: str
    finish_reason: str
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0


class LanguageModel(ABC):
    """Takes chats and gives answers in the order in which they finish.

    At most `window` requests are in flight, so that a long run does not gather in memory.
    """

    def __init__(self, name: str, window: int, settings: dict[str, Any] | None = None):
        self.settings = settings or {}  # what determines the answers, for the manifest
        self.name, self.window, self.in_flight = name, window, 0
        self.tokens = {"prompt": 0, "cached": 0, "output": 0}
        self._started = self._ready = self._last_answer = time.monotonic()
        self._first_request: float | None = None
        self._events: queue.SimpleQueue[tuple[float, dict[str, Any]]] = queue.SimpleQueue()
        self._tags: dict[int, Any] = {}
        self._sent = 0
        self._told: dict[str, float] = {}

    def __enter__(self) -> "LanguageModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Stop; nothing is left running afterwards, and a `complete` that still waits ends."""
        self.report({"failed": "it was closed"})

    @abstractmethod
    def _send(self, number: int, request: Request) -> None:
        """Start on a request; its answer becomes an event with this number as its id."""

    def report(self, event: dict[str, Any]) -> None:
        """For the threads that wait for answers: {"ready": True}, {"failed": why}, or {"id", "text", ...}."""
        self._events.put((time.monotonic(), event))

    @property
    def init_seconds(self) -> float:
        """From the start until the last replica was ready."""
        return round(self._ready - self._started, 2)

    @property
    def busy_seconds(self) -> float:
        """From the first request, or from being ready if that came later, until the last answer."""
        return round(max(0.0, self._last_answer - max(self._ready, self._first_request or self._started)), 2)

    def effort(self) -> dict[str, float]:
        """Seconds ("init", "busy") and tokens ("prompt", "cached", "output") since the last call of this."""
        now = {"init": self.init_seconds, "busy": self.busy_seconds, **self.tokens}
        earlier, self._told = self._told, now
        return {kind: round(amount - earlier.get(kind, 0), 2) for kind, amount in now.items()}

    def complete(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """Send `requests` and yield their answers; `submit` may add more on the way. Raises UserError.

        A None among the requests says that there is none at the moment: answers that are here are yielded meanwhile.
        """
        for request in requests:
            if request:
                self.submit(request)
            while (done := self._next(wait=self.in_flight >= self.window)) is not None:
                yield done
        while self.in_flight:
            yield self._next(wait=True)

    def submit(self, request: Request) -> None:
        """Send one request; its answer comes out of the running `complete`."""
        if self._first_request is None:
            self._first_request = time.monotonic()
        self._tags[self._sent] = request.tag
        self.in_flight += 1
        self._send(self._sent, request)
        self._sent += 1

    def _next(self, wait: bool) -> Completion | None:
        while wait or not self._events.empty():
            now, event = self._events.get()
            if "failed" in event:
                raise UserError(f"the {self.name} stopped: {event['failed']}")
            if "ready" in event:
                self._ready = now
                continue
            self._last_answer = now
            self.in_flight -= 1
            done = Completion(self._tags.pop(event.pop("id")), **event)
            for kind in self.tokens:
                self.tokens[kind] += getattr(done, f"{kind}_tokens")
            return done
        return None


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is to run. `schema` is a JSON schema that every answer must follow.

    With `merge_into`, the adapter in `lora_path` is added to the weights and the sum kept in that folder; without, vLLM
    applies it at run time.
    """

    model: Path
    vllm_args: dict[str, Any]
    sampling: dict[str, Any]
    schema: dict[str, Any] | None = None
    lora_path: Path | None = None
    merge_into: Path | None = None


class Engine(LanguageModel):
    """Replicas of one vLLM engine, each in its own process. Starts at once; requests may be sent before it is ready.

    `devices` has one entry a replica: the GPUs it may see, e.g. ["0", "1"], or [""] without a GPU. Libraries write to
    the file `log`.
    """

    def __init__(self, name: str, spec: EngineSpec, log: Path, devices: Iterable[str] = ("",), window: int = 4096):
        devices = list(devices)
        settings = {"vllm_args": spec.vllm_args, "sampling": spec.sampling, "merged": bool(spec.merge_into)}
        super().__init__(name, window, settings | {"devices": devices})
        begin = log.stat().st_size if log.exists() else 0
        self._processes = [_start(spec, device, log) for device in devices]
        for process in self._processes:
            threading.Thread(target=_read_events, args=(process, log, begin, self.report), daemon=True).start()

    def close(self) -> None:
        """Kill the processes and all that they started; their memory is free afterwards. A second call does nothing."""
        ended, self._processes = self._processes, []  # later their numbers may be those of others
        kill_groups(*(process.pid for process in ended))
        for process in ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
        super().close()

    def _send(self, number: int, request: Request) -> None:
        line = {"id": number, "messages": request.messages, "sampling": request.sampling}
        process = self._processes[request.group % len(self._processes)]
        with contextlib.suppress(BrokenPipeError):  # it died: the thread that reads from it tells why
            process.stdin.write(json.dumps(line) + "\n")
            process.stdin.flush()


def _start(spec: EngineSpec, device: str, log: Path) -> subprocess.Popen:
    """A worker in a session of its own, with the specification sent to it."""
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": path}
    if device:
        environment["CUDA_VISIBLE_DEVICES"] = device
    with log.open("a", encoding="utf-8") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "evaluation.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            env=environment,
            start_new_session=True,
            text=True,
            encoding="utf-8",
        )
    message = {**asdict(spec), "chat_template_kwargs": prompts.CHAT_TEMPLATE_KWARGS}
    process.stdin.write(json.dumps(message, default=str) + "\n")
    process.stdin.flush()
    return process


def _read_events(process: subprocess.Popen, log: Path, begin: int, report: Callable[[dict[str, Any]], None]) -> None:
    for line in process.stdout:
        event = json.loads(line)
        if "failed" in event:
            written = log.read_bytes()[begin:].decode(errors="replace") if log.exists() else ""
            event["failed"] = f"{explain_by_log(event['failed'], written)} (log: {log})"
        report(event)
    with contextlib.suppress(ChildProcessError):  # closed meanwhile
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # the number stays its own until `close`
        status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        report({"failed": f"{_how_it_ended(status)} (log: {log})"})


def _how_it_ended(status: int) -> str:
    if status == -signal.SIGKILL:
        return "killed by the system, most often for memory; try a smaller --max_model_len or a smaller model"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
