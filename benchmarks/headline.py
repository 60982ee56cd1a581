"""Measure what fine-tuning is worth: the untrained model, the full fine-tune and the LoRA adapter, with several seeds.

Each training uses a shipped YAML, changed only by --full and --lora. One call of eval.py evaluates all models on a test
set, with one start of the judge. Output: results.md and results.jsonl, written after training and after each test set.

Rerun an interrupted command to resume: finished trainings and notes are kept. Further commands, such as one for the
learning curve, use them too if they have the same --work_dir, --data and --test; --evaluate_on picks a test set.

--data and --test are JSON lines, any number of rows, with the columns dialogue and soap (the note's text under the
headings S, O, A and P), or with dialogue, S, O, A and P. Other columns are ignored. --validation_fraction of the
dialogues in --data is held out for validation; rows whose dialogue is in a test set are left out. These two lines, on a
machine with internet, write train.jsonl (9,250 rows), validation.jsonl (500, not used here) and test.jsonl (250):

    NAME=omi-health/medical-dialogue-to-soap-summary
    python -c "import datasets; [d.to_json(f'{name}.jsonl') for name, d in datasets.load_dataset('$NAME').items()]"

    python benchmarks/headline.py --model Qwen/Qwen3-1.7B --judge_model Qwen/Qwen3-8B \\
        --data train.jsonl --test test.jsonl
    python benchmarks/headline.py --model M --data train.jsonl --test omi=omi.jsonl --test aci=aci.jsonl \\
        --full epochs=1 --gpus 4 --ablations
    python benchmarks/headline.py --model M --data train.jsonl --test omi=omi.jsonl --test aci=aci.jsonl \\
        --evaluate_on omi --train_rows 50 150 all
    python benchmarks/headline.py --model M --data train.jsonl --test test.jsonl --seeds 0 --per_gpu 2 \\
        --grid "full: optimizer.learning_rate=1e-5,2e-5 epochs=1,2" --grid "LoRA: model.peft_config.r=8,16,32"
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import headline_table as table  # noqa: E402
from headline_table import Evaluated  # noqa: E402
from train_throughput import hardware  # noqa: E402
from trainings import RECIPES, Training, check, grid, make_slots, train_all  # noqa: E402

import prompts  # noqa: E402
from common.dataset import Row, load_split  # noqa: E402
from common.errors import UserError  # noqa: E402
from evaluation.engines import models  # noqa: E402

ON_ATTENTION = "model.peft_config.target_modules=[q_proj, k_proj, v_proj, o_proj]"
UNTRAINED = "untrained"
ALL_ROWS = None  # as Training.rows

# --- data ------------------------------------------------------------------------------------------------------------


def named_test(text: str) -> tuple[str, Path]:
    """Return the (name, path) of a test set given as path or name=path, as a type for argparse."""
    name, separator, path = text.partition("=")
    if not separator:
        name, path = Path(text).stem, text
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise argparse.ArgumentTypeError(f"{name!r} cannot name a folder; give NAME=FILE")
    return name, Path(path)


def number_of_rows(text: str) -> int | None:
    """Return a number of rows, or ALL_ROWS for "all", as a type for argparse."""
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no number of rows; give numbers, or all, with spaces between them")
    return ALL_ROWS if text == "all" else int(text)


def preprocess(name: str, tests: list[Path], args: argparse.Namespace) -> Path:
    """Preprocess --data and the test files into a dataset, unless this has been done. Raises UserError.

    Raises UserError, too, if the dataset was made from other rows or with another --validation_fraction.
    """
    folder = args.work_dir / "data" / name
    sources = {"train.jsonl": args.data, **{f"test-{k}.jsonl": path for k, path in enumerate(tests)}}
    try:
        texts = {file: path.read_bytes() for file, path in sources.items()}
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; correct the path") from None
    source, dataset, settings = folder / "source", folder / "soap_dataset", folder / "settings.json"
    fraction = {"validation_fraction": args.validation_fraction}
    if (dataset / "dataset_dict.json").exists():
        if {path.name: path.read_bytes() for path in source.iterdir()} != texts:
            raise UserError(f"{source} holds other rows; give another --work_dir")
        if (known := json.loads(settings.read_text())) != fraction:
            raise UserError(f"{folder} was split with {known}, not {fraction}; give another --work_dir")
        return dataset
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    settings.write_text(json.dumps(fraction))
    for file, text in texts.items():
        (source / file).write_bytes(text)
    command = [sys.executable, ROOT / "preprocess_data.py", "--dataset", source, "--output_dir", dataset]
    if status := subprocess.run(
        [*command, "--validation_fraction", str(args.validation_fraction)], check=False
    ).returncode:
        raise UserError(f"preprocess_data.py ended with status {status}; correct {args.data} and the test files")
    return dataset


def example_in_template(model: str, row: Row, folder: Path) -> Path:
    """Return a copy of a model whose chat template shows an example, by links to its weights.

    The example, a row's dialogue and note, follows the system message. So the prompt changes for this model only, and
    eval.py, which keeps a model's template in its fingerprint, needs no option.
    """
    from transformers import AutoTokenizer

    source = models.resolve_model(model).path
    tokenizer = AutoTokenizer.from_pretrained(source)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.chat_template = template_with_example(
        tokenizer.chat_template, prompts.training_messages(row["dialogue"], row)
    )
    tokenizer.save_pretrained(folder)
    for path in source.iterdir():
        if path.is_file() and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    return folder


def template_with_example(template: str, messages: prompts.Messages) -> str:
    """Return a chat template that shows the last two of `messages` after the system message of a note's prompt.

    The judge's prompts, if the same model judges, stay as they are.
    """
    example = json.dumps(messages[1:], ensure_ascii=False)
    system = json.dumps(prompts.SYSTEM_PROMPT, ensure_ascii=False)
    return (
        f"{{%- if messages[0]['content'] == {system} %}}"
        f"{{%- set messages = messages[:1] + {example} + messages[1:] %}}{{%- endif %}}{template}"
    )


# --- models ----------------------------------------------------------------------------------------------------------


def make_trainings(args: argparse.Namespace) -> list[Training]:
    """Return the trainings of this call. Raises UserError."""
    always = {"full": tuple(args.full), "LoRA": tuple(args.lora)}
    if args.grid:
        if args.train_rows or args.ablations:
            raise UserError("--grid compares validation losses only; leave out --train_rows and --ablations")
        settings = [(recipe, always[recipe], changes) for spec in args.grid for recipe, changes in grid(spec)]
        return [
            Training(recipe, f"{recipe} {' '.join(changes)}", seed, (*fixed, *changes))
            for recipe, fixed, changes in settings
            for seed in args.seeds
        ]
    made = []
    for recipe in (name for name in RECIPES if name in args.only):
        for rows in args.train_rows or [ALL_ROWS]:
            label = recipe if rows is ALL_ROWS else f"{recipe}, {rows} rows"
            made += [Training(recipe, label, seed, always[recipe], rows) for seed in args.seeds]
        if recipe == "LoRA" and args.ablations:
            changes = (*always[recipe], ON_ATTENTION)
            made += [Training(recipe, "LoRA on attention", seed, changes) for seed in args.seeds]
    return made


def evaluate(
    test: str, dataset: Path, args: argparse.Namespace, trained: dict, untrained: dict
) -> tuple[list[Evaluated], list[Evaluated]]:
    """Evaluate all models on a test set; return those of calls that succeed, in the table's order, and the others.

    trained: {Training: Result}; untrained: {label: model}. A call of eval.py that fails is named on stderr. The folders
    of its runs may hold figures of an earlier call, such as one with another judge.
    """
    folder, base = args.work_dir / "results" / test, run_name(args.model)
    whole = [(Evaluated(label, folder / run_name(model)), model) for label, model in untrained.items()]
    adapted, evaluated = [], [model for model, _ in whole]
    for training, result in trained.items():
        name = result.folder.name if training.recipe == "full" else f"{base}-{result.folder.name}"
        evaluated.append(Evaluated(training.label, folder / name, training.seed, result, training.changes))
        (whole if training.recipe == "full" else adapted).append((evaluated[-1], result.folder))
    models = [model for _, model in whole]
    adapters = [word for _, path in adapted for word in ("--lora_path", path)]
    calls = [(whole, models), (adapted, [args.model, *adapters])]
    if UNTRAINED in untrained and len(whole) > 1:  # eval.py adds adapters to the first of several models
        calls = [(whole + adapted, models + adapters)]
    failed = []
    for runs, arguments in calls:
        if runs and not run_eval(arguments, folder if len(runs) > 1 else runs[0][0].run, dataset, args):
            failed += [run for run, _ in runs]
    if args.ablations and UNTRAINED in untrained:
        schema = Evaluated("untrained, JSON form enforced", folder / "note_schema")
        if not run_eval([args.model, "--note_schema"], schema.run, dataset, args):
            failed.append(schema)
        evaluated.insert(len(untrained), schema)
    return [run for run in evaluated if run not in failed], failed


def run_name(model: str | Path) -> str:
    """Return the name that eval.py gives to the run folder of a model."""
    return Path(model).resolve().name


def run_eval(arguments: list, output_dir: Path, dataset: Path, args: argparse.Namespace) -> bool:
    """Run eval.py; return whether it succeeded. If not, name its log on stderr."""
    where = ["--dataset_path", dataset, "--output_dir", output_dir, "--judge_model", args.judge_model or args.model]
    command = [sys.executable, ROOT / "eval.py", *arguments, *where, *args.eval]
    log = output_dir.with_name(f"{output_dir.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        status = subprocess.run(command, stdout=stream, stderr=stream, check=False).returncode
    if status:
        print(f"error: eval.py ended with status {status}; see {log}", file=sys.stderr, flush=True)
    return not status


def check_eval_arguments(args: argparse.Namespace) -> None:
    """Raise UserError if --eval has a flag that is set here, or that would leave a run without comparable figures.

    Exits, as argparse does, for a flag that eval.py does not have.
    """
    import eval as evaluation_script

    parser = evaluation_script.build_parser()
    parser.prog = "--eval"
    given, default = (vars(parser.parse_args(words)) for words in (args.eval, []))
    decided_here = ("model", "lora_path", "judge_model", "dataset_path", "split", "limit", "output_dir", "stage")
    for name in (*decided_here, "compare", "human_labels", "review_sheet"):
        if given[name] != default[name]:
            raise UserError(f"--eval: {name} cannot be set there; leave it out")


# --- command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="hub name or folder of the model to fine-tune")
    add("--data", type=Path, required=True, help="JSONL file of dialogues and notes for training and validation")
    test_help = "JSONL file of the test set, or name=file; repeat the flag for several test sets"
    add("--test", type=named_test, action="append", required=True, metavar="FILE", help=test_help)
    add("--judge_model", help="model that judges (default: the untrained model)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of each training (default: 0 1 2)")
    names = [UNTRAINED, *RECIPES]
    add("--only", nargs="+", choices=names, default=names, help="models to train and evaluate (default: all)")
    add("--full", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the full YAML")
    add("--lora", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the LoRA YAML")
    on_help = "evaluate on these test sets only; rows of the others, too, are left out of training (default: all)"
    add("--evaluate_on", nargs="+", metavar="NAME", help=on_help)
    rows_help = (
        "train with each of these numbers of rows, drawn at random from the training split, or all (default: all)"
    )
    add("--train_rows", type=number_of_rows, nargs="+", metavar="N", help=rows_help)
    add("--validation_fraction", type=float, default=0.1, help="share of --data held out (default: %(default)s)")
    ablations_help = (
        "also evaluate the untrained model with its form enforced (--note_schema) and with one example in the prompt, "
        "and train LoRA on the attention's matrices only"
    )
    add("--ablations", action="store_true", help=ablations_help)
    grid_help = (
        "train every combination of the values and compare validation losses, without evaluation; repeat the flag for "
        "several grids"
    )
    add("--grid", action="append", metavar='"RECIPE: KEY=VALUE,VALUE ..."', help=grid_help)
    add("--gpus", type=int, default=1, help="GPUs to train on, one training each (default: %(default)s)")
    add("--per_gpu", type=int, default=1, help="trainings that share a GPU (default: %(default)s)")
    add("--master_port", type=int, default=29500, help="first of DeepSpeed's ports (default: %(default)s)")
    add(
        "--eval",
        type=shlex.split,
        default=[],
        metavar="ARGUMENTS",
        help='more for eval.py: --eval="--judge_controls 48"',
    )
    work_dir = ROOT / "benchmarks/build/headline"
    add("--work_dir", type=Path, default=work_dir, help="folder for trainings, runs and logs (default: %(default)s)")
    output_help = "write the tables to this file, and the figures to one of the same name that ends in .jsonl"
    defaults = "results.md, learning_curve.md with --train_rows, grid.md with --grid, in --work_dir"
    add("--output", type=Path, help=f"{output_help} (default: {defaults})")
    return parser


def tune(args: argparse.Namespace, head: list[str], model: models.Model, dataset: Path) -> bool:
    """Train every combination of the grids, and write their table. Return whether all trainings succeeded."""
    trainings = make_trainings(args)
    trained = train_all(trainings, model, dataset, args.work_dir / "grid", args.slots, export=False)
    without = [each.name for each in trainings if each not in trained or not trained[each].validations]
    table.write_tables(
        args.output, [*head, table.NOTES_ON_TRAININGS, "", *table.training_table(trained), *table.missing_line(without)]
    )
    return not without


def compare(
    args: argparse.Namespace, head: list[str], model: models.Model, dataset: Path, tests: dict[str, Path]
) -> bool:
    """Train and evaluate, and write the tables after both. Return whether all trainings and runs succeeded.

    head: lines before the tables. dataset: has the rows of all test sets. Raises UserError.
    """
    several = len(tests) > 1
    datasets = {
        name: preprocess(f"test-{name}", [tests[name]], args) if several else dataset
        for name in args.evaluate_on or tests
    }
    trainings = make_trainings(args)
    trained = train_all(trainings, model, dataset, args.work_dir / "trainings", args.slots, export=True)
    failed_trainings = [each.name for each in trainings if each not in trained]
    complete = not failed_trainings
    untrained = {UNTRAINED: args.model} if UNTRAINED in args.only else {}
    if untrained and args.ablations:
        rows = sorted(load_split(dataset, "train"), key=lambda row: len(row["dialogue"]))
        folder = args.work_dir / "untrained-one-example"
        with_example = example_in_template(args.model, rows[len(rows) // 2], folder)
        untrained["untrained, one example in the prompt"] = with_example
    lines, found = list(head), []
    if trainings:
        lines += ["## Trainings", "", table.NOTES_ON_TRAININGS, "", *table.training_table(trained)]
        lines += [*table.missing_line(failed_trainings), ""]
        table.write_tables(args.output, lines)
    for name, own in datasets.items():
        rows = load_split(own, "test")
        evaluated, failed = evaluate(name, own, args, trained, untrained)
        complete &= not failed
        of_test = table.evaluation_records(name, evaluated, rows)
        judge = ", ".join(sorted({run_name(record["judge"]) for record in of_test})) or "no model"
        heading = f"## Test set {name}: {len(rows)} dialogues, judged by {judge}"
        missing = table.missing_line([*failed_trainings, *(each.run.name for each in failed)])
        tables = (
            [*table.judge_line(of_test), *table.unscored_line(of_test), *table.results_tables(of_test)]
            if of_test
            else []
        )
        lines += [heading, "", table.NOTES_ON_FIGURES, "", *tables, *missing, ""]
        found += of_test
        text = "".join(json.dumps(record) + "\n" for record in found)
        args.output.with_suffix(".jsonl").write_text(text, encoding="utf-8")
        table.write_tables(args.output, lines)
    return complete


def measure(args: argparse.Namespace, words: list[str]) -> bool:
    """Preprocess, train, evaluate, and write the tables. Return whether all succeeded. Raises UserError."""
    tests = dict(args.test)
    if len(tests) < len(args.test):
        raise UserError("two test sets have the same name; give them as name=file")
    if unknown := [name for name in args.evaluate_on or () if name not in tests]:
        raise UserError(f"--evaluate_on {unknown[0]}: no test set has this name; the names are {', '.join(tests)}")
    check_eval_arguments(args)
    check(make_trainings(args))
    model = models.resolve_model(args.model)
    args.slots = make_slots(args.gpus, args.per_gpu, args.master_port)
    dataset = preprocess("all", list(tests.values()), args)
    sizes = {split: len(load_split(dataset, split)) for split in ("train", "validation", "test")}
    numbers = [rows for rows in args.train_rows or () if rows is not ALL_ROWS]
    if out_of_range := [rows for rows in numbers if not 1 <= rows <= sizes["train"]]:
        raise UserError(f"--train_rows {out_of_range[0]}: give 1 to {sizes['train']}, the rows of the training split")
    default = "grid.md" if args.grid else "learning_curve.md" if args.train_rows else "results.md"
    args.output = args.output or args.work_dir / default
    args.output.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/headline.py", *words])
    rows = ", ".join(f"{size} {split}" for split, size in sizes.items())
    machine = f"{hardware()}; trainings at once: {len(args.slots)}, on GPUs: {args.gpus}"
    head = [f"`{command}`", "", f"{machine}; rows: {rows}", ""]
    complete = tune(args, head, model, dataset) if args.grid else compare(args, head, model, dataset, tests)
    print(args.output.read_text(encoding="utf-8"))
    print(f"tables: {args.output}; trainings, runs and logs: {args.work_dir}")
    return complete


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(words)
    args.work_dir = args.work_dir.resolve()
    if Path(args.model).is_dir():
        args.model = str(Path(args.model).resolve())
    os.umask(0o077)  # only the user may read dialogues and notes
    args.work_dir.mkdir(parents=True, exist_ok=True)
    print(*(f"{name}={value}" for name, value in vars(args).items()), flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # such as from `timeout`; no training may stay behind
    try:
        return 0 if measure(args, words) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command to resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
