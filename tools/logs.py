"""What runs have left, read without torch: logs by run id, glob or folder; scores and the knobs behind them.

Also what the tools share on the command line: KNOB=value arguments, runs, names of files.
"""
from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.common import ToolError

DATA = frozenset("data_dir data_path tokenizer_path".split())
"""Knobs that say where the data lie."""
WRITTEN = frozenset("run_id log_dir resume checkpoint_every dist_timeout_seconds".split())
"""Knobs that say what is written where and when."""
NO_RESULT = DATA | WRITTEN | {"eval_only"}
"""Knobs that change no result: `train_gpt.NO_RESULT`, without torch."""
PRIVATE = NO_RESULT - DATA | {"seed"}
"""Knobs in which two runs of one configuration may differ; other data may be another text."""


def refuse_constant(name: str) -> None:
    """Raise `ValueError`: NaN and Infinity are no JSON, and no log of the trainer's has them."""
    raise ValueError(name)


DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def event_of(line: str) -> dict[str, Any] | None:
    """Return the event of one line of a log; None for what is none, such as a line that a crash cut short."""
    try:
        event = DECODER.decode(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def events(path: Path, *without: str) -> list[dict[str, Any]]:
    """Return the events of one JSON-lines log. Which lines are damaged is said on stderr, once for each file.

    A last line without its end is not damaged: the run goes on, or a crash cut it. Lines that begin as the trainer's
    events named in `without` do are not looked at: those of training take longer to read than all the rest.
    """
    *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    named = re.compile(f'"event": "({"|".join(without)})"')
    found, damaged = [], []
    for number, line in enumerate(lines, 1):
        if without and named.search(line, 0, 60):
            continue
        if (event := event_of(line)) is not None:
            found.append(event)
        elif line.strip():
            damaged.append(str(number))
    if damaged and path not in COMPLAINED:
        COMPLAINED.add(path)
        print(f"{path}: left out, damaged: line{'s' * (len(damaged) > 1)} {cut(', '.join(damaged), 60)}",
              file=sys.stderr)
    end = event_of(rest)
    return found if end is None else [*found, end]


COMPLAINED: set[Path] = set()
"""Logs of whose damaged lines the user has heard."""


def last(log: Sequence[Mapping[str, Any]], event: str) -> Any:
    """Return the last event of that name, or None."""
    return next((e for e in reversed(log) if e["event"] == event), None)


def readable(what: object, look: Callable[..., Any], *arguments: Any) -> Any:
    """Return look(*arguments) on a stranger's file; raise `ToolError` where its contents are of another kind."""
    try:
        return look(*arguments)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ToolError(f"{what}: cannot be read: {type(error).__name__}: {error}") from error


class Run(NamedTuple):
    """The log of one run, also of one that goes on or has failed."""
    path: Path
    events: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """Its run id, as its files are called."""
        return self.path.stem

    def all(self, *names: str) -> list[dict[str, Any]]:
        """Return every event of these names."""
        return [e for e in self.events if e["event"] in names]

    def last(self, event: str) -> dict[str, Any]:
        """Return the last event of that name; empty if there is none."""
        return last(self.events, event) or {}

    @property
    def knobs(self) -> dict[str, Any]:
        """The configuration but for WRITTEN, plus `code_sha256`; empty where the log has none."""
        knobs = {k: v for k, v in self.last("config").items() if k not in WRITTEN | {"seconds", "event"}}
        if self.last("start"):
            knobs["code_sha256"] = self.last("start").get("code_sha256")
        return knobs

    @property
    def error(self) -> str:
        """The error that the run ended in; empty: in none, or it went on after it."""
        end = next((e for e in reversed(self.events) if e["event"] in ("error", "start")), {})
        return str(end.get("text") or end.get("kind") or "") if end.get("event") == "error" else ""

    @property
    def status(self) -> str:
        """Whether it is done, has failed, or is unfinished: it goes on, or was killed."""
        return "done" if self.last("verdict") else "failed" if self.error else "unfinished"


def read_run(path: Path, *without: str) -> Run:
    """Read the log of one run, `without` as in `events`."""
    return Run(path, events(path, *without))


# -- the command line ------------------------------------------------------------------------------------


def pairs(arguments: Sequence[str]) -> dict[str, str]:
    """Read KNOB=value arguments. Raises `ToolError` for anything else, and for a name twice."""
    values: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise ToolError(f"{argument}: expected KNOB=value, such as SEED=42 (./run.sh knobs lists them)")
        if name in values:
            raise ToolError(f"{argument}: given twice; leave it out")
        values[name] = value
    return values


def split_options(arguments: Sequence[str], names: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """Split arguments into (others, NAME=value with one of `names`): the id of a sweep's run has an = in it, too."""
    options = [a for a in arguments if "=" in a and a.partition("=")[0] in names]
    return [a for a in arguments if a not in options], pairs(options)


def cut(text: str, width: int) -> str:
    """Return a text that is at most so many characters wide; an ellipsis stands for what was cut off."""
    return text if len(text) <= width else text[:max(0, width - 1)].rstrip() + "…"


def file_name(text: str) -> str:
    """Return a text as (part of) a file's name: without folders, spaces, and what shells and globs read."""
    return re.sub(r"[^\w.+=-]", "_", text)[:120]


def log_folder(env: Mapping[str, str] = os.environ) -> Path:
    """Return the folder in which runs are logged."""
    return Path(env.get("LOG_DIR") or "logs")


def logs_in(folder: Path) -> list[Path]:
    """Return the logs in a folder by name; none where it is missing. Raises `OSError` where it cannot be read."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(folder / e.name for e in os.scandir(folder) if e.name.endswith(".jsonl") and not e.is_dir())
    return []


def log_paths(item: str, folder: Path) -> list[Path]:
    """Return the JSON-lines logs that a path, folder, run id or glob stands for, or a run's .txt or .bin.

    Raises `ToolError` where there is none.
    """
    name = re.sub(r"\.(txt|bin)$", ".jsonl", item)
    for place in (name, f"{name}.jsonl", str(folder / name), str(folder / f"{name}.jsonl")) if item else ():
        path = Path(place)
        if path.is_dir():
            paths = logs_in(path)
        elif path.exists():
            paths = [path]
        else:
            paths = sorted(map(Path, glob.glob(place)))
        logs = [p for p in paths if p.suffix == ".jsonl"]
        if logs:
            return logs
    raise ToolError(f"{item or repr(item)}: no such log, run id or glob, here or in {folder}/; expected such as demo-*")


def find_log(item: str, folder: Path) -> Path:
    """Return the one log that a path or run id stands for. Raises `ToolError` for none and for several."""
    paths = log_paths(item, folder)
    if len(paths) > 1:
        raise ToolError(f"{item}: {len(paths)} logs; expected one, such as {paths[0]}")
    return paths[0]


# -- scores ----------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """The score of one run."""
    name: str
    bpb: float
    """Bits per byte of the validation text."""
    bytes_per_token: float = math.nan
    """Bytes of the validation text over its targets; nan where only the score is known."""
    knobs: Mapping[str, Any] = {}
    """The configuration without PRIVATE, plus `code_sha256`; empty where unknown."""
    log: Path | None = None
    """Where it was read, if from a run's own log."""


def scored_log(path: Path) -> Scored | None:
    """Read the score of one log; None if the run has no verdict (unfinished, or it failed)."""
    run = read_run(path)
    verdict = run.last("verdict")
    if not verdict:
        return None
    knobs = {k: v for k, v in run.knobs.items() if k not in PRIVATE}
    return readable(path, lambda: Scored(str(verdict.get("run_id") or path.stem), float(verdict["val_bpb"]),
                                         verdict["bytes"] / verdict["tokens"], knobs, path))


def scored_submission(path: Path) -> list[Scored]:
    """Read the seeds of a `submission.json`. Raises `ToolError` where it has a mean alone."""
    def seeds() -> list[Scored]:
        results = json.loads(path.read_text(encoding="utf-8")).get("seed_results") or {}
        rows = results.items() if isinstance(results, dict) else [(row.get("seed"), row) for row in results]
        scores = []
        for seed, row in rows:
            prefix = "" if "val_bpb" in row else "ttt_"
            bpb, loss = float(row[f"{prefix}val_bpb"]), float(row.get(f"{prefix}val_loss", math.nan))
            scores.append(Scored(f"seed {seed}", bpb, loss / (bpb * math.log(2))))
        return scores

    scores = readable(path, seeds)
    if not scores:
        raise ToolError(f"{path}: has no seed_results, and a mean has no spread; give the scores of its seeds "
                        f"themselves, such as A=1.0574,1.0573,1.0581")
    return scores


def scored_group(text: str, folder: Path) -> tuple[list[Scored], list[Path]]:
    """Read (scores, logs without a verdict) of comma-separated logs, globs, run ids, submissions and scores in bpb."""
    scores: dict[str, Scored] = {}
    unfinished = []
    for item in (part.strip() for part in text.split(",")):
        submission = Path(item) / "submission.json" if item and Path(item).is_dir() else Path(item)
        number = re.fullmatch(r"\d+\.?\d*|\.\d+", item)
        if number and not (folder / f"{item}.jsonl").exists():
            if "." not in item or float(item) == 0:
                raise ToolError(f"{text}: {item} is no score; expected bits a byte, above 0 and with a decimal point, "
                                f"such as 1.0574,1.0573 for two runs")
            scores[f"{len(scores)}: {item}"] = Scored(item, float(item))
        elif submission.is_file() and submission.suffix == ".json":
            scores.update((f"{item} {score.name}", score) for score in scored_submission(submission))
        else:
            for path in log_paths(item, folder):
                score = scored_log(path)
                if score is None:
                    unfinished.append(path)
                else:
                    scores[os.path.realpath(path)] = score  # a run that several items name counts once
    if not scores:
        raise ToolError(f"{text}: none of its {len(unfinished)} logs has a verdict; a stopped run has no score")
    return list(scores.values()), unfinished


def differing(runs: Sequence[Scored] | Sequence[Run]) -> dict[str, list[Any]]:
    """Return the knobs (and code) in which runs differ, with their values; runs of unknown knobs are left out."""
    configs = [knobs for run in runs if (knobs := run.knobs)]
    values = {name: list({json.dumps(knobs.get(name)): knobs.get(name) for knobs in configs}.values())
              for name in dict.fromkeys(name for knobs in configs for name in knobs)}
    return {name: distinct for name, distinct in values.items() if len(distinct) > 1}
