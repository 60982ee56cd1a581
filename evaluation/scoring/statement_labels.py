"""Compare the judge's answers on statements with people's answers on the same statements.

The labelled notes must be a random sample of the run's judged notes, as on a statement sheet. All statements of a note
count as one draw, because the answers on one note are correlated.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from evaluation.run.records import QUESTIONS, StatementRecord, note_hash
from evaluation.scoring.intervals import clustered_auc, clustered_share
from evaluation.scoring.people import LabelError


class StatementKey(NamedTuple):
    """A statement of a note: `number` counts from 1 within the section and the question, one of QUESTIONS."""

    index: int
    section: str
    question: str
    number: int


Answers = dict[str, dict[StatementKey, bool]]  # rater ("" if unknown) -> statement -> whether the rater says yes


def read_labels(
    labels: Iterable[dict], records: Iterable[StatementRecord]
) -> tuple[Answers, dict[StatementKey, float]]:
    """Check labels against the run; return (answers by rater, log odds of the labelled statements with an answer).

    labels: {"index", "section", "question", "number", "answer": "yes" or "no", and optionally "hash": `note_hash` of
        the statement, "rater", "where"}.
    records: the run's statements.jsonl, read once.
    Raises LabelError.
    """
    labels = list(labels)
    wanted = {label.get("index") for label in labels if isinstance(label, dict)}
    texts, log_odds = {}, {}
    for record in records:
        if record["index"] not in wanted or record["control"] or record["attack"]:
            continue
        for question in QUESTIONS:
            for number, statement in enumerate(record[question], 1):
                key = StatementKey(record["index"], record["section"], question, number)
                texts[key] = statement["statement"]
                if record["status"] == "asked" and statement["log_odds"] is not None:
                    log_odds[key] = statement["log_odds"]
    answers: Answers = {}
    for count, label in enumerate(labels, 1):
        where = label.get("where", f"label {count}") if isinstance(label, dict) else f"label {count}"
        if not isinstance(label, dict) or not {*StatementKey._fields, "answer"} <= label.keys():
            raise LabelError(f"{where}: needs {', '.join(StatementKey._fields)} and answer")
        if label["answer"] not in ("yes", "no"):
            raise LabelError(f"{where}: the answer is {label['answer']!r}, neither yes nor no")
        key = StatementKey(*(label[name] for name in StatementKey._fields))
        try:
            text = texts.get(key)
        except TypeError:  # a list or an object
            text = None
        if text is None:
            raise LabelError(f"{where}: the run has no such statement")
        if label.get("hash") and label["hash"] != note_hash(text):
            raise LabelError(f"{where}: the label is on another statement than this run's")
        rater = label.get("rater") or ""
        if not isinstance(rater, str):
            raise LabelError(f"{where}: the rater must be a text")
        own = answers.setdefault(rater, {})
        if key in own:
            raise LabelError(f"{where}: this statement already has a label{f' by {rater}' if rater else ''}")
        own[key] = label["answer"] == "yes"
    return answers, {key: log_odds[key] for own in answers.values() for key in own if key in log_odds}


def check_statements(answers: Answers, log_odds: dict[StatementKey, float], threshold: float) -> dict:
    """Return {"covered", "supported": figures} of the statements that people and judge answered; people are the truth.

    With several raters, the majority decides; statements with as many yes as no are left out.
    labelled, notes: numbers of statements and of their notes
    people, judge: {share: of yes, ci95} on these statements
    auc, auc_ci95: probability that a statement with people's yes has higher log odds than one with their no; None
        without both kinds
    found: {n: statements with people's no, share: of them, those below the threshold, ci95}
    false_alarms: {n: statements with people's yes, share: of them, those below the threshold, ci95}
    """
    votes = defaultdict(list)
    for own in answers.values():
        for key, yes in own.items():
            votes[key].append(yes)
    truth = {key: sum(given) * 2 > len(given) for key, given in votes.items() if sum(given) * 2 != len(given)}
    return {
        question: _figures(
            {key: (truth[key], score) for key, score in log_odds.items() if key in truth and key.question == question},
            threshold,
        )
        for question in QUESTIONS
    }


def _figures(statements: dict[StatementKey, tuple[bool, float]], threshold: float) -> dict:
    notes: dict[int, list[tuple[bool, float]]] = defaultdict(list)
    for key, pair in sorted(statements.items()):
        notes[key.index].append(pair)
    groups = list(notes.values())

    def rate(among: tuple[bool, ...], is_yes) -> dict:
        counts = [
            [(sum(is_yes(yes, score) for yes, score in note if yes in among), sum(yes in among for yes, _ in note))]
            for note in groups
        ]
        share, interval = clustered_share(counts) if counts else (None, None)
        return {"n": sum(n for ((_, n),) in counts), "share": share, "ci95": interval}

    def below(_: bool, score: float) -> bool:
        return score < threshold

    split = [([score for yes, score in note if yes], [score for yes, score in note if not yes]) for note in groups]
    area, interval = clustered_auc(split)
    return {
        "labelled": len(statements),
        "notes": len(groups),
        "people": rate((True, False), lambda yes, _: yes),
        "judge": rate((True, False), lambda _, score: score >= threshold),
        "auc": area,
        "auc_ci95": interval,
        "found": rate((False,), below),
        "false_alarms": rate((True,), below),
    }
