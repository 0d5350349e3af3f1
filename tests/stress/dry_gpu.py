"""What the compilers make of the record's graphs for an H100, on a machine that has none: figures as one line of JSON.

    python -m tests.stress.dry_gpu step|adapt|mlp       started by test_dry_gpu.py, which sets LD_PRELOAD

Tensors are fake: shapes without values. Dynamo, AOTAutograd, Inductor and Triton do their work for sm_90 as they would
with a GPU, and nothing is launched. What they ask a device for is answered here, with an H100's properties. Constant
folding and padding of products are off, since they run on a device.
"""
from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch._inductor.runtime.triton_helpers as helpers
import torch._inductor.runtime.triton_heuristics as heuristics
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

import train_gpt as tg
from bench.kernels import mlp_tiles
from tools.common import program

DEVICE, TARGET = torch.device("cuda", 0), GPUTarget("cuda", 90, 32)
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, gcnArchName="",
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=52428800, clock_rate=1980000, memory_clock_rate=2619000, memory_bus_width=5120)
ANSWERS: dict[str, Any] = dict(
    is_available=True, device_count=1, current_device=0, get_device_properties=H100, _get_device_properties=H100,
    get_device_capability=(9, 0), get_device_name=H100.name, set_device=None, synchronize=None, _exchange_device=0,
    _maybe_exchange_device=0, is_bf16_supported=True, is_tf32_supported=True, _lazy_init=None, memory_allocated=0,
    mem_get_info=(79 << 30, 80 << 30), set_rng_state=None, get_rng_state=torch.zeros(16, dtype=torch.uint8),
    current_stream=types.SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1))
"""What functions of torch.cuda return, whatever they are called with."""
RUN = types.SimpleNamespace(device=DEVICE, dtype=torch.bfloat16, compiles=True, is_cuda=True, world=1, rank=0,
                            log=lambda *args, **values: None, all_reduce=lambda value: value)
MODE = FakeTensorMode(allow_non_fake_inputs=True)


def constant(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


class Driver:
    """What Triton asks of the driver of a GPU before it launches anything."""
    launcher_cls = None
    utils = types.SimpleNamespace(load_binary=constant((0, 0, 0, 0, 1024)), get_device_properties=constant(dict(
        max_shared_mem=232448, max_num_regs=65536, multiprocessor_count=132, warpSize=32)))
    get_current_target, get_active_torch_device = constant(TARGET), constant(DEVICE)
    get_current_device = get_current_stream = staticmethod(constant(0))
    get_device_capability, get_device_interface = constant((9, 0)), constant(torch.cuda)


GRAPHS: list[torch.fx.GraphModule] = []
"""What was compiled: forward and backward; then their code, and Inductor's kernels."""
CODES: list[str] = []
TUNERS: list[heuristics.CachingAutotuner] = []


def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Inductor's compilation; a graph that is called gives shapes."""
    def inner(graph: torch.fx.GraphModule, inputs: Sequence[Any], **more: Any) -> Callable[[list[Any]], Any]:
        GRAPHS.append(graph)
        compile_fx_inner(graph, inputs, **more)

        def call(given: list[Any]) -> Any:
            with MODE:
                result = torch.fx.Interpreter(graph).run(*given)
            given.clear()
            return result

        call._boxed_call = True
        return call

    return compile_fx(graph, inputs, inner_compile=inner)


def precompile(tuner: heuristics.CachingAutotuner, *_: Any, **__: Any) -> None:
    """Compiles every configuration of a kernel and launches none."""
    TUNERS.append(tuner)
    tuner._precompile_worker()


def saved_gib() -> float:
    """What the forward keeps for the backward; inputs are there anyway."""
    outputs = next(node for node in GRAPHS[0].graph.nodes if node.op == "output").args[0]
    kept = {n for n in outputs[1:] if isinstance(n, torch.fx.Node) and n.op != "placeholder"}
    sizes = [v.numel() * v.element_size() for v in (n.meta["val"] for n in kept) if isinstance(v, torch.Tensor)]
    return sum(size.node.hint if isinstance(size, torch.SymInt) else size for size in sizes) / 2 ** 30


def pretend() -> None:
    """From here on this process believes that it has an H100."""
    torch._C._ensureCUDADeviceGuardSet()
    ctypes.CDLL(os.environ["LD_PRELOAD"]).pretend_devices(16)  # autograd asks for each of them
    FakeTensorMode.avoid_device_init = property(constant(True))
    for name, value in ANSWERS.items():
        setattr(torch.cuda, name, constant(value))
        if hasattr(CudaInterface, name.removeprefix("_")):
            setattr(CudaInterface, name.removeprefix("_"), staticmethod(constant(value)))
    torch._C._cuda_getCurrentRawStream = CudaInterface.get_raw_stream = constant(0)
    driver.set_active(Driver())
    helpers.set_driver_to_gpu = constant(None)
    settings = dict(compile_threads=1, joint_graph_constant_folding=False, shape_padding=False,
                    use_static_cuda_launcher=False, use_static_triton_launcher=False)
    for name, value in settings.items():
        setattr(torch._inductor.config, name, value)
    heuristics.CachingAutotuner.precompile = precompile
    GraphLowering.save_output_code = staticmethod(CODES.append)
    tg.prove = lambda name, *_: float("triton" not in name)  # it would launch


def leanest(kernels: Sequence[Any]) -> dict[str, int]:
    """Of configurations of a Triton kernel that of least stack, then registers: bytes and number of these a thread has,
    and its machine instructions."""
    def said(kernel: Any, tool: str, option: str) -> str:
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            return subprocess.run([path, option, file.name], check=True, capture_output=True, text=True).stdout

    used = [said(kernel, "cuobjdump", "--dump-resource-usage") for kernel in kernels]
    stack, registers, best = min((*(int(re.search(f"{of}:(\\d+)", text)[1]) for of in ("STACK", "REG")), i)
                                 for i, text in enumerate(used))
    sass = said(kernels[best], "nvdisasm", "-c")
    return {"stack": stack, "registers": registers,
            "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M))}


def tiles() -> dict[str, Any]:
    """Every tile that the MLP's kernel is tried with, both ways, at the record's shape."""
    jit, cfg, kernels = triton.jit(tg.mlp_kernel), tg.Config(), {}
    types_of = {name: "*bf16" if name.endswith("_ptr") else "i32" if name == "M" else "constexpr"
                for name in jit.arg_names}
    for config in mlp_tiles():
        for back in (False, True):
            fixed = dict(N=cfg.mlp_dim, K=cfg.model_dim, SLOPE=cfg.mlp_slope, BACKWARD=back, **config.kwargs)
            aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(jit.arg_names) if n not in fixed}
            source = ASTSource(jit, types_of, {(jit.arg_names.index(n),): v for n, v in fixed.items()}, aligned)
            kernel = triton.compile(source, target=TARGET, options=dict(num_warps=config.num_warps,
                                                                        num_stages=config.num_stages))
            name = (*config.kwargs.values(), config.num_warps, config.num_stages, "backward" if back else "forward")
            kernels[" ".join(map(str, name))] = leanest([kernel])
    return {"kernels": kernels}


def graph_of(part: str) -> dict[str, Any]:
    """The record's looped training step, or a chunk step of its adapters, with two blocks; forward and backward."""
    small = dict(NUM_LAYERS="2", LOOP_START="0", LOOP_END="0", PARALLEL_START_LAYER="1")
    cfg = tg.Config.from_env(small)
    layers, dtype = tg.unroll_layers(cfg, True), RUN.dtype
    with MODE:
        with DEVICE:
            model = tg.GPT(cfg)
        model.kernels = tg.pick_kernels(cfg, RUN)
        compile_ = lambda f: torch.compile(f, dynamic=False, fullgraph=True, backend=backend)  # noqa: E731
        if part == "step":
            batch = model.to_device(tg.random_batch(cfg.micro_batch_tokens // cfg.train_seq_len, cfg), RUN)
            loss = compile_(lambda batch: model.total_loss(batch, layers, dtype))(batch)
        else:  # as `adapt_and_score` does it
            model.requires_grad_(False)
            rows = cfg.ttt_batch_size
            w = tg.AdaptedWeights(tg.Weights(model, dtype), model, layers, rows, cfg)
            cut = tg.random_batch(rows, cfg)._replace(cu_seqlens=torch.arange(rows + 1, dtype=torch.int32) * 2048)
            batch = model.to_device(cut, RUN)
            segments, *tables = batch.mask_and_rotary
            tg.of_any_size(segments, 0)
            tg.of_any_size([batch.ids, batch.positions, *tables], 0, 1)
            tg.of_any_size(w.parameters, 0)
            loss = compile_(model.forward)(batch, layers, w).sum()
        loss.backward()
    words = {word for code in CODES for word in re.findall(r"(?:libdevice|tl_math)\.(\w+)", code)}
    kernels = {tuner.fn.__name__: leanest([result.kernel for result in tuner.compile_results]) for tuner in TUNERS}
    return {"graphs": len(GRAPHS), "functions": sorted(words), "kernels": kernels, "saved_gib": saved_gib(),
            "calls": [len(re.findall(r"^ +triton_\w+\.run\(", code, re.M)) for code in CODES],
            "picked": [model.kernels.attention.name, model.kernels.fused]}


def main(arguments: Sequence[str]) -> int:
    """One line of JSON."""
    tg.require(arguments[:1] in (["step"], ["adapt"], ["mlp"]) and "LD_PRELOAD" in os.environ,
               "expected step, adapt or mlp, from tests/stress/test_dry_gpu.py")
    pretend()
    print(json.dumps(tiles() if arguments[0] == "mlp" else graph_of(arguments[0])))
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "bench", __doc__))
