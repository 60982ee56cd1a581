"""--note_schema: which texts the schema of a note allows, and how the flag reaches requests, identity and results."""

import json
import random
from pathlib import Path

import pytest
import test_eval
from conftest import FakeModel, build_tokenizer, rows
from test_eval import Harness

import prompts
from evaluation.engines.base import Request
from evaluation.engines.note_schema import NOTE_SCHEMA
from evaluation.engines.vllm_worker import NO_FREE_WHITE_SPACE
from evaluation.judging import judge

harness = test_eval.harness  # a fixture
BY_CHANCE = 400  # texts


class Grammar:
    """The schema of a note as vLLM's engine applies it, for the tokenizer of the tiny model."""

    def __init__(self) -> None:
        import xgrammar

        self.tokenizer = build_tokenizer()
        info = xgrammar.TokenizerInfo.from_huggingface(self.tokenizer, stop_token_ids=self.tokenizer.eos_token_id)
        compiler = xgrammar.GrammarCompiler(info)
        self.size = info.vocab_size
        free = not NO_FREE_WHITE_SPACE["disable_any_whitespace"]
        self.compiled = compiler.compile_json_schema(json.dumps(NOTE_SCHEMA), any_whitespace=free)

    def allows(self, text: str) -> bool:
        import xgrammar

        matcher = xgrammar.GrammarMatcher(self.compiled, terminate_without_stop_token=True)
        return matcher.accept_string(text) and matcher.is_terminated()

    def write(self, dice: random.Random) -> str:
        """Return a text of random allowed tokens, about ten for each section."""
        import numpy
        import xgrammar

        matcher = xgrammar.GrammarMatcher(self.compiled)
        mask, ids = xgrammar.allocate_token_bitmask(1, self.size), []
        closing = set(self.tokenizer.convert_tokens_to_ids(['"', '",', '"}']))
        while not matcher.is_terminated():
            matcher.fill_next_token_bitmask(mask)
            bits = numpy.unpackbits(mask.numpy().view(numpy.uint8), bitorder="little")[: self.size]
            allowed = numpy.flatnonzero(bits).tolist()
            ends = sorted(closing.intersection(allowed))
            ids.append(dice.choice(ends if ends and dice.random() < 0.1 else allowed))
            assert matcher.accept_token(ids[-1])
        return self.tokenizer.decode(ids[:-1])  # without the end-of-text token


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar()


def test_any_text_of_the_schema_is_read_as_a_note_unless_it_says_nothing(grammar: Grammar) -> None:
    dice, texts = random.Random(0), set()
    for _ in range(BY_CHANCE):
        text = grammar.write(dice)
        texts.add(text)
        assert text.startswith('{"S": "') and not set(text) & {"\n", "\r", "\t"}
        spoken = json.loads(text)
        assert list(spoken) == list(prompts.SECTIONS)
        if any(character.isalnum() for part in spoken.values() for character in part):
            assert prompts.read_note(text).keys() == spoken.keys()
        else:
            with pytest.raises(prompts.NoteError, match="all sections are empty"):
                prompts.read_note(text)
    assert len(texts) > 0.9 * BY_CHANCE


@pytest.mark.parametrize(
    "text", ["", "1. Rest.\n2. Fluids.", 'Feels "dizzy".', "C:\\", "38.5 °C, Übelkeit, 😀", "A cough. " * 300]
)
@pytest.mark.parametrize("section", prompts.SECTIONS)
def test_the_schema_allows_every_text_that_training_teaches(section: str, text: str, grammar: Grammar) -> None:
    note = {key: rows(1)[0][key] for key in prompts.SECTIONS} | {section: text}
    assert grammar.allows(prompts.write_note(note))
    assert prompts.read_note(prompts.write_note(note))[section] == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        '{"S": "a", "O": "b", "A": "c"}',
        '{"O": "b", "S": "a", "A": "c", "P": "d"}',
        '{"S": "a", "O": "b", "A": "c", "P": "d", "T": "e"}',
        '{"S": "a", "O": "b", "A": "c", "P": ["d"]}',
        '{"S": "a", "O": "b", "A": "c", "P": null}',
        '{"S": "a",  "O": "b", "A": "c", "P": "d"}',
        '{\n"S": "a", "O": "b", "A": "c", "P": "d"}',
        '{"S": "a\nb", "O": "b", "A": "c", "P": "d"}',
        ' {"S": "a", "O": "b", "A": "c", "P": "d"}',
        '{"S": "a", "O": "b", "A": "c", "P": "d"} ',
        "S: a",
    ],
)
def test_the_schema_allows_no_other_form(text: str, grammar: Grammar) -> None:
    assert grammar.allows('{"S": "a", "O": "b", "A": "c", "P": "d"}')
    assert not grammar.allows(text)


class Recording(FakeModel):
    def _send(self, number: int, request: Request) -> None:
        self.__dict__.setdefault("schemas", []).append(request.schema)
        super()._send(number, request)


@pytest.mark.parametrize("flag", [[], ["--note_schema"]])
def test_the_flag_alone_decides_on_the_schema_of_notes(
    flag: list[str], harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_eval, "FakeModel", Recording)
    assert harness.run(*flag) == 0
    (generator,), (model,) = harness.generators, harness.judges
    assert generator.schemas == [NOTE_SCHEMA if flag else None] * 6
    assert model.schemas.count(judge.VERDICT_SCHEMA) == len(model.asked) > 24
    assert model.schemas.count(None) == len(model.questions) > 24  # statements
    assert harness.results()["note_schema"] == bool(flag)


def test_notes_with_and_without_the_schema_do_not_mix(harness: Harness, capsys: pytest.CaptureFixture) -> None:
    assert harness.run("--note_schema") == 0
    notes = harness.records("predictions")
    assert harness.run() == 2
    assert "holds a run with note_schema = true, not false" in capsys.readouterr().err
    assert harness.run("--stage", "report") == 0
    assert harness.results()["note_schema"] is True
    assert harness.records("predictions") == notes
    assert harness.run("--overwrite") == 0
    assert harness.results()["note_schema"] is False


def test_a_run_older_than_the_flag_counts_as_one_without_the_schema(
    harness: Harness, capsys: pytest.CaptureFixture
) -> None:
    def make_older(path: Path) -> None:
        manifest = json.loads(path.read_text())
        del manifest["identity"]["generate"]["note_schema"]
        path.write_text(json.dumps(manifest))

    assert harness.run() == 0
    make_older(harness.folder / "manifest.json")
    assert harness.run("--stage", "report") == 0
    assert harness.results()["note_schema"] is False
    assert harness.run("--note_schema") == 2
    assert "note_schema = false, not true" in capsys.readouterr().err
    assert harness.run() == 0
    assert len(harness.generators) == 1, "all notes were there"
