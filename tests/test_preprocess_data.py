import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, rows
from hypothesis import given
from hypothesis import strategies as st

import preprocess_data
from common import replacing
from preprocess_data import SPLITS, main
from preprocessing import rows as rows_module
from preprocessing.splits import digest, hold_out
from preprocessing.tables import Record
from prompts import SECTION_NAMES, SECTIONS, NoteError

Row = dict[str, str]
Rows = list[Row]


@pytest.fixture(autouse=True)
def clean_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run each test in its own folder; restore the umask and environment that main() changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    umask = os.umask(0o022)
    yield
    os.umask(umask)


def source_row(row: Row) -> Row:
    """Return the row in the form of the dataset on the hub."""
    return {"dialogue": row["dialogue"], "soap": "\n".join(f"{section}: {row[section]}" for section in SECTIONS)}


def source_rows(n: int) -> Rows:
    return [source_row(row) for row in rows(n)]


def write_jsonl(path: str, records: Rows) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_csv(path: str, records: Rows, encoding: str = "utf-8", delimiter: str = ",") -> str:
    with Path(path).open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, records[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)
    return path


def write_parquet(path: str, records: Rows) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def save(path: str, splits: dict[str, Rows]) -> str:
    import datasets

    datasets.DatasetDict({split: datasets.Dataset.from_list(part) for split, part in splits.items()}).save_to_disk(path)
    return path


def load(path: str = "soap_dataset") -> dict[str, Rows]:
    import datasets

    loaded = datasets.load_from_disk(path)
    assert {tuple(part.column_names) for part in loaded.values()} == {("dialogue", *SECTIONS)}
    return {split: part.to_list() for split, part in loaded.items()}


def rejects(path: str = "soap_dataset") -> list[tuple[str, int, str]]:
    lines = Path(path, "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    return [(reject["file"], reject["row"], reject["reason"]) for reject in map(json.loads, lines)]


def snapshot(path: str = "soap_dataset") -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


def sort(records: Rows) -> Rows:
    return sorted(records, key=lambda row: row["dialogue"])


def run_script(*arguments: str, patch: str = "", **options) -> subprocess.CompletedProcess[str]:
    """Run `patch` and then the script in a new process."""
    imports = "import os, sys, preprocess_data as script\nfrom common import replacing"
    code = f"{imports}\n{patch}\nsys.exit(script.main({list(arguments)!r}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, **options)


# --- sources


def as_folder() -> str:
    part = source_rows(30)
    write_jsonl("folder/train-00000-of-00002.jsonl", part[:10])
    write_csv("folder/train-00001-of-00002.csv", part[10:20])
    write_parquet("folder/my_dev.parquet", part[20:25])
    Path("folder/test.json").write_text(json.dumps(part[25:]))
    Path("folder/README.md").write_text("not data")
    return "folder"


def as_clone_of_the_hub() -> str:
    part = source_rows(30)
    for split, rows_of_split in {"train": part[:20], "validation": part[20:25], "test": part[25:]}.items():
        Path("clone/data").mkdir(parents=True, exist_ok=True)
        write_parquet(f"clone/data/{split}-00000-of-00001.parquet", rows_of_split)
    write_jsonl("clone/.cache/other.jsonl", source_rows(1))
    return "clone"


def as_folders_named_by_split() -> str:
    write_jsonl("folders/train/part0.jsonl", source_rows(10))
    write_jsonl("folders/train/part1.jsonl", source_rows(20)[10:])
    write_jsonl("folders/test/part0.jsonl", source_rows(30)[20:])
    return "folders"


def as_list_in_an_object() -> str:
    Path("notes.json").write_text(json.dumps({"version": 1, "data": source_rows(30)}, indent=1))
    return "notes.json"


def as_text_of_excel() -> str:
    write_csv("notes.csv", source_rows(30), delimiter=";", encoding="utf-8-sig")
    return "notes.csv"


def named(names: Callable[[str], str]) -> Rows:
    """Return rows whose columns have other names."""
    return [{names(column): text for column, text in row.items()} for row in rows(30)]


def with_notes(write: Callable[[Row], object]) -> list[dict]:
    return [{"dialogue": row["dialogue"], "soap": write({key: row[key] for key in SECTIONS})} for row in rows(30)]


def with_keys(note: Row, key: Callable[[str], str]) -> Row:
    """Return the note with other keys, and with a key that is no section."""
    return {key(section): text for section, text in note.items()} | {"visit": "1"}


def as_one_saved_dataset() -> str:
    save("saved", {"train": source_rows(30)})
    return "saved/train"


def as_saved_with_a_format() -> str:
    import datasets

    dataset = datasets.Dataset.from_list(source_rows(30))
    dataset.set_format("numpy", columns=["dialogue"])
    dataset.save_to_disk("saved")
    return "saved"


def as_jsonl_with_a_mark() -> str:
    text = Path(write_jsonl("notes.jsonl", source_rows(30))).read_text()
    Path("notes.jsonl").write_text(text, encoding="utf-8-sig")
    return "notes.jsonl"


def as_json() -> str:
    Path("notes.json").write_text(json.dumps(source_rows(30), indent=1))
    return "notes.json"


@pytest.mark.parametrize(
    "make",
    [
        lambda: write_jsonl("notes.jsonl", source_rows(30)),
        lambda: write_jsonl("lines.json", source_rows(30)),
        lambda: write_jsonl("sections.jsonl", rows(30)),
        lambda: write_csv("notes.csv", source_rows(30)),
        lambda: write_csv("NOTES.CSV", source_rows(30), encoding="utf-8-sig"),
        lambda: write_csv("sections.csv", rows(30)),
        lambda: write_csv("words.csv", named(lambda column: SECTION_NAMES.get(column, column))),
        lambda: write_csv("small.csv", named(str.lower)),
        lambda: write_csv("notes.csv", source_rows(30), delimiter="\t"),
        lambda: write_jsonl("objects.jsonl", with_notes(dict)),
        lambda: write_jsonl("texts.jsonl", with_notes(json.dumps)),
        *(
            lambda write=write, key=key: write_jsonl("keys.jsonl", with_notes(lambda note: write(with_keys(note, key))))
            for write in (dict, json.dumps)
            for key in (SECTION_NAMES.get, str.lower, lambda section: SECTION_NAMES[section].lower(), " {} ".format)
        ),
        lambda: write_parquet("notes.parquet", source_rows(30)),
        lambda: save("saved", {"train": source_rows(30)[:20], "test": source_rows(30)[20:]}),
        lambda: save("saved", {"all": source_rows(30)}),
        as_json,
        as_list_in_an_object,
        as_text_of_excel,
        as_folder,
        as_clone_of_the_hub,
        as_folders_named_by_split,
        as_one_saved_dataset,
        as_saved_with_a_format,
        as_jsonl_with_a_mark,
    ],
)
def test_every_kind_of_source_gives_the_same_rows(make: Callable[[], str]):
    assert main(["--dataset", make()]) == 0
    splits = load()
    assert list(splits) == list(SPLITS)
    assert all(splits.values())
    assert sort([row for part in splits.values() for row in part]) == sort(rows(30))
    assert rejects() == []


def test_the_splits_of_a_source_are_kept():
    assert main(["--dataset", as_folder()]) == 0
    assert load() == {"train": rows(30)[:20], "validation": rows(30)[20:25], "test": rows(30)[25:]}


def test_files_that_differ_only_in_their_suffix_are_all_read(capsys: pytest.CaptureFixture[str]):
    bad = [{"dialogue": "Doctor: Hi.", "soap": "no headings"}]
    write_jsonl("folder/train.jsonl", [*source_rows(10), *bad])
    write_csv("folder/train.csv", [*source_rows(20)[10:], *bad])
    write_parquet("folder/test.parquet", source_rows(25)[20:])
    Path("folder/test.json").write_text(json.dumps([*source_rows(30)[25:], *bad]))
    assert main(["--dataset", "folder"]) == 0
    splits = load()
    assert sort(splits["train"] + splits["validation"]) == sort(rows(20))
    assert sort(splits["test"]) == sort(rows(30)[20:])
    assert [(file, row) for file, row, _ in rejects()] == [
        ("folder/test.json", 6),
        ("folder/train.csv", 12),
        ("folder/train.jsonl", 11),
    ]
    assert "     33 rows in\n      3 dropped\n" in capsys.readouterr().out


def test_the_default_is_the_dataset_on_the_hub(monkeypatch: pytest.MonkeyPatch):
    import datasets

    def from_hub(name: str) -> datasets.DatasetDict:
        assert name == "omi-health/medical-dialogue-to-soap-summary"
        assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
        assert os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] == "0"
        parts = {"train": source_rows(6)[:4], "validation": source_rows(6)[4:5], "test": source_rows(6)[5:]}
        more = {"prompt": "Write a note.", "messages": [{"role": "user", "content": "Write."}]}
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list([row | more for row in part]) for split, part in parts.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    assert main([]) == 0
    assert load() == {"train": rows(6)[:4], "validation": rows(6)[4:5], "test": rows(6)[5:]}


def test_columns_may_have_other_names():
    write_jsonl("notes.jsonl", [{"talk": row["dialogue"], "note": row["soap"]} for row in source_rows(10)])
    assert main(["--dataset", "notes.jsonl", "--dialogue_column", "talk", "--note_column", "note"]) == 0
    assert sort([row for part in load().values() for row in part]) == sort(rows(10))


def test_a_clinics_own_headings_are_read_by_a_section_map(capsys: pytest.CaptureFixture):
    names = {"History": "S", "Exam": "O", "Impression": "A", "Recommendations": "P"}
    Path("map.json").write_text(json.dumps(names), "utf-8")
    headings = {section: name for name, section in names.items()}
    notes = [
        {
            "dialogue": row["dialogue"],
            "soap": "\n".join(f"{headings[section]}: {row[section]}" for section in SECTIONS),
        }
        for row in rows(10)
    ]
    write_jsonl("notes.jsonl", notes)
    assert main(["--dataset", "notes.jsonl", "--section_map", "map.json"]) == 0
    assert sort([row for part in load().values() for row in part]) == sort(rows(10))
    Path("map.json").write_text('{"Impression": "X"}', "utf-8")
    assert main(["--dataset", "notes.jsonl", "--section_map", "map.json"]) == 2
    assert capsys.readouterr().err.endswith("error: map.json: Impression: the section is X; write S, O, A or P\n")


# --- splits


def test_a_single_split_is_divided_by_the_shares_in_any_row_order():
    shuffled = random.Random(0).sample(source_rows(200), 200)
    for path, records in (("a", source_rows(200)), ("b", shuffled)):
        write_jsonl(f"{path}.jsonl", records)
        assert main(["--dataset", f"{path}.jsonl", "--output_dir", path, "--test_fraction", "0.2"]) == 0
    a, b = load("a"), load("b")
    assert {split: len(part) for split, part in a.items()} == {"train": 140, "validation": 20, "test": 40}
    assert {split: sort(part) for split, part in a.items()} == {split: sort(part) for split, part in b.items()}


@given(
    st.lists(st.text("ab \n", min_size=1).filter(str.strip), min_size=1, max_size=30),
    st.floats(0.01, 0.49),
    st.floats(0.01, 0.49),
)
def test_equal_dialogues_are_always_in_the_same_split(dialogues: list[str], validation: float, test: float):
    given_rows = [{"dialogue": dialogue, "S": str(k)} for k, dialogue in enumerate(dialogues)]
    parts = hold_out(given_rows, {"validation": validation, "test": test})
    assert sorted(row["S"] for part in parts.values() for row in part) == sorted(row["S"] for row in given_rows)
    sides = [{digest(row["dialogue"]) for row in part} for part in parts.values()]
    assert sum(map(len, sides)) == len(set.union(*sides))


def test_a_missing_split_is_held_out_from_train_only():
    save("saved", {"train": source_rows(30)[:20], "test": source_rows(30)[20:]})
    assert main(["--dataset", "saved"]) == 0
    splits = load()
    assert splits["test"] == rows(30)[20:]
    assert sort(splits["train"] + splits["validation"]) == sort(rows(30)[:20])
    assert len(splits["validation"]) == 2


def test_rows_with_a_held_out_dialogue_are_rejected_and_counted(capsys: pytest.CaptureFixture[str]):
    a, b, c, d = rows(4)
    spaced = b | {"dialogue": "  " + b["dialogue"].replace("\n", " \n\n ")}
    save("saved", {"train": [a, spaced, c], "validation": [b, c], "test": [c, d]})
    assert main(["--dataset", "saved"]) == 0
    assert load() == {"train": [a], "validation": [b], "test": [c, d]}
    assert rejects() == [
        ("saved/validation", 2, "same dialogue in test"),
        ("saved/train", 2, "same dialogue in validation"),
        ("saved/train", 3, "same dialogue in test"),
    ]
    assert capsys.readouterr().out.endswith(
        "      7 rows in\n"
        "      3 dropped\n"
        "          2 same dialogue in test\n"
        "          1 same dialogue in validation\n"
        "      4 kept\n"
        "          1 train\n"
        "          1 validation\n"
        "          2 test\n"
    )


def test_a_repeated_row_is_dropped_and_another_note_of_the_same_dialogue_is_kept():
    first, *others = rows(10)
    again = {column: text.replace(" ", "  ") for column, text in first.items()}
    other_note = first | {"P": "Return tomorrow."}
    write_jsonl("notes.jsonl", [first, again, other_note, *others])
    assert main(["--dataset", "notes.jsonl"]) == 0
    assert sort([row for part in load().values() for row in part]) == sort([first, other_note, *others])
    assert rejects() == [("notes.jsonl", 2, "same as an earlier row")]


# --- rows that cannot be read

GOOD = json.dumps(source_rows(1)[0]).encode()


def with_note(text: str) -> bytes:
    return json.dumps({"dialogue": "Doctor: Hi.", "soap": text}).encode()


BAD_LINES = {
    GOOD[:100]: "not JSON, or cut off",
    b"\x00" * 100: "NUL bytes, as in UTF-16 or a damaged file",
    b'{"dialogue": "caf\xe9", "soap": "x"}': "not UTF-8",
    b"[" * 100_000: "not JSON, or cut off",
    b"9" * 5_000: "not JSON, or cut off",
    b"[1]": "list where an object was expected",
    b"null": "NoneType where an object was expected",
    b"{}": "no column dialogue",
    b'{"dialogue": "Doctor: Hi."}': "no column soap",
    b'{"dialogue": null, "soap": "x"}': "dialogue is empty",
    b'{"dialogue": " \\n", "soap": "x"}': "dialogue is empty",
    b'{"dialogue": ["Doctor: Hi."], "soap": "x"}': "dialogue is list, not text",
    b'{"dialogue": "Hi \\ud83d", "soap": "x"}': "dialogue contains NUL or bytes that are not UTF-8",
    b'{"dialogue": "Hi \\u0000", "soap": "x"}': "dialogue contains NUL or bytes that are not UTF-8",
    b'{"dialogue": "' + b"x" * 20_000_000 + b'", "soap": "x"}': "dialogue has more than 500,000 characters",
    b'{"dialogue": "Hi.", "soap": "no headings"}': "no heading for Subjective (S) in the order S, O, A, P",
    b'{"dialogue": "Hi.", "soap": "S: a O: b A: c"}': "no heading for Plan (P) in the order S, O, A, P",
    b'{"dialogue": "Hi.", "S": "a", "O": "", "A": "b", "P": "c"}': "O is empty",
    b'{"dialogue": "Hi.", "S": "a", "O": 7, "A": "b", "P": "c"}': "O is int, not text",
    b'{"dialogue": "Hi.", "soap": {"S": "a", "O": "b"}}': "section A is missing",
    b'{"dialogue": "Hi.", "soap": {"S": "a", "O": " ", "A": "b", "P": "c"}}': "O is empty",
    b'{"dialogue": "Hi.", "soap": "{\\"S\\": \\"a\\"}"}': "section O is missing",
    with_note('{"subjective": "a", "plan": "b"}'): "section O is missing",
    with_note('{"S": "a", "O": "b", "A": "c", "P": "d", "P": "e"}'): "not JSON: a section appears twice",
    with_note('{"S": "a", "O": "b", "A": "c", "Plan": "d", "Plan": "e"}'): "not JSON: a section appears twice",
    with_note('{"s": "a", "o": " ", "a": "c", "p": "d"}'): "O is empty",
    with_note('{"s": "a", "o": 7, "a": "c", "p": "d"}'): "O is int, not text",
    with_note('{"s": "a", "o": "b", "a": "c", "p": "d'): "JSON is cut off",
}


def test_a_row_that_cannot_be_read_is_rejected_with_file_row_and_reason(capsys: pytest.CaptureFixture[str]):
    good = [json.dumps(row).encode() for row in source_rows(10)]
    Path("notes.jsonl").write_bytes(b"\n".join([*BAD_LINES, b"", *good]) + b"\n")
    assert main(["--dataset", "notes.jsonl"]) == 0
    assert rejects() == [("notes.jsonl", row, reason) for row, reason in enumerate(BAD_LINES.values(), 1)]
    assert len(rejects()) == 28
    assert sort([row for part in load().values() for row in part]) == sort(rows(10))
    assert "     38 rows in\n     28 dropped\n" in capsys.readouterr().out


def read(columns: dict) -> Row | str:
    """Return the row, or the reason why it is rejected."""
    try:
        return rows_module.read_row(Record("a", 1, columns), "dialogue", "soap")
    except (rows_module.RowError, NoteError) as error:
        return str(error)


def forms_of(note: dict) -> list[dict]:
    """Return rows with the note as an object, as JSON text, and in columns."""
    return [{"dialogue": "Hi."} | row for row in ({"soap": note}, {"soap": json.dumps(note)}, note)]


NOTES = [
    ({"Subjective": "b", "objective": "c", "A ": "d", "PLAN": "e"}, {"S": "b", "O": "c", "A": "d", "P": "e"}),
    ({"S": "a", "O": "b", "A": ["c"], "P": ["d", "e"]}, {"S": "a", "O": "b", "A": "c", "P": "d\ne"}),
    ({"S": "a", "O": '["b", "\\u00e9"]', "A": "[c]", "P": "d"}, {"S": "a", "O": "b\né", "A": "[c]", "P": "d"}),
    ({"S": "a", "O": "['b', 'c']", "A": "c", "P": "d"}, "O is a list written as text"),
    ({"S": "a", "O": "b", "A": "c", "P": []}, "P is empty"),
    ({"S": "a", "O": "b", "A": "c", "P": [" ", ""]}, "P is empty"),
    ({"S": "a", "O": "b", "A": "c", "P": ["d", 7]}, "P is a list with int in it, not only text"),
    ({"S": "a", "O": "b", "A": "c", "P": '["d", null]'}, "P is a list with NoneType in it, not only text"),
    ({"S": "a", "O": "b", "A": "c", "P": ["d", ["e"]]}, "P is a list with list in it, not only text"),
    ({"S": "a", "O": "b", "A": {"c": 1}, "P": "d"}, "A is dict, not text"),
    ({"S": "a", "O": "b", "A": "c", "P": "\ud800"}, "P contains NUL or bytes that are not UTF-8"),
    ({"S": "...", "O": ["..."], "A": "...", "P": "..."}, "all sections are empty"),
    ({"S": "a", "s": "b", "O": "c", "A": "d", "P": "e"}, "'S' and 's' both name section S; keep one"),
    (
        {"S": "a", "Subjective": "b", "O": "c", "A": "d", "P": "e"},
        "'S' and 'Subjective' both name section S; keep one",
    ),
    ({"S": "a", "O": "b", "A": "c", "P": "d", "P ": "e"}, "'P' and 'P ' both name section P; keep one"),
]


@pytest.mark.parametrize(("note", "expected"), NOTES)
def test_an_object_json_text_and_columns_are_read_alike(note: dict, expected: Row | str):
    if isinstance(expected, dict):
        expected = {"dialogue": "Hi."} | expected
    assert [read(row) for row in forms_of(note)] == [expected] * 3


PART = st.text("ab [\"',.\n") | st.integers() | st.none()
SECTION = PART | st.lists(PART, max_size=3) | st.lists(PART, max_size=3).map(json.dumps)
KEYS = [*SECTIONS, "s", "Plan", "objective ", "visit"]


@given(st.fixed_dictionaries(dict.fromkeys(SECTIONS, SECTION)) | st.dictionaries(st.sampled_from(KEYS), SECTION))
def test_any_sections_are_read_alike_from_an_object_and_from_json_text(note: dict):
    as_object, as_text, as_columns = map(read, forms_of(note))
    assert as_object == as_text
    if not isinstance(as_object, str):
        assert as_columns == as_object


@pytest.mark.parametrize("after", ["Addendum: call.", '{"S": "e", "O": "f", "A": "g", "P": "h"}', "}"])
def test_a_json_note_with_text_after_it_is_rejected(after: str):
    note = json.dumps({"S": "a", "O": "b", "A": "c", "P": "d"})
    assert read({"dialogue": "Hi.", "soap": f"{note}\n{after}"}) == "soap has text after the JSON object"


def test_an_error_lists_the_columns_of_a_source_without_the_needed_ones(capsys: pytest.CaptureFixture[str]):
    write_csv("notes.csv", [{"transcript": row["dialogue"], "note": row["soap"]} for row in source_rows(10)])
    assert main(["--dataset", "notes.csv"]) == 2
    words = "the columns are transcript, note: choose two with --dialogue_column and --note_column"
    assert_one_line(capsys.readouterr().err, words)


def test_many_rejected_rows_cause_a_warning(capsys: pytest.CaptureFixture[str]):
    for bad, warned in ((1, False), (5, True)):
        write_jsonl("notes.jsonl", [*source_rows(10), *[{"dialogue": "Doctor: Hi."}] * bad])
        assert main(["--dataset", "notes.jsonl"]) == 0
        assert ("warning: many rows were dropped" in capsys.readouterr().err) == warned


@pytest.mark.slow
def test_an_unreachable_hub_gives_one_line():
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(Path.cwd())}
    command = [sys.executable, ROOT / "preprocess_data.py", "--dataset", "nobody/nothing"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert_one_line(result.stderr, "check the name and the network")


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(ANY_JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(("dialogue", "soap", *SECTIONS), ANY_JSON)))
def test_any_row_is_read_or_rejected_with_a_reason(columns: object):
    try:
        row = rows_module.read_row(Record("notes.jsonl", 1, columns), "dialogue", "soap")
    except (rows_module.RowError, NoteError) as error:
        assert str(error)
    else:
        assert all(row[column] and row[column] == row[column].strip() for column in ("dialogue", *SECTIONS))
        digest(*row.values())


def test_a_long_csv_field_is_kept():
    long = rows(1)[0] | {"dialogue": "Patient: It hurts. " * 10_000 + "Doctor: I see."}
    write_csv("notes.csv", [long, *rows(5)[1:]])
    assert main(["--dataset", "notes.csv"]) == 0
    assert long in [row for part in load().values() for row in part]


def test_a_broken_csv_row_affects_no_other_row():
    text = Path(write_csv("notes.csv", source_rows(10))).read_bytes()
    bad = b'one field\r\na,b,c\r\n"quoted" twice,b\r\n\r\ncaf\xe9,S: a O: b A: c P: d\r\n'
    Path("notes.csv").write_bytes(text + bad + b'"cut off, S: a')
    assert main(["--dataset", "notes.csv"]) == 0
    assert rejects() == [
        ("notes.csv", 12, "more or fewer fields than the header"),
        ("notes.csv", 13, "more or fewer fields than the header"),
        ("notes.csv", 14, """not CSV, or cut off (',' expected after '"')"""),
        ("notes.csv", 16, "dialogue contains NUL or bytes that are not UTF-8"),
        ("notes.csv", 17, "not CSV, or cut off (unexpected end of data)"),
    ]
    assert sum(map(len, load().values())) == 10


@pytest.mark.parametrize(
    ("header", "status"), [(b"\r\ndialogue,soap\r\n", 0), (b'"dialogue,soap\r\n', 2), (b'"dialogue"x,soap\r\n', 2)]
)
def test_a_csv_header_may_follow_blank_lines_but_not_be_broken(header: bytes, status: int, capsys):
    text = Path(write_csv("notes.csv", source_rows(10))).read_bytes()
    Path("notes.csv").write_bytes(header + text.partition(b"\n")[2])
    assert main(["--dataset", "notes.csv"]) == status
    assert ("error: notes.csv: the header is not CSV" in capsys.readouterr().err) == (status == 2)


@pytest.mark.parametrize(
    ("below", "taken", "error", "kept"),
    [
        (b"d%d,S: a. O: b. A: c. P: d.\r\n", 5, "unexpected end of data", 10),
        (b'"d%d","S: a. O: b. A: c. P: d."\r\n', 2, "',' expected after '\"'", 13),
    ],
)
def test_the_lines_inside_an_open_quote_are_named(below: bytes, taken: int, error: str, kept: int):
    text = Path(write_csv("notes.csv", source_rows(10))).read_bytes()
    rows_below = b"".join(below % k for k in range(4))
    Path("notes.csv").write_bytes(text + b'd,"S: a. O: b. A: c. P: d.\r\n' + rows_below)
    assert main(["--dataset", "notes.csv"]) == 0
    first = text.count(b"\n") + 1
    reason = f"not CSV, or cut off ({error}), lines {first} to {first + taken - 1} of the file"
    assert rejects() == [("notes.csv", 12, reason)]
    assert sum(map(len, load().values())) == kept


@pytest.mark.parametrize(
    "text",
    [
        "مريض: أشعر بألم",
        "患者：咳嗽三天",
        "Zoë 👩‍⚕️ e\u0301",
        "\u202eabc\u202c",
        "a\u2028b\x85c\x1cd",
        "\ufeffDoctor: Hi.",
    ],
)
def test_text_of_any_script_is_kept_exactly(text: str):
    special = {"dialogue": text, "S": text, "O": text, "A": text, "P": text}
    write_jsonl("notes.jsonl", [special, *rows(5)])
    write_csv("notes.csv", [special, *rows(5)])
    write_parquet("notes.parquet", [special, *rows(5)])
    for source in ("notes.jsonl", "notes.csv", "notes.parquet"):
        assert main(["--dataset", source]) == 0
        assert special in [row for part in load().values() for row in part]


# --- the output folder


def assert_one_line(errors: str, words: str) -> None:
    """Check for one line of error below the progress bar, without a word of a dialogue."""
    last = errors.rstrip("\n").rsplit("\n", 1)[-1]
    assert last.startswith("error: ")
    assert words in last
    assert "Traceback" not in errors
    assert "cough" not in errors


def test_two_runs_give_the_same_bytes():
    write_jsonl("notes.jsonl", [*source_rows(30), {"dialogue": "a"}])
    assert main(["--dataset", "notes.jsonl", "--output_dir", "a"]) == 0
    assert run_script("--dataset", "notes.jsonl", "--output_dir", "b").returncode == 0
    assert snapshot("a") == snapshot("b")
    assert len(snapshot("a")) == 11


def test_the_fingerprint_changes_with_any_character_and_column():
    row = {"dialogue": "a", "S": "b", "O": "c", "A": "d e", "P": "f"}
    changed = [row | {column: row[column] + " "} for column in row]
    moved = row | {"A": "d", "P": "e f"}
    prints = {preprocess_data.fingerprint([part]) for part in (row, moved, *changed)}
    assert len(prints) == 7


def test_only_the_owner_can_read_the_output():
    write_jsonl("notes.jsonl", [*source_rows(30), {"dialogue": "Patient: my name is Miller."}])
    assert main(["--dataset", "notes.jsonl", "--output_dir", "private/soap_dataset"]) == 0
    paths = [Path("private"), *Path("private").rglob("*")]
    assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_dir()} == {"0o700"}
    assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_file()} == {"0o600"}
    assert "Miller" not in Path("private/soap_dataset/rejects.jsonl").read_text()


def test_an_old_dataset_an_empty_folder_and_a_link_are_replaced():
    write_jsonl("first.jsonl", source_rows(10))
    write_jsonl("second.jsonl", source_rows(20)[10:])
    Path("place").mkdir()
    Path("link").symlink_to("place")
    for source in ("first.jsonl", "second.jsonl"):
        assert main(["--dataset", source, "--output_dir", "link"]) == 0
    assert sort([row for part in load("place").values() for row in part]) == sort(rows(20)[10:])
    assert Path("link").is_symlink()
    assert sorted(path.name for path in Path().iterdir()) == ["first.jsonl", "link", "place", "second.jsonl"]


def test_the_output_is_a_source_and_may_be_its_own():
    write_jsonl("notes.jsonl", source_rows(30))
    assert main(["--dataset", "notes.jsonl"]) == 0
    before = snapshot()
    assert main(["--dataset", "./soap_dataset"]) == 0
    assert snapshot() == before


def test_a_second_run_into_the_same_folder_gives_one_line(capsys: pytest.CaptureFixture[str]):
    write_jsonl("notes.jsonl", source_rows(10))
    with replacing.replacing(Path("soap_dataset").absolute(), preprocess_data.OUTPUT_NAMES) as new:
        assert main(["--dataset", "notes.jsonl"]) == 2
        assert_one_line(capsys.readouterr().err, "another run is writing")
        assert new.is_dir()
        assert main(["--dataset", "notes.jsonl", "--output_dir", "elsewhere"]) == 0
    assert main(["--dataset", "notes.jsonl"]) == 0


KILL = "os.kill(os.getpid(), 9)"
TWO_RENAMES = f"""
replacing.exchange, rename = lambda *_: False, script.Path.rename
script.Path.rename = lambda path, to: {KILL} if path.name == "new" else rename(path, to)
"""
TWO_SPLITS = f"""
import datasets
save = datasets.Dataset.save_to_disk
datasets.Dataset.save_to_disk = lambda part, *to, **how: save(part, *to, **how) if len(part) > 9 else {KILL}
"""
REMOVAL = f"replacing.shutil.rmtree = lambda path, **_: {KILL} if os.path.exists(path) else None"
# Patches that kill a run, and whether the new dataset is then in place.
KILLED = {
    "before writing": (f"script.hold_out = lambda *_: {KILL}", False),
    "between two splits": (TWO_SPLITS, False),
    "before the exchange": (f"replacing.exchange = lambda *_: {KILL}", False),
    "between two renames": (TWO_RENAMES, False),
    "before the old one is removed": (REMOVAL, True),
}


@pytest.mark.parametrize(("patch", "in_place"), KILLED.values(), ids=KILLED.keys())
def test_a_killed_run_leaves_a_whole_dataset_and_the_next_run_cleans_up(
    patch: str, in_place: bool, capsys: pytest.CaptureFixture[str]
):
    write_jsonl("first.jsonl", source_rows(10))
    write_jsonl("second.jsonl", source_rows(30))
    assert main(["--dataset", "second.jsonl", "--output_dir", "unbroken"]) == 0
    assert main(["--dataset", "first.jsonl"]) == 0
    expected = snapshot("unbroken") if in_place else snapshot()
    assert run_script("--dataset", "second.jsonl", patch=patch).returncode == -signal.SIGKILL
    assert Path("soap_dataset.partial").exists()
    if patch != TWO_RENAMES:
        assert snapshot() == expected
    capsys.readouterr()
    assert main(["--dataset", "missing.jsonl"]) == 2
    assert_one_line(capsys.readouterr().err, "missing.jsonl does not exist")
    assert snapshot() == expected
    assert not Path("soap_dataset.partial").exists()
    assert main(["--dataset", "second.jsonl"]) == 0
    assert snapshot() == snapshot("unbroken")


def test_without_an_exchange_the_folder_is_replaced_by_two_renames(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replacing, "exchange", lambda *_: False)
    for n in (10, 20):
        write_jsonl("notes.jsonl", source_rows(n))
        assert main(["--dataset", "notes.jsonl"]) == 0
        assert sum(map(len, load().values())) == n
    assert not Path("soap_dataset.partial").exists()


def test_a_run_that_is_interrupted_says_so_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    write_jsonl("notes.jsonl", source_rows(10))
    monkeypatch.setattr(preprocess_data, "write", interrupt)
    assert main(["--dataset", "notes.jsonl"]) == 130
    assert_one_line(capsys.readouterr().err, "interrupted")
    assert [path.name for path in Path().iterdir()] == ["notes.jsonl"]


# --- speed, privacy, command line


def test_ten_thousand_rows_take_less_than_20_seconds_with_a_progress_bar():
    filler = "Patient: It began at work, and it is worse at night, when I lie down. " * 40
    many = [row | {"dialogue": f"{row['dialogue']} {filler}"} for row in source_rows(10_000)]
    write_jsonl("notes.jsonl", many)
    start = time.monotonic()
    result = run_script("--dataset", "notes.jsonl")
    seconds = time.monotonic() - start
    assert result.returncode == 0, result.stderr
    assert "10000/10000" in result.stderr
    assert "  8,000 train" in result.stdout
    assert seconds < 20


def test_no_connection_is_made_for_a_local_source():
    write_jsonl("notes.jsonl", source_rows(10))
    refuse = "import socket\nsocket.socket.connect = socket.getaddrinfo = lambda *_, **__: os._exit(99)"
    assert run_script("--dataset", "notes.jsonl", patch=refuse).returncode == 0


def test_help_answers_within_a_second_and_imports_nothing_heavy():
    start = time.monotonic()
    heavy = "{'torch', 'datasets', 'pyarrow', 'transformers', 'vllm'} & sys.modules.keys()"
    result = run_script("--help", patch=f"import atexit\natexit.register(lambda: print('heavy:', {heavy}))")
    assert time.monotonic() - start < 1
    assert result.returncode == 0
    assert "--dataset" in result.stdout
    assert "heavy: set()" in result.stdout


def test_file_names_of_any_bytes_are_accepted():
    name = os.fsdecode(b"caf\xe9.jsonl")
    write_jsonl(name, [*source_rows(10), {"dialogue": "a"}])
    result = run_script("--dataset", name, "--output_dir", os.fsdecode(b"caf\xe9"))
    assert result.returncode == 0, result.stderr
    assert rejects(os.fsdecode(b"caf\xe9")) == [(name, 11, "no column soap")]
