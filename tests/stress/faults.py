"""Faults injected into tiny runs: what the user sees, how long it takes, what is lost, whether RESUME makes it good.

    ./run.sh bench faults [WORD ...]       all rows, or those whose name has one of the words

Model and data are the tests'. A run with a fault is this program with a plant in it: at a place of one rank it kills,
stops, fills the disk and so on. After each fault the same command with RESUME=auto and no plant, or EVAL_ONLY where
the artifact is written, must end in the verdict of a run that nothing disturbed. Rows that mount a small tmpfs or
give up rights need root and are left out without.
"""
from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import train_gpt as tg
from bench.common import ROOT, Row, show, text_dataset
from tools import logs
from tools.common import program

SECONDS = 120
"""Most that a run may take, which takes five on a quiet core."""
PHASES = ("warmup", "train", "calibrate", "gptq", "pack", "score_quantized", "adapt", "shared_sgd")


class Fault(NamedTuple):
    """What is done where. `place` is a phase, or a number of calls into it: train:3 is the third step."""
    name: str
    action: str
    place: str
    rank: int = 0
    world: int = 1
    knobs: Mapping[str, str] = {}
    small_disk: bool = False
    differs: str = ""
    """Why the verdict is another one, by design."""


# -- inside the run --------------------------------------------------------------------------------------


def act(action: str, folder: Path) -> None:
    """Do it, in this rank, here and now."""
    with contextlib.suppress(OSError):  # a full disk
        (folder / "when").write_text(str(time.time()))
    if action.startswith("SIG"):
        os.kill(os.getppid() if action.endswith("+") else os.getpid(), getattr(signal, action.rstrip("+")))
    elif action == "fill":
        with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass
    elif action == "read-only":  # its owner alone may write to it, and this process is somebody else from here on
        Path(os.environ["LOG_DIR"]).chmod(0o755)
        os.seteuid(65534)
    elif action == "clear":
        (folder / "filler").unlink()
    elif action == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (1 << 35, resource.RLIM_INFINITY))
        torch.empty(1 << 36)
    elif action == "clock":
        real = time.time
        time.time = lambda: real() + 1e6
    elif action in ("garbage", "truncate"):
        shard = sorted(Path(os.environ["DATA_PATH"]).glob("fineweb_train_*.bin"))[0]
        with open(shard, "r+b") as file:
            file.seek(1024)
            file.write(b"\xff" * (shard.stat().st_size - 1024)) if action == "garbage" else file.truncate(1024)


def plant(faults: Sequence[Sequence[Any]], folder: Path) -> None:
    """Put actions [(action, place, rank), ...] at their places."""
    calls: dict[str, int] = {}

    def at(place: str) -> None:
        calls[place] = calls.get(place, 0) + 1
        for action, wanted, rank in faults:
            name, _, number = wanted.partition(":")
            if name == place and calls[place] == int(number or 1) and rank == int(os.environ.get("RANK", 0)):
                act(action, folder)

    phase, update, allows, step = tg.Run.phase, tg.Ema.update, tg.EvalBudget.allows, tg.ShardedOptimizer.step

    @contextlib.contextmanager
    def entered(self: tg.Run, name: str, budget: str = "none") -> Iterator[None]:
        with phase(self, name, budget):
            if name not in ("train", "adapt"):
                at(name)
            yield

    def poisoned(self: tg.ShardedOptimizer, lr_scale: float, momentum: float) -> torch.Tensor:
        calls["nan"] = calls.get("nan", 0) + bool(lr_scale)
        if any(action == "nan" and str(calls["nan"]) in place.split(",") for action, place, _ in faults) and lr_scale:
            self.small["tok_emb"].grad[3, 3] = torch.nan
        return step(self, lr_scale, momentum)

    tg.Run.phase = entered
    tg.Ema.update = lambda self: (update(self), at("train"))[0]
    tg.EvalBudget.allows = lambda self: (at("adapt"), allows(self))[1]
    tg.ShardedOptimizer.step = poisoned


# -- around it -------------------------------------------------------------------------------------------


def knobs_of(folder: Path, data: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """Environment of the tests' tiny run: a checkpoint after every step, adaptation in two phases."""
    from tests.conftest import TINY
    values = {**TINY, **data, "log_dir": str(folder), "run_id": "r", "checkpoint_every": "1", "resume": "auto",
              "iterations": "6", "ngram_base_beta": "0", "diagnostic_evals": "quantized",
              "dist_timeout_seconds": "8", "ttt_batch_size": "2", **more}
    return {name.upper(): value for name, value in values.items()}


def launch(env: Mapping[str, str], world: int, planted: str = "", folder: Path | None = None) -> subprocess.Popen:
    """The run, in one process or by torchrun; with a plant this program is run in its place."""
    script = ["-m", "tests.stress.faults"] if planted else ["train_gpt.py"]
    head = [sys.executable, *(("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}")
                              if world > 1 else ())]
    return subprocess.Popen([*head, *script], cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                                                         **env, "BENCH_PLANT": planted, "BENCH_FOLDER": str(folder)})


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """(status, standard error); what outlives SECONDS is killed, as are the processes that a run leaves stopped."""
    try:
        _, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return -1, process.communicate()[1] + f"train_gpt.py: (did not end within {SECONDS} s)\n"
    return process.returncode, err


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    """Events of that name in the run's log, and in that of its artifact's score."""
    paths = [path for path in (folder / "r.jsonl", folder / "s.jsonl") if path.exists()]
    return [e for path in paths for e in logs.events(path) if e["event"] == name]


def said(err: str, folder: Path) -> str:
    """The first line that is this program's, or the last warning of its log; without folders."""
    lines = [line.partition("train_gpt.py: ")[2] for line in err.splitlines() if line.startswith("train_gpt.py: ")]
    lines += [line for line in err.splitlines() if "Error" in line or "Fatal" in line][-1:]
    lines += [e["text"] for e in events(folder, "warning") if "data verify" not in e["text"]][-1:]
    lines += [f"skipped={e['skipped']} in the log" for e in events(folder, "train") if e.get("skipped")][-1:]
    return (lines or ["-"])[0].replace(f"{folder}/", "").replace(str(folder), "LOG_DIR")


def verdict(folder: Path) -> tuple[Any, ...]:
    """What must not differ: loss, ledger, artifact."""
    found = events(folder, "verdict")
    return tuple(found[-1][name] for name in ("val_loss", "ledger_sha256", "weight_bytes")) if found else ()


@contextlib.contextmanager
def folder_of(fault: Fault) -> Iterator[Path]:
    """A fresh folder, on a tmpfs of 8 MB where the fault needs a disk that is soon full."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if fault.small_disk:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", name], check=True)
        try:
            yield folder
        finally:
            if fault.small_disk:
                subprocess.run(["umount", name], check=True)


def inject(fault: Fault, data: Mapping[str, str], expected: Mapping[int, tuple]) -> Row:
    """One row: the run with the fault, then RESUME=auto."""
    with folder_of(fault) as folder, tempfile.TemporaryDirectory() as copies:
        copy = Path(copies)
        for path in Path(data["data_path"]).iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        own = {**data, "data_path": copies}
        env = knobs_of(folder, own, fault.knobs)
        actions = [(a, p, fault.rank) for a, p in zip(fault.action.split("&"), fault.place.split("&"))]
        begun = time.time()
        status, err = finish(launch(env, fault.world, json.dumps(actions), folder))
        ended, when = time.time(), folder / "when"
        seconds = ended - (float(when.read_text()) if when.exists() else begun)
        first, text = verdict(folder), said(err, folder)
        with contextlib.suppress(OSError):
            (folder / "filler").unlink()
        at, same = "-", first
        if not first:
            for path in Path(data["data_path"]).iterdir():
                (copy / path.name).write_bytes(path.read_bytes())
            artifact = folder / "r.bin"
            if artifact.exists():
                env |= {"RUN_ID": "s", "EVAL_ONLY": str(artifact), "RESUME": "0"}
            status_again, err = finish(launch(env, fault.world))
            resumed, same = events(folder, "resume"), verdict(folder)
            at = f"step {resumed[-1]['step']}" if resumed else "the start"
            at = "the artifact" if artifact.exists() and "EVAL_ONLY" in env else at
            at = at if status_again == 0 else f"fails: {said(err, folder)}"
        return {"fault": fault.name, "ranks": fault.world, "status": status, "seconds": round(seconds, 1),
                "the user saw": text[:150], "went on from": at if not first else "did not stop",
                "same verdict": fault.differs if same and fault.differs else
                "yes" if same == expected[fault.world] else "no" if same else "none"}


def together(data: Mapping[str, str], expected: Mapping[int, tuple]) -> Iterator[Row]:
    """Two runs in one folder at the same moment, and RESUME while the first is alive."""
    for name, more in (("the same RUN_ID", {}), ("no RUN_ID", {"run_id": "", "resume": "0"})):
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            env = knobs_of(folder, data, {"checkpoint_every": "0", **more})
            results = [finish(p) for p in [launch(env, 1), launch(env, 1)]]
            lines = [said(err, folder) for status, err in results if status]
            found = [json.loads(path.read_text().splitlines()[-1]) for path in sorted(folder.glob("*.jsonl"))]
            same = all((e["val_loss"], e["ledger_sha256"], e["weight_bytes"]) == expected[1] for e in found)
            yield {"fault": f"two runs at once, {name}", "ranks": 1, "status": str(sorted(s for s, _ in results)),
                   "seconds": None, "the user saw": (lines or ["-"])[0][:150],
                   "went on from": f"{len(found)} finished", "same verdict": "yes" if same else "no"}


def table() -> list[Fault]:
    """All rows."""
    rows = [Fault(f"{name} in {place.split(':')[0]}", name, place) for name in ("SIGTERM", "SIGINT")
             for place in ("train:3", "calibrate", "score_quantized", "adapt:7")]
    rows += [Fault(f"SIGTERM to torchrun in {place.split(':')[0]}", "SIGTERM+", place, 0, 2)
             for place in ("train:3", "adapt:6")]
    rows += [Fault(f"SIGSTOP of rank 1 in {place.split(':')[0]}", "SIGSTOP", place, 1, 2)
             for place in ("train:3", "adapt:6")]
    cap = {"artifact_bytes_cap": "120000"}
    rows += [
        Fault("NaN in one gradient", "nan", "3", differs="a step less"),
        Fault("NaN in five gradients", "nan", "1,2,3,4,5", differs="steps less"),
        Fault("shard overwritten while mapped", "garbage", "train:2"),
        Fault("shard truncated while mapped", "truncate", "train:2"),
        Fault("wall clock jumps by 11 days", "clock", "train:2"),
        Fault("out of memory in train", "memory", "train:3"), Fault("out of memory in adapt", "memory", "adapt:4")]
    if os.geteuid() == 0 and sys.platform == "linux":
        rows += [Fault(f"folder turns read-only in {place.split(':')[0]}", "read-only", place)
                 for place in ("train:3", "pack", "adapt:3")]
        rows += [Fault("disk too small at the start", "none", "train", 0, 1, {"bigram_buckets": "65536"}, True),
                 Fault("disk full while training, room again at calibration", "fill&clear", "train:2&calibrate", 0, 1,
                       cap, True),
                 Fault("disk full when the artifact is written", "fill", "pack", 0, 1, cap, True),
                 Fault("disk full while scoring", "fill", "adapt:3", 0, 1, cap, True)]
    rows += [Fault(f"kill -9 of rank {rank} in {phase}", "SIGKILL", {"train": "train:4", "adapt": "adapt:6"}.get(
        phase, phase), rank, 2) for phase in PHASES for rank in (0, 1)]
    return rows


def main(words: Sequence[str]) -> int:
    """Print the table; exit status 1 where a verdict differs or a run cannot go on."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        data = text_dataset(Path(name))
        expected: dict[int, tuple] = {}
        for world in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                status, err = finish(launch(knobs_of(Path(folder), data, {}), world))
                tg.require(status == 0, f"the undisturbed run on {world} ranks fails: {said(err, Path(folder))}")
                expected[world] = verdict(Path(folder))
        for fault in table():
            if not words or any(word in fault.name for word in words):
                rows.append(inject(fault, data, expected))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if not words or any(word in "two runs at once" for word in words):
            rows += together(data, expected)
    show("faults", rows)
    return int(any(row["same verdict"] == "no" for row in rows))


if __name__ == "__main__":
    if os.environ.get("BENCH_PLANT"):
        faulthandler.enable()  # as train_gpt.py does
        plant(json.loads(os.environ["BENCH_PLANT"]), Path(os.environ["BENCH_FOLDER"]))
        sys.exit(tg.main([], {k: v for k, v in os.environ.items() if not k.startswith("BENCH_")}))
    sys.exit(program(main, "bench"))
