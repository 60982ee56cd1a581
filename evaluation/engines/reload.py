"""Decide whether a running engine can load the weights of another model, and load them into vLLM's workers."""

import filecmp
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from evaluation.engines.models import CHAT_FILES, tensors_of

if TYPE_CHECKING:
    from evaluation.engines.vllm_engine import EngineSpec

# vLLM only warns about weights that it does not reload. So reload only architectures for which a test compares the
# answers with those of a fresh engine, and only under arguments that leave the weights as they are in the files.
_ARCHITECTURES = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_ARGUMENTS = {
    "dtype",
    "enable_prefix_caching",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "seed",
    "structured_outputs_config",
    "tensor_parallel_size",
}
_NAMES_AND_VERSIONS = ("_name_or_path", "_model_name_or_path", "name_or_path", "transformers_version")


def can_reload(running: "EngineSpec", wanted: "EngineSpec") -> bool:
    """Return whether an engine with the settings `running` can load the weights of `wanted`.

    Both must have the same arguments, network, tensors, tokenizer and chat template, so that only weights differ.
    Raises UserError if a weight file is damaged.
    """
    if any(spec.lora_path and not spec.merge_into for spec in (running, wanted)):
        return False
    if running.vllm_args != wanted.vllm_args or running.sampling != wanted.sampling:
        return False
    one, two = running.model, wanted.model
    config = _settings(one / "config.json")
    return (
        set(running.vllm_args) <= _ARGUMENTS
        and set(config.get("architectures") or ["none"]) <= _ARCHITECTURES
        and not config.get("quantization_config")
        and config == _settings(two / "config.json")
        and all(_same_chat_file(one / name, two / name) for name in (*CHAT_FILES, "generation_config.json"))
        and tensors_of(one) == tensors_of(two)
    )


def _same_chat_file(one: Path, two: Path) -> bool:
    if one.is_file() != two.is_file():
        return False
    if not one.is_file() or filecmp.cmp(one, two, shallow=False):
        return True
    return one.name.endswith("_config.json") and _settings(one) == _settings(two)


def _settings(file: Path) -> dict[str, Any]:
    """Return the settings in a JSON file, without names and versions."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if "torch_dtype" in settings:  # transformers' older name
        settings.setdefault("dtype", settings.pop("torch_dtype"))
    return {key: value for key, value in settings.items() if key not in _NAMES_AND_VERSIONS}


def reload(llm: Any, folder: str) -> None:
    """Load the weights in `folder` into a vLLM engine without requests, and forget the keys and values of the old ones.

    Raises UserError if the network in `folder` differs, and any error of vLLM's.
    """
    from transformers import AutoConfig

    # An adapter of the embeddings gives its merged copy an output layer of its own.
    if AutoConfig.from_pretrained(folder).tie_word_embeddings != llm.model_config.hf_config.tie_word_embeddings:
        raise UserError("only one of the two models shares a matrix between input and output")
    llm.collective_rpc(_reload_weights, args=(folder,))
    if not llm.reset_prefix_cache():
        raise UserError("requests are still using the prefix cache")


def _reload_weights(worker: Any, folder: str) -> None:
    """Load the weights in `folder` in one of vLLM's workers."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    worker.reload_weights(weights_path=folder)
    # On a CPU, vLLM 0.23 keeps packed copies of matrices. It does not renew that of an output layer that shares the
    # input embedding, because no file has a tensor for it.
    for module in worker.model_runner.get_model().modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
