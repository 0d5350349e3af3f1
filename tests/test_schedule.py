"""Section 8, schedules and the clock: what they are at the corners and between, in simulated time."""
import contextlib
import dataclasses
import types

import pytest
import torch
from conftest import tiny

import train_gpt as tg


def test_a_ramp_and_momentum_rise_linearly_between_their_start_and_end_and_stay_there():
    xs, expected = (-1, 0.2, 0.3, 0.4, 0.6, 7), (0, 0, 0.25, 0.5, 1, 1)
    assert [tg.ramp(x, 0.2, 0.6) for x in xs] == pytest.approx(expected, abs=1e-12) and tg.ramp(5, 5, 5) == 1
    cfg = tiny(muon_momentum_warmup_start=0.92, muon_momentum=0.97, muon_momentum_warmup_steps=1500)
    steps, expected = (0, 375, 750, 1500, 9000), (0.92, 0.9325, 0.945, 0.97, 0.97)
    assert [tg.muon_momentum(cfg, step) for step in steps] == pytest.approx(expected, abs=1e-12)
    assert tg.muon_momentum(dataclasses.replace(cfg, muon_momentum_warmup_steps=0), 0) == 0.97


@pytest.mark.parametrize("warmdown", [0.0, 0.3, 0.85, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_the_learning_rate_follows_the_records(warmdown, floor):
    """1 while progress < 1 - w, else max((1 - progress) / w, MIN_LR); it never rises, also past the budget."""
    cfg = tiny(warmdown_frac=warmdown, min_lr=floor)
    scales = [tg.lr_scale(cfg, i / 40) for i in range(49)]
    for i, scale in enumerate(scales):
        expected = 1.0 if i / 40 < 1 - warmdown or warmdown == 0 else max((1 - i / 40) / warmdown, floor)
        assert scale == pytest.approx(expected, abs=1e-12)
    assert scales == sorted(scales, reverse=True)


@pytest.mark.parametrize("knobs", [dict(), dict(enable_looping_at=0), dict(enable_looping_at=1), dict(num_loops=0),
                                   dict(quant="sdclip", qat_start=0.7), dict(quant="sdclip", qat_start=0)])
def test_stages_follow_the_used_fraction_of_the_budget_and_are_all_known_before(knobs):
    cfg = tiny(**knobs)
    seen = [tg.stage_at(cfg, i / 100) for i in range(100)]
    assert seen == [(i / 100 >= cfg.enable_looping_at and cfg.num_loops > 0, i / 100 >= cfg.qat_start)
                    for i in range(100)]
    assert tg.stages(cfg) == list(dict.fromkeys(seen))


def process(is_cuda: bool = False, broadcast=lambda t: t) -> types.SimpleNamespace:
    """As much of a `Run` as a clock asks for."""
    return types.SimpleNamespace(is_cuda=is_cuda, synchronize=lambda: None, broadcast=broadcast)


def steps_within(budget: float, seconds: list[float], run: types.SimpleNamespace | None = None, **knobs: object
                 ) -> list[float]:
    """The used fraction at the beginning of each step that is taken, where step i lasts seconds[i]."""
    time, used = types.SimpleNamespace(now=100.0), []
    cfg = tiny(max_wallclock_seconds=budget + 2, gptq_reserve_seconds=2, **{"iterations": 10 ** 6, **knobs})
    clock = tg.TrainClock(cfg, run or process(), now=lambda: time.now)
    while (progress := clock.progress(len(used))) < 1:
        time.now += seconds[len(used)]
        used.append(progress)
    return used


def test_training_stops_before_the_step_that_would_cross_the_budget_and_no_step_earlier():
    """A step is measured by the one before: the loop makes steps longer. ITERATIONS also ends a budget, or alone."""
    for each, steps in ((0.75, 13), (1.0, 10), (3.0, 3), (6.0, 1), (10.0, 1)):
        assert steps_within(10, [each] * 20) == pytest.approx([i * each / 10 for i in range(steps)])
    assert len(steps_within(11.6, [1.0] * 4 + [2.0] * 9)) == 7
    assert len(steps_within(10, [1.0] * 20, iterations=3)) == 3
    assert steps_within(-2, [1.0] * 20, iterations=7) == [step / 7 for step in range(7)]
    seconds = [4.0, 2.0, 1.5, 1.5, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    for budget in (4.0, 5.9, 6.0, 7.4, 9.0, 9.1, 11.2):  # never crossed while steps do not slow down
        taken = len(steps_within(budget, seconds))
        assert sum(seconds[:taken]) <= budget < sum(seconds[:taken]) + seconds[taken - 1]


def test_a_gpu_is_waited_for_every_eighth_step_and_steps_between_are_extrapolated():
    waits = []
    gpu = process(is_cuda=True)
    gpu.synchronize = lambda: waits.append(1)
    used = steps_within(7, [0.1] * 99, gpu)
    assert len(used) == 70 and len(waits) <= 2 + 70 // 8
    assert used[8:] == pytest.approx([i / 70 for i in range(8, 70)])


@pytest.mark.parametrize("is_cuda", [False, True])
def test_pauses_are_not_charged(is_cuda):
    time, step = types.SimpleNamespace(now=100.0), 0
    cfg = tiny(max_wallclock_seconds=42, gptq_reserve_seconds=2, iterations=999)
    clock = tg.TrainClock(cfg, process(is_cuda), now=lambda: time.now)
    while clock.progress(step) < 1:
        time.now += 1
        step += 1
        with clock.pause() if step % 10 == 0 else contextlib.nullcontext():
            time.now += 50 * (step % 10 == 0)
        assert clock.seconds() == pytest.approx(step)
    assert step == 40


def test_a_clock_goes_on_where_a_checkpoint_was_made_and_is_that_of_rank_0():
    """What is broadcast decides, not what this process measured."""
    cfg, seconds = tiny(max_wallclock_seconds=12, gptq_reserve_seconds=2, iterations=99), iter((50, 50, 51))
    clock = tg.TrainClock(cfg, process(), step=6, elapsed=6.0, now=lambda: next(seconds))
    assert [clock.progress(6), clock.progress(7)] == pytest.approx([0.6, 0.7])
    follower = process(broadcast=lambda t: t.copy_(torch.tensor([6.0, 1.0])))
    assert tg.TrainClock(cfg, follower).progress(3) == 0.6
