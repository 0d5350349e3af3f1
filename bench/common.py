"""What the benches share: calls timed in turns, what the machine does at most, data made up, rows of tables."""
from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import train_gpt as tg

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
"""One line of a table and of the JSON."""


class Sample(NamedTuple):
    """Seconds of a call: median and quartiles of n measurements."""
    median: float
    low: float
    high: float
    n: int


def summary(seconds: Sequence[float]) -> Sample:
    """Median and quartiles."""
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    return Sample(median, low, high, len(seconds))


def timed(times: dict[str, list[float]], name: str, run: tg.Run, part: Callable[..., Any], *given: Any, calls: int = 1
          ) -> Any:
    """The result of part(*given); the seconds of a call are appended to times[name]."""
    run.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        result = part(*given)
    run.synchronize()
    times.setdefault(name, []).append((time.perf_counter() - start) / calls)
    return result


def in_turns(parts: Mapping[str, Callable[[], object]], run: tg.Run, repeats: int = 7, least: float = 0.0,
             warmup: int = 2) -> dict[str, Sample]:
    """Times of each part. A busy machine slows all of them alike: round by round, each once, in the order given.

    A part is called as often as makes `least` seconds (0: once, for parts that need what the one before them left).
    """
    warm: dict[str, list[float]] = {}
    for _ in range(warmup):
        for name, part in parts.items():
            timed(warm, name, run, part)
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, part in parts.items():
            timed(times, name, run, part, calls=max(1, math.ceil(least / max(warm[name][-1], 1e-6))))
    return {name: summary(times[name]) for name in parts}


class Machine(NamedTuple):
    """What floors are taken from: the fastest large product and copy that were measured here."""
    name: str
    flops: float
    """FLOP/s of a square product in the run's dtype."""
    bytes: float
    """Bytes read and written a second by a copy that no cache holds."""
    nominal: float | None
    """The data sheet's dense bf16 FLOP/s (NVIDIA H100 and H200 SXM: 989e12), or None."""


def machine(run: tg.Run) -> Machine:
    """Measure this machine, in about a second."""
    side, size = (8192, 1 << 30) if run.is_cuda else (1024, 1 << 26)
    a, source = torch.randn(side, side, device=run.device).to(run.dtype), torch.zeros(size // 4, device=run.device)
    target = torch.empty_like(source)
    best = in_turns({"product": lambda: a @ a, "copy": lambda: target.copy_(source)}, run, least=0.05)
    name = torch.cuda.get_device_name(run.device) if run.is_cuda else platform.processor() or platform.machine()
    return Machine(name, 2 * side ** 3 / best["product"].low, 2 * size / best["copy"].low,
                   989e12 if name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200") else None)


def row(name: str, sample: Sample, roof: Machine, flops: float = 0.0, moved: float = 0.0, **more: Any) -> Row:
    """A measured part against its floor: the larger of `flops` and `moved` bytes at the machine's speeds."""
    floor = max(flops / roof.flops, moved / roof.bytes)
    return {"name": name, "ms": 1e3 * sample.median, "low_ms": 1e3 * sample.low, "high_ms": 1e3 * sample.high,
            "n": sample.n, "floor_ms": 1e3 * floor or None, "x_floor": sample.median / floor if floor else None,
            "tflop_s": flops / sample.median / 1e12 or None, "gb_s": moved / sample.median / 1e9 or None, **more}


def failure(name: str, why: object) -> Row:
    """A row that says in one line why there are no figures."""
    kind = f"{type(why).__name__}: " if isinstance(why, BaseException) else ""
    return {"name": name, "failed": tg.one_line(f"{kind}{why}")}


def tried(name: str, rows: Callable[..., list[Row]], *given: Any) -> list[Row]:
    """rows(*given), or where making them fails one with the error in a line."""
    try:
        return rows(*given)
    except Exception as error:  # what compilers and drivers raise is of many kinds
        return [failure(name, error)]


def show(title: str, rows: Sequence[Row]) -> None:
    """Print rows as a table; numbers with four digits, absent ones as -."""
    def text(value: Any) -> str:
        return "-" if value is None else f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1e4 else \
            f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)

    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [heads, *([text(row.get(head)) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    print(f"\n{title}")
    for line in cells:
        print("  " + "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(line, widths))).rstrip(), flush=True)


def peak_mib(run: tg.Run) -> int:
    """Largest memory so far: allocated on the GPU, or resident of this process."""
    return torch.cuda.max_memory_allocated() >> 20 if run.is_cuda else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def web_lengths(count: int) -> np.ndarray:
    """Targets of documents like FineWeb's validation set: median 570, mean 957, longest 97,000 (log-normal)."""
    lengths = np.exp(np.random.default_rng(0).normal(math.log(570), 1.02, count))
    return np.clip(lengths, 8, 97_000).astype(np.int64)


def made_up_ids(lengths: np.ndarray, vocab_size: int) -> np.ndarray:
    """uint16 ids of documents with so many targets: low ids are frequent, as in text; each begins with BOS."""
    ids = 2 + ((vocab_size - 2) * np.random.default_rng(0).random(int((lengths + 1).sum())) ** 4)
    ids[np.cumsum(lengths + 1) - lengths - 1] = tg.BOS_ID
    return ids.astype(np.uint16)


def write_shard(path: Path, ids: np.ndarray) -> None:
    """One shard in the challenge's format."""
    header = np.zeros(tg.SHARD_HEADER_BYTES // 4, dtype="<i4")
    header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, len(ids)
    path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())


def small_data(folder: Path, env: Mapping[str, str], train: int, val: int) -> dict[str, str]:
    """Knobs of a dataset of the first documents, about so many ids, of DATA_PATH or the demo's (`run.sh data demo`)."""
    source = Path(env.get("DATA_PATH") or ROOT / "data" / "datasets" / "demo_sp1024")
    for split, count in (("train", train), ("val", val)):
        stream = tg.TokenStream(source, f"fineweb_{split}")
        ends = np.append(stream.document_starts()[1:], len(stream))
        write_shard(folder / f"fineweb_{split}_000000.bin", stream.read(0, int(max(ends[0], *ends[ends <= count]))))
    return {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(tg.tokenizer_path(tg.Config(
        data_path=str(source), tokenizer_path=env.get("TOKENIZER_PATH", ""))))}


def text_dataset(folder: Path) -> dict[str, str]:
    """DATA_PATH and TOKENIZER_PATH of a small dataset: standard-library sources, a 512-piece SentencePiece model."""
    import argparse
    import json
    import textwrap

    import sentencepiece
    texts = [Path(m.__file__).read_text(encoding="utf-8") for m in (argparse, json, textwrap)]
    texts = [part.strip() for text in texts for part in text.split("\n\n\n") if part.strip()]
    texts += ["caf\u00e9 \u4e2d\u6587 \U0001f40d na\u00efve", " ", "x"]
    model = folder / "tokens.model"
    with open(model, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in texts for line in text.splitlines()), model_writer=file,
            model_type="bpe", vocab_size=512, byte_fallback=True, split_digits=True, add_dummy_prefix=False,
            normalization_rule_name="nmt_nfkc", character_coverage=0.999, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            hard_vocab_limit=False, num_threads=1, minloglevel=2)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    documents = [[tg.BOS_ID, *sp.encode(text)] for text in texts]
    for name, some in (("train_000000", documents[8:50]), ("train_000001", documents[50:]),
                       ("val_000000", documents[:8])):
        write_shard(folder / f"fineweb_{name}.bin", np.array([i for d in some for i in d], dtype=np.uint16))
    return {"data_path": str(folder), "tokenizer_path": str(model)}


def made_up_val(lengths: np.ndarray, vocab_size: int) -> tg.ValData:
    """Validation data of such documents; every target counts three bytes."""
    ids = made_up_ids(lengths, vocab_size)
    return tg.ValData(ids, np.cumsum(lengths + 1) - lengths - 1, np.full(len(ids) - 1, 3, dtype=np.int32))


@contextlib.contextmanager
def setting(env: Mapping[str, str], documents: int = 8192) -> Iterator[tuple[tg.Config, tg.Run]]:
    """Config and run of a bench: the demo's shape on a CPU, the record's on a GPU, or as the knobs say.

    A step is one micro-batch a rank. Shards are made up (8,192 documents: 8 M tokens) unless DATA_PATH is set.
    """
    preset = "record" if env.get("DEVICE") != "cpu" and torch.cuda.is_available() else "demo"
    cfg = tg.Config.from_env({"PRESET": preset, **env})
    with tempfile.TemporaryDirectory() as folder:
        if not env.get("DATA_PATH"):  # the demo preset names a folder of its own
            ids = made_up_ids(web_lengths(documents), cfg.vocab_size)
            write_shard(Path(folder) / "fineweb_train_000000.bin", ids)
        tokens = cfg.micro_batch_tokens // cfg.train_seq_len * cfg.train_seq_len * int(env.get("WORLD_SIZE", 1))
        cfg = dataclasses.replace(cfg, data_path=env.get("DATA_PATH") or folder, log_dir=folder,
                                  train_batch_tokens=tokens)
        with tg.Run(cfg, env, log=False) as run:
            yield cfg, run
