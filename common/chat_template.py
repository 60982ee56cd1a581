"""Turn a chat into the text and the tokens of a prompt, the same way in training and evaluation."""

from datetime import datetime
from typing import TYPE_CHECKING

import prompts
from common.errors import short_cause

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some templates (Llama 3, gpt-oss, SmolLM3) insert today's date, which differs between training and evaluation. All
# get this date instead: the one that Llama 3's templates insert if they have no clock.
FIXED_DATE = datetime(2024, 7, 26)
DATE_NOTICE = f"the chat template inserts the date: training and evaluation both use {FIXED_DATE:%d %b %Y}"
# A server renders chats itself, with its own clock. Llama 3's templates take the date from this option instead.
SERVED_TEMPLATE_KWARGS = {**prompts.CHAT_TEMPLATE_KWARGS, "date_string": f"{FIXED_DATE:%d %b %Y}"}
SERVED_NOTICE = (
    "renders chats with its own clock: if the model's template inserts the date differently from Llama 3's, "
    "the prompts differ from those in training"
)

_OTHER_DATES = (datetime(2001, 2, 3, 4, 5, 6), datetime(2019, 11, 27, 18, 49, 50))  # they share no part
_USER_TEXT = "Doctor: What brings you in?\nPatient: A dry cough, 38.5 \u00b0C since Monday."
_NOTE = dict.fromkeys(prompts.SECTIONS, "Acute bronchitis.")


class TemplateError(ValueError):
    """A tokenizer or chat template that is missing or unusable. The message says why."""


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: prompts.Messages,
    add_generation_prompt: bool = True,
    date: datetime = FIXED_DATE,
) -> str:
    """Return the text of the chat; with `add_generation_prompt`, up to where the model's answer begins."""
    return tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        strftime_now=date.strftime,  # replaces the template's clock, a global function of that name
        **prompts.CHAT_TEMPLATE_KWARGS,
    )


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: prompts.Messages) -> list[int]:
    """Return the token ids of the chat up to where the model's answer begins."""
    return tokenizer(render_chat(tokenizer, messages), add_special_tokens=False)["input_ids"]


class PromptEncoder:
    """Encode prompts like `encode_prompt`, but encode what questions about statements share, such as a dialogue, twice.

    Such a prompt is split before the statement. From the third one with the same text up to there, only the rest is
    encoded, if the tokens of the second one's parts were those of its whole text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", size: int = 1024):
        self._tokenizer = tokenizer
        self._size = size  # prefixes to remember
        self._prefixes: dict[str, list[int] | None] = {}  # by last use; None: seen once; []: cannot be split

    def __call__(self, messages: prompts.Messages) -> list[int]:
        text = render_chat(self._tokenizer, messages)
        end = text.rfind(prompts.STATEMENT_LABEL) + 1  # after its line break
        prefix, rest = text[:end], text[end:]
        if not prefix:
            return self._encode(text)
        if prefix not in self._prefixes:
            self._remember(prefix, None)
            return self._encode(text)
        tokens = self._prefixes.pop(prefix)
        if tokens is None:
            whole, first = self._encode(text), self._encode(prefix)
            self._remember(prefix, first if first + self._encode(rest) == whole else [])
            return whole
        self._remember(prefix, tokens)
        return tokens + self._encode(rest) if tokens else self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _remember(self, prefix: str, tokens: list[int] | None) -> None:
        self._prefixes[prefix] = tokens
        if len(self._prefixes) > self._size:
            del self._prefixes[next(iter(self._prefixes))]


def check_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Try the chat template on this project's prompts. Return DATE_NOTICE if it inserts the date, otherwise None.

    Raises TemplateError if the template cannot render a prompt, or drops, changes or repeats a message.
    """
    chats = [prompts.note_messages(_USER_TEXT), prompts.judge_messages(_USER_TEXT, "A", _NOTE["A"], _NOTE["A"])]
    for messages in chats:
        try:
            text = render_chat(tokenizer, messages)
        except Exception as error:  # from `raise_exception` in the template, or from its code
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise TemplateError(f"the chat template cannot render a system and a user message ({reason})") from None
        for message in messages:
            count = text.count(message["content"])
            if count != 1:
                fault = f"repeats the {message['role']} message" if count else f"drops the {message['role']} message"
                raise TemplateError(f"the chat template {fault}, or changes its text")
    dated = {render_chat(tokenizer, chats[0], date=date) for date in _OTHER_DATES}
    return DATE_NOTICE if len(dated) > 1 else None


def load_tokenizers(models: list[str]) -> "tuple[PreTrainedTokenizerBase, list[str]]":
    """Check the chat templates of all models. Return the first model's tokenizer, and lines for the user.

    Raises TemplateError with a message of one line.
    """
    from transformers import AutoTokenizer

    tokenizers, lines = {}, []
    for model in dict.fromkeys(models):
        try:
            tokenizers[model] = AutoTokenizer.from_pretrained(model)
            notice = check_template(tokenizers[model])
        except TemplateError as error:
            raise TemplateError(f"{model}: {error}; give another model, or correct its template") from None
        except Exception as error:  # damaged files make the libraries raise many kinds
            cause = f"{type(error).__name__}: {short_cause(error)}"
            raise TemplateError(f"{model}: cannot load its tokenizer ({cause}); copy it again") from None
        if notice:
            lines.append(f"{model}: {notice}")
    return tokenizers[models[0]], lines
