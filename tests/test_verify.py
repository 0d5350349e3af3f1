"""data/verify.py, and the part of it that training runs: damage, leaks and wrong bytes are refused, the file named."""
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, tiny, write_shard

import train_gpt as tg

sys.path.insert(0, str(ROOT / "data"))
from data import documents
import prepare
from data import text as tx
from data import verify

VOCAB = 512


def process(rank: int = 0, others: tuple = ()) -> types.SimpleNamespace:
    """As much of a `Run` as `check_data` asks for; `others` are what the other ranks gather."""
    lines = []
    return types.SimpleNamespace(rank=rank, world=1 + len(others), is_main=rank == 0, lines=lines,
                                 agree=lambda problem: tg.require(not problem, problem),
                                 gather=lambda value: [value, *others], log=lambda *_, **f: lines.append(f))


@pytest.fixture(scope="module")
def made(dataset: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of `prepare.py text`: two training shards, one of validation, a manifest."""
    folder = tmp_path_factory.mktemp("verify")
    modules = [Path(m.__file__).read_text("utf-8") for m in (shutil, types)]
    texts = [part for module in modules for part in module.split("\n\n") if len(part) > 60]
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = tx.Options(name="fineweb", out=folder, tokenizer=Path(dataset["tokenizer_path"]), val_share=0.1,
                         shard_tokens=9000, workers=1)
    return tx.prepare(tx.file_source([folder / "c.jsonl"], [], "text"), options).directory


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same, to be damaged; tokenizer included."""
    shutil.copytree(made.parents[1], tmp_path / "data")
    return tmp_path / "data" / "datasets" / made.name


def start(folder: Path, run: types.SimpleNamespace | None = None) -> dict[str, int]:
    """What training does with its data before the first step."""
    cfg, run = tiny(data_path=str(folder), vocab_size=VOCAB), run or process()
    return tg.check_data(tg.TrainData(cfg, run).stream, cfg, run)


def failures(folder: Path, **options: object) -> list[verify.Check]:
    return [row for row in verify.verify(folder, **options) if row.problem]


def edit(path: Path, change: object) -> None:
    """Rewrites the ids of a shard."""
    write_shard(path, change(tg.open_shard(path).copy()))


def edit_manifest(folder: Path, change: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_good_dataset_holds_and_starts(made, capsys):
    assert prepare.main(["verify", str(made)]) == 0
    out = capsys.readouterr().out
    assert "all checks hold" in out and "FAIL" not in out and "round trip" in out
    count = json.loads((made / "manifest.json").read_text())["val"]["documents"]
    run = process()
    assert start(made, run) == {"val_documents": count, "shared_documents": 0}
    assert run.lines == []


def corrupt(raw: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """A shard's bytes with one random fault."""
    changed = bytearray(raw)
    if kind == "header":
        changed[rng.integers(1024)] ^= 1 << int(rng.integers(8))
    elif kind == "size":
        n = int(rng.integers(1, len(raw)))
        changed = changed[:-n] if rng.random() < 0.7 else changed + rng.bytes(n)
    else:
        ids = np.frombuffer(raw, "<u2", offset=1024).copy()
        if kind == "ids":  # outside the vocabulary, or another id within it
            at = int(rng.integers(len(ids)))
            ids[at] = rng.integers(VOCAB, 65536) if rng.random() < 0.5 else (int(ids[at]) + 7) % VOCAB
        else:  # a document start that is lost, or one too many
            at = int(rng.choice(np.flatnonzero(ids == 1)))
            ids[at if rng.random() < 0.5 else int(rng.integers(len(ids)))] = rng.choice([1, 2, 300])
            if ids.tobytes() == raw[1024:]:
                ids[at] = 300
        changed[1024:] = ids.tobytes()
    return bytes(changed)


@pytest.mark.parametrize("kind", ["header", "size", "ids", "BOS"])
def test_random_corruptions_are_refused_with_the_file_named(kind, copy):
    """4 x 25 of them, half of what training sees by its cheap check is among them."""
    rng = np.random.default_rng(["header", "size", "ids", "BOS"].index(kind))
    paths = sorted(copy.glob("*.bin"))
    for _ in range(25):
        path = paths[rng.integers(len(paths))]
        raw = path.read_bytes()
        bad = corrupt(raw, kind, rng)
        assert bad != raw
        path.write_bytes(bad)
        assert path.name in [row.what for row in failures(copy)], (kind, path.name)
        ids = np.frombuffer(bad[1024:len(bad) // 2 * 2], "<u2")
        if kind == "size" or bad[:12] != raw[:12] or ("train" in path.name and ids.max() >= VOCAB):
            with pytest.raises(tg.UserError) as error:
                start(copy)
            assert path.name in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(raw)
    assert not failures(copy) and start(copy)


def test_training_does_not_open_validation(copy):
    """Its ids may be anything: sizes are all that is looked at before the artifact is frozen."""
    edit(copy / "fineweb_val_000000.bin", lambda ids: ids * 0 + 9)
    assert start(copy)["shared_documents"] == 0


def test_validation_that_is_trained_on_is_refused(copy):
    """By its content, wherever it stands; in verify and before training, also where only another rank can see it."""
    val, train = copy / "fineweb_val_000000.bin", copy / "fineweb_train_000001.bin"
    (copy / "manifest.json").unlink()
    starts = np.append(np.flatnonzero(tg.open_shard(val) == tg.BOS_ID), len(tg.open_shard(val)))
    few = tg.open_shard(val)[starts[1]:starts[3]].copy()
    whole = tg.open_shard(train)
    first = int(np.flatnonzero(whole == tg.BOS_ID)[0])
    edit(train, lambda ids: np.concatenate([ids[:first], few, ids[first:]]))
    [bad] = [row for row in failures(copy, model=model_of(copy)) if row.what == "validation in training"]
    assert bad.found.startswith("2 documents") and "at most 1% may be" in bad.problem
    with pytest.raises(tg.UserError, match="2 of [0-9]+ validation documents .* are in the training shards, too"):
        start(copy)
    keys = tg.TokenStream(copy, "fineweb_val").document_keys()[0]
    seen = np.isin(np.arange(len(keys)), [1, 2])
    blind, aware = process(1, (seen,)), process(1, (seen & False,))
    with pytest.raises(tg.UserError, match="2 of [0-9]+ validation documents"):
        start(copy, blind)  # rank 1 of 2 holds the second shard: it sees them itself
    edit(train, lambda ids: np.concatenate([ids[:first], ids[first + len(few):]]))
    with pytest.raises(tg.UserError, match="2 of [0-9]+ validation documents"):
        start(copy, blind)  # now only the other rank does
    assert start(copy, aware)["shared_documents"] == 0


def model_of(folder: Path) -> Path:
    return next((folder.parents[1] / "tokenizers").glob("*.model"))


@pytest.mark.parametrize("size", [1 << 17, 7])
def test_keys_are_of_the_content_alone(tmp_path, monkeypatch, size):
    """Equal documents have equal keys in any company, however a shard is cut; a changed id or order changes them."""
    whole = tg.pieces
    monkeypatch.setattr(tg, "pieces", lambda shard, _: whole(shard, size))
    rng = np.random.default_rng(0)
    docs = [np.append(1, rng.integers(4, 500, int(n))) for n in rng.integers(0, 40, 3000)]
    docs += [np.array([1, *ids]) for ids in ([7, 8, 9], [9, 8, 7], [7, 7, 8], [7, 8, 8])]
    write_shard(tmp_path / "fineweb_train_000000.bin", np.concatenate(docs))
    write_shard(tmp_path / "fineweb_val_000000.bin", np.concatenate([[77], *docs[::-1]]))
    keys, lengths = tg.TokenStream(tmp_path, "fineweb_train").document_keys()
    back, same = tg.TokenStream(tmp_path, "fineweb_val").document_keys()
    assert lengths.tolist() == [len(d) for d in docs] and same.tolist() == lengths.tolist()[::-1]
    assert keys.tolist() == back.tolist()[::-1]
    assert len(set(keys.tolist())) == len(set(map(tuple, docs)))


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "fineweb_train_000001.bin").unlink(), "fineweb_train_000001.bin: of .* only in manifest.json"),
    (lambda f: shutil.copy(f / "fineweb_train_000001.bin", f / "fineweb_train_000007.bin"),
     "fineweb_train_000007.bin: of .* only on disk"),
    (lambda f: edit(f / "fineweb_val_000000.bin", lambda ids: ids[:-5]), "fineweb_val_000000.bin: of .* only"),
    (lambda f: np.ones((3, 2), np.uint64).tofile(f / "val_keys.u64"), "val_keys.u64: of 3 tokens"),
    (lambda f: (f / "val_keys.u64").write_bytes(b"?"), "val_keys.u64: damaged"),
    (lambda f: edit_manifest(f, lambda m: m["val"].pop("files")), "manifest.json: damaged"),
])
def test_training_refuses_what_the_manifest_does_not_say(damage, words, copy):
    damage(copy)
    with pytest.raises(tg.UserError, match=words) as error:
        start(copy)
    assert "\n" not in str(error.value) and ("again" in str(error.value) or "verify" in str(error.value))


def test_another_number_of_validation_documents_is_said_once(copy):
    (copy / "manifest.json").unlink()
    run = process()
    start(copy, run)
    assert len(run.lines) == 1 and "not the official 50,000" in run.lines[0]["text"]
    (copy / "val_keys.u64").unlink()
    run = process()
    assert start(copy, run) == {}
    assert len(run.lines) == 1 and "verify" in run.lines[0]["text"]
    verify.verify(copy, model_of(copy))
    assert start(copy)["shared_documents"] == 0


def published(copy: Path) -> Path:
    """The dataset under the published names, without a manifest."""
    (copy / "manifest.json").unlink()
    model_of(copy).rename(copy.parents[1] / "tokenizers" / f"fineweb_{VOCAB}_bpe.model")
    return copy.rename(copy.parent / f"fineweb10B_sp{VOCAB}")


def test_a_published_layout_is_held_against_the_official_split(copy, monkeypatch):
    folder = published(copy)
    assert [(row.what, row.problem) for row in failures(folder)] == [("val", "the official split has 50,000 documents")]
    for path in folder.glob("fineweb_train_*"):
        path.rename(folder.parent / path.name)
    assert "no fineweb_train_*.bin" in failures(folder)[0].problem and "round trip" in str(verify.verify(folder))
    for path in folder.parent.glob("fineweb_train_*"):
        path.rename(folder / path.name)
    count, size = len(tg.TokenStream(folder, "fineweb_val").document_keys()[0]), 0
    monkeypatch.setattr(verify, "VAL_DOCUMENTS", count)
    [row] = failures(folder)
    assert row.what == "bytes per token" and "official validation text has 151,080,891" in row.problem
    rows = {row.what: row.found for row in verify.verify(folder)}
    size = int(rows["bytes"].split()[0].replace(",", ""))
    monkeypatch.setattr(verify, "VAL_BYTES", size)
    assert not failures(folder)
    monkeypatch.setitem(verify.TOKENS_PER_BYTE, f"fineweb10B_sp{VOCAB}", 1.01 / float(rows["bytes per token"]))
    assert "the records have" in failures(folder)[0].problem


@pytest.mark.parametrize("change, words", [
    (lambda ids: ids[1:], "starts with id"),
    (lambda ids: np.append(ids, [2, 2]), "2 ids of pad, EOS or unknown"),
    (lambda ids: np.concatenate([ids, [1], [259] * 3]), "decodes to a text that encodes to other ids"),
])
def test_structure_and_round_trip(change, words, copy, monkeypatch):
    """Ids that no tokenizer run wrote: the last is a byte piece three times, which spells other pieces."""
    folder = published(copy)
    edit(folder / "fineweb_val_000000.bin", change)
    count = len(tg.TokenStream(folder, "fineweb_val").document_keys()[0])
    monkeypatch.setattr(verify, "VAL_DOCUMENTS", count)
    assert any(words in row.problem for row in failures(folder)), failures(folder)


class Stand(types.SimpleNamespace):
    """A transform with the doors of data/caseops.py: a capital becomes U+E001 and the small letter."""
    training = {"user_defined_symbols": ["\ue001"]}

    @staticmethod
    def encode(text: str) -> str:
        return "".join("\ue001" + c.lower() if c.isascii() and c.isupper() else c for c in text)

    @staticmethod
    def decode(text: str) -> str:
        parts = text.split("\ue001")
        return parts[0] + "".join(p[:1].upper() + p[1:] for p in parts[1:])

    @classmethod
    def tokenize(cls, sp: object, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = sp.encode(cls.encode(text))
        sizes = [len(cls.decode(sp.decode(ids[:i])).replace("\ue001", "").encode()) for i in range(len(ids) + 1)]
        return np.array(ids, np.uint16), np.diff(sizes).astype(np.uint16)


def test_a_transform_brings_a_side_file_that_verify_holds_against_the_text(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "caseops", types.SimpleNamespace(VERSIONS={"v1": Stand}))
    rows = [json.loads(line)["text"] for line in (made.parents[1] / "c.jsonl").read_text().splitlines()]
    rows = [" ".join(row.encode("ascii", "ignore").decode().split()) for row in rows]  # the normaliser's own form
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    arguments = [tmp_path / "c.jsonl", "--name", "c", "--vocab-size", VOCAB, "--val-share", "0.1", "--workers", "1",
                 "--out", tmp_path, "--transform", "caseops_v1"]
    assert prepare.main(["text", *map(str, arguments)]) == 0
    folder = tmp_path / "datasets" / f"c_sp{VOCAB}"
    manifest = json.loads((folder / "manifest.json").read_text())
    texts = [row for row in dict.fromkeys(rows) if documents.split_side(row, 0, 0.1) == "val"]
    assert manifest["transform"] == "caseops_v1" and manifest["val"]["bytes"] == sum(map(len, texts))
    side, val = (tg.TokenStream(folder, f"fineweb_{split}") for split in ("val_bytes", "val"))
    assert len(side) == len(val) and side.read(0, len(side)).sum() == manifest["val"]["bytes"]
    data = tg.ValData.load(tiny(data_path=str(folder), vocab_size=VOCAB, caseops_enabled=1), process())
    assert data.target_bytes.sum() == manifest["val"]["bytes"]
    good = side.read(0, len(side))
    edit(folder / "fineweb_val_bytes_000000.bin", lambda ids: np.where(np.arange(len(ids)) == 5, ids + 1, ids))
    assert "val_bytes_000000.bin" in failures(folder)[0].what
    edit_manifest(folder, lambda m: m["val_bytes"]["files"][0].pop("sha256"))
    assert "the manifest says" in failures(folder)[0].problem
    for change, words in ((lambda ids: np.where(np.arange(len(ids)) == 0, 1, ids), "1 BOS have bytes"),
                          (lambda ids: ids * 2, "differ by more than 1%"), (lambda ids: ids[:-1], "tokens")):
        edit(folder / "fineweb_val_bytes_000000.bin", lambda _, c=change: c(good))
        assert words in failures(folder)[0].problem, words
