"""Section 8, schedules: what they are at the corners and between."""
import pytest
from conftest import tiny

import train_gpt as tg


@pytest.mark.parametrize("x, expected", [(-1, 0), (0.2, 0), (0.3, 0.25), (0.4, 0.5), (0.6, 1), (7, 1)])
def test_a_ramp_is_0_before_its_start_1_after_its_end_and_linear_between(x, expected):
    assert tg.ramp(x, 0.2, 0.6) == pytest.approx(expected, abs=1e-12)


def test_a_ramp_of_no_length_is_a_step():
    assert tg.ramp(5, 5, 5) == 1.0


@pytest.mark.parametrize("warmdown", [0.0, 0.3, 0.85, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_the_learning_rate_follows_the_records(warmdown, floor):
    """1 while frac < 1 - w, else max((1 - frac) / w, MIN_LR)."""
    cfg = tiny(warmdown_frac=warmdown, min_lr=floor)
    for frac in [i / 40 for i in range(41)]:
        expected = 1.0 if frac < 1 - warmdown or warmdown == 0 else max((1 - frac) / warmdown, floor)
        assert tg.lr_scale(cfg, frac) == pytest.approx(expected, abs=1e-12)


def test_the_learning_rate_never_rises_and_ends_at_its_floor_also_past_the_budget():
    cfg = tiny(warmdown_frac=0.85, min_lr=0.1)
    scales = [tg.lr_scale(cfg, i / 100) for i in range(121)]
    assert scales[0] == 1.0 and scales == sorted(scales, reverse=True) and set(scales[100:]) == {0.1}


@pytest.mark.parametrize("step, expected", [(0, 0.92), (375, 0.9325), (750, 0.945), (1500, 0.97), (9000, 0.97)])
def test_momentum_rises_linearly_to_its_value(step, expected):
    cfg = tiny(muon_momentum_warmup_start=0.92, muon_momentum=0.97, muon_momentum_warmup_steps=1500)
    assert tg.muon_momentum(cfg, step) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("step", [0, 1, 100])
def test_momentum_without_warm_up_is_its_value_from_the_first_step(step):
    cfg = tiny(muon_momentum_warmup_start=0.5, muon_momentum=0.9, muon_momentum_warmup_steps=0)
    assert tg.muon_momentum(cfg, step) == 0.9


@pytest.mark.parametrize("x, expected", [(0.3, 0.0), (0.5, 1.0)])
def test_a_ramp_of_no_length(x, expected):
    assert tg.ramp(x, 0.5, 0.5) == expected
