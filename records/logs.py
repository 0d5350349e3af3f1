"""What runs have left, read without torch: logs by run id, glob or folder; scores and the knobs behind them."""
from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from summary import events, last

PRIVATE = frozenset("seed run_id log_dir artifact_dir eval_only threads dist_timeout_seconds resume checkpoint_every "
                    "wandb tensorboard".split())
"""Knobs in which two runs of one configuration may differ."""


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


def log_paths(item: str, folder: Path) -> list[Path]:
    """JSON-lines logs that a path, folder, run id or glob of either stands for. Raises `InputError` for none."""
    places = [item, f"{item}.jsonl", str(folder / item), str(folder / f"{item}.jsonl")]
    for place in places:
        path = Path(place)
        found = [path] if path.is_file() else sorted(path.glob("*.jsonl")) if path.is_dir() else \
            [] if path.exists() else sorted(map(Path, glob.glob(place)))
        if found := [p for p in found if p.suffix == ".jsonl"]:
            return found
    raise InputError(f"{item}: no such log, run id or glob, here or in {folder}/; expected such as demo-*")


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
