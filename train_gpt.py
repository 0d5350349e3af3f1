"""train_gpt.py -- train a small language model, shrink it to 16,000,000 bytes, and score it from those bytes.

    ./run.sh                                                 set up, make demo data, run the demo on a CPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py    the `record` preset on 8 GPUs
    PRESET=demo python train_gpt.py                          every stage on a CPU, in minutes
    EVAL_ONLY=logs/<run>.bin python train_gpt.py             score an artifact again; needs no training data
    python train_gpt.py --help | --check                     every knob | validate, print the plan, stop

Every knob is an environment variable (section 1). Data comes from `data/prepare.py`; the files that a run leaves
are `logs/<run_id>.txt`, `.jsonl` and `.bin` (the artifact).

  1 Config       every number that can change a result      7 Optimizer     update rules, then communication
  2 Run          rank, device, clock of phases, log         8 Schedule      functions of the used budget
  3 Data         shards -> documents -> batches             9 Quantization  what errors cost, steps, GPTQ
  4 Score        bytes of a token, bits per byte           10 Artifact      tensors <-> bytes, fit to the cap
  5 Kernels      a reference and a fast twin, in pairs     11 Evaluation    windows, adaptation, tilt: one scorer
  6 Model        layer plan, weights seam, one forward     12 Train, main   the story, in order

Shape letters: R rows of a batch, T tokens of a row, D model width, N query heads, K key/value heads, H head width,
F MLP width, V vocabulary, L stored blocks, S document pieces, M = R*T tokens; O x I is a matrix (output, input).
Words: a *block* is stored, a *visit* is one execution of a block; *bytes* are UTF-8 bytes of text; losses in *nats*.
"""
from __future__ import annotations

import os

if __name__ == "__main__":  # What libraries read once. libgomp: threads that spin a little before they sleep are 1.3
    # times as fast as those that sleep at once, and do not starve a busy machine (bench/LOG.md 2026-11-22).
    # cuBLAS: DETERMINISTIC=1 needs a workspace of fixed size; this is the one that torch takes on an H100 anyway.
    for variable in (("GOMP_SPINCOUNT", "2000"), ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")):
        os.environ.setdefault(*variable)

import ast
import bisect
import collections
import contextlib
import dataclasses
import datetime
import difflib
import errno
import faulthandler
import fcntl
import fnmatch
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import math
import platform
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------
# 1 Config: every number that can change a result
# ----------------------------------------------------------------------------------------------------
# One frozen dataclass, flat to its readers; each group of knobs is a base class, so that the model can be handed the
# model's knobs alone (they travel in the artifact). A knob is a field: its environment name is the field in capitals,
# its documentation the string below it, and `--help` and README's table are generated from both. The defaults are
# the preset `record`: record #1855 (2026-04-27), except where a docstring says otherwise. Names follow the records.
# Safe to change: any default; to add a knob, add a field and read it somewhere (a test looks for the reader).


class UserError(Exception):
    """Something that the user can repair. Printed as one line; `exit_code` becomes the exit status."""
    exit_code = 2


class DivergedError(UserError):
    """The loss is not finite any more."""
    exit_code = 3


class LocalError(UserError):
    """A mistake that this rank alone knows of."""


class MemoryGoneError(LocalError):
    """Memory did not last."""


class StoppedError(UserError):
    """The signal of that name ends the run; `exit_code` is what a shell expects of it."""

    def __init__(self, name: str, text: str, together: bool = False) -> None:
        """`together`: all ranks end here, none in the middle of something."""
        super().__init__(f"{name} {text}")
        self.exit_code, self.together = 128 + signal.Signals[name], together


def require(ok: bool, message: str) -> None:
    """Raise `UserError(message)` unless `ok`."""
    if not ok:
        raise UserError(message)


def ensure(ok: bool, message: str) -> None:
    """Raise `AssertionError(message)` unless `ok`: a promise of ours is broken. Unlike `assert`, never left out."""
    if not ok:
        raise AssertionError(message)


def one_line(text: object) -> str:
    """What a foreign file says, as it may be shown: no control characters, 300 characters at most."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:300])


@dataclass(frozen=True, kw_only=True)
class RunKnobs:
    """Run: what to do, where, and what to leave behind"""
    preset: str = "record"
    """Named set of overrides: `record` (8xH100) or `demo` (a laptop CPU). Variables override the preset."""
    seed: int = 1337
    """Seeds initialisation and data order."""
    run_id: str = ""
    """Name of the log and artifact files. Empty: preset, date, time and seed."""
    log_dir: str = "logs"
    """Folder of the logs."""
    artifact_dir: str = ""
    """Folder of the artifact `<run_id>.bin`. Empty: LOG_DIR."""
    eval_only: str = ""
    """Path of an artifact to score instead of training. The model's knobs then come from the artifact."""
    device: str = "auto"
    """auto | cuda | cpu. Auto takes CUDA where there is a GPU."""
    dtype: str = "auto"
    """Activations: auto | float32 | bfloat16. Auto: bfloat16 on CUDA and on CPUs with AMX, else float32."""
    threads: int = 0
    """CPU threads of one process. 0: all cores that this process may use, divided by the local processes."""
    compile: str = "auto"
    """torch.compile: auto | on | off. Auto is on for CUDA, off for CPU (there it pays only past minutes)."""
    attention: str = "auto"
    """Attention: auto | sdpa | dense | varlen | fa2 | fa3 | fa4. Auto: the fastest that is here (section 5)."""
    kernels: str = "auto"
    """Fused MLP and cross-entropy: auto | triton | plain. Auto: Triton's on a GPU in bfloat16, where installed."""
    dist_timeout_seconds: float = 900.0
    """A rank that keeps others waiting this long, or gives no sign of life for half of it, ends the run."""
    checkpoint_every: str = "0"
    """Seconds (60) between checkpoints of training (`<run_id>.ckpt` beside the artifact) and of the adapted score
    (`<run_id>.score.ckpt`), or training's steps (500steps). 0: only on SIGTERM and SIGINT."""
    resume: str = "0"
    """0 | 1 | auto: go on with RUN_ID, training or scoring, on any number of ranks. Auto: where something is saved."""
    wandb: bool = False
    """1: Weights & Biases gets the events of the log too, by `records/mirror.py` (its WANDB_MODE=offline and so on)."""
    tensorboard: bool = False
    """1: the same for TensorBoard, in LOG_DIR/tensorboard."""
    deterministic: bool = False
    """1: deterministic algorithms alone, or an error; bit-identical with MAX_WALLCLOCK_SECONDS=0 (CPUs always are)."""


@dataclass(frozen=True, kw_only=True)
class DataKnobs:
    """Data: where the tokens are and how they become batches"""
    data_dir: str = "./data"
    """Root that holds `datasets/` and `tokenizers/`."""
    dataset: str = ""
    """Folder below DATA_DIR/datasets. Empty: fineweb10B_sp<VOCAB_SIZE>, or the CaseOps export."""
    data_path: str = ""
    """Folder of the shards, wherever it is. Empty: DATA_DIR/datasets/DATASET."""
    tokenizer_path: str = ""
    """SentencePiece model. Empty: the one named in the dataset's manifest, else by VOCAB_SIZE in DATA_DIR."""
    caseops_enabled: bool = False
    """1: bytes of a target come from the `fineweb_val_bytes_*.bin` side files (case operators; #1855 ran with 1)."""
    train_seq_len: int = 2048
    """Tokens in a training row; longer documents are cut. Row count = TRAIN_BATCH_TOKENS / TRAIN_SEQ_LEN."""
    train_batch_tokens: int = 786_432
    """Tokens of one optimizer step over all ranks."""
    micro_batch_tokens: int = 98_304
    """Most tokens of one forward and backward on one device; more are accumulated."""
    shuffle: str = "window"
    """Order of an epoch, by SEED: window (rows of the stream), document (whole), coprime (rows by a stride), none."""


@dataclass(frozen=True, kw_only=True)
class ModelKnobs:
    """Model: shape and topology (stored in the artifact)"""
    vocab_size: int = 8192
    """Vocabulary V of the tokenizer, at most 65,536."""
    num_layers: int = 11
    """Stored blocks L. How many run per token: `layer_plan`."""
    model_dim: int = 512
    """Width D of the residual stream."""
    num_heads: int = 8
    """Query heads N; head width H = D / N must be even."""
    num_kv_heads: int = 4
    """Key/value heads K; must divide NUM_HEADS."""
    mlp_mult: float = 4.0
    """MLP width F as a multiple of D."""
    mlp_rank: int = 0
    """Each MLP matrix is a product of two of this rank: less to store and compute below F D / (F + D). 0: whole."""
    mlp_slope: float = 0.5
    """Slope below zero of LeakyReLU(x)^2 (#493, #549)."""
    ln_scale: bool = True
    """1: the inputs of block i are scaled by 1/sqrt(i+1) (#315)."""
    attn_windows: str = "0"
    """Tokens that attention sees, its own included, in blocks 0, 1, ..., over and over (512,512,0). 0: all."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_dims: int = 16
    """Dimensions of each head that rotate (partial RoPE, #315). 0: none."""
    rope_yarn: bool = False
    """1: rows longer than ROPE_TRAIN_SEQ_LEN grow the base by (T / T_train)^(d/(d-2)), the NTK rule."""
    rope_train_seq_len: int = 2048
    """T_train of ROPE_YARN."""
    qk_gain_init: float = 5.0
    """Initial learned gain of each query head after QK norm (#1413)."""
    xsa_last_n: int = 11
    """Blocks, counted from the last, whose attention output loses its own value's direction (XSA, #265)."""
    attn_gate: str = "sparse"
    """Gate on each head's output: none | output (#1667) | sparse (#1787) | dense (#1736)."""
    gate_window: int = 12
    """Input channels read by SmearGate and by the output and sparse gates."""
    sparse_attn_gate_scale: float = 0.5
    """Factor inside the sparse gate's sigmoid."""
    gated_attn_init_std: float = 0.01
    """Standard deviation of the dense gate's initial weights."""
    gated_attn_bias: float = 0.0
    """Dense gate: 0 has no bias; otherwise a bias starts here and the weights at zero (2.94: gate 0.95)."""
    smear_gate_enabled: bool = True
    """1: a learned share of the previous token's embedding is added, never across documents (#1667, #1851)."""
    loop_start: int = 3
    """First block of the depth recurrence."""
    loop_end: int = 5
    """Last block (inclusive) of the depth recurrence."""
    num_loops: int = 2
    """Extra passes over blocks LOOP_START..LOOP_END. 0: no recurrence."""
    max_skips: int = 64
    """Most U-Net skips, the innermost stay: fewer are less traffic (modded-nanogpt records 45 and 77). 0: none."""
    skip_gates_enabled: bool = True
    """1: U-Net skips are mixed in by a learned gate; 0: added."""
    parallel_residual: str = "two"
    """none | single (attention and MLP read one lane, #1412) | two (two lanes, #1529), from PARALLEL_START_LAYER."""
    parallel_start_layer: int = 8
    """First block of the parallel residuals."""
    parallel_final_lane: str = "mean"
    """What two lanes end in: mean | attn | mlp."""
    logit_softcap: float = 30.0
    """Logits are c * tanh(z / c)."""
    tied_embed_init_std: float = 0.005
    """Standard deviation of the initial embedding, which is also the output matrix."""
    bigram_buckets: int = 0
    """Rows of the hashed bigram embedding (#162, #1060). 0: none."""
    bigram_dim: int = 112
    """Width of the bigram embedding before its projection to D."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            allowed = CHOICES.get(name, (value,))
            require(value in allowed, f"{name.upper()}={value}: expected one of {', '.join(map(str, allowed))}")
            require(not isinstance(value, float) or math.isfinite(value), f"{name.upper()}={value}: expected a number")
        require(1 < self.vocab_size <= 65_536, f"VOCAB_SIZE={self.vocab_size}: expected 2..65536 (ids are uint16)")
        require(2 <= self.num_layers <= 1024, f"NUM_LAYERS={self.num_layers}: expected at least 2, at most 1024")
        require(0 <= self.num_loops <= 64, f"NUM_LOOPS={self.num_loops}: expected 0 or more, at most 64")
        require(self.num_heads >= 1 and self.model_dim >= 1 and self.model_dim % (2 * self.num_heads) == 0,
                f"MODEL_DIM={self.model_dim}: expected a multiple of 2 * NUM_HEADS = {2 * self.num_heads}")
        require(self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0,
                f"NUM_KV_HEADS={self.num_kv_heads}: expected a divisor of NUM_HEADS={self.num_heads}")
        require(self.rope_dims % 2 == 0 and 0 <= self.rope_dims <= self.head_dim,
                f"ROPE_DIMS={self.rope_dims}: expected an even number up to the head width {self.head_dim}")
        require(0 <= self.mlp_slope <= 1, f"MLP_SLOPE={self.mlp_slope}: expected 0..1")
        require(self.mlp_dim >= 2, f"MLP_MULT={self.mlp_mult}: the MLP would have fewer than two units")
        require(0 <= self.mlp_rank <= self.model_dim,
                f"MLP_RANK={self.mlp_rank}: expected 0 (whole matrices) or at most MODEL_DIM={self.model_dim}")
        require(1 <= self.gate_window <= self.model_dim,
                f"GATE_WINDOW={self.gate_window}: expected 1..MODEL_DIM={self.model_dim}")
        require(self.num_loops == 0 or 0 <= self.loop_start <= self.loop_end < self.num_layers,
                f"LOOP_START={self.loop_start} LOOP_END={self.loop_end}: expected 0 <= start <= end < NUM_LAYERS="
                f"{self.num_layers}; NUM_LOOPS=0 turns the recurrence off")
        require(self.parallel_residual == "none" or 0 <= self.parallel_start_layer < self.num_layers,
                f"PARALLEL_START_LAYER={self.parallel_start_layer}: expected 0..{self.num_layers - 1} (NUM_LAYERS="
                f"{self.num_layers}); PARALLEL_RESIDUAL=none turns parallel residuals off")
        require(self.parallel_residual != "two" or self.num_loops == 0
                or not self.loop_start < self.parallel_start_layer <= self.loop_end,
                f"PARALLEL_START_LAYER={self.parallel_start_layer} lies inside the loop {self.loop_start}.."
                f"{self.loop_end}: two lanes cannot be left again; move one of them")
        require(self.logit_softcap > 0, f"LOGIT_SOFTCAP={self.logit_softcap}: expected a positive number")
        require(self.bigram_buckets == 0 or self.bigram_buckets >= 2,
                f"BIGRAM_BUCKETS={self.bigram_buckets}: expected 0 (none) or at least 2")
        require(self.bigram_buckets == 0 or self.bigram_dim >= 1, f"BIGRAM_BUCKETS={self.bigram_buckets} with "
                f"BIGRAM_DIM={self.bigram_dim}: expected at least 1")
        require(re.fullmatch(r"\d{1,6}(,\d{1,6})*", self.attn_windows) is not None,
                f"ATTN_WINDOWS={self.attn_windows}: expected numbers of tokens such as 512,512,0")
        require(self.rope_base > 0 and self.rope_train_seq_len >= 1,
                f"ROPE_BASE={self.rope_base} ROPE_TRAIN_SEQ_LEN={self.rope_train_seq_len}: expected positive numbers")

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)


@dataclass(frozen=True, kw_only=True)
class OptimizerKnobs:
    """Optimizer: who learns how fast"""
    matrix_lr: float = 0.026
    """Peak learning rate of Muon (matrices), in units of the update's spectral norm."""
    scalar_lr: float = 0.02
    """Peak learning rate of AdamW for gains, gates, skips and other small parameters."""
    tied_embed_lr: float = 0.03
    """Peak learning rate of AdamW for the embedding."""
    muon_momentum: float = 0.97
    """Nesterov momentum of Muon after its warm-up (#1514)."""
    muon_momentum_warmup_start: float = 0.92
    """Muon's momentum at step 0."""
    muon_momentum_warmup_steps: int = 1500
    """Steps over which Muon's momentum rises."""
    muon_coefficients: str = "polar"
    """Newton-Schulz coefficients: polar (Polar Express, #1344) or classic (Jordan et al. 2024)."""
    muon_backend_steps: int = 5
    """Newton-Schulz steps; Polar Express has 5."""
    muon_row_normalize: bool = True
    """1: rows of the update are normalised before Newton-Schulz (MuonEq-R, #1217)."""
    normuon_beta2: float = 0.0
    """Decay of the per-row second moment that rescales the update (NorMuon). 0: none; 0.95 is usual."""
    muon_wd: float = 0.095
    """Decoupled weight decay of the matrices."""
    cautious_wd: bool = False
    """1: Muon decays a weight only where the update has the same sign."""
    embed_wd: float = 0.085
    """Decoupled weight decay of the embedding."""
    adam_wd: float = 0.02
    """Decoupled weight decay of the small parameters."""
    beta1: float = 0.9
    """First-moment decay of AdamW."""
    beta2: float = 0.99
    """Second-moment decay of AdamW."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    grad_clip_norm: float = 0.3
    """Largest global gradient norm, taken once after averaging over ranks. 0: no clipping."""
    max_skipped_steps: int = 3
    """A gradient that is not finite counts as zero; after more such steps than this in all, the run ends (status 3)."""
    ema_decay: float = 0.9965
    """Decay of the averaged weights that are shipped, per step. 0: ship the last weights."""


@dataclass(frozen=True, kw_only=True)
class ScheduleKnobs:
    """Schedule: the budget and what happens when"""
    max_wallclock_seconds: float = 600.0
    """Budget of training plus GPTQ. 0: train ITERATIONS steps instead, bit-reproducible on a CPU."""
    gptq_reserve_seconds: float = 8.0
    """Part of the budget kept for calibration and GPTQ (#1868 used 8; the records 0.5 to 13)."""
    iterations: int = 20_000
    """Most optimizer steps; the whole budget when MAX_WALLCLOCK_SECONDS=0."""
    warmdown_frac: float = 0.85
    """Final fraction of the budget over which the learning rates fall linearly."""
    min_lr: float = 0.1
    """Floor of the learning rates as a fraction of their peak."""
    enable_looping_at: float = 0.35
    """Fraction of the budget at which the depth recurrence starts (#1420)."""
    train_seq_schedule: str = ""
    """Shorter rows at first: length@end,... with ends as fractions of the budget (1024@0.1,2048@0.7,3072@1, #2014)."""
    seq_change_warmup_steps: int = 0
    """Steps over which the learning rates rise again after the row length has changed (#2014: 32)."""
    qat_start: float = 1.0
    """Fraction of the budget from which training sees matrices rounded as QUANT=sdclip stores them (QAT). 1: never."""
    warmup_steps: int = 20
    """Passes over each graph before the clock starts; they leave weights and optimizer untouched."""
    train_log_every: int = 500
    """Steps between log lines of training (the first five are always logged)."""
    val_loss_every: int = 0
    """Steps between validations of the live weights, outside the clock and marked in the log. 0: never."""


@dataclass(frozen=True, kw_only=True)
class QuantKnobs:
    """Quantization: how many bytes each matrix gets"""
    quant: str = "waterfill"
    """Steps of the codes: sdclip (so many standard deviations a row, #1394) | waterfill (equal cost everywhere)."""
    bits_per_weight: float = 5.0
    """QUANT=waterfill: most bits of a weight that is not zero, on average; fewer if ARTIFACT_BYTES_CAP asks for it."""
    row_softness: float = 0.7
    """QUANT=waterfill: exponent of the rows' Fisher information, 0 (ignored) to 1 (full)."""
    gptq_two_sided: bool = False
    """QUANT=waterfill: feed rounding errors forward along the rows too, by the outputs' Fisher information (K-FAC). A
    quarter less damage at equal bytes; it rounds row after row, which takes 1.5 minutes a pass at the record's shape on
    a CPU and is not timed on a GPU: raise GPTQ_RESERVE_SECONDS with it."""
    trellis_states: int = 4
    """QUANT=waterfill: states of the trellis that the codes of a row follow, 4 or 8. 1: none, plain rounding."""
    codec: str = "auto"
    """Coder of the codes: range (package constriction) | brotli | auto: range where that is installed, and of small
    streams the smaller of both."""
    matrix_bits: int = 6
    """QUANT=sdclip: bits of the codes of attention and MLP matrices, 2..8. 2 is ternary (clips near 1.2, QAT_START)."""
    n_int6_layers: int = 0
    """QUANT=sdclip: matrices that get MATRIX_BITS, those of the largest trace of the Hessian (#1260); the others get
    one bit less. 0: all get MATRIX_BITS. The trace ranks by depth rather than by need."""
    embed_bits: int = 7
    """QUANT=sdclip: bits of the codes of the embedding, 2..8."""
    attn_clip_sigmas: float = 13.0
    """SDClip (#1394) of attention: a row's largest code stands for this many standard deviations."""
    mlp_clip_sigmas: float = 11.5
    """SDClip of the MLP."""
    embed_clip_sigmas: float = 14.0
    """SDClip of the embedding."""
    gptq_calibration_batches: int = 16
    """Batches of MICRO_BATCH_TOKENS training tokens for the Hessians, over all ranks together."""
    gptq_damp: float = 0.01
    """Damping of the Hessian as a fraction of its mean diagonal; raised tenfold while Cholesky fails."""
    artifact_bytes_cap: int = 16_000_000
    """Code plus weights may not exceed this; steps are made coarser until they fit."""


@dataclass(frozen=True, kw_only=True)
class EvalKnobs:
    """Evaluation: how the score is taken"""
    eval_seq_len: int = 2048
    """Longest context of a scored token, in tokens."""
    eval_stride: int = 64
    """Sliding windows advance by this many targets (#122). 0: plain only, documents cut into EVAL_SEQ_LEN."""
    eval_ladder: str = "ema,quantized"
    """Scores for comparison before the one that counts, outside the budget: any of ema, quantized, sliding. What they
    compile, the one that counts finds compiled."""
    eval_seconds_budget: float = 600.0
    """Budget of evaluation from opening the artifact; nothing adapts while the projected end lies beyond it."""
    ttt: str = "lora"
    """Adaptation while scoring: none | lora (adapters for each document, #1530) | sgd (whole model, #549, #1413)."""
    ttt_context: str = "recompute"
    """Context of a chunk under TTT=lora: recompute (with the newest adapters) | cache (keys and values are kept)."""
    ttt_chunk_size: str = "48"
    """Targets scored before each step of the adapters; by place in the document as 256:8,2000:24,48."""
    ttt_batch_size: int = 64
    """Most documents adapted to side by side on one device; changes speed only."""
    ttt_grad_steps: int = 1
    """Steps of the adapters on each chunk, after its score."""
    ttt_lora_on: str = "q,k,v,o,mlp,head"
    """Which products get adapters."""
    ttt_lora_rank: int = 80
    """Rank of the adapters."""
    ttt_lora_alpha: float = 144.0
    """Adapters are multiplied by this over their rank."""
    ttt_lora_lr: float = 0.0001
    """Learning rate of the adapters."""
    ttt_optimizer: str = "adam"
    """Optimizer of the adapters: adam (AdamW) | sgd."""
    ttt_beta1: float = 0.0
    """First-moment decay of the adapters' AdamW; momentum of SGD."""
    ttt_beta2: float = 0.99
    """Second-moment decay of the adapters' AdamW."""
    ttt_weight_decay: float = 0.5
    """Weight decay of the adapters."""
    phased_ttt_num_phases: int = 3
    """Times that the shared weights learn from the documents scored so far, under TTT=lora (#1626). 0: never."""
    phased_ttt_prefix_docs: int = 2500
    """These first documents of the stream are divided into the phases."""
    global_ttt_lr: float = 0.001
    """Learning rate of that SGD, falling towards 0 as a cosine over its chunks."""
    global_ttt_momentum: float = 0.9
    """Its momentum."""
    global_ttt_epochs: int = 1
    """Its passes over the documents."""
    global_ttt_chunk_tokens: int = 32_768
    """Targets of one of its chunks."""
    global_ttt_batch_seqs: int = 32
    """Rows of TRAIN_SEQ_LEN in one of its steps, over all ranks."""
    global_ttt_grad_clip: float = 1.0
    """Its largest gradient norm. 0: no clipping."""
    ttt_chunk_tokens: int = 32_768
    """TTT=sgd: targets scored before the model learns from them."""
    ttt_epochs: int = 3
    """TTT=sgd: passes over each chunk."""
    ttt_lr: float = 0.005
    """TTT=sgd: learning rate, falling to 0 as a cosine over the chunks."""
    ttt_momentum: float = 0.9
    """TTT=sgd: momentum, which runs on from chunk to chunk."""
    ttt_batch_seqs: int = 32
    """TTT=sgd: rows of TRAIN_SEQ_LEN in one step, over all ranks."""
    ttt_grad_clip: float = 1.0
    """TTT=sgd: largest gradient norm. 0: no clipping."""
    ttt_freeze_blocks: int = 0
    """TTT=sgd: the first blocks that stay as they are."""
    ngram_tilt_enabled: bool = False
    """1: the score is tilted towards what followed the same ids earlier in the stream (#1420, #1514)."""
    ngram_rules: str = "8:0.7:3,10:0.7:3,12:0.6:2,14:0.5:2,16:0.5:2"
    """Contexts of the tilt as length:least share:least count; the longest that qualifies gives the hint."""
    ngram_base_beta: float = 2.0
    """Strength of the tilt in nats."""
    ngram_beta_by_share: bool = True
    """1: the strength is multiplied by the share of the hinted continuation (#1514); 0: constant (#2135)."""
    ngram_gamma: float = 0.0
    """The strength is multiplied by (1 - p)^this, p being the model's probability of the hint."""
    prequant_ttt: bool = False
    """1: train on the validation data before quantizing (#1485). Illegal (C3); the run is marked as such."""
    prequant_ttt_lr: float = 0.0005
    """Its learning rate (AdamW), falling towards a tenth as a cosine over the epochs."""
    prequant_ttt_epochs: int = 6
    """Its passes over the validation data."""
    prequant_ttt_batch_seqs: int = 32
    """Its rows of TRAIN_SEQ_LEN in one step, over all ranks."""
    prequant_ttt_grad_clip: float = 1.0
    """Its largest gradient norm."""
    prequant_ttt_freeze_blocks: int = 2
    """Its first blocks that stay as they are."""
    val_batch_tokens: int = 524_288
    """Ids of one evaluation batch over eight devices: one forward on one device takes an eighth of them."""


GROUPS = (RunKnobs, DataKnobs, ModelKnobs, OptimizerKnobs, ScheduleKnobs, QuantKnobs, EvalKnobs)
CHOICES = {"device": ("auto", "cuda", "cpu"), "dtype": ("auto", "float32", "bfloat16"),
           "compile": ("auto", "on", "off"), "attention": ("auto", "sdpa", "dense", "varlen", "fa2", "fa3", "fa4"),
           "kernels": ("auto", "triton", "plain"), "resume": ("0", "1", "auto"),
           "shuffle": ("window", "document", "coprime", "none"), "attn_gate": ("none", "output", "sparse", "dense"),
           "parallel_residual": ("none", "single", "two"), "parallel_final_lane": ("mean", "attn", "mlp"),
           "muon_coefficients": ("polar", "classic"), "ttt": ("none", "lora", "sgd"), "ttt_optimizer": ("adam", "sgd"),
           "ttt_context": ("recompute", "cache"), "quant": ("sdclip", "waterfill"),
           "codec": ("auto", "range", "brotli")}

NO_RESULT = frozenset("run_id log_dir artifact_dir data_dir data_path tokenizer_path eval_only resume checkpoint_every "
                      "dist_timeout_seconds wandb tensorboard".split())
"""Knobs that say where files are or when they are written: runs that differ in them alone have one config_sha256."""
NO_SCORE = frozenset("device threads compile attention kernels deterministic micro_batch_tokens val_batch_tokens "
                     "ttt_batch_size eval_ladder eval_seconds_budget train_log_every val_loss_every warmup_steps "
                     "max_skipped_steps".split())
"""Knobs that change an artifact's score by rounding alone or by what there is time for: it may go on with others."""

# The demo's shape is wide and shallow because a CPU without a compiler is bound by elementwise passes, not by products,
# and a hashed bigram table teaches it most of what three minutes can; figures in bench/LOG.md (2026-11-22).
PRESETS: dict[str, dict[str, Any]] = {
    "record": {},
    "demo": dict(
        dataset="demo_sp1024", train_seq_len=256, train_batch_tokens=2048, micro_batch_tokens=2048, shuffle="document",
        vocab_size=1024, num_layers=3, model_dim=256, num_heads=4, num_kv_heads=2, xsa_last_n=3, num_loops=0,
        ln_scale=False, parallel_residual="single", parallel_start_layer=2, qk_gain_init=3.0, tied_embed_init_std=0.02,
        bigram_buckets=32768, bigram_dim=64, matrix_lr=0.018, scalar_lr=0.02, tied_embed_lr=0.005, muon_momentum=0.9,
        muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=50, ema_decay=0.97, max_wallclock_seconds=195.0,
        gptq_reserve_seconds=13.0, warmup_steps=1, train_log_every=50, gptq_calibration_batches=16, eval_seq_len=256,
        eval_stride=64, val_batch_tokens=65536, eval_ladder="ema,quantized,sliding", eval_seconds_budget=60.0,
        ttt_context="cache", ttt_lora_rank=8, ttt_lora_alpha=16.0, ttt_lora_lr=0.004, phased_ttt_num_phases=0,
        ngram_tilt_enabled=True),
}


@dataclass(frozen=True, kw_only=True)
class Config(EvalKnobs, QuantKnobs, ScheduleKnobs, OptimizerKnobs, ModelKnobs, DataKnobs, RunKnobs):
    """Every knob of a run. Build it with `Config.from_env`; it never changes afterwards."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_seq_len", "train_batch_tokens", "micro_batch_tokens", "eval_seq_len", "val_batch_tokens",
                     "iterations", "train_log_every", "gptq_calibration_batches", "muon_backend_steps",
                     "artifact_bytes_cap", "ttt_batch_size", "ttt_grad_steps", "ttt_lora_rank",
                     "global_ttt_chunk_tokens", "global_ttt_batch_seqs", "ttt_chunk_tokens", "ttt_batch_seqs",
                     "prequant_ttt_batch_seqs"):
            require(getattr(self, name) >= 1, f"{name.upper()}={getattr(self, name)}: expected at least 1")
        for name in ("threads", "eval_stride", "warmup_steps", "val_loss_every", "muon_momentum_warmup_steps",
                     "seq_change_warmup_steps", "max_skipped_steps",
                     "max_wallclock_seconds", "gptq_reserve_seconds", "grad_clip_norm",
                     "matrix_lr", "scalar_lr", "tied_embed_lr", "muon_wd", "embed_wd", "adam_wd", "num_loops",
                     "xsa_last_n", "max_skips", "n_int6_layers", "seed", "ttt_lora_alpha", "ttt_lora_lr",
                     "ttt_weight_decay", "phased_ttt_num_phases", "phased_ttt_prefix_docs", "global_ttt_lr",
                     "global_ttt_epochs", "global_ttt_grad_clip", "ttt_lr", "ttt_epochs", "ttt_grad_clip",
                     "ttt_freeze_blocks", "ngram_base_beta", "ngram_gamma", "prequant_ttt_lr",
                     "prequant_ttt_epochs", "prequant_ttt_grad_clip", "prequant_ttt_freeze_blocks"):
            require(getattr(self, name) >= 0, f"{name.upper()}={getattr(self, name)}: expected 0 or more")
        for name in ("beta1", "beta2", "ema_decay", "normuon_beta2", "muon_momentum", "muon_momentum_warmup_start",
                     "ttt_beta1", "ttt_beta2", "ttt_momentum", "global_ttt_momentum"):
            require(0 <= getattr(self, name) < 1, f"{name.upper()}={getattr(self, name)}: expected 0 <= value < 1")
        for name in ("warmdown_frac", "enable_looping_at", "min_lr", "row_softness", "qat_start"):
            require(0 <= getattr(self, name) <= 1, f"{name.upper()}={getattr(self, name)}: a fraction, expected 0..1")
        require(self.seed < 2 ** 63, f"SEED={self.seed}: expected less than 2^63")
        require(self.trellis_states in (1, 4, 8), f"TRELLIS_STATES={self.trellis_states}: expected 1 (none), 4 or 8")
        require(not self.n_int6_layers or self.matrix_bits > 2, f"N_INT6_LAYERS={self.n_int6_layers}: the others get "
                f"one bit less than MATRIX_BITS={self.matrix_bits}, and 2 is the least")
        require(self.qat_start == 1 or self.quant == "sdclip" and not self.n_int6_layers,
                f"QAT_START={self.qat_start}: training knows the steps of QUANT=sdclip N_INT6_LAYERS=0 alone; "
                f"set these, or QAT_START=1")
        for name in ("matrix_bits", "embed_bits"):
            require(2 <= getattr(self, name) <= 8, f"{name.upper()}={getattr(self, name)}: expected 2..8 bits")
        for name in ("attn_clip_sigmas", "mlp_clip_sigmas", "embed_clip_sigmas", "gptq_damp", "dist_timeout_seconds",
                     "eval_seconds_budget", "bits_per_weight", "adam_eps"):
            require(getattr(self, name) > 0, f"{name.upper()}={getattr(self, name)}: expected a positive number")
        require(self.train_batch_tokens % self.train_seq_len == 0,
                f"TRAIN_BATCH_TOKENS={self.train_batch_tokens} is no multiple of TRAIN_SEQ_LEN={self.train_seq_len}; "
                f"nearest: {max(1, round(self.train_batch_tokens / self.train_seq_len)) * self.train_seq_len}")
        require(self.micro_batch_tokens >= self.train_seq_len,
                f"MICRO_BATCH_TOKENS={self.micro_batch_tokens} holds no row of TRAIN_SEQ_LEN={self.train_seq_len}")
        require(self.eval_stride <= self.eval_seq_len,
                f"EVAL_STRIDE={self.eval_stride}: expected at most EVAL_SEQ_LEN={self.eval_seq_len}")
        for name, allowed in (("eval_ladder", "ema quantized sliding"), ("ttt_lora_on", "q k v o mlp head")):
            parts = [part for part in getattr(self, name).split(",") if part]
            require(set(parts) <= set(allowed.split()) and len(set(parts)) == len(parts),
                    f"{name.upper()}={getattr(self, name)}: expected some of {allowed.replace(' ', ',')}")
        require(self.ttt != "lora" or self.ttt_lora_on.strip(",") != "", f"TTT_LORA_ON={self.ttt_lora_on}: expected "
                f"some of q,k,v,o,mlp,head; TTT=none adapts nothing")
        for length, _ in seq_schedule(self):
            require(length <= self.train_seq_len, f"TRAIN_SEQ_SCHEDULE={self.train_seq_schedule}: rows of {length} "
                    f"tokens are longer than the rows that are read, TRAIN_SEQ_LEN={self.train_seq_len}; raise that")
        chunk_edges(1, self.ttt_chunk_size)
        require(self.ttt != "lora" or max(chunk_sizes(self.ttt_chunk_size)) <= self.eval_seq_len, f"TTT_CHUNK_SIZE="
                f"{self.ttt_chunk_size}: expected chunks of at most EVAL_SEQ_LEN={self.eval_seq_len} targets, which "
                f"are scored in one forward")
        ngram_rules(self.ngram_rules)
        require(all(0 <= period < math.inf for period in self.checkpoint_period), f"CHECKPOINT_EVERY="
                f"{self.checkpoint_every}: expected seconds such as 60, or steps such as 500steps")
        require(self.ttt_freeze_blocks <= self.num_layers and self.prequant_ttt_freeze_blocks <= self.num_layers,
                f"TTT_FREEZE_BLOCKS={self.ttt_freeze_blocks} PREQUANT_TTT_FREEZE_BLOCKS="
                f"{self.prequant_ttt_freeze_blocks}: expected at most NUM_LAYERS={self.num_layers}")
        require(self.muon_coefficients != "polar" or self.muon_backend_steps <= len(POLAR_EXPRESS),
                f"MUON_BACKEND_STEPS={self.muon_backend_steps}: Polar Express has {len(POLAR_EXPRESS)} steps; "
                f"lower it or set MUON_COEFFICIENTS=classic")
        require(self.max_wallclock_seconds == 0 or self.gptq_reserve_seconds < self.max_wallclock_seconds,
                f"GPTQ_RESERVE_SECONDS={self.gptq_reserve_seconds:g} leaves nothing of MAX_WALLCLOCK_SECONDS="
                f"{self.max_wallclock_seconds:g} to train in")
        require(self.resume == "0" or bool(self.run_id), f"RESUME={self.resume}: set RUN_ID to the run to go on with")

    @property
    def dataset_dir(self) -> Path:
        name = self.dataset or ("fineweb10B_sp8192_lossless_caps_caseops_v1_reserved" if self.caseops_enabled
                                else f"fineweb10B_sp{self.vocab_size}")
        return Path(self.data_path) if self.data_path else Path(self.data_dir) / "datasets" / name

    @property
    def checkpoint_period(self) -> tuple[float, int]:
        """(seconds, steps) of CHECKPOINT_EVERY; 0: not by these, negative: none that it can be."""
        number = self.checkpoint_every.removesuffix("steps")
        try:
            return (float(number), 0) if number == self.checkpoint_every else (0.0, int(number))
        except ValueError:
            return -1.0, -1

    @property
    def train_rows(self) -> int:
        """Rows of one optimizer step over all ranks."""
        return self.train_batch_tokens // self.train_seq_len

    @property
    def eval_rows(self) -> int:
        """Rows of one evaluation forward on one device."""
        return max(1, self.val_batch_tokens // 8 // self.eval_seq_len)

    @property
    def stride(self) -> int:
        """Targets by which sliding windows advance; whole windows where EVAL_STRIDE=0."""
        return self.eval_stride or self.eval_seq_len

    def grid(self, family: str) -> tuple[int, float]:
        """(bits, clip in standard deviations) of the codes of one family of matrices: attn, mlp or embed."""
        return {"attn": (self.matrix_bits, self.attn_clip_sigmas), "mlp": (self.matrix_bits, self.mlp_clip_sigmas),
                "embed": (self.embed_bits, self.embed_clip_sigmas)}[family]

    @classmethod
    def from_env(cls, env: Mapping[str, str], stored: Mapping[str, Any] | None = None) -> tuple[Config, list[str]]:
        """Preset, then what an artifact has `stored` (EVAL_ONLY), then variables: the config, and warnings.

        Raises `UserError` for a value that does not parse, an impossible combination, and a variable that looks
        like a knob but is none.
        """
        types = typing.get_type_hints(cls)
        stored = dict(stored or {})
        given, warnings = translate(env, set(types))
        preset = given.get("preset", stored.get("preset", "record"))
        require(preset in PRESETS, f"PRESET={preset}: expected one of {', '.join(PRESETS)}")
        values = {**PRESETS[preset], **stored, "preset": preset}
        fixed = {f.name for f in dataclasses.fields(ModelKnobs)} & set(stored)
        for name, text in given.items():
            value = parse(name, types[name], text)
            require(name not in fixed or value == stored[name],
                    f"{name.upper()}={text}: the artifact was made with {stored.get(name)}; unset it")
            values[name] = value
        return cls(**values), warnings


def chunk_edges(length: int, schedule: str) -> list[int]:
    """Where chunks begin and end in a document of `length` targets under TTT_CHUNK_SIZE; the last edge may be beyond.

    A chunk that begins before the first limit has its size, and so on; the last size has no limit. By position, not by
    the document's length as in #2014: a score may not depend on where its document will end.

    >>> chunk_edges(20, "8:4,6"), chunk_edges(5, "48")
    ([0, 4, 8, 14, 20], [0, 48])
    """
    *limited, last = schedule.split(",")
    pairs = [part.split(":") for part in limited]
    require(last.isdecimal() and all(len(p) == 2 and p[0].isdecimal() and p[1].isdecimal() for p in pairs)
            and all(int(n) > 0 for n in (last, *(p[1] for p in pairs))),
            f"TTT_CHUNK_SIZE={schedule}: expected a number such as 48, or limit:size pairs and a last size such as "
            f"256:8,2000:24,48")
    edges = [0]
    while edges[-1] < length:
        edges.append(edges[-1] + next((int(size) for limit, size in pairs if edges[-1] < int(limit)), int(last)))
    return edges


def chunk_sizes(schedule: str) -> list[int]:
    """The sizes that TTT_CHUNK_SIZE names, in targets."""
    return [int(part.split(":")[-1]) for part in schedule.split(",")]


def ngram_rules(rules: str) -> list[tuple[int, float, int]]:
    """NGRAM_RULES as (context length, least share, least count)."""
    try:
        found = [(int(n), float(share), int(count)) for n, share, count in (r.split(":") for r in rules.split(","))]
    except ValueError:
        found = []
    require(bool(found) and all(1 <= n <= 64 and 0 < share <= 1 and count >= 1 for n, share, count in found)
            and len({n for n, _, _ in found}) == len(found),
            f"NGRAM_RULES={rules}: expected length:share:count, ... such as 8:0.7:3,16:0.5:2 (lengths 1..64)")
    return found


def parse(name: str, kind: type, text: str) -> Any:
    """The value of one variable. Booleans are 0 or 1 only; integers may have underscores."""
    try:
        if kind is bool:
            return {"0": False, "1": True}[text.strip()]
        value = kind(text.strip())
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        expected = {bool: "0 or 1", int: "an integer", float: "a number"}[kind]
        raise UserError(f"{name.upper()}={text!r}: expected {expected}") from None


# What published run commands set and we name otherwise: old name -> (our name, {old value: ours} or None for as is).
RENAMED: dict[str, tuple[str, dict[str, str] | None]] = {
    "EVAL_ONLY_PATH": ("EVAL_ONLY", None),
    "EVAL_ONLY_QUANTIZED_PATH": ("EVAL_ONLY", None),
    "DATASETS_DIR": ("DATA_PATH", None),
    "SMEAR_GATE": ("SMEAR_GATE_ENABLED", None),
    "SMEAR_GATE_WIDTH": ("GATE_WINDOW", None),
    "GATE_WIDTH": ("GATE_WINDOW", None),
    "BIGRAM_VOCAB_SIZE": ("BIGRAM_BUCKETS", None),
    "MUON_WEIGHT_DECAY": ("MUON_WD", None),
    "ADAM_WEIGHT_DECAY": ("ADAM_WD", None),
    "WARMDOWN_FRACTION": ("WARMDOWN_FRAC", None),
    "USE_POLAR_EXPRESS": ("MUON_COEFFICIENTS", {"0": "classic", "1": "polar"}),
    "PARALLEL_RESIDUAL": ("PARALLEL_RESIDUAL", {"0": "none", "1": "two"}),
    "SLIDING_WINDOW_ENABLED": ("EVAL_STRIDE", {"0": "0", "1": "64"}),
    "TTT_EVAL_SEQ_LEN": ("EVAL_SEQ_LEN", None),
    "PREQUANT_TTT_ENABLED": ("PREQUANT_TTT", None),
    "TOKEN_BOOST": ("NGRAM_BASE_BETA", None),
}
GATE_SWITCHES = {"SPARSE_ATTN_GATE_ENABLED": "sparse", "GATED_ATTN_ENABLED": "dense", "GATED_ATTN": "dense",
                 "GATED_ATTENTION": "dense", "ATTN_OUT_GATE_ENABLED": "output", "GATE_ATTN_OUT": "output"}
GATE_BIASES = {"GATED_ATTN": "2.0", "GATED_ATTENTION": "4.0"}
"""Initial bias of the switches that mean the dense gate's bias form (#1514, #549)."""

LORA_SWITCHES = ("TTT_Q_LORA", "TTT_K_LORA", "TTT_V_LORA", "TTT_O_LORA", "TTT_MLP_LORA")
SPECIAL = ("PARALLEL_RESIDUAL_START RECUR_LAYERS MATRIX_CLIP_SIGMAS TTT_ENABLED PHASED_TTT_ENABLED TTT_MASK "
           "TOKEN_ORDER TOKEN_THRESHOLD MIXED_QUANT").split()
"""Variables that `translate` takes apart by hand."""

# Variables of published commands that have no effect here, and why (patterns; the reason is printed once).
NO_EFFECT: tuple[tuple[str, str], ...] = (
    ("TTT_WARM_START_*", "a document's adapters never learn from another document of its part"),
    ("TTT_SHORT_* TTT_TRAIN_* TTT_LOCAL_LR_MULT", "what a document's length decides depends on ids to come"),
    ("TTT_EVAL_BATCHES TTT_DEBUG_BYPASS TTT_DOC_LIMIT GLOBAL_TTT_DOC_LIMIT TTT_HEARTBEAT_SECONDS TTT_ONLY "
     "TTT_ONLY_EVAL TTT_EVAL_ONLY TTT_OUTPUT_DIR VAL_DOC_FRACTION", "every document is scored; EVAL_ONLY scores alone"),
    ("GLOBAL_TTT_RESPECT_DOC_BOUNDARIES GLOBAL_TTT_WARMUP_CHUNKS GLOBAL_TTT_WARMUP_START_LR",
     "documents are always separate, and this SGD has no warm-up"),
    ("NGRAM_WITHIN_* NGRAM_WORD_* NGRAM_AGREE_BONUS WITHIN_* WORD_*", "hints come from whole tokens alone"),
    ("NGRAM_OPEN_TABLE_BITS NGRAM_ORDER_STRIDE", "counts are exact, and NGRAM_RULES lists the contexts"),
    ("PREQUANT_TTT_COSINE_DECAY", "its rate always falls as a cosine"),
    ("ETLB_* ASYMMETRIC_LOGIT ASYM_LOGIT_RESCALE", "no record ever trained this scale; here there is none"),
    ("LQER_* AWQ_LITE_* HESSIAN_CLIP_LAMBDA INT5_LAYERS",
     "QUANT chooses the steps by what an error costs; there is no separate correction"),
    ("LATE_QAT* QAT QAT_ENABLED QAT_THRESHOLD QAT_FRACTION QAT_START_FRAC QAT_BITS QAT_AFTER_STEP",
     "QAT_START says from when on training sees rounded matrices"),
    ("COMPRESSOR", "CODEC chooses the coder of the codes; no external program is needed"),
    ("GATED_ATTN_QUANT_GATE", "gates are always stored in int8 with one scale a row"),
    ("FUSED_CE_ENABLED", "the kernels are chosen by what the machine has; see the log"),
    ("GPTQ_ENABLED", "GPTQ is always on"),
    ("EMBED_LR HEAD_LR TIE_EMBEDDINGS EMBEDDING_DIM", "the output matrix is always the embedding, of width MODEL_DIM"),
    ("MUON_BETA2", "no record reads it; NorMuon here is NORMUON_BETA2"),
    ("VAL_BATCH_SIZE", "the batch of evaluation is VAL_BATCH_TOKENS"),
    ("WARMDOWN_ITERS WARMDOWN_STEPS", "the warm-down is a fraction of the budget, WARMDOWN_FRAC"),
    ("WD_TAPER_* SWA_ENABLED SWA_EVERY", "retired by the later records"),
    ("VE_* VALUE_RESIDUAL DISABLE_LAYER0_ATTN REPEAT_UNTIE_MLP REPEAT_UNTIE_MLP_LAYERS GATE_MLP_OUT",
     "the model has no such part"),
    ("ATTN_OUT_GATE_SRC GATE_ATTN_SRC SPARSE_ATTN_GATE_INIT_STD",
     "the gates read the block's normed input, and start at zero"),
    ("RECUR_START_STEP RECUR_WARMUP_STEPS", "the loop starts at the fraction ENABLE_LOOPING_AT of the budget"),
    ("PARALLEL_START_LAYER_IS_PHYSICAL", "it always is"),
    ("TRAIN_SEQ_SCHEDULE_MODE COMPILE_SHAPE_WARMUP*",
     "row lengths follow the used fraction of the budget, and every graph is primed before the clock starts"),
    ("TRAIN_FILES VAL_FILES SAVE_QUANT_STATE PREQUANT_ONLY SKIP_POST_TRAIN_EVAL EVAL_INCLUDE_TAIL",
     "every shard of DATA_PATH is used, and every target is scored"),
    ("CONTROL_TENSOR_NAME_PATTERNS INT8_KEEP_FLOAT_FP32_NAME_PATTERNS", "ROUTES says how each parameter is treated"),
    ("MATCHED_FINEWEB_*", "this is a variable of the data scripts"),
    ("INT4_* INT6_* MTP_* MLP_HIDDEN MLP_GROUPS EMBED_DIM EMA_ENABLED EVAL_BATCH_SEQS "
     "EVAL_DEPTH_RECURRENCE FP16_EMBED_EXPORT GPTQ_RESERVE_MS LOOP_PHASE2_AT LORA_RANK POST_GPTQ_EVAL_ONLY ROPE_TYPE "
     "BIGRAM_HASH TARGET_MB USE_GPTQ USE_ZSTD VAL_MAX_TOKENS YARN_MAX_LEN ACTIVATION ADAM_LR ATTN_PROJ_TYPE "
     "BATCH_SCHEDULE_FRACTION BATCH_TOKENS_START BITNET_* CHURN_LOG_EVERY COMPILE_MODE CORR_WEIGHT_LR DIFF_ATTN "
     "FP_STORAGE LOGIT_HEAD_TYPE MATRIX_OPTIMIZER REFINER REFINER_KERNEL SEQ_LEN_START SEQ_SCHEDULE_FRACTION "
     "SLIDING_BATCH_SIZE SLIDING_EVAL SLIDING_EVAL_STRIDE SMEAR SOFTCAP_TYPE TEMP_SCALING TVERSKY_* "
     "TRAINING_DEPTH_RECURRENCE UNTIE_AT_FRACTION",
     "a part of older scripts that this program does not have"),
)
# Prefixes that only a knob of this field starts with; a stranger with one of them is taken for a misspelt knob.
KNOB_PREFIXES = ("ATTN_", "BIGRAM_", "EMBED_", "EVAL_", "GATED_ATTN", "GLOBAL_TTT_", "GPTQ_", "GRAD_CLIP", "LOOP_",
                 "LQER_", "MATRIX_BITS", "MATRIX_CLIP", "MATRIX_LR", "MLP_", "MUON_", "NORMUON_", "NUM_LAYERS",
                 "NUM_LOOPS", "PARALLEL_FINAL", "PARALLEL_RES", "PARALLEL_START", "QK_", "ROPE_", "SKIP_GATES",
                 "SMEAR_", "SPARSE_ATTN", "TIED_EMBED", "TRAIN_BATCH", "TRAIN_SEQ", "TTT_", "VAL_LOSS", "WARMDOWN_",
                 "XSA_")
# Prefixes of other programs' variables, which published commands set beside the knobs.
LIBRARY_PREFIXES = ("CUDA_", "GLOO_", "HF_", "NCCL_", "OMP_", "PYTORCH_", "TORCH", "TRITON_", "WANDB_")
# Names that other programs use and that lie one or two edits from a knob.
STRANGERS = frozenset("TYPE COMPILER NTHREADS NUM_THREADS JAVA_PATH ARTIFACTS_DIR".split())


def translate(env: Mapping[str, str], fields: set[str]) -> tuple[dict[str, str], list[str]]:
    """Field name -> text for every knob in `env`, and one warning for each variable without effect.

    Old names are mapped (`RENAMED`, the switches, `SPECIAL`). A name that is neither a knob nor known
    raises `UserError` if it is one or two edits from a knob, has one of `KNOB_PREFIXES`, or was typed as an argument
    (run.sh lists these in KNOBS_TYPED); anything else in the environment is none of our business.
    """
    env = {name: value.strip() for name, value in env.items()}
    given = {name.lower(): env[name] for name in env if name.isupper() and name.lower() in fields}
    reasons: dict[str, list[str]] = {}
    knobs = {name.upper() for name in fields}

    def offer(source: str, name: str, value: str) -> None:
        """Take over what `source` says of a knob; a knob that says otherwise itself is a contradiction."""
        known = given.setdefault(name.lower(), value)
        require(known == value, f"{source}={env[source]} means {name}={value}, but {name}={known} is set too")

    for name, (new, values) in RENAMED.items():
        if name in env:
            require(values is None or name == new or env[name] in {*values, *values.values()},
                    f"{name}={env[name]}: expected one of {', '.join(values or ())}")
            value = env[name] if values is None else values.get(env[name], env[name])
            if name == new:
                given[new.lower()] = value
            elif (name, value) != ("SLIDING_WINDOW_ENABLED", "64"):  # on is what EVAL_STRIDE says anyway
                offer(name, new, value)
    switches = {name: parse(name, bool, env[name]) for name in GATE_SWITCHES if name in env}
    on = [name for name, value in switches.items() if value]
    require(len({GATE_SWITCHES[name] for name in on}) <= 1,
            f"{' and '.join(on)} are both switched on; ATTN_GATE takes one of them")
    for name in on or [name for name in switches if GATE_SWITCHES[name] == ModelKnobs.attn_gate][:1]:
        offer(name, "ATTN_GATE", GATE_SWITCHES[name] if on else given.get("attn_gate", "none"))
        if name in GATE_BIASES and on:
            given.setdefault("gated_attn_bias", GATE_BIASES[name])
    if "PARALLEL_RESIDUAL_START" in env:
        start = parse("PARALLEL_RESIDUAL_START", int, env["PARALLEL_RESIDUAL_START"])
        offer("PARALLEL_RESIDUAL_START", "PARALLEL_RESIDUAL", "single" if start >= 0 else "none")
        offer("PARALLEL_RESIDUAL_START", "PARALLEL_START_LAYER", str(max(start, 0)))
    if "RECUR_LAYERS" in env:
        parts = env["RECUR_LAYERS"].split(",")
        blocks = [int(part) for part in parts if part.strip().isdecimal()]
        require(bool(blocks) and len(blocks) == len(parts) and blocks == list(range(blocks[0], blocks[-1] + 1)),
                f"RECUR_LAYERS={env['RECUR_LAYERS']}: expected consecutive blocks such as 4,5")
        offer("RECUR_LAYERS", "LOOP_START", str(blocks[0]))
        offer("RECUR_LAYERS", "LOOP_END", str(blocks[-1]))
        given.setdefault("num_loops", "1")
    if "TTT_ENABLED" in env:
        whole = [name for name in ("TTT_EPOCHS", "TTT_CHUNK_TOKENS", "TTT_LR", "TTT_FREEZE_BLOCKS") if name in env]
        on = parse("TTT_ENABLED", bool, env["TTT_ENABLED"])
        given.setdefault("ttt", "none" if not on else "sgd" if whole else "lora")
    if env.get("PHASED_TTT_ENABLED") == "0":
        offer("PHASED_TTT_ENABLED", "PHASED_TTT_NUM_PHASES", "0")
    masked = {name.removeprefix("TTT_").removesuffix("_LORA").lower() for name in LORA_SWITCHES
              if name in env and not parse(name, bool, env[name])}
    mask = env.get("TTT_MASK", "")
    require(not mask or re.fullmatch("no_[qkv]+", mask) is not None, f"TTT_MASK={mask}: expected such as no_qv")
    masked |= set(mask.removeprefix("no_"))
    if masked:
        given.setdefault("ttt_lora_on", ",".join(n for n in EvalKnobs.ttt_lora_on.split(",") if n not in masked))
    if "TOKEN_ORDER" in env or "TOKEN_THRESHOLD" in env:
        given.setdefault("ngram_rules", f"{parse('TOKEN_ORDER', int, env.get('TOKEN_ORDER', '16')) - 1}:"
                                        f"{env.get('TOKEN_THRESHOLD', '0.8')}:1")
        given.setdefault("ngram_beta_by_share", "0")
    if "MATRIX_CLIP_SIGMAS" in env:  # every matrix is one of attention or MLP, whose own knobs come first
        given.setdefault("attn_clip_sigmas", env["MATRIX_CLIP_SIGMAS"])
        given.setdefault("mlp_clip_sigmas", env["MATRIX_CLIP_SIGMAS"])

    if "MIXED_QUANT" in env:
        if parse("MIXED_QUANT", bool, env["MIXED_QUANT"]):
            offer("MIXED_QUANT", "QUANT", "sdclip")
        else:
            given["n_int6_layers"] = "0"

    typed = {name for name in env.get("KNOBS_TYPED", "").split() if not name.startswith(LIBRARY_PREFIXES)}
    known = {*RENAMED, *GATE_SWITCHES, *LORA_SWITCHES, *(STRANGERS - typed), *SPECIAL}
    for name in sorted(set(env) - knobs - known):
        reason = next((why for patterns, why in NO_EFFECT
                       if any(fnmatch.fnmatchcase(name, p) for p in patterns.split())), None)
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
            continue
        near = sorted((edits(name, knob), knob) for knob in knobs if abs(len(name) - len(knob)) <= 2)
        # Short names may differ by one edit only (SEED, but not HEAD or USER).
        close = name.isupper() and bool(near) and near[0][0] <= (2 if len(near[0][1]) > 9 else 1)
        if close or name in typed or name.startswith(KNOB_PREFIXES):
            nearest = near[0][1] if close else difflib.get_close_matches(name, knobs, n=1, cutoff=0.0)[0]
            raise UserError(f"{name}={env[name]}: no such knob; did you mean {nearest}? (--help lists them all"
                            f"{'; what is for other programs goes before the command' * (name in typed)})")
    return given, [f"{', '.join(names)}: no effect here: {why}" for why, names in reasons.items()]


def edits(a: str, b: str) -> int:
    """Insertions, deletions, replacements and swaps of neighbours that turn a into b (restricted Damerau distance)."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(row[-1] + 1, rows[-1][j] + 1, rows[-1][j - 1] + (x != y)))
            if i > 1 and j > 1 and a[i - 2] == y and x == b[j - 2]:
                row[j] = min(row[j], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]


class Knob(NamedTuple):
    """One row of `--help`."""
    group: str
    name: str
    kind: str
    default: Any
    doc: str


def knobs() -> list[Knob]:
    """All knobs in the order of the source. Their docs are read from the source; a packed file has none left."""
    rows = []
    for group in GROUPS:
        docs: dict[str, str] = {}
        with contextlib.suppress(OSError):
            body = ast.parse(textwrap.dedent(inspect.getsource(group))).body[0].body  # type: ignore[attr-defined]
            for field, text in zip(body, body[1:]):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    docs[field.target.id] = ast.literal_eval(text.value)  # type: ignore[union-attr, arg-type]
        for f in dataclasses.fields(group):
            title = (group.__doc__ or "").strip() if docs else group.__name__.removesuffix("Knobs")
            rows.append(Knob(title, f.name.upper(), str(f.type), f.default,
                             docs.get(f.name, "")))
    return rows


def show(value: Any) -> str:
    """A knob's value as one would type it."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def help_text() -> str:
    """What `--help` prints: usage, then every knob by group with type, default and preset values."""
    out = ["usage: [KNOB=value ...] python train_gpt.py [--help | --check]", "",
           "--check validates the knobs, prints layer plan, routes and predicted artifact size, and stops.",
           "Presets: " + ", ".join(PRESETS) + ". A value in [brackets] is the one of the preset demo."]
    group = None
    for knob in knobs():
        if knob.group != group:
            out += ["", knob.group]
            group = knob.group
        demo = PRESETS["demo"].get(knob.name.lower(), knob.default)
        head = f"  {knob.name}={show(knob.default)} ({knob.kind})"
        out.append(head + (f" [{show(demo)}]" if demo != knob.default else ""))
        out += textwrap.wrap(knob.doc, 104, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(out)


# ----------------------------------------------------------------------------------------------------
# 2 Run: where this process runs; the only section that knows ranks, devices, clocks and files of the log
# ----------------------------------------------------------------------------------------------------
# With one process every collective is the identity, so the code above it has one path. Ranks come from torchrun.
# Every second between start and end belongs to a phase (`run.phase`), each marked as training, evaluation or neither;
# the verdict adds them up. Only rank 0 writes. Collectives of CPU tensors go over gloo also where the model is on
# GPUs, so that a number can be agreed upon without waiting for the GPU.
# Safe to change: what is logged. Not safe: a collective that only some ranks reach.


class Phase(NamedTuple):
    """One stretch of wall-clock time; `budget` is train, eval or none (set-up and diagnostics)."""
    name: str
    budget: str
    start: float
    seconds: float
    depth: int
    """Number of phases around it."""
    own: float
    """Seconds that no phase inside has taken: what is charged to the budget."""


def format_value(value: Any) -> str:
    """A logged value without spaces: floats with 7 significant digits, containers as JSON."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.7g}"
    return json.dumps(value, separators=(",", ":")) if isinstance(value, (dict, list, tuple)) else str(value)


class Run:
    """Rank, device, threads, phase clock and log of this process. Use as a context manager.

    Raises `UserError` where the requested device does not exist.
    """

    def __init__(self, cfg: Config, env: Mapping[str, str], log: bool = True) -> None:
        self.started = time.perf_counter()
        self.cfg = cfg
        self.rank, self.world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        self.local_rank, self.local_world = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
        self.phases: list[Phase] = []
        self._open: list[list[Any]] = []  # of each open phase: budget, start, seconds of closed phases inside it
        self.place = "start"
        """Phase, and step where it has some: what is told of a rank that is lost."""
        self.stop, self.graceful = "", False
        """Name of the signal that asks this run to end; whether someone looks at it, or it must end the run itself."""
        self.resumes = ""
        """What this run goes on with: train, score, or nothing."""
        self.saving: Future | None = None
        """The checkpoint that is being written, if any: done once it is on the disk, or cannot be."""
        self._files: list[io.TextIOBase] = []  # text log, JSON lines, lock
        self.disk_full = False
        self._mirror: subprocess.Popen | None = None
        self.device = self._pick_device(cfg)
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
            cfg.dtype, torch.bfloat16 if self.is_cuda or cpu_has_bf16_units() else torch.float32)
        if self.is_cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # master weights are fp32; products run in tf32 or bf16
        else:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(cfg.threads or max(1, cores // self.local_world))
        set_deterministic(cfg.deterministic)
        self.watch: Watch | None = None
        if self.world > 1:
            limit = datetime.timedelta(seconds=cfg.dist_timeout_seconds)
            store = next(dist.rendezvous("env://", timeout=limit))[0]
            # A restart of torchrun finds the store of the attempt before it: gloo would call ports that are closed.
            store = dist.PrefixStore(f"attempt{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.is_cuda else "gloo", store=store, rank=self.rank,
                                    world_size=self.world, timeout=limit,
                                    device_id=self.device if self.is_cuda else None)
            self.watch = Watch(self, env)
        self.compiles = cfg.compile == "on" or (cfg.compile == "auto" and self.is_cuda)
        self._name(self.share(cfg.run_id or f"{cfg.preset}-{time.strftime('%Y%m%d-%H%M%S')}-seed{cfg.seed}"))
        if log:
            self._open_log()

    def _name(self, run_id: str) -> None:
        cfg, self.run_id = self.cfg, run_id
        self.log_path = Path(cfg.log_dir) / f"{run_id}.txt"
        self.artifact_path = Path(cfg.artifact_dir or cfg.log_dir) / f"{run_id}.bin"
        self.checkpoint_path = self.artifact_path.with_suffix(".ckpt")
        self.score_path = self.artifact_path.with_suffix(".score.ckpt")

    def _pick_device(self, cfg: Config) -> torch.device:
        if cfg.device == "cpu" or (cfg.device == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        require(torch.cuda.is_available(), "DEVICE=cuda: torch sees no CUDA device; DEVICE=cpu runs without")
        if self.local_rank >= (count := torch.cuda.device_count()):
            raise LocalError(f"local rank {self.local_rank} has no GPU: torch sees {count}; lower --nproc_per_node to "
                             f"{count}")
        return torch.device("cuda", self.local_rank)

    def _open_log(self) -> None:
        """Rank 0 creates both log files; an existing log is never written over, and continued by RESUME alone.

        A name that nobody asked for and that another run has taken in this second gets a number.
        """
        problem, stem, tries = "", self.run_id, 1
        if self.is_main:
            while (problem := self._problem()) and not self.cfg.run_id and self.log_path.exists() and tries < 100:
                tries += 1
                self._name(f"{stem}-{tries}")
        problem, self.resumes, run_id = self.share((problem, self.resumes, self.run_id))
        self._name(run_id)
        require(not problem, problem)

    def _problem(self) -> str:
        """Why this run cannot have its files, or nothing: then they are open, and locked while this process lives."""
        cfg, again = self.cfg, self.cfg.resume != "0"
        files = [self.log_path, self.log_path.with_suffix(".jsonl"), self.artifact_path]
        kept = {"score": self.score_path, "train": self.checkpoint_path}
        if cfg.eval_only:
            del kept["train"]
        found = [name for name, path in kept.items() if any(file.exists() for file in checkpoint_files(path))]
        # A file from which scoring goes on is older than its artifact, which may never have been written.
        found = [name for name in found if name == "train" or cfg.eval_only or self.artifact_path.exists()]
        taken = [] if again and "score" in found else [self.artifact_path] if again else [*files, *kept.values()]
        there = [str(path) for path in taken if path.exists()]
        if there:
            return f"RUN_ID={self.run_id}: {there[0]} exists already; choose another RUN_ID" + \
                (f"; EVAL_ONLY={there[0]} scores it again" if again else
                 ", or RESUME=1 to go on with that one" if found else "")
        if cfg.resume == "1" and not found:
            return f"RESUME=1: no checkpoint {' or '.join(map(str, kept.values()))}; RESUME=auto starts anew without"
        try:
            for path in files:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._files = [open(path, "a" if again else "x", encoding="utf-8") for path in files[:2]]
            if files[0].parent.resolve() != files[2].parent.resolve():
                self._files.append(open(self.artifact_path.with_suffix(".lock"), "a"))
            for file in self._files[::2]:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when this process ends
        except BlockingIOError:
            return f"RUN_ID={self.run_id}: a process is at work on this run; wait for it, or choose another RUN_ID"
        except OSError as error:
            if isinstance(error, FileExistsError) and Path(error.filename) in files:
                return f"RUN_ID={self.run_id}: {error.filename} exists already; choose another RUN_ID"
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
                return f"LOG_DIR={cfg.log_dir} ARTIFACT_DIR={cfg.artifact_dir}: cannot write: {error}"
        self.resumes = found[0] if again and found else ""
        return ""

    def __enter__(self) -> Run:
        wanted = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        self._handlers = {number: signal.signal(number, self._signalled) for number in wanted}
        return self

    def _signalled(self, number: int, frame: object) -> None:
        """Where something would be lost (`graceful`) the run ends a little later; else, or asked twice, at once."""
        asked, self.stop = self.stop, signal.Signals(number).name
        if asked or not self.graceful:
            raise StoppedError(self.stop, f"in phase {self.place}{self.goes_on()}")

    def goes_on(self) -> str:
        """How to go on with what is on disk, as the end of a sentence; empty: nothing is.

        A signal handler asks, too: no wait for a thread, which may want a lock that the interrupted line holds.
        """
        scores = self.score_path if self.cfg.eval_only or self.artifact_path.exists() else self.checkpoint_path
        path = next((file for path in (scores, self.checkpoint_path) for file in checkpoint_files(path)
                     if file.exists()), None)
        return f"; RESUME=1 RUN_ID={self.run_id} goes on from {path}" if path else ""

    def until_saved(self) -> None:
        """Until no checkpoint is being written, but no longer than one rank may keep others waiting."""
        if self.saving is not None:
            wait_for([self.saving], self.cfg.dist_timeout_seconds)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.watch is not None and error is not None and (
                not isinstance(error, UserError) or isinstance(error, LocalError)):
            self.watch.fail(error)
        if error is not None:
            self.log("error", kind=type(error).__name__, text=str(error))
        self.until_saved()  # while its lock is held and its log is open
        for file in self._files:
            try:
                file.close()
            except OSError as failed:
                self.warn(f"{file.name}: its last lines are on no disk: {failed}")
        for lock in self._files[2:]:
            Path(lock.name).unlink(missing_ok=True)
        if self._mirror is not None:
            self._mirror.stdin.close()  # it copies what is left, and ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._mirror.wait(30)
        if self.world > 1 and dist.is_initialized():
            if error is None:
                dist.barrier()  # a process that ends early may take its peers' connections with it
            self.watch.done.set()
            if not self.is_cuda or getattr(error, "together", True):  # NCCL would wait for what others never join
                dist.destroy_process_group()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    # -- collectives -----------------------------------------------------------------------------------

    def total(self, t: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(t)
        return t

    def broadcast(self, t: Tensor) -> Tensor:
        """Rank 0's values on every rank, in place."""
        if self.world > 1:
            dist.broadcast(t, src=0)
        return t

    def reduce_scatter(self, full: Tensor) -> Callable[[], Tensor]:
        """Start to sum `full` [W*k, ...] over ranks; the function returned waits for this rank's k rows."""
        if self.world == 1:
            return lambda: full
        rows = full.size(0) // self.world
        if not self.is_cuda:  # gloo of older torch has no reduce-scatter; the values are the same
            work = dist.all_reduce(full, async_op=True)
            return lambda: (work.wait(), full[self.rank * rows:(self.rank + 1) * rows])[1]
        own = torch.empty_like(full[:rows])
        work = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(own, full, async_op=True)
        return lambda: (work.wait(), own)[1]

    def all_gather(self, own: Tensor) -> Callable[[], Tensor]:
        """Start to gather [k, ...] of each rank; the function returned waits for all [W*k, ...]."""
        if self.world == 1:
            return lambda: own
        full, own = own.new_empty(self.world * own.size(0), *own.shape[1:]), own.contiguous()
        if self.is_cuda:
            work = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(full, own, async_op=True)
        else:
            work = dist.all_gather(list(full.chunk(self.world)), own, async_op=True)
        return lambda: (work.wait(), full)[1]

    def share(self, value: Any) -> Any:
        """Rank 0's Python object on every rank (small things: names, messages, a file's bytes)."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's Python object, in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        boxes: list[Any] = [None] * self.world
        dist.all_gather_object(boxes, value)
        return boxes

    def collect(self, value: Any) -> list[Any]:
        """Every rank's Python object, in the order of ranks, on rank 0; nothing elsewhere."""
        if self.world == 1:
            return [value]
        boxes: list[Any] = [None] * self.world * self.is_main
        dist.gather_object(value, boxes if self.is_main else None, dst=0)
        return boxes

    def agree(self, problem: str) -> None:
        """Raise the first rank's `problem` (empty: none) as `UserError` on all ranks, so that none is left waiting."""
        problems = [p for p in self.gather(problem) if p]
        require(not problems, problems[0] if problems else "")

    # -- clock, log, progress --------------------------------------------------------------------------

    @contextlib.contextmanager
    def phase(self, name: str, budget: str = "none") -> Iterator[None]:
        """Everything inside is timed as `name` and charged to `budget`: train, eval or none."""
        self.synchronize()
        start, outside, self.place = time.perf_counter(), self.place, name
        self._open.append([budget, start, 0.0])
        try:
            yield
        finally:
            if sys.exc_info()[0] is None:
                self.synchronize()
                self.place = outside
            took = time.perf_counter() - start
            inner, depth = self._open.pop()[2], len(self._open)
            self.phases.append(Phase(name, budget, start - self.started, took, depth, took - inner))
            if depth:
                self._open[-1][2] += took
            else:
                self.log("phase", name=name, budget=budget, phase_seconds=round(took, 3))

    def went_before(self, name: str, budget: str, seconds: float) -> None:
        """Take over the seconds of the run that this one goes on with: it began that much earlier."""
        self.started -= seconds
        self.phases.append(Phase(name, budget, 0.0, seconds, 0, seconds))

    def spent(self, budget: str) -> float:
        """Seconds charged to `budget` so far: of each of its phases what no phase inside has taken."""
        ends = [*(start for _, start, _ in self._open[1:]), time.perf_counter()]
        return sum(p.own for p in self.phases if p.budget == budget) + sum(
            end - start - inner for end, (of, start, inner) in zip(ends, self._open) if of == budget)

    def seconds(self) -> dict[str, float]:
        """Seconds so far by budget; `none` has also what lies between phases."""
        total, charged = time.perf_counter() - self.started, {name: self.spent(name) for name in ("train", "eval")}
        return {**charged, "none": total - sum(charged.values())}

    def synchronize(self) -> None:
        """Wait for the GPU (nothing to wait for on a CPU)."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def log(self, event: str, **values: Any) -> None:
        """One event: a line `seconds event name=value ...` on screen and in the log, an object in the JSON lines."""
        if not self.is_main:
            return
        seconds = time.perf_counter() - self.started
        line = f"{seconds:9.1f} {event:14s} " + " ".join(f"{k}={format_value(v)}" for k, v in values.items())
        self.write(line.rstrip().replace("\n", " | "))
        self.record(event, values)

    def record(self, event: str, values: Mapping[str, Any]) -> None:
        """One object in the JSON lines alone; a number that is not finite becomes null."""
        seconds = round(time.perf_counter() - self.started, 3)
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._append(1, json.dumps({"seconds": seconds, "event": event, **finite}))

    def start_mirror(self) -> str:
        """Rank 0 starts what copies the log to WANDB and TENSORBOARD; returns what is missing for it, or nothing.

        A process of its own, which can neither delay nor end this one, also where a signal ends both.
        """
        asked = {"wandb": self.cfg.wandb, "tensorboard": self.cfg.tensorboard}
        wanted = [name for name, on in asked.items() if on and self.is_main]
        path, script = self.log_path.with_suffix(".jsonl"), Path(__file__).resolve().with_name("records") / "mirror.py"
        if wanted and not script.is_file():
            self.log("warning", text=f"{' '.join(wanted)}: no {script}; a full clone copies {path} later")
        elif missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
            return f"{missing[0].upper()}=1: not installed here; {sys.executable} -m pip install {' '.join(missing)}"
        elif wanted:
            self._mirror = subprocess.Popen([sys.executable, str(script), str(path), *wanted, "--follow"],
                                            stdin=subprocess.PIPE, start_new_session=True)
        return ""

    def write(self, line: str) -> None:
        """One line for readers only, on screen and in the text log of rank 0."""
        if self.is_main:
            tqdm.write(line)
            self._append(0, line)

    def _append(self, number: int, line: str) -> None:
        """One line to a log file. A full disk ends no run: the line stays in the file's buffer until there is room."""
        for file in self._files[number:number + 1]:
            try:
                file.write(line + "\n")
                file.flush()
            except OSError as error:
                if not self.disk_full:
                    self.warn(f"{self.log_path}: cannot write the log: {error}; the run goes on, make room")
                self.disk_full = True

    def logged(self) -> bool:
        """Whether every line so far has left for the disk."""
        try:
            for file in self._files[:2]:
                file.flush()
            return True
        except OSError:
            return False

    def warn(self, text: str) -> None:
        """One line on standard error, where the log cannot be trusted with it."""
        print(f"train_gpt.py: {text}", file=sys.stderr, flush=True)

    def progress(self, total: float, name: str, unit: str) -> tqdm:
        """A progress bar with rate and time left on rank 0's terminal; silent in a file."""
        return tqdm(total=total, desc=name, unit=unit, leave=False, dynamic_ncols=True,
                    bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}",
                    disable=not (self.is_main and sys.stderr.isatty()))

    def compiled(self, function: Callable) -> Callable:
        """`function` as one compiled graph where this run compiles, else itself."""
        if not self.compiles:
            return function
        torch._dynamo.config.recompile_limit = 64  # a graph for every plan and row length
        return torch.compile(function, dynamic=False, fullgraph=True)

    def graphs(self) -> dict[str, int]:
        """Graphs that this process has compiled so far, and the breaks in them."""
        if not self.compiles:
            return {"graphs": 0, "graph_breaks": 0}
        from torch._dynamo.utils import counters
        return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}


class Watch:
    """Looks after the other ranks, in a thread: none waits for long for one that is gone, and none is left behind.

    Each rank leaves a sign of life in torchrun's store every second, with its place. One that gives none for half of
    DIST_TIMEOUT_SECONDS (stopped, its machine lost), one that fails (also: a collective that took DIST_TIMEOUT_SECONDS)
    and a store that is gone end all: each prints rank, place, open collectives and stacks, and exits. What cannot,
    torchrun kills.
    """

    def __init__(self, run: Run, env: Mapping[str, str]) -> None:
        self.run, self.limit, self.done = run, run.cfg.dist_timeout_seconds, threading.Event()
        self.every = min(1.0, self.limit / 20)
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False,
                              timeout=datetime.timedelta(seconds=self.limit))
        self.store = dist.PrefixStore(f"watch{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.keys = [f"rank {rank}" for rank in range(run.world)]
        self.signs: dict[str, tuple[bytes, float]] = {}
        self.ending = threading.Lock()
        self._sign()
        self.store.wait(self.keys)
        faulthandler.enable()  # NCCL's own guard aborts the process
        threading.Thread(target=self._loop, daemon=True, name="watch").start()

    def _sign(self) -> None:
        self.store.set(self.keys[self.run.rank], f"{time.time():.1f} {self.run.place}")

    def _loop(self) -> None:
        while not self.done.wait(self.every):
            try:
                self._sign()
                reason = self.store.get("failed").decode() if self.store.check(["failed"]) else \
                    self.silent(self.limit / 2)
            except RuntimeError as error:
                reason = "" if self.done.is_set() else f"torchrun or rank 0 is gone ({str(error).splitlines()[0]})"
            if reason:
                self.end(reason)

    def silent(self, limit: float) -> str:
        """Who has given no sign of life for `limit` seconds, and where it was; empty: none."""
        now = time.perf_counter()
        for key, sign in zip(self.keys, self.store.multi_get(self.keys)):
            if sign != self.signs.get(key, (b"", now))[0]:
                self.signs[key] = sign, now
        return "; ".join(f"{key} gives no sign of life for {now - at:.1f} s, last in phase " +
                         sign.decode().split(" ", 1)[1] for key, (sign, at) in self.signs.items() if now - at > limit)

    def fail(self, error: BaseException) -> None:
        """This rank failed: find out whether because another is gone, tell the rest, and exit."""
        for number in (signal.SIGTERM, signal.SIGINT):  # torchrun ends the rest as soon as it sees one dead
            signal.signal(number, signal.SIG_IGN)
        traceback.print_exception(error)  # first: this rank's own thread, too, ends it once "failed" is in the store
        run, reason = self.run, ""
        with contextlib.suppress(RuntimeError):
            time.sleep(5 * self.every)  # a rank that is alive gives signs meanwhile
            reason = self.silent(4 * self.every)
        reason = reason or f"rank {run.rank} failed in phase {run.place}: {type(error).__name__}: " \
            f"{(str(error) or '-').splitlines()[0]}"
        with contextlib.suppress(RuntimeError):
            self.store.set("failed", reason)
        self.end(reason)

    def end(self, reason: str) -> None:
        """Print where this rank is, with the stack of every thread, and exit: nothing can be awaited any more."""
        self.ending.acquire(timeout=5)  # for good: the other thread may be about to say the same
        self.run.log("error", kind="lost", text=reason)
        print(f"train_gpt.py: rank {self.run.rank} ends in phase {self.run.place}: {reason}{collectives()}",
              file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)


def collectives() -> str:
    """What this rank's peers have not joined yet, or what they did last, by torch's flight recorder; empty: no record.

    A rank whose number is lower than the others' is the one that they wait for.
    """
    found = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # gloo's and NCCL's
        with contextlib.suppress(Exception):  # a private interface, read while all is lost anyway
            entries = json.loads(getattr(torch._C._distributed_c10d, name)())["entries"]
            found += [f"{e['profiling_name']} number {e['collective_seq_id']} of {e['input_sizes']}"
                      f"{'' if e['retired'] else ' (open)'}"
                      for e in [e for e in entries if not e["retired"]][-3:] or entries[-1:]]
    return "; collectives: " + ", ".join(found) if found else ""


def write_whole(path: Path, write: Callable[[Path], Any], previous: Path | None = None) -> None:
    """`write(temporary)`, flushed to the disk, becomes `path`, and what was there `previous`; or nothing changes."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def checkpoint_files(path: Path) -> tuple[Path, Path]:
    """A checkpoint's newest file and the one before; while the newest is renamed, or after a kill then, that alone."""
    return path, path.with_suffix(f".previous{path.suffix}")


class Checkpoints:
    """The files from which a run goes on: `path`, and the one before it.

    Safetensors: a JSON head and raw tensors, nothing that could run; SHA-256 of all of it is in the head. Tensors are
    whole, so that any number of ranks can go on. Who saves waits for a copy on its device alone: a thread brings that
    to pinned memory on a stream of its own, and writes. Only rank 0 writes and reads. No random state is kept: after
    initialisation nothing draws from it.
    """

    def __init__(self, path: Path, kinds: Mapping[str, type], run: Run) -> None:
        """`kinds`: types of the head's values, beside the knobs that this run must share with the one that saved."""
        self.paths, self.kinds, self.run = checkpoint_files(path), kinds, run
        self.pool, self.written = ThreadPoolExecutor(1), time.perf_counter()
        self.stream = torch.cuda.Stream() if run.is_cuda else None
        self.pinned: dict[str, Tensor] = {}

    def knobs(self) -> dict[str, Any]:
        """What must be the same in the run that goes on."""
        raise NotImplementedError

    def due(self) -> bool:
        """Whether this rank wants one now."""
        return 0 < self.run.cfg.checkpoint_period[0] <= time.perf_counter() - self.written

    def write(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], **said: Any) -> None:
        """Begin to write tensors and JSON values; work may go on at once. `said` is logged once they are on disk."""
        self.wait()
        self.written = time.perf_counter()
        if not self.run.is_main:
            return
        head = json.dumps({**state, "knobs": self.knobs()})
        copies = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        ready = torch.cuda.current_stream().record_event() if self.run.is_cuda else None
        self.run.saving = self.pool.submit(self._write, copies, ready, head, said)

    def _write(self, tensors: dict[str, Tensor], ready: Any, head: str, said: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file
        start, (path, previous) = time.perf_counter(), self.paths
        if ready is not None:
            with torch.cuda.stream(self.stream):
                ready.synchronize()
                tensors = {name: self.pinned[name].copy_(t, non_blocking=True) if name in self.pinned else t.cpu()
                           for name, t in tensors.items()}
                self.stream.synchronize()
        write_whole(path, lambda temporary: save_file(tensors, temporary, {
            "state": head, "sha256": digest_of(tensors, head)}), previous)
        if said:
            self.run.log("checkpoint", **said, path=str(path), bytes=path.stat().st_size,
                         write_seconds=time.perf_counter() - start)

    def wait(self) -> str:
        """Until the file that is being written is whole; why it could not be written, or nothing."""
        from safetensors import SafetensorError
        try:
            if self.run.saving is not None:
                self.run.saving.result()
            return ""
        except (OSError, SafetensorError) as error:  # a full disk ends no run
            problem = f"{self.paths[0]}: checkpoint not written: {error}"
            self.run.log("warning", text=f"{problem}; the one before is as it was")
            return problem
        finally:
            self.run.saving = None

    def end_run(self, where: str) -> None:
        """Raise `StoppedError` with what to do next, once the file is whole."""
        (problem, where), run = self.run.share((self.wait(), where)), self.run
        raise StoppedError(run.stop or "SIGTERM", f"after {where}: " + (
            problem or f"RESUME=1 RUN_ID={run.run_id} goes on from {self.paths[0]}"), together=True)

    def read(self, expected: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
             ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The newest whole file: state given to `write`, and on rank 0 its tensors, those `expected` of such a state.

        `UserError` where no file is whole or knobs differ.
        """
        problems, state, found = [], None, {}
        for path in self.paths if self.run.is_main else ():
            if path.exists() and state is None:
                try:
                    state, found = read_checkpoint(path, self.kinds, self.knobs(), expected)
                    self.run.log("resume", path=str(path), **{k: v for k, v in state.items() if k != "knobs"})
                except UserError as error:
                    problems.append(str(error))
                    self.run.log("warning", text=problems[-1])
        state, problems = self.run.share((state, problems))
        require(state is not None, "; ".join(problems))
        here, there = self.knobs(), state["knobs"]
        for name in {**here, **there}:  # also those that another version of this program has
            require(name in here, f"{self.paths[0]}: made by a version of this program with the knob "
                    f"{one_line(name).upper()}: go on with that version, or start anew with another RUN_ID")
            require(here[name] == there.get(name), f"{name.upper()}={show(here[name])}, but the checkpoint was made "
                    f"with {one_line(show(there.get(name)))}; set that back, or start anew with another RUN_ID")
        return state, found

    def remove(self) -> None:
        """Nothing goes on from here any more."""
        self.wait()
        for path in self.paths if self.run.is_main else ():
            with contextlib.suppress(OSError):
                path.unlink()


def digest_of(tensors: Mapping[str, Tensor], head: str) -> str:
    """SHA-256 of the head, and of names, types, shapes and bytes of CPU tensors."""
    sha = hashlib.sha256(head.encode())
    for name in sorted(tensors):
        sha.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        sha.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def read_checkpoint(path: Path, kinds: Mapping[str, type], knobs: Mapping[str, Any],
                    expected: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
                    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State and CPU tensors of a file with the `expected` names, types and shapes; else `UserError`, one line.

    Of a run with other knobs the state alone.
    """
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as file:  # holds the head's length and every offset against the file's size
            head, listed = file.metadata(), {name: file.get_slice(name) for name in file.keys()}
            text, sha = head["state"], head["sha256"]
            state = json.loads(text)
            require(isinstance(state, dict) and all(type(state.get(name)) is kind for name, kind in
                                                    {**kinds, "knobs": dict}.items()),
                    f"{path}: its head is not a checkpoint's")
            if state["knobs"] != knobs:
                return state, {}
            types = {torch.float32: "F32", torch.int32: "I32", torch.int64: "I64"}
            require({name: (part.get_dtype(), part.get_shape()) for name, part in listed.items()} ==
                    {name: (types[t.dtype], list(t.shape)) for name, t in expected(state).items()},
                    f"{path}: its tensors are not those of this run")
            tensors = {name: file.get_tensor(name) for name in listed}
        require(digest_of(tensors, text) == sha, f"{path}: damaged (the checksum does not fit)")
    except (OSError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path}: truncated or damaged ({type(error).__name__}: {one_line(error)})") from None
    return state, tensors


def set_deterministic(on: bool) -> None:
    """torch's switch, left alone where it stands: its first use imports a compiler for a second."""
    if torch.are_deterministic_algorithms_enabled() != on:
        torch.use_deterministic_algorithms(on)


def cpu_has_bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX); elsewhere bf16 is slower than fp32."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())


# ----------------------------------------------------------------------------------------------------
# 3 Data: shards -> documents -> batches
# ----------------------------------------------------------------------------------------------------
# A shard is 256 little-endian int32 (magic, version, token count, zeros) and then uint16 ids; every document starts
# with BOS; documents may run on into the next shard, so the shards of a split are read as one stream. Which row goes
# where is a pure function of (seed, step): any world size sees the same global batch, and a batch can be rebuilt from
# its number alone. Nothing here knows the model.
# Safe to change: the order of an epoch. Not safe: anything that makes two ranks read different plans.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
BOS_ID = 1
"""Beginning of document, in every tokenizer of the challenge."""
IGNORE = -100
"""Target of a token that is not trained on (padding rows)."""


def open_shard(path: Path) -> np.ndarray:
    """Memory-mapped uint16 ids of one shard; `UserError` unless magic, version and file size fit."""
    size = path.stat().st_size
    require(size >= SHARD_HEADER_BYTES, f"{path}: {size} bytes is no shard (the header alone has 1024); rebuild it "
            f"with data/prepare.py")
    header = np.fromfile(path, dtype="<i4", count=256)
    require(int(header[0]) == SHARD_MAGIC and int(header[1]) == SHARD_VERSION,
            f"{path}: magic {header[0]} version {header[1]}, expected {SHARD_MAGIC} and {SHARD_VERSION}: not a "
            f"token shard; rebuild it with data/prepare.py")
    tokens = int(header[2])
    require(size == SHARD_HEADER_BYTES + 2 * tokens,
            f"{path}: header says {tokens:,} tokens = {SHARD_HEADER_BYTES + 2 * tokens:,} bytes, the file has "
            f"{size:,}: truncated or damaged; fetch or prepare it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(tokens,)) if tokens else \
        np.empty(0, dtype="<u2")


def pieces(shard: np.ndarray, size: int = 1 << 20) -> Iterator[np.ndarray]:
    """A shard's ids in order, `size` at a time, read past the map: its pages would count as this process's memory."""
    for start in range(0, len(shard), size):
        yield np.fromfile(shard.filename, shard.dtype, min(size, len(shard) - start),  # type: ignore[attr-defined]
                          offset=SHARD_HEADER_BYTES + 2 * start)


class TokenStream:
    """The shards `<prefix>_*.bin` of a folder in name order, read as one sequence of ids."""

    def __init__(self, folder: Path, prefix: str) -> None:
        require(folder.is_dir(), f"{folder}: no such dataset folder; make one with `python data/prepare.py` (download, "
                f"demo, text), or set DATA_PATH")
        self.paths = sorted(p for p in folder.glob(f"{prefix}_*.bin") if p.is_file() and
                            (prefix.endswith("bytes") or "_bytes_" not in p.name))
        require(bool(self.paths), f"{folder}: no {prefix}_*.bin in it; prepare or download the dataset, or set "
                f"DATA_PATH")
        self.shards = [open_shard(path) for path in self.paths]
        self.ends = np.cumsum([len(s) for s in self.shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) of the stream, copied; may span shards."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        parts = []
        while start < stop:
            begin = int(self.ends[first]) - len(self.shards[first])
            end = min(stop, int(self.ends[first]))
            parts.append(self.shards[first][start - begin:end - begin])
            start, first = end, first + 1
        return np.concatenate(parts) if parts else np.empty(0, dtype="<u2")

    def check(self, vocab_size: int, part: int = 0, parts: int = 1) -> str:
        """What is wrong with the ids of shards part, part+parts, ...: a message, or "" if nothing is."""
        for path, shard in list(zip(self.paths, self.shards))[part::parts]:
            top = max((int(ids.max()) for ids in pieces(shard)), default=0)
            if top >= vocab_size:
                return f"{path}: holds id {top}, but VOCAB_SIZE={vocab_size}: another tokenizer's shard, or damaged"
        if part == 0 and not any((s[:1 << 20] == BOS_ID).any() for s in self.shards):
            return f"{self.paths[0]}: no document start (id {BOS_ID}) in it; prepare it again with BOS"
        return ""

    def document_starts(self) -> np.ndarray:
        """Stream positions of all BOS, int64; whatever precedes the first one counts as a document too."""
        with ThreadPoolExecutor() as pool:  # the comparison releases the GIL
            found = list(pool.map(lambda s: np.flatnonzero(s == BOS_ID), self.shards))
        starts = np.concatenate([f + int(end) - len(s) for f, s, end in zip(found, self.shards, self.ends)])
        return starts if len(starts) and starts[0] == 0 else np.concatenate([[0], starts])

    def document_keys(self, part: int = 0, parts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(key [documents] uint64, length [documents] int64) of the documents that start in shards part, part+parts...

        A key is the sum of place times a random number for the id: equal documents have equal keys wherever they stand,
        others practically never do. A document that runs on into the next shard has the key of its first part.
        """
        mix = np.random.default_rng(0).integers(0, 2**64 - 1, 1 << 16, dtype=np.uint64)
        keys, lengths = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int64)]
        for shard in self.shards[part::parts]:
            before, sums, sizes, begins = 0, [], [], []  # ids of the open document so far; of each piece's documents
            for ids in pieces(shard, 1 << 17):
                edges = np.union1d(0, np.flatnonzero(ids == BOS_ID))
                begins.append(ids[edges] == BOS_ID)
                sizes.append(np.diff(edges, append=len(ids)))
                place = np.arange(1, 1 + len(ids)) - np.repeat(edges, sizes[-1])
                place[:sizes[-1][0]] += 0 if begins[-1][0] else before
                sums.append(np.add.reduceat(mix[ids] * place.view(np.uint64), edges))
                before = place[-1]
            if len(first := np.flatnonzero(np.concatenate([*begins, [False]]))):
                keys.append(np.add.reduceat(np.concatenate(sums), first))
                lengths.append(np.add.reduceat(np.concatenate(sizes), first))
        return np.concatenate(keys), np.concatenate(lengths)


def row_offsets(num_tokens: int, seq_len: int, seed: int, epoch: int, order: str) -> np.ndarray:
    """[rows] int64: start of each row of an epoch cut from the stream; a row has seq_len inputs and as many targets.

    `order` is window (a permutation), coprime (a random stride that shares no divisor with the number of rows: #1060's
    order, for the corpus as one ring instead of one a shard) or none. All but none also start at a random phase below
    seq_len, so that epochs cut the stream differently.
    """
    rng = np.random.default_rng([seed, epoch])
    phase = 0 if order == "none" else int(rng.integers(0, min(seq_len, num_tokens - seq_len)))
    count = (num_tokens - 1 - phase) // seq_len
    rows = rng.permutation(count) if order == "window" else np.arange(count)
    if order == "coprime":
        first, stride = (int(n) for n in rng.integers(1, count + 1, 2))
        while math.gcd(stride, count) > 1:
            stride = int(rng.integers(1, count + 1))
        rows = (first + stride * rows) % count
    return phase + rows.astype(np.int64) * seq_len


def document_order(starts: np.ndarray, num_tokens: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(documents of an epoch in random order, end of each in the stream of that order)."""
    order = np.random.default_rng([seed, epoch]).permutation(len(starts))
    lengths = np.diff(np.append(starts, num_tokens))
    return order, np.cumsum(lengths[order])


class Batch(NamedTuple):
    """What one forward needs, R rows of T tokens. Attention and smearing never cross a document start."""
    ids: Tensor
    """[R, T] int64."""
    targets: Tensor
    """[R, T] int64: the next id, or IGNORE."""
    positions: Tensor
    """[R, T] int32: distance from the start of the document piece; 0 where a piece starts."""
    cu_seqlens: Tensor
    """[S+1] int32: where pieces start in the flattened rows, padded with R*T to one of a few lengths."""

    def to(self, device: torch.device) -> Batch:
        return Batch(*(t.to(device, non_blocking=True) for t in self))

    def pin(self) -> Batch:
        return Batch(*(t.pin_memory() for t in self))

    def in_rows(self, seq_len: int) -> Batch:
        """The same tokens in rows of seq_len (which divides R*T), each of which starts a piece; needs no host."""
        if seq_len == self.ids.size(1):
            return self
        cuts = torch.arange(0, self.ids.numel(), seq_len, dtype=torch.int32, device=self.ids.device)
        column = torch.arange(seq_len, dtype=torch.int32, device=self.ids.device)
        return Batch(self.ids.view(-1, seq_len), self.targets.view(-1, seq_len),
                     torch.minimum(self.positions.view(-1, seq_len), column),
                     torch.cat([self.cu_seqlens, cuts]).sort().values)  # a start named twice is an empty piece


def make_batch(rows: Sequence[np.ndarray], num_rows: int, seq_len: int) -> Batch:
    """Rows of at most seq_len + 1 ids each -> `Batch` with num_rows rows; what is missing is padding (no targets).

    A piece starts at each row's start and at each BOS among the inputs.
    """
    ids = np.full((num_rows, seq_len), BOS_ID, dtype=np.int64)
    targets = np.full((num_rows, seq_len), IGNORE, dtype=np.int64)
    starts = np.zeros((num_rows, seq_len), dtype=bool)
    for r, row in enumerate(rows):
        n = len(row) - 1
        ids[r, :n], targets[r, :n] = row[:-1], row[1:]
        starts[r, :n] = row[:-1] == BOS_ID
        starts[r, n:n + 1] = True  # padding is a piece of its own, and must not hold one piece per BOS
    starts[:, 0] = True
    return pack_batch(ids, targets, starts)


def pack_batch(ids: np.ndarray, targets: np.ndarray, starts: np.ndarray) -> Batch:
    """[R, T] ids, targets and piece starts -> `Batch`."""
    num_rows, seq_len = ids.shape
    column = np.arange(seq_len, dtype=np.int32)
    positions = column - np.maximum.accumulate(np.where(starts, column, 0), axis=1)
    begins = np.flatnonzero(starts.reshape(-1))
    # Few distinct lengths, in practice one: each would be a graph of its own where the model is compiled.
    bucket = max(4, seq_len // 128) * num_rows
    cu_seqlens = np.full(-(-len(begins) // bucket) * bucket + 1, ids.size, dtype=np.int32)
    cu_seqlens[:len(begins)] = begins
    return Batch(*(torch.from_numpy(a) for a in (ids, targets, positions.astype(np.int32), cu_seqlens)))


def random_batch(num_rows: int, cfg: Config) -> Batch:
    """Rows of random ids, to warm graphs up with."""
    rng = np.random.default_rng(cfg.seed)
    rows = [rng.integers(2, cfg.vocab_size, cfg.train_seq_len + 1).astype(np.uint16) for _ in range(num_rows)]
    return make_batch(rows, num_rows, cfg.train_seq_len)


def beginning(ids: np.ndarray) -> str:
    """What tells one stream from another: a hash of its first 4,096 ids."""
    return hashlib.sha256(ids[:4096].tobytes()).hexdigest()[:12]


class TrainData:
    """The training stream as numbered rows: row i is the same on every rank and in every run with this seed."""

    def __init__(self, cfg: Config, run: Run) -> None:
        self.cfg, self.run = cfg, run
        self.stream = TokenStream(cfg.dataset_dir, "fineweb_train")
        run.agree(self.stream.check(cfg.vocab_size, run.rank, run.world))
        require(len(self.stream) > cfg.train_seq_len,
                f"{cfg.dataset_dir}: {len(self.stream):,} training tokens make no row of TRAIN_SEQ_LEN="
                f"{cfg.train_seq_len} and its target")
        self.starts = self.stream.document_starts() if cfg.shuffle == "document" else np.zeros(1, dtype=np.int64)
        self._epochs: dict[int, Any] = {}
        rows = -(-cfg.train_rows // run.world)
        self.micro_rows = min(rows, cfg.micro_batch_tokens // cfg.train_seq_len)
        """Rows of one forward on this device."""
        self.num_micro = -(-rows // self.micro_rows)
        """Forwards of one optimizer step, the same on every rank."""

    @functools.cached_property
    def rows_per_epoch(self) -> int:
        """Rows in every epoch: a shuffled phase may leave one row less, so one is never used."""
        return max(1, (len(self.stream) - 1) // self.cfg.train_seq_len -
                   (self.cfg.shuffle in ("window", "coprime")))

    def row(self, index: int) -> np.ndarray:
        """The seq_len + 1 ids of global row `index`."""
        epoch, i = divmod(index, self.rows_per_epoch)
        seq_len = self.cfg.train_seq_len
        if epoch not in self._epochs:
            plan = document_order(self.starts, len(self.stream), self.cfg.seed, epoch) \
                if self.cfg.shuffle == "document" else \
                row_offsets(len(self.stream), seq_len, self.cfg.seed, epoch, self.cfg.shuffle)
            self._epochs = {epoch: plan, **{e: p for e, p in self._epochs.items() if e == epoch - 1}}
        plan = self._epochs[epoch]
        if self.cfg.shuffle != "document":
            return self.stream.read(int(plan[i]), int(plan[i]) + seq_len + 1)
        order, ends = plan
        start, stop, parts = i * seq_len, (i + 1) * seq_len + 1, []
        k = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            begin = int(self.starts[order[k]]) - (int(ends[k - 1]) if k else 0)
            end = min(stop, int(ends[k]))
            parts.append(self.stream.read(start + begin, end + begin))
            start, k = end, k + 1
        return np.concatenate(parts)

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one optimizer step: rows rank, rank + world, ... of the global batch."""
        first = step * self.cfg.train_rows
        rows = [self.row(i) for i in range(first + self.run.rank, first + self.cfg.train_rows, self.run.world)]
        if max((int(row.max()) for row in rows), default=0) >= self.cfg.vocab_size:
            raise LocalError(f"{self.cfg.dataset_dir}: a training shard holds ids beyond VOCAB_SIZE="
                             f"{self.cfg.vocab_size} now, which it did not when the run began; repair it and "
                             f"RESUME=auto")
        return [make_batch(rows[m * self.micro_rows:(m + 1) * self.micro_rows], self.micro_rows,
                           self.cfg.train_seq_len) for m in range(self.num_micro)]

    def position(self, step: int) -> dict[str, Any]:
        """Where the batches of `step` begin, for a checkpoint: JSON values, to be given to `seek`."""
        return {"row": step * self.cfg.train_rows, "seed": self.cfg.seed, "shuffle": self.cfg.shuffle,
                "train_seq_len": self.cfg.train_seq_len, "corpus": self.corpus}

    @functools.cached_property
    def corpus(self) -> str:
        """What tells this corpus from others, as it is when the run begins: shards may be damaged while it lasts."""
        begin = beginning(self.stream.read(0, min(len(self.stream), 4096)))
        return f"{len(self.stream.shards)} shards of {len(self.stream)} tokens that begin {begin}"

    def seek(self, position: Mapping[str, Any]) -> int:
        """The step to go on with (see `steps`), in any world size. `UserError` if this run has other rows."""
        for name, here in self.position(0).items():
            require(name == "row" or position.get(name) == here, f"{name.upper()}={here}, but the checkpoint was made "
                    f"with {position.get(name)} and its rows are others; set that back, or start anew")
        step, rest = divmod(position["row"], self.cfg.train_rows)
        require(rest == 0, f"TRAIN_BATCH_TOKENS={self.cfg.train_batch_tokens}: no step of {self.cfg.train_rows} rows "
                f"begins at row {position['row']}, where the checkpoint was made; set it back")
        return step

    def steps(self, first: int = 0) -> Iterator[list[Batch]]:
        """`step(first)`, `step(first + 1)`, ...; the next two are built by a thread while the device works."""
        build = (lambda s: [b.pin() for b in self.step(s)]) if self.run.is_cuda else self.step
        with ThreadPoolExecutor(1) as pool:
            ahead: collections.deque[Future] = collections.deque(pool.submit(build, first + i) for i in range(2))
            try:
                for step in range(first + 2, sys.maxsize):
                    ready = ahead.popleft().result()
                    ahead.append(pool.submit(build, step))
                    yield ready
            finally:
                for future in ahead:
                    future.cancel()


class ValData(NamedTuple):
    """The validation stream with its documents, and the bytes of every target."""
    ids: np.ndarray
    """[N] uint16. Target t (0 <= t < N-1) is ids[t + 1]: every id but the first is scored."""
    starts: np.ndarray
    """[documents] int64: stream position of each document's first id."""
    target_bytes: np.ndarray
    """[N-1] int32."""

    @classmethod
    def load(cls, cfg: Config, run: Run) -> ValData:
        """From the dataset's shards; `UserError` where shards, tokenizer or side file do not belong together."""
        stream = TokenStream(cfg.dataset_dir, "fineweb_val")
        run.agree(stream.check(cfg.vocab_size) if run.is_main else "")
        require(len(stream) >= 2, f"{cfg.dataset_dir}: the validation shards hold {len(stream)} tokens, no target")
        ids, starts = stream.read(0, len(stream)), stream.document_starts()
        if cfg.caseops_enabled:
            side = TokenStream(cfg.dataset_dir, "fineweb_val_bytes")
            require(len(side) == len(stream), f"{cfg.dataset_dir}: the byte side file has {len(side):,} entries for "
                    f"{len(stream):,} tokens; they belong to different exports")
            return cls(ids, starts, side.read(1, len(side)).astype(np.int32))
        return cls(ids, starts, TokenBytes.load(tokenizer_path(cfg), cfg.vocab_size).of_targets(ids))

    @property
    def num_targets(self) -> int:
        return len(self.ids) - 1


def manifest(folder: Path) -> dict[str, Any]:
    """The dataset's manifest.json, or {} where the export has none (the published ones)."""
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    require(isinstance(found, dict), f"{path}: not a JSON object; prepare the dataset again")
    return found


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; reads it in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


MAX_SHARED = 0.01
"""Largest share of validation tokens in documents that training has, too. Web text repeats itself a little by nature;
the leaks that undid records had 0.8 of them (a default that kept 10,000 of 50,000 documents out of training)."""
VAL_DOCUMENTS = 50_000
"""Of the official validation split."""


def check_data(train: TokenStream, cfg: Config, run: Run) -> dict[str, int]:
    """What of `data/prepare.py verify` is cheap, before training: the shards are those of the manifest, and validation
    is not trained on. `UserError` with the remedy; else the counts, for the log.

    Validation stays closed until the artifact is written: of its documents only the keys are known, which `prepare.py`
    left in val_keys.u64 (key and length of each, little-endian uint64). Each rank looks through its training shards.
    """
    folder, said = cfg.dataset_dir, manifest(cfg.dataset_dir)
    streams = {"train": train, "val": TokenStream(folder, "fineweb_val")}
    if "val" in said:
        try:
            listed = {(str(f["name"]), int(f["tokens"])) for split in streams for f in said[split]["files"]}
        except (ArithmeticError, KeyError, TypeError, ValueError):
            raise UserError(f"{folder}/manifest.json: damaged; fetch or prepare the data again") from None
        found = {(p.name, len(ids)) for s in streams.values() for p, ids in zip(s.paths, s.shards)}
        for name, tokens in sorted(listed ^ found):
            where = "on disk" if (name, tokens) in found else "in manifest.json"
            raise UserError(f"{folder}/{one_line(name)}: of {tokens:,} tokens only {where}; fetch or prepare the data "
                            f"again")
    path, verify = folder / "val_keys.u64", f"`python data/prepare.py verify {folder}`"
    if not path.is_file():
        run.log("warning", text=f"whether validation is trained on was not checked; {verify} does, once")
        return {}
    require(path.stat().st_size % 16 == 0, f"{path}: damaged; delete it and run {verify}")
    keys, lengths = np.fromfile(path, "<u8").reshape(-1, 2).T
    require(lengths.sum() == len(streams["val"]), f"{path}: of {int(lengths.sum()):,} tokens, validation has "
            f"{len(streams['val']):,}; delete it and run {verify}")
    if len(keys) != VAL_DOCUMENTS and "val" not in said:
        run.log("warning", text=f"validation has {len(keys):,} documents, not the official {VAL_DOCUMENTS:,}: "
                f"the score cannot be compared with the leaderboard's")
    shared = np.any(run.gather(np.isin(keys, train.document_keys(run.rank, run.world)[0])), axis=0)
    share = lengths[shared].sum() / lengths.sum()
    require(share <= MAX_SHARED, f"{folder}: {int(shared.sum()):,} of {len(keys):,} validation documents "
            f"({share:.1%} of the tokens) are in the training shards, too: a score on them is void; fetch or prepare "
            f"the data again (data/README.md)")
    return {"val_documents": len(keys), "shared_documents": int(shared.sum())}


def tokenizer_path(cfg: Config) -> Path:
    """The SentencePiece model of the dataset; `UserError` if it is absent or not the one the shards were made with."""
    tied = manifest(cfg.dataset_dir).get("tokenizer") or {}
    require(isinstance(tied, dict) and all(isinstance(text := tied.get(k, ""), str) and len(text) < 256
                                           for k in ("path", "sha256")),
            f"{cfg.dataset_dir}/manifest.json: `tokenizer` must hold a path and a sha256; prepare the dataset again")
    if cfg.tokenizer_path:
        path = Path(cfg.tokenizer_path)
    elif "path" in tied:
        path = cfg.dataset_dir / tied["path"]
    else:
        path = Path(cfg.data_dir) / "tokenizers" / f"fineweb_{cfg.vocab_size}_bpe.model"
    require(path.is_file(), f"{path}: no such tokenizer; set TOKENIZER_PATH or prepare the dataset")
    digest = file_sha256(path)
    require(tied.get("sha256", digest) == digest,
            f"{path}: SHA-256 {digest[:12]}..., but the shards in {cfg.dataset_dir} were made with "
            f"{str(tied.get('sha256'))[:12]}...; set TOKENIZER_PATH to that model or prepare the data again")
    return path


# ----------------------------------------------------------------------------------------------------
# 4 Score: bytes of a token, bits per byte, and the ledger in which each target is scored once
# ----------------------------------------------------------------------------------------------------
# val_bpb = (nats of all targets / ln 2) / (UTF-8 bytes of all targets). A target is every id of the validation stream
# but the very first; BOS targets cost their nats and count no bytes. Nothing about the model may touch this section.
# Safe to change: nothing without a referee.


def load_sentencepiece(path: Path) -> Any:
    """The SentencePiece processor of a model file whose BOS is ours; `UserError` otherwise."""
    from sentencepiece import SentencePieceProcessor
    try:
        sp = SentencePieceProcessor(model_file=str(path))
        for i in range(sp.vocab_size()):
            sp.id_to_piece(i)
    except (OSError, RuntimeError, ValueError) as error:  # a piece, or the message, may be no UTF-8
        raise UserError(f"{path}: not a SentencePiece model ({one_line(error)})") from None
    require(sp.bos_id() == BOS_ID, f"{path}: BOS has id {sp.bos_id()}, expected {BOS_ID}")
    return sp


class TokenBytes(NamedTuple):
    """How many UTF-8 bytes of text each id stands for (three tables over ids, spec of the challenge)."""
    base: np.ndarray
    """[V] int32: bytes without the leading space; 0 for control, unknown and unused pieces, 1 for byte pieces."""
    leading_space: np.ndarray
    """[V] bool: the piece begins with the space mark, one byte unless it follows a boundary."""
    boundary: np.ndarray
    """[V] bool: control, unknown and unused pieces; a space after one of them is not text."""

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> TokenBytes:
        """From a SentencePiece model, whose size must be `vocab_size`."""
        sp = load_sentencepiece(path)
        require(sp.vocab_size() == vocab_size,
                f"{path}: the tokenizer has {sp.vocab_size()} pieces, VOCAB_SIZE={vocab_size}; they must agree")
        return cls.build(sp)

    @classmethod
    def build(cls, sp: Any) -> TokenBytes:
        """From a loaded SentencePiece processor."""
        n = sp.vocab_size()
        base, space = np.zeros(n, dtype=np.int32), np.zeros(n, dtype=bool)
        boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(n)])
        for i in np.flatnonzero(~boundary).tolist():
            piece = sp.id_to_piece(i)
            space[i] = piece.startswith("\u2581")
            text = piece[int(space[i]):].replace("\u2581", " ")  # a mark inside a piece is one byte, too
            base[i] = 1 if sp.is_byte(i) else len(text.encode("utf-8"))
        return cls(base, space, boundary)

    def of_targets(self, ids: np.ndarray) -> np.ndarray:
        """[N-1] int32: bytes of ids[1:], each given the id before it."""
        before, target = ids[:-1], ids[1:]
        return self.base[target] + (self.leading_space[target] & ~self.boundary[before])


class Score(NamedTuple):
    """Totals over all targets."""
    nats: float
    tokens: int
    bytes: int

    @property
    def val_loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def val_bpb(self) -> float:
        """Bits per byte."""
        return self.nats / math.log(2) / self.bytes


class Ledger:
    """The loss of every target, written exactly once, and every update with the targets that it was made from.

    The one declared order is the stream's. `BASE` is the state of the shared weights, other states are numbers of
    documents (adapters). Events are rows (phase, sequence number, kind, state, begin, end) over target numbers: a
    score of [begin, end) with that state, or an update of it. Updates of BASE end a phase.
    """
    BASE, SCORE, UPDATE = -1, 0, 1

    def __init__(self, num_targets: int, starts: np.ndarray) -> None:
        self.nats = torch.zeros(num_targets, dtype=torch.float32)
        self.times = torch.zeros(num_targets, dtype=torch.uint8)
        self.starts = starts
        self.phase, self.sequence, self.learned_in = 0, 0, -1
        self.events: list[np.ndarray] = []
        self.settled = 0
        """So many of `events` tell of targets whose losses are recorded; the rest is of documents that are at work."""
        self.done = np.broadcast_to(False, num_targets)
        """[targets]: scored by the run that this one goes on with."""

    def record(self, targets: Tensor, nats: Tensor) -> None:
        """Losses of the targets with these numbers (int64). A second write is a bug and raises."""
        self.times.index_add_(0, targets, torch.ones(len(targets), dtype=torch.uint8))
        ensure(bool((self.times[targets] == 1).all()), "a target was scored twice")
        self.nats[targets] = nats.detach().float().cpu()

    def note(self, kind: int, states: Any, begins: Any, ends: Any) -> None:
        """Simultaneous events: numbers or arrays of one length. An update of BASE ends the scores of its phase."""
        ensure(kind != self.SCORE or self.learned_in < self.phase, "targets were scored after the shared weights had "
               "learned from their phase")
        if kind == self.UPDATE and np.any(np.asarray(states) == self.BASE):
            self.learned_in = self.phase
        states, begins, ends = np.broadcast_arrays(*(np.asarray(x, dtype=np.int64).reshape(-1)
                                                     for x in (states, begins, ends)))
        self.events.append(np.stack([np.full_like(begins, self.phase), np.full_like(begins, self.sequence),
                                     np.full_like(begins, kind), states, begins, ends], axis=1))
        self.sequence += 1
        if np.any(states == self.BASE):
            self.settle()

    def settle(self) -> None:
        """Everything noted so far is recorded."""
        self.settled = len(self.events)

    def hand_in(self, run: Run) -> np.ndarray:
        """Rank 0 takes over what the other ranks have settled (a collective), and gets all settled events [n, 6]."""
        own = np.concatenate([np.empty((0, 6), dtype=np.int64), *self.events[:self.settled]])
        if run.world == 1:
            return own
        targets = self.times.nonzero().flatten()
        given = run.collect(None if run.is_main else (own[(own[:, 2] == self.SCORE) | (own[:, 3] != self.BASE)],
                                                      targets, self.nats[targets]))
        if not run.is_main:
            self.nats[targets], self.times[targets] = 0, 0
            self.events, self.settled = self.events[self.settled:], 0
            return own
        for _, targets, nats in given[1:]:
            self.record(targets, nats)
        own = np.concatenate([own, *(events for events, _, _ in given[1:])])
        self.events[:self.settled], self.settled = [own], 1
        return own

    def restore(self, nats: Tensor, events: np.ndarray, run: Run) -> None:
        """Go on after these losses [targets] and settled events [n, 6] of all ranks, which rank 0 has."""
        edges = np.zeros(len(self.nats) + 1, dtype=np.int64)
        if run.is_main:
            scores = events[events[:, 2] == self.SCORE]
            np.add.at(edges, scores[:, 4], 1)
            np.add.at(edges, scores[:, 5], -1)
            self.nats.copy_(nats)
            self.events, self.settled = [events], 1
        done = run.broadcast(torch.from_numpy(edges[:-1].cumsum()).to(torch.uint8))
        self.times = done.clone() if run.is_main else self.times
        self.done = done.numpy() > 0

    def close(self, target_bytes: np.ndarray, run: Run) -> tuple[Score, str]:
        """(totals over all ranks, digest of the events); raises unless scores and updates are legal (`violations`).

        Summed in stream order in float64, so that the total does not depend on who scored what; nor does the digest.
        """
        self.nats = nats = run.total(self.nats.to(run.device, copy=True)).cpu()
        times = run.total(self.times.to(run.device, torch.int32)).cpu()
        ensure(bool((times == 1).all()), f"{int((times != 1).sum())} targets were not scored exactly once")
        own = np.concatenate([np.empty((0, 6), dtype=np.int64), *self.events])
        if not run.is_main:  # all ranks made the same updates of the shared weights
            own = own[(own[:, 2] == self.SCORE) | (own[:, 3] != self.BASE)]
        events = np.concatenate(run.gather(own))
        found = violations(events, self.starts, len(nats))
        ensure(not found, "; ".join(found))
        logical = events[:, [4, 5, 2, 3, 0]]  # without sequence numbers, which tell ranks and batches apart
        digest = hashlib.sha256(logical[np.lexsort(logical.T[::-1])].tobytes()).hexdigest()
        score = Score(float(nats.double().sum()), len(nats), int(target_bytes.sum(dtype=np.int64)))
        require(math.isfinite(score.nats), "the score is not finite: the weights are broken")
        require(score.bytes > 0, "the validation targets hold no bytes of text: wrong tokenizer or byte file")
        return score, digest


def by_place(nats: np.ndarray, target_bytes: np.ndarray, starts: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """Targets, nats and bytes of a scored stream [T] by octaves: entry k has the 2^k-th to (2^(k+1) - 1)-th target of
    every document (position), or the documents of 2^k to 2^(k+1) - 1 targets (length)."""
    stops = np.append(starts[1:], len(nats))
    octave = np.log2(np.maximum(stops - starts, 1)).astype(int)
    cuts = np.minimum(starts + (2 ** np.arange(octave.max() + 2) - 1)[:, None], stops)
    found: dict[str, dict[str, list[float]]] = {"position": {}, "length": {}}
    for name, values in (("targets", np.ones(len(nats))), ("nats", nats), ("bytes", target_bytes)):
        sums = np.zeros(len(nats) + 1)
        np.cumsum(values, out=sums[1:])
        found["position"][name] = np.diff(sums[cuts], axis=0).sum(axis=1).tolist()
        found["length"][name] = np.bincount(octave, weights=sums[stops] - sums[starts]).tolist()
    return found


def violations(events: np.ndarray, starts: np.ndarray, num_targets: int) -> list[str]:
    """What is illegal about a ledger's events (rows as in `Ledger`), by condition of rules C1, C3, C4; [] if nothing.

    C4: score intervals cover the targets once. C3: an update uses only targets scored before it (earlier in its
    document, or in a phase that is over). C1: nothing scored after an update precedes it in the stream, and a
    document's adapters learn from and score that document only.
    """
    found = []
    scores, updates = (events[events[:, 2] == kind] for kind in (Ledger.SCORE, Ledger.UPDATE))
    scores = scores[np.argsort(scores[:, 4], kind="stable")]
    begins, ends = scores[:, 4], scores[:, 5]
    edges = np.concatenate([[0], ends])
    if not np.array_equal(edges, np.concatenate([begins, [num_targets]])):
        found.append("C4: the scored intervals do not cover every target exactly once")
        return found
    stops = np.append(starts[1:], num_targets)
    for name, rows in (("score", scores), ("update", updates)):
        own = rows[rows[:, 3] != Ledger.BASE]
        if len(own) and ((own[:, 4] < starts[own[:, 3]]) | (own[:, 5] > stops[own[:, 3]])).any():
            found.append(f"C1: a {name} with one document's adapters reaches into another document")
    first = np.searchsorted(ends, updates[:, 4], side="right")
    last = np.searchsorted(begins, updates[:, 5], side="left")
    shared = updates[:, 3] == Ledger.BASE
    phase_end = np.maximum.accumulate(scores[:, 0])  # latest phase among the scores up to each one
    if (phase_end[last[shared] - 1] > updates[shared, 0]).any():
        found.append("C3: the shared weights learned from targets that were not scored yet")
    for phase, end in updates[shared][:, [0, 5]].tolist():
        if (begins[scores[:, 0] > phase] < end).any():
            found.append("C1: targets were scored by weights that had learned from later ones")
            break
    updates, first, last = updates[~shared], first[~shared], last[~shared]
    for offset in range(int((last - first).max(initial=0))):
        at = np.minimum(first + offset, last - 1)
        (score_phase, score_at), (phase, at_update) = scores[at, :2].T, updates[:, :2].T
        if ((score_phase > phase) | ((score_phase == phase) & (score_at >= at_update))).any():
            found.append("C3: a document's adapters learned from targets that were not scored yet")
            break
    # Scores with a document's adapters, in the order of time, must move forward in the document.
    own = scores[scores[:, 3] != Ledger.BASE]
    order = np.lexsort((own[:, 1], own[:, 0], own[:, 3]))
    own = own[order]
    back = (own[1:, 3] == own[:-1, 3]) & (own[1:, 4] < own[:-1, 4])
    if back.any():
        found.append("C1: a document was not scored from left to right while its adapters learned")
    return found


# ----------------------------------------------------------------------------------------------------
# 5 Kernels: a plain reference and the fast twin that must agree with it, picked once
# ----------------------------------------------------------------------------------------------------
# The reference is plain PyTorch and right on every device. A fast twin has the same signature, imports what it needs
# when it is picked, and is named in the log. Attention is causal and never crosses a document piece.
# Safe to change: the order of preference. A new twin needs a test against the reference.


class Attention(NamedTuple):
    """One attention kernel: `prepare` once a batch, then `run` once a visit."""
    name: str
    prepare: Callable[[Batch], Any]
    """Batch -> whatever `run` needs to know about the pieces."""
    run: Callable[[Tensor, Tensor, Tensor, Any, int], Tensor]
    """q [R,T,N,H], k and v [R,T,K,H], prepared, window -> [R,T,N,H]. Scale 1/sqrt(H). A window of w lets a token see
    itself and the w - 1 before it, 0 all of its piece."""


def sdpa_attention() -> Attention:
    """Reference: dense attention with a mask of pieces. On a CPU the mask costs 2-8 % (bench/LOG.md 2026-11-22)."""

    def prepare(batch: Batch) -> Tensor:
        column = torch.arange(batch.positions.size(1), device=batch.positions.device)
        back = column[:, None] - column[None, :]  # how far back the key lies; negative: in the future
        return ((back >= 0) & (back <= batch.positions[:, :, None]))[:, None]

    return Attention("sdpa", prepare, windowed(masked_attention))


def windowed(masked: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Attention by a mask [R,1,T,S], which a window narrows further; queries are the last T of the S keys."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, window: int = 0) -> Tensor:
        if window:
            mask = mask & mask.new_ones(mask.shape[-2:]).triu(mask.size(-1) - mask.size(-2) + 1 - window)
        return masked(q, k, v, mask)

    return run


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [R,T,N,H] on k, v [R,S,K,H] where mask (broadcast to [R,1,T,S]) allows it."""
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
                                       enable_gqa=True)
    return y.transpose(1, 2)


class DenseAttention(torch.autograd.Function):
    """Attention by plain batched products that keep the probabilities for the backward.

    For short rows in bf16 on a CPU with matrix units: forward and backward take half of the flash kernel's time there
    (rows of 256; bench/LOG.md 2026-11-22), at R*N*T*T numbers of memory.
    """

    @staticmethod
    def fold(x: Tensor, kv_heads: int) -> Tensor:
        """[R, T, K*G, H] -> [R*K, G*T, H]: query heads of one group become rows of one product."""
        rows, seq_len, heads, width = x.shape
        split = x.view(rows, seq_len, kv_heads, heads // kv_heads, width).permute(0, 2, 3, 1, 4)
        return split.reshape(rows * kv_heads, -1, width)

    @staticmethod
    def unfold(x: Tensor, rows: int, seq_len: int, heads: int) -> Tensor:
        """Inverse of `fold`."""
        kv_heads = x.size(0) // rows
        split = x.view(rows, kv_heads, heads // kv_heads, seq_len, -1).permute(0, 3, 1, 2, 4)
        return split.reshape(rows, seq_len, heads, -1)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        ctx.shape, ctx.scale = q.shape, q.size(-1) ** -0.5
        rows, seq_len, heads, _ = q.shape
        q, k, v = (DenseAttention.fold(t, k.size(2)) for t in (q * ctx.scale, k, v))
        scores = torch.bmm(q, k.mT)
        scores.view(rows, heads, seq_len, -1).masked_fill_(hidden, -1e30)
        p = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        return DenseAttention.unfold(torch.bmm(p, v), rows, seq_len, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, p = ctx.saved_tensors
        rows, seq_len, heads, _ = ctx.shape
        kv_heads, seen = k.size(0) // rows, k.size(1)
        grad = DenseAttention.fold(grad, kv_heads)
        grad_scores = torch._softmax_backward_data(torch.bmm(grad, v.mT), p, -1, p.dtype)
        grad_q = torch.bmm(grad_scores, k).mul_(ctx.scale)
        return (DenseAttention.unfold(grad_q, rows, seq_len, heads),
                DenseAttention.unfold(torch.bmm(grad_scores.mT, q), rows, seen, kv_heads),
                DenseAttention.unfold(torch.bmm(p.mT, grad), rows, seen, kv_heads), None)


def dense_masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`DenseAttention` where a gradient is wanted, the reference where not (its forward alone is the faster one)."""
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return DenseAttention.apply(q, k, v, ~mask) if wanted else masked_attention(q, k, v, mask)


def dense_attention() -> Attention:
    """Dense attention on rows of pieces."""
    return Attention("dense", sdpa_attention().prepare, windowed(dense_masked_attention))


def flat_attention(name: str, varlen: Callable[..., Tensor]) -> Attention:
    """A variable-length kernel on flattened rows; `varlen(q, k, v, cu_seqlens, longest, before)` on [M, heads, H].

    `before`: how many tokens before itself a token sees, -1 for all of its piece.
    """

    def prepare(batch: Batch) -> tuple[Tensor, int]:
        return batch.cu_seqlens, batch.ids.size(1)

    def run(q: Tensor, k: Tensor, v: Tensor, pieces: tuple[Tensor, int], window: int = 0) -> Tensor:
        return varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *pieces, window - 1).view_as(q)

    return Attention(name, prepare, run)


def operator(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """A torch operator golf::<name>, which a compiler puts into its graph without looking inside; fake: its shapes."""
    made = torch.library.custom_op(f"golf::{name}", function, mutates_args=(), schema=schema)
    made.register_fake(fake)
    return made


def varlen_attention() -> Attention:
    """PyTorch's own variable-length attention (CUDA; torch 2.10 and later)."""
    from torch.nn.attention.varlen import varlen_attn
    known = inspect.signature(varlen_attn).parameters
    gqa = {"enable_gqa": True} if "enable_gqa" in known else {}

    def varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, before: int) -> Tensor:
        require(before < 0 or "window_size" in known, "ATTN_WINDOWS: this torch's varlen_attn has none; upgrade it")
        causal = {"window_size": (before, 0)} if "window_size" in known else {"is_causal": True}
        if not gqa and q.size(1) != k.size(1):
            k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
        return varlen_attn(q, k, v, cu, cu, longest, longest, **causal, **gqa)

    return flat_attention("varlen", varlen)


def flash_attention(name: str, function: Callable[..., Any]) -> Attention:
    """FlashAttention's variable-length function, 2 or 3: the same arguments."""

    def varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, before: int) -> Tensor:
        y = function(q, k, v, cu, cu, longest, longest, causal=True, window_size=(before, 0 if before >= 0 else -1),
                     deterministic=torch.are_deterministic_algorithms_enabled())
        return y[0] if isinstance(y, tuple) else y  # older builds of 3 also return the log-sum-exp

    return flat_attention(name, varlen)


def fa2_attention() -> Attention:
    """FlashAttention 2 (package flash-attn)."""
    from flash_attn import flash_attn_varlen_func
    return flash_attention("fa2", flash_attn_varlen_func)


def fa3_attention() -> Attention:
    """FlashAttention 3 (package flash_attn_interface, Hopper)."""
    from flash_attn_interface import flash_attn_varlen_func
    return flash_attention("fa3", flash_attn_varlen_func)


@functools.cache
def fa4_attention() -> Attention:
    """FlashAttention 4 (package flash-attn-4, Hopper and Blackwell), as an operator: no compiler can look into it."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    def call(function: Callable[..., Any], tensors: Sequence[Tensor], cu: Tensor, longest: int, before: int, **more: Any
             ) -> tuple[Tensor, ...]:
        wanted = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, causal=True,
                      window_size_left=before if before >= 0 else None,
                      deterministic=torch.are_deterministic_algorithms_enabled())
        known = inspect.signature(function).parameters  # max_seqlen came late to some of them
        return function(*(t.contiguous() for t in tensors), **{k: v for k, v in wanted.items() if k in known}, **more)

    arguments = "Tensor cu, int longest, int before"
    forward = operator(
        "fa4", f"(Tensor q, Tensor k, Tensor v, {arguments}) -> (Tensor, Tensor)",
        lambda q, k, v, *rest: call(_flash_attn_fwd, (q, k, v), *rest, return_lse=True)[:2],
        lambda q, k, v, *rest: (torch.empty_like(q), q.new_empty(q.size(1), q.size(0), dtype=torch.float32)))
    inner = operator(
        "fa4_grad", f"(Tensor q, Tensor k, Tensor v, Tensor y, Tensor grad, Tensor lse, {arguments}) -> "
        "(Tensor, Tensor, Tensor)",
        lambda *inputs: call(_flash_attn_bwd, inputs[:6], *inputs[6:])[:3],
        lambda q, k, v, *rest: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3], *output, inputs[3])
        ctx.rest = inputs[4:]

    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse, cu = ctx.saved_tensors
        return *inner(q, k, v, y, grad, lse, cu, *ctx.rest), None, None, None

    forward.register_autograd(backward, setup_context=keep)
    return flat_attention("fa4", lambda *inputs: forward(*inputs)[0])


ATTENTIONS = {"fa4": fa4_attention, "fa3": fa3_attention, "fa2": fa2_attention, "varlen": varlen_attention,
              "dense": dense_attention, "sdpa": sdpa_attention}


def pick_attention(wanted: str, device: torch.device, dtype: torch.dtype, seq_len: int) -> Attention:
    """The kernel called `wanted`, or the best for rows of seq_len that this machine has; `UserError` if it lacks it."""
    anywhere, fast = ("sdpa", "dense"), device.type == "cuda" and dtype == torch.bfloat16
    require(wanted in ("auto", *anywhere) or fast, f"ATTENTION={wanted}: needs CUDA and DTYPE=bfloat16; use auto")
    short = device.type == "cpu" and dtype == torch.bfloat16 and seq_len <= 512
    best = ["fa3", "fa4", "fa2", "varlen", "sdpa"] if fast else ["dense" if short else "sdpa"]
    for name in ([wanted] if wanted != "auto" else best):
        generations = {"fa3": (9,), "fa4": (9, 10, 11, 12)}
        if name in generations and torch.cuda.get_device_capability(device)[0] not in generations[name]:
            continue
        try:
            return ATTENTIONS[name]()
        except ImportError as error:
            require(wanted == "auto", f"ATTENTION={wanted}: cannot be imported here ({error}); use ATTENTION=auto")
    raise UserError(f"ATTENTION={wanted}: needs a newer GPU (fa3: Hopper alone; fa4: Hopper or later); use auto")


RMS_EPS = 2.0 ** -23
"""Added to the mean square: fp32's epsilon, in every dtype."""


def rms_norm(x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """gain * x / rms(x) over the last axis; gain is a number or broadcasts from the left of that axis."""
    normed = F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)
    return normed * (gain.to(x.dtype) if isinstance(gain, Tensor) else gain)


def leaky_relu_squared(x: Tensor, slope: float) -> Tensor:
    """max(x, slope*x)^2 (#493, #549); its derivative is 2x above zero and 2*slope^2*x below."""
    return F.leaky_relu(x, slope).square()


def softcapped_cross_entropy(logits_MV: Tensor, targets_M: Tensor, softcap: float) -> Tensor:
    """Nats of each target under softmax(c*tanh(z/c)), in fp32; 0 where the target is IGNORE."""
    capped = softcap * torch.tanh(logits_MV.float() / softcap)
    return F.cross_entropy(capped, targets_M, reduction="none", ignore_index=IGNORE)


class EagerRmsNorm(torch.autograd.Function):
    """`rms_norm` with a hand-written backward: over twice as fast in bf16 where nothing is compiled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.size(-1)).add_(RMS_EPS).rsqrt_()
        ctx.gain = gain
        ctx.save_for_backward(x, inverse)
        return x * (inverse * gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, inverse = ctx.saved_tensors
        along = torch.sum(grad * x, -1, keepdim=True, dtype=torch.float32).mul_(inverse)  # grad . (x / rms)
        grad_gain = along.sum_to_size(ctx.gain.shape) if ctx.needs_input_grad[1] else None
        scale = inverse * ctx.gain
        share = (along * scale * inverse).div_(-x.size(-1))
        return torch.addcmul(grad * scale.to(x.dtype), x, share.to(x.dtype)), grad_gain


class EagerLeakyReluSquared(torch.autograd.Function):
    """`leaky_relu_squared` by maxima (slope <= 1): cheaper passes than leaky_relu's where nothing is compiled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        ctx.save_for_backward(x)
        return torch.maximum(x, slope * x).square_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x = ctx.saved_tensors[0]  # d/dx = 2x above zero, 2*slope^2*x below
        return torch.maximum(2 * x, 2 * ctx.slope ** 2 * x).mul_(grad), None


class EagerCrossEntropy(torch.autograd.Function):
    """`softcapped_cross_entropy` and its gradient in one pass over chunks of rows that stay in the cache.

    Capped logits lie within +-c, so exp(capped - c) can neither overflow nor vanish for c up to 40 and no maximum is
    searched. The gradient is kept in the dtype of the logits; fp32 logits are never held as a whole.
    """
    CHUNK = 1 << 17
    """Logits of one chunk: 512 KB in fp32 (2^16 to 2^19 are within 6 %, bench/LOG.md 2026-11-22)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
        losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        rows = max(1, EagerCrossEntropy.CHUNK // logits.size(1))
        for at in range(0, len(logits), rows):
            part = slice(at, at + rows)
            tanh, scored = (logits[part].float() / softcap).tanh_(), (targets[part] != IGNORE).float()
            target = targets[part].clamp_min(0).unsqueeze(1)
            p = torch.exp(softcap * tanh - softcap)
            total = p.sum(-1, keepdim=True)
            losses[part] = (total.log() + softcap - softcap * tanh.gather(1, target)).squeeze(1) * scored
            if grad is not None:
                p.div_(total).scatter_add_(1, target, torch.full_like(total, -1.0))
                grad[part] = p.mul_(tanh.square_().neg_().add_(1.0)).mul_(scored.unsqueeze(1))
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        saved = ctx.saved_tensors[0]
        return torch.mul(saved, grad.unsqueeze(1), out=torch.empty_like(saved)), None, None  # product in fp32


# The two functions below are Triton's language, not Python: `triton_kernels` compiles them, and gives this module its
# name `tl`. A `constexpr` is a constant of the compiled kernel.
tl: Any = None


def mlp_kernel(a_ptr, b_ptr, pre_ptr, grad_ptr, post_ptr, M, N: tl.constexpr, K: tl.constexpr, SLOPE: tl.constexpr,
               BACKWARD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    """One [ROWS, COLS] tile of a product, with the MLP's activation in its epilogue.

    Forward: pre = a [M,K] times b [N,K] transposed, post = max(pre, SLOPE*pre)^2. Backward: grad = a times b [K,N]
    times the activation's derivative at pre, and post once more, so that it need not be kept.
    """
    tiles = tl.cdiv(N, COLS)
    rows = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % tiles) * COLS + tl.arange(0, COLS)
    depth = tl.arange(0, DEPTH)
    a_at = a_ptr + (rows % M).to(tl.int64)[:, None] * K + depth[None, :]
    b_at = b_ptr + cols[None, :] * (1 if BACKWARD else K) + depth[:, None] * (N if BACKWARD else 1)
    product = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, K, DEPTH):
        if K % DEPTH == 0 and N % COLS == 0:
            a, b = tl.load(a_at), tl.load(b_at)
        else:
            real = start + depth < K
            a = tl.load(a_at, mask=real[None, :], other=0.0)
            b = tl.load(b_at, mask=real[:, None] & (cols < N)[None, :], other=0.0)
        product = tl.dot(a, b, product, input_precision="ieee")
        a_at += DEPTH
        b_at += DEPTH * (N if BACKWARD else 1)
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    if BACKWARD:
        x = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_ptr + at, 2 * product * tl.maximum(x, SLOPE * SLOPE * x), mask=inside)
    else:
        pre = product.to(pre_ptr.dtype.element_ty)
        tl.store(pre_ptr + at, pre, mask=inside)
        x = pre.to(tl.float32)  # rounded: what the backward will find
    x = tl.maximum(x, SLOPE * x)
    tl.store(post_ptr + at, x * x, mask=inside)


def nats_kernel(logits_ptr, targets_ptr, nats_ptr, grad_ptr, V: tl.constexpr, CAP: tl.constexpr, IGNORED: tl.constexpr,
                GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """One row of logits [V]: nats of its target under softmax(CAP*tanh(z/CAP)) and, if GRAD, their gradient by z.

    The softmax is summed online in fp32; the walk for the gradient finds the row in the cache.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    scored = (target != IGNORED).to(tl.float32)
    highest, total, chosen = -CAP, 0.0, 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + row * V + cols, mask=cols < V, other=0.0).to(tl.float32)
        z = tl.where(cols < V, CAP * (2 * tl.sigmoid(z * (2 / CAP)) - 1), float("-inf"))  # CAP * tanh(z / CAP)
        higher = tl.maximum(highest, tl.max(z, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher), 0)
        chosen += tl.sum(tl.where(cols == target, z, 0.0), 0)
        highest = higher
    log_total = highest + tl.log(total)
    tl.store(nats_ptr + row, (log_total - chosen) * scored)
    if GRAD:
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + row * V + cols, mask=cols < V, other=0.0).to(tl.float32)
            tanh = 2 * tl.sigmoid(z * (2 / CAP)) - 1
            error = tl.exp(CAP * tanh - log_total) - tl.where(cols == target, 1.0, 0.0)
            tl.store(grad_ptr + row * V + cols, error * (1 - tanh * tanh) * scored, mask=cols < V)


@functools.cache
def triton_kernels() -> dict[str, Any]:
    """The fields of `Kernels` that Triton has a twin for; `ImportError` where there is no Triton.

    Each is an `operator`, with a gradient in operators and plain products.
    """
    global tl
    import triton
    import triton.language as tl
    tiles = [(128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (64, 64, 32, 4, 2)]
    configs = [triton.Config(dict(ROWS=rows, COLS=cols, DEPTH=depth), num_warps=warps, num_stages=stages)
               for rows, cols, depth, warps, stages in tiles]
    # The fastest tile of a shape is found when the graphs are primed; the interpreter on a CPU takes the smallest, and
    # so do runs that must be alike: which is the fastest may hang on what else the GPU does.
    free = torch.cuda.is_available() and not torch.are_deterministic_algorithms_enabled()
    product = triton.autotune(configs if free else configs[-1:], key=["N", "K", "BACKWARD"])(triton.jit(mlp_kernel))
    row_kernel = triton.jit(nats_kernel)

    def activated(a: Tensor, b: Tensor, pre: Tensor | None, slope: float) -> tuple[Tensor, Tensor]:
        """(pre, post), or in the backward, which has pre, (grad of pre, post); all [M, N]."""
        (rows, depth), width = a.shape, b.numel() // a.size(1)
        out, post = a.new_empty(rows, width), a.new_empty(rows, width)
        product[lambda tile: (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(width, tile["COLS"]),)](
            a.contiguous(), b.contiguous(), out if pre is None else pre, out, post, rows, width, depth, slope,
            pre is not None)
        return out, post

    def nats(logits: Tensor, targets: Tensor, cap: float, wanted: bool) -> tuple[Tensor, Tensor]:
        """(nats [M] in fp32, their gradient by the logits [M, V]); an empty gradient where none is wanted."""
        (rows, vocab), block = logits.shape, min(4096, triton.next_power_of_2(logits.size(1)))
        found, grad = nats_like(logits, targets, cap, wanted)
        row_kernel[(rows,)](logits.contiguous(), targets, found, grad, vocab, cap, IGNORE, wanted, block, num_warps=8)
        return found, grad

    def nats_like(logits: Tensor, targets: Tensor, cap: float, wanted: bool) -> tuple[Tensor, Tensor]:
        found = logits.new_empty(logits.size(0), dtype=torch.float32)
        return found, logits.new_empty(logits.shape if wanted else (0,))

    def mlp_forward(x: Tensor, up: Tensor, down: Tensor, slope: float) -> tuple[Tensor, Tensor]:
        pre, post = activated(x, up, None, slope)
        return post @ down.T, pre

    def mlp_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, pre = ctx.saved_tensors
        grad_pre, post = mlp_inner(grad, down, pre, ctx.slope)
        return grad_pre @ up, grad_pre.T @ x, grad.T @ post, None

    def mlp_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3], output[1])
        ctx.slope = inputs[3]

    def head_forward(x: Tensor, head: Tensor, targets: Tensor, cap: float, wanted: bool) -> tuple[Tensor, Tensor]:
        return nats(x @ head.T, targets, cap, wanted)

    def head_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, head, each = ctx.saved_tensors  # a row's factor commutes with both products: no walk over all logits
        scale = grad.unsqueeze(1)
        return ((each @ head) * scale).to(x.dtype), each.T @ (x * scale).to(x.dtype), None, None, None

    pair = " -> (Tensor, Tensor)"
    mlp_inner = operator("mlp_inner", f"(Tensor grad, Tensor down, Tensor pre, float slope){pair}", activated,
                         lambda grad, down, pre, slope: (torch.empty_like(pre), torch.empty_like(pre)))
    mlp = operator("mlp", f"(Tensor x, Tensor up, Tensor down, float slope){pair}", mlp_forward,
                   lambda x, up, down, slope: (torch.empty_like(x), x.new_empty(x.size(0), up.size(0))))
    mlp.register_autograd(mlp_backward, setup_context=mlp_keep)
    row_nats = operator("nats", f"(Tensor logits, Tensor targets, float cap, bool wanted){pair}", nats, nats_like)
    row_nats.register_autograd(
        lambda ctx, grad, each: ((ctx.saved_tensors[0] * grad.unsqueeze(1)).to(each.dtype), None, None, None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]))
    head_nats = operator("head_nats", f"(Tensor x, Tensor head, Tensor targets, float cap, bool wanted){pair}",
                         head_forward, lambda x, head, *rest: nats_like(x.new_empty(x.size(0), head.size(0)), *rest))
    head_nats.register_autograd(
        head_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2], output[1]))
    return dict(
        mlp=lambda x, *rest: mlp(x.flatten(0, -2), *rest)[0].view_as(x),
        cross_entropy=lambda *inputs: row_nats(*inputs, torch.is_grad_enabled())[0],
        head_nats=lambda *inputs: head_nats(*inputs, torch.is_grad_enabled())[0])


class Kernels(NamedTuple):
    """The functions that the model calls; each twin has the reference's signature."""
    attention: Attention
    rms_norm: Callable[..., Tensor] = rms_norm
    leaky_relu_squared: Callable[[Tensor, float], Tensor] = leaky_relu_squared
    cross_entropy: Callable[[Tensor, Tensor, float], Tensor] = softcapped_cross_entropy
    masked: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = masked_attention
    """Attention of a chunk to a document's past (`KeyValueCache`)."""
    mlp: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None
    """x [..., D], up [F, D], down [D, F], slope -> [..., D] in one operator that keeps one activation of width F."""
    head_nats: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None
    """Hidden [M, D], head [V, D], targets [M], softcap -> nats [M] in one operator that keeps no logits."""
    fused: str = "compiled"
    """Who fuses what is not attention: `compiled` (a compiler, the references), `by hand` (eager twins) or `triton`."""


def eager_rms_norm(x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """`EagerRmsNorm` as a function."""
    return EagerRmsNorm.apply(x, gain)


def pick_kernels(cfg: Config, run: Run) -> Kernels:
    """The kernels of this run: Triton's on a GPU; else a compiler fuses the references, and eager runs take the twins.

    Raises `UserError` where KERNELS=triton cannot be had.
    """
    attention = pick_attention(cfg.attention, run.device, run.dtype, cfg.train_seq_len)
    masked = dense_masked_attention if attention.name == "dense" else masked_attention
    kernels = Kernels(attention)
    if not run.compiles and cfg.logit_softcap <= 40:  # beyond, the one-pass cross-entropy could lose its smallest terms
        kernels = Kernels(attention, eager_rms_norm, EagerLeakyReluSquared.apply, EagerCrossEntropy.apply, masked,
                          fused="by hand")
    able = run.is_cuda and run.dtype == torch.bfloat16 and torch.cuda.get_device_capability(run.device) >= (8, 0)
    require(able or cfg.kernels != "triton",
            "KERNELS=triton: needs DTYPE=bfloat16 on a GPU of compute capability 8.0 or later; use auto")
    if able and cfg.kernels != "plain":
        try:
            kernels = kernels._replace(fused="triton", **triton_kernels())
            return kernels._replace(fused="triton but the MLP", mlp=None) if cfg.mlp_rank else kernels
        except ImportError as error:
            require(cfg.kernels == "auto", f"KERNELS=triton: cannot be imported here ({error}); use auto")
    return kernels


# ----------------------------------------------------------------------------------------------------
# 6 Model: layer plan, weights seam, one forward
# ----------------------------------------------------------------------------------------------------
# Which block runs when is data (`layer_plan`): loop off and loop on are two tuples. A block reads its matrices only
# through `w.linear(name, visit, x)`, so that training, calibration and evaluation share every gate and norm; where `w`
# is plain, a kernel may take the MLP's or the head's matrices whole. Matrices of one kind lie in one bank [count, O, I]
# for the optimizer; a parameter is fp32 and is cast where it is used.
# Positions restart at every document piece; nothing else has to be told where documents end.
# Safe to change: a gate is one class and one entry of GATES. A new parameter needs a row in ROUTES (section 7).


class Visit(NamedTuple):
    """One execution of one stored block."""
    number: int
    """Position in the plan: a looped block has several visits, each with adapters of its own."""
    block: int
    """Which stored block runs."""
    skip_from: int | None
    """Number of the visit whose output is mixed in before this one (U-Net skip)."""
    skip_slot: int | None
    """Row of the skip weights: the position in the decoder half."""
    lanes: str
    """`none`: attention, then MLP; `single`: both read one lane; `two`: two lanes."""
    window: int
    """Tokens that attention sees, the own one included; 0: the whole document."""


def layer_plan(cfg: ModelKnobs, looped: bool) -> tuple[Visit, ...]:
    """The order in which stored blocks run: pure data, printed in the log.

    The first half of the visits (rounded down) is the encoder; the decoder's j-th visit takes the output of the
    encoder's j-th last one, for the first MAX_SKIPS of them.

    >>> cfg = ModelKnobs(num_layers=4, loop_start=1, loop_end=2, num_loops=1, parallel_start_layer=3)
    >>> [(v.block, v.skip_from) for v in layer_plan(cfg, looped=True)]
    [(0, None), (1, None), (2, None), (1, 2), (2, 1), (3, 0)]
    """
    first, last = cfg.loop_start, cfg.loop_end
    order = list(range(cfg.num_layers))
    if looped and cfg.num_loops:
        order = [*range(first), *list(range(first, last + 1)) * (cfg.num_loops + 1), *range(last + 1, cfg.num_layers)]
    encoder = len(order) // 2
    windows = [int(window) for window in cfg.attn_windows.split(",")]
    visits = []
    for i, block in enumerate(order):
        slot = i - encoder if 0 <= i - encoder < min(encoder, cfg.max_skips) else None
        lanes = cfg.parallel_residual if block >= cfg.parallel_start_layer else "none"
        visits.append(Visit(i, block, None if slot is None else encoder - 1 - slot, slot, lanes,
                            windows[block % len(windows)]))
    return tuple(visits)


def num_skips(cfg: ModelKnobs) -> int:
    """Rows of the skip weights: decoder visits of the looped plan that have an encoder partner."""
    return sum(visit.skip_slot is not None for visit in layer_plan(cfg, looped=True))


class Weights:
    """How a block reads its matrices: cast once a forward, q, k and v joined, channel scales multiplied in.

    Names: `qkv` [N*H + 2*K*H, D], `o` [D, N*H], `up` [F, D], `down` [D, F] of each block, `head` [V, D]; with a rank r
    `up_in` [r, D], `up` [F, r], `down_in` [r, F], `down` [D, r].
    """

    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        layers = model.cfg.num_layers
        self.dtype, self.table = dtype, model.tok_emb
        qo, kv = self.cast("qo_bank", model.qo_bank).unbind(), self.cast("kv_bank", model.kv_bank).unbind()
        self.matrices = {("head", 0): model.tok_emb.to(dtype)}
        for i in range(layers):
            self.matrices["qkv", i] = torch.cat([qo[i], kv[i], kv[layers + i]])
            # Channel scales go into the matrices: the same product, without a pass over the activations.
            self.matrices["o", i] = qo[layers + i] * model.attn_scale[i].to(dtype).unsqueeze(1)
        for name in model.mlp_products:
            bank = f"mlp_{name}_bank"
            for i, matrix in enumerate(self.cast(bank, getattr(model, bank)).unbind()):
                scale = model.mlp_scale[i].to(dtype).unsqueeze(1)
                self.matrices[name, i] = matrix * scale if name == "down" else matrix

    def cast(self, name: str, bank: Tensor) -> Tensor:
        """The values of a bank in the dtype of the forward."""
        return bank.to(self.dtype)

    plain = True
    """Whether its products may be fused with what surrounds them: nobody listens to `linear` or adds to it."""

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the fp32 embedding, cast afterwards: its gradient is then summed in fp32."""
        return F.embedding(ids, self.table).to(self.dtype)

    def linear(self, name: str, visit: Visit | None, x: Tensor, side: Tensor | None = None) -> Tensor:
        """x [..., I] times the matrix's transpose -> [..., O]; the head belongs to no visit.

        `side`: the sublayer's input, for products whose adapter reads that instead of x.
        """
        return F.linear(x, self.matrices[name, visit.block if visit else 0])


class RecordingWeights(Weights):
    """Plain weights that also sum what quantization needs to know, over all visits of a block, in fp32.

    Of every input x: x x^T. Of every gradient g at a product's output, once a backward runs: g g^T (of the head: g^2 by
    row); of every gradient at the embedding's output: g g^T, and |g|^2 by id. The model itself needs no gradient.
    """
    plain = False

    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        self.gram: dict[tuple[str, int], Tensor] = {}
        self.fisher: dict[tuple[str, int], Tensor] = {}
        self.tokens: dict[tuple[str, int], int] = collections.defaultdict(int)
        vocab, dim = self.table.shape
        self.input_gram = self.table.new_zeros(dim, dim)
        self.input_rows = self.table.new_zeros(vocab)

    def embed(self, ids: Tensor) -> Tensor:
        e = super().embed(ids)
        if not torch.is_grad_enabled():
            return e

        def seen(grad: Tensor) -> None:
            g_MD = grad.flatten(0, -2).float()
            self.input_gram.addmm_(g_MD.T, g_MD)
            self.input_rows.index_add_(0, ids.flatten(), g_MD.square().sum(-1))

        e = e.detach().requires_grad_()
        e.register_hook(seen)
        return e

    def linear(self, name: str, visit: Visit | None, x: Tensor, side: Tensor | None = None) -> Tensor:
        x_MI, key = x.detach().flatten(0, -2).float(), (name, visit.block if visit else 0)
        known = self.gram.get(key)
        self.gram[key] = x_MI.T @ x_MI if known is None else known.addmm_(x_MI.T, x_MI)
        self.tokens[key] += len(x_MI)
        y = super().linear(name, visit, x, side)

        def seen(grad: Tensor) -> None:
            g_MO = grad.flatten(0, -2).float()
            found = g_MO.square().sum(0) if name == "head" else g_MO.T @ g_MO
            self.fisher[key] = found if key not in self.fisher else self.fisher[key].add_(found)

        if y.requires_grad:
            y.register_hook(seen)
        return y


class Adapters:
    """Low-rank corrections (LoRA, Hu et al. 2021) of one batch of documents, one set a row, for every visit.

    A site is (product, visit number): A [R, r, I] is the same draw for every row, B [R, O, r] starts at zero, so that
    the first chunk is scored by the plain model, bit for bit. `o` and `mlp` read the sublayer's normed input (#1530).
    """

    def __init__(self, model: GPT, plan: Sequence[Visit], rows: int, cfg: Config) -> None:
        dim, kv_dim = model.cfg.model_dim, model.cfg.num_kv_heads * model.cfg.head_dim
        device, rank = model.tok_emb.device, cfg.ttt_lora_rank
        parts = dict(q=dim, k=kv_dim, v=kv_dim, o=dim, mlp=dim, head=model.cfg.vocab_size)
        self.scale = cfg.ttt_lora_alpha / rank
        draw = torch.Generator().manual_seed(cfg.seed)
        wanted = cfg.ttt_lora_on.split(",")
        self.sites: dict[tuple[str, int], list[tuple[int, Tensor, Tensor]]] = {}
        """(product, visit number) -> parts [(first output row, A, B)]; qkv has up to three."""
        for name, visit in [(n, v) for v in plan for n in ("q", "k", "v", "o", "mlp")] + [("head", None)]:
            a = (2 * torch.rand(rank, dim, generator=draw) - 1) / math.sqrt(dim)  # drawn also where it is not wanted
            if name not in wanted:
                continue
            product = {"q": "qkv", "k": "qkv", "v": "qkv", "mlp": "down"}.get(name, name)
            site = self.sites.setdefault((product, visit.number if visit else 0), [])
            first = {"k": dim, "v": dim + kv_dim}.get(name, 0)
            site.append((first, a.to(device).repeat(rows, 1, 1).requires_grad_(),
                         torch.zeros(rows, parts[name], rank, device=device, requires_grad=True)))

    def parameters(self) -> list[Tensor]:
        """Every A and B."""
        return [t for site in self.sites.values() for _, a, b in site for t in (a, b)]


class AdaptedWeights(Weights):
    """Plain weights plus each row's own adapters: y + (x A^T) B^T * alpha / r, before the channel scales."""
    plain = False

    def __init__(self, base: Weights, model: GPT, adapters: Adapters) -> None:
        self.dtype, self.table, self.matrices, self.adapters = base.dtype, base.table, base.matrices, adapters
        self.scales = {"o": model.attn_scale.detach(), "down": model.mlp_scale.detach()}

    def linear(self, name: str, visit: Visit | None, x: Tensor, side: Tensor | None = None) -> Tensor:
        y = super().linear(name, visit, x)
        source, changes, at = x if side is None else side, [], 0
        for first, a, b in self.adapters.sites.get((name, visit.number if visit else 0), ()):
            b = b * self.adapters.scale
            if name in self.scales and visit is not None:
                b = b * self.scales[name][visit.block].unsqueeze(1)
            changes += [y.new_zeros(*y.shape[:-1], first - at)] * (first > at)
            changes.append(torch.bmm(torch.bmm(source, a.to(self.dtype).mT), b.to(self.dtype).mT))
            at = first + b.size(1)
        changes += [y.new_zeros(*y.shape[:-1], y.size(-1) - at)] * (0 < at < y.size(-1))
        return y + (torch.cat(changes, dim=-1) if len(changes) > 1 else changes[0]) if changes else y


class NoPast:
    """Every token's context is in the batch."""
    lead = 0
    """Columns at the front of a batch that are embedded but not run: the token before a chunk."""
    reach = 0
    """Tokens of the past that can be seen."""

    def prepare(self, kernels: Kernels, batch: Batch) -> Any:
        return kernels.attention.prepare(batch)

    def attend(self, kernels: Kernels, visit: Visit, q: Tensor, k: Tensor, v: Tensor, pieces: Any) -> Tensor:
        return kernels.attention.run(q, k, v, pieces, visit.window)


NO_PAST = NoPast()


class KeyValueCache(NoPast):
    """Keys and values of the last `reach` tokens of each row's document, computed with the weights of their time.

    A chunk attends to them and to itself, so that a token is computed once instead of once a chunk. Gradients end at
    the chunk's start. All rows are at the same position of their documents.
    """
    lead = 1

    def __init__(self, reach: int) -> None:
        self.reach, self.seen = reach, 0
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        self.new: dict[int, tuple[Tensor, Tensor]] = {}

    def prepare(self, kernels: Kernels, batch: Batch) -> Tensor:
        size, old = batch.ids.size(1) - self.lead, min(self.seen, self.reach)
        column = torch.arange(old + size, device=batch.ids.device)
        back = column[old:, None] - column[None, :]
        return ((back >= 0) & (back < self.reach))[None, None]

    def attend(self, kernels: Kernels, visit: Visit, q: Tensor, k: Tensor, v: Tensor, pieces: Tensor) -> Tensor:
        if visit.number in self.held:
            k, v = (torch.cat([past, now], dim=1) for past, now in zip(self.held[visit.number], (k, v)))
        self.new[visit.number] = (k[:, -self.reach:].detach(), v[:, -self.reach:].detach())
        return windowed(kernels.masked)(q, k, v, pieces, visit.window)

    def advance(self, size: int, new: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """`new` (of the scoring forward over `size` tokens) becomes the past of the next chunk."""
        self.held, self.seen = dict(new), self.seen + size


def rotate(x_RTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first 2*P dimensions, halves convention; cos and sin are [R, T, 1, P]."""
    half = cos.size(-1)
    if half == 0:
        return x_RTNH
    a, b, rest = x_RTNH.split([half, half, x_RTNH.size(-1) - 2 * half], dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


def exclusive(y_RTNH: Tensor, v_RTKH: Tensor) -> Tensor:
    """XSA (#265): take from each head's output its component along the token's own value vector.

    y - (y.v / v.v) v: the same as with a normalised v, without a normalised copy.
    """
    y = y_RTNH.unflatten(2, (v_RTKH.size(2), -1))
    v = v_RTKH.unsqueeze(3)
    share = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-6)
    return (y - share * v).flatten(2, 3)


class NoGate(nn.Module):
    """Attention output passes unchanged."""

    def __init__(self, cfg: ModelKnobs) -> None:
        super().__init__()

    def forward(self, y_RTNH: Tensor, n_RTD: Tensor, block: int) -> Tensor:
        return y_RTNH


class OutputGate(NoGate):
    """2*sigmoid(w . n[:G]) per head: starts as the identity (#1667)."""

    def __init__(self, cfg: ModelKnobs) -> None:
        super().__init__(cfg)
        self.weight = nn.Parameter(torch.zeros(cfg.num_layers, cfg.num_heads, cfg.gate_window))

    def forward(self, y_RTNH: Tensor, n_RTD: Tensor, block: int) -> Tensor:
        weight = self.weight[block].to(n_RTD.dtype)
        return y_RTNH * (2 * torch.sigmoid(F.linear(n_RTD[..., :weight.size(1)], weight))).unsqueeze(-1)


class SparseGate(OutputGate):
    """sigmoid(c * w . n[:G]) per head: starts at one half (#1787)."""

    def __init__(self, cfg: ModelKnobs) -> None:
        super().__init__(cfg)
        self.scale = cfg.sparse_attn_gate_scale

    def forward(self, y_RTNH: Tensor, n_RTD: Tensor, block: int) -> Tensor:
        weight = self.weight[block].to(n_RTD.dtype)
        return y_RTNH * torch.sigmoid(self.scale * F.linear(n_RTD[..., :weight.size(1)], weight)).unsqueeze(-1)


class DenseGate(NoGate):
    """sigmoid(w . n) per head over the whole width (#1736, after Qwen's gated attention)."""

    def __init__(self, cfg: ModelKnobs) -> None:
        super().__init__(cfg)
        self.weight = nn.Parameter(cfg.gated_attn_init_std * torch.randn(cfg.num_layers, cfg.num_heads, cfg.model_dim))

    def gate(self, n_RTD: Tensor, block: int) -> Tensor:
        return torch.sigmoid(F.linear(n_RTD, self.weight[block].to(n_RTD.dtype)))

    def forward(self, y_RTNH: Tensor, n_RTD: Tensor, block: int) -> Tensor:
        return y_RTNH * self.gate(n_RTD, block).unsqueeze(-1)


class DenseBiasGate(DenseGate):
    """sigmoid(w . n + b): weights start at zero, the bias at GATED_ATTN_BIAS, so that the gate starts open."""

    def __init__(self, cfg: ModelKnobs) -> None:
        super().__init__(cfg)
        nn.init.zeros_(self.weight)
        self.bias = nn.Parameter(torch.full((cfg.num_layers, cfg.num_heads), cfg.gated_attn_bias))

    def gate(self, n_RTD: Tensor, block: int) -> Tensor:
        dtype = n_RTD.dtype
        return torch.sigmoid(F.linear(n_RTD, self.weight[block].to(dtype), self.bias[block].to(dtype)))


GATES: dict[str, Callable[[ModelKnobs], NoGate]] = {
    "none": NoGate, "output": OutputGate, "sparse": SparseGate,
    "dense": lambda cfg: DenseBiasGate(cfg) if cfg.gated_attn_bias else DenseGate(cfg)}


class BigramHash(nn.Module):
    """A hashed embedding of (previous, current) token, projected to D and scaled (#162, form of #1060).

    The last bucket is for tokens without a predecessor in their piece. The table starts at zero and the projection
    orthogonal: were both zero, neither would ever get a gradient.
    """

    def __init__(self, cfg: ModelKnobs) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(cfg.bigram_buckets, cfg.bigram_dim))
        self.proj = nn.Parameter(nn.init.orthogonal_(torch.empty(cfg.model_dim, cfg.bigram_dim)))
        self.scale = nn.Parameter(torch.full((1,), 0.05))

    def forward(self, batch: Batch, dtype: torch.dtype) -> Tensor:
        last = self.table.size(0) - 1
        before = batch.ids.roll(1, dims=1)
        bucket = torch.bitwise_xor(36313 * batch.ids, 27191 * before) % last
        bucket = torch.where(batch.positions > 0, bucket, last)
        return self.scale.to(dtype) * F.linear(F.embedding(bucket, self.table).to(dtype), self.proj.to(dtype))


class Step(NamedTuple):
    """What all visits of one forward share."""
    w: Weights
    past: NoPast
    pieces: Any
    cos: Tensor
    sin: Tensor


class GPT(nn.Module):
    """The language model: parameters in fp32, activations in the dtype of the forward.

    Raises `UserError` through `ModelKnobs` for impossible shapes. Parameter count of record #1855: 35,945,671.
    """

    def __init__(self, cfg: ModelKnobs) -> None:
        super().__init__()
        self.cfg = cfg
        layers, dim, kv_dim, ones = cfg.num_layers, cfg.model_dim, cfg.num_kv_heads * cfg.head_dim, torch.ones
        self.tok_emb = nn.Parameter(cfg.tied_embed_init_std * torch.randn(cfg.vocab_size, dim))
        # Rows 0..L-1 are read from the residual stream (q, k, up) and start orthogonal; what writes into it starts
        # at zero, so that every block starts as the identity.
        self.qo_bank = nn.Parameter(torch.cat([orthogonal(layers, dim, dim), torch.zeros(layers, dim, dim)]))
        self.kv_bank = nn.Parameter(orthogonal(2 * layers, kv_dim, dim))
        self.mlp_up_bank = nn.Parameter(orthogonal(layers, cfg.mlp_dim, cfg.mlp_rank or dim))
        self.mlp_down_bank = nn.Parameter(torch.zeros(layers, dim, cfg.mlp_rank or cfg.mlp_dim))
        self.mlp_products = ("up", "down")
        if cfg.mlp_rank:
            self.mlp_products = ("up_in", "up", "down_in", "down")
            self.mlp_up_in_bank = nn.Parameter(orthogonal(layers, cfg.mlp_rank, dim))
            self.mlp_down_in_bank = nn.Parameter(orthogonal(layers, cfg.mlp_rank, cfg.mlp_dim))
        self.q_gain = nn.Parameter(torch.full((layers, cfg.num_heads), cfg.qk_gain_init))
        self.attn_scale, self.mlp_scale = nn.Parameter(ones(layers, dim)), nn.Parameter(ones(layers, dim))
        self.resid_mix = nn.Parameter(torch.stack([ones(layers, dim), torch.zeros(layers, dim)], dim=1))
        self.skip_weights = nn.Parameter(ones(num_skips(cfg), dim))
        self.skip_gates = nn.Parameter(torch.zeros(num_skips(cfg), dim)) if cfg.skip_gates_enabled else None
        self.gate = GATES[cfg.attn_gate](cfg)
        if cfg.smear_gate_enabled:
            self.smear_gate = nn.Parameter(torch.zeros(1, cfg.gate_window))
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.bigram = BigramHash(cfg) if cfg.bigram_buckets else None
        if cfg.parallel_residual == "two":
            self.parallel_resid_lambdas = nn.Parameter(torch.full((layers, 2), 1.1))
            self.parallel_post_lambdas = nn.Parameter(ones(layers, 2, 2))
        self.kernels = Kernels(sdpa_attention())
        """The references; `pick_kernels` has faster ones."""
        self.lattice: dict[str, Tensor] = {}
        """Row step codes of the matrices that lie on their codes' lattice already (`settle`)."""

    def tensors(self) -> Iterator[tuple[str, Tensor, str]]:
        """(name, values, parameter it belongs to) of all that an artifact holds; banks are split into matrices.

        A matrix's name says which input it reads: blocks.<i>.{q,k,v,o,up,down}, with a rank also {up_in,down_in}.
        """
        layers = self.cfg.num_layers
        banks = {"qo_bank": ("q", "o"), "kv_bank": ("k", "v"), **{f"mlp_{n}_bank": (n,) for n in self.mlp_products}}
        for name, parameter in self.named_parameters():
            if name not in banks:
                yield name, parameter.detach(), name
            else:
                for row, matrix in enumerate(parameter.detach().unbind()):
                    yield f"blocks.{row % layers}.{banks[name][row // layers]}", matrix, name

    def rotary(self, positions_RT: Tensor, seq_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [R, T, 1, ROPE_DIMS/2] of each token's position in its piece, for contexts of seq_len."""
        cfg = self.cfg
        base = cfg.rope_base
        if cfg.rope_yarn and seq_len > cfg.rope_train_seq_len and cfg.rope_dims > 2:
            base *= (seq_len / cfg.rope_train_seq_len) ** (cfg.rope_dims / (cfg.rope_dims - 2))
        exponent = torch.arange(0, cfg.rope_dims, 2, device=positions_RT.device) / max(1, cfg.rope_dims)
        angle = positions_RT[..., None, None] * base ** -exponent
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def embed(self, batch: Batch, w: Weights) -> Tensor:
        """[R, T, D]: token embedding, smeared with its predecessor's (never across a piece's start), then normed."""
        e = w.embed(batch.ids)
        if self.cfg.smear_gate_enabled:
            gate = self.smear_lambda.to(e.dtype) * torch.sigmoid(
                F.linear(e[..., :self.cfg.gate_window], self.smear_gate.to(e.dtype)))
            e = e + gate * e.roll(1, dims=1) * (batch.positions > 0).unsqueeze(-1).to(e.dtype)
        if self.bigram is not None:
            e = e + self.bigram(batch, e.dtype)
        return self.kernels.rms_norm(e)

    def attn(self, n: Tensor, visit: Visit, step: Step) -> Tensor:
        """Attention of one visit on its normed input n [R, T, D]."""
        cfg, heads, kv, block = self.cfg, self.cfg.num_heads, self.cfg.num_kv_heads, visit.block
        qkv = step.w.linear("qkv", visit, n).unflatten(-1, (heads + 2 * kv, cfg.head_dim))
        q, k, v = qkv.split([heads, kv, kv], dim=2)
        q = rotate(self.kernels.rms_norm(q, self.q_gain[block].unsqueeze(-1)), step.cos, step.sin)
        k = rotate(self.kernels.rms_norm(k), step.cos, step.sin)
        y = step.past.attend(self.kernels, visit, q, k, v, step.pieces)
        if block >= cfg.num_layers - cfg.xsa_last_n:
            y = exclusive(y, v)
        y = self.gate(y, n, block)
        return step.w.linear("o", visit, y.flatten(2), side=n)

    def mlp(self, n: Tensor, visit: Visit, step: Step) -> Tensor:
        """MLP of one visit on its normed input."""
        slope, rank, w = self.cfg.mlp_slope, self.cfg.mlp_rank, step.w
        if self.kernels.mlp is not None and w.plain:
            return self.kernels.mlp(n, w.matrices["up", visit.block], w.matrices["down", visit.block], slope)
        wide = w.linear("up", visit, w.linear("up_in", visit, n) if rank else n)
        post = self.kernels.leaky_relu_squared(wide, slope)
        return w.linear("down", visit, w.linear("down_in", visit, post) if rank else post, side=n)

    def hidden(self, batch: Batch, plan: Sequence[Visit], w: Weights, past: NoPast = NO_PAST) -> Tensor:
        """[R, T - past.lead, D]: the normed input of the output matrix. The only forward there is."""
        dtype, norm = w.dtype, self.kernels.rms_norm
        positions = batch.positions[:, past.lead:]
        context = max(past.reach, positions.size(1))
        step = Step(w, past, past.prepare(self.kernels, batch), *self.rotary(positions, context, dtype))
        x = x0 = self.embed(batch, w)[:, past.lead:]
        lane = None  # the second lane, once there are two
        outputs: list[Tensor] = []
        for visit in plan:
            i = visit.block
            scale = 1 / math.sqrt(i + 1) if self.cfg.ln_scale else 1.0
            if visit.lanes == "two" and lane is None:
                lane = x  # before the skip, which goes to the first lane only
            if visit.skip_from is not None:
                skip = self.skip_weights[visit.skip_slot].to(dtype) * outputs[visit.skip_from]
                x = x + skip if self.skip_gates is None else \
                    torch.lerp(skip, x, torch.sigmoid(self.skip_gates[visit.skip_slot]).to(dtype))
            mix = self.resid_mix[i].to(dtype)
            u = mix[0] * x + mix[1] * x0
            n = norm(u, scale)
            a = self.attn(n, visit, step)
            if visit.lanes == "none":
                x = u + a
                x = x + self.mlp(norm(x, scale), visit, step)
            elif visit.lanes == "single":
                x = u + a + self.mlp(n, visit, step)
            else:
                m = self.mlp(norm(lane, scale), visit, step)
                keep, post = self.parallel_resid_lambdas[i].to(dtype), self.parallel_post_lambdas[i].to(dtype)
                x = keep[0] * x + post[0, 0] * a + post[1, 0] * m
                lane = keep[1] * lane + post[0, 1] * a + post[1, 1] * m
            outputs.append(x)
        if lane is not None:
            x = {"attn": x, "mlp": lane}.get(self.cfg.parallel_final_lane, 0.5 * (x + lane))
        return norm(x)

    def losses(self, hidden_MD: Tensor, targets_M: Tensor, w: Weights) -> Tensor:
        """Nats of each target [M] given the final hidden states, fp32."""
        if self.kernels.head_nats is not None and w.plain:
            return self.kernels.head_nats(hidden_MD, w.matrices["head", 0], targets_M, self.cfg.logit_softcap)
        return self.kernels.cross_entropy(w.linear("head", None, hidden_MD), targets_M, self.cfg.logit_softcap)

    def total_loss(self, batch: Batch, plan: Sequence[Visit], dtype: torch.dtype,
                   weights: Callable[[GPT, torch.dtype], Weights] = Weights) -> Tensor:
        """Sum of nats over the batch's targets (a scalar): what training differentiates."""
        w = weights(self, dtype)
        return self.losses(self.hidden(batch, plan, w).flatten(0, 1), batch.targets.flatten(), w).sum()


def orthogonal(count: int, rows: int, cols: int) -> Tensor:
    """[count, rows, cols]: each matrix with orthonormal rows or columns, whichever are fewer."""
    return torch.stack([nn.init.orthogonal_(torch.empty(rows, cols)) for _ in range(count)])


def shapes_of(cfg: ModelKnobs) -> GPT:
    """A model that takes no memory: names and shapes of its parameters."""
    with torch.device("meta"):
        return GPT(cfg)


def build_model(cfg: Config, run: Run) -> GPT:
    """A freshly initialised model on this run's device; SEED and rank 0 decide the values."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg)
    model.kernels = pick_kernels(cfg, run)
    model.to(run.device)
    with torch.no_grad():
        for parameter in model.parameters():
            run.broadcast(parameter)  # LAPACK may differ between nodes
    return model


# ----------------------------------------------------------------------------------------------------
# 7 Optimizer: update rules are pure functions; communication wraps them
# ----------------------------------------------------------------------------------------------------
# ROUTES says for every parameter who updates it, with which learning rate and decay, and how the artifact stores it.
# Each rank holds the momentum of its own slices of the banks: gradients are summed and scattered, every rank
# orthogonalises its slices, the updates are gathered and applied everywhere. With one process these are identities.
# Clipping uses the norm of the summed gradient, once, so that a step does not depend on the world size.
# Safe to change: a route. A new rule is a function of tensors and a branch in `ShardedOptimizer.step`.


class Route(NamedTuple):
    """How the parameters that match are treated."""
    patterns: str
    """Parameter names, as shell patterns."""
    rule: str
    """muon or adam."""
    lr: str
    """Knob of the peak learning rate."""
    wd: str
    """Knob of the weight decay."""
    stored: str
    """In the artifact: gptq:<family>, int8 (one step a row) or fp16."""


ROUTES = (
    Route("qo_bank kv_bank", "muon", "matrix_lr", "muon_wd", "gptq:attn"),
    Route("mlp_*bank", "muon", "matrix_lr", "muon_wd", "gptq:mlp"),
    Route("tok_emb", "adam", "tied_embed_lr", "embed_wd", "gptq:embed"),
    Route("bigram.table", "adam", "tied_embed_lr", "embed_wd", "int8"),
    Route("bigram.proj gate.weight", "adam", "scalar_lr", "adam_wd", "int8"),
    Route("q_gain attn_scale mlp_scale resid_mix skip_weights skip_gates gate.bias smear_gate smear_lambda "
          "bigram.scale parallel_resid_lambdas parallel_post_lambdas", "adam", "scalar_lr", "adam_wd", "fp16"),
)


def route(name: str) -> Route:
    """The one row of ROUTES for a parameter; a parameter with none or several is a bug."""
    rows = [r for r in ROUTES if any(fnmatch.fnmatchcase(name, p) for p in r.patterns.split())]
    ensure(len(rows) == 1, f"parameter {name} matches {len(rows)} rows of ROUTES, expected exactly one")
    return rows[0]


CLASSIC = ((3.4445, -4.7750, 2.0315),)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Coefficients (a, b, c) of each Newton-Schulz step (Amsel et al. 2025; #1344). Five of them take singular values in
[0.001, 1] to [0.86, 1.14]; five classic ones (Jordan et al. 2024) to [0.47, 1.20]."""


def coefficients(cfg: OptimizerKnobs) -> tuple[tuple[float, float, float], ...]:
    """The Newton-Schulz steps that the knobs ask for."""
    if cfg.muon_coefficients == "classic":
        return CLASSIC * cfg.muon_backend_steps
    return POLAR_EXPRESS[:cfg.muon_backend_steps]


def orthogonalize(g_KOI: Tensor, steps: Sequence[tuple[float, float, float]], dtype: torch.dtype) -> Tensor:
    """Approximate U V^T of each matrix of a stack [K, O, I] by Newton-Schulz, computed and returned in `dtype`.

    Cost: len(steps) * (4 m^2 n + 2 m^3) FLOPs a matrix, m = min(O, I), n = max(O, I).
    """
    x = g_KOI.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def muon_update(grad_KOI: Tensor, momentum_KOI: Tensor, second_KO1: Tensor | None, mu: float, beta2: float,
                row_normalize: bool, steps: Sequence[tuple[float, float, float]], dtype: torch.dtype) -> Tensor:
    """Muon's direction for a stack of matrices, in units of spectral norm; the two states change in place.

    Nesterov momentum, rows normalised (MuonEq-R, #1217), orthogonalised, scaled by sqrt(max(1, O/I)). With a second
    moment the rows are rescaled by their own running size at unchanged Frobenius norm (NorMuon, Li et al. 2025).
    """
    momentum_KOI.mul_(mu).add_(grad_KOI)
    u = grad_KOI + mu * momentum_KOI
    if row_normalize:
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    x = orthogonalize(u, steps, dtype)
    if second_KO1 is not None:
        size = x.norm(dim=(-2, -1), keepdim=True)
        second_KO1.lerp_(x.float().square().mean(dim=-1, keepdim=True), 1 - beta2)
        x = x * second_KO1.clamp_min(1e-10).rsqrt().to(x.dtype)
        x = x * (size / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7))
    return x * math.sqrt(max(1.0, x.size(-2) / x.size(-1)))


def decay_and_apply(weight: Tensor, update: Tensor, lr: float, wd: float, cautious: bool) -> None:
    """weight <- (1 - lr*wd) weight - lr*update; cautious decay only where update and weight have the same sign."""
    if cautious:
        weight.sub_(lr * wd * weight * (update * weight > 0))
    else:
        weight.mul_(1 - lr * wd)
    weight.add_(update.to(weight.dtype), alpha=-lr)


class ShardedOptimizer:
    """Muon for the banks, sharded over ranks by slices; AdamW for the rest, replicated."""

    def __init__(self, model: GPT, cfg: Config, run: Run) -> None:
        self.cfg, self.run = cfg, run
        self.named = {name: p for name, p in model.named_parameters() if p.numel()}  # there may be no skips
        routes = {name: route(name) for name in self.named}
        self.banks = [(p, routes[n]) for n, p in self.named.items() if routes[n].rule == "muon"]
        self.small = [p for n, p in self.named.items() if routes[n].rule == "adam"]
        groups = collections.defaultdict(list)
        for name, parameter in self.named.items():
            if routes[name].rule == "adam":
                groups[routes[name].lr, routes[name].wd].append(parameter)
        self.adam = torch.optim.AdamW(
            [dict(params=params, lr=getattr(cfg, lr), peak=getattr(cfg, lr), weight_decay=getattr(cfg, wd))
             for (lr, wd), params in groups.items()], betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
        self.reset()

    def reset(self) -> None:
        """Forget all momentum, as before the first step."""
        self.adam.state.clear()
        for p in self.small:  # as AdamW makes them in its first step: a checkpoint finds them in any step
            self.adam.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
        self.skipped = torch.zeros((), dtype=torch.int32, device=self.run.device)
        """Steps whose gradient was not finite, so far."""
        self.state = []
        for bank, _ in self.banks:
            slices = -(-bank.size(0) // self.run.world)
            momentum = bank.new_zeros(slices, *bank.shape[1:])
            second = momentum.new_zeros(*momentum.shape[:2], 1) if self.cfg.normuon_beta2 else None
            self.state.append((momentum, second))

    def _shards(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, bank, this rank's slices) of Muon's states."""
        for name, (bank, states) in zip((n for n in self.named if route(n).rule == "muon"), zip(
                (bank for bank, _ in self.banks), self.state)):
            for kind, own in zip(("momentum", "second"), states):
                if own is not None:
                    yield f"muon.{kind}.{name}", bank, own

    def _replicas(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what is the same on all ranks: AdamW's states and the count of skipped steps."""
        yield "skipped", self.skipped
        for name, p in self.named.items():
            for kind, value in self.adam.state.get(p, {}).items():
                yield f"adam.{kind}.{name}", value

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """All state by name, whole on every rank (a collective), for a checkpoint that any number of ranks can read."""
        return {**dict(self._replicas()),
                **{name: self.run.all_gather(own)()[:bank.size(0)] for name, bank, own in self._shards()}}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with the state that `tensors` gave, maybe with other ranks."""
        for name, value in self._replicas():
            value.copy_(tensors[name])
        for name, _, own in self._shards():
            own.copy_(padded(tensors[name], self.run.world)[self.run.rank * len(own):][:len(own)])

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float) -> Tensor:
        """One update from the gradients of all ranks' shares of the loss; returns the gradient norm (a scalar).

        Gradients are consumed. `lr_scale` multiplies every peak learning rate.
        """
        cfg, run = self.cfg, self.run
        idle = [name for name, p in self.named.items() if p.grad is None]
        ensure(not idle, f"no gradient reached {', '.join(idle)}")
        coming = [run.reduce_scatter(padded(bank.grad, run.world)) for bank, _ in self.banks]
        flat = run.total(torch.cat([p.grad.flatten() for p in self.small]))
        grads = [wait() for wait in coming]
        own = sum((g.square().sum() for g in grads), flat.new_zeros(()))
        norm = (run.total(own.clone()) + flat.square().sum()).sqrt()
        shrink = (cfg.grad_clip_norm / norm.clamp_min(1e-12)).clamp_max(1.0) if cfg.grad_clip_norm else None
        if shrink is not None:
            torch._foreach_mul_([*grads, flat], shrink)
        broken = ~torch.isfinite(norm)
        self.skipped += broken
        if run.is_cuda or broken:  # a GPU is not waited for; a CPU is spared the pass
            for g in (*grads, flat):
                g.masked_fill_(broken, 0)
        for p, g in zip(self.small, flat.split([p.numel() for p in self.small])):
            p.grad = g.view_as(p)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * lr_scale
        # A bank's update travels while the next bank's is orthogonalised, and the last one's during AdamW.
        updates = [run.all_gather(muon_update(grad, buffer, second, momentum, cfg.normuon_beta2, cfg.muon_row_normalize,
                                              coefficients(cfg), run.dtype))
                   for grad, (buffer, second) in zip(grads, self.state)]
        self.adam.step()
        for (bank, row), wait in zip(self.banks, updates):
            decay_and_apply(bank, wait()[:bank.size(0)], getattr(cfg, row.lr) * lr_scale, getattr(cfg, row.wd),
                            cfg.cautious_wd)
        for parameter in [*self.small, *(bank for bank, _ in self.banks)]:
            parameter.grad = None
        return norm


def padded(bank: Tensor, world: int) -> Tensor:
    """The bank with zero matrices appended until `world` divides their number."""
    missing = -bank.size(0) % world
    return F.pad(bank, (0, 0, 0, 0, 0, missing)) if missing else bank


class Ema:
    """Exponential moving average of all parameters, fp32, started at the initial weights (#287)."""

    def __init__(self, model: GPT, decay: float) -> None:
        self.decay = decay
        self.live = list(model.parameters())
        self.average = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay*average + (1-decay)*weights."""
        torch._foreach_lerp_(self.average, self.live, 1 - self.decay)

    @torch.no_grad()
    def load_into_model(self) -> None:
        """The live weights become the averaged ones."""
        torch._foreach_copy_(self.live, self.average)


# ----------------------------------------------------------------------------------------------------
# 8 Schedule: pure functions of the used fraction of the budget, and the clock that measures it
# ----------------------------------------------------------------------------------------------------
# `frac` runs from 0 to 1 over the budget: seconds of rank 0's clock, or steps. All ranks use the same number.
# Safe to change: the shape of a schedule.


def ramp(x: float, start: float, end: float) -> float:
    """0 before `start`, 1 after `end`, linear between."""
    return 1.0 if x >= end else 0.0 if x <= start else (x - start) / (end - start)


def lr_scale(cfg: ScheduleKnobs, frac: float) -> float:
    """1, then linear to 0 at the end of the budget over its last WARMDOWN_FRAC, never below MIN_LR."""
    return 1.0 if cfg.warmdown_frac == 0 else max(1.0 - ramp(frac, 1 - cfg.warmdown_frac, 1.0), cfg.min_lr)


def seq_schedule(cfg: Config) -> list[tuple[int, float]]:
    """TRAIN_SEQ_SCHEDULE as (row length in tokens, fraction of the budget at which it ends); the last has no end.

    >>> seq_schedule(Config(train_seq_schedule="1024@0.1,2048@1")), seq_schedule(Config())
    ([(1024, 0.1), (2048, inf)], [(2048, inf)])
    """
    if not cfg.train_seq_schedule:
        return [(cfg.train_seq_len, math.inf)]
    try:
        pairs = [part.split("@") for part in cfg.train_seq_schedule.split(",")]
        lengths, ends = zip(*((int(length), float(end)) for length, end in pairs))
    except ValueError:
        lengths, ends = (0,), (0.0,)
    require(min(lengths) >= 1 and list(ends) == sorted(set(ends)) and ends[0] > 0 and ends[-1] == 1,
            f"TRAIN_SEQ_SCHEDULE={cfg.train_seq_schedule}: expected length@end pairs with rising ends up to 1, such as "
            f"1024@0.1,2048@0.7,3072@1")
    return list(zip(lengths, (*ends[:-1], math.inf)))


class Stage(NamedTuple):
    """What one stretch of training runs: each is a graph of its own."""
    looped: bool
    seq_len: int
    rounded: bool
    """Whether it sees its matrices as they will be stored (QAT_START)."""


def stage(cfg: Config, frac: float) -> Stage:
    """The stage at a used fraction of the budget."""
    return Stage(cfg.num_loops > 0 and frac >= cfg.enable_looping_at,
                 next(length for length, end in seq_schedule(cfg) if frac < end), frac >= cfg.qat_start < 1)


def stage_starts(cfg: Config) -> list[float]:
    """Fractions of the budget at which a stage may begin, in order."""
    starts = {0.0, cfg.enable_looping_at, cfg.qat_start, *(end for _, end in seq_schedule(cfg))}
    return sorted(start for start in starts if start < 1)


def stages(cfg: Config) -> list[Stage]:
    """Every stage of a run, in order."""
    return list(dict.fromkeys(stage(cfg, start) for start in stage_starts(cfg)))


def muon_momentum(cfg: OptimizerKnobs, step: int) -> float:
    """Linear from its start to MUON_MOMENTUM over the warm-up steps."""
    share = ramp(step, 0, cfg.muon_momentum_warmup_steps)
    return (1 - share) * cfg.muon_momentum_warmup_start + share * cfg.muon_momentum


class TrainClock:
    """The used fraction of the training budget, the same on all ranks, without a wait for the GPU in the step.

    With a budget in seconds, rank 0 measures every few steps (GPUs: from the newest finished event, so that the host
    may run ahead) and broadcasts elapsed time and time a step over gloo; steps between are extrapolated from these.
    Training stops before the step that would cross the budget at the pace of the last ones. With
    MAX_WALLCLOCK_SECONDS=0 the fraction is step / ITERATIONS.
    """

    GPU_SYNC_STEPS = 8
    """Steps between measurements on a GPU; the host may lead by just under twice as many."""

    def __init__(self, cfg: Config, run: Run, step: int = 0, elapsed: float = 0.0, each: float = 0.0) -> None:
        """`step`, `elapsed` seconds and `each` step's: where a checkpoint goes on."""
        self.cfg, self.run = cfg, run
        self.budget = cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds if cfg.max_wallclock_seconds else 0.0
        self.every = self.GPU_SYNC_STEPS if run.is_cuda else 1
        self.paused = -elapsed
        self.events: collections.deque[tuple[int, Any]] = collections.deque()
        known = [(step - 1, elapsed - each), (step, elapsed)] if each else [(step, elapsed)]
        self.finished: collections.deque[tuple[int, float]] = collections.deque(known, maxlen=2 * self.every)
        self.at_step, self.elapsed, self.step_seconds = step, elapsed, each
        run.synchronize()
        self.started = time.perf_counter()
        self.first_event = self._mark()

    def _mark(self) -> Any:
        if not self.run.is_cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _collect(self) -> None:
        """Note when each step ended that the GPU has finished."""
        while self.events and self.events[0][1].query():
            done, event = self.events.popleft()
            self.finished.append((done, self.first_event.elapsed_time(event) / 1000 - self.paused))

    def _measure(self, step: int) -> tuple[float, float]:
        """(seconds used when `step` begins, seconds a step), as rank 0 sees it."""
        if not self.run.is_cuda:
            self.finished.append((step, time.perf_counter() - self.started - self.paused))
        else:
            if len(self.events) >= self.every:
                self.events[-self.every][1].synchronize()  # finished long ago, unless the host runs too far ahead
            self._collect()
        (a, t_a), (b, t_b) = self.finished[0], self.finished[-1]
        each = (t_b - t_a) / (b - a) if b > a else 0.0
        return t_b + (step - b) * each, each

    def frac(self, step: int) -> float:
        """Used fraction of the budget when `step` (0, 1, ...) begins; 1 or more: stop before it."""
        if not self.budget:
            return step / self.cfg.iterations
        if self.run.is_cuda and step:
            self.events.append((step, self._mark()))
        if step % self.every == 0:
            measured = torch.tensor(self._measure(step), dtype=torch.float64)
            self.elapsed, self.step_seconds = self.run.broadcast(measured).tolist()
            self.at_step = step
        now = self.elapsed + (step - self.at_step) * self.step_seconds
        if now + self.step_seconds > self.budget or step >= self.cfg.iterations:
            return max(1.0, now / self.budget)
        return now / self.budget

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside is not charged (validation in the middle of training)."""
        self.run.synchronize()
        self._collect()  # steps before the pause must not have it taken off
        start = time.perf_counter()
        yield
        self.run.synchronize()
        self.paused += time.perf_counter() - start

    def state(self, step: int) -> dict[str, float]:
        """What `__init__` takes to go on when `step` begins; without a wait for the GPU where there is a budget."""
        elapsed = self.elapsed + (step - self.at_step) * self.step_seconds if self.budget else self.seconds()
        return {"elapsed": elapsed, "each": self.step_seconds}

    def seconds(self) -> float:
        """Seconds since the start without pauses, everything finished."""
        self.run.synchronize()
        return time.perf_counter() - self.started - self.paused


# ----------------------------------------------------------------------------------------------------
# 9 Quantization: what an error costs, step sizes, GPTQ
# ----------------------------------------------------------------------------------------------------
# A matrix becomes integer codes times a step for each row and column. GPTQ (Frantar et al. 2022) feeds the error of
# each rounding forward into what is not rounded yet, along the inputs by their Hessian; here also along the outputs by
# their Fisher information, as in K-FAC (Martens and Grosse 2015), so that the loss and not the layer's output is kept.
# Where the steps go matters most: SDClip (#1394) gives every row the same rate, k standard deviations over the largest
# code; `waterfill` gives every entry the same cost, as rate-distortion theory asks for; nothing is clipped, and one
# unit for the whole model sets the size. Trellis-coded quantization (Marcellin and Fischer 1990) then gains most of
# what a vector quantizer could. Sums run over all ranks and visits, with documents separated as in training.
# Safe to change: how steps are chosen. `gptq` knows nothing of layers, ranks or files.

OCTAVE = 8
"""Step codes to a factor of two."""


class Quantized(NamedTuple):
    """One stored tensor."""
    stored: str
    """As in ROUTES: gptq:<family>, int8 or fp16."""
    codes: Tensor
    """int16 [..., C] codes; for fp16 the values themselves."""
    rows: Tensor | None = None
    """int8 [...]: step code of each row; None for fp16."""
    columns: Tensor | None = None
    """int8 [C]: step code of each column, of GPTQ's matrices alone."""

    def dequantize(self, unit: float) -> Tensor:
        """The fp32 values that the artifact stands for; `unit` multiplies the codes of GPTQ's matrices."""
        if self.rows is None:
            return self.codes.float()
        values = self.codes.float() * row_steps(self.rows, unit if self.columns is not None else 1.0).unsqueeze(-1)
        return values if self.columns is None else values * column_steps(self.columns)


STEP_TABLE = torch.tensor([math.ldexp(2.0 ** (k % OCTAVE / OCTAVE), k // OCTAVE) for k in range(-256, 256)],
                          dtype=torch.float64)
"""2^(k/8) for k from -256: the same bits on every machine."""
ROW_OFFSET = 64
"""Code 64 is a step of 1, so that codes reach from 2^-24 to 2^7.9: no row's step is 0."""


def row_steps(codes: Tensor, unit: float) -> Tensor:
    """fp32 steps of rows with these codes."""
    return (unit * STEP_TABLE.to(codes.device)[codes.long() - ROW_OFFSET + 256]).float()


def column_steps(codes: Tensor) -> Tensor:
    """fp32 factors of columns with these codes."""
    return STEP_TABLE.to(codes.device)[codes.long() + 256].float()


def step_codes(steps: Tensor, offset: int, up: bool = False) -> Tensor:
    """int8 codes of the nearest steps (relative error at most 4.4 %), or of the next larger ones."""
    exact = OCTAVE * steps.double().clamp_min(1e-30).log2() + offset
    return (exact.ceil() if up else exact.round()).clamp(-128, 127).to(torch.int8)


def factorize(gram_KCC: Tensor, damp: float, log: Callable[..., None] = lambda *a, **k: None) -> Tensor:
    """[K, C, C] upper Cholesky factor U of the damped inverse, (gram + damp * mean diagonal)^-1 = U^T U.

    Compensated by all later ones, an error e in entry c costs (e / U_cc)^2. Entries never seen get the mean diagonal;
    where a matrix fails, its damping grows tenfold.
    """
    h = gram_KCC.float().clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    alive = (~dead).sum(-1, keepdim=True).clamp_min(1)
    diagonal.copy_(torch.where(dead, (diagonal.sum(-1, keepdim=True) / alive).clamp_min(1e-30), diagonal))
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(h.size(-1), device=h.device)
    damps = torch.full_like(mean, damp)
    while float(damps.max()) < 1e4:
        lower, failed = torch.linalg.cholesky_ex(h + (damps * mean)[:, None, None] * eye)
        lower = torch.where((failed != 0)[:, None, None], eye, lower)
        upper, failed_inverse = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        bad = (failed != 0) | (failed_inverse != 0)
        if not bool(bad.any()):
            return upper
        log("gptq_damping", failed=int(bad.sum()), damp=float(damps[bad].max()), next=10 * float(damps[bad].max()))
        damps = torch.where(bad, 10 * damps, damps)
    raise LocalError("GPTQ: a Hessian is not positive definite at any damping: the weights or activations are broken")


SEGMENT = 64
"""Columns that one path through the trellis covers; each starts in state 0."""


class Trellis(NamedTuple):
    """Which codes may follow each other along a row (Ungerboeck's codes 5/2 and 13/4 in octal, of 4 and 8 states).

    A state allows the codes of its own parity, every second one. The next bit of the code picks the next state, so that
    a path can reach every code and entropy coding still pays for every second one only.
    """
    previous: Tensor
    """[S, 2] the states from which one comes to each state."""
    coset: Tensor
    """[S, 2] remainder by 4 of the codes that lead from there."""
    following: Tensor
    """[S, 2] the state after each state and second bit of a code."""

    @classmethod
    def of(cls, states: int, device: torch.device | str = "cpu") -> Trellis:
        """With 4 or 8 states; 1: plain rounding, every code may follow."""
        if states == 1:
            return cls(*(torch.zeros(1, n, dtype=torch.long, device=device) for n in (1, 1, 2)))
        first, second = {4: (0o5, 0o2), 8: (0o13, 0o4)}[states]
        state, bit = torch.arange(states).unsqueeze(1), torch.arange(2)
        following = (state >> 1) ^ (state & 1) * (first >> 1) ^ bit * (second >> 1)
        edges = following.flatten().argsort(stable=True).view(states, 2)
        return cls(*(t.to(device) for t in (edges // 2, edges % 2 * 2 + edges // 2 % 2, following)))

    @property
    def states(self) -> int:
        return len(self.previous)

    @property
    def density(self) -> int:
        """Codes to a step: only every second one is to be told apart."""
        return 2 if self.states > 1 else 1


def round_along(target: Tensor, upper: Tensor, lattice: Tensor, trellis: Trellis, top: int) -> Tensor:
    """Codes [..., B] of pieces of rows, each error fed forward; the path of least cost through the trellis (Viterbi).

    target: [..., B] values wanted; upper: [..., B, B] (broadcasts) factor of the columns; lattice: [..., B] value of
    the code 1. Every survivor carries its own fed-forward errors. With one state this is GPTQ's column loop.
    """
    states, came_from = trellis.states, trellis.previous.flatten()
    paths = target.unsqueeze(-2).repeat(*[1] * (target.dim() - 1), states, 1)  # codes up to j, targets from j on
    cost = torch.full(paths.shape[:-1], math.inf, device=target.device)
    cost[..., 0] = 0.0
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    weight = (lattice / diagonal).square()
    for j in range(target.size(-1)):
        wanted = (paths[..., j] / lattice[..., j, None]).clamp(-top, top)
        if states > 1:
            wanted = wanted.index_select(-1, came_from).unflatten(-1, (states, 2))
            codes = trellis.coset + 4 * ((wanted - trellis.coset) / 4).round()
            costs = cost.index_select(-1, came_from).unflatten(-1, (states, 2))
            cost, pick = torch.addcmul(costs, (wanted - codes).square(), weight[..., j, None, None]).min(-1, True)
            source = trellis.previous.expand(*pick.shape[:-1], 2).gather(-1, pick)
            paths, code, cost = paths.gather(-2, source.expand_as(paths)), codes.gather(-1, pick)[..., 0], cost[..., 0]
        else:
            code = wanted.round()
        error = (paths[..., j] - code * lattice[..., j, None]) / diagonal[..., j, None]
        paths[..., j + 1:] -= error.unsqueeze(-1) * upper[..., j, None, j + 1:]
        paths[..., j] = code
    best = cost.argmin(-1)[..., None, None]
    return paths.gather(-2, best.expand(*paths.shape[:-2], 1, target.size(-1))).squeeze(-2)


def gptq(weight_KRC: Tensor, inputs: Tensor, outputs: Tensor | None, row_KR: Tensor, column_KC: Tensor,
         trellis: Trellis, top: int) -> Tensor:
    """int16 codes [K, R, C], at most +-top, of a stack of matrices on the lattice of values row x column x code.

    inputs: [K, C, C] factor of the columns (`factorize`); outputs: [K, R, R] of the rows, or None: rows are rounded
    independently. With both, an error is fed forward along rows and columns, U and V at once: what remains to round at
    (r, c) is W - V^T E U there, E the errors so far over U_cc V_rr. Blocks on one anti-diagonal need nothing of each
    other and go together; the rest of the matrix is updated by products.
    """
    w, rows = weight_KRC.float().clone(), weight_KRC.size(1)
    lattice = row_KR.unsqueeze(-1) * column_KC.unsqueeze(1)
    codes = torch.empty_like(w)
    if outputs is None:
        for begin in range(0, w.size(-1), SEGMENT):
            part, rest = slice(begin, begin + SEGMENT), slice(begin + SEGMENT, None)
            upper = inputs[:, part, part]
            codes[..., part] = round_along(w[..., part], upper.unsqueeze(1), lattice[..., part], trellis, top)
            lost = w[..., part] - codes[..., part] * lattice[..., part]
            w[..., rest] -= torch.linalg.solve_triangular(upper, lost, upper=True, left=False) @ inputs[:, part, rest]
        return codes.to(torch.int16)
    ahead = torch.zeros_like(w)  # E U from the columns before
    row_parts = [slice(r, min(r + 16, rows)) for r in range(0, rows, 16)]
    column_parts = [slice(c, min(c + SEGMENT, w.size(-1))) for c in range(0, w.size(-1), SEGMENT)]
    waves: dict[tuple, list[tuple[slice, slice]]] = collections.defaultdict(list)
    for i, r in enumerate(row_parts):
        for j, c in enumerate(column_parts):  # the last ones may be smaller: only blocks of one size go together
            waves[i + j, r.stop - r.start, c.stop - c.start].append((r, c))
    for _, blocks in sorted(waves.items()):
        (target, before, delta), upper, lower = (
            [torch.stack([t[:, r, c] for r, c in blocks]) for t in (w, ahead, lattice)],
            torch.stack([inputs[:, c, c] for _, c in blocks]), torch.stack([outputs[:, r, r] for r, _ in blocks]))
        found, kept = torch.empty_like(target), torch.empty_like(target)
        for r in range(target.size(2)):
            scale = lower[:, :, r, r, None]
            wanted = target[:, :, r] - scale * before[:, :, r]
            found[:, :, r] = round_along(wanted, upper, delta[:, :, r], trellis, top)
            kept[:, :, r] = before[:, :, r] + (wanted - found[:, :, r] * delta[:, :, r]) / scale  # E U of this row
            target[:, :, r + 1:] -= lower[:, :, r, r + 1:, None] * kept[:, :, r, None]
        errors = torch.linalg.solve_triangular(upper, kept - before, upper=True, left=False)
        for (r, c), code, here, error in zip(blocks, found, kept, errors):
            codes[:, r, c] = code
            w[:, r.stop:, c] -= outputs[:, r, r.stop:].mT @ here
            ahead[:, r, c.stop:] += error @ inputs[:, c, c.stop:]
    return codes.to(torch.int16)


INPUT_OF = {"q": "qkv", "k": "qkv", "v": "qkv"}
"""Last part of a stored matrix's name -> the product of `Weights.linear` whose input it reads, where names differ."""


def hessian_key(name: str) -> tuple[str, int]:
    """(product, block) that recorded the input of a stored matrix: blocks.3.k -> (qkv, 3); tok_emb -> (head, 0)."""
    parts = name.split(".")
    return (INPUT_OF.get(parts[2], parts[2]), int(parts[1])) if parts[0] == "blocks" else ("head", 0)


class Calibration(NamedTuple):
    """Sums over the calibration tokens of all ranks, by product and block."""
    gram: dict[tuple[str, int], Tensor]
    """Mean of x x^T over inputs, all visits, [I, I]."""
    fisher: dict[tuple[str, int], Tensor]
    """Sum of g g^T over outputs, [O, O], of the head its diagonal [V]; targets are drawn from the model (the true
    Fisher information)."""
    input_gram: Tensor
    """Sum of g g^T at the embedding's output, [D, D]."""
    input_rows: Tensor
    """Sum of |g|^2 there by id, [V]."""


def calibrate(model: GPT, data: TrainData, first_row: int, cfg: Config, run: Run) -> Calibration:
    """Forward and backward over the calibration rows of all ranks, the loop on; everything in fp32 on the device."""
    rows = max(1, cfg.gptq_calibration_batches * cfg.micro_batch_tokens // cfg.train_seq_len)
    mine = range(first_row + run.rank, first_row + rows, run.world)
    model.requires_grad_(False)
    w, plan = RecordingWeights(model, run.dtype), layer_plan(cfg, looped=True)
    with run.progress(len(mine), "calibrate", "row") as bar:
        few = -(-data.micro_rows // 4)  # nothing is compiled here, so that activations take more room than in training
        for at in range(0, len(mine), few):
            part = mine[at:at + few]
            batch = make_batch([data.row(i) for i in part], len(part), cfg.train_seq_len).to(run.device)
            logits = w.linear("head", None, model.hidden(batch, plan, w).flatten(0, 1))
            with torch.no_grad():
                capped = cfg.logit_softcap * torch.tanh(logits.float() / cfg.logit_softcap)
                # Drawn by row, so that the number of ranks does not change what is drawn.
                uniform = np.stack([np.random.default_rng([cfg.seed, i]).random(cfg.train_seq_len) for i in part])
                drawn = torch.from_numpy(uniform.astype(np.float32)).to(run.device).view(-1, 1)
                # torch refuses cumsum where algorithms must be deterministic, as that of one long vector is not.
                set_deterministic(False)
                targets = (capped.softmax(-1).cumsum(-1) < drawn).sum(-1).clamp_max(cfg.vocab_size - 1)
                set_deterministic(cfg.deterministic)
            model.kernels.cross_entropy(logits, targets, cfg.logit_softcap).sum().backward()
            bar.update(len(part))
    model.requires_grad_(True)
    gram, fisher = {}, {}
    for key, matrix in w.matrices.items():  # a rank without rows still takes part
        outputs, inputs = matrix.shape
        shape = (outputs,) if key[0] == "head" else (outputs, outputs)
        count = run.total(torch.tensor(float(w.tokens[key]), device=run.device)).clamp_min(1)
        gram[key] = run.total(w.gram.get(key, matrix.new_zeros(inputs, inputs, dtype=torch.float32))) / count
        fisher[key] = run.total(w.fisher.get(key, matrix.new_zeros(shape, dtype=torch.float32)))
    return Calibration(gram, fisher, run.total(w.input_gram), run.total(w.input_rows))


def waterfill_steps(cost_KR: Tensor, scale_KC: Tensor, softness: float) -> tuple[Tensor, Tensor]:
    """(row steps [K, R], column steps [K, C]) at which every matrix loses equally much to rounding.

    An error e in row r and column c costs cost_r (e / scale_c)^2. Reverse water-filling (Cover and Thomas, 10.3.3)
    wants step ~ cost^-1/2 scale; the rows' exponent is softened, as their cost is an estimate from few tokens.
    """
    cost = cost_KR + 0.01 * cost_KR.mean(-1, keepdim=True).clamp_min(1e-30)
    row = torch.exp(-0.5 * softness * (cost.log() - cost.log().mean(-1, keepdim=True)))
    level = (cost * row.square()).mean(-1, keepdim=True)  # columns: scale^2 / scale^2
    return row / level.sqrt(), scale_KC


def sdclip_steps(weights: Tensor, bits: int, sigmas: float) -> Tensor:
    """int8 step codes [..., R] of rows [..., R, C]; the largest code of so many bits stands for `sigmas` deviations."""
    # A row of nearly one value has almost no spread: its step must still reach its values.
    largest = torch.maximum(sigmas * weights.std(dim=-1), weights.square().mean(-1).sqrt())
    return step_codes(largest / (2 ** (bits - 1) - 1), ROW_OFFSET)


def on_lattice(weights: Tensor, bits: int, sigmas: float) -> tuple[Tensor, Tensor]:
    """(`weights` rounded to SDClip's codes, step codes of their rows)."""
    rows, top = sdclip_steps(weights, bits, sigmas), 2 ** (bits - 1) - 1
    steps = row_steps(rows, 1.0).unsqueeze(-1)
    return (weights / steps).round().clamp(-top, top) * steps, rows


def bank_grids(model: GPT, cfg: Config) -> dict[str, tuple[int, float]]:
    """(bits, clip) of the codes of every bank."""
    routes = {name: route(name) for name, _ in model.named_parameters()}
    return {name: cfg.grid(row.stored.removeprefix("gptq:")) for name, row in routes.items() if row.rule == "muon"}


class RoundedWeights(Weights):
    """Plain weights whose banks are read as the artifact will hold them; gradients pass straight through (QAT).

    The straight-through estimator of Bengio et al. 2013. Steps are SDClip's of the current weights.
    """

    def __init__(self, grids: Mapping[str, tuple[int, float]], model: GPT, dtype: torch.dtype) -> None:
        self.grids = grids
        super().__init__(model, dtype)

    def cast(self, name: str, bank: Tensor) -> Tensor:
        return (on_lattice(bank.detach(), *self.grids[name])[0] + (bank - bank.detach())).to(self.dtype)


@torch.no_grad()
def settle(model: GPT, cfg: Config) -> None:
    """Move the banks to what `RoundedWeights` reads of them; GPTQ will find them on its lattice."""
    grids = bank_grids(model, cfg)
    for name, values, parameter in model.tensors():
        if parameter in grids:
            rounded, model.lattice[name] = on_lattice(values, *grids[parameter])
            values.copy_(rounded)


@contextlib.contextmanager
def settled(model: GPT, cfg: Config) -> Iterator[None]:
    """`settle` for a while."""
    kept = [p.detach().clone() for p in model.parameters()]
    settle(model, cfg)
    yield
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), kept)


class Stack(NamedTuple):
    """Matrices of one shape and family, ready for GPTQ."""
    stored: str
    names: list[str]
    order: Tensor
    """[K, C] order in which the columns are rounded."""
    weights: Tensor
    """[K, R, C] fp32, columns in that order."""
    inputs: Tensor
    """[K, C, C] factor of the columns."""
    outputs: Tensor | None
    """[K, R, R] factor of the rows; None: errors are not fed forward along them."""
    rows: Tensor
    """[K, R] int8 step codes."""
    columns: Tensor
    """[K, C] int8 step codes."""
    top: int
    """Largest code."""


class Quantizer:
    """Turns the model's tensors into codes, as often as the packer asks; what costs time is kept between calls."""

    def __init__(self, model: GPT, sums: Calibration, cfg: Config, run: Run) -> None:
        self.model, self.sums, self.cfg, self.run = model, sums, cfg, run
        self.trellis = Trellis.of(cfg.trellis_states if cfg.quant == "waterfill" else 1, run.device)
        jobs: dict[tuple, list[tuple[str, Tensor]]] = collections.defaultdict(list)
        fewer = self._fewer_bits()
        self.plain: dict[str, Quantized] = {}
        for name, values, parameter in model.tensors():
            stored, values = route(parameter).stored, values.float()
            if stored.startswith("gptq:"):
                jobs[values.shape, stored, name in fewer].append((name, values))
            elif stored == "int8":
                rows = step_codes(values.abs().amax(-1) / 127, ROW_OFFSET, up=True)
                codes = (values / row_steps(rows, 1.0).unsqueeze(-1)).round().clamp(-127, 127)
                self.plain[name] = Quantized(stored, codes.to(torch.int16).cpu(), rows.cpu())
            else:
                self.plain[name] = Quantized(stored, values.half().cpu())
        # Zeros cost next to nothing: a hashed table's rows that no text has met are no reason for finer steps.
        self.weights = max(1, sum(int(values.count_nonzero()) for matrices in jobs.values() for _, values in matrices))
        self.stacks = []
        for (_, stored, less), matrices in jobs.items():
            mine = matrices[run.rank::run.world]
            if mine:
                self.stacks.append(self._prepare(stored, mine, int(less)))

    def _fewer_bits(self) -> set[str]:
        """Names of the matrices that N_INT6_LAYERS leaves with one bit less."""
        names = [name for name, _, p in self.model.tensors() if route(p).stored in ("gptq:attn", "gptq:mlp")]
        ranked = sorted(names, key=lambda name: -float(self.sums.gram[hessian_key(name)].trace()))
        return set(ranked[self.cfg.n_int6_layers:]) if self.cfg.n_int6_layers else set()

    def _prepare(self, stored: str, matrices: Sequence[tuple[str, Tensor]], less: int = 0) -> Stack:
        """Factors and step codes of matrices (name, values) of equal shape; `less` bits than the knobs say (SDClip)."""
        names, weights = [name for name, _ in matrices], torch.stack([values for _, values in matrices])
        grams, fishers = map(torch.stack, zip(*(self._cost(name) for name in names)))
        energy = grams.diagonal(dim1=-2, dim2=-1)
        weights = weights.masked_fill((energy == 0).unsqueeze(1), 0.0)  # inputs never seen
        # Costly columns first, while the others can still make up for them: with SDClip's equal steps that is worth a
        # fifth of the damage, with water-filled ones nothing (bench/LOG.md 2026-11-22). A trellis keeps their order.
        natural = torch.arange(energy.size(-1), device=energy.device).expand_as(energy)
        order = energy.argsort(dim=-1, descending=True, stable=True) if self.cfg.quant == "sdclip" else natural
        weights = weights.gather(2, order.unsqueeze(1).expand_as(weights))
        grams = grams.gather(1, order.unsqueeze(2).expand_as(grams)).gather(2, order.unsqueeze(1).expand_as(grams))
        damp, outputs = self.cfg.gptq_damp, None
        inputs = factorize(grams, damp, self.run.log)
        if self.cfg.quant == "waterfill":
            costs = fishers if fishers.dim() == 2 else fishers.diagonal(dim1=-2, dim2=-1)
            if self.cfg.gptq_two_sided and fishers.dim() == 3:
                outputs = factorize(fishers, damp, self.run.log)
                costs = outputs.diagonal(dim1=-2, dim2=-1).square().reciprocal()
            steps = waterfill_steps(costs, inputs.diagonal(dim1=-2, dim2=-1), self.cfg.row_softness)
            # The geometric mean goes to the rows, so that columns lie around code 0.
            middle = steps[1].log().mean(-1, keepdim=True).exp()
            rows, columns = step_codes(steps[0] * middle, ROW_OFFSET), step_codes(steps[1] / middle, 0)
            return Stack(stored, names, order, weights, inputs, outputs, rows, columns, 2 ** 15 - 4)  # cosets add 2
        bits, sigmas = self.cfg.grid(stored.removeprefix("gptq:"))
        columns = torch.zeros(len(names), weights.size(-1), dtype=torch.int8, device=weights.device)
        settled, bits = [self.model.lattice[name] for name in names if name in self.model.lattice], bits - less
        rows = torch.stack(settled) if settled else sdclip_steps(weights, bits, sigmas)
        return Stack(stored, names, order, weights, inputs, outputs, rows, columns, 2 ** (bits - 1) - 1)

    def _cost(self, name: str) -> tuple[Tensor, Tensor]:
        """(Hessian [C, C], Fisher information [R, R] or its diagonal [R]) of an error in a stored matrix."""
        sums, (product, block) = self.sums, hessian_key(name)
        gram, fisher = sums.gram[product, block], sums.fisher[product, block]
        if product == "head":  # the embedding is read at both ends: mix the costs of both uses
            out, into = fisher * gram.trace(), sums.input_rows
            total = out.sum() + into.sum()
            mixed = gram / gram.trace().clamp_min(1e-30) * out.sum() + \
                sums.input_gram / sums.input_gram.trace().clamp_min(1e-30) * into.sum()
            return mixed / total.clamp_min(1e-30), out + into
        part, kv = name.split(".")[-1], self.model.cfg.num_kv_heads * self.model.cfg.head_dim
        if product == "qkv":
            begin = {"q": 0, "k": len(fisher) - 2 * kv, "v": len(fisher) - kv}[part]
            mine = slice(begin, len(fisher) - 2 * kv if part == "q" else begin + kv)
            return gram, fisher[mine, mine]
        scales = {"o": self.model.attn_scale, "down": self.model.mlp_scale}.get(product)
        if scales is None:
            return gram, fisher
        scale = scales[block].detach()
        return gram, fisher * scale.unsqueeze(1) * scale

    def bits(self, unit: float) -> float:
        """Bits of `nearest`'s codes by their entropy, matrix by matrix."""
        total = torch.zeros((), dtype=torch.float64, device=self.run.device)
        for stack in self.stacks:
            for matrix in self.nearest(stack, unit).int():
                counts = torch.bincount(matrix.flatten() + stack.top).double()
                total -= (counts * (counts / matrix.numel()).clamp_min(1e-30).log2()).sum()
        return float(self.run.total(total))

    def nearest(self, stack: Stack, unit: float) -> Tensor:
        """int16 codes by rounding alone, at the steps between codes of one parity: about as large to pack as GPTQ's."""
        steps = row_steps(stack.rows, unit * self.trellis.density).unsqueeze(-1) * \
            column_steps(stack.columns).unsqueeze(1)
        return (stack.weights / steps).round_().clamp_(-stack.top, stack.top).to(torch.int16)

    def solved(self, stack: Stack, unit: float) -> Tensor:
        """int16 codes by GPTQ."""
        codes = gptq(stack.weights, stack.inputs, stack.outputs, row_steps(stack.rows, unit),
                     column_steps(stack.columns), self.trellis, stack.top)
        return codes.gather(2, stack.order.argsort(-1).unsqueeze(1).expand_as(codes))

    def octaves_for(self, bits: float) -> float:
        """log2 of the unit at which the codes take so many bits in all, by `bits`."""
        logs = torch.zeros((), dtype=torch.float64, device=self.run.device)
        for _, _, _, weights, _, _, rows, columns, _ in self.stacks:
            least = 1e-3 * weights.square().mean((1, 2), keepdim=True).sqrt() + 1e-30
            steps = row_steps(rows, float(self.trellis.density))
            ratios = weights.abs().clamp_min(least).log2() - steps.log2().unsqueeze(-1) - \
                column_steps(columns).log2().unsqueeze(1)
            logs += ratios.masked_fill(weights == 0, 0.0).sum(dtype=torch.float64)
        # Gaussian codes of deviation s: log2 s + 2.05 bits, and the mean of log2 |code| is log2 s - 0.92.
        guess = float(self.run.total(logs)) / self.weights + 2.97 - bits / self.weights
        low, high = guess - 3, guess + 6
        for _ in range(16):
            middle = (low + high) / 2
            low, high = (middle, high) if self.bits(2.0 ** middle) > bits else (low, middle)
        return high

    @torch.no_grad()
    def quantize(self, unit: float, rounding: Callable[[Stack, float], Tensor] | None = None) -> dict[str, Quantized]:
        """Every tensor as it will be stored, on rank 0; each rank does its share of the matrices.

        `rounding`: `solved` (None) or `nearest`.
        """
        own: dict[str, Quantized] = {}
        for stack in self.stacks:
            parts = (rounding or self.solved)(stack, unit).cpu(), stack.rows.cpu(), stack.columns.cpu()
            own.update({name: Quantized(stack.stored, *of) for name, *of in zip(stack.names, *parts)})
        done = dict(self.plain)
        for part in self.run.collect(own):
            done.update(part)
        return {name: done[name] for name, _, _ in self.model.tensors() if self.run.is_main}


# ----------------------------------------------------------------------------------------------------
# 10 Artifact: tensors <-> bytes, code bytes, fit to the cap
# ----------------------------------------------------------------------------------------------------
# Layout: magic, version, length of the header; the header (JSON, Brotli): model knobs, unit of the codes, states of the
# trellis, tensors in order, streams with coder, raw and packed length; the packed streams; BLAKE2b-128 of all before
# it. Codes of one family share a stream, coded by `range_pack` or by Brotli; the rest is Brotli's. No pickle: a reader
# checks digest, bounds and sizes before it allocates. Rank 0 writes, everyone scores what was read back.
# Safe to change: the coder of a stream, with a new format version.

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGOLF", 3
ARTIFACT_HEAD = struct.Struct("<5sBI")
DIGEST_BYTES = 16
MAX_HEADER_BYTES, MAX_RAW_BYTES = 1 << 20, 1 << 28
OCTAL = frozenset(bytes([digit]) for digit in b"01234567")
WRAPPER_MARK = b"#coding:latin-1\n#packed\n"


def brotli_pack(data: bytes) -> bytes:
    """Brotli at quality 11 with the largest window."""
    import brotli
    return brotli.compress(data, quality=11, lgwin=24)


def brotli_unpack(data: bytes, size: int) -> bytes:
    """Exactly `size` bytes; `UserError` for a damaged stream, and before more than that is allocated."""
    import brotli
    reader, out = brotli.Decompressor(), bytearray()
    try:
        out += reader.process(data, output_buffer_limit=size + 1)
        while not reader.is_finished() and len(out) <= size:
            more = reader.process(b"", output_buffer_limit=size + 1 - len(out))
            require(bool(more), "a stream is truncated")
            out += more
    except brotli.error:
        raise UserError("a stream is damaged") from None
    require(len(out) == size and reader.is_finished(), f"a stream does not hold the {size} bytes it claims")
    return bytes(out)


def stream_parts(stored: str, shape: Sequence[int]) -> list[tuple[str, int]]:
    """(stream, raw bytes) that one tensor contributes, in the order in which they are written."""
    count, rows = math.prod(shape), math.prod(shape[:-1])
    if stored == "fp16":
        return [("fp16", 2 * count)]
    if stored == "int8":
        return [("int8", count), ("steps", rows)]
    return [(stored, 2 * count), ("steps", rows + shape[-1])]


def split_bytes(halves: bytes) -> bytes:
    """High bytes of little-endian 16-bit numbers, then their low bytes: the former repeat, the latter do not."""
    return halves[1::2] + halves[::2]


def join_bytes(data: bytes) -> bytes:
    """Inverse of `split_bytes`."""
    out = bytearray(len(data))
    out[1::2], out[::2] = data[:len(data) // 2], data[len(data) // 2:]
    return bytes(out)


def zigzag(codes: np.ndarray) -> np.ndarray:
    """0, -1, 1, -2, ... -> 0, 1, 2, 3, ...: int16 -> uint16 of the same shape."""
    return ((codes.astype(np.int32) << 1) ^ (codes.astype(np.int32) >> 31)).astype("<u2")


def unzigzag(values: np.ndarray) -> np.ndarray:
    """Inverse of `zigzag`."""
    return ((values.astype(np.int32) >> 1) ^ -(values.astype(np.int32) & 1)).astype(np.int16)


def to_lanes(matrices: Sequence[np.ndarray], fill: int, states: int) -> np.ndarray:
    """Matrices [R, C] as [T, lanes]: each lane is one path through the trellis, or one entry where there is none."""
    if states == 1:
        return np.concatenate([matrix.reshape(-1) for matrix in matrices])[None]
    padded = [np.pad(m, ((0, 0), (0, -m.shape[1] % SEGMENT)), constant_values=fill) for m in matrices]
    return np.ascontiguousarray(np.concatenate([m.reshape(-1, SEGMENT) for m in padded]).T)


def from_lanes(lanes: np.ndarray, shapes: Sequence[Sequence[int]], states: int) -> list[np.ndarray]:
    """Inverse of `to_lanes`."""
    widths = [cols + (-cols % SEGMENT if states > 1 else 0) for _, cols in shapes]
    ends = np.cumsum([rows * width for (rows, _), width in zip(shapes, widths)])
    parts = np.split(lanes.T.reshape(-1), ends[:-1])
    return [part.reshape(rows, width)[:, :cols] for part, (rows, cols), width in zip(parts, shapes, widths)]


class Walk:
    """Paths through the trellis, one a lane, as a decoder takes them. A code is density * symbol + the parity."""

    def __init__(self, lanes: int, states: int) -> None:
        self.following, self.state = Trellis.of(states).following.numpy().astype(np.int8), np.zeros(lanes, np.int8)
        self.density = Trellis.of(states).density

    def parity(self) -> np.ndarray:
        """[lanes] int8 parity of the next codes; 0 without a trellis."""
        return self.state & 1

    def codes(self, symbols: np.ndarray) -> np.ndarray:
        """[lanes] int16 codes of these symbols; takes the step."""
        found = (self.density * symbols.astype(np.int32) + self.parity()).astype(np.int16)
        self.state = self.following[self.state, symbols & 1]
        return found


def symbols_of(codes: np.ndarray, states: int) -> np.ndarray:
    """What is left to say of codes where the parity is known."""
    return codes >> 1 if states > 1 else codes


ESCAPE = 127
"""Symbol of a code that has none of its own; the code follows in a side stream."""
LEAST_IN_CLASS = 2048
"""Codes of a class with a histogram of its own (or one for each parity); smaller classes join the nearest."""
NO_CLASS = -2 ** 15
"""Class of what only fills a lane."""


def magnitudes(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int8 logs (4 to the octave) of the mean |code| of each row, of each column and of all of a matrix [R, C]."""
    size = np.abs(codes.astype(np.float64))
    return tuple(np.clip(np.rint(4 * np.log2(np.asarray(mean) + 1 / 64)), -128, 127).astype(np.int8).reshape(-1)
                 for mean in (size.mean(1), size.mean(0), size.mean()))


def classes_of(logs: bytes, shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """[R, C] int16 class of every code of each matrix: the magnitude that its row and its column let expect."""
    found, at = [], 0
    values = np.frombuffer(logs, dtype=np.int8).astype(np.int16)
    for rows, cols in shapes:
        r, c, (mean,) = np.split(values[at:at + rows + cols + 1], [rows, rows + cols])
        found.append(r[:, None] + c - mean)
        at += rows + cols + 1
    return found


def join_classes(classes: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """int16 index into the ascending `kept` classes of the nearest one, the lower of two; len(kept) for NO_CLASS."""
    every = np.arange(-2 ** 9, 2 ** 9)
    above = np.searchsorted(kept, every).clip(0, len(kept) - 1)
    below = (above - 1).clip(0)
    nearest = np.where(np.abs(kept[below] - every) <= np.abs(kept[above] - every), below, above)
    return np.where(classes == NO_CLASS, len(kept), nearest[classes.clip(-2 ** 9) + 2 ** 9]).astype(np.int16)


def contexts_of(joined: np.ndarray, walk: Walk, num_kept: int) -> tuple[np.ndarray, np.ndarray]:
    """(order of the lanes by context, number of lanes of each context and of those that only fill)."""
    contexts = np.minimum(joined * walk.density + walk.parity(), num_kept * walk.density)
    return np.argsort(contexts, kind="stable"), np.bincount(contexts, minlength=num_kept * walk.density + 1)


def range_pack(matrices: Sequence[np.ndarray], states: int) -> bytes:
    """int16 matrices [R, C] by a range coder with one histogram for each class of expected magnitude (and parity).

    Rows' and columns' mean magnitudes travel as side information; histograms are integers, so that both ends compute
    with the same numbers on any machine. Entropy coding as in Deflate's or zstd's static models, over better classes.
    Along the trellis the paths go abreast: one turn codes the next symbol of every lane.
    """
    import constriction
    logs = b"".join(part.tobytes() for matrix in matrices for part in magnitudes(matrix))
    classes = to_lanes(classes_of(logs, [matrix.shape for matrix in matrices]), NO_CLASS, states)
    present, counts = np.unique(classes[classes != NO_CLASS], return_counts=True)
    enough = counts >= LEAST_IN_CLASS
    kept = present[enough] if enough.any() else present[counts.argmax()][None]
    joined = join_classes(classes, kept)
    symbols = symbols_of(to_lanes(matrices, 0, states), states)
    walk = Walk(symbols.shape[1], states)
    turns, tables = [], np.zeros((len(kept) * walk.density, ESCAPE + 1), dtype=np.int64)
    for some, line in zip(symbols, joined):
        order, sizes = contexts_of(line, walk, len(kept))
        flat = zigzag(some[order])
        turns.append((flat, sizes))
        owner = np.repeat(np.arange(len(tables) + 1), sizes)
        both = owner * (ESCAPE + 1) + np.minimum(flat, ESCAPE)
        tables += np.bincount(both, minlength=(len(tables) + 1) * (ESCAPE + 1)).reshape(-1, ESCAPE + 1)[:-1]
        walk.codes(some)
    top = tables.max(axis=1, keepdims=True).clip(1)
    tables = np.where(tables, np.maximum(1, tables * 65535 // top), 0).astype("<u2")
    models = [histogram(table) if np.count_nonzero(table) > 1 else None for table in tables]
    coder, escaped = constriction.stream.queue.RangeEncoder(), []
    for flat, sizes in turns:
        for model, part in zip(models, np.split(np.minimum(flat, ESCAPE).astype(np.int32), np.cumsum(sizes)[:-1])):
            if model is not None and len(part):
                coder.encode(part, model)
        used = flat[:len(flat) - sizes[-1]]
        escaped.append(used[used >= ESCAPE])
    escapes = np.concatenate(escaped)
    parts = [brotli_pack(logs), brotli_pack(kept.astype("<i2").tobytes()), brotli_pack(split_bytes(tables.tobytes())),
             brotli_pack(escapes.astype("<u2").tobytes()), coder.get_compressed().astype("<u4").tobytes()]
    return struct.pack("<7I", *(len(part) for part in parts[:4]), len(kept), len(escapes), len(parts[4])) + \
        b"".join(parts)


def histogram(table: np.ndarray) -> Any:
    """The entropy model of one class: its symbols' stored counts."""
    import constriction
    counts = table.astype(np.float64)
    return constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)


def range_unpack(data: bytes, shapes: Sequence[Sequence[int]], states: int) -> list[np.ndarray]:
    """Inverse of `range_pack`, given the matrices' shapes; `UserError` for anything it could not have written."""
    try:
        import constriction
    except ImportError:
        raise UserError("its codes need the package constriction; pip install -r requirements.txt") from None
    head = struct.calcsize("<7I")
    require(len(data) >= head, "a range-coded stream is truncated")
    *lengths, num_kept, num_escaped, num_words = struct.unpack_from("<7I", data)
    total = sum(rows * cols for rows, cols in shapes)
    require(head + sum(lengths) + num_words == len(data) and num_words % 4 == 0 and 0 < num_kept <= 1024
            and num_escaped <= total, "a range-coded stream does not fit its lengths")
    edges = np.cumsum([head, *lengths])
    num_tables = num_kept * Trellis.of(states).density
    raw = [brotli_unpack(data[a:b], size) for a, b, size in zip(edges, edges[1:], (
        sum(rows + cols + 1 for rows, cols in shapes), 2 * num_kept, 2 * num_tables * (ESCAPE + 1), 2 * num_escaped))]
    kept = np.frombuffer(raw[1], dtype="<i2").astype(np.int64)
    require(bool((np.diff(kept) > 0).all()), "the classes of a range-coded stream are not ascending")
    joined = join_classes(to_lanes(classes_of(raw[0], shapes), NO_CLASS, states), kept)
    tables = np.frombuffer(join_bytes(raw[2]), dtype="<u2").reshape(num_tables, ESCAPE + 1)
    used = [np.flatnonzero(table) for table in tables]
    models = [histogram(table) if len(symbols) > 1 else None for table, symbols in zip(tables, used)]
    escapes, taken = np.frombuffer(raw[3], dtype="<u2"), 0
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(data[edges[-1]:], dtype="<u4").astype(np.uint32))
    lanes, walk = np.empty(joined.shape, dtype=np.int16), Walk(joined.shape[1], states)
    for turn, line in enumerate(joined):
        order, sizes = contexts_of(line, walk, num_kept)
        parts = []
        for model, symbols, count in zip(models, used, sizes[:-1].tolist()):
            require(len(symbols) > 0 or count == 0, "a class of codes has no histogram")
            if model is None or not count:
                parts.append(np.full(count, symbols[0] if len(symbols) else 0, dtype=np.int32))
                continue
            try:
                parts.append(decoder.decode(model, count))
            except (AssertionError, ValueError) as error:  # what the package raises for bytes nobody encoded
                raise UserError("a range-coded stream is damaged") from error
        flat = np.concatenate([*parts, np.zeros(sizes[-1], dtype=np.int32)])
        large = flat == ESCAPE
        taken, before = taken + int(large.sum()), taken
        require(taken <= num_escaped, "a range-coded stream has the wrong number of large codes")
        flat[large] = escapes[before:taken]
        some = np.empty(len(flat), dtype=np.int16)
        some[order] = unzigzag(flat)
        lanes[turn] = walk.codes(some)
    require(taken == num_escaped, "a range-coded stream has the wrong number of large codes")
    return from_lanes(lanes, shapes, states)


def brotli_codes(matrices: Sequence[np.ndarray], states: int) -> bytes:
    """int16 matrices by Brotli: transposed (columns first), zigzag, high bytes before low bytes."""
    flat = np.concatenate([zigzag(symbols_of(matrix, states).T.reshape(-1)) for matrix in matrices])
    return brotli_pack(split_bytes(flat.tobytes()))


def brotli_uncodes(data: bytes, shapes: Sequence[Sequence[int]], states: int) -> list[np.ndarray]:
    """Inverse of `brotli_codes`."""
    sizes = [rows * cols for rows, cols in shapes]
    flat = unzigzag(np.frombuffer(join_bytes(brotli_unpack(data, 2 * sum(sizes))), dtype="<u2"))
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    lanes = to_lanes([part.reshape(cols, rows).T for part, (rows, cols) in zip(parts, shapes)], 0, states)
    walk = Walk(lanes.shape[1], states)
    return from_lanes(np.stack([walk.codes(line) for line in lanes]), shapes, states)


CODERS: dict[str, tuple[Callable[[Sequence[np.ndarray], int], bytes], Callable[..., list[np.ndarray]]]] = {
    "range": (range_pack, range_unpack), "brotli": (brotli_codes, brotli_uncodes)}
"""How the codes of GPTQ's matrices are packed, and read again."""


TRY_BROTLI = 1 << 20
"""Codes of a stream that Brotli is also tried on (it takes 4 s a million): it finds the like rows of unused ids."""


def pick_codec(wanted: str) -> str:
    """auto, range or brotli; `UserError` if the wanted one is not installed."""
    if wanted == "brotli":
        return wanted
    try:
        import constriction  # noqa: F401
    except ImportError:
        require(wanted == "auto", "CODEC=range: the package constriction is missing; pip install -r requirements.txt")
        return "brotli"
    return wanted


packed_once = functools.lru_cache(maxsize=4)(brotli_pack)
"""For the streams without codes, which stay as they are while `fit_to_cap` looks for a unit."""


def pack_codes(matrices: Sequence[np.ndarray], states: int, codec: str) -> tuple[str, bytes]:
    """(coder, packed codes) of one stream; auto: of small streams whatever is smaller."""
    small = sum(matrix.size for matrix in matrices) <= TRY_BROTLI
    names = [codec] if codec != "auto" else ["range", "brotli"] if small else ["range"]
    return min(((name, CODERS[name][0](matrices, states)) for name in names), key=lambda found: len(found[1]))


def pack(tensors: Mapping[str, Quantized], unit: float, states: int, codec: str, model: ModelKnobs, preset: str,
         illegal: str = "") -> bytes:
    """The artifact's bytes; `states` of the trellis; `illegal` says which rule its making broke ("": none)."""
    raw: dict[str, bytearray] = collections.defaultdict(bytearray)
    matrices: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for q in tensors.values():
        if q.rows is None:
            raw["fp16"] += q.codes.numpy().astype("<f2").tobytes()
            continue
        raw["steps"] += q.rows.numpy().tobytes()
        if q.columns is None:
            raw["int8"] += q.codes.reshape(-1, q.codes.size(-1)).T.contiguous().numpy().astype(np.int8).tobytes()
        else:
            raw["steps"] += q.columns.numpy().tobytes()
            matrices[q.stored].append(q.codes.numpy())
    streams = [(name, "brotli", len(data), packed_once(split_bytes(bytes(data)) if name == "fp16" else bytes(data)))
               for name, data in raw.items()]
    # In threads: both coders leave the interpreter's lock while they work.
    with ThreadPoolExecutor() as pool:
        packed_codes = pool.map(lambda stack: pack_codes(stack, states, codec), matrices.values())
        streams += [(name, coder, sum(2 * m.size for m in stack), data)
                    for (name, stack), (coder, data) in zip(matrices.items(), packed_codes)]
    header = json.dumps({
        "preset": preset, "illegal": illegal, "unit": unit, "trellis": states,
        "model": {f.name: getattr(model, f.name) for f in dataclasses.fields(ModelKnobs)},
        "tensors": [[name, q.stored, list(q.codes.shape)] for name, q in tensors.items()],
        "streams": [[name, coder, size, len(packed)] for name, coder, size, packed in streams]}, separators=(",", ":"))
    head = struct.pack("<I", len(header)) + brotli_pack(header.encode())
    body = ARTIFACT_HEAD.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(head)) + head + \
        b"".join(packed for _, _, _, packed in streams)
    return body + hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()


def header_of(blob: bytes) -> Any:
    """The header of an artifact, as its JSON says it; `UserError` where its length is not plausible."""
    at, head_bytes = ARTIFACT_HEAD.size, ARTIFACT_HEAD.unpack_from(blob)[2]
    require(4 < head_bytes <= len(blob) - DIGEST_BYTES - at, "the header is longer than the file")
    (header_bytes,) = struct.unpack_from("<I", blob, at)
    require(header_bytes <= MAX_HEADER_BYTES, f"a header of {header_bytes} bytes is not plausible")
    return json.loads(brotli_unpack(blob[at + 4:at + head_bytes], header_bytes))


def code_bytes_of(blob: bytes) -> int:
    """Bytes that the codes take in an artifact of ours."""
    return sum(size for name, _, _, size in header_of(blob)["streams"] if name.startswith("gptq:"))


class Artifact(NamedTuple):
    """What an artifact holds."""
    model: ModelKnobs
    preset: str
    illegal: str
    """Which rule its making broke; empty: none."""
    tensors: dict[str, Tensor]
    """Stored name -> fp32 values."""
    streams: dict[str, Stream]


def code_entropy(codes: np.ndarray, states: int) -> float:
    """Bits of a matrix's int16 codes by their histogram; where a trellis tells the parity, it is known."""
    bits = 0.0
    for some in (codes[codes & 1 == 0], codes[codes & 1 == 1]) if states > 1 else (codes,):
        counts = np.bincount(some.reshape(-1).astype(np.int64) + 2 ** 15).astype(np.float64)
        bits -= float((counts * np.log2(counts.clip(1) / max(1, some.size))).sum())
    return bits


class Stream(NamedTuple):
    """What one stream of an artifact takes."""
    values: int
    packed: int
    """Bytes."""
    entropy: float
    """Bits of its codes by their histogram, matrix by matrix; 0 for streams that are no codes."""


def size_table(artifact: Artifact, weight_bytes: int, code_bytes: int) -> list[str]:
    """Lines: bytes by stream, bits a value, the codes' entropy, what header and code take."""
    lines = [f"  {'stream':12s} {'values':>12s} {'bytes':>12s} {'bits each':>10s} {'entropy':>8s}"]
    for name, (values, packed, entropy) in artifact.streams.items():
        ideal = f"{entropy / values:8.3f}" if entropy else f"{'-':>8s}"
        lines.append(f"  {name:12s} {values:12,} {packed:12,} {8 * packed / values:10.3f} {ideal}")
    rest = {"header": weight_bytes - sum(stream.packed for stream in artifact.streams.values()), "code": code_bytes,
            "all": weight_bytes + code_bytes}
    return lines + [f"  {name:12s} {'':12s} {size:12,}" for name, size in rest.items()]


def unpack(blob: bytes, source: str = "artifact") -> Artifact:
    """Read an artifact. Raises `UserError`, one line, for anything but bytes that `pack` could have written."""
    try:
        return read_artifact(blob)
    except UserError as error:
        raise UserError(f"{source}: {one_line(error)}") from None


def read_artifact(blob: bytes) -> Artifact:
    """`unpack` without the file's name in its errors."""
    fixed = ARTIFACT_HEAD.size
    require(len(blob) > fixed + 4 + DIGEST_BYTES and blob[:len(ARTIFACT_MAGIC)] == ARTIFACT_MAGIC,
            "not an artifact of this program")
    _, version, head_bytes = ARTIFACT_HEAD.unpack_from(blob)
    require(version == ARTIFACT_VERSION, f"format version {version}, this program reads {ARTIFACT_VERSION}")
    body = memoryview(blob)[:-DIGEST_BYTES]
    require(hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest() == blob[-DIGEST_BYTES:],
            "truncated or damaged (the checksum does not fit); copy it again")
    try:
        header = header_of(blob)
        types = typing.get_type_hints(ModelKnobs)
        require(all(type(value) is types[name] for name, value in dict(header["model"]).items()),
                "a knob in the header has a value that is none of its kind")
        model = ModelKnobs(**header["model"])
        expected = [[name, route(parameter).stored, list(values.shape)]
                    for name, values, parameter in shapes_of(model).tensors()]
        preset, illegal = str(header["preset"]), str(header["illegal"])
        listed = [(str(n), str(coder), int(raw), int(size)) for n, coder, raw, size in header["streams"]]
        unit, states = float(header["unit"]), header["trellis"]
        require(type(states) is int and states in (1, 4, 8), f"a trellis of {states!r} states is not known")
        require(1e-12 < unit < 1e12, f"a unit of {unit:g} for its steps is not plausible")
        require(header["tensors"] == expected, "its tensors are not those of its model")
    except (ArithmeticError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"the header cannot be read ({type(error).__name__})") from None
    need: dict[str, int] = collections.defaultdict(int)
    for _, stored, shape in expected:
        for stream, size in stream_parts(stored, shape):
            need[stream] += size
    require({name: raw for name, _, raw, _ in listed} == dict(need) and len(listed) == len(need)
            and all(coder in CODERS and (coder == "brotli" or name.startswith("gptq:")) for name, coder, _, _ in listed)
            and fixed + head_bytes + sum(size for *_, size in listed) == len(body),
            "its streams do not fit its tensors")
    padded = sum(math.prod(shape[:-1]) * (shape[-1] + SEGMENT) for _, _, shape in expected if shape)
    require(max(padded, sum(need.values())) <= MAX_RAW_BYTES,
            f"{sum(need.values()):,} bytes of tensors is not plausible")
    raw, matrices, at = {}, {}, fixed + head_bytes
    for name, coder, length, size in listed:
        data, at = bytes(body[at:at + size]), at + size
        if name.startswith("gptq:"):
            shapes = [shape for _, stored, shape in expected if stored == name]
            matrices[name] = iter(CODERS[coder][1](data, shapes, states))
        else:
            data = brotli_unpack(data, length)
            raw[name] = io.BytesIO(join_bytes(data) if name == "fp16" else data)
    tensors, entropy = {}, collections.Counter()
    for name, stored, shape in expected:
        if stored == "fp16":
            halves = np.frombuffer(raw["fp16"].read(2 * math.prod(shape)), dtype="<f2").reshape(shape)
            quantized = Quantized(stored, torch.from_numpy(halves.copy()))
        else:
            rows = np.frombuffer(raw["steps"].read(math.prod(shape[:-1])), dtype=np.int8).reshape(shape[:-1])
            columns = None
            if stored == "int8":
                codes = np.frombuffer(raw["int8"].read(math.prod(shape)), dtype=np.int8).reshape(shape[-1], -1).T
            else:
                codes = next(matrices[stored])
                columns = torch.from_numpy(np.frombuffer(raw["steps"].read(shape[-1]), dtype=np.int8).copy())
                entropy[stored] += code_entropy(codes, states)
            quantized = Quantized(stored, torch.from_numpy(codes.astype(np.int16).reshape(shape)),
                                  torch.from_numpy(rows.copy()), columns)
        tensors[name] = quantized.dequantize(unit)
        require(bool(torch.isfinite(tensors[name]).all()), f"{name} holds values that are not finite")
    streams = {name: Stream(length // (2 if name == "fp16" or name.startswith("gptq:") else 1), size, entropy[name])
               for name, _, length, size in listed}
    return Artifact(model, preset, illegal, tensors, streams)


@torch.no_grad()
def load_tensors(model: GPT, tensors: Mapping[str, Tensor]) -> None:
    """Copy an artifact's tensors into a model of the same knobs."""
    for name, values, _ in model.tensors():
        values.copy_(tensors[name])


def shipped_source(path: Path) -> bytes:
    """The script as a submission ships it: docstrings and comments stripped, LZMA, in a self-extracting wrapper.

    A file that is packed already is shipped as it is. The payload is a Latin-1 string literal: 2 % larger than the
    compressed bytes, where base85 costs 25 %. Tracebacks and `inspect` find the source through linecache.
    """
    import lzma
    source = path.read_bytes()
    if source.startswith(WRAPPER_MARK):
        return source
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            node.body = kept or [ast.Pass()] * bool(body)  # type: ignore[attr-defined]
    data = lzma.compress(ast.unparse(tree).encode(), lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)
    escapes = {b"\\": b"\\\\", b"\n": b"\\n", b"\r": b"\\r", b'"': b'\\"', b"\0": b"\\0"}
    # A NUL before a digit takes three digits: \0 and the digit would be read as one longer escape.
    data = re.sub(rb'[\\\n\r"\0]', lambda m: b"\\000" if data[m.end():m.end() + 1] in OCTAL and
                  m[0] == b"\0" else escapes[m[0]], data)
    return (WRAPPER_MARK + b'import lzma,linecache\ns=lzma.decompress("' + data + b'".encode("latin-1")).decode()\n'
            b'linecache.cache["train_gpt"]=len(s),None,s.splitlines(True),"train_gpt"\n'
            b'exec(compile(s,"train_gpt","exec"))\n')


def illegal(cfg: Config) -> str:
    """Which rule a run with these knobs breaks; empty: none."""
    return "C3: trained on the validation data before it was scored (PREQUANT_TTT=1)" if cfg.prequant_ttt else ""


def predicted_bytes(cfg: Config, code_bytes: int) -> dict[str, int]:
    """Estimated packed bytes by stream before training: BITS_PER_WEIGHT or what the cap leaves, or under SDClip those
    of Gaussian rows, whose codes have 2.05 + log2(Q/k) bits."""
    total: dict[str, float] = collections.defaultdict(float)
    for _, values, parameter in shapes_of(cfg).tensors():
        for stream, size in stream_parts(route(parameter).stored, values.shape):
            bits = 8.0
            if stream.startswith("gptq:"):
                width, sigmas = cfg.grid(stream.removeprefix("gptq:"))
                top = 2 ** (width - 1) - 1
                bits = cfg.bits_per_weight if cfg.quant == "waterfill" else \
                    min(max(0.1, 2.05 + math.log2(top / sigmas)), math.log2(2 * top + 1))
                size /= 2  # raw codes have two bytes
            total[stream] += size * bits / 8
    excess = sum(total.values()) + code_bytes - cfg.artifact_bytes_cap
    if cfg.quant == "waterfill" and excess > 0:  # the unit gives way
        codes = sum(size for stream, size in total.items() if stream.startswith("gptq:"))
        for stream in total:
            total[stream] *= max(0.0, 1 - excess / codes) if stream.startswith("gptq:") else 1.0
    return {stream: round(size) for stream, size in total.items()}


def fit_to_cap(model: GPT, sums: Calibration, code_bytes: int, cfg: Config, run: Run) -> bytes:
    """The packed artifact, as fine as the knobs say or as the cap allows; the same bytes on every rank.

    One unit multiplies all steps. Where the cap binds it is guessed from entropies and the packed size of nearest
    codes, and finished with true sizes, until at most a thousandth of the cap is left, or no time for another GPTQ.
    `UserError` when nothing fits.
    """
    cap = cfg.artifact_bytes_cap - code_bytes
    codec = pick_codec(cfg.codec)
    with run.phase("factorize", "train"):
        quantizer = Quantizer(model, sums, cfg, run)
    rest = sum(size for stream, size in predicted_bytes(cfg, code_bytes).items() if not stream.startswith("gptq:"))

    def packed(tensors: Mapping[str, Quantized], octaves: float, states: int, codec: str) -> bytes:
        with run.phase("pack"):
            return run.share(b"" if not run.is_main else pack(tensors, 2.0 ** octaves, states, codec, cfg, cfg.preset,
                                                              illegal(cfg)))

    def late() -> bool:
        """Whether another attempt like the last would end beyond the budget."""
        each = next((phase.seconds for phase in reversed(run.phases) if phase.name == "gptq"), 0.0)
        return run.share(0 < cfg.max_wallclock_seconds < run.spent("train") + each)

    def attempt(octaves: float) -> bytes:
        with run.phase("gptq", "train"):
            tensors = quantizer.quantize(2.0 ** octaves)
        blob = packed(tensors, octaves, quantizer.trellis.states, codec)
        run.log("pack", unit=2.0 ** octaves, codec=codec, weight_bytes=len(blob), code_bytes=code_bytes,
                left_bytes=cap - len(blob))
        return blob

    finest, octaves, slope = -60.0, 0.0, quantizer.weights / 8  # bytes an octave: at most a bit a weight
    if cfg.quant == "waterfill":
        with run.phase("allocate", "train"):
            most = cfg.bits_per_weight * quantizer.weights
            octaves = quantizer.octaves_for(min(most, 8 * max(1, 0.999 * cap - rest)))
            # GPTQ is the dear part: what the coder makes of nearest codes tells the size to a percent or so.
            near = quantizer.quantize(2.0 ** octaves, quantizer.nearest)
            trial = packed(near, octaves, 1, "brotli" if codec == "brotli" else "range")
            codes = code_bytes_of(trial)
            wanted = min(most, 8 * max(1, 0.999 * cap - (len(trial) - codes)))
            # Less than a bit a weight where many codes are 0; where nearly all are, nothing can be told from them.
            slope = max(slope / 4, (quantizer.bits(2.0 ** octaves) - quantizer.bits(2.0 ** (octaves + 0.25))) / 2)
            octaves += max(-1.0, (codes - wanted / 8) / slope)
            finest = octaves if most <= wanted else finest
    else:
        finest = 0.0  # SDClip's bits set the size
    blob = attempt(octaves)
    big, fits = (None, (octaves, blob)) if len(blob) <= cap else ((octaves, len(blob)), None)
    for number in range(14):
        if fits is not None and (fits[0] <= finest or len(fits[1]) >= 0.9991 * cap or late()):
            break
        if fits is None:
            coarser = 1.02 * (big[1] - 0.9996 * cap) / slope * 2 ** max(0, number - 3)
            octaves = big[0] + max(0.002, coarser)
            require(octaves < big[0] + 8 and octaves < 40, f"ARTIFACT_BYTES_CAP={cfg.artifact_bytes_cap:,}: code "
                    f"{code_bytes:,} and weights {big[1]:,} do not fit however coarse the steps; use a smaller model")
        elif big is None:
            octaves = max(finest, fits[0] - max(0.002, (0.9997 * cap - len(fits[1])) / slope))
        else:
            share = (big[1] - 0.9996 * cap) / max(1, big[1] - len(fits[1]))
            octaves = big[0] + min(0.95, max(0.05, share)) * (fits[0] - big[0])
            if abs(fits[0] - big[0]) < 1e-4:
                break
        blob = attempt(octaves)
        if len(blob) > cap:
            big = (octaves, len(blob))
        elif fits is None or len(blob) >= len(fits[1]):
            fits = (octaves, blob)
        else:  # finer and yet smaller: the coder's classes jump here
            break
    require(fits is not None, f"ARTIFACT_BYTES_CAP={cfg.artifact_bytes_cap:,}: code {code_bytes:,} and weights "
            f"{len(blob):,} do not fit however coarse the steps; use a smaller model")
    over = run.spent("train") - cfg.max_wallclock_seconds
    if cfg.max_wallclock_seconds and over > 0:
        reserve = math.ceil(cfg.gptq_reserve_seconds + over + 0.5)
        remedy = f"set GPTQ_RESERVE_SECONDS={reserve}" if reserve < cfg.max_wallclock_seconds else "raise it"
        run.log("warning", text=f"training, calibration and GPTQ took {over:.1f} s more than MAX_WALLCLOCK_SECONDS="
                f"{cfg.max_wallclock_seconds:g}: {remedy}")
    return fits[1]


def write_artifact(blob: bytes, path: Path, run: Run) -> bytes:
    """Rank 0 writes the file (whole or not at all) and reads it back; every rank gets the bytes of the file.

    Where that fails, what training has made lies in the system's temporary folder: `UserError` says under which name.
    """
    problem, found = "", b""
    if run.is_main:
        try:
            write_whole(path, lambda temporary: temporary.write_bytes(blob))
            found = path.read_bytes()
        except OSError as error:
            problem = f"{path}: cannot write the artifact: {error}; make room or set ARTIFACT_DIR{run.goes_on()}"
            with contextlib.suppress(OSError):
                spare = Path(tempfile.mkdtemp(prefix="train_gpt-")) / path.name
                write_whole(spare, lambda temporary: temporary.write_bytes(blob))
                problem += f"; until then it is {spare}, which EVAL_ONLY={spare} scores"
    run.agree(problem)
    return run.share(found)


# ----------------------------------------------------------------------------------------------------
# 11 Evaluation: one scorer; windows, adapters for each document, learning from what is scored, n-gram tilt
# ----------------------------------------------------------------------------------------------------
# A document is scored by itself: a token's context is what precedes it in its document, at most EVAL_SEQ_LEN ids. The
# target of a document's last token is the next BOS. Whatever adapts follows one order, the stream's: the shared
# weights learn at the end of a part from targets of it and earlier ones, a document's adapters from its own earlier
# chunks, and a hint is a function of the ids before its target. Documents of one part therefore run in any batch and
# on any rank; the score is the same up to rounding. A target is scored before anything learns from it (section 4).
# Safe to change: packing and dealing; how an update is made. Not safe: what it is made from.


class Window(NamedTuple):
    """Inputs [begin, end) of the stream; targets first..end-1 are scored (target t is the id after input t)."""
    begin: int
    end: int
    first: int


def plan_windows(starts: np.ndarray, num_targets: int, seq_len: int, stride: int) -> list[Window]:
    """Windows of at most seq_len inputs that score every target of every document once, `stride` at a time.

    Each but a document's first has seq_len - stride inputs of context before its first scored one.
    """
    windows = []
    for begin, end in zip(starts.tolist(), np.append(starts[1:], num_targets).tolist()):
        stop = min(begin + seq_len, end)
        if stop > begin:
            windows.append(Window(begin, stop, begin))
        while stop < end:
            first, stop = stop, min(stop + stride, end)
            windows.append(Window(max(begin, first - (seq_len - stride)), stop, first))
    return windows


def pack_rows(windows: Sequence[Window], seq_len: int) -> list[list[Window]]:
    """Windows dealt into rows of seq_len inputs, longest first, each into the fullest row that still has room."""
    rows: list[list[Window]] = []
    room: list[tuple[int, int]] = []  # (free inputs, row), sorted
    for window in sorted(windows, key=lambda w: (w.begin - w.end, w.begin)):
        length = window.end - window.begin
        at = bisect.bisect_left(room, (length, -1))
        if at < len(room):
            free, row = room.pop(at)
            rows[row].append(window)
        else:
            free, row = seq_len, len(rows)
            rows.append([window])
        if free > length:
            bisect.insort(room, (free - length, row))
    return rows


def window_batch(rows: Sequence[Sequence[Window]], ids: np.ndarray, num_rows: int, seq_len: int
                 ) -> tuple[Batch, Tensor, Tensor]:
    """(batch, flat positions that are scored, their target numbers) of some packed rows."""
    inputs = np.full((num_rows, seq_len), BOS_ID, dtype=np.int64)
    targets = np.full((num_rows, seq_len), IGNORE, dtype=np.int64)
    starts = np.zeros((num_rows, seq_len), dtype=bool)
    starts[:, 0] = True
    where, which = [], []
    for r, row in enumerate(rows):
        at = 0
        for begin, end, first in row:
            stop = at + end - begin
            inputs[r, at:stop], targets[r, at:stop] = ids[begin:end], ids[begin + 1:end + 1]
            starts[r, at] = True
            where.append(np.arange(r * seq_len + at + first - begin, r * seq_len + stop))
            which.append(np.arange(first, end))
            at = stop
        starts[r, at:at + 1] = True
    return (pack_batch(inputs, targets, starts), torch.from_numpy(np.concatenate(where)),
            torch.from_numpy(np.concatenate(which)))


class Hints(NamedTuple):
    """At most one hinted id for each target, with its strength; both depend on the ids before the target alone."""
    ids: Tensor
    """[targets] int32; any id where there is no hint."""
    betas: Tensor
    """[targets] float32; 0: no hint."""


def context_groups(ids: Tensor, length: int, known: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """(number, order) for contexts of `length` ids: number[t] is equal for equal ids[t-length+1..t] (t >= length-1);
    order lists these t by number and then by time, both int32. Exact: built by doubling and sorting, nothing is hashed.
    `known` keeps the numbers of lengths that are powers of two."""
    def numbers(half: int) -> Tensor:
        if half > 1 and half not in known:
            known[half] = context_groups(ids, half, known)[0]
        return known[half] if half > 1 else ids

    if length == 1:
        key, order = ids.sort(stable=True)
    else:
        half = 1 << (length - 1).bit_length() - 1  # two overlapping halves cover the context
        part = numbers(half)
        key = part[half - 1:len(ids) - length + half].long() * (int(part.max()) + 1) + part[length - 1:]
        key, order = key.sort(stable=True)
    ranks = F.pad((key[1:] != key[:-1]).cumsum(0, dtype=torch.int32), (1, 0))
    del key
    order = order.int() + (length - 1)
    number = torch.zeros(len(ids), dtype=torch.int32, device=ids.device)
    return number.index_put_((order,), ranks), order


def continuations(ids: Tensor, number: Tensor, order: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each t of `order`, what followed earlier occurrences of its context: (best id, its count, all), in the
    order given. The best is the id that first reached the highest count, as in #1514's tables."""
    follower = F.pad(ids[1:].int(), (0, 1))[order]  # the last t has none: it is the last of its group, so none sees it
    group = number[order]
    index = torch.arange(len(order), device=ids.device, dtype=torch.int32)

    def since(changed: Tensor) -> Tensor:
        """Distance to the last place at or before each where `changed` holds; the first place counts as one."""
        return index - torch.where(changed, index, 0).cummax(0).values

    pair, by_pair = (group.long() * vocab_size + follower).sort(stable=True)
    opens = F.pad(pair[1:] != pair[:-1], (1, 0), value=True)
    del pair
    count = torch.empty_like(index).index_put_((by_pair,), since(opens) + 1)
    del by_pair
    highest = (group.long() * (len(order) + 1) + count).cummax(0).values
    rises = F.pad(highest[1:] > highest[:-1], (1, 0), value=True)
    del highest
    leader = torch.where(rises, index, 0).cummax(0).values[(index - 1).clamp_min_(0)]
    seen = since(F.pad(group[1:] != group[:-1], (1, 0), value=True))
    return follower[leader], count[leader] * (seen > 0), seen


def ngram_hints(ids: Tensor, cfg: Config) -> Hints:
    """The hint of every target: the continuation that its longest trusted context had most often before (#1420).

    NGRAM_RULES are tried longest context first; one applies where the best continuation has its least share and the
    context its least number of earlier occurrences. ids [N] int64 on any device; memory: bench/ngram.py.
    """
    hints = torch.zeros(len(ids), dtype=torch.int32, device=ids.device)
    betas = torch.zeros(len(ids), dtype=torch.float32, device=ids.device)
    known: dict[int, Tensor] = {}
    for length, least_share, least_count in sorted(ngram_rules(cfg.ngram_rules), reverse=True):
        if length >= len(ids):
            continue
        number, order = context_groups(ids, length, known)
        best, count, seen = continuations(ids, number, order, cfg.vocab_size)
        share = count / seen.clamp_min(1)
        use = (seen >= least_count) & (share >= least_share) & (betas[order] == 0)
        hints[order[use]] = best[use]
        betas[order[use]] = cfg.ngram_base_beta * (share[use] if cfg.ngram_beta_by_share else 1.0)
    return Hints(hints[:-1], betas[:-1])


def tilted(nats: Tensor, logits: Tensor, targets: Tensor, hints: Tensor, betas: Tensor, gamma: float, softcap: float
           ) -> Tensor:
    """Nats under p'(y) = p(y) e^(b [y = hint]) / Z with Z = 1 + p(hint) (e^b - 1) and b = beta (1 - p(hint))^gamma.

    nats, targets, hints, betas [M]; logits [M, V] before the softcap. b depends on p and the hint, never on the
    target, so that p' is a distribution fixed before the target is looked at.
    """
    def capped(ids: Tensor) -> Tensor:
        picked = logits.gather(-1, ids.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return softcap * torch.tanh(picked.double() / softcap)

    p = torch.exp(capped(hints) - capped(targets) - nats.double()).clamp_max(1.0)
    b = betas * (1 - p) ** gamma
    return (nats + torch.log1p(p * torch.expm1(b)) - b * (hints == targets)).float()


class Scorer:
    """Turns hidden states into ledger entries: the one place where a score is made."""

    def __init__(self, val: ValData, cfg: Config, run: Run, hints: Hints | None = None,
                 kept: ScoreCheckpoints | Unkept | None = None) -> None:
        self.val, self.cfg, self.run, self.hints, self.kept = val, cfg, run, hints, kept or Unkept()
        self.ledger = Ledger(val.num_targets, val.starts)

    def nats(self, model: GPT, hidden: Tensor, targets: Tensor, numbers: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
        """(scores, losses to learn from), flat [M]: of targets with these numbers, given hidden [..., D]."""
        logits = w.linear("head", None, hidden).flatten(0, -2)
        targets, numbers = targets.flatten(), numbers.flatten()
        nats = model.kernels.cross_entropy(logits, targets, model.cfg.logit_softcap)
        if self.hints is None:
            return nats.detach(), nats
        at = numbers.clamp_max(len(self.hints.ids) - 1).to(self.hints.ids.device)
        hints, betas = (t[at].to(nats.device) for t in self.hints)
        hints = hints.long()
        with torch.no_grad():
            return tilted(nats, logits, targets, hints, betas, self.cfg.ngram_gamma, model.cfg.logit_softcap), nats


@torch.no_grad()
def score_windows(model: GPT, windows: Sequence[Window], scorer: Scorer, name: str) -> None:
    """Score windows without adapters, packed into rows of EVAL_SEQ_LEN that are dealt to the ranks."""
    cfg, run, done = scorer.cfg, scorer.run, scorer.ledger.done
    w, plan = Weights(model, run.dtype), layer_plan(model.cfg, looped=True)
    hidden = run.compiled(model.hidden)
    mine = [row for row in pack_rows(windows, cfg.eval_seq_len)[run.rank::run.world] if not done[row[0].first]]
    chunk = max(1, (1 << 26) // model.cfg.vocab_size)  # 256 MB of fp32 logits at a time
    with run.progress(len(mine), name, "row") as bar:
        for at in range(0, len(mine), cfg.eval_rows):
            part = mine[at:at + cfg.eval_rows]
            num_rows = cfg.eval_rows if run.compiles else len(part)  # a compiled graph has one shape
            batch, where, which = window_batch(part, scorer.val.ids, num_rows, cfg.eval_seq_len)
            batch, where = batch.to(run.device), where.to(run.device)
            flat, targets = hidden(batch, plan, w).flatten(0, 1), batch.targets.flatten()
            for spots, numbers in zip(where.split(chunk), which.split(chunk)):
                scorer.ledger.record(numbers, scorer.nats(model, flat[spots], targets[spots], numbers, w)[0])
            _, ends, firsts = np.array([window for row in part for window in row]).T
            scorer.ledger.note(Ledger.SCORE, Ledger.BASE, firsts, ends)
            bar.update(len(part))
            scorer.kept.pause()
        scorer.kept.finish()


def evaluate(model: GPT, val: ValData, stride: int, cfg: Config, run: Run, name: str) -> Score:
    """Score of the whole validation stream with fixed weights and windows that advance by `stride` targets."""
    scorer = Scorer(val, cfg, run)
    score_windows(model, plan_windows(val.starts, val.num_targets, cfg.eval_seq_len, stride), scorer, name)
    return scorer.ledger.close(val.target_bytes, run)[0]


class Job(NamedTuple):
    """Documents that are adapted to side by side, one a row, chunk by chunk from their starts."""
    documents: tuple[int, ...]
    edges: tuple[int, ...]
    """Where chunks begin and end, in targets from the start of a document; the last is beyond the longest one."""
    cost: int
    """In token-forwards; a step costs as much as STEP_TOKENS tokens even where it has few."""


STEP_TOKENS = 512
"""Fixed cost of a chunk step in tokens: launches, the optimizer, small products."""


def tokens_run(begin: int, end: int, cfg: Config) -> int:
    """Tokens of one document that go through the model to score its targets [begin, end)."""
    return end - (begin if cfg.ttt_context == "cache" else max(0, end - cfg.eval_seq_len))


def plan_jobs(documents: np.ndarray, lengths: np.ndarray, cfg: Config, world: int) -> list[Job]:
    """Every document (numbers, targets of each) in one job, costliest job first.

    Neighbours in length share a job while the padding costs less than steps of their own, up to TTT_BATCH_SIZE rows,
    and fewer where the ranks would otherwise have too few jobs, or too long ones, to share evenly.
    """
    by_length = np.argsort(-lengths, kind="stable")
    most = cfg.ttt_batch_size if world == 1 else min(cfg.ttt_batch_size, max(1, len(documents) // (4 * world)))
    edges = np.array(chunk_edges(int(lengths.max(initial=0)), cfg.ttt_chunk_size))
    row = np.cumsum([0, *(tokens_run(a, b, cfg) for a, b in zip(edges.tolist(), edges[1:].tolist()))])
    chunks = np.searchsorted(edges, lengths)  # of each document by itself
    largest = math.inf if world == 1 else (row[chunks].sum() + chunks.sum() * STEP_TOKENS / most) / (8 * world)
    jobs: list[tuple[int, list[int]]] = []  # (chunks, documents)
    for i in by_length[lengths[by_length] > 0].tolist():
        own = int(chunks[i])
        longest, rows = jobs[-1] if jobs else (0, [])
        if rows and len(rows) < most and row[longest] - row[own] <= own * STEP_TOKENS \
                and longest * STEP_TOKENS + (len(rows) + 1) * row[longest] <= largest:
            rows.append(int(documents[i]))
        else:
            jobs.append((own, [int(documents[i])]))
    return sorted((Job(tuple(rows), tuple(edges[:longest + 1].tolist()),
                       int(longest * STEP_TOKENS + len(rows) * row[longest])) for longest, rows in jobs),
                  key=lambda job: (-job.cost, job.documents))


def deal(jobs: Sequence[Job], world: int) -> list[list[Job]]:
    """Jobs to ranks: the costliest first, each to the rank with the least work so far (Graham 1969)."""
    dealt: list[list[Job]] = [[] for _ in range(world)]
    load = [0] * world
    for job in jobs:
        rank = load.index(min(load))
        dealt[rank].append(job)
        load[rank] += job.cost
    return dealt


def jobs_left(documents: np.ndarray, scorer: Scorer) -> list[Job]:
    """Jobs of these documents without those that are done: the jobs of one run, unless another number of ranks or rows
    has dealt them otherwise before."""
    val, cfg, world = scorer.val, scorer.cfg, scorer.run.world
    lengths = np.append(val.starts[1:], val.num_targets) - val.starts
    jobs = plan_jobs(documents, lengths[documents], cfg, world)
    done = {document for job in jobs for document in job.documents if scorer.ledger.done[val.starts[document]]}
    torn = np.array([document for job in jobs if done.intersection(job.documents) for document in job.documents
                     if document not in done], dtype=np.int64)
    return [job for job in jobs if not done.intersection(job.documents)] + \
        plan_jobs(torn, lengths[torn], cfg, world)


def score_documents(model: GPT, documents: np.ndarray, scorer: Scorer, pace: Pace, name: str) -> None:
    """Score whole documents, each with adapters that learn from its own chunks once these are scored."""
    run = scorer.run
    mine = deal(jobs_left(documents, scorer), run.world)[run.rank]
    model.requires_grad_(False)
    with torch.no_grad():
        base = Weights(model, run.dtype)
    with run.progress(sum(job.cost for job in mine), name, "tok") as bar:
        for job in mine:
            for cost in adapt_and_score(model, base, job, scorer, pace):
                bar.update(cost)
                scorer.kept.pause()
        scorer.kept.finish()
    model.requires_grad_(True)


def adapt_and_score(model: GPT, base: Weights, job: Job, scorer: Scorer, pace: Pace) -> Iterator[float]:
    """One job: chunk by chunk, score first, then one or more steps of the adapters on that chunk; yields their costs.

    TTT_CONTEXT=cache computes each token once and keeps keys and values; recompute runs the whole window of a chunk
    again with the newest adapters. Both score, and learn from, the chunk's targets alone.
    """
    cfg, run, val = scorer.cfg, scorer.run, scorer.val
    rows, total = len(job.documents), job.edges[-1]
    begins = val.starts[list(job.documents)]
    lengths = np.append(val.starts[1:], val.num_targets)[list(job.documents)] - begins
    ids = np.full((rows, total + 1), BOS_ID, dtype=np.int64)
    for r, (begin, length) in enumerate(zip(begins, lengths)):
        ids[r, :length + 1] = val.ids[begin:begin + length + 1]
    ids_RT, left_R1 = torch.from_numpy(ids).to(run.device), torch.from_numpy(lengths).to(run.device)[:, None]
    column = torch.arange(-1, total, device=run.device)
    numbers_RT = torch.from_numpy(begins).to(run.device)[:, None] + column[None, 1:]
    targets_RT = torch.where(column[1:] < left_R1, ids_RT[:, 1:], IGNORE)
    scores = torch.zeros(rows, total, device=run.device)
    plan = layer_plan(model.cfg, looped=True)
    adapters = Adapters(model, plan, rows, cfg)
    optimizer = adapter_optimizer(adapters, cfg)
    past = KeyValueCache(cfg.eval_seq_len) if cfg.ttt_context == "cache" else NoPast()
    for begin, end in zip(job.edges, job.edges[1:]):
        size, cost = end - begin, STEP_TOKENS + rows * tokens_run(begin, end, cfg)
        goes_on = lengths > end
        steps = cfg.ttt_grad_steps if goes_on.any() and pace.adapts() else 0
        started = time.perf_counter()
        first = begin if past.lead else max(0, end - cfg.eval_seq_len)
        # Column c of `column` is position c - 1, so that a chunk's lead is the token before it (or padding).
        window = F.pad(ids_RT, (1, 0), value=BOS_ID)[:, first + 1 - past.lead:end + 1]
        positions = (column[first + 1 - past.lead:end + 1] - (0 if past.lead else first)).int().expand(rows, -1)
        pieces = torch.arange(0, window.numel() + 1, window.size(1), device=run.device, dtype=torch.int32)
        batch = Batch(window, window, positions, pieces)
        targets, numbers = targets_RT[:, begin:end], numbers_RT[:, begin:end]
        for number in range(max(1, steps)):
            with torch.set_grad_enabled(steps > 0):
                w = AdaptedWeights(base, model, adapters)
                hidden = model.hidden(batch, plan, w, past)[:, -size:]
                scored, losses = scorer.nats(model, hidden, targets, numbers, w)
            if number == 0:
                scores[:, begin:end] = scored.view(rows, size)
                new = dict(past.new) if isinstance(past, KeyValueCache) else {}
                live = np.flatnonzero(lengths > begin)
                scorer.ledger.note(Ledger.SCORE, np.array(job.documents)[live], begins[live] + begin,
                                   begins[live] + np.minimum(end, lengths[live]))
            if steps:
                weight = torch.from_numpy(goes_on / size).to(losses)[:, None]
                (losses.view(rows, size) * weight).sum().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                live = np.flatnonzero(goes_on)
                scorer.ledger.note(Ledger.UPDATE, np.array(job.documents)[live], begins[live] + begin,
                                   begins[live] + end)
        if isinstance(past, KeyValueCache):
            past.advance(size, new)
        if end == total:  # waits for the device
            real = column[1:] < left_R1
            scorer.ledger.record(numbers_RT[real].cpu(), scores[real])
            scorer.ledger.settle()
        pace.did(cost, time.perf_counter() - started)
        yield cost


def adapter_optimizer(adapters: Adapters, cfg: Config) -> torch.optim.Optimizer:
    """The optimizer of one job's adapters; elementwise, so that documents stay independent."""
    parameters = adapters.parameters()
    if cfg.ttt_optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=cfg.ttt_lora_lr, momentum=cfg.ttt_beta1,
                               weight_decay=cfg.ttt_weight_decay, foreach=True)
    return torch.optim.AdamW(parameters, lr=cfg.ttt_lora_lr, betas=(cfg.ttt_beta1, cfg.ttt_beta2), eps=1e-10,
                             weight_decay=cfg.ttt_weight_decay, fused=True)


class SharedSgd:
    """Steps of the shared weights on stretches of the stream, over all ranks; the rule is a torch optimizer.

    Where the run compiles, the graph is made here, on random ids and at the cost of the budget around it.
    """

    def __init__(self, model: GPT, ids: np.ndarray, optimizer: Callable[[], torch.optim.Optimizer], clip: float,
                 freeze: int, batch_rows: int, cfg: Config, run: Run) -> None:
        self.model, self.ids, self.new_optimizer, self.clip, self.freeze = model, ids, optimizer, clip, freeze
        self.batch_rows, self.cfg, self.run = batch_rows, cfg, run
        plan = layer_plan(model.cfg, looped=True)
        self.loss = run.compiled(lambda batch: model.total_loss(batch, plan, run.dtype))
        self.micro = max(1, min(-(-batch_rows // run.world), cfg.micro_batch_tokens // cfg.train_seq_len))
        self.forget()
        if run.compiles:
            run.place, outside = "shared_sgd", run.place
            self.loss(random_batch(self.micro, cfg).to(run.device)).backward()
            self.optimizer.zero_grad(set_to_none=True)
            run.place = outside

    def forget(self) -> None:
        """Begin with fresh optimizer state."""
        self.optimizer = self.new_optimizer()

    def tensors(self) -> dict[str, Tensor]:
        """What learning changes, by name: weights, and momentum (zero before the first step)."""
        named, state = dict(self.model.named_parameters()), self.optimizer.state
        return {**{f"weights.{name}": p.detach() for name, p in named.items()},
                **{f"momentum.{name}": state[p].get("momentum_buffer", torch.zeros_like(p)) for name, p in named.items()
                   if self.optimizer.defaults.get("momentum")}}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with what `tensors` gave; without tensors (other ranks) with rank 0's."""
        for name, here in self.tensors().items():
            here = self.run.broadcast(here.copy_(tensors[name]) if tensors else here)
            if name.startswith("momentum."):
                self.optimizer.state[self.model.get_parameter(name[9:])]["momentum_buffer"] = here

    def learn(self, first: int, stop: int, lr: float) -> None:
        """One step a batch of rows over targets [first, stop), each with the mean loss of its batch."""
        seq_len, run = self.cfg.train_seq_len, self.run
        spans = [(at, min(at + seq_len, stop)) for at in range(first, stop, seq_len)]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for at in range(0, len(spans), self.batch_rows):
            part = spans[at:at + self.batch_rows]
            mine, count = part[run.rank::run.world], sum(b - a for a, b in part)
            for i in range(0, len(mine), self.micro):
                rows = [self.ids[a:b + 1] for a, b in mine[i:i + self.micro]]
                num_rows = self.micro if run.compiles else len(rows)
                (self.loss(make_batch(rows, num_rows, seq_len).to(run.device)) / count).backward()
            self.step()

    def step(self) -> None:
        """Gradients summed over ranks in one message, the first blocks' zeroed, clipped, applied."""
        model, layers = self.model, self.model.cfg.num_layers
        for name, p in model.named_parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if self.freeze and not name.startswith(("tok_emb", "skip_", "smear_", "bigram.")):  # the rest has a row
                p.grad.unflatten(0, (-1, layers))[:, :self.freeze] = 0  # (banks: two) for each block
        parameters = list(model.parameters())
        flat = self.run.total(torch.cat([p.grad.flatten() for p in parameters]))
        if self.clip:
            flat *= (self.clip / flat.norm().clamp_min(1e-12)).clamp_max(1.0)
        for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = g.view_as(p)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def cosine(i: int, count: int) -> float:
    """From 1 at i = 0 to 0 at the last of `count`."""
    return 0.5 * (1 + math.cos(math.pi * i / max(1, count - 1)))


class Pace:
    """Watches the projected end of evaluation: while it lies beyond EVAL_SECONDS_BUDGET, nothing adapts.

    What does not adapt is still scored, by what has been learned: no target is ever left out. Waiting for other ranks
    counts as time; as the pace of this rank's work only within a chunk of TTT=sgd, which all ranks end together.
    """
    LEAST_SECONDS = 5.0
    """Work before the first projection: the first steps load kernels and say little."""

    def __init__(self, total_cost: float, cfg: Config, run: Run) -> None:
        self.cfg, self.run, self.total, self.done, self.busy = cfg, run, max(1.0, total_cost), 0.0, 0.0
        self.used, self.started, self.refused = run.spent("eval"), time.perf_counter(), 0

    def did(self, cost: float, seconds: float) -> None:
        """Account for finished work, in the unit of `total_cost`."""
        self.done += cost
        self.busy += seconds

    @contextlib.contextmanager
    def works(self, cost: float) -> Iterator[None]:
        """What happens inside is work of this cost."""
        start = time.perf_counter()
        yield
        self.did(cost, time.perf_counter() - start)

    def projected(self) -> float:
        """Seconds of evaluation at the end, at the pace so far."""
        ahead = self.busy / self.done * max(0.0, self.total - self.done) if self.busy > self.LEAST_SECONDS else 0.0
        return self.used + time.perf_counter() - self.started + ahead

    def adapts(self) -> bool:
        """Whether there is time to adapt now."""
        late = self.projected() > self.cfg.eval_seconds_budget
        self.refused += late
        return not late

    def report(self) -> None:
        """Log how often adaptation was refused on each rank, if it was; all ranks take part."""
        refused = self.run.gather(self.refused)
        if any(refused):
            self.run.log("adaptation_cut", refused_by_rank=refused, budget_seconds=self.cfg.eval_seconds_budget)


class Unkept:
    """Scoring that cannot be interrupted: what adapts asks, and nothing happens."""

    def start(self, pace: Pace | None = None, sgd: SharedSgd | None = None) -> tuple[int, int]:
        """Where to go on: the ledger's phase, and how many pieces of what ends it have been learned."""
        return 0, 0

    def pause(self) -> None:
        """Here this rank can be interrupted, wherever the others are."""

    def finish(self) -> None:
        """This rank has scored its share of a phase; returns when all have. A collective."""

    def agree(self, learned: int) -> None:
        """Here all ranks can be interrupted: `learned` pieces after the phase's scores. A collective."""


class ScoreCheckpoints(Checkpoints):
    """From which scoring goes on: `<run_id>.score.ckpt`, there while an artifact waits for its verdict.

    Until the adapted score begins the head alone: which artifact, which knobs, seconds spent, scores for comparison.
    Then also the ledger, and weights and momentum that learn. Ranks score at their own pace: one that is due or asked
    to stop waits for the others, who come when they are due, stopped or done; then all save, or go on, together.
    """
    KINDS = {"seconds": dict, "figures": dict, "ladder": dict, "progress": dict}
    COUNTS = ("phase", "learned", "sequence", "learned_in", "targets", "events", "refused")

    def __init__(self, blob: bytes, model: GPT, figures: Mapping[str, Any], cfg: Config, run: Run) -> None:
        """Of the artifact with these bytes, which holds such a model; `figures` of its training, for the verdict."""
        super().__init__(run.score_path, self.KINDS, run)
        self.artifact, self.model, self.cfg = hashlib.sha256(blob).hexdigest(), model, cfg
        self.state: dict[str, Any] = {"figures": dict(figures), "ladder": {}, "progress": {}}
        self.found: dict[str, Tensor] = {}
        self.resumed = run.resumes == "score"

    def knobs(self) -> dict[str, Any]:
        """The artifact, and every knob that can change the score by more than rounding."""
        return {"artifact_sha256": self.artifact, **{name: value for name, value in dataclasses.asdict(self.cfg).items()
                                                     if name not in NO_RESULT | NO_SCORE}}

    def keep(self) -> None:
        """Write the head, unless the adapted score has begun: then a file has all or nothing."""
        if not self.state["progress"]:
            self.write({}, {**self.state, "seconds": self.run.seconds()})

    def load(self) -> None:
        """Take over seconds, figures and scores for comparison of the run before; `restore` and `start` do the rest."""
        self.state, self.found = self.read(self._expected)
        for budget, seconds in self.state["seconds"].items():
            self.run.went_before("before", budget, seconds)

    def _expected(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        progress = state["progress"]
        if set(state["seconds"]) != {"train", "eval", "none"} or progress and not all(
                type(progress.get(name)) is int and progress[name] >= -(name == "learned_in") for name in self.COUNTS):
            raise ValueError("its head is not a checkpoint's")
        shapes = {"nats": ((progress["targets"],), torch.float32),
                  "events": ((progress["events"], 6), torch.int64)} if progress else {}
        return {**{name: torch.empty(shape, dtype=kind, device="meta") for name, (shape, kind) in shapes.items()},
                **{f"{kind}.{name}": p for kind in progress.get("learning", ())
                   for name, p in self.model.named_parameters()}}

    def restore(self, scorer: Scorer) -> None:
        """The ledger as far as it got."""
        self.scorer, ledger, progress = scorer, scorer.ledger, self.state["progress"]
        self.corpus = f"{len(ledger.nats)} targets that begin {beginning(scorer.val.ids)}"
        if progress:
            require(progress.get("corpus") == self.corpus, f"{self.paths[0]}: made on {progress.get('corpus')}, the "
                    f"validation shards have {self.corpus}")
            nats, events = (self.found.get(name, torch.zeros(0)) for name in ("nats", "events"))
            ledger.restore(nats, events.numpy(), self.run)
            ledger.phase, ledger.sequence, ledger.learned_in = (progress[name] for name in (
                "phase", "sequence", "learned_in"))

    def start(self, pace: Pace | None = None, sgd: SharedSgd | None = None) -> tuple[int, int]:
        self.pace, self.sgd, progress = pace, sgd, self.state["progress"]
        self.run.graceful = True
        if progress and sgd is not None:
            sgd.load({name: t for name, t in self.found.items() if "." in name})
        if progress and pace is not None and self.run.is_main:
            pace.refused += progress["refused"]
        self.found = {}
        return progress.get("phase", 0), progress.get("learned", 0)

    def pause(self) -> None:
        if self.run.stop or self.due():
            self._meet(True, 0)

    def finish(self) -> None:
        while self._meet(False, 0):
            pass

    def agree(self, learned: int) -> None:
        self._meet(True, learned)

    def _meet(self, busy: bool, learned: int) -> bool:
        """Whether some rank has scores to make; saved on the way where one was due or asked to stop."""
        notes = torch.tensor([busy, bool(self.run.stop), self.due()], dtype=torch.int32)
        busy, stop, due = self.run.total(notes).tolist()
        if stop or due:
            self._save(learned)
        if stop:
            progress = self.state["progress"]
            self.end_run(f"{int(self.scorer.ledger.times.sum())} of {progress['targets']} targets")
        return bool(busy)

    def _save(self, learned: int) -> None:
        ledger, sgd = self.scorer.ledger, self.sgd
        events = torch.from_numpy(ledger.hand_in(self.run))
        learning = sgd.tensors() if sgd is not None else {}
        refused = sum(self.run.gather(self.pace.refused if self.pace is not None else 0))
        self.state["progress"] = {
            "phase": ledger.phase, "learned": learned, "sequence": ledger.sequence, "learned_in": ledger.learned_in,
            "targets": len(ledger.nats), "corpus": self.corpus, "events": len(events), "refused": refused,
            "learning": sorted({name.split(".")[0] for name in learning})}
        self.write({"nats": ledger.nats, "events": events, **learning}, {**self.state, "seconds": self.run.seconds()},
                   targets=int(ledger.times.sum()))


def adapted_score(model: GPT, val: ValData, cfg: Config, run: Run, scorer: Scorer) -> tuple[Score, str]:
    """Score of the validation stream with everything the knobs ask for, part by part in the order of the stream.

    The shared weights of `model` change. Returns the score and the ledger's digest.
    """
    adapt = {"none": score_plain, "sgd": chunked_sgd, "lora": phased_lora}[cfg.ttt]
    adapt(model, val, cfg, run, scorer)
    return scorer.ledger.close(val.target_bytes, run)


def score_plain(model: GPT, val: ValData, cfg: Config, run: Run, scorer: Scorer) -> None:
    """Fixed weights, windows by EVAL_STRIDE."""
    scorer.kept.start()
    score_windows(model, plan_windows(val.starts, val.num_targets, cfg.eval_seq_len, cfg.stride), scorer, "score")


def chunked_sgd(model: GPT, val: ValData, cfg: Config, run: Run, scorer: Scorer) -> None:
    """Windows of TTT_CHUNK_TOKENS targets are scored, then the whole model learns from these targets (#1413, #549).

    A window belongs to the chunk of its first scored target. Momentum runs on; the rate falls as a cosine over chunks.
    """
    windows = plan_windows(val.starts, val.num_targets, cfg.eval_seq_len, cfg.stride)
    firsts = [w.first for w in windows]
    count = -(-val.num_targets // cfg.ttt_chunk_tokens)
    sgd = SharedSgd(model, val.ids, lambda: torch.optim.SGD(model.parameters(), lr=0.0, momentum=cfg.ttt_momentum),
                    cfg.ttt_grad_clip, cfg.ttt_freeze_blocks, cfg.ttt_batch_seqs, cfg, run)
    pace = Pace(count - scorer.ledger.phase, cfg, run)
    begin, learned = scorer.kept.start(pace, sgd)
    for c in range(begin, count):
        first, stop = c * cfg.ttt_chunk_tokens, min((c + 1) * cfg.ttt_chunk_tokens, val.num_targets)
        mine = windows[bisect.bisect_left(firsts, first):bisect.bisect_left(firsts, stop)]
        learns = c + 1 < count and (learned > 0 or run.share(pace.adapts()))
        with pace.works(1):
            score_windows(model, mine, scorer, f"chunk {c + 1}/{count}")
            for epoch in range(learned, cfg.ttt_epochs if learns else 0):
                sgd.learn(first, stop, cfg.ttt_lr * cosine(c, count))
                scorer.kept.agree(epoch + 1)
        learned = 0
        if learns:
            scorer.ledger.note(Ledger.UPDATE, Ledger.BASE, first, stop)
        scorer.ledger.phase += 1
    pace.report()


def phased_lora(model: GPT, val: ValData, cfg: Config, run: Run, scorer: Scorer) -> None:
    """Documents with adapters of their own; after each phase the shared weights learn from all documents so far.

    The phases end at equal shares of the first PHASED_TTT_PREFIX_DOCS documents of the stream (#1610, which took the
    longest ones instead).
    """
    documents, phases = np.arange(len(val.starts)), cfg.phased_ttt_num_phases
    ends = [min(cfg.phased_ttt_prefix_docs * (i + 1) // phases, len(documents)) for i in range(phases)]
    ends.append(len(documents))
    sgd = SharedSgd(model, val.ids, lambda: torch.optim.SGD(model.parameters(), lr=0.0,
                                                            momentum=cfg.global_ttt_momentum),
                    cfg.global_ttt_grad_clip, 0, cfg.global_ttt_batch_seqs, cfg, run) if phases else None
    pace = Pace(sum(job.cost for job in deal(jobs_left(documents, scorer), run.world)[run.rank]), cfg, run)
    phase, learned = scorer.kept.start(pace, sgd)
    for number, (begin, end) in enumerate(zip([0, *ends], ends)):
        if number < phase:
            continue
        score_documents(model, documents[begin:end], scorer, pace, f"phase {number + 1}/{len(ends)}")
        stop = int(val.starts[end]) if end < len(documents) else val.num_targets
        if sgd is not None and begin < end < len(documents) and (learned > 0 or run.share(pace.adapts())):
            with run.phase("shared_sgd", "eval"):
                if not learned:
                    sgd.forget()
                chunks = range(0, stop, cfg.global_ttt_chunk_tokens)
                for at in range(learned, cfg.global_ttt_epochs * len(chunks)):
                    first, i = chunks[at % len(chunks)], at % len(chunks)
                    sgd.learn(first, min(first + cfg.global_ttt_chunk_tokens, stop),
                              cfg.global_ttt_lr * cosine(i, len(chunks) + 1))
                    scorer.kept.agree(at + 1)
            scorer.ledger.note(Ledger.UPDATE, Ledger.BASE, 0, stop)
        learned = 0
        scorer.ledger.phase += 1
    pace.report()


def prequant_ttt(model: GPT, cfg: Config, run: Run) -> None:
    """AdamW on the validation data before quantization, as PR #1485 did: against the rules (C3), a specimen.

    Kept so that the auditor has something real to catch; whatever it scores is marked illegal.
    """
    val = ValData.load(cfg, run)
    sgd = SharedSgd(model, val.ids, lambda: torch.optim.AdamW(model.parameters(), weight_decay=0.0),
                    cfg.prequant_ttt_grad_clip, cfg.prequant_ttt_freeze_blocks,
                    cfg.prequant_ttt_batch_seqs, cfg, run)
    for epoch in range(cfg.prequant_ttt_epochs):
        share = 0.1 + 0.9 * cosine(epoch, cfg.prequant_ttt_epochs + 1)
        sgd.learn(0, val.num_targets, cfg.prequant_ttt_lr * share)


# ----------------------------------------------------------------------------------------------------
# 12 Train, main: the story, in order
# ----------------------------------------------------------------------------------------------------
# Safe to change: what is logged. The order is law: the validation data is opened after the artifact is frozen.


def describe(cfg: Config, model: GPT, run: Run, warnings: Sequence[str], code_bytes: int) -> None:
    """The header of the log: versions, device, kernels, config, layer plan, routes."""
    device = torch.cuda.get_device_name(run.device) if run.is_cuda else platform.processor() or platform.machine()
    run.log("start", run_id=run.run_id, python=platform.python_version(), torch=torch.__version__, device=device,
            world=run.world, dtype=str(run.dtype).removeprefix("torch."), threads=torch.get_num_threads(),
            compile=run.compiles, attention=model.kernels.attention.name,
            fused=model.kernels.fused,
            code_sha256=file_sha256(Path(__file__)), code_bytes=code_bytes)
    for warning in warnings:
        run.log("warning", text=warning)
    decisive = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in NO_RESULT}
    run.log("versions", config_sha256=hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest(),
            **installed())
    run.record("config", dataclasses.asdict(cfg))
    run.write("config (* differs from the preset record)")
    fields = {f.name: f.default for f in dataclasses.fields(Config)}
    for name in (f.name for group in GROUPS for f in dataclasses.fields(group)):
        value = getattr(cfg, name)
        run.write(f"  {'*' if value != fields[name] else ' '} {name.upper()}={show(value)}")
    for looped in ([False, True] if cfg.num_loops else [False]):
        run.write(f"layer plan, loop {'on' if looped else 'off'} (block<skip@window, / single lane, = two lanes)")
        run.write("  " + plan_text(layer_plan(cfg, looped)))
    run.write("routes: parameter, shape, update, learning rate, decay, stored as")
    for name, p in model.named_parameters():
        r = route(name)
        run.write(f"  {name:24s} {str(list(p.shape)):18s} {p.numel():>11,} {r.rule:5s} {r.lr} {r.wd} {r.stored}")
    tflop = [3e-12 * cfg.train_batch_tokens * estimate_flops(cfg, layer_plan(cfg, looped), cfg.train_seq_len / 2)
             for looped in (False, True)]  # with rows of one document; more and shorter ones need less
    run.log("model", parameters=sum(p.numel() for p in model.parameters()), tflop_step=tflop[0],
            tflop_step_looped=tflop[1],
            predicted_weight_bytes=sum(predicted_bytes(cfg, code_bytes).values()))


def installed() -> dict[str, str]:
    """Version of each package that can change a result or its bytes; those that are not there are left out."""
    found = {}
    for name in ("numpy", "sentencepiece", "brotli", "constriction", "triton", "flash-attn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def plan_text(plan: Sequence[Visit]) -> str:
    """One line for a layer plan: block, a mark for its lanes, `<visit` for a skip, `@tokens` for a window."""
    mark = {"none": "", "single": "/", "two": "="}
    return " ".join(f"{v.block}{mark[v.lanes]}" + ("" if v.skip_from is None else f"<{v.skip_from}") +
                    (f"@{v.window}" if v.window else "") for v in plan)


def estimate_flops(cfg: ModelKnobs, plan: Sequence[Visit], context: float) -> float:
    """FLOPs of one token's forward, two a multiply-add; the backward takes twice as many, recomputation aside.

    `context`: mean number of keys that a query sees; T/2 where a row is one document. Counted are the products with
    q, k, v, o, MLP, head and the bigram's projection, and attention's two; not norms, gates (0.1 %) and optimizer.

    >>> cfg = ModelKnobs()
    >>> round(estimate_flops(cfg, layer_plan(cfg, looped=True), 670) / 1e6, 1)
    129.8
    """
    dim, kv_dim = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
    keys = sum(min(context, visit.window or context) for visit in plan)
    mlp = cfg.mlp_rank * (dim + cfg.mlp_dim) if cfg.mlp_rank else dim * cfg.mlp_dim
    products = 2 * dim * (2 * dim + 2 * kv_dim) + 4 * mlp
    bigram = 2 * dim * cfg.bigram_dim * bool(cfg.bigram_buckets)
    return len(plan) * products + 4 * dim * keys + 2 * dim * cfg.vocab_size + bigram


MEMORY_KNOBS = {"train": "micro_batch_tokens", "fit": "micro_batch_tokens", "ladder": "val_batch_tokens",
                "score": "val_batch_tokens", "adapt": "ttt_batch_size", "shared_sgd": "micro_batch_tokens"}
"""What to lower where memory does not last."""


def predicted_memory(cfg: Config, run: Run, targets: int) -> dict[str, int]:
    """Peak bytes of one process on its device by stretch of the run, with `targets` validation targets.

    Exact are weights, optimizer and adapters; activations are elements kept of a token and visit, as counted on a CPU
    (13 D + 5 K H + 3.2 F; half of it where a compiler decides what is kept), measured against in bench/LOG.md.
    """
    named = dict(shapes_of(cfg).named_parameters())
    weights = 4 * sum(p.numel() for p in named.values())
    banks = 4 * sum(p.numel() for name, p in named.items() if route(name).rule == "muon")
    matrices = [p.shape for p in named.values() if p.dim() == 3]
    sums = 4 * sum(count * (rows ** 2 + columns ** 2) for count, rows, columns in matrices)
    dim, kv_dim, vocab, width = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim, cfg.vocab_size, run.dtype.itemsize
    visits = len(layer_plan(cfg, looped=True))
    kept = visits * (13 * dim + 5 * kv_dim + 3.2 * cfg.mlp_dim) * width / (2 if run.compiles else 1)
    scores = 0 if run.is_cuda else visits * cfg.num_heads * width  # a CPU keeps attention's probabilities, T a token
    tokens = min(cfg.micro_batch_tokens, -(-cfg.train_batch_tokens // run.world))
    quarter = -(-tokens // cfg.train_seq_len // 4) * cfg.train_seq_len
    step = tokens * (kept + scores * cfg.train_seq_len + (2 * width * vocab if run.is_cuda else 0))
    eval_tokens = cfg.eval_rows * cfg.eval_seq_len
    base = (600 << 20) + (0 if run.is_cuda else 25 * targets) + 60 * targets * cfg.ngram_tilt_enabled
    logits = 12 * min(1 << 26, eval_tokens * vocab)
    windows = 3 * weights + eval_tokens * width * (8 * dim + 2 * cfg.mlp_dim) + logits
    found = {"train": 4 * weights + banks // run.world + 2 * (weights - banks) + step,
             "fit": 3 * weights + 3 * sums + quarter * (2 * kept + scores * cfg.train_seq_len + 24 * vocab),
             "score" if cfg.ttt != "lora" else "ladder": windows}
    if cfg.ttt == "lora":
        chunk = max(chunk_sizes(cfg.ttt_chunk_size))
        run_tokens = chunk if cfg.ttt_context == "cache" else cfg.eval_seq_len
        sites = [p for p in cfg.ttt_lora_on.split(",") if p]
        outs = dict(q=dim, k=kv_dim, v=kv_dim, o=dim, mlp=dim, head=vocab)
        lora = 16 * cfg.ttt_lora_rank * sum((dim + outs[p]) * (1 if p == "head" else visits) for p in sites)
        cache = visits * 2 * kv_dim * width * cfg.eval_seq_len * (cfg.ttt_context == "cache")
        row = lora + cache + run_tokens * (kept + scores * cfg.eval_seq_len) + chunk * vocab * 12
        found["adapt"] = 3 * weights + cfg.ttt_batch_size * row
    if cfg.ttt == "sgd" or cfg.ttt == "lora" and cfg.phased_ttt_num_phases:
        found["shared_sgd"] = 6 * weights + step
    return {name: int(base + size) for name, size in found.items()}


def checkpoint_bytes(cfg: Config, targets: int) -> int:
    """Size of the larger kind of checkpoint: weights, average, momentum of all; or ledger, weights and momentum."""
    sizes = {name: 4 * p.numel() for name, p in shapes_of(cfg).named_parameters()}
    training = sum(size * (3 if route(name).rule == "muon" else 4) for name, size in sizes.items())
    events = 96 // min(chunk_sizes(cfg.ttt_chunk_size))
    return max(training, 2 * sum(sizes.values()) + targets * (4 + events)) + (1 << 16)


def memory_left(run: Run) -> int:
    """Bytes that this process may still use of its device: of a GPU, or its share of this machine or its limits."""
    if run.is_cuda:
        return torch.cuda.mem_get_info()[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError, IndexError):
        free = 1024 * int(re.findall(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[0])
    with contextlib.suppress(OSError, ValueError):  # of a container
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min(free // run.local_world, limit if limit != resource.RLIM_INFINITY else sys.maxsize)


def lower(cfg: Config, run: Run, name: str, targets: int = 0) -> str:
    """What to set so that memory lasts in the stretch `name`: half of it now, or less where the prediction says so."""
    knob, left, now = MEMORY_KNOBS[name], memory_left(run), cfg
    least = {"micro_batch_tokens": cfg.train_seq_len, "val_batch_tokens": 8 * cfg.eval_seq_len}.get(knob, 1)
    while (value := max(least, getattr(now, knob) // 2 // least * least)) < getattr(now, knob):
        now = dataclasses.replace(now, **{knob: value})
        if predicted_memory(now, run, targets)[name] <= 0.9 * left:
            break
    return f"lower {knob.upper()}={getattr(cfg, knob)}, such as {knob.upper()}={getattr(now, knob)}" \
        if now is not cfg else f"{knob.upper()}={getattr(cfg, knob)} is the least: lower MODEL_DIM={cfg.model_dim} " \
        f"or NUM_LAYERS={cfg.num_layers}"


def resources(cfg: Config, run: Run, targets: int) -> str:
    """Log what memory and disk the run will need, and have; warn of memory, return what the disk surely lacks."""
    predicted, left, kept = predicted_memory(cfg, run, targets), memory_left(run), checkpoint_bytes(cfg, targets)
    artifact = min(cfg.artifact_bytes_cap, sum(predicted_bytes(cfg, 0).values()))
    files = {"artifact": 0 if cfg.eval_only else artifact, "log": 1 << 20,
             "checkpoints": 3 * kept * any(cfg.checkpoint_period)}  # one is written beside the two that are kept
    folder = next(path for path in run.artifact_path.absolute().parents if path.exists())
    free = os.statvfs(folder)
    free, need = free.f_bavail * free.f_frsize, sum(files.values())
    run.log("resources", memory_left_mib=left >> 20, **{f"{name}_mib": size >> 20 for name, size in predicted.items()},
            disk_left_mib=free >> 20, disk_mib=need >> 20, checkpoint_mib=kept >> 20)
    name = max(predicted, key=predicted.get)
    if predicted[name] > left:
        run.log("warning", text=f"{name} may need {predicted[name] >> 20:,} MiB a process, {left >> 20:,} are left: "
                                f"{lower(cfg, run, name, targets)}")
    if need <= free < need + 3 * kept and not any(cfg.checkpoint_period):
        run.log("warning", text=f"{folder}: {free:,} bytes free: a checkpoint of a stopped run may need {kept:,}")
    return "" if free >= need else (
        f"{folder}: {free:,} bytes free, the run needs {need:,} ({', '.join(f'{k} {v:,}' for k, v in files.items())}); "
        f"make room or set ARTIFACT_DIR" + (" or CHECKPOINT_EVERY=0" if any(cfg.checkpoint_period) else ""))


def preflight(cfg: Config, run: Run, code_bytes: int) -> None:
    """Find before training what would stop a later stage: packages, tokenizer, validation shards, folder, disk."""
    problem = ""
    try:
        import brotli  # noqa: F401
        import safetensors  # noqa: F401
        import sentencepiece  # noqa: F401
    except ImportError as error:
        problem = f"package {error.name} is missing; pip install -r requirements.txt"
    run.agree(problem or run.start_mirror())
    pick_codec(cfg.codec)
    if not cfg.caseops_enabled:
        TokenBytes.load(tokenizer_path(cfg), cfg.vocab_size)
    val = TokenStream(cfg.dataset_dir, "fineweb_val")  # headers and sizes only; its tokens wait for the frozen artifact
    if cfg.caseops_enabled:
        TokenStream(cfg.dataset_dir, "fineweb_val_bytes")
    require(code_bytes < cfg.artifact_bytes_cap, f"ARTIFACT_BYTES_CAP={cfg.artifact_bytes_cap}: the code alone takes "
            f"{code_bytes} bytes")
    if run.is_main:
        problem = resources(cfg, run, len(val) - 1)
    run.agree(problem)


def stage_loss(model: GPT, at: Stage, cfg: Config, run: Run) -> Callable[[Batch], Tensor]:
    """The loss that a stage differentiates, compiled where the run compiles."""
    plan = layer_plan(cfg, at.looped)
    weights = functools.partial(RoundedWeights, bank_grids(model, cfg)) if at.rounded else Weights
    return run.compiled(lambda batch: model.total_loss(batch, plan, run.dtype, weights))


def prime(losses: Mapping[Stage, Callable[[Batch], Tensor]], optimizer: ShardedOptimizer, data: TrainData, cfg: Config,
          run: Run) -> None:
    """Run every graph on random tokens and the optimizer at learning rate 0, then forget its momentum.

    Compilation and allocation happen here, outside the clock; the weights do not change by a bit.
    """
    batch = random_batch(data.micro_rows, cfg).to(run.device)
    for at, loss in losses.items():
        for _ in range(cfg.warmup_steps):
            (loss(batch.in_rows(at.seq_len)) / cfg.train_batch_tokens).backward()
            optimizer.step(0.0, 0.0)
    optimizer.reset()


class TrainCheckpoints(Checkpoints):
    """From which training goes on: `<run_id>.ckpt`."""

    KINDS = {"position": dict, "stage": list, "changed": int, "last": float, "elapsed": float, "each": float}

    def __init__(self, model: GPT, optimizer: ShardedOptimizer, ema: Ema, data: TrainData, cfg: Config, run: Run
                 ) -> None:
        super().__init__(run.checkpoint_path, self.KINDS, run)
        self.model, self.optimizer, self.ema, self.data, self.cfg = model, optimizer, ema, data, cfg
        self.saved = 0
        """Step of the last checkpoint."""
        self.skipped = torch.zeros((), dtype=torch.int32, pin_memory=run.is_cuda)
        if run.is_cuda and any(cfg.checkpoint_period):  # allocated before the clock starts
            self.pinned = {name: torch.empty_like(t, device="cpu", pin_memory=True)
                           for name, t in self.tensors().items() if run.is_main}

    def knobs(self) -> dict[str, Any]:
        """Those that decide how training goes on, beside the data's (`TrainData.position`)."""
        names = [f.name for group in (ModelKnobs, OptimizerKnobs, ScheduleKnobs) for f in dataclasses.fields(group)]
        names += ("matrix_bits", "attn_clip_sigmas", "mlp_clip_sigmas") if self.cfg.qat_start < 1 else ()
        return {name: getattr(self.cfg, name) for name in ("train_batch_tokens", *names)
                if name not in ("warmup_steps", "train_log_every", "val_loss_every", "max_skipped_steps")}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by name (a collective)."""
        named = [(name, p.detach()) for name, p in self.model.named_parameters()]
        return {**{f"weights.{name}": p for name, p in named}, **self.optimizer.tensors(),
                **{f"average.{name}": a for (name, _), a in zip(named, self.ema.average)}}

    def poll(self, step: int) -> list[int]:
        """Whether too many steps were skipped, someone wants to stop, a checkpoint is due: all ranks get one answer.

        No wait for the GPU: its count of skipped steps may be that of a while ago.
        """
        self.skipped.copy_(self.optimizer.skipped, non_blocking=True)
        every = self.cfg.checkpoint_period[1]
        due = self.due() or every > 0 and step // every > self.saved // every
        notes = [int(self.skipped) > self.cfg.max_skipped_steps, bool(self.run.stop), due]
        return self.run.total(torch.tensor(notes, dtype=torch.int32)).tolist()

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin to write the state before `step`, with JSON values. A collective."""
        self.saved = step
        self.write(self.tensors(), {**state, "position": self.data.position(step)}, step=step)

    def load(self) -> tuple[int, dict[str, Any]]:
        """The step to go on with, and the state given to `save`; see `read`."""
        here = self.tensors()

        def expected(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
            row = state["position"].get("row")
            if type(row) is not int or row < 0 or len(state["stage"]) != len(Stage._fields):
                raise ValueError("its head is not a checkpoint's")
            return here

        state, found = self.read(expected)
        step = self.saved = self.data.seek(state["position"])
        with torch.no_grad():
            for name, value in here.items():  # what is no view of the live state is loaded below
                here[name] = self.run.broadcast(value.copy_(found[name]) if found else value)
        self.optimizer.load(here)
        return step, state


def train(model: GPT, data: TrainData, cfg: Config, run: Run) -> dict[str, Any]:
    """Train within the budget and leave the averaged weights in the model; returns steps, seconds, last loss."""
    for length, _ in seq_schedule(cfg):
        require(data.micro_rows * cfg.train_seq_len % length == 0, f"TRAIN_SEQ_SCHEDULE={cfg.train_seq_schedule}: a "
                f"forward has {data.micro_rows * cfg.train_seq_len} tokens here, which rows of {length} do not divide; "
                f"change MICRO_BATCH_TOKENS={cfg.micro_batch_tokens} or the schedule")
    losses = {at: stage_loss(model, at, cfg, run) for at in stages(cfg)}
    optimizer = ShardedOptimizer(model, cfg, run)
    with run.phase("prime"):
        prime(losses, optimizer, data, cfg, run)
    primed = run.graphs()["graphs"]
    ema, val = Ema(model, cfg.ema_decay), None
    checkpoints = TrainCheckpoints(model, optimizer, ema, data, cfg, run)
    first, state = checkpoints.load() if run.resumes else (0, {})
    if first:
        run.went_before("train_before", "train", state["elapsed"])

    def keep() -> None:
        checkpoints.save(step, {"changed": changed, "last": last, "stage": list(now), **clock.state(step)})

    with run.phase("train", "train"), run.progress(100, "train", "%") as bar:
        clock = TrainClock(cfg, run, first, state.get("elapsed", 0.0), state.get("each", 0.0))
        step, changed, last = first, state.get("changed", -cfg.seq_change_warmup_steps), state.get("last", math.nan)
        now, loss = Stage(*state.get("stage", stage(cfg, 0.0))), None
        marked = (step, clock.seconds())  # step and seconds at the last log line
        batches, run.graceful = data.steps(step), True
        while (frac := clock.frac(step)) < 1:
            bar.update(100 * frac - bar.n)
            run.place = f"train step {step + 1}"
            if (new := stage(cfg, frac)) != now:
                changed = step if new.seq_len != now.seq_len else changed
                now = new
                run.log("stage", step=step, frac=frac, visits=len(layer_plan(cfg, now.looped)), seq_len=now.seq_len,
                        rounded=now.rounded)
            loss = torch.zeros((), device=run.device)
            for batch in next(batches):
                part = losses[now](batch.to(run.device).in_rows(now.seq_len)) / cfg.train_batch_tokens
                part.backward()
                loss += part.detach()
            scale = lr_scale(cfg, frac) * ramp(step + 1, changed, changed + cfg.seq_change_warmup_steps)
            norm = optimizer.step(scale, muon_momentum(cfg, step))
            ema.update()
            step += 1
            if step <= 5 or step % cfg.train_log_every == 0:
                total, seconds = float(run.total(loss.clone())), clock.seconds()
                each = (seconds - marked[1]) / (step - marked[0])
                rate = cfg.train_batch_tokens / max(each, 1e-9)
                run.log("train", step=step, frac=frac, loss_nats=total, grad_norm=norm.item(),
                        lr_scale=scale, ms_per_step=1000 * each,
                        tok_per_s=int(rate), train_seconds=seconds,
                        **({"skipped": int(optimizer.skipped)} if optimizer.skipped else {}))
                last, marked = total if math.isfinite(total) else last, (step, seconds)
                bar.set_postfix_str(f"step {step}, {total:.3f} nats, {rate:,.0f} tok/s", refresh=False)
            if cfg.val_loss_every and step % cfg.val_loss_every == 0:
                before = run.graphs()["graphs"]
                seen = settled(model, cfg) if now.rounded else contextlib.nullcontext()
                with clock.pause(), run.phase("val_probe"), seen:
                    val = val or ValData.load(cfg, run)
                    score = evaluate(model, val, cfg.eval_seq_len, cfg, run, "probe")
                primed += run.graphs()["graphs"] - before
                run.log("val_probe", step=step, val_loss=score.val_loss, val_bpb=score.val_bpb)
                marked = (step, clock.seconds())
            if step % clock.every == 0:
                diverged, stop, due = checkpoints.poll(step)
                if diverged:
                    known = f"{last:.4f} nats" if math.isfinite(last) else "none"
                    raise DivergedError(
                        f"loss or gradient is not finite at step {step} (frac {frac:.3f}), in {int(optimizer.skipped)} "
                        f"steps so far, MAX_SKIPPED_STEPS={cfg.max_skipped_steps}; last good: {known}; lower "
                        f"MATRIX_LR={cfg.matrix_lr:g} or TIED_EMBED_LR={cfg.tied_embed_lr:g}")
                if stop or due:
                    keep()
                if stop:
                    checkpoints.end_run(f"step {step}")
        batches.close()
        total, seconds = math.nan if loss is None else float(run.total(loss.clone())), clock.seconds()
        last = total if math.isfinite(total) else last
        stop = any(run.gather(run.stop))
        if stop or any(cfg.checkpoint_period):
            keep()
        if stop:
            checkpoints.end_run(f"step {step}")
        # Where no checkpoint has what was trained, `produce` makes the artifact first.
        run.graceful = not any(cfg.checkpoint_period) or bool(run.share(checkpoints.wait()))
    require(step > 0, f"MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds:g} ended before the first step")
    if not all(torch.isfinite(average).all() for average in ema.average):
        raise DivergedError(f"the averaged weights are not finite at step {step}, the last one")
    compiled = run.graphs()
    run.log("train_end", steps=step, loss_nats=last, train_seconds=seconds, graph_breaks=compiled["graph_breaks"],
            recompiles=compiled["graphs"] - primed,
            tokens=step * cfg.train_batch_tokens, reason="iterations" if step >= cfg.iterations else "budget",
            **({"peak_mib": torch.cuda.max_memory_allocated() >> 20} if run.is_cuda else {}))
    ema.load_into_model()
    if now.rounded:
        settle(model, cfg)
    return {"steps": step, "train_loss": last, **({"resumed_at": first} if first else {})}


def produce(cfg: Config, run: Run, model: GPT, code_bytes: int) -> tuple[bytes, dict[str, Any]]:
    """Train, quantize, pack and write: (the artifact as read back from disk, figures for the verdict)."""
    with run.phase("load_train"):
        data, said = TrainData(cfg, run), cfg.dataset_dir / "manifest.json"
        run.log("train_data", shards=len(data.stream.paths), tokens=len(data.stream), rows_a_step=cfg.train_rows,
                rows_a_forward=data.micro_rows, forwards_a_step=data.num_micro, **check_data(data.stream, cfg, run),
                corpus=data.position(0)["corpus"], manifest_sha256=file_sha256(said) if said.is_file() else None)
    figures = train(model, data, cfg, run)
    if cfg.prequant_ttt:
        with run.phase("prequant_ttt", "train"):
            run.log("warning", text=f"this run is illegal: {illegal(cfg)}")
            prequant_ttt(model, cfg, run)
    with run.phase("calibrate", "train"):
        sums = calibrate(model, data, figures["steps"] * cfg.train_rows, cfg, run)
    blob = fit_to_cap(model, sums, code_bytes, cfg, run)
    with run.phase("write"):
        kept = ScoreCheckpoints(blob, model, figures, cfg, run)
        kept.keep()  # before the artifact, which would else look like a finished run's
        kept.wait()
        blob = write_artifact(blob, run.artifact_path, run)
    if any(run.gather(run.stop)):
        kept.end_run("the artifact was written")
    run.graceful = False
    return blob, figures


def judge(blob: bytes, ema: GPT | None, cfg: Config, run: Run, code_bytes: int, figures: dict[str, Any]) -> None:
    """Score the artifact's bytes and log the verdict; `ema` are the weights before quantization, for comparison."""
    with run.phase("load_artifact", "eval"):
        artifact = unpack(blob, cfg.eval_only or str(run.artifact_path))
        model = GPT(artifact.model).to(run.device)
        model.kernels = pick_kernels(cfg, run)
        load_tensors(model, artifact.tensors)
    run.log("artifact", path=str(cfg.eval_only or run.artifact_path), sha256=hashlib.sha256(blob).hexdigest(),
            weight_bytes=len(blob), code_bytes=code_bytes, left_bytes=cfg.artifact_bytes_cap - len(blob) - code_bytes,
            **{f"bytes_{name.replace(':', '_')}": stream.packed for name, stream in artifact.streams.items()})
    for line in size_table(artifact, len(blob), code_bytes):
        run.write(line)
    with run.phase("load_val", "eval"):
        val = ValData.load(cfg, run)
        run.log("val_data", documents=len(val.starts), targets=val.num_targets, bytes=int(val.target_bytes.sum()),
                compressors=manifest(cfg.dataset_dir).get("compressors"))
    kept = ScoreCheckpoints(blob, model, figures, cfg, run)
    if kept.resumed:
        kept.load()
    ladder = kept.state["ladder"]
    strides = {"ema": cfg.eval_seq_len, "quantized": cfg.eval_seq_len, "sliding": cfg.stride}

    def rung(name: str, score: Score) -> None:
        run.log("score", name=name, val_loss=score.val_loss, val_bpb=score.val_bpb)
        ladder[name] = score.val_bpb

    for name in cfg.eval_ladder.split(","):
        if name == "ema" and ema is None and name not in ladder and not cfg.eval_only:
            run.log("warning", text="EVAL_LADDER: no score of ema, whose weights ended with the run before")
        elif name and name not in ladder and (name != "ema" or ema is not None):
            with run.phase(f"score_{name}"):
                score = evaluate(ema if name == "ema" else model, val, strides[name], cfg, run, name)
            rung(name, score)
            kept.keep()
    hints = None
    if cfg.ngram_tilt_enabled:
        with run.phase("ngram", "eval"):
            hints = ngram_hints(torch.from_numpy(val.ids.astype(np.int64)).to(run.device), cfg)
            run.log("ngram", hinted=int((hints.betas > 0).sum()), targets=val.num_targets,
                    right=int((hints.ids.cpu() == torch.from_numpy(val.ids[1:].astype(np.int64)))[
                        (hints.betas > 0).cpu()].sum()))
    with run.phase("score", "eval"):
        scorer = Scorer(val, cfg, run, hints, kept)
        kept.restore(scorer)
        score, digest = adapted_score(model, val, cfg, run, scorer)
        run.graceful = False
    with run.phase("places"):
        if run.is_main:
            run.record("places", by_place(scorer.ledger.nats.numpy(), val.target_bytes, val.starts))
    rung({"none": "sliding" if cfg.eval_stride else "plain"}.get(cfg.ttt, cfg.ttt) +
         ("+ngram" if cfg.ngram_tilt_enabled else ""), score)
    spent = run.seconds()
    run.log("verdict", val_bpb=score.val_bpb, val_loss=score.val_loss, tokens=score.tokens, bytes=score.bytes,
            ladder=ladder, artifact_bytes=len(blob) + code_bytes, weight_bytes=len(blob), code_bytes=code_bytes,
            cap_bytes=cfg.artifact_bytes_cap, train_seconds=round(spent["train"], 3),
            eval_seconds=round(spent["eval"], 3), other_seconds=round(spent["none"], 3),
            total_seconds=round(sum(spent.values()), 3), parameters=sum(p.numel() for p in model.parameters()),
            seed=cfg.seed, run_id=run.run_id, ledger_sha256=digest, order="stream", illegal=artifact.illegal,
            **kept.state["figures"], **({"scored_before": int(scorer.ledger.done.sum())} if kept.resumed else {}))
    run.agree("" if run.logged() else f"{run.log_path}: the disk is full, its verdict is on the screen alone; make room"
              f"{run.goes_on()}")
    kept.remove()


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """The whole program; returns the exit status (0 done, 2 user error, 3 diverged, 128 + the signal that ended it)."""
    is_main = env.get("RANK", "0") == "0"
    if "--help" in arguments or "-h" in arguments:
        print(help_text())
        return 0
    run: Run | None = None
    try:
        require(set(arguments) <= {"--check"}, f"{' '.join(arguments)}: knobs are environment variables, such as "
                f"SEED=42 python train_gpt.py; the only arguments are --help and --check")
        blob, stored = b"", {}
        asked = translate(env, {f.name for f in dataclasses.fields(Config)})[0].get("eval_only")
        if asked:
            path = Path(asked)
            require(path.is_file(), f"EVAL_ONLY={path}: no such file")
            blob = path.read_bytes()
            held = unpack(blob, str(path))
            stored = {**dataclasses.asdict(held.model), "preset": held.preset}
        cfg, warnings = Config.from_env(env, stored)
        checking = "--check" in arguments
        with Run(cfg, env, log=not checking) as run:
            if checking:
                return check(cfg, run, warnings, len(shipped_source(Path(__file__))))
            with memory_watched(cfg, run), run.phase("setup"):
                code_bytes = len(shipped_source(Path(__file__)))
                model = build_model(cfg, run)
                describe(cfg, model, run, warnings, code_bytes)
                preflight(cfg, run, code_bytes)
            with memory_watched(cfg, run):
                if not blob and run.resumes == "score":
                    blob = run.share(run.artifact_path.read_bytes() if run.is_main else b"")
                if blob:
                    judge(blob, None, cfg, run, code_bytes, {})
                else:
                    blob, figures = produce(cfg, run, model, code_bytes)
                    judge(blob, model, cfg, run, code_bytes, figures)
            return 0
    except UserError as error:
        if is_main or run is not None or isinstance(error, LocalError):
            print(f"train_gpt.py: {'' if is_main else 'rank ' + env['RANK'] + ': '}{error}", file=sys.stderr)
        return error.exit_code


@contextlib.contextmanager
def memory_watched(cfg: Config, run: Run) -> Iterator[None]:
    """What says inside that there is no memory becomes `MemoryGoneError`: phase, and the knob to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError; a CPU's has no name
        text = (str(error) or "-").splitlines()[0]
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in text:
            raise
        run.until_saved()
        phase = run.place.split()[0]
        names = {"prime": "train", "val_probe": "ladder", "shared_sgd": "shared_sgd",
                 "score": "adapt" if cfg.ttt == "lora" else "score"}
        name = names.get(phase, "train" if phase == "train" else "ladder" if phase.startswith("score_") else "fit")
        name = name if name in predicted_memory(cfg, run, 0) else "score"
        remedy = "set NGRAM_TILT_ENABLED=0" if phase == "ngram" else lower(cfg, run, name)
        raise MemoryGoneError(f"out of {'GPU ' * run.is_cuda}memory in phase {run.place}: {remedy} ({text})"
                              f"{run.goes_on()}") from error


def check(cfg: Config, run: Run, warnings: Sequence[str], code_bytes: int) -> int:
    """`--check`: config, layer plan, routes, predicted size and the state of the data; trains nothing."""
    describe(cfg, shapes_of(cfg), run, warnings, code_bytes)
    sizes = predicted_bytes(cfg, code_bytes)
    run.log("predicted", total_bytes=sum(sizes.values()) + code_bytes, code_bytes=code_bytes,
            cap_bytes=cfg.artifact_bytes_cap, **{f"bytes_{k.replace(':', '_')}": v for k, v in sizes.items()})
    try:
        tokens = {split: len(TokenStream(cfg.dataset_dir, f"fineweb_{split}")) for split in ("train", "val")}
        run.log("data", path=str(cfg.dataset_dir), **tokens)
    except UserError as error:
        run.log("warning", text=f"data is not ready: {error}")
        tokens = {"val": 1}
    problem = resources(cfg, run, tokens["val"] - 1)
    if problem:
        run.log("warning", text=problem)
    return 0


if __name__ == "__main__":
    faulthandler.enable()  # a mapped shard that shrinks is a bus error: say where
    sys.exit(main(sys.argv[1:], os.environ))
