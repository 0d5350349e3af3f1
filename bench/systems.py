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
from bench.common import ROOT, Row, program, show, small_data

sys.path.insert(0, str(ROOT / "records"))

from tools.logs import events, last  # noqa: E402

SMALL = dict(
    VOCAB_SIZE="1024", CASEOPS_ENABLED="0", MODEL_DIM="128", NUM_HEADS="4", NUM_KV_HEADS="2", ROPE_DIMS="16",
    TRAIN_SEQ_LEN="256", TRAIN_BATCH_TOKENS="2048", MICRO_BATCH_TOKENS="2048", EVAL_SEQ_LEN="256",
    VAL_BATCH_TOKENS="65536", MAX_WALLCLOCK_SECONDS="0", WARMUP_STEPS="1", MUON_MOMENTUM_WARMUP_STEPS="30",
    EMA_DECAY="0.95", EVAL_LADDER="ema,quantized,sliding", TTT_LORA_RANK="8", TTT_LORA_ALPHA="16",
    TTT_LORA_LR="0.004", PHASED_TTT_PREFIX_DOCS="20", GLOBAL_TTT_CHUNK_TOKENS="8192", TTT_CHUNK_TOKENS="8192",
    TTT_BATCH_SEQS="8", GLOBAL_TTT_BATCH_SEQS="8", PREQUANT_TTT_BATCH_SEQS="8", TRAIN_LOG_EVERY="100")
"""What a CPU needs of every system: the demo's text and width, time constants of 300 steps."""


def knobs_of(folder: Path) -> dict[str, str]:
    """The lines of a config.env."""
    lines = (folder / "config.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def ran(knobs: Mapping[str, str], logs: Path, *arguments: str) -> list[dict[str, Any]]:
    """The events of a run of train_gpt.py. `UserError` with its last line if it fails."""
    env = dict(os.environ) | knobs | {"LOG_DIR": str(logs)}
    done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py"), *arguments], env=env, text=True,
                          capture_output=True)
    tg.require(done.returncode == 0, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return events(logs / f"{knobs['RUN_ID']}.jsonl") if not arguments else [{"event": "text", "text": done.stdout}]


def measured(name: str, given: Mapping[str, str], logs: Path) -> Row:
    """One row of the table."""
    system = knobs_of(ROOT / "records" / name)
    plan = ran({**system, "RUN_ID": name}, logs, "--check")[0]["text"]
    predicted = next(line for line in plan.splitlines() if " predicted " in line).split("total_bytes=")[1].split()[0]
    found = ran({**system, **SMALL, **given, "RUN_ID": name}, logs)
    verdict, phases = last(found, "verdict"), [e for e in found if e["event"] == "phase"]
    ladder = dict(verdict["ladder"])
    last_way = list(ladder)[-1]
    seconds = {e["name"]: e["phase_seconds"] for e in phases}
    return {"name": name + (" (illegal)" if verdict.get("illegal") else ""), "ema": ladder.get("ema"),
            "quantized": ladder.get("quantized"), "sliding": ladder.get("sliding"),
            "as it scores": ladder[last_way], "way": last_way, "weight bytes": verdict["weight_bytes"],
            "parameters": verdict["parameters"], "train s": seconds.get("train"), "eval s": verdict["eval_seconds"],
            "full shape, predicted bytes": int(predicted)}


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """The table and one line of JSON."""
    here = sorted(path.parent.name for path in (ROOT / "records").glob("*/config.env"))
    for name in arguments:
        tg.require(name in here, f"{name}: no such system; expected some of {', '.join(here)}")
    given = {"ITERATIONS": "300"} | \
        {name.upper(): env[name.upper()] for name in tg.Config.__dataclass_fields__ if name.upper() in env}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        given |= small_data(Path(folder), env, 10 ** 9, 20_000)
        for name in arguments or here:
            rows.append(measured(name, given, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    show(f"the systems, {given['ITERATIONS']} steps of {SMALL['TRAIN_BATCH_TOKENS']} tokens", rows)
    return 0


if __name__ == "__main__":
    program(lambda: main(sys.argv[1:], os.environ))
