"""Adaptation while scoring: adapters, shared SGD, cache, hints and tilt equal slow references, and stay causal."""
import collections
import copy
import dataclasses
import functools
import math
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
from conftest import tiny as tiny_config
from hypothesis import strategies as st
from test_evaluation import by_ranks, val_data
from test_model import EVERYTHING, document, logits_of, looped_layers, nats_of, noisy

import train_gpt as tg
from bench.common import web_lengths


def tiny(**knobs: object) -> tg.Config:
    """A tiny configuration with chunks of eight targets, so that short documents have several."""
    return tiny_config(**{"ttt_chunk_size": "8", **knobs})


# Lengths of a stream's documents: several chunks, one chunk, no target of its own but the next start.
FIVE = [48, 9, 26, 1, 20, 40]
ALONE = dict(phased_ttt_num_phases=0, ngram_base_beta=0)  # nothing shared learns, no tilt


def adapted(val: tg.ValData, cfg: tg.Config, run: tg.Run, model: tg.GPT | None = None
            ) -> tuple[torch.Tensor, tg.Ledger, str]:
    """(nats of every target, ledger, digest) of a whole evaluation of a fresh noisy model."""
    model = copy.deepcopy(model) if model is not None else noisy(cfg)
    hints = tg.ngram_hints(torch.from_numpy(val.ids.astype(np.int64)), cfg) if cfg.ngram_base_beta else None
    scorer = tg.Scorer(val, cfg, run, hints)
    _, digest = tg.adapted_score(model, scorer)
    return scorer.ledger.nats, scorer.ledger, digest


MODES = {
    "windows": dict(ttt="none"),
    "lora, recomputed": dict(ttt_context="recompute", phased_ttt_num_phases=0),
    "lora, cached": dict(ttt_context="cache", phased_ttt_num_phases=0),
    "phases": dict(ttt_context="recompute"),
    "phases, cached": dict(ttt_context="cache"),
    "sgd": dict(ttt="sgd", ttt_chunk_tokens=50, ttt_lr=0.05),
}
ANY_MODE = pytest.mark.parametrize("mode", MODES)


# -- adapters ------------------------------------------------------------------------------------------

@torch.no_grad()
def test_adapters_that_have_not_learned_change_no_bit_and_each_has_a_place_of_its_own():
    """Changing any one B changes the logits: none is dead, none is shared; looped blocks have several."""
    cfg = tiny(**EVERYTHING, ttt_lora_on="q,k,v,o,mlp,head")
    model = noisy(cfg)
    batch = tg.make_batch([np.array(document(s, 13), dtype=np.uint16) for s in (1, 2)], 2, 12)
    base, layers = tg.Weights(model, torch.float32), looped_layers(model)
    w = tg.AdaptedWeights(base, model, layers, 2, cfg)
    plain = logits_of(model, batch, base)
    assert torch.equal(plain, logits_of(model, batch, w))
    parts = [part for site in w.sites.values() for part in site]
    assert len(parts) == 5 * len(layers) + 1
    for _, _, b in parts:
        b.fill_(0.1)
        assert (logits_of(model, batch, w) - plain).abs().max() > 1e-4
        b.zero_()


def merged(model: tg.GPT, cfg: tg.Config) -> tuple[list[torch.Tensor], object]:
    """(leaves, function giving the weights with W + s B A in place of W) for adapters on q, k, v and head alone."""
    layers = looped_layers(model)
    with torch.no_grad():
        base = tg.Weights(model, torch.float32)
    own = [(key, rows, a[0].detach().clone().requires_grad_(), b[0].detach().clone().requires_grad_())
           for key, site in tg.AdaptedWeights(base, model, layers, 1, cfg).sites.items() for rows, a, b in site]

    def weights() -> tg.Weights:
        w = copy.copy(base)
        w.matrices = dict(base.matrices)
        for (name, number), rows, a, b in own:
            key = (name, layers[number].block * (name != "head"))
            change = torch.zeros_like(w.matrices[key])
            change[rows] = cfg.ttt_lora_alpha / cfg.ttt_lora_rank * b @ a
            w.matrices[key] = w.matrices[key] + change
        return w

    return [t for _, _, a, b in own for t in (a, b)], weights


def test_adaptation_equals_a_loop_over_documents_with_merged_matrices(run: tg.Run):
    """One document at a time, W + s B A written into the matrices, whole windows, steps on the chunk's mean loss."""
    cfg = tiny(num_loops=0, ttt_lora_on="q,k,v,head", ttt_context="recompute", ttt_weight_decay=0.1, ttt_lora_alpha=32,
               ttt_lora_lr=0.005, ttt_lora_a_share=0.4, ttt_eps=0.01, **ALONE)
    val, model = val_data(FIVE), noisy(cfg)
    expected = torch.full((val.num_targets,), torch.nan)
    for begin, stop in zip(val.starts.tolist(), val.stops.tolist()):
        leaves, weights = merged(model, cfg)
        rule = torch.optim.AdamW([dict(params=leaves[::2], lr=0.002), dict(params=leaves[1::2])], lr=0.005,
                                 betas=(0.0, 0.99), eps=0.01, weight_decay=0.1)
        for at in range(begin, stop, 8):
            end, first = min(at + 8, stop), max(begin, at + 8 - 32)
            nats = nats_of(model, tg.make_batch([val.ids[first:end + 1]], 1, end - first), weights())[0, at - first:]
            expected[at:end] = nats.detach()
            if end < stop:
                rule.zero_grad()
                nats.mean().backward()
                rule.step()
    actual = adapted(val, cfg, run, model)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    plain = adapted(val, dataclasses.replace(cfg, ttt_lora_lr=0.0), run, model)[0]
    assert (actual - plain).abs().max() > 0.05  # the comparison is about something


# -- the cache -----------------------------------------------------------------------------------------


def test_where_the_run_compiles_all_chunks_are_two_graphs_made_before_the_score(run: tg.Run, monkeypatch):
    """One for a single row, one for any more, of any length; with the scores of the plain program."""
    graphs, val = [], val_data([30, 9, 26, 20, 40])
    cfg = tiny(**ALONE, ttt_context="recompute", ttt_lora_on="v,head", num_layers=2, loop_start=0, loop_end=0,
               parallel_start_layer=1, eval_seq_len=24, ttt_batch_size=3)
    expected = adapted(val, cfg, run)[0]

    torch._dynamo.reset()
    monkeypatch.setattr(run, "compiles", True)
    monkeypatch.setattr(run, "compiled", functools.partial(
        torch.compile, dynamic=False, fullgraph=True, backend=lambda m, _: graphs.append(run.status) or m.forward))
    torch.testing.assert_close(adapted(val, cfg, run)[0], expected, rtol=0, atol=2e-5)
    assert graphs == ["warmup_adapters"] * 2


@torch.no_grad()
@pytest.mark.parametrize("cache_len, size", [(100, 8), (5, 8), (33, 16)])
def test_chunks_with_a_cache_equal_one_banded_forward(cache_len: int, size: int):
    """Chunk after chunk with keys and values kept = the whole document at once where tokens see so many ids back."""
    model, length = noisy(tiny(**EVERYTHING)), 48
    batch = tg.make_batch([np.array(document(s, length + 1), dtype=np.uint16) for s in (1, 2)], 2, length)
    back = torch.arange(length)[:, None] - torch.arange(length)
    band = ((back >= 0) & (back < cache_len))[None, None]
    w, layers, cache, parts = tg.Weights(model, torch.float32), looped_layers(model), tg.KeyValueCache(cache_len), []
    model.kernels = tg.Kernels(tg.Attention("band", lambda b: band, tg.masked_attention))
    whole = model(batch, layers, w)
    ids = torch.nn.functional.pad(batch.ids, (1, 0), value=tg.BOS_ID)
    for begin in range(0, length, size):
        window = ids[:, begin:begin + size + 1]
        positions = torch.arange(begin - 1, begin + size, dtype=torch.int32).expand(2, -1)
        parts.append(model(tg.Batch(window, window, positions, torch.zeros(1)), layers, w, cache))
        cache.advance(size)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_with_a_cache_adapters_learn_and_within_a_window_those_that_do_not_score_as_the_plain_model(run: tg.Run):
    """From a document that repeats itself, at which the scores of its first chunk are all theirs to learn."""
    cfg = tiny(eval_seq_len=96, eval_stride=0, ttt_context="cache", **ALONE)
    val = val_data([*FIVE, 91])
    val.ids[-90:] = [7, 300, 41, 7, 300, 88] * 15
    model = noisy(cfg)
    learned, frozen, plain = (adapted(val, dataclasses.replace(cfg, **knobs), run, model)[0]
                              for knobs in (dict(ttt_lora_lr=0.01), dict(ttt_lora_lr=0.0), dict(ttt="none")))
    torch.testing.assert_close(frozen, plain, rtol=1e-5, atol=1e-4)
    assert torch.equal(learned[-90:-82], frozen[-90:-82]) and learned[-40:].mean() < frozen[-40:].mean() - 0.5


# -- what any mode keeps -------------------------------------------------------------------------------

@ANY_MODE
def test_no_score_depends_on_a_later_id_or_on_where_its_document_ends(mode: str, run: tg.Run):
    """With everything that adapts switched on; the changed id's own target does change."""
    cfg, val = tiny(**EVERYTHING, **MODES[mode]), val_data(FIVE, vocab=40)
    before = adapted(val, cfg, run)[0]
    for at, moves in ((53, False), (130, False), (31, True)):
        ids, starts = val.ids.copy(), val.starts.copy()
        if moves:  # a start more, and the one after it gone: as many documents as before
            moved = int(np.searchsorted(starts, at))
            ids[starts[moved]], starts[moved] = 37, at
        ids[at] = tg.BOS_ID if moves else 3 + (ids[at] + 11) % 37
        after = adapted(val._replace(ids=ids, starts=starts), cfg, run)[0]
        torch.testing.assert_close(after[:at - 1], before[:at - 1], rtol=0, atol=1e-5)
        assert after[at - 1] != before[at - 1]


@ANY_MODE
def test_every_target_has_one_distribution_whatever_it_is(mode: str, run: tg.Run):
    """The probabilities of all ids that could stand at a place, each scored by a run of its own, sum to one."""
    cfg, val = tiny(**{**MODES[mode], "vocab_size": 12, "ngram_rules": "1:0.3:1"}), val_data([22, 20], vocab=12)
    cuts = [tg.ValData(np.append(val.ids[:37], [last]).astype(np.uint16), val.starts, val.target_bytes[:37])
            for last in range(12)]
    total = sum(math.exp(-adapted(cut, cfg, run)[0][-1].item()) for cut in cuts)
    assert total == pytest.approx(1, abs=1e-4)


@ANY_MODE
def test_the_score_does_not_depend_on_batch_ranks_or_chance(mode: str, run: tg.Run):
    """One row at a time, or all; two ranks; the ledger tells what was learned but not who did it."""
    val, model, cfg = val_data(FIVE), noisy(tiny()), tiny(**MODES[mode])
    first, _, expected = adapted(val, tiny(**MODES[mode], ttt_batch_size=2, val_batch_tokens=8), run, model)
    for nats, _, digest in by_ranks(2, cfg, lambda one: adapted(val, cfg, one, model)):
        torch.testing.assert_close(nats, first, rtol=1e-4, atol=2e-3)
        assert digest == expected


def test_the_digest_tells_what_was_learned(run: tg.Run):
    digests = {mode: adapted(val_data([20, 9, 12, 9, 10]), tiny(**MODES[mode], phased_ttt_prefix_docs=4), run)[2]
               for mode in MODES}
    assert len(set(digests.values())) == 4  # the context of adapters changes nothing about it
    assert digests["lora, cached"] == digests["lora, recomputed"] and digests["phases"] == digests["phases, cached"]


@pytest.mark.parametrize("context", ["recompute", "cache"])
def test_documents_of_a_phase_do_not_see_each_other_and_a_phase_changes_later_ones_alone(context: str, run: tg.Run):
    """Two phases end after documents 2 and 5 of six; what follows is scored by changed weights."""
    cfg, val = tiny(ttt_context=context, **ALONE), val_data(FIVE)
    before, ids, own = adapted(val, cfg, run)[0], val.ids.copy(), slice(*val.starts[2:4].tolist())
    ids[own] = document(99, FIVE[2])
    changed = adapted(val._replace(ids=ids), cfg, run)[0] - before
    assert (changed[own] != 0).float().mean() > 0.9
    changed[own] = 0
    torch.testing.assert_close(changed, torch.zeros_like(changed), rtol=0, atol=1e-5)
    phased, edge = adapted(val, dataclasses.replace(cfg, phased_ttt_num_phases=2), run)[0], int(val.starts[2])
    torch.testing.assert_close(phased[:edge], before[:edge], rtol=0, atol=1e-5)
    assert ((phased - before)[edge:].abs() > 1e-4).float().mean() > 0.8


# -- shared SGD ----------------------------------------------------------------------------------------

def test_chunked_sgd_equals_a_plain_loop(run: tg.Run, monkeypatch: pytest.MonkeyPatch):
    """Score a chunk's windows, two SGD passes over its rows, next chunk; written out with torch.optim.SGD."""
    monkeypatch.setattr(tg.SharedSgd, "CLIP", 0.5)
    cfg = tiny(ttt="sgd", ttt_chunk_tokens=64, ttt_lr=0.1, ttt_epochs=2, ngram_base_beta=0)
    val, model = val_data([150, 60]), noisy(cfg)
    actual = adapted(val, cfg, run, model)[0]
    layers, windows = looped_layers(model), tg.plan_windows(val, 32, 8)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    expected, count = torch.zeros(val.num_targets), -(-val.num_targets // 64)
    for c in range(count):
        with torch.no_grad():
            for begin, end, first in windows:
                if first // 64 == c:
                    nats = nats_of(model, tg.make_batch([val.ids[begin:end + 1]], 1, end - begin))[0]
                    expected[first:end] = nats[first - begin:]
        rows = [val.ids[a:min(a + 32, val.num_targets, 64 * c + 64) + 1]
                for a in range(64 * c, min(64 * c + 64, val.num_targets), 32)]
        for _ in range(2 * (c + 1 < count)):
            sgd.zero_grad()
            batch = tg.make_batch(rows, len(rows), 32)
            (model.total_loss(batch, layers, torch.float32) / sum(len(r) - 1 for r in rows)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            sgd.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * c / (count - 1)))
            sgd.step()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-3)


# -- hints and tilt ------------------------------------------------------------------------------------

def slow_hints(ids: list[int], rules: list[tuple[int, float, int]]) -> list[tuple[int, float] | None]:
    """(hint, share) of every target, from all that followed its context before; the longest rule that qualifies wins.

    Of ids that followed equally often, the one that was first to do so is the hint.
    """
    out: list[tuple[int, float] | None] = []
    for t in range(len(ids) - 1):
        hint = None
        for n, least_share, least_count in sorted(rules):
            counts, best = collections.Counter(), None
            for s in range(n - 1, t if t + 1 >= n else 0):
                if ids[s + 1 - n:s + 1] == ids[t + 1 - n:t + 1]:
                    counts[ids[s + 1]] += 1
                    best = ids[s + 1] if best is None or counts[ids[s + 1]] > counts[best] else best
            if counts.total() >= least_count and counts[best] / max(1, counts.total()) >= least_share:
                hint = (best, counts[best] / counts.total())
        out.append(hint)
    return out


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(ids=st.lists(st.integers(0, 3), min_size=2, max_size=120), by_share=st.booleans(),
                  rules=st.sampled_from(["1:0.3:1", "2:0.5:2,1:0.9:3", "3:0.5:1,4:0.6:2,5:1.0:1", "8:0.5:1,11:0.4:2",
                                         "7:0.2:1"]))
def test_hints_are_those_of_dictionaries_filled_step_by_step(ids: list[int], by_share: bool, rules: str):
    hints, betas = tg.ngram_hints(torch.tensor(ids), tiny(ngram_rules=rules, ngram_beta_by_share=by_share))
    assert len(hints) == len(betas) == len(ids) - 1
    for t, expected in enumerate(slow_hints(ids, tg.ngram_rules(rules))):
        if expected is None:
            assert betas[t] == 0
        else:
            assert hints[t] == expected[0] and betas[t] == pytest.approx(2 * expected[1] ** by_share, rel=1e-6)


def test_hints_of_long_streams_of_large_ids_do_not_overflow():
    ids = torch.from_numpy(np.random.default_rng(0).integers(60_000, 65_536, 5000))
    ids[2500:] = ids[:2500]
    hints, betas = tg.ngram_hints(ids, tiny(vocab_size=65_536, ngram_rules="16:0.5:1"))
    assert (betas[2515:] == 2).all() and torch.equal(hints[2515:], ids[2516:].int()) and (betas[:2500] == 0).all()


def test_the_tilted_distribution_is_the_formula():
    logits, softcap = 20 * torch.randn(11, generator=torch.Generator().manual_seed(0)), 15.0
    spread, targets = logits.expand(11, 11), torch.arange(11)
    nats = tg.softcapped_cross_entropy(spread, targets, softcap)
    for hint, beta in ((0, 2.0), (3, 1.3), (10, 0.5), (4, 0.0)):
        p = torch.softmax(softcap * torch.tanh(logits.double() / softcap), dim=-1)
        p[hint] *= math.exp(beta)
        tilt = tg.tilted(nats, spread, targets, torch.full((11,), hint), torch.full((11,), beta), softcap)
        torch.testing.assert_close(torch.exp(-tilt.double()), p / p.sum(), rtol=1e-4, atol=1e-7)


# -- batches, ranks, budget ----------------------------------------------------------------------------

@pytest.mark.parametrize("world, context", [(1, "cache"), (8, "recompute")])
def test_every_document_is_in_one_batch_that_reaches_its_end_and_ranks_end_level(world: int, context: str):
    """On as many documents as eight ranks score, the costliest rank exceeds the mean by less than 3 %."""
    lengths = np.append(web_lengths(50_000), [0, 1])
    cfg = tiny(ttt_chunk_size=48, eval_seq_len=2048, ttt_context=context)
    batches = tg.plan_batches(np.arange(100, 50_102), lengths, cfg, world)
    assert sorted(d for batch in batches for d in batch.documents) == [*range(100, 50_100), 50_101]  # one has no target
    for batch in batches:
        longest = int(lengths[np.array(batch.documents) - 100].max())
        assert list(batch.edges) == list(range(0, longest + 48, 48)) and len(batch.documents) <= 64
    assigned = tg.assign_to_ranks(batches, world)
    assert sorted(sum(assigned, [])) == sorted(batches) and len(assigned) == world
    loads = [sum(batch.cost for batch in some) for some in assigned]
    assert max(loads) < 1.03 * sum(loads) / world


@pytest.mark.parametrize("mode", ["phases", "sgd"])
def test_past_the_budget_everything_is_scored_and_nothing_adapts(mode: str, run: tg.Run):
    _, ledger, _ = adapted(val_data(FIVE), tiny(**MODES[mode], eval_seconds_budget=1e-9), run)
    events = np.concatenate(ledger.events)
    assert (events[:, 2] == tg.Ledger.SCORE).all() and (ledger.times == 1).all()
    assert "adaptation_cut" in run.path(".txt").read_text()


def test_the_projection_follows_the_work(monkeypatch: pytest.MonkeyPatch):
    clock, logged = SimpleNamespace(now=0.0), []
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(tg, "time", clock)
    run = SimpleNamespace(spent=lambda budget: 100.0, log=lambda event, **values: logged.append((event, values)))
    budget = tg.EvalBudget(10.0, tiny(eval_seconds_budget=200), run)
    with budget.work(0.01):
        clock.now += 1  # a first step that loads kernels is no pace
    assert budget.allows()
    # 100 + 9 + 9/1.01*8.99 = 189; 100 + 18 + 18/2.01*7.99 = 190; 100 + 48 + 48/3.01*6.99 = 259; 49/7.01*2.99: 170
    for step, (cost, seconds, expected) in enumerate([(1, 8, True), (1, 9, True), (1, 30, False), (4, 1, True)]):
        with budget.work(cost):
            clock.now += seconds
        assert budget.allows() == expected, step  # late once, and in time again when the work goes faster
    clock.now += 20  # waiting for others: time, but no slower work
    assert budget.allows()
    clock.now += 20
    assert not budget.allows() and [event for event, _ in logged] == ["adaptation_cut"]  # said once


@pytest.mark.parametrize("fixed", [0, 500, 14_000])
def test_what_a_step_costs_beside_its_tokens_is_measured(fixed: float, monkeypatch: pytest.MonkeyPatch):
    """Large batches come first: with the wrong fixed cost the many small ones at the end would be misjudged."""
    clock, run = SimpleNamespace(now=0.0), SimpleNamespace(spent=lambda budget: 0.0)
    monkeypatch.setattr(tg, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    tokens = [64 * 2000] * 20 + [64 * 900] * 20 + [2000] * 500
    seconds = [1e-5 * (fixed + count) for count in tokens]
    budget = tg.EvalBudget(sum(tokens) + tg.STEP_TOKENS * len(tokens), tiny(), run, len(tokens))
    for i, count in enumerate(tokens):
        with budget.work(count + tg.STEP_TOKENS, steps=1):
            clock.now += seconds[i]
        if i >= 25:
            assert budget.seconds_ahead() == pytest.approx(sum(seconds[i + 1:]), rel=0.2, abs=0.5)
