"""What is read of a submission without running it: the logs of its runs, its sources, its files. Imports no torch.

`audit.py` and `submission.py` judge by these findings; their codes and rulings are those of `audit.py`'s first lines.
"""
from __future__ import annotations

import ast
import base64
import binascii
import bz2
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import lzma
import math
import re
import sys
import token
import tokenize
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tools.common import ToolError
from tools.logs import events, last, pairs, readable

ROOT = Path(__file__).resolve().parents[1]
CONDITIONS = ("C1", "C2", "C3", "C4", "P", "accounting")
CAP = 16_000_000


class Finding(NamedTuple):
    """What one probe says about one condition."""
    code: str  # probe of the rules: D1..D9, A1..A4, S1..S5, P1..P9
    condition: str  # C1..C4, P or accounting
    ok: bool
    figures: str  # what was measured
    text: str  # what was asked or, where it failed, which ruling this is
    suspect: bool = False  # a heuristic's hit: to be looked at by a reader, no failure

    @property
    def failed(self) -> bool:
        """Whether this refutes the submission."""
        return not self.ok and not self.suspect


def finding(code: str, condition: str, ok: object, figures: str, wrong: str, right: str = "", suspect: bool = False
            ) -> Finding:
    """Return what was measured, with the text that fits the outcome."""
    return Finding(code, condition, bool(ok), figures, right if ok else wrong, suspect and not ok)


class Findings(list[Finding]):
    """A list that is filled by tests."""

    def test(self, *what: Any, **more: Any) -> None:
        """Append a finding."""
        self.append(finding(*what, **more))


def load_module(path: Path) -> ModuleType:
    """Import the script under audit. Raises `ToolError` where there is none."""
    if not path.is_file():
        raise ToolError(f"SCRIPT={path}: no such file; give the training script of the submission")
    loaded = sys.modules.get("train_gpt")
    if loaded is not None and Path(loaded.__file__ or "").resolve() == path.resolve():
        return loaded  # a second copy would be a stranger to the classes of the first
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module
    spec.loader.exec_module(module)
    return module


# -- the report ------------------------------------------------------------------------------------------


def failed(findings: Sequence[Finding]) -> int:
    """Return the exit status of an audit: 1 where a probe failed."""
    return int(any(f.failed for f in findings))


def table(findings: Sequence[Finding], conditions: Sequence[str] = CONDITIONS) -> str:
    """Return one line for each finding, and last `verdict C1=pass C2=- ... accounting=FAIL(S2)`; -: never asked."""
    lines = [f"{'probe':5s} {'condition':10s} {'verdict':8s} figures"]
    for f in findings:
        verdict = "pass" if f.ok else "suspect" if f.suspect else "FAIL"
        text = f"{f.code:5s} {f.condition:10s} {verdict:8s} {f.figures}  {f.text}"
        lines.append("".join(c if c.isprintable() else " " for c in text))  # it may quote foreign files
    verdicts = []
    for condition in conditions:
        own = [f for f in findings if f.condition == condition]
        codes = ",".join(dict.fromkeys(f.code for f in own if f.failed))
        verdicts.append(f"{condition}=" + (f"FAIL({codes})" if codes else "pass" if own else "-"))
    return "\n".join([*lines, f"verdict {' '.join(verdicts)}"])


# -- the log of a run ------------------------------------------------------------------------------------

CASEOPS = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
TOKENS_PER_BYTE = {"fineweb10B_sp1024": 0.4105, "fineweb10B_sp4096": 1 / 3.322, "fineweb10B_sp8192": 0.26834,
                   CASEOPS: 47_851_520 / 151_074_309}
"""Of the whole validation set under the published tokenizers (rules 1.4)."""
TEXT_BYTES = 151_080_891
"""Of the whole published validation set, whatever plain tokenizer counts them (#1804)."""
OFFICIAL = {"fineweb10B_sp1024": ((62_021_632, 62_022_655), (TEXT_BYTES, TEXT_BYTES)),
            "fineweb10B_sp8192": ((40_540_160, 40_542_207), (TEXT_BYTES, TEXT_BYTES)),
            CASEOPS: ((47_853_343, 47_853_343), (151_074_309, 151_090_000))}
"""Least and most targets and bytes of the published sets. Where only a score without the tail was published (a multiple
of 1,024 or 2,048 targets), the tail is the width of the range."""
VALIDATION = re.compile(r"(^|_)val(id|idation)?(_|$)", re.I)
TRACK_SECONDS = 600.0
"""Of training, and again of evaluation, on the record track."""


def dataset_name(caseops: bool, vocab_size: object) -> str:
    """Return the published dataset of a vocabulary."""
    return CASEOPS if caseops else f"fineweb10B_sp{vocab_size}"


def validated_early(log: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a run opened validation data before its weights were packed for the last time."""
    packed = [i for i, e in enumerate(log) if e["event"] == "pack"]
    opened = [i for i, e in enumerate(log) if e["event"] in ("val_probe", "val_data") or
              (e["event"] == "phase" and VALIDATION.search(e["name"]))]
    trained = any(e["event"] == "phase" and e["name"] == "train" for e in log)
    return trained and (not packed or any(i < packed[-1] for i in opened))


def charged(phases: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the seconds of each budget by the phases alone; what a phase inside another takes is its own."""
    totals, open_phases = {"train": 0.0, "eval": 0.0}, []
    for phase in phases:  # a phase is logged when it ends, after those inside it
        begin, inner = phase["seconds"] - phase["phase_seconds"], 0.0
        while open_phases and open_phases[-1][0] >= begin - 0.005:
            inner += open_phases.pop()[1]
        open_phases.append((begin, phase["phase_seconds"]))
        totals[phase["budget"]] = totals.get(phase["budget"], 0.0) + phase["phase_seconds"] - inner
    return totals


def audit_log(path: Path, blob: bytes | None, knobs: Mapping[str, Any] | None = None,
              seconds: float = TRACK_SECONDS) -> list[Finding]:
    """Ask A1..A4 of a run's JSON lines; the audited artifact's bytes and knobs; `seconds`: the track's budgets.
    Raises `ToolError` where the run is not finished."""
    log = events(path) if path.is_file() else []
    verdict, config = last(log, "verdict"), last(log, "config") or {}
    if verdict is None:
        raise ToolError(f"LOG={path}: holds no verdict; give the .jsonl of a finished run")
    findings = Findings()
    names = ("val_loss", "val_bpb", "tokens", "bytes", "artifact_bytes", "code_bytes", "cap_bytes", "train_seconds",
             "eval_seconds", "total_seconds")
    broken = [name for name in names if isinstance(verdict.get(name), bool)
              or not isinstance(verdict.get(name), (int, float)) or not 0 <= verdict[name] < math.inf]
    if broken:
        return [finding("A3", "accounting", False, f"{broken[0]}={verdict.get(broken[0])}", "no number of a score")]

    begun = max((i for i, e in enumerate(log) if e["event"] == "start"), default=0)  # a run that goes on starts again
    phases = [e for e in log[begun:] if e["event"] == "phase"]
    gap, at, total = 0.0, 0.0, float(verdict["total_seconds"])
    spans = [(e["seconds"] - e["phase_seconds"], e["seconds"]) for e in phases]
    for begin, end in [*sorted(spans), (total, total)]:
        gap, at = max(gap, begin - at), max(at, end)
    gap = max(gap, verdict["seconds"] - total)
    findings.test("A1", "accounting", gap <= max(2.0, 0.02 * total), f"largest_gap={gap:.2f}s of {total:.1f}s",
                  "the clock has an untimed gap", "no untimed gap between the phases")
    marks = [str(e.get("text")) for e in log if e["event"] == "warning" and "illegal" in str(e.get("text"))]
    marks += ["validation data was opened before the artifact was written: rulings A, C"] * validated_early(log)
    findings.test("A2", "C3", not marks, f"phases={len(phases)}", f"the log says: {marks[-1:]}",
                  "validation data was opened after the artifact was written")
    limits = {"train": min(seconds, float(config.get("max_wallclock_seconds") or math.inf)),
              "eval": min(seconds, float(config.get("eval_seconds_budget") or math.inf))}
    told = {budget: float(verdict[f"{budget}_seconds"]) for budget in limits}
    spent = {budget: max(told[budget], by_phase) for budget, by_phase in charged(phases).items() if budget in told}
    wrong = [f"{b} is over its budget" for b in limits if spent[b] > limits[b]]
    wrong += [f"the verdict has {b}={told[b]:.1f}s, its phases have more" for b in told
              if told[b] < spent[b] - max(0.5, 0.01 * spent[b])]
    findings.test("A1", "accounting", not wrong, " ".join(f"{b}={spent[b]:.1f}/{limits[b]:g}s" for b in limits),
                  f"{'; '.join(wrong)}: rulings I, J", "both budgets are kept")

    ratio = verdict["tokens"] / max(1, verdict["bytes"])
    fits = math.isclose(verdict["val_loss"] / math.log(2) * ratio, verdict["val_bpb"], rel_tol=1e-5)
    published, official = None, True
    if verdict["tokens"] > 10_000_000:  # the whole validation set
        name = Path(config.get("data_path") or "").name or dataset_name(config.get("caseops_enabled"),
                                                                         config.get("vocab_size"))
        published = TOKENS_PER_BYTE.get(name)
        official = all(low <= verdict[what] <= high
                       for what, (low, high) in zip(("tokens", "bytes"), OFFICIAL.get(name, ())))
    possible = math.isclose(ratio, published, rel_tol=1e-3) if published else 0.1 < ratio <= 1
    findings.test("A3", "accounting", fits and possible and official,
                  f"tokens_per_byte={ratio:.5f} published={published or 'no'}",
                  "tokens, bytes and val_bpb do not fit together, or not the dataset: ruling O",
                  "tokens, bytes and val_bpb fit together")
    findings += other_events(log, verdict)
    size, cap = verdict["artifact_bytes"], min(CAP, verdict["cap_bytes"])
    mismatch = blob is not None and len(blob) + verdict["code_bytes"] != size
    findings.test("A4", "accounting", size < cap and not mismatch, f"bytes={size:,} cap={cap:,}",
                  "code and weights exceed the cap, or are not those of the log: ruling Q",
                  "code and weights are under the cap")
    odd = [name for name, value in (knobs or {}).items() if name in config and config[name] != value]
    if blob is not None:
        scored, own = (last(log, "artifact") or {}).get("sha256"), hashlib.sha256(blob).hexdigest()
        findings.test("A4", "accounting", scored == own and not odd, " ".join([
            f"sha256={own[:16]} log={str(scored)[:16]} knobs={len(knobs or ())}", *odd[:3]]),
                      "the log is of another artifact, or of other knobs: ruling Q", "the log is of this artifact")
    return findings


def other_events(log: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any]) -> list[Finding]:
    """A3: the verdict against what the same log says elsewhere: the score, the stream, nats and bytes by place."""
    score, stream, places = (last(log, event) or {} for event in ("score", "val_data", "places"))
    told = {**stream, **{name: score[name] for name in ("val_loss", "val_bpb") if name in score}}
    wrong = [name for name, value in {**verdict, "targets": verdict["tokens"]}.items() if name in (
        "val_loss", "val_bpb", "targets", "bytes", "validation") and told.get(name, value) != value]
    for by in ("position", "length"):
        held = places.get(by) or {}
        wrong += [f"{of} by {by}" for of, value in (("targets", verdict["tokens"]), ("bytes", verdict["bytes"]), (
            "nats", verdict["val_loss"] * verdict["tokens"])) if held and not math.isclose(
                math.fsum(held[of]), value, rel_tol=1e-5)]
    lost = [name for name, held in (("score", score), ("val_data", stream), ("places", places)) if not held]
    return [finding("A3", "accounting", not wrong and not lost, f"wrong={len(wrong)} missing={len(lost)}",
                    f"the verdict is not what the log says elsewhere: {', '.join(wrong)}: ruling Q" if wrong else
                    f"the log lacks {', '.join(lost)}: not enough to refute its verdict",
                    "the verdict is what the log says elsewhere", suspect=not wrong)]


# -- sources ---------------------------------------------------------------------------------------------

NETWORK = set("socket urllib requests huggingface_hub http ftplib urllib3 httpx aiohttp wget gdown boto3 paramiko "
              "kagglehub smtplib telnetlib xmlrpc pycurl".split())
OUTSIDE = set("subprocess ctypes cffi datasets gcsfs s3fs fsspec google modelscope marshal pickle dill cloudpickle "
              "zipimport runpy".split())
"""What runs, reads or fetches something that the sources do not show."""
FREEZING = re.compile(r"serialize|quantize|gptq|calibrat|pack_|save_model", re.I)
LEARNING = re.compile(r"(^|_)(ttt|adapt|finetune|fine_tune|train)", re.I)
ADAPTING = re.compile(r"(^|_)(ttt|adapt|finetune|fine_tune)", re.I)
"""Names that leave no other reading; a training loop may be given the validation data to probe itself."""
PREQUANT = re.compile(r"pre_?quant.*ttt|ttt.*pre_?quant", re.I)
TARGET = re.compile(r"(^|_)(target|tgt|label|next_?tok)", re.I)
CONTEXT = re.compile(r"ctx|context|hash", re.I)
LOSS = re.compile(r"nll|loss|nats", re.I)
SPACE_TABLE = re.compile(r"(leading|has)_?space", re.I)
WORD_TABLE = re.compile(r"(boundary|starts?_new_word|word_start)", re.I)
NEAR_CAP = 20_000
"""Runs of one program differ by up to this many bytes (#1978)."""
CODE = (".c", ".cpp", ".cu", ".h", ".hpp", ".so", ".sh")
OPAQUE = (".so", ".pyc", ".pyd", ".pyz", ".egg", ".whl", ".zip", ".tar", ".tgz")
"""Programs that cannot be read here."""
WEIGHTS = (".bin", ".ptz", ".xz", ".lzma", ".zst", ".br", ".lrz", ".npz", ".pt", ".pkl")
PAPERS = (".md", ".txt", ".log", ".json", ".jsonl", ".csv", ".png", ".svg", ".pdf", ".html", ".env", ".yml", ".toml",
          ".model", ".vocab")
"""Files beside a submission that it does not need in order to be scored; tokenizers are not counted, either."""
LARGEST_PAPER = 1 << 20
UNREADABLE = (SyntaxError, ValueError, MemoryError, RecursionError, tokenize.TokenError)
"""What Python's parser and tokenizer raise for a source that is none, or is nested without end."""
LARGEST_SOURCE = 1 << 24
"""Bytes of a source, unpacked: the cap."""


def names_in(*nodes: ast.AST) -> list[str]:
    """Return every identifier below some nodes."""
    inner = [n for node in nodes for n in ast.walk(node)]
    return [n.id if isinstance(n, ast.Name) else n.attr for n in inner if isinstance(n, (ast.Name, ast.Attribute))]


def named(pattern: re.Pattern[str], *nodes: ast.AST) -> bool:
    """Return whether an identifier below some nodes matches."""
    return any(map(pattern.search, names_in(*nodes)))


def arguments(node: ast.Call) -> list[ast.AST]:
    """Return what a call is given."""
    return [*node.args, *(k.value for k in node.keywords)]


def called(node: ast.Call) -> str:
    """Return the dotted name of what a call calls, as far as it is one: `np.minimum`, `os.system`."""
    parts, f = [], node.func
    while isinstance(f, ast.Attribute):
        parts, f = [f.attr, *parts], f.value
    return ".".join([*([f.id] if isinstance(f, ast.Name) else []), *parts])


UNPACKERS = {"b85decode": base64.b85decode, "a85decode": base64.a85decode, "b64decode": base64.b64decode,
             "b32decode": base64.b32decode, "b16decode": base64.b16decode, "unhexlify": binascii.unhexlify,
             "fromhex": lambda data: bytes.fromhex(data.decode()), "a2b_base64": binascii.a2b_base64}
RUNNERS = {"exec", "eval", "compile", "builtins.exec", "builtins.eval", "builtins.compile"}


def decompressed(data: bytes) -> bytes | None:
    """Return what LZMA, zlib, gzip or bz2 have packed; None for anything else, also for a stream that is cut short.
    Raises `ToolError` for more than LARGEST_SOURCE."""
    for reader in (lzma.LZMADecompressor(memlimit=1 << 28), zlib.decompressobj(47), zlib.decompressobj(-15),
                   bz2.BZ2Decompressor()):
        with contextlib.suppress(lzma.LZMAError, zlib.error, OSError):
            program = reader.decompress(data, LARGEST_SOURCE + 1)
            if len(program) > LARGEST_SOURCE:
                raise ToolError(f"a wrapper unpacks to more than {LARGEST_SOURCE:,} bytes")
            if reader.eof:
                return program
    return None


def literal(node: ast.AST, known: Mapping[str, bytes | None] = {}) -> bytes | None:
    """Return the bytes of a constant expression, None for anything else; `known`: names that are constants, too.
    Also through decoders, decompressors, `+`, `[::-1]`, `"".join([...])`, bytes([...])."""
    def inside(inner: ast.AST) -> bytes | None:
        return literal(inner, known)

    if isinstance(node, ast.Constant):
        value = node.value.encode("latin-1", "replace") if isinstance(node.value, str) else node.value
        return value if isinstance(value, bytes) else None
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, (ast.List, ast.Tuple)):
        parts = [inside(part) for part in node.elts]
        return None if None in parts else b"".join(part for part in parts if part is not None)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = inside(node.left), inside(node.right)
        return None if left is None or right is None else left + right
    if isinstance(node, ast.Subscript) and ast.unparse(node.slice) == "::-1":
        value = inside(node.value)
        return value and value[::-1]
    if not isinstance(node, ast.Call):
        return None
    name = called(node).rsplit(".", 1)[-1] or (node.func.attr if isinstance(node.func, ast.Attribute) else "")
    if name in ("encode", "decode", "strip") and isinstance(node.func, ast.Attribute):
        return inside(node.func.value)
    if name in ("bytes", "bytearray") and node.args and isinstance(node.args[0], (ast.List, ast.Tuple)):
        with contextlib.suppress(ValueError):
            return bytes(ast.literal_eval(node.args[0]))
    data = inside(node.args[0]) if node.args else None
    if data is None or name in ("bytes", "str", "join", "compile"):
        return data
    if name in UNPACKERS:
        with contextlib.suppress(ValueError, binascii.Error):
            return UNPACKERS[name](data)
    return decompressed(data) if "decompress" in name else None


@functools.lru_cache(maxsize=8)
def parsed(source: bytes, oldest: bool = False) -> ast.Module:
    """Return the tree of a source, which nobody may change; with `oldest`, as Python 3.10 reads it, or SyntaxError."""
    if oldest:
        return ast.parse(source, feature_version=(3, 10))
    with contextlib.suppress(SyntaxError):
        return parsed(source, oldest=True)
    return ast.parse(source)


nodes_of = functools.lru_cache(maxsize=8)(lambda tree: list(ast.walk(tree)))
"""All nodes of a tree."""


@functools.lru_cache(maxsize=8)
def constants(tree: ast.AST) -> dict[str, bytes | None]:
    """Return the names that are given one constant value, and no other, anywhere in a source."""
    known: dict[str, bytes | None] = {}
    for node in nodes_of(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            known[name] = None if name in known else literal(node.value, known)
    return known


@functools.lru_cache(maxsize=64)
def payloads(source: bytes, run: bool = True) -> list[bytes]:
    """Return the programs inside a source: what it decompresses from constants and, with `run`, runs of them."""
    found: list[bytes] = []
    with contextlib.suppress(*UNREADABLE):
        tree = parsed(source)
        known = constants(tree)
        for node in nodes_of(tree):
            if isinstance(node, ast.Call) and node.args:
                name = called(node)
                data = literal(node, known) if "decompress" in name else None
                if run and name in RUNNERS:
                    data = literal(node.args[0], known)
                if data and data not in found:
                    found.append(data)
    return found


def programs(source: bytes) -> list[bytes]:
    """Return a source and all programs in it, however deep (at most 64)."""
    every = [source]
    for inner in every:
        every += [data for data in payloads(inner) if data not in every][:max(0, 64 - len(every))]
    return every


def unwrapped(source: bytes) -> bytes:
    """Return the program inside self-extracting wrappers, else the source itself. Raises as `decompressed` does."""
    for _ in range(8):
        inner = payloads(source, run=False)
        if not inner:
            break
        source = inner[0]
    return source


def newer_fstrings(source: str) -> list[int]:
    """Return lines of f-strings that need Python 3.12: the outer quote inside again (only 3.12's tokenizer sees it)."""
    start, end, lines, quotes = getattr(token, "FSTRING_START", -1), getattr(token, "FSTRING_END", -1), [], []
    if start < 0:
        return lines
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type in (start, token.STRING) and quotes and t.string.lstrip("rRbBfFuU")[0] == quotes[-1]:
            lines.append(t.start[0])
        if t.type == start:
            opening = t.string.lstrip("rRbBfF")
            quotes.append(opening if len(opening) == 1 else "")
        elif t.type == end:
            quotes.pop()
    return lines


class Hit(NamedTuple):
    """One place in a source."""
    line: int
    condition: str
    ruling: str
    text: str
    certain: bool = True
    """Whether it has no lawful reading."""


def scan(tree: ast.AST) -> list[Hit]:
    """Return what a source shows of the rulings (S2)."""
    hits, known = list[Hit](), constants(tree)
    calls = [(node, called(node).rsplit(".", 1)[-1]) for node in nodes_of(tree) if isinstance(node, ast.Call)]
    calls = [(call, name) for call, name in calls if FREEZING.search(name) or LEARNING.search(name)]
    adds_one = adds_space = 0
    for node in nodes_of(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            hits += scan_import(node, {name.split("/")[0] for name in dotted(node) if not getattr(node, "level", 0)})
        elif isinstance(node, ast.Call):
            hits += scan_call(node, known)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            hits += scan_calls([
                (call, name) for call, name in calls if node.lineno <= call.lineno <= (node.end_lineno or 0)])
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitXor, ast.BitOr)):
            orders = (node.left, node.right), (node.right, node.left)
            if any(named(CONTEXT, one) and named(TARGET, other) for one, other in orders):
                hits.append(Hit(node.lineno, "C2", "E", "the target's id is part of a hash key"))
        elif isinstance(node, ast.Subscript) and isinstance(node.value, (ast.Name, ast.Attribute)):
            if WORD_TABLE.search(names_in(node.value)[0]) and named(TARGET, node.slice):
                hits.append(Hit(node.lineno, "C1", "F", "a table of word starts is read at the target", False))
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Add):
            sides = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.value]
            lengths = [s for s in sides if isinstance(s, ast.Call) and called(s) == "len" and "encode" in names_in(s)]
            if lengths and any(isinstance(s, ast.Constant) and s.value == 1 for s in sides):
                adds_one = node.lineno
            if named(SPACE_TABLE, *sides):
                adds_space = node.lineno
    if adds_one and adds_space:
        hits.append(Hit(adds_one, "accounting", "O", f"the leading space is counted here and in line {adds_space}"))
    return sorted(set(hits))


def scan_import(node: ast.AST, roots: set[str]) -> list[Hit]:
    """Return the hits of an import of these packages."""
    line = getattr(node, "lineno", 0)
    hits = [Hit(line, "accounting", "1.1", f"imports {name}: no network in a run") for name in roots & NETWORK]
    return hits + [Hit(line, "accounting", "1.1", f"imports {name}: outside code must be counted", False)
                   for name in roots & OUTSIDE]


def scan_call(node: ast.Call, known: Mapping[str, bytes | None]) -> list[Hit]:
    """Return the hits of a single call; `known` as in `literal`."""
    name, hits = called(node), []
    short = name.rsplit(".", 1)[-1]
    if name in RUNNERS and node.args and literal(node.args[0], known) is None and not (
            name != "compile" and isinstance(node.args[0], ast.Call) and called(node.args[0]) == "compile"):
        hits.append(Hit(node.lineno, "accounting", "1.1", f"calls {name} on what cannot be read here", False))
    if short in ("__import__", "import_module") and node.args:
        module = literal(node.args[0], known)
        hits += [Hit(node.lineno, "accounting", "1.1", f"calls {name} with a computed name", False)] * (module is None)
        hits += scan_import(node, {(module or b"").decode("latin-1").split(".")[0]})
    if name in ("torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file"):
        hits.append(Hit(node.lineno, "accounting", "1.1", f"calls {name}: no network in a run"))
    if name in ("os.system", "os.popen") or short in ("load_inline", "CDLL", "run_path", "run_module") or \
            name.startswith(("os.exec", "os.spawn")):
        hits.append(Hit(node.lineno, "accounting", "1.1", f"calls {name}: outside code must be counted", False))
    if PREQUANT.search(short):
        hits.append(Hit(node.lineno, "C3", "C", f"calls {name}: learns before the weights are frozen", False))
    if short in ("min", "minimum", "fmin") and len(node.args) > 1 and sum(named(LOSS, a) for a in node.args) > 1:
        hits.append(Hit(node.lineno, "C4", "B", "the smaller of two losses is kept", short != "min"))
    if re.search(r"hessian|calib", short, re.I) and named(VALIDATION, *arguments(node)):
        hits.append(Hit(node.lineno, "C3", "H", f"{name} reads validation data"))
    return hits


def scan_calls(calls: Sequence[tuple[ast.Call, str]]) -> list[Hit]:
    """Return the hits that need the order of a function's calls: learning from validation data before the freeze."""
    frozen = max((c.lineno for c, name in calls if FREEZING.search(name) and not PREQUANT.search(name)), default=0)
    return [Hit(call.lineno, "C3", "C", f"{name} gets validation data before line {frozen} freezes the weights",
                ADAPTING.search(name) is not None) for call, name in calls
            if call.lineno < frozen and LEARNING.search(name) and not name.startswith("eval") and
            named(VALIDATION, *arguments(call))]


def local_sources(script: Path) -> list[Path]:
    """Return the script and every file below its folder that it imports, directly or not."""
    sources, queue = [], [script]
    while queue:
        path = queue.pop()
        if path in sources:
            continue
        sources.append(path)
        for source in programs(path.read_bytes()):
            with contextlib.suppress(*UNREADABLE):
                for node in nodes_of(parsed(source)):
                    if isinstance(node, (ast.Import, ast.ImportFrom)):
                        base = path.parent if getattr(node, "level", 0) else script.parent
                        queue += [p for name in dotted(node) for p in (base / f"{name}.py", base / name / "__init__.py")
                                  if p.is_file()]
    return sources


def dotted(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Return every module that an import may open, as paths: `from a.b import c` opens a, a/b and perhaps a/b/c."""
    names = [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        names = [node.module, *(f"{node.module}.{name}" for name in names)] if node.module else names
    return ["/".join(parts[:n]) for parts in (name.split(".") for name in names) for n in range(1, len(parts) + 1)]


def static_sources(script: Path, others: Sequence[Path] = ()) -> list[Finding]:
    """Ask S1 and S2 of one script and what it imports from its folder; of `others`, which it may run, suspicions."""
    findings = Findings()
    own = local_sources(script)
    for path in [*own, *(p for p in others if p not in own)]:
        source, hits = unwrapped(path.read_bytes()), []
        try:
            parsed(source, oldest=True)
            lines = newer_fstrings(source.decode("utf-8", "replace"))
            problem = f"line {lines[0]}: an f-string that needs Python 3.12" if lines else ""
        except UNREADABLE as error:
            problem = f"line {getattr(error, 'lineno', 0)}: {str(error) or type(error).__name__}"
        findings.test("S1", "accounting", not problem, path.name, problem, "parses as Python 3.10",
                      suspect=path not in own)
        for number, program in enumerate(programs(path.read_bytes())):
            with contextlib.suppress(*UNREADABLE):
                hits += [hit for hit in scan(parsed(program)) if hit not in hits]
            if number == 63:
                hits.append(Hit(0, "accounting", "1.1", "more programs inside one another than are read here", False))
        for hit in hits:
            findings.test("S2", hit.condition, False, f"{path.name}:{hit.line}", f"{hit.text}: ruling {hit.ruling}",
                          suspect=not hit.certain or path not in own)
        if not hits:
            findings.test("S2", "C3", True, path.name, "", "no pattern of an illegal technique")
    return findings


def static_bytes(folder: Path, script: Path) -> list[Finding]:
    """Ask S3: bytes of the code that is imported or lies there, and of the weights, or what submission.json says."""
    files = {p: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    code = {p for p in files if p.suffix in CODE} | set(local_sources(script))
    code_bytes = sum(p.stat().st_size for p in code)
    parts = [size for p, size in files.items() if p.suffix in WEIGHTS]
    weights = max(parts, default=0)
    figures = {}
    for path in sorted(folder.glob("submission*.json"))[:1]:
        figures = readable(path, json.loads, path.read_bytes())
    total, told = code_bytes + weights, isinstance(figures.get("bytes_total"), int)
    if told and not weights:
        total = figures["bytes_total"] - int(figures.get("bytes_code") or code_bytes) + code_bytes
    unknown = not weights and not (told and figures.get("bytes_code"))
    near = CAP - NEAR_CAP <= total < CAP
    text = "under the cap"
    if total >= CAP:
        text = f"over the cap of {CAP:,} by {total - CAP:,}: ruling Q"
    elif near:
        text = f"within {NEAR_CAP:,} bytes of the cap: another seed may exceed it"
    if unknown:
        text += "; of the weights nothing is known: submission.json needs bytes_total and bytes_code"
    findings = [finding("S3", "accounting", total < CAP and not near and not unknown,
                        f"bytes={total:,} code={code_bytes:,} files={len(code)}", text, text, suspect=total < CAP)]
    strange = {p: size for p, size in files.items() if p not in code and p.suffix not in (*WEIGHTS, ".py") and
               (p.suffix not in PAPERS or size > LARGEST_PAPER)}
    whole = total + sum(parts) - weights + sum(strange.values())
    if whole >= CAP > total:
        findings.append(Finding("S3", "accounting", False, f"bytes={whole:,} files={len(files)}",
                                "over the cap if all of these files are needed: ruling Q", suspect=True))
    for path in sorted(p for p in {*strange, *code} if p.suffix in OPAQUE or files.get(p, 0) > LARGEST_PAPER):
        findings.append(Finding("S3", "accounting", False, f"{path.relative_to(folder)}: {files[path]:,} bytes",
                                "cannot be read here: ruling 1.1", suspect=True))
    return findings


def spelled(sp: Any, ids: Sequence[int]) -> bytes:
    """Return the UTF-8 bytes of pieces; a space mark is none at the beginning and behind an id without text."""
    parts, inside = [], False
    for i in ids:
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            inside = False
            continue
        piece = sp.id_to_piece(i) if inside else sp.id_to_piece(i).removeprefix("\u2581")
        parts.append(bytes([int(piece[3:5], 16)]) if sp.is_byte(i) else piece.replace("\u2581", " ").encode())
        inside = True
    return b"".join(parts)


def static_tokenizer(path: Path) -> Finding:
    """Ask S4: every piece's bytes as this repository's table has them against what SentencePiece decodes."""
    from sentencepiece import SentencePieceProcessor
    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ToolError(f"TOKENIZER={path}: not a SentencePiece model ({str(error).splitlines()[0]})") from None
    sizes = load_module(ROOT / "train_gpt.py").TokenBytes.build(sp).base
    wrong = sum(int(sizes[i]) != len(spelled(sp, [i])) for i in range(sp.vocab_size()))
    alone = sp.piece_to_id("\u2581") != sp.unk_id()
    return finding("S4", "accounting", not wrong and alone,
                   f"pieces={sp.vocab_size()} wrong={wrong} lone_space={int(alone)}",
                   "no stand-alone space piece, or wrong bytes: ruling O", "pieces stand for what they spell")


def static_overlap(folder: Path) -> Finding:
    """Ask S5: no document of the validation shards is among the training shards, by the stamp of `data verify`."""
    path = folder / "verified.json"
    if not path.is_file():
        raise ToolError(f"{path}: missing; ./run.sh data verify {folder} compares the documents and writes it")
    stamp = readable(path, json.loads, path.read_bytes())
    fits = stamp["shards_sha256"] == load_module(ROOT / "train_gpt.py").shards_sha256(folder)
    shared = stamp["shared_documents"]
    wrong = "documents of the validation set are trained on: ruling N"
    if not fits:
        wrong = "the stamp is of other shards: verify the dataset again"
    return finding("S5", "accounting", fits and not shared, f"val={stamp['val_documents']} common={shared}", wrong,
                   "no document of the validation set is trained on")


def static_audit(path: Path, options: Mapping[str, str]) -> list[Finding]:
    """Ask S1..S3 of a submission's folder or script, S4 with TOKENIZER=, S5 with DATA_PATH=. Imports nothing of it."""
    unknown = sorted(set(options) - {"TOKENIZER", "DATA_PATH"})
    if unknown:
        raise ToolError(f"{unknown[0]}: --static takes TOKENIZER and DATA_PATH alone")
    scripts = [path] if path.is_file() else []
    if path.is_dir():
        every = sorted(path.rglob("*.py"))
        scripts = sorted(path.glob("train_gpt*.py")) or sorted(path.glob("*.py")) or every
        scripts += [p for p in every if p not in scripts]
    if not scripts:
        raise ToolError(f"{path}: no such script, nor a folder that holds one")
    findings = static_sources(scripts[0], scripts[1:])
    if path.is_dir():
        findings += static_bytes(path, scripts[0])
    if "TOKENIZER" in options:
        findings.append(static_tokenizer(Path(options["TOKENIZER"])))
    if "DATA_PATH" in options:
        findings.append(static_overlap(Path(options["DATA_PATH"])))
    return findings


def static_main(arguments: Sequence[str]) -> int:
    """Print the static audit of a path; the rest are its options."""
    if not arguments:
        raise ToolError("--static: give the folder of a submission or a script")
    findings = readable(arguments[0], static_audit, Path(arguments[0]), pairs(arguments[1:]))
    print(table(findings))
    return failed(findings)
