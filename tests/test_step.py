"""The training step as a whole: one graph a stage, all made before the clock starts, and rows of changing length."""
import doctest
import functools
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, batch_of, tiny
from test_main import environment, events
from test_model import noisy

import train_gpt as tg

sys.path.insert(0, str(ROOT / "bench"))
from plain_step import contest  # noqa: E402

SMALL = dict(num_layers=2, loop_start=0, loop_end=0, parallel_start_layer=1, eval_ladder="", ttt="none",
             ngram_tilt_enabled=False)


@pytest.mark.parametrize("seq_len", [4, 6, 8, 12, 24, 48])
def test_rows_of_another_length_are_the_same_tokens_cut_at_their_starts(seq_len: int):
    """Positions and piece starts of a cut batch say the same, and lose no start that there was."""
    ids = np.random.default_rng(0).integers(1, 6, (4, 13))
    batch = tg.make_batch(list(ids.astype(np.uint16)), 4, 12)
    cut = batch.in_rows(seq_len)
    assert cut.ids.shape == (48 // seq_len, seq_len)
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(cut[:2], batch[:2]))
    before, after = (set(b.cu_seqlens.tolist()) - {48} for b in (batch, cut))
    assert after == before | set(range(0, 48, seq_len))
    assert after == set((cut.positions.flatten() == 0).nonzero().flatten().tolist())
    steps = cut.positions.flatten().diff()
    assert bool(((steps == 1) | (cut.positions.flatten()[1:] == 0)).all())
    assert cut.cu_seqlens.dtype == batch.cu_seqlens.dtype and cut.positions.dtype == batch.positions.dtype


def test_a_batch_in_its_own_rows_is_itself():
    batch = tg.random_batch(2, tiny())
    assert batch.in_rows(batch.ids.size(1)) is batch


def test_stages_follow_the_used_fraction_of_the_budget():
    cfg = tiny(train_seq_schedule="8@0.25,16@0.75,32@1", enable_looping_at=0.5)
    seen = [tuple(tg.stage(cfg, i / 100))[:2] for i in range(100)]
    assert seen == [(False, 8)] * 25 + [(False, 16)] * 25 + [(True, 16)] * 25 + [(True, 32)] * 25
    assert tuple(tg.stage(cfg, 1.5)) == (True, 32, False)
    for knobs in (dict(train_seq_schedule="8@0.25,16@0.75,32@1"), dict(enable_looping_at=0), dict(num_loops=0),
                  dict(enable_looping_at=1), dict(quant="sdclip", qat_start=0.7)):
        cfg = tiny(**knobs)
        assert tg.stages(cfg) == list(dict.fromkeys(tg.stage(cfg, i / 1000) for i in range(1000)))


@pytest.mark.parametrize("schedule", [
    "8", "8@0.5", "8@0.5,16@0.4,32@1", "0@1", "8@0,16@1", "eight@1", "8@0.5,,16@1", "64@1"])
def test_a_schedule_that_cannot_be_kept_is_one_clear_line(schedule: str):
    with pytest.raises(tg.UserError, match=f"TRAIN_SEQ_SCHEDULE={schedule}") as error:
        tiny(train_seq_schedule=schedule)
    assert "\n" not in str(error.value)


def test_the_docstrings_of_the_schedule_show_what_happens():
    (test,) = doctest.DocTestFinder().find(tg.seq_schedule, "seq_schedule", globs=vars(tg))
    assert doctest.DocTestRunner().run(test) == doctest.TestResults(0, 1)


def test_rows_that_do_not_divide_a_forward_are_refused_before_training(dataset, tmp_path, capsys):
    assert tg.main([], environment(dataset, tmp_path, **SMALL, train_seq_schedule="24@0.5,32@1")) == 2
    assert "rows of 24 do not divide" in capsys.readouterr().err


@pytest.mark.parametrize("primed", [True, False], ids=["primed", "not primed"])
def test_every_stage_is_one_graph_that_was_made_before_the_clock(primed: bool, dataset, tmp_path, monkeypatch):
    """Loop off and on, short rows and long: no break, and nothing to compile in the steps; without priming, all."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(tg, "fit_to_cap", lambda *args: (_ for _ in ()).throw(tg.UserError("trained")))
    torch._dynamo.reset()
    env = environment(dataset, tmp_path, **SMALL, compile="on", warmup_steps=int(primed),
                      train_seq_schedule="16@0.25,32@1")
    assert tg.main([], env) == 2
    (end,) = events(tmp_path, "train_end")
    assert end["graph_breaks"] == 0 and end["recompiles"] == (0 if primed else 3)
    assert [(e["step"], e["visits"], e["seq_len"]) for e in events(tmp_path, "stage")] == [(1, 2, 32), (2, 3, 32)]


def test_learning_rates_rise_again_after_a_change_of_rows(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "fit_to_cap", lambda *args: (_ for _ in ()).throw(tg.UserError("trained")))
    env = environment(dataset, tmp_path, **SMALL, train_seq_schedule="16@0.4,32@1", seq_change_warmup_steps=2,
                      iterations=5, warmdown_frac=0)
    assert tg.main([], env) == 2
    assert [e["lr_scale"] for e in events(tmp_path, "train")] == [1, 1, 0.5, 1, 1]


def test_windows_are_of_blocks_and_repeat_to_the_last_one():
    cfg = tiny(attn_windows="5,0,7")
    assert [(v.block, v.window) for v in tg.layer_plan(cfg, True)] == [(0, 5), (1, 0), (2, 7), (1, 0), (2, 7), (3, 5)]
    assert {v.window for v in tg.layer_plan(tiny(), True)} == {0}
    assert "0@5 1 2@7 1<2 2<1@7" in tg.plan_text(tg.layer_plan(cfg, True))
    for wrong in ("", "5,", "-1", "a", "1234567"):
        with pytest.raises(tg.UserError, match="ATTN_WINDOWS"):
            tiny(attn_windows=wrong)


def test_a_window_hides_what_lies_before_it_and_nothing_else():
    """A token is seen by the block behind it up to two tokens later, through two blocks up to four."""
    cfg = tiny(num_layers=2, num_loops=0, parallel_start_layer=1, attn_windows="3", smear_gate_enabled=False)
    model, plan = noisy(cfg), tg.layer_plan(cfg, False)
    ids = np.array([[tg.BOS_ID, *range(5, 21)]])
    with torch.no_grad():
        w = tg.Weights(model, torch.float32)
        hidden = model.hidden(batch_of(ids), plan, w)
        for changed in range(1, 16):
            other = ids.copy()
            other[0, changed] += 100
            moved = (model.hidden(batch_of(other), plan, w) - hidden).abs().amax(-1)[0] > 0
            assert moved.nonzero().flatten().tolist() == list(range(changed, min(changed + 5, 16)))


@pytest.mark.parametrize("knobs", [{}, dict(parallel_residual="single", bigram_buckets=64, bigram_dim=8)],
                         ids=["record's parts", "demo's parts"])
def test_our_step_is_the_straightforward_one(knobs: dict, run: tg.Run):
    """Joined products, scales in the weights, banks, hand-written gradients and foreach updates change no loss."""
    cfg = tiny(gate_window=6, muon_momentum_warmup_steps=3, **knobs)
    found = contest(cfg, run, 12)
    assert found["ours"][-1] < found["ours"][0] - 0.5
    np.testing.assert_allclose(found["ours"], found["plain"], rtol=0, atol=1e-4)
