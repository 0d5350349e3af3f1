"""GPTQ against the textbook algorithm, the trellis against all paths; scales, costs, what is covered."""
import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import events, tiny
from test_model import EVERYTHING, logits_of, looped_layers, noisy
from torch import Tensor

import train_gpt as tg


def problem(rows: int, cols: int, seed: int = 0, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """(weights [rows, cols], sum of x x^T of correlated inputs of very different sizes)."""
    torch.manual_seed(seed)
    mixing = torch.randn(rank or cols, cols) * torch.logspace(-1, 1, cols)[torch.randperm(cols)]
    inputs = torch.randn(4 * cols, rank or cols) @ mixing
    return torch.randn(rows, cols), inputs.T @ inputs


def scales_of(weight: Tensor, bits: int) -> Tensor:
    """Row scales of SDClip at 3 deviations."""
    return (3 * weight.std(dim=-1) / (2 ** (bits - 1) - 1)).clamp_min(2.0 ** -24)


def solve(weight: Tensor, hessian: Tensor, row: Tensor, bits: int, column: Tensor | None = None) -> Tensor:
    """`gptq` of one matrix by plain rounding along its rows: its codes. Column scales are 1 by default."""
    column = torch.ones(weight.size(1)) if column is None else column
    return tg.gptq(weight[None], tg.inverse_factor(hessian[None]), row[None], column[None], tg.Trellis.of(1),
                   2 ** (bits - 1) - 1)[0]


def rounded(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Nearest codes; `scale` broadcasts against the weights."""
    top = 2 ** (bits - 1) - 1
    return (weight / scale).round().clamp(-top, top)


def textbook(weight: Tensor, hessian: Tensor, row: Tensor, bits: int, column: Tensor) -> tuple[np.ndarray, list[float]]:
    """Optimal brain quantization in float64: those to come make up for each column's error as well as can be.

    Returns (codes, what an error of 1 in each column costs then).
    """
    w, h, s, b = (t.double().numpy().copy() for t in (weight, hessian, row, column))
    h += 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    codes, costs, top = np.zeros_like(w), [], 2 ** (bits - 1) - 1
    for j in range(len(h)):
        inverse = np.linalg.inv(h[j:, j:])
        codes[:, j] = np.clip(np.round(w[:, j] / (s * b[j])), -top, top)
        error = w[:, j] - codes[:, j] * s * b[j]
        w[:, j:] -= np.outer(error, inverse[0] / inverse[0, 0])
        costs.append(1 / inverse[0, 0])
    return codes, costs


def damage(weight: Tensor, hessian: Tensor, values: Tensor) -> float:
    """tr(E H E^T): squared error of the outputs over the inputs that H was summed over."""
    error = (weight - values).double()
    return float(torch.einsum("rc,cd,rd->", error, hessian.double(), error))


# -- the column loop -----------------------------------------------------------------------------------

@pytest.mark.parametrize("cols", [5, 150])
def test_gptq_equals_the_textbook_across_segments(cols: int):
    """Codes but for a tie that falls to the other side; the factor's diagonal gives the costs."""
    weight, hessian = problem(8, cols)
    scattered = torch.logspace(-0.6, 0.6, cols)[torch.randperm(cols)]
    for bits, column in ((2, torch.ones(cols)), (8, torch.ones(cols)), (16, scattered)):
        row = scales_of(weight, min(bits, 6))
        codes, (expected, costs) = (f(weight, hessian, row, bits, column) for f in (solve, textbook))
        assert codes.dtype == torch.int16 and codes.abs().max() <= 2 ** (bits - 1) - 1
        assert (codes.numpy() != expected).mean() <= 0.002
        assert torch.equal(codes, solve(weight, 1024 * hessian, row, bits, column))  # more of the same calibration
        diagonal = tg.inverse_factor(hessian[None])[0].diagonal()
        np.testing.assert_allclose(diagonal ** -2, costs, rtol=1e-3)


def test_a_stack_is_solved_like_its_matrices_one_by_one():
    """Which matrices share a stack depends on the number of ranks; the codes may not. One needs more damping."""
    several = [problem(6, 33, seed) for seed in range(4)]
    several[2][1][:5] = several[2][1][:, :5] = 0
    several[3][1].copy_(problem(6, 33, 9, rank=1)[1])
    weight, hessian = (torch.stack(list(t)) for t in zip(*several))
    row = scales_of(weight, 4)
    before = weight.clone(), hessian.clone(), row.clone()
    codes = tg.gptq(weight, tg.inverse_factor(hessian), row, torch.ones(4, 33), tg.Trellis.of(1), 7)
    for k in range(4):
        assert torch.equal(codes[k], solve(weight[k], hessian[k], row[k], 4))
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, hessian, row)))


def test_awkward_rows_and_inputs_give_codes_in_range():
    weight, hessian = problem(5, 20)
    weight[0], weight[1], weight[2] = 0, 0.3, 0
    weight[2, 4] = 1e3
    weight[3], weight[4] = weight[3] * 1e-9, weight[4] * 1e4
    dead, alive = [0, 7, 19], [i for i in range(20) if i not in (0, 7, 19)]  # never seen: they disturb nobody
    hessian[dead], hessian[:, dead] = 0, 0
    row = scales_of(weight, 4)
    codes = solve(weight, hessian, row, 4)
    assert codes.abs().max() <= 7 and not codes[0].any() and codes[2, 4] == 7 and codes[4].any()
    assert torch.equal(codes[:, dead].float(), rounded(weight, row[:, None], 4)[:, dead])
    assert (codes[:, alive] != solve(weight[:, alive], hessian[alive][:, alive], row, 4)).float().mean() < 0.02


def test_damping_rises_with_a_logged_event_until_a_singular_hessian_factorises(monkeypatch):
    """Also where the Hessian factorises and its inverse does not; what comes out still beats rounding."""
    events = []
    for seed, damp in [(1, 1e-12), *((3, 10 ** (tenth / 10)) for tenth in range(-100, -50, 7))]:
        weight, hessian = problem(6, 20, seed, rank=1)
        monkeypatch.setattr(tg, "GPTQ_DAMP", damp)
        row = scales_of(weight, 4)
        nearest = damage(weight, hessian, rounded(weight, row[:, None], 4) * row[:, None])
        assert damage(weight, hessian, solve(weight, hessian, row, 4) * row[:, None]) < 0.5 * nearest
        tg.inverse_factor(hessian[None], lambda name, **values: events.append((name, values)))
    assert events and {name for name, _ in events} == {"gptq_damping"}
    assert [values["next"] for _, values in events] == [10 * values["damp"] for _, values in events]
    with pytest.raises(tg.UserError, match="^GPTQ: .* not positive definite at any damping.*$"):
        tg.inverse_factor(torch.full((1, 9, 9), torch.nan))


# -- scales --------------------------------------------------------------------------------------------

def test_scale_codes_are_eighths_of_an_octave_on_every_machine():
    every = torch.arange(-128, 128).to(torch.int8)
    scales = tg.scales_of(every, 1.0)
    assert [scales[i].item() for i in (0, 192, 200, 255)] == pytest.approx([2 ** -24, 1, 2, 2 ** (63 / 8)], rel=1e-7)
    assert torch.equal(tg.scale_codes(scales, tg.ROW_OFFSET), every)
    assert torch.equal(tg.scale_codes(tg.scales_of(every, 1.0, 0), 0), every)
    some = torch.logspace(-6, 1, 400)
    nearest, above = (tg.scales_of(tg.scale_codes(some, tg.ROW_OFFSET, up), 1.0) for up in (torch.round, torch.ceil))
    assert ((nearest / some).log2().abs() <= 1 / 16 + 1e-6).all()
    assert ((above / some).log2() >= -1e-6).all() and ((above / some).log2() <= 1 / 8 + 1e-6).all()
    assert (tg.scales_of(tg.scale_codes(torch.zeros(3), tg.ROW_OFFSET), 1.0) > 0).all()


@pytest.mark.parametrize("softness", [0.0, 0.7, 1.0])
def test_scales_fill_every_matrix_to_the_same_level(softness: float, monkeypatch: pytest.MonkeyPatch):
    """The mean cost of a scale squared is 1 in each; with full exponents it is 1 in every entry."""
    monkeypatch.setattr(tg, "ROW_SOFTNESS", softness)
    torch.manual_seed(0)
    cost, factor = torch.rand(3, 50).exp() * torch.tensor([[1.0], [1e4], [1e-3]]), torch.rand(3, 20) + 0.1
    row, column = tg.waterfill_scales(cost, factor)
    damped = cost + 0.01 * cost.mean(-1, keepdim=True)
    level = damped[:, :, None] * (row[:, :, None] * column[:, None, :] / factor[:, None, :]) ** 2
    torch.testing.assert_close(level.mean((1, 2)), torch.ones(3), rtol=1e-4, atol=0)
    assert (level.std((1, 2)) < 1e-4).all() == (softness == 1.0)


# -- the trellis ---------------------------------------------------------------------------------------

def cheapest(weight: Tensor, upper: Tensor, grid: float) -> list[int]:
    """Codes of one row by the best of all paths (parity checks 5 and 2), errors fed forward in each, in float64."""
    best, u = (np.inf, []), upper.double().numpy()
    for bits in itertools.product((0, 1), repeat=len(weight)):
        w, cost, codes, state = weight.double().numpy().copy(), 0.0, [], 0
        for j, bit in enumerate(bits):
            coset = 2 * bit + (state & 1)
            codes.append(int(coset + 4 * np.round((w[j] / grid - coset) / 4)))
            error = (w[j] - codes[-1] * grid) / u[j, j]
            w[j:] -= error * u[j, j:]
            cost += error ** 2
            state = (state >> 1) ^ (state & 1) * 2 ^ bit
        best = min(best, (cost, codes))
    return best[1]


@pytest.mark.parametrize("length, rows, correlated", [(2, 40, True), (9, 6, False)])
def test_the_path_through_the_trellis_is_the_cheapest(length: int, rows: int, correlated: bool):
    """With errors fed forward as long as every path survives; without them at any length."""
    weight, hessian = problem(rows, length, seed=1)
    factor = tg.inverse_factor({True: hessian, False: torch.eye(length)}[correlated][None])
    row = 0.3 + torch.rand(rows)
    codes = tg.gptq(weight[None], factor, row[None], torch.ones(1, length), tg.Trellis.of(4), 99)[0]
    for w, own, scale in zip(weight, codes.tolist(), row.tolist()):
        assert own == cheapest(w, factor[0], scale)


def test_codes_follow_the_trellis_and_lose_less_at_equal_entropy():
    """At 3 bits the trellis is worth at least a tenth of the damage; its bits are those of codes of known parity."""
    weight, hessian = problem(64, 128)
    factor = tg.inverse_factor(hessian[None])

    def figures(states: int) -> tuple[float, float]:
        """(bits a code, damage) at these scales."""
        trellis = tg.Trellis.of(states)
        row = torch.full((1, 64), 0.4 / trellis.density)
        codes = tg.gptq(weight[None], factor, row, torch.ones(1, 128), trellis, 2 ** 15 - 4)[0]
        streams, state = tg.to_streams([codes.numpy()], 0, states), tg.TrellisState(64 * 2, states)
        if states > 1:
            assert all(np.array_equal(state.codes(line >> 1), line) for line in streams)
        parity = streams & (trellis.density - 1)
        counts = [np.unique(values, return_counts=True)[1] for values in (streams, parity)]
        entropy = [-(c / c.sum() * np.log2(c / c.sum())).sum() for c in counts]
        return entropy[0] - entropy[1], damage(weight, hessian, codes * row[0, :, None])

    (bits, plain), (less_bits, less) = figures(1), figures(4)
    assert less * 4 ** (less_bits - bits) < 0.9 * plain


# -- the whole model -----------------------------------------------------------------------------------

def unit_sums(model: tg.GPT, grams: dict[tuple[str, int], Tensor] | None = None) -> tg.RecordingWeights:
    """What uncorrelated inputs and outputs of equal importance would give."""
    sums = tg.RecordingWeights(model, torch.float32)
    sums.gram = grams or {key: torch.eye(m.size(1)) for key, m in sums.matrices.items()}
    sums.fisher = {key: torch.ones(m.size(0)) for key, m in sums.matrices.items()}
    return sums


def quantize(model: tg.GPT, cfg: tg.Config, run: tg.Run, global_scale: float, grams: dict | None = None
             ) -> dict[str, tg.Quantized]:
    quantizer = tg.Quantizer(model, unit_sums(model, grams), cfg, run)
    return quantizer.quantize(global_scale, quantizer.solved)


STORED = {"qo_bank": "gptq:attn", "kv_bank": "gptq:attn", "mlp_up_bank": "gptq:mlp", "mlp_down_bank": "gptq:mlp",
          "tok_emb": "gptq:embed", "gate.weight": "int8", "bigram.table": "int8", "bigram.proj": "int8",
          "kv_conv": "int8", "mlp_conv": "int8"}  # the others: fp16


@pytest.mark.parametrize("quant, scale", [("sdclip", 0.25), ("waterfill", 0.05)])
def test_every_tensor_is_stored_once_as_its_route_says(quant: str, scale: float, run: tg.Run):
    cfg = tiny(**EVERYTHING, quant=quant, matrix_bits=5, embed_bits=7, attn_clip_sigmas=4, mlp_clip_sigmas=6,
               embed_clip_sigmas=9, trellis_states=4)
    grids = {"gptq:attn": (5, 4), "gptq:mlp": (5, 6), "gptq:embed": (7, 9)}
    model = noisy(cfg)
    with torch.no_grad():
        model.gate.weight[0, 1] = 0
    quantized = quantize(model, cfg, run, scale)
    assert list(quantized) == [name for name, _, _ in model.tensors()]
    for name, values, parameter in model.tensors():
        q = quantized[name]
        assert q.stored == STORED.get(parameter, "fp16") and q.codes.shape == values.shape
        if q.stored == "fp16":
            assert q.rows is None and torch.equal(q.dequantize(scale), values.half().float())
            continue
        assert q.codes.dtype == torch.int16 and q.rows.dtype == torch.int8 and q.rows.shape == values.shape[:-1]
        if q.stored == "int8":
            step = tg.scales_of(q.rows, 1.0)[..., None]
            assert q.columns is None and torch.equal(q.dequantize(scale), q.codes.float() * step)
            top = q.codes.abs().amax(-1)[values.abs().amax(-1) > 0]
            assert (top <= 127).all() and (top >= 116).all() and not q.codes[values.abs().amax(-1) == 0].any()
            assert ((q.dequantize(scale) - values).abs() <= 0.51 * step).all()
            continue
        step = tg.scales_of(q.rows, scale)[..., None] * tg.scales_of(q.columns, 1.0, 0)
        torch.testing.assert_close(q.dequantize(scale), q.codes.float() * step)
        if quant == "sdclip":
            bits, sigmas = grids[q.stored]
            ratio = step[:, 0] / (scale * sigmas * values.std(-1) / (2 ** (bits - 1) - 1))
            assert not q.columns.any() and (ratio.log2().abs() <= 1 / 16 + 1e-3).all()
            assert torch.equal(q.codes.float(), rounded(values, step, bits))  # the inputs were uncorrelated
        else:  # nothing is clipped; the trellis leaves every second code, and rarely prefers the one after
            assert ((q.dequantize(scale) - values).abs() <= 2.6 * step).all()
            assert ((q.dequantize(scale) - values).abs() <= step).float().mean() > 0.7


def test_mixed_bits_go_by_the_trace_of_the_hessian(run: tg.Run):
    """#1260: the matrices of the largest trace have MATRIX_BITS, the others one less; the embedding has its own."""
    clips = dict(attn_clip_sigmas=1, mlp_clip_sigmas=1, embed_clip_sigmas=1)
    cfg = tiny(quant="sdclip", matrix_bits=6, embed_bits=7, n_int6_layers=5, **clips)
    model = noisy(cfg)
    grams = {key: (1 + 10 * (key in (("up", 1), ("qkv", 2), ("o", 0)))) * gram for key, gram in
             unit_sums(model).gram.items()}
    largest = {name: int(q.codes.abs().max()) for name, q in quantize(model, cfg, run, 1.0, grams).items()
               if q.stored.startswith("gptq:")}
    more = {"blocks.1.up", "blocks.2.q", "blocks.2.k", "blocks.2.v", "blocks.0.o"}
    assert largest == {**{name: 15 for name in largest}, **dict.fromkeys(more, 31), "tok_emb": 63}


def test_each_matrix_is_rounded_for_the_inputs_it_reads(run: tg.Run):
    """Every stored matrix meets the Hessian of its own product, and of no other; inputs never seen get codes of 0."""
    cfg = tiny(quant="sdclip")
    model = noisy(cfg)
    hessians = {key: problem(1, len(h), seed)[1] for seed, (key, h) in enumerate(unit_sums(model).gram.items())}
    quantized = quantize(model, cfg, run, 1.0, hessians)
    reads = {"q": "qkv", "k": "qkv", "v": "qkv"}
    matrices, used = {name: values for name, values, _ in model.tensors()}, set()
    for name, q in quantized.items():
        if q.stored.startswith("gptq:"):
            _, block, kind = name.split(".") if name != "tok_emb" else ("", 0, "head")
            key = reads.get(kind, kind), int(block)
            used.add(key)
            bits, _ = cfg.grid(q.stored.removeprefix("gptq:"))
            order = hessians[key].diagonal().argsort(descending=True)  # costly columns first
            expected = solve(matrices[name][:, order], hessians[key][order][:, order], tg.scales_of(q.rows, 1.0), bits)
            assert (q.codes[:, order] != expected).float().mean() < 0.01
    assert used == set(hessians)
    for quant in ("sdclip", "waterfill"):
        grams = unit_sums(model).gram
        grams["up", 0][2] = grams["up", 0][:, 2] = 0
        codes = quantize(model, tiny(quant=quant), run, 0.02, grams)["blocks.0.up"].codes
        assert not codes[:, 2].any() and codes.any(0).sum() == codes.size(1) - 1


# -- training that sees rounded weights ----------------------------------------------------------------

@pytest.mark.parametrize("bits", [2, 4])
def test_rounded_training_sees_what_the_artifact_holds_and_moves_what_it_rounds(bits: int, run: tg.Run):
    """Loss to the bit; the gradient at the rounded weights goes straight through; whatever the Hessians."""
    cfg = tiny(quant="sdclip", matrix_bits=bits, attn_clip_sigmas=1.2, mlp_clip_sigmas=1.3)
    model, on_grid, batch = noisy(cfg), noisy(cfg), tg.random_batch(2, cfg)
    tg.snap_banks(on_grid, cfg)
    straight = functools.partial(tg.RoundedWeights, tg.bank_grids(model, cfg))
    results = []
    for of, weights in ((on_grid, tg.Weights), (model, straight), (model, tg.Weights)):
        loss = of.total_loss(batch, looped_layers(of), torch.float32, weights)
        results.append([loss, *torch.autograd.grad(loss, list(of.parameters()))])
    assert all(map(torch.equal, results[0], results[1])) and not torch.equal(results[1][0], results[2][0])
    assert set(tg.bank_grids(model, cfg)) == {name for name, p in model.named_parameters() if name.endswith("bank")}
    hessians = {key: problem(1, len(h), seed)[1] for seed, (key, h) in enumerate(unit_sums(on_grid).gram.items())}
    quantized = quantize(on_grid, cfg, run, 1.0, hessians)
    matrices = {name: values for name, values, _ in on_grid.tensors() if name.startswith("blocks.")}
    assert set(matrices) == set(on_grid.row_codes)
    for name, values in matrices.items():
        assert torch.equal(quantized[name].dequantize(1.0), values)
        assert quantized[name].codes.abs().max() == 2 ** (bits - 1) - 1


# -- calibration ---------------------------------------------------------------------------------------

def test_sums_are_over_all_calibration_tokens_and_ranks(run: tg.Run, dataset: dict[str, str]):
    """To rounding, Fisher information included: its targets are drawn by row, whoever has the row."""
    cfg = tiny(**dataset, gptq_calibration_batches=3)
    model, data = noisy(cfg), tg.TrainData(cfg, run)

    def calibrated(rank: int, world: int, first_row: int = 40) -> tuple[tg.RecordingWeights, list[Tensor]]:
        """(sums, what was to be added up over ranks) of one rank."""
        seen: list[Tensor] = []
        told = SimpleNamespace(rank=rank, world=world, device=run.device, dtype=run.dtype, progress=run.progress,
                               all_reduce=lambda t: seen.append(t.clone()) or t)
        return tg.calibrate(model, data, first_row, cfg, told), seen

    sums, whole = calibrated(0, 1)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for world in (2, 5):
        parts = [calibrated(rank, world)[1] for rank in range(world)]
        for expected, *addends in zip(whole, *parts, strict=True):
            torch.testing.assert_close(sum(addends), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert float(sums.gram["head", 0].trace()) == pytest.approx(cfg.model_dim, rel=1e-4)
    for block in range(cfg.num_layers):  # normed inputs, scaled by 1 / sqrt(block + 1), over all layers
        assert float(sums.gram["qkv", block].trace()) == pytest.approx(cfg.model_dim / (block + 1), rel=1e-3)
    assert not torch.allclose(sums.gram["qkv", 0], calibrated(0, 1, 48)[0].gram["qkv", 0])  # other rows
    nothing, _ = calibrated(60, 64)  # a rank without rows adds zeros
    assert not any(t.any() for t in (*nothing.gram.values(), *nothing.fisher.values(), nothing.input_gram))


def test_calibration_leaves_gptq_half_of_the_time(run: tg.Run, dataset: dict[str, str]):
    cfg = tiny(**dataset, gptq_calibration_batches=3, max_wallclock_seconds=20, gptq_reserve_seconds=8)
    model, data = noisy(cfg), tg.TrainData(cfg, run)
    for spent, rows in ((0.0, 12), (17.0, 1)):
        run.charged["train"] = spent
        assert tg.calibrate(model, data, 0, cfg, run).tokens["head", 0] == rows * cfg.train_seq_len
    assert "on 8% of the rows, in half of GPTQ_RESERVE_SECONDS=8" in events(run.folder, "warning")[0]["text"]


@pytest.mark.parametrize("knobs", [{}, dict(num_kv_heads=2, mlp_mult=1.5)], ids=["usual", "narrow MLP"])
def test_costs_foresee_how_far_the_distribution_moves(knobs: dict, run: tg.Run, dataset: dict[str, str]):
    """KL of noise in one stored matrix, against half its Fisher cost: the same to a factor of two, for every kind.

    This holds channel scales, layers, the split of q, k and v, and both uses of the embedding together.
    """
    cfg = tiny(**dataset, gptq_calibration_batches=12, logit_softcap=8, **knobs)
    model, data = noisy(cfg, scale=0.1), tg.TrainData(cfg, run)
    with torch.no_grad():  # far from 1, so that a scale left out shows
        model.attn_scale.mul_(3)
        model.mlp_scale.mul_(0.3)
    sums = tg.calibrate(model, data, 0, cfg, run)
    batch = tg.make_batch([data.row(i) for i in range(48)], 48, cfg.train_seq_len)

    @torch.no_grad()
    def distribution() -> Tensor:
        return (8 * torch.tanh(logits_of(model, batch).double() / 8)).log_softmax(-1)

    before = distribution()
    for name, values, _ in model.tensors():
        if name == "tok_emb" or name.startswith("blocks.1."):
            gram, fisher = tg.error_cost(name, sums, model)
            noise = 0.003 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
            values.add_(noise)
            moved = float((before.exp() * (before - distribution())).sum())
            values.sub_(noise)
            foreseen = 0.5 * float(torch.einsum("r,rc,cd,rd->", fisher, noise, gram, noise))
            assert 0.5 < foreseen / moved < 2, (name, foreseen, moved)
