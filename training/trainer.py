"""The trainer: SFTTrainer's loss at lower cost, exact resume, export of the best step, and visible progress."""

import gc
import time
from typing import Any, Union

import deepspeed
import numpy as np
import torch
from arctic_training.checkpoint.ds_engine import DSCheckpointEngine
from arctic_training.checkpoint.engine import CheckpointEngine
from arctic_training.checkpoint.hf_engine import HFCheckpointEngine
from arctic_training.optimizer.adam_factory import CPUAdamOptimizerFactory, FusedAdamOptimizerFactory
from arctic_training.scheduler.hf_factory import HFSchedulerFactory
from arctic_training.trainer.sft_trainer import SFTTrainer
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from prompts import prompts_hash
from training import attention, layers, lora, norms, tokens
from training.best import BestStep
from training.checkpoints import MAY_CHANGE_ON_RESUME, ExportEngine, ResumeEngine, named_leaves
from training.data import SOAPDataFactory, load_rows
from training.errors import fail
from training.forward import kept_logits
from training.loss import chunked_cross_entropy
from training.mixed_adamw import MixedAdamW, MixedAdamWFactory
from training.packing_check import check_model
from training.plan import RunPlan
from training.processes import StepTotals, sum_over_processes
from training.progress import Progress, StepRecord, lock_run
from training.schedule import SOAPSchedulerFactory
from training.settings import SOAPTrainerConfig
from training.tokenizer import SOAPTokenizerFactory
from training.transfer import AsyncNumbers


class SOAPTrainer(SFTTrainer):
    """`type: soap`: SFTTrainer with the same loss at lower cost, exact resume, and visible progress."""

    name = "soap"
    config: SOAPTrainerConfig
    data_factory: SOAPDataFactory
    checkpoint_engine: Union[ExportEngine, ResumeEngine, HFCheckpointEngine, DSCheckpointEngine]  # noqa: UP007
    optimizer_factory: Union[FusedAdamOptimizerFactory, CPUAdamOptimizerFactory, MixedAdamWFactory]  # noqa: UP007
    scheduler_factory: Union[SOAPSchedulerFactory, HFSchedulerFactory]  # noqa: UP007
    tokenizer_factory: SOAPTokenizerFactory
    fail = staticmethod(fail)
    gas_boundary = False  # if true, arctic_training's Ray launcher reports metrics that only its own `epoch` sets

    def __init__(self, config: SOAPTrainerConfig, mode: str = "train") -> None:
        """Set up a run. With `mode` "process-data", stop once the token cache is filled; `train` is then impossible."""
        self.best = BestStep()
        if mode == "train":
            self._claim_folders(config)
        attention.register_varlen()
        self._choose_implementations(config)
        super().__init__(config, mode)
        if config.global_rank == 0:
            self._print_data()
        if mode != "train":
            return
        norms.use_native(self.model_unwrapped)
        self._check_model()
        if config.model.peft_config and config.fused_lora and not config.zero_3_enabled:
            lora.fuse(self.model_unwrapped)
        self._set_up_optimizer()

    def _set_up_optimizer(self) -> None:
        """Turn off redundant work in DeepSpeed, and take over clipping when its norm could not be logged."""
        config, self.max_norm = self.config, self.config.deepspeed["gradient_clipping"]
        wrapped = self.model.zero_optimization() or self.model.fp16_enabled() or self.model.bfloat16_enabled()
        self.clips_itself = not wrapped and not isinstance(self.optimizer, MixedAdamW)
        if not wrapped:
            self.model.gradient_clipping = lambda: 0.0  # MixedAdamW or `step` clips
        if isinstance(self.optimizer, MixedAdamW):
            self.attach_optimizer()
            self.model.enable_backward_allreduce = False  # MixedAdamW reduces gradients during the backward pass
            self.model.zero_grad = lambda: None  # and has already cleared them
        elif config.global_rank == 0 and config.accumulates_in_bf16:
            print("accumulation: gradients are summed in bfloat16; `optimizer.type: mixed_adamw` sums them in float32")
        if checker := getattr(self.model.optimizer, "overflow_checker", None):
            # It reads every gradient and waits for the GPU each time, 310 times per step. DeepSpeed also skips a step
            # with an infinite gradient norm, which any infinity causes.
            checker.has_overflow = lambda *_, **__: False
        if self.world_size == 1 and not self.model.zero_optimization():
            self.model.enable_backward_allreduce = False  # it would only copy all gradients

    def _choose_implementations(self, config: SOAPTrainerConfig) -> None:
        """Replace attention and layers that this machine or model does not support, and print the change."""
        model, hf_config = config.model, AutoConfig.from_pretrained(tokens.model_files(config.model.name_or_path))
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf_config), None)
        attn = attention.supported_attention(model.attn_implementation, model.dtype.value, model_class)
        for setting, part, (used, reason) in (
            ("attn_implementation", "attention", attn),
            ("type", "layers", layers.supported_layers(model.type, hf_config.model_type)),
        ):
            if reason and config.global_rank == 0:
                print(f"{part}: {used} instead of {getattr(model, setting)}, because {reason}")
            setattr(model, setting, used)

    def _check_model(self) -> None:
        """Check on all processes that the model separates packed samples; with ZeRO-3 each holds a shard of it."""
        config, pack = self.config, self.train_dataloader.dataset[0]
        self.model.eval()
        check_model(
            lambda batch: kept_logits(self.model, batch, config.model.attn_implementation, self.device)[0],
            pack["input_ids"],
            self.model_unwrapped.config.model_type,
            packed=config.data.best_fit_packing or config.data.pack_samples,
        )

    def attach_optimizer(self) -> None:
        """Attach MixedAdamW to the weights, after DeepSpeed has moved them to the device."""
        self.optimizer.attach(self.config.gradient_accumulation_steps, self.config.deepspeed["gradient_clipping"])

    def _claim_folders(self, config: SOAPTrainerConfig) -> None:
        if config.kill_switch_path.exists():
            fail(f"the kill switch {config.kill_switch_path} exists, so the run would end at once", "remove it")
        if config.global_rank == 0:
            self.lock = lock_run(config.train_log_metrics_path)
            for checkpoint in config.checkpoint:  # fail now, not at the end, if a folder cannot be written
                checkpoint.output_dir.mkdir(parents=True, exist_ok=True)

    def _print_data(self) -> None:
        config, data, plan = self.config, self.config.data, self.plan
        rows = 0
        for source in data.sources:
            count = len(load_rows(source))
            wanted = int(count * source.sample_ratio) if source.sample_ratio else source.sample_count or count
            rows += min(count, wanted)
        kept = len(self.train_dataloader.dataset)
        if data.pack_samples:
            kept = sum(map(len, self.train_dataloader.dataset["packed_sample_seqlens"]))
        # With these settings, rows are dropped or repeated for reasons other than their length.
        moved = config.min_iterations or data.train_eval_split[1] or data.drop_last or data.repeat_to_pack_max_length
        dropped = "" if moved else f" {rows - kept:,} longer than max_length {data.max_length:,} and dropped,"
        steps = f"{self.training_horizon:,} steps in {plan.epochs} epochs"
        print(f"data: {rows:,} rows,{dropped} {plan.packs_per_epoch:,} packs; {steps}")
        if plan.left_over:
            print(f"data: the last {plan.left_over} packs are dropped: a step needs {plan.packs_per_step}")
        for checkpoint in config.checkpoint:
            every, by_epoch = checkpoint.save_every_n_steps, checkpoint.save_every_n_epochs
            if checkpoint.type == "resume" and every >= self.training_horizon and not by_epoch:
                print(f"resume: no state will be saved before the end, because save_every_n_steps is {every}")

    # --- loss ------------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean cross-entropy over the labelled tokens of one pack; equal to SFTTrainer's.

        `batch`: input_ids, labels and position_ids, each (1, tokens), on the CPU. The LM head runs only on positions
        whose next token is labelled, about a quarter of them. Attention runs within each sample.
        """
        batch.pop("packed_sample_seqlens", None)
        labels = batch.pop("labels")[0, 1:]
        positions = (labels != tokens.IGNORE_INDEX).nonzero().flatten()  # on the CPU, so without waiting for the GPU
        batch |= {"logits_to_keep": positions, "targets": labels[positions]}
        return chunked_cross_entropy(
            *kept_logits(self.model, batch, self.config.model.attn_implementation, self.device)
        )

    # --- loop ------------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> RunPlan:
        return self.train_dataloader.batch_sampler.plan

    @property
    def training_horizon(self) -> int:
        """Return the optimizer steps of the whole run, the length of the learning-rate schedule."""
        plan = self.plan
        if not plan.steps:
            fail(
                f"{plan.total_packs} packs in {plan.epochs} epochs are too few for one step of {plan.packs_per_step}",
                "lower `gradient_accumulation_steps`",
            )
        return plan.steps

    @property
    def epochs(self) -> range:
        """Return the remaining epochs."""
        return range(self.epoch_idx, self.plan.epochs)

    def pre_train_callback(self) -> None:
        self.micro_batch = self.global_step * self.config.gradient_accumulation_steps  # the next micro-batch
        self.epoch_idx = self.plan.epoch_of(self.micro_batch)
        self.loss_sum = torch.zeros((), device=self.device)  # of the current step, over this process's tokens
        self.unlogged: tuple[StepRecord, StepTotals, AsyncNumbers] | None = None  # the previous step
        self.no_improvement = self.stop_seen = False
        self.saved_at: dict[CheckpointEngine, int] = {}
        self.progress = None
        if self.global_rank == 0:
            log = self.config.train_log_metrics_path
            self.progress = Progress(log, self.training_horizon, self.global_step, self.config.report_to)
        gc.collect()
        gc.freeze()  # objects alive now stay alive; without this, a full collection takes 0.4 s

    def epoch(self) -> None:
        """Train for one epoch, in its own packs and order; a resumed run starts where it stopped."""
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
        """Return whether to stop, the same in all processes, even if only some have seen the kill switch yet."""
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
        """Train on one micro-batch; after the last one of a step, update the weights.

        Every labelled token of a step has the same weight, regardless of its pack, micro-batch and process.
        """
        config, step = self.config, self.global_step
        self.model.train()
        # Dropout depends only on seed, micro-batch and process, so a resumed run repeats it on any device.
        place = (config.seed, self.micro_batch, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        labelled = int((batch["labels"][0, 1:] != tokens.IGNORE_INDEX).sum())
        with deepspeed.runtime.engine.autocast_if_enabled(self.model):
            loss = self.loss(batch)
        self.loss_sum += loss.detach() * labelled
        self.micro_batch += 1
        if self.at_step_start:  # this was the step's last micro-batch
            totals = StepTotals(self.loss_sum, config.kill_switch_path.exists())
        if isinstance(self.optimizer, MixedAdamW):
            first = (self.micro_batch - 1) % config.gradient_accumulation_steps == 0
            self.optimizer.begin_backward(first, last=self.at_step_start)
        # DeepSpeed divides by the number of micro-batches, and the optimizer by the number of processes.
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
        """Clip the gradients if neither DeepSpeed nor MixedAdamW does; return their norm before clipping."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.max_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        return norm

    def _gradient_norm(self) -> torch.Tensor:
        """Return the gradient norm of the latest step, before clipping."""
        if isinstance(self.optimizer, MixedAdamW):
            return self.optimizer.gradient_norm
        norm = self.model.get_global_grad_norm()
        return torch.zeros(()) if norm is None else torch.as_tensor(norm)

    def log_step(self) -> None:
        """Log the previous step, whose results are ready, so that nothing waits for the step just queued."""
        if self.unlogged is None:
            return
        (record, totals, norm), self.unlogged = self.unlogged, None
        loss_sum, stop = totals.read()
        self.stop_seen |= stop
        if self.progress:
            self.progress.step(record, loss_sum / record.labelled, norm.read()[0])

    def evaluate(self) -> None:
        """Compute the validation loss, the mean over all labelled tokens of the validation data, on all processes."""
        self.log_step()
        self.model.eval()
        loss_sum = labelled = 0.0
        with torch.no_grad():
            for number, batch in enumerate(self.eval_dataloader):
                count = int((batch["labels"][:, 1:] != tokens.IGNORE_INDEX).sum())
                loss = self.loss(batch)
                if self.eval_dataloader.batch_sampler.counts(number):
                    loss_sum, labelled = loss_sum + loss.item() * count, labelled + count
        loss_sum, labelled = sum_over_processes([loss_sum, labelled], self.device)
        improved = self.best.record_validation(self.global_step, loss_sum / labelled)
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
                    path = engine.mark_newest(self.best.step)
                    print(f"best validation loss: {self.best.loss:.4f} at step {self.best.step}, exported to {path}")
        states = [engine for engine in self.checkpoint_engines if isinstance(engine, ResumeEngine)]
        exported = any(step == self.global_step for engine, step in self.saved_at.items() if engine not in states)
        for engine in states:
            if exported and not (self.early_stop and not self.no_improvement):
                engine.clear()
            elif self.global_rank == 0 and engine.newest:
                print(f"{engine.newest} is kept: rerun the same command to resume")

    # --- checkpoints -----------------------------------------------------------------------------------------------

    @property
    def identity(self) -> dict[str, str]:
        """Return the settings that must match a saved state for a run to resume from it; see ResumeEngine."""
        config = self.config
        parts = ("model", "tokenizer", "data", "optimizer", "scheduler")
        numbers = ("epochs", "train_iters", "min_iterations", "gradient_accumulation_steps", "seed", "world_size")
        return {
            **named_leaves({part: getattr(config, part).model_dump(exclude=MAY_CHANGE_ON_RESUME) for part in parts}),
            **{number: str(getattr(config, number)) for number in numbers},
            "ZeRO stage": str(config.deepspeed["zero_optimization"].get("stage", 0)),
            "gradient_clipping": str(config.deepspeed["gradient_clipping"]),
            "prompts": prompts_hash(),
            "plan": str(RunPlan.version),
            "rows": ",".join(
                tokens.file_fingerprint(source.name_or_path / source.split)[:12] for source in config.data.sources
            ),
        }

    def restore(self, client_state: dict[str, Any]) -> None:
        """Restore the counters of a resume state."""
        self.global_step = self.model.global_steps
        self.best = BestStep.from_state(client_state["best"])
        if self.keeps_best and any(not engine.directory(self.best.step).exists() for engine in self._best_exports()):
            self.best = BestStep()  # the next validation exports
        if self.global_rank == 0:
            print(f"resumed at step {self.global_step} of {self.training_horizon}")

    @property
    def keeps_best(self) -> bool:
        """Return whether to export the best step, and a validation has already found one."""
        return self.config.keep_best and self.best.step is not None

    def _best_exports(self) -> list[ExportEngine]:
        """Return the engines that export the final model, or the best step if the run validates."""
        exports = [engine for engine in self.checkpoint_engines if isinstance(engine, ExportEngine)]
        return [engine for engine in exports if engine.config.enabled and engine.config.save_end_of_training]

    def _export_best(self) -> None:
        for engine in self._best_exports():
            engine.save(self.model)
            self.saved_at[engine] = self.global_step
        self.best.record_export(self._remove_export)

    def _remove_export(self, step: int) -> None:
        """Remove the export of a step that is no longer the best, unless the YAML saves that step anyway."""
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
                self.best.record_interim_export(self.global_step)

    def _due(self, engine: CheckpointEngine) -> bool:
        """Like CheckpointEngine.do_checkpoint, but called after the step is counted: step N is saved as step N."""
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
