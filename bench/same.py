"""Runs another commit and this tree side by side, small, in fp32 on this CPU, and compares every number they make.

    ./run.sh bench same BASE [CASE ...]      BASE: a commit, such as HEAD~1; CASE: some of the names below, default all

Compared are the losses of all steps, a digest of the unpacked tensors (not of the file, whose header may change), the
ledger's digest, and every score, to the last bit. Both trees get the same variables, less those that a tree's script
does not know. The other commit's numbers are kept in logs/same-<commit>.json, for this machine alone: delete it where
torch or the processor has changed. Exit status 1 if a number differs: each difference is meant and explained, or a
defect.
"""
from __future__ import annotations

import functools
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.common import ROOT, text_dataset
from tools.common import ToolError, program

SMALL = dict(
    DEVICE="cpu", DTYPE="float32", THREADS="1", VOCAB_SIZE="512", NUM_LAYERS="4", MODEL_DIM="32", NUM_HEADS="2",
    NUM_KV_HEADS="1", ROPE_DIMS="8", LOOP_START="1", LOOP_END="2", NUM_LOOPS="1", PARALLEL_START_LAYER="3",
    XSA_LAST_N="3", TRAIN_SEQ_LEN="32", TRAIN_BATCH_TOKENS="384", MICRO_BATCH_TOKENS="128",
    MAX_WALLCLOCK_SECONDS="0", ITERATIONS="12", WARMUP_STEPS="1", TRAIN_LOG_EVERY="1", ENABLE_LOOPING_AT="0.5",
    EMA_DECAY="0.5", GPTQ_CALIBRATION_BATCHES="2", BITS_PER_WEIGHT="4", EVAL_SEQ_LEN="32", EVAL_STRIDE="8",
    VAL_BATCH_TOKENS="1024", EVAL_LADDER="ema,quantized,sliding", DIAGNOSTIC_EVALS="ema,quantized,sliding",
    TTT="none", TTT_CONTEXT="cache", TTT_CHUNK_SIZE="16", TTT_LORA_RANK="4", TTT_LORA_LR="0.002", TTT_LORA_ALPHA="8",
    TTT_LORA_A_SHARE="1", TTT_EPS="1e-10",
    PHASED_TTT_NUM_PHASES="2", PHASED_TTT_PREFIX_DOCS="5", TTT_CHUNK_TOKENS="64", GLOBAL_TTT_CHUNK_TOKENS="64",
    GLOBAL_TTT_LR="0.01", TTT_BATCH_SIZE="4", NGRAM_TILT_ENABLED="0", NGRAM_BASE_BETA="0")
SDCLIP = dict(QUANT="sdclip", MATRIX_BITS="5", EMBED_BITS="6", ATTN_CLIP_SIGMAS="4", MLP_CLIP_SIGMAS="4",
              EMBED_CLIP_SIGMAS="4")
CASES: dict[str, dict[str, str]] = {
    "plain": {},
    "sliding whole windows": dict(EVAL_STRIDE="0", SHUFFLE="none"),
    "lora, cache": dict(TTT="lora"),
    "lora, recompute": dict(TTT="lora", TTT_CONTEXT="recompute", TTT_LORA_ON="q,v,o,head"),
    "lora, tilt": dict(TTT="lora", PHASED_TTT_NUM_PHASES="0", NGRAM_TILT_ENABLED="1", NGRAM_BASE_BETA="2",
                       NGRAM_RULES="2:0.5:1,4:0.5:1"),
    "sgd": dict(TTT="sgd"),
    "sdclip": SDCLIP,
    "mixed bits": dict(SDCLIP, N_INT6_LAYERS="8"),
    "qat": dict(SDCLIP, QAT_START="0.4"),
    "ternary": dict(SDCLIP, QAT_START="0", MATRIX_BITS="2", ATTN_CLIP_SIGMAS="1.2", MLP_CLIP_SIGMAS="1.2"),
    "no trellis": dict(TRELLIS_STATES="1"),
    "one lane": dict(PARALLEL_RESIDUAL="single", LN_SCALE="0"),
    "no lanes, no loop": dict(PARALLEL_RESIDUAL="none", NUM_LOOPS="0", SKIP_GATES_ENABLED="0"),
    "bigram": dict(BIGRAM_BUCKETS="256", BIGRAM_DIM="16", CONV_TAPS="0", TTT="lora"),
    "output gate": dict(ATTN_GATE="output", MUON_ROW_NORMALIZE="0"),
    "dense gate, classic": dict(ATTN_GATE="dense", MUON_COEFFICIENTS="classic", GRAD_CLIP_NORM="0"),
    "dense gate with bias": dict(ATTN_GATE="dense", GATED_ATTN_BIAS="2", SMEAR_GATE_ENABLED="0", ROPE_DIMS="0"),
    "bound by the cap": dict(ARTIFACT_BYTES_CAP="code+30000", NUM_LAYERS="5"),
    "two ranks": dict(TTT="lora", PROCESSES="2"),
    "two ranks, sgd": dict(TTT="sgd", PROCESSES="2"),
    "demo's shape": dict(PRESET="demo", VOCAB_SIZE="512", MODEL_DIM="64", BIGRAM_BUCKETS="512", BIGRAM_DIM="16",
                         ROPE_DIMS="16", NUM_LOOPS="0", PARALLEL_RESIDUAL="single", PARALLEL_START_LAYER="2",
                         NGRAM_TILT_ENABLED="1", NGRAM_BASE_BETA="2"),
}
DIGEST = """
import hashlib, sys, train_gpt
tensors = train_gpt.unpack(open(sys.argv[1], "rb").read()).tensors
sha = hashlib.sha256()
for name in sorted(tensors):
    sha.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
print(sha.hexdigest())
"""
CODE_BYTES = "import pathlib, train_gpt; print(len(train_gpt.shipped_source(pathlib.Path('train_gpt.py'))))"


def call(tree: Path, env: Mapping[str, str], *arguments: str) -> str:
    """Standard output of this Python with arguments, run in a tree; `ToolError` with the last lines if it fails."""
    system = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, capture_output=True, text=True,
                          env={**system, "OMP_NUM_THREADS": "1", **env})
    if done.returncode:
        raise ToolError(f"{tree.name}: status {done.returncode}: " + " | ".join(done.stderr.splitlines()[-4:]))
    return done.stdout.strip()


def numbers(tree: Path, case: str, data: Mapping[str, str], logs: Path) -> dict[str, Any]:
    """Every number that one tree makes of one case."""
    source = (tree / "train_gpt.py").read_text(encoding="utf-8")
    env = {**SMALL, **CASES[case], **data, "LOG_DIR": str(logs / tree.name), "RUN_ID": re.sub(r"\W+", "-", case)}
    processes = env.pop("PROCESSES", "1")
    env = {name: value for name, value in env.items() if re.search(rf"^    {name.lower()}: ", source, re.MULTILINE)}
    if env.get("ARTIFACT_BYTES_CAP", "").startswith("code+"):
        env["ARTIFACT_BYTES_CAP"] = str(int(call(tree, {}, "-c", CODE_BYTES)) + int(env["ARTIFACT_BYTES_CAP"][5:]))
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    call(tree, env, *launcher[:0 if processes == "1" else None], "train_gpt.py")
    log = Path(env["LOG_DIR"]) / f"{env['RUN_ID']}.jsonl"
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    verdict = next(event for event in events if event["event"] == "verdict")
    return {"losses": [event["loss_nats"] for event in events if event["event"] == "train"],
            "tensors": call(tree, {}, "-c", DIGEST, str(log.with_suffix(".bin"))),
            "diagnostics": verdict.get("diagnostic_evals", verdict.get("ladder")), "val_bpb": verdict["val_bpb"],
            "ledger": verdict["ledger_sha256"], "targets": verdict["tokens"], "bytes": verdict["bytes"]}


def checkout(commit: str, folder: Path) -> None:
    """Writes the tree of a commit into a folder."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True)
    tarfile.open(fileobj=io.BytesIO(archive.stdout)).extractall(folder, filter="data")


def main(arguments: Sequence[str]) -> int:
    """Prints a row a case; returns 1 if any number differs."""
    base, cases = "".join(arguments[:1]), list(arguments[1:]) or list(CASES)
    revision = subprocess.run(["git", "rev-parse", "--verify", f"{base}^{{commit}}"], cwd=ROOT, capture_output=True,
                              text=True)
    if revision.returncode or not set(cases) <= set(CASES):
        raise ToolError(f"expected BASE [CASE ...]: a commit, and some of {', '.join(CASES)}")
    store = ROOT / "logs" / f"same-{revision.stdout.strip()[:12]}.json"
    before = json.loads(store.read_text()) if store.exists() else {}
    different = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        other, data = Path(folder) / "base", Path(folder) / "data"
        checkout(revision.stdout.strip(), other)
        data.mkdir()
        knobs = {name.upper(): value for name, value in text_dataset(data).items()}
        for case in cases:
            trees = [ROOT] if case in before else [ROOT, other]
            run = functools.partial(numbers, case=case, data=knobs, logs=Path(folder) / "logs")
            results = list(pool.map(run, trees))
            now, before[case] = results[0], before.get(case, results[-1])
            apart = [name for name, value in before[case].items() if value != now[name]]
            different += bool(apart)
            print(f"{case:24s} loss {now['losses'][-1]:.7f}  val_bpb {now['val_bpb']:.9f}  "
                  f"{'DIFFERENT: ' + ', '.join(apart) if apart else 'the same'}", flush=True)
            for name in apart:
                print(f"    {name}: {before[case][name]}\n    {' ' * len(name)}  {now[name]}")
            store.parent.mkdir(exist_ok=True)
            store.write_text(json.dumps(before))
    print(f"{len(cases)} cases, {different} different from {base}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(program(main, "same"))
