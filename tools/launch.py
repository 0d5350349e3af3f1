"""Starts a run: `./run.sh train [FOLDER] [KNOB=value ...]`, and `./run.sh demo [KNOB=value ...]`.

FOLDER/config.env gives the knobs that neither the arguments nor the environment set. Variables of published commands
become knobs (tools/foreign.py). The trainer is one process for each GPU under torchrun, else a single one. A run ends
with its short table and a page of pictures beside its log; the demo first looks how fast this machine is.

    NPROC=2         number of processes
    AUDIT=1         audit the artifact that the run has made
    WANDB=1 TENSORBOARD=1    copy the log there while it grows (tools/mirror.py)
"""
from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tools import foreign, knobs, report, sample, show
from tools.common import ToolError, program
from tools.logs import pairs, read_run, readable

ROOT = Path(__file__).resolve().parents[1]
MIRRORS = {"WANDB": "wandb", "TENSORBOARD": "tensorboard"}
MIRROR_SECONDS = 30
"""How long a mirror may take after the run has ended."""
SIZES = {
    "large": {"NUM_LAYERS": "3", "MODEL_DIM": "256", "XSA_LAST_N": "3", "PARALLEL_START_LAYER": "2",
              "TRAIN_BATCH_TOKENS": "2048", "MICRO_BATCH_TOKENS": "2048", "GPTQ_CALIBRATION_BATCHES": "8",
              "TTT_CHUNK_SIZE": "48"},
    "small": {},
    "tiny": {"MODEL_DIM": "64"},
}
"""The demo's sizes as knobs over PRESET=demo: for CPUs with AMX, which multiply bfloat16 matrices several times as fast
as others multiply float32; for two plain cores; and for slow ones (docs/LOG.md 2026-11-28)."""
SLOW_GFLOPS = 15.0


def config_env(folder: Path, known: Collection[str]) -> dict[str, str]:
    """The knobs of FOLDER/config.env: lines KNOB=value, empty lines, and comments that begin with #.

    Whoever wrote that file decides no more than knobs (nothing like LD_PRELOAD). Raises `ToolError`.
    """
    path = folder / "config.env"
    if not path.is_file():
        raise ToolError(f"{folder}: no config.env there; expected a folder such as records/pr1855")
    if path.stat().st_size > 65536:
        raise ToolError(f"{path}: over 64 KiB; expected lines KNOB=value")
    values: dict[str, str] = {}
    for line in map(str.strip, path.read_text(encoding="utf-8-sig", errors="replace").splitlines()):
        if not line or line[0] == "#":
            continue
        name, equals, value = line.partition("=")
        if not equals or not (name in known or foreign.is_published(name)):
            raise ToolError(f"{path}: {line[:80]!r}: expected KNOB=value (./run.sh knobs lists them)")
        values[name] = value
    return values


def knobs_of(arguments: Sequence[str], env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The environment of a run from `[FOLDER] KNOB=value ...`, and warnings. Arguments come first, then `env`."""
    folder = [Path(part) for part in arguments[:1] if "=" not in part]
    typed = pairs(arguments[len(folder):])
    stored = config_env(folder[0], {knob.name for knob in knobs.read()}) if folder else {}
    below, more = foreign.translate(stored)
    above, warnings = foreign.translate({**env, **typed}, typed)
    return {**below, **above}, more + warnings


def processes(env: Mapping[str, str]) -> int:
    """Number of processes on this machine: NPROC, else one for each GPU, else one."""
    if env.get("NPROC"):
        if not re.fullmatch(r"[1-9][0-9]*", env["NPROC"]):
            raise ToolError(f"NPROC={env['NPROC']}: expected a number of processes, 1 or more")
        return int(env["NPROC"])
    return max(1, gpus(env))


def gpus(env: Mapping[str, str]) -> int:
    """GPUs that a run would use; torch is asked only where there is a driver of NVIDIA or AMD."""
    if env.get("DEVICE") == "cpu" or not any(map(glob.glob, ("/dev/nvidia*", "/dev/kfd", "/dev/dxg"))):
        return 0
    import torch
    return torch.cuda.device_count()


def command(count: int) -> list[str]:
    """The trainer on so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return [sys.executable, *(torchrun if count > 1 else []), str(ROOT / "train_gpt.py")]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def idle_cores(seconds: float = 0.5) -> int:
    """Cores that nothing else keeps busy, at least 1, by what /proc/stat counts meanwhile; all of them where it is
    missing. Two threads that wait for each other at every operation are slower than one where a core is taken
    (docs/LOG.md 2026-11-28)."""
    counts = []
    for pause in (seconds, 0.0):
        with contextlib.suppress(OSError):
            counts.append([int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]])
        time.sleep(pause)
    spent = [after - before for before, after in zip(*counts)] if len(counts) == 2 else []
    idle = sum(spent[3:5]) / sum(spent) if sum(spent) else 1.0  # idle, and waiting for a disk
    return max(1, round(idle * cores()))


def with_threads(env: Mapping[str, str], count: int) -> dict[str, str]:
    """`env` and what OpenMP reads once: the cores are shared by the processes, and threads spin before they sleep.

    Threads that spin a little are 1.3 times as fast as those that sleep at once (docs/LOG.md 2026-11-22).
    """
    settings = {"GOMP_SPINCOUNT": "2000"}
    if not env.get("OMP_NUM_THREADS") and not gpus(env):
        settings["OMP_NUM_THREADS"] = str(max(1, cores() // count))
    return {**settings, **{name: value for name, value in env.items() if value or name not in settings}}


def run_id(env: Mapping[str, str]) -> str:
    """RUN_ID, or a name by preset, date and time that no run has yet."""
    stem = f"{env.get('PRESET') or 'record'}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (env.get("RUN_ID") or stem, *(f"{stem}-{number}" for number in range(2, 1000)))
    return next(name for name in names if name == env.get("RUN_ID") or not log_of({**env, "RUN_ID": name}).exists())


def log_of(env: Mapping[str, str]) -> Path:
    """The log of a run with a RUN_ID."""
    return Path(env.get("LOG_DIR") or "logs") / f"{env['RUN_ID']}.jsonl"


def artifact_of(env: Mapping[str, str]) -> Path:
    """The artifact that a run makes or scores."""
    return Path(env.get("EVAL_ONLY") or log_of(env).with_suffix(".bin"))


def forwarded(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a program to its end and return its exit status; SIGTERM and SIGHUP are passed on, Ctrl-C it gets itself."""
    child = subprocess.Popen(arguments, env=dict(env), close_fds=False)
    before = {number: signal.signal(number, lambda number, _: child.send_signal(number))
              for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


@contextmanager
def mirrored(env: Mapping[str, str], names: Sequence[str]) -> Iterator[None]:
    """Copy the log that grows meanwhile to these services, in a process that cannot harm the run."""
    if not names:
        yield
        return
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ToolError(f"{' and '.join(missing)}: not installed; {sys.executable} -m pip install {' '.join(missing)}")
    log = log_of(env)
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = log.stat().st_size if log.exists() else 0
    mirror = subprocess.Popen([sys.executable, "-m", "tools.mirror", str(log), *names, f"--follow={begin}"], cwd=ROOT,
                              env=dict(env), stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        assert mirror.stdin is not None
        mirror.stdin.close()  # the run has ended
        try:
            mirror.wait(MIRROR_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"launch: the mirror goes on by itself after {MIRROR_SECONDS} s", file=sys.stderr)


def finish(log: Path) -> None:
    """Write the page of pictures of a run beside its log, and print its short table if it has a score."""
    run = read_run(log)
    page = log.with_suffix(".html")
    report.write_page(page, [run])
    print("\n" + readable(log, show.table, run) if run.last("verdict") else f"pictures: {page}", flush=True)


def train(env: dict[str, str]) -> int:
    """Train and score; returns the exit status of the trainer, or of the audit after it."""
    count = processes(env)
    switches = {name: env.get(name) or "0" for name in ("AUDIT", *MIRRORS)}
    for name, value in switches.items():
        if value not in ("0", "1"):
            raise ToolError(f"{name}={value}: expected 0 or 1")
    env = with_threads({name: value for name, value in env.items() if name not in foreign.LAUNCHER}, count)
    env["RUN_ID"] = run_id(env)
    before = log_of(env).exists()  # then the trainer refuses, or resumes
    with mirrored(env, [service for name, service in MIRRORS.items() if switches[name] == "1"]):
        status = forwarded(command(count), env)
    if log_of(env).is_file() and (status == 0 or not before):
        finish(log_of(env))
    if status == 0 and switches["AUDIT"] == "1":
        status = forwarded([sys.executable, "-m", "tools.audit", str(artifact_of(env)), f"LOG={log_of(env)}"], env)
    return status


def gigaflops() -> float:
    """Billions of float32 operations a second of a matrix product on one core, the best of twenty; by one thread in a
    process of its own, since two, one of them beside a busy process, wait for each other and tell little."""
    code = ("import timeit, numpy as np; a = np.ones((768, 768), np.float32); "
            "print(2e-9 * 768 ** 3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=20)))")
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return float(subprocess.run([sys.executable, "-c", code], env={**os.environ, **one}, stdout=subprocess.PIPE,
                                check=True).stdout)


def size_of(speed: float, flags: str) -> str:
    """The demo's size for a CPU of this speed (`gigaflops`) with these feature flags (of /proc/cpuinfo)."""
    if "amx_bf16" in flags:
        return "large"
    return "tiny" if speed < SLOW_GFLOPS else "small"


def demo(env: dict[str, str]) -> int:
    """Prepare the demo's data, choose a size for this machine, train, and show what came out."""
    env = {**env, "PRESET": env.get("PRESET") or "demo"}
    env["RUN_ID"] = run_id(env)
    if status := forwarded([sys.executable, "-m", "data.prepare", "demo"], env):
        return status
    info = Path("/proc/cpuinfo")
    threads, speed, flags = idle_cores(), gigaflops(), info.read_text() if info.is_file() else ""
    size = size_of(speed, flags)
    print(f"speed       {threads} of {cores()} cores idle, {speed:.0f} GFLOP/s on one: the {size} demo", flush=True)
    if status := train({**SIZES[size], "OMP_NUM_THREADS": str(threads), **env}):
        return status
    print("\nIt writes:")
    for text in sample.samples(artifact_of(env)):
        print(textwrap.fill(" ".join(text.split()), 80, initial_indent="  ", subsequent_indent="  "))
    print(f"""Next: ./run.sh sample {env["RUN_ID"]} "def"   more of it
      ./run.sh train PRESET=demo MATRIX_LR=0.02   other values (./run.sh knobs)
      ./run.sh data text FILES... --name mine     your own text""")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Exit status of the trainer, or of the audit after it."""
    verb, *rest = arguments
    env, warnings = knobs_of(rest, os.environ)
    for text in warnings:
        print(f"launch: {text}", file=sys.stderr)
    return {"train": train, "demo": demo}[verb](env)


if __name__ == "__main__":
    sys.exit(program(main, "launch", __doc__))
