"""Measure how good a model's SOAP notes are: it writes notes, and a judge model passes or fails each section.

In: a model (hub name, folder, or folder of global_step_N checkpoints), optionally LoRA adapters, and the dataset that
preprocess_data.py wrote. Out: a table, and a run folder (default ./results/<model>[-<adapter>]) with predictions.jsonl,
judgements.jsonl, results.json, report.html and manifest.json. The same command after an interruption goes on.

    python eval.py Qwen/Qwen3-1.7B
    python eval.py Qwen/Qwen3-1.7B --lora_path ./ckpt/Qwen3-1.7B-LoRA
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prompts
from evaluation import judge, models, placement
from evaluation.engine import Engine, EngineSpec, Request
from evaluation.errors import UserError
from evaluation.store import JsonLines, RunFolder, describe_machine

COLUMNS = ("dialogue", *prompts.SECTIONS)
JUDGE_TOKENS = 192  # a reason of 200 characters and the verdict take about 60
# Tries for a verdict that cannot be read: greedy decoding repeats itself, so a second try gets room, a third chance.
RETRIES = ({"max_tokens": 4 * JUDGE_TOKENS}, {"max_tokens": 4 * JUDGE_TOKENS, "temperature": 0.5, "seed": 0})
SEED = 0  # of controls and attacks


def load_rows(path: str, split: str, limit: int | None) -> tuple[Any, str]:
    """The rows of a split (indexable, columns dialogue, S, O, A, P) and a hash of their text. Raises UserError."""
    if not Path(path).is_dir():
        raise UserError(f"--dataset_path {path}: no such folder; run `python preprocess_data.py` first")
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_from_disk(path)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"--dataset_path {path} cannot be read ({reason}); run `python preprocess_data.py` again"
        ) from None
    if not isinstance(dataset, datasets.DatasetDict) or split not in dataset:
        splits = ", ".join(dataset) if isinstance(dataset, datasets.DatasetDict) else "none"
        raise UserError(f"--split {split} is not in {path} (splits: {splits})")
    rows = dataset[split]
    missing = [name for name in COLUMNS if name not in rows.column_names]
    if missing:
        raise UserError(f"{path}, split {split}: no column {missing[0]}; run `python preprocess_data.py` again")
    rows = rows.select_columns(list(COLUMNS)).select(range(min(len(rows), limit or len(rows))))
    if not len(rows):
        raise UserError(f"{path}, split {split} is empty; choose another --split")
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return rows, digest.hexdigest()[:12]


def prediction_record(index: int, dialogue: str, done: Any) -> dict[str, Any]:
    """The line of predictions.jsonl for one answer of the generator."""
    reason, note = None, dict.fromkeys(prompts.SECTIONS)
    if done.finish_reason == "prompt_too_long":
        reason = "prompt too long"
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


def write_notes(engine: Engine, rows: Any, done: set[int], out: JsonLines) -> Iterator[dict[str, Any]]:
    """Records of the dialogues that are not yet `done`, each on disk before it is yielded."""
    requests = (
        Request(index, prompts.note_messages(row["dialogue"]), index)
        for index, row in enumerate(rows)
        if index not in done
    )
    for answer in engine.complete(requests):
        record = prediction_record(answer.tag, rows[answer.tag]["dialogue"], answer)
        out.append(record)
        yield record


def judge_notes(engine: Engine, cases: Iterable[judge.Case], out: JsonLines) -> Iterator[dict[str, Any]]:
    """Records of verdicts, each on disk before it is yielded. Unreadable ones are tried again, then unscored."""
    requests = (Request((case, 1), case.messages(), case.index) for case in cases)
    for answer in engine.complete(requests):
        case, attempt = answer.tag
        verdict, reason = judge.read_verdict(answer.text, answer.finish_reason)
        if verdict == "unscored" and attempt <= len(RETRIES) and answer.finish_reason != "prompt_too_long":
            engine.submit(Request((case, attempt + 1), case.messages(), case.index, RETRIES[attempt - 1]))
            continue
        record = case.record(verdict, reason, raw=answer.text, attempts=attempt)
        out.append(record)
        yield record


@dataclass
class Run:
    """One model, or model and adapter, to evaluate, with its open run folder."""

    name: str
    lora_path: str | None
    folder: RunFolder
    manifest: dict[str, Any]
    model: models.Model | None
    adapter: models.Adapter | None


def run_path(args: argparse.Namespace, name: str, lora_path: str | None) -> Path:
    """The run folder: --output_dir, or a folder below it (default ./results) named after model and adapter."""
    if args.output_dir and len(args.targets) == 1:
        return Path(args.output_dir)
    label = Path(name).name + (f"-{Path(lora_path).name}" if lora_path else "")
    return Path(args.output_dir or "results") / label


def open_run(args: argparse.Namespace, name: str, lora_path: str | None, data: dict, judge_part: dict | None) -> Run:
    """Check model and adapter, lock the run folder and compare it with what it was made with. Raises UserError."""
    identity, model, adapter = {"data": data}, None, None
    if args.stage in ("all", "generate"):
        model = models.resolve_model(name, args.engine_args.get("load_format") != "dummy", tell)
        adapter = models.resolve_adapter(lora_path, model, tell) if lora_path else None
        identity["generate"] = {"model": model.fingerprint, "adapter": adapter and adapter.fingerprint}
        identity["generate"] |= settings(args, "max_new_tokens", "max_model_len", "engine_args", "sampling_args")
    if judge_part:
        identity["judge"] = judge_part
    folder = RunFolder(run_path(args, name, lora_path))
    manifest = folder.begin(identity, {"all": "generate"}.get(args.stage, args.stage) if args.overwrite else None)
    return Run(name, lora_path, folder, manifest, model, adapter)


def start_generator(args: argparse.Namespace, run: Run, place: placement.Placement, stack: ExitStack) -> Engine:
    """The engine that writes notes; it is starting when this returns, and closed with `stack`."""
    vllm_args, merge_into = {**place.vllm_args, **args.engine_args}, None
    if run.adapter and place.on_gpu:
        vllm_args |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": models.vllm_rank(run.adapter.rank)}
    elif run.adapter:
        tell(
            f"adding {run.lora_path} to a temporary copy of the weights: at run time it is 5 times slower on a CPU"
        )
        merge_into = run.folder.path / ".merged"
        stack.callback(shutil.rmtree, merge_into, ignore_errors=True)
    sampling = {"temperature": 0, "max_tokens": args.max_new_tokens, **args.sampling_args}
    spec = EngineSpec(
        run.model.path, vllm_args, sampling, lora_path=run.adapter and run.adapter.path, merge_into=merge_into
    )
    return stack.enter_context(Engine("generator", spec, run.folder.path / "generate.log", place.devices))


def start_judge(args: argparse.Namespace, model: models.Model, log: Path, place: placement.Placement) -> Engine:
    """The engine that judges; it is starting when this returns."""
    sampling = {"temperature": 0, "max_tokens": JUDGE_TOKENS, **args.judge_sampling_args}
    spec = EngineSpec(model.path, {**place.vllm_args, **args.judge_engine_args}, sampling, judge.VERDICT_SCHEMA)
    return Engine("judge", spec, log, place.devices)


def pending_cases(args: argparse.Namespace, rows: Any, records: Iterable[dict], out: JsonLines) -> Iterator[judge.Case]:
    """What is still to judge: controls and attacks, then each note. What code decides goes to `out` at once."""
    done = {judge.record_key(record) for record in out}
    known = itertools.chain(
        judge.control_cases(rows, args.judge_controls, SEED), judge.attack_cases(rows, SEED, args.attacks)
    )
    yield from (case for case in known if case.key() not in done)
    for record in records:
        cases, decided = judge.plain_cases([record], rows)
        for verdict in decided:
            if judge.record_key(verdict) not in done:
                out.append(verdict)
        yield from (case for case in cases if case.key() not in done)


def evaluate(
    args: argparse.Namespace, run: Run, rows: Any, plan: placement.Plan, get_judge: Callable[[], Engine]
) -> None:
    """Write the notes and verdicts that `run` lacks. Raises UserError when an engine fails."""
    predictions, judgements, timings = run.folder.predictions, run.folder.judgements, run.manifest["timings_s"]
    records: Iterable[dict] = list(predictions)
    done = {record["index"] for record in records}
    with ExitStack() as stack:
        if run.model and len(done) < len(rows):
            generator = start_generator(args, run, plan.generator, stack)
            if plan.together:
                get_judge()
            notes = progress(write_notes(generator, rows, done, predictions), "notes", len(rows), len(done))
            if plan.together:
                records = itertools.chain(records, notes)
            else:
                records = [*records, *notes]
                generator.close()
        if args.stage in ("all", "judge"):
            cases = pending_cases(args, rows, records, judgements)
            first = next(cases, None)
            if first:
                engine = get_judge()
                total = len(prompts.SECTIONS) * (len(rows) + 2 * args.judge_controls + args.attacks)
                for _ in progress(judge_notes(engine, itertools.chain([first], cases), judgements), "verdicts", total):
                    pass
                timings |= {"judge_init": engine.init_seconds, "judge": engine.busy_seconds}
                run.manifest["tokens"]["judge"] = engine.tokens
        if run.model and len(done) < len(rows):
            timings |= {"generate_init": generator.init_seconds, "generate": generator.busy_seconds}
            run.manifest["tokens"]["generate"] = generator.tokens


def score(args: argparse.Namespace, run: Run, rows: Any) -> dict[str, Any]:
    """Records of a finished run -> results.json, report.html and the console. Raises UserError if some are missing."""
    from evaluation import report, scoring

    predictions = sorted(run.folder.predictions, key=lambda record: record["index"])
    judgements = sorted(run.folder.judgements, key=lambda record: str(judge.record_key(record)))
    plain = sum(1 for record in judgements if not record["control"] and not record["attack"])
    if len(predictions) < len(rows) or plain < len(rows) * len(prompts.SECTIONS):
        raise UserError(
            f"{run.folder.path} has {len(predictions)} of {len(rows)} notes and {plain} of "
            f"{len(rows) * len(prompts.SECTIONS)} verdicts; run the same command without --stage"
        )
    results = {
        "model": run.name,
        "lora_path": run.lora_path,
        "judge_model": args.judge_model,
        "dataset": args.dataset_path,
        "split": args.split,
        **scoring.score_run(predictions, judgements, list(rows)),
        "timings_s": run.manifest["timings_s"],
    }
    report.write_results_json(run.folder.path / "results.json", results)
    report.write_report(run.folder.path / "report.html", results, report.view_rows(predictions, judgements, list(rows)))
    print(report.console_table(results))
    return results


def settings(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some of the arguments, by name."""
    return {name: getattr(args, name) for name in names}


def tell(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def progress(items: Iterable, label: str, total: int, done: int = 0) -> Iterator:
    """`items`, with a progress bar that shows the time left; it appears with the first item."""
    from tqdm import tqdm

    items = iter(items)
    first = list(itertools.islice(items, 1))
    interval = 0.5 if sys.stderr.isatty() else 10  # seconds
    with tqdm(desc=label, total=total, initial=done, mininterval=interval, dynamic_ncols=True) as bar:
        for item in itertools.chain(first, items):
            bar.update()
            yield item


def json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", help="hub name, model folder, or folder of global_step_N checkpoints")
    parser.add_argument(
        "--lora_path", nargs="+", default=[], metavar="DIR", help="LoRA adapters; each is a run of its own"
    )
    parser.add_argument("--judge_model", default="Qwen/Qwen3-8B", help="(default: %(default)s)")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_path", default="./soap_dataset", help="from preprocess_data.py (default: %(default)s)")
    data.add_argument("--split", default="test", help="(default: %(default)s)")
    data.add_argument("--limit", type=positive, metavar="N", help="only the first N dialogues (default: all)")
    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", help="run folder (default: ./results/<model>[-<adapter>])")
    run.add_argument(
        "--overwrite", action="store_true", help="replace the run in that folder (with --stage: from there)"
    )
    run.add_argument("--stage", choices=("all", "generate", "judge", "report"), default="all", help="(default: all)")
    run.add_argument(
        "--judge_controls",
        type=natural,
        default=8,
        metavar="N",
        help="judge inputs with a known answer: N good and N bad a section (default: %(default)s, 0: none)",
    )
    run.add_argument(
        "--attacks",
        type=natural,
        default=0,
        metavar="N",
        help="notes that try to talk the judge into a pass, N a section (default: %(default)s)",
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--max_new_tokens", type=positive, default=1024, help="tokens a note may have (default: %(default)s)"
    )
    engine.add_argument(
        "--max_model_len",
        type=positive,
        default=8192,
        help="tokens of prompt and answer; longer prompts are marked and left out (default: %(default)s)",
    )
    engine.add_argument(
        "--gpu_memory_utilization",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="share of each GPU's memory for both models together (default: %(default)s)",
    )
    for flag, what in (
        ("engine_args", "generator's engine"),
        ("judge_engine_args", "judge's engine"),
        ("sampling_args", "generator's sampling"),
        ("judge_sampling_args", "judge's sampling"),
    ):
        engine.add_argument(
            f"--{flag}", type=json_object, default={}, metavar="JSON", help=f"vLLM arguments of the {what}"
        )
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    os.umask(0o077)  # dialogues and notes are for the user's eyes alone
    try:
        return run_all(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def run_all(args: argparse.Namespace) -> int:
    """Evaluate every model or adapter, with one start of the judge."""
    began = time.monotonic()
    if not args.model:
        raise UserError("no model given; `python eval.py --help` shows how")
    if len(args.model) > 1 and args.lora_path:
        raise UserError("--lora_path goes with one model; several models were given")
    args.targets = [(args.model[0], path) for path in args.lora_path] or [(name, None) for name in args.model]
    rows, dataset_hash = load_rows(args.dataset_path, args.split, args.limit)
    data = {"dataset_hash": dataset_hash, "split": args.split, "n": len(rows), "prompts_hash": prompts.prompts_hash()}
    judge_model, judge_part = None, None
    if args.stage in ("all", "judge"):
        judge_model = models.resolve_model(args.judge_model, args.judge_engine_args.get("load_format") != "dummy", tell)
        judge_part = {"judge_model": judge_model.fingerprint}
        judge_part |= settings(args, "judge_controls", "attacks", "judge_engine_args", "judge_sampling_args")
    with ExitStack() as stack:
        runs = []
        for name, lora_path in args.targets:
            runs.append(open_run(args, name, lora_path, data, judge_part))
            stack.enter_context(runs[-1].folder)
        if args.stage != "report":
            gpus, needs = placement.find_gpus(), []
            for model in (
                max((run.model for run in runs if run.model), key=lambda m: m.weight_bytes, default=None),
                judge_model,
            ):
                needs.append(model and placement.need(model.name, model.config, model.weight_bytes, args.max_model_len))
            plan = placement.place(gpus, *needs, args.gpu_memory_utilization, placement.free_ram())
            tell(plan.words)

        @functools.cache
        def get_judge() -> Engine:
            return stack.enter_context(start_judge(args, judge_model, runs[0].folder.path / "judge.log", plan.judge))

        for run in runs:
            if args.stage != "report":
                run.manifest |= describe_machine(gpus) | {"arguments": vars(args) | {"targets": None}}
                evaluate(args, run, rows, plan, get_judge)
                run.manifest["timings_s"]["total"] = round(time.monotonic() - began, 1)
                run.folder.write_manifest(run.manifest)
            if args.stage in ("all", "report", "judge"):
                score(args, run, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
