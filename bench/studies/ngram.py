"""Seconds and memory of the n-gram hints for a stream of a given length.

    ./run.sh bench ngram [MILLIONS OF IDS]        (default 5); NGRAM_RULES, VOCAB_SIZE and DEVICE as for train_gpt.py

The stream is synthetic: ids by a Zipf law, with stretches of 20 to 400 ids copied from earlier places until they make
up a fifth, so that long contexts repeat as boiler-plate does in web text.
"""
import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

import train_gpt as tg
from tools.common import program


def stream(count: int, vocab_size: int) -> np.ndarray:
    """[count] int64."""
    rng = np.random.default_rng(0)
    ids = 2 + (rng.zipf(1.2, count) - 1) % (vocab_size - 2)
    for _ in range(count // 1050):
        length = int(rng.integers(20, 400))
        at = int(rng.integers(length, count - length))
        begin = int(rng.integers(0, at - length + 1))
        ids[at:at + length] = ids[begin:begin + length]
    return ids


def main(arguments: Sequence[str]) -> int:
    """One line of JSON."""
    parser = argparse.ArgumentParser(prog="./run.sh bench ngram", description=__doc__.split("\n\n")[0])
    parser.add_argument("millions", nargs="?", type=float, default=5.0, help="length of the stream (default 5)")
    count = round(1e6 * parser.parse_args(arguments).millions)
    tg.require(count >= 1000, f"{count / 1e6:g}: expected at least 0.001 million ids")
    cfg = tg.Config.from_env({"NGRAM_BASE_BETA": "2", **os.environ})
    with tg.Run(cfg, {}, log=False) as run:
        ids = torch.from_numpy(stream(count, cfg.vocab_size)).to(run.device)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run.synchronize()
        start = time.perf_counter()
        hints = tg.ngram_hints(ids, cfg)
        hinted = int((hints.betas > 0).sum())
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if run.is_cuda else \
            1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        right = float((hints.ids == ids[1:])[hints.betas > 0].float().mean()) if hinted else 0.0
        print(json.dumps(dict(ids=count, rules=cfg.ngram_rules, device=str(run.device),
                              threads=torch.get_num_threads(), seconds=round(seconds, 2),
                              peak_bytes_per_id=round(peak / count, 1), hinted_share=round(hinted / count, 4),
                              hints_right=round(right, 4))))
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "bench"))
