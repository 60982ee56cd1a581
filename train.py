"""Train a model to write SOAP notes: the data source and the trainer that arctic_training loads.

Reads ./soap_dataset (from preprocess_data.py); writes ./ckpt/<run>/global_step_N, train-log.jsonl and loss.png.

    arctic_training Qwen3-1.7B-config.yaml         # full fine-tune
    arctic_training Qwen3-1.7B-LoRA-config.yaml    # LoRA adapter
    python train.py                                # show one formatted example; --model adds token counts
"""

import sys

if __name__ == "__main__":  # the preview comes first: it needs neither torch nor arctic_training
    from training.preview import main

    sys.exit(main())

import fcntl
import gc
import hashlib
import os
import random
from itertools import chain, islice
from pathlib import Path
from typing import Any, Union

# Packs differ a little in length; without this the allocator keeps memory for each size. Read at the first allocation.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import deepspeed
import numpy as np
import torch
from arctic_training.checkpoint.ds_engine import DSCheckpointEngine
from arctic_training.checkpoint.engine import CheckpointEngine
from arctic_training.checkpoint.hf_engine import HFCheckpointEngine
from arctic_training.config.data import DataSourceConfig
from arctic_training.data.sft_factory import SFTDataFactory
from arctic_training.data.source import DataSource
from arctic_training.data.utils import DatasetType
from arctic_training.trainer.sft_trainer import SFTTrainer
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

import prompts
from common import chat_template
from common.chat_template import check_template
from prompts import SECTIONS, prompts_hash, training_messages
from training import attention, layers, lora, tokens
from training.checkpoints import WITHOUT_EFFECT, ExportEngine, ResumeEngine, named_leaves
from training.errors import fail, tell_in_one_line
from training.forward import kept_logits
from training.loss import chunked_cross_entropy
from training.packing_check import check_model
from training.preview import load_split
from training.processes import any_process, over_processes
from training.progress import Progress, lock_run
from training.settings import WHOLE_MODEL, SOAPDataConfig, SOAPTrainerConfig
from training.transfer import Readout

os.umask(0o077)  # token caches and checkpoints hold patients' text: for this user alone
tell_in_one_line()


class SOAPDataSourceConfig(DataSourceConfig):
    name_or_path: Path = Path("./soap_dataset")
    """ The folder that preprocess_data.py wrote, relative to the working folder. """


class SOAPDataSource(DataSource):
    """`type: soap`: each row of a soap_dataset split as system prompt, dialogue, and the note as JSON."""

    name = "soap"
    config: SOAPDataSourceConfig

    def load(self, config: SOAPDataSourceConfig, split: str) -> DatasetType:
        """The split as a dataset with one column, `messages`: a list of {role, content}."""
        rows = self.rows
        return rows.map(
            lambda row: {"messages": training_messages(row["dialogue"], {key: row[key] for key in SECTIONS})},
            remove_columns=rows.column_names,
            num_proc=self.data_factory.config.num_proc,
            desc=f"Formatting {split}",
        )

    @property
    def rows(self) -> Dataset:
        try:
            return load_split(self.config.name_or_path, self.config.split)
        except ValueError as error:
            fail(*str(error).rsplit(": ", 1))

    @property
    def cache_path_args(self) -> tuple[dict, ...]:
        """Adds what the tokens are made of, so that other data, prompts or templates never meet an old cache."""
        template = hashlib.sha256(str(self.trainer.tokenizer.chat_template).encode()).hexdigest()
        code = (__file__, tokens.__file__, prompts.__file__, chat_template.__file__)
        content = {
            "rows": tokens.file_fingerprint(self.config.name_or_path / self.config.split),
            "prompts": prompts_hash(),
            "template": template,
            "vocabulary": len(self.trainer.tokenizer),
            "code": [tokens.file_fingerprint(Path(file)) for file in code],
        }
        config = self.trainer.config
        if config.min_iterations:  # arctic_training repeats the rows to so many before it saves them
            content["repeated"] = config.min_iterations * config.gradient_accumulation_steps * self.trainer.world_size
        return (*super().cache_path_args, content)


class SOAPDataFactory(SFTDataFactory):
    """`type: soap`: tokens with labels on the note alone, a count of what max_length drops, best-fit packs."""

    name = "soap"
    config: SOAPDataConfig
    default_source_cls = SOAPDataSource

    def __call__(self) -> tuple[DataLoader, DataLoader | None]:
        """One run at a time: two that build the same cache would fail at its renaming; so the second finds it built."""
        if not self.is_main_process_by_path:
            return super().__call__()
        with (self.config.cache_dir / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return super().__call__()

    def process(self, dataset: DatasetType) -> DatasetType:
        try:
            return dataset.map(
                self._encode,
                remove_columns=dataset.column_names,
                num_proc=self.config.num_proc,
                desc="Tokenizing",
            )
        except tokens.TemplateError as error:
            fail(str(error), WHOLE_MODEL)

    def _encode(self, row: dict[str, Any]) -> dict[str, list[int]]:
        example = tokens.encode_example(self.tokenizer, row["messages"])
        return {**example, "attention_mask": [1] * len(example["input_ids"])}

    def post_load_callback(self, dataset: DatasetType) -> DatasetType:
        """Pack what arctic_training's own length filter has left."""
        if not self.config.best_fit_packing:
            return dataset
        packs = tokens.best_fit_packs([len(ids) for ids in dataset["input_ids"]], self.config.max_length)
        return (
            Dataset.from_dict({"rows": packs})
            .map(lambda pack: _join(dataset[pack["rows"]]), remove_columns="rows", desc="Packing")
            .shuffle(seed=self.config.seed)
        )


def _join(rows: dict[str, list[list[int]]]) -> dict[str, list[int]]:
    """Samples end to end as one pack; positions count from 0 in each, which is how attention tells them apart."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    joined = {key: list(chain.from_iterable(rows[key])) for key in ("input_ids", "labels", "attention_mask")}
    positions = list(chain.from_iterable(range(length) for length in lengths))
    return {**joined, "position_ids": positions, "packed_sample_seqlens": lengths}


class SOAPTrainer(SFTTrainer):
    """`type: soap`: SFTTrainer with the same loss at a fraction of the work, exact resume, and progress to look at."""

    name = "soap"
    config: SOAPTrainerConfig
    data_factory: SOAPDataFactory
    checkpoint_engine: Union[ExportEngine, ResumeEngine, HFCheckpointEngine, DSCheckpointEngine]  # noqa: UP007
    fail = staticmethod(fail)
    gas_boundary = False  # with it, arctic_training's Ray launcher would report figures that only its own `epoch` has

    def __init__(self, config: SOAPTrainerConfig, mode: str = "train") -> None:
        """`mode` "process-data" ends when the packs are in the cache, and leaves `train` impossible."""
        if mode == "train":
            self._claim_folders(config)
        try:
            tokenizer = tokens.load_tokenizer(config.tokenizer.name_or_path)  # before work on the data
            if (notice := check_template(tokenizer)) and config.global_rank == 0:
                print(notice)
        except tokens.TemplateError as error:
            fail(str(error), WHOLE_MODEL)
        attention.register_varlen()
        self._choose_implementations(config)
        super().__init__(config, mode)
        if config.global_rank == 0:
            self._print_data()
        if mode != "train":
            return
        self._check_model()
        if config.model.peft_config and config.fused_lora and not config.zero_3_enabled:
            lora.fuse(self.model_unwrapped)
        if checker := getattr(self.model.optimizer, "overflow_checker", None):
            # It reads every gradient and waits for the GPU each time, 310 times a step. DeepSpeed leaves a step out
            # because of the gradients' norm, too, which an infinity anywhere makes infinite.
            checker.has_overflow = lambda *_, **__: False
        if self.world_size == 1 and not self.model.zero_optimization():
            self.model.enable_backward_allreduce = False  # with itself: it would copy all gradients for nothing

    def _choose_implementations(self, config: SOAPTrainerConfig) -> None:
        """Replace attention and layers that this machine or model cannot have, and say so."""
        model, hf_config = config.model, AutoConfig.from_pretrained(tokens.model_files(config.model.name_or_path))
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf_config), None)
        attn = attention.supported_attention(model.attn_implementation, model.dtype.value, model_class)
        for setting, what, (used, reason) in (
            ("attn_implementation", "attention", attn),
            ("type", "layers", layers.supported_layers(model.type, hf_config.model_type)),
        ):
            if reason and config.global_rank == 0:
                print(f"{what}: {used} instead of {getattr(model, setting)}, because {reason}")
            setattr(model, setting, used)

    def _check_model(self) -> None:
        """All processes call the model: with ZeRO-3 each has a part of it."""
        config, pack = self.config, self.train_dataloader.dataset[0]
        self.model.eval()
        check_model(
            lambda batch: kept_logits(self.model, batch, config.model.attn_implementation, self.device)[0],
            pack["input_ids"],
            self.model_unwrapped.config.model_type,
            packed=config.data.best_fit_packing or config.data.pack_samples,
        )

    def _claim_folders(self, config: SOAPTrainerConfig) -> None:
        if config.kill_switch_path.exists():
            fail(f"the kill switch {config.kill_switch_path} exists, so the run would end at once", "remove it")
        if config.global_rank == 0:
            self.lock = lock_run(config.train_log_metrics_path)
            for checkpoint in config.checkpoint:  # what cannot be written shall show now, not at the end
                checkpoint.output_dir.mkdir(parents=True, exist_ok=True)

    def _print_data(self) -> None:
        packs = self.train_dataloader.dataset
        rows = 0
        for source in self.config.data.sources:
            count = len(SOAPDataSource(self.train_dataloader, source).rows)
            wanted = int(count * source.sample_ratio) if source.sample_ratio else source.sample_count or count
            rows += min(count, wanted)
        packed = "packed_sample_seqlens" in packs.column_names
        kept = sum(map(len, packs["packed_sample_seqlens"])) if packed else len(packs)
        config, data = self.config, self.config.data
        # With these, rows are missing from the packs, or in them twice, for another reason than their length.
        moved = config.min_iterations or data.train_eval_split[1] or data.drop_last or data.repeat_to_pack_max_length
        dropped = "" if moved else f" {rows - kept:,} longer than max_length {data.max_length:,} and left out,"
        steps = f"{self.training_horizon:,} steps in {config.epochs} epochs"
        print(f"data: {rows:,} rows,{dropped} {len(packs):,} packs; {steps}")
        for checkpoint in config.checkpoint:
            every, by_epoch = checkpoint.save_every_n_steps, checkpoint.save_every_n_epochs
            if checkpoint.type == "resume" and every >= self.training_horizon and not by_epoch:
                print(f"resume: no state before the end, because save_every_n_steps is {every}")

    # --- loss ------------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy over the labelled tokens of one pack; equal to SFTTrainer's.

        `batch`: input_ids, labels and position_ids, each (1, tokens). The LM head runs on the positions whose next
        token is labelled, about a quarter of them, and attention on each sample alone.
        """
        batch.pop("packed_sample_seqlens", None)
        labels = batch.pop("labels")[0, 1:]
        positions = (labels != tokens.IGNORE_INDEX).nonzero().flatten()  # on the CPU: the GPU need not wait
        batch |= {"logits_to_keep": positions, "targets": labels[positions]}
        return chunked_cross_entropy(
            *kept_logits(self.model, batch, self.config.model.attn_implementation, self.device)
        )

    # --- loop ------------------------------------------------------------------------------------------------------

    @property
    def training_horizon(self) -> int:
        """Optimizer steps of the whole run: the length of the learning-rate schedule."""
        if self.config.train_iters:
            return self.config.train_iters
        packs, accumulated = len(self.train_dataloader), self.config.gradient_accumulation_steps
        steps = self.config.epochs * packs // accumulated
        if not steps:
            fail(
                f"{packs} packs in {self.config.epochs} epochs are too few for one step of {accumulated}",
                "lower `gradient_accumulation_steps`",
            )
        return steps

    @property
    def batches_done(self) -> int:
        return self.global_step * self.config.gradient_accumulation_steps

    def pre_train_callback(self) -> None:
        self.epoch_idx, self.behind = divmod(self.batches_done, len(self.train_dataloader))
        self.step_losses: list[float] = []  # of the optimizer step under way, which may begin in the epoch before
        self.step_tokens = 0
        self.saved_at: dict[CheckpointEngine, int] = {}
        self.progress = None
        if self.global_rank == 0:
            log = self.config.train_log_metrics_path
            self.progress = Progress(log, self.training_horizon, self.global_step)
        gc.collect()
        gc.freeze()  # a full collection costs 0.4 s with torch and transformers loaded; what is here now stays anyway

    def epoch(self) -> None:
        """One pass over the packs, in an order of its own; a resumed run skips what it has behind it."""
        self.epoch_finished = False
        self.train_dataloader.sampler.set_epoch(self.epoch_idx)
        behind, self.behind = self.behind, 0
        for batch in islice(self.train_dataloader, behind, None):
            if self.global_step >= self.training_horizon:  # the last packs are too few for another step
                break
            if self.need_early_exit():
                self.early_stop = True
                return
            self.step_tokens += int(sum(map(sum, batch["packed_sample_seqlens"])))
            self.step(batch)
            self.step_losses.append(self.last_loss)
            if self.model.micro_steps % self.config.gradient_accumulation_steps:
                continue
            mean = sum(self.step_losses) / len(self.step_losses)
            mean, count = over_processes(mean, self.step_tokens, self.device)
            if self.progress:
                self.progress.step(self.global_step, self.epoch_idx, mean, self.scheduler.get_last_lr()[0], count)
            self.step_losses, self.step_tokens = [], 0
            last = self.global_step == self.training_horizon
            if self.config.eval_interval and (last or self.global_step % self.config.eval_interval == 0):
                self.evaluate()
            self.checkpoint()
        self.epoch_finished = True

    def need_early_exit(self) -> bool:
        """All processes alike, or those that go on would wait for ever: one may see the kill switch before another."""
        if not any_process(super().need_early_exit(), self.device):
            return False
        self.early_stop_reason = self.early_stop_reason or f"detected kill switch {self.config.kill_switch_path}"
        return True

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        self.model.train()
        with deepspeed.runtime.engine.autocast_if_enabled(self.model):
            loss = self.loss(batch)
        value = Readout(loss)  # loss.item() after the step would wait for the optimizer, and the GPU then for Python
        self.backward(loss)
        self.model.step()
        self.last_loss = value.item()
        self.global_step = self.model.global_steps
        self.global_step_this_run = self.global_step - self.global_step_at_start_this_run

    def evaluate(self) -> None:
        """Validation loss: mean over all labelled tokens of the validation data, of all processes."""
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for batch in self.eval_dataloader:
                labelled = int((batch["labels"][:, 1:] != tokens.IGNORE_INDEX).sum())
                total += torch.tensor([self.loss(batch).item() * labelled, labelled])
        total = total.to(self.device)
        torch.distributed.all_reduce(total)
        if self.progress:
            self.progress.validation(self.global_step, (total[0] / total[1]).item())

    def post_train_callback(self) -> None:
        if self.progress:
            self.progress.close()
        if not self.training_finished:
            return
        states = [engine for engine in self.checkpoint_engines if isinstance(engine, ResumeEngine)]
        exported = any(step == self.global_step for engine, step in self.saved_at.items() if engine not in states)
        for engine in states:
            if exported and not self.early_stop:
                engine.clear()
            elif self.global_rank == 0 and engine.newest:
                print(f"{engine.newest} is kept: the same command goes on from there")

    # --- checkpoints -----------------------------------------------------------------------------------------------

    @property
    def identity(self) -> dict[str, str]:
        """What a run must share with a saved state to go on from it; see ResumeEngine."""
        config = self.config
        parts = ("model", "tokenizer", "data", "optimizer", "scheduler")
        numbers = ("epochs", "train_iters", "min_iterations", "gradient_accumulation_steps", "seed", "world_size")
        sources = (SOAPDataSource(self, source) for source in config.data.sources)
        return {
            **named_leaves({part: getattr(config, part).model_dump(exclude=WITHOUT_EFFECT) for part in parts}),
            **{number: str(getattr(config, number)) for number in numbers},
            "ZeRO stage": str(config.deepspeed["zero_optimization"].get("stage", 0)),
            "gradient_clipping": str(config.deepspeed["gradient_clipping"]),
            "prompts": prompts_hash(),
            "rows": ",".join(tokens.file_fingerprint(s.config.name_or_path / s.config.split)[:12] for s in sources),
        }

    def restore(self, client_state: dict[str, Any]) -> None:
        """Take up the counters and random states of a resume state."""
        self.global_step = self.model.global_steps
        torch.set_rng_state(client_state["torch_random_state"])
        np.random.set_state(client_state["np_random_state"])
        random.setstate(client_state["python_random_state"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(client_state["torch_cuda_random_state"])
        if self.global_rank == 0:
            print(f"resumed at step {self.global_step} of {self.training_horizon}")

    def checkpoint(self) -> None:
        for engine in self.checkpoint_engines:
            if self._due(engine) and self.saved_at.get(engine) != self.global_step:
                engine.save(self.model)
                self.saved_at[engine] = self.global_step

    def _due(self, engine: CheckpointEngine) -> bool:
        """Like CheckpointEngine.do_checkpoint, but told after the step is counted: step N is saved as step N."""
        config, steps = engine.config, self.global_step
        in_epoch = not self.epoch_finished
        resumable = isinstance(engine, ResumeEngine) and (config.save_every_n_steps or config.save_every_n_epochs)
        return config.enabled and bool(
            (in_epoch and config.save_every_n_steps and steps and steps % config.save_every_n_steps == 0)
            or (
                not in_epoch
                and not self.training_finished
                and config.save_every_n_epochs
                and (self.epoch_idx + 1) % config.save_every_n_epochs == 0
            )
            or (self.training_finished and config.save_end_of_training)
            or (self.early_stop and self.training_finished and steps and resumable)
        )
