"""A submission's folder is made from whole, equal, lawful runs alone, and every fault planted in one is named."""
import functools
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import ROOT, TINY

import train_gpt as tg
from tools import audit, submission
from tools.common import ToolError
from tools.evidence import Finding, load_module, static_audit

SEEDS = (42, 0, 1234)
WHO = {"AUTHOR": "Ada Lovelace", "GITHUB_ID": "ada"}


@pytest.fixture(scope="session")
def runs(dataset: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Logs of three tiny runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("logs")
    for seed in SEEDS:
        knobs = {**TINY, **dataset, "log_dir": str(folder), "run_id": f"s{seed}", "seed": seed, "iterations": 2,
                 "ttt": "none", "ngram_base_beta": 0, "eval_stride": 0, "quant": "sdclip", "num_layers": 2,
                 "loop_start": 0, "loop_end": 0, "parallel_start_layer": 1, "diagnostic_evals": "ema,quantized"}
        assert tg.main([], {name.upper(): tg.show(value) for name, value in knobs.items()}) == 0
    return [str(folder / f"s{seed}.jsonl") for seed in SEEDS]


@pytest.fixture(scope="session")
def made(runs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `submit` makes of them, audited and checked."""
    root = tmp_path_factory.mktemp("records")
    return submission.submit("Tiny_Model", runs, {**WHO, "ROOT": str(root), "DATE": "2026-11-22"})


# -- planted faults -------------------------------------------------------------------------------------

def edit_json(name: str = "submission.json", **values: Any) -> Callable[[Path], None]:
    """Set (or with None remove) fields; `a__b` is field b of a."""
    def plant(folder: Path) -> None:
        told = json.loads((folder / name).read_text())
        for path, value in values.items():
            *outer, last = path.split("__")
            place = told
            for key in outer:
                place = place[key]
            place.pop(last) if value is None else place.update({last: value})
        (folder / name).write_text(json.dumps(told))
    return plant


def edit_log(event: str, seeds: tuple[int, ...] = SEEDS, **values: Any) -> Callable[[Path], None]:
    """Set fields of the last event of that name in the logs of these seeds; without values: remove the event."""
    def plant(folder: Path) -> None:
        for seed in seeds:
            path = folder / f"train_seed{seed}.jsonl"
            events = [json.loads(line) for line in path.read_text().splitlines()]
            newest = [e for e in events if e["event"] == event][-1]
            newest.update(values)
            if not values:
                events.remove(newest)
            path.write_text("".join(json.dumps(e) + "\n" for e in events))
    return plant


def edit_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Replace the first match of a pattern in a file."""
    def plant(folder: Path) -> None:
        text = (folder / name).read_text(encoding="latin-1")
        assert re.search(old, text), name
        (folder / name).write_text(re.sub(old, lambda _: new, text, count=1), encoding="latin-1")
    return plant


def remove(*patterns: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for pattern in patterns for path in folder.glob(pattern)] and None


def source(code: str) -> Callable[[Path], None]:
    """Another program, and nothing that takes long to be read."""
    return lambda folder: remove("train_gpt_human.py")(folder) or (folder / "train_gpt.py").write_text(code) and None


def validation_first(folder: Path) -> None:
    """Move the event that opens the validation data to the front of a log."""
    path = folder / "train_seed42.jsonl"
    lines = path.read_text().splitlines(True)
    opened = [line for line in lines if '"val_data"' in line]
    path.write_text("".join(opened + [line for line in lines if line not in opened]))


FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no submission.json": (remove("submission.json"), "P1", "submission.json"),
    "no log": (remove("*.log", "*.jsonl"), "P1", "a log"),
    "no requirements": (remove("requirements.txt"), "P1", "requirements.txt"),
    "JSON cut short": (edit_text("submission.json", r"\}\s*$", ""), "P2", "not JSON"),
    "no date": (edit_json(date="yesterday"), "P2", "date"),
    "no score": (edit_json(val_bpb=None), "P2", "val_bpb"),
    "a better headline": (edit_json(val_bpb=1.05), "P3", "is not the mean of the seeds"),
    "a better seed": (edit_json(seed_results__42__val_bpb=1.05), "P4", "seed_results.42.val_bpb=1.05"),
    "the population's deviation of nothing": (edit_json(val_bpb_std=0.5), "P3", "not the sample standard deviation"),
    "bytes counted with the space twice": (edit_json(val_loss=4.7, val_bpb=4.7 * 0.228 / 0.693147), "P3", "ruling O"),
    "a seed without a log": (remove("train_seed0.*"), "P4", "seed_results.0"),
    "seeds that are not its results": (edit_json(seeds=[42, 0, 7]), "P3", "seeds and seed_results disagree"),
    "three seeds claimed with one": (edit_json(seeds=[42], seed_results={}), "P3", "fewer seeds than said"),
    "one seed twice": (edit_log("verdict", (0,), seed=42), "P4", "one seed in two logs"),
    "over the cap": (edit_log("verdict", artifact_bytes=16_000_001), "A4", "exceed the cap"),
    "over the cap in JSON": (edit_json(bytes_total=16_024_793), "P6", "over the cap"),
    "code bytes that are not the file's": (edit_log("verdict", code_bytes=31_999), "P7", "not the bytes"),
    "another packed program": (edit_text("train_gpt_human.py", "BOS_ID = 1", "BOS_ID = 2"), "P7", "two programs"),
    "a source nobody ran": (edit_text("train_gpt_human.py", "BOS_ID = 1", "BOS_ID = 2"), "P7", "neither source"),
    "mixed config": (edit_log("config", (0,), matrix_lr=0.5), "P5", "mixed config (matrix_lr)"),
    "another validation set": (edit_log("val_data", (0,), targets=9), "P5", "mixed validation set"),
    "mixed machines": (edit_log("start", (0,), world=4), "P5", "mixed machine"),
    "targets left out": (edit_log("verdict", (42,), tokens=1_000), "P4", "of 1,373 targets"),
    "bytes of another text": (edit_log("verdict", bytes=30_000), "A3", "ruling O"),
    "training past its clock": (edit_log("verdict", (42,), train_seconds=602.0), "P6", "rulings I, J"),
    "evaluation past its clock": (edit_log("verdict", (42,), eval_seconds=652.0), "A1", "rulings I, J"),
    "more steps than the clock holds": (edit_json(seed_results__42__steps=10_000), "P3", "more steps"),
    "validation data before the artifact": (validation_first, "A2", "before the artifact was written"),
    "an untimed gap": (edit_log("verdict", (42,), total_seconds=900.0), "A1", "untimed gap"),
    "an unfinished run": (edit_log("verdict", (42,)), "P1", "no verdict"),
    "a log cut short": (edit_text("train_seed42.jsonl", r'\{"seconds": [\d.]+, "event": "config"', ""), "P1",
                        "no config"),
    "a text log of another run": (edit_text("train_seed42.log", r"verdict +val_bpb=\d", "verdict val_bpb=1"), "P4",
                                  "train_seed42.log"),
    "a README of another run": (edit_text("README.md", r"\*\*\d\.", "**1."), "P8", "lacks what the logs say"),
    "other knobs in config.env": (edit_text("config.env", "NUM_LAYERS=2", "NUM_LAYERS=5"), "P8", "NUM_LAYERS=5"),
    "no audit": (remove("audit.txt"), "P9", "missing"),
    "a failed audit": (edit_text("audit.txt", "C1=pass", "C1=FAIL(D1)"), "P9", "has failed"),
    "a wrong difference": (edit_json(comparison_baseline_bpb=1.06, delta_vs_leaderboard_bpb=-1.0), "P3", "baseline"),
    "a download in the program": (source("import requests\n"), "S2", "no network"),
    "a program that Python 3.10 cannot read": (source("def f(:\n"), "S1", "line 1"),
    "a machine beside the clock's": (lambda folder: None, "P6", "the track wants 8x H100"),
}
same_program = functools.lru_cache(submission.same_program)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No static audit, a second each time, and the same sources are compared once."""
    monkeypatch.setattr(submission, "same_program", same_program)
    monkeypatch.setattr(submission, "static_audit", lambda *_: [])


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str, made: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch):
    plant, code, words = FAULTS[name]
    folder = tmp_path / ("track_10min_16mb" if "clock" in name else made.parent.name) / made.name
    shutil.copytree(made, folder)
    plant(folder)
    if code.startswith("S"):
        monkeypatch.setattr(submission, "static_audit", static_audit)
    bad = [f for f in submission.check(folder) if f.failed]
    assert any(f.code == code and words in f"{f.figures} {f.text}" for f in bad), "\n".join(map(str, bad))


# -- the folder -----------------------------------------------------------------------------------------

def test_a_whole_folder_passes_and_counts_what_it_ships(made: Path):
    """`submit` has checked it whole."""
    told = json.loads((made / "submission.json").read_text())
    logs = [submission.read_log(path) for path in made.glob("*.jsonl")]
    assert told["bytes_code"] == (made / "train_gpt.py").stat().st_size
    assert told["bytes_total"] == max(log["artifact"]["weight_bytes"] for log in logs) + told["bytes_code"]
    assert told["val_bpb"] == pytest.approx(sum(log["verdict"]["val_bpb"] for log in logs) / 3)
    assert (made / "train_gpt_human.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    assert (made / "requirements.txt").read_text().startswith("torch==")


def test_an_error_that_a_run_went_on_after_is_none(made: Path, tmp_path: Path, quick: None):
    shutil.copytree(made, tmp_path / made.name)
    path = next((tmp_path / made.name).glob("*.jsonl"))
    whole, error = path.read_text(), json.dumps({"seconds": 1.0, "event": "error", "kind": "E", "text": "no"})
    for text, ends in ((f"{error}\n{whole}", False), (f"{whole}{error}\n", True)):
        path.write_text(text)
        assert any("ended in an error" in f.text for f in submission.check(path.parent)) == ends


def test_it_runs_from_inside_its_folder(made: Path, dataset: dict[str, str], tmp_path: Path, monkeypatch):
    knobs = [line for line in (made / "config.env").read_text().splitlines() if not line.startswith("#")]
    environment = dict(line.split("=", 1) for line in knobs) | {"SEED": "7", "LOG_DIR": str(tmp_path), "RUN_ID": "r"}
    monkeypatch.chdir(made)
    monkeypatch.setitem(sys.modules, "train_gpt", tg)  # put back afterwards
    module = load_module(Path("train_gpt.py"))
    assert module.main([], environment | {name.upper(): value for name, value in dataset.items()}) == 0
    log, first = submission.read_log(tmp_path / "r.jsonl"), submission.read_log(next(made.glob("*.jsonl")))
    assert log["start"]["code_sha256"] == hashlib.sha256((made / "train_gpt.py").read_bytes()).hexdigest()
    own = submission.PLACES | {"seconds"}
    assert {k: v for k, v in log["config"].items() if k not in own} == \
        {k: v for k, v in first["config"].items() if k not in own}


def altered(runs: list[str], folder: Path, plant: Callable[[Path], None]) -> list[str]:
    """Copies of the runs' logs with a fault, as `submit` gets them; the artifacts stay where they are."""
    for seed, run in zip(SEEDS, runs):
        for suffix in (".jsonl", ".txt"):
            shutil.copy(Path(run).with_suffix(suffix), folder / f"train_seed{seed}{suffix}")
    plant(folder)
    return [str(folder / f"train_seed{seed}.jsonl") for seed in SEEDS]


@pytest.mark.parametrize("plant, words", [
    (edit_log("start", code_sha256="f" * 64), "is not the code of"),
    (edit_log("verdict", code_bytes=1), "submit with that"),
    (edit_log("verdict", (0,)), "no log of a whole run"),
    (edit_log("artifact", (0,), sha256="0"), "is not the artifact"),
    (edit_log("verdict", (0,), eval_seconds="1.0"), "train_seed0.jsonl: cannot be read: "),
    (edit_log("config", preset="of 2031"), "cannot be read: KeyError: 'of 2031'"),
    (edit_log("verdict", (1234,), seed=42), "one run of each seed"),
    (validation_first, "before the artifact was written"),
    (edit_log("start", ()), "refutes the score"),
])
def test_submit_refuses_and_leaves_nothing(plant: Callable, words: str, runs: list[str], tmp_path: Path, monkeypatch):
    if "refutes" not in words:
        monkeypatch.setattr(submission, "dynamic_audit", lambda *_: pytest.fail("minutes would be spent"))
    refuted = Finding("D1", "C1", False, "", "a later id changes a score")  # what finds it has its own tests
    monkeypatch.setattr(audit, "audit", lambda *_: [refuted])
    monkeypatch.setattr(audit, "rehearse", lambda *_: [])
    with pytest.raises(ToolError, match=words):
        submission.submit("x", altered(runs, tmp_path, plant), {**WHO, "ROOT": str(tmp_path / "records")})
    assert not list((tmp_path / "records").rglob("*/*"))


@pytest.mark.parametrize("stage, error, status", [
    ("dynamic_audit", submission.Refuted("a.bin: the audit refutes the score:\nD1"), 1),
    ("check", submission.Refuted("nothing was made; refused for: P1"), 1),
    ("dynamic_audit", ToolError("a.bin: the audit cannot be made"), 2)])
def test_the_exit_status_tells_refuted_from_impossible(stage, error, status, runs, tmp_path, monkeypatch, called):
    monkeypatch.setattr(submission, "dynamic_audit", lambda *_: "verdict")
    monkeypatch.setattr(submission, stage, Mock(side_effect=error))
    options = [f"{name}={value}" for name, value in {**WHO, "ROOT": tmp_path / "records"}.items()]
    ended, _, said = called(submission.main, "submission.py", "submit", "x", *runs, *options)
    assert ended == status and str(error) in said and "submission.py: 2 of 3: auditing" in said
    assert not list((tmp_path / "records").rglob("*/*"))


def test_a_sweeps_run_ids_are_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOG_DIR", str(tmp_path))
    (tmp_path / "MATRIX_LR=0.018-SEED=42-k.jsonl").write_text('{"event": "start"}\n')
    who = [f"{name}={value}" for name, value in WHO.items()]
    for run, words in (("MATRIX_LR=0.018-SEED=42-k", "no log of a whole run"), ("LR=1", "LR=1: no such log")):
        with pytest.raises(ToolError, match=words):
            submission.main(["submit", "x", run, *who])


@pytest.mark.parametrize("number, options, words", [
    (2, {"TRACK": "track_10min_16mb"}, "SEEDS=3: runs given: 2"), (3, {"SEEDS": "5"}, "SEEDS=5: runs given: 3"),
    (3, {"AUTHOR": ""}, "AUTHOR= is missing"), (3, {"ROOT": __file__}, "cannot be made in"),
    (3, {"DATE": "today"}, "DATE=today: expected such as 2026-04-27"),
    (3, {"TRACK": "track_1h"}, "TRACK=track_1h: expected one of"), (3, {"BASELINE": "nowhere"}, "BASELINE=nowhere")])
def test_submit_says_what_it_lacks(number: int, options: dict, words: str, runs: list[str], tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "dynamic_audit", lambda *_: pytest.fail("minutes would be spent"))
    with pytest.raises(ToolError, match=re.escape(words)):
        submission.submit("x", runs[:number], {**WHO, "ROOT": str(tmp_path), **options})
    assert not list(tmp_path.iterdir())


# -- other people's folders -----------------------------------------------------------------------------

def foreign(folder: Path) -> Path:
    """A folder in the shape of the published ones: a program and text logs of another kind."""
    folder = folder / "track_10min_16mb" / "2026-04-27_Other"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# Other\n")
    (folder / "train_gpt.py").write_text("import torch\n")
    scores = {"42": 1.05989454, "0": 1.06124613, "1234": 1.06208695}
    for seed, bpb in scores.items():
        (folder / f"train_seed{seed}.log").write_text(
            "4945/20000 train_loss: 2.3 train_time:599600ms\nTotal submission size quantized+brotli: 15897259 bytes\n"
            f"quantized_ttt_phased val_loss:2.3194 val_bpb:{bpb:.8f} eval_time:508785ms\n")
    values = dict(author="A", github_id="a", name="Other", blurb="b", date="2026-04-27", val_loss=2.32202732,
                  val_bpb=1.06107587, bytes_total=15_907_550, bytes_code=13, seeds=[42, 0, 1234],
                  seed_results={seed: {"val_bpb": bpb, "val_loss": bpb / 1.06107587 * 2.32202732,
                                       "artifact_bytes": 15_907_550} for seed, bpb in scores.items()})
    (folder / "submission.json").write_text(json.dumps(values))
    return folder


def test_a_folder_of_another_program_is_judged_by_its_text_logs(tmp_path: Path):
    folder = foreign(tmp_path)
    assert [f for f in submission.check(folder) if f.failed] == []
    for old, new, words in (("599600ms", "602048ms", "ruling I"), ("eval_time:508785", "eval_time:652000", "ruling J"),
                            ("15897259", "16024793", "ruling Q"), ("val_bpb:1.0598", "val_bpb:1.0698", "in no log")):
        path = folder / "train_seed42.log"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        bad = [f for f in submission.check(folder) if f.failed]
        assert any(words in f.text for f in bad), (words, bad)
        path.write_text(text)
