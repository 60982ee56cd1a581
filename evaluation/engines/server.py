"""Use a model on an OpenAI-compatible server, e.g. `vllm serve`, instead of starting an engine."""

import asyncio
import json
import os
import random
import re
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from common.chat_template import SERVED_TEMPLATE_KWARGS
from common.errors import UserError
from evaluation.engines.base import LanguageModel, Request, first_token
from evaluation.options import without_credentials
from evaluation.run.manifest import UNKNOWN

if TYPE_CHECKING:
    import aiohttp

_TIMEOUT = 600  # seconds for one answer
_TIMEOUT_OF_LIST = 10  # seconds for the list of models
_PATIENCE = 900  # seconds that a server may be unreachable, e.g. to restart

# Words of a refusal, and the consequence of asking again without the parameter that the server refuses.
_FALLBACKS = {
    "chat_template_kwargs": "the model may think before it answers, and its template may insert today's date",
    "logprobs": "answers come without probabilities of tokens",
    "max_completion_tokens": "it gets max_completion_tokens in place of max_tokens",
    "maxLength": "schemas are sent without the maximum length of texts",
}
_TEMPORARY = (408, 409, 425, 429)  # status codes after which a request is repeated, like all from 500
_LONGEST_PAUSE = 8  # seconds before a repetition, unless the server asks for more
_REFUSALS = (400, 403, 422)  # status codes; OpenAI refuses logprobs of some models with 403, pydantic answers with 422

# A prompt beyond the model's limit: the codes of OpenAI and llama.cpp, and the words of these, vLLM, SGLang and Ollama.
_TOO_LONG_STATUS = (400, 413, 422)
_TOO_LONG_CODES = ("context_length_exceeded", "exceed_context_size_error")
_TOO_LONG_WORDS = re.compile(
    r"context (length|window|size)|max_model_len|maximum (model|prompt) length"
    r"|\b(prompt|input)\b[^.;:'\"]{0,60}\b(too (long|large)|(longer|larger) than|exceeds?)\b",
    re.IGNORECASE,
)
_NO_ANSWER = "the reply contains no answer in the form of OpenAI's chat completions"


class Refusal(Exception):
    """An answer with an error, or without an answer.

    `status` is the HTTP status or, if that is 200, the status in the body. `message` is the server's. `codes` are the
    error's code and type. `pause` is in seconds, if the server asks for one.
    """

    def __init__(self, status: int, text: str, pause: str | None = None):
        super().__init__(text)
        self.pause = min(float(pause), 60) if pause and pause.isdecimal() else None
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            body = text
        if isinstance(body, dict):
            body = body.get("error") or body
        body = body if isinstance(body, dict) else {"message": body}
        self.codes = [body.get("code"), body.get("type")]
        code = self.codes[0]
        self.status = code if status == 200 and isinstance(code, int) and 400 <= code < 600 else status
        self.message = " ".join(str(body.get("message") or _detail(body.get("detail")) or "").split())


class Server(LanguageModel):
    """Sends chats to the server at `api_base`, at most `concurrency` at a time.

    `model` is the name under which the server knows the model or the adapter. The environment variable `key_variable`
    holds the key. Failed requests are repeated, with growing pauses, for `patience` seconds; then the run stops, and
    the same command resumes it. A parameter of _FALLBACKS that the server refuses is left out from
    then on, and a line says so.
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
        self._address = without_credentials(api_base)  # for messages and files
        super().__init__(name, concurrency, {"api_base": self._address, "model": model, "sampling": sampling})
        self._model, self._sampling, self._patience = model, sampling, patience
        self._refused: frozenset[str] = frozenset()  # keys of _FALLBACKS
        self._warned = False  # whether a line has said that requests are repeated
        self._url = api_base.rstrip("/") + "/chat/completions"
        self._key = os.environ.get(key_variable) or "EMPTY"
        self._session: aiohttp.ClientSession | None = None
        self._tasks: set[asyncio.Task] = set()

    def close(self) -> None:
        """Cancel the requests in flight."""
        super().close()
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        self.close()
        if self._session:
            await self._session.close()

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
        import aiohttp

        asked = time.monotonic()
        try:
            async with asyncio.timeout(_TIMEOUT + self._patience):
                return await self._fit(request)
        except Refusal as error:
            if not _is_temporary(error):
                raise UserError(f"{self._address} refuses {self._model}: {self._message(error)}") from None
            problem, cause = "keeps failing", self._message(error)
        except (aiohttp.ClientError, TimeoutError) as error:
            problem, cause = "has not answered", type(error).__name__
        raise UserError(
            f"{self._address} {problem} for {time.monotonic() - asked:.0f} s ({cause}); "
            "when it runs again, use the same command to resume"
        )

    async def _fit(self, request: Request) -> dict[str, Any]:
        """Ask until the server accepts the parameters.

        If prompt and answer exceed the server's limit together, leave out max_tokens. Each repetition leaves out
        something, so their number is bounded.
        """
        sampling = {**self._sampling, **request.sampling}
        while True:
            body = self._body(request, sampling, self._refused)
            try:
                return self._read(await self._post(body), body)
            except Refusal as error:
                if _too_long(error):
                    if sampling.pop("max_tokens", None) is None:
                        return {"text": "", "finish_reason": "prompt_too_long"}
                elif not self._leave_out(error, request, sampling, body):
                    raise

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the server's reply, after repetitions for up to `patience` seconds if there is none."""
        import aiohttp

        pause, first_failure = 0.5, None
        while True:
            try:
                return await self._post_once(body)
            except (Refusal, aiohttp.ClientError, TimeoutError) as error:
                if isinstance(error, Refusal) and not _is_temporary(error):
                    raise
                now = time.monotonic()
                first_failure = first_failure or now
                if now - first_failure >= self._patience:
                    raise
                wait = getattr(error, "pause", None)
                if pause == _LONGEST_PAUSE and not self._warned:
                    self._warned = True
                    cause = self._message(error) if isinstance(error, Refusal) else type(error).__name__
                    line = f"{self._address} does not answer ({cause}); asking again for up to {self._patience:.0f} s"
                    self.report({"line": line})
            await asyncio.sleep(random.uniform(0.75, 1) * pause if wait is None else wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _post_once(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request. The openai client takes three times as much CPU time for it (benchmarks/LOG.md)."""
        import aiohttp

        if self._session is None:
            # A user name and password in the address take the place of the key.
            headers = {"Authorization": f"Bearer {self._key}"} if self._url.startswith(self._address) else {}
            # aiohttp's trust_env would start a thread for each request, to read ~/.netrc.
            address = urlsplit(self._address)
            proxy = None if proxy_bypass(address.netloc) else getproxies().get(address.scheme)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # LanguageModel limits the requests
                timeout=aiohttp.ClientTimeout(total=_TIMEOUT),
                headers=headers,
                proxy=proxy,
            )
        async with self._session.post(self._url, json=body) as reply:
            text, pause = await reply.text(errors="replace"), reply.headers.get("Retry-After")
        if reply.status >= 400:
            raise Refusal(reply.status, text, pause)
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            raise Refusal(reply.status, "the reply is not JSON") from None
        if not _has_answer(answer):
            raise Refusal(reply.status, text, pause)
        return answer

    def _body(self, request: Request, sampling: dict[str, Any], refused: frozenset[str]) -> dict[str, Any]:
        """Return the JSON of a request in OpenAI's form, without what the server has `refused`."""
        body = {"model": self._model, "messages": request.messages, **sampling}
        if (most_likely := body.pop("logprobs", None)) is not None and "logprobs" not in refused:
            body |= {"logprobs": True, "top_logprobs": most_likely}
        if "max_completion_tokens" in refused and "max_tokens" in body:
            body["max_completion_tokens"] = body.pop("max_tokens")
        if "chat_template_kwargs" not in refused:
            body["chat_template_kwargs"] = SERVED_TEMPLATE_KWARGS
        if request.schema:
            schema = _without_lengths(request.schema) if "maxLength" in refused else request.schema
            json_schema = {"name": "answer", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        return body

    def _leave_out(self, error: Refusal, request: Request, sampling: dict[str, Any], body: dict[str, Any]) -> bool:
        """Remember the parameter of `body` that the server refuses. Return whether the next body is another one."""
        for parameter, consequence in _FALLBACKS.items():
            refused = self._refused | {parameter}
            named = error.status in _REFUSALS and parameter in str(error)
            if named and self._body(request, sampling, refused) != body:
                self._refused = refused
                self.gives_log_probabilities &= parameter != "logprobs"
                self.settings["refused"] = sorted(refused)
                self.report({"line": f"{self._address} refuses {self._model} with {parameter}, so {consequence}"})
                return True
        return False

    def _read(self, reply: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        """Return the Completion's fields from the reply to `body`."""
        choice, usage = reply["choices"][0], _object(reply.get("usage"))
        message = choice["message"]
        text = message.get("content") or ""
        thinks = _thinks(message, usage)
        if thinks:
            self.report(
                {"line": f"{self._model} at {self._address} thinks before it answers; turn it off on the server"}
            )
        tokens = None if thinks else _first_token(choice)  # of the answer, not of the thoughts
        if body.get("logprobs") and text and not tokens and not thinks:
            self.gives_log_probabilities = False
            self.report({"line": f"{self._model} at {self._address} gives no probabilities of an answer's first token"})
        output_tokens = _count(usage.get("completion_tokens"))
        reason = choice.get("finish_reason")
        if not reason or not isinstance(reason, str):  # not as in OpenAI's interface
            limit = body.get("max_tokens", body.get("max_completion_tokens"))
            reason = "length" if limit and output_tokens >= limit else "stop"
        return {
            "text": text,
            "finish_reason": reason,
            "prompt_tokens": _count(usage.get("prompt_tokens")),
            "output_tokens": output_tokens,
            "cached_tokens": _count(_object(usage.get("prompt_tokens_details")).get("cached_tokens")),
            "first_token": tokens,
        }

    def _message(self, error: Refusal) -> str:
        """Return the start of the server's message, without the key. The rest may quote the prompt."""
        words = error.message.replace(self._key, "***")[:120]
        return f"status {error.status}, {words or (_NO_ANSWER if error.status == 200 else 'no message')}"


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


def _is_temporary(error: Refusal) -> bool:
    return (error.status in _TEMPORARY or error.status >= 500) and not _too_long(error)


def _too_long(error: Refusal) -> bool:
    """Return whether the server refuses a prompt, or prompt and answer together, for their length."""
    if any(code in _TOO_LONG_CODES for code in error.codes):
        return True
    # The end of a message may quote the prompt.
    return error.status in _TOO_LONG_STATUS and bool(_TOO_LONG_WORDS.search(error.message[:300]))


def _detail(detail: Any) -> str:
    """Return the message in FastAPI's "detail": a text, or a list of objects with `msg` and the place `loc`."""
    first = detail[0] if isinstance(detail, list) and detail else detail
    if not isinstance(first, dict):
        return str(first or "")
    places = first.get("loc")
    place = ".".join(map(str, places)) + ": " if isinstance(places, list) else ""
    return f"{place}{first.get('msg') or ''}"


def _has_answer(reply: Any) -> bool:
    """Return whether a reply has a choice whose message is a text, or null as in some refusals to answer."""
    choices = _object(reply).get("choices")
    choice = _object(choices[0] if isinstance(choices, list) and choices else None)
    message = choice.get("message")
    return isinstance(message, dict) and isinstance(message.get("content"), str | None)


def _object(value: Any) -> dict[str, Any]:
    """Return `value` if it is a JSON object, otherwise an empty one."""
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    """Return a number of tokens; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _without_lengths(schema: Any) -> Any:
    """Return the JSON schema without maxLength."""
    if isinstance(schema, list):
        return [_without_lengths(item) for item in schema]
    if isinstance(schema, dict):
        return {key: _without_lengths(value) for key, value in schema.items() if key != "maxLength"}
    return schema


def _thinks(message: dict[str, Any], usage: dict[str, Any]) -> bool:
    """Return whether the model wrote thoughts before its answer, in any of the forms that servers use."""
    details = _object(usage.get("completion_tokens_details"))
    _, opened, thoughts = (message.get("content") or "").partition("<think>")
    return bool(
        message.get("reasoning_content")
        or message.get("reasoning")
        or details.get("reasoning_tokens")
        or (opened and thoughts.partition("</think>")[0].strip())
    )


def _first_token(choice: dict[str, Any]) -> dict[str, float] | None:
    """Return Completion.first_token from a choice of a reply. The chosen token may be among the most likely ones."""
    tokens = _object(choice.get("logprobs")).get("content")
    chosen = _object(tokens[0] if isinstance(tokens, list) and tokens else None)
    others = chosen.get("top_logprobs")
    candidates = [chosen, *(others if isinstance(others, list) else [])]
    pairs = [(token.get("token"), token.get("logprob")) for token in map(_object, candidates)]
    return first_token(dict.fromkeys(pair for pair in pairs if _is_log_probability(*pair))) or None


def _is_log_probability(token: Any, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(token, str) and number and -1e6 < value <= 0.01  # 0 and rounding
