"""Says before a run what it will be: `./run.sh check [FOLDER] [KNOB=value ...]`. Nothing is trained or written.

Are the knobs valid, which layers run, who updates and stores each parameter, how large will the artifact be, do memory
and disk last, are the data there. Memory and bytes are estimates; the records of how well they fit are in docs/LOG.md.
"""
from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools import knobs, launch
from tools.common import ToolError, program

MIB = 1 << 20
# What to lower where memory does not last in a stretch of the run.
MEMORY_KNOBS = {"train": "micro_batch_tokens", "quantize": "micro_batch_tokens", "evaluate": "val_batch_tokens",
                "adapt": "ttt_batch_size", "shared_sgd": "micro_batch_tokens"}


def plan_text(layers: Sequence[Any]) -> str:
    """One line for the unrolled layers: block, a mark for its lanes and `<layer` for a skip."""
    mark = {"none": "", "single": "/", "two": "="}
    parts = []
    for layer in layers:
        skip = "" if layer.skip_from is None else f"<{layer.skip_from}"
        parts.append(f"{layer.block}{mark[layer.lanes]}{skip}")
    return " ".join(parts)


def forward_flops(cfg: Any, layers: Sequence[Any], context: float) -> float:
    """FLOPs of one token's forward, two a multiply-add; the backward takes twice as many, recomputation aside.

    `context`: mean number of keys that a query sees; T/2 where a row is one document. Counted are the products with
    q, k, v, o, MLP, head and the bigram's projection, and attention's two; not norms, gates (0.1 %) and optimizer.
    """
    dim, kv_dim = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
    products = 2 * dim * (2 * dim + 2 * kv_dim) + 4 * dim * cfg.mlp_dim
    bigram = 2 * dim * cfg.bigram_dim * bool(cfg.bigram_buckets)
    return len(layers) * products + 4 * dim * context * len(layers) + 2 * dim * cfg.vocab_size + bigram


def bits_per_code(cfg: Any, family: str) -> float:
    """Estimated bits of one code: BITS_PER_WEIGHT, or under SDClip those of a Gaussian row, 2.05 + log2(Q / sigmas)."""
    if cfg.quant == "waterfill":
        return cfg.bits_per_weight
    bits, sigmas = (cfg.embed_bits, cfg.embed_clip_sigmas) if family == "embed" else \
        (cfg.matrix_bits, getattr(cfg, f"{family}_clip_sigmas"))
    top = 2 ** (bits - 1) - 1  # the largest code
    return min(max(0.1, 2.05 + math.log2(top / sigmas)), math.log2(2 * top + 1))


def predicted_bytes(tg: Any, cfg: Any, code_bytes: int) -> dict[str, int]:
    """Estimated packed bytes of the weights by kind: attn, mlp, embed (codes), scales, int8, fp16."""
    total: dict[str, float] = dict.fromkeys(("attn", "mlp", "embed", "scales", "int8", "fp16"), 0.0)
    for name, p in tg.shapes_of(cfg).named_parameters():
        stored = tg.route(name).stored
        matrices, (rows, columns) = (1, (*p.shape, 1)[:2]) if p.dim() < 3 else (p.shape[0], p.shape[1:])
        if stored == "fp16":
            total["fp16"] += 2 * p.numel()
        elif stored == "int8":
            total["int8"] += p.numel()
            total["scales"] += p.numel() // p.shape[-1]
        else:
            family = stored.removeprefix("gptq:")
            total[family] += p.numel() * bits_per_code(cfg, family) / 8
            total["scales"] += matrices * (rows + columns)
    excess = sum(total.values()) + code_bytes - cfg.artifact_bytes_cap
    if cfg.quant == "waterfill" and excess > 0:  # coarser codes until it fits
        codes = total["attn"] + total["mlp"] + total["embed"]
        for family in ("attn", "mlp", "embed"):
            total[family] *= max(0.0, 1 - excess / codes)
    return {kind: round(size) for kind, size in total.items()}


def predicted_memory(tg: Any, cfg: Any, run: Any, targets: int) -> dict[str, int]:
    """Peak bytes of one process on its device by stretch of the run, with `targets` validation targets.

    Exact are weights, optimizer and adapters; activations are elements kept of a token and layer, as counted on a CPU
    (13 D + 5 K H + 3.2 F; half of it where a compiler decides what is kept; D + 2 K H with convolutions).
    """
    parameters = dict(tg.shapes_of(cfg).named_parameters())
    weights = 4 * sum(p.numel() for p in parameters.values())
    banks = 4 * sum(p.numel() for name, p in parameters.items() if tg.route(name).rule == "muon")
    hessians = 4 * sum(p.shape[0] * (p.shape[1] ** 2 + p.shape[2] ** 2) for p in parameters.values() if p.dim() == 3)
    dim, kv_dim, vocab, width = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim, cfg.vocab_size, run.dtype.itemsize
    layers = len(tg.unroll_layers(cfg, True))
    eager = layers * (13 * dim + 5 * kv_dim + 3.2 * cfg.mlp_dim) * width
    padded = layers * (dim + 2 * kv_dim) * width * (cfg.conv_taps > 0)  # what convolutions read, kept in both ways
    kept = eager / (2 if run.compiles else 1) + padded
    eager += padded
    scores = 0 if run.is_cuda else layers * cfg.num_heads * width  # a CPU keeps attention's probabilities, T a token
    tokens = min(cfg.micro_batch_tokens, -(-cfg.train_batch_tokens // run.world))
    quarter = -(-tokens // cfg.train_seq_len // 4) * cfg.train_seq_len
    step = tokens * (kept + scores * cfg.train_seq_len + (2 * width * vocab if run.is_cuda else 0))
    eval_tokens = max(1, cfg.val_batch_tokens // 8 // cfg.eval_seq_len) * cfg.eval_seq_len
    logits = 12 * min(1 << 26, eval_tokens * vocab)
    base = 600 * MIB + (0 if run.is_cuda else 25 * targets) + 60 * targets * (cfg.ngram_base_beta > 0)
    needs = {"train": 4 * weights + banks // run.world + 2 * (weights - banks) + step,
             "quantize": 3 * weights + 3 * hessians + quarter * (2 * eager + scores * cfg.train_seq_len + 24 * vocab),
             "evaluate": 3 * weights + eval_tokens * width * (8 * dim + 2 * cfg.mlp_dim) + logits}
    if cfg.ttt == "lora":
        chunk = cfg.ttt_chunk_size
        run_tokens = chunk if cfg.ttt_context == "cache" else cfg.eval_seq_len
        outputs = dict(q=dim, k=kv_dim, v=kv_dim, o=dim, mlp=dim, head=vocab)
        sites = [(dim + outputs[p]) * (1 if p == "head" else layers) for p in cfg.ttt_lora_on.split(",") if p]
        cache = layers * 2 * kv_dim * width * cfg.eval_seq_len * (cfg.ttt_context == "cache")
        document = 16 * cfg.ttt_lora_rank * sum(sites) + cache + chunk * vocab * 12
        document += run_tokens * (eager + scores * cfg.eval_seq_len)  # nothing is compiled there
        needs["adapt"] = 3 * weights + cfg.ttt_batch_size * document
    if cfg.ttt == "sgd" or cfg.ttt == "lora" and cfg.phased_ttt_num_phases:
        needs["shared_sgd"] = 6 * weights + step
    return {name: int(base + size) for name, size in needs.items()}


def checkpoint_bytes(tg: Any, cfg: Any) -> int:
    """Size of a checkpoint: weights, average, and one (Muon) or two (AdamW) states of each."""
    sizes = {name: 4 * p.numel() for name, p in tg.shapes_of(cfg).named_parameters()}
    return sum(size * (3 if tg.route(name).rule == "muon" else 4) for name, size in sizes.items()) + (1 << 16)


def memory_left(run: Any) -> int:
    """Bytes that this process may still use of its device: of a GPU, or its share of this machine or its limits."""
    if run.is_cuda:
        import torch
        return torch.cuda.mem_get_info()[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError, IndexError):
        free = 1024 * int(re.findall(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[0])
    with contextlib.suppress(OSError, ValueError):  # of a container
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return free if limit == resource.RLIM_INFINITY else min(free, limit)


def resource_warnings(tg: Any, cfg: Any, run: Any, targets: int, processes: int = 1) -> Iterator[str]:
    """What memory or disk will not last for, of a run of so many processes on this machine."""
    run.world = processes
    needs, left = predicted_memory(tg, cfg, run, targets), memory_left(run)
    run.world = 1
    left //= 1 if run.is_cuda else processes
    stretch = max(needs, key=lambda name: needs[name])
    if needs[stretch] > left:
        knob = MEMORY_KNOBS[stretch]
        yield (f"{stretch} may need {needs[stretch] // MIB:,} MiB a process, {left // MIB:,} are left: lower "
               f"{knob.upper()}={getattr(cfg, knob)}")
    logs = Path(cfg.log_dir).absolute()
    folder = next(path for path in (logs, *logs.parents) if path.exists())
    if not folder.is_dir():
        yield f"LOG_DIR={cfg.log_dir}: {folder} is no folder: set another"
    free, checkpoint = shutil.disk_usage(folder).free, checkpoint_bytes(tg, cfg)
    need = cfg.artifact_bytes_cap + 2 * checkpoint  # a checkpoint is written beside the one that it replaces
    if free < need:
        yield (f"{folder}: {free:,} bytes free, a run may need {need:,}, {2 * checkpoint:,} of them for checkpoints: "
               f"make room or set LOG_DIR")


def token_counts(tg: Any, cfg: Any) -> dict[str, int]:
    """Tokens of the training and the validation shards. Raises the trainer's `UserError` where they are not usable, or
    do not fit the tokenizer or the side file."""
    (val, *_), *_ = tg.open_validation(cfg)
    return {"train": len(tg.TokenStream(cfg.dataset_dir, "fineweb_train")), "val": len(val)}


def lines(tg: Any, cfg: Any, run: Any, processes: int) -> Iterator[str]:
    """All that can be said of a run before it."""
    changed = [f"{knob.name}={tg.show(getattr(cfg, knob.name.lower()))}" for knob in knobs.read()
               if getattr(cfg, knob.name.lower()) != knob.default]
    yield "knobs that differ from the preset record: " + (" ".join(changed) or "none")
    for looped in (False, True) if cfg.num_loops else (False,):
        layers = tg.unroll_layers(cfg, looped)
        tflop = 3e-12 * cfg.train_batch_tokens * forward_flops(cfg, layers, cfg.train_seq_len / 2)
        yield f"layers, loop {'on' if looped else 'off'} (block<skip, / single lane, = two lanes): " \
              f"{plan_text(layers)}; {tflop:.3g} TFLOP a step"
    yield "parameter, shape, update, rate, decay, stored as"
    parameters = dict(tg.shapes_of(cfg).named_parameters())
    for name, p in parameters.items():
        r = tg.route(name)
        yield f"  {name:24s} {str(list(p.shape)):18s} {p.numel():>11,} {r.rule:5s} {r.lr} {r.wd} {r.stored}"
    code = len(tg.shipped_source(Path(tg.__file__)))
    tg.check_cap(tg.shapes_of(cfg), code, cfg)
    sizes = predicted_bytes(tg, cfg, code)
    yield (f"{sum(p.numel() for p in parameters.values()):,} parameters; predicted artifact: "
           f"{code + sum(sizes.values()):,} of {cfg.artifact_bytes_cap:,} bytes: code {code:,}, "
           + ", ".join(f"{kind} {size:,}" for kind, size in sizes.items() if size))
    tokens = {"val": 1}
    try:
        tokens = token_counts(tg, cfg)
        yield f"data: {cfg.dataset_dir}, " + ", ".join(f"{split} {count:,} tokens" for split, count in tokens.items())
    except tg.UserError as error:
        yield f"warning: the data are not ready: {error}"
    for text in resource_warnings(tg, cfg, run, tokens["val"] - 1, processes):
        yield f"warning: {text}"


def main(arguments: Sequence[str]) -> int:
    """Prints what `lines` says; exit status 2 where the knobs are not valid."""
    env, warnings = launch.knobs_of(arguments, os.environ)
    for text in warnings:
        print(f"warning: {text}")
    import train_gpt as tg
    cfg, processes = tg.on_its_data(tg.Config.from_env(env), "", env), launch.processes(env)
    if cfg.eval_only:
        raise ToolError("EVAL_ONLY: the artifact holds the model's knobs; ./run.sh train scores it, check is for a run")
    with tg.Run(cfg, {}, log=False) as run:
        text = "\n".join(lines(tg, cfg, run, processes))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "check", __doc__))
