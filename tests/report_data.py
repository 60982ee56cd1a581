"""Figures and records in the form of scoring, made by hand for the tests of the report."""

import itertools
import json
import random

from prompts import SECTIONS

# What an untrusted file may contain wherever the report shows text.
HOSTILE = [
    "<script>window.injected = 1</script>",
    "</script><script>window.injected = 1</script>",
    '"><img src=x onerror="window.injected = 1">',
    "<svg onload='window.injected = 1'></svg><style>body { display: none }</style>",
    "<a href='javascript:window.injected = 1'>Dose</a><iframe srcdoc='<script>parent.injected = 1</script>'></iframe>",
    "--></textarea></title></style><base href='http://127.0.0.1:1/'><meta http-equiv=refresh content='0;http://127.0.0.1:1/'>",
    "{{ 7 * 7 }} {% raw %} ${7 * 7}",
    "NUL \x00, escape \x1b[31m, half a pair \ud800, reordered \u202e50 mg",
    "المريض يشكو من السعال منذ ثلاثة أيام.",
    "W" * 20_000,
]


def around(rate: float, half: float = 0.06) -> list[float]:
    return [max(0.0, rate - half), min(1.0, rate + half)]


def check(sensitivity: float, specificity: float, informative: bool = True, n: int = 20) -> dict:
    by_kind = {"reworded": ("pass", sensitivity)} | dict.fromkeys(
        ("other_patient", "dropped_finding", "turned_negation", "changed_number"), ("fail", specificity)
    )
    return {
        "sensitivity": sensitivity,
        "sensitivity_ci95": around(sensitivity, 0.2),
        "specificity": specificity,
        "specificity_ci95": around(specificity, 0.2),
        "n_good": n,
        "n_bad": n,
        "by_kind": {
            kind: {
                "expected": expected,
                "n": 5,
                "right": round(5 * rate),
                "unscored": 0,
                "rate": rate,
                "ci95": around(rate, 0.3),
            }
            for kind, (expected, rate) in by_kind.items()
        },
        "youden": sensitivity + specificity - 1,
        "youden_ci95": [sensitivity + specificity - 1.2, sensitivity + specificity - 0.8],
        "informative": informative,
        "judged": 250,
        "judged_passed": 150,
        "contradiction": None,
    }


def by_people(sensitivity: float, specificity: float, rate: float, informative: bool = True) -> dict:
    """Return the check of a section against people's verdicts."""
    strata = {"passed by the judge": (161, 10, 9), "failed by the judge": (89, 10, 2.5), "unscored": (4, 0, 0)}
    figures = check(sensitivity, specificity, informative)
    del figures["by_kind"]  # of controls only
    return figures | {
        "agreement": 0.86,
        "corrected_accuracy": rate,
        "corrected_ci95": around(rate, 0.15),
        "strata": {name: dict(zip(("n", "labelled", "passed"), row, strict=True)) for name, row in strata.items()},
    }


def all_labels(rate: float | None = 0.6, **more) -> dict:
    kappas = [{"raters": ["A", "B"], "n": 12, "agreement": 0.9, "kappa": 0.74}]
    figures = {"labelled": 80, "labels": 92, "raters": ["A", "B"], "kappas": kappas, "open": []}
    return figures | {"accuracy": rate, "ci95": around(rate or 0.5, 0.1)} | more


def section(passed: int, unscored: int, n: int = 250) -> dict:
    return {
        "pass": passed,
        "fail": n - passed - unscored,
        "unscored": unscored,
        "accuracy": passed / n,
        "ci95": around(passed / n),
        "worst": passed / n,
        "best": (passed + unscored) / n,
        "rougeL": 0.412,
    }


def attacks() -> dict:
    figures = {"n": 24, "passed": 8, "unscored": 1, "pairs": 23, "pass_rate": 7 / 23, "baseline_pass_rate": 3 / 23}
    figures |= {"difference": 4 / 23, "difference_ci95": [0.007, 0.365]}
    figures |= {"succeeded": 4, "success_rate": 0.2, "ci95": [0.081, 0.416]}
    return figures | {"by_kind": {"fake_verdict": figures, "closing_quote": figures}}


def make_results() -> dict:
    return {
        "model": "Qwen/Qwen3-1.7B",
        "lora_path": "./ckpt/Qwen3-1.7B-LoRA/global_step_289",
        "judge_model": "Qwen/Qwen3-8B",
        "dataset": "./soap_dataset",
        "split": "test",
        "n": 250,
        "valid_notes": 247,
        "finish_reasons": {"stop": 247, "length": 3},
        "sections": {"S": section(161, 4), "O": section(142, 0), "A": section(127, 0), "P": section(162, 0)},
        "mean": {"accuracy": 0.592, "ci95": [0.561, 0.622]},
        "judge_controls": {
            "S": check(0.9, 0.85),
            "O": check(0.95, 0.8),
            "A": check(0.85, 0.9),
            "P": check(0.9, 0.75),
        },
        "judge_controls_all": check(0.9, 0.825, n=80),
        "human_labels": None,
        "human_labels_all": None,
        "attacks": None,
        "timings_s": {"generate_init": 12.6, "generate": 6.9, "judge_init": 12.2, "judge": 14.5},
    }


def line(accuracy: list[float]) -> dict:
    best = [k for k, rate in enumerate(accuracy) if rate == max(accuracy)]
    return {"accuracy": accuracy, "ci95": [around(rate) for rate in accuracy], "best": best}


def pair(a: int, b: int, difference: float, p: float) -> dict:
    figures = {"n": 249, "unscored": 1, "difference": difference, "ci95": [difference - 0.08, difference + 0.08]}
    return {
        "a": a,
        "b": b,
        "n": 250,
        "sections": {key: {**figures, "only_a": 12, "only_b": 43, "p": p, "p_holm": min(1, 4 * p)} for key in SECTIONS},
        "mean": {"n": 247, "difference": difference, "ci95": [difference - 0.04, difference + 0.04], "p": p},
        "flips": [
            {"index": 3, "section": "S", "from": "fail", "to": "pass"},
            {"index": 17, "section": "S", "from": "fail", "to": "pass"},
            {"index": 17, "section": "P", "from": "pass", "to": "fail"},
        ],
    }


def make_comparison() -> dict:
    return {
        "names": ["Qwen3-1.7B", "Finetuned", "LoRA Adapter"],
        "n": [250, 250, 250],
        "sections": {
            "S": line([0.356, 0.736, 0.644]),
            "O": line([0.524, 0.724, 0.568]),
            "A": line([0.528, 0.692, 0.508]),
            "P": line([0.548, 0.708, 0.708]),
        },
        "mean": line([0.489, 0.715, 0.607]),
        "pairs": [pair(0, 1, 0.226, 0.0000002), pair(0, 2, 0.118, 0.0131), pair(1, 2, -0.0001, 1.0)],
    }


def runs_of(comparison: dict, results: dict) -> list[dict]:
    return [{"name": name, "results": results} for name in comparison["names"]]


def cells(table: str, first: str) -> list[str]:
    """Return the cells of the first line of a Markdown table that begins with `first`."""
    row = next(row for row in table.splitlines() if row.startswith(f"| {first} "))
    return [cell.strip() for cell in row.strip("|").split("|")]


def make_run(n: int, words: int = 600, seed: int = 0) -> tuple[list[dict], list[dict], list[dict]]:
    """Return predictions, judgements and rows of n dialogues of `words` words; every tenth note is unreadable."""
    rng = random.Random(seed)
    vocabulary = [a + b for a, b in itertools.product(("ca", "dor", "fe", "lum", "ne", "pre", "sta", "vi"), repeat=2)]
    predictions, judgements, rows = [], [], []
    for index in range(n):
        text = rng.choices(vocabulary, k=words)
        turns = [
            ("Doctor: ", "Patient: ")[k % 2] + " ".join(text[20 * k : 20 * k + 20]) + "." for k in range(words // 20)
        ]
        note = {key: " ".join(text[50 * k : 50 * k + 50]) for k, key in enumerate(SECTIONS)}
        rows.append({"dialogue": "\n".join(turns), **note})
        valid = index % 10 != 9
        written = {key: " ".join(w if rng.random() < 0.7 else "xeno" for w in note[key].split()) for key in SECTIONS}
        predictions.append(
            {
                "index": index,
                "dialogue_hash": "0" * 12,
                "raw": json.dumps(written)[: None if valid else 100],
                "finish_reason": "stop" if valid else "length",
                "status": "ok" if valid else "invalid",
                "reason": None if valid else "JSON is cut off",
                **(written if valid else dict.fromkeys(SECTIONS)),
                "prompt_tokens": 900,
                "output_tokens": 300,
            }
        )
        for k, key in enumerate(SECTIONS):
            verdict = ("pass", "fail", "unscored")[(index + k) % 3] if valid else "fail"
            judgements.append(
                {
                    "index": index,
                    "section": key,
                    "verdict": verdict,
                    "reason": f"Reason number {index}.",
                    "raw": None,
                    "source": "judge" if valid else "code",
                    "attempts": 1,
                    "control": None,
                    "attack": None,
                }
            )
    return predictions, judgements, rows


# --- statements and lenient reading ----------------------------------------------------------------------------------


def statement_records(predictions: list[dict], rows: list[dict], seed: int = 0, words: int = 10) -> list[dict]:
    """Return a record of statements for each section; a statement is `words` words of the text.

    Of the statements, some are missing or unsupported, and one in 50 has no answer. Unreadable notes miss everything.
    """
    rng = random.Random(seed)

    def ask(text: str, is_asked: bool) -> list[dict]:
        parts = text.split(" ")
        chunks = [" ".join(parts[k : k + words]) for k in range(0, len(parts), words)]
        odds = lambda: None if rng.random() < 0.02 else rng.gauss(1.5, 2)  # noqa: E731
        return [{"statement": chunk, "log_odds": odds() if is_asked else None} for chunk in chunks]

    records = []
    for prediction in predictions:
        is_readable = prediction["status"] != "invalid"
        for key in SECTIONS:
            records.append(
                {
                    "index": prediction["index"],
                    "section": key,
                    "control": None,
                    "attack": None,
                    "status": "asked" if is_readable else "missing",
                    "reason": "" if is_readable else "unreadable note",
                    "covered": ask(rows[prediction["index"]][key], is_readable),
                    "supported": ask(prediction[key], True) if is_readable else [],
                }
            )
    return records


def question(share: float | None, unscored: int = 0) -> dict:
    ci95 = None if share is None else around(share, 0.02)
    n = 0 if share is None else 1250
    return {"n": n, "yes": round(n * (share or 0)), "unscored": unscored, "share": share, "ci95": ci95}


def statement_figures(fitted_on: int = 40) -> dict:
    sections = {
        key: {name: section(passed, unscored)[name] for name in ("pass", "fail", "unscored", "accuracy", "ci95")}
        | {"worst": passed / 250, "best": (passed + unscored) / 250}
        | {"covered": question(covered, unscored), "supported": question(supported)}
        for key, passed, unscored, covered, supported in (
            ("S", 86, 2, 0.712, 0.831),
            ("O", 71, 0, 0.655, 0.79),
            ("A", 112, 0, 0.748, 0.902),
            ("P", 94, 0, 0.701, 0.866),
        )
    }
    mean = {"accuracy": 0.363, "ci95": around(0.363, 0.03)}
    mean |= {"covered": {"share": 0.704, "ci95": around(0.704, 0.015)}}
    mean |= {"supported": {"share": 0.847, "ci95": around(0.847, 0.015)}}
    return {
        "threshold": -0.35,
        "fitted_on": fitted_on,
        "sections": sections,
        "mean": mean,
        "judge_controls": dict.fromkeys("SOA", check(0.8, 0.9)) | {"P": check(0.5, 0.55, informative=False)},
        "judge_controls_all": check(0.75, 0.88, n=80),
        "attacks": None,
    }


def add_statements(results: dict) -> dict:
    """Return results with statements, both instruments, the rates of readable notes, and notes read leniently."""
    statements = statement_figures()
    kinds = {"dropped_finding": (20, 0.71, 0.8), "changed_number": (20, 0.83, 0.9)}
    readable = {
        key: entry | {"accuracy_readable": entry["pass"] / 247, "ci95_readable": around(entry["pass"] / 247)}
        for key, entry in results["sections"].items()
    }
    return results | {
        "sections": {key: entry | {"rougeL_readable": 0.417} for key, entry in readable.items()},
        "note_schema": False,
        "statements": statements,
        "instruments": {
            "n_good": 40,
            "n_bad": 40,
            "verdict": {"auc": 0.812, "ci95": [0.71, 0.89]},
            "statements": {"auc": 0.845, "ci95": [0.75, 0.92]},
            "by_kind": {
                kind: {"n": n, "verdict": first, "statements": second} for kind, (n, first, second) in kinds.items()
            },
            "better": None,
        },
        "lenient": {
            "only_lenient": 2,
            "forms": {"headings": 1, "words as keys, nested values": 1},
            "valid_notes": 249,
            "sections": {key: section(entry["pass"] + 2, 0) for key, entry in results["sections"].items()},
            "mean": {"accuracy": 0.6, "ci95": [0.57, 0.63]},
            "statements": {name: statements[name] for name in ("sections", "mean")},
        },
    }


def add_statements_to_comparison(comparison: dict) -> dict:
    """Return a comparison with the same figures by statements."""
    shares = {"share": [0.512, 0.704, None], "ci95": [around(0.512), around(0.704), None]}
    by_section = {"sections": dict.fromkeys(SECTIONS, shares), "mean": shares}
    both = {"n": 250, "difference": 0.192, "ci95": [0.15, 0.234], "p": 0.0002}
    pairs = [{**pair(a, b, 0.1, 0.004), "covered": both, "supported": both} for a, b in ((0, 1), (0, 2), (1, 2))]
    pairs[1] |= {"supported": {"n": 1, "difference": None, "ci95": None, "p": None}}
    rates = {"sections": dict.fromkeys(SECTIONS, line([0.2, 0.363, 0.3])), "mean": line([0.2, 0.363, 0.3])}
    statements = rates | {"threshold": -0.35, "pairs": pairs, "covered": by_section, "supported": by_section}
    return comparison | {"statements": statements}
