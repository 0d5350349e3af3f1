"""What runs left is told at a glance: `runs` as a table of all, `show` as a few lines on one."""
import csv
import doctest
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, tiny

import train_gpt as tg
from tools import compare, logs, runs, show, submission
from tools.common import ToolError

CONFIG = {name: getattr(tiny(), name) for name in tg.Config.__dataclass_fields__}


def write(folder: Path, name: str, age: float, *events: dict, **knobs: object) -> Path:
    """The log of a run that last wrote so many seconds ago."""
    path = folder / f"{name}.jsonl"
    log = [dict(event="start", code_sha256="c0de"), dict(event="config", **{**CONFIG, **knobs}), *events]
    path.write_text("".join(json.dumps({"seconds": float(i), **e}) + "\n" for i, e in enumerate(log)))
    os.utime(path, (time.time() - age,) * 2)
    return path


def verdict(bpb: float, **more: object) -> dict:
    return dict(event="verdict", val_bpb=bpb, steps=20, train_loss=3.25, artifact_bytes=1234567, total_seconds=61.0,
                **more)


def train(step: int) -> dict:
    return dict(event="train", step=step, loss_nats=5.5)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """LOG_DIR with a run of each kind, and a log that is no run's."""
    monkeypatch.setenv("LOG_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    write(tmp_path, "old", 300_000, train(1), verdict(1.5), matrix_lr=0.02, seed=1)
    write(tmp_path, "going", 2, train(7), dict(event="steps", first=1, loss_nats=[1.0] * 7), matrix_lr=0.02, seed=2)
    write(tmp_path, "broken", 20, dict(event="error", text="out of memory"), matrix_lr=0.5, seed=1)
    write(tmp_path, "resumed", 30, dict(event="error", text="SIGTERM"), dict(event="start"), verdict(1.25),
          matrix_lr=0.5, seed=1)
    (tmp_path / "other.jsonl").write_text('{"event": "figure"}\n')
    return tmp_path


def printed(capsys: pytest.CaptureFixture, *arguments: str) -> list[list[str]]:
    """Cells of the table's lines."""
    assert runs.main(arguments) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_table_has_every_run_the_newest_last_and_the_knobs_that_differ(folder, capsys):
    head, *lines = printed(capsys)
    assert head == "run when status steps loss bpb bytes secs MATRIX_LR SEED".split()
    assert [line[0] for line in lines] == ["old", "resumed", "broken", "going"]
    assert lines[0] == ["old", *time.strftime("%d %b", time.localtime(time.time() - 300_000)).split(), "done", "20",
                        "3.250", "1.5000", "1234567", "61", "0.02", "1"]
    assert lines[1][2:] == ["done", "20", "3.250", "1.2500", "1234567", "61", "0.5", "1"]
    assert lines[2][2:] == ["failed", "-", "-", "-", "-", "2", "0.5", "1"]
    assert lines[3][2:6] == ["unfinished", "7", "5.500", "-"]


@pytest.mark.parametrize("by, order", [("bpb", ["resumed", "old"]), ("MATRIX_LR", ["going", "old", "broken"]),
                                       ("run", ["broken", "going", "old", "resumed"]), ("steps", ["going", "old"])])
def test_sorted_by_any_column_with_the_smallest_first_and_the_unknown_last(by, order, folder, capsys):
    names = [line[0] for line in printed(capsys, by)[1:]]
    assert [name for name in names if name in order] == order
    assert by != "bpb" or set(names[2:]) == {"going", "broken"}


def test_csv_has_all_of_it_in_full(folder, capsys):
    write(folder, "a,b" * 20, 1, verdict(1.123456789012345), matrix_lr=0.02, seed=3)
    assert runs.main(["--csv", "bpb"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert rows[0]["run"] == "a,b" * 20 and float(rows[0]["bpb"]) == 1.123456789012345
    assert rows[-1]["bpb"] == "" and [row["SEED"] for row in rows[:3]] == ["3", "1", "1"]
    assert time.strptime(rows[0]["when"], "%Y-%m-%d %H:%M:%S")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width, folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    write(folder, "MATRIX_LR=0.02-" * 10, 1, matrix_lr=0.02, tokenizer_path="t" * 300)
    assert runs.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and max(map(len, lines)) == width and any(line.endswith("…") for line in lines)


def test_runs_of_several_presets_do_not_show_all_that_these_set(folder, capsys):
    for preset in ("demo", "record"):
        knobs = vars(tg.Config.from_env({"PRESET": preset, "MATRIX_LR": "0.5", "NUM_LAYERS": "11"}))
        own = {name.upper(): tg.show(value) for name, value in knobs.items() if value != getattr(tg.Config, name)}
        write(folder, preset, 1, dict(event="knobs", **own), **knobs)
    for name in ("old", "going", "broken", "resumed"):
        (folder / f"{name}.jsonl").unlink()
    head, *lines = printed(capsys, "PRESET")
    assert head[8:] == ["PRESET", "NUM_LAYERS", "MATRIX_LR"]
    assert [line[-3:] for line in lines] == [["demo", "11", "0.5"], ["record", "-", "0.5"]]
    (folder / "demo.jsonl").unlink()
    assert printed(capsys)[0][8:] == ["MATRIX_LR"]  # a single run, beside its preset


def test_what_is_no_column_is_refused_and_no_run_at_all_is_said(folder, monkeypatch):
    for arguments in (["nope"], ["bpb", "run"]):
        with pytest.raises(ToolError, match="expected --csv, or one column to sort by: run, when, .*MATRIX_LR"):
            runs.main(arguments)
    monkeypatch.setenv("LOG_DIR", str(folder / "none"))
    with pytest.raises(ToolError, match="none/: no run yet"):
        runs.main([])


def test_damaged_lines_are_counted_once_and_an_end_that_was_cut_is_not(tmp_path, capsys):
    path = write(tmp_path, "r", 1, train(1))
    path.write_text('{"event": "sta\n' + path.read_text() + '[]\n\n{"event": "verdict", "bpb": NaN}\n{"event": "ver')
    for _ in range(2):
        assert [e["event"] for e in logs.events(path)] == ["start", "config", "train"]
    assert capsys.readouterr().err == f"{path}: left out, damaged: lines 1, 5, 7\n"
    assert [e["event"] for e in logs.events(path, "config", "train")] == ["start"]
    path.write_text('[]\n{"a": 1}\n3\n{"event": 5}\n{"event": "start"}\n{"event": "tr')
    assert logs.events(path) == [{"event": "start"}]


def test_they_and_the_report_need_nothing_but_python_and_a_reader_may_leave(folder):
    page = folder / "page.html"
    for module, more, status in (("runs", [], 0), ("show", [], 2), ("report", ["broken", f"OUT={page}"], 0)):
        done = subprocess.run([sys.executable, "-S", "-m", f"tools.{module}", *more], cwd=ROOT, capture_output=True,
                              text=True)
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert page.stat().st_size
    read, write_end = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "tools.runs"], cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("module, out, status, said", [
    ("runs", "/dev/full", 2, "runs.py: [Errno 28] No space left on device\n"), ("knobs", "", 0, ""),
    ("runs", "ascii", 0, "")])
def test_what_stdout_cannot_take(module, out, status, said, folder, tmp_path):
    """No room, no stdout at all, no such character: one line or an escape."""
    (folder / "old.jsonl").rename(folder / "\u00fc\u6f22.jsonl")
    path = out if out == "/dev/full" else str(tmp_path / "out")
    done = subprocess.run(["bash", "-c", f'"$0" -m tools.{module} ' + (f">{path}" if out else ">&-"), sys.executable],
                          cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (status, said)
    assert out != "ascii" or "\\xfc\\u6f22" in Path(path).read_text()


# -- show ------------------------------------------------------------------------------------------------

def finished(folder: Path, **more: object) -> Path:
    """The log of a run with everything that `show` tells of."""
    events = [
        dict(event="train_end", steps=20, train_seconds=2.0, tokens=5000, train_loss=3.25),
        dict(event="warning", text="first"), dict(event="warning", text="late " * 30),
        dict(event="val_data", compressors={"brotli -11": {"bits_per_byte": 2.0, "bytes": 9},
                                            "xz -9e": {"bits_per_byte": 0.75, "bytes": 9}}),
        dict(event="adaptation_cut", work=0.4, budget_seconds=600),
        verdict(0.9, diagnostic_evals={"ema": 1.0, "quantized": 1.01, "sliding": 1.0, "lora+ngram": 0.9}, **{
            "cap_bytes": 2_000_000, "parameters": 12_345, "train_seconds": 12.5, "eval_seconds": 3.0,
            "other_seconds": 1.0, **more})]
    return write(folder, "r", 1, *events, max_wallclock_seconds=10.0)


def test_show_says_all_in_a_few_short_lines(tmp_path):
    text = show.table(logs.read_run(finished(tmp_path)))
    lines = text.splitlines()
    assert len(lines) <= 24 and all(len(line) <= 80 for line in lines[:-2])  # paths are whole
    for part in ("score         0.9000  bits", "  rounding    +0.0100 ", "+ n-grams", "the score is 55.0 % ahead of it",
                 "the score is 20.0 % behind it", "1,234,567 bytes with the code: 61.7 % of the 2,000,000 allowed",
                 "12,345 parameters", "20 steps, 2,500 tokens a second, loss at the end 3.250 nats",
                 "  training    12.5 s of 10: 2.5 s over the budget", "  scoring     3.0 s of 600\n",
                 "first stopped after 40 % of the work", "2, the last: late late", "./run.sh report r"):
        assert part in text, text
    assert str(tmp_path / "r.txt") in text and "packed model" not in text
    for suffix in (".bin", ".html"):
        (tmp_path / "r").with_suffix(suffix).touch()
    text = show.table(logs.read_run(tmp_path / "r.jsonl"))
    assert f"packed model  {tmp_path / 'r.bin'}" in text and f"details       {tmp_path / 'r.html'}" in text


@pytest.mark.parametrize("events, expected", [
    ([], "has no verdict: it is unfinished"), ([dict(event="verdict", val_bpb=1)], "cannot be read: KeyError"),
    ([dict(event="error", text="out of memory")], "verdict: it failed: out of memory; see"),
    ([dict(event="error", text="x"), dict(event="start")], "verdict: it is unfinished")])
def test_what_show_cannot_show_is_one_line(events, expected, tmp_path):
    with pytest.raises(ToolError, match=expected):
        show.main([str(write(tmp_path, "r", 1, *events))])


# -- what all tools share --------------------------------------------------------------------------------

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
    Path("mine").mkdir()
    finished(Path("mine"))
    for arguments in ([], ["r"], ["mine/r.txt"]):
        assert show.main(arguments) == 0
        assert "12,345 parameters" in capsys.readouterr().out
    for arguments, expected in ((["s"], "s: no such log"), (["r", "r"], "expected one run")):
        with pytest.raises(ToolError, match=expected):
            show.main(arguments)


def test_examples_in_docstrings():
    for module in (tg, compare, show):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed
