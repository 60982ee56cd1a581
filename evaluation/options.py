"""The options of one eval.py call. Fields are named after the flags; only eval.py uses argparse."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError

# Flags that have no effect with --compare.
_OF_A_RUN = ("lora_path", "limit", "overwrite", "by", "human_labels", "review_sheet", "note_schema", "sampling_args")


class Target(NamedTuple):
    """A model, or a model with an adapter, by the names that the user gave."""

    model: str
    lora_path: str | None


@dataclass(frozen=True)
class Options:
    """The parsed flags; `python eval.py --help` explains them."""

    model: list[str]
    lora_path: list[str]
    judge_model: str
    compare: list[str] | None
    dataset_path: str
    split: str
    limit: int | None
    output_dir: str | None
    overwrite: bool
    stage: str
    by: str | None
    statements: bool
    judge_controls: int
    attacks: int
    human_labels: str | None
    review_sheet: str | None
    review_by: str | None
    review_size: int | None
    note_schema: bool
    max_new_tokens: int
    max_model_len: int | None
    gpu_memory_utilization: float
    engine_args: dict[str, Any]
    judge_engine_args: dict[str, Any]
    sampling_args: dict[str, Any]
    judge_sampling_args: dict[str, Any]
    api_base: str | None
    judge_api_base: str | None
    api_concurrency: int

    @property
    def generates(self) -> bool:
        """Whether this call writes notes."""
        return self.stage in ("all", "generate")

    @property
    def judges(self) -> bool:
        """Whether this call judges notes."""
        return self.stage in ("all", "judge")

    @property
    def reports(self) -> bool:
        """Whether this call scores the runs and writes their reports."""
        return self.stage in ("all", "judge", "report")

    @property
    def overwritten_stage(self) -> str | None:
        """The first stage whose records --overwrite replaces."""
        return {"all": "generate"}.get(self.stage, self.stage) if self.overwrite else None

    @property
    def targets(self) -> list[Target]:
        """The target of each run.

        One model with adapters: the model with each adapter. Otherwise each model alone, then the first model with each
        adapter.
        """
        adapted = [Target(self.model[0], path) for path in self.lora_path]
        return adapted if adapted and len(self.model) == 1 else [Target(name, None) for name in self.model] + adapted

    def run_path(self, target: Target) -> Path:
        """Return --output_dir for a single run, else a folder in it or in results, named after model and adapter."""
        if self.output_dir and len(self.targets) == 1:
            return Path(self.output_dir)
        return Path(self.output_dir or "results") / "-".join(_label(name) for name in target if name)

    def settings(self, *names: str) -> dict[str, Any]:
        """Return the flags with these names, and their values."""
        return {name: getattr(self, name) for name in names}

    def for_manifest(self) -> dict[str, Any]:
        """Return all flags; addresses lose user name and password."""
        addresses = self.settings("api_base", "judge_api_base")
        return asdict(self) | {name: value and without_credentials(value) for name, value in addresses.items()}

    def check(self) -> None:
        """Raise UserError for flags that exclude each other or have no effect."""
        for reason, applies, flags in (
            ("--compare", self.compare, (*_OF_A_RUN, "api_base", "judge_api_base", "engine_args", "judge_engine_args")),
            ("--stage generate", self.stage == "generate", ("by", "human_labels")),
            ("--api_base", self.api_base, ("engine_args",)),
            ("--judge_api_base", self.judge_api_base, ("judge_engine_args",)),
            ("no --review_sheet", not self.review_sheet, ("review_by", "review_size")),
        ):
            for flag in flags if applies else ():
                if getattr(self, flag):
                    raise UserError(f"--{flag} has no effect with {reason}; leave it out")
        if self.compare:
            if self.model or len(self.compare) < 2:
                raise UserError("--compare takes two or more run folders and no model")
            return
        if not self.model:
            raise UserError("no model given; `python eval.py --help` shows how")
        folders = [self.run_path(target) for target in self.targets]
        if len(set(folders)) < len(folders):
            raise UserError(f"two runs would share the folder {folders[0]}; evaluate them one by one with --output_dir")
        if self.human_labels and len(folders) > 1:
            raise UserError("--human_labels are verdicts on one run's notes; evaluate each model by itself")
        if self.review_sheet:
            self._check_review_sheet(Path(self.review_sheet), len(folders))
        if self.lora_path and self.api_base:
            raise UserError(
                "--lora_path cannot be combined with --api_base; give the adapter's served name as the model instead"
            )
        for api_base in filter(None, (self.api_base, self.judge_api_base)):
            without_credentials(api_base)

    def _check_review_sheet(self, path: Path, runs: int) -> None:
        if self.review_by == "statements" and not self.statements:
            raise UserError("--review_by statements needs the judge's answers; leave out --no_statements")
        if runs > 1:
            raise UserError("--review_sheet is a sample of one run's notes; evaluate each model by itself")
        if not self.reports:
            raise UserError("--review_sheet needs judged notes; leave out --stage generate")
        if path.exists():
            raise UserError(f"--review_sheet {path} exists, and may hold people's verdicts; choose another name")
        nearest = next(parent for parent in path.absolute().parents if parent.exists())
        if not nearest.is_dir():
            raise UserError(f"--review_sheet {path}: {nearest.name} is not a folder; choose another name")


def without_credentials(api_base: str) -> str:
    """Return the address without user name and password. Raises UserError if it is not a server's address."""
    from urllib.parse import urlsplit

    parts = urlsplit(api_base)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{api_base} is not a server's address; give one such as http://localhost:8000/v1")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _label(name: str) -> str:
    path = Path(name)
    return f"{path.parent.name}-{path.name}" if path.name.startswith("global_step_") else path.resolve().name
