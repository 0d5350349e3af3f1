"""Our training step against a straightforward one in PyTorch: the same losses, and the ratio of their speeds.

    ./run.sh bench plain_step [STEPS]      knobs as for train_gpt.py, as environment variables; default PRESET=demo

`Plain` is the same model as one would write it down: a matrix each for q, k and v, channel scales on the activations,
autograd through stock functions, Muon one matrix at a time, AdamW and EMA one tensor at a time. Both start at the same
weights and train STEPS (default 50) steps on the same batches, in turns of five steps within this process, so that a
busy machine slows both alike. The text is this Python's standard library, as bytes: nothing has to be downloaded.
Prints both losses, the ratio of tokens per CPU-second (the median of the turns, and their range), and JSON. With
OMP_NUM_THREADS=1 a CPU-second is a second that nobody else had.
"""
import argparse
import json
import math
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt as tg
from tools.common import program

TURN = 5  # steps of one turn


class Plain(nn.Module):
    """The model of `train_gpt.GPT` with the same initial weights, written straightforwardly."""

    def __init__(self, model: tg.GPT) -> None:
        super().__init__()
        self.cfg = model.cfg
        self.matrices = nn.ParameterDict()
        for name, values, _ in model.tensors():
            if name.startswith("blocks."):
                self.matrices[name.replace(".", "_")] = nn.Parameter(values.clone())
        banks = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")
        self.rest = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(p.detach().clone())
                                      for name, p in model.named_parameters() if name not in banks})

    def matrix(self, block: int, name: str) -> Tensor:
        """One matrix [O, I] of one block."""
        return self.matrices[f"blocks_{block}_{name}"]

    def loss(self, batch: tg.Batch, layers: Sequence[tg.Layer], dtype: torch.dtype) -> Tensor:
        """Sum of nats over the batch's targets."""
        cfg, p = self.cfg, {name: value.to(dtype) for name, value in self.rest.items()}
        inside = (batch.positions > 0).unsqueeze(-1)
        e = raw = F.embedding(batch.ids, self.rest["tok_emb"]).to(dtype)
        if cfg.smear_gate_enabled:
            gate = torch.sigmoid(raw[..., :tg.GATE_CHANNELS] @ p["smear_gate"].T)
            e = e + p["smear_lambda"] * gate * raw.roll(1, dims=1) * inside
        if cfg.bigram_buckets:
            last = cfg.bigram_buckets - 1
            bucket = torch.bitwise_xor(36313 * batch.ids, 27191 * batch.ids.roll(1, dims=1)) % last
            rows = F.embedding(torch.where(inside[..., 0], bucket, last), self.rest["bigram_table"]).to(dtype)
            e = e + p["bigram_scale"] * (rows @ p["bigram_proj"].T)
        back = torch.arange(batch.ids.size(1)).view(-1, 1) - torch.arange(batch.ids.size(1))
        mask = ((back >= 0) & (back <= batch.positions.unsqueeze(-1)))[:, None]
        frequencies = cfg.rope_base ** (-torch.arange(0, cfg.rope_dims, 2) / max(1, cfg.rope_dims))
        angles = batch.positions[:, :, None, None] * frequencies
        turn = angles.cos().to(dtype), angles.sin().to(dtype)
        x = x0 = self.norm(e)
        other, outputs = None, []
        for layer in layers:
            i, scale = layer.block, (layer.block + 1) ** (-0.5 * cfg.ln_scale)
            if layer.lanes == "two" and other is None:
                other = x
            if layer.skip_from is not None:
                skip = p["skip_weights"][layer.skip_slot] * outputs[layer.skip_from]
                x = x + skip
                if cfg.skip_gates_enabled:
                    g = torch.sigmoid(p["skip_gates"][layer.skip_slot])
                    x = g * (x - skip) + (1 - g) * skip
            u = p["resid_mix"][i, 0] * x + p["resid_mix"][i, 1] * x0
            n = scale * self.norm(u)
            a = self.attention(n, i, mask, turn, batch.positions, p)
            if layer.lanes == "none":
                x = u + a + self.mlp(scale * self.norm(u + a), i, batch.positions, p)
            elif layer.lanes == "single":
                x = u + a + self.mlp(n, i, batch.positions, p)
            else:
                m = self.mlp(scale * self.norm(other), i, batch.positions, p)
                keep, post = p["parallel_resid_lambdas"][i], p["parallel_post_lambdas"][i]
                x, other = (keep[0] * x + post[0, 0] * a + post[1, 0] * m,
                            keep[1] * other + post[0, 1] * a + post[1, 1] * m)
            outputs.append(x)
        if other is not None:
            x = 0.5 * (x + other)
        logits = (self.norm(x) @ p["tok_emb"].T).float().flatten(0, 1)
        return F.cross_entropy(cfg.logit_softcap * torch.tanh(logits / cfg.logit_softcap), batch.targets.flatten(),
                               ignore_index=tg.IGNORE, reduction="sum")

    @staticmethod
    def norm(x: Tensor) -> Tensor:
        """x / rms(x) over the last axis."""
        return F.rms_norm(x, (x.size(-1),), eps=2.0 ** -23)

    @staticmethod
    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of the first dimensions, halves convention."""
        half = cos.size(-1)
        a, b = x[..., :half], x[..., half:2 * half]
        return torch.cat([a * cos + b * sin, b * cos - a * sin, x[..., 2 * half:]], dim=-1)

    @staticmethod
    def convolved(x: Tensor, taps: Tensor, positions: Tensor) -> Tensor:
        """x [R, T, C] plus taps [K, C] times itself and the tokens before in its document."""
        before = [torch.where((positions >= j).unsqueeze(-1), x.roll(j, dims=1), 0) for j in range(len(taps))]
        return x + sum(tap * value for tap, value in zip(taps, before))

    def attention(self, n: Tensor, i: int, mask: Tensor, turn: tuple[Tensor, Tensor], positions: Tensor,
                  p: dict[str, Tensor]) -> Tensor:
        """Attention of block i on its normed input."""
        cfg, dtype = self.cfg, n.dtype
        q, k, v = (n @ self.matrix(i, name).to(dtype).T for name in "qkv")
        if cfg.conv_taps:
            k, v = (self.convolved(x, taps, positions) for x, taps in zip((k, v), p["kv_conv"][i].chunk(2, dim=-1)))
        q, k, v = (x.unflatten(-1, (-1, cfg.head_dim)) for x in (q, k, v))
        q = self.rotated(self.norm(q), *turn) * p["q_gain"][i].unsqueeze(-1)
        k = self.rotated(self.norm(k), *turn)
        k, v = (t.repeat_interleave(cfg.num_heads // cfg.num_kv_heads, dim=2) for t in (k, v))
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask).transpose(1, 2)
        if i >= cfg.num_layers - cfg.xsa_last_n:
            along = F.normalize(v, dim=-1)
            y = y - (y * along).sum(-1, keepdim=True) * along
        if cfg.attn_gate == "sparse":
            gate = torch.sigmoid(0.5 * (n[..., :tg.GATE_CHANNELS] @ p["gate_weight"][i].T))
            y = y * gate.unsqueeze(-1)
        return p["attn_scale"][i] * (y.flatten(2) @ self.matrix(i, "o").to(dtype).T)

    def mlp(self, n: Tensor, i: int, positions: Tensor, p: dict[str, Tensor]) -> Tensor:
        """MLP of block i on its normed input."""
        if self.cfg.conv_taps:
            n = self.convolved(n, p["mlp_conv"][i], positions)
        hidden = F.leaky_relu(n @ self.matrix(i, "up").to(n.dtype).T, self.cfg.mlp_slope).square()
        return p["mlp_scale"][i] * (hidden @ self.matrix(i, "down").to(n.dtype).T)


class PlainOptimizer:
    """Clipping, AdamW, Muon and EMA, one parameter after the other."""

    def __init__(self, model: Plain, cfg: tg.Config, dtype: torch.dtype) -> None:
        self.cfg, self.model, self.dtype = cfg, model, dtype
        embeddings = [p for name, p in model.rest.items() if name in ("tok_emb", "bigram_table")]
        small = [p for name, p in model.rest.items() if name not in ("tok_emb", "bigram_table")]
        self.peaks = [cfg.tied_embed_lr, cfg.scalar_lr]
        self.adam = torch.optim.AdamW(
            [dict(params=embeddings, weight_decay=cfg.embed_wd), dict(params=small, weight_decay=cfg.adam_wd)],
            betas=(tg.ADAM_BETA1, cfg.beta2), eps=tg.ADAM_EPS, foreach=False)
        self.momenta = {name: torch.zeros_like(p) for name, p in model.matrices.items()}
        self.average = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def step(self, scale: float, momentum: float) -> None:
        """One update from the gradients, which are then gone."""
        cfg = self.cfg
        if cfg.grad_clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip_norm, foreach=False)
        for group, peak in zip(self.adam.param_groups, self.peaks):
            group["lr"] = peak * scale
        self.adam.step()
        for name, p in self.model.matrices.items():
            buffer = self.momenta[name]
            buffer.mul_(momentum).add_(p.grad)
            u = p.grad + momentum * buffer
            if cfg.muon_row_normalize:
                u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
            u = u.to(self.dtype)
            tall = u.size(0) > u.size(1)
            x = u
            if tall:
                x = u.T
            x = x / (x.norm() + 1e-7)
            for a, b, c in tg.NEWTON_SCHULZ[cfg.muon_coefficients][:cfg.muon_backend_steps]:
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
            if tall:
                x = x.T
            p.mul_(1 - cfg.matrix_lr * scale * cfg.muon_wd)
            p.add_(x.to(p.dtype), alpha=-cfg.matrix_lr * scale * math.sqrt(max(1.0, p.size(0) / p.size(1))))
        for average, p in zip(self.average, self.model.parameters()):
            average.lerp_(p, 1 - cfg.ema_decay)
            p.grad = None


def text_batches(cfg: tg.Config) -> Iterator[tg.Batch]:
    """Batches of TRAIN_BATCH_TOKENS from the standard library's sources: a byte is an id, a file a document."""
    rng, row, rows = np.random.default_rng(cfg.seed), np.empty(0, dtype=np.uint16), []
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    while True:
        for index in rng.permutation(len(paths)):
            file = np.frombuffer(paths[index].read_bytes(), dtype=np.uint8).astype(np.uint16) + 2
            row = np.concatenate([row, [tg.BOS_ID], file]).astype(np.uint16)
            while len(row) > cfg.train_seq_len:
                rows.append(row[:cfg.train_seq_len + 1])
                row = row[cfg.train_seq_len:]
                if len(rows) == cfg.train_rows:
                    yield tg.make_batch(rows, cfg.train_rows, cfg.train_seq_len)
                    rows = []


def contest(cfg: tg.Config, run: tg.Run, steps: int) -> dict[str, list[float]]:
    """Both train `steps` steps in turns: losses of ours and of the plain one, and CPU-seconds of their turns."""
    model = tg.build_model(cfg, run)
    layers, plain = tg.unroll_layers(cfg, cfg.num_loops > 0), Plain(model).to(run.device)
    ours, ema = tg.ShardedOptimizer(model, cfg, run), tg.Ema(model, cfg.ema_decay)
    theirs = PlainOptimizer(plain, cfg, run.dtype)
    source, record = text_batches(cfg), {"ours": [], "plain": [], "ours_seconds": [], "plain_seconds": []}

    def turn(name: str, batches: Sequence[tg.Batch], first: int, loss: Callable[..., Tensor],
             update: Callable[..., None]) -> None:
        start = time.process_time()
        for step, batch in enumerate(batches, first):
            value = loss(batch, layers, run.dtype) / cfg.train_batch_tokens
            value.backward()
            update(1.0, tg.muon_momentum(cfg, step))
            record[name].append(value.detach())
        record[f"{name}_seconds"].append(time.process_time() - start)

    def update_ours(scale: float, momentum: float) -> None:
        ours.step(scale, momentum)
        ema.update()

    for first in range(0, steps, TURN):
        batches = [next(source) for _ in range(min(TURN, steps - first))]
        turn("ours", batches, first, model.total_loss, update_ours)
        turn("plain", batches, first, plain.loss, theirs.step)
    return {name: [float(value) for value in values] for name, values in record.items()}


def main(arguments: Sequence[str]) -> int:
    """Prints the table and the JSON."""
    parser = argparse.ArgumentParser(prog="./run.sh bench plain_step", description=__doc__.split("\n\n")[0])
    parser.add_argument("steps", nargs="?", type=int, default=50, help="default 50")
    steps = parser.parse_args(arguments).steps
    cfg = tg.Config.from_env({"PRESET": "demo", **os.environ})
    tg.require(cfg.attn_gate in ("sparse", "none") and cfg.device != "cuda" and steps >= 1,
               "bench/plain_step.py: the plain model has no ATTN_GATE but sparse and none, and runs "
               "on a CPU (DEVICE=cpu), at least one step")
    with tg.Run(cfg, {}, log=False) as run:
        record = contest(cfg, run, steps)
        turns = [b / a for a, b in zip(record["ours_seconds"], record["plain_seconds"])][1:] or [math.nan]
        apart = max(abs(a - b) for a, b in zip(record["ours"], record["plain"]))
        print("step     ours    plain")
        for step in sorted({0, *range(TURN - 1, steps, 2 * TURN), steps - 1}):
            print(f"{step:4d} {record['ours'][step]:8.4f} {record['plain'][step]:8.4f}")
        print(f"largest difference of {steps} losses {apart:.2g} nats in {str(run.dtype).removeprefix('torch.')}; "
              f"tokens per CPU-second against plain {statistics.median(turns):.2f} (n={len(turns)} turns, "
              f"{min(turns):.2f} to {max(turns):.2f}; the first turn is warm-up)")
        print(json.dumps({"ratio": statistics.median(turns), "turns": turns, "largest_difference": apart, **record}))
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "bench"))
