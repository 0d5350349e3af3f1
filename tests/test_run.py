"""Section 2, Run: phases, log, collectives of one process; and section 8's clock, which runs on it."""
import json
import resource
import types

import pytest
import torch
from conftest import tiny

import train_gpt as tg


class FakeTime:
    """Stands in for the module `time`: `now` moves only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def strftime(self, form: str) -> str:
        return "20260101-000000"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(tg, "time", fake)
    return fake


def events(run: tg.Run) -> list[dict]:
    """What is in the JSON lines of a run so far."""
    return [json.loads(line) for line in run.log_path.with_suffix(".jsonl").read_text().splitlines()]


# -- phases --------------------------------------------------------------------------------------------


def test_top_level_phases_and_the_gaps_between_them_are_all_the_time_there_is(clock, run):
    for seconds, gap in ((1, 0), (2, 4), (8, 16)):
        with run.phase("a"):
            clock.now += seconds
            with run.phase("inner"):
                clock.now += 32
        clock.now += gap
    top = [p for p in run.phases if p.depth == 0]
    assert [p.seconds for p in top] == [33, 34, 40]
    assert clock.now - run.started == sum(p.seconds for p in top) + 20
    assert [b.start - (a.start + a.seconds) for a, b in zip(top, top[1:])] == [0, 4]


def test_nested_phases_lie_inside_their_parent_and_are_charged_once(clock, run):
    with run.phase("outer", "train"):
        clock.now += 1
        with run.phase("middle", "train"):
            clock.now += 2
            with run.phase("inner", "eval"):
                clock.now += 4
    with run.phase("score", "eval"):
        clock.now += 8
    with run.phase("setup"):
        clock.now += 16
    assert [(p.name, p.depth, p.seconds) for p in run.phases] == [
        ("inner", 2, 4), ("middle", 1, 6), ("outer", 0, 7), ("score", 0, 8), ("setup", 0, 16)]
    assert (run.spent("train"), run.spent("eval"), run.spent("none")) == (3, 12, 16)
    assert [(e["name"], e["phase_seconds"]) for e in events(run)] == [("outer", 7), ("score", 8), ("setup", 16)]


def test_a_phase_that_fails_is_still_timed_and_leaves_its_depth(clock, run):
    with pytest.raises(ZeroDivisionError), run.phase("broken", "train"):
        clock.now += 3
        raise ZeroDivisionError
    with run.phase("next", "train"):
        clock.now += 1
    assert [(p.name, p.depth) for p in run.phases] == [("broken", 0), ("next", 0)] and run.spent("train") == 4


# -- log -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, text", [
    (True, "1"), (False, "0"), (3, "3"), (1_000_000, "1000000"), (0.1, "0.1"), (2 / 3, "0.6666667"),
    (1e-8, "1e-08"), (600.0, "600"), ("a:b", "a:b"), (None, "None"), ([1, 2.5], "[1,2.5]"), ({"a": 1}, '{"a":1}'),
    ((1, 2), "[1,2]")])
def test_a_value_in_the_log_is_one_word(value, text):
    assert tg.format_value(value) == text


def test_a_line_of_the_log_and_its_json_say_the_same(clock, run, capsys):
    clock.now = run.started + 12.345
    run.log("train", step=7, loss_nats=2.5, looped=True, shape=[1, 2])
    line = "     12.3 train          step=7 loss_nats=2.5 looped=1 shape=[1,2]"
    assert run.log_path.read_text() == line + "\n" == capsys.readouterr().out
    assert events(run) == [{"seconds": 12.345, "event": "train", "step": 7, "loss_nats": 2.5, "looped": True,
                            "shape": [1, 2]}]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(run):
    """A killed run loses nothing that it said."""
    for i in range(3):
        run.log("tick", i=i)
        assert len(run.log_path.read_text().splitlines()) == len(events(run)) == i + 1


def test_lines_for_readers_are_not_events(run):
    run.write("a table")
    assert run.log_path.read_text() == "a table\n" and events(run) == []


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_an_existing_log_is_never_written_over(suffix, tmp_path):
    old = tmp_path / f"mine{suffix}"
    old.write_text("old")
    with pytest.raises(tg.UserError) as error:
        tg.Run(tiny(log_dir=str(tmp_path), run_id="mine"), {})
    message = str(error.value)
    assert "RUN_ID=mine" in message and str(old) in message and "\n" not in message and old.read_text() == "old"


def test_only_rank_0_writes(tmp_path, capsys):
    """Neither files nor the screen."""
    with tg.Run(tiny(log_dir=str(tmp_path / "logs"), run_id="r"), {"RANK": "1"}) as run:
        assert not run.is_main
        with run.phase("a", "train"):
            run.log("event", x=1)
            run.write("line")
        assert run.progress(1, "bar", "step").disable
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
    assert [p.name for p in run.phases] == ["a"]


def test_a_run_is_named_by_its_knobs(clock, tmp_path):
    for knobs, name in (({"run_id": "mine"}, "mine"), ({"seed": "42"}, "record-20260101-000000-seed42")):
        with tg.Run(tiny(log_dir=str(tmp_path), **knobs), {}) as run:
            assert run.run_id == name and run.log_path == tmp_path / f"{name}.txt" and run.log_path.exists()
            assert run.artifact_path == tmp_path / f"{name}.bin"


def test_the_artifact_may_have_a_folder_of_its_own(tmp_path):
    with tg.Run(tiny(log_dir=str(tmp_path / "a"), artifact_dir=str(tmp_path / "b"), run_id="r"), {}) as run:
        assert run.artifact_path == tmp_path / "b" / "r.bin" and run.artifact_path.parent.is_dir()


# -- one process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["total", "broadcast", "reduce_scatter", "all_gather", "share"])
def test_collectives_of_one_process_are_identities(name, run):
    tensor = torch.arange(6.0).view(3, 2)
    result = getattr(run, name)(tensor)
    assert (result() if callable(result) else result) is tensor and tensor.flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_objects_of_one_process_are_its_own(run):
    thing = {"a": 1}
    assert run.share(thing) is thing and run.gather(thing) == [thing]


def test_agreement_raises_a_problem_and_nothing_else(run):
    run.agree("")
    with pytest.raises(tg.UserError, match="^disk full$"):
        run.agree("disk full")


# -- the clock of training -----------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 3, 7])
def test_a_step_budget_counts_steps_exactly(iterations, run):
    clock = tg.TrainClock(tiny(max_wallclock_seconds=0, iterations=iterations), run)
    assert [clock.frac(step) for step in range(iterations + 1)] == [s / iterations for s in range(iterations + 1)]


def steps_within(budget: float, seconds: list[float], clock: FakeTime, run: tg.Run, **knobs: object) -> list[float]:
    """The used fraction at the begin of each step that is taken, where step i lasts seconds[i]."""
    train = tg.TrainClock(tiny(max_wallclock_seconds=budget + 2, gptq_reserve_seconds=2,
                               **{"iterations": 10 ** 6, **knobs}), run)
    fractions = []
    while (frac := train.frac(len(fractions))) < 1:
        clock.now += seconds[len(fractions)]
        fractions.append(frac)
    return fractions


@pytest.mark.parametrize("each, steps", [(0.75, 13), (1.0, 10), (2.5, 4), (3.0, 3), (6.0, 1), (10.0, 1)])
def test_training_stops_before_the_step_that_would_cross_the_budget(each, steps, clock, run):
    """And not a step earlier."""
    fractions = steps_within(10, [each] * 20, clock, run)
    assert fractions == pytest.approx([i * each / 10 for i in range(steps)])


def test_training_never_crosses_the_budget_while_steps_do_not_slow_down(clock, run):
    seconds = [4.0, 2.0, 1.5, 1.5, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    for budget in (4.0, 5.9, 6.0, 7.4, 9.0, 9.1, 11.2):
        taken = len(steps_within(budget, seconds, clock, run))
        assert sum(seconds[:taken]) <= budget < sum(seconds[:taken]) + seconds[taken - 1]


def test_a_step_that_slows_down_is_the_measure_of_the_next(clock, run):
    """The loop makes steps longer: the last one counts, not the average."""
    assert len(steps_within(11.6, [1.0] * 4 + [2.0] * 9, clock, run)) == 7


def test_iterations_also_end_a_budget_in_seconds(clock, run):
    assert len(steps_within(10, [1.0] * 20, clock, run, iterations=3)) == 3


def test_pauses_are_not_charged(clock, run):
    train, steps = tg.TrainClock(tiny(max_wallclock_seconds=12, gptq_reserve_seconds=2, iterations=99), run), 0
    while (frac := train.frac(steps)) < 1:
        assert frac == pytest.approx(steps / 10) and train.seconds() == pytest.approx(steps)
        clock.now += 1
        steps += 1
        with train.pause():
            clock.now += 50
    assert steps == 10


def test_every_rank_takes_the_clock_of_rank_0(clock, run):
    """What is broadcast decides, not what this process measured."""
    follower = types.SimpleNamespace(is_cuda=False, synchronize=lambda: None,
                                     broadcast=lambda t: t.copy_(torch.tensor([6.0, 1.0])))
    train = tg.TrainClock(tiny(max_wallclock_seconds=12, gptq_reserve_seconds=2, iterations=99), follower)
    assert train.frac(3) == 0.6


def test_pauses_are_not_charged_on_a_gpu(monkeypatch, run):
    """An event of this instant is not finished yet."""
    time = types.SimpleNamespace(now=0.0, perf_counter=lambda: time.now)

    class Event:
        def __init__(self, **options):
            pass

        def record(self):
            self.at = time.now

        def synchronize(self):
            pass

        def query(self):
            return self.at < time.now

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(tg, "time", time)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    gpu = types.SimpleNamespace(is_cuda=True, synchronize=lambda: None, broadcast=lambda t: t)
    clock, step = tg.TrainClock(tiny(max_wallclock_seconds=8, gptq_reserve_seconds=1, iterations=999), gpu), 0
    while (frac := clock.frac(step)) < 1:
        if step > 8:
            assert frac == pytest.approx(step / 70, abs=0.02)
        time.now += 0.1
        step += 1
        if step == 16:
            with clock.pause():
                time.now += 10
    assert step == 70


def test_a_log_folder_that_is_a_file_is_called_so(tmp_path):
    (tmp_path / "logs").write_text("")
    with pytest.raises(tg.UserError, match="^LOG_DIR="):
        tg.Run(tiny(log_dir=str(tmp_path / "logs")), {})


def test_a_refused_log_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(tg.UserError):
        tg.Run(tiny(log_dir=str(tmp_path), run_id="a"), {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_one_event_is_one_line(run):
    run.log("warning", text="a\nb")
    assert len(run.log_path.read_text().splitlines()) == 1


def test_json_lines_are_json(run):
    run.log("train", loss_nats=float("nan"))
    json.loads(run.log_path.with_suffix(".jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))


# -- two runs in one folder ----------------------------------------------------------------------------


def test_runs_of_one_second_have_names_of_their_own(clock, tmp_path):
    with tg.Run(tiny(log_dir=str(tmp_path)), {}) as first, tg.Run(tiny(log_dir=str(tmp_path)), {}) as second:
        assert (first.run_id, second.run_id) == ("record-20260101-000000-seed1337", "record-20260101-000000-seed1337-2")
        assert second.artifact_path.stem == second.log_path.stem == second.run_id
        second.log("mine")
    assert first.log_path.read_text() == "" != second.log_path.read_text()


@pytest.mark.parametrize("knobs", [dict(resume="auto"), dict(resume="auto", log_dir="elsewhere")])
def test_a_run_that_is_alive_is_not_gone_on_with(knobs, tmp_path, monkeypatch):
    """Also where it shares the folder of the artifact alone; once the first has ended, nothing is in the way."""
    monkeypatch.chdir(tmp_path)
    cfg = dict(log_dir="logs", artifact_dir="artifacts", run_id="r")
    with tg.Run(tiny(**cfg), {}):
        with pytest.raises(tg.UserError, match="^RUN_ID=r: a process is at work on this run"):
            tg.Run(tiny(**{**cfg, **knobs}), {})
    with tg.Run(tiny(**{**cfg, **knobs}), {}):
        pass
    assert not list((tmp_path / "artifacts").iterdir())


# -- a full disk ---------------------------------------------------------------------------------------


def test_a_full_disk_ends_no_run_and_costs_no_line_once_there_is_room(run, capsys):
    run.log("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (run.log_path.stat().st_size + 8, limits[1]))
    try:
        for i in range(3):
            run.log("meanwhile", i=i)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.log("after")
    err = capsys.readouterr().err
    assert f"train_gpt.py: {run.log_path}: cannot write the log" in err and err.count("\n") == 1
    assert [e["event"] for e in events(run)] == ["before", *["meanwhile"] * 3, "after"]
    assert [line.split()[1] for line in run.log_path.read_text().splitlines()] == [e["event"] for e in events(run)]
