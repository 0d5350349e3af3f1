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
from pathlib import Path

from bench.common import Row, show, text_dataset

SIZES: dict[str, dict[str, str]] = {
    "d256 L3, 2,048 tokens": {},
    "d256 L3, 16,384 tokens": {"MICRO_BATCH_TOKENS": "16384", "TRAIN_BATCH_TOKENS": "16384"},
    "d512 L6, 8,192 tokens": {"MODEL_DIM": "512", "NUM_HEADS": "8", "NUM_KV_HEADS": "4", "NUM_LAYERS": "6",
                              "MICRO_BATCH_TOKENS": "8192", "TRAIN_BATCH_TOKENS": "8192"},
    "d384 L4, 64 documents of rank 64": {"MODEL_DIM": "384", "NUM_HEADS": "6", "NUM_KV_HEADS": "3", "NUM_LAYERS": "4",
                                         "TTT_LORA_RANK": "64", "TTT_CONTEXT": "recompute", "TTT_BATCH_SIZE": "64"},
}
"""Changes of the demo."""


def measure(name: str, knobs: dict[str, str]) -> Row:
    """One run: the stretch that was predicted to take most, its bytes, and what the process took."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"PRESET": "demo", "DEVICE": "cpu", "DTYPE": "float32", "THREADS": "1", "MAX_WALLCLOCK_SECONDS": "0",
               "ITERATIONS": "2", "EVAL_LADDER": "ema", "GPTQ_CALIBRATION_BATCHES": "1", "LOG_DIR": folder,
               "RUN_ID": "r", "TRELLIS_STATES": "1", "VOCAB_SIZE": "512", **knobs,
               **{name.upper(): value for name, value in text_dataset(Path(folder)).items()}}
        child = ("import resource, subprocess, sys; done = subprocess.run([sys.executable, 'train_gpt.py'], "
                 "stdout=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); "
                 "sys.exit(done.returncode)")
        done = subprocess.run([sys.executable, "-c", child], env={**os.environ, **env}, text=True,
                              cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, check=True)
        lines = [json.loads(line) for line in (Path(folder) / "r.jsonl").read_text().splitlines()]
    (told,) = [line for line in lines if line["event"] == "resources"]
    sizes = {k.removesuffix("_mib"): v for k, v in told.items() if k.endswith("_mib") and "_" not in k[:-4]}
    sizes |= {"shared_sgd": told["shared_sgd_mib"]} if "shared_sgd_mib" in told else {}
    sizes = {k: v for k, v in sizes.items() if k not in ("disk", "checkpoint")}
    most = max(sizes, key=sizes.get)
    unit = 20 if sys.platform == "darwin" else 10
    measured = int(done.stdout.split()[-1]) >> unit
    return {"size": name, "largest": most, "predicted_mib": sizes[most], "measured_mib": measured,
            "predicted_over_measured": sizes[most] / measured}


if __name__ == "__main__":
    show("peak memory of a run", [measure(name, knobs) for name, knobs in SIZES.items()])
