"""Turn a record of any source into a dialogue and the four sections of its note."""

import contextlib
import json
from collections.abc import Collection

import prompts
from common.dataset import Row
from preprocessing.chats import chat_column, read_chat
from preprocessing.headings import read_soap
from preprocessing.labels import SectionMap
from preprocessing.tables import NOT_TEXT, Record, RepeatedKey

# Far longer than any visit; and 1,000 rows, which datasets writes at once, stay below Arrow's limit of 2 GiB of text.
MAX_CHARACTERS = 500_000


class RowError(ValueError):
    """The reason why a row is left out. It never quotes the row."""


def read_row(record: Record, dialogue_column: str, note_column: str, section_map: SectionMap | None = None) -> Row:
    """Return the dialogue and the sections. Four columns of sections take precedence over the note's column.

    A row without these columns may have a chat instead (see preprocessing.chats).

    Raises RowError, NoteError.
    """
    if record.reason:
        raise RowError(record.reason)
    if not isinstance(record.columns, dict):
        raise RowError(f"{type(record.columns).__name__} where an object was expected")
    columns = record.columns
    if not has_pair(columns, dialogue_column, note_column) and (name := chat_column(columns)):
        try:
            columns = dict(zip((dialogue_column, note_column), read_chat(columns, name), strict=True))
        except ValueError as error:
            raise RowError(str(error)) from None
    dialogue = read_text(columns, dialogue_column)
    note = read_sections(columns) or read_note_column(columns, note_column, section_map)
    return {"dialogue": dialogue, **note}


def read_sections(columns: dict[str, object]) -> dict[str, str] | None:
    """Return the note in columns named S, O, A and P or Subjective to Plan, in any case; None if one is missing.

    Raises RowError.
    """
    named = section_columns(columns)
    if not all(named.values()):
        return None
    for section, names in named.items():
        if len(names) > 1:
            raise RowError(f"{' and '.join(map(repr, names))} both name section {section}; keep one")
    note = {section: read_section(columns[name], section) for section, [name] in named.items()}
    if not any(character.isalnum() for text in note.values() for character in text):
        raise RowError("all sections are empty")
    return note


def section_columns(columns: Collection[str]) -> dict[str, list[str]]:
    """Return the columns named by each section's letter or word."""
    return {
        section: [name for name in columns if str(name).strip().lower() in (section.lower(), word.lower())]
        for section, word in prompts.SECTION_NAMES.items()
    }


def has_note_columns(columns: Collection[str], dialogue_column: str, note_column: str) -> bool:
    """Return whether a table or row with these columns has a dialogue and a note, perhaps as a chat."""
    return has_pair(columns, dialogue_column, note_column) or chat_column(columns) is not None


def has_pair(columns: Collection[str], dialogue_column: str, note_column: str) -> bool:
    """Return whether there are a column for the dialogue, and one for the note or four for its sections."""
    return dialogue_column in columns and (note_column in columns or all(section_columns(columns).values()))


def read_note_column(columns: dict[str, object], name: str, section_map: SectionMap | None = None) -> dict[str, str]:
    """Return the note in one column: under headings, or as an object or JSON text with a key for each section.

    Raises RowError, NoteError.
    """
    note = columns.get(name)
    if not isinstance(note, dict):
        text = read_text(columns, name)
        if not text.startswith("{"):
            return read_soap(text, section_map)
        note, end = prompts.parse_object(text, 0)
        if text[end:].strip():
            raise RowError(f"{name} has text after the JSON object")
    sections = read_sections(note)
    if sections is None:
        missing = next(section for section, names in section_columns(note).items() if not names)
        raise RowError(f"section {missing} is missing")
    return sections


def read_section(content: object, section: str) -> str:
    """Return the text of one section. Each item of a list, even if written as JSON, is a line. Raises RowError."""
    if isinstance(content, str) and is_written_list(content):
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(content)
    if isinstance(content, list):
        other = [type(item).__name__ for item in content if not isinstance(item, str)]
        if other:
            raise RowError(f"{section} is a list with {other[0]} in it, not only text")
        content = "\n".join(content)
    return read_text({section: content}, section)


def is_written_list(text: str) -> bool:
    """Return whether a text looks like a list of strings, written as JSON or by Python."""
    text = text.strip()
    return len(text) > 3 and text[0] + text[-1] == "[]" and text[1:-1].strip()[:1] in ("'", '"')


def read_text(columns: dict[str, object], name: str) -> str:
    """Return the text of one column, stripped. Raises RowError."""
    if name not in columns:
        raise RowError(f"no column {name}")
    text = columns[name]
    if text is None or (isinstance(text, str) and not text.strip()):
        raise RowError(f"{name} is empty")
    if isinstance(text, RepeatedKey):
        raise RowError(f"{name} has key {text.key} twice")
    if not isinstance(text, str):
        raise RowError(f"{name} is {type(text).__name__}, not text")
    if len(text) > MAX_CHARACTERS:
        raise RowError(f"{name} has more than {MAX_CHARACTERS:,} characters")
    if NOT_TEXT.search(text):
        raise RowError(f"{name} contains NUL or bytes that are not UTF-8")
    if is_written_list(text):
        raise RowError(f"{name} is a list written as text")
    return text.strip()
