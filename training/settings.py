"""What a YAML of `type: soap` may set: two settings more than arctic_training's, and not some that did nothing here."""

from arctic_training.config.enums import DType
from arctic_training.config.model import ModelConfig
from arctic_training.config.optimizer import OptimizerConfig
from arctic_training.config.trainer import TrainerConfig
from arctic_training.config.wandb import WandBConfig
from arctic_training.data.sft_factory import SFTDataConfig
from pydantic import Field, ValidationInfo, field_validator, model_validator
from transformers import AutoConfig, PretrainedConfig

from common import adapters
from training import tokens
from training.errors import fail
from training.operators import compile_operators

WHOLE_MODEL = "give the folder or the hub's name of a whole model that was made for chats as `model.name_or_path`"

# Settings of arctic_training that stay at their defaults here, and why, or what to do in their place.
ONE_VALUE = {
    "mask_inputs": "the loss is on the note alone",
    "ignore_empty_think": "all that stands before the note is masked anyway",
    "micro_batch_size": "a batch is one pack, so raise `gradient_accumulation_steps` or `data.max_length` instead",
    "sequence_parallel_size": "to save memory, lower `data.max_length` instead",
    "overfit_first_batch": "set `sample_count` of the data's source to a few rows instead",
    "eval_log_iter_interval": "each validation loss is logged, so raise `eval_interval` instead",
}
OF_PACK_SAMPLES = ("always_max_length", "drop_last", "fuse_positions_prob", "repeat_to_pack_max_length")


def refuse_other_values(cls: type, value: object, info: ValidationInfo) -> object:
    """Validate a setting of ONE_VALUE."""
    if value != (only := cls.model_fields[info.field_name].default):
        raise ValueError(f"only {only} is possible here; {ONE_VALUE[info.field_name]}")
    return value


def check_adapter(model: ModelConfig, base: PretrainedConfig) -> None:
    """Raise AdapterError for an adapter that eval.py would refuse, or that is not what the YAML asks for."""
    adapters.check_settings(model.peft_config, saved=False)
    if model.hf_config_kwargs:
        raise adapters.AdapterError(
            "an adapter is saved without `model.hf_config_kwargs`, so it would be evaluated without them",
            "leave them out, or change config.json in a copy of the base model",
        )
    if getattr(base, "quantization_config", None):
        raise adapters.AdapterError(
            f"{model.name_or_path} is quantised, so an adapter cannot be added to its weights",
            "give the model that it was made from",
        )
    adapted = adapters.adapted_model(model.peft_config, tokens.model_files(model.name_or_path))
    if unmatched := adapters.unmatched(model.peft_config, adapted):
        raise adapters.AdapterError(f"{unmatched} matches no module of {model.name_or_path}", "correct or remove it")


class SOAPDataConfig(SFTDataConfig):
    best_fit_packing: bool = False
    """ Pack samples, anew in each epoch, about 97% full, where `pack_samples` leaves about a tenth empty. """

    @model_validator(mode="after")
    def validate_packing(self) -> "SOAPDataConfig":
        if self.best_fit_packing and self.pack_samples:
            raise ValueError("best_fit_packing and pack_samples exclude each other: set one of them")
        for name in OF_PACK_SAMPLES:
            if getattr(self, name) and not self.pack_samples:
                raise ValueError(f"{name} works with pack_samples alone; leave it out")
        return self

    left_out = field_validator("mask_inputs", "ignore_empty_think")(classmethod(refuse_other_values))


class SOAPTrainerConfig(TrainerConfig):
    fused_lora: bool = True
    """ Compute LoRA layers as training/lora.py does; false: as PEFT does. Not used with ZeRO-3, or with dropout. """

    keep_best: bool = True
    """ Export the model of the step with the best validation loss; false, or no validation: of the last step. """

    early_stopping_patience: int = Field(default=0, ge=0)
    """ End the run after so many validations without a better loss; 0: never. """

    left_out = field_validator(
        "micro_batch_size", "sequence_parallel_size", "overfit_first_batch", "eval_log_iter_interval"
    )(classmethod(refuse_other_values))

    @model_validator(mode="after")
    def validate_patience(self) -> "SOAPTrainerConfig":
        if self.early_stopping_patience and not self.eval_interval:
            raise ValueError("early_stopping_patience needs validation data and `eval_interval`")
        return self

    @model_validator(mode="after")
    def choose_gradient_types(self) -> "SOAPTrainerConfig":
        """Sum gradients of several micro-batches in float32, and leave bfloat16 to MixedAdamW where it is used."""
        zero = self.deepspeed["zero_optimization"].get("stage", 0)
        if self.optimizer.type == "mixed_adamw":
            if zero:
                raise ValueError("mixed_adamw works with ZeRO stage 0 alone; set `optimizer.type: fused_adam`")
            if self.model.dtype == DType.FP16:
                raise ValueError("mixed_adamw has no loss scaling; set `model.dtype: bf16`")
            self.deepspeed["bfloat16"] = {"enabled": False}  # or DeepSpeed would wrap it in an optimizer of its own
        elif zero >= 2 and self.model.dtype == DType.BF16 and self.gradient_accumulation_steps > 1:
            self.deepspeed.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        return self

    @property
    def accumulates_in_bf16(self) -> bool:
        """Whether gradients of several micro-batches are summed in bfloat16: DeepSpeed's wrappers can do no other."""
        several = self.gradient_accumulation_steps > 1 and self.model.dtype == DType.BF16
        return several and self.optimizer.type != "mixed_adamw" and "data_types" not in self.deepspeed

    @field_validator("mem_profiler", mode="after")
    @classmethod
    def validate_mem_profiler(cls, value: str | None) -> str | None:
        if value == "step":
            raise ValueError("`step` is not possible here; `e2e` records the whole run")
        return value

    @field_validator("wandb", mode="after")
    @classmethod
    def validate_wandb(cls, wandb: WandBConfig) -> WandBConfig:
        if wandb.enable:
            raise ValueError("`enable` is not possible here; `train_log_metrics_path` gets a line of JSON each step")
        return wandb

    @field_validator("model", mode="after")
    @classmethod
    def validate_model(cls, model: ModelConfig) -> ModelConfig:
        try:
            config = AutoConfig.from_pretrained(tokens.model_files(model.name_or_path))
        except Exception as error:  # a wrong name, no network, a damaged file
            fail(f"{model.name_or_path} is no model that can be loaded ({error})", WHOLE_MODEL)
        if model.peft_config is not None:
            try:
                check_adapter(model, config)
            except adapters.AdapterError as error:
                fail(f"model.peft_config: {error.problem}", error.remedy)
        return model

    @field_validator("optimizer", mode="after")
    @classmethod
    def compile_operators(cls, optimizer: OptimizerConfig) -> OptimizerConfig:
        """Before arctic_training connects the processes, which is where DeepSpeed would compile the first one."""
        compile_operators(optimizer.type)
        return optimizer
