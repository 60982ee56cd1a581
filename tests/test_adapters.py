"""Test that faulty adapters are refused before an engine starts, and that merged copies equal the trained model."""

import contextlib
import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from conftest import ROOT, chats, rows, save_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_tokens import QWEN3_LIKE
from test_train import read_log, run, validation_losses, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import prompts
from common import merging
from common.adapters import RECORDED_BY_PEFT, SUPPORTED, AdapterError, adapted_model, check_settings, unmatched
from common.errors import UserError
from evaluation.engines import vllm_worker as worker
from evaluation.engines.base import Request
from evaluation.engines.models import resolve_adapter, resolve_model
from evaluation.engines.vllm_engine import Engine, EngineSpec

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SHORT = {"epochs": 6, "gradient_accumulation_steps": 1, "optimizer": {"type": "cpu_adam", "learning_rate": 1e-2}}
Tensors = dict[str, torch.Tensor]


def make_adapter(base: Path, path: Path, std: float = 0.05, **settings: object) -> Path:
    """Save an adapter with random matrices, as PEFT does, and return its folder."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL} | settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            torch.nn.init.normal_(parameter, std=std)
    adapted.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model in float32, which is precise enough to compare sums."""
    path = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("base") / "model"))
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "adapter")


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damaged(adapter: Path, path: Path, tensors: Tensors | None = None, **changes: object) -> str:
    """Copy `adapter` to `path` with other tensors or settings."""
    if path.exists():
        shutil.rmtree(path)
    shutil.copytree(adapter, path)
    change_json(path / "adapter_config.json", **changes)
    if tensors is not None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    return str(path)


def refusal(name: str, base: Path, **options: object) -> str:
    with pytest.raises(UserError) as error:
        resolve_adapter(name, resolve_model(str(base)), lambda line: None, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def accepted(name: str, base: Path, **options: object) -> list[str]:
    """Return the lines that are printed for an adapter that is accepted."""
    lines = []
    resolve_adapter(name, resolve_model(str(base)), lines.append, **options)
    return lines


# --- names and shapes ------------------------------------------------------------------------------------------------


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


def faulty(tensors: Tensors) -> Iterator[tuple[str, Tensors, str]]:
    """Yield ways in which an adapter's tensors may not match its settings and base.

    Each is (a name, the tensors, words of the error message).
    """
    prefixes = ("", "model.", "base_model.", "base_model.model.base_model.model.", "module.base_model.model.")
    for prefix in prefixes:
        yield f"prefix {prefix!r}", renamed(tensors, "base_model.model.", prefix), f"but {FIRST[:30]}"
    for old, new in (
        ("lora_A.weight", "lora_A.default.weight"),
        ("lora_B.weight", "lora_B.default.weight"),
        (".weight", ""),
        ("model.model.layers", "model._orig_mod.model.layers"),
        ("q_proj", "q_proj._orig_mod"),
        ("layers.1.", "layers.01."),
        ("self_attn", "attn"),
        ("lora_A", "lora_embedding_A"),
        ("lora_A", "LORA_A"),
    ):
        yield f"{new!r} for {old!r}", renamed(tensors, old, new), "is expected"
    yield "no tensors", {}, "lacks base_model."
    yield "lora_A alone", {name: tensor for name, tensor in tensors.items() if "lora_A" in name}, "lora_B.weight and 13"
    yield "lora_B alone", {name: tensor for name, tensor in tensors.items() if "lora_B" in name}, "lora_A.weight and 13"
    for part in ("layers.0.", "layers.1.", *ALL):
        yield f"no {part}", {name: tensor for name, tensor in tensors.items() if part not in name}, "lacks base_model."
    for name, tensor in tensors.items():
        rest = {other: kept for other, kept in tensors.items() if other != name}
        yield f"no {name}", rest, f"lacks {name}"
        for new in (tensor[:-1], tensor[:, :-1], torch.cat([tensor, tensor]), torch.cat([tensor, tensor], 1), tensor.T):
            yield f"{name}: {list(new.shape)}", {**tensors, name: new}, f"{list(tensor.shape)} is expected"
        yield f"{name}: flat", {**tensors, name: tensor.flatten()}, f"{list(tensor.shape)} is expected"
    for more in (f"{FIRST}.more", FIRST.replace("lora_A", "lora_magnitude_vector"), "lm_head.weight"):
        yield f"{more} too", {**tensors, more: torch.ones(4)}, "does not select it"


@pytest.mark.parametrize("at_run_time", [False, True])
def test_tensors_that_do_not_match_settings_and_base_are_refused(
    adapter: Path, base: Path, tmp_path: Path, at_run_time: bool
) -> None:
    whole, refused = load_file(adapter / "adapter_model.safetensors"), 0
    wrong_size = 0
    for fault, tensors, words in faulty(whole):
        line = refusal(damaged(adapter, tmp_path / "damaged", tensors), base, at_run_time=at_run_time)
        assert "adapter_model.safetensors" in line, fault
        refused += 1
        if "hidden_size" in line:  # a matrix that reads the hidden state has its own message
            wrong_size += 1
        else:
            assert words in line, (fault, line)
    assert len(whole) == 28 and refused == 5 + 9 + 3 + 9 + 28 * 7 + 3
    assert 0 < wrong_size < 60


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, "does not select it"),
        ({"target_modules": r".*layers\.0\..*_proj"}, "does not select it"),
        ({"layers_to_transform": [1]}, "does not select it"),
        ({"exclude_modules": ["up_proj"]}, "does not select it"),
        ({"target_modules": [*ALL, "embed_tokens"]}, "lacks base_model.model.model.embed_tokens.lora_embedding_A"),
        ({"r": 8}, "[8, 128] is expected"),
        ({"target_modules": ["none"]}, "not found in the base model"),
        ({"target_modules": "("}, "PEFT rejects the adapter"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "PEFT rejects the adapter"),
    ],
    ids=str,
)
def test_settings_that_do_not_match_the_tensors_are_refused(
    adapter: Path, base: Path, tmp_path: Path, settings: dict, words: str
) -> None:
    assert words in refusal(damaged(adapter, tmp_path / "damaged", **settings), base)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_adapter_with_an_infinite_or_nan_value_is_refused(
    adapter: Path, base: Path, tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors[name] = tensor.to(dtype).clone()
        tensors[name][-1, -1] = value
        assert f"{name} contains inf or nan" in refusal(damaged(adapter, tmp_path / "damaged", tensors), base)


def test_an_adapter_of_integers_is_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.to(torch.int8) for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    assert "of type torch.int8" in refusal(damaged(adapter, tmp_path / "damaged", tensors), base)


def test_untrained_modules_are_reported_in_one_line(adapter: Path, base: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert accepted(str(adapter), base) == []
    tensors[FIRST.replace("lora_A", "lora_B")].zero_()
    (line,) = accepted(damaged(adapter, tmp_path / "part", tensors), base)
    assert "in 1 of 14 modules the adapter is zero" in line
    tensors = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    (line,) = accepted(damaged(adapter, tmp_path / "whole", tensors), base)
    assert "in 14 of 14 modules the adapter is zero" in line


# --- settings --------------------------------------------------------------------------------------------------------


def other_values(default: object) -> list[object]:
    """Return values of several types that differ from the default."""
    return [value for value in (True, 7, "all", ["embed_tokens"], {"q_proj": 2}) if value != default]


@pytest.mark.parametrize("saved", [False, True])
def test_every_unlisted_setting_of_peft_must_keep_its_default(saved: bool) -> None:
    settings, checked = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ALL}, 0
    check_settings(settings, saved)
    check_settings(
        {**LoraConfig(**settings).to_dict(), "peft_type": "LORA", **dict.fromkeys(RECORDED_BY_PEFT)}, saved=True
    )
    for field in dataclasses.fields(LoraConfig):
        if field.name in SUPPORTED or field.name == "peft_type" or (saved and field.name in RECORDED_BY_PEFT):
            continue
        for value in other_values(getattr(LoraConfig(), field.name)):
            with pytest.raises(AdapterError, match=field.name):
                check_settings({**settings, field.name: value}, saved)
            checked += 1
    for value in other_values(None):
        with pytest.raises(AdapterError, match="new_in_peft_9"):
            check_settings({**settings, "new_in_peft_9": value}, saved)
    assert checked > 90


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    ("key", "values"),
    {
        "r": [0, -1, 1024, 8.0, "8", None, True],
        "lora_alpha": [0, -8, "8", None, True, float("nan"), float("inf")],
        "lora_dropout": [1, -0.1, 50, "0.1", True],
        "use_rslora": ["yes", 1, None],
        "task_type": ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"],
        "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "eva", "corda", "loftq", "lora_ga", "True", None, 1.5],
    }.items(),
)
def test_an_unsupported_value_of_a_setting_is_refused(key: str, values: list, saved: bool) -> None:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ALL}
    for value in values:
        with pytest.raises(AdapterError, match=key if key != "r" else "rank"):
            check_settings({**settings, key: value}, saved)


@pytest.mark.parametrize("saved", [False, True])
def test_every_other_type_of_peft_is_refused(saved: bool) -> None:
    kinds = [kind.value for kind in peft.PeftType if kind != peft.PeftType.LORA]
    for kind in [*kinds, "PromptTuning", "Peft", None]:
        with pytest.raises(AdapterError, match="only LORA adapters"):
            check_settings({"peft_type": kind, "r": 4, "lora_alpha": 8, "target_modules": ALL}, saved)
    assert len(kinds) > 20


def test_the_error_for_a_mistyped_setting_suggests_the_right_one() -> None:
    with pytest.raises(AdapterError, match="did you mean lora_alpha"):
        check_settings({"peft_type": "Lora", "lora_alfa": 8}, saved=False)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "target_modules: 'v_porj'"),
        ({"exclude_modules": ["layers.0.mlp.up_proj", "layers.0.mlp.up"]}, "exclude_modules: 'layers.0.mlp.up'"),
        ({"exclude_modules": r"layers\.0\..*"}, r"exclude_modules: 'layers\\.0\\..*'"),
        ({"exclude_modules": ["k_proj"]}, "target_modules: 'k_proj'"),
        ({"layers_to_transform": [1, 2]}, "layers_to_transform: 2"),
        ({"target_modules": ["q_proj", "self_attn.v_proj"]}, None),
        ({"target_modules": r".*\.(q|v)_proj"}, None),
        ({"exclude_modules": ["layers.0.mlp.up_proj"]}, None),
        ({"layers_to_transform": 1}, None),
        ({"target_modules": "all-linear"}, None),
        ({"target_modules": None}, None),
    ],
    ids=str,
)
def test_an_entry_in_a_yaml_that_matches_no_module_is_found(base: Path, settings: dict, part: str | None) -> None:
    settings = {"peft_type": "Lora", "target_modules": ALL} | settings
    assert unmatched(settings, adapted_model(settings, base)) == part


# --- merges ----------------------------------------------------------------------------------------------------------

# Training accepts these settings, so evaluation must, too.
ACCEPTED_SETTINGS = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "pattern": {"target_modules": r".*layers\.[01]\.mlp\..*_proj"},
    "all linear layers": {"target_modules": "all-linear"},
    "the default modules": {"target_modules": None},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded modules": {"exclude_modules": ["layers.0.self_attn.k_proj"]},
    "rank-stabilised": {"use_rslora": True},
    "a fraction as alpha": {"lora_alpha": 2.5},
    "dropout": {"lora_dropout": 0.1},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random": {"init_lora_weights": False},
    "for transposed layers": {"fan_in_fan_out": True},
    "as a language model": {"task_type": "CAUSAL_LM"},
    "input embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "output embedding": {"target_modules": ["lm_head"]},
    "both embeddings": {"target_modules": ["embed_tokens", "lm_head", "up_proj"]},
}
IDS = torch.arange(3 * 40).view(3, 40)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ACCEPTED_SETTINGS)
def test_a_merged_copy_computes_the_same_as_the_adapted_model(
    base: Path, tmp_path: Path, name: str, tied: bool
) -> None:
    if not tied:
        base = Path(shutil.copytree(base, tmp_path / "base"))
        model = AutoModelForCausalLM.from_pretrained(base)
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) / 8)
        model.config.tie_word_embeddings = False
        model.save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", std=0.2, **ACCEPTED_SETTINGS[name])
    check_settings({"peft_type": "Lora", **ACCEPTED_SETTINGS[name]}, saved=False)
    assert accepted(str(adapter), base) == []
    untrained = AutoModelForCausalLM.from_pretrained(base)
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(untrained), adapter))
    merged = AutoModelForCausalLM.from_pretrained(worker.merge(str(base), str(adapter), str(tmp_path / "merged")))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(untrained)).abs().max() > 0.1
    embeddings = "embedding" in name
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) == (embeddings or not tied)
    assert merged.config.tie_word_embeddings == (tied and not embeddings)


def test_an_adapter_of_embeddings_is_refused_at_run_time(base: Path, tmp_path: Path) -> None:
    for module in ("embed_tokens", "lm_head"):
        adapter = make_adapter(base, tmp_path / module, target_modules=[module, "q_proj"])
        assert "leave out enable_lora" in refusal(str(adapter), base, at_run_time=True)


def test_an_adapter_trained_with_another_embedding_is_refused(base: Path, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(base)
    other.get_input_embeddings().weight.data[5] += 1
    other.save_pretrained(tmp_path / "other")
    for module in ("embed_tokens", "lm_head"):
        adapter = make_adapter(tmp_path / "other", tmp_path / module, target_modules=[module])
        with pytest.raises(UserError, match=f"trained with a different .*{module}"):
            worker.merge(str(base), str(adapter), str(tmp_path / f"merged-{module}"))


@pytest.mark.parametrize("std", [1e-9, 1e-6])
def test_a_merge_is_refused_if_rounding_loses_the_change(
    base: Path, tiny_model: Path, tmp_path: Path, std: float
) -> None:
    """With bfloat16's 8 bits of precision, a small adapter would have no effect."""
    adapter = make_adapter(base, tmp_path / "adapter", std=std, target_modules=["q_proj", "down_proj"])
    with pytest.raises(UserError, match=r"bfloat16 (leaves|keeps only) .*enable_lora"):
        worker.merge(str(tiny_model), str(adapter), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_a_merge_is_refused_if_rounding_loses_the_change_of_one_module(
    base: Path, adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    weak = Path(shutil.copytree(adapter, tmp_path / "weak"))
    tensors = load_file(weak / "adapter_model.safetensors")
    (name,) = (name for name in tensors if "layers.1.self_attn.k_proj.lora_B" in name)
    save_file(tensors | {name: tensors[name] * 1e-9}, weak / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"leaves .*layers\.1\.self_attn\.k_proj unchanged"):
        worker.merge(str(tiny_model), str(weak), str(tmp_path / "merged"))


def test_a_merge_is_refused_if_the_weights_overflow(base: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "half")
    adapter = make_adapter(base, tmp_path / "adapter", std=1e6)
    with pytest.raises(UserError, match=r"too large for torch\.float16"):
        worker.merge(str(tmp_path / "half"), str(adapter), str(tmp_path / "merged"))


def test_threads_of_a_merge_do_not_wait_for_each_other(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's threads meet after each short sum. On busy cores, merging took minutes that way."""
    counts, merge_layer = set(), merging._merge_layer
    monkeypatch.setattr(
        merging, "_merge_layer", lambda *args: (counts.add(torch.get_num_threads()), merge_layer(*args))[1]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        worker.merge(str(base), str(adapter), str(tmp_path / "merged"))
        weak = make_adapter(base, tmp_path / "weak", std=1e-12)
        with pytest.raises(UserError, match=r"float32 (leaves|keeps only)"):
            worker.merge(str(base), str(weak), str(tmp_path / "refused"))
        assert (counts, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(before)


def test_a_merge_is_refused_if_the_base_lacks_a_tensor(base: Path, adapter: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"has no model\.layers\.1\.mlp\.up_proj\.weight"):
        worker.merge(str(broken), str(adapter), str(tmp_path / "merged"))


def test_a_quantised_base_accepts_an_adapter_only_at_run_time(adapter: Path, base: Path, tmp_path: Path) -> None:
    quantised = Path(shutil.copytree(base, tmp_path / "quantised"))
    change_json(quantised / "config.json", quantization_config={"quant_method": "fp8"})
    assert "is quantised" in refusal(str(adapter), quantised)
    accepted(str(adapter), quantised, at_run_time=True)


def test_an_adapter_of_a_model_unknown_to_transformers_is_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    strange = Path(shutil.copytree(base, tmp_path / "strange"))
    change_json(strange / "config.json", model_type="strange", architectures=["Strange"])
    assert "transformers cannot build the base model" in refusal(str(adapter), strange)
    change_json(strange / "config.json", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    assert "transformers cannot build the base model" in refusal(str(adapter), strange)


def test_a_base_with_the_same_name_but_other_weights_is_reported(adapter: Path, base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "elsewhere" / "model"))
    assert accepted(str(adapter), other) == []
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data += 0.01
    model.save_pretrained(other)
    (line,) = accepted(str(adapter), other)
    assert f"was trained on {base}" in line
    revised = damaged(adapter, tmp_path / "adapter", base_model_name_or_path="org/model", revision="v2")
    (line,) = accepted(revised, base)
    assert "was trained on org/model, revision v2" in line


@pytest.mark.slow
def test_vllm_with_a_merged_copy_writes_the_same_as_the_adapted_model(base: Path, tmp_path: Path) -> None:
    """The adapter changes one of two tied embeddings. If the copy tied them again, the text would differ."""
    adapter = make_adapter(base, tmp_path / "adapter", std=0.2, target_modules=["embed_tokens", "q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    chat = prompts.note_messages(rows(1)[0]["dialogue"])
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", **prompts.CHAT_TEMPLATE_KWARGS
    )

    def written(model: torch.nn.Module) -> str:
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    expected = written(adapted)
    assert written(adapted.merge_and_unload()) != expected, "PEFT's own merge changes both"
    arguments = {"enforce_eager": True, "max_model_len": 1024, "kv_cache_memory_bytes": 64 << 20, "dtype": "float32"}
    spec = EngineSpec(
        base, arguments, {"temperature": 0, "max_tokens": 24}, lora_path=adapter, merge_into=tmp_path / "merged"
    )
    with contextlib.closing(Engine("generator", spec, tmp_path / "log")) as engine:
        (answer,) = chats(engine, [Request(chat)])
    assert answer.text == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["both embeddings", "rank-stabilised"])
def test_the_validation_loss_of_a_run_equals_that_of_the_merged_copy(base: Path, tmp_path: Path, name: str) -> None:
    from training.tokens import encode_example

    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(QWEN3_LIKE)
    save_dataset(tmp_path / "soap_dataset", {"train": rows(9), "validation": rows(12)[9:]})
    adapter = {"peft_type": "Lora", "r": 4, "lora_alpha": 32, "target_modules": ALL} | ACCEPTED_SETTINGS[name]
    model = {"name_or_path": "model", "dtype": "fp32", "attn_implementation": "varlen", "peft_config": adapter}
    status, output = run(write_config(tmp_path, Path("model"), "trained", model=model, **SHORT))
    assert status == 0, output[-3000:]
    shown = validation_losses(read_log(tmp_path / "trained"))
    assert accepted(str(tmp_path / "trained"), tmp_path / "model")[1:] == []
    (folder,) = (tmp_path / "trained").glob("global_step_*")
    worker.merge(str(tmp_path / "model"), str(folder), str(tmp_path / "merged"))

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer, total, labelled = AutoTokenizer.from_pretrained(tmp_path / "model"), 0.0, 0
    for row in rows(12)[9:]:
        example = encode_example(tokenizer, prompts.training_messages(row["dialogue"], row))
        ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
        count = (labels[:, 1:] != -100).sum().item()
        with torch.no_grad():
            total += merged(input_ids=ids, labels=labels).loss.item() * count
        labelled += count
    assert shown[-1] == pytest.approx(total / labelled, rel=1e-3)
    assert shown[-1] < 0.9 * shown[0]


def test_no_installed_package_is_named_common() -> None:
    """arctic_training puts the YAML's folder last on the import path, so a package named common would win."""
    import importlib.util
    import sys

    path = [folder for folder in sys.path if folder and Path(folder).resolve() not in (ROOT, ROOT / "benchmarks")]
    assert importlib.machinery.PathFinder.find_spec("common", path) is None
