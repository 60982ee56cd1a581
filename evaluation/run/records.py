"""The records of a run folder: one JSON object a line, appended as soon as it is complete.

predictions.jsonl has one line for each dialogue; judgements.jsonl and statements.jsonl have one for each (dialogue,
section).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NotRequired, TypedDict, TypeVar

from common.errors import UserError

DAMAGED = "restore the file, or add --overwrite to replace the run"


class Prediction(TypedDict):
    """The generator's answer to one dialogue.

    `status` is ok, lenient or invalid. A lenient note is not in the JSON form that the prompt asks for, but
    `evaluation.reading.read_leniently` could read it: strict scores count it as failed, lenient scores by its verdicts.
    `reason` is why strict reading failed, `form` the form of a lenient note. An invalid note's sections are None.
    """

    index: int
    dialogue_hash: str
    raw: str
    finish_reason: str
    status: str
    reason: str | None
    form: NotRequired[str | None]  # absent in runs that were made before lenient reading
    S: str | None
    O: str | None  # noqa: E741
    A: str | None
    P: str | None
    prompt_tokens: int
    output_tokens: int


class Control(TypedDict):
    """The kind of an input with a known answer, and the verdict that it should get: pass or fail."""

    kind: str
    expected: str


NO_ATTACK = "none"  # the `attack` of a baseline: an attack's wrong text without the attack


class Judgement(TypedDict):
    """One verdict. `verdict` is pass, fail or unscored; `source` is judge or code; `raw` is the judge's last reply.

    `attack` is the name of an attack or NO_ATTACK; `control` and `attack` are None for a verdict on a note.
    """

    index: int
    section: str
    verdict: str
    reason: str
    raw: str | None
    source: str
    attempts: int
    control: Control | None
    attack: str | None


QUESTIONS = ("covered", "supported")  # the fields of a StatementRecord with answers


class Statement(TypedDict):
    """A sentence, and the judge's log odds ln P(yes) / P(no) that it is covered or supported; None if unanswered."""

    statement: str
    log_odds: float | None


class StatementRecord(TypedDict):
    """The judge's answers on the statements of one section. `control` and `attack` are those of a Judgement.

    covered: the sentences of the reference, and whether the note's section says them. supported: the sentences of the
    note's section, and whether the dialogue or the expert's note supports them.
    status: asked; missing: a rule failed the section for `reason`, so all of the reference is missing; unscored: the
    engine wrote no note.
    """

    index: int
    section: str
    control: Control | None
    attack: str | None
    reason: str
    status: str
    covered: list[Statement]
    supported: list[Statement]


def record_key(record: Mapping[str, Any]) -> tuple[int, str, str | None, str | None]:
    """Return the key of a Judgement or StatementRecord within a run: (index, section, kind of control, attack)."""
    kind = record["control"]["kind"] if record["control"] else None
    return record["index"], record["section"], kind, record["attack"]


def note_hash(text: str) -> str:
    """Return the first 12 hex digits of the SHA-256 of a section's text as UTF-8, by which labels refer to it."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]


PREDICTION_KEYS = ("index", "dialogue_hash", "finish_reason", "status", *"SOAP")
JUDGEMENT_KEYS = ("index", "section", "verdict", "source", "control", "attack")
STATEMENT_KEYS = ("index", "section", "control", "attack", "status", "covered", "supported")

T = TypeVar("T")


def parse_record(line: bytes, where: str, advice: str, keys: Iterable[str] = ()) -> dict[str, Any]:
    """Parse a line of JSON that must hold an object with `keys`. Raises UserError with `where` and `advice`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object; {advice}")
    missing = [key for key in keys if key not in record]
    if missing:
        raise UserError(f"{where} has no {missing[0]}; {advice}")
    if type(record.get("index", 0)) is not int:
        raise UserError(f"{where}: the index is not a number; {advice}")
    return record


class JsonLines(Generic[T]):
    """An append-only file with one JSON object a line.

    A killed run can leave a last line without a line break. Reading skips that line, and writing replaces it.
    """

    def __init__(self, path: Path, keys: tuple[str, ...] = ()):
        self.path, self._keys = path, keys
        self._stream = None

    def __iter__(self) -> Iterator[T]:
        """Yield the records in the order of the file; none if it does not exist. Raises UserError for a bad line."""
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            for row, line in enumerate(stream, 1):
                if line.endswith(b"\n"):
                    yield parse_record(line, f"{self.path}:{row}", DAMAGED, self._keys)

    def append(self, record: T) -> None:
        """Write one record, unbuffered, so that it survives a kill. Raises UserError if the disk is full."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        try:
            if self._stream is None:
                self._truncate_unfinished_line()
                self._stream = self.path.open("ab", buffering=0)
            written = self._stream.write(line)
            if written != len(line):
                raise OSError("the disk is full")
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.path}: {reason}; make room, then run the same command to resume") from None

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _truncate_unfinished_line(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("r+b") as stream:
            size = end = stream.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - 65536)
                stream.seek(start)
                newline = stream.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end < size:
                stream.truncate(end)


def open_records(folder: Path) -> tuple[JsonLines[Prediction], JsonLines[Judgement], JsonLines[StatementRecord]]:
    """Return predictions.jsonl, judgements.jsonl and statements.jsonl of a run folder."""
    return (
        JsonLines(folder / "predictions.jsonl", PREDICTION_KEYS),
        JsonLines(folder / "judgements.jsonl", JUDGEMENT_KEYS),
        JsonLines(folder / "statements.jsonl", STATEMENT_KEYS),
    )
