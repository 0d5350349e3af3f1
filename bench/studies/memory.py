"""Predicted against measured memory of whole runs on a CPU, at several sizes.

    ./run.sh bench memory

Each size is a run of two steps in a process of its own, on made-up data; measured is its largest resident set.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import train_gpt as tg
from bench.common import ROOT, Row, made_up_ids, show, text_dataset, write_shard
from tools.common import program
from tools.logs import events, last

SIZES: dict[str, dict[str, str]] = {
    "d256 L3, 2,048 tokens": {},
    "d256 L3, 16,384 tokens": {"MICRO_BATCH_TOKENS": "16384", "TRAIN_BATCH_TOKENS": "16384"},
    "d512 L2, 4,096 tokens": {"MODEL_DIM": "512", "NUM_HEADS": "8", "NUM_KV_HEADS": "4", "NUM_LAYERS": "2",
                              "PARALLEL_START_LAYER": "1", "XSA_LAST_N": "2", "MICRO_BATCH_TOKENS": "4096",
                              "TRAIN_BATCH_TOKENS": "4096"},
    "d256 L3, 64 documents of rank 32": {"TTT_LORA_RANK": "32", "TTT_CONTEXT": "recompute", "TTT_BATCH_SIZE": "64"},
}
"""Changes of the demo."""


def measure(name: str, knobs: dict[str, str]) -> Row:
    """One run: the stretch that was predicted to take most, its bytes, and what the process took.

    Raises `UserError` where the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = {"PRESET": "demo", "DEVICE": "cpu", "DTYPE": "float32", "THREADS": "1", "MAX_WALLCLOCK_SECONDS": "0",
               "ITERATIONS": "2", "DIAGNOSTIC_EVALS": "", "GPTQ_CALIBRATION_BATCHES": "1", "LOG_DIR": folder,
               "RUN_ID": "r", "QUANT": "sdclip", "VOCAB_SIZE": "512", **knobs,
               **{name.upper(): value for name, value in text_dataset(Path(folder)).items()}}
        write_shard(Path(folder) / "fineweb_val_000000.bin", made_up_ids(np.full(96, 400), 512))
        child = ("import resource, subprocess, sys; done = subprocess.run([sys.executable, 'train_gpt.py'], "
                 "stdout=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); "
                 "sys.exit(done.returncode)")
        done = subprocess.run([sys.executable, "-c", child], env={**os.environ, **env}, text=True, cwd=ROOT,
                              stdout=subprocess.PIPE)
        tg.require(done.returncode == 0, f"{name}: the run fails with status {done.returncode}, see above")
        told = last(events(Path(folder) / "r.jsonl"), "resources")
    sizes = {k.removesuffix("_mib"): v for k, v in told.items() if k.endswith("_mib") and "_" not in k[:-4]}
    sizes |= {"shared_sgd": told["shared_sgd_mib"]} if "shared_sgd_mib" in told else {}
    sizes = {k: v for k, v in sizes.items() if k not in ("disk", "checkpoint")}
    most = max(sizes, key=sizes.get)
    unit = 20 if sys.platform == "darwin" else 10
    measured = int(done.stdout.split()[-1]) >> unit
    return {"size": name, "largest": most, "predicted_mib": sizes[most], "measured_mib": measured,
            "predicted_over_measured": sizes[most] / measured}


def main(arguments: Sequence[str]) -> int:
    """The table."""
    tg.require(not arguments, f"{' '.join(arguments)}: expected no argument")
    rows = []
    for size, changes in SIZES.items():
        rows.append(measure(size, changes))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    show("peak memory of a run", rows)
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "bench"))
