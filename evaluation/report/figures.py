"""Format figures as text, for the console and the pages."""

from pathlib import Path

P_VALUES = (
    "The mean's p, from a paired permutation test, is the test of whether the runs differ. The sections' p are from "
    "McNemar's exact test, corrected by Holm's method for the number of sections."
)


def percent(rate: float) -> str:
    return f"{100 * rate:.1f}%"


def interval(ci95: tuple[float, float], dash: str = "-") -> str:
    return f"{100 * ci95[0]:.1f}{dash}{100 * ci95[1]:.1f}%"


def points(difference: float) -> str:
    """Format a difference of two rates in percentage points, with its sign."""
    return f"{100 * difference:+z.1f}"


def points_interval(ci95: tuple[float, float]) -> str:
    return f"{points(ci95[0])} to {points(ci95[1])}"


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


def comparison_lines(comparison: dict) -> list[tuple[str, dict]]:
    """Return (section or "mean", its rates)."""
    return [*comparison["sections"].items(), ("mean", comparison["mean"])]


def judge_free_measures(runs: list[dict]) -> list[list[str]]:
    """Return table rows with a column for each run: readable notes, and ROUGE-L of each section."""
    results = [run["results"] for run in runs]
    readable = ["Readable notes", *(f"{result['valid_notes']} of {result['n']}" for result in results)]
    return [readable] + [
        [f"ROUGE-L, {section}", *(rouge(result["sections"][section]) for result in results)]
        for section in results[0]["sections"]
    ]


def group_flips(flips: list[dict]) -> list[tuple[tuple[str, str, str], list[int]]]:
    """Group changed verdicts as ((section, before, after), indices of the dialogues)."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for flip in flips:
        groups.setdefault((flip["section"], flip["from"], flip["to"]), []).append(flip["index"])
    return list(groups.items())
