"""Every kernel, references and fast twins alike, against float64 formulas written from their definitions."""
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import batch_of, tiny
from torch import Tensor

import train_gpt as tg

BOS = tg.BOS_ID
ROWS = [[BOS, 9, 8, 7, BOS, BOS, 6, 5, 4, 3, 2, 9], [5, 6, BOS, 7, 8, 9, 2]]
"""Row 0 is full; row 1 continues a document, starts another and ends early; a third row is only padding."""
PIECES = [(0, 0, 4), (0, 4, 5), (0, 5, 11), (1, 0, 2), (1, 2, 6), (1, 6, 11), (2, 0, 11)]
"""(row, begin, end) of each piece, read off ROWS by hand."""
HEADS = [(1, 1), (4, 2), (6, 2), (3, 3), (4, 1)]
TWINS = {"rms_norm": [tg.rms_norm, tg.eager_rms_norm],
         "leaky_relu_squared": [tg.leaky_relu_squared, tg.EagerLeakyReluSquared.apply],
         "cross_entropy": [tg.softcapped_cross_entropy, tg.EagerCrossEntropy.apply]}
"""The reference and its twin."""
KINDS = ["reference", "twin"]


def packed_rows() -> tg.Batch:
    return tg.make_batch([np.array(row, dtype=np.uint16) for row in ROWS], 3, 11)


def qkv(heads: int, kv_heads: int, width: int = 6) -> list[Tensor]:
    torch.manual_seed(heads * 10 + kv_heads)
    shapes = [(3, 11, n, width) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def naive_attention(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """Causal softmax attention, one query of one head at a time."""
    out = torch.zeros_like(q)
    shared = q.size(2) // k.size(2)
    for row, begin, end in PIECES:
        for t in range(begin, end):
            for head in range(q.size(2)):
                first = max(begin, t + 1 - (window or t + 1))
                keys, values = (x[row, first:t + 1, head // shared] for x in (k, v))
                weights = (keys @ q[row, t, head] / math.sqrt(q.size(3))).exp()
                out[row, t, head] = weights @ values / weights.sum()
    return out


def naive_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, before: int) -> Tensor:
    """What a variable-length kernel computes, from the piece starts alone."""
    shared, out = q.size(1) // k.size(1), torch.zeros_like(q)
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        assert 0 <= end - begin <= longest
        scores = torch.einsum("qnh,knh->nqk", q[begin:end], k[begin:end].repeat_interleave(shared, dim=1))
        square = torch.ones(end - begin, end - begin, dtype=torch.bool)
        hidden = square.triu(1) | (square.tril(-before - 1) if before >= 0 else ~square)
        weights = (scores / math.sqrt(q.size(2))).masked_fill(hidden, -math.inf).softmax(-1)
        out[begin:end] = torch.einsum("nqk,knh->qnh", weights, v[begin:end].repeat_interleave(shared, dim=1))
    return out


@pytest.mark.parametrize("name", ["sdpa", "dense", "flat"])
@pytest.mark.parametrize("window", [0, 1, 3, 99])
@pytest.mark.parametrize("heads,kv_heads", HEADS)
def test_attention_and_its_gradient_equal_a_loop_over_pieces(heads: int, kv_heads: int, window: int, name: str):
    kernel = tg.flat_attention("flat", naive_varlen) if name == "flat" else tg.ATTENTIONS[name]()
    inputs = qkv(heads, kv_heads)
    found = kernel.run(*inputs, kernel.prepare(packed_rows()), window)
    expected = naive_attention(*inputs, window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), inputs),
                    torch.autograd.grad((expected * weight).sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads,kv_heads", HEADS)
def test_piece_starts_and_positions_describe_the_same_pieces(heads: int, kv_heads: int):
    """A variable-length kernel sees cu_seqlens, the reference sees positions."""
    batch, inputs = packed_rows(), qkv(heads, kv_heads)
    flat, reference = tg.flat_attention("naive", naive_varlen), tg.sdpa_attention()
    torch.testing.assert_close(flat.run(*inputs, flat.prepare(batch)), reference.run(*inputs, reference.prepare(batch)),
                               rtol=0, atol=1e-12)


def test_dense_attention_scores_like_the_reference():
    """Without a gradient to take it is the reference, bit for bit."""
    dense, reference = tg.dense_attention(), tg.sdpa_attention()
    with torch.no_grad():
        inputs = [t.detach() for t in qkv(4, 2)]
        mask = reference.prepare(packed_rows())
        assert torch.equal(dense.prepare(packed_rows()), mask)
        assert torch.equal(dense.run(*inputs, mask), reference.run(*inputs, mask))


def test_attention_of_one_token_is_its_value():
    kernel, inputs = tg.sdpa_attention(), qkv(2, 1)
    found = kernel.run(*inputs, kernel.prepare(batch_of(np.full((3, 12), BOS))))
    torch.testing.assert_close(found, inputs[2].expand(-1, -1, 2, -1), rtol=0, atol=1e-12)


def fake_flash(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, before: int | None) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp [heads, M]) as FlashAttention returns them; only the output is meant to be right."""
    y = naive_varlen(q, k, v, cu, 10**6, -1 if before is None else before)
    return y, torch.full((q.size(1), q.size(0)), 0.5, dtype=torch.float32)


@pytest.fixture
def flash_packages(monkeypatch: pytest.MonkeyPatch):
    """Packages with the functions that FlashAttention 2, 3 and 4 have, with their parameters, in plain PyTorch."""
    def two(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), deterministic=False):
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        assert causal and cu_seqlens_q is cu_seqlens_k and window_size[1] == (0 if window_size[0] >= 0 else -1)
        return fake_flash(q, k, v, cu_seqlens_q, window_size[0])[0]

    def three(*args, **kwargs):
        return two(*args, **kwargs), None

    def forward(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False,
                window_size_left=None, window_size_right=None, return_lse=False):
        assert causal and return_lse and cu_seqlens_q is not None and cu_seqlens_k is not None
        return *fake_flash(q, k, v, cu_seqlens_q, window_size_left), None, None

    def backward(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
                 cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False):
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        assert causal and max_seqlen_q == max_seqlen_k == 11 and bool((lse == 0.5).all())
        assert torch.equal(out, fake_flash(q, k, v, cu_seqlens_q, window_size_left)[0])

        def differentiated() -> tuple[Tensor, ...]:
            inputs = [t.detach().requires_grad_() for t in (q, k, v)]
            return torch.autograd.grad(fake_flash(*inputs, cu_seqlens_q, window_size_left)[0], inputs, dout)

        with ThreadPoolExecutor(1) as pool:  # inside an operator a thread has no autograd; a new one has
            return pool.submit(differentiated).result()

    packages = {"flash_attn": dict(flash_attn_varlen_func=two), "flash_attn.cute": {},
                "flash_attn_interface": dict(flash_attn_varlen_func=three),
                "flash_attn.cute.interface": dict(_flash_attn_fwd=forward, _flash_attn_bwd=backward)}
    for name, functions in packages.items():
        module = ModuleType(name)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    tg.fa4_attention.cache_clear()
    yield
    tg.fa4_attention.cache_clear()


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4"])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attention_is_called_as_it_wants_to_be(name: str, window: int, deterministic: bool, flash_packages,
                                                     request: pytest.FixtureRequest):
    """Causal, with the pieces' starts, the window, and the gradient: by the packages' own parameters and results."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(deterministic)
    kernel, inputs = tg.ATTENTIONS[name](), qkv(4, 2)
    found, expected = kernel.run(*inputs, kernel.prepare(packed_rows()), window), naive_attention(*inputs, window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), inputs),
                    torch.autograd.grad((expected * weight).sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_flash_attention_4_is_part_of_one_graph(flash_packages):
    kernel, inputs = tg.fa4_attention(), [t.detach().float().requires_grad_() for t in qkv(4, 2)]
    pieces = kernel.prepare(packed_rows())
    compiled = torch.compile(lambda *t: kernel.run(*t, pieces, 3).square().sum(), backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs),
                    torch.autograd.grad(naive_attention(*inputs, 3).square().sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("generation,expected", [(8, "fa2"), (9, "fa3"), (10, "fa4")])
def test_a_gpu_takes_the_newest_flash_attention_that_runs_on_it(generation, expected, flash_packages, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    assert tg.pick_attention("auto", torch.device("cuda"), torch.bfloat16, 2048).name == expected


@pytest.mark.parametrize("wanted", ["varlen", "fa2", "fa3", "fa4"])
def test_a_kernel_that_a_cpu_lacks_is_one_clear_line(wanted: str):
    with pytest.raises(tg.UserError) as error:
        tg.pick_attention(wanted, torch.device("cpu"), torch.bfloat16, 64)
    assert f"ATTENTION={wanted}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("wanted,dtype,seq_len,expected", [
    ("auto", torch.float32, 64, "sdpa"), ("auto", torch.bfloat16, 64, "dense"), ("auto", torch.bfloat16, 2048, "sdpa"),
    ("sdpa", torch.bfloat16, 64, "sdpa"), ("dense", torch.float32, 2048, "dense")])
def test_a_cpu_takes_a_kernel_that_it_has(wanted: str, dtype: torch.dtype, seq_len: int, expected: str):
    assert tg.pick_attention(wanted, torch.device("cpu"), dtype, seq_len).name == expected


def test_eager_runs_take_the_twins_and_compiled_ones_the_references():
    eager, compiled = (SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, compiles=compiles,
                                        is_cuda=False)
                       for compiles in (False, True))
    kernels = tg.pick_kernels(tiny(), eager)
    assert [getattr(kernels, name) for name in TWINS] == [pair[1] for pair in TWINS.values()]
    for references in (tg.pick_kernels(tiny(), compiled), tg.pick_kernels(tiny(logit_softcap=41), eager)):
        assert [getattr(references, name) for name in TWINS] == [pair[0] for pair in TWINS.values()]


@pytest.mark.parametrize("gain", [1.0, 0.3, "per head"])
@pytest.mark.parametrize("kind", KINDS)
def test_rms_norm_and_its_gradients_equal_the_formula(kind: str, gain: float | str):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 8) * torch.logspace(-3, 3, 5)[:, None, None]
    x[0, 0] = 0
    inputs = [x.requires_grad_()] + ([torch.randn(4, 1, requires_grad=True)] if gain == "per head" else [])
    found = TWINS["rms_norm"][KINDS.index(kind)](x, *(inputs[1:] or [gain]))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = exact[0] / (exact[0].square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() \
        * (exact[1] if gain == "per head" else gain)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(x)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), inputs),
                    torch.autograd.grad((expected * weight).sum(), exact)):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("slope", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_leaky_relu_squared_has_the_stated_value_and_derivative(kind: str, slope: float):
    x = torch.tensor([-3.0, -0.5, 0.25, 2.0], dtype=torch.float64, requires_grad=True)
    y = TWINS["leaky_relu_squared"][KINDS.index(kind)](x, slope)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y.tolist(), [9 * slope**2, 0.25 * slope**2, 0.0625, 4.0])
    torch.testing.assert_close(grad.tolist(), [-6 * slope**2, -slope**2, 0.5, 4.0])


@pytest.mark.parametrize("chunk", [1, 64, 1 << 17])
@pytest.mark.parametrize("cap", [5.0, 30.0, 40.0])
@pytest.mark.parametrize("kind", KINDS)
def test_softcapped_cross_entropy_and_its_gradient_equal_the_formula(
        kind: str, cap: float, chunk: int, monkeypatch: pytest.MonkeyPatch):
    """Among the rows: one with huge logits, one without a target, one whose target is as unlikely as can be."""
    monkeypatch.setattr(tg.EagerCrossEntropy, "CHUNK", chunk)
    torch.manual_seed(0)
    logits, targets = 20 * torch.randn(7, 30), torch.randint(30, (7,))
    logits[3] *= 1e4
    logits[4, :], logits[4, targets[4]] = 1e3, -1e3
    targets[[2, 5]] = tg.IGNORE
    logits.requires_grad_()
    exact, scored = logits.detach().double().requires_grad_(), targets != tg.IGNORE
    found = TWINS["cross_entropy"][KINDS.index(kind)](logits, targets, cap)
    z = cap * torch.tanh(exact / cap)
    expected = (z.exp().sum(-1).log() - z.gather(1, targets.clamp_min(0)[:, None])[:, 0]) * scored
    assert found.dtype == torch.float32 and not found[~scored].any()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.rand(7)
    (grad,), (wanted,) = (torch.autograd.grad((y * weight).sum(), x) for y, x in ((found, logits), (expected, exact)))
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-6)
    assert not grad[~scored].any()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_bfloat16_logits_are_taken_in_float32(kind: str):
    torch.manual_seed(0)
    function, targets = TWINS["cross_entropy"][KINDS.index(kind)], torch.arange(5)
    logits = (3 * torch.randn(5, 40)).bfloat16()
    torch.testing.assert_close(function(logits, targets, 30.0), function(logits.float(), targets, 30.0), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["rms_norm", "leaky_relu_squared", "cross_entropy"])
def test_twins_stay_near_their_references_in_bfloat16(name: str):
    """Values and gradients, within a few roundings."""
    torch.manual_seed(0)
    x = torch.randn(16, 40).bfloat16().requires_grad_()
    rest = {"rms_norm": (0.7,), "leaky_relu_squared": (0.5,), "cross_entropy": (torch.arange(16), 30.0)}[name]
    outs = [function(x, *rest) for function in TWINS[name]]
    grads = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in outs]
    assert outs[0].dtype == outs[1].dtype and grads[1].dtype == torch.bfloat16
    for a, b in (outs, grads):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name", ["rms_norm", "leaky_relu_squared", "cross_entropy"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_leave_their_inputs_alone(kind: str, name: str):
    torch.manual_seed(0)
    x = torch.randn(16, 40, requires_grad=True)
    rest = {"rms_norm": (0.7,), "leaky_relu_squared": (0.5,), "cross_entropy": (torch.arange(16), 30.0)}[name]
    before = x.detach().clone()
    TWINS[name][KINDS.index(kind)](x, *rest).sum().backward()
    assert torch.equal(x, before)
