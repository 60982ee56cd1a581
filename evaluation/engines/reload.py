"""Decide whether a running engine can load the weights of another model, and load them into vLLM's workers."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from evaluation.engines.models import tensors_of

if TYPE_CHECKING:
    from evaluation.engines.vllm_engine import EngineSpec

# vLLM only warns about weights that it does not reload. So reload only architectures for which a test compares the
# answers with those of a fresh engine, and only under arguments that leave the weights as they are in the files.
_ARCHITECTURES = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_ARGUMENTS = {
    "compilation_config",  # CUDA graphs read the weights where they are, and vLLM writes the new ones there
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
# Entries of config.json and generation_config.json that change no answer of vLLM's.
_WITHOUT_EFFECT = {"_name_or_path", "name_or_path", "transformers_version", "use_cache", "_from_model_config"}


def can_reload(running: "EngineSpec", wanted: "EngineSpec") -> bool:
    """Return whether an engine with the settings `running` may be able to load the weights of `wanted`.

    Both must have the same arguments and tensors, and an architecture that was tested. `reload` checks the rest.
    Raises UserError if a weight file is damaged.
    """
    if any(spec.lora_path and not spec.merge_into for spec in (running, wanted)):
        return False
    if running.vllm_args != wanted.vllm_args or running.sampling != wanted.sampling:
        return False
    return (
        set(running.vllm_args) <= _ARGUMENTS
        and _is_tested(running.model)
        and _is_tested(wanted.model)
        and tensors_of(running.model) == tensors_of(wanted.model)
    )


def _is_tested(model: Path) -> bool:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return set(config.get("architectures") or ["none"]) <= _ARCHITECTURES and not config.get("quantization_config")


def check_same_network(running: str, wanted: str) -> None:
    """Check that the models in two folders differ in their weights alone. Raises UserError with the first difference.

    Versions of transformers write the same settings in different forms. So this compares the settings as vLLM reads
    them, and tokenizers by all that encodes, decodes and renders chats. It imports vLLM, which takes seconds.
    """
    if running == wanted:
        return
    one, two = _meaning(running), _meaning(wanted)
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            raise UserError(f"{key} of {wanted} differs from that of {running}")


def _meaning(model: str) -> dict[str, Any]:
    """Return the settings of the model in a folder that determine its answers, together with its weights."""
    from transformers import AutoTokenizer
    from vllm.transformers_utils.config import get_config, try_get_generation_config

    config = get_config(model, trust_remote_code=False).to_dict()
    generation = try_get_generation_config(model, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.is_fast:  # PromptEncoder uses neither
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    settings = {key: value for key, value in config.items() if key not in _WITHOUT_EFFECT}
    return settings | {
        "generation_config": {key: value for key, value in generation.to_dict().items() if key not in _WITHOUT_EFFECT},
        "chat_template": tokenizer.chat_template,
        "special_tokens": tokenizer.special_tokens_map,
        "tokenizer": tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else model,
    }


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
