"""The two stages between a model and its records: notes from dialogues, verdicts from notes.

Each yields records as they finish, after they are on disk, and leaves out what a run folder already holds.
"""

import hashlib
import itertools
import queue
import random
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import prompts
from evaluation.engine import Completion, LanguageModel, Request
from evaluation.judging import judge
from evaluation.judging.attacks import attack_cases
from evaluation.judging.known_answers import control_cases
from evaluation.store import JsonLines

JUDGE_TOKENS = 192  # a reason of 200 characters and the verdict take about 60
TRIES = 3  # for a verdict that cannot be read
SEED = 0  # of controls, attacks and third tries
CONTROL_SOURCES = 250  # rows to choose from for each control or attack of a section; bounds their time and memory

Row = dict[str, str]
Record = dict[str, Any]


def prediction_record(index: int, dialogue: str, done: Completion) -> Record:
    """The line of predictions.jsonl for the generator's answer to dialogue number `index`."""
    note, reason = dict.fromkeys(prompts.SECTIONS), None
    if done.finish_reason == "prompt_too_long":
        reason = "the prompt is too long"
    elif done.finish_reason == "error":
        reason = "the engine gave up"
    else:
        try:
            note = prompts.read_note(done.text)
        except prompts.NoteError as error:
            reason = str(error)
    return {
        "index": index,
        "dialogue_hash": hashlib.sha256(dialogue.encode()).hexdigest()[:12],
        "raw": done.text,
        "finish_reason": done.finish_reason,
        "status": "invalid" if reason else "ok",
        "reason": reason,
        **note,
        "prompt_tokens": done.prompt_tokens,
        "output_tokens": done.output_tokens,
    }


def write_notes(model: LanguageModel, rows: Sequence[Row], done: set[int], out: JsonLines) -> Iterator[Record]:
    """Notes for the rows whose index is not yet `done`: records of predictions.jsonl. Raises UserError."""
    requests = (
        Request(index, prompts.note_messages(rows[index]["dialogue"]), group=index)
        for index in range(len(rows))
        if index not in done
    )
    for answer in model.complete(requests):
        record = prediction_record(answer.tag, rows[answer.tag]["dialogue"], answer)
        out.append(record)
        yield record


def write_beside(
    records: Iterator[Record], out: JsonLines, skip: int
) -> tuple[threading.Thread, Iterator[Record | None]]:
    """Let a thread bring `records` to the disk, and yield them from there; None when none has come for a moment.

    So they do not wait for their reader, nor it for them. `skip`: how many records `out` has already.
    """
    written: queue.SimpleQueue[BaseException | bool] = queue.SimpleQueue()

    def write() -> None:
        try:
            for _ in records:
                written.put(True)
            written.put(False)
        except BaseException as error:  # for the reader, who raises it
            written.put(error)

    def read() -> Iterator[Record | None]:
        lines = itertools.islice(out, skip, None)
        while True:
            try:
                more = written.get(timeout=0.1)
            except queue.Empty:
                yield None
                continue
            if isinstance(more, BaseException):
                raise more
            if not more:
                return
            yield next(lines)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread, read()


def pending_cases(
    predictions: Iterable[Record | None], rows: Sequence[Row], out: JsonLines, controls: int, attacks: int
) -> Iterator[judge.Case | None]:
    """What is still to judge: controls and attacks, then the four sections of each note as it comes.

    What code decides without a judge goes to `out` on the way. None stands where a note is not there yet.
    """
    done = {judge.record_key(record) for record in out}
    sources = _sample(rows, CONTROL_SOURCES * max(1, controls, attacks)) if controls or attacks else {}
    known = itertools.chain(control_cases(sources, controls, SEED), attack_cases(sources, attacks, SEED))
    yield from (case for case in known if case.key() not in done)
    for prediction in predictions:
        if prediction is None:
            yield None
            continue
        # The sections of a dialogue follow each other: the judge's prefix cache then serves three of the four.
        cases, decided = judge.plain_cases([prediction], rows)
        for record in decided:
            if judge.record_key(record) not in done:
                out.append(record)
        yield from (case for case in cases if case.key() not in done)


def _sample(rows: Sequence[Row], n: int) -> dict[int, Row]:
    """All rows, or n of them where there are more, by their index; the same ones each time."""
    indices = range(len(rows)) if len(rows) <= n else sorted(random.Random(SEED).sample(range(len(rows)), n))
    return {index: rows[index] for index in indices}


def another_try(sampling: dict[str, Any], attempt: int) -> dict[str, Any]:
    """What changes in the judge's `sampling` in the second and third try for a verdict that cannot be read.

    Greedy decoding repeats itself, so there is more room, then chance: the same one whichever requests came before.
    """
    room = {"max_tokens": 4 * sampling["max_tokens"]} if sampling.get("max_tokens") else {}
    if attempt == 2:
        return room
    return room | {"temperature": max(0.5, sampling["temperature"] or 0), "seed": sampling.get("seed", SEED)}


def judge_cases(
    model: LanguageModel, cases: Iterable[judge.Case | None], out: JsonLines, sampling: dict[str, Any]
) -> Iterator[Record]:
    """Verdicts: records of judgements.jsonl. One that cannot be read is asked for again, then unscored.

    `sampling` is what `model` samples with. Raises UserError.
    """
    requests = (case and Request((case, 1), case.messages(), group=case.index) for case in cases)
    for answer in model.complete(requests):
        case, attempt = answer.tag
        verdict, reason = judge.read_verdict(answer.text, answer.finish_reason)
        if verdict == "unscored" and attempt < TRIES and answer.finish_reason != "prompt_too_long":
            again = another_try(sampling, attempt + 1)
            model.submit(Request((case, attempt + 1), case.messages(), case.index, again))
            continue
        record = case.record(verdict, reason, raw=answer.text, attempts=attempt)
        out.append(record)
        yield record


def exhaust(items: Iterable) -> None:
    for _ in items:
        pass


def progress(items: Iterator, label: str, total: int, done: int = 0) -> Iterator:
    """`items`, with a progress bar that shows the time left; it appears with the first item."""
    from tqdm import tqdm

    first = list(itertools.islice(items, 1))
    interval = 0.5 if sys.stderr.isatty() else 10  # seconds
    with tqdm(desc=label, total=total, initial=done, mininterval=interval, dynamic_ncols=True) as bar:
        for item in itertools.chain(first, items):
            bar.update()
            yield item
        bar.total = bar.n  # less than was thought: code decides some verdicts, and not every row makes a control
