"""Measure how good a model's SOAP notes are: it writes notes, and a judge model passes or fails each section.

In: a model (hub name, folder, or folder of global_step_N checkpoints), optionally LoRA adapters, and the dataset that
preprocess_data.py wrote. Out: a table, and a run folder with predictions.jsonl, judgements.jsonl, results.json,
report.html and manifest.json. After an interruption the same command goes on where it was.

    python eval.py Qwen/Qwen3-1.7B
    python eval.py Qwen/Qwen3-1.7B --lora_path ./ckpt/Qwen3-1.7B-LoRA
    python eval.py --compare results/Qwen3-1.7B results/Qwen3-1.7B-Qwen3-1.7B-LoRA
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import prompts
from evaluation import inputs, models, placement
from evaluation.errors import UserError
from evaluation.pipeline import Pipeline
from evaluation.runs import SCORING, Run, judge_hash, open_runs, resolve, run_path, targets, tell
from evaluation.server import without_credentials

CONTROLS_HELP = (
    "judge inputs with known answers: N good and N bad ones a section; fewer leave wide intervals, and a finished run "
    "takes more (default: %(default)s; 0: none)"
)
ATTACKS_HELP = (
    "notes that try to talk the judge into a pass: N a section; a finished run takes more (default: %(default)s)"
)
JUDGE_HELP = (
    "hub name or folder of the model that passes or fails each section; with --judge_api_base its name there "
    "(default: %(default)s)"
)
STAGE_HELP = (
    "generate: only write notes; judge: judge the notes that are there, and report; report: scores, table and page "
    "from the records, no model; all: what of these is still to do (default: %(default)s)"
)
LORA_HELP = (
    "LoRA adapter of the (first) model; given again, another run. It is added to a copy of the weights; with "
    "--engine_args '{\"enable_lora\": true}' vLLM applies it at run time"
)
OUTPUT_HELP = (
    "run folder (default: ./results/<model>[-<adapter>]); of several runs the folder above theirs; with --compare the "
    "folder for comparison.html (default: the console only)"
)
LENGTH_HELP = (
    "tokens of a prompt and its answer; a dialogue that is longer counts as a note that failed (default: the model's "
    "own limit, at most 8192)"
)
MEMORY_HELP = (
    "share of each GPU's memory to plan for both models together; at the peak they can take 2%% of it more "
    "(default: %(default)s)"
)


def score(args: argparse.Namespace, run: Run, rows: Sequence, labels: list[dict] | None) -> None:
    """Records -> results.json, report.html and the table. Raises UserError when records are missing or contradict."""
    from evaluation.report import html, text
    from evaluation.report.results import write_results_json
    from evaluation.scoring.scores import score_run

    predictions, judgements = run.folder.predictions, run.folder.judgements  # each loop reads them from the disk anew
    plain = sum(not record["control"] and not record["attack"] for record in judgements)
    if plain < len(rows) * len(prompts.SECTIONS):
        raise UserError(
            f"{run.folder.path} has {plain} verdicts on {len(rows)} dialogues; "
            "run the same command with --stage all first"
        )
    try:
        scores = score_run(predictions, judgements, rows, labels)
    except ValueError as error:
        raise UserError(f"{args.human_labels or run.folder.path}: {error}; correct it, or start anew") from None
    results = {
        **{key: run.manifest[key] for key in ("model", "lora_path", "judge_model")},
        "dataset": args.dataset_path,
        **scores,
        "date": run.manifest["date"],
        **run.manifest["identity"]["data"],
        "judge_hash": judge_hash(run),
        "versions": run.manifest["versions"],
        "timings_s": dict.fromkeys(("generate_init", "generate", "judge_init", "judge"), 0.0)
        | run.manifest["timings_s"],
    }
    write_results_json(run.folder.path / "results.json", results)
    html.write_report(run.folder.path / "report.html", results, html.select_dialogues(predictions, judgements, rows))
    print(f"{text.console_table(results)}\n\n{run.folder.path / 'report.html'}", flush=True)


def compare(folders: Iterable[str | Path], output_dir: str | None) -> None:
    """The table of several finished runs; comparison.html into `output_dir`. Raises UserError."""
    from evaluation.report import html, text
    from evaluation.scoring.comparison import compare_runs

    runs = [inputs.load_run(folder) for folder in folders]
    try:
        comparison = compare_runs(runs)
    except ValueError as error:
        raise UserError(f"{error}; compare runs on the same data, prompts and judge") from None
    print(text.comparison_table(comparison, runs))
    if output_dir:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        html.write_comparison(Path(output_dir) / "comparison.html", comparison, runs)


def evaluate(args: argparse.Namespace) -> None:
    """Every model or adapter through the stages, then the scores. Raises UserError."""
    began = time.monotonic()
    rows, dataset_hash = inputs.load_rows(args.dataset_path, args.split, args.limit)
    labels = inputs.load_labels(args.human_labels) if args.human_labels else None
    found, judge_model = resolve(args)
    plan = make_plan(args, [model for model, _ in found if model], judge_model)
    data = {"split": args.split, "n": len(rows), "dataset_hash": dataset_hash, "prompts_hash": prompts.prompts_hash()}
    with ExitStack() as stack:
        runs = open_runs(args, found, judge_model, data, stack)
        Pipeline(args, runs, rows, plan, judge_model, stack, began).run()
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
        length = max((models.context_length(args.max_model_len, model) for model in group), default=0)
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
    add("--judge_model", default="Qwen/Qwen3-8B", metavar="MODEL", help=JUDGE_HELP)
    add("--compare", nargs="+", metavar="RUN", help="compare finished run folders; needs no model")

    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset_path", default="./soap_dataset", metavar="DIR", help="from preprocess_data.py (default: %(default)s)"
    )
    add("--split", default="test", help="part of the dataset to evaluate on (default: %(default)s)")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N dialogues (default: all)")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", metavar="DIR", help=OUTPUT_HELP)
    add(
        "--overwrite", action="store_true", help="replace the run in that folder; with --stage judge, its verdicts only"
    )
    add("--stage", choices=("all", "generate", "judge", "report"), default="all", help=STAGE_HELP)

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
    if args.human_labels and len(folders) > 1:
        raise UserError("--human_labels are verdicts on one run's notes; evaluate each model by itself")
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
