"""Windows cover every target once with enough context; the scorer equals a loop over documents one at a time."""
import functools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from test_model import EVERYTHING, document, losses, noisy, packed

import train_gpt as tg

# Lengths of the documents of a stream.
LENGTHS = {
    "one token": [1, 1],
    "one short document": [9],
    "fits exactly": [32, 8, 32],
    "one too long": [33, 1, 65, 2],
    "many": [3, 40, 1, 1, 70, 12, 33, 5, 90, 1],
    "last document has no target": [20, 1],
}


def val_data(lengths: list[int], seed: int = 0, vocab: int = 512) -> tg.ValData:
    """Documents of random ids below `vocab`; every target counts three bytes."""
    ids = np.array([i if i == tg.BOS_ID else 2 + (i - 2) % (vocab - 2)
                    for k, n in enumerate(lengths) for i in document(1000 * seed + k, n)], dtype=np.uint16)
    return tg.ValData(ids, np.cumsum([0, *lengths[:-1]]), np.full(len(ids) - 1, 3, dtype=np.int32))


def scored(model: tg.GPT, val: tg.ValData, stride: int, cfg: tg.Config, run: tg.Run) -> torch.Tensor:
    """Nats of every target, by windows."""
    scorer = tg.Scorer(val, cfg, run)
    tg.score_windows(model, tg.plan_windows(val, cfg.eval_seq_len, stride), scorer, "test")
    score, _ = scorer.ledger.close(val.target_bytes, run)
    assert (score.tokens, score.bytes) == (val.num_targets, 3 * val.num_targets)
    assert score == tg.score_fixed(model, val, stride, cfg, run, "test")
    return scorer.ledger.nats


def alone(model: tg.GPT, val: tg.ValData, begin: int, end: int, first: int) -> torch.Tensor:
    """Nats of targets first..end-1 from inputs [begin, end), one row and nothing else."""
    return losses(model, packed(val.ids[begin:end + 1].tolist()))[0, first - begin:]


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


# -- windows and rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_len, stride", [(32, 32), (32, 8), (1, 1), (7, 3), (200, 64)])
@pytest.mark.parametrize("name", LENGTHS)
def test_windows_score_every_target_once_with_enough_context_and_fill_rows(name: str, seq_len: int, stride: int):
    val = val_data(LENGTHS[name])
    windows = tg.plan_windows(val, seq_len, stride)
    assert sorted(t for w in windows for t in range(w.first, w.end)) == list(range(val.num_targets))
    for begin, end, first in windows:
        assert begin <= first < end <= begin + seq_len
        at = val.starts[np.searchsorted(val.starts, first, side="right") - 1]
        assert at <= begin and not ((val.starts > begin) & (val.starts < end)).any()
        for target in range(first, end):  # tokens of the document before this input, and how many are seen
            assert target - begin >= min(target - at, seq_len - stride)
    rows = tg.pack_rows(windows, seq_len)
    assert sorted(w for row in rows for w in row) == sorted(windows)
    assert all(0 < sum(w.end - w.begin for w in row) <= seq_len for row in rows)


def test_windows_of_a_long_document_are_those_of_the_record_and_packing_wastes_little():
    """The first scores all it holds, each later one `stride` more; strides start on a grid."""
    windows = tg.plan_windows(val_data([101]), 32, 8)
    assert windows[:3] == [(0, 32, 0), (8, 40, 32), (16, 48, 40)]
    assert [w.first for w in windows] == [0, *range(32, 100, 8)]
    windows = tg.plan_windows(val_data(np.random.default_rng(0).integers(1, 40, 400).tolist()), 64, 64)
    assert len(tg.pack_rows(windows, 64)) <= 1.05 * sum(w.end - w.begin for w in windows) / 64 + 1


def test_a_window_batch_separates_its_windows_and_scores_the_right_spots():
    ids = np.arange(100, 160)
    rows = [[tg.Window(0, 5, 0), tg.Window(10, 14, 12)], [tg.Window(20, 28, 27)]]
    batch, where, numbers = tg.window_batch(rows, ids, 3, 10)
    assert numbers.tolist() == [0, 1, 2, 3, 4, 12, 13, 27] and where.tolist() == [0, 1, 2, 3, 4, 7, 8, 17]
    assert torch.equal(batch.targets.flatten()[where], numbers + 101)
    assert torch.equal(batch.ids.flatten()[where], numbers + 100)
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1], [*range(10)]]
    assert (batch.targets != tg.IGNORE).sum(1).tolist() == [9, 8, 0]


# -- the scorer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [32, 5])
@pytest.mark.parametrize("name", LENGTHS)
def test_the_score_is_that_of_every_window_by_itself(name: str, stride: int, run: tg.Run):
    """Windows of at most EVAL_SEQ_LEN, none of which sees another."""
    cfg, val = tiny(**EVERYTHING, eval_seq_len=32), val_data(LENGTHS[name])
    model, expected = noisy(cfg), torch.full((val.num_targets,), torch.nan)
    for begin, end in zip(val.starts.tolist(), val.stops.tolist()):
        last = min(begin + 32, end)
        if end > begin:
            expected[begin:last] = alone(model, val, begin, last, begin)
        for at in range(last, end, stride):
            stop = min(at + stride, end)
            expected[at:stop] = alone(model, val, max(begin, at - 32 + stride), stop, at)
    torch.testing.assert_close(scored(model, val, stride, cfg, run), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("stride", [8, 32])
def test_the_score_does_not_depend_on_batch_or_ranks(stride: int, run: tg.Run):
    val, results = val_data(LENGTHS["many"]), []
    for tokens in (8, 1024, 8 * 32 * 64):
        cfg = tiny(eval_seq_len=32, val_batch_tokens=tokens)
        results.append(scored(noisy(cfg), val, stride, cfg, run))
    model = noisy(cfg)  # made once: threads share the random state
    results += by_ranks(3, cfg, lambda one: scored(model, val, stride, cfg, one))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-4)


def test_ranks_share_the_rows(run: tg.Run):
    """What three ranks write adds up to what one writes, each target once, nobody idle."""
    cfg, val = tiny(eval_seq_len=32), val_data(LENGTHS["many"])
    scorers = []
    for rank in range(3):
        part = SimpleNamespace(rank=rank, world=3, device=run.device, dtype=run.dtype, compiles=False,
                               compiled=lambda f: f, progress=run.progress)
        scorers.append(tg.Scorer(val, cfg, part))
        tg.score_windows(noisy(cfg), tg.plan_windows(val, 32, 8), scorers[-1], "test")
    times = torch.stack([scorer.ledger.times.int() for scorer in scorers])
    assert bool((times.sum(0) == 1).all()) and bool(times.any(1).all())
