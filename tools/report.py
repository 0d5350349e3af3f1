"""One self-contained HTML page of one or several runs, with pictures: what they did, when, and for how many bytes.

    python -m tools.report RUN... [OUT=report.html]

RUN is the id of a run in LOG_DIR (logs), the path of its log, or a glob of either, also of a run that goes on or has
failed. Every figure is the log's, and stands in a table below its picture. The page follows the reader's light or dark
setting and fits a narrow screen; it loads nothing.
"""
from __future__ import annotations

import html
import math
import os
import sys
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tools import charts, knobs
from tools.charts import Bar, draw_bars, draw_lines, legend
from tools.common import ToolError, program
from tools.logs import Run, cut, log_folder, log_paths, read_run, readable, split_options
from tools.runs import preset_values, told_apart
from tools.show import adaptation_cut, budget, compressors, margin, score_in_words

STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.05rem; margin: 0 0 .3rem; }
main { columns: 30rem; column-gap: 2.5rem; } .many #runs, .many #notes { column-span: all; }
section { break-inside: avoid; margin-bottom: 2rem; }
section p { margin: 0 0 .5rem; color: var(--faint); max-width: 40rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .15rem .8rem .15rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, #notes th, #notes td { text-align: left; }
#notes td { white-space: pre-line; vertical-align: top; }
summary { cursor: pointer; color: var(--faint); }
"""
Rows = list[list[Any]]


class Plot(NamedTuple):
    """One pair of axes with a line for each run."""
    x: str
    y: str
    points: Callable[[Run], Iterable[tuple[Any, float | None]]]
    """(x, y) of one run, by rising x."""
    options: Mapping[str, bool] = {}
    """Of `draw_lines`."""
    levels: Callable[[Run], Mapping[str, float]] = lambda run: {}
    """Named values of y, each a line across."""


class Section(NamedTuple):
    """A table, and the pictures of what it holds."""
    id: str
    title: str
    text: str
    head: str
    """Of the table, after the column `run`."""
    rows: Callable[[Run], Rows]
    """Of the table, of one run; none at all: the logs hold nothing of this."""
    plots: tuple[Plot, ...] = ()
    bars: Callable[[Run], list[Bar]] | None = None
    unit: str = ""
    """Of the bars."""


# -- what the logs say -----------------------------------------------------------------------------------


def streams(run: Run) -> list[tuple[str, int, int]]:
    """Return (name, bytes, values) of what an artifact consists of; 0 values where the log does not say."""
    artifact = run.last("artifact")
    if not artifact:
        return []
    parts = [(name.removeprefix("gptq:"), size, values) for name, (values, size) in artifact["streams"].items()]
    header = artifact["weight_bytes"] - sum(size for _, size, _ in parts)
    return [*parts, ("header", header, 0), ("code", artifact["code_bytes"], 0)]


def logged(run: Run) -> list[dict[str, Any]]:
    """Return the `train` events by step; of a step that was taken again after a crash, the later one."""
    return [e for _, e in sorted({e["step"]: e for e in run.all("train")}.items())]


def trained_tokens(run: Run, step: int) -> float:
    """Return the millions of tokens after that many steps."""
    return step * run.last("config").get("train_batch_tokens", 0) / 1e6


def curve(run: Run) -> list[tuple[float, float, float]]:
    """Return (seconds of training, million tokens, loss in nats a token) of each step, or of those that were logged.

    The seconds of steps between two lines of the log lie evenly between those of the lines.
    """
    loss = {block["first"] + i: each for block in run.all("steps") for i, each in enumerate(block["loss_nats"])
            if each is not None}
    loss |= {e["step"]: e["loss_nats"] for e in logged(run)}
    lines = [(0, 0.0), *((e["step"], e["train_seconds"]) for e in logged(run))]
    end = run.last("train_end")
    if end and end["steps"] > lines[-1][0]:
        loss[end["steps"]] = end["train_loss"]
        lines.append((end["steps"], end["train_seconds"]))
    known = sorted(step for step, each in loss.items() if each is not None)
    return [(since + (step - first) * (until - since) / (end - first), trained_tokens(run, step), loss[step])
            for (first, since), (end, until) in pairwise(lines)
            for step in known[bisect(known, first):bisect(known, end)]]


def stages(run: Run) -> list[tuple[int, str]]:
    """Return (first step, what runs from there on): how many layers, and whether rounded."""
    later = [(e["step"], f"{e['layers']} layers" + ", rounded" * bool(e.get("rounded"))) for e in run.all("stage")]
    return [(0, "from the start"), *later]


def step_times(run: Run) -> dict[str, tuple[int, float]]:
    """Return steps and their mean milliseconds by stage, from the logged rates after the first five steps."""
    sums: dict[str, tuple[int, float]] = {}
    before = 0
    for e in logged(run):
        stage, count = [text for first, text in stages(run) if first < e["step"]][-1], e["step"] - before
        if e["step"] > 5:
            steps, spent = sums.get(stage, (0, 0.0))
            sums[stage] = (steps + count, spent + count * e["ms_per_step"])
        before = e["step"]
    return {stage: (steps, spent / steps) for stage, (steps, spent) in sums.items()}


def clock(run: Run) -> dict[str, dict[str, float]]:
    """Return the seconds of every phase by budget, in the order of time; without those of the phases inside it."""
    spent: dict[str, dict[str, float]] = {"training": {}, "scoring": {}, "neither": {}}
    names, inside = {"train": "training", "eval": "scoring", "none": "neither"}, []
    for e in run.all("start", "phase"):
        if e["event"] == "start":
            inside = []
            continue
        seconds, begin = e["phase_seconds"], e["seconds"] - e["phase_seconds"] - 0.002  # both are rounded
        own = seconds
        while inside and inside[-1][0] >= begin:
            own -= inside.pop()[1]
        inside.append((begin, seconds))
        phases = spent[names[e["budget"]]]
        phases[e["name"]] = phases.get(e["name"], 0.0) + own
    return spent


def limit(run: Run, part: str) -> float:
    """Return the seconds of a budget; infinite where there is no limit."""
    knob = {"training": "max_wallclock_seconds", "scoring": "eval_seconds_budget"}.get(part)
    return run.last("config").get(knob) or math.inf


def bpb_by_place(run: Run, what: str) -> list[tuple[int, float, int]]:
    """Return (first position or length of the octave, bits a byte, targets) of the score that counts."""
    sums = run.last("places").get(what, {})
    each = enumerate(zip(*(sums.get(name, []) for name in ("nats", "bytes", "targets"))))
    return [(2 ** k, nats / math.log(2) / size, int(count)) for k, (nats, size, count) in each if size]


def notes(run: Run) -> list[str]:
    """Return what a reader should know before the figures: how the run ended, budgets, warnings."""
    verdict, found = run.last("verdict"), []
    if not verdict:
        found.append(f"{run.status}: no score" + f"; it ended in an error: {run.error}" * bool(run.error))
    for part, name in (("training", "train_seconds"), ("scoring", "eval_seconds")):
        if verdict.get(name, 0.0) > limit(run, part):
            found.append(f"{part} took {budget(verdict[name], limit(run, part))}")
    if stopped := adaptation_cut(run):
        found.append(f"adaptation {stopped}")
    if skipped := run.last("train").get("skipped"):
        found.append(f"{skipped} steps had a gradient that was not finite")
    if damping := run.all("gptq_damping"):
        found.append(f"rounding (GPTQ) had to damp {sum(e['failed'] for e in damping)} Hessians more, up to "
                     f"{max(e['next'] for e in damping):g} of their mean diagonal")
    found += [f"warning: {e['text']}" for e in run.all("warning")]
    return found or ["no warning, and every budget was kept"]


def rows_runs(run: Run) -> Rows:
    verdict, start = run.last("verdict"), run.last("start")
    size, cap = verdict.get("artifact_bytes"), verdict.get("cap_bytes")
    figures = [verdict.get(name) for name in ("steps", "train_seconds", "eval_seconds", "other_seconds")]
    beside = [f"{margin(verdict['val_bpb'], need)} {name}" for name, need in compressors(run).items() if verdict]
    return [[run.name, verdict.get("val_bpb", run.status), ", ".join(beside), verdict.get("val_loss"), size,
             f"{100 * size / cap:.1f} %" if size and cap else None, run.last("model").get("parameters"), *figures,
             str(run.knobs.get("seed", "")), f"{start.get('world', '?')}x {start.get('device', '?')}",
             start.get("code_sha256", "")[:8]]]


def rows_scores(run: Run) -> Rows:
    verdict = run.last("verdict")
    scores, bpb = verdict.get("diagnostic_evals", {}), verdict.get("val_bpb")
    steps = [None, *(f"{b - a:+.4f}" for a, b in pairwise(scores.values()))]
    return [*([name, value, step, score_in_words(name)] for (name, value), step in zip(scores.items(), steps)),
            *([name, need, None, f"compressing the same text; the score is {margin(bpb, need)} it"]
              for name, need in compressors(run).items() if bpb)]


def rows_clock(run: Run) -> Rows:
    rows: Rows = []
    for part, phases in clock(run).items():
        rows += [[part, name, round(seconds, 3)] for name, seconds in phases.items()]
        most = limit(run, part)
        if phases:
            rows.append([part, f"sum, of {most:g}" if math.isfinite(most) else "sum", round(sum(phases.values()), 3)])
    return rows


def rows_bytes(run: Run) -> Rows:
    total = sum(size for _, size, _ in streams(run))
    return [[name, size, f"{100 * size / total:.1f} %", values or None, 8 * size / values if values else None]
            for name, size, values in streams(run)]


def rows_step(run: Run) -> Rows:
    tokens = run.last("config")["train_batch_tokens"]
    return [[stage, steps, ms, round(1000 * tokens / ms)] for stage, (steps, ms) in step_times(run).items()]


# -- the sections ----------------------------------------------------------------------------------------

SECTIONS = (
    Section("runs", "Runs", "", "run id|val_bpb|that is|val_loss|bytes|of the cap|parameters|steps|train s|eval s|"
            "other s|seed|machine|code", rows_runs),
    Section("notes", "What to know first", "", "what", lambda r: [["\n".join(notes(r))]]),
    Section("loss", "Training loss", "Of each step's batch, pale, and its running mean over a fiftieth of the steps; "
            "dots where only the logged steps are known. The axes leave out the first steps.",
            "step|seconds|million tokens|loss, nats|factor of the rates",
            lambda r: [[e["step"], e["train_seconds"], trained_tokens(r, e["step"]), e["loss_nats"], e["lr_scale"]]
                       for e in logged(r)],
            (Plot("seconds of training", "nats a token", lambda r: [(at, loss) for at, _, loss in curve(r)],
                  dict(late=True)),
             Plot("million tokens", "nats a token", lambda r: [(at, loss) for _, at, loss in curve(r)],
                  dict(late=True)))),
    Section("bpb", "Validation while training", "VAL_LOSS_EVERY; of the weights as they are then.",
            "step|million tokens|val_loss|val_bpb",
            lambda r: [[e["step"], trained_tokens(r, e["step"]), e["val_loss"], e["val_bpb"]]
                       for e in r.all("val_probe")],
            (Plot("million tokens", "bits a byte",
                  lambda r: [(trained_tokens(r, e["step"]), e["val_bpb"]) for e in r.all("val_probe")]),)),
    Section("scores", "Scores", "The averaged weights, what rounding costs them, what windows and adaptation give "
            "back; the last score counts. Dashed: what compressors need for the same text.",
            "score|val_bpb|to the one before|what it is", rows_scores,
            (Plot("score", "bits a byte", lambda r: r.last("verdict").get("diagnostic_evals", {}).items(),
                  levels=compressors),)),
    Section("place", "By place", "The score that counts, by how far a target lies in its document and by how long its "
            "document is.", "by|from|val_bpb|targets",
            lambda r: [[what, *row] for what in ("position", "length") for row in bpb_by_place(r, what)],
            (Plot("target of its document, and up to twice that", "bits a byte",
                  lambda r: [(at, bpb) for at, bpb, _ in bpb_by_place(r, "position")], dict(log2=True)),
             Plot("targets of the document, and up to twice as many", "bits a byte",
                  lambda r: [(at, bpb) for at, bpb, _ in bpb_by_place(r, "length")], dict(log2=True)))),
    Section("clock", "Where the time went", "Every phase is charged to training, to scoring or to neither (set-up, "
            "compilation, packing, diagnostics). The marks are the budgets.", "budget|phase|seconds", rows_clock,
            bars=lambda r: [Bar(part, phases, limit(r, part)) for part, phases in clock(r).items() if phases],
            unit="seconds"),
    Section("bytes", "Where the bytes went", "The artifact by kind of tensor, and the code. The mark is the cap.",
            "tensors|bytes|share|values|bits a value", rows_bytes, unit="million bytes",
            bars=lambda r: [Bar("", {name: size / 1e6 for name, size, _ in streams(r)},
                                r.last("verdict").get("cap_bytes", math.inf) / 1e6)] if streams(r) else []),
    Section("step", "Step time", "Between two lines of the log.", "stage|steps|ms a step|tokens a second", rows_step,
            (Plot("step", "ms a step", lambda r: ((e["step"], e["ms_per_step"]) for e in logged(r) if e["step"] > 5),
                  dict(zero=True)),)),
)


# -- the page --------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Rows) -> str:
    """Return an HTML table; numbers keep seven digits."""
    def cell(value: Any) -> str:
        form = {float: ".7g", int: ","}.get(type(value), "")
        return "" if value is None else html.escape(format(value, form))

    body = "".join("<tr>" + "".join(f"<td>{cell(c)}</td>" for c in row) + "</tr>\n" for row in rows)
    return ("<div class=scroll><table><thead><tr>" + "".join(f"<th>{cell(c)}</th>" for c in head) +
            f"</tr></thead><tbody>{body}</tbody></table></div>")


def section_html(section: Section, runs: Sequence[Run], labels: Sequence[str]) -> str:
    """Return one section: its text, its pictures, and the figures behind them; empty where the logs hold nothing."""
    named = [(label if len(runs) > 1 else "", run) for label, run in zip(labels, runs)]
    rows = [[label, *row] for label, run in named for row in section.rows(run)]
    if not rows:
        return ""
    head = ["run", *section.head.split("|")]
    if len(runs) == 1:  # a column that says the same in each row; and a single row is read better as a column
        head, rows = head[1:], [row[1:] for row in rows]
        if len(rows) == 1 and len(head) > 1:
            head, rows = ["", ""], [list(pair) for pair in zip(head, rows[0])]
    body, pictures = table(head, rows), ""
    for plot in section.plots:
        lines = [[(x, y) for x, y in plot.points(run) if y is not None] for run in runs]
        levels = {name: y for run in runs for name, y in plot.levels(run).items()}
        pictures += draw_lines(lines, plot.x, plot.y, levels=levels, **plot.options)
    if pictures and len(runs) > 1:
        pictures = legend(labels) + pictures
    if section.bars:
        bars = [bar._replace(name=f"{label} {bar.name}".strip()) for label, run in named for bar in section.bars(run)]
        pictures += draw_bars(bars, section.unit)
    if pictures:
        body = f"{pictures}<details><summary>Figures</summary>{body}</details>"
    text = f"<p>{html.escape(section.text)}</p>" if section.text else ""
    return f"<section id={section.id}><h2>{html.escape(section.title)}</h2>{text}{body}</section>\n"


def knobs_html(runs: Sequence[Run], labels: Sequence[str]) -> str:
    """Return the knobs in which runs differ, of a single one those that differ from its preset."""
    apart = told_apart(runs)
    names = list(dict.fromkeys(name for values in apart for name in values))
    if len(runs) > 1:
        title, head = "Knobs that differ", ["run", *names]
        rows = [[label, *(values.get(name) for name in names)] for label, values in zip(labels, apart)]
    else:
        preset = str(runs[0].knobs.get("preset"))
        usual = {**({knob.name: knob.default for knob in knobs.read()} if names else {}), **preset_values(preset)}
        title, head = f"Knobs that differ from PRESET={preset}", ["knob", "value", "of the preset"]
        rows = [[name, apart[0][name], usual.get(name)] for name in names]
    body = table(head, rows) if names else "<p>None.</p>"
    return f"<section id=knobs><h2>{html.escape(title)}</h2>{body}</section>\n"


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run: the knobs that tell it from the others, else its run id, else its path."""
    names = [run.name for run in runs]
    ids = [str(run.path) if names.count(run.name) > 1 else run.name for run in runs]
    said = [" ".join(f"{name}={knobs.typed_text(value)}" for name, value in values.items())
            for values in told_apart(runs)]
    unique = len(runs) > 1 and len(set(said)) == len(runs) and max(map(len, said)) <= 60
    return said if unique else ids


def page(runs: Sequence[Run]) -> str:
    """Return the whole page."""
    labels = labels_of(runs)
    title = html.escape(runs[0].name if len(runs) == 1 else cut(f"{len(runs)} runs: {', '.join(labels)}", 150))
    parts = [section_html(section, runs, labels) for section in SECTIONS]
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><style>{charts.STYLE}{STYLE}</style></head>\n'
            f"<body><h1>{title}</h1>\n"
            f"<main{' class=many' * (len(runs) > 1)}>\n{parts[0]}{parts[1]}{knobs_html(runs, labels)}"
            f"{''.join(parts[2:])}</main></body></html>\n")


def write_page(path: Path, runs: Sequence[Run]) -> None:
    """Write the page of some runs; bytes of their names that are no UTF-8 as escapes."""
    text = readable(", ".join(run.name for run in runs), page, runs)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def main(arguments: Sequence[str]) -> int:
    """Write the page of the runs that are named."""
    names, options = split_options(arguments, ("OUT",))
    if not names:
        raise ToolError("expected RUN ... [OUT=report.html]: run ids, logs or globs")
    runs = [read_run(path) for name in names for path in log_paths(name, log_folder())]
    for run in runs:
        if not run.last("config"):
            raise ToolError(f"{run.path}: no log of a run (no config in it)")
    out = Path(options.get("OUT") or os.environ.get("OUT") or "report.html")
    if out.exists() and any(out.samefile(run.path) for run in runs):
        raise ToolError(f"OUT={out}: is the log of a run; expected the name of a page, such as report.html")
    write_page(out, runs)
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {out.stat().st_size:,} bytes; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "report.py", __doc__))
