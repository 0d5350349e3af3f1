"""data/verify.py: damage, leaks and wrong bytes are found, the file named; verified.json says what training reads."""
import hashlib
import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny, write_shard
from test_prepare import command, manifest_of, side_of, write_jsonl

import train_gpt as tg
from data import prepare, verify
from data import text as tx

VOCAB = 512


@pytest.fixture(scope="module")
def made(dataset: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of `data text`: two training shards, one of validation, a manifest."""
    folder = tmp_path_factory.mktemp("verify")
    modules = [Path(m.__file__).read_text("utf-8") for m in (shutil, types)]
    write_jsonl(folder / "c.jsonl", [part for text in modules for part in text.split("\n\n") if len(part) > 60])
    return tx.prepare(prepare.parser().parse_args(
        ["text", str(folder / "c.jsonl"), "--name", "fineweb", "--tokenizer", dataset["tokenizer_path"], "--out",
         str(folder), "--val-share", "0.1", "--shard-tokens", "9000", "--workers", "1"]))


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same, to be damaged; tokenizer included."""
    shutil.copytree(made.parents[1], tmp_path / "data")
    return tmp_path / "data" / "datasets" / made.name


def failures(folder: Path, model: Path | None = None) -> list[verify.Check]:
    return [row for row in verify.verify(folder, model)[0] if row.problem]


def stamp(folder: Path) -> dict:
    return json.loads((folder / "verified.json").read_text())


def edit(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrites the ids of a shard."""
    write_shard(path, change(tg.open_shard(path).copy()))


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = manifest_of(folder)
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def model_of(folder: Path) -> Path:
    return next((folder.parents[1] / "tokenizers").glob("*.model"))


def test_a_good_dataset_holds_and_is_stamped(made, capsys):
    (made / "verified.json").unlink()
    status, out, _ = command(capsys, "verify", made)
    assert status == 0 and "all checks hold" in out and "FAIL" not in out and "round trip" in out
    digest = hashlib.sha256()
    for path in sorted(made.glob("*.bin")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes()[:4096])
    assert stamp(made) == {"shards_sha256": digest.hexdigest(), "shared_documents": 0, "shared_share": 0.0,
                           "val_documents": manifest_of(made)["val"]["documents"]}


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
def test_random_corruptions_are_found_with_the_file_named(kind, copy):
    """And what is damaged loses its stamp."""
    rng = np.random.default_rng(["header", "size", "ids", "BOS"].index(kind))
    paths = sorted(copy.glob("*.bin"))
    for _ in range(15):
        path = paths[rng.integers(len(paths))]
        raw = path.read_bytes()
        bad = corrupt(raw, kind, rng)
        assert bad != raw
        path.write_bytes(bad)
        assert path.name in [row.what for row in failures(copy)], (kind, path.name)
        assert not (copy / "verified.json").exists()
        path.write_bytes(raw)
    assert not failures(copy) and (copy / "verified.json").exists()


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "fineweb_val_000000.bin").unlink(), "missing"),
    (lambda f: shutil.copy(f / "fineweb_val_000000.bin", f / "fineweb_val_000007.bin"), "000007.bin is not in"),
    (lambda f: edit_manifest(f, lambda m: m["val"].update(bytes=1)), "the manifest says 1 bytes"),
    (lambda f: edit_manifest(f, lambda m: m["train"].update(documents=1)), "the manifest says 1 documents"),
    (lambda f: model_of(f).write_bytes(model_of(f).read_bytes() + b"\0"), "SHA-256"),
    (lambda f: model_of(f).unlink(), "missing"),
])
def test_what_the_manifest_does_not_say_is_found(damage, words, copy, capsys):
    damage(copy)
    status, out, _ = command(capsys, "verify", copy)
    assert status == 1
    assert any(words in line for line in out.splitlines() if line.startswith("FAIL")), out


def test_mistakes_are_one_line(made, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    for arguments, words in [
        ([], "VERB"), (["frobnicate"], "invalid choice"), (["verify", tmp_path / "nowhere"], "nowhere: no such folder"),
        (["verify", tmp_path], "its name does not tell the tokenizer; give it with --tokenizer"),
        (["verify", tmp_path, "--tokenizer", model_of(made)], "manifest.json: damaged (KeyError: 'tokenizer')"),
    ]:
        status, _, error = command(capsys, *arguments)
        assert status == 2 and words in error and error.count("\n") == 1, error


@pytest.mark.parametrize("shard", [0, 1])
def test_validation_that_is_trained_on_is_found_wherever_it_stands(shard, copy):
    (copy / "manifest.json").unlink()
    val, train = tg.open_shard(copy / "fineweb_val_000000.bin"), copy / f"fineweb_train_{shard:06d}.bin"
    starts = np.flatnonzero(val == tg.BOS_ID)
    few = val[starts[1]:starts[3]].copy()
    first = int(np.flatnonzero(tg.open_shard(train) == tg.BOS_ID)[0])
    edit(train, lambda ids: np.concatenate([ids[:first], few, ids[first:]]))
    [bad] = [row for row in failures(copy, model_of(copy)) if row.what == "validation in training"]
    assert bad.result.startswith("2 documents") and "at most 1% may be" in bad.problem
    assert stamp(copy)["shared_documents"] == 2
    assert stamp(copy)["shared_share"] == pytest.approx(len(few) / len(val))
    edit(train, lambda ids: np.concatenate([ids[:first], few[::-1], ids[first + len(few):]]))
    verify.verify(copy, model_of(copy))
    assert stamp(copy)["shared_documents"] == 0  # other documents of the same ids


@pytest.mark.parametrize("size", [1 << 19, 7])
def test_keys_are_of_the_content_alone(tmp_path, monkeypatch, size):
    """Equal documents have equal keys in any company, however a shard is read; a changed id or order changes them."""
    monkeypatch.setattr(verify, "BATCH_IDS", size)
    rng = np.random.default_rng(0)
    docs = [np.append(1, rng.integers(4, 500, int(n))) for n in rng.integers(0, 40, 3000)]
    docs += [np.array([1, *ids]) for ids in ([7, 8, 9], [9, 8, 7], [7, 7, 8], [7, 8, 8])]
    write_shard(tmp_path / "a.bin", np.concatenate(docs))
    write_shard(tmp_path / "b.bin", np.concatenate([[77], *docs[::-1]]))
    keys, lengths = verify.document_keys(tmp_path / "a.bin")
    back, same = verify.document_keys(tmp_path / "b.bin")
    assert lengths.tolist() == [len(d) for d in docs] and same.tolist() == lengths.tolist()[::-1]
    assert keys.tolist() == back.tolist()[::-1]
    assert len(set(keys.tolist())) == len(set(map(tuple, docs)))


def published(copy: Path) -> Path:
    """The dataset under the published names, without a manifest."""
    (copy / "manifest.json").unlink()
    model_of(copy).rename(copy.parents[1] / "tokenizers" / f"fineweb_{VOCAB}_bpe.model")
    return copy.rename(copy.parent / f"fineweb10B_sp{VOCAB}")


def test_a_published_layout_is_held_against_the_official_split(copy, monkeypatch):
    count, num_bytes = (manifest_of(copy)["val"][key] for key in ("documents", "bytes"))
    folder = published(copy)
    assert [(row.what, row.problem) for row in failures(folder)] == [("val", "the official split has 50,000 documents")]
    monkeypatch.setattr(verify, "VAL_DOCUMENTS", count)
    [row] = failures(folder)
    assert row.what == "bytes" and "official validation text has 151,080,891" in row.problem
    monkeypatch.setattr(verify, "VAL_BYTES", num_bytes)
    assert not failures(folder)
    for path in folder.glob("fineweb_train_*"):
        path.unlink()
    assert "no fineweb_train_*.bin" in failures(folder)[0].problem and "round trip" in str(verify.verify(folder))


@pytest.mark.parametrize("change, words", [
    (lambda ids: ids[1:], "starts with id"),
    (lambda ids: np.append(ids, [2, 2]), "2 ids of pad, EOS or unknown"),
    (lambda ids: np.concatenate([ids, [1], [259] * 3]), "decodes to a text that encodes to other ids"),
])
def test_structure_and_round_trip(change, words, copy):
    """Ids that no tokenizer run wrote: the last is a byte piece three times, which spells other pieces."""
    folder = published(copy)
    edit(folder / "fineweb_val_000000.bin", change)
    assert any(words in row.problem for row in failures(folder)), failures(folder)


@pytest.mark.parametrize("version", ["caseops_v1", "caseops_v2"])
def test_a_transform_brings_a_side_file_that_verify_holds_against_the_text(version, made, tmp_path, capsys):
    rows = [json.loads(line)["text"] for line in (made.parents[1] / "c.jsonl").read_text().splitlines()]
    rows = [" ".join(row.encode("ascii", "ignore").decode().split()) for row in rows]  # the normaliser's own form
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    assert command(capsys, "text", corpus, "--name", "c", "--vocab-size", VOCAB, "--val-share", "0.1", "--workers", 1,
                   "--out", tmp_path, "--transform", version)[0] == 0
    folder = tmp_path / "datasets" / f"c_sp{VOCAB}"
    manifest = manifest_of(folder)
    texts = [row for row in dict.fromkeys(rows) if side_of(row, 0.1) == "val"]
    assert manifest["transform"] == version and manifest["val"]["bytes"] == sum(map(len, texts))
    side, val = (tg.TokenStream(folder, f"fineweb_{split}") for split in ("val_bytes", "val"))
    good = side.read(0, len(side))
    assert len(side) == len(val) and good.sum() == manifest["val"]["bytes"]
    path = folder / "fineweb_val_bytes_000000.bin"
    edit(path, lambda ids: np.where(np.arange(len(ids)) == 5, ids + 1, ids))
    assert "val_bytes_000000.bin" in failures(folder)[0].what
    edit_manifest(folder, lambda m: m["val_bytes"]["files"][0].pop("sha256"))
    assert "the manifest says" in failures(folder)[0].problem
    for change, words in ((lambda ids: np.where(np.arange(len(ids)) == 0, 1, ids), "1 BOS have bytes"),
                          (lambda ids: ids * 2, "differ by more than 1%"), (lambda ids: ids[:-1], "tokens")):
        edit(path, lambda _, c=change: c(good))
        assert words in failures(folder)[0].problem, words


def test_training_counts_the_bytes_of_the_manifest(made, dataset, run):
    cfg = tiny(data_path=str(made), vocab_size=VOCAB, tokenizer_path=dataset["tokenizer_path"])
    assert tg.ValData.load(cfg, run).target_bytes.sum() == manifest_of(made)["val"]["bytes"]
