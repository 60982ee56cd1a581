"""Call the model the same way in every training step and in the check before the first one."""

import torch

from training import attention
from training.transfer import to_device_async


def kept_logits(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], attn_implementation: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (kept, vocabulary) of a pack at the positions `logits_to_keep`, and `targets` on the same device.

    `batch`, on the CPU: input_ids and position_ids, each (1, tokens); logits_to_keep and targets, each (kept,).
    """
    options = {"use_cache": False}
    if attn_implementation == attention.VARLEN:
        bounds, options["max_length_q"] = attention.sample_bounds(batch["position_ids"])
        batch = {**batch, "cu_seq_lens_q": bounds}
    batch = to_device_async(batch, device)
    targets = batch.pop("targets")
    logits = model(**batch, **options).logits[0]
    if len(logits) > len(targets):  # some models, such as Mamba, ignore logits_to_keep
        logits = logits[batch["logits_to_keep"]]
    return logits, targets
