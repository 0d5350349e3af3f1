"""Every kernel, references and fast twins alike, against float64 formulas written from their definitions."""
import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny
from torch import Tensor

import train_gpt as tg

BOS = tg.BOS_ID
# Row 0 is full; row 1 continues a document, starts another and ends early; a third row is only padding.
ROWS = [[BOS, 9, 8, 7, BOS, BOS, 6, 5, 4, 3, 2, 9], [5, 6, BOS, 7, 8, 9, 2]]
# (row, begin, end) of each segment, read off ROWS by hand.
SEGMENTS = [(0, 0, 4), (0, 4, 5), (0, 5, 11), (1, 0, 2), (1, 2, 6), (1, 6, 11), (2, 0, 11)]


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention, one query of one head at a time."""
    out, shared = torch.zeros_like(q), q.size(2) // k.size(2)
    for row, begin, end in SEGMENTS:
        for t in range(begin, end):
            for head in range(q.size(2)):
                keys, values = (x[row, begin:t + 1, head // shared] for x in (k, v))
                weights = (keys @ q[row, t, head] / math.sqrt(q.size(3))).exp()
                out[row, t, head] = weights @ values / weights.sum()
    return out


def naive_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    """What PyTorch's variable-length kernel computes, from the segment starts alone."""
    assert enable_gqa and cu_seq_q is not cu_seq_k and torch.equal(cu_seq_q, cu_seq_k) and window_size == (-1, 0)
    shared, out = query.size(1) // key.size(1), torch.zeros_like(query)
    for begin, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist()):
        assert 0 <= end - begin <= max_q == max_k
        part = slice(begin, end)
        scores = torch.einsum("qnh,knh->nqk", query[part], key[part].repeat_interleave(shared, dim=1))
        unseen = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
        weights = (scores / math.sqrt(query.size(2))).masked_fill(unseen, -math.inf).softmax(-1)
        out[part] = torch.einsum("nqk,knh->qnh", weights, value[part].repeat_interleave(shared, dim=1))
    return out


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """PyTorch's variable-length attention with `naive_varlen` in its place; the implementations activated."""
    attention = pytest.importorskip("torch.nn.attention")
    module = pytest.importorskip("torch.nn.attention.varlen")
    if not hasattr(attention, "activate_flash_attention_impl"):
        pytest.skip("torch before 2.11")
    activated: list[str] = []
    real, fake = (inspect.signature(f).parameters for f in (module.varlen_attn, naive_varlen))
    assert fake.keys() <= real.keys() and list(real)[:7] == list(fake)[:7]
    monkeypatch.setattr(module, "varlen_attn", naive_varlen)
    monkeypatch.setattr(attention, "activate_flash_attention_impl", activated.append)
    return activated


def assert_gradients(actual: Tensor, inputs: list[Tensor], expected: Tensor, exact: list[Tensor], **tolerance: float):
    """Of both results, under the same random weights."""
    weight = torch.randn_like(actual)
    for a, b in zip(torch.autograd.grad((actual * weight).sum(), inputs),
                    torch.autograd.grad((expected * weight).sum(), exact)):
        torch.testing.assert_close(a.double(), b, **tolerance)


def check_attention(kernel: tg.Attention, heads: int, kv_heads: int) -> None:
    """Values and gradients are those of the loop over segments."""
    torch.manual_seed(0)
    shapes = [(3, 11, n, 6) for n in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    rows = tg.make_batch([np.array(row, dtype=np.uint16) for row in ROWS], 3, 11)
    actual, expected = kernel.run(*inputs, kernel.prepare(rows)), naive_attention(*inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert_gradients(actual, inputs, expected, inputs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 2), (4, 1)])
def test_attention_and_its_gradient_equal_a_loop_over_segments(heads: int, kv_heads: int):
    check_attention(tg.SDPA, heads, kv_heads)


@pytest.mark.parametrize("name", ["varlen", "fa3", "fa4"])
def test_flash_attention_is_called_as_it_wants_to_be(name: str, varlen: list[str]):
    """Segment starts and positions say the same; causal, in the real function's own parameters."""
    check_attention(tg.varlen_attention(name), 4, 2)
    assert varlen == {"varlen": []}.get(name, [name.upper()])


@pytest.mark.parametrize("generation, expected", [(7, "sdpa"), (8, "varlen"), (9, "fa3"), (10, "fa4")])
def test_a_gpu_takes_the_fastest_attention_that_runs_on_it(generation: int, expected: str, varlen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    device = torch.device("cuda")
    assert tg.pick_attention("auto", device, torch.bfloat16).name == expected
    if generation == 7:
        with pytest.raises(tg.UserError, match="ATTENTION=varlen: needs a newer GPU"):
            tg.pick_attention("varlen", device, torch.bfloat16)

    def without_packages(name):
        if name != "varlen":
            raise ImportError(f"no {name}")
        return tg.varlen_attention(name)

    assert tg.pick_attention("auto", device, torch.bfloat16, without_packages).name in ("varlen", "sdpa")
    if expected.startswith("fa"):
        with pytest.raises(tg.UserError, match=f"ATTENTION={expected}: not to be had here .no {expected}.; use auto"):
            tg.pick_attention(expected, device, torch.bfloat16, without_packages)


def test_a_kernel_that_fails_at_its_first_use_is_named_and_the_next_one_taken(varlen, monkeypatch):
    """FlashAttention 3 may load and yet not compile or run: found before the warm-up, whatever it raises."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    said, whole = [], tg.varlen_attention
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16, compiles=True, is_cuda=True,
                          compiled=lambda function: function, log=lambda event, **values: said.append(values["text"]))

    def broken(name):
        def run(q, k, v, segments):
            raise TypeError("no such argument") if name != "varlen" else KeyError("sm_90")
        return whole(name)._replace(run=run)

    monkeypatch.setattr(tg, "varlen_attention", broken)
    choose = tg.pick_attention
    monkeypatch.setattr(tg, "pick_attention", lambda name, device, *rest: choose(name, torch.device("cuda"), *rest))
    assert tg.pick_kernels(tiny(kernels="plain"), run).attention is tg.SDPA
    assert [text.split(" fails")[0] for text in said] == ["attention fa3", "attention fa4", "attention varlen"]


def test_a_cpu_takes_the_reference_and_refuses_the_others_in_one_line():
    for name in ("varlen", "fa3", "fa4"):
        with pytest.raises(tg.UserError, match=f"^ATTENTION={name}: .*$"):
            tg.pick_attention(name, torch.device("cpu"), torch.bfloat16)
    for name in ("auto", "sdpa"):
        assert tg.pick_attention(name, torch.device("cpu"), torch.bfloat16) is tg.SDPA


@pytest.mark.parametrize("gain", [0.3, "per head"])
def test_rms_norm_and_its_gradients_equal_the_formula(gain: float | str):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 8) * torch.logspace(-3, 3, 5)[:, None, None]
    x[0, 0] = 0
    inputs = [x.requires_grad_()] + [torch.randn(4, 1, requires_grad=True)] * (gain == "per head")
    before = x.detach().clone()
    actual = tg.rms_norm(x, *(inputs[1:] or [gain]))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = exact[0] / (exact[0].square().mean(-1, keepdim=True) + 2.0 ** -23).sqrt() * (exact[1:] or [gain])[0]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    assert_gradients(actual, inputs, expected, exact, rtol=2e-4, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("cap", [5.0, 30.0])
def test_softcapped_cross_entropy_and_its_gradient_equal_the_formula(cap: float):
    """Among the rows: one with huge logits, one without a target, one whose target is as unlikely as can be."""
    torch.manual_seed(0)
    logits, targets = 20 * torch.randn(7, 30), torch.randint(30, (7,))
    logits[3] *= 1e4
    logits[4, :], logits[4, targets[4]] = 1e3, -1e3
    targets[[2, 5]] = tg.IGNORE
    logits.requires_grad_()
    exact, scored = logits.detach().double().requires_grad_(), targets != tg.IGNORE
    actual, z = tg.softcapped_cross_entropy(logits, targets, cap), cap * torch.tanh(exact / cap)
    expected = (z.exp().sum(-1).log() - z.gather(1, targets.clamp_min(0)[:, None])[:, 0]) * scored
    assert actual.dtype == torch.float32 and not actual[~scored].any()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert_gradients(actual, [logits], expected, [exact], rtol=1e-4, atol=1e-6)
    half = logits.detach().bfloat16()  # losses are taken in float32
    assert torch.equal(*(tg.softcapped_cross_entropy(x, targets, cap) for x in (half, half.float())))
