"""Tokenize examples: the prompt exactly as evaluation sends it, labels only on the note and its end token."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common.chat_template import TemplateError, check_template, render_chat
from common.hub import download
from prompts import SECTIONS, Messages, training_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default


def model_files(model: str | Path) -> str:
    """Return the model's folder; for a hub name, download everything but the weights first.

    Raises ConnectionError if the hub cannot be reached.
    """
    return str(model) if Path(model).is_dir() else str(download(str(model)))


def load_tokenizer(model: str | Path, notify: Callable[[str], None] = print) -> "PreTrainedTokenizerBase":
    """Return a model's tokenizer after trying it on a note. Call `notify` if its template inserts the date.

    Raises TemplateError, which names the model.
    """
    from transformers import AutoTokenizer

    chat = training_messages("dialogue", dict.fromkeys(SECTIONS, "text"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_files(model))
        notice = check_template(tokenizer)
        encode_example(tokenizer, chat)
    except ConnectionError as error:
        raise TemplateError(f"{model}: {error}") from None
    except Exception as error:  # the libraries raise many types for damaged or missing files
        raise TemplateError(f"{model} has no tokenizer with a chat template to train on ({error})") from None
    if notice:
        notify(notice)
    return tokenizer


def encode_example(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> dict[str, list[int]]:
    """Return token ids and labels of a chat that ends with the assistant's answer; see `encode_examples`."""
    return {key: values[0] for key, values in encode_examples(tokenizer, [messages]).items()}


def encode_examples(tokenizer: "PreTrainedTokenizerBase", chats: list[Messages]) -> dict[str, list[list[int]]]:
    """Return `input_ids` and `labels` of chats that end with the assistant's answer.

    Prompt and answer are encoded separately, so the prompt's ids equal `encode_prompt`'s for every answer. Labels are
    the ids of the answer and its end token, and IGNORE_INDEX elsewhere. Both lists of a chat have the same length.
    Raises TemplateError if the template rewrites the answer or ends it without an end token.
    """
    prompts, answers = zip(*(_prompt_and_answer(tokenizer, messages) for messages in chats), strict=True)
    prompt_ids, answer_ids = (
        tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in (prompts, answers)
    )
    special = set(tokenizer.all_special_ids)
    if any(ids[-1] not in special for ids in answer_ids):
        raise TemplateError("the chat template ends the answer without a special token: generation would not stop")
    pairs = list(zip(prompt_ids, answer_ids, strict=True))
    return {
        "input_ids": [prompt + answer for prompt, answer in pairs],
        "labels": [[IGNORE_INDEX] * len(prompt) + answer for prompt, answer in pairs],
    }


def _prompt_and_answer(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> tuple[str, str]:
    """Return the text of the chat before the answer, and the answer with its end token."""
    prompt = render_chat(tokenizer, messages[:-1])
    text = render_chat(tokenizer, messages, add_generation_prompt=False)
    answer = messages[-1]["content"]
    if not text.startswith(prompt + answer):
        raise TemplateError("the chat template changes the prompt or the answer when it adds the answer")
    ending = text[len(prompt) + len(answer) :].rstrip()  # Qwen3 and SmolLM2: "<|im_end|>", then a line break
    if not ending:
        raise TemplateError("the chat template ends the answer without a special token: generation would not stop")
    return prompt, answer + ending


def file_fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files in a folder, sorted by path."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
