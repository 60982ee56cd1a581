"""Measure how good a model's SOAP notes are: it writes notes, and a judge model passes or fails each section.

In: a model (hub name, folder, or folder of global_step_N checkpoints), optionally LoRA adapters, and the dataset that
preprocess_data.py wrote. Out: a table, and a run folder with predictions.jsonl, judgements.jsonl, results.json,
report.html and manifest.json. After an interruption the same command goes on where it was.

    python eval.py Qwen/Qwen3-1.7B
    python eval.py Qwen/Qwen3-1.7B --lora_path ./ckpt/Qwen3-1.7B-LoRA
    python eval.py --compare results/Qwen3-1.7B results/Qwen3-1.7B-Qwen3-1.7B-LoRA
"""

import argparse
import functools
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import prompts
from evaluation import inputs, judge, models, placement
from evaluation.engine import Engine, EngineSpec, LanguageModel
from evaluation.errors import UserError
from evaluation.runs import JUDGING, SCORING, WRITING, Run, describe, identify, open_run, run_path, targets, tell
from evaluation.server import Server, without_credentials
from evaluation.stages import JUDGE_TOKENS, exhaust, judge_cases, pending_cases, progress, write_notes
from evaluation.store import describe_machine

CONTROLS_HELP = (
    "judge inputs with known answers: N good and N bad ones a section; fewer leave wide intervals "
    "(default: %(default)s; 0: none)"
)
ATTACKS_HELP = "notes that try to talk the judge into a pass: N a section (default: %(default)s)"
LORA_HELP = (
    "LoRA adapter of the (first) model; given again, another run. It is added to a copy of the weights; with "
    "--engine_args '{\"enable_lora\": true}' vLLM applies it at run time"
)
LENGTH_HELP = (
    "tokens of a prompt and its answer; longer prompts are left out (default: the model's own limit, at most 8192)"
)
MEMORY_HELP = "share of each GPU's memory for both models together (default: %(default)s)"


def start_generator(args: argparse.Namespace, run: Run, place: placement.Placement | None) -> LanguageModel:
    """The model that writes notes; it is starting when this returns."""
    sampling = {"temperature": 0, "max_tokens": args.max_new_tokens, **args.sampling_args}
    if args.api_base:
        return Server("generator", args.api_base, run.name, sampling, concurrency=args.api_concurrency)
    vllm_args, merge_into = {**place.vllm_args, **args.engine_args}, None
    if run.adapter and vllm_args.get("enable_lora"):
        vllm_args = {"max_loras": 1, "max_lora_rank": models.vllm_rank(run.adapter.rank)} | vllm_args
    elif run.adapter:  # applied at run time, each token takes 1.5 times as long on an H100, and 5 times on a CPU
        tell(f"adding {run.lora_path} to a copy of the weights")
        merge_into = run.merged / "model"
    lora_path = run.adapter and run.adapter.path
    spec = EngineSpec(run.model.path, vllm_args, sampling, lora_path=lora_path, merge_into=merge_into)
    return Engine("generator", spec, run.folder.path / "generate.log", place.devices)


def start_judge(
    args: argparse.Namespace, model: models.Model | None, log: Path, place: placement.Placement | None
) -> LanguageModel:
    """The model that judges; it is starting when this returns."""
    sampling = {"temperature": 0, "max_tokens": JUDGE_TOKENS, **args.judge_sampling_args}
    if args.judge_api_base:
        key = "JUDGE_API_KEY" if "JUDGE_API_KEY" in os.environ else "OPENAI_API_KEY"
        served = (args.judge_api_base, args.judge_model, sampling, judge.VERDICT_SCHEMA)
        return Server("judge", *served, concurrency=args.api_concurrency, key_variable=key)
    spec = EngineSpec(model.path, {**place.vllm_args, **args.judge_engine_args}, sampling, judge.VERDICT_SCHEMA)
    return Engine("judge", spec, log, place.devices)


def write_stage(
    args: argparse.Namespace,
    run: Run,
    rows: Sequence,
    place: placement.Placement | None,
    stack: ExitStack,
    when_written: Callable[[], object],
) -> tuple[Iterator[dict], bool]:
    """The records of all notes, those on disk first, and whether a generator was started for the others.

    `when_written` is called when that generator is gone.
    """
    predictions = run.folder.predictions
    written = [record["index"] for record in predictions]
    done = set(written)
    if args.stage not in WRITING or len(done) == len(rows):
        return iter(predictions), False
    if run.adapter:
        shutil.rmtree(run.merged, ignore_errors=True)  # a killed run left it, perhaps of another adapter
        run.merged.mkdir()
        stack.callback(shutil.rmtree, run.merged, ignore_errors=True)
    generator = stack.enter_context(start_generator(args, run, place))

    def records() -> Iterator[dict]:
        yield from itertools.islice(predictions, len(written))  # the file grows meanwhile
        yield from progress(write_notes(generator, rows, done, predictions), "notes", len(rows), len(done))
        generator.close()
        note_times(run, "generate", generator)
        when_written()

    return records(), True


def judge_stage(
    args: argparse.Namespace, run: Run, rows: Sequence, notes: Iterable[dict], get_judge: Callable[[], LanguageModel]
) -> None:
    """Judge what is not judged yet. The judge starts when there is something for it."""
    judgements = run.folder.judgements
    cases = pending_cases(notes, rows, judgements, args.judge_controls, args.attacks)
    first = next(cases, None)
    if first:
        model = get_judge()
        total = len(prompts.SECTIONS) * (len(rows) + 2 * args.judge_controls + args.attacks)
        verdicts = judge_cases(model, itertools.chain([first], cases), judgements)
        exhaust(progress(verdicts, "verdicts", total))
        note_times(run, "judge", model)


def take_known_answers(run: Run, other: Run) -> None:
    """Controls and attacks depend on data, judge and prompts alone: what one run of a call has, the next one takes."""
    done = {judge.record_key(record) for record in run.folder.judgements}
    for record in other.folder.judgements:
        if (record["control"] or record["attack"]) and judge.record_key(record) not in done:
            run.folder.judgements.append(record)


def note_times(run: Run, stage: str, model: LanguageModel) -> None:
    run.manifest["timings_s"] |= {f"{stage}_init": model.init_seconds, stage: model.busy_seconds}
    run.manifest["tokens"][stage] = model.tokens
    run.manifest["engines"][stage] = model.settings


def score(args: argparse.Namespace, run: Run, rows: Sequence, labels: list[dict] | None) -> None:
    """Records -> results.json, report.html and the table. Raises UserError when records are missing or contradict."""
    from evaluation import report, scoring

    predictions, judgements = run.folder.predictions, run.folder.judgements  # each loop reads them from the disk anew
    notes = sum(1 for _ in predictions)
    plain = sum(not record["control"] and not record["attack"] for record in judgements)
    if notes < len(rows) or plain < len(rows) * len(prompts.SECTIONS):
        raise UserError(
            f"{run.folder.path} has {notes} notes and {plain} verdicts on {len(rows)} dialogues; "
            "run the same command with --stage all first"
        )
    try:
        scores = scoring.score_run(predictions, judgements, rows, labels)
    except ValueError as error:
        raise UserError(f"{args.human_labels or run.folder.path}: {error}; correct it, or start anew") from None
    results = {
        **{key: run.manifest[key] for key in ("model", "lora_path", "judge_model")},
        "dataset": args.dataset_path,
        **scores,
        "date": run.manifest["date"],
        **run.manifest["identity"]["data"],
        "versions": run.manifest["versions"],
        "timings_s": dict.fromkeys(("generate_init", "generate", "judge_init", "judge"), 0.0)
        | run.manifest["timings_s"],
    }
    report.write_results_json(run.folder.path / "results.json", results)
    report.write_report(run.folder.path / "report.html", results, report.view_rows(predictions, judgements, rows))
    print(f"{report.console_table(results)}\n\n{run.folder.path / 'report.html'}", flush=True)


def compare(folders: Iterable[str | Path], output_dir: str | None) -> None:
    """The table of several finished runs; comparison.html into `output_dir`. Raises UserError."""
    from evaluation import report, scoring

    runs = [inputs.load_run(folder) for folder in folders]
    try:
        comparison = scoring.compare_runs(runs)
    except ValueError as error:
        raise UserError(f"{error}; compare runs on the same data, prompts and judge") from None
    print(report.comparison_table(comparison, runs))
    if output_dir:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        report.write_comparison(Path(output_dir) / "comparison.html", comparison, runs)


def evaluate(args: argparse.Namespace) -> None:
    """Every model or adapter through the stages, with one start of the judge. Raises UserError."""
    began = time.monotonic()
    rows, dataset_hash = inputs.load_rows(args.dataset_path, args.split, args.limit)
    labels = inputs.load_labels(args.human_labels) if args.human_labels else None
    judge_model = None
    if args.stage in JUDGING and not args.judge_api_base:
        made_up = args.judge_engine_args.get("load_format") == "dummy"
        judge_model = models.resolve_model(args.judge_model, not made_up, tell)
    identity = identify(args, dataset_hash, len(rows), judge_model)
    with ExitStack() as stack:
        runs = []
        for name, lora_path in targets(args):
            runs.append(open_run(args, name, lora_path, identity))
            stack.enter_context(runs[-1].folder)
        plan = make_plan(args, [run.model for run in runs if run.model], judge_model)
        together = plan.together or bool(args.api_base or args.judge_api_base)

        @functools.cache
        def get_judge() -> LanguageModel:
            return stack.enter_context(start_judge(args, judge_model, runs[0].folder.path / "judge.log", plan.judge))

        @functools.cache
        def write(k: int) -> tuple[Iterator[dict], bool]:
            """Run k's notes. Its generator starts at the latest now, or while the judge still reads those before."""

            def start_next() -> None:
                if k + 1 < len(runs):
                    write(k + 1)

            return write_stage(args, runs[k], rows, plan.generator, stack, start_next)

        def judge_run(k: int, notes: Iterable[dict]) -> None:
            if k:
                take_known_answers(runs[k], runs[0])
            judge_stage(args, runs[k], rows, notes, get_judge)

        machine = describe_machine()
        for k, run in enumerate(runs):
            describe(args, run, machine)
            notes, started = write(k)
            if together and args.stage in JUDGING:
                if started:
                    get_judge()  # it starts beside the generator, and judges notes as they come
                judge_run(k, notes)
            else:
                exhaust(notes)
        if not together and args.stage in JUDGING:
            for k, run in enumerate(runs):
                judge_run(k, run.folder.predictions)
        for run in runs:
            if args.stage != "report":
                run.manifest["timings_s"]["total"] = round(time.monotonic() - began, 2)
            run.folder.write_manifest(run.manifest)
    if args.stage in SCORING:
        for run in runs:
            score(args, run, rows, labels)
        if len(runs) > 1:
            compare([run.folder.path for run in runs], args.output_dir or "results")


def make_plan(
    args: argparse.Namespace, generators: list[models.Model], judge_model: models.Model | None
) -> placement.Plan:
    """Where the engines of this call run, told to the user. Raises UserError."""
    if not generators and not judge_model:
        return placement.Plan(None, None, False, "")
    needs = []
    for group in (generators, [judge_model] if judge_model else []):
        model = max(group, key=lambda model: model.weight_bytes, default=None)
        length = min((models.context_length(args.max_model_len, model) for model in group), default=0)
        needs.append(model and placement.need(model.name, model.config, model.weight_bytes, length))
    plan = placement.place(placement.find_gpus(), *needs, args.gpu_memory_utilization, placement.free_ram())
    tell(plan.words)
    return plan


def number(kind: Callable[[str], Any], low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """A type for argparse: a number of this kind within low..high."""

    def read(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within {low}..{high}")
        return value

    read.__name__ = kind.__name__
    return read


def json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('no JSON object, such as {"seed": 1}')
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", help="hub names, model folders, or folders of global_step_N checkpoints")
    add = parser.add_argument
    add("--lora_path", action="append", default=[], metavar="DIR", help=LORA_HELP)
    add("--judge_model", default="Qwen/Qwen3-8B", metavar="MODEL", help="(default: %(default)s)")
    add("--compare", nargs="+", metavar="RUN", help="compare finished run folders; needs no model")

    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset_path", default="./soap_dataset", metavar="DIR", help="from preprocess_data.py (default: %(default)s)"
    )
    add("--split", default="test", help="(default: %(default)s)")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N dialogues (default: all)")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", metavar="DIR", help="run folder (default: ./results/<model>[-<adapter>])")
    add(
        "--overwrite", action="store_true", help="replace the run in that folder; with --stage judge, its verdicts only"
    )
    add("--stage", choices=("all", "generate", "judge", "report"), default="all", help="(default: %(default)s)")

    add = parser.add_argument_group("trust in the judge").add_argument
    add("--judge_controls", type=number(int, 0), default=24, metavar="N", help=CONTROLS_HELP)
    add("--attacks", type=number(int, 0), default=0, metavar="N", help=ATTACKS_HELP)
    add(
        "--human_labels",
        metavar="FILE",
        help='people\'s verdicts, JSONL: {"index": 0, "section": "S", "verdict": "pass"}',
    )

    add = parser.add_argument_group("engines").add_argument
    add(
        "--max_new_tokens",
        type=number(int, 1),
        default=1024,
        metavar="N",
        help="length of a note (default: %(default)s)",
    )
    add("--max_model_len", type=number(int, 16), metavar="N", help=LENGTH_HELP)
    add("--gpu_memory_utilization", type=number(float, 0.01, 1), default=0.9, metavar="SHARE", help=MEMORY_HELP)
    add("--engine_args", type=json_object, default={}, metavar="JSON", help="arguments of vLLM's LLM for the generator")
    add("--judge_engine_args", type=json_object, default={}, metavar="JSON", help="the same for the judge")
    add("--sampling_args", type=json_object, default={}, metavar="JSON", help="vLLM's SamplingParams for the generator")
    add("--judge_sampling_args", type=json_object, default={}, metavar="JSON", help="the same for the judge")

    add = parser.add_argument_group("servers, in place of engines").add_argument
    add("--api_base", metavar="URL", help="OpenAI-compatible server that serves the model (key: OPENAI_API_KEY)")
    add("--judge_api_base", metavar="URL", help="the same for the judge (key: JUDGE_API_KEY, else OPENAI_API_KEY)")
    add(
        "--api_concurrency",
        type=number(int, 1),
        default=64,
        metavar="N",
        help="requests at a time (default: %(default)s)",
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that do not go together."""
    if args.compare:
        if args.model or len(args.compare) < 2:
            raise UserError("--compare takes two or more run folders and no model")
        return
    if not args.model:
        raise UserError("no model given; `python eval.py --help` shows how")
    folders = [run_path(args, *target) for target in targets(args)]
    if len(set(folders)) < len(folders):
        raise UserError(f"two runs would share the folder {folders[0]}; evaluate them one by one with --output_dir")
    if args.lora_path and args.api_base:
        raise UserError(
            "--lora_path does not go with --api_base: give the name under which the adapter is served as the model"
        )
    for api_base in filter(None, (args.api_base, args.judge_api_base)):
        without_credentials(api_base)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    os.umask(0o077)  # dialogues and notes are for the user's eyes alone
    try:
        check(args)
        if args.compare:
            compare(args.compare, args.output_dir)
        else:
            evaluate(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, no permission
        print(f"error: {error.filename or 'disk'}: {error.strerror}; mend it and run the same command", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
