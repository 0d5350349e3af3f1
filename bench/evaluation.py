"""What adaptation costs: milliseconds a chunk step, token-forwards a target, and the schedule of 50,000 documents.

    ./run.sh bench evaluation ARTIFACT [TARGETS]      knobs as for train_gpt.py, as environment variables

Scores the first TARGETS (default 20,000) targets of the validation set without adaptation, with TTT_CONTEXT=recompute
and with TTT_CONTEXT=cache. Then documents of web-like lengths are dealt to 8 ranks. The part `chunks` of bench/all.py
needs no artifact.
"""
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import train_gpt as tg
from bench.common import Machine, Row, machine, made_up_val, row, show, summary, timed, web_lengths
from tools import predict
from tools.common import program


def first_targets(val: tg.ValData, count: int) -> tg.ValData:
    """The first `count` targets of the stream."""
    n = min(count, val.num_targets) + 1
    return tg.ValData(val.ids[:n], val.starts[val.starts < n - 1], val.target_bytes[:n - 1])


WAYS = {"no adaptation": dict(ttt="none"), "recompute": dict(ttt="lora", ttt_context="recompute"),
        "cache": dict(ttt="lora", ttt_context="cache")}


def score_once(way: str, artifact: tg.Artifact, val: tg.ValData, cfg: tg.Config, run: tg.Run
               ) -> tuple[int, int, tg.Score]:
    """Forwards (of chunks or of windows), tokens in them, and the score of one evaluation."""
    cfg = dataclasses.replace(cfg, phased_ttt_num_phases=0, ngram_base_beta=0.0, **WAYS[way])
    model = tg.GPT(artifact.model).to(run.device)
    model.kernels = tg.pick_kernels(cfg, run)
    tg.load_tensors(model, artifact.tensors)
    tokens, plain = [], model.forward

    def counted(batch: tg.Batch, plan: object, w: tg.Weights, past: tg.NoCache = tg.NO_CACHE) -> Tensor:
        """The forward, counting."""
        out = plain(batch, plan, w, past)
        tokens.append(out.size(0) * out.size(1))
        return out

    model.forward = counted
    score = tg.adapted_score(model, tg.Scorer(val, cfg, run))[0]
    return len(tokens), sum(tokens), score


def way_rows(artifact: tg.Artifact, val: tg.ValData, cfg: tg.Config, run: tg.Run, roof: Machine) -> list[Row]:
    """Rows of one step (chunk or window) of each way."""
    times: dict[str, list[float]] = {}
    each = predict.forward_flops(artifact.model, tg.unroll_layers(artifact.model, True), cfg.eval_seq_len / 2)
    rows = []
    for way in WAYS:
        steps, tokens, score = timed(times, way, run, score_once, way, artifact, val, cfg, run)
        # With fixed weights a backward has the gradients of activations alone: as much again as the forward.
        flops = each * tokens / steps * (1 if way == "no adaptation" else 2)
        rows.append(row(f"step, {way}", summary([t / steps for t in times[way]]), roof, flops, steps=steps,
                        forwards_a_target=tokens / score.tokens, targets_s=score.tokens / summary(times[way]).median,
                        val_bpb=score.val_bpb))
    return rows


def chunk_rows(cfg: tg.Config, run: tg.Run, roof: Machine, repeats: int = 7) -> list[Row]:
    """Rows of one chunk step, scored and learned from, by documents side by side x window; the first call of a shape
    (`first_s`) compiles or loads kernels. Then the line through them: a step costs as much as `fixed_tokens` tokens."""
    size, rows = cfg.ttt_chunk_size, []
    model = tg.build_model(cfg, run)
    model.requires_grad_(False)
    with torch.no_grad():
        base = tg.Weights(model, run.dtype)
    most, longest = cfg.ttt_batch_size, cfg.eval_seq_len
    for documents, window in ((most, longest), (most, longest * 15 // 32), (-(-most // 8), longest * 15 // 64), (1, 0)):
        window = max(size, window)
        shape = dataclasses.replace(cfg, eval_seq_len=window, ttt="lora", ttt_context="recompute", eval_stride=0)
        edges = tuple(range(window - size, window + (repeats + 1) * size, size))
        val = made_up_val(np.full(documents, edges[-1] - 1), cfg.vocab_size)
        batch = tg.DocumentBatch(tuple(range(documents)), edges, 1)
        steps = tg.adapt_and_score(model, base, batch, tg.Scorer(val, shape, run), tg.EvalBudget(1, shape, run))
        times: dict[str, list[float]] = {}
        for name in ("first", *["step"] * repeats):  # each has a successor, so that the documents go on and learn
            timed(times, name, run, next, steps)
        steps.close()
        flops = 2 * documents * window * predict.forward_flops(cfg, tg.unroll_layers(cfg, True), window / 2)
        rows.append(row(f"{documents} x {window}", summary(times["step"]), roof, flops, first_s=times["first"][0],
                        tokens=documents * window))
    parts = np.array([(1 / r["ms"], r["tokens"] / r["ms"]) for r in rows])  # relative errors count alike
    a, b = np.linalg.lstsq(parts, np.ones(len(rows)), rcond=None)[0]
    return [*rows, {"name": "a x steps + b x tokens", "a_ms": a, "b_us": 1e3 * b, "fixed_tokens": a / b}]


def main(arguments: Sequence[str]) -> int:
    """The ways, then the schedule."""
    tg.require(bool(arguments) and Path(arguments[0]).is_file(), f"evaluation {' '.join(arguments[:1])}: expected the "
               f"path of an artifact, such as logs/demo.bin")
    count = arguments[1] if len(arguments) > 1 else "20000"
    tg.require(count.isdecimal() and int(count) > 0, f"{count}: expected a number of targets, 1 or more")
    artifact = tg.unpack(Path(arguments[0]).read_bytes(), arguments[0])
    cfg = tg.on_its_data(tg.Config.from_env(os.environ, artifact.knobs), artifact.validation, os.environ)
    with tg.Run(cfg, {}, log=False) as run:
        val = first_targets(tg.ValData.load(cfg, run), int(count))
        rows = way_rows(artifact, val, cfg, run, machine(run))
        show(f"{val.num_targets} targets, {len(val.starts)} documents, chunks {cfg.ttt_chunk_size}, rank "
             f"{cfg.ttt_lora_rank}, window {cfg.eval_seq_len}, {run.device}, {torch.get_num_threads()} threads", rows)
    plans = []
    for chunks in (48, 256):
        wide = dataclasses.replace(tg.Config(), ttt_chunk_size=chunks)
        batches = tg.plan_batches(np.arange(50_000), web_lengths(50_000), wide, 8)
        dealt = tg.assign_to_ranks(batches, 8)
        loads = [sum(job.cost for job in jobs) for jobs in dealt]
        steps = max(sum(len(job.edges) - 1 for job in jobs) for jobs in dealt)
        plans.append({"name": f"chunks of {chunks}", "steps_of_a_rank": steps,
                      "waits": 1 - sum(loads) / 8 / max(loads), "tokens_of_a_rank": max(loads)})
    show("50,000 documents, 8 ranks, by chunks: the costliest rank, and the share of time the mean one waits", plans)
    print(json.dumps(dict(ways=rows, schedule=plans)))
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "bench"))
