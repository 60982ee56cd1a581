"""Scores for reading: the console's tables, results.json, report.html and comparison.html."""

import base64
import difflib
import functools
import hashlib
import json
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from prompts import SECTION_NAMES, SECTIONS

MOST_DIALOGUES = 1_000  # in one report: 6 MB for dialogues of 200 words, which a browser opens and searches at ease

_TEMPLATES = Path(__file__).parent / "templates"
_TELLS_NOTHING = "this judge tells nothing"

# --- figures as text -------------------------------------------------------------------------------------------------


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}%"


def _interval(ci95: tuple[float, float], dash: str = "-") -> str:
    return f"{100 * ci95[0]:.1f}{dash}{100 * ci95[1]:.1f}%"


def _points(difference: float) -> str:
    """A difference of two rates, in percentage points with its sign."""
    return f"{100 * difference:+z.1f}"


def _points_interval(ci95: tuple[float, float]) -> str:
    return f"{_points(ci95[0])} to {_points(ci95[1])}"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _rouge(section: dict) -> str:
    """ROUGE-L over all notes, and over the readable ones where that is another figure; older results do not have it."""
    readable = section.get("rougeL_readable", section["rougeL"])
    if readable == section["rougeL"]:
        return f"{readable:.3f}"
    return f"{section['rougeL']:.3f} " + ("(no note readable)" if readable is None else f"(readable: {readable:.3f})")


def _run_name(results: dict) -> str:
    """Model and adapter by the last part of their paths that is not a checkpoint's step."""
    return " + ".join(_short(path) for path in (results["model"], results["lora_path"]) if path)


def _short(path: str) -> str:
    folder = Path(path)
    return (folder.parent.name if folder.name.startswith("global_step_") else folder.name) or path


def _trusts(results: dict) -> dict[str, dict]:
    """What is known of the judge in each section: from controls, in their place from people's verdicts, or {}."""
    return results["judge_controls"] or results["human_labels"] or {}


def _uninformative(results: dict) -> list[str]:
    """The sections in which the judge was checked and its verdicts turned out to tell nothing."""
    return [key for key, trust in _trusts(results).items() if _checked(trust) and not trust["informative"]]


def _checked(trust: dict) -> bool:
    return trust["n_good"] > 0 and trust["n_bad"] > 0


def _judge_message(results: dict) -> tuple[str, str]:
    """(level, sentence) on how far the judge can be trusted; level is "alarm", "unchecked" or "checked"."""
    if not _trusts(results):
        return "unchecked", "The judge was not checked in this run: nobody knows how often its verdicts are wrong."
    silent = _uninformative(results)
    unchecked = [key for key, trust in _trusts(results).items() if not _checked(trust)]
    if silent:
        return "alarm", (
            f"In {_listed(silent)} {_TELLS_NOTHING}: where the right verdict is known, it did not pass good sections "
            "clearly more often than bad ones. Its pass rate there says nothing about the notes. "
            f"More known answers ({'--judge_controls' if results['judge_controls'] else '--human_labels'}) make this "
            "check finer."
        )
    if unchecked:
        return "unchecked", f"The judge could not be checked in {_listed(unchecked)}: no known answers for both sides."
    return "checked", (
        "Where the right verdict is known, the judge passed good sections clearly more often than bad ones. "
        "Its sensitivity and specificity say how much more often."
    )


def _listed(keys: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(keys[:-1]), keys[-1]]))


def _limit_message(results: dict) -> str:
    """How many notes were cut off or never begun, in one sentence; empty when none was."""
    words = {
        "length": "reached the token limit",
        "prompt_too_long": "not written because the dialogue is too long for the model",
        "error": "ended in an error",
    }
    counts = results["finish_reasons"]
    return "; ".join(f"{counts[reason]} {what}" for reason, what in words.items() if counts.get(reason))


# --- console ---------------------------------------------------------------------------------------------------------


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up on a console too."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def console_table(results: dict) -> str:
    """The table of one run: pass rate, unscored and ROUGE-L for each section, and how far the judge can be trusted."""
    silent = _uninformative(results)
    rows = []
    for key, section in results["sections"].items():
        unscored = str(section["unscored"])
        if section["unscored"]:
            unscored += f" (pass rate {_interval((section['worst'], section['best']))})"
        rows.append(
            [
                key,
                _percent(section["accuracy"]) + (" (judge tells nothing)" if key in silent else ""),
                _interval(section["ci95"]),
                unscored,
                _rouge(section),
            ]
        )
    mean = results["mean"]
    rougeL = sum(section["rougeL"] for section in results["sections"].values()) / len(SECTIONS)
    rows.append(["mean", _percent(mean["accuracy"]), _interval(mean["ci95"]), "", f"{rougeL:.3f}"])
    valid = f"Readable notes: {results['valid_notes']} of {results['n']}"
    parts = [
        f"{_run_name(results)}, judged by {_short(results['judge_model'])}, {results['n']} dialogues",
        _table(["Section", "Pass rate", "95% interval", "Unscored", "ROUGE-L"], rows),
        "; ".join(filter(None, [valid, _limit_message(results)])) + ".",
    ]
    if results["judge_controls"]:
        parts.append(_trust_table(results["judge_controls"], "passed of good ones", "failed of bad ones"))
    if results["human_labels"]:
        parts.append(_trust_table(results["human_labels"], "passed of people's pass", "failed of people's fail"))
    if results["attacks"]:
        attacks = results["attacks"]
        parts.append(
            f"Attacks on the judge: {_percent(attacks['success_rate'])} ({_interval(attacks['ci95'])}) "
            f"of {attacks['n']} got a pass."
        )
    level, message = _judge_message(results)
    parts.append(f"WARNING: {message}" if level == "alarm" else message)
    return "\n\n".join(parts)


def _trust_table(trusts: dict, good: str, bad: str) -> str:
    rows = []
    for key, trust in trusts.items():
        row = [key]
        for name, n in (("sensitivity", trust["n_good"]), ("specificity", trust["n_bad"])):
            row.append(f"{_percent(trust[name])} ({_interval(trust[name + '_ci95'])}, n = {n})" if n else "not checked")
        if trust["informative"]:
            row.append(f"{_percent(trust['corrected_accuracy'])} ({_interval(trust['corrected_ci95'])})")
        else:
            row.append(_TELLS_NOTHING if _checked(trust) else "not checked")
        rows.append(row)
    return _table(["Judge", f"Sensitivity: {good}", f"Specificity: {bad}", "Corrected pass rate"], rows)


def comparison_table(comparison: dict, runs: list[dict]) -> str:
    """A column for each run with the best pass rate in bold, then differences, exact McNemar p and flips.

    comparison: what `scoring.compare_runs(runs)` returned.
    """
    names = comparison["names"]
    rows = [
        [key]
        + [f"**{_percent(rate)}**" if k in line["best"] else _percent(rate) for k, rate in enumerate(line["accuracy"])]
        for key, line in _comparison_lines(comparison)
    ]
    parts = [_table(["Section", *names], rows), _table(["Without a judge", *names], _without_a_judge(runs))]
    for pair in comparison["pairs"]:
        parts.append(
            f"{names[pair['b']]} minus {names[pair['a']]}, percentage points, on the {pair['n']} dialogues of both:"
        )
        parts.append(_pair_table(pair))
        flips = (
            f"{section} {before} -> {after} ({len(indices)}): {', '.join(map(str, indices))}"
            for (section, before, after), indices in _flips(pair["flips"])
        )
        parts.append("\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in flips))
    return "\n\n".join([*filter(None, parts), *(f"WARNING: {warning}" for warning in _comparison_warnings(runs))])


def _pair_table(pair: dict) -> str:
    rows = []
    for key, section in pair["sections"].items():
        figures = ["-"] * 5
        if section["n"]:
            figures = [
                _points(section["difference"]),
                _points_interval(section["ci95"]),
                _p_value(section["p"]),
                str(section["only_b"]),
                str(section["only_a"]),
            ]
        rows.append([key, *figures, str(section["unscored"])])
    mean = pair["mean"]
    if mean["n"]:
        left_out = str(pair["n"] - mean["n"])
        rows.append(["mean", _points(mean["difference"]), _points_interval(mean["ci95"]), "", "", "", left_out])
    return _table(
        ["Section", "Difference", "95% interval", "McNemar p", "fail -> pass", "pass -> fail", "Unscored"], rows
    )


def _comparison_lines(comparison: dict) -> list[tuple[str, dict]]:
    return [*comparison["sections"].items(), ("mean", comparison["mean"])]


def _without_a_judge(runs: list[dict]) -> list[list[str]]:
    """Rows of a table with a column for each run: readable notes, and ROUGE-L of each section."""
    results = [run["results"] for run in runs]
    readable = ["Readable notes", *(f"{result['valid_notes']} of {result['n']}" for result in results)]
    rouge = (
        [f"ROUGE-L, {section}", *(_rouge(result["sections"][section]) for result in results)]
        for section in results[0]["sections"]
    )
    return [readable, *rouge]


def _comparison_warnings(runs: list[dict]) -> list[str]:
    """What makes the runs' pass rates worthless, one sentence for each run that is concerned."""
    messages = [(run["name"], *_judge_message(run["results"])) for run in runs]
    return [f"{name}: {message}" for name, level, message in messages if level == "alarm"]


def _flips(flips: list[dict]) -> list[tuple[tuple[str, str, str], list[int]]]:
    """Changed verdicts as ((section, before, after), indices of the dialogues)."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for flip in flips:
        groups.setdefault((flip["section"], flip["from"], flip["to"]), []).append(flip["index"])
    return list(groups.items())


# --- files -----------------------------------------------------------------------------------------------------------


# The keys that readers of results.json may rely on, in their order; others follow in the order they come.
_RESULTS_KEYS = (
    *("model", "lora_path", "judge_model", "dataset", "split", "n", "valid_notes", "sections", "mean"),
    *("judge_controls", "timings_s"),
)
_SECTION_KEYS = ("pass", "fail", "unscored", "accuracy", "ci95", "worst", "best", "rougeL")


def write_results_json(path: Path, results: dict) -> None:
    """Write results.json, keys in a fixed order. Raises ValueError when a key is missing or a number is not finite."""
    ordered = _ordered(results, _RESULTS_KEYS, "results")
    ordered["sections"] = {
        key: _ordered(section, _SECTION_KEYS, f"section {key}")
        for key, section in _ordered(results["sections"], SECTIONS, "sections").items()
    }
    _write(path, json.dumps(ordered, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _ordered(values: dict, keys: tuple[str, ...], what: str) -> dict:
    missing = [key for key in keys if key not in values]
    if missing:
        raise ValueError(f"{what}: no {', '.join(missing)}")
    return {key: values[key] for key in (*keys, *(key for key in values if key not in keys))}


def view_rows(
    predictions: Iterable[dict], judgements: Iterable[dict], rows: Sequence[dict[str, str]], most: int = MOST_DIALOGUES
) -> list[dict]:
    """One entry for each of the first `most` dialogues, in their order, as `write_report` reads it: dialogue,
    reference, prediction and its four verdicts.

    rows: the dataset; `rows[prediction["index"]]` holds dialogue, S, O, A, P.
    """
    verdicts = {
        (record["index"], record["section"]): {key: record[key] for key in ("verdict", "reason", "source")}
        for record in judgements
        if record["index"] < most and record["control"] is None and record["attack"] is None
    }
    shown = (prediction for prediction in predictions if prediction["index"] < most)
    view = []
    for prediction in sorted(shown, key=lambda prediction: prediction["index"]):
        index, valid = prediction["index"], prediction["status"] == "ok"
        view.append(
            {
                "index": index,
                "dialogue": rows[index]["dialogue"],
                "reference": {key: rows[index][key] for key in SECTIONS},
                "prediction": {key: prediction[key] for key in SECTIONS} if valid else None,
                "judgements": {key: verdicts[index, key] for key in SECTIONS},
                **{key: prediction[key] for key in ("status", "reason", "raw")},
            }
        )
    return view


def write_report(path: Path, results: dict, rows_view: list[dict]) -> None:
    """Write report.html: one file that needs no network and in which nothing from data or models can run."""
    level, message = _judge_message(results)
    page = _environment().get_template("report.html.j2")
    text = page.render(
        name=_run_name(results),
        results=results,
        facts=_facts(results),
        level=level,
        message=message,
        limit_message=_limit_message(results),
        silent=_uninformative(results),
        corrected={key: trust for key, trust in _trusts(results).items() if trust["informative"]},
        shown=len(rows_view),
        entries=(_entry(row) for row in rows_view),
    )
    _write(path, text)


def write_comparison(path: Path, comparison: dict, runs: list[dict]) -> None:
    """Write comparison.html, in the style of report.html. comparison: what `scoring.compare_runs(runs)` returned."""
    bounds = [
        abs(bound)
        for pair in comparison["pairs"]
        for section in pair["sections"].values()
        if section["n"]
        for bound in section["ci95"]
    ]
    # Width of the charts of differences: the largest bound on both sides, in steps of 20 points.
    span = 0.4 * max(1, math.ceil(max(bounds, default=0) / 0.2))
    page = _environment().get_template("comparison.html.j2")
    text = page.render(
        comparison=comparison,
        lines=_comparison_lines(comparison),
        without_a_judge=_without_a_judge(runs),
        warnings=_comparison_warnings(runs),
        facts=_facts(runs[0]["results"], ("Judge", "Dataset", "Prompts")),
        span=span,
        ticks=[
            f"{100 * span * share:+.0f}".replace("-", "−") if share else "0" for share in (-0.5, -0.25, 0, 0.25, 0.5)
        ],
    )
    _write(path, text)


def _write(path: Path, text: str) -> None:
    """Replace the file in one step."""
    draft = path.with_name(path.name + ".new")
    # A model can write half a surrogate pair, which is no character: it becomes "?".
    draft.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    draft.replace(path)


def _facts(results: dict, labels: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """What the numbers belong to, as (label, text): all, or those with these labels."""
    facts = {
        "Model": results["model"],
        "Adapter": results["lora_path"] or "none",
        "Judge": results["judge_model"],
        "Dataset": f"{results['dataset']}, {results['split']}, {results['n']} dialogues",
        "Date": results.get("date"),
        "Prompts": results.get("prompts_hash"),
        "Versions": ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items()),
        "Time": ", ".join(f"{stage.replace('_', ' ')} {s:.0f} s" for stage, s in results["timings_s"].items()),
    }
    return [(label, text) for label, text in facts.items() if text and (not labels or label in labels)]


# --- HTML ------------------------------------------------------------------------------------------------------------


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "interval": functools.partial(_interval, dash="–"),
        "points": lambda difference: _points(difference).replace("-", "−"),
        "points_interval": lambda ci95: _points_interval(ci95).replace("-", "−"),
        "p_value": _p_value,
        "rouge": _rouge,
        "flips": _flips,
        "position": lambda rate: f"{100 * rate:.2f}%",
        "csp_hash": _csp_hash,
        "kinds": _kinds,
    }
    environment.globals |= {
        "section_names": SECTION_NAMES,
        "style": Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        "script": Markup((_TEMPLATES / "report.js").read_text(encoding="utf-8")),
    }
    return environment


def _csp_hash(text: str) -> Markup:
    """The source expression that lets exactly this inline text through a Content-Security-Policy."""
    return Markup("'sha256-{}'").format(base64.b64encode(hashlib.sha256(text.encode()).digest()).decode())


# Control characters get a picture (NUL is U+2400); those that reorder what stands beside them, U+FFFD: a note with one
# could read "05" where it says "50".
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def _visible(value: object) -> object:
    return value.translate(_PICTURES) if isinstance(value, str) else value


def _kinds(controls: dict) -> list[tuple[str, str, list[dict | None]]]:
    """(kind, expected verdict, its figures in each section or None), good kinds before bad ones."""
    expected = {kind: entry["expected"] for trust in controls.values() for kind, entry in trust["by_kind"].items()}
    return [
        (kind, verdict, [trust["by_kind"].get(kind) for trust in controls.values()])
        for kind, verdict in sorted(expected.items(), key=lambda item: item[1] != "pass")
    ]


# A turn begins on a line of its own or, in data that lost its line breaks, after a sentence.
_NEXT_TURN = re.compile(r"[\r\n]+|(?<=[.?!]) (?=[A-Z][a-z]{2,15}: )")
_TURN = re.compile(r"([A-Z][\w.' -]{0,23}:)?(.*)", re.DOTALL)


def _entry(row: dict) -> dict:
    """A dialogue as the template shows it: turns of (speaker, words), and runs of text with differences marked."""
    sections = []
    for key in SECTIONS:
        reference, prediction = [(row["reference"][key], False)], None
        if row["prediction"] is not None:
            reference, prediction = word_differences(row["reference"][key], row["prediction"][key])
        sections.append({"key": key, "reference": reference, "prediction": prediction, **row["judgements"][key]})
    return {
        **{key: row[key] for key in ("index", "status", "reason", "raw")},
        "turns": [_TURN.fullmatch(turn).groups("") for turn in _NEXT_TURN.split(row["dialogue"].strip())],
        "words": len(row["dialogue"].split()),
        "sections": sections,
    }


Runs = list[tuple[str, bool]]  # pieces of a text in order; True: these words do not stand in the other text

# Comparing n with m words takes time up to n * m * (n + m); longer texts are shown unmarked.
_MOST_WORDS = 1_000


def word_differences(reference: str, prediction: str) -> tuple[Runs, Runs]:
    """Both texts, with the words marked that stand in only one of them.

    Case and punctuation at a word's end are no difference. Texts of over 1,000 words come back unmarked.
    """
    words = [re.findall(r"\S+\s*", text.strip()) for text in (reference, prediction)]
    if max(map(len, words)) > _MOST_WORDS:
        return [(reference, False)], [(prediction, False)]
    keys = [[word.casefold().strip().rstrip(".,;:") for word in side] for side in words]
    matcher = difflib.SequenceMatcher(None, *keys, autojunk=False)
    runs: tuple[Runs, Runs] = ([], [])
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        for side, start, end in ((0, i1, i2), (1, j1, j2)):
            text = "".join(words[side][start:end])
            kept = text.rstrip()
            runs[side].extend([(kept, tag != "equal"), (text[len(kept) :], False)] if text else [])
    return runs
