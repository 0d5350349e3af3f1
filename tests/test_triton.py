"""Triton's kernels against float64 formulas, forward and backward; on a machine without a GPU by its interpreter."""
import ast
import functools
import importlib.util
import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny
from test_model import noisy
from torch import Tensor

import train_gpt as tg

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 0.02}
"""Error allowed, as a share of the largest value."""


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch):
    """The interpreter multiplies the bits of bfloat16 as if they were integers; here it multiplies their values."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    plain = Builder.create_dot

    def create_dot(self, a, b, *rest):
        return plain(self, *(self.cast_impl(t, tg.tl.float32) if t.dtype.scalar == tg.tl.bfloat16 else t
                             for t in (a, b)), *rest)

    monkeypatch.setattr(Builder, "create_dot", create_dot)


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=draw).to(DEVICE, dtype).requires_grad_()


def compare(found: Tensor, expected: Tensor, inputs: list[Tensor], exact: list[Tensor], weight: Tensor) -> None:
    """Values and gradients under the same weights, each within a few roundings of its own size."""
    results = [found, *torch.autograd.grad((found * weight).sum(), inputs)]
    wanted = [expected, *torch.autograd.grad((expected * weight.double()).sum(), exact)]
    for a, b in zip(results, wanted):
        worst = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-9)
        assert a.isfinite().all() and worst < ROUNDING[inputs[0].dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,dim,width,slope", [
    (1, 8, 32, 0.5), (64, 32, 64, 0.5), (70, 32, 128, 0.0), (130, 24, 66, 1.0), (65, 100, 10, 0.3)])
def test_the_mlp_and_its_gradients_equal_the_formula(tokens: int, dim: int, width: int, slope: float, dtype):
    inputs = [drawn(tokens, dim, dtype=dtype), drawn(width, dim, dtype=dtype), drawn(dim, width, dtype=dtype)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    x, up, down = exact
    pre = x @ up.T
    post = torch.maximum(pre, slope * pre) ** 2
    compare(tg.triton_kernels()["mlp"](*inputs, slope), post @ down.T, inputs, exact, drawn(tokens, dim, dtype=dtype))


def formula(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    z = cap * torch.tanh(logits / cap)
    nats = z.logsumexp(-1) - z.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    return nats * (targets != tg.IGNORE)


@functools.cache
def some_targets(rows: int, vocab: int, kind: str) -> Tensor:
    """Targets with the first and the last id among them; `some` and `all` say how many of them are IGNORE."""
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(rows))
    targets[0], targets[-1] = 0, vocab - 1
    targets[{"none": [], "some": list(range(1, rows, 3)), "all": list(range(rows))}[kind]] = tg.IGNORE
    return targets.to(DEVICE)


SHAPES = [(1, 7, "none"), (5, 64, "some"), (9, 101, "some"), (3, 4097, "none"), (4, 33, "all")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", [5.0, 30.0, 300.0])
@pytest.mark.parametrize("rows,vocab,ignored", SHAPES)
def test_nats_and_their_gradient_equal_the_formula(rows: int, vocab: int, ignored: str, cap: float, dtype):
    """Also where a row has logits far beyond the cap, and beyond 40, where exp(cap) would not fit."""
    logits, targets = drawn(rows, vocab, dtype=dtype), some_targets(rows, vocab, ignored)
    with torch.no_grad():
        logits *= 20
        logits[1:2] *= 100
        logits[:rows - 1, -1] = 90  # the largest comes last
    exact = logits.detach().double().requires_grad_()
    found = tg.triton_kernels()["cross_entropy"](logits, targets, cap)
    assert found.dtype == torch.float32 and not found[targets == tg.IGNORE].any()
    weight = torch.rand(rows, generator=torch.Generator().manual_seed(1)).to(DEVICE) + 0.5
    compare(found, formula(exact, targets, cap), [logits], [exact], weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,vocab,ignored", SHAPES)
def test_the_head_with_its_nats_equals_the_formula(rows: int, vocab: int, ignored: str, dtype):
    """The logits are rounded to the dtype between the two, so the hidden states are such that they need no rounding."""
    hidden, head = drawn(rows, 4, dtype=dtype), drawn(vocab, 4, dtype=dtype)
    with torch.no_grad():
        hidden.copy_(hidden.sign())
        head.copy_((4 * head).round())
    targets, exact = some_targets(rows, vocab, ignored), [t.detach().double().requires_grad_() for t in (hidden, head)]
    found = tg.triton_kernels()["head_nats"](hidden, head, targets, 30.0)
    compare(found, formula(exact[0] @ exact[1].T, targets, 30.0), [hidden, head], exact,
            torch.full((rows,), 1 / 786_432, device=DEVICE))


def test_without_a_gradient_no_gradient_is_made():
    logits, targets = drawn(5, 64, dtype=torch.float32), some_targets(5, 64, "some")
    with torch.no_grad():
        nats, grad = torch.ops.golf.nats(logits, targets, 30.0, False)
        found = tg.triton_kernels()["cross_entropy"](logits, targets, 30.0)
    assert grad.numel() == 0 and torch.equal(found, nats) and not found.requires_grad
    assert torch.equal(found, tg.triton_kernels()["cross_entropy"](logits, targets, 30.0).detach())


def test_a_model_with_these_kernels_is_one_graph_and_has_the_references_loss_and_gradients():
    """Compiled with no break allowed: operators of ours are opaque, and know the shapes of what they return."""
    cfg = tiny(num_layers=2, num_loops=0, parallel_start_layer=1)
    model, batch = noisy(cfg).to(DEVICE), tg.random_batch(2, cfg).to(torch.device(DEVICE))
    plan, results = tg.layer_plan(cfg, False), []
    for kernels in (model.kernels, model.kernels._replace(fused="triton", **tg.triton_kernels())):
        model.kernels = kernels
        loss = torch.compile(lambda: model.total_loss(batch, plan, torch.float32), backend="aot_eager",
                             fullgraph=True, dynamic=False)()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        results.append(torch.cat([loss.view(1), *(g.flatten() for g in grads)]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_weights_that_are_listened_to_take_every_product_by_itself():
    """What calibration sums does not depend on the kernels."""
    cfg = tiny()
    model, batch, grams = noisy(cfg).to(DEVICE), tg.random_batch(2, cfg).to(torch.device(DEVICE)), []
    for fused in ({}, tg.triton_kernels()):
        model.kernels = model.kernels._replace(**fused)
        w = tg.RecordingWeights(model, torch.float32)
        with torch.no_grad():
            model.losses(model.hidden(batch, tg.layer_plan(cfg, True), w).flatten(0, 1), batch.targets.flatten(), w)
        grams.append(w.gram)
    assert grams[0].keys() == grams[1].keys() and {name for name, _ in grams[0]} == {"qkv", "o", "up", "down", "head"}
    assert all(torch.equal(grams[0][key], grams[1][key]) for key in grams[0])


FOR_HOPPER = """
import triton, triton.language, train_gpt as tg
from triton.backends.compiler import GPUTarget
tg.tl = triton.language
bf16, mlp = "*bf16", dict(N=2048, K=512, SLOPE=0.5, ROWS=128, COLS=128, DEPTH=64)
for function, types, constants in (
        (tg.mlp_kernel, [bf16, bf16, bf16, bf16, bf16, "i32"], dict(mlp, BACKWARD=False)),
        (tg.mlp_kernel, [bf16, bf16, bf16, bf16, bf16, "i32"], dict(mlp, BACKWARD=True)),
        (tg.nats_kernel, [bf16, "*i64", "*fp32", bf16], dict(V=8192, CAP=30.0, IGNORED=-100, GRAD=True, BLOCK=4096))):
    kernel = triton.jit(function)
    names = kernel.arg_names
    source = triton.compiler.ASTSource(
        kernel, dict(zip(names, types)) | dict.fromkeys(constants, "constexpr"),
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in range(len(types))})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=8, num_stages=4))
    print(built.metadata.shared, built.asm["ptx"].count("wgmma.mma_async"), len(built.asm["cubin"]) > 0)
"""


def test_the_kernels_compile_for_a_hopper_gpu(tmp_path):
    """Triton needs no GPU to make a GPU's code: tensor-core products, within the shared memory that a block has."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FOR_HOPPER], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    forward, backward, nats = ([int(n) for n in line.split()[:2]] for line in done.stdout.splitlines())
    assert all(shared <= 227 * 1024 for shared, _ in (forward, backward, nats))
    assert forward[1] > 0 and backward[1] > 0 and nats[1] == 0 and done.stdout.count("True") == 3


def test_the_kernels_outlive_packing(tmp_path, monkeypatch):
    """Triton reads a kernel's source: docstrings may go, everything else must be in the packed file as it is here."""
    packed = tmp_path / "train_gpt.py"
    packed.write_bytes(tg.shipped_source(tg.Path(tg.__file__)))
    spec = importlib.util.spec_from_file_location("packed", packed)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "packed", module)
    spec.loader.exec_module(module)
    for name in ("mlp_kernel", "nats_kernel"):
        found, here = (ast.parse(inspect.getsource(getattr(m, name))).body[0] for m in (module, tg))
        here.body = here.body[1:]
        assert ast.dump(found) == ast.dump(here)


def test_triton_where_it_cannot_run_is_one_clear_line():
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, compiles=False, is_cuda=False)
    with pytest.raises(tg.UserError, match="KERNELS=triton: needs .*; use auto"):
        tg.pick_kernels(tiny(kernels="triton"), run)


@pytest.mark.parametrize("generation, knob, installed, expected", [
    (9, "auto", True, "triton"), (8, "triton", True, "triton"), (9, "plain", True, "compiled"),
    (7, "auto", True, "compiled"), (9, "auto", False, "compiled"),
    (9, "triton", False, "KERNELS=triton: cannot be imported")])
def test_a_gpu_takes_the_kernels_that_it_can_run(generation, knob, installed, expected, monkeypatch):
    def missing() -> dict:
        raise ImportError("no triton")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    monkeypatch.setattr(tg, "pick_attention", lambda *args: tg.sdpa_attention())
    if not installed:
        monkeypatch.setattr(tg, "triton_kernels", missing)
    run = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, compiles=True, is_cuda=True)
    try:
        kernels = tg.pick_kernels(tiny(kernels=knob), run)
        found, fused = kernels.fused, kernels.mlp is not None and kernels.head_nats is not None
        assert fused == (found == "triton") and (kernels.cross_entropy is tg.softcapped_cross_entropy) == (not fused)
    except tg.UserError as error:
        found = str(error)
    assert found.startswith(expected)
