"""Files of strangers: what once broke a reader, valid ones, and that the fuzzer notices a reader that breaks."""
import sys
from pathlib import Path

import numpy as np
import pytest

import train_gpt as tg
from tests.stress import fuzz


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_every_valid_file_is_accepted_and_the_corpus_breaks_nothing(name: str, tmp_path: Path):
    """Within the fuzzer's bounds of memory and time; a refusal is one line."""
    seeds = fuzz.TARGETS[name].seeds()
    assert fuzz.judge(name, seeds[0], tmp_path)[0] == "accepted"
    for data in seeds[1:] + [path.read_bytes() for path in sorted((fuzz.CORPUS / name).glob("*"))]:
        fuzz.judge(name, data, tmp_path)


def test_the_corpus_belongs_to_targets():
    folders = {path.parent.name for path in fuzz.CORPUS.rglob("*") if path.is_file()}
    assert folders and folders <= set(fuzz.TARGETS)


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
        assert first == second and all(seed != data for seed, data in first)


def test_an_unknown_target_is_one_line():
    with pytest.raises(tg.UserError, match="^tokeniser: no such target; expected some of artifact, "):
        fuzz.main(["tokeniser"])


# -- there and back -------------------------------------------------------------------------------------
