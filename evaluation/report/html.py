"""Write report.html and comparison.html: single files that load nothing and run no script from data or models."""

import base64
import functools
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from common.files import write_atomically
from evaluation.report import figures, marks, messages
from evaluation.run.records import QUESTIONS
from prompts import SECTION_NAMES, SECTIONS

MOST_DIALOGUES = 1_000  # in a report; with 200 words each they take 6 MB, which a browser still opens and searches fast

_TEMPLATES = Path(__file__).parent / "templates"


def select_dialogues(
    predictions: Iterable[dict],
    judgements: Iterable[dict],
    rows: Sequence[dict[str, str]],
    statements: Iterable[dict] = (),
    threshold: float = 0.0,
    values: Sequence[str] | None = None,
    most: int = MOST_DIALOGUES,
) -> list[dict]:
    """Return the first `most` dialogues, in order, for `write_report`: text, reference, prediction and verdicts.

    predictions, judgements, statements: the records in any order, each read once.
    rows: the dataset; `rows[prediction["index"]]` holds dialogue, S, O, A, P.
    threshold: log odds from which a statement counts as yes.
    values: for each row, the value by which the results are grouped, if they are.
    """
    verdicts = {
        (record["index"], record["section"]): {key: record[key] for key in ("verdict", "reason", "source")}
        for record in judgements
        if record["index"] < most and record["control"] is None and record["attack"] is None
    }
    asked = {
        (record["index"], record["section"]): marks.read_statements(record, threshold)
        for record in statements
        if record["index"] < most and record["control"] is None and record["attack"] is None
    }
    shown = (prediction for prediction in predictions if prediction["index"] < most)
    dialogues = []
    for prediction in sorted(shown, key=lambda prediction: prediction["index"]):
        index, is_readable = prediction["index"], prediction["status"] in ("ok", "lenient")
        dialogues.append(
            {
                "index": index,
                "dialogue": rows[index]["dialogue"],
                "reference": {key: rows[index][key] for key in SECTIONS},
                "prediction": {key: prediction[key] or "" for key in SECTIONS} if is_readable else None,
                "judgements": {key: verdicts[index, key] for key in SECTIONS},
                "statements": {key: asked.get((index, key)) for key in SECTIONS},
                "form": prediction.get("form"),
                "value": values[index] if values else None,
                **{key: prediction[key] for key in ("status", "reason", "raw")},
            }
        )
    return dialogues


def write_report(path: Path, results: dict, dialogues: list[dict]) -> None:
    """Write report.html. results: the figures of a run; dialogues: from `select_dialogues`."""
    level, message = messages.judge_message(results)
    statements, chart = results.get("statements"), _chart(results)
    page = _environment().get_template("report.html.j2")
    text = page.render(
        name=figures.run_name(results),
        results=results,
        facts=_facts(results),
        level=level,
        message=message,
        unfinished_message=figures.unfinished_message(results),
        unproven=messages.unproven_sections(results),
        corrected={
            key: check
            for key, check in (results["human_labels"] or {}).items()
            if check["corrected_accuracy"] is not None
        },
        together=results.get("judge_controls_all"),
        people=results.get("human_labels_all"),
        kappa_message=messages.kappa_message(results),
        statements=statements,
        unproven_statements=messages.unproven_by_statements(results),
        lenient=results.get("lenient"),
        instruments=results.get("instruments"),
        statement_labels=results.get("statement_labels"),
        readable_mean=figures.readable_mean(results),
        has_readable_rates=figures.has_readable_rates(results),
        chart=chart,
        chart_names=dict.fromkeys((style, name) for _, series in chart for style, name, _, _ in series),
        slices=results.get("slices"),
        has_statements=any(any(dialogue["statements"].values()) for dialogue in dialogues),
        shown=len(dialogues),
        entries=(_entry(dialogue) | {"group": _group(results, dialogue)} for dialogue in dialogues),
    )
    write_atomically(path, text)


def write_comparison(path: Path, comparison: dict, runs: list[dict]) -> None:
    """Write comparison.html. comparison: from `compare_runs(runs)`."""
    statements = comparison.get("statements")
    differences = [
        _differences(pair, statements and statements["pairs"][k]) for k, pair in enumerate(comparison["pairs"])
    ]
    bounds = [abs(bound) for rows in differences for _, figure in rows for bound in figure["ci95"]]
    # The charts of differences extend to the largest bound on both sides, rounded up to a multiple of 20 points.
    span = 0.4 * max(1, math.ceil(max(bounds, default=0) / 0.2))
    page = _environment().get_template("comparison.html.j2")
    text = page.render(
        comparison=comparison,
        lines=figures.section_lines(comparison),
        statements=statements,
        statements_message=messages.comparison_by_statements_message(comparison, runs),
        statement_lines=statements and figures.section_lines(statements),
        statement_groups=statements and figures.statement_groups(statements),
        readable_means=figures.readable_means(runs),
        lenient_rows=figures.lenient_rows(runs),
        differences=differences,
        judge_free_measures=figures.judge_free_measures(runs),
        warnings=messages.comparison_warnings(runs),
        facts=_facts(runs[0]["results"], ("Judge", "Dataset", "Prompts")),
        span=span,
        ticks=[
            f"{100 * span * share:+.0f}".replace("-", "−") if share else "0" for share in (-0.5, -0.25, 0, 0.25, 0.5)
        ],
    )
    write_atomically(path, text)


def _group(results: dict, dialogue: dict) -> tuple[int, str] | None:
    """Return (number of the dialogue's group, its value to show); None if the results are not grouped."""
    if not results.get("slices") or dialogue["value"] is None:
        return None
    values = [group["value"] for group in results["slices"]["groups"]]
    number = values.index(dialogue["value"]) if dialogue["value"] in values else len(values) - 1
    return number, figures.group_name(dialogue)


def _chart(results: dict) -> list[tuple[str, list[tuple[str, str, float, list[float]]]]]:
    """Return (section, its series) for the chart; a series is (style, name, share, interval)."""
    statements, people = results.get("statements"), results["human_labels"] or {}
    rows = []
    for key, section in results["sections"].items():
        series = [("verdict", "pass rate", section["accuracy"], section["ci95"])]
        if key in people:
            series.append(("people", "by people", people[key]["corrected_accuracy"], people[key]["corrected_ci95"]))
        if statements:
            figure = statements["sections"][key]
            series.append(("statements", "pass rate by statements", figure["accuracy"], figure["ci95"]))
            series += [(name, name, figure[name]["share"], figure[name]["ci95"]) for name in QUESTIONS]
        rows.append((key, [entry for entry in series if entry[2] is not None]))
    return rows


def _differences(pair: dict, by_statements: dict | None) -> list[tuple[str, dict]]:
    """Return (name, figure) for each bar of a pair's chart; those without a difference are left out."""
    rows = list(pair["sections"].items())
    if by_statements:
        rows += [(name.capitalize(), by_statements[name]) for name in QUESTIONS]
    return [(name, figure) for name, figure in rows if figure["difference"] is not None]


def _facts(results: dict, labels: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Return facts about a run as (label, text): all that are known, or only those in `labels`."""
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


# --- templates -------------------------------------------------------------------------------------------------------


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_make_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": figures.percent,
        "interval": functools.partial(figures.interval, dash="–"),
        "points": lambda difference: figures.points(difference).replace("-", "−"),
        "points_interval": lambda ci95: figures.points_interval(ci95).replace("-", "−"),
        "p_value": figures.p_value,
        "mean_rouge": figures.mean_rouge,
        "flips": figures.group_flips,
        "position": lambda rate: f"{100 * rate:.2f}%",
        "csp_hash": _csp_hash,
        "kinds": _kinds,
        "labelled_strata": messages.labelled_strata,
        "attack_message": messages.attack_message,
        "statements_message": messages.statements_message,
        "instruments_message": messages.instruments_message,
        "statement_labels_message": messages.statement_labels_message,
        "lenient_message": messages.lenient_message,
        "slices_message": messages.slices_message,
        "group_name": figures.group_name,
    }
    environment.globals |= {
        "section_names": SECTION_NAMES,
        "unproven_text": messages.UNPROVEN,
        "p_values": figures.P_VALUES,
        "share_p_values": figures.SHARE_P_VALUES,
        "note_schema_text": messages.NOTE_SCHEMA,
        "style": Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        "script": Markup((_TEMPLATES / "report.js").read_text(encoding="utf-8")),
    }
    return environment


def _csp_hash(text: str) -> Markup:
    """Return the Content-Security-Policy source that allows exactly this inline text."""
    return Markup("'sha256-{}'").format(base64.b64encode(hashlib.sha256(text.encode()).digest()).decode())


# Control characters become their visible symbols (NUL is U+2400). Characters that change the direction of text become
# U+FFFD, because a note with one could display "05" as "50".
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def _make_visible(value: object) -> object:
    return value.translate(_PICTURES) if isinstance(value, str) else value


def _kinds(controls: dict) -> list[tuple[str, str, list[dict | None]]]:
    """Return (kind, expected verdict, its figures in each section or None); kinds that should pass come first."""
    expected = {kind: entry["expected"] for check in controls.values() for kind, entry in check["by_kind"].items()}
    return [
        (kind, verdict, [check["by_kind"].get(kind) for check in controls.values()])
        for kind, verdict in sorted(expected.items(), key=lambda item: item[1] != "pass")
    ]


# A turn begins on a line of its own or, in data that lost its line breaks, after a sentence.
_NEXT_TURN = re.compile(r"[\r\n]+|(?<=[.?!]) (?=[A-Z][a-z]{2,15}: )")
_TURN = re.compile(r"([A-Z][\w.' -]{0,23}:)?(.*)", re.DOTALL)


def _entry(dialogue: dict) -> dict:
    """Return a dialogue for the template: turns as (speaker, words), and sections with words and statements marked."""
    return {
        **{key: dialogue[key] for key in ("index", "status", "reason", "raw", "form")},
        "turns": [_TURN.fullmatch(turn).groups("") for turn in _NEXT_TURN.split(dialogue["dialogue"].strip())],
        "words": len(dialogue["dialogue"].split()),
        "sections": [_section(dialogue, key) for key in SECTIONS],
    }


def _section(dialogue: dict, key: str) -> dict:
    """Return a section for the template: each text as (segments, statements that it does not contain), and counts."""
    statements = dialogue["statements"][key]
    covered, supported = (statements or {}).get("covered", []), (statements or {}).get("supported", [])
    reference, prediction = [(dialogue["reference"][key], False)], None
    if dialogue["prediction"] is not None:
        reference, prediction = marks.word_differences(dialogue["reference"][key], dialogue["prediction"][key])
    states = Counter(statement["state"] for statement in [*covered, *supported])
    return {
        "key": key,
        "reference": marks.locate_statements(reference, covered),
        "prediction": None if prediction is None else marks.locate_statements(prediction, supported),
        "counts": {"states": states, "covered": len(covered), "supported": len(supported)} if statements else None,
        **dialogue["judgements"][key],
    }
