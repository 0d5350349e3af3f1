"""Every kernel of section 5 beside its reference: time of forward and backward, what it achieves, its largest error.

The kernels are found by the fields of `Kernels` (whose defaults are the references), by what `pick_kernels` takes on
this machine, and by the names of ATTENTION; a field without inputs here is an error, so that a new one is added. The
MLP, which a kernel may take as a whole, is measured with or without one; and so is the loss with its product.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as tg
from bench.common import Machine, Row, in_turns, made_up_ids, row, web_lengths

STRETCHES: dict[str, Callable[..., Tensor]] = {
    "mlp": lambda x, up, down, slope: F.linear(F.leaky_relu(F.linear(x, up), slope).square(), down),
    "head_nats": lambda x, head, targets, cap: tg.softcapped_cross_entropy(F.linear(x, head), targets, cap)}
"""References of kernels that fuse products with what follows them."""


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
                ) -> dict[str, Callable[..., Tensor]]:
    """What there is of a field: reference, reference as compiled, the twin that this run takes; every attention."""
    picked = tg.pick_kernels(cfg, run)
    if field != "attention":
        twin = getattr(picked, field, None) or reference
        return {"reference": reference, **({"reference, compiled": run.compiled(reference)} if run.compiles else {}),
                **({"picked": run.compiled(twin)} if twin is not reference else {})}
    found = {}
    for name in ("fa4", "fa3", "varlen", "sdpa"):
        try:
            kernel = tg.pick_attention(name, run.device, run.dtype)
            found[name + " (picked)" * (name == picked.attention.name)] = functools.partial(attend, kernel)
        except tg.UserError as error:
            run.log("left_out", kernel=name, reason=str(error))
    return found


def kernel_rows(cfg: tg.Config, run: tg.Run, roof: Machine, repeats: int = 7) -> list[Row]:
    """Rows by kernel; errors are taken on the first two rows of the batch."""
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=run.device).to(run.dtype).requires_grad_()

    torch.manual_seed(0)
    few, many = (batch_of(cfg, count, run.device) for count in (2, cfg.micro_batch_tokens // cfg.train_seq_len))
    sdpa = functools.partial(attend, tg.SDPA)
    rows = []
    for field, reference in {**tg.Kernels._field_defaults, **STRETCHES, "attention": sdpa}.items():
        if callable(reference):
            variants = variants_of(field, reference, cfg, run)
            small = inputs_of(field, cfg, few, draw)
            errors = {name: largest_error(kernel, reference, small) for name, kernel in variants.items()}
            inputs = inputs_of(field, cfg, many, draw)
            times = in_turns({name: functools.partial(both_ways, kernel, inputs) for name, kernel in variants.items()},
                             run, repeats, least=0.02)
            rows += [row(f"{field}: {name}", times[name], roof, inputs.flops, inputs.moved, error=errors[name])
                     for name in variants]
    return rows
