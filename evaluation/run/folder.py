"""The run folder: locked while in use, resumed where its records end, replaced only on request.

Only the user can read it (files 0600, folders 0700): records hold dialogue and note text.
"""

from pathlib import Path

from common.errors import UserError
from common.files import lock
from evaluation.run.manifest import Identity, Manifest
from evaluation.run.records import DAMAGED, open_records

# By stage: the files to delete when its records are replaced.
_FILES_TO_REPLACE = {
    "generate": ("predictions.jsonl", "judgements.jsonl", "results.json", "report.html"),
    "judge": ("judgements.jsonl", "results.json", "report.html"),
    "report": (),  # its files are replaced when the new ones are complete
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
        self.predictions, self.judgements = open_records(path)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.predictions.close()
        self.judgements.close()
        self._lock.close()

    def check(self, identity: Identity, overwrite: str | None = None) -> Manifest:
        """Return the manifest of the run that `identity` describes, new or resumed; change nothing on the disk.

        `identity` holds the parts that this call determines: "data", "generate", "judge". `overwrite` names the stage
        whose records are to be replaced, with all that follow from them. Raises UserError if the records that stay
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
        sources = set() if overwrite in ("generate", "judge") else {record["source"] for record in self.judgements}
        judged = bool(sources - {"code"})  # verdicts by code do not depend on the judge
        manifest.check_same_run(identity, {"data": notes or bool(sources), "generate": notes, "judge": judged})
        return manifest

    def begin(self, identity: Identity, overwrite: str | None = None) -> Manifest:
        """Start or resume the run that `identity` describes: check, delete the records to replace, write."""
        manifest = self.check(identity, overwrite)
        for name in _FILES_TO_REPLACE[overwrite] if overwrite else ():
            (self.path / name).unlink(missing_ok=True)
        manifest.write()
        return manifest

    def check_notes(self, n: int, all_needed: bool) -> None:
        """Raise UserError for a note on none of the n dialogues, for a second note on one, and for a missing note."""
        seen: set[int] = set()
        for record in self.predictions:
            index = record["index"]
            if index in seen or not 0 <= index < n:
                fault = "has two notes" if index in seen else f"is none of the {n}"
                raise UserError(f"{self.predictions.path}: dialogue {index} {fault}; {DAMAGED}")
            seen.add(index)
        if all_needed and len(seen) < n:
            raise UserError(
                f"{self.path} has {len(seen)} notes on {n} dialogues; run the same command with --stage all first"
            )
