"""Read the note in a model's reply: strictly, in the JSON form that the prompt asks for, or leniently, in other forms.

Strict reading gives the headline scores. Lenient reading separates form from content: a model that was not trained on
the JSON form may write a right note under headings, or as another kind of object.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from common.replies import encodable, unique_keys
from evaluation.engines.base import Completion
from evaluation.run.records import Prediction
from preprocessing.headings import Heading, find_headings, read_soap
from preprocessing.labels import SECTION_HEADINGS, Kind, classify
from prompts import SECTIONS, Note, NoteError, answer_in, read_note


def read_prediction(index: int, dialogue: str, completion: Completion) -> Prediction:
    """Return the record of the generator's answer to dialogue number `index`.

    Only a reply that ended by itself is read leniently. A note that the token limit cut off lacks content, not form.
    """
    note, status, reason, form = dict.fromkeys(SECTIONS), "invalid", None, None
    if completion.finish_reason == "prompt_too_long":
        reason = "the prompt is too long"
    elif completion.finish_reason == "error":
        reason = f"the engine gave up: {completion.error or 'no cause given'}"
    else:
        try:
            note, status = read_note(completion.text), "ok"
        except NoteError as error:
            reason = str(error)
    if reason and completion.finish_reason == "stop":
        with contextlib.suppress(NoteError):  # the record keeps the strict reader's reason
            (note, form), status = read_leniently(completion.text), "lenient"
    return {
        "index": index,
        "dialogue_hash": hashlib.sha256(dialogue.encode()).hexdigest()[:12],
        "raw": completion.text,
        "finish_reason": completion.finish_reason,
        "status": status,
        "reason": reason,
        "form": form,
        **note,
        "prompt_tokens": completion.prompt_tokens,
        "output_tokens": completion.output_tokens,
    }


def read_leniently(reply: str) -> tuple[Note, str]:
    """Return (note, form) from a complete reply that contains exactly one note. Raises NoteError.

    The note is JSON with all four sections, or text that `preprocessing.headings` can read. Of JSON, these forms are
    read beyond the strict one, and `form` names those that apply:
      "wrapped object": the note is a value of another object, or an item of a list
      "words as keys": keys such as "Subjective", "plan (P)" or "treatment_plan"
      "nested values": objects, lists, numbers or null, written as "Medications: aspirin; ibuprofen"
      "JSON5": single quotes, trailing commas, keys without quotes, comments
      "unclosed JSON": the last quote, brackets or braces are missing
      "text around JSON": none of these, but other objects or braces come first
    `form` is "headings" for text. Text before the first heading is dropped; text after the Plan belongs to the Plan,
    because nothing shows where it ends.
    A section that is absent or appears twice, two different notes, and JSON with any other fault raise NoteError.
    Each word of the note comes from the reply. The time is linear in the length of the reply.
    """
    text = answer_in(reply)
    try:
        objects = list(_objects_in(text))
        found = [entry for value, _, _, fault in objects for entry in _notes_in(value, fault)]
    except RecursionError:
        raise NoteError("JSON nested too deeply") from None
    found = [(note, form) for note, form in found if any(c.isalnum() for text in note.values() for c in text)]
    if not found:
        return _read_headings(text), "headings"
    if any(note != found[0][0] for note, _ in found):
        raise NoteError("several different notes")
    rest = _without(text, [(start, end) for _, start, end, _ in objects])
    if {heading.section for heading in _section_headings(rest)} == set(SECTIONS):
        raise NoteError("a note as JSON and one under headings")
    return found[0]


# --- JSON ------------------------------------------------------------------------------------------------------------

# The start of an object, but not of "{coughs}" in a sentence.
_OBJECT = re.compile(r"\{(?=\s*(?:[\"'/]|\w{1,40}\s{0,9}:))")
_MOST_OBJECTS = 50  # in one reply, which bounds the time


def _objects_in(text: str) -> Iterator[tuple[dict[str, Any], int, int, str]]:
    """Yield (object, start, end, form if it is not JSON) for each outermost object. Raises NoteError for a bad one."""
    end = number = 0
    while opening := _OBJECT.search(text, end):
        number += 1
        if number > _MOST_OBJECTS:
            raise NoteError(f"more than {_MOST_OBJECTS} JSON objects")
        value, end, form = _parse(text, opening.start())
        yield value, opening.start(), end, form


def _parse(text: str, start: int) -> tuple[dict[str, Any], int, str]:
    """Return (object at `start`, its end, "" or the form that is not JSON). Raises NoteError."""
    import json5

    try:
        return *_DECODER.raw_decode(text, start), ""
    except ValueError:
        pass
    numbers = {"parse_int": _as_written, "parse_float": str, "parse_constant": str}
    try:
        value, error, end = json5.parse(
            text, start=start, strict=False, consume_trailing=False, object_pairs_hook=unique_keys, **numbers
        )
        if not error:
            return value, end, "JSON5"
    except ValueError:
        pass
    try:
        return _DECODER.decode(_close(text[start:])), len(text), "unclosed JSON"
    except ValueError:
        raise NoteError("not JSON, and no other form that can be read") from None


def _as_written(digits: str, *_base: int) -> str:
    return digits  # json5 passes the base, too


# Numbers stay text, so that "7.0" is not changed. strict=False: small models put raw line breaks into strings.
_DECODER = json.JSONDecoder(
    object_pairs_hook=unique_keys, parse_int=str, parse_float=str, parse_constant=str, strict=False
)


def _close(text: str) -> str:
    """Return JSON with the quote, brackets and braces that are missing at its end. Raises ValueError.

    Brackets at the end of an unclosed string ("Rest.}) close the object, and the quote belongs before them.
    """
    from partial_json_parser import fix

    text, fence, after = text.rstrip().rpartition("\n```")
    text = text.rstrip() if fence and not after else text + fence + after
    kept, missing = fix(text)
    body = text.rstrip("}] \t\r\n")
    if missing.startswith('"') and body != text:
        closed = re.sub(r"\s", "", text[len(body) :])
        kept, missing = fix(body)
        if not missing.startswith('"' + closed):
            raise ValueError("brackets do not match")
        text = body
    if kept != text:
        raise ValueError("there is more to complete than brackets")
    return text + missing


def _notes_in(value: Any, fault: str, is_wrapped: bool = False) -> Iterator[tuple[Note, str]]:
    """Yield (note, form) for each object with a section among its keys. Raises NoteError if it is no complete note."""
    if isinstance(value, list):
        for item in value:
            yield from _notes_in(item, fault, True)
    if not isinstance(value, dict):
        return
    keys = {}
    for key in value:
        section = _section_of(key)
        if section in keys:
            raise NoteError(f"section {section} appears twice")
        if section:
            keys[section] = key
    if not keys:
        for item in value.values():
            yield from _notes_in(item, fault, True)
        return
    for section in SECTIONS:
        if section not in keys:
            raise NoteError(f"section {section} is missing")
    contents = [value[keys[section]] for section in SECTIONS]
    forms = {
        fault: bool(fault),
        "wrapped object": is_wrapped,
        "words as keys": set(keys.values()) != set(SECTIONS),
        "nested values": not all(isinstance(content, str) or _is_list_of_text(content) for content in contents),
    }
    note = {section: _as_text(value[keys[section]]) for section in SECTIONS}
    yield note, ", ".join(form for form, applies in forms.items() if applies) or "text around JSON"


def _section_of(key: str) -> str | None:
    """Return the section that a key names; None if it names no section. Raises NoteError if that is in doubt."""
    label = classify(key.upper() if len(key) == 1 else key, {})
    if label is None:
        return None
    if label.kind in (Kind.COMBINED, Kind.EXTENDED):
        raise NoteError("a key may be a section, or two in one")
    return label.section if label.kind in SECTION_HEADINGS else None


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_BETWEEN = ("\n", "; ", ", ")  # items of the outermost list or object, of those in it, and of all others


def _as_text(value: Any, depth: int = 0) -> str:
    """Return a value as text: {"Medications": ["aspirin", "ibuprofen"]} as "Medications: aspirin; ibuprofen"."""
    if isinstance(value, str):
        return encodable(value).strip()
    between = _BETWEEN[min(depth, len(_BETWEEN) - 1)]
    if isinstance(value, list):
        return between.join(_as_text(item, depth + 1) for item in value)
    if isinstance(value, dict):
        items = ((_as_text(key).replace("_", " "), _as_text(item, depth + 1)) for key, item in value.items())
        return between.join(f"{key}: {item}".rstrip() for key, item in items)
    return json.dumps(value)


# --- headings --------------------------------------------------------------------------------------------------------

_FENCE = re.compile(r"^[ \t]*```.*$", re.MULTILINE)


def _read_headings(text: str) -> Note:
    """Return the note under four headings, perhaps in a code fence or after other text. Raises NoteError."""
    parts = _FENCE.split(text)
    fenced = [part for part in parts[1::2] if _section_headings(part)]
    if len(fenced) == 1 and not any(_section_headings(part) for part in parts[::2]):
        text = fenced[0]
    headings = _section_headings(text)
    if not headings:
        raise NoteError("neither JSON nor headings")
    if any(set(heading.opening) & set("\"'") for heading in headings):
        raise NoteError("neither JSON nor headings, but quoted keys")
    is_first = headings[0].section == "S" and headings[0].kind in SECTION_HEADINGS
    return read_soap(text[headings[0].start :] if is_first else text)


def _section_headings(text: str) -> list[Heading]:
    """Return the headings of sections, those of two in one included."""
    return [heading for heading in find_headings(text, {}) if heading.kind in SECTION_HEADINGS | {Kind.COMBINED}]


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    """Return the text without the spans, which are in order."""
    starts, ends = [0, *(end for _, end in spans)], [*(start for start, _ in spans), len(text)]
    return "\n".join(text[start:end] for start, end in zip(starts, ends, strict=True))
