"""Where the milliseconds of a training step go, by kind of kernel, from a torch.profiler trace (part of bench/all.py).

On a GPU the trace's kernels, copies and gaps add up to the step; on a CPU, which has no kernels, operators stand for
them with the time that no operator inside has taken. What the update launches is told by when it was launched.
"""
from __future__ import annotations

import collections
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench.common import Row, in_turns, timed
from bench.step import UPDATE, TrainStep

Event = Mapping[str, Any]
"""A complete event ("ph": "X") of a Chrome trace; times in microseconds."""
KINDS = (
    ("copies", r"^memcpy|^memset|aten::(copy_|fill_|zero_|cat|clone|_to_copy|contiguous)$|catarray|fillfunctor|"
               r"copy_kernel"),
    ("cross-entropy", r"cross_?entropy|nll_loss|log_softmax|logsumexp|tanh|softcap"),
    ("attention", r"flash|fmha|attention|attn|softmax"),
    ("gemm", r"gemm|nvjet|cutlass|xmma|cublas|splitk|triton_tem|mlp|aten::(mm|bmm|addmm|baddbmm|_?linear|mkldnn\w*)$"),
    ("norm, elementwise", r"triton|elementwise|vectorized|unrolled|reduce|norm|lerp|multi_tensor|foreach|embedding|"
                          r"index|scatter|gather|sort|scan|^aten::"),
)
"""Kinds by the first pattern that is found in a kernel's name (lower case); the rest is `other`."""


def kind_of(name: str, updates: bool) -> str:
    """The kind of a kernel, given whether the update launched it."""
    kind = next((kind for kind, pattern in KINDS if re.search(pattern, name.lower())), "other")
    return {"gemm": "newton-schulz"}.get(kind, "optimizer, ema") if updates else kind


def gpu_work(events: Sequence[Event]) -> list[tuple[str, float, float, float]]:
    """(name, start, length, moment of its launch) of everything that ran on the GPU."""
    launched = {e["args"]["correlation"]: e["ts"] for e in events
                if e["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})}
    return [(e["name"], e["ts"], e["dur"], launched.get(e.get("args", {}).get("correlation"), e["ts"]))
            for e in events if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]


def cpu_work(events: Sequence[Event]) -> list[tuple[str, float, float, float]]:
    """The same of operators on the CPU, each with the time that is its own."""
    own, work = {}, []
    open_ones: dict[Any, list[int]] = collections.defaultdict(list)
    for i, e in sorted(enumerate(events), key=lambda pair: (pair[1]["ts"], -pair[1]["dur"])):
        if e["cat"] == "cpu_op":
            stack = open_ones[e["tid"]]
            while stack and events[stack[-1]]["ts"] + events[stack[-1]]["dur"] <= e["ts"]:
                stack.pop()
            if stack:
                own[stack[-1]] -= e["dur"]
            own[i] = e["dur"]
            stack.append(i)
    for i, length in own.items():
        work.append((events[i]["name"], events[i]["ts"], length, events[i]["ts"]))
    return work


def analyze(events: Sequence[Event], steps: int, wall_ms: float, on_gpu: bool) -> list[Row]:
    """Rows by kind (ms a step, share of the step's `wall_ms`, calls), then the ten costliest kernels.

    `explained` is the share of all kinds but `other`; what no kernel fills is `gaps`.
    """
    events = [e for e in events if e.get("ph") == "X" and "cat" in e and "dur" in e]
    updates = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["cat"] == "user_annotation" and e["name"] == UPDATE]
    spent: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    busy, end = 0.0, 0.0
    for name, start, length, launch in sorted((gpu_work if on_gpu else cpu_work)(events), key=lambda work: work[1]):
        kind = kind_of(name, any(a <= launch <= b for a, b in updates))
        spent[kind, name].append(length)
        busy, end = busy + max(0.0, start + length - max(start, end)), max(end, start + length)  # streams may overlap
    if not on_gpu:  # operators lie inside each other: their own times have no gaps to find
        busy = sum(map(sum, spent.values()))

    def row(name: str, lengths: Sequence[float]) -> Row:
        ms = sum(lengths) / steps / 1e3
        return {"name": name, "ms": ms, "share": ms / wall_ms, "calls": len(lengths) / steps}

    kinds = sorted({kind for kind, _ in spent})
    rows = [row(kind, [t for (k, _), ts in spent.items() if k == kind for t in ts]) for kind in kinds]
    rows.sort(key=lambda r: -r["ms"])
    gaps, known = wall_ms - busy / steps / 1e3, sum(r["share"] for r in rows if r["name"] != "other")
    rows += [{"name": "gaps", "ms": gaps, "share": gaps / wall_ms}, {"name": "step", "ms": wall_ms, "share": 1.0},
             {"name": "explained", "share": known}]
    top = sorted(spent.items(), key=lambda pair: -sum(pair[1]))[:10]
    return rows + [row(f"  {kind}: {name[:72]}", lengths) for (kind, name), lengths in top]


def profile_rows(step: TrainStep, repeats: int = 5) -> list[Row]:
    """Profile some steps; shares are of the profiled steps, followed by a step without the profiler."""
    run, batches = step.run, step.data.steps()
    plain = in_turns({"step": lambda: step.whole(batches)}, run, repeats, warmup=3)["step"]
    times: dict[str, list[float]] = {}
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.is_cuda else [])]) as trace:
        timed(times, "step", run, step.whole, batches, calls=repeats)
    batches.close()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return [*analyze(events, repeats, 1e3 * times["step"][0], run.is_cuda),
            {"name": "step without the profiler", "ms": 1e3 * plain.median}]
