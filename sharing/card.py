"""Fill in the model card of an exported model, from what was measured and nothing else."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prompts
from common.errors import UserError
from evaluation.engines.models import Adapter, Model

NOT_RUN = "not run"
LIMITS = """\
- **Not for clinical use.** No clinician has checked the model, its notes or the verdicts on them.
- It can leave out facts of the visit, change them, or add facts that nobody said.
- It takes one dialogue as text, and writes one note. It was not made to answer questions or to converse.
- A dialogue is patient data. Keep it, and the notes, where such data may be."""


@dataclass(frozen=True)
class Training:
    """The figures of a training log. `validation_loss` is that of the exported step, or None if it was not measured."""

    steps: int  # of the whole run
    epochs: int
    tokens: int  # up to the exported step
    loss: float  # mean over the 10 steps up to the exported one, nats per token
    peak_rate: float
    exported_step: int | None = None
    validation_loss: float | None = None


@dataclass(frozen=True)
class Facts:
    """Everything that a model card says."""

    name: str
    base: str | None  # on the hub
    dtype: str
    evaluated_dtype: str  # of the weights before the export
    adapter: dict[str, Any] | None  # its settings
    training: Training | None
    results: dict[str, Any] | None


def read_training(log: Path, exported: str = "") -> Training:
    """Return the figures in a train-log.jsonl. `exported` is the folder's name: global_step_N. Raises UserError."""
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--train_log {log}: {error.strerror}; give a train-log.jsonl") from None
    records = []
    for row, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if row < len(lines):  # a killed run can leave half a last line
                raise UserError(f"{log}:{row} is not JSON; give a train-log.jsonl") from None
    try:
        every_step = [record for record in records if "loss" in record]
        validations = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
        step = int(match[1]) if (match := re.fullmatch(r"global_step_(\d+)", exported)) else None
        steps = [record for record in every_step if step is None or record["step"] <= step]
        last = [record["loss"] for record in steps[-10:]]
        return Training(
            steps=every_step[-1]["step"],
            epochs=every_step[-1]["epoch"] + 1,
            tokens=sum(record["tokens"] for record in steps),
            loss=sum(last) / len(last),
            peak_rate=max(record["lr"] for record in steps),
            exported_step=step,
            validation_loss=validations.get(step),
        )
    except (IndexError, KeyError, TypeError, ZeroDivisionError):
        raise UserError(f"{log} has no steps of this checkpoint; give its own log as --train_log") from None


def read_results(run: Path, model: Model, adapter: Adapter | None) -> dict[str, Any]:
    """Return results.json of a run of eval.py. Raises UserError unless the run evaluated this model and adapter."""
    from evaluation.inputs import load_run
    from evaluation.run.manifest import Manifest

    results = load_run(run)["results"]
    manifest = Manifest.read(run / "manifest.json")
    evaluated = manifest.identity.get("generate", {}) if manifest else {}
    if (evaluated.get("model"), evaluated.get("adapter")) != (model.fingerprint, adapter and adapter.fingerprint):
        raise UserError(
            f"--results {run}: that run did not evaluate {adapter.name if adapter else model.name}; "
            "give its own run, or leave out --results"
        )
    return results


def model_card(facts: Facts) -> str:
    """Return the text of README.md, with the hub's YAML metadata."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=facts.base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["soap-notes", "medical", "not-for-clinical-use"],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {facts.name}",
        "Writes the SOAP note (Subjective, Objective, Assessment, Plan) of a doctor's visit from its dialogue, as one "
        "JSON object. **Not for clinical use.**",
        f"## Use\n\n{_use(facts)}",
        f"## Training\n\n{_training(facts)}",
        f"## Evaluation\n\n{_evaluation(facts)}",
        f"## Limits\n\n{LIMITS}",
    ]
    return "\n\n".join(parts) + "\n"


def _use(facts: Facts) -> str:
    return "\n\n".join(
        [
            "Send two messages through the model's own chat template, and decode greedily (temperature 0). The user "
            'message is the dialogue, a line for each turn ("Doctor: ...", "Patient: ..."). The system message is:',
            f"```\n{prompts.SYSTEM_PROMPT}\n```",
            "The chat template needs no options: thinking is off in it, and any date in it is fixed, as in training. "
            f"Weights: {facts.dtype}. `Modelfile` is for Ollama and needs `model.gguf`.",
        ]
    )


def _training(facts: Facts) -> str:
    lines = [f"- Base model: {facts.base or 'not recorded'}"]
    if facts.adapter:
        lines.append(
            f"- Method: LoRA, rank {facts.adapter['r']}, alpha {facts.adapter['lora_alpha']}, merged into the weights"
        )
    if not (log := facts.training):
        return "\n".join([*lines, "- Training log: not found, so neither data nor losses are given here"])
    at_step = f"step {log.exported_step} of {log.steps}" if log.exported_step else f"{log.steps} steps were run"
    validation = f"{log.validation_loss:.4f}" if log.validation_loss is not None else NOT_RUN
    lines += [
        f"- Exported: {at_step}; epochs of the run: {log.epochs}",
        f"- Data: {log.tokens:,} tokens of dialogues and notes up to that step",
        f"- Highest learning rate: {log.peak_rate:.3g}",
        f"- Training loss, mean of up to 10 steps before it: {log.loss:.4f} nats per token of a note",
        f"- Validation loss at the exported step: {validation}",
    ]
    return "\n".join(lines)


def _evaluation(facts: Facts) -> str:
    from evaluation.report.figures import short_name
    from evaluation.report.text import console_table

    if (results := facts.results) is None:
        return f"Pass rates, ROUGE-L and checks of the judge: {NOT_RUN}."
    rounded = ""
    if facts.dtype != facts.evaluated_dtype:
        rounded = f" The evaluated weights are {facts.evaluated_dtype}; rounded to {facts.dtype}, they were {NOT_RUN}."
    controls = "" if results["judge_controls"] else f"\n\nChecks of the judge on known answers: {NOT_RUN}."
    people = "" if results["human_labels"] else f"\n\nVerdicts of people: {NOT_RUN}."
    return (
        f"Test data: {results['n']} dialogues of the split {results['split']} of {short_name(results['dataset'])} "
        f"(hash {results['dataset_hash']}), on {results['date'][:10]}. A language model, "
        f"{short_name(results['judge_model'])}, compared each section with the reference: a pass rate is its opinion."
        f"{rounded}\n\n{console_table(results)}{controls}{people}"
    )
