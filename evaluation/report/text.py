"""Tables for the console. They are Markdown, and their columns line up."""

import textwrap

from evaluation.report import figures
from evaluation.report.figures import interval, percent


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def console_table(results: dict) -> str:
    """Return the tables of one run: pass rate, unscored and ROUGE-L of each section, and the checks of the judge."""
    uninformative = figures.uninformative_sections(results)
    rows = []
    for key, section in results["sections"].items():
        rate, unscored = percent(section["accuracy"]), str(section["unscored"])
        if key in uninformative:
            rate += f" ({figures.UNINFORMATIVE})"
        if section["unscored"]:
            unscored += f" (pass rate {interval((section['worst'], section['best']))})"
        rows.append([key, rate, interval(section["ci95"]), unscored, figures.rouge(section)])
    mean = results["mean"]
    rows.append(["mean", percent(mean["accuracy"]), interval(mean["ci95"]), "", figures.mean_rouge(results)])
    valid = f"Readable notes: {results['valid_notes']} of {results['n']}"
    parts = [
        f"{figures.run_name(results)}, judged by {figures.short_name(results['judge_model'])}, "
        f"{results['n']} dialogues",
        _table(["Section", "Pass rate", "95% interval", "Unscored", "ROUGE-L"], rows),
        "; ".join(filter(None, [valid, figures.unfinished_message(results)])) + ".",
    ]
    if controls := results["judge_controls"]:
        parts.append(_check_table("Known answers", controls, "good sections passed", "bad sections failed"))
    if labels := results["human_labels"]:
        parts.append(_check_table("People", labels, "of sections people passed", "of sections people failed"))
    if attacks := results["attacks"]:
        parts.append(
            f"Attacks on the judge: {percent(attacks['success_rate'])} ({interval(attacks['ci95'])}) "
            f"of {attacks['n']} got a pass."
        )
    level, message = figures.judge_message(results)
    parts.append(f"WARNING: {message}" if level == "alarm" else message)
    return "\n\n".join(parts)


def _check_table(title: str, checks: dict, good: str, bad: str) -> str:
    rows = []
    for key, check in checks.items():
        row = [key]
        for name, n in (("sensitivity", check["n_good"]), ("specificity", check["n_bad"])):
            row.append(f"{percent(check[name])} ({interval(check[name + '_ci95'])}, n = {n})" if n else "not checked")
        if check["informative"]:
            row.append(f"{percent(check['corrected_accuracy'])} ({interval(check['corrected_ci95'])})")
        else:
            row.append(figures.UNINFORMATIVE if figures.is_checked(check) else "not checked")
        rows.append(row)
    return _table([title, f"Sensitivity ({good})", f"Specificity ({bad})", "Corrected pass rate"], rows)


def comparison_table(comparison: dict, runs: list[dict]) -> str:
    """Return a column for each run, the best pass rate in bold; then differences, exact McNemar p and changed verdicts.

    comparison: from `compare_runs(runs)`.
    """
    names = comparison["names"]
    rows = [
        [key]
        + [f"**{percent(rate)}**" if k in line["best"] else percent(rate) for k, rate in enumerate(line["accuracy"])]
        for key, line in figures.comparison_lines(comparison)
    ]
    parts = [
        _table(["Section", *names], rows),
        _table(["Without a judge", *names], figures.judge_free_measures(runs)),
    ]
    for pair in comparison["pairs"]:
        a, b = names[pair["a"]], names[pair["b"]]
        parts.append(f"{b} minus {a}, in percentage points, on the {pair['n']} dialogues in both runs:")
        parts.append(_pair_table(pair))
        flips = (
            f"{section} {before} -> {after} ({len(indices)}): {', '.join(map(str, indices))}"
            for (section, before, after), indices in figures.group_flips(pair["flips"])
        )
        parts.append("\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in flips))
    parts += [f"WARNING: {warning}" for warning in figures.comparison_warnings(runs)]
    return "\n\n".join(filter(None, parts))


def _pair_table(pair: dict) -> str:
    rows = []
    for key, section in pair["sections"].items():
        cells = ["-"] * 5
        if section["n"]:
            difference, ci95 = figures.points(section["difference"]), figures.points_interval(section["ci95"])
            flips = [str(section["only_b"]), str(section["only_a"])]
            cells = [difference, ci95, figures.p_value(section["p"]), *flips]
        rows.append([key, *cells, str(section["unscored"])])
    mean = pair["mean"]
    if mean["n"]:
        difference, ci95 = figures.points(mean["difference"]), figures.points_interval(mean["ci95"])
        rows.append(["mean", difference, ci95, "", "", "", str(pair["n"] - mean["n"])])
    return _table(
        ["Section", "Difference", "95% interval", "McNemar p", "fail -> pass", "pass -> fail", "Unscored"], rows
    )
