"""Test that chat templates which reject, drop or change a prompt are found early, and that the date is fixed."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE, build_tokenizer, rows
from test_tokens import CHATML, QWEN3_LIKE

import prompts
from common import chat_template
from common.chat_template import (
    DATE_NOTICE,
    PromptEncoder,
    TemplateError,
    check_template,
    encode_prompt,
    load_tokenizers,
    render_chat,
)
from evaluation.engines.vllm_worker import _prepare
from training.tokens import encode_example, load_tokenizer

NO_SYSTEM_ROLE = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
NO_SYSTEM_ROLE += CHATML
DROPPED = CHATML.replace("in messages %}", "in messages if message.role != 'system' %}")
USER_DROPPED = CHATML.replace("in messages %}", "in messages if message.role != 'user' %}")
TWICE = CHATML.replace("message.content +", "message.content + message.content +")
ESCAPED = CHATML.replace("message.content", "message.content|e")
MERGED = (
    "{% set system = messages[0].content %}{% for message in messages[1:] %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if loop.first %}{{ system + '\\n\\n' }}{% endif %}{{ message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Llama 3.1 and 3.2 let the caller set the date (DATE_STRING); gpt-oss and SmolLM3 do not (CLOCK).
DATE_STRING = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "{{ '<|im_start|>system\\nToday Date: ' + date_string + '<|im_end|>\\n' }}" + CHATML
)
CLOCK = "{{ '<|im_start|>system\\nCurrent date: ' + strftime_now('%Y-%m-%d') + '<|im_end|>\\n' }}" + CHATML
WEEKDAY = "{% macro day() %}{{ strftime_now('%A') }}{% endmacro %}{{ day() }}" + CHATML
HOUR = "{% if strftime_now('%H')|int < 12 %}Good morning. {% endif %}" + CHATML


@pytest.fixture(scope="module")
def base_tokenizer():
    return build_tokenizer()


@pytest.fixture
def with_template(base_tokenizer, monkeypatch):
    def change(template: str):
        monkeypatch.setattr(base_tokenizer, "chat_template", template)
        return base_tokenizer

    return change


@pytest.mark.parametrize("template", [CHATML, QWEN3_LIKE, CHAT_TEMPLATE, MERGED], ids=str.__len__)
def test_a_template_with_both_messages_once_is_accepted(with_template, template):
    assert check_template(with_template(template)) is None


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (NO_SYSTEM_ROLE, r"cannot render a system and a user message \(System role not supported\)"),
        ("{{ messages[0].absent.text }}", "cannot render .*has no attribute 'absent'|cannot render .*'absent'"),
        ("{% for %}", "cannot render .*Expected an expression"),
        (DROPPED, "drops the system message"),
        (USER_DROPPED, "drops the user message"),
        (TWICE, "repeats the system message"),
        (ESCAPED, "drops the system message, or changes its text"),
    ],
)
def test_a_template_that_rejects_or_changes_a_prompt_is_reported(with_template, template, words):
    with pytest.raises(TemplateError, match=words) as error:
        check_template(with_template(template))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", [NO_SYSTEM_ROLE, DROPPED, TWICE, ESCAPED])
def test_training_rejects_such_a_template_and_names_the_model(tiny_model, tmp_path, template):
    folder = changed_model(tiny_model, tmp_path / "model", template)
    with pytest.raises(TemplateError, match=str(folder)):
        load_tokenizer(folder)


# --- the date


@pytest.mark.parametrize("template", [DATE_STRING, CLOCK, WEEKDAY, HOUR], ids=["Llama", "gpt-oss", "weekday", "hour"])
def test_a_template_that_inserts_the_date_is_detected(with_template, template):
    assert check_template(with_template(template)) == DATE_NOTICE


@pytest.mark.parametrize(("template", "date"), [(DATE_STRING, "26 Jul 2024"), (CLOCK, "2024-07-26")])
def test_the_date_in_a_prompt_is_fixed_in_training_and_evaluation(with_template, template, date):
    tokenizer, row = with_template(template), rows(1)[0]
    messages = prompts.training_messages(row["dialogue"], row)
    prompt = encode_prompt(tokenizer, messages[:-1])
    assert date in tokenizer.decode(prompt)
    assert encode_example(tokenizer, messages)["input_ids"][: len(prompt)] == prompt


def test_without_a_date_the_prompt_equals_the_librarys(with_template):
    tokenizer, messages = with_template(QWEN3_LIKE), prompts.note_messages("Doctor: Hello.")
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **prompts.CHAT_TEMPLATE_KWARGS)
    assert encode_prompt(tokenizer, messages) == expected


def test_a_server_gets_the_date_in_llamas_format(with_template):
    options = chat_template.SERVED_TEMPLATE_KWARGS
    text = with_template(DATE_STRING).apply_chat_template(prompts.note_messages("Hello."), tokenize=False, **options)
    assert text == render_chat(with_template(DATE_STRING), prompts.note_messages("Hello."), False)


def test_no_prompt_contains_todays_date(with_template):
    text = render_chat(with_template(DATE_STRING), prompts.note_messages("Hello."))
    assert f"{datetime.now():%d %b %Y}" not in text


# --- evaluation


def changed_model(tiny_model: Path, folder: Path, template: str) -> Path:
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_the_templates_of_all_models_are_checked_before_an_engine_starts(tiny_model, tmp_path):
    judge = changed_model(tiny_model, tmp_path / "judge", NO_SYSTEM_ROLE)
    tokenizer, lines = load_tokenizers([str(tiny_model), str(tiny_model)])
    assert tokenizer.chat_template and lines == []
    with pytest.raises(
        TemplateError, match=f"^{judge}: the chat template cannot render a system and a user message"
    ) as error:
        load_tokenizers([str(tiny_model), str(judge)])
    assert "\n" not in str(error.value)


def test_a_fixed_date_is_reported_with_its_model(tiny_model, tmp_path):
    dated = changed_model(tiny_model, tmp_path / "dated", DATE_STRING)
    assert load_tokenizers([str(tiny_model), str(dated)])[1] == [f"{dated}: {DATE_NOTICE}"]


def test_a_tokenizer_that_cannot_be_loaded_is_reported_in_one_line(tiny_model, tmp_path):
    damaged = changed_model(tiny_model, tmp_path / "damaged", CHATML)
    (damaged / "tokenizer.json").write_text("{")
    with pytest.raises(TemplateError, match=f"^{damaged}: cannot load its tokenizer"):
        load_tokenizers([str(damaged)])


def test_a_prompt_that_cannot_be_tokenized_carries_its_cause():
    class Lines:
        left = [json.dumps({"id": 7, "kind": "chat", "messages": []})]  # noqa: RUF012

        def get(self) -> str:
            return self.left.pop()

    class Done(Exception):
        pass

    class Prepared:
        def put(self, item: tuple) -> None:
            raise Done(item)

    def encode(messages: list) -> list[int]:
        raise TypeError("no text")

    with pytest.raises(Done) as done:
        _prepare(Lines(), encode, Prepared())
    assert done.value.args[0] == ({"id": 7, "kind": "chat", "messages": []}, [], "TypeError: no text")


def test_prompts_that_share_a_prefix_get_the_same_tokens(base_tokenizer):
    encode = PromptEncoder(base_tokenizer, size=3)
    chats = []
    for row in rows(5):
        note = {section: row[section] for section in prompts.SECTIONS}
        for statement in (note["S"], 'He says "5 mg".', "\u00fc \U0001f600", "x"):
            chats.append(prompts.supported_messages(row["dialogue"], note, statement))
            chats.append(prompts.covered_messages(note["P"], statement))
        chats.append(prompts.note_messages(row["dialogue"]))
    assert [encode(chat) for chat in chats] == [encode_prompt(base_tokenizer, chat) for chat in chats]
    assert len(encode._prefixes) == 3
    assert all(encode._prefixes.values()), "the last prefixes were seen often enough to be split"


def test_a_tokenizer_that_joins_across_the_split_still_gets_the_whole_tokens(base_tokenizer, monkeypatch):
    encode = PromptEncoder(base_tokenizer)
    whole = encode._encode
    monkeypatch.setattr(encode, "_encode", lambda text: [len(text), *whole(text)])  # as one that marks each start
    for statement in ("a", "b", "c", "d"):
        chat = prompts.covered_messages("No fever.", statement)
        text = render_chat(base_tokenizer, chat)
        assert encode(chat) == [len(text), *whole(text)]
