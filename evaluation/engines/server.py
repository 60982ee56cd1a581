"""Use a model on an OpenAI-compatible server, e.g. `vllm serve`, instead of starting an engine."""

import asyncio
import itertools
import os
import time
from typing import Any

from common.chat_template import SERVED_TEMPLATE_KWARGS
from common.errors import UserError
from evaluation.engines.base import LanguageModel, Request
from evaluation.options import without_credentials
from evaluation.run.manifest import UNKNOWN

_TIMEOUT = 600  # seconds for one answer
_TIMEOUT_OF_LIST = 10  # seconds for the list of models
_PATIENCE = 900  # seconds that a server may be unreachable, e.g. to restart


class Server(LanguageModel):
    """Sends chats to the server at `api_base`, at most `concurrency` at a time.

    `model` is the name under which the server knows the model or the adapter. The environment variable `key_variable`
    holds the key. The openai client retries failed requests, with growing pauses, for about `patience` seconds; then
    the run stops, and the same command resumes it.
    """

    def __init__(
        self,
        name: str,
        api_base: str,
        model: str,
        sampling: dict[str, Any],
        concurrency: int = 64,
        patience: float = _PATIENCE,
        key_variable: str = "OPENAI_API_KEY",
    ):
        import openai

        self._address = without_credentials(api_base)  # for messages and files
        super().__init__(name, concurrency, {"api_base": self._address, "model": model, "sampling": sampling})
        self._model, self._sampling, self._patience = model, sampling, patience
        self._extra: dict[str, Any] = {"chat_template_kwargs": SERVED_TEMPLATE_KWARGS}
        self._client = openai.AsyncOpenAI(
            base_url=api_base,
            api_key=os.environ.get(key_variable) or "EMPTY",
            timeout=_TIMEOUT,
            max_retries=_retries(patience),
            http_client=openai.DefaultAioHttpClient(),  # httpx takes twice the CPU time for a request
        )
        self._tasks: set[asyncio.Task] = set()

    def close(self) -> None:
        """Cancel the requests in flight."""
        super().close()
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        self.close()
        await self._client.close()

    def _send(self, number: int, request: Request) -> None:
        task = asyncio.create_task(self._answer(number, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, number: int, request: Request) -> None:
        try:
            self.report({"id": number, **await self._ask(request)})
        except UserError as error:
            self.report({"failed": str(error)})
        except Exception as error:  # left in the task, it would be lost, and the run would wait forever
            self.report({"failed": f"{type(error).__name__} while waiting for {self._address}"})

    async def _ask(self, request: Request) -> dict[str, Any]:
        import openai

        asked = time.monotonic()
        try:
            async with asyncio.timeout(_TIMEOUT + self._patience):
                return await self._fit(request)
        except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError, TimeoutError) as error:
            raise UserError(
                f"{self._address} has not answered for {time.monotonic() - asked:.0f} s ({type(error).__name__}); "
                "when it runs again, use the same command to resume"
            ) from None
        except openai.APIStatusError as error:
            raise UserError(f"{self._address} refuses {self._model}: {self._message(error)}") from None

    async def _fit(self, request: Request) -> dict[str, Any]:
        """Ask with max_tokens. If prompt and answer exceed the server's limit together, ask without it."""
        import openai

        sampling = {**self._sampling, **request.sampling}
        for parameters in (sampling, {key: value for key, value in sampling.items() if key != "max_tokens"}):
            try:
                return await self._post(request, parameters)
            except openai.BadRequestError as error:
                if not _too_long(error):
                    raise
        return {"text": "", "finish_reason": "prompt_too_long"}

    async def _post(self, request: Request, sampling: dict[str, Any]) -> dict[str, Any]:
        body = {"model": self._model, "messages": request.messages, **sampling, **self._extra}
        if request.schema:
            body["structured_outputs"] = {"json": request.schema}
        # `chat.completions.create` would take twice as long, to convert the request and the reply.
        reply = await self._client.post("/chat/completions", cast_to=object, body=body)
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        return {
            "text": choice["message"].get("content") or "",
            "finish_reason": choice["finish_reason"],
            "prompt_tokens": usage.get("prompt_tokens", 0),
            "output_tokens": usage.get("completion_tokens", 0),
            "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        }

    def _message(self, error: Any) -> str:
        """Return the start of the server's message, without the key. The rest may quote the prompt."""
        body = error.body if isinstance(error.body, dict) else {}
        words = str(body.get("message", "")).replace(self._client.api_key, "***")
        return f"status {error.status_code}, {words[:120] or 'no message'}"


def describe_served(api_base: str, model: str, key_variable: str = "OPENAI_API_KEY") -> dict[str, Any]:
    """Return {"served": {id, root, parent}, "max_model_len"} of what the server says it serves under the name `model`.

    For vLLM, root is the path or hub name of the weights, and parent the base model of an adapter. Both entries are
    UNKNOWN if the server does not answer GET /models as OpenAI's does, within seconds: it may start later.
    """
    import openai

    key = os.environ.get(key_variable) or "EMPTY"
    try:
        with openai.OpenAI(base_url=api_base, api_key=key, timeout=_TIMEOUT_OF_LIST, max_retries=0) as client:
            models = client.get("/models", cast_to=object)["data"]
        (found,) = (entry for entry in models if entry["id"] == model)
        return {
            "served": {name: found.get(name) for name in ("id", "root", "parent")},
            "max_model_len": found.get("max_model_len", UNKNOWN),
        }
    except (openai.OpenAIError, ValueError, TypeError, KeyError, AttributeError):
        return {"served": UNKNOWN, "max_model_len": UNKNOWN}


def key_of_judge() -> str:
    """Return the environment variable with the key for the judge's server."""
    return "JUDGE_API_KEY" if "JUDGE_API_KEY" in os.environ else "OPENAI_API_KEY"


def _retries(patience: float) -> int:
    """Return how often the openai client must retry to wait `patience` seconds in all.

    Its pauses double from 0.5 to 8 seconds and are shortened at random by up to a quarter.
    """
    pauses = (0.75 * min(0.5 * 2**k, 8) for k in itertools.count())
    waited = itertools.accumulate(pauses)
    return next(retries for retries, seconds in enumerate(waited, 1) if seconds >= patience)


def _too_long(error: Exception) -> bool:
    return "context length" in str(error) or "max_model_len" in str(error) or "longer than" in str(error)
