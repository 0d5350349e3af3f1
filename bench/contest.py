"""Does a change make a better model? The base and its variants train on the same text with the same seeds, small.

    ./run.sh bench contest --data TRAIN.jsonl.gz --val VAL.jsonl.gz --tokenizer MODEL [--size small|large]
                           [--seeds 3] [--jobs 2] [--seconds S | --steps N] ["NAME: KNOB=value ..." ...]

Without --data the text is DATA_PATH's, or the demo's. A variant is a name, a colon and its knobs, such as
"wide: MODEL_DIM=208 MLP_MULT=3.5"; with --data, TOKENIZER_PATH=MODEL among them encodes the same documents anew. Every
run is one thread on a core of its own, and every budget is in seconds of that process's CPU time. Where cores share
parts, busy neighbours still slow a step: 0.32 s became 0.40 on a machine of two. So look at `s_step`, and ask
with --steps what a step teaches. Runs go seed by seed, and the table is shown after each: means, and differences from
the base taken seed by seed, with the standard error of their mean. `cut` counts the runs whose adaptation was stopped
by the evaluation's budget; `raw` is known of --steps alone.

The same command resumes: logs are LOG_DIR/contest/SIZE/*.jsonl, known by configuration and source as those of
./run.sh sweep. The table is written beside them, as text and as JSON (--out).
"""
from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.common import ROOT
from data import documents as docs
from data.prepare import Parser, number
from data.prepare import parser as data_parser
from data.text import prepare
from data.verify import load_tokenizer, write_json
from tools.common import ToolError, program
from tools.logs import log_folder, pairs, read_run
from tools.sweep import Sweep, conduct, identify
from train_gpt import file_sha256

CHILD = """
import os, runpy, sys, time
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(os.environ["CORE"])})
time.perf_counter = time.process_time  # the trainer's clock
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
"""What runs the trainer on one core, by the clock of its own CPU time."""
COMMON = dict(
    PRESET="demo", DEVICE="cpu", DTYPE="float32", EMA_DECAY="0.9", BIGRAM_BUCKETS="0", NGRAM_BASE_BETA="0",
    EVAL_STRIDE="64", BITS_PER_WEIGHT="9", DIAGNOSTIC_EVALS="ema,quantized,sliding", TTT="lora", TTT_CHUNK_SIZE="48",
    TTT_LORA_LR="0.01")
"""The demo's rates and schedule without what only a small text rewards: no bigram table, no hints. The cap binds. The
average is short, for there are few steps: over 33 of 600 it lags by 0.009 bits; and the model knows little,
so that its adapters should learn faster."""
SIZES: dict[str, dict[str, str]] = {
    "small": dict(
        COMMON, NUM_LAYERS="4", MODEL_DIM="128", XSA_LAST_N="4", PARALLEL_START_LAYER="3", TRAIN_BATCH_TOKENS="1024",
        MAX_WALLCLOCK_SECONDS="120", GPTQ_RESERVE_SECONDS="9", EVAL_SECONDS_BUDGET="75", ARTIFACT_BYTES_CAP="420000"),
    "large": dict(
        COMMON, NUM_LAYERS="6", MODEL_DIM="192", NUM_HEADS="6", NUM_KV_HEADS="3", XSA_LAST_N="6",
        PARALLEL_START_LAYER="4", TRAIN_BATCH_TOKENS="2048", MICRO_BATCH_TOKENS="2048", MAX_WALLCLOCK_SECONDS="480",
        GPTQ_RESERVE_SECONDS="28", EVAL_SECONDS_BUDGET="250", ARTIFACT_BYTES_CAP="1154148")}
VAL_BYTES = {"small": 100_000, "large": 180_000}
"""UTF-8 bytes of the first validation documents that are scored."""
SCORES = ("raw", "ema", "quantized", "sliding", "adapted")
FIGURES = ("steps", "s_step", *SCORES, "bytes", "cut")


def variant_of(text: str) -> tuple[str, dict[str, str]]:
    """Name and knobs of a variant. Raises `ToolError`.

    >>> variant_of("wide: MODEL_DIM=208 MLP_MULT=3.5")
    ('wide', {'MODEL_DIM': '208', 'MLP_MULT': '3.5'})
    """
    name, colon, rest = text.partition(":")
    knobs = pairs(rest.split())
    if not (colon and knobs and re.fullmatch(r"[\w.+-]+", name)) or name == "base" or "SEED" in knobs:
        raise ToolError(f"{text}: expected a name that is not base, a colon and knobs other than SEED, such as "
                        f"'wide: MODEL_DIM=208 MLP_MULT=3.5'")
    return name, knobs


def dataset(train: Path, val: Path, tokenizer: Path, val_bytes: int, home: Path, make: bool) -> dict[str, str]:
    """Knobs of these documents in these pieces, of validation the first `val_bytes`; encoded once, when asked to."""
    said = json.dumps([*map(file_sha256, (train, val, tokenizer)), val_bytes])
    vocab_size = load_tokenizer(tokenizer).vocab_size()
    out = home / "data" / hashlib.sha256(said.encode()).hexdigest()[:10]
    target = out / "datasets" / f"text_sp{vocab_size}"
    if make and not (target / "manifest.json").exists():
        texts = [text for _, text in docs.read_documents(docs.input_files([val]), "text")]
        starts = itertools.accumulate((len(text.encode()) for text in texts), initial=0)
        with tempfile.TemporaryDirectory() as folder:
            first = Path(folder) / "val.jsonl"
            first.write_text("".join(json.dumps({"text": text}) + "\n"
                                     for text, start in zip(texts, starts) if start < val_bytes))
            prepare(data_parser().parse_args(
                ["text", str(train), "--val-files", str(first), "--tokenizer", str(tokenizer), "--name", "text",
                 "--out", str(out), "--workers", "1"]))
    return {"DATA_PATH": str(target), "TOKENIZER_PATH": str(tokenizer), "VOCAB_SIZE": str(vocab_size)}


@functools.cache
def figures(log: Path) -> dict[str, Any]:
    """What is compared of one finished run."""
    run = read_run(log)
    verdict, probe, steps = run.last("verdict"), run.last("val_probe"), run.last("verdict")["steps"]
    return {"steps": steps, "s_step": run.last("train_end")["train_seconds"] / steps,
            "raw": probe["val_bpb"] if probe.get("step") == steps else None,
            **{name: verdict["diagnostic_evals"].get(name) for name in SCORES[1:4]}, "adapted": verdict["val_bpb"],
            "bytes": verdict["artifact_bytes"], "cut": len(run.all("adaptation_cut"))}


def paired(base: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]], score: str
           ) -> dict[str, Any] | None:
    """Mean of other - base over the seeds that both have, the standard error of that mean, and how many.

    >>> paired({1: {"ema": 2.0}, 2: {"ema": 2.5}, 3: {"ema": 2.5}}, {1: {"ema": 1.75}, 2: {"ema": 2.5}}, "ema")
    {'mean': -0.125, 'error': 0.125, 'n': 2}
    """
    both = [(base[seed][score], other[seed][score]) for seed in base if seed in other]
    apart = [new - old for old, new in both if old is not None and new is not None]
    error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else None
    return {"mean": statistics.fmean(apart), "error": error, "n": len(apart)} if apart else None


class Contest(Sweep):
    """A sweep whose table compares variants with the base; `out` gets the table and its figures."""
    out: Path

    def rows(self) -> list[dict[str, Any]]:
        """A row for each variant that has a finished run, the base first."""
        runs: dict[str, dict[int, dict[str, Any]]] = {state.job.group: {} for state in self.states}
        for state in self.states:
            if state.status == "done":
                runs[state.job.group][int(state.job.knobs["SEED"])] = figures(self.folder / f"{state.run_id}.jsonl")
        rows = []
        for name, of in runs.items():
            columns = {key: [run[key] for run in of.values() if run[key] is not None] for key in FIGURES}
            row = {key: statistics.fmean(values) if values else None for key, values in columns.items()}
            row |= {f"d_{key}": paired(runs["base"], of, key) for key in ("sliding", "adapted") if name != "base"}
            rows += [{"variant": name, "n": len(of), **row, "cut": sum(columns["cut"]), "runs": of}] * bool(of)
        return rows

    def table(self) -> Table:
        """The rows for people."""
        def text(key: str, value: Any) -> str:
            if isinstance(value, dict):
                error = "" if value["error"] is None else f" ±{value['error']:.4f}"
                return f"{value['mean']:+.4f}{error} n={value['n']}"
            return "-" if value is None else f"{value:.4f}" if key in (*SCORES, "s_step") else f"{value:,.0f}"

        table, keys = Table("variant", box=None, pad_edge=False), ("n", *FIGURES, "d_sliding", "d_adapted")
        for key in keys:
            table.add_column(key, justify="right", no_wrap=True)
        for row in self.rows():
            table.add_row(row["variant"], *(text(key, row.get(key)) for key in keys))
        return table

    def tell(self) -> Iterator[Any]:
        """A line for each change; once a run is done, the table, which is also written."""
        done = any(state.status == "done" for state in self.news)
        yield from super().tell()
        if done:
            knobs = {state.job.group: state.job.knobs for state in self.states}
            write_json(self.out, {"knobs": knobs, "rows": self.rows()})
            with self.out.with_suffix(".txt").open("w", encoding="utf-8") as file:
                Console(file=file, width=200).print(self.table())
            if any(state.status not in ("done", "failed") for state in self.states):  # the last one comes at the end
                yield self.table()


def main(arguments: Sequence[str], env: Mapping[str, str] = os.environ) -> int:
    """Exit status 0: all done, 1: some runs failed, 130: interrupted."""
    parser = Parser(prog="./run.sh bench contest", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("variants", nargs="*", metavar='"NAME: KNOB=value ..."', help="a variant of the base")
    add("--size", choices=list(SIZES), default="small", help="%(default)s")
    add("--seeds", type=number(int, 1), default=3, help="1 to so many (%(default)s)")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
    add("--jobs", type=number(int, 1, len(cores)), default=min(2, len(cores)), help="runs at a time (%(default)s)")
    add("--data", type=Path, help="training documents: a file that ./run.sh data text takes")
    add("--val", type=Path, help="validation documents")
    add("--tokenizer", type=Path, help="SentencePiece model")
    add("--seconds", type=number(float, 0.001), help="CPU time of training with GPTQ (by the size)")
    add("--steps", type=number(int, 1), help="train so many steps instead")
    add("--out", type=Path, help="JSON of the table (LOG_DIR/contest/SIZE.json)")
    asked = parser.parse_args(arguments)
    docs.require(len({asked.data is None, asked.val is None, asked.tokenizer is None}) == 1,
                 "--data, --val and --tokenizer: expected all of them, or none for DATA_PATH's text")
    home, base = log_folder(env).absolute() / "contest", dict(SIZES[asked.size])
    if asked.seconds:
        base["MAX_WALLCLOCK_SECONDS"] = str(asked.seconds)
    if asked.steps:
        base |= {"MAX_WALLCLOCK_SECONDS": "0", "ITERATIONS": str(asked.steps), "VAL_LOSS_EVERY": str(asked.steps)}
    variants = {"base": {}, **(named := dict(map(variant_of, asked.variants)))}
    docs.require(len(named) == len(asked.variants), "two variants have one name; give each its own")

    def data(name: str, make: bool) -> dict[str, str]:
        """The knobs of a variant's dataset; none without --data."""
        tokenizer = Path(variants[name].get("TOKENIZER_PATH", asked.tokenizer or "")).absolute()
        return dataset(asked.data, asked.val, tokenizer, VAL_BYTES[asked.size], home, make) if asked.data else {}

    order = [(name, str(seed)) for seed in range(1, asked.seeds + 1) for name in variants]
    below = {name: {**base, **data(name, make=False)} for name in variants}
    child_env = {**env, "OMP_NUM_THREADS": "1"}
    jobs = identify([({**variants[name], "SEED": seed}, below[name]) for name, seed in order], child_env, 0)
    jobs = [job._replace(label=f"{name} SEED={seed}") for job, (name, seed) in zip(jobs, order)]
    for name in variants:  # all are valid: now something is spent
        data(name, make=True)
    contest = Contest(jobs, home / asked.size, [{"CORE": str(core)} for core in cores[:asked.jobs]],
                      [sys.executable, "-c", CHILD, str(ROOT / "train_gpt.py")], child_env)
    contest.out = asked.out or home / f"{asked.size}.json"
    return conduct(contest, Console(width=None if sys.stdout.isatty() else 200))


if __name__ == "__main__":
    sys.exit(program(main, "contest", __doc__))
