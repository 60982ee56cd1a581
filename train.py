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
import time
from itertools import chain
from pathlib import Path
from typing import Any, Union

if Path(sys.argv[0]).name == "arctic_training_run" and "RANK" not in os.environ:
    # One process, begun without the launcher, which imports DeepSpeed twice before a run begins.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(alone)

# Packs differ a little in length; without this the allocator keeps memory for each size. Read at the first allocation.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import deepspeed
import deepspeed.comm as dist
import numpy as np
import torch
from arctic_training.checkpoint.ds_engine import DSCheckpointEngine
from arctic_training.checkpoint.engine import CheckpointEngine
from arctic_training.checkpoint.hf_engine import HFCheckpointEngine
from arctic_training.config.data import DataSourceConfig
from arctic_training.data.sft_factory import DataCollatorForCausalLM, SFTDataFactory
from arctic_training.data.source import DataSource
from arctic_training.data.utils import DatasetType
from arctic_training.optimizer.adam_factory import CPUAdamOptimizerFactory, FusedAdamOptimizerFactory
from arctic_training.scheduler.hf_factory import HFSchedulerFactory
from arctic_training.trainer.sft_trainer import SFTTrainer
from datasets import Dataset, load_from_disk
from torch.utils.data import DataLoader

import prompts
from prompts import SECTIONS, prompts_hash, training_messages
from training import attention, lora, norms, tokens
from training.best import BestStep
from training.checkpoints import WITHOUT_EFFECT, ExportEngine, ResumeEngine, named_leaves
from training.errors import fail, tell_in_one_line
from training.loss import chunked_cross_entropy
from training.mixed_adamw import MixedAdamW, MixedAdamWFactory
from training.packing import best_fit_packs
from training.plan import PackSampler, RowSizes, RunPlan, SharedPacks
from training.preview import load_split
from training.processes import StepTotals, summed
from training.progress import Progress, StepRecord, lock_run
from training.schedule import SOAPSchedulerFactory
from training.settings import WHOLE_MODEL, SOAPDataConfig, SOAPTrainerConfig
from training.transfer import AsyncNumbers, to_device_unwaited

ROWS_FOR_ONE_PROCESS = 20_000  # tokenized in seconds by the tokenizer's own threads; more take `num_proc` processes

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
        content = {
            "rows": tokens.file_fingerprint(self.config.name_or_path / self.config.split),
            "prompts": prompts_hash(),
            "template": template,
            "vocabulary": len(self.trainer.tokenizer),
            "code": [tokens.file_fingerprint(Path(file)) for file in (__file__, tokens.__file__, prompts.__file__)],
        }
        return (*super().cache_path_args, content)


class SOAPDataFactory(SFTDataFactory):
    """`type: soap`: tokens with labels on the note alone, and loaders that deal packs of them out to the processes."""

    name = "soap"
    config: SOAPDataConfig
    default_source_cls = SOAPDataSource

    def __call__(self) -> tuple[DataLoader, DataLoader | None]:
        """Loaders for training and, where there is data for it, validation."""
        rows, held_out = self._tokenized(self.config.sources), self._tokenized(self.config.eval_sources)
        if self.config.train_eval_split[1]:
            rows, held_out = self.split_data(rows)
        return self.create_dataloader(rows), self.validation_loader(held_out) if held_out else None

    def _tokenized(self, source_configs: list[DataSourceConfig]) -> Dataset | None:
        """The rows of all sources, from the cache. The first process builds it, and one run at a time."""
        if not source_configs:
            return None
        sources = self._get_data_sources(source_configs)
        path = self.cache_path(sources)
        if self.is_main_process_by_path:
            with (self.config.cache_dir / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    self._build(sources, path)
        dist.barrier()
        self.trainer._set_seeds(self.trainer.config.seed)  # whether the cache was there or not
        return load_from_disk(str(path))

    def _build(self, sources: list[DataSource], path: Path) -> None:
        if self.config.fail_on_missing_cache:
            raise FileNotFoundError(f"the token cache {path} does not exist, and fail_on_missing_cache is set")
        draft = path.with_suffix(".incomplete")
        self.load(sources).save_to_disk(draft)
        draft.rename(path)

    def process(self, dataset: DatasetType) -> DatasetType:
        try:
            return dataset.map(
                self._encode,
                batched=True,
                remove_columns=dataset.column_names,
                num_proc=self.config.num_proc if len(dataset) > ROWS_FOR_ONE_PROCESS else None,
                desc="Tokenizing",
            )
        except tokens.TemplateError as error:
            fail(str(error), WHOLE_MODEL)

    def _encode(self, rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        examples = tokens.encode_examples(self.tokenizer, rows["messages"])
        return {**examples, "attention_mask": [[1] * len(ids) for ids in examples["input_ids"]]}

    def create_dataloader(self, dataset: DatasetType) -> DataLoader:
        """This process's packs of the run, epoch after epoch."""
        trainer, config = self.trainer, self.trainer.config
        plan = RunPlan(
            RowSizes.of(dataset),
            self.config.max_length if self.config.best_fit_packing else None,
            seed=config.seed,
            epochs=config.epochs,
            accumulation=config.gradient_accumulation_steps,
            processes=trainer.world_size,
            train_iters=config.train_iters,
            min_iterations=config.min_iterations,
        )
        return self._loader(dataset, PackSampler(plan, trainer.global_rank), self.config.dl_num_workers)

    def validation_loader(self, rows: DatasetType) -> DataLoader:
        """This process's share of the validation packs, in the same order each time.

        Without workers: they would be forked in the middle of training, where another thread may hold a lock.
        """
        lengths = RowSizes.of(rows).tokens
        packs = [[row] for row in range(len(rows))]
        if self.config.best_fit_packing:
            packs = best_fit_packs(lengths, self.config.max_length)
        return self._loader(rows, SharedPacks(packs, self.trainer.global_rank, self.trainer.world_size), workers=0)

    def _loader(self, rows: DatasetType, sampler: PackSampler | SharedPacks, workers: int) -> DataLoader:
        pad = DataCollatorForCausalLM(self.tokenizer, self.config)
        return DataLoader(
            rows.remove_columns("attention_mask"),
            batch_sampler=sampler,
            collate_fn=lambda pack: pad([join_rows(pack)]),
            num_workers=workers,
            persistent_workers=workers > 0,  # arctic_training sets it without workers, too, which PyTorch refuses
            generator=torch.Generator(),  # of the workers' seeds, which would be drawn from those of dropout
        )


def join_rows(rows: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    """Samples end to end as one pack; positions count from 0 in each, which is how attention tells them apart."""
    if "position_ids" in rows[0]:  # arctic_training's `pack_samples` has joined them
        return rows[0]
    lengths = [len(row["input_ids"]) for row in rows]
    joined = {key: list(chain.from_iterable(row[key] for row in rows)) for key in ("input_ids", "labels")}
    positions = list(chain.from_iterable(range(length) for length in lengths))
    return {**joined, "position_ids": positions, "packed_sample_seqlens": lengths}


class SOAPTrainer(SFTTrainer):
    """`type: soap`: SFTTrainer with the same loss at a fraction of the work, exact resume, and progress to look at."""

    name = "soap"
    config: SOAPTrainerConfig
    data_factory: SOAPDataFactory
    checkpoint_engine: Union[ExportEngine, ResumeEngine, HFCheckpointEngine, DSCheckpointEngine]  # noqa: UP007
    optimizer_factory: Union[FusedAdamOptimizerFactory, CPUAdamOptimizerFactory, MixedAdamWFactory]  # noqa: UP007
    scheduler_factory: Union[SOAPSchedulerFactory, HFSchedulerFactory]  # noqa: UP007
    fail = staticmethod(fail)
    gas_boundary = False  # with it, arctic_training's Ray launcher would report figures that only its own `epoch` has

    def __init__(self, config: SOAPTrainerConfig, mode: str = "train") -> None:
        """`mode` "process-data" ends when the packs are in the cache, and leaves `train` impossible."""
        self.best = BestStep()
        if mode == "train":
            self._claim_folders(config)
        try:
            tokens.load_tokenizer(config.tokenizer.name_or_path)  # before work on the data
        except tokens.TemplateError as error:
            fail(str(error), WHOLE_MODEL)
        attention.register_varlen()
        wanted = config.model.attn_implementation
        config.model.attn_implementation, reason = attention.supported_attention(wanted, config.model.dtype.value)
        if reason and config.global_rank == 0:
            print(f"attention: {config.model.attn_implementation} instead of {wanted}, because {reason}")
        super().__init__(config, mode)
        if config.global_rank == 0:
            self._print_data()
        if mode != "train":
            return
        norms.use_native(self.model_unwrapped)
        if config.model.peft_config and config.fused_lora and not config.zero_3_enabled:
            lora.fuse(self.model_unwrapped)
        self._set_up_optimizer()

    def _set_up_optimizer(self) -> None:
        """Leave to DeepSpeed what it does well, and take over clipping where its norm could not be logged."""
        config, self.max_norm = self.config, self.config.deepspeed["gradient_clipping"]
        wrapped = self.model.zero_optimization() or self.model.fp16_enabled() or self.model.bfloat16_enabled()
        self.clips_itself = not wrapped and not isinstance(self.optimizer, MixedAdamW)
        if not wrapped:
            self.model.gradient_clipping = lambda: 0.0  # MixedAdamW clips, or `step`
        if isinstance(self.optimizer, MixedAdamW):
            self.attach_optimizer()
            self.model.enable_backward_allreduce = False  # MixedAdamW reduces gradients during the backward pass
            self.model.zero_grad = lambda: None  # and has taken them all
        elif config.global_rank == 0 and config.accumulates_in_bf16:
            print("accumulation: gradients are summed in bfloat16; `optimizer.type: mixed_adamw` sums them in float32")
        if checker := getattr(self.model.optimizer, "overflow_checker", None):
            # It reads every gradient and waits for the GPU each time, 310 times a step. DeepSpeed leaves a step out
            # because of the gradients' norm, too, which an infinity anywhere makes infinite.
            checker.has_overflow = lambda *_, **__: False
        if self.world_size == 1 and not self.model.zero_optimization():
            self.model.enable_backward_allreduce = False  # with itself: it would copy all gradients for nothing

    def attach_optimizer(self) -> None:
        """Give MixedAdamW the weights, which DeepSpeed has put on the device."""
        self.optimizer.attach(self.config.gradient_accumulation_steps, self.config.deepspeed["gradient_clipping"])

    def _claim_folders(self, config: SOAPTrainerConfig) -> None:
        if config.kill_switch_path.exists():
            fail(f"the kill switch {config.kill_switch_path} exists, so the run would end at once", "remove it")
        if config.global_rank == 0:
            self.lock = lock_run(config.train_log_metrics_path)
            for checkpoint in config.checkpoint:  # what cannot be written shall show now, not at the end
                checkpoint.output_dir.mkdir(parents=True, exist_ok=True)

    def _print_data(self) -> None:
        config, data, plan = self.config, self.config.data, self.plan
        rows = 0
        for source in data.sources:
            count = len(SOAPDataSource(self.train_dataloader, source).rows)
            wanted = int(count * source.sample_ratio) if source.sample_ratio else source.sample_count or count
            rows += min(count, wanted)
        kept = len(self.train_dataloader.dataset)
        if data.pack_samples:
            kept = sum(map(len, self.train_dataloader.dataset["packed_sample_seqlens"]))
        # With these, rows are missing from the packs, or in them twice, for another reason than their length.
        moved = config.min_iterations or data.train_eval_split[1] or data.drop_last or data.repeat_to_pack_max_length
        dropped = "" if moved else f" {rows - kept:,} longer than max_length {data.max_length:,} and left out,"
        steps = f"{self.training_horizon:,} steps in {plan.epochs} epochs"
        print(f"data: {rows:,} rows,{dropped} {plan.packs_of_an_epoch:,} packs; {steps}")
        if plan.left_over:
            print(f"data: the last {plan.left_over} packs are too few for another step of {plan.packs_per_step}")
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
        options = {"use_cache": False}
        if self.config.model.attn_implementation == attention.VARLEN:
            batch["cu_seq_lens_q"], options["max_length_q"] = attention.sample_bounds(batch["position_ids"])
        batch = to_device_unwaited(batch, self.device)
        targets = batch.pop("targets")
        return chunked_cross_entropy(self.model(**batch, **options).logits[0], targets)

    # --- loop ------------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> RunPlan:
        return self.train_dataloader.batch_sampler.plan

    @property
    def training_horizon(self) -> int:
        """Optimizer steps of the whole run: the length of the learning-rate schedule."""
        plan = self.plan
        if not plan.steps:
            fail(
                f"{plan.total_packs} packs in {plan.epochs} epochs are too few for one step of {plan.packs_per_step}",
                "lower `gradient_accumulation_steps`",
            )
        return plan.steps

    @property
    def epochs(self) -> range:
        """The epochs still to run."""
        return range(self.epoch_idx, self.plan.epochs)

    def pre_train_callback(self) -> None:
        self.micro_batch = self.global_step * self.config.gradient_accumulation_steps  # the next one
        self.epoch_idx = self.plan.epoch_of(self.micro_batch)
        self.loss_sum = torch.zeros((), device=self.device)  # of the step under way, over this process's tokens
        self.unlogged: tuple[StepRecord, StepTotals, AsyncNumbers] | None = None  # the step before
        self.no_improvement = self.stop_seen = False
        self.saved_at: dict[CheckpointEngine, int] = {}
        self.progress = None
        if self.global_rank == 0:
            log = self.config.train_log_metrics_path
            self.progress = Progress(log, self.training_horizon, self.global_step)
        gc.collect()
        gc.freeze()  # a full collection costs 0.4 s with torch and transformers loaded; what is here now stays anyway

    def epoch(self) -> None:
        """One pass over the rows, in packs and an order of its own; a resumed run begins where it was."""
        self.epoch_finished = False
        self.train_dataloader.batch_sampler.start(self.epoch_idx, self.micro_batch)
        for batch in self.train_dataloader:
            if self.at_step_start and self.need_early_exit():
                self.early_stop = True
                return
            self.step(batch)
            if not self.at_step_start:
                continue
            last = self.global_step == self.training_horizon
            if self.config.eval_interval and (last or self.global_step % self.config.eval_interval == 0):
                self.evaluate()
            self.checkpoint()
        self.epoch_finished = True

    @property
    def at_step_start(self) -> bool:
        return self.micro_batch % self.config.gradient_accumulation_steps == 0

    def need_early_exit(self) -> bool:
        """All processes alike, or those that go on would wait for ever: one may see the kill switch before another."""
        config, now, now_this_run = self.config, self.global_step, self.global_step_this_run
        if self.unlogged:
            self.stop_seen |= self.unlogged[1].read()[1]
        reasons = {
            f"reached exit_iteration_this_run of {now_this_run}": 0 < config.exit_iteration_this_run == now_this_run,
            f"reached exit_iteration of {now}": 0 < config.exit_iteration == now,
            f"detected kill switch {config.kill_switch_path}": self.stop_seen,
            f"has not improved validation {config.early_stopping_patience} times in a row": self.no_improvement,
        }
        self.early_stop_reason = next((reason for reason, holds in reasons.items() if holds), "")
        return bool(self.early_stop_reason)

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """One micro-batch; with the last one of a step, the optimizer's update.

        Every labelled token of a step has the same weight, whichever pack, micro-batch and process it is in.
        """
        config, step = self.config, self.global_step
        self.model.train()
        # Dropout follows from seed, micro-batch and process, so a resumed run repeats it on any device.
        place = (config.seed, self.micro_batch, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        labelled = int((batch["labels"][0, 1:] != tokens.IGNORE_INDEX).sum())
        with deepspeed.runtime.engine.autocast_if_enabled(self.model):
            loss = self.loss(batch)
        self.loss_sum += loss.detach() * labelled
        self.micro_batch += 1
        if self.at_step_start:  # of the next one
            totals = StepTotals(self.loss_sum, config.kill_switch_path.exists())
        if isinstance(self.optimizer, MixedAdamW):
            first = (self.micro_batch - 1) % config.gradient_accumulation_steps == 0
            self.optimizer.expect(first, last=self.at_step_start)
        # DeepSpeed divides by accumulated micro-batches, and the optimizer by processes.
        self.backward(loss * (labelled * self.plan.packs_per_step / self.plan.labelled(step)))
        if not self.at_step_start:
            self.model.step()
            return
        rate = self.scheduler.get_last_lr()[0]
        norm = self._clip() if self.clips_itself else None
        self.model.step()
        self.global_step = self.model.global_steps
        self.global_step_this_run = self.global_step - self.global_step_at_start_this_run
        norm = AsyncNumbers(self._gradient_norm() if norm is None else norm)
        self.log_step()
        self.loss_sum = torch.zeros_like(self.loss_sum)
        record = StepRecord(
            self.global_step,
            self.epoch_idx,
            rate,
            self.plan.tokens(step),
            self.plan.labelled(step),
            time.perf_counter(),
        )
        self.unlogged = record, totals, norm

    def _clip(self) -> torch.Tensor:
        """Clip the gradients where neither DeepSpeed nor MixedAdamW does; return their norm before that."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.max_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        return norm

    def _gradient_norm(self) -> torch.Tensor:
        """Of the step just made, before clipping."""
        if isinstance(self.optimizer, MixedAdamW):
            return self.optimizer.gradient_norm
        norm = self.model.get_global_grad_norm()
        return torch.zeros(()) if norm is None else torch.as_tensor(norm)

    def log_step(self) -> None:
        """Log the step before the one that is queued now: its numbers are there, and the GPU need not wait."""
        if self.unlogged is None:
            return
        (record, totals, norm), self.unlogged = self.unlogged, None
        loss_sum, stop = totals.read()
        self.stop_seen |= stop
        if self.progress:
            self.progress.step(record, loss_sum / record.labelled, norm.read()[0])

    def evaluate(self) -> None:
        """Validation loss: mean over all labelled tokens of the validation data, of all processes."""
        self.log_step()
        self.model.eval()
        loss_sum = labelled = 0.0
        with torch.no_grad():
            for number, batch in enumerate(self.eval_dataloader):
                count = int((batch["labels"][:, 1:] != tokens.IGNORE_INDEX).sum())
                loss = self.loss(batch)
                if self.eval_dataloader.batch_sampler.counts(number):
                    loss_sum, labelled = loss_sum + loss.item() * count, labelled + count
        loss_sum, labelled = summed([loss_sum, labelled], self.device)
        improved = self.best.improves(self.global_step, loss_sum / labelled)
        if self.progress:
            self.progress.validation(self.global_step, loss_sum / labelled, improved)
        patience = self.config.early_stopping_patience
        self.no_improvement = 0 < patience <= self.best.without_improvement
        if improved and self.config.keep_best:
            self._export_best()

    def post_train_callback(self) -> None:
        self.log_step()
        if self.progress:
            self.progress.close()
        if not self.training_finished:
            return
        if self.keeps_best:
            self.best.keep_only_best(self._remove_export)
            for engine in self._best_exports():
                self.saved_at[engine] = self.global_step
                if self.global_rank == 0:
                    path = engine.prefer(self.best.step)
                    print(f"best validation loss: {self.best.loss:.4f} at step {self.best.step}, exported to {path}")
        states = [engine for engine in self.checkpoint_engines if isinstance(engine, ResumeEngine)]
        exported = any(step == self.global_step for engine, step in self.saved_at.items() if engine not in states)
        for engine in states:
            if exported and not (self.early_stop and not self.no_improvement):
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
            "plan": str(RunPlan.version),
            "rows": ",".join(tokens.file_fingerprint(s.config.name_or_path / s.config.split)[:12] for s in sources),
        }

    def restore(self, client_state: dict[str, Any]) -> None:
        """Take up the counters of a resume state."""
        self.global_step = self.model.global_steps
        self.best = BestStep.from_state(client_state["best"])
        if self.keeps_best and any(not engine.directory(self.best.step).exists() for engine in self._best_exports()):
            self.best = BestStep()  # the next validation exports
        if self.global_rank == 0:
            print(f"resumed at step {self.global_step} of {self.training_horizon}")

    @property
    def keeps_best(self) -> bool:
        """Whether the exported model is the one with the best validation loss, and there is one."""
        return self.config.keep_best and self.best.step is not None

    def _best_exports(self) -> list[ExportEngine]:
        """The engines that export the model at the end: of the best step, where steps are validated."""
        exports = [engine for engine in self.checkpoint_engines if isinstance(engine, ExportEngine)]
        return [engine for engine in exports if engine.config.enabled and engine.config.save_end_of_training]

    def _export_best(self) -> None:
        for engine in self._best_exports():
            engine.save(self.model)
            self.saved_at[engine] = self.global_step
        self.best.note_export(self._remove_export)

    def _remove_export(self, step: int) -> None:
        """Remove the export of a step that is not the best any more, but for one that the YAML asks for."""
        for engine in self._best_exports():
            every, by_epoch = engine.config.save_every_n_steps, engine.config.save_every_n_epochs
            if not by_epoch and not (every and step % every == 0):
                engine.remove(step)

    def checkpoint(self) -> None:
        for engine in self.checkpoint_engines:
            if not self._due(engine) or self.saved_at.get(engine) == self.global_step:
                continue
            self.log_step()
            engine.save(self.model)
            self.saved_at[engine] = self.global_step
            if isinstance(engine, ResumeEngine):
                self.best.keep_only_best(self._remove_export)
            elif self.early_stop and self.config.keep_best and engine in self._best_exports():
                self.best.note_stopgap(self.global_step)

    def _due(self, engine: CheckpointEngine) -> bool:
        """Like CheckpointEngine.do_checkpoint, but told after the step is counted: step N is saved as step N."""
        config, steps = engine.config, self.global_step
        in_epoch, stopped = not self.epoch_finished, self.early_stop and not self.no_improvement
        resumable = isinstance(engine, ResumeEngine) and (config.save_every_n_steps or config.save_every_n_epochs)
        best_is_exported = isinstance(engine, ExportEngine) and self.keeps_best
        return config.enabled and bool(
            (in_epoch and config.save_every_n_steps and steps and steps % config.save_every_n_steps == 0)
            or (
                not in_epoch
                and not self.training_finished
                and config.save_every_n_epochs
                and (self.epoch_idx + 1) % config.save_every_n_epochs == 0
            )
            or (self.training_finished and config.save_end_of_training and not best_is_exported)
            or (stopped and self.training_finished and steps and resumable)
        )
