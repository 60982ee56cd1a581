"""Convert pairs of a medical dialogue and a SOAP note into the dataset that train.py and eval.py read.

Input: a dataset on the Hugging Face hub, a .jsonl, .json, .csv, .tsv or .parquet file, a folder of such files named by
split (train.jsonl, val.csv, data/test-00000-of-00001.parquet), or a folder from save_to_disk. A note is one column of
text under the headings S, O, A and P, one column with a JSON object of these keys, or four columns of these names.
Names are letters or whole words; a section may be a list of strings. A row may be a chat instead, in a column messages
or conversations, and a folder may have two text files for each visit, NAME.txt and NAME.note.txt.
Output: a DatasetDict with the splits train, validation and test and the text columns dialogue, S, O, A and P, followed
by those of --keep_column. Beside the splits, rejects.jsonl lists file, row and reason of each rejected row. Only the
owner can read these files.

    python preprocess_data.py
    python preprocess_data.py --dataset demo/dialogues.jsonl --output_dir demo/build/soap_dataset
"""

import argparse
import functools
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from common.dataset import COLUMNS, Row
from common.errors import UserError
from common.replacing import replacing
from preprocessing.kept_columns import add_columns, check_names, check_source
from preprocessing.labels import read_section_map
from preprocessing.near_duplicates import find_near_duplicates
from preprocessing.rows import has_note_columns
from preprocessing.sources import SPLITS, column_advice, read_source
from preprocessing.splits import drop_near_duplicates, hold_out, select
from preprocessing.tables import ColumnCheck, Record

REJECTS = "rejects.jsonl"
OUTPUT_NAMES = {*SPLITS, "dataset_dict.json", REJECTS}
WARN_ABOVE = 0.2  # share of rejected rows

# --- output ----------------------------------------------------------------------------------------------------------


def write(folder: Path, rows: dict[str, list[Row]], rejects: list[dict], kept: Sequence[str] = ()) -> None:
    """Write the dataset, with the columns `kept` beside those of Row, and its rejects.

    The same rows always give the same bytes.
    """
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    schema = pyarrow.schema([(column, pyarrow.string()) for column in (*COLUMNS, *kept)])
    splits = {}
    for split in SPLITS:
        table = pyarrow.Table.from_pylist(rows[split], schema=schema)
        splits[split] = datasets.Dataset(table, split=split, fingerprint=fingerprint(rows[split]))
    datasets.DatasetDict(splits).save_to_disk(folder)
    with (folder / REJECTS).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(reject) + "\n" for reject in rejects)


def fingerprint(rows: list[Row]) -> str:
    """Return a hash of the rows' text, 16 hex digits, so that the caches of `datasets` are never stale.

    The library's own fingerprint pickles the whole table, which doubles the memory of a run.
    """
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps(row).encode())
    return content.hexdigest()[:16]


# --- command line ----------------------------------------------------------------------------------------------------


def preprocess(options: argparse.Namespace) -> tuple[dict[str, list[Row]], list[dict]]:
    """Read, select, split and write the rows. Return the written rows and the rejects. Raises UserError, OSError."""
    shares = {"validation": options.validation_fraction, "test": options.test_fraction}
    if not (min(shares.values()) > 0 and sum(shares.values()) < 1):
        raise UserError("--validation_fraction and --test_fraction must each be above 0, and together below 1")
    check_names(options.keep_column)
    section_map = read_section_map(Path(options.section_map)) if options.section_map else None
    names = {"dialogue_column": options.dialogue_column, "note_column": options.note_column}
    is_usable = functools.partial(has_note_columns, **names)
    with replacing(Path(os.path.realpath(options.output_dir)), OUTPUT_NAMES) as folder:
        try:
            records, lines = read_source(options.dataset, is_usable)
        except OSError as error:
            where = error.filename or options.dataset
            raise UserError(
                f"cannot read {where}: {error.strerror or error}; fix this, or give another --dataset"
            ) from error
        print(*lines, sep="\n", end="\n" if lines else "", flush=True)
        check_source(options.keep_column, options.dataset, chain.from_iterable(records.values()))
        rows, rejects, sources = select(records, **names, section_map=section_map)
        for split in rows:
            if not rows[split]:
                raise no_rows_error(options.dataset, split, records[split], rejects, is_usable)
        rows |= hold_out(rows["train"], {split: share for split, share in shares.items() if split not in rows})
        if not rows["train"]:
            raise UserError(f"{options.dataset} has too few dialogues for three splits; add rows")
        rows, near = separate(rows, sources, options)
        rejects += near
        rows = {split: add_columns(rows[split], sources, options.keep_column) for split in SPLITS}
        write(folder, rows, rejects, options.keep_column)
    return rows, rejects


def separate(
    rows: dict[str, list[Row]], sources: dict[str, Record], options: argparse.Namespace
) -> tuple[dict[str, list[Row]], list[dict]]:
    """Count dialogues nearly the same as one held out. On request, drop them: return the rows left and the rejects.

    Raises UserError if a split would lose all rows.
    """
    near = find_near_duplicates(rows)
    count = sum(map(len, near.values()))
    if not options.drop_near_duplicates:
        if count:
            print(
                f"{count} dialogues of train or validation are nearly the same as one in validation or test; "
                "to drop them, add --drop_near_duplicates",
                flush=True,
            )
        return rows, []
    rows, rejects = drop_near_duplicates(rows, near, sources)
    for split in rows:
        if not rows[split]:
            raise UserError(f"{options.dataset}: --drop_near_duplicates leaves no row for {split}; run it without")
    return rows, rejects


def no_rows_error(
    dataset: str, split: str, records: list[Record], rejects: list[dict], is_usable: ColumnCheck
) -> UserError:
    """Return the error for a split without rows, with the most common reason, its first row, and the remedy."""
    rejects = [reject for reject in rejects if reject["split"] == split]
    if not rejects:
        return UserError(f"{dataset} has no rows for {split}; add rows, or give another --dataset")
    reason, count = Counter(reject["reason"] for reject in rejects).most_common(1)[0]
    first = next(reject for reject in rejects if reject["reason"] == reason)
    columns = [record.columns for record in records if isinstance(record.columns, dict)]
    without = reason.startswith("no column") or (columns and not any(map(is_usable, columns)))
    remedy = column_advice(records) if without else "correct them"
    return UserError(
        f"{dataset} has no row to keep for {split}: {reason} in {count} of {len(rejects)} rows, first in "
        f"{first['file']}:{first['row']}; {remedy}"
    )


def summary(rows: dict[str, list[Row]], rejects: list[dict], columns: Sequence[str] = ()) -> str:
    """Return one line for each count: rows in, dropped by reason, kept by split, and values of the kept columns."""
    values = {name: Counter(row[name] for part in rows.values() for row in part) for name in columns}
    kept = {split: len(rows[split]) for split in SPLITS}
    reasons = Counter(reject["reason"] for reject in rejects)
    return "\n".join(
        [
            f"{sum(kept.values()) + len(rejects):7,} rows in",
            f"{len(rejects):7,} dropped",
            *(f"{count:11,} {reason}" for reason, count in reasons.most_common()),
            f"{sum(kept.values()):7,} kept",
            *(f"{count:11,} {split}" for split, count in kept.items()),
            *(
                f"{len(count.keys() - {''}):7,} values of {name}; missing in {count['']:,} rows"
                for name, count in values.items()
            ),
        ]
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag: str, default: object, text: str) -> None:
        parser.add_argument(flag, default=default, type=type(default), help=f"{text} (default: %(default)s)")

    add("--dataset", "omi-health/medical-dialogue-to-soap-summary", "file, folder, or name on the Hugging Face hub")
    add("--output_dir", "./soap_dataset", "output folder; replaces an earlier output there")
    add("--dialogue_column", "dialogue", "column with the dialogue")
    add("--note_column", "soap", "column with the note; ignored if there are columns S, O, A and P")
    add("--section_map", "", 'JSON file with more headings for sections, such as {"Impression": "A"}')
    add("--validation_fraction", 0.1, "share of the train dialogues held out if the source has no validation split")
    add("--test_fraction", 0.1, "share of the train dialogues held out if the source has no test split")
    parser.add_argument(
        "--keep_column",
        action="append",
        default=[],
        metavar="NAME",
        help="also keep this column of the source, as text, for eval.py --by; repeat the flag for several",
    )
    parser.add_argument(
        "--drop_near_duplicates",
        action="store_true",
        help="drop train and validation rows whose dialogue is nearly the same as one in validation or test",
    )
    return parser


def fail(problem: str, status: int = 2) -> int:
    """Print a problem on one line, even if a library put line breaks into it; return the exit status."""
    print("error:", *problem.split(), file=sys.stderr)
    return status


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = build_parser().parse_args(argv)
    options.keep_column = list(dict.fromkeys(options.keep_column))
    os.umask(0o077)  # the output and the hub's cache hold patients' words, so only the owner may read them
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # otherwise each failed attempt to reach the hub prints a line
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold any byte
    print(*(f"{name}={value}" for name, value in vars(options).items()), flush=True)
    try:
        rows, rejects = preprocess(options)
    except UserError as error:
        return fail(str(error))
    except OSError as error:
        reason = error.strerror or error
        return fail(f"cannot write {options.output_dir}: {reason}; fix this, or choose another --output_dir")
    except KeyboardInterrupt:
        return fail("interrupted; run the same command again", status=130)
    print(f"wrote {options.output_dir}; rejected rows: {Path(options.output_dir) / REJECTS}")
    print(summary(rows, rejects, options.keep_column))
    if len(rejects) > WARN_ABOVE * (len(rejects) + sum(map(len, rows.values()))):
        print("warning: many rows were dropped; check the reasons above", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
