"""Test that fused LoRA layers give PEFT's outputs and gradients, for any adapter, with and without checkpointing."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from training.lora import fuse

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def adapted(family: str = "qwen3", **lora) -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ALL} | lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # initially zero, which would hide every error
    return model


def outcome(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(2 * 11).view(2, 11) % SIZES["vocab_size"]
    logits = model(input_ids=ids).logits
    logits.float().square().mean().backward()
    return logits, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["k_proj", "up_proj"], ["o_proj"]], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_gradients_equal_those_of_peft(family, targets, checkpointing):
    model = adapted(family, target_modules=targets)
    reference = copy.deepcopy(model)
    assert fuse(model) == 3 * len(targets)
    if checkpointing:
        for either in (model, reference):
            either.train()
            either.gradient_checkpointing_enable()
            either.enable_input_require_grads()
    logits, gradients = outcome(model)
    expected_logits, expected_gradients = outcome(reference)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) == 2 * 3 * len(targets)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


def test_layers_that_differ_in_scale_and_rank_match_peft():
    model = adapted(rank_pattern={"k_proj": 2}, alpha_pattern={"up_proj": 3})
    reference = copy.deepcopy(model)
    fuse(model)
    logits, _ = outcome(model)
    torch.testing.assert_close(logits, outcome(reference)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_unsupported_lora_variants_keep_pefts_forward(lora):
    assert fuse(adapted(**lora)) == 0


def test_fusing_leaves_the_saved_weights_unchanged(tmp_path):
    model = adapted()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fuse(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_unexpected_call_order_raises_an_error_with_the_remedy():
    model = adapted()
    fuse(model)
    attention = model.get_base_model().model.layers[0].self_attn
    attention.q_proj(torch.ones(1, 3, 32))
    with pytest.raises(RuntimeError, match="fused_lora: false"):
        attention.k_proj(torch.zeros(1, 3, 32))
