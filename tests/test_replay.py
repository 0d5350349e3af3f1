"""A log is enough to run again what it tells of, and to see whether the same came out."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_checkpoint import QUICK
from test_main import environment, events

import train_gpt as tg


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory) -> Path:
    """A finished run of a few steps."""
    made = tmp_path_factory.mktemp("replayed")
    assert tg.main([], environment(dataset, made, **QUICK)) == 0
    return made


def replay(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "records/replay.py", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)


def test_a_log_is_enough_to_run_again_and_compare(folder):
    """From the log alone; the same numbers, and another seed's are told apart."""
    done = replay(folder / "r.txt")
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    assert "the same: 5 logged losses, train_end.steps" in done.stdout and "made with another" not in done.stdout
    other = replay(folder / "r.jsonl", "SEED=7")
    assert other.returncode == 1
    assert "artifact.sha256 differs" in other.stdout and "5 of 5 logged losses differ" in other.stdout
    made = sorted(p.name for p in folder.glob("r-replay-*.bin"))
    assert len(made) == 2 and (folder / made[0]).read_bytes() == (folder / "r.bin").read_bytes()


def test_what_cannot_be_run_again_is_one_line(folder, tmp_path):
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(line + "\n" for line in (folder / "r.jsonl").read_text().splitlines()
                           if json.loads(line)["event"] != "verdict"))
    other = tmp_path / "other.jsonl"
    other.write_text('{"event": "x"}\n')
    for argument, expected in ((cut, "no verdict"), (other, "names no knobs"), (tmp_path / "none", "no such log"),
                               ("SEED=1", "expected LOG.jsonl")):
        done = replay(argument)
        assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1


def test_a_log_sets_knobs_and_nothing_else(folder):
    """Whoever made it may have put in what loaders and interpreters obey, or a million processes."""
    sys.path.insert(0, str(ROOT / "records"))
    import evidence
    import replay
    found = [json.loads(line) for line in (folder / "r.jsonl").read_text().splitlines()]
    knobs = replay.knobs_of(found, folder)
    next(e for e in found if e["event"] == "config").update(ld_preload="/x.so", PATH=".", pythonpath=".")
    assert replay.knobs_of(found, folder) == knobs and knobs["SEED"] == "1337" and "RUN_ID" not in knobs
    for world in (10**6, 0, "many", None):
        next(e for e in found if e["event"] == "start")["world"] = world
        with pytest.raises((replay.ReplayError, evidence.AuditError)):
            evidence.readable("the log", replay.knobs_of, found, folder)


def test_the_log_says_from_what_it_was_made(folder):
    """Code, knobs, data and packages."""
    (start,), (versions,), (data,) = (events(folder, name) for name in ("start", "versions", "train_data"))
    assert len(start["code_sha256"]) >= 16 and len(versions["config_sha256"]) == 64 and versions["numpy"]
    assert "2 shards of" in data["corpus"] and data["manifest_sha256"] is None
