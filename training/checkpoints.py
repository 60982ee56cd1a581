"""Two kinds of checkpoint: the finished model for evaluation, and the state from which a killed run resumes.

Both get their final name only when they are complete.
"""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

import deepspeed.comm as dist
import torch
from arctic_training.checkpoint.ds_engine import DSCheckpointEngine
from arctic_training.checkpoint.hf_engine import HFCheckpointEngine

from training.mixed_adamw import MixedAdamW

COMPLETE = "complete.json"  # written last; holds the run settings that must match on resume
_STATE = re.compile(r"epoch_\d+_global_step_\d+$")  # the folder of a state
# Settings that may change when a run resumes: they affect speed, memory, locations or validation only.
MAY_CHANGE_ON_RESUME = {
    *("attn_implementation", "disable_activation_checkpoint", "eval_sources", "num_proc", "dl_num_workers"),
    *("cache_dir", "cache_fs_type", "use_data_cache", "cache_processed_data", "fail_on_missing_cache"),
}


def named_leaves(value: object, name: str = "") -> dict[str, str]:
    """Flatten nested dicts and lists: dotted names, such as `sources.0.split`, with the values as text."""
    if not isinstance(value, dict | list):
        return {name: str(value)}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {leaf: text for key, part in pairs for leaf, text in named_leaves(part, f"{name}.{key}".strip(".")).items()}


class ExportEngine(HFCheckpointEngine):
    """`type: export`: save model or adapter, and tokenizer, in `output_dir/global_step_N` for transformers and vLLM."""

    name = "export"
    do_checkpoint = False  # SOAPTrainer decides; otherwise the Ray launcher would upload incomplete folders

    def directory(self, step: int | None) -> Path:
        return self.config.output_dir / f"global_step_{step}"

    @property
    def final_dir(self) -> Path:
        return self.directory(self.trainer.global_step)

    @property
    def checkpoint_dir(self) -> Path:
        """Return the folder that the parent class writes to; eval.py ignores folders of this name."""
        path = self.final_dir.with_suffix(".incomplete")
        path.mkdir(parents=True, exist_ok=True)
        return path

    def remove(self, step: int) -> None:
        """Remove the export of a step. If killed midway, leave only a folder that eval.py ignores."""
        directory = self.directory(step)
        if self.global_rank == 0 and directory.exists():
            draft = directory.with_suffix(".incomplete")
            directory.rename(draft)
            shutil.rmtree(draft)

    def mark_newest(self, step: int) -> Path:
        """Make the export of a step the newest one, which eval.py uses; return its folder."""
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
    """`type: resume`: weights, optimizer and schedule; each saved state replaces the previous one.

    A state exists only while a run is unfinished: SOAPTrainer removes it once the finished model is exported.
    """

    name = "resume"
    do_checkpoint = False

    @property
    def client_state(self) -> dict[str, Any]:
        """Return the state that DeepSpeed does not save. Random states are not needed: see SOAPTrainer.step."""
        return {"best": self.trainer.best.as_state()}

    @property
    def newest(self) -> Path | None:
        """Return the folder of the newest complete state; a copy under another name does not count."""
        states = (path.parent for path in self.config.output_dir.glob(f"*/{COMPLETE}"))
        own = filter(lambda state: _STATE.match(state.name), states)
        return max(own, key=lambda state: int(state.name.rpartition("_")[2]), default=None)

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
        self._check_same_run(state)
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
        except Exception as error:  # torch raises many types for a missing or truncated file
            self._fail_damaged(state, error)
        self.trainer.restore(client_state)

    def clear(self) -> None:
        """Remove this engine's own files; leave all other files in the folder."""
        dist.barrier()
        if self.global_rank > 0:
            return
        folder = self.config.output_dir
        for state in filter(lambda path: _STATE.match(path.name), list(folder.iterdir())):
            (state / COMPLETE).unlink(missing_ok=True)  # first: a partly removed state must not be resumed
            shutil.rmtree(state)
        for file in (folder / "latest", *folder.glob("zero_to_*.py")):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder has other files
            folder.rmdir()

    def _optimizer_file(self, state: Path) -> Path:
        return state / f"mixed_adamw_process_{self.global_rank}.pt"

    def _check_same_run(self, state: Path) -> None:
        try:
            saved = json.loads((state / COMPLETE).read_text())
        except ValueError as error:
            self._fail_damaged(state, error)
        now = self.trainer.identity
        changed = [key for key in [*now, *saved] if saved.get(key) != now.get(key)]
        if changed:
            was, is_now = (settings.get(changed[0], "not set") for settings in (saved, now))
            self.trainer.fail(
                f"{state.parent} holds an unfinished run with a different {changed[0]} ({was}, now {is_now})",
                "remove that folder to start over, or undo the change to resume",
            )

    def _fail_damaged(self, state: Path, error: Exception) -> NoReturn:
        self.trainer.fail(f"{state} is damaged ({error})", f"remove {state.parent} to start over", one_process=True)
