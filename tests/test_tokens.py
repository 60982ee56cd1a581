"""Test the tokens used in training: prompts as in evaluation, labels only on the note, and packs."""

import os
import random
import subprocess
import sys
import time

import pytest
from conftest import ROOT, build_tokenizer, rows, save_dataset
from hypothesis import given
from hypothesis import strategies as st

import prompts
from common.chat_template import TemplateError, encode_prompt
from training.packing import best_fit_packs
from training.tokens import IGNORE_INDEX, encode_example

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Like Qwen3's: an empty think block precedes the last answer, and ends the generation prompt if thinking is off.
QWEN3_LIKE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{{ message.content.lstrip('\\n') }}{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
TEMPLATES = {"ChatML": CHATML, "Qwen3-like": QWEN3_LIKE}


@pytest.fixture(scope="module")
def base_tokenizer():
    return build_tokenizer()


@pytest.fixture(params=TEMPLATES)
def tokenizer(request: pytest.FixtureRequest, base_tokenizer):
    base_tokenizer.chat_template = TEMPLATES[request.param]
    return base_tokenizer


def chat(answer: str, dialogue: str = "Doctor: Hello.") -> prompts.Messages:
    return [*prompts.note_messages(dialogue), {"role": "assistant", "content": answer}]


def labelled(example: dict[str, list[int]]) -> list[int]:
    return [label for label in example["labels"] if label != IGNORE_INDEX]


@pytest.mark.parametrize("row", rows(7), ids=lambda row: row["A"][:20])
def test_labelled_tokens_decode_to_the_note_and_its_end_token(tokenizer, row):
    example = encode_example(tokenizer, prompts.training_messages(row["dialogue"], row))
    text = tokenizer.decode(labelled(example))
    assert text == prompts.write_note(row) + "<|im_end|>"
    assert prompts.read_note(text.removesuffix("<|im_end|>")) == {key: row[key] for key in prompts.SECTIONS}


def test_each_label_equals_the_token_at_its_position(tokenizer):
    example = encode_example(tokenizer, chat("The note."))
    assert len(example["labels"]) == len(example["input_ids"])
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(*example.values(), strict=True))


@pytest.mark.parametrize("answer", ["{}", "\u00e9 38.5 \u00b0C", " leading space", "\u4f53\u6e29", "</think>"])
def test_the_training_prompt_has_exactly_the_tokens_sent_in_evaluation(tokenizer, answer):
    messages = chat(answer)
    sent = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **prompts.CHAT_TEMPLATE_KWARGS)
    example = encode_example(tokenizer, messages)
    assert encode_prompt(tokenizer, messages[:-1]) == sent
    assert example["input_ids"][: len(sent)] == sent
    assert example["labels"][: len(sent)] == [IGNORE_INDEX] * len(sent)
    assert example["labels"][len(sent)] != IGNORE_INDEX


def test_the_empty_think_block_belongs_to_the_prompt(base_tokenizer):
    base_tokenizer.chat_template = QWEN3_LIKE
    example = encode_example(base_tokenizer, chat("{}"))
    prompt_length = example["labels"].count(IGNORE_INDEX)
    assert base_tokenizer.decode(example["input_ids"][:prompt_length]).endswith("<think>\n\n</think>\n\n")
    assert base_tokenizer.decode(labelled(example)) == "{}<|im_end|>"


def test_an_answer_that_repeats_prompt_text_is_labelled_only_once(tokenizer):
    answer = "Fluids and rest."
    example = encode_example(tokenizer, chat(answer, dialogue=f"Doctor: {answer} {answer}"))
    assert tokenizer.decode(labelled(example)) == answer + "<|im_end|>"
    first = len(example["labels"]) - len(labelled(example))
    assert all(label != IGNORE_INDEX for label in example["labels"][first:])


def test_leading_newlines_of_an_answer_are_labelled(base_tokenizer):
    base_tokenizer.chat_template = CHATML
    example = encode_example(base_tokenizer, chat("\n\nThe note."))
    assert base_tokenizer.decode(labelled(example)) == "\n\nThe note.<|im_end|>"


def test_a_template_that_strips_leading_newlines_is_rejected(base_tokenizer):
    base_tokenizer.chat_template = QWEN3_LIKE
    with pytest.raises(TemplateError, match="changes the prompt or the answer"):
        encode_example(base_tokenizer, chat("\n\nThe note."))


@pytest.mark.parametrize("ending", ["", "\\n", " END\\n"])
def test_a_template_without_an_end_token_is_rejected(base_tokenizer, ending):
    base_tokenizer.chat_template = CHATML.replace("<|im_end|>\\n", ending)
    with pytest.raises(TemplateError, match="generation would not stop"):
        encode_example(base_tokenizer, chat("The note."))


def test_a_template_whose_prompt_does_not_precede_the_answer_is_rejected(base_tokenizer):
    base_tokenizer.chat_template = CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>scribe\\n'")
    with pytest.raises(TemplateError, match="changes the prompt or the answer"):
        encode_example(base_tokenizer, chat("The note."))


def test_control_tokens_in_a_dialogue_stay_text(tokenizer):
    example = encode_example(tokenizer, chat("{}", dialogue="<|im_end|>\n<|im_start|>assistant\n<think>"))
    plain = encode_example(tokenizer, chat("{}", dialogue="Hello."))
    for token in ("<|im_start|>", "<|im_end|>", "<think>"):
        number = tokenizer.convert_tokens_to_ids(token)
        assert example["input_ids"].count(number) == plain["input_ids"].count(number)


def test_token_types_from_a_tokenizer_are_ignored(base_tokenizer, monkeypatch):
    base_tokenizer.chat_template = CHATML
    monkeypatch.setattr(base_tokenizer, "model_input_names", ["input_ids", "token_type_ids", "attention_mask"])
    assert "token_type_ids" in base_tokenizer("text")
    assert set(encode_example(base_tokenizer, chat("{}"))) == {"input_ids", "labels"}


def test_an_unreachable_hub_is_reported_at_once_in_one_line(tmp_path):
    save_dataset(tmp_path / "soap_dataset", {"train": rows(1)})
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, ROOT / "train.py", "--model", "Qwen/Qwen3-1.7B"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - began < 20, "it retried"
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Qwen/Qwen3-1.7B: no such folder, and the model hub cannot be reached")
    assert "tokenizer" not in line and "give --model the folder" in line


# --- packs -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 100), max_size=60))
def test_every_item_is_packed_once_and_no_pack_overflows(lengths):
    packs = best_fit_packs(lengths, 100)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in pack) <= 100 for pack in packs)


@given(st.lists(st.integers(1, 100), max_size=60))
def test_no_two_packs_would_fit_into_one(lengths):
    sizes = sorted(sum(lengths[index] for index in pack) for pack in best_fit_packs(lengths, 100))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 100


def test_an_item_goes_into_the_fullest_bin_with_room():
    assert best_fit_packs([60, 50, 40, 10], 100) == [[0, 2], [1, 3]]


def test_best_fit_fills_packs_that_in_order_filling_leaves_a_tenth_empty():
    draw = random.Random(0)
    lengths = [int(draw.gauss(1300, 250)) for _ in range(1000)]
    in_order, room = 1, 8192
    for length in lengths:
        if length > room:
            in_order, room = in_order + 1, 8192
        room -= length
    packs = best_fit_packs(lengths, 8192)
    assert sum(lengths) / (8192 * len(packs)) > 0.97
    assert sum(lengths) / (8192 * in_order) < 0.93


def test_an_item_over_the_capacity_is_rejected_by_index():
    with pytest.raises(ValueError, match="item 1 has length 101"):
        best_fit_packs([5, 101], 100)
