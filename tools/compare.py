"""Is one group of runs better than another? Welch's t-test, and what the challenge's two rules say of it.

    python -m tools.compare A B              or A=... B=...; each a comma-separated list of
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.common import ToolError, program
from tools.logs import Scored, differing, log_folder, log_paths, logs_in, scored_group, scored_log

WRITTEN_NATS, WRITTEN_P, PRACTISED_P = 0.005, 0.01, 0.25
"""The challenge's README: this gain at this p; and the p by which its maintainers chose the leaderboard's rows."""


class Welch(NamedTuple):
    """Welch's unequal-variances t-test of old against new (Welch 1947); all nan where nothing can be said."""
    t: float = math.nan
    """(mean of old - mean of new) / standard error: positive where new is lower."""
    df: float = math.nan
    """Degrees of freedom (Welch-Satterthwaite)."""
    p: float = math.nan
    """One-sided: probability of such a t or a larger one if new is no lower than old."""

    def verdict(self, p: float) -> str:
        """Say whether a rule that asks for this p is met."""
        if math.isnan(self.p):
            return "cannot be said"
        return "met" if self.p < p else "NOT met"


def welch(old: Sequence[float], new: Sequence[float], gain: float = 0.0) -> Welch:
    """Test whether the mean of `new` is lower than that of `old` by more than `gain`. One value of `old` is exact.

    All nan where `new` has fewer than two values: then nothing is known of its spread.

    >>> [round(x, 4) for x in welch([1.05740567, 1.05730104, 1.05807084], [1.05662016, 1.05610947, 1.05679341])]
    [3.4262, 3.9011, 0.0138]
    """
    from scipy.special import stdtr
    if len(new) < 2 or not old or math.isnan(gain):
        return Welch()
    errors = [statistics.variance(x) / len(x) if len(x) > 1 else 0.0 for x in (old, new)]
    distance, total = statistics.fmean(old) - statistics.fmean(new) - gain, sum(errors)
    if total == 0:  # runs that repeat to the bit: any distance is certain
        if distance == 0:
            return Welch(0.0, math.inf, 0.5)
        return Welch(math.copysign(math.inf, distance), math.inf, float(distance < 0))
    df = total ** 2 / sum(error ** 2 / (len(x) - 1) for error, x in zip(errors, (old, new)) if error)
    t = distance / math.sqrt(total)
    return Welch(t, df, float(stdtr(df, -t)))


class Comparison(NamedTuple):
    """B against A; bits per byte unless named otherwise."""
    delta: float
    """Mean of B - mean of A: negative is better."""
    delta_nats: float
    """nan where no bytes a token are known."""
    bytes_per_token: float
    plain: Welch
    """B against A's mean."""
    margin: Welch
    """B against A's mean less 0.005 nats; nan where no bytes a token are known."""


def token_sizes(runs: Sequence[Scored]) -> list[float]:
    """Return the bytes a token of the runs where they are known."""
    return [run.bytes_per_token for run in runs if math.isfinite(run.bytes_per_token)]


def compare(a: Sequence[Scored], b: Sequence[Scored]) -> Comparison:
    """Compare B with A. Bytes a token are the mean of B's runs, or of A's where B's are unknown."""
    old, new = [run.bpb for run in a], [run.bpb for run in b]
    sizes = token_sizes(b) or token_sizes(a) or [math.nan]
    per_token = statistics.fmean(sizes)
    nats = math.log(2) * per_token  # a token, for each bit per byte
    delta = statistics.fmean(new) - statistics.fmean(old)
    return Comparison(delta, delta * nats, per_token, welch(old, new), welch(old, new, WRITTEN_NATS / nats))


def tried(runs: Sequence[Scored]) -> str:
    """Say how many runs lie where these were read: a p-value cannot see those that were not chosen."""
    def has_score(path: Path) -> bool:
        with contextlib.suppress(ToolError):  # a verdict of another kind
            return scored_log(path) is not None
        return False

    folders = sorted({run.log.parent for run in runs if run.log})
    logs = [path for folder in folders for path in logs_in(folder)]
    without = sum(run.log is None for run in runs)
    parts = []
    if logs:
        parts.append(f"{len(logs)} logs in {', '.join(map(str, folders))}, {sum(map(has_score, logs))} of them with a "
                     f"verdict")
    if without:
        parts.append(f"unknown for the {without} scores that come without a log")
    return "; ".join(parts)


def doubts(a: Sequence[Scored], b: Sequence[Scored], names: Sequence[str]) -> Iterator[str]:
    """Say what speaks against believing a comparison."""
    if len(b) < 2:
        yield f"note: {names[1]} has one run, so nothing is known of its spread: run more seeds"
    if len(a) == 1:
        yield f"note: {names[0]} is one figure and is taken as exact"
    sizes = token_sizes([*a, *b])
    if not sizes:
        yield "note: numbers alone have no bytes a token, so no nats; give logs or a submission.json"
    elif max(sizes) > 1.0001 * min(sizes):
        yield (f"note: bytes a token range from {min(sizes):.4f} to {max(sizes):.4f}: other tokenizers or other text; "
               f"bpb compare only on the same text")
    for name, runs in zip(names, (a, b)):
        mixed, scores = differing(runs), [run.bpb for run in runs]
        if mixed:
            yield f"WARNING: {name} mixes runs that differ in {', '.join(sorted(knob.upper() for knob in mixed))}"
        again = sorted({run.name for run in runs if scores.count(run.bpb) > 1})
        if again:
            yield f"WARNING: {', '.join(again)} in {name} have the very same score: repeats are no evidence"
    if {run.log for run in a if run.log} & {run.log for run in b}:
        yield "WARNING: the groups share runs"


def report(a: Sequence[Scored], b: Sequence[Scored], names: Sequence[str] = "AB") -> str:
    """Return the comparison as text: groups, differences, tests, verdicts, doubts, what was changed."""
    result, width = compare(a, b), max(map(len, names))

    def number(x: float, form: str) -> str:
        return "-" if math.isnan(x) else format(x, form)

    def group(name: str, runs: Sequence[Scored]) -> str:
        scores = [run.bpb for run in runs]
        std = statistics.stdev(scores) if len(scores) > 1 else math.nan
        return (f"{name:{width}s}  n={len(runs)}  mean {statistics.fmean(scores):.5f}  std {number(std, '.5f')}  "
                f"best {min(scores):.5f}")

    def test(label: str, w: Welch) -> str:
        return f"{label:22s} t = {number(w.t, '.2f')}  df = {number(w.df, '.2f')}  one-sided p = {number(w.p, '.4g')}"

    mixed = {*differing(a), *differing(b)}
    changed = [f"{name.upper()} {values[0]} -> {values[1]}" for name, values in differing([*a, *b]).items()
               if name not in mixed]
    return "\n".join([
        group(names[0], a), group(names[1], b),
        f"{names[1]} - {names[0]} = {result.delta:+.5f} bpb = {number(result.delta_nats, '+.5f')} nats (at "
        f"{number(result.bytes_per_token, '.4f')} bytes a token)",
        test(f"against {names[0]}", result.plain), test(f"against {names[0]} - 0.005 nats", result.margin),
        f"written rule (0.005 nats at p < {WRITTEN_P}): {result.margin.verdict(WRITTEN_P)}",
        f"practised rule (p < {PRACTISED_P}): {result.plain.verdict(PRACTISED_P)}",
        f"runs tried: {tried([*a, *b])}", *doubts(a, b, names),
        *([f"changed: {', '.join(changed)}"] if changed else [])])


def named(argument: str, default: str) -> tuple[str, str]:
    """Split NAME=runs; the ids of a sweep's runs and globs of them have an = in them, too."""
    with contextlib.suppress(ToolError):
        log_paths(argument.split(",")[0].strip(), log_folder())
        return default, argument
    name = re.fullmatch(r"(\w+)=(.+)", argument)
    return (name[1], name[2]) if name else (default, argument)


def main(arguments: Sequence[str]) -> int:
    """Print the comparison of two groups."""
    if len(arguments) != 2:
        raise ToolError(f"expected two groups of runs, got {len(arguments)}; such as ./run.sh compare 'base-*' "
                        f"'wider-*' or A=1.0576,1.0573 B=logs/mine-*.jsonl (quote globs)")
    names, groups = [], []
    for default, argument in zip("AB", arguments):
        name, text = named(argument, default)
        runs, unfinished = scored_group(text, log_folder())
        for path in unfinished:
            print(f"compare.py: {path}: left out, it has no verdict", file=sys.stderr)
        names.append(name)
        groups.append(runs)
    if names[0] == names[1]:
        raise ToolError(f"{names[0]}: both groups have this name; leave the names out, or give two")
    print(report(*groups, names=names))
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "compare.py", __doc__))
