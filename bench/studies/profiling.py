"""Where the milliseconds of a training step go, by kind of kernel, from a torch.profiler trace (part of bench/all.py).

On a GPU kernels, copies and gaps add up to the step; on a CPU operators stand for kernels, each with the time that no
operator inside it took. What the update launches is told from the rest by when it was launched.
"""
from __future__ import annotations

import collections
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile

from bench.common import Row, in_turns, timed
from bench.step import UPDATE, TrainStep

KINDS = (
    ("copies", r"^memcpy|^memset|aten::(copy_|fill_|zero_|cat|clone|_to_copy|contiguous)$|catarray|fillfunctor|"
               r"copy_kernel"),
    ("cross-entropy", r"cross_?entropy|nll_loss|nats|log_softmax|logsumexp|tanh|softcap"),
    ("attention", r"flash|fmha|attention|attn|softmax"),
    ("gemm", r"gemm|nvjet|cutlass|xmma|cublas|splitk|triton_tem|mlp|aten::(mm|bmm|addmm|baddbmm|_?linear|mkldnn\w*)$"),
    ("norm, elementwise", r"triton|elementwise|vectorized|unrolled|reduce|norm|lerp|multi_tensor|foreach|embedding|"
                          r"index|scatter|gather|sort|scan|^aten::"),
)
"""Kinds by the first pattern that is found in a kernel's name (lower case); the rest is `other`."""


class Work(NamedTuple):
    """One execution of a kernel; times in microseconds."""
    name: str
    length: float
    launched: float


def kind_of(name: str, updates: bool) -> str:
    """The kind of a kernel, given whether the update launched it."""
    kind = next((kind for kind, pattern in KINDS if re.search(pattern, name.lower())), "other")
    return {"gemm": "newton-schulz"}.get(kind, "optimizer, ema") if updates else kind


def gpu_work(events: Sequence[Mapping[str, Any]]) -> tuple[list[Work], list[tuple[float, float]]]:
    """From a Chrome trace: all that ran on the GPU, and (begin, end) of each update on the CPU."""
    events = [e for e in events if e.get("ph") == "X" and "cat" in e]
    launched = {e["args"]["correlation"]: e["ts"] for e in events
                if e["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})}
    return ([Work(e["name"], e["dur"], launched.get(e.get("args", {}).get("correlation"), e["ts"]))
             for e in events if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")],
            [(e["ts"], e["ts"] + e["dur"]) for e in events if e["cat"] == "user_annotation" and e["name"] == UPDATE])


def analyze(work: Sequence[Work], updates: Sequence[tuple[float, float]], steps: int, wall_ms: float) -> list[Row]:
    """Rows by kind (ms a step, share of the step's `wall_ms`, calls), then the ten costliest kernels.

    `gaps` is what no kernel fills, `explained` the share of all that has a kind.
    """
    spent: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for name, length, launched in work:
        spent[kind_of(name, any(a <= launched <= b for a, b in updates)), name].append(length)

    def row(name: str, lengths: Sequence[float]) -> Row:
        ms = sum(lengths) / steps / 1e3
        return {"name": name, "ms": ms, "share": ms / wall_ms, "calls": len(lengths) / steps}

    rows = [row(kind, [t for (k, _), ts in spent.items() if k == kind for t in ts]) for kind in {k for k, _ in spent}]
    rows.sort(key=lambda r: -r["ms"])
    gaps = wall_ms - sum(r["ms"] for r in rows)
    rows += [{"name": "gaps", "ms": gaps, "share": gaps / wall_ms}, {"name": "step", "ms": wall_ms, "share": 1.0},
             {"name": "explained", "share": sum(r["share"] for r in rows if r["name"] != "other")}]
    top = sorted(spent.items(), key=lambda pair: -sum(pair[1]))[:10]
    return rows + [row(f"  {kind}: {name[:72]}", lengths) for (kind, name), lengths in top]


def profile_rows(step: TrainStep, repeats: int = 5) -> list[Row]:
    """Profile some steps; shares are of the profiled steps, followed by a step without the profiler."""
    run, batches = step.run, step.data.steps()
    plain = in_turns({"step": lambda: step.whole(batches)}, run, repeats)["step"]
    times: dict[str, list[float]] = {}
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.is_cuda else [])]) as trace:
        timed(times, "step", run, step.whole, batches, calls=repeats)
    batches.close()
    if run.is_cuda:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            trace.export_chrome_trace(str(path))
            work, updates = gpu_work(json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"])
    else:
        work = [Work(e.name, e.self_cpu_time_total, e.time_range.start) for e in trace.events() if e.name != UPDATE]
        updates = [(e.time_range.start, e.time_range.end) for e in trace.events() if e.name == UPDATE]
    return [*analyze(work, updates, repeats, 1e3 * times["step"][0]),
            {"name": "step without the profiler", "ms": 1e3 * plain.median}]
