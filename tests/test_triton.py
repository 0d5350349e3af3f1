"""Triton's MLP against its float64 formula, forward and backward; on a machine without a GPU by its interpreter."""
import ast
import functools
import importlib.util
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny
from test_model import noisy
from torch import Tensor

import train_gpt as tg

pytest.importorskip("triton")
DEVICE = torch.device({True: "cuda", False: "cpu"}[torch.cuda.is_available()])
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 0.02}  # error allowed, as a share of the largest value


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch):
    """The interpreter multiplies the bits of bfloat16 as if they were integers; here it multiplies their values."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    plain = Builder.create_dot

    def create_dot(self, a, b, *rest):
        return plain(self, *(self.cast_impl(t, tg.tl.float32) if t.dtype.scalar == tg.tl.bfloat16 else t
                             for t in (a, b)), *rest)

    monkeypatch.setattr(Builder, "create_dot", create_dot)


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=draw).to(DEVICE, dtype).requires_grad_()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("tokens, dim, width, slope", [
    (1, 8, 32, 0.5), (70, 32, 128, 0.0), (130, 24, 66, 1.0), (65, 100, 10, 0.3)])
def test_the_mlp_and_its_gradients_equal_the_formula(tokens: int, dim: int, width: int, slope: float, dtype):
    """Values and gradients under the same weights, each within a few roundings of its own size."""
    inputs = [drawn(tokens, dim, dtype=dtype), drawn(width, dim, dtype=dtype), drawn(dim, width, dtype=dtype)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    x, up, down = exact
    pre = x @ up.T
    expected = torch.maximum(pre, slope * pre) ** 2 @ down.T
    actual, weight = tg.triton_mlp()(*inputs, slope), drawn(tokens, dim, dtype=dtype).detach()
    results = [actual, *torch.autograd.grad((actual * weight).sum(), inputs)]
    formulas = [expected, *torch.autograd.grad((expected * weight.double()).sum(), exact)]
    for a, b in zip(results, formulas):
        worst = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-9)
        assert a.isfinite().all() and worst < ROUNDING[dtype]


def test_a_model_with_this_kernel_is_one_graph_and_has_the_references_loss_and_gradients():
    """Compiled with no break allowed: an operator of ours is opaque, and knows the shapes of what it returns."""
    cfg = tiny(num_layers=2, num_loops=0, parallel_start_layer=1)
    model, batch = noisy(cfg).to(DEVICE), tg.random_batch(2, cfg).to(DEVICE)
    layers, results = tg.unroll_layers(cfg, False), []
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)
    for kernels, wrap in ((tg.Kernels(), lambda f: f), (tg.Kernels(fused="triton", mlp=tg.triton_mlp()), compiled)):
        model.kernels = kernels
        loss = wrap(lambda: model.total_loss(batch, layers, torch.float32))()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        results.append(torch.cat([loss.view(1), *(g.flatten() for g in grads)]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_the_kernel_outlives_packing(tmp_path, monkeypatch):
    """Triton reads a kernel's source: docstrings may go, everything else must be in the packed file as it is here."""
    packed = tmp_path / "train_gpt.py"
    packed.write_bytes(tg.shipped_source(tg.Path(tg.__file__)))
    spec = importlib.util.spec_from_file_location("packed", packed)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "packed", module)
    spec.loader.exec_module(module)
    shipped, here = (ast.parse(inspect.getsource(m.mlp_kernel)).body[0] for m in (module, tg))
    here.body = here.body[1:]
    assert ast.dump(shipped) == ast.dump(here)


def missing():
    raise ImportError("no triton")


@pytest.mark.parametrize("generation, knobs, triton_mlp, expected", [
    (8, dict(kernels="triton"), tg.triton_mlp, "triton"), (9, dict(kernels="plain"), tg.triton_mlp, "plain"),
    (7, {}, tg.triton_mlp, "plain"), (9, {}, missing, "plain"),
    (7, dict(kernels="triton"), tg.triton_mlp, "KERNELS=triton: needs .*; use auto"),
    (9, dict(kernels="triton"), missing, "KERNELS=triton: not to be had here .*; use auto"),
    (9, {}, tg.triton_mlp, "triton"), (9, dict(mlp_mult=3), tg.triton_mlp, "plain"),
    (9, dict(mlp_mult=3, kernels="triton"), tg.triton_mlp, "triton")])
def test_a_gpu_takes_the_fastest_kernels_that_it_can_run(generation, knobs, triton_mlp, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    monkeypatch.setattr(tg, "pick_attention", lambda *args: tg.SDPA)
    monkeypatch.setattr(tg, "triton_mlp", triton_mlp)
    monkeypatch.setattr(tg, "prove", lambda name, kernel, shapes, *_: (name == "plain MLP") ^ (shapes[1][0] == 96))
    run = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, compiles=True, is_cuda=True, world=1,
                          log=lambda *args, **values: None, all_reduce=lambda value: value)
    if expected.startswith("KERNELS"):
        with pytest.raises(tg.UserError, match=expected):
            tg.pick_kernels(tiny(**knobs), run)
        return
    kernels = tg.pick_kernels(tiny(**knobs), run)
    assert kernels.fused == expected and (kernels.mlp is not None) == (expected == "triton")
