"""
verify.py -- everything a referee would ask of a dataset, recomputed from its files: the verb `verify`.

Any folder in the challenge's layout will do, with or without a manifest of ours. Shards are read a piece at a time, so
that memory does not depend on their number. This is the one place that looks for validation documents in the training
shards; the count is left in verified.json, which training reads.
"""
from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.caseops import TRANSFORMS
from data.documents import one_line, require
from tools.common import ToolError
from tools.evidence import OFFICIAL, TEXT_BYTES, dataset_name
from train_gpt import (
    BOS_ID,
    SHARD_HEADER_BYTES,
    TokenBytes,
    UserError,
    file_sha256,
    load_sentencepiece,
    open_shard,
    shards_sha256,
)
from train_gpt import manifest as read_manifest

FORMAT = 1  # of manifest.json
VAL_DOCUMENTS = 50_000
"""Of the official validation split."""
MAX_SHARED = 0.01
"""Largest share of validation tokens in documents that training has, too. Web text repeats itself a little by nature;
the leaks that undid records had 0.8 of them."""
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
    sum: int = 0  # of all values: the bytes, in a side file
    problem: str = ""


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


def shards(directory: Path, split: str) -> list[Path]:
    """The shards of a split (train, val, val_bytes) in order."""
    return sorted(path for path in directory.glob(f"fineweb_{split}_*.bin")
                  if split == "val_bytes" or "_bytes_" not in path.name)


def pieces(paths: Iterable[Path]) -> Iterator[np.ndarray]:
    """Ids of shards in order, BATCH_IDS at a time; not through a memory map, whose pages count as the process's own."""
    for path in paths:
        tokens = (path.stat().st_size - SHARD_HEADER_BYTES) // 2
        for start in range(0, tokens, BATCH_IDS):
            yield np.fromfile(path, "<u2", BATCH_IDS, offset=SHARD_HEADER_BYTES + 2 * start)


def documents(paths: Iterable[Path]) -> Iterator[np.ndarray]:
    """Ids of each document in shards without its BOS; a document may run on from one shard into the next."""
    parts: list[np.ndarray] = []  # of the document that the next piece goes on with; none before the first BOS
    for ids in itertools.chain(pieces(paths), [np.array([BOS_ID], "<u2")]):  # a BOS ends the last document
        rest, *begun = np.split(ids, np.flatnonzero(ids == BOS_ID))
        parts = parts and [*parts, rest]
        for part in begun:
            if parts:
                yield np.concatenate(parts)[1:]
            parts = [part]


def check_leaks(directory: Path) -> Check:
    """Count the validation documents that are in training, too, and leave the count in verified.json."""
    def digests(split: str) -> Iterator[tuple[bytes, int]]:
        return ((hashlib.blake2b(ids.tobytes(), digest_size=16).digest(), 1 + len(ids))
                for ids in documents(shards(directory, split)))
    val = list(digests("val"))
    every = {digest for digest, _ in val}
    trained_on = {digest for digest, _ in digests("train") if digest in every}
    shared = [length for digest, length in val if digest in trained_on]
    share = sum(shared) / max(1, sum(length for _, length in val))
    with contextlib.suppress(OSError):  # a folder that may only be read can be verified, too
        write_json(directory / "verified.json", {
            "shards_sha256": shards_sha256(directory), "val_documents": len(val), "shared_documents": len(shared),
            "shared_share": share})
    wrong = f"at most {MAX_SHARED:.0%} may be" if share > MAX_SHARED else ""
    return Check("validation in training", f"{len(shared):,} documents, {share:.2%} of the tokens", wrong)


def verify(directory: Path, model: Path | None = None) -> list[Check]:
    """Check everything that can be checked of a dataset; leave verified.json in it once its leaks are counted.

    `model` is its tokenizer; None: the manifest's. ToolError if there is nothing to look at or the manifest is damaged.
    """
    require(directory.is_dir(), f"{directory}: no such folder")
    manifest = read_manifest(directory)
    require(model is not None or bool(manifest), f"{directory}: no manifest.json; give the tokenizer with --tokenizer")
    with contextlib.suppress(OSError):
        (directory / "verified.json").unlink()
    try:
        return look(directory, manifest, model or Path(os.path.normpath(directory / manifest["tokenizer"]["path"])))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ToolError(f"{directory / 'manifest.json'}: damaged ({type(error).__name__}: {one_line(error)});"
                        " remove it, and fetch or prepare the dataset again") from error


def damage(directory: Path, model: Path | None = None) -> str:
    """The first problem that `verify` finds, in words; "" if all checks hold."""
    return next((f"{c.what}: {c.result} ({c.problem})" for c in verify(directory, model) if c.problem), "")


def look(directory: Path, manifest: Mapping[str, Any], model: Path) -> list[Check]:
    """All checks: tokenizer, shards of each split, then what needs the whole of validation."""
    label = f"tokenizer {model.name}"
    if not model.is_file():
        return [Check(label, str(model), "missing; give it with --tokenizer MODEL")]
    if manifest and file_sha256(model) != manifest["tokenizer"]["sha256"]:
        return [Check(label, str(model), "SHA-256 is not the manifest's")]
    tokenizer = load_tokenizer(model)
    size, wrong = tokenizer.vocab_size(), ""
    if tokenizer.is_unknown(tokenizer.piece_to_id("\u2581")):
        # Without it SentencePiece spells a space before an unknown word in bytes, and the table counts too few.
        wrong = "no piece for the space alone: the score's table would miss spaces"
    checks, totals = [Check(label, f"{size:,} pieces", wrong)], {}
    transform = manifest.get("transform", "caseops_v1" if shards(directory, "val_bytes") else "none")
    splits = {"train": size, "val": size}
    if transform != "none":
        splits["val_bytes"] = 1 << 16
    for split, ids_below in splits.items():
        rows, totals[split] = check_split(directory, split, manifest.get(split, {}), ids_below)
        checks += rows
    # What is wrong with a file ends it here; a wrong count does not.
    if totals["val"].tokens and not any(row.problem for row in checks[1:] if row.what not in totals):
        checks += check_validation(directory, manifest, tokenizer, transform, totals)
        if totals["train"].tokens:
            checks.append(check_leaks(directory))
    return checks


def check_split(directory: Path, split: str, said: Mapping[str, Any], ids_below: int) -> tuple[list[Check], Shard]:
    """A row for each bad shard of a split, one for all of them; and their sum. `said` is the manifest's entry."""
    listed = {entry["name"]: entry for entry in said.get("files", ())}
    names = {path.name for path in shards(directory, split)}
    problems = [f"{name} is not in the manifest" for name in sorted(names - set(listed)) if listed]
    names = sorted(names | set(listed))
    if not names:
        return [Check(split, "", f"no fineweb_{split}_*.bin in {directory}")], Shard()
    with ThreadPoolExecutor() as pool:  # the work is in numpy and hashlib, which release the GIL
        each = list(pool.map(lambda name: examine(directory / name, listed.get(name), ids_below), names))
    checks = [Check(name, "", shard.problem) for name, shard in zip(names, each) if shard.problem]
    total = Shard(*(sum(column) for column in list(zip(*each))[:4]))
    counts = {"documents": total.documents, "tokens": total.tokens}
    if split == "val_bytes":
        counts = {"entries": total.tokens}
    elif total.special:
        problems.append(f"{total.special:,} ids of pad, EOS or unknown")
    elif not checks and next(pieces([directory / names[0]]))[0] != BOS_ID:
        problems.append(f"{names[0]} does not start with BOS {BOS_ID}")
    if split == "val" and not said:
        said = {"documents": VAL_DOCUMENTS}
    problems += [f"expected {said[key]:,} {key}" for key, count in counts.items() if said.get(key, count) != count]
    result = ", ".join(f"{count:,} {key}" for key, count in counts.items())
    return [*checks, Check(split, f"{result} in {len(names)} file(s)", "; ".join(problems))], total


def examine(path: Path, entry: Mapping[str, Any] | None, ids_below: int) -> Shard:
    """Header, size, ids and, where the manifest lists the file, SHA-256."""
    try:
        tokens = len(open_shard(path))
    except (OSError, UserError) as error:
        return Shard(problem=str(error).removeprefix(f"{path}: "))
    if not tokens:
        return Shard(problem="no tokens")
    if entry and "sha256" in entry and file_sha256(path) != entry["sha256"]:
        return Shard(problem="SHA-256 is not the manifest's")
    starts = special = total = 0
    for ids in pieces([path]):
        if (highest := int(ids.max())) >= ids_below:
            return Shard(problem=f"id {highest} is outside the vocabulary of {ids_below}")
        starts += int(np.count_nonzero(ids == BOS_ID))
        special += int(np.count_nonzero((ids < 4) & (ids != BOS_ID)))
        total += int(ids.sum(dtype=np.int64))
    return Shard(tokens, starts, special, total)


def check_validation(directory: Path, manifest: Mapping[str, Any], tokenizer: Any, transform: str,
                     totals: Mapping[str, Shard]) -> list[Check]:
    """Rows that need all of validation: round trip, and the bytes that the score divides by."""
    operators, table = TRANSFORMS[transform], TokenBytes.build(tokenizer)
    decoded_bytes, counted, number, odd = 0, 0, 0, []
    stream = documents(shards(directory, "val"))
    while batch := list(itertools.islice(stream, 256)):
        counted += sum(int(table.of_targets(np.append(BOS_ID, ids)).sum(dtype=np.int64)) for ids in batch)
        batch = [ids.tolist() for ids in batch]
        texts = tokenizer.decode(batch, num_threads=-1)
        again = tokenizer.encode(texts, num_threads=-1)
        for ids, text, second in zip(batch, texts, again):
            try:
                text = operators.decode(text)
            except ValueError:
                second = None  # not a transformed text
            if second != ids:
                odd.append(number)
            decoded_bytes, number = decoded_bytes + len(text.encode()), number + 1
    wrong = f"document {odd[0]} decodes to a text that encodes to other ids" if odd else ""
    checks = [Check("round trip", f"{number - len(odd):,} of {number:,} validation documents", wrong)]
    source, wrong, tokens = "by the score's table", "", totals["val"].tokens
    if operators.operators:
        source, counted = "in the side file", totals["val_bytes"].sum
        val, side = shards(directory, "val"), shards(directory, "val_bytes")
        if [path.stat().st_size for path in val] != [path.stat().st_size for path in side]:
            wrong = f"{totals['val_bytes'].tokens:,} entries for {tokens:,} tokens"
        elif any(sizes[ids == BOS_ID].any() for ids, sizes in zip(pieces(val), pieces(side))):
            wrong = "a BOS has bytes"
        elif abs(counted - decoded_bytes) > 0.01 * operators.raw_bytes * decoded_bytes:
            # Normalisation takes a little; the known mistakes add a sixth.
            wrong = "they differ by more than 1%" if operators.raw_bytes else "they differ"
    elif counted != decoded_bytes:
        wrong = "they differ: the score would divide by wrong bytes"
    said = manifest.get("val", {}).get("bytes", counted)
    official = manifest.get("source", {}).get("kind", "hub") == "hub" and number == VAL_DOCUMENTS
    if said != counted:
        wrong = wrong or f"the manifest says {said:,} bytes"
    targets = max(1, tokens - 1)
    close = (round(0.9999 * TEXT_BYTES), round(1.0001 * TEXT_BYTES))  # what another tokenizer normalises otherwise
    known = OFFICIAL.get(dataset_name(transform != "none", tokenizer.vocab_size()), ((0, targets), close))
    if official and not all(low <= count <= high for count, (low, high) in zip((targets, counted), known)):
        wrong = wrong or f"the official validation text has {TEXT_BYTES:,} bytes; of targets and bytes expected {known}"
    ratio = f"{counted:,} / {targets:,} targets (all ids but the first) = {counted / targets:.4f}"
    return [*checks, Check("bytes", f"{counted:,} {source}, {decoded_bytes:,} decoded; {ratio}", wrong)]


def table(directory: Path, checks: list[Check]) -> str:
    """The table of `verify`, for people."""
    width = max(len(row.what) for row in checks)
    lines = []
    for row in checks:
        mark, problem = ("FAIL", f"  ({row.problem})") if row.problem else ("ok", "")
        lines.append(f"{mark:<5}{row.what:<{width}}  {row.result}{problem}")
    failures = sum(1 for row in checks if row.problem)
    verdict = f"{failures} of {len(checks)} checks failed" if failures else "all checks hold"
    return "\n".join([*lines, f"{directory}: {verdict}"])
