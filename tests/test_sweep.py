"""A sweep trains each run once, whatever is killed on the way. The trainer is a stand-in that writes a run's log."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, refusal
from rich.console import Console

from tools import logs
from tools import sweep as sw

TRAINER = """
import json, os, pathlib, sys, time
env, folder = os.environ, pathlib.Path(os.environ["LOG_DIR"])
with open(folder / "starts", "a") as file:
    file.write(f"{env['SEED']} {env.get('CUDA_VISIBLE_DEVICES', '')} {env['RUN_ID']}\\n")
log = open(folder / f"{env['RUN_ID']}.jsonl", "a" if env.get("RESUME") == "auto" else "x")
def write(**event):
    print(json.dumps({"seconds": 0, **event}), file=log, flush=True)
write(event="train", progress=0.5, step=7, loss_nats=3.25)
while "WAIT" in env and not (folder / "go").exists():
    time.sleep(0.02)
if env["SEED"] in env.get("BAD", "").split(":"):
    if env.get("KIND"):
        write(event="error", kind=env["KIND"], text="will not do")
    sys.exit("no luck")
if env["SEED"] in env.get("STOPS", "") and env.get("RESUME") != "auto":
    (folder / f"{env['RUN_ID']}.ckpt").touch()
    sys.exit("stopped")
if env["SEED"] in env.get("ONCE", "") and len(list(folder.glob(f"*SEED={env['SEED']}*.jsonl"))) == 1:
    sys.exit("no luck at first")
write(event="verdict", val_bpb=1 + int(env["SEED"]) / 100, bytes=40, tokens=10, total_seconds=60.0)
"""
LONE = [{}]
"""The places of a machine without a GPU."""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "trainer.py").write_text(TRAINER)
    return [sys.executable, str(tmp_path / "trainer.py")]


def jobs(*seeds: int, **knobs: str) -> list[sw.Job]:
    return [sw.Job(f"LR=1 SEED={s}", {"SEED": str(s), **knobs}, f"k{s}{'0' * 8}") for s in seeds]


def conduct(work: list[sw.Job], folder: Path, command: list[str], places=LONE) -> tuple[int, sw.Sweep, str]:
    """(exit status, sweep, what it printed) of a whole sweep."""
    console = Console(file=open(os.devnull, "w"), record=True, width=160)
    one = sw.Sweep(work, folder, places, command)
    return sw.conduct(one, console, poll=0.02), one, console.export_text()


def starts(folder: Path) -> list[list[str]]:
    """[seed, GPUs, run id] of each attempt."""
    path = folder / "starts"
    return [line.split(" ") for line in path.read_text().splitlines()] if path.exists() else []


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_runs_in_turn_and_a_second_time_not_at_all(tmp_path, command):
    status, one, out = conduct(jobs(1, 2, 4), tmp_path, command)
    assert status == 0 and [s for s, *_ in starts(tmp_path)] == ["1", "2", "4"]
    assert "LR=1" in out and "3/3" in out and "1.02333" in out and "0.01528" in out  # mean and sample deviation
    assert "best 1.01000 (LR=1 SEED=1)" in out and "\x1b" not in out
    events = [json.loads(line) for line in (tmp_path / "sweep" / "runs.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["start", "end"] * 3 and events[1]["val_bpb"] == 1.01
    status, one, out = conduct(jobs(4, 1, 3), tmp_path, command)
    assert status == 0 and [s for s, *_ in starts(tmp_path)] == ["1", "2", "4", "3"]
    assert [s.bpb for s in one.states] == [1.04, 1.01, 1.03]
    runs, unfinished = logs.scored_group("LR=1*", tmp_path)
    assert len(runs) == 4 and not unfinished  # the logs are where compare looks
    assert sw.Sweep(jobs(1, 2, 5, 6, 7), tmp_path, [{}, {}], command).left() == 120  # three of 60 s for two places


def test_a_failure_is_tried_once_more_unless_it_would_fail_again(tmp_path, command):
    """No log is written over; an attempt that left a checkpoint goes on in its own."""
    work = [*jobs(1, 2, 3, 4, ONCE="1", BAD="2", STOPS="4"), *jobs(5, BAD="5", KIND="UserError"),
            *jobs(6, BAD="6", KIND="DivergedError"), *jobs(7, BAD="7", KIND="OutOfMemoryError")]
    status, one, out = conduct(work, tmp_path, command)
    assert status == 1 and [s.status for s in one.states] == ["done", "failed", "done", "done", *["failed"] * 3]
    assert "".join(sorted(s for s, *_ in starts(tmp_path))) == "11223445677"
    assert "no luck at first" in out and [s.text for s in one.states if s.status == "failed"] == [
        "no luck", *["will not do"] * 3]
    assert "4 failed" in out and one.states[0].run_id.endswith(".2")
    assert {run_id for seed, _, run_id in starts(tmp_path) if seed == "4"} == {one.states[3].run_id}


def test_what_is_stopped_may_write_its_checkpoint(tmp_path):
    """The shell between sweep and trainer dies at once; the trainer takes its step's time."""
    (tmp_path / "slow.py").write_text("""
import os, pathlib, signal, sys, time
kept = pathlib.Path(os.environ["LOG_DIR"]) / f"{os.environ['RUN_ID']}.ckpt"
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), kept.touch(), sys.exit(143)))
(kept.parent / "ready").touch()
time.sleep(60)
""")
    one = sw.Sweep(jobs(1), tmp_path, LONE, ["bash", "-c", f"{sys.executable} {tmp_path / 'slow.py'}; true"])
    assert one.step()
    until((tmp_path / "ready").exists)
    one.stop()
    assert len(list(tmp_path.glob("*.ckpt"))) == 1 and not one.running


def test_runs_are_packed_on_disjoint_gpus(tmp_path, command):
    """Two places of two GPUs each: two runs at a time, never two on one place."""
    places = sw.slots({"CUDA_VISIBLE_DEVICES": "0,1,4,5,6", "GPUS_PER_RUN": "2"})
    assert [p["CUDA_VISIBLE_DEVICES"] for p in places] == ["0,1", "4,5"] and places[0]["NPROC"] == "2"
    one = sw.Sweep(jobs(1, 2, 3, WAIT="1"), tmp_path, places, command)
    assert one.step()
    until(lambda: len(starts(tmp_path)) == 2)
    one.step()
    assert [s.status for s in one.states] == ["running", "running", "waiting"]
    assert {gpus for _, gpus, _ in starts(tmp_path)} == {"0,1", "4,5"}
    until(lambda: one.doing(one.states[0]) == "train 50%, step 7, 3.250 nats")
    assert one.left() != one.left()  # nan: no run has ended
    (tmp_path / "go").touch()
    until(lambda: not one.step())
    assert [s.status for s in one.states] == ["done"] * 3
    cores = sw.Sweep([], tmp_path, [{"CORE": "0"}, {"CORE": "1"}], command)
    assert [cores.free_place()[1] for _ in range(3)] == [0, 1, -1]


def driver(folder: Path, command: list[str]) -> subprocess.Popen:
    """A sweep of three waiting runs in a process of its own."""
    code = f"""
import sys, pathlib, rich.console
from tools import sweep as sw
jobs = [sw.Job(f"LR=1 SEED={{s}}", {{"SEED": str(s), "WAIT": "1"}}, f"k{{s}}" + "0" * 8) for s in (1, 2, 3)]
sys.exit(sw.conduct(sw.Sweep(jobs, pathlib.Path({str(folder)!r}), [{{}}], {command!r}), rich.console.Console(), 0.02))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    until(lambda: len(starts(folder)) == 1)
    return process


def test_a_killed_sweep_is_resumed_and_its_run_is_waited_for(tmp_path, command):
    """After kill -9 the run goes on; the next sweep neither starts it again nor anything beside it: it takes it over.
    """
    with driver(tmp_path, command) as process:
        process.kill()
    one = sw.Sweep(jobs(1, 2, 3, WAIT="1"), tmp_path, LONE, command)
    for _ in range(5):
        assert one.step()
    assert [s.status for s in one.states] == ["waiting"] * 3 and len(starts(tmp_path)) == 1  # its place is taken
    beside = sw.Sweep(jobs(1, WAIT="1"), tmp_path, [{"CUDA_VISIBLE_DEVICES": "7"}], command)
    assert beside.step() and beside.states[0].status == "elsewhere"
    (tmp_path / "go").touch()
    until(lambda: not one.step())
    until(lambda: not beside.step())
    assert [s.status for s in one.states + beside.states] == ["done"] * 4
    assert sorted(seed for seed, *_ in starts(tmp_path)) == ["1", "2", "3"]
    assert '"found", "key": "k100000000"' in (tmp_path / "sweep" / "runs.jsonl").read_text()


def test_a_run_killed_with_its_sweep_is_started_anew(tmp_path, command):
    """The log that it left is kept, and so is the record, though its last line was cut off."""
    with driver(tmp_path, command) as process:
        record = tmp_path / "sweep" / "runs.jsonl"
        until(lambda: record.exists() and record.stat().st_size > 0)
        os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
        process.kill()
    with open(record, "a") as file:
        file.write('{"event": "sta')
    (tmp_path / "go").touch()
    status, one, _ = conduct(jobs(1, 2, 3, WAIT="1"), tmp_path, command)
    assert status == 0 and one.states[0].run_id.endswith(".2")
    assert [seed for seed, *_ in starts(tmp_path)] == ["1", "1", "2", "3"]
    assert [e.get("outcome", "start") for e in logs.events(record)] == ["start", *["start", "done"] * 3]


def test_an_interrupt_while_a_run_starts_forgets_none(tmp_path, command, monkeypatch):
    monkeypatch.setattr(sw.subprocess, "Popen", lambda *args, popen=sw.subprocess.Popen, **options: (
        popen(*args, **options), os.kill(os.getpid(), signal.SIGTERM))[0])
    assert conduct(jobs(1, WAIT="1"), tmp_path, command)[0] == 130
    assert [e.get("outcome") for e in logs.events(tmp_path / "sweep" / "runs.jsonl")] == [None, "interrupted"]


def test_an_interrupt_ends_the_runs(tmp_path, command):
    with driver(tmp_path, command) as process:
        process.terminate()
        assert process.wait(20) == 130 and "the same command resumes" in process.stdout.read()
    pid = json.loads((tmp_path / "sweep" / "runs.jsonl").read_text().splitlines()[0])["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_grid_and_file(tmp_path):
    grid = sw.runs_of(["SEED=1,2", "MATRIX_LR=3,4", "--", "ATTN_WINDOWS=5,6"])
    assert [(v["SEED"], v["MATRIX_LR"]) for v, _ in grid] == [("1", "3"), ("1", "4"), ("2", "3"), ("2", "4")]
    assert all(fixed == {"ATTN_WINDOWS": "5,6"} for _, fixed in grid)
    (tmp_path / "runs").write_text("\ufeff# a comment\nSEED=1 ATTN_WINDOWS='5, 6'\n\nSEED=2  # another\n")
    assert [v for v, _ in sw.runs_of([str(tmp_path / "runs")])] == [
        {"SEED": "1", "ATTN_WINDOWS": "5, 6"}, {"SEED": "2"}]


def test_a_key_is_not_the_end_of_another(tmp_path, command):
    one = sw.Sweep(jobs(1), tmp_path, LONE, command)
    job = one.states[0].job._replace(key="lr.t00001")
    for name, taken in (("x-lr.t00001", True), ("y-lr.t00001.2", True), ("x-wide-lr.t000010", False),
                        ("x-lr.t00001x", False), ("lr.t00001", False), ("x-lrxt00001", False)):
        (tmp_path / f"{name}.jsonl").touch()
        assert (name in {path.stem for path in one.attempts(job)}) == taken, name


def test_a_run_is_its_configuration(tmp_path):
    """However it is typed: order, spelling of a number, by the environment; but not on another number of GPUs."""
    def key(varied, fixed=None, env=None, gpus=1):
        return [job.key for job in sw.identify([(varied, fixed or {})], env or {}, gpus)][0]

    base = key({"SEED": "1", "MATRIX_LR": "0.02"})
    assert base == key({"MATRIX_LR": "0.020", "SEED": "1"}) == key({"SEED": "1"}, {"MATRIX_LR": "2e-2"})
    assert base == key({"SEED": "1"}, {"LOG_DIR": "x"}, {"MATRIX_LR": ".02", "HOME": "/"})
    assert key({"AUDIT": "1", "TTT_ENABLED": "0", "LQER_RANK": "4"})  # the launcher takes these from older commands
    assert len({base, key({"SEED": "2", "MATRIX_LR": "0.02"}), key({"SEED": "1", "MATRIX_LR": "0.02"}, gpus=2)}) == 3


@pytest.mark.parametrize("arguments, env, expected", [
    ([], {}, "no run is named"), (["--", "SEED=1"], {}, "no run is named"), (["seed=1"], {}, "seed=1: expected KNOB="),
    (["SEED=1,1"], {}, "SEED=1,1: expected different"), (["SEED=1,"], {}, "SEED=1,: expected different"),
    (["SEED=1", "--", "SEED=2"], {}, "SEED: cannot vary and be fixed"), (["RUN_ID=a,b"], {}, "names its runs itself"),
    (["nofile"], {}, "nofile: cannot be read"), (["SEED=1", "--", "GPUS"], {}, "GPUS: expected KNOB=value"),
    (["MATRIX_LR=0.02,0.020"], {}, "MATRIX_LR=0.020: the same run as MATRIX_LR=0.02"),
    (["WANDB=0,1"], {}, "WANDB=1: the same run as"), (["SEED=1", "--", "NPROC=2"], {}, "GPUS_PER_RUN"),
    (["MATRIX_LR=0.02,abc"], {}, "MATRIX_LR=abc: MATRIX_LR='abc': expected a number"),
    (["SEED=1"], {"GPUS_PER_RUN": "3", "CUDA_VISIBLE_DEVICES": "0,1"}, "GPUS_PER_RUN=3: expected 1 to 2"),
    (["SEED=1"], {"GPUS_PER_RUN": "1", "CUDA_VISIBLE_DEVICES": ""}, "no GPU is visible"),
    (["SEED=1"], {"LAUNCHER": "pbs"}, "LAUNCHER=pbs"), (["SEED=1"], {"LAUNCHER": "slurm"}, "such as GPUS_PER_RUN=8"),
    (b"SEED='1", {}, "line 2: No closing quotation"), (b"SEED=\xff", {}, "line 2: 'utf-8' codec"),
    (b"SEED", {}, "line 2: SEED: expected KNOB=value"), (b"LEARNING_RATE=0.1", {}, "LEARNING_RATE: no such knob")])
def test_a_users_mistake_is_one_line_and_nothing_starts(arguments, env, expected, tmp_path, monkeypatch):
    """Bytes: the second line of a file of runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sw, "conduct", lambda *a: pytest.fail("runs would start"))
    if isinstance(arguments, bytes):
        Path("runs").write_bytes(b"SEED=1\n" + arguments + b"\nSEED=3\n")
        arguments = ["runs"]
    assert expected in refusal(sw.main, arguments, {"CUDA_VISIBLE_DEVICES": "", **env})
    assert {path.name for path in tmp_path.iterdir()} <= {"runs"}


def test_slurm_tasks_sweep_one_line_each(tmp_path, command, monkeypatch):
    """The script is run as Slurm would, with a stand-in for run.sh that shows what it was given."""
    conduct(jobs(2), tmp_path, command)
    work = [sw.Job(f"A={i}", {"A": f"{i} x", "SEED": str(i), "PRESET": "de mo"}, f"k{i}" + "0" * 8) for i in (1, 2, 3)]
    fake = tmp_path / "repo"
    fake.mkdir()
    (fake / "run.sh").write_text('#!/bin/sh\necho "$LAUNCHER $GPUS_PER_RUN $1"; cat "$2"; shift 2; printf "[%s]" "$@"')
    (fake / "run.sh").chmod(0o755)
    monkeypatch.setattr(sw, "ROOT", fake)
    script = sw.slurm(sw.Sweep(work, tmp_path, [], command), {"PRESET": "de mo"}, 8)
    text = script.read_text()
    assert "#SBATCH --array=1-2\n" in text and "#SBATCH --gpus-per-node=8\n" in text  # the second is done already
    out = subprocess.run(["bash", script], env={**os.environ, "SLURM_ARRAY_TASK_ID": "2"}, text=True, check=True,
                         capture_output=True).stdout
    assert out == f"local 8 sweep\n'A=3 x' SEED=3\n[--][PRESET=de mo][LOG_DIR={tmp_path}]"
