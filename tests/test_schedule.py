"""Section 8, schedules and the clock: what they are at the corners and between, in simulated time."""
import contextlib
import types

import pytest
import torch
from conftest import tiny

import train_gpt as tg


@pytest.mark.parametrize("x, expected", [(-1, 0), (0.2, 0), (0.3, 0.25), (0.4, 0.5), (0.6, 1), (7, 1)])
def test_a_ramp_is_0_before_its_start_1_after_its_end_and_linear_between(x, expected):
    assert tg.ramp(x, 0.2, 0.6) == pytest.approx(expected, abs=1e-12)
    assert tg.ramp(5, 5, 5) == 1  # of no length: its end


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


@pytest.mark.parametrize("step, expected", [(0, 0.92), (375, 0.9325), (750, 0.945), (1500, 0.97), (9000, 0.97)])
def test_momentum_rises_linearly_to_its_value(step, expected):
    knobs = dict(muon_momentum_warmup_start=0.92, muon_momentum=0.97)
    assert tg.muon_momentum(tiny(**knobs, muon_momentum_warmup_steps=1500), step) == pytest.approx(expected, abs=1e-12)
    assert tg.muon_momentum(tiny(**knobs, muon_momentum_warmup_steps=0), step) == 0.97


@pytest.mark.parametrize("knobs", [dict(), dict(enable_looping_at=0), dict(enable_looping_at=1), dict(num_loops=0),
                                   dict(quant="sdclip", qat_start=0.7), dict(quant="sdclip", qat_start=0)])
def test_stages_follow_the_used_fraction_of_the_budget_and_are_all_known_before(knobs):
    cfg = tiny(**knobs)
    seen = [tg.stage_at(cfg, i / 100) for i in range(100)]
    assert seen == [(i / 100 >= cfg.enable_looping_at and cfg.num_loops > 0, i / 100 >= cfg.qat_start)
                    for i in range(100)]
    assert tg.stages(cfg) == list(dict.fromkeys(seen))


class Ticks:
    """A clock that moves only when a test says so."""
    at = 100.0

    def __call__(self) -> float:
        return self.at


def process(is_cuda: bool = False, broadcast=lambda t: t) -> types.SimpleNamespace:
    """As much of a `Run` as a clock asks for."""
    return types.SimpleNamespace(is_cuda=is_cuda, synchronize=lambda: None, broadcast=broadcast)


def steps_within(budget: float, seconds: list[float], run: types.SimpleNamespace | None = None, **knobs: object
                 ) -> list[float]:
    """The used fraction at the beginning of each step that is taken, where step i lasts seconds[i]."""
    now, used = Ticks(), []
    cfg = tiny(max_wallclock_seconds=budget + 2, gptq_reserve_seconds=2, **{"iterations": 10 ** 6, **knobs})
    clock = tg.TrainClock(cfg, run or process(), now=now)
    while (progress := clock.progress(len(used))) < 1:
        now.at += seconds[len(used)]
        used.append(progress)
    return used


def test_a_step_budget_counts_steps_exactly():
    clock = tg.TrainClock(tiny(max_wallclock_seconds=0, iterations=7), process())
    assert [clock.progress(step) for step in range(8)] == [step / 7 for step in range(8)]


@pytest.mark.parametrize("each, steps", [(0.75, 13), (1.0, 10), (2.5, 4), (3.0, 3), (6.0, 1), (10.0, 1)])
def test_training_stops_before_the_step_that_would_cross_the_budget(each, steps):
    """And not a step earlier."""
    assert steps_within(10, [each] * 20) == pytest.approx([i * each / 10 for i in range(steps)])


def test_a_step_is_measured_by_the_one_before_and_iterations_also_end_a_budget():
    """The loop makes steps longer: the last one counts, not the average."""
    assert len(steps_within(11.6, [1.0] * 4 + [2.0] * 9)) == 7
    assert len(steps_within(10, [1.0] * 20, iterations=3)) == 3
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
    now, step = Ticks(), 0
    cfg = tiny(max_wallclock_seconds=42, gptq_reserve_seconds=2, iterations=999)
    clock = tg.TrainClock(cfg, process(is_cuda), now=now)
    while clock.progress(step) < 1:
        now.at += 1
        step += 1
        with clock.pause() if step % 10 == 0 else contextlib.nullcontext():
            now.at += 50 * (step % 10 == 0)
        assert clock.seconds() == pytest.approx(step)
    assert step == 40


def test_a_clock_goes_on_where_a_checkpoint_was_made_and_is_that_of_rank_0():
    """What is broadcast decides, not what this process measured."""
    cfg, now = tiny(max_wallclock_seconds=12, gptq_reserve_seconds=2, iterations=99), Ticks()
    clock = tg.TrainClock(cfg, process(), step=6, elapsed=6.0, now=now)
    assert clock.progress(6) == pytest.approx(0.6)
    now.at += 1
    assert clock.progress(7) == pytest.approx(0.7)
    follower = process(broadcast=lambda t: t.copy_(torch.tensor([6.0, 1.0])))
    assert tg.TrainClock(cfg, follower).progress(3) == 0.6
