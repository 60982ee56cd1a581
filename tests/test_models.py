import json
import os
import shutil
from pathlib import Path

import pytest

from common.errors import UserError
from evaluation.engines.models import context_length, resolve_adapter, resolve_model, vllm_rank


@pytest.fixture
def model_folder(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def adapter_folder(tiny_adapter: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny adapter that a test may damage."""
    return Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def checkpoints(parent: Path, source: Path, *steps: int) -> Path:
    for step in steps:
        shutil.copytree(source, parent / f"global_step_{step}")
    return parent


def test_a_model_folder_is_used_as_it_is(model_folder: Path) -> None:
    model = resolve_model(str(model_folder))
    assert model.path == model_folder
    assert model.weight_bytes == (model_folder / "model.safetensors").stat().st_size
    assert model.config["num_hidden_layers"] == 2


def test_the_checkpoint_with_the_highest_number_is_used_and_reported(model_folder: Path, tmp_path: Path) -> None:
    parent, printed = checkpoints(tmp_path / "ckpt", model_folder, 9, 100, 20), []
    assert resolve_model(str(parent), print_line=printed.append).path.name == "global_step_100"
    assert "global_step_100 is the newest complete checkpoint" in printed[0]


def test_the_checkpoint_written_last_is_used_after_a_shorter_training(model_folder: Path, tmp_path: Path) -> None:
    parent, printed = checkpoints(tmp_path / "ckpt", model_folder, 50, 100, 300), []
    for age, step in enumerate((100, 50, 300)):
        os.utime(parent / f"global_step_{step}" / "config.json", (1e9, 1e9 - 60 * age))
    assert resolve_model(str(parent), print_line=printed.append).path.name == "global_step_100"
    newest = f"{parent}: global_step_100 is the newest complete checkpoint"
    assert printed == [f"{newest}; skipped because older: global_step_300"]


def test_incomplete_checkpoints_are_skipped_and_reported(model_folder: Path, tmp_path: Path) -> None:
    parent, printed = checkpoints(tmp_path / "ckpt", model_folder, 1, 2, 3, 4), []
    (parent / "global_step_4" / "config.json").unlink()
    weights = parent / "global_step_3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (parent / "global_step_2" / "model.safetensors").unlink()
    assert resolve_model(str(parent), print_line=printed.append).path.name == "global_step_1"
    assert len(printed) == 4


def test_the_fingerprint_depends_on_the_weights_but_not_on_the_path(model_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    before = resolve_model(str(model_folder)).fingerprint
    assert resolve_model(str(copy)).fingerprint == before
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert resolve_model(str(copy)).fingerprint != before


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "tokenizer.json"])
def test_the_fingerprint_depends_on_tokenizer_and_chat_template(model_folder: Path, name: str) -> None:
    before = resolve_model(str(model_folder)).fingerprint
    (model_folder / name).write_text((model_folder / name).read_text() + " ")
    assert resolve_model(str(model_folder)).fingerprint != before


def test_dummy_weights_need_no_weight_file(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    assert resolve_model(str(model_folder), need_weights=False).weight_bytes == 0


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_weights_that_are_cut_off_are_refused(model_folder: Path, keep: int) -> None:
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors .*cut off"):
        resolve_model(str(model_folder))


def test_a_missing_shard_is_refused(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"00002-of-00002\.safetensors is missing"):
        resolve_model(str(model_folder))


def test_pickled_weights_are_refused(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin"):
        resolve_model(str(model_folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_an_unreadable_config_is_refused(model_folder: Path, text: str) -> None:
    (model_folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        resolve_model(str(model_folder))


def test_a_model_without_tokenizer_or_chat_template_is_refused(model_folder: Path) -> None:
    change_json(model_folder / "tokenizer_config.json", chat_template=None)
    (model_folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no chat template"):
        resolve_model(str(model_folder))
    (model_folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        resolve_model(str(model_folder))


def test_the_length_is_the_models_own_unless_a_length_is_given(model_folder: Path) -> None:
    model = resolve_model(str(model_folder))
    assert context_length(None, model) == 4096
    assert context_length(100, model) == 100
    with pytest.raises(UserError, match="at most 4096"):
        context_length(5000, model)


def test_a_name_that_means_no_model_or_adapter_gets_one_line(
    tmp_path: Path, adapter_folder: Path, model_folder: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    model = resolve_model(str(model_folder))
    cases = {
        lambda: resolve_model(str(tmp_path / "file")): "is a file",
        lambda: resolve_model(str(tmp_path / "empty")): "contains neither config.json nor a global_step_N folder",
        lambda: resolve_model(str(adapter_folder)): "--lora_path",
        lambda: resolve_model("no such/model name"): "neither a folder here nor a model on the hub",
        lambda: resolve_adapter(str(tmp_path / "none"), model): "no such folder",
        lambda: resolve_adapter(str(model_folder), model): "without --lora_path",
    }
    for call, words in cases.items():
        with pytest.raises(UserError) as error:
            call()
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_an_adapter_is_found_with_its_rank(adapter_folder: Path, model_folder: Path) -> None:
    model, printed = resolve_model(str(model_folder)), []
    adapter = resolve_adapter(str(adapter_folder), model, printed.append)
    assert (adapter.path, adapter.rank) == (adapter_folder, 4)


def test_the_newest_complete_adapter_in_a_folder_is_used(
    adapter_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    parent = checkpoints(tmp_path / "ckpt", adapter_folder, 1, 2)
    (parent / "global_step_2" / "adapter_model.safetensors").unlink()
    adapter = resolve_adapter(str(parent), resolve_model(str(model_folder)), lambda line: None)
    assert adapter.path.name == "global_step_1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole weights"),
        ({"rank_pattern": {"q_proj": 8}}, "ranks that differ"),
        ({"bias": "all"}, "biases"),
        ({"r": 1024}, "rank 1024"),
        ({"r": 0}, "rank 0"),
        ({"r": "8"}, "rank '8'"),
        ({"peft_type": "IA3"}, "only LORA"),
    ],
)
def test_unsupported_adapters_are_refused_before_an_engine_starts(
    adapter_folder: Path, model_folder: Path, change: dict, words: str
) -> None:
    change_json(adapter_folder / "adapter_config.json", **change)
    with pytest.raises(UserError, match=words):
        resolve_adapter(str(adapter_folder), resolve_model(str(model_folder)))


@pytest.mark.parametrize(
    ("change", "words"), [({"hidden_size": 128}, "hidden_size 64"), ({"num_hidden_layers": 1}, "layer 1")]
)
def test_an_adapter_for_a_model_of_another_shape_is_refused(
    adapter_folder: Path, model_folder: Path, change: dict, words: str
) -> None:
    change_json(model_folder / "config.json", **change)
    with pytest.raises(UserError, match=words):
        resolve_adapter(str(adapter_folder), resolve_model(str(model_folder)))


def test_a_base_of_another_name_but_the_same_shapes_is_reported(adapter_folder: Path, model_folder: Path) -> None:
    change_json(adapter_folder / "adapter_config.json", base_model_name_or_path="Qwen/Qwen3-1.7B")
    printed = []
    resolve_adapter(str(adapter_folder), resolve_model(str(model_folder)), printed.append)
    assert "was trained on Qwen/Qwen3-1.7B" in printed[0]


def test_the_rank_limit_is_the_smallest_that_vllm_accepts() -> None:
    assert [vllm_rank(rank) for rank in (1, 8, 9, 64, 65, 300, 512)] == [8, 8, 16, 64, 128, 320, 512]


def test_a_gated_model_is_named_as_one_that_requires_a_licence(monkeypatch):
    import huggingface_hub
    import requests

    def refuse(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.GatedRepoError("gated", response=requests.Response())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match="a/model requires a licence"):
        resolve_model("a/model")


def test_a_rotary_embedding_that_transformers_4_would_ignore_is_refused(model_folder: Path) -> None:
    from transformers import AutoConfig

    file = model_folder / "config.json"
    config = json.loads(file.read_text()) | {"model_type": "qwen3"}
    config.pop("rope_theta", None)
    written_by_5 = config | {"rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}}
    file.write_text(json.dumps(written_by_5))
    assert AutoConfig.from_pretrained(model_folder).rope_theta == 10000, "if transformers reads it, remove the check"
    with pytest.raises(UserError, match=r'version 4 ignores rope_parameters; add "rope_theta": 1000000 to a copy'):
        resolve_model(str(model_folder))
    file.write_text(json.dumps(written_by_5 | {"rope_theta": 1000000}))
    assert resolve_model(str(model_folder)).config["rope_theta"] == 1000000
    scaled = {"rope_theta": 1000000, "rope_type": "yarn", "factor": 4.0}
    file.write_text(json.dumps(written_by_5 | {"rope_theta": 1000000, "rope_parameters": scaled}))
    with pytest.raises(UserError, match=r'add "rope_scaling": {"rope_type": "yarn", "factor": 4.0} to a copy'):
        resolve_model(str(model_folder))
