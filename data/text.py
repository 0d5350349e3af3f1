"""
text.py -- documents -> a tokenizer, token shards and their manifest: `prepare.py text` and `prepare.py demo`.

The bytes of the result depend on the text, the options and the versions of Python, SentencePiece and brotli alone: not
on the order of the inputs (unless --order input), nor on the number of workers, nor on where a run was interrupted.

The text is read twice and never held whole: the first pass hashes, splits and samples, the second encodes. What grows
with the corpus lies on disk; memory holds one byte per document.

  1 Errors, options   what a user may choose
  2 Scan              hash, drop duplicates, split, sample
  3 Tokenizer         SentencePiece with the challenge's settings
  4 Shards            ids -> files
  5 Encode            documents -> ids, over processes, in order, resumable
  6 Prepare           the whole story
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import heapq
import io
import itertools
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import brotli
import numpy as np
import sentencepiece
from data.documents import (
    BOS,
    MAX_DOCUMENT_BYTES,
    RECORD,
    SIDES,
    TRAIN,
    TRANSFORMS,
    VAL,
    Encoded,
    Row,
    Scanned,
    caseops,
    compressed_size,
    demo_rows,
    encode_batch,
    file_rows,
    input_files,
    one_line,
    scan_batch,
    worker_tokenizer,
)
from tqdm import tqdm
from data.verify import FORMAT, TokenStream, documents_of, file_sha256, load_manifest, load_tokenizer, shown, verify

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import SHARD_HEADER_BYTES, SHARD_MAGIC, SHARD_VERSION, UserError, require

# ----------------------------------------------------------------------------------------------------
# 1 Errors, options
#
# Whatever a user can set or a file can contain ends in UserError: one line on stderr, exit status 2.
# Safe to change: every number here; those that change a dataset are in its manifest.
# ----------------------------------------------------------------------------------------------------

DEMO_VAL_SHARE = 0.0275
DEMO_SEED = 40
"""About 120,000 of the demo's 4.3 M tokens validate, which a CPU scores in seconds. Modules differ much in
length; of 1,500 seeds this one keeps validation within 119,000 to 136,000 tokens on Python 3.10 to 3.13."""

BATCH_BYTES = 1_000_000
"""Rows that one worker takes per task: a quarter of a second of work."""

BUCKET_BYTES, MAX_BUCKETS = 64_000_000, 256
"""Text per bucket of the shuffle, and the most buckets: each is sorted in memory, all are open files."""

CHECKPOINT_SECONDS = 10.0
"""An interrupted run loses at most so much encoding."""

MAX_COMPRESSED_TEXT_BYTES = 16_000_000
"""Longest validation text that is given to xz and brotli: at this size 73 CPU-seconds, and 160 MB of memory for xz."""


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Options:
    """What a user may choose. Raises UserError on a value that cannot work."""

    name: str
    """First part of the dataset's and the tokenizer's file names."""
    out: Path = Path(__file__).resolve().parent
    """Folder that gets datasets/ and tokenizers/."""
    vocab_size: int = 1024
    """Pieces of the tokenizer to train, if none is given. Ids are uint16, hence at most 65,536."""
    tokenizer: Path | None = None
    """A SentencePiece model to use instead of training one."""
    sample_bytes: int = 100_000_000
    """Most training text that the tokenizer is trained on; of more, the documents with the lowest keyed hash."""
    transform: str = "none"
    """One of TRANSFORMS."""
    val_share: float | None = 0.01
    """Share of documents that validate, in (0, 0.5]; None where validation has files of its own."""
    seed: int = 0
    """Key of the hash that splits, samples and orders documents."""
    order: str = "hash"
    """Of documents in the shards: "hash" (shuffled; the same for any packaging of the text) or "input"."""
    shard_tokens: int = 100_000_000
    """Tokens per shard file; the last is shorter. The official export has 10**8."""
    workers: int = field(default_factory=available_cpus)
    """Processes that hash and encode. Changes the time, never the result."""
    force: bool = False
    """Replace an existing dataset of the same name."""

    def __post_init__(self) -> None:
        require(bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name)),
                f"--name {self.name!r}: use letters, digits, '_', '-' and '.' only")
        require(261 <= self.vocab_size <= 65_536,
                f"--vocab-size {self.vocab_size}: expected 261 (controls, bytes, a piece) to 65536 (uint16)")
        require(self.sample_bytes >= 1, f"--sample-bytes {self.sample_bytes}: expected 1 or more")
        require(self.transform in TRANSFORMS, f"--transform {self.transform}: expected one of {', '.join(TRANSFORMS)}")
        require(self.val_share is None or 0 < self.val_share <= 0.5,
                f"--val-share {self.val_share}: expected a share above 0 and at most 0.5")
        require(0 <= self.seed < 2**63, f"--seed {self.seed}: expected 0 to 2**63 - 1")
        require(self.order in ("hash", "input"), f"--order {self.order}: expected hash or input")
        require(1 <= self.shard_tokens < 2**31,
                f"--shard-tokens {self.shard_tokens}: expected 1 to 2**31 - 1 (an int32)")
        require(self.workers >= 1, f"--workers {self.workers}: expected 1 or more")


@dataclass(frozen=True)
class Source:
    """Where documents come from. Both streams can be read again and again."""

    kind: str
    """What they are: "python" (the demo) or "files"."""
    train: Callable[[], Iterator[Row]]
    val: Callable[[], Iterator[Row]] | None = None
    """None: validation documents are drawn from `train` by hash."""
    inputs: tuple[str, ...] = ()
    """What the user named, without the folders that lead there."""
    val_inputs: tuple[str, ...] = ()
    file_bytes: int | None = None
    """Size of all files together, for progress."""
    text_field: str = "text"

    def rows(self) -> Iterator[tuple[Row, int | None]]:
        """All rows with the side that the user gave them, or None."""
        position = 0
        for row in self.train():
            position = row.position
            yield row, None if self.val is None else TRAIN
        for row in self.val() if self.val else ():
            yield row._replace(position=position + row.position), VAL

    def batches(self) -> Iterator[tuple[list[Row], int | None]]:
        """Rows in order, in batches of about BATCH_BYTES, and their side."""
        batch: list[Row] = []
        size, batch_side = 0, None
        for row, side in self.rows():
            if batch and (size >= BATCH_BYTES or side != batch_side):
                yield batch, batch_side
                batch, size = [], 0
            batch.append(row)
            size, batch_side = size + len(row.content), side
        if batch:
            yield batch, batch_side


def file_source(inputs: Sequence[Path], val_inputs: Sequence[Path], text_field: str) -> Source:
    """Documents of the user's files and folders; validation from `val_inputs` unless that is empty."""
    files, val_files = input_files(inputs), input_files(val_inputs)
    return Source(
        kind="files",
        train=lambda: file_rows(files, text_field),
        val=(lambda: file_rows(val_files, text_field)) if val_files else None,
        inputs=tuple(path.resolve().name for path in inputs),
        val_inputs=tuple(path.resolve().name for path in val_inputs),
        file_bytes=sum(path.stat().st_size for path in files + val_files),
        text_field=text_field,
    )


def progress(title: str, total: int | None) -> tqdm:
    """A bar with rate and time left on a terminal, silence elsewhere. Counts bytes."""
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, leave=False, disable=None)


def in_order(
    function: Callable[..., Any], tasks: Iterator[tuple[Any, tuple]], workers: int
) -> Iterator[tuple[Any, Any]]:
    """(label, function(*arguments)) of each (label, arguments), over processes, in the order of the tasks.

    A task is drawn from `tasks` when it is handed out, at most 2 * workers ahead of the results.
    """
    if workers == 1:
        yield from ((label, function(*arguments)) for label, arguments in tasks)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    running: collections.deque[tuple[Any, Future]] = collections.deque()
    try:
        for task in itertools.chain(tasks, [None]):
            if task is not None:
                # Ctrl-C reaches every process of the terminal. Workers are born while it is blocked and so
                # never hear it: only the parent answers.
                unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    running.append((task[0], pool.submit(function, *task[1])))
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            # Bounded, so that a fast reader does not pull the whole corpus into memory.
            while running and (task is None or len(running) > 2 * workers):
                label, future = running.popleft()
                yield label, future.result()
    except BrokenProcessPool as error:
        raise UserError("a worker process died (out of memory?); try --workers 1") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ----------------------------------------------------------------------------------------------------
# 2 Scan
#
# The first pass. Hashes are dealt to files by their first bits, so that equal ones meet in one of them, and each file
# is looked through by itself.
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """What the first pass learned."""

    kept: bytearray
    """For each row of the input: 0 left out, 1 train, 2 val."""
    documents: tuple[int, int]
    """Kept: train, val."""
    raw_bytes: tuple[int, int]
    """UTF-8 bytes of the kept documents after cleaning: train, val."""
    sample: list[str]
    """Training documents for the tokenizer, in an order that does not depend on the input's."""
    duplicates: int
    """Documents left out because the same text came before."""
    empty: int
    """Documents left out because nothing but white space was in them."""
    repaired: int
    """Documents, kept or not, in which something was not Unicode."""
    fingerprint: str
    """SHA-256 over the kept documents and their sides; over their order too if the shards follow it."""
    digest_sum: int
    """Sum of the kept documents' hashes (first 8 bytes, mod 2**64)."""


class Sample:
    """The training documents of lowest place, as many as `room` bytes hold (at least one); each text once."""

    def __init__(self, room: int) -> None:
        # A heap with the highest place on top: dropping the top leaves the documents with the lowest.
        self.heap: list[tuple[int, bytes, str]] = []
        self.held: set[bytes] = set()
        self.room, self.bound = room, 2**64
        """`bound`: what has this place or a higher one is out for good, whatever comes."""

    def add(self, place: int, digest: bytes, text: str) -> None:
        if place >= self.bound or digest in self.held:
            return
        heapq.heappush(self.heap, (-place, digest, text))
        self.held.add(digest)
        self.room -= len(text.encode())
        while self.room < 0 and len(self.heap) > 1:
            place, digest, text = heapq.heappop(self.heap)
            self.held.remove(digest)
            self.bound, self.room = -place, self.room + len(text.encode())

    def texts(self) -> list[str]:
        return [text for _, _, text in sorted(self.heap, reverse=True)]


def scan(source: Source, options: Options, folder: Path) -> Scan:
    """First pass, with `folder` for the hashes: drop empty documents and duplicates, assign sides, sample text.

    Raises UserError if a text is on both sides, if a side is empty, or if a document is too long.
    """
    kept = bytearray()
    empty = repaired = 0
    # With a given tokenizer the sample only tells how much room the ids will take.
    sample = Sample(BATCH_BYTES if options.tokenizer else options.sample_bytes)
    paths = [folder / f"{first:02x}.records" for first in range(64)]
    share = options.val_share or 0.0
    tasks = ((rows[-1].position, (rows, source.text_field, side, share, options.seed, sample.bound))
             for rows, side in source.batches())
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress("scan", source.file_bytes))
        files = [stack.enter_context(path.open("wb")) for path in paths]
        results = stack.enter_context(contextlib.closing(in_order(scan_batch, tasks, options.workers)))
        for position, scanned in results:
            scanned: Scanned
            bar.update(position - bar.n)
            for entry in sorted(scanned.sample):
                sample.add(*entry)
            records = scanned.records
            records["number"] += len(kept)
            first = records["high"] >> np.uint64(58)
            for value in np.unique(first).tolist():
                files[value].write(records[first == value].tobytes())
            kept += bytes(scanned.rows)
            repaired += scanned.repaired
            empty += scanned.rows - len(records)
    duplicates, documents, raw_bytes, digest_sum = 0, [0, 0], [0, 0], 0
    fingerprint, shared = hashlib.sha256(), []
    flags = np.frombuffer(kept, np.uint8)
    for path in paths:
        records = np.fromfile(path, RECORD)
        if not len(records):
            continue
        records = records[np.lexsort((records["number"], records["low"], records["high"]))]
        high, low = records["high"], records["low"]
        is_first = np.append(True, (high[1:] != high[:-1]) | (low[1:] != low[:-1]))
        first = records[is_first]
        shared += records["number"][records["side"] != first["side"][np.cumsum(is_first) - 1]].tolist()
        flags[first["number"]] = first["side"] + 1
        duplicates += len(records) - len(first)
        digest_sum += int(high[is_first].sum(dtype=np.uint64))
        for side in (TRAIN, VAL):
            own = first["side"] == side
            documents[side] += int(own.sum())
            raw_bytes[side] += int(first["size"][own].sum())
        names = ["high", "low", "side"] + ["number"] * (options.order == "input")
        fingerprint.update(packed(first, names))
    if shared:
        place = next(itertools.islice(source.rows(), min(shared), None))[0].place
        raise UserError(f"{len(shared)} documents are in both training and validation, for example {place}; remove"
                        " them from one of the two")
    refuse_empty_sides(documents, options)
    return Scan(kept, tuple(documents), tuple(raw_bytes), sample.texts(), duplicates, empty, repaired,
                fingerprint.hexdigest(), digest_sum % 2**64)


def packed(records: np.ndarray, names: Sequence[str]) -> bytes:
    """The named fields of records, without gaps."""
    out = np.empty(len(records), [(name, RECORD[name]) for name in names])
    for name in names:
        out[name] = records[name]
    return out.tobytes()


def refuse_empty_sides(documents: Sequence[int], options: Options) -> None:
    """UserError if training or validation has no document."""
    for side in (TRAIN, VAL):
        remedy = "give more documents, another --val-share, another --seed or --val-files"
        if options.val_share is None:
            remedy = "its input files hold no text"
        require(documents[side] > 0, f"no {('training', 'validation')[side]} document among {sum(documents):,}"
                f" (val share {options.val_share}, seed {options.seed}): {remedy}")


# ----------------------------------------------------------------------------------------------------
# 3 Tokenizer
#
# The challenge's settings. With byte fallback decode(encode(text)) is the normalised text, whatever the text.
# Not safe to change: ids 0-3; the trainer and every published shard count on BOS = 1.
# ----------------------------------------------------------------------------------------------------

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


def train_tokenizer(texts: Iterable[str], vocab_size: int, transform: str = "none") -> bytes:
    """A SentencePiece model file. The same texts in the same order give the same bytes.

    Raises UserError if the text has too few or too many different pieces for `vocab_size`.
    """
    model = io.BytesIO()
    settings = dict(TRAINING)
    if operators := caseops(transform):
        texts = map(operators.encode, texts)
        settings |= operators.training
    # U+2585 is SentencePiece's own mark for the unknown: it drops every sentence that contains one.
    sentences = (text.replace("\u2585", " ") for text in texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=model, vocab_size=vocab_size, minloglevel=2, **settings
        )
    except RuntimeError as error:
        if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
            raise UserError(
                f"--vocab-size {vocab_size}: too small for the characters of this text; at least {found[1]}"
            ) from error
        raise UserError(f"SentencePiece cannot be trained on this text: {one_line(error)}") from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    require(pieces == vocab_size, f"--vocab-size {vocab_size}: the training text gives only {pieces} pieces;"
            f" use --vocab-size {pieces} or less, or more text")
    return model.getvalue()


def vocab_listing(tokenizer: sentencepiece.SentencePieceProcessor) -> str:
    """The text of a .vocab file: piece, tab, score; one piece a line, as SentencePiece writes it."""
    rows = ((tokenizer.id_to_piece(i), tokenizer.get_score(i)) for i in range(tokenizer.vocab_size()))
    return "".join(f"{piece}\t{score:g}\n" for piece, score in rows)


# ----------------------------------------------------------------------------------------------------
# 4 Shards
#
# The format is train_gpt.py's (section 3, `open_shard`). Documents are BOS + ids, one after the other, and may cross
# from one file into the next.
# Not safe to change: anything; readers elsewhere know this format.
# ----------------------------------------------------------------------------------------------------


def shard_header(num_tokens: int) -> bytes:
    """The 256 int32 ahead of the ids."""
    header = np.zeros(SHARD_HEADER_BYTES // 4, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, num_tokens
    return header.tobytes()


def write_split(
    directory: Path, split: str, documents: Iterable[np.ndarray], num_tokens: int, shard_tokens: int
) -> list[dict[str, Any]]:
    """Writes `fineweb_<split>_%06d.bin` and returns the manifest's rows for these files.

    Args:  documents  uint16 arrays of `num_tokens` entries together.
    The prefix is the official export's, whatever the text is.
    """
    files: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        room, file, digest = 0, None, hashlib.sha256()
        for ids in documents:
            while len(ids):
                if not room:
                    stack.close()
                    room = min(shard_tokens, num_tokens - sum(entry["tokens"] for entry in files))
                    files.append({"name": f"fineweb_{split}_{len(files):06d}.bin", "tokens": room})
                    file = stack.enter_context((directory / files[-1]["name"]).open("wb", buffering=1 << 20))
                    file.write(shard_header(room))
                    digest = hashlib.sha256(shard_header(room))
                part = np.ascontiguousarray(ids[:room], "<u2").data
                file.write(part)
                digest.update(part)
                ids, room = ids[room:], room - len(part)
                if not room:
                    files[-1]["sha256"] = digest.hexdigest()
    return files


# ----------------------------------------------------------------------------------------------------
# 5 Encode
#
# The second pass. Batches go to processes and come back in order. Ids go to buckets by the place of their document,
# each small enough to be sorted in memory: a shuffle on disk. Every CHECKPOINT_SECONDS the sizes of these files are
# noted; a run that was interrupted cuts the files to them and goes on there.
# Safe to change: the numbers of section 1.
# ----------------------------------------------------------------------------------------------------

DOCUMENT = np.dtype([("place", "<u8"), ("length", "<i8"), ("text_bytes", "<i8")])


class Spool:
    """The encoded documents of one side, in buckets by place; `state` (from `checkpoint`) goes on where it was."""

    def __init__(self, folder: Path, side: str, num_buckets: int, kinds: Sequence[str], state: Any = None) -> None:
        self.num_buckets = num_buckets
        self.totals = dict(state["totals"] if state else {"documents": 0, "tokens": 0, "bytes": 0, "vanished": 0})
        self.files: dict[str, list[BinaryIO]] = {}
        for kind in ("documents", *kinds):
            paths = [folder / f"{side}.{k:03d}.{kind}" for k in range(num_buckets)]
            self.files[kind] = [path.open("r+b" if state else "w+b", buffering=1 << 16) for path in paths]
            for file, size in zip(self.files[kind], state["sizes"][kind] if state else ()):
                file.truncate(size)
                file.seek(size)

    def add(self, places: np.ndarray, lengths: np.ndarray, text_bytes: np.ndarray, **data: np.ndarray) -> None:
        """Appends documents; `data` has one entry per id for each of the kinds."""
        documents = np.empty(len(places), DOCUMENT)
        documents["place"], documents["length"], documents["text_bytes"] = places, lengths, text_bytes
        buckets = ((places >> np.uint64(32)) * np.uint64(self.num_buckets) >> np.uint64(32)).tolist()
        end = 0
        for i, (bucket, length) in enumerate(zip(buckets, lengths.tolist())):
            if length:
                self.files["documents"][bucket].write(documents[i].tobytes())
                for kind, values in data.items():
                    self.files[kind][bucket].write(values[end : end + length].tobytes())
                end += length
        self.totals["documents"] += int(np.count_nonzero(lengths))
        self.totals["vanished"] += int(np.count_nonzero(lengths == 0))
        self.totals["tokens"] += int(lengths.sum())
        self.totals["bytes"] += int(text_bytes.sum())

    def checkpoint(self) -> dict[str, Any]:
        for file in itertools.chain(*self.files.values()):
            file.flush()
        return {"totals": self.totals, "sizes": {kind: [f.tell() for f in files] for kind, files in self.files.items()}}

    def stream(self, kind: str) -> Iterator[np.ndarray]:
        """The uint16 data of each document, in the order of places."""
        for listing, file in zip(self.files["documents"], self.files[kind]):
            listing.seek(0), file.seek(0)
            documents, values = (np.frombuffer(f.read(), t) for f, t in ((listing, DOCUMENT), (file, "<u2")))
            ends = np.cumsum(documents["length"])
            for i in np.argsort(documents["place"], kind="stable").tolist():
                yield values[ends[i] - documents["length"][i] : ends[i]]

    def close(self) -> None:
        for file in itertools.chain(*self.files.values()):
            file.close()


class Work:
    """A hidden folder beside the dataset, for all that is not finished; kept when a run is interrupted after it has
    noted something, and used again by a run with the same `key`."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.path = folder, folder / "state.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{shown(folder)}: another run is making this dataset; wait for it") from None
        self.state: dict[str, Any] = {"key": key}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.path.read_bytes())
            self.state = found if found["key"] == key else self.state
        if len(self.state) == 1:
            self.clear()

    def save(self, **entries: Any) -> None:
        """Notes entries of the state, all or none."""
        self.state.update(entries)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.state))
        os.replace(new, self.path)

    def clear(self) -> None:
        """Removes everything but the folder and its lock."""
        for path in self.folder.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def __enter__(self) -> Work:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, UserError) or len(self.state) == 1:
            shutil.rmtree(self.folder)
        self.lock.close()


def encode(source: Source, found: Scan, model: Path, options: Options, work: Work) -> list[Spool]:
    """Encodes what the scan kept into one spool per side. UserError if the tokenizer loses text."""
    state = work.state.get("encoded") or {"batches": 0, "digest_sum": 0, "spools": [None, None]}
    kinds = ("ids",) if options.transform == "none" else ("ids", "bytes")
    spools = [
        Spool(work.folder, side, max(1, min(MAX_BUCKETS, -(-found.raw_bytes[i] // BUCKET_BYTES))), kinds, saved)
        for i, (side, saved) in enumerate(zip(SIDES, state["spools"]))
    ]
    worker_tokenizer.cache_clear()  # a run before in this process may have had another model at this path
    digest_sum, saved_at, batches = state["digest_sum"], time.monotonic(), state["batches"]
    step = 2**64 // max(1, len(found.kept))  # places in the order of the input

    def tasks() -> Iterator[tuple[Any, tuple]]:
        first = 0
        for number, (rows, _) in enumerate(source.batches()):
            kept = bytes(found.kept[first : first + len(rows)])
            if number >= state["batches"] and any(kept):
                arguments = (rows, source.text_field, kept, str(model), options.transform, options.seed)
                yield (number, first, kept, rows[-1].position), arguments
            first += len(rows)

    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress("encode", source.file_bytes))
        results = stack.enter_context(contextlib.closing(in_order(encode_batch, tasks(), options.workers)))
        for (number, first, kept, position), encoded in results:
            encoded: Encoded
            require(not encoded.unknown, f"the tokenizer has no pieces for {encoded.unknown} characters of this text"
                    " (unknown id); use one with byte fallback")
            places = encoded.places
            if options.order == "input":
                places = (first + np.flatnonzero(np.frombuffer(kept, np.uint8)).astype(np.uint64)) * np.uint64(step)
            of_id = np.repeat(encoded.sides, encoded.lengths)
            for side, spool in enumerate(spools):
                own, own_ids = encoded.sides == side, of_id == side
                if own.any():
                    data = {"ids": encoded.ids[own_ids]}
                    if len(kinds) == 2:
                        data["bytes"] = encoded.id_bytes[own_ids]
                    spool.add(places[own], encoded.lengths[own], encoded.text_bytes[own], **data)
            digest_sum, batches = (digest_sum + encoded.digest_sum) % 2**64, number + 1
            bar.update(position - bar.n)
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                save(work, spools, batches, digest_sum)
                saved_at = time.monotonic()
    require(digest_sum == found.digest_sum, "the input changed while it was being read; run again")
    save(work, spools, sys.maxsize, digest_sum)
    return spools


def save(work: Work, spools: Sequence[Spool], batches: int, digest_sum: int) -> None:
    """Notes that so many batches are in the spools."""
    work.save(encoded={"batches": batches, "digest_sum": digest_sum, "spools": [s.checkpoint() for s in spools]})


# ----------------------------------------------------------------------------------------------------
# 6 Prepare
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
    directory: Path, tokenizer: sentencepiece.SentencePieceProcessor, num_bytes: int, transform: str = "none"
) -> dict[str, dict[str, float]] | None:
    """What general-purpose compressors make of the very text that is scored: the validation documents, decoded and
    joined by line ends. None over MAX_COMPRESSED_TEXT_BYTES.

    `num_bytes` is what the score divides by: the documents' bytes without those line ends.
    """
    if num_bytes > MAX_COMPRESSED_TEXT_BYTES:
        return None
    documents = itertools.chain.from_iterable(documents_of(TokenStream(directory, "fineweb_val")))
    texts = (tokenizer.decode(ids.tolist()) for ids in documents)
    if operators := caseops(transform):
        texts = map(operators.decode, texts)
    text = "\n".join(texts).encode()
    sizes = dict(in_order(compressed_size, ((name, (name, text)) for name in ("brotli -11", "xz -9e")), workers=2))
    return {
        name: {"bytes": size, "bits_per_byte": round(8 * size / num_bytes, 6)} for name, size in sizes.items()
    }


def expected_manifest(source: Source, found: Scan, options: Options, vocab_size: int) -> dict[str, Any]:
    """The part of the manifest that is known after the scan. If it agrees, so would the shards."""
    if options.tokenizer:
        tokenizer = {"training": None, "sha256": file_sha256(options.tokenizer)}
    else:
        tokenizer = {"training": {**TRAINING, "sample_bytes": options.sample_bytes}}
    return {
        "format": FORMAT,
        "name": options.name,
        "vocab_size": vocab_size,
        "bos_id": BOS,
        "tokenizer": tokenizer,
        **({} if options.transform == "none" else {"transform": options.transform}),
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
            "documents_sha256": found.fingerprint,
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
        if differing := disagreement(load_manifest(directory), expected, "manifest"):
            return differing
        problems = [check for check in verify(directory) if check.problem]
    except UserError as error:
        return str(error)
    return f"it is damaged: {problems[0].what}: {problems[0].problem}" if problems else ""


def refuse_full_disk(directory: Path, found: Scan, model: Path) -> None:
    """UserError if spools and shards will need more room than there is, judged by a sample of the text."""
    sample = "\n".join(found.sample[:64])[:BATCH_BYTES]
    tokens_per_byte = len(load_tokenizer(model).encode(sample)) / len(sample.encode())
    # Ids lie on the disk twice, two bytes each; 10 % for what the sample does not show.
    needed = int(sum(found.raw_bytes) * tokens_per_byte * 2 * 2 * 1.1) + 1_000_000
    free = shutil.disk_usage(directory).free
    require(needed <= free, f"{shown(directory)}: about {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free;"
            " make room, or choose another --out")


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
    """Makes a dataset and its tokenizer, or finds it made. On any exception nothing has changed under a final name."""
    seconds: dict[str, float] = {}
    given, vocab_size = options.tokenizer, options.vocab_size
    if given:
        vocab_size = load_tokenizer(given).vocab_size()
    datasets, tokenizers = options.out / "datasets", options.out / "tokenizers"
    target = datasets / f"{options.name}_sp{vocab_size}"
    model_target = tokenizers / f"{options.name}_{vocab_size}_bpe.model"
    if given and given.resolve().parent == tokenizers.resolve():
        model_target = tokenizers / given.name  # it is where it belongs

    datasets.mkdir(parents=True, exist_ok=True)
    with (
        stage("scan", f"{options.name}: hash, split and sample the documents", seconds),
        tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=datasets) as folder,
    ):
        found = scan(source, options, Path(folder))
    expected = expected_manifest(source, found, options, vocab_size)
    require(not target.exists() or (target / "manifest.json").is_file(),
            f"{shown(target)} exists and was not made by prepare.py; choose another --name")
    if target.exists() and not options.force:
        with stage("compare", f"with {shown(target)}, which exists", seconds):
            reason = difference(target, expected)
        if not reason:
            manifest = load_manifest(target)
            model_target = Path(os.path.normpath(target / manifest["tokenizer"]["path"]))
            return Result(target, model_target, manifest, True, seconds)
        require(source.kind == "python" == made_from(target),
                f"{shown(target)} exists and is not what this command makes ({reason});"
                " use --force to replace it, or another --name")
        # Nobody's own text: the demo of another Python, say.
        print(f"{'replace':<12}{shown(target)}: {reason}")
        options = replace(options, force=True)

    key = hashlib.sha256(json.dumps([expected, BATCH_BYTES, BUCKET_BYTES], sort_keys=True).encode()).hexdigest()
    with Work(datasets / f".{target.name}.work", key) as work:
        model, vocab = work.folder / "tokenizer.model", work.folder / "tokenizer.vocab"
        build_tokenizer(found, options, model, seconds)
        work.save(tokenizer=file_sha256(model))
        require(options.force or not model_target.exists() or file_sha256(model_target) == file_sha256(model),
                f"{shown(model_target)} exists and is another tokenizer; use --force to replace it, or another --name")
        refuse_full_disk(datasets, found, model)
        expected["tokenizer"]["path"] = Path(os.path.relpath(model_target, target)).as_posix()
        manifest = build_dataset(source, found, options, expected, model, work, seconds)
        vocab.write_text(vocab_listing(load_tokenizer(model)), encoding="utf-8")
        moves = [(work.folder / "dataset", target)]
        if given is None or given.resolve() != model_target.resolve():
            moves += [(model, model_target), (vocab, model_target.with_suffix(".vocab"))]
        shutil.rmtree(work.folder / "aside", ignore_errors=True)
        install(moves, work.folder / "aside")
    return Result(target, model_target, manifest, False, seconds)


def made_from(directory: Path) -> str:
    """What kind of source an existing dataset was made from; "" if its manifest does not tell."""
    with contextlib.suppress(UserError, KeyError, TypeError):
        return load_manifest(directory)["source"]["kind"]
    return ""


def build_tokenizer(found: Scan, options: Options, model: Path, seconds: dict[str, float]) -> None:
    """Puts the given or a newly trained tokenizer at `model`; one that an interrupted run left there is complete."""
    if options.tokenizer:
        model.write_bytes(options.tokenizer.read_bytes())
    elif not model.exists():
        sample_mb = sum(len(text.encode()) for text in found.sample) / 1e6
        with stage("tokenizer", f"train {options.vocab_size:,} pieces on {sample_mb:,.1f} MB", seconds):
            new = model.with_suffix(".new")
            new.write_bytes(train_tokenizer(found.sample, options.vocab_size, options.transform))
            new.rename(model)


def build_dataset(
    source: Source,
    found: Scan,
    options: Options,
    expected: dict[str, Any],
    model: Path,
    work: Work,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Makes the shards and the manifest in the work folder's `dataset`, verifies them and returns the manifest."""
    built = work.folder / "dataset"
    shutil.rmtree(built, ignore_errors=True)
    built.mkdir()
    manifest = {**expected, "tokenizer": {**expected["tokenizer"], "sha256": file_sha256(model)}}
    note = f"{sum(found.documents):,} documents, {sum(found.raw_bytes) / 1e6:,.1f} MB, {options.workers} processes"
    if work.state.get("encoded"):
        note += "; goes on where a run was interrupted"
    with stage("encode", note, seconds):
        spools = encode(source, found, model, options, work)
    refuse_empty_sides([spool.totals["documents"] for spool in spools], options)
    # Some documents hold nothing that the normaliser keeps: zero-width characters, say.
    manifest["source"]["dropped"]["empty_after_normalisation"] = sum(spool.totals["vanished"] for spool in spools)
    with stage("shards", f"of {options.shard_tokens:,} tokens, in order of {options.order}", seconds):
        for side, spool in zip(SIDES, spools):
            files = write_split(built, side, spool.stream("ids"), spool.totals["tokens"], options.shard_tokens)
            manifest[side] = {key: spool.totals[key] for key in ("documents", "tokens", "bytes")} | {"files": files}
            if side == "val" and options.transform != "none":
                files = write_split(built, "val_bytes", spool.stream("bytes"), spool.totals["tokens"],
                                    options.shard_tokens)
                manifest["val_bytes"] = {"files": files}
            spool.close()
    val = manifest["val"]
    with stage("compressors", f"xz and brotli on {val['bytes'] / 1e6:,.1f} MB of validation text", seconds):
        manifest["compressors"] = compressors(built, load_tokenizer(model), val["bytes"], options.transform)
    (built / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    with stage("verify", "read everything back", seconds):
        for check in verify(built, model):
            require(not check.problem, f"{check.what}: {check.found} ({check.problem}); is this tokenizer of use here?")
    return manifest


def demo(args: Any) -> tuple[Source, Options]:
    """What `prepare.py demo` asks for."""
    share = DEMO_VAL_SHARE if args.val_share is None else args.val_share
    options = Options(name="demo", val_share=share, seed=DEMO_SEED, out=args.out, workers=args.workers,
                      force=args.force)
    return Source(kind="python", train=demo_rows), options


def files(args: Any) -> tuple[Source, Options]:
    """What `prepare.py text` asks for."""
    require(not args.val_files or args.val_share is None,
            "--val-share and --val-files exclude each other: draw validation, or give it")
    require(not args.tokenizer or args.vocab_size is None,
            "--vocab-size and --tokenizer exclude each other: the model has its own size")
    share = Options.val_share if args.val_share is None else args.val_share
    options = Options(
        vocab_size=Options.vocab_size if args.vocab_size is None else args.vocab_size,
        val_share=None if args.val_files else share,
        **{name: getattr(args, name) for name in ("name", "out", "tokenizer", "sample_bytes", "transform", "seed",
                                                  "order", "shard_tokens", "workers", "force")},
    )
    return file_source(args.inputs, args.val_files, args.text_field), options


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
    variables += " CASEOPS_ENABLED=1" * ("transform" in manifest)
    lines.append(f"{'next':<12}./run.sh train {variables}")
    return "\n".join(lines)
