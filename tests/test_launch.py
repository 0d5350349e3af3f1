"""./run.sh train and demo: knobs from arguments, environment and folder; processes, threads, signals, status."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_gpt as tg
from tools import launch
from tools.common import ToolError

ROOT = launch.ROOT
TRAINER = """
import json, os, signal, sys, time
open(os.environ["TOLD"], "w").write(json.dumps(dict(env=dict(os.environ))))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
time.sleep(float(os.environ.get("SECONDS", 0)))
sys.exit(int(os.environ.get("STATUS", 0)))
"""


@pytest.fixture
def start(tmp_path: Path):
    """Starts the launcher with a stand-in for the trainer that writes down what it was given; `told` reads that."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    driver = f"""
import sys
from tools import launch
launch.command = lambda count: [sys.executable, {str(tmp_path / "trainer.py")!r}]
sys.argv[0] = "launch"
sys.exit(launch.program(launch.main, "launch"))
"""

    def begin(*arguments: str, **env: str) -> subprocess.Popen:
        told = {"TOLD": str(tmp_path / "told"), "LOG_DIR": str(tmp_path / "logs"), "DEVICE": "cpu", **env}
        return subprocess.Popen([sys.executable, "-c", driver, "train", *arguments], cwd=ROOT, text=True,
                                env={"PATH": os.environ["PATH"], **told}, stderr=subprocess.PIPE)
    return begin


def told(folder: Path, seconds: float = 20) -> dict:
    """What the stand-in was given, as soon as it is there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            return json.loads((folder / "told").read_text())
        except (OSError, ValueError):
            time.sleep(0.02)
    raise AssertionError("the trainer was not started")


# -- knobs -----------------------------------------------------------------------------------------------

def test_arguments_come_before_the_environment_and_that_before_the_folder(tmp_path):
    (tmp_path / "config.env").write_text("\ufeff# a comment\n\n  SEED=1 \nMATRIX_LR=0.1\nTTT=lora\nEMA_DECAY=0.9\n"
                                         "LQER_RANK=4")
    env, warnings = launch.knobs_of([str(tmp_path), "SEED=3", "TTT_ENABLED=0"], {"SEED": "2", "MATRIX_LR": "0.2"})
    assert env == {"SEED": "3", "MATRIX_LR": "0.2", "TTT": "none", "EMA_DECAY": "0.9"}
    assert [warning.split(":")[0].split("=")[0] for warning in warnings] == ["LQER_RANK", "TTT_ENABLED"]


@pytest.mark.parametrize("text, said", [
    (b"LD_PRELOAD=/x.so", "expected KNOB=value"), (b"SEED=1\nPATH=.", "'PATH=.'"), (b"SEED", "'SEED'"),
    (b"SEED[$(touch ran)]=1", "expected KNOB=value"), (b"NPROC=2", "'NPROC=2'"), (b"\xff\xfe=\x00", "expected KNOB"),
    (b"SEED=1\n" * 10_000, "over 64 KiB"), (None, "no config.env there")])
def test_a_folder_gives_knobs_and_nothing_else(text, said, tmp_path):
    """Whoever made it may have put in what loaders and interpreters obey."""
    if text is not None:
        (tmp_path / "config.env").write_bytes(text)
    with pytest.raises(ToolError, match="config.env") as error:
        launch.knobs_of([str(tmp_path)], {})
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("argument, said", [("SEEDS=1", "did you mean SEED?"), ("seed=1", "expected KNOB=value"),
                                            ("nowhere", "no config.env"), ("NPROC=x", "NPROC=x: expected a number"),
                                            ("AUDIT=yes", "AUDIT=yes: expected 0 or 1")])
def test_a_mistake_is_one_line_and_nothing_starts(argument, said, start, tmp_path):
    process = start(argument)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2 and said in err and err.count("\n") == 1 and not (tmp_path / "told").exists()


# -- processes -------------------------------------------------------------------------------------------

def test_processes_and_threads(monkeypatch):
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert launch.processes({"DEVICE": "cpu"}) == 1 and launch.processes({"NPROC": "4", "DEVICE": "cpu"}) == 4
    assert launch.with_threads({"DEVICE": "cpu"}, 4)["OMP_NUM_THREADS"] == "3"
    assert launch.with_threads({"DEVICE": "cpu", "OMP_NUM_THREADS": "5"}, 4)["OMP_NUM_THREADS"] == "5"
    assert launch.with_threads({"DEVICE": "cpu", "OMP_NUM_THREADS": ""}, 24)["OMP_NUM_THREADS"] == "1"
    assert launch.with_threads({"DEVICE": "cpu", "GOMP_SPINCOUNT": "7"}, 1)["GOMP_SPINCOUNT"] == "7"
    monkeypatch.setattr(launch, "gpus", lambda env: 8)
    assert launch.processes({}) == 8 and "OMP_NUM_THREADS" not in launch.with_threads({}, 8)
    assert "--nproc_per_node=8" in launch.command(8) and len(launch.command(1)) == 2


def test_a_run_gets_the_signals_and_its_status_is_the_launchers(start, tmp_path):
    process = start("SEED=5", "NPROC=1", "AUDIT=1", SECONDS="300")
    given = told(tmp_path)
    assert given["env"]["SEED"] == "5" and not {"NPROC", "AUDIT"} & set(given["env"])
    assert given["env"]["RUN_ID"].startswith("record-")
    process.terminate()
    assert process.wait(120) == 143  # and nothing is audited
    assert start(STATUS="3").wait(120) == 3
    status = launch.forwarded([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], os.environ)
    assert status == 128 + signal.SIGKILL


def test_locks_that_the_launcher_was_given_are_the_trainers_too(tmp_path):
    """A sweep that was killed sees by them that its run goes on."""
    read, write = os.pipe()
    os.set_inheritable(write, True)
    status = launch.forwarded([sys.executable, "-c", f"import os; os.write({write}, b'x')"], os.environ)
    assert status == 0 and os.read(read, 1) == b"x"
    os.close(read)
    os.close(write)


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """What would have been run, in turn: module or script, and arguments."""
    seen: list[list[str]] = []
    monkeypatch.setattr(launch, "forwarded", lambda command, env: seen.append([Path(c).name for c in command[1:]]) or 0)
    return seen


def test_a_run_is_audited_by_its_own_log(commands):
    assert launch.train({"AUDIT": "1", "RUN_ID": "r", "LOG_DIR": "l", "DEVICE": "cpu"}) == 0
    assert commands == [["train_gpt.py"], ["-m", "tools.audit", "r.bin", "LOG=l/r.jsonl".split("/")[-1]]]


def test_the_demo_prepares_data_and_trains_at_this_machines_size(commands, capsys, monkeypatch):
    monkeypatch.setattr(launch.sample, "samples", lambda artifact: [f"text of {artifact}"])
    assert launch.demo({"DEVICE": "cpu", "RUN_ID": "d"}) == 0
    assert [command[:3] for command in commands] == [["-m", "data.prepare", "demo"], ["train_gpt.py"]]
    out = capsys.readouterr().out
    assert "GFLOP/s" in out and "text of logs/d.bin" in out and 1 <= launch.idle_cores(0.01) <= launch.cores()
    assert [launch.size_of(speed, flags) for speed, flags in ((500.0, "avx2 amx_bf16"), (100.0, "avx2"), (9.0, ""))] \
        == ["large", "small", "tiny"]
    for size in launch.SIZES.values():
        tg.Config.from_env({"PRESET": "demo", **size})


def test_a_run_ends_with_its_table_and_a_page_of_pictures(tmp_path, capsys):
    log = tmp_path / "r.jsonl"
    log.write_text('{"seconds": 1, "event": "config", "preset": "demo", "train_batch_tokens": 8}\n')
    launch.finish(log)
    assert f"pictures: {tmp_path / 'r.html'}" in capsys.readouterr().out and (tmp_path / "r.html").stat().st_size > 1000
    assert launch.run_id({"RUN_ID": "r", "LOG_DIR": str(tmp_path)}) == "r"


def test_a_name_of_a_run_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.time, "strftime", lambda form: "now")
    (tmp_path / "demo-now.jsonl").touch()
    assert launch.run_id({"PRESET": "demo", "LOG_DIR": str(tmp_path)}) == "demo-now-2"


def test_a_mirror_that_is_missing_is_said_before_training(commands, monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolError, match="wandb: not installed; .* -m pip install wandb"):
        launch.train({"WANDB": "1", "DEVICE": "cpu"})
    assert commands == []
