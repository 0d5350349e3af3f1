"""Everything that costs time, measured against its floor: tables on the screen, figures in one JSON file.

    ./run.sh bench [PART ...]          all parts but `tests` and `text`, or some of LIMITS
    ./run.sh bench --gpu [PART ...]    one GPU, one call of ten minutes: every part, in order of worth

Knobs are environment variables as for train_gpt.py; the shape is the record's on a GPU and the demo's on a CPU.
Variants are timed in turns; medians and quartiles are given. Under torchrun `step` has the collectives. With --gpu a
part that exceeds its limit is stopped, one whose limit no longer fits is left out and named. What a part raises is a
row. The parts run in a process of their own: where one hangs or kills it, another process does the rest.
"""
from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import importlib.metadata
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import train_gpt as tg
from bench import kernels
from bench.common import ROOT, Machine, Row, failure, machine, peak_mib, setting, show, small_data, tried
from bench.evaluation import chunk_rows
from bench.step import TrainStep, block_rows, first_call, loader_rows, sgd_rows, step_rows
from bench.studies.profiling import profile_rows
from bench.studies.shrink import shrink_rows
from bench.systems import ran
from tools import predict
from tools.common import program

SECONDS = 575.0
"""Of --gpu in all, so that a call of ten minutes sees its end."""
LIMITS = {"versions": 20.0, "blocks": 90.0, "attention": 40.0, "rotary": 30.0, "kernels": 60.0, "step": 150.0,
          "chunks": 120.0, "quantize": 60.0, "sgd": 60.0, "tests": 100.0, "unlooped": 90.0, "loader": 20.0,
          "text": 100.0}
"""Seconds of each part with --gpu, in order of worth; the last gets all that is left, and this at least."""
PREDICTED: dict[tuple[str, str, str], float | str | None] = {
    ("blocks", "fa3: forward", "ms"): None, ("step", "first call", "s"): None, ("step", "step", "ms"): 129.0,
    ("step", "", "peak_mib"): "train", ("unlooped", "step", "ms"): 88.0, ("chunks", "64 x 2048", "ms"): None,
    ("chunks", "a x steps + b x tokens", "fixed_tokens"): 14_500.0, ("chunks", "", "peak_mib"): 45_670.0,
    ("quantize", "calibrate", "ms"): None, ("quantize", "gptq, cold", "ms"): None, ("quantize", "gptq", "ms"): None,
    ("quantize", "", "peak_mib"): "quantize", ("sgd", "32 rows", "ms"): None, ("sgd", "", "peak_mib"): "shared_sgd"}
"""(part, row or the part, figure): what a model says for the record on one H100 (30 % of its FLOP/s; 11,000 to 18,000
tokens), or a stretch of `predict.predicted_memory`."""


class OutOfTime(BaseException):
    """A part's limit is over; no part of a bench takes it for an error of its own."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` inside after so many seconds; where a driver does not return, the process ends 10 s later."""
    def ring(*_: object) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    if math.isinf(seconds):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + 10, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def version_rows(run: tg.Run) -> list[Row]:
    """What is installed, and whether each attention is to be had."""
    rows: list[Row] = [{"name": name, "version": version} for name, version in (
        ("python", platform.python_version()), ("torch", torch.__version__), ("CUDA", torch.version.cuda))]
    for name in ("triton", "flash_attn_3", "flash-attn-4"):
        rows += tried(name, lambda name: [{"name": name, "version": importlib.metadata.version(name)}], name)
    for name in kernels.ATTENTIONS:
        rows += tried(name, lambda name: [
            {"name": name, "version": tg.pick_attention(name, run.device, run.dtype).name}], name)
    return rows


def cuda_tests(paths: Sequence[str] = ("tests",)) -> list[Row]:
    """The tests marked `cuda` in a process of their own: exit status, then the last lines of what they said."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "-m", "cuda", *paths],
                          cwd=ROOT, capture_output=True, text=True)
    said = (done.stdout + done.stderr).splitlines()
    return [{"name": "exit status", "status": done.returncode}, *({"name": line} for line in said[-40:])]


def text_rows(env: Mapping[str, str], seconds: float) -> list[Row]:
    """Training on real text to a scored artifact: the demo's, or the record's way where DATA_PATH is set."""
    budgets = {"PRESET": "record" if env.get("DATA_PATH") else "demo", "RUN_ID": "text", "DIAGNOSTIC_EVALS": "",
               "MAX_WALLCLOCK_SECONDS": f"{0.3 * min(seconds, 300):.0f}",
               "EVAL_SECONDS_BUDGET": f"{0.2 * min(seconds, 300):.0f}"}
    with tempfile.TemporaryDirectory() as folder:
        log = ran({**budgets, **env, **small_data(Path(folder), env, 50_000_000, 200_000)}, Path(folder) / "logs")
    verdict = next(event for event in log if event["event"] == "verdict")
    kept = ("val_bpb", "steps", "train_loss", "train_seconds", "eval_seconds", "artifact_bytes")
    return [{"name": "verdict", **{key: verdict[key] for key in kept}},
            *({"name": e["name"], "s": e["phase_seconds"]} for e in log if e["event"] == "phase")]


def bodies_of(cfg: tg.Config, run: tg.Run, roof: Machine, env: Mapping[str, str], repeats: int,
              left: Callable[[], float]) -> dict[str, Callable[[], list[Row]]]:
    """What makes the rows of each part; `left`: seconds that are left."""
    def step(looped: bool) -> list[Row]:
        of = TrainStep(cfg, run, looped)
        return [first_call(of), *step_rows(of, roof, 3 * repeats if run.is_cuda else repeats),
                *({**row, "name": f"profile: {row['name']}"} for row in profile_rows(of, repeats))]

    given = (cfg, run, roof, repeats)
    return {"versions": lambda: version_rows(run), "blocks": lambda: block_rows(*given),
            "attention": lambda: kernels.attention_rows(*given), "rotary": lambda: kernels.rotary_rows(*given),
            "kernels": lambda: [*kernels.tile_rows(*given), *kernels.kernel_rows(*given)],
            "step": lambda: step(bool(cfg.num_loops)), "chunks": lambda: chunk_rows(*given),
            "quantize": lambda: shrink_rows(cfg, run, roof, min(3, repeats)), "sgd": lambda: sgd_rows(*given),
            "tests": cuda_tests, "unlooped": lambda: step(False), "loader": lambda: loader_rows(*given),
            "text": lambda: text_rows(env, left())}


def write(report: Mapping[str, Any], out: Path) -> None:
    """The JSON as a whole, or as it was."""
    out.with_suffix(".part").write_text(json.dumps(report, indent=1, default=str))
    out.with_suffix(".part").replace(out)


def measure(cfg: tg.Config, run: tg.Run, env: Mapping[str, str], names: Sequence[str], out: Path,
            until: float = math.inf, repeats: int = 7) -> dict[str, Any]:
    """Measure the parts `names` until `until` (of `time.time`); rank 0 shows their tables and keeps `out` up to date.
    With a limit it goes on with what `out` holds. Ends early where a part leaves the GPU unusable."""
    report: dict[str, Any] = json.loads(out.read_text()) if until < math.inf and out.exists() else dict(
        machine=machine(run)._asdict(), tables={}, spent={}, left_out={}, torch=torch.__version__, world=run.world,
        memory=predict.predicted_memory(tg, cfg, run, 1), threads=torch.get_num_threads(), dtype=str(run.dtype),
        compiled=run.compiles, tokens_a_rank=cfg.micro_batch_tokens, knobs=vars(cfg))
    tables, left = report["tables"], lambda: until - time.time()
    bodies = bodies_of(cfg, run, Machine(**report["machine"]), env, repeats, left)
    for name in names:
        start, limit = time.time(), LIMITS[name] if until < math.inf else math.inf
        if left() < LIMITS[name] or name == "unlooped" and not cfg.num_loops:
            report["left_out"][name] = f"{left():.0f} s are left" if cfg.num_loops else "the same as step: no loop"
            continue
        if run.is_main:
            write({**report, "running": name}, out)
        if run.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            with limited(left() if name == names[-1] else limit):
                tables[name] = bodies[name]()
        except tg.UserError as error:
            report["left_out"][name] = tg.one_line(error)
        except (Exception, OutOfTime) as error:
            tables[name] = [failure(name, error)]
        report["spent"][name] = {"seconds": time.time() - start, "peak_mib": peak_mib(run)}
        if run.is_main:
            write(report, out)
            show(f"{name} ({time.time() - start:.0f} s)", tables.get(name, ()))
        torch._dynamo.reset()  # its graphs hold models
        gc.collect()
        if run.is_cuda:
            run.synchronize()  # raises what no call on this device gets over: another process may
            torch.cuda.empty_cache()
    return report


def compared(report: Mapping[str, Any]) -> list[Row]:
    """Rows of what was predicted, and of the parts' chief figures."""
    rows = []
    for (part, name, key), said in PREDICTED.items():
        named = {"": report["spent"].get(part, {}), **{row["name"]: row for row in report["tables"].get(part, ())}}
        measured = named.get(name, {}).get(key)
        model = report["memory"].get(said, 0) / 2 ** 20 if isinstance(said, str) else said
        rows.append({"name": " ".join(filter(None, (part, name, key))), "measured": measured, "predicted": model,
                     "ratio": measured / model if measured and model else None})
    return rows


def supervised(names: Sequence[str], out: Path, until: float, start: Callable[[Sequence[str]], int]) -> dict[str, Any]:
    """What `out` holds after processes that `start` runs: where a part ends one, another goes on without that part."""
    while names:
        status, report = start(names), json.loads(out.read_text()) if out.exists() else {"tables": {}, "left_out": {}}
        if "running" in report:
            name = report.pop("running")
            report["tables"][name] = [failure(name, f"the process ended with status {status}")]
        rest = [name for name in names if name not in {**report["tables"], **report["left_out"]}]
        tg.require(len(rest) < len(names), f"a process ended with status {status} before its first part, see above")
        if time.time() > until:
            report["left_out"] |= dict.fromkeys(rest, "no time is left")
            rest = []
        write(report, out)
        names = rest
    return report


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """Exit status: 0, or that of the CUDA tests."""
    begun = time.time()
    parser = argparse.ArgumentParser(prog="./run.sh bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {' '.join(LIMITS)}")
    parser.add_argument("--gpu", action="store_true", help="every part at the record's shape, each within a limit")
    parser.add_argument("--out", type=Path, default=Path("logs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}.json")
    parser.add_argument("--until", type=float, default=math.inf, help=argparse.SUPPRESS)  # of a process of --gpu
    asked = parser.parse_args(arguments)
    unknown = sorted(set(asked.parts) - {*LIMITS, "all"})
    tg.require(not unknown, f"{' '.join(unknown)}: no such part; expected some of {' '.join(LIMITS)}")
    names = [name for name in LIMITS if name in asked.parts or
             set(asked.parts) <= {"all"} and (asked.gpu or name not in ("tests", "text"))]
    tg.require(not asked.gpu or torch.cuda.is_available() and env.get("DEVICE") != "cpu", "--gpu: torch sees no CUDA "
               "device here; ./run.sh bench without it measures this CPU")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    if asked.gpu:
        until = str(begun + SECONDS)
        asked.out.unlink(missing_ok=True)
        report = supervised(names, asked.out, float(until), lambda names: subprocess.run(
            [sys.executable, "-m", "bench.all", *names, "--out", str(asked.out), "--until", until]).returncode)
        show("measured, and predicted for the record on an H100", compared(report))
    else:
        with setting(env) as (cfg, run):
            report = measure(cfg, run, env, names, asked.out, asked.until)
    if asked.until == math.inf and env.get("RANK", "0") == "0":
        print("".join(f"\nleft out: {name}: {why}" for name, why in report["left_out"].items()))
        print(f"{asked.out}  ({time.time() - begun:.0f} s)")
    return next((row["status"] for row in report["tables"].get("tests", ()) if "status" in row), 0)


if __name__ == "__main__":
    sys.exit(program(lambda arguments: main(arguments, os.environ), "bench"))
