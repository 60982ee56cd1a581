"""The runs that a call of eval.py asks for: their models, folders, and what must not change between two calls."""

import argparse
import hashlib
import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation import models
from evaluation.errors import UserError
from evaluation.server import without_credentials
from evaluation.store import DAMAGED, RunFolder

WRITING, JUDGING, SCORING = ("all", "generate"), ("all", "judge"), ("all", "judge", "report")

Found = tuple[models.Model | None, models.Adapter | None]


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


def resolve(args: argparse.Namespace) -> tuple[list[Found], models.Model | None]:
    """Model and adapter of each run, and the judge; None for what this call does not load. Raises UserError.

    What lies here is checked before anything is downloaded, and the judge, mostly the largest, is downloaded last.
    """
    load = args.stage in WRITING and not args.api_base
    load_judge = args.stage in JUDGING and not args.judge_api_base
    weights, judge_weights = (of.get("load_format") != "dummy" for of in (args.engine_args, args.judge_engine_args))
    at_run_time = bool(args.engine_args.get("enable_lora"))
    for name, lora_path in targets(args) if load else ():
        models.find_model(name, weights, _ignore)
        if lora_path:
            models.find_adapter(lora_path, _ignore)
    if load_judge:
        models.find_model(args.judge_model, judge_weights, _ignore)
    found: list[Found] = []
    for name, lora_path in targets(args):
        model = models.resolve_model(name, weights, tell) if load else None
        adapter = models.resolve_adapter(lora_path, model, tell, at_run_time) if model and lora_path else None
        found.append((model, adapter))
    return found, models.resolve_model(args.judge_model, judge_weights, tell) if load_judge else None


def open_runs(
    args: argparse.Namespace,
    found: list[Found],
    judge_model: models.Model | None,
    data: dict[str, Any],
    stack: ExitStack,
) -> list[Run]:
    """Lock the run folders and compare each with what it was made with. Raises UserError.

    `data` says what the dataset is. --overwrite deletes only after all folders have been compared.
    """
    anew = {"all": "generate"}.get(args.stage, args.stage) if args.overwrite else None
    runs, identities = [], []
    for (name, lora_path), (model, adapter) in zip(targets(args), found, strict=True):
        folder = stack.enter_context(RunFolder(run_path(args, name, lora_path)))
        identities.append(identify(args, data, name, model, adapter, judge_model))
        runs.append(Run(name, lora_path, folder, folder.compare(identities[-1], anew), model, adapter))
        if anew != "generate":
            check_notes(args, folder, data["n"])
    for run, identity in zip(runs, identities, strict=True):
        run.manifest = run.folder.begin(identity, anew)
    return runs


def check_notes(args: argparse.Namespace, folder: RunFolder, n: int) -> None:
    """Raise UserError when a note on disk is on none of the n dialogues, or is a second one, or when one is missing."""
    seen: set[int] = set()
    for record in folder.predictions:
        index = record["index"]
        if index in seen or not 0 <= index < n:
            what = "stands twice" if index in seen else f"is none of the {n}"
            raise UserError(f"{folder.predictions.path}: dialogue {index} {what}; {DAMAGED}")
        seen.add(index)
    if args.stage not in WRITING and len(seen) < n:
        raise UserError(
            f"{folder.path} has {len(seen)} notes on {n} dialogues; run the same command with --stage all first"
        )


def identify(
    args: argparse.Namespace,
    data: dict[str, Any],
    name: str,
    model: models.Model | None,
    adapter: models.Adapter | None,
    judge_model: models.Model | None,
) -> dict[str, dict]:
    """What must not change between two calls on one run folder, as far as this call knows it."""
    identity = {"data": data}
    if args.stage in WRITING:
        identity["generate"] = {
            "model": model.fingerprint if model else f"served as {name}",
            "adapter": adapter and adapter.fingerprint,
            "max_model_len": model and models.context_length(args.max_model_len, model),
            **settings(args, "max_new_tokens", "engine_args", "sampling_args"),
        }
    if args.stage in JUDGING:
        identity["judge"] = {
            "judge_model": judge_model.fingerprint if judge_model else f"served as {args.judge_model}",
            "max_model_len": judge_model and models.context_length(args.max_model_len, judge_model),
            **settings(args, "judge_engine_args", "judge_sampling_args"),
        }
    return identity


def judge_hash(run: Run) -> str:
    """12 hex digits of what decides the verdicts on the same inputs: the judge's weights, engine and sampling."""
    judge = {key: value for key, value in run.manifest["identity"]["judge"].items() if key != "max_model_len"}
    return hashlib.sha256(json.dumps(judge, sort_keys=True).encode()).hexdigest()[:12]


def describe(args: argparse.Namespace, run: Run, machine: dict[str, Any]) -> None:
    """Name the models in the manifest; `--stage report` adds nothing."""
    if args.stage in WRITING:
        run.manifest |= {"model": run.name, "lora_path": run.lora_path}
    if args.stage in JUDGING:
        run.manifest |= {"judge_model": args.judge_model}
    if args.stage == "report":
        return
    if "date" in run.manifest:
        run.folder.write_manifest(run.manifest)
    else:
        stamp(args, run, machine)


def stamp(args: argparse.Namespace, run: Run, machine: dict[str, Any]) -> None:
    """Put into the manifest when, where and with which versions and arguments the last records are made."""
    run.manifest |= machine | {"arguments": arguments(args)}
    run.folder.write_manifest(run.manifest)


def add_seconds(run: Run, name: str, seconds: float) -> None:
    """Add to a time in the manifest: a run that goes on keeps the times of the calls before."""
    timings = run.manifest["timings_s"]
    timings[name] = round(timings.get(name, 0.0) + seconds, 2)
    run.folder.write_manifest(run.manifest)


def settings(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments for the manifest, without a password that an address may hold."""
    addresses = {name: getattr(args, name) for name in ("api_base", "judge_api_base")}
    return vars(args) | {name: value and without_credentials(value) for name, value in addresses.items()}


def _ignore(line: str) -> None:
    pass


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
