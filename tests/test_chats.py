"""Test that chats and folders of text files become visits, or that a row or one line says why not."""

import json
from pathlib import Path

import pytest
from conftest import rows
from hypothesis import given
from hypothesis import strategies as st
from test_preprocess_data import (  # noqa: F401
    assert_one_line,
    clean_process,
    load,
    rejects,
    sort,
    write_jsonl,
    write_parquet,
)

import prompts
from preprocess_data import main
from preprocessing.near_duplicates import THRESHOLD, find_near_duplicates, similarity, word_runs

VISITS = rows(12)


def note(row: dict[str, str], kind: int) -> str:
    sections = {section: row[section] for section in prompts.SECTIONS}
    return prompts.write_note(sections) if kind % 2 else "\n".join(f"{key}: {text}" for key, text in sections.items())


def messages(row: dict[str, str], kind: int) -> list[dict[str, str]]:
    chat = [{"role": "user", "content": row["dialogue"]}, {"role": "assistant", "content": note(row, kind)}]
    return [{"role": "system", "content": "Write a note."}, *chat] if kind % 3 else chat


def conversations(row: dict[str, str], kind: int) -> list[dict[str, str]]:
    names = {"system": "system", "user": ("human", "user")[kind % 2], "assistant": ("gpt", "Assistant")[kind % 2]}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in messages(row, kind)]


def kept(path: str = "soap_dataset") -> list[dict[str, str]]:
    return sort([row for part in load(path).values() for row in part])


# --- chats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(("column", "make"), [("messages", messages), ("conversations", conversations)])
def test_a_chat_of_dialogue_and_note_is_a_visit(column, make, suffix):
    records = [{"id": k, column: make(row, k)} for k, row in enumerate(VISITS)]
    path = write_parquet("chats.parquet", records) if suffix == "parquet" else write_jsonl("chats.jsonl", records)
    if suffix == "json":
        path = "chats.json"
        Path(path).write_text(json.dumps(records))
    assert main(["--dataset", str(path)]) == 0
    assert kept() == sort(VISITS)


def test_columns_of_dialogue_and_note_take_precedence_over_a_chat():
    """The default dataset has both."""
    records = [row | {"messages": messages(rows(13)[12], 1)} for row in VISITS]
    assert main(["--dataset", str(write_jsonl("both.jsonl", records))]) == 0
    assert kept() == sort(VISITS)


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (messages(VISITS[0], 1) * 2, "messages has 2 messages of the user and 2 of the assistant, not one each"),
        (messages(VISITS[0], 1)[:2], "messages has 1 messages of the user and 0 of the assistant, not one each"),
        (
            [*messages(VISITS[0], 1), {"role": "tool", "content": "x"}],
            "messages has a message whose role is not system, user or assistant",
        ),
        ([{"role": "user", "content": ["x"]}, {"role": "assistant", "content": "x"}], "dialogue is list, not text"),
        ([{"role": "user", "content": " "}, {"role": "assistant", "content": "x"}], "dialogue is empty"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Sure!"}],
            "no heading for Subjective (S)",
        ),
        ([{"role": "user"}], "no column dialogue"),
        ("User: x", "no column dialogue"),
        ([], "no column dialogue"),
    ],
)
def test_a_chat_that_is_not_one_visit_is_rejected_with_the_reason(chat, reason):
    records = [{"messages": messages(row, k)} for k, row in enumerate(VISITS)]
    path = write_jsonl("chats.jsonl", [*records, {"messages": chat}])
    assert main(["--dataset", str(path)]) == 0
    ((_, row, found),) = rejects("soap_dataset")
    assert row == 13 and found.startswith(reason)


def test_a_list_of_rows_named_like_a_chat_is_still_a_list_of_rows():
    Path("visits.json").write_text(json.dumps({"conversations": VISITS}))
    assert main(["--dataset", "visits.json"]) == 0
    assert kept() == sort(VISITS)


# --- a folder with files for each visit ------------------------------------------------------------------------------


def put_visits(folder: str, visits: list[dict[str, str]]) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for k, row in enumerate(visits):
        Path(folder, f"visit-{k}.txt").write_text(row["dialogue"])
        Path(folder, f"visit-{k}.note.txt").write_text(note(row, k))


def test_two_text_files_are_a_visit(capsys):
    put_visits("visits/monday", VISITS[:6])
    put_visits("visits/tuesday", VISITS[6:])
    assert main(["--dataset", "visits", "--dialogue_column", "transcript"]) == 0
    assert kept() == sort(VISITS)
    assert "train: 12 visits in text files" in capsys.readouterr().out


def test_folders_of_text_files_may_be_named_by_split():
    for split, part in (("train", VISITS[:6]), ("dev", VISITS[6:9]), ("test", VISITS[9:])):
        put_visits(f"visits/{split}", part)
    assert main(["--dataset", "visits"]) == 0
    assert sort(load("soap_dataset")["test"]) == sort(VISITS[9:])
    assert sort(load("soap_dataset")["validation"]) == sort(VISITS[6:9])


def test_a_text_file_without_its_partner_is_rejected_and_named():
    put_visits("visits", VISITS)
    Path("visits/alone.txt").write_text("Doctor: Hello.")
    Path("visits/lost.note.txt").write_text("S: a")
    Path("visits/visit-0.txt").write_bytes(b"\xff\xfeD")
    assert main(["--dataset", "visits"]) == 0
    assert sorted(rejects("soap_dataset")) == [
        ("visits/alone.txt", 1, "no alone.note.txt beside it"),
        ("visits/lost.note.txt", 1, "no lost.txt beside it"),
        ("visits/visit-0.txt", 1, "not UTF-8"),
    ]
    assert kept() == sort(VISITS[1:])


@pytest.mark.parametrize("dialogue_suffix", [".txt", ".TXT", ".Txt"])
@pytest.mark.parametrize("note_suffix", [".note.txt", ".NOTE.TXT", ".note.TXT"])
def test_suffixes_of_text_files_may_be_in_any_case(dialogue_suffix, note_suffix):
    put_visits("visits", VISITS)
    for path in sorted(Path("visits").iterdir()):
        is_note = path.name.endswith(".note.txt")
        stem = path.name.removesuffix(".note.txt" if is_note else ".txt")
        path.rename(path.with_name(stem + (note_suffix if is_note else dialogue_suffix)))
    assert main(["--dataset", "visits"]) == 0
    assert kept() == sort(VISITS)


def test_two_files_of_one_name_are_rejected_and_named():
    put_visits("visits", VISITS)
    Path("visits/VISIT-0.TXT").write_text("Doctor: Hello.")
    assert main(["--dataset", "visits"]) == 0
    reason = "VISIT-0.TXT and visit-0.txt have the same name"
    assert sorted(rejects("soap_dataset")) == [("visits/VISIT-0.TXT", 1, reason)]


@pytest.mark.parametrize("table", ["id,when\n1,monday\n", "id,when\n", ""])
def test_a_table_without_notes_does_not_hide_text_visits(table, capsys):
    put_visits("visits", VISITS)
    Path("visits/metadata.csv").write_text(table)
    assert main(["--dataset", "visits"]) == 0
    assert kept() == sort(VISITS)
    assert "skipped: visits/metadata.csv" in capsys.readouterr().out


def test_visits_in_and_beside_a_split_s_folder_are_refused_in_one_line(capsys):
    put_visits("visits/train", VISITS[:6])
    put_visits("visits", VISITS[6:])
    assert main(["--dataset", "visits"]) == 2
    assert_one_line(capsys.readouterr().err, "move all of them into folders named train, validation, test, or none")


def test_text_files_without_notes_are_refused_in_one_line(capsys):
    Path("visits").mkdir()
    Path("visits/a.txt").write_text("Doctor: Hello.")
    assert main(["--dataset", "visits"]) == 2
    assert_one_line(capsys.readouterr().err, "NAME.note.txt")


def test_a_folder_with_a_json_file_for_each_visit_is_one_table(capsys):
    Path("visits").mkdir()
    for k, row in enumerate(VISITS):
        Path("visits", f"{k}.json").write_text(json.dumps(row))
    assert main(["--dataset", "visits"]) == 0
    assert kept() == sort(VISITS)
    assert "train: 12 files of one visit each" in capsys.readouterr().out


# --- near-duplicates -------------------------------------------------------------------------------------------------

WORDS = st.sampled_from([f"word{k}" for k in range(400)])


@given(st.lists(WORDS, min_size=60, max_size=120), st.integers(0, 3), st.data())
def test_a_dialogue_with_few_changed_words_is_found(words, changes, data):
    copy = list(words)
    for _ in range(changes):
        copy[data.draw(st.integers(0, len(copy) - 1))] = "changed"
    texts = [" ".join(words), " ".join(copy).upper()]
    near = find_near_duplicates({"test": [{"dialogue": texts[0]}], "validation": [], "train": [{"dialogue": texts[1]}]})
    exact = similarity(*(word_runs(text) for text in texts))
    if exact >= 0.6:
        assert near["train"] == {0: "test"}
    if exact < THRESHOLD:
        assert near["train"] == {}


def test_different_visits_of_the_demo_are_no_near_duplicates():
    lines = Path(__file__).parent.parent.joinpath("demo", "dialogues.jsonl").read_text().splitlines()
    visits = [json.loads(line) for line in lines]
    assert len(visits) == 160
    near = find_near_duplicates({"test": visits[:40], "validation": visits[40:80], "train": visits[80:]})
    assert not any(near.values())


def splits_with_copies() -> str:
    """Write three splits in which a train and a validation dialogue nearly equal a test one; return the folder."""
    long = [row | {"dialogue": " ".join(f"w{k}x{i}" for i in range(80))} for k, row in enumerate(rows(9))]
    copies = [row | {"dialogue": long[0]["dialogue"] + " Goodbye."} for row in rows(11)[9:]]
    copies[1]["dialogue"] += " Take care."
    for split, part in (("train", [*long[1:4], copies[0]]), ("validation", [long[4], copies[1]]), ("test", [long[0]])):
        write_jsonl(f"data/{split}.jsonl", part)
    return "data"


def test_near_duplicates_across_splits_are_counted_but_kept(capsys):
    assert main(["--dataset", splits_with_copies()]) == 0
    assert "2 dialogues of train or validation are nearly the same as one in" in capsys.readouterr().out
    assert len(kept()) == 7


def test_near_duplicates_across_splits_are_dropped_on_request():
    assert main(["--dataset", splits_with_copies(), "--drop_near_duplicates"]) == 0
    assert sorted(rejects("soap_dataset")) == [
        ("data/train.jsonl", 4, "nearly the same dialogue in test"),
        ("data/validation.jsonl", 2, "nearly the same dialogue in test"),
    ]
    assert {split: len(part) for split, part in load("soap_dataset").items()} == {
        "train": 3,
        "validation": 1,
        "test": 1,
    }


def test_near_duplicates_are_found_in_held_out_parts_too(capsys):
    text = " ".join(f"w{i}" for i in range(80))
    visits = [row | {"dialogue": f"{text} end{k}"} for k, row in enumerate(VISITS)]
    assert main(["--dataset", str(write_jsonl("same.jsonl", visits)), "--drop_near_duplicates"]) == 2
    assert_one_line(capsys.readouterr().err, "--drop_near_duplicates leaves no row for")
