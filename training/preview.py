"""`python train.py`: one formatted example as training sees it, and with a model the lengths in tokens."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from common.dataset import load_split
from common.errors import UserError
from prompts import SECTIONS, training_messages

ROOT = Path(__file__).resolve().parent.parent


def show_example(row: dict[str, str]) -> None:
    for message in training_messages(row["dialogue"], {key: row[key] for key in SECTIONS}):
        print(f"--- {message['role']} ---\n{message['content']}\n")


def yaml_limits() -> dict[str, int]:
    """`data.max_length` of each YAML in the project's folder that sets it, by the YAML's name. Raises ValueError."""
    import yaml

    limits = {}
    for path in sorted(ROOT.glob("*-config.yaml")):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML ({error}); correct it, or give --max_length") from None
        match config:
            case {"data": {"max_length": int(limit)}}:
                limits[path.name] = limit
    return limits


def show_lengths(rows: list[dict[str, str]], model: str, limits: dict[str, int]) -> None:
    """Token counts of all rows, and how many are longer than each of the limits and would be left out."""
    from training.tokens import IGNORE_INDEX, TemplateError, encode_example, load_tokenizer

    try:
        tokenizer = load_tokenizer(model)
    except TemplateError as error:
        raise ValueError(f"{error}: give --model the folder or the hub's name of a model made for chats") from None
    examples = [
        encode_example(tokenizer, training_messages(row["dialogue"], {key: row[key] for key in SECTIONS}))
        for row in rows
    ]
    lengths = sorted(len(example["input_ids"]) for example in examples)
    labelled = sum(token != IGNORE_INDEX for example in examples for token in example["labels"])
    print(
        f"tokens a row: median {lengths[len(lengths) // 2]:,}, longest {lengths[-1]:,}; "
        f"{labelled / sum(lengths):.0%} of all {sum(lengths):,} are the notes, which the loss is computed on\n"
        f"rows: {len(rows):,}"
    )
    for name, limit in limits.items():
        print(f"  max_length {limit:,} ({name}) would drop {sum(length > limit for length in lengths):,}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Show how a row of soap_dataset looks in training. Training itself: arctic_training <config>.yaml",
    )
    parser.add_argument("config", nargs="?", type=refuse_config, help=argparse.SUPPRESS)
    parser.add_argument("--dataset_path", type=Path, default=Path("./soap_dataset"), help="default: %(default)s")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--index", type=int, default=0, help="row to show (default: %(default)s)")
    parser.add_argument("--model", help="name or folder of a model, whose tokenizer counts the tokens")
    parser.add_argument("--max_length", type=int, help="tokens (default: that of each *-config.yaml)")
    return parser


def refuse_config(name: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"this shows an example; training itself is: arctic_training {name}")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        rows = load_split(args.dataset_path, args.split).to_list()
        if not 0 <= args.index < len(rows):
            raise ValueError(f"no row {args.index}: {args.split} has the rows 0 to {len(rows) - 1}")
        show_example(rows[args.index])
        if args.model:
            asked = args.max_length is not None
            show_lengths(rows, args.model, {"as given": args.max_length} if asked else yaml_limits())
    except (UserError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
