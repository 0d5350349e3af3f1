"""Is this machine ready for a run? A line for each thing that a run needs: ok, warning or failure, with the remedy.

    ./run.sh doctor [KNOB=value ...]            for the run that these knobs describe, such as PRESET=demo
    ./run.sh doctor --quick [KNOB=value ...]    without 30 seconds of training steps

What needs no torch is looked at first. The last line predicts the steps of a run: it trains on random tokens, in
processes launched as the run's would be (all GPUs, their links included; reading shards is not), and counts what fits
into the budget, stage by stage. Exit status 0: no failure, 1: a failure, 2: bad input.
"""
from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from tools import launch, predict
from tools.common import program
from tools.logs import log_folder
from tools.sweep import visible_gpus

ROOT = Path(__file__).resolve().parents[1]
PROBE_SECONDS = 30.0
PROBE_TOKENS = 2048
"""More of a batch a CPU does not run in the probe: a batch made for GPUs would take it hours, or all memory."""
FEW_STEPS = 500
"""With fewer a model is no use: the demo's has 2.83 bits a byte after 100, 2.46 after 200, 1.90 after 951; xz 2.05."""
GIB = 1 << 30
NEWEST_TORCH = (2, 13)
"""The last release of torch that this program was run with."""


class Line(NamedTuple):
    """What was looked at, what was found, and what to do about it."""
    level: str
    """ok | warning | failure"""
    name: str
    found: str
    remedy: str = ""


def output(*command: str) -> str:
    """Standard output of a program; empty where it is missing or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return ""


# -- without torch --------------------------------------------------------------------------------------


def installed(package: str) -> str:
    """Its version; empty where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


def python_lines() -> Iterator[Line]:
    """Interpreter, and every package of requirements.txt against its pin."""
    yield Line("ok" if sys.version_info >= (3, 10) else "failure", "python",
               f"{platform.python_version()}, {sys.executable}", "PYTHON=python3.12 ./run.sh setup (3.10 or newer)")
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    install = f"{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}"
    needs = [need for need in map(Requirement, lines) if not need.marker or need.marker.evaluate()]
    for need in needs:
        version = installed(need.name)
        if not version:
            yield Line("failure", need.name, "not installed", install)
        elif need.name == "torch":  # any from 2.9 on: a GPU image has its own
            release = tuple(map(int, version.split(".")[:2]))
            level = "failure" if release < (2, 9) else "warning" if release > NEWEST_TORCH else "ok"
            unknown = ", newer than any that this was run with" if level == "warning" else ""
            yield Line(level, "torch", version + unknown, f"{install} (2.9 to {'.'.join(map(str, NEWEST_TORCH))})")
        elif not need.specifier.contains(version, prereleases=True):
            yield Line("warning", need.name, f"{version}, pinned is {need.specifier}", install)
    if all(installed(need.name) for need in needs):
        yield Line("ok", "packages", f"all {len(needs)} of requirements.txt are installed")


def gpu_lines() -> Iterator[Line]:
    """GPUs as the driver sees them: model, memory in use, links."""
    fields = "name,memory.total,memory.used,driver_version,utilization.gpu"
    rows = [[cell.strip() for cell in row.split(",")] for row in
            output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits").splitlines()]
    if not rows:
        if Path("/proc/driver/nvidia").exists():
            yield Line("failure", "gpu", "there is an NVIDIA driver, but nvidia-smi does not answer",
                       "install the driver's tools or restart the machine or container with its GPUs (--gpus all)")
        else:
            yield Line("ok", "gpu", "none: runs use the CPU, which is right for PRESET=demo")
        return
    names = sorted({row[0] for row in rows})
    yield Line("ok" if len(names) == 1 else "warning", "gpu", f"{len(rows)} x {', '.join(names)}, {rows[0][1]} MiB, "
               f"driver {rows[0][3]}", "set CUDA_VISIBLE_DEVICES to GPUs of one model: the slowest sets the pace")
    for i, (_, total, used, _, busy) in enumerate(rows):
        if used.isdigit() and (int(used) > 1024 or busy.isdigit() and int(busy) > 20):
            yield Line("warning", "gpu", f"GPU {i} is in use: {used} of {total} MiB, {busy} % busy",
                       "end what runs there (nvidia-smi names it), or leave it out of CUDA_VISIBLE_DEVICES")
    if len(rows) > 1:
        yield links_line(output("nvidia-smi", "topo", "-m"))


def links_line(topology: str) -> Line:
    """Whether NVLink joins all pairs of GPUs, from the text of `nvidia-smi topo -m`."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", topology)
    rows = [row.split()[1:] for row in plain.splitlines() if re.match(r"GPU\d+\s", row)]
    kinds = [cell for i, row in enumerate(rows) for j, cell in enumerate(row[:len(rows)]) if i != j]
    slow = sum(not kind.startswith("NV") for kind in kinds) // 2
    if not kinds:
        return Line("warning", "links", "nvidia-smi topo -m tells nothing", "")
    return Line("warning" if slow else "ok", "links", f"{', '.join(sorted(set(kinds)))}" + (
        f": {slow} of {len(kinds) // 2} pairs of GPUs have no NVLink" if slow else " between all pairs"),
        "a machine with SXM modules; without NVLink gradients cross the PCIe bus" if slow else "")


def machine_lines(folders: Mapping[str, Path]) -> Iterator[Line]:
    """Cores and their load, memory, and folders that may be written, with their free space."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    yield Line("warning" if load > cores / 2 else "ok", "cpu", f"{cores} cores, load {load:.1f}",
               "end what else runs: within a budget of seconds a busy machine trains fewer steps")
    with contextlib.suppress(OSError):
        told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (int(told[name].split()[0]) * 1024 / GIB for name in ("MemAvailable", "MemTotal"))
        yield Line("warning" if free < 2 else "ok", "memory", f"{free:.1f} of {total:.1f} GiB available",
                   "end what else runs")
    for name, folder in folders.items():
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Line("failure" if name != "data" else "warning", f"disk: {name}", f"{there} cannot be written",
                       f"set {name} to a folder of yours" if name != "data" else "set DATA_DIR to a folder of yours")
        else:
            yield Line("ok", f"disk: {name}", f"{free / 1e9:.1f} GB free in {there}")


# -- with torch -----------------------------------------------------------------------------------------


def cuda_lines(torch: Any, driver: bool) -> Iterator[Line]:
    """Whether torch and the driver go together, and a compiler for what Triton generates."""
    if driver and not torch.cuda.is_available():
        build = torch.version.cuda
        yield Line("failure", "cuda", "the driver sees GPUs, torch does not: " + (
            f"it is built for CUDA {build}, which needs a newer driver" if build else "it is built for the CPU"),
            "update the driver, or install an older CUDA build of torch 2.9 or newer" if build else
            "unset PIP_EXTRA_INDEX_URL TORCH_INDEX; rm -r .venv; ./run.sh setup; or a PYTHON whose torch has CUDA")
    if not torch.cuda.is_available():
        return
    yield Line("ok", "cuda", f"{torch.version.cuda}, {torch.cuda.device_count()} devices")
    if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        yield Line("failure", "compiler", "no C compiler, which Triton and torch.compile need",
                   "apt-get install gcc, or set CC")
    if importlib.util.find_spec("triton") is None:
        yield Line("failure", "triton", "not installed, and torch.compile needs it", "pip install triton (the release "
                   "that this torch asks for: pip show torch)")


def kernel_lines(tg: Any, cfg: Any, run: Any) -> Iterator[Line]:
    """Attention kernel, fused kernels and coder that a run would choose."""
    kernels = tg.pick_kernels(cfg, run)
    attention = kernels.attention.name
    hopper = run.is_cuda and tg.torch.cuda.get_device_capability(run.device)[0] == 9
    slow = hopper and cfg.attention == "auto" and attention != "fa3"
    release = "".join(re.findall(r"\d+", tg.torch.__version__)[:3])
    wheels = f"cu{(tg.torch.version.cuda or '').replace('.', '')}_torch{release}"
    yield Line("warning" if slow else "ok", "attention", attention + ", though this is a Hopper GPU" * slow,
               f"pip install flash_attn_3 --no-deps --find-links https://windreamer.github.io/flash-attention3-wheels/{wheels}")
    lacking = run.is_cuda and not (installed("triton") and run.dtype == tg.torch.bfloat16)
    yield Line("warning" if lacking else "ok", "kernels", f"MLP: {kernels.fused}, "
               f"{'compiled' if run.compiles else 'eager'}, {str(run.dtype).removeprefix('torch.')}",
               "pip install triton; DTYPE=bfloat16")
    if installed("constriction"):
        yield Line("ok", "coder", "range")
    else:
        yield Line("warning", "coder", "Brotli: artifacts are 1 to 2 % larger", "pip install -r requirements.txt "
                   "(constriction)")


def data_lines(tg: Any, cfg: Any, run: Any, processes: int = 1) -> Iterator[Line]:
    """Shards, tokenizer and side file of the run's dataset as training will find them, and room for the run."""
    variant = "caseops" if cfg.caseops_enabled else f"sp{cfg.vocab_size}"
    remedy = "see data/README.md"
    if cfg.dataset_dir.name == "demo_sp1024":
        remedy = "./run.sh data demo"
    elif not cfg.data_path:
        remedy = f"./run.sh data download --variant {variant}"
    try:
        tokens = predict.token_counts(tg, cfg)
        yield Line("ok", "data", ", ".join(f"{split}: {count:,} tokens" for split, count in tokens.items()) +
                   f", {cfg.dataset_dir}")
        if not cfg.caseops_enabled:
            yield Line("ok", "tokenizer", f"{cfg.vocab_size} pieces, {tg.tokenizer_path(cfg)}")
    except tg.UserError as error:
        yield Line("failure", "data", str(error), remedy)
        return
    yield overlap_line(tg, cfg)
    for text in predict.resource_warnings(tg, cfg, run, tokens["val"] - 1, processes):
        yield Line("warning", "room", text)


def overlap_line(tg: Any, cfg: Any) -> Line:
    """Whether validation documents are trained on, as `./run.sh data verify` has written it down for these shards."""
    remedy = f"./run.sh data verify {cfg.dataset_dir}"
    try:
        stamp = json.loads((cfg.dataset_dir / "verified.json").read_text(encoding="utf-8"))
        if stamp["shards_sha256"] != tg.shards_sha256(cfg.dataset_dir):
            return Line("failure", "overlap", "verified.json is of other shards", remedy)
        level = "failure" if stamp["shared_share"] > 0.01 else "ok"  # training refuses this, too
        return Line(level, "overlap", f"{stamp['shared_documents']:,} of {stamp['val_documents']:,} validation "
                    f"documents are trained on, {stamp['shared_share']:.2%} of the tokens", "other validation data")
    except FileNotFoundError:
        return Line("warning", "overlap", "not looked for whether validation documents are trained on", remedy)
    except (ValueError, LookupError, TypeError) as error:
        return Line("failure", "overlap", f"verified.json is none: {type(error).__name__}: {error}", remedy)


def stage_name(at: Any) -> str:
    """Key of a stage in what `measure` returns."""
    return f"loop {'on' if at.looped else 'off'}{', weights rounded' * at.rounded}"


def measure(tg: Any, cfg: Any, run: Any, seconds: float) -> dict[str, float]:
    """Seconds of a training step in each stage of a run, `name: seconds`, within about `seconds` after compiling."""
    rows = -(-cfg.train_rows // run.world)
    part = rows if run.is_cuda else min(rows, max(1, PROBE_TOKENS // cfg.train_seq_len))  # of which the time is taken
    micro = min(part, cfg.micro_batch_tokens // cfg.train_seq_len)
    model = tg.build_model(cfg, run)
    optimizer, ema = tg.ShardedOptimizer(model, cfg, run), tg.Ema(model, cfg.ema_decay)
    batch = tg.random_batch(micro, cfg)
    measured: dict[str, float] = {}
    for at in tg.stages(cfg):
        loss = tg.stage_loss(model, at, cfg, run)

        def steps(count: int, loss: Any = loss, updates: bool = True) -> float:
            run.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                for _ in range(-(-part // micro)):
                    (loss(batch.to(run.device)) / cfg.train_batch_tokens).backward()
                if updates:
                    optimizer.step(0.0, 0.0)
                    ema.update()
            run.synchronize()
            return (time.perf_counter() - start) / count

        steps(2)
        each = run.broadcast_object(steps(2))
        if (count := int(seconds / len(tg.stages(cfg)) / each)) > 2:  # as many on every rank
            each = run.broadcast_object(steps(count))
        rest = (rows / part - 1) * steps(1, updates=False) if part < rows else 0.0
        measured[stage_name(at)] = each + run.broadcast_object(rest)
    return measured


def predicted_steps(tg: Any, cfg: Any, each: Mapping[str, float]) -> tuple[int, float]:
    """(steps, seconds of training they have): what fits into the budget, stage by stage, at most ITERATIONS."""
    budget = cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds if cfg.max_wallclock_seconds else 600.0
    ends, steps = sorted({0.0, min(cfg.enable_looping_at, 1.0), cfg.qat_start, 1.0}), 0.0
    for begin, end in zip(ends, ends[1:]):
        steps += (end - begin) * budget / each[stage_name(tg.stage_at(cfg, begin))]
    return min(int(steps), cfg.iterations), budget


def speed_line(tg: Any, cfg: Any, env: Mapping[str, str], processes: int) -> Line:
    """The probe, in processes of its own: what kills it does not kill the doctor."""
    command = [*launch.command(processes)[:-1], "-m", "tools.doctor", "--probe"]
    ended = subprocess.run(command, cwd=ROOT, env=launch.with_threads(env, processes), capture_output=True, text=True)
    lines = ended.stdout.strip().splitlines()
    if ended.returncode or not lines:
        text = [line for line in ended.stderr.splitlines() if line.strip()] or [f"exit status {ended.returncode}"]
        memory = next((line for line in reversed(text) if "OutOfMemory" in line or "out of memory" in line), "")
        remedy = f"./run.sh train shows where; the probe alone: {' '.join(command)}"
        if memory or "emory" in text[-1]:
            remedy = f"lower MICRO_BATCH_TOKENS={cfg.micro_batch_tokens}"
        return Line("failure", "speed", f"training steps fail: {(memory or text[-1]).strip()[:300]}", remedy)
    told = json.loads(lines[-1])
    steps, budget = predicted_steps(tg, cfg, told["seconds"])
    stages = [f"{1e3 * seconds:,.1f} ms with {name}" for name, seconds in told["seconds"].items()]
    few = 0 < cfg.max_wallclock_seconds and steps < min(FEW_STEPS, cfg.iterations)
    long = dataclasses.replace(cfg, max_wallclock_seconds=1e9, iterations=10 ** 12)
    enough = FEW_STEPS * 1e9 / max(1, predicted_steps(tg, long, told["seconds"])[0]) + cfg.gptq_reserve_seconds
    return Line("warning" if few else "ok", "speed", f"{processes} process{'es' * (processes > 1)}, "
                f"{told['mib']:,} MiB each; a step: {', '.join(stages)}; predicts {steps:,} steps in {budget:.0f} s, "
                f"{600 / budget * steps:,.0f} in 600 s", f"for {FEW_STEPS} steps: MAX_WALLCLOCK_SECONDS={enough:.0f}, "
                f"fewer parameters (NUM_LAYERS={cfg.num_layers}, MODEL_DIM={cfg.model_dim}) or less than "
                f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}{', or PRESET=demo' * (cfg.preset != 'demo')}")


def probe() -> int:
    """One process of the probe: prints the measured seconds as JSON."""
    import train_gpt as tg
    cfg = tg.on_its_data(tg.Config.from_env(os.environ), "", os.environ)
    with tg.Run(cfg, os.environ, log=False) as run:
        seconds = measure(tg, cfg, run, PROBE_SECONDS)
        peak = tg.torch.cuda.max_memory_allocated() >> 20 if run.is_cuda else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
        if run.is_main:
            print(json.dumps({"seconds": seconds, "mib": peak}))
    return 0


def examine(env: Mapping[str, str], warnings: Sequence[str], quick: bool) -> Iterator[Line]:
    """All lines for a run with these knobs, each as soon as it is known. Nothing is written."""
    yield from python_lines()
    yield from gpu_lines()
    yield from machine_lines({"LOG_DIR": log_folder(env), "data": Path(env.get("DATA_DIR") or "data")})
    try:
        import train_gpt as tg
    except ImportError as error:
        yield Line("failure", "trainer", f"train_gpt.py cannot be imported: {error}", "the remedies above, then again")
        return
    yield from cuda_lines(tg.torch, bool(visible_gpus({})))
    for text in warnings:
        yield Line("warning", "knobs", text, "leave it out")
    try:
        cfg = tg.on_its_data(tg.Config.from_env(env), "", env)
        yield Line("ok", "knobs", f"PRESET={cfg.preset}")
        with tg.Run(cfg, {}, log=False) as run:
            yield from kernel_lines(tg, cfg, run)
            processes = launch.processes(env)
            yield from data_lines(tg, cfg, run, processes)
            if not quick:
                yield speed_line(tg, cfg, env, processes)
    except tg.UserError as error:
        yield Line("failure", "knobs", str(error), "./run.sh knobs lists them all")


def main(arguments: Sequence[str]) -> int:
    """Exit status 0: no failure, 1: a failure."""
    if "--probe" in arguments:
        return probe()
    env, warnings = launch.knobs_of([a for a in arguments if a != "--quick"], os.environ)
    if env.get("NPROC"):
        launch.processes(env)  # a bad number is refused at once
    console, levels = Console(), []
    colours = {"ok": "green", "warning": "yellow", "failure": "bold red"}
    for line in examine(env, warnings, "--quick" in arguments):
        levels.append(line.level)
        text = Text(f"{line.level:8s}", style=colours[line.level])
        text.append(f" {line.name:16s} {line.found}", style="not bold default")
        if line.level != "ok" and line.remedy:
            text.append(f"\n{'':25s} -> {line.remedy}", style="bold")
        console.print(text, soft_wrap=True)
    console.print(", ".join(f"{levels.count(level)} {level}" for level in colours), highlight=False)
    return int("failure" in levels)


if __name__ == "__main__":
    sys.exit(program(main, "doctor", __doc__))
