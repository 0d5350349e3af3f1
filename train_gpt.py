"""train_gpt.py -- train a small language model, shrink it to 16,000,000 bytes, and score it from those bytes.

    ./run.sh                                                 set up, make demo data, run the demo on a CPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py    the `record` preset on 8 GPUs
    PRESET=demo python train_gpt.py                          every stage on a CPU, in minutes
    EVAL_ONLY=logs/<run>.bin python train_gpt.py             score an artifact again; needs no training data
    python train_gpt.py --help                               every knob

Every knob is an environment variable (section 1). Data comes from `./run.sh data`; the files that a run leaves are
`logs/<run_id>.txt`, `.jsonl` and `.bin` (the artifact).

  1 Config       every number that can change a result      7 Optimizer     update rules, then communication
  2 Run          ranks, device, log, clock, checkpoint      8 Schedule      functions of the used budget
  3 Data         shards -> rows -> batches                  9 Quantization  what errors cost, scales, GPTQ
  4 Score        bytes of a token, bits per byte           10 Artifact      tensors <-> bytes, fit to the cap
  5 Kernels      references and fused implementations      11 Evaluation    windows, adaptation, tilt: one scorer
  6 Model        unrolled layers, one forward              12 Train, main   the story, in order

Shape letters: R rows of a batch, T tokens of a row, D model width, N query heads, K key/value heads, H head width,
F MLP width, V vocabulary, L stored blocks, S document segments, M = R*T tokens; O x I is a matrix (output, input).
Words: a *block* is stored, a *layer* is one execution of a block; *bytes* are UTF-8 bytes of text; losses in *nats*.
"""
from __future__ import annotations

import ast
import bisect
import collections
import contextlib
import datetime
import difflib
import faulthandler
import fnmatch
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import struct
import sys
import textwrap
import time
import tokenize
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

# ======== 1 Config: every number that can change a result
# One frozen dataclass, flat to its readers; each group of knobs is a base class, so that the model can be handed the
# model's knobs alone (they travel in the artifact). A knob is one line: its environment name is the field in capitals,
# the annotation bounds it, the comment is its documentation: `--help` and docs/knobs.md are made from it. The defaults
# are the preset `record`: record #1855 (2026-04-27), except where a comment says otherwise. Names follow the records.
# Nothing here needs torch: a command line is judged before it is imported, which takes seconds.
# Safe to change: any default; to add a knob, add a field and read it somewhere (a test looks for the reader).

class UserError(Exception):
    """Something that the user can repair. Printed as one line; `exit_code` becomes the exit status."""
    exit_code = 2

class Stopped(BaseException):
    """A signal asked the run to end. No `Exception`: a compiler that is at work would wrap or swallow it."""

class DivergedError(UserError):
    """The loss is not finite any more."""
    exit_code = 3

class LocalError(UserError):
    """A mistake that this rank alone knows of: it prints the line itself."""

def require(ok: bool, message: str, kind: type = UserError):
    """Raises `kind(message)` unless `ok`; an AssertionError says that a promise of ours is broken."""
    if not ok:
        raise kind(message)

def one_line(text: object) -> str:
    """Text of a foreign file as it may be shown: no control characters, 300 characters at most."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:300])

class Bound(NamedTuple):
    """What a number may be: the words of the error, and the test."""
    text: str
    holds: Callable

Count = Annotated[int, Bound("0 or more", lambda x: x >= 0)]
Size = Annotated[int, Bound("at least 1", lambda x: x >= 1)]
Bits = Annotated[int, Bound("2..8 bits", lambda x: 2 <= x <= 8)]
NonNegative = Annotated[float, Bound("0 or more", lambda x: 0 <= x < math.inf)]
Positive = Annotated[float, Bound("a positive number", lambda x: 0 < x < math.inf)]
Share = Annotated[float, Bound("a fraction, 0..1", lambda x: 0 <= x <= 1)]
Decay = Annotated[float, Bound("0 <= value < 1", lambda x: 0 <= x < 1)]

FileName = Annotated[str, Bound("a file name of at most 200 bytes",
                               lambda text: "/" not in text and len(os.fsencode(text)) <= 200)]

def some_of(names: str) -> Callable:
    """A test for lists of different ones of these names, with commas between them; they may be empty."""
    return lambda text: not text or len(parts := text.split(",")) == len(set(parts) & set(names.split(",")))

Evals = Annotated[str, Bound("some of ema,quantized,sliding", some_of("ema,quantized,sliding"))]
Sites = Annotated[str, Bound("some of q,k,v,o,mlp,head", some_of("q,k,v,o,mlp,head"))]

kinds = functools.cache(functools.partial(typing.get_type_hints, include_extras=True))  # class -> {field: annotation}

WORDS = {bool: "0 or 1", int: "an integer", float: "a number", str: "text"}
READERS = {bool: {"0": False, "1": True}.__getitem__, int: int, float: float, str: str}

def parse(name: str, kind: Any, text: str) -> Any:
    """The value of one variable. Booleans are 0 or 1 only; integers may have underscores."""
    plain = type(typing.get_args(kind)[0]) if typing.get_origin(kind) is Literal else getattr(kind, "__origin__", kind)
    try:
        return READERS[plain](text.strip())
    except (ValueError, KeyError):
        raise UserError(f"{name.upper()}={text!r}: expected {WORDS[plain]}") from None

def expectation(kind: Any) -> str:
    """What a knob with this annotation takes, in words."""
    choices, bounds = typing.get_args(kind), getattr(kind, "__metadata__", None)
    if bounds:
        return bounds[0].text
    return "one of " + ", ".join(map(str, choices)) if choices else WORDS[kind]

@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Settings that are held against their annotations when they are made."""

    def __post_init__(self):
        for name, kind in kinds(type(self)).items():
            value, choices, bounds = getattr(self, name), typing.get_args(kind), getattr(kind, "__metadata__", ())
            fits = value in choices if typing.get_origin(kind) is Literal else all(b.holds(value) for b in bounds)
            self.expect(name, fits, expectation(kind))

    def expect(self, name: str, ok: bool, text: str):
        """Raises `UserError` with the knob's name, its value and what was expected, unless `ok`."""
        require(ok, f"{name.upper()}={show(getattr(self, name))}: expected {text}")

@dataclass(frozen=True, kw_only=True)
class RunKnobs(Knobs):
    """Run: what to do, where, and what to leave behind"""
    preset: Literal["record", "demo"] = "record"  # set of defaults: record (8xH100) or demo (a laptop CPU)
    seed: Annotated[int, Bound("0..2^63-1", lambda x: 0 <= x < 2**63)] = 1337  # of the initial weights and data order
    run_id: FileName = ""  # name of the log and artifact files; empty: preset, date, time and seed
    log_dir: str = "logs"  # folder of the logs and of the artifact <run_id>.bin
    eval_only: str = ""  # an artifact to score instead of training; the model's knobs then come from it
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is a GPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; auto: bfloat16 on CUDA and CPUs with AMX
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on CUDA (a CPU needs minutes for a graph)
    attention: Literal["auto", "sdpa", "varlen", "fa3", "fa4"] = "auto"  # auto: the fastest here (section 5)
    kernels: Literal["auto", "triton", "plain"] = "auto"  # MLP; auto: on a GPU in bfloat16 the faster
    dist_timeout_seconds: Positive = 900.0  # a collective that takes longer ends the run
    checkpoint_every: Count = 0  # steps between checkpoints; 0: only on a signal
    resume: Literal["0", "1", "auto"] = "0"  # go on with the training of RUN_ID; auto: where it has a checkpoint

@dataclass(frozen=True, kw_only=True)
class DataKnobs(Knobs):
    """Data: where the tokens are and how they become batches"""
    data_dir: str = "./data"  # root that holds datasets/ and tokenizers/
    data_path: str = ""  # folder of the shards; empty: by VOCAB_SIZE and CASEOPS_ENABLED in DATA_DIR/datasets
    tokenizer_path: str = ""  # SentencePiece model; empty: the manifest's, else by VOCAB_SIZE in DATA_DIR/tokenizers
    caseops_enabled: bool = False  # bytes are those of fineweb_val_bytes_*.bin; unset: as the data say (#1855: 1)
    train_seq_len: Size = 2048  # tokens of a training row; longer documents are cut
    train_batch_tokens: Size = 786_432  # tokens of one optimizer step over all ranks
    micro_batch_tokens: Size = 98_304  # most tokens of one forward and backward on one device; more are accumulated
    shuffle: Literal["window", "none"] = "window"  # window: each epoch permutes the rows, from a random phase

@dataclass(frozen=True, kw_only=True)
class ModelKnobs(Knobs):
    """Model: shape and topology (stored in the artifact)"""
    vocab_size: Annotated[int, Bound("3..65536 (ids are uint16)", lambda x: 2 < x <= 65_536)] = 8192  # vocabulary V
    num_layers: Annotated[int, Bound("2..1024", lambda x: 2 <= x <= 1024)] = 11  # stored blocks L
    model_dim: Size = 512  # width D of the residual stream
    num_heads: Size = 8  # query heads N; head width H = D / N must be even
    num_kv_heads: Size = 4  # key/value heads K; must divide NUM_HEADS
    mlp_mult: Positive = 4.0  # MLP width F as a multiple of D
    mlp_slope: Share = 0.5  # slope below zero of LeakyReLU(x)^2 (#493, #549)
    ln_scale: bool = True  # the inputs of block i are scaled by 1/sqrt(i+1) (#315)
    rope_base: Positive = 10_000.0  # base of the rotary frequencies
    rope_dims: Count = 16  # dimensions of each head that rotate (partial RoPE, #315); 0: none
    qk_gain_init: NonNegative = 5.0  # initial learned gain of each query head after QK norm (#1413)
    xsa_last_n: Count = 11  # blocks from the last whose attention output loses its own value's direction (XSA, #265)
    attn_gate: Literal["none", "output", "sparse", "dense"] = "sparse"  # on each head's output (#1667, #1787, #1736)
    gated_attn_bias: NonNegative = 0.0  # dense gate: initial bias, with weights at zero (2.94: gate 0.95); 0: no bias
    smear_gate_enabled: bool = True  # a learned share of the previous token's embedding is added (#1667, #1851)
    loop_start: Count = 3  # first block of the depth recurrence
    loop_end: Count = 5  # last block of it, inclusive
    num_loops: Annotated[int, Bound("0..64", lambda x: 0 <= x <= 64)] = 2  # extra passes over these; 0: no recurrence
    skip_gates_enabled: bool = True  # U-Net skips are mixed in by a learned gate; 0: added
    parallel_residual: Literal["none", "single", "two"] = "two"  # attention beside MLP on one lane (#1412) or two
    parallel_start_layer: Count = 8  # first block of the parallel residuals (#1529)
    logit_softcap: Positive = 30.0  # logits are c * tanh(z / c)
    tied_embed_init_std: NonNegative = 0.005  # of the initial embedding, which is also the output matrix
    bigram_buckets: Annotated[int, Bound("0 or 2 and more", lambda x: x == 0 or x > 1)] = 0  # of BigramHash; 0: none
    bigram_dim: Size = 112  # width of the bigram embedding before its projection to D
    conv_taps: Count = 4  # tokens that convolutions of keys, values and MLP inputs read (#400: 4; #1855: 0)

    def __post_init__(self):
        super().__post_init__()
        heads, layers, head_dim = self.num_heads, self.num_layers, self.head_dim
        self.expect("model_dim", self.model_dim % (2 * heads) == 0, f"a multiple of 2 * NUM_HEADS = {2 * heads}")
        self.expect("num_kv_heads", heads % self.num_kv_heads == 0, f"a divisor of NUM_HEADS={heads}")
        self.expect("rope_dims", self.rope_dims % 2 == 0 and self.rope_dims <= head_dim,
                    f"an even number up to the head width {head_dim}")
        self.expect("mlp_mult", self.mlp_dim >= 2, "an MLP of at least two units")
        self.expect("loop_start", self.num_loops == 0 or self.loop_start <= self.loop_end < layers,
                    f"start <= LOOP_END={self.loop_end} < NUM_LAYERS={layers}; NUM_LOOPS=0 turns the recurrence off")
        self.expect("parallel_start_layer", self.parallel_residual == "none" or self.parallel_start_layer < layers,
                    f"less than NUM_LAYERS={layers}; PARALLEL_RESIDUAL=none turns parallel residuals off")
        inside = self.loop_start < self.parallel_start_layer <= self.loop_end and self.num_loops > 0
        self.expect("parallel_start_layer", not inside or self.parallel_residual != "two",
                    f"a block outside the loop {self.loop_start}..{self.loop_end}: two lanes cannot be left again")

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

@dataclass(frozen=True, kw_only=True)
class OptimizerKnobs(Knobs):
    """Optimizer: who learns how fast"""
    matrix_lr: NonNegative = 0.026  # peak rate of Muon (matrices), in units of the update's spectral norm
    scalar_lr: NonNegative = 0.02  # peak rate of AdamW for gains, gates, skips and other small parameters
    tied_embed_lr: NonNegative = 0.03  # peak rate of AdamW for the embedding
    muon_momentum: Decay = 0.97  # Nesterov momentum of Muon after its warm-up (#1514)
    muon_momentum_warmup_start: Decay = 0.92  # Muon's momentum at step 0
    muon_momentum_warmup_steps: Count = 1500  # steps over which it rises
    muon_coefficients: Literal["polar", "classic"] = "polar"  # Polar Express (#1344) or Jordan et al. 2024
    muon_backend_steps: Annotated[int, Bound("1..5", lambda x: 1 <= x <= 5)] = 5  # Newton-Schulz steps
    muon_row_normalize: bool = True  # rows of the update are normalised before Newton-Schulz (MuonEq-R, #1217)
    muon_wd: NonNegative = 0.095  # decoupled weight decay of the matrices
    embed_wd: NonNegative = 0.085  # of the embedding
    adam_wd: NonNegative = 0.02  # of the small parameters
    beta2: Decay = 0.99  # second-moment decay of AdamW
    grad_clip_norm: NonNegative = 0.3  # largest global gradient norm, of the sum over ranks; 0: no clipping
    ema_decay: Decay = 0.9965  # of the averaged weights that are shipped, per step (#287); 0: ship the last ones

@dataclass(frozen=True, kw_only=True)
class ScheduleKnobs(Knobs):
    """Schedule: the budget and what happens when"""
    max_wallclock_seconds: NonNegative = 600.0  # budget of training plus GPTQ; 0: train ITERATIONS steps, reproducibly
    gptq_reserve_seconds: NonNegative = 8.0  # part of it kept for calibration and GPTQ (#1868: 8; records 0.5 to 13)
    iterations: Size = 20_000  # most optimizer steps; the whole budget when MAX_WALLCLOCK_SECONDS=0
    warmdown_frac: Share = 0.85  # final fraction of the budget over which the rates fall linearly
    min_lr: Share = 0.1  # floor of the rates as a fraction of their peak
    enable_looping_at: Share = 0.35  # fraction of the budget at which the depth recurrence starts (#1420)
    qat_start: Share = 1.0  # fraction from which training sees matrices rounded as QUANT=sdclip stores them; 1: never
    warmup_steps: Count = 20  # passes over each graph before the clock starts; weights and optimizer stay untouched
    train_log_every: Size = 500  # steps between log lines (the first five are always logged)
    val_loss_every: Count = 0  # steps between validations of the live weights, outside the clock; 0: never

@dataclass(frozen=True, kw_only=True)
class QuantKnobs(Knobs):
    """Quantization: how many bytes each matrix gets"""
    quant: Literal["sdclip", "waterfill"] = "waterfill"  # scales by a row's deviation (#1394), or by equal cost
    bits_per_weight: Positive = 5.0  # waterfill: most bits of a nonzero weight on average; fewer where the cap binds
    trellis_states: Literal[1, 4] = 4  # waterfill: states of the trellis that a row's codes follow; 1: plain rounding
    matrix_bits: Bits = 6  # sdclip: bits of attention and MLP codes; 2 is ternary (clips near 1.2, QAT_START)
    n_int6_layers: Count = 0  # sdclip: only so many matrices get MATRIX_BITS, by Hessian trace (#1260); 0: all
    embed_bits: Bits = 7  # sdclip: bits of the embedding's codes
    attn_clip_sigmas: Positive = 13.0  # sdclip: standard deviations that a row's largest code stands for, in attention
    mlp_clip_sigmas: Positive = 11.5  # in the MLP
    embed_clip_sigmas: Positive = 14.0  # in the embedding
    gptq_calibration_batches: Size = 16  # batches of MICRO_BATCH_TOKENS for the Hessians, over all ranks together
    artifact_bytes_cap: Size = 16_000_000  # code plus weights may not exceed this; scales grow until they fit

@dataclass(frozen=True, kw_only=True)
class EvalKnobs(Knobs):
    """Evaluation: how the score is taken"""
    eval_seq_len: Size = 2048  # longest context of a scored token
    eval_stride: Count = 64  # sliding windows advance by so many targets (#122); 0: whole windows
    diagnostic_evals: Evals = "ema,quantized"  # scores for comparison, outside the budget; sliding is the third
    eval_seconds_budget: Positive = 600.0  # from opening the artifact; nothing adapts while the projected end is later
    val_batch_tokens: Size = 524_288  # ids of one evaluation batch over eight devices; a device takes an eighth
    ttt: Literal["none", "lora", "sgd"] = "lora"  # adaptation: adapters a document (#1530), or the whole model (#549)
    ttt_context: Literal["recompute", "cache"] = "recompute"  # lora: run the context again, or keep keys, values
    ttt_chunk_size: Size = 48  # lora: targets scored before each step of the adapters
    ttt_batch_size: Size = 64  # lora: most documents side by side on one device; changes speed only
    ttt_lora_on: Sites = "q,k,v,o,mlp,head"  # lora: what gets adapters
    ttt_lora_rank: Size = 80  # lora: rank of the adapters
    ttt_lora_alpha: NonNegative = 144.0  # lora: adapters are multiplied by this over their rank
    ttt_lora_lr: NonNegative = 0.0002  # lora: rate of the adapters' AdamW, for B (#1530: 0.0001)
    ttt_lora_a_share: NonNegative = 0.2  # lora: rate of A as a share of B's (LoRA+, Hayou et al. 2024; #1530: 1)
    ttt_eps: Positive = 0.001  # lora: its epsilon: smaller gradients, as of absent pieces, move less (#1530: 1e-10)
    ttt_weight_decay: NonNegative = 0.5  # lora: its weight decay
    phased_ttt_num_phases: Count = 3  # lora: times that the shared weights learn from what is scored (#1626); 0: never
    phased_ttt_prefix_docs: Count = 2500  # lora: these first documents of the stream are divided into the phases
    global_ttt_lr: NonNegative = 0.001  # lora: rate of the shared weights' SGD, falling as a cosine over its chunks
    ttt_chunk_tokens: Size = 32_768  # shared SGD: targets of a chunk; TTT=sgd scores it before it learns from it
    ttt_epochs: Count = 3  # sgd: passes over each chunk
    ttt_lr: NonNegative = 0.005  # sgd: rate, falling to 0 as a cosine over the chunks
    ngram_base_beta: NonNegative = 0.0  # tilt in nats towards what followed the same ids before (#1420: 2); 0: none
    ngram_rules: str = "8:0.7:3,10:0.7:3,12:0.6:2,14:0.5:2,16:0.5:2"  # its contexts, length:least share:least count
    ngram_beta_by_share: bool = True  # the tilt is multiplied by the share of the hint (#1514); 0: constant (#2135)

GROUPS = (RunKnobs, DataKnobs, ModelKnobs, OptimizerKnobs, ScheduleKnobs, QuantKnobs, EvalKnobs)

# Knobs beside the model's that decide a score (rows of training are those of shared SGD): the artifact holds those that
# are not its preset's.
SCORE_KNOBS = frozenset([*EvalKnobs.__annotations__, "seed", "caseops_enabled", "train_seq_len", "train_batch_tokens",
                         "micro_batch_tokens"]) - {"diagnostic_evals"}
# Knobs that say where files are or when they are written: runs that differ in them alone have one config_sha256.
NO_RESULT = frozenset("run_id log_dir data_dir data_path tokenizer_path eval_only resume checkpoint_every "
                      "dist_timeout_seconds".split())

# The demo is small because two CPU cores learn more in three minutes from many steps than from large ones; a hashed
# bigram table, adapters and hints from short contexts do most of the rest. Figures in docs/LOG.md (2026-11-28).
PRESETS: dict[str, dict] = {
    "record": {},
    "demo": dict(
        data_path="data/datasets/demo_sp1024", train_seq_len=256, train_batch_tokens=1024, micro_batch_tokens=1024,
        vocab_size=1024, num_layers=2, model_dim=96, num_heads=4, num_kv_heads=2, xsa_last_n=2,
        num_loops=0, ln_scale=False, parallel_residual="single", parallel_start_layer=1, qk_gain_init=3.0,
        tied_embed_init_std=0.02, bigram_buckets=32768, bigram_dim=64, matrix_lr=0.018, scalar_lr=0.02,
        tied_embed_lr=0.01, muon_momentum=0.9, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=50,
        ema_decay=0.97, max_wallclock_seconds=185.0, gptq_reserve_seconds=8.0, warmup_steps=1, train_log_every=20,
        gptq_calibration_batches=16, eval_seq_len=256, eval_stride=64, val_batch_tokens=65536,
        diagnostic_evals="quantized", eval_seconds_budget=75.0, ttt_context="cache", ttt_chunk_size=32,
        ttt_lora_rank=32, ttt_lora_alpha=32.0, ttt_lora_lr=0.004, phased_ttt_num_phases=0, ngram_base_beta=3.0,
        ngram_rules="2:0.5:2,3:0.5:1,4:0.5:1,6:0.5:1,8:0.5:1,12:0.5:1,16:0.5:1"),
}

# First words that only this field's knobs have: a stranger with one of them is a misspelt knob, or a published name.
KNOB_PREFIXES = tuple("ATTN_ BIGRAM_ CONV_ EMBED_ EVAL_ GATED_ GLOBAL_TTT_ GPTQ_ GRAD_CLIP LOOP_ LQER_ MATRIX_ MLP_ "
                      "MUON_ NGRAM_ NORMUON_ PARALLEL_FINAL PARALLEL_RES PARALLEL_START PHASED_ PREQUANT_ QK_ ROPE_ "
                      "SMEAR_ SPARSE_ TIED_EMBED TRAIN_BATCH TRAIN_SEQ TTT_ VAL_LOSS WARMDOWN_ XSA_".split())

@dataclass(frozen=True, kw_only=True)
class Config(EvalKnobs, QuantKnobs, ScheduleKnobs, OptimizerKnobs, ModelKnobs, DataKnobs, RunKnobs):
    """Every knob of a run. Build it with `Config.from_env`; it never changes afterwards."""

    def __post_init__(self):
        super().__post_init__()
        rows, wallclock = self.train_seq_len, self.max_wallclock_seconds
        self.expect("n_int6_layers", not self.n_int6_layers or self.matrix_bits > 2, f"0 with MATRIX_BITS="
                    f"{self.matrix_bits}: the others get one bit less, and 2 is the least")
        self.expect("qat_start", self.qat_start == 1 or self.quant == "sdclip" and not self.n_int6_layers,
                    "1 unless QUANT=sdclip N_INT6_LAYERS=0, whose scales training knows")
        self.expect("train_batch_tokens", self.train_batch_tokens % rows == 0, f"a multiple of TRAIN_SEQ_LEN={rows}, "
                    f"such as {max(1, round(self.train_batch_tokens / rows)) * rows}")
        self.expect("micro_batch_tokens", self.micro_batch_tokens >= rows, f"at least one row of TRAIN_SEQ_LEN={rows}")
        self.expect("eval_stride", self.eval_stride <= self.eval_seq_len, f"at most EVAL_SEQ_LEN={self.eval_seq_len}")
        self.expect("ttt_lora_on", bool(self.ttt_lora_on), "some of q,k,v,o,mlp,head; TTT=none adapts nothing")
        self.expect("ttt_chunk_size", self.ttt_chunk_size <= self.eval_seq_len or self.ttt != "lora",
                    f"at most EVAL_SEQ_LEN={self.eval_seq_len}, one forward")
        ngram_rules(self.ngram_rules)
        self.expect("gptq_reserve_seconds", wallclock == 0 or self.gptq_reserve_seconds < wallclock,
                    f"less than MAX_WALLCLOCK_SECONDS={wallclock:g}: something to train in")
        self.expect("resume", self.resume == "0" or bool(self.run_id) and not self.eval_only,
                    "RUN_ID of the run whose training goes on; EVAL_ONLY scores an artifact from the start")

    @property
    def dataset_dir(self) -> Path:
        export = {False: f"fineweb10B_sp{self.vocab_size}",
                  True: "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"}[self.caseops_enabled]
        return Path(self.data_path or Path(self.data_dir) / "datasets" / export)

    @property
    def train_rows(self) -> int:
        """Rows of one optimizer step over all ranks."""
        return self.train_batch_tokens // self.train_seq_len

    @property
    def stride(self) -> int:
        """Targets by which sliding windows advance; whole windows where EVAL_STRIDE=0."""
        return self.eval_stride or self.eval_seq_len

    def changed(self) -> dict:
        """The knobs that are not the preset's, with their values."""
        return {name: value for name, value in vars(self).items()
                if value != PRESETS[self.preset].get(name, getattr(Config, name))}

    def grid(self, family: str) -> tuple:
        """(bits, clip in standard deviations) of SDClip's codes of one family of matrices: attn, mlp or embed."""
        return {"attn": (self.matrix_bits, self.attn_clip_sigmas), "mlp": (self.matrix_bits, self.mlp_clip_sigmas),
                "embed": (self.embed_bits, self.embed_clip_sigmas)}[family]

    @classmethod
    def from_env(cls, env: Mapping, stored: Mapping | None = None) -> Config:
        """The config of a preset, then what an artifact has `stored` (EVAL_ONLY), then variables.
        Raises `UserError` for a value that does not parse, an impossible combination, and a variable that looks
        like a knob but is none.
        """
        stored, names = dict(stored or {}), kinds(cls)
        known = [name.upper() for name in names]
        for name in sorted(set(env) - set(known)):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.905 if len(name) > 10 else 0.88)
            near = near * (name not in ("COMPILER", "TYPE"))  # these are a build system's
            near += [name.upper()] * (name.upper() in known and "_" in name)  # matrix_lr
            require(not near and not name.startswith(KNOB_PREFIXES), f"{name}={env[name]}: no such knob; did you mean "
                    f"{''.join(near or difflib.get_close_matches(name, known, n=1, cutoff=0))}? (--help lists them; "
                    f"`./run.sh train` translates the names that published commands use)")
        typed = {name: parse(name, kind, env[name.upper()]) for name, kind in names.items() if name.upper() in env}
        preset = typed.get("preset", stored.get("preset", "record"))
        require(preset in PRESETS, f"PRESET={preset}: expected {expectation(names['preset'])}")
        for name in set(typed) & set(stored) & set(kinds(ModelKnobs)):
            require(typed[name] == stored[name],
                    f"{name.upper()}={show(typed[name])}: the artifact was made with {show(stored[name])}; unset it")
        return cls(**{**PRESETS[preset], **stored, "preset": preset, **typed})

def ngram_rules(rules: str) -> list[tuple]:
    """NGRAM_RULES as (context length, least share, least count)."""
    try:
        parsed = [(int(n), float(share), int(count)) for n, share, count in (r.split(":") for r in rules.split(","))]
    except ValueError:
        parsed = [(0, 0.0, 0)]
    require(all(1 <= n <= 64 and 0 < share <= 1 and count >= 1 for n, share, count in parsed)
            and len({n for n, _, _ in parsed}) == len(parsed),
            f"NGRAM_RULES={rules}: expected length:share:count, ... such as 8:0.7:3,16:0.5:2 (lengths 1..64)")
    return parsed

def show(value: Any) -> str:
    """A knob's value as one would type it."""
    if isinstance(value, float):
        return min(f"{value:g}", repr(value), key=lambda text: (float(text) != value, len(text)))
    return str(int(value) if isinstance(value, bool) else value)

def help_text() -> str:
    """What `--help` prints: the lines of the groups of knobs, as they stand in the source."""
    out = [f"usage: [KNOB=value ...] python train_gpt.py [--help]; presets: {', '.join(PRESETS)}"]
    lines = Path(__file__).read_text(encoding="latin-1").splitlines()  # a packed script has no comments, nor UTF-8
    docs = {line.split(":")[0].strip(): line.partition("  # ")[2] for line in reversed(lines) if line[4:5].isalpha()}
    for group in GROUPS:
        out += ["", str(group.__doc__)]
        for name, kind in kinds(group).items():
            out += [f"  {name.upper()}={show(getattr(group, name))}  ({expectation(kind)})",
                    f"      {docs.get(name, '')}"]
    return "\n".join(out)

def configure(arguments: Sequence[str], env: Mapping, stored: Mapping | None = None) -> Config:
    """The config that a command line asks for; `--help` prints the knobs and ends the program."""
    if set(arguments) & {"--help", "-h"}:
        print(help_text())
        sys.exit(0)
    require(not arguments, f"{' '.join(arguments)}: knobs are environment variables, such as SEED=42 python "
            f"train_gpt.py; the only argument is --help")
    return Config.from_env(env, stored)

def complain(error: UserError | Stopped, env: Mapping) -> int:
    """Prints an error as one line, once for all ranks; returns the exit status."""
    if env.get("RANK", "0") == "0" or isinstance(error, LocalError):
        print(f"train_gpt.py: {error}", file=sys.stderr)
    return error.exit_code

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # a terminal may know ASCII alone
    if sys.argv[1:]:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # --help | head
    # What libraries read once, before they are imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # threads that spin a little: 1.3 x on a CPU (LOG 2026-11-22)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # a GPU's memory in pieces that grow
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # NCCL's flight recorder: which collective a lost rank left
    try:
        if not os.environ.get("EVAL_ONLY"):  # whose knobs lie in the artifact
            configure(sys.argv[1:], os.environ)
    except UserError as early:
        sys.exit(complain(early, os.environ))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# ======== 2 Run: where this process runs; the only section that talks to other processes
# With one process every collective is the identity, so the code above it has one path. Ranks come from torchrun.
# Every second between start and end belongs to a phase (`run.phase`), each charged to training, evaluation or neither;
# the verdict adds them up. Only rank 0 writes. Collectives of CPU tensors go over gloo also where the model is on
# GPUs, so that a number can be agreed upon without waiting for the GPU.
# Safe to change: what is logged. Not safe: a collective that only some ranks reach.

class Ranks:
    """This process among the others, and what they say to each other. Raises `LocalError` for a rank without a GPU."""

    def __init__(self, cfg, env: Mapping):
        told = {name: env.get(name, default) for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"),
                                                                   ("WORLD_SIZE", "1"))}
        words = " ".join(f"{name}={value}" for name, value in told.items())
        require(all(value.isdecimal() for value in told.values()) and int(told["RANK"]) < int(told["WORLD_SIZE"]),
                f"{words}: expected numbers, and a rank below the world's size, as torchrun sets them", LocalError)
        self.rank, self.world = int(told["RANK"]), int(told["WORLD_SIZE"])
        self.is_main, self.is_cuda, self.device = self.rank == 0, False, torch.device("cpu")
        if cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available()):
            local, count = int(told["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= count:
                raise LocalError(f"DEVICE={cfg.device}: no GPU for local rank {local}, torch sees {count}; lower "
                                 f"--nproc_per_node, or set DEVICE=cpu")
            self.is_cuda, self.device = True, torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        if self.world > 1:
            require(bool(env.get("MASTER_ADDR") and env.get("MASTER_PORT")),
                    f"{words}: MASTER_ADDR or MASTER_PORT is missing; start with torchrun, or unset these", LocalError)
            limit = datetime.timedelta(seconds=cfg.dist_timeout_seconds)
            store = next(dist.rendezvous("env://", timeout=limit))[0]
            # A restart of torchrun finds the store of the attempt before it: gloo would call ports that are closed.
            store = dist.PrefixStore(f"attempt{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.is_cuda else "gloo", store=store, rank=self.rank,
                                    world_size=self.world, timeout=limit)
        else:  # every collective is the identity
            self.all_reduce = self.broadcast = self.broadcast_object = lambda value: value
            self.reduce_scatter = self.all_gather = lambda value: lambda: value
            self.all_gather_object = lambda value: [value]

    def all_reduce(self, t: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        dist.all_reduce(t)
        return t

    def broadcast(self, t: Tensor) -> Tensor:
        """Rank 0's values on every rank, in place."""
        dist.broadcast(t, src=0)
        return t

    def reduce_scatter(self, full: Tensor) -> Callable:
        """Starts to sum `full` [W*k, ...] over ranks; the function returned waits for this rank's k rows."""
        own = torch.empty_like(full[:full.size(0) // self.world])
        work = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(own, full, async_op=True)
        return lambda: (work.wait(), own)[1]

    def all_gather(self, own: Tensor) -> Callable:
        """Starts to gather [k, ...] of each rank; the function returned waits for all [W*k, ...]."""
        full = own.new_empty(self.world * own.size(0), *own.shape[1:])
        work = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(full, own.contiguous(), async_op=True)
        return lambda: (work.wait(), full)[1]

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's Python object on every rank (small things: names, messages, a file's bytes)."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def all_gather_object(self, value: Any) -> list:
        """Every rank's Python object, in the order of ranks, on every rank."""
        boxes = [value] * self.world
        dist.all_gather_object(boxes, value)
        return boxes

def format_value(value: Any) -> str:
    """A logged value without spaces: floats with 7 significant digits, containers as JSON."""
    if isinstance(value, float):
        return f"{value:.7g}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))

# What the screen shows of an event, by its values; the log files have every event with all of them.
SCREEN = {
    "start": "{run_id}: {world} x {device}, {dtype}",
    "val_probe": "after step {step:,}: {val_bpb:.4f} bits a byte",
    "checkpoint": "after step {step:,}: saved {path}",
    "resume": "goes on after step {step:,} of {path}",
    "train_end": "{steps:,} steps, {tokens:,} tokens, last loss {train_loss:.4f} nats",
    "artifact": "artifact: {weight_bytes:,} bytes, and {code_bytes:,} of code",
    "adaptation_cut": "no time to adapt on after {work:.0%} of the work; the rest is scored as it is",
    "score": "{name}: {val_bpb:.6f} bits a byte",
    "warning": "warning: {text}"}

class Run(Ranks):
    """Ranks, device, phase clock and log of this process. Use as a context manager."""

    def __init__(self, cfg, env: Mapping, log: bool = True):
        """`log`: open the log files; a test or a bench may do without."""
        super().__init__(cfg, env)
        self.cfg = cfg
        self.started = self.charged_until = time.perf_counter()
        self.budget, self.charged = "none", {"train": 0.0, "eval": 0.0, "none": 0.0}  # seconds by budget
        self.status = "start"  # phase, and step where it has some: what is told of a rank that fails
        self.stop, self.can_wait = 0, False  # signal that asks to end; whether the training loop looks at it
        # A CPU multiplies bfloat16 matrices in hardware where it has AMX; elsewhere bf16 is slower than fp32.
        fast = self.is_cuda or getattr(torch.cpu, "_is_amx_tile_supported", bool)()
        self.dtype = torch.bfloat16 if cfg.dtype == "bfloat16" or cfg.dtype == "auto" and fast else torch.float32
        if self.is_cuda:
            torch.set_float32_matmul_precision("high")  # master weights are fp32; products run in tf32 or bf16
        self.compiles = cfg.compile == "on" or (cfg.compile == "auto" and self.is_cuda)
        self.folder = Path(cfg.log_dir)
        self.run_id = cfg.run_id or f"{cfg.preset}-{time.strftime('%Y%m%d-%H%M%S')}-seed{cfg.seed}"
        self.files = []  # text log, JSON lines
        self.resumes = False
        if log and self.is_main:
            self.open_log(cfg)
        self.run_id, self.resumes = self.broadcast_object((self.run_id, self.resumes))

    def path(self, suffix: str) -> Path:
        """One of this run's files."""
        return self.folder / f"{self.run_id}{suffix}"

    def open_log(self, cfg: Config):
        """Opens both log files, or raises `UserError`. RESUME continues a log; none is overwritten."""
        stem, checkpoint, artifact = self.run_id, self.path(".ckpt"), self.path(".bin")
        self.resumes = cfg.resume != "0" and checkpoint.exists()
        require(not artifact.exists(),
                f"RUN_ID={stem}: {artifact} exists; EVAL_ONLY={artifact} scores it, or choose another RUN_ID")
        require(self.resumes or not checkpoint.exists(),
                f"RUN_ID={stem}: {checkpoint} exists; RESUME=1 goes on with it, or choose another RUN_ID")
        require(self.resumes or cfg.resume != "1",
                f"RESUME=1: no checkpoint {checkpoint}; RESUME=auto starts anew without")
        number = 2
        while not cfg.run_id and self.path(".txt").exists():  # another run began in this second
            self.run_id, number = f"{stem}-{number}", number + 1
        logs = [self.path(suffix) for suffix in (".txt", ".jsonl")]
        for path in logs:
            require(cfg.resume != "0" or not path.exists(), f"RUN_ID={stem}: {path} exists; choose another RUN_ID")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.files = [open(path, "x" if cfg.resume == "0" else "a", encoding="utf-8", errors="backslashreplace")
                          for path in logs]
        except OSError as error:
            raise UserError(f"RUN_ID={stem} LOG_DIR={cfg.log_dir}: {error}; choose another") from None

    def __enter__(self) -> Run:
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def on_signal(self, number: int, frame: object):
        """In the training loop the run ends after the step, with a checkpoint; elsewhere, or asked twice, at once."""
        asked, self.stop = self.stop, number
        if asked or not self.can_wait:
            self.end_by_signal(number)

    def end_by_signal(self, number: int):
        """Ends the run by the signal that asked for it, with the exit status that a shell expects."""
        error = Stopped(f"{signal.Signals(number).name} in phase {self.status}{self.how_to_resume()}")
        error.exit_code = 128 + number
        raise error

    def how_to_resume(self) -> str:
        """How to go on with what is on disk, as the end of a sentence; empty: nothing is."""
        path = self.path(".ckpt")
        return f"; RESUME=1 RUN_ID={self.run_id} goes on from {path}" * path.exists()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object):
        if error is not None:
            self.log("error", kind=type(error).__name__, text=str(error))
        for file in self.files:
            with contextlib.suppress(OSError):  # a full disk; the screen has it all
                file.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if error is not None and (not isinstance(error, (UserError, Stopped)) or isinstance(error, LocalError)):
            print(f"train_gpt.py: rank {self.rank} failed in phase {self.status}: {type(error).__name__}",
                  file=sys.stderr, flush=True)  # torchrun ends the others
        if error is None and self.world > 1:
            dist.barrier()  # a process that ends early may take its peers' connections with it
            dist.destroy_process_group()

    @contextlib.contextmanager
    def phase(self, name: str, budget: str = "none") -> Iterator:
        """Everything inside is timed as `name` and charged to `budget`: train, eval or none."""
        self.spent(budget)
        outer, self.status, self.budget = (self.status, self.budget), name, budget
        start = time.perf_counter()
        yield
        self.spent(budget)
        self.status, self.budget = outer  # after an error they stay: where did it happen?
        self.log("phase", name=name, budget=budget, phase_seconds=round(time.perf_counter() - start, 3))

    def spent(self, budget: str) -> float:
        """Seconds charged to `budget` so far; what a phase inside another takes is charged to its own."""
        self.synchronize()
        now = time.perf_counter()
        self.charged[self.budget] += now - self.charged_until
        self.charged_until = now
        return self.charged[budget]

    def synchronize(self):
        """Waits for the GPU (nothing to wait for on a CPU)."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def log(self, event: str, **values: Any):
        """One event: `seconds event name=value ...` in the log, an object in the JSON lines, on screen by SCREEN."""
        seconds = time.perf_counter() - self.started
        line = f"{seconds:9.1f} {event:14s} " + " ".join(f"{k}={format_value(v)}" for k, v in values.items())
        self.append(0, line.rstrip().replace("\n", " | "))
        self.record(event, values)
        self.say(SCREEN.get(event, "").format(**values))

    def say(self, text: str):
        """A line on rank 0's screen, wrapped to its width (80 columns without a terminal); nothing for no text."""
        if self.files and text:
            line, width = f"{time.perf_counter() - self.started:7.1f}  {text}", shutil.get_terminal_size().columns
            try:
                tqdm.write(textwrap.fill(line, width, subsequent_indent=" " * 9, break_on_hyphens=False))
            except OSError:  # nobody reads it any more (`| head`); the run goes on
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def record(self, event: str, values: Mapping):
        """One object in the JSON lines alone; a number that is not finite becomes null."""
        seconds = round(time.perf_counter() - self.started, 3)
        finite = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        self.append(1, json.dumps({"seconds": seconds, "event": event, **dict.fromkeys(values), **finite}))

    def append(self, number: int, line: str):
        """One line to a log file. A full disk ends no run: the line stays in the file's buffer until there is room."""
        for file in self.files[number:number + 1]:
            try:
                file.write(line + "\n")
                file.flush()
            except OSError as error:
                print(f"train_gpt.py: {file.name}: {error}; make room", file=sys.stderr, flush=True)

    def progress(self, total: float, name: str, unit: str) -> tqdm:
        """A progress bar with the time left on rank 0's terminal; silent in a file."""
        return tqdm(total=total, desc=name, unit=unit, leave=False, dynamic_ncols=True,
                    bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed} < {remaining}{postfix}",
                    disable=not (self.is_main and sys.stderr.isatty()))

    def compiled(self, function: Callable) -> Callable:
        """`function` as one compiled graph where this run compiles, else itself."""
        if not self.compiles:
            return function
        torch._dynamo.config.recompile_limit = 64  # a graph for every stage
        return torch.compile(function, dynamic=False, fullgraph=True)

def of_any_size(tensors: Sequence, *dims: int) -> Sequence:
    """Marks dimensions of tensors to which no compiled graph is to be tied: one serves all their sizes above 1."""
    for t in tensors:
        torch._dynamo.mark_dynamic(t, [dim for dim in dims if dim < t.dim() and t.size(dim) > 1])
    return tensors

def write_whole(path: Path, write: Callable):
    """`write(temporary)`, flushed to the disk, becomes `path`; or nothing changes."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def save_checkpoint(path: Path, tensors: Mapping, state: Mapping):
    """Writes tensors and JSON values to `path`, whole or not at all: SHA-256, then safetensors (nothing could run)."""
    from safetensors.torch import save
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    blob = save({"state": text, **{name: t.detach().cpu().contiguous() for name, t in tensors.items()}})
    write_whole(path, lambda temporary: temporary.write_bytes(hashlib.sha256(blob).digest() + blob))

def load_checkpoint(path: Path, like: Mapping) -> tuple:
    """(state, CPU tensors) of a checkpoint; `UserError` unless names, types and shapes are those of `like`."""
    from safetensors.torch import load
    blob = path.read_bytes()
    require(hashlib.sha256(blob[32:]).digest() == blob[:32],
            f"{path}: truncated or damaged (the checksum does not fit); start anew with another RUN_ID")
    tensors = load(blob[32:])
    state = json.loads(tensors.pop("state").numpy().tobytes())
    shapes, own = ({name: (t.dtype, t.shape) for name, t in of.items()} for of in (tensors, like))
    require(shapes == own, f"{path}: its tensors are not those of this run: other knobs, or another version; "
            f"start anew with another RUN_ID")
    return state, tensors


# ======== 3 Data: shards -> rows -> batches
# A shard is 256 little-endian int32 (magic, version, token count, zeros) and then uint16 ids; every document starts
# with BOS; documents may run on into the next shard, so the shards of a split are read as one stream. Which row goes
# where is a pure function of (seed, step): any world size sees the same global batch, and a batch can be rebuilt from
# its number alone. Nothing here knows the model.
# Safe to change: the order of an epoch. Not safe: anything that makes two ranks read different plans.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
BOS_ID = 1  # beginning of document, in every tokenizer of the challenge
IGNORE = -100  # target of a token that is not trained on (padding)

def open_shard(path: Path) -> np.ndarray:
    """Memory-mapped uint16 ids of one shard; `UserError` unless magic, version and file size fit."""
    size = path.stat().st_size
    require(size >= SHARD_HEADER_BYTES, f"{path}: {size} bytes is no shard (the header alone has 1024); rebuild it "
            f"with ./run.sh data")
    magic, version, tokens = (int(x) for x in np.fromfile(path, dtype="<i4", count=3))
    require((magic, version) == (SHARD_MAGIC, SHARD_VERSION),
            f"{path}: magic {magic} version {version}, expected {SHARD_MAGIC} and {SHARD_VERSION}: not a "
            f"token shard; rebuild it with ./run.sh data")
    require(size == SHARD_HEADER_BYTES + 2 * tokens,
            f"{path}: header says {tokens:,} tokens = {SHARD_HEADER_BYTES + 2 * tokens:,} bytes, the file has "
            f"{size:,}: truncated or damaged; fetch or prepare it again")
    if not tokens:  # an empty file cannot be mapped
        return np.empty(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(tokens,))

class TokenStream:
    """The shards `<prefix>_*.bin` of a folder in name order, read as one sequence of ids."""

    def __init__(self, folder: Path, prefix: str):
        require(folder.is_dir(), f"{folder}: no such dataset folder; make one with ./run.sh data (download, demo, "
                f"text), or set DATA_PATH")
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
        parts = [np.empty(0, dtype="<u2")]
        while start < stop:
            begin = int(self.ends[first]) - len(self.shards[first])
            end = min(stop, int(self.ends[first]))
            parts.append(self.shards[first][start - begin:end - begin])
            start, first = end, first + 1
        return np.concatenate(parts)

    def check(self, vocab_size: int):
        """Looks at each shard's beginning for ids beyond the vocabulary, and for a BOS; `verify` reads them whole."""
        for path, shard in zip(self.paths, self.shards):
            top = int(shard[:1 << 20].max(initial=0))
            require(top < vocab_size, f"{path}: holds id {top}, but VOCAB_SIZE={vocab_size}: another tokenizer's "
                    f"shard, or damaged")
        require(any((s[:1 << 20] == BOS_ID).any() for s in self.shards),
                f"{self.paths[0]}: no document start (id {BOS_ID}) in it; prepare it again with BOS")

    def document_starts(self) -> np.ndarray:
        """Stream positions of all BOS, int64; whatever precedes the first one counts as a document too."""
        with ThreadPoolExecutor() as pool:  # the comparison releases the GIL
            in_shards = list(pool.map(lambda s: np.flatnonzero(s == BOS_ID), self.shards))
        starts = [at + int(end) - len(s) for at, s, end in zip(in_shards, self.shards, self.ends)]
        return np.union1d(0, np.concatenate(starts))

class Batch(NamedTuple):
    """What one forward needs, R rows of T tokens. Attention and smearing never cross the start of a segment."""
    ids: Tensor  # [R, T] int64
    targets: Tensor  # [R, T] int64: the next id, or IGNORE
    positions: Tensor  # [R, T] int32: distance from the start of the document segment; 0 where one starts
    cu_seqlens: Tensor  # [S+1] int32: where segments start in the flattened rows, then R*T
    mask_and_rotary: tuple = ()  # `GPT.mask_and_rotary`, where these are made outside a compiled graph

    def to(self, device: torch.device) -> Batch:
        return Batch(*(t.to(device, non_blocking=True) for t in self[:4]))

def batch_of_segments(rows: Sequence, num_rows: int, seq_len: int) -> Batch:
    """Rows of segments -> `Batch`. A segment of n + 1 ids is n inputs and, one later, their targets.
    What is missing of num_rows rows of seq_len inputs is padding: segments of their own, without targets."""
    ids = np.full((num_rows, seq_len), BOS_ID, dtype=np.int64)
    targets = np.full((num_rows, seq_len), IGNORE, dtype=np.int64)
    positions = np.tile(np.arange(seq_len, dtype=np.int32), (num_rows, 1))
    for r, segments in enumerate(rows):
        at = 0
        for segment in segments:
            stop = at + len(segment) - 1
            ids[r, at:stop], targets[r, at:stop] = segment[:-1], segment[1:]
            positions[r, stop:] = np.arange(seq_len - stop)  # what follows begins anew: a segment, or padding
            at = stop
    cu_seqlens = np.append(np.flatnonzero(positions == 0), ids.size).astype(np.int32)
    return Batch(*map(torch.from_numpy, (ids, targets, positions, cu_seqlens)))

def make_batch(rows: Sequence, num_rows: int, seq_len: int) -> Batch:
    """Rows of at most seq_len + 1 ids each -> `Batch`; a segment starts at each row's start and at each BOS in it."""
    split = []
    for row in rows:
        edges = [0, *(np.flatnonzero(row[1:-1] == BOS_ID) + 1).tolist(), len(row) - 1]
        split.append([row[begin:end + 1] for begin, end in zip(edges, edges[1:])])
    return batch_of_segments(split, num_rows, seq_len)

def random_batch(num_rows: int, cfg: Config) -> Batch:
    """Rows of random ids, to warm graphs up with."""
    rng = np.random.default_rng(cfg.seed)
    rows = [rng.integers(2, cfg.vocab_size, cfg.train_seq_len + 1).astype(np.uint16) for _ in range(num_rows)]
    return make_batch(rows, num_rows, cfg.train_seq_len)

class TrainData:
    """The training stream as numbered rows: row i is the same on every rank and in every run with this seed."""

    def __init__(self, cfg, run):
        self.cfg, self.run = cfg, run
        self.stream = TokenStream(cfg.dataset_dir, "fineweb_train")
        self.stream.check(cfg.vocab_size)
        require(len(self.stream) > cfg.train_seq_len,
                f"{cfg.dataset_dir}: {len(self.stream):,} training tokens make no row of TRAIN_SEQ_LEN="
                f"{cfg.train_seq_len} and its target")
        beginning = hashlib.sha256(self.stream.read(0, min(len(self.stream), 4096)).tobytes()).hexdigest()[:12]
        self.corpus = f"{len(self.stream.shards)} shards of {len(self.stream)} tokens that begin {beginning}"
        # A shuffled phase may leave one row less, so one is never used.
        self.rows_per_epoch = max(1, (len(self.stream) - 1) // cfg.train_seq_len - (cfg.shuffle == "window"))
        rows = -(-cfg.train_rows // run.world)
        self.starts = functools.lru_cache(maxsize=2)(self.plan_epoch)  # a step may lie in two epochs
        self.micro_rows = min(rows, cfg.micro_batch_tokens // cfg.train_seq_len)  # of one forward on this device
        self.num_micro = -(-rows // self.micro_rows)  # forwards of one optimizer step, the same on every rank

    def plan_epoch(self, epoch: int) -> np.ndarray:
        """Where each row of an epoch starts in the stream, in the order of SHUFFLE.
        Permuted rows begin at a random phase, so that epochs cut the stream differently.
        """
        seq_len, tokens = self.cfg.train_seq_len, len(self.stream)
        if self.cfg.shuffle == "none":
            return np.arange(0, tokens - seq_len, seq_len)
        rng = np.random.default_rng([self.cfg.seed, epoch])
        phase = int(rng.integers(0, min(seq_len, tokens - seq_len)))
        return phase + rng.permutation((tokens - 1 - phase) // seq_len) * seq_len

    def row(self, index: int) -> np.ndarray:
        """The seq_len + 1 ids of global row `index`."""
        epoch, i = divmod(index, self.rows_per_epoch)
        start = int(self.starts(epoch)[i])
        return self.stream.read(start, start + self.cfg.train_seq_len + 1)

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one optimizer step: rows rank, rank + world, ... of the global batch."""
        first = step * self.cfg.train_rows
        rows = [self.row(i) for i in range(first + self.run.rank, first + self.cfg.train_rows, self.run.world)]
        batches = [make_batch(rows[m * self.micro_rows:(m + 1) * self.micro_rows], self.micro_rows,
                              self.cfg.train_seq_len) for m in range(self.num_micro)]
        if self.run.is_cuda:
            batches = [Batch(*(t.pin_memory() for t in batch[:4])) for batch in batches]
        return batches

    def steps(self, first: int = 0) -> Iterator:
        """(step, its micro-batches) from `first` on; the next two are built by a thread while the device works."""
        with ThreadPoolExecutor(1) as pool:
            ahead = collections.deque(pool.submit(self.step, first + i) for i in range(2))
            try:
                for step in range(first, sys.maxsize):
                    batches = ahead.popleft().result()
                    ahead.append(pool.submit(self.step, step + 2))
                    yield step, batches
            finally:
                for future in ahead:
                    future.cancel()

class ValData(NamedTuple):
    """The validation stream with its documents, and the bytes of every target."""
    ids: np.ndarray  # [N] uint16; target t (0 <= t < N-1) is ids[t + 1]: every id but the first is scored
    starts: np.ndarray  # [documents] int64: stream position of each document's first id
    target_bytes: np.ndarray  # [N-1] int32

    @classmethod
    def load(cls, cfg: Config, run: Run) -> ValData:
        """From the dataset's shards; `UserError` where they are damaged or not those that the manifest lists."""
        (stream, *side), table, listed = open_validation(cfg)
        stream.check(cfg.vocab_size)
        for path in (path for each in (stream, *side) for path in each.paths):
            require(not listed or listed.get(path.name) == file_sha256(path), f"{path}: not the file that "
                    f"{cfg.dataset_dir}/manifest.json lists; fetch or prepare the dataset again")
        ids = stream.read(0, len(stream))
        target_bytes = side[0].read(1, len(ids)).astype(np.int32) if side else table.of_targets(ids)
        return cls(ids, stream.document_starts(), target_bytes)

    @property
    def num_targets(self) -> int:
        return len(self.ids) - 1

    @property
    def stops(self) -> np.ndarray:
        """[documents]: where each document's targets end."""
        return np.append(self.starts[1:], self.num_targets)

def open_validation(cfg: Config) -> tuple:
    """([stream of ids, with CASEOPS_ENABLED that of their bytes], the tokenizer's table of bytes without it, SHA-256 by
    name of the shards that the manifest lists).
    By headers and sizes alone: the tokens wait for the frozen artifact. `UserError` where they do not belong together.
    """
    folder, said = cfg.dataset_dir, manifest(cfg.dataset_dir)
    try:
        listed = {row["name"]: row["sha256"] for split in said.values() if isinstance(split, dict)
                  for row in split.get("files", ())}
    except (TypeError, KeyError):
        raise UserError(f"{folder}/manifest.json: damaged; prepare the dataset again") from None
    cfg.expect("caseops_enabled", cfg.caseops_enabled or not has_case_operators(folder),
               f"1: the text in {folder} has case operators")
    streams = [TokenStream(folder, prefix) for prefix in ("fineweb_val", "fineweb_val_bytes")[:1 + cfg.caseops_enabled]]
    ids, side = streams[0], streams[-1]
    require(len(ids) >= 2, f"{folder}: the validation shards hold {len(ids)} tokens, no target; "
            f"prepare the dataset again")
    require(len(side) == len(ids), f"{folder}: the byte side file has {len(side):,} entries for {len(ids):,} tokens; "
            f"they belong to different exports; fetch or prepare both again")
    sp = None if cfg.caseops_enabled else load_sentencepiece(tokenizer_path(cfg), cfg.vocab_size)
    return streams, sp and TokenBytes.build(sp), listed

def has_case_operators(folder: Path) -> bool:
    """Whether capitals are operators in the text of these shards, so that a side file counts its bytes."""
    return manifest(folder).get("transform", "none") != "none" or any(folder.glob("fineweb_val_bytes_*.bin"))

def manifest(folder: Path, name: str = "manifest.json") -> dict:
    """A JSON object beside the shards, or {} where the export has none (the published ones)."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        held = None
    require(isinstance(held, dict), f"{path}: not a JSON object; prepare the dataset again")
    return held

def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; reads it in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

MAX_SHARED = 0.01  # of validation tokens in documents that training has, too: text repeats itself a little by nature;
# the leaks that undid records had 0.8 of them (a default that kept 10,000 of 50,000 documents out of training)

def shards_sha256(folder: Path, pattern: str = "fineweb_*.bin") -> str:
    """SHA-256 over name, size and first 4,096 bytes of every shard: what tells one export from another."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(4096))
    return digest.hexdigest()

def validation_digest(cfg: Config) -> str:
    """What a score is of, in 16 hex digits: the validation shards, and the tokenizer that counts their bytes."""
    counts = "" if cfg.caseops_enabled else file_sha256(tokenizer_path(cfg))
    return hashlib.sha256(f"{shards_sha256(cfg.dataset_dir, 'fineweb_val_*.bin')} {counts}".encode()).hexdigest()[:16]

def check_stamp(cfg: Config, run: Run):
    """Refuses data whose validation documents are trained on, by what `./run.sh data verify` wrote of these shards.
    Of validation it reads the first 4,096 bytes of each shard, no more."""
    folder, command = cfg.dataset_dir, f"./run.sh data verify {cfg.dataset_dir}"
    stamp = manifest(folder, "verified.json")
    if not stamp:
        run.log("warning", text=f"whether validation is trained on was not checked; `{command}` does, once")
        return
    share = stamp.get("shared_share")
    require(isinstance(share, float) and stamp.get("shards_sha256") == shards_sha256(folder),
            f"{folder}/verified.json: of other shards than those that are there; run {command} again")
    require(share <= MAX_SHARED, f"{folder}: {share:.1%} of the validation tokens are in documents that the training "
            f"shards hold, too: a score on them is void; fetch or prepare the data again (data/README.md)")

def on_its_data(cfg: Config, digest: str, env: Mapping) -> Config:
    """The config on the dataset, its own or one beside it, which an artifact's digest is of; as it is where DATA_PATH
    names a folder or the artifact was made for none. `UserError` where there is none.
    In training CASEOPS_ENABLED is what the dataset says, unless somebody does."""
    if not (digest or cfg.eval_only or "CASEOPS_ENABLED" in env) and has_case_operators(cfg.dataset_dir):
        cfg = replace(cfg, caseops_enabled=True, data_path=str(cfg.dataset_dir))
    if not digest or env.get("DATA_PATH"):
        return cfg
    found = {}
    for folder in (*sorted(cfg.dataset_dir.parent.glob("*/")), cfg.dataset_dir):
        with contextlib.suppress(UserError):  # no tokenizer, a damaged manifest
            found[validation_digest(replace(cfg, data_path=str(folder)))] = str(folder)
    require(digest in found, f"no dataset in {cfg.dataset_dir.parent} has the validation shards and the tokenizer that "
            f"the artifact was made for; DATA_PATH=FOLDER scores it on those in FOLDER, and says so")
    return replace(cfg, data_path=found[digest])

def tokenizer_path(cfg: Config) -> Path:
    """The SentencePiece model of the dataset; `UserError` if it is absent or not the one the shards were made with."""
    tied = manifest(cfg.dataset_dir).get("tokenizer") or {}
    require(isinstance(tied, dict) and all(isinstance(text := tied.get(key, ""), str) and len(text) < 256
                                           for key in ("path", "sha256")),
            f"{cfg.dataset_dir}/manifest.json: `tokenizer` must hold a path and a sha256; prepare the dataset again")
    path = Path(cfg.data_dir) / "tokenizers" / f"fineweb_{cfg.vocab_size}_bpe.model"
    if "path" in tied or cfg.tokenizer_path:
        path = Path(cfg.tokenizer_path or cfg.dataset_dir / tied["path"])
    require(path.is_file(), f"{path}: no such tokenizer; set TOKENIZER_PATH or prepare the dataset")
    require(tied.get("sha256", "") in ("", file_sha256(path)), f"{path}: not the tokenizer that the shards in "
            f"{cfg.dataset_dir} were made with; set TOKENIZER_PATH to that model or prepare the data again")
    return path


# ======== 4 Score: bytes of a token, bits per byte, and the ledger in which each target is scored once
# val_bpb = (nats of all targets / ln 2) / (UTF-8 bytes of all targets). A target is every id of the validation stream
# but the very first; BOS targets cost their nats and count no bytes. Nothing about the model may touch this section.
# Safe to change: nothing without a referee.

def load_sentencepiece(path: Path, vocab_size: int = 0) -> Any:
    """The SentencePiece processor of a model file whose BOS is ours, of `vocab_size` pieces (0: of any number);
    `UserError` otherwise."""
    from sentencepiece import SentencePieceProcessor
    try:
        sp = SentencePieceProcessor(model_file=str(path))
        for i in range(sp.vocab_size()):
            sp.id_to_piece(i)
    except (OSError, RuntimeError, ValueError) as error:  # a piece, or the message, may be no UTF-8
        raise UserError(f"{path}: not a SentencePiece model ({one_line(error)})") from None
    require(sp.bos_id() == BOS_ID, f"{path}: BOS has id {sp.bos_id()}, expected {BOS_ID}; "
            f"set TOKENIZER_PATH to the tokenizer of the dataset")
    require(vocab_size in (0, sp.vocab_size()), f"{path}: the tokenizer has {sp.vocab_size()} pieces, VOCAB_SIZE="
            f"{vocab_size}; set VOCAB_SIZE or TOKENIZER_PATH so that they agree")
    return sp

class TokenBytes(NamedTuple):
    """How many UTF-8 bytes of text each id stands for (three tables over ids, by the challenge's rules)."""
    base: np.ndarray  # [V] int32: bytes without the leading space; 0 for control, unknown and unused, 1 for byte pieces
    leading_space: np.ndarray  # [V] bool: begins with the space mark, one byte unless it follows a boundary
    boundary: np.ndarray  # [V] bool: control, unknown and unused pieces; a space after one of them is not text

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
            base[i] = 1 if sp.is_byte(i) else len(text.encode("utf-8"))  # "<0xE2>" is a byte
        return cls(base, space, boundary)

    def of_targets(self, ids: np.ndarray) -> np.ndarray:
        """[N-1] int32: bytes of ids[1:], each given the id before it."""
        before, target = ids[:-1], ids[1:]
        return self.base[target] + (self.leading_space[target] & ~self.boundary[before])

class Score(NamedTuple):
    """Totals over all targets, nats per token and bits per byte."""
    nats: float
    tokens: int
    bytes: int
    val_loss: float
    val_bpb: float

class Ledger:
    """The loss of every target, written exactly once, and every update with the targets that it was made from.
    The one declared order is the stream's. `BASE` is the state of the shared weights, other states are numbers of
    documents (adapters). Events are rows (phase, sequence number, kind, state, begin, end) over target numbers: a
    score of [begin, end) with that state, or an update of it. Updates of BASE end a phase.
    """
    BASE, SCORE, UPDATE = -1, 0, 1

    def __init__(self, num_targets: int, starts: np.ndarray):
        self.nats = torch.zeros(num_targets, dtype=torch.float32)
        self.times = torch.zeros(num_targets, dtype=torch.uint8)
        self.starts = starts
        self.phase, self.sequence, self.learned_in = 0, 0, -1
        self.events = [np.empty((0, 6), dtype=np.int64)]

    def record(self, targets: Tensor, nats: Tensor):
        """Writes the losses of the targets with these numbers (int64). A second write is a bug and raises."""
        self.times.index_add_(0, targets, torch.ones(len(targets), dtype=torch.uint8))
        require(bool((self.times[targets] == 1).all()), "a target was scored twice", AssertionError)
        self.nats[targets] = nats.detach().float().cpu()

    def note(self, kind: int, states: Any, begins: Any, ends: Any):
        """Adds simultaneous events: numbers or arrays of one length. An update of BASE ends the scores of its phase."""
        require(kind != self.SCORE or self.learned_in < self.phase, "targets were scored after the shared weights had "
               "learned from their phase", AssertionError)
        columns = np.broadcast_arrays(*(np.asarray(x, dtype=np.int64).reshape(-1)
                                        for x in (self.phase, self.sequence, kind, states, begins, ends)))
        if kind == self.UPDATE and np.any(columns[3] == self.BASE):
            self.learned_in = self.phase
        self.events.append(np.stack(columns, axis=1))
        self.sequence += 1

    def close(self, target_bytes: np.ndarray, run: Run) -> tuple:
        """(totals over all ranks, digest of the events); raises unless scores and updates are legal (`violations`).
        Summed in stream order in float64, so that the total does not depend on who scored what; nor does the digest."""
        self.nats = nats = run.all_reduce(self.nats.to(run.device, copy=True)).cpu()
        times = run.all_reduce(self.times.to(run.device, torch.int32)).cpu()
        missed = int((times != 1).sum())
        require(missed == 0, f"{missed} targets were not scored exactly once", AssertionError)
        own = np.concatenate(self.events)
        if not run.is_main:  # all ranks made the same updates of the shared weights
            own = own[(own[:, 2] == self.SCORE) | (own[:, 3] != self.BASE)]
        events = np.concatenate(run.all_gather_object(own))
        broken = violations(events, self.starts, len(nats))
        require(not broken, "; ".join(broken), AssertionError)
        logical = events[:, [4, 5, 2, 3, 0]]  # without sequence numbers, which tell ranks and batches apart
        digest = hashlib.sha256(logical[np.lexsort(logical.T[::-1])].tobytes()).hexdigest()
        total, text_bytes = float(nats.double().sum()), int(target_bytes.sum(dtype=np.int64))
        require(math.isfinite(total), "the score is not finite: the weights are broken")
        require(text_bytes > 0, "the validation targets hold no bytes of text: set TOKENIZER_PATH, or fetch them again")
        return Score(total, len(nats), text_bytes, total / len(nats), total / math.log(2) / text_bytes), digest

def violations(events: np.ndarray, starts: np.ndarray, num_targets: int) -> list[str]:
    """What is illegal about a ledger's events (rows as in `Ledger`), by condition of rules C1, C3, C4; [] if nothing.
    C4: score intervals cover the targets once. C3: an update uses only targets scored before it (earlier in its
    document, or in a phase that is over). C1: nothing scored after an update precedes it in the stream, and a
    document's adapters learn from and score that document only.
    """
    phase, sequence, kind, state, begin, end = events.T
    scored = np.flatnonzero(kind == Ledger.SCORE)
    scored = scored[np.argsort(begin[scored], kind="stable")]
    if not np.array_equal(np.append(0, end[scored]), np.append(begin[scored], num_targets)):
        return ["C4: the scored intervals do not cover every target exactly once"]
    stops, own = np.append(starts[1:], num_targets), state != Ledger.BASE
    outside = own & ((begin < starts[state]) | (end > stops[state]))
    # Time is lexicographic: phase, then sequence number; shared updates come after all scores of their phase.
    clock = phase * (int(sequence.max(initial=0)) + 2) + sequence
    latest_phase = np.maximum.accumulate(phase[scored])  # among the scores up to each one, in stream order
    update, shared = (np.flatnonzero((kind == Ledger.UPDATE) & which) for which in (own, ~own))
    last = np.searchsorted(begin[scored], end[shared], side="left") - 1  # last score that an update reads
    ahead = [bool((begin[scored][phase[scored] > phase[u]] < end[u]).any()) for u in shared]
    # An update of adapters reads a few neighbouring scores: the latest of them must be earlier than the update.
    first = np.searchsorted(end[scored], begin[update], side="right")
    beyond = np.searchsorted(begin[scored], end[update], side="left")
    early = [bool((clock[scored[np.minimum(first + i, beyond - 1)]] >= clock[update]).any())
             for i in range(int((beyond - first).max(initial=0)))]
    # A document's scores with adapters, in the order of time, must move forward in the document.
    mine = scored[own[scored]]
    mine = mine[np.lexsort((clock[mine], state[mine]))]
    backwards = (state[mine][1:] == state[mine][:-1]) & (begin[mine][1:] < begin[mine][:-1])
    tests = {
        "C1: a score with one document's adapters reaches into another document": outside[scored].any(),
        "C1: an update with one document's adapters reaches into another document": outside[update].any(),
        "C3: the shared weights learned from targets that were not scored yet":
            (latest_phase[last] > phase[shared]).any(),
        "C1: targets were scored by weights that had learned from later ones": any(ahead),
        "C3: a document's adapters learned from targets that were not scored yet": any(early),
        "C1: a document was not scored from left to right while its adapters learned": backwards.any()}
    return [text for text, broken in tests.items() if broken]

def by_place(nats: np.ndarray, target_bytes: np.ndarray, val: ValData) -> dict:
    """Targets, nats and bytes of a scored stream [T] by octaves: entry k has the 2^k-th to (2^(k+1) - 1)-th target of
    every document (position), or the documents of 2^k to 2^(k+1) - 1 targets (length)."""
    lengths = val.stops - val.starts
    position = np.log2(np.arange(val.num_targets) - np.repeat(val.starts, lengths) + 1).astype(int)
    length = np.repeat(np.log2(np.maximum(lengths, 1)).astype(int), lengths)
    values = {"targets": np.ones(len(nats)), "nats": nats, "bytes": target_bytes}
    return {name: {of: np.bincount(octave, weights=weights).tolist() for of, weights in values.items()}
            for name, octave in (("position", position), ("length", length))}


# ======== 5 Kernels: a plain reference and the fused implementation that must agree with it, picked once
# The reference is plain PyTorch and right on every device. A fused implementation has the same signature, imports what
# it needs when it is picked, and is named in the log. Attention is causal and never crosses a document segment.
# Safe to change: the order of preference. A new implementation needs a test against the reference.

class Attention(NamedTuple):
    """One attention kernel: `prepare` once a batch, then `run` once a layer."""
    name: str
    prepare: Callable  # Batch -> whatever `run` needs to know about the segments
    run: Callable  # q [R,T,N,H], k and v [R,T,K,H], prepared -> [R,T,N,H]; scale 1/sqrt(H)

def segment_mask(batch: Batch) -> Tensor:
    """[R, 1, T, T] bool: which keys a query sees, by segments and causality."""
    column = torch.arange(batch.positions.size(1), device=batch.positions.device)
    back = column[:, None] - column[None, :]  # how far back the key lies; negative: in the future
    return ((back >= 0) & (back <= batch.positions[:, :, None]))[:, None]

def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Reference: q [R,T,N,H] on k, v [R,S,K,H] where mask (broadcast to [R,1,T,S]) allows it."""
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
                                       enable_gqa=True)
    return y.transpose(1, 2)

def varlen_attention(name: str) -> Attention:
    """FlashAttention on flattened rows: PyTorch's own `varlen_attn` with kernel 2 (varlen), or fa3 or fa4 activated.
    `ImportError` where a kernel is not to be had: packages flash_attn_interface and flash-attn-4; torch 2.11 or later.
    """
    from torch.nn.attention import activate_flash_attention_impl
    from torch.nn.attention.varlen import varlen_attn
    getattr(torch.nn.attention, "restore_flash_attention_impl", bool)(False)  # one that was proven not to work
    if name != "varlen":
        activate_flash_attention_impl(name.upper())

    def run(q, k, v, segments):
        longest = q.size(1)
        return varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *segments, longest, longest,
                           window_size=(-1, 0), enable_gqa=True).view_as(q)  # all of a segment up to the token

    def prepare(batch):
        # Two tensors: an autograd.Function under `fullgraph` refuses the same one twice. Of any length: one graph.
        return of_any_size([batch.cu_seqlens, batch.cu_seqlens.clone()], 0)

    return Attention(name, prepare, run)

SDPA = Attention("sdpa", segment_mask, masked_attention)

def prove(name: str, kernel: Callable, shapes: Sequence, run: Run, *fixed: Any) -> float:
    """Runs a kernel forward and backward four times, on tensors of these shapes; returns its fewest seconds.
    What fails is a warning and a `RuntimeError`."""
    inputs = [torch.zeros(shape, device=run.device, dtype=run.dtype, requires_grad=True) for shape in shapes]
    kernel, seconds = run.compiled(kernel), []
    try:
        for _ in range(4):
            run.synchronize()
            start = time.perf_counter()
            kernel(*inputs, *fixed).sum().backward()
            run.synchronize()
            seconds.append(time.perf_counter() - start)
    except Exception as error:  # what compilers and drivers raise is of many kinds
        run.log("warning", text=f"{name} fails on this GPU and is left out: {one_line(error)}")
        raise RuntimeError(one_line(error)) from error
    return min(seconds)

def pick_attention(name: str, device: torch.device, dtype: torch.dtype, load: Callable = varlen_attention) -> Attention:
    """The kernel called `name`, or the best that this machine has and `load` returns; `UserError` if it lacks it."""
    flash = device.type == "cuda" and dtype == torch.bfloat16
    require(name in ("auto", "sdpa") or flash, f"ATTENTION={name}: needs CUDA and DTYPE=bfloat16; use auto")
    generations = {"fa3": (9,), "fa4": (9, 10, 11, 12), "varlen": range(8, 20)}  # fa3: Hopper alone
    for kernel in ("fa3", "fa4", "varlen") * flash:
        if name in (kernel, "auto") and torch.cuda.get_device_capability(device)[0] in generations[kernel]:
            try:
                return load(kernel)
            except (ImportError, RuntimeError, ValueError) as error:
                require(name == "auto", f"ATTENTION={name}: not to be had here ({one_line(error)}); use auto")
    require(name in ("auto", "sdpa"), f"ATTENTION={name}: needs a newer GPU; use auto")
    return SDPA

RMS_EPS = 2.0 ** -23  # added to the mean square: fp32's epsilon, in every dtype

def rms_norm(x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """gain * x / rms(x) over the last axis; gain is a number or broadcasts from the left of that axis."""
    if isinstance(gain, Tensor):
        gain = gain.to(x.dtype)
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS) * gain

def softcapped_cross_entropy(logits_MV: Tensor, targets_M: Tensor, softcap: float) -> Tensor:
    """Nats of each target under softmax(c*tanh(z/c)), in fp32; 0 where the target is IGNORE."""
    capped = softcap * torch.tanh(logits_MV.float() / softcap)
    return F.cross_entropy(capped, targets_M, reduction="none", ignore_index=IGNORE)

def plain_mlp(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """What the fused MLP computes: x [..., D], up [F, D], down [D, F] -> [..., D]."""
    return F.linear(F.leaky_relu(F.linear(x, up), slope).square(), down)

# The function below is Triton's language, not Python: `triton_mlp` compiles it, and gives this module its name `tl`.
# A `constexpr` is a constant of the compiled kernel.
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

@functools.cache
def triton_mlp() -> Callable:
    """The MLP in one operator that keeps one activation of width F; `ImportError` where there is no Triton.
    x [..., D], up [F, D], down [D, F], slope -> [..., D]. A compiler puts it into its graph without looking inside."""
    global tl
    import triton
    import triton.language as tl
    tiles = [(128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (64, 64, 32, 4, 2)]
    configs = [triton.Config(dict(ROWS=rows, COLS=cols, DEPTH=depth), num_warps=warps, num_stages=stages)
               for rows, cols, depth, warps, stages in tiles]
    if not torch.cuda.is_available():  # the interpreter takes the smallest; a GPU's warm-up looks for the fastest
        configs = configs[-1:]
    product = triton.autotune(configs, key=["N", "K", "BACKWARD"])(triton.jit(mlp_kernel))

    def activated(a, b, pre, slope):
        """(pre, post), or in the backward, which has pre, (grad of pre, post); all [M, N]."""
        (rows, depth), width = a.shape, b.numel() // a.size(1)
        out, post = a.new_empty(rows, width), a.new_empty(rows, width)
        grid = lambda tile: (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(width, tile["COLS"]),)  # noqa: E731
        product[grid](a.contiguous(), b.contiguous(), out if pre is None else pre, out, post, rows, width, depth, slope,
                      pre is not None)
        return out, post

    def forward(x, up, down, slope):
        pre, post = activated(x, up, None, slope)
        return post @ down.T, pre

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], output[1])
        ctx.slope = inputs[3]

    def backward(ctx, grad, _):
        x, up, down, pre = ctx.saved_tensors
        grad_pre, post = inner(grad, down, pre, ctx.slope)
        return grad_pre @ up, grad_pre.T @ x, grad.T @ post, None

    inner = torch.library.custom_op("golf::mlp_inner", activated, mutates_args=(), schema=(
        "(Tensor grad, Tensor down, Tensor pre, float slope) -> (Tensor, Tensor)"))
    inner.register_fake(lambda grad, down, pre, slope: (torch.empty_like(pre), torch.empty_like(pre)))
    mlp = torch.library.custom_op("golf::mlp", forward, mutates_args=(), schema=(
        "(Tensor x, Tensor up, Tensor down, float slope) -> (Tensor, Tensor)"))
    mlp.register_fake(lambda x, up, down, slope: (torch.empty_like(x), x.new_empty(x.size(0), up.size(0))))
    mlp.register_autograd(backward, setup_context=save)
    return lambda x, *rest: mlp(x.flatten(0, -2), *rest)[0].view_as(x)

class Kernels(NamedTuple):
    """The functions that the model calls; each fused one has its reference's signature."""
    attention: Attention = SDPA
    mlp: Callable | None = None  # as `plain_mlp`; None: by parts, which adapters and calibration listen to
    fused: str = "plain"  # which MLP that is: `plain` or `triton`

def pick_kernels(cfg: Config, run: Run) -> Kernels:
    """The kernels of this run. On a GPU the MLP is Triton's or the compiler's, by their times at the run's own shape.
    Raises `UserError` where KERNELS=triton cannot be had."""
    def load(name):
        attention = varlen_attention(name)
        segments = attention.prepare(random_batch(1, cfg).to(run.device))
        shapes = [(1, cfg.train_seq_len, n, cfg.head_dim) for n in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)]
        prove(f"attention {name}", lambda q, k, v: attention.run(q, k, v, segments), shapes, run)
        return attention

    kernels = Kernels(pick_attention(cfg.attention, run.device, run.dtype, load))
    able = run.is_cuda and run.dtype == torch.bfloat16 and torch.cuda.get_device_capability(run.device) >= (8, 0)
    require(able or cfg.kernels != "triton",
            "KERNELS=triton: needs DTYPE=bfloat16 on a GPU of compute capability 8.0 or later; use auto")
    if able and cfg.kernels != "plain":
        seconds = {"triton": math.inf, "plain": math.inf}
        try:
            mlp, (width, dim) = triton_mlp(), (cfg.mlp_dim, cfg.model_dim)
            shapes = [(cfg.micro_batch_tokens, dim), (width, dim), (dim, width)]  # its tiles are chosen by time, here
            for name, function in (("triton", mlp), ("plain", plain_mlp))[:1 + (cfg.kernels == "auto")]:
                seconds[name] = prove(f"{name} MLP", function, shapes, run, cfg.mlp_slope)
        except (ImportError, RuntimeError) as error:
            require(cfg.kernels == "auto", f"KERNELS=triton: not to be had here ({one_line(error)}); use auto")
        run.log("mlp", **seconds)
        if run.all_reduce(torch.tensor(int(seconds["triton"] < seconds["plain"]))) == run.world:  # on every rank
            kernels = kernels._replace(fused="triton", mlp=mlp)
    return kernels


# ======== 6 Model: what a matrix is, unrolled layers, one forward
# Which block runs when is data (`unroll_layers`): loop off and loop on are two tuples. A block reads its matrices only
# through `w.linear(name, layer, x)`, so that training, calibration and evaluation share every gate and norm; where `w`
# is plain, a kernel may take the MLP's matrices whole. Matrices of one kind lie in one bank [count, O, I]
# for the optimizer; a parameter is fp32 and is cast where it is used.
# Positions restart at every document segment; nothing else has to be told where documents end.
# Safe to change: a gate is one entry of `head_gate`. A new matrix: a row in MATRICES; a new parameter: one in ROUTES.

class Layer(NamedTuple):
    """One execution of one stored block."""
    number: int  # among the unrolled layers: a looped block has several, each with adapters of its own
    block: int  # which stored block runs
    skip_from: int | None  # number of the layer whose output is mixed in before this one (U-Net skip)
    skip_slot: int | None  # row of the skip weights: number in the decoder half
    lanes: str  # `none`: attention, then MLP; `single`: both read one lane; `two`: two lanes

def unroll_layers(cfg: ModelKnobs, looped: bool) -> tuple[Layer, ...]:
    """The order in which stored blocks run: pure data, printed in the log.
    The first half of the layers (rounded down) is the encoder; the decoder's j-th layer takes the output of the
    encoder's j-th last one.

    >>> cfg = ModelKnobs(num_layers=4, loop_start=1, loop_end=2, num_loops=1, parallel_start_layer=3)
    >>> [(layer.block, layer.skip_from) for layer in unroll_layers(cfg, looped=True)]
    [(0, None), (1, None), (2, None), (1, 2), (2, 1), (3, 0)]
    """
    blocks = list(range(cfg.num_layers))
    if looped:
        inner = slice(cfg.loop_start, cfg.loop_end + 1)
        blocks[inner] = blocks[inner] * (cfg.num_loops + 1)
    encoder = len(blocks) // 2
    lanes = {False: "none", True: cfg.parallel_residual}
    layers = [Layer(i, block, None, None, lanes[block >= cfg.parallel_start_layer]) for i, block in enumerate(blocks)]
    for slot in range(encoder):
        layers[encoder + slot] = layers[encoder + slot]._replace(skip_from=encoder - 1 - slot, skip_slot=slot)
    return tuple(layers)

class Matrix(NamedTuple):
    """What one kind of matrix is: where it is stored, and what reads it. Sizes are names, see `matrix_shapes`."""
    bank: str  # parameter [count * L, O, I] that holds it
    index: int  # which L matrices of the bank
    product: str  # product of `Weights.linear` that it is part of
    before: tuple[str, ...]  # sizes of the parts before it in the product's output
    outputs: str  # O
    inputs: str  # I
    scale: str | None  # parameter [L, O] that multiplies its output
    zero: bool  # starts at zero, else orthogonal

# What writes into the residual stream starts at zero, so that every block starts as the identity.
MATRICES = {
    #              bank          index product after        O     I    scale         zero
    "q":    Matrix("qo_bank",       0, "qkv",   (),          "D",  "D", None,         False),
    "o":    Matrix("qo_bank",       1, "o",     (),          "D",  "D", "attn_scale", True),
    "k":    Matrix("kv_bank",       0, "qkv",   ("D",),      "KV", "D", None,         False),
    "v":    Matrix("kv_bank",       1, "qkv",   ("D", "KV"), "KV", "D", None,         False),
    "up":   Matrix("mlp_up_bank",   0, "up",    (),          "F",  "D", None,         False),
    "down": Matrix("mlp_down_bank", 0, "down",  (),          "D",  "F", "mlp_scale",  True),
}

def matrix_shapes(cfg: ModelKnobs) -> dict:
    """Of each matrix: (rows of its product's output that it makes, its inputs)."""
    size = {"D": cfg.model_dim, "KV": cfg.num_kv_heads * cfg.head_dim, "F": cfg.mlp_dim}
    shapes = {}
    for name, m in MATRICES.items():
        first = sum(size[part] for part in m.before)
        shapes[name] = slice(first, first + size[m.outputs]), size[m.inputs]
    return shapes

class Weights:
    """How a block reads its matrices: cast once a forward, parts of a product joined, channel scales multiplied in."""
    plain = True  # its products may be fused with what surrounds them: nobody listens to `linear` or adds to it

    def __init__(self, model, dtype):
        layers, self.dtype, self.table = model.cfg.num_layers, dtype, model.tok_emb
        parts = collections.defaultdict(list)
        banks = {bank: self.cast(bank, getattr(model, bank)).unbind() for bank in {m.bank for m in MATRICES.values()}}
        for m in MATRICES.values():
            for i, values in enumerate(banks[m.bank][m.index * layers:(m.index + 1) * layers]):
                if m.scale:  # goes into the matrix: the same product, without a pass over the activations
                    values = values * getattr(model, m.scale)[i].to(dtype).unsqueeze(1)
                parts[m.product, i].append(values)
        for i, rows in enumerate(model.gate.rows(model.cfg.model_dim) if model.gate else ()):
            parts["qkv", i].append(rows.to(dtype))
        # (product, block) -> [O, I]
        self.matrices = {key: torch.cat(values) if len(values) > 1 else values[0] for key, values in parts.items()}
        self.matrices["head", 0] = model.tok_emb.to(dtype)

    def cast(self, name: str, bank: Tensor) -> Tensor:
        """The values of a bank in the dtype of the forward."""
        return bank.to(self.dtype)

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the fp32 embedding, cast afterwards: its gradient is then summed in fp32."""
        return F.embedding(ids, self.table).to(self.dtype)

    def linear(self, name: str, layer: Layer | None, x: Tensor, side: Tensor | None = None) -> Tensor:
        """x [..., I] times the matrix's transpose -> [..., O]; the head belongs to no layer.
        `side`: the sublayer's input, for products whose adapter reads that instead of x."""
        return F.linear(x, self.matrices[name, layer.block if layer else 0])

class RecordingWeights(Weights):
    """Plain weights that also sum what quantization needs to know, over all layers of a block, in fp32.
    Of every input x: x x^T. Of every gradient g at a product's output, once a backward runs: g^2; of every gradient at
    the embedding's output: g g^T, and |g|^2 by id. The model itself needs no gradient.
    """
    plain = False

    def __init__(self, model, dtype):
        super().__init__(model, dtype)
        new, (vocab, dim) = functools.partial(torch.zeros, device=self.table.device), self.table.shape
        self.gram = {key: new(m.size(1), m.size(1)) for key, m in self.matrices.items()}
        self.fisher = {key: new(m.size(0)) for key, m in self.matrices.items()}
        self.tokens, self.input_gram, self.input_rows = collections.Counter(), new(dim, dim), new(vocab)

    def embed(self, ids: Tensor) -> Tensor:
        e = super().embed(ids)
        if not torch.is_grad_enabled():
            return e

        def add(grad):
            g_MD = grad.flatten(0, -2).float()
            self.input_gram.addmm_(g_MD.T, g_MD)
            self.input_rows.index_add_(0, ids.flatten(), g_MD.square().sum(-1))

        e = e.detach().requires_grad_()
        e.register_hook(add)
        return e

    def linear(self, name: str, layer: Layer | None, x: Tensor, side: Tensor | None = None) -> Tensor:
        x_MI, key = x.detach().flatten(0, -2).float(), (name, layer.block if layer else 0)
        self.gram[key].addmm_(x_MI.T, x_MI)
        self.tokens[key] += len(x_MI)
        y = super().linear(name, layer, x, side)

        def add(grad):
            self.fisher[key] += grad.flatten(0, -2).float().square().sum(0)

        if y.requires_grad:
            y.register_hook(add)
        return y

class AdaptedWeights(Weights):
    """Plain weights plus low-rank corrections (LoRA, Hu et al. 2021) of one batch of documents, one set a row.
    y + (x A^T) B^T * alpha / r, before the channel scales. A [R, r, I] is the same draw for every row, B [R, O, r]
    starts at zero, so that the first chunk is scored by the plain model, bit for bit. `o` and `mlp` (the whole MLP)
    read the sublayer's normed input (#1530).
    """
    plain = False

    def __init__(self, base: Weights, model, layers: Sequence, rows: int, cfg):
        self.dtype, self.table, self.matrices = base.dtype, base.table, base.matrices
        self.scales = {m.product: getattr(model, m.scale).detach() for m in MATRICES.values() if m.scale}
        dim, rank, shapes = model.cfg.model_dim, cfg.ttt_lora_rank, matrix_shapes(model.cfg)
        self.alpha, draw = cfg.ttt_lora_alpha / rank, torch.Generator().manual_seed(cfg.seed)
        # (product, layer number) -> parts (rows of its output, A, B); qkv has up to three.
        self.sites = collections.defaultdict(list)
        for name, layer in [(n, layer) for layer in layers for n in ("q", "k", "v", "o", "mlp")] + [("head", None)]:
            a = (2 * torch.rand(rank, dim, generator=draw) - 1) / math.sqrt(dim)  # drawn also where it is not used
            if name not in cfg.ttt_lora_on.split(","):
                continue
            site, outputs = ("head", 0), slice(0, model.cfg.vocab_size)
            if layer is not None:
                matrix = {"mlp": "down"}.get(name, name)
                site, outputs = (MATRICES[matrix].product, layer.number), shapes[matrix][0]
            a = a.to(self.table.device).repeat(rows, 1, 1)
            b = a.new_zeros(rows, outputs.stop - outputs.start, rank)
            self.sites[site].append((outputs, a.requires_grad_(), b.requires_grad_()))
        self.parameters = [t for site in self.sites.values() for _, a, b in site for t in (a, b)]

    def linear(self, name: str, layer: Layer | None, x: Tensor, side: Tensor | None = None) -> Tensor:
        y, source = super().linear(name, layer, x), x if side is None else side
        for rows, a, b in self.sites.get((name, layer.number if layer else 0), ()):
            b = b * self.alpha
            if name in self.scales:
                b = b * self.scales[name][layer.block].unsqueeze(1)
            change = torch.bmm(torch.bmm(source, a.to(self.dtype).mT), b.to(self.dtype).mT)
            y = y + F.pad(change, (rows.start, y.size(-1) - rows.stop))
        return y

class NoCache:
    """Every token's context is in the batch."""
    prefix = 0  # columns at the front of a batch that are embedded but not run: the token before a chunk

    def prepare(self, kernels: Kernels, batch: Batch) -> Any:
        return kernels.attention.prepare(batch)

    def with_past(self, x_RTNH: Tensor, columns: int, key: tuple) -> Tensor:
        """x with so many columns of the tokens before in front of it; `key`: (convolution, layer number)."""
        return F.pad(x_RTNH, (0, 0, 0, 0, columns, 0))

    def attend(self, kernels: Kernels, layer: Layer, q: Tensor, k: Tensor, v: Tensor, segments: Any) -> Tensor:
        return kernels.attention.run(q, k, v, segments)

    def advance(self, size: int):
        """The last scored chunk, of `size` tokens, is the past of the next one."""

NO_CACHE = NoCache()

class KeyValueCache(NoCache):
    """Keys and values of the last `cache_len` tokens of each row's document, computed with the weights of their time.
    A chunk attends to them and to itself, so that a token is computed once instead of once a chunk; of convolutions
    it keeps the last inputs. Gradients end at the chunk's start. All rows are at the same position of their documents.
    """
    prefix = 1

    def __init__(self, cache_len: int):
        self.cache_len, self.length = cache_len, 0
        self.past, self.new = {}, {}  # layer number -> (keys, values); (convolution, layer number) -> its last inputs

    def prepare(self, kernels: Kernels, batch: Batch) -> Tensor:
        size, old = batch.ids.size(1) - self.prefix, min(self.length, self.cache_len)
        column = torch.arange(old + size, device=batch.ids.device)
        back = column[old:, None] - column[None, :]
        return ((back >= 0) & (back < self.cache_len))[None, None]

    def with_past(self, x_RTNH: Tensor, columns: int, key: tuple) -> Tensor:
        past = self.past.get(key)
        whole = super().with_past(x_RTNH, columns, key) if past is None else torch.cat([past, x_RTNH], dim=1)
        self.new[key] = whole[:, x_RTNH.size(1):].detach()
        return whole

    def attend(self, kernels: Kernels, layer: Layer, q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Tensor:
        if layer.number in self.past:
            k, v = (torch.cat([past, now], dim=1) for past, now in zip(self.past[layer.number], (k, v)))
        self.new[layer.number] = (k[:, -self.cache_len:].detach(), v[:, -self.cache_len:].detach())
        return masked_attention(q, k, v, segments)

    def advance(self, size: int):
        self.past, self.new, self.length = self.new, {}, self.length + size

def rotate(x_RTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first 2*P dimensions, halves convention; cos and sin are [R, T, 1, P]."""
    half = cos.size(-1)
    if half == 0:
        return x_RTNH
    a, b, rest = x_RTNH.split([half, half, x_RTNH.size(-1) - 2 * half], dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)

def exclusive(y_RTNH: Tensor, v_RTKH: Tensor) -> Tensor:
    """XSA (#265): takes from each head's output its component along the token's own value vector.
    y - (y.v / v.v) v: the same as with a normalised v, without a normalised copy."""
    y = y_RTNH.unflatten(2, (v_RTKH.size(2), -1))
    v = v_RTKH.unsqueeze(3)
    share = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-6)
    return (y - share * v).flatten(2, 3)

GATE_CHANNELS = 12  # that SmearGate and the output and sparse gates read, as in every record

class HeadGate(nn.Module):
    """Multiplies each head's output by outer * sigmoid(inner * (w . n[:G] + b)) of the layer's normed input n."""

    def __init__(self, weight: Tensor, outer: float = 1.0, inner: float = 1.0, bias: float = 0.0):
        """weight: [L, N, G] initial values, which a bias replaces: weights then start at zero."""
        super().__init__()
        self.outer, self.inner = outer, inner
        self.weight = nn.Parameter(torch.zeros(weight.shape) if bias else weight)
        self.bias = nn.Parameter(torch.full(weight.shape[:2], bias)) if bias else None

    def rows(self, dim: int) -> Tensor:
        """[L, N', D]: the weights as rows of the qkv product; N' is a multiple of 8, for kernels that read 16 bytes."""
        return F.pad(self.weight, (0, dim - self.weight.size(2), 0, -self.weight.size(1) % 8))

    def forward(self, y_RTNH: Tensor, logits_RTN: Tensor, block: int) -> Tensor:
        """logits: [R, T, N'], the product of these rows."""
        logit = logits_RTN[..., :self.weight.size(1)]
        if self.bias is not None:
            logit = logit + self.bias[block].to(logit.dtype)
        return y_RTNH * (self.outer * torch.sigmoid(self.inner * logit)).unsqueeze(-1)

def head_gate(cfg: ModelKnobs) -> HeadGate | None:
    """The gate that ATTN_GATE names; None: attention's output passes unchanged."""
    shape = (cfg.num_layers, cfg.num_heads)
    if cfg.attn_gate == "dense":  # reads the whole width (#1736, after Qwen's gated attention)
        return HeadGate(gaussian(0.01, *shape, cfg.model_dim), bias=cfg.gated_attn_bias)
    zeros = torch.zeros(*shape, min(GATE_CHANNELS, cfg.model_dim))
    outer, inner = {"output": (2.0, 1.0), "sparse": (1.0, 0.5)}.get(cfg.attn_gate, (0.0, 0.0))
    return HeadGate(zeros, outer, inner) if outer else None  # starts as the identity (#1667), at one half (#1787)

class BigramHash(nn.Module):
    """A hashed embedding of (previous, current) token, projected to D and scaled (#162, form of #1060).
    The last bucket is for tokens without a predecessor in their segment. The table starts at zero and the projection
    orthogonal: were both zero, neither would ever get a gradient.
    """

    def __init__(self, cfg):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(cfg.bigram_buckets, cfg.bigram_dim))
        self.proj = nn.Parameter(orthogonal_(torch.empty(1, cfg.model_dim, cfg.bigram_dim))[0])
        self.scale = nn.Parameter(torch.full((1,), 0.05))

    def forward(self, batch: Batch, dtype: torch.dtype) -> Tensor:
        last = self.table.size(0) - 1
        before = batch.ids.roll(1, dims=1)
        bucket = torch.bitwise_xor(36313 * batch.ids, 27191 * before) % last
        bucket = torch.where(batch.positions > 0, bucket, last)
        return self.scale.to(dtype) * F.linear(F.embedding(bucket, self.table).to(dtype), self.proj.to(dtype))

class ForwardContext(NamedTuple):
    """What all layers of one forward share."""
    w: Weights
    cache: NoCache
    positions: Tensor
    segments: Any
    cos: Tensor
    sin: Tensor

class GPT(nn.Module):
    """The language model: parameters in fp32, activations in the dtype of the forward.
    35,945,671 parameters at the shape of record #1855 with CONV_TAPS=0."""

    def __init__(self, cfg: ModelKnobs):
        super().__init__()
        self.cfg, self.kernels = cfg, Kernels()  # the references; `pick_kernels` has faster ones
        layers, dim, ones = cfg.num_layers, cfg.model_dim, torch.ones
        self.tok_emb = nn.Parameter(gaussian(cfg.tied_embed_init_std, cfg.vocab_size, dim))
        banks = collections.defaultdict(list)
        for name, (rows, inputs) in matrix_shapes(cfg).items():
            banks[MATRICES[name].bank].append((MATRICES[name].zero, rows.stop - rows.start, inputs))
        for bank, parts in banks.items():  # matrices of one bank have one shape
            values = torch.zeros(len(parts) * layers, *parts[0][1:])
            for (zero, *_), matrices in zip(parts, values.split(layers)):
                orthogonal_(matrices[:layers * (not zero)])
            self.register_parameter(bank, nn.Parameter(values))
        self.q_gain = nn.Parameter(torch.full((layers, cfg.num_heads), cfg.qk_gain_init))
        self.attn_scale, self.mlp_scale = nn.Parameter(ones(layers, dim)), nn.Parameter(ones(layers, dim))
        self.resid_mix = nn.Parameter(torch.zeros(layers, 2, dim))
        self.resid_mix.data[:, 0] = 1
        num_skips = sum(layer.skip_slot is not None for layer in unroll_layers(cfg, looped=True))
        self.skip_weights = nn.Parameter(ones(num_skips, dim))
        self.skip_gates = nn.Parameter(torch.zeros(num_skips, dim)) if cfg.skip_gates_enabled else None
        self.gate = head_gate(cfg)
        for name, width in dict(kv_conv=2 * cfg.num_kv_heads * cfg.head_dim, mlp_conv=dim).items():
            taps = torch.zeros(layers, cfg.conv_taps, width)
            self.register_parameter(name, nn.Parameter(taps) if cfg.conv_taps else None)
        if cfg.smear_gate_enabled:
            self.smear_gate = nn.Parameter(torch.zeros(1, min(GATE_CHANNELS, dim)))
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.bigram = BigramHash(cfg) if cfg.bigram_buckets else None
        if cfg.parallel_residual == "two":
            self.parallel_resid_lambdas = nn.Parameter(torch.full((layers, 2), 1.1))
            self.parallel_post_lambdas = nn.Parameter(ones(layers, 2, 2))
        self.row_codes = {}  # scale codes of the matrices that QAT left on their codes' grid

    def tensors(self) -> Iterator:
        """(name, values, parameter it belongs to) of all that an artifact holds; banks are split into matrices.
        A matrix is named blocks.<i>.<its row in MATRICES>."""
        layers = self.cfg.num_layers
        parts = {(m.bank, m.index): name for name, m in MATRICES.items()}
        for name, parameter in self.named_parameters():
            if (name, 0) not in parts:
                yield name, parameter.detach(), name
                continue
            for row, matrix in enumerate(parameter.detach().unbind()):
                yield f"blocks.{row % layers}.{parts[name, row // layers]}", matrix, name

    def mask_and_rotary(self, batch: Batch, dtype: torch.dtype, cache: NoCache = NO_CACHE) -> tuple:
        """What attention needs to know of the segments; cos and sin [R, T, 1, ROPE_DIMS/2] of the positions in them."""
        dims, positions = self.cfg.rope_dims, batch.positions[:, cache.prefix:]
        exponent = torch.arange(0, dims, 2, device=positions.device) / max(1, dims)
        angle = positions[..., None, None] * self.cfg.rope_base ** -exponent
        return cache.prepare(self.kernels, batch), angle.cos().to(dtype), angle.sin().to(dtype)

    def to_device(self, batch: Batch, run: Run) -> Batch:
        """A batch on the device with mask and tables: a graph that makes its own computes cosines in every kernel."""
        batch = batch.to(run.device)
        return batch._replace(mask_and_rotary=self.mask_and_rotary(batch, run.dtype))

    def embed(self, batch: Batch, w: Weights) -> Tensor:
        """[R, T, D]: token embedding, smeared with its predecessor's (never across a segment's start), then normed."""
        e = w.embed(batch.ids)
        if self.cfg.smear_gate_enabled:
            logit = F.linear(e[..., :GATE_CHANNELS], self.smear_gate.to(e.dtype))
            gate = self.smear_lambda.to(e.dtype) * torch.sigmoid(logit)
            e = e + gate * e.roll(1, dims=1) * (batch.positions > 0).unsqueeze(-1).to(e.dtype)
        if self.bigram is not None:
            e = e + self.bigram(batch, e.dtype)
        return rms_norm(e)

    def attn(self, n: Tensor, layer: Layer, context: ForwardContext) -> Tensor:
        """Attention of one layer on its normed input n [R, T, D]."""
        cfg, heads, kv, block = self.cfg, self.cfg.num_heads, self.cfg.num_kv_heads, layer.block
        qkv, gate_logits = context.w.linear("qkv", layer, n).tensor_split([(heads + 2 * kv) * cfg.head_dim], dim=-1)
        q, kv_pair = qkv.unflatten(-1, (heads + 2 * kv, cfg.head_dim)).split([heads, 2 * kv], dim=2)
        k, v = self.convolved("kv_conv", kv_pair, layer, context).chunk(2, dim=2)
        q = rotate(rms_norm(q, self.q_gain[block].unsqueeze(-1)), context.cos, context.sin)
        k = rotate(rms_norm(k), context.cos, context.sin)
        y = context.cache.attend(self.kernels, layer, q, k, v, context.segments)
        if block >= cfg.num_layers - cfg.xsa_last_n:
            y = exclusive(y, v)
        if self.gate is not None:
            y = self.gate(y, gate_logits, block)
        return context.w.linear("o", layer, y.flatten(2), side=n)

    def mlp(self, n: Tensor, layer: Layer, context: ForwardContext) -> Tensor:
        """MLP of one layer on its normed input n [R, T, D]."""
        cfg, w, fused = self.cfg, context.w, self.kernels.mlp
        n = self.convolved("mlp_conv", n.unsqueeze(2), layer, context).squeeze(2)
        if fused is not None and w.plain:
            return fused(n, w.matrices["up", layer.block], w.matrices["down", layer.block], cfg.mlp_slope)
        post = F.leaky_relu(w.linear("up", layer, n), cfg.mlp_slope).square()  # LeakyReLU(x)^2 (#493, #549)
        return w.linear("down", layer, post, side=n)

    def convolved(self, name: str, x_RTNH: Tensor, layer: Layer, context: ForwardContext) -> Tensor:
        """x plus a mixture of its own and the tokens' before in their segment, channel by channel; without taps x."""
        if getattr(self, name) is None:
            return x_RTNH
        taps = getattr(self, name)[layer.block].to(x_RTNH.dtype).unflatten(-1, x_RTNH.shape[2:])
        whole, size, y = context.cache.with_past(x_RTNH, len(taps) - 1, (name, layer.number)), x_RTNH.size(1), x_RTNH
        for back, tap in enumerate(taps):
            y = y + tap * whole[:, len(taps) - 1 - back:][:, :size] * (context.positions >= back)[..., None, None]
        return y

    def skip(self, x: Tensor, layer: Layer, outputs: Sequence[Tensor]) -> Tensor:
        """x with the output of the layer's encoder partner, if it has one, mixed in or added."""
        if layer.skip_from is None:
            return x
        skip = self.skip_weights[layer.skip_slot].to(x.dtype) * outputs[layer.skip_from]
        if self.skip_gates is None:
            return x + skip
        return torch.lerp(skip, x, torch.sigmoid(self.skip_gates[layer.skip_slot]).to(x.dtype))

    def forward(self, batch: Batch, layers: Sequence, w: Weights, cache: NoCache = NO_CACHE) -> Tensor:
        """[R, T - cache.prefix, D]: the normed input of the output matrix. The only forward there is."""
        context = ForwardContext(w, cache, batch.positions[:, cache.prefix:],
                                 *(batch.mask_and_rotary or self.mask_and_rotary(batch, w.dtype, cache)))
        x = x0 = self.embed(batch, w)[:, cache.prefix:]
        lane = None  # the second lane, once there are two
        outputs = []
        for layer in layers:
            i = layer.block
            depth_scale = 1 / math.sqrt(i + 1) if self.cfg.ln_scale else 1.0
            if layer.lanes == "two" and lane is None:
                lane = x  # before the skip, which goes to the first lane only
            x = self.skip(x, layer, outputs)
            mix = self.resid_mix[i].to(w.dtype)
            u = mix[0] * x + mix[1] * x0
            n = rms_norm(u, depth_scale)
            a = self.attn(n, layer, context)
            if layer.lanes == "none":
                x = u + a
                x = x + self.mlp(rms_norm(x, depth_scale), layer, context)
            elif layer.lanes == "single":
                x = u + a + self.mlp(n, layer, context)
            else:
                m = self.mlp(rms_norm(lane, depth_scale), layer, context)
                keep, post = self.parallel_resid_lambdas[i].to(w.dtype), self.parallel_post_lambdas[i].to(w.dtype)
                x = keep[0] * x + post[0, 0] * a + post[1, 0] * m
                lane = keep[1] * lane + post[0, 1] * a + post[1, 1] * m
            outputs.append(x)
        if lane is not None:
            x = 0.5 * (x + lane)
        return rms_norm(x)

    def total_loss(self, batch: Batch, layers: Sequence, dtype: torch.dtype, weights: Callable = Weights) -> Tensor:
        """Sum of nats over the batch's targets (a scalar): what training differentiates."""
        w = weights(self, dtype)
        logits = w.linear("head", None, self(batch, layers, w).flatten(0, 1))
        return softcapped_cross_entropy(logits, batch.targets.flatten(), self.cfg.logit_softcap).sum()

def orthogonal_(matrices: Tensor) -> Tensor:
    """Makes each of [K, O, I] a matrix with orthonormal rows or columns, whichever are fewer."""
    if not matrices.is_meta:  # there, it would import half of torch: three seconds
        for matrix in matrices.unbind():
            nn.init.orthogonal_(matrix)
    return matrices

def gaussian(std: float, *shape: int) -> Tensor:
    """Normal values of this deviation."""
    values = torch.empty(*shape)
    return values if values.is_meta else std * torch.randn(*shape)

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


# ======== 7 Optimizer: update rules are pure functions; communication wraps them
# ROUTES says for every parameter who updates it, with which learning rate and decay, and how the artifact stores it.
# Each rank holds the momentum of its own slices of the banks: gradients are summed and scattered, every rank
# orthogonalises its slices, the updates are gathered and applied everywhere. With one process these are identities.
# Clipping uses the norm of the summed gradient, once, so that a step does not depend on the world size.
# Safe to change: a route. A new rule is a function of tensors and a branch in `ShardedOptimizer.step`.

class Route(NamedTuple):
    """How the parameters that match are treated."""
    patterns: str  # parameter names, as shell patterns
    rule: str  # muon or adam
    lr: str  # knob of the peak learning rate
    wd: str  # knob of the weight decay
    stored: str  # in the artifact: gptq:<family>, int8 (one scale a row) or fp16

ROUTES = (
    Route("qo_bank kv_bank", "muon", "matrix_lr", "muon_wd", "gptq:attn"),
    Route("mlp_*bank", "muon", "matrix_lr", "muon_wd", "gptq:mlp"),
    Route("tok_emb", "adam", "tied_embed_lr", "embed_wd", "gptq:embed"),
    Route("bigram.table", "adam", "tied_embed_lr", "embed_wd", "int8"),
    Route("bigram.proj gate.weight kv_conv mlp_conv", "adam", "scalar_lr", "adam_wd", "int8"),
    Route("q_gain attn_scale mlp_scale resid_mix skip_weights skip_gates gate.bias smear_gate smear_lambda "
          "bigram.scale parallel_resid_lambdas parallel_post_lambdas", "adam", "scalar_lr", "adam_wd", "fp16"),
)

def route(name: str) -> Route:
    """The one row of ROUTES for a parameter; a parameter with none or several is a bug."""
    rows = [r for r in ROUTES if any(fnmatch.fnmatchcase(name, p) for p in r.patterns.split())]
    require(len(rows) == 1, f"parameter {name} matches {len(rows)} rows of ROUTES, expected one", AssertionError)
    return rows[0]

# Coefficients (a, b, c) of each Newton-Schulz step. Five of Polar Express (Amsel et al. 2025; #1344) take singular
# values in [0.001, 1] to [0.86, 1.14]; five classic ones (Jordan et al. 2024) to [0.47, 1.20].
NEWTON_SCHULZ = {
    "classic": ((3.4445, -4.7750, 2.0315),) * 5,
    "polar": ((8.156554524902461, -22.48329292557795, 15.878769915207462),
              (4.042929935166739, -2.808917465908714, 0.5000178451051316),
              (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
              (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
              (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)),
}

def orthogonalize(g_KOI: Tensor, steps: Sequence, dtype: torch.dtype) -> Tensor:
    """Approximates U V^T of each matrix of a stack [K, O, I] by Newton-Schulz, computed and returned in `dtype`.
    Cost: len(steps) * (4 m^2 n + 2 m^3) FLOPs a matrix, m = min(O, I), n = max(O, I)."""
    x = g_KOI.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # the Gram matrix is taken on the short side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x

def muon_update(grad_KOI: Tensor, momentum_KOI: Tensor, mu: float, row_normalize: bool, steps: Sequence,
                dtype: torch.dtype) -> Tensor:
    """Muon's direction for a stack of matrices, in units of spectral norm; the momentum changes in place.
    Nesterov momentum, rows normalised (MuonEq-R, #1217), orthogonalised, scaled by sqrt(max(1, O/I)).
    """
    momentum_KOI.mul_(mu).add_(grad_KOI)
    u = grad_KOI + mu * momentum_KOI
    if row_normalize:
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    x = orthogonalize(u, steps, dtype)
    return x * math.sqrt(max(1.0, x.size(-2) / x.size(-1)))

def clip_(gradients: Sequence[Tensor], norm: Tensor, limit: float):
    """Scales gradients of this global norm (a scalar) down to `limit`, in place; 0: no limit."""
    if limit:
        torch._foreach_mul_(list(gradients), (limit / norm.clamp_min(1e-12)).clamp_max(1.0))

ADAM_BETA1, ADAM_EPS = 0.9, 1e-8

class ShardedOptimizer:
    """Muon for the banks, sharded over ranks by slices; AdamW for the rest, replicated."""

    def __init__(self, model, cfg, run):
        self.cfg, self.run = cfg, run
        named = dict(model.named_parameters())
        self.banks = {name: p for name, p in named.items() if route(name).rule == "muon"}
        self.small = {name: p for name, p in named.items() if route(name).rule == "adam"}
        groups = collections.defaultdict(list)
        for name, p in self.small.items():
            groups[route(name).lr, route(name).wd].append(p)
        self.adam = torch.optim.AdamW(
            [dict(params=params, lr=getattr(cfg, lr), peak=getattr(cfg, lr), weight_decay=getattr(cfg, wd))
             for (lr, wd), params in groups.items()], betas=(ADAM_BETA1, cfg.beta2), eps=ADAM_EPS, fused=True)
        self.reset()

    def reset(self):
        """Forgets all momentum, as before the first step."""
        for p in self.small.values():  # as AdamW makes them in its first step: a checkpoint finds them in any step
            self.adam.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
        self.skipped = torch.zeros((), dtype=torch.int32, device=self.run.device)  # steps whose gradient was not finite
        self.momentum = {name: bank.new_zeros(-(-bank.size(0) // self.run.world), *bank.shape[1:])
                         for name, bank in self.banks.items()}

    def state(self) -> tuple:
        """(what is the same on all ranks, this rank's slices of the rest), by name: views of the live tensors."""
        replicas = {f"adam.{kind}.{name}": value for name, p in self.small.items()
                    for kind, value in self.adam.state[p].items()}
        shards = {f"muon.momentum.{name}": own for name, own in self.momentum.items()}
        return {"skipped": self.skipped, **replicas}, shards

    def tensors(self) -> dict:
        """All state by name, whole on every rank (a collective), for a checkpoint that any number of ranks can read."""
        replicas, shards = self.state()
        return {**replicas, **{name: self.run.all_gather(own)()[:self.banks[name.split(".", 2)[2]].size(0)]
                               for name, own in shards.items()}}

    def load(self, tensors: Mapping):
        """Goes on with the state that `tensors` gave, maybe with other ranks."""
        replicas, shards = self.state()
        for name, value in replicas.items():
            value.copy_(tensors[name])
        for name, own in shards.items():
            own.copy_(padded(tensors[name], self.run.world)[self.run.rank * len(own):][:len(own)])

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float) -> Tensor:
        """One update from the gradients of all ranks' shares of the loss; returns the gradient norm (a scalar).
        Gradients are consumed. `lr_scale` multiplies every peak learning rate. A gradient that is not finite counts
        as zero, and in `skipped`.
        """
        cfg, run, small = self.cfg, self.run, list(self.small.values())
        for name, p in {**self.banks, **self.small}.items():
            require(p.grad is not None, f"no gradient reached {name}", AssertionError)
        scattered = {name: run.reduce_scatter(padded(bank.grad, run.world)) for name, bank in self.banks.items()}
        flat = run.all_reduce(torch.cat([p.grad.flatten() for p in small]))
        grads = {name: wait() for name, wait in scattered.items()}
        own = sum((g.square().sum() for g in grads.values()), flat.new_zeros(()))
        norm = (run.all_reduce(own.clone()) + flat.square().sum()).sqrt()
        clip_([*grads.values(), flat], norm, cfg.grad_clip_norm)
        broken = ~torch.isfinite(norm)
        self.skipped += broken
        if run.is_cuda or broken:  # a GPU is not waited for; a CPU is spared the pass
            for g in (*grads.values(), flat):
                g.masked_fill_(broken, 0)
        for p, g in zip(small, flat.split([p.numel() for p in small])):
            p.grad = g.view_as(p)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * lr_scale
        steps = NEWTON_SCHULZ[cfg.muon_coefficients][:cfg.muon_backend_steps]
        # A bank's update travels while the next bank's is orthogonalised, and the last one's during AdamW.
        updates = {name: run.all_gather(muon_update(grad, self.momentum[name], momentum, cfg.muon_row_normalize, steps,
                                                    run.dtype))
                   for name, grad in grads.items()}
        self.adam.step()
        for name, bank in self.banks.items():
            lr, wd = getattr(cfg, route(name).lr) * lr_scale, getattr(cfg, route(name).wd)
            bank.mul_(1 - lr * wd).add_(updates[name]()[:bank.size(0)].to(bank.dtype), alpha=-lr)
        for p in (*small, *self.banks.values()):
            p.grad = None
        return norm

def padded(bank: Tensor, world: int) -> Tensor:
    """The bank with zero matrices appended until `world` divides their number."""
    return F.pad(bank, (0, 0, 0, 0, 0, -bank.size(0) % world))

class Ema:
    """Exponential moving average of all parameters, fp32, started at the initial weights (#287)."""

    def __init__(self, model, decay: float):
        self.decay = decay
        self.live = list(model.parameters())
        self.average = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self):
        """average <- decay*average + (1-decay)*weights."""
        torch._foreach_lerp_(self.average, self.live, 1 - self.decay)

    @torch.no_grad()
    def load_into_model(self):
        """The live weights become the averaged ones."""
        torch._foreach_copy_(self.live, self.average)


# ======== 8 Schedule: pure functions of the used fraction of the budget, and the clock that measures it
# `progress` runs from 0 to 1 over the budget: seconds of rank 0's clock, or steps. All ranks use the same number.
# Safe to change: the shape of a schedule.

def ramp(x: float, start: float, end: float) -> float:
    """0 before `start`, 1 after `end`, linear between."""
    return 1.0 if x >= end else max(0.0, (x - start) / (end - start))

def lr_scale(cfg: ScheduleKnobs, progress: float) -> float:
    """1, then linear to 0 at the end of the budget over its last WARMDOWN_FRAC, never below MIN_LR."""
    if cfg.warmdown_frac == 0:
        return 1.0
    return max(1.0 - ramp(progress, 1 - cfg.warmdown_frac, 1.0), cfg.min_lr)

def muon_momentum(cfg: OptimizerKnobs, step: int) -> float:
    """Linear from its start to MUON_MOMENTUM over the warm-up steps."""
    share = ramp(step, 0, cfg.muon_momentum_warmup_steps)
    return (1 - share) * cfg.muon_momentum_warmup_start + share * cfg.muon_momentum

class Stage(NamedTuple):
    """What one stretch of training runs: each is a graph of its own."""
    looped: bool
    rounded: bool  # whether it sees its matrices as they will be stored (QAT_START)

def stage_at(cfg: Config, progress: float) -> Stage:
    """The stage at a used fraction of the budget."""
    return Stage(cfg.num_loops > 0 and progress >= cfg.enable_looping_at, progress >= cfg.qat_start < 1)

def stages(cfg: Config) -> list[Stage]:
    """Every stage of a run, in order."""
    starts = sorted({0.0, cfg.enable_looping_at, cfg.qat_start})
    return list(dict.fromkeys(stage_at(cfg, start) for start in starts if start < 1))

class TrainClock:
    """The used fraction of the training budget, the same on all ranks.
    With a budget in seconds, rank 0 measures every few steps (on a GPU, which is waited for then; the host runs ahead
    in between) and broadcasts elapsed time and time a step over gloo; steps between are extrapolated from these.
    Training stops before the step that would cross the budget at the pace of the last ones. With
    MAX_WALLCLOCK_SECONDS=0 the fraction is step / ITERATIONS.
    """

    def __init__(self, cfg, run, step: int = 0, elapsed: float = 0.0, now: Callable = time.perf_counter):
        """`step` and `elapsed` seconds: where a checkpoint goes on; `now`: the clock, which a test simulates."""
        self.cfg, self.run, self.now = cfg, run, now
        self.budget = cfg.max_wallclock_seconds and cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds
        self.every = 8 if run.is_cuda else 1
        self.at_step, self.elapsed, self.step_seconds = step, elapsed, 0.0
        run.synchronize()
        self.started = now() - elapsed

    def seconds(self) -> float:
        """Seconds since the start without pauses, everything finished."""
        self.run.synchronize()
        return self.now() - self.started

    def progress(self, step: int) -> float:
        """Used fraction of the budget when `step` (0, 1, ...) begins; 1 or more: stop before it."""
        if not self.budget:
            return step / self.cfg.iterations
        if step % self.every == 0:
            seconds = self.seconds()
            each = (seconds - self.elapsed) / max(1, step - self.at_step)
            measured = torch.tensor([seconds, each], dtype=torch.float64)
            self.at_step, (self.elapsed, self.step_seconds) = step, self.run.broadcast(measured).tolist()
        used = self.elapsed + (step - self.at_step) * self.step_seconds
        over = used + self.step_seconds > self.budget or step >= self.cfg.iterations
        return max(float(over), used / self.budget)

    @contextlib.contextmanager
    def pause(self) -> Iterator:
        """Time inside is not charged (validation in the middle of training)."""
        start = self.seconds()
        yield
        self.started += self.seconds() - start


# ======== 9 Quantization: what an error costs, scales, GPTQ
# A matrix becomes integer codes times a scale for each row and column. GPTQ (Frantar et al. 2022) feeds the error of
# each rounding forward into what is not rounded yet, along the inputs by their Hessian. Where the scales go matters
# most: SDClip (#1394) gives every row the same rate, k standard deviations over the largest code; `waterfill` gives
# every entry the same cost, as rate-distortion theory asks for, by the outputs' Fisher information (K-FAC: Martens and
# Grosse 2015); nothing is clipped, and one global scale sets the size. Trellis-coded quantization (Marcellin and
# Fischer 1990) then gains most of what a vector quantizer could. Sums run over all ranks and layers, with documents
# separated as in training.
# Safe to change: how scales are chosen. `gptq` knows nothing of layers, ranks or files.

OCTAVE = 8  # scale codes to a factor of two
# 2^(k/8) for k from -256: the same bits on every machine.
SCALE_TABLE = torch.tensor([math.ldexp(2.0 ** (k % OCTAVE / OCTAVE), k // OCTAVE) for k in range(-256, 256)],
                           dtype=torch.float64)
ROW_OFFSET = 64  # this code is a scale of 1, so that codes reach from 2^-24 to 2^7.9: no row's scale is 0
GPTQ_DAMP = 0.01  # damping of a Hessian as a fraction of its mean diagonal
ROW_SOFTNESS = 0.7  # exponent of the rows' Fisher information: it is an estimate from few tokens (LOG 2026-11-22)

def scales_of(codes: Tensor, global_scale: float = 1.0, offset: int = ROW_OFFSET) -> Tensor:
    """fp32 scales of rows with these codes, or of columns (offset 0)."""
    return (global_scale * SCALE_TABLE.to(codes.device)[codes.long() - offset + 256]).float()

def scale_codes(scales: Tensor, offset: int, rounding: Callable = torch.round) -> Tensor:
    """int8 codes of the nearest scales (relative error at most 4.4 %), or of the next larger ones (`torch.ceil`)."""
    exact = OCTAVE * scales.double().clamp_min(1e-30).log2() + offset
    return rounding(exact).clamp(-128, 127).to(torch.int8)

class Quantized(NamedTuple):
    """One stored tensor."""
    stored: str  # as in ROUTES: gptq:<family>, int8 or fp16
    codes: Tensor  # int16 [..., C] codes; for fp16 the values themselves
    rows: Tensor | None = None  # int8 [...]: scale code of each row; None for fp16
    columns: Tensor | None = None  # int8 [C]: scale code of each column, of GPTQ's matrices alone

    def dequantize(self, global_scale: float) -> Tensor:
        """The fp32 values that the artifact stands for; `global_scale` multiplies the codes of GPTQ's matrices."""
        if self.rows is None:
            return self.codes.float()
        if self.columns is None:
            return self.codes.float() * scales_of(self.rows).unsqueeze(-1)
        return self.codes.float() * scales_of(self.rows, global_scale).unsqueeze(-1) * scales_of(self.columns, 1.0, 0)

def inverse_factor(gram_KCC: Tensor, log: Callable = lambda *a, **k: None) -> Tensor:
    """[K, C, C] upper Cholesky factor U of the damped inverse, (gram + damp * mean diagonal)^-1 = U^T U.
    Compensated by all later ones, an error e in entry c costs (e / U_cc)^2. Entries never seen get the mean diagonal;
    where a matrix fails, the damping grows tenfold. `LocalError` where that does not help.
    """
    h = gram_KCC.float().clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    alive = (~dead).sum(-1, keepdim=True).clamp_min(1)
    diagonal.copy_(torch.where(dead, (diagonal.sum(-1, keepdim=True) / alive).clamp_min(1e-30), diagonal))
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(h.size(-1), device=h.device)
    for damp in (GPTQ_DAMP * 10 ** k for k in range(20)):
        lower, failed = torch.linalg.cholesky_ex(h + damp * mean * eye)
        lower = torch.where((failed != 0)[:, None, None], eye, lower)
        upper, failed_inverse = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        bad = int(((failed != 0) | (failed_inverse != 0)).sum())
        if not bad:
            return upper
        log("gptq_damping", failed=bad, damp=damp, next=10 * damp)
    raise LocalError("GPTQ: a Hessian is not positive definite at any damping: weights or activations are broken; "
                     "lower MATRIX_LR or TIED_EMBED_LR")

SEGMENT = 64  # columns that one path through the trellis covers; each starts in state 0

class Trellis(NamedTuple):
    """Which codes may follow each other along a row (Ungerboeck's code 5/2 in octal, of 4 states).
    A state allows the codes of its own parity, every second one. The next bit of the code picks the next state, so that
    a path can reach every code and entropy coding still pays for every second one only.
    """
    previous: Tensor  # [S, 2] the states from which one comes to each state
    coset: Tensor  # [S, 2] remainder by 4 of the codes that lead from there
    following: Tensor  # [S, 2] the state after each state and second bit of a code

    @classmethod
    def of(cls, states: int, device: torch.device | str = "cpu") -> Trellis:
        """With 4 states; 1: plain rounding, every code may follow."""
        tables = {1: ([[0]], [[0]], [[0, 0]]),
                  4: ([[0, 2], [0, 2], [1, 3], [1, 3]], [[0, 2], [2, 0], [1, 3], [3, 1]],
                      [[0, 1], [2, 3], [1, 0], [3, 2]])}
        return cls(*(torch.tensor(table, device=device) for table in tables[states]))

    @property
    def density(self) -> int:
        """Codes to a scale: with a trellis only every second one is to be told apart."""
        return min(2, len(self.previous))

def round_along(target: Tensor, upper: Tensor, weight: Tensor, trellis: Trellis, top: int) -> Tensor:
    """Codes [K, R, B] of pieces of rows, each error fed forward; the path of least cost through the trellis (Viterbi).
    target: [K, R, B] values in units of their codes; upper: [K, B, B] what an error takes from later columns, diagonal
    1; weight: [K, R, B] what an error of 1 costs. Every survivor carries its own fed-forward errors. With one state
    this is GPTQ's column loop.
    """
    states, came_from = len(trellis.previous), trellis.previous.flatten()
    paths = target.unsqueeze(-2).repeat(1, 1, states, 1)  # codes up to j, targets from j on
    cost = torch.full(paths.shape[:-1], math.inf, device=target.device)
    cost[..., 0] = 0.0
    for j in range(target.size(-1)):
        code = paths[..., j].clamp(-top, top)
        if states == 1:
            code = code.round()
        else:  # each state keeps the cheaper of the two ways into it
            exact = code.index_select(-1, came_from).unflatten(-1, (states, 2))
            codes = torch.add(trellis.coset, torch.add(-trellis.coset / 4, exact, alpha=0.25).round(), alpha=4)
            costs = cost.index_select(-1, came_from).unflatten(-1, (states, 2))
            cost, pick = torch.addcmul(costs, (exact - codes).square(), weight[..., j, None, None]).min(-1, True)
            source = trellis.previous.expand(*pick.shape[:-1], 2).gather(-1, pick)
            paths, code, cost = paths.gather(-2, source.expand_as(paths)), codes.gather(-1, pick)[..., 0], cost[..., 0]
        error = (paths[..., j] - code).unsqueeze(-1)
        paths[..., j + 1:].addcmul_(error, upper[:, None, None, j, j + 1:], value=-1)
        paths[..., j] = code
    best = cost.argmin(-1)[..., None, None]
    return paths.gather(-2, best.expand(*paths.shape[:-2], 1, target.size(-1))).squeeze(-2)

def gptq(weight_KRC: Tensor, hessian_factor: Tensor, row_KR: Tensor, column_KC: Tensor, trellis: Trellis, top: int
         ) -> Tensor:
    """int16 codes [K, R, C], at most +-top (a trellis: 2 more), of matrices on the grid row x column x code.
    hessian_factor: [K, C, C] of the columns (`inverse_factor`). Rows are rounded independently, a segment of columns
    at a time; the rest of the matrix is then updated by one product.
    """
    grid = row_KR.unsqueeze(-1) * column_KC.unsqueeze(1)
    w, diagonal = weight_KRC.float() / grid, hessian_factor.diagonal(dim1=-2, dim2=-1)
    factor = hessian_factor * (column_KC / diagonal).unsqueeze(-1) / column_KC.unsqueeze(1)  # in units of codes
    cost, codes = (grid / diagonal.unsqueeze(1)).square(), torch.empty_like(w)
    for begin in range(0, w.size(-1), SEGMENT):
        part, rest = slice(begin, begin + SEGMENT), slice(begin + SEGMENT, None)
        upper = factor[:, part, part]
        codes[..., part] = round_along(w[..., part], upper, cost[..., part], trellis, top)
        error = w[..., part] - codes[..., part]
        error = torch.linalg.solve_triangular(upper, error, upper=True, left=False, unitriangular=True)
        w[..., rest] -= error @ factor[:, part, rest]
    return codes.to(torch.int16)

def draw_targets(logits_MV: Tensor, rows: Sequence[int], cfg: Config) -> Tensor:
    """[M] ids drawn from the model: the gradients' squares then are the true Fisher information.
    Drawn by row, so that the number of ranks does not change what is drawn."""
    capped = cfg.logit_softcap * torch.tanh(logits_MV.float() / cfg.logit_softcap)
    uniform = np.stack([np.random.default_rng([cfg.seed, i]).random(cfg.train_seq_len) for i in rows])
    thresholds = torch.from_numpy(uniform.astype(np.float32)).to(logits_MV.device).view(-1, 1)
    return (capped.softmax(-1).cumsum(-1) < thresholds).sum(-1).clamp_max(cfg.vocab_size - 1)

def calibrate(model: GPT, data: TrainData, first_row: int, cfg: Config, run: Run) -> RecordingWeights:
    """Forward and backward over the calibration rows of all ranks, the loop on; sums in fp32 on the device.
    Returns the recorded sums of all ranks, `gram` divided by the number of inputs. Ends early where half of the time
    that training has left (GPTQ_RESERVE_SECONDS) is used; the other half is GPTQ's."""
    rows = max(1, cfg.gptq_calibration_batches * cfg.micro_batch_tokens // cfg.train_seq_len)
    mine = range(first_row + run.rank, first_row + rows, run.world)
    most, late = -(-rows // run.world), cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds / 2
    model.requires_grad_(False)
    w, layers = RecordingWeights(model, run.dtype), unroll_layers(cfg, looped=True)
    with run.progress(len(mine), "calibrate", "row") as bar:
        few = -(-data.micro_rows // 4)  # nothing is compiled here, so that activations take more room than in training
        for at in range(0, most, few):
            if at and cfg.max_wallclock_seconds and run.broadcast_object(run.spent("train") > late):
                run.log("warning", text=f"calibrated on {at / most:.0%} of the rows, in half of GPTQ_RESERVE_SECONDS="
                        f"{cfg.gptq_reserve_seconds:g}")
                break
            part = mine[at:at + few]
            if not part:
                continue
            batch = make_batch([data.row(i) for i in part], len(part), cfg.train_seq_len).to(run.device)
            logits = w.linear("head", None, model(batch, layers, w).flatten(0, 1))
            with torch.no_grad():
                targets = draw_targets(logits, part, cfg)
            softcapped_cross_entropy(logits, targets, cfg.logit_softcap).sum().backward()
            bar.update(len(part))
    model.requires_grad_(True)
    for key in w.matrices:  # a rank without rows still takes part
        count = run.all_reduce(torch.tensor(float(w.tokens[key]), device=run.device)).clamp_min(1)
        run.all_reduce(w.gram[key]).div_(count)
        run.all_reduce(w.fisher[key])
    run.all_reduce(w.input_gram), run.all_reduce(w.input_rows)
    return w

def error_cost(name: str, sums: RecordingWeights, model: GPT) -> tuple:
    """(Hessian [C, C], Fisher information of each row [R]) of an error in a stored matrix."""
    if name == "tok_emb":  # the embedding is read at both ends: mix the costs of both uses
        gram = sums.gram["head", 0]
        out, into = sums.fisher["head", 0] * gram.trace(), sums.input_rows
        total = out.sum() + into.sum()
        mixed = gram / gram.trace().clamp_min(1e-30) * out.sum() + \
            sums.input_gram / sums.input_gram.trace().clamp_min(1e-30) * into.sum()
        return mixed / total.clamp_min(1e-30), out + into
    _, block, part = name.split(".")
    matrix, key = MATRICES[part], (MATRICES[part].product, int(block))
    fisher = sums.fisher[key][matrix_shapes(model.cfg)[part][0]]
    if matrix.scale:
        scale = getattr(model, matrix.scale)[int(block)].detach()
        fisher = fisher * scale * scale
    return sums.gram[key], fisher

def waterfill_scales(cost_KR: Tensor, factor_KC: Tensor) -> tuple:
    """(row scales [K, R], column scales [K, C]) at which every matrix loses equally much to rounding.
    An error e in row r and column c costs cost_r (e / factor_c)^2. Reverse water-filling (Cover and Thomas, 10.3.3)
    asks for scales ~ cost^-1/2 factor; the rows' exponent is softened, as their cost is an estimate.
    """
    cost = cost_KR + 0.01 * cost_KR.mean(-1, keepdim=True).clamp_min(1e-30)
    row = torch.exp(-0.5 * ROW_SOFTNESS * (cost.log() - cost.log().mean(-1, keepdim=True)))
    level = (cost * row.square()).mean(-1, keepdim=True)  # columns: factor^2 / factor^2
    # The geometric mean of the columns goes to the rows, so that columns lie around code 0.
    middle = factor_KC.log().mean(-1, keepdim=True).exp()
    return row / level.sqrt() * middle, factor_KC / middle

def sdclip_codes(weights: Tensor, bits: int, sigmas: float) -> Tensor:
    """int8 scale codes [..., R] of rows [..., R, C]: the largest code of so many bits stands for so many deviations."""
    # A row of nearly one value has almost no spread: its scale must still reach its values.
    largest = torch.maximum(sigmas * weights.std(dim=-1), weights.square().mean(-1).sqrt())
    return scale_codes(largest / (2 ** (bits - 1) - 1), ROW_OFFSET)

def snap_to_grid(weights: Tensor, bits: int, sigmas: float) -> tuple:
    """(`weights` rounded to SDClip's codes, scale codes of their rows)."""
    rows, top = sdclip_codes(weights, bits, sigmas), 2 ** (bits - 1) - 1
    scales = scales_of(rows).unsqueeze(-1)
    return (weights / scales).round().clamp(-top, top) * scales, rows

def bank_grids(model: GPT, cfg: Config) -> dict:
    """(bits, clip) of the codes of every bank."""
    routes = {name: route(name) for name, _ in model.named_parameters()}
    return {name: cfg.grid(row.stored.removeprefix("gptq:")) for name, row in routes.items() if row.rule == "muon"}

class RoundedWeights(Weights):
    """Plain weights whose banks are read as the artifact will hold them; gradients pass straight through (QAT).
    The straight-through estimator of Bengio et al. 2013. Scales are SDClip's of the current weights."""

    def __init__(self, grids: Mapping, model, dtype):
        self.grids = grids
        super().__init__(model, dtype)

    def cast(self, name: str, bank: Tensor) -> Tensor:
        return (snap_to_grid(bank.detach(), *self.grids[name])[0] + (bank - bank.detach())).to(self.dtype)

def snap_banks(model: GPT, cfg: Config):
    """Moves the banks to what `RoundedWeights` reads of them; GPTQ will find them on its grid."""
    grids = bank_grids(model, cfg)
    for name, values, parameter in model.tensors():
        if parameter in grids:
            on_grid, model.row_codes[name] = snap_to_grid(values, *grids[parameter])
            values.copy_(on_grid)

class MatrixGroup(NamedTuple):
    """Matrices of one shape and family, ready for GPTQ."""
    stored: str
    names: list[str]
    order: Tensor  # [K, C] order in which the columns are rounded
    weights: Tensor  # [K, R, C] fp32, columns in that order
    hessian_factor: Tensor  # [K, C, C], see `inverse_factor`
    rows: Tensor  # [K, R] int8 scale codes
    columns: Tensor  # [K, C] int8 scale codes
    top: int  # largest code

class Quantizer:
    """Turns the model's tensors into codes, as often as the packer asks; what costs time is kept between calls."""

    def __init__(self, model, sums: RecordingWeights, cfg, run):
        self.model, self.sums, self.cfg, self.run = model, sums, cfg, run
        self.states = {"waterfill": cfg.trellis_states, "sdclip": 1}[cfg.quant]
        self.trellis = Trellis.of(self.states, run.device)
        self.plain = {}  # tensors that no Hessian is needed for
        groups = collections.defaultdict(list)
        # N_INT6_LAYERS leaves the matrices of the smallest Hessian trace with one bit less.
        blocks = [name for name, _, _ in model.tensors() if name.startswith("blocks.") and cfg.n_int6_layers]
        blocks.sort(key=lambda name: -float(error_cost(name, sums, model)[0].trace()))
        fewer = blocks[cfg.n_int6_layers:]
        for name, values, parameter in model.tensors():
            stored, values = route(parameter).stored, values.float()
            if stored.startswith("gptq:"):
                groups[values.shape, stored, name in fewer].append((name, values))
            elif stored == "int8":
                rows = scale_codes(values.abs().amax(-1) / 127, ROW_OFFSET, torch.ceil)
                codes = (values / scales_of(rows).unsqueeze(-1)).round().clamp(-127, 127)
                self.plain[name] = Quantized(stored, codes.to(torch.int16).cpu(), rows.cpu())
            else:
                self.plain[name] = Quantized(stored, values.half().cpu())
        # Zeros cost next to nothing: a hashed table's rows that no text has met are no reason for finer scales.
        self.weights = max(1, sum(int(values.count_nonzero()) for group in groups.values() for _, values in group))
        self.groups = [self.prepare(stored, group[run.rank::run.world], int(less))
                       for (_, stored, less), group in groups.items() if group[run.rank::run.world]]

    def prepare(self, stored: str, group: Sequence, less: int = 0) -> MatrixGroup:
        """Factors and scale codes of matrices (name, values) of one shape, with `less` bits than SDClip's knobs say."""
        names, weights = [name for name, _ in group], torch.stack([values for _, values in group])
        grams, costs = map(torch.stack, zip(*(error_cost(name, self.sums, self.model) for name in names)))
        energy = grams.diagonal(dim1=-2, dim2=-1)
        weights = weights.masked_fill((energy == 0).unsqueeze(1), 0.0)  # inputs never seen
        order = torch.arange(energy.size(-1), device=energy.device).expand_as(energy)
        if self.cfg.quant == "waterfill":
            factor = inverse_factor(grams, self.run.log)
            rows, columns = waterfill_scales(costs, factor.diagonal(dim1=-2, dim2=-1))
            return MatrixGroup(stored, names, order, weights, factor, scale_codes(rows, ROW_OFFSET),
                               scale_codes(columns, 0), 2 ** 15 - 4)  # cosets add 2
        # Costly columns first, while the others can still make up for them: with SDClip's equal scales that is worth a
        # fifth of the damage, with water-filled ones nothing (docs/LOG.md 2026-11-22).
        order = energy.argsort(dim=-1, descending=True, stable=True)
        weights = weights.gather(2, order.unsqueeze(1).expand_as(weights))
        grams = grams.gather(1, order.unsqueeze(2).expand_as(grams)).gather(2, order.unsqueeze(1).expand_as(grams))
        bits, sigmas = self.cfg.grid(stored.removeprefix("gptq:"))
        rows = sdclip_codes(weights, bits - less, sigmas)
        if names[0] in self.model.row_codes:
            rows = torch.stack([self.model.row_codes[name] for name in names])
        return MatrixGroup(stored, names, order, weights, inverse_factor(grams, self.run.log), rows,
                           torch.zeros_like(order, dtype=torch.int8), 2 ** (bits - less - 1) - 1)

    def nearest(self, group: MatrixGroup, global_scale: float) -> Tensor:
        """int16 codes by rounding alone, at the steps between codes of one parity: about as large to pack as GPTQ's."""
        grid = scales_of(group.rows, global_scale * self.trellis.density).unsqueeze(-1) * \
            scales_of(group.columns, 1.0, 0).unsqueeze(1)
        return (group.weights / grid).round_().clamp_(-group.top, group.top).to(torch.int16)

    def solved(self, group: MatrixGroup, global_scale: float) -> Tensor:
        """int16 codes by GPTQ."""
        codes = gptq(group.weights, group.hessian_factor, scales_of(group.rows, global_scale),
                     scales_of(group.columns, 1.0, 0), self.trellis, group.top)
        return codes.gather(2, group.order.argsort(-1).unsqueeze(1).expand_as(codes))

    def bits(self, global_scale: float) -> float:
        """Bits of `nearest`'s codes by their entropy, matrix by matrix."""
        total = torch.zeros((), dtype=torch.float64, device=self.run.device)
        for group in self.groups:
            for matrix in self.nearest(group, global_scale).int():
                counts = torch.bincount(matrix.flatten() + group.top).double()
                total -= (counts * (counts / matrix.numel()).clamp_min(1e-30).log2()).sum()
        return float(self.run.all_reduce(total))

    def octaves_for(self, bits: float) -> float:
        """log2 of the global scale at which the codes take so many bits in all, by `bits`."""
        logs = torch.zeros((), dtype=torch.float64, device=self.run.device)
        for group in self.groups:
            least = 1e-3 * group.weights.square().mean((1, 2), keepdim=True).sqrt() + 1e-30
            rows = scales_of(group.rows, float(self.trellis.density))
            ratios = group.weights.abs().clamp_min(least).log2() - rows.log2().unsqueeze(-1) - \
                scales_of(group.columns, 1.0, 0).log2().unsqueeze(1)
            logs += ratios.masked_fill(group.weights == 0, 0.0).sum(dtype=torch.float64)
        # Gaussian codes of deviation s: log2 s + 2.05 bits, and the mean of log2 |code| is log2 s - 0.92.
        guess = float(self.run.all_reduce(logs)) / self.weights + 2.97 - bits / self.weights
        low, high = guess - 3, guess + 6
        for _ in range(16):
            middle = (low + high) / 2
            if self.bits(2.0 ** middle) > bits:
                low = middle
            else:
                high = middle
        return high

    @torch.no_grad()
    def quantize(self, global_scale: float, rounding: Callable) -> dict:
        """Every tensor as it will be stored; each rank does its share of the matrices.
        `rounding`: `solved` or `nearest`."""
        own = {}
        for group in self.groups:
            parts = rounding(group, global_scale).cpu(), group.rows.cpu(), group.columns.cpu()
            own.update({name: Quantized(group.stored, *of) for name, *of in zip(group.names, *parts)})
        done = dict(self.plain)
        for part in self.run.all_gather_object(own):
            done.update(part)
        return {name: done[name] for name, _, _ in self.model.tensors()}


# ======== 10 Artifact: tensors <-> bytes, code bytes, fit to the cap
# Layout: magic, version, length of the header; the header (JSON, Brotli): the knobs of model and score, a digest of the
# validation shards, global scale of the codes, states of the trellis, streams with coder, raw and packed length; the
# packed streams; BLAKE2b-128 of all before it.
# Codes of one family share a stream, coded by `range_pack` or by Brotli; the rest is Brotli's. No pickle: a reader
# checks digest, bounds and sizes before it allocates. Rank 0 writes, all score what was read back.
# Safe to change: the coder of a stream, with a new format version.

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGOLF", 7
ARTIFACT_HEAD = struct.Struct("<5sBI")
DIGEST_BYTES = 16
MAX_HEADER_BYTES, MAX_RAW_BYTES = 1 << 20, 1 << 28
WRAPPER_MARK = b"#coding:latin-1\n#packed\n"

@functools.lru_cache(maxsize=64)  # streams without codes stay as they are while `fit_to_cap` searches
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

def stream_parts(stored: str, shape: Sequence[int]) -> list:
    """(stream, raw bytes) that one tensor contributes, in the order in which they are written."""
    count, rows = math.prod(shape), math.prod(shape[:-1])
    if stored == "fp16":
        return [("fp16", 2 * count)]
    if stored == "int8":
        return [("int8", count), ("scales", rows)]
    return [(stored, 2 * count), ("scales", rows + shape[-1])]

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

def to_streams(matrices: Sequence, fill: int, states: int) -> np.ndarray:
    """Matrices [R, C] as [T, parallel streams]: each is one path through the trellis, or without one a single entry."""
    if states == 1:
        return np.concatenate([matrix.reshape(-1) for matrix in matrices])[None]
    padded = [np.pad(m, ((0, 0), (0, -m.shape[1] % SEGMENT)), constant_values=fill) for m in matrices]
    return np.ascontiguousarray(np.concatenate([m.reshape(-1, SEGMENT) for m in padded]).T)

def from_streams(streams: np.ndarray, shapes: Sequence, states: int) -> list:
    """Inverse of `to_streams`."""
    widths = [cols + (-cols % SEGMENT) * (states > 1) for _, cols in shapes]
    ends = np.cumsum([rows * width for (rows, _), width in zip(shapes, widths)])
    parts = np.split(streams.T.reshape(-1), ends[:-1])
    return [part.reshape(rows, width)[:, :cols] for part, (rows, cols), width in zip(parts, shapes, widths)]

class TrellisState:
    """Paths through the trellis abreast, as a decoder takes them. A code is density * symbol + the parity."""

    def __init__(self, paths: int, states: int):
        trellis = Trellis.of(states)
        self.following, self.density = trellis.following.numpy().astype(np.int8), trellis.density
        self.state = np.zeros(paths, np.int8)

    def codes(self, symbols: np.ndarray) -> np.ndarray:
        """[paths] int16 codes of these symbols; takes the step."""
        codes = self.density * symbols.astype(np.int32) + (self.state & 1)
        self.state = self.following[self.state, symbols & 1]
        return codes.astype(np.int16)

    def by_context(self, classes: np.ndarray, num_classes: int) -> tuple:
        """(order of the paths by context, number of paths of each context, last of those that only fill).
        A context is the class of a code (num_classes: filling) and, along a trellis, its parity."""
        contexts = np.minimum(classes * self.density + (self.state & 1), num_classes * self.density)
        return np.argsort(contexts, kind="stable"), np.bincount(contexts, minlength=num_classes * self.density + 1)

ESCAPE = 127  # symbol of a code that has none of its own; the code follows in a side stream
LEAST_IN_CLASS = 2048  # codes of a class with a histogram of its own (or one for each parity); others join the nearest
FILLING = -2 ** 15  # class of what only fills a stream

def magnitudes(codes: np.ndarray) -> bytes:
    """int8 logs (4 to the octave) of the mean |code| of each row, of each column and of all of a matrix [R, C]."""
    size = np.abs(codes.astype(np.float64))
    means = np.concatenate([size.mean(1), size.mean(0), [size.mean()]])
    return np.clip(np.rint(4 * np.log2(means + 1 / 64)), -128, 127).astype(np.int8).tobytes()

def expected_classes(logs: bytes, shapes: Sequence) -> list:
    """[R, C] int16 class of every code of each matrix: the magnitude that its row and its column let expect."""
    ends = np.cumsum([rows + cols + 1 for rows, cols in shapes])
    classes = []
    for (rows, cols), part in zip(shapes, np.split(np.frombuffer(logs, dtype=np.int8).astype(np.int16), ends[:-1])):
        row, column, (mean,) = np.split(part, [rows, rows + cols])
        classes.append(row[:, None] + column - mean)
    return classes

def join_classes(classes: np.ndarray, frequent: np.ndarray) -> np.ndarray:
    """int16 index into the ascending `frequent` classes of the nearest one, the lower of two; their number to fill."""
    nearest = np.abs(frequent[:, None] - np.arange(-2 ** 9, 2 ** 9)).argmin(0)  # of two as near, the lower
    joined = nearest[classes.clip(-2 ** 9) + 2 ** 9]
    return np.where(classes == FILLING, len(frequent), joined).astype(np.int16)

def histogram(table: np.ndarray) -> Any:
    """The entropy model of one context by its symbols' stored counts; None where at most one symbol occurs."""
    import constriction
    counts = table.astype(np.float64)
    if np.count_nonzero(counts) <= 1:
        return None
    return constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)

def range_pack(matrices: Sequence, states: int) -> bytes:
    """int16 matrices [R, C] by a range coder with one histogram for each class of expected magnitude (and parity).
    Rows' and columns' mean magnitudes travel as side information; histograms are integers, so that both ends compute
    with the same numbers on any machine. Entropy coding as in Deflate's or zstd's static models, over better classes.
    Along the trellis the paths go abreast: one turn codes the next symbol of every stream.
    """
    import constriction
    logs = b"".join(magnitudes(matrix) for matrix in matrices)
    classes = to_streams(expected_classes(logs, [matrix.shape for matrix in matrices]), FILLING, states)
    present, counts = np.unique(classes[classes != FILLING], return_counts=True)
    frequent = present[counts >= min(LEAST_IN_CLASS, counts.max())]
    symbols = to_streams(matrices, 0, states) >> (states > 1)  # the parity is known: what is left to say
    state = TrellisState(symbols.shape[1], states)
    turns, tables = [], np.zeros((len(frequent) * state.density, ESCAPE + 1), dtype=np.int64)
    for line, line_classes in zip(symbols, join_classes(classes, frequent)):
        order, counts = state.by_context(line_classes, len(frequent))
        values = zigzag(line[order])
        turns.append((values, counts))
        context = np.repeat(np.arange(len(tables) + 1), counts)
        both = context * (ESCAPE + 1) + np.minimum(values, ESCAPE)
        tables += np.bincount(both, minlength=(len(tables) + 1) * (ESCAPE + 1)).reshape(-1, ESCAPE + 1)[:-1]
        state.codes(line)
    top = tables.max(axis=1, keepdims=True).clip(1)
    tables = np.where(tables, np.maximum(1, tables * 65535 // top), 0).astype("<u2")
    models = [histogram(table) for table in tables]
    coder, escaped = constriction.stream.queue.RangeEncoder(), []
    for values, counts in turns:
        parts = np.split(np.minimum(values, ESCAPE).astype(np.int32), np.cumsum(counts)[:-1])
        for model, part in zip(models, parts):
            if model is not None and len(part):
                coder.encode(part, model)
        used = values[:len(values) - counts[-1]]
        escaped.append(used[used >= ESCAPE])
    escapes = np.concatenate(escaped)
    side = [brotli_pack(data) for data in (logs, frequent.astype("<i2").tobytes(), split_bytes(tables.tobytes()),
                                           escapes.astype("<u2").tobytes())]
    words = coder.get_compressed().astype("<u4").tobytes()
    return struct.pack("<7I", *map(len, side), len(frequent), len(escapes), len(words)) + b"".join(side) + words

def range_unpack(data: bytes, shapes: Sequence, states: int) -> list:
    """Inverse of `range_pack`, given the matrices' shapes; `UserError` for anything it could not have written."""
    try:
        import constriction
    except ImportError:
        raise UserError("its codes need the package constriction; pip install -r requirements.txt") from None
    require(len(data) >= 28, "a range-coded stream is truncated")
    *lengths, num_classes, num_escapes, num_words = struct.unpack_from("<7I", data)
    num_tables = num_classes * Trellis.of(states).density
    require(28 + sum(lengths) + num_words == len(data) and num_words % 4 == 0 and 0 < num_classes <= 1024
            and num_escapes <= sum(rows * cols for rows, cols in shapes),
            "a range-coded stream does not fit its lengths")
    edges = np.cumsum([28, *lengths])
    raw_sizes = (sum(rows + cols + 1 for rows, cols in shapes), 2 * num_classes, 2 * num_tables * (ESCAPE + 1),
                 2 * num_escapes)
    logs, frequent, tables, escapes = (brotli_unpack(data[a:b], size) for a, b, size in
                                       zip(edges, edges[1:], raw_sizes))
    frequent = np.frombuffer(frequent, dtype="<i2").astype(np.int64)
    require(bool((np.diff(frequent) > 0).all()), "the classes of a range-coded stream are not ascending")
    classes = join_classes(to_streams(expected_classes(logs, shapes), FILLING, states), frequent)
    tables = np.frombuffer(join_bytes(tables), dtype="<u2").reshape(num_tables, ESCAPE + 1)
    models, escapes, taken = [histogram(table) for table in tables], np.frombuffer(escapes, dtype="<u2"), 0
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(data[edges[-1]:], dtype="<u4").astype(np.uint32))
    streams, state = np.empty(classes.shape, dtype=np.int16), TrellisState(classes.shape[1], states)
    for turn, line_classes in enumerate(classes):
        order, counts = state.by_context(line_classes, num_classes)
        require(bool((tables.any(axis=1) | (counts[:-1] == 0)).all()), "a class of codes has no histogram")
        parts = [np.full(count, table.argmax(), dtype=np.int32) for table, count in zip(tables, counts)]
        try:
            parts = [part if model is None or not len(part) else decoder.decode(model, len(part))
                     for model, part in zip(models, parts)]
        except (AssertionError, ValueError) as error:  # what the package raises for bytes nobody encoded
            raise UserError("a range-coded stream is damaged") from error
        values = np.concatenate([*parts, np.zeros(counts[-1], dtype=np.int32)])
        large = values == ESCAPE
        before, taken = taken, taken + int(large.sum())
        require(taken <= num_escapes, "a range-coded stream has the wrong number of large codes")
        values[large] = escapes[before:taken]
        line = np.empty(len(values), dtype=np.int16)
        line[order] = unzigzag(values)
        streams[turn] = state.codes(line)
    require(taken == num_escapes, "a range-coded stream has the wrong number of large codes")
    return from_streams(streams, shapes, states)

def brotli_codes(matrices: Sequence, states: int) -> bytes:
    """int16 matrices by Brotli: transposed (columns first), zigzag, high bytes before low bytes."""
    flat = np.concatenate([zigzag(matrix >> (states > 1)).T.reshape(-1) for matrix in matrices])
    return brotli_pack(split_bytes(flat.tobytes()))

def brotli_uncodes(data: bytes, shapes: Sequence, states: int) -> list:
    """Inverse of `brotli_codes`."""
    sizes = [rows * cols for rows, cols in shapes]
    flat = unzigzag(np.frombuffer(join_bytes(brotli_unpack(data, 2 * sum(sizes))), dtype="<u2"))
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    symbols = to_streams([part.reshape(cols, rows).T for part, (rows, cols) in zip(parts, shapes)], 0, states)
    state = TrellisState(symbols.shape[1], states)
    return from_streams(np.stack([state.codes(line) for line in symbols]), shapes, states)

# How the codes of GPTQ's matrices are packed, and read again.
CODERS: dict = {
    "range": (range_pack, range_unpack), "brotli": (brotli_codes, brotli_uncodes)}
TRY_BROTLI = 1 << 20  # codes of a stream that Brotli is also tried on (4 s a million): it finds the rows of unused ids

class Stream(NamedTuple):
    """One stream of an artifact."""
    coder: str
    raw_bytes: int
    data: bytes

def pack_streams(tensors: Mapping, states: int, coders: Sequence[str]) -> dict:
    """Tensors as streams by name; `states` of the trellis; of several coders small streams take the smaller result."""
    raw = collections.defaultdict(bytearray)
    matrices = collections.defaultdict(list)
    for q in tensors.values():
        if q.rows is None:
            raw["fp16"] += q.codes.numpy().astype("<f2").tobytes()
            continue
        raw["scales"] += q.rows.numpy().tobytes()
        if q.columns is None:
            raw["int8"] += q.codes.reshape(-1, q.codes.size(-1)).T.contiguous().numpy().astype(np.int8).tobytes()
        else:
            raw["scales"] += q.columns.numpy().tobytes()
            matrices[q.stored].append(q.codes.numpy())
    if "fp16" in raw:
        raw["fp16"] = bytearray(split_bytes(bytes(raw["fp16"])))
    streams = {name: Stream("brotli", len(data), brotli_pack(bytes(data))) for name, data in raw.items()}

    def pack_codes(stack):
        size = sum(matrix.size for matrix in stack)
        names = coders if size <= TRY_BROTLI else coders[:1]
        return min((Stream(name, 2 * size, CODERS[name][0](stack, states)) for name in names),
                   key=lambda stream: len(stream.data))

    with ThreadPoolExecutor() as pool:  # both coders leave the interpreter's lock while they work
        return {**streams, **dict(zip(matrices, pool.map(pack_codes, matrices.values())))}

def pack(streams: Mapping, global_scale: float, states: int, model: ModelKnobs, preset: str,
         score: Mapping | None = None, validation: str = "") -> bytes:
    """The artifact's bytes; the streams hold a model's tensors in the order of `GPT.tensors`.
    score: SCORE_KNOBS that are not the preset's; validation: `validation_digest`, empty: any."""
    header = json.dumps({
        "preset": preset, "global_scale": global_scale, "trellis": states, "score": score or {},
        "validation": validation,
        "model": {name: getattr(model, name) for name in kinds(ModelKnobs)},
        "streams": [[name, s.coder, s.raw_bytes, len(s.data)] for name, s in streams.items()]}, separators=(",", ":"))
    head = struct.pack("<I", len(header)) + brotli_pack(header.encode())
    body = ARTIFACT_HEAD.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(head)) + head + \
        b"".join(stream.data for stream in streams.values())
    return body + hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()

class Artifact(NamedTuple):
    """What an artifact holds."""
    model: ModelKnobs
    preset: str
    score: dict  # knobs of the score that are not the preset's
    validation: str  # `validation_digest` of what it is to be scored on, empty: any
    tensors: dict  # stored name -> fp32 values
    streams: dict  # name -> (values, packed bytes)

    @property
    def knobs(self) -> dict:
        """What a config takes from it, before the environment (EVAL_ONLY)."""
        return {**vars(self.model), **self.score, "preset": self.preset}

def read_header(blob: bytes) -> tuple:
    """Checks magic, version, digest and header of an artifact before anything of its size is allocated.
    Returns (model, preset, knobs of the score, digest of the validation, global scale, trellis states, tensors [(name,
    stored, shape)], streams [(name, coder, raw bytes, packed bytes)], where the first stream begins).
    """
    begin = ARTIFACT_HEAD.size
    require(len(blob) > begin + 4 + DIGEST_BYTES and blob[:len(ARTIFACT_MAGIC)] == ARTIFACT_MAGIC,
            "not an artifact of this program")
    _, version, head_bytes = ARTIFACT_HEAD.unpack_from(blob)
    require(version == ARTIFACT_VERSION, f"format version {version}, this program reads {ARTIFACT_VERSION}; "
            f"score it with the program that made it")
    body = memoryview(blob)[:-DIGEST_BYTES]
    require(hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest() == blob[-DIGEST_BYTES:],
            "truncated or damaged (the checksum does not fit); copy it again")
    (header_bytes,) = struct.unpack_from("<I", blob, begin)
    require(4 < head_bytes <= len(body) - begin and header_bytes <= MAX_HEADER_BYTES, "a header of "
            f"{head_bytes} packed and {header_bytes} unpacked bytes is not plausible")
    text, begin = brotli_unpack(blob[begin + 4:begin + head_bytes], header_bytes), begin + head_bytes
    try:
        header, defaults = json.loads(text), vars(Config())
        score, validation = dict(header["score"]), str(header["validation"])[:64]
        require(all(type(value) is type(defaults[name]) for name, value in {**header["model"], **score}.items())
                and set(score) <= SCORE_KNOBS, "a knob in the header has a value that is none of its kind")
        model, preset = ModelKnobs(**header["model"]), str(header["preset"])
        tensors = [(name, route(parameter).stored, list(values.shape))
                   for name, values, parameter in shapes_of(model).tensors()]
        streams = [(str(n), str(coder), int(raw), int(size)) for n, coder, raw, size in header["streams"]]
        global_scale, states = float(header["global_scale"]), header["trellis"]
        require(type(states) is int and states in (1, 4), f"a trellis of {states!r} states is not known")
        require(1e-12 < global_scale < 1e12, f"a global scale of {global_scale:g} is not plausible")
    except (ArithmeticError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"the header cannot be read ({type(error).__name__})") from None
    need = collections.Counter()
    for _, stored, shape in tensors:
        need.update(dict(stream_parts(stored, shape)))
    require({name: raw for name, _, raw, _ in streams} == dict(need) and len(streams) == len(need)
            and all(coder == "brotli" or coder in CODERS and name.startswith("gptq:") for name, coder, _, _ in streams)
            and begin + sum(size for *_, size in streams) == len(body), "its streams do not fit its tensors")
    padded_values = sum(math.prod(shape[:-1]) * (shape[-1] + SEGMENT) for _, _, shape in tensors if shape)
    require(max(padded_values, sum(need.values())) <= MAX_RAW_BYTES,
            f"{sum(need.values()):,} bytes of tensors is not plausible")
    return model, preset, score, validation, global_scale, states, tensors, streams, begin

def read_artifact(blob: bytes) -> Artifact:
    """`unpack` without the file's name in its errors."""
    model, preset, score, validation, global_scale, states, expected, streams, at = read_header(blob)
    raw, matrices, tensors, sizes = {}, {}, {}, {}
    for name, coder, length, size in streams:
        data, at, coded = blob[at:at + size], at + size, name.startswith("gptq:")
        sizes[name] = length // (1 + (coded or name == "fp16")), size
        if coded:
            shapes = [shape for _, stored, shape in expected if stored == name]
            matrices[name] = iter(CODERS[coder][1](data, shapes, states))
        else:
            data = brotli_unpack(data, length)
            raw[name] = io.BytesIO(join_bytes(data) if name == "fp16" else data)

    def take(stream, kind, *shape):
        size = math.prod(shape) * np.dtype(kind).itemsize
        return torch.from_numpy(np.frombuffer(raw[stream].read(size), dtype=kind).reshape(shape).copy())

    for name, stored, shape in expected:
        if stored == "fp16":
            quantized = Quantized(stored, take("fp16", "<f2", *shape))
        elif stored == "int8":
            rows = take("scales", "i1", *shape[:-1])
            quantized = Quantized(stored, take("int8", "i1", shape[-1], rows.numel()).T.reshape(shape), rows)
        else:
            rows, columns = take("scales", "i1", *shape[:-1]), take("scales", "i1", shape[-1])
            codes = torch.from_numpy(np.ascontiguousarray(next(matrices[stored])))
            quantized = Quantized(stored, codes, rows, columns)
        tensors[name] = quantized.dequantize(global_scale)
        require(bool(torch.isfinite(tensors[name]).all()), f"{name} holds values that are not finite")
    return Artifact(model, preset, score, validation, tensors, sizes)

def unpack(blob: bytes, source: str = "artifact") -> Artifact:
    """Reads an artifact. Raises `UserError`, one line, for anything but bytes that `pack` could have written."""
    try:
        return read_artifact(blob)
    except UserError as error:
        raise UserError(f"{source}: {one_line(error)}") from None

@torch.no_grad()
def load_tensors(model: GPT, tensors: Mapping):
    """Copies an artifact's tensors into a model of the same knobs."""
    for name, values, _ in model.tensors():
        values.copy_(tensors[name])

def without_prose(source: str) -> str:
    """A program's text without docstrings, comments and empty lines, else as it is: the same on every Python."""
    tree, lines = ast.parse(source), source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][:token.start[1]].rstrip()
    in_strings, dropped = set(), set()  # numbers of lines, from 0
    for node in ast.walk(tree):
        if isinstance(node, (ast.Constant, ast.JoinedStr)):
            in_strings.update(range(node.lineno, node.end_lineno or 0))
        body = getattr(node, "body", None)
        if isinstance(body, list):
            prose = [s for s in body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
            dropped.update(n for s in prose for n in range(s.lineno - 1, s.end_lineno or 0))
            for s in prose[:len(prose) == len(body)]:  # nothing else is in it
                lines[s.lineno - 1] = " " * s.col_offset + "pass"
                dropped.remove(s.lineno - 1)
    return "\n".join(line for n, line in enumerate(lines)
                     if n not in dropped and (line.strip() or n in in_strings)) + "\n"

def shipped_source(path: Path) -> bytes:
    """The script as a submission ships it: docstrings and comments stripped, LZMA, in a self-extracting wrapper.
    A file that is packed already is shipped as it is. The payload is a Latin-1 string literal: 2 % larger than the
    compressed bytes, where base85 costs 25 %. Tracebacks and `inspect` find the source through linecache.
    """
    import lzma
    source = path.read_bytes()
    if source.startswith(WRAPPER_MARK):
        return source
    code = without_prose(source.decode("utf-8"))
    data = lzma.compress(code.encode(), lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)
    # A NUL before a digit takes three digits: \0 and the digit would be read as one longer escape.
    data = re.sub(rb'[\\\n\r"]', lambda m: {b"\n": b"\\n", b"\r": b"\\r"}.get(m[0], b"\\" + m[0]), data)
    data = re.sub(rb"\0(?=[0-7])", rb"\\000", data).replace(b"\0", b"\\0")
    return (WRAPPER_MARK + b'import lzma,linecache\ns=lzma.decompress("' + data + b'".encode("latin-1")).decode()\n'
            b'linecache.cache["train_gpt"]=len(s),None,s.splitlines(True),"train_gpt"\n'
            b'exec(compile(s,"train_gpt","exec"))\n')

def search(pack_at: Callable, cap: int, guess: float, finest: float, slope: float, late: Callable) -> bytes:
    """The largest blob that `pack_at` makes within `cap` bytes, to a thousandth of it; empty where none fits.
    `pack_at(octaves)` packs with a global scale of 2^octaves: larger is coarser and smaller. From `guess` on, the next
    trial is extrapolated by `slope` (bytes an octave) until one fits and one does not, then interpolated between them.
    Ends at `finest`, or where `late()` says that there is no time for another trial.
    """
    over, fits, octaves = (-math.inf, math.inf), (math.inf, b""), guess  # (octaves, bytes), (octaves, blob)
    for trial in range(15):
        blob = pack_at(octaves)
        if len(blob) > cap:
            over = (octaves, len(blob))
        elif len(blob) < len(fits[1]):  # finer and yet smaller: the coder's classes jump here
            break
        else:
            fits = (octaves, blob)
        if fits[1] and (fits[0] <= finest or len(fits[1]) >= 0.9991 * cap or fits[0] - over[0] < 1e-4 or late()):
            break
        if not fits[1]:
            octaves = over[0] + max(0.002, 1.02 * (over[1] - 0.9996 * cap) / slope * 2 ** max(0, trial - 3))
            if octaves >= min(over[0] + 8, 40):
                break
        elif over[1] == math.inf:
            octaves = max(finest, fits[0] - max(0.002, (0.9997 * cap - len(fits[1])) / slope))
        else:
            share = (over[1] - 0.9996 * cap) / max(1, over[1] - len(fits[1]))
            octaves = over[0] + min(0.95, max(0.05, share)) * (fits[0] - over[0])
    return fits[1]

def fixed_bytes(model: GPT) -> int:
    """Bytes before packing of what no scale makes smaller: all but GPTQ's codes."""
    sizes = (part for _, values, parameter in model.tensors()
             for part in stream_parts(route(parameter).stored, values.shape))
    return sum(size for stream, size in sizes if not stream.startswith("gptq:"))

def check_cap(model: GPT, code_bytes: int, cfg: Config):
    """Refuses a cap that cannot be met, however coarse the scales."""
    fixed = fixed_bytes(model)  # of which trained tables pack to 0.94, small tensors to 0.8 (docs/LOG.md 2026-11-28)
    require(code_bytes + 0.75 * fixed < cfg.artifact_bytes_cap, f"ARTIFACT_BYTES_CAP={cfg.artifact_bytes_cap:,}: code "
            f"takes {code_bytes:,}, and what no scale makes smaller {fixed:,} before packing: raise it, or lower "
            f"BIGRAM_BUCKETS={cfg.bigram_buckets} or BIGRAM_DIM={cfg.bigram_dim}")

def fit_to_cap(model: GPT, sums: RecordingWeights, code_bytes: int, cfg: Config, run: Run,
               validation: str = "") -> bytes:
    """The packed artifact, as fine as the knobs say or as the cap allows; the same bytes on every rank.
    One global scale multiplies all others. Where the cap binds it is guessed from entropies and the packed size of
    nearest codes, and finished with true sizes (`search`). `UserError` when nothing fits.
    """
    cap, coders = cfg.artifact_bytes_cap - code_bytes, ("range", "brotli")
    score = {name: value for name, value in cfg.changed().items() if name in SCORE_KNOBS}
    if importlib.util.find_spec("constriction") is None:
        coders = ("brotli",)
        run.log("warning", text="package constriction is missing: Brotli packs the codes, 1 to 2 % larger")
    with run.phase("factorize", "train"):
        quantizer = Quantizer(model, sums, cfg, run)

    def packed(tensors, octaves, states, coders):
        """(blob, bytes that the codes take in it), on every rank."""
        blob, codes = b"", 0
        with run.phase("pack"):
            if run.is_main:
                streams = pack_streams(tensors, states, coders)
                blob = pack(streams, 2.0 ** octaves, states, cfg, cfg.preset, score, validation)
                codes = sum(len(stream.data) for name, stream in streams.items() if name.startswith("gptq:"))
            return run.broadcast_object((blob, codes))

    def pack_at(octaves):
        nonlocal before
        before = run.spent("train")
        with run.phase("gptq", "train"):
            tensors = quantizer.quantize(2.0 ** octaves, quantizer.solved)
        blob, _ = packed(tensors, octaves, quantizer.states, coders)
        run.log("pack", global_scale=2.0 ** octaves, weight_bytes=len(blob), code_bytes=code_bytes,
                left_bytes=cap - len(blob))
        return blob

    before = 0.0  # seconds charged to training before the last trial
    # SDClip's bits set the size; else a bit a weight is an octave at most.
    octaves, finest, slope = 0.0, 0.0, quantizer.weights / 8
    if cfg.quant == "waterfill":
        with run.phase("allocate", "train"):
            most = cfg.bits_per_weight * quantizer.weights
            octaves = quantizer.octaves_for(min(most, 8 * max(1, 0.999 * cap - fixed_bytes(model))))
            # GPTQ is the dear part: what the coder makes of nearest codes tells the size to a percent or so.
            near = quantizer.quantize(2.0 ** octaves, quantizer.nearest)
            blob, codes = packed(near, octaves, 1, coders[:1])
            bits = min(most, 8 * max(1, 0.999 * cap - (len(blob) - codes)))
            # Less than a bit a weight where many codes are 0; where nearly all are, nothing can be told from them.
            slope = max(slope / 4, (quantizer.bits(2.0 ** octaves) - quantizer.bits(2.0 ** (octaves + 0.25))) / 2)
            octaves += max(-1.0, (codes - bits / 8) / slope)
            finest = octaves if most <= bits else -60.0
    blob = search(pack_at, cap, octaves, finest, slope,  # late: another trial like the last would exceed the budget
                  lambda: run.broadcast_object(0 < cfg.max_wallclock_seconds < 2 * run.spent("train") - before))
    require(bool(blob), f"ARTIFACT_BYTES_CAP={cfg.artifact_bytes_cap:,}: code {code_bytes:,} and weights do not fit "
            f"however coarse the scales; use a smaller model")
    over = run.spent("train") - cfg.max_wallclock_seconds
    if cfg.max_wallclock_seconds and over > 0:
        run.log("warning", text=f"training, calibration and GPTQ took {over:.1f} s more than MAX_WALLCLOCK_SECONDS="
                f"{cfg.max_wallclock_seconds:g}: set GPTQ_RESERVE_SECONDS="
                f"{math.ceil(cfg.gptq_reserve_seconds + over + 0.5)}")
    return blob


# ======== 11 Evaluation: one scorer; windows, adapters for each document, learning from what is scored, n-gram tilt
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

def plan_windows(val: ValData, seq_len: int, stride: int) -> list[Window]:
    """Windows of at most seq_len inputs that score every target of every document once, `stride` at a time.
    Each but a document's first has seq_len - stride inputs of context before its first scored one."""
    windows = []
    for begin, end in zip(val.starts.tolist(), val.stops.tolist()):
        stop = min(begin + seq_len, end)
        windows += [Window(begin, stop, begin)] * (stop > begin)
        while stop < end:
            first, stop = stop, min(stop + stride, end)
            windows.append(Window(first - (seq_len - stride), stop, first))
    return windows

def pack_rows(windows: Sequence, seq_len: int) -> list[list[Window]]:
    """Windows dealt into rows of seq_len inputs, longest first, each into the fullest row that still has room."""
    rows = []
    room = []  # (free inputs, row), sorted
    for window in sorted(windows, key=lambda w: (w.begin - w.end, w.begin)):
        length = window.end - window.begin
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            room.append((seq_len, len(rows)))
            rows.append([])
        free, row = room.pop(at)
        rows[row].append(window)
        if free > length:
            bisect.insort(room, (free - length, row))
    return rows

def window_batch(rows: Sequence, ids: np.ndarray, num_rows: int, seq_len: int) -> tuple:
    """(batch, flat positions that are scored, their target numbers) of some packed rows."""
    segments = [[ids[window.begin:window.end + 1] for window in row] for row in rows]
    where, numbers = [], []
    for r, row in enumerate(rows):
        at = r * seq_len
        for begin, end, first in row:
            where.append(np.arange(at + first - begin, at + end - begin))
            numbers.append(np.arange(first, end))
            at += end - begin
    return (batch_of_segments(segments, num_rows, seq_len), torch.from_numpy(np.concatenate(where)),
            torch.from_numpy(np.concatenate(numbers)))

def context_numbers(ids: Tensor, length: int, halves: dict) -> Tensor:
    """[N] int32, equal for equal contexts ids[t-length+1..t] (t >= length-1); exact: nothing is hashed.
    `halves` keeps the numbers of lengths that are powers of two; halves[1] are the ids themselves."""
    if length not in halves:
        half = 1 << (length - 1).bit_length() - 1  # two overlapping halves cover the context
        part = context_numbers(ids, half, halves)
        key = part[half - 1:len(ids) - length + half].long() * (int(part.max()) + 1) + part[length - 1:]
        numbers = F.pad(key.unique(return_inverse=True)[1].int(), (length - 1, 0))
        if length & (length - 1):
            return numbers
        halves[length] = numbers
    return halves[length]

def best_continuations(ids: Tensor, number: Tensor, order: Tensor, vocab_size: int) -> tuple:
    """For each t of `order`, what followed earlier occurrences of its context: (best id, its count, number of them).
    The best is the id that first reached the highest count, as in #1514's tables. All [len(order)], in that order."""
    follower = F.pad(ids[1:].int(), (0, 1))[order]  # the last t has none: it is the last of its group, so none sees it
    group = number[order]
    index = torch.arange(len(order), device=ids.device, dtype=torch.int32)

    def last_place(changed):
        """Index of the last place at or before each where `changed` [len - 1] (of neighbours) holds, or the first."""
        return torch.where(F.pad(changed, (1, 0), value=True), index, 0).cummax(0).values

    # How often this pair of context and follower has occurred up to each place.
    pair, by_pair = (group.long() * vocab_size + follower).sort(stable=True)
    occurrence = index - last_place(pair[1:] != pair[:-1]) + 1
    del pair
    count = torch.empty_like(index).index_put_((by_pair,), occurrence)
    del by_pair
    # A context's highest count so far rises where its leader changes or scores again; groups keep them apart.
    highest = (group.long() * (len(order) + 1) + count).cummax(0).values
    leader = last_place(highest[1:] > highest[:-1])[(index - 1).clamp_min_(0)]
    del highest
    earlier = index - last_place(group[1:] != group[:-1])
    return follower[leader], count[leader] * (earlier > 0), earlier

def ngram_hints(ids: Tensor, cfg: Config) -> tuple:
    """The hint of every target: the continuation that its longest trusted context had most often before (#1420).
    NGRAM_RULES are tried longest context first; one applies where the best continuation has its least share and the
    context its least number of earlier occurrences. ids [N] int64 -> ids [N-1] int32, strengths [N-1] (0: no hint);
    both depend on the ids before the target alone.
    """
    hints = torch.zeros(len(ids), dtype=torch.int32, device=ids.device)
    betas = torch.zeros(len(ids), dtype=torch.float32, device=ids.device)
    halves = {1: ids}
    for length, least_share, least_count in sorted(ngram_rules(cfg.ngram_rules), reverse=True):
        if length >= len(ids):
            continue
        number = context_numbers(ids, length, halves)
        order = (number[length - 1:].sort(stable=True).indices + (length - 1)).int()
        best, count, earlier = best_continuations(ids, number, order, cfg.vocab_size)
        share = count / earlier.clamp_min(1)
        use = (earlier >= least_count) & (share >= least_share) & (betas[order] == 0)
        hints[order[use]] = best[use]
        betas[order[use]] = cfg.ngram_base_beta * (share[use] if cfg.ngram_beta_by_share else 1.0)
    return hints[:-1], betas[:-1]

def tilted(nats: Tensor, logits: Tensor, targets: Tensor, hints: Tensor, betas: Tensor, softcap: float) -> Tensor:
    """Nats under p'(y) = p(y) e^(beta [y = hint]) / Z with Z = 1 + p(hint) (e^beta - 1).
    nats, targets, hints, betas [M]; logits [M, V] before the softcap. beta depends on ids before the target, never on
    the target, so that p' is a distribution fixed before the target is looked at.
    """
    picked = logits.gather(-1, torch.stack([hints, targets.clamp_min(0)], dim=-1)).double()
    of_hint, of_target = (softcap * torch.tanh(picked / softcap)).unbind(-1)
    p, betas = torch.exp(of_hint - of_target - nats.double()).clamp_max(1.0), betas.double()
    return (nats + torch.log1p(p * torch.expm1(betas)) - betas * (hints == targets)).float()

class Scorer:
    """Turns hidden states into ledger entries: the one place where a score is made."""

    def __init__(self, val, cfg, run, hints: tuple | None = None):
        """`hints`: ids and strengths for all targets (`ngram_hints`), or None: no tilt."""
        self.val, self.cfg, self.run, self.hints = val, cfg, run, hints
        self.ledger = Ledger(val.num_targets, val.starts)

    def nats(self, model: GPT, hidden: Tensor, targets: Tensor, numbers: Tensor, w: Weights) -> tuple:
        """(scores, losses to learn from), flat [M]: of targets with these numbers, given hidden [..., D]."""
        softcap, targets = model.cfg.logit_softcap, targets.flatten()
        logits = w.linear("head", None, hidden).flatten(0, -2)
        nats = softcapped_cross_entropy(logits, targets, softcap)
        if self.hints is None:
            return nats.detach(), nats
        at = numbers.flatten().clamp_max(self.val.num_targets - 1).to(self.hints[0].device)
        hints, betas = (t[at].to(nats.device) for t in self.hints)
        with torch.no_grad():
            return tilted(nats, logits, targets, hints.long(), betas, softcap), nats

@torch.no_grad()
def score_windows(model: GPT, windows: Sequence, scorer: Scorer, name: str, weights: Callable = Weights):
    """Scores windows without adapters, packed into rows of EVAL_SEQ_LEN that are dealt to the ranks."""
    cfg, run = scorer.cfg, scorer.run
    w, layers = weights(model, run.dtype), unroll_layers(model.cfg, looped=True)
    forward, batch_rows = run.compiled(model.forward), max(1, cfg.val_batch_tokens // 8 // cfg.eval_seq_len)
    mine = pack_rows(windows, cfg.eval_seq_len)[run.rank::run.world]
    chunk = max(1, (1 << 26) // model.cfg.vocab_size)  # 256 MB of fp32 logits at a time
    with run.progress(len(mine), name, "row") as bar:
        for at in range(0, len(mine), batch_rows):
            part = mine[at:at + batch_rows]
            num_rows = batch_rows if run.compiles else len(part)  # a compiled graph has one shape
            batch, where, numbers = window_batch(part, scorer.val.ids, num_rows, cfg.eval_seq_len)
            batch, where = model.to_device(batch, run), where.to(run.device)
            hidden, targets = forward(batch, layers, w).flatten(0, 1), batch.targets.flatten()
            for spots, some in zip(where.split(chunk), numbers.split(chunk)):
                scorer.ledger.record(some, scorer.nats(model, hidden[spots], targets[spots], some, w)[0])
            _, ends, firsts = np.array([window for row in part for window in row]).T
            scorer.ledger.note(Ledger.SCORE, Ledger.BASE, firsts, ends)
            bar.update(len(part))

def score_fixed(model: GPT, val: ValData, stride: int, cfg: Config, run: Run, name: str, weights: Callable = Weights
                ) -> Score:
    """Score of the whole validation stream with fixed weights and windows that advance by `stride` targets."""
    scorer = Scorer(val, cfg, run)
    score_windows(model, plan_windows(val, cfg.eval_seq_len, stride), scorer, name, weights)
    return scorer.ledger.close(val.target_bytes, run)[0]

class DocumentBatch(NamedTuple):
    """Documents that are adapted to side by side, one a row, chunk by chunk from their starts."""
    documents: tuple[int, ...]
    edges: tuple[int, ...]  # where chunks begin and end, in targets from the documents' starts; the last is beyond all
    cost: int  # in token-forwards; a step costs as much as STEP_TOKENS tokens even where it has few

STEP_TOKENS = 512  # fixed cost of a chunk step in tokens, for packing: launches, the optimizer, small products

def tokens_run(begin: int, end: int, cfg: Config) -> int:
    """Tokens of one document that go through the model to score its targets [begin, end)."""
    first = {"cache": begin, "recompute": max(0, end - cfg.eval_seq_len)}[cfg.ttt_context]
    return end - first

def plan_batches(documents: np.ndarray, lengths: np.ndarray, cfg: Config, world: int) -> list[DocumentBatch]:
    """Every document (numbers, targets of each) in one batch, costliest batch first.
    Neighbours in length share a batch while the padding costs less than steps of their own, up to TTT_BATCH_SIZE rows,
    and fewer where the ranks would otherwise have too few batches, or too long ones, to share evenly.
    """
    edges = np.arange(0, int(lengths.max(initial=0)) + cfg.ttt_chunk_size, cfg.ttt_chunk_size)
    row_cost = np.cumsum([0, *(tokens_run(a, b, cfg) for a, b in zip(edges.tolist(), edges[1:].tolist()))])
    chunks = np.searchsorted(edges, lengths)  # of each document by itself
    most, largest = cfg.ttt_batch_size, math.inf
    if world > 1:
        most = min(most, max(1, len(documents) // (4 * world)))
        largest = (row_cost[chunks].sum() + chunks.sum() * STEP_TOKENS / most) / (8 * world)
    batches = [(0, [])]  # (chunks, documents)
    for i in np.argsort(-lengths, kind="stable")[:np.count_nonzero(lengths)].tolist():
        own, (longest, rows) = int(chunks[i]), batches[-1]
        if rows and len(rows) < most and row_cost[longest] - row_cost[own] <= own * STEP_TOKENS \
                and longest * STEP_TOKENS + (len(rows) + 1) * row_cost[longest] <= largest:
            rows.append(int(documents[i]))
        else:
            batches.append((own, [int(documents[i])]))
    return sorted((DocumentBatch(tuple(rows), tuple(edges[:longest + 1].tolist()),
                                 int(longest * STEP_TOKENS + len(rows) * row_cost[longest]))
                   for longest, rows in batches[1:]), key=lambda batch: (-batch.cost, batch.documents))

def assign_to_ranks(batches: Sequence, world: int) -> list:
    """Batches to ranks: the costliest first, each to the rank with the least work so far (Graham 1969)."""
    assigned = [[] for _ in range(world)]
    load = [0] * world
    for batch in batches:
        rank = load.index(min(load))
        assigned[rank].append(batch)
        load[rank] += batch.cost
    return assigned

class EvalBudget:
    """Watches the projected end of evaluation: while it lies beyond EVAL_SECONDS_BUDGET, nothing adapts.
    What does not adapt is still scored, by what has been learned: no target is ever left out. Waiting for other ranks
    counts as time; as the pace of this rank's work only within a chunk of TTT=sgd, which all ranks end together.
    """
    LEAST_SECONDS = 5.0  # work before the first projection: the first steps load kernels and say little

    def __init__(self, total_cost: float, cfg, run, steps: int = 0):
        """total_cost: tokens, and STEP_TOKENS for each of `steps`; or parts of any size."""
        self.cfg, self.run, self.total = cfg, run, np.array([STEP_TOKENS * steps, total_cost - STEP_TOKENS * steps, 0])
        self.done, self.products = np.zeros(3), np.zeros((3, 3))  # of (fixed cost, other cost, seconds), their products
        self.used, self.started, self.cut = run.spent("eval"), time.perf_counter(), False

    @contextlib.contextmanager
    def work(self, cost: float, steps: int = 0) -> Iterator:
        """What happens inside is work of this cost, `steps` of it included."""
        start = time.perf_counter()
        yield
        piece = np.array([STEP_TOKENS * steps, cost - STEP_TOKENS * steps, time.perf_counter() - start])
        self.done, self.products = self.done + piece, self.products + np.outer(piece, piece)

    def seconds_ahead(self) -> float:
        """Of the work that is left. What a step and a token cost is fitted to the work so far: STEP_TOKENS is a CPU's.
        At a hundredth of the weight it decides where pieces are alike (docs/LOG.md 2026-11-28)."""
        *done, busy = self.done
        a, y = self.products[:2, :2], self.products[:2, 2]
        little = 0.01 * a.diagonal()
        pace = np.linalg.lstsq(a + np.diag(little), y + little * busy / sum(done), rcond=None)[0].clip(0)
        return float(busy * (pace @ (self.total - self.done)[:2].clip(0)) / (pace @ done))

    def allows(self) -> bool:
        """Whether there is time to adapt now: the projected end, at the pace so far, lies within the budget."""
        ahead = self.seconds_ahead() if self.done[2] > self.LEAST_SECONDS else 0.0
        late = self.used + time.perf_counter() - self.started + ahead > self.cfg.eval_seconds_budget
        if late and not self.cut:
            self.run.log("adaptation_cut", budget_seconds=self.cfg.eval_seconds_budget,
                         work=float(self.done[:2].sum() / max(1.0, self.total.sum())))
        self.cut |= late
        return not late

def score_documents(model: GPT, batches: Sequence, scorer: Scorer, budget: EvalBudget, name: str):
    """Scores whole documents, each with adapters that learn from its own chunks once these are scored."""
    model.requires_grad_(False)
    with torch.no_grad():
        base = Weights(model, scorer.run.dtype)
    with scorer.run.progress(sum(batch.cost for batch in batches), name, "tok") as bar:
        for batch in batches:
            for cost in adapt_and_score(model, base, batch, scorer, budget):
                bar.update(cost)
    model.requires_grad_(True)

def warmup_adapters(model: GPT, cfg: Config, run: Run):
    """Compiles a chunk step on random documents, for one row and for more of them: outside the budget, as #1855."""
    size = cfg.ttt_chunk_size
    ids = np.random.default_rng(cfg.seed).integers(2, cfg.vocab_size, 6 * size + 1).astype(np.uint16)
    scorer = Scorer(ValData(ids, np.arange(3) * 2 * size, np.ones(6 * size, dtype=np.int32)), cfg, run)
    batches = [DocumentBatch(documents, (0, size, 2 * size), 1) for documents in ((0,), (1, 2))]
    with run.phase("warmup_adapters"):
        score_documents(model, batches, scorer, EvalBudget(1, cfg, run), "warm-up")

class DocumentRows:
    """The documents of one batch on the device, padded to its last chunk: the inputs and targets of any chunk."""

    def __init__(self, batch: DocumentBatch, val, device: torch.device):
        self.documents, self.total = np.array(batch.documents), batch.edges[-1]
        self.begins = val.starts[self.documents]
        self.lengths = val.stops[self.documents] - self.begins
        ids = np.full((len(self.documents), self.total + 2), BOS_ID, dtype=np.int64)  # column c is position c - 1
        for row, begin, length in zip(ids, self.begins, self.lengths):
            row[1:length + 2] = val.ids[begin:begin + length + 1]
        self.ids = torch.from_numpy(ids).to(device)
        self.column = torch.arange(-1, self.total, device=device)
        self.sizes = torch.from_numpy(self.lengths).to(device)[:, None]
        self.real = self.column[1:] < self.sizes
        self.numbers = torch.from_numpy(self.begins).to(device)[:, None] + self.column[None, 1:]
        self.targets = torch.where(self.real, self.ids[:, 2:], IGNORE)

    def inputs(self, first: int, end: int, prefix: int) -> Batch:
        """Positions [first - prefix, end) as a batch; rows that do not start their document count from `first`."""
        window = self.ids[:, first + 1 - prefix:end + 1].contiguous()
        positions = self.column[first + 1 - prefix:end + 1] - first * (prefix == 0)
        starts = torch.arange(0, window.numel() + 1, window.size(1), device=window.device, dtype=torch.int32)
        return Batch(window, window, positions.int().repeat(len(window), 1), starts)

    def note(self, ledger: Ledger, kind: int, live: np.ndarray, begin: int, end: int):
        """Tells the ledger that the documents `live` (bool) score, or learn from, their targets [begin, end)."""
        ledger.note(kind, self.documents[live], self.begins[live] + begin,
                    self.begins[live] + np.minimum(end, self.lengths[live]))

def adapt_and_score(model: GPT, base: Weights, batch: DocumentBatch, scorer: Scorer, budget: EvalBudget
                    ) -> Iterator[float]:
    """One batch: chunk by chunk, score first, then a step of the adapters on that chunk; yields their costs.
    TTT_CONTEXT=cache computes each token once and keeps keys and values; recompute runs the whole window of a chunk
    again with the newest adapters. Both score, and learn from, the chunk's targets alone.
    """
    cfg, run, ledger, layers = scorer.cfg, scorer.run, scorer.ledger, unroll_layers(model.cfg, looped=True)
    rows = DocumentRows(batch, scorer.val, run.device)
    scores = torch.zeros(len(rows.documents), rows.total, device=run.device)
    w = AdaptedWeights(base, model, layers, len(rows.documents), cfg)
    a, b = w.parameters[::2], w.parameters[1::2]
    groups = [dict(params=b), dict(params=a, lr=cfg.ttt_lora_a_share * cfg.ttt_lora_lr)]
    # Elementwise, so that documents stay independent.
    optimizer = torch.optim.AdamW(groups, lr=cfg.ttt_lora_lr, betas=(0.0, 0.99), eps=cfg.ttt_eps,
                                  weight_decay=cfg.ttt_weight_decay, fused=True)
    cache, forward, compiles = KeyValueCache(cfg.eval_seq_len), model.forward, False
    if cfg.ttt_context == "recompute":
        cache, forward, compiles = NO_CACHE, run.compiled(model.forward), run.compiles
    for begin, end in zip(batch.edges, batch.edges[1:]):
        size, cost = end - begin, STEP_TOKENS + len(rows.documents) * tokens_run(begin, end, cfg)
        goes_on = rows.lengths > end
        learns = bool(goes_on.any()) and budget.allows()
        with budget.work(cost, steps=1):
            inputs = rows.inputs(end - tokens_run(begin, end, cfg), end, cache.prefix)
            if compiles:  # one graph for all lengths and numbers of rows, the last chunk's included
                inputs = model.to_device(inputs, run)
                segments, *tables = inputs.mask_and_rotary
                of_any_size([segments] if isinstance(segments, Tensor) else segments, 0, 2, 3)
                of_any_size([inputs.ids, inputs.positions, *tables], 0, 1)
                of_any_size(w.parameters, 0)
            with torch.set_grad_enabled(learns or compiles):
                hidden = forward(inputs, layers, w, cache)[:, -size:]
                nats, losses = scorer.nats(model, hidden, rows.targets[:, begin:end], rows.numbers[:, begin:end], w)
            scores[:, begin:end] = nats.view(-1, size)
            rows.note(ledger, Ledger.SCORE, rows.lengths > begin, begin, end)
            if learns:
                weight = (rows.sizes > end).to(losses.dtype) / size  # a document that ends learns no more
                (losses.view(-1, size) * weight).sum().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                rows.note(ledger, Ledger.UPDATE, goes_on, begin, end)
            cache.advance(size)
            if end == rows.total:  # waits for the device
                ledger.record(rows.numbers[rows.real].cpu(), scores[rows.real])
        yield cost

class SharedSgd:
    """SGD of the shared weights on stretches of the stream, over all ranks (momentum 0.9, batches of 32 rows).
    Where the run compiles, the graph is made here, on random ids; the log has its seconds, no budget (as #1855)."""
    MOMENTUM, BATCH_ROWS, CLIP = 0.9, 32, 1.0  # as in #549, #1413 and #1626

    def __init__(self, model, ids: np.ndarray, cfg, run):
        self.model, self.ids, self.cfg, self.run, layers = model, ids, cfg, run, unroll_layers(model.cfg, looped=True)
        self.loss = run.compiled(lambda batch: model.total_loss(batch, layers, run.dtype))
        most = min(self.BATCH_ROWS, -(-cfg.ttt_chunk_tokens // cfg.train_seq_len))  # rows of a step, over all ranks
        self.micro = max(1, min(-(-most // run.world), cfg.micro_batch_tokens // cfg.train_seq_len))
        if run.compiles:
            with run.phase("warmup_sgd"):
                self.loss(model.to_device(random_batch(self.micro, cfg), run)).backward()
        self.forget()

    def forget(self):
        """Begins with fresh momentum."""
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=self.MOMENTUM)
        self.optimizer.zero_grad(set_to_none=True)

    def learn(self, first: int, stop: int, lr: float):
        """One step a batch of rows over targets [first, stop), each with the mean loss of its batch.
        Gradients are summed over ranks in one message and clipped."""
        seq_len, run, parameters = self.cfg.train_seq_len, self.run, list(self.model.parameters())
        spans = [(at, min(at + seq_len, stop)) for at in range(first, stop, seq_len)]
        self.optimizer.param_groups[0]["lr"] = lr
        for at in range(0, len(spans), self.BATCH_ROWS):
            part = spans[at:at + self.BATCH_ROWS]
            mine, count = part[run.rank::run.world], sum(b - a for a, b in part)
            for i in range(0, len(mine), self.micro):
                rows = [self.ids[a:b + 1] for a, b in mine[i:i + self.micro]]
                num_rows = self.micro if run.compiles else len(rows)
                batch = self.model.to_device(make_batch(rows, num_rows, seq_len), run)
                (self.loss(batch) / count).backward()
            # A rank may have had no row.
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = run.all_reduce(torch.cat([g.flatten() for g in grads]))
            clip_([flat], flat.norm(), self.CLIP)
            for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.grad = g.view_as(p)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

def cosine(i: int, count: int) -> float:
    """From 1 at i = 0 to 0 at the last of `count`."""
    return 0.5 * (1 + math.cos(math.pi * i / max(1, count - 1)))

def score_and_learn(score: Callable, learn: Callable, spans: Sequence, scorer: Scorer, budget: EvalBudget):
    """Scores each part, then lets the shared weights learn: the one order of everything that adapts.
    After `score(i)`, `learn(i)` learns from targets spans[i] = (begin, end); begin = end: nothing is learned."""
    for i, (begin, end) in enumerate(spans):
        score(i)
        if begin < end and scorer.run.broadcast_object(budget.allows()):
            learn(i)
            scorer.ledger.note(Ledger.UPDATE, Ledger.BASE, begin, end)
        scorer.ledger.phase += 1

def chunked_sgd(model: GPT, scorer: Scorer):
    """Scores windows of TTT_CHUNK_TOKENS targets, from which the whole model then learns (#1413, #549).
    A window belongs to the chunk of its first scored target. Momentum runs on; the rate falls as a cosine over chunks.
    """
    val, cfg = scorer.val, scorer.cfg
    windows = plan_windows(val, cfg.eval_seq_len, cfg.stride)
    edges = [*range(0, val.num_targets, cfg.ttt_chunk_tokens), val.num_targets]
    cuts = np.searchsorted([window.first for window in windows], edges).tolist()
    count, sgd = len(edges) - 1, SharedSgd(model, val.ids, cfg, scorer.run)
    budget = EvalBudget(count, cfg, scorer.run)

    def score(c):
        with budget.work(1):
            score_windows(model, windows[cuts[c]:cuts[c + 1]], scorer, f"chunk {c + 1}/{count}")

    def learn(c):
        with budget.work(0):  # its time belongs to the chunk's
            for _ in range(cfg.ttt_epochs):
                sgd.learn(edges[c], edges[c + 1], cfg.ttt_lr * cosine(c, count))

    spans = list(zip(edges, edges[1:-1])) + [(0, 0)]  # nothing is scored after the last one
    score_and_learn(score, learn, spans, scorer, budget)

def phased_lora(model: GPT, scorer: Scorer):
    """Scores documents with adapters of their own; after each phase the shared weights learn from all of them so far.
    The phases end at equal shares of the first PHASED_TTT_PREFIX_DOCS documents of the stream (#1610, which took the
    longest ones instead). Momentum and rate begin anew in each.
    """
    val, cfg, run = scorer.val, scorer.cfg, scorer.run
    documents, phases = np.arange(len(val.starts)), cfg.phased_ttt_num_phases
    ends = [min(cfg.phased_ttt_prefix_docs * (i + 1) // phases, len(documents)) for i in range(phases)]
    edges = [0, *ends, len(documents)]
    spans = [(0, int(val.starts[end]) if begin < end < len(documents) else 0) for begin, end in zip(edges, edges[1:])]
    sgd = SharedSgd(model, val.ids, cfg, run) if phases else None
    if run.compiles and cfg.ttt_context == "recompute":
        warmup_adapters(model, cfg, run)

    def mine(documents):
        """This rank's batches of these documents."""
        batches = plan_batches(documents, (val.stops - val.starts)[documents], cfg, run.world)
        return assign_to_ranks(batches, run.world)[run.rank]

    whole = mine(documents)
    steps = sum(len(batch.edges) - 1 for batch in whole)
    budget = EvalBudget(sum(batch.cost for batch in whole), cfg, run, steps)

    def score(i):
        score_documents(model, mine(documents[edges[i]:edges[i + 1]]), scorer, budget, f"phase {i + 1}/{len(spans)}")

    def learn(i):
        stop = spans[i][1]
        with run.phase("shared_sgd", "eval"):
            sgd.forget()
            starts = range(0, stop, cfg.ttt_chunk_tokens)
            for c, at in enumerate(starts):
                sgd.learn(at, min(at + cfg.ttt_chunk_tokens, stop), cfg.global_ttt_lr * cosine(c, len(starts) + 1))

    score_and_learn(score, learn, spans, scorer, budget)

def adapted_score(model: GPT, scorer: Scorer) -> tuple:
    """(score of the validation stream with everything the knobs ask for, the ledger's digest), in the stream's order.
    The shared weights of `model` change."""
    val, cfg = scorer.val, scorer.cfg
    if cfg.ttt == "none":
        score_windows(model, plan_windows(val, cfg.eval_seq_len, cfg.stride), scorer, "score")
    else:
        {"sgd": chunked_sgd, "lora": phased_lora}[cfg.ttt](model, scorer)
    return scorer.ledger.close(val.target_bytes, scorer.run)


# ======== 12 Train, main: the story, in order
# Safe to change: what is logged. The order is law: no token of validation decides anything before the
# artifact is frozen; VAL_LOSS_EVERY only looks.

def stage_weights(model: GPT, stage: Stage, cfg: Config) -> Callable:
    """How a stage reads its matrices: as they are, or as the artifact will hold them."""
    return functools.partial(RoundedWeights, bank_grids(model, cfg)) if stage.rounded else Weights

def stage_loss(model: GPT, stage: Stage, cfg: Config, run: Run) -> Callable:
    """The loss that a stage differentiates, in mean nats of the global batch; compiled where the run compiles."""
    layers = unroll_layers(cfg, stage.looped)
    weights = stage_weights(model, stage, cfg)
    total = run.compiled(lambda batch: model.total_loss(batch, layers, run.dtype, weights))
    return lambda batch: total(model.to_device(batch, run)) / cfg.train_batch_tokens

def backward(loss: Tensor) -> Tensor:
    """Adds the loss's gradients to the parameters'; returns its value."""
    loss.backward()
    return loss.detach()

def warmup(losses: Mapping, optimizer: ShardedOptimizer, data: TrainData, cfg: Config, run: Run):
    """Runs every graph on random tokens and the optimizer at learning rate 0, then forgets its momentum.
    Compilation and allocation happen here, outside the clock; the weights do not change by a bit."""
    for loss in losses.values():
        for _ in range(cfg.warmup_steps):
            backward(loss(random_batch(data.micro_rows, cfg)))
            optimizer.step(0.0, 0.0)
    inverse_factor(torch.eye(2, device=run.device)[None])  # loads cuSOLVER here, not inside GPTQ's reserve
    optimizer.reset()

class Checkpoints:
    """Saves training when CHECKPOINT_EVERY says so or a signal asks to stop, and goes on from what was saved."""

    def __init__(self, model, optimizer, average, data, cfg, run):
        self.model, self.optimizer, self.average, self.data = model, optimizer, average, data
        self.cfg, self.run, self.path = cfg, run, run.path(".ckpt")

    def knobs(self) -> dict:
        """What must be the same in the run that goes on: the corpus, and every knob that decides how training does."""
        later = NO_RESULT | {*kinds(EvalKnobs), *kinds(RunKnobs), "micro_batch_tokens", "warmup_steps",
                             "train_log_every", "val_loss_every"}
        if self.cfg.qat_start == 1:
            later |= set(kinds(QuantKnobs))
        names = set(kinds(Config)) - later | {"seed"}
        return {"corpus": self.data.corpus, **{name: getattr(self.cfg, name) for name in sorted(names)}}

    def tensors(self) -> dict:
        """Everything that training changes, by name (a collective); weights and averages are the live ones."""
        return {**{f"weights.{name}": p.detach() for name, p in self.model.named_parameters()},
                **{f"average.{i}": values for i, values in enumerate(self.average.average)}, **self.optimizer.tensors()}

    def save(self, step: int, clock: TrainClock):
        """Writes the state before `step`; a disk that is full ends no run."""
        tensors = self.tensors()
        if self.run.is_main:
            try:
                save_checkpoint(self.path, tensors, {"step": step, "elapsed": clock.seconds(), "knobs": self.knobs()})
                self.run.log("checkpoint", step=step, path=str(self.path), bytes=self.path.stat().st_size)
            except OSError as error:
                self.run.log("warning", text=f"{self.path}: checkpoint not written: {error}")

    def after(self, step: int, clock: TrainClock, last: bool = False):
        """Once `step` steps are done: saves if that is due or a signal asks to stop, and then ends the run by it."""
        every = self.cfg.checkpoint_every
        due = every > 0 and (last or step % every == 0)
        if step % clock.every and not (due or last):
            return
        asked = int(self.run.broadcast(torch.tensor(self.run.stop)))
        if due or asked:
            self.save(step, clock)
        if asked:
            self.run.end_by_signal(asked)

    def restore(self) -> tuple:
        """(step, seconds of the budget used) with which training begins, or goes on after RESUME."""
        if not self.run.resumes:
            return 0, 0.0
        own, state, saved = self.tensors(), {}, {}
        if self.run.is_main:
            state, saved = load_checkpoint(self.path, own)
        state = self.run.broadcast_object(state)
        for name, value in self.knobs().items():
            require(state["knobs"].get(name) == value, f"{name.upper()}={show(value)}, but {self.path} was made with "
                    f"{state['knobs'].get(name)}; set that back, or start anew with another RUN_ID")
        with torch.no_grad():
            for name, value in own.items():
                self.run.broadcast(value.copy_(saved.get(name, value)))
        self.optimizer.load(own)
        self.run.started -= state["elapsed"]  # this run began that much earlier
        self.run.charged["train"] += state["elapsed"]
        self.run.log("resume", step=state["step"], path=str(self.path))
        return state["step"], state["elapsed"]

MAX_SKIPPED_STEPS = 3  # a gradient that is not finite counts as zero; after more such steps in all the run has diverged

class Report:
    """The log lines of training: the first steps, then every TRAIN_LOG_EVERY; and validation of the live weights."""

    def __init__(self, model, optimizer, cfg, run, clock, step, bar):
        self.model, self.optimizer, self.cfg, self.run, self.clock, self.bar = model, optimizer, cfg, run, clock, bar
        self.logged, self.stage, self.val = (step, clock.seconds()), None, None
        self.losses, self.loss = [], math.nan  # of the steps that are not in the JSON lines yet; the last that is
        self.quarters = 0  # of the budget, that a screen without a progress bar has seen

    def step(self, step: int, progress: float, stage: Stage, loss: Tensor, norm: Tensor):
        """Logs `step` steps done, if it is time to; `loss` is this rank's share. Raises `DivergedError`."""
        cfg, run = self.cfg, self.run
        self.losses.append(loss)
        self.bar.update(100 * progress - self.bar.n)
        if stage != self.stage:
            self.stage = stage
            run.log("stage", step=step - 1, progress=progress, rounded=stage.rounded,
                    layers=len(unroll_layers(cfg, stage.looped)))
        if step <= 5 or step % cfg.train_log_every == 0:
            total, seconds, skipped = self.flush(step), self.clock.seconds(), self.optimizer.skipped
            each = (seconds - self.logged[1]) / (step - self.logged[0])
            speed = int(cfg.train_batch_tokens / max(1e-9, each))
            run.log("train", step=step, progress=progress, loss_nats=total, grad_norm=norm.item(), skipped=int(skipped),
                    lr_scale=lr_scale(cfg, progress), ms_per_step=1000 * each, train_seconds=seconds, tok_per_s=speed)
            self.logged = (step, seconds)
            self.bar.set_postfix_str(f"step {step:,}, loss {total:.3f}, {speed:,} tok/s")
            if self.bar.disable and int(4 * progress) > self.quarters:  # no terminal: a line now and then
                self.quarters = int(4 * progress)
                run.say(f"{progress:4.0%} of training: step {step:,}, loss {total:.4f}, {speed:,} tokens/s")
            if skipped > MAX_SKIPPED_STEPS:
                raise DivergedError(f"loss or gradient is not finite at step {step}, in {int(skipped)} steps so far; "
                                    f"lower MATRIX_LR={cfg.matrix_lr:g} or TIED_EMBED_LR={cfg.tied_embed_lr:g}")
        if cfg.val_loss_every and step % cfg.val_loss_every == 0:
            with self.clock.pause(), run.phase("val_probe"):
                self.val = self.val or ValData.load(cfg, run)
                weights = stage_weights(self.model, stage, cfg)
                score = score_fixed(self.model, self.val, cfg.eval_seq_len, cfg, run, "probe", weights)
            run.log("val_probe", step=step, val_loss=score.val_loss, val_bpb=score.val_bpb)
            self.logged = (step, self.clock.seconds())

    def flush(self, step: int) -> float:
        """Writes the losses of the last steps up to `step` to the JSON lines (a collective); returns that of `step`."""
        if self.losses:
            losses = self.run.all_reduce(torch.stack(self.losses)).tolist()
            first, self.losses, self.loss = step - len(losses) + 1, [], losses[-1]
            finite = [round(loss, 5) if math.isfinite(loss) else None for loss in losses]  # JSON knows no NaN
            self.run.record("steps", {"first": first, "loss_nats": finite})
        return self.loss

def train(model: GPT, data: TrainData, cfg: Config, run: Run) -> dict:
    """Trains within the budget and leaves the averaged weights in the model; returns figures for the verdict."""
    losses = {stage: stage_loss(model, stage, cfg, run) for stage in stages(cfg)}
    with run.phase("warmup"):
        optimizer, average = ShardedOptimizer(model, cfg, run), Ema(model, cfg.ema_decay)
        warmup(losses, optimizer, data, cfg, run)
        checkpoints = Checkpoints(model, optimizer, average, data, cfg, run)
        start, elapsed = checkpoints.restore()
    step = start
    with run.phase("train", "train"), run.progress(100, "train", "%") as bar:
        clock = TrainClock(cfg, run, start, elapsed)
        report = Report(model, optimizer, cfg, run, clock, start, bar)
        run.can_wait = True  # a signal is looked at after the step
        for step, batches in data.steps(start):
            progress = clock.progress(step)  # used share of the budget, the same on every rank
            if progress >= 1:
                break
            run.status = f"train step {step + 1}"
            stage = stage_at(cfg, progress)  # loop on or off, rounded or not: one compiled graph each
            loss = sum(backward(losses[stage](batch)) for batch in batches)
            norm = optimizer.step(lr_scale(cfg, progress), muon_momentum(cfg, step))
            average.update()
            report.step(step + 1, progress, stage, loss, norm)
            checkpoints.after(step + 1, clock)
        run.can_wait = False
        checkpoints.after(step, clock, last=True)  # the artifact is not made yet
    figures = {"steps": step, "train_loss": report.flush(step)}
    run.log("train_end", **figures, train_seconds=clock.seconds(), tokens=step * cfg.train_batch_tokens,
            peak_mib=torch.cuda.max_memory_allocated() >> 20)
    require(step > 0, f"MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds:g} ended before the first step; raise it")
    average.load_into_model()
    if not all(torch.isfinite(values).all() for values in average.average):
        raise DivergedError(f"the averaged weights are not finite at step {step}, the last one; "
                            f"lower MATRIX_LR={cfg.matrix_lr:g} or TIED_EMBED_LR={cfg.tied_embed_lr:g}")
    if stages(cfg)[-1].rounded:
        snap_banks(model, cfg)
    return figures

def train_and_pack(model: GPT, code_bytes: int, cfg: Config, run: Run) -> tuple:
    """Trains, quantizes, packs and writes: (the artifact as read back from disk, figures for the verdict)."""
    with run.phase("load_train"):
        data, said = TrainData(cfg, run), cfg.dataset_dir / "manifest.json"
        check_stamp(cfg, run)
        run.log("train_data", shards=len(data.stream.paths), tokens=len(data.stream), rows_a_step=cfg.train_rows,
                rows_a_forward=data.micro_rows, forwards_a_step=data.num_micro, corpus=data.corpus,
                manifest_sha256=file_sha256(said) if said.is_file() else None)
    figures = train(model, data, cfg, run)
    with run.phase("calibrate", "train"):
        sums = calibrate(model, data, figures["steps"] * cfg.train_rows, cfg, run)
    blob, path = fit_to_cap(model, sums, code_bytes, cfg, run, validation_digest(cfg)), run.path(".bin")
    if run.is_main:
        try:
            write_whole(path, lambda temporary: temporary.write_bytes(blob))
        except OSError as error:
            raise UserError(f"{path}: cannot write: {error}; make room{run.how_to_resume()}") from None
        blob = path.read_bytes()  # what is scored is what lies on the disk
        run.path(".ckpt").unlink(missing_ok=True)  # nothing goes on from it any more
    return run.broadcast_object(blob), figures

def evaluate(blob: bytes, average: GPT | None, kernels: Kernels, code_bytes: int, cfg: Config, run: Run, figures: dict):
    """Scores the artifact's bytes and logs the verdict; `average`: the weights before quantization, for comparison."""
    path = cfg.eval_only or str(run.path(".bin"))
    with run.phase("load_artifact", "eval"):
        artifact = unpack(blob, path)
        model = shapes_of(artifact.model).to_empty(device=run.device)  # without initial values: all are loaded
        model.kernels = kernels
        load_tensors(model, artifact.tensors)
    run.log("artifact", path=path, sha256=hashlib.sha256(blob).hexdigest(), weight_bytes=len(blob),
            code_bytes=code_bytes, left_bytes=cfg.artifact_bytes_cap - len(blob) - code_bytes, streams=artifact.streams)
    with run.phase("load_val", "eval"):
        val, validation = ValData.load(cfg, run), validation_digest(cfg)
        stream = hashlib.sha256(val.ids.tobytes() + val.target_bytes.tobytes()).hexdigest()
        run.log("val_data", documents=len(val.starts), targets=val.num_targets, bytes=int(val.target_bytes.sum()),
                validation=validation, sha256=stream,
                compressors=manifest(cfg.dataset_dir).get("compressors"))
        other = artifact.validation not in ("", validation)
        if other:
            run.log("warning", text=f"{path} was made for another validation set or tokenizer than {cfg.dataset_dir}'s")
    diagnostics = {}
    for name in filter(None, cfg.diagnostic_evals.split(",")):
        scored, stride = {"ema": (average, cfg.eval_seq_len), "quantized": (model, cfg.eval_seq_len),
                          "sliding": (model, cfg.stride)}[name]
        if scored is not None:
            with run.phase(f"score_{name}"):
                score = score_fixed(scored, val, stride, cfg, run, name)
            run.log("score", name=name, val_loss=score.val_loss, val_bpb=score.val_bpb)
            diagnostics[name] = score.val_bpb
    hints = None
    if cfg.ngram_base_beta:
        with run.phase("ngram", "eval"):
            ids = torch.from_numpy(val.ids.astype(np.int64)).to(run.device)
            hints = ngram_hints(ids, cfg)
            right = (hints[0] == ids[1:]) & (hints[1] > 0)
            run.log("ngram", hinted=int((hints[1] > 0).sum()), targets=val.num_targets, right=int(right.sum()))
    with run.phase("score", "eval"):
        scorer = Scorer(val, cfg, run, hints)
        score, digest = adapted_score(model, scorer)
    nats = scorer.ledger.nats.numpy()
    run.record("places", by_place(nats, val.target_bytes, val))
    # Nats up to the end of each: what a referee can score again from the artifact in a minute.
    run.record("first_documents", {"nats": nats.cumsum(dtype=np.float64)[val.stops[:16] - 1].tolist()})
    name = {"none": "sliding" if cfg.eval_stride else "plain"}.get(cfg.ttt, cfg.ttt) + "+ngram" * (hints is not None)
    run.log("score", name=name, val_loss=score.val_loss, val_bpb=score.val_bpb)
    run.log("verdict", **{of: getattr(score, of) for of in ("val_bpb", "val_loss", "tokens", "bytes")},
            diagnostic_evals={**diagnostics, name: score.val_bpb}, artifact_bytes=len(blob) + code_bytes,
            weight_bytes=len(blob), code_bytes=code_bytes, cap_bytes=cfg.artifact_bytes_cap,
            train_seconds=round(run.spent("train"), 3), eval_seconds=round(run.spent("eval"), 3),
            other_seconds=round(run.spent("none"), 3), total_seconds=round(time.perf_counter() - run.started, 3),
            parameters=sum(p.numel() for p in model.parameters()), seed=cfg.seed, run_id=run.run_id,
            ledger_sha256=digest, order="stream", validation=validation, other_validation=other, **figures)

def preflight(model: GPT, code_bytes: int, cfg: Config, run: Run):
    """Heads the log, and finds before training what would stop a later stage: packages, tokenizer, validation, cap."""
    installed = ("numpy", "sentencepiece", "brotli", "constriction", "safetensors", "triton")
    found = reversed([*importlib.metadata.distributions()])  # the first of a name counts, whoever brings the package
    known = {str(of.metadata["Name"]).lower(): of.version for of in found}
    versions = {name: known.get(name, "?") for name in installed if importlib.util.find_spec(name)}
    decisive = {name: value for name, value in vars(cfg).items() if name not in NO_RESULT}
    device = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if run.is_cuda:
        device = torch.cuda.get_device_name(run.device)
    run.log("start", run_id=run.run_id, python=platform.python_version(), torch=torch.__version__, device=device,
            world=run.world, dtype=str(run.dtype).removeprefix("torch."), threads=torch.get_num_threads(),
            compile=run.compiles, attention=model.kernels.attention.name, kernels=model.kernels.fused,
            code_sha256=file_sha256(Path(__file__)), code_bytes=code_bytes, **versions,
            config_sha256=hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest())
    run.record("config", vars(cfg))
    # Those that differ from the preset `record`; on screen those that differ from the preset.
    run.log("knobs", **{k.upper(): show(value) for k, value in vars(cfg).items() if value != getattr(Config, k)})
    run.say(" ".join(f"{k.upper()}={show(value)}" for k, value in cfg.changed().items()
                     if k not in NO_RESULT | {"preset"}))
    run.log("model", parameters=sum(p.numel() for p in model.parameters()),
            layers=[layer.block for layer in unroll_layers(cfg, looped=False)],
            layers_looped=[layer.block for layer in unroll_layers(cfg, looped=True)])
    missing = {"brotli", "safetensors", "sentencepiece"} - set(versions)
    require(not missing, f"package {' '.join(missing)} is missing; pip install -r requirements.txt")
    open_validation(cfg)
    check_cap(model, code_bytes, cfg)

@contextlib.contextmanager
def out_of_memory(cfg: Config, run: Run) -> Iterator:
    """What says inside that there is no memory becomes one line: phase, and the knob to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError; a CPU's has no name
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        knob = "micro_batch_tokens"
        if run.status.startswith(("score", "val_probe")):
            knob = "ttt_batch_size" if run.status == "score" and cfg.ttt == "lora" else "val_batch_tokens"
        raise LocalError(f"out of memory in phase {run.status}: lower {knob.upper()}={getattr(cfg, knob)} "
                         f"({one_line(error)}){run.how_to_resume()}") from error

def main(arguments: Sequence[str], env: Mapping) -> int:
    """The whole program; returns the exit status (0 done, 2 user error, 3 diverged, 128 + the signal that ended it)."""
    try:
        blob, stored, digest = b"", {}, ""
        if env.get("EVAL_ONLY"):
            path = Path(env["EVAL_ONLY"])
            require(path.is_file(), f"EVAL_ONLY={path}: no such file")
            blob = path.read_bytes()
            artifact = unpack(blob, str(path))
            stored, digest = artifact.knobs, artifact.validation
        cfg = on_its_data(configure(arguments, env, stored), digest, env)
        with Run(cfg, env) as run, out_of_memory(cfg, run):
            with run.phase("setup"):
                code_bytes = len(shipped_source(Path(__file__)))
                model = build_model(cfg, run)
                preflight(model, code_bytes, cfg, run)
            average, figures = None, {}
            if not blob:
                (blob, figures), average = train_and_pack(model, code_bytes, cfg, run), model
            evaluate(blob, average, model.kernels, code_bytes, cfg, run, figures)
        return 0
    except (UserError, Stopped) as error:
        return complain(error, env)
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # a name that is too long, a file that may not be read
            return complain(LocalError(str(error)), env)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # nothing to wait for: NCCL would, for what the others never join

if __name__ == "__main__":
    faulthandler.enable()  # a mapped shard that shrinks is a bus error: say where
    sys.exit(main(sys.argv[1:], os.environ))
