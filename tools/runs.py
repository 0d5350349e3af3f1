"""The runs in LOG_DIR (logs) as a table: what came out of each, and the knobs in which they differ.

    python -m tools.runs [COLUMN] [--csv]

Sorted by a column, such as bpb or MATRIX_LR; by default the newest is last. `loss` is the last training step's in nats
a token, `bpb` the score in bits a byte, `bytes` the artifact with its code; a single run shows the knobs that differ
from its preset. Names and lines are cut to the terminal's width; `--csv` has all of it in full.
"""
from __future__ import annotations

import csv
import functools
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from tools import knobs
from tools.common import ToolError, program
from tools.logs import Run, cut, differing, log_folder, logs_in, read_run

COLUMNS = "run when status steps loss bpb bytes secs".split()
FORMS = {"loss": ".3f", "bpb": ".4f", "secs": ".0f"}


@functools.cache
def preset_values(name: str) -> dict[str, Any]:
    """Return the knobs (NAME: value) that a preset of `train_gpt.py` sets; none where it is unknown."""
    found = re.search(r"^PRESETS.*?^}", knobs.TRAINER.read_text(encoding="utf-8"), re.M | re.S)
    with suppress(KeyError):  # to read the whole source would take longer than all the rest
        return knobs.preset(name, found[0] if found else "")
    return {}


def changed(run: Run) -> dict[str, Any]:
    """Return the knobs (NAME: value) of a run that differ from what its preset sets, and else from the defaults."""
    usual, not_default = preset_values(str(run.knobs.get("preset"))), run.last("knobs")
    own = {name.upper(): value for name, value in run.knobs.items() if name != "preset"}
    return {name: value for name, value in own.items()
            if (usual[name] != value if name in usual else name in not_default)}


def told_apart(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the knobs (NAME: value) that tell each run from the others, a single one from its preset."""
    differ = sorted((name for name in differing(runs) if name != "code_sha256"), key="seed".__eq__)
    if len(runs) == 1:
        return [changed(runs[0])]
    if "preset" in differ:  # which would bring some forty knobs with it
        return [{"PRESET": run.knobs.get("preset"), **changed(run)} for run in runs]
    return [{name.upper(): run.knobs[name] for name in differ if name in run.knobs} for run in runs]


def row(run: Run) -> dict[str, Any]:
    """Return the figures of one run by column; None where the log does not say."""
    verdict = run.last("verdict")
    log = run if verdict else read_run(run.path, "steps")  # how far it came
    train = log.last("train")
    figures = {"steps": verdict.get("steps", train.get("step")),
               "loss": verdict.get("train_loss", train.get("loss_nats")),
               "bpb": verdict.get("val_bpb"), "bytes": verdict.get("artifact_bytes"),
               "secs": verdict.get("total_seconds", log.events[-1].get("seconds"))}
    numbers = {name: value if isinstance(value, (int, float)) else None for name, value in figures.items()}
    return {"run": run.name, "when": run.path.stat().st_mtime, "status": run.status, **numbers}


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], width: int) -> str:
    """Return lines of at most `width` characters, whose ends are cut off where they are longer."""
    def text(name: str, value: Any) -> str:
        if name == "when":  # the time of a day, or the day of what is not of today
            then = time.localtime(value)
            return time.strftime("%H:%M" if then[:3] == time.localtime()[:3] else "%d %b", then)
        if name == "run":
            return cut(value, width // 4)
        return "-" if value is None else format(value, FORMS[name]) if name in FORMS else knobs.typed_text(value)

    cells = [columns, *([text(name, row.get(name)) for name in columns] for row in rows)]
    wide = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(cut(" ".join(cell.ljust(n) if name in ("run", "status") else cell.rjust(n)
                                  for name, cell, n in zip(columns, line, wide)), width) for line in cells)


def main(arguments: Sequence[str]) -> int:
    """Print the table, or the same as CSV."""
    logs = [read_run(path, "steps", "train") for path in logs_in(log_folder())]
    runs = [run for run in logs if run.last("config")]
    if not runs:
        raise ToolError(f"{log_folder()}/: no run yet; ./run.sh makes one")
    rows = [{**row(run), **values} for run, values in zip(runs, told_apart(runs))]
    columns = list(dict.fromkeys([*COLUMNS, *(name for each in rows for name in each)]))
    by = [argument for argument in arguments if argument != "--csv"] or ["when"]
    if len(by) > 1 or by[0] not in columns:
        raise ToolError(f"{' '.join(by)}: expected --csv, or one column to sort by: {', '.join(columns)}")
    rows.sort(key=lambda row: (row.get(by[0]) is None, isinstance(row.get(by[0]), str), row.get(by[0])))
    if "--csv" in arguments:
        out = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        out.writeheader()
        out.writerows({**row, "when": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["when"]))} for row in rows)
    else:
        print(table(columns, rows, shutil.get_terminal_size((80, 24)).columns))
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "runs.py", __doc__))
