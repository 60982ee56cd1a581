"""Files, folders and datasets of the hub -> records, by split."""

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from preprocessing import InputError

SPLITS = ("train", "validation", "test")
SPLIT_WORDS = dict(zip(SPLITS, SPLITS, strict=True)) | dict.fromkeys(("valid", "val", "dev"), "validation")
NO_TEXT = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    """A row as its source has it, or why it cannot be read. Rows count from 1; a CSV header is row 1."""

    file: str
    row: int
    columns: object = None
    reason: str | None = None


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
    """A record for each object of a list, which may be all that an object holds. Else the file is lines of JSON."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text)
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8; save it in that encoding") from None
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise InputError(f"{path} is not JSON, or cut off ({error}); give one list of objects") from None
        return read_jsonl(path)
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list)]
        value = lists[0] if len(lists) == 1 else [value]
    rows = value if isinstance(value, list) else [value]
    return (Record(str(path), row, columns) for row, columns in enumerate(rows, 1))


def read_csv(path: Path) -> Iterator[Record]:
    """A record for each row below the header; fields end at commas, semicolons or tabs.

    Excel writes semicolons where the comma is the decimal mark. A broken row costs only itself, but for a quote that is
    not closed: the lines up to the next quote go with it, and the reason names them. Raises InputError for the header.
    """
    csv.field_size_limit(sys.maxsize)
    # Bytes that are not UTF-8 become surrogates, which no text column may hold.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        delimiter = max(",;\t", key=file.readline().count)
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = None
        for row in itertools.count(1):
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if header is None:
                    raise InputError(f"{path}: the header is not CSV ({error}); mend it") from None
                lines = f", lines {line} to {reader.line_num} of the file" if reader.line_num > line else ""
                yield Record(str(path), row, reason=f"not CSV, or cut off ({error}){lines}")
                continue
            if not fields:  # a blank line
                continue
            if header is None:
                header = fields
                if NO_TEXT.search("".join(header)):
                    raise InputError(f"{path} is not UTF-8; save it in that encoding")
            elif len(fields) == len(header):
                yield Record(str(path), row, dict(zip(header, fields, strict=True)))
            else:
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


def read_files(path: Path) -> dict[str, Iterable[Record]]:
    """The file, or the files of the folder and of those in it, by their names below it."""
    if path.is_file():
        return {path.name: READERS[path.suffix.lower()](path)} if path.suffix.lower() in READERS else {}
    names = (file.relative_to(path) for file in sorted([*path.glob("*"), *path.glob("*/*")]) if file.is_file())
    return {
        str(name): READERS[name.suffix.lower()](path / name)
        for name in names
        if name.suffix.lower() in READERS and not str(name).startswith(".")
    }


def read_datasets(dataset: str, saved: bool) -> dict[str, Iterable[Record]]:
    """The splits of a folder from save_to_disk, or of a dataset on the hub."""
    import datasets

    try:
        source = datasets.load_from_disk(dataset) if saved else datasets.load_dataset(dataset)
        splits = {"train": source} if isinstance(source, datasets.Dataset) else source
        return {
            split: [Record(f"{dataset}/{split}", row, columns) for row, columns in enumerate(rows.with_format(None), 1)]
            for split, rows in splits.items()
        }
    except Exception as error:  # a damaged folder or a wrong name raises whatever the library trips over
        mend = "write it again" if saved else "no file or folder has that name: check the name and the network"
        raise InputError(f"cannot load {dataset} ({type(error).__name__}: {error}); {mend}") from error


def read_source(dataset: str) -> dict[str, list[Record]]:
    """The records of each split; a source of one part has it as train. Raises InputError, OSError."""
    path = Path(dataset)
    local = path.exists() or path.suffix.lower() in READERS or dataset.startswith((".", "/", "~"))
    if not dataset:
        raise InputError("--dataset is empty; give a file, a folder or a name on the hub")
    if local and not path.exists():
        raise InputError(f"{dataset} does not exist; give a file, a folder or a name on the hub as --dataset")
    saved = any((path / name).exists() for name in ("dataset_dict.json", "state.json"))
    parts = read_datasets(dataset, saved) if saved or not local else read_files(path)
    if not parts:
        raise InputError(f"{dataset} is no {', '.join(READERS)} file, no folder of them, and none from save_to_disk")
    if len(parts) == 1:
        return {"train": list(*parts.values())}
    records: dict[str, list[Record]] = {}
    for name, part in parts.items():
        words = set(re.split(r"[^a-z]+", name.lower())) & SPLIT_WORDS.keys()
        if len(words) != 1:
            raise InputError(
                f"{name} in {dataset} is not named by one split, which is one of {', '.join(SPLIT_WORDS)}; "
                "rename it, or give one file as --dataset"
            )
        records.setdefault(SPLIT_WORDS[words.pop()], []).extend(part)
    if "train" not in records:
        raise InputError(f"{dataset} has {' and '.join(records)}, but no train; add it, or give one of them alone")
    return records
