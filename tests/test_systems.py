"""The published systems in records/ are configs of this program, and the one illegal one is refused by every judge."""
import functools
from pathlib import Path

import pytest
from conftest import ROOT, TINY

import train_gpt as tg
from records.pr1485_illegal import train_on_validation as specimen
from tools import audit, evidence, launch, submission
from tools.predict import predicted_bytes

SYSTEMS = sorted(path.parent.name for path in ROOT.glob("records/*/config.env"))


def knobs(name: str) -> dict[str, str]:
    """As `./run.sh train records/NAME` takes them: they need no translation."""
    return launch.config_env(ROOT / "records" / name, {name.upper() for name in tg.kinds(tg.Config)})


@functools.cache
def code_bytes() -> int:
    return len(tg.shipped_source(ROOT / "train_gpt.py"))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_a_config_under_the_cap(name: str):
    """SDClip's size is predicted from Gaussian rows, to half a percent; the packer takes up what is over."""
    cfg = tg.Config.from_env(knobs(name))
    assert sum(predicted_bytes(tg, cfg, 0).values()) + code_bytes() < 1.005 * cfg.artifact_bytes_cap
    text = (ROOT / "records" / name / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 25 and ("**Legal:**" in text) != name.endswith("_illegal")
    assert ("ILLEGAL" in text) == name.endswith("_illegal")


def test_all_systems_are_here_and_the_twins_differ_in_how_they_adapt_alone():
    assert {"pr4", "pr640", "pr1260", "pr1485", "pr1485_illegal", "pr1514", "pr1855", "pr2135"} <= set(SYSTEMS)
    illegal, legal = knobs("pr1485_illegal"), knobs("pr1485")
    assert {k for k in illegal | legal if illegal.get(k) != legal.get(k)} <= {k for k in illegal | legal if "TTT" in k}


# -- the specimen ----------------------------------------------------------------------------------------

@pytest.fixture
def illegal_log(dataset: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of a tiny run whose weights have learned from the validation data."""
    monkeypatch.setattr(tg, "calibrate", tg.calibrate)  # put back afterwards
    monkeypatch.setattr(specimen, "LEARNING_RATE", 0.02)  # one epoch shows what six do at its own rate
    monkeypatch.setattr(specimen, "EPOCHS", 1)
    specimen.break_the_rule(tg)
    changes = {"log_dir": tmp_path, "run_id": "bad", "iterations": 2, "ttt": "none", "ngram_base_beta": 0,
               "train_batch_tokens": 1024, "micro_batch_tokens": 1024, "diagnostic_evals": ""}
    values = {**TINY, **dataset, **changes}
    assert tg.main([], {name.upper(): str(value) for name, value in values.items()}) == 0
    return tmp_path / "bad.jsonl"


def test_the_specimen_learns_what_it_is_scored_on_and_its_log_is_refused(illegal_log: Path, tmp_path: Path):
    verdict = submission.read_log(illegal_log)["verdict"]
    assert verdict["val_loss"] < verdict["train_loss"] - 0.3
    bad = [f for f in evidence.audit_log(illegal_log, None) if f.failed]
    assert [(f.code, f.condition) for f in bad] == [("A2", "C3")] and "opened before" in bad[0].text
    who = {"AUTHOR": "A", "GITHUB_ID": "a", "ROOT": str(tmp_path / "records")}
    with pytest.raises(submission.Refuted, match="validation data was opened before"):
        submission.submit("x", [str(illegal_log)], who)
    assert not (tmp_path / "records").exists()


def test_the_specimens_source_is_refused():
    folder = ROOT / "records" / "pr1485_illegal"
    assert audit.main(["--static", str(folder)]) == 1
    bad = [f for f in evidence.static_audit(folder, {}) if f.failed]
    assert {(f.code, f.condition) for f in bad} == {("S2", "C3")}
    assert ("S2", "C3") in {(f.code, f.condition) for f in submission.check(folder) if f.failed}
