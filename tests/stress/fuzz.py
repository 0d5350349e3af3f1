"""Throws damaged and hostile bytes at every reader of files that strangers write: the only way out is one clear line.

    ./run.sh bench fuzz [SECONDS] [TARGET ...]         guided by coverage (atheris; Linux): so long each target, 60 s
    ./run.sh bench fuzz --mutations N [TARGET ...]     N mutants of valid files with a fixed seed: what became of them

An input passes if it is accepted, or refused in one line (`UserError`, `ToolError`), with less than 64 MiB of memory
and 10 s of one core. What breaks that is written to `tests/stress/corpus/<target>/`, where a test reads it ever after.
What the guided search has learnt stays in `logs/fuzz/`.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import struct
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import brotli
import numpy as np
import torch

import train_gpt as tg
from bench.common import ROOT, Row, show, write_shard
from tools import foreign, knobs, launch
from tools.common import ToolError, program

CORPUS = ROOT / "tests" / "stress" / "corpus"
MEMORY, SECONDS, ROOM = 64 << 20, 10.0, 1 << 30
"""What one input may take: resident bytes, seconds of one core; and bytes of address space, resident or not."""
RAW = 1 << 20
"""Bytes of tensors that an artifact may claim here; the program's own bound is 256 times as large."""
SMALL = tg.ModelKnobs(vocab_size=64, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, num_loops=0, rope_dims=4,
                      parallel_start_layer=1, bigram_buckets=8, bigram_dim=4)
"""Every kind of tensor in 4 KB."""


REFUSALS = (tg.UserError, ToolError)
"""What readers raise to refuse: one line for the user."""


class BrokenPromise(Exception):
    """What a reader must not do."""


# -- readers --------------------------------------------------------------------------------------------


def read_sealed_artifact(blob: bytes, folder: Path) -> object:
    """The tensors of an artifact."""
    with mock.patch.object(tg, "MAX_RAW_BYTES", RAW):
        return {name: values.numpy().tobytes() for name, values in tg.unpack(blob, "the file").tensors.items()}


def sealed(body: bytes) -> bytes:
    """An artifact of these bytes and the digest that fits them."""
    return body + hashlib.blake2b(body, digest_size=tg.DIGEST_BYTES).digest()


def read_artifact(body: bytes, folder: Path) -> object:
    """The same with a digest that fits whatever comes before it."""
    return read_sealed_artifact(sealed(body), folder)


def read_header(text: bytes, folder: Path) -> object:
    """An artifact with this JSON as its header before the streams of a valid one; lengths and digest fit."""
    (*_, head_bytes), packed = tg.ARTIFACT_HEAD.unpack_from(artifacts()[0]), brotli.compress(text, quality=1)
    head = struct.pack("<I", len(text)) + packed
    return read_artifact(tg.ARTIFACT_HEAD.pack(tg.ARTIFACT_MAGIC, tg.ARTIFACT_VERSION, len(head)) + head +
                         artifacts()[0][tg.ARTIFACT_HEAD.size + head_bytes:], folder)


SHAPES = [(6, 70), (3, 130)]
"""Of the matrices whose codes are read by the targets `range`, `histograms` and `brotli`."""


def read_codes(coder: str, data: bytes, folder: Path) -> object:
    """A stream of codes; its first byte chooses the trellis."""
    found = tg.CODERS[coder][1](data[1:], SHAPES, (1, 4)[data[0] % 2] if data else 1)
    return [matrix.tobytes() for matrix in found]


def read_histograms(data: bytes, folder: Path) -> object:
    """A range-coded stream from what its Brotli parts unpack to, cut or filled up to the lengths that are asked for."""
    data = data.ljust(3, b"\0")
    states, num_kept, num_escaped = (1, 4)[data[0] % 2], 1 + data[1] % 4, data[2] % 8
    sizes = [sum(r + c + 1 for r, c in SHAPES), 2 * num_kept,
             2 * num_kept * tg.Trellis.of(states).density * (tg.ESCAPE + 1), 2 * num_escaped]
    edges = [3, *itertools.accumulate(sizes, initial=3)][1:]
    parts = [brotli.compress(data[a:b].ljust(b - a, b"\1"), quality=0) for a, b in zip(edges, edges[1:])]
    words = data[edges[-1]:len(data) - (len(data) - edges[-1]) % 4]
    head = struct.pack("<7I", *map(len, parts), num_kept, num_escaped, len(words))
    return [matrix.tobytes() for matrix in tg.range_unpack(head + b"".join(parts) + words, SHAPES, states)]


def read_shard(data: bytes, folder: Path) -> object:
    """A training shard through everything that looks at its ids before training does."""
    (folder / "fineweb_train_000000.bin").write_bytes(data)
    stream = tg.TokenStream(folder, "fineweb_train")
    stream.check(512)
    stream.document_starts()
    return stream.read(0, len(stream)).tobytes()


def read_sealed_shard(data: bytes, folder: Path) -> object:
    """A shard that the manifest of its dataset lists, as `./run.sh data verify` looks at it."""
    from data import verify
    (folder / "fineweb_train_000000.bin").write_bytes(data)
    (seed,) = shards()
    listed = {"tokens": len(seed) // 2 - 512, "sha256": hashlib.sha256(seed).hexdigest()}
    found = verify.examine(folder / "fineweb_train_000000.bin", listed, 512)
    tg.require(not found.problem, found.problem)
    return read_shard(data, folder)


EXPECTED = {"weights.a": torch.zeros(3, 2), "skipped": torch.zeros((), dtype=torch.int32)}


def read_checkpoint(data: bytes, folder: Path) -> object:
    """A checkpoint under its own checksum: whose bytes a stranger has chosen is not resumed."""
    (folder / "a.ckpt").write_bytes(data)
    return tg.load_checkpoint(folder / "a.ckpt", EXPECTED)[0]


def dataset(folder: Path) -> tg.Config:
    """A small valid dataset without tokenizer, manifest and list of documents."""
    for split in ("train", "val"):
        path = folder / f"fineweb_{split}_000000.bin"
        if not path.exists():
            write_shard(path, np.array([tg.BOS_ID, 5, 6, tg.BOS_ID, 7 + (split == "val")]))
    return tg.Config(data_path=str(folder), vocab_size=64)


QUIET = types.SimpleNamespace(log=lambda *event, **values: None)
"""As much of a `Run` as `check_stamp` asks for."""


def read_manifest(data: bytes, folder: Path) -> object:
    """A dataset's manifest.json, by training and by `./run.sh data verify`."""
    from data import verify
    cfg = dataset(folder)
    (folder / "manifest.json").write_bytes(data)
    (folder / "tokens.model").write_bytes(tokenizers()[0])
    tg.tokenizer_path(cfg)
    return verify.verify(folder, None)


def read_stamp(data: bytes, folder: Path) -> object:
    """What the verification of a dataset left, by training."""
    cfg = dataset(folder)
    (folder / "verified.json").write_bytes(data)
    return tg.check_stamp(cfg, QUIET)


def read_tokenizer(data: bytes, folder: Path) -> object:
    """A SentencePiece model and its table of bytes."""
    (folder / "tokens.model").write_bytes(data)
    return [table.tobytes() for table in tg.TokenBytes.build(tg.load_sentencepiece(folder / "tokens.model", 400))]


def read_submission(name: str, data: bytes, folder: Path) -> object:
    """One file of a submission's folder, the others valid, by every reader in `tools/`."""
    from tools import logs, replay, show, submission
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder / "one")
    for other, content in submission_files().items():
        (folder / "one" / other).write_bytes(data if name == other else content)
    found = [finding.text for finding in submission.check(folder / "one")]
    if name == "train_seed1.jsonl":
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            show.main([str(folder / "one" / name)])
        with contextlib.suppress(ToolError):
            found += sorted(logs.readable("the log", replay.knobs_of, logs.events(folder / "one" / name), name))
        logs.scored_log(folder / "one" / name)
    if name == "submission.json":
        logs.scored_submission(folder / "one" / name)
    return found


def read_config(data: bytes, folder: Path) -> object:
    """A folder's config.env: its names become environment variables, so they may be knobs and published names alone."""
    (folder / "config.env").write_bytes(data)
    names = {knob.name for knob in knobs.read()}
    values = launch.config_env(folder, names)
    if odd := {name for name in values if name not in names and not foreign.is_published(name)}:
        raise BrokenPromise(f"config.env has set {sorted(odd)}")
    return values


# -- valid files ----------------------------------------------------------------------------------------


@functools.lru_cache(None)
def artifacts() -> list[bytes]:
    """Of a small model with random codes: by the range coder with a trellis, by Brotli without; no digests."""
    return [tg.pack(tg.pack_streams(some_tensors(SMALL, states, 0), states, (coder,)), 0.02, states, SMALL,
                    "demo")[:-tg.DIGEST_BYTES] for coder, states in (("range", 4), ("brotli", 1))]


def some_tensors(model: tg.ModelKnobs, states: int, seed: int) -> dict[str, tg.Quantized]:
    """What a quantizer could have made of such a model: random codes and steps."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, values, parameter in tg.GPT(model).tensors():
        stored, shape = tg.route(parameter).stored, tuple(values.shape)
        steps = [torch.from_numpy(rng.integers(-9, 9, size).astype(np.int8)) for size in (shape[:-1], shape[-1:])]
        if stored == "fp16":
            tensors[name] = tg.Quantized(stored, torch.from_numpy(rng.normal(size=shape).astype("<f2")))
        elif stored == "int8":
            tensors[name] = tg.Quantized(stored, torch.from_numpy(rng.integers(-127, 128, shape, dtype=np.int16)),
                                         steps[0])
        else:
            tensors[name] = tg.Quantized(stored, torch.from_numpy(some_codes(rng, [shape], states)[0]), *steps)
    return tensors


def some_codes(rng: np.random.Generator, shapes: Sequence[Sequence[int]], states: int) -> list[np.ndarray]:
    """Random matrices whose rows are paths through the trellis."""
    noise = tg.zigzag(np.rint(rng.normal(0, 9, sum(r * c for r, c in shapes))).astype(np.int16))
    return tg.brotli_uncodes(brotli.compress(tg.split_bytes(noise.tobytes())), shapes, states)


def headers() -> list[bytes]:
    """The artifacts' headers as JSON."""
    return [brotli.decompress(blob[tg.ARTIFACT_HEAD.size + 4:tg.ARTIFACT_HEAD.size +
                                   tg.ARTIFACT_HEAD.unpack_from(blob)[2]]) for blob in artifacts()[:1]]


def code_streams(coder: str) -> list[bytes]:
    """Streams of codes with each trellis."""
    rng = np.random.default_rng(1)
    return [bytes([number]) + tg.CODERS[coder][0](some_codes(rng, SHAPES, states), states)
            for number, states in enumerate((1, 4))]


def histograms() -> list[bytes]:
    """The parts of range-coded streams, unpacked."""
    found = []
    for stream in code_streams("range"):
        *lengths, num_kept, num_escaped, _ = struct.unpack_from("<7I", stream, 1)
        edges = list(itertools.accumulate(lengths, initial=29))
        parts = [brotli.decompress(stream[a:b]) for a, b in zip(edges, edges[1:])]
        found.append(bytes([stream[0], num_kept - 1, num_escaped]) + b"".join(parts) + stream[edges[-1]:])
    return found


def shards() -> list[bytes]:
    """One shard."""
    return [bytes_of(lambda path: write_shard(path, np.array([tg.BOS_ID, *range(2, 60), tg.BOS_ID, 4, 511])))]


def checkpoints() -> list[bytes]:
    """One checkpoint."""
    return [bytes_of(lambda path: tg.save_checkpoint(path, EXPECTED, {"step": 3}))]


def bytes_of(write: Callable[[Path], object]) -> bytes:
    """What this function writes into the file that it is given."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


@functools.lru_cache(None)
def tokenizers() -> list[bytes]:
    """Small SentencePiece models: BPE and unigram."""
    import sentencepiece
    found = []
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter((ROOT / "run.sh").read_text().splitlines()), model_writer=(file := io.BytesIO()),
            model_type=kind, vocab_size=400, byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            hard_vocab_limit=False, num_threads=1, minloglevel=2, normalization_rule_name="identity")
        found.append(file.getvalue())
    return found


def manifests() -> list[bytes]:
    """What `./run.sh data` would have written of `dataset`."""
    with tempfile.TemporaryDirectory() as folder:
        dataset(Path(folder))
        entry = {split: {"documents": 2, "tokens": 5, "bytes": 9, "files": [
            {"name": (path := Path(folder) / f"fineweb_{split}_000000.bin").name, "tokens": 5,
             "sha256": tg.file_sha256(path)}]} for split in ("train", "val")}
    tied = {"path": "tokens.model", "sha256": hashlib.sha256(tokenizers()[0]).hexdigest()}
    return [json.dumps({"format": 1, "tokenizer": {**tied, "vocab_size": 64}, **entry}).encode()]


def stamps() -> list[bytes]:
    """The stamp of `dataset`."""
    with tempfile.TemporaryDirectory() as folder:
        dataset(Path(folder))
        return [json.dumps({"shards_sha256": tg.shards_sha256(Path(folder)), "shared_share": 0.0}).encode()]


@functools.lru_cache(None)
def submission_files() -> dict[str, bytes]:
    """A submission's folder as `submission.py` would check it: small, with findings, but read to the end."""
    start = {"event": "start", "world": 1, "device": "cpu", "torch": "2.13", "python": "3.11", "attention": "sdpa",
             "code_sha256": hashlib.sha256(b"pass\n").hexdigest()[:16], "run_id": "a", "seconds": 0.0}
    verdict = {"event": "verdict", "seed": 1, "val_loss": 2.0, "val_bpb": 1.2, "artifact_bytes": 99, "steps": 3,
               "train_seconds": 3.0, "eval_seconds": 1.0, "other_seconds": 1.0, "total_seconds": 5.0, "tokens": 42,
               "bytes": 101, "diagnostic_evals": {"ema": 1.3, "quantized": 1.31},
               "ledger_sha256": "ab", "code_bytes": 5,
               "weight_bytes": 94, "cap_bytes": 16000000, "parameters": 9, "train_loss": 3.0,
               "run_id": "a", "seconds": 5.0}
    lines = [start, {"event": "config", "preset": "demo", "vocab_size": 64, "seed": 1, "max_wallclock_seconds": 9},
             {"event": "phase", "name": "train", "seconds": 3.0, "phase_seconds": 3.0},
             {"event": "train_end", "steps": 3, "train_seconds": 3.0, "tokens": 96, "train_loss": 4.5},
             {"event": "artifact", "sha256": "ab", "path": "x", "weight_bytes": 9, "streams": {"int8": [9, 9]}},
             {"event": "phase", "name": "write", "seconds": 4.0, "phase_seconds": 1.0},
             {"event": "val_data", "documents": 2, "targets": 42, "bytes": 101,
              "compressors": {"xz": {"bits_per_byte": 2.0, "bytes": 25}}}, verdict]
    told = {"author": "A", "github_id": "a", "name": "n", "date": "2026-01-01", "val_bpb": 1.2, "val_loss": 2.0,
            "bytes_total": 99, "bytes_code": 5, "blurb": "b", "seeds": [1], "val_bpb_std": 0.1,
            "comparison_baseline_bpb": 1.3, "delta_vs_leaderboard_bpb": -0.1, "compliance": {"three_seeds": True},
            "seed_results": {"1": {"val_bpb": 1.2, "val_loss": 2.0, "artifact_bytes": 99, "steps": 3,
                                   "step_avg_ms": 1000.0, "train_wallclock_ms": 3000, "eval_time_s": 1.0,
                                   "val_tokens": 42, "val_bytes": 101}}}
    return {"train_seed1.jsonl": "\n".join(map(json.dumps, lines)).encode(), "config.env": b"SEED=1\n",
            "train_seed1.log": b"verdict val_bpb=1.2\n", "submission.json": json.dumps(told).encode(),
            "train_gpt.py": b"pass\n", "README.md": b"# n\n", "audit.txt": b"verdict C1=pass\n",
            "requirements.txt": b""}


def sources() -> list[bytes]:
    """Scripts as submissions have them: plain, and in wrappers that unpack themselves."""
    import base64
    import lzma
    import zlib
    plain = b"import os, numpy as np\ndef eval_val(x, val_ids):\n    ttt_adapt(val_ids)\n    return f'{x!r:>{9}}'\n" \
            b"h = ctx_hash ^ target_id\nbytes_of[has_leading_space[tgt]] + 1\n"
    wrapped, text = lzma.compress(plain).decode("latin-1"), base64.b85encode(zlib.compress(plain))
    return [plain, b"import lzma\nexec(lzma.decompress(%a.encode('latin-1')))\n" % wrapped,
            b"import zlib, base64\nexec(zlib.decompress(base64.b85decode(%a)))\n" % text]


def envs() -> list[bytes]:
    """Knobs of a folder, and what tries to be run."""
    return [b"# knobs\nSEED=7\n\nMATRIX_LR=0.02\n", b"A=$(touch ran)\nB=`touch ran`\n", b"a[$(touch ran)]=1\n",
            b"SEED=1; touch ran\nSEED=1 && touch ran\n", b"PATH=.\n", b"LD_PRELOAD=/x.so\n", b"PYTHONPATH=.\nSEED=\n",
            b"BASH_ENV=x\nPYTHON=x", b"SEED[$(touch ran)]=1\n", b"-v a=1\n"]


class Target(NamedTuple):
    """A reader, what it reads, and how that is mutated."""
    read: Callable[[bytes, Path], object]
    """What was accepted of these bytes; a folder is there for its files."""
    seeds: Callable[[], list[bytes]]
    """Valid inputs, and some that are not."""
    json: bool = False
    """Whether mutants are made of parsed JSON, a value a line, too."""
    sealed: bool = False
    """Whether a checksum guards the bytes: nothing but the seeds may be accepted, and as they are."""


def submission_target(name: str) -> Target:
    """A file of a submission's folder in JSON."""
    return Target(functools.partial(read_submission, name), lambda: [submission_files()[name]], json=True)


TARGETS: dict[str, Target] = {
    "artifact": Target(read_artifact, artifacts),
    "sealed_artifact": Target(read_sealed_artifact, lambda: [sealed(body) for body in artifacts()], sealed=True),
    "header": Target(read_header, headers, json=True),
    "range": Target(functools.partial(read_codes, "range"), lambda: code_streams("range")),
    "histograms": Target(read_histograms, histograms),
    "brotli": Target(functools.partial(read_codes, "brotli"), lambda: code_streams("brotli")),
    "shard": Target(read_shard, shards),
    "sealed_shard": Target(read_sealed_shard, shards, sealed=True),
    "checkpoint": Target(read_checkpoint, checkpoints),
    "manifest": Target(read_manifest, manifests, json=True),
    "stamp": Target(read_stamp, stamps, json=True),
    "tokenizer": Target(read_tokenizer, tokenizers),
    "log": submission_target("train_seed1.jsonl"),
    "submission": submission_target("submission.json"),
    "source": Target(functools.partial(read_submission, "train_gpt.py"), sources),
    "config": Target(read_config, envs),
}


# -- one input ------------------------------------------------------------------------------------------


def peak() -> int:
    """Largest resident bytes since `reset_peak`; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 0


def reset_peak() -> int:
    """Resident bytes now, from which a new peak is counted."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak()


@functools.lru_cache(None)
def warm(name: str) -> None:
    """What a library allocates once and for all shall not be charged to an input."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Exception):
        TARGETS[name].read(TARGETS[name].seeds()[0], Path(folder))


def judge(name: str, data: bytes, folder: Path) -> tuple[str, object]:
    """("accepted", what was read) or ("refused", why); `BrokenPromise` or any other exception: a defect."""
    warm(name)
    before, start = reset_peak(), time.process_time()
    try:
        outcome = "accepted", TARGETS[name].read(data, folder)
    except REFUSALS as error:
        outcome = "refused", str(error)
        if "\n" in str(error).strip() or not str(error).strip():
            raise BrokenPromise(f"{type(error).__name__} of other than one line: {str(error)[:200]!r}") from error
    took, spent = peak() - before, time.process_time() - start
    if took > MEMORY or spent > SECONDS:
        raise BrokenPromise(f"{took >> 20} MiB and {spent:.1f} s for {len(data)} bytes; {outcome[0]}: "
                            f"{str(outcome[1])[:200]}")
    return outcome


# -- mutants --------------------------------------------------------------------------------------------

ODD = [None, True, False, 0, 1, -1, 7, 2**31, 2**63, -2**63, 10**30, 0.0, 0.5, -1.5, 1e308, -1e308, float("nan"),
       float("inf"), "", "x", "\0", "\ud800", "a\nb", "7", "9" * 400, [], [[]], {}, {"": 0}, [1, 2], {"a": {"b": []}}]
"""Values that readers of JSON do not expect."""


def mutant(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Bits flipped, cut, repeated, spliced with another seed, numbers set to extremes: one to four times."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(max(1, min(len(out), rng.choice([16, 64, 1 << 30])))), rng.randrange(7)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at:at + rng.choice([1, 2, 4, 16, 300])]
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            out[at:at] = out[at:at + rng.choice([1, 4, 64])]
        elif kind == 4:
            other = rng.choice(seeds)
            out[at:] = other[rng.randrange(max(1, len(other))):] if rng.random() < 0.5 else other[at:]
        elif kind == 5:
            width = rng.choice("<B <H <I <Q".split())
            top = 256 ** struct.calcsize(width)
            out[at:at + struct.calcsize(width)] = struct.pack(width, rng.choice(
                [0, 1, top - 1, top // 2, top // 2 - 1, rng.randrange(top)]))
        else:
            out[at:at] = rng.randbytes(rng.randint(1, 9))
    return bytes(out)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value below a JSON value."""
    for key in (list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
        yield value, key
        yield from places(value[key])


def json_mutant(rng: random.Random, data: bytes) -> bytes:
    """JSON (or lines of it) with values replaced, removed, repeated or moved; as it is where it does not parse."""
    try:
        lines = [json.loads(line) for line in data.splitlines()]
        for _ in range(rng.randint(1, 3)):
            there = list(places(lines))
            holder, key = rng.choice(there)
            kind = rng.randrange(5)
            if kind < 2:
                holder[key] = copy.deepcopy(rng.choice(ODD))
            elif kind == 2:
                del holder[key]
            elif kind == 3:
                other, place = rng.choice(there)
                holder[key] = copy.deepcopy(other[place])
            elif isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            else:
                holder[rng.choice(["x", "", key.upper(), "val_bpb"])] = holder.pop(key)
        return b"\n".join(json.dumps(line).encode() for line in lines)
    except (ValueError, IndexError, RecursionError, KeyError):
        return data


def mutants(name: str, count: int) -> Iterator[tuple[bytes, bytes]]:
    """(seed, mutant) of so many mutants, the same in every run."""
    target, rng = TARGETS[name], random.Random(name)
    seeds = target.seeds()
    for _ in range(count):
        seed = data = rng.choice(seeds)
        while data in seeds:
            data = json_mutant(rng, seed) if target.json and rng.random() < 0.7 else mutant(rng, seed, seeds)
        yield seed, data


def compare(name: str, seed: bytes, data: bytes) -> str:
    """What became of a mutant: refused, "accepted, identical" or "accepted, different"."""
    with tempfile.TemporaryDirectory() as folder:
        found = judge(name, data, Path(folder))
    if found[0] == "refused":
        return "refused"
    with tempfile.TemporaryDirectory() as folder:
        return f"accepted, {'identical' if judge(name, seed, Path(folder)) == found else 'different'}"


def tally(name: str, count: int) -> Row:
    """The table's row of one target. A worker reads, so that a crash of a library is counted and survived."""
    found = dict.fromkeys(("refused", "accepted, identical", "accepted, different", "defect", "crash"), 0)
    pool = None
    for seed, data in mutants(name, count):
        pool = pool or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=limit_memory)
        try:
            outcome = pool.submit(compare, name, seed, data).result(20 * SECONDS)
        except BrokenProcessPool:
            outcome, pool = "crash", None
        except Exception as error:
            outcome = "defect"
            print(f"fuzz: {name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        if TARGETS[name].sealed and outcome == "accepted, different":
            outcome = "defect"
        if outcome in ("crash", "defect"):
            (CORPUS / name).mkdir(parents=True, exist_ok=True)
            (CORPUS / name / f"find-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
        found[outcome] += 1
    if pool:
        pool.shutdown()
    return {"target": name, "mutants": count, **found}


def limit_memory() -> None:
    """An allocation without measure fails instead of taking the machine's memory."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        now = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, now + ROOM))
    torch.set_num_threads(1)


# -- guided by coverage ---------------------------------------------------------------------------------


def instrument(module: types.ModuleType, atheris: Any) -> None:
    """Make atheris see the branches of every function and method of a module of ours."""
    for holder in (module, *(v for v in vars(module).values() if isinstance(v, type) and
                             v.__module__ == module.__name__)):
        for value in list(vars(holder).values()):
            function = getattr(value, "__func__", value.fget if isinstance(value, property) else value)
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                atheris.instrument_func(function)


def guided(name: str, seconds: int) -> None:
    """Fuzz one target; does not return."""
    import atheris
    target = TARGETS[name]
    for module in ("train_gpt", "data.verify", "tools.submission", "tools.evidence", "tools.logs", "tools.launch"):
        instrument(importlib.import_module(module), atheris)
    work = ROOT / "logs" / "fuzz" / name
    for folder in (work, CORPUS / name):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (work / f"seed-{number}").write_bytes(seed)
    warm(name)
    limit_memory()

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        changed = json_mutant(random.Random(seed), data) if seed % 3 else data
        return (changed if changed != data else atheris.Mutate(data, most))[:most]

    with tempfile.TemporaryDirectory() as folder:
        atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", f"-timeout={int(12 * SECONDS)}", "-max_len=16384",
                       "-rss_limit_mb=4096", "-print_final_stats=1", f"-artifact_prefix={CORPUS / name}/find-",
                       str(work), str(CORPUS / name)], lambda data: judge(name, data, Path(folder)) and None,
                      **({"custom_mutator": mutate} if target.json else {}))
        atheris.Fuzz()


def search(name: str, seconds: int) -> Row:
    """One target in a process of its own: inputs tried, branches seen, what was found."""
    log = ROOT / "logs" / "fuzz" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    before = set((CORPUS / name).glob("find-*"))
    with log.open("wb") as file:
        done = subprocess.run([sys.executable, "-m", "tests.stress.fuzz", "--guided", name, str(seconds)], cwd=ROOT,
                              stdout=file, stderr=subprocess.STDOUT)
    text = log.read_text(errors="replace")
    inputs, branches = ([0, *map(int, re.findall(pattern, text))][-1] for pattern in
                        (r"stat::number_of_executed_units:\s+(\d+)", r"cov: (\d+)"))
    found = [path.name for path in sorted(set((CORPUS / name).glob("find-*")) - before)]
    if done.returncode and not found:
        found = [f"status {done.returncode}, see {log}"]
    return {"target": name, "inputs": inputs, "branches": branches, "found": ", ".join(found) or "nothing"}


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 if something was found."""
    parser = argparse.ArgumentParser(prog="./run.sh bench fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="SECONDS | TARGET", help=f"targets: {', '.join(TARGETS)}")
    parser.add_argument("--mutations", type=int, metavar="N", help="mutants of each target, without coverage")
    parser.add_argument("--guided", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    seconds = next((int(word) for word in given.words if word.isdecimal()), 60)
    names = [word for word in given.words if not word.isdecimal()] or list(TARGETS)
    for name in names:
        tg.require(name in TARGETS, f"{name}: no such target; expected some of {', '.join(TARGETS)}")
    if given.guided:
        guided(names[0], seconds)
    if given.mutations:
        rows = [tally(name, given.mutations) for name in names]
        show(f"{given.mutations:,} mutants of each target", rows)
        return int(any(row["defect"] or row["crash"] for row in rows))
    tg.require(importlib.util.find_spec("atheris") is not None, "atheris is missing: it has wheels for Python 3.10 to "
               "3.13 on Linux x86-64; --mutations N needs no coverage")
    rows = []
    for name in names:
        rows.append(search(name, seconds))
        show(name, rows[-1:])
    show(f"{seconds} s for each target", rows)
    return int(any(row["found"] != "nothing" for row in rows))


if __name__ == "__main__":
    sys.exit(program(main, "bench"))
