"""Section 12: tokens to a scored artifact in one process, and what the program says when it cannot."""
import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, environment, events, write_shard

import train_gpt as tg
from bench.contest import figures


def test_a_run_ends_in_one_verdict_whose_bytes_are_those_of_the_file(single: Path):
    (verdict,), (artifact,) = events(single, "verdict"), events(single, "artifact")
    assert [key for key, value in figures(single / "r.jsonl").items() if value is None] == ["raw"]  # of bench contest
    blob = (single / "r.bin").read_bytes()
    assert verdict["weight_bytes"] == len(blob) and artifact["sha256"] == hashlib.sha256(blob).hexdigest()
    assert verdict["code_bytes"] == len(tg.shipped_source(ROOT / "train_gpt.py"))
    assert verdict["artifact_bytes"] == verdict["weight_bytes"] + verdict["code_bytes"] <= verdict["cap_bytes"]
    scores = verdict["diagnostic_evals"]
    assert list(scores) == ["ema", "quantized", "sliding", "lora+ngram"]
    assert verdict["val_bpb"] == scores["lora+ngram"] != scores["sliding"] and len(verdict["ledger_sha256"]) == 64
    assert sorted(p.name for p in single.iterdir()) == ["r.bin", "r.jsonl", "r.txt"]
    losses = [e["loss_nats"] for e in events(single, "train")]
    assert len(losses) == 4 and losses[-1] < math.log(int(TINY["vocab_size"])) < losses[0] + 0.1  # a uniform guess
    spent = verdict["train_seconds"] + verdict["eval_seconds"] + verdict["other_seconds"]
    assert spent == pytest.approx(verdict["total_seconds"], abs=0.01)  # no second lies outside the phases


def test_a_step_budget_is_reproduced_bit_for_bit_and_a_probe_changes_nothing(single: Path, dataset, tmp_path):
    """Validation in the middle is marked, and charged to neither budget."""
    knobs = dict(val_loss_every=2, ttt="none", eval_stride=0, ngram_base_beta=0, diagnostic_evals="")
    assert tg.main([], environment(dataset, tmp_path, **knobs)) == 0
    again, first = (tg.unpack((folder / "r.bin").read_bytes()) for folder in (tmp_path, single))
    assert all(torch.equal(values, again.tensors[name]) for name, values in first.tensors.items())
    assert (again.streams, again.validation) == (first.streams, first.validation) and again.score != first.score
    assert [e["step"] for e in events(tmp_path, "val_probe")] == [2, 4]
    assert [e["budget"] for e in events(tmp_path, "phase") if e["name"] == "val_probe"] == ["none"] * 2


def test_eval_only_reproduces_the_score_exactly_without_training_data(single: Path, dataset, tmp_path):
    """In a fresh process that knows nothing but the file and where datasets and the tokenizer are: the artifact says on
    which validation shards it is scored, with which tokenizer, and how."""
    for name, source in (("other", "train"), ("mine", "val")):
        (tmp_path / "datasets" / name).mkdir(parents=True)
        (tmp_path / "datasets" / name / "fineweb_val_000000.bin").symlink_to(
            Path(dataset["data_path"]) / f"fineweb_{source}_000000.bin")
    env = dict(EVAL_ONLY=str(single / "r.bin"), DATA_DIR=str(tmp_path), DEVICE="cpu", LOG_DIR=str(tmp_path), RUN_ID="r",
               DTYPE="float32", TOKENIZER_PATH=dataset["tokenizer_path"])
    done = subprocess.run([sys.executable, "train_gpt.py"], cwd=ROOT, env=os.environ | env,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    again, first = events(tmp_path, "verdict")[0], events(single, "verdict")[0]
    assert first["diagnostic_evals"].pop("ema") and not (tmp_path / "r.bin").exists()
    assert all(again[name] == first[name] for name in ("val_loss", "validation", "ledger_sha256"))
    assert again["diagnostic_evals"].items() <= first["diagnostic_evals"].items() and not again["other_validation"]


def test_an_artifact_is_scored_on_other_data_only_if_that_is_said(single: Path, dataset, tmp_path, capsys):
    env = dict(EVAL_ONLY=str(single / "r.bin"), DATA_DIR=str(tmp_path), DEVICE="cpu", LOG_DIR=str(tmp_path), RUN_ID="r",
               DTYPE="float32", TOKENIZER_PATH=dataset["tokenizer_path"], TTT="none", DIAGNOSTIC_EVALS="")
    (tmp_path / "datasets" / "x").mkdir(parents=True)
    ids = tg.open_shard(Path(dataset["data_path"]) / "fineweb_val_000000.bin")
    write_shard(tmp_path / "datasets" / "x" / "fineweb_val_000000.bin", ids[:300])
    assert tg.main([], env) == 2
    assert "validation shards and the tokenizer that the artifact was made for; DATA_PATH=" in capsys.readouterr().err
    assert tg.main([], {**env, "DATA_PATH": str(tmp_path / "datasets" / "x")}) == 0
    assert events(tmp_path, "verdict")[0]["other_validation"] is True
    assert "was made for another validation set or tokenizer" in events(tmp_path, "warning")[0]["text"]


def test_text_with_case_operators_is_scored_by_its_side_file(dataset, tmp_path, capsys):
    """The side file beside the shards tells; a knob against it is refused."""
    folder = tmp_path / "data"
    shutil.copytree(dataset["data_path"], folder)
    shutil.copy(folder / "fineweb_val_000000.bin", folder / "fineweb_val_bytes_000000.bin")
    assert tg.main([], environment(dataset, tmp_path, data_path=str(folder), caseops_enabled="0")) == 2
    assert "CASEOPS_ENABLED=0: expected 1: the text in" in capsys.readouterr().err
    assert tg.on_its_data(tg.Config.from_env(env := environment(dataset, tmp_path, data_path=str(folder))), "", env
                          ).caseops_enabled


@pytest.mark.parametrize("change, expected", [
    ({"num_kv_heads": "3"}, "NUM_KV_HEADS=3"), ({"data_path": "/nowhere"}, "/nowhere: no such dataset folder"),
    ({"vocab_size": "256"}, "VOCAB_SIZE=256"), ({"eval_only": "/nowhere.bin"}, "EVAL_ONLY=/nowhere.bin: no such file"),
    ({"log_dir": "/tmp/" + 300 * "x"}, "File name too long"), ({"run_id": 201 * "x"}, "x: expected a file name of"),
    ({"max_wallclock_seconds": "5"}, "GPTQ_RESERVE_SECONDS=8"), ({"artifact_bytes_cap": "9"}, "ARTIFACT_BYTES_CAP=9"),
    ({"artifact_bytes_cap": "150000", "bigram_buckets": "9000"}, "0: code takes"),
    # what a launcher should have set
    ({"rank": "1"}, "RANK=1 LOCAL_RANK=0 WORLD_SIZE=1: expected numbers"), ({"world_size": "x"}, "WORLD_SIZE=x: exp"),
    ({"rank": "-1", "world_size": "2"}, "RANK=-1"), ({"rank": "1", "world_size": "2"}, "MASTER_ADDR or MASTER_PORT")])
def test_a_users_mistake_is_one_line_and_status_2(change, expected, dataset, tmp_path, capsys):
    assert tg.main([], environment(dataset, tmp_path, **change)) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1 and not list(tmp_path.glob("*.bin"))
    assert tg.main(["--check"], {}) == 2 and "knobs are environment variables" in capsys.readouterr().err


def test_a_rank_that_has_no_gpu_says_so(capsys, monkeypatch):
    """The others have one, and nothing to say."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert tg.main([], {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "8", "DEVICE": "cuda"}) == 2
    err = capsys.readouterr().err
    assert "no GPU for local rank 5, torch sees 4; lower --nproc_per_node" in err and err.count("\n") == 1


@pytest.mark.parametrize("function, phase, remedy", [
    ("muon_momentum", "train step 1", "MICRO_BATCH_TOKENS=128"), ("adapted_score", "score", "TTT_BATCH_SIZE=64"),
    ("plan_windows", "score_ema", "VAL_BATCH_TOKENS=1024")])
def test_out_of_memory_is_one_line_with_phase_and_remedy(function, phase, remedy, dataset, tmp_path, capsys,
                                                         monkeypatch):
    monkeypatch.setattr(tg, function, lambda *_: torch.empty(1 << 60))
    assert tg.main([], environment(dataset, tmp_path, iterations=1, diagnostic_evals="ema")) == 2
    err = capsys.readouterr().err
    assert f"train_gpt.py: out of memory in phase {phase}: lower {remedy} (" in err and "you tried to allocate" in err


def test_a_bug_is_a_traceback_with_phase_and_step_and_status_1(dataset, tmp_path, capfd, monkeypatch):
    """The process ends at once: nobody waits for what a rank that failed never joins."""
    monkeypatch.setattr(tg, "muon_momentum", lambda cfg, step: 0.9 if step < 2 else 1 / 0)
    monkeypatch.setattr(os, "_exit", sys.exit)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        tg.main([], environment(dataset, tmp_path))
    err = capfd.readouterr().err
    assert ended.value.code == 1 and "ZeroDivisionError: division by zero" in err
    assert "rank 0 failed in phase train step 3: ZeroDivisionError" in err
    assert events(tmp_path, "error")[0]["kind"] == "ZeroDivisionError" and signal.getsignal(signal.SIGTERM) == handler


def test_an_artifact_without_room_names_the_remedy(dataset, tmp_path, capsys, monkeypatch):
    def full(path: Path, write: object) -> None:
        if path.suffix == ".bin":
            raise OSError(28, "No space left on device")
        path.write_bytes(b"a checkpoint")

    monkeypatch.setattr(tg, "write_whole", full)
    monkeypatch.setattr(tg, "fit_to_cap", lambda *_: b"an artifact")
    assert tg.main([], environment(dataset, tmp_path, checkpoint_every="4")) == 2
    err = capsys.readouterr().err
    assert "r.bin: cannot write: [Errno 28] No space left on device; make room; RESUME=1 RUN_ID=r goes on from" in err
    assert err.count("\n") == 1 and not (tmp_path / "r.bin").exists()
