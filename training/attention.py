"""Attend within each packed sample, without a mask, through PyTorch's variable-length FlashAttention.

`sdpa` handles packed samples correctly too, but transformers gives it a dense mask over the whole pack: it computes
attention between samples and then discards it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VARLEN = "varlen"

# Keywords of transformers' attention interface that cannot affect attention in a pack. Any other keyword is rejected.
_HARMLESS_KEYWORDS = {
    *("position_ids", "position_embeddings", "cache_position", "past_key_value", "past_key_values", "use_cache"),
    *("cu_seq_lens_k", "max_length_k", "num_items_in_batch", "output_router_logits", "output_hidden_states"),
}


class UnsupportedAttention(ValueError):
    """The model requests a feature that variable-length attention does not support."""

    def __init__(self, feature: str, instead: str = "eager") -> None:
        self.problem = f"varlen attention cannot apply {feature}, which this model requires"
        self.remedy = f"set `model.attn_implementation: {instead}`"
        super().__init__(f"{self.problem}: {self.remedy}")


def register_varlen() -> None:
    """Register `attn_implementation: varlen` with transformers."""
    import torch
    from transformers import AttentionInterface

    # Sample count and maximum length vary between packs, so compiled layers must run attention uncompiled.
    AttentionInterface.register(VARLEN, torch.compiler.disable(_varlen_attention))


def supported_attention(
    wanted: str, dtype: "torch.dtype", model_class: "type[PreTrainedModel] | None" = None
) -> tuple[str, str | None]:
    """Return the attention to use for the requested one, and the reason if they differ (else None)."""
    attention, reason = _on_this_machine(wanted, dtype)
    if not model_class:
        return attention, reason
    if attention == VARLEN and not model_class._supports_attention_backend:
        attention, reason = "sdpa", f"{model_class.__name__} has attention of its own"
    if attention == "sdpa" and not model_class._supports_sdpa:
        attention, reason = "eager", f"{model_class.__name__} has no sdpa"
    return attention, reason


def _on_this_machine(wanted: str, dtype: "torch.dtype") -> tuple[str, str | None]:
    import torch

    if wanted != VARLEN:
        return wanted, None
    if not torch.cuda.is_available():
        return "sdpa", "there is no GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "sdpa", f"{torch.cuda.get_device_name()} is older than Ampere (compute capability 8.0)"
    if dtype not in (torch.bfloat16, torch.float16):
        return "sdpa", f"it needs bfloat16 or float16, the model is {dtype}"
    return VARLEN, None


def sample_bounds(position_ids: "torch.Tensor") -> tuple["torch.Tensor", int]:
    """Return the start of each packed sample, and the length of the longest one.

    `position_ids`: (1, tokens), restarting at 0 in each sample. The starts are int32 (samples + 1,), with the total
    number of tokens last, as FlashAttention's cu_seqlens. Pass a CPU tensor to avoid synchronising with the GPU.
    """
    import torch

    positions = position_ids.flatten()
    starts = (positions == 0).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([positions.numel()])]).to(torch.int32)
    return bounds, int(bounds.diff().max())


def _varlen_attention(
    module: "torch.nn.Module",
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor | None",
    scaling: float | None = None,
    cu_seq_lens_q: "torch.Tensor | None" = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: object,
) -> tuple["torch.Tensor", None]:
    """Implement transformers' attention interface.

    `query`: (1, heads, tokens, head_dim); `key` and `value` may have fewer heads (GQA). Returns (1, tokens, heads,
    head_dim). `cu_seq_lens_q` and `max_length_q` come from `sample_bounds`. `sliding_window` counts the tokens that a
    token attends to, including itself. Raises UnsupportedAttention for features that this kernel would ignore:
    dropout, masks, soft caps, sinks, biases.
    """
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise UnsupportedAttention(f"dropout ({dropout})", "sdpa")
    if attention_mask is not None:
        raise UnsupportedAttention("a mask")
    if is_causal is False:
        raise UnsupportedAttention("attention to later tokens")
    unknown = [name for name, value in others.items() if not (value is None or value is False)]
    if unknown := sorted(set(unknown) - _HARMLESS_KEYWORDS):
        raise UnsupportedAttention(f"`{unknown[0]}`")
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    bounds, longest = cu_seq_lens_q, max_length_q
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # tokens before and after
    output = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=window)
    return output.unsqueeze(0), None
