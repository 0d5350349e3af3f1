"""
documents.py -- files -> documents -> ids: what `prepare.py text` does once per document, in worker processes.

The parent reads raw rows (a line of JSON, a whole .txt, a Parquet value) and deals batches of them; a worker parses,
cleans, hashes and encodes. Nothing here loads torch, so that a worker starts in a blink and stays small.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib
import io
import itertools
import json
import lzma
import re
import sys
import sysconfig
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import brotli
import numpy as np
import sentencepiece

BOS = 1
TRAIN, VAL = 0, 1
SIDES = ("train", "val")
"""Names of the two sides, indexed by TRAIN and VAL."""

MAX_DOCUMENT_BYTES = 32_000_000
"""Longest document, in UTF-8 bytes; SentencePiece takes about 33 bytes of memory for each."""

TRANSFORMS = ("none", "caseops_v1", "caseops_v2")
"""What is done to a text before SentencePiece sees it; the last two are data/caseops.py."""


def refuse(message: str) -> NoReturn:
    """Raises train_gpt's UserError: one line with what is wrong, what was expected, the remedy."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from train_gpt import UserError  # loads torch: only where something is wrong

    raise UserError(message)


def require_package(package: str) -> Any:
    """Imports a package that only some inputs need (zstandard, pyarrow.parquet); UserError if it is missing."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        refuse(f"package {error.name!r} is needed to read this input: pip install -r requirements.txt")


def one_line(error: BaseException) -> str:
    """An exception's message with its line breaks made spaces."""
    return " ".join(str(error).split())


# ----------------------------------------------------------------------------------------------------
# 1 Rows: what the parent reads
#
# A file that ends too early is an error: half a corpus must not pass for a whole one.
# Safe to change: a new suffix is one reader and one row of READERS.
# ----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One document as it stands in its file."""

    place: str
    """For messages: "corpus.jsonl:17"."""
    content: bytes | str
    is_json: bool
    """`content` is a JSON object that holds the text in a field."""
    position: int
    """Bytes of the file read so far; for progress only."""


def read_txt(path: Path, text_field: str) -> Iterator[Row]:
    """The whole file is one document; `text_field` does not apply."""
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        too_long(str(path), path.stat().st_size)
    raw = path.read_bytes()
    yield Row(str(path), raw, False, len(raw))


def read_jsonl(path: Path, text_field: str) -> Iterator[Row]:
    """One JSON object a line; the suffix says how the lines are compressed. Blank lines are skipped."""
    with path.open("rb") as raw:
        lines: Iterable[bytes] = raw
        if path.name.lower().endswith(".gz"):
            lines = gzip.GzipFile(fileobj=raw)
        elif path.name.lower().endswith(".zst"):
            lines = zst_lines(raw)
        position = 0
        for number, line in enumerate(lines, start=1):
            position = position + len(line) if lines is raw else raw.tell()
            if not line.isspace():
                yield Row(f"{path}:{number}", line, True, position)


def zst_lines(raw: io.BufferedIOBase) -> Iterator[bytes]:
    """Lines of a Zstandard stream of any number of frames. EOFError if the last frame is not complete."""
    zstandard = require_package("zstandard")
    # Not stream_reader: at a cut-off file it ends like at a complete one (zstandard 0.25).
    new_frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
    frame, started, tail = new_frame(), False, b""
    try:
        while chunk := raw.read(1 << 20):
            while chunk:
                *lines, tail = (tail + frame.decompress(chunk)).split(b"\n")
                yield from (line + b"\n" for line in lines)
                started, chunk = True, b""
                if frame.eof:
                    chunk, frame, started = frame.unused_data, new_frame(), False
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if started:
        raise EOFError("compressed data ended before its end marker")
    if tail:
        yield tail


def read_parquet(path: Path, text_field: str) -> Iterator[Row]:
    """Column `text_field` of a Parquet file, one document a row."""
    parquet = require_package("pyarrow.parquet")
    size = path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                names = ", ".join(map(repr, columns[:8]))
                refuse(f"{path}: no column {text_field!r} (columns: {names}); see --text-field")
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    text = text_of({text_field: value}, text_field, f"{path}:{number}")
                    yield Row(f"{path}:{number}", text, False, size * number // file.metadata.num_rows)
    except require_package("pyarrow").ArrowException as error:
        raise OSError(str(error).splitlines()[0]) from error


READERS: Mapping[str, Callable[[Path, str], Iterator[Row]]] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".parquet": read_parquet,
}
"""Which reader opens a file, by the end of its name."""


def suffix_of(path: Path) -> str | None:
    """The suffix of READERS that `path` ends in, or None."""
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), None)


def input_files(inputs: Sequence[Path]) -> list[Path]:
    """Files to read: those given, and those with a known suffix below folders given, by name.

    Hidden files and folders are left out. UserError on a missing path, an unknown suffix, an empty folder.
    """
    known = ", ".join(READERS)
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            names = [file.relative_to(path) for file in path.rglob("*") if suffix_of(file) and file.is_file()]
            names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
            if not names:
                refuse(f"{path}: no file in this folder ends in one of {known}")
            files += [path / name for name in sorted(names, key=Path.as_posix)]
        elif not path.is_file():
            refuse(f"{path}: no such file or folder")
        elif suffix_of(path) is None:
            refuse(f"{path}: unknown kind of file; expected a name ending in one of {known}")
        else:
            files.append(path)
    return files


def file_rows(paths: Iterable[Path], text_field: str) -> Iterator[Row]:
    """Rows of files in order; `position` goes on from file to file. UserError on what cannot be read."""
    done = 0
    for path in paths:
        try:
            for row in READERS[suffix_of(path) or ".txt"](path, text_field):
                yield row._replace(position=done + row.position)
        except (EOFError, OSError, zlib.error) as error:
            refuse(f"{path}: cannot be read ({error}); complete? suffix right?")
        done += path.stat().st_size


def stdlib_sources() -> list[Path]:
    """Sources of the running Python's standard library, by name. UserError if it has none."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    found = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if left_out & set(name.parts[:-1]):
            continue
        # Written by the build: full of the paths and flags of one machine.
        if name.name.startswith("_sysconfigdata") or name.parts[0].startswith("config-"):
            continue
        # The same words as the topics, once more: a topic that validates would be trained on.
        if name.as_posix() == "pydoc_data/topics.py":
            continue
        found.append(path)
    if not found:
        refuse(f"{root} holds no Python sources; {OWN_TEXT}")
    return sorted(found, key=Path.as_posix)


OWN_TEXT = "prepare text of your own: prepare.py text INPUT... --name NAME"


def demo_rows() -> Iterator[Row]:
    """The documentation topics of the running Python, then the modules of its standard library."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        refuse(f"this Python lacks its documentation topics (pydoc_data); {OWN_TEXT}")
    for name in sorted(topics):
        yield Row(f"topic {name}", topics[name], False, 0)
    for path in stdlib_sources():
        yield Row(str(path), path.read_bytes(), False, 0)


# ----------------------------------------------------------------------------------------------------
# 2 Documents: what a worker makes of rows
#
# A document is known by the hash of its cleaned text; all that looks random (side, sample, order) is a keyed hash of
# that hash. So a text lands on one side wherever it stands and however often, and adding documents moves none of the
# others. Bytes that are not UTF-8 and lone surrogates become U+FFFD, which the normaliser drops; such documents are
# counted, not refused.
# Not safe to change: `clean`, `content_hash`, `draw`; each redraws every split ever made.
# ----------------------------------------------------------------------------------------------------

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def decode_utf8(raw: bytes) -> tuple[str, bool]:
    """Text of UTF-8 bytes (a byte order mark is dropped), and whether something had to be replaced."""
    try:
        return raw.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return raw.decode("utf-8-sig", errors="replace"), True


def text_of(row: Any, text_field: str, place: str) -> str:
    """The text of one JSON row. UserError if it has none."""
    if not isinstance(row, dict):
        refuse(f"{place}: expected a JSON object, found {type(row).__name__}")
    if not isinstance(row.get(text_field), str):
        fields = ", ".join(map(repr, itertools.islice(row, 8)))
        refuse(f"{place}: no string in field {text_field!r} (fields: {fields}); see --text-field")
    return row[text_field]


def clean(text: str) -> str:
    """What is hashed and encoded: the text stripped, NUL replaced by a space (as in the official export)."""
    return text.strip().replace("\0", " ")


def document(row: Row, text_field: str) -> tuple[str, bool]:
    """The cleaned text of a row, and whether something in it was not Unicode. UserError if it cannot be used."""
    text, repaired = (row.content, False) if isinstance(row.content, str) else decode_utf8(row.content)
    if row.is_json:
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError) as error:
            refuse(f"{row.place}: not JSON ({error}); is the file complete?")
        text = text_of(parsed, text_field, row.place)
    if LONE_SURROGATE.search(text):
        text, repaired = LONE_SURROGATE.sub("\ufffd", text), True
    text = clean(text)
    if len(text) > MAX_DOCUMENT_BYTES // 4 and (num_bytes := len(text.encode())) > MAX_DOCUMENT_BYTES:
        too_long(row.place, num_bytes)
    return text, repaired


def too_long(place: str, num_bytes: int) -> NoReturn:
    refuse(
        f"{place}: a document of {num_bytes:,} bytes; at most {MAX_DOCUMENT_BYTES:,}: split it,"
        " for example into lines of a .jsonl file"
    )


def content_hash(text: str) -> bytes:
    """Name of a cleaned text: 16 bytes of BLAKE2b."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def draw(digest: bytes, seed: int) -> tuple[int, int]:
    """Two independent numbers in [0, 2**64): the first decides a document's side, the second its place."""
    drawn = hashlib.blake2b(digest, key=str(seed).encode(), digest_size=16).digest()
    return int.from_bytes(drawn[:8], "big"), int.from_bytes(drawn[8:], "big")


def split_side(text: str, seed: int, val_share: float) -> str:
    """Side of a text, "train" or "val"; it depends on the text, the seed and the share alone.

    >>> split_side("a text", 0, 0.5) == split_side("  a text ", 0, 0.5)
    True
    """
    return SIDES[draw(content_hash(clean(text)), seed)[0] < val_share * 2**64]


RECORD = np.dtype([("high", ">u8"), ("low", ">u8"), ("number", "<i8"), ("size", "<i8"), ("side", "u1")])
"""What the scan keeps on disk of a document that is not empty: hash in two halves, number in the input, UTF-8 bytes."""


class Scanned(NamedTuple):
    """What the scan learned from a batch."""

    records: np.ndarray
    """[documents that are not empty] RECORD; `number` counts from the start of the batch."""
    rows: int
    repaired: int
    sample: list[tuple[int, bytes, str]]
    """Training documents with a place below the bound: place, hash, text."""


def scan_batch(
    rows: Sequence[Row], text_field: str, side: int | None, val_share: float, seed: int, bound: int
) -> Scanned:
    """Hashes the documents of a batch; `side` None draws train or val by `val_share`."""
    records, repaired, sample = np.zeros(len(rows), RECORD), 0, []
    used = 0
    for number, row in enumerate(rows):
        text, was_repaired = document(row, text_field)
        repaired += was_repaired
        if not text:
            continue
        digest = content_hash(text)
        split, place = draw(digest, seed)
        own = side if side is not None else (VAL if split < val_share * 2**64 else TRAIN)
        high, low = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
        records[used] = high, low, number, len(text.encode()), own
        used += 1
        if own == TRAIN and place < bound:
            sample.append((place, digest, text))
    return Scanned(records[:used], len(rows), repaired, sample)


class Encoded(NamedTuple):
    """The kept documents of a batch as ids, one after the other."""

    sides: np.ndarray
    """[D] uint8."""
    places: np.ndarray
    """[D] uint64: the second draw."""
    lengths: np.ndarray
    """[D] int64: ids of each document, BOS included; 0 where the normaliser left nothing."""
    text_bytes: np.ndarray
    """[D] int64: UTF-8 bytes of each document decoded again."""
    ids: np.ndarray
    """[sum of lengths] uint16."""
    id_bytes: np.ndarray
    """[sum of lengths] uint16: bytes of text of each id; empty without a transform."""
    unknown: int
    """Ids that stand for lost text; 0 with byte fallback."""
    digest_sum: int
    """Of the kept documents' hashes, mod 2**64: tells whether the input is still the one that was scanned."""


@functools.lru_cache(maxsize=1)
def worker_tokenizer(path: str) -> sentencepiece.SentencePieceProcessor:
    """The model, loaded once in each process."""
    return sentencepiece.SentencePieceProcessor(model_file=path)


def caseops(transform: str) -> Any:
    """The transform's `encode`, `decode`, `tokenize`, `training` (data/caseops.py); None for "none"."""
    if transform == "none":
        return None
    return importlib.import_module("caseops").VERSIONS[transform.removeprefix("caseops_")]


@functools.lru_cache(maxsize=1)
def invisible() -> str:
    """What the normaliser drops at the ends of a text; its bytes would belong to no token of the side file."""
    unseen = [c for c in map(chr, range(0x10000)) if unicodedata.category(c) in ("Cc", "Cf", "Zs", "Zl", "Zp")]
    return "".join(unseen) + "\u2581\ufffd"


def encode_batch(rows: Sequence[Row], text_field: str, kept: bytes, model: str, transform: str, seed: int) -> Encoded:
    """Encodes rows whose byte in `kept` is not 0 (1: train, 2: val). A document is BOS + ids."""
    tokenizer, operators = worker_tokenizer(model), caseops(transform)
    unknown_id = tokenizer.unk_id()
    sides, places, lengths, text_bytes, ids, id_bytes = [], [], [], [], [], []
    unknown = digest_sum = 0
    for row, keep in zip(rows, kept):
        if not keep:
            continue
        text, _ = document(row, text_field)
        digest = content_hash(text)
        digest_sum += int.from_bytes(digest[:8], "big")
        if operators is None:
            tokens = tokenizer.encode(text)
            num_bytes = len(tokenizer.decode(tokens).encode())
        else:
            try:
                found, counts = operators.tokenize(tokenizer, text.strip(invisible()))
            except ValueError as error:
                refuse(f"{row.place}: {one_line(error)}")
            tokens, num_bytes = found.tolist(), int(counts.sum(dtype=np.int64))
            if tokens:
                id_bytes.append(np.append(np.uint16(0), counts))
        unknown += tokens.count(unknown_id)
        if tokens:
            ids.append(np.array([BOS, *tokens], np.uint16))
        sides.append(keep - 1)
        places.append(draw(digest, seed)[1])
        lengths.append(len(tokens) + 1 if tokens else 0)
        text_bytes.append(num_bytes)
    none = np.zeros(0, np.uint16)
    return Encoded(
        np.array(sides, np.uint8),
        np.array(places, np.uint64),
        np.array(lengths, np.int64),
        np.array(text_bytes, np.int64),
        np.concatenate([none, *ids]),
        np.concatenate([none, *id_bytes]),
        unknown,
        digest_sum % 2**64,
    )


def compressed_size(compressor: str, text: bytes) -> int:
    """Bytes that "brotli -11" or "xz -9e" makes of a text."""
    if compressor == "xz -9e":
        return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    return len(brotli.compress(text, quality=11, lgwin=24))
