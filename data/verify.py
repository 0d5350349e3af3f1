"""
verify.py -- everything a referee would ask of a dataset, recomputed from its files: the verb `verify`.

Any folder in the challenge's layout will do, with or without a manifest of ours. Shards are read a piece at a time,
several shards at once; memory does not depend on their number. This is the one place that looks for validation
documents in the training shards; the count is left in verified.json, which training reads.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.documents import caseops, one_line, require
from tools.common import ToolError
from train_gpt import BOS_ID, SHARD_HEADER_BYTES, TokenBytes, TokenStream, UserError, file_sha256, load_sentencepiece
from train_gpt import manifest as read_manifest
from train_gpt import open_shard

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

FORMAT = 1  # of manifest.json
VAL_DOCUMENTS, VAL_BYTES = 50_000, 151_080_891
"""Of the official validation split; its UTF-8 bytes by a SentencePiece table. A CaseOps side file, which counts the
text before normalisation, has 151,074,309."""
MAX_SHARED = 0.01
"""Largest share of validation tokens in documents that training has, too. Web text repeats itself a little by nature;
the leaks that undid records had 0.8 of them (a default that kept 10,000 of 50,000 documents out of training)."""
BATCH_IDS = 1 << 19  # that are looked at together


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
    first: int = BOS_ID
    problem: str = ""


def shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that people can read and compare."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


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
        rest = ids[starts[-1]:] if len(starts) else ids[:0]
        if len(starts) > 1:
            whole, edges, sizes = ids[starts[0]:starts[-1]], starts[:-1] - starts[0], np.diff(starts)
            place = 1 + np.arange(len(whole)) - np.repeat(edges, sizes)
            keys.append(np.add.reduceat(mix[whole] * place.astype(np.uint64), edges))
            lengths.append(sizes)
    return np.concatenate(keys), np.concatenate(lengths)


def check_leaks(directory: Path) -> Check:
    """Count the validation documents that are in training, too, and leave the count in verified.json."""
    train, val = TokenStream(directory, "fineweb_train"), TokenStream(directory, "fineweb_val")
    with ThreadPoolExecutor() as pool:  # the work is in numpy, which releases the GIL
        keys, lengths = map(np.concatenate, zip(*pool.map(document_keys, val.paths)))
        seen = pool.map(lambda path: np.isin(keys, document_keys(path)[0]), train.paths)
        shared = functools.reduce(np.logical_or, seen)
    count, share = int(shared.sum()), float(lengths[shared].sum() / max(1, lengths.sum()))
    with contextlib.suppress(OSError):  # a folder that may only be read can be verified, too
        write_json(directory / "verified.json", {
            "shards_sha256": shards_sha256(directory), "val_documents": len(keys), "shared_documents": count,
            "shared_share": share})
    wrong = f"at most {MAX_SHARED:.0%} may be" if share > MAX_SHARED else ""
    return Check("validation in training", f"{count:,} documents, {share:.2%} of the tokens", wrong)


# -- checks -----------------------------------------------------------------------------------------


def verify(directory: Path, model: Path | None = None, manifest: Mapping[str, Any] | None = None
           ) -> tuple[list[Check], dict[str, Shard]]:
    """Check everything that can be checked of a dataset; leave verified.json in it once its leaks are counted.

    Args:  model     its tokenizer; None: the manifest's, or the one that the folder's name tells
           manifest  None: the folder's
    Returns the table and the sums by split. Raises ToolError if there is nothing to look at or the manifest is damaged.
    """
    require(directory.is_dir(), f"{directory}: no such folder")
    manifest = read_manifest(directory) if manifest is None else manifest
    with contextlib.suppress(OSError):
        (directory / "verified.json").unlink()
    try:
        return look(directory, manifest, model or default_tokenizer(directory, manifest))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ToolError(f"{directory / 'manifest.json'}: damaged ({type(error).__name__}: {one_line(error)});"
                        " fetch or prepare the dataset again with --force") from error


def damage(directory: Path, model: Path | None = None) -> str:
    """The first problem of a dataset in words; "" if all checks hold."""
    try:
        checks, _ = verify(directory, model)
    except (ToolError, UserError) as error:
        return str(error)
    return next((f"{c.what}: {c.result} ({c.problem})" for c in checks if c.problem), "")


def look(directory: Path, manifest: Mapping[str, Any], model: Path) -> tuple[list[Check], dict[str, Shard]]:
    """All checks: tokenizer, shards of each split, then what needs the whole of validation."""
    label = f"tokenizer {model.name}"
    if not model.is_file():
        return [Check(label, shown(model), "missing; give it with --tokenizer MODEL")], {}
    if manifest and file_sha256(model) != manifest["tokenizer"]["sha256"]:
        return [Check(label, shown(model), "SHA-256 is not the manifest's")], {}
    tokenizer = load_tokenizer(model)
    size, wrong = tokenizer.vocab_size(), ""
    if size != manifest.get("vocab_size", size):
        wrong = f"the manifest says {manifest['vocab_size']}"
    elif tokenizer.is_unknown(tokenizer.piece_to_id("\u2581")):
        # Without it SentencePiece spells a space before an unknown word in bytes, and the table counts too few.
        wrong = "no piece for the space alone: the score's table would miss spaces"
    checks, totals = [Check(label, f"{size:,} pieces", wrong)], {}
    transform = manifest.get("transform", "caseops_v1" if any(directory.glob("fineweb_val_bytes_*.bin")) else "none")
    splits = {"train": size, "val": size}
    if transform != "none":
        splits["val_bytes"] = 1 << 16
    for split, ids_below in splits.items():
        rows, totals[split] = check_split(directory, split, manifest, ids_below)
        checks += rows
    # What is wrong with a file ends it here; a wrong count does not.
    if totals["val"].tokens and not any(row.problem for row in checks[1:] if row.what not in totals):
        checks += check_validation(directory, manifest, tokenizer, transform)
        if totals["train"].tokens:
            checks.append(check_leaks(directory))
    return checks, totals


def check_split(directory: Path, split: str, manifest: Mapping[str, Any], ids_below: int) -> tuple[list[Check], Shard]:
    """A row for each bad shard of a split, one for all of them; and their sum."""
    listed = {entry["name"]: entry for entry in manifest.get(split, {}).get("files", ())}
    names = {path.name for path in directory.glob(f"fineweb_{split}_*.bin")
             if split == "val_bytes" or "_bytes_" not in path.name}
    problems = [f"{name} is not in the manifest" for name in sorted(names - set(listed)) if listed]
    names = sorted(names | set(listed))
    if not names:
        return [Check(split, "", f"no fineweb_{split}_*.bin in {shown(directory)}")], Shard()
    with ThreadPoolExecutor() as pool:  # the work is in numpy and hashlib, which release the GIL
        shards = list(pool.map(lambda name: examine(directory / name, listed.get(name), ids_below), names))
    checks = [Check(name, "", shard.problem) for name, shard in zip(names, shards) if shard.problem]
    total = Shard(*(sum(shard[i] for shard in shards) for i in range(3)), shards[0].first)
    counts = {"documents": total.documents, "tokens": total.tokens}
    said, who = manifest.get(split, {}), "the manifest says"
    if split == "val_bytes":
        counts = {"entries": total.tokens}
    elif total.first != BOS_ID:
        problems.append(f"{names[0]} starts with id {total.first}, not with BOS {BOS_ID}")
    elif total.special:
        problems.append(f"{total.special:,} ids of pad, EOS or unknown")
    if split == "val" and not said:
        said, who = {"documents": VAL_DOCUMENTS}, "the official split has"
    problems += [f"{who} {said[key]:,} {key}" for key, count in counts.items() if said.get(key, count) != count]
    result = ", ".join(f"{count:,} {key}" for key, count in counts.items())
    return [*checks, Check(split, f"{result} in {len(names)} file(s)", "; ".join(problems))], total


def examine(path: Path, entry: Mapping[str, Any] | None, ids_below: int) -> Shard:
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
    documents = control = 0
    for ids in pieces(path):
        if (highest := int(ids.max())) >= ids_below:
            return Shard(problem=f"id {highest} is outside the vocabulary of {ids_below}")
        documents += int(np.count_nonzero(ids == BOS_ID))
        control += int(np.count_nonzero(ids < 4))
    if entry and "sha256" in entry and file_sha256(path) != entry["sha256"]:
        return Shard(problem="SHA-256 is not the manifest's")
    return Shard(tokens, documents, control - documents, int(next(pieces(path))[0]))


def check_validation(directory: Path, manifest: Mapping[str, Any], tokenizer: Any, transform: str) -> list[Check]:
    """Rows that need all of validation: round trip, and the bytes that the score divides by."""
    val, operators = TokenStream(directory, "fineweb_val"), caseops(transform)
    decoded_bytes, number, odd = 0, 0, []
    for batch in documents_of(val):
        ids = [document.tolist() for document in batch]
        texts = tokenizer.decode(ids, num_threads=-1)
        again = tokenizer.encode(texts, num_threads=-1)
        for document, text, second in zip(ids, texts, again):
            try:
                text = operators.decode(text)
            except ValueError:
                second = None  # not a transformed text
            if second != document:
                odd.append(number)
            decoded_bytes, number = decoded_bytes + len(text.encode()), number + 1
    wrong = f"document {odd[0]} decodes to a text that encodes to other ids" if odd else ""
    checks = [Check("round trip", f"{number - len(odd):,} of {number:,} validation documents", wrong)]
    wrong = ""
    if operators.operators:
        source, side = "in the side file", TokenStream(directory, "fineweb_val_bytes")
        if [len(shard) for shard in side.shards] != [len(shard) for shard in val.shards]:
            return [*checks, Check("side file", f"{len(side):,} entries", f"validation has {len(val):,} tokens")]
        counted = sum(int(shard.sum(dtype=np.int64)) for shard in side.shards)
        on_bos = sum(int(np.count_nonzero(b[a == BOS_ID])) for a, b in zip(val.shards, side.shards))
        if on_bos:
            wrong = f"{on_bos:,} BOS have bytes"
        elif abs(counted - decoded_bytes) > 0.01 * decoded_bytes:
            # The side file counts bytes before normalisation, which takes a little; the known mistakes add a sixth.
            wrong = "they differ by more than 1%"
    else:
        source, table = "by the score's table", TokenBytes.build(tokenizer)
        edges = [*range(0, len(val), BATCH_IDS), len(val)]
        counted = sum(int(table.of_targets(val.read(max(0, start - 1), stop)).sum(dtype=np.int64))
                      for start, stop in itertools.pairwise(edges))
        if counted != decoded_bytes:
            wrong = "they differ: the score would divide by wrong bytes"
    said = manifest.get("val", {}).get("bytes", counted)
    if said != counted:
        wrong = wrong or f"the manifest says {said:,} bytes"
    official = manifest.get("source", {}).get("kind", "hub") == "hub" and number == VAL_DOCUMENTS
    if official and abs(counted / VAL_BYTES - 1) > 1e-4:
        wrong = wrong or f"the official validation text has {VAL_BYTES:,} bytes"
    ratio = f"{counted / len(val):.4f} a token"
    return [*checks, Check("bytes", f"{counted:,} {source}, {decoded_bytes:,} decoded, {ratio}", wrong)]


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
