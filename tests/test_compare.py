"""`compare` gives the published tests to the digit, and says what speaks against a group of runs."""
import json
import math
from pathlib import Path

import pytest
from conftest import refusal

from tools import compare, logs

PUBLISHED = {  # seeds in bpb, as the submissions list them
    549: (1.11922988, 1.12002032, 1.11888882), 1019: (1.11508120, 1.11437394, 1.11475014),
    1953: (1.0582472, 1.05846113, 1.05895276), 2014: (1.05740567, 1.05730104, 1.05807084),
    2060: (1.05781454, 1.05798212, 1.05796494), 2135: (1.05662016, 1.05610947, 1.05679341),
    2140: (1.05590816, 1.05838308, 1.05676598)}
CASEOPS = 3.1571
"""Bytes a token."""


def scored(*scores: float, **fields: object) -> list[logs.Scored]:
    return [logs.Scored(**{"name": f"r{i}", "bpb": bpb, "bytes_per_token": CASEOPS, **fields})
            for i, bpb in enumerate(scores)]


def write_log(path: Path, bpb: float | None, **knobs: object) -> Path:
    """A run's log; None: the run did not end."""
    log = [{"event": "start", "code_sha256": "c0de"}, {"event": "config", "seed": 1, "run_id": path.stem, **knobs}]
    if bpb is not None:
        log.append({"event": "verdict", "val_bpb": bpb, "bytes": 31571, "tokens": 10000, "run_id": path.stem})
    path.write_text("".join(json.dumps({"seconds": 0, **e}) + "\n" for e in log) + '{"event": "cut')
    return path


@pytest.mark.parametrize("old, new, t, df, p, digits", [
    (2014, 2135, 3.43, 3.90, 0.0138, 4), (1953, 2014, None, None, 0.0202, 4), (1953, 2060, None, None, 0.043, 3),
    (2060, 2014, None, None, 0.15, 2), (2140, 2135, None, None, 0.28, 2), (549, 1019, 11.8339, 3.3063, None, 4)])
def test_published_welch_tests_to_the_digit(old, new, t, df, p, digits):
    test = compare.welch(PUBLISHED[old], PUBLISHED[new])
    places = 4 if old == 549 else 2
    assert t is None or (round(test.t, places), round(test.df, places)) == (t, df)
    assert p is None or round(test.p, digits) == p


def test_one_figure_and_runs_without_spread():
    """A single old one makes it the published one-sample test; a single new one says nothing."""
    test = compare.welch([1.2193657], [1.20576485, 1.20617460, 1.20715923])
    assert (round(test.t, 2), test.df, round(test.p, 5)) == (31.42, 2, 0.00051)
    assert math.isnan(compare.welch([1.0, 1.1], [0.9]).p)
    assert "cannot be said" in compare.report(scored(1.0, 1.1), scored(0.9))
    assert compare.welch([1.0, 1.0], [0.9, 0.9]).p == 0 and compare.welch([0.9, 0.9], [1.0, 1.0]).p == 1
    assert compare.welch([1.0, 1.0], [1.0, 1.0]).p == 0.5


def test_nats_and_both_rules():
    """#2135 gains 0.0024 nats of #2014: enough for the practised rule, not for the written one; #1019 gained 0.0078."""
    def verdicts(result: compare.Comparison) -> tuple[str, str]:
        return result.margin.verdict(compare.WRITTEN_P), result.plain.verdict(compare.PRACTISED_P)

    close = compare.compare(scored(*PUBLISHED[2014]), scored(*PUBLISHED[2135]))
    assert verdicts(close) == ("NOT met", "met") and close.delta == pytest.approx(-0.00108484, abs=1e-8)
    assert close.delta_nats == pytest.approx(close.delta * math.log(2) * CASEOPS)
    far = compare.compare(scored(1.10, 1.1001, 1.0999), scored(1.08, 1.0801, 1.0799))
    assert verdicts(far) == ("met", "met") and far.margin.p > far.plain.p
    worse = compare.compare(scored(*PUBLISHED[2135]), scored(*PUBLISHED[2014]))
    assert worse.plain.p == pytest.approx(1 - close.plain.p) and verdicts(worse) == ("NOT met", "NOT met")


def test_the_gain_of_the_written_rule_is_0_005_nats():
    """B lower by exactly that: the test against A less 0.005 nats has t = 0."""
    gain = 0.005 / (math.log(2) * CASEOPS)
    assert gain == pytest.approx(0.00228, abs=5e-6)
    margin = compare.compare(scored(1.10, 1.11), scored(1.10 - gain, 1.11 - gain)).margin
    assert margin.t == pytest.approx(0, abs=1e-9) and margin.p == pytest.approx(0.5)


def test_runs_by_id_glob_folder_and_path_with_the_number_tried(tmp_path, monkeypatch, capsys):
    """The log cut short by a crash is read; the run without a verdict is named and counted."""
    monkeypatch.setenv("LOG_DIR", str(tmp_path))
    for i, bpb in enumerate((1.00, 1.01, 1.02)):
        write_log(tmp_path / f"old{i}.jsonl", bpb, matrix_lr=0.022)
        write_log(tmp_path / f"new{i}.jsonl", bpb - 0.1, matrix_lr=0.026)
    write_log(tmp_path / "new3.jsonl", None)
    for a in ("old*", "old0,old1,old2", str(tmp_path / "old?.jsonl"), "old2,old0.jsonl,old*"):
        assert compare.main([a, "LR=new*"]) == 0
        out, err = capsys.readouterr()
        assert "A   n=3  mean 1.01000  std 0.01000" in out and "LR  n=3  mean 0.91000" in out
        assert f"7 logs in {tmp_path}, 6 of them with a verdict" in out and "new3.jsonl" in err
        assert "changed: MATRIX_LR 0.022 -> 0.026" in out and "WARNING" not in out


def test_a_sweeps_runs_are_no_name_and_an_odd_log_is_only_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOG_DIR", str(tmp_path))
    for i, bpb in enumerate((1.00, 1.01)):
        write_log(tmp_path / f"MATRIX_LR=0.02-SEED={i}-k.jsonl", bpb)
        write_log(tmp_path / f"MATRIX_LR=0.03-SEED={i}-k.jsonl", bpb - 0.1)
    (tmp_path / "odd.jsonl").write_text('{"event": "verdict", "val_bpb": null}\n')
    old = ",".join(f"MATRIX_LR=0.02-SEED={i}-k" for i in (0, 1))
    new = "MATRIX_LR=0.03-*"
    for a, b, names in ((old, new, "AB"), (f"A={old}", f"MATRIX_LR={new}", ("A", "MATRIX_LR"))):
        assert compare.main([a, b]) == 0
        out = capsys.readouterr().out
        assert all(f"{name:{len(names[1])}s}  n=2  mean" in out for name in names)
        assert "5 logs in" in out and "4 of them with a verdict" in out


def test_what_speaks_against_a_group_is_said():
    mixed = [*scored(1.0, knobs={"matrix_lr": 0.02}), *scored(1.0, knobs={"matrix_lr": 0.03})]
    text = compare.report(scored(1.1, 1.2, bytes_per_token=4.0), mixed)
    assert "B mixes runs that differ in MATRIX_LR" in text
    assert "the very same score" in text and "bytes a token range from 3.1571 to 4.0000" in text


def test_submissions_give_their_seeds(tmp_path):
    told = {"seed_results": {"42": {"val_bpb": 1.05610947, "val_loss": 2.311159}, "0": {"ttt_val_bpb": 1.05}}}
    (tmp_path / "submission.json").write_text(json.dumps(told))
    runs, _ = logs.scored_group(str(tmp_path), tmp_path)
    assert [run.bpb for run in runs] == [1.05610947, 1.05]
    assert runs[0].bytes_per_token == pytest.approx(3.1571, abs=2e-4) and math.isnan(runs[1].bytes_per_token)


@pytest.mark.parametrize("arguments, expected", [
    (["1.0"], "expected two groups"), (["1.0", "nothing*"], "nothing*: no such log"),
    (["1.0", "m.json"], "m.json: has no seed_results"), (["1.0", "bad.json"], "bad.json: cannot be read"),
    (["1.0", "open"], "open: none of its 1 logs has a verdict"), (["A=1,0", "B=0,9"], "1,0: 1 is no score"),
    (["1.0", "1.1,0.0"], "1.1,0.0: 0.0 is no score"), (["B=1.0,1.1", "1.0"], "B: both groups have this name")])
def test_a_users_mistake_is_one_line(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("m.json").write_text('{"val_bpb": 1.0}')
    Path("bad.json").write_text("{")
    write_log(Path("open.jsonl"), None)
    assert expected in refusal(compare.main, arguments)
