"""Figures as text, and the messages about a run that the console and the pages share."""

from pathlib import Path

UNINFORMATIVE = "judge uninformative"


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
    """Format ROUGE-L over all notes and, if it differs, over the readable ones. Old results lack the latter."""
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


def judge_checks(results: dict) -> dict[str, dict]:
    """Return the check of the judge in each section: against controls, else against people, else {}."""
    return results["judge_controls"] or results["human_labels"] or {}


def is_checked(check: dict) -> bool:
    return check["n_good"] > 0 and check["n_bad"] > 0


def uninformative_sections(results: dict) -> list[str]:
    """Return the sections in which the judge was checked and cannot tell good from bad."""
    return [key for key, check in judge_checks(results).items() if is_checked(check) and not check["informative"]]


def judge_message(results: dict) -> tuple[str, str]:
    """Return (level, sentences) on how far the judge can be trusted; level is "alarm", "unchecked" or "checked"."""
    checks = judge_checks(results)
    if not checks:
        return "unchecked", "The judge was not checked in this run, so it is unknown how often its verdicts are wrong."
    if uninformative := uninformative_sections(results):
        option = "--judge_controls" if results["judge_controls"] else "--human_labels"
        return "alarm", (
            f"The judge is uninformative in {_join(uninformative)}: where the right verdict is known, it did not pass "
            "good sections clearly more often than bad ones. Its pass rate there says nothing about the notes. "
            f"More known answers ({option}) make this check more sensitive."
        )
    if unchecked := [key for key, check in checks.items() if not is_checked(check)]:
        return "unchecked", (
            f"The judge could not be checked in {_join(unchecked)}: that takes verdicts on both good and bad sections "
            "with known answers."
        )
    return "checked", (
        "Where the right verdict is known, the judge passed good sections clearly more often than bad ones. "
        "Its sensitivity and specificity say how reliably."
    )


def _join(keys: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(keys[:-1]), keys[-1]]))


def unfinished_message(results: dict) -> str:
    """Count the notes that were cut off or never written; empty if there are none."""
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


def comparison_warnings(runs: list[dict]) -> list[str]:
    """Return one warning for each run whose pass rates are worthless."""
    messages = [(run["name"], *judge_message(run["results"])) for run in runs]
    return [f"{name}: {message}" for name, level, message in messages if level == "alarm"]


def group_flips(flips: list[dict]) -> list[tuple[tuple[str, str, str], list[int]]]:
    """Group changed verdicts as ((section, before, after), indices of the dialogues)."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for flip in flips:
        groups.setdefault((flip["section"], flip["from"], flip["to"]), []).append(flip["index"])
    return list(groups.items())
