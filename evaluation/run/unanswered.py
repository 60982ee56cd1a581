"""Report prompts that failed with an error. A run fails if all its prompts did."""

from collections.abc import Iterable

from common.console import print_line
from common.errors import UserError
from evaluation.judging.judge import NO_REPLY
from evaluation.run.records import Judgement, Prediction
from evaluation.run.runs import Run


def check_notes(run: Run) -> None:
    """Print how many prompts for notes failed, with the cause of the first failure. Raises UserError if all failed."""
    _check(run, "notes", "--overwrite", map(_cause_of_note, run.folder.predictions))


def check_verdicts(run: Run) -> None:
    """Like `check_notes`, for the judge's verdicts on notes, controls and attacks."""
    judged = (record for record in run.folder.judgements if record["source"] == "judge")
    _check(run, "verdicts", "--stage judge --overwrite", map(_cause_of_verdict, judged))


def _cause_of_note(note: Prediction) -> str | None:
    return (note.get("reason") or "no cause given") if note["finish_reason"] == "error" else None


def _cause_of_verdict(record: Judgement) -> str | None:
    reason = record.get("reason") or ""
    return reason if record["verdict"] == "unscored" and reason.startswith(NO_REPLY) else None


def _check(run: Run, answers: str, options: str, causes: Iterable[str | None]) -> None:
    """Count the failed prompts for `answers`, i.e. "notes" or "verdicts".

    `causes` has one entry per prompt, None for success. `options` are the command-line options that repeat the prompts.
    """
    total, failed, first = 0, 0, None
    for cause in causes:
        total += 1
        failed += cause is not None
        first = first or cause
    if not failed:
        return
    if failed == total:
        raise UserError(
            f"{run.folder.path}: all {failed} prompts for {answers} failed ({first}); "
            f"correct the cause, then repeat the command with {options}"
        )
    print_line(
        f"{run.folder.path}: {failed} of {total} prompts for {answers} failed and are unscored; the first: {first}"
    )
