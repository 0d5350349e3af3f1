"""
text.py -- documents -> a tokenizer, token shards and their manifest: the verbs `text` and `demo`.

The bytes of the result depend on the text, the options and the versions of Python, SentencePiece and brotli alone: not
on the order of the inputs (unless --order input), nor on the number of workers.

The inputs are read once, into a temporary SQLite file beside the dataset. Its order by a hash of the text is the
shuffle, and the first training texts in that order are the tokenizer's sample. Memory holds that and some batches.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import platform
import signal
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import sentencepiece
from tqdm import tqdm

from data import documents as docs
from data.documents import SIDES, TRAIN, VAL, Encoded, caseops, require
from data.verify import FORMAT, damage, documents_of, load_tokenizer, read_manifest, shown, write_json
from tools.common import ToolError
from train_gpt import BOS_ID, SHARD_HEADER_BYTES, SHARD_MAGIC, SHARD_VERSION, TokenStream, file_sha256

BATCH_BYTES = 1_000_000  # text that one worker takes per task: a quarter of a second of work
MAX_COMPRESSED_TEXT_BYTES = 16_000_000  # for xz and brotli: 73 CPU-seconds, 160 MB of memory

# -- corpus: texts on disk, unique, split, shuffled -------------------------------------------------


class Corpus:
    """Cleaned texts in an SQLite file, which sorts what memory cannot hold. Call `add`, then `unique`, then read."""

    def __init__(self, path: Path, seed: int, val_share: float, order: str = "hash") -> None:
        self.seed, self.val_share, self.order = seed, val_share, order
        self.db = sqlite3.connect(path, isolation_level=None)
        for setting in ("journal_mode = OFF", "synchronous = OFF"):  # the file is thrown away after a crash
            self.db.execute(f"PRAGMA {setting}")
        self.db.execute("CREATE TABLE documents (number INTEGER PRIMARY KEY, place BLOB, hash BLOB, side INTEGER,"
                        " size INTEGER, text TEXT)")
        self.db.execute("BEGIN")

    def add(self, number: int, text: str, side: int | None) -> None:
        """Add document `number` of the input; `side` None draws one by the hash of the text."""
        digest = docs.content_hash(text)
        split, place = docs.draw(digest, self.seed)
        if side is None:
            side = int(split < self.val_share * 2**64)
        self.db.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?)",
                        (number, place.to_bytes(8, "big"), digest, side, len(text.encode()), text))

    def unique(self) -> tuple[list[int], dict[str, Any]]:
        """Keep of equal texts the first. Returns the number of documents of both sides, and what the manifest says of
        the texts.

        Raises ToolError if a text is on both sides.
        """
        query = self.db.execute
        query("CREATE TABLE kept AS SELECT min(number) AS number, hash, side, size, count(*) AS copies,"
              " min(side) < max(side) AS crosses FROM documents GROUP BY place, hash ORDER BY place")
        [shared] = query("SELECT count(*) FROM kept WHERE crosses").fetchone()
        for [text] in query("SELECT text FROM documents JOIN kept USING (number) WHERE crosses LIMIT 1"):
            raise ToolError(f"{shared} documents are in both training and validation, for example {text[:60]!r};"
                            " remove them from one of the two")
        fingerprint = hashlib.sha256()  # of the texts and their sides; of their order, too, if the shards follow it
        for number, digest, side in query("SELECT number, hash, side FROM kept ORDER BY hash"):
            order = number.to_bytes(8, "little") if self.order == "input" else b""
            fingerprint.update(digest + bytes([side]) + order)
        sides = [query("SELECT count(*), ifnull(sum(size), 0) FROM kept WHERE side = ?", [side]).fetchone()
                 for side in (TRAIN, VAL)]
        [duplicates] = query("SELECT ifnull(sum(copies - 1), 0) FROM kept").fetchone()
        return [count for count, _ in sides], {
            "documents_sha256": fingerprint.hexdigest(), "dropped": {"duplicate": duplicates},
            "raw_bytes": {name: size for name, (_, size) in zip(SIDES, sides)}}

    def stream(self, order: str) -> Iterator[tuple[int, str]]:
        """(side, text) of every document, shuffled by place ("hash") or in the order of the input ("input")."""
        column = {"hash": "kept.rowid", "input": "kept.number"}[order]
        for row in self.db.execute("SELECT kept.side, text FROM kept CROSS JOIN documents USING (number)"
                                   f" ORDER BY {column}"):
            yield row

    def sample(self, room: int) -> Iterator[str]:
        """The training texts of lowest place, as many as `room` bytes hold, and at least one."""
        for taken, text in enumerate(text for side, text in self.stream("hash") if side == TRAIN):
            room -= len(text.encode())
            if room < 0 and taken:
                return
            yield text

    def batches(self) -> Iterator[tuple[list[int], list[str]]]:
        """(sides, texts) of every document in order, about BATCH_BYTES of text at a time."""
        sides, texts, size = [], [], 0
        for side, text in self.stream(self.order):
            sides.append(side)
            texts.append(text)
            size += len(text)
            if size >= BATCH_BYTES:
                yield sides, texts
                sides, texts, size = [], [], 0
        if texts:
            yield sides, texts


def progress(title: str, total: int | None = None) -> tqdm:
    """A bar that counts bytes on a terminal; silence elsewhere."""
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, leave=False, disable=None)


def inputs(options: argparse.Namespace) -> Iterator[tuple[docs.Document, int | None]]:
    """Every document that the command names, with its side, or None where that is drawn."""
    if options.verb == "demo":
        yield from ((row, None) for row in docs.demo_documents())
    train, val = docs.input_files(options.inputs), docs.input_files(options.val_files)
    yield from ((row, TRAIN if val else None) for row in docs.read_documents(train, options.text_field))
    yield from ((row, VAL) for row in docs.read_documents(val, options.text_field))


def fill(corpus: Corpus, options: argparse.Namespace) -> dict[str, Any]:
    """Read the inputs into the corpus. Returns what the manifest says about them."""
    empty = repaired = 0
    with progress("read") as bar:
        for number, (row, side) in enumerate(inputs(options)):
            repaired += row.repaired
            empty += not row.text
            if row.text:
                corpus.add(number, row.text, side)
            bar.update(len(row.text))
    documents, origin = corpus.unique()
    refuse_empty_sides(documents, options)
    origin["dropped"]["empty"] = empty
    return {**origin, "repaired": repaired}


def refuse_empty_sides(documents: Sequence[int], options: argparse.Namespace) -> None:
    """Raise ToolError if training or validation has no document."""
    for count, name in zip(documents, ("training", "validation")):
        require(count > 0, f"no {name} document among {sum(documents):,} (--val-share {options.val_share}): give more"
                " documents, another --val-share or --seed, or other --val-files")


# -- tokenizer --------------------------------------------------------------------------------------

TRAINING: Mapping[str, Any] = {
    "model_type": "bpe",
    "character_coverage": 0.999,
    "byte_fallback": True,  # decode(encode(text)) is the normalised text, whatever the text
    "split_digits": True,
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": False,
    "pad_id": 0,  # these four are not safe to change: the trainer and every published shard count on BOS = 1
    "bos_id": BOS_ID,
    "eos_id": 2,
    "unk_id": 3,
    "hard_vocab_limit": False,
    "max_sentence_length": 2 * docs.MAX_DOCUMENT_BYTES,  # it drops longer ones silently; a document is one sentence
    "num_threads": 1,  # the model file records it, so that another number would be another file
}
"""The challenge's settings of SentencePiece, besides the size of the vocabulary and of the sample."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, transform: str = "none") -> bytes:
    """Train a SentencePiece model. The same texts in the same order give the same bytes.

    Raises ToolError if the text has too few or too many different pieces for `vocab_size`.
    """
    model, operators = io.BytesIO(), caseops(transform)
    # U+2585 is SentencePiece's own mark for the unknown: it drops every sentence that contains one.
    sentences = (operators.encode(text).replace("\u2585", " ") for text in texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=model, vocab_size=vocab_size, minloglevel=2,
            **TRAINING, **operators.training)
    except RuntimeError as error:
        raise ToolError(f"--vocab-size {vocab_size}: SentencePiece cannot be trained on this text:"
                        f" {docs.one_line(error)}") from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    require(pieces == vocab_size, f"--vocab-size {vocab_size}: the training text gives only {pieces} pieces;"
            f" use --vocab-size {pieces} or less, or more text")
    return model.getvalue()


def vocab_listing(tokenizer: sentencepiece.SentencePieceProcessor) -> str:
    """The text of a .vocab file: piece, tab, score; one piece a line, as SentencePiece writes it."""
    rows = ((tokenizer.id_to_piece(i), tokenizer.get_score(i)) for i in range(tokenizer.vocab_size()))
    return "".join(f"{piece}\t{score:g}\n" for piece, score in rows)


# -- shards: the format is train_gpt.py's (`open_shard`) --------------------------------------------


class SplitWriter:
    """Writes ids to `fineweb_<split>_%06d.bin`, a new file every `shard_tokens`, which may fall within a document."""

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.files: list[dict[str, Any]] = []  # rows of the manifest
        self.totals = {"documents": 0, "tokens": 0, "bytes": 0}
        self.file: Any = None

    def write(self, ids: np.ndarray) -> None:
        """Append ids; opens and closes files as needed."""
        while len(ids):
            if self.file is None:
                self.files.append({"name": f"fineweb_{self.split}_{len(self.files):06d}.bin", "tokens": 0})
                self.file = (self.folder / self.files[-1]["name"]).open("wb", buffering=1 << 20)
                self.file.write(bytes(SHARD_HEADER_BYTES))
            part = ids[:self.shard_tokens - self.files[-1]["tokens"]]
            self.file.write(part.astype("<u2").tobytes())
            self.files[-1]["tokens"] += len(part)
            ids = ids[len(part):]
            if self.files[-1]["tokens"] == self.shard_tokens:
                self.close()

    def close(self) -> None:
        """Write the header of the open file, now that its length is known."""
        if self.file is None:
            return
        with self.file:
            self.file.seek(0)
            self.file.write(np.array([SHARD_MAGIC, SHARD_VERSION, self.files[-1]["tokens"]], "<i4").tobytes())
        self.files[-1]["sha256"] = file_sha256(Path(self.file.name))
        self.file = None


def encoded_batches(corpus: Corpus, model: Path, options: argparse.Namespace) -> Iterator[tuple[list[int], Encoded]]:
    """(sides, ids) of the corpus in order, over processes; a round has a few batches for each of them."""
    docs.worker_tokenizer.cache_clear()  # a run before in this process may have had another model at this path
    spawn, rest = multiprocessing.get_context("spawn"), corpus.batches()
    # Ctrl-C reaches every process of the terminal; only the parent answers.
    with ProcessPoolExecutor(options.workers, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        over = pool.map if options.workers > 1 else map
        try:
            while window := list(itertools.islice(rest, 4 * options.workers)):
                sides, texts = zip(*window)
                yield from zip(sides, over(docs.encode_batch, texts, itertools.repeat(str(model)),
                                           itertools.repeat(options.transform)))
        except BrokenProcessPool as error:
            raise ToolError("a worker process died (out of memory?); try --workers 1") from error


def encode(corpus: Corpus, raw_bytes: int, model: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the shards. Returns what the manifest says about them, and under "vanished" the number of texts of which
    the normaliser left nothing: zero-width characters, say."""
    writers = train, val, side_file = [SplitWriter(folder, split, options.shard_tokens)
                                       for split in (*SIDES, "val_bytes")]
    vanished = 0
    with progress("encode", raw_bytes) as bar:
        for sides, batch in encoded_batches(corpus, model, options):
            side_of_id = np.repeat(sides, batch.lengths)
            for side, writer in ((TRAIN, train), (VAL, val)):
                own = np.array(sides) == side
                writer.totals["documents"] += int(np.count_nonzero(batch.lengths[own]))
                writer.totals["tokens"] += int(batch.lengths[own].sum())
                writer.totals["bytes"] += int(batch.text_bytes[own].sum())
                writer.write(batch.ids[side_of_id == side])
            if options.transform != "none":
                side_file.write(batch.id_bytes[side_of_id == VAL])
            vanished += int(np.count_nonzero(batch.lengths == 0))
            bar.update(int(batch.text_bytes.sum()))
    for writer in writers:
        writer.close()
    refuse_empty_sides([train.totals["documents"], val.totals["documents"]], options)
    entries = {writer.split: {**writer.totals, "files": writer.files} for writer in (train, val)}
    if side_file.files:
        entries["val_bytes"] = {"files": side_file.files}
    return {**entries, "vanished": vanished}


def compressors(folder: Path, tokenizer: Any, num_bytes: int, transform: str) -> dict[str, dict[str, float]] | None:
    """What general-purpose compressors make of the very text that is scored: the validation documents, decoded and
    joined by line ends, beside the bytes that the score divides by. None over MAX_COMPRESSED_TEXT_BYTES."""
    if num_bytes > MAX_COMPRESSED_TEXT_BYTES:
        return None
    ids = itertools.chain.from_iterable(documents_of(TokenStream(folder, "fineweb_val")))
    text = "\n".join(caseops(transform).decode(tokenizer.decode(document.tolist())) for document in ids).encode()
    with ThreadPoolExecutor(2) as pool:  # both release the GIL
        by_brotli = pool.submit(brotli.compress, text, quality=11, lgwin=24)
        by_xz = pool.submit(lzma.compress, text, preset=9 | lzma.PRESET_EXTREME)
        sizes = {"brotli -11": len(by_brotli.result()), "xz -9e": len(by_xz.result())}
    return {name: {"bytes": size, "bits_per_byte": round(8 * size / num_bytes, 6)} for name, size in sizes.items()}


# -- the whole story --------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> Path:
    """Make a dataset and its tokenizer, or find it made. On any exception nothing has changed under a final name.

    Everything is built in a temporary folder beside its destination and moved at the end.
    """
    if options.tokenizer:
        options.vocab_size = load_tokenizer(options.tokenizer).vocab_size()
    datasets, tokenizers = options.out / "datasets", options.out / "tokenizers"
    target = datasets / f"{options.name}_sp{options.vocab_size}"
    home = tokenizers / f"{options.name}_{options.vocab_size}_bpe.model"
    if options.tokenizer and options.tokenizer.resolve().parent == tokenizers.resolve():
        home = tokenizers / options.tokenizer.name  # it is where it belongs
    replaces = target.exists()
    if replaces:
        if is_made(target, options):
            say("dataset", f"{shown(target)} was there, complete: used again")
            return target
        say("replace", shown(target))
    datasets.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=datasets) as temporary:
        work = Path(temporary)
        corpus = Corpus(work / "corpus.sqlite", options.seed, options.val_share, options.order)
        with contextlib.closing(corpus.db):
            say("read", f"{options.name}: hash, split and shuffle the documents")
            try:
                build(corpus, expected_manifest(fill(corpus, options), options), work, home, target, options)
            except sqlite3.Error as error:
                raise ToolError(f"{shown(datasets)}: {error}; make room, or choose another --out") from error
        tokenizers.mkdir(exist_ok=True)
        if not options.tokenizer or options.tokenizer.resolve() != home.resolve():
            os.replace(work / "tokenizer.model", home)
            os.replace(work / "tokenizer.vocab", home.with_suffix(".vocab"))
        if replaces:
            os.rename(target, work / "replaced")
        os.rename(work / "dataset", target)  # fails if another process has made it meanwhile
    return target


def say(what: str, text: str) -> None:
    """Print a line of progress."""
    print(f"{what:<12}{text}", flush=True)


def expected_manifest(origin: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The part of the manifest that is known before the encoding; `origin` is what `fill` returns."""
    tokenizer: dict[str, Any] = {"training": {**TRAINING, "sample_bytes": options.sample_bytes}}
    if options.tokenizer:
        tokenizer = {"training": None, "sha256": file_sha256(options.tokenizer)}
    split = {"method": "hash", "val_share": options.val_share, "seed": options.seed, "order": options.order}
    if options.val_files:
        split |= {"method": "files", "val_share": None}
    source = {
        "python": platform.python_version(), "sentencepiece": sentencepiece.__version__, "brotli": brotli.__version__,
        "kind": "python" if options.verb == "demo" else "files",
        "inputs": [path.resolve().name for path in options.inputs],
        "val_inputs": [path.resolve().name for path in options.val_files], **origin,
    }
    manifest = {"format": FORMAT, "name": options.name, "vocab_size": options.vocab_size, "bos_id": BOS_ID,
                "tokenizer": tokenizer, "shard_tokens": options.shard_tokens, "split": split, "source": source}
    if options.transform != "none":
        manifest["transform"] = options.transform
    return manifest


def is_made(target: Path, options: argparse.Namespace) -> bool:
    """Whether an existing dataset is the demo of this Python, whole. ToolError if it must not be replaced."""
    manifest, expected = read_manifest(target), expected_manifest({}, options)
    source = manifest.get("source", {})
    require("python" in source, f"{shown(target)} exists and was not made by `data text`; choose another --name")
    # The demo of another Python is nobody's own text: it is replaced unasked.
    require(options.force or options.verb == "demo" and source["kind"] == "python",
            f"{shown(target)} exists; use --force to replace it, or another --name")
    same = all(source.get(name) == value for name, value in expected["source"].items())
    return same and manifest["split"] == expected["split"] and not options.force and not damage(target)


def build(corpus: Corpus, expected: dict[str, Any], work: Path, home: Path, target: Path,
          options: argparse.Namespace) -> None:
    """Make tokenizer.model, tokenizer.vocab and dataset/ in the work folder, and verify them."""
    model, dataset = work / "tokenizer.model", work / "dataset"
    if options.tokenizer:
        model.write_bytes(options.tokenizer.read_bytes())
    else:
        say("tokenizer", f"train {options.vocab_size:,} pieces")
        sample = corpus.sample(options.sample_bytes)
        model.write_bytes(train_tokenizer(sample, options.vocab_size, options.transform))
    tokenizer, digest = load_tokenizer(model), file_sha256(model)
    require(options.force or target.exists() or not home.exists() or file_sha256(home) == digest,
            f"{shown(home)} exists and is another tokenizer; use --force to replace it, or another --name")
    model.with_suffix(".vocab").write_text(vocab_listing(tokenizer), encoding="utf-8")
    raw_bytes = sum(expected["source"]["raw_bytes"].values())
    say("encode", f"{raw_bytes / 1e6:,.1f} MB, {options.workers} processes")
    dataset.mkdir()
    entries = encode(corpus, raw_bytes, model, dataset, options)
    expected["source"]["dropped"]["empty_after_normalisation"] = entries.pop("vanished")
    expected["tokenizer"] |= {"path": Path(os.path.relpath(home, target)).as_posix(), "sha256": digest}
    num_bytes = entries["val"]["bytes"]
    say("compressors", f"xz and brotli on {num_bytes / 1e6:,.1f} MB of validation text")
    sizes = compressors(dataset, tokenizer, num_bytes, options.transform)
    write_json(dataset / "manifest.json", {**expected, **entries, "compressors": sizes})
    say("verify", "read everything back")
    problem = damage(dataset, model)
    require(not problem, f"{problem}; is this tokenizer of use here?")


def summary(target: Path) -> str:
    """What was made, for people."""
    manifest = read_manifest(target)
    lines = [f"{side:<12}{part['documents']:,} documents, {part['tokens']:,} tokens, {part['bytes']:,} bytes"
             for side, part in ((side, manifest[side]) for side in SIDES)]
    dropped = ", ".join(f"{n:,} {why.replace('_', ' ')}" for why, n in manifest["source"]["dropped"].items())
    lines.append(f"{'dropped':<12}{dropped}; repaired {manifest['source']['repaired']:,}")
    if manifest["compressors"]:
        sizes = [f"{name} {size['bits_per_byte']:.4f}" for name, size in manifest["compressors"].items()]
        lines.append(f"{'to beat':<12}{', '.join(sizes)} bits per byte of the validation text")
    knobs = f"DATA_PATH={shown(target)} VOCAB_SIZE={manifest['vocab_size']}"
    knobs += " CASEOPS_ENABLED=1" * ("transform" in manifest)
    return "\n".join([*lines, f"{'next':<12}./run.sh train {knobs}"])
