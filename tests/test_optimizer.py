"""Update rules against float64 formulas; routes, clipping, priming, accumulation, averaging."""
import collections
import fnmatch
import math

import numpy as np
import pytest
import torch
from conftest import batch_of, tiny
from test_model import EVERYTHING, document, noisy
from torch import Tensor

import train_gpt as tg

SHAPES = [(2, 24, 8), (3, 8, 24), (2, 16, 16)]
"""Tall, wide and square stacks."""


def gradients(model: tg.GPT, seed: int, factor: float = 1.0) -> None:
    """Random gradients on all parameters."""
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = factor * torch.randn_like(p)


def weights(model: tg.GPT) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def stepped(run: tg.Run, factors: list[float], prime: bool = False, **knobs: object) -> Tensor:
    """All weights after one step for each factor on its gradient."""
    cfg = tiny(**knobs)
    model = noisy(cfg)
    optimizer = tg.ShardedOptimizer(model, cfg, run)
    if prime:
        gradients(model, seed=99)
        optimizer.step(0.0, 0.5)
        optimizer.reset()
    for seed, factor in enumerate(factors):
        gradients(model, seed, factor)
        optimizer.step(0.7, 0.9)
    return weights(model)


# -- routes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["none", "single", "two"])
@pytest.mark.parametrize("gate", [dict(attn_gate=g) for g in ("none", "output", "sparse", "dense")]
                         + [dict(attn_gate="dense", gated_attn_bias=1.0)], ids=lambda g: "-".join(map(str, g.values())))
def test_every_parameter_has_one_route(gate: dict, parallel: str):
    for rest in (dict(), dict(bigram_buckets=8, smear_gate_enabled=False, skip_gates_enabled=False)):
        for name, _ in tg.GPT(tiny(parallel_residual=parallel, **gate, **rest)).named_parameters():
            matching = [r for r in tg.ROUTES if any(fnmatch.fnmatchcase(name, p) for p in r.patterns.split())]
            assert [tg.route(name)] == matching


def test_every_pattern_of_the_routes_names_a_parameter():
    names = [name for name, _ in tg.GPT(tiny(**EVERYTHING)).named_parameters()]
    for row in tg.ROUTES:
        for pattern in row.patterns.split():
            assert fnmatch.filter(names, pattern), pattern


def test_a_parameter_without_a_route_is_a_bug():
    with pytest.raises(AssertionError, match="matches 0 rows"):
        tg.route("new_gate")


def knobs_of(name: str) -> tuple[str, str, str]:
    """(rule, rate, decay) of a parameter, from the table of the record."""
    if name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "mlp_up_in_bank", "mlp_down_in_bank"):
        return "muon", "matrix_lr", "muon_wd"
    if name in ("tok_emb", "bigram.table"):
        return "adam", "tied_embed_lr", "embed_wd"
    return "adam", "scalar_lr", "adam_wd"


@pytest.mark.parametrize("knob", ["matrix_lr", "scalar_lr", "tied_embed_lr"])
def test_a_rate_of_zero_freezes_the_parameters_of_that_rate_alone(knob: str, run: tg.Run):
    cfg = tiny(**EVERYTHING, **{knob: 0})
    model = noisy(cfg)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = tg.ShardedOptimizer(model, cfg, run)
    gradients(model, 0)
    optimizer.step(1.0, 0.9)
    frozen = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert frozen == {name for name in before if knobs_of(name)[1] == knob} != set()


# -- Muon ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind,low,high", [("polar", 0.85, 1.15), ("classic", 0.46, 1.21)])
@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_keeps_directions_and_flattens_the_spectrum(shape: tuple, kind: str, low: float, high: float):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    spectrum = torch.logspace(-2.3, 0, min(shape[1:]))
    x = tg.orthogonalize(7 * (u * spectrum) @ v, tg.coefficients(tiny(muon_coefficients=kind)), torch.float32)
    assert x.shape == shape
    inner = u.mT @ x @ v.mT
    gains = inner.diagonal(dim1=-2, dim2=-1)
    assert low < gains.min() and gains.max() < high
    torch.testing.assert_close(inner, torch.diag_embed(gains), rtol=0, atol=1e-3)


def test_the_two_kinds_of_coefficients_are_those_of_the_records():
    polar, classic = (tg.coefficients(tiny(muon_coefficients=kind)) for kind in ("polar", "classic"))
    assert classic == ((3.4445, -4.7750, 2.0315),) * 5 and len(polar) == 5
    assert polar[0] == (8.156554524902461, -22.48329292557795, 15.878769915207462)
    assert polar[4] == (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)
    assert tg.coefficients(tiny(muon_backend_steps=3)) == polar[:3]


def naive_muon(grads: list[np.ndarray], mu: float, normalize: bool, steps: list[tuple]) -> list[np.ndarray]:
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
        for a, b, c in steps:
            s = x @ x.T
            x = a * x + (b * s + c * s @ s) @ x
        updates.append((x.T if rows > cols else x) * math.sqrt(max(1, rows / cols)))
    return updates


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_muon_update_equals_its_formula_over_three_steps(shape: tuple, normalize: bool):
    torch.manual_seed(1)
    grads, steps = [torch.randn(shape) for _ in range(3)], tg.coefficients(tiny())
    momentum = torch.zeros(shape)
    found = [tg.muon_update(g.clone(), momentum, None, 0.9, 0.0, normalize, steps, torch.float32) for g in grads]
    for k in range(shape[0]):
        expected = naive_muon([g[k].double().numpy() for g in grads], 0.9, normalize, steps)
        for update, wanted in zip(found, expected):
            np.testing.assert_allclose(update[k], wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("second", [False, True])
def test_a_zero_gradient_gives_a_zero_update(second: bool):
    moment = torch.zeros(2, 6, 1) if second else None
    update = tg.muon_update(torch.zeros(2, 6, 4), torch.zeros(2, 6, 4), moment, 0.9, 0.95, True,
                            tg.coefficients(tiny()), torch.float32)
    assert torch.equal(update, torch.zeros(2, 6, 4))


@pytest.mark.parametrize("normalize", [False, True])
def test_row_normalisation_forgets_the_scale_of_each_row(normalize: bool):
    torch.manual_seed(2)
    grad, factors = torch.randn(2, 6, 10), torch.tensor([1e-3, 0.1, 1, 5, 80, 1e4])[:, None]

    def update(g: Tensor) -> Tensor:
        return tg.muon_update(g, torch.zeros_like(g), None, 0.9, 0.0, normalize, tg.coefficients(tiny()),
                              torch.float32)

    assert torch.allclose(update(grad), update(grad * factors), rtol=0, atol=1e-4) == normalize


@pytest.mark.parametrize("shape", SHAPES)
def test_normuon_equalises_rows_at_unchanged_frobenius_norm(shape: tuple):
    torch.manual_seed(3)
    plain, scaled, second = torch.zeros(shape), torch.zeros(shape), torch.zeros(*shape[:2], 1)
    expected = torch.zeros_like(second)
    for step in range(3):
        grad, steps = torch.randn(shape), tg.coefficients(tiny())
        a = tg.muon_update(grad, plain, None, 0.9, 0.0, False, steps, torch.float32)
        b = tg.muon_update(grad, scaled, second, 0.9, 0.95, False, steps, torch.float32)
        torch.testing.assert_close(a.norm(dim=(1, 2)), b.norm(dim=(1, 2)), rtol=1e-4, atol=0)
        if step == 0:  # the moment is then one sample, so that every row comes out equally long
            rows = b.norm(dim=2)
            torch.testing.assert_close(rows, rows.mean(1, keepdim=True).expand_as(rows), rtol=1e-4, atol=0)
        mean_square = (a / math.sqrt(max(1, shape[1] / shape[2]))).square().mean(-1, keepdim=True)
        expected = 0.95 * expected + 0.05 * mean_square
        torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-9)
        wanted = a * expected.rsqrt()
        wanted = wanted * (a.norm(dim=(1, 2), keepdim=True) / wanted.norm(dim=(1, 2), keepdim=True))
        torch.testing.assert_close(b, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cautious,expected", [
    (False, [0.9 * 1 - 0.2, 0.9 * 2 + 0.4, -0.9 * 3 - 0.6, -0.9 * 4 + 0.8, 0.9 * 5]),
    (True, [0.9 * 1 - 0.2, 2 + 0.4, -3 - 0.6, -0.9 * 4 + 0.8, 5])])
def test_decay_is_decoupled_and_cautious_decay_follows_the_update(cautious: bool, expected: list[float]):
    weight, update = torch.tensor([1.0, 2, -3, -4, 5]), torch.tensor([1.0, -2, 3, -4, 0])
    tg.decay_and_apply(weight, update, lr=0.2, wd=0.5, cautious=cautious)
    torch.testing.assert_close(weight, torch.tensor(expected))


# -- the whole step ------------------------------------------------------------------------------------


def test_a_step_does_what_the_rules_say(run: tg.Run):
    """Muon and AdamW with their own rates and decays, from one gradient; the norm is that of all gradients."""
    cfg = tiny(**EVERYTHING, grad_clip_norm=0, adam_wd=0.3, embed_wd=0.2, muon_wd=0.1, beta1=0.8, beta2=0.9)
    model = noisy(cfg)
    before = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    optimizer = tg.ShardedOptimizer(model, cfg, run)
    gradients(model, 0)
    grads = {name: p.grad.double().numpy().copy() for name, p in model.named_parameters()}
    norm = optimizer.step(0.5, 0.9)
    assert float(norm) == pytest.approx(math.sqrt(sum((g ** 2).sum() for g in grads.values())), rel=1e-5)
    for name, p in model.named_parameters():
        assert p.grad is None
        (rule, lr, wd), g = knobs_of(name), grads[name]
        rate, decay = 0.5 * getattr(cfg, lr), getattr(cfg, wd)
        update = g / (np.abs(g) + cfg.adam_eps) if rule == "adam" else \
            np.stack([naive_muon([m], 0.9, True, tg.coefficients(cfg))[0] for m in g])
        np.testing.assert_allclose(p.detach(), (1 - rate * decay) * before[name] - rate * update, rtol=0, atol=2e-5)


def test_a_clipped_gradient_has_a_direction_and_no_length(run: tg.Run):
    """Two steps, because one alone forgets the length of its gradient also without clipping."""
    small, large = (stepped(run, [1.0, factor], grad_clip_norm=0.3) for factor in (1.0, 100.0))
    torch.testing.assert_close(small, large, rtol=0, atol=1e-5)
    free, large_free = (stepped(run, [1.0, factor], grad_clip_norm=0) for factor in (1.0, 100.0))
    assert (free - large_free).abs().max() > 1e-3


def test_gradients_below_the_clip_and_without_a_clip_are_left_alone(run: tg.Run):
    factors = [1.0, 0.01]
    assert torch.equal(stepped(run, factors, grad_clip_norm=0), stepped(run, factors, grad_clip_norm=1e9))
    assert not torch.allclose(stepped(run, factors, grad_clip_norm=0), stepped(run, factors, grad_clip_norm=1e-2))


@pytest.mark.parametrize("knobs", [{}, dict(normuon_beta2=0.95), dict(cautious_wd=True)],
                         ids=["plain", "normuon", "cautious"])
def test_priming_leaves_no_trace(run: tg.Run, knobs: dict):
    """A step at rate 0 moves no bit, and after `reset` the optimizer is as new."""
    model = noisy(tiny())
    assert torch.equal(stepped(run, [], prime=True, **knobs), weights(model))
    assert torch.equal(stepped(run, [1.0, 0.5], prime=True, **knobs), stepped(run, [1.0, 0.5], **knobs))
    assert not torch.equal(stepped(run, [1.0, 0.5], **knobs), stepped(run, [0.3, 0.5], **knobs))


def test_micro_batches_add_up_to_the_batch(run: tg.Run, dataset: dict[str, str]):
    """The same rows in one forward, in three, and in three of which the last has padding, give the same step."""
    results, forwards = [], []
    for micro in (384, 128, 160):
        cfg = tiny(**dataset, micro_batch_tokens=micro)
        model, data = noisy(cfg), tg.TrainData(cfg, run)
        optimizer = tg.ShardedOptimizer(model, cfg, run)
        batches = data.step(3)
        for batch in batches:
            loss = model.total_loss(batch, tg.layer_plan(cfg, looped=True), torch.float32)
            (loss / cfg.train_batch_tokens).backward()
        norm = optimizer.step(1.0, 0.9)
        forwards.append(len(batches))
        results.append(torch.cat([norm.view(1), weights(model)]))
    assert forwards == [1, 3, 3]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("knobs", [
    dict(num_layers=1, num_loops=0, parallel_residual="none"), dict(num_layers=1, num_loops=0, parallel_start_layer=0),
    dict(parallel_start_layer=4), dict(num_layers=2, num_loops=0, parallel_start_layer=1), EVERYTHING],
    ids=["one block", "one block, two lanes", "lanes after the last block", "two blocks", "everything"])
def test_every_topology_can_be_trained_or_is_refused_at_once(run: tg.Run, knobs: dict):
    """With the loop off and on, no parameter is without a gradient."""
    try:
        cfg = tiny(**knobs)
    except tg.UserError:
        return
    model = noisy(cfg)
    optimizer = tg.ShardedOptimizer(model, cfg, run)
    for looped in (False, True):
        batch = batch_of(np.array([document(s, 17) for s in range(2)]))
        model.total_loss(batch, tg.layer_plan(cfg, looped), torch.float32).backward()
        assert math.isfinite(optimizer.step(1.0, 0.9).item())


# -- averaging -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_averaged_weights_follow_their_formula(decay: float):
    model = noisy(tiny())
    ema, expected = tg.Ema(model, decay), weights(model).double()
    for seed in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        live = weights(model)
        ema.update()
        expected = decay * expected + (1 - decay) * live.double()
        assert torch.equal(weights(model), live)
    ema.load_into_model()
    torch.testing.assert_close(weights(model).double(), expected, rtol=0, atol=1e-6)
    assert decay or torch.equal(weights(model), live)


def test_optimizer_state_covers_every_parameter_once(run: tg.Run):
    cfg = tiny(**EVERYTHING)
    model = noisy(cfg)
    optimizer = tg.ShardedOptimizer(model, cfg, run)
    handled = collections.Counter(id(p) for p in [*optimizer.small, *(bank for bank, _ in optimizer.banks)])
    grouped = collections.Counter(id(p) for group in optimizer.adam.param_groups for p in group["params"])
    assert handled == collections.Counter(id(p) for p in model.parameters())
    assert grouped == collections.Counter(id(p) for p in optimizer.small)
