"""The report is one page that loads nothing, holds every section, and shows the figures of the logs and no others."""
import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg
from tools import charts, report
from tools.common import ToolError


def log(path: Path, seed: int, **knobs: object) -> None:
    """The log of a run with stages, a probe, scores, phases and a warning."""
    config = {**{k: getattr(tiny(), k) for k in tg.Config.__dataclass_fields__}, "seed": seed, **knobs}
    bpb, loss = 1.05 + seed / 1000, 2.3 + seed / 100
    events = [dict(event="start", world=1, device="cpu", code_sha256="a" * 64), dict(event="config", **config),
              dict(event="model", parameters=9, layers=[0, 1, 2], layers_looped=[0, 1, 1, 2])]
    events += [dict(event="train", step=s, progress=s / 20, loss_nats=9 - s / 4 if s < 20 else loss, lr_scale=0.5,
                    skipped=0, ms_per_step=100.0 + 50 * (s > 10), train_seconds=0.1 * s) for s in (1, 2, 10, 15, 20)]
    events.insert(6, dict(event="stage", step=10, progress=0.5, rounded=True, layers=6))
    events.insert(3, dict(event="stage", step=0, progress=0.0, rounded=False, layers=3))
    events.append(dict(event="val_probe", step=10, val_loss=2.5, val_bpb=1.5))
    events += [dict(event="phase", seconds=end, name=n, budget=b, phase_seconds=s) for n, b, s, end in (
        ("setup", "none", 1.25, 1.25), ("train", "train", 2.5, 4), ("gptq", "train", 0.5, 4.5),
        ("gptq", "train", 0.25, 5), ("pack", "none", 0.75, 5.9), ("allocate", "train", 1.0, 6),
        ("score", "eval", 3.5, 10))]
    events.append(dict(event="train_end", steps=21, train_loss=loss, train_seconds=2.1, tokens=21 * 384))
    events.append(dict(event="warning", text="it is <late>"))
    events.append(dict(event="adaptation_cut", budget_seconds=600.0, work=0.4))
    events.append(dict(event="gptq_damping", failed=2, damp=0.01, next=0.1))
    events.append(dict(event="artifact", weight_bytes=1000, code_bytes=200,
                       streams={"int8": [300, 300], "gptq:mlp": [1600, 600]}))
    events.append(dict(event="val_data", compressors={"xz -9e": {"bits_per_byte": 2.0, "bytes": 9}}))
    events += [dict(event="score", name=n, val_loss=2.4, val_bpb=x) for n, x in (("ema", 1.2), ("lora", bpb))]
    sums = dict(targets=[2.0, 4.0], nats=[math.log(2) * 3, math.log(2) * 5], bytes=[2.0, 0.0])
    events.append(dict(event="places", position=sums, length=sums))
    events.append(dict(event="verdict", val_bpb=bpb, val_loss=2.4, artifact_bytes=1200, cap_bytes=16_000_000, steps=21,
                       diagnostic_evals={"ema": 1.2, "lora": bpb}, seed=seed, train_seconds=3.25, eval_seconds=603.5,
                       other_seconds=1.25, total_seconds=8.0))
    path.write_text("".join(json.dumps({"seconds": float(i), **e}) + "\n" for i, e in enumerate(events)))


class Parsed(HTMLParser):
    """Sections with their pictures and table cells; open elements; everything that would be loaded."""
    VOID = {"meta"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: dict[str, list[str]] = {}
        self.pictures: dict[str, int] = {}
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        values = dict(attributes)
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        self.ids += [values["id"]] if "id" in values else []
        if tag == "section":
            self.section = values["id"]
            self.cells[self.section], self.pictures[self.section] = [], 0
        if tag == "svg" and "role" in values:
            self.pictures[self.section] += 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[self.section].append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Parsed]:
    folder = tmp_path_factory.mktemp("logs")
    for seed in (1, 2):
        log(folder / f"run{seed}.jsonl", seed)
    assert report.main([str(folder / "run1.jsonl"), str(folder / "run2.jsonl"), f"OUT={folder}/r.html"]) == 0
    text = (folder / "r.html").read_text(encoding="utf-8")
    return text, Parsed(text)


def test_the_page_is_whole_loads_nothing_and_takes_the_readers_colours(made: tuple):
    text, parsed = made
    assert parsed.open == [] and parsed.loads == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "@import" not in text and all(url[:1] == "#" and url[1:] in parsed.ids
                                         for url in re.findall(r"url\(([^)]*)\)", text))
    assert list(parsed.cells) == ["runs", "notes", "knobs", *(s.id for s in report.SECTIONS[2:])]
    assert all(parsed.pictures[s.id] == len(s.plots) + bool(s.bars) for s in report.SECTIONS)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert "run s0" in svgs and "run s1" in svgs
    assert not re.search(r"#[0-9a-f]{3}|rgb|style=|(fill|stroke)=", svgs)


@pytest.mark.parametrize("section, expected", [
    ("runs", ["SEED=1", "run1", "1.051", "47.5 % ahead of xz -9e", "2.4", "1,200", "0.0 %", "9", "21", "3.25", "603.5",
              "1.25", "1", "1x cpu", "aaaaaaaa"]),
    ("notes", ["SEED=1", "scoring took 603.5 s of 600: 3.5 s over the budget\n"
               "adaptation first stopped after 40 % of the work: too little time left\n"
               "rounding (GPTQ) had to damp 2 Hessians more, up to 0.1 of their mean diagonal\n"
               "warning: it is <late>", "SEED=2"]),
    ("knobs", ["SEED", "SEED=1", "1", "SEED=2", "2"]),
    ("loss", ["SEED=2", "20", "2", "0.00768", "2.32", "0.5"]), ("bpb", ["SEED=1", "10", "0.00384", "2.5", "1.5"]),
    ("scores", ["SEED=1", "lora", "1.051", "-0.1490"]),
    ("scores", ["SEED=1", "xz -9e", "2", "compressing the same text; the score is 47.5 % ahead of it"]),
    ("place", ["SEED=1", "position", "1", "1.5", "2", "SEED=1", "length"]),
    ("clock", ["SEED=1", "training", "gptq", "0.75"]), ("clock", ["SEED=1", "training", "allocate", "0.25"]),
    ("clock", ["SEED=1", "training", "sum", "3.5"]), ("clock", ["SEED=1", "neither", "pack", "0.75"]),
    ("clock", ["SEED=1", "scoring", "sum, of 600", "3.5"]), ("bytes", ["SEED=1", "mlp", "600", "50.0 %", "1,600", "3"]),
    ("bytes", ["SEED=2", "header", "100", "8.3 %"]),
    ("step", ["SEED=1", "3 layers", "8", "100", "3,840"]),
    ("step", ["SEED=1", "6 layers, rounded", "10", "150", "2,560"])])
def test_figures_are_the_logs(section: str, expected: list[str], made: tuple):
    cells = [cell for cell in made[1].cells[section] if cell]
    assert any(cells[i:i + len(expected)] == expected for i in range(len(cells))), cells


def test_lines_are_drawn_where_the_figures_are(tmp_path: Path):
    """What is drawn, not only what stands in the table: places are linear in the values, or in the logarithm of x."""
    log(tmp_path / "a.jsonl", 1)
    run = report.read_run(tmp_path / "a.jsonl")
    curve = report.curve(run)
    assert [at for at, _, _ in curve] == pytest.approx([0.1, 0.2, 1, 1.5, 2, 2.1])
    assert [loss for _, _, loss in curve] == pytest.approx([8.75, 8.5, 6.5, 5.25, 2.31, 2.31])
    for points, log2 in (([(at, loss) for at, _, loss in curve], False), ([(1, 3.0), (2, 2.0), (8, 2.5)], True)):
        svg = charts.draw_lines([points], "x", "y", log2=log2)
        drawn = np.array(re.findall(r'cx="([-.0-9]+)" cy="([-.0-9]+)"', svg), float)
        line = np.array([p.split(",") for p in re.search(r'class="run s0" points="([^"]*)"', svg)[1].split()], float)
        assert len(drawn) == len(points) and np.array_equal(line, drawn)
        x = np.log2([x for x, _ in points]) if log2 else [x for x, _ in points]
        for places, values, way in ((drawn[:, 0], x, 1), (drawn[:, 1], [y for _, y in points], -1)):
            slope, start = np.polyfit(values, places, 1)
            assert np.allclose(places, slope * np.asarray(values) + start, atol=0.1) and slope * way > 0


def test_a_grid_line_lies_where_its_number_says():
    svg = charts.draw_lines([[(0, 10.0), (100, 30.0)]], "x", "y")
    marks = re.findall(r'<text x="([.0-9]+)" y="[.0-9]+" text-anchor="middle">([.0-9]+)', svg)
    grid = [float(x) for x in re.findall(r'class="grid" points="([-.0-9]+),180 \1,0"', svg)]
    (first, _), (last, _) = [map(float, p) for p in re.findall(r'cx="([.0-9]+)" cy="([.0-9]+)"', svg)]
    assert len(marks) == len(grid) > 3
    for (text_at, text), at in zip(marks, grid):
        assert float(text_at) == pytest.approx(charts.LEFT + at, abs=0.1)
        assert first + (last - first) * float(text) / 100 == pytest.approx(at, abs=0.2)


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=9), st.booleans())
def test_axes_hold_their_values_and_have_marks_at_round_numbers(values: list[float], zero: bool):
    values = [abs(v) for v in values] if zero else values
    low, high, marks = charts.scale(values, zero)
    assert low <= min(values) and high >= max(values) and low < high
    room = 1e-6 * (high - low)  # of rounding
    assert 2 <= len(marks) <= 7 and all(low - room <= at <= high + room for at, _ in marks)


def test_every_step_is_read_and_many_points_are_thinned_to_what_shows(tmp_path: Path):
    """A step that was taken again after a crash counts as the second time; what is not finite is null in the log."""
    log(tmp_path / "a.jsonl", 1)
    blocks = [dict(first=1, loss_nats=[9.0, 8.9]), dict(first=3, loss_nats=[7.0] * 8), dict(first=9, loss_nats=[6.0]),
              dict(first=11, loss_nats=[None, 5.5])]
    with open(tmp_path / "a.jsonl", "a") as file:
        file.writelines(json.dumps({"seconds": 9, "event": "steps", **block}) + "\n" for block in blocks)
    losses = {round(at / 0.1): loss for at, _, loss in report.curve(report.read_run(tmp_path / "a.jsonl"))}
    assert losses == pytest.approx({1: 8.75, 2: 8.5, **dict.fromkeys(range(3, 9), 7.0), 9: 6.0, 10: 6.5, 12: 5.5,
                                    15: 5.25, 20: 2.31, 21: 2.31})
    noisy = [(float(i), 5.0 + (-1) ** i + 90 * (i == 777)) for i in range(5000)]
    thin, mean = charts.thinned(noisy), charts.running_mean(noisy)
    assert len(thin) <= 800 and (777.0, 94.0) in thin and thin == sorted(thin)
    assert [x for x, _ in mean] == [x for x, _ in noisy] and mean[3000][1] == pytest.approx(5, abs=0.02)
    svg = charts.draw_lines([noisy], "x", "y")
    assert svg.count("<polyline class=\"run") == 2 and "circle" not in svg


def test_runs_are_named_by_what_differs_else_by_their_ids(tmp_path: Path):
    paths = [tmp_path / name / f"{name}.jsonl" for name in "abc"] + [tmp_path / "c" / "a.jsonl"]
    for path, rate in zip(paths, (0.02, 0.03, 0.02, 0.02)):
        path.parent.mkdir(exist_ok=True)
        log(path, 1, matrix_lr=rate, code=rate)
    runs = [report.read_run(path) for path in paths]
    assert report.labels_of(runs[:1]) == ["a"]
    assert report.labels_of(runs[:2]) == ["MATRIX_LR=0.02 CODE=0.02", "MATRIX_LR=0.03 CODE=0.03"]
    assert report.labels_of(runs[:3]) == ["a", "b", "c"]
    assert report.labels_of(runs) == [str(paths[0]), "b", "c", str(paths[3])]


def test_one_run_shows_what_differs_from_its_preset(tmp_path: Path):
    log(tmp_path / "a.jsonl", 1337, matrix_lr=0.5)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write(json.dumps({"event": "knobs", "MATRIX_LR": "0.5", "RUN_ID": "a"}) + "\n")
    parsed = Parsed(report.page([report.read_run(tmp_path / "a.jsonl")]))
    assert parsed.cells["knobs"] == ["knob", "value", "of the preset", "MATRIX_LR", "0.5", "0.026"]
    assert parsed.cells["runs"][:2] == ["run id", "a"]


def test_an_unfinished_run_and_its_error_are_shown(tmp_path: Path):
    log(tmp_path / "a.jsonl", 1)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    failed = json.dumps({"seconds": 1, "event": "error", "text": "<&>"})
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:5], failed, '{"seconds": 2, "ev']))
    assert report.main([str(tmp_path / "a.jsonl"), f"OUT={tmp_path}/r.html"]) == 0
    text = (tmp_path / "r.html").read_text()
    assert html.escape("failed: no score; it ended in an error: <&>") in text
    parsed = Parsed(text)
    assert parsed.pictures["loss"] == 2 and not {"scores", "bytes", "bpb"} & parsed.cells.keys()


def test_runs_are_found_by_id_and_glob_and_only_out_is_an_option(tmp_path: Path, monkeypatch, capsys):
    """A sweep's run ids begin with KNOB=value."""
    monkeypatch.setenv("LOG_DIR", str(tmp_path))
    for seed in (1, 2):
        log(tmp_path / f"SEED={seed}-k{seed}.jsonl", seed)
    for runs in (["SEED=1-k1", "SEED=2-k2"], ["SEED=*"]):
        assert report.main([*runs, f"OUT={tmp_path}/r.html"]) == 0
        assert "2 runs" in capsys.readouterr().out
    monkeypatch.setenv("OUT", f"{tmp_path}/by environment.html")
    assert report.main(["SEED=1-k1"]) == 0 and (tmp_path / "by environment.html").stat().st_size
    for arguments, said in ((["SEED=3-k3"], "SEED=3-k3: no such log"), ([], "expected RUN"), ([""], "'': no such log"),
                            (["SEED=1-k1", f"OUT={tmp_path}/SEED=1-k1.jsonl"], "is the log of a run")):
        with pytest.raises(ToolError, match=said):
            report.main(arguments)


def test_a_name_that_is_no_utf8_is_escaped(tmp_path: Path):
    log(tmp_path / "a\udcff.jsonl", 1)
    report.write_page(tmp_path / "a.html", [report.read_run(tmp_path / "a\udcff.jsonl")])
    assert "<title>a\\udcff</title>" in (tmp_path / "a.html").read_text()
