"""
documents.py -- files -> documents -> ids: everything `text` and `demo` do to one document.

Nothing here loads torch, so that worker processes, which import this file, start fast and stay small.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import json
import re
import sysconfig
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from data.caseops import VERSIONS, CaseOps
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


# -- documents --------------------------------------------------------------------------------------
# A document is identified by the hash of its cleaned text; everything that looks random (side, sample, order) is a
# keyed hash of that hash. So a text lands on one side wherever it stands and however often, and adding documents moves
# none of the others. Bytes that are not UTF-8 and lone surrogates become U+FFFD, which the normaliser drops; such
# documents are counted, not refused.
# Not safe to change: `clean`, `content_hash`, `draw`; each redraws every split ever made.

class Document(NamedTuple):
    """A cleaned text."""

    text: str
    repaired: bool  # something in it was not Unicode


def clean(text: str) -> str:
    """Strip the text and replace NUL by a space (as in the official export)."""
    return text.strip().replace("\0", " ")


def document(place: str, content: bytes | str, text_field: str | None = None) -> Document:
    """Clean what a file holds at a place ("corpus.jsonl:17"); with `text_field` it is a JSON object with that field.

    Raises ToolError if there is no text in it, or too much.
    """
    repaired = False
    if isinstance(content, bytes):
        try:
            content = content.decode("utf-8-sig")  # a byte order mark is dropped
        except UnicodeDecodeError:
            content, repaired = content.decode("utf-8-sig", errors="replace"), True
    if text_field is not None:
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ToolError(f"{place}: not JSON ({error}); is the file complete?") from None
        require(isinstance(row, dict), f"{place}: expected a JSON object, found {type(row).__name__}")
        content = row.get(text_field)
        if not isinstance(content, str):
            fields = ", ".join(map(repr, itertools.islice(row, 8)))
            raise ToolError(f"{place}: no string in field {text_field!r} (fields: {fields}); see --text-field")
    whole = re.sub("[\ud800-\udfff]", "\ufffd", content)
    text = clean(whole)
    if len(text) > MAX_DOCUMENT_BYTES // 4:  # only then can it be too long
        refuse_long(place, len(text.encode()))
    return Document(text, repaired or whole != content)


def refuse_long(place: str, num_bytes: int) -> None:
    """Raise ToolError for a document of more than MAX_DOCUMENT_BYTES."""
    require(num_bytes <= MAX_DOCUMENT_BYTES, f"{place}: a document of {num_bytes:,} bytes; at most"
            f" {MAX_DOCUMENT_BYTES:,}: split it, for example into lines of a .jsonl file")


def content_hash(text: str) -> bytes:
    """16 bytes of BLAKE2b that identify a cleaned text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def draw(digest: bytes, seed: int) -> tuple[int, int]:
    """Two independent numbers in [0, 2**64): the first decides a document's side, the second its place."""
    drawn = hashlib.blake2b(digest, key=str(seed).encode(), digest_size=16).digest()
    return int.from_bytes(drawn[:8], "big"), int.from_bytes(drawn[8:], "big")


# -- files ------------------------------------------------------------------------------------------
# A file that ends too early is an error: half a corpus must not pass for a whole one.


def read_txt(path: Path, text_field: str) -> Iterator[Document]:
    """The whole file is one document; `text_field` does not apply."""
    refuse_long(str(path), path.stat().st_size)
    yield document(str(path), path.read_bytes())


def read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    """One JSON object a line; the suffix says how the lines are compressed. Blank lines are skipped."""
    name = path.name.lower()
    with contextlib.ExitStack() as stack:
        if name.endswith(".gz"):
            lines: Iterable[bytes] = stack.enter_context(gzip.open(path, "rb"))
        elif name.endswith(".zst"):
            import pyarrow  # Python reads Zstandard from 3.14 on

            raw = pyarrow.input_stream(str(path), compression="zstd")
            lines = stack.enter_context(io.BufferedReader(raw, 1 << 20))
        else:
            lines = stack.enter_context(path.open("rb"))
        for number, line in enumerate(lines, start=1):
            if not line.isspace():
                yield document(f"{path}:{number}", line, text_field)


def read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    """Column `text_field` of a Parquet file, one document a row."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            require(text_field in columns, f"{path}: no column {text_field!r} (columns:"
                    f" {', '.join(map(repr, columns[:8]))}); see --text-field")
            batches = file.iter_batches(batch_size=256, columns=[text_field])
            values = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for number, text in enumerate(values, start=1):
                require(isinstance(text, str), f"{path}:{number}: no string in column {text_field!r}; see --text-field")
                yield document(f"{path}:{number}", text)
    except pyarrow.ArrowException as error:
        raise OSError(str(error).splitlines()[0]) from error


READERS: Mapping[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".parquet": read_parquet,
}
"""Which reader opens a file, by the end of its name. Safe to change: a new suffix is one reader and one row."""


def suffix_of(path: Path) -> str | None:
    """The suffix of READERS that `path` ends in."""
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), None)


def input_files(inputs: Sequence[Path]) -> list[Path]:
    """Files to read: the inputs that are files, and by name the files of a known suffix below those that are folders.

    Hidden files and folders are left out. ToolError on a missing path, an unknown suffix, an empty folder.
    """
    known = ", ".join(READERS)
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            names = [file.relative_to(path) for file in path.rglob("*") if suffix_of(file) and file.is_file()]
            names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
            require(bool(names), f"{path}: no file in this folder ends in one of {known}")
            files += [path / name for name in sorted(names, key=Path.as_posix)]
        else:
            require(path.is_file(), f"{path}: no such file or folder")
            require(suffix_of(path) is not None,
                    f"{path}: unknown kind of file; expected a name ending in one of {known}")
            files.append(path)
    return files


def read_documents(paths: Iterable[Path], text_field: str) -> Iterator[Document]:
    """Documents of files in order. ToolError on what cannot be read."""
    for path in paths:
        try:
            yield from READERS[suffix_of(path) or ".txt"](path, text_field)
        except (EOFError, OSError, zlib.error) as error:
            raise ToolError(f"{path}: cannot be read ({one_line(error)}); complete? suffix right?") from error


OWN_TEXT = "prepare text of your own: ./run.sh data text INPUT... --name NAME"


def stdlib_sources() -> list[Path]:
    """Sources of the running Python's standard library, by name. ToolError if it has none."""
    root = Path(sysconfig.get_path("stdlib"))
    # What the build writes is full of the paths and flags of one machine; pydoc_data/topics.py has the words of the
    # topics once more, so that a topic that validates would be trained on.
    left_out = re.compile(r"config-|pydoc_data/topics\.py$|(.*/)?(_sysconfigdata[^/]*$|"
                          r"(site-packages|dist-packages|__pycache__|test|tests|idle_test)/)")
    sources = [path for path in root.rglob("*.py") if not left_out.match(path.relative_to(root).as_posix())]
    sources.sort(key=Path.as_posix)
    require(bool(sources), f"{root} holds no Python sources; {OWN_TEXT}")
    return sources


def demo_documents() -> Iterator[Document]:
    """The documentation topics of the running Python, then the modules of its standard library."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ToolError(f"this Python lacks its documentation topics (pydoc_data); {OWN_TEXT}") from None
    for name in sorted(topics):
        yield document(f"topic {name}", topics[name])
    for path in stdlib_sources():
        yield document(str(path), path.read_bytes())


# -- ids: what a worker process makes of a batch of texts -------------------------------------------


class Encoded(NamedTuple):
    """The documents of a batch as ids, one after the other."""

    lengths: np.ndarray  # [D] int64: ids of each document, BOS included; 0 where the normaliser left nothing
    text_bytes: np.ndarray  # [D] int64: UTF-8 bytes that the score divides by
    ids: np.ndarray  # [sum of lengths] uint16
    id_bytes: np.ndarray  # [sum of lengths] uint16: bytes of text of each id; empty without a transform


def caseops(transform: str) -> CaseOps:
    """The version of data/caseops.py that a transform names; "none" leaves a text as it is."""
    return VERSIONS[transform.removeprefix("caseops_")]


@functools.lru_cache(maxsize=1)
def worker_tokenizer(path: str) -> sentencepiece.SentencePieceProcessor:
    """The model, loaded once in each process."""
    return sentencepiece.SentencePieceProcessor(model_file=path)


@functools.lru_cache(maxsize=1)
def invisible() -> str:
    """What the normaliser drops at the ends of a text; its bytes would belong to no token of the side file."""
    unseen = [c for c in map(chr, range(0x10000)) if unicodedata.category(c) in ("Cc", "Cf", "Zs", "Zl", "Zp")]
    return "".join(unseen) + "\u2581\ufffd"


def encode_batch(texts: Sequence[str], model: str, transform: str) -> Encoded:
    """Encode texts; a document is BOS + ids. ToolError if the tokenizer loses text."""
    tokenizer = worker_tokenizer(model)
    lengths, text_bytes = np.zeros((2, len(texts)), np.int64)
    bos, nothing = np.array([BOS_ID], np.uint16), np.array([0], np.uint16)
    ids, id_bytes = [bos[:0]], [bos[:0]]
    for i, text in enumerate(texts):
        if transform == "none":
            tokens = np.array(tokenizer.encode(text), np.uint16)
            text_bytes[i] = len(tokenizer.decode(tokens.tolist()).encode())
        else:
            try:
                tokens, sizes = caseops(transform).tokenize(tokenizer, text.strip(invisible()))
            except ValueError as error:
                raise ToolError(one_line(error)) from None
            text_bytes[i] = sizes.sum(dtype=np.int64)
            if len(tokens):
                id_bytes += [nothing, sizes]
        require(tokenizer.unk_id() not in tokens, f"{text[:40]!r}...: the tokenizer has no pieces for some characters"
                " of it (unknown id); use one with byte fallback")
        if len(tokens):
            ids += [bos, tokens]
            lengths[i] = 1 + len(tokens)
    return Encoded(lengths, text_bytes, np.concatenate(ids), np.concatenate(id_bytes))
