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
            raise ValueError(f"{name} has a message of another role than system, user and assistant")
        texts["user" if role in USER else "assistant"].append(message[text_key])
    counts = {role: len(found) for role, found in texts.items()}
    if counts != {"user": 1, "assistant": 1}:
        raise ValueError(
            f"{name} has {counts['user']} messages of the user and {counts['assistant']} of the assistant, not one each"
        )
    return texts["user"][0], texts["assistant"][0]


def read_text_visits(folder: Path, names: Iterable[Path]) -> dict[str, list[Record]]:
    """Return the visits in text files, by the folder that they are in: NAME.txt is a dialogue, NAME.note.txt its note.

    A file without its partner, and one that is not UTF-8, becomes a record with the reason.
    """
    tables: dict[str, list[Record]] = {}
    names = set(names)
    for name in sorted({dialogue_of(name) for name in names}):
        note = name.with_name(name.stem + NOTE_SUFFIX)
        missing = next((part.name for part in (name, note) if part not in names), None)
        columns, reason = None, f"no {missing} beside it" if missing else None
        if not missing:
            try:
                texts = [(folder / part).read_text(encoding="utf-8-sig") for part in (name, note)]
                columns = {
                    "messages": [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
                }
            except UnicodeDecodeError:
                reason = "not UTF-8"
        present = note if name not in names else name
        tables.setdefault(str(name.parent), []).append(Record(str(folder / present), 1, columns, reason))
    return tables


def dialogue_of(name: Path) -> Path:
    """Return the file of the dialogue that belongs to NAME.txt or NAME.note.txt."""
    return name.with_name(name.name.removesuffix(NOTE_SUFFIX) + ".txt") if name.name.endswith(NOTE_SUFFIX) else name
