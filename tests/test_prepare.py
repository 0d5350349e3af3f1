"""data/text.py: the same text gives the same bytes, no text is on two sides, nothing is half-written."""
from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import lzma
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data import documents, prepare, verify
from data import text as tx
from tools.common import ToolError, program

VOCAB = 512
MULTI_BYTE = [
    "Die Gr\u00f6\u00dfe des Wortschatzes bestimmt, wie viele Bytes ein Token im Mittel tr\u00e4gt.",
    "\u03a0\u03ac\u03bd\u03c4\u03b1 \u1fe5\u03b5\u1fd6 \u03ba\u03b1\u1f76 \u03bf\u1f50\u03b4\u1f72\u03bd",
    "\u8a00\u8a9e\u30e2\u30c7\u30eb\u306f\u6b21\u306e\u5358\u8a9e\u3092\u4e88\u6e2c\u3059\u308b",
    "rocket \U0001f680, family \U0001f468\u200d\U0001f469\u200d\U0001f467, \u00bd, \ufb01n, e\u0301 combined",
    "tabs\tand\r\nline ends\n\n\nand   many    spaces \u2581 and a mark \u2585 or two \u2585",
]


@pytest.fixture(scope="module", autouse=True)
def many_parts() -> Iterator[None]:
    """Small texts are dozens of batches, so that results can overtake, many shards, and more than one sample."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("BATCH_BYTES", 4000), ("SHARD_TOKENS", 2000), ("SAMPLE_BYTES", 20_000)):
            patch.setattr(tx, name, size)
        yield


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """About 200 different documents."""
    modules = [Path(module.__file__).read_text("utf-8") for module in (argparse, shutil, subprocess)]
    parts = [part.strip() for module in modules for part in module.split("\n\n")]
    years = "Years: " + ", ".join(str(year) for year in range(1900, 2030))
    return [*dict.fromkeys(part for part in parts if len(part) > 200)][:199] + [years] + MULTI_BYTE


@pytest.fixture(scope="module")
def plain(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of the documents with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("plain")
    return made(folder / "out", write_jsonl(folder / "corpus.jsonl", texts))


@pytest.fixture(scope="module")
def model(plain: Path) -> Path:
    return plain / manifest_of(plain)["tokenizer"]["path"]


@pytest.fixture
def corpus(texts: list[str], tmp_path: Path) -> Path:
    """The documents as a .jsonl file."""
    return write_jsonl(tmp_path / "corpus.jsonl", texts)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def made(out: Path, *inputs: Path, **changes: object) -> Path:
    """The dataset of `text` with options that suit small texts."""
    options = prepare.parser().parse_args(["text", *map(str, inputs), "--name", "t", "--out", str(out)])
    return tx.prepare(argparse.Namespace(**{**vars(options), "val_share": 0.1, "vocab_size": VOCAB, "workers": 1,
                                            "transform": "none", **changes}))


def read(*inputs: Path, split_on: str | None = None) -> list[str]:
    """The texts of inputs."""
    return [text for _, text in documents.read_documents(documents.input_files(inputs), "text", split_on)]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def manifest_of(dataset: Path) -> dict:
    return json.loads((dataset / "manifest.json").read_text())


def stored_documents(dataset: Path, side: str) -> list[list[int]]:
    """The ids of each document of one side without its BOS, read without the trainer's reader."""
    paths = [dataset / entry["name"] for entry in manifest_of(dataset)[side]["files"]]
    raw = b"".join(path.read_bytes()[1024:] for path in paths)
    ids = struct.unpack(f"<{len(raw) // 2}H", raw)
    starts = [i for i, token in enumerate(ids) if token == 1]
    assert starts[0] == 0
    return [list(ids[a + 1:b]) for a, b in zip(starts, [*starts[1:], len(ids)])]


def drawn(text: str) -> tuple[int, int]:
    """The two draws of a text."""
    return documents.draw(documents.clean(text), seed=0)[1:]


def side_of(text: str, share: float) -> str:
    return documents.SIDES[drawn(text)[0] < share * 2**64]


def in_order(texts: list[str], side: str) -> list[str]:
    """The texts of a side as they come in its shards."""
    return sorted((text for text in texts if side_of(text, 0.1) == side), key=lambda text: drawn(text)[1])


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["data", *map(str, arguments)])
        status = program(prepare.main, "data")
    return status, *capsys.readouterr()


def test_bytes_do_not_depend_on_workers_or_on_the_order_of_the_input(texts, plain, tmp_path):
    made(tmp_path / "out", write_jsonl(tmp_path / "corpus.jsonl", texts[::-1]), workers=2)
    assert tree(tmp_path / "out") == tree(plain.parents[1]) and len(tree(tmp_path / "out")) > 10


def test_memory_does_not_grow_with_the_text(tmp_path):
    corpus = tx.Corpus(tmp_path / "corpus", 0, 0.1)
    with contextlib.closing(corpus.db):
        tracemalloc.start()
        for number in range(300):
            corpus.add(f"{number} " * 20_000, None)
        corpus.unique()
        size = sum(len(text) for side in (0, 1) for texts in corpus.batches(side) for text in texts)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert size > 20e6 and peak < 6e6


def test_every_format_gives_the_same_documents(texts, tmp_path):
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (tmp_path / "c.jsonl").write_text(lines.replace("\n", "\n\ufeff\n"), "utf-8")  # blank lines are nothing
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        (tmp_path / f"{encoding}.jsonl").write_bytes(lines.encode(encoding))
        (tmp_path / f"{encoding}.jsonl.gz").write_bytes(gzip.compress(lines.encode(encoding)))
        (tmp_path / f"{encoding}.txt").write_bytes("<end>\r\n".join(["", *texts, "last"]).encode(encoding))
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=50)
    hidden = tmp_path / "folder" / "deep" / ".hidden"
    hidden.mkdir(parents=True)
    for i, text in enumerate(texts):
        (hidden.parent / f"{i:04d}.txt").write_bytes(text.encode())
    for path in (hidden / "x.txt", tmp_path / "folder" / "notes.csv"):
        path.write_text("hidden, or another kind of file")
    for path in (tmp_path / "c.parquet", tmp_path / "folder", *tmp_path.glob("*.jsonl*")):
        assert read(path) == texts, path
    for path in tmp_path.glob("*.txt"):
        assert read(path, split_on="<end>\n") == ["", *(text.replace("\r\n", "\n") for text in texts), "last"], path


def test_the_side_is_a_function_of_the_text():
    assert drawn("a text") == drawn("  a text\n")
    many, more = ([side_of(f"document {i}", share) for i in range(4000)] for share in (0.1, 0.2))
    assert 340 < many.count("val") < 460  # 400 +- 3 standard deviations
    assert all(b == "val" for a, b in zip(many, more) if a == "val")


@given(st.text(st.sampled_from("\0 \n\x85\ud800\ufeffa")))
def test_what_is_clean_stays_as_it_is(text):
    assert documents.clean(documents.clean(text)) == documents.clean(text)


def test_what_may_be_a_mistake_is_said_in_one_line(texts, model, tmp_path, capsys, monkeypatch):
    """A text in one file, files left out, another encoding than UTF-8, next to no validation."""
    folder = tmp_path / "my texts"
    folder.mkdir()
    (folder / "loop").symlink_to(folder)
    for name in ("a.csv", "b.CSV", "README", "c.html"):
        (folder / name).write_text("not read")
    play, latin = folder / "play.txt", folder / "z.md"
    play.write_text("\n\n".join(texts), "utf-8")
    options = ["--name", "t", "--tokenizer", model, "--workers", 1, "--out", folder / ".out"]
    status, _, error = command(capsys, "text", play, *options)
    assert status == 2 and "1 different documents" in error and r"--split-on '\n\n'" in error
    options += ["--force", "--split-on", r"\n\n"]
    status, out, _ = command(capsys, "text", play, "--val-share", 0.2, *options)
    assert status == 0 and "warning" not in out and "left out" not in out
    monkeypatch.setattr(tx, "MANY_TOKENS", 9)
    latin.write_bytes(b"\n\n".join(b"caf\xe9 %d" % number for number in range(9)))
    status, out, _ = command(capsys, "text", folder, *options)
    assert status == 0 and ": 5 entries: .csv (2), " in out and "link or pipe (1)" in out
    assert re.search(rf"warning +9 of \d+ documents hold U\+FFFD.* is {folder}/z.md:1: save such", out)
    assert re.search(r"warning +validation is [1-9] documents of [\d,]+ bytes .*--val-share", out)
    assert re.search(r"warning +a CPU may need \d+ minutes .*EVAL_STRIDE=0 TTT=none", out)
    assert f"next        ./run.sh train PRESET=demo 'DATA_PATH={folder}/.out/datasets/t_sp{VOCAB}' VOCAB" in out


def test_what_is_dropped_or_repaired_is_counted(texts, model, tmp_path):
    """Duplicates, empty documents; what is not Unicode is replaced."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfa byte order mark")
    (tmp_path / "half.jsonl").write_text('{"text": "half a pair \\ud83d, a whole one \\ud83d\\ude80"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": [None]}), tmp_path / "null.parquet")
    paths = [tmp_path / name for name in ("latin.txt", "marked.txt", "half.jsonl", "null.parquet")]
    assert read(*paths) == [
        "caf\ufffd au lait", "a byte order mark", "half a pair \ufffd, a whole one \U0001f680", ""]
    padded = [*texts, *(f"  {text}\n" for text in texts[:7]), "", " \n\t ", "\u200b\u200b", None]
    manifest = manifest_of(made(tmp_path / "out", write_jsonl(tmp_path / "c.jsonl", padded), *paths, tokenizer=model))
    assert manifest["source"]["dropped"] == {"duplicate": 7, "empty": 4, "empty_after_normalisation": 1}
    assert manifest["source"]["repaired"] == 2
    assert sum(manifest[side]["documents"] for side in documents.SIDES) == len(texts) + 3


def test_validation_files_are_kept_apart_and_text_on_both_sides_is_refused(texts, model, tmp_path, capsys):
    """What is kept apart is encoded by the tokenizer given, whose copy the dataset has."""
    train, val = write_jsonl(tmp_path / "a.jsonl", texts[20:]), write_jsonl(tmp_path / "b.jsonl", texts[:20])
    dataset, tokenizer = made(tmp_path / "out", train, val_files=[val], tokenizer=model), verify.load_tokenizer(model)
    assert sorted(stored_documents(dataset, "val")) == sorted(map(tokenizer.encode, texts[:20]))
    assert sorted(stored_documents(dataset, "train")) == sorted(map(tokenizer.encode, texts[20:]))
    assert (tmp_path / "out" / "tokenizers" / f"t_{VOCAB}_bpe.model").read_bytes() == model.read_bytes()
    write_jsonl(val, ["another text", f" {texts[23]}\n", texts[29]])
    status, _, error = command(capsys, "text", train, "--val-files", val, "--name", "t", "--out", tmp_path / "no")
    assert status == 2 and "2 documents are in both" in error and error.count("\n") == 1
    assert tree(tmp_path / "no") == {}


def test_tokenizer_has_the_challenges_settings(texts, model):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert [tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()] == [0, 1, 2, 3]
    assert tokenizer.vocab_size() == VOCAB and sum(map(tokenizer.is_byte, range(VOCAB))) == 256
    assert tokenizer.encode("word", out_type=str)[0][0] != "\u2581"  # no dummy prefix
    assert all(sum(c.isdigit() for c in tokenizer.id_to_piece(i)) <= 1 for i in range(260, VOCAB))
    assert all(map(tokenizer.is_byte, tokenizer.encode("\u8a00")))  # rare: beyond the coverage of 0.999
    normaliser = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    for text in texts:
        ids = tokenizer.encode(documents.clean(text))
        normalised = normaliser.normalize(documents.clean(text)).replace("\u2581", " ").strip()
        assert tokenizer.decode(ids) == normalised and 3 not in ids


def test_tokenizer_sees_every_document(texts):
    """SentencePiece drops sentences that hold its own mark U+2585, or that are too long, without a word."""
    marked = tx.train_tokenizer([f"\u2585{text}\u2585" for text in texts], VOCAB)
    assert marked == tx.train_tokenizer([f" {text} ".replace("\u2585", " ") for text in texts], VOCAB)
    long = " ".join(texts)
    assert len(long) > 50_000  # SentencePiece's own limit is 4,192
    tx.train_tokenizer([long], VOCAB)


def test_tokenizer_is_trained_on_training_documents_of_lowest_place(texts, model):
    train = in_order(texts, "train")
    sizes = np.cumsum([len(text.encode()) for text in train])
    sample = [text for text, size in zip(train, sizes) if size <= 20_000]
    assert model.read_bytes() == tx.train_tokenizer(sample, VOCAB) and sizes[-1] > 20_000


def test_documents_are_stored_by_place_across_shards_and_the_manifest_says_what_is_there(texts, plain, model):
    manifest, tokenizer = manifest_of(plain), verify.load_tokenizer(model)
    assert plain.parts[-2:] == ("datasets", f"t_sp{VOCAB}") and manifest["vocab_size"] == VOCAB
    assert hashlib.sha256(model.read_bytes()).hexdigest() == manifest["tokenizer"]["sha256"]
    for side in documents.SIDES:
        *full, last = [entry["tokens"] for entry in manifest[side]["files"]]
        assert set(full) == {2000} and 0 < last <= 2000
        for entry in manifest[side]["files"]:
            raw = (plain / entry["name"]).read_bytes()
            assert raw[:1024] == struct.pack("<256i", 20240520, 1, entry["tokens"], *[0] * 253)
            assert hashlib.sha256(raw).hexdigest() == entry["sha256"] and len(raw) == 1024 + 2 * entry["tokens"]
        stored = stored_documents(plain, side)
        assert stored == [tokenizer.encode(text) for text in in_order(texts, side)]
        decoded = [tokenizer.decode(ids) for ids in stored]
        assert (manifest[side]["documents"], manifest[side]["tokens"]) == (len(stored), sum(len(i) + 1 for i in stored))
        assert manifest[side]["bytes"] == sum(len(text.encode()) for text in decoded)
    size = len(lzma.compress("\n".join(decoded).encode(), preset=9 | lzma.PRESET_EXTREME))
    bits = round(8 * size / manifest["val"]["bytes"], 6)
    assert manifest["compressors"]["xz -9e"] == {"bytes": size, "bits_per_byte": bits}
    assert str(plain.parents[2]) not in json.dumps(manifest)


def test_capitals_are_operators_where_the_tokenizer_is_trained_for_them(tmp_path, corpus):
    own = made(tmp_path / "own", corpus, transform=None)
    assert manifest_of(own)["transform"] == "caseops_v2"
    model = next((tmp_path / "own" / "tokenizers").iterdir())
    given = made(tmp_path / "given", corpus, transform=None, tokenizer=model)
    assert "transform" not in manifest_of(given)


def test_nothing_is_replaced_unasked_and_foreign_folders_never(corpus, model, tmp_path):
    dataset = made(tmp_path / "out", corpus, tokenizer=model)
    before, val = tree(tmp_path / "out"), stored_documents(dataset, "val")
    with pytest.raises(ToolError, match="--force"):
        made(tmp_path / "out", corpus, tokenizer=model, seed=5)
    assert tree(tmp_path / "out") == before
    made(tmp_path / "out", corpus, tokenizer=model, seed=5, force=True)
    assert sorted(stored_documents(dataset, "val")) != sorted(val)
    folder = tmp_path / "other" / "datasets" / f"t_sp{VOCAB}"
    folder.mkdir(parents=True)
    (folder / "fineweb_train_000000.bin").write_bytes(b"downloaded")
    with pytest.raises(ToolError, match="was not made by"):
        made(tmp_path / "other", corpus, tokenizer=model, force=True)
    (tmp_path / "other" / "tokenizers").mkdir()
    (tmp_path / "other" / "tokenizers" / f"u_{VOCAB}_bpe.model").write_bytes(b"of another dataset")
    with pytest.raises(ToolError, match="is another tokenizer"):
        made(tmp_path / "other", corpus, name="u", tokenizer=model)
    assert set(tree(tmp_path / "other").values()) == {b"downloaded", b"of another dataset"}


MISTAKES = [
    ("nowhere --name t", "nowhere: no such file or folder"),
    ("bad.csv --name t", "bad.csv: expected a file, or a folder of files, ending in one of .txt, .md, .jsonl"),
    ("corpus.jsonl --name a/b", "--name a/b: not the name of a folder"),
    ("corpus.jsonl --name t --vocab-size 270", "--vocab-size 270: SentencePiece cannot be trained"),
    ("corpus.jsonl --name t --split-on=", "--split-on: empty: expected"),
    ("corpus.jsonl --name t --val-share 1e-9", "none for validation"),
    ("corpus.jsonl --name t --text-field body", "corpus.jsonl:1: no string in 'body'"),
    ("corpus.jsonl --name t --tokenizer one.jsonl", "one.jsonl: not a SentencePiece model"),
    ("corpus.jsonl --name t --tokenizer bos.model", "bos.model: BOS has id 0"),
    ("corpus.jsonl --name t --tokenizer bytes.model", "bytes.model: no byte pieces"),
    ("broken.jsonl --name t", "broken.jsonl:2: not JSON"),
    ("cut.jsonl.gz --name t", "cut.jsonl.gz: cannot be read"),
    ("long.jsonl --name t", "long.jsonl:2: a document of more than 9,000 bytes"),
    ("whole.parquet --name t", "no pyarrow.parquet here: pip install -r requirements.txt -r requirements-data.txt"),
]


def test_mistakes_are_one_line(texts, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 9000)
    write_jsonl(tmp_path / "long.jsonl", ["short", "long" * 2500])
    write_jsonl(tmp_path / "one.jsonl", ["the only document of its file"])
    for name, changes in (("bos", {"bos_id": 0, "pad_id": 1}), ("bytes", {"byte_fallback": False})):
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_prefix=name, vocab_size=VOCAB,
                                                 minloglevel=2, **{**tx.TRAINING, **changes})
    lines = corpus.read_bytes()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": range(len(texts))}), tmp_path / "whole.parquet")
    for name, content in {"bad.csv": b"text", "broken.jsonl": lines[:len(lines.splitlines()[0]) + 30],
                          "cut.jsonl.gz": gzip.compress(lines)[:-2000]}.items():
        (tmp_path / name).write_bytes(content)
    for arguments, words in MISTAKES:
        if words == MISTAKES[-1][1]:
            monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # not installed
        status, _, error = command(capsys, "text", "--out", "out", *arguments.split())
        assert status == 2 and words in error and error.startswith("data: ") and error.count("\n") == 1, error
        assert tree(tmp_path / "out") == {}, arguments
    with pytest.raises(ToolError, match="expected a name in UTF-8"):
        prepare.main(["verify", "caf\udce9"])


@pytest.mark.parametrize("place, accident, status", [
    ("fill", sqlite3.OperationalError("disk is full"), 2), ("train_tokenizer", KeyboardInterrupt(), 130),
    ("encode", BrokenProcessPool(), 2), ("compressors", OSError(28, "No space left"), 2),
    ("damage", KeyboardInterrupt(), 130)])
def test_accidents_leave_nothing_behind(place, accident, status, corpus, tmp_path, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise accident

    monkeypatch.setattr(tx, place, fail)
    options = ["--vocab-size", VOCAB, "--val-share", 0.1, "--workers", 1]
    code, _, error = command(capsys, "text", corpus, "--name", "t", *options, "--out", tmp_path / "out")
    assert code == status and error.count("\n") <= 1
    assert tree(tmp_path / "out") == {} and not list((tmp_path / "out" / "datasets").iterdir())


def test_demo_makes_a_dataset_of_python_itself(tmp_path, monkeypatch, capsys):
    library, copy = Path(json.__file__).parents[1], tmp_path / "lib"
    shutil.copytree(library / "json", copy / "json", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pydoc_data/topics.py", "site-packages/x.py", "json/tests/y.py"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("left out: no library, or every topic once more")
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda _: str(copy))
    rows = [text for _, text in documents.demo_documents()]
    sources = sorted((library / "json").glob("*.py"))
    assert rows[-len(sources):] == [path.read_text("utf-8").strip() for path in sources] and len(rows) > 50
    demo = ["demo", "--workers", "1", "--out", tmp_path]
    status, out, _ = command(capsys, *demo)
    assert status == 0 and "encode" in out and "to beat     brotli -11 " in out and "next" not in out
    shard = tmp_path / "datasets" / "demo_sp1024" / "fineweb_train_000000.bin"
    assert "used again" in command(capsys, *demo)[1]
    good = shard.read_bytes()
    shard.write_bytes(good[:-2])  # what is damaged is made anew
    assert "encode" in command(capsys, *demo)[1] and shard.read_bytes() == good
    manifest = manifest_of(shard.parent)
    # The demo of another Python is replaced unasked, somebody's text that is called demo is not.
    for key, value, status in (("python", "3.9.1", 0), ("kind", "files", 2)):
        manifest["source"][key] = value
        (shard.parent / "manifest.json").write_text(json.dumps(manifest))
        assert command(capsys, *demo)[0] == status and (manifest_of(shard.parent) == manifest) == (status == 2)
