"""Copies the events of a run's log to Weights & Biases or TensorBoard, while the log grows or afterwards.

    WANDB=1 TENSORBOARD=1 ./run.sh train ...        tools/launch.py starts this beside the run, with --follow=BYTES
    ./run.sh mirror RUN wandb tensorboard           of a run that has ended

RUN is the id of a run in LOG_DIR (logs) or the path of its log. The log is all that this reads, and it is a process of
its own: a service that stalls or fails, and whatever its client does to signals and streams, cannot reach the run. A
mirror that fails says so once; the same events can be sent later. --follow=BYTES waits for what a run appends to the
log behind its first BYTES, until standard input ends. Every number of an event becomes `event/number`, or
`event/name/number` where the event has a name, by training step and by tokens seen. Services are configured by their
own variables: WANDB_MODE=offline, WANDB_PROJECT (parameter-golf), WANDB_ENTITY, ... `tensorboard --logdir
logs/tensorboard` shows the other. Neither package is required by anything else.
"""
from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.common import ToolError, program
from tools.logs import event_of, events, find_log, log_folder, readable

POLL_SECONDS = 1.0
"""How often a growing log is looked at."""


class Wandb:
    """A run of Weights & Biases with the run's id, so that a resumed run goes on there too."""

    def __init__(self, path: Path, config: Mapping[str, Any], began: float) -> None:
        import wandb
        os.environ.setdefault("WANDB_PROJECT", "parameter-golf")
        self.run = wandb.init(id=re.sub(r"[^\w-]", "-", path.stem), name=path.stem, config=dict(config), resume="allow",
                              dir=str(path.parent), settings=wandb.Settings(silent=True, console="off"))
        self.run.define_metric("*", step_metric="step")

    def write(self, seconds: float, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Scalars in `tensorboard/<run id>` beside the log; written by tensorboard's own writer, which needs no torch."""

    def __init__(self, path: Path, config: Mapping[str, Any], began: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        self.began, self.event, self.summary = began, Event, Summary
        self.writer = EventFileWriter(str(path.parent / "tensorboard" / path.stem))

    def write(self, seconds: float, step: int, values: Mapping[str, float]) -> None:
        summary = self.summary(value=[self.summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self.writer.add_event(self.event(wall_time=self.began + seconds, step=step, summary=summary))

    def close(self) -> None:
        self.writer.close()


SERVICES = {"wandb": Wandb, "tensorboard": TensorBoard}
"""Name of the package -> what writes to it."""


def growing(path: Path, begin: int) -> Iterator[dict[str, Any]]:
    """Events of a log behind its first `begin` bytes as they come, until standard input ends and all is read."""
    ended, rest = False, b""
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
        if not path.exists():
            continue
        with open(path, "rb") as file:
            file.seek(begin)
            more = file.read()
        begin += len(more)
        *whole, rest = (rest + more).split(b"\n")
        for line in whole:
            if event := event_of(line.decode("utf-8", "replace")):  # else a crash cut it, and the run went on below
                yield event


def numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """What an event says in numbers, by name; those that are not finite are null in a log."""
    head = "/".join(str(event[k]) for k in ("event", "name") if k in event)
    return {f"{head}/{name}": float(value) for name, value in event.items()
            if isinstance(value, (int, float)) and name not in ("seconds", "step")}


def mirror(path: Path, log: Iterable[Mapping[str, Any]], names: Sequence[str]) -> int:
    """Copy events of a log to these services; returns how many of them failed."""
    services: dict[str, Any] = dict.fromkeys(names)
    config: dict[str, Any] = {}
    step, failed = 0, 0
    for event in log:
        kind, values, seconds = event["event"], numbers(event), event.get("seconds", 0.0)
        step = event.get("step", event.get("steps", step))
        if kind in ("start", "config"):  # what the run is; nothing to draw
            config.update({k: v for k, v in event.items() if k not in ("event", "seconds")})
            continue
        values["tokens"] = float(step * config.get("train_batch_tokens", 0))
        for name in list(services):
            try:
                if services[name] is None:
                    began = path.stat().st_mtime - seconds
                    services[name] = SERVICES[name](path, config, began)
                services[name].write(seconds, step, values)
            except Exception as error:
                failed += complain(name, error, path)
                del services[name]
    for name, service in services.items():
        try:
            if service is not None:
                service.close()
        except Exception as error:
            failed += complain(name, error, path)
    return failed


def complain(name: str, error: Exception, path: Path) -> int:
    """One line for a mirror that stopped; the run knows nothing of it."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    print(f"mirror: {name} stopped: {text}; the run is not affected, and './run.sh mirror {path} {name}' sends its "
          f"log later", file=sys.stderr, flush=True)
    return 1


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0 all went well, 1 a service failed."""
    run, *others = arguments or [""]
    follow = [int(match[1]) for part in others if (match := re.fullmatch(r"--follow=([0-9]+)", part))]
    names = [name for name in SERVICES if name in others]
    if not names or len(names) + len(follow) < len(others):
        raise ToolError("expected a run and where to copy it: " + " ".join(SERVICES))
    path = Path(run) if follow else find_log(run, log_folder())
    return int(readable(path, mirror, path, growing(path, follow[0]) if follow else events(path), names) > 0)


if __name__ == "__main__":
    sys.exit(program(main, "mirror", __doc__))
