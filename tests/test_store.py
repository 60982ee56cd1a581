import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common.errors import UserError
from evaluation.run.folder import RunFolder
from evaluation.run.manifest import FORMAT
from evaluation.run.records import JsonLines

RECORDS = [{"index": 0, "raw": 'قلب "♥"\n'}, {"index": 1, "raw": ""}, {"index": 2, "raw": "x" * 200_000}]
DATA = {"data": {"dataset_hash": "a", "n": 3}}


def add_record(lines: JsonLines) -> None:
    lines.append(dict.fromkeys(lines._keys, 0))


def test_records_are_read_back_in_order(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "records.jsonl")
    for record in RECORDS:
        lines.append(record)
        assert list(JsonLines(lines.path))[-1] == record, "a record must be on disk when append returns"
    assert list(lines) == RECORDS


def test_a_missing_file_has_no_records(tmp_path: Path) -> None:
    assert list(JsonLines(tmp_path / "records.jsonl")) == []


def test_a_file_cut_at_any_byte_keeps_its_complete_records(tmp_path: Path) -> None:
    whole = b"".join(json.dumps({"index": k, "raw": "ü"}, ensure_ascii=False).encode() + b"\n" for k in range(3))
    for cut in range(len(whole) + 1):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(whole[:cut])
        lines = JsonLines(path)
        kept = whole[:cut].count(b"\n")
        assert [record["index"] for record in lines] == list(range(kept))
        lines.append({"index": 9})
        assert [record["index"] for record in lines] == [*range(kept), 9]


def test_reading_does_not_change_a_file_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"index": 0}\n{"index": 1')
    assert list(JsonLines(path)) == [{"index": 0}]
    assert path.read_bytes() == b'{"index": 0}\n{"index": 1'


@pytest.mark.parametrize(
    "line", [b"not json\n", b"[1]\n", b"\x00\x00\n", b'{"a": \xff}\n', b"\n", b"[" * 99999 + b"\n"]
)
def test_the_error_for_a_damaged_line_names_file_and_row(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"index": 0}\n' + line + b'{"index": 1}\n')
    with pytest.raises(UserError, match=r"records\.jsonl:2 .*--overwrite"):
        list(JsonLines(path))


def test_the_error_for_a_missing_key_names_file_row_and_key(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"index": 0, "S": ""}\n{"index": 1}\n')
    with pytest.raises(UserError, match=r"records\.jsonl:2 has no S"):
        list(JsonLines(path, keys=("index", "S")))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_gives_one_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device; make room"):
        JsonLines(path).append({"index": 0})


def test_a_run_resumes_if_nothing_differs(tmp_path: Path) -> None:
    identity = DATA | {"generate": {"model": "m", "adapter": None}}
    for _ in range(2):
        with RunFolder(tmp_path / "run") as folder:
            manifest = folder.begin(identity, overwrite=None)
            assert manifest.identity == identity
            add_record(folder.predictions)
    assert len(list(folder.predictions)) == 2


def test_a_changed_setting_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.begin(DATA | {"generate": {"max_new_tokens": 10}}, overwrite=None)
        add_record(folder.predictions)
    before = (tmp_path / "manifest.json").read_bytes()
    with RunFolder(tmp_path) as folder, pytest.raises(UserError, match="max_new_tokens = 10, not 20"):
        folder.begin(DATA | {"generate": {"max_new_tokens": 20}}, overwrite=None)
    with RunFolder(tmp_path) as folder, pytest.raises(UserError, match='dataset_hash = "a", not "b"'):
        folder.begin({"data": {"dataset_hash": "b", "n": 3}}, overwrite=None)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_settings_may_change_until_records_depend_on_them(tmp_path: Path) -> None:
    def identity(length: int) -> dict:
        return DATA | {part: {"max_model_len": length} for part in ("generate", "judge")}

    with RunFolder(tmp_path) as folder:
        folder.begin(identity(8192), overwrite=None)
        folder.begin(identity(4096), overwrite=None)
        add_record(folder.predictions)
        with pytest.raises(UserError, match=r"4096, not 2048; .*--stage judge to judge the notes that are there"):
            folder.begin(identity(2048), overwrite=None)
        judge_only = {part: values for part, values in identity(2048).items() if part != "generate"}
        manifest = folder.begin(judge_only, overwrite=None)
        assert [manifest.identity[part]["max_model_len"] for part in ("generate", "judge")] == [4096, 2048]
        add_record(folder.judgements)
        with pytest.raises(UserError, match=r"2048, not 1024; .*--stage judge --overwrite"):
            folder.begin(judge_only | {"judge": {"max_model_len": 1024}}, overwrite=None)


def test_a_new_stage_is_added(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.begin(DATA | {"generate": {"model": "m"}}, overwrite=None)
        manifest = folder.begin(DATA | {"judge": {"judge_model": "j"}}, overwrite=None)
    assert manifest.identity == DATA | {"generate": {"model": "m"}, "judge": {"judge_model": "j"}}


@pytest.mark.parametrize(("stage", "left"), [("judge", True), ("generate", False)])
def test_overwrite_replaces_a_stage_and_the_later_ones(tmp_path: Path, stage: str, left: bool) -> None:
    with RunFolder(tmp_path) as folder:
        folder.begin(DATA | {"generate": {"model": "m"}, "judge": {"judge_model": "j"}}, overwrite=None)
        add_record(folder.predictions)
        add_record(folder.judgements)
    with RunFolder(tmp_path) as folder:
        folder.begin(DATA | {stage: {"model": "other"}}, overwrite=stage)
        assert folder.predictions.path.exists() == left
        assert not folder.judgements.path.exists()


def test_overwrite_deletes_nothing_if_the_call_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.begin(DATA | {"judge": {"judge_model": "j"}}, overwrite=None)
        add_record(folder.predictions)
        add_record(folder.judgements)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = {"data": DATA["data"] | {"n": 2}, "judge": {"judge_model": "other"}}
    with RunFolder(tmp_path) as folder, pytest.raises(UserError, match="n = 3, not 2"):
        folder.begin(other, overwrite="judge")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from evaluation.run.folder import RunFolder; RunFolder(Path({str(tmp_path)!r}))"
    with RunFolder(tmp_path):
        second = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert "another run is writing here" in second.stderr
    RunFolder(tmp_path).__exit__()


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT + 1}))
    with RunFolder(tmp_path) as folder, pytest.raises(UserError, match="another version"):
        folder.begin(DATA, overwrite=None)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_an_unreadable_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with RunFolder(tmp_path) as folder, pytest.raises(UserError, match=r"manifest\.json"):
        folder.begin(DATA, overwrite=None)


def test_predictions_without_a_manifest_are_refused(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text('{"index": 0}\n')
    with RunFolder(tmp_path) as folder, pytest.raises(UserError, match=r"no manifest\.json"):
        folder.begin(DATA, overwrite=None)


def test_a_file_instead_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="another --output_dir"):
        RunFolder(tmp_path / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="another --output_dir"):
        RunFolder(tmp_path / "run")
