"""Prompts that got no answer because of an error: counted, and no run passes for one if all its prompts failed."""

from common.errors import UserError
from evaluation.judging.judge import NO_REPLY
from evaluation.run.records import Judgement, Prediction
from evaluation.run.runs import Run, print_line


def check_notes(run: Run) -> None:
    """Print how many prompts for notes failed, and why the first one did. Raises UserError if all failed."""
    _check(run, "notes", "--overwrite", [_cause_of_note(note) for note in run.folder.predictions])


def check_verdicts(run: Run) -> None:
    """Like check_notes, for verdicts of the judge on notes, controls and attacks."""
    judged = (record for record in run.folder.judgements if record["source"] == "judge")
    _check(run, "verdicts", "--stage judge --overwrite", [_cause_of_verdict(record) for record in judged])


def _cause_of_note(note: Prediction) -> str | None:
    return (note.get("reason") or "no cause given") if note["finish_reason"] == "error" else None


def _cause_of_verdict(record: Judgement) -> str | None:
    reason = record.get("reason") or ""
    return reason if record["verdict"] == "unscored" and reason.startswith(NO_REPLY) else None


def _check(run: Run, what: str, remedy: str, causes: list[str | None]) -> None:
    failed = [cause for cause in causes if cause]
    if not failed:
        return
    if len(failed) == len(causes):
        raise UserError(
            f"{run.folder.path}: all {len(failed)} prompts for {what} failed ({failed[0]}); "
            f"correct that, then run the same command with {remedy}"
        )
    print_line(
        f"{run.folder.path}: {len(failed)} of {len(causes)} prompts for {what} failed, so they are unscored; "
        f"the first: {failed[0]}"
    )
