"""WANDB=1 and TENSORBOARD=1 copy a run's log, from a process of its own that cannot harm the run."""
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import refusal

from tools import launch, mirror

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
    monkeypatch.syspath_prepend(packages)
    for name, value in {"PYTHONPATH": packages, "TOLD": tmp_path / "told", "WANDB_PROJECT": "mine"}.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path / "told"


def log(folder: Path, **event: object) -> None:
    """One line at the end of the log, as a run writes it."""
    with open(folder / "r.jsonl", "a") as file:
        file.write(json.dumps({"seconds": 1.0, **event}) + "\n")


def a_run(folder: Path, between: Callable[[], object] = lambda: None) -> None:
    """Log a few events with both mirrors beside it; `between` is called in the middle."""
    env = {**os.environ, "LOG_DIR": str(folder), "RUN_ID": "r"}
    with launch.mirrored(env, ["wandb", "tensorboard"]):
        log(folder, event="start", world=1)
        log(folder, event="config", seed=7, train_batch_tokens=100)
        for step, loss in ((1, 3.5), (2, 2.5), (3, None)):
            log(folder, event="train", step=step, loss_nats=loss, text="x", flag=True)
        between()
        log(folder, event="score", name="ema", val_bpb=1.25)
        log(folder, event="verdict", val_bpb=1.25, steps=4, diagnostic_evals={"ema": 1.25})


def wandbs(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


TOLD = [["r", 7, "mine"], ["metric", "*", "step"],
        {"step": 1, "train/loss_nats": 3.5, "train/flag": 1.0, "tokens": 100.0},
        {"step": 2, "train/loss_nats": 2.5, "train/flag": 1.0, "tokens": 200.0},
        {"step": 3, "train/flag": 1.0, "tokens": 300.0}, {"step": 3, "score/ema/val_bpb": 1.25, "tokens": 300.0},
        {"step": 4, "verdict/val_bpb": 1.25, "verdict/steps": 4.0, "tokens": 400.0}, "finished"]


def test_a_run_is_copied_while_it_goes_on_and_a_log_afterwards(fakes: Path, tmp_path: Path, monkeypatch):
    """Each event once, by step and tokens, numbers that are finite alone; of a resumed run what is new."""
    def grown() -> None:
        end = time.monotonic() + 20
        while not fakes.exists() or len(wandbs(fakes)) < 5:
            assert time.monotonic() < end, "nothing was copied while the run went on"
            time.sleep(0.05)

    log(tmp_path, event="train", step=9)  # of the run's first part
    a_run(tmp_path, grown)
    assert wandbs(fakes) == TOLD
    events = json.loads((tmp_path / "tensorboard" / "r" / "events").read_text())
    assert [{"step": e["step"], **{v["tag"]: v["simple_value"] for v in e["summary"]["value"]}} for e in events] == \
        TOLD[2:-1]
    assert all(abs(e["wall_time"] - time.time()) < 120 for e in events)
    fakes.unlink()
    text = (tmp_path / "r.jsonl").read_text().partition("\n")[2]
    (tmp_path / "r.jsonl").write_text(text + '{"seconds": 9, "ev')  # a crash cut the last line short
    done = subprocess.run([sys.executable, "-m", "tools.mirror", tmp_path / "r.jsonl", "wandb"], cwd=launch.ROOT)
    assert done.returncode == 0 and wandbs(fakes) == TOLD


def test_a_mirror_that_fails_is_named_once_and_the_other_goes_on(fakes: Path, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setenv("FAIL_AT", "2")
    a_run(tmp_path)
    assert wandbs(fakes) == TOLD[:3] and (tmp_path / "tensorboard").exists()
    err = capfd.readouterr().err
    assert err.startswith("mirror: wandb stopped: OSError: no room; the run is not affected") and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["r"], ["r", "nonsense"], ["r", "--follow=1"], ["r", "wandb", "--follow=x"]])
def test_what_cannot_be_copied_is_one_line(arguments):
    assert refusal(mirror.main, arguments).startswith("expected a run")
