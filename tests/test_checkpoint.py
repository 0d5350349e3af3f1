"""Checkpoints, signals and lost ranks: what was trained is not lost, and a run that cannot go on ends and says why."""
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import ROOT, tiny
from test_adaptation import MODES, noisy, stream
from test_main import environment, events, finish, start

import train_gpt as tg

QUICK = dict(num_layers=2, loop_start=0, loop_end=0, parallel_start_layer=1, ttt="none", ngram_tilt_enabled=False,
             eval_ladder="", train_seq_schedule="16@0.3,32@1", seq_change_warmup_steps=3, enable_looping_at=0.4,
             iterations=6, normuon_beta2=0.9, eval_stride=0, quant="sdclip", qat_start=0.5)
"""A run in which everything that has a memory changes: loop, row length, its warm-up, rounding, momentum, average."""


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


def signalled(patch, name, times):
    """SIGINT, so many times, while the function of that name is at work."""
    real = getattr(tg, name)
    patch.setattr(tg, name, lambda *args: [os.kill(os.getpid(), signal.SIGINT) for _ in range(times)] and real(*args))


def test_a_signal_between_training_and_artifact_loses_nothing(whole, dataset, tmp_path, capsys):
    """What was trained is on no disk yet: the artifact is made, and scored by the run that goes on."""
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, "calibrate", 1)
        assert tg.main([], environment(dataset, tmp_path, **QUICK)) == 128 + signal.SIGINT
    assert "SIGINT after the artifact was written: RESUME=1 RUN_ID=r goes on from" in capsys.readouterr().err
    assert (tmp_path / "r.bin").read_bytes() == (whole / "r.bin").read_bytes()
    assert tg.main([], environment(dataset, tmp_path, resume="1", **QUICK)) == 0
    assert events(tmp_path, "verdict")[0]["val_loss"] == events(whole, "verdict")[0]["val_loss"]
    assert not list(tmp_path.glob("*ckpt*"))


def test_a_checkpoint_that_could_not_be_written_is_none(dataset, tmp_path, capsys, monkeypatch):
    import safetensors.torch
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *given: (_ for _ in ()).throw(OSError(28, "full")))
    signalled(monkeypatch, "calibrate", 1)
    assert tg.main([], environment(dataset, tmp_path, checkpoint_every=1e-9, **QUICK)) == 128 + signal.SIGINT
    assert "SIGINT after the artifact was written: " in capsys.readouterr().err and (tmp_path / "r.bin").exists()


@pytest.mark.parametrize("where, times, knobs", [("calibrate", 2, {}), ("calibrate", 1, {"checkpoint_every": 1e-9}),
                                                 ("build_model", 1, {}), ("unpack", 1, {})])
def test_outside_training_a_signal_ends_the_run_at_once(dataset, tmp_path, capsys, where, times, knobs):
    """Where nothing is lost, or where it is asked twice."""
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, where, times)
        assert tg.main([], environment(dataset, tmp_path, **QUICK, **knobs)) == 128 + signal.SIGINT
    phase = {"build_model": "setup", "unpack": "load_artifact"}.get(where, where)
    assert f"train_gpt.py: SIGINT in phase {phase}" in capsys.readouterr().err
    assert (tmp_path / "r.bin").exists() == (where == "unpack")


def test_a_run_that_writes_checkpoints_is_the_same_run(whole, dataset, tmp_path):
    """As often as it can and with deterministic algorithms alone; the last file is that of the last step."""
    assert tg.main([], environment(dataset, tmp_path, checkpoint_every=1e-9, deterministic=True, **QUICK)) == 0
    assert torch.are_deterministic_algorithms_enabled()
    assert trained(tmp_path) == trained(whole)
    assert (tmp_path / "r.bin").read_bytes() == (whole / "r.bin").read_bytes()
    assert [e["step"] for e in events(tmp_path, "checkpoint") if "step" in e] == [1, 2, 3, 4, 5, 6, 6]
    assert events(tmp_path, "checkpoint")[-1]["targets"] == events(tmp_path, "verdict")[0]["tokens"]
    assert sorted(p.name for p in tmp_path.glob("*ckpt*")) == ["r.ckpt", "r.previous.ckpt"]


@pytest.mark.parametrize("every, expected", [("2steps", [2, 4, 6, 6]), ("4steps", [4, 6])])
def test_checkpoints_may_be_counted_in_steps(dataset, tmp_path, every, expected):
    """And the last one is that of the last step."""
    assert tg.main([], environment(dataset, tmp_path, checkpoint_every=every, **QUICK)) == 0
    assert [e["step"] for e in events(tmp_path, "checkpoint")] == expected


def test_steps_between_checkpoints_are_counted_from_the_last_one(dataset, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert tg.main([], environment(dataset, tmp_path, **QUICK)) == 128 + signal.SIGTERM
    assert tg.main([], environment(dataset, tmp_path, resume="1", checkpoint_every="3steps", **QUICK)) == 0
    assert [e["step"] for e in events(tmp_path, "checkpoint")] == [3, 6, 6]


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


@pytest.fixture(scope="module")
def halted(dataset, tmp_path_factory) -> Path:
    """What a run leaves that NaN hit in step 2 and SIGTERM in step 4: `r.ckpt`, and `r.previous.ckpt` of step 3."""
    folder = tmp_path_factory.mktemp("halted")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4)
        plant(patch, 2)
        patch.setattr(tg.Checkpoints, "due", lambda self: len(events(folder, "train")) == 3)
        assert tg.main([], environment(dataset, folder, **QUICK)) == 128 + signal.SIGTERM
    assert {p.name for p in folder.glob("*ckpt*")} == {"r.ckpt", "r.previous.ckpt"}
    return folder


def without_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends, with status 2, where training does."""
    monkeypatch.setattr(tg, "fit_to_cap", lambda *args: (_ for _ in ()).throw(tg.UserError("trained")))


@pytest.mark.parametrize("damage", ["cut", "bit", "length", "pickle", "head"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(damage, halted, dataset, tmp_path, capsys, monkeypatch):
    without_artifact(monkeypatch)
    shutil.copytree(halted, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "r.ckpt"
    good = path.read_bytes()
    flipped = bytes([good[-5] ^ 1])
    path.write_bytes({"cut": good[:-100], "bit": good[:-5] + flipped + good[-4:],
                      "length": (1 << 62).to_bytes(8, "little") + good[8:], "pickle": b"\x80\x04K\x01.",
                      "head": good.replace(b'last', b'lost', 1)}[damage])
    capsys.readouterr()
    assert tg.main([], environment(dataset, tmp_path, resume="1", **QUICK)) == 2
    captured = capsys.readouterr()
    (warning,) = [e["text"] for e in events(tmp_path, "warning") if "ckpt" in e["text"]]
    assert str(path) in warning and "\n" not in warning and captured.err == "train_gpt.py: trained\n"
    assert events(tmp_path, "resume")[-1]["path"] == str(tmp_path / "r.previous.ckpt")
    assert [e["step"] for e in events(tmp_path, "train")] == [1, 2, 3, 4, 4, 5]  # from step 3, and the same again:
    assert trained(tmp_path)[4] == trained(halted)[4]
    (tmp_path / "r.previous.ckpt").write_bytes(b"")
    assert tg.main([], environment(dataset, tmp_path, resume="1", **QUICK)) == 2
    err = capsys.readouterr().err
    assert str(path) in err and "r.previous.ckpt" in err and err.count("\n") == 1


def test_an_interrupted_write_leaves_the_checkpoint_before(halted, dataset, tmp_path, capsys, monkeypatch):
    """A full disk ends no training, and nothing half-written stays."""
    import safetensors.torch
    without_artifact(monkeypatch)
    shutil.copytree(halted, tmp_path, dirs_exist_ok=True)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*ckpt*")}

    def full(tensors: dict, path: Path, head: dict) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert tg.main([], environment(dataset, tmp_path, resume="1", checkpoint_every=1e-9, **QUICK)) == 2
    assert "trained" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*ckpt*")} == before
    assert any("No space left" in e["text"] for e in events(tmp_path, "warning"))


def test_while_the_newest_checkpoint_is_renamed_the_one_before_counts(halted, dataset, tmp_path, capsys, monkeypatch):
    """Who fails at that moment is told what to go on from, and can."""
    shutil.copytree(halted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "r.ckpt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(tg, "muon_momentum", lambda *given: torch.empty(1 << 60))
        assert tg.main([], environment(dataset, tmp_path, resume="1", **QUICK)) == 2
    err = capsys.readouterr().err
    assert "out of memory" in err and f"RESUME=1 RUN_ID=r goes on from {tmp_path / 'r.previous.ckpt'}" in err
    assert tg.main([], environment(dataset, tmp_path, resume="1", **QUICK)) == 0
    assert {e["path"] for e in events(tmp_path, "resume")} == {str(tmp_path / "r.previous.ckpt")}


@pytest.mark.parametrize("fault, told", [(MemoryError("none"), "RESUME=1 RUN_ID=r goes on from"),
                                         (tg.UserError("a mistake"), "a mistake")])
def test_a_run_that_fails_waits_for_the_checkpoint_that_is_being_written(fault, told, dataset, tmp_path, capsys,
                                                                         monkeypatch):
    """The first one, so that there is nothing else to go on from; with its line in the log."""
    import safetensors.torch
    save, momentum = safetensors.torch.save_file, tg.muon_momentum

    def fail(cfg: tg.Config, step: int) -> float:
        if step:
            raise fault
        return momentum(cfg, step)

    monkeypatch.setattr(safetensors.torch, "save_file", lambda *given: time.sleep(0.5) or save(*given))
    monkeypatch.setattr(tg, "muon_momentum", fail)
    assert tg.main([], environment(dataset, tmp_path, checkpoint_every=1e-9, **QUICK)) == 2
    assert told in capsys.readouterr().err
    assert [e["step"] for e in events(tmp_path, "checkpoint")] == [1] and (tmp_path / "r.ckpt").exists()


@pytest.mark.parametrize("knobs, expected", [
    ({"matrix_lr": 0.5}, "MATRIX_LR=0.5, but the checkpoint was made with"), ({"model_dim": 64}, "MODEL_DIM=64, but"),
    ({"seed": 7}, "SEED=7, but"), ({"matrix_bits": 3}, "MATRIX_BITS=3, but"),
    ({"run_id": "other"}, "RESUME=1: no checkpoint"), ({"run_id": ""}, "set RUN_ID"),
    ({"resume": "0"}, "r.txt exists already")])
def test_a_checkpoint_is_not_taken_for_another_run(knobs, expected, halted, dataset, tmp_path, capsys):
    shutil.copytree(halted, tmp_path, dirs_exist_ok=True)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*ckpt*")}
    capsys.readouterr()
    assert tg.main([], environment(dataset, tmp_path, **{"resume": "1", **QUICK, **knobs})) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*ckpt*")} == before


def test_a_checkpoint_of_a_version_with_another_knob_is_refused(halted, dataset, tmp_path, capsys, monkeypatch):
    """Whose weights would not be loaded: what is no knob here has no value to compare with."""
    shutil.copytree(halted, tmp_path, dirs_exist_ok=True)
    own = tg.TrainCheckpoints.knobs
    with monkeypatch.context() as patch:
        patch.setattr(tg.TrainCheckpoints, "knobs", lambda self: {**own(self), "extra": 1})
        stop_after(patch, 3)
        assert tg.main([], environment(dataset, tmp_path / "other", **QUICK)) == 128 + signal.SIGTERM
    capsys.readouterr()
    assert tg.main([], environment(dataset, tmp_path / "other", resume="1", **QUICK)) == 2
    assert "made by a version of this program with the knob EXTRA" in capsys.readouterr().err


def test_resume_auto_starts_anew_where_nothing_is_saved(whole, dataset, tmp_path, monkeypatch):
    without_artifact(monkeypatch)
    assert tg.main([], environment(dataset, tmp_path, resume="auto", **QUICK)) == 2
    assert trained(tmp_path) == trained(whole) and not list(tmp_path.glob("*ckpt*"))


# -- numbers -------------------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """NaN in one entry of one gradient in these steps."""
    step, calls = tg.ShardedOptimizer.step, []

    def poisoned(self: tg.ShardedOptimizer, lr_scale: float, momentum: float) -> torch.Tensor:
        if lr_scale:  # priming has rate 0
            calls.append(1)
        if lr_scale and len(calls) in steps:
            self.named["tok_emb"].grad[3, 3] = torch.nan
        return step(self, lr_scale, momentum)

    monkeypatch.setattr(tg.ShardedOptimizer, "step", poisoned)


def test_one_gradient_that_is_not_finite_costs_one_step(whole, dataset, tmp_path, monkeypatch):
    without_artifact(monkeypatch)
    plant(monkeypatch, 3)
    assert tg.main([], environment(dataset, tmp_path, **QUICK)) == 2
    mine, theirs = trained(tmp_path), trained(whole)
    assert mine[2] == theirs[2] and mine[3][1] is None and mine[4][0] is not None and mine[4] != theirs[4]
    assert [e.get("skipped") for e in events(tmp_path, "train")] == [None, None, 1, 1, 1]


def test_too_many_such_steps_end_the_run(dataset, tmp_path, capsys, monkeypatch):
    plant(monkeypatch, 2, 4, 5)
    assert tg.main([], environment(dataset, tmp_path, max_skipped_steps=1, **QUICK)) == 3
    err = capsys.readouterr().err
    assert "not finite at step 4" in err and "in 2 steps" in err and err.count("\n") == 1


def test_the_count_of_skipped_steps_goes_through_a_checkpoint(halted, dataset, tmp_path, capsys, monkeypatch):
    shutil.copytree(halted, tmp_path, dirs_exist_ok=True)
    plant(monkeypatch, 1)
    assert tg.main([], environment(dataset, tmp_path, resume="1", max_skipped_steps=1, **QUICK)) == 3
    assert "not finite at step 5" in capsys.readouterr().err

# -- scoring -------------------------------------------------------------------------------------------


def scored(folder: Path, val: tg.ValData, stop_at: int = 0, every: float = 0.0, **knobs: object
           ) -> tuple[torch.Tensor, str, int]:
    """(nats, digest, places where it could be interrupted) of an artifact's adapted score; SIGTERM at one of them."""
    cfg = tiny(log_dir=str(folder), run_id="r", resume="auto", eval_only="a.bin", checkpoint_every=every, **knobs)
    model, places = noisy(cfg), []
    with tg.Run(cfg, {}) as run, pytest.MonkeyPatch.context() as patch:
        kept = tg.ScoreCheckpoints(b"artifact", model, {}, cfg, run)
        if kept.resumed:
            kept.load()
        for name in ("pause", "agree"):
            original = getattr(kept, name)

            def interrupted(*given: int, original=original) -> None:
                places.append(1)
                if len(places) == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                original(*given)
            patch.setattr(kept, name, interrupted)
        scorer = tg.Scorer(val, cfg, run, None, kept)
        kept.restore(scorer)
        digest = tg.adapted_score(model, val, cfg, run, scorer)[1]
        kept.remove()
        return scorer.ledger.nats, digest, len(places)


@pytest.mark.parametrize("mode", MODES)
def test_scoring_goes_on_bit_for_bit(mode, tmp_path):
    """Stopped and resumed again and again, at random places: every loss and the ledger are those of one run."""
    lengths, knobs, dice = [70, 9, 41, 1, 30, 66, 120, 15, 3, 88], {**MODES[mode], "val_batch_tokens": 64}, Random(mode)
    knobs["ttt_batch_size"] = 3
    nats, digest, _ = scored(tmp_path / "whole", stream(lengths), **knobs)
    done, stops = [], 0
    while True:
        try:
            found = scored(tmp_path, stream(lengths), stop_at=dice.randint(1, 5) + 3 * stops, **knobs)
            break
        except tg.StoppedError as error:
            stops += 1
            count, of = (int(word) for word in str(error).split() if word.isdigit())
            done.append(count)
            assert "RESUME=1 RUN_ID=r goes on from" in str(error) and of == sum(lengths) - 1
            assert (tmp_path / "r.score.ckpt").exists()
    assert torch.equal(found[0], nats) and found[1] == digest
    assert stops and done == sorted(done) and not list(tmp_path.glob("*ckpt*"))


def test_scoring_goes_on_with_other_rows_side_by_side(tmp_path):
    """What changes rounding alone may change between: TTT_BATCH_SIZE deals documents into other jobs."""
    lengths, knobs = [70, 9, 41, 1, 30, 66, 120, 15, 3, 88], MODES["lora, cached"]
    nats, digest, places = scored(tmp_path / "whole", stream(lengths), ttt_batch_size=3, **knobs)
    with pytest.raises(tg.StoppedError):
        scored(tmp_path, stream(lengths), stop_at=places // 2, ttt_batch_size=3, **knobs)
    found = scored(tmp_path, stream(lengths), ttt_batch_size=4, **knobs)
    assert found[1] == digest and torch.allclose(found[0], nats, atol=2e-3)


def test_a_foreign_score_is_not_gone_on_with(tmp_path):
    """Another artifact, other knobs, other data: refused, by name."""
    lengths, knobs = [70, 9, 41], dict(ttt_context="cache")
    with pytest.raises(tg.StoppedError):
        scored(tmp_path, stream(lengths), stop_at=3, **knobs)
    before = (tmp_path / "r.score.ckpt").read_bytes()
    for change, expected in (({"ttt_lora_lr": 0.5}, "TTT_LORA_LR=0.5, but the checkpoint was made with"),
                             ({"dtype": "bfloat16"}, "DTYPE=bfloat16, but")):
        with pytest.raises(tg.UserError, match=expected):
            scored(tmp_path, stream(lengths), **{**knobs, **change})
    with pytest.raises(tg.UserError, match="made on 119 targets that begin .* the validation shards have 120"):
        scored(tmp_path, stream([70, 9, 42]), **knobs)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(tg.UserError, match="ARTIFACT_SHA256="):
        patch.setattr(tg.hashlib, "sha256", lambda data=b"": hashlib.sha512(data))
        scored(tmp_path, stream(lengths), **knobs)
    assert (tmp_path / "r.score.ckpt").read_bytes() == before


def test_a_run_killed_while_scoring_goes_on_from_its_artifact(whole, dataset, tmp_path, capsys, monkeypatch):
    """A crash after the scores for comparison, SIGTERM in the one that counts: the verdict is that of one run."""
    knobs = {**QUICK, "eval_ladder": "ema,quantized"}
    with monkeypatch.context() as patch:
        patch.setattr(tg, "score_plain", lambda *given: (_ for _ in ()).throw(RuntimeError("crash")))
        with pytest.raises(RuntimeError):
            tg.main([], environment(dataset, tmp_path, **knobs))
    knobs["resume"] = "1"
    with monkeypatch.context() as patch:
        pause = tg.ScoreCheckpoints.pause
        patch.setattr(tg.ScoreCheckpoints, "pause", lambda kept: os.kill(os.getpid(), signal.SIGTERM) or pause(kept))
        assert tg.main([], environment(dataset, tmp_path, **knobs)) == 128 + signal.SIGTERM
    assert "of 10484 targets: RESUME=1 RUN_ID=r goes on from" in capsys.readouterr().err
    assert tg.main([], environment(dataset, tmp_path, **knobs)) == 0
    mine, theirs = (events(folder, "verdict")[0] for folder in (tmp_path, whole))
    assert 0 < mine.pop("scored_before") < mine["tokens"] and len(events(tmp_path, "score")) == 3
    assert set(mine["ladder"]) == {"ema", "quantized", "plain"}
    assert all(mine[name] == value for name, value in theirs.items() if name != "ladder" and "seconds" not in name)
    trained_for = [p["phase_seconds"] for p in events(tmp_path, "phase") if p["budget"] == "train"]
    assert mine["train_seconds"] == pytest.approx(sum(trained_for), abs=0.01)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.bin", "r.jsonl", "r.txt"]
    assert tg.main([], environment(dataset, tmp_path, **knobs)) == 2
    assert "r.bin exists already" in capsys.readouterr().err


# -- ranks ---------------------------------------------------------------------------------------------


HANGS = """import os, sys, time
import train_gpt as tg
if os.environ["RANK"] == "1":
    update, calls = tg.Ema.update, []
    def forever(self):
        update(self)
        calls.append(1)
        if len(calls) == 3:
            time.sleep(1000)
    tg.Ema.update = forever
sys.exit(tg.main([], os.environ))
"""
ALONE = HANGS.replace("time.sleep(1000)", "raise tg.LocalError('planted')") \
    .replace("sys.exit", """import traceback
show = traceback.print_exception
traceback.print_exception = lambda error: time.sleep(1) or show(error)
dump = tg.faulthandler.dump_traceback
tg.faulthandler.dump_traceback = lambda **given: time.sleep(1) or dump(**given)
sys.exit""")


def two_ranks(dataset: dict, folder: Path, script: str = "train_gpt.py") -> tuple[subprocess.Popen, list[int]]:
    """A long run on two ranks that has begun to train, and the processes of its ranks."""
    env = environment(dataset, folder, **{**QUICK, "iterations": 10 ** 6, "max_wallclock_seconds": 600,
                                          "dist_timeout_seconds": 6})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env})
    deadline = time.monotonic() + 60
    while not ((folder / "r.jsonl").exists() and trained(folder)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {dict(pair.split("=", 1) for pair in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in pair)
             ["RANK"]: int(child) for child in children}
    return process, [ranks["0"], ranks["1"]]


def ended(process: subprocess.Popen, ranks: list[int], seconds: float) -> str:
    """What a run said that must fail within these seconds and leave no process."""
    _, err = process.communicate(timeout=seconds)
    assert process.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in ranks), err
    return err


linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks by /proc")


@linux
def test_a_killed_rank_ends_the_run(dataset, tmp_path):
    """The other one names it, its place and what itself was doing."""
    process, ranks = two_ranks(dataset, tmp_path)
    os.kill(ranks[0], signal.SIGKILL)
    err = ended(process, ranks, 20)
    (line,) = [line for line in err.splitlines() if line.startswith("train_gpt.py:")]
    assert "rank 1 ends in phase train step" in line
    assert "rank 0 gives no sign of life" in line and "last in phase" in line
    assert "Current thread" in err and "in train\n" in err


@linux
def test_a_stopped_rank_ends_the_run(dataset, tmp_path):
    process, ranks = two_ranks(dataset, tmp_path)
    os.kill(ranks[1], signal.SIGSTOP)
    start = time.monotonic()
    while Path(f"/proc/{ranks[0]}").exists():
        assert time.monotonic() < start + 6, "the other rank still waits after DIST_TIMEOUT_SECONDS"
        time.sleep(0.1)
    os.kill(ranks[1], signal.SIGCONT)  # else torchrun waits 30 s before it kills
    err = ended(process, ranks, 20)
    assert "rank 0 ends in phase train step" in err and "rank 1 gives no sign of life" in err


@linux
def test_a_rank_that_hangs_ends_the_run_and_shows_where(dataset, tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    start = time.monotonic()
    process, ranks = two_ranks(dataset, tmp_path, str(script))
    err = ended(process, ranks, 40)
    lines = [line for line in err.splitlines() if line.startswith("train_gpt.py: rank")]
    assert {line.split()[2] for line in lines} == {"0", "1"} and len(lines) == 2
    assert all("rank 0 failed in phase train step" in line for line in lines) and "in forever\n" in err
    waits, hangs = (int(re.search(r"; collectives: gloo:\w+ number (\d+) of \[", line)[1]) for line in sorted(lines))
    assert hangs < waits
    assert time.monotonic() < start + 40


@linux
def test_a_mistake_of_one_rank_is_told_by_all(dataset, tmp_path):
    """Once by each, and none of its threads ends the process before the traceback is out."""
    (tmp_path / "alone.py").write_text(ALONE)
    err = ended(*two_ranks(dataset, tmp_path, str(tmp_path / "alone.py")), 20)
    lines = [line for line in err.splitlines() if line.startswith("train_gpt.py: rank")]
    assert lines and all("rank 1 failed in phase train step 3: LocalError: planted" in line for line in lines)
    assert "in forever\n" in err and sum("rank 1 ends" in line for line in lines) == 1


@linux
def test_a_signal_to_torchrun_is_one_to_every_rank(dataset, tmp_path):
    """One checkpoint, of one step, from which one rank goes on."""
    process, ranks = two_ranks(dataset, tmp_path)
    process.send_signal(signal.SIGTERM)
    err = ended(process, ranks, 20)
    said = [line for line in err.splitlines() if line.startswith("train_gpt.py:")]
    assert said and all("SIGTERM after step" in line and "RESUME=1 RUN_ID=r goes on from" in line for line in said)
    (made,) = events(tmp_path, "checkpoint")
    assert f"after step {made['step']}:" in said[0] and [p.name for p in tmp_path.glob("*ckpt*")] == ["r.ckpt"]
