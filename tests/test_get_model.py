"""Test that demo/get_model.py writes only its own folder. A stand-in replaces the download and the model."""

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
    """Return a function that runs the script in `tmp_path`. Its attribute `converted` lists the conversions."""
    converted = []

    def run(output_dir: str, tokenizer: Tokenizer = TOKENIZER) -> int:
        monkeypatch.setattr(get_model, "convert", lambda gguf: converted.append(gguf) or (Model(), tokenizer))
        return get_model.main(["--output_dir", output_dir, "--gguf", "model.gguf"])

    monkeypatch.chdir(tmp_path)
    run.converted = converted
    return run


def test_the_script_writes_only_the_given_folder(get, tmp_path):
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


def test_a_foreign_staging_folder_is_refused_and_left_unchanged(get, tmp_path, capsys):
    (tmp_path / "SmolLM2.incomplete").mkdir()
    (tmp_path / "SmolLM2.incomplete/mine.txt").touch()
    assert get("SmolLM2") == 2
    assert (files(tmp_path), get.converted) == (["SmolLM2.incomplete", "SmolLM2.incomplete/mine.txt"], [])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'SmolLM2.incomplete'} exists but was not written by this script; ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["full", "full/../full", "file", ".", "full/.."])
def test_files_that_are_not_a_model_are_refused_before_the_download(get, tmp_path, capsys, name):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").touch()
    (tmp_path / "file").touch()
    before = files(tmp_path)
    assert get(name) == 2
    assert (files(tmp_path), get.converted) == (before, [])
    path, error = (tmp_path / name).resolve(), capsys.readouterr().err
    assert error == f"error: {path} exists but is not a model; give a new folder as --output_dir\n"


def test_an_empty_folder_is_filled_unless_it_is_the_working_directory(get, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert get("empty") == 0
    assert files(tmp_path) == ["empty", "empty/config.json", "empty/tokenizer.json"]
    (tmp_path / "here").mkdir()
    with pytest.MonkeyPatch.context() as inside:
        inside.chdir(tmp_path / "here")
        assert get(".") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'here'} is the working directory; ")


def test_a_killed_run_can_be_repeated(get, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        get("SmolLM2-v1.5", Killed())
    assert not (tmp_path / "SmolLM2-v1.5").exists()
    (half,) = tmp_path.rglob("config.json")
    (half.parent / "model.safetensors.half").touch()
    assert get("SmolLM2-v1.5") == 0
    assert files(tmp_path) == ["SmolLM2-v1.5", "SmolLM2-v1.5/config.json", "SmolLM2-v1.5/tokenizer.json"]
