"""Files of strangers: what once broke a reader, valid ones, and that the fuzzer notices a reader that breaks."""
import dataclasses
import sys
import tempfile
from pathlib import Path
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import train_gpt as tg
from data import text
from tests.stress import fuzz


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_every_valid_file_is_accepted_and_the_corpus_breaks_nothing(name: str, tmp_path: Path):
    """Within the fuzzer's bounds of memory and time; a refusal is one line."""
    seeds = fuzz.TARGETS[name].seeds()
    assert fuzz.judge(name, seeds[0], tmp_path)[0] == "accepted"
    for data in seeds[1:] + [path.read_bytes() for path in sorted((fuzz.CORPUS / name).glob("*"))]:
        fuzz.judge(name, data, tmp_path)


def test_the_corpus_is_small_and_belongs_to_targets():
    files = [path for path in fuzz.CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} <= set(fuzz.TARGETS)
    assert 5 < len(files) and sum(path.stat().st_size for path in files) < 200_000


def test_a_folders_config_sets_knobs_alone(tmp_path: Path):
    """Loaders and interpreters obey other names."""
    for line in (b"a[$(touch ran)]=1", b"LD_PRELOAD=/x.so", b"PYTHONPATH=.", b"PATH=.", b"SEED", b"SEED=1\nBASH_ENV=x",
                 b"-v a=1", b"A=1", b"SEED=1\n" * 10_000, b"\xff\xfe=\x00"):
        outcome, said = fuzz.judge("config", line, tmp_path)
        assert outcome == "refused" and "config.env" in said
    for line in (b"SEED=$(touch ran)", b"# no\n\nSEED=1\nTTT_ENABLED=0", b"SEED=2"):
        outcome, values = fuzz.judge("config", line, tmp_path)
        assert outcome == "accepted" and values["SEED"] == line.split(b"SEED=")[1].split(b"\n")[0].decode()


@pytest.mark.parametrize("reader, said", [
    (lambda data, folder: {}["x"], "KeyError"), (lambda data, folder: tg.require(False, "two\nlines"), "one line"),
    (lambda data, folder: np.ones(1 << 24).sum(), "MiB"),
    (lambda data, folder: sum(range(10 ** 6)), "s for"), (lambda data, folder: sys.exit(0), "SystemExit")],
    ids=["another exception", "two lines", "memory", "time", "exit"])
def test_the_fuzzer_notices(reader: object, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if said == "MiB" and not fuzz.peak():
        pytest.skip("this system does not tell peak memory")
    monkeypatch.setitem(fuzz.TARGETS, "planted", fuzz.Target(lambda data, folder: None, lambda: [b""]))
    assert fuzz.judge("planted", b"", tmp_path) == ("accepted", None)
    monkeypatch.setitem(fuzz.TARGETS, "planted", fuzz.Target(reader, lambda: [b""]))
    monkeypatch.setattr(fuzz, "SECONDS", 1e-3 if said == "s for" else fuzz.SECONDS)
    with pytest.raises(BaseException) as error:
        fuzz.judge("planted", b"", tmp_path)
    assert said in f"{error.type.__name__} {error.value}"


def test_mutants_are_the_same_in_every_run_and_never_the_seed():
    for name in ("artifact", "submission"):
        first, second = (list(fuzz.mutants(name, 40)) for _ in range(2))
        assert first == second and all(seed != data for seed, data, _ in first)
        assert sum(sealed for *_, sealed in first) == (20 if fuzz.TARGETS[name].sealed else 0)


def test_a_mutant_under_its_old_checksum_is_refused(tmp_path: Path):
    for name in ("artifact", "shard"):
        seed = fuzz.TARGETS[name].seal(fuzz.TARGETS[name].seeds()[0])
        assert fuzz.judge(name, seed, tmp_path, sealed=True)[0] == "accepted"
        assert all(fuzz.judge(name, data, tmp_path, sealed=True)[0] == "refused"
                   for _, data, sealed in fuzz.mutants(name, 40) if sealed)


def test_an_unknown_target_is_one_line():
    with pytest.raises(tg.UserError, match="^tokeniser: no such target; expected some of artifact, "):
        fuzz.main(["tokeniser"])


# -- there and back -------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(shape=st.sampled_from([dict(), dict(num_kv_heads=2, attn_gate="dense", num_layers=3, mlp_mult=1.5),
                                         dict(bigram_buckets=0, smear_gate_enabled=False, skip_gates_enabled=False)]),
                  states=st.sampled_from([1, 4]), coders=st.sampled_from([("range",), ("range", "brotli")]),
                  scale=st.floats(1e-6, 1e3), seed=st.integers(0, 99))
def test_any_tensors_come_back_from_an_artifact(shape: dict, states: int, coders: tuple, scale: float, seed: int):
    model = dataclasses.replace(fuzz.SMALL, **shape)
    tensors = fuzz.some_tensors(model, states, seed)
    found = tg.unpack(tg.pack(tg.pack_streams(tensors, states, coders), scale, states, model, "demo"))
    assert (found.model, found.preset) == (model, "demo")
    assert list(found.tensors) == list(tensors)
    assert all(torch.equal(found.tensors[name], q.dequantize(scale)) for name, q in tensors.items())


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(documents=st.lists(st.lists(st.integers(2, 65_535), max_size=30), min_size=1, max_size=12),
                  shard_tokens=st.integers(1, 90))
def test_any_documents_come_back_from_shards(documents: list[list[int]], shard_tokens: int):
    """As one stream with its document starts, however they are cut into shards; and every file has its digest."""
    parts = [np.array([tg.BOS_ID, *ids], dtype=np.uint16) for ids in documents]
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.object(text, "SHARD_TOKENS", shard_tokens):
            writer = text.ShardWriter(Path(folder), "train")
            for part in parts:
                writer.write(part)
            listed = writer.finish()
        stream = tg.TokenStream(Path(folder), "fineweb_train")
        assert stream.read(0, len(stream)).tolist() == np.concatenate(parts).tolist()
        assert np.diff([*stream.document_starts(), len(stream)]).tolist() == [len(part) for part in parts]
        assert [(p.name, len(s), tg.file_sha256(p)) for p, s in zip(stream.paths, stream.shards)] == [
            (entry["name"], entry["tokens"], entry["sha256"]) for entry in listed]
