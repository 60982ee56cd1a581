"""The judge's questions and answers: verdict schema, cases from predictions, controls and attacks with known answers.

Standard library and prompts.py only; no files and no models.
"""

from dataclasses import dataclass

import prompts

# Reason before verdict: the model writes in this order, so the verdict can rest on the reason. The bound keeps a reply
# from being cut off.
VERDICT_SCHEMA = {
    "type": "object",
    "properties": {
        "reason": {"type": "string", "maxLength": 200},
        "verdict": {"type": "string", "enum": ["pass", "fail"]},
    },
    "required": ["reason", "verdict"],
    "additionalProperties": False,
}

Row = dict[str, str]  # keys: dialogue, S, O, A, P
Record = dict  # one line of predictions.jsonl or judgements.jsonl


@dataclass(frozen=True)
class Case:
    """One question to the judge. `control` is {"kind", "expected"}, `attack` a name; both None for a plain one."""

    index: int
    section: str
    dialogue: str
    reference: str
    prediction: str
    control: dict | None = None
    attack: str | None = None

    def messages(self) -> prompts.Messages:
        """The chat that asks for a verdict."""
        return prompts.judge_messages(self.dialogue, self.section, self.reference, self.prediction)

    def key(self) -> tuple[int, str, str | None, str | None]:
        """(index, section, kind of control, attack): no two cases of a run share it. Equals `record_key(record)`."""
        return record_key(
            {"index": self.index, "section": self.section, "control": self.control, "attack": self.attack}
        )

    def record(
        self, verdict: str, reason: str, raw: str | None = None, source: str = "judge", attempts: int = 1
    ) -> Record:
        """The line of judgements.jsonl for this case."""
        return {
            "index": self.index,
            "section": self.section,
            "verdict": verdict,
            "reason": reason,
            "raw": raw,
            "source": source,
            "attempts": attempts,
            "control": self.control,
            "attack": self.attack,
        }


def record_key(record: Record) -> tuple[int, str, str | None, str | None]:
    """(index, section, kind of control, attack) of a line of judgements.jsonl."""
    kind = record["control"]["kind"] if record["control"] else None
    return record["index"], record["section"], kind, record["attack"]


def read_verdict(raw: str, finish_reason: str) -> tuple[str, str]:
    """(verdict, reason) from a judge's reply.

    Only a whole JSON object of VERDICT_SCHEMA counts. Everything else is ("unscored", why): a verdict is never guessed.
    """
    raise NotImplementedError


def plain_cases(predictions: list[Record], rows: list[Row]) -> tuple[list[Case], list[Record]]:
    """The cases to judge, four a valid note, and the records that need no judge.

    Code decides an invalid note (fail), an empty or trivial section (fail), and a note that an engine's error kept
    from being written (unscored), each with a reason and source "code". `rows[prediction["index"]]` is its row.
    """
    raise NotImplementedError


def control_cases(rows: dict[int, Row] | list[Row], n: int, seed: int) -> list[Case]:
    """n good and n bad controls for each section, the same for the same (rows, n, seed).

    Good: kind "reworded", expected "pass". Bad: kinds "other_patient", "dropped_finding", "turned_negation",
    "changed_number", "changed_side", expected "fail", in turn. A row that a kind cannot be made from gives way to
    another; there are fewer than n where the texts allow no more.
    """
    raise NotImplementedError


def attack_cases(rows: dict[int, Row] | list[Row], seed: int, n: int) -> list[Case]:
    """n attacks for each section, all kinds in turn: wrong content with text that asks for a pass. Right answer: fail."""
    raise NotImplementedError
