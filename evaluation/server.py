"""A model behind an OpenAI-compatible server, such as `vllm serve`, in place of an engine of our own."""

import os
import queue
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import prompts
from evaluation.engine import LanguageModel, Request
from evaluation.errors import UserError

_TIMEOUT = 600  # seconds for one answer
_PATIENCE = 900  # seconds that a server may be away, e.g. to start again
_LONGEST_PAUSE = 15  # seconds between two tries


class Server(LanguageModel):
    """Sends chats to the server at `api_base`, at most `concurrency` at a time.

    `model` is the name under which the server knows the model or the adapter. The key is read from the environment
    variable `key_variable`. Failed requests are tried again, with growing pauses, while the server is away for less
    than `patience` seconds; then the run stops, and the same command goes on from there.
    """

    def __init__(
        self,
        name: str,
        api_base: str,
        model: str,
        sampling: dict[str, Any],
        schema: dict[str, Any] | None = None,
        concurrency: int = 64,
        patience: float = _PATIENCE,
        key_variable: str = "OPENAI_API_KEY",
    ):
        import openai

        self._address = without_credentials(api_base)  # for messages and files
        settings = {"api_base": self._address, "model": model, "sampling": sampling}
        super().__init__(name, window=4 * concurrency, settings=settings)
        self._model, self._sampling, self._patience = model, sampling, patience
        self._extra: dict[str, Any] = {"chat_template_kwargs": prompts.CHAT_TEMPLATE_KWARGS}
        if schema:
            self._extra["structured_outputs"] = {"json": schema}
        self._client = openai.OpenAI(
            base_url=api_base, api_key=os.environ.get(key_variable) or "EMPTY", timeout=_TIMEOUT, max_retries=0
        )
        self._closed = threading.Event()
        self._away_since: float | None = None  # the first failure after the last answer
        self._requests: queue.SimpleQueue[tuple[int, Request]] = queue.SimpleQueue()
        for _ in range(concurrency):  # daemons: the end of a run does not wait for answers that nobody reads
            threading.Thread(target=self._work, daemon=True).start()

    def close(self) -> None:
        """Give up what is in flight."""
        self._closed.set()
        super().close()

    def _send(self, number: int, request: Request) -> None:
        self._requests.put((number, request))

    def _work(self) -> None:
        while not self._closed.is_set():
            number, request = self._requests.get()
            try:
                self.report({"id": number, **self._ask_patiently(request)})
            except UserError as error:
                self.report({"failed": str(error)})
            except Exception as error:  # in a thread it would vanish, and the run would wait for ever
                self.report({"failed": f"{type(error).__name__} while waiting for {self._address}"})

    def _ask_patiently(self, request: Request) -> dict[str, Any]:
        import openai

        pause = 0.5
        while True:
            try:
                answer = self._ask(request)
                self._away_since = None
                return answer
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
                now = time.monotonic()
                self._away_since = since = self._away_since or now
                away = now - since
                if away > self._patience or self._closed.is_set():
                    raise UserError(
                        f"{self._address} has not answered for {away:.0f} s ({type(error).__name__}); "
                        "when it runs again, the same command goes on from here"
                    ) from None
                self._closed.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            except openai.APIStatusError as error:
                raise UserError(f"{self._address} refuses {self._model}: {self._message(error)}") from None

    def _ask(self, request: Request) -> dict[str, Any]:
        import openai

        sampling = {**self._sampling, **request.sampling}
        try:
            return self._post(request.messages, sampling)
        except openai.BadRequestError as error:
            if not _too_long(error):
                raise
        try:  # the prompt and max_tokens together are over the server's limit: take what the prompt leaves
            return self._post(request.messages, {key: value for key, value in sampling.items() if key != "max_tokens"})
        except openai.BadRequestError as error:
            if not _too_long(error):
                raise
        return {"text": "", "finish_reason": "prompt_too_long"}

    def _post(self, messages: prompts.Messages, sampling: dict[str, Any]) -> dict[str, Any]:
        reply = self._client.chat.completions.create(
            model=self._model, messages=messages, extra_body={**sampling, **self._extra}
        )
        choice, usage = reply.choices[0], reply.usage
        details = usage and usage.prompt_tokens_details
        return {
            "text": choice.message.content or "",
            "finish_reason": choice.finish_reason,
            "prompt_tokens": usage.prompt_tokens if usage else 0,
            "output_tokens": usage.completion_tokens if usage else 0,
            "cached_tokens": (details and details.cached_tokens) or 0,
        }

    def _message(self, error: Any) -> str:
        """The server's own words, in short: it may quote the prompt, which must not reach a log, or the key."""
        body = error.body if isinstance(error.body, dict) else {}
        words = str(body.get("message", "")).replace(self._client.api_key, "***")
        return f"status {error.status_code}, {words[:120] or 'no message'}"


def without_credentials(api_base: str) -> str:
    """The address without a user name and password, for files and messages. Raises UserError if it is no address."""
    parts = urlsplit(api_base)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{api_base} is no address of a server; give e.g. http://localhost:8000/v1")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _too_long(error: Exception) -> bool:
    return "context length" in str(error) or "max_model_len" in str(error) or "longer than" in str(error)
