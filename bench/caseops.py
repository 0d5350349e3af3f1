"""Tokens per byte and bits per byte of plain text, CaseOps v1 and v2: tokenizers and small models of equal training.

    ./run.sh bench caseops TRAIN.jsonl.gz VAL.jsonl.gz [STEPS [SEEDS]]     (default 200 3); VOCAB_SIZE (default 8192)
                                                     and any other knob of train_gpt.py as environment variables

Every version's tokenizer is trained on all of TRAIN. Two comparisons: equal tokens (the same STEPS for every version,
so equal compute) and equal text (steps in proportion to tokens per byte, STEPS for plain text). All three divide by the
bytes of the original text. Within a comparison runs go seed by seed, so that what is interrupted is still balanced.
Its files stay in logs/caseops/; finished tokenizers and runs are not made again: remove the folder for other text.
"""
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import caseops
import numpy as np
import sentencepiece
from documents import BOS, clean
from text import TRAINING

from bench.common import write_shard

SHAPE = dict(PRESET="demo", VOCAB_SIZE="8192", NUM_LAYERS="2", MODEL_DIM="128", NUM_HEADS="2", NUM_KV_HEADS="1",
             PARALLEL_RESIDUAL="none", XSA_LAST_N="0", BIGRAM_BUCKETS="0", EVAL_LADDER="", EVAL_STRIDE="0",
             MAX_WALLCLOCK_SECONDS="0", GPTQ_CALIBRATION_BATCHES="1", TTT="none", NGRAM_TILT_ENABLED="0", THREADS="1")
"""A model whose 200 steps take about a minute of one core; no adaptation, no tilt."""


def documents(path: str) -> list[str]:
    """Texts of a .jsonl.gz, as data/prepare.py cleans them."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [clean(json.loads(line)["text"]) for line in file]


def build(name: str, train: list[str], val: list[str], knobs: dict[str, str], folder: Path) -> dict[str, float]:
    """Tokenizer, shards and side file of one version in `folder`; tokens per byte, and MB/s of one thread."""
    ops, vocab = caseops.VERSIONS[name], int(knobs["VOCAB_SIZE"])
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
                      for k, first in ((0, BOS), (1, 0)))
        if sizes.sum(dtype=np.int64) != num_bytes[split]:
            raise AssertionError(f"{name}: {sizes.sum(dtype=np.int64)} bytes in the side file of {num_bytes[split]}")
        write_shard(folder / f"fineweb_{split}_000000.bin", ids.astype(np.uint16))
        write_shard(folder / f"fineweb_{split}_bytes_000000.bin", sizes.astype(np.uint16))
        found[f"{split}_tokens_per_byte"] = (len(ids) - len(texts)) / num_bytes[split]
    return found


def val_bpb(folder: Path, name: str, steps: int, seed: int, knobs: dict[str, str]) -> float:
    """Bits per byte of the artifact of one run."""
    run_id = f"{name}-{steps}-{seed}"
    log = folder / f"{run_id}.jsonl"
    if not log.exists() or '"verdict"' not in log.read_text():
        subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], check=True, stdout=subprocess.DEVNULL, env={
            **os.environ, **knobs, "DATA_PATH": str(folder / name), "CASEOPS_ENABLED": "1", "RUN_ID": run_id,
            "ITERATIONS": str(steps), "SEED": str(seed), "LOG_DIR": str(folder), "OMP_NUM_THREADS": "1"})
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return next(event["val_bpb"] for event in events if event.get("event") == "verdict")


def main() -> None:
    """Tables, then one line of JSON."""
    train, val = documents(sys.argv[1]), documents(sys.argv[2])
    steps, seeds = (int(a) for a in (*sys.argv[3:5], *("200", "3")[len(sys.argv[3:5]):]))
    knobs = {**SHAPE, **{name: value for name, value in os.environ.items() if name in trainer_knobs()}}
    folder = ROOT / "logs" / "caseops"
    found = {}
    for name in caseops.VERSIONS:
        found[name] = build(name, train, val, knobs, folder / name)
        print(f"{name:5}", " ".join(f"{key}={value:.4f}" for key, value in found[name].items()), flush=True)
    rate = {name: found[name]["train_tokens_per_byte"] for name in found}
    plans = {"tokens": {name: steps for name in found},
             "text": {name: round(steps * rate[name] / rate["none"]) for name in found}}
    scores: dict[str, dict[str, list[float]]] = {plan: {name: [] for name in found} for plan in plans}
    for plan, lengths in plans.items():
        for seed in range(1, seeds + 1):
            for name, length in lengths.items():
                scores[plan][name].append(val_bpb(folder, name, length, seed, knobs))
                print(f"seed {seed} equal {plan:6} {name:5} {length} steps: {scores[plan][name][-1]:.4f}", flush=True)
    for plan, of in scores.items():
        for name, values in of.items():
            print(f"equal {plan:6} {name:5} steps={plans[plan][name]} n={len(values)} mean={np.mean(values):.4f} "
                  f"min={min(values):.4f} max={max(values):.4f}")
    print(json.dumps(dict(versions=found, steps=plans, val_bpb=scores, knobs=knobs)))


def trainer_knobs() -> set[str]:
    """Names of the trainer's knobs."""
    import train_gpt as tg
    return {knob.name for knob in tg.knobs()}


if __name__ == "__main__":
    main()
