"""
prepare.py -- turn text into the token shards and the tokenizer that train_gpt.py reads.

    python data/prepare.py demo                              # text that every Python carries: offline
    python data/prepare.py text corpus/ --name mine          # your .txt, .jsonl[.gz|.zst], .parquet
    python data/prepare.py check data/datasets/demo_sp1024   # do the shards say what their manifest says?

The result is data/datasets/<name>_sp<V>/ (shards, manifest.json) and data/tokenizers/<name>_<V>_bpe.model.
Its bytes depend on the text, the options and the versions of Python, SentencePiece and brotli alone: not on
the order of the inputs (unless --order input), nor on the number of workers. data/README.md has the formats.

The text is read twice and never held whole: the first pass hashes, splits and samples, the second encodes.

  1 Errors, options   what a user may choose, and what is refused
  2 Documents         files -> Document; the demo's own documents
  3 Scan              clean, hash, drop duplicates, split, sample
  4 Tokenizer         SentencePiece with the challenge's settings
  5 Shards            ids <-> files; bytes of a token as the score counts them
  6 Encode            documents -> ids, over processes, in order
  7 Verify            every claim of a manifest, recomputed from the files
  8 Prepare           the whole story; atomic
  9 Command line
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import gzip
import hashlib
import heapq
import importlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

try:
    import brotli
    import numpy as np
    import sentencepiece
    from tqdm import tqdm
except ModuleNotFoundError as missing:  # the first thing that goes wrong outside the virtual environment
    if __name__ != "__main__":
        raise
    remedy = "pip install -r requirements.txt"
    print(f"prepare.py: package {missing.name!r} is missing: {remedy}", file=sys.stderr)
    sys.exit(2)

# ----------------------------------------------------------------------------------------------------
# 1 Errors, options
#
# Whatever a user can set or a file can contain ends in PrepareError: one line on stderr, exit status 2.
# Safe to change: every number here; those that change a dataset are in its manifest.
# ----------------------------------------------------------------------------------------------------

FORMAT = 1
"""Version of manifest.json. A dataset of another version is rebuilt, never half-understood."""

TRAIN, VAL = 0, 1
SIDES = ("train", "val")
"""Names of the two sides, indexed by TRAIN and VAL."""

DEMO_VAL_SHARE = 0.0275
DEMO_SEED = 40
"""About 120,000 of the demo's 4.3 M tokens validate, which a CPU scores in seconds. Modules differ much in
length; of 1,500 seeds this one keeps validation within 119,000 to 136,000 tokens on Python 3.10 to 3.13."""

TOKENIZER_SAMPLE_BYTES = 100_000_000
"""Most training text that the tokenizer is trained on; of more, the documents with the lowest keyed hash."""

MAX_DOCUMENT_BYTES = 32_000_000
"""Longest document, in UTF-8 bytes; SentencePiece takes about 33 bytes of memory for each."""

BATCH_BYTES = 1_000_000
"""Text that one worker encodes per task: a quarter of a second of work."""

MAX_COMPRESSED_TEXT_BYTES = 64_000_000
"""Longest validation text that is given to xz and brotli (together about 3 minutes at this size)."""


class PrepareError(ValueError):
    """A mistake that the user can repair. One line: what is wrong, what was expected, the remedy."""


def require(package: str) -> Any:
    """Imports a package that only some inputs need (zstandard, pyarrow.parquet). PrepareError if missing."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise PrepareError(
            f"package {error.name!r} is needed to read this input: pip install -r requirements.txt"
        ) from error


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Options:
    """What a user may choose. Raises PrepareError on a value that cannot work."""

    name: str
    """First part of the dataset's and the tokenizer's file names."""
    out: Path = Path(__file__).resolve().parent
    """Folder that gets datasets/ and tokenizers/."""
    vocab_size: int = 1024
    """Pieces of the tokenizer to train, if none is given. Ids are uint16, hence at most 65,536."""
    tokenizer: Path | None = None
    """A SentencePiece model to use instead of training one."""
    val_share: float | None = 0.01
    """Share of documents that validate, in (0, 0.5]; None where validation has files of its own."""
    seed: int = 0
    """Key of the hash that splits, samples and orders documents."""
    order: str = "hash"
    """Of documents in the shards: "hash" (shuffled; the same for any packaging of the text) or "input"."""
    shard_tokens: int = 100_000_000
    """Tokens per shard file; the last is shorter. The official export has 10**8."""
    workers: int = field(default_factory=available_cpus)
    """Processes that encode. Changes the time, never the result."""
    force: bool = False
    """Replace an existing dataset of the same name."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise PrepareError(f"--name {self.name!r}: use letters, digits, '_', '-' and '.' only")
        if not 261 <= self.vocab_size <= 65_536:
            raise PrepareError(
                f"--vocab-size {self.vocab_size}: expected 261 (controls, bytes, a piece) to 65536 (uint16)"
            )
        if self.val_share is not None and not 0 < self.val_share <= 0.5:
            raise PrepareError(f"--val-share {self.val_share}: expected a share above 0 and at most 0.5")
        if not 0 <= self.seed < 2**63:
            raise PrepareError(f"--seed {self.seed}: expected 0 to 2**63 - 1")
        if self.order not in ("hash", "input"):
            raise PrepareError(f"--order {self.order}: expected hash or input")
        if not 1 <= self.shard_tokens < 2**31:
            raise PrepareError(f"--shard-tokens {self.shard_tokens}: expected 1 to 2**31 - 1 (an int32)")
        if self.workers < 1:
            raise PrepareError(f"--workers {self.workers}: expected 1 or more")


# ----------------------------------------------------------------------------------------------------
# 2 Documents
#
# A reader yields (place, text, whether bytes were replaced, file bytes read so far). Bytes that are not UTF-8
# and lone surrogates become U+FFFD, which the normaliser drops; such documents are counted, not refused.
# A file that ends too early is an error: half a corpus must not pass for a whole one.
# Safe to change: a new suffix is one reader and one row of READERS.
# ----------------------------------------------------------------------------------------------------


class Document(NamedTuple):
    """One document of the input."""

    name: str
    """Where it stands, for messages: "corpus.jsonl:17"."""
    text: str
    repaired: bool
    """Something in it was not Unicode and was replaced by U+FFFD."""
    file_bytes: int
    """Bytes of the input file since the previous document; for progress only."""


Read = Iterator[tuple[str, str, bool, int]]
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def decode_utf8(raw: bytes) -> tuple[str, bool]:
    """Text of UTF-8 bytes (a byte order mark is dropped), and whether something had to be replaced."""
    try:
        return raw.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return raw.decode("utf-8-sig", errors="replace"), True


def text_of(row: Any, text_field: str, place: str) -> str:
    """The text of one JSON row. PrepareError if it has none."""
    if not isinstance(row, dict):
        raise PrepareError(f"{place}: expected a JSON object, found {type(row).__name__}")
    if not isinstance(row.get(text_field), str):
        fields = ", ".join(map(repr, itertools.islice(row, 8)))
        raise PrepareError(f"{place}: no string in field {text_field!r} (fields: {fields}); see --text-field")
    return row[text_field]


def read_txt(path: Path, text_field: str) -> Read:
    """The whole file is one document; `text_field` does not apply."""
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise too_long(str(path), path.stat().st_size)
    raw = path.read_bytes()
    yield str(path), *decode_utf8(raw), len(raw)


def read_jsonl(path: Path, text_field: str) -> Read:
    """One JSON object a line; the suffix says how the lines are compressed. Blank lines are skipped."""
    with path.open("rb") as raw:
        if path.name.lower().endswith(".gz"):
            lines: Iterable[bytes] = gzip.GzipFile(fileobj=raw)
        elif path.name.lower().endswith(".zst"):
            lines = zst_lines(raw)
        else:
            lines = raw
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            decoded, repaired = decode_utf8(line)
            try:
                row = json.loads(decoded)
            except (ValueError, RecursionError) as error:
                raise PrepareError(f"{path}:{number}: not JSON ({error}); is the file complete?") from error
            yield f"{path}:{number}", text_of(row, text_field, f"{path}:{number}"), repaired, raw.tell()


def zst_lines(raw: io.BufferedIOBase) -> Iterator[bytes]:
    """Lines of a Zstandard stream of any number of frames. EOFError if the last frame is not complete."""
    zstandard = require("zstandard")
    # Not stream_reader: at a cut-off file it ends like at a complete one (zstandard 0.25).
    new_frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
    frame, started, tail = new_frame(), False, b""
    try:
        while chunk := raw.read(1 << 20):
            while chunk:
                *lines, tail = (tail + frame.decompress(chunk)).split(b"\n")
                yield from lines
                started, chunk = True, b""
                if frame.eof:
                    chunk, frame, started = frame.unused_data, new_frame(), False
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if started:
        raise EOFError("compressed data ended before its end marker")
    yield tail


def read_parquet(path: Path, text_field: str) -> Read:
    """Column `text_field` of a Parquet file, one document a row."""
    parquet = require("pyarrow.parquet")
    size = path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                names = ", ".join(map(repr, columns[:8]))
                raise PrepareError(f"{path}: no column {text_field!r} (columns: {names}); see --text-field")
            rows = (
                value
                for batch in file.iter_batches(batch_size=256, columns=[text_field])
                for value in batch.column(0).to_pylist()
            )
            for number, value in enumerate(rows, start=1):
                text = text_of({text_field: value}, text_field, f"{path}:{number}")
                yield f"{path}:{number}", text, False, size * number // file.metadata.num_rows
    except require("pyarrow").ArrowException as error:
        raise OSError(str(error).splitlines()[0]) from error


READERS: Mapping[str, Callable[[Path, str], Read]] = {
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

    Hidden files and folders are left out. PrepareError on a missing path, an unknown suffix, an empty folder.
    """
    known = ", ".join(READERS)
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            names = [file.relative_to(path) for file in path.rglob("*") if suffix_of(file) and file.is_file()]
            names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
            if not names:
                raise PrepareError(f"{path}: no file in this folder ends in one of {known}")
            files += [path / name for name in sorted(names, key=Path.as_posix)]
        elif not path.is_file():
            raise PrepareError(f"{path}: no such file or folder")
        elif suffix_of(path) is None:
            raise PrepareError(f"{path}: unknown kind of file; expected a name ending in one of {known}")
        else:
            files.append(path)
    return files


def documents(paths: Iterable[Path], text_field: str = "text") -> Iterator[Document]:
    """Documents of files in order. PrepareError, naming the place, on what cannot be read."""
    for path in paths:
        reader = READERS[suffix_of(path) or ".txt"]
        last = 0
        try:
            for name, text, repaired, position in reader(path, text_field):
                if LONE_SURROGATE.search(text):
                    text, repaired = LONE_SURROGATE.sub("\ufffd", text), True
                yield Document(name, text, repaired, position - last)
                last = position
        except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
            raise PrepareError(f"{path}: cannot be read ({error}); complete? suffix right?") from error


def stdlib_sources() -> list[Path]:
    """Sources of the running Python's standard library, by name. PrepareError if it has none."""
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
        raise PrepareError(f"{root} holds no Python sources; {OWN_TEXT}")
    return sorted(found, key=Path.as_posix)


OWN_TEXT = "prepare text of your own: prepare.py text INPUT... --name NAME"


def demo_documents() -> Iterator[Document]:
    """The documentation topics of the running Python, then the modules of its standard library."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise PrepareError(f"this Python lacks its documentation topics (pydoc_data); {OWN_TEXT}") from error
    for name in sorted(topics):
        yield Document(f"topic {name}", topics[name], False, 0)
    for path in stdlib_sources():
        text, repaired = decode_utf8(path.read_bytes())
        yield Document(str(path), text, repaired, 0)


@dataclass(frozen=True)
class Source:
    """Where documents come from. Both streams can be read again and again."""

    kind: str
    """What they are: "python" (the demo) or "files"."""
    train: Callable[[], Iterator[Document]]
    val: Callable[[], Iterator[Document]] | None = None
    """None: validation documents are drawn from `train` by hash."""
    inputs: tuple[str, ...] = ()
    """What the user named, without the folders that lead there."""
    val_inputs: tuple[str, ...] = ()
    file_bytes: int | None = None
    """Size of all files together, for progress."""

    def stream(self) -> Iterator[tuple[Document, int | None]]:
        """All documents with the side that the user gave them, or None."""
        for document in self.train():
            yield document, None if self.val is None else TRAIN
        if self.val is not None:
            for document in self.val():
                yield document, VAL


def file_source(inputs: Sequence[Path], val_inputs: Sequence[Path], text_field: str) -> Source:
    """Documents of the user's files and folders; validation from `val_inputs` unless that is empty."""
    files, val_files = input_files(inputs), input_files(val_inputs)
    return Source(
        kind="files",
        train=lambda: documents(files, text_field),
        val=(lambda: documents(val_files, text_field)) if val_files else None,
        inputs=tuple(path.resolve().name for path in inputs),
        val_inputs=tuple(path.resolve().name for path in val_inputs),
        file_bytes=sum(path.stat().st_size for path in files + val_files),
    )


# ----------------------------------------------------------------------------------------------------
# 3 Scan
#
# The first pass. A document is known by the hash of its cleaned text; all that looks random (side, sample,
# order) is a keyed hash of that hash. So a text lands on one side wherever it stands and however often, and
# adding documents moves none of the others.
# Not safe to change: `clean`, `content_hash`, `draw`; each redraws every split ever made.
# ----------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """What is hashed and encoded: the text stripped, NUL replaced by a space (as in the official export)."""
    return text.strip().replace("\0", " ")


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


def too_long(name: str, num_bytes: int) -> PrepareError:
    """The error for a document over MAX_DOCUMENT_BYTES."""
    return PrepareError(
        f"{name}: a document of {num_bytes:,} bytes; at most {MAX_DOCUMENT_BYTES:,}: split it,"
        " for example into lines of a .jsonl file"
    )


@dataclass(frozen=True)
class Scan:
    """What the first pass learned."""

    kept: dict[bytes, int]
    """Hash of each kept document -> TRAIN or VAL, in the order of the input."""
    sample: list[str]
    """Training documents for the tokenizer, in an order that does not depend on the input's."""
    raw_bytes: tuple[int, int]
    """UTF-8 bytes of the kept documents after cleaning: train, val."""
    duplicates: int
    """Documents left out because the same text came before."""
    empty: int
    """Documents left out because nothing but white space was in them."""
    repaired: int
    """Documents, kept or not, in which something was not Unicode."""

    def documents(self, side: int) -> int:
        return sum(1 for kept_side in self.kept.values() if kept_side == side)

    def fingerprint(self, order: str) -> str:
        """SHA-256 over the kept documents and their sides; over their order too if the shards follow it."""
        kept = self.kept.items()
        digest = hashlib.sha256()
        for name, side in kept if order == "input" else sorted(kept):
            digest.update(name + bytes([side]))
        return digest.hexdigest()


def progress(title: str, total: int | None) -> tqdm:
    """A bar with rate and time left on a terminal, silence elsewhere. Counts bytes."""
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, leave=False, disable=None)


def scan(source: Source, options: Options) -> Scan:
    """First pass: drop empty documents and duplicates, assign sides, sample text for the tokenizer.

    Raises PrepareError if a text is on both sides, if a side is empty, or if a document is too long.
    """
    kept: dict[bytes, int] = {}
    shared: dict[bytes, str] = {}
    raw_bytes, duplicates, empty, repaired = [0, 0], 0, 0, 0
    # A heap with the highest draw on top: dropping the top leaves the documents with the lowest.
    heap: list[tuple[int, str]] = []
    room = BATCH_BYTES if options.tokenizer else TOKENIZER_SAMPLE_BYTES
    with progress("scan", source.file_bytes) as bar:
        for document, side in source.stream():
            bar.update(document.file_bytes)
            repaired += document.repaired
            text = clean(document.text)
            if not text:
                empty += 1
                continue
            digest = content_hash(text)
            split, place = draw(digest, options.seed)
            if side is None:
                assert options.val_share is not None
                side = VAL if split < options.val_share * 2**64 else TRAIN
            if digest in kept:
                if kept[digest] != side:
                    shared.setdefault(digest, document.name)
                duplicates += 1
                continue
            num_bytes = len(text.encode())
            if num_bytes > MAX_DOCUMENT_BYTES:
                raise too_long(document.name, num_bytes)
            kept[digest] = side
            raw_bytes[side] += num_bytes
            if side == TRAIN:
                heapq.heappush(heap, (-place, text))
                room -= num_bytes
                while room < 0 and len(heap) > 1:
                    room += len(heapq.heappop(heap)[1].encode())
    if shared:
        raise PrepareError(
            f"{len(shared)} documents are in both training and validation, for example"
            f" {next(iter(shared.values()))}; remove them from one of the two"
        )
    result = Scan(
        kept=kept,
        sample=[text for _, text in sorted(heap, reverse=True)],
        raw_bytes=(raw_bytes[TRAIN], raw_bytes[VAL]),
        duplicates=duplicates,
        empty=empty,
        repaired=repaired,
    )
    refuse_empty_sides((result.documents(TRAIN), result.documents(VAL)), options)
    return result


def refuse_empty_sides(num_documents: tuple[int, int], options: Options) -> None:
    """PrepareError if training or validation has no document."""
    for side in (TRAIN, VAL):
        if num_documents[side]:
            continue
        remedy = "give more documents, another --val-share, another --seed or --val-files"
        if options.val_share is None:
            remedy = "its input files hold no text"
        raise PrepareError(
            f"no {('training', 'validation')[side]} document among {sum(num_documents):,}"
            f" (val share {options.val_share}, seed {options.seed}): {remedy}"
        )


# ----------------------------------------------------------------------------------------------------
# 4 Tokenizer
#
# The challenge's settings. With byte fallback decode(encode(text)) is the normalised text, whatever the text.
# Not safe to change: ids 0-3; the trainer and every published shard count on BOS = 1.
# ----------------------------------------------------------------------------------------------------

BOS = 1
TRAINING: Mapping[str, Any] = {
    "model_type": "bpe",
    "character_coverage": 0.999,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": False,
    "pad_id": 0,
    "bos_id": BOS,
    "eos_id": 2,
    "unk_id": 3,
    "hard_vocab_limit": False,
    # SentencePiece drops longer sentences silently; a document is one sentence.
    "max_sentence_length": 2 * MAX_DOCUMENT_BYTES,
    # The model file records the number of threads, so that another number would be another file.
    "num_threads": 1,
}
"""What SentencePiece is trained with, besides the size of the vocabulary and of the sample."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece model file. The same texts in the same order give the same bytes.

    Raises PrepareError if the text has too few or too many different pieces for `vocab_size`.
    """
    model = io.BytesIO()
    # U+2585 is SentencePiece's own mark for the unknown: it drops every sentence that contains one.
    sentences = (text.replace("\u2585", " ") for text in texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=model, vocab_size=vocab_size, minloglevel=2, **TRAINING
        )
    except RuntimeError as error:
        if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
            raise PrepareError(
                f"--vocab-size {vocab_size}: too small for the characters of this text; at least {found[1]}"
            ) from error
        raise PrepareError(f"SentencePiece cannot be trained on this text: {one_line(error)}") from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if pieces != vocab_size:
        raise PrepareError(
            f"--vocab-size {vocab_size}: the training text gives only {pieces} pieces;"
            f" use --vocab-size {pieces} or less, or more text"
        )
    return model.getvalue()


def one_line(error: BaseException) -> str:
    """An exception's message with its line breaks made spaces."""
    return " ".join(str(error).split())


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model that can write our shards. PrepareError if it cannot."""
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise PrepareError(f"{path}: not a SentencePiece model ({one_line(error)})") from error
    size = tokenizer.vocab_size()
    if tokenizer.bos_id() != BOS or size > 65_536:
        raise PrepareError(
            f"{path}: BOS id {tokenizer.bos_id()}, {size} pieces; shards need BOS id {BOS} and at most 65536"
        )
    if not any(map(tokenizer.is_byte, range(size))):
        raise PrepareError(f"{path}: no byte pieces; without them text is lost and not counted")
    return tokenizer


def vocab_listing(tokenizer: sentencepiece.SentencePieceProcessor) -> str:
    """The text of a .vocab file: piece, tab, score; one piece a line, as SentencePiece writes it."""
    rows = ((tokenizer.id_to_piece(i), tokenizer.get_score(i)) for i in range(tokenizer.vocab_size()))
    return "".join(f"{piece}\t{score:g}\n" for piece, score in rows)


# ----------------------------------------------------------------------------------------------------
# 5 Shards
#
# 256 little-endian int32 (magic, version, number of tokens, zeros), then that many uint16 ids. Documents are
# BOS + ids, one after the other, and may cross from one file into the next.
# Not safe to change: anything; readers elsewhere know this format.
# ----------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def shard_name(side: int, number: int) -> str:
    """File name of one shard. The prefix is the official export's, whatever the text is."""
    return f"fineweb_{SIDES[side]}_{number:06d}.bin"


def write_shard(path: Path, ids: np.ndarray) -> str:
    """Writes one shard of uint16 ids and returns the SHA-256 of the file, in hex."""
    if ids.dtype != np.uint16 or ids.ndim != 1:
        raise ValueError(f"expected a row of uint16 ids, got {ids.dtype} of shape {ids.shape}")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(ids)
    body = np.ascontiguousarray(ids, "<u2")
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (header, body):
            digest.update(part.data)
            file.write(part.data)
    return digest.hexdigest()


def read_shard(path: Path) -> np.ndarray:
    """The ids of a shard, mapped from the file. PrepareError if header or size is wrong."""
    size = path.stat().st_size
    if size < 4 * HEADER_INTS:
        raise PrepareError(f"{path}: {size} bytes; a shard has a header of {4 * HEADER_INTS}")
    magic, version, num_tokens = np.fromfile(path, "<i4", 3).tolist()
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise PrepareError(
            f"{path}: magic {magic} version {version}; expected {SHARD_MAGIC} version {SHARD_VERSION}"
        )
    expected = 4 * HEADER_INTS + 2 * num_tokens
    if size != expected:
        raise PrepareError(f"{path}: {size} bytes, but {num_tokens} tokens take {expected}: cut or padded")
    if not num_tokens:
        return np.zeros(0, "<u2")
    return np.memmap(path, "<u2", mode="r", offset=4 * HEADER_INTS, shape=(num_tokens,))


def write_split(
    directory: Path, side: int, ids: np.ndarray, lengths: np.ndarray, order: np.ndarray, shard_tokens: int
) -> list[dict[str, Any]]:
    """Writes the documents of one side in the given order and returns the manifest's rows for its files.

    Args:  ids      all documents one after the other;  lengths  tokens of each;  order  document indices.
    Cost:  memory for one shard.
    """
    ends = np.cumsum(lengths)
    left, used, files = int(ends[-1]), 0, []
    shard = np.empty(min(shard_tokens, left), np.uint16)
    for document in order.tolist():
        tokens = ids[ends[document] - lengths[document] : ends[document]]
        while len(tokens):
            part = tokens[: len(shard) - used]
            shard[used : used + len(part)] = part
            tokens, used = tokens[len(part) :], used + len(part)
            if used == len(shard):
                name = shard_name(side, len(files))
                files.append({"name": name, "tokens": used, "sha256": write_shard(directory / name, shard)})
                left, used = left - used, 0
                shard = np.empty(min(shard_tokens, left), np.uint16)
    return files


class ByteTables(NamedTuple):
    """How many bytes of text a token stands for, as the score counts them (one entry per id)."""

    base: np.ndarray
    """Bytes without a leading space."""
    space: np.ndarray
    """Starts with a space, which counts one byte unless the token before is a boundary."""
    boundary: np.ndarray
    """Control, unknown or unused."""


def byte_tables(tokenizer: sentencepiece.SentencePieceProcessor) -> ByteTables:
    """The score's own definition of bytes per token: no decoding, so that it checks what decoding counted."""
    size = tokenizer.vocab_size()
    tables = ByteTables(np.zeros(size, np.int64), np.zeros(size, bool), np.zeros(size, bool))
    for i in range(size):
        if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i):
            tables.boundary[i] = True
        elif tokenizer.is_byte(i):
            tables.base[i] = 1
        else:
            piece = tokenizer.id_to_piece(i)
            tables.space[i] = piece.startswith("\u2581")
            tables.base[i] = len(piece.removeprefix("\u2581").encode())
    return tables


def count_bytes(ids: np.ndarray, before: int, tables: ByteTables) -> int:
    """Bytes of text that `ids` stand for; `before` is the token ahead of them."""
    previous = np.concatenate([[before], ids[:-1]])
    return int(tables.base[ids].sum() + np.count_nonzero(tables.space[ids] & ~tables.boundary[previous]))


# ----------------------------------------------------------------------------------------------------
# 6 Encode
#
# The second pass. Batches go to processes and come back in order. Ids are spooled to one file per side, from
# which the shards take the documents in their final order.
# Safe to change: BATCH_BYTES and the number of batches in flight.
# ----------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Documents that are encoded together."""

    sides: list[int]
    texts: list[str]
    num_bytes: int


class Encoded(NamedTuple):
    """A batch as ids: `lengths[i]` of `ids` belong to document i (0: nothing was left of it)."""

    ids: np.ndarray
    lengths: list[int]
    text_bytes: list[int]
    """UTF-8 bytes of each document decoded again."""
    unknown: int
    """Ids that stand for lost text; 0 with byte fallback."""


def kept_documents(source: Source, kept: Mapping[bytes, int]) -> Iterator[tuple[int, str]]:
    """Second pass over the input: side and cleaned text of what was kept. PrepareError if some is gone."""
    waiting = iter(kept.items())
    digest, side = next(waiting)
    for document, _ in source.stream():
        text = clean(document.text)
        if content_hash(text) != digest:
            continue
        yield side, text
        digest, side = next(waiting, (b"", TRAIN))
    if digest:
        raise PrepareError("the input changed while it was being read; run again")


def batches(texts: Iterable[tuple[int, str]]) -> Iterator[Batch]:
    """Groups (side, text) into batches of about BATCH_BYTES, in order."""
    batch = Batch([], [], 0)
    for side, text in texts:
        batch.sides.append(side)
        batch.texts.append(text)
        batch = batch._replace(num_bytes=batch.num_bytes + len(text.encode()))
        if batch.num_bytes >= BATCH_BYTES:
            yield batch
            batch = Batch([], [], 0)
    if batch.texts:
        yield batch


@functools.lru_cache(maxsize=1)
def worker_tokenizer(path: str) -> sentencepiece.SentencePieceProcessor:
    """The model, loaded once in each process."""
    return sentencepiece.SentencePieceProcessor(model_file=path)


def encode_batch(model: str, texts: list[str]) -> Encoded:
    """Encodes documents with the model file `model`. A document is BOS + ids, or nothing if it has no ids."""
    tokenizer = worker_tokenizer(model)
    unknown_id = tokenizer.unk_id()
    ids, lengths, text_bytes, unknown = [], [], [], 0
    for text in texts:
        tokens = tokenizer.encode(text)
        lengths.append(len(tokens) + 1 if tokens else 0)
        text_bytes.append(len(tokenizer.decode(tokens).encode()))
        unknown += tokens.count(unknown_id)
        if tokens:
            ids.append(np.array([BOS, *tokens], np.uint16))
    return Encoded(np.concatenate(ids) if ids else np.zeros(0, np.uint16), lengths, text_bytes, unknown)


def encode_in_order(work: Iterator[Batch], model: Path, workers: int) -> Iterator[tuple[Batch, Encoded]]:
    """Encodes batches over processes and yields them in the order in which they came."""
    if workers == 1:
        for batch in work:
            yield batch, encode_batch(str(model), batch.texts)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    running: collections.deque[tuple[Batch, Future[Encoded]]] = collections.deque()
    try:
        for batch in itertools.chain(work, [None]):
            if batch is not None:
                # Ctrl-C reaches every process of the terminal. Workers are born while it is blocked and so
                # never hear it: only the parent answers.
                unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    running.append((batch, pool.submit(encode_batch, str(model), batch.texts)))
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            # Bounded, so that a fast reader does not pull the whole corpus into memory.
            while running and (batch is None or len(running) > 2 * workers):
                first, future = running.popleft()
                yield first, future.result()
    except BrokenProcessPool as error:
        raise PrepareError("a worker process died (out of memory?); try --workers 1") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Spool(NamedTuple):
    """The ids of one side in the order of the input."""

    path: Path
    lengths: array[int]
    """Tokens of each document; 0 where the normaliser left nothing."""
    text_bytes: array[int]


def encode(source: Source, found: Scan, model: Path, workers: int, directory: Path) -> tuple[Spool, Spool]:
    """Encodes what the scan kept into one spool file per side. PrepareError if the tokenizer loses text."""
    spools = tuple(Spool(directory / f"{side}.ids", array("q"), array("q")) for side in SIDES)
    work = batches(kept_documents(source, found.kept))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(spool.path.open("wb")) for spool in spools]
        bar = stack.enter_context(progress("encode", sum(found.raw_bytes)))
        for batch, encoded in stack.enter_context(contextlib.closing(encode_in_order(work, model, workers))):
            if encoded.unknown:
                raise PrepareError(
                    f"the tokenizer has no pieces for {encoded.unknown} characters of this text (unknown id);"
                    " use one with byte fallback"
                )
            end = 0
            for side, length, text_bytes in zip(batch.sides, encoded.lengths, encoded.text_bytes):
                files[side].write(encoded.ids[end : end + length].tobytes())
                spools[side].lengths.append(length)
                spools[side].text_bytes.append(text_bytes)
                end += length
            bar.update(batch.num_bytes)
    return spools


# ----------------------------------------------------------------------------------------------------
# 7 Verify
#
# Every claim of a manifest, recomputed from the files. `check` prints it; `prepare` demands it before a
# dataset is put in its place, and before one that is there is used again.
# ----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line of a report: what was looked at, what was found, what is wrong ("" if nothing is)."""

    what: str
    found: str
    problem: str


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a dataset directory. PrepareError if there is none that this program wrote."""
    path = directory / "manifest.json"
    if not path.is_file():
        raise PrepareError(f"{path}: no such file; expected the folder of a dataset that prepare.py made")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise PrepareError(f"{path}: not JSON ({error}); prepare the dataset again with --force") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise PrepareError(f"{path}: not of format {FORMAT}; prepare the dataset again with --force")
    return manifest


def verify(directory: Path, manifest: Mapping[str, Any], model: Path) -> list[Row]:
    """Compares tokenizer, headers, sizes, SHA-256, ids, documents, tokens and bytes with a manifest."""
    claimed = manifest["tokenizer"]["sha256"]
    if not model.is_file():
        return [Row(f"tokenizer {model.name}", "", "missing")]
    if file_sha256(model) != claimed:
        return [Row(f"tokenizer {model.name}", "", "SHA-256 is not the manifest's")]
    tokenizer = load_tokenizer(model)
    size = tokenizer.vocab_size()
    wrong = "" if size == manifest["vocab_size"] else f"the manifest says {manifest['vocab_size']}"
    rows = [Row(f"tokenizer {model.name}", f"{size:,} pieces", wrong)]
    tables = byte_tables(tokenizer)
    for side in SIDES:
        totals = {"documents": 0, "tokens": 0, "bytes": 0}
        listed = manifest[side]["files"]
        before = BOS
        for entry in listed:
            row, ids = verify_shard(directory / entry["name"], entry, size)
            if not totals["tokens"] and len(ids) and ids[0] != BOS:
                row = row._replace(problem=row.problem or f"starts with id {ids[0]}, not with BOS {BOS}")
            rows.append(row)
            totals["tokens"] += len(ids)
            for start in range(0, len(ids), 1 << 22):  # in pieces: the tables widen each id to 8 bytes
                part = np.asarray(ids[start : start + (1 << 22)])
                totals["documents"] += int(np.count_nonzero(part == BOS))
                totals["bytes"] += count_bytes(part, before, tables)
                before = int(part[-1])
        problems = [
            f"the manifest says {manifest[side][key]:,} {key}"
            for key, total in totals.items()
            if total != manifest[side][key]
        ]
        there = {path.name for path in directory.glob(f"fineweb_{side}_*.bin")}
        strangers = sorted(there - {entry["name"] for entry in listed})
        problems += [f"{name} is not in the manifest" for name in strangers]
        rows.append(Row(side, ", ".join(f"{n:,} {key}" for key, n in totals.items()), "; ".join(problems)))
    return rows


def verify_shard(path: Path, entry: Mapping[str, Any], vocab_size: int) -> tuple[Row, np.ndarray]:
    """Compares one file with its row of the manifest. The ids are empty if they cannot be used."""
    nothing = np.zeros(0, np.uint16)
    if not path.is_file():
        return Row(path.name, "", "missing"), nothing
    try:
        ids = read_shard(path)
    except PrepareError as error:
        return Row(path.name, "", str(error).removeprefix(f"{path}: ")), nothing
    found = f"{len(ids):,} tokens"
    if len(ids) != entry["tokens"]:
        return Row(path.name, found, f"the manifest says {entry['tokens']:,}"), nothing
    if (highest := int(ids.max(initial=0))) >= vocab_size:
        return Row(path.name, found, f"id {highest} is outside the vocabulary of {vocab_size}"), nothing
    wrong = "" if file_sha256(path) == entry["sha256"] else "SHA-256 is not the manifest's"
    return Row(path.name, found, wrong), ids


def verify_dataset(directory: Path) -> list[Row]:
    """`verify` for a dataset in its place. PrepareError if its manifest is missing or not understood."""
    manifest = load_manifest(directory)
    try:
        return verify(directory, manifest, directory / manifest["tokenizer"]["path"])
    except (AttributeError, KeyError, TypeError) as error:
        raise PrepareError(
            f"{directory / 'manifest.json'}: damaged ({type(error).__name__}: {one_line(error)});"
            " prepare the dataset again with --force"
        ) from error


def check(directory: Path) -> int:
    """Prints how a dataset compares with its manifest. Returns 0 if it holds, 1 if it does not."""
    rows = verify_dataset(directory)
    width = max(len(row.what) for row in rows)
    for row in rows:
        problem = f"  ({row.problem})" if row.problem else ""
        print(f"{'FAIL' if row.problem else 'ok':<5}{row.what:<{width}}  {row.found}{problem}")
    failures = sum(1 for row in rows if row.problem)
    verdict = f"{failures} of {len(rows)} checks failed" if failures else "as its manifest says"
    print(f"{directory}: {verdict}")
    return 1 if failures else 0


# ----------------------------------------------------------------------------------------------------
# 8 Prepare
#
# scan -> (use what is there) -> tokenizer -> encode -> shards -> compressors -> verify -> install.
# Everything is built in a hidden folder beside its destination and moved at the end: a dataset is there whole
# or not at all.
# ----------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What `prepare` made, or found."""

    directory: Path
    model: Path
    manifest: dict[str, Any]
    reused: bool
    """It was there already, complete, from the same input and options."""
    seconds: dict[str, float]
    """Wall-clock time of each stage."""


@contextlib.contextmanager
def stage(title: str, note: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announces a stage and records how long it took."""
    print(f"{title:<12}{note}", flush=True)
    start = time.perf_counter()
    yield
    seconds[title] = time.perf_counter() - start


def compressors(
    files: Iterable[Path], tokenizer: sentencepiece.SentencePieceProcessor, num_bytes: int
) -> dict[str, dict[str, float]] | None:
    """What general-purpose compressors make of the very text that is scored: the documents of these shards,
    decoded and joined by line ends. None over MAX_COMPRESSED_TEXT_BYTES.

    `num_bytes` is what the score divides by: the documents' bytes without those line ends.
    """
    if num_bytes > MAX_COMPRESSED_TEXT_BYTES:
        return None
    ids = np.concatenate([read_shard(path) for path in files])
    starts = np.flatnonzero(ids == BOS)
    ends = np.append(starts[1:], len(ids))
    text = "\n".join(tokenizer.decode(ids[a + 1 : b].tolist()) for a, b in zip(starts, ends)).encode()
    sizes = {
        "brotli -11": len(brotli.compress(text, quality=11, lgwin=24)),
        "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {
        name: {"bytes": size, "bits_per_byte": round(8 * size / num_bytes, 6)} for name, size in sizes.items()
    }


def expected_manifest(source: Source, found: Scan, options: Options, vocab_size: int) -> dict[str, Any]:
    """The part of the manifest that is known after the scan. If it agrees, so would the shards."""
    if options.tokenizer:
        tokenizer = {"training": None, "sha256": file_sha256(options.tokenizer)}
    else:
        tokenizer = {"training": {**TRAINING, "sample_bytes": TOKENIZER_SAMPLE_BYTES}}
    return {
        "format": FORMAT,
        "name": options.name,
        "vocab_size": vocab_size,
        "bos_id": BOS,
        "tokenizer": tokenizer,
        "shard_tokens": options.shard_tokens,
        "split": {
            "method": "hash" if source.val is None else "files",
            "val_share": options.val_share,
            "seed": options.seed,
            "order": options.order,
        },
        "source": {
            "python": platform.python_version(),
            "sentencepiece": sentencepiece.__version__,
            "brotli": brotli.__version__,
            "kind": source.kind,
            "inputs": list(source.inputs),
            "val_inputs": list(source.val_inputs),
            "documents_sha256": found.fingerprint(options.order),
            "raw_bytes": dict(zip(SIDES, found.raw_bytes)),
            "dropped": {"duplicate": found.duplicates, "empty": found.empty},
            "repaired": found.repaired,
        },
    }


def disagreement(found: Any, expected: Any, name: str) -> str:
    """The first entry of `expected` that `found` lacks or has otherwise, in words; "" if there is none.

    >>> disagreement({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, "it")
    'it.a.b is 1, not 3'
    """
    if isinstance(found, dict) and isinstance(expected, dict):
        inside = (disagreement(found.get(key), value, f"{name}.{key}") for key, value in expected.items())
        return next(filter(None, inside), "")
    if found == expected:
        return ""
    values = f"{name} is {found!r}, not {expected!r}"
    return values if len(values) < 100 else f"{name} differs"


def difference(directory: Path, expected: Mapping[str, Any]) -> str:
    """Why an existing dataset is not the complete dataset that would be made now; "" if it is."""
    try:
        differing = disagreement(load_manifest(directory), expected, "manifest")
        problems = [] if differing else [row for row in verify_dataset(directory) if row.problem]
    except PrepareError as error:
        return str(error)
    return f"it is damaged: {problems[0].what}: {problems[0].problem}" if problems else differing


def refuse_full_disk(directory: Path, found: Scan, model: Path) -> None:
    """PrepareError if spools and shards will need more room than there is, judged by a sample of the text."""
    sample = "\n".join(found.sample[:64])[:BATCH_BYTES]
    tokens_per_byte = len(worker_tokenizer(str(model)).encode(sample)) / len(sample.encode())
    # Ids lie on the disk twice, two bytes each; 10 % for what the sample does not show.
    needed = int(sum(found.raw_bytes) * tokens_per_byte * 2 * 2 * 1.1) + 1_000_000
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise PrepareError(
            f"{shown(directory)}: about {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free;"
            " make room, or choose another --out"
        )


def install(moves: Sequence[tuple[Path, Path]], aside: Path) -> None:
    """Moves each (built, target) into its place, all or none. What was there goes to a new folder `aside`."""
    aside.mkdir()
    done: list[tuple[Path, Path]] = []
    try:
        for number, (built, target) in enumerate(moves):
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                done.append((target, aside / str(number)))
                shutil.move(target, aside / str(number))
            done.append((built, target))
            # rename, because shutil.move would put a folder into one that another process made meanwhile.
            (os.rename if built.is_dir() else shutil.move)(built, target)
    except BaseException:
        for origin, place in reversed(done):
            if place.exists() and not origin.exists():
                shutil.move(place, origin)
        raise


def prepare(source: Source, options: Options) -> Result:
    """Makes a dataset and its tokenizer, or finds it made.

    Raises PrepareError; then, and on any other exception, nothing of this run stays on the disk.
    """
    seconds: dict[str, float] = {}
    given, vocab_size = options.tokenizer, options.vocab_size
    if given:
        vocab_size = load_tokenizer(given).vocab_size()
    datasets, tokenizers = options.out / "datasets", options.out / "tokenizers"
    target = datasets / f"{options.name}_sp{vocab_size}"
    model_target = tokenizers / f"{options.name}_{vocab_size}_bpe.model"
    if given and given.resolve().parent == tokenizers.resolve():
        model_target = tokenizers / given.name  # it is where it belongs

    with stage("scan", f"{options.name}: hash, split and sample the documents", seconds):
        found = scan(source, options)
    expected = expected_manifest(source, found, options, vocab_size)
    if target.exists() and not (target / "manifest.json").is_file():
        raise PrepareError(f"{shown(target)} exists and was not made by prepare.py; choose another --name")
    if target.exists() and not options.force:
        with stage("compare", f"with {shown(target)}, which exists", seconds):
            reason = difference(target, expected)
        if reason:
            raise PrepareError(
                f"{shown(target)} exists and is not what this command makes ({reason});"
                " use --force to replace it, or another --name"
            )
        manifest = load_manifest(target)
        model_target = Path(os.path.normpath(target / manifest["tokenizer"]["path"]))
        return Result(target, model_target, manifest, True, seconds)

    datasets.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=datasets) as name:
        folder = Path(name)
        model, vocab = folder / "tokenizer.model", folder / "tokenizer.vocab"
        build_tokenizer(found, options, model, seconds)
        if model_target.exists() and file_sha256(model_target) != file_sha256(model) and not options.force:
            raise PrepareError(
                f"{shown(model_target)} exists and is another tokenizer;"
                " use --force to replace it, or another --name"
            )
        refuse_full_disk(datasets, found, model)
        expected["tokenizer"]["path"] = Path(os.path.relpath(model_target, target)).as_posix()
        manifest = build_dataset(source, found, options, expected, model, folder, seconds)
        vocab.write_text(vocab_listing(load_tokenizer(model)), encoding="utf-8")
        moves = [(folder / "dataset", target)]
        if given is None or given.resolve() != model_target.resolve():
            moves += [(model, model_target), (vocab, model_target.with_suffix(".vocab"))]
        install(moves, folder / "aside")
    return Result(target, model_target, manifest, False, seconds)


def build_tokenizer(found: Scan, options: Options, model: Path, seconds: dict[str, float]) -> None:
    """Puts the given or a newly trained tokenizer at `model`."""
    if options.tokenizer:
        model.write_bytes(options.tokenizer.read_bytes())
        return
    sample_mb = sum(len(text.encode()) for text in found.sample) / 1e6
    with stage("tokenizer", f"train {options.vocab_size:,} pieces on {sample_mb:,.1f} MB", seconds):
        model.write_bytes(train_tokenizer(found.sample, options.vocab_size))


def build_dataset(
    source: Source,
    found: Scan,
    options: Options,
    expected: dict[str, Any],
    model: Path,
    folder: Path,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Makes the shards and the manifest in `folder`/dataset, verifies them and returns the manifest."""
    built = folder / "dataset"
    built.mkdir()
    manifest = {**expected, "tokenizer": {**expected["tokenizer"], "sha256": file_sha256(model)}}
    note = f"{len(found.kept):,} documents, {sum(found.raw_bytes) / 1e6:,.1f} MB, {options.workers} processes"
    with stage("encode", note, seconds):
        spools = encode(source, found, model, options.workers, folder)
    num_documents = tuple(sum(1 for length in spool.lengths if length) for spool in spools)
    refuse_empty_sides(num_documents, options)
    # Some documents hold nothing that the normaliser keeps: zero-width characters, say.
    vanished = len(found.kept) - sum(num_documents)
    manifest["source"]["dropped"]["empty_after_normalisation"] = vanished
    with stage("shards", f"of {options.shard_tokens:,} tokens, in order of {options.order}", seconds):
        for side, spool in enumerate(spools):
            ids, lengths = np.memmap(spool.path, np.uint16, mode="r"), np.array(spool.lengths)
            order = document_order(found, side, options)
            manifest[SIDES[side]] = {
                "documents": num_documents[side],
                "tokens": int(lengths.sum()),
                "bytes": sum(spool.text_bytes),
                "files": write_split(built, side, ids, lengths, order, options.shard_tokens),
            }
            spool.path.unlink()
    num_bytes = manifest["val"]["bytes"]
    with stage("compressors", f"xz and brotli on {num_bytes / 1e6:,.1f} MB of validation text", seconds):
        val_files = [built / entry["name"] for entry in manifest["val"]["files"]]
        manifest["compressors"] = compressors(val_files, load_tokenizer(model), num_bytes)
    (built / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    with stage("verify", "read everything back", seconds):
        for row in verify(built, manifest, model):
            if row.problem:
                raise PrepareError(f"{row.what}: {row.found} ({row.problem}); is this tokenizer of use here?")
    return manifest


def document_order(found: Scan, side: int, options: Options) -> np.ndarray:
    """Indices of one side's documents (counted in the order of the input) in the order of the shards."""
    digests = [digest for digest, kept_side in found.kept.items() if kept_side == side]
    if options.order == "input":
        return np.arange(len(digests))
    places = np.array([draw(digest, options.seed)[1] for digest in digests], np.uint64)
    return np.argsort(places, kind="stable")


# ----------------------------------------------------------------------------------------------------
# 9 Command line
# ----------------------------------------------------------------------------------------------------


def shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path)


def summary(result: Result) -> str:
    """What was made, for people."""
    manifest = result.manifest
    lines = []
    for side in SIDES:
        part = manifest[side]
        lines.append(
            f"{side:<12}{part['documents']:,} documents, {part['tokens']:,} tokens, {part['bytes']:,} bytes,"
            f" {part['bytes'] / part['tokens']:.4f} bytes per token"
        )
    origin = manifest["source"]
    dropped = ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in origin["dropped"].items())
    lines.append(f"{'dropped':<12}{dropped}; repaired {origin['repaired']:,}")
    if manifest["compressors"]:
        sizes = [f"{name} {size['bits_per_byte']:.4f}" for name, size in manifest["compressors"].items()]
        lines.append(f"{'to beat':<12}{', '.join(sizes)} bits per byte of the validation text")
    reused = " (was there, complete: used again)" if result.reused else ""
    lines.append(f"{'dataset':<12}{shown(result.directory)}{reused}")
    lines.append(f"{'tokenizer':<12}{shown(result.model)}")
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in result.seconds.items())
    lines.append(f"{'seconds':<12}{seconds}")
    variables = f"DATA_PATH={shown(result.directory)} VOCAB_SIZE={manifest['vocab_size']}"
    lines.append(f"{'next':<12}./run.sh train {variables}")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message: str) -> Any:
        raise PrepareError(f"{message} (see {self.prog} --help)")


def parser() -> Parser:
    """The verbs and their options."""
    top = Parser(
        prog="prepare.py",
        description="Turn text into the token shards and the tokenizer that train_gpt.py reads.",
        epilog="prepare.py VERB --help explains a verb; data/README.md explains the formats.",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    demo = verbs.add_parser(
        "demo",
        help="a small dataset from text that this Python carries; nothing is downloaded",
        description="Make data/datasets/demo_sp1024 from the documentation topics and the standard library's"
        " sources of the Python that runs this. About ten seconds; a second call finds it made.",
    )
    text = verbs.add_parser(
        "text",
        help="a dataset from your own files",
        description="Make a dataset from .txt (one document a file), .jsonl, .jsonl.gz, .jsonl.zst and"
        " .parquet files, and from folders of them. Equal documents are kept once. Validation documents are"
        " drawn by a hash of their content, unless --val-files names them.",
    )
    add = text.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="a file, or a folder that is searched")
    add("--name", required=True, help="for the dataset NAME_sp<V> and the tokenizer NAME_<V>_bpe.model")
    add("--text-field", default="text", metavar="FIELD", help="JSON field or Parquet column (%(default)s)")
    add("--vocab-size", type=int, metavar="V", help=f"pieces of a tokenizer to train ({Options.vocab_size})")
    add("--tokenizer", type=Path, metavar="MODEL", help="use this SentencePiece model; train none")
    add("--val-files", nargs="+", type=Path, metavar="INPUT", default=[],
        help="validate on all of these, train on all of the others")
    add("--seed", type=int, default=Options.seed, help="key of split, sample and order (%(default)s)")
    add("--order", default=Options.order, metavar="hash|input",
        help="documents shuffled by a hash of their content, or as they are read (%(default)s)")
    add("--shard-tokens", type=int, default=Options.shard_tokens, metavar="N",
        help="tokens per shard file (%(default)s)")
    for verb, share in ((demo, DEMO_VAL_SHARE), (text, Options.val_share)):
        add = verb.add_argument
        add("--val-share", type=float, metavar="X",
            help=f"share of the documents that validate, above 0, at most 0.5 ({share})")
        add("--workers", type=int, default=available_cpus(), metavar="N",
            help="processes that encode; they change the time, not the result (%(default)s)")
        add("--out", type=Path, default=Options.out, metavar="DIR",
            help="folder that gets datasets/ and tokenizers/ (the one that prepare.py is in)")
        add("--force", action="store_true", help="replace an existing dataset of this name")
    look = verbs.add_parser(
        "check",
        help="compare a dataset with its manifest",
        description="Recompute headers, sizes, SHA-256, ids, documents, tokens and bytes of a dataset that"
        " prepare.py made. Exit status 1 if something differs.",
    )
    look.add_argument("directory", type=Path, metavar="DIR", help="for example data/datasets/demo_sp1024")
    return top


def run(args: argparse.Namespace) -> int:
    """Carries out a parsed command and returns the exit status."""
    if args.verb == "check":
        return check(args.directory)
    common = {"out": args.out, "workers": args.workers, "force": args.force}
    if args.verb == "demo":
        share = DEMO_VAL_SHARE if args.val_share is None else args.val_share
        options = Options(name="demo", val_share=share, seed=DEMO_SEED, **common)
        source = Source(kind="python", train=demo_documents)
    else:
        if args.val_files and args.val_share is not None:
            raise PrepareError("--val-share and --val-files exclude each other: draw validation, or give it")
        if args.tokenizer and args.vocab_size is not None:
            raise PrepareError("--vocab-size and --tokenizer exclude each other: the model has its own size")
        share = Options.val_share if args.val_share is None else args.val_share
        options = Options(
            name=args.name,
            vocab_size=Options.vocab_size if args.vocab_size is None else args.vocab_size,
            tokenizer=args.tokenizer,
            val_share=None if args.val_files else share,
            seed=args.seed,
            order=args.order,
            shard_tokens=args.shard_tokens,
            **common,
        )
        source = file_source(args.inputs, args.val_files, args.text_field)
    print(summary(prepare(source, options)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a check failed, 2 a mistake in command or input, 130 interrupted."""
    try:
        return run(parser().parse_args(argv))
    except PrepareError as error:
        message, status = one_line(error), 2
    except OSError as error:  # disk full, no permission: the system's words name the file
        message, status = one_line(error), 2
    except KeyboardInterrupt:
        message, status = "interrupted; nothing was written", 130
    print(f"prepare.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    # `kill` cleans up like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
