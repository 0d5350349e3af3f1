"""What runs have left, read without torch: logs by run id, glob or folder; scores and the knobs behind them.

Also what the tools of this folder share on the command line: KNOB=value, runs, names of files.
"""
from __future__ import annotations

import glob
import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DATA = frozenset("data_dir data_path tokenizer_path".split())
"""Knobs that say where the data lie."""
WRITTEN = frozenset("run_id log_dir artifact_dir resume checkpoint_every dist_timeout_seconds wandb "
                    "tensorboard".split())
"""Knobs that say what is written where and when."""
NO_RESULT = DATA | WRITTEN | {"eval_only"}
"""Knobs that are no part of a result: `train_gpt.NO_RESULT`, without torch."""
PRIVATE = NO_RESULT - DATA | {"seed", "threads"}
"""Knobs in which two runs of one configuration may differ; other data may be another text."""


class InputError(Exception):
    """Something that the user can repair; one line."""


class Scored(NamedTuple):
    """The score of one run."""
    name: str
    bpb: float
    """Bits per byte of the validation text."""
    bytes_per_token: float
    """Bytes of the validation text over its targets; nan where only the score is known."""
    knobs: dict[str, Any]
    """The configuration without PRIVATE, plus `code_sha256`; empty where unknown."""
    illegal: str
    log: Path | None
    """Where it was read, if from a run's own log."""


def event_of(line: str | bytes) -> dict[str, Any] | None:
    """The event of one line of a log; None for what is none, such as a line that a crash cut short."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def events(path: Path) -> list[dict[str, Any]]:
    """The events of one JSON-lines log."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [event for event in map(event_of, lines) if event is not None]


def last(found: Sequence[Mapping[str, Any]], event: str) -> Any:
    """The last event of that name, or None."""
    return next((e for e in reversed(found) if e["event"] == event), None)


def pairs(parts: Sequence[str]) -> dict[str, str]:
    """KNOB=value arguments. Raises `InputError` for anything else, and for a name twice."""
    found: dict[str, str] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise InputError(f"{part}: expected KNOB=value, such as SEED=42 (./run.sh knobs lists them)")
        if name in found:
            raise InputError(f"{part}: given twice; leave it out")
        found[name] = value
    return found


def typed(knobs: Mapping[str, str], others: Collection[str] = ("AUDIT",)) -> dict[str, str]:
    """KNOB=value arguments as environment, in which the trainer refuses what is no knob; `others` are not its own.

    It would ignore such a name elsewhere: any other program's variables may be in the environment.
    """
    return {**knobs, "KNOBS_TYPED": " ".join(sorted(set(knobs) - set(others)))}


def split_options(arguments: Sequence[str], known: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """(the others, NAME=value with a known name): the id of a sweep's run has an = in it, too."""
    options = [a for a in arguments if "=" in a and a.partition("=")[0] in known]
    return [a for a in arguments if a not in options], pairs(options)


def text_of(value: Any) -> str:
    """A knob's value in a log, as the environment has it."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def file_name(text: str) -> str:
    """A text as (part of) the name of a file: without folders, spaces, and what shells and globs read."""
    return re.sub(r"[^\w.+=-]", "_", text)[:120]


def log_folder(env: Mapping[str, str] = os.environ) -> Path:
    """Where runs are logged."""
    return Path(env.get("LOG_DIR") or "logs")


def log_paths(item: str, folder: Path) -> list[Path]:
    """JSON-lines logs that a path, folder, run id or glob of either stands for; also the path of a run's .txt or .bin.

    Raises `InputError` for none.
    """
    name = re.sub(r"\.(txt|bin)$", ".jsonl", item)
    places = [name, f"{name}.jsonl", str(folder / name), str(folder / f"{name}.jsonl")]
    for place in places:
        path = Path(place)
        found = [path] if path.is_file() else sorted(path.glob("*.jsonl")) if path.is_dir() else \
            [] if path.exists() else sorted(map(Path, glob.glob(place)))
        if found := [p for p in found if p.suffix == ".jsonl"]:
            return found
    raise InputError(f"{item}: no such log, run id or glob, here or in {folder}/; expected such as demo-*")


def find_log(item: str, folder: Path) -> Path:
    """The one log that a path or run id stands for. Raises `InputError` for none and for several."""
    found = log_paths(item, folder)
    if len(found) > 1:
        raise InputError(f"{item}: {len(found)} logs; expected one, such as {found[0]}")
    return found[0]


def scored_log(path: Path) -> Scored | None:
    """The score of one log; None if the run has no verdict (unfinished, or it failed)."""
    found = events(path)
    verdict, knobs = last(found, "verdict"), dict(last(found, "config") or {})
    if verdict is None:
        return None
    if started := last(found, "start"):
        knobs["code_sha256"] = started.get("code_sha256")
    try:
        return Scored(str(verdict.get("run_id") or path.stem), float(verdict["val_bpb"]),
                      verdict["bytes"] / verdict["tokens"],
                      {k: v for k, v in knobs.items() if k not in PRIVATE | {"seconds", "event"}},
                      str(verdict.get("illegal") or ""), path)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a log as known ({type(error).__name__}: {error})") from None


def scored_submission(path: Path) -> list[Scored]:
    """The seeds of a `submission.json`. Raises `InputError` where it has a mean alone."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        seeds = told.get("seed_results") or {}
        rows = list(seeds.items()) if isinstance(seeds, dict) else [(r.get("seed"), r) for r in seeds]
        found = []
        for seed, row in rows:
            prefix = "" if "val_bpb" in row else "ttt_"
            bpb, loss = float(row[f"{prefix}val_bpb"]), float(row.get(f"{prefix}val_loss", math.nan))
            found.append(Scored(f"seed {seed}", bpb, loss / (bpb * math.log(2)), {}, "", None))
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{path}: not a submission.json as known ({type(error).__name__}: {error}); give the scores "
                         f"themselves, such as A=1.0574,1.0573,1.0581") from None
    if not found:
        raise InputError(f"{path}: has no seed_results, and a mean has no spread; give the scores of its seeds "
                         f"themselves, such as A=1.0574,1.0573,1.0581")
    return found


def scored_group(text: str, folder: Path) -> tuple[list[Scored], list[Path]]:
    """(scores, logs without a verdict) of comma-separated logs, globs, run ids, submissions and numbers in bpb."""
    found: dict[str, Scored] = {}
    unfinished = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        submission = Path(item) / "submission.json" if Path(item).is_dir() else Path(item)
        try:
            number = float(item)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            found[f"{len(found)}: {item}"] = Scored(item, number, math.nan, {}, "", None)
        elif submission.is_file() and submission.suffix == ".json":
            found |= {f"{item} {one.name}": one for one in scored_submission(submission)}
        else:
            for path in log_paths(item, folder):
                one = scored_log(path)
                if one is None:
                    unfinished.append(path)
                else:
                    found[os.path.realpath(path)] = one
    if not found:
        raise InputError(f"{text}: none of its {len(unfinished)} logs has a verdict; a stopped run has no score")
    return list(found.values()), unfinished


def differing(runs: Sequence[Scored]) -> dict[str, list[Any]]:
    """Knobs (and code) in which runs differ, with their values; runs whose knobs are unknown are left out."""
    known = [run.knobs for run in runs if run.knobs]
    names = dict.fromkeys(name for knobs in known for name in knobs)
    values = {name: list(dict.fromkeys(json.dumps(knobs.get(name)) for knobs in known)) for name in names}
    return {name: [json.loads(v) for v in some] for name, some in values.items() if len(some) > 1}
