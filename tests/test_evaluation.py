"""The score of a stream by windows equals a loop over windows one at a time; rows are full and shared by ranks."""
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from test_model import EVERYTHING, document, losses, noisy, packed

import train_gpt as tg

# Lengths of a stream's documents: one token; within, as long as and longer than a window; without a last target.
STREAMS = [[1, 1], [9], [32, 8, 32, 33, 1, 65, 2], [3, 40, 1, 1, 70, 12, 33, 5, 90, 1]]


def val_data(lengths: list[int], seed: int = 0, vocab: int = 512) -> tg.ValData:
    """Documents of random ids below `vocab`; every target counts three bytes."""
    ids = np.array([i if i == tg.BOS_ID else 2 + (i - 2) % (vocab - 2)
                    for k, n in enumerate(lengths) for i in document(1000 * seed + k, n)], dtype=np.uint16)
    return tg.ValData(ids, np.cumsum([0, *lengths[:-1]]), np.full(len(ids) - 1, 3, dtype=np.int32))


def scored(model: tg.GPT, val: tg.ValData, stride: int, cfg: tg.Config, run: tg.Run
           ) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats of every target, how often this rank scored it), by windows."""
    scorer = tg.Scorer(val, cfg, run)
    tg.score_windows(model, tg.plan_windows(val, cfg.eval_seq_len, stride), scorer, "test")
    times = scorer.ledger.times.clone()
    score, _ = scorer.ledger.close(val.target_bytes, run)
    assert (score.tokens, score.bytes) == (val.num_targets, 3 * val.num_targets)
    assert score == tg.score_fixed(model, val, stride, cfg, run, "test")
    return scorer.ledger.nats, times


class Ranks:
    """Several ranks as threads of this process: what they say to each other goes through `slots`."""

    def __init__(self, world: int) -> None:
        self.barrier, self.slots = threading.Barrier(world, timeout=60), [None] * world

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    def run(self, rank: int, cfg: tg.Config) -> tg.Run:
        """The run of one rank."""
        run, talk, world = tg.Run(cfg, {}, log=False), lambda value: self.exchange(rank, value), len(self.slots)
        run.rank, run.world, run.is_main = rank, world, rank == 0
        run.all_reduce = lambda t: t.copy_(sum(talk(t.clone())))
        run.broadcast_object = lambda value: talk(value)[0]
        run.all_gather_object = talk
        run.all_gather = lambda own: functools.partial(torch.cat, talk(own))  # said now, waited for later
        run.reduce_scatter = lambda full: functools.partial(lambda all: sum(all).chunk(world)[rank], talk(full.clone()))
        return run


def by_ranks(world: int, cfg: tg.Config, body: Callable[[tg.Run], Any]) -> list[Any]:
    """The results of body(run) on so many ranks at once."""
    ranks, results = Ranks(world), {}

    def work(rank):
        try:
            results[rank] = body(ranks.run(rank, cfg))
        finally:
            if rank not in results:
                ranks.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(world)]


@pytest.mark.parametrize("seq_len, stride", [(32, 32), (32, 5), (7, 3), (200, 64)])
@pytest.mark.parametrize("lengths", STREAMS, ids=str)
def test_the_score_is_that_of_every_window_by_itself(lengths: list[int], seq_len: int, stride: int, run: tg.Run):
    """As in the record: a document's first window scores all it holds, each later one `stride` more."""
    cfg, val = tiny(**EVERYTHING, eval_seq_len=seq_len, eval_stride=stride, ttt="none"), val_data(lengths)
    model, expected = noisy(cfg), torch.full((val.num_targets,), torch.nan)
    for begin, end in zip(val.starts.tolist(), val.stops.tolist()):
        at = begin
        while at < end:
            stop = min(end, begin + seq_len if at == begin else at + stride)
            first = max(begin, at - seq_len + stride)
            expected[at:stop] = losses(model, packed(val.ids[first:stop + 1].tolist()))[0, at - first:]
            at = stop
    torch.testing.assert_close(scored(model, val, stride, cfg, run)[0], expected, rtol=1e-5, atol=1e-4)


def test_packing_wastes_little():
    windows = tg.plan_windows(val_data(np.random.default_rng(0).integers(1, 40, 400).tolist()), 64, 64)
    assert len(tg.pack_rows(windows, 64)) <= 1.05 * sum(w.end - w.begin for w in windows) / 64 + 1


def test_ranks_share_the_rows_and_their_score_is_that_of_one(run: tg.Run):
    """What three ranks write is each target once, and nobody is idle."""
    cfg, val = tiny(eval_seq_len=32), val_data(STREAMS[-1])
    model = noisy(cfg)  # made once: threads share the random state
    expected, _ = scored(model, val, 8, cfg, run)
    nats, times = zip(*by_ranks(3, cfg, lambda one: scored(model, val, 8, cfg, one)))
    torch.testing.assert_close(nats, (expected,) * 3, rtol=1e-5, atol=1e-4)
    assert bool((sum(times) == 1).all()) and all(own.any() for own in times)
