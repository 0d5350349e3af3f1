"""Runs again what a log says was run, and compares: does the same code give the same losses, artifact and score?

    ./run.sh replay RUN [KNOB=value ...]        a run id, or the path of a log

What is run comes from the log: every knob that decides the result, and the number of processes (all on this machine).
Knobs given here replace the log's, such as DATA_PATH where the data lie elsewhere. What the log does not decide: the
new log `<run_id>-replay-<time>.jsonl` and its artifact go to LOG_DIR (logs). Exit status: 0 the same, 1 something
differs, 2 it cannot be run.

A CPU repeats a budget in steps (MAX_WALLCLOCK_SECONDS=0) bit for bit, on the same packages and kind of processor; a GPU
with DETERMINISTIC=1. A budget in seconds ends after another number of steps each time.
"""
from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools import foreign, knobs, launch
from tools.common import ToolError, program
from tools.logs import WRITTEN, events, file_name, find_log, last, log_folder, pairs, readable

BEFORE = {"start": ("code_sha256", "python", "torch", "device", "world", "dtype", "threads", "compile", "attention",
                    "kernels", "numpy", "sentencepiece", "brotli", "constriction", "triton"),
          "train_data": ("corpus", "manifest_sha256")}
"""What should be the same before anything runs, by event."""
RESULTS = {"train_end": ("steps", "loss_nats"), "artifact": ("sha256",),
           "verdict": ("artifact_bytes", "ledger_sha256", "diagnostic_evals", "val_loss", "val_bpb")}
"""What is compared."""


def knobs_of(log: Sequence[Mapping[str, Any]], path: Path) -> dict[str, str]:
    """Environment with every knob of the logged run that is part of its result; a log may come from anyone."""
    config, begin = last(log, "config"), last(log, "start")
    if config is None or begin is None:
        raise ToolError(f"{path}: no log of train_gpt.py: it names no knobs; give the run's .jsonl")
    if last(log, "verdict") is None:
        raise ToolError(f"{path}: the run has no verdict to compare with (unfinished, or it failed)")
    if not 1 <= int(begin["world"]) <= 1024:
        raise ToolError(f"{path}: world={begin['world']}: expected a number of processes")
    names = [knob.name for knob in knobs.read() if knob.name.lower() in config]  # no LD_PRELOAD
    return {name: knobs.typed_text(config[name.lower()]) for name in names if name.lower() not in WRITTEN}


def places(name: str, env: Mapping[str, str]) -> dict[str, str]:
    """Where the replay of a run writes; of the logged run id its name alone, since a log may come from anyone."""
    return {"RUN_ID": f"{file_name(Path(name).name)}-replay-{time.strftime('%Y%m%d-%H%M%S')}",
            "LOG_DIR": str(log_folder(env))}


def start(env: Mapping[str, str], world: int) -> int:
    """Run the trainer with this environment on so many processes; its exit status."""
    return subprocess.run(launch.command(world), env=launch.with_threads(env, world)).returncode


def differences(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]],
                names: Mapping[str, Sequence[str]]) -> list[tuple[str, Any, Any]]:
    """(event.field, value then, value now) of what is not the same; a run without such an event has None."""
    pairs = [(f"{event}.{name}", *((last(log, event) or {}).get(name) for log in (then, now)))
             for event, fields in names.items() for name in fields]
    return [pair for pair in pairs if pair[1] != pair[2]]


def losses(log: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Logged training loss, nats a token, by step; None: not finite."""
    return {int(e["step"]): e["loss_nats"] and float(e["loss_nats"]) for e in log if e["event"] == "train"}


def report(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> tuple[list[str], bool]:
    """Lines for the reader, and whether the results are the same."""
    lines = [f"  made with another {name}: {a} then, {b} now" for name, a, b in differences(then, now, BEFORE)]
    wrong = [f"  {name} differs: {a} then, {b} now" for name, a, b in differences(then, now, RESULTS)]
    a, b = losses(then), losses(now)
    other = [step for step in sorted({*a, *b}) if a.get(step) != b.get(step)]
    if other:
        gap = max((abs(a[s] - b[s]) for s in other if a.get(s) is not None and b.get(s) is not None), default=0.0)
        wrong.append(f"  {len(other)} of {len({*a, *b})} logged losses differ, first at step {other[0]}, at most by "
                     f"{gap:.2g} nats")
    config = last(now, "config") or {}
    if wrong and config["max_wallclock_seconds"]:
        lines.append(f"  MAX_WALLCLOCK_SECONDS={config['max_wallclock_seconds']:g}: a budget in seconds repeats the "
                     f"method, not the numbers; they hang on the speed of the machine")
    if last(then, "adaptation_cut") or last(now, "adaptation_cut"):
        lines.append("  EVAL_SECONDS_BUDGET cut adaptation short, at a place that hangs on the speed of the machine")
    bpb = [last(log, "verdict")["val_bpb"] for log in (then, now)]
    lines += wrong or [f"  the same: {len(a)} logged losses, " + ", ".join(
        f"{event}.{name}" for event, fields in RESULTS.items() for name in fields)]
    return [f"val_bpb {bpb[0]:.6f} then, {bpb[1]:.6f} now ({bpb[1] - bpb[0]:+.6f})", *lines], not wrong


def main(arguments: Sequence[str], env: Mapping[str, str] = os.environ) -> int:
    """Exit status: 0 the same, 1 something differs."""
    if not arguments:
        raise ToolError("expected RUN [KNOB=value ...]: a run id, or the path of a log")
    path = find_log(arguments[0], log_folder(env))
    then, typed = events(path), pairs(arguments[1:])
    foreign.check_typed(typed, {knob.name for knob in knobs.read()})
    logged = readable(path, knobs_of, then, path)
    readable(path, report, then, then)  # can it be compared? before anything runs
    ours = {**logged, **places(str(last(then, "start").get("run_id")), env), **typed}
    others = {name: value for name, value in env.items() if name.lower() not in WRITTEN}
    if status := start({**others, **ours}, int(last(then, "start")["world"])):
        raise ToolError(f"the run ended with status {status}, see above")
    lines, same = readable(path, report, then, events(launch.log_of(ours)))
    print("\n".join(["", *lines]))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(program(main, "replay", __doc__))
