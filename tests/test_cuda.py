"""What a GPU must do as a CPU does. `./run.sh bench --gpu` runs the cases marked `cuda`; a CPU runs most bodies too."""
from pathlib import Path

import pytest
import torch
from conftest import CUDA, QUICK, environment, events, tiny

import train_gpt as tg
from bench.common import Machine
from bench.kernels import STRETCHES, kernel_rows


@pytest.mark.parametrize("heads, kv_heads, device", [
    (2, 1, "cpu"), *(pytest.param(heads, 1, *CUDA.values, marks=CUDA.marks) for heads in (2, 1))])
def test_every_kernel_of_this_machine_agrees_with_its_reference(heads: int, kv_heads: int, device: str):
    """Head widths 64 and 128 in bf16, values and gradients against the reference in fp32."""
    cfg = tiny(device=device, dtype="bfloat16", model_dim=128, num_heads=heads, num_kv_heads=kv_heads, rope_dims=16)
    with tg.Run(cfg, {}, log=False) as run:
        rows = kernel_rows(cfg, run, Machine("any", 1e12, 1e12, None), repeats=1)
    fields = {field for field, kernel in tg.Kernels._field_defaults.items() if callable(kernel)}
    assert {row["name"].split(":")[0] for row in rows} == {"attention", *STRETCHES, *fields}
    assert all(row["error"] < 0.03 for row in rows), rows


@pytest.mark.parametrize("device, dtype, compiled, tolerance, knobs", [
    ("cpu", "bfloat16", "off", 0.02, dict(QUICK, iterations=4)),
    *(pytest.param("cuda", *rest, marks=CUDA.marks) for rest in (("float32", "off", 3e-3, {}),
                                                                 ("bfloat16", "on", 0.02, {})))])
def test_a_run_on_a_device_is_the_run_in_fp32_on_a_cpu(device: str, dtype: str, compiled: str, tolerance: float,
                                                       knobs: dict, dataset: dict[str, str], tmp_path: Path):
    """The losses of every step and every score, loop off and on, within rounding."""
    found = []
    for i, changes in enumerate((dict(device=device, dtype=dtype, compile=compiled), {})):
        assert tg.main([], environment(dataset, tmp_path / str(i), **knobs, **changes)) == 0
        found.append([event[key] for key, name in (("loss_nats", "train"), ("val_loss", "score"))
                      for event in events(tmp_path / str(i), name)])
    assert len(found[0]) >= 5 and found[0] == pytest.approx(found[1], abs=tolerance)


@pytest.mark.parametrize("device", [CUDA])
def test_a_wall_clock_budget_ends_before_it_is_over(device: str, dataset: dict[str, str], tmp_path: Path):
    budget = dict(max_wallclock_seconds=4, gptq_reserve_seconds=1, iterations=10 ** 6, train_log_every=1000)
    assert tg.main([], environment(dataset, tmp_path, device=device, dtype="auto", compile="off", **budget)) == 0
    (end,) = events(tmp_path, "train_end")
    assert end["steps"] > 1 and end["train_seconds"] < 4


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_newton_schulz_in_bf16_leaves_singular_values_near_one(device: str):
    torch.manual_seed(0)
    stack = torch.randn(3, 64, 256, device=device)
    values = torch.linalg.svdvals(tg.orthogonalize(stack, tg.NEWTON_SCHULZ["polar"], torch.bfloat16).float())
    assert 0.7 < values.min() and values.max() < 1.3
