"""Test that write_note.py shows the notes that evaluation would record, while they are written, or says why not."""

import contextlib
import io
import json
import math
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import LEARNED_NOTE, rows
from hypothesis import given
from hypothesis import strategies as st

import prompts
import write_note
from common.chat_template import encode_prompt
from evaluation.engines.base import Completion
from evaluation.reading import read_leniently
from sharing.checking import check_note
from sharing.partial_note import NoteStream, sections_so_far
from sharing.writers import LocalModel, ServedModel


def as_text(note: prompts.Note) -> str:
    return "\n\n".join(f"{prompts.SECTION_NAMES[section]}\n{text}" for section, text in note.items()) + "\n"


AS_TEXT = as_text(LEARNED_NOTE)
DIALOGUE = rows(1)[0]["dialogue"]
CHECK_CHAT = prompts.supported_messages(DIALOGUE, LEARNED_NOTE, LEARNED_NOTE["A"])


@pytest.fixture
def visit(tmp_path: Path) -> Path:
    path = tmp_path / "visit.txt"
    path.write_text(DIALOGUE)
    return path


# --- reading a note while it is written ------------------------------------------------------------------------------

texts = st.text(st.sampled_from('ab .,"\\/\n\té\U0001f642{}[]u1'), min_size=1, max_size=12)
sections = st.one_of(texts, st.lists(texts, min_size=1, max_size=3))


@given(
    note=st.fixed_dictionaries(dict.fromkeys(prompts.SECTIONS, sections)),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    around=st.sampled_from([("", ""), ("```json\n", "\n```"), ("<think>\n{hm}</think>\n", ""), ("Here:\n", "\nDone.")]),
    size=st.integers(1, 7),
)
def test_the_pieces_of_any_note_add_up_to_what_read_note_returns(note, ascii_only, indent, around, size):
    reply = around[0] + json.dumps(note, ensure_ascii=ascii_only, indent=indent) + around[1]
    try:
        whole = prompts.read_note(reply)
    except prompts.NoteError as error:
        assert str(error) == "all sections are empty"
        return
    stream, shown = NoteStream(), dict.fromkeys(prompts.SECTIONS, "")
    for start in range(0, len(reply), size):
        for section, text in stream.feed(reply[start : start + size]):
            shown[section] += text
            assert whole[section].startswith(shown[section])
    assert shown == whole


def test_each_new_word_of_a_section_is_shown_at_once():
    stream = NoteStream()
    pieces = ['{"S": "A dry', " cough", '. Denies fever.", "O": "', "Lungs clear"]
    events = [list(stream.feed(piece)) for piece in pieces]
    assert events == [[("S", "A dry")], [("S", " cough")], [("S", ". Denies fever.")], [("O", "Lungs clear")]]


@pytest.mark.parametrize(
    "reply", ["", "Sure", '{"S', '{"S": "a", "S": "b', "<think> {", '{"S": 1', "{}", '{"S": {"a": "b']
)
def test_text_that_is_no_section_is_not_shown(reply):
    assert not any((sections_so_far(reply) or {}).values())


# --- a model on this machine -----------------------------------------------------------------------------------------


def test_a_note_is_printed_under_four_headings(tiny_model, visit, capsys):
    assert write_note.main([str(tiny_model), str(visit)]) == 0
    output = capsys.readouterr()
    assert output.out == AS_TEXT
    assert "not for clinical use" in output.err


def test_a_dialogue_on_stdin_gives_one_line_of_json(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(DIALOGUE.encode())))
    assert write_note.main([str(tiny_model), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"file": "-", **LEARNED_NOTE}


def test_a_local_reply_arrives_in_pieces(tiny_model):
    pieces = []
    reply = LocalModel(str(tiny_model), None, 200).write(prompts.note_messages(DIALOGUE), pieces.append)
    assert prompts.read_note(reply.text) == LEARNED_NOTE
    assert "".join(pieces) == reply.text
    assert len(pieces) > 10


def test_a_file_without_a_note_does_not_stop_the_others(tiny_model, visit, tmp_path, capsys):
    long = tmp_path / "long.txt"
    long.write_text(DIALOGUE * 100)
    assert write_note.main([str(tiny_model), str(long), "--json", str(visit)]) == 2
    output = capsys.readouterr()
    assert [json.loads(line) for line in output.out.splitlines()] == [{"file": str(visit), **LEARNED_NOTE}]
    (error,) = (line for line in output.err.splitlines() if line.startswith("error:"))
    assert error.startswith(f"error: {long}: the dialogue is too long: the prompt takes ")
    assert error.endswith("may take 4,096; shorten it, or raise --max_model_len")


def test_a_file_that_cannot_be_read_does_not_stop_the_others(tiny_model, visit, tmp_path, capsys):
    assert write_note.main([str(tiny_model), str(tmp_path / "missing.txt"), str(visit), str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert output.out == f"==> {visit} <==\n{AS_TEXT}"
    errors = [line for line in output.err.splitlines() if line.startswith("error:")]
    assert [error.split(": ")[1:3] for error in errors] == [
        [str(tmp_path / "missing.txt"), "No such file or directory; give a text file with one dialogue"],
        [str(tmp_path), "Is a directory; give a text file with one dialogue"],
    ]


def test_several_notes_are_separated_by_the_names_of_their_files(tiny_model, visit, tmp_path, capsys):
    second = tmp_path / "second.txt"
    second.write_text(rows(2)[1]["dialogue"])
    assert write_note.main([str(tiny_model), str(visit), str(second)]) == 0
    assert capsys.readouterr().out == f"==> {visit} <==\n{AS_TEXT}\n==> {second} <==\n{AS_TEXT}"


def test_an_adapter_changes_the_reply(tiny_model, tiny_adapter):
    messages = prompts.note_messages(DIALOGUE)
    plain, adapted = (
        LocalModel(str(tiny_model), path, 40).write(messages, lambda _: None) for path in (None, str(tiny_adapter))
    )
    assert plain != adapted


def test_penalties_in_the_checkpoint_do_not_change_a_note(tiny_model, visit, tmp_path, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 9.0, "no_repeat_ngram_size": 2, "do_sample": True, "temperature": 5.0}
    (model / "generation_config.json").write_text(json.dumps(settings))
    assert write_note.main([str(model), str(visit)]) == 0
    assert capsys.readouterr().out == AS_TEXT


def test_a_note_that_the_limit_cuts_off_is_an_error_with_a_remedy(tiny_model, visit, capsys):
    assert write_note.main([str(tiny_model), str(visit), "--max_new_tokens", "12"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {visit}: no note in the reply (JSON is cut off); raise --max_new_tokens"


def test_a_reply_without_a_note_is_an_error_with_its_beginning(visit, capsys):
    class Chatty:
        def write(self, messages, show):
            show("I am\x1b[2J sorry.\n")
            return Completion("I am\x1b[2J sorry.\n", "stop")

    with pytest.raises(write_note.UserError) as error:
        write_note.write_one(Chatty(), "visit.txt", DIALOGUE, False)
    assert str(error.value) == (
        'visit.txt: no note in the reply (no JSON object in the reply); the reply begins "I am[2J sorry."'
    )
    assert capsys.readouterr().out == ""


def test_a_note_that_the_whole_reply_contradicts_is_printed_again(capsys):
    printer = write_note.Printer()
    printer.show('{"S": "From a thought')
    printer.show('"} </think>')
    printer.finish(LEARNED_NOTE)
    assert capsys.readouterr().out == f"Subjective\nFrom a thought\n\n(The whole reply reads:)\n\n{AS_TEXT}"


def test_an_empty_section_is_shown_as_empty(capsys):
    printer = write_note.Printer()
    printer.show('{"S": "Cough", "O": "", "A": "", "P": "Rest"}')
    printer.finish({"S": "Cough", "O": "", "A": "", "P": "Rest"})
    out = capsys.readouterr().out
    assert "Objective\n(empty)" in out and "Plan\nRest" in out


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (DIALOGUE.encode(), ["./no-model"], "./no-model: no such folder"),
        (None, ["model"], "visit.txt: No such file or directory"),
        (b" \n", ["model"], "visit.txt has no text"),
        (b"\xff\xfeD", ["model"], "visit.txt is not UTF-8"),
        (DIALOGUE.encode(), ["model", "--lora_path", "x", "--api_base", "http://h/v1"], "cannot be combined"),
        (DIALOGUE.encode(), ["model", "--max_model_len", "99", "--api_base", "http://h/v1"], "set it on the server"),
        (DIALOGUE.encode(), ["model", "--api_base", "h:1"], "h:1 is not a server's address"),
    ],
)
def test_a_mistake_gives_one_line_and_status_2(content, arguments, words, tmp_path, capsys):
    visit = tmp_path / "visit.txt"
    if content is not None:
        visit.write_bytes(content)
    assert write_note.main([*arguments, str(visit)]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert words in line and not output.out


# --- a server --------------------------------------------------------------------------------------------------------


class StreamingServer(ThreadingHTTPServer):
    """Answer each chat with `text` in pieces. `refusals` are the (status, message) to send first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.refusals: list[tuple[int, str]] = []
        self.stream: str | None = None  # to send in place of the pieces
        self.text, self.finish_reason = prompts.write_note(LEARNED_NOTE), "stop"

    @property
    def api_base(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: StreamingServer

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.server.refusals:
            status, message = self.server.refusals.pop(0)
            self.reply(status, "application/json", json.dumps({"error": {"message": message}}))
            return
        text = self.server.text
        if self.server.stream is not None and self.server.bodies[-1].get("stream"):
            self.reply(200, "text/event-stream", self.server.stream)
            return
        if not self.server.bodies[-1].get("stream"):
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": self.server.finish_reason,
            }
            self.reply(200, "application/json", json.dumps({"choices": [choice]}))
            return
        chunks = [
            {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m",
             "choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": reason}]}
            for piece, reason in [*((text[k : k + 9], None) for k in range(0, len(text), 9)),
                                  ("", self.server.finish_reason)]
        ]  # fmt: skip
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        self.reply(200, "text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))

    def reply(self, status: int, kind: str, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[StreamingServer]:
    server = StreamingServer()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()  # seconds until it sees the end
    yield server
    server.shutdown()
    server.server_close()


def test_a_server_gets_the_prompt_of_evaluation_and_streams_its_reply(server, visit, capsys):
    assert write_note.main(["soap", "--api_base", server.api_base, str(visit)]) == 0
    assert capsys.readouterr().out == AS_TEXT
    (body,) = server.bodies
    assert body == {
        "model": "soap",
        "messages": prompts.note_messages(DIALOGUE),
        "stream": True,
        "temperature": 0,
        "max_tokens": 1024,
        "chat_template_kwargs": {**prompts.CHAT_TEMPLATE_KWARGS, "date_string": "26 Jul 2024"},
    }
    pieces: list[str] = []
    ServedModel("soap", server.api_base, 9).write(prompts.note_messages(DIALOGUE), pieces.append)
    assert len(pieces) > 10


def test_a_server_is_asked_without_max_tokens_if_they_exceed_its_limit(server, visit, capsys):
    server.refusals = [(400, "max_tokens is too large: this model's maximum context length is 100 tokens")] * 2
    assert write_note.main(["soap", "--api_base", server.api_base, str(visit)]) == 0
    assert capsys.readouterr().out == AS_TEXT
    assert ["stream" in body for body in server.bodies] == [True, False, False]
    assert "max_tokens" not in server.bodies[-1]


def test_a_refusal_gives_one_line_without_the_key(server, visit, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret-key")
    server.refusals = [(401, "Incorrect key\n a-secret-key")]
    address = server.api_base.replace("http://", "http://user:pass@")
    assert write_note.main(["soap", "--api_base", address, str(visit)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {visit}: {server.api_base} refuses soap: status 401, Incorrect key ***"


PIECE = 'data: {"choices": [{"index": 0, "delta": {"content": "{"}}]}\n\n'
NO_STREAMS = [
    "",
    '{"choices": [{"message": {"content": "whole"}}]}',
    'data: {"choices": null}\n\n',
    'data: {"choices": [{"index": 0}]}\n\n',
    'data: {"choices": [{"delta": {"content": [1]}}]}\n\n',
    "data: [1]\n\n",
    "data: {oops\n\n",
]


@pytest.mark.parametrize("stream", NO_STREAMS)
def test_a_server_that_does_not_stream_is_asked_for_the_whole_reply(stream, server, visit, capsys):
    server.stream = stream
    assert write_note.main(["soap", "--api_base", server.api_base, str(visit)]) == 0
    assert capsys.readouterr().out == AS_TEXT
    assert ["stream" in body for body in server.bodies] == [True, False]


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ('data: {"error": {"message": "CUDA error", "code": 500}}\n\n', "refuses soap: CUDA error"),
        ("data: {oops\n\n", "broke off its reply with an unknown message; try again"),
        ('data: {"choices": null}\n\n', "broke off its reply with an unknown message; try again"),
    ],
)
def test_a_server_that_fails_within_its_reply_gives_one_line(event, words, server, visit, capsys):
    server.stream = PIECE + event
    assert write_note.main(["soap", "--api_base", server.api_base, str(visit)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {visit}: {server.api_base} {words}"


def test_a_dialogue_too_long_for_the_server_gives_one_line(server, visit, capsys):
    server.refusals = [(400, "maximum context length is 100 tokens")] * 3
    assert write_note.main(["soap", "--api_base", server.api_base, str(visit)]) == 2
    assert "the dialogue is too long for the server; shorten it" in capsys.readouterr().err


def test_a_server_that_is_down_gives_one_line(visit, capsys):
    assert write_note.main(["soap", "--api_base", "http://127.0.0.1:9/v1", str(visit)]) == 2
    assert "http://127.0.0.1:9/v1 does not answer (APIConnectionError)" in capsys.readouterr().err


# --- notes in other forms --------------------------------------------------------------------------------------------

WORDS = {prompts.SECTION_NAMES[section]: text for section, text in LEARNED_NOTE.items()}
FORMS = {
    "headings": "\n\n".join(f"{name}:\n{text}" for name, text in WORDS.items()),
    "words as keys": json.dumps(WORDS),
    "wrapped object, nested values": json.dumps({"note": LEARNED_NOTE | {"S": {"Reports": "cough"}}}),
    "JSON5": "{" + ", ".join(f"{section}: {text!r}" for section, text in LEARNED_NOTE.items()) + ",}",
    "unclosed JSON": json.dumps(LEARNED_NOTE)[:-2],
    "text around JSON": f"{{draft: 1}} Here it is: {json.dumps(LEARNED_NOTE)}",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_note_in_another_form_is_shown_and_its_form_is_named(form, server, visit, capsys):
    server.text = FORMS[form]
    note = read_leniently(server.text)[0]
    for arguments in ([], ["--json"]):
        assert write_note.main(["soap", "--api_base", server.api_base, str(visit), *arguments]) == 0
        output = capsys.readouterr()
        notice, reminder = output.err.splitlines()[-2:]
        assert notice == (f"{visit}: the reply is not in the JSON form that the prompt asks for; read as: {form}")
        assert reminder.startswith("not for clinical use")
        if arguments:
            assert json.loads(output.out) == {"file": str(visit), **note}
        else:
            assert output.out == as_text(note)


@pytest.mark.parametrize("form", ["headings", "words as keys", "unclosed JSON"])
def test_a_note_in_another_form_that_the_limit_cut_off_is_an_error(form, server, visit, capsys):
    server.text, server.finish_reason = FORMS[form], "length"
    assert write_note.main(["soap", "--api_base", server.api_base, str(visit)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {visit}: no note in the reply (") and "; raise --max_new_tokens" in error


def test_a_note_in_another_form_is_checked(server, visit, monkeypatch, capsys):
    monkeypatch.setattr(ServedModel, "first_tokens", Judge.first_tokens)
    server.text = FORMS["headings"]
    assert write_note.main(["soap", "--api_base", server.api_base, str(visit), "--check", "judge", "--json"]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert {section: found[section] for section in prompts.SECTIONS} == LEARNED_NOTE
    assert len(found["unsupported"]) == 6
    assert "; read as: headings\n" in output.err


# --- checks ----------------------------------------------------------------------------------------------------------


class Judge:
    """Answer yes to each statement that its dialogue contains word for word; know no answer to "Unclear."."""

    def first_tokens(self, chats):
        answers = []
        for _, user in chats:
            texts, _, question = user["content"].rpartition(prompts.STATEMENT_LABEL)
            statement = json.loads(question.partition("\n")[0])
            answers.append({"yes": -0.1, "no": -2.5} if statement in texts else {"No": -0.2, " yes": -3.0})
            if statement == "Unclear.":
                answers[-1] = None
        return answers


def test_a_check_lists_exactly_the_statements_that_are_not_supported():
    note = {"S": "Dry cough. Fever of 40 degrees.", "O": "Unclear.", "A": "", "P": "Rest at home."}
    check = check_note(Judge(), "Patient: Dry cough. Doctor: Rest at home.", note)
    assert [(found["section"], found["statement"]) for found in check.unsupported] == [("S", "Fever of 40 degrees.")]
    assert check.unsupported[0]["log_odds"] == pytest.approx(-2.8)
    assert (check.asked, check.unanswered) == (4, 1)


def test_probabilities_of_a_local_judge_are_those_of_its_next_token(tiny_model):
    import torch

    judge = LocalModel(str(tiny_model), None, 5)
    (tokens,) = judge.first_tokens([CHECK_CHAT])
    with torch.inference_mode():
        ids = torch.tensor([encode_prompt(judge._tokenizer, CHECK_CHAT)])
        expected = judge._model(ids).logits[0, -1].float().softmax(-1)
    best = judge._tokenizer.decode([expected.argmax()])
    assert len(tokens) <= 20 and math.exp(tokens[best]) == pytest.approx(expected.max().item(), rel=1e-3)
    assert judge.first_tokens([prompts.note_messages(DIALOGUE * 100)]) == [None]


def test_a_checked_note_has_the_judges_findings_in_text_and_json(tiny_model, visit, monkeypatch, capsys):
    monkeypatch.setattr(LocalModel, "first_tokens", Judge.first_tokens)
    command = [str(tiny_model), str(visit), "--check", str(tiny_model)]
    assert write_note.main(command) == 0
    text = capsys.readouterr().out
    assert text.startswith(AS_TEXT)
    assert f"{visit}: 6 of 7 statements not supported by the dialogue, says {tiny_model}" in text
    assert "  O: Lungs are clear.\n" in text
    assert write_note.main([*command, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert {key: found[key] for key in prompts.SECTIONS} == LEARNED_NOTE
    assert len(found["unsupported"]) == 6 and found["unanswered"] == 0


def test_a_judge_that_cannot_start_does_not_lose_the_notes(tiny_model, visit, tmp_path, capsys):
    judge = str(tmp_path / "no-judge")
    assert write_note.main([str(tiny_model), str(visit), "--check", judge, "--json"]) == 2
    output = capsys.readouterr()
    assert json.loads(output.out) == {"file": str(visit), **LEARNED_NOTE}
    (error,) = (line for line in output.err.splitlines() if line.startswith("error:"))
    assert error.startswith(f"error: no note was checked: {judge}: no such folder")


def test_a_check_that_fails_does_not_stop_the_others(server, visit, tmp_path, monkeypatch, capsys):
    failures = ["the judge is out of order"]

    def fail_once(judge, chats):
        if failures:
            raise write_note.UserError(failures.pop())
        return Judge.first_tokens(judge, chats)

    monkeypatch.setattr(ServedModel, "first_tokens", fail_once)
    second = tmp_path / "second.txt"
    second.write_text(DIALOGUE)
    command = ["soap", "--api_base", server.api_base, str(visit), str(second), "--check", "judge", "--json"]
    assert write_note.main(command) == 2
    output = capsys.readouterr()
    lines = [json.loads(line) for line in output.out.splitlines()]
    assert [(line["file"], "unsupported" in line) for line in lines] == [(str(visit), False), (str(second), True)]
    assert f"error: {visit} was not checked: the judge is out of order" in output.err
