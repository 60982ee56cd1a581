"""demo/get_model.py writes a folder of its own and deletes nothing else. No download: a stand-in is the model."""

from pathlib import Path

import pytest

from demo import get_model


class Model:
    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


TOKENIZER = Tokenizer()


class Killed(Tokenizer):
    def save_pretrained(self, folder: Path) -> None:
        raise KeyboardInterrupt


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def get(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run the script in `tmp_path`; what it would download and convert is counted."""
    converted = []

    def run(output_dir: str, tokenizer: Tokenizer = TOKENIZER) -> int:
        monkeypatch.setattr(get_model, "convert", lambda gguf: converted.append(gguf) or (Model(), tokenizer))
        return get_model.main(["--output_dir", output_dir, "--gguf", "model.gguf"])

    monkeypatch.chdir(tmp_path)
    run.converted = converted
    return run


def test_a_folder_with_a_name_of_its_own_is_written_and_nothing_beside_it(get, tmp_path):
    other = tmp_path / "new/SmolLM2-v1.incomplete/mine.txt"
    other.parent.mkdir(parents=True)
    other.touch()
    assert get("new/SmolLM2-v1.5") == get("new/SmolLM2-v1.5") == 0
    assert len(get.converted) == 1
    assert files(tmp_path / "new") == [
        "SmolLM2-v1.5",
        "SmolLM2-v1.5/config.json",
        "SmolLM2-v1.5/tokenizer.json",
        "SmolLM2-v1.incomplete",
        "SmolLM2-v1.incomplete/mine.txt",
    ]


def test_where_the_name_of_the_unfinished_folder_is_taken_nothing_is_done(get, tmp_path, capsys):
    (tmp_path / "SmolLM2.incomplete").mkdir()
    (tmp_path / "SmolLM2.incomplete/mine.txt").touch()
    assert get("SmolLM2") == 2
    assert (files(tmp_path), get.converted) == (["SmolLM2.incomplete", "SmolLM2.incomplete/mine.txt"], [])
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path / 'SmolLM2.incomplete'}, which this needs, is not its own: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize("name", ["full", "full/../full", "file", ".", "full/.."])
def test_what_is_there_and_no_model_is_left_alone_and_told_before_a_download(get, tmp_path, capsys, name):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").touch()
    (tmp_path / "file").touch()
    before = files(tmp_path)
    assert get(name) == 2
    assert (files(tmp_path), get.converted) == (before, [])
    told = capsys.readouterr().err
    assert told == f"error: {(tmp_path / name).resolve()} is there and holds no model: give --output_dir a new folder\n"


def test_an_empty_folder_is_filled_but_the_working_folder_is_not_replaced(get, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert get("empty") == 0
    assert files(tmp_path) == ["empty", "empty/config.json", "empty/tokenizer.json"]
    (tmp_path / "here").mkdir()
    with pytest.MonkeyPatch.context() as inside:
        inside.chdir(tmp_path / "here")
        assert get(".") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'here'} is the working folder: ")


def test_a_run_killed_half_way_starts_again(get, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        get("SmolLM2-v1.5", Killed())
    assert not (tmp_path / "SmolLM2-v1.5").exists()
    (half,) = tmp_path.rglob("config.json")
    (half.parent / "model.safetensors.half").touch()
    assert get("SmolLM2-v1.5") == 0
    assert files(tmp_path) == ["SmolLM2-v1.5", "SmolLM2-v1.5/config.json", "SmolLM2-v1.5/tokenizer.json"]
