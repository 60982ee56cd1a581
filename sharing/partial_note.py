"""Read a note while a model is still writing it."""

import re
from collections.abc import Iterator

from prompts import SECTIONS, NoteError, parse_object

# What may follow an unfinished text to close its string, list and object.
_ENDINGS = ('"}', "}", "", '"]}', "]}")
# An escape sequence that is cut off: an odd number of backslashes, perhaps with a part of \uXXXX.
_CUT_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*(\\(?:u[0-9a-fA-F]{0,3})?)\Z")
_HIGH_SURROGATE = re.compile("[\ud800-\udbff]\\Z")  # the first half of a character that JSON writes as two escapes


def sections_so_far(reply: str) -> dict[str, str] | None:
    """Return the text of the sections in an unfinished reply, stripped; None if the reply ends between two values.

    The reply is read as `prompts.read_note` reads it: nothing before the first "{", and nothing within a think block.
    """
    text = reply.rpartition("</think>")[2]
    start = text.find("{")
    if start < 0 or "<think>" in text:
        return {}
    if cut := _CUT_ESCAPE.search(text):
        text = text[: cut.start(1)]
    for ending in _ENDINGS:
        try:
            value, _ = parse_object(text + ending, start)
        except NoteError:
            continue
        return {section: _section_text(content) for section, content in value.items() if section in SECTIONS}
    return None


def _section_text(content: object) -> str:
    if isinstance(content, list) and all(isinstance(item, str) for item in content):
        content = "\n".join(content)
    return _HIGH_SURROGATE.sub("", content).strip() if isinstance(content, str) else ""


class NoteStream:
    """Turn the pieces of a reply into the new text of each section."""

    def __init__(self) -> None:
        self.reply = ""
        self.shown: dict[str, str] = {}  # section -> text returned so far

    def feed(self, piece: str) -> Iterator[tuple[str, str]]:
        """Add a piece of the reply. Yield (section, new text) for each section that has become longer."""
        self.reply += piece
        for section, text in (sections_so_far(self.reply) or {}).items():
            before = self.shown.get(section, "")
            if len(text) > len(before) and text.startswith(before):
                self.shown[section] = text
                yield section, text[len(before) :]
