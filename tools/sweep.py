"""Trains every combination of some knobs, or a list of runs from a file: in turn, or side by side on the GPUs.

    ./run.sh sweep SEED=42,0,1234 MATRIX_LR=0.022,0.026 [-- KNOB=value ...]    every combination; fixed knobs behind --
    ./run.sh sweep FILE [-- KNOB=value ...]                                    a run a line: KNOB=value ...; # comments

    GPUS_PER_RUN=1       GPUs of one run (default: all of this machine); as many runs as fit are trained at a time
    LAUNCHER=slurm       write an sbatch array of the same runs, one a task, and submit it (GPUS_PER_RUN is needed)

The same command resumes: a run is known by its configuration, the number of its GPUs and the trainer's source, and one
that has a verdict is skipped. A run that fails is tried once more, unless it would fail again; where it left a
checkpoint, it goes on from there. Runs outlive a killed sweep: the next one waits for what is still training. Several
sweeps, on several machines with one LOG_DIR, share the work. A value with commas goes behind -- or into a file.

LOG_DIR/<knobs>-<key>.jsonl are the runs' logs, for ./run.sh compare and show. LOG_DIR/sweep/runs.jsonl is the record of
starts and ends: lines of JSON, since appending one is atomic, also for several writers, a line that a crash cut off
harms no other, and SQLite's locks are not to be trusted on the network file systems that such folders often lie on.
LOG_DIR/sweep/<run>.out is what a run printed. Exit status 0: all done, 1: some failed, 2: bad input, 130: interrupted.
"""
from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import heapq
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tools import foreign
from tools.common import ToolError, program
from tools.logs import PRIVATE, events, file_name, last, log_folder, pairs, scored_log

ROOT = Path(__file__).resolve().parents[1]
TRAIN = (sys.executable, "-m", "tools.launch", "train")
"""What trains one run: knobs as environment variables, LOG_DIR/RUN_ID.jsonl as its log."""
HOPELESS = ("UserError", "DivergedError")
"""Errors in a run's log that another attempt would end in, too."""


class Job(NamedTuple):
    """One run that is wanted."""
    label: str
    """The knobs that vary, for readers: `MATRIX_LR=0.022 SEED=42`."""
    knobs: dict[str, str]
    """All knobs given, varied and fixed, as environment variables."""
    key: str
    """Digest of configuration, GPUs and trainer."""

    @property
    def name(self) -> str:
        """Start of the run ids of its attempts."""
        return file_name(self.label.replace(" ", "-")) + f"-{self.key}"

    @property
    def group(self) -> str:
        """The label without its seed: jobs of one group are repeats."""
        return " ".join(part for part in self.label.split() if not part.startswith("SEED=")) or "(all)"


@dataclasses.dataclass
class State:
    """What is known of a job."""
    job: Job
    status: str = "waiting"
    """waiting | running | elsewhere (another sweep, or a run that outlived one) | done | failed"""
    failures: int = 0
    run_id: str = ""
    bpb: float = float("nan")
    seconds: float = float("nan")
    """Of a finished run, as its log has it."""
    started: float = 0.0
    text: str = ""
    """Why it failed."""


# -- what is to be run ----------------------------------------------------------------------------------


def runs_of(arguments: Sequence[str]) -> list[tuple[dict[str, str], dict[str, str]]]:
    """(knobs that vary, fixed knobs) of each run, from the command line's grid or file.

    Raises `ToolError`.

    >>> [varied for varied, _ in runs_of(["SEED=1,2", "MATRIX_LR=0.03", "--", "PRESET=demo"])]
    [{'SEED': '1', 'MATRIX_LR': '0.03'}, {'SEED': '2', 'MATRIX_LR': '0.03'}]
    """
    arguments = list(arguments)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    fixed = pairs(arguments[at + 1:])
    if at == 1 and "=" not in arguments[0]:
        rows = rows_of(arguments[0])
    else:
        grid = {name: value.split(",") for name, value in pairs(arguments[:at]).items()}
        for name, values in grid.items():
            if "" in values or len(set(values)) < len(values):
                raise ToolError(f"{name}={','.join(values)}: expected different values; one with commas goes behind "
                                 f"-- or into a file")
        rows = [dict(zip(grid, values)) for values in itertools.product(*grid.values())] if grid else []
    if not rows:
        raise ToolError("no run is named; such as ./run.sh sweep SEED=42,0,1234 MATRIX_LR=0.022,0.026 -- PRESET=demo")
    for row in rows:
        if "RUN_ID" in {*row, *fixed}:
            raise ToolError("RUN_ID: a sweep names its runs itself; leave it out")
        if both := sorted((set(row) & set(fixed)) | (set(row) & {"LOG_DIR"})):
            raise ToolError(f"{both[0]}: cannot vary and be fixed; LOG_DIR is always fixed")
    return [(row, fixed) for row in rows]


def rows_of(file: str) -> list[dict[str, str]]:
    """The runs of a file, a line each. Raises `ToolError` with the number of a bad line."""
    try:
        lines = Path(file).read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()  # a byte order mark
    except OSError as error:
        raise ToolError(f"{file}: cannot be read ({error.strerror}); expected a file of runs or KNOB=value,value"
                         ) from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(pairs(shlex.split(line.decode("utf-8"), comments=True)))
        except (ToolError, ValueError) as error:
            raise ToolError(f"{file}, line {number}: {error}; expected KNOB=value ...") from None
    return [row for row in rows if row]


def identify(rows: Sequence[tuple[Mapping[str, str], Mapping[str, str]]], env: Mapping[str, str], gpus: int
             ) -> list[Job]:
    """Jobs of validated knobs. Raises `ToolError` for a knob that the trainer refuses, and for one run twice: values
    that are equal, or of what changes no result."""
    import train_gpt as tg  # two seconds of torch, against a bad knob found after hours
    code, jobs = Path(tg.__file__).read_bytes(), {}
    for varied, fixed in rows:
        label = " ".join(f"{name}={varied[name]}" for name in sorted(varied))
        typed = {**fixed, **varied}
        try:
            if "NPROC" in typed:
                raise ToolError("NPROC: GPUS_PER_RUN says how many processes a run has")
            cfg = tg.Config.from_env(foreign.translate({**env, **typed}, typed)[0])
        except (ToolError, tg.UserError) as error:
            raise ToolError(f"{label}: {error}") from None
        same = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in PRIVATE or k in ("seed", "eval_only")}
        key = hashlib.sha256(json.dumps([same, gpus]).encode() + code).hexdigest()[:10]
        if key in jobs:
            raise ToolError(f"{label}: the same run as {jobs[key].label}: equal values, or of a knob that changes no "
                            f"result; leave one out")
        jobs[key] = Job(label, typed, key)
    return list(jobs.values())


# -- where it runs --------------------------------------------------------------------------------------


def visible_gpus(env: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that a run may use, as CUDA_VISIBLE_DEVICES takes them."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return [name for name in env["CUDA_VISIBLE_DEVICES"].split(",") if name not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return re.findall(r"^GPU .*\(UUID: (GPU-[\w-]+)\)", listed, re.M)


def gpus_per_run(env: Mapping[str, str], count: int) -> int:
    """GPUS_PER_RUN, by default all `count`. Raises `ToolError` where that is not possible."""
    text = env.get("GPUS_PER_RUN") or str(count)
    if not text.isdigit() or int(text) > count or (int(text) == 0) != (count == 0):
        raise ToolError(f"GPUS_PER_RUN={text}: expected 1 to {count}, the GPUs that are visible here" if count else
                         f"GPUS_PER_RUN={text}: no GPU is visible here; unset it to run on the CPU")
    return int(text)


def slots(env: Mapping[str, str]) -> list[dict[str, str]]:
    """Environment of each place for a run: disjoint sets of GPUs, or the CPU as the only one."""
    gpus = visible_gpus(env)
    size = gpus_per_run(env, len(gpus))
    if not gpus:
        return [{}]
    return [{"NPROC": str(size), "CUDA_VISIBLE_DEVICES": ",".join(gpus[i:i + size])}
            for i in range(0, len(gpus) - size + 1, size)]


def lock(path: Path) -> int | None:
    """A descriptor that holds the lock of `path`, for children to inherit; None: another process holds it.

    The lock lasts until `unlock`, or until every process that has the descriptor is gone.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        os.close(file)
        return None


def unlock(*files: int) -> None:
    for file in files:
        fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


def append(path: Path, event: str, **values: Any) -> None:
    """One line at the end of a file of JSON lines, on disk when this returns; a line cut off before stays alone."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, **values}) + "\n"
    with open(path, "ab+") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            line = "\n" + line
        os.write(file.fileno(), line.encode())
        os.fsync(file.fileno())


class Running(NamedTuple):
    """An attempt that this process has started."""
    state: State
    process: subprocess.Popen
    locks: tuple[int, int]
    slot: int


class Sweep:
    """Jobs, and the places to run them. `folder` (LOG_DIR) gets the logs, `folder`/sweep the record, locks, output."""

    def __init__(self, jobs: Sequence[Job], folder: Path, places: Sequence[Mapping[str, str]],
                 command: Sequence[str] = TRAIN, env: Mapping[str, str] | None = None) -> None:
        self.states = [State(job) for job in jobs]
        self.folder, self.own, self.places = folder, folder / "sweep", places
        self.command, self.env = list(command), dict(os.environ if env is None else env)
        self.running: list[Running] = []
        self.news: list[State] = []
        """States that have changed since the reader last looked."""
        self.own.mkdir(parents=True, exist_ok=True)
        self.record = self.own / "runs.jsonl"
        self.began = time.monotonic()
        for state in self.states:
            self.look(state)

    def attempts(self, job: Job) -> list[Path]:
        """Logs of all attempts at a job, whatever their labels."""
        name = re.compile(rf".*-{re.escape(job.key)}(\.\d+)?")
        return sorted(path for path in self.folder.glob("*.jsonl") if name.fullmatch(path.stem))

    def forget(self, job: Job) -> None:
        """Remove the checkpoints of a job that nobody will go on with."""
        for path in self.folder.glob(f"{job.name}*.ckpt"):
            path.unlink(missing_ok=True)

    def look(self, state: State) -> bool:
        """Whether a job has a verdict; its score is taken over."""
        for path in self.attempts(state.job):
            if (one := scored_log(path)) is not None:
                verdict = last(events(path), "verdict") or {}
                state.status, state.bpb, state.run_id = "done", one.bpb, path.stem
                state.seconds = verdict.get("total_seconds", float("nan"))
                self.news.append(state)
                return True
        return False

    def step(self) -> bool:
        """Collect what has ended, start what fits; whether anything is left to wait for."""
        for run in [run for run in self.running if run.process.poll() is not None]:
            self.finish(run)
        place, index = self.free_place()
        for state in self.states:
            if not (state.status == "elsewhere" or (state.status == "waiting" and place is not None)):
                continue
            held = lock(self.own / f"{state.job.key}.lock")
            if held is None:
                state.status = "elsewhere"
            elif self.look(state):  # another sweep, or a run that outlived one, has done it
                append(self.record, "found", key=state.job.key, run_id=state.run_id, val_bpb=state.bpb)
                unlock(held)
            elif place is None:
                state.status = "waiting"
                unlock(held)
            else:
                self.start(state, (held, place), index)
                place, index = self.free_place()
        if place is not None:
            unlock(place)
        return any(state.status not in ("done", "failed") for state in self.states)

    def free_place(self) -> tuple[int | None, int]:
        """(lock, index) of a place where nothing runs, neither ours nor another sweep's."""
        taken = {run.slot for run in self.running}
        for index, place in enumerate(self.places):
            name = re.sub(r"\W", "_", "-".join(place.values()) or "cpu")
            path = self.own / f"on-{platform.node()}-{self.env.get('SLURM_JOB_ID', '')}-{name}.lock"
            if index not in taken and (held := lock(path)) is not None:
                return held, index
        return None, -1

    def start(self, state: State, held: tuple[int, int], index: int) -> None:
        """Go on with the last attempt that left a checkpoint, or start one under the first run id without files.

        Its processes keep both locks.
        """
        env = {**self.env, **state.job.knobs, **self.places[index], "LOG_DIR": str(self.folder)}
        taken = {path.stem for path in self.folder.glob(f"{state.job.name}*")}
        ids = [state.job.name + (f".{n}" if n > 1 else "") for n in range(1, len(taken) + 2)]
        saved = [name for name in ids if (self.folder / f"{name}.ckpt").exists()]
        state.run_id = saved[-1] if saved else next(name for name in ids if name not in taken)
        env |= {"RUN_ID": state.run_id, **({"RESUME": "auto"} if saved else {})}
        with open(self.own / f"{state.run_id}.out", "ab") as out:
            process = subprocess.Popen(self.command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out,
                                       stderr=subprocess.STDOUT, pass_fds=held, start_new_session=True)
        append(self.record, "start", key=state.job.key, run_id=state.run_id, knobs=state.job.knobs, pid=process.pid,
               host=platform.node(), place=self.places[index])
        state.status, state.started = "running", time.monotonic()
        self.running.append(Running(state, process, held, index))
        self.news.append(state)

    def finish(self, run: Running) -> None:
        """Note how an attempt ended, and whether there is to be another one."""
        state, status = run.state, run.process.returncode
        if not self.look(state):
            log, out = self.folder / f"{state.run_id}.jsonl", self.own / f"{state.run_id}.out"
            error = last(events(log), "error") if log.is_file() else None
            lines = [line.strip() for line in out.read_text(errors="replace").splitlines() if line.strip()]
            state.text = (error or {}).get("text") or (lines or [f"exit status {status}"])[-1]
            state.failures += 1
            again = state.failures < 2 and (error or {}).get("kind") not in HOPELESS
            state.status = "waiting" if again else "failed"
            self.news.append(state)
        elif status:  # such as an audit that refutes the score
            state.text = f"exit status {status} after the verdict, see {self.own / state.run_id}.out"
        append(self.record, "end", key=state.job.key, run_id=state.run_id, status=status, outcome=state.status,
               text=state.text, **({"val_bpb": state.bpb} if state.status == "done" else {}))
        unlock(*run.locks)
        self.running.remove(run)

    def stop(self) -> None:
        """End what this process has started: politely (torchrun gives its workers 30 s), after 60 s by force."""
        for sent, patience in ((signal.SIGTERM, 60), (signal.SIGKILL, 10)):
            end = time.monotonic() + patience
            for run in self.running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run.process.pid, sent)
            for run in self.running:  # the shell is gone at once; the trainer behind it writes a checkpoint first
                with contextlib.suppress(ProcessLookupError):
                    while time.monotonic() < end:
                        run.process.poll()
                        os.killpg(run.process.pid, 0)
                        time.sleep(0.05)
        for run in self.running:
            append(self.record, "end", key=run.state.job.key, run_id=run.state.run_id, status=run.process.returncode,
                   outcome="interrupted")
            unlock(*run.locks)
        self.running.clear()

    # -- what is told of it -----------------------------------------------------------------------------

    def left(self) -> float:
        """Seconds until all is done, if every run takes the mean of those that have ended; nan before one has."""
        known = [state.seconds for state in self.states if state.seconds == state.seconds]
        if not known:
            return float("nan")
        each, now = statistics.fmean(known), time.monotonic()
        ends = [max(0.0, each - (now - run.state.started)) for run in self.running]
        ends += [0.0] * (len(self.places) - len(ends))
        heapq.heapify(ends)
        for state in self.states:
            if state.status in ("waiting", "elsewhere"):
                heapq.heapreplace(ends, ends[0] + each)
        return max(ends)

    def doing(self, state: State) -> str:
        """Where a running job is, from its log."""
        path = self.folder / f"{state.run_id}.jsonl"
        log = events(path) if path.is_file() else []
        if not log:
            return "starting"
        train = log[-1]
        if train["event"] != "train":
            return train.get("name") or train["event"]
        return f"train {train['progress']:.0%}, step {train['step']}, {train['loss_nats'] or float('nan'):.3f} nats"

    def table(self) -> Table:
        """A row for each configuration: runs done, mean, spread and best of its seeds."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("configuration", overflow="fold")
        for name in ("done", "mean bpb", "std", "best", "failed"):
            table.add_column(name, justify="right", no_wrap=True)
        groups: dict[str, list[State]] = {}
        for state in self.states:
            groups.setdefault(state.job.group, []).append(state)
        rows = []
        for name, states in groups.items():
            scores = [s.bpb for s in states if s.status == "done"]
            mean = statistics.fmean(scores) if scores else float("inf")
            rows.append((mean, [name, f"{len(scores)}/{len(states)}", f"{mean:.5f}" if scores else "-",
                                f"{statistics.stdev(scores):.5f}" if len(scores) > 1 else "-",
                                f"{min(scores):.5f}" if scores else "-",
                                str(sum(s.status == "failed" for s in states) or "")]))
        for i, (_, cells) in enumerate(sorted(rows, key=lambda row: row[0])):
            table.add_row(*cells, style="green" if i == 0 and cells[2] != "-" else None)
        return table

    def status_line(self) -> str:
        """`5 of 12 done, 1 failed, best 1.0561 (SEED=42 ...), 12 min, 18 min left`"""
        done = [s for s in self.states if s.status == "done"]
        parts = [f"{len(done)} of {len(self.states)} done"]
        for status in ("failed", "elsewhere"):
            if count := sum(s.status == status for s in self.states):
                parts.append(f"{count} {status}")
        if done:
            best = min(done, key=lambda s: s.bpb)
            parts.append(f"best {best.bpb:.5f} ({best.job.label})")
        parts.append(duration(time.monotonic() - self.began))
        if len(done) < len(self.states):
            left = self.left()
            parts.append("time left unknown until a run has ended" if left != left else f"{duration(left)} left")
        return ", ".join(parts)

    def view(self) -> Group:
        """The live table."""
        lines = [Text(f"  {run.state.job.label}: {self.doing(run.state)}, "
                      f"{duration(time.monotonic() - run.state.started)}", style="cyan") for run in self.running]
        return Group(self.table(), *lines, Text(self.status_line(), style="bold"))

    def tell(self) -> Iterator[str]:
        """A line for each state that has changed."""
        for state in self.news:
            figures = {"done": f"val_bpb={state.bpb:.5f} seconds={state.seconds:.0f} {state.run_id} {state.text}",
                       "failed": state.text, "running": f"attempt {state.failures + 1}",
                       "waiting": f"failed, will be tried again: {state.text}"}.get(state.status, "")
            yield f"{state.status:8s} {state.job.label}  {figures}".rstrip()
        self.news.clear()


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`"""
    size, unit = next(x for x in ((1, "s"), (60, "min"), (3600, "h")) if seconds < 90 * x[0] or x[1] == "h")
    return f"{seconds / size:.1f} {unit}" if unit == "h" else f"{seconds / size:.0f} {unit}"


def conduct(sweep: Sweep, console: Console, poll: float = 1.0) -> int:
    """Run all jobs; on a terminal with a live table, else with a line for each change. Returns the exit status."""
    # A note, no exception: one inside `start` would forget a run that has just begun.
    asked: list[int] = []
    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in heard}
    live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
    try:
        with live or contextlib.nullcontext():
            while not asked:
                busy = sweep.step()
                for line in sweep.tell():
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
                if live:
                    live.update(sweep.view())
                if not busy:
                    break
                time.sleep(poll)
        if asked:
            sweep.stop()
            console.print("interrupted; the same command resumes", markup=False)
            return 130
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    console.print(sweep.table())
    console.print(sweep.status_line(), markup=False, highlight=False, soft_wrap=True)
    return int(any(state.status == "failed" for state in sweep.states))


def slurm(sweep: Sweep, fixed: Mapping[str, str], gpus: int) -> Path:
    """Write the jobs that are not done and an array script whose tasks sweep a line of them each; returns the script.
    """
    todo = [state.job for state in sweep.states if state.status != "done"]
    name = hashlib.sha256(" ".join(job.key for job in todo).encode()).hexdigest()[:10]
    listed, script = (sweep.own.resolve() / f"slurm-{name}.{end}" for end in ("jobs", "sbatch"))
    rows = [{k: v for k, v in job.knobs.items() if k not in fixed} for job in todo]
    listed.write_text("".join(shlex.join(f"{k}={v}" for k, v in row.items()) + "\n" for row in rows))
    behind = shlex.join(f"{k}={v}" for k, v in {**fixed, "LOG_DIR": str(sweep.folder.resolve())}.items())
    script.write_text(f"""#!/usr/bin/env bash
#SBATCH --job-name=sweep-{name}
#SBATCH --array=1-{len(todo)}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --output={sweep.own.resolve()}/slurm-{name}-%a.out
# Partition, account and time limit: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT in the environment of sbatch.
set -euo pipefail
cd {shlex.quote(str(ROOT))}
export LAUNCHER=local GPUS_PER_RUN={gpus}
exec ./run.sh sweep <(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {shlex.quote(str(listed))}) -- {behind}
""")
    return script


def main(arguments: Sequence[str], env: Mapping[str, str] = os.environ) -> int:
    """Exit status 0: all done (or submitted), 1: some failed, 130: interrupted."""
    launcher = env.get("LAUNCHER") or "local"
    if launcher not in ("local", "slurm"):
        raise ToolError(f"LAUNCHER={launcher}: expected local or slurm")
    rows = runs_of(arguments)
    fixed = rows[0][1]
    folder = log_folder({**env, **fixed}).absolute()
    if launcher == "local":
        places = slots(env)
        jobs = identify(rows, env, int(places[0].get("NPROC", 0)))
        return conduct(Sweep(jobs, folder, places, env=env), Console(width=None if sys.stdout.isatty() else 160))
    if not re.fullmatch(r"[1-9]\d*", env.get("GPUS_PER_RUN", "")):
        raise ToolError(f"GPUS_PER_RUN={env.get('GPUS_PER_RUN', '')}: LAUNCHER=slurm needs the number of GPUs of one "
                        f"run, such as GPUS_PER_RUN=8")
    gpus = int(env["GPUS_PER_RUN"])
    sweep = Sweep(identify(rows, env, gpus), folder, [], env=env)
    if all(state.status == "done" for state in sweep.states):
        print(sweep.status_line())
        return 0
    script = slurm(sweep, fixed, gpus)
    if shutil.which("sbatch") is None:
        raise ToolError(f"sbatch is not here; {script} is written: submit it where Slurm is, with sbatch {script}")
    return subprocess.run(["sbatch", str(script)]).returncode


if __name__ == "__main__":
    sys.exit(program(main, "sweep", __doc__))
