"""Compare a judge with physicians: rank correlations of its verdicts and statements with four physicians' ratings.

Input: JSONL in the form of llama-clinic's reader study (Wang et al. 2024, github.com/hanyin88/llama-clinic): dialogue;
part, "sub" (subjective) or "ap" (assessment and plan); note_source, where note_1 is a physician's note, note_2
LLaMA-Clinic's and note_3 Gemini's; note; ratings, a list of {reviewer, accuracy, completeness, readiness} from 1 to 5.
The models' notes are judged with the physician's note as reference. The physician's own note would be judged against
itself, so it is left out. "sub" is judged as S; "ap" is split by its headings and judged as A and P.

Output: judgements.jsonl and statements.jsonl in --output_dir, and agreement.md: Spearman's correlation of each score
with the physicians' mean rating, with 95% intervals over dialogues (bootstrap), beside that of one physician with the
mean of the others. Rerun an interrupted command to resume, or with a larger --limit to add dialogues; a folder with
records of another judge or other ratings is refused. Other flags are those of eval.py for the judge; --overwrite
replaces the records, and --stage report reads them without the judge.

    python benchmarks/judge_agreement.py --ratings ratings.jsonl --judge_model Qwen/Qwen3-8B --output_dir agreement
    python benchmarks/judge_agreement.py --ratings ratings.jsonl --judge_model NAME --judge_api_base http://HOST:8000/v1
"""

import argparse
import asyncio
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval as evaluation_script  # noqa: E402
import prompts  # noqa: E402
from common.console import print_line  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.files import write_atomically  # noqa: E402
from evaluation.engines import models  # noqa: E402
from evaluation.engines.base import Usage  # noqa: E402
from evaluation.judging.asking import judge_case, sampling, start_judge  # noqa: E402
from evaluation.judging.judge import Case  # noqa: E402
from evaluation.options import Options, Target  # noqa: E402
from evaluation.run.folder import RunFolder  # noqa: E402
from evaluation.run.manifest import Manifest, describe_machine  # noqa: E402
from evaluation.run.records import QUESTIONS, record_key  # noqa: E402
from evaluation.run.runs import identify, served_models  # noqa: E402
from evaluation.tasks import BoundedTasks  # noqa: E402

EXPERT = "note_1"
RATINGS = ("accuracy", "completeness", "readiness")
PARTS = {"sub": ("S",), "ap": ("A", "P")}
SCORES = {
    "verdict": "verdicts that are pass",
    "covered": "reference statements covered",
    "supported": "note statements supported",
    "log_odds": "mean log odds of all statements",
    "worst": "log odds of the worst statement",
}
RECORDS = ("judgements.jsonl", "statements.jsonl")
RESAMPLES = 2000

# --- input -----------------------------------------------------------------------------------------------------------


def read_rated(path: Path) -> list[dict]:
    """Return the rated notes. Raises UserError for a line without the keys of the docstring."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; correct the path") from None
    rated = []
    for row, line in enumerate(lines, 1):
        try:
            note = json.loads(line)
            complete = all(isinstance(rating[name], int | float) for rating in note["ratings"] for name in RATINGS)
            known = note["part"] in PARTS and isinstance(note["dialogue"], str) and isinstance(note["note"], str)
        except (ValueError, KeyError, TypeError):
            complete = False
        if not (complete and known and "note_source" in note):
            raise UserError(f"{path}:{row} is not a rated note; see `python {Path(__file__).name} --help`")
        rated.append(note)
    return rated


def split_plan(text: str) -> dict[str, str]:
    """Return the A and P of a text such as "1. Cough / Assessment: ... / Plan: ...", problem by problem.

    A line that begins with Plan or Follow-up opens P; one that begins with Assessment opens A, as does a line directly
    before it, which names the problem. A text without these words is both.
    """
    lines = [line.strip() for line in text.replace("_x000B_", "\n").splitlines() if line.strip()]
    parts, current = {"A": [], "P": []}, "A"
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.match(r"\W*(assessment and plan|a/p)\W*$", line, re.IGNORECASE):
            continue
        if re.match(r"\W*(plan|follow[- ]?up)\b", line, re.IGNORECASE):
            current = "P"
        elif any(re.match(r"\W*assessment\b", each, re.IGNORECASE) for each in (line, following)):
            current = "A"
        parts[current].append(line)
    whole = "\n".join(lines)
    return {section: "\n".join(part) or whole for section, part in parts.items()}


def sections_of(note: dict) -> dict[str, str]:
    """Return the texts of a rated note by section."""
    text = note["note"].replace("_x000B_", "\n").strip()
    return {"S": text} if note["part"] == "sub" else split_plan(text)


def make_cases(rated: Sequence[dict], limit: int | None = None) -> list[tuple[Case, dict[str, str]]]:
    """Return (case, the expert's whole note) for each section of the models' notes. Raises UserError.

    A case's index is the note's position in `rated`, whatever the limit. limit: only the first dialogues.
    """
    dialogues = set(list(dict.fromkeys(note["dialogue"] for note in rated))[:limit])
    experts: dict[str, dict[str, str]] = {}
    for note in rated:
        if note["note_source"] == EXPERT:
            experts.setdefault(note["dialogue"], dict.fromkeys("SOAP", "")).update(sections_of(note))
    cases = []
    for index, note in enumerate(rated):
        if note["note_source"] == EXPERT or note["dialogue"] not in dialogues:
            continue
        expert = experts.get(note["dialogue"], {})
        for section, text in sections_of(note).items():
            if not expert.get(section):
                raise UserError(f"note {index + 1} has no {EXPERT} of its dialogue and part to be compared with")
            cases.append((Case(index, section, note["dialogue"], expert[section], text), expert))
    return cases


# --- judge -----------------------------------------------------------------------------------------------------------


def open_run(ratings: Path, options: Options, model: models.Model | None, folder: RunFolder) -> Manifest:
    """Return the manifest of the folder, after a check that its records belong to this call. Raises UserError.

    model: the judge; None if this call does not load it.
    """
    data = {
        "ratings_hash": hashlib.sha256(ratings.read_bytes()).hexdigest()[:12],
        "prompts_hash": prompts.prompts_hash(),
    }
    identity = identify(options, data, Target("", None), None, None, model, served_models(options))
    if options.judges:
        identity["judge"]["judge_name"] = options.judge_model  # for the heading of a later --stage report
    manifest = folder.begin(identity, options.overwritten_stage)
    if options.judges:
        manifest.name_models(judge_model=options.judge_model)
        manifest.stamp(describe_machine(), options.for_manifest())
    return manifest


async def ask(
    cases: Sequence[tuple[Case, dict]], options: Options, model: models.Model | None, folder: RunFolder
) -> None:
    """Ask the judge for all verdicts and statements that are not on the disk yet. Raises UserError."""
    from evaluation.judging.statements import ask_statements

    files = {"verdicts": folder.judgements, "statements": folder.statements}
    done = {name: {record_key(record) for record in file} for name, file in files.items()}
    missing = [(name, case, note) for case, note in cases for name in files if case.key() not in done[name]]
    if not missing:
        return
    plan = evaluation_script.make_plan(options, [], model)
    judge = start_judge(options, model, folder.path / "judge.log", plan.judge)
    usage = Usage(judge)

    async def answer(name: str, case: Case, note: dict) -> None:
        asked = judge_case(usage, case, sampling(options)) if name == "verdicts" else ask_statements(usage, case, note)
        files[name].append(await asked)

    try:
        async with BoundedTasks(judge.window) as tasks:
            for each in missing:
                await tasks.add(answer, *each)
    finally:
        await judge.stop()


# --- agreement -------------------------------------------------------------------------------------------------------


def note_scores(verdicts: Sequence[dict], statements: Sequence[dict]) -> dict[int, dict[str, float]]:
    """Return each note's scores, by its index, without those that have no answer. Log odds above 0 are a yes."""
    scores: dict[int, dict[str, float]] = {}
    for index in {record["index"] for record in (*verdicts, *statements)}:
        passed = [r["verdict"] == "pass" for r in verdicts if r["index"] == index and r["verdict"] != "unscored"]
        kinds = {
            kind: [
                item["log_odds"]
                for record in statements
                if record["index"] == index
                for item in record[kind]
                if item["log_odds"] is not None
            ]
            for kind in QUESTIONS
        }
        both = kinds["covered"] + kinds["supported"]
        shares = {kind: [odds > 0 for odds in values] for kind, values in kinds.items()}
        lists = {"verdict": passed, **shares, "log_odds": both, "worst": [min(both)] if both else []}
        scores[index] = {name: fmean(values) for name, values in lists.items() if values}
    return scores


def correlation(pairs: Sequence[tuple[str, float, float]]) -> tuple[float, float, float]:
    """Return Spearman's correlation of (dialogue, x, y) and its 95% interval; nan if x or y is constant.

    Whole dialogues are resampled, because notes on one dialogue are alike.
    """
    import warnings

    import numpy as np
    from scipy.stats import bootstrap, spearmanr

    by_dialogue: dict[str, list[tuple[float, float]]] = {}
    for dialogue, x, y in pairs:
        by_dialogue.setdefault(dialogue, []).append((x, y))
    groups = [np.array(values) for values in by_dialogue.values()]

    def spearman(chosen: np.ndarray) -> float:
        values = np.concatenate([groups[k] for k in chosen])
        return float(spearmanr(values[:, 0], values[:, 1]).statistic)

    every = np.arange(len(groups))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant values, which give nan
        estimate = spearman(every)
        if len(groups) < 2:
            return estimate, float("nan"), float("nan")
        drawn = bootstrap(
            (every,), spearman, vectorized=False, n_resamples=RESAMPLES, method="percentile", random_state=0
        ).bootstrap_distribution
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return estimate, float(low), float(high)


def agreement(rated: Sequence[dict], scores: dict[int, dict[str, float]], parts: Sequence[str]) -> list[str]:
    """Return the rows of a table: each score, then each physician, against the physicians' mean rating."""
    notes = {index: rated[index] for index in scores if rated[index]["part"] in parts}

    def row(label: str, pair: Callable[[dict, dict, str], tuple[float, float] | None]) -> str:
        cells, counts = [], set()
        for rating in RATINGS:
            found = [
                (note["dialogue"], *values)
                for index, note in notes.items()
                if (values := pair(note, scores[index], rating))
            ]
            counts.add(len(found))
            cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*correlation(found)) if len(found) > 1 else "not measured")
        return f"| {label} | {max(counts)} | {' | '.join(cells)} |"

    def of_judge(name: str) -> Callable[[dict, dict, str], tuple[float, float] | None]:
        return lambda note, score, rating: (
            (score[name], fmean(r[rating] for r in note["ratings"])) if name in score else None
        )

    def of_physician(reviewer: object) -> Callable[[dict, dict, str], tuple[float, float] | None]:
        def pair(note: dict, _: dict, rating: str) -> tuple[float, float] | None:
            own = [r[rating] for r in note["ratings"] if r["reviewer"] == reviewer]
            others = [r[rating] for r in note["ratings"] if r["reviewer"] != reviewer]
            return (own[0], fmean(others)) if own and others else None

        return pair

    reviewers = sorted({rating["reviewer"] for note in notes.values() for rating in note["ratings"]})
    return [row(f"judge: {text}", of_judge(name)) for name, text in SCORES.items()] + [
        row(f"physician {reviewer} with the others", of_physician(reviewer)) for reviewer in reviewers
    ]


def report(rated: Sequence[dict], verdicts: Sequence[dict], statements: Sequence[dict], judge: str) -> str:
    """Return agreement.md."""
    scores, unscored = note_scores(verdicts, statements), sum(record["verdict"] == "unscored" for record in verdicts)
    lines = [
        f"Judge: {judge}. Spearman's correlation with the physicians' mean rating [95% interval over dialogues].",
        f"{unscored} of {len(verdicts)} verdicts unscored.",
    ]
    for title, parts in (("Both parts", tuple(PARTS)), ("Subjective", ("sub",)), ("Assessment and plan", ("ap",))):
        head = ["score", "notes", *RATINGS]
        lines += ["", f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += agreement(rated, scores, parts)
    return "\n".join(lines) + "\n"


# --- command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=Path, required=True, help="JSONL file of rated notes")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the records and agreement.md")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N dialogues (default: all)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args, for_judge = build_parser().parse_known_args(argv)
    options = Options(**vars(evaluation_script.build_parser().parse_args(["", "--stage", "judge", *for_judge])))
    os.umask(0o077)  # only the user may read dialogues and notes
    try:
        text = measure(args, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command to resume", file=sys.stderr)
        return 130
    print(f"{text}\nwritten to {args.output_dir / 'agreement.md'}")
    return 0


def measure(args: argparse.Namespace, options: Options) -> str:
    """Ask the judge, if this call does, and write agreement.md; return its text. Raises UserError."""
    if options.generates:
        raise UserError(f"--stage {options.stage}: the notes are given; leave it out, or give judge or report")
    rated = read_rated(args.ratings)
    cases = make_cases(rated, args.limit)
    if not cases:
        raise UserError(f"{args.ratings} has no models' notes, which are note_2 and note_3")
    print(f"{len(cases)} sections of the models' notes on {len({case.dialogue for case, _ in cases})} dialogues")
    loads = options.judges and not options.judge_api_base
    with RunFolder(args.output_dir) as folder:
        if not (folder.path / "manifest.json").exists() and any((folder.path / name).exists() for name in RECORDS):
            raise UserError(f"{folder.path} has records but no manifest.json; choose another --output_dir")
        model = models.resolve_model(options.judge_model, print_line=print_line) if loads else None
        manifest = open_run(args.ratings, options, model, folder)
        if options.judges:
            asyncio.run(ask(cases, options, model, folder))
        wanted = {case.key() for case, _ in cases}
        verdicts, statements = (
            [record for record in file if record_key(record) in wanted]
            for file in (folder.judgements, folder.statements)
        )
        if len(verdicts) < len(cases) or len(statements) < len(cases):
            counts = f"{len(verdicts)} verdicts and {len(statements)} sections with statements"
            raise UserError(f"{folder.path} has {counts} for {len(cases)} cases; run without --stage report first")
        text = report(rated, verdicts, statements, manifest.identity["judge"]["judge_name"])
        write_atomically(folder.path / "agreement.md", text)
    return text


if __name__ == "__main__":
    sys.exit(main())
