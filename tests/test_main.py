"""The whole program: tokens to a scored artifact, in one process and in several, and what it says when it cannot."""
import dataclasses
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, tiny

import train_gpt as tg

RECORD_COMMANDS = {
    1285: "DATA_DIR=./data SEED=42 MIXED_QUANT=1 N_INT6_LAYERS=66 MUON_WD=0.090 EMBED_WD=0.090 RECUR_LAYERS=4,5",
    1394: "RUN_ID=1337 SEED=1337",
    1493: "SEED=42 QK_GAIN_INIT=5.25 TTT_ENABLED=1 TTT_LR=0.005 TTT_EPOCHS=3",
    1514: "MUON_MOMENTUM=0.97 QK_GAIN_INIT=5.0 PARALLEL_RESIDUAL_START=7 LOOP_START=3 LOOP_END=5 TTT_ENABLED=1 "
          "TTT_LR=0.005 TTT_EPOCHS=3 TTT_CHUNK_TOKENS=32768 TTT_FREEZE_BLOCKS=0 NGRAM_TILT_ENABLED=1 "
          "NGRAM_WITHIN_BETA=0.0 NGRAM_WORD_BETA=0.0 SEED=42",
    1855: "VOCAB_SIZE=8192 CASEOPS_ENABLED=1 ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600 PHASED_TTT_ENABLED=1 "
          "EMBED_BITS=7 MATRIX_LR=0.026 MIN_LR=0.1 MLP_CLIP_SIGMAS=11.5 ATTN_CLIP_SIGMAS=13.0 EMBED_CLIP_SIGMAS=14.0 "
          "GRAD_CLIP_NORM=0.3 TTT_CHUNK_SIZE=48 WARMUP_STEPS=20 MUON_BACKEND_STEPS=5 GLOBAL_TTT_MOMENTUM=0.9 "
          "WARMDOWN_FRAC=0.85 BETA2=0.99 TTT_BETA2=0.99 SPARSE_ATTN_GATE_SCALE=0.5 GPTQ_RESERVE_SECONDS=0.5 "
          "GPTQ_CALIBRATION_BATCHES=16 VAL_LOSS_EVERY=0 GATED_ATTN_QUANT_GATE=1 SPARSE_ATTN_GATE_ENABLED=1 "
          "GATE_WINDOW=12 SMEAR_GATE_ENABLED=1 LQER_ENABLED=1 LQER_RANK=4 FUSED_CE_ENABLED=1 COMPRESSOR=pergroup",
    2014: "CASEOPS_ENABLED=1 VOCAB_SIZE=8192 ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600 EVAL_INCLUDE_TAIL=1 "
          "TRAIN_SEQ_LEN=3072 ROPE_TRAIN_SEQ_LEN=3072 TRAIN_SEQ_SCHEDULE=1024@0.100,2048@0.700,3072@1.000 "
          "TRAIN_SEQ_SCHEDULE_MODE=wallclock SEQ_CHANGE_WARMUP_STEPS=32 EVAL_SEQ_LEN=3072 EVAL_STRIDE=1536 "
          "TTT_ENABLED=1 TTT_EVAL_SEQ_LEN=3072 TTT_BATCH_SIZE=24 TTT_CHUNK_SIZE=48 TTT_SHORT_SCORE_FIRST_ENABLED=1",
}


def environment(dataset: dict[str, str], folder: Path, **knobs: object) -> dict[str, str]:
    """Environment of a tiny run that leaves its files in `folder`."""
    values = {**TINY, **dataset, "log_dir": str(folder), "run_id": "r", **knobs}
    return {name.upper(): tg.show(value) for name, value in values.items()}


def events(folder: Path, name: str) -> list[dict]:
    """All events of that name in the run's log."""
    lines = (folder / "r.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == name]


def start(env: dict[str, str], *launcher: str) -> subprocess.Popen:
    """`train_gpt.py` in a process of its own, by `python` or by torchrun with these arguments."""
    command = [sys.executable, *(("-m", "torch.distributed.run", *launcher) if launcher else ()), "train_gpt.py"]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def finish(process: subprocess.Popen) -> str:
    """Standard error of a process that must succeed."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out[-2000:] + err[-4000:]
    return err


@pytest.fixture(scope="module")
def single(dataset: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run in this process."""
    folder = tmp_path_factory.mktemp("single")
    assert tg.main([], environment(dataset, folder)) == 0
    return folder


def test_a_run_ends_in_one_verdict_whose_bytes_are_those_of_the_file(single: Path):
    (verdict,) = events(single, "verdict")
    (artifact,) = events(single, "artifact")
    blob = (single / "r.bin").read_bytes()
    assert verdict["weight_bytes"] == len(blob) and artifact["sha256"] == hashlib.sha256(blob).hexdigest()
    assert verdict["code_bytes"] == len(tg.shipped_source(ROOT / "train_gpt.py"))
    assert verdict["artifact_bytes"] == verdict["weight_bytes"] + verdict["code_bytes"] <= verdict["cap_bytes"]
    assert list(verdict["ladder"]) == ["ema", "quantized", "sliding", "lora+ngram"]
    assert verdict["val_bpb"] == verdict["ladder"]["lora+ngram"] != verdict["ladder"]["sliding"]
    assert verdict["order"] == "stream" and verdict["illegal"] == "" and len(verdict["ledger_sha256"]) == 64
    assert sorted(p.name for p in single.iterdir()) == ["r.bin", "r.jsonl", "r.txt"]


def test_no_second_lies_outside_the_phases(single: Path):
    """The three totals of the verdict add up, and all phases together are the run but for opening and closing it."""
    (verdict,) = events(single, "verdict")
    spent = verdict["train_seconds"] + verdict["eval_seconds"] + verdict["other_seconds"]
    assert spent == pytest.approx(verdict["total_seconds"], abs=0.01)
    assert sum(p["phase_seconds"] for p in events(single, "phase")) > 0.9 * verdict["total_seconds"]


def test_the_demo_trains(single: Path):
    """Four steps of the tiny model: the loss falls below that of a uniform guess."""
    losses = [e["loss_nats"] for e in events(single, "train")]
    assert len(losses) == 4 and losses[-1] < math.log(int(TINY["vocab_size"])) < losses[0] + 0.1


def test_validation_is_opened_after_the_artifact_is_frozen(dataset, tmp_path, monkeypatch):
    seen = []
    original = tg.ValData.load

    def watch(cfg: tg.Config, run: tg.Run) -> tg.ValData:
        seen.append(run.artifact_path.exists())
        return original(cfg, run)

    monkeypatch.setattr(tg.ValData, "load", watch)
    assert tg.main([], environment(dataset, tmp_path, ttt="none", eval_ladder="")) == 0
    assert seen == [True]


def test_a_step_budget_is_reproduced_bit_for_bit(single: Path, dataset, tmp_path):
    finish(start(environment(dataset, tmp_path)))
    assert (tmp_path / "r.bin").read_bytes() == (single / "r.bin").read_bytes()
    assert events(tmp_path, "verdict")[0]["ladder"] == events(single, "verdict")[0]["ladder"]


def test_eval_only_reproduces_the_score_exactly_without_training_data(single: Path, dataset, tmp_path):
    """In a fresh process that knows nothing but the file, the validation shards and the tokenizer."""
    val = tmp_path / "val"
    val.mkdir()
    (val / "fineweb_val_000000.bin").symlink_to(Path(dataset["data_path"]) / "fineweb_val_000000.bin")
    keep = ("DTYPE", "THREADS", "DEVICE", "VAL_BATCH_TOKENS", "LOG_DIR", "RUN_ID", "TOKENIZER_PATH", "TRAIN_SEQ_LEN",
            "MICRO_BATCH_TOKENS")
    env = {k: v for k, v in environment(dataset, tmp_path).items()
           if k in keep or k.startswith(("EVAL_", "TTT", "PHASED_", "GLOBAL_", "NGRAM_"))}
    finish(start({**env, "DATA_PATH": str(val), "EVAL_ONLY": str(single / "r.bin")}))
    mine, theirs = events(tmp_path, "verdict")[0], events(single, "verdict")[0]
    assert mine["val_loss"] == theirs["val_loss"] and mine["val_bpb"] == theirs["val_bpb"]
    assert mine["ladder"]["quantized"] == theirs["ladder"]["quantized"]
    assert not (tmp_path / "r.bin").exists()


def compare(folder: Path, single: Path) -> None:
    """Losses of every step within 2e-4 nats, scores within 2e-3: fp32 sums in another order, four Muon steps.

    Adaptation amplifies what differs between the two artifacts; to one artifact ranks adapt as one within 2e-3 (below).
    """
    mine, theirs = ([e["loss_nats"] for e in events(f, "train") + events(f, "train_end")] for f in (folder, single))
    assert mine == pytest.approx(theirs, abs=2e-4) and len(mine) == 5
    mine, theirs = (events(f, "verdict")[0] for f in (folder, single))
    fixed = ("ema", "quantized", "sliding")
    assert [mine["ladder"][r] for r in fixed] == pytest.approx([theirs["ladder"][r] for r in fixed], abs=2e-3)
    assert mine["val_bpb"] == pytest.approx(theirs["val_bpb"], abs=2e-2)
    same = ("tokens", "bytes", "ledger_sha256")
    assert [mine[name] for name in same] == [theirs[name] for name in same]


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_train_and_score_as_one(ranks: int, single: Path, dataset, tmp_path):
    finish(start(environment(dataset, tmp_path), "--standalone", f"--nproc_per_node={ranks}"))
    compare(tmp_path, single)


@pytest.mark.parametrize("ranks, knobs", [(2, {}), (3, dict(ttt="sgd", ttt_chunk_tokens=300, ttt_lr=0.05))])
def test_several_ranks_adapt_to_an_artifact_as_one(ranks: int, knobs: dict, single: Path, dataset, tmp_path):
    """The same loss within 2e-3 nats, the same ledger: who scored what is no part of the result.

    Batches of other shapes round otherwise, and AdamW's first steps (by the gradient's sign) amplify that.
    """
    env = {"eval_only": str(single / "r.bin"), "eval_ladder": "", **knobs}
    env = {k: v for k, v in environment(dataset, tmp_path, **env).items()
           if k.lower() not in {f.name for f in dataclasses.fields(tg.ModelKnobs)}}
    assert tg.main([], {**env, "RUN_ID": "one"}) == 0
    finish(start(env, "--standalone", f"--nproc_per_node={ranks}"))
    mine, theirs = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()][-1]
                    for name in ("r.jsonl", "one.jsonl"))
    assert mine["event"] == "verdict" and mine["val_loss"] == pytest.approx(theirs["val_loss"], abs=2e-3)
    assert mine["ledger_sha256"] == theirs["ledger_sha256"]


def test_two_nodes_train_and_score_as_one(single: Path, dataset, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [start({**environment(dataset, tmp_path), "GLOO_SOCKET_IFNAME": "lo"}, "--nnodes=2", f"--node_rank={node}",
                   "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}") for node in (0, 1)]
    for node in nodes:
        finish(node)
    compare(tmp_path, single)


def test_a_wall_clock_budget_is_kept(dataset, tmp_path):
    env = environment(dataset, tmp_path, max_wallclock_seconds=3, gptq_reserve_seconds=1, iterations=10 ** 6,
                      train_log_every=1000)
    assert tg.main([], env) == 0
    (end,) = events(tmp_path, "train_end")
    assert end["reason"] == "budget" and end["train_seconds"] < 2.5  # a busy machine may make the last step longer


def test_a_probe_of_validation_is_marked_and_not_charged(dataset, tmp_path, monkeypatch):
    real = tg.evaluate
    monkeypatch.setattr(tg, "evaluate", lambda *args: time.sleep(args[-1] == "probe") or real(*args))
    assert tg.main([], environment(dataset, tmp_path, val_loss_every=2, ttt="none", eval_ladder="")) == 0
    assert [e["step"] for e in events(tmp_path, "val_probe")] == [2, 4]
    (end,), (verdict,) = events(tmp_path, "train_end"), events(tmp_path, "verdict")
    whole = sum(e["phase_seconds"] for e in events(tmp_path, "phase") if e["budget"] == "train")
    assert end["train_seconds"] < whole - 2 and verdict["train_seconds"] < whole - 2 + 0.01
    assert verdict["other_seconds"] > 2


@pytest.mark.parametrize("record", RECORD_COMMANDS)
def test_check_accepts_the_run_commands_of_records(record: int, capsys, tmp_path, monkeypatch):
    """Each prints plan, routes and predicted size; #1855 has its parameter count."""
    monkeypatch.chdir(tmp_path)
    env = dict(pair.split("=", 1) for pair in RECORD_COMMANDS[record].split())
    assert tg.main(["--check"], env) == 0
    out = capsys.readouterr().out
    assert "layer plan, loop on" in out and "routes:" in out and "predicted" in out
    assert not list(tmp_path.iterdir())
    if record == 1855:
        assert "parameters=35945671" in out


def test_a_rank_that_has_no_gpu_says_so(capsys, monkeypatch):
    """The others have one, and nothing to say."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert tg.main([], {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "8", "DEVICE": "cuda"}) == 2
    assert capsys.readouterr().err == "train_gpt.py: rank 5: local rank 5 has no GPU: torch sees 4; lower " \
                                      "--nproc_per_node to 4\n"


@pytest.mark.parametrize("change, expected", [
    ({"num_kv_heads": "3"}, "NUM_KV_HEADS=3"),
    ({"data_path": "/nowhere"}, "/nowhere: no such dataset folder"),
    ({"vocab_size": "256"}, "VOCAB_SIZE=256"),
    ({"eval_only": "/nowhere.bin"}, "EVAL_ONLY=/nowhere.bin: no such file"),
    ({"max_wallclock_seconds": "5"}, "GPTQ_RESERVE_SECONDS=8"),
    ({"device": "cuda"}, "DEVICE=cuda"),
])
def test_a_users_mistake_is_one_line_and_status_2(change, expected, dataset, tmp_path, capsys):
    if change.get("device") and torch.cuda.is_available():
        change = {"attention": "sdpx"}
        expected = "ATTENTION=sdpx"
    assert tg.main([], environment(dataset, tmp_path, **change)) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1 and not (tmp_path / "r.bin").exists()


def test_a_loss_that_is_not_finite_is_status_3(dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tg.GPT, "total_loss", lambda self, *a, **k: sum(p.sum() for p in self.parameters()) * torch.nan)
    assert tg.main([], environment(dataset, tmp_path)) == 3
    assert "not finite at step 4" in capsys.readouterr().err  # MAX_SKIPPED_STEPS=3


def test_every_name_of_eval_only_is_obeyed(capsys, tmp_path):
    assert tg.main([], {"EVAL_ONLY_QUANTIZED_PATH": str(tmp_path / "absent.bin"), "LOG_DIR": str(tmp_path),
                        "DEVICE": "cpu"}) == 2
    assert "absent.bin: no such file" in capsys.readouterr().err


# -- resources -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function, phase, remedy", [
    ("muon_momentum", "train step 1", "lower MICRO_BATCH_TOKENS=128, such as MICRO_BATCH_TOKENS=64 ("),
    ("calibrate", "calibrate", "MICRO_BATCH_TOKENS=64 ("), ("ngram_hints", "ngram", "set NGRAM_TILT_ENABLED=0"),
    ("adapted_score", "score", "TTT_BATCH_SIZE=64, such as TTT_BATCH_SIZE=32 ("),
    ("plan_windows", "score_ema", "lower VAL_BATCH_TOKENS=1024, such as VAL_BATCH_TOKENS=512")])
def test_out_of_memory_is_one_line_with_phase_and_remedy(function, phase, remedy, dataset, tmp_path, capsys,
                                                         monkeypatch):
    monkeypatch.setattr(tg, function, lambda *given: torch.empty(1 << 60))
    assert tg.main([], environment(dataset, tmp_path, iterations=1, gptq_calibration_batches=1)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"train_gpt.py: out of memory in phase {phase}: ") and remedy in err and err.count("\n") == 1
    assert "you tried to allocate" in err and ("RESUME=1" in err) == (tmp_path / "r.bin").exists()


def test_other_errors_are_not_called_memory(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "muon_momentum", lambda *given: (_ for _ in ()).throw(RuntimeError("bug")))
    with pytest.raises(RuntimeError, match="bug"):
        tg.main([], environment(dataset, tmp_path))


def test_what_cannot_last_is_said_before_training(dataset, tmp_path, capsys, monkeypatch):
    """Memory: a warning with the knob to lower and a value that fits by the same prediction. Disk: refused."""
    monkeypatch.setattr(tg, "memory_left", lambda run: 900 << 20)
    monkeypatch.setattr(tg, "predicted_bytes", lambda *given: {"gptq:mlp": 10 ** 15})
    assert tg.main([], environment(dataset, tmp_path, ttt_batch_size=4096, iterations=1, ttt="none",
                                   train_batch_tokens=2 ** 20, micro_batch_tokens=2 ** 20,
                                   artifact_bytes_cap=10 ** 15)) == 2
    (told,), (warning,) = events(tmp_path, "resources"), events(tmp_path, "warning")
    assert told["memory_left_mib"] == 900 < told["train_mib"]
    value = int(warning["text"].rpartition("=")[2])
    lower = dict(log_dir=str(tmp_path), train_batch_tokens=2 ** 20, micro_batch_tokens=value)
    with tg.Run(tiny(**lower), {}) as run:
        assert tg.predicted_memory(run.cfg, run, 0)["train"] <= 0.9 * (900 << 20) and value >= 2 ** 13
    err = capsys.readouterr().err
    assert "the run needs 1,000,000," in err and "make room or set ARTIFACT_DIR" in err and err.count("\n") == 1
    assert not events(tmp_path, "train") and not (tmp_path / "r.bin").exists()


def test_a_verdict_that_reached_no_disk_is_an_error_and_is_made_again(dataset, tmp_path, capsys, monkeypatch):
    env = environment(dataset, tmp_path, iterations=1, ttt="none", eval_ladder="")
    with monkeypatch.context() as full:
        full.setattr(tg.Run, "logged", lambda run: False)
        assert tg.main([], env) == 2
    err = capsys.readouterr().err
    assert "its verdict is on the screen alone" in err and f"RESUME=1 RUN_ID=r goes on from {tmp_path}" in err
    assert tg.main([], env | {"RESUME": "1"}) == 0 and not list(tmp_path.glob("*.score*"))
    first, second = events(tmp_path, "verdict")
    assert first["ledger_sha256"] == second["ledger_sha256"] and first["val_bpb"] == second["val_bpb"]
    assert tg.main([], env | {"RESUME": "auto"}) == 2 and "EVAL_ONLY=" in capsys.readouterr().err


def test_an_artifact_without_room_names_the_remedy(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tg.tempfile, "tempdir", str(tmp_path))
    limits = tg.resource.getrlimit(tg.resource.RLIMIT_FSIZE)
    tg.resource.setrlimit(tg.resource.RLIMIT_FSIZE, (1000, limits[1]))
    run.checkpoint_path.touch()
    try:
        with pytest.raises(tg.UserError, match="make room or set ARTIFACT_DIR; RESUME=1 RUN_ID=.* goes on from"):
            tg.write_artifact(bytes(2000), run.artifact_path, run)
    finally:
        tg.resource.setrlimit(tg.resource.RLIMIT_FSIZE, limits)
    assert not run.artifact_path.exists() and not list(tmp_path.rglob("*.tmp"))
