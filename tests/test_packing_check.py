"""Test that models which mix packed samples, or need unsupported attention, are rejected before the first step."""

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from training import attention
from training.attention import UnsupportedAttention, supported_attention
from training.forward import kept_logits
from training.layers import supported_layers
from training.packing_check import ROUNDING, SAMPLE, check_model, neighbours_effect

SIZES = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}

APART = {
    "llama": {},
    "qwen3": {},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "mistral": {"sliding_window": 16},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "qwen3_moe": EXPERTS,
    "mixtral": EXPERTS,
}
MIXED = {
    "falcon": {},
    "falcon with alibi": {"alibi": True},
    "falcon of the new kind": {"new_decoder_architecture": True},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64, **EXPERTS, **MAMBA},
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "jamba": {"num_experts": 2, "mamba_d_state": 8, "use_mamba_kernels": False, "attn_layer_offset": 1},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "rwkv": {"attention_hidden_size": 64},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 32},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
}


def tiny(name: str, implementation: str | None = None, dtype: torch.dtype = torch.float32, **changes):
    """Return a random model, of the type given by the first word of `name`, and its attention in training."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name.split()[0]](**{**SIZES, **APART.get(name, {}), **MIXED.get(name, {}), **changes})
    if implementation is None:
        implementation, _ = supported_attention("varlen", dtype, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
    return model.to(dtype).eval(), implementation


def calls(model, implementation: str):
    return lambda batch: kept_logits(model, batch, implementation, torch.device("cpu"))[0]


TOKENS = list(range(3, 3 + 3 * SAMPLE))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", APART)
def test_a_model_that_separates_samples_is_accepted(name, dtype):
    assert neighbours_effect(calls(*tiny(name, dtype=dtype)), TOKENS) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_a_model_that_mixes_samples_is_detected(name, dtype):
    assert neighbours_effect(calls(*tiny(name, dtype=dtype)), TOKENS) > ROUNDING[dtype]


def test_a_model_that_mixes_samples_is_rejected_only_with_packing(capsys):
    call = calls(*tiny("mamba"))
    check_model(call, TOKENS, "mamba", packed=False)
    with pytest.raises(SystemExit) as end:
        check_model(call, TOKENS, "mamba", packed=True)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: mamba models let a sample see the others in its pack")
    assert "set `data.best_fit_packing: false`" in line


def test_a_model_that_ignores_positions_is_detected_even_without_mixing():
    call = calls(*tiny("llama"))

    def with_one_count(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = batch["input_ids"].split(SAMPLE, dim=1)  # separate calls, so that nothing is mixed
        positions = torch.arange(3 * SAMPLE)[None].split(SAMPLE, dim=1)
        kept = {"logits_to_keep": torch.arange(SAMPLE), "targets": batch["targets"][:SAMPLE]}
        logits = [
            call({"input_ids": part, "position_ids": position, **kept}) * (1 + position[0, 0] / SAMPLE)
            for part, position in zip(parts, positions, strict=True)
        ]
        return torch.cat([logits[0], logits[2]])

    assert neighbours_effect(with_one_count, TOKENS) > 0.25


def test_rounding_in_only_one_of_the_two_measures_is_accepted():
    call = calls(*tiny("qwen3", dtype=torch.bfloat16))

    def by_another_kernel(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = call(batch)
        logits[SAMPLE:] *= 1.05  # the same for every neighbour
        return logits

    assert neighbours_effect(by_another_kernel, TOKENS) == 0


@pytest.mark.parametrize("tokens", [[5, 6, 7], TOKENS[:100]], ids=len)
def test_a_pack_of_few_tokens_is_enough_for_the_check(tokens):
    assert neighbours_effect(calls(*tiny("qwen3")), tokens) == 0
    assert neighbours_effect(calls(*tiny("falcon")), tokens) > 0.1


def test_the_check_draws_no_random_numbers():
    call = calls(*tiny("qwen3"))
    before = torch.get_rng_state()
    neighbours_effect(call, TOKENS)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_the_training_keywords_is_rejected_in_one_line(capsys):
    with pytest.raises(SystemExit):
        check_model(calls(*tiny("bloom", n_layer=2, n_head=4)), TOKENS, "bloom", packed=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: bloom models cannot be trained here") and "logits_to_keep" in line


def test_logits_are_reduced_to_the_kept_ones_if_the_model_returns_all():
    model, implementation = tiny("mamba")
    batch = {"input_ids": torch.tensor([TOKENS]), "position_ids": torch.arange(len(TOKENS))[None]}
    kept = torch.tensor([3, 70, 150])
    logits, _ = kept_logits(model, batch | {"logits_to_keep": kept, "targets": kept}, implementation, model.device)
    assert torch.equal(logits, model(input_ids=batch["input_ids"]).logits[0, kept])


# --- attention features that varlen does not support


def varlen(**keywords):
    states = torch.ones(1, 2, 4, 16)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    options = {"attention_mask": None, "cu_seq_lens_q": bounds, "max_length_q": 4} | keywords
    return attention._varlen_attention(torch.nn.Module(), states, states, states, **options)


@pytest.mark.parametrize(
    ("keyword", "value", "instead"),
    [
        ("s_aux", torch.ones(2), "eager"),
        ("softcap", 50.0, "eager"),
        ("head_mask", torch.ones(2), "eager"),
        ("position_bias", torch.zeros(1, 2, 4, 4), "eager"),
        ("output_attentions", True, "eager"),
        ("anything_new", 0.0, "eager"),
        ("attention_mask", torch.zeros(1, 1, 4, 4), "eager"),
        ("is_causal", False, "eager"),
        ("dropout", 0.1, "sdpa"),
    ],
)
def test_an_attention_keyword_that_would_be_ignored_is_rejected(keyword, value, instead):
    with pytest.raises(UnsupportedAttention, match=rf"cannot apply .*set `model.attn_implementation: {instead}`"):
        varlen(**{keyword: value})


def test_attention_keywords_without_effect_are_accepted(monkeypatch):
    import torch.nn.attention.varlen as module

    monkeypatch.setattr(module, "varlen_attn", lambda query, *_, **__: query)
    harmless = {"dropout": 0.0, "softcap": None, "head_mask": None, "s_aux": None, "output_attentions": False}
    harmless |= {"position_ids": torch.arange(4)[None], "use_cache": False, "is_causal": True}
    assert varlen(**harmless)[0].shape == (1, 4, 2, 16)


def test_a_model_with_sinks_is_rejected_before_the_first_step(capsys):
    attention.register_varlen()
    call = calls(*tiny("gpt_oss", "varlen", **EXPERTS))
    with pytest.raises(SystemExit):
        check_model(call, TOKENS, "gpt_oss", packed=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert "`s_aux`" in line and "set `model.attn_implementation: eager`" in line


def test_attention_dropout_is_rejected_in_training():
    attention.register_varlen()
    model, _ = tiny("qwen3", "varlen", attention_dropout=0.1)
    with pytest.raises(UnsupportedAttention, match="dropout"):
        model.train()(input_ids=torch.tensor([TOKENS]), use_cache=False)


@pytest.mark.parametrize(
    ("name", "wanted", "used", "reason"),
    [
        ("qwen3", "varlen", "varlen", None),
        ("falcon", "varlen", "sdpa", "FalconForCausalLM has attention of its own"),
        ("gptj", "varlen", "eager", "GPTJForCausalLM has no sdpa"),
        ("gpt_oss", "sdpa", "eager", "GptOssForCausalLM has no sdpa"),
        ("qwen3", "eager", "eager", None),
    ],
)
def test_a_model_gets_an_attention_that_it_supports(monkeypatch, name, wanted, used, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]]
    assert supported_attention(wanted, torch.bfloat16, model_class) == (used, reason)


# --- layers


@pytest.mark.parametrize(
    ("gpu", "wanted", "model_type", "used", "reason"),
    [
        (False, "liger", "qwen3", "huggingface", "there is no GPU"),
        (True, "liger", "qwen3", "liger", None),
        (True, "liger", "gpt_oss", "huggingface", "it has no kernels for gpt_oss models"),
        (False, "huggingface", "qwen3", "huggingface", None),
        (False, "", "qwen3", "", None),
    ],
)
def test_liger_falls_back_to_plain_layers_and_gives_the_reason(monkeypatch, gpu, wanted, model_type, used, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert supported_layers(wanted, model_type) == (used, reason)
