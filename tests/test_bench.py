"""The benches: FLOPs are counted right, every bench runs at tiny size, a trace is taken apart as it should be."""
import pytest
import torch
from conftest import batch_of, tiny
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as tg

# -- FLOPs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("looped, context, expected", [
    (False, 1024, 94.9), (True, 1024, 142.1), (False, 670, 86.9), (True, 670, 129.8)])
def test_flops_of_the_record_are_those_of_its_roofline(looped: bool, context: float, expected: float):
    """MFLOP a token, forward: 11 or 17 visits of 5.767 for matrices and 4 * 512 * context for attention, 8.389 head."""
    cfg = tg.Config()
    found = tg.estimate_flops(cfg, tg.layer_plan(cfg, looped), context) / 1e6
    assert found == pytest.approx((17 if looped else 11) * (5.767 + 4 * 512 * context / 1e6) + 8.389, abs=0.01)
    assert found == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("knobs", [{}, dict(bigram_buckets=64, bigram_dim=24, num_kv_heads=2, mlp_mult=3)])
def test_flops_are_those_that_torch_counts(knobs: dict, run: tg.Run):
    """Forward and backward of a model without gates; attention by plain products computes all T keys of a row."""
    cfg = tiny(attn_gate="none", smear_gate_enabled=False, **knobs)
    model, batch, plan = tg.GPT(cfg), batch_of(torch.randint(2, 512, (3, 33)).numpy()), tg.layer_plan(cfg, True)
    model.kernels = tg.Kernels(tg.dense_attention())
    expected = 3 * 32 * tg.estimate_flops(cfg, plan, 32)
    with FlopCounterMode(display=False) as counter:
        loss = model.total_loss(batch, plan, torch.float32)
    assert counter.get_total_flops() == expected
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * expected
