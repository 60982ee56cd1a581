"""One example as tokens: the prompt exactly as evaluation sends it, and labels on the note and its end token alone."""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.chat_template import TemplateError, check_template, encode_prompt, render_chat
from prompts import SECTIONS, Messages, training_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default


def model_files(model: str | Path) -> str:
    """The folder of a model, or of what the hub has of it but for weights.

    Raises ConnectionError at once where the hub cannot be reached: transformers tries for half a minute a file.
    """
    if Path(model).is_dir():
        return str(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(str(model), allow_patterns=["*.json", "*.jinja", "*.txt", "*.model"])
    except LocalEntryNotFoundError as error:
        cause = type(error.__cause__ or error).__name__
        raise ConnectionError(f"no such folder, and the model hub cannot be reached ({cause})") from None


def load_tokenizer(model: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model, tried on a note. Raises TemplateError, which names the model."""
    from transformers import AutoTokenizer

    chat = training_messages("dialogue", dict.fromkeys(SECTIONS, "text"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_files(model))
        check_template(tokenizer)
        encode_example(tokenizer, chat)
    except ConnectionError as error:
        raise TemplateError(f"{model}: {error}") from None
    except Exception as error:  # damaged or missing files make the libraries raise anything
        raise TemplateError(f"{model} has no tokenizer with a chat template to train on ({error})") from None
    return tokenizer


def encode_example(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> dict[str, list[int]]:
    """Token ids and labels of a chat that ends with the assistant's answer.

    Prompt and answer are encoded apart, so the prompt's ids equal `encode_prompt`'s, whatever the answer begins with.
    Labels are the answer's ids and its end token; all else is IGNORE_INDEX. Both lists have the same length. Raises
    TemplateError when the template rewrites the answer or closes it without an end token.
    """
    prompt_text = render_chat(tokenizer, messages[:-1])
    text = render_chat(tokenizer, messages, add_generation_prompt=False)
    answer = messages[-1]["content"]
    if not text.startswith(prompt_text + answer):
        raise TemplateError("the chat template changes the prompt or the answer when it adds the answer")
    ending = text[len(prompt_text) + len(answer) :].rstrip()  # Qwen3 and SmolLM2: "<|im_end|>", then a line break
    prompt_ids = encode_prompt(tokenizer, messages[:-1])
    answer_ids = tokenizer(answer + ending, add_special_tokens=False)["input_ids"]
    if not ending or answer_ids[-1] not in tokenizer.all_special_ids:
        raise TemplateError("the chat template ends the answer without a special token: generation would not stop")
    return {"input_ids": prompt_ids + answer_ids, "labels": [IGNORE_INDEX] * len(prompt_ids) + answer_ids}


def best_fit_packs(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins of `capacity` by best-fit decreasing; return each bin's indices into `lengths`.

    Longest first, each into the fullest bin that still has room. On SOAP dialogues the bins are about 97% full, where
    filling them in order leaves about a tenth empty. Raises ValueError for an item over `capacity`.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"item {index} has length {length}, over the capacity of {capacity}")
        position = bisect_left(room, (length, 0))
        if position < len(room):
            free, bin_index = room.pop(position)
        else:
            free, bin_index = capacity, len(bins)
            bins.append([])
        bins[bin_index].append(index)
        insort(room, (free - length, bin_index))
    return bins


def file_fingerprint(path: Path) -> str:
    """SHA-256 over a file, or over all files of a folder in the order of their names."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
