"""The published systems in records/ are configs of this program, and run.sh takes a folder's knobs as it says."""
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

import train_gpt as tg
from bench.systems import knobs_of

SYSTEMS = sorted(path.parent.name for path in ROOT.glob("records/*/config.env"))


def knobs(name: str) -> dict[str, str]:
    return knobs_of(ROOT / "records" / name)


def test_all_systems_are_here():
    assert {"pr4", "pr640", "pr1260", "pr1485", "pr1485_illegal", "pr1514", "pr1855", "pr2135"} <= set(SYSTEMS)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_a_config_under_the_cap(name: str):
    """SDClip's size is predicted from Gaussian rows, to half a percent; the packer takes up what is over."""
    cfg, warnings = tg.Config.from_env(knobs(name))
    assert not warnings and set(knobs(name)) <= {knob.name for knob in tg.knobs()}
    code = len(tg.shipped_source(ROOT / "train_gpt.py")) if name == "pr1855" else 52_000
    assert sum(tg.predicted_bytes(cfg, code).values()) + code < 1.005 * cfg.artifact_bytes_cap
    assert bool(tg.illegal(cfg)) == name.endswith("_illegal")
    text = (ROOT / "records" / name / "README.md").read_text()
    assert len(text.splitlines()) <= 25 and ("**Legal:**" in text or "ILLEGAL" in text)


def test_the_twins_differ_in_how_they_adapt_alone():
    illegal, legal = knobs("pr1485_illegal"), knobs("pr1485")
    assert {k for k in illegal | legal if illegal.get(k) != legal.get(k)} <= {k for k in illegal | legal if "TTT" in k}


def test_what_grew_on_the_fourth_is_switched_on_there():
    """Late rounding in the last twentieth; ternary codes from the first step on; low rank in few bytes."""
    late, ternary = (tg.Config.from_env(knobs(name))[0] for name in ("pr4", "pr640"))
    assert late.bigram_buckets and late.smear_gate_enabled and 0 < late.rope_dims < late.head_dim
    assert [at.rounded for at in tg.stages(late)] == [False, True] and not tg.stage(late, 0.95).rounded
    assert [at.rounded for at in tg.stages(ternary)] == [True]
    assert ternary.grid("mlp")[0] == ternary.grid("attn")[0] == 2
    assert sum(tg.predicted_bytes(tg.Config.from_env({**knobs("pr4"), "MLP_RANK": "192"})[0], 0).values()) < \
        0.8 * sum(tg.predicted_bytes(late, 0).values())


def test_the_record_has_its_parameters():
    model = tg.shapes_of(tg.Config.from_env(knobs("pr1855"))[0])
    assert sum(p.numel() for p in model.parameters()) == 35_945_671


@pytest.fixture
def shell(tmp_path: Path) -> Path:
    """run.sh in a folder of its own, with a Python that says what it was asked to do, and under which environment."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\ncase $1 in -VV) echo fake;; -c) echo 1;; *) echo RAN \"$@\"; env;; esac\n")
    python.chmod(0o755)
    for name in ("run.sh", "requirements.txt", "train_gpt.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "stamp").write_text((tmp_path / "requirements.txt").read_text() + "fake\n")
    shutil.copytree(ROOT / "records" / "pr1260", tmp_path / "records" / "pr1260")
    return tmp_path


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["./run.sh", *arguments], cwd=folder, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin:/usr/local/bin", **environment})


@pytest.mark.parametrize("verb, ran", [("train", "RAN train_gpt.py"), ("check", "RAN train_gpt.py --check")])
def test_a_folder_gives_knobs_and_arguments_and_environment_come_first(verb: str, ran: str, shell: Path):
    done = run(shell, verb, "records/pr1260", "EMA_DECAY=0.5", "SEED=7", MATRIX_LR="0.03")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and ran in lines, done.stderr
    assert {"EMA_DECAY=0.5", "SEED=7", "MATRIX_LR=0.03", "VOCAB_SIZE=4096", "MUON_WD=0.085"} <= set(lines)
    assert "N_INT6_LAYERS=60" in lines and not any("matrices" in line for line in lines)
    assert "EMA_DECAY=0.5" in run(shell, verb, "EMA_DECAY=0.5").stdout.splitlines()


def test_what_is_typed_must_be_a_knob(shell: Path):
    """What the environment has besides, or what other programs read, need not."""
    lines = run(shell, "train", "LEARNING_RATE=1", "NCCL_NET=Socket", "NPROC=1", EPOCHS="3").stdout.splitlines()
    typed = next(line for line in lines if line.startswith("KNOBS_TYPED="))
    assert typed.split("=")[1].split() == ["LEARNING_RATE", "NCCL_NET"]
    assert {"NCCL_NET=Socket", "EPOCHS=3"} <= set(lines)


def test_processes_are_a_number_and_one_on_a_cpu(shell: Path):
    done = run(shell, "train", "NPROC=two")
    assert done.returncode == 2 and done.stderr.startswith("run.sh: NPROC=two: expected a number")
    python = shell / ".venv/bin/python"
    python.write_text(python.read_text().replace("echo 1;;", "echo 8;;"))  # GPUs
    ran = {device: run(shell, "train", DEVICE=device).stdout.splitlines()[0] for device in ("cpu", "auto")}
    assert ran == {"cpu": "RAN train_gpt.py",
                   "auto": "RAN -m torch.distributed.run --standalone --nproc_per_node=8 train_gpt.py"}


def test_the_demo_shows_the_log_where_it_is(shell: Path):
    lines = run(shell, LOG_DIR="elsewhere", RUN_ID="r").stdout
    assert "RAN records/summary.py elsewhere/r.jsonl" in lines and "EVAL_ONLY=elsewhere/r.bin ./run.sh train" in lines


def test_check_of_a_submissions_folder_is_its_check(shell: Path):
    (shell / "other").mkdir()
    assert "RAN records/submission.py check other" in run(shell, "check", "other").stdout.splitlines()
    shutil.copy(shell / "records/pr1260/config.env", shell / "other")
    (shell / "other/train_gpt.py").touch()
    assert "RAN records/submission.py check other" in run(shell, "check", "other").stdout.splitlines()


def test_what_is_no_folder_is_said(shell: Path):
    for verb in ("train", "check"):
        done = run(shell, verb, "nowhere")
        assert done.returncode == 2 and done.stderr == "run.sh: nowhere: no config.env there; expected a folder such " \
                                                       "as records/pr1855\n"
