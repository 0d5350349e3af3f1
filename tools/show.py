"""Prints the short table of a finished run: the ladder of scores, the artifact's bytes, the seconds of each phase.

    python records/summary.py [RUN]        RUN: run id, or path of a log; default: the newest in LOG_DIR (logs)

Reads only what the run logged and the manifest of its dataset; computes nothing anew.
"""
from __future__ import annotations

import sys
from pathlib import Path

from tools.logs import InputError, events, find_log, last, log_folder

RUNGS = {"ema": "averaged weights, before quantization", "quantized": "from the artifact, plain",
         "sliding": "from the artifact, sliding windows", "plain": "from the artifact, plain",
         "lora": "documents' own adapters learn from what is scored", "sgd": "the model learns from what is scored"}


def table(path: Path) -> str:
    """The table of one run. Raises `InputError` if the run has no verdict."""
    found = events(path)
    verdict = last(found, "verdict")
    if verdict is None:
        raise InputError(f"{path}: the run has no verdict (unfinished, or it failed); see {path.with_suffix('.txt')}")
    rows = [("val_bpb", "")]
    for rung, bpb in verdict["ladder"].items():
        name, *tilt = rung.split("+")
        rows.append((f"  {rung}", f"{bpb:.4f}   {RUNGS.get(name, name)}{', n-gram tilt' if tilt else ''}"))
    if verdict.get("illegal"):
        rows.append(("ILLEGAL", verdict["illegal"]))
    compressors = (last(found, "val_data") or {}).get("compressors") or {}
    for name, need in compressors.items():
        rows.append((f"  {name}", f"{need['bits_per_byte']:.4f}   the same validation text, {need['bytes']:,} bytes"))
    if compressors:
        best = min(compressors, key=lambda name: compressors[name]["bits_per_byte"])
        margin = compressors[best]["bits_per_byte"] - verdict["val_bpb"]
        rows.append(("  margin", f"{margin:+.4f}   over {best} (positive: the model needs fewer bits)"))
    if {"ema", "quantized"} <= set(verdict["ladder"]):
        cost = verdict["ladder"]["quantized"] - verdict["ladder"]["ema"]
        rows.append(("  quantization", f"{cost:+.4f}   what the artifact's rounding costs"))
    rows += [("artifact", f"{verdict['artifact_bytes']:,} bytes of {verdict['cap_bytes']:,} "
                          f"({verdict['weight_bytes']:,} weights + {verdict['code_bytes']:,} code)"),
             ("model", f"{verdict['parameters']:,} parameters")]
    if "steps" in verdict:
        rows.append(("training", f"{verdict['steps']:,} steps, last loss {verdict['train_loss']:.3f} nats"))
    rows.append(("seconds", f"{verdict['total_seconds']:.0f} = {verdict['train_seconds']:.0f} training + "
                            f"{verdict['eval_seconds']:.0f} evaluation + {verdict['other_seconds']:.0f} other"))
    for phase in found:
        if phase["event"] == "phase" and phase["phase_seconds"] >= 1:
            rows.append((f"  {phase['name']}", f"{phase['phase_seconds']:.1f}"))
    rows.append(("log", str(path.with_suffix(".txt"))))
    return "\n".join(f"{name:16s} {value}".rstrip() for name, value in rows)


def main(arguments: list[str]) -> int:
    """Exit status 2 and one line if there is nothing to show."""
    try:
        if set(arguments) & {"-h", "--help"}:
            print(__doc__)
            return 0
        if len(arguments) > 1:
            raise InputError(f"expected one run, got {len(arguments)}; ./run.sh compare and report take several")
        folder = log_folder()
        logs = [find_log(arguments[0], folder)] if arguments else \
            sorted(folder.glob("*.jsonl"), key=lambda p: p.stat().st_mtime)
        if not logs:
            raise InputError(f"{folder}/: no run yet; ./run.sh makes one")
        try:
            print(table(logs[-1]))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{logs[-1]}: not a log as known ({type(error).__name__}: {error})") from None
        return 0
    except (InputError, OSError) as error:
        print(f"summary.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
