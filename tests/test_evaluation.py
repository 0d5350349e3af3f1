"""Windows cover every target once with enough context; the scorer equals a loop over documents one at a time."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny
from test_model import EVERYTHING, document, losses, noisy, packed

import train_gpt as tg

LENGTHS = {
    "one token": [1, 1],
    "one short document": [9],
    "fits exactly": [32, 8, 32],
    "one too long": [33, 1, 65, 2],
    "long ones": [100, 31, 64, 97],
    "many": [3, 40, 1, 1, 70, 12, 33, 5, 90, 1],
    "last document has no target": [20, 1],
}
"""Lengths of the documents of a stream."""


def starts_of(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths[:-1]])


def val_data(lengths: list[int], seed: int = 0) -> SimpleNamespace:
    """Validation data of random documents; every target counts three bytes."""
    ids = np.array([i for k, n in enumerate(lengths) for i in document(1000 * seed + k, n)], dtype=np.uint16)
    return SimpleNamespace(ids=ids, starts=starts_of(lengths), num_targets=len(ids) - 1,
                           target_bytes=np.full(len(ids) - 1, 3, dtype=np.int32))


def scored(model: tg.GPT, val: SimpleNamespace, stride: int, cfg: tg.Config, run: tg.Run) -> torch.Tensor:
    """Nats of every target, as `evaluate` writes them into its ledger."""
    ledgers = []

    class Kept(tg.Ledger):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            ledgers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg, "Ledger", Kept)
        score = tg.evaluate(model, val, stride, cfg, run, "test")
    (ledger,) = ledgers
    assert (score.tokens, score.bytes) == (val.num_targets, 3 * val.num_targets)
    assert score.nats == pytest.approx(float(ledger.nats.double().sum()), rel=1e-9)
    return ledger.nats


def alone(model: tg.GPT, val: SimpleNamespace, begin: int, end: int, first: int) -> torch.Tensor:
    """Nats of targets first..end-1 from inputs [begin, end), one row and nothing else."""
    return losses(model, packed(val.ids[begin:end + 1].tolist()))[0, first - begin:]


def document_spans(val: SimpleNamespace) -> list[tuple[int, int]]:
    """[begin, end) of the targets of each document."""
    return list(zip(val.starts.tolist(), [*val.starts[1:].tolist(), val.num_targets]))


# -- windows and rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_len,stride", [(32, 32), (32, 8), (32, 1), (32, 31), (1, 1), (7, 3), (200, 64)])
@pytest.mark.parametrize("name", LENGTHS)
def test_windows_score_every_target_once_with_enough_context(name: str, seq_len: int, stride: int):
    starts, num_targets = starts_of(LENGTHS[name]), sum(LENGTHS[name]) - 1
    windows = tg.plan_windows(starts, num_targets, seq_len, stride)
    assert sorted(t for w in windows for t in range(w.first, w.end)) == list(range(num_targets))
    for begin, end, first in windows:
        assert begin <= first < end <= begin + seq_len
        at = starts[np.searchsorted(starts, first, side="right") - 1]
        assert at <= begin and not ((starts > begin) & (starts < end)).any()
        for target in range(first, end):  # tokens of the document before this input, and how many are seen
            assert target - begin >= min(target - at, seq_len - stride)


def test_windows_of_a_long_document_are_those_of_the_record():
    """The first scores all it holds, each later one `stride` more; strides start on a grid."""
    windows = tg.plan_windows(np.array([0]), 100, 32, 8)
    assert windows[:3] == [(0, 32, 0), (8, 40, 32), (16, 48, 40)]
    assert [w.first for w in windows] == [0, *range(32, 100, 8)]


@pytest.mark.parametrize("stride", [1, 8, 32])
@pytest.mark.parametrize("name", LENGTHS)
def test_packing_keeps_every_window_within_the_rows(name: str, stride: int):
    windows = tg.plan_windows(starts_of(LENGTHS[name]), sum(LENGTHS[name]) - 1, 32, stride)
    rows = tg.pack_rows(windows, 32)
    assert sorted(w for row in rows for w in row) == sorted(windows)
    assert all(0 < sum(w.end - w.begin for w in row) <= 32 for row in rows)


def test_packing_wastes_little():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 400).tolist()
    windows = tg.plan_windows(starts_of(lengths), sum(lengths) - 1, 64, 64)
    assert len(tg.pack_rows(windows, 64)) <= 1.05 * sum(w.end - w.begin for w in windows) / 64 + 1


def test_a_window_batch_separates_its_windows_and_scores_the_right_spots():
    ids = np.arange(100, 160)
    rows = [[tg.Window(0, 5, 0), tg.Window(10, 14, 12)], [tg.Window(20, 28, 27)]]
    batch, where, which = tg.window_batch(rows, ids, 3, 10)
    assert which.tolist() == [0, 1, 2, 3, 4, 12, 13, 27] and where.tolist() == [0, 1, 2, 3, 4, 7, 8, 17]
    assert torch.equal(batch.targets.flatten()[where], which + 101) and torch.equal(batch.ids.flatten()[where],
                                                                                    which + 100)
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1],
                                        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]
    scored_or_context = batch.targets != tg.IGNORE
    assert scored_or_context.sum(1).tolist() == [9, 8, 0]


# -- the scorer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LENGTHS)
def test_the_plain_score_is_that_of_every_document_piece_by_itself(name: str, run: tg.Run):
    """Pieces of at most EVAL_SEQ_LEN, none of which sees another."""
    cfg, val = tiny(eval_seq_len=32), val_data(LENGTHS[name])
    model = noisy(cfg)
    expected = [alone(model, val, at, min(at + 32, end), at)
                for begin, end in document_spans(val) for at in range(begin, end, 32)]
    torch.testing.assert_close(scored(model, val, 32, cfg, run), torch.cat(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("stride", [5, 8, 31])
def test_the_sliding_score_is_that_of_every_window_by_itself(stride: int, run: tg.Run):
    cfg, val = tiny(**EVERYTHING, eval_seq_len=32), val_data(LENGTHS["many"])
    model = noisy(cfg)
    found, expected = scored(model, val, stride, cfg, run), torch.full((val.num_targets,), torch.nan)
    for begin, end in document_spans(val):
        last = min(begin + 32, end)
        expected[begin:last] = alone(model, val, begin, last, begin) if end > begin else torch.empty(0)
        for window in tg.plan_windows(np.array([0]), end - begin, 32, stride)[1:]:
            a, b, first = (begin + x for x in window)
            expected[first:b] = alone(model, val, a, b, first)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("stride", [8, 32])
def test_the_score_does_not_depend_on_the_batch(stride: int, run: tg.Run):
    val = val_data(LENGTHS["many"])
    results = []
    for tokens in (8, 1024, 8 * 32 * 64):
        cfg = tiny(eval_seq_len=32, val_batch_tokens=tokens)
        results.append(scored(noisy(cfg), val, stride, cfg, run))
    assert cfg.eval_rows == 64
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-4)


def test_sliding_and_plain_agree_where_documents_fit_a_window(run: tg.Run):
    cfg, val = tiny(eval_seq_len=32), val_data([32, 1, 20, 31, 2])
    model = noisy(cfg)
    assert torch.equal(scored(model, val, 8, cfg, run), scored(model, val, 32, cfg, run))


def test_sliding_gives_late_tokens_more_context(run: tg.Run):
    """On documents that do not fit, sliding changes some losses and leaves those of the first window alone."""
    cfg, val = tiny(eval_seq_len=32), val_data([80])
    model = noisy(cfg)
    plain, sliding = scored(model, val, 32, cfg, run), scored(model, val, 4, cfg, run)
    torch.testing.assert_close(plain[:32], sliding[:32], rtol=1e-5, atol=1e-4)
    assert ((plain - sliding)[32:].abs() > 1e-3).float().mean() > 0.8


@pytest.mark.parametrize("stride", [8, 32])
def test_the_last_document_changes_no_score_but_its_own(stride: int, run: tg.Run):
    lengths = LENGTHS["many"][:-1]
    cfg, val = tiny(**EVERYTHING, eval_seq_len=32), val_data(lengths)
    model = noisy(cfg)
    before = scored(model, val, stride, cfg, run)
    last = int(val.starts[-1])
    val.ids[last:] = document(77, lengths[-1])
    after = scored(model, val, stride, cfg, run)
    torch.testing.assert_close(after[:last], before[:last], rtol=0, atol=1e-6)
    assert (after[last:] != before[last:]).all()


@pytest.mark.parametrize("stride", [8, 32])
def test_a_score_does_not_depend_on_later_ids_of_its_document(stride: int, run: tg.Run):
    cfg, val = tiny(**EVERYTHING, eval_seq_len=32), val_data([90, 5])
    model = noisy(cfg)
    before = scored(model, val, stride, cfg, run)
    for at in (1, 33, 60, 89):
        original = val.ids[at]
        val.ids[at] = 3 + original % 500
        after = scored(model, val, stride, cfg, run)
        val.ids[at] = original
        torch.testing.assert_close(after[:at - 1], before[:at - 1], rtol=0, atol=1e-6)
        assert after[at - 1] != before[at - 1]  # its target
        torch.testing.assert_close(after[90:], before[90:], rtol=0, atol=1e-6)


def test_ranks_share_the_rows_and_agree_on_the_total(run: tg.Run):
    """What three ranks write adds up to what one writes, each target once."""
    cfg, val = tiny(eval_seq_len=32), val_data(LENGTHS["many"])
    model, parts = noisy(cfg), []

    class Part(tg.Ledger):
        def close(self, target_bytes: np.ndarray, run: tg.Run) -> tuple[tg.Score, str]:
            parts.append(self)
            return tg.Score(0.0, 1, 1), ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg, "Ledger", Part)
        for rank in range(3):
            tg.evaluate(model, val, 8, cfg, SimpleNamespace(
                rank=rank, world=3, device=run.device, dtype=run.dtype, compiles=False, compiled=lambda f: f,
                progress=run.progress), "test")
    assert torch.equal(sum(p.times.int() for p in parts), torch.ones(val.num_targets, dtype=torch.int32))
    assert min(int(p.times.sum()) for p in parts) > 0
    torch.testing.assert_close(sum(p.nats for p in parts), scored(model, val, 8, cfg, run), rtol=1e-5, atol=1e-4)
