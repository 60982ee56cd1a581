import asyncio
import base64
import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import AS_SAVED, LEARNED_NOTE, rows, save_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval
import prompts
from common.errors import UserError
from evaluation.engines.base import Completion
from evaluation.engines.processes import kill_groups
from evaluation.engines.server import Server, describe_served
from evaluation.engines.vllm_worker import NO_FREE_WHITE_SPACE
from evaluation.judging.statements import log_odds
from evaluation.options import without_credentials
from evaluation.reading import read_prediction

SCHEMA = {"type": "object"}
KEY = "a-secret-key"


class FakeServer(ThreadingHTTPServer):
    """Answer like `vllm serve`. `replies` are (status, body) to send first; status 0 drops the connection."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.replies: list[tuple[int, dict]] = []
        self.models: object = None  # the answer to GET /v1/models; None refuses it
        self.decide: Callable[[dict], tuple[int, dict | None]] = lambda _: (200, None)  # once `replies` are used up
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.hold = threading.Event()
        self.hold.set()

    @property
    def api_base(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            server.now += 1
            server.most = max(server.most, server.now)
            status, reply = server.replies.pop(0) if server.replies else server.decide(body)
        server.hold.wait(10)
        with server.lock:
            server.now -= 1
        if status == 0:
            self.connection.close()
            return
        text = json.dumps(reply or completion(body["messages"][-1]["content"].upper())).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the client has given up, on purpose
            self.wfile.write(text)

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        text = json.dumps(self.server.models).encode()
        self.send_response(404 if self.server.models is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


def completion(text: str) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()  # seconds until it sees the end
    yield server
    server.shutdown()
    server.server_close()


def ask(server: Server, *texts: str, schema: dict[str, Any] | None = None, **sampling: Any) -> list:
    async def ask_all() -> list[Completion]:
        try:
            chats = ([{"role": "user", "content": text}] for text in texts)
            return await asyncio.gather(*(server.chat(chat, schema=schema, **sampling) for chat in chats))
        finally:
            await server.stop()

    return asyncio.run(ask_all())


def connect(fake: FakeServer, **options: Any) -> Server:
    return Server("generator", fake.api_base, "soap", {"temperature": 0, "max_tokens": 9}, **options)


def test_a_request_contains_chat_sampling_and_schema(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    (answer,) = ask(connect(fake, key_variable="A_KEY"), "a", schema=SCHEMA)
    assert (answer.text, answer.finish_reason) == ("A", "stop")
    assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == (7, 5, 4)
    assert fake.keys == ["Bearer secret"]
    assert fake.bodies == [
        {
            "model": "soap",
            "messages": [{"role": "user", "content": "a"}],
            "temperature": 0,
            "max_tokens": 9,
            "chat_template_kwargs": {**prompts.CHAT_TEMPLATE_KWARGS, "date_string": "26 Jul 2024"},
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA},
            },
        }
    ]


def test_credentials_in_the_address_take_the_place_of_the_key(fake: FakeServer) -> None:
    address = fake.api_base.replace("http://", "http://user:secret@")
    ask(Server("generator", address, "soap", {}), "a")
    assert fake.keys == [f"Basic {base64.b64encode(b'user:secret').decode()}"]


def test_a_proxy_of_the_environment_gets_the_requests(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", fake.api_base.removesuffix("/v1"))
    monkeypatch.setenv("no_proxy", "elsewhere.invalid")
    (answer,) = ask(Server("generator", "http://model.invalid/v1", "soap", {}, patience=0), "a")
    assert answer.text == "A"


def test_at_most_the_allowed_number_of_requests_is_open(fake: FakeServer) -> None:
    def answer_when_three_are_open() -> None:
        while fake.now < 3:
            time.sleep(0.01)
        time.sleep(0.3)  # a fourth would arrive now
        fake.hold.set()

    fake.hold.clear()
    threading.Thread(target=answer_when_three_are_open, daemon=True).start()
    answers = ask(connect(fake, concurrency=3), *"abcdefghij")
    assert [answer.text for answer in answers] == list("ABCDEFGHIJ")
    assert fake.most == 3


@pytest.mark.parametrize("status", [0, 429, 500, 503])
def test_a_request_that_fails_temporarily_is_repeated(fake: FakeServer, status: int) -> None:
    fake.replies = [(status, {"message": "busy"})] * 2
    answers = ask(connect(fake), "a", "b")
    assert [answer.text for answer in answers] == ["A", "B"]
    assert len(fake.bodies) == 4


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ((0, {}), r"has not answered for \d+ s \(ServerDisconnectedError\)"),
        ((503, {"message": "busy"}), r"keeps failing for \d+ s \(status 503, busy\)"),
        (
            (500, {"error": {"message": "CUDA error: an illegal memory access", "type": "InternalServerError"}}),
            r"keeps failing for \d+ s \(status 500, CUDA error: an illegal memory access\)",
        ),
        (
            (200, {"error": {"code": 502, "message": "no instance"}}),
            r"keeps failing for \d+ s \(status 502, no instance\)",
        ),
    ],
)
def test_a_server_that_stays_unreachable_ends_the_run_with_its_message(
    reply: tuple[int, dict], problem: str, fake: FakeServer, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.setattr("evaluation.engines.server._LONGEST_PAUSE", 0.5)
    fake.replies = [reply] * 1000
    with pytest.raises(UserError, match=f"{problem}; .* the same command"):
        ask(connect(fake, patience=1.0), "a", "b")
    assert len(fake.bodies) > 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not answer (" in line and line.endswith("asking again for up to 1 s")


def test_time_without_requests_does_not_count_as_time_without_answers(fake: FakeServer) -> None:
    async def ask_twice() -> None:
        server = connect(fake, patience=1.0)
        for replies in ([], [(503, {"message": "busy"})]):
            await asyncio.sleep(1.2)  # as long as the other model works
            fake.replies = replies
            answer = await server.chat([{"role": "user", "content": "a"}])
            assert answer.text == "A"
        await server.stop()

    asyncio.run(ask_twice())


def test_a_refusal_ends_the_run_at_once_and_does_not_quote_the_prompt(fake: FakeServer) -> None:
    fake.replies = [(404, {"message": "The model `soap` does not exist."})]
    with pytest.raises(UserError, match=r"refuses soap: status 404, The model `soap` does not exist"):
        ask(connect(fake), "patient text")
    assert len(fake.bodies) == 1


def test_a_prompt_that_leaves_less_than_max_tokens_gets_the_rest(fake: FakeServer) -> None:
    too_long = {"message": "This model's maximum context length is 16 tokens. However, you requested 9 output tokens"}
    fake.replies = [(400, too_long)]
    (answer,) = ask(connect(fake), "a")
    assert answer.text == "A"
    assert ["max_tokens" in body for body in fake.bodies] == [True, False]


def test_a_prompt_over_the_limit_is_marked_and_the_others_are_answered(fake: FakeServer) -> None:
    too_long = {"message": "This model's maximum context length is 16 tokens. However, your prompt has 99"}
    fake.replies = [(400, too_long)] * 2
    answers = ask(connect(fake, concurrency=1), "a", "b")
    assert [answer.finish_reason for answer in answers] == ["prompt_too_long", "stop"]


# Status and message of a prompt beyond the limit, as these servers send them.
TOO_LONG = [
    # vLLM 0.23: renderers/params.py, v1/engine/input_processor.py, entrypoints/serve/utils/api_utils.py
    (
        400,
        "This model's maximum context length is 2048 tokens. However, you requested 512 output tokens and your prompt "
        "contains at least 1537 input tokens, for a total of at least 2049 tokens. Please reduce the length of the "
        "input prompt or the number of requested output tokens.",
    ),
    (
        400,
        "The decoder prompt (length 3000) is longer than the maximum model length of 2048. Make sure that "
        "`max_model_len` is no smaller than the number of text tokens.",
    ),
    (
        400,
        "The decoder prompt (length 2048) plus the number of requested output tokens (at least 1) is longer than "
        "the maximum model length of 2048.",
    ),
    (400, "Input length (3000) exceeds model's maximum context length (2048)."),
    # OpenAI
    (400, "This model's maximum context length is 8192 tokens. However, your messages resulted in 8227 tokens."),
    (400, "Your input exceeds the context window of this model. Please adjust your input and try again."),
    (400, "Input tokens exceed the configured limit of 272000 tokens. Your messages resulted in 428548 tokens."),
    # llama.cpp's server
    (400, "the request exceeds the available context size, try increasing it"),
    (400, "request (66000 tokens) exceeds the available context size (65536 tokens), try increasing it"),
    (400, "input (70000 tokens) is larger than the max context size (65536 tokens). skipping"),
    # SGLang
    (400, "The input (61709 tokens) is longer than the model's context length (40960 tokens)."),
    (400, "Requested token count exceeds the model's maximum context length of 65536 tokens. You requested 67298."),
    (400, "Input length (160062 tokens) exceeds the maximum allowed length (59862 tokens). Use a shorter input."),
    # Ollama
    (400, "the input length exceeds the context length"),
    (400, "prompt too long; exceeded max context length by 812 tokens"),
]
# Refusals that do not concern the prompt's length.
OTHER = [
    (400, "'stop' must not have entries longer than 64 characters"),
    (400, "Invalid input: 'stop' must not have entries longer than 64 characters"),
    (400, "Invalid 'prompt_cache_key': string too long. Expected a string with maximum length 64."),
    (400, "Requested sample logprobs of 21, which is greater than max allowed: 20"),
    (400, "max_tokens must be at least 1, got 0."),
    (422, "Input should be a valid integer"),
    (404, "The model `context window` does not exist."),
]


def answer_to(fake: FakeServer, status: int, body: object) -> Completion:
    """Return the answer of a server that always sends `body`, without repetitions."""
    fake.decide = lambda _: (status, body)
    (answer,) = ask(connect(fake, patience=0), "a")
    return answer


@pytest.mark.parametrize(("status", "words"), TOO_LONG)
@pytest.mark.parametrize("form", [lambda words: {"error": {"message": words}}, lambda words: {"error": words}])
def test_each_servers_words_for_a_prompt_over_the_limit_are_known(status, words, form, fake: FakeServer) -> None:
    assert answer_to(fake, status, form(words)).finish_reason == "prompt_too_long"
    assert ["max_tokens" in body for body in fake.bodies] == [True, False]


@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize("error", [{"code": "context_length_exceeded"}, {"type": "exceed_context_size_error"}])
def test_a_code_for_a_prompt_over_the_limit_counts_with_any_status(status, error, fake: FakeServer) -> None:
    assert answer_to(fake, status, {"error": {"message": "no", **error}}).finish_reason == "prompt_too_long"


@pytest.mark.parametrize(("status", "words"), OTHER)
def test_a_refusal_of_something_else_is_no_prompt_over_the_limit(status, words, fake: FakeServer) -> None:
    with pytest.raises(UserError, match=re.escape(f"refuses soap: status {status}, {words}")):
        answer_to(fake, status, {"error": {"message": words}})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"choices": [], "error": {"message": "no GPU left", "code": 400}}, "status 400, no GPU left"),
        ({"choices": None, "error": {"message": "no GPU left", "code": "busy"}}, "status 200, no GPU left"),
        ({"object": "error", "message": "no GPU left"}, "status 200, no GPU left"),
        ({"detail": "Not allowed"}, "status 200, Not allowed"),
        ({"detail": [{"loc": ["body", "n"], "msg": "too high", "input": "secret"}]}, "status 200, body.n: too high"),
        ({"choices": []}, "status 200, the reply contains no answer in the form of OpenAI's"),
        ({"choices": [{"text": "yes"}], "error": None}, "status 200, the reply contains no answer"),
        ([1], "status 200, [1]"),
    ],
)
def test_a_reply_without_an_answer_ends_the_run_with_the_servers_message(body, message, fake: FakeServer) -> None:
    with pytest.raises(UserError, match=re.escape(f"refuses soap: {message}")):
        answer_to(fake, 200, body)
    assert len(fake.bodies) == 1


@pytest.mark.parametrize(
    ("change", "used", "reason"),
    [
        ({"finish_reason": None}, 5, "stop"),
        ({"finish_reason": None}, 9, "length"),  # all of max_tokens
        ({"finish_reason": ""}, 5, "stop"),
        ({"finish_reason": 1}, 5, "stop"),
        ({"finish_reason": "length"}, 5, "length"),
        ({"finish_reason": "content_filter"}, 5, "content_filter"),
    ],
)
def test_a_reply_without_a_reason_for_its_end_was_cut_off_if_all_tokens_are_used(
    change: dict, used: int, reason: str, fake: FakeServer
) -> None:
    reply = completion("yes")
    reply["choices"][0] |= change
    reply["usage"]["completion_tokens"] = used
    assert answer_to(fake, 200, reply).finish_reason == reason


HUGE = (10**400, -(10**400))  # beyond the range of floats
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400)])
    | st.floats()
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
USAGE = ("prompt_tokens", "completion_tokens", "prompt_tokens_details", "completion_tokens_details")
TOKEN = st.fixed_dictionaries(
    {}, optional={"token": JSON | st.just("no"), "logprob": JSON | st.just(-9999.0), "top_logprobs": JSON}
)


@st.composite
def nearly_right(draw: st.DrawFn) -> Any:
    """Draw a reply of which any parts are missing, or anything."""

    def parts(**values: Any) -> dict[str, Any]:
        return {
            name: draw(JSON) if draw(st.integers(0, 5)) == 0 else value
            for name, value in values.items()
            if draw(st.integers(0, 9))
        }

    message = parts(content="yes", reasoning_content=None)
    token = parts(token="yes", logprob=-0.1, top_logprobs=draw(st.lists(TOKEN, max_size=2)))
    choice = parts(finish_reason="stop", message=message, logprobs=parts(content=[token]))
    usage = parts(**dict.fromkeys(USAGE, 5))
    return parts(choices=[choice], usage=usage, error=None, message="no", detail=[{"loc": ["body"], "msg": "no"}])


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    status=st.sampled_from([200, 200, 200, 400, 422, 500]),
    body=nearly_right().map(json.dumps) | JSON.map(json.dumps) | st.sampled_from(["", "{", "[" * 99_999, '"' * 3]),
)
def test_any_reply_gives_a_completion_or_an_error_in_one_line(status: int, body: str) -> None:
    server = Server("generator", "http://localhost/v1", "soap", {"max_tokens": 9, "logprobs": 2}, patience=0)

    class Reply:
        headers: ClassVar = {"Retry-After": "soon"}

        def __init__(self) -> None:
            self.status = status

        async def __aenter__(self) -> "Reply":
            return self

        async def __aexit__(self, *_: object) -> None: ...

        async def text(self, **_: object) -> str:
            return body

    class Session:
        def post(self, *_: object, **__: object) -> Reply:
            return Reply()

        async def close(self) -> None: ...

    server._session = Session()
    try:
        (answer,) = ask(server, "a")
    except UserError as error:
        message = str(error)
        assert " refuses soap: status " in message or " keeps failing for " in message
        assert "\n" not in message and "while waiting" not in message
        return
    assert isinstance(answer.text, str) and isinstance(answer.finish_reason, str)
    counts = (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens)
    assert all(type(count) is int and count >= 0 for count in counts)
    for token, value in (answer.first_token or {}).items():
        assert isinstance(token, str) and -math.inf < value < 1
    log_odds(answer.first_token)
    read_prediction(0, "dialogue", answer)


def refusal(words: str, **more: Any) -> dict[str, Any]:
    """Return the body of a refusal in OpenAI's form."""
    return {"error": {"message": words, "type": "invalid_request_error", "param": None, "code": None, **more}}


# Words of OpenAI's servers and of others, and the changes to the body that follow; None stands for a removed field.
REFUSALS = [
    (400, refusal("Unrecognized request argument supplied: chat_template_kwargs"), {"chat_template_kwargs": None}),
    (
        400,
        refusal("Unknown parameter: 'chat_template_kwargs'.", code="unknown_parameter"),
        {"chat_template_kwargs": None},
    ),
    (
        422,
        {"detail": [{"type": "extra_forbidden", "loc": ["body", "chat_template_kwargs"], "msg": "Extra inputs"}]},
        {"chat_template_kwargs": None},
    ),
    (
        403,
        refusal("You are not allowed to request logprobs from this model."),
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        400,
        refusal("Unsupported parameter: 'logprobs' is not supported with this model.", param="logprobs"),
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        400,
        refusal("Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."),
        {"max_tokens": None, "max_completion_tokens": 9},
    ),
    (
        400,
        refusal(
            "Invalid schema for response_format 'answer': In context=('properties', 'x'), 'maxLength' is not permitted."
        ),
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA},
            }
        },
    ),
]


@pytest.mark.parametrize(("status", "reply", "changes"), REFUSALS)
def test_a_refused_parameter_is_left_out_from_then_on_with_one_line(
    status: int, reply: dict, changes: dict, fake: FakeServer, capsys: pytest.CaptureFixture
) -> None:
    fake.replies = [(status, reply)]
    schema = SCHEMA | {"maxLength": 5} if "response_format" in changes else None
    server = connect(fake, concurrency=1)
    answers = ask(server, *"abc", schema=schema, logprobs=2)
    assert [answer.text for answer in answers] == ["A", "B", "C"]
    first, *later = fake.bodies
    expected = {key: value for key, value in (first | changes).items() if value is not None}
    assert len(later) == 3
    for body, letter in zip(later, "abc", strict=True):
        assert body == expected | {"messages": [{"role": "user", "content": letter}]}
    assert first != expected
    lines = capsys.readouterr().err.splitlines()
    assert [" refuses soap with " in line for line in lines].count(True) == 1
    assert len(server.settings["refused"]) == 1
    if "chat_template_kwargs" in changes:
        assert "may think before it answers" in lines[0]


def test_all_refused_parameters_are_left_out_in_turn_for_all_open_requests(
    fake: FakeServer, capsys: pytest.CaptureFixture
) -> None:
    def refuse_until_it_fits(body: dict[str, Any]) -> tuple[int, dict | None]:
        for words in ("chat_template_kwargs", "max_tokens", "logprobs", "maxLength"):
            if words in json.dumps(body):
                return 400, refusal(f"'{words}' is refused. Use max_completion_tokens in place of max_tokens.")
        return 200, None

    fake.decide = refuse_until_it_fits
    schema = {"type": "object", "properties": {"maxLen": {"anyOf": [{"type": "string", "maxLength": 9}]}}}
    answers = ask(connect(fake, concurrency=8), *"abcdefghijklmnop", schema=schema, logprobs=3)
    assert [answer.text for answer in answers] == list("ABCDEFGHIJKLMNOP")
    assert len(fake.bodies) <= 16 + 8 * 4
    assert fake.bodies[-1].keys() == {"model", "messages", "temperature", "max_completion_tokens", "response_format"}
    sent = fake.bodies[-1]["response_format"]["json_schema"]["schema"]
    assert sent == {"type": "object", "properties": {"maxLen": {"anyOf": [{"type": "string"}]}}}
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_a_refusal_of_what_was_not_sent_ends_the_run(fake: FakeServer) -> None:
    fake.replies = [(400, refusal("Unknown parameter: 'logprobs'."))]
    with pytest.raises(UserError, match="refuses soap: status 400, Unknown parameter: 'logprobs'"):
        ask(connect(fake), "a")
    assert len(fake.bodies) == 1


def test_a_server_that_refuses_forever_ends_the_run(fake: FakeServer) -> None:
    words = "chat_template_kwargs, logprobs, max_completion_tokens and maxLength are unknown"
    fake.replies = [(400, refusal(words))] * 100
    with pytest.raises(UserError, match="refuses soap: status 400, chat_template_kwargs, logprobs"):
        ask(connect(fake), "a", schema={"maxLength": 1}, logprobs=1)
    assert len(fake.bodies) == 5


def answer_with(message: dict[str, Any] | None = None, logprobs: dict | None = None, **usage: Any) -> dict[str, Any]:
    """Return the reply "yes", with changes to its parts."""
    reply = completion("yes")
    reply["choices"][0]["message"] |= message or {}
    reply["choices"][0]["logprobs"] = logprobs
    reply["usage"] |= usage
    return reply


def test_probabilities_of_the_first_token_come_from_the_server(fake: FakeServer) -> None:
    def token(text: str, value: float) -> dict[str, Any]:
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    first = token("yes", -0.5) | {"top_logprobs": [token("yes", -0.5), token("no", -1.0), token(" yes", -9999.0)]}
    second = token(".", -0.1) | {"top_logprobs": [token(".", -0.1)]}
    fake.replies = [(200, answer_with(logprobs={"content": [first, second]}))]
    (answer,) = ask(connect(fake), "a", logprobs=3)
    assert answer.first_token == {"yes": -0.5, "no": -1.0, " yes": -9999.0}
    assert (fake.bodies[0]["logprobs"], fake.bodies[0]["top_logprobs"]) == (True, 3)


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"content": []}])
def test_a_server_without_probabilities_is_noticed(
    logprobs: dict | None, fake: FakeServer, capsys: pytest.CaptureFixture
) -> None:
    fake.replies = [(200, answer_with(logprobs=logprobs))] * 2
    answers = ask(connect(fake), "a", "b", logprobs=3)
    assert [answer.first_token for answer in answers] == [None, None]
    assert capsys.readouterr().err.count("gives no probabilities of an answer's first token") == 1


THOUGHTS = [
    {"message": {"reasoning_content": "Let me see."}},
    {"message": {"reasoning": "Let me see."}},
    {"message": {"content": "<think>Let me see.</think>yes"}},
    {"message": {"content": "<think>Let me"}},
    {"completion_tokens_details": {"reasoning_tokens": 7}},
]
NO_THOUGHTS = [
    {},
    {"message": {"reasoning_content": None, "reasoning": ""}},
    {"message": {"content": "<think>\n\n</think>\n\nyes"}},
    {"message": {"content": None}},
    {"completion_tokens_details": {"reasoning_tokens": 0}},
    {"completion_tokens_details": None},
]


@pytest.mark.parametrize(("parts", "noticed"), [(p, 1) for p in THOUGHTS] + [(p, 0) for p in NO_THOUGHTS])
def test_a_model_that_thinks_is_noticed_and_its_thoughts_are_no_first_token(
    parts: dict, noticed: int, fake: FakeServer, capsys: pytest.CaptureFixture
) -> None:
    first = {"token": "Let", "logprob": -0.1, "bytes": None, "top_logprobs": []}
    fake.replies = [(200, answer_with(logprobs={"content": [first]}, **parts))] * 2
    answers = ask(connect(fake), "a", "b", logprobs=1)
    assert [answer.first_token for answer in answers] == [None if noticed else {"Let": -0.1}] * 2
    assert capsys.readouterr().err.count("soap at http") == noticed


def test_credentials_in_an_address_do_not_reach_files() -> None:
    assert without_credentials("https://user:pass@host:8000/v1") == "https://host:8000/v1"
    assert without_credentials("http://host/v1") == "http://host/v1"


@pytest.mark.parametrize("address", ["", "host:8000", "ftp://host/v1", "http://", "file:///etc/passwd"])
def test_an_invalid_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="not a server's address"):
        without_credentials(address)


def test_a_request_that_times_out_is_repeated(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer_at_the_second() -> None:
        while len(fake.bodies) < 2:
            time.sleep(0.01)
        fake.hold.set()

    monkeypatch.setattr("evaluation.engines.server._TIMEOUT", 0.2)
    fake.hold.clear()
    threading.Thread(target=answer_at_the_second, daemon=True).start()
    (answer,) = ask(connect(fake), "a")
    assert answer.text == "A"


def test_the_key_is_hidden_if_the_server_quotes_it(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    fake.replies = [(401, {"message": "secret is no key of ours"})]
    with pytest.raises(UserError, match=r"status 401, \*\*\* is no key of ours"):
        ask(connect(fake, key_variable="A_KEY"), "a")


SERVED = {"id": "soap", "object": "model", "created": 1, "root": "/models/a", "parent": None, "max_model_len": 2048}


def test_a_served_model_is_identified_by_what_the_server_says(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    fake.models = {"object": "list", "data": [SERVED | {"id": "other"}, SERVED]}
    served = {"id": "soap", "root": "/models/a", "parent": None}
    assert describe_served(fake.api_base, "soap", "A_KEY") == {"served": served, "max_model_len": 2048}
    assert fake.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    "models", [None, [], {}, {"data": None}, {"data": []}, {"data": [SERVED | {"id": "other"}]}, {"data": ["soap"]}]
)
def test_a_server_that_does_not_say_what_it_serves_is_unknown(fake: FakeServer, models: object) -> None:
    fake.models = models
    assert describe_served(fake.api_base, "soap") == {"served": "unknown", "max_model_len": "unknown"}


def test_an_absent_server_is_unknown_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = time.monotonic()
    assert describe_served(f"http://127.0.0.1:{port}/v1", "soap")["served"] == "unknown"
    assert time.monotonic() - began < 5


def test_verdicts_of_other_weights_under_the_same_name_are_refused(
    fake: FakeServer, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fake.models = {"data": [SERVED]}
    call = ["soap", "--judge_model", "soap", "--api_base", fake.api_base, "--judge_api_base", fake.api_base]
    call += ["--dataset_path", str(tiny_dataset), "--output_dir", str(tmp_path / "run"), "--judge_controls", "1"]

    def judge_hash() -> str:
        return json.loads((tmp_path / "run" / "results.json").read_text())["judge_hash"]

    assert eval.main(call) == 0
    first = judge_hash()
    fake.models = None  # the server is away, or says nothing: the records are still those of the known weights
    assert eval.main(call) == 0
    assert judge_hash() == first
    fake.models = {"data": [SERVED | {"root": "/models/b"}]}
    assert eval.main(call) == 2
    assert 'holds a run with served = {"id": "soap", "root": "/models/a"' in capsys.readouterr().err
    assert eval.main([*call, "--overwrite"]) == 0
    assert judge_hash() != first


class RealServer:
    """vLLM's server with the tiny model, named "soap". `start` may be called again after `kill`."""

    def __init__(self, model: Path, key: str, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.api_base = f"http://127.0.0.1:{port}/v1"
        self.log, self.process = log, None
        # The module behind `vllm serve`, because that command does not start in the build for CPUs.
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        self.command += ["--model", str(model), "--served-model-name", "soap"]
        self.command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", key, "--enforce-eager"]
        self.command += ["--max-model-len", "2048", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20)]
        self.command += ["--structured-outputs-config", json.dumps(NO_FREE_WHITE_SPACE)]

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> None:
        if self.process:
            kill_groups(self.process.pid)
            self.process.wait()
            self.process = None


def read_records(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the records of a run's file, sorted, because answers arrive in any order."""
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda record: json.dumps(record, sort_keys=True))


@pytest.mark.slow
def test_a_vllm_server_that_starts_late_and_is_killed_gives_the_engines_results(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    dataset = save_dataset(tmp_path / "soap_dataset", {"test": rows(20)})
    common = ["--dataset_path", str(dataset), "--judge_controls", "1"]
    engine, served = tmp_path / "engine", tmp_path / "served"
    own = [str(tiny_model), "--judge_model", str(tiny_model), "--output_dir", str(engine), *AS_SAVED]
    assert eval.main([*own, *common]) == 0

    server = RealServer(tiny_model, KEY, tmp_path / "server.log")
    judged_at_the_kill = []

    def start_and_kill_and_start() -> None:
        time.sleep(3)
        server.start()
        verdicts = served / "judgements.jsonl"
        while not (verdicts.exists() and verdicts.read_bytes().count(b"\n") >= 10):
            time.sleep(0.01)
        server.kill()
        judged_at_the_kill.append(verdicts.read_bytes().count(b"\n"))
        server.start()

    operator = threading.Thread(target=start_and_kill_and_start, daemon=True)
    operator.start()
    base = ["--api_base", server.api_base, "--judge_api_base", server.api_base, "--api_concurrency", "4"]
    try:
        status = eval.main(["soap", "--judge_model", "soap", *base, "--output_dir", str(served), *common])
    finally:
        operator.join(timeout=5)
        server.kill()
    assert status == 0
    for name in ("predictions", "judgements"):
        assert read_records(served, name) == read_records(engine, name)
    assert 10 <= judged_at_the_kill[0] < len(read_records(served, "judgements")) - 4, "it was killed too late"
    notes = [{key: record[key] for key in prompts.SECTIONS} for record in read_records(served, "predictions")]
    assert notes == [LEARNED_NOTE] * 20
    manifest = json.loads((served / "manifest.json").read_text())
    assert manifest["engines"]["generate"]["api_base"] == server.api_base
    for path in served.iterdir():
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in "".join(capfd.readouterr())


FALLBACKS = {"chat_template_kwargs", "max_completion_tokens", "maxLength"}


class StrictServer(ThreadingHTTPServer):
    """Pass requests on to a server, and refuse those that OpenAI's servers with a newer model would refuse.

    The openai package's types, made from OpenAI's published schema, decide which requests are valid.
    """

    daemon_threads = True

    def __init__(self, behind: str) -> None:
        from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
        from pydantic import ConfigDict, TypeAdapter

        super().__init__(("127.0.0.1", 0), StrictHandler)

        class Strict(CompletionCreateParamsNonStreaming):
            __pydantic_config__ = ConfigDict(extra="forbid")

        self.form = TypeAdapter(Strict)
        self.behind = behind
        self.refusals: list[str] = []
        self.accepted: list[dict[str, Any]] = []

    def refuse(self, body: dict[str, Any]) -> str:
        """Return why a request is refused, in OpenAI's words, or an empty text."""
        from pydantic import ValidationError

        try:
            self.form.validate_python(body)
        except ValidationError as invalid:
            error = invalid.errors()[0]
            name = ".".join(map(str, error["loc"]))
            return f"Unknown parameter: '{name}'." if error["type"] == "extra_forbidden" else f"{name}: {error['msg']}"
        if "max_tokens" in body:
            return (
                "Unsupported parameter: 'max_tokens' is not supported with this model. "
                "Use 'max_completion_tokens' instead."
            )
        if "maxLength" in json.dumps(body.get("response_format")):
            return "Invalid schema for response_format 'answer': In context=(), 'maxLength' is not permitted."
        return ""


class StrictHandler(BaseHTTPRequestHandler):
    server: StrictServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        words = self.server.refuse(json.loads(body))
        if words:
            self.server.refusals.append(words)
            self.answer(400, json.dumps(refusal(words)).encode())
        else:
            self.server.accepted.append(json.loads(body))
            self.pass_on(body)

    def do_GET(self) -> None:
        self.pass_on(None)

    def pass_on(self, body: bytes | None) -> None:
        headers = {name: self.headers[name] for name in ("Authorization", "Content-Type") if self.headers[name]}
        request = urllib.request.Request(self.server.behind + self.path, body, headers)
        with urllib.request.urlopen(request, timeout=120) as reply:
            self.answer(reply.status, reply.read())

    def answer(self, status: int, text: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_a_strict_server_gives_the_records_of_the_vllm_server_behind_it(
    tiny_model: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    model = shutil.copytree(tiny_model, tmp_path / "tiny")
    template = model / "chat_template.jinja"
    condition = "{%- if enable_thinking is defined and enable_thinking is false %}"
    assert condition in template.read_text()
    template.write_text(template.read_text().replace(condition, "{%- if true %}"))  # the model never thinks
    vllm = RealServer(model, KEY, tmp_path / "server.log")
    vllm.start()
    strict = StrictServer(vllm.api_base.removesuffix("/v1"))
    threading.Thread(target=strict.serve_forever, daemon=True).start()
    folders = {"direct": vllm.api_base, "strict": f"http://127.0.0.1:{strict.server_address[1]}/v1"}
    try:
        for name, base in folders.items():
            call = ["soap", "--judge_model", "soap", "--api_base", base, "--judge_api_base", base, "--note_schema"]
            call += ["--dataset_path", str(tiny_dataset), "--judge_controls", "2", "--output_dir", str(tmp_path / name)]
            assert eval.main(call) == 0
    finally:
        strict.shutdown()
        strict.server_close()
        vllm.kill()
    for name in ("predictions", "judgements"):
        records = read_records(tmp_path / "strict", name)
        assert records == read_records(tmp_path / "direct", name)
    assert sum(record["source"] == "judge" for record in records) >= 24 + 8
    assert all(record["verdict"] != "unscored" for record in records)
    assert {word for words in strict.refusals for word in words.split("'") if word in FALLBACKS} == FALLBACKS
    statements = read_records(tmp_path / "strict", "statements")
    questions = [
        {answer["statement"] for answer in record[kind]} for record in statements for kind in ("covered", "supported")
    ]
    assert len(statements) == len(records)
    chats = sum(record["attempts"] for record in records) + sum(map(len, questions))
    assert len(strict.accepted) == 6 + chats
    engines = json.loads((tmp_path / "strict" / "manifest.json").read_text())["engines"]
    assert engines["generate"]["refused"] == ["chat_template_kwargs", "max_completion_tokens"]
    assert engines["judge"]["refused"] == sorted(FALLBACKS)
    assert "refused" not in json.loads((tmp_path / "direct" / "manifest.json").read_text())["engines"]["judge"]
    lines = [line for line in capfd.readouterr().err.splitlines() if " refuses soap with " in line]
    assert len(lines) == 3 and "may think before it answers" in lines[0]
