"""The report is one page that loads nothing, holds every section, and shows the figures of the logs and no others."""
import html
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, tiny

import train_gpt as tg
from tools import report
from tools.common import ToolError


def log(path: Path, seed: int) -> dict[str, float]:
    """The log of a run with a stage, probes, scores and phases; returns its last loss and score."""
    config = {k: getattr(tiny(), k) for k in tg.Config.__dataclass_fields__}
    bpb, loss = 1.05 + seed / 1000, 2.3 + seed / 100
    events = [dict(event="start", world=1, device="cpu", code_sha256="a" * 64), dict(event="config", **config),
              dict(event="model", parameters=9, layers=[0, 1, 2], layers_looped=[0, 1, 1, 2])]
    events += [dict(event="train", step=s, progress=s / 20, loss_nats=9 - s / 4 if s < 20 else loss, lr_scale=0.5,
                    ms_per_step=100.0 + 50 * (s > 10), train_seconds=0.1 * s) for s in (1, 2, 10, 15, 20)]
    events.insert(6, dict(event="stage", step=10, progress=0.5, layers=6, seq_len=32))
    events.append(dict(event="val_probe", step=10, val_loss=2.5, val_bpb=1.5))
    events += [dict(event="phase", name=n, budget=b, phase_seconds=s) for n, b, s in (
        ("setup", "none", 1.25), ("train", "train", 2.5), ("gptq", "train", 0.5), ("gptq", "train", 0.25),
        ("score", "eval", 3.5))]
    events.append(dict(event="train_end", steps=20))
    events.append(dict(event="artifact", weight_bytes=1000, code_bytes=200,
                       streams={"int8": [300, 300], "gptq:mlp": [1600, 600]}))
    events += [dict(event="score", name=n, val_loss=2.4, val_bpb=x) for n, x in (("ema", 1.2), ("lora", bpb))]
    sums = dict(targets=[2.0, 4.0], nats=[math.log(2) * 3, math.log(2) * 5], bytes=[2.0, 0.0])
    events.append(dict(event="places", position=sums, length=sums))
    events.append(dict(event="verdict", val_bpb=bpb, val_loss=2.4, artifact_bytes=1200, cap_bytes=16_000_000, steps=20,
                       diagnostic_evals={"ema": 1.2, "lora": bpb}, seed=seed, train_seconds=3.25, eval_seconds=3.5,
                       other_seconds=1.25, total_seconds=8.0))
    path.write_text("".join(json.dumps({"seconds": float(i), **e}) + "\n" for i, e in enumerate(events)))
    return {"loss": loss, "bpb": bpb}


class Parsed(HTMLParser):
    """Sections with their pictures and table cells; open elements; everything that would be loaded."""
    VOID = {"meta", "br", "use", "path"}

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
        if tag == "svg":
            self.pictures[self.section] += 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[self.section].append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Parsed, list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("logs")
    told = [log(folder / f"run{seed}.jsonl", seed) for seed in (1, 2)]
    assert report.main([str(folder / "run1.jsonl"), str(folder / "run2.jsonl"), f"OUT={folder}/r.html"]) == 0
    text = (folder / "r.html").read_text(encoding="utf-8")
    return text, Parsed(text), told


def test_the_page_is_whole_and_loads_nothing(made: tuple):
    text, parsed, _ = made
    assert parsed.open == [] and parsed.loads == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "@import" not in text and all(url[:1] == "#" and url[1:] in parsed.ids
                                         for url in re.findall(r"url\(([^)]*)\)", text))
    assert list(parsed.cells) == [s.id for s in report.SECTIONS]
    assert all(parsed.pictures[s.id] == bool(s.plots or s.bars) for s in report.SECTIONS)


def test_colours_are_the_readers(made: tuple):
    text, _, _ = made
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert "var(--s0)" in svgs and "var(--s1)" in svgs and "var(--ink)" in svgs
    assert set(re.findall(r"#[0-9a-f]{6}", re.sub(r'(id|href)="[^"]*"|url\([^)]*\)', "", svgs))) <= {"#ffffff"}


BROWSER = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
                if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0), None)
SEEN = """<script>addEventListener("load", () => { const all = s => [...document.querySelectorAll(s)];
  all("details").forEach(d => d.open = true);
  document.body.innerHTML = JSON.stringify({width: innerWidth, needs: document.documentElement.scrollWidth,
    pictures: all("section svg").map(e => e.getBoundingClientRect()).map(r => [r.width, r.height]),
    tables: all("td").every(e => e.getBoundingClientRect().height > 8), page: getComputedStyle(document.body).color,
    line: getComputedStyle(document.querySelector("#loss svg [style*='var(--s0)']")).stroke,
    loads: performance.getEntriesByType("resource").length}); })</script></body>"""
"""What a reader of the page would see, instead of the page."""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; its structure was checked without one")
def test_a_browser_shows_every_picture_wide_and_narrow_light_and_dark(made: tuple, tmp_path: Path):
    text, parsed, _ = made
    (tmp_path / "page.html").write_text(text.replace("</body>", SEEN), encoding="utf-8")
    looks = []
    for width, scheme in ((1280, 1), (500, 0)):  # 0: dark
        done = subprocess.run([BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
                               f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={tmp_path}/{width}",
                               "--dump-dom", (tmp_path / "page.html").as_uri()], capture_output=True, text=True,
                              timeout=120)
        seen = json.loads(html.unescape(re.search(r"<body[^>]*>(\{.*?\})</body>", done.stdout, re.S).group(1)))
        assert seen["width"] == width and seen["needs"] <= width and seen["loads"] == 0 and seen["tables"]
        assert len(seen["pictures"]) == sum(parsed.pictures.values())
        assert all(200 < w <= width and h > 80 for w, h in seen["pictures"])
        looks.append({seen["page"], seen["line"]})
    assert len(looks[0]) == len(looks[1]) == 2 and not looks[0] & looks[1]


@pytest.mark.parametrize("section, expected", [
    ("runs", ["run1", "1.051", "2.4", "1,200", "20", "3.25", "3.5", "1.25", "1", "1x cpu", "aaaaaaaa"]),
    ("loss", ["run2", "20", "2", "0.00768", "2.32"]), ("bpb", ["run1", "step 10, live weights", "9", "2.5", "1.5"]),
    ("bpb", ["run2", "lora", "18", "2.4", "1.052"]), ("scores", ["run1", "lora", "1.051", "-0.1490"]),
    ("place", ["run1", "position", "1", "1.5", "2", "run1", "length"]),
    ("clock", ["run1", "train", "gptq", "0.75"]), ("clock", ["run1", "train", "sum", "3.25"]),
    ("clock", ["run1", "eval", "sum, of 600", "3.5"]), ("bytes", ["run1", "mlp", "600", "50.0 %", "1,600", "3"]),
    ("bytes", ["run2", "header", "100", "8.3 %"]), ("bytes", ["run2", "code", "200", "16.7 %"]),
    ("step", ["run1", "from the start", "8", "100", "3,840"]),
    ("step", ["run1", "6 layers, rows of 32", "10", "150", "2,560"]), ("lr", ["run1", "20", "1", "0.5"]),
    ("model", ["run1", "9", "with recurrence", "0 1 1 2"])])
def test_figures_are_the_logs(section: str, expected: list[str], made: tuple):
    cells = made[1].cells[section]
    assert any(cells[i:i + len(expected)] == expected for i in range(len(cells))), cells


def test_lines_are_drawn_where_the_figures_are(tmp_path: Path):
    """What is drawn, not only what stands in the table."""
    from matplotlib.figure import Figure
    log(tmp_path / "a.jsonl", 1)
    run = report.Run("a", report.events(tmp_path / "a.jsonl"))
    drawn = {}
    for section in report.SECTIONS:
        if section.plots:
            figure = Figure()
            report.draw_plots(section, [run], figure)
            drawn[section.id] = figure.axes[0].lines[0].get_xydata()
    assert np.allclose(drawn["loss"], [(e["train_seconds"], e["loss_nats"]) for e in run.all("train")])
    assert np.allclose(drawn["step"], [(10, 100.0), (15, 150.0), (20, 150.0)])
    assert np.allclose(drawn["scores"], [(0, 1.2), (1, 1.051)])


def test_an_unfinished_run_and_its_error_are_shown(tmp_path: Path):
    log(tmp_path / "a.jsonl", 1)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    failed = json.dumps({"seconds": 1, "event": "error", "text": "<&>"})
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:5], failed, '{"seconds": 2, "ev']))
    assert report.main([str(tmp_path / "a.jsonl"), f"OUT={tmp_path}/r.html"]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "unfinished" in text and html.escape("ended in an error: <&>") in text
    assert Parsed(text).pictures["loss"] == 1 and "The logs hold nothing of this." in text


def test_runs_are_found_by_id_and_glob_and_only_out_is_an_option(tmp_path: Path, monkeypatch, capsys):
    """A sweep's run ids begin with KNOB=value."""
    monkeypatch.setenv("LOG_DIR", str(tmp_path))
    for seed in (1, 2):
        log(tmp_path / f"SEED={seed}-k{seed}.jsonl", seed)
    for runs in (["SEED=1-k1", "SEED=2-k2"], ["SEED=*"]):
        assert report.main([*runs, f"OUT={tmp_path}/r.html"]) == 0
        assert "2 runs" in capsys.readouterr().out
    with pytest.raises(ToolError, match="SEED=3-k3: no such log"):
        report.main(["SEED=3-k3"])


def test_it_needs_no_torch_and_says_what_is_missing():
    code = "import sys; from tools import common, report; s = common.program(report.main, 'report.py'); " \
           "assert not {'torch', 'matplotlib'} & set(sys.modules); sys.exit(s)"
    done = subprocess.run([sys.executable, "-c", code, "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("report.py: nowhere: no such log"), done.stderr
