"""Sort judgements into verdicts on notes, controls and attacks.

A verdict is pass, fail or unscored. A run's pass rate is pass / all notes; `worst` and `best` count the unscored as
failed and as passed. All other figures (the judge's rates, differences, tests, attacks) leave them out: a pair counts
if both members are scored, and a mean over the sections if all sections are.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache

from evaluation.run.records import Judgement, record_key
from evaluation.scoring.intervals import bootstrap_mean, wilson
from prompts import SECTIONS

Verdict = tuple[str, str]  # ("pass", "fail" or "unscored", its source: "judge" or "code")
NoteVerdicts = dict[int, dict[str, Verdict]]  # index -> section -> verdict on the model's note
SectionKey = tuple[int, str]  # (index of the dialogue, section)

# Sections without text are not sampled. Empty ones, and those of a note that counts as unreadable, fail by definition;
# those that the engine failed to write are unknown.
STRATA = ("passed by the judge", "failed by the judge", "failed by rule", "unscored", "no text", "not written")
PASSED, FAILED, FAILED_BY_RULE, UNSCORED, NO_TEXT, NOT_WRITTEN = STRATA
TO_LABEL = (PASSED, FAILED, FAILED_BY_RULE, UNSCORED)


def sort_judgements(
    judgements: Iterable[Judgement], indices: set[int]
) -> tuple[NoteVerdicts, list[Judgement], list[Judgement]]:
    """Return (verdicts on notes, without their texts; controls; attacks).

    indices: the dialogues that have a prediction.
    Raises ValueError for two judgements of the same case, or a judgement without a prediction.
    """
    notes: NoteVerdicts = {}
    controls, attacks, seen = [], [], set()
    for record in judgements:
        key = index, section, kind, attack = record_key(record)
        if key in seen or (not kind and not attack and section in notes.get(index, ())):
            case = f" as {kind or attack}" if kind or attack else ""
            raise ValueError(f"row {index}, section {section} is judged twice{case}")
        if kind or attack:
            seen.add(key)
            (controls if kind else attacks).append(record)
        elif index in indices:
            notes.setdefault(index, {})[sys.intern(section)] = _shared_verdict(record["verdict"], record["source"])
        else:
            raise ValueError(f"row {index}, section {section} is judged but has no prediction")
    for records in (controls, attacks):  # verdicts arrive in any order, which must not change a figure
        records.sort(key=lambda record: [str(part) for part in record_key(record)])
    return notes, controls, attacks


@cache
def _shared_verdict(verdict: str, source: str) -> Verdict:
    """Return one shared object for equal verdicts, to save memory: a large run has 100,000 of a few kinds."""
    return verdict, source


def fail_by_form(notes: NoteVerdicts, indices: set[int]) -> NoteVerdicts:
    """Return the verdicts, but with all sections of the notes in `indices` failed by rule, whatever the judge said."""
    return notes | {index: dict.fromkeys(SECTIONS, _shared_verdict("fail", "code")) for index in indices}


def verdict_rates(verdicts: Iterable[str]) -> dict:
    """Return the counts pass, fail and unscored, and accuracy (pass / all), its ci95 (Wilson), worst and best.

    worst, best: accuracy if all unscored ones failed or passed
    """
    count = Counter(verdicts)
    n = count.total()
    return {
        **{verdict: count[verdict] for verdict in ("pass", "fail", "unscored")},
        "accuracy": count["pass"] / n,
        "ci95": wilson(count["pass"], n),
        "worst": count["pass"] / n,
        "best": (count["pass"] + count["unscored"]) / n,
    }


def mean_rate(passes: list[int]) -> dict:
    """Return accuracy, the mean of the sections' pass rates, and its ci95.

    passes: for each note, the number of sections passed, 0 to 4; at least one note.
    """
    return {"accuracy": sum(passes) / (len(SECTIONS) * len(passes)), "ci95": bootstrap_mean(passes)}


def stratum_of(verdict: Verdict, has_text: bool) -> str:
    """Return the member of STRATA to which a section with this verdict belongs."""
    verdict, source = verdict
    if not has_text:
        return NOT_WRITTEN if verdict == "unscored" else NO_TEXT
    if verdict == "unscored":
        return UNSCORED
    if source == "code":
        return FAILED_BY_RULE
    return PASSED if verdict == "pass" else FAILED
