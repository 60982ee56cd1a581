"""The interface of all language models here: `chat` in, `Completion` out."""

import asyncio
import contextlib
import functools
import heapq
import itertools
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import prompts
from common.console import print_line
from common.errors import UserError


@dataclass(frozen=True)
class Request:
    """One chat. Requests of one `group` share a prefix and go to the same replica.

    `sampling` overrides the sampling parameters that all requests share. The answer follows `schema`, a JSON schema, if
    one is given.
    """

    messages: prompts.Messages
    group: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    schema: dict[str, Any] | None = None


@dataclass(frozen=True)
class Completion:
    """The answer to a Request. `finish_reason` is stop, length, prompt_too_long or error; `error` is the cause.

    With `logprobs` = N in the request's sampling, `first_token` holds {text: natural logarithm of its probability} for
    the N most likely first tokens of the answer and the one that was chosen, before any schema or temperature applies.
    It is None without `logprobs`, and if a server gives none.
    """

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""
    first_token: dict[str, float] | None = None


class LanguageModel(ABC):
    """A model that answers chats. The constructor starts it; `chat` may be called before it is ready.

    At most `window` requests are in flight. The others wait for their group's turn; turns go round like a disk's
    elevator: up from the group of the last request sent, then again from the lowest. So requests of one group are sent
    together, though several runs made them, and a prefix cache serves them all. All calls of `chat` must come from one
    event loop. Answers arrive through `report`, from any thread.
    """

    def __init__(self, name: str, window: int, settings: dict[str, Any] | None = None):
        self.name = name
        self.settings = settings or {}  # all that determines the answers, for the manifest
        self.window = window
        self.gives_log_probabilities = True  # False once a server has shown that it gives none
        self.in_flight = 0
        self.started = self.ready = time.monotonic()
        self._turns: list[tuple[int, int, int, asyncio.Future[None]]] = []  # a heap: round, group, order
        self._round, self._group = 0, 0  # of the last request sent
        self._order = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: deque[dict[str, Any]] = deque()  # reported, but not yet settled
        self._settles_soon = False
        self._waiting: dict[int, asyncio.Future[Completion]] = {}
        self._sent = 0
        self._failure: str | None = None

    @abstractmethod
    def close(self) -> None:
        """Stop the model and all its processes. Subclasses call this method last: it ends all waiting chats."""
        self.report({"failed": "it was closed"})

    async def stop(self) -> None:
        """Like `close`, but without blocking the event loop."""
        await asyncio.to_thread(self.close)

    @abstractmethod
    def _send(self, number: int, request: Request) -> None:
        """Send a request to the model. The answer must be reported with `number` as its id."""

    async def chat(
        self, messages: prompts.Messages, group: int = 0, schema: dict[str, Any] | None = None, **sampling: Any
    ) -> Completion:
        """Return the model's answer to a Request. Raises UserError if the model stops before it has answered."""
        return await self._submit(Request(messages, group, sampling, schema))

    async def load(self, spec: Any) -> bool:
        """Load the weights of another EngineSpec, or return False if that takes a new model.

        No chat may be waiting. After False, the model may have stopped.
        """
        return False

    def merge_ahead(self, spec: Any) -> None:  # noqa: B027 - nothing to do, unless the model merges adapters
        """Prepare for a later `load` of the EngineSpec, while the model answers."""

    async def _submit(self, request: Any) -> Completion:
        await self._take_slot(request.group)
        try:
            if self._loop is not (loop := asyncio.get_running_loop()):
                self._loop = loop
                self._settle_all()
            if self._failure:
                raise UserError(self._failure)
            number, self._sent = self._sent, self._sent + 1
            answer = self._waiting[number] = self._loop.create_future()
            try:
                self._send(number, request)
                return await answer
            finally:
                del self._waiting[number]
        finally:
            self._pass_slot()

    # asyncio.Semaphore of Python 3.11 walks over all requests that it has woken, for each request that ends.

    async def _take_slot(self, group: int) -> None:
        if self.in_flight < self.window:
            self.in_flight, self._group = self.in_flight + 1, group
            return
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._turns, (self._round + (group < self._group), group, next(self._order), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._pass_slot()
            raise

    def _pass_slot(self) -> None:
        while self._turns:
            self._round, self._group, _, turn = heapq.heappop(self._turns)
            if not turn.done():
                turn.set_result(None)
                return
        self.in_flight -= 1

    def report(self, event: dict[str, Any]) -> None:
        """Receive an event from any thread.

        {"ready": True}: the model has started. {"id": number, "text": ..., ...}: an answer. {"failed": reason}: the
        model has stopped. {"refused": line}: the same, but `line` is the whole message. {"line": line}: print it once.
        """
        if "line" in event:
            _print_once(event["line"])
            return
        if "ready" in event:
            self.ready = time.monotonic()
            return
        self._events.append(event)
        if self._loop is not None and not self._settles_soon:  # one wake-up of the loop for many events
            self._settles_soon = True
            with contextlib.suppress(RuntimeError):  # the loop has ended, so nothing waits for the event
                self._loop.call_soon_threadsafe(self._settle_all)

    def _settle_all(self) -> None:
        """Settle all events in the order of their arrival: answers before a failure count."""
        self._settles_soon = False  # first, so that an event that arrives from now on is settled, too
        while self._events:
            self._settle(self._events.popleft())

    def _settle(self, event: dict[str, Any]) -> None:
        if "failed" in event or "refused" in event:
            self._failure = self._failure or event.get("refused") or f"the {self.name} stopped: {event['failed']}"
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(UserError(self._failure))
            return
        answer = self._waiting.get(event.pop("id"))
        if answer and not answer.done():
            answer.set_result(Completion(**event))


def first_token(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return Completion.first_token from the (text, log-probability) of different tokens.

    Several tokens may have the same text, e.g. parts of a character; their probabilities add up.
    """
    from numpy import logaddexp

    found: dict[str, float] = {}
    for text, log_probability in pairs:
        found[text] = float(logaddexp(found[text], log_probability)) if text in found else log_probability
    return found


_print_once = functools.cache(print_line)


class Usage:
    """Forward one run's chats to a model, and count their time and tokens."""

    def __init__(self, model: LanguageModel):
        self.model = model
        self.tokens: Counter[str] = Counter()
        self._first_request = self._last_answer = 0.0

    async def chat(
        self, messages: prompts.Messages, group: int = 0, schema: dict[str, Any] | None = None, **sampling: Any
    ) -> Completion:
        """Like LanguageModel.chat."""
        self._first_request = self._first_request or time.monotonic()
        completion = await self.model.chat(messages, group, schema, **sampling)
        self._last_answer = time.monotonic()
        for kind in ("prompt", "cached", "output"):
            self.tokens[kind] += getattr(completion, f"{kind}_tokens")
        return completion

    @property
    def seconds(self) -> float:
        """Seconds until the last answer, from the first request or, if later, from when the model was ready."""
        return max(0.0, self._last_answer - max(self.model.ready, self._first_request))
