"""Prints the short table of a finished run: its scores, the artifact's bytes, the seconds of each phase.

    python -m tools.show [RUN]        RUN: run id, or path of a log; default: the newest in LOG_DIR (logs)

Reads only what the run logged and the manifest of its dataset; computes nothing anew.
"""
from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.common import ToolError, program
from tools.logs import events, find_log, last, log_folder, readable

SCORES = {"ema": "averaged weights, before quantization", "quantized": "from the artifact, plain",
          "sliding": "from the artifact, sliding windows", "plain": "from the artifact, plain",
          "lora": "documents' own adapters learn from what is scored", "sgd": "the model learns from what is scored"}


class Stream(NamedTuple):
    """One stream of an artifact: tensors of one kind, packed together."""
    name: str
    size: int
    """Bytes."""
    values: int
    """0 where the log does not say."""

    @property
    def bits(self) -> float | None:
        """Bits a value."""
        return 8 * self.size / self.values if self.values else None


def streams(artifact: Mapping[str, Any]) -> list[Stream]:
    """Return the streams of an `artifact` event, and what else the file holds."""
    parts = [Stream(name.removeprefix("gptq:"), size, values) for name, (values, size) in artifact["streams"].items()]
    return [*parts, Stream("header", artifact["weight_bytes"] - sum(part.size for part in parts), 0)]


def table(path: Path) -> str:
    """Return the table of one run. Raises `ToolError` if the run has no verdict."""
    log = events(path)
    verdict, artifact = last(log, "verdict"), last(log, "artifact")
    if verdict is None:
        raise ToolError(f"{path}: the run has no verdict (unfinished, or it failed); see {path.with_suffix('.txt')}")
    scores, bpb = verdict["diagnostic_evals"], verdict["val_bpb"]
    rows = [("val_bpb", "")]
    for name, score in scores.items():
        way, plus, _ = name.partition("+")
        rows.append((f"  {name}", f"{score:.4f}   {SCORES.get(way, way)}{', n-gram tilt' if plus else ''}"))
    compressors = (last(log, "val_data") or {}).get("compressors") or {}
    for name, need in compressors.items():
        rows.append((f"  {name}", f"{need['bits_per_byte']:.4f}   the same validation text, {need['bytes']:,} bytes"))
    if compressors:
        best = min(compressors, key=lambda name: compressors[name]["bits_per_byte"])
        margin = compressors[best]["bits_per_byte"] - bpb
        rows.append(("  margin", f"{margin:+.4f}   over {best} (positive: the model needs fewer bits)"))
    if {"ema", "quantized"} <= set(scores):
        cost = scores["quantized"] - scores["ema"]
        rows.append(("  quantization", f"{cost:+.4f}   what the artifact's rounding costs"))
    rows.append(("artifact", f"{verdict['artifact_bytes']:,} bytes of {verdict['cap_bytes']:,} "
                             f"({verdict['weight_bytes']:,} weights + {verdict['code_bytes']:,} code)"))
    for stream in streams(artifact) if artifact else ():
        figures = f"   {stream.values:,} values, {stream.bits:.3f} bits each" if stream.bits else ""
        rows.append((f"  {stream.name}", f"{stream.size:,}{figures}"))
    rows.append(("model", f"{verdict['parameters']:,} parameters"))
    if "steps" in verdict:
        rows.append(("training", f"{verdict['steps']:,} steps, last loss {verdict['train_loss']:.3f} nats"))
    rows.append(("seconds", f"{verdict['total_seconds']:.0f} = {verdict['train_seconds']:.0f} training + "
                            f"{verdict['eval_seconds']:.0f} evaluation + {verdict['other_seconds']:.0f} other"))
    rows += [(f"  {e['name']}", f"{e['phase_seconds']:.1f}") for e in log
             if e["event"] == "phase" and e["phase_seconds"] >= 1]
    rows.append(("log", str(path.with_suffix(".txt"))))
    return "\n".join(f"{name:16s} {value}".rstrip() for name, value in rows)


def main(arguments: Sequence[str]) -> int:
    """Print the table of the run that is asked for, or of the newest."""
    if set(arguments) & {"-h", "--help"}:
        print(__doc__)
        return 0
    if len(arguments) > 1:
        raise ToolError(f"expected one run, got {len(arguments)}; ./run.sh compare and report take several")
    folder = log_folder()
    if arguments:
        path = find_log(arguments[0], folder)
    else:
        path = max(folder.glob("*.jsonl"), key=lambda p: p.stat().st_mtime, default=None)
        if path is None:
            raise ToolError(f"{folder}/: no run yet; ./run.sh makes one")
    print(readable(path, table, path))
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "show.py"))
