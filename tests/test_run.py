"""Section 2, Run: phases, log, names, signals, collectives of one process, and checkpoint files."""
import contextlib
import json
import os
import resource
import signal

import pytest
import torch
from conftest import events, tiny

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


def test_every_second_is_charged_once_to_the_innermost_phase(clock, run):
    with run.phase("outer", "train"):
        clock.now += 1
        with run.phase("inner", "eval"):
            clock.now += 4
        clock.now += 2
    clock.now += 16  # between phases: to neither
    with run.phase("score", "eval"):
        clock.now += 8
    spent = [run.spent(budget) for budget in ("train", "eval", "none")]
    assert spent == [3, 12, 16] and sum(spent) == clock.now - run.started
    assert [(e["name"], e["phase_seconds"]) for e in events(run.folder, "phase")] == [
        ("inner", 4), ("outer", 7), ("score", 8)]


def test_a_phase_that_fails_is_charged_and_remains_the_place(clock, run):
    """Where did it happen?"""
    with pytest.raises(ZeroDivisionError), run.phase("broken", "train"):
        clock.now += 3
        raise ZeroDivisionError
    assert run.status == "broken" and run.spent("train") == 3


def test_a_value_in_the_log_is_one_word():
    values = (True, 3, 0.1, 2 / 3, 1e-8, 600.0, "a:b", None, [1, 2.5], {"a": 1})
    assert [tg.format_value(value) for value in values] == [
        "true", "3", "0.1", "0.6666667", "1e-08", "600", "a:b", "null", "[1,2.5]", '{"a":1}']


def test_a_line_is_on_disk_at_once_and_its_json_says_the_same(clock, run, capsys):
    clock.now = run.started + 12.345
    run.log("train", step=7, loss_nats=2.5, shape=[1, 2])
    line = "     12.3 train          step=7 loss_nats=2.5 shape=[1,2]"
    assert run.path(".txt").read_text() == line + "\n" and capsys.readouterr().out == ""  # not one for the screen
    assert events(run.folder, "train") == [{"seconds": 12.345, "event": "train", "step": 7, "loss_nats": 2.5,
                                            "shape": [1, 2]}]
    run.log("warning", text="a\nb", loss=float("nan"))
    assert len(run.path(".txt").read_text().splitlines()) == 2  # an event is one line and JSON whatever it says
    assert capsys.readouterr().out == "   12.3  warning: a b\n"
    assert '"loss": null' in run.path(".jsonl").read_text()


def test_a_full_disk_ends_no_run_and_costs_no_line_once_there_is_room(run, capsys):
    run.log("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (run.path(".txt").stat().st_size + 8, limits[1]))
    try:
        for i in range(3):
            run.log("meanwhile", i=i)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.log("after")
    assert f"train_gpt.py: {run.path('.txt')}: " in capsys.readouterr().err
    names = [json.loads(line)["event"] for line in run.path(".jsonl").read_text().splitlines()]
    assert names == ["before", *["meanwhile"] * 3, "after"]
    assert [line.split()[1] for line in run.path(".txt").read_text().splitlines()] == names


def test_only_rank_0_writes(tmp_path, capsys, monkeypatch):
    """Neither files nor the screen."""
    def second(self, cfg, env, begin=tg.Ranks.__init__):
        begin(self, cfg, env)
        self.rank, self.is_main = 1, False

    monkeypatch.setattr(tg.Ranks, "__init__", second)
    with tg.Run(tiny(log_dir=str(tmp_path / "logs"), run_id="r"), {}) as run:
        with run.phase("a", "train"):
            run.log("event", x=1)
        assert run.progress(1, "bar", "step").disable
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".bin", ".ckpt"])
def test_nothing_of_another_run_is_written_over_and_nothing_is_left_behind(suffix, tmp_path):
    old = tmp_path / f"own{suffix}"
    old.write_text("old")
    with pytest.raises(tg.UserError) as error:
        tg.Run(tiny(log_dir=str(tmp_path), run_id="own"), {})
    message = str(error.value)
    assert "RUN_ID=own" in message and str(old) in message and "\n" not in message
    assert old.read_text() == "old" and list(tmp_path.iterdir()) == [old]
    with pytest.raises(tg.UserError, match="LOG_DIR="):  # a folder that is a file
        tg.Run(tiny(log_dir=str(old)), {})


def test_a_run_is_named_by_its_knobs_and_runs_of_one_second_are_numbered(clock, tmp_path):
    name = "record-20260101-000000-seed42"
    with tg.Run(tiny(log_dir=str(tmp_path), seed=42), {}) as one, tg.Run(tiny(log_dir=str(tmp_path), seed=42), {}) as \
            two, tg.Run(tiny(log_dir=str(tmp_path), seed=42), {}) as three:
        assert [run.run_id for run in (one, two, three)] == [name, f"{name}-2", f"{name}-3"]
        assert three.path(".bin") == tmp_path / f"{name}-3.bin"
        three.log("hers")
    assert one.path(".txt").read_text() == "" != three.path(".txt").read_text()


def test_a_signal_outside_training_ends_the_run_at_once_and_inside_waits_for_the_step(run):
    with pytest.raises(tg.Stopped, match="SIGTERM in phase setup") as error, run.phase("setup"):
        with contextlib.suppress(Exception):  # a compiler takes what goes wrong for its own mistake
            os.kill(os.getpid(), signal.SIGTERM)
    assert error.value.exit_code == 128 + signal.SIGTERM
    run.stop, run.can_wait = 0, True
    os.kill(os.getpid(), signal.SIGINT)
    assert run.stop == signal.SIGINT
    run.path(".ckpt").write_bytes(b"")
    with pytest.raises(tg.Stopped, match="SIGINT in phase .*; RESUME=1 RUN_ID=r goes on from .*r.ckpt"):
        os.kill(os.getpid(), signal.SIGINT)  # asked twice


TENSORS = {"weights": torch.arange(6.0).view(2, 3), "count": torch.tensor(3, dtype=torch.int32)}


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    path, state = tmp_path / "r.ckpt", {"step": 3, "elapsed": 0.1, "knobs": {"run_id": "\u00e9", "seed": 2 ** 62}}
    tg.save_checkpoint(path, TENSORS, state)
    tg.save_checkpoint(path, TENSORS, state)  # over the one before
    loaded, tensors = tg.load_checkpoint(path, TENSORS)
    assert loaded == state and tensors.keys() == TENSORS.keys() and list(tmp_path.iterdir()) == [path]
    assert all(torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype
               for name, value in TENSORS.items())


@pytest.mark.parametrize("damage", [lambda good: good[:-1], lambda good: good[:-1] + bytes([good[-1] ^ 1]),
                                    lambda good: b"", lambda good: b"\x80\x04K\x01."],
                         ids=["cut", "bit", "empty", "pickle"])
def test_a_damaged_checkpoint_is_one_line(damage, tmp_path):
    path = tmp_path / "r.ckpt"
    tg.save_checkpoint(path, TENSORS, {"step": 3})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(tg.UserError, match="^.*r.ckpt: truncated or damaged.*$"):
        tg.load_checkpoint(path, TENSORS)


@pytest.mark.parametrize("like", [{"weights": TENSORS["weights"]}, {**TENSORS, "count": torch.tensor(3)},
                                  {**TENSORS, "weights": torch.zeros(3, 2)}, {**TENSORS, "more": torch.zeros(1)}])
def test_a_checkpoint_of_other_tensors_is_refused(like, tmp_path):
    tg.save_checkpoint(tmp_path / "r.ckpt", TENSORS, {"step": 3})
    with pytest.raises(tg.UserError, match="its tensors are not those of this run"):
        tg.load_checkpoint(tmp_path / "r.ckpt", like)


def test_a_write_that_fails_changes_nothing_and_leaves_nothing(tmp_path):
    path = tmp_path / "r.ckpt"
    path.write_bytes(b"the one before")
    with pytest.raises(ZeroDivisionError):
        tg.write_whole(path, lambda temporary: temporary.write_bytes(b"half") and 1 / 0)
    assert path.read_bytes() == b"the one before" and list(tmp_path.iterdir()) == [path]
