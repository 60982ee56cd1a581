"""Read the figures of evaluated runs, and write headline.py's tables."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from trainings import Result, Training

from common.dataset import Rows
from common.errors import UserError
from evaluation.run.records import QUESTIONS
from prompts import SECTIONS

NOT_ASKED, NOT_VALIDATED = "not asked", "not validated"
NOTES_ON_TRAININGS = (
    "Losses and minutes are means over seeds, GPU memory (reserved by PyTorch) is a maximum. Each seed's best step is "
    "exported. Minutes include the start, and leave out resumed trainings."
)
NOTES_ON_FIGURES = (
    "Brackets: 95% intervals over dialogues; in rows with a mean, over three or more seeds that differ, for these "
    "dialogues. Unreadable notes have no passed section, no covered statement, and a ROUGE-L of 0. none: nothing was "
    "scored. Figures by statements hold for this test set's threshold; other test sets have another."
)
SHARES = {  # figures that are shares of notes, sections or statements
    "readable": "readable notes, strict",
    "lenient": "readable notes, lenient",
    "passed": "sections passed by verdict",
    "passed by statements": "sections passed by statements",
    "covered": "reference statements covered",
    "supported": "note statements supported",
}
COLUMNS = {**SHARES, "rougeL": "ROUGE-L"}
BY_STATEMENTS = {"passed by statements": "mean", "covered": "covered", "supported": "supported"}  # keys of a comparison
BY_SECTION = {f"passed {section}": section for section in SECTIONS}

Figure = dict  # value: float or None; ci95: [low, high] or None


@dataclass(frozen=True)
class Evaluated:
    """A model and its run folder. Models with the same `label` differ in their seed only, which is None untrained."""

    label: str
    run: Path
    seed: int | None = None
    training: Result | None = None
    changes: tuple[str, ...] = ()


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return Student's 95% interval for the mean of at least two values."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def seeds_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's 95% interval for a mean over seeds; None for fewer than three, or if all are equal."""
    return t_interval(values) if len(values) >= 3 and len(set(values)) > 1 else None


def read_figures(run: Path, results: dict, rows: Rows) -> dict[str, Figure | None]:
    """Return the figures of a finished run with their intervals over dialogues; None for one that was not measured.

    results: the content of the run's results.json.
    """
    from evaluation.scoring.scores import read_notes

    n, strict = results["n"], results["valid_notes"]
    figures: dict[str, Figure | None] = {"readable": figure_of_count(strict, n), "lenient": None}
    if "lenient" in results:  # null: the lenient readers read no other note
        readable = results["lenient"]["valid_notes"] if results["lenient"] else strict
        figures["lenient"] = figure_of_count(readable, n)
    figures["passed"] = figure_of_results(results["mean"], "accuracy")
    statements = results.get("statements")
    mean = statements["mean"] if statements else None
    figures["passed by statements"] = mean and figure_of_results(mean, "accuracy")
    for name in QUESTIONS:
        figures[name] = mean and figure_of_results(mean[name], "share")
    with (run / "predictions.jsonl").open(encoding="utf-8") as lines:
        notes = read_notes(map(json.loads, lines), rows)
    rouge = [
        fmean(notes.rouge[section][index] for section in SECTIONS) if index in notes.strict else 0.0
        for index in notes.indices
    ]
    low, high = t_interval(rouge) if len(rouge) > 1 else (0.0, 1.0)
    figures["rougeL"] = {"value": fmean(rouge), "ci95": [max(0.0, low), min(1.0, high)]}
    for name, section in BY_SECTION.items():
        figures[name] = figure_of_results(results["sections"][section], "accuracy")
    return figures


def figure_of_count(count: int, n: int) -> Figure:
    """Return the figure count / n with Wilson's interval."""
    from evaluation.scoring.intervals import wilson

    return {"value": count / n, "ci95": wilson(count, n)}


def figure_of_results(values: dict, key: str) -> Figure:
    """Return the figure `key` of an entry of results.json."""
    return {"value": values[key], "ci95": values["ci95"]}


def evaluation_records(test: str, models: Sequence[Evaluated], rows: Rows) -> list[dict]:
    """Return one record for each model. All must have been evaluated on the test set, whose `rows` are given.

    Statements of all models are read at one threshold: that of the run with the most controls. If the first model is
    not trained, `minus_first` of the others has the differences from it on the same dialogues; see `differences`.
    """
    found = []
    comparison = compare(models) if len(models) > 1 else None
    for position, model in enumerate(models):
        results = json.loads((model.run / "results.json").read_text(encoding="utf-8"))
        record = {"test": test, "model": model.label, "seed": model.seed, "changes": list(model.changes)}
        if model.training:
            record |= {
                "training_min": round(model.training.seconds / 60, 1),
                "resumed": model.training.resumed,
                "gpu_gb": model.training.gpu_gb,
                "steps": model.training.steps,
                "best_validation": model.training.best if model.training.validations else None,
            }
        record |= {"n": results["n"], "judge": results["judge_model"], "run": model.run.name}
        record |= {"instruments": results.get("instruments"), "figures": read_figures(model.run, results, rows)}
        record["unscored"] = unscored(results)
        record["at_threshold"] = at_threshold(results)
        if comparison and (statements := comparison["statements"]):
            means = [(name, statements[name]["mean"], "share") for name in QUESTIONS]
            for name, mean, key in (*means, ("passed by statements", statements["mean"], "accuracy")):
                record["figures"][name] = {"value": mean[key][position], "ci95": mean["ci95"][position]}
        if comparison and position and not models[0].training:
            record["minus_first"] = differences(comparison, position)
        found.append(record)
    return found


def at_threshold(results: dict) -> dict | None:
    """Return the statements' threshold, and how often they decide right at it on controls that it was not fitted to."""
    if not (statements := results.get("statements")):
        return None
    controls = statements["judge_controls_all"] or {}
    names = ("sensitivity", "sensitivity_ci95", "specificity", "specificity_ci95")
    return {"threshold": statements["threshold"]} | {name: controls.get(name) for name in names}


def unscored(results: dict) -> dict[str, tuple[int, int]]:
    """Return {"sections" or "statements": (those without an answer of the judge, all)} of a run's results.json."""
    sections = results["sections"].values()
    found = {"sections": (sum(part["unscored"] for part in sections), results["n"] * len(sections))}
    if statements := results.get("statements"):
        parts = [part[name] for part in statements["sections"].values() for name in QUESTIONS]
        found["statements"] = (sum(part["unscored"] for part in parts), sum(part["n"] for part in parts))
    return found


def unscored_line(found: list[dict]) -> list[str]:
    """Return a paragraph with the models to which the judge gave no answer at times; empty if there is none."""
    names = [
        f"{record['run']}: {count} of {total} {kind}"
        for record in found
        for kind, (count, total) in record["unscored"].items()
        if count
    ]
    return [f"**Not scored, because the judge gave no answer: {'; '.join(names)}.**", ""] if names else []


def compare(models: Iterable[Evaluated]) -> dict | None:
    """Return compare_runs of the models' runs; None, and a line on stderr, if they cannot be compared."""
    from evaluation.inputs import load_runs
    from evaluation.scoring.comparison import compare_runs

    try:
        return compare_runs(load_runs(model.run for model in models))
    except (UserError, ValueError) as error:
        print(f"error: {error}; the tables have no differences", file=sys.stderr, flush=True)
        return None


def differences(comparison: dict, position: int) -> dict[str, dict | None]:
    """Return {figure: {n, difference, ci95, p}} of a run minus the first one; None for a figure that is missing."""

    def pair_of(part: dict) -> dict:
        return next(pair for pair in part["pairs"] if (pair["a"], pair["b"]) == (0, position))

    found = {"passed": pair_of(comparison)["mean"]}
    pair = pair_of(comparison["statements"]) if comparison["statements"] else {}
    return found | {name: pair.get(key) for name, key in BY_STATEMENTS.items()}


def results_tables(found: list[dict]) -> list[str]:
    """Return Markdown tables of one test set's records: all figures, then the pass rates by section."""
    head = ["model", "seed", *COLUMNS.values()]
    lines, by_section = table_head(head), table_head(["model", "seed", *BY_SECTION.values()])
    for label in dict.fromkeys(record["model"] for record in found):
        runs = [record for record in found if record["model"] == label]
        for record in runs:
            seed = "" if record["seed"] is None else str(record["seed"])
            cells = [figure_text(name, record["figures"][name]) for name in COLUMNS]
            lines.append(table_row([label, seed, *cells]))
            by_section.append(
                table_row([label, seed, *(figure_text(name, record["figures"][name]) for name in BY_SECTION)])
            )
        if len(runs) > 1:
            name, count = f"**{label}**", f"mean of {len(runs)}"
            lines.append(table_row([name, count, *(over_seeds(key, runs) for key in COLUMNS)]))
            by_section.append(table_row([name, count, *(over_seeds(key, runs) for key in BY_SECTION)]))
    return [*lines, *difference_table(found), "", "Sections passed by the judge's verdict:", "", *by_section]


def difference_table(found: list[dict]) -> list[str]:
    """Return a heading and a table of differences from the first model, in percentage points; empty without any."""
    names = ["passed", *BY_STATEMENTS]
    lines = [
        "",
        f"Minus {found[0]['model']}, on the same dialogues, in percentage points, with 95% interval and p:",
        "",
    ]
    lines += table_head(["model", "seed", *(COLUMNS[name] for name in names)])
    with_differences = [record for record in found if record.get("minus_first")]
    for label in dict.fromkeys(record["model"] for record in with_differences):
        runs = [record for record in with_differences if record["model"] == label]
        for run in runs:
            cells = [difference_text(run["minus_first"][name]) for name in names]
            lines.append(table_row([label, "" if run["seed"] is None else str(run["seed"]), *cells]))
        if len(runs) > 1:
            cells = []
            for name in names:
                values = [run["minus_first"][name] and run["minus_first"][name]["difference"] for run in runs]
                if None in values:
                    cells.append("none")
                    continue
                cells.append(difference_text({"difference": fmean(values), "ci95": seeds_interval(values), "p": None}))
            lines.append(table_row([f"**{label}**", f"mean of {len(runs)}", *cells]))
    return lines if with_differences else []


def difference_text(values: dict | None) -> str:
    """Return a difference in percentage points, with its interval and p if there are any."""
    if values is None or values["difference"] is None:
        return "none"
    text = f"{100 * values['difference']:+.1f}"
    if values["ci95"]:
        text += " [{:+.1f}, {:+.1f}]".format(*(100 * end for end in values["ci95"]))
    if values["p"] is not None:
        text += ", p < 0.001" if values["p"] < 0.001 else f", p = {values['p']:.3f}"
    return text


def judge_line(found: list[dict]) -> list[str]:
    """Return a paragraph on how well verdicts and statements tell good controls from bad; empty without controls."""
    from evaluation.report.messages import instruments_message

    known = [record for record in found if record["instruments"]]
    if not known:
        return []
    best = max(known, key=lambda record: record["instruments"]["n_good"] + record["instruments"]["n_bad"])
    text, rates = instruments_message(best["instruments"]), best["at_threshold"]
    if rates and rates["sensitivity"] is not None and rates["specificity"] is not None:
        passed, failed = (
            "{:.0f}% [{:.0f}, {:.0f}]".format(*(100 * value for value in (rates[name], *rates[f"{name}_ci95"])))
            for name in ("sensitivity", "specificity")
        )
        text += (
            f" A statement counts as yes from log odds of {rates['threshold']:z.2f}; so read, statements pass {passed} "
            f"of the good controls that did not fit this threshold, and fail {failed} of the bad ones."
        )
    return [text, ""]


def over_seeds(name: str, runs: list[dict]) -> str:
    """Return the mean over the runs' seeds, with Student's interval if there are at least three."""
    figures = [run["figures"][name] for run in runs]
    if any(figure is None or figure["value"] is None for figure in figures):
        return NOT_ASKED if None in figures else "none"
    values = [figure["value"] for figure in figures]
    interval = seeds_interval(values)
    if interval:
        interval = max(0.0, interval[0]), min(1.0, interval[1])
    return figure_text(name, {"value": fmean(values), "ci95": interval})


def figure_text(name: str, figure: Figure | None) -> str:
    """Return a figure and its interval, shares in per cent."""
    if figure is None:
        return NOT_ASKED
    if figure["value"] is None:
        return "none"
    percent = name != "rougeL"
    scale, digits = (100, 1) if percent else (1, 3)
    text = f"{scale * figure['value']:.{digits}f}" + ("%" if percent else "")
    if figure["ci95"] is None:
        return text
    low, high = (f"{scale * end:.{digits}f}" for end in figure["ci95"])
    return f"{text} [{low}, {high}]"


def training_table(results: dict[Training, Result]) -> list[str]:
    """Return a Markdown table of trainings: a row for each label, the lowest mean validation loss first."""
    heads = ["model", "best validation loss", "by seed, at step", "last validation loss", "steps", "training, min"]
    lines = table_head([*heads, "peak GPU memory, GB"])
    models: dict[tuple[str, str], list[tuple[int, Result]]] = {}
    for training, result in results.items():
        models.setdefault((training.recipe, training.label), []).append((training.seed, result))

    def mean_loss(key: tuple[str, str]) -> float:
        """Return infinity for a model with a seed that did not validate."""
        return fmean(result.best[1] if result.validations else math.inf for _, result in models[key])

    for key in sorted(models, key=lambda key: (key[0] != "full", mean_loss(key))):
        runs = models[key]
        loss, bests, last = NOT_VALIDATED, "", ""
        if math.isfinite(mean_loss(key)):
            loss, last = f"{mean_loss(key):.4f}", f"{fmean(result.validations[-1][1] for _, result in runs):.4f}"
            bests = ", ".join(f"{result.best[1]:.4f} at {result.best[0]} (seed {seed})" for seed, result in runs)
        # A resumed training has the time of its last call only, and 0 GB is a training that measured none.
        minutes = [result.seconds / 60 for _, result in runs if not result.resumed]
        memory = max(result.gpu_gb for _, result in runs)
        cost = [f"{fmean(minutes):.1f}" if minutes else "", f"{memory:.1f}" if memory else ""]
        steps = ", ".join(str(steps) for steps in sorted({result.steps for _, result in runs}))
        lines.append(table_row([key[1], loss, bests, last, steps, *cost]))
    return lines


def missing_line(names: Sequence[str]) -> list[str]:
    """Return a paragraph that names the models missing from a table; empty if there are none."""
    return ["", f"**Missing, because a training or evaluation failed: {'; '.join(names)}.**"] if names else []


def write_tables(path: Path, lines: Sequence[str]) -> None:
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def table_head(cells: Sequence[str]) -> list[str]:
    return [table_row(cells), "|" + "---|" * len(cells)]


def table_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
