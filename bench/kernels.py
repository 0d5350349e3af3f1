"""Every kernel of section 5 beside its reference: time of forward and backward, what it achieves, its largest error.

What has a reference stands in STRETCHES; beside it runs what `pick_kernels` takes on this machine. Attention has every
name of ATTENTION. The MLP is measured with or without a kernel of its own, and so are the loss with its product, and
what follows attention. Then tiles, lengths of attention's pieces, and the rotary embedding by themselves.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

import train_gpt as tg
from bench.common import Machine, Row, in_turns, made_up_ids, row, tried, web_lengths

STRETCHES: dict[str, Callable[..., Tensor]] = {
    "rms_norm": tg.rms_norm, "mlp": tg.plain_mlp,
    "head_nats": lambda x, head, targets, cap: tg.softcapped_cross_entropy(F.linear(x, head), targets, cap),
    "gates": lambda y, v, logits: tg.exclusive(y, v) * torch.sigmoid(logits).unsqueeze(-1)}
"""References: the norm, products with what follows them, and what follows attention."""
ATTENTIONS = ("fa3", "fa4", "varlen", "sdpa")


class Inputs(NamedTuple):
    """What a kernel is called with, and what a call costs at least."""
    moving: list[Tensor]
    """Arguments that get a gradient."""
    fixed: tuple[Any, ...]
    flops: float
    """Of forward and backward, twice the forward's."""
    grad: Tensor
    """Gradient of the output, of its size."""
    moved: float
    """Bytes that forward and backward must read or write once each."""


def batch_of(cfg: tg.Config, rows: int, device: torch.device) -> tg.Batch:
    """Rows of training length cut from documents of web-like lengths."""
    ids = made_up_ids(web_lengths(max(64, rows * cfg.train_seq_len // 100)), cfg.vocab_size)
    cut = [ids[i * cfg.train_seq_len:(i + 1) * cfg.train_seq_len + 1] for i in range(rows)]
    return tg.make_batch(cut, rows, cfg.train_seq_len).to(device)


def inputs_of(field: str, cfg: tg.Config, batch: tg.Batch, draw: Callable[..., Tensor]) -> Inputs:
    """Inputs of one field of `Kernels` at the shape that training, or scoring a chunk, calls it with."""
    rows, tokens, targets = len(batch.ids), batch.ids.numel(), batch.targets.flatten()
    if field == "rms_norm":
        x = draw(tokens, cfg.model_dim)
        return Inputs([x], (), 0.0, torch.randn_like(x), 5.0 * x.itemsize * x.numel())  # x y | x y' x'
    if field == "gates":
        shape = rows, cfg.train_seq_len
        y, v = (draw(*shape, heads, cfg.head_dim) for heads in (cfg.num_heads, cfg.num_kv_heads))
        return Inputs([y, v, draw(*shape, cfg.num_heads)], (), 0.0, torch.randn_like(y),
                      y.itemsize * (5.0 * y.numel() + 3.0 * v.numel()))  # y v z | y v z' y' v'
    if field in STRETCHES:
        x, width = draw(tokens, cfg.model_dim), cfg.mlp_dim if field == "mlp" else cfg.vocab_size
        weights = [draw(width, cfg.model_dim), *([draw(cfg.model_dim, width)] if field == "mlp" else [])]
        weights = [(w * 3 / cfg.model_dim ** 0.5).detach().requires_grad_() for w in weights]
        flops = 6.0 * x.numel() * width * len(weights)
        # x y | x y' x', and one activation of that width kept in between where the backward does not make it anew
        moved = x.itemsize * (5.0 * x.numel() + 2.0 * tokens * width * (field == "mlp"))
        grad, fixed = (torch.randn_like(x), (cfg.mlp_slope,)) if field == "mlp" else \
            (torch.rand(tokens).to(x), (targets, cfg.logit_softcap))
        return Inputs([x, *weights], fixed, flops, grad, moved)
    if field == "attention":  # 4 N H FLOPs a key that a query sees
        q = draw(rows, cfg.train_seq_len, cfg.num_heads, cfg.head_dim)
        k, v = (draw(rows, cfg.train_seq_len, cfg.num_kv_heads, cfg.head_dim) for _ in "kv")
        moved = q.itemsize * (5.0 * q.numel() + 3.0 * (k.numel() + v.numel()))  # q y | q y' q'; k | k k'
        return Inputs([q, k, v], (batch, {}), 12 * q.numel() * float((batch.positions + 1.0).mean()),
                      torch.randn_like(q), moved)
    raise AssertionError(f"Kernels.{field}: bench/kernels.py knows no inputs for it")


def attend(kernel: tg.Attention, q: Tensor, k: Tensor, v: Tensor, batch: tg.Batch, prepared: dict[str, Any]) -> Tensor:
    """An attention kernel as one function; what it has to know of the batch is made once."""
    if kernel.name not in prepared:
        prepared[kernel.name] = kernel.prepare(batch)
    return kernel.run(q, k, v, prepared[kernel.name])


def both_ways(kernel: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    """The output, and the gradients of the moving inputs for the output's gradient `inputs.grad`."""
    y = kernel(*inputs.moving, *inputs.fixed)
    return y.detach(), *torch.autograd.grad(y, inputs.moving, inputs.grad.to(y.dtype).view_as(y))


def largest_error(kernel: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Inputs) -> float:
    """Largest error of output or a gradient as a share of its largest value, against the reference in fp32."""
    exact = inputs._replace(moving=[t.detach().float().requires_grad_() for t in inputs.moving])
    pairs = zip(both_ways(kernel, inputs), both_ways(reference, exact))
    return max(float((a.float() - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


def variants_of(field: str, reference: Callable[..., Tensor], cfg: tg.Config, run: tg.Run
                ) -> Iterator[dict[str, Callable[..., Tensor]]]:
    """What there is of a field: reference, reference as compiled, the twin that this run takes; every attention by
    itself, since one replaces the other."""
    picked = tg.pick_kernels(cfg, run)
    if field != "attention":
        twin = getattr(picked, field, None) or reference
        yield {"reference": reference, **({"reference, compiled": run.compiled(reference)} if run.compiles else {}),
               **({"picked": run.compiled(twin)} if twin is not reference else {})}
        return
    for name in ATTENTIONS:
        try:
            kernel = tg.pick_attention(name, run.device, run.dtype)
        except tg.UserError as error:
            run.log("left_out", kernel=name, reason=str(error))
            continue
        yield {name + " (picked)" * (name == picked.attention.name): functools.partial(attend, kernel)}


def drawn(run: tg.Run) -> Callable[..., Tensor]:
    """Normal values of any shape that want a gradient; the same in every process."""
    torch.manual_seed(0)
    return lambda *shape: torch.randn(shape, device=run.device).to(run.dtype).requires_grad_()


def timed_rows(title: str, variants: dict[str, Callable[..., Tensor]], inputs: Inputs, run: tg.Run, roof: Machine,
               repeats: int, **more: Any) -> list[Row]:
    """A row for forward and backward of each variant, measured in turns."""
    times = in_turns({name: functools.partial(both_ways, kernel, inputs) for name, kernel in variants.items()}, run,
                     repeats, least=0.02)
    return [row(f"{title}: {name}", times[name], roof, inputs.flops, inputs.moved,
                **{key: of[name] for key, of in more.items()}) for name in variants]


def kernel_rows(cfg: tg.Config, run: tg.Run, roof: Machine, repeats: int = 7) -> list[Row]:
    """Rows by kernel; errors are taken on the first two rows of the batch."""
    draw, sdpa = drawn(run), functools.partial(attend, tg.SDPA)
    few, many = (batch_of(cfg, count, run.device) for count in (2, cfg.micro_batch_tokens // cfg.train_seq_len))
    rows = []
    for field, reference in {**STRETCHES, "attention": sdpa}.items():
        small, inputs = (inputs_of(field, cfg, batch, draw) for batch in (few, many))
        for variants in variants_of(field, reference, cfg, run):
            errors = {name: largest_error(kernel, reference, small) for name, kernel in variants.items()}
            rows += timed_rows(field, variants, inputs, run, roof, repeats, error=errors)
    return rows


def tile_rows(cfg: tg.Config, run: tg.Run, roof: Machine, repeats: int = 7) -> list[Row]:
    """The kernel of the MLP, forward and backward, with each tile that its autotuner would try."""
    import triton
    draw, tokens, dim, width = drawn(run), cfg.micro_batch_tokens, cfg.model_dim, cfg.mlp_dim
    narrow, up, down, pre, out, post = (draw(*shape).detach() for shape in (
        (tokens, dim), (width, dim), (dim, width), *[(tokens, width)] * 3))
    tiles, product = mlp_tiles(), triton.jit(tg.mlp_kernel)

    def measured(name: str, tile: Any, backward: bool) -> list[Row]:
        grid = (triton.cdiv(tokens, tile.kwargs["ROWS"]) * triton.cdiv(width, tile.kwargs["COLS"]),)
        call = functools.partial(product[grid], narrow, *((down, pre) if backward else (up, out)), out, post, tokens,
                                 width, dim, cfg.mlp_slope, backward, **tile.kwargs, num_warps=tile.num_warps,
                                 num_stages=tile.num_stages)
        return [row(name, in_turns({"": call}, run, repeats, least=0.02)[""], roof, 2.0 * tokens * width * dim,
                    narrow.nbytes + (3.0 if backward else 2.0) * pre.nbytes)]

    rows = []
    for tile, way in itertools.product(tiles, ("forward", "backward")):
        name = " ".join(map(str, ("tile", *tile.kwargs.values(), tile.num_warps, tile.num_stages, way)))
        rows += tried(name, measured, name, tile, way == "backward")
    return rows


def mlp_tiles() -> list[Any]:
    """The configurations among which the autotuner of the MLP's kernel chooses; nothing is registered in torch."""
    import triton
    with mock.patch.object(triton, "autotune") as autotune, mock.patch.object(torch.library, "custom_op"):
        tg.triton_mlp.__wrapped__()
    return autotune.call_args.args[0]


def attention_rows(cfg: tg.Config, run: tg.Run, roof: Machine, repeats: int = 7) -> list[Row]:
    """Every attention by itself, forward and backward: rows cut into so many pieces, heads 64 and 128 wide."""
    rows, count, seq_len = [], cfg.micro_batch_tokens // cfg.train_seq_len, cfg.train_seq_len
    tokens = count * seq_len

    def measured(name: str, pieces: int, width: int) -> list[Row]:
        attention = functools.partial(attend, tg.pick_attention(name, run.device, run.dtype))
        heads, ids = max(1, cfg.model_dim // width), np.full(tokens + 1, 2)
        wide = dataclasses.replace(cfg, model_dim=heads * width, num_heads=heads, num_kv_heads=heads // 2 or 1)
        ids[np.linspace(1, tokens, pieces - count, endpoint=False).astype(int)] = tg.BOS_ID
        batch = tg.make_batch([ids[i:i + seq_len + 1] for i in range(0, tokens, seq_len)], count, seq_len)
        inputs = inputs_of("attention", wide, batch.to(run.device), drawn(run))
        return timed_rows(f"{pieces} x {width}", {name: attention}, inputs, run, roof, repeats)

    several = [n for n in (193, 257, 513, 769) if n <= tokens // 8] or [count + 1]
    for name, width, pieces in itertools.product(ATTENTIONS, (64, 128), several):
        rows += tried(f"{pieces} x {width}: {name}", measured, name, pieces, width)
    return rows


def rotary_rows(cfg: tg.Config, run: tg.Run, roof: Machine, repeats: int = 7) -> list[Row]:
    """Queries normed and turned, forward and backward: cosines computed where they are used, or read from a table."""
    batch, model = batch_of(cfg, cfg.micro_batch_tokens // cfg.train_seq_len, run.device), tg.shapes_of(cfg)
    model.kernels = tg.Kernels(tg.Attention("none", lambda batch: None, lambda *_: None))
    q = drawn(run)(len(batch.ids), cfg.train_seq_len, cfg.num_heads, cfg.head_dim)
    inputs = Inputs([q], (batch, model.mask_and_rotary(batch, run.dtype)), 0.0, torch.randn_like(q), 5.0 * q.nbytes)
    return timed_rows("rotary", {
        "inline": run.compiled(
            lambda q, batch, _: tg.rotate(tg.rms_norm(q), *model.mask_and_rotary(batch, run.dtype)[1:])),
        "table": run.compiled(lambda q, _, made: tg.rotate(tg.rms_norm(q), *made[1:]))}, inputs, run, roof, repeats)
