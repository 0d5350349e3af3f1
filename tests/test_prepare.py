"""
data/prepare.py: the same text gives the same bytes, no text is on two sides, the manifest is true.

Offline; the text is a few modules of the running Python, cut into their top-level definitions.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import lzma
import shutil
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import brotli
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from data import documents
import prepare
from data import text as tx
from data import verify
from data.text import Options

import train_gpt as tg
from train_gpt import UserError

VOCAB = 512
MULTI_BYTE = [
    "Die Gr\u00f6\u00dfe des Wortschatzes bestimmt, wie viele Bytes ein Token im Mittel tr\u00e4gt.",
    "\u03a0\u03ac\u03bd\u03c4\u03b1 \u1fe5\u03b5\u1fd6 \u03ba\u03b1\u1f76 \u03bf\u1f50\u03b4\u1f72\u03bd",
    "\u8a00\u8a9e\u30e2\u30c7\u30eb\u306f\u6b21\u306e\u5358\u8a9e\u3092\u4e88\u6e2c\u3059\u308b",
    "rocket \U0001f680, family \U0001f468\u200d\U0001f469\u200d\U0001f467, \u00bd, \ufb01n, e\u0301 combined",
    "tabs\tand\r\nline ends\n\n\nand   many    spaces \u2581 and a mark \u2585 or two \u2585",
]


def make_texts() -> list[str]:
    """About 200 different documents."""
    import argparse
    import shlex
    import textwrap
    import zipfile

    modules = [Path(module.__file__).read_text("utf-8") for module in (argparse, shlex, textwrap, zipfile)]
    parts = [part.strip() for module in modules for part in module.split("\n\n")]
    years = "Years: " + ", ".join(str(year) for year in range(1900, 2030))
    return [*dict.fromkeys(part for part in parts if len(part) > 200)][:199] + [years] + MULTI_BYTE


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts()


@pytest.fixture(scope="session")
def model(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer, trained once for all tests."""
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(tx.train_tokenizer(texts, VOCAB))
    return path


@pytest.fixture
def corpus(texts: list[str], tmp_path: Path) -> Path:
    """The documents as a .jsonl file."""
    return write_jsonl(tmp_path / "corpus.jsonl", texts)


def write_jsonl(path: Path, texts: list[str], text_field: str = "text") -> Path:
    rows = ({text_field: text, "id": i} for i, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(out: Path, inputs: list[Path], val_inputs: Sequence[Path] = (), **changes: object) -> tx.Result:
    """Runs `prepare` on files with options that suit small texts."""
    share = None if val_inputs else 0.1
    options = {"name": "t", "out": out, "vocab_size": VOCAB, "val_share": share, "workers": 1, **changes}
    return tx.prepare(tx.file_source(inputs, val_inputs, "text"), Options(**options))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def shards(result: tx.Result) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in result.directory.glob("*.bin")}


def stored_documents(result: tx.Result, side: str) -> list[list[int]]:
    """The ids of each document of one side without its BOS, read without prepare's own reader."""
    paths = [result.directory / entry["name"] for entry in result.manifest[side]["files"]]
    raw = b"".join(path.read_bytes()[1024:] for path in paths)
    ids = struct.unpack(f"<{len(raw) // 2}H", raw)
    starts = [i for i, token in enumerate(ids) if token == 1]
    assert starts[0] == 0
    return [list(ids[a + 1 : b]) for a, b in zip(starts, [*starts[1:], len(ids)])]


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status and stderr of a command line."""
    status = prepare.main([str(argument) for argument in arguments])
    return status, capsys.readouterr().err


# -- the same text gives the same bytes -------------------------------------------------------------


def test_bytes_do_not_depend_on_the_number_of_workers(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tx, "BATCH_BYTES", 4000)  # dozens of batches, so that results can overtake
    trees = []
    for workers in (1, 2):
        made(tmp_path / f"out{workers}", [corpus], workers=workers, shard_tokens=3000)
        trees.append(tree(tmp_path / f"out{workers}"))
    assert len(trees[0]) > 10
    assert trees[0] == trees[1]


def test_bytes_do_not_depend_on_the_order_of_the_input(texts, corpus, tmp_path):
    backwards = write_jsonl(tmp_path / "backwards.jsonl", texts[::-1])
    one, other = made(tmp_path / "a", [corpus]), made(tmp_path / "b", [backwards])
    assert shards(one) == shards(other)
    assert one.model.read_bytes() == other.model.read_bytes()
    write_jsonl(corpus, texts[::-1])
    assert made(tmp_path / "a", [corpus]).reused


def test_the_order_of_the_input_counts_where_it_was_asked_for(texts, corpus, model, tmp_path):
    made(tmp_path / "a", [corpus], tokenizer=model, order="input")
    write_jsonl(corpus, texts[::-1])
    with pytest.raises(UserError, match="documents_sha256 differs"):
        made(tmp_path / "a", [corpus], tokenizer=model, order="input")


def test_documents_are_shuffled_unless_the_order_of_the_input_is_asked_for(texts, corpus, model, tmp_path):
    tokenizer = verify.load_tokenizer(model)
    for order in ("hash", "input"):
        result = made(tmp_path / order, [corpus], tokenizer=model, order=order)
        stored = [ids for side in documents.SIDES for ids in stored_documents(result, side)]
        by_side = sorted(texts, key=lambda text: documents.split_side(text, 0, 0.1))  # stable: train, then val
        in_order = [tokenizer.encode(text) for text in by_side]
        assert sorted(stored) == sorted(in_order)
        assert (stored == in_order) == (order == "input")


def test_another_seed_draws_other_documents(corpus, model, tmp_path):
    one = made(tmp_path / "a", [corpus], tokenizer=model, seed=0)
    other = made(tmp_path / "b", [corpus], tokenizer=model, seed=1)
    assert stored_documents(one, "val") != stored_documents(other, "val")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "folder"])
def test_every_format_gives_the_same_documents(kind, texts, tmp_path):
    path = tmp_path / f"corpus.{kind}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if kind == "jsonl":
        path.write_bytes(lines.replace(b"\n", b"\n\n"))  # blank lines are nothing
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "jsonl.zst":  # two frames, as parallel compressors write them
        half = len(lines) // 2
        path.write_bytes(b"".join(zstandard.compress(part) for part in (lines[:half], lines[half:])))
    elif kind == "parquet":
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=50)
    else:
        path = tmp_path / "folder"
        (path / "deep" / ".hidden").mkdir(parents=True)
        for i, text in enumerate(texts):
            (path / "deep" / f"{i:04d}.txt").write_bytes(text.encode())
        (path / "notes.md").write_text("another kind of file")
        (path / "deep" / ".hidden" / "x.txt").write_text("hidden")
    inputs = sorted(path.rglob("????.txt")) if kind == "txt" else [path]
    rows = list(documents.file_rows(documents.input_files(inputs), "text"))
    assert [documents.document(row, "text") for row in rows] == [(text, False) for text in texts]
    positions = [row.position for row in rows]
    size = sum(file.stat().st_size for file in documents.input_files(inputs))
    assert positions == sorted(positions) and 0.99 * size < positions[-1] <= size


# -- no text is on two sides ------------------------------------------------------------------------


def test_the_side_is_a_function_of_the_text(texts):
    before = {text: documents.split_side(text, 0, 0.3) for text in texts}
    assert set(before.values()) == {"train", "val"}
    for text in reversed(texts):
        assert documents.split_side(f"\n  {text}\t", 0, 0.3) == before[text]
    many = [documents.split_side(f"document {i}", 0, 0.1) for i in range(4000)]
    assert 340 < many.count("val") < 460  # 400 +- 3 standard deviations
    more = [documents.split_side(f"document {i}", 0, 0.2) for i in range(4000)]
    assert all(b == "val" for a, b in zip(many, more) if a == "val")


def test_duplicates_and_empty_documents_are_dropped_and_counted(texts, tmp_path):
    padded = [*texts, *(f"  {text}\n" for text in texts[:7]), "", " \n\t ", "\u200b\u200b"]
    result = made(tmp_path / "out", [write_jsonl(tmp_path / "c.jsonl", padded)])
    dropped = {"duplicate": 7, "empty": 2, "empty_after_normalisation": 1}
    assert result.manifest["source"]["dropped"] == dropped
    assert sum(result.manifest[side]["documents"] for side in documents.SIDES) == len(texts)
    plain = made(tmp_path / "plain", [write_jsonl(tmp_path / "c.jsonl", texts)])
    assert shards(result) == shards(plain)
    assert result.model.read_bytes() == plain.model.read_bytes()
    zero_width = len("\u200b\u200b".encode())
    sizes = [sum(made_.manifest["source"]["raw_bytes"].values()) for made_ in (result, plain)]
    assert sizes[0] == sizes[1] + zero_width


def test_validation_files_are_kept_apart(texts, model, tmp_path):
    train, val = write_jsonl(tmp_path / "a.jsonl", texts[20:]), write_jsonl(tmp_path / "b.jsonl", texts[:20])
    result = made(tmp_path / "out", [train], [val], tokenizer=model)
    tokenizer = verify.load_tokenizer(model)
    assert sorted(stored_documents(result, "val")) == sorted(tokenizer.encode(text) for text in texts[:20])
    assert sorted(stored_documents(result, "train")) == sorted(tokenizer.encode(text) for text in texts[20:])
    assert result.manifest["split"]["method"] == "files"


def test_text_on_both_sides_is_refused(texts, tmp_path, capsys):
    train = write_jsonl(tmp_path / "a.jsonl", texts)
    val = write_jsonl(tmp_path / "b.jsonl", ["another text", f" {texts[3]}\n", texts[9]])
    out = tmp_path / "out"
    status, error = command(capsys, "text", train, "--val-files", val, "--name", "t", "--out", out)
    assert status == 2
    assert "2 documents are in both" in error and "b.jsonl:2" in error and error.count("\n") == 1
    assert tree(tmp_path / "out") == {}


# -- shards -----------------------------------------------------------------------------------------


def test_shards_have_the_published_header(tmp_path):
    parts = [np.array(ids, np.uint16) for ids in ([1, 0], [65535, 256, 7])]
    files = tx.write_split(tmp_path, "train", parts, num_tokens=5, shard_tokens=3)
    raw = [(tmp_path / entry["name"]).read_bytes() for entry in files]
    assert [data[:1024] for data in raw] == [struct.pack("<256i", 20240520, 1, n, *[0] * 253) for n in (3, 2)]
    assert [data[1024:] for data in raw] == [struct.pack("<3H", 1, 0, 65535), struct.pack("<2H", 256, 7)]
    assert [entry["sha256"] for entry in files] == [hashlib.sha256(data).hexdigest() for data in raw]


def test_documents_cross_from_shard_to_shard(corpus, model, tmp_path):
    whole = made(tmp_path / "a", [corpus], tokenizer=model)
    cut = made(tmp_path / "b", [corpus], tokenizer=model, shard_tokens=777)
    for side in documents.SIDES:
        sizes = [entry["tokens"] for entry in cut.manifest[side]["files"]]
        assert sizes[:-1] == [777] * (len(sizes) - 1) and 0 < sizes[-1] <= 777
        assert stored_documents(cut, side) == stored_documents(whole, side)
    names = [entry["name"] for entry in cut.manifest["train"]["files"]]
    assert names[:2] == ["fineweb_train_000000.bin", "fineweb_train_000001.bin"]


# -- tokenizer --------------------------------------------------------------------------------------


def test_tokenizer_has_the_challenges_settings(texts, model):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert [tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()] == [0, 1, 2, 3]
    assert tokenizer.vocab_size() == VOCAB
    assert sum(map(tokenizer.is_byte, range(VOCAB))) == 256
    assert tokenizer.encode("word", out_type=str)[0][0] != "\u2581"  # no dummy prefix
    assert all(sum(c.isdigit() for c in tokenizer.id_to_piece(i)) <= 1 for i in range(260, VOCAB))
    assert all(map(tokenizer.is_byte, tokenizer.encode("\u8a00")))  # rare: beyond the coverage of 0.999
    normaliser = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    tables = tg.TokenBytes.build(tokenizer)
    for text in texts:
        ids = tokenizer.encode(documents.clean(text))
        normalised = normaliser.normalize(documents.clean(text)).replace("\u2581", " ").strip()
        assert tokenizer.decode(ids) == normalised
        assert 3 not in ids
        # The score's table counts the same bytes without decoding.
        assert tables.of_targets(np.array([documents.BOS, *ids])).sum() == len(normalised.encode())


def test_a_table_that_disagrees_with_decoding_is_refused(corpus, model, tmp_path, monkeypatch):
    """The mistake of a dozen submissions: the leading space counted with the piece and again by its flag."""
    class CountedTwice(tg.TokenBytes):
        @classmethod
        def build(cls, sp: object) -> tg.TokenBytes:
            right = tg.TokenBytes.build(sp)
            return tg.TokenBytes(right.base + right.leading_space, right.leading_space, right.boundary)

    monkeypatch.setattr(verify, "TokenBytes", CountedTwice)
    with pytest.raises(UserError, match=r"the manifest says [\d,]+ bytes"):
        made(tmp_path / "out", [corpus], tokenizer=model)
    assert tree(tmp_path / "out") == {}


def test_tokenizer_sees_every_document(texts):
    """SentencePiece drops sentences that hold its own mark U+2585, or that are too long, without a word."""
    marked = tx.train_tokenizer([f"\u2585{text}\u2585" for text in texts], VOCAB)
    assert marked == tx.train_tokenizer([f" {text} ".replace("\u2585", " ") for text in texts], VOCAB)
    long = " ".join(texts)
    assert len(long) > 50_000  # SentencePiece's own limit is 4,192
    tx.train_tokenizer([long], VOCAB)


def test_tokenizer_is_trained_on_training_documents_only(texts, corpus, tmp_path):
    result = made(tmp_path / "out", [corpus])
    train = [text for text in texts if documents.split_side(text, 0, 0.1) == "train"]
    train.sort(key=lambda text: documents.draw(documents.content_hash(documents.clean(text)), 0)[1])
    assert result.model.read_bytes() == tx.train_tokenizer(train, VOCAB)


def test_tokenizer_sample_is_bounded_and_drawn_by_hash(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(tx, "BATCH_BYTES", 4000)
    samples = []
    for order in (texts, texts[::-1], sorted(texts, key=len), [*texts, *texts]):
        source = tx.file_source([write_jsonl(tmp_path / "c.jsonl", order)], [], "text")
        options = Options(name="t", val_share=0.1, sample_bytes=20_000, workers=1)
        samples.append(tx.scan(source, options, tmp_path).sample)
    assert samples[0] == samples[1] == samples[2] == samples[3]
    assert 15_000 < sum(len(text.encode()) for text in samples[0]) <= 20_000


def test_what_was_too_much_for_the_sample_stays_out_whatever_comes_later():
    entries = [(1, b"a", "x" * 6), (3, b"b", "y" * 6), (5, b"c", "zz"), (1, b"a", "x" * 6)]
    for order in itertools.permutations(entries):
        sample = tx.Sample(10)
        for entry in order:
            sample.add(*entry)
        assert sample.texts() == ["x" * 6], order


def test_vocab_file_is_the_one_that_sentencepiece_writes(texts, model, tmp_path):
    path = tmp_path / "reference"
    sentences = (text.replace("\u2585", " ") for text in texts)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_prefix=str(path),
        vocab_size=VOCAB,
        minloglevel=2,
        **tx.TRAINING,
    )
    listing = tx.vocab_listing(verify.load_tokenizer(model))
    assert listing == path.with_suffix(".vocab").read_text("utf-8")


def test_given_tokenizer_is_copied_or_left_where_it_belongs(corpus, model, tmp_path):
    copied = made(tmp_path / "a", [corpus], tokenizer=model)
    assert copied.model == tmp_path / "a" / "tokenizers" / f"t_{VOCAB}_bpe.model"
    assert copied.model.read_bytes() == model.read_bytes()
    shutil.copytree(model.parent, tmp_path / "b" / "tokenizers")
    there = made(tmp_path / "b", [corpus], tokenizer=tmp_path / "b" / "tokenizers" / model.name)
    assert there.manifest["tokenizer"]["path"] == f"../../tokenizers/{model.name}"
    assert [path.name for path in (tmp_path / "b" / "tokenizers").iterdir()] == [model.name]


# -- the manifest -----------------------------------------------------------------------------------


def test_manifest_says_what_is_there(texts, corpus, tmp_path):
    result = made(tmp_path / "out", [corpus], shard_tokens=4000)
    manifest = json.loads((result.directory / "manifest.json").read_text())
    assert manifest == result.manifest
    assert result.directory == tmp_path / "out" / "datasets" / f"t_sp{VOCAB}"
    head = [manifest[key] for key in ("format", "name", "vocab_size", "bos_id")]
    assert head == [1, "t", VOCAB, 1]
    model = result.directory / manifest["tokenizer"]["path"]
    assert hashlib.sha256(model.read_bytes()).hexdigest() == manifest["tokenizer"]["sha256"]
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    listed = set()
    for side in documents.SIDES:
        for entry in manifest[side]["files"]:
            raw = (result.directory / entry["name"]).read_bytes()
            assert hashlib.sha256(raw).hexdigest() == entry["sha256"]
            assert len(raw) == 1024 + 2 * entry["tokens"]
            listed.add(entry["name"])
        stored = stored_documents(result, side)
        decoded = [tokenizer.decode(ids) for ids in stored]
        assert manifest[side]["documents"] == len(stored)
        assert manifest[side]["tokens"] == sum(len(ids) + 1 for ids in stored)
        assert manifest[side]["bytes"] == sum(len(text.encode()) for text in decoded)
        raw_bytes = sum(len(text.encode()) for text in texts if documents.split_side(text, 0, 0.1) == side)
        assert manifest["source"]["raw_bytes"][side] == raw_bytes
    assert listed == {path.name for path in result.directory.glob("*.bin")}
    val = "\n".join(decoded).encode()
    for name, size in {
        "xz -9e": len(lzma.compress(val, preset=9 | lzma.PRESET_EXTREME)),
        "brotli -11": len(brotli.compress(val, quality=11, lgwin=24)),
    }.items():
        bits = round(8 * size / manifest["val"]["bytes"], 6)
        assert manifest["compressors"][name] == {"bytes": size, "bits_per_byte": bits}
    assert str(tmp_path) not in json.dumps(manifest)


def test_compressors_are_left_out_for_long_validation_text(corpus, model, tmp_path, monkeypatch):
    monkeypatch.setattr(tx, "MAX_COMPRESSED_TEXT_BYTES", 1000)
    assert made(tmp_path / "out", [corpus], tokenizer=model).manifest["compressors"] is None


def change_id(result: tx.Result) -> None:
    with (result.directory / "fineweb_val_000000.bin").open("r+b") as file:
        file.seek(1024 + 20)
        file.write(struct.pack("<H", VOCAB))


def change_manifest(result: tx.Result) -> None:
    path = result.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["val"]["bytes"] += 1
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda r: (r.directory / "fineweb_val_000000.bin").unlink(), "missing"),
        (lambda r: (r.directory / "fineweb_val_000007.bin").touch(), "fineweb_val_000007.bin is not in"),
        (change_id, f"id {VOCAB} is outside the vocabulary"),
        (change_manifest, " bytes)"),
        (lambda r: r.model.write_bytes(r.model.read_bytes() + b"\0"), "SHA-256"),
        (lambda r: r.model.unlink(), "missing"),
    ],
)
def test_verify_finds_damage(damage, words, corpus, model, tmp_path, capsys):
    result = made(tmp_path / "out", [corpus], tokenizer=model)
    assert prepare.main(["verify", str(result.directory)]) == 0
    assert "FAIL" not in capsys.readouterr().out
    damage(result)
    assert prepare.main(["verify", str(result.directory)]) == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert any(words in line for line in failures), failures
    with pytest.raises(UserError, match="--force"):  # a damaged dataset is not used again
        made(tmp_path / "out", [corpus], tokenizer=model)


def test_verify_finds_a_changed_file_of_the_right_size(corpus, model, tmp_path):
    result = made(tmp_path / "out", [corpus], tokenizer=model)
    path = result.directory / "fineweb_train_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[1024 + 20 : 1024 + 24] = raw[1024 + 22 : 1024 + 24] + raw[1024 + 20 : 1024 + 22]
    path.write_bytes(raw)
    assert [row.what for row in verify.verify(result.directory) if row.problem] == [path.name]


# -- what is there is used again, and never replaced unasked ----------------------------------------


def test_second_call_uses_what_is_there(corpus, tmp_path, monkeypatch, capsys):
    first = made(tmp_path / "out", [corpus])
    before = tree(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(tx, "train_tokenizer", lambda *_: pytest.fail("trained again"))
        patch.setattr(tx, "encode", lambda *_: pytest.fail("encoded again"))
        second = made(tmp_path / "out", [corpus])
    assert second.reused and not first.reused
    assert second[:3] == first[:3]
    assert "used again" in tx.summary(second)
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize(
    "changes", [{"seed": 5}, {"val_share": 0.2}, {"order": "input"}, {"shard_tokens": 999}], ids=str
)
def test_a_dataset_of_other_options_is_not_replaced(changes, corpus, model, tmp_path):
    made(tmp_path / "out", [corpus], tokenizer=model)
    before = tree(tmp_path / "out")
    ((option, value),) = changes.items()
    with pytest.raises(UserError, match=f"exists and is not .*{option} is .*, not {value!r}.*--force"):
        made(tmp_path / "out", [corpus], tokenizer=model, **changes)
    assert tree(tmp_path / "out") == before
    replaced = made(tmp_path / "out", [corpus], tokenizer=model, force=True, **changes)
    fresh = made(tmp_path / "fresh", [corpus], tokenizer=model, **changes)
    assert not replaced.reused
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh") and fresh.manifest == replaced.manifest


def test_a_dataset_of_another_text_or_tokenizer_is_not_replaced(texts, corpus, model, tmp_path):
    made(tmp_path / "out", [corpus], tokenizer=model)
    write_jsonl(corpus, [*texts[:-1], texts[-1] + "."])
    with pytest.raises(UserError, match="documents_sha256 differs"):
        made(tmp_path / "out", [corpus], tokenizer=model)
    write_jsonl(corpus, texts)
    with pytest.raises(UserError, match="tokenizer.training differs"):
        made(tmp_path / "out", [corpus])


def test_foreign_folders_and_tokenizers_are_never_replaced(corpus, model, tmp_path):
    folder = tmp_path / "out" / "datasets" / f"t_sp{VOCAB}"
    folder.mkdir(parents=True)
    (folder / "fineweb_train_000000.bin").write_bytes(b"downloaded")
    with pytest.raises(UserError, match="was not made by prepare"):
        made(tmp_path / "out", [corpus], tokenizer=model, force=True)
    (tmp_path / "out" / "tokenizers").mkdir()
    (tmp_path / "out" / "tokenizers" / f"u_{VOCAB}_bpe.model").write_bytes(b"of another dataset")
    with pytest.raises(UserError, match="is another tokenizer"):
        made(tmp_path / "out", [corpus], name="u", tokenizer=model)
    assert set(tree(tmp_path / "out").values()) == {b"downloaded", b"of another dataset"}


# -- mistakes and accidents leave one line and no files ---------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("nowhere --name t", "nowhere: no such file or folder"),
        ("bad.csv --name t", "bad.csv: unknown kind of file; expected a name ending in one of .txt, .jsonl"),
        ("hollow --name t", "hollow: no file in this folder"),
        ("corpus.jsonl", "required: --name"),
        ("corpus.jsonl --name a/b", "--name 'a/b'"),
        ("corpus.jsonl --name t --vocab-size 70000", "--vocab-size 70000"),
        ("corpus.jsonl --name t --vocab-size 270", "too small for the characters of this text; at least "),
        ("corpus.jsonl --name t --vocab-size 60000", "use --vocab-size "),
        ("corpus.jsonl --name t --val-share 0", "--val-share 0.0: expected a share above 0"),
        ("corpus.jsonl --name t --val-share 0.6", "at most 0.5"),
        ("corpus.jsonl --name t --val-share nan", "--val-share nan"),
        ("corpus.jsonl --name t --val-share 1e-9", "no validation document among 205"),
        ("corpus.jsonl --name t --val-share 0.1 --val-files one.jsonl", "exclude each other"),
        ("one.jsonl --name t --val-share 1e-9", "no validation document among 1 "),
        ("blank.txt --name t --val-files one.jsonl", "no training document among 1 "),
        ("corpus.jsonl --name t --seed -1", "--seed -1"),
        ("corpus.jsonl --name t --order name", "--order name: expected hash or input"),
        ("corpus.jsonl --name t --shard-tokens 0", "--shard-tokens 0"),
        ("corpus.jsonl --name t --workers 0", "--workers 0"),
        ("corpus.jsonl --name t --workers two", "--workers: invalid int value: 'two'"),
        ("corpus.jsonl --name t --text-field body", ":1: no string in field 'body' (fields: 'text', 'id')"),
        ("corpus.jsonl --name t --tokenizer one.jsonl", "one.jsonl: not a SentencePiece model"),
        ("corpus.jsonl --name t --tokenizer gone.model", "gone.model: not a SentencePiece model"),
        ("broken.jsonl --name t", "broken.jsonl:2: not JSON"),
        ("list.jsonl --name t", "list.jsonl:1: expected a JSON object, found list"),
        ("cut.jsonl.gz --name t", "cut.jsonl.gz: cannot be read"),
        ("cut.jsonl.zst --name t", "cut.jsonl.zst: cannot be read"),
        ("cut.parquet --name t", "cut.parquet: cannot be read"),
        ("text.jsonl.gz --name t", "text.jsonl.gz: cannot be read"),
        ("text.jsonl.zst --name t", "text.jsonl.zst: cannot be read"),
        ("whole.parquet --name t --text-field body", "no column 'body' (columns: 'text')"),
        ("null.parquet --name t", "null.parquet:1: no string in field 'text'"),
    ],
)
def test_mistakes_are_one_line(arguments, words, texts, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = corpus.read_bytes()
    write_jsonl(tmp_path / "one.jsonl", ["the only document of its file"])
    (tmp_path / "hollow").mkdir()
    null = pyarrow.array([None], "string")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "whole.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": null}), tmp_path / "null.parquet")
    parquet = (tmp_path / "whole.parquet").read_bytes()
    for name, content in {
        "bad.csv": b"text",
        "blank.txt": b" \n",
        "broken.jsonl": lines[: len(lines.splitlines()[0]) + 30],
        "list.jsonl": b"[1]\n",
        "cut.jsonl.gz": gzip.compress(lines)[:-2000],
        "cut.jsonl.zst": zstandard.compress(lines)[:-2000],
        "cut.parquet": parquet[: len(parquet) // 2],
        "text.jsonl.gz": lines,
        "text.jsonl.zst": lines,
    }.items():
        (tmp_path / name).write_bytes(content)
    status, error = command(capsys, "text", *arguments.split(), "--out", "out")
    assert status == 2
    assert words in error and error.startswith("prepare.py: ") and error.count("\n") == 1, error
    assert tree(tmp_path / "out") == {}


def test_mistakes_outside_text_are_one_line(model, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    for arguments, words in [
        ([], "VERB"),
        (["frobnicate"], "invalid choice"),
        (["verify", tmp_path / "nowhere"], "nowhere: no such folder"),
        (["verify", tmp_path], "its name does not tell the tokenizer; give it with --tokenizer"),
        (["verify", tmp_path, "--tokenizer", model], "manifest.json: damaged (KeyError: 'tokenizer')"),
    ]:
        status, error = command(capsys, *arguments)
        assert status == 2 and words in error and error.count("\n") == 1, error


@pytest.mark.parametrize("package, name", [("zstandard", "c.jsonl.zst"), ("pyarrow.parquet", "c.parquet")])
def test_missing_packages_are_named(package, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"")
    status, error = command(capsys, "text", tmp_path / name, "--name", "t", "--out", tmp_path / "out")
    assert status == 2
    assert package.split(".")[0] in error and "pip install -r requirements.txt" in error


def test_documents_that_are_too_long_are_named(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1500)
    (tmp_path / "long.txt").write_text("long " * 400)
    long = "long.txt: a document of 2,000 bytes"
    for path, place in [(corpus, "corpus.jsonl:"), (tmp_path / "long.txt", long)]:
        status, error = command(capsys, "text", path, "--name", "t", "--workers", 1, "--out", tmp_path / "out")
        assert status == 2 and place in error and "1,500" in error


def test_what_is_not_unicode_is_replaced_and_counted(texts, model, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait, written in Latin-1")
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfa byte order mark is no text")
    (tmp_path / "half.jsonl").write_text('{"text": "half a pair \\ud83d, then a whole one \\ud83d\\ude80"}\n')
    write_jsonl(tmp_path / "rest.jsonl", texts)
    names = ["latin.txt", "marked.txt", "half.jsonl"]
    rows = documents.file_rows([tmp_path / name for name in names], "text")
    found = {Path(row.place).name: documents.document(row, "text")[0] for row in rows}
    assert found["latin.txt"] == "caf\ufffd au lait, written in Latin-1"
    assert found["marked.txt"] == "a byte order mark is no text"
    assert found["half.jsonl:1"] == "half a pair \ufffd, then a whole one \U0001f680"
    result = made(tmp_path / "out", [tmp_path / name for name in [*names, "rest.jsonl"]], tokenizer=model)
    assert result.manifest["source"]["repaired"] == 2


def test_full_disk_is_seen_before_the_work(corpus, model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(tx.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(tx, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(UserError, match="1 MB free"):
        made(tmp_path / "out", [corpus], tokenizer=model)
    assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize("accident, status", [(KeyboardInterrupt(), 130), (OSError(28, "No space left"), 2)])
@pytest.mark.parametrize("place", ["train_tokenizer", "encode_batch", "save", "write_split", "compressors", "install"])
def test_accidents_change_nothing_and_the_same_command_goes_on(
    accident, status, place, corpus, tmp_path, monkeypatch, capsys
):
    """Interrupted at the fifth batch, after the encoding, or before; the spools then hold more than was noted."""
    monkeypatch.setattr(tx, "BATCH_BYTES", 4000)
    monkeypatch.setattr(tx, "CHECKPOINT_SECONDS", 0)
    calls, original = [], getattr(tx, place)

    def fail(*arguments: object, **named: object) -> object:
        calls.append(place)
        if len(calls) < 5 and place in ("encode_batch", "save"):
            return original(*arguments, **named)
        if place == "save":  # what the spools hold is on disk, but not noted
            assert all(spool.checkpoint() for spool in arguments[1])
        raise accident

    command_line = ["text", corpus, "--name", "t", "--vocab-size", VOCAB, "--val-share", 0.1, "--workers", 1, "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(tx, place, fail)
        found, error = command(capsys, *command_line, tmp_path / "out")
    assert found == status and error.count("\n") == 1
    assert not [name for name in tree(tmp_path / "out") if not name.startswith("datasets/.t_sp512.work/")]
    encoded = []
    with monkeypatch.context() as patch:
        patch.setattr(tx, "encode_batch", lambda *a: (encoded.append(a), documents.encode_batch(*a))[1])
        assert command(capsys, *command_line, tmp_path / "out")[0] == 0
    assert command(capsys, *command_line, tmp_path / "fresh")[0] == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    batches = len(list(tx.file_source([corpus], [], "text").batches()))
    left = {"train_tokenizer": batches, "encode_batch": batches - 4, "save": batches - 4}
    assert len(encoded) == left.get(place, 0)


def test_two_runs_do_not_build_one_dataset_at_a_time(corpus, model, tmp_path, monkeypatch):
    def meanwhile(*_: object) -> None:
        with pytest.raises(UserError, match="another run is making this dataset"):
            made(tmp_path, [corpus], tokenizer=model)
        raise KeyboardInterrupt

    monkeypatch.setattr(tx, "compressors", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, [corpus], tokenizer=model)


def test_an_interrupted_run_of_other_options_is_not_taken_up(corpus, tmp_path, monkeypatch):
    """Neither its ids nor its tokenizer, which was trained on other documents."""
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tx, "write_split", fail)
        made(tmp_path / "out", [corpus], seed=1)
    made(tmp_path / "out", [corpus], seed=2)
    made(tmp_path / "fresh", [corpus], seed=2)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_failed_replacement_restores_what_was_there(corpus, tmp_path, monkeypatch):
    made(tmp_path / "out", [corpus])
    before = tree(tmp_path / "out")
    move = shutil.move

    def fail_at_last(source: Path, target: Path) -> None:
        if source.name == "tokenizer.vocab":
            raise OSError(28, "No space left on device")
        move(source, target)

    monkeypatch.setattr(tx.shutil, "move", fail_at_last)
    with pytest.raises(OSError):
        made(tmp_path / "out", [corpus], seed=1, force=True)
    now = {name: data for name, data in tree(tmp_path / "out").items() if "/." not in name}
    assert now == before


def test_input_that_changes_between_the_passes_is_refused(texts, corpus, model, tmp_path, monkeypatch):
    def scan_then_change(*arguments: object) -> tx.Scan:
        found = scan(*arguments)
        write_jsonl(corpus, [*texts[:100], "changed", *texts[101:]])
        return found

    scan = tx.scan
    monkeypatch.setattr(tx, "scan", scan_then_change)
    with pytest.raises(UserError, match="changed while it was being read"):
        made(tmp_path / "out", [corpus], tokenizer=model)
    assert tree(tmp_path / "out") == {}


def test_a_tokenizer_that_cannot_write_shards_is_refused(texts, tmp_path):
    for name, changes, words in [
        ("bos", {"bos_id": 0, "pad_id": 1}, "BOS has id 0"),
        ("bytes", {"byte_fallback": False}, "no byte pieces"),
    ]:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=str(tmp_path / name),
            vocab_size=VOCAB,
            minloglevel=2,
            **{**tx.TRAINING, **changes},
        )
        with pytest.raises(UserError, match=words):
            verify.load_tokenizer(tmp_path / f"{name}.model")


# -- demo -------------------------------------------------------------------------------------------


def test_demo_makes_a_dataset_of_python_itself(tmp_path, monkeypatch, capsys):
    sources = documents.stdlib_sources()
    root = Path(json.__file__).parents[1]
    names = {path.relative_to(root).as_posix() for path in sources}
    assert {"json/decoder.py", "argparse.py"} <= names
    assert not any("site-packages" in name or "/test/" in f"/{name}" or "/tests/" in name for name in names)
    assert "pydoc_data/topics.py" not in names  # it would repeat every topic on the training side
    few = [path for path in sources if path.parent.name == "json"]
    monkeypatch.setattr(documents, "stdlib_sources", lambda: few)
    arguments = ["demo", "--out", str(tmp_path), "--workers", "1", "--val-share", "0.1"]
    assert prepare.main(arguments) == 0
    out = capsys.readouterr().out
    assert "./run.sh train DATA_PATH=" in out and "VOCAB_SIZE=1024" in out
    directory = tmp_path / "datasets" / "demo_sp1024"
    manifest = json.loads((directory / "manifest.json").read_text())
    topics = len(list(documents.demo_rows())) - len(documents.stdlib_sources())
    assert topics > 50
    dropped = sum(manifest["source"]["dropped"].values())
    total = manifest["train"]["documents"] + manifest["val"]["documents"] + dropped
    assert total == topics + len(documents.stdlib_sources())
    assert (tmp_path / "tokenizers" / "demo_1024_bpe.model").is_file()
    assert (tmp_path / "tokenizers" / "demo_1024_bpe.vocab").is_file()
    before = tree(tmp_path)
    assert prepare.main(arguments) == 0
    assert "used again" in capsys.readouterr().out
    assert prepare.main([*arguments, "--force"]) == 0
    assert tree(tmp_path) == before


def test_demo_of_another_python_is_replaced_unasked_and_nothing_else_is(corpus, model, tmp_path, monkeypatch, capsys):
    few = [path for path in documents.stdlib_sources() if path.parent.name == "json"]
    monkeypatch.setattr(documents, "stdlib_sources", lambda: few)
    arguments = ["demo", "--out", str(tmp_path), "--workers", "1", "--val-share", "0.1"]
    with monkeypatch.context() as patch:
        patch.setattr(tx.platform, "python_version", lambda: "3.9.1")
        assert prepare.main(arguments) == 0
    capsys.readouterr()
    assert prepare.main(arguments) == 0
    assert "manifest.source.python is '3.9.1', not" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "datasets" / "demo_sp1024" / "manifest.json").read_text())
    assert manifest["source"]["python"] == tx.platform.python_version()
    own = tmp_path / "own" / "datasets" / "demo_sp1024"
    shutil.copytree(tmp_path / "datasets" / "demo_sp1024", own)
    manifest["source"]["kind"] = "files"  # somebody's text that is called demo
    (own / "manifest.json").write_text(json.dumps(manifest))
    assert prepare.main([*arguments[:2], str(tmp_path / "own"), *arguments[3:]]) == 2
    assert "--force" in capsys.readouterr().err


def test_help_of_every_verb(capsys):
    for arguments in ([], ["demo"], ["text"], ["download"], ["verify"]):
        with pytest.raises(SystemExit) as caught:
            prepare.main([*arguments, "--help"])
        assert caught.value.code == 0
    assert "verify" in capsys.readouterr().out
