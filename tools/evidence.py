"""What is read of a submission without running it: the logs of its runs, its sources, its files. Imports no torch.

`audit.py` and `submission.py` judge by these findings; their codes and rulings are those of `audit.py`'s first lines.
"""
from __future__ import annotations

import ast
import base64
import contextlib
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tools.logs import InputError, events, last, pairs

ROOT = Path(__file__).resolve().parents[1]

CONDITIONS = ("C1", "C2", "C3", "C4", "accounting")


class AuditError(InputError):
    """The audit cannot be made as asked; one line for the user."""


def readable(what: object, look: Callable[..., Any], *given: Any) -> Any:
    """look(*given) on a stranger's file; `AuditError` where its contents are of another kind than asked for."""
    try:
        return look(*given)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise AuditError(f"{what}: cannot be read: {type(error).__name__}: {error}") from error


class Finding(NamedTuple):
    """What one probe found out about one condition."""
    code: str
    """Probe of the rules: D1..D9, A1..A4, S1..S5."""
    condition: str
    """C1..C4 or accounting."""
    ok: bool
    figures: str
    """What was measured."""
    text: str
    """What was asked or, where it failed, which ruling this is."""
    suspect: bool = False
    """A heuristic's hit: to be looked at by a reader, no failure."""


def load_module(path: Path) -> ModuleType:
    """Import the script under audit. Raises `AuditError` where there is none."""
    if not path.is_file():
        raise AuditError(f"SCRIPT={path}: no such file; give the training script of the submission")
    known = sys.modules.get("train_gpt")
    if known is not None and Path(known.__file__ or "").resolve() == path.resolve():
        return known  # a second copy would be a stranger to the classes of the first
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module
    spec.loader.exec_module(module)
    return module


# -- the log of a run -----------------------------------------------------------------------------------

CASEOPS = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
TOKENS_PER_BYTE = {"fineweb10B_sp1024": 0.4105, "fineweb10B_sp4096": 1 / 3.322, "fineweb10B_sp8192": 0.26834,
                   CASEOPS: 47_851_520 / 151_074_309}
"""Of the whole validation set under the published tokenizers (rules 1.4)."""


def dataset_name(caseops: bool, vocab_size: object) -> str:
    """The published dataset of a vocabulary."""
    return CASEOPS if caseops else f"fineweb10B_sp{vocab_size}"


def audit_log(path: Path, blob_bytes: int | None) -> list[Finding]:
    """A1..A4 on a run's JSON lines; `blob_bytes`: size of the audited artifact. Raises `AuditError` without verdict."""
    found = events(path) if path.is_file() else []
    verdict, config = last(found, "verdict"), last(found, "config") or {}
    if verdict is None:
        raise AuditError(f"LOG={path}: holds no verdict; give the .jsonl of a finished run")
    phases = [(e["seconds"] - e["phase_seconds"], e["seconds"], e["name"]) for e in found if e["event"] == "phase"]
    gap, at = 0.0, 0.0
    for begin, end, _ in phases:
        gap, at = max(gap, begin - at), max(at, end)
    total = float(verdict["total_seconds"])
    gap, allowed = max(gap, total - at), max(2.0, 0.02 * total)
    names = [name for _, _, name in phases]
    opened = [i for i, e in enumerate(found) if e["event"] in ("val_probe", "val_data") or
              (e["event"] == "phase" and e["name"] in ("prequant_ttt", "val_probe"))]
    written = [i for i, e in enumerate(found) if e["event"] == "phase" and e["name"] == "write"]
    trained = "train" in names
    early = trained and (not written or any(i < written[0] for i in opened))
    limits = {"train": float(config.get("max_wallclock_seconds") or math.inf),
              "eval": float(config.get("eval_seconds_budget") or 600.0)}
    spent = {budget: float(verdict[f"{budget}_seconds"]) for budget in limits}
    over = [budget for budget in limits if spent[budget] > limits[budget]]
    ratio = verdict["tokens"] / verdict["bytes"]
    name = config.get("dataset") or dataset_name(config.get("caseops_enabled"), config.get("vocab_size"))
    known = TOKENS_PER_BYTE.get(name) if verdict["tokens"] > 10_000_000 else None
    implied = verdict["val_loss"] / math.log(2) * ratio
    wrong = abs(implied - verdict["val_bpb"]) > 1e-5 * implied or \
        (abs(ratio / known - 1) > 1e-3 if known else not 0.1 < ratio <= 1)
    size, cap = verdict["artifact_bytes"], min(16_000_000, verdict["cap_bytes"])
    mismatch = blob_bytes is not None and blob_bytes + verdict["code_bytes"] != size
    return [
        Finding("A1", "accounting", gap <= allowed, f"largest_gap={gap:.2f}s of {total:.1f}s",
                "the clock has an untimed gap" if gap > allowed else "no untimed gap between the phases"),
        Finding("A2", "C3", not early, f"phases={len(phases)} opened={len(opened)}",
                "validation data was opened before the artifact was written: rulings A, C" if early else
                "validation data was opened after the artifact was written"),
        Finding("A2", "C3", not verdict["illegal"], f"illegal={verdict['illegal'] or 'no'}",
                "the run is marked illegal" if verdict["illegal"] else "the run carries no mark"),
        Finding("A1", "accounting", not over, " ".join(f"{b}={spent[b]:.1f}/{limits[b]:g}s" for b in limits),
                f"over budget: {', '.join(over)}: rulings I, J" if over else "both budgets are kept"),
        Finding("A3", "accounting", not wrong, f"tokens_per_byte={ratio:.5f} known={known or 'no'}",
                "tokens, bytes and val_bpb do not fit together, or not the dataset: ruling O" if wrong else
                "tokens, bytes and val_bpb fit together"),
        Finding("A4", "accounting", size < cap and not mismatch, f"bytes={size:,} cap={cap:,}",
                "code and weights exceed the cap, or are not those of the log: ruling Q" if size >= cap or mismatch
                else "code and weights are under the cap"),
    ]


# -- static audit ---------------------------------------------------------------------------------------

NETWORK = {"socket", "urllib", "requests", "huggingface_hub", "http", "ftplib"}
OUTSIDE = {"subprocess", "ctypes"}
FREEZING = re.compile(r"serialize|quantize|gptq|pack_|save_model", re.I)
LEARNING = re.compile(r"(^|_)(ttt|adapt|finetune|fine_tune|train)", re.I)
ADAPTING = re.compile(r"(^|_)(ttt|adapt|finetune|fine_tune)", re.I)
"""Names that leave no other reading; a training loop may be given the validation data to probe itself."""
VALIDATION = re.compile(r"(^|_)val(id|idation)?(_|$)", re.I)
PREQUANT = re.compile(r"pre_?quant.*ttt|ttt.*pre_?quant", re.I)
TARGET = re.compile(r"(^|_)(target|tgt|label|next_?tok)", re.I)
CONTEXT = re.compile(r"ctx|context|hash", re.I)
LOSS = re.compile(r"nll|loss|nats", re.I)
SPACE_TABLE = re.compile(r"(leading|has)_?space", re.I)
WORD_TABLE = re.compile(r"(boundary|starts?_new_word|word_start)", re.I)
CAP = 16_000_000
NEAR_CAP = 20_000
"""Runs of one program differ by up to this many bytes (#1978)."""
CODE = (".py", ".c", ".cpp", ".cu", ".h", ".hpp", ".so", ".sh")
WEIGHTS = (".bin", ".ptz", ".xz", ".lzma", ".zst", ".br", ".lrz", ".npz", ".pt", ".pkl")


def names_in(node: ast.AST) -> list[str]:
    """Every identifier below a node."""
    return [n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node)
            if isinstance(n, (ast.Name, ast.Attribute))]


def called(node: ast.Call) -> str:
    """Dotted name of what a call calls, as far as it is one: `np.minimum`, `os.system`."""
    parts, f = [], node.func
    while isinstance(f, ast.Attribute):
        parts, f = [f.attr, *parts], f.value
    return ".".join([*([f.id] if isinstance(f, ast.Name) else []), *parts])


def literal(node: ast.AST) -> bytes | None:
    """Bytes of a constant, also through b85decode, b64decode and .encode(); None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, bytes) else None if not isinstance(node.value, str) else \
            node.value.encode("latin-1", "replace")
    if isinstance(node, ast.Call):
        name = called(node).rsplit(".", 1)[-1]
        if name == "encode" and isinstance(node.func, ast.Attribute):
            return literal(node.func.value)
        inner = literal(node.args[0]) if node.args else None
        if inner is not None and name in ("b85decode", "b64decode", "a85decode"):
            return getattr(base64, name)(inner)
    return None


UNREADABLE = (SyntaxError, ValueError, MemoryError, RecursionError, tokenize.TokenError)
"""What Python's parser and tokenizer raise for a source that is none, or is nested without end."""
LARGEST_SOURCE = 1 << 24
"""Bytes of a source, unpacked: the cap."""


def unwrapped(source: bytes) -> bytes:
    """The program inside a self-extracting wrapper (LZMA or zlib in a literal), else the source itself.

    Raises `AuditError` for one that unpacks to more than LARGEST_SOURCE.
    """
    with contextlib.suppress(*UNREADABLE):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and called(node).endswith("decompress") and node.args:
                data = literal(node.args[0])
                for reader in (lzma.LZMADecompressor(memlimit=1 << 28), zlib.decompressobj()):
                    with contextlib.suppress(lzma.LZMAError, zlib.error):
                        if data:
                            found = reader.decompress(data, LARGEST_SOURCE + 1)
                            if len(found) > LARGEST_SOURCE:
                                raise AuditError(f"a wrapper unpacks to more than {LARGEST_SOURCE:,} bytes")
                            if reader.eof:
                                return found
    return source


def newer_fstrings(source: str) -> list[int]:
    """Lines of f-strings that need Python 3.12: the outer quote used again inside (seen by 3.12's tokenizer alone)."""
    start, end, found, quotes = getattr(token, "FSTRING_START", -1), getattr(token, "FSTRING_END", -1), [], []
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type in (start, token.STRING) and quotes and t.string.lstrip("rRbBfFuU")[0] == quotes[-1]:
            found.append(t.start[0])
        if t.type == start:
            opening = t.string.lstrip("rRbBfF")
            quotes.append(opening if len(opening) == 1 else "")
        elif t.type == end:
            quotes.pop()
    return found


class Hit(NamedTuple):
    """One place in a source."""
    line: int
    condition: str
    ruling: str
    text: str
    certain: bool


def scan(tree: ast.AST) -> list[Hit]:
    """S2: what a source shows of the rulings; certain only where there is no lawful reading."""
    hits = []
    table_adds = space_adds = None
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            roots = {a.name.split(".")[0] for a in node.names} if isinstance(node, ast.Import) else \
                {(node.module or "").split(".")[0]} if not node.level else set()
            hits += [Hit(node.lineno, "accounting", "1.1", f"imports {name}: no network in a run", True)
                     for name in sorted(roots & NETWORK)]
            hits += [Hit(node.lineno, "accounting", "1.1", f"imports {name}: outside code must be counted", False)
                     for name in sorted(roots & OUTSIDE)]
        elif isinstance(node, ast.Call):
            hits += scan_call(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            hits += scan_function(node)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitXor, ast.BitOr)):
            sides = [names_in(node.left), names_in(node.right)]
            for context, target in (sides, sides[::-1]):
                if any(map(CONTEXT.search, context)) and any(map(TARGET.search, target)):
                    hits.append(Hit(node.lineno, "C2", "E", "the target's id is part of a hash key", True))
                    break
        elif isinstance(node, ast.Subscript) and isinstance(node.value, (ast.Name, ast.Attribute)):
            if WORD_TABLE.search(names_in(node.value)[0]) and any(map(TARGET.search, names_in(node.slice))):
                hits.append(Hit(node.lineno, "C1", "F", "a table of word starts is read at the target", False))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            sides = node.left, node.right
            if any(isinstance(s, ast.Constant) and s.value == 1 for s in sides) and \
                    any(isinstance(s, ast.Call) and called(s) == "len" and "encode" in names_in(s) for s in sides):
                table_adds = node.lineno
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Add) and \
                any(map(SPACE_TABLE.search, names_in(node.value if isinstance(node, ast.AugAssign) else node))):
            space_adds = node.lineno
    if table_adds and space_adds:
        hits.append(Hit(table_adds, "accounting", "O", f"the leading space is counted here and in line {space_adds}",
                        True))
    return sorted(set(hits))


def scan_call(node: ast.Call) -> list[Hit]:
    """Hits of a single call."""
    name = called(node)
    arguments = [n for a in (*node.args, *(k.value for k in node.keywords)) for n in names_in(a)]
    last, hits = name.rsplit(".", 1)[-1], []
    if name in ("os.system", "os.popen") or last in ("load_inline", "CDLL"):
        hits.append(Hit(node.lineno, "accounting", "1.1", f"calls {name}: outside code must be counted", False))
    if PREQUANT.search(last):
        hits.append(Hit(node.lineno, "C3", "C", f"calls {name}: learns before the weights are frozen", False))
    if last in ("min", "minimum", "fmin") and len(node.args) > 1 and \
            sum(any(map(LOSS.search, names_in(a))) for a in node.args) > 1:
        hits.append(Hit(node.lineno, "C4", "B", "the smaller of two losses is kept", last != "min"))
    if re.search(r"hessian|calib", last, re.I) and any(map(VALIDATION.search, arguments)):
        hits.append(Hit(node.lineno, "C3", "H", f"{name} reads validation data", True))
    return hits


def scan_function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[Hit]:
    """Hits that need the order of a function's calls: learning from validation data ahead of freezing the weights."""
    calls = sorted((n for n in ast.walk(node) if isinstance(n, ast.Call)), key=lambda c: (c.lineno, c.col_offset))
    last_name = [(c.lineno, called(c).rsplit(".", 1)[-1]) for c in calls]
    frozen = [line for line, name in last_name if FREEZING.search(name) and not PREQUANT.search(name)]
    hits = []
    for call, (_, name) in zip(calls, last_name):
        read = [n for a in (*call.args, *(k.value for k in call.keywords)) for n in names_in(a)]
        if frozen and call.lineno < frozen[-1] and LEARNING.search(name) and not name.startswith("eval") and \
                any(map(VALIDATION.search, read)):
            hits.append(Hit(call.lineno, "C3", "C", f"{name} gets validation data before line {frozen[-1]} freezes the "
                            f"weights", ADAPTING.search(name) is not None))
    return hits


def local_sources(script: Path) -> list[Path]:
    """The script and every file next to it that it imports, directly or not."""
    found, queue = [], [script]
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.append(path)
        with contextlib.suppress(*UNREADABLE):
            for node in ast.walk(ast.parse(unwrapped(path.read_bytes()))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                    [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                queue += [p for name in names if (p := script.parent / (name.split(".")[0] + ".py")).is_file()]
    return found


def static_sources(script: Path) -> list[Finding]:
    """S1 and S2 of one script and what it imports from its folder."""
    findings = []
    for path in local_sources(script):
        source = unwrapped(path.read_bytes())
        try:
            tree = ast.parse(source, feature_version=(3, 10))
            lines = newer_fstrings(source.decode("utf-8", "replace"))
            problem = f"line {lines[0]}: an f-string that needs Python 3.12" if lines else ""
        except UNREADABLE as error:
            problem = f"line {getattr(error, 'lineno', 0)}: {str(error) or type(error).__name__}"
            tree = ast.Module([], [])
        findings.append(Finding("S1", "accounting", not problem, path.name, problem or "parses as Python 3.10"))
        hits = scan(tree)
        findings += [Finding("S2", h.condition, False, f"{path.name}:{h.line}", f"{h.text}: ruling {h.ruling}",
                             suspect=not h.certain) for h in hits]
        if not hits:
            findings.append(Finding("S2", "C3", True, path.name, "no pattern of an illegal technique"))
    return findings


def static_bytes(folder: Path, script: Path) -> Finding:
    """S3: bytes of the code that is imported or lies there, and of the weights (or what submission.json says of them).
    """
    code = {p for p in folder.iterdir() if p.suffix in CODE and p.suffix != ".py"} | set(local_sources(script))
    code_bytes = sum(p.stat().st_size for p in code)
    weights = max((p.stat().st_size for p in folder.iterdir() if p.suffix in WEIGHTS), default=0)
    figures = {}
    for told in sorted(folder.glob("submission*.json"))[:1]:
        try:
            figures = json.loads(told.read_text(encoding="utf-8"))
        except ValueError as error:
            raise AuditError(f"{told}: not JSON ({error}); repair it") from None
    total = code_bytes + weights
    said = isinstance(figures.get("bytes_total"), int)
    if not weights and said:
        total = figures["bytes_total"] - int(figures.get("bytes_code") or code_bytes) + code_bytes
    near = CAP - NEAR_CAP <= total < CAP
    text = f"over the cap of {CAP:,} by {total - CAP:,}: ruling Q" if total >= CAP else \
        f"within {NEAR_CAP:,} bytes of the cap: another seed may exceed it" if near else "under the cap"
    unsaid = not weights and not (said and figures.get("bytes_code"))
    text += "; of the weights nothing is known: submission.json needs bytes_total and bytes_code" * unsaid
    return Finding("S3", "accounting", total < CAP and not near and not unsaid, f"bytes={total:,} code={code_bytes:,} "
                   f"files={len(code)}", text, suspect=total < CAP)


def spelled(sp: Any, ids: Sequence[int]) -> bytes | None:
    """UTF-8 bytes that pieces stand for, without the first one's space mark; None where an id stands for no text."""
    parts = []
    for number, i in enumerate(ids):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            return None
        piece = sp.id_to_piece(i)
        piece = piece if number else piece.removeprefix("\u2581")
        parts.append(bytes([int(piece[3:5], 16)]) if sp.is_byte(i) else piece.replace("\u2581", " ").encode())
    return b"".join(parts)


def static_tokenizer(path: Path) -> Finding:
    """S4: every piece's bytes as this repository's table has them against what SentencePiece decodes."""
    from sentencepiece import SentencePieceProcessor
    module = load_module(ROOT / "train_gpt.py")
    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise AuditError(f"TOKENIZER={path}: not a SentencePiece model ({str(error).splitlines()[0]})") from None
    table = module.TokenBytes.build(sp)
    bad = []
    for i in range(sp.vocab_size()):
        text = spelled(sp, [i])
        expected = 0 if text is None else len(text)
        if int(table.base[i]) != expected:
            bad.append(i)
    alone = sp.piece_to_id("\u2581") != sp.unk_id()
    ok = not bad and alone
    return Finding("S4", "accounting", ok, f"pieces={sp.vocab_size()} wrong={len(bad)} lone_space={int(alone)}",
                   "pieces stand for what they spell" if ok else "no stand-alone space piece, or wrong bytes: ruling O")


def static_overlap(folder: Path) -> Finding:
    """S5: no document of the validation shards is among the training shards (by SHA-256 of its ids)."""
    module = load_module(ROOT / "train_gpt.py")

    def digests(split: str) -> Iterator[bytes]:
        stream = module.TokenStream(folder, f"fineweb_{split}")
        starts = [*stream.document_starts().tolist(), len(stream)]
        for begin, end in zip(starts, starts[1:]):
            yield hashlib.sha256(stream.read(begin, end).tobytes()).digest()

    held = set(digests("val"))
    common, train = set(), 0
    for digest in digests("train"):
        train += 1
        common |= {digest} & held
    return Finding("S5", "accounting", not common, f"val={len(held)} train={train} common={len(common)}",
                   "documents of the validation set are trained on: ruling N" if common else
                   "no document of the validation set is trained on")


def static_audit(path: Path, given: Mapping[str, str]) -> list[Finding]:
    """S1..S3 of a submission's folder or script, S4 with TOKENIZER=, S5 with DATA_PATH=. Imports nothing of it."""
    unknown = sorted(set(given) - {"TOKENIZER", "DATA_PATH"})
    if unknown:
        raise AuditError(f"{unknown[0]}: --static takes TOKENIZER and DATA_PATH alone")
    script = path
    if path.is_dir():
        scripts = sorted(path.glob("train_gpt*.py")) or sorted(path.glob("*.py"))
        if not scripts:
            raise AuditError(f"{path}: holds no train_gpt.py; give the folder of a submission or a script")
        script = scripts[0]
    elif not path.is_file():
        raise AuditError(f"{path}: no such folder or script")
    findings = static_sources(script)
    if path.is_dir():
        findings.append(static_bytes(path, script))
    if "TOKENIZER" in given:
        findings.append(static_tokenizer(Path(given["TOKENIZER"])))
    if "DATA_PATH" in given:
        findings.append(static_overlap(Path(given["DATA_PATH"])))
    return findings


def static_main(arguments: Sequence[str]) -> int:
    """`audit.py --static PATH [KNOB=value ...]`: 0 nothing found, 1 something was, 2 it could not be made."""
    try:
        if not arguments:
            raise AuditError("--static: give the folder of a submission or a script")
        findings = readable(arguments[0], static_audit, Path(arguments[0]), pairs(arguments[1:]))
    except (InputError, OSError) as error:
        print(f"audit.py: {error}", file=sys.stderr)
        return 2
    print(table(findings))
    return failed(findings)


# -- report ----------------------------------------------------------------------------------------------


def failed(findings: Sequence[Finding]) -> int:
    """Exit status of an audit: 1 where a probe failed."""
    return int(any(not f.ok and not f.suspect for f in findings))


def table(findings: Sequence[Finding], conditions: Sequence[str] = CONDITIONS) -> str:
    """One line for each finding, and last the verdict of each condition."""
    lines = [f"{'probe':5s} {'condition':10s} {'verdict':8s} figures"]
    for f in findings:
        verdict = "pass" if f.ok else "suspect" if f.suspect else "FAIL"
        text = f"{f.code:5s} {f.condition:10s} {verdict:8s} {f.figures}  {f.text}"
        lines.append("".join(c if c.isprintable() else " " for c in text))  # it may quote foreign files
    return "\n".join([*lines, verdict_line(findings, conditions)])


def verdict_line(findings: Sequence[Finding], conditions: Sequence[str]) -> str:
    """`verdict C1=pass ... accounting=FAIL`; a condition that no probe looked at is `-`."""
    parts = []
    for condition in conditions:
        own = [f for f in findings if f.condition == condition]
        failed = [f.code for f in own if not f.ok and not f.suspect]
        parts.append(f"{condition}=" + ("-" if not own else f"FAIL({','.join(dict.fromkeys(failed))})" if failed
                                        else "pass"))
    return "verdict " + " ".join(parts)
