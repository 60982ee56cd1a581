"""Attention inside each packed sample only, without a mask, by PyTorch's own variable-length FlashAttention.

`sdpa` is right for packed samples too, but transformers gives it a dense mask over the whole pack: it computes the
attention between samples and throws it away.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VARLEN = "varlen"

# Keywords of transformers' attention interface that change nothing in a pack's attention. Any other one may.
_WITHOUT_EFFECT = {
    *("position_ids", "position_embeddings", "cache_position", "past_key_value", "past_key_values", "use_cache"),
    *("cu_seq_lens_k", "max_length_k", "num_items_in_batch", "output_router_logits", "output_hidden_states"),
}


class UnsupportedAttention(ValueError):
    """A model asks for something that the variable-length attention cannot do."""

    def __init__(self, what: str, instead: str = "eager") -> None:
        self.problem = f"the attention varlen cannot apply {what}, which this model asks for"
        self.remedy = f"set `model.attn_implementation: {instead}`"
        super().__init__(f"{self.problem}: {self.remedy}")


def register_varlen() -> None:
    """Make `attn_implementation: varlen` known to transformers."""
    import torch
    from transformers import AttentionInterface

    # The number of samples and the longest one differ from pack to pack: compiled layers step out for the attention.
    AttentionInterface.register(VARLEN, torch.compiler.disable(_varlen_attention))


def supported_attention(
    wanted: str, dtype: "torch.dtype", model_class: "type[PreTrainedModel] | None" = None
) -> tuple[str, str | None]:
    """The attention to use where `wanted` was asked for, and why it is another one (None when it is not)."""
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
    """Where packed samples begin, and the longest one's length.

    `position_ids`: (1, tokens), counting from 0 again in each sample. Returns int32 (samples + 1,) with the total
    number of tokens last, as FlashAttention's cu_seqlens. On the CPU this costs no synchronisation with the GPU.
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
    """transformers' attention interface: query (1, heads, tokens, head_dim), key and value with fewer heads (GQA).

    Returns (1, tokens, heads, head_dim). Bounds come from `sample_bounds`, by the names FlashAttention kwargs have.
    `sliding_window` is how many tokens one attends to, itself among them. Raises UnsupportedAttention for everything
    that would be left out: dropout, a mask, a soft cap, sinks, biases.
    """
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise UnsupportedAttention(f"dropout ({dropout})", "sdpa")
    if attention_mask is not None:
        raise UnsupportedAttention("a mask")
    if is_causal is False:
        raise UnsupportedAttention("attention to later tokens")
    unknown = [name for name, value in others.items() if not (value is None or value is False)]
    if unknown := sorted(set(unknown) - _WITHOUT_EFFECT):
        raise UnsupportedAttention(f"`{unknown[0]}`")
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    bounds, longest = cu_seq_lens_q, max_length_q
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # tokens before and after
    output = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=window)
    return output.unsqueeze(0), None
