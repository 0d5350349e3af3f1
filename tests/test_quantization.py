"""GPTQ against the textbook algorithm in float64; step sizes, edge cases, Hessians, coverage of the model."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny
from test_model import EVERYTHING, noisy
from torch import Tensor

import train_gpt as tg


def problem(rows: int, cols: int, seed: int = 0, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """(weights [rows, cols], sum of x x^T of correlated inputs of very different sizes)."""
    torch.manual_seed(seed)
    mixing = torch.randn(rank or cols, cols) * torch.logspace(-1, 1, cols)[torch.randperm(cols)]
    inputs = torch.randn(4 * cols, rank or cols) @ mixing
    return torch.randn(rows, cols), inputs.T @ inputs


def steps_of(weight: Tensor, bits: int, sigmas: float = 3.0) -> Tensor:
    return tg.row_steps(sigmas * weight.std(dim=-1), bits)


def solve(weight: Tensor, hessian: Tensor, step: Tensor, bits: int, damp: float = 0.01) -> Tensor:
    """`gptq` of one matrix: int8 codes."""
    return tg.gptq(weight[None], hessian[None], step[None], bits, damp)[0]


def textbook(weight: Tensor, hessian: Tensor, step: Tensor, bits: int, damp: float) -> np.ndarray:
    """Optimal brain quantization in the order of decreasing diagonal: the inverse shrinks by one input at a time."""
    w, h, s = (t.double().numpy().copy() for t in (weight, hessian, step))
    dead = np.diag(h) == 0
    h[dead, dead], w[:, dead] = 1, 0
    order = np.argsort(-np.diag(h), kind="stable")
    inverse = np.linalg.inv(h + damp * np.mean(np.diag(h)) * np.eye(len(h)))
    codes, top = np.zeros_like(w), 2 ** (bits - 1) - 1
    left = list(order)
    while left:
        j = left.pop(0)
        codes[:, j] = np.clip(np.round(w[:, j] / s), -top, top)
        error = (w[:, j] - codes[:, j] * s) / inverse[j, j]
        w[:, left] -= np.outer(error, inverse[j, left])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def proxy_loss(weight: Tensor, hessian: Tensor, codes: Tensor, step: Tensor) -> float:
    """tr(E H E^T): squared error of the outputs over the inputs that H was summed over."""
    error = (weight - codes.float() * step.float()[:, None]).double()
    return float(torch.einsum("rc,cd,rd->", error, hessian.double(), error))


# -- the column loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("cols", [5, 130, 257])
def test_gptq_equals_the_textbook_across_block_boundaries(cols: int, bits: int):
    weight, hessian = problem(8, cols)
    step = steps_of(weight, bits)
    found, expected = solve(weight, hessian, step, bits), textbook(weight, hessian, step, bits, 0.01)
    assert found.dtype == torch.int8 and found.abs().max() <= 2 ** (bits - 1) - 1
    assert (found.numpy() != expected).mean() <= 0.002  # a tie may fall to the other side in fp32


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_gptq_beats_rounding_to_nearest(bits: int):
    for seed in range(3):
        weight, hessian = problem(16, 48, seed)
        step = steps_of(weight, bits)
        nearest = tg.round_to_codes(weight, step.float()[:, None], bits)
        best = proxy_loss(weight, hessian, solve(weight, hessian, step, bits), step)
        assert best < 0.7 * proxy_loss(weight, hessian, nearest, step)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_uncorrelated_inputs_are_rounded_to_nearest(scale: float):
    weight, _ = problem(8, 140)
    step = steps_of(weight, 5)
    found = solve(weight, scale * torch.eye(140), step, 5)
    assert torch.equal(found.float(), tg.round_to_codes(weight, step.float()[:, None], 5))


@pytest.mark.parametrize("factor", [2.0 ** -30, 1024.0])
def test_more_calibration_of_the_same_kind_changes_nothing(factor: float):
    weight, hessian = problem(8, 40)
    step = steps_of(weight, 4)
    assert torch.equal(solve(weight, hessian, step, 4), solve(weight, factor * hessian, step, 4))


def test_a_stack_is_solved_like_its_matrices_one_by_one():
    several = [problem(6, 33, seed) for seed in range(4)]
    several[2][1][:5] = several[2][1][:, :5] = 0
    weight, hessian = (torch.stack(list(t)) for t in zip(*several))
    step = steps_of(weight, 4)
    before = weight.clone(), hessian.clone(), step.clone()
    found = tg.gptq(weight, hessian, step, 4, 0.01)
    for k in range(4):
        assert torch.equal(found[k], solve(weight[k], hessian[k], step[k], 4))
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, hessian, step)))


def test_a_matrix_that_needs_more_damping_leaves_the_others_of_its_stack_alone():
    """Which matrices share a stack depends on the number of ranks; the codes may not."""
    (weight, good), bad = problem(6, 33), torch.full((33, 33), 3.0)
    step = steps_of(weight, 4)
    found = tg.gptq(torch.stack([weight, weight]), torch.stack([good, bad]), torch.stack([step, step]), 4, 1e-9)
    assert torch.equal(found[0], solve(weight, good, step, 4, 1e-9))


@pytest.mark.parametrize("damp", [1e-9, 0.01])
def test_awkward_rows_and_inputs_give_codes_in_range(damp: float):
    weight, hessian = problem(7, 20)
    weight[0], weight[1], weight[2] = 0, 0.3, 0
    weight[2, 4] = 1e3
    weight[3], weight[4] = weight[3] * 1e-9, weight[4] * 1e4
    dead = [0, 7, 19]
    hessian[dead], hessian[:, dead] = 0, 0
    step = steps_of(weight, 4)
    codes = solve(weight, hessian, step, 4, damp)
    assert step.isfinite().all() and (step > 0).all()
    assert codes.abs().max() <= 7 and not codes[0].any() and not codes[:, dead].any()
    assert codes[2, 4] == 7 and codes[4].any()


def test_inputs_that_were_never_seen_do_not_disturb_the_others():
    weight, hessian = problem(6, 30)
    dead = torch.arange(30) % 4 == 1
    hessian[dead], hessian[:, dead] = 0, 0
    step = steps_of(weight, 5)
    codes = solve(weight, hessian, step, 5, damp=1e-6)
    alone = solve(weight[:, ~dead], hessian[~dead][:, ~dead], step, 5, damp=1e-6)
    assert torch.equal(codes[:, ~dead], alone) and not codes[:, dead].any()


def test_no_input_at_all_gives_zeros():
    weight, hessian = problem(3, 9)
    assert not solve(weight, 0 * hessian, steps_of(weight, 6), 6).any()


def test_damping_rises_with_a_logged_event_until_a_singular_hessian_factorises():
    weight, hessian = problem(6, 40, rank=1)
    step, events = steps_of(weight, 4), []
    codes = tg.gptq(weight[None], hessian[None], step[None], 4, 1e-12, lambda name, **values: events.append(
        (name, values)))
    assert len(events) >= 1 and {name for name, _ in events} == {"gptq_damping"}
    assert [values["next"] for _, values in events] == [10 * values["damp"] for _, values in events]
    assert codes.abs().max() <= 7
    nearest = tg.round_to_codes(weight, step.float()[:, None], 4)
    assert proxy_loss(weight, hessian, codes[0], step) < proxy_loss(weight, hessian, nearest, step)


@pytest.mark.parametrize("seed", [1, 3, 5])
def test_damping_on_the_verge_of_singularity_still_beats_rounding(seed: int):
    """Also where the Hessian factorises and its inverse does not."""
    weight, hessian = problem(6, 20, seed, rank=1)
    step = steps_of(weight, 4)
    nearest = proxy_loss(weight, hessian, tg.round_to_codes(weight, step.float()[:, None], 4), step)
    for tenth in range(-100, -50):
        codes = solve(weight, hessian, step, 4, damp=10 ** (tenth / 10))
        assert proxy_loss(weight, hessian, codes, step) < 0.5 * nearest


def test_a_broken_hessian_is_one_clear_line():
    weight, hessian = problem(3, 9)
    with pytest.raises(tg.UserError, match="positive definite") as error:
        solve(weight, torch.full_like(hessian, torch.nan), steps_of(weight, 4), 4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_the_step_puts_the_clip_on_the_largest_code(bits: int):
    top = 2 ** (bits - 1) - 1
    largest = torch.tensor([0.0, 1e-12, 1e-3, 1.0, 500.0])
    step = tg.row_steps(largest, bits)
    assert step.dtype == torch.float16 and (step > 0).all()
    torch.testing.assert_close(step[2:].float() * top, largest[2:], rtol=2e-3, atol=0)
    codes = tg.round_to_codes(torch.tensor([-9.0, -1.0, -0.4, 0.4, 1.0, 9.0]), torch.tensor(1.0 / top), bits)
    assert codes[0] == codes[1] == -top and codes[4] == codes[5] == top


# -- the whole model -----------------------------------------------------------------------------------


def unit_hessians(model: tg.GPT) -> dict[tuple[str, int], Tensor]:
    return {key: torch.eye(m.size(1)) for key, m in tg.Weights(model, torch.float32).matrices.items()}


def stored_as(parameter: str) -> str:
    """From the table of the record."""
    families = {"qo_bank": "attn", "kv_bank": "attn", "mlp_up_bank": "mlp", "mlp_down_bank": "mlp", "tok_emb": "embed"}
    if parameter in families:
        return f"gptq:{families[parameter]}"
    return "int8" if parameter in ("gate.weight", "bigram.table", "bigram.proj") else "fp16"


def test_quantize_stores_every_tensor_once_as_its_route_says(run: tg.Run):
    cfg = tiny(**EVERYTHING, matrix_bits=5, embed_bits=7, attn_clip_sigmas=4, mlp_clip_sigmas=6, embed_clip_sigmas=9)
    grids = {"gptq:attn": (5, 4), "gptq:mlp": (5, 6), "gptq:embed": (7, 9)}
    model = noisy(cfg)
    with torch.no_grad():
        model.gate.weight[0, 1] = 0
    found = tg.quantize(model, unit_hessians(model), cfg, run)
    assert list(found) == [name for name, _, _ in model.tensors()]
    for name, values, parameter in model.tensors():
        q = found[name]
        assert q.stored == stored_as(parameter) and q.codes.shape == values.shape
        if q.stored == "fp16":
            assert q.scale is None and torch.equal(q.codes, values.half())
            assert torch.equal(q.dequantize(), values.half().float())
            continue
        assert q.codes.dtype == torch.int8 and q.scale.dtype == torch.float16
        assert q.scale.shape == values.shape[:-1]
        assert torch.equal(q.dequantize(), q.codes.float() * q.scale.float()[..., None])
        if q.stored == "int8":
            rows = values.abs().amax(-1) > 0
            assert (q.codes.abs().amax(-1) == 127)[rows].all() and not q.codes[~rows].any()
            assert ((q.dequantize() - values).abs() <= 0.57 * q.scale.float()[..., None]).all()
        else:
            bits, sigmas = grids[q.stored]
            torch.testing.assert_close(q.scale.float(), sigmas * values.std(-1) / (2 ** (bits - 1) - 1), rtol=1e-3,
                                       atol=0)
            nearest = tg.round_to_codes(values, q.scale.float()[..., None], bits)
            assert torch.equal(q.codes.float(), nearest)  # the inputs were uncorrelated
    assert {q.stored for q in found.values()} == {"gptq:attn", "gptq:mlp", "gptq:embed", "int8", "fp16"}


def test_coarser_steps_are_multiples(run: tg.Run):
    cfg = tiny()
    model = noisy(cfg)
    fine, coarse = (tg.quantize(model, unit_hessians(model), cfg, run, coarser=c) for c in (1.0, 4.0))
    for name in fine:
        if fine[name].stored.startswith("gptq:"):
            assert torch.equal(coarse[name].scale, 4 * fine[name].scale)
        elif fine[name].scale is None:
            assert torch.equal(coarse[name].codes, fine[name].codes)
        else:
            assert torch.equal(coarse[name].scale, fine[name].scale)


def test_each_matrix_is_rounded_for_the_inputs_it_reads(run: tg.Run):
    """Every stored matrix finds the Hessian of its own product, and of no other."""
    cfg = tiny()
    model = noisy(cfg)
    hessians = {key: problem(1, len(h), seed)[1] for seed, (key, h) in enumerate(unit_hessians(model).items())}
    found = tg.quantize(model, hessians, cfg, run)
    reads = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "up": "up", "down": "down"}
    matrices, used = {name: values for name, values, _ in model.tensors()}, set()
    for name, q in found.items():
        if q.stored.startswith("gptq:"):
            key = ("head", 0) if name == "tok_emb" else (reads[name.split(".")[2]], int(name.split(".")[1]))
            assert tg.hessian_key(name) == key
            used.add(key)
            bits, _ = cfg.grid(q.stored.removeprefix("gptq:"))
            expected = solve(matrices[name], hessians[key], q.scale, bits, cfg.gptq_damp)
            assert (q.codes != expected).float().mean() < 0.01
    assert used == set(hessians)


def test_hessians_sum_all_calibration_tokens_over_ranks(run: tg.Run, dataset: dict[str, str]):
    cfg = tiny(**dataset, gptq_calibration_batches=3)
    model, data = noisy(cfg), tg.TrainData(cfg, run)
    whole = tg.collect_hessians(model, data, 40, cfg, run)
    for world in (2, 5):
        halves = [tg.collect_hessians(model, data, 40, cfg, SimpleNamespace(
            rank=rank, world=world, device=run.device, dtype=run.dtype, total=lambda t: t, progress=run.progress))
            for rank in range(world)]
        for key, hessian in whole.items():
            torch.testing.assert_close(sum(half[key] for half in halves), hessian, rtol=1e-4, atol=1e-3)
    tokens = 3 * cfg.micro_batch_tokens
    assert float(whole["head", 0].trace()) == pytest.approx(tokens * cfg.model_dim, rel=1e-4)
    for block in range(cfg.num_layers):  # normed inputs, scaled by 1 / sqrt(block + 1)
        passes = 2 if 1 <= block <= 2 else 1
        assert float(whole["qkv", block].trace()) == pytest.approx(
            passes * tokens * cfg.model_dim / (block + 1), rel=1e-3)


def test_every_stored_matrix_has_a_hessian_of_its_width(run: tg.Run, dataset: dict[str, str]):
    cfg = tiny(**dataset, **EVERYTHING, num_kv_heads=2, mlp_mult=1.5)
    model = noisy(cfg)
    hessians = tg.collect_hessians(model, tg.TrainData(cfg, run), 0, cfg, run)
    stored = {name: values for name, values, p in model.tensors() if tg.route(p).stored.startswith("gptq:")}
    assert {tg.hessian_key(name) for name in stored} == set(hessians)
    for name, values in stored.items():
        hessian = hessians[tg.hessian_key(name)]
        assert hessian.shape == (values.size(-1), values.size(-1))
        torch.testing.assert_close(hessian, hessian.T, rtol=1e-5, atol=1e-3)


def test_calibration_reads_fresh_rows_and_the_looped_plan(run: tg.Run, dataset: dict[str, str]):
    """Starting at another row gives other sums; a rank without rows contributes zeros."""
    cfg = tiny(**dataset)
    model, data = noisy(cfg), tg.TrainData(cfg, run)
    first, later = (tg.collect_hessians(model, data, row, cfg, run)["qkv", 0] for row in (0, 8))
    assert not torch.allclose(first, later)
    idle = SimpleNamespace(rank=60, world=64, device=run.device, dtype=run.dtype, total=lambda t: t,
                           progress=run.progress)
    assert not any(h.any() for h in tg.collect_hessians(model, data, 0, cfg, idle).values())
