"""Test that the review sheet is blinded and balanced, and that labels survive any spreadsheet program."""

import csv
import io
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from evaluation.review_sheet import COLUMNS, draw_sample, read_sheet, write_sheet
from evaluation.run.records import note_hash
from prompts import SECTIONS

ROW = {"dialogue": "Doctor: What is it?\nPatient: A cough.", "S": "Cough.", "O": "Clear.", "A": "Cold.", "P": "Rest."}


def run_of(letters: str, text: str = "=1+1") -> tuple[list[dict], list[dict]]:
    """Return predictions and judgements, one note for each letter: p passed, f failed, c failed by rule, i invalid."""
    predictions, judgements = [], []
    for index, letter in enumerate(letters):
        note = dict.fromkeys(SECTIONS, None if letter == "i" else f"{text} {index}")
        predictions.append({"index": index, "status": "invalid" if letter == "i" else "ok", **note})
        for section in SECTIONS:
            verdict = {"verdict": "pass" if letter == "p" else "fail", "source": "code" if letter in "ci" else "judge"}
            judgements.append({"index": index, "section": section, "control": None, "attack": None, **verdict})
    return predictions, judgements


def written(path: Path, letters: str, size: int, rows: list[dict] | None = None, **note) -> list[dict[str, str]]:
    predictions, judgements = run_of(letters, **note)
    write_sheet(path, predictions, judgements, rows or [ROW] * len(letters), size)
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def filled_in(rows: list[dict[str, str]], path: Path, encoding: str = "utf-8-sig", **dialect) -> Path:
    """Save rows as a spreadsheet does, with PASS and Fail as alternating verdicts."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, **dialect)
    writer.writeheader()
    writer.writerows(row | {"verdict": ("PASS ", "Fail")[k % 2], "rater": "Zoë"} for k, row in enumerate(rows))
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def test_each_section_and_verdict_gives_equally_many_samples():
    letters = "p" * 70 + "f" * 25 + "c" * 2 + "i" * 3
    sample = draw_sample(*run_of(letters), size=40)
    assert len(sample) == len(set(sample)) == 40
    counts = Counter((letters[index], section) for index, section in sample)
    # two that failed by rule in each section, and as many of the two others; none without a text
    assert counts == {(letter, section): 2 if letter == "c" else 4 for letter in "pfc" for section in SECTIONS}
    assert [letters[index] for index, _ in sample] != sorted(letters[index] for index, _ in sample)


def test_a_larger_sample_includes_the_smaller_one_in_any_order_of_records():
    predictions, judgements = run_of("pfpfppcp")
    small = draw_sample(predictions, judgements, 8)
    assert set(small) < set(draw_sample(predictions, judgements, 20))
    assert draw_sample(predictions[::-1], judgements[::-1], 8) == small
    assert len(draw_sample(predictions, judgements, 1000)) == 32


def test_lenient_notes_are_sampled_by_their_verdicts():
    predictions, judgements = run_of("ppff")
    for index in (1, 2):
        predictions[index] |= {"status": "lenient", "form": "headings"}
    assert {index for index, _ in draw_sample(predictions, judgements, 16)} == {0, 1, 2, 3}
    assert draw_sample(predictions, judgements, 8) == draw_sample(*run_of("ppff"), 8)


def test_a_sheet_shows_texts_but_neither_verdicts_nor_models(tmp_path):
    rows = written(tmp_path / "sheet.csv", "pf", 8)
    assert (tmp_path / "sheet.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 8
    for row in rows:
        assert row["verdict"] == row["rater"] == ""
        assert row["dialogue"] == ROW["dialogue"] and row["reference"] == ROW[row["section"]]
        assert row["note_hash"] == "sha256:" + note_hash(f"=1+1 {row['index']}")
        assert row["note section"] == f"'=1+1 {row['index']}"
        assert not {"pass", "fail", "judge"} & {cell.lower() for cell in row.values()}


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝"])
def test_no_text_of_dialogue_reference_or_note_is_a_formula(tmp_path, start):
    row = dict.fromkeys(ROW, f'{start}HYPERLINK("http://x")')
    for cells in written(tmp_path / f"{ord(start)}.csv", "p", 4, [row], text=start):
        for name in ("dialogue", "reference", "note section"):
            assert cells[name].startswith(f"'{start}")


def test_a_text_that_exceeds_a_cell_is_cut_and_says_so(tmp_path):
    (row, *_) = written(tmp_path / "sheet.csv", "p", 4, [ROW | {"dialogue": "word " * 10_000}])
    assert len(row["dialogue"]) < 32_767
    assert row["dialogue"].endswith("[20000 more characters]")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_labels_are_read_from_a_sheet_saved_by_a_spreadsheet(tmp_path, delimiter, encoding):
    rows = written(tmp_path / "sheet.csv", "pf", 6)
    labels, without = read_sheet(str(filled_in(rows, tmp_path / "back.csv", encoding, delimiter=delimiter)))
    assert without == 0
    assert [label["verdict"] for label in labels] == ["pass", "fail"] * 3
    for row, label in zip(rows, labels, strict=True):
        assert (label["index"], label["section"], label["rater"]) == (int(row["index"]), row["section"], "Zoë")
        assert label["note_hash"] == note_hash(f"=1+1 {row['index']}")
    assert labels[2]["where"].endswith("back.csv:4")


def test_rows_without_a_verdict_are_counted_and_left_out(tmp_path):
    path = tmp_path / "half.csv"
    path.write_text("index,section,verdict\n0,S,pass\n1,S,\n2,S, \n,,\n3,P,fail\n")
    labels, without = read_sheet(str(path))
    assert [(label["index"], label["section"]) for label in labels] == [(0, "S"), (3, "P")]
    assert without == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index,section\n0,S\n", ":1 has no column verdict"),
        ("", ":1 has no column index"),
        ("index,section,verdict\n0,S,pass\nzero,S,pass\n", ":3: the index is not a number"),
        ('index,section,verdict\n0,S,pass\n1,S,"pass\n', ":3 is not valid CSV"),
    ],
)
def test_a_faulty_sheet_is_refused_with_file_and_row(tmp_path, text, message):
    path = tmp_path / "sheet.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_sheet(str(path))


def test_a_run_without_text_to_review_is_refused(tmp_path):
    with pytest.raises(UserError, match="no note of this run has text"):
        written(tmp_path / "sheet.csv", "ii", 4)


@given(texts=st.lists(st.text(min_size=1, max_size=30), min_size=4, max_size=4), rater=st.text(max_size=5))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back_with_its_hash(tmp_path, texts, rater):
    predictions, judgements = run_of("p")
    predictions[0] |= dict(zip(SECTIONS, texts, strict=True))
    if not any(text.strip() for text in texts):
        return
    write_sheet(tmp_path / "sheet.csv", predictions, judgements, [dict.fromkeys(ROW, texts[0])], 4)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "sheet.csv").read_bytes().decode("utf-8-sig"), newline="")))
    labels, _ = read_sheet(str(filled_in(rows, tmp_path / "back.csv")))
    assert [label["note_hash"] for label in labels] == [note_hash(predictions[0][row["section"]]) for row in rows]
