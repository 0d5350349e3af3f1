"""data/verify.py: damage, leaks and wrong bytes are found, the file named; verified.json says what training reads."""
import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny, write_shard
from test_prepare import VOCAB, command, manifest_of, side_of, write_jsonl
from test_prepare import made as build

import train_gpt as tg
from data import text as tx
from data import verify
from tools.common import ToolError


@pytest.fixture(scope="module")
def made(dataset: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of `data text`: two training shards, one of validation, a manifest."""
    folder = tmp_path_factory.mktemp("verify")
    modules = [Path(m.__file__).read_text("utf-8") for m in (shutil, types)]
    corpus = write_jsonl(folder / "c.jsonl", [part for m in modules for part in m.split("\n\n") if len(part) > 60])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tx, "SHARD_TOKENS", 9000)
        return build(folder, corpus, tokenizer=Path(dataset["tokenizer_path"]))


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same, to be damaged; tokenizer included."""
    shutil.copytree(made.parents[1], tmp_path / "data")
    return tmp_path / "data" / "datasets" / made.name


def failures(folder: Path, model: Path | None = None) -> list[verify.Check]:
    return [row for row in verify.verify(folder, model) if row.problem]


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


def test_a_good_dataset_holds_and_is_stamped(made, dataset, run, capsys):
    """And training counts the bytes of its manifest."""
    (made / "verified.json").unlink()
    status, out, _ = command(capsys, "verify", made)
    assert status == 0 and "all checks hold" in out and "FAIL" not in out and "round trip" in out
    val = manifest_of(made)["val"]
    assert f"targets (all ids but the first) = {val['bytes'] / (val['tokens'] - 1):.4f}\n" in out
    assert stamp(made) == {"shards_sha256": tg.shards_sha256(made), "shared_documents": 0, "shared_share": 0.0,
                           "val_documents": val["documents"]}
    cfg = tiny(data_path=str(made), vocab_size=VOCAB, tokenizer_path=dataset["tokenizer_path"])
    assert tg.ValData.load(cfg, run).target_bytes.sum() == val["bytes"]


@pytest.mark.parametrize("where", ["header", "anywhere", "size"])
def test_random_corruptions_are_found_with_the_file_named(where, copy):
    """A flipped bit, or another size; and what is damaged loses its stamp."""
    rng, paths = np.random.default_rng(0), sorted(copy.glob("*.bin"))
    for _ in range(15):
        path = paths[rng.integers(len(paths))]
        raw = path.read_bytes()
        at = int(rng.integers(1024 if where == "header" else len(raw)))
        flipped = bytes([raw[at] ^ 1 << int(rng.integers(8))])
        path.write_bytes(raw[:at] + (rng.bytes(2) if where == "size" else flipped + raw[at + 1:]))
        assert path.name in [row.what for row in failures(copy)], (at, path.name)
        assert not (copy / "verified.json").exists()
        path.write_bytes(raw)
    assert not failures(copy) and (copy / "verified.json").exists()


def test_mistakes_are_one_line(made, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    for arguments, words in [
        (["frobnicate"], "invalid choice"), (["verify", tmp_path / "nowhere"], "nowhere: no such folder"),
        (["verify", made.parents[1]], "no manifest.json; give the tokenizer with --tokenizer"),
        (["verify", tmp_path, "--tokenizer", model_of(made)], "manifest.json: damaged (KeyError: 'tokenizer')"),
    ]:
        status, _, error = command(capsys, *arguments)
        assert status == 2 and words in error and error.count("\n") == 1, error


@pytest.mark.parametrize("shard", [0, 1])
def test_validation_that_is_trained_on_is_found_wherever_it_stands(shard, copy):
    (copy / "manifest.json").unlink()
    val, train = tg.open_shard(copy / "fineweb_val_000000.bin"), copy / f"fineweb_train_{shard:06d}.bin"
    starts = np.flatnonzero(val == tg.BOS_ID)
    few = val[:starts[2]].copy()
    first = int(np.flatnonzero(tg.open_shard(train) == tg.BOS_ID)[0])
    edit(train, lambda ids: np.concatenate([ids[:first], few, ids[first:]]))
    [bad] = [row for row in failures(copy, model_of(copy)) if row.what == "validation in training"]
    assert bad.result.startswith("2 documents") and "at most 1% may be" in bad.problem
    assert stamp(copy)["shared_documents"] == 2 and stamp(copy)["shared_share"] == len(few) / len(val)
    edit(train, lambda ids: np.concatenate([ids[:first], few[::-1], ids[first + len(few):]]))
    verify.verify(copy, model_of(copy))
    assert stamp(copy)["shared_documents"] == 0  # other documents of the same ids


def test_documents_are_read_whole_across_pieces_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "BATCH_IDS", 7)
    rng = np.random.default_rng(0)
    docs = [rng.integers(4, 500, int(n)).tolist() for n in rng.integers(0, 40, 300)]
    for number, part in enumerate(np.split([i for doc in docs for i in (1, *doc)], [3, 50, 1000])):
        write_shard(tmp_path / f"fineweb_val_{number:06d}.bin", part)
    assert [ids.tolist() for ids in verify.documents(verify.shards(tmp_path, "val"))] == docs


def test_a_folder_without_a_manifest_is_held_against_the_official_split(copy, monkeypatch):
    count, num_bytes = (manifest_of(copy)["val"][key] for key in ("documents", "bytes"))
    model = model_of(copy)
    (copy / "manifest.json").unlink()
    assert [(row.what, row.problem) for row in failures(copy, model)] == [("val", "expected 50,000 documents")]
    monkeypatch.setattr(verify, "VAL_DOCUMENTS", count)
    [row] = failures(copy, model)
    assert row.what == "bytes" and "official validation text has 151,080,891" in row.problem
    monkeypatch.setattr(verify, "TEXT_BYTES", num_bytes)
    assert not failures(copy, model)  # another tokenizer than those that are known
    for most in (num_bytes, num_bytes + 1):
        known = ((0, 1 << 62), (most, most))
        monkeypatch.setattr(verify, "OFFICIAL", {verify.dataset_name(False, VOCAB): known})
        assert [row.what for row in failures(copy, model)] == ["bytes"] * (most > num_bytes)


def without_manifest(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Other validation ids, which no SHA-256 gives away."""
    (folder / "manifest.json").unlink()
    edit(folder / "fineweb_val_000000.bin", change)


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "fineweb_val_000000.bin").unlink(), "No such file"),
    (lambda f: shutil.copy(f / "fineweb_val_000000.bin", f / "fineweb_val_000007.bin"), "000007.bin is not in"),
    (lambda f: edit_manifest(f, lambda m: m["val"].update(bytes=1)), "the manifest says 1 bytes"),
    (lambda f: edit_manifest(f, lambda m: m["train"].update(documents=1)), "expected 1 documents"),
    (lambda f: model_of(f).write_bytes(model_of(f).read_bytes() + b"\0"), "SHA-256"),
    (lambda f: model_of(f).unlink(), "missing"),
    (lambda f: without_manifest(f, lambda ids: ids[1:]), "does not start with BOS"),
    (lambda f: without_manifest(f, lambda ids: np.append(ids, [2, 2])), "2 ids of pad, EOS or unknown"),
    # Ids that no tokenizer run wrote: a byte piece three times, which spells other pieces.
    (lambda f: without_manifest(f, lambda ids: np.append(ids, [1, 259, 259, 259])), "encodes to other ids"),
])
def test_what_is_wrong_is_found(damage, words, copy, capsys):
    model = model_of(copy)
    damage(copy)
    status, out, _ = command(capsys, "verify", copy, "--tokenizer", model)
    assert status == 1 and any(words in line for line in out.splitlines() if line.startswith("FAIL")), out


@pytest.mark.parametrize("version", ["caseops_v1", "caseops_v2"])
def test_a_transform_brings_a_side_file_that_verify_holds_against_the_text(version, made, tmp_path):
    rows = [json.loads(line)["text"] for line in (made.parents[1] / "c.jsonl").read_text().splitlines()]
    rows = [" ".join(row.encode("ascii", "ignore").decode().split()) for row in rows]  # the normaliser's own form
    if version == "caseops_v2":
        rows = [row.replace(" ", "\n    ") for row in rows]  # as code is: what the normaliser drops counts nothing
    folder = build(tmp_path, write_jsonl(tmp_path / "c.jsonl", rows), transform=version)
    manifest = manifest_of(folder)
    texts = [row for row in dict.fromkeys(rows) if side_of(row, 0.1) == "val"]
    assert manifest["transform"] == version
    assert manifest["val"]["bytes"] == sum(len(" ".join(text.split())) for text in texts)
    side, val = (tg.TokenStream(folder, f"fineweb_{split}") for split in ("val_bytes", "val"))
    good = side.read(0, len(side))
    assert len(side) == len(val) and good.sum() == manifest["val"]["bytes"]
    path = folder / "fineweb_val_bytes_000000.bin"
    edit(path, lambda ids: np.where(np.arange(len(ids)) == 5, ids + 1, ids))
    assert "val_bytes_000000.bin" in failures(folder)[0].what
    edit_manifest(folder, lambda m: m["val_bytes"]["files"][0].pop("sha256"))
    assert failures(folder)[0].problem.startswith("the manifest says" if version == "caseops_v1" else "they differ")
    for change, words in ((lambda ids: np.where(np.arange(len(ids)) == 0, 1, ids), "a BOS has bytes"),
                          (lambda ids: ids * 2, "they differ"), (lambda ids: ids[:-1], "entries for")):
        edit(path, lambda _, c=change: c(good))
        assert words in failures(folder)[0].problem, words


def test_a_table_that_counts_twice_is_refused(made, tmp_path, monkeypatch):
    """The mistake of a dozen submissions: the leading space counted with the piece and again by its flag."""
    right = tg.TokenBytes.build(verify.load_tokenizer(model_of(made)))
    wrong = right._replace(base=right.base + right.leading_space)
    monkeypatch.setattr(verify, "TokenBytes", types.SimpleNamespace(build=lambda _: wrong))
    with pytest.raises(ToolError, match="the score would divide by wrong bytes"):
        build(tmp_path, made.parents[1] / "c.jsonl", tokenizer=model_of(made))
