"""
verify.py -- everything a referee would ask of a dataset, recomputed from its files: the verb `verify`.

Any folder in the challenge's layout will do, with or without a manifest of ours. Shards are read a piece at a time,
several shards at once; memory does not depend on their number. This is the one place that looks for validation
documents in the training shards; what it finds is left in verified.json, which training reads.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.documents import caseops, one_line, require
from tools.common import ToolError
from tools.evidence import TOKENS_PER_BYTE, dataset_name
from train_gpt import (
    BOS_ID,
    SHARD_HEADER_BYTES,
    TokenBytes,
    TokenStream,
    UserError,
    file_sha256,
    load_sentencepiece,
    open_shard,
)
from train_gpt import manifest as read_manifest

try:
    from train_gpt import shards_sha256
except ImportError:
    def shards_sha256(folder: Path) -> str:
        """SHA-256 over name, size and first 4,096 bytes of every shard, in name order."""
        digest = hashlib.sha256()
        for path in sorted(folder.glob("fineweb_*.bin")):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(4096))
        return digest.hexdigest()

FORMAT = 1
"""Version of manifest.json."""

VAL_DOCUMENTS, VAL_BYTES = 50_000, 151_080_891
"""Of the official validation split; its UTF-8 bytes by a SentencePiece table. A CaseOps side file, which counts the
text before normalisation, has 151,074,309."""

MAX_SHARED = 0.01
"""Largest share of validation tokens in documents that training has, too. Web text repeats itself a little by nature;
the leaks that undid records had 0.8 of them (a default that kept 10,000 of 50,000 documents out of training)."""

BATCH_IDS = 1 << 19
"""Ids that are looked at together."""


class Check(NamedTuple):
    """One line of the table."""

    what: str
    result: str
    problem: str = ""  # "" if all is well


class Shard(NamedTuple):
    """What one pass over a shard, or over all of a split, counted."""

    tokens: int = 0
    documents: int = 0
    special: int = 0  # ids of pad, EOS and unknown, which no shard holds
    text_bytes: int = 0  # by the score's table, as if BOS came before
    first: int = BOS_ID
    last: int = BOS_ID
    problem: str = ""


class Report(NamedTuple):
    """The table and the sums it was made from."""

    checks: list[Check]
    totals: dict[str, Shard]  # by split


def shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path)


def load_tokenizer(path: Path) -> Any:
    """A SentencePiece model that can write our shards. ToolError if it cannot."""
    tokenizer = load_sentencepiece(path)
    size = tokenizer.vocab_size()
    require(size <= 65_536, f"{path}: {size} pieces; ids are uint16, so at most 65536")
    require(any(map(tokenizer.is_byte, range(size))),
            f"{path}: no byte pieces; without them text is lost and not counted")
    return tokenizer


def default_tokenizer(directory: Path, manifest: Mapping[str, Any]) -> Path:
    """The model of a dataset: the manifest's, else by the published names (fineweb10B_sp1024, fineweb_1024_bpe)."""
    if path := manifest.get("tokenizer", {}).get("path"):
        return Path(os.path.normpath(directory / path))
    named = re.fullmatch(r"fineweb\w+?_sp(\d+)(\w*)", directory.resolve().name)
    require(named is not None, f"{directory}: its name does not tell the tokenizer; give it with --tokenizer MODEL")
    return directory.resolve().parents[1] / "tokenizers" / f"fineweb_{named[1]}_bpe{named[2]}.model"


def pieces(path: Path) -> Iterator[np.ndarray]:
    """A shard's ids in order, BATCH_IDS at a time; not through a memory map, whose pages count as the process's own."""
    tokens = (path.stat().st_size - SHARD_HEADER_BYTES) // 2
    for start in range(0, tokens, BATCH_IDS):
        yield np.fromfile(path, "<u2", BATCH_IDS, offset=SHARD_HEADER_BYTES + 2 * start)


def documents_of(stream: TokenStream) -> Iterator[list[np.ndarray]]:
    """Documents of a stream without their BOS, in batches of about BATCH_IDS."""
    starts = np.append(stream.document_starts(), len(stream))
    first = 0
    while first < len(starts) - 1:
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + BATCH_IDS, side="right")) - 1)
        ids = stream.read(int(starts[first]), int(starts[last]))
        yield [part[1:] for part in np.split(ids, starts[first + 1:last] - starts[first])]
        first = last


# -- leaks ------------------------------------------------------------------------------------------


def document_keys(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(key [documents] uint64, length [documents] int64) of the documents that start in a shard.

    A key is the sum of place times a random number for the id: equal documents have equal keys wherever they stand,
    others practically never do. A document that runs on into the next shard has the key of its first part.
    """
    mix = np.random.default_rng(0).integers(0, 2**64 - 1, 1 << 16, dtype=np.uint64)
    keys, lengths = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    rest = np.zeros(0, np.uint16)  # the document that the next piece goes on with
    for piece in itertools.chain(pieces(path), [np.array([BOS_ID])]):  # a BOS ends the last document
        ids = np.append(rest, piece)
        starts = np.flatnonzero(ids == BOS_ID)
        if len(starts) > 1:
            sizes = np.diff(starts)
            whole = ids[starts[0]:starts[-1]]
            place = 1 + np.arange(len(whole), dtype=np.uint64) - np.repeat(starts[:-1] - starts[0], sizes)
            keys.append(np.add.reduceat(mix[whole] * place.astype(np.uint64), starts[:-1] - starts[0]))
            lengths.append(sizes)
        rest = ids[starts[-1]:] if len(starts) else ids[:0]
    return np.concatenate(keys), np.concatenate(lengths)


def leaks(directory: Path) -> dict[str, Any]:
    """How many validation documents are in the training shards, too, and their share of the validation tokens."""
    with ThreadPoolExecutor() as pool:  # the work is in numpy, which releases the GIL
        val = list(pool.map(document_keys, TokenStream(directory, "fineweb_val").paths))
        keys, lengths = (np.concatenate(arrays) for arrays in zip(*val))
        seen = pool.map(lambda path: np.isin(keys, document_keys(path)[0]), TokenStream(directory, "fineweb_train").paths)
        shared = functools.reduce(np.logical_or, seen)
    return {"val_documents": len(keys), "shared_documents": int(shared.sum()),
            "shared_share": float(lengths[shared].sum() / max(1, lengths.sum()))}


# -- checks -----------------------------------------------------------------------------------------


def verify(directory: Path, model: Path | None = None, manifest: Mapping[str, Any] | None = None) -> Report:
    """Check everything that can be checked of a dataset; leave verified.json in it once its leaks are counted.

    Args:  model  its tokenizer; None: the manifest's, or the one that the folder's name tells;  manifest  None: its own.
    Raises ToolError if there is nothing to look at, or the manifest is damaged.
    """
    require(directory.is_dir(), f"{directory}: no such folder")
    manifest = read_manifest(directory) if manifest is None else manifest
    with contextlib.suppress(OSError):  # a folder that may only be read can be verified, too
        (directory / "verified.json").unlink()
    try:
        return look(directory, manifest, model or default_tokenizer(directory, manifest))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ToolError(f"{directory / 'manifest.json'}: damaged ({type(error).__name__}: {one_line(error)});"
                        " fetch or prepare the dataset again with --force") from error


def damage(directory: Path, model: Path | None = None) -> str:
    """The first problem of a dataset in words; "" if all checks hold."""
    try:
        checks = verify(directory, model).checks
    except (ToolError, UserError) as error:
        return str(error)
    return next((f"{c.what}: {c.result} ({c.problem})" for c in checks if c.problem), "")


def look(directory: Path, manifest: Mapping[str, Any], model: Path) -> Report:
    """All checks: tokenizer, shards of each split, then what needs the whole of validation."""
    label = f"tokenizer {model.name}"
    if not model.is_file():
        return Report([Check(label, shown(model), "missing; give it with --tokenizer MODEL")], {})
    if manifest and file_sha256(model) != manifest["tokenizer"]["sha256"]:
        return Report([Check(label, shown(model), "SHA-256 is not the manifest's")], {})
    tokenizer = load_tokenizer(model)
    size, tables = tokenizer.vocab_size(), TokenBytes.build(tokenizer)
    wrong = ""
    if size != manifest.get("vocab_size", size):
        wrong = f"the manifest says {manifest['vocab_size']}"
    elif tokenizer.is_unknown(tokenizer.piece_to_id("\u2581")):
        # Without it SentencePiece spells a space before an unknown word in bytes, and the table counts too few.
        wrong = "no piece for the space alone: the score's table would miss spaces"
    checks, totals = [Check(label, f"{size:,} pieces", wrong)], {}
    transform = manifest.get("transform", "caseops_v1" if any(directory.glob("fineweb_val_bytes_*.bin")) else "none")
    splits = {"train": size, "val": size}
    if transform != "none":
        splits, tables = splits | {"val_bytes": 1 << 16}, None
    for split, ids_below in splits.items():
        rows, totals[split] = check_split(directory, split, manifest, ids_below, tables)
        checks += rows
    # What is wrong with a file ends it here; a wrong count does not.
    if totals["val"].tokens and not any(row.problem for row in checks[1:] if row.what not in totals):
        checks += check_validation(directory, manifest, totals["val"], tokenizer, transform)
        if totals["train"].tokens:
            checks.append(check_leaks(directory))
    return Report(checks, totals)


def check_split(directory: Path, split: str, manifest: Mapping[str, Any], ids_below: int, tables: TokenBytes | None
                ) -> tuple[list[Check], Shard]:
    """A row for each bad shard of a split, one for all of them; and their sum."""
    listed = {entry["name"]: entry for entry in manifest.get(split, {}).get("files", ())}
    names = {path.name for path in directory.glob(f"fineweb_{split}_*.bin")}
    if split == "val":
        names = {name for name in names if "_bytes_" not in name}
    unlisted = sorted(names - set(listed)) * bool(listed)
    names = sorted(names | set(listed))
    if not names:
        return [Check(split, "", f"no fineweb_{split}_*.bin in {shown(directory)}")], Shard()
    with ThreadPoolExecutor() as pool:  # the work is in numpy and hashlib, which release the GIL
        shards = list(pool.map(lambda name: examine(directory / name, listed.get(name), ids_below, tables), names))
    rows = [Check(name, "", shard.problem) for name, shard in zip(names, shards) if shard.problem]
    total = Shard(*(sum(shard[i] for shard in shards) for i in range(4)), shards[0].first, shards[-1].last)
    where = f"in {len(names)} file(s)"
    if split == "val_bytes":
        return [*rows, Check(split, f"{total.tokens:,} entries {where}")], total
    problems = [f"{name} is not in the manifest" for name in unlisted]
    if total.first != BOS_ID:
        problems.append(f"{names[0]} starts with id {total.first}, not with BOS {BOS_ID}")
    if total.special:
        problems.append(f"{total.special:,} ids of pad, EOS or unknown")
    counts = {"documents": total.documents, "tokens": total.tokens}
    if tables:  # a space that opens a shard counts unless the shard before ended in a control token
        openings = sum(int(tables.leading_space[b.first] and not tables.boundary[a.last])
                       for a, b in itertools.pairwise(shards))
        total = total._replace(text_bytes=total.text_bytes + openings)
        counts["bytes"] = total.text_bytes
    said, who = manifest.get(split, {}), "the manifest says"
    if split == "val" and not said:
        said, who = {"documents": VAL_DOCUMENTS}, "the official split has"
    problems += [f"{who} {said[key]:,} {key}" for key, count in counts.items() if said.get(key, count) != count]
    result = ", ".join(f"{count:,} {key}" for key, count in counts.items())
    return [*rows, Check(split, f"{result} {where}", "; ".join(problems))], total


def examine(path: Path, entry: Mapping[str, Any] | None, ids_below: int, tables: TokenBytes | None) -> Shard:
    """Header, size, ids and, where the manifest lists the file, tokens and SHA-256."""
    try:
        tokens = len(open_shard(path))
    except FileNotFoundError:
        return Shard(problem="missing")
    except OSError as error:
        return Shard(problem=f"cannot be read ({error.strerror})")
    except UserError as error:
        return Shard(problem=str(error).removeprefix(f"{path}: "))
    if entry and tokens != entry["tokens"]:
        return Shard(problem=f"{tokens:,} tokens, the manifest says {entry['tokens']:,}")
    if not tokens:
        return Shard(problem="no tokens")
    if np.fromfile(path, "<i4", SHARD_HEADER_BYTES // 4)[3:].any():
        return Shard(problem="the header's unused words are not zero: damaged")
    documents = special = text_bytes = 0
    first, before = None, BOS_ID
    for ids in pieces(path):
        if (highest := int(ids.max())) >= ids_below:
            return Shard(problem=f"id {highest} is outside the vocabulary of {ids_below}")
        starts = int(np.count_nonzero(ids == BOS_ID))
        documents += starts
        special += int(np.count_nonzero(ids < 4)) - starts
        if tables:
            text_bytes += int(tables.of_targets(np.append(np.uint16(before), ids)).sum(dtype=np.int64))
        first, before = int(ids[0]) if first is None else first, int(ids[-1])
    wrong = ""
    if entry and "sha256" in entry and file_sha256(path) != entry["sha256"]:
        wrong = "SHA-256 is not the manifest's"
    return Shard(tokens, documents, special, text_bytes, first, before, wrong)


def check_validation(directory: Path, manifest: Mapping[str, Any], total: Shard, tokenizer: Any, transform: str
                     ) -> list[Check]:
    """Rows that need all of validation: round trip, bytes by two ways, bytes per token."""
    val, operators = TokenStream(directory, "fineweb_val"), caseops(transform)
    if operators:
        side = TokenStream(directory, "fineweb_val_bytes")
        if [len(shard) for shard in side.shards] != [len(shard) for shard in val.shards]:
            return [Check("side file", f"{len(side):,} entries", f"validation has {len(val):,} tokens")]
    decoded_bytes, number, odd = 0, 0, []
    for batch in documents_of(val):
        ids = [document.tolist() for document in batch]
        texts = tokenizer.decode(ids, num_threads=-1)
        again = tokenizer.encode(texts, num_threads=-1)
        for document, text, second in zip(ids, texts, again):
            if operators:
                try:
                    text = operators.decode(text)
                except ValueError:
                    second = None  # not a transformed text
            if second != document:
                odd.append(number)
            decoded_bytes, number = decoded_bytes + len(text.encode()), number + 1
    wrong = f"document {odd[0]} decodes to a text that encodes to other ids" if odd else ""
    checks = [Check("round trip", f"{number - len(odd):,} of {number:,} validation documents", wrong)]
    wrong, counted, by = "", total.text_bytes, "by the score's table"
    if operators:
        counted, by = sum(int(shard.sum(dtype=np.int64)) for shard in side.shards), "in the side file"
        on_bos = sum(int(np.count_nonzero(b[a == BOS_ID])) for a, b in zip(val.shards, side.shards))
        if on_bos:
            wrong = f"{on_bos:,} BOS have bytes"
        elif abs(counted - decoded_bytes) > 0.01 * decoded_bytes:
            # The side file counts bytes before normalisation, which takes a little; the known mistakes add a sixth.
            wrong = "they differ by more than 1%"
        elif manifest.get("val", {}).get("bytes", counted) != counted:
            wrong = f"the manifest says {manifest['val']['bytes']:,}"
    elif counted != decoded_bytes:
        wrong = "they differ: the score would divide by wrong bytes"
    checks.append(Check("bytes", f"{counted:,} {by}, {decoded_bytes:,} decoded", wrong))
    ratio, wrong = counted / max(1, len(val) - number), ""
    if manifest.get("source", {}).get("kind", "hub") == "hub" and number == VAL_DOCUMENTS:
        ratio = counted / len(val)
        published = 1 / TOKENS_PER_BYTE.get(dataset_name(bool(operators), tokenizer.vocab_size()), math.inf)
        if abs(counted / VAL_BYTES - 1) > 1e-4:
            wrong = f"the official validation text has {VAL_BYTES:,} bytes"
        elif published and abs(ratio / published - 1) > 0.005:
            wrong = f"the records have {published:.4f}"
    return [*checks, Check("bytes per token", f"{ratio:.4f}", wrong)]


def check_leaks(directory: Path) -> Check:
    """Count the validation documents that are in training, too, and leave the count in verified.json."""
    counts = leaks(directory)
    stamp = {"shards_sha256": shards_sha256(directory), **counts}
    with contextlib.suppress(OSError):  # a folder that may only be read
        (directory / "verified.json").write_text(json.dumps(stamp, indent=2) + "\n")
    wrong = f"at most {MAX_SHARED:.0%} may be" if counts["shared_share"] > MAX_SHARED else ""
    return Check("validation in training",
                 f"{counts['shared_documents']:,} documents, {counts['shared_share']:.2%} of the tokens", wrong)


def table(directory: Path, checks: list[Check]) -> str:
    """The table of `verify`, for people."""
    width = max(len(row.what) for row in checks)
    lines = []
    for row in checks:
        mark, problem = ("FAIL", f"  ({row.problem})") if row.problem else ("ok", "")
        lines.append(f"{mark:<5}{row.what:<{width}}  {row.result}{problem}")
    failures = sum(1 for row in checks if row.problem)
    verdict = f"{failures} of {len(checks)} checks failed" if failures else "all checks hold"
    return "\n".join([*lines, f"{shown(directory)}: {verdict}"])
