"""Everything that costs time, measured against its floor: tables on the screen, figures in one JSON file.

    ./run.sh bench [SECTION ...]       all sections, or some of: step profile kernels loader artifact
    ./run.sh bench --gpu               one GPU, under 8 minutes: the CUDA tests, then all sections at the record's shape

Knobs are environment variables as for train_gpt.py; the shape is the record's on a GPU and the demo's on a CPU. Parts
are timed in turns; medians and quartiles are given. Under torchrun the section `step` has the collectives, too. With
--gpu a section that would begin too late is left out and named.
"""
from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train_gpt as tg
from bench.common import Row, machine, made_up_val, setting, show, web_lengths
from bench.evaluation import way_rows
from bench.kernels import kernel_rows
from bench.step import TrainStep, loader_rows, step_rows
from bench.studies.profiling import profile_rows
from bench.studies.shrink import shrink_rows
from tools.common import program

SECTIONS = ("step", "profile", "kernels", "loader", "artifact")
"""In order of worth, should time run out."""


def cuda_tests(paths: Sequence[str], limit: float) -> dict[str, Any]:
    """The tests marked `cuda` in a process of their own: exit status, seconds, the last lines of what they said."""
    start = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "-m", "cuda", *paths],
                              cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=limit)
        status, said = done.returncode, (done.stdout + done.stderr).splitlines()
    except subprocess.TimeoutExpired:
        status, said = 1, [f"stopped after {limit:.0f} s"]
    return {"status": status, "seconds": time.perf_counter() - start, "tail": said[-40:]}


def measure(cfg: tg.Config, run: tg.Run, sections: Sequence[str], out: Path, deadline: float, repeats: int = 7,
            report: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run sections until `deadline` (of `time.perf_counter`); rank 0 shows their tables and keeps `out` up to date."""
    roof = machine(run)
    report = {**(report or {}), "machine": roof._asdict(), "torch": torch.__version__, "world": run.world,
              "threads": torch.get_num_threads(), "dtype": str(run.dtype), "compiled": run.compiles,
              "tokens_a_rank": cfg.micro_batch_tokens, "knobs": vars(cfg), "tables": {}, "left_out": []}

    def artifact() -> list[Row]:
        rows, blob = shrink_rows(cfg, run, roof, min(3, repeats))
        lengths = np.minimum(web_lengths(64 if run.is_cuda else 16), cfg.eval_seq_len)
        val = made_up_val(lengths, cfg.vocab_size)
        return rows + way_rows(("recompute", "cache"), tg.unpack(blob), val, cfg, run, roof, min(3, repeats))

    train_step = functools.lru_cache(maxsize=1)(lambda looped: TrainStep(cfg, run, looped))  # one's graphs at a time
    bodies: dict[str, Callable[[], list[Row]]] = {}
    for looped in ([True, False] if cfg.num_loops else [False]):
        loop = f"loop {'on' if looped else 'off'}"
        bodies[f"step, {loop}"] = lambda on=looped: step_rows(train_step(on), roof, repeats)
        bodies[f"profile, {loop}"] = lambda on=looped: profile_rows(train_step(on), repeats)
        bodies.setdefault("kernels", lambda: kernel_rows(cfg, run, roof, repeats))
        bodies.setdefault("loader", lambda: loader_rows(cfg, run, roof, repeats))
    bodies["artifact"] = artifact
    for title, body in bodies.items():
        if title.split(",")[0] not in sections:
            continue
        if not title.startswith(("step", "profile")):
            train_step.cache_clear()
        start = time.perf_counter()
        if start > deadline:
            report["left_out"].append(title)
        else:
            try:
                report["tables"][title] = body()
                if run.is_main:
                    show(f"{title} ({time.perf_counter() - start:.0f} s)", report["tables"][title])
            except torch.OutOfMemoryError:
                report["left_out"].append(f"{title}: out of memory")
        if run.is_main:
            partial = out.with_suffix(".part")
            partial.write_text(json.dumps(report, indent=1, default=str))
            partial.replace(out)
        if run.is_cuda:
            torch.cuda.empty_cache()
    return report


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """Exit status: 0, or that of the CUDA tests."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(prog="./run.sh bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of {' '.join(SECTIONS)}; all if none")
    parser.add_argument("--gpu", action="store_true", help="the CUDA tests, then every section at the record's shape")
    parser.add_argument("--out", type=Path, default=Path("logs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}.json")
    asked = parser.parse_args(arguments)
    unknown = sorted(set(asked.sections) - {*SECTIONS, "all"})
    tg.require(not unknown, f"{' '.join(unknown)}: no such section; expected some of {' '.join(SECTIONS)}")
    sections = [name for name in SECTIONS if name in asked.sections or set(asked.sections) <= {"all"}]
    if asked.gpu:
        tg.require(torch.cuda.is_available() and env.get("DEVICE") != "cpu", "--gpu: torch sees no CUDA device here; "
                   "./run.sh bench without it measures this CPU")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"cuda_tests": cuda_tests(["tests"], 150)} if asked.gpu else {}
    for line in report.get("cuda_tests", {}).get("tail", ()):
        print(line)
    with setting(env) as (cfg, run):
        report = measure(cfg, run, sections, asked.out, start + (340 if asked.gpu else math.inf), report=report)
        if run.is_main:
            print("".join(f"\nleft out: {title}" for title in report["left_out"]))
            print(f"{asked.out}  ({time.perf_counter() - start:.0f} s)")
    return report.get("cuda_tests", {}).get("status", 0)


if __name__ == "__main__":
    sys.exit(program(lambda arguments: main(arguments, os.environ), "bench"))
