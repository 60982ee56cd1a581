"""`python train.py`: show one example as formatted for training and, given a model, the lengths in tokens.

Given a YAML, train instead: see training/start.py.
"""

import argparse
import sys
from pathlib import Path

from common.dataset import load_split
from common.errors import UserError
from prompts import SECTIONS, training_messages
from training.start import train_in_this_process

ROOT = Path(__file__).resolve().parent.parent


def show_example(row: dict[str, str]) -> None:
    for message in training_messages(row["dialogue"], {key: row[key] for key in SECTIONS}):
        print(f"--- {message['role']} ---\n{message['content']}\n")


def yaml_limits() -> dict[str, int]:
    """Return `data.max_length` of each YAML in the project folder, by file name. Raises ValueError for invalid YAML."""
    import yaml

    limits = {}
    for path in sorted(ROOT.glob("*-config.yaml")):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML ({error}); correct it, or give --max_length") from None
        match config:
            case {"data": {"max_length": int(limit)}}:
                limits[path.name] = limit
    return limits


def show_lengths(rows: list[dict[str, str]], model: str, limits: dict[str, int]) -> None:
    """Print token counts over all rows, and how many rows each limit would drop. Raises ValueError."""
    from training.tokens import IGNORE_INDEX, TemplateError, encode_example, load_tokenizer

    try:
        tokenizer = load_tokenizer(model)
    except TemplateError as error:
        raise ValueError(f"{error}: give --model the folder or hub name of a chat model") from None
    examples = [
        encode_example(tokenizer, training_messages(row["dialogue"], {key: row[key] for key in SECTIONS}))
        for row in rows
    ]
    lengths = sorted(len(example["input_ids"]) for example in examples)
    labelled = sum(token != IGNORE_INDEX for example in examples for token in example["labels"])
    print(
        f"tokens per row: median {lengths[len(lengths) // 2]:,}, longest {lengths[-1]:,}; "
        f"{labelled / sum(lengths):.0%} of all {sum(lengths):,} belong to notes, the only tokens in the loss\n"
        f"rows: {len(rows):,}"
    )
    for name, limit in limits.items():
        print(f"  max_length {limit:,} ({name}) would drop {sum(length > limit for length in lengths):,}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Show a row of soap_dataset as formatted for training; with a YAML, train on the first GPU, like "
        "arctic_training <config>.yaml --num_gpus 1, but without its launcher.",
    )
    parser.add_argument("config", nargs="?", type=Path, help="train with this YAML; other options are ignored")
    parser.add_argument("--dataset_path", type=Path, default=Path("./soap_dataset"), help="default: %(default)s")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--index", type=int, default=0, help="row to show (default: %(default)s)")
    parser.add_argument("--model", help="hub name or folder of the model whose tokenizer counts the tokens")
    parser.add_argument("--max_length", type=int, help="limit in tokens (default: that of each *-config.yaml)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if args.config:
            train_in_this_process(args.config)
            return 0
        rows = load_split(args.dataset_path, args.split).to_list()
        if not 0 <= args.index < len(rows):
            raise ValueError(f"no row {args.index}: {args.split} has rows 0 to {len(rows) - 1}")
        show_example(rows[args.index])
        if args.model:
            asked = args.max_length is not None
            show_lengths(rows, args.model, {"as given": args.max_length} if asked else yaml_limits())
    except (UserError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
