"""Read files, folders and datasets from the hub as records, by split."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from preprocessing.chats import NOTE_SUFFIX, is_note_file, read_text_visits
from preprocessing.tables import READERS, ColumnCheck, Record, column_names, read_table

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")
SPLIT_WORDS = dict(zip(SPLITS, SPLITS, strict=True)) | dict.fromkeys(("valid", "val", "dev"), "validation")
# Suffixes of files that may contain rows, and how to make them readable.
UNREADABLE = (
    dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar"), "unpack it")
    | dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as CSV UTF-8")
    | dict.fromkeys((".arrow", ".feather"), "write it as Parquet")
)

Tables = dict[str, list[Record]]  # by the name of the file or split
Splits = dict[str, list[Record]]  # by train, validation and test


def read_source(dataset: str, is_usable: ColumnCheck) -> tuple[Splits, list[str]]:
    """Return the records of each split, and lines that say which files were read. Raises UserError, OSError.

    A source with a single table has only train. `is_usable` decides by its columns whether a table has dialogues and
    notes.
    """
    path = Path(dataset)
    is_file_name = path.suffix.lower() in READERS | UNREADABLE
    local = path.exists() or is_file_name or dataset.startswith((".", "/", "~"))
    if not dataset:
        raise UserError("--dataset is empty; give a file, a folder or a name on the hub")
    if local and not path.exists():
        raise UserError(f"{dataset} does not exist; give a file, a folder or a name on the hub as --dataset")
    saved = any((path / name).exists() for name in ("dataset_dict.json", "state.json"))
    if saved or not local:
        return read_datasets(dataset, saved)
    if path.is_dir():
        return read_folder(path, is_usable)
    if path.suffix.lower() not in READERS:
        raise unreadable_source(path)
    return {"train": read_table(path, is_usable)}, []


def unreadable_source(path: Path) -> UserError:
    """Return the error for a file that has another suffix, or for a folder without a readable file."""
    remedy = UNREADABLE.get(path.suffix.lower(), "give one of these")
    return UserError(
        f"{path} is not a {', '.join(READERS)} file, a folder of such files or of text files NAME.txt and "
        f"NAME{NOTE_SUFFIX}, or a folder from save_to_disk; {remedy}"
    )


# --- folders ---------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, is_usable: ColumnCheck) -> tuple[Splits, list[str]]:
    """Return the tables in a folder and below it, by split, and lines that name each split's files and skipped files.

    A table without columns for dialogue and note is skipped, or rejected with a UserError if its name is a split's.
    """
    names = [path.relative_to(folder) for path in walk_files(folder)]
    saved = sorted({name.parent for name in names if name.name == "dataset_dict.json"})
    names = [name for name in names if not any(name.is_relative_to(other) for other in saved)]
    readable = [name for name in names if name.suffix.lower() in READERS]
    packed = [name for name in names if name.suffix.lower() in UNREADABLE]
    visits = [name for name in names if name.suffix.lower() == ".txt"] if any(map(is_note_file, names)) else []
    if visits and not readable:
        return read_text_folder(folder, visits)
    if not readable:
        raise unreadable_source(folder / packed[0] if packed else folder)
    for name in packed:
        if splits_of(str(name)):
            raise UserError(
                f"{folder / name} cannot be read; {UNREADABLE[name.suffix.lower()]}, or move it out of the folder"
            )
    tables = {str(name): read_table(folder / name, is_usable) for name in readable}
    if visits and not any(may_have_notes(table, is_usable) for table in tables.values() if table):
        records, lines = read_text_folder(folder, visits)
        return records, lines + [
            f"skipped: {folder / name}, which does not contain dialogues and notes" for name in tables
        ]
    tables, lines = select_note_tables(folder, tables, is_usable)
    tables = join_single_visits(tables)
    lines += [f"skipped: {folder / name}, a separate dataset; to read it, give it as --dataset" for name in saved]
    lines += [f"skipped: {folder / name}; if it is data, {UNREADABLE[name.suffix.lower()]}" for name in packed]
    suffixes = Counter(name.suffix.lower() or "without a suffix" for name in names)
    others = [f"{count} {suffix}" for suffix, count in suffixes.items() if suffix not in READERS | UNREADABLE]
    if others:
        lines.append(f"skipped in {folder}: {', '.join(others)}")
    records = by_split(str(folder), tables)
    for split in sorted(records, key=SPLITS.index):
        files = [name for name in tables if len(tables) == 1 or split in splits_of(name)]
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        lines.append(f"{split}: {', '.join(files[:3])}{more}")
    return records, lines


def read_text_folder(folder: Path, names: list[Path]) -> tuple[Splits, list[str]]:
    """Return the visits in text files by split, and a line with each split's number of visits.

    A folder's name may mean a split; if none does, all visits are train. Raises UserError.
    """
    tables = read_text_visits(folder, names)
    beside = [name for name in tables if not splits_of(name)]
    if beside and len(beside) < len(tables):
        raise UserError(
            f"{folder} has text files in folders named after a split and in {folder / beside[0]}; move all of them "
            f"into folders named {', '.join(SPLITS)}, or none"
        )
    if beside:
        tables = {"": [record for table in tables.values() for record in table]}
    records = by_split(str(folder), tables)
    return records, [f"{split}: {len(visits)} visits in text files" for split, visits in records.items()]


def join_single_visits(tables: Tables) -> Tables:
    """Join the tables into one if each is a single row and none is named after a split: a file for each visit."""
    if len(tables) < 2 or any(len(table) != 1 or splits_of(name) for name, table in tables.items()):
        return tables
    return {f"{len(tables)} files of one visit each": [record for [record] in tables.values()]}


def walk_files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the files in a folder and below it, in order, except hidden ones and links to a folder above."""
    if folder.resolve() in above:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from walk_files(path, (*above, folder.resolve()))
        else:
            yield path


def select_note_tables(folder: Path, tables: Tables, is_usable: ColumnCheck) -> tuple[Tables, list[str]]:
    """Return the tables that may have notes, and a line for each other one. Raises UserError.

    A table has no notes if it has readable rows and not one of them has the columns for dialogue and note. A file
    without rows is skipped, too, unless its name is a split's.
    """
    empty = [name for name, table in tables.items() if not table and not splits_of(name)]
    other = [name for name, table in tables.items() if table and not may_have_notes(table, is_usable)]
    if len(tables) == 1 or not (empty or other):
        return tables, []
    if len(empty) + len(other) == len(tables):
        largest = max(tables, key=lambda name: len(tables[name]))
        raise UserError(
            f"no table in {folder} contains dialogues and notes; in {largest}, {column_advice(tables[largest])}"
        )
    for name in other:
        if splits := splits_of(name):
            raise UserError(
                f"{folder / name} is named {' and '.join(splits)}, but does not contain dialogues and notes; move it "
                f"out of the folder, or if it does, {column_advice(tables[name])}"
            )
    lines = [f"skipped: {folder / name}, which has no rows" for name in empty]
    for name in other:
        columns = ", ".join(map(str, column_names(tables[name])[:20])) or "none"
        lines.append(f"skipped: {folder / name}, which does not contain dialogues and notes: its columns are {columns}")
    return {name: table for name, table in tables.items() if name not in {*empty, *other}}, lines


def may_have_notes(records: list[Record], is_usable: ColumnCheck) -> bool:
    """Return whether a row has the columns for dialogue and note, or no row can be read."""
    if any(isinstance(record.columns, dict) and is_usable(record.columns) for record in records):
        return True
    return all(record.reason for record in records)


def column_advice(records: list[Record]) -> str:
    """Return the end of an error message: the columns that exist, and how to choose those to read."""
    return (
        f"the columns are {', '.join(map(str, column_names(records)[:20])) or 'none'}: choose two with "
        "--dialogue_column and --note_column, or rename four to S, O, A and P"
    )


# --- splits ----------------------------------------------------------------------------------------------------------


def split_words(name: str) -> set[str]:
    """Return the words in a name that mean a split."""
    return set(re.split(r"[^a-z]+", name.lower())) & SPLIT_WORDS.keys()


def splits_of(name: str) -> list[str]:
    """Return the splits that the words in a name mean."""
    return sorted({SPLIT_WORDS[word] for word in split_words(name)})


def by_split(dataset: str, tables: Tables) -> Splits:
    """Return the records of each split; a single table is train unless it is named validation or test.

    Raises UserError if a name does not mean exactly one split, and if train is missing.
    """
    if len(tables) == 1 and splits_of(next(iter(tables))) not in (["validation"], ["test"]):
        return {"train": next(iter(tables.values()))}
    records: dict[str, list[Record]] = {}
    words: dict[str, set[str]] = {}
    for name, table in tables.items():
        splits = splits_of(name)
        if len(splits) != 1:
            raise UserError(
                f"{name} in {dataset}: its name must contain exactly one split ({', '.join(SPLIT_WORDS)}); rename it, "
                "or give one file as --dataset"
            )
        split = splits[0]
        words[split] = words.get(split, split_words(name)) & split_words(name)
        if not words[split]:
            raise UserError(
                f"{dataset} names {split} by different words, here in {name}; use the same word for all its files"
            )
        records.setdefault(split, []).extend(table)
    if "train" not in records:
        raise UserError(
            f"{dataset} has {' and '.join(records)}, but no train; add train, or give one file as --dataset"
        )
    return records


# --- datasets --------------------------------------------------------------------------------------------------------


def named_classes(rows: "datasets.Dataset") -> Iterator[dict[str, object]]:
    """Yield the columns of each row, with names in place of the numbers of classes; -1, a missing class, is None."""
    import datasets

    names = {column: kind.names for column, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
    for columns in rows.with_format(None):
        classes = ((column, columns[column]) for column in names)
        yield columns | {column: None if n is None or n < 0 else names[column][n] for column, n in classes}


def read_datasets(dataset: str, saved: bool) -> tuple[Splits, list[str]]:
    """Return the splits of a folder from save_to_disk, or of a dataset on the hub; a single split becomes train."""
    import datasets

    try:
        source = datasets.load_from_disk(dataset) if saved else datasets.load_dataset(dataset)
        splits = {"train": source} if isinstance(source, datasets.Dataset) else source
        tables = {
            split: [Record(f"{dataset}/{split}", row, columns) for row, columns in enumerate(named_classes(rows), 1)]
            for split, rows in splits.items()
        }
    except Exception as error:  # a damaged folder or a wrong name raises whatever the library trips over
        remedy = "save it again" if saved else "no file or folder has that name: check the name and the network"
        raise UserError(f"cannot load {dataset} ({type(error).__name__}: {error}); {remedy}") from error
    if len(tables) == 1 and "train" not in tables:
        (split, records), *_ = tables.items()
        return {"train": records}, [f"{dataset} has only the split {split}: validation and test are held out from it"]
    return by_split(dataset, tables), []
