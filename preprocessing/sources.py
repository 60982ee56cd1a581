"""Files, folders and datasets of the hub -> records, by split."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from preprocessing.tables import READERS, Holds, Record, column_names, read_table

SPLITS = ("train", "validation", "test")
SPLIT_WORDS = dict(zip(SPLITS, SPLITS, strict=True)) | dict.fromkeys(("valid", "val", "dev"), "validation")
# Files that may hold rows, and how to make them readable.
UNREADABLE = (
    dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar"), "unpack it")
    | dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as CSV UTF-8")
    | dict.fromkeys((".arrow", ".feather"), "write it as Parquet")
)

Parts = dict[str, list[Record]]


def read_source(dataset: str, holds: Holds) -> tuple[dict[str, list[Record]], list[str]]:
    """The records of each split, and lines that tell of a folder's files. Raises UserError, OSError.

    A source of one part has it as train. `holds` tells whether a table with given columns has dialogues and notes.
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
        return read_folder(path, holds)
    if path.suffix.lower() not in READERS:
        raise unreadable(path)
    return {"train": read_table(path, holds)}, []


def unreadable(path: Path) -> UserError:
    remedy = UNREADABLE.get(path.suffix.lower())
    remedy = f"; {remedy}" if remedy else ""
    return UserError(f"{path} is no {', '.join(READERS)} file, no folder of them, and none from save_to_disk{remedy}")


# --- folders ---------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, holds: Holds) -> tuple[dict[str, list[Record]], list[str]]:
    """The tables in a folder and below it, by split; the lines name each split's files and whatever is left unread.

    A table without the columns of a dialogue and a note is left unread if no split names it, and refused if one does.
    """
    names = [path.relative_to(folder) for path in files_below(folder)]
    saved = sorted({name.parent for name in names if name.name == "dataset_dict.json"})
    names = [name for name in names if not any(name.is_relative_to(other) for other in saved)]
    tables = [name for name in names if name.suffix.lower() in READERS]
    packed = [name for name in names if name.suffix.lower() in UNREADABLE]
    if not tables:
        raise unreadable(folder / packed[0] if packed else folder)
    for name in packed:
        if splits_of(str(name)):
            raise UserError(f"{folder / name} cannot be read; {UNREADABLE[name.suffix.lower()]}, or move it elsewhere")
    parts = {str(name): read_table(folder / name, holds) for name in tables}
    parts, lines = leave_out_other_tables(folder, parts, holds)
    lines += [f"left unread: {folder / name}, a dataset of its own; to read it, give it as --dataset" for name in saved]
    lines += [f"left unread: {folder / name}; if it is data, {UNREADABLE[name.suffix.lower()]}" for name in packed]
    kinds = Counter(name.suffix.lower() or "without a suffix" for name in names)
    kinds = [f"{count} {kind}" for kind, count in kinds.items() if kind not in READERS | UNREADABLE]
    if kinds:
        lines.append(f"left unread in {folder}: {', '.join(kinds)}")
    records = by_split(str(folder), parts)
    for split in sorted(records, key=SPLITS.index):
        files = [name for name in parts if len(parts) == 1 or split in splits_of(name)]
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        lines.append(f"{split}: {', '.join(files[:3])}{more}")
    return records, lines


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files in a folder and below it, in order, without hidden ones; a link to a folder above is not followed."""
    if folder.resolve() in above:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from files_below(path, (*above, folder.resolve()))
        else:
            yield path


def leave_out_other_tables(folder: Path, parts: Parts, holds: Holds) -> tuple[Parts, list[str]]:
    """The parts without tables of something else, and a line for each of these. Raises UserError.

    A table is of something else if it has rows that can be read, and none with the columns of a dialogue and a note.
    A file without rows is left out, too, unless a split names it.
    """
    empty = [name for name, part in parts.items() if not part and not splits_of(name)]
    other = [name for name, part in parts.items() if part and not may_hold(part, holds)]
    if len(parts) == 1 or not (empty or other):
        return parts, []
    if len(empty) + len(other) == len(parts):
        largest = max(parts, key=lambda name: len(parts[name]))
        raise UserError(f"no table in {folder} holds dialogues and notes; in {largest}, {how_to_name(parts[largest])}")
    for name in other:
        if splits := splits_of(name):
            raise UserError(
                f"{folder / name} is named {' and '.join(splits)}, but does not hold dialogues and notes; move it out "
                f"of the folder, or if it does, {how_to_name(parts[name])}"
            )
    lines = [f"left unread: {folder / name}, which has no rows" for name in empty]
    for name in other:
        columns = ", ".join(map(str, column_names(parts[name])[:20])) or "none"
        lines.append(
            f"left unread: {folder / name}, which does not hold dialogues and notes: its columns are {columns}"
        )
    return {name: part for name, part in parts.items() if name not in {*empty, *other}}, lines


def may_hold(records: list[Record], holds: Holds) -> bool:
    """Whether a row has the columns of a dialogue and a note, or no row can be read."""
    if any(isinstance(record.columns, dict) and holds(record.columns) for record in records):
        return True
    return all(record.reason for record in records)


def how_to_name(records: list[Record]) -> str:
    """The columns there are, and how to make known which of them to read."""
    return (
        f"the columns are {', '.join(map(str, column_names(records)[:20])) or 'none'}: say with --dialogue_column and "
        "--note_column which to read, or name four of them S, O, A and P"
    )


# --- splits ----------------------------------------------------------------------------------------------------------


def split_words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower())) & SPLIT_WORDS.keys()


def splits_of(name: str) -> list[str]:
    """The splits that the words of a name stand for."""
    return sorted({SPLIT_WORDS[word] for word in split_words(name)})


def by_split(dataset: str, parts: Parts) -> dict[str, list[Record]]:
    """The records of each split; one part that no other split names is train. Raises UserError."""
    if len(parts) == 1 and splits_of(next(iter(parts))) not in (["validation"], ["test"]):
        return {"train": next(iter(parts.values()))}
    records: dict[str, list[Record]] = {}
    words: dict[str, set[str]] = {}
    for name, part in parts.items():
        splits = splits_of(name)
        if len(splits) != 1:
            raise UserError(
                f"{name} in {dataset} is not named by one split, which is one of {', '.join(SPLIT_WORDS)}; "
                "rename it, or give one file as --dataset"
            )
        split = splits[0]
        words[split] = words.get(split, split_words(name)) & split_words(name)
        if not words[split]:
            raise UserError(
                f"{dataset} has more than one {split}, one of them {name}; give all its files the same word for it"
            )
        records.setdefault(split, []).extend(part)
    if "train" not in records:
        raise UserError(f"{dataset} has {' and '.join(records)}, but no train; add it, or give one of them alone")
    return records


# --- datasets --------------------------------------------------------------------------------------------------------


def read_datasets(dataset: str, saved: bool) -> tuple[dict[str, list[Record]], list[str]]:
    """The splits of a folder from save_to_disk, or of a dataset on the hub; one split alone becomes train."""
    import datasets

    try:
        source = datasets.load_from_disk(dataset) if saved else datasets.load_dataset(dataset)
        splits = {"train": source} if isinstance(source, datasets.Dataset) else source
        parts = {
            split: [Record(f"{dataset}/{split}", row, columns) for row, columns in enumerate(rows.with_format(None), 1)]
            for split, rows in splits.items()
        }
    except Exception as error:  # a damaged folder or a wrong name raises whatever the library trips over
        remedy = "write it again" if saved else "no file or folder has that name: check the name and the network"
        raise UserError(f"cannot load {dataset} ({type(error).__name__}: {error}); {remedy}") from error
    if len(parts) == 1 and "train" not in parts:
        (split, records), *_ = parts.items()
        return {"train": records}, [f"{dataset} has no split but {split}: validation and test are held out from it"]
    return by_split(dataset, parts), []
