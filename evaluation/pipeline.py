"""The runs of one call on their way from dialogues to notes and verdicts, with one start of the judge."""

import argparse
import itertools
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import prompts
from evaluation import models, placement
from evaluation.engine import Engine, EngineSpec, LanguageModel
from evaluation.judging import judge
from evaluation.runs import JUDGING, WRITING, Run, add_seconds, describe, stamp, tell
from evaluation.server import Server
from evaluation.stages import JUDGE_TOKENS, exhaust, judge_cases, pending_cases, progress, write_beside, write_notes
from evaluation.store import describe_machine

_ENGINE = {"seed": 0, "enable_prefix_caching": True}  # as vLLM's defaults are now: named, so that the manifest has them


class Pipeline:
    """Notes and verdicts of several runs on the same rows. Its engines end with `stack`, whatever happens.

    `began` is when the call did, by time.monotonic().
    """

    def __init__(
        self,
        args: argparse.Namespace,
        runs: Sequence[Run],
        rows: Sequence,
        plan: placement.Plan,
        judge_model: models.Model | None,
        stack: ExitStack,
        began: float,
    ):
        self._began = began
        self.args, self.runs, self.rows, self.plan, self.stack = args, runs, rows, plan, stack
        self.judging = args.stage in JUDGING
        # The judge starts beside the generator, and judges notes as they come.
        self.together = self.judging and (plan.together or bool(args.api_base or args.judge_api_base))
        self._judge_model, self._judge = judge_model, None
        self._notes: dict[int, Iterator[dict]] = {}
        self._adding: set[Path] = set()
        self._machine = describe_machine()

    def run(self) -> None:
        """Bring every run as far as the stages of this call go. Raises UserError."""
        for k, run in enumerate(self.runs):
            describe(self.args, run, self._machine)
            if self.together:
                self._judge_notes(k, self._get_notes(k))
            else:
                exhaust(self._get_notes(k))
        if self.judging and not self.together:
            for k, run in enumerate(self.runs):
                self._judge_notes(k, run.folder.predictions)

    def _get_judge(self) -> LanguageModel:
        if self._judge is None:
            log = self.runs[0].folder.path / "judge.log"
            self._judge = self.stack.enter_context(start_judge(self.args, self._judge_model, log, self.plan.judge))
        return self._judge

    def _stamped(self, run: Run, records: Iterable[dict | None]) -> Iterator[dict | None]:
        """`records`; from the first on the manifest names this call, and gets its time when it ends.

        None stands where none has come for a moment.
        """
        for record in records:
            if record and run.folder.path not in self._adding:
                self._adding.add(run.folder.path)
                stamp(self.args, run, self._machine)
                self.stack.callback(lambda: add_seconds(run, "total", time.monotonic() - self._began))
            yield record

    def _get_notes(self, k: int) -> Iterator[dict]:
        """Run k's records of notes, those on disk first; the generator for the others is starting."""
        if k not in self._notes:
            self._notes[k] = self._start_notes(k)
        return self._notes[k]

    def _start_notes(self, k: int) -> Iterator[dict]:
        run, predictions = self.runs[k], self.runs[k].folder.predictions
        written = [record["index"] for record in predictions]
        on_disk = itertools.islice(predictions, len(written))  # the file grows meanwhile
        done = set(written)
        if self.args.stage not in WRITING or len(done) == len(self.rows):
            return on_disk
        if run.adapter:
            shutil.rmtree(run.merged, ignore_errors=True)  # a killed run left it, perhaps of another adapter
            run.merged.mkdir()
            self.stack.callback(shutil.rmtree, run.merged, ignore_errors=True)
        generator = self.stack.enter_context(start_generator(self.args, run, self.plan.generator))
        self.stack.callback(note_effort, run, "generate", generator)  # whatever ends the call
        notes = progress(write_notes(generator, self.rows, done, predictions), "notes", len(self.rows), len(done))
        if self.together:
            self._get_judge()
            thread, notes = write_beside(notes, predictions, len(written))
            self.stack.callback(thread.join, 10)
            self.stack.callback(generator.close)  # comes first, and ends what the thread waits for
        return itertools.chain(on_disk, self._write(k, generator, notes))

    def _write(self, k: int, generator: LanguageModel, notes: Iterator[dict]) -> Iterator[dict]:
        run = self.runs[k]
        yield from self._stamped(run, notes)
        generator.close()
        shutil.rmtree(run.merged, ignore_errors=True)  # several adapters' copies would add up
        note_effort(run, "generate", generator)
        if k + 1 < len(self.runs):  # the next generator starts while the judge still reads these notes
            self._get_notes(k + 1)

    def _judge_notes(self, k: int, notes: Iterable[dict]) -> None:
        """Judge what is not judged yet. The judge starts when there is something for it."""
        args, run = self.args, self.runs[k]
        judgements = run.folder.judgements
        if k:
            take_known_answers(run, self.runs[0])
        cases = pending_cases(notes, self.rows, judgements, args.judge_controls, args.attacks)
        first = next(filter(None, cases), None)
        if first:
            model = self._get_judge()
            total = len(prompts.SECTIONS) * (len(self.rows) + 2 * args.judge_controls + args.attacks)
            verdicts = judge_cases(model, itertools.chain([first], cases), judgements, judge_sampling(args))
            try:
                exhaust(self._stamped(run, progress(verdicts, "verdicts", total)))
            finally:
                note_effort(run, "judge", model)


def start_generator(args: argparse.Namespace, run: Run, place: placement.Placement | None) -> LanguageModel:
    """The model that writes notes; it is starting when this returns."""
    sampling = {"temperature": 0, "max_tokens": args.max_new_tokens, **args.sampling_args}
    if args.api_base:
        return Server("generator", args.api_base, run.name, sampling, concurrency=args.api_concurrency)
    length = run.manifest["identity"]["generate"]["max_model_len"]  # its own: `place` is for all models of the call
    vllm_args, merge_into = {**_ENGINE, **place.vllm_args, "max_model_len": length, **args.engine_args}, None
    if run.adapter and vllm_args.get("enable_lora"):
        vllm_args = {"max_loras": 1, "max_lora_rank": models.vllm_rank(run.adapter.rank)} | vllm_args
    elif run.adapter:  # applied at run time, each token takes 1.5 times as long on an H100, and 5 times on a CPU
        tell(f"adding {run.lora_path} to a copy of the weights")
        merge_into = run.merged / "model"
    lora_path = run.adapter and run.adapter.path
    spec = EngineSpec(run.model.path, vllm_args, sampling, lora_path=lora_path, merge_into=merge_into)
    return Engine("generator", spec, run.folder.path / "generate.log", place.devices)


def judge_sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": JUDGE_TOKENS, **args.judge_sampling_args}


def start_judge(
    args: argparse.Namespace, model: models.Model | None, log: Path, place: placement.Placement | None
) -> LanguageModel:
    """The model that judges; it is starting when this returns."""
    sampling = judge_sampling(args)
    if args.judge_api_base:
        key = "JUDGE_API_KEY" if "JUDGE_API_KEY" in os.environ else "OPENAI_API_KEY"
        served = (args.judge_api_base, args.judge_model, sampling, judge.VERDICT_SCHEMA)
        return Server("judge", *served, concurrency=args.api_concurrency, key_variable=key)
    vllm_args = {**_ENGINE, **place.vllm_args, **args.judge_engine_args}
    spec = EngineSpec(model.path, vllm_args, sampling, judge.VERDICT_SCHEMA)
    return Engine("judge", spec, log, place.devices)


def take_known_answers(run: Run, other: Run) -> None:
    """Controls and attacks depend on data, judge and prompts alone: what one run of a call has, the next one takes."""
    done = {judge.record_key(record) for record in run.folder.judgements}
    for record in other.folder.judgements:
        if (record["control"] or record["attack"]) and judge.record_key(record) not in done:
            run.folder.judgements.append(record)


def note_effort(run: Run, stage: str, model: LanguageModel) -> None:
    """Add to the manifest what `stage` has taken of `model` since this was last called."""
    effort = model.effort()
    if not any(effort.values()):
        return
    tokens = run.manifest["tokens"].setdefault(stage, {})
    for kind in model.tokens:
        tokens[kind] = tokens.get(kind, 0) + effort[kind]
    add_seconds(run, f"{stage}_init", effort["init"])
    add_seconds(run, stage, effort["busy"])
    run.manifest["engines"][stage] = model.settings
    run.folder.write_manifest(run.manifest)
