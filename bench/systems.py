"""The published systems of records/ side by side: small on a CPU, with predicted bytes at full shape.

    ./run.sh bench systems [NAME ...]        default: every folder of records/ with a config.env; 300 steps each

What makes a system itself (topology, optimizer, schedule, quantiser, how it adapts) is its config.env; shape and data
are a quarter of the record's width and the demo's text for all of them (SMALL), scored on the first 20,000 ids, so the
scores compare ways, not sizes. Steps are fixed: a shared machine's clock would decide otherwise. One seed: differences
of a hundredth are noise. `./run.sh data demo` comes first unless DATA_PATH is set; other knobs of the environment apply
to all (SEED=1, ITERATIONS=200).
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import train_gpt as tg
from bench.common import ROOT, Row, show, small_data
from tools import knobs, launch, predict
from tools.common import program
from tools.logs import events, last

SMALL = dict(
    VOCAB_SIZE="1024", CASEOPS_ENABLED="0", MODEL_DIM="128", NUM_HEADS="4", NUM_KV_HEADS="2", ROPE_DIMS="16",
    TRAIN_SEQ_LEN="256", TRAIN_BATCH_TOKENS="2048", MICRO_BATCH_TOKENS="2048", EVAL_SEQ_LEN="256",
    VAL_BATCH_TOKENS="65536", MAX_WALLCLOCK_SECONDS="0", WARMUP_STEPS="1", MUON_MOMENTUM_WARMUP_STEPS="30",
    EMA_DECAY="0.95", DIAGNOSTIC_EVALS="ema,quantized,sliding", TTT_LORA_RANK="8", TTT_LORA_ALPHA="16",
    TTT_LORA_LR="0.004", PHASED_TTT_PREFIX_DOCS="20", TTT_CHUNK_TOKENS="8192", TRAIN_LOG_EVERY="100")
"""What a CPU needs of every system: the demo's text and width, time constants of 300 steps."""


def ran(knobs: Mapping[str, str], logs: Path) -> list[dict[str, Any]]:
    """The events of a run of train_gpt.py. `UserError` with its last line if it fails."""
    env = dict(os.environ) | knobs | {"LOG_DIR": str(logs)}
    done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=env, text=True, capture_output=True)
    tg.require(done.returncode == 0, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return events(logs / f"{knobs['RUN_ID']}.jsonl")


def measured(name: str, more: Mapping[str, str], logs: Path) -> Row:
    """One row of the table."""
    system = launch.config_env(ROOT / "records" / name, {knob.name for knob in knobs.read()})
    code_bytes = len(tg.shipped_source(Path(tg.__file__)))
    predicted = code_bytes + sum(predict.predicted_bytes(tg, tg.Config.from_env(system), code_bytes).values())
    log = ran({**system, **SMALL, **more, "RUN_ID": name}, logs)
    verdict, phases = last(log, "verdict"), [e for e in log if e["event"] == "phase"]
    scores = dict(verdict["diagnostic_evals"])
    seconds = {e["name"]: e["phase_seconds"] for e in phases}
    return {"name": name, "ema": scores.get("ema"), "quantized": scores.get("quantized"),
            "sliding": scores.get("sliding"), "as it scores": verdict["val_bpb"],
            "weight bytes": verdict["weight_bytes"], "parameters": verdict["parameters"],
            "train s": seconds.get("train"), "eval s": verdict["eval_seconds"],
            "full shape, predicted bytes": predicted}


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """The table and one line of JSON."""
    here = sorted(path.parent.name for path in (ROOT / "records").glob("*/config.env"))
    for name in arguments:
        tg.require(name in here, f"{name}: no such system; expected some of {', '.join(here)}")
    more = {"ITERATIONS": "300"} | \
        {name.upper(): env[name.upper()] for name in tg.Config.__dataclass_fields__ if name.upper() in env}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        more |= small_data(Path(folder), env, 10 ** 9, 20_000)
        for name in arguments or here:
            rows.append(measured(name, more, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    show(f"the systems, {more['ITERATIONS']} steps of {SMALL['TRAIN_BATCH_TOKENS']} tokens", rows)
    return 0


if __name__ == "__main__":
    sys.exit(program(lambda arguments: main(arguments, os.environ), "bench"))
