"""Searches for better knobs with Optuna: one trial after another, hopeless ones are stopped early; workers may join.

    TRIALS=40 ./run.sh tune MATRIX_LR=0.01..0.04:log EMA_DECAY=0.99..0.999 NUM_LOOPS=1..3 ATTN_GATE=none,sparse \\
                            [-- KNOB=value ...]

    a..b      between two numbers, integers if both are; :log for a scale on which factors count alike
    a,b,c     one of these
    TRIALS    trials of the study, all workers together (default 20)
    STUDY     name of the study: letters, digits, _ and - (default: made from space and fixed knobs, so the same command
              goes on)
    TUNE_STORAGE   a database (postgresql://...) instead of LOG_DIR/tune/STUDY.journal, a file to which any number of
                   workers on one machine or one shared file system append

The same command on another machine, or a second time on this one, is another worker of the study: each takes free GPUs
(GPUS_PER_RUN) as a sweep does. The first trial is the configuration as it is, if the space has it. Trials are judged by
val_bpb; with VAL_LOSS_EVERY=steps behind --, one whose probes are worse than the median of the others' is stopped. A
killed worker costs its trial at most; of trials without a score no checkpoints are kept. SEED cannot be searched:
picking seeds by their scores is against the rules. Logs and the record are those of a sweep. Exit status 0: done, 1: no
trial has a score, 2: bad input, 130: interrupted.
"""
from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from rich.console import Console
from rich.live import Live

from tools import foreign, knobs
from tools.common import ToolError, program
from tools.logs import PRIVATE, events, log_folder, pairs
from tools.sweep import TRAIN, Job, Sweep, lock, slots, unlock

RANGE = re.compile(r"([-+.\w]+?)\.\.([-+.\w]+?)(:log)?")


def space_of(arguments: Sequence[str]) -> dict[str, BaseDistribution]:
    """The space of KNOB=range and KNOB=list arguments. Raises `ToolError`."""
    space: dict[str, BaseDistribution] = {}
    for name, text in pairs(arguments).items():
        if name == "SEED":
            raise ToolError("SEED: picking seeds by their scores is against the rules; compare knobs, then run seeds")
        if name.lower() in PRIVATE:
            raise ToolError(f"{name}: says what is written or read where, not how well it goes; it goes behind --")
        span = RANGE.fullmatch(text)
        try:
            if span is None:
                if len(set(text.split(","))) < 2:
                    raise ValueError("a list needs two values; a single one goes behind --")
                space[name] = CategoricalDistribution(text.split(","))
            else:
                kind = int if all(re.fullmatch(r"[-+]?\d+", end) for end in span.groups()[:2]) else float
                low, high = kind(span[1]), kind(span[2])
                if low >= high:
                    raise ValueError("the first number is not below the second")
                space[name] = {int: IntDistribution, float: FloatDistribution}[kind](low, high, log=bool(span[3]))
        except ValueError as error:
            raise ToolError(f"{name}={text}: {error}; expected such as 0.01..0.04:log, 1..3 or none,sparse") from None
    if not space:
        raise ToolError("no knob to search; such as ./run.sh tune MATRIX_LR=0.01..0.04:log -- PRESET=demo")
    return space


def digest(text: str) -> str:
    """Eight hexadecimal digits that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def text_of(value: Any) -> str:
    """A suggested value as a knob takes it."""
    return format(value, ".6g") if isinstance(value, float) else str(value)


def config(env: Mapping[str, str], typed: Sequence[str] = ()) -> Any:
    """The trainer's `Config`. Raises `ToolError` where it refuses."""
    import train_gpt as tg
    try:
        return tg.Config.from_env(foreign.translate(env, typed)[0])
    except tg.UserError as error:
        raise ToolError(str(error)) from None


def check_values(space: Mapping[str, BaseDistribution], env: Mapping[str, str]) -> None:
    """Raise `ToolError` for a value that the trainer refuses whatever the space's other knobs are, and for equal ones.

    Of a range both ends are tried, and of one of fractions a place between them: an integer's ends may be whole.
    """
    tried = {}
    for name, places in space.items():
        if isinstance(places, CategoricalDistribution):
            tried[name] = list(places.choices)
        else:
            between = [places.low + 0.618 * (places.high - places.low)] * isinstance(places, FloatDistribution)
            tried[name] = [text_of(value) for value in (places.low, places.high, *between)]
    for name, values in tried.items():
        others = [[(other, text) for text in tried[other]] for other in tried if other != name]
        read = []
        for value in values:
            refusal = None
            for more in itertools.chain([()], ([pair] for other in others for pair in other),
                                        itertools.islice(itertools.product(*others), 5000)):
                try:
                    read.append(getattr(config({**env, **dict(more), name: value}), name.lower()))
                    break
                except ToolError as error:
                    refusal = refusal or error
            else:
                raise ToolError(f"{name}={value} cannot be tried: {refusal}")
        if len(set(read)) < len(read):
            raise ToolError(f"{name}={','.join(values)}: expected different values")


def as_it_is(space: Mapping[str, BaseDistribution], env: Mapping[str, str], typed: Sequence[str] = ()
             ) -> dict[str, Any] | None:
    """The configuration's own values as a trial, or None if the space lacks one. Raises `ToolError` for bad knobs."""
    names = {knob.name for knob in knobs.read()}
    for name in space:
        if name not in names:
            raise ToolError(f"{name}: no such knob (./run.sh knobs lists them)")
    cfg, values = config(env, typed), {}
    for name, places in space.items():
        value = getattr(cfg, name.lower())
        if isinstance(places, CategoricalDistribution):
            value = knobs.typed_text(value)
            inside = value in places.choices
        else:
            inside = isinstance(value, (int, float)) and places.low <= value <= places.high
        if not inside:
            return None
        values[name] = value
    return values


class Tuner:
    """One worker of a study. `command` trains a run as in `sweep.Sweep`."""

    def __init__(self, study: optuna.Study, space: Mapping[str, BaseDistribution], fixed: Mapping[str, str],
                 folder: Path, places: Sequence[Mapping[str, str]], env: Mapping[str, str],
                 command: Sequence[str] = TRAIN) -> None:
        self.study, self.space, self.fixed, self.folder = study, dict(space), dict(fixed), folder
        self.places, self.env, self.command = places, env, command

    def sweep(self, number: int, values: Mapping[str, Any]) -> Sweep:
        """The run of a trial, as a sweep of one."""
        knobs = {name: text_of(value) for name, value in values.items()}
        job = Job(" ".join(f"{k}={v}" for k, v in sorted(knobs.items())), {**self.fixed, **knobs},
                  f"{self.study.study_name}.{digest(self.study.study_name)}.t{number:05d}")
        return Sweep([job], self.folder, self.places, self.command, self.env)

    def bury(self) -> None:
        """Trials whose worker is gone get the score that their run has left, or have failed."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            sweep = self.sweep(trial.number, trial.params)
            (state,) = sweep.states
            locks = [lock(sweep.own / f"{state.job.key}.{end}") for end in ("worker", "lock")]
            if None in locks:  # its worker lives, or its run has outlived it
                unlock(*(held for held in locks if held is not None))
                continue
            with contextlib.suppress(RuntimeError):  # another worker was faster
                if sweep.look(state):
                    self.study.tell(trial.number, state.bpb)
                else:
                    self.study.tell(trial.number, state=TrialState.FAIL)
                    sweep.forget(state.job)
            unlock(*locks)

    def trial(self, console: Console, poll: float) -> None:
        """Ask for values, run them, report probes on the way, tell the score."""
        self.bury()
        trial = self.study.ask(self.space)
        sweep = self.sweep(trial.number, trial.params)
        (state,) = sweep.states
        held = lock(sweep.own / f"{state.job.key}.worker")
        live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        told: set[int] = set()

        def probed() -> bool:
            """Report new probes to the study; whether there were any."""
            log = self.folder / f"{state.run_id}.jsonl"
            probes = [e for e in events(log) if e["event"] == "val_probe"] if log.is_file() else []
            news = {e["step"]: e["val_bpb"] for e in probes if e["step"] not in told}
            for step, bpb in news.items():
                trial.report(bpb, step)
            told.update(news)
            return bool(news)

        try:
            with live or contextlib.nullcontext():
                while sweep.step():
                    if probed() and trial.should_prune():
                        sweep.stop()
                        self.study.tell(trial, state=TrialState.PRUNED)
                        return
                    if live:
                        live.update(sweep.view())
                    time.sleep(poll)
            probed()  # the last ones may have come with the end; later trials are held against them
            if state.status == "done":
                self.study.tell(trial, state.bpb)
            else:
                self.study.tell(trial, state=TrialState.FAIL)
                console.print(f"trial {trial.number} failed: {state.text}", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            sweep.stop()
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        finally:
            if held is not None:
                unlock(held)
            ended = self.study.trials[trial.number]
            if ended.state in (TrialState.PRUNED, TrialState.FAIL):
                sweep.forget(state.job)
            score = f"val_bpb={ended.value:.5f}" if ended.state == TrialState.COMPLETE else ended.state.name.lower()
            console.print(f"trial {trial.number:3d}  {score}  {state.job.label}", markup=False, highlight=False,
                          soft_wrap=True)

    def work(self, trials: int, console: Console, poll: float = 1.0) -> int:
        """Trials until the study has so many; returns the exit status."""
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while sum(t.state != TrialState.WAITING for t in self.study.get_trials(deepcopy=False)) < trials:
                self.trial(console, poll)
        except KeyboardInterrupt:
            console.print("interrupted; the same command goes on", markup=False)
            return 130
        finally:
            signal.signal(signal.SIGTERM, previous)
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        pruned = self.study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
        console.print(f"study {self.study.study_name}: {len(done)} trials with a score, {len(pruned)} stopped early, "
                      f"{len(self.study.trials) - len(done) - len(pruned)} failed or running", markup=False)
        if not done:
            return 1
        best = self.study.best_trial
        knobs = {**self.fixed, **{name: text_of(value) for name, value in best.params.items()}}
        console.print(f"best: trial {best.number}, val_bpb={best.value:.5f}\n"
                      f"./run.sh train {shlex.join(f'{k}={v}' for k, v in knobs.items())}\n"
                      f"It is the best of {len(done)}: before believing it, ./run.sh sweep seeds of it and of what "
                      f"was, and ./run.sh compare them.", markup=False, highlight=False, soft_wrap=True)
        return 0


def open_study(name: str, storage: str | Path, first: Mapping[str, Any] | None) -> optuna.Study:
    """Create or join a study that minimises; `first` is tried before anything else, once.

    Raises `ToolError` where TUNE_STORAGE is no database, or cannot be reached.
    """
    from sqlalchemy.exc import SQLAlchemyError
    opened: Any = storage
    if isinstance(storage, Path):
        storage.parent.mkdir(parents=True, exist_ok=True)
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
        opened = JournalStorage(JournalFileBackend(str(storage)))
    try:
        study = optuna.create_study(
            study_name=name, storage=opened, load_if_exists=True, direction="minimize",
            sampler=optuna.samplers.TPESampler(constant_liar=True),  # running trials of other workers count as poor
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4))
    except (ImportError, ValueError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        shown = re.sub(r":[^:/@]*@", ":...@", str(storage))  # without its password
        raise ToolError(f"TUNE_STORAGE={shown}: {str(error).splitlines()[0]}; expected a database that can be "
                         f"reached, such as sqlite:///study.db or postgresql://user@host/name, or none") from None
    if first is not None:
        study.enqueue_trial(dict(first), skip_if_exists=True)
    return study


def main(arguments: Sequence[str], env: Mapping[str, str] = os.environ) -> int:
    """Exit status 0: done, 1: no trial has a score, 130: interrupted."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    space, fixed = space_of(arguments[:at]), pairs(arguments[at + 1:])
    if "RUN_ID" in fixed:
        raise ToolError("RUN_ID: a study names its runs itself; leave it out")
    if both := sorted(set(space) & set(fixed)):
        raise ToolError(f"{both[0]}: cannot be searched and be fixed")
    if not re.fullmatch(r"[1-9]\d*", trials := env.get("TRIALS") or "20"):
        raise ToolError(f"TRIALS={trials}: expected a positive number")
    first = as_it_is(space, {**env, **fixed}, list(fixed))
    check_values(space, {**env, **fixed})
    folder = log_folder({**env, **fixed}).absolute()
    name = env.get("STUDY") or f"tune-{digest(json.dumps([sorted(arguments[:at]), fixed]))}"
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name):
        raise ToolError(f"STUDY={name}: expected up to 60 letters, digits, _ and -")
    places = slots(env)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = open_study(name, env.get("TUNE_STORAGE") or folder / "tune" / f"{name}.journal", first)
    return Tuner(study, space, fixed, folder, places, env).work(int(trials), Console())


if __name__ == "__main__":
    sys.exit(program(main, "tune", __doc__))
