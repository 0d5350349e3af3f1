"""A log is enough to run again what it tells of, and to see whether the same came out."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, ROOT, environment, refusal

import train_gpt as tg
from tools import logs
from tools import replay as rp
from tools.common import ToolError


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory) -> Path:
    """A finished run of a few steps."""
    made = tmp_path_factory.mktemp("replayed")
    assert tg.main([], environment(dataset, made, **{**QUICK, "iterations": 5})) == 0
    return made


def test_a_log_is_enough_to_run_again_and_compare(folder, monkeypatch, capsys):
    """From the log alone; the same numbers, and another seed's are told apart."""
    env = {**os.environ, "LOG_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-m", "tools.replay", folder / "r.txt"], cwd=ROOT, text=True, env=env,
                          capture_output=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    assert "the same: 5 logged losses, train_end.steps" in done.stdout and "made with another" not in done.stdout
    monkeypatch.setattr(rp, "start", lambda env, world: tg.main([], env))  # in this process
    assert rp.main([str(folder / "r.jsonl"), "SEED=7"], env) == 1
    out = capsys.readouterr().out
    assert "artifact.sha256 differs" in out and "5 of 5 logged losses differ" in out
    made = sorted(p.name for p in folder.glob("r-replay-*.bin"))
    assert len(made) == 2 and (folder / made[0]).read_bytes() == (folder / "r.bin").read_bytes()


def test_what_cannot_be_run_again_is_one_line(folder, tmp_path):
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(line + "\n" for line in (folder / "r.jsonl").read_text().splitlines()
                           if json.loads(line)["event"] != "verdict"))
    other = tmp_path / "other.jsonl"
    other.write_text('{"event": "x"}\n')
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text((folder / "r.jsonl").read_text() + '{"event": "verdict", "val_bpb": "1"}\n')
    for argument, expected in ((damaged, "damaged.jsonl: cannot be read"), (cut, "no verdict"),
                               (other, "names no knobs"), (tmp_path / "none", "no such log"),
                               ("SEED=1", "SEED=1: no such log")):
        assert expected in refusal(rp.main, [str(argument)], {"LOG_DIR": str(tmp_path)})
    assert not list(tmp_path.glob("*-replay-*"))


def test_a_log_sets_knobs_and_nothing_else(folder):
    """Whoever made it may have put in what loaders and interpreters obey, or a million processes."""
    log = logs.events(folder / "r.jsonl")
    values = rp.knobs_of(log, folder)
    logs.last(log, "config").update(ld_preload="/x.so", PATH=".", pythonpath=".")
    assert rp.knobs_of(log, folder) == values and values["SEED"] == "1337" and "RUN_ID" not in values
    for world in (10**6, 0, "many", None):
        logs.last(log, "start")["world"] = world
        with pytest.raises(ToolError):
            logs.readable("the log", rp.knobs_of, log, folder)


def test_a_log_does_not_say_where_its_replay_writes(folder, tmp_path, monkeypatch):
    """Run id and folder are the user's; the logged run id gives a name, and no way out of the folder."""
    lines = logs.events(folder / "r.jsonl")
    logs.last(lines, "start").update(run_id="../../up and out")
    logs.last(lines, "config").update(log_dir="/nowhere", resume="1", run_id="../x", checkpoint_every="1")
    log = tmp_path / "MATRIX_LR=0.018-SEED=42-k1.jsonl"  # as a sweep names them
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = []
    monkeypatch.setattr(rp, "start", lambda env, world: seen.append(env) or 7)
    for env, more in (({"RUN_ID": "y"}, []), ({"LOG_DIR": "a"}, []), ({"LOG_DIR": "a"}, ["LOG_DIR=c"])):
        with pytest.raises(ToolError, match="ended with status 7"):
            rp.main([str(log), *more], env)
    assert all(not {"RESUME", "CHECKPOINT_EVERY"} & set(env) for env in seen)
    assert [env["LOG_DIR"] for env in seen] == ["logs", "a", "c"]
    assert all(env["RUN_ID"].startswith("up_and_out-replay-") for env in seen)
    with pytest.raises(ToolError, match="SEEDS: no such knob"):
        rp.main([str(log), "SEEDS=1"], {})


def test_the_log_says_from_what_it_was_made(folder):
    """Code, knobs, data and packages."""
    start, data = (logs.last(logs.events(folder / "r.jsonl"), name) for name in ("start", "train_data"))
    assert len(start["code_sha256"]) >= 16 and len(start["config_sha256"]) == 64 and start["numpy"]
    assert "2 shards of" in data["corpus"] and data["manifest_sha256"] is None
