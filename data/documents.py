"""
documents.py -- files -> documents -> ids: everything `text` and `demo` do to one document.

Nothing here loads torch, so that worker processes, which import this file, start fast and stay small.
"""
from __future__ import annotations

import collections
import functools
import gzip
import hashlib
import io
import json
import os
import re
import sysconfig
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import sentencepiece

from data.caseops import TRANSFORMS
from tools.common import ToolError

BOS_ID = 1
TRAIN, VAL = 0, 1
SIDES = ("train", "val")
"""Names of the two sides, indexed by TRAIN and VAL."""

MAX_DOCUMENT_BYTES = 32_000_000
"""Longest document, in UTF-8 bytes; SentencePiece takes about 33 bytes of memory for each."""


def require(ok: bool, message: str) -> None:
    """Raise ToolError(message) unless `ok`: one line with what is wrong, what was expected, the remedy."""
    if not ok:
        raise ToolError(message)


def one_line(error: BaseException) -> str:
    """An exception's message with its line breaks made spaces."""
    return " ".join(str(error).split())


def say(what: str, text: str) -> None:
    """Print a line of progress."""
    print(f"{what:<12}{text}", flush=True)


# -- documents --------------------------------------------------------------------------------------
# A document is identified by the hash of its cleaned text; everything that looks random (side, sample, order) is a
# keyed hash of that hash. So a text lands on one side wherever it stands and however often, and adding documents moves
# none of the others.
# Not safe to change: `clean`, `draw`; each redraws every split ever made.


def clean(text: str) -> str:
    """Replace lone surrogates by U+FFFD, which the normaliser drops, and NUL by a space (as in the official export);
    strip. What is clean stays as it is."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text).replace("\0", " ").strip()


def draw(text: str, seed: int) -> tuple[bytes, int, int]:
    """(hash, side, place) of a cleaned text: 16 bytes of BLAKE2b that identify it, and two independent numbers in
    [0, 2**64), of which the first decides a document's side, the second its place."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    drawn = hashlib.blake2b(digest, key=str(seed).encode(), digest_size=16).digest()
    return digest, int.from_bytes(drawn[:8], "big"), int.from_bytes(drawn[8:], "big")


# -- files ------------------------------------------------------------------------------------------
# A reader yields (place, text), such as ("corpus.jsonl:17", "..."): None is an empty document, anything else but a
# string an error. A file that ends too early is an error: half a corpus must not pass for a whole one.

ENCODINGS = {
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "utf-32", rb"\xff\xfe|\xfe\xff": "utf-16",  # byte order marks
    rb"[^\0]\0\0\0": "utf-32-le", rb"\0\0\0[^\0]": "utf-32-be",  # ASCII characters without one
    rb"([^\0]\0){2}": "utf-16-le", rb"(\0[^\0]){2}": "utf-16-be", b"": "utf-8-sig"}
"""Encoding of a file by its first four bytes: the first pattern that they match."""


def open_text(path: Path, newline: str | None) -> io.TextIOWrapper:
    """The text of a file, perhaps compressed, without its byte order mark. What cannot be decoded becomes U+FFFD."""
    file: Any = gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")
    head = file.peek(4)[:4]
    encoding = next(name for begin, name in ENCODINGS.items() if re.match(begin, head))
    return io.TextIOWrapper(file, encoding, errors="replace", newline=newline)


def read_txt(path: Path, text_field: str, split_on: str | None) -> Iterator[tuple[str, Any]]:
    """The whole file is one document, or each part that `split_on` separates (then a line end is LF, whatever it was).
    """
    with open_text(path, None if split_on else "") as file:
        if not split_on:
            yield str(path), file.read(MAX_DOCUMENT_BYTES + 1)  # more is refused
            return
        rest, line = "", 1
        while len(rest) <= MAX_DOCUMENT_BYTES and (chunk := file.read(1 << 20)):
            *parts, rest = (rest + chunk).split(split_on)
            for part in parts:
                yield f"{path}:{line}", part
                line += (part + split_on).count("\n")
        if rest:
            yield f"{path}:{line}", rest


def read_jsonl(path: Path, text_field: str, split_on: str | None) -> Iterator[tuple[str, Any]]:
    """One JSON object a line, perhaps compressed. Blank lines are skipped."""
    with open_text(path, "\n") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.strip("\ufeff \t\r\n")  # files joined into one have byte order marks inside
            if not line:
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ToolError(f"{path}:{number}: not JSON ({error}); is the file complete?") from None
            yield f"{path}:{number}", row.get(text_field, 0) if isinstance(row, dict) else 0


def read_parquet(path: Path, text_field: str, split_on: str | None) -> Iterator[tuple[str, Any]]:
    """Column `text_field` of a Parquet file, one document a row."""
    import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(path) as file:
        require(text_field in file.schema_arrow.names, f"{path}: no column {text_field!r}; see --text-field")
        for batch in file.iter_batches(batch_size=256, columns=[text_field]):
            yield from ((str(path), text) for text in batch.column(0).to_pylist())


READERS = {".txt": read_txt, ".md": read_txt, ".jsonl": read_jsonl, ".gz": read_jsonl, ".parquet": read_parquet}
"""Which reader opens a file, by its suffix. Safe to change: a new suffix is one reader and one entry."""


def input_files(inputs: Sequence[Path]) -> list[Path]:
    """Files to read: the inputs that are files, and by name the files of a known suffix below those that are folders.

    Hidden files and folders are left out; so is what has another suffix or is no file (a link to a folder), and that is
    said. ToolError on a missing path, an unknown suffix, an empty folder; OSError where a folder cannot be read.
    """
    def fail(error: OSError) -> NoReturn:
        raise error

    files: list[Path] = []
    for path in inputs:
        require(path.exists(), f"{path}: no such file or folder")
        kinds = {} if path.is_dir() else {path: path.suffix.lower()}
        for folder, folders, names in os.walk(path, onerror=fail) if path.is_dir() else ():
            folders[:] = [name for name in folders if name[0] != "."]
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # walk follows none
            below = [Path(folder, name) for name in names + links if name[0] != "."]
            kinds |= {file: file.suffix.lower() if file.is_file() else "link or pipe" for file in below}
        known = [file for file, kind in kinds.items() if kind in READERS]
        require(bool(known), f"{path}: expected a file, or a folder of files, ending in one of {', '.join(READERS)}")
        others = collections.Counter(kind or "no suffix" for kind in kinds.values() if kind not in READERS)
        if others:
            listed = ", ".join(f"{kind} ({count:,})" for kind, count in others.most_common(9))
            say("left out", f"{path}: {others.total():,} entries: {listed}; read are {', '.join(READERS)}")
        files += sorted(known, key=Path.as_posix)
    return files


def read_documents(paths: Iterable[Path], text_field: str, split_on: str | None = None) -> Iterator[tuple[str, str]]:
    """(place, cleaned text) of all documents of files in order. ToolError on what cannot be read, holds no text, or too
    much."""
    for path in paths:
        try:
            for place, text in READERS[path.suffix.lower()](path, text_field, split_on):
                text = "" if text is None else text
                require(isinstance(text, str), f"{place}: no string in {text_field!r}; see --text-field")
                require(len(text.encode(errors="surrogatepass")) <= MAX_DOCUMENT_BYTES, f"{place}: a document of more"
                        f" than {MAX_DOCUMENT_BYTES:,} bytes: split it, a text file for example with --split-on '\\n'")
                yield place, clean(text)
        except (EOFError, OSError, ValueError, NotImplementedError, zlib.error) as error:
            raise ToolError(f"{path}: cannot be read ({one_line(error)}); complete? suffix right?") from error


def demo_documents() -> Iterator[tuple[str, str]]:
    """(place, cleaned text) of the documentation topics of the running Python, then of the modules of its library."""
    from pydoc_data.topics import topics
    yield from ((name, clean(topics[name])) for name in sorted(topics))
    root = Path(sysconfig.get_path("stdlib"))
    # What the build writes is full of the paths and flags of one machine; pydoc_data/topics.py has the words of the
    # topics once more, so that a topic that validates would be trained on.
    left_out = re.compile(r"config-|pydoc_data/topics\.py$|(.*/)?(_sysconfigdata[^/]*$|"
                          r"(site-packages|dist-packages|__pycache__|test|tests|idle_test)/)")
    for path in sorted(root.rglob("*.py"), key=Path.as_posix):
        if not left_out.match(path.relative_to(root).as_posix()):
            yield str(path), clean(path.read_bytes().decode("utf-8-sig", errors="replace"))


# -- ids: what a worker process makes of a batch of texts -------------------------------------------


@functools.lru_cache(maxsize=1)
def worker_tokenizer(path: str) -> sentencepiece.SentencePieceProcessor:
    """The model, loaded once in each process."""
    return sentencepiece.SentencePieceProcessor(model_file=path)


@functools.lru_cache(maxsize=1)
def invisible() -> str:
    """What the normaliser drops at the ends of a text; its bytes would belong to no token of the side file."""
    unseen = [c for c in map(chr, range(0x10000)) if unicodedata.category(c) in ("Cc", "Cf", "Zs", "Zl", "Zp")]
    return "".join(unseen) + "\u2581\ufffd"


@functools.lru_cache(maxsize=1)
def normaliser() -> sentencepiece.SentencePieceNormalizer:
    """What the challenge's tokenizers do to a text before they cut it, on its own."""
    return sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc", remove_extra_whitespaces=True,
                                                 add_dummy_prefix=False, escape_whitespaces=False)


def encode_batch(texts: Sequence[str], model: str, transform: str) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Encode texts; a document is BOS + ids, or nothing where the normaliser leaves nothing of it.

    Returns (documents, UTF-8 bytes that the score divides by, ids [N] uint16, bytes of text of each id [N] uint16 or,
    without a transform, [0]). Raises ToolError if the tokenizer loses text.
    """
    tokenizer, documents, text_bytes = worker_tokenizer(model), 0, 0
    bos, nothing = np.array([BOS_ID], np.uint16), np.array([0], np.uint16)
    ids, id_bytes = [bos[:0]], [bos[:0]]
    for text in texts:
        if transform == "none":
            tokens = np.array(tokenizer.encode(text), np.uint16)
            text_bytes += len(tokenizer.decode(tokens.tolist()).encode())
        else:
            operators = TRANSFORMS[transform]
            text = text.strip(invisible()) if operators.raw_bytes else normaliser().normalize(text)
            tokens, sizes = operators.tokenize(tokenizer, text)
            text_bytes += int(sizes.sum(dtype=np.int64))
            id_bytes += [nothing[:len(tokens)], sizes]
        require(tokenizer.unk_id() not in tokens, f"{text[:40]!r}...: the tokenizer has no pieces for some characters"
                " of it (unknown id); use one with byte fallback")
        ids += [bos[:len(tokens)], tokens]
        documents += len(tokens) > 0
    return documents, text_bytes, np.concatenate(ids), np.concatenate(id_bytes)
