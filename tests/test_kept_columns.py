"""Columns kept beside the note reach every split as text, and change neither dialogues, notes nor their hash."""

import json
from pathlib import Path

import pytest
from conftest import rows
from test_preprocess_data import (  # noqa: F401
    assert_one_line,
    clean_process,
    source_rows,
    write_csv,
    write_jsonl,
    write_parquet,
)

from common.dataset import COLUMNS, content_hash, load_kept_column, load_split
from common.errors import UserError
from preprocess_data import SPLITS, main

N = 30
SPECIALTIES = ("ent", "cardiology", "")


def specialty(k: int) -> str:
    return SPECIALTIES[k % 3]


def with_specialty(form: str = "note") -> list[dict]:
    """Return rows with a column of text; in every third row it is missing, empty or white space."""
    of_rows = source_rows(N) if form == "note" else [{"messages": chat(row)} for row in rows(N)]
    return [row | {"specialty": specialty(k) or (None, "", " ")[k % 9 // 3]} for k, row in enumerate(of_rows)]


def chat(row: dict[str, str]) -> list[dict[str, str]]:
    note = json.dumps({section: row[section] for section in "SOAP"})
    return [{"role": "user", "content": row["dialogue"]}, {"role": "assistant", "content": note}]


def as_json() -> str:
    Path("notes.json").write_text(json.dumps(with_specialty()))
    return "notes.json"


def as_folder() -> str:
    part = with_specialty()
    write_jsonl("folder/train.jsonl", part[:20])
    write_csv("folder/validation.csv", part[20:25])
    write_parquet("folder/test.parquet", part[25:])
    return "folder"


def as_saved_classes() -> str:
    """Save a dataset as on the hub, in which the specialty is the number of a class and -1 is missing."""
    import datasets

    part = [
        row | {"specialty": {"ent": 0, "cardiology": 1, "": -1}[specialty(k)]} for k, row in enumerate(source_rows(N))
    ]
    kinds = {name: datasets.Value("string") for name in part[0]}
    kinds["specialty"] = datasets.ClassLabel(names=["ent", "cardiology"])
    datasets.Dataset.from_list(part, features=datasets.Features(kinds)).save_to_disk("saved")
    return "saved"


@pytest.mark.parametrize(
    "make",
    [
        lambda: write_jsonl("notes.jsonl", with_specialty()),
        lambda: write_csv("notes.csv", with_specialty()),
        lambda: write_parquet("notes.parquet", with_specialty()),
        lambda: write_jsonl("chats.jsonl", with_specialty("chat")),
        lambda: write_parquet("chats.parquet", with_specialty("chat")),
        as_json,
        as_folder,
        as_saved_classes,
    ],
)
def test_the_values_are_kept_in_every_split_of_every_kind_of_source(make, capsys):
    assert main(["--dataset", make(), "--keep_column", "specialty"]) == 0
    of_dialogue = {row["dialogue"]: specialty(k) for k, row in enumerate(rows(N))}
    checked = 0
    for split in SPLITS:
        values = load_kept_column("soap_dataset", split, "specialty")
        assert values == [of_dialogue[row["dialogue"]] for row in load_split("soap_dataset", split)]
        checked += len(values)
    assert checked == N
    assert "2 values of specialty; missing in 10 rows" in capsys.readouterr().out


def test_text_numbers_and_booleans_become_text():
    values = ["ENT ", "née", 3, 2.5, -1, True, False, None, float("nan"), "a\0b", "x" * 70_000]
    expected = ["ENT", "née", "3", "2.5", "-1", "true", "false", "", "", "a\ufffdb", "x" * 70_000]
    part = [row | {"kind": value, "same": 1} for row, value in zip(source_rows(11), values, strict=True)]
    write_jsonl("notes.jsonl", part)
    flags = ["--keep_column", "kind", "--keep_column", "same", "--keep_column", "kind"]
    assert main(["--dataset", "notes.jsonl", *flags]) == 0
    of_dialogue = dict(zip([row["dialogue"] for row in part], expected, strict=True))
    for split in SPLITS:
        found = load_kept_column("soap_dataset", split, "kind")
        assert found == [of_dialogue[row["dialogue"]] for row in load_split("soap_dataset", split)]
        assert set(load_kept_column("soap_dataset", split, "same", limit=1)) == {"1"}


def test_kept_columns_change_neither_rows_nor_hash_nor_training(capsys):
    part = with_specialty()
    part += [part[0] | {"specialty": "other"}]  # a copy of a row, whatever its specialty
    part += [part[4] | {"soap": part[5]["soap"], "specialty": "ent"}]  # another note on the same dialogue
    write_jsonl("notes.jsonl", part)
    assert main(["--dataset", "notes.jsonl", "--output_dir", "without", "--drop_near_duplicates"]) == 0
    flags = ["--keep_column", "specialty", "--output_dir", "with", "--drop_near_duplicates"]
    assert main(["--dataset", "notes.jsonl", *flags]) == 0
    for split in SPLITS:
        plain, kept = (load_split(folder, split) for folder in ("without", "with"))  # what training reads
        assert plain.column_names == kept.column_names == list(COLUMNS)
        assert plain.to_list() == kept.to_list()
        assert content_hash(plain) == content_hash(kept)
    rejects = [Path(folder, "rejects.jsonl").read_text() for folder in ("without", "with")]
    assert rejects[0] == rejects[1] != ""


def test_the_output_is_a_source_from_which_columns_are_kept_again():
    write_jsonl("notes.jsonl", with_specialty())
    flags = ["--keep_column", "specialty"]
    assert main(["--dataset", "notes.jsonl", *flags]) == 0
    before = load_kept_column("soap_dataset", "test", "specialty")
    assert main(["--dataset", "./soap_dataset", *flags]) == 0
    assert load_kept_column("soap_dataset", "test", "specialty") == before


def text_folder() -> str:
    Path("visits").mkdir()
    for k, row in enumerate(rows(3)):
        Path(f"visits/{k}.txt").write_text(row["dialogue"])
        Path(f"visits/{k}.note.txt").write_text(json.dumps({section: row[section] for section in "SOAP"}))
    return "visits"


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (None, "speciality", "has no column speciality: its columns are dialogue, soap, specialty; give one of them"),
        *((None, name, "already has a column for this") for name in ("dialogue", "Dialogue", "S", "p", "Assessment")),
        (text_folder, "specialty", "visits has text files, which have no columns"),
        (lambda: write_jsonl("l.jsonl", [row | {"tags": ["a"]} for row in source_rows(9)]), "tags", "tags is list"),
    ],
)
def test_a_column_that_cannot_be_kept_gives_one_line(make, name, words, capsys):
    path = make() if make else write_jsonl("notes.jsonl", with_specialty())
    assert main(["--dataset", path, "--keep_column", name]) == 2
    assert_one_line(capsys.readouterr().err, words)
    assert not Path("soap_dataset").exists()


def test_a_column_that_was_not_kept_is_refused_with_those_that_were():
    write_jsonl("notes.jsonl", with_specialty())
    assert main(["--dataset", "notes.jsonl", "--keep_column", "specialty"]) == 0
    with pytest.raises(UserError, match=r"no kept column visit type \(it has: specialty\).*--keep_column 'visit type'"):
        load_kept_column("soap_dataset", "test", "visit type")
    with pytest.raises(UserError, match="no kept column S "):
        load_kept_column("soap_dataset", "test", "S")
