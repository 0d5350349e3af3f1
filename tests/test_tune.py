"""A study is shared by its workers, stops hopeless trials, and loses at most the trial of a worker that was killed."""
import os
import sys
from pathlib import Path

import optuna
import pytest
from conftest import refusal
from optuna.trial import TrialState
from rich.console import Console

from tools import sweep as sw
from tools import tune
from tools.logs import events

TRAINER = """
import json, os, pathlib, sys, time
folder, lr = pathlib.Path(os.environ["LOG_DIR"]), float(os.environ["MATRIX_LR"])
bpb = 1 + (lr - 0.3) ** 2
checkpoint = folder / (os.environ["RUN_ID"] + ".ckpt")  # a run that ends well removes it
checkpoint.touch()
log = open(folder / f"{os.environ['RUN_ID']}.jsonl", "a" if os.environ.get("RESUME") else "x")
def write(**event):
    print(json.dumps({"seconds": 0, **event}), file=log, flush=True)
write(event="train", frac=0.5, step=7, loss_nats=3.25)
write(event="val_probe", step=10, val_bpb=bpb + 1)
if lr > float(os.environ.get("STUCK", "9")):
    time.sleep(60)
if os.environ.get("BAD"):
    sys.exit("no luck")
checkpoint.unlink()
write(event="verdict", val_bpb=bpb, bytes=40, tokens=10, total_seconds=6.0)
"""


@pytest.fixture
def tuner(tmp_path: Path):
    """Makes workers of one study over MATRIX_LR=0..1 that begins with `first`, with a stand-in for the trainer."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def make(first: dict | None = None, study: str = "s", **env: str) -> tune.Tuner:
        study = tune.open_study(study, tmp_path / f"{study}.journal", first)
        return tune.Tuner(study, tune.space_of(["MATRIX_LR=0.0..1.0"]), {"PRESET": "demo"}, tmp_path, [{}],
                          {**os.environ, **env}, [sys.executable, str(tmp_path / "trainer.py")])

    return make


def work(worker: tune.Tuner, trials: int) -> tuple[int, str]:
    console = Console(file=open(os.devnull, "w"), record=True, width=160)
    return worker.work(trials, console, poll=0.02), console.export_text()


def states(worker: tune.Tuner) -> list[TrialState]:
    return [trial.state for trial in worker.study.trials]


def test_workers_share_one_study(tuner):
    """Two workers do six trials between them; the configuration as it is comes first, once."""
    status, _ = work(tuner({"MATRIX_LR": 0.9}), 4)
    second = tuner({"MATRIX_LR": 0.9})
    status, out = work(second, 6)
    # What is drawn depends on the trainer's source: a hopeless trial may be among the later ones.
    assert status == 0 and len(states(second)) == 6 and set(states(second)) <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert states(second)[:4] == [TrialState.COMPLETE] * 4
    rates = [trial.params["MATRIX_LR"] for trial in second.study.trials]
    assert rates[0] == 0.9 and rates.count(0.9) == 1
    best = min(1 + (float(tune.text_of(r)) - 0.3) ** 2 for r, end in zip(rates, states(second))
               if end == TrialState.COMPLETE)
    assert second.study.best_value == best and f"val_bpb={best:.5f}\n./run.sh train PRESET=demo MATRIX_LR=" in out


def test_a_hopeless_trial_is_stopped(tuner):
    for rate in (0.3, 0.31, 0.32, 0.33):
        worker = tuner({"MATRIX_LR": rate}, STUCK="0.5")
        assert work(worker, len(states(worker)))[0] == 0
    worker = tuner({"MATRIX_LR": 0.9}, STUCK="0.5")
    status, out = work(worker, 5)
    assert states(worker) == [TrialState.COMPLETE] * 4 + [TrialState.PRUNED] and "1 stopped early" in out
    ends = [e for e in events(worker.folder / "sweep" / "runs.jsonl") if e["event"] == "end"]
    assert ends[-1]["outcome"] == "interrupted" and ends[-1]["status"] < 0  # its process is gone
    assert not list(worker.folder.glob("*.ckpt"))


def test_trials_of_killed_workers_are_settled(tuner):
    """One left a score, one nothing but a checkpoint; a trial whose worker or run lives is left alone."""
    worker = tuner()
    trials = [worker.study.ask(worker.space) for _ in range(4)]
    done = worker.sweep(0, trials[0].params)
    assert sw.conduct(done, Console(file=open(os.devnull, "w")), poll=0.02) == 0
    keys = [worker.sweep(trial.number, trial.params).states[0].job.key for trial in trials]
    held = [sw.lock(done.own / f"{keys[2]}.worker"), sw.lock(done.own / f"{keys[3]}.lock")]
    left = [worker.folder / f"{worker.sweep(n, trials[n].params).states[0].job.name}.ckpt" for n in (1, 2, 3)]
    for path in left:
        path.touch()
    worker.bury()
    assert states(worker) == [TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING, TrialState.RUNNING]
    assert [path.exists() for path in left] == [False, True, True]
    assert worker.study.trials[0].value == pytest.approx(1 + (trials[0].params["MATRIX_LR"] - 0.3) ** 2, abs=1e-5)
    sw.unlock(*held)
    other = tuner(study="wide-s").sweep(0, trials[0].params).states[0]
    assert other.status == "waiting" and other.job.key != keys[0]  # no study takes another's logs


def test_failed_trials_count_and_none_with_a_score_is_status_1(tuner, tmp_path):
    worker = tuner(BAD="1")
    (tmp_path / "another.ckpt").touch()
    status, out = work(worker, 2)
    assert status == 1 and states(worker) == [TrialState.FAIL] * 2 and "no luck" in out
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["another.ckpt"]


def test_space():
    space = tune.space_of(["MATRIX_LR=0.01..0.04:log", "NUM_LOOPS=1..3", "ATTN_GATE=none,sparse", "MIN_LR=0..0.5"])
    assert space["MATRIX_LR"] == optuna.distributions.FloatDistribution(0.01, 0.04, log=True)
    assert space["NUM_LOOPS"] == optuna.distributions.IntDistribution(1, 3)
    assert space["ATTN_GATE"].choices == ("none", "sparse") and space["MIN_LR"].low == 0.0
    assert tune.as_it_is(space, {}) == {"MATRIX_LR": 0.026, "NUM_LOOPS": 2, "ATTN_GATE": "sparse", "MIN_LR": 0.1}
    assert tune.as_it_is(space, {"MATRIX_LR": "0.05"}) is None
    tune.check_values(space, {})
    tune.check_values(tune.space_of(["EVAL_SEQ_LEN=32,2048", "EVAL_STRIDE=32,64", "TTT_CHUNK_SIZE=8,32"]), {})


@pytest.mark.parametrize("arguments, env, expected", [
    ([], {}, "no knob to search"), (["SEED=1,2"], {}, "SEED: picking seeds"), (["MIN_LR=0.1"], {}, "needs two values"),
    (["MIN_LR=2..1"], {}, "not below the second"), (["MIN_LR=a..b"], {}, "MIN_LR=a..b: could not convert"),
    (["MIN_LR=0..1:log"], {}, "MIN_LR=0..1:log"), (["MIN_LT=0..1"], {}, "MIN_LT: no such knob"),
    (["MIN_LR=0..1", "--", "MIN_LR=0"], {}, "searched and be fixed"), (["MIN_LR=0..1"], {"TRIALS": "0"}, "TRIALS=0"),
    (["MIN_LR=0..1", "--", "LEARNING_RATE=1"], {}, "LEARNING_RATE: no such knob"),
    (["QAT_ENABLED=0,1"], {}, "QAT_ENABLED: no such knob"), (["MIN_LR=0..1", "--", "RUN_ID=x"], {}, "RUN_ID: a study"),
    (["ATTN_GATE=none,bogus"], {}, "ATTN_GATE=bogus cannot be tried: ATTN_GATE=bogus: expected one of"),
    (["NUM_LOOPS=1.0..3.0"], {}, "NUM_LOOPS='2.236': expected an integer"),
    (["NUM_HEADS=4,7", "MODEL_DIM=512,1024"], {}, "NUM_HEADS=7 cannot be tried"),
    (["MIN_LR=0.1,0.10"], {}, "MIN_LR=0.1,0.10: expected different"), (["LOG_DIR=a,b"], {}, "LOG_DIR: says what is"),
    (["MIN_LR=0..1"], {"STUDY": "a/b"}, "STUDY=a/b: exp"), (["MIN_LR=0..1"], {"STUDY": "a*"}, "STUDY=a*: exp"),
    (["MIN_LR=0..1"], {"TUNE_STORAGE": "sqlite:////nowhere/x.db"}, "sqlite:////nowhere/x.db: (sqlite3.Op"),
    (["MIN_LR=0..1"], {"TUNE_STORAGE": "redis://me:secret@host/0"}, "redis://me:...@host/0: ")])
def test_a_users_mistake_is_one_line(arguments, env, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune.Tuner, "work", lambda *a: pytest.fail("runs would start"))
    text = refusal(tune.main, arguments, {"CUDA_VISIBLE_DEVICES": "", **env})
    assert expected in text and "secret" not in text and not list(tmp_path.iterdir())
