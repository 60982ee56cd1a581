"""Prompts that an error leaves without an answer are counted with their cause; a run of nothing else fails."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE, FakeModel
from test_chat_template import NO_SYSTEM_ROLE, changed_model
from test_eval import Harness, judge, number_of, write

import eval
import prompts
from evaluation import pipeline
from evaluation.engines.base import Request

CAUSE = "TypeError: no text"


class Failing(FakeModel):
    """Answers some prompts, and none of the others for an error."""

    def __init__(self, answer: Callable[[prompts.Messages, int], str], fails: Callable[[str], bool]):
        super().__init__(answer)
        self.fails = fails

    def _send(self, number: int, request: Request) -> None:
        if not self.fails(request.messages[-1]["content"]):
            return super()._send(number, request)
        return self.report({"id": number, "text": "", "finish_reason": "error", "error": CAUSE})


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_dataset: Path, tmp_path: Path) -> Harness:
    return Harness(monkeypatch, tiny_model, tiny_dataset, tmp_path / "run")


def error_line(capsys: pytest.CaptureFixture) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_a_run_without_any_note_fails_with_the_cause_at_every_stage(harness, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "start_generator", lambda *_: Failing(write, lambda _: True))
    for stage in ("generate", "all", "judge", "report"):
        assert harness.run("--stage", stage) == 2
        line = error_line(capsys)
        assert f"all 6 prompts for notes failed (the engine gave up: {CAUSE})" in line and "--overwrite" in line
    assert not (harness.folder / "results.json").exists()
    assert {record["reason"] for record in harness.records("predictions")} == {f"the engine gave up: {CAUSE}"}


def test_a_run_without_any_verdict_fails_with_the_cause(harness, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "start_judge", lambda *_: Failing(judge, lambda _: True))
    assert harness.run() == 2
    line = error_line(capsys)
    assert "prompts for verdicts failed" in line and CAUSE in line and "--stage judge --overwrite" in line
    assert not (harness.folder / "results.json").exists()
    reasons = {record["reason"] for record in harness.records("judgements") if record["source"] == "judge"}
    assert reasons == {f"no reply: error ({CAUSE})"}


def test_failed_prompts_among_others_are_counted_and_unscored(harness, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "start_generator", lambda *_: Failing(write, lambda text: number_of(text) == 3))
    assert harness.run() == 0
    assert f"1 of 6 prompts for notes failed and are unscored; the first: the engine gave up: {CAUSE}" in (
        capsys.readouterr().err
    )
    sections = harness.results()["sections"]
    assert all(sections[section]["unscored"] >= 1 for section in prompts.SECTIONS)


def test_a_finished_run_with_replaced_verdicts_is_whole_again(harness, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "start_judge", lambda *_: Failing(judge, lambda _: True))
        assert harness.run() == 2
    assert harness.run("--stage", "judge", "--overwrite") == 0
    assert "failed" not in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("at_fault", ["generator", "judge"])
def test_a_template_without_a_system_role_is_one_line_before_an_engine_starts(
    tiny_model, tiny_dataset, tmp_path, capsys, at_fault
):
    templates = dict.fromkeys(("generator", "judge"), CHAT_TEMPLATE) | {at_fault: NO_SYSTEM_ROLE}
    paths = {name: changed_model(tiny_model, tmp_path / name, text) for name, text in templates.items()}
    run = tmp_path / "run"
    call = [str(paths["generator"]), "--judge_model", str(paths["judge"]), "--dataset_path", str(tiny_dataset)]
    assert eval.main([*call, "--output_dir", str(run)]) == 2
    line = error_line(capsys)
    assert line.startswith(f"error: {paths[at_fault]}: the chat template cannot render a system and a user message")
    assert "(System role not supported)" in line
    assert not (run / "predictions.jsonl").exists()
    assert "vllm" not in (run / "generate.log").read_text().lower(), "the engine started"
    paths[at_fault].joinpath("chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert json.loads((run / "manifest.json").read_text())["identity"], "the same command may follow"
