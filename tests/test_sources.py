"""Tables and folders: every value is read as it was written, or a line says why it was skipped or rejected."""

import csv
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import rows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_preprocess_data import (  # noqa: F401
    assert_one_line,
    clean_process,
    load,
    rejects,
    save,
    sort,
    source_rows,
    write_csv,
    write_jsonl,
    write_parquet,
)

from common.errors import UserError
from preprocess_data import has_note_columns, main
from preprocessing import tables
from prompts import SECTION_NAMES, SECTIONS

NOTE = "S: a. O: b. A: c. P: d."
HEADER = b"dialogue,soap\r\n"


def put(path: str, content: bytes | str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def kept(path: str = "soap_dataset") -> list[dict[str, str]]:
    return sort([row for part in load(path).values() for row in part])


# --- delimiters and quoting

WORDS = "cough,fever;pain|rash\t\"quoted\" 'x' \n7.5 [a] é sep=;"
TEXTS = st.text(WORDS, min_size=1, max_size=20).filter(str.strip)
NAMES = st.text('abS,;|\t" ()é', min_size=1, max_size=8).filter(lambda name: name.strip() and "sep" not in name)


@st.composite
def csv_files(draw: st.DrawFn) -> tuple[bytes, partial, list[dict[str, str]]]:
    """Draw a CSV file as a spreadsheet or Python writes it, the columns to read, and the expected rows."""
    dialogue = draw(st.just("dialogue") | NAMES)
    note = draw(st.just("soap") | NAMES)
    sections = [draw(st.sampled_from([key, key.lower(), SECTION_NAMES[key], f" {key} "])) for key in SECTIONS]
    columns = [dialogue, *draw(st.sampled_from([[note], sections]))]
    columns += draw(st.lists(NAMES, max_size=3))
    stripped = [column.strip() for column in columns]
    spelled = [column.lower() for column in stripped]
    if len(set(spelled)) < len(columns):
        columns = ["dialogue", "soap"]
    header = draw(st.permutations(columns))
    texts = draw(st.lists(st.lists(TEXTS, min_size=len(header), max_size=len(header)), min_size=1, max_size=4))
    delimiter = draw(st.sampled_from(",;\t|"))
    file = io.StringIO()
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    # With "\r" alone, Python's writer would leave "\n" in a text without quotes.
    end = draw(st.sampled_from(["\n", "\r\n"] + ["\r"] * (quoting == csv.QUOTE_ALL)))
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
    if draw(st.booleans()):
        file.write(f"sep={delimiter}{end}")
    blank = st.lists(st.sampled_from([end, f"  {end}", delimiter * (len(header) - 1) + end]), max_size=2)
    file.write("".join(draw(blank)))
    writer.writerow(header)
    for row in texts:
        file.write("".join(draw(blank)))
        writer.writerow(row)
    names = [column.strip() for column in header]
    is_usable = partial(has_note_columns, dialogue_column=stripped[0], note_column=note.strip())
    content = file.getvalue().encode("utf-8-sig" if draw(st.booleans()) else "utf-8")
    return content, is_usable, [dict(zip(names, row, strict=True)) for row in texts]


@settings(max_examples=500)
@given(csv_files())
def test_a_csv_file_is_read_as_it_was_written_or_rejected(case: tuple[bytes, partial, list]):
    content, is_usable, expected = case
    Path("any.csv").write_bytes(content)
    try:
        records = tables.read_table(Path("any.csv"), is_usable)
    except UserError as error:
        assert "the header has the columns with delimiter" in str(error)
        return
    expected = [{name: text.strip() for name, text in row.items()} for row in expected]
    again = [all(name == text for name, text in row.items()) for row in expected]
    assert [record.reason for record in records] == ["the header again" if same else None for same in again]
    for record, row, same in zip(records, expected, again, strict=True):
        assert same or {name: text.strip() for name, text in record.columns.items()} == row


@settings(max_examples=500)
@given(st.lists(st.sampled_from(["dialogue", "soap", '"dialogue"', '"', " ", "x", *tables.DELIMITERS]), max_size=9))
def test_a_header_that_fits_two_delimiters_is_rejected(parts: list[str]):
    Path("any.csv").write_text("".join(parts) + "\n", encoding="utf-8")
    is_usable = partial(has_note_columns, dialogue_column="dialogue", note_column="soap")
    with Path("any.csv").open(encoding="utf-8", newline="") as file:
        headers = [next(tables.parse_csv(file, delimiter), (0, [], None))[1] for delimiter in tables.DELIMITERS]
        fitting = [header for header in headers if is_usable([name.strip() for name in header])]
        try:
            delimiter = tables.find_delimiter(Path("any.csv"), file, is_usable)
        except UserError:
            assert len(fitting) != 1
        else:
            assert len(fitting) < 2
            assert not fitting or fitting[0] == headers[tables.DELIMITERS.index(delimiter)]


LONG_NAME = "dialogue (doctor, patient, family)"


@pytest.mark.parametrize(
    ("header", "delimiter"),
    [
        (f'"{LONG_NAME}";soap\r\n', ";"),
        (f"{LONG_NAME};soap\r\n", ";"),
        (f"\r\n \r\n;\r\n{LONG_NAME};soap\r\n", ";"),
        (f"sep=;\r\n{LONG_NAME};soap\r\n", ";"),
        (f'"sep=|"\r\n\r\n"{LONG_NAME}"|soap\r\n', "|"),
        (f"sep=^\r\n{LONG_NAME}^soap\r\n", "^"),
        (f"sep=\t\r\n{LONG_NAME}\tsoap\r\n", "\t"),
        (f"{LONG_NAME}|soap\r\n", "|"),
        (f"{LONG_NAME}\tsoap\r\n", "\t"),
        (f'"{LONG_NAME}", soap\r\n', ","),
        (f'"{LONG_NAME}" ,soap\r\n', None),
        (f"{LONG_NAME},soap\r\n", None),
    ],
)
def test_the_requested_columns_decide_the_delimiter(header: str, delimiter: str | None, capsys):
    below = io.StringIO()
    csv.writer(below, delimiter=delimiter or ",").writerows([row["dialogue"], row["soap"]] for row in source_rows(10))
    put("notes.csv", header + below.getvalue())
    status = main(["--dataset", "notes.csv", "--dialogue_column", LONG_NAME])
    if delimiter:
        assert status == 0
        assert kept() == sort(rows(10))
        assert rejects() == []
    else:
        assert status == 2
        assert_one_line(capsys.readouterr().err, "notes.csv")


def test_quotes_after_a_space_are_not_part_of_the_text():
    lines = [", ".join(f'"{row[column]}"' for column in ("dialogue", *SECTIONS)) for row in rows(10)]
    put("notes.csv", "\n".join(["dialogue, S, O, A, P", *lines]))
    assert main(["--dataset", "notes.csv"]) == 0
    assert kept() == sort(rows(10))


def test_a_repeated_header_in_joined_files_is_rejected():
    for name, part in (("a.csv", rows(5)), ("b.csv", rows(10)[5:])):
        write_csv(name, part, encoding="utf-8-sig")
    put("both.csv", Path("a.csv").read_bytes() + Path("b.csv").read_bytes())
    assert main(["--dataset", "both.csv"]) == 0
    assert rejects() == [("both.csv", 7, "the header again")]
    assert kept() == sort(rows(10))


# --- repeated names


def repeated_in_parquet() -> str:
    import pyarrow
    import pyarrow.parquet

    texts = [pyarrow.array([text]) for text in ("Doctor: Hi.", NOTE, NOTE)]
    pyarrow.parquet.write_table(pyarrow.table(texts, names=["dialogue", "soap", "soap"]), "a.parquet")
    return "a.parquet"


REPEATED_KEY = '{"dialogue": "a", "soap": "b", "soap": "c"}'
REPEATED_NAMES = {
    "csv": (lambda: put("a.csv", "dialogue,soap,soap\na,b,c\n"), "a.csv has two columns named soap; rename"),
    "csv, white space": (lambda: put("a.csv", 'dialogue,soap,"soap "\na,b,c\n'), "two columns named soap"),
    "csv, another column": (lambda: put("a.csv", "dialogue,soap,x,x\na,b,c,d\n"), "two columns named x"),
    "csv, a section": (
        lambda: put("a.csv", "dialogue,S,O,A,P,s\na,b,c,d,e,f\n"),
        "'S' and 's' both name section S; keep one",
    ),
    "csv, a word": (
        lambda: put("a.csv", "dialogue,S,O,A,P,Plan\na,b,c,d,e,f\n"),
        "'P' and 'Plan' both name section P; keep one",
    ),
    "parquet": (repeated_in_parquet, "a.parquet has two columns named soap; rename"),
    "jsonl": (lambda: put("a.jsonl", REPEATED_KEY), "key soap is given twice in 1 of 1 rows"),
    "json": (lambda: put("a.json", f"[{REPEATED_KEY}]"), "key soap is given twice in 1 of 1 rows"),
    "json, one object": (lambda: put("a.json", '{"data": [], "data": []}'), "key data is given twice"),
    "json, in the note": (
        lambda: put("a.jsonl", '{"dialogue": "a", "soap": {"S": "b", "O": "c", "A": "d", "P": "e", "P": "f"}}'),
        "soap has key P twice",
    ),
}


@pytest.mark.parametrize(("make", "words"), REPEATED_NAMES.values(), ids=REPEATED_NAMES.keys())
def test_a_repeated_name_is_rejected_and_named(make: Callable[[], str], words: str, capsys):
    assert main(["--dataset", make()]) == 2
    assert_one_line(capsys.readouterr().err, words)


def test_a_repeated_key_rejects_its_row_and_unnamed_columns_reject_nothing():
    listed = [json.dumps(row) for row in source_rows(10)]
    put("notes.json", f"[{', '.join([REPEATED_KEY, *listed])}]")
    assert main(["--dataset", "notes.json"]) == 0
    assert rejects() == [("notes.json", 1, "key soap is given twice")]
    assert kept() == sort(rows(10))
    text = Path(write_csv("notes.csv", source_rows(10))).read_text(encoding="utf-8")
    put("notes.csv", text.replace("dialogue,soap", "dialogue,soap,,").replace('"\n', '",,\n'))
    assert main(["--dataset", "notes.csv"]) == 0
    assert kept() == sort(rows(10))


# --- other tables of one file


def test_lists_of_sections_are_read_alike_from_every_kind_of_file():
    lists = [row | {section: row[section].split(". ") for section in ("S", "P")} for row in rows(10)]
    notes = [{"dialogue": row["dialogue"], "soap": {key: row[key] for key in SECTIONS}} for row in lists]
    texts = [row | {"soap": json.dumps(row["soap"])} for row in notes]
    sources = [write_jsonl("a.jsonl", lists), write_parquet("a.parquet", lists), write_jsonl("b.jsonl", notes)]
    sources += [write_parquet("b.parquet", notes), write_jsonl("c.jsonl", texts), write_csv("c.csv", texts)]
    sources.append(write_csv("a.csv", [row | {key: json.dumps(row[key]) for key in ("S", "P")} for row in lists]))
    expected = [row | {section: row[section].replace(". ", "\n") for section in ("S", "P")} for row in rows(10)]
    for source in sources:
        assert main(["--dataset", source]) == 0
        assert kept() == sort(expected)
    assert any("\n" in row["P"] for row in expected)


def test_a_single_json_object_with_a_dialogue_and_lists_is_a_row(capsys):
    put("a.json", json.dumps({"dialogue": "Hi.", "S": "a", "O": "b", "A": "c", "P": ["d", "e"]}))
    assert main(["--dataset", "a.json"]) == 2
    assert_one_line(capsys.readouterr().err, "too few dialogues")


UMLAUT = "Doctor: Müller%d?,S: a. O: b. A: c. P: d.\r\n"
OTHER_FILES = {
    "UTF-16": (lambda: write_csv("a.csv", source_rows(3), encoding="utf-16"), "a.csv is UTF-16, not UTF-8; save"),
    "Windows-1252": (
        lambda: put("a.csv", HEADER + (UMLAUT % 1 + UMLAUT % 2).encode("cp1252") + b"Hi.,S: a. O: b. A: c. P: d."),
        "a.csv is not UTF-8 in 2 lines, first in line 2; it may be Windows-1252: save it as CSV UTF-8",
    ),
    "Windows-1252 in the header": (lambda: put("a.csv", b"dialogue,soap,gr\xf6\xdfe\r\n"), "a.csv is not UTF-8"),
    "header alone": (lambda: put("a.csv", HEADER), "has no rows for train"),
    "one column": (
        lambda: put("a.csv", b"dialogue\r\nDoctor: Hi, you.\r\n"),
        "the columns are dialogue: choose two with",
    ),
    "one column of another name": (
        lambda: put("a.tsv", b"text\nDoctor: Hi, you.\n"),
        "the columns are text: choose two with",
    ),
    "title above the header": (
        lambda: put("a.csv", b"Export\r\n" + HEADER + b"a,b\r\n"),
        "the columns are Export: choose",
    ),
    "Excel": (
        lambda: put("visits.xlsx", b"PK"),
        "visits.xlsx is not a .jsonl, .json, .csv, .parquet, .tsv, .ndjson file",
    ),
    "packed": (lambda: put("visits.jsonl.gz", b"\x1f\x8b"), "or a folder from save_to_disk; unpack it"),
    "packed, missing": (lambda: "nothing.csv.gz", "nothing.csv.gz does not exist"),
    "Git LFS": (
        lambda: put("train.parquet", b"version https://git-lfs.github.com/spec/v1\n"),
        "train.parquet is a Git LFS pointer, not the data; run git lfs pull",
    ),
}


@pytest.mark.parametrize(("make", "words"), OTHER_FILES.values(), ids=OTHER_FILES.keys())
def test_an_unreadable_file_gives_one_line_with_the_remedy(make: Callable[[], str], words: str, capsys):
    assert main(["--dataset", make()]) == 2
    assert_one_line(capsys.readouterr().err, words)


def test_a_damaged_line_in_a_utf_8_file_affects_no_other_row():
    write_csv("a.csv", [{"dialogue": f"Müller: {row['dialogue']}", "soap": row["soap"]} for row in source_rows(10)])
    put("a.csv", Path("a.csv").read_bytes() + (UMLAUT % 1 + UMLAUT % 2).encode("cp1252"))
    assert main(["--dataset", "a.csv"]) == 0
    assert [row for _, row, _ in rejects()] == [12, 13]
    assert len(kept()) == 10


@pytest.mark.parametrize("name", ["visits.tsv", "visits.TSV", "VISITS.JSONL", "visits.ndjson"])
def test_further_suffixes_are_read(name: str):
    if name.lower().endswith("tsv"):
        write_csv(name, source_rows(10), delimiter="\t")
    else:
        write_jsonl(name, source_rows(10))
    assert main(["--dataset", name]) == 0
    assert kept() == sort(rows(10))


# --- folders


def clone(*files: tuple[str, str]) -> str:
    """Make a folder like a `git clone` of a dataset on the hub, with more files; return its name."""
    Path("clone/data").mkdir(parents=True)
    for split, part in {"train": source_rows(20), "test": source_rows(30)[20:]}.items():
        write_parquet(f"clone/data/{split}-00000-of-00001.parquet", part)
    put("clone/README.md", "# Notes")
    put("clone/.gitattributes", "*.parquet filter=lfs")
    put("clone/.git/train.jsonl", "{}")
    for name, text in files:
        put(f"clone/{name}", text)
    return "clone"


SKIPPED = {
    "metadata.csv": (
        "id,clinic\n1,north\n",
        "skipped: clone/metadata.csv, which does not contain dialogues and notes",
    ),
    "dataset_infos.json": ('{"default": {"splits": []}}', "notes: its columns are default\n"),
    "README.json": ('["a", "b"]', "skipped: clone/README.json, which does not contain"),
    "data/speakers.jsonl": ('{"name": "Doctor"}\n{"dialogue": "no note"}\n', "its columns are name, dialogue\n"),
    "data/empty.csv": ("dialogue,soap\n", "skipped: clone/data/empty.csv, which has no rows\n"),
    "more.csv.gz": ("", "skipped: clone/more.csv.gz; if it is data, unpack it\n"),
    "Visits.XLSX": ("", "skipped: clone/Visits.XLSX; if it is data, save it as CSV UTF-8\n"),
    "audio/1.wav": ("", "skipped in clone: 1 .md, 1 .wav\n"),
    "LICENSE": ("", "skipped in clone: 1 without a suffix, 1 .md\n"),
    "old/dataset_dict.json": ("{}", "skipped: clone/old, a separate dataset; to read it, give it as --dataset\n"),
}


@pytest.mark.parametrize(("name", "text", "line"), [(name, *rest) for name, rest in SKIPPED.items()])
def test_other_files_beside_the_data_are_skipped_and_listed(name: str, text: str, line: str, capsys):
    assert main(["--dataset", clone((name, text))]) == 0
    assert kept() == sort(rows(30))
    assert rejects() == []
    output = capsys.readouterr().out
    assert line in output
    assert "\ntrain: data/train-00000-of-00001.parquet\ntest: data/test-00000-of-00001.parquet\n" in output


ROW = json.dumps(source_rows(31)[30]) + "\n"
REJECTED = {
    "visits.jsonl": (ROW, "visits.jsonl in clone: its name must contain exactly one split"),
    "half.jsonl": ('{"id": 1}\n' + ROW, "half.jsonl in clone: its name must contain exactly one split"),
    "sections.csv": ("dialogue;s;o;a;p\na;b;c;d;e\n", "sections.csv in clone: its name must contain exactly one split"),
    "broken.jsonl": (ROW[:40], "broken.jsonl in clone: its name must contain exactly one split"),
    "twice.jsonl": (REPEATED_KEY, "twice.jsonl in clone: its name must contain exactly one split"),
    "a/b/c/visits.jsonl": (ROW, "a/b/c/visits.jsonl in clone: its name must contain exactly one split"),
    "validation.csv": ("talk,note\na,b\n", "clone/validation.csv is named validation, but does not contain dialogues"),
    "validation.csv.gz": ("", "clone/validation.csv.gz cannot be read; unpack it, or move it out of the folder"),
    "test/part.xlsx": ("", "clone/test/part.xlsx cannot be read; save it as CSV UTF-8"),
    "train/data.arrow": ("", "clone/train/data.arrow cannot be read; write it as Parquet"),
    "validation.parquet": ("version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
}


@pytest.mark.parametrize(("name", "text", "words"), [(name, *rest) for name, rest in REJECTED.items()])
def test_a_file_that_may_contain_data_is_never_skipped(name: str, text: str, words: str, capsys):
    assert main(["--dataset", clone((name, text))]) == 2
    assert_one_line(capsys.readouterr().err, words)


def folder(**files: list[dict]) -> str:
    for name, part in files.items():
        write_jsonl(f"folder/{name.replace('__', '/')}.jsonl", part)
    return "folder"


def test_files_are_found_at_any_depth_and_through_links(capsys):
    folder(default__v1__train__part0=source_rows(10), train=source_rows(20)[10:])
    write_jsonl("elsewhere/part.jsonl", source_rows(30)[20:])
    Path("folder/test").symlink_to(Path("elsewhere").absolute())
    Path("folder/default/again").symlink_to(Path("folder").absolute())
    assert main(["--dataset", "folder"]) == 0
    assert kept() == sort(rows(30))
    assert load()["test"] == rows(30)[20:]
    assert "\ntrain: default/v1/train/part0.jsonl, train.jsonl\ntest: test/part.jsonl\n" in capsys.readouterr().out


def test_a_split_of_many_files_is_named_by_its_first(capsys):
    folder(**{f"train-{k}": source_rows(10)[k : k + 1] for k in range(10)}, test=source_rows(12)[10:])
    assert main(["--dataset", "folder"]) == 0
    assert "\ntrain: train-0.jsonl, train-1.jsonl, train-2.jsonl and 7 more\n" in capsys.readouterr().out


FOLDERS = {
    "two words for one split": (
        lambda: folder(train=source_rows(10), val=source_rows(12)[10:], validation=source_rows(14)[12:]),
        "folder names validation by different words, here in validation.jsonl; use the same word for all",
    ),
    "two words in a saved dataset": (
        lambda: save("saved", {name: source_rows(3) for name in ("train", "dev", "valid")}),
        "saved names validation by different words, here in valid;",
    ),
    "test alone": (lambda: folder(test=source_rows(10)), "folder has test, but no train"),
    "test alone beside other tables": (
        lambda: folder(test=source_rows(10), info=[{"id": 1}]),
        "folder has test, but no train",
    ),
    "other columns everywhere": (
        lambda: folder(a=[{"id": "1"}], b=[{"talk": "a", "note": "b"}] * 3),
        "no table in folder contains dialogues and notes; in b.jsonl, the columns are talk, note: choose two with",
    ),
    "other columns in each split": (
        lambda: folder(train=[{"talk": "a", "note": "b"}], test=[{"talk": "a", "note": "b"}] * 3),
        "the columns are talk, note: choose two with --dialogue_column and --note_column",
    ),
    "nothing but a file of Excel": (
        lambda: str(Path(put("folder/visits.xlsx", "")).parent),
        "folder/visits.xlsx is not a .jsonl, .json, .csv, .parquet, .tsv, .ndjson file",
    ),
    "link to nothing": (
        lambda: Path(folder(train=source_rows(9)), "test.jsonl").symlink_to("gone.jsonl") or "folder",
        "cannot read folder/test.jsonl: No such file",
    ),
}


@pytest.mark.parametrize(("make", "words"), FOLDERS.values(), ids=FOLDERS.keys())
def test_a_folder_that_cannot_be_read_completely_gives_one_line(make: Callable[[], str], words: str, capsys):
    assert main(["--dataset", make()]) == 2
    assert_one_line(capsys.readouterr().err, words)


def test_folder_and_files_may_name_a_split_by_different_words():
    folder(train=source_rows(10), validation__val0=source_rows(12)[10:], validation__val1=source_rows(14)[12:])
    assert main(["--dataset", "folder"]) == 0
    assert load()["validation"] == rows(14)[10:]


def test_a_single_note_table_beside_others_is_divided_into_splits(capsys):
    folder(visits=source_rows(30), metadata=[{"id": 1}])
    assert main(["--dataset", "folder"]) == 0
    assert kept() == sort(rows(30))
    assert "\ntrain: visits.jsonl\n" in capsys.readouterr().out


def test_a_saved_dataset_with_only_test_is_divided_with_a_message(capsys):
    save("saved", {"test": source_rows(30)})
    assert main(["--dataset", "saved"]) == 0
    assert "saved has only the split test: validation and test are held out from it\n" in capsys.readouterr().out


def test_a_folder_may_contain_the_output_of_an_earlier_run():
    write_jsonl("here/notes.jsonl", source_rows(30))
    for _ in range(2):
        assert main(["--dataset", "here", "--output_dir", "here/soap_dataset"]) == 0
        assert kept("here/soap_dataset") == sort(rows(30))
