"""WANDB=1 and TENSORBOARD=1 copy a run's log, from a process of its own that cannot harm the run."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, tiny

import train_gpt as tg

FAKE_WANDB = '''
import json, os, time
def told(what):
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps(what) + "\\n")
class Settings:
    def __init__(self, **values): pass
class Run:
    def define_metric(self, name, step_metric): told(["metric", name, step_metric])
    def log(self, values):
        if values["step"] == int(os.environ.get("FAIL_AT", -1)): raise OSError("no room\\nleft")
        told(values)
    def finish(self): told("finished")
def init(**values):
    told([values["id"], values["config"]["seed"], os.environ["WANDB_PROJECT"]])
    return Run()
'''
FAKE_TENSORBOARD = {
    **dict.fromkeys((f"{d}__init__" for d in ("", "compat/", "compat/proto/", "summary/", "summary/writer/")), ""),
    "compat/proto/event_pb2": "class Event(dict): pass",
    "compat/proto/summary_pb2": "class Summary(dict):\n Value = dict",
    "summary/writer/event_file_writer": '''
import json, os
class EventFileWriter:
    def __init__(self, folder): self.folder, self.events = folder, []
    def add_event(self, event): self.events.append(event)
    def close(self):
        os.makedirs(self.folder)
        json.dump(self.events, open(self.folder + "/events", "w"))
'''}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages wandb and tensorboard that write down what they are told; returns wandb's file."""
    packages = tmp_path / "packages"
    for name, text in {"wandb": FAKE_WANDB, **{f"tensorboard/{n}": t for n, t in FAKE_TENSORBOARD.items()}}.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.setattr(sys, "path", [str(packages), *sys.path])
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    return tmp_path / "told"


def a_run(folder: Path, *stages: object, **knobs: object) -> tg.Run:
    """A run that logs a few events, calls `stages` between them, and has ended."""
    cfg = tiny(log_dir=str(folder), run_id="r", wandb=True, tensorboard=True, **knobs)
    with tg.Run(cfg, {}) as run:
        run.log("start", world=1)
        run.record("config", {"seed": 7, "train_batch_tokens": 100})
        assert run.start_mirror() == ""
        for step, loss in ((1, 3.5), (2, 2.5), (3, float("nan"))):
            run.log("train", step=step, loss_nats=loss, text="x", flag=True)
        for stage in stages:
            stage(run)
        run.log("score", name="ema", val_bpb=1.25)
        run.log("verdict", val_bpb=1.25, steps=4, ladder={"ema": 1.25})
    return run


def wandbs(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


TOLD = [["r", 7, "mine"], ["metric", "*", "step"],
        {"step": 1, "train/loss_nats": 3.5, "train/flag": 1.0, "tokens": 100.0},
        {"step": 2, "train/loss_nats": 2.5, "train/flag": 1.0, "tokens": 200.0},
        {"step": 3, "train/flag": 1.0, "tokens": 300.0}, {"step": 3, "score/ema/val_bpb": 1.25, "tokens": 300.0},
        {"step": 4, "verdict/val_bpb": 1.25, "verdict/steps": 4.0, "tokens": 400.0}, "finished"]


def test_a_run_is_copied_while_it_goes_on_and_a_log_afterwards(fakes: Path, tmp_path: Path):
    """Each event once, by step and tokens, numbers that are finite alone; also of a run that is gone on with."""
    def grown(run: tg.Run) -> None:
        deadline = time.monotonic() + 20
        while not fakes.exists() or len(wandbs(fakes)) < 5:
            assert time.monotonic() < deadline, "nothing was copied while the run went on"
            time.sleep(0.05)

    a_run(tmp_path, grown)
    assert wandbs(fakes) == TOLD
    events = json.loads((tmp_path / "tensorboard" / "r" / "events").read_text())
    assert [{"step": e["step"], **{v["tag"]: v["simple_value"] for v in e["summary"]["value"]}} for e in events] == \
        TOLD[2:-1]
    assert all(abs(e["wall_time"] - time.time()) < 120 for e in events)
    fakes.unlink()
    command = [sys.executable, ROOT / "records" / "mirror.py", tmp_path / "r.jsonl", "wandb"]
    with open(tmp_path / "r.jsonl", "a") as file:
        file.write('{"seconds": 9, "ev')
    assert subprocess.run(command).returncode == 0 and wandbs(fakes) == TOLD
    text = (tmp_path / "r.jsonl").read_text()
    before = '{"seconds": 0, "event": "start"}\n{"seconds": 1, "event": "train", "step": 9}\n'
    (tmp_path / "r.jsonl").write_text(before + text)
    fakes.unlink()
    assert subprocess.run([*command, "--follow"], stdin=subprocess.DEVNULL).returncode == 0 and wandbs(fakes) == TOLD


def test_a_mirror_that_fails_is_named_once_and_the_run_goes_on(fakes: Path, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setenv("FAIL_AT", "2")
    run = a_run(tmp_path)
    assert run._mirror.returncode == 1 and wandbs(fakes) == TOLD[:3] and (tmp_path / "tensorboard").exists()
    assert '"verdict"' in (tmp_path / "r.jsonl").read_text()
    told = [line for line in capfd.readouterr().err.splitlines() if "mirror.py" in line]
    assert len(told) == 1 and told[0].startswith("mirror.py: wandb stopped: OSError: no room; the run is not affected")


def test_a_mirror_that_is_killed_or_hangs_cannot_hold_the_run_up(fakes: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tg.subprocess.Popen, "wait", lambda self, timeout=None: assert_limited(self, timeout))
    run = a_run(tmp_path, lambda run: os.kill(run._mirror.pid, signal.SIGSTOP))
    assert '"verdict"' in (tmp_path / "r.jsonl").read_text() and run._mirror.poll() is None
    os.kill(run._mirror.pid, signal.SIGKILL)


def assert_limited(process: subprocess.Popen, timeout: float | None) -> None:
    assert timeout is not None and timeout <= 30
    raise subprocess.TimeoutExpired("mirror", timeout)


def test_what_is_missing_is_said_before_training(tmp_path: Path, monkeypatch, run: tg.Run):
    """A package by its pip command; the script itself, in a submission's folder, by a warning alone."""
    monkeypatch.setattr(tg.importlib.util, "find_spec", lambda name: None)
    with tg.Run(tiny(log_dir=str(tmp_path), run_id="a", wandb=True, tensorboard=True), {}) as asked:
        problem = asked.start_mirror()
        assert problem.startswith("WANDB=1: ") and problem.endswith("-m pip install wandb tensorboard")
        monkeypatch.setattr(tg, "__file__", str(tmp_path / "train_gpt.py"))
        assert asked.start_mirror() == "" and asked._mirror is None
    assert "warning" in (tmp_path / "a.txt").read_text() and run.start_mirror() == ""
    asked.rank = 1
    monkeypatch.undo()
    assert asked.start_mirror() == "" and asked._mirror is None


def test_preflight_ends_a_run_whose_mirror_is_missing(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tg.Run, "start_mirror", lambda self: "WANDB=1: not installed")
    from test_main import environment
    assert tg.main([], environment(dataset, tmp_path, wandb=True)) == 2
    assert capsys.readouterr().err == "train_gpt.py: WANDB=1: not installed\n"
