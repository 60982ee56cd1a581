"""The run folder: locked while in use, resumed after its last record, replaced only on request.

Only the user can read it (files 0600, folders 0700), because records hold the text of dialogues and notes.
"""

from pathlib import Path

from common.errors import UserError
from common.files import lock
from evaluation.run.manifest import Identity, Manifest
from evaluation.run.records import DAMAGED, open_records

# The files to delete before a stage's records are replaced.
_FILES_TO_REPLACE = {
    "generate": ("predictions.jsonl", "judgements.jsonl", "statements.jsonl", "results.json", "report.html"),
    "judge": ("judgements.jsonl", "statements.jsonl", "results.json", "report.html"),
    "report": (),  # its files are replaced atomically
}


class RunFolder:
    """A locked run folder. Raises UserError if another run holds the lock or the folder cannot be written."""

    def __init__(self, path: Path):
        self.path = path
        try:
            if not path.is_dir():
                path.mkdir(parents=True, mode=0o700)
            self._lock = lock(path / ".lock")
        except BlockingIOError:
            raise UserError(
                f"{path}: another run is writing here; wait for it, or choose another --output_dir"
            ) from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; choose another --output_dir") from None
        self.predictions, self.judgements, self.statements = open_records(path)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.predictions.close()
        self.judgements.close()
        self.statements.close()
        self._lock.close()

    def check(self, identity: Identity, overwrite: str | None = None) -> Manifest:
        """Return the manifest, new or resumed, of the run that `identity` describes; change nothing on the disk.

        `identity` holds those of the parts "data", "generate" and "judge" that this call determines. `overwrite` names
        the stage whose records, and those made from them, are to be replaced. Raises UserError if the records to keep
        were made from something else.
        """
        manifest = None if overwrite == "generate" else Manifest.read(self.path / "manifest.json")
        if manifest is None:
            if overwrite != "generate" and self.predictions.path.exists():
                raise UserError(f"{self.path} has predictions but no manifest.json; choose another --output_dir")
            manifest = Manifest(self.path / "manifest.json")
        if overwrite:
            manifest.forget(overwrite)
        notes = overwrite != "generate" and any(True for _ in self.predictions)
        sources = set() if overwrite in ("generate", "judge") else self._sources()
        judged = bool(sources - {"code"})  # what a rule decided does not depend on the judge
        manifest.check_same_run(identity, {"data": notes or bool(sources), "generate": notes, "judge": judged})
        return manifest

    def _sources(self) -> set[str]:
        """Return the sources of the verdicts and statements on the disk: judge, code or both."""
        statements = ("judge" if record["status"] == "asked" else "code" for record in self.statements)
        return {record["source"] for record in self.judgements} | set(statements)

    def begin(self, identity: Identity, overwrite: str | None = None) -> Manifest:
        """Start or resume the run that `identity` describes: check it, delete old records, write the manifest."""
        manifest = self.check(identity, overwrite)
        for name in _FILES_TO_REPLACE[overwrite] if overwrite else ():
            (self.path / name).unlink(missing_ok=True)
        manifest.write()
        return manifest

    def check_notes(self, n: int, all_needed: bool) -> None:
        """Raise UserError for a note outside the n dialogues, a second note on one or, if all are needed, none."""
        seen: set[int] = set()
        for record in self.predictions:
            index = record["index"]
            if index in seen or not 0 <= index < n:
                fault = "has two notes" if index in seen else f"is not among the {n}"
                raise UserError(f"{self.predictions.path}: dialogue {index} {fault}; {DAMAGED}")
            seen.add(index)
        if all_needed and len(seen) < n:
            raise UserError(
                f"{self.path} has {len(seen)} notes on {n} dialogues; run the same command with --stage all first"
            )
