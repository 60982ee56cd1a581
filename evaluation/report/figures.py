"""Format figures as text, for the console and the pages."""

from collections.abc import Sequence
from pathlib import Path

from evaluation.run.records import QUESTIONS
from prompts import SECTIONS

P_VALUES = (
    "The mean's p, from a paired permutation test, is the test of whether the runs differ. The sections' p are from "
    "McNemar's exact test, corrected by Holm's method for the number of sections."
)
SHARE_P_VALUES = "Those of covered and supported are from a paired t test on the notes' shares."


def percent(rate: float) -> str:
    return f"{100 * rate:.1f}%"


def percent_or_dash(rate: float | None, dash: str = "-") -> str:
    return dash if rate is None else percent(rate)


def number_or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def rate(share: float | None, ci95: Sequence[float] | None) -> str:
    """Format a share with its interval; "-" if there is none."""
    return "-" if share is None else f"{percent(share)} ({interval(ci95)})"


def interval(ci95: tuple[float, float], dash: str = "-") -> str:
    return f"{100 * ci95[0]:.1f}{dash}{100 * ci95[1]:.1f}%"


def points(difference: float) -> str:
    """Format a difference of two rates in percentage points, with its sign."""
    return f"{100 * difference:+z.1f}"


def points_interval(ci95: tuple[float, float]) -> str:
    return f"{points(ci95[0])} to {points(ci95[1])}"


def whole_percent(figure: dict) -> str:
    """Format a share or a pass rate with its interval for narrow columns, in whole percent; "-" if there is none."""
    share, ci95 = figure["accuracy" if "accuracy" in figure else "share"], figure["ci95"]
    return "-" if share is None else f"{100 * share:.0f} ({100 * ci95[0]:.0f}-{100 * ci95[1]:.0f})"


def one_line(text: str, most: int) -> str:
    """Return a text from data for a cell of a console table: printable, on one line, of at most `most` characters."""
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split())).replace("|", "¦")
    return line if len(line) <= most else line[: most - 1] + "…"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def rouge(section: dict) -> str:
    """Format ROUGE-L over all notes and, if it differs, over the readable ones, which old results lack."""
    readable = section.get("rougeL_readable", section["rougeL"])
    if readable == section["rougeL"]:
        return f"{readable:.3f}"
    return f"{section['rougeL']:.3f} " + ("(no note readable)" if readable is None else f"(readable: {readable:.3f})")


def mean_rouge(results: dict) -> str:
    values = [section["rougeL"] for section in results["sections"].values()]
    return f"{sum(values) / len(values):.3f}"


def run_name(results: dict) -> str:
    """Name a run after its model and adapter."""
    return " + ".join(short_name(path) for path in (results["model"], results["lora_path"]) if path)


def short_name(path: str) -> str:
    """Return the last part of a model's path that is not a global_step_N folder."""
    folder = Path(path)
    return (folder.parent.name if folder.name.startswith("global_step_") else folder.name) or path


def unfinished_message(results: dict) -> str:
    """Return the numbers of notes that were cut off or never written, by cause; empty if there are none."""
    words = {
        "length": "reached the token limit",
        "prompt_too_long": "not written because the dialogue is too long for the model",
        "error": "ended in an error",
    }
    counts = results["finish_reasons"]
    return "; ".join(f"{counts[reason]} {text}" for reason, text in words.items() if counts.get(reason))


def group_name(group: dict) -> str:
    """Name a group of results.json's "slices"."""
    if group["value"] is None:
        return f"other ({group['pooled']} values)"
    return group["value"] or "(missing)"


def section_lines(figures: dict) -> list[tuple[str, dict]]:
    """Return (section or "mean", its figures)."""
    return [*figures["sections"].items(), ("mean", figures["mean"])]


def readable_mean(results: dict) -> float | None:
    """Return the mean pass rate among readable notes; None if there are none, or if the results are old."""
    rates = [section.get("accuracy_readable") for section in results["sections"].values()]
    return None if None in rates else sum(rates) / len(rates)


def is_all_readable(results: dict) -> bool:
    return results["valid_notes"] == results["n"]


def has_readable_rates(results: dict) -> bool:
    """Return whether some notes are readable and others are not, and the results, unlike old ones, have their rates."""
    return readable_mean(results) is not None and results["valid_notes"] < results["n"]


def judge_free_measures(runs: list[dict]) -> list[list[str]]:
    """Return table rows with a column for each run: readable notes, forced form if any, and ROUGE-L of each section."""
    results = [run["results"] for run in runs]
    rows = [["Readable notes", *(f"{result['valid_notes']} of {result['n']}" for result in results)]]
    if any(result.get("note_schema") for result in results):
        rows.append(["Made to write JSON", *("yes" if result.get("note_schema") else "no" for result in results)])
    return rows + [
        [f"ROUGE-L, {section}", *(rouge(result["sections"][section]) for result in results)]
        for section in results[0]["sections"]
    ]


def readable_means(runs: list[dict]) -> list[str]:
    """Return each run's mean pass rate among readable notes; empty if all notes of all runs are readable."""
    results = [run["results"] for run in runs]
    if all(is_all_readable(result) or readable_mean(result) is None for result in results):
        return []
    # If all notes are readable, the rate among readable notes is the rate among all.
    means = [result["mean"]["accuracy"] if is_all_readable(result) else readable_mean(result) for result in results]
    return [percent_or_dash(mean) for mean in means]


def lenient_rows(runs: list[dict]) -> list[list[str]]:
    """Return table rows with a column for each run: notes and rates under lenient reading; empty without such notes.

    A run without notes in another form has the same rates under both readings.
    """
    results = [run["results"] for run in runs]
    if not any(result.get("lenient") for result in results):
        return []
    views = [result.get("lenient") or result for result in results]
    counts = [f"{view['valid_notes']} of {result['n']}" for view, result in zip(views, results, strict=True)]
    rows = [["Readable in any form", *counts]]
    rows += [
        [f"Pass rate, {key}", *(percent(view["sections"][key]["accuracy"]) for view in views)]
        for key in results[0]["sections"]
    ]
    rows.append(["Pass rate, mean", *(percent(view["mean"]["accuracy"]) for view in views)])
    if all(view.get("statements") for view in views):
        means = [view["statements"]["mean"] for view in views]
        rows += [
            [f"{name.capitalize()}, mean", *(percent_or_dash(mean[name]["share"]) for mean in means)]
            for name in QUESTIONS
        ]
        rows.append(["By statements, mean", *(percent(mean["accuracy"]) for mean in means)])
    return rows


Shares = list[tuple[float | None, Sequence[float] | None]]  # share and interval of each run


def statement_groups(comparison: dict) -> list[tuple[str, list[tuple[str, Shares]]]]:
    """Return (title, [(section or "mean", shares)]) for the covered and for the supported statements.

    comparison: a comparison's figures by statements.
    """
    titles = {
        "covered": "Covered: the share of the reference’s statements that the note’s section says",
        "supported": "Supported: the share of the notes’ statements that the dialogue or the expert’s note supports",
    }
    return [
        (
            title,
            [
                (key, list(zip(line["share"], line["ci95"], strict=True)))
                for key, line in section_lines(comparison[name])
            ],
        )
        for name, title in titles.items()
    ]


def group_flips(flips: list[dict]) -> list[tuple[tuple[str, str, str], list[int]]]:
    """Group changed verdicts as ((section, before, after), their indices), by section, in ascending order."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for flip in sorted(flips, key=lambda flip: flip["index"]):
        groups.setdefault((flip["section"], flip["from"], flip["to"]), []).append(flip["index"])
    return sorted(groups.items(), key=lambda group: (SECTIONS.index(group[0][0]), group[0][1:]))
