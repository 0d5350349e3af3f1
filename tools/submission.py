"""Makes the folder of a submission from the logs of its runs, and checks any such folder, also other people's.

    python -m tools.submission submit NAME RUN... AUTHOR=.. GITHUB_ID=.. [BLURB=..] [TRACK=..] [SEEDS=n] [DATE=..]
                                      [BASELINE=folder] [SCRIPT=train_gpt.py] [ROOT=records]
    python -m tools.submission check FOLDER

RUN is the id of a run in LOG_DIR (logs), the path of its log, or a glob of either; its artifact lies where the run has
written it. The folder is ROOT/<track>/<date>_<name>/: `train_gpt.py` packed (these bytes are counted) and readable, the
logs of every seed, config.env, requirements.txt, audit.txt, submission.json and a README, all figures taken from the
logs. It appears only if every check passes. Exit status: 0 nothing refuted, 1 refuted, 2 cannot be done as asked.

Checks beside those of the audit (their codes A and S are `audit.py`'s):
  P1 files   P2 fields   P3 arithmetic   P4 figures against the logs   P5 one code, one config, one validation set
  P6 cap, clocks, seeds, machine   P7 packed and readable source   P8 README   P9 the report of the dynamic audit
"""
from __future__ import annotations

import ast
import contextlib
import datetime
import gc
import hashlib
import io
import json
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.common import ToolError, program
from tools.evidence import (
    CAP,
    CONDITIONS,
    ROOT,
    TOKENS_PER_BYTE,
    Finding,
    Findings,
    audit_log,
    dotted,
    failed,
    load_module,
    nodes_of,
    parsed,
    static_audit,
    table,
    unwrapped,
)
from tools.knobs import typed_text
from tools.logs import NO_RESULT, events, log_folder, log_paths, readable, split_options


class Track(NamedTuple):
    """What a leaderboard asks for beside the cap."""
    seconds: float
    """Limit of training, and again of evaluation."""
    seeds: int
    """Runs that it asks for."""
    device: str
    """Must be in the name of the accelerator."""
    world: int
    """Number of accelerators; 0: any."""


TRACKS = {"track_10min_16mb": Track(600.0, 3, "H100", 8), "track_non_record_16mb": Track(math.inf, 1, "", 0)}
PLACES = NO_RESULT | {"seed"}
"""Knobs in which the runs of one submission may differ."""
NUMBER = (int, float)
FIELDS = {"author": str, "github_id": str, "name": str, "date": str, "val_bpb": NUMBER}
"""Fields of submission.json without which a submission was never merged."""
USUAL = {"blurb": str, "val_loss": NUMBER, "bytes_total": int, "bytes_code": int}
"""The rest of the published minimum; merged ones lack some of them."""
WRONG_RATIOS = (0.2280, 0.2953, 0.3213, 0.363, 0.366, 1.0)
"""Tokens per byte of submissions whose bytes were counted wrongly."""
FOREIGN = {"val_bpb": r"val_bpb\s*[:=]\s*(\d\.\d+)", "bytes": r"submission size[^\n]*?:\s*([\d,]+)",
           "train": r"train_time:([\d.]+)ms", "eval": r"(?:ttt|exact|sliding)\w*\b[^\n]*eval_time:([\d.]+)ms"}
"""Figures in the text logs of the published scripts (the last of each counts)."""
OPTIONS = ("AUTHOR", "GITHUB_ID", "BLURB", "TRACK", "SEEDS", "DATE", "BASELINE", "SCRIPT", "ROOT")
"""What `submit` takes beside NAME and runs."""
Log = dict[str, dict[str, Any]]
"""The last event of each name in one run's JSON lines."""


class Refuted(ToolError):
    """A check or the audit speaks against the runs."""
    exit_code = 1


def read_log(path: Path) -> Log:
    """Return the last event of each name, in the order of their times: a run that goes on begins with `start` again."""
    log: Log = {}
    for event in events(path):
        log.pop(event["event"], None)
        log[event["event"]] = event
    return log


# -- what the logs say ----------------------------------------------------------------------------------


def measured(logs: Sequence[Log], audit: str) -> dict[str, Any]:
    """Return the fields of submission.json that are measured, from complete logs and the audit's last line."""
    results = {}
    for log in sorted(logs, key=lambda log: log["verdict"]["seed"]):
        verdict, train = log["verdict"], log["train_end"]
        results[str(verdict["seed"])] = {
            **{name: verdict[name] for name in ("val_loss", "val_bpb", "artifact_bytes", "steps", "ledger_sha256")},
            "step_avg_ms": round(1000 * train["train_seconds"] / train["steps"], 3),
            "train_wallclock_ms": round(1000 * verdict["train_seconds"]), "eval_time_s": verdict["eval_seconds"],
            "val_tokens": verdict["tokens"], "target_tokens": log["val_data"]["targets"],
            "val_bytes": verdict["bytes"], "artifact_sha256": log["artifact"]["sha256"],
            "pre_quant_val_bpb": verdict["diagnostic_evals"].get("ema"),
            "quantized_val_bpb": verdict["diagnostic_evals"].get("quantized")}
    columns = {name: [result[name] for result in results.values()] for name in next(iter(results.values()))}
    most = {f"{name}_max": max(columns[name]) for name in ("artifact_bytes", "train_wallclock_ms", "eval_time_s")}
    means = {f"{name}_mean": round(statistics.fmean(columns[name]), 3)
             for name in ("artifact_bytes", "steps", "step_avg_ms", "train_wallclock_ms", "eval_time_s")}
    for name in ("val_loss", "val_bpb"):
        means[name] = statistics.fmean(columns[name])
        means[f"{name}_std"] = statistics.stdev(columns[name]) if len(results) > 1 else None
    means["train_steps_mean"] = means.pop("steps_mean")
    start = logs[0]["start"]
    return {
        **means, **most, "seeds": [int(seed) for seed in results], "seed_results": results,
        "bytes_total": most["artifact_bytes_max"], "bytes_code": logs[0]["verdict"]["code_bytes"],
        "hardware": f"{start['world']}x {start['device']}", "pytorch_version": start["torch"],
        "compliance": {
            "artifact_under_16mb": most["artifact_bytes_max"] < CAP,
            "train_under_600s": most["train_wallclock_ms_max"] <= 600_000,
            "eval_under_600s": most["eval_time_s_max"] <= 600, "three_seeds": len(results) >= 3,
            "full_validation_targets": columns["val_tokens"] == columns["target_tokens"], "audit": audit},
        "logs": {f"seed{seed}": f"train_seed{seed}.log" for seed in results}}


def score_rows(told: Mapping[str, Any]) -> list[str]:
    """Return the README's headline and its table of seeds."""
    def digits(value: float | None) -> str:
        return "-" if value is None else f"{value:.5f}"

    lines = [f"# {told['name']}: val_bpb {told['val_bpb']:.5f}", "",
             "| seed | steps | ms/step | before quantization | quantized | **val_bpb** | val_loss | bytes | train s | "
             "eval s |", "|---|---|---|---|---|---|---|---|---|---|"]
    for seed, r in told["seed_results"].items():
        lines.append(f"| {seed} | {r['steps']:,} | {r['step_avg_ms']:.1f} | {digits(r['pre_quant_val_bpb'])} | "
                     f"{digits(r['quantized_val_bpb'])} | **{r['val_bpb']:.5f}** | {r['val_loss']:.5f} | "
                     f"{r['artifact_bytes']:,} | {r['train_wallclock_ms'] / 1000:.1f} | {r['eval_time_s']:.1f} |")
    lines.append(f"| mean | {told['train_steps_mean']:,.0f} | {told['step_avg_ms_mean']:.1f} | | | "
                 f"**{told['val_bpb']:.5f}** | {told['val_loss']:.5f} | {told['artifact_bytes_mean']:,.0f} | "
                 f"{told['train_wallclock_ms_mean'] / 1000:.1f} | {told['eval_time_s_mean']:.1f} |")
    lines.append(f"| sample std | | | | | {digits(told['val_bpb_std'])} | {digits(told['val_loss_std'])} | | | |")
    return lines


def readme(told: Mapping[str, Any], knobs: Sequence[str], start: Mapping[str, Any]) -> str:
    """Return README.md of the folder; every figure is the logs'."""
    command = "python train_gpt.py"
    if start["world"] > 1:
        command = f"torchrun --standalone --nproc_per_node={start['world']} train_gpt.py"
    said = {True: "yes", False: "NO"}
    claims = "\n".join(f"* {name.replace('_', ' ')}: {said.get(value, value)}"
                       for name, value in told["compliance"].items())
    against = ""
    if "comparison_baseline" in told:
        against = (f"\nAgainst {told['comparison_baseline']} ({told['comparison_baseline_bpb']:.5f}): "
                   f"{told['delta_vs_leaderboard_bpb']:+.5f} bpb.\n")
    return "\n".join(score_rows(told)) + f"""

{told['blurb']}
{against}
{told['hardware']}, torch {told['pytorch_version']}, Python {start['python']}, attention {start['attention']}. \
Training's time includes calibration and quantization; evaluation's begins with the opening of the artifact.

## Run it again

From this folder:

```
pip install -r requirements.txt
env $(grep -v '^#' config.env) DATA_DIR=../../../data SEED={told['seeds'][0]} {command}
```

What `config.env` changes: {', '.join(f'`{knob}`' for knob in knobs) or 'nothing'}.

## Compliance

Measured, not declared: from the logs, and `audit.txt` on the first seed's artifact.

{claims}

## Files

`train_gpt.py` is what is counted; `train_gpt_human.py` is the same program with its comments and docstrings. \
Each seed has its log as text and as JSON lines.
"""


# -- checks of submission.json --------------------------------------------------------------------------


def check(folder: Path) -> list[Finding]:
    """Return every finding on one folder. Raises `ToolError` where there is no folder."""
    if not folder.is_dir():
        raise ToolError(f"{folder}: no such folder")
    os.listdir(folder)  # raises where it cannot be read, which a glob does not
    texts = sorted(p for p in folder.rglob("*.txt") if not re.match("requirements|audit", p.name))
    logs, natives = sorted(folder.rglob("*.log")) + texts, sorted(folder.glob("*.jsonl"))
    sources, summaries = sorted(folder.glob("*.py")), sorted(folder.glob("submission*.json"))
    findings = Findings()
    for name, paths in {"README.md": folder.glob("README*"), "submission.json": summaries,
                        "train_gpt.py": folder.glob("train_gpt*.py"), "a log": logs + natives}.items():
        number = len(list(paths))
        findings.test("P1", "package", number, name, "missing: ruling Q", f"{number} there")
    told: dict[str, Any] = {}
    for path in summaries[:1]:
        try:
            told = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            findings.test("P2", "package", False, path.name, f"not JSON: {error}")
    track = TRACKS.get(folder.resolve().parent.name, TRACKS["track_non_record_16mb"])
    if told:
        findings += attempt(check_fields, told) + attempt(check_arithmetic, told, track)
    if natives:
        findings += attempt(check_logs, folder, natives, told, track)
    else:
        findings += attempt(check_foreign, logs, told, track)
    if sources:
        findings += attempt(static_audit, folder, {})
    return findings


def attempt(look: Callable[..., list[Finding]], *arguments: Any) -> list[Finding]:
    """Return the findings of one look at a stranger's files; that it cannot be made is one, too."""
    try:
        return readable(look.__name__, look, *arguments)
    except ToolError as error:
        return [Finding("P2", "package", False, look.__name__, str(error))]


def check_fields(told: Mapping[str, Any]) -> Findings:
    """P2: fields of submission.json, there and of their kind; only the indispensable ones fail."""
    findings = Findings()
    for name, kind in {**FIELDS, **USUAL}.items():
        value = told.get(name)
        ok = isinstance(value, kind) and value != "" and (name != "date" or re.match(r"\d{4}-\d\d-\d\d", value))
        findings.test("P2", "package", ok, f"{name}={value!r}"[:60], "missing or malformed in submission.json",
                      suspect=name in USUAL)
    return findings


def seed_results(told: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the results by seed; published files have them under either name."""
    results = told.get("seed_results") or told.get("seeds") or {}
    return {str(k): r for k, r in results.items() if isinstance(r, dict)} if isinstance(results, dict) else {}


def check_arithmetic(told: Mapping[str, Any], track: Track) -> Findings:
    """P3, P6: submission.json against itself, the cap, the clocks and the track's number of seeds."""
    findings, results, seeds = Findings(), seed_results(told), told.get("seeds") or []

    def test(code: str, ok: object, figures: str, wrong: str, suspect: bool = False) -> None:
        findings.test(code, "accounting", ok, figures, wrong, suspect=suspect)

    bpb, loss = told.get("val_bpb"), told.get("val_loss")
    if bpb and loss:
        ratio = bpb * math.log(2) / loss
        own = [r["val_tokens"] / r["val_bytes"] for r in results.values() if r.get("val_bytes")]
        if own:
            published, wrong = True, not math.isclose(ratio, statistics.fmean(own), rel_tol=1e-4)
        else:
            published, wrong = any(math.isclose(ratio, r, rel_tol=1e-3) for r in TOKENS_PER_BYTE.values()), False
        wrong |= any(abs(ratio - bad) < 6e-4 for bad in WRONG_RATIOS)
        text = "this ratio comes from wrongly counted bytes: ruling O" if wrong else \
            "no published tokenizer has this ratio"
        test("P3", published and not wrong, f"tokens_per_byte={ratio:.5f}", text, suspect=not wrong)
    if results and seeds:
        listed = {str(seed) for seed in seeds}
        test("P3", listed == set(results), f"seeds={','.join(sorted(listed))} results={','.join(sorted(results))}",
             "seeds and seed_results disagree: ruling Q")
    for name in ("val_bpb", "val_loss"):
        each = [r[name] for r in results.values() if isinstance(r.get(name), NUMBER)]
        if not told.get(name) or not len(each) == len(results) > 0:
            continue
        mean, std = statistics.fmean(each), told.get(f"{name}_std")
        test("P3", near(mean, told[name]), f"{name}={told[name]} mean={mean:.8f}",
             "is not the mean of the seeds: ruling Q")
        if std is not None and len(each) > 1:
            test("P3", near(statistics.stdev(each), std), f"{name}_std={std} sample={statistics.stdev(each):.6f}",
                 "not the sample standard deviation", suspect=near(statistics.pstdev(each), std))
    names = ("artifact_bytes", "bytes_total", "artifact_bytes_max")
    sizes = [r[name] for r in (*results.values(), told) for name in names if isinstance(r.get(name), int)]
    if sizes:
        test("P6", max(sizes) < CAP, f"bytes={max(sizes):,} cap={CAP:,}", "over the cap: ruling Q")
        test("P3", told.get("bytes_total", max(sizes)) == max(sizes), f"bytes_total={told.get('bytes_total')} "
             f"largest={max(sizes)}", "a seed is larger than bytes_total", suspect=max(sizes) < CAP)
    for name in ("train_wallclock_ms", "train_time_ms", "eval_time_s", "ttt_time_ms"):
        unit = 1000 if name.endswith("_ms") else 1
        slowest = max((r[name] / unit for r in results.values() if r.get(name)), default=0.0)
        if slowest:
            test("P6", slowest <= track.seconds, f"{name}={slowest:.1f}s of {track.seconds:g}s",
                 "over the clock: rulings I, J")
    for seed, r in results.items():
        if {"steps", "step_avg_ms", "train_wallclock_ms"} <= set(r):
            took, said = r["steps"] * r["step_avg_ms"], r["train_wallclock_ms"]
            test("P3", took <= 1.01 * said, f"seed={seed} steps*step_avg_ms={took:,.0f} train_wallclock_ms={said:,}",
                 "more steps than the clock allows")
    number, claims = max(len(results), len(seeds)), told.get("compliance")
    if isinstance(claims, dict) and claims.get("three_seeds") is True:
        test("P3", number >= 3, f"three_seeds=true seeds={number}", "fewer seeds than said: ruling Q")
    test("P6", number >= track.seeds, f"seeds={number} asked={track.seeds}",
         "fewer seeds than the track asks for: ruling Q", suspect=not number)
    base, delta = told.get("comparison_baseline_bpb"), told.get("delta_vs_leaderboard_bpb")
    if bpb and base and delta:
        test("P3", near(bpb - base, delta), f"delta={delta} difference={bpb - base:.5f}",
             "the difference to the baseline is another")
    return findings


def near(true: float, told: float, most: int = 6) -> bool:
    """Return whether `told` is `true` as far as it is written out (at most so many digits)."""
    return abs(true - told) <= 0.6 * 10.0 ** -min(len(repr(told).partition(".")[2]), most)


# -- checks against the logs ----------------------------------------------------------------------------

EVENTS = ("start", "config", "train_end", "artifact", "val_data", "verdict")
"""What the log of a whole run has."""


def check_logs(folder: Path, paths: Sequence[Path], told: Mapping[str, Any], track: Track) -> Findings:
    """P1, P4..P9 and A1..A4 on the logs of this program."""
    findings = Findings()
    logs = {path.name: read_log(path) for path in paths}
    for name, log in logs.items():
        lost = [event for event in EVENTS if event not in log]
        findings.test("P1", "package", not lost, name,
                      f"no {', '.join(lost)}: unfinished, damaged, or a run that did not train")
        order = [*log]
        if "error" in log and order.index("error") > ([*log, "start"]).index("start"):  # it did not go on after it
            findings.test("P1", "package", False, name, f"the run ended in an error: {log['error'].get('text')}")
        if not lost:
            findings += [f._replace(figures=f"{name}: {f.figures}")
                         for f in audit_log(folder / name, None, seconds=track.seconds)]
    if all(set(EVENTS) <= set(log) for log in logs.values()):
        verdicts = (folder / "audit.txt").read_text(encoding="utf-8") if (folder / "audit.txt").is_file() else ""
        verdict = next((line for line in reversed(verdicts.splitlines()) if line.startswith("verdict ")), "")
        passed = all(f"{condition}=pass" in verdict for condition in CONDITIONS) and " FAIL " not in verdicts
        findings.test("P9", "C1", passed, f"audit.txt: {verdict or 'missing'}",
                      "the dynamic audit has failed, or was not made")
        expected = measured(list(logs.values()), verdict)
        findings += check_runs(logs, track) + check_texts(folder, logs, told, expected)
        findings += check_figures(told, expected) + check_sources(folder, list(logs.values())[0])
    return findings


def check_runs(logs: Mapping[str, Log], track: Track) -> Findings:
    """P4..P6: one code, config, validation set and machine; each seed once; clocks, and every target scored."""
    findings, every = Findings(), list(logs.values())
    seeds = [log["verdict"]["seed"] for log in every]
    findings.test("P4", "accounting", len(set(seeds)) == len(seeds), f"seeds={','.join(map(str, seeds))}",
                  "one seed in two logs: ruling Q")
    configs = [{k: v for k, v in log["config"].items() if k not in (*PLACES, "seconds", "event")} for log in every]
    odd = sorted({k for config in configs for k in config if config.get(k) != configs[0].get(k)})
    for what, ruling, values in (
            ("code hash", "Q", [log["start"]["code_sha256"] for log in every]),
            (f"config ({','.join(odd)})", "Q", configs),
            ("validation set", "N, O", [[log["val_data"][k] for k in ("documents", "targets", "bytes")]
                                        for log in every]),
            ("machine", "Q", [[log["start"]["world"], log["start"]["device"]] for log in every])):
        distinct = {json.dumps(value, sort_keys=True) for value in values}
        findings.test("P5", "accounting", len(distinct) == 1, f"{what}: {len(distinct)} in {len(values)} logs",
                      f"mixed {what}: ruling {ruling}")
    world, device = every[0]["start"]["world"], every[0]["start"]["device"]
    findings.test("P6", "accounting", track.device in device and track.world in (0, world),
                  f"machine={world}x {device}",
                  f"the track wants {track.world}x {track.device}; submit with TRACK=track_non_record_16mb")
    for name, log in logs.items():
        verdict, targets = log["verdict"], log["val_data"]["targets"]
        for budget in ("train", "eval"):
            spent = verdict[f"{budget}_seconds"]
            findings.test("P6", "accounting", spent <= track.seconds,
                          f"{name}: {budget}={spent:.1f}s of {track.seconds:g}s", "over the clock: rulings I, J")
        findings.test("P4", "accounting", verdict["tokens"] == targets, f"{name}: scored={verdict['tokens']:,}",
                      f"of {targets:,} targets: ruling B")
    return findings


def differences(told: Any, logs: Any, name: str) -> Iterator[str]:
    """Say where figures disagree; objects are compared field by field, numbers to six digits."""
    if isinstance(told, dict) and isinstance(logs, dict):
        for key in {**told, **logs}:
            yield from differences(told.get(key), logs.get(key), f"{name}.{key}".lstrip("."))
    elif not alike(told, logs):
        yield f"{name}={json.dumps(told)[:40]} logs={json.dumps(logs)[:40]}"


def alike(a: Any, b: Any) -> bool:
    """Return whether two figures are equal, or both numbers and equal to six digits."""
    numbers = all(isinstance(v, NUMBER) and not isinstance(v, bool) for v in (a, b))
    return math.isclose(a, b, rel_tol=1e-6) if numbers else a == b


def check_figures(told: Mapping[str, Any], expected: Mapping[str, Any]) -> Findings:
    """P4: submission.json against what the logs say."""
    findings = Findings()
    wrong = list(differences({name: told.get(name) for name in expected}, expected, ""))
    for text in wrong:
        findings.test("P4", "accounting", False, text, "submission.json disagrees with the logs: ruling Q")
    if not wrong:
        findings.test("P4", "accounting", True, f"{len(expected)} fields of submission.json are the logs'", "")
    return findings


def check_sources(folder: Path, log: Log) -> Findings:
    """P7: the sources are the code that was run and counted, and one program."""
    findings = Findings()
    script, human = folder / "train_gpt.py", folder / "train_gpt_human.py"
    sources = [path.read_bytes() for path in (script, human) if path.is_file()]
    claimed = log["start"]["code_sha256"]
    findings.test("P7", "accounting", any(hashlib.sha256(data).hexdigest().startswith(claimed) for data in sources),
                  f"code_sha256={claimed[:16]}", "neither source here is the one that the runs logged: ruling Q")
    if script.is_file():
        size, counted = script.stat().st_size, log["verdict"]["code_bytes"]
        findings.test("P7", "accounting", size == counted, f"train_gpt.py={size:,} counted={counted:,} bytes",
                      "not the bytes that the runs counted: ruling Q")
    if len(sources) == 2:
        findings.test("P7", "accounting", same_program(*sources), "train_gpt.py, train_gpt_human.py",
                      "are two programs")
    return findings


def same_program(packed: bytes, human: bytes) -> bool:
    """Return whether two sources differ in packing, docstrings and comments alone (compared as syntax trees).

    The trainer packs in this way, too; to ask it would import torch.
    """
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, list) and isinstance(b, list):  # a statement that is a constant alone is a docstring or `pass`
            a, b = ([x for x in part if not isinstance(x, ast.Pass) and not (
                isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))] for part in (a, b))
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, ast.AST):
            return type(a) is type(b) and all(same(getattr(a, name), getattr(b, name)) for name in a._fields)
        return type(a) is type(b) and a == b

    try:
        return same(parsed(unwrapped(packed)), parsed(unwrapped(human)))
    except (SyntaxError, ValueError, RecursionError):
        return False


def check_texts(folder: Path, logs: Mapping[str, Log], told: Mapping[str, Any], expected: Mapping[str, Any]
                ) -> Findings:
    """P1, P4, P8: text logs, README.md, config.env and requirements.txt against the logs."""
    findings = Findings()
    config = next(iter(logs.values()))["config"]
    for name, log in logs.items():
        path, bpb = folder / Path(name).with_suffix(".log"), log["verdict"]["val_bpb"]
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        verdict = re.search(r"verdict +val_bpb=(\S+)", text)
        findings.test("P4", "accounting", verdict and math.isclose(float(verdict[1]), bpb, rel_tol=1e-6), path.name,
                      f"{name} says val_bpb={bpb:.7g}")
    page = folder / "README.md"
    if page.is_file() and told.get("name"):
        text = page.read_text(encoding="utf-8")
        lost = [row for row in score_rows({**expected, "name": told["name"]}) if row not in text]
        findings.test("P8", "package", not lost, "README.md", f"lacks what the logs say: {''.join(lost[:1])}")
    path, stray = folder / "config.env", ["missing"]
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        stray = [line for line in lines if line and not line.startswith("#") and not agrees(line, config)]
    findings.test("P8", "package", not stray, "config.env", f"is not the config of the logs: {''.join(stray[:1])}")
    findings.test("P1", "package", (folder / "requirements.txt").is_file(), "requirements.txt", "missing")
    return findings


def agrees(line: str, config: Mapping[str, Any]) -> bool:
    """Return whether a line KNOB=value of config.env is what the config of a log says."""
    name, _, text = line.partition("=")
    value = typed_text(config.get(name.lower()))
    with contextlib.suppress(ValueError):
        return float(text) == float(value)
    return text == value


def check_foreign(paths: Sequence[Path], told: Mapping[str, Any], track: Track) -> Findings:
    """P4, P6 on the text logs of other programs: are the scores in them, are they within cap and clocks?"""
    findings, figures = Findings(), {}
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        figures[path.name] = {name: [float(x.replace(",", "")) for x in re.findall(pattern, text)]
                              for name, pattern in FOREIGN.items()}
    scores = [x for own in figures.values() for x in own["val_bpb"]]
    claims = {f"seed {seed}": r["val_bpb"] for seed, r in seed_results(told).items() if r.get("val_bpb")}
    if not claims and isinstance(told.get("val_bpb"), NUMBER):
        claims = {"headline": told["val_bpb"]}
        finals = [own["val_bpb"][-1] for own in figures.values() if own["val_bpb"]]
        scores += [statistics.fmean(finals)] if finals else []
    for who, value in claims.items():
        findings.test("P4", "accounting", any(near(x, value, 4) for x in scores), f"{who}: val_bpb={value}",
                      "is in no log: ruling Q" if scores else "the logs name no val_bpb", suspect=not scores)
    for name, limit, ruling in (("bytes", CAP - 1, "Q"), ("train", 1000 * track.seconds, "I"),
                                ("eval", 1000 * track.seconds, "J")):
        for log, own in figures.items():
            if own[name] and own[name][-1] > limit:
                findings.test("P6", "accounting", False, f"{log}: {name}={own[name][-1]:,.0f} limit={limit:,.0f}",
                              f"over the limit: ruling {ruling}")
    return findings


# -- submit ---------------------------------------------------------------------------------------------


def config_lines(module: Any, config: Mapping[str, Any]) -> list[str]:
    """Return KNOB=value for what differs from the preset, which itself is named where it is not the default."""
    base = module.PRESETS[config["preset"]]
    lines = [] if config["preset"] == "record" else [f"PRESET={config['preset']}"]
    for name in module.kinds(module.Config):
        default = base.get(name, getattr(module.Config, name))
        if name not in PLACES and name != "preset" and config[name] != default:
            lines.append(f"{name.upper()}={typed_text(config[name])}")
    return lines


def dynamic_audit(artifact: Path, log: Path, config: Mapping[str, Any], script: Path, seconds: float) -> str:
    """Return the report of `audit.py` on one artifact under its run's knobs and its track's budgets of `seconds`.

    Raises `Refuted` if it refutes the score.
    """
    from tools import audit
    machine = ("device", "dtype", "compile", "attention", "kernels", "run_id", "eval_only", "seconds", "event")
    knobs = [f"{name.upper()}={typed_text(value)}" for name, value in config.items() if name not in machine]
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(io.StringIO()):
        status = audit.main([str(artifact), f"LOG={log}", f"BUDGET={seconds:g}", f"SCRIPT={script}", *knobs])
    if status:
        raise Refuted(f"{artifact}: the audit refutes the score:\n{screen.getvalue()}".rstrip())
    return screen.getvalue()


def pick_track(options: Mapping[str, str], logs: Sequence[Log]) -> str:
    """Return the track that is asked for, or the one of this machine. Raises `ToolError` for too few runs."""
    record, start = TRACKS["track_10min_16mb"], logs[0]["start"]
    fits = record.device in start["device"] and start["world"] == record.world
    name = options.get("TRACK") or ("track_10min_16mb" if fits else "track_non_record_16mb")
    if name not in TRACKS:
        raise ToolError(f"TRACK={name}: expected one of {', '.join(TRACKS)}")
    seeds = options.get("SEEDS", str(TRACKS[name].seeds))
    if not seeds.isdecimal() or len(logs) < int(seeds):
        raise ToolError(f"SEEDS={seeds}: runs given: {len(logs)}; train the other seeds, or say fewer, "
                        f"SEEDS={len(logs)}")
    return name


def packed_source(script: Path, path: Path, log: Log) -> bytes:
    """Return the script as it is shipped. Raises `ToolError` where it is not what the run of this log was."""
    start, counted = log["start"], log["verdict"]["code_bytes"]
    if not hashlib.sha256(script.read_bytes()).hexdigest().startswith(start["code_sha256"]):
        raise ToolError(f"{script}: is not the code of {path} (SHA-256 {start['code_sha256'][:16]}...); check out the "
                        f"commit that was run, or give that script as SCRIPT=")
    packed = load_module(script).shipped_source(script)
    if len(packed) != counted:
        raise ToolError(f"{script}: packs to {len(packed):,} bytes here, the runs counted {counted:,} under Python "
                        f"{start['python']}; submit with that")
    return packed


def artifact_of(path: Path, log: Log) -> Path:
    """Return the artifact of a run: where it was written, or next to its log. Raises `ToolError` if it is gone."""
    for place in (Path(log["artifact"]["path"]), path.with_suffix(".bin")):
        if place.is_file():
            if hashlib.sha256(place.read_bytes()).hexdigest() != log["artifact"]["sha256"]:
                raise ToolError(f"{place}: is not the artifact that {path} scored (SHA-256 differs)")
            return place
    raise ToolError(f"{log['artifact']['path']}: the artifact of {path} is gone; it is needed for the audit")


def against(folder: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of submission.json that compare with another submission's folder."""
    try:
        base = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
        bpb = float(base["val_bpb"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ToolError(f"BASELINE={folder}: no submission.json with a val_bpb there ({error})") from None
    fields = {"comparison_baseline": base.get("name", folder.name), "comparison_baseline_bpb": bpb,
              "delta_vs_leaderboard_bpb": told["val_bpb"] - bpb}
    if base.get("val_loss"):
        fields |= {"comparison_baseline_loss": base["val_loss"],
                   "delta_vs_leaderboard_nats": told["val_loss"] - base["val_loss"]}
    return fields


def requirements(source: bytes, pinned: str) -> str:
    """Return those of the pinned requirements that the script imports."""
    nodes = [n for n in nodes_of(parsed(unwrapped(source))) if isinstance(n, (ast.Import, ast.ImportFrom))]
    packages = {name for node in nodes for name in dotted(node)}
    return "\n".join(line for line in pinned.splitlines() if re.split(r"[=<>; ]", line)[0] in packages) + "\n"


def refuse(findings: Sequence[Finding]) -> None:
    """Raise `Refuted` with every finding that fails."""
    bad = [f"  {f.code} {f.figures}: {f.text}" for f in findings if f.failed]
    if bad:
        raise Refuted("\n".join(["nothing was made; refused for:", *bad]))


def alone(log: Log) -> str:
    """Return the README of one run without a name: whatever a submission tells of a log is read."""
    return readme({"name": "", "blurb": "", **measured([log], "")}, [], log["start"])


def submit(name: str, runs: Sequence[str], options: Mapping[str, str]) -> Path:
    """Make the new folder, complete and checked. Raises `ToolError` and leaves nothing where anything is wrong."""
    for key in ("AUTHOR", "GITHUB_ID"):
        if not options.get(key):
            raise ToolError(f"{key}= is missing: it goes into submission.json, such as AUTHOR='Ada Lovelace' "
                            f"GITHUB_ID=ada")
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ToolError(f"{name!r}: expected a name of letters, digits, _ . + - for the folder")
    paths = [path for run in runs for path in log_paths(run, log_folder())]
    logs = [read_log(path) for path in paths]
    for path, log in zip(paths, logs):
        if not set(EVENTS) <= set(log):
            raise ToolError(f"{path}: no log of a whole run (training, artifact, score); run it to its end")
        readable(path, alone, log)
    track = pick_track(options, logs)
    script = Path(options.get("SCRIPT", ROOT / "train_gpt.py"))
    date = options.get("DATE") or datetime.date.today().isoformat()
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise ToolError(f"DATE={date}: expected such as 2026-04-27")
    folder = Path(options.get("ROOT", ROOT / "records")) / track / f"{date}_{name}"
    if folder.exists():
        raise ToolError(f"{folder}: exists already; choose another NAME or remove it")
    place = next(path for path in folder.absolute().parents if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ToolError(f"{folder}: cannot be made in {place}; choose another ROOT")
    artifacts = [readable(path, artifact_of, path, log) for path, log in zip(paths, logs)]
    files: dict[str, str | bytes] = {}
    for path, log in zip(paths, logs):
        stem = f"train_seed{log['verdict']['seed']}"
        if f"{stem}.jsonl" in files:
            raise ToolError(f"{path}: a second run of one seed; a submission has one run of each seed")
        files |= {f"{stem}.jsonl": path.read_bytes(), f"{stem}.log": path.with_suffix(".txt").read_bytes()}
    seconds = TRACKS[track].seconds
    # Before the audit of the artifact, which takes minutes.
    refuse([f for path in paths for f in readable(path, lambda p: audit_log(p, None, seconds=seconds), path)])
    config = logs[0]["config"]
    told = {"author": options["AUTHOR"], "github_id": options["GITHUB_ID"], "name": name.replace("_", " "),
            "blurb": options.get("BLURB", f"{logs[0]['verdict']['parameters']:,} parameters, preset "
                                          f"{config['preset']}."),
            "date": date, "track": track.removeprefix("track_"),
            **measured(logs, "")}
    if "BASELINE" in options:
        told |= against(Path(options["BASELINE"]), told)
    step(f"1 of 3: packing {script}")
    packed = packed_source(script, paths[0], logs[0])
    source, knobs = script.read_bytes(), readable(paths[0], config_lines, load_module(script), config)
    step(f"2 of 3: auditing {artifacts[0]}, which is scored again, whole and changed; it may take minutes")
    report = dynamic_audit(artifacts[0], paths[0], config, script, seconds)
    told["compliance"]["audit"] = report.rstrip().rpartition("\n")[2]
    files |= {"train_gpt.py": packed, "audit.txt": report, "config.env": "\n".join(knobs) + "\n",
              "requirements.txt": requirements(source, (ROOT / "requirements.txt").read_text(encoding="utf-8")),
              "submission.json": json.dumps(told, indent=2) + "\n",
              "README.md": readme(told, knobs, logs[0]["start"])}
    if packed != source:
        files["train_gpt_human.py"] = source
    step(f"3 of 3: checking what goes to {folder}")
    publish(folder, files)
    return folder


def step(text: str) -> None:
    """Say on stderr what is done next, before it takes its time."""
    print(f"submission.py: {text}", file=sys.stderr, flush=True)


def publish(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write the folder, check it, and move it to its place whole. Raises `Refuted` and leaves nothing otherwise."""
    with tempfile.TemporaryDirectory() as room:
        draft = Path(room) / folder.parent.name / folder.name  # the folder's parent names the track
        draft.mkdir(parents=True)
        for name, content in files.items():
            (draft / name).write_bytes(content.encode() if isinstance(content, str) else content)
        refuse(check(draft))
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.copytree(draft, temporary)
        os.replace(temporary, folder)


def main(arguments: Sequence[str]) -> int:
    """Return 0 where nothing is refuted, 1 where something is."""
    verb, *rest = arguments or [""]
    if verb == "check" and len(rest) == 1:
        findings = check(Path(rest[0]))
        print(table(findings, ("package", *CONDITIONS)))
        return failed(findings)
    names, options = split_options(rest, OPTIONS)
    if verb == "submit" and len(names) > 1:
        folder = submit(names[0], names[1:], options)
        print(f"{folder}\nEvery check passes. Read README.md, say what is new, and check it again: "
              f"./run.sh check {folder}")
        return 0
    raise ToolError(f"{' '.join(arguments)}: expected check FOLDER, or submit NAME RUN ... AUTHOR=.. GITHUB_ID=..")


if __name__ == "__main__":
    gc.disable()  # syntax trees are many objects that all stay: looking for dead ones takes half of the time
    sys.exit(program(main, "submission.py", __doc__))
