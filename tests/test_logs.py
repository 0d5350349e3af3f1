"""What the tools share: runs are found alike by all of them, and the lists of knobs agree."""
import doctest
import json
from pathlib import Path

import pytest

import train_gpt as tg
from tools import compare, logs, runs, show, submission
from tools.common import ToolError


def test_knobs_that_change_no_result_are_the_trainers():
    """One set, which each tool takes from or adds to."""
    assert logs.NO_RESULT == tg.NO_RESULT
    assert logs.PRIVATE | logs.DATA == submission.PLACES == logs.NO_RESULT | {"seed"}


@pytest.mark.parametrize("item", ["a=1-k", "a=1-k.jsonl", "{0}/a=1-k.jsonl", "{0}/a=1-k.txt", "{0}/a=1-k.bin", "a=*"])
def test_one_run_by_id_path_and_glob(item, tmp_path):
    (tmp_path / "a=1-k.jsonl").touch()
    assert logs.find_log(item.format(tmp_path), tmp_path) == tmp_path / "a=1-k.jsonl"


@pytest.mark.parametrize("item, expected", [("b", "b: no such log"), ("a*", "2 logs; expected one"), (".", "2 logs")])
def test_none_and_several_are_refused(item, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a1", "a2"):
        Path(f"{name}.jsonl").touch()
    with pytest.raises(ToolError, match=expected.replace("*", ".")):
        logs.find_log(item, Path("logs"))


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    """A folder among its logs is no log."""
    (tmp_path / "a.jsonl").mkdir()
    (tmp_path / "b.jsonl").touch()
    assert logs.logs_in(tmp_path) == [tmp_path / "b.jsonl"] and logs.logs_in(tmp_path / "none") == []
    for look in (runs.main, show.main):
        monkeypatch.setenv("LOG_DIR", str(tmp_path / "b.jsonl"))
        with pytest.raises(NotADirectoryError):
            look([])


@pytest.mark.parametrize("arguments, expected", [(["SEED"], "expected KNOB=value"), (["seed=1"], "expected KNOB=value"),
                                                 (["SEED=1", "SEED=2"], "given twice")])
def test_what_is_no_pair_is_refused(arguments, expected):
    with pytest.raises(ToolError, match=expected):
        logs.pairs(arguments)


def test_show_looks_where_runs_are_logged(tmp_path, monkeypatch, capsys):
    """In LOG_DIR; by default it takes the newest there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOG_DIR", "mine")
    with pytest.raises(ToolError, match="mine/: no run yet"):
        show.main([])
    log = dict(event="verdict", diagnostic_evals={"plain": 0.9}, val_bpb=0.9, artifact_bytes=1200, cap_bytes=2000,
               parameters=12_345, total_seconds=1, train_seconds=1, eval_seconds=0, other_seconds=0)
    Path("mine").mkdir()
    Path("mine/r.jsonl").write_text(json.dumps(log) + "\n")
    for arguments in ([], ["r"], ["mine/r.txt"]):
        assert show.main(arguments) == 0
        assert "12,345 parameters" in capsys.readouterr().out
    for arguments, expected in ((["s"], "s: no such log"), (["r", "r"], "expected one run")):
        with pytest.raises(ToolError, match=expected):
            show.main(arguments)


def test_examples_in_docstrings():
    for module in (compare, show):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed
