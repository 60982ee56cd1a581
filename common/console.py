"""Print for the user on stderr; stdout is for notes and results."""

import sys


def print_line(line: str) -> None:
    """Print a line on stderr at once."""
    print(line, file=sys.stderr, flush=True)
