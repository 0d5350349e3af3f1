"""Checkpoints and gradients that are not finite: what was trained is not lost, and goes on bit for bit."""
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import QUICK, environment, events

import train_gpt as tg


def trained(folder: Path) -> dict[int, tuple]:
    """Loss, gradient norm and rate of each step that is in the log."""
    return {e["step"]: (e["loss_nats"], e["grad_norm"], e["lr_scale"]) for e in events(folder, "train")}


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """This process gets SIGTERM during a step's average."""
    update, calls = tg.Ema.update, []

    def signalled(self: tg.Ema) -> None:
        update(self)
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(tg.Ema, "update", signalled)


def plant(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """NaN in one entry of one gradient in these steps."""
    step, calls = tg.ShardedOptimizer.step, []

    def poisoned(self: tg.ShardedOptimizer, lr_scale: float, momentum: float) -> torch.Tensor:
        calls.extend([1] * (lr_scale > 0))  # warm-up has rate 0
        if lr_scale and len(calls) in steps:
            self.small["tok_emb"].grad[3, 3] = torch.nan
        return step(self, lr_scale, momentum)

    monkeypatch.setattr(tg.ShardedOptimizer, "step", poisoned)


@pytest.fixture(scope="module")
def halted(dataset, tmp_path_factory) -> Path:
    """What a run leaves that SIGTERM stopped in step 3."""
    folder = tmp_path_factory.mktemp("halted")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert tg.main([], environment(dataset, folder, **QUICK)) == 128 + signal.SIGTERM
    assert sorted(p.name for p in folder.iterdir()) == ["r.ckpt", "r.jsonl", "r.txt"]
    return folder


def test_sigterm_in_training_writes_a_checkpoint_and_says_how_to_go_on(halted):
    (saved,), (error,) = events(halted, "checkpoint"), events(halted, "error")
    assert saved["step"] == 3 and saved["bytes"] == (halted / "r.ckpt").stat().st_size
    assert error["text"].startswith("SIGTERM in phase train step 3; RESUME=1 RUN_ID=r goes on from")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stopped_run_goes_on_bit_for_bit(whole, halted, dataset, tmp_path):
    """Losses, artifact and score are those of one run, and the seconds before count."""
    shutil.copytree(halted, tmp_path, dirs_exist_ok=True)
    assert tg.main([], environment(dataset, tmp_path, resume="1", **QUICK)) == 0
    assert trained(tmp_path) == trained(whole) and set(trained(whole)) >= {1, 2, 3, 4, 5}
    assert (tmp_path / "r.bin").read_bytes() == (whole / "r.bin").read_bytes()
    again, first = (events(folder, "verdict")[0] for folder in (tmp_path, whole))
    assert again["val_loss"] == first["val_loss"] and events(tmp_path, "resume")[0]["step"] == 3
    assert again["train_seconds"] > events(halted, "train")[-1]["train_seconds"] > 0
    assert not (tmp_path / "r.ckpt").exists()  # nothing goes on from it any more


def test_a_signal_in_the_last_steps_is_obeyed_too(whole, dataset, tmp_path, monkeypatch):
    """A GPU's clock looks every eight steps: training of six ends before that, and the artifact must wait."""
    stop_after(monkeypatch, 5)
    monkeypatch.setattr(tg.TrainClock, "every", property(lambda _: 8, lambda _, value: None), raising=False)
    assert tg.main([], environment(dataset, tmp_path, **QUICK)) == 128 + signal.SIGTERM
    assert [saved["step"] for saved in events(tmp_path, "checkpoint")] == [6]
    assert tg.main([], environment(dataset, tmp_path, resume="1", **QUICK)) == 0
    assert (tmp_path / "r.bin").read_bytes() == (whole / "r.bin").read_bytes()


def test_a_probe_reads_rounded_weights_as_the_artifact_will(dataset, tmp_path):
    knobs = {**QUICK, "ema_decay": 0, "val_loss_every": 6, "diagnostic_evals": "ema"}
    assert tg.main([], environment(dataset, tmp_path, **knobs)) == 0
    assert events(tmp_path, "val_probe")[0]["val_bpb"] == events(tmp_path, "verdict")[0]["diagnostic_evals"]["ema"]


def test_a_run_that_writes_checkpoints_is_the_same_run(whole, dataset, tmp_path):
    """The last is that of the last step, for the artifact is not made yet."""
    assert tg.main([], environment(dataset, tmp_path, checkpoint_every="2", **QUICK)) == 0
    assert [e["step"] for e in events(tmp_path, "checkpoint")] == [2, 4, 6, 6]
    assert (tmp_path / "r.bin").read_bytes() == (whole / "r.bin").read_bytes()


def test_a_disk_that_is_full_ends_no_training(whole, dataset, tmp_path, monkeypatch):
    write = tg.write_whole

    def full(path: Path, content: object) -> None:
        if path.suffix == ".ckpt":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(tg, "write_whole", full)
    assert tg.main([], environment(dataset, tmp_path, checkpoint_every="2", **QUICK)) == 0
    assert (tmp_path / "r.bin").read_bytes() == (whole / "r.bin").read_bytes()
    said = [e["text"] for e in events(tmp_path, "warning") if "No space left" in e["text"]]
    assert len(said) == 4 and all("r.ckpt" in text for text in said)


@pytest.mark.parametrize("knobs, expected", [
    ({"matrix_lr": 0.5}, "MATRIX_LR=0.5, but"), ({"model_dim": 64}, "its tensors are not those of this run"),
    ({"seed": 7}, "SEED=7, but"), ({"iterations": 9}, "ITERATIONS=9, but"),
    ({"run_id": "other"}, "RESUME=1: no checkpoint"), ({"resume": "0"}, "r.ckpt exists; RESUME=1 goes on with it")])
def test_a_checkpoint_is_not_taken_for_another_run(knobs, expected, halted, dataset, tmp_path, capsys):
    shutil.copytree(halted, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "r.ckpt").read_bytes()
    assert tg.main([], environment(dataset, tmp_path, **{"resume": "1", **QUICK, **knobs})) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1 and (tmp_path / "r.ckpt").read_bytes() == before


def test_a_finished_run_is_not_written_over(whole, dataset, capsys):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in whole.iterdir())
    assert tg.main([], environment(dataset, whole, resume="auto", **QUICK)) == 2
    assert "r.bin exists; EVAL_ONLY=" in capsys.readouterr().err
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in whole.iterdir())


def test_one_gradient_that_is_not_finite_costs_one_step_and_is_counted_through_a_checkpoint(
        whole, dataset, tmp_path, capsys, monkeypatch):
    """RESUME=auto starts anew where nothing is saved. More than MAX_SKIPPED_STEPS in all end the run with status 3."""
    monkeypatch.setattr(tg, "MAX_SKIPPED_STEPS", 1)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        plant(patch, 3)
        assert tg.main([], environment(dataset, tmp_path, resume="auto", **QUICK)) == 128 + signal.SIGTERM
    poisoned, clean = trained(tmp_path), trained(whole)
    assert poisoned[2] == clean[2] and poisoned[3][1] is None and poisoned[4][0] is not None
    assert [e["skipped"] for e in events(tmp_path, "train")] == [0, 0, 1, 1]
    plant(monkeypatch, 1)
    capsys.readouterr()
    assert tg.main([], environment(dataset, tmp_path, resume="auto", **QUICK)) == 3
    err = capsys.readouterr().err
    assert "not finite at step 5, in 2 steps so far" in err and err.count("\n") == 1
