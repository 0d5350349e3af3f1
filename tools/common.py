"""What the tools, data and bench programs share: one error class and one frame around every `main`."""
from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence


class ToolError(Exception):
    """Something that the user can repair. Printed as one line; `exit_code` becomes the exit status."""
    exit_code = 2


def repairable() -> tuple[type[BaseException], ...]:
    """The errors that are one line for the user: ours, the system's and, where it was imported, the trainer's."""
    trainer = sys.modules.get("train_gpt")  # looked up, never imported: most tools do without torch
    return (ToolError, OSError) if trainer is None else (ToolError, OSError, trainer.UserError)


def program(main: Callable[[Sequence[str]], int | None], name: str, doc: str | None = None) -> int:
    """Run `main` on the command line's arguments and return the exit status: main's own, where None means 0.

    -h and --help print `doc`, where there is one. A repairable error prints `name: message` on stderr and returns 2, or
    the error's own `exit_code`. What stdout has no character for is printed as an escape.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = print(doc) if doc and {"-h", "--help"} & set(sys.argv[1:]) else main(sys.argv[1:])
        print(end="", flush=True)
        return status or 0
    except BrokenPipeError:  # the reader has seen enough (`| head`)
        status = 141
    except KeyboardInterrupt:
        status = 130
    except repairable() as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = getattr(error, "exit_code", 2)
    try:
        print(end="", flush=True)
    except OSError:  # no reader or no room, and the interpreter flushes once more on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return status
