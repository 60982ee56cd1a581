"""Before the first step: does this model keep the samples of a pack apart, with the attention that training uses?

Models with a state (Mamba, convolutions) or with attention of their own may ignore position_ids, which is how samples
are told apart. Such a run would learn from mixed-up patients without any sign of it. So it is measured on the model.
"""

from collections.abc import Callable

import torch

from training.attention import UnsupportedAttention
from training.errors import fail

SAMPLE = 64  # tokens; attention kernels work in blocks of 64 or 128, so both copies of a sample are computed alike
# Relative to the spread of a position's logits. On an H100, models that keep samples apart show exactly 0.
ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-3}
WRONG_POSITIONS = 0.25  # rounding stayed below 0.07 where the copies did not begin at a block's start

KeptLogits = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def neighbours_effect(kept_logits: KeptLogits, tokens: list[int]) -> float:
    """How much the logits of a sample depend on the samples before it in a pack; 0 up to rounding.

    `kept_logits` maps a batch, as training builds it, to logits (kept, vocabulary). Two packs, sample A sample and
    sample B sample, give two measures. Rounding can raise either one by itself: the copies of a sample lie at different
    places in a pack, and experts compute different tokens together in the two packs. So the smaller one counts.
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
    (alone, behind), (_, behind_another) = (pack.float().split(SAMPLE) for pack in packs)
    moved, mixed = _difference(behind, alone), _difference(behind, behind_another)
    effect = moved if moved > WRONG_POSITIONS else min(moved, mixed)
    return 0.0 if effect <= ROUNDING.get(packs[0].dtype, 0.0) else effect


def _difference(logits: torch.Tensor, others: torch.Tensor) -> float:
    """The largest distance at a position, relative to the spread of its logits; both (positions, vocabulary)."""
    spread = (others - others.mean(-1, keepdim=True)).norm(dim=-1)
    return ((logits - others).norm(dim=-1) / spread).max().item()


def check_model(kept_logits: KeptLogits, tokens: list[int], model_type: str, packed: bool) -> None:
    """End the run with one line if the model cannot be called as training does, or mixes samples where `packed`."""
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
