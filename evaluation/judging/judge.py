"""Build the judge's cases, read its verdicts, and decide by rule the sections that need no judge."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

import prompts
from common.dataset import Rows
from common.replies import encodable, unique_keys
from evaluation.run.records import Control, Judgement, Prediction, record_key

VERDICTS = ("pass", "fail")
MAX_REASON = 200  # characters
NO_REPLY = "no reply: error"  # start of the reason if an error prevented the verdict

# The model writes the reason first, so the verdict can follow from it. The limit on its length keeps replies complete.
VERDICT_SCHEMA = {
    "type": "object",
    "properties": {
        "reason": {"type": "string", "maxLength": MAX_REASON},
        "verdict": {"type": "string", "enum": list(VERDICTS)},
    },
    "required": ["reason", "verdict"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Case:
    """One question to the judge.

    `control` is {"kind", "expected"} for a known answer, `attack` the name of an attack; both are None for a note.
    """

    index: int
    section: str
    dialogue: str
    reference: str
    prediction: str
    control: Control | None = None
    attack: str | None = None

    def messages(self) -> prompts.Messages:
        """Return the chat that asks for a verdict."""
        return prompts.judge_messages(self.dialogue, self.section, self.reference, self.prediction)

    def key(self) -> tuple[int, str, str | None, str | None]:
        """Return the identity of the case within a run. It equals `record_key` of the case's record."""
        return record_key(vars(self))

    def record(
        self, verdict: str, reason: str, raw: str | None = None, source: str = "judge", attempts: int = 1
    ) -> Judgement:
        """Return the line of judgements.jsonl for this case."""
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


def read_verdict(raw: str, finish_reason: str, error: str = "") -> tuple[str, str]:
    """Return (verdict, reason) from a judge's reply, or ("unscored", cause) if the reply contains no verdict.

    Only a complete JSON object of VERDICT_SCHEMA counts: a verdict is never guessed. `error` is the cause if
    `finish_reason` is "error".
    """
    if finish_reason == "error":
        return "unscored", f"{NO_REPLY} ({error or 'no cause given'})"
    if finish_reason != "stop":
        return "unscored", "the reply was cut off" if finish_reason == "length" else f"no reply: {finish_reason}"
    try:
        answer = json.loads(raw, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        return "unscored", "the reply is not JSON"
    if not isinstance(answer, dict) or answer.keys() != VERDICT_SCHEMA["properties"].keys():
        return "unscored", "the reply is not an object with reason and verdict"
    reason, verdict = answer["reason"], answer["verdict"]
    if not isinstance(reason, str) or len(reason) > MAX_REASON:
        return "unscored", f"the reason is not a text of at most {MAX_REASON} characters"
    if verdict not in VERDICTS:
        return "unscored", "the verdict is neither pass nor fail"
    return verdict, encodable(reason)


def plain_cases(predictions: Iterable[Prediction], rows: Rows) -> tuple[list[Case], list[Judgement]]:
    """Return (the cases to judge, at most four for each note; the records decided by rule, with source "code").

    A lenient note is judged like one in the JSON form; scoring decides how its verdicts count.
    `rows` is the dataset: `rows[prediction["index"]]` is the note's row.
    """
    cases, decided = [], []
    for prediction in predictions:
        row = rows[prediction["index"]]
        for section in prompts.SECTIONS:
            text = prediction[section] or ""
            case = Case(prediction["index"], section, row["dialogue"], row[section], text)
            verdict, reason = _decide_by_rule(prediction, text, row[section])
            if verdict:
                decided.append(case.record(verdict, reason, source="code", attempts=0))
            else:
                cases.append(case)
    return cases, decided


def _decide_by_rule(prediction: Prediction, text: str, reference: str) -> tuple[str, str] | tuple[None, None]:
    """Return (verdict, reason) if the section needs no judge, otherwise (None, None)."""
    if prediction["finish_reason"] == "error":  # the engine failed, not the model
        return "unscored", f"no note: {prediction['reason']}"
    if prediction["status"] == "invalid":
        return "fail", f"the note is invalid: {prediction['reason']}"
    if not text.strip():
        return "fail", "the section is empty"
    if _is_placeholder(text) and not _is_placeholder(reference):
        return "fail", "the section says nothing"
    return None, None


# Letters only. "No findings" is not a placeholder: it may be the right answer.
_PLACEHOLDERS = {"", "na", "none", "nil", "null", "tbd", "todo", "unknown", "string", "text"}
_PLACEHOLDERS |= {name.lower() for name in (*prompts.SECTION_NAMES, *prompts.SECTION_NAMES.values())}


def _is_placeholder(text: str) -> bool:
    return re.sub(r"[\W_]+", "", text).lower() in _PLACEHOLDERS
