"""Turn pairs of a medical dialogue and a SOAP note into the dataset that train.py and eval.py read.

Input: a dataset on the Hugging Face hub, a .jsonl, .json, .csv or .parquet file, a folder of such files named by split
(train.jsonl, val.csv, data/test-00000-of-00001.parquet), or a folder from save_to_disk. Notes stand in one column under
headings S, O, A and P, as a JSON object with these keys, or in four columns of these names, letters or whole words.
Output: a DatasetDict with train, validation and test and the text columns dialogue, S, O, A and P; beside the splits
rejects.jsonl, one line for each row left out, with file, row and reason. Only its owner can read the folder.

    python preprocess_data.py
    python preprocess_data.py --dataset demo/dialogues.jsonl --output_dir demo/build/soap_dataset
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import prompts
from preprocessing import InputError
from preprocessing.headings import SectionMap, read_section_map, read_soap
from preprocessing.replacing import replacing
from preprocessing.sources import NO_TEXT, SPLITS, Record, read_source

COLUMNS = ("dialogue", *prompts.SECTIONS)
REJECTS = "rejects.jsonl"
OUTPUT_NAMES = {*SPLITS, "dataset_dict.json", REJECTS}

# Far above a long visit, and it keeps the 1,000 rows that datasets writes at once below Arrow's 2 GiB of text.
MAX_CHARACTERS = 500_000
MANY_REJECTS = 0.2  # share of the rows from which on a word is due

Row = dict[str, str]


class RowError(ValueError):
    """Why a row is left out; the message never quotes the row."""


# --- rows ------------------------------------------------------------------------------------------------------------


def read_row(record: Record, dialogue_column: str, note_column: str, section_map: SectionMap | None = None) -> Row:
    """The columns of the output. Four columns of sections go before the note's column. Raises RowError, NoteError."""
    if record.reason:
        raise RowError(record.reason)
    if not isinstance(record.columns, dict):
        raise RowError(f"{type(record.columns).__name__} where an object was expected")
    dialogue = read_text(record.columns, dialogue_column)
    note = read_sections(record.columns) or read_note_column(record.columns, note_column, section_map)
    return {"dialogue": dialogue, **note}


def read_sections(columns: dict[str, object]) -> Row | None:
    """The note in columns named S, O, A and P or Subjective to Plan, in capitals or not; None unless all are there."""
    names = section_columns(columns)
    if len(names) < len(prompts.SECTIONS):
        return None
    return {section: read_text(columns, name) for section, name in names.items()}


def section_columns(columns: dict[str, object]) -> dict[str, str]:
    """The column of each section that has one: named by the letter, else by the word."""
    names = {str(name).strip().lower(): name for name in columns}
    return {
        section: names[spelling]
        for section, word in prompts.SECTION_NAMES.items()
        for spelling in (word.lower(), section.lower())
        if spelling in names
    }


def read_note_column(columns: dict[str, object], name: str, section_map: SectionMap | None = None) -> Row:
    """The note in one column: under headings, or as an object or JSON text with a key for each section."""
    if isinstance(columns.get(name), dict) and (note := read_sections(columns[name])):
        return note
    text = read_text(columns, name)
    if not text.startswith("{"):
        return read_soap(text, section_map)
    value = prompts.read_object(text)
    sections = {section: value[key] for section, key in section_columns(value).items()}
    return read_sections(prompts.note_from(sections | value))


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
    records: dict[str, list[Record]], dialogue_column: str, note_column: str, section_map: SectionMap | None = None
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
                    row = read_row(record, dialogue_column, note_column, section_map)
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


# --- output --------------------------------------------------------------------------------------------------------


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
    section_map = read_section_map(Path(options.section_map)) if options.section_map else None
    with replacing(Path(os.path.realpath(options.output_dir)), OUTPUT_NAMES) as folder:
        try:
            records = read_source(options.dataset)
        except OSError as error:
            where = error.filename or options.dataset
            raise InputError(
                f"cannot read {where}: {error.strerror or error}; mend that, or give another --dataset"
            ) from error
        rows, rejects = select(records, options.dialogue_column, options.note_column, section_map)
        for split in rows:
            if not rows[split]:
                raise nothing_left(options.dataset, split, records[split], rejects)
        rows |= cut(rows["train"], {split: share for split, share in shares.items() if split not in rows})
        if not rows["train"]:
            raise InputError(f"{options.dataset} has too few dialogues to cut three splits; give it more rows")
        write(folder, rows, rejects)
    return rows, rejects


def nothing_left(dataset: str, split: str, records: list[Record], rejects: list[dict]) -> InputError:
    """The error for a split without a row to keep: the commonest reason, where it is first met, and what to do."""
    rejects = [reject for reject in rejects if reject["split"] == split]
    if not rejects:
        return InputError(f"{dataset} has no rows for {split}; give a source that has some")
    reason, count = Counter(reject["reason"] for reject in rejects).most_common(1)[0]
    first = next(reject for reject in rejects if reject["reason"] == reason)
    mend = "mend them"
    if reason.startswith("no column"):
        names = dict.fromkeys(name for record in records if isinstance(record.columns, dict) for name in record.columns)
        mend = (
            f"the columns are {', '.join(list(names)[:20]) or 'none'}: say with --dialogue_column and --note_column "
            "which to read, or name four of them S, O, A and P"
        )
    return InputError(
        f"{dataset} has no row to keep for {split}: {reason} in {count} of {len(rejects)} rows, first in "
        f"{first['file']}:{first['row']}; {mend}"
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
    add("--section_map", "", 'JSON file with further headings of notes, such as {"Impression": "A"}')
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
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # or each vain try to reach the hub is a line
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
    if len(rejects) > MANY_REJECTS * (len(rejects) + sum(map(len, rows.values()))):
        print("warning: many rows were left out; are the reasons above what you expect?", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
