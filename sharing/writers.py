"""Let a model write one note at a time, and show it while it is written: on this machine, or on a server."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import prompts
from common.chat_template import SERVED_NOTICE, SERVED_TEMPLATE_KWARGS, TemplateError, encode_prompt, load_tokenizers
from common.console import print_line
from common.errors import UserError, short_cause

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TextStreamer

    from evaluation.engines.base import Completion

Show = Callable[[str], Any]  # receives each piece of a reply
_PATIENCE = 10  # seconds that the server may be unreachable
_TIMEOUT = 600  # seconds for an answer of the server
SERVE_IT = "serve it with `vllm serve --enable-lora`, and give the server as --api_base"


class LocalModel:
    """A model, perhaps with a LoRA adapter, on the first GPU or, without one, on the CPU, in the type it is saved in.

    `limit` is the maximum of prompt and reply together, in tokens; None means the default of eval.py. Raises UserError
    for a model or an adapter that eval.py would refuse.
    """

    def __init__(self, name: str, lora_path: str | None, max_new_tokens: int, limit: int | None = None):
        from evaluation.engines import models

        found = models.resolve_model(name, print_line=print_line)
        adapter = models.resolve_adapter(lora_path, found, print_line) if lora_path else None
        self._limit = models.context_length(limit, found)
        self._max_new_tokens = max_new_tokens
        silence_libraries()
        self._load(found.path, adapter and adapter.path)

    def _load(self, path: Path, adapter: Path | None) -> None:
        import torch

        from common.merging import load_merged, load_model

        self._tokenizer = load_tokenizer(path)
        model = load_merged(path, adapter, SERVE_IT) if adapter else load_model(path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._model = model.eval().to(device)
        except torch.OutOfMemoryError:
            raise UserError(f"{path} does not fit the GPU's memory; free it, or set CUDA_VISIBLE_DEVICES=''") from None

    def write(self, messages: prompts.Messages, show: Show) -> "Completion":
        """Return the most likely reply (greedy decoding), and pass each piece to `show`. Raises UserError.

        Its finish_reason is "length" if a limit cut it off.
        """
        import torch
        from transformers import GenerationConfig

        from evaluation.engines.base import Completion

        ids = encode_prompt(self._tokenizer, messages)
        if len(ids) >= self._limit:
            raise UserError(
                f"the dialogue is too long: the prompt takes {len(ids):,} tokens, and prompt and note together may "
                f"take {self._limit:,}; shorten it, or raise --max_model_len"
            )
        ends = self._model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), self._tokenizer.eos_token_id} - {None}
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(self._max_new_tokens, self._limit - len(ids)),
            eos_token_id=sorted(ends),
            pad_token_id=self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else min(ends),
        )
        prompt = torch.tensor([ids], device=self._model.device)
        try:
            with torch.inference_mode():
                (output,) = self._model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=settings,
                    use_model_defaults=False,  # the checkpoint's penalties, which eval.py does not use either
                    streamer=_streamer(self._tokenizer, show),
                )
        except torch.OutOfMemoryError:
            raise UserError(
                "the dialogue needs more memory than the GPU has; set CUDA_VISIBLE_DEVICES='' to use the CPU"
            ) from None
        text = self._tokenizer.decode(output[len(ids) :], skip_special_tokens=True)
        return Completion(text, "stop" if output[-1].item() in ends else "length")

    def first_tokens(self, chats: list[prompts.Messages]) -> list[dict[str, float] | None]:
        """Return, for each chat, {text: log-probability} of the most likely first tokens of the reply."""
        import torch

        from evaluation.engines.base import first_token
        from evaluation.judging.statements import SAMPLING

        found: list[dict[str, float] | None] = []
        for messages in chats:
            ids = encode_prompt(self._tokenizer, messages)
            if len(ids) >= self._limit:
                found.append(None)
                continue
            with torch.inference_mode():
                logits = self._model(torch.tensor([ids], device=self._model.device), logits_to_keep=1).logits[0, -1]
            best = logits.float().log_softmax(-1).topk(min(SAMPLING["logprobs"], len(logits)))
            texts = (self._tokenizer.decode([token]) for token in best.indices.tolist())
            found.append(first_token(zip(texts, best.values.tolist(), strict=True)))
        return found


class ServedModel:
    """A model on an OpenAI-compatible server, under the name that the server uses. The key is OPENAI_API_KEY."""

    def __init__(self, name: str, api_base: str, max_new_tokens: int):
        import openai

        from evaluation.options import without_credentials

        self._name, self._api_base, self._max_new_tokens = name, api_base, max_new_tokens
        self._address = without_credentials(api_base)
        self._key = os.environ.get("OPENAI_API_KEY") or "EMPTY"
        self._client = openai.OpenAI(base_url=api_base, api_key=self._key, timeout=_TIMEOUT)
        print_line(f"{self._address} {SERVED_NOTICE}")

    def write(self, messages: prompts.Messages, show: Show) -> "Completion":
        """Like LocalModel.write."""
        import openai

        try:
            streamed = self._stream(messages, show)
        except (openai.BadRequestError, openai.PermissionDeniedError, openai.UnprocessableEntityError):
            streamed = None  # perhaps the server refuses a parameter
        except openai.APIConnectionError as error:
            raise UserError(
                f"{self._address} does not answer ({type(error).__name__}); start the server, or correct --api_base"
            ) from None
        except openai.APIError as error:
            status = f"status {error.status_code}, " if isinstance(error, openai.APIStatusError) else ""
            body = error.body if isinstance(error.body, dict) else {}
            cause = short_cause(ValueError(body.get("message") or "no message")).replace(self._key, "***")
            raise UserError(f"{self._address} refuses {self._name}: {status}{cause}") from None
        if streamed:
            return streamed
        (completion,) = self._ask([messages])  # evaluation's client knows what to leave out for which server
        if completion.finish_reason == "prompt_too_long":
            raise UserError("the dialogue is too long for the server; shorten it")
        show(completion.text)
        return completion

    def first_tokens(self, chats: list[prompts.Messages]) -> list[dict[str, float] | None]:
        """Like LocalModel.first_tokens; None if the server gives no probabilities."""
        from evaluation.judging.statements import SAMPLING

        return [completion.first_token for completion in self._ask(chats, **SAMPLING)]

    def _ask(self, chats: list[prompts.Messages], **sampling: Any) -> "list[Completion]":
        """Return the answers that evaluation's client gets; they arrive whole."""
        from evaluation.engines.server import Server

        async def ask() -> "list[Completion]":
            defaults = {"temperature": 0, "max_tokens": self._max_new_tokens}
            server = Server("model", self._api_base, self._name, defaults, patience=_PATIENCE)
            try:
                return await asyncio.gather(*(server.chat(messages, **sampling) for messages in chats))
            finally:
                await server.stop()

        return asyncio.run(ask())

    def _stream(self, messages: prompts.Messages, show: Show) -> "Completion | None":
        """Return the reply, or None if the server does not stream it in OpenAI's form."""
        from evaluation.engines.base import Completion

        chunks = self._client.chat.completions.create(
            model=self._name,
            messages=messages,
            stream=True,
            temperature=0,
            max_tokens=self._max_new_tokens,
            extra_body={"chat_template_kwargs": SERVED_TEMPLATE_KWARGS},
        )
        pieces, finish_reason = [], "length"  # unless the server says that the reply is complete
        try:
            for choice in (choice for chunk in chunks for choice in chunk.choices[:1]):
                if isinstance(piece := choice.delta.content, str) and piece:
                    pieces.append(piece)
                    show(piece)
                finish_reason = choice.finish_reason or finish_reason
        except (AttributeError, TypeError, ValueError):  # the openai package does not check the parts of a stream
            if pieces:
                raise UserError(f"{self._address} broke off its reply with an unknown message; try again") from None
        return Completion("".join(pieces), finish_reason) if pieces else None


def _streamer(tokenizer: "PreTrainedTokenizerBase", show: Show) -> "TextStreamer":
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a model's folder, whose chat template is checked. Raises UserError."""
    try:
        tokenizer, lines = load_tokenizers([str(path)])
    except TemplateError as error:
        raise UserError(str(error)) from None
    for line in lines:
        print_line(line)
    return tokenizer


def silence_libraries() -> None:
    """Keep the warnings and bars of transformers off the console."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
