"""One self-contained HTML page of one or several runs, with pictures: what they did, when, and for how many bytes.

    python -m tools.report RUN... [OUT=report.html]

RUN is the id of a run in LOG_DIR (logs), the path of its log, or a glob of either, also of a run that goes on or has
failed. Every figure is the log's, and stands in a table below its picture. The page follows the reader's light or dark
setting and fits a narrow screen; it loads nothing.
"""
from __future__ import annotations

import html
import io
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.common import ToolError, program
from tools.logs import events, last, log_folder, log_paths, readable, split_options
from tools.show import Stream, streams

INK, LINE = "#0a0b0c", "#0d0e0f"
SERIES = [f"#{i}0a0b{i}" for i in range(1, 8)]
"""Colours that no picture uses: the page puts its own in their place, which differ between light and dark."""
STYLE = """
:root { --page: #fcfcfb; --ink: #1d1f21; --faint: #63676b; --line: #d8dadb; --s0: #2166ac; --s1: #c4570a; --s2: #2b7a3d;
  --s3: #a23b8f; --s4: #7a6010; --s5: #5b4fc4; --s6: #5d6266; }
@media (prefers-color-scheme: dark) { :root { --page: #17191b; --ink: #e6e7e8; --faint: #9ba0a5; --line: #3b3f43;
  --s0: #6fb1f0; --s1: #f29a55; --s2: #6fcb83; --s3: #e08bd0; --s4: #d5b95a; --s5: #a9a0ff; --s6: #a8adb2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.05rem; margin: 0 0 .3rem; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 2rem 2.5rem; }
section { min-width: 0; } section p { margin: 0 0 .5rem; color: var(--faint); max-width: 40rem; }
#runs { grid-column: 1 / -1; }
svg { width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .15rem .8rem .15rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
summary { cursor: pointer; color: var(--faint); }
.bad { color: var(--s1); font-weight: 600; }
"""


class Run(NamedTuple):
    """The log of one run."""
    name: str
    events: list[dict[str, Any]]

    def all(self, *names: str) -> list[dict[str, Any]]:
        """Return every event of these names."""
        return [e for e in self.events if e["event"] in names]

    def last(self, event: str) -> dict[str, Any]:
        """Return the last event of that name; empty if there is none."""
        return last(self.events, event) or {}

    @property
    def scores(self) -> Mapping[str, float]:
        """Name of each score of the artifact and its bits a byte; the last one counts."""
        return self.last("verdict").get("diagnostic_evals", {})

    @property
    def error(self) -> str:
        """The error that the run ended in; empty: in none, or it went on after it."""
        end = next((e for e in reversed(self.events) if e["event"] in ("error", "start")), {})
        return str(end.get("text") or end.get("kind") or "")


Rows = list[list[Any]]


class Plot(NamedTuple):
    """One pair of axes with a line for each run."""
    x: str
    y: str
    points: Callable[[Run], Iterable[Sequence[float]]]
    """(x, y) of one run."""
    tune: Callable[[Any, list[Run]], None] = lambda ax, runs: None
    """What else is done to the axes."""


class Section(NamedTuple):
    """One picture with its table."""
    id: str
    title: str
    text: str
    head: str
    """Of the table, after the column `run`."""
    rows: Callable[[Run], Rows]
    """Of the table, of one run; none at all: the logs hold nothing of this, and the section says so."""
    plots: tuple[Plot, ...] = ()
    """Pairs of axes, one below the other."""
    bars: Callable[[list[Run], Any], None] | None = None
    """Draws stacked bars on a matplotlib figure instead."""


# -- what the logs say -----------------------------------------------------------------------------------


def stages(run: Run) -> list[tuple[int, str]]:
    """Return (first step, what runs from there on): how many layers, how long the rows, and whether rounded."""
    later = [(e["step"], f"{e['layers']} layers, rows of {e['seq_len']:,}" + ", rounded" * bool(e.get("rounded")))
             for e in run.all("stage")]
    return [(0, "from the start"), *later]


def clock(run: Run) -> dict[str, dict[str, float]]:
    """Return the seconds of every phase by budget (train, eval, none), in the order of time."""
    spent: dict[str, dict[str, float]] = {"train": {}, "eval": {}, "none": {}}
    for e in run.all("phase"):
        spent[e["budget"]][e["name"]] = spent[e["budget"]].get(e["name"], 0.0) + e["phase_seconds"]
    return spent


def limit(run: Run, budget: str) -> float:
    """Return the seconds of a budget; infinite where there is no limit."""
    knob = {"train": "max_wallclock_seconds", "eval": "eval_seconds_budget"}.get(budget)
    return run.last("config").get(knob) or math.inf


def step_times(run: Run) -> dict[str, tuple[int, float]]:
    """Return steps and their mean milliseconds by stage, from the logged rates after the first five steps."""
    rates: dict[str, list[tuple[int, float]]] = defaultdict(list)
    before = 0
    for e in run.all("train"):
        stage = [text for first, text in stages(run) if first < e["step"]][-1]
        if e["step"] > 5:
            rates[stage].append((e["step"] - before, e["ms_per_step"]))
        before = e["step"]
    sums = {stage: (sum(n for n, _ in pairs), sum(n * ms for n, ms in pairs)) for stage, pairs in rates.items()}
    return {stage: (steps, ms / steps) for stage, (steps, ms) in sums.items()}


def trained_tokens(run: Run, step: int) -> float:
    """Return the millions of tokens after that many steps."""
    return step * run.last("config").get("train_batch_tokens", 0) / 1e6


def bpb_by_place(run: Run, what: str) -> list[tuple[int, float, int]]:
    """Return (first position or length of the octave, bits a byte, targets) of the score that counts."""
    sums = run.last("places").get(what, {})
    each = enumerate(zip(*(sums.get(name, []) for name in ("nats", "bytes", "targets"))))
    return [(2 ** k, nats / math.log(2) / size, int(count)) for k, (nats, size, count) in each if size]


def rows_runs(run: Run) -> Rows:
    verdict, start = run.last("verdict"), run.last("start")
    figures = [verdict.get(name) for name in ("val_loss", "artifact_bytes", "steps", "train_seconds", "eval_seconds",
                                              "other_seconds", "seed")]
    return [[verdict.get("val_bpb", "unfinished"), *figures, f"{start.get('world', '?')}x {start.get('device', '?')}",
             start.get("code_sha256", "")[:8]]]


def rows_model(run: Run) -> Rows:
    model = run.last("model")
    plans = {"at first": model.get("layers"), "with recurrence": model.get("layers_looped")}
    return [[model["parameters"], when, " ".join(map(str, plan))] for when, plan in plans.items() if plan]


def rows_scores(run: Run) -> Rows:
    scores = list(run.scores.values())
    steps = [None, *(f"{b - a:+.4f}" for a, b in zip(scores, scores[1:]))]
    return [[name, score, step] for (name, score), step in zip(run.scores.items(), steps)]


def rows_clock(run: Run) -> Rows:
    rows: Rows = []
    for budget, phases in clock(run).items():
        rows += [[budget, name, seconds] for name, seconds in phases.items()]
        most = limit(run, budget)
        if phases:
            rows.append([budget, f"sum, of {most:g}" if math.isfinite(most) else "sum", round(sum(phases.values()), 3)])
    return rows


def rows_bytes(run: Run) -> Rows:
    artifact = run.last("artifact")
    if not artifact:
        return []
    parts = [*streams(artifact), Stream("code", artifact["code_bytes"], 0)]
    total = sum(part.size for part in parts)
    return [[part.name, part.size, f"{100 * part.size / total:.1f} %", part.values or None, part.bits]
            for part in parts]


def rows_step(run: Run) -> Rows:
    tokens = run.last("config")["train_batch_tokens"]
    return [[stage, steps, ms, round(1000 * tokens / ms)] for stage, (steps, ms) in step_times(run).items()]


# -- pictures --------------------------------------------------------------------------------------------


def draw_plots(section: Section, runs: list[Run], figure: Any) -> None:
    """Draw a section's plots, one line a run in the run's colour."""
    for plot, ax in zip(section.plots, figure.subplots(len(section.plots), 1, squeeze=False)[:, 0]):
        for i, run in enumerate(runs):
            points = list(plot.points(run))
            if points:
                ax.plot(*zip(*points), color=SERIES[i % 7], label=run.name, lw=1.1, marker="o", ms=2.5)
        ax.set(xlabel=plot.x, ylabel=plot.y)
        plot.tune(ax, runs)


def leave_out_the_first_steps(ax: Any, runs: list[Run]) -> None:
    late = [e["loss_nats"] for r in runs for e in r.all("train") if e["progress"] > 0.02 and e["loss_nats"]]
    if late:
        ax.set_ylim(min(late) - 0.1, max(late) + 0.1)


def octaves(ax: Any, runs: list[Run]) -> None:
    ax.set_xscale("log", base=2)


def mark_stages(ax: Any, runs: list[Run]) -> None:
    for i, run in enumerate(runs):
        for first, _ in stages(run)[1:]:
            ax.axvline(first, color=SERIES[i % 7], lw=0.8, ls=(0, (2, 3)))
    ax.set_ylim(bottom=0)


def score_tokens(run: Run) -> Iterable[Sequence[float]]:
    """Return (millions of trained tokens, bits a byte) of every validation."""
    steps = run.last("train_end").get("steps", 0)
    return [(trained_tokens(run, e.get("step") or steps), e["val_bpb"]) for e in run.all("val_probe", "score")]


def draw_bars(figure: Any, bars: Mapping[str, Mapping[str, float]]) -> Any:
    """Draw horizontal bars of parts; a part has one colour in all bars, the smallest share the last one."""
    from matplotlib.patches import Patch
    ax, total = figure.subplots(), defaultdict(float)
    for parts in bars.values():
        for name, size in parts.items():
            total[name] += size
    order = sorted(total, key=lambda name: -total[name])
    colours = dict(zip(order[:6], SERIES))
    for place, parts in enumerate(bars.values()):
        left = 0.0
        for name in sorted(parts, key=order.index):
            ax.barh(place, parts[name], left=left, height=0.62, color=colours.get(name, SERIES[6]), alpha=0.75)
            left += parts[name]
    ax.set_yticks(range(len(bars)), list(bars))
    ax.invert_yaxis()
    handles = [Patch(color=colour, alpha=0.75) for colour in [*colours.values(), SERIES[6]]]
    figure.legend(handles, [*colours, "other"], loc="outside lower center", ncols=4)
    return ax


def draw_bytes(runs: list[Run], figure: Any) -> None:
    ax = draw_bars(figure, {run.name: {row[0]: row[1] / 1e6 for row in rows_bytes(run)} for run in runs})
    cap = max(run.last("verdict").get("cap_bytes", 0) for run in runs) / 1e6
    ax.axvline(cap, color=INK, lw=1.5)
    ax.set(xlabel=f"million bytes; the line is the cap of {cap:g}")


def draw_clock(runs: list[Run], figure: Any) -> None:
    names = {"train": "training", "eval": "evaluation", "none": "neither"}
    ax = draw_bars(figure, {f"{run.name}\n{names[budget]}": phases for run in runs
                            for budget, phases in clock(run).items()})
    for place, most in enumerate(limit(run, budget) for run in runs for budget in names):
        if math.isfinite(most):
            ax.plot([most, most], [place - 0.42, place + 0.42], color=INK, lw=2)
    ax.set(xlabel="seconds; the marks are the budgets")


SECTIONS = (
    Section("runs", "Runs", "", "val_bpb|val_loss|bytes|steps|train s|eval s|other s|seed|machine|code", rows_runs),
    Section("model", "Model", "The block that each layer runs, in order.", "parameters|when|blocks", rows_model),
    Section("loss", "Training loss", "Of single batches, so it is noisy; the axes leave out the first steps.",
            "step|seconds|million tokens|loss, nats",
            lambda r: [[e["step"], e["train_seconds"], trained_tokens(r, e["step"]), e["loss_nats"]]
                       for e in r.all("train")],
            (Plot("seconds of training", "nats a token",
                  lambda r: ((e["train_seconds"], e["loss_nats"]) for e in r.all("train")), leave_out_the_first_steps),
             Plot("million tokens", "nats a token",
                  lambda r: ((trained_tokens(r, e["step"]), e["loss_nats"]) for e in r.all("train")),
                  leave_out_the_first_steps))),
    Section("bpb", "Bits a byte", "Validation while training (VAL_LOSS_EVERY), then every score of the artifact; the "
            "last one counts.", "what|seconds|val_loss|val_bpb",
            lambda r: [[e.get("name", f"step {e.get('step')}, live weights"), e["seconds"], e["val_loss"], e["val_bpb"]]
                       for e in r.all("val_probe", "score")],
            (Plot("seconds since the start", "bits a byte",
                  lambda r: ((e["seconds"], e["val_bpb"]) for e in r.all("val_probe", "score"))),
             Plot("million tokens", "bits a byte", score_tokens))),
    Section("scores", "Diagnostic scores", "The averaged weights, what rounding costs them, and what windows and "
            "adaptation give back.", "score|val_bpb|to the one before", rows_scores,
            (Plot("score", "bits a byte", lambda r: r.scores.items()),)),
    Section("place", "By place", "The score that counts, by how far a target lies in its document and by how long the "
            "document is.", "by|from|val_bpb|targets",
            lambda r: [[what, *row] for what in ("position", "length") for row in bpb_by_place(r, what)],
            (Plot("target of its document, and up to twice that", "bits a byte",
                  lambda r: [row[:2] for row in bpb_by_place(r, "position")], octaves),
             Plot("targets of the document, and up to twice as many", "bits a byte",
                  lambda r: [row[:2] for row in bpb_by_place(r, "length")], octaves))),
    Section("clock", "Where the time went", "Every phase is charged to training, to evaluation or to neither (set-up, "
            "compilation, diagnostics). Validation while training stands in training's bar, though it is not charged.",
            "budget|phase|seconds", rows_clock, bars=draw_clock),
    Section("bytes", "Where the bytes went", "The artifact by kind of tensor, and the code.",
            "tensors|bytes|share|values|bits a value", rows_bytes, bars=draw_bytes),
    Section("step", "Step time", "Between two log lines. Dotted: a new stage (recurrence, row length, rounding).",
            "stage|steps|ms a step|tokens a second", rows_step,
            (Plot("step", "ms a step",
                  lambda r: ((e["step"], e["ms_per_step"]) for e in r.all("train") if e["step"] > 5), mark_stages),)),
    Section("lr", "Learning rate", "Dots that end early are a run that ended before its schedule.",
            "step|used fraction|factor", lambda r: [[e["step"], e["progress"], e["lr_scale"]] for e in r.all("train")],
            (Plot("used fraction of the budget", "factor of the rates",
                  lambda r: ((e["progress"], e["lr_scale"]) for e in r.all("train"))),)),
)


# -- the page --------------------------------------------------------------------------------------------


def picture(section: Section, runs: list[Run]) -> str:
    """Return the section's picture as an SVG element in the page's colours."""
    import matplotlib
    from matplotlib.figure import Figure
    height = 1.5 + 0.5 * len(runs) if section.bars else 0.7 + 2.0 * len(section.plots)
    small = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
             "grid.color": LINE, "grid.linewidth": 0.5, "axes.edgecolor": LINE, "axes.axisbelow": True,
             "svg.fonttype": "none", "svg.hashsalt": section.id, "legend.frameon": False, "legend.fontsize": 7,
             **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)}
    with matplotlib.rc_context(small):
        figure = Figure(figsize=(5.2, height), layout="constrained")
        if section.bars:
            section.bars(runs, figure)
        else:
            draw_plots(section, runs, figure)
            if len(runs) > 1:
                figure.axes[0].legend(*figure.axes[0].get_legend_handles_labels())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg"):]
    for i, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--s{i})")
    svg = svg.replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{section.id}-", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(section.title)}"', 1)


def table(head: Sequence[str], rows: Rows) -> str:
    """Return an HTML table; numbers keep seven digits."""
    def cell(value: Any) -> str:
        if value is None:
            return ""
        form = {float: ".7g", int: ","}.get(type(value), "")
        return html.escape(format(value, form))

    body = "".join("<tr>" + "".join(f"<td>{cell(c)}</td>" for c in row) + "</tr>\n" for row in rows)
    return ("<div class=scroll><table><thead><tr>" + "".join(f"<th>{cell(c)}</th>" for c in head) +
            f"</tr></thead><tbody>{body}</tbody></table></div>")


def section_html(section: Section, runs: list[Run]) -> str:
    """Return one section: its text, its picture, and the figures behind it."""
    rows = [[run.name, *row] for run in runs for row in section.rows(run)]
    body = table(["run", *section.head.split("|")], rows)
    if not rows:
        body = "<p>The logs hold nothing of this.</p>"
    elif section.plots or section.bars:
        body = f"{picture(section, runs)}<details><summary>Figures</summary>{body}</details>"
    text = f"<p>{html.escape(section.text)}</p>" if section.text else ""
    return f"<section id={section.id}><h2>{html.escape(section.title)}</h2>{text}{body}</section>"


def page(runs: list[Run]) -> str:
    """Return the whole page."""
    title = html.escape(", ".join(run.name for run in runs))
    notes = "".join(f"<p class=bad>{html.escape(f'{run.name}: ended in an error: {run.error}')}</p>"
                    for run in runs if run.error)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n'
            f"{notes}<main>\n" + "\n".join(section_html(section, runs) for section in SECTIONS) +
            "\n</main></body></html>\n")


def main(arguments: Sequence[str]) -> int:
    """Write the page of the runs that are named."""
    names, options = split_options(arguments, ("OUT",))
    if not names or "--help" in names:
        print(__doc__)
        return 0 if names else 2
    paths = [path for name in names for path in log_paths(name, log_folder())]
    stems = [path.stem for path in paths]
    runs = [Run(path.stem if stems.count(path.stem) == 1 else str(path), events(path)) for path in paths]
    for path, run in zip(paths, runs):
        if not run.last("config"):
            raise ToolError(f"{path}: no log of a run (no config in it)")
    out = Path(options.get("OUT", "report.html"))
    out.write_text(readable(", ".join(run.name for run in runs), page, runs), encoding="utf-8")
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {out.stat().st_size:,} bytes; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "report.py"))
