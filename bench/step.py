"""The training step part by part against its floor, and the data loader by itself (sections of bench/all.py).

One micro-batch a rank. Parts are timed with the device waited for, `step` runs as training does. Floors: products and
attention by `predict.forward_flops`; bytes as if every group of neighbouring passes over activations were one kernel.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

import train_gpt as tg
from bench.common import Machine, Row, in_turns, made_up_ids, peak_mib, row, summary, timed, tried, web_lengths
from bench.kernels import ATTENTIONS
from tools import predict

UPDATE = "update"
"""Annotation, for a profiler, around the optimizer and the average of the weights."""


def activation_bytes(cfg: tg.Config, plan: tuple[tg.Layer, ...], tokens: int, size: int) -> float:
    """Bytes a forward moves, activations of `size` bytes each; the backward moves twice as many.

    A visit, in passes over [M, D], [M, kv] and [M, F]: mix and norm 4 D; qkv 2 D + 2 kv; q and k normed and turned
    2 D + 2 kv; attention 2 D + 2 kv; XSA and gate 2 D + kv; o 2 D; residual and norm 4 D; up D + 2 F; down D + F;
    convolutions of k, v and the MLP's input, with a padded copy, 4 D + 8 kv. The head: hidden states, logits written
    once and read once by the loss.
    """
    kv_dim = cfg.num_kv_heads * cfg.head_dim
    visit = 20 * cfg.model_dim + 7 * kv_dim + 3 * cfg.mlp_dim + 4 * (cfg.model_dim + 2 * kv_dim) * (cfg.conv_taps > 0)
    return size * tokens * (len(plan) * visit + cfg.model_dim + 2 * cfg.vocab_size)


def newton_schulz_flops(banks: list[Tensor], steps: int) -> float:
    """steps * (4 m^2 n + 2 m^3) for each matrix, m <= n its sides."""
    sides = [(len(bank), min(bank.shape[1:]), max(bank.shape[1:])) for bank in banks]
    return sum(count * steps * (4 * m * m * n + 2 * m ** 3) for count, m, n in sides)


class TrainStep:
    """A training step whose parts can be called one after the other."""

    def __init__(self, cfg: tg.Config, run: tg.Run, looped: bool) -> None:
        self.cfg, self.run, self.looped, self.plan = cfg, run, looped, tg.unroll_layers(cfg, looped)
        self.data, self.model = tg.TrainData(cfg, run), tg.build_model(cfg, run)
        model, plan = self.model, self.plan
        self.loss = run.compiled(lambda batch: model.total_loss(batch, plan, run.dtype))
        self.optimizer, self.ema = tg.ShardedOptimizer(self.model, cfg, run), tg.Ema(self.model, cfg.ema_decay)
        self.checkpoints, self.clock = tg.Checkpoints(
            self.model, self.optimizer, self.ema, self.data, cfg, run), tg.TrainClock(cfg, run)
        self.steps = tg.NEWTON_SCHULZ[cfg.muon_coefficients][:cfg.muon_backend_steps]
        named = list(self.model.named_parameters())
        banks = [p.detach() for name, p in named if tg.route(name).rule == "muon"]
        self.own = [torch.randn_like(bank[:-(-len(bank) // run.world)]) for bank in banks]
        """As many slices of each bank as one rank orthogonalises."""
        self.small = torch.zeros(sum(p.numel() for n, p in named if tg.route(n).rule == "adam"), device=run.device)
        self.weights = sum(p.numel() for _, p in named)
        self.waits: list[float] = []
        self.batch, self.value, self.number = self.model.to_device(self.data.step(0)[0], run), torch.zeros(()), 0

    def forward(self) -> None:
        self.value = self.loss(self.batch) / self.cfg.train_batch_tokens

    def backward(self) -> None:
        self.value.backward()

    def read(self) -> None:
        """Build the next batches, in this thread."""
        self.number += 1
        self.data.step(self.number)

    def collectives(self) -> None:
        """What crosses between ranks in one step: gradients summed, updates gathered."""
        for own in self.own:
            self.run.reduce_scatter(own.new_zeros(self.run.world * len(own), *own.shape[1:]))
            self.run.all_gather(own.to(self.run.dtype))
        self.run.all_reduce(self.small)

    def newton_schulz(self) -> None:
        for own in self.own:
            tg.orthogonalize(own, self.steps, self.run.dtype)

    def update(self) -> None:
        """Collectives, clipping, Muon with its Newton-Schulz, AdamW; at a rate that leaves the weights nearly alone."""
        self.norm = self.optimizer.step(1e-6, self.cfg.muon_momentum)

    def guards(self) -> None:
        """What of a step looks for NaN, signals and due checkpoints; the agreement a GPU has every few steps alone."""
        self.optimizer.skipped += ~torch.isfinite(self.norm)
        self.checkpoints.after(self.number, self.clock)

    def save(self) -> None:
        """What training waits for when a checkpoint is written."""
        self.checkpoints.path.parent.mkdir(parents=True, exist_ok=True)
        self.checkpoints.save(self.number, self.clock)

    def whole(self, batches: Iterator[tuple[int, list[tg.Batch]]]) -> None:
        """As `train` does it, with the next batches read by a thread; notes how long it waited for them."""
        start = time.perf_counter()
        _, ready = next(batches)
        self.waits.append(time.perf_counter() - start)
        for batch in ready:
            self.batch = self.model.to_device(batch, self.run)
            self.forward()
            self.backward()
        with record_function(UPDATE):
            self.update()
            self.ema.update()


def first_call(step: TrainStep) -> Row:
    """Seconds of the first forward and backward, which compile."""
    times: dict[str, list[float]] = {}
    timed(times, "forward", step.run, step.forward)
    timed(times, "backward", step.run, step.backward)
    return {"name": "first call", "s": sum(t for of in times.values() for t in of)}


def block_rows(cfg: tg.Config, run: tg.Run, roof: Machine, repeats: int = 7) -> list[Row]:
    """A looped step of two blocks under each attention: what fails, what compiling takes, and the loss (the same)."""
    rows, small = [], dict(num_layers=2, loop_start=0, loop_end=0, num_loops=2, parallel_start_layer=1)

    def measured(name: str) -> list[Row]:
        step = TrainStep(dataclasses.replace(cfg, **small, attention=name), run, True)
        first = first_call(step)
        times = in_turns({"forward": step.forward, "backward": step.backward}, run, repeats)
        return [row(f"{name}: {part}", sample, roof, first_s=first["s"], loss=float(step.value.detach()))
                for part, sample in times.items()]

    for name in ATTENTIONS:
        rows += tried(name, measured, name)
    return rows


def sgd_rows(cfg: tg.Config, run: tg.Run, roof: Machine, repeats: int = 7) -> list[Row]:
    """A step of the shared weights' SGD on its batch of rows; the first row is what making its graph takes."""
    count = tg.SharedSgd.BATCH_ROWS * cfg.train_seq_len
    model, ids = tg.build_model(cfg, run), made_up_ids(web_lengths(max(64, count // 400)), cfg.vocab_size)
    ids = np.resize(ids, count + 1)
    times: dict[str, list[float]] = {}
    sgd = timed(times, "first", run, tg.SharedSgd, model, ids, cfg, run)
    step = in_turns({"step": lambda: sgd.learn(0, count, 1e-6)}, run, repeats)["step"]
    flops = 3 * count * predict.forward_flops(cfg, tg.unroll_layers(cfg, True), cfg.train_seq_len / 2)
    return [{"name": "graph", "s": times["first"][0]},
            row(f"{tg.SharedSgd.BATCH_ROWS} rows", step, roof, flops, tok_s=count / step.median)]


def step_rows(step: TrainStep, roof: Machine, repeats: int = 7) -> list[Row]:
    """Rows of the parts and of the whole step; the whole's has tokens/s, share of the nominal FLOP/s, peak memory."""
    cfg, run = step.cfg, step.run
    batches = step.data.steps(1)
    parts: dict[str, Callable[[], object]] = {
        "data": step.read, "forward": step.forward, "backward": step.backward, "newton_schulz": step.newton_schulz,
        "optimizer": step.update, "ema": step.ema.update, "guards": step.guards, "checkpoint": step.save,
        "step": lambda: step.whole(batches)}
    if not step.looped:  # what of a step does not shrink with its rows: bench/scaling.py draws the line through both
        few = step.model.to_device(tg.random_batch(-(-step.data.micro_rows // 8), cfg), run)
        parts["forward and backward, few rows"] = lambda: step.loss(few).backward()
    if run.world > 1:
        parts["collectives"] = step.collectives
    times = in_turns(parts, run, repeats)
    batches.close()
    tokens, size = step.batch.ids.numel(), run.dtype.itemsize
    flops = tokens * predict.forward_flops(cfg, step.plan, float((step.batch.positions + 1.0).mean()))
    moved = activation_bytes(cfg, step.plan, tokens, size)
    banks, steps = sum(own.numel() for own in step.own), len(step.steps)
    orthogonal = newton_schulz_flops(step.own, steps)
    # fp32: Muon reads gradient, momentum and weight and writes two of them; AdamW has one moment more.
    updated = 20.0 * banks + 28.0 * step.small.numel()
    counted = {"data": (0.0, 22.0 * tokens), "forward": (flops, moved), "backward": (2 * flops, 2 * moved),
               "newton_schulz": (orthogonal, 0.0), "optimizer": (orthogonal, updated),
               "ema": (0.0, 12.0 * step.weights)}
    if not step.looped:
        share = few.ids.numel() / tokens
        counted["forward and backward, few rows"] = 3 * flops * share, 3 * moved * share
    rows = [row(name, times[name], roof, *counted.get(name, ())) for name in parts if name != "step"]
    floors = {r["name"]: r["floor_ms"] for r in rows}
    rate = 3 * flops / times["step"].median
    whole = row("step", times["step"], roof, 3 * flops, 0.0, tok_s=tokens * run.world / times["step"].median,
                wait_ms=1e3 * summary(step.waits[-repeats:]).median,
                share_of_nominal=roof.nominal and rate / roof.nominal, peak_mib=peak_mib(run))
    whole["floor_ms"] = sum(floors[name] for name in ("forward", "backward", "optimizer", "ema"))
    whole["x_floor"] = whole["ms"] / whole["floor_ms"]
    return [*rows, whole]


def micro_rows(data: tg.TrainData, numbers: Iterator[int]) -> list[np.ndarray]:
    """The ids of the next micro-batch, row by row."""
    first = next(numbers) * data.micro_rows
    return [data.row(first + i) for i in range(data.micro_rows)]


def loader_rows(cfg: tg.Config, run: tg.Run, roof: Machine, repeats: int = 7) -> list[Row]:
    """Batches built from the page cache by one thread: this shape and the record's, in every order of SHUFFLE.

    `rows` reads the ids of a micro-batch, `batch` makes tensors of them, `step` is both.
    """
    rows = []
    for seq_len, tokens in dict.fromkeys([(cfg.train_seq_len, cfg.micro_batch_tokens), (2048, 98_304)]):
        for shuffle in ("window", "none"):
            shape = dataclasses.replace(cfg, train_seq_len=seq_len, micro_batch_tokens=tokens, shuffle=shuffle,
                                        train_batch_tokens=tokens // seq_len * seq_len * run.world)
            data, numbers = tg.TrainData(shape, run), itertools.count()
            ready, count = micro_rows(data, numbers), data.micro_rows * seq_len
            parts = {"rows": functools.partial(micro_rows, data, numbers),
                     "batch": functools.partial(tg.make_batch, ready, len(ready), seq_len),
                     "step": lambda data=data, numbers=numbers: data.step(next(numbers))}
            for name, sample in in_turns(parts, run, repeats, least=0.02).items():
                moved = {"rows": 4.0, "batch": 22.0, "step": 24.0}[name] * count  # bytes a token, read or written once
                rows.append(row(f"{count:,} by {shuffle}: {name}", sample, roof, 0.0, moved,
                                tok_s=count / sample.median))
    return rows
