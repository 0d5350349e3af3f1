"""GPTQ against the textbook algorithm in float64; step sizes, edge cases, Hessians, coverage of the model."""
import functools
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
    """Row steps of SDClip."""
    return (sigmas * weight.std(dim=-1) / (2 ** (bits - 1) - 1)).clamp_min(2.0 ** -24)


def solve(weight: Tensor, hessian: Tensor, step: Tensor, bits: int, damp: float = 0.01,
          column: Tensor | None = None) -> Tensor:
    """`gptq` of one matrix by plain rounding along its rows: its codes. Column steps are 1 unless given."""
    column = torch.ones(weight.size(1)) if column is None else column
    return plain(weight[None], tg.factorize(hessian[None], damp), step[None], column[None], 2 ** (bits - 1) - 1)[0]


def plain(weight: Tensor, factor: Tensor, step: Tensor, column: Tensor, top: int) -> Tensor:
    """`gptq` of a stack by plain rounding along its rows."""
    return tg.gptq(weight, factor, None, step, column, tg.Trellis.of(1), top)


def rounded(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """Nearest codes; `step` broadcasts against the weights."""
    top = 2 ** (bits - 1) - 1
    return (weight / step).round().clamp(-top, top)


def textbook(weight: Tensor, hessian: Tensor, step: Tensor, bits: int, damp: float, column: Tensor | None = None
             ) -> np.ndarray:
    """Optimal brain quantization, column by column: the inverse shrinks by one input at a time."""
    w, h, s = (t.double().numpy().copy() for t in (weight, hessian, step))
    b = np.ones(w.shape[1]) if column is None else column.double().numpy()
    dead = np.diag(h) == 0
    h[dead, dead] = np.diag(h)[~dead].mean()
    inverse = np.linalg.inv(h + damp * np.mean(np.diag(h)) * np.eye(len(h)))
    codes, top = np.zeros_like(w), 2 ** (bits - 1) - 1
    left = list(range(len(h)))
    while left:
        j = left.pop(0)
        codes[:, j] = np.clip(np.round(w[:, j] / (s * b[j])), -top, top)
        error = (w[:, j] - codes[:, j] * s * b[j]) / inverse[j, j]
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
    assert found.dtype == torch.int16 and found.abs().max() <= 2 ** (bits - 1) - 1
    assert (found.numpy() != expected).mean() <= 0.002  # a tie may fall to the other side in fp32


@pytest.mark.parametrize("cols", [5, 130])
def test_columns_have_steps_of_their_own(cols: int):
    weight, hessian = problem(8, cols)
    step, column = steps_of(weight, 4), torch.logspace(-0.6, 0.6, cols)[torch.randperm(cols)]
    found = solve(weight, hessian, step, 16, column=column)
    assert (found.numpy() != textbook(weight, hessian, step, 16, 0.01, column)).mean() <= 0.002


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_gptq_beats_rounding_to_nearest(bits: int):
    for seed in range(3):
        weight, hessian = problem(16, 48, seed)
        order = hessian.diagonal().argsort(descending=True)
        weight, hessian = weight[:, order], hessian[order][:, order]
        step = steps_of(weight, bits)
        nearest = rounded(weight, step[:, None], bits)
        best = proxy_loss(weight, hessian, solve(weight, hessian, step, bits), step)
        assert best < 0.7 * proxy_loss(weight, hessian, nearest, step)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_uncorrelated_inputs_are_rounded_to_nearest(scale: float):
    weight, _ = problem(8, 140)
    step = steps_of(weight, 5)
    found = solve(weight, scale * torch.eye(140), step, 5)
    assert torch.equal(found.float(), rounded(weight, step[:, None], 5))


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
    found = plain(weight, tg.factorize(hessian, 0.01), step, torch.ones(4, 33), 7)
    for k in range(4):
        assert torch.equal(found[k], solve(weight[k], hessian[k], step[k], 4))
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, hessian, step)))


def test_a_matrix_that_needs_more_damping_leaves_the_others_of_its_stack_alone():
    """Which matrices share a stack depends on the number of ranks; the codes may not."""
    (weight, good), bad = problem(6, 33), torch.full((33, 33), 3.0)
    step = steps_of(weight, 4)
    factor = tg.factorize(torch.stack([good, bad]), 1e-9)
    found = plain(torch.stack([weight, weight]), factor, torch.stack([step, step]), torch.ones(2, 33), 7)
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
    assert codes.abs().max() <= 7 and not codes[0].any()
    assert torch.equal(codes[:, dead].float(), rounded(weight, step[:, None], 4)[:, dead])
    assert codes[2, 4] == 7 and codes[4].any()


def test_inputs_that_were_never_seen_do_not_disturb_the_others():
    weight, hessian = problem(6, 30)
    dead = torch.arange(30) % 4 == 1
    hessian[dead], hessian[:, dead] = 0, 0
    step = steps_of(weight, 5)
    codes = solve(weight, hessian, step, 5, damp=1e-6)
    alone = solve(weight[:, ~dead], hessian[~dead][:, ~dead], step, 5, damp=1e-6)
    assert torch.equal(codes[:, ~dead], alone)


def test_damping_rises_with_a_logged_event_until_a_singular_hessian_factorises():
    weight, hessian = problem(6, 40, rank=1)
    step, events = steps_of(weight, 4), []
    factor = tg.factorize(hessian[None], 1e-12, lambda name, **values: events.append((name, values)))
    codes = plain(weight[None], factor, step[None], torch.ones(1, 40), 7)
    assert len(events) >= 1 and {name for name, _ in events} == {"gptq_damping"}
    assert [values["next"] for _, values in events] == [10 * values["damp"] for _, values in events]
    assert codes.abs().max() <= 7
    nearest = rounded(weight, step[:, None], 4)
    assert proxy_loss(weight, hessian, codes[0], step) < proxy_loss(weight, hessian, nearest, step)


@pytest.mark.parametrize("seed", [1, 3, 5])
def test_damping_on_the_verge_of_singularity_still_beats_rounding(seed: int):
    """Also where the Hessian factorises and its inverse does not."""
    weight, hessian = problem(6, 20, seed, rank=1)
    step = steps_of(weight, 4)
    nearest = proxy_loss(weight, hessian, rounded(weight, step[:, None], 4), step)
    for tenth in range(-100, -50):
        codes = solve(weight, hessian, step, 4, damp=10 ** (tenth / 10))
        assert proxy_loss(weight, hessian, codes, step) < 0.5 * nearest


def test_a_broken_hessian_is_one_clear_line():
    weight, hessian = problem(3, 9)
    with pytest.raises(tg.UserError, match="positive definite") as error:
        solve(weight, torch.full_like(hessian, torch.nan), steps_of(weight, 4), 4)
    assert "\n" not in str(error.value)


# -- steps ---------------------------------------------------------------------------------------------


def test_step_codes_are_eighths_of_an_octave_on_every_machine():
    every = torch.arange(-128, 128).to(torch.int8)
    steps = tg.row_steps(every, 1.0)
    assert [steps[i].item() for i in (0, 192, 200, 255)] == pytest.approx([2 ** -24, 1, 2, 2 ** (63 / 8)], rel=1e-7)
    assert torch.equal(tg.step_codes(steps, tg.ROW_OFFSET), every) and torch.equal(tg.row_steps(every, 3.0), 3 * steps)
    assert torch.equal(tg.step_codes(tg.column_steps(every), 0), every)
    some = torch.logspace(-6, 1, 400)
    nearest, above = (tg.row_steps(tg.step_codes(some, tg.ROW_OFFSET, up), 1.0) for up in (False, True))
    assert ((nearest / some).log2().abs() <= 1 / 16 + 1e-6).all()
    assert ((above / some).log2() >= -1e-6).all() and ((above / some).log2() <= 1 / 8 + 1e-6).all()
    assert (tg.row_steps(tg.step_codes(torch.zeros(3), tg.ROW_OFFSET), 1.0) > 0).all()


@pytest.mark.parametrize("softness", [0.0, 0.7, 1.0])
def test_steps_fill_every_matrix_to_the_same_level(softness: float):
    """The mean cost of a step squared is 1 in each; with full exponents it is 1 in every entry."""
    torch.manual_seed(0)
    cost, scale = torch.rand(3, 50).exp() * torch.tensor([[1.0], [1e4], [1e-3]]), torch.rand(3, 20) + 0.1
    row, column = tg.waterfill_steps(cost, scale, softness)
    damped = cost + 0.01 * cost.mean(-1, keepdim=True)
    level = damped[:, :, None] * (row[:, :, None] * column[:, None, :] / scale[:, None, :]) ** 2
    torch.testing.assert_close(level.mean((1, 2)), torch.ones(3), rtol=1e-4, atol=0)
    assert (level.std((1, 2)) < 1e-4).all() == (softness == 1.0)
    assert torch.equal(row[0].argsort(), (-cost[0]).argsort()) or softness == 0


def test_the_diagonal_of_the_factor_is_what_a_columns_error_costs():
    """Compensated by all later columns, an error e in column c loses (e / scale_c)^2."""
    weight, hessian = problem(1, 12)
    scales, h = tg.factorize(hessian[None], 1e-9)[0].diagonal(), hessian.double().numpy()
    for j in (0, 5, 11):
        shift = np.zeros(12)
        shift[j] = 1.0
        if j < 11:
            shift[j + 1:] = -np.linalg.solve(h[j + 1:, j + 1:], h[j + 1:, j])
        assert shift @ h @ shift == pytest.approx(float(scales[j]) ** -2, rel=1e-3)


# -- errors along the rows, and the trellis ------------------------------------------------------------


@pytest.mark.parametrize("rows, cols", [(18, 20), (33, 9), (5, 17), (1, 12), (16, 8)])
def test_two_sided_gptq_is_gptq_of_the_whole_matrix_as_one_row(rows: int, cols: int, monkeypatch: pytest.MonkeyPatch):
    """The Hessian of all entries is the Kronecker product of both; the reference knows nothing of blocks or waves."""
    monkeypatch.setattr(tg, "SEGMENT", 8)
    weight, hessian = problem(rows, cols)
    fisher = problem(1, rows, seed=7)[1]
    step, column = steps_of(weight, 4) if cols > 1 else torch.ones(rows), torch.logspace(-0.3, 0.3, cols)
    damped = [h + 0.01 * h.diagonal().mean() * torch.eye(len(h)) for h in (fisher, hessian)]
    found = tg.gptq(weight[None], tg.factorize(hessian[None], 0.01), tg.factorize(fisher[None], 0.01), step[None],
                    column[None], tg.Trellis.of(1), 2 ** 15 - 4)[0]
    grid = (step[:, None] * column).flatten()
    expected = textbook(weight.flatten()[None], torch.kron(*damped), torch.ones(1), 16, 0.0, grid)
    assert (found.flatten().numpy() != expected[0]).mean() <= 0.01


def test_rows_of_equal_weight_that_share_nothing_are_rounded_alone():
    weight, hessian = problem(40, 70)
    step, column, factor = steps_of(weight, 4), torch.ones(1, 70), tg.factorize(hessian[None], 0.01)
    for states in (1, 8):
        both, alone = (tg.gptq(weight[None], factor, outputs, step[None], column, tg.Trellis.of(states), 2 ** 15 - 4)
                       for outputs in (torch.eye(40)[None], None))
        assert (both != alone).float().mean() < 0.002


def paths(states: int, length: int) -> list[list[tuple[int, int]]]:
    """Every way through the trellis from state 0: (parity, next bit) of each code; from the octal parity checks."""
    first, second = {4: (0o5, 0o2), 8: (0o13, 0o4)}[states]
    found: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]
    for _ in range(length):
        found = [((state >> 1) ^ (state & 1) * (first >> 1) ^ bit * (second >> 1), [*path, (state & 1, bit)])
                 for state, path in found for bit in (0, 1)]
    return [path for _, path in found]


def cheapest(weight: Tensor, upper: Tensor, lattice: Tensor, states: int) -> tuple[float, list[int]]:
    """(cost, codes) of the best path for one row, each path tried with its errors fed forward, in float64."""
    best: tuple[float, list[int]] = (np.inf, [])
    u, d = upper.double().numpy(), lattice.double().numpy()
    for path in paths(states, len(weight)):
        w, cost, codes = weight.double().numpy().copy(), 0.0, []
        for j, (parity, bit) in enumerate(path):
            coset = 2 * bit + parity
            codes.append(int(coset + 4 * np.round((w[j] / d[j] - coset) / 4)))
            error = (w[j] - codes[-1] * d[j]) / u[j, j]
            w[j:] -= error * u[j, j:]
            cost += error ** 2
        best = min(best, (cost, codes))
    return best


@pytest.mark.parametrize("states, length, correlated", [(4, 2, True), (8, 3, True), (4, 9, False), (8, 9, False)])
def test_the_path_through_the_trellis_is_the_cheapest(states: int, length: int, correlated: bool):
    """With errors fed forward as long as every path survives; without them at any length."""
    weight, hessian = problem(12, length)
    factor = tg.factorize(hessian[None] if correlated else torch.eye(length)[None], 0.01)
    step = 0.3 + torch.rand(12)
    found = tg.gptq(weight[None], factor, None, step[None], torch.ones(1, length), tg.Trellis.of(states), 99)[0]
    for w, codes, s in zip(weight, found.tolist(), step):
        assert codes == cheapest(w, factor[0], s * torch.ones(length), states)[1]


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("states", [4, 8])
def test_codes_follow_the_trellis_and_lose_less_at_equal_entropy(states: int, two_sided: bool):
    """At 3 bits the trellis is worth at least a tenth of the damage; its bits are those of codes of known parity."""
    weight, hessian = problem(64, 128)
    fisher = problem(1, 64, seed=3)[1]
    factor, outputs = tg.factorize(hessian[None], 0.01), tg.factorize(fisher[None], 0.01) if two_sided else None
    column = factor.diagonal(dim1=-2, dim2=-1)
    column = column / column.log().mean().exp()
    row = torch.ones(1, 64) if outputs is None else outputs.diagonal(dim1=-2, dim2=-1)
    row = row / row.log().mean().exp() * 0.4

    def figures(trellis: tg.Trellis) -> tuple[float, float]:
        """(bits a code, damage) at these steps."""
        codes = tg.gptq(weight[None], factor, outputs, row / trellis.density, column, trellis, 2 ** 15 - 4)[0]
        error = (weight - codes * row[0, :, None] / trellis.density * column).double()
        g = fisher.double() if two_sided else torch.eye(64, dtype=torch.float64)
        walk = tg.Walk(128, trellis.states)
        lanes = tg.to_lanes([codes.numpy()], 0, trellis.states)
        symbols = tg.symbols_of(lanes, trellis.states)
        if trellis.states > 1:
            assert all(np.array_equal(walk.codes(line), real) for line, real in zip(symbols, lanes))
        parity = lanes & (trellis.density - 1)
        counts = [np.unique(values, return_counts=True)[1] for values in (2 * symbols + parity, parity)]
        entropy = [-(c / c.sum() * np.log2(c / c.sum())).sum() for c in counts]
        return entropy[0] - entropy[1], float(torch.einsum("rs,rc,cd,sd->", g, error, hessian.double(), error))

    (bits, damage), (less_bits, less_damage) = figures(tg.Trellis.of(1)), figures(tg.Trellis.of(states))
    assert less_damage * 4 ** (less_bits - bits) < 0.9 * damage


# -- the whole model -----------------------------------------------------------------------------------


def unit_sums(model: tg.GPT, grams: dict[tuple[str, int], Tensor] | None = None) -> tg.Calibration:
    """What uncorrelated inputs and outputs of equal importance would give."""
    matrices = tg.Weights(model, torch.float32).matrices
    dim = model.cfg.model_dim
    return tg.Calibration(grams or {key: torch.eye(m.size(1)) for key, m in matrices.items()},
                          {key: torch.ones(m.size(0)) if key[0] == "head" else torch.eye(m.size(0))
                           for key, m in matrices.items()},
                          torch.zeros(dim, dim), torch.zeros(model.cfg.vocab_size))


def stored_as(parameter: str) -> str:
    """From the table of the record."""
    families = {"qo_bank": "attn", "kv_bank": "attn", "mlp_up_bank": "mlp", "mlp_down_bank": "mlp", "tok_emb": "embed",
                "mlp_up_in_bank": "mlp", "mlp_down_in_bank": "mlp"}
    if parameter in families:
        return f"gptq:{families[parameter]}"
    return "int8" if parameter in ("gate.weight", "bigram.table", "bigram.proj") else "fp16"


@pytest.mark.parametrize("quant, unit", [("sdclip", 1.0), ("waterfill", 0.05)])
def test_every_tensor_is_stored_once_as_its_route_says(quant: str, unit: float, run: tg.Run):
    cfg = tiny(**EVERYTHING, quant=quant, matrix_bits=5, embed_bits=7, attn_clip_sigmas=4, mlp_clip_sigmas=6,
               embed_clip_sigmas=9, trellis_states=8, gptq_two_sided=True)
    grids = {"gptq:attn": (5, 4), "gptq:mlp": (5, 6), "gptq:embed": (7, 9)}
    model = noisy(cfg)
    with torch.no_grad():
        model.gate.weight[0, 1] = 0
    found = tg.Quantizer(model, unit_sums(model), cfg, run).quantize(unit)
    assert list(found) == [name for name, _, _ in model.tensors()]
    for name, values, parameter in model.tensors():
        q = found[name]
        assert q.stored == stored_as(parameter) and q.codes.shape == values.shape
        if q.stored == "fp16":
            assert q.rows is None and torch.equal(q.dequantize(unit), values.half().float())
            continue
        assert q.codes.dtype == torch.int16 and q.rows.dtype == torch.int8 and q.rows.shape == values.shape[:-1]
        step = tg.row_steps(q.rows, 1.0 if q.stored == "int8" else unit)[..., None]
        if q.stored == "int8":
            assert q.columns is None and torch.equal(q.dequantize(unit), q.codes.float() * step)
            top = q.codes.abs().amax(-1)[values.abs().amax(-1) > 0]
            assert (top <= 127).all() and (top >= 116).all() and not q.codes[values.abs().amax(-1) == 0].any()
            assert ((q.dequantize(unit) - values).abs() <= 0.51 * step).all()
            continue
        assert q.columns.shape == values.shape[-1:]
        step = step * tg.column_steps(q.columns)
        torch.testing.assert_close(q.dequantize(unit), q.codes.float() * step)
        if quant == "sdclip":
            bits, sigmas = grids[q.stored]
            ratio = step[:, 0] / (sigmas * values.std(-1) / (2 ** (bits - 1) - 1))
            assert not q.columns.any() and (ratio.log2().abs() <= 1 / 16 + 1e-3).all()
            assert torch.equal(q.codes.float(), rounded(values, step, bits))  # the inputs were uncorrelated
        else:  # nothing is clipped; the trellis leaves every second code, and rarely prefers the one after
            assert ((q.dequantize(unit) - values).abs() <= 2.6 * step).all()
            assert ((q.dequantize(unit) - values).abs() <= step).float().mean() > 0.7
    assert {q.stored for q in found.values()} == {"gptq:attn", "gptq:mlp", "gptq:embed", "int8", "fp16"}


@pytest.mark.parametrize("quant, units", [("sdclip", (0.25, 1.0)), ("waterfill", (0.005, 0.02))])
def test_the_unit_multiplies_the_steps_of_gptqs_matrices_alone(quant: str, units: tuple[float, float], run: tg.Run):
    cfg = tiny(quant=quant)
    model = noisy(cfg)
    quantizer = tg.Quantizer(model, unit_sums(model), cfg, run)
    fine, coarse = (quantizer.quantize(unit) for unit in units)
    for name, q in fine.items():
        if q.columns is None:
            assert torch.equal(coarse[name].codes, q.codes)
        else:
            assert torch.equal(coarse[name].rows, q.rows) and torch.equal(coarse[name].columns, q.columns)
            size = (float(t.dequantize(unit).std()) for t, unit in zip((q, coarse[name]), units))
            assert next(size) == pytest.approx(next(size), rel=0.3) and not torch.equal(q.codes, coarse[name].codes)


def test_bits_fall_by_one_an_octave_of_the_unit(run: tg.Run):
    cfg = tiny(model_dim=64)
    model = noisy(cfg)
    quantizer = tg.Quantizer(model, unit_sums(model), cfg, run)
    sizes = [quantizer.bits(2.0 ** octaves) / quantizer.weights for octaves in (-6, -5, -4)]
    assert [a - b for a, b in zip(sizes, sizes[1:])] == pytest.approx([1, 1], abs=0.1)


def test_mixed_bits_go_by_the_trace_of_the_hessian(run: tg.Run):
    """#1260: the matrices of the largest trace keep MATRIX_BITS, the others get one less; the embedding has its own."""
    cfg = tiny(quant="sdclip", matrix_bits=6, embed_bits=7, n_int6_layers=5, attn_clip_sigmas=1, mlp_clip_sigmas=1,
               embed_clip_sigmas=1)
    model = noisy(cfg)
    grams = {key: (1 + 10 * (key in (("up", 1), ("qkv", 2), ("o", 0)))) * gram for key, gram in
             unit_sums(model).gram.items()}
    found = tg.Quantizer(model, unit_sums(model, grams), cfg, run).quantize(1.0)
    largest = {name: int(q.codes.abs().max()) for name, q in found.items() if q.stored.startswith("gptq:")}
    kept = {"blocks.1.up", "blocks.2.q", "blocks.2.k", "blocks.2.v", "blocks.0.o"}
    assert largest == {name: 63 if name == "tok_emb" else 31 if name in kept else 15 for name in largest}


@pytest.mark.parametrize("quant", ["sdclip", "waterfill"])
def test_inputs_that_were_never_seen_get_codes_of_zero(quant: str, run: tg.Run):
    cfg = tiny(quant=quant, trellis_states=1)
    model = noisy(cfg)
    grams = unit_sums(model).gram
    for key in (("up", 0), ("o", 1)):
        grams[key][2] = grams[key][:, 2] = 0
    found = tg.Quantizer(model, unit_sums(model, grams), cfg, run).quantize(0.02)
    for name in ("blocks.0.up", "blocks.1.o"):
        assert not found[name].codes[:, 2].any() and found[name].codes.any(0).sum() == found[name].codes.size(1) - 1


def test_each_matrix_is_rounded_for_the_inputs_it_reads(run: tg.Run):
    """Every stored matrix finds the Hessian of its own product, and of no other."""
    cfg = tiny(quant="sdclip")
    model = noisy(cfg)
    hessians = {key: problem(1, len(h), seed)[1] for seed, (key, h) in enumerate(unit_sums(model).gram.items())}
    found = tg.Quantizer(model, unit_sums(model, hessians), cfg, run).quantize(1.0)
    reads = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "up": "up", "down": "down"}
    matrices, used = {name: values for name, values, _ in model.tensors()}, set()
    for name, q in found.items():
        if q.stored.startswith("gptq:"):
            key = ("head", 0) if name == "tok_emb" else (reads[name.split(".")[2]], int(name.split(".")[1]))
            assert tg.hessian_key(name) == key
            used.add(key)
            bits, _ = cfg.grid(q.stored.removeprefix("gptq:"))
            if name == "tok_emb":  # its Hessian is normed: both uses are mixed
                hessians[key] = hessians[key] / hessians[key].trace()
            order = hessians[key].diagonal().argsort(descending=True)  # costly columns first
            expected = solve(matrices[name][:, order], hessians[key][order][:, order], tg.row_steps(q.rows, 1.0), bits,
                             cfg.gptq_damp)
            assert (q.codes[:, order] != expected).float().mean() < 0.01
    assert used == set(hessians)


TERNARY = dict(quant="sdclip", matrix_bits=2, attn_clip_sigmas=1.2, mlp_clip_sigmas=1.3)


@pytest.mark.parametrize("bits", [2, 4])
def test_rounded_training_sees_what_the_artifact_holds_and_moves_what_it_rounds(bits: int):
    """Loss to the bit; the gradient at the rounded weights goes straight through; one graph without a break."""
    cfg = tiny(**{**TERNARY, "matrix_bits": bits}, mlp_rank=6)
    model, settled, plan = noisy(cfg), noisy(cfg), tg.layer_plan(cfg, True)
    tg.settle(settled, cfg)
    batch = tg.random_batch(2, cfg)
    rounded = functools.partial(tg.RoundedWeights, tg.bank_grids(model, cfg))
    results = []
    for of, weights in ((settled, tg.Weights), (model, rounded)):
        loss = torch.compile(lambda of=of, weights=weights: of.total_loss(batch, plan, torch.float32, weights),
                             backend="eager", fullgraph=True, dynamic=False)()
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in of.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(grad, results[1][1][name]) for name, grad in results[0][1].items())
    assert not torch.equal(results[0][0], model.total_loss(batch, plan, torch.float32).detach())
    assert set(tg.bank_grids(model, cfg)) == {name for name, p in model.named_parameters() if name.endswith("bank")}


def test_a_probe_sees_the_rounded_weights_and_leaves_none():
    cfg = tiny(**TERNARY)
    model, settled, before = noisy(cfg), noisy(cfg), noisy(cfg).state_dict()
    tg.settle(settled, cfg)
    with tg.settled(model, cfg):
        assert all(torch.equal(value, settled.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_training_rounded_is_stored_as_it_is(run: tg.Run):
    """Whatever the Hessians: each matrix of a bank has ternary codes at its own step, and comes back to the bit."""
    cfg = tiny(**TERNARY)
    model = noisy(cfg)
    tg.settle(model, cfg)
    hessians = {key: problem(1, len(h), seed)[1] for seed, (key, h) in enumerate(unit_sums(model).gram.items())}
    found = tg.Quantizer(model, unit_sums(model, hessians), cfg, run).quantize(1.0)
    matrices = {name: values for name, values, _ in model.tensors() if name.startswith("blocks.")}
    assert set(matrices) == set(model.lattice)
    for name, values in matrices.items():
        assert torch.equal(found[name].dequantize(1.0), values)
        assert set(found[name].codes.unique().tolist()) == {-1, 0, 1}


def rank_of(rank: int, world: int, run: tg.Run, seen: list[Tensor]) -> SimpleNamespace:
    """One of several ranks; what it would add up goes to `seen`."""
    return SimpleNamespace(rank=rank, world=world, device=run.device, dtype=run.dtype, progress=run.progress,
                           total=lambda t: seen.append(t.clone()) or t)


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
            found = sum(part[number] for part in parts)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert float(sums.gram["head", 0].trace()) == pytest.approx(cfg.model_dim, rel=1e-4)
    for block in range(cfg.num_layers):  # normed inputs, scaled by 1 / sqrt(block + 1), over all visits
        assert float(sums.gram["qkv", block].trace()) == pytest.approx(cfg.model_dim / (block + 1), rel=1e-3)


def test_costs_foresee_how_far_the_distribution_moves(run: tg.Run, dataset: dict[str, str]):
    """KL of noise in one stored matrix, against half its Fisher cost: the same to a factor of two, for every kind.

    This holds channel scales, visits, the split of q, k and v, and both uses of the embedding together.
    """
    cfg = tiny(**dataset, gptq_calibration_batches=12, logit_softcap=8)
    model, data = noisy(cfg, scale=0.1), tg.TrainData(cfg, run)
    with torch.no_grad():  # far from 1, so that a forgotten scale shows
        model.attn_scale.mul_(3)
        model.mlp_scale.mul_(0.3)
    quantizer = tg.Quantizer(model, tg.calibrate(model, data, 0, cfg, run), cfg, run)
    batch = tg.make_batch([data.row(i) for i in range(48)], 48, cfg.train_seq_len)

    @torch.no_grad()
    def distribution() -> Tensor:
        w = tg.Weights(model, torch.float32)
        logits = w.linear("head", None, model.hidden(batch, tg.layer_plan(cfg, looped=True), w).flatten(0, 1))
        return (8 * torch.tanh(logits.double() / 8)).log_softmax(-1)

    before = distribution()
    for name, values, _ in model.tensors():
        if name == "tok_emb" or name.startswith("blocks.1."):
            gram, fisher = quantizer._cost(name)
            fisher = fisher.diag() if fisher.dim() == 1 else fisher
            noise = 0.003 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
            values.add_(noise)
            moved = float((before.exp() * (before - distribution())).sum())
            values.sub_(noise)
            foreseen = 0.5 * float(torch.einsum("rs,rc,cd,sd->", fisher, noise, gram, noise))
            assert 0.5 < foreseen / moved < 2, (name, foreseen, moved)


def test_every_stored_matrix_has_a_hessian_of_its_width(run: tg.Run, dataset: dict[str, str]):
    cfg = tiny(**dataset, **EVERYTHING, num_kv_heads=2, mlp_mult=1.5)
    model = noisy(cfg)
    hessians = tg.calibrate(model, tg.TrainData(cfg, run), 0, cfg, run).gram
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
    first, later = (tg.calibrate(model, data, row, cfg, run).gram["qkv", 0] for row in (0, 8))
    assert not torch.allclose(first, later)
    nothing = tg.calibrate(model, data, 0, cfg, rank_of(60, 64, run, []))
    assert not any(t.any() for sums in nothing[:2] for t in sums.values()) and not nothing.input_gram.any()
