"""The runs that a call of eval.py asks for: their models, folders, and what must not change between two calls."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prompts
from evaluation import models
from evaluation.errors import UserError
from evaluation.server import without_credentials
from evaluation.store import DAMAGED, RunFolder

WRITING, JUDGING, SCORING = ("all", "generate"), ("all", "judge"), ("all", "judge", "report")


@dataclass
class Run:
    """One model, or model and adapter, to evaluate, with its open run folder."""

    name: str
    lora_path: str | None
    folder: RunFolder
    manifest: dict[str, Any]
    model: models.Model | None = None
    adapter: models.Adapter | None = None

    @property
    def merged(self) -> Path:
        """Folder for the copy of the weights to which the adapter is added; there while the notes are written."""
        return self.folder.path / ".merged"


def targets(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """(model, adapter) of each run: the model with each adapter, or, of several models, each, then the adapters."""
    adapted = [(args.model[0], path) for path in args.lora_path]
    return adapted if adapted and len(args.model) == 1 else [(name, None) for name in args.model] + adapted


def run_path(args: argparse.Namespace, name: str, lora_path: str | None) -> Path:
    """--output_dir, or, for several runs or without it, a folder named after model and adapter (below ./results)."""
    if args.output_dir and len(targets(args)) == 1:
        return Path(args.output_dir)
    label = "-".join(_label(part) for part in (name, lora_path) if part)
    return Path(args.output_dir or "results") / label


def _label(name: str) -> str:
    path = Path(name)
    return f"{path.parent.name}-{path.name}" if path.name.startswith("global_step_") else path.resolve().name


def open_run(args: argparse.Namespace, name: str, lora_path: str | None, identity: dict[str, dict]) -> Run:
    """Check model and adapter, lock the run folder and compare it with what it was made with. Raises UserError."""
    model, adapter = None, None
    if args.stage in WRITING:
        written_by: dict[str, Any] = {"model": f"served as {name}", "adapter": None}
        if not args.api_base:
            model = models.resolve_model(name, args.engine_args.get("load_format") != "dummy", tell)
            adapter = models.resolve_adapter(lora_path, model, tell) if lora_path else None
            written_by = {"model": model.fingerprint, "adapter": adapter and adapter.fingerprint}
        written_by |= settings(args, "max_new_tokens", "max_model_len", "engine_args", "sampling_args")
        identity = identity | {"generate": written_by}
    folder = RunFolder(run_path(args, name, lora_path))
    anew = {"all": "generate"}.get(args.stage, args.stage) if args.overwrite else None
    run = Run(name, lora_path, folder, folder.begin(identity, anew), model, adapter)
    check_notes(folder, identity["data"]["n"])
    return run


def check_notes(folder: RunFolder, n: int) -> None:
    """Raise UserError when a note on disk belongs to none of the n dialogues, or to one that has a note already."""
    seen: set[int] = set()
    for record in folder.predictions:
        index = record["index"]
        if index in seen or not 0 <= index < n:
            what = "stands twice" if index in seen else f"is none of the {n}"
            raise UserError(f"{folder.predictions.path}: dialogue {index} {what}; {DAMAGED}")
        seen.add(index)


def identify(args: argparse.Namespace, dataset_hash: str, n: int, judge_model: models.Model | None) -> dict[str, dict]:
    """What must not change between two calls on one run folder, as far as all runs of this call share it."""
    data = {"split": args.split, "n": n, "dataset_hash": dataset_hash, "prompts_hash": prompts.prompts_hash()}
    if args.stage not in JUDGING:
        return {"data": data}
    judged_by = {"judge_model": judge_model.fingerprint if judge_model else f"served as {args.judge_model}"}
    judged_by |= settings(args, "judge_controls", "attacks", "judge_engine_args", "judge_sampling_args")
    return {"data": data, "judge": judged_by}


def describe(args: argparse.Namespace, run: Run, machine: dict[str, Any]) -> None:
    """Put into the manifest what this call adds to the run; `--stage report` adds nothing."""
    if args.stage in WRITING:
        run.manifest |= {"model": run.name, "lora_path": run.lora_path}
    if args.stage in JUDGING:
        run.manifest |= {"judge_model": args.judge_model}
    if args.stage != "report":
        run.manifest |= machine | {"arguments": arguments(args)}
        run.folder.write_manifest(run.manifest)


def settings(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments for the manifest, without a password that an address may hold."""
    addresses = {name: getattr(args, name) for name in ("api_base", "judge_api_base")}
    return vars(args) | {name: value and without_credentials(value) for name, value in addresses.items()}


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
