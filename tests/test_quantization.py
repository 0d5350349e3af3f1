"""GPTQ against the textbook algorithm in float64, the trellis against all paths; scales, costs, what is covered."""
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny
from test_model import EVERYTHING, logits_of, looped_layers, noisy
from torch import Tensor

import train_gpt as tg

TOP = 2 ** 15 - 4  # largest code where nothing is to be clipped


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


def textbook(weight: Tensor, hessian: Tensor, row: Tensor, bits: int, column: Tensor | None = None) -> np.ndarray:
    """Optimal brain quantization, column by column: the inverse shrinks by one input at a time."""
    w, h, s = (t.double().numpy().copy() for t in (weight, hessian, row))
    b = np.ones(w.shape[1]) if column is None else column.double().numpy()
    inverse = np.linalg.inv(h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h)))
    codes, top = np.zeros_like(w), 2 ** (bits - 1) - 1
    left = list(range(len(h)))
    while left:
        j = left.pop(0)
        codes[:, j] = np.clip(np.round(w[:, j] / (s * b[j])), -top, top)
        error = (w[:, j] - codes[:, j] * s * b[j]) / inverse[j, j]
        w[:, left] -= np.outer(error, inverse[j, left])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def damage(weight: Tensor, hessian: Tensor, values: Tensor) -> float:
    """tr(E H E^T): squared error of the outputs over the inputs that H was summed over."""
    error = (weight - values).double()
    return float(torch.einsum("rc,cd,rd->", error, hessian.double(), error))


# -- the column loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("cols", [5, 130, 257])
def test_gptq_equals_the_textbook_across_segments(cols: int, bits: int):
    weight, hessian = problem(8, cols)
    row = scales_of(weight, bits)
    codes = solve(weight, hessian, row, bits)
    assert codes.dtype == torch.int16 and codes.abs().max() <= 2 ** (bits - 1) - 1
    assert (codes.numpy() != textbook(weight, hessian, row, bits)).mean() <= 0.002  # a tie may fall to the other side
    column = torch.logspace(-0.6, 0.6, cols)[torch.randperm(cols)]
    codes = solve(weight, hessian, row, 16, column)
    assert (codes.numpy() != textbook(weight, hessian, row, 16, column)).mean() <= 0.002


@pytest.mark.parametrize("bits", [3, 6])
def test_gptq_beats_rounding_to_nearest(bits: int):
    for seed in range(3):
        weight, hessian = problem(16, 48, seed)
        order = hessian.diagonal().argsort(descending=True)
        weight, hessian = weight[:, order], hessian[order][:, order]
        row = scales_of(weight, bits)
        codes, nearest = solve(weight, hessian, row, bits), rounded(weight, row[:, None], bits)
        assert damage(weight, hessian, codes * row[:, None]) < 0.7 * damage(weight, hessian, nearest * row[:, None])
        # More calibration of the same kind changes nothing.
        assert torch.equal(codes, solve(weight, 1024 * hessian, row, bits))


@pytest.mark.parametrize("scale", [1e-3, 1e6])
def test_uncorrelated_inputs_are_rounded_to_nearest(scale: float):
    weight, _ = problem(8, 140)
    row = scales_of(weight, 5)
    assert torch.equal(solve(weight, scale * torch.eye(140), row, 5).float(), rounded(weight, row[:, None], 5))


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
    weight, hessian = problem(7, 20)
    weight[0], weight[1], weight[2] = 0, 0.3, 0
    weight[2, 4] = 1e3
    weight[3], weight[4] = weight[3] * 1e-9, weight[4] * 1e4
    dead = [0, 7, 19]  # never seen: they disturb nobody
    hessian[dead], hessian[:, dead] = 0, 0
    row, alive = scales_of(weight, 4), [i for i in range(20) if i not in dead]
    codes = solve(weight, hessian, row, 4)
    assert codes.abs().max() <= 7 and not codes[0].any() and codes[2, 4] == 7 and codes[4].any()
    assert torch.equal(codes[:, dead].float(), rounded(weight, row[:, None], 4)[:, dead])
    lone = solve(weight[:, alive], hessian[alive][:, alive], row, 4)
    assert (codes[:, alive] != lone).float().mean() < 0.02


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


def test_a_broken_hessian_is_one_clear_line():
    with pytest.raises(tg.UserError, match="^GPTQ: .* not positive definite at any damping.*$"):
        tg.inverse_factor(torch.full((1, 9, 9), torch.nan))


# -- scales --------------------------------------------------------------------------------------------


def test_scale_codes_are_eighths_of_an_octave_on_every_machine():
    every = torch.arange(-128, 128).to(torch.int8)
    scales = tg.scales_of(every, 1.0)
    assert [scales[i].item() for i in (0, 192, 200, 255)] == pytest.approx([2 ** -24, 1, 2, 2 ** (63 / 8)], rel=1e-7)
    assert torch.equal(tg.scale_codes(scales, tg.ROW_OFFSET), every)
    assert torch.equal(tg.scales_of(every, 3.0), 3 * scales)
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
    assert torch.equal(row[0].argsort(), (-cost[0]).argsort()) or softness == 0


def test_the_diagonal_of_the_factor_is_what_a_columns_error_costs(monkeypatch: pytest.MonkeyPatch):
    """Compensated by all later columns, an error e in column c loses (e / factor_c)^2."""
    monkeypatch.setattr(tg, "GPTQ_DAMP", 1e-9)
    hessian = problem(1, 12)[1]
    factors, h = tg.inverse_factor(hessian[None])[0].diagonal(), hessian.double().numpy()
    for j in (0, 5, 11):
        shift = np.zeros(12)
        shift[j] = 1.0
        if j < 11:
            shift[j + 1:] = -np.linalg.solve(h[j + 1:, j + 1:], h[j + 1:, j])
        assert shift @ h @ shift == pytest.approx(float(factors[j]) ** -2, rel=1e-3)


# -- the trellis ---------------------------------------------------------------------------------------


def paths(length: int) -> list[list[tuple[int, int]]]:
    """Every way through the trellis from state 0: (parity, next bit) of each code; from the parity checks 5 and 2."""
    ways: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]
    for _ in range(length):
        ways = [((state >> 1) ^ (state & 1) * 2 ^ bit, [*path, (state & 1, bit)])
                for state, path in ways for bit in (0, 1)]
    return [path for _, path in ways]


def cheapest(weight: Tensor, upper: Tensor, grid: float) -> list[int]:
    """Codes of the best path for one row, each path tried with its errors fed forward, in float64."""
    best, u = (np.inf, []), upper.double().numpy()
    for path in paths(len(weight)):
        w, cost, codes = weight.double().numpy().copy(), 0.0, []
        for j, (parity, bit) in enumerate(path):
            coset = 2 * bit + parity
            codes.append(int(coset + 4 * np.round((w[j] / grid - coset) / 4)))
            error = (w[j] - codes[-1] * grid) / u[j, j]
            w[j:] -= error * u[j, j:]
            cost += error ** 2
        best = min(best, (cost, codes))
    return best[1]


@pytest.mark.parametrize("length, correlated", [(2, True), (9, False)])
def test_the_path_through_the_trellis_is_the_cheapest(length: int, correlated: bool):
    """With errors fed forward as long as every path survives; without them at any length."""
    weight, hessian = problem(12, length)
    factor = tg.inverse_factor({True: hessian, False: torch.eye(length)}[correlated][None])
    row = 0.3 + torch.rand(12)
    codes = tg.gptq(weight[None], factor, row[None], torch.ones(1, length), tg.Trellis.of(4), 99)[0]
    for w, own, scale in zip(weight, codes.tolist(), row.tolist()):
        assert own == cheapest(w, factor[0], scale)


def test_codes_follow_the_trellis_and_lose_less_at_equal_entropy():
    """At 3 bits the trellis is worth at least a tenth of the damage; its bits are those of codes of known parity."""
    weight, hessian = problem(64, 128)
    factor = tg.inverse_factor(hessian[None])
    column = factor.diagonal(dim1=-2, dim2=-1)
    column = column / column.log().mean().exp()

    def figures(states: int) -> tuple[float, float]:
        """(bits a code, damage) at these scales."""
        trellis = tg.Trellis.of(states)
        row = torch.full((1, 64), 0.4 / trellis.density)
        codes = tg.gptq(weight[None], factor, row, column, trellis, TOP)[0]
        streams, state = tg.to_streams([codes.numpy()], 0, states), tg.TrellisState(64 * 2, states)
        if states > 1:
            assert all(np.array_equal(state.codes(line >> 1), line) for line in streams)
        parity = streams & (trellis.density - 1)
        counts = [np.unique(values, return_counts=True)[1] for values in (streams, parity)]
        entropy = [-(c / c.sum() * np.log2(c / c.sum())).sum() for c in counts]
        return entropy[0] - entropy[1], damage(weight, hessian, codes * row[0, :, None] * column)

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


def stored_as(parameter: str) -> str:
    """From the table of the record."""
    families = {"qo_bank": "attn", "kv_bank": "attn", "tok_emb": "embed"}
    if parameter in families or parameter.startswith("mlp_") and parameter.endswith("bank"):
        return f"gptq:{families.get(parameter, 'mlp')}"
    return {True: "int8", False: "fp16"}[parameter in ("gate.weight", "bigram.table", "bigram.proj")]


@pytest.mark.parametrize("quant, scale", [("sdclip", 1.0), ("waterfill", 0.05)])
def test_every_tensor_is_stored_once_as_its_route_says(quant: str, scale: float, run: tg.Run):
    cfg = tiny(**EVERYTHING, quant=quant, matrix_bits=5, embed_bits=7, attn_clip_sigmas=4, mlp_clip_sigmas=6,
               embed_clip_sigmas=9, trellis_states=4)
    grids = {"gptq:attn": (5, 4), "gptq:mlp": (5, 6), "gptq:embed": (7, 9)}
    model = noisy(cfg)
    with torch.no_grad():
        model.gate.weight[0, 1] = 0
    quantized = quantize(model, cfg, run, scale)
    assert list(quantized) == [name for name, _, _ in model.tensors()]
    assert {q.stored for q in quantized.values()} == {"gptq:attn", "gptq:mlp", "gptq:embed", "int8", "fp16"}
    for name, values, parameter in model.tensors():
        q = quantized[name]
        assert q.stored == stored_as(parameter) and q.codes.shape == values.shape
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
            ratio = step[:, 0] / (sigmas * values.std(-1) / (2 ** (bits - 1) - 1))
            assert not q.columns.any() and (ratio.log2().abs() <= 1 / 16 + 1e-3).all()
            assert torch.equal(q.codes.float(), rounded(values, step, bits))  # the inputs were uncorrelated
        else:  # nothing is clipped; the trellis leaves every second code, and rarely prefers the one after
            assert ((q.dequantize(scale) - values).abs() <= 2.6 * step).all()
            assert ((q.dequantize(scale) - values).abs() <= step).float().mean() > 0.7


@pytest.mark.parametrize("quant, scales", [("sdclip", (0.25, 1.0)), ("waterfill", (0.005, 0.02))])
def test_the_global_scale_multiplies_those_of_gptqs_matrices_alone(quant: str, scales: tuple, run: tg.Run):
    cfg = tiny(quant=quant)
    fine, coarse = (quantize(noisy(cfg), cfg, run, scale) for scale in scales)
    for name, q in fine.items():
        other = coarse[name]
        if q.columns is None:
            assert torch.equal(other.codes, q.codes)
        else:
            assert torch.equal(other.rows, q.rows) and torch.equal(other.columns, q.columns)
            size = [float(t.dequantize(scale).std()) for t, scale in zip((q, other), scales)]
            assert size[0] == pytest.approx(size[1], rel=0.3) and not torch.equal(q.codes, other.codes)


def test_bits_fall_by_one_an_octave_and_can_be_asked_for(run: tg.Run):
    cfg = tiny(model_dim=64)
    model = noisy(cfg)
    quantizer = tg.Quantizer(model, unit_sums(model), cfg, run)
    sizes = [quantizer.bits(2.0 ** octaves) / quantizer.weights for octaves in (-6, -5, -4)]
    assert [a - b for a, b in zip(sizes, sizes[1:])] == pytest.approx([1, 1], abs=0.1)
    for bits in (3.0, 5.0):
        octaves = quantizer.octaves_for(bits * quantizer.weights)
        assert quantizer.bits(2.0 ** octaves) / quantizer.weights == pytest.approx(bits, abs=0.01)


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
    reads = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "up": "up", "down": "down"}
    matrices, used = {name: values for name, values, _ in model.tensors()}, set()
    for name, q in quantized.items():
        if q.stored.startswith("gptq:"):
            key = ("head", 0)
            if name != "tok_emb":
                key = reads[name.split(".")[2]], int(name.split(".")[1])
            used.add(key)
            bits, _ = cfg.grid(q.stored.removeprefix("gptq:"))
            order = hessians[key].diagonal().argsort(descending=True)  # costly columns first
            expected = solve(matrices[name][:, order], hessians[key][order][:, order], tg.scales_of(q.rows, 1.0), bits)
            assert (q.codes[:, order] != expected).float().mean() < 0.01
    assert used == set(hessians)
    for quant in ("sdclip", "waterfill"):
        grams = unit_sums(model).gram
        for key in (("up", 0), ("o", 1)):
            grams[key][2] = grams[key][:, 2] = 0
        quantized = quantize(model, tiny(quant=quant), run, 0.02, grams)
        for name in ("blocks.0.up", "blocks.1.o"):
            codes = quantized[name].codes
            assert not codes[:, 2].any() and codes.any(0).sum() == codes.size(1) - 1


# -- training that sees rounded weights ----------------------------------------------------------------

TERNARY = dict(quant="sdclip", matrix_bits=2, attn_clip_sigmas=1.2, mlp_clip_sigmas=1.3)


@pytest.mark.parametrize("bits", [2, 4])
def test_rounded_training_sees_what_the_artifact_holds_and_moves_what_it_rounds(bits: int):
    """Loss to the bit; the gradient at the rounded weights goes straight through."""
    cfg = tiny(**{**TERNARY, "matrix_bits": bits}, mlp_rank=6)
    model, on_grid, batch = noisy(cfg), noisy(cfg), tg.random_batch(2, cfg)
    tg.snap_banks(on_grid, cfg)
    straight = functools.partial(tg.RoundedWeights, tg.bank_grids(model, cfg))
    results = []
    for of, weights in ((on_grid, tg.Weights), (model, straight)):
        loss = of.total_loss(batch, looped_layers(of), torch.float32, weights)
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in of.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(grad, results[1][1][name]) for name, grad in results[0][1].items())
    assert not torch.equal(results[0][0], model.total_loss(batch, looped_layers(model), torch.float32).detach())
    assert set(tg.bank_grids(model, cfg)) == {name for name, p in model.named_parameters() if name.endswith("bank")}


def test_what_training_rounded_is_stored_as_it_is_and_a_probe_leaves_no_trace(run: tg.Run):
    """Whatever the Hessians: each matrix of a bank has ternary codes at its own scale, and comes back to the bit."""
    cfg = tiny(**TERNARY)
    model, probed = noisy(cfg), noisy(cfg)
    tg.snap_banks(model, cfg)
    with tg.snapped(probed, cfg):
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in probed.state_dict().items())
    assert all(torch.equal(value, noisy(cfg).state_dict()[name]) for name, value in probed.state_dict().items())
    hessians = {key: problem(1, len(h), seed)[1] for seed, (key, h) in enumerate(unit_sums(model).gram.items())}
    quantized = quantize(model, cfg, run, 1.0, hessians)
    matrices = {name: values for name, values, _ in model.tensors() if name.startswith("blocks.")}
    assert set(matrices) == set(model.row_codes)
    for name, values in matrices.items():
        assert torch.equal(quantized[name].dequantize(1.0), values)
        assert set(quantized[name].codes.unique().tolist()) == {-1, 0, 1}


# -- calibration ---------------------------------------------------------------------------------------


def rank_of(rank: int, world: int, run: tg.Run, seen: list[Tensor]) -> SimpleNamespace:
    """One of several ranks; what it would add up goes to `seen`."""
    return SimpleNamespace(rank=rank, world=world, device=run.device, dtype=run.dtype, progress=run.progress,
                           all_reduce=lambda t: seen.append(t.clone()) or t)


def test_sums_are_over_all_calibration_tokens_and_ranks(run: tg.Run, dataset: dict[str, str]):
    """To rounding, Fisher information included: its targets are drawn by row, whoever has the row."""
    cfg = tiny(**dataset, gptq_calibration_batches=3)
    model, data, whole = noisy(cfg), tg.TrainData(cfg, run), []
    sums = tg.calibrate(model, data, 40, cfg, rank_of(0, 1, run, whole))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for world in (2, 5):
        parts: list[list[Tensor]] = [[] for _ in range(world)]
        for rank in range(world):
            tg.calibrate(model, data, 40, cfg, rank_of(rank, world, run, parts[rank]))
        for number, expected in enumerate(whole):
            total = sum(part[number] for part in parts)
            torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert float(sums.gram["head", 0].trace()) == pytest.approx(cfg.model_dim, rel=1e-4)
    for block in range(cfg.num_layers):  # normed inputs, scaled by 1 / sqrt(block + 1), over all layers
        assert float(sums.gram["qkv", block].trace()) == pytest.approx(cfg.model_dim / (block + 1), rel=1e-3)
    later = tg.calibrate(model, data, 48, cfg, run).gram["qkv", 0]  # other rows, other sums
    assert not torch.allclose(sums.gram["qkv", 0], later)
    nothing = tg.calibrate(model, data, 0, cfg, rank_of(60, 64, run, []))  # a rank without rows adds zeros
    assert not any(t.any() for t in (*nothing.gram.values(), *nothing.fisher.values(), nothing.input_gram))


@pytest.mark.parametrize("knobs", [{}, dict(mlp_rank=12, num_kv_heads=2, mlp_mult=1.5)], ids=["whole", "low rank"])
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
