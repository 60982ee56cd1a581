"""Read a visit from a chat, as fine-tuning data often has it, and from a pair of text files.

A chat is a list of messages in a column `messages` ({"role", "content"}) or `conversations` ({"from", "value"}, as in
ShareGPT). The user's message is the dialogue, word for word, and the assistant's is the note. System messages are
ignored. Any other number of messages is not one visit, and the row is rejected.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from preprocessing.tables import Record

CHAT_COLUMNS = {"messages": ("role", "content"), "conversations": ("from", "value")}
USER, ASSISTANT, SYSTEM = {"user", "human"}, {"assistant", "gpt", "model", "bot", "chatgpt"}, {"system", "developer"}
NOTE_SUFFIX = ".note.txt"


def chat_column(columns: Collection[str]) -> str | None:
    """Return the column that holds a chat, or None. Only rows can hold one; a header alone is not enough."""
    if not isinstance(columns, Mapping):
        return None
    for name, keys in CHAT_COLUMNS.items():
        messages = columns.get(name)
        is_list = isinstance(messages, list) and messages
        if is_list and all(isinstance(message, dict) and set(keys) <= message.keys() for message in messages):
            return name
    return None


def read_chat(columns: Mapping[str, object], name: str) -> tuple[object, object]:
    """Return the dialogue and the note in the chat of column `name`. Raises ValueError with the reason."""
    role_key, text_key = CHAT_COLUMNS[name]
    texts: dict[str, list[object]] = {"user": [], "assistant": []}
    for message in columns[name]:
        role = str(message[role_key]).lower()
        if role in SYSTEM:
            continue
        if role not in USER | ASSISTANT:
            raise ValueError(f"{name} has a message whose role is not system, user or assistant")
        texts["user" if role in USER else "assistant"].append(message[text_key])
    counts = {role: len(found) for role, found in texts.items()}
    if counts != {"user": 1, "assistant": 1}:
        raise ValueError(
            f"{name} has {counts['user']} messages of the user and {counts['assistant']} of the assistant, not one each"
        )
    return texts["user"][0], texts["assistant"][0]


def is_note_file(name: Path) -> bool:
    """Return whether a file's name is NAME.note.txt, in any case."""
    return name.name.lower().endswith(NOTE_SUFFIX)


def read_text_visits(folder: Path, names: Iterable[Path]) -> dict[str, list[Record]]:
    """Return the visits in text files, by the folder that they are in: NAME.txt is a dialogue, NAME.note.txt its note.

    Suffixes and names may differ in case. A file without its partner, one with two, and one that is not UTF-8 become a
    record with the reason.
    """
    visits: dict[tuple[str, str], tuple[list[Path], list[Path]]] = {}
    for name in sorted(names):
        suffix = NOTE_SUFFIX if is_note_file(name) else name.suffix
        visit = visits.setdefault((str(name.parent), name.name[: -len(suffix)].lower()), ([], []))
        visit[is_note_file(name)].append(name)
    tables: dict[str, list[Record]] = {}
    for (parent, _), files in sorted(visits.items()):
        columns, reason = None, _partner_problem(*files)
        if not reason:
            try:
                texts = [(folder / name).read_text(encoding="utf-8-sig") for [name] in files]
                columns = {
                    "messages": [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
                }
            except UnicodeDecodeError:
                reason = "not UTF-8"
        present = (files[0] or files[1])[0]
        tables.setdefault(parent, []).append(Record(str(folder / present), 1, columns, reason))
    return tables


def _partner_problem(dialogues: list[Path], notes: list[Path]) -> str | None:
    """Return why the files of a visit are not one dialogue and one note, or None."""
    if len(dialogues) > 1 or len(notes) > 1:
        return f"{' and '.join(name.name for name in max(dialogues, notes, key=len))} have the same name"
    if not notes:
        return f"no {dialogues[0].stem}{NOTE_SUFFIX} beside it"
    return None if dialogues else f"no {notes[0].name[: -len(NOTE_SUFFIX)]}.txt beside it"
