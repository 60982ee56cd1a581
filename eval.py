"""Measure how good a model's SOAP notes are: the model writes notes, and a judge passes or fails each section.

Input: a model (hub name, folder, or folder of global_step_N checkpoints), optionally LoRA adapters, and the dataset
that preprocess_data.py wrote. Output: a table, and a run folder with predictions.jsonl, judgements.jsonl,
results.json, report.html and manifest.json. After an interruption, run the same command to resume.

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
from common.console import print_line
from common.dataset import Row, content_hash, load_kept_column, load_split
from common.errors import UserError
from evaluation import inputs
from evaluation.engines import models, placement
from evaluation.options import Options
from evaluation.pipeline import Pipeline
from evaluation.run.runs import Run, open_runs, resolve

CONTROLS_HELP = (
    "for each section, judge N good and N bad texts whose right verdict is known; fewer widen the intervals; a higher "
    "N adds to a finished run (default: %(default)s; 0: none)"
)
ATTACKS_HELP = (
    "for each section, judge N failing texts that argue for a pass, and N without the argument; a higher N adds to a "
    "finished run (default: %(default)s)"
)
STATEMENTS_HELP = (
    "ask only for a verdict per section, not about single statements; needed for servers that give no log-probabilities"
)
LABELS_HELP = (
    "people's labels on this run's notes: a filled-in review sheet (.csv), or JSONL such as "
    '{"index": 0, "section": "S", "verdict": "pass"}, optionally with "rater" and "note_hash". Verdicts give an '
    "estimate of the pass rates; answers on statements show how many errors the judge finds"
)
SHEET_HELP = (
    "write a CSV sample of this run for people to fill in, without the judge's answers; for a finished run, add "
    "--stage report"
)
REVIEW_BY_HELP = (
    "sections: to pass or fail, balanced over the judge's verdicts; statements: the judge's questions on all "
    "statements of a few notes, to answer with yes or no (default: sections)"
)
SECTIONS_TO_REVIEW = 40
REVIEW_SIZE_HELP = f"sections on the sheet; by statements, four for each note (default: {SECTIONS_TO_REVIEW})"
JUDGE_HELP = (
    "hub name or folder of the model that passes or fails each section; with --judge_api_base, its name on that server "
    "(default: %(default)s)"
)
STAGE_HELP = (
    "generate: only write notes; judge: judge the notes on disk, then report; report: compute scores, table and page "
    "from the records, without a model; all: do whatever is not done yet (default: %(default)s)"
)
BY_HELP = (
    "also report the figures of each group of dialogues with the same value in this column, which preprocess_data.py "
    "--keep_column kept; for a finished run, add --stage report"
)
LORA_HELP = (
    "LoRA adapter of the (first) model; repeat the flag for several runs. It is merged into a copy of the weights, or "
    "applied by vLLM at run time with --engine_args '{\"enable_lora\": true}'"
)
OUTPUT_HELP = (
    "run folder (default: ./results/<model>[-<adapter>]); for several runs, the folder above theirs; with --compare, "
    "the folder for comparison.html (default: console only)"
)
SCHEMA_HELP = (
    "make the engine or server write notes in their JSON form; then a note is unreadable only if it is cut off or says "
    "nothing (default: the model must know the form)"
)
LENGTH_HELP = (
    "maximum tokens of a prompt and its answer; a dialogue that does not fit counts as a failed note (default: the "
    "model's limit, at most 8192)"
)
MEMORY_HELP = (
    "share of each GPU's memory for both models together; the peak can exceed it by 2%% of the memory "
    "(default: %(default)s)"
)


def score(
    options: Options,
    run: Run,
    rows: Sequence[Row],
    labels: list[dict] | None,
    by: tuple[str, Sequence[str]] | None = None,
) -> None:
    """Score a run, write results.json and report.html, and print the table.

    by: as for `score_run`.
    Raises UserError if records are missing.
    """
    from evaluation.report import html, text
    from evaluation.report.results import write_results_json
    from evaluation.review_sheet import write_sheet
    from evaluation.scoring.people import LabelError
    from evaluation.scoring.scores import score_run
    from evaluation.statement_sheet import write_statement_sheet

    folder = run.folder
    predictions, judgements = folder.predictions, folder.judgements  # read by each loop
    on_notes = sum(not record["control"] and not record["attack"] for record in judgements)
    if on_notes < len(rows) * len(prompts.SECTIONS):
        raise UserError(
            f"{run.folder.path} has {on_notes} verdicts on {len(rows)} dialogues; "
            "run the same command with --stage all first"
        )
    try:
        scores = score_run(predictions, judgements, rows, labels, folder.statements, by)
    except LabelError as error:
        raise UserError(f"{error}; correct it") from None
    except ValueError as error:
        raise UserError(f"{run.folder.path}: {error}; correct it, or add --overwrite") from None
    results = {"dataset": options.dataset_path, **scores, **run.manifest.for_results()}
    write_results_json(run.folder.path / "results.json", results)
    threshold = scores["statements"]["threshold"] if scores["statements"] else 0.0
    dialogues = html.select_dialogues(predictions, judgements, rows, folder.statements, threshold, by and by[1])
    html.write_report(run.folder.path / "report.html", results, dialogues)
    print(f"{text.console_table(results)}\n\n{run.folder.path / 'report.html'}", flush=True)
    if options.review_sheet:
        path, size = Path(options.review_sheet), options.review_size or SECTIONS_TO_REVIEW
        if options.review_by == "statements":
            notes = -(-size // len(prompts.SECTIONS))
            task = f"{write_statement_sheet(path, predictions, folder.statements, rows, notes)} statements to answer"
        else:
            task = f"{write_sheet(path, predictions, judgements, rows, size)} sections to pass or fail"
        print_line(f"{path}: {task}; once filled in, give it to --human_labels")


def compare(folders: Iterable[str | Path], output_dir: str | None) -> None:
    """Print the table of several finished runs; write comparison.html into `output_dir`. Raises UserError."""
    from evaluation.report import html, text
    from evaluation.scoring.comparison import compare_runs

    runs = inputs.load_runs(folders)
    try:
        comparison = compare_runs(runs)
    except ValueError as error:
        raise UserError(f"{error}; compare runs on the same data, prompts and judge") from None
    print(text.comparison_table(comparison, runs))
    if output_dir:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        html.write_comparison(Path(output_dir) / "comparison.html", comparison, runs)


def evaluate(options: Options) -> None:
    """Run the stages of this call for each model or adapter, then score it. Raises UserError."""
    began = time.monotonic()
    rows = load_split(options.dataset_path, options.split, options.limit)
    by = None
    if options.by:
        by = options.by, load_kept_column(options.dataset_path, options.split, options.by, options.limit)
    labels = None
    if options.human_labels:
        labels, unfilled = inputs.load_labels(options.human_labels)
        if unfilled:
            print_line(f"{options.human_labels}: {unfilled} rows are not filled in; they are left out")
    loaded, judge_model = resolve(options)
    plan = make_plan(options, [model for model, _ in loaded if model], judge_model)
    data = {"n": len(rows), "dataset_hash": content_hash(rows), "prompts_hash": prompts.prompts_hash()}
    with ExitStack() as stack:
        runs = open_runs(options, loaded, judge_model, {"split": options.split, **data}, stack)
        Pipeline(options, runs, rows, plan, judge_model, began).run()
    if options.reports:
        for run in runs:
            score(options, run, rows, labels, by)
        if len(runs) > 1:
            compare([run.folder.path for run in runs], options.output_dir or "results")


def make_plan(options: Options, generators: list[models.Model], judge_model: models.Model | None) -> placement.Plan:
    """Decide on which devices the engines of this call run, and print the plan. Raises UserError."""
    if not generators and not judge_model:
        return placement.Plan(None, None, False, "")
    needs = []
    judges = [judge_model] if judge_model else []
    for group, args in ((generators, options.engine_args), (judges, options.judge_engine_args)):
        model = max(group, key=lambda model: model.weight_bytes, default=None)
        length = max((models.context_length(options.max_model_len, model) for model in group), default=0)
        gpus = placement.gpus_asked_for(args)
        needs.append(model and placement.memory_needs(model.name, model.config, model.weight_bytes, length, gpus))
    plan = placement.plan_engines(placement.find_gpus(), *needs, options.gpu_memory_utilization, placement.free_ram())
    print_line(plan.summary)
    return plan


def number(kind: Callable[[str], Any], low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """Return a type for argparse: a number of this kind within low..high."""

    def read(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within {low}..{high}")
        return value

    read.__name__ = kind.__name__
    return read


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object, as a type for argparse."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('not a JSON object, such as {"seed": 1}')
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
    add("--by", metavar="COLUMN", help=BY_HELP)

    add = parser.add_argument_group("trust in the judge").add_argument
    add("--no_statements", dest="statements", action="store_false", help=STATEMENTS_HELP)
    add("--judge_controls", type=number(int, 0), default=24, metavar="N", help=CONTROLS_HELP)
    add("--attacks", type=number(int, 0), default=0, metavar="N", help=ATTACKS_HELP)
    add("--human_labels", metavar="FILE", help=LABELS_HELP)
    add("--review_sheet", metavar="FILE", help=SHEET_HELP)
    add("--review_by", choices=("sections", "statements"), help=REVIEW_BY_HELP)
    add("--review_size", type=number(int, 1), metavar="N", help=REVIEW_SIZE_HELP)

    add = parser.add_argument_group("engines").add_argument
    add("--note_schema", action="store_true", help=SCHEMA_HELP)
    add(
        "--max_new_tokens",
        type=number(int, 1),
        default=1024,
        metavar="N",
        help="maximum tokens of a note (default: %(default)s)",
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
        help="concurrent requests (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    options = Options(**vars(build_parser().parse_args(argv)))
    os.umask(0o077)  # only the user may read dialogues and notes
    try:
        options.check()
        if options.compare:
            compare(options.compare, options.output_dir)
        else:
            evaluate(options)
    except UserError as error:
        print_line(f"error: {error}")
        return 2
    except OSError as error:  # a full disk, no permission
        print_line(f"error: {error.filename or 'disk'}: {error.strerror}; fix that and run the same command")
        return 2
    except KeyboardInterrupt:
        print_line("stopped; run the same command to resume")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
