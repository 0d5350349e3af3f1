"""Is one group of runs better than another? Welch's t-test, and what the challenge's two rules say of it.

    python records/compare.py A B            or A=... B=...; each a comma-separated list of
        run ids, logs, globs or folders of logs     logs/base-*.jsonl   'sweep/*MATRIX_LR=0.026*'
        submission.json, or the folder that has one records/track_10min_16mb/2026-04-27_Name
        scores in bits per byte                     1.05740567,1.05730104,1.05807084

A is the older group, B the one that may be better; lower is better. `std` is the sample's (n - 1). The written rule
asks for a gain of at least 0.005 nats shown at p < 0.01, that is a test against A's mean less 0.005 nats; the practised
one for p < 0.25 against A's mean. nats are bits per byte * ln 2 * bytes a token of B's tokenizer. If A is a single
figure it is taken as exact, and Welch's test becomes the one-sample t-test. Exit status 0, or 2 where nothing can be
compared.
"""
from __future__ import annotations

import contextlib
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tools.logs import InputError, Scored, differing, log_folder, log_paths, scored_group, scored_log

WRITTEN_NATS, WRITTEN_P, PRACTISED_P = 0.005, 0.01, 0.25
"""The challenge's README: this gain at this p; and the p by which its maintainers chose the leaderboard's rows."""


class Welch(NamedTuple):
    """Welch's unequal-variances t-test of old against new (Welch 1947)."""
    t: float
    """(mean of old - mean of new) / standard error: positive where new is lower."""
    df: float
    """Degrees of freedom (Welch-Satterthwaite)."""
    p: float
    """One-sided: probability of such a t or a larger one if new is no lower than old."""


def welch(old: Sequence[float], new: Sequence[float], gain: float = 0.0) -> Welch:
    """Is the mean of `new` lower than that of `old` by more than `gain`? One value of `old` counts as exact.

    All nan where `new` has fewer than two values: then nothing is known of its spread.

    >>> [round(x, 4) for x in welch([1.05740567, 1.05730104, 1.05807084], [1.05662016, 1.05610947, 1.05679341])]
    [3.4262, 3.9011, 0.0138]
    """
    from scipy.special import stdtr
    if len(new) < 2 or not old:
        return Welch(math.nan, math.nan, math.nan)
    parts = [statistics.variance(x) / len(x) if len(x) > 1 else 0.0 for x in (old, new)]
    distance, total = statistics.fmean(old) - statistics.fmean(new) - gain, sum(parts)
    if total == 0:  # runs that repeat to the bit: any distance is certain
        return Welch(math.copysign(math.inf, distance) if distance else 0.0, math.inf,
                     0.5 if distance == 0 else float(distance < 0))
    df = total ** 2 / sum(v ** 2 / (len(x) - 1) for v, x in zip(parts, (old, new)) if v)
    t = distance / math.sqrt(total)
    return Welch(t, df, float(stdtr(df, -t)))


class Comparison(NamedTuple):
    """What `compare` finds of B against A; bits per byte unless named otherwise."""
    mean_a: float
    std_a: float
    """Of the sample, n - 1; nan for one run."""
    mean_b: float
    std_b: float
    delta: float
    """mean_b - mean_a: negative is better."""
    delta_nats: float
    """nan where no bytes a token are known."""
    bytes_per_token: float
    plain: Welch
    """B against A's mean."""
    margin: Welch
    """B against A's mean less 0.005 nats; nan where no bytes a token are known."""

    @property
    def written(self) -> bool:
        """Whether the written rule is met."""
        return self.margin.p < WRITTEN_P

    @property
    def practised(self) -> bool:
        """Whether the practised rule is met."""
        return self.plain.p < PRACTISED_P


def compare(a: Sequence[Scored], b: Sequence[Scored]) -> Comparison:
    """B against A. Bytes a token are the mean of B's runs, or of A's where B's are unknown."""
    def spread(x: Sequence[float]) -> float:
        return statistics.stdev(x) if len(x) > 1 else math.nan

    old, new = [run.bpb for run in a], [run.bpb for run in b]
    known = [[run.bytes_per_token for run in group if math.isfinite(run.bytes_per_token)] for group in (b, a)]
    per_token = next((statistics.fmean(some) for some in known if some), math.nan)
    bits = math.log(2) * per_token  # nats a token for each bit per byte
    gain = WRITTEN_NATS / bits
    delta = statistics.fmean(new) - statistics.fmean(old)
    margin = welch(old, new, gain) if math.isfinite(gain) else Welch(math.nan, math.nan, math.nan)
    return Comparison(statistics.fmean(old), spread(old), statistics.fmean(new), spread(new), delta, delta * bits,
                      per_token, welch(old, new), margin)


def tried(runs: Sequence[Scored]) -> str:
    """How many runs lie where these were read: those that were not chosen are what a p-value cannot see."""
    def has_score(path: Path) -> bool:
        with contextlib.suppress(InputError):  # a verdict that is none as known
            return scored_log(path) is not None
        return False

    folders = sorted({run.log.parent for run in runs if run.log})
    logs = [path for folder in folders for path in folder.glob("*.jsonl")]
    ended = sum(map(has_score, logs))
    unknown = sum(run.log is None for run in runs)
    parts = {f"{len(logs)} logs in {', '.join(map(str, folders))}, {ended} of them with a verdict": logs,
             f"unknown for the {unknown} scores that come without a log": unknown}
    return "; ".join(text for text, there in parts.items() if there)


def report(a: Sequence[Scored], b: Sequence[Scored], names: tuple[str, str] = ("A", "B")) -> str:
    """The comparison as text: groups, differences, test, verdicts, and what speaks against believing it."""
    found = compare(a, b)
    width = max(map(len, names))

    def number(x: float, form: str = ".4g", none: str = "-") -> str:
        return none if math.isnan(x) else format(x, form)

    def line(name: str, runs: Sequence[Scored], mean: float, std: float) -> str:
        return (f"{name:{width}s}  n={len(runs)}  mean {mean:.5f}  std {number(std, '.5f')}  "
                f"best {min(run.bpb for run in runs):.5f}")

    def test(label: str, w: Welch) -> str:
        return f"{label:22s} t = {number(w.t, '.2f')}  df = {number(w.df, '.2f')}  one-sided p = {number(w.p)}"

    def verdict(met: bool, w: Welch) -> str:
        return "cannot be said" if math.isnan(w.p) else "met" if met else "NOT met"

    lines = [line(names[0], a, found.mean_a, found.std_a), line(names[1], b, found.mean_b, found.std_b),
             f"{names[1]} - {names[0]} = {found.delta:+.5f} bpb = {number(found.delta_nats, '+.5f')} nats "
             f"(at {number(found.bytes_per_token, '.4f')} bytes a token)",
             test(f"against {names[0]}", found.plain), test(f"against {names[0]} - 0.005 nats", found.margin),
             f"written rule (0.005 nats at p < {WRITTEN_P}): {verdict(found.written, found.margin)}",
             f"practised rule (p < {PRACTISED_P}): {verdict(found.practised, found.plain)}",
             f"runs tried: {tried([*a, *b])}"]
    if len(b) < 2:
        lines.append(f"note: {names[1]} has one run, so nothing is known of its spread: run more seeds")
    if len(a) == 1:
        lines.append(f"note: {names[0]} is one figure and is taken as exact")
    if math.isnan(found.bytes_per_token):
        lines.append("note: numbers alone have no bytes a token, so no nats; give logs or a submission.json")
    known = [run.bytes_per_token for run in (*a, *b) if math.isfinite(run.bytes_per_token)]
    if known and max(known) > 1.0001 * min(known):
        lines.append(f"note: bytes a token range from {min(known):.4f} to {max(known):.4f}: other tokenizers or other "
                     f"text; bpb compare only on the same text")
    for name, runs in zip(names, (a, b)):
        if mixed := differing(runs):
            lines.append(f"WARNING: {name} mixes runs that differ in {', '.join(sorted(n.upper() for n in mixed))}")
        for run in runs:
            if run.illegal:
                lines.append(f"WARNING: {run.name} is illegal: {run.illegal}")
        if again := sorted({run.name for run in runs if sum(r.bpb == run.bpb for r in runs) > 1}):
            lines.append(f"WARNING: {', '.join(again)} in {name} have the very same score: repeats are no evidence")
    if {run.log for run in a if run.log} & {run.log for run in b if run.log}:
        lines.append("WARNING: the groups share runs")
    changed = {name: values for name, values in differing([*a, *b]).items()
               if name not in {*differing(a), *differing(b)}}
    if changed:
        lines.append("changed: " + ", ".join(f"{name.upper()} {old} -> {new}" for name, (old, new) in changed.items()))
    return "\n".join(lines)


def named(argument: str, default: str) -> tuple[str, str]:
    """(name, runs) of an argument NAME=runs or runs; a sweep's run ids and globs of them have an = in them, too."""
    with contextlib.suppress(InputError):
        return default, log_paths(argument.split(",")[0].strip(), log_folder()) and argument
    given = re.fullmatch(r"(\w+)=(.+)", argument)
    return given.groups() if given else (default, argument)


def main(arguments: Sequence[str]) -> int:
    """Exit status 0, or 2 with one line where nothing can be compared."""
    try:
        if set(arguments) & {"-h", "--help"}:
            print(__doc__)
            return 0
        if len(arguments) != 2:
            raise InputError(f"expected two groups of runs, got {len(arguments)}; such as ./run.sh compare "
                             f"'base-*' 'wider-*' or A=1.0576,1.0573 B=logs/mine-*.jsonl (quote globs)")
        names, groups = [], []
        for default, argument in zip("AB", arguments):
            name, text = named(argument, default)
            runs, unfinished = scored_group(text, log_folder())
            for path in unfinished:
                print(f"compare.py: {path}: left out, it has no verdict", file=sys.stderr)
            names.append(name)
            groups.append(runs)
        print(report(*groups, names=(names[0], names[1])))
        return 0
    except (InputError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
