"""Tokens a second of the training loader from the page cache, against reading the memory map alone.

    python bench/loader.py [MILLIONS OF IDS]        (default 100); knobs as for train_gpt.py, as environment variables

Shards of 25 million random ids with a document start in 900, in a temporary folder. One micro-batch (record preset:
98,304 tokens in rows of 2,048) is one unit of work; all ways take turns, so that a busy machine slows all of them
alike. `copy` reads the next span of the map as it is; `tensors` makes int64 inputs and targets of it, which is
the least that a model needs; the orders are `TrainData.step`, with positions and document pieces.
"""
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "data")]

import numpy as np
import prepare
import torch

import train_gpt as tg


def write_corpus(folder: Path, millions: int, vocab_size: int) -> None:
    """Training shards of random ids."""
    rng = np.random.default_rng(0)
    for i in range(-(-millions // 25)):
        ids = rng.integers(2, vocab_size, 1_000_000 * min(25, millions - 25 * i), dtype=np.uint16)
        ids[rng.random(len(ids), dtype=np.float32) < 1 / 900] = tg.BOS_ID
        prepare.write_shard(folder / prepare.shard_name(prepare.TRAIN, i), ids)


def main() -> None:
    """A table, then one line of JSON."""
    millions = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "DATA_PATH": folder}
        cfg = tg.Config.from_env(env)[0]
        env["TRAIN_BATCH_TOKENS"] = str(cfg.micro_batch_tokens)
        write_corpus(Path(folder), millions, cfg.vocab_size)
        ways: dict[str, Callable[[int], object]] = {}
        starts = {}
        with tg.Run(cfg, {}, log=False) as run:
            for order in tg.CHOICES["shuffle"]:
                begin = time.perf_counter()
                data = tg.TrainData(tg.Config.from_env({**env, "SHUFFLE": order})[0], run)
                ways[order] = data.step
                data.step(0)
                starts[order] = time.perf_counter() - begin
        tokens = cfg.micro_batch_tokens

        def span(i: int) -> np.ndarray:
            shard = data.stream.shards[i % len(data.stream.shards)]
            begin = i * tokens % (len(shard) - tokens - 1)
            return shard[begin:begin + tokens + 1]

        def tensors(i: int) -> tuple[torch.Tensor, torch.Tensor]:
            ids = torch.from_numpy(span(i).astype(np.int64))
            return ids[:-1], ids[1:].clone()

        ways = {"copy": lambda i: np.array(span(2 * i)), "tensors": lambda i: tensors(2 * i + 1), **ways}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for i in range(100):
            for way, read in ways.items():
                begin = time.perf_counter()
                read(i)
                seconds[way].append(time.perf_counter() - begin)
    rates = {way: tokens / float(np.median(times)) for way, times in seconds.items()}
    found = {way: dict(mtok_per_s=round(rate / 1e6, 1), of_tensors=round(rate / rates["tensors"], 3),
                       start_seconds=round(starts[way], 2) if way in starts else None) for way, rate in rates.items()}
    for way, figures in found.items():
        print(f"{way:10}", " ".join(f"{name}={value}" for name, value in figures.items()))
    print(json.dumps(dict(micro_batch_tokens=tokens, row_tokens=cfg.train_seq_len, ids=1_000_000 * millions,
                          ways=found)))


if __name__ == "__main__":
    main()
