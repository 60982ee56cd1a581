"""Turn pairs of a medical dialogue and a SOAP note into the dataset that train.py and eval.py read.

Input: a dataset on the Hugging Face hub, a .jsonl, .json, .csv or .parquet file, a folder of such files named by split
(train.jsonl, val.csv, test-00000-of-00001.parquet), or a folder from save_to_disk. Notes stand in one column under
headings S, O, A and P, or in four columns of these names.
Output: a DatasetDict with train, validation and test and the text columns dialogue, S, O, A and P; beside the splits
rejects.jsonl, one line for each row left out, with file, row and reason. Only its owner can read the folder.

    python preprocess_data.py
    python preprocess_data.py --dataset demo/dialogues.jsonl --output_dir demo/build/soap_dataset
"""

import argparse
import contextlib
import csv
import ctypes
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import prompts

SPLITS = ("train", "validation", "test")
SPLIT_WORDS = dict(zip(SPLITS, SPLITS, strict=True)) | dict.fromkeys(("valid", "val", "dev"), "validation")
COLUMNS = ("dialogue", *prompts.SECTIONS)
REJECTS = "rejects.jsonl"
OUTPUT_NAMES = {*SPLITS, "dataset_dict.json", REJECTS}

# Far above a long visit, and it keeps the 1,000 rows that datasets writes at once below Arrow's 2 GiB of text.
MAX_CHARACTERS = 500_000
NO_TEXT = re.compile("[\0\ud800-\udfff]")

Row = dict[str, str]


class InputError(Exception):
    """What the user can mend, in one line: what is wrong, where, and what to do."""


class RowError(ValueError):
    """Why a row is left out; the message never quotes the row."""


@dataclass(frozen=True)
class Record:
    """A row as its source has it, or why it cannot be read. Rows count from 1; a CSV header is row 1."""

    file: str
    row: int
    columns: object = None
    reason: str | None = None


# --- rows ------------------------------------------------------------------------------------------------------------


def read_row(record: Record, dialogue_column: str, note_column: str) -> Row:
    """The columns of the output. Four columns S, O, A, P go before the note's column. Raises RowError, NoteError."""
    if record.reason:
        raise RowError(record.reason)
    if not isinstance(record.columns, dict):
        raise RowError(f"{type(record.columns).__name__} where an object was expected")
    dialogue = read_text(record.columns, dialogue_column)
    if all(section in record.columns for section in prompts.SECTIONS):
        note = {section: read_text(record.columns, section) for section in prompts.SECTIONS}
    else:
        note = prompts.read_soap(read_text(record.columns, note_column))
    return {"dialogue": dialogue, **note}


def read_text(columns: dict[str, object], name: str) -> str:
    """The text of one column, without the white space around it. Raises RowError."""
    if name not in columns:
        raise RowError(f"no column {name}")
    text = columns[name]
    if text is None or (isinstance(text, str) and not text.strip()):
        raise RowError(f"{name} is empty")
    if not isinstance(text, str):
        raise RowError(f"{name} is {type(text).__name__}, not text")
    if len(text) > MAX_CHARACTERS:
        raise RowError(f"{name} has more than {MAX_CHARACTERS:,} characters")
    if NO_TEXT.search(text):
        raise RowError(f"{name} holds NUL or bytes that are not UTF-8")
    return text.strip()


def digest(*texts: str) -> str:
    """64 hex digits, the same for texts that differ only in white space."""
    return hashlib.sha256("\0".join(" ".join(text.split()) for text in texts).encode()).hexdigest()


def select(
    records: dict[str, list[Record]], dialogue_column: str, note_column: str
) -> tuple[dict[str, list[Row]], list[dict]]:
    """The rows of each split that are kept, and a reject for each of the others.

    Left out are rows that cannot be read, repetitions of a row within its split (another note of the same dialogue
    is none), validation rows whose dialogue stands in test, and train rows whose dialogue stands in either.
    """
    rows: dict[str, list[Row]] = {}
    rejects = []
    held_out: dict[str, str] = {}
    with tqdm(total=sum(map(len, records.values())), desc="Reading notes", unit=" rows") as bar:
        for split in ("test", "validation", "train"):
            kept: dict[str, Row] = {}
            dialogues = {}
            for record in records.get(split, []):
                bar.update()
                try:
                    row = read_row(record, dialogue_column, note_column)
                    dialogue, whole = digest(row["dialogue"]), digest(*row.values())
                    if dialogue in held_out:
                        raise RowError(f"same dialogue in {held_out[dialogue]}")
                    if whole in kept:
                        raise RowError("same as an earlier row")
                except (RowError, prompts.NoteError) as error:
                    rejects.append({"split": split, "file": record.file, "row": record.row, "reason": str(error)})
                    continue
                kept[whole] = row
                dialogues[dialogue] = split
            held_out |= dialogues
            if split in records:
                rows[split] = list(kept.values())
    return rows, rejects


def cut(rows: list[Row], shares: dict[str, float]) -> dict[str, list[Row]]:
    """Cut splits off `rows`, each a share of the different dialogues and at least one of them; train is what remains.

    The order of the dialogues' hashes decides: equal dialogues stay together, and the order of the rows plays no part.
    """
    dialogues = sorted({digest(row["dialogue"]) for row in rows})
    split_of_dialogue = dict.fromkeys(dialogues, "train")
    start = 0
    for split, share in shares.items():
        end = start + max(1, round(share * len(dialogues)))
        split_of_dialogue |= dict.fromkeys(dialogues[start:end], split)
        start = end
    parts: dict[str, list[Row]] = {split: [] for split in ("train", *shares)}
    for row in rows:
        parts[split_of_dialogue[digest(row["dialogue"])]].append(row)
    return parts


# --- sources ---------------------------------------------------------------------------------------------------------


def read_jsonl(path: Path) -> Iterator[Record]:
    """A record for each line that is not blank. A broken line costs only itself."""
    with path.open("rb") as file:
        for row, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield Record(str(path), row, json.loads(line.decode("utf-8-sig")))
            except UnicodeDecodeError:
                yield Record(str(path), row, reason="not UTF-8")
            except (ValueError, RecursionError):
                damage = "NUL bytes, as in UTF-16 or a damaged file" if b"\0" in line else "not JSON, or cut off"
                yield Record(str(path), row, reason=damage)


def read_json(path: Path) -> Iterator[Record]:
    """A record for each object of a list. A file that does not begin with a list is read as lines of JSON."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if text.lstrip().startswith("[") else None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8; save it in that encoding") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON, or cut off ({error}); give one list of objects") from None
    if rows is None:
        return read_jsonl(path)
    return (Record(str(path), row, columns) for row, columns in enumerate(rows, 1))


def read_csv(path: Path) -> Iterator[Record]:
    """A record for each row below the header. A broken row costs only itself."""
    csv.field_size_limit(sys.maxsize)
    # Bytes that are not UTF-8 become surrogates, which read_text finds.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = None
        for row in itertools.count(1):
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Record(str(path), row, reason=f"not CSV, or cut off ({error})")
                continue
            if header is None:
                header = fields
                if NO_TEXT.search("".join(header)):
                    raise InputError(f"{path} is not UTF-8; save it in that encoding")
            elif len(fields) == len(header):
                yield Record(str(path), row, dict(zip(header, fields, strict=True)))
            elif fields:
                yield Record(str(path), row, reason="more or fewer fields than the header")


def read_parquet(path: Path) -> Iterator[Record]:
    """A record for each row."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"{path} is not Parquet, or damaged ({error}); write it again") from error
    return (Record(str(path), row, columns) for row, columns in enumerate(rows, 1))


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def read_datasets(dataset: str, saved: bool) -> dict[str, Iterable[Record]]:
    """The splits of a folder from save_to_disk, or of a dataset on the hub."""
    import datasets

    try:
        source = datasets.load_from_disk(dataset) if saved else datasets.load_dataset(dataset)
        splits = {"train": source} if isinstance(source, datasets.Dataset) else source
        return {
            f"{dataset}/{split}": [
                Record(f"{dataset}/{split}", row, columns) for row, columns in enumerate(rows.with_format(None), 1)
            ]
            for split, rows in splits.items()
        }
    except Exception as error:  # a damaged folder or a wrong name raises whatever the library trips over
        mend = "write it again" if saved else "check the name and the network, or give a file or folder as --dataset"
        raise InputError(f"cannot load {dataset} ({type(error).__name__}: {error}); {mend}") from error


def read_source(dataset: str) -> dict[str, list[Record]]:
    """The records of each split; a source of one split has it as train. Raises InputError, OSError."""
    path = Path(dataset)
    local = path.exists() or path.suffix.lower() in READERS or dataset.startswith((".", "/", "~"))
    if not dataset:
        raise InputError("--dataset is empty; give a file, a folder or a name on the hub")
    if local and not path.exists():
        raise InputError(f"{dataset} does not exist; give a file, a folder or a name on the hub as --dataset")
    saved = any((path / name).exists() for name in ("dataset_dict.json", "state.json"))
    if saved or not local:
        parts = read_datasets(dataset, saved)
    else:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        kinds = {file: READERS.get(file.suffix.lower()) for file in files if file.is_file()}
        parts = {str(file): reader(file) for file, reader in kinds.items() if reader}
    if not parts:
        raise InputError(f"{dataset} is no {', '.join(READERS)} file, no folder of them, and none from save_to_disk")
    if len(parts) == 1:
        return {"train": list(*parts.values())}
    records: dict[str, list[Record]] = {}
    for name, part in parts.items():
        words = set(re.split(r"[^a-z]+", Path(name).stem.lower())) & SPLIT_WORDS.keys()
        if len(words) != 1:
            raise InputError(f"{name} is not named by one split; name it train, validation or test")
        records.setdefault(SPLIT_WORDS[words.pop()], []).extend(part)
    if "train" not in records:
        raise InputError(f"{dataset} has {' and '.join(records)}, but no train; add it, or give one of them alone")
    return records


# --- output ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Give a new folder that takes the place of `output`, in one step, when the block ends without an error.

    It grows in `<output>.partial`, which holds a lock, too. A run that is killed leaves `output` as it was; the next
    run clears up. Raises InputError when `output` is something else than a dataset of this script, or is being written.
    """
    work = output.parent / f"{output.name}.partial"
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(lock.fileno()).st_nlink > 0  # 0: the run that held it has just removed it
        except BlockingIOError:
            held = False
        if not held:
            raise InputError(f"another run is writing {output}; wait for its end, or choose another --output_dir")
        clear(work, output)
        try:
            if output.exists() and not is_replaceable(output):
                raise InputError(f"{output} is there and is no dataset of this script; choose another --output_dir")
            new = work / "new"
            new.mkdir()
            yield new
            if not output.exists():
                new.rename(output)
            elif not exchange(new, output):
                output.rename(work / "old")
                new.rename(output)
        finally:
            clear(work, output)
            (work / "lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another run may have begun
                work.rmdir()


def clear(work: Path, output: Path) -> None:
    """Remove what a run leaves in its work folder. The old dataset goes back if nothing has taken its place."""
    if (work / "old").exists() and not output.exists():
        (work / "old").rename(output)
    for name in ("new", "old"):
        shutil.rmtree(work / name, ignore_errors=True)


def is_replaceable(output: Path) -> bool:
    """Whether `output` is an empty folder, or holds what this script writes and nothing else."""
    return output.is_dir() and {path.name for path in output.iterdir()} in (set(), OUTPUT_NAMES)


def exchange(first: Path, second: Path) -> bool:
    """Let two folders swap their names in one step (Linux's renameat2). False where system or file system cannot."""
    at_fdcwd, rename_exchange = -100, 2  # from linux/fcntl.h and linux/fs.h
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0


def write(folder: Path, rows: dict[str, list[Row]], rejects: list[dict]) -> None:
    """Write the dataset and its rejects; the same rows give the same bytes."""
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    schema = pyarrow.schema([(column, pyarrow.string()) for column in COLUMNS])
    splits = {}
    for split in SPLITS:
        table = pyarrow.Table.from_pylist(rows[split], schema=schema)
        splits[split] = datasets.Dataset(table, split=split, fingerprint=fingerprint(rows[split]))
    datasets.DatasetDict(splits).save_to_disk(folder)
    with (folder / REJECTS).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(reject) + "\n" for reject in rejects)


def fingerprint(rows: list[Row]) -> str:
    """16 hex digits that change with any character, so that caches of datasets are never stale.

    The library's own would pickle the whole table, which doubles the memory of a run.
    """
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps(row).encode())
    return content.hexdigest()[:16]


# --- command line ----------------------------------------------------------------------------------------------------


def preprocess(options: argparse.Namespace) -> tuple[dict[str, list[Row]], list[dict]]:
    """Read, select, cut and write; returns the rows written and the rejects. Raises InputError, OSError."""
    shares = {"validation": options.validation_fraction, "test": options.test_fraction}
    if not (min(shares.values()) > 0 and sum(shares.values()) < 1):
        raise InputError("--validation_fraction and --test_fraction must each be above 0, and together below 1")
    with replacing(Path(os.path.realpath(options.output_dir))) as folder:
        try:
            records = read_source(options.dataset)
        except OSError as error:
            where = error.filename or options.dataset
            raise InputError(
                f"cannot read {where}: {error.strerror or error}; mend that, or give another --dataset"
            ) from error
        rows, rejects = select(records, options.dialogue_column, options.note_column)
        for split in rows:
            if not rows[split]:
                raise nothing_left(options.dataset, split, rejects)
        rows |= cut(rows["train"], {split: share for split, share in shares.items() if split not in rows})
        if not rows["train"]:
            raise InputError(f"{options.dataset} has too few dialogues to cut three splits; give it more rows")
        write(folder, rows, rejects)
    return rows, rejects


def nothing_left(dataset: str, split: str, rejects: list[dict]) -> InputError:
    """The error for a split without a row to keep: the commonest reason, and where it is first met."""
    rejects = [reject for reject in rejects if reject["split"] == split]
    if not rejects:
        return InputError(f"{dataset} has no rows for {split}; give a source that has some")
    reason, count = Counter(reject["reason"] for reject in rejects).most_common(1)[0]
    first = next(reject for reject in rejects if reject["reason"] == reason)
    return InputError(
        f"{dataset} has no row to keep for {split}: {reason} in {count} of {len(rejects)} rows, first in "
        f"{first['file']}:{first['row']}; mend them, or name the columns with --dialogue_column and --note_column"
    )


def summary(rows: dict[str, list[Row]], rejects: list[dict]) -> str:
    """Rows in, dropped by reason, and kept by split: one line each, numbers first."""
    kept = {split: len(rows[split]) for split in SPLITS}
    reasons = Counter(reject["reason"] for reject in rejects)
    return "\n".join(
        [
            f"{sum(kept.values()) + len(rejects):7,} rows in",
            f"{len(rejects):7,} dropped",
            *(f"{count:11,} {reason}" for reason, count in reasons.most_common()),
            f"{sum(kept.values()):7,} kept",
            *(f"{count:11,} {split}" for split, count in kept.items()),
        ]
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag: str, default: object, text: str) -> None:
        parser.add_argument(flag, default=default, type=type(default), help=f"{text} (default: %(default)s)")

    add("--dataset", "omi-health/medical-dialogue-to-soap-summary", "file, folder, or name on the Hugging Face hub")
    add("--output_dir", "./soap_dataset", "folder to write or to replace")
    add("--dialogue_column", "dialogue", "column with the dialogue")
    add("--note_column", "soap", "column with the note, unless there are columns S, O, A and P")
    add("--validation_fraction", 0.1, "share of the train dialogues to cut off where the source has no validation")
    add("--test_fraction", 0.1, "share of the train dialogues to cut off where the source has no test")
    return parser


def fail(problem: str, status: int = 2) -> int:
    """Print one line, whatever line breaks a library put into it."""
    print("error:", *problem.split(), file=sys.stderr)
    return status


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    os.umask(0o077)  # dialogues are patients' words: the output and the hub's cache are for the owner alone
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold any byte
    print(*(f"{name}={value}" for name, value in vars(options).items()), flush=True)
    try:
        rows, rejects = preprocess(options)
    except InputError as error:
        return fail(str(error))
    except OSError as error:
        reason = error.strerror or error
        return fail(f"cannot write {options.output_dir}: {reason}; mend that, or choose another --output_dir")
    except KeyboardInterrupt:
        return fail("interrupted; run the same command again", status=130)
    print(f"wrote {options.output_dir}; rows left out: {Path(options.output_dir) / REJECTS}")
    print(summary(rows, rejects))
    return 0


if __name__ == "__main__":
    sys.exit(main())
