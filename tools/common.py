"""What the tools, data and bench programs share: one error class and one frame around every `main`."""
from __future__ import annotations

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


def program(main: Callable[[Sequence[str]], int | None], name: str) -> int:
    """Run `main` on the command line's arguments and return the exit status: main's own, where None means 0.

    A repairable error prints `name: message` on stderr and returns 2, or the error's own `exit_code`.
    """
    try:
        status = main(sys.argv[1:]) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes stdout once more on its way out
        return 141
    except KeyboardInterrupt:
        return 130
    except repairable() as error:
        print(f"{name}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
