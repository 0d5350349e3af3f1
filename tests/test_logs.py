"""What the tools share: runs are found alike by all of them, and the lists of knobs agree."""
import doctest
import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import train_gpt as tg

sys.path.insert(0, str(ROOT / "records"))
from tools import compare
from tools import logs
from tools import mirror
from tools import replay
from tools import submission
from tools import show
from tools import sweep


def test_knobs_that_are_no_part_of_a_result_are_the_trainers():
    """One set, which each tool takes from or adds to."""
    assert logs.NO_RESULT == tg.NO_RESULT
    assert logs.PRIVATE | logs.DATA == submission.PLACES == logs.NO_RESULT | {"seed", "threads"}
    assert replay.WRITTEN <= logs.NO_RESULT and not logs.DATA & replay.WRITTEN


@pytest.mark.parametrize("item", ["a=1-k", "a=1-k.jsonl", "{0}/a=1-k.jsonl", "{0}/a=1-k.txt", "{0}/a=1-k.bin", "a=*"])
def test_one_run_by_id_path_and_glob(item, tmp_path):
    (tmp_path / "a=1-k.jsonl").touch()
    assert logs.find_log(item.format(tmp_path), tmp_path) == tmp_path / "a=1-k.jsonl"


@pytest.mark.parametrize("item, expected", [("b", "b: no such log"), ("a*", "2 logs; expected one"), (".", "2 logs")])
def test_none_and_several_are_refused(item, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a1", "a2"):
        Path(f"{name}.jsonl").touch()
    with pytest.raises(logs.InputError, match=expected.replace("*", ".")):
        logs.find_log(item, Path("logs"))


def test_show_and_mirror_look_where_runs_are_logged(tmp_path, monkeypatch, capsys):
    """In LOG_DIR; by default show takes the newest there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOG_DIR", "mine")
    assert summary.main([]) == 2 and "mine/: no run yet" in capsys.readouterr().err
    verdict = dict(event="verdict", ladder={}, val_bpb=1.0, artifact_bytes=1, cap_bytes=2, weight_bytes=1, code_bytes=1,
                   parameters=12_345, total_seconds=1, train_seconds=1, eval_seconds=0, other_seconds=0)
    Path("mine").mkdir()
    Path("mine/r.jsonl").write_text(json.dumps(verdict) + "\n")
    for given in ([], ["r"], ["mine/r.txt"]):
        assert summary.main(given) == 0 and "12,345 parameters" in capsys.readouterr().out
    assert summary.main(["s"]) == 2 and "s: no such log" in capsys.readouterr().err
    assert summary.main(["r", "r"]) == 2 and "expected one run" in capsys.readouterr().err
    monkeypatch.setitem(mirror.SERVICES, "wandb", lambda path, *_: pytest.fail("nothing is worth sending"))
    Path("mine/r.jsonl").write_text('[]\n{"a": 1}\n3\n{"event": 5}\n{"event": "start"}\n{"event": "tr')
    assert mirror.main(["r", "wandb"]) == 0


def test_a_strange_step_is_one_line(tmp_path, capsys):
    (tmp_path / "r.jsonl").write_text('{"event": "train", "step": "x"}\n')
    assert mirror.main([str(tmp_path / "r.jsonl"), "wandb"]) == 2 and "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("module", [compare, sweep])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
