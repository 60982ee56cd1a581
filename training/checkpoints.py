"""Two kinds of checkpoint: the finished model for evaluation, and the state from which a killed run goes on.

Both appear in one step: whatever stands under its final name is complete.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import deepspeed.comm as dist
import torch
from arctic_training.checkpoint.ds_engine import DSCheckpointEngine
from arctic_training.checkpoint.hf_engine import HFCheckpointEngine

from training.mixed_adamw import MixedAdamW

COMPLETE = "complete.json"  # written last into a resume state; holds what the state may be resumed with
# Settings that may change when a run goes on: of speed, memory, places, and of validation.
WITHOUT_EFFECT = {
    *("attn_implementation", "disable_activation_checkpoint", "eval_sources", "num_proc", "dl_num_workers"),
    *("cache_dir", "cache_fs_type", "use_data_cache", "cache_processed_data", "fail_on_missing_cache"),
}


def named_leaves(value: object, name: str = "") -> dict[str, str]:
    """What nested dicts and lists hold, as text, by dotted names as in `sources.0.split`."""
    if not isinstance(value, dict | list):
        return {name: str(value)}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {leaf: text for key, part in pairs for leaf, text in named_leaves(part, f"{name}.{key}".strip(".")).items()}


class ExportEngine(HFCheckpointEngine):
    """`type: export`: model or adapter, and tokenizer, in `output_dir/global_step_N`, for transformers and vLLM."""

    name = "export"
    do_checkpoint = False  # SOAPTrainer decides; with it, the Ray launcher would upload folders that are not complete

    def directory(self, step: int | None) -> Path:
        return self.config.output_dir / f"global_step_{step}"

    @property
    def final_dir(self) -> Path:
        return self.directory(self.trainer.global_step)

    @property
    def checkpoint_dir(self) -> Path:
        """Where the parent class writes: a name that eval.py does not take for a checkpoint."""
        path = self.final_dir.with_suffix(".incomplete")
        path.mkdir(parents=True, exist_ok=True)
        return path

    def remove(self, step: int) -> None:
        """Remove the export of a step. What a kill leaves of it has a name that eval.py does not take."""
        directory = self.directory(step)
        if self.global_rank == 0 and directory.exists():
            draft = directory.with_suffix(".incomplete")
            directory.rename(draft)
            shutil.rmtree(draft)

    def prefer(self, step: int) -> Path:
        """Make the export of a step the one that was written last, which eval.py takes; return its folder."""
        for config in self.directory(step).glob("*config.json"):
            config.touch()
        return self.directory(step)

    def save(self, model) -> None:
        super().save(model)
        if self.trainer.config.zero_3_enabled and self.trainer.config.model.peft_config is None:
            self.trainer.model_unwrapped.generation_config.save_pretrained(self.checkpoint_dir)
        dist.barrier()  # every rank writes its tokenizer
        if self.global_rank == 0:
            shutil.rmtree(self.final_dir, ignore_errors=True)
            self.checkpoint_dir.rename(self.final_dir)
        dist.barrier()


class ResumeEngine(DSCheckpointEngine):
    """`type: resume`: weights, optimizer, schedule and random states; the newest one replaces the older ones.

    It is there only while a run is unfinished: SOAPTrainer clears it when the finished model has been exported.
    """

    name = "resume"
    do_checkpoint = False

    @property
    def client_state(self) -> dict[str, Any]:
        """The counters that DeepSpeed does not have. Random states need not be saved: see SOAPTrainer.step."""
        return {"best": self.trainer.best.as_state()}

    @property
    def newest(self) -> Path | None:
        states = self.config.output_dir.glob(f"*/{COMPLETE}")
        return max((path.parent for path in states), key=lambda path: int(path.name.rpartition("_")[2]), default=None)

    @property
    def latest_checkpoint_exists(self) -> bool:
        return self.newest is not None

    def save(self, model) -> None:
        previous = self.newest
        model.save_checkpoint(
            self.checkpoint_dir,
            tag=self.checkpoint_tag,
            client_state=self.client_state,
            exclude_frozen_parameters=self.trainer.config.model.peft_config is not None,
        )
        state = self.checkpoint_dir / self.checkpoint_tag
        if isinstance(model.optimizer, MixedAdamW):
            torch.save(model.optimizer.process_state(), self._optimizer_file(state))
        dist.barrier()
        if self.global_rank == 0:
            draft = state / f"{COMPLETE}.new"
            draft.write_text(json.dumps(self.trainer.identity, indent=2))
            draft.rename(state / COMPLETE)
            if previous not in (None, state):
                shutil.rmtree(previous)
        dist.barrier()

    def load(self, model) -> None:
        state = self.newest
        if state is None:
            return
        self._refuse_another_run(state)
        try:
            _, client_state = model.load_checkpoint(
                self.config.output_dir,
                tag=state.name,
                load_module_strict=self.trainer.config.model.peft_config is None,
            )
            if isinstance(model.optimizer, MixedAdamW):
                self.trainer.attach_optimizer()
                part = torch.load(self._optimizer_file(state), map_location="cpu", weights_only=True)
                model.optimizer.load_process_state(part)
        except Exception as error:  # a file that is missing or cut off makes torch raise anything
            self._fail_damaged(state, error)
        self.trainer.restore(client_state)

    def clear(self) -> None:
        """Remove what this engine wrote, and nothing else that may stand in the folder."""
        dist.barrier()
        if self.global_rank > 0:
            return
        folder = self.config.output_dir
        for state in folder.glob("epoch_*_global_step_*"):
            (state / COMPLETE).unlink(missing_ok=True)  # first: half a state is none to go on from
            shutil.rmtree(state)
        for file in (folder / "latest", *folder.glob("zero_to_*.py")):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is there
            folder.rmdir()

    def _optimizer_file(self, state: Path) -> Path:
        return state / f"mixed_adamw_process_{self.global_rank}.pt"

    def _refuse_another_run(self, state: Path) -> None:
        try:
            saved = json.loads((state / COMPLETE).read_text())
        except ValueError as error:
            self._fail_damaged(state, error)
        now = self.trainer.identity
        changed = [key for key in [*now, *saved] if saved.get(key) != now.get(key)]
        if changed:
            was, is_now = (settings.get(changed[0], "not set") for settings in (saved, now))
            self.trainer.fail(
                f"{state.parent} holds an unfinished run with another {changed[0]} ({was}, now {is_now})",
                "remove that folder to start anew, or undo the change to go on",
            )

    def _fail_damaged(self, state: Path, error: Exception) -> NoReturn:
        self.trainer.fail(f"{state} is damaged ({error})", f"remove {state.parent} to start anew", alone=True)
