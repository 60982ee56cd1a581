"""Attention inside each packed sample only, without a mask, by PyTorch's own variable-length FlashAttention.

`sdpa` is right for packed samples too, but transformers gives it a dense mask over the whole pack: it computes the
attention between samples and throws it away.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VARLEN = "varlen"


def register_varlen() -> None:
    """Make `attn_implementation: varlen` known to transformers."""
    import torch
    from transformers import AttentionInterface

    # The number of samples and the longest one differ from pack to pack: compiled layers step out for the attention.
    AttentionInterface.register(VARLEN, torch.compiler.disable(_varlen_attention))


def supported_attention(wanted: str, dtype: "torch.dtype") -> tuple[str, str | None]:
    """The attention to use where `wanted` was asked for, and why it is another one (None when it is not)."""
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
    softcap: float | None = None,
    **kwargs: object,
) -> tuple["torch.Tensor", None]:
    """transformers' attention interface: query (1, heads, tokens, head_dim), key and value with fewer heads (GQA).

    Returns (1, tokens, heads, head_dim). Bounds come from `sample_bounds`, by the names FlashAttention kwargs have.
    `sliding_window` is how many tokens one attends to, itself among them. Raises ValueError for a soft cap.
    """
    from torch.nn.attention.varlen import varlen_attn

    if softcap is not None:
        raise ValueError("varlen cannot cap attention as this model does; set `model.attn_implementation: eager`")
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    bounds, longest = cu_seq_lens_q, max_length_q
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # tokens before and after
    output = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=window)
    return output.unsqueeze(0), None
