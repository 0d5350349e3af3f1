"""Makes the folder of a submission from the logs of its runs, and checks any such folder, also other people's.

    python records/submission.py submit NAME RUN... AUTHOR=.. GITHUB_ID=.. [BLURB=..] [TRACK=..] [SEEDS=n] [DATE=..]
                                        [BASELINE=folder] [SCRIPT=train_gpt.py] [ROOT=records]
    python records/submission.py check FOLDER

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.evidence import (
    CAP,
    CONDITIONS,
    ROOT,
    TOKENS_PER_BYTE,
    AuditError,
    Finding,
    audit_log,
    failed,
    load_module,
    readable,
    static_audit,
    table,
    unwrapped,
)
from tools.logs import NO_RESULT, InputError, events, log_folder, log_paths, split_options, text_of


class Track(NamedTuple):
    """What a leaderboard asks for beside the cap."""
    seconds: float
    """Limit of training, and again of evaluation."""
    seeds: int
    """Runs that it wants."""
    device: str
    """Must be in the name of the accelerator."""
    world: int
    """Number of accelerators; 0: any."""


TRACKS = {"track_10min_16mb": Track(600.0, 3, "H100", 8), "track_non_record_16mb": Track(math.inf, 1, "", 0)}
PLACES = NO_RESULT | {"seed", "threads"}
"""Knobs in which the runs of one submission may differ."""
FIELDS = {"author": str, "github_id": str, "name": str, "date": str, "val_bpb": (int, float)}
"""Fields of submission.json without which a submission was never merged."""
USUAL = {"blurb": str, "val_loss": (int, float), "bytes_total": int, "bytes_code": int}
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


class Refuted(AuditError):
    """A check or the audit speaks against the runs; exit status 1."""


def read_log(path: Path) -> Log:
    """The last event of each name, in the order of their times: a run that goes on begins with `start` again."""
    found: Log = {}
    for event in events(path):
        found.pop(event["event"], None)
        found[event["event"]] = event
    return found


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; none of one value."""
    return statistics.stdev(values) if len(values) > 1 else None


# -- what the logs say ----------------------------------------------------------------------------------


def measured(logs: Sequence[Log], audit: str) -> dict[str, Any]:
    """The fields of submission.json that are measured, from complete logs and the last line of the audit's report."""
    logs = sorted(logs, key=lambda log: log["verdict"]["seed"])
    results = {str(log["verdict"]["seed"]): {
        **{name: log["verdict"][name] for name in ("val_loss", "val_bpb", "artifact_bytes", "steps")},
        "step_avg_ms": round(1000 * log["train_end"]["train_seconds"] / log["train_end"]["steps"], 3),
        "train_wallclock_ms": round(1000 * log["verdict"]["train_seconds"]),
        "eval_time_s": log["verdict"]["eval_seconds"], "val_tokens": log["verdict"]["tokens"],
        "target_tokens": log["val_data"]["targets"], "val_bytes": log["verdict"]["bytes"],
        "pre_quant_val_bpb": log["verdict"]["ladder"].get("ema"),
        "quantized_val_bpb": log["verdict"]["ladder"].get("quantized"),
        "artifact_sha256": log["artifact"]["sha256"], "ledger_sha256": log["verdict"]["ledger_sha256"],
    } for log in logs}

    def column(name: str) -> list[float]:
        return [result[name] for result in results.values()]

    start = logs[0]["start"]
    return {
        "val_loss": statistics.fmean(column("val_loss")), "val_bpb": statistics.fmean(column("val_bpb")),
        "val_loss_std": spread(column("val_loss")), "val_bpb_std": spread(column("val_bpb")),
        "seeds": [int(seed) for seed in results], "seed_results": results,
        "artifact_bytes_mean": round(statistics.fmean(column("artifact_bytes"))),
        "artifact_bytes_max": max(column("artifact_bytes")), "bytes_total": max(column("artifact_bytes")),
        "bytes_code": logs[0]["verdict"]["code_bytes"],
        "train_steps_mean": round(statistics.fmean(column("steps")), 2),
        "step_avg_ms_mean": round(statistics.fmean(column("step_avg_ms")), 3),
        "train_wallclock_ms_mean": round(statistics.fmean(column("train_wallclock_ms"))),
        "train_wallclock_ms_max": max(column("train_wallclock_ms")),
        "eval_time_s_mean": round(statistics.fmean(column("eval_time_s")), 3),
        "eval_time_s_max": max(column("eval_time_s")),
        "hardware": f"{start['world']}x {start['device']}", "pytorch_version": start["torch"],
        "compliance": {
            "artifact_under_16mb": max(column("artifact_bytes")) < CAP,
            "train_under_600s": max(column("train_wallclock_ms")) <= 600_000,
            "eval_under_600s": max(column("eval_time_s")) <= 600, "three_seeds": len(results) >= 3,
            "full_validation_targets": column("val_tokens") == column("target_tokens"), "audit": audit},
        "logs": {f"seed{seed}": f"train_seed{seed}.log" for seed in results}}


def rows_of(told: Mapping[str, Any]) -> list[str]:
    """The README's headline and its table of seeds."""
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.5f}"

    lines = [f"# {told['name']}: val_bpb {told['val_bpb']:.5f}", "",
             "| seed | steps | ms/step | before quantization | quantized | **val_bpb** | val_loss | bytes | train s | "
             "eval s |", "|---|---|---|---|---|---|---|---|---|---|"]
    for seed, r in told["seed_results"].items():
        lines.append(f"| {seed} | {r['steps']:,} | {r['step_avg_ms']:.1f} | {shown(r['pre_quant_val_bpb'])} | "
                     f"{shown(r['quantized_val_bpb'])} | **{r['val_bpb']:.5f}** | {r['val_loss']:.5f} | "
                     f"{r['artifact_bytes']:,} | {r['train_wallclock_ms'] / 1000:.1f} | {r['eval_time_s']:.1f} |")
    lines.append(f"| mean | {told['train_steps_mean']:,.0f} | {told['step_avg_ms_mean']:.1f} | | | "
                 f"**{told['val_bpb']:.5f}** | {told['val_loss']:.5f} | {told['artifact_bytes_mean']:,} | "
                 f"{told['train_wallclock_ms_mean'] / 1000:.1f} | {told['eval_time_s_mean']:.1f} |")
    lines.append(f"| sample std | | | | | {shown(told['val_bpb_std'])} | {shown(told['val_loss_std'])} | | | |")
    return lines


def readme(told: Mapping[str, Any], knobs: Sequence[str], start: Mapping[str, Any]) -> str:
    """README.md of the folder; every figure is the logs'."""
    command = "python train_gpt.py" if start["world"] == 1 else \
        f"torchrun --standalone --nproc_per_node={start['world']} train_gpt.py"
    claims = [f"* {name.replace('_', ' ')}: {'yes' if value is True else 'NO' if value is False else value}"
              for name, value in told["compliance"].items()]
    against = [f"Against {told['comparison_baseline']} ({told['comparison_baseline_bpb']:.5f}): "
               f"{told['delta_vs_leaderboard_bpb']:+.5f} bpb.", ""] if "comparison_baseline" in told else []
    return "\n".join([
        *rows_of(told), "", told["blurb"], "", *against,
        f"{told['hardware']}, torch {told['pytorch_version']}, Python {start['python']}, attention "
        f"{start['attention']}. Training's time includes calibration and quantization; evaluation's begins with the "
        f"opening of the artifact.", "", "## Run it again", "", "From this folder:", "", "```", "pip install -r "
        f"requirements.txt\nenv $(grep -v '^#' config.env) DATA_DIR=../../../data SEED={told['seeds'][0]} {command}",
        "```", "", "What `config.env` changes: " + (", ".join(f"`{knob}`" for knob in knobs) or "nothing") + ".", "",
        "## Compliance", "", "Measured, not declared: from the logs, and `audit.txt` on the first seed's artifact.", "",
        *claims, "", "## Files", "",
        "`train_gpt.py` is what is counted; `train_gpt_human.py` is the same program with its comments and docstrings. "
        "Each seed has its log as text and as JSON lines.", ""])


# -- checks ---------------------------------------------------------------------------------------------


def check(folder: Path) -> list[Finding]:
    """Every finding on one folder. Raises `AuditError` where there is no folder."""
    if not folder.is_dir():
        raise AuditError(f"{folder}: no such folder")
    named = {"README.md": "README*", "submission.json": "submission*.json", "train_gpt.py": "train_gpt*.py",
             "a log": "**/*.log"}
    found = {name: sorted(folder.glob(pattern)) for name, pattern in named.items()}
    natives = sorted(folder.glob("*.jsonl"))
    found["a log"] += sorted(p for p in folder.rglob("*.txt") if not re.match("requirements|audit", p.name))
    findings = [Finding("P1", "package", bool(paths or (name == "a log" and natives)), name,
                        f"{len(paths)} there" if paths else "missing: ruling Q") for name, paths in found.items()]
    told: dict[str, Any] = {}
    for path in found["submission.json"][:1]:
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(told, dict):
                raise ValueError("no object")
        except (ValueError, RecursionError) as error:
            told = {}
            findings.append(Finding("P2", "package", False, path.name, f"not JSON: {error}"))
    track = TRACKS.get(folder.resolve().parent.name, TRACKS["track_non_record_16mb"])
    if told:
        findings += attempt(check_fields, told) + attempt(check_arithmetic, told, track)
    findings += attempt(check_logs, folder, natives, told, track) if natives else \
        attempt(check_foreign, found["a log"], told, track)
    if found["train_gpt.py"]:
        findings += attempt(static_audit, folder, {})
    return findings


def attempt(look: Callable[..., list[Finding]], *given: Any) -> list[Finding]:
    """The findings of one look at a stranger's files; that it cannot be made is one, too."""
    try:
        return readable(look.__name__, look, *given)
    except AuditError as error:
        return [Finding("P2", "package", False, look.__name__, str(error))]


def check_fields(told: Mapping[str, Any]) -> list[Finding]:
    """P2: fields of submission.json, there and of their kind; only the indispensable ones fail."""
    findings = []
    for name, kind in {**FIELDS, **USUAL}.items():
        value = told.get(name)
        ok = isinstance(value, kind) and value != ""
        if name == "date" and ok:
            ok = re.fullmatch(r"\d{4}-\d\d-\d\d.*", value) is not None
        if not ok:
            findings.append(Finding("P2", "package", False, f"{name}={value!r}", "missing or malformed in "
                                    "submission.json", suspect=name in USUAL))
    return findings or [Finding("P2", "package", True, "submission.json", "has the fields that are asked for")]


def collector(findings: list[Finding]) -> Callable[..., None]:
    """A function that appends one finding to the list; its text is what is wrong where it is not ok."""
    def test(code: str, ok: bool, figures: str, wrong: str, condition: str = "accounting", suspect: bool = False
             ) -> None:
        findings.append(Finding(code, condition, ok, figures, "" if ok else wrong, suspect))
    return test


def check_arithmetic(told: Mapping[str, Any], track: Track) -> list[Finding]:
    """P3, P6: submission.json against itself, the cap, the clocks and the track's number of seeds."""
    findings: list[Finding] = []
    test = collector(findings)
    seeds = told.get("seeds") or []
    results = told.get("seed_results") or seeds
    results = {str(seed): r for seed, r in results.items() if isinstance(r, dict)} if isinstance(results, dict) else {}
    bpb, loss = told.get("val_bpb"), told.get("val_loss")
    if bpb and loss:
        ratio = bpb * math.log(2) / loss
        own = [r["val_tokens"] / r["val_bytes"] for r in results.values() if r.get("val_bytes")]
        wrong = any(abs(ratio - known) < 6e-4 for known in WRONG_RATIOS) or \
            (bool(own) and abs(ratio / statistics.fmean(own) - 1) > 1e-4)
        known = bool(own) or any(abs(ratio / r - 1) < 1e-3 for r in TOKENS_PER_BYTE.values())
        test("P3", known and not wrong, f"tokens_per_byte={ratio:.5f}", "this ratio comes from wrongly counted bytes: "
             "ruling O" if wrong else "no published tokenizer has this ratio", suspect=not wrong)
    if results and seeds:
        listed = {str(seed) for seed in seeds}
        test("P3", listed == set(results), f"seeds={','.join(sorted(listed))} results={','.join(sorted(results))}",
             "seeds and seed_results disagree: ruling Q")
    for name in ("val_bpb", "val_loss"):
        each = [r[name] for r in results.values() if isinstance(r.get(name), (int, float))]
        if not told.get(name) or not len(each) == len(results) > 0:
            continue
        mean, std = statistics.fmean(each), told.get(f"{name}_std")
        test("P3", near(mean, told[name]), f"{name}={told[name]} mean={mean:.8f}", "is not the mean of the seeds: "
             "ruling Q")
        if std is not None and len(each) > 1:
            test("P3", near(statistics.stdev(each), std), f"{name}_std={std} sample={statistics.stdev(each):.6f}",
                 "not the sample standard deviation", suspect=near(statistics.pstdev(each), std))
    sizes = [size for r in (*results.values(), told) for name in ("artifact_bytes", "bytes_total", "artifact_bytes_max")
             if isinstance(size := r.get(name), int)]
    if sizes:
        test("P6", max(sizes) < CAP, f"bytes={max(sizes):,} cap={CAP:,}", "over the cap: ruling Q")
        test("P3", told.get("bytes_total", max(sizes)) == max(sizes), f"bytes_total={told.get('bytes_total')} "
             f"largest={max(sizes)}", "a seed is larger than bytes_total", suspect=max(sizes) < CAP)
    for name, unit in (("train_wallclock_ms", 1000), ("train_time_ms", 1000), ("eval_time_s", 1),
                       ("ttt_time_ms", 1000)):
        slowest = max((r[name] / unit for r in results.values() if r.get(name)), default=0.0)
        if slowest:
            test("P6", slowest <= track.seconds, f"{name}={slowest:.1f}s of {track.seconds:g}s",
                 "over the clock: rulings I, J")
    for seed, r in results.items():
        if {"steps", "step_avg_ms", "train_wallclock_ms"} <= set(r):
            took, said = r["steps"] * r["step_avg_ms"], r["train_wallclock_ms"]
            test("P3", took <= 1.01 * said, f"seed={seed} steps*step_avg_ms={took:,.0f} train_wallclock_ms={said:,}",
                 "more steps than the clock allows")
    number = max(len(results), len(seeds))
    if isinstance(claims := told.get("compliance"), dict) and claims.get("three_seeds") is True:
        test("P3", number >= 3, f"three_seeds=true seeds={number}", "fewer seeds than said: ruling Q")
    test("P6", number >= track.seeds, f"seeds={number} wanted={track.seeds}", "fewer seeds than the track wants: "
         "ruling Q", suspect=not number)
    base, delta = told.get("comparison_baseline_bpb"), told.get("delta_vs_leaderboard_bpb")
    if bpb and base and delta:
        test("P3", near(bpb - base, delta), f"delta={delta} difference={bpb - base:.5f}", "the difference to the "
             "baseline is another")
    return findings


def near(true: float, told: float, most: int = 6) -> bool:
    """Whether `told` is `true` as far as it is written out (at most so many digits)."""
    return abs(true - told) <= 0.6 * 10.0 ** -min(len(repr(told).partition(".")[2]), most)


def check_logs(folder: Path, paths: Sequence[Path], told: Mapping[str, Any], track: Track) -> list[Finding]:
    """P4..P9 and A1..A4 on the logs of this program."""
    findings: list[Finding] = []
    test = collector(findings)
    logs = {path.name: read_log(path) for path in paths}
    needed = ("start", "config", "train_end", "artifact", "val_data", "verdict")
    for name, log in logs.items():
        lost = [event for event in needed if event not in log]
        test("P1", not lost, name, f"no {', '.join(lost)}: unfinished, damaged, or a run that did not train", "package")
        if "error" in [*log][[*log, "start"].index("start"):]:  # one that it did not go on after
            test("P1", False, name, f"the run ended in an error: {log['error'].get('text')}", "package")
        if not lost:
            findings += [f._replace(figures=f"{name}: {f.figures}") for f in audit_log(folder / name, None)]
    whole = {name: log for name, log in logs.items() if all(event in log for event in needed)}
    if len(whole) < len(logs) or not whole:
        return findings
    every = list(whole.values())

    def same(code: str, what: str, values: Sequence[Any], ruling: str = "Q") -> None:
        distinct = list(dict.fromkeys(json.dumps(value, sort_keys=True) for value in values))
        test(code, len(distinct) == 1, f"{what}: {len(distinct)} of {len(values)} logs differ" if len(distinct) > 1
             else f"{what}={distinct[0][:60]}", f"mixed {what}: ruling {ruling}")

    seeds = [log["verdict"]["seed"] for log in every]
    test("P4", len(set(seeds)) == len(seeds), f"seeds={','.join(map(str, seeds))}", "one seed in two logs: ruling Q")
    same("P5", "code hash", [log["start"]["code_sha256"] for log in every])
    configs = [{k: v for k, v in log["config"].items() if k not in (*PLACES, "seconds", "event")} for log in every]
    odd = sorted({k for config in configs for k in config if config.get(k) != configs[0].get(k)})
    same("P5", f"config ({','.join(odd)})" if odd else "config hash",
         [hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16] for config in configs])
    same("P5", "validation set", [[log["val_data"][k] for k in ("documents", "targets", "bytes")] for log in every],
         "N, O")
    same("P5", "machine", [[log["start"]["world"], log["start"]["device"]] for log in every])
    world, device = every[0]["start"]["world"], every[0]["start"]["device"]
    test("P6", track.device in device and track.world in (0, world), f"machine={world}x {device}",
         f"the track wants {track.world}x {track.device}; submit with TRACK=track_non_record_16mb")
    for name, log in whole.items():
        for budget in ("train", "eval"):
            spent = log["verdict"][f"{budget}_seconds"]
            test("P6", spent <= track.seconds, f"{name}: {budget}={spent:.1f}s of {track.seconds:g}s",
                 "over the clock: rulings I, J")
        test("P4", log["verdict"]["tokens"] == log["val_data"]["targets"], f"{name}: scored="
             f"{log['verdict']['tokens']:,}", f"of {log['val_data']['targets']:,} targets: ruling B")
        text = folder / Path(name).with_suffix(".log")
        verdict = re.search(r"verdict +val_bpb=(\S+)", text.read_text(encoding="utf-8")) if text.is_file() else None
        test("P4", verdict is not None and math.isclose(float(verdict[1]), log["verdict"]["val_bpb"], rel_tol=1e-6),
             f"{text.name}: val_bpb={verdict[1] if verdict else 'no'}", f"{name} says {log['verdict']['val_bpb']:.7g}")

    report = folder / "audit.txt"
    lines = report.read_text(encoding="utf-8").splitlines() if report.is_file() else []
    verdict_line = next((line for line in reversed(lines) if line.startswith("verdict ")), "")
    judged = all(f"{condition}=pass" in verdict_line for condition in CONDITIONS)
    test("P9", judged and not any(" FAIL " in line for line in lines), f"audit.txt: {verdict_line or 'missing'}",
         "the dynamic audit has failed, or was not made", "C1")
    expected = measured(every, verdict_line)
    wrong = [f"{name}={json.dumps(told.get(name))[:40]} logs={json.dumps(value)[:40]}"
             for name, value in expected.items() if name not in ("seed_results", "compliance", "logs")
             and not alike(told.get(name), value)]
    for group in ("seed_results", "compliance", "logs"):
        own = told.get(group) if isinstance(told.get(group), dict) else {}
        for key in {**own, **expected[group]}:
            mine, theirs = expected[group].get(key), own.get(key)
            if not isinstance(mine, dict) or not isinstance(theirs, dict):
                wrong += [] if alike(theirs, mine) else [f"{group}.{key}={json.dumps(theirs)[:40]} "
                                                         f"logs={json.dumps(mine)[:40]}"]
            else:
                wrong += [f"{group}.{key}.{name}={theirs.get(name)} logs={value}" for name, value in mine.items()
                          if not alike(theirs.get(name), value)]
    for text in wrong:
        test("P4", False, text, "submission.json disagrees with the logs: ruling Q")
    if not wrong:
        test("P4", True, f"{len(expected)} fields of submission.json are the logs'", "")

    script, human = folder / "train_gpt.py", folder / "train_gpt_human.py"
    sources = {path.name: path.read_bytes() for path in (script, human) if path.is_file()}
    claimed = every[0]["start"]["code_sha256"]
    test("P7", any(hashlib.sha256(data).hexdigest().startswith(claimed) for data in sources.values()),
         f"code_sha256={claimed[:16]}", "neither source here is the one that the runs logged: ruling Q")
    if script.name in sources:
        size, counted = len(sources[script.name]), every[0]["verdict"]["code_bytes"]
        test("P7", size == counted, f"train_gpt.py={size:,} counted={counted:,} bytes", "not the bytes that the runs "
             "counted: ruling Q")
    if len(sources) == 2:
        test("P7", same_program(sources[script.name], sources[human.name]), "train_gpt.py, train_gpt_human.py",
             "are two programs")
    page = folder / "README.md"
    if page.is_file() and told.get("name"):
        text = page.read_text(encoding="utf-8")
        lost = [row for row in rows_of({**expected, "name": told["name"]}) if row not in text]
        test("P8", not lost, "README.md", f"lacks what the logs say: {lost[0] if lost else ''}", "package")
    knobs = folder / "config.env"
    config = every[0]["config"]
    stray = [line for line in (knobs.read_text(encoding="utf-8").splitlines() if knobs.is_file() else ["missing"])
             if line and not line.startswith("#") and not agrees(line, config)]
    test("P8", not stray, "config.env", f"is not the config of the logs: {stray[0] if stray else ''}", "package")
    test("P1", (folder / "requirements.txt").is_file(), "requirements.txt", "missing", "package")
    return findings


def alike(a: Any, b: Any) -> bool:
    """Equal, or both numbers and equal to six digits."""
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (a, b))
    return math.isclose(a, b, rel_tol=1e-6) if numbers else a == b


def agrees(line: str, config: Mapping[str, Any]) -> bool:
    """Whether a line KNOB=value of config.env is what the config of a log says."""
    name, _, text = line.partition("=")
    value = config.get(name.lower())
    with contextlib.suppress(ValueError):
        return float(text) == float(text_of(value))
    return text == text_of(value)


def same_program(packed: bytes, readable: bytes) -> bool:
    """Whether the packed source is the readable one without its docstrings (compared as syntax trees)."""
    def bare(source: bytes) -> str:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                kept = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
                node.body = kept or [ast.Pass()] * bool(body)  # type: ignore[attr-defined]
        return ast.dump(tree)

    try:
        return bare(unwrapped(packed)) == bare(readable)
    except (SyntaxError, ValueError):
        return False


def check_foreign(paths: Sequence[Path], told: Mapping[str, Any], track: Track) -> list[Finding]:
    """P4, P6 on the text logs of other programs: are the scores in them, are they within cap and clocks?"""
    findings: list[Finding] = []
    test = collector(findings)
    found = {path.name: {name: [float(x.replace(",", "")) for x in re.findall(pattern, text)]
                         for name, pattern in FOREIGN.items()}
             for path in paths for text in [path.read_text(encoding="utf-8", errors="replace")]}
    scores = [x for figures in found.values() for x in figures["val_bpb"]]
    finals = [figures["val_bpb"][-1] for figures in found.values() if figures["val_bpb"]]
    results = told.get("seed_results")
    claims = {f"seed {seed}": r["val_bpb"] for seed, r in results.items() if isinstance(r, dict) and r.get("val_bpb")} \
        if isinstance(results, dict) else {}
    if not claims and isinstance(told.get("val_bpb"), (int, float)):
        claims = {"headline": told["val_bpb"]}
        scores += [sum(finals) / len(finals)] if finals else []
    for who, value in claims.items():
        test("P4", any(near(x, value, 4) for x in scores), f"{who}: val_bpb={value}", "is in no log: ruling Q" if scores
             else "the logs name no val_bpb", suspect=not scores)
    for name, limit, ruling in (("bytes", CAP - 1, "Q"), ("train", 1000 * track.seconds, "I"),
                                ("eval", 1000 * track.seconds, "J")):
        for log, figures in found.items():
            if figures[name] and figures[name][-1] > limit:
                test("P6", False, f"{log}: {name}={figures[name][-1]:,.0f} limit={limit:,.0f}",
                     f"over the limit: ruling {ruling}")
    return findings


# -- submit ---------------------------------------------------------------------------------------------


def config_lines(module: Any, config: Mapping[str, Any]) -> list[str]:
    """KNOB=value for what differs from the preset, which itself is named where it is not the default."""
    base = module.PRESETS[config["preset"]]
    lines = [] if config["preset"] == "record" else [f"PRESET={config['preset']}"]
    for knob in module.knobs():
        name = knob.name.lower()
        if name not in PLACES and name != "preset" and config[name] != base.get(name, knob.default):
            lines.append(f"{knob.name}={module.show(config[name])}")
    return lines


def dynamic_audit(artifact: Path, log: Path, config: Mapping[str, Any], script: Path) -> str:
    """The report of `audit.py` on one artifact under its run's knobs.

    Raises `Refuted` if it refutes the score, `AuditError` if it cannot be made.
    """
    from tools import audit
    machine = ("device", "dtype", "compile", "attention", "kernels", "run_id", "eval_only", "threads")
    knobs = [f"{name.upper()}={text_of(value)}" for name, value in config.items()
             if name not in (*machine, "seconds", "event")]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = audit.main([str(artifact), f"LOG={log}", f"SCRIPT={script}", *knobs])
    if status:
        kind, what = (Refuted, "refutes the score") if status == 1 else (AuditError, "cannot be made")
        raise kind(f"{artifact}: the audit {what}:\n{out.getvalue()}{err.getvalue()}".rstrip())
    return out.getvalue()


def submit(name: str, runs: Sequence[str], given: Mapping[str, str]) -> Path:
    """The new folder, complete and checked. Raises `InputError` and leaves nothing where anything is wrong."""
    for key in ("AUTHOR", "GITHUB_ID"):
        if not given.get(key):
            raise AuditError(f"{key}= is missing: it goes into submission.json, such as AUTHOR='Ada Lovelace' "
                             f"GITHUB_ID=ada")
    if not re.fullmatch(r"[\w.+-]+", name):
        raise AuditError(f"{name!r}: expected a name of letters, digits, _ . + - for the folder")
    paths = [path for run in runs for path in log_paths(run, log_folder())]
    logs = [read_log(path) for path in paths]
    for path, log in zip(paths, logs):
        if not {"start", "config", "artifact", "verdict", "train_end"} <= set(log):
            raise AuditError(f"{path}: no log of a whole run (training, artifact, score); run it to its end")
    start, config = logs[0]["start"], logs[0]["config"]
    record = TRACKS["track_10min_16mb"]
    track = given.get("TRACK") or ("track_10min_16mb" if record.device in start["device"] and
                                   start["world"] == record.world else "track_non_record_16mb")
    if track not in TRACKS:
        raise AuditError(f"TRACK={track}: expected one of {', '.join(TRACKS)}")
    wanted = given.get("SEEDS", str(TRACKS[track].seeds))
    if not wanted.isdecimal() or len(logs) < int(wanted):
        raise AuditError(f"SEEDS={wanted}: runs given: {len(logs)}; train the other seeds, or say fewer, "
                         f"SEEDS={len(logs)}")
    script = Path(given.get("SCRIPT", ROOT / "train_gpt.py"))
    module = load_module(script)
    source, packed = script.read_bytes(), module.shipped_source(script)
    if not hashlib.sha256(source).hexdigest().startswith(start["code_sha256"]):
        raise AuditError(f"{script}: is not the code of {paths[0]} (SHA-256 {start['code_sha256'][:16]}...); check out "
                         f"the commit that was run, or give that script as SCRIPT=")
    if len(packed) != logs[0]["verdict"]["code_bytes"]:
        raise AuditError(f"{script}: packs to {len(packed):,} bytes here, the runs counted "
                         f"{logs[0]['verdict']['code_bytes']:,} under Python {start['python']}; submit with that")
    date = given.get("DATE") or datetime.date.today().isoformat()
    folder = Path(given.get("ROOT", ROOT / "records")) / track / f"{date}_{name}"
    if folder.exists():
        raise AuditError(f"{folder}: exists already; choose another NAME or remove it")
    for path, log in zip(paths, logs):
        artifact = artifact_of(path, log)
        if hashlib.sha256(artifact.read_bytes()).hexdigest() != log["artifact"]["sha256"]:
            raise AuditError(f"{artifact}: is not the artifact that {path} scored (SHA-256 differs)")
    refuse([f for path in paths for f in audit_log(path, None)])  # before the audit, which takes a minute
    report = dynamic_audit(artifact_of(paths[0], logs[0]), paths[0], config, script)
    told = {"author": given["AUTHOR"], "github_id": given["GITHUB_ID"], "name": name.replace("_", " "),
            "blurb": given.get("BLURB", f"{logs[0]['verdict']['parameters']:,} parameters, preset {config['preset']}."),
            "date": date, "track": track.removeprefix("track_"),
            **measured(logs, report.rstrip().rpartition("\n")[2])}
    if "BASELINE" in given:
        told |= against(Path(given["BASELINE"]), told)
    knobs = config_lines(module, config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as room:
        draft = Path(room) / track / folder.name
        draft.mkdir(parents=True)
        (draft / "train_gpt.py").write_bytes(packed)
        if packed != source:
            (draft / "train_gpt_human.py").write_bytes(source)
        for path, log in zip(paths, logs):
            seed = log["verdict"]["seed"]
            if (draft / f"train_seed{seed}.jsonl").exists():
                raise AuditError(f"{path}: a second run of seed {seed}; a submission has one run of each seed")
            shutil.copyfile(path, draft / f"train_seed{seed}.jsonl")
            shutil.copyfile(path.with_suffix(".txt"), draft / f"train_seed{seed}.log")
        files = {"config.env": "\n".join(knobs) + "\n", "audit.txt": report,
                 "requirements.txt": requirements(source.decode("utf-8"), (ROOT / "requirements.txt").read_text()),
                 "submission.json": json.dumps(told, indent=2) + "\n", "README.md": readme(told, knobs, start)}
        for file, text in files.items():
            (draft / file).write_text(text, encoding="utf-8")
        refuse(check(draft))
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.copytree(draft, temporary)
        os.replace(temporary, folder)
    return folder


def refuse(findings: Sequence[Finding]) -> None:
    """Raises `Refuted` with every finding that fails."""
    bad = [f"  {f.code} {f.figures}: {f.text}" for f in findings if not f.ok and not f.suspect]
    if bad:
        raise Refuted("\n".join(["nothing was made; refused for:", *bad]))


def artifact_of(path: Path, log: Log) -> Path:
    """The artifact of a run: where it was written, or next to its log. Raises `AuditError` if it is gone."""
    places = [Path(log["artifact"]["path"]), path.with_suffix(".bin")]
    for place in places:
        if place.is_file():
            return place
    raise AuditError(f"{places[0]}: the artifact of {path} is gone; it is needed for the audit")


def against(folder: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of submission.json that compare with another submission's folder."""
    try:
        base = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
        bpb = float(base["val_bpb"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AuditError(f"BASELINE={folder}: no submission.json with a val_bpb there ({error})") from None
    loss = {"comparison_baseline_loss": base["val_loss"], "delta_vs_leaderboard_nats": told["val_loss"] -
            base["val_loss"]} if base.get("val_loss") else {}
    return {"comparison_baseline": base.get("name", folder.name), "comparison_baseline_bpb": bpb,
            "delta_vs_leaderboard_bpb": told["val_bpb"] - bpb, **loss}


def requirements(source: str, pinned: str) -> str:
    """Of the pinned requirements those that the script imports."""
    imported = {name.split(".")[0] for node in ast.walk(ast.parse(unwrapped(source.encode()))) for name in
                ([a.name for a in node.names] if isinstance(node, ast.Import) else
                 [node.module or ""] if isinstance(node, ast.ImportFrom) else [])}
    return "\n".join(line for line in pinned.splitlines() if re.split(r"[=<>; ]", line)[0] in imported) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Exit status 0: nothing refuted, 1: refuted, 2: cannot be done as asked."""
    try:
        verb, *rest = arguments or ["--help"]
        if verb == "check" and len(rest) == 1:
            findings = check(Path(rest[0]))
            print(table(findings, ("package", *CONDITIONS)))
            return failed(findings)
        names, given = split_options(rest, OPTIONS)
        if verb == "submit" and len(names) > 1:
            folder = submit(names[0], names[1:], given)
            print(f"{folder}\nEvery check passes. Read README.md, say what is new, and check it again: "
                  f"./run.sh check {folder}")
            return 0
        print(__doc__)
        return 2 * (verb not in ("-h", "--help"))
    except (InputError, OSError) as error:
        print(f"submission.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, Refuted) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
