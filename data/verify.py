"""
verify.py -- what a referee would ask of a dataset, recomputed from its files: `prepare.py verify DIR`.

Any folder in the challenge's layout will do, with or without a manifest of ours. Shards are read in pieces, several at
a time; memory does not depend on their number.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from data.documents import caseops

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "records"))
from tools.evidence import TOKENS_PER_BYTE, dataset_name

from train_gpt import (
    BOS_ID,
    MAX_SHARED,
    SHARD_HEADER_BYTES,
    VAL_DOCUMENTS,
    TokenBytes,
    TokenStream,
    UserError,
    file_sha256,
    load_sentencepiece,
    one_line,
    open_shard,
    pieces,
    require,
)
from train_gpt import manifest as read_manifest

FORMAT = 1
"""Version of manifest.json. A dataset of another version is rebuilt, never half-understood."""

VAL_BYTES = 151_080_891
"""UTF-8 bytes of the official validation text, by a SentencePiece table; a CaseOps side file, which counts the text
before normalisation, has 151,074,309."""

BATCH_IDS = 1 << 19
"""Ids of the documents that are decoded together."""


class Check(NamedTuple):
    """One line of the table: what was looked at, what was found, what is wrong ("" if nothing is)."""

    what: str
    found: str
    problem: str = ""


def shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def load_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a dataset that prepare.py made; UserError if there is none, or one of another format."""
    found = read_manifest(directory)
    require(found.get("format") == FORMAT,
            f"{directory / 'manifest.json'}: no manifest of format {FORMAT}; prepare the dataset again with --force")
    return found


def load_tokenizer(path: Path) -> Any:
    """A SentencePiece model that can write our shards. UserError if it cannot."""
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


class Shard(NamedTuple):
    """What one pass over a shard found."""

    tokens: int = 0
    documents: int = 0
    special: int = 0
    """Ids of pad, EOS and unknown, which no shard holds."""
    text_bytes: int = 0
    """By the score's table, as if BOS came before."""
    first: int = BOS_ID
    last: int = BOS_ID
    problem: str = ""


def examine(path: Path, entry: Mapping[str, Any] | None, vocab_size: int, tables: TokenBytes | None) -> Shard:
    """Header, size, ids and, where the manifest lists the file, tokens and SHA-256."""
    try:
        ids = open_shard(path)
    except FileNotFoundError:
        return Shard(problem="missing")
    except OSError as error:
        return Shard(problem=f"cannot be read ({error.strerror})")
    except UserError as error:
        return Shard(problem=str(error).removeprefix(f"{path}: "))
    if entry and len(ids) != entry["tokens"]:
        return Shard(problem=f"{len(ids):,} tokens, the manifest says {entry['tokens']:,}")
    if not len(ids):
        return Shard(problem="no tokens")
    if np.fromfile(path, "<i4", SHARD_HEADER_BYTES // 4)[3:].any():
        return Shard(problem="the header's unused words are not zero: damaged")
    documents = special = text_bytes = 0
    before = BOS_ID
    for part in pieces(ids):
        if (highest := int(part.max())) >= vocab_size:
            return Shard(problem=f"id {highest} is outside the vocabulary of {vocab_size}")
        documents += int(np.count_nonzero(part == BOS_ID))
        special += int(np.count_nonzero(part < 4)) - int(np.count_nonzero(part == BOS_ID))
        if tables:
            text_bytes += int(tables.of_targets(np.append(np.uint16(before), part)).sum(dtype=np.int64))
        before = int(part[-1])
    wrong = "" if not entry or "sha256" not in entry or file_sha256(path) == entry["sha256"] else \
        "SHA-256 is not the manifest's"
    return Shard(len(ids), documents, special, text_bytes, int(ids[0]), before, wrong)


def documents_of(stream: TokenStream) -> Iterator[list[np.ndarray]]:
    """Documents of a stream without their BOS, in batches of about BATCH_IDS."""
    starts = np.append(stream.document_starts(), len(stream))
    first = 0
    while first < len(starts) - 1:
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + BATCH_IDS, side="right")) - 1)
        ids = stream.read(int(starts[first]), int(starts[last]))
        yield [part[1:] for part in np.split(ids, starts[first + 1 : last] - starts[first])]
        first = last


def verify(directory: Path, model: Path | None = None) -> list[Check]:
    """Everything that can be checked of a dataset.

    Args:  model  its tokenizer; None: the manifest's, or the one that the folder's name tells.
    UserError if there is nothing to look at, or the manifest is damaged.
    """
    require(directory.is_dir(), f"{directory}: no such folder")
    manifest = read_manifest(directory)
    try:
        return checks(directory, manifest, model or default_tokenizer(directory, manifest))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / 'manifest.json'}: damaged ({type(error).__name__}: {one_line(error)});"
                        " fetch or prepare the dataset again with --force") from error


def checks(directory: Path, manifest: Mapping[str, Any], model: Path) -> list[Check]:
    """The rows of `verify`."""
    if not model.is_file():
        return [Check(f"tokenizer {model.name}", shown(model), "missing; give it with --tokenizer MODEL")]
    if manifest and file_sha256(model) != manifest["tokenizer"]["sha256"]:
        return [Check(f"tokenizer {model.name}", shown(model), "SHA-256 is not the manifest's")]
    tokenizer = load_tokenizer(model)
    size, tables = tokenizer.vocab_size(), TokenBytes.build(tokenizer)
    wrong = "" if size == manifest.get("vocab_size", size) else f"the manifest says {manifest['vocab_size']}"
    # Without it SentencePiece spells a space before an unknown word in bytes, and the table counts too few.
    if tokenizer.is_unknown(tokenizer.piece_to_id("\u2581")):
        wrong = wrong or "no piece for the space alone: the score's table would miss spaces"
    rows = [Check(f"tokenizer {model.name}", f"{size:,} pieces", wrong)]
    transform = manifest.get("transform", "caseops_v1" if any(directory.glob("fineweb_val_bytes_*.bin")) else "none")
    plain = transform == "none"
    totals: dict[str, Shard] = {}
    for split in ("train", "val") if plain else ("train", "val", "val_bytes"):
        own, totals[split] = look(directory, split, manifest, size if split != "val_bytes" else 1 << 16,
                                  tables if plain else None)
        rows += own
    # What is wrong with a file ends it here; a wrong count does not.
    if not totals["val"].tokens or any(row.problem for row in rows[1:] if row.what not in totals):
        return rows
    return rows + together(directory, manifest, totals, tokenizer, transform)


def look(
    directory: Path, split: str, manifest: Mapping[str, Any], vocab_size: int, tables: TokenBytes | None
) -> tuple[list[Check], Shard]:
    """Rows for the shards of a split: one for each that is bad, one for all; and their sum."""
    listed = {entry["name"]: entry for entry in manifest[split]["files"]} if split in manifest else {}
    there = {p.name for p in directory.glob(f"fineweb_{split}_*.bin") if split != "val" or "_bytes_" not in p.name}
    names = sorted(there | set(listed))
    if not names:
        return [Check(split, "", f"no fineweb_{split}_*.bin in {shown(directory)}")], Shard()
    with ThreadPoolExecutor() as pool:  # the work is in numpy and hashlib, which release the GIL
        shards = list(pool.map(lambda n: examine(directory / n, listed.get(n), vocab_size, tables), names))
    rows = [Check(name, "", shard.problem) for name, shard in zip(names, shards) if shard.problem]
    total = Shard(*(sum(shard[i] for shard in shards) for i in range(4)), shards[0].first, shards[-1].last)
    if split == "val_bytes":
        return [*rows, Check(split, f"{total.tokens:,} entries in {len(names)} file(s)")], total
    problems = [f"{name} is not in the manifest" for name in sorted(there - set(listed))] if listed else []
    if total.first != BOS_ID:
        problems.append(f"{names[0]} starts with id {total.first}, not with BOS {BOS_ID}")
    if total.special:
        problems.append(f"{total.special:,} ids of pad, EOS or unknown")
    if tables:  # a space that opens a shard counts unless the shard before ended in a control token
        total = total._replace(text_bytes=total.text_bytes + sum(
            int(tables.leading_space[b.first] and not tables.boundary[a.last]) for a, b in itertools.pairwise(shards)))
    claims = {"documents": total.documents, "tokens": total.tokens} | ({"bytes": total.text_bytes} if tables else {})
    said = manifest.get(split) or ({"documents": VAL_DOCUMENTS} if split == "val" else {})
    problems += [f"{'the manifest says' if split in manifest else 'the official split has'} {said[key]:,} {key}"
                 for key, count in claims.items() if said.get(key, count) != count]
    found = ", ".join(f"{count:,} {key}" for key, count in claims.items()) + f" in {len(names)} file(s)"
    return [*rows, Check(split, found, "; ".join(problems))], total


def together(
    directory: Path, manifest: Mapping[str, Any], totals: Mapping[str, Shard], tokenizer: Any, transform: str
) -> list[Check]:
    """Rows that need the whole validation split: round trip, bytes, overlap with training."""
    val = TokenStream(directory, "fineweb_val")
    decoded_bytes, number, odd = 0, 0, []
    operators = caseops(transform)
    side = TokenStream(directory, "fineweb_val_bytes") if operators else None
    if side and [len(shard) for shard in side.shards] != [len(shard) for shard in val.shards]:
        return [Check("side file", f"{len(side):,} entries", f"validation has {len(val):,} tokens")]
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
    rows = [Check("round trip", f"{number - len(odd):,} of {number:,} validation documents",
                  f"document {odd[0]} decodes to a text that encodes to other ids" if odd else "")]
    if operators:
        counted = sum(int(shard.sum(dtype=np.int64)) for shard in side.shards)
        on_bos = sum(int(np.count_nonzero(b[a == BOS_ID])) for a, b in zip(val.shards, side.shards))
        # Bytes before normalisation, which takes a little; the known mistakes add a sixth.
        wrong = f"{on_bos:,} BOS have bytes" if on_bos else \
            "they differ by more than 1%" if abs(counted / decoded_bytes - 1) > 0.01 else ""
        if not wrong and manifest.get("val", {}).get("bytes", counted) != counted:
            wrong = f"the manifest says {manifest['val']['bytes']:,}"
        rows.append(Check("bytes", f"{counted:,} in the side file, {decoded_bytes:,} decoded", wrong))
    else:
        counted = totals["val"].text_bytes
        rows.append(Check("bytes", f"{counted:,} by the score's table, {decoded_bytes:,} decoded",
                          "they differ: the score would divide by wrong bytes" if counted != decoded_bytes else ""))
    ratio, wrong = counted / max(1, len(val) - number), ""
    if manifest.get("source", {}).get("kind", "hub") == "hub" and number == VAL_DOCUMENTS:
        known = 1 / TOKENS_PER_BYTE.get(dataset_name(bool(operators), tokenizer.vocab_size()), math.inf)
        if abs(counted / VAL_BYTES - 1) > 1e-4:
            wrong = f"the official validation text has {VAL_BYTES:,} bytes"
        elif known and abs(counted / len(val) / known - 1) > 0.005:
            wrong = f"the records have {known:.4f}"
        ratio = counted / len(val)
    rows.append(Check("bytes per token", f"{ratio:.4f}", wrong))
    keys, lengths = save_keys(directory)
    if not totals["train"].tokens:
        return rows
    shared = np.isin(keys, TokenStream(directory, "fineweb_train").document_keys()[0])
    share = lengths[shared].sum() / max(1, lengths.sum())
    rows.append(Check("validation in training", f"{int(shared.sum()):,} documents, {share:.2%} of the tokens",
                      f"at most {MAX_SHARED:.0%} may be" if share > MAX_SHARED else ""))
    return rows


def save_keys(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """(key, length) of each validation document, which it leaves in val_keys.u64: by them training sees whether it
    has a validation document without opening validation."""
    keys, lengths = TokenStream(directory, "fineweb_val").document_keys()
    new = directory / "val_keys.new"
    with contextlib.suppress(OSError):  # a folder that may only be read can be verified, too
        np.stack([keys, lengths.astype(np.uint64)], axis=1).astype("<u8").tofile(new)
        os.replace(new, directory / "val_keys.u64")
    return keys, lengths


def report(directory: Path, rows: Sequence[Check]) -> int:
    """Prints the table. Returns 0 if all is well, 1 if not."""
    width = max(len(row.what) for row in rows)
    for row in rows:
        problem = f"  ({row.problem})" if row.problem else ""
        print(f"{'FAIL' if row.problem else 'ok':<5}{row.what:<{width}}  {row.found}{problem}")
    failures = sum(1 for row in rows if row.problem)
    print(f"{shown(directory)}: {f'{failures} of {len(rows)} checks failed' if failures else 'all checks hold'}")
    return 1 if failures else 0
