"""Runs again what a log says was run, and compares: does the same code give the same losses, artifact and score?

    python records/replay.py RUN [KNOB=value ...]        (./run.sh replay RUN: a run id, or the path of a log)

What is run comes from the log: every knob that decides the result, and the number of processes (all on this machine).
Knobs given here replace the log's, such as DATA_PATH where the data lie elsewhere. What the log does not decide: the
new log `<run_id>-replay-<time>.jsonl` and its artifact go to LOG_DIR (logs) and ARTIFACT_DIR, and nothing is sent
anywhere. Exit status: 0 the same, 1 something differs, 2 it cannot be run.

A CPU repeats a budget in steps (MAX_WALLCLOCK_SECONDS=0) bit for bit, on the same packages and kind of processor; a GPU
with DETERMINISTIC=1. A budget in seconds ends after another number of steps each time.
"""
from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.evidence import readable
from tools.logs import WRITTEN, InputError, events, file_name, find_log, last, log_folder, pairs, text_of, typed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SCRIPT = Path(__file__).resolve().parents[1] / "train_gpt.py"
GIVEN = {"start": ("code_sha256", "python", "torch", "device", "world", "dtype", "threads", "compile", "attention",
                   "fused"),
         "versions": ("numpy", "sentencepiece", "brotli", "constriction", "triton", "flash-attn"),
         "train_data": ("corpus", "manifest_sha256")}
"""What should be the same before anything runs, by event."""
FOUND = {"train_end": ("steps", "loss_nats"), "artifact": ("sha256",),
         "verdict": ("artifact_bytes", "ledger_sha256", "ladder", "val_loss", "val_bpb")}
"""What is compared."""


def knobs_of(found: Sequence[Mapping[str, Any]], path: Path) -> dict[str, str]:
    """Environment with every knob of the logged run that is part of its result."""
    config = last(found, "config")
    if config is None or last(found, "start") is None:
        raise InputError(f"{path}: no log of train_gpt.py: it names no knobs; give the run's .jsonl")
    if last(found, "verdict") is None:
        raise InputError(f"{path}: the run has no verdict to compare with (unfinished, or it failed)")
    from train_gpt import Config  # a log may come from anyone: no LD_PRELOAD, and nothing else that is no knob
    if not 1 <= int(last(found, "start")["world"]) <= 1024:
        raise InputError(f"{path}: world={last(found, 'start')['world']}: expected a number of processes")
    return {f.name.upper(): text_of(config[f.name])
            for f in dataclasses.fields(Config) if f.name in config and f.name not in WRITTEN}


def places(run_id: str, env: Mapping[str, str]) -> dict[str, str]:
    """Where the replay of a run writes; of the logged run id its name alone, since a log may come from anyone."""
    return {"RUN_ID": f"{file_name(Path(run_id).name)}-replay-{time.strftime('%Y%m%d-%H%M%S')}",
            "LOG_DIR": str(log_folder(env)), "ARTIFACT_DIR": env.get("ARTIFACT_DIR", "")}


def start(env: Mapping[str, str], world: int) -> int:
    """Run the program with this environment on so many processes; its exit status."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}") if world > 1 else ()
    return subprocess.run([sys.executable, *launcher, str(SCRIPT)], env=env).returncode


def differences(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]],
                names: Mapping[str, Sequence[str]]) -> list[tuple[str, Any, Any]]:
    """(event.field, value then, value now) of what is not the same; a run without such an event has None."""
    pairs = [(f"{event}.{name}", *((last(found, event) or {}).get(name) for found in (then, now)))
             for event, fields in names.items() for name in fields]
    return [pair for pair in pairs if pair[1] != pair[2]]


def losses(found: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Logged training loss, nats a token, by step."""
    return {e["step"]: e["loss_nats"] for e in found if e["event"] == "train"}


def report(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> tuple[list[str], bool]:
    """Lines for the reader, and whether the results are the same."""
    lines = [f"  made with another {name}: {a} then, {b} now" for name, a, b in differences(then, now, GIVEN)]
    wrong = [f"  {name} differs: {a} then, {b} now" for name, a, b in differences(then, now, FOUND)]
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
    bpb = [last(found, "verdict")["val_bpb"] for found in (then, now)]
    lines += wrong or [f"  the same: {len(a)} logged losses, " + ", ".join(
        f"{event}.{name}" for event, fields in FOUND.items() for name in fields)]
    return [f"val_bpb {bpb[0]:.6f} then, {bpb[1]:.6f} now ({bpb[1] - bpb[0]:+.6f})", *lines], not wrong


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """Exit status, see above."""
    try:
        if not arguments:
            raise InputError("expected RUN [KNOB=value ...]: a run id, or the path of a log")
        path, given = find_log(arguments[0], log_folder(env)), pairs(arguments[1:])
        then = events(path)
        knobs = {**readable(path, knobs_of, then, path), **places(str(last(then, "start").get("run_id")), env),
                 **typed(given)}
        clean = {name: value for name, value in env.items() if name.lower() not in WRITTEN}
        status = start({**clean, **knobs}, int(last(then, "start")["world"]))
        if status:
            raise InputError(f"the run ended with status {status}, see above")
        lines, same = readable(path, report, then, events(Path(knobs["LOG_DIR"]) / f"{knobs['RUN_ID']}.jsonl"))
    except (InputError, OSError) as error:
        print(f"replay.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(["", *lines]))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
