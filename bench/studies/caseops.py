"""Tokens per byte and bits per byte of plain text, CaseOps v1 and v2: tokenizers and small models of equal training.

    python -m bench.studies.caseops TRAIN.jsonl.gz VAL.jsonl.gz [STEPS [SEEDS]]     (default 200 3); VOCAB_SIZE
                                       (default 8192) and any other knob of train_gpt.py as environment variables

Every version's tokenizer is trained on all of TRAIN. Two comparisons: equal tokens (the same STEPS for every version,
so equal compute) and equal text (steps in proportion to tokens per byte, STEPS for plain text). All three divide by the
bytes of the original text. Within a comparison runs go seed by seed, so that what is interrupted is still balanced.
Its files stay in logs/caseops/; finished tokenizers and runs are not made again: remove the folder for other text.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

import train_gpt as tg
from bench.common import write_shard
from data import caseops
from data.documents import BOS_ID, input_files, read_documents, require
from data.text import TRAINING
from tools.common import program
from tools.logs import events, last

ROOT = Path(__file__).resolve().parents[2]

SHAPE = dict(PRESET="demo", VOCAB_SIZE="8192", NUM_LAYERS="2", MODEL_DIM="128", NUM_HEADS="2", NUM_KV_HEADS="1",
             PARALLEL_RESIDUAL="none", XSA_LAST_N="0", BIGRAM_BUCKETS="0", DIAGNOSTIC_EVALS="", EVAL_STRIDE="0",
             MAX_WALLCLOCK_SECONDS="0", GPTQ_CALIBRATION_BATCHES="1", TTT="none")
"""A model whose 200 steps take about a minute of one core; no adaptation, no tilt."""


def documents(path: Path) -> list[str]:
    """Texts of a .jsonl, .jsonl.gz, .parquet or .txt as `data text` cleans them. `ToolError` where there is none."""
    texts = [text for _, text in read_documents(input_files([path]), "text")]
    require(any(texts), f"{path}: holds no text")
    return texts


def build(name: str, train: list[str], val: list[str], knobs: dict[str, str], folder: Path) -> dict[str, float]:
    """Tokenizer, shards and side file of one version in `folder`; tokens per byte, and MB/s of one thread."""
    ops, vocab = caseops.TRANSFORMS[name], int(knobs["VOCAB_SIZE"])
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "tokenizer.model"
    if not model.exists():
        with model.with_suffix(".tmp").open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=map(ops.encode, train), model_writer=file, vocab_size=vocab, minloglevel=2,
                **{**TRAINING, **ops.training})
        model.with_suffix(".tmp").rename(model)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    num_bytes = {split: sum(len(text.encode()) for text in texts) for split, texts in (("train", train), ("val", val))}
    started = time.process_time()
    coded = [ops.encode(text) for text in val]
    encoded = time.process_time()
    for text in coded:
        sp.encode(text, return_type="numpy")
    tokenized = time.process_time()
    for text, code in zip(val, coded):
        if ops.decode(code) != text:
            raise AssertionError(f"{name}: {text[:40]!r}... does not come back")
    found = dict(pieces=sp.vocab_size(), encode_mb_per_s=num_bytes["val"] / 1e6 / max(encoded - started, 1e-9),
                 sentencepiece_mb_per_s=num_bytes["val"] / 1e6 / (tokenized - encoded))
    for split, texts in (("train", train), ("val", val)):
        parts = [ops.tokenize(sp, text) for text in texts]
        ids, sizes = (np.concatenate([np.append(np.uint16(first), part[k]) for part in parts])
                      for k, first in ((0, BOS_ID), (1, 0)))
        if sizes.sum(dtype=np.int64) != num_bytes[split]:
            raise AssertionError(f"{name}: {sizes.sum(dtype=np.int64)} bytes in the side file of {num_bytes[split]}")
        write_shard(folder / f"fineweb_{split}_000000.bin", ids.astype(np.uint16))
        write_shard(folder / f"fineweb_{split}_bytes_000000.bin", sizes.astype(np.uint16))
        found[f"{split}_tokens_per_byte"] = (len(ids) - len(texts)) / num_bytes[split]
    return found


def val_bpb(folder: Path, name: str, steps: int, seed: int, knobs: dict[str, str]) -> float:
    """Bits per byte of the artifact of one run. `ToolError` where it fails."""
    run_id = f"{name}-{steps}-{seed}"
    log = folder / f"{run_id}.jsonl"
    if not log.exists() or last(events(log), "verdict") is None:
        done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], stdout=subprocess.DEVNULL, env={
            **os.environ, **knobs, "DATA_PATH": str(folder / name), "CASEOPS_ENABLED": "1", "RUN_ID": run_id,
            "ITERATIONS": str(steps), "SEED": str(seed), "LOG_DIR": str(folder), "OMP_NUM_THREADS": "1"})
        require(done.returncode == 0, f"{run_id}: the run fails with status {done.returncode}, see above")
    return last(events(log), "verdict")["val_bpb"]


def main(arguments: Sequence[str]) -> int:
    """Tables, then one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.caseops", description=__doc__.split("\n\n")[0])
    parser.add_argument("train", type=Path, help="documents: .jsonl, .jsonl.gz, .parquet or .txt")
    parser.add_argument("val", type=Path, help="others")
    parser.add_argument("steps", nargs="?", type=int, default=200, help="default 200")
    parser.add_argument("seeds", nargs="?", type=int, default=3, help="default 3")
    asked = parser.parse_args(arguments)
    steps, seeds = asked.steps, asked.seeds
    require(min(steps, seeds) > 0, f"{steps} {seeds}: expected at least one step and one seed")
    names = {name.upper() for name in tg.kinds(tg.Config)}
    knobs = {**SHAPE, **{name: value for name, value in os.environ.items() if name in names}}
    tg.Config.from_env(knobs)
    train, val = documents(asked.train), documents(asked.val)
    folder = ROOT / "logs" / "caseops"
    found = {}
    for name in caseops.TRANSFORMS:
        found[name] = build(name, train, val, knobs, folder / name)
        print(f"{name:10}", " ".join(f"{key}={value:.4f}" for key, value in found[name].items()), flush=True)
    rate = {name: found[name]["train_tokens_per_byte"] for name in found}
    plans = {"tokens": {name: steps for name in found},
             "text": {name: round(steps * rate[name] / rate["none"]) for name in found}}
    scores: dict[str, dict[str, list[float]]] = {plan: {name: [] for name in found} for plan in plans}
    for plan, lengths in plans.items():
        for seed in range(1, seeds + 1):
            for name, length in lengths.items():
                scores[plan][name].append(val_bpb(folder, name, length, seed, knobs))
                print(f"seed {seed} equal {plan:6} {name:10} {length} steps: {scores[plan][name][-1]:.4f}", flush=True)
    for plan, of in scores.items():
        for name, values in of.items():
            print(f"equal {plan:6} {name:10} steps={plans[plan][name]} n={len(values)} mean={np.mean(values):.4f} "
                  f"min={min(values):.4f} max={max(values):.4f}")
    print(json.dumps(dict(versions=found, steps=plans, val_bpb=scores, knobs=knobs)))
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "caseops"))
