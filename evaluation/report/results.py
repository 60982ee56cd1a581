"""Write results.json: the figures of a run, with keys in a fixed order."""

import json
from pathlib import Path

from common.files import write_atomically
from prompts import SECTIONS

# Readers of results.json may rely on these keys and their order; further keys follow in any order.
_KEYS = (
    *("model", "lora_path", "judge_model", "dataset", "split", "n", "valid_notes", "sections", "mean"),
    *("judge_controls", "timings_s"),
)
_SECTION_KEYS = ("pass", "fail", "unscored", "accuracy", "ci95", "worst", "best", "rougeL")


def write_results_json(path: Path, results: dict) -> None:
    """Write results.json atomically. Raises ValueError if a key is missing or a number is not finite."""
    ordered = _order(results, _KEYS, "results")
    ordered["sections"] = {
        key: _order(section, _SECTION_KEYS, f"section {key}")
        for key, section in _order(results["sections"], SECTIONS, "sections").items()
    }
    write_atomically(path, json.dumps(ordered, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _order(values: dict, keys: tuple[str, ...], where: str) -> dict:
    missing = [key for key in keys if key not in values]
    if missing:
        raise ValueError(f"{where}: no {', '.join(missing)}")
    return {key: values[key] for key in keys} | values
