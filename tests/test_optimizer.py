"""Update rules against float64 formulas; routes, clipping, warmup, accumulation, averaging; our step, the plain one."""
import fnmatch
import functools
import math

import numpy as np
import pytest
import torch
from conftest import tiny
from test_model import EVERYTHING, noisy
from torch import Tensor

import train_gpt as tg
from bench.plain_step import contest


def gradients(model: tg.GPT, seed: int, factor: float = 1.0) -> None:
    """Random gradients on all parameters."""
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = factor * torch.randn_like(p)


def weights(model: tg.GPT) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def stepped(run: tg.Run, factors: list[float], warmup: bool = False, **knobs: object) -> Tensor:
    """All weights after one step for each factor on its gradient."""
    cfg = tiny(**knobs)
    model = noisy(cfg)
    optimizer = tg.ShardedOptimizer(model, cfg, run)
    if warmup:
        gradients(model, seed=99)
        optimizer.step(0.0, 0.5)
        optimizer.reset()
    for seed, factor in enumerate(factors):
        gradients(model, seed, factor)
        optimizer.step(0.7, 0.9)
    return weights(model)


# -- routes --------------------------------------------------------------------------------------------

def test_every_parameter_has_one_route_and_one_place_in_the_optimizer_and_every_pattern_a_parameter(run: tg.Run):
    model = tg.GPT(tiny(**EVERYTHING))
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        matching = [r for r in tg.ROUTES if any(fnmatch.fnmatchcase(name, p) for p in r.patterns.split())]
        assert [tg.route(name)] == matching
    assert all(fnmatch.filter(names, pattern) for row in tg.ROUTES for pattern in row.patterns.split())
    with pytest.raises(AssertionError, match="matches 0 rows"):
        tg.route("new_gate")
    optimizer = tg.ShardedOptimizer(model, tiny(**EVERYTHING), run)
    assert sorted([*optimizer.banks, *optimizer.small]) == sorted(names)
    grouped = [id(p) for group in optimizer.adam.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, optimizer.small.values()))


# -- Muon ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, low, high", [("polar", 0.85, 1.15), ("classic", 0.46, 1.21)])
def test_orthogonalization_flattens_the_spectrum(kind: str, low: float, high: float):
    """Directions are kept."""
    steps = tg.NEWTON_SCHULZ[kind]
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(2, 24, 8), full_matrices=False)
    inner = u.mT @ tg.orthogonalize(7 * (u * torch.logspace(-2.3, 0, 8)) @ v, steps, torch.float32) @ v.mT
    gains = inner.diagonal(dim1=-2, dim2=-1)
    assert low < gains.min() and gains.max() < high
    torch.testing.assert_close(inner, torch.diag_embed(gains), rtol=0, atol=1e-3)


def naive_muon(grads: list[np.ndarray], mu: float, normalize: bool, kind: str = "polar") -> list[np.ndarray]:
    """The updates of one matrix over several steps, float64."""
    buffer, updates = np.zeros_like(grads[0]), []
    for g in grads:
        buffer = mu * buffer + g
        u = g + mu * buffer
        if normalize:
            u = u / np.maximum(np.sqrt((u ** 2).sum(1, keepdims=True)), 1e-7)
        rows, cols = u.shape
        x = u.T if rows > cols else u
        x = x / (np.sqrt((x ** 2).sum()) + 1e-7)
        for a, b, c in tg.NEWTON_SCHULZ[kind]:
            s = x @ x.T
            x = a * x + (b * s + c * s @ s) @ x
        x = x.T if rows > cols else x
        updates.append(x * math.sqrt(max(1, rows / cols)))
    return updates


@pytest.mark.parametrize("normalize, kind", [(False, "classic"), (True, "polar")])
@pytest.mark.parametrize("shape", [(2, 24, 8), (3, 8, 24), (2, 16, 16)], ids=["tall", "wide", "square"])
def test_muon_update_equals_its_formula_over_three_steps(shape: tuple, normalize: bool, kind: str):
    """After a step of which the gradient is zero, and so the update."""
    torch.manual_seed(1)
    grads, momentum, steps = [torch.zeros(shape), *torch.randn(3, *shape)], torch.zeros(shape), tg.NEWTON_SCHULZ[kind]
    actual = [tg.muon_update(g.clone(), momentum, 0.9, normalize, steps, torch.float32) for g in grads]
    for k in range(shape[0]):
        expected = naive_muon([g[k].double().numpy() for g in grads], 0.9, normalize, kind)
        np.testing.assert_allclose(torch.stack(actual)[:, k], expected, rtol=0, atol=5e-4)


# -- the whole step ------------------------------------------------------------------------------------

def test_a_step_does_what_the_rules_say(run: tg.Run):
    """Muon and AdamW with their own rates and decays, from one gradient; the norm is that of all gradients."""
    cfg = tiny(**EVERYTHING, grad_clip_norm=0, adam_wd=0.3, embed_wd=0.2, muon_wd=0.1, beta2=0.9)
    model = noisy(cfg)
    before = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    optimizer = tg.ShardedOptimizer(model, cfg, run)
    gradients(model, 0)
    grads = {name: p.grad.double().numpy().copy() for name, p in model.named_parameters()}
    norm = optimizer.step(0.5, 0.9)
    assert float(norm) == pytest.approx(math.sqrt(sum((g ** 2).sum() for g in grads.values())), rel=1e-5)
    for name, p in model.named_parameters():
        assert p.grad is None
        g = grads[name]
        update, lr, decay = g / (np.abs(g) + 1e-8), cfg.scalar_lr, cfg.adam_wd
        if name in ("tok_emb", "bigram.table"):
            lr, decay = cfg.tied_embed_lr, cfg.embed_wd
        elif name.endswith("bank"):
            update, lr, decay = np.stack([naive_muon([m], 0.9, True)[0] for m in g]), cfg.matrix_lr, cfg.muon_wd
        rate = 0.5 * lr
        np.testing.assert_allclose(p.detach(), (1 - rate * decay) * before[name] - rate * update, rtol=0, atol=2e-5)


def test_a_clipped_gradient_has_a_direction_and_no_length(run: tg.Run):
    """Two steps, because one alone forgets the length of its gradient also without clipping."""
    small, large = (stepped(run, [1.0, factor], grad_clip_norm=0.3) for factor in (1.0, 100.0))
    torch.testing.assert_close(small, large, rtol=0, atol=1e-5)
    free, large_free = (stepped(run, [1.0, factor], grad_clip_norm=0) for factor in (1.0, 100.0))
    assert (free - large_free).abs().max() > 1e-3
    assert torch.equal(free, stepped(run, [1.0, 1.0], grad_clip_norm=1e9))  # below the limit nothing changes


def test_warmup_leaves_no_trace(run: tg.Run):
    """A step at rate 0 moves no bit, and after `reset` the optimizer is as new."""
    plain = stepped(run, [1.0, 0.5])
    assert torch.equal(stepped(run, [], warmup=True), weights(noisy(tiny())))
    assert torch.equal(stepped(run, [1.0, 0.5], warmup=True), plain)
    assert not torch.equal(plain, stepped(run, [0.3, 0.5]))


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero(factor: float, run: tg.Run):
    assert torch.equal(stepped(run, [factor], muon_wd=0, embed_wd=0, adam_wd=0), weights(noisy(tiny())))


def test_micro_batches_add_up_to_the_batch(run: tg.Run, dataset: dict[str, str]):
    """The same rows in one forward, in three, and in three of which the last has padding, give the same step."""
    results, forwards = [], []
    for micro in (384, 128, 160):
        cfg = tiny(**dataset, micro_batch_tokens=micro)
        model, batches = noisy(cfg), tg.TrainData(cfg, run).step(3)
        loss = tg.stage_loss(model, tg.Stage(looped=True, rounded=False), cfg, run)
        total = sum(tg.backward(loss(batch)) for batch in batches)
        norm = tg.ShardedOptimizer(model, cfg, run).step(1.0, 0.9)
        forwards.append(len(batches))
        results.append(torch.cat([total.view(1), norm.view(1), weights(model)]))
    assert forwards == [1, 3, 3]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)


def test_every_stage_is_one_graph_that_was_made_in_the_warmup(dataset: dict[str, str], tmp_path, monkeypatch):
    """Loop off and on, rounded and not: no break, and nothing to compile in the steps."""
    graphs = []
    whole = functools.partial(torch.compile, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    monkeypatch.setattr(torch, "compile", whole)
    torch._dynamo.reset()
    cfg = tiny(**dataset, compile="on", quant="sdclip", qat_start=0.75, log_dir=str(tmp_path), num_layers=2,
               loop_start=0, loop_end=0, parallel_start_layer=1)
    with tg.Run(cfg, {}, log=False) as run:
        model, data = tg.build_model(cfg, run), tg.TrainData(cfg, run)
        losses = {stage: tg.stage_loss(model, stage, cfg, run) for stage in tg.stages(cfg)}
        assert len(losses) == 3
        optimizer, before = tg.ShardedOptimizer(model, cfg, run), weights(model)
        tg.warmup(losses, optimizer, data, cfg, run)
        assert torch.equal(weights(model), before) and len(graphs) == 3
        for step, loss in enumerate(losses.values()):
            for batch in data.step(step):
                loss(batch)
        assert len(graphs) == 3


@pytest.mark.parametrize("knobs", [{}, dict(parallel_residual="single", bigram_buckets=64, bigram_dim=8, conv_taps=0)],
                         ids=["record's parts", "demo's parts"])
def test_our_step_is_the_straightforward_one(knobs: dict, run: tg.Run):
    """Joined products, scales in the weights and banks change no loss."""
    losses = contest(tiny(muon_momentum_warmup_steps=3, **knobs), run, 12)
    assert losses["ours"][-1] < losses["ours"][0] - 0.5
    np.testing.assert_allclose(losses["ours"], losses["plain"], rtol=0, atol=1e-4)


# -- averaging -----------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_averaged_weights_follow_their_formula_and_live_ones_are_not_touched(decay: float):
    model = noisy(tiny())
    ema, expected = tg.Ema(model, decay), weights(model).double()
    for _ in range(4):
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        live = weights(model)
        ema.update()
        expected = decay * expected + (1 - decay) * live.double()
        assert torch.equal(weights(model), live)
    ema.load_into_model()
    torch.testing.assert_close(weights(model).double(), expected, rtol=0, atol=1e-6 if decay else 0)
