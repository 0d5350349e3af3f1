"""
text.py -- documents -> a tokenizer, token shards and their manifest: the verbs `text` and `demo`.

The bytes of the result depend on the text, the options and the versions of Python, SentencePiece and brotli alone.
The inputs are read once, into a temporary SQLite file beside the dataset. Its order by a hash of the text is the
shuffle, and the first training texts in that order are the tokenizer's sample. Memory holds that and some batches.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import hashlib
import io
import itertools
import lzma
import multiprocessing
import os
import platform
import re
import shlex
import signal
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import sentencepiece
from tqdm import tqdm

from data import documents as docs
from data import verify
from data.caseops import TRANSFORMS
from data.documents import SIDES, TRAIN, VAL, require, say
from data.verify import FORMAT, damage, load_tokenizer, read_manifest, write_json
from tools.common import ToolError
from train_gpt import BOS_ID, SHARD_HEADER_BYTES, SHARD_MAGIC, SHARD_VERSION, file_sha256

SHARD_TOKENS = 100_000_000  # in one file, as in the official export
SAMPLE_BYTES = 100_000_000  # most text to train a tokenizer on
BATCH_BYTES = 1_000_000  # text that one worker takes per task: a quarter of a second of work
MAX_COMPRESSED_TEXT_BYTES = 16_000_000  # for xz and brotli: 73 CPU-seconds, 160 MB of memory
MANY_TOKENS = 500_000  # of validation: PRESET=demo scores some 3,500 a second on two busy cores

# -- corpus: texts on disk, unique, split, shuffled -------------------------------------------------


class Corpus:
    """Cleaned texts in an SQLite file, which sorts what memory cannot hold. Call `add`, then `unique`, then read."""

    def __init__(self, path: Path, seed: int, val_share: float) -> None:
        self.seed, self.val_share = seed, val_share
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"  # thrown away after a crash
                              "CREATE TABLE documents (number INTEGER PRIMARY KEY, place BLOB, hash BLOB,"
                              " side INTEGER, size INTEGER, text TEXT); BEGIN")

    def add(self, text: str, side: int | None) -> None:
        """Add the next document of the input; `side` None draws one by the hash of the text."""
        digest, split, place = docs.draw(text, self.seed)
        if side is None:
            side = int(split < self.val_share * 2**64)
        self.db.execute("INSERT INTO documents VALUES (NULL, ?, ?, ?, ?, ?)",
                        (place.to_bytes(8, "big"), digest, side, len(text.encode()), text))

    def unique(self) -> dict[str, Any]:
        """Keep of equal texts the first. Returns what the manifest says of the texts.

        Raises ToolError if a text is on both sides, or a side has none.
        """
        query = self.db.execute
        query("CREATE TABLE kept AS SELECT min(number) AS number, hash, side, size, count(*) AS copies,"
              " min(side) < max(side) AS crosses FROM documents GROUP BY place, hash ORDER BY place")
        [shared] = query("SELECT count(*) FROM kept WHERE crosses").fetchone()
        require(shared == 0, f"{shared} documents are in both training and validation; remove them from one of the two")
        fingerprint = hashlib.sha256()  # of the texts and their sides
        for digest, side in query("SELECT hash, side FROM kept ORDER BY hash"):
            fingerprint.update(digest + bytes([side]))
        raw_bytes = dict(query("SELECT side, sum(size) FROM kept GROUP BY side"))
        [count, duplicates] = query("SELECT count(*), sum(copies - 1) FROM kept").fetchone()
        lacking = [what for side, what in ((TRAIN, "training"), (VAL, "validation")) if side not in raw_bytes]
        require(not lacking, f"{count:,} different documents, none for {' and '.join(lacking)}: give more, or another"
                " --val-share or --seed, or cut text files at blank lines with --split-on '\\n\\n'")
        return {"documents_sha256": fingerprint.hexdigest(), "dropped": {"duplicate": duplicates},
                "raw_bytes": {name: raw_bytes[side] for side, name in enumerate(SIDES)}}

    def texts(self, side: int) -> Iterator[str]:
        """Texts of a side by place, which is their order in the shards."""
        rows = self.db.execute("SELECT text FROM kept CROSS JOIN documents USING (number) WHERE kept.side = ?"
                               " ORDER BY kept.rowid", [side])
        return (text for [text] in rows)

    def sample(self, room: int) -> Iterator[str]:
        """The training texts of lowest place, as many as `room` bytes hold, and at least one."""
        for taken, text in enumerate(self.texts(TRAIN)):
            room -= len(text.encode())
            if room < 0 and taken:
                return
            yield text

    def batches(self, side: int) -> Iterator[list[str]]:
        """Texts of a side by place, about BATCH_BYTES of them at a time."""
        batch, size = [], 0
        for text in self.texts(side):
            batch.append(text)
            size += len(text)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def fill(corpus: Corpus, options: argparse.Namespace) -> dict[str, Any]:
    """Read the inputs into the corpus. Returns what the manifest says about them."""
    train, val = docs.input_files(options.inputs), docs.input_files(options.val_files)
    sources = [(TRAIN if val else None, docs.read_documents(train, options.text_field, options.split_on)),
               (VAL, docs.read_documents(val, options.text_field, options.split_on))]
    if options.verb == "demo":
        sources = [(None, docs.demo_documents())]
    filled = empty = repaired = 0
    first = ""  # place of the first that is repaired
    for side, documents in sources:
        for place, text in tqdm(documents, "read", unit=" documents", leave=False, disable=None):
            if "\ufffd" in text:
                first, repaired = first or place, repaired + 1
            filled, empty = filled + bool(text), empty + (not text)
            if text:
                corpus.add(text, side)
    if repaired > 0.01 * filled:
        say("warning", f"{repaired:,} of {filled:,} documents hold U+FFFD, which bytes become that are not UTF-8; the"
            f" first is {first}: save such files as UTF-8, or these characters are lost")
    origin = corpus.unique()
    origin["dropped"]["empty"] = empty
    return {**origin, "repaired": repaired}


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
    model, operators = io.BytesIO(), TRANSFORMS[transform]
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
    require(pieces == vocab_size, f"the training text gives only {pieces} pieces; use --vocab-size {pieces} or less")
    return model.getvalue()


# -- shards: the format is train_gpt.py's (`open_shard`) --------------------------------------------


class ShardWriter:
    """Appends ids to `fineweb_<split>_%06d.bin`, SHARD_TOKENS to each; a document may cross from one to the next."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.files: list[dict[str, Any]] = []  # rows of the manifest

    def write(self, ids: np.ndarray) -> None:
        """Append ids; the headers come last."""
        while len(ids):
            if not self.files or self.files[-1]["tokens"] == SHARD_TOKENS:
                self.files.append({"name": f"fineweb_{self.split}_{len(self.files):06d}.bin", "tokens": 0})
                (self.folder / self.files[-1]["name"]).write_bytes(bytes(SHARD_HEADER_BYTES))
            part = ids[:SHARD_TOKENS - self.files[-1]["tokens"]]
            with (self.folder / self.files[-1]["name"]).open("ab") as file:
                file.write(part.astype("<u2").tobytes())
            self.files[-1]["tokens"] += len(part)
            ids = ids[len(part):]

    def finish(self) -> list[dict[str, Any]]:
        """Write the headers, now that the lengths are known. Returns the manifest's `files`."""
        for entry in self.files:
            path = self.folder / entry["name"]
            with path.open("r+b") as file:
                file.write(np.array([SHARD_MAGIC, SHARD_VERSION, entry["tokens"]], "<i4").tobytes())
            entry["sha256"] = file_sha256(path)
        return self.files


def encode(corpus: Corpus, raw_bytes: int, model: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the shards, by processes that get a few batches each at a time. Returns the manifest's entries of them."""
    docs.worker_tokenizer.cache_clear()  # a run before in this process may have had another model at this path
    work = functools.partial(docs.encode_batch, model=str(model), transform=options.transform)
    spawn, entries = multiprocessing.get_context("spawn"), {}
    # Ctrl-C reaches every process of the terminal; only the parent answers.
    with (ProcessPoolExecutor(options.workers, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool,
          tqdm(desc="encode", total=raw_bytes, unit="B", unit_scale=True, leave=False, disable=None) as bar):
        over = pool.map if options.workers > 1 else map
        for side, split in enumerate(SIDES):
            writer, side_file = ShardWriter(folder, split), ShardWriter(folder, "val_bytes")
            totals, batches = collections.Counter(), corpus.batches(side)
            while window := list(itertools.islice(batches, 4 * options.workers)):
                for documents, text_bytes, ids, id_bytes in over(work, window):
                    totals.update(documents=documents, tokens=len(ids), bytes=text_bytes)
                    writer.write(ids)
                    if side == VAL:
                        side_file.write(id_bytes)
                    bar.update(text_bytes)
            entries[split] = {**totals, "files": writer.finish()}
            if side_file.files:
                entries["val_bytes"] = {"files": side_file.finish()}
    return entries


def compressors(dataset: Path, tokenizer: Any, num_bytes: int, transform: str) -> dict[str, dict[str, float]] | None:
    """What general-purpose compressors make of the very text that is scored: the validation documents, decoded and
    joined by line ends, beside the bytes that the score divides by. None over MAX_COMPRESSED_TEXT_BYTES."""
    if num_bytes > MAX_COMPRESSED_TEXT_BYTES:
        return None
    texts = (tokenizer.decode(ids.tolist()) for ids in verify.documents(verify.shards(dataset, "val")))
    text = "\n".join(map(TRANSFORMS[transform].decode, texts)).encode()
    sizes = {"brotli -11": len(brotli.compress(text, quality=11, lgwin=24)),
             "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))}
    return {name: {"bytes": size, "bits_per_byte": round(8 * size / num_bytes, 6)} for name, size in sizes.items()}


def prepare(options: argparse.Namespace) -> Path:
    """Make a dataset and its tokenizer, or find it made. On any exception nothing has changed under a final name.

    Everything is built in a temporary folder beside its destination and moved at the end.
    """
    require(re.fullmatch(r"\w[\w.-]*", options.name) is not None, f"--name {options.name}: not the name of a folder")
    if options.tokenizer:
        options.vocab_size = load_tokenizer(options.tokenizer).vocab_size()
    options.transform = options.transform or ("none" if options.tokenizer else "caseops_v2")
    datasets, tokenizers = options.out / "datasets", options.out / "tokenizers"
    target = datasets / f"{options.name}_sp{options.vocab_size}"
    home = tokenizers / f"{options.name}_{options.vocab_size}_bpe.model"
    replaces = target.exists()
    if replaces:
        source = read_manifest(target).get("source", {})
        require("python" in source, f"{target} exists and was not made by `data text`; choose another --name")
        is_demo = options.verb == "demo" and source["kind"] == "python"  # nobody's own text: it is replaced unasked
        require(is_demo or options.force, f"{target} exists; choose another --name, or replace it with --force")
        if is_demo and source["python"] == platform.python_version() and not damage(target):
            say("dataset", f"{target} was there, complete: used again")
            return target
    datasets.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=datasets) as temporary:
        work = Path(temporary)
        corpus = Corpus(work / "corpus.sqlite", options.seed, options.val_share)
        with contextlib.closing(corpus.db):
            try:
                build(corpus, work, home, target, options)
            except (sqlite3.Error, BrokenProcessPool) as error:
                raise ToolError(f"{datasets}: {error}; make room there, or use fewer --workers") from error
        tokenizers.mkdir(exist_ok=True)
        os.replace(work / "tokenizer.model", home)
        if replaces:
            os.rename(target, work / "replaced")
        os.rename(work / "dataset", target)  # fails if another process has made it meanwhile
    return target


def build(corpus: Corpus, work: Path, home: Path, target: Path, options: argparse.Namespace) -> None:
    """Make tokenizer.model and dataset/ in the work folder, and verify them."""
    model, dataset = work / "tokenizer.model", work / "dataset"
    say("read", f"{options.name}: hash, split and shuffle the documents")
    source = {
        **fill(corpus, options),
        "python": platform.python_version(), "sentencepiece": sentencepiece.__version__, "brotli": brotli.__version__,
        "kind": "python" if options.verb == "demo" else "files",
        "split_on": options.split_on, "inputs": [path.resolve().name for path in options.inputs],
        "val_inputs": [path.resolve().name for path in options.val_files]}
    split = {"method": "hash", "val_share": options.val_share, "seed": options.seed, "order": "hash"}
    if options.val_files:
        split |= {"method": "files", "val_share": None}
    training = None
    if options.tokenizer:
        model.write_bytes(options.tokenizer.read_bytes())
    else:
        say("tokenizer", f"train {options.vocab_size:,} pieces")
        training = {**TRAINING, "sample_bytes": SAMPLE_BYTES}
        model.write_bytes(train_tokenizer(corpus.sample(SAMPLE_BYTES), options.vocab_size, options.transform))
    tokenizer, digest = load_tokenizer(model), file_sha256(model)
    require(options.force or target.exists() or not home.exists() or file_sha256(home) == digest,
            f"{home} exists and is another tokenizer; use --force to replace it, or another --name")
    raw_bytes = sum(source["raw_bytes"].values())
    say("encode", f"{raw_bytes / 1e6:,.1f} MB, {options.workers} processes")
    dataset.mkdir()
    entries = encode(corpus, raw_bytes, model, dataset, options)
    [count] = corpus.db.execute("SELECT count(*) FROM kept").fetchone()
    vanished = count - sum(entries[side]["documents"] for side in SIDES)
    source["dropped"]["empty_after_normalisation"] = vanished
    num_bytes = entries["val"]["bytes"]
    manifest = {
        "format": FORMAT, "name": options.name, "vocab_size": options.vocab_size, "bos_id": BOS_ID,
        "tokenizer": {"path": os.path.relpath(home, target), "sha256": digest, "training": training},
        "shard_tokens": SHARD_TOKENS, "split": split, "source": source, **entries,
        "compressors": compressors(dataset, tokenizer, num_bytes, options.transform)}
    if options.transform != "none":
        manifest["transform"] = options.transform
    write_json(dataset / "manifest.json", manifest)
    if entries["val"]["documents"] < 10 or num_bytes < 10_000:
        say("warning", f"validation is {entries['val']['documents']:,} documents of {num_bytes:,} bytes in all, too few"
            " for a score that means much: raise --val-share, or name documents with --val-files")
    say("verify", "read everything back")
    problem = damage(dataset, model)
    require(not problem, f"{problem}; is this tokenizer of use here?")


def summary(target: Path) -> str:
    """What was made, for people."""
    manifest = read_manifest(target)
    lines = ["{:<12}".format("made") + "; ".join(
        f"{side} {manifest[side]['tokens']:,} tokens in {manifest[side]['documents']:,} texts" for side in SIDES)]
    sizes = [f"{name} {size['bits_per_byte']:.4f}" for name, size in (manifest["compressors"] or {}).items()]
    if sizes:
        lines.append(f"{'to beat':<12}{', '.join(sizes)} bits a byte of the validation text")
    if manifest["source"]["kind"] == "files":
        dropped = ", ".join(f"{n:,} {why.replace('_', ' ')}" for why, n in manifest["source"]["dropped"].items())
        lines.append(f"{'dropped':<12}{dropped}; repaired {manifest['source']['repaired']:,}")
        knobs = f"{shlex.quote(f'DATA_PATH={target}')} VOCAB_SIZE={manifest['vocab_size']}"
        if manifest["val"]["tokens"] > MANY_TOKENS:
            lines.append(f"{'warning':<12}a CPU may need {manifest['val']['tokens'] / 180_000:,.0f} minutes to score as"
                         " much validation; EVAL_STRIDE=0 TTT=none is quicker, and so is a smaller --val-share")
        lines.append(f"{'next':<12}./run.sh train PRESET=demo {knobs}")
    return "\n".join(lines)
