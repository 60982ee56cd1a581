"""Prompts that got no answer because of an error: counted, and no run passes for one if all its prompts failed."""

from collections.abc import Iterable

from common.errors import UserError
from evaluation.judging.judge import NO_REPLY
from evaluation.run.records import Judgement, Prediction
from evaluation.run.runs import Run, print_line


def check_notes(run: Run) -> None:
    """Print how many prompts for notes failed, and why the first one did. Raises UserError if all failed."""
    _check(run, "notes", "--overwrite", map(_cause_of_note, run.folder.predictions))


def check_verdicts(run: Run) -> None:
    """Like check_notes, for verdicts of the judge on notes, controls and attacks."""
    judged = (record for record in run.folder.judgements if record["source"] == "judge")
    _check(run, "verdicts", "--stage judge --overwrite", map(_cause_of_verdict, judged))


def _cause_of_note(note: Prediction) -> str | None:
    return (note.get("reason") or "no cause given") if note["finish_reason"] == "error" else None


def _cause_of_verdict(record: Judgement) -> str | None:
    reason = record.get("reason") or ""
    return reason if record["verdict"] == "unscored" and reason.startswith(NO_REPLY) else None


def _check(run: Run, what: str, remedy: str, causes: Iterable[str | None]) -> None:
    total, failed, first = 0, 0, None
    for cause in causes:
        total += 1
        failed += cause is not None
        first = first or cause
    if not failed:
        return
    if failed == total:
        raise UserError(
            f"{run.folder.path}: all {failed} prompts for {what} failed ({first}); "
            f"correct that, then run the same command with {remedy}"
        )
    print_line(
        f"{run.folder.path}: {failed} of {total} prompts for {what} failed, so they are unscored; the first: {first}"
    )
