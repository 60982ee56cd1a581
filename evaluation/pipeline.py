"""Process each dialogue: write, parse and record its note, then judge and record each section and its statements.

Each dialogue has its own coroutine. The loop over runs starts the next generator as soon as the previous run's notes
are written, while the judge may still be working on them.
"""

import asyncio
import contextlib
import gc
import itertools
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import prompts
from common.chat_template import SERVED_NOTICE
from common.console import print_line
from common.dataset import Row
from evaluation.engines.base import LanguageModel, Usage
from evaluation.engines.models import Model, vllm_rank
from evaluation.engines.note_schema import NOTE_SCHEMA
from evaluation.engines.placement import Placement, Plan
from evaluation.engines.server import Server
from evaluation.engines.vllm_engine import VLLM_DEFAULTS, Engine, EngineSpec
from evaluation.judging import asking, judge
from evaluation.judging.asking import judge_case, start_judge
from evaluation.judging.statements import ask_statements, decided_statement
from evaluation.options import Options, without_credentials
from evaluation.reading import read_prediction
from evaluation.run.manifest import describe_machine
from evaluation.run.records import JsonLines, Judgement, Prediction, StatementRecord, record_key
from evaluation.run.runs import Run
from evaluation.run.unanswered import check_notes, check_verdicts
from evaluation.tasks import BoundedTasks

# New objects before Python searches for garbage. By default that takes a third of the time, because each search goes
# through thousands of waiting tasks.
_NEW_OBJECTS = 50_000
_MOST_NOTES_TO_JUDGE = 1000  # written but not yet judged; beyond that, the generator waits for the judge


class Pipeline:
    """Write and judge the notes of several runs on the same rows, and start the judge only once.

    `began` is the time.monotonic() at which the call started.
    """

    def __init__(
        self, options: Options, runs: Sequence[Run], rows: Sequence[Row], plan: Plan, judge_model: Model | None,
        began: float,
    ):  # fmt: skip
        self.options, self.runs, self.rows, self.plan, self.judge_model = options, runs, rows, plan, judge_model
        self._began = began
        self._machine = describe_machine()
        # Whether the judge runs at the same time as the generator and judges each note once it is written.
        self._together = options.judges and (plan.together or bool(options.api_base or options.judge_api_base))
        self._judge: LanguageModel | None = None
        self._writer: LanguageModel | None = None  # the generator, which later runs keep if it can load their weights
        self._specs: dict[Run, EngineSpec] = {}  # of the generators
        self._judge_usage: dict[tuple[Run, str], Usage] = {}  # by run, and "judge" (verdicts) or "statements"
        self._judged: dict[Run, set[tuple]] = {}  # keys of the cases with a verdict
        self._asked: dict[Run, set[tuple]] = {}  # keys of the cases whose statements have answers
        self._changed: set[Run] = set()
        self._judging = BoundedTasks(_MOST_NOTES_TO_JUDGE)
        known = 2 * options.judge_controls + 2 * options.attacks
        self._verdicts_bar = ProgressBar("verdicts", len(prompts.SECTIONS) * (len(rows) * len(runs) + known))

    def run(self) -> None:
        """Run the stages of this call for every run. Raises UserError."""
        before = gc.get_threshold()
        gc.set_threshold(_NEW_OBJECTS, *before[1:])
        try:
            asyncio.run(self._run())
        finally:
            gc.set_threshold(*before)

    async def _run(self) -> None:
        try:
            for run in self.runs:
                shutil.rmtree(run.merged, ignore_errors=True)  # a killed run left it, perhaps with another adapter
            async with self._judging:
                for run in self.runs:
                    self._describe(run)
                    if self._together:
                        await self._judge_existing_notes(run)
                    if self.options.generates:
                        await self._write_missing_notes(run)
                    check_notes(run)
                await self._stop_generator()
                if self.options.judges and not self._together:
                    for run in self.runs:
                        await self._judge_existing_notes(run)
            if self.options.judges:
                self._share_known_answers()
            if self.options.reports:
                for run in self.runs:
                    check_verdicts(run)
        finally:
            await self._finish()

    # --- notes -------------------------------------------------------------------------------------------------------

    async def _write_missing_notes(self, run: Run) -> None:
        missing = self._missing_notes(run)
        if not missing:
            return
        bar = ProgressBar("notes", len(self.rows), len(self.rows) - len(missing))
        async with self._generator(run) as generator, BoundedTasks(generator.model.window) as writing:
            self._merge_ahead(run)
            for index in missing:
                await writing.add(self._write_note, run, generator, index, bar)
        bar.close()

    def _missing_notes(self, run: Run) -> list[int]:
        written = {record["index"] for record in run.folder.predictions}
        return [index for index in range(len(self.rows)) if index not in written]

    def _merge_ahead(self, run: Run) -> None:
        """Let the generator merge the adapter of the next run while it writes the notes of this one."""
        later = self.runs[self.runs.index(run) + 1 :]
        following = next((each for each in later if self._missing_notes(each)), None)
        if following and following.adapter and not self.options.api_base:
            following.merged.mkdir(exist_ok=True)
            self._writer.merge_ahead(self._spec_of(following))

    def _spec_of(self, run: Run) -> EngineSpec:
        if run not in self._specs:
            self._specs[run] = generator_spec(self.options, run, self.plan.generator, self._models())
        return self._specs[run]

    async def _write_note(self, run: Run, generator: Usage, index: int, bar: "ProgressBar") -> None:
        dialogue = self.rows[index]["dialogue"]
        schema = NOTE_SCHEMA if self.options.note_schema else None
        completion = await generator.chat(prompts.note_messages(dialogue), group=index, schema=schema)
        note = read_prediction(index, dialogue, completion)
        self._append(run, run.folder.predictions, note)
        bar.update()
        if self._together:
            await self._judging.add(self._judge_note, run, note)

    def _models(self) -> tuple[Path, ...]:
        """Return the folders of all models that this call loads, the judge's last."""
        loaded = [*(run.model for run in self.runs), self.judge_model]
        return tuple(model.path for model in loaded if model)

    @contextlib.asynccontextmanager
    async def _generator(self, run: Run) -> AsyncIterator[Usage]:
        """Run the generator for the duration of the block, and the judge beside it if both fit."""
        if run.adapter:
            run.merged.mkdir(exist_ok=True)
        try:
            usage = Usage(await self._get_generator(run))
            try:
                if self._together:
                    self._get_judge()
                yield usage
            finally:
                self._note_usage(run, "generate", usage, usage.model.ready - usage.model.started)
        except BaseException:
            await self._stop_generator()  # it may be writing the copy
            raise
        finally:
            shutil.rmtree(run.merged, ignore_errors=True)

    async def _get_generator(self, run: Run) -> LanguageModel:
        """Return the generator with the run's weights: the previous run's if it can load them, or a new one."""
        spec = None if self.options.api_base else self._spec_of(run)
        if not (spec and self._writer and await self._writer.load(spec)):
            await self._stop_generator()
            self._writer = start_generator(self.options, run, self.plan.generator, spec)
        return self._writer

    async def _stop_generator(self) -> None:
        if self._writer:
            await self._writer.stop()
            self._writer = None

    # --- verdicts ----------------------------------------------------------------------------------------------------

    async def _judge_existing_notes(self, run: Run) -> None:
        """Start judging the notes on disk and, once for all runs, the inputs with known answers."""
        self._judged[run] = {record_key(record) for record in run.folder.judgements}
        self._asked[run] = {record_key(record) for record in run.folder.statements}
        if run is self.runs[0]:
            await self._judging.add(self._judge_known_answers, run)
        existing = sum(1 for _ in run.folder.predictions)
        await self._judging.add(self._judge_notes, run, itertools.islice(run.folder.predictions, existing))

    async def _judge_notes(self, run: Run, notes: Iterable[Prediction]) -> None:
        for note in notes:
            await self._judging.add(self._judge_note, run, note)

    async def _judge_note(self, run: Run, note: Prediction) -> None:
        """Judge the four sections of a note; code decides those that do not need the judge.

        All four prompts are sent at once, so that the prefix cache serves the last three.
        """
        cases, decided = judge.plain_cases([note], self.rows)
        for record in decided:
            self._record_decision(run, record)
        await asyncio.gather(*(self._judge_case(run, case) for case in cases))

    def _record_decision(self, run: Run, record: Judgement) -> None:
        """Record a section that a rule decided."""
        key = record_key(record)
        if key not in self._judged[run]:
            self._append(run, run.folder.judgements, record)
            self._verdicts_bar.update()
        if self.options.statements and key not in self._asked[run]:
            reference = self.rows[record["index"]][record["section"]]
            self._append(run, run.folder.statements, decided_statement(record, reference))

    async def _judge_known_answers(self, run: Run) -> None:
        """Judge controls and attacks. They depend on data, judge and prompts alone, so one run does it for all."""
        for case in asking.known_cases(self.rows, self.options.judge_controls, self.options.attacks):
            await self._judging.add(self._judge_case, run, case)

    async def _judge_case(self, run: Run, case: judge.Case) -> None:
        """Ask for the verdict and the statements of `case`, unless they are on the disk."""
        parts = []
        if case.key() not in self._judged[run]:
            parts.append(self._ask_verdict(run, case))
        if self.options.statements and case.key() not in self._asked[run]:
            parts.append(self._ask_statements(run, case))
        await asyncio.gather(*parts)

    async def _ask_verdict(self, run: Run, case: judge.Case) -> None:
        record = await judge_case(self._usage_of_judge(run, "judge"), case, asking.sampling(self.options))
        self._append(run, run.folder.judgements, record)
        self._verdicts_bar.update()

    async def _ask_statements(self, run: Run, case: judge.Case) -> None:
        """Ask for the statements of `case`, until the judge's server has shown that it gives no log-probabilities."""
        usage = self._usage_of_judge(run, "statements")
        if usage.model.gives_log_probabilities:
            record = await ask_statements(usage, case, self.rows[case.index])
            if usage.model.gives_log_probabilities:
                self._append(run, run.folder.statements, record)

    def _usage_of_judge(self, run: Run, stage: str) -> Usage:
        if (run, stage) not in self._judge_usage:
            self._judge_usage[run, stage] = Usage(self._get_judge())
        return self._judge_usage[run, stage]

    def _get_judge(self) -> LanguageModel:
        """Return the judge; the first call starts it."""
        if self._judge is None:
            log = self.runs[0].folder.path / "judge.log"
            self._judge = start_judge(self.options, self.judge_model, log, self.plan.judge)
        return self._judge

    def _share_known_answers(self) -> None:
        """Copy the first run's records of controls and attacks to the other runs."""
        first = self.runs[0].folder
        known = [
            [record for record in records if record["control"] or record["attack"]]
            for records in (first.judgements, first.statements)
        ]
        for run in self.runs[1:]:
            folder = run.folder
            for records, target, recorded in zip(
                known, (folder.judgements, folder.statements), (self._judged[run], self._asked[run]), strict=True
            ):
                for record in records:
                    if record_key(record) not in recorded:
                        self._append(run, target, record)

    # --- manifest ----------------------------------------------------------------------------------------------------

    def _describe(self, run: Run) -> None:
        """Name the models in the manifest; `--stage report` adds nothing."""
        if self.options.generates:
            run.manifest.name_models(model=run.target.model, lora_path=run.target.lora_path)
        if self.options.judges:
            run.manifest.name_models(judge_model=self.options.judge_model)
        if self.options.generates or self.options.judges:
            if run.manifest.is_stamped:
                run.manifest.write()
            else:
                run.manifest.stamp(self._machine, self.options.for_manifest())

    def _append(self, run: Run, records: JsonLines, record: Prediction | Judgement | StatementRecord) -> None:
        """Write a record; the first one of this call also stamps the manifest."""
        records.append(record)
        if run not in self._changed:
            self._changed.add(run)
            run.manifest.stamp(self._machine, self.options.for_manifest())

    def _note_usage(self, run: Run, stage: str, usage: Usage, init_seconds: float) -> None:
        run.manifest.add_seconds(f"{'judge' if stage == 'statements' else stage}_init", init_seconds)
        run.manifest.add_seconds(stage, usage.seconds)
        run.manifest.add_tokens(stage, usage.tokens)
        run.manifest.note_engine(stage, usage.model.settings)
        run.manifest.write()

    async def _finish(self) -> None:
        self._verdicts_bar.close()
        await self._stop_generator()
        for run in self.runs:
            shutil.rmtree(run.merged, ignore_errors=True)
        if self._judge:
            await self._judge.stop()
        for number, ((run, stage), usage) in enumerate(self._judge_usage.items()):
            self._note_usage(run, stage, usage, 0 if number else usage.model.ready - usage.model.started)
        for run in self._changed:
            run.manifest.add_seconds("total", time.monotonic() - self._began)
            run.manifest.write()


class ProgressBar:
    """A tqdm bar that shows the time left, from the first update on."""

    def __init__(self, label: str, total: int, done: int = 0):
        self._label, self._total, self._done, self._bar = label, total, done, None

    def update(self) -> None:
        if self._bar is None:
            from tqdm import tqdm

            interval = 0.5 if sys.stderr.isatty() else 10  # seconds
            self._bar = tqdm(
                desc=self._label, total=self._total, initial=self._done, mininterval=interval, dynamic_ncols=True
            )
        self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.total = self._bar.n  # some rows give no control, so the total may be too high
            self._bar.close()


def generator_spec(options: Options, run: Run, placement: Placement, check_first: tuple[Path, ...] = ()) -> EngineSpec:
    """Return the settings of the engine that writes the run's notes.

    The chat templates of the models in `check_first` are checked before it starts.
    """
    # The run's own length; that of `placement` covers all models of the call.
    length = {"max_model_len": run.manifest.identity["generate"]["max_model_len"]}
    vllm_args = VLLM_DEFAULTS | placement.vllm_args | length | options.engine_args
    merge_into = None
    if run.adapter and vllm_args.get("enable_lora"):
        vllm_args = {"max_loras": 1, "max_lora_rank": vllm_rank(run.adapter.rank)} | vllm_args
    elif run.adapter:  # applied at run time, each token takes 1.5 times as long on an H100, and 5 times on a CPU
        print_line(f"adding {run.target.lora_path} to a copy of the weights")
        merge_into = run.merged / "model"
    lora_path = run.adapter and run.adapter.path
    return EngineSpec(run.model.path, vllm_args, _sampling(options), lora_path, merge_into, check_first)


def start_generator(options: Options, run: Run, placement: Placement | None, spec: EngineSpec | None) -> LanguageModel:
    """Start the model that writes notes; it may not be ready yet when this returns. `spec` is None for a server."""
    if spec:
        return Engine("generator", spec, run.folder.path / "generate.log", placement.devices)
    print_line(f"{without_credentials(options.api_base)} {SERVED_NOTICE}")
    return Server(
        "generator", options.api_base, run.target.model, _sampling(options), concurrency=options.api_concurrency
    )


def _sampling(options: Options) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": options.max_new_tokens, **options.sampling_args}
