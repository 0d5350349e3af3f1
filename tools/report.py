"""One self-contained HTML page of one or several runs, with pictures: what they did, when, and for how many bytes.

    python records/report.py RUN... [OUT=report.html]

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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.evidence import readable
from tools.logs import InputError, events, last, log_folder, log_paths, split_options

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

    def all(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]

    def last(self, event: str) -> dict[str, Any]:
        """The last event of that name; empty if there is none."""
        return last(self.events, event) or {}

    @property
    def ended(self) -> str:
        """The error that the run ended in; empty: in none, or it went on after it."""
        end = next((e for e in reversed(self.events) if e["event"] in ("error", "start")), {})
        return str(end.get("text") or end.get("kind") or "")


class Section(NamedTuple):
    """One picture with its table."""
    id: str
    title: str
    text: str
    draw: Callable[[list[Run], Any], None] | None
    """Draws on a matplotlib figure; None: a table alone."""
    rows: Callable[[list[Run]], list[list[Any]]]
    """Head and body of the table; a head alone: the logs hold nothing of this, and the section says so."""
    height: float = 2.9
    """Of the picture, in inches; it is 5.2 wide."""


def stages(run: Run) -> list[tuple[int, str]]:
    """(first step, what runs from there on): how many visits, how long the rows, and whether weights are rounded."""
    later = [(e["step"], f"{e['visits']} visits, rows of {e['seq_len']:,}" + ", rounded" * bool(e.get("rounded")))
             for e in run.all("stage")]
    return [(0, "from the start"), *later]


def planned_lr(config: dict[str, Any], frac: float) -> float:
    """The learning rates' factor at that fraction of the budget (`lr_scale` of train_gpt.py)."""
    warmdown, floor = config["warmdown_frac"], config["min_lr"]
    return 1.0 if warmdown == 0 else max(min(1.0, (1 - frac) / warmdown), floor)


def bytes_by_family(run: Run) -> dict[str, int]:
    """Bytes of the artifact by kind of tensor, the rest of the file, and the code."""
    artifact = run.last("artifact")
    parts = {name.removeprefix("bytes_").removeprefix("gptq_"): size for name, size in artifact.items()
             if name.startswith("bytes_")}
    return {**parts, "header": artifact["weight_bytes"] - sum(parts.values()), "code": artifact["code_bytes"]} \
        if artifact else {}


def clock(run: Run) -> dict[str, dict[str, float]]:
    """Seconds of every phase by budget (train, eval, none), in the order of time."""
    spent: dict[str, dict[str, float]] = {"train": {}, "eval": {}, "none": {}}
    for e in run.all("phase"):
        spent[e["budget"]][e["name"]] = spent[e["budget"]].get(e["name"], 0.0) + e["phase_seconds"]
    return spent


def limits(run: Run) -> dict[str, float]:
    """Seconds of both budgets."""
    config = run.last("config")
    return {"train": config.get("max_wallclock_seconds") or math.inf,
            "eval": config.get("eval_seconds_budget") or math.inf}


def step_times(run: Run) -> dict[str, tuple[int, float]]:
    """Steps and their mean milliseconds by stage, from the logged rates after the first five steps."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    before = 0
    for e in run.all("train"):
        stage = [text for first, text in stages(run) if first < e["step"]][-1]
        if e["step"] > 5:
            found[stage].append((e["step"] - before, e["ms_per_step"]))
        before = e["step"]
    return {stage: (sum(n for n, _ in rates), sum(n * ms for n, ms in rates) / sum(n for n, _ in rates))
            for stage, rates in found.items()}


# -- pictures -------------------------------------------------------------------------------------------


def lines(ax: Any, runs: list[Run], points: Callable[[Run], Iterable[tuple[float, float]]], **style: Any) -> None:
    """One line a run, in the run's colour."""
    for i, run in enumerate(runs):
        found = list(points(run))
        if found:
            ax.plot(*zip(*found), **{"color": SERIES[i % 7], "label": run.name, **style})


def trained_tokens(run: Run, step: int) -> float:
    """Millions of tokens after that many steps."""
    return step * run.last("config").get("train_batch_tokens", 0) / 1e6


def draw_loss(runs: list[Run], figure: Any) -> None:
    top, bottom = figure.subplots(2, 1, sharey=True)
    lines(top, runs, lambda r: ((e["train_seconds"], e["loss_nats"]) for e in r.all("train")), lw=1.1)
    lines(bottom, runs, lambda r: ((trained_tokens(r, e["step"]), e["loss_nats"]) for e in r.all("train")), lw=1.1)
    late = [e["loss_nats"] for r in runs for e in r.all("train") if e["frac"] > 0.02 and e["loss_nats"]]
    if late:
        top.set_ylim(min(late) - 0.1, max(late) + 0.1)
    for ax, label in ((top, "seconds of training"), (bottom, "million tokens")):
        ax.set(xlabel=label, ylabel="nats a token")


def draw_bpb(runs: list[Run], figure: Any) -> None:
    top, bottom = figure.subplots(2, 1, sharey=True)

    def scores(run: Run) -> list[dict[str, Any]]:
        return [e for e in run.events if e["event"] in ("val_probe", "score")]

    lines(top, runs, lambda r: ((e["seconds"], e["val_bpb"]) for e in scores(r)), lw=1.1, marker="o", ms=3)
    lines(bottom, runs, lambda r: ((trained_tokens(r, e.get("step") or r.last("train_end").get("steps", 0)),
                                    e["val_bpb"]) for e in scores(r)), lw=1.1, marker="o", ms=3)
    bottom.set_xlim(left=0)
    for ax, label in ((top, "seconds since the start"), (bottom, "million tokens")):
        ax.set(xlabel=label, ylabel="bits a byte")


def draw_lr(runs: list[Run], figure: Any) -> None:
    ax = figure.subplots()
    grid = [i / 200 for i in range(201)]
    lines(ax, runs, lambda r: [(f, planned_lr(r.last("config"), f)) for f in grid] if r.last("config") else [], lw=0.9,
          ls=(0, (4, 3)), label=None)
    lines(ax, runs, lambda r: ((e["frac"], e["lr_scale"]) for e in r.all("train")), lw=0, marker="o", ms=3)
    ax.set(xlabel="used fraction of the budget", ylabel="factor of the rates", xlim=(-0.02, 1.02))


def draw_step(runs: list[Run], figure: Any) -> None:
    ax = figure.subplots()
    lines(ax, runs, lambda r: ((e["step"], e["ms_per_step"]) for e in r.all("train") if e["step"] > 5), lw=1.1,
          marker="o", ms=2.5)
    for i, run in enumerate(runs):
        for first, _ in stages(run)[1:]:
            ax.axvline(first, color=SERIES[i % 7], lw=0.8, ls=(0, (2, 3)))
    ax.set(xlabel="step", ylabel="ms a step")
    ax.set_ylim(bottom=0)


def bpb_by_place(run: Run, what: str) -> list[tuple[int, float, int]]:
    """(first position or length of the octave, bits a byte, targets) of the score that counts."""
    sums = run.last("places").get(what, {})
    return [(2 ** k, nats / math.log(2) / size, int(count)) for k, (nats, size, count) in
            enumerate(zip(*(sums.get(name, []) for name in ("nats", "bytes", "targets")))) if size]


def draw_place(runs: list[Run], figure: Any) -> None:
    for ax, what in zip(figure.subplots(2, 1), ("position", "length")):
        lines(ax, runs, lambda r, what=what: [p[:2] for p in bpb_by_place(r, what)], lw=1.1, marker="o", ms=3)
        ax.set_xscale("log", base=2)
        ax.set(xlabel={"position": "target of its document, and up to twice that",
                       "length": "targets of the document, and up to twice as many"}[what], ylabel="bits a byte")


def draw_ladder(runs: list[Run], figure: Any) -> None:
    ax = figure.subplots()
    names = list(dict.fromkeys(name for run in runs for name in run.last("verdict").get("ladder", {})))
    for i, run in enumerate(runs):
        ladder = run.last("verdict").get("ladder", {})
        ax.plot(list(ladder.values()), [names.index(name) for name in ladder], color=SERIES[i % 7], lw=0.9, marker="o",
                ms=5, label=run.name)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set(xlabel="bits a byte")


def draw_bars(figure: Any, bars: dict[str, dict[str, float]]) -> Any:
    """Horizontal bars of parts; a part has one colour in all bars, the smallest share the last one."""
    from matplotlib.patches import Patch
    ax, total = figure.subplots(), defaultdict(float)
    for parts in bars.values():
        for name, size in parts.items():
            total[name] += size
    colours = dict(zip(sorted(total, key=lambda name: -total[name])[:6], SERIES))
    for place, parts in enumerate(bars.values()):
        left = 0.0
        for name in sorted(parts, key=lambda name: -total[name]):
            ax.barh(place, parts[name], left=left, height=0.62, color=colours.get(name, SERIES[6]), alpha=0.75)
            left += parts[name]
    ax.set_yticks(range(len(bars)), list(bars))
    ax.invert_yaxis()
    handles = [Patch(color=colour, alpha=0.75) for colour in [*colours.values(), SERIES[6]]]
    figure.legend(handles, [*colours, "other"], loc="outside lower center", ncols=4)
    return ax


def draw_bytes(runs: list[Run], figure: Any) -> None:
    ax = draw_bars(figure, {run.name: {name: n / 1e6 for name, n in bytes_by_family(run).items()} for run in runs})
    cap = max((run.last("verdict").get("cap_bytes", 0) for run in runs), default=0) / 1e6
    ax.axvline(cap, color=INK, lw=1.5)
    ax.set(xlabel=f"million bytes; the line is the cap of {cap:g}")


def draw_clock(runs: list[Run], figure: Any) -> None:
    names = {"train": "training", "eval": "evaluation", "none": "neither"}
    ax = draw_bars(figure, {f"{run.name}\n{names[budget]}": phases for run in runs
                            for budget, phases in clock(run).items()})
    marks = [limits(run).get(budget, math.inf) for run in runs for budget in names]
    for place, limit in enumerate(marks):
        if math.isfinite(limit):
            ax.plot([limit, limit], [place - 0.42, place + 0.42], color=INK, lw=2)
    ax.set(xlabel="seconds; the marks are the budgets")


# -- tables ---------------------------------------------------------------------------------------------


def rows_runs(runs: list[Run]) -> list[list[Any]]:
    table: list[list[Any]] = [["run", "val_bpb", "val_loss", "bytes", "steps", "train s", "eval s", "other s", "seed",
                               "machine", "code"]]
    for run in runs:
        v, start = run.last("verdict"), run.last("start")
        table.append([run.name, v.get("val_bpb", "unfinished"), v.get("val_loss"), v.get("artifact_bytes"),
                      v.get("steps"), v.get("train_seconds"), v.get("eval_seconds"), v.get("other_seconds"),
                      v.get("seed"), f"{start.get('world', '?')}x {start.get('device', '?')}",
                      start.get("code_sha256", "")[:8]])
    return table


def rows_loss(runs: list[Run]) -> list[list[Any]]:
    return [["run", "step", "seconds", "million tokens", "loss, nats"]] + [
        [run.name, e["step"], e["train_seconds"], trained_tokens(run, e["step"]), e["loss_nats"]]
        for run in runs for e in run.all("train")]


def rows_bpb(runs: list[Run]) -> list[list[Any]]:
    return [["run", "what", "seconds", "val_loss", "val_bpb"]] + [
        [run.name, e.get("name", f"step {e.get('step')}, live weights"), e["seconds"], e["val_loss"], e["val_bpb"]]
        for run in runs for e in run.events if e["event"] in ("val_probe", "score")]


def rows_lr(runs: list[Run]) -> list[list[Any]]:
    return [["run", "step", "used fraction", "planned", "real"]] + [
        [run.name, e["step"], e["frac"], planned_lr(run.last("config"), e["frac"]), e["lr_scale"]]
        for run in runs for e in run.all("train")]


def rows_step(runs: list[Run]) -> list[list[Any]]:
    return [["run", "stage", "steps", "ms a step", "tokens a second"]] + [
        [run.name, stage, steps, ms, round(1000 * run.last("config")["train_batch_tokens"] / ms)]
        for run in runs for stage, (steps, ms) in step_times(run).items()]


def rows_place(runs: list[Run]) -> list[list[Any]]:
    return [["run", "by", "from", "val_bpb", "targets"]] + [
        [run.name, what, *row] for run in runs for what in ("position", "length") for row in bpb_by_place(run, what)]


def rows_ladder(runs: list[Run]) -> list[list[Any]]:
    table: list[list[Any]] = [["run", "score", "val_bpb", "to the one before"]]
    for run in runs:
        before = None
        for name, bpb in run.last("verdict").get("ladder", {}).items():
            table.append([run.name, name, bpb, None if before is None else f"{bpb - before:+.4f}"])
            before = bpb
    return table


def rows_bytes(runs: list[Run]) -> list[list[Any]]:
    return [["run", "tensors", "bytes", "share"]] + [
        [run.name, name, size, f"{100 * size / sum(bytes_by_family(run).values()):.1f} %"]
        for run in runs for name, size in bytes_by_family(run).items()]


def rows_clock(runs: list[Run]) -> list[list[Any]]:
    table: list[list[Any]] = [["run", "budget", "phase", "seconds"]]
    for run in runs:
        for budget, phases in clock(run).items():
            table += [[run.name, budget, name, seconds] for name, seconds in phases.items()]
            limit = limits(run).get(budget, math.inf)
            if phases:
                table.append([run.name, budget, f"sum, of {limit:g}" if math.isfinite(limit) else "sum",
                              round(sum(phases.values()), 3)])
    return table


SECTIONS = (
    Section("runs", "Runs", "", None, rows_runs),
    Section("loss", "Training loss", "Of single batches, so it is noisy; the axis leaves out the first steps.",
            draw_loss, rows_loss, 4.4),
    Section("bpb", "Bits a byte", "Validation while training (VAL_LOSS_EVERY), then every score of the artifact; the "
            "last one counts.", draw_bpb, rows_bpb, 4.4),
    Section("ladder", "The ladder", "The averaged weights, what rounding costs them, and what windows and adaptation "
            "give back.", draw_ladder, rows_ladder),
    Section("place", "By place", "The score that counts, by how far a target lies in its document and by how long the "
            "document is.", draw_place, rows_place, 4.4),
    Section("clock", "Where the time went", "Every phase is charged to training, to evaluation or to neither (set-up, "
            "compilation, diagnostics). Validation while training stands in training's bar, though it is not charged.",
            draw_clock, rows_clock, 3.4),
    Section("bytes", "Where the bytes went", "The artifact by kind of tensor, and the code.", draw_bytes, rows_bytes),
    Section("step", "Step time", "Between two log lines. Dotted: a new stage (recurrence, row length, rounding).",
            draw_step, rows_step),
    Section("lr", "Learning rate", "Dashed: as planned over the budget. Dots: as it was. Dots that end early are a run "
            "that ended before its schedule.", draw_lr, rows_lr),
)


# -- the page -------------------------------------------------------------------------------------------


def picture(section: Section, runs: list[Run]) -> str:
    """The section's picture as an SVG element in the page's colours."""
    import matplotlib
    from matplotlib.figure import Figure
    height = section.height + {"clock": 0.8, "bytes": 0.3}.get(section.id, 0.0) * max(0, len(runs) - 2)
    small = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
             "grid.color": LINE, "grid.linewidth": 0.5, "axes.edgecolor": LINE, "axes.axisbelow": True,
             "svg.fonttype": "none", "svg.hashsalt": section.id, "legend.frameon": False, "legend.fontsize": 7,
             **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)}
    with matplotlib.rc_context(small):
        figure = Figure(figsize=(5.2, height), layout="constrained")
        assert section.draw is not None
        section.draw(runs, figure)
        if len(runs) > 1 and section.id not in ("clock", "bytes"):
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


def table(rows: list[list[Any]]) -> str:
    """An HTML table; numbers keep seven digits."""
    def cell(value: Any) -> str:
        if value is None:
            return ""
        text = f"{value:.7g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        return html.escape(text)

    head, *body = rows
    lines = "".join("<tr>" + "".join(f"<td>{cell(c)}</td>" for c in row) + "</tr>\n" for row in body)
    return ("<div class=scroll><table><thead><tr>" + "".join(f"<th>{cell(c)}</th>" for c in head) +
            f"</tr></thead><tbody>{lines}</tbody></table></div>")


def page(runs: list[Run]) -> str:
    """The whole page."""
    parts = []
    for section in SECTIONS:
        rows = section.rows(runs)
        text = f"<p>{html.escape(section.text)}</p>" if section.text else ""
        if section.draw is None:
            body = table(rows)
        elif len(rows) > 1:
            body = f"{picture(section, runs)}<details><summary>Figures</summary>{table(rows)}</details>"
        else:
            body = "<p>The logs hold nothing of this.</p>"
        parts.append(f"<section id={section.id}><h2>{html.escape(section.title)}</h2>{text}{body}</section>")
    notes = [f"{run.name}: {text}" for run in runs for text in
             (run.last("verdict").get("illegal") and f"ILLEGAL: {run.last('verdict')['illegal']}",
              run.ended and f"ended in an error: {run.ended}") if text]
    names = ", ".join(run.name for run in runs)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(names)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><style>{STYLE}</style></head>\n<body>'
            f"<h1>{html.escape(names)}</h1>\n" + "".join(f"<p class=bad>{html.escape(note)}</p>" for note in notes) +
            "<main>\n" + "\n".join(parts) + "\n</main></body></html>\n")


def main(arguments: Sequence[str]) -> int:
    """Exit status 2 and one line if there is nothing to show."""
    try:
        names, given = split_options(arguments, ("OUT",))
        if not names or "--help" in names:
            print(__doc__)
            return 0 if "--help" in names else 2
        paths = [path for name in names for path in log_paths(name, log_folder())]
        ids = [path.stem if [p.stem for p in paths].count(path.stem) == 1 else str(path) for path in paths]
        runs = [Run(name, events(path)) for name, path in zip(ids, paths)]
        for path, run in zip(paths, runs):
            if not run.last("config"):
                raise InputError(f"{path}: no log of a run (no config in it)")
        out = Path(given.get("OUT", "report.html"))
        out.write_text(readable(", ".join(ids), page, runs), encoding="utf-8")
        print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {out.stat().st_size:,} bytes; open it in a browser")
        return 0
    except (InputError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
