"""Runs of the demo with knobs drawn at random: each must end in a verdict under its cap, or be refused before training.

    ./run.sh bench soak [RUNS] [--first N]       default: 200 runs, from draw 0

Draw N gives a fifth of the knobs, on average, other values than the demo's, and one draw in ten a value too many that
makes the combination impossible. Each run is a process of its own with one thread: the demo's model, eight steps or
three seconds of them, the first documents of the demo's text (`./run.sh data demo` if DATA_PATH is not set). A run that
ends otherwise is repeated with fewer knobs until none can be left out, and printed as a command. Exit status 1 if there
was one.
"""
from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import train_gpt as tg
from bench.common import ROOT, show, small_data
from tools.common import program
from tools.logs import events, last

LEFT_ALONE = frozenset("preset run_id log_dir eval_only data_dir data_path tokenizer_path caseops_enabled vocab_size "
                       "device compile resume dist_timeout_seconds".split())
"""Where things are; what would make every run a refusal, or (compile) minutes long; what needs other packages."""

FOR_A_GPU = frozenset("triton varlen fa3 fa4".split())
"""Values that a CPU refuses."""

TEXTS = {"checkpoint_every": ("1", "3", "x"), "diagnostic_evals": ("", "ema", "quantized,sliding", "plain"),
         "ttt_lora_on": ("q,v", "mlp", "head,o,k", ""),
         "ngram_rules": ("3:0.5:1", "2:0.5:1,6:0.9:4", "0:1:1")}
"""Values of the knobs that are text, good and bad."""

BASE = dict(PRESET="demo", OMP_NUM_THREADS="1", WARMUP_STEPS="1", TRAIN_LOG_EVERY="4", GPTQ_CALIBRATION_BATCHES="2",
            EVAL_SECONDS_BUDGET="30", MUON_MOMENTUM_WARMUP_STEPS="4", GPTQ_RESERVE_SECONDS="1", BIGRAM_BUCKETS="8192")


def drawn(number: int) -> dict[str, str]:
    """The knobs of draw `number`, as environment variables."""
    rng = np.random.default_rng(number)
    cfg, types = tg.Config(**tg.PRESETS["demo"]), typing.get_type_hints(tg.Config)
    choices = {name: typing.get_args(kind) for name, kind in types.items() if typing.get_origin(kind) is typing.Literal}
    knobs = dict(BASE, **(dict(MAX_WALLCLOCK_SECONDS="4") if rng.random() < 0.5 else
                          dict(MAX_WALLCLOCK_SECONDS="0", ITERATIONS="8")))
    share, impossible = rng.uniform(0.02, 0.4), rng.random() < 0.1
    for field in rng.permutation(np.array(dataclasses.fields(tg.Config), dtype=object)):
        name, value = field.name, getattr(cfg, field.name)
        if name in LEFT_ALONE or name.upper() in knobs or rng.random() > share:
            continue
        if name in choices:
            new = rng.choice([value for value in map(str, choices[name]) if value not in FOR_A_GPU])
        elif types[name] is bool:
            new = not value
        elif types[name] is str:
            new = rng.choice(TEXTS[name])
        else:
            scale = rng.choice([0, 0.25, 0.5, 0.9, 1.1, 2, 4], p=[0.1, 0.1, 0.25, 0.1, 0.1, 0.25, 0.1])
            scale = min(scale, 2) if types[name] is int else scale  # four times the width is sixteen times the work
            new = types[name](value * scale if value else rng.choice([0.1, 1, 3, 50]))
        wanted = knobs | {name.upper(): tg.show(new)}
        try:
            tg.Config.from_env(wanted)
        except tg.UserError:
            if not impossible:
                continue
            return wanted
        knobs = wanted
    return knobs


def outcome(knobs: Mapping[str, str], folder: Path, seconds: float = 900.0) -> tuple[str, str]:
    """How a run ends: (verdict | refused | diverged | what is wrong with it, the line that tells of it)."""
    with tempfile.TemporaryDirectory(dir=folder) as logs:
        env = {k: v for k, v in os.environ.items() if k.lower() not in {f.name for f in dataclasses.fields(tg.Config)}}
        command = [sys.executable, str(ROOT / "train_gpt.py")]
        try:
            done = subprocess.run(command, env=env | knobs | {"LOG_DIR": logs, "RUN_ID": "soak"}, text=True,
                                  capture_output=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return "hangs", f"more than {seconds:g} s"
        log = Path(logs) / "soak.jsonl"
        found = events(log) if log.exists() else []
        verdict, line = last(found, "verdict"), (done.stderr.strip().splitlines() or [""])[-1]
        if done.returncode == 0 and verdict:
            over = verdict["artifact_bytes"] > verdict["cap_bytes"]
            return ("over the cap" if over else "verdict" if verdict["val_bpb"] else "no score"), \
                f"{verdict['val_bpb']} {verdict['artifact_bytes']}"
        told = line.startswith("train_gpt.py: ") and "Traceback" not in done.stderr
        if done.returncode == 2 and told:
            return ("refused late" if any(e["event"] == "train" for e in found) else "refused"), line
        return ("diverged" if done.returncode == 3 and told else f"crashed ({done.returncode})"), line


GOOD = ("verdict", "refused", "diverged")


def fewest(knobs: Mapping[str, str], data: Mapping[str, str], end: str, folder: Path) -> dict[str, str]:
    """The knobs without those that the run ends in `end` without."""
    knobs = dict(knobs)
    for name in [name for name in knobs if name not in BASE]:
        fewer = {k: v for k, v in knobs.items() if k != name}
        if outcome(fewer | data, folder)[0] == end:
            knobs = fewer
    return {k: v for k, v in knobs.items() if BASE.get(k) != v or k == "PRESET"}


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """Exit status 1 if a run crashed, hung, went over its cap or was refused after training."""
    parser = argparse.ArgumentParser(prog="./run.sh bench soak", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="?", type=int, default=200, help="how many runs (default 200)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first draw (default 0)")
    asked = parser.parse_args(arguments)
    ends, bad, start = Counter(), [], time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = small_data(folder, env, 400_000, 4_000)
        for number in range(asked.first, asked.first + asked.runs):
            knobs = drawn(number)
            end, line = outcome(knobs | data, folder)
            ends[end] += 1
            print(f"{number:5d} {end:14s} {line}", flush=True)
            if end not in GOOD:
                few = fewest(knobs, data, end, folder)
                bad.append({"name": str(number), "end": end, "knobs": " ".join(f"{k}={v}" for k, v in few.items())})
                print(f"      {bad[-1]['knobs']}", flush=True)
    show(f"{asked.runs} runs from draw {asked.first}, {time.perf_counter() - start:.0f} s",
         [{"name": end, "runs": count} for end, count in ends.most_common()])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(program(lambda arguments: main(arguments, os.environ), "bench"))
