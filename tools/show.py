"""The short table of a finished run: how good the model is, how large, how long it took, and where to read on.

    python -m tools.show [RUN]        RUN: run id, or path of a log; default: the newest in LOG_DIR (logs)

Reads only what the run logged; computes nothing anew. `report` has the details.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence

from tools.common import ToolError, program
from tools.logs import Run, cut, find_log, log_folder, logs_in, read_run, readable

SCORES = {"ema": "trained weights, averaged over the last steps", "quantized": "the same weights, rounded and packed",
          "sliding": "packed weights, each target after a long context", "plain": "packed weights",
          "lora": "packed weights that learn while scoring a text",
          "sgd": "packed weights that learn from all that is scored"}
"""What each way to score is, in plain words."""


def score_in_words(name: str) -> str:
    """Say what a score is of: `lora+ngram` is `lora` with hints from n-grams."""
    way, plus, _ = name.partition("+")
    return SCORES.get(way, way) + " + n-grams" * bool(plus)


def compressors(run: Run) -> dict[str, float]:
    """Return the bits a byte that compressors need for the validation text, by their names."""
    return {name: need["bits_per_byte"] for name, need in (run.last("val_data").get("compressors") or {}).items()}


def margin(bpb: float, need: float) -> str:
    """Say how far a score lies from what a compressor needs for the same text, both in bits a byte.

    >>> margin(1.8, 2.0), margin(2.1, 2.0)
    ('10.0 % ahead of', '5.0 % behind')
    """
    share = 100 * (need - bpb) / need
    return f"{abs(share):.1f} % {'ahead of' if share >= 0 else 'behind'}"


def budget(seconds: float, most: float | None) -> str:
    """Say how many seconds a part took, and whether that was more than its budget; None or 0: it has none."""
    if not most:
        return f"{seconds:.1f} s, no budget"
    over = f": {seconds - most:.1f} s over the budget" * (seconds > most)
    return f"{seconds:.1f} s of {most:g}{over}"


def adaptation_cut(run: Run) -> str:
    """Say when adaptation first had no time left; empty: it always had. It may have had some again later."""
    work = run.last("adaptation_cut").get("work")
    return "" if work is None else f"first stopped after {100 * work:.0f} % of the work: too little time left"


def table(run: Run) -> str:
    """Return the table of one run. Raises `ToolError` if the run has no verdict."""
    verdict, config = run.last("verdict"), run.last("config")
    if not verdict:
        why = f"it failed: {cut(run.error, 300)}" if run.error else "it is unfinished, or was killed"
        raise ToolError(f"{run.path}: the run has no verdict: {why}; see {run.path.with_suffix('.txt')}")
    bpb, scores = verdict["val_bpb"], verdict["diagnostic_evals"]
    rows = [("score", f"{bpb:.4f}  bits for each byte of the validation text; lower is better")]
    rows += [(f"  {name}", f"{score:.4f}  {score_in_words(name)}") for name, score in scores.items()]
    if {"ema", "quantized"} <= scores.keys():
        rows.append(("  rounding", f"{scores['quantized'] - scores['ema']:+.4f} is what rounding the weights costs"))
    for name, need in compressors(run).items():
        rows.append((name, f"{need:.4f}  compressing the same text; the score is {margin(bpb, need)} it"))
    size, cap = verdict["artifact_bytes"], verdict["cap_bytes"]
    rows += [("artifact", f"{size:,} bytes with the code: {100 * size / cap:.1f} % of the {cap:,} allowed"),
             ("model", f"{verdict['parameters']:,} parameters")]
    if end := run.last("train_end"):
        speed = f", {end['tokens'] / end['train_seconds']:,.0f} tokens a second" if end["train_seconds"] else ""
        rows.append(("training", f"{end['steps']:,} steps{speed}, loss at the end {end['train_loss']:.3f} nats"))
    rows += [("time", f"{verdict['total_seconds']:.1f} s"),
             ("  training", budget(verdict["train_seconds"], config.get("max_wallclock_seconds"))),
             ("  scoring", budget(verdict["eval_seconds"], config.get("eval_seconds_budget"))),
             ("  neither", f"{verdict['other_seconds']:.1f} s for set-up, compiling, packing and the other scores")]
    if stopped := adaptation_cut(run):
        rows.append(("adaptation", stopped))
    if warnings := run.all("warning"):
        rows.append(("warnings", f"{len(warnings)}, the last: {warnings[-1]['text']}"))
    text = [cut(f"{name:13s} {value}", 80) for name, value in rows]
    log, page, packed = (run.path.with_suffix(suffix) for suffix in (".txt", ".html", ".bin"))
    files = {"log": log, "packed model": packed if packed.exists() else run.last("artifact").get("path"),
             "details": page if page.exists() else f"./run.sh report {run.name}"}
    return "\n".join([*text, *(f"{name:13s} {path}" for name, path in files.items() if path)])


def main(arguments: Sequence[str]) -> int:
    """Print the table of the run that is asked for, or of the newest."""
    if len(arguments) > 1:
        raise ToolError(f"expected one run, got {len(arguments)}; ./run.sh compare and report take several")
    folder = log_folder()
    if arguments:
        path = find_log(arguments[0], folder)
    else:
        path = max(logs_in(folder), key=lambda p: p.stat().st_mtime, default=None)
        if path is None:
            raise ToolError(f"{folder}/: no run yet; ./run.sh makes one")
    print(readable(path, table, read_run(path)))
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "show.py", __doc__))
