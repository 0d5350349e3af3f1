"""What adaptation costs: milliseconds a chunk step, token-forwards a target, and the schedule of 50,000 documents.

    ./run.sh bench evaluation ARTIFACT [TARGETS]      knobs as for train_gpt.py, as environment variables

Scores the first TARGETS (default 20,000) targets of the validation set in four ways, in turns within this process,
so that a busy machine slows all of them alike: without adaptation; the straightforward way (the whole window of each
chunk is run again, with logits and losses for all of it); TTT_CONTEXT=recompute; TTT_CONTEXT=cache. The last table
deals documents of web-like lengths to 8 ranks and predicts seconds from the step costs just measured.
"""
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import train_gpt as tg
from bench.common import Machine, Row, made_up_val, program, row, show, summary, web_lengths


class WholeWindow(tg.Scorer):
    """Logits and losses of every position of a window, of which the last ones are kept."""

    def nats(self, model: tg.GPT, hidden: Tensor, targets: Tensor, numbers: Tensor, w: tg.Weights
             ) -> tuple[Tensor, Tensor]:
        """As `Scorer.nats`, without its savings."""
        whole = torch.nn.functional.pad(targets, (model.seen - targets.size(1), 0), value=tg.BOS_ID)
        logits = w.linear("head", None, model.window).flatten(0, -2)
        nats = model.kernels.cross_entropy(logits, whole.flatten(), model.cfg.logit_softcap)
        nats = nats.view(len(targets), -1)[:, -targets.size(1):].flatten()
        return nats.detach(), nats


class Straightforward(tg.GPT):
    """A model that remembers the hidden states of its last forward, for `WholeWindow`."""

    def hidden(self, *arguments: object, **named: object) -> Tensor:
        """As `GPT.hidden`."""
        self.window = super().hidden(*arguments, **named)
        self.seen = self.window.size(1)
        return self.window


def first_targets(val: tg.ValData, count: int) -> tg.ValData:
    """The first `count` targets of the stream."""
    n = min(count, val.num_targets) + 1
    return tg.ValData(val.ids[:n], val.starts[val.starts < n - 1], val.target_bytes[:n - 1])


def run_one(kind: type[tg.GPT], scorer: type[tg.Scorer], artifact: tg.Artifact, val: tg.ValData, cfg: tg.Config,
            run: tg.Run) -> dict[str, float]:
    """Seconds, chunk steps, token-forwards a target and val_bpb of one evaluation."""
    model = kind(artifact.model).to(run.device)
    model.kernels = tg.pick_kernels(cfg, run)
    tg.load_tensors(model, artifact.tensors)
    forwards = steps = 0
    plain = model.hidden

    def counted(batch: tg.Batch, plan: object, w: tg.Weights, past: tg.NoPast = tg.NO_PAST) -> Tensor:
        """The forward, counting tokens and calls."""
        nonlocal forwards, steps
        out = plain(batch, plan, w, past)
        forwards, steps = forwards + out.size(0) * out.size(1), steps + 1
        return out

    model.hidden = counted
    run.synchronize()
    start = time.perf_counter()
    score = tg.adapted_score(model, val, cfg, run, scorer(val, cfg, run))[0]
    run.synchronize()
    took = time.perf_counter() - start
    return dict(seconds=took, steps=steps, ms_per_step=1000 * took / steps, forwards_per_target=forwards / score.tokens,
                val_bpb=score.val_bpb)


def chunk_rows(artifact: tg.Artifact, cfg: tg.Config, run: tg.Run, roof: Machine, documents: int,
               repeats: int = 3) -> list[Row]:
    """Rows of a chunk step with recomputed and with cached context; documents are made up, of up to a window."""
    cfg = dataclasses.replace(cfg, ttt="lora", phased_ttt_num_phases=0, ngram_tilt_enabled=False)
    val = made_up_val(np.minimum(web_lengths(documents), cfg.eval_seq_len), artifact.model.vocab_size)
    ways = {context: dataclasses.replace(cfg, ttt_context=context) for context in ("recompute", "cache")}
    rounds = [{way: run_one(tg.GPT, tg.Scorer, artifact, val, c, run) for way, c in ways.items()}
              for _ in range(repeats + 1)][1:]
    rows = []
    for way in ways:
        found, steps = rounds[0][way], rounds[0][way]["steps"]
        forwards = found["forwards_per_target"] * val.num_targets / steps
        # With fixed weights the backward has the gradients of activations alone: as much as the forward.
        flops = 2 * forwards * tg.estimate_flops(artifact.model, tg.layer_plan(artifact.model, True),
                                                 cfg.eval_seq_len / 2)
        rows.append(row(f"chunk step, {way}", summary([r[way]["seconds"] / steps for r in rounds]), roof, flops,
                        forwards_a_target=found["forwards_per_target"],
                        targets_s=val.num_targets / summary([r[way]["seconds"] for r in rounds]).median))
    return rows


def main() -> int:
    """Four ways in turns, then the schedule."""
    tg.require(len(sys.argv) > 1 and Path(sys.argv[1]).is_file(), f"evaluation {' '.join(sys.argv[1:2])}: expected the "
               f"path of an artifact, such as logs/demo.bin")
    artifact = tg.unpack(Path(sys.argv[1]).read_bytes(), sys.argv[1])
    stored = {**dataclasses.asdict(artifact.model), "preset": artifact.preset}
    cfg = dataclasses.replace(tg.Config.from_env(os.environ, stored)[0], ngram_tilt_enabled=False)
    with tg.Run(cfg, {}, log=False) as run:
        val = first_targets(tg.ValData.load(cfg, run), int(sys.argv[2]) if len(sys.argv) > 2 else 20_000)
        lora = dataclasses.replace(cfg, ttt="lora", phased_ttt_num_phases=0)
        ways = {"no adaptation": (tg.GPT, tg.Scorer, dataclasses.replace(cfg, ttt="none")),
                "straightforward": (Straightforward, WholeWindow, dataclasses.replace(lora, ttt_context="recompute")),
                "recompute": (tg.GPT, tg.Scorer, dataclasses.replace(lora, ttt_context="recompute")),
                "cache": (tg.GPT, tg.Scorer, dataclasses.replace(lora, ttt_context="cache"))}
        print(f"{val.num_targets} targets, {len(val.starts)} documents, chunks {cfg.ttt_chunk_size}, rank "
              f"{cfg.ttt_lora_rank}, window {cfg.eval_seq_len}, {run.device}, {torch.get_num_threads()} threads")
        table = {name: run_one(*way[:2], artifact, val, way[2], run) for name, way in ways.items()}
    show("four ways", [{"name": name, **found} for name, found in table.items()])
    lengths = web_lengths(50_000)
    plans = {}
    for chunks in ("48", "2000:48,8000:96,24000:256,1024"):
        wide = dataclasses.replace(tg.Config(), ttt_chunk_size=chunks)
        dealt = tg.deal(tg.plan_jobs(np.arange(50_000), lengths, wide, 8), 8)
        loads = [sum(job.cost for job in jobs) for jobs in dealt]
        steps = [sum(len(job.edges) - 1 for job in jobs) for jobs in dealt]
        plans[chunks] = dict(steps_of_a_rank=max(steps), waits=1 - sum(loads) / 8 / max(loads),
                             tokens_of_a_rank=max(loads))
        print(f"50,000 documents, 8 ranks, chunks {chunks}: {max(steps):,} steps on the costliest rank; the mean rank "
              f"waits {100 * plans[chunks]['waits']:.2f} % of the time")
    print(json.dumps(dict(ways=table, schedule=plans)))
    return 0


if __name__ == "__main__":
    program(main)
