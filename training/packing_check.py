"""Check before the first step that the model, with the attention used in training, keeps packed samples separate.

Models with a state (Mamba, convolutions) or their own attention may ignore position_ids, which separate the samples.
Training would then silently mix patients. So the effect is measured on the model itself.
"""

from collections.abc import Callable

import torch

from training.attention import UnsupportedAttention
from training.errors import fail

SAMPLE = 64  # tokens; attention kernels use blocks of 64 or 128, so both copies of a sample are computed alike
# Relative to the spread of a position's logits. On an H100, models that separate samples show exactly 0.
ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-3}
WRONG_POSITIONS = 0.25  # rounding stayed below 0.07 when the copies were not aligned to blocks

KeptLogits = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def neighbours_effect(kept_logits: KeptLogits, tokens: list[int]) -> float:
    """Measure how much a sample's logits depend on the samples before it in a pack; 0 within rounding.

    `kept_logits` maps a batch, as training builds it, to logits (kept, vocabulary). Two packs, (sample, A, sample) and
    (sample, B, sample), give two measures. Rounding can raise either one alone: the copies of the sample have
    different offsets in a pack, and experts batch different tokens in the two packs. So the smaller measure counts.
    """
    tokens = (tokens * (3 * SAMPLE // len(tokens) + 1))[: 3 * SAMPLE]
    sample, *others = (tokens[start : start + SAMPLE] for start in range(0, 3 * SAMPLE, SAMPLE))
    first = torch.arange(SAMPLE)
    kept = torch.cat([first, first + 2 * SAMPLE])
    with torch.no_grad():
        packs = [
            kept_logits(
                {
                    "input_ids": torch.tensor([sample + other + sample]),
                    "position_ids": first.repeat(3)[None],
                    "logits_to_keep": kept,
                    "targets": torch.zeros(len(kept), dtype=torch.long),
                }
            )
            for other in others
        ]
    (at_start, after_a), (_, after_b) = (pack.float().split(SAMPLE) for pack in packs)
    moved, mixed = _largest_distance(after_a, at_start), _largest_distance(after_a, after_b)
    effect = moved if moved > WRONG_POSITIONS else min(moved, mixed)
    return 0.0 if effect <= ROUNDING.get(packs[0].dtype, 0.0) else effect


def _largest_distance(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Return the largest distance at any position, relative to its logits' spread; both are (positions, vocabulary)."""
    spread = (others - others.mean(-1, keepdim=True)).norm(dim=-1)
    return ((logits - others).norm(dim=-1) / spread).max().item()


def check_model(kept_logits: KeptLogits, tokens: list[int], model_type: str, packed: bool) -> None:
    """Exit with one line if training cannot call the model, or if it mixes samples and they are `packed`."""
    try:
        effect = neighbours_effect(kept_logits, tokens)
    except UnsupportedAttention as error:
        fail(error.problem, error.remedy)
    except (TypeError, ValueError) as error:
        if "unexpected" not in str(error):  # "forward() got an unexpected keyword argument"
            raise
        reason = " ".join(str(error).split())[:120]
        fail(f"{model_type} models cannot be trained here ({reason})", "choose another `model.name_or_path`")
    if packed and effect:
        fail(
            f"{model_type} models let a sample see the others in its pack (its logits change by {effect:.1%})",
            "set `data.best_fit_packing: false` and `data.pack_samples: false`",
        )
