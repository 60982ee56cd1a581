"""The runs of one call. Each has a model, perhaps an adapter, and a locked run folder."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.console import print_line
from evaluation.engines import models
from evaluation.options import Options, Target
from evaluation.run.folder import RunFolder
from evaluation.run.manifest import Identity, Manifest


class Loaded(NamedTuple):
    """The model and adapter of a Target; None for those that this call does not load."""

    model: models.Model | None
    adapter: models.Adapter | None


@dataclass(eq=False)
class Run:
    """A model, or a model with an adapter, to evaluate."""

    target: Target
    folder: RunFolder
    manifest: Manifest
    model: models.Model | None
    adapter: models.Adapter | None

    @property
    def merged(self) -> Path:
        """The folder for the weights with the merged adapter, which exists while notes are written."""
        return self.folder.path / ".merged"


def resolve(options: Options) -> tuple[list[Loaded], models.Model | None]:
    """Return the model and adapter of each run, and the judge; None for those that this call does not load.

    Check local files before any download, and download the judge, usually the largest, last. Raises UserError.
    """
    load = options.generates and not options.api_base
    load_judge = options.judges and not options.judge_api_base
    weights, judge_weights = (
        args.get("load_format") != "dummy" for args in (options.engine_args, options.judge_engine_args)
    )
    at_run_time = bool(options.engine_args.get("enable_lora"))
    for name, lora_path in options.targets if load else ():
        models.find_model(name, weights, _ignore)
        if lora_path:
            models.find_adapter(lora_path, _ignore)
    if load_judge:
        models.find_model(options.judge_model, judge_weights, _ignore)
    loaded: list[Loaded] = []
    for name, lora_path in options.targets:
        model = models.resolve_model(name, weights, print_line) if load else None
        adapter = None
        if model and lora_path:
            adapter = models.resolve_adapter(lora_path, model, print_line, at_run_time)
        loaded.append(Loaded(model, adapter))
    return loaded, models.resolve_model(options.judge_model, judge_weights, print_line) if load_judge else None


def open_runs(
    options: Options,
    loaded: list[Loaded],
    judge_model: models.Model | None,
    data: dict[str, Any],
    stack: ExitStack,
) -> list[Run]:
    """Lock the run folders, and check that the records in them belong to this call. Raises UserError.

    `data` identifies the dataset. --overwrite deletes only after all folders have been checked.
    """
    overwrite = options.overwritten_stage
    runs, identities = [], []
    served = served_models(options)
    for target, (model, adapter) in zip(options.targets, loaded, strict=True):
        folder = stack.enter_context(RunFolder(options.run_path(target)))
        identities.append(identify(options, data, target, model, adapter, judge_model, served))
        runs.append(Run(target, folder, folder.check(identities[-1], overwrite), model, adapter))
        if overwrite != "generate":
            folder.check_notes(data["n"], all_needed=not options.generates)
    for run, identity in zip(runs, identities, strict=True):
        run.manifest = run.folder.begin(identity, overwrite)
    return runs


def identify(
    options: Options,
    data: dict[str, Any],
    target: Target,
    model: models.Model | None,
    adapter: models.Adapter | None,
    judge_model: models.Model | None,
    served: dict[str, dict[str, Any]],
) -> Identity:
    """Return everything that must stay equal between calls on one run folder, as far as this call determines it.

    served: from `served_models`.
    """
    identity = {"data": data}
    if options.generates:
        identity["generate"] = {
            "model": model.fingerprint if model else f"served as {target.model}",
            "adapter": adapter and adapter.fingerprint,
            "max_model_len": model and models.context_length(options.max_model_len, model),
            **options.settings("note_schema", "max_new_tokens", "engine_args", "sampling_args"),
        }
        if options.api_base:
            identity["generate"] |= served[target.model]
    if options.judges:
        identity["judge"] = {
            "judge_model": judge_model.fingerprint if judge_model else f"served as {options.judge_model}",
            "max_model_len": judge_model and models.context_length(options.max_model_len, judge_model),
            **options.settings("judge_engine_args", "judge_sampling_args"),
        }
        if options.judge_api_base:
            identity["judge"] |= served["judge"]
    return identity


def served_models(options: Options) -> dict[str, dict[str, Any]]:
    """Return the servers' descriptions of their models: {name of a model to evaluate, or "judge": identity entries}.

    They are part of the identity because a name does not determine the weights behind it.
    """
    if not (options.api_base or options.judge_api_base):
        return {}
    from evaluation.engines.server import describe_served, key_of_judge

    served = {}
    if options.generates and options.api_base:
        served = {target.model: describe_served(options.api_base, target.model) for target in options.targets}
    if options.judges and options.judge_api_base:
        served["judge"] = describe_served(options.judge_api_base, options.judge_model, key_of_judge())
    return served


def _ignore(line: str) -> None:
    pass
