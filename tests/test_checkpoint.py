"""Checkpoints, signals and lost ranks: what was trained is not lost, and a run that cannot go on ends and says why."""
import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny
from test_main import environment, events, finish, start

import train_gpt as tg

QUICK = dict(num_layers=2, loop_start=0, loop_end=0, parallel_start_layer=1, ttt="none", ngram_tilt_enabled=False,
             eval_ladder="", train_seq_schedule="16@0.3,32@1", seq_change_warmup_steps=3, enable_looping_at=0.4,
             iterations=6, normuon_beta2=0.9, eval_stride=0)
"""A run in which everything that has a memory changes: loop, row length, its warm-up, momentum, average."""


def trained(folder: Path) -> dict[int, tuple]:
    """Loss, gradient norm and rate of each step that is in the log."""
    return {e["step"]: (e["loss_nats"], e["grad_norm"], e["lr_scale"]) for e in events(folder, "train")}


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, name: str = "SIGTERM") -> None:
    """This process gets the signal during a step's average."""
    update, calls = tg.Ema.update, []

    def signalled(self: tg.Ema) -> None:
        update(self)
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr(tg.Ema, "update", signalled)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory) -> Path:
    """Folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert tg.main([], environment(dataset, folder, **QUICK)) == 0
    return folder


def test_a_stopped_run_goes_on_bit_for_bit(whole, dataset, tmp_path, capsys, monkeypatch):
    """SIGTERM writes a checkpoint and says how to go on; then losses, artifact and score are those of one run."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert tg.main([], environment(dataset, tmp_path, **QUICK)) == 128 + signal.SIGTERM
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "SIGTERM after step 3: RESUME=1 RUN_ID=r goes on from" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.ckpt", "r.jsonl", "r.txt"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert tg.main([], environment(dataset, tmp_path, resume="1", **QUICK)) == 0
    assert trained(tmp_path) == trained(whole) and set(trained(whole)) >= {1, 2, 3, 4, 5}
    assert (tmp_path / "r.bin").read_bytes() == (whole / "r.bin").read_bytes()
    mine, theirs = (events(folder, "verdict")[0] for folder in (tmp_path, whole))
    assert mine["val_loss"] == theirs["val_loss"] and mine["resumed_at"] == 3 and "resumed_at" not in theirs
    assert mine["train_seconds"] > events(tmp_path, "resume")[0]["elapsed"] > 0


def test_a_finished_run_is_not_written_over(whole, dataset, capsys):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in whole.iterdir())
    assert tg.main([], environment(dataset, whole, resume="auto", **QUICK)) == 2
    assert "r.bin exists already" in capsys.readouterr().err
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in whole.iterdir())


def test_two_ranks_go_on_where_one_stopped(whole, dataset, tmp_path, monkeypatch):
    """The same global batches: losses and weights as of one rank, but for the order of fp32 sums."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        tg.main([], environment(dataset, tmp_path, **QUICK))
    finish(start(environment(dataset, tmp_path, resume="1", **QUICK), "--standalone", "--nproc_per_node=2"))
    mine, theirs = trained(tmp_path), trained(whole)
    assert list(mine) == list(theirs)
    for step in mine:
        assert mine[step] == pytest.approx(theirs[step], abs=2e-4)
