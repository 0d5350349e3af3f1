"""Draws lines and bars as SVG elements for an HTML page that has STYLE in it, in its light or dark colours."""
from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

COLOURS = 7
STYLE = """
:root { --page: #fcfcfb; --ink: #1d1f21; --faint: #63676b; --line: #d8dadb; --s0: #2166ac; --s1: #c4570a; --s2: #2b7a3d;
  --s3: #a23b8f; --s4: #7a6010; --s5: #5b4fc4; --s6: #5d6266; }
@media (prefers-color-scheme: dark) { :root { --page: #17191b; --ink: #e6e7e8; --faint: #9ba0a5; --line: #3b3f43;
  --s0: #6fb1f0; --s1: #f29a55; --s2: #6fcb83; --s3: #e08bd0; --s4: #d5b95a; --s5: #a9a0ff; --s6: #a8adb2; } }
svg { display: block; width: 100%; height: auto; } svg svg { overflow: hidden; }
text { font: 13px system-ui, sans-serif; fill: var(--faint); }
.grid { stroke: var(--line); } .mark { stroke: var(--ink); stroke-width: 1.5; }
.level { stroke: var(--faint); stroke-dasharray: 6 4; } circle, rect { fill: var(--c); }
.run { fill: none; stroke: var(--c); stroke-width: 1.5; stroke-linejoin: round; }
.pale { opacity: .3; } .again { stroke-dasharray: 5 3; }
.legend span { display: inline-block; margin-right: 1rem; }
.legend i { display: inline-block; width: .9em; height: .6em; margin-right: .4em; background: var(--c); }
""" + "".join(f".s{i} {{ --c: var(--s{i}); }}\n" for i in range(COLOURS))
WIDTH, LEFT, TOP, RIGHT = 480, 58, 22, 14
"""Units of a picture and of the margins of its axes; letters are 13 units high, so that they can be read on a phone."""
Points = list[tuple[float, float]]


class Bar(NamedTuple):
    """A horizontal bar of parts, one behind the other."""
    name: str
    parts: Mapping[str, float]
    most: float
    """Where it has a mark; infinite: nowhere."""


class Scale(NamedTuple):
    """One axis."""
    low: float
    high: float
    marks: list[tuple[float, str]]
    """Where a grid line is, and what it says."""


def scale(values: Sequence[float], zero: bool = False) -> Scale:
    """Return an axis for these values, with marks at round numbers; it begins at 0 if `zero`."""
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = 0.0 if zero else low - room, high + room
    step = 10.0 ** math.floor(math.log10((high - low) / 6))
    step *= next(n for n in (1, 2, 5, 10, 20) if (high - low) / (n * step) <= 6)
    marks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Scale(low, high, [(mark, f"{mark:.8g}") for mark in marks])


def words(x: float, y: float, anchor: str, text: str) -> str:
    """Return a text that starts, ends or has its middle at a place."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{html.escape(text)}</text>' if text else ""


class Axes(NamedTuple):
    """What turns values into places of a picture."""
    x: Scale
    y: Scale
    height: float = 180

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the place of a point inside the axes."""
        return (round((WIDTH - LEFT - RIGHT) * (x - self.x.low) / (self.x.high - self.x.low), 1),
                round(self.height * (self.y.high - y) / (self.y.high - self.y.low), 1))

    def line(self, points: Iterable[tuple[float, float]], style: str) -> str:
        """Return a line through points."""
        places = " ".join("{:g},{:g}".format(*self.at(*point)) for point in points)
        return f'<polyline class="{style}" points="{places}"/>'

    def svg(self, x: str, y: str, inside: str) -> str:
        """Return the picture: a grid with its marks, the axes' names, and what is drawn inside."""
        bottom = TOP + self.height
        grid = [self.line([(at, self.y.low), (at, self.y.high)], "grid") for at, _ in self.x.marks]
        grid += [self.line([(self.x.low, at), (self.x.high, at)], "grid") for at, _ in self.y.marks]
        texts = [words(LEFT + self.at(at, 0)[0], bottom + 16, "middle", text) for at, text in self.x.marks]
        texts += [words(LEFT - 6, TOP + self.at(0, at)[1] + 4, "end", text) for at, text in self.y.marks]
        texts += [words(WIDTH - RIGHT, bottom + 34, "end", x), words(2, 12, "start", y)]
        return (f'<svg role="img" aria-label="{html.escape(f"{y} by {x}")}" viewBox="0 0 {WIDTH} {bottom + 40:g}">'
                f'{"".join(texts)}<svg x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{self.height:g}">'
                f'{"".join(grid)}{inside}</svg></svg>\n')


def thinned(points: Points) -> Points:
    """Return at most some 800 points that look the same: the lowest and the highest of each few neighbours."""
    few = -(-len(points) // 400)
    if few <= 2:
        return points
    groups = [points[i:i + few] for i in range(0, len(points), few)]
    return [point for g in groups for point in sorted((min(g, key=lambda p: p[1]), max(g, key=lambda p: p[1])))]


def running_mean(points: Points) -> Points:
    """Return points of which each is the mean of those around it, a fiftieth of all."""
    half, count = len(points) // 100, len(points)
    sums = list(accumulate((y for _, y in points), initial=0.0))
    ends = [(max(0, i - half), min(count, i + half + 1)) for i in range(count)]
    return [(x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(points, ends)]


def style_of(number: int) -> str:
    """Return the CSS classes of a line's colour; from the eighth on, lines are dashed."""
    return f"s{number % COLOURS}" + " again" * (number >= COLOURS)


def legend(names: Sequence[str]) -> str:
    """Return names beside their colours."""
    return "<p class=legend>" + "".join(f'<span><i class="{style_of(i)}"></i>{html.escape(name)}</span>'
                                        for i, name in enumerate(names)) + "</p>\n"


def draw_lines(lines: Sequence[Sequence[tuple[Any, float]]], x: str, y: str, log2: bool = False, zero: bool = False,
               late: bool = False, levels: Mapping[str, float] = {}) -> str:
    """Return one pair of axes, named `x` and `y`, with lines; empty where there is no point.

    A line of more than 100 points is drawn pale, with its running mean. Points have x that rises, or texts for x, each
    with a place of its own. `log2`: x by its logarithm; `zero`: y begins at 0; `late`: y fits what comes after the
    first twentieth of x; `levels`: named values of y, each a line across.
    """
    names = list(dict.fromkeys(at for line in lines for at, _ in line if isinstance(at, str)))
    place = names.index if names else math.log2 if log2 else float
    placed = [[(float(place(at)), value) for at, value in line] for line in lines]
    xs = [at for line in placed for at, _ in line]
    if not xs:
        return ""
    across, begin = scale(xs), min(xs) + 0.05 * (max(xs) - min(xs)) * late
    if names or log2:
        marks = range(int(min(xs)), int(max(xs)) + 1, math.ceil((max(xs) - min(xs) + 1) / 8))
        across = Scale(min(xs) - 0.5, max(xs) + 0.5, [(k, names[k] if names else str(2 ** k)) for k in marks])
    axes = Axes(across, scale([*(v for line in placed for at, v in line if at >= begin), *levels.values()], zero))
    drawn = []
    for i, (name, value) in enumerate(levels.items()):
        side, anchor = ((across.high, "end"), (across.low, "start"))[i % 2]
        left, top = axes.at(side, value)
        drawn += [axes.line([(across.low, value), (across.high, value)], "level"), words(left, top - 4, anchor, name)]
    for i, line in enumerate(placed):
        if len(line) > 100:
            drawn.append(axes.line(thinned(line), f"run pale {style_of(i)}"))
            line = thinned(running_mean(line))
        else:
            drawn += ['<circle class="{}" cx="{}" cy="{}" r="2.5"/>'.format(style_of(i), *axes.at(*p)) for p in line]
        drawn.append(axes.line(line, f"run {style_of(i)}"))
    return axes.svg(x, y, "".join(drawn))


def draw_bars(bars: Sequence[Bar], unit: str) -> str:
    """Return bars below their legend; a part has one colour in all bars, the smallest share the last one."""
    total: dict[str, float] = defaultdict(float)
    for part, size in (item for bar in bars for item in bar.parts.items()):
        total[part] += size
    order = sorted(total, key=lambda part: -total[part])
    ends = [end for bar in bars for end in (sum(bar.parts.values()), bar.most) if math.isfinite(end)]
    axes, drawn = Axes(scale(ends, zero=True), Scale(len(bars), 0, []), 40.0 * len(bars)), []
    for row, bar in enumerate(bars):
        drawn.append(words(0, 40 * row + 14, "start", bar.name))
        size = 0.0
        for part in sorted(bar.parts, key=order.index):
            (left, top), (right, _) = axes.at(size, row + 0.45), axes.at(size + bar.parts[part], row)
            colour = min(order.index(part), COLOURS - 1)
            drawn.append(f'<rect class="s{colour}" x="{left}" y="{top}" width="{right - left:.1f}" height="18"/>')
            size += bar.parts[part]
        if math.isfinite(bar.most):
            drawn.append(axes.line([(bar.most, row + 0.4), (bar.most, row + 0.95)], "mark"))
    names = order if len(order) <= COLOURS else [*order[:COLOURS - 1], "other"]
    return legend(names) + axes.svg(unit, "", "".join(drawn))
