"""What every program around the trainer shares: its one kind of error, and the way a program ends."""
from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


class ToolError(Exception):
    """Something that the user can repair: printed as one line, exit status 2."""


def program(main: Callable[[Sequence[str]], int], name: str) -> None:
    try:
        sys.exit(main(sys.argv[1:]))
    except (ToolError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
