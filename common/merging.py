"""Merge a LoRA adapter into the weights of its base model."""

import contextlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from common import adapters
from common.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

MIN_SHARE_KEPT = 0.5  # of an adapter's change to the weights, after rounding to the result's type
_ROWS = 64  # of a weight to merge at a time: new memory for a whole one takes longer than the sums
_THREADS = 8  # that merge a weight each


def load_model(model: str | Path, dtype: "torch.dtype | str" = "auto") -> "PreTrainedModel":
    """Return the model in folder `model`, in its own type or in `dtype`. Raises UserError if a weight is missing."""
    from transformers import AutoModelForCausalLM

    loaded, found = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, output_loading_info=True, use_safetensors=True, trust_remote_code=False
    )
    if found["missing_keys"]:  # transformers would initialise them at random
        raise UserError(f"{model} has no {min(found['missing_keys'])}; copy or save the checkpoint again")
    return loaded


def load_merged(
    model: str | Path, adapter: str | Path, remedy: str, dtype: "torch.dtype | None" = None
) -> "PreTrainedModel":
    """Return the model in folder `model` with the LoRA adapter in folder `adapter` merged into its weights.

    The merge is computed in float32; the result is in `dtype`, or else in the model's own type. Raises UserError if
    that type cannot hold the result, with `remedy` as the advice, or if the result is not the model that was trained.
    """
    from peft import PeftModel

    base = load_model(model)
    dtype = dtype or base.dtype
    _check_embeddings(base, adapter)
    adapted = PeftModel.from_pretrained(base, adapter)
    if adapters.adapts_embeddings(adapted):
        _untie_embeddings(base)
    _merge_modules(adapted, dtype, remedy)
    return adapted.unload().to(dtype)


def _check_embeddings(base: "PreTrainedModel", adapter: str | Path) -> None:
    """Raise UserError if an embedding that PEFT saved with the adapter differs from that of `base`."""
    from safetensors import safe_open

    with safe_open(Path(adapter) / "adapter_model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if name.endswith(".base_layer.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(".base_layer.weight")
                own, copy = base.get_submodule(module).weight, tensors.get_tensor(name)
                if not own.to(copy.dtype).equal(copy):
                    raise UserError(f"{adapter} was trained with a different {module}; give its own base model")


def _untie_embeddings(base: "PreTrainedModel") -> None:
    """Give the output layer of `base` its own weight, so that an adapter of one embedding does not change the other."""
    from torch.nn import Parameter

    table, head = (
        getattr(layer, "base_layer", layer) for layer in (base.get_input_embeddings(), base.get_output_embeddings())
    )
    if head.weight is table.weight:
        head.weight = Parameter(head.weight.detach().clone())
    base.config.tie_word_embeddings = False


def _merge_modules(adapted: "PeftModel", dtype: "torch.dtype", remedy: str) -> None:
    """Merge the adapter into the weights, module by module. Raises UserError if `dtype` cannot hold the result."""
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in adapted.named_modules() if isinstance(layer, LoraLayer)}
    kept = wanted = 0.0
    with _one_thread_for_each_operation(), ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for name, sums in zip(layers, pool.map(lambda layer: _merge_layer(layer, dtype), layers.values()), strict=True):
            size_added, agreement, size_of_change = sums
            if not math.isfinite(size_added):
                raise UserError(f"the adapter makes weights of {name} too large for {dtype}; {remedy}")
            if size_of_change and not size_added:
                raise UserError(f"merging in {dtype} leaves {name} unchanged; {remedy}")
            kept += agreement
            wanted += size_of_change
    if kept < MIN_SHARE_KEPT * wanted:
        raise UserError(f"{dtype} keeps only {kept / wanted:.0%} of the adapter's change; {remedy}")


@contextlib.contextmanager
def _one_thread_for_each_operation() -> Iterator[None]:
    """Let PyTorch compute in the calling thread. Its own threads wait for each other after each of many short sums."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _merge_layer(layer: "LoraLayer", dtype: "torch.dtype") -> list[float]:
    """Merge the adapter into one weight.

    Return the sums of squares of what is added after rounding to `dtype`, of its product with the adapter's change, and
    of squares of the change.
    """
    import torch

    weight = layer.get_base_layer().weight
    change = layer.get_delta_weight("default")
    merged = torch.empty_like(weight, dtype=dtype)
    sums = torch.zeros(3)
    for own, asked, result in zip(*(each.detach().split(_ROWS) for each in (weight, change, merged)), strict=True):
        exact = own.float()
        result.copy_(exact + asked)
        added, asked = (result.float() - exact).flatten(), asked.flatten()
        sums += torch.stack([added.dot(added), added.dot(asked), asked.dot(asked)])
    weight.data = merged
    return sums.tolist()
