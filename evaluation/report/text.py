"""Format tables for the console, as Markdown with aligned columns."""

import textwrap

from evaluation.report import figures, messages
from evaluation.report.figures import interval, percent, percent_or_dash
from evaluation.run.records import QUESTIONS


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def console_table(results: dict) -> str:
    """Return the tables of one run: the headline, rates of each section by verdicts and statements, judge checks."""
    statements, lenient = results.get("statements"), results.get("lenient")
    mean, (level, message) = results["mean"], messages.judge_message(results)
    valid = f"Readable notes: {results['valid_notes']} of {results['n']}"
    parts = [
        f"{figures.run_name(results)}, judged by {figures.short_name(results['judge_model'])}, "
        f"{results['n']} dialogues\n"
        f"HEADLINE: {percent(mean['accuracy'])} of the sections passed (95% interval {interval(mean['ci95'])})"
        + ("; do not rely on it, see the WARNING below" if level == "alarm" else "")
        + _statements_headline(results, statements),
        _rates_table(results, statements),
        "; ".join(filter(None, [valid, figures.unfinished_message(results)])) + "." + _unscored(results),
        messages.NOTE_SCHEMA if results.get("note_schema") else "",
    ]
    if figures.has_readable_rates(results):
        parts.append(_readable_table(results))
    if statements:
        parts += [_statements_table(statements), messages.statements_message(statements)]
    if slices := results.get("slices"):
        parts += [_slices_table(slices), textwrap.fill(figures.one_line(messages.slices_message(slices), 1000), 120)]
    if lenient:
        parts += [f"Lenient reading: {messages.lenient_message(results)}", _lenient_table(lenient)]
    if controls := results["judge_controls"]:
        together = {"all": results["judge_controls_all"]} if results.get("judge_controls_all") else {}
        parts.append(_controls_table(controls | together, "Known answers"))
    if statements and (controls := statements["judge_controls"]):
        together = {"all": statements["judge_controls_all"]} if statements["judge_controls_all"] else {}
        parts.append(_controls_table(controls | together, "By statements"))
    if instruments := results.get("instruments"):
        parts.append(messages.instruments_message(instruments))
    if labels := results["human_labels"]:
        parts.append(_people_table(labels, results.get("human_labels_all")))
        parts.append(messages.kappa_message(results))
    if by_people := results.get("statement_labels"):
        parts += [_statement_labels_table(by_people), messages.statement_labels_message(by_people)]
    if attacks := results["attacks"]:
        parts.append(f"Attacks on the judge: {messages.attack_message(attacks)}")
    if statements and statements["attacks"]:
        parts.append(f"Attacks, by statements: {messages.attack_message(statements['attacks'])}")
    parts.append(f"WARNING: {message}" if level == "alarm" else message)
    return "\n\n".join(filter(None, parts))


def _statements_headline(results: dict, statements: dict | None) -> str:
    """Return a second line of the headline; empty if no statements were asked."""
    if not statements:
        return ""
    mean, better = statements["mean"], (results.get("instruments") or {}).get("better")
    return (
        f"\nBy statements{', which tell more here' if better == 'statements' else ''}: the notes say "
        f"{percent_or_dash(mean['covered']['share'])} of the reference's statements; "
        f"{percent_or_dash(mean['supported']['share'])} of the notes' statements are supported"
    )


def _rates_table(results: dict, statements: dict | None) -> str:
    """Return the pass rate of each section by the verdicts and, if asked, by statements."""
    unproven, unproven_statements = messages.unproven_sections(results), messages.unproven_by_statements(results)
    header, rows = ["Section", "Pass rate", "Unscored", "ROUGE-L"], []
    for key, section in figures.section_lines(results):
        row = [key, _checked_rate(section, key in unproven)]
        if key == "mean":
            row += ["", figures.mean_rouge(results)]
        else:
            rouge = f"{section['rougeL']:.3f}" if figures.has_readable_rates(results) else figures.rouge(section)
            row += [str(section["unscored"]), rouge]
        if statements:
            figure = statements["mean"] if key == "mean" else statements["sections"][key]
            row.insert(2, _checked_rate(figure, key in unproven_statements))
        rows.append(row)
    if statements:
        header.insert(2, "By statements")
    return _table(header, rows)


def _checked_rate(section: dict, is_unproven: bool) -> str:
    return figures.rate(section["accuracy"], section["ci95"]) + (f", {messages.UNPROVEN}" if is_unproven else "")


def _unscored(results: dict) -> str:
    """Return the range of each pass rate with unscored verdicts."""
    ranges = [
        f"{key} {interval((section['worst'], section['best']))}"
        for key, section in results["sections"].items()
        if section["unscored"]
    ]
    return f" Pass rates if all unscored failed, or all passed: {', '.join(ranges)}." if ranges else ""


def _readable_table(results: dict) -> str:
    rows = [
        [
            key,
            figures.rate(section.get("accuracy_readable"), section.get("ci95_readable")),
            figures.number_or_dash(section.get("rougeL_readable")),
        ]
        for key, section in results["sections"].items()
    ]
    rows.append(["mean", percent_or_dash(figures.readable_mean(results)), ""])
    return _table(["Among readable", "Pass rate", "ROUGE-L"], rows)


def _statements_table(statements: dict) -> str:
    rows = []
    for key, section in statements["sections"].items():
        unscored = [f"{name} {section[name]['unscored']}" for name in QUESTIONS if section[name]["unscored"]]
        if section["unscored"]:
            spread = interval((section["worst"], section["best"]))
            unscored.append(f"sections {section['unscored']} (pass rate {spread})")
        rows.append([key, *(_share(section[name]) for name in QUESTIONS), ", ".join(unscored) or "0"])
    mean = statements["mean"]
    rows.append(["mean", *(figures.rate(mean[name]["share"], mean[name]["ci95"]) for name in QUESTIONS), ""])
    header = ["Statements", "Covered (of the reference's)", "Supported (of the notes')", "Unscored"]
    return _table(header, rows)


def _share(figure: dict) -> str:
    return (
        "-"
        if figure["share"] is None
        else f"{percent(figure['share'])} ({interval(figure['ci95'])}, n = {figure['n']})"
    )


def _slices_table(slices: dict) -> str:
    """Return a table of the groups, at most 120 characters wide."""
    header, rows = ["Group", "n", "Readable", "By verdicts"], []
    for group in slices["groups"]:
        shown = [group["readable"], group["verdicts"]]
        if statements := group["statements"]:
            shown += [statements, *(statements[name] for name in QUESTIONS)]
        name = figures.one_line(figures.group_name(group), 28)
        rows.append([name, str(group["n"]), *map(figures.whole_percent, shown)])
    if slices["groups"][0]["statements"]:
        header += ["By statements", "Covered", "Supported"]
    column = figures.one_line(slices["column"], 60)
    return f"By {column}, in percent (95% interval):\n\n{_table(header, rows)}"


def _lenient_table(lenient: dict) -> str:
    statements, header = lenient["statements"], ["Lenient", "Pass rate"]
    rows = [
        [key, figures.rate(section["accuracy"], section["ci95"])] for key, section in figures.section_lines(lenient)
    ]
    if statements:
        header += ["By statements", "Covered", "Supported"]
        for row in rows:
            figure = statements["mean"] if row[0] == "mean" else statements["sections"][row[0]]
            row.append(figures.rate(figure["accuracy"], figure["ci95"]))
            row += [figures.rate(figure[name]["share"], figure[name]["ci95"]) for name in QUESTIONS]
    return _table(header, rows)


def _controls_table(controls: dict, name: str) -> str:
    rows = []
    for key, check in controls.items():
        row = [key, *(_rate(check, rate, f"n = {check[n]}") for rate, n in _RATES)]
        if check.get("youden") is None:
            row.append("not checked")
        else:
            low, high = check["youden_ci95"]
            row.append(f"{check['youden']:.2f} ({low:.2f} to {high:.2f})")
        rows.append(row)
    header = [name, "Sensitivity (good sections passed)", "Specificity (bad sections failed)", "Youden's J"]
    return _table(header, rows)


_RATES = (("sensitivity", "n_good"), ("specificity", "n_bad"))


def _rate(check: dict, name: str, n: str = "") -> str:
    if check[name] is None:
        return "not checked"
    return f"{percent(check[name])} ({', '.join(filter(None, [interval(check[f'{name}_ci95']), n]))})"


def _statement_labels_table(figures: dict) -> str:
    rows = []
    for name, check in figures.items():
        area = "-"
        if check["auc"] is not None:
            area = f"{check['auc']:.2f} ({check['auc_ci95'][0]:.2f} to {check['auc_ci95'][1]:.2f})"
        rows.append([name, *(_share(check[key]) for key in ("found", "false_alarms")), area])
    header = ["By people's answers", "Marked of people's no", "Marked of people's yes", "AUC"]
    return _table(header, rows)


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
    names, statements, warnings = comparison["names"], comparison.get("statements"), messages.comparison_warnings(runs)
    rows = _bold_rows(figures.section_lines(comparison))
    if readable := figures.readable_means(runs):
        rows.append(["mean, readable", *readable])
    parts = [
        "HEADLINE: the mean pass rate by the judge's verdicts (the highest in bold)"
        + ("; do not rely on it, see the WARNING below" if warnings else ""),
        _table(["Section", *names], rows),
    ]
    if statements:
        lines = [(f"Pass rate, {key}", line) for key, line in figures.section_lines(statements)]
        means = [
            [f"{name.capitalize()}, mean", *map(percent_or_dash, statements[name]["mean"]["share"])]
            for name in QUESTIONS
        ]
        parts.append(_table(["By statements", *names], [*_bold_rows(lines), *means]))
    parts.append(messages.comparison_by_statements_message(comparison, runs))
    parts.append(_table(["Without a judge", *names], figures.judge_free_measures(runs)))
    if lenient := figures.lenient_rows(runs):
        parts.append(_table(["Lenient reading", *names], lenient))
    for k, pair in enumerate(comparison["pairs"]):
        a, b = names[pair["a"]], names[pair["b"]]
        parts.append(f"{b} minus {a}, in percentage points, on the {pair['n']} dialogues in both runs:")
        parts.append(_pair_table(pair, "Section"))
        flips = (
            f"{section} {before} -> {after} ({len(indices)}): {', '.join(map(str, indices))}"
            for (section, before, after), indices in figures.group_flips(pair["flips"])
        )
        parts.append("\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in flips))
        if statements:
            parts.append(_pair_table(statements["pairs"][k], "By statements"))
    p_values = f"{figures.P_VALUES} {figures.SHARE_P_VALUES}" if statements else figures.P_VALUES
    parts.append(textwrap.fill(p_values, 100))
    parts += [f"WARNING: {warning}" for warning in warnings]
    return "\n\n".join(filter(None, parts))


def _bold_rows(lines: list[tuple[str, dict]]) -> list[list[str]]:
    """Return a row for each line, with the highest rates in bold."""
    return [
        [key]
        + [f"**{percent(rate)}**" if k in line["best"] else percent(rate) for k, rate in enumerate(line["accuracy"])]
        for key, line in lines
    ]


def _pair_table(pair: dict, name: str) -> str:
    """Return a pair's differences; those of the covered and supported shares follow if the pair has them."""
    rows = []
    for key, section in pair["sections"].items():
        cells = ["-"] * 5
        if section["n"]:
            difference, ci95 = figures.points(section["difference"]), figures.points_interval(section["ci95"])
            flips = [str(section["only_b"]), str(section["only_a"])]
            cells = [difference, ci95, figures.p_value(section["p_holm"]), *flips]
        rows.append([key, *cells, str(section["unscored"])])
    means = [("mean", pair["mean"]), *((question, pair[question]) for question in QUESTIONS if question in pair)]
    for key, mean in means:
        if mean["difference"] is not None:
            difference, ci95 = figures.points(mean["difference"]), figures.points_interval(mean["ci95"])
            cells = [difference, ci95, figures.p_value(mean["p"]), "", "", str(pair["n"] - mean["n"])]
            rows.append([key, *cells])
    return _table([name, "Difference", "95% interval", "p", "fail -> pass", "pass -> fail", "Unscored"], rows)
