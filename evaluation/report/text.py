"""Format tables for the console, as Markdown with aligned columns."""

import textwrap

from evaluation.report import figures, messages
from evaluation.report.figures import interval, percent


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def console_table(results: dict) -> str:
    """Return the tables of one run: pass rate, unscored and ROUGE-L of each section, and the checks of the judge."""
    unproven = messages.unproven_sections(results)
    rows = []
    for key, section in results["sections"].items():
        rate, unscored = percent(section["accuracy"]), str(section["unscored"])
        if key in unproven:
            rate += f" ({messages.UNPROVEN})"
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
        together = {"all": results["judge_controls_all"]} if results.get("judge_controls_all") else {}
        parts.append(_controls_table(controls | together))
    if labels := results["human_labels"]:
        parts.append(_people_table(labels, results.get("human_labels_all")))
        parts.append(messages.kappa_message(results))
    if attacks := results["attacks"]:
        parts.append(f"Attacks on the judge: {messages.attack_message(attacks)}")
    level, message = messages.judge_message(results)
    parts.append(f"WARNING: {message}" if level == "alarm" else message)
    return "\n\n".join(filter(None, parts))


def _controls_table(controls: dict) -> str:
    rows = []
    for key, check in controls.items():
        row = [key, *(_rate(check, name, f"n = {check[n]}") for name, n in _RATES)]
        if check.get("youden") is None:
            row.append("not checked")
        else:
            low, high = check["youden_ci95"]
            row.append(f"{check['youden']:.2f} ({low:.2f} to {high:.2f})")
        rows.append(row)
    header = ["Known answers", "Sensitivity (good sections passed)", "Specificity (bad sections failed)", "Youden's J"]
    return _table(header, rows)


_RATES = (("sensitivity", "n_good"), ("specificity", "n_bad"))


def _rate(check: dict, name: str, n: str = "") -> str:
    if check[name] is None:
        return "not checked"
    return f"{percent(check[name])} ({', '.join(filter(None, [interval(check[f'{name}_ci95']), n]))})"


def _people_table(labels: dict, together: dict | None) -> str:
    rows = []
    for key, check in labels.items():
        rate = _people_rate(check["corrected_accuracy"], check["corrected_ci95"])
        rows.append([key, rate, *(_rate(check, name) for name, _ in _RATES), messages.labelled_strata(check)])
    if together:
        rate = _people_rate(together["accuracy"], together["ci95"])
        rows.append(["mean", rate, "", "", f"{together['labelled']} sections"])
    header = ["People", "Pass rate", "Sensitivity (of sections people passed)"]
    return _table([*header, "Specificity (of sections people failed)", "People passed"], rows)


def _people_rate(rate: float | None, ci95: tuple[float, float]) -> str:
    return interval(ci95) if rate is None else f"{percent(rate)} ({interval(ci95)})"


def comparison_table(comparison: dict, runs: list[dict]) -> str:
    """Return the tables of several runs: pass rates with the best in bold, then differences, p and changed verdicts.

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
        parts.append(figures.P_VALUES)
        flips = (
            f"{section} {before} -> {after} ({len(indices)}): {', '.join(map(str, indices))}"
            for (section, before, after), indices in figures.group_flips(pair["flips"])
        )
        parts.append("\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in flips))
    parts += [f"WARNING: {warning}" for warning in messages.comparison_warnings(runs)]
    return "\n\n".join(filter(None, parts))


def _pair_table(pair: dict) -> str:
    rows = []
    for key, section in pair["sections"].items():
        cells = ["-"] * 5
        if section["n"]:
            difference, ci95 = figures.points(section["difference"]), figures.points_interval(section["ci95"])
            flips = [str(section["only_b"]), str(section["only_a"])]
            cells = [difference, ci95, figures.p_value(section["p_holm"]), *flips]
        rows.append([key, *cells, str(section["unscored"])])
    mean = pair["mean"]
    if mean["n"]:
        difference, ci95 = figures.points(mean["difference"]), figures.points_interval(mean["ci95"])
        rows.append(["mean", difference, ci95, figures.p_value(mean["p"]), "", "", str(pair["n"] - mean["n"])])
    return _table(["Section", "Difference", "95% interval", "p", "fail -> pass", "pass -> fail", "Unscored"], rows)
