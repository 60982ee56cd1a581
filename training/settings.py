"""Settings of a `type: soap` YAML: arctic_training's and a few more. Settings that have no effect here are rejected."""

import json
import os
from pathlib import Path

import torch
from arctic_training.config.enums import DType
from arctic_training.config.model import ModelConfig
from arctic_training.config.optimizer import OptimizerConfig
from arctic_training.config.trainer import TrainerConfig
from arctic_training.config.wandb import WandBConfig
from arctic_training.data.sft_factory import SFTDataConfig
from pydantic import Field, ValidationInfo, field_validator, model_validator
from transformers import AutoConfig, PretrainedConfig

from common import adapters
from common.errors import UserError
from common.rope import check_rope
from training import tokens
from training.errors import fail
from training.operators import compile_operators
from training.trackers import Name, check_installed

MODEL_REMEDY = "set `model.name_or_path` to the folder or hub name of a complete chat model"

# Settings of arctic_training that must keep their defaults here, with the reason or the alternative.
FIXED_SETTINGS = {
    "mask_inputs": "the loss covers only the note",
    "ignore_empty_think": "everything before the note is masked anyway",
    "micro_batch_size": "a batch is one pack, so raise `gradient_accumulation_steps` or `data.max_length` instead",
    "sequence_parallel_size": "to save memory, lower `data.max_length` instead",
    "overfit_first_batch": "set `sample_count` of the data source to a few rows instead",
    "eval_log_iter_interval": "each validation loss is logged, so raise `eval_interval` instead",
}
PACK_SAMPLES_SETTINGS = ("always_max_length", "drop_last", "fuse_positions_prob", "repeat_to_pack_max_length")


def supported_dtype(wanted: DType) -> tuple[DType, str | None]:
    """Return the type of the weights to use for the requested one, and the reason if they differ (else None).

    float16 is no substitute: its range needs loss scaling, which `mixed_adamw` does not have.
    """
    cuda = torch.cuda
    if wanted == DType.BF16 and cuda.is_available() and not cuda.is_bf16_supported(including_emulation=False):
        return DType.FP32, f"{cuda.get_device_name()} has no bfloat16 hardware; weights take twice the memory"
    return wanted, None


def check_fixed_setting(cls: type, value: object, info: ValidationInfo) -> object:
    """Return the value of a setting in FIXED_SETTINGS. Raises ValueError unless it is the default."""
    if value != (only := cls.model_fields[info.field_name].default):
        raise ValueError(f"must be {only} here; {FIXED_SETTINGS[info.field_name]}")
    return value


def check_adapter(model: ModelConfig, base: PretrainedConfig) -> None:
    """Raise AdapterError for an adapter that eval.py would reject, or that would differ from the YAML."""
    adapters.check_settings(model.peft_config, saved=False)
    if model.hf_config_kwargs:
        raise adapters.AdapterError(
            "an adapter is saved, and so evaluated, without `model.hf_config_kwargs`",
            "remove them, or change config.json in a copy of the base model",
        )
    if getattr(base, "quantization_config", None):
        raise adapters.AdapterError(
            f"{model.name_or_path} is quantised, so an adapter cannot be added to its weights",
            "use the model it was quantised from",
        )
    adapted = adapters.adapted_model(model.peft_config, tokens.model_files(model.name_or_path))
    if unmatched := adapters.unmatched(model.peft_config, adapted):
        raise adapters.AdapterError(f"{unmatched} matches no module of {model.name_or_path}", "correct or remove it")


class SOAPDataConfig(SFTDataConfig):
    best_fit_packing: bool = False
    """ Repack samples in each epoch, about 97% full; `pack_samples` leaves about a tenth empty. """

    @model_validator(mode="after")
    def validate_packing(self) -> "SOAPDataConfig":
        if self.best_fit_packing and self.pack_samples:
            raise ValueError("best_fit_packing and pack_samples exclude each other: set only one")
        for name in PACK_SAMPLES_SETTINGS:
            if getattr(self, name) and not self.pack_samples:
                raise ValueError(f"{name} works only with pack_samples; remove it")
        return self

    fixed_settings = field_validator("mask_inputs", "ignore_empty_think")(classmethod(check_fixed_setting))


class SOAPTrainerConfig(TrainerConfig):
    fused_lora: bool = True
    """ Compute LoRA layers as in training/lora.py; false: as in PEFT. Has no effect with ZeRO-3 or dropout. """

    keep_best: bool = True
    """ Export the model of the step with the best validation loss; if false or without validation, the last step. """

    early_stopping_patience: int = Field(default=0, ge=0)
    """ Stop after this many validations without a better loss; 0: never. """

    report_to: list[Name] = Field(default_factory=list)
    """ Experiment trackers that get the figures of the log: tensorboard, wandb, trackio. """

    fixed_settings = field_validator(
        "micro_batch_size", "sequence_parallel_size", "overfit_first_batch", "eval_log_iter_interval"
    )(classmethod(check_fixed_setting))

    @field_validator("report_to", mode="after")
    @classmethod
    def validate_trackers(cls, names: list[Name]) -> list[Name]:
        check_installed(names)
        return names

    @model_validator(mode="after")
    def validate_patience(self) -> "SOAPTrainerConfig":
        if self.early_stopping_patience and not self.eval_interval:
            raise ValueError("early_stopping_patience needs validation data and `eval_interval`")
        return self

    @model_validator(mode="after")
    def choose_gradient_types(self) -> "SOAPTrainerConfig":
        """Sum gradients of several micro-batches in float32; with MixedAdamW, turn off DeepSpeed's bfloat16 wrapper."""
        zero = self.deepspeed["zero_optimization"].get("stage", 0)
        if self.optimizer.type == "mixed_adamw":
            if zero:
                raise ValueError("mixed_adamw works only with ZeRO stage 0; set `optimizer.type: fused_adam`")
            if self.model.dtype == DType.FP16:
                raise ValueError("mixed_adamw has no loss scaling; set `model.dtype: bf16`")
            self.deepspeed["bfloat16"] = {"enabled": False}  # otherwise DeepSpeed would wrap the optimizer in its own
        elif zero >= 2 and self.model.dtype == DType.BF16 and self.gradient_accumulation_steps > 1:
            self.deepspeed.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        return self

    @property
    def accumulates_in_bf16(self) -> bool:
        """Whether gradients of several micro-batches are summed in bfloat16, as DeepSpeed's wrappers do."""
        several = self.gradient_accumulation_steps > 1 and self.model.dtype == DType.BF16
        return several and self.optimizer.type != "mixed_adamw" and "data_types" not in self.deepspeed

    @field_validator("mem_profiler", mode="after")
    @classmethod
    def validate_mem_profiler(cls, value: str | None) -> str | None:
        if value == "step":
            raise ValueError("`step` is not supported here; `e2e` records the whole run")
        return value

    @field_validator("wandb", mode="after")
    @classmethod
    def validate_wandb(cls, wandb: WandBConfig) -> WandBConfig:
        if wandb.enable:
            raise ValueError("`enable` is not supported here; set `report_to: [wandb]`")
        return wandb

    @field_validator("model", mode="after")
    @classmethod
    def validate_model(cls, model: ModelConfig) -> ModelConfig:
        try:
            folder = Path(tokens.model_files(model.name_or_path))
            config = AutoConfig.from_pretrained(folder)
        except Exception as error:  # a wrong name, no network, a damaged file
            fail(f"{model.name_or_path} cannot be loaded as a model ({error})", MODEL_REMEDY)
        try:
            check_rope(
                str(model.name_or_path), json.loads((folder / "config.json").read_text()) | model.hf_config_kwargs
            )
        except UserError as error:
            problem, _, remedy = str(error).rpartition("; ")
            fail(problem, remedy)
        wanted, (model.dtype, reason) = model.dtype, supported_dtype(model.dtype)
        if reason and os.environ.get("RANK", "0") == "0":
            print(f"dtype: {model.dtype.name.lower()} instead of {wanted.name.lower()}, because {reason}")
        if model.peft_config is not None:
            try:
                check_adapter(model, config)
            except adapters.AdapterError as error:
                fail(f"model.peft_config: {error.problem}", error.remedy)
        return model

    @field_validator("optimizer", mode="after")
    @classmethod
    def compile_operators(cls, optimizer: OptimizerConfig) -> OptimizerConfig:
        """Compile before arctic_training connects the processes, during which DeepSpeed would compile an operator."""
        compile_operators(optimizer.type)
        return optimizer
