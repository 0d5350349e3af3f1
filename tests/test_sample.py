"""Samples come through the trainer's one forward: the cache changes nothing, the seed decides, and all is text."""
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt as tg
from data.caseops import TRANSFORMS
from tools import sample


@pytest.fixture(scope="module")
def writer(single: Path) -> sample.Writer:
    """Of the finished tiny run: a loop, two lanes, skips, gates; a context of 32 ids."""
    return sample.Writer(*sample.find(str(single / "r.bin"), {"DTYPE": "float32"}))


def test_the_cache_gives_the_distribution_of_a_full_forward(writer: sample.Writer):
    """Id by id after a prompt at once, with every logit and with the likeliest three."""
    rng, model, cfg = torch.Generator().manual_seed(0), writer.model, writer.cfg
    ids = [tg.BOS_ID, *torch.randint(3, cfg.vocab_size, (20,), generator=rng).tolist()]
    cache, (batch,) = tg.KeyValueCache(cfg.eval_seq_len), [tg.make_batch([tg.np.array([*ids, 0])], 1, len(ids))]
    with torch.no_grad():
        w = tg.Weights(model, writer.run.dtype)
        hidden = model(batch, tg.unroll_layers(cfg, looped=True), w)[0]
        logits = w.linear("head", None, hidden).double()
        logits = cfg.logit_softcap * torch.tanh(logits / cfg.logit_softcap)
    for count in (8, *range(9, len(ids) + 1)):
        top = 0 if count % 2 else 3
        wanted = (logits[count - 1] / 0.7).softmax(0)
        if top:
            kept = wanted >= wanted.topk(top).values[-1]
            wanted = wanted * kept / wanted[kept].sum()
        shares = writer.shares(ids[:count], cache, 0.7, top)
        torch.testing.assert_close(shares, wanted, rtol=1e-4, atol=1e-7)
        assert (shares > 0).sum() == (top or cfg.vocab_size)
    assert writer.shares(ids, tg.KeyValueCache(32), 0, 40).argmax() == logits[-1].argmax()


def test_the_seed_decides(writer: sample.Writer):
    def text(**options: float) -> str:
        return "".join(writer.text("def ", length=30, **options))

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(seed=1, temperature=0) == text(seed=2, temperature=0) == text(seed=3, top_k=1)
    assert "".join(writer.text("def x", length=0)) == "def x"


def test_a_long_prompt_is_read_in_parts(writer: sample.Writer):
    """Over three contexts of ids: it is printed whole, and something follows."""
    prompt = " ".join(f"word{i}" for i in range(40))
    text = "".join(writer.text(prompt, length=5, seed=3))
    assert len(writer.sp.encode(prompt)) > 3 * writer.cfg.eval_seq_len and text.startswith(prompt)


def drawn(writer: sample.Writer, ids: list[int], monkeypatch) -> list[str]:
    """What is shown where the model draws these ids, and then the end of the document."""
    left = iter([*ids, tg.BOS_ID])
    certain = torch.eye(writer.cfg.vocab_size, dtype=torch.float64)

    def shares(self, ids, cache, *how):
        cache.advance(len(ids) - cache.length)
        return certain[next(left)]

    monkeypatch.setattr(sample.Writer, "shares", shares)
    return [word for word in writer.text() if word]


def test_only_whole_characters_are_shown(writer: sample.Writer, monkeypatch):
    """Byte pieces become characters, the mark becomes a space; half a character at the end is left out."""
    def spelt(data: bytes) -> list[int]:
        return [writer.sp.piece_to_id(f"<0x{byte:02X}>") for byte in data]

    ids = [*writer.sp.encode("if x"), *spelt("é☃\x1b".encode()), *writer.sp.encode("or y"), *spelt("☃".encode()[:2])]
    words = drawn(writer, ids, monkeypatch)
    assert words == ["if", " xé☃\ufffdor", " y"]


def test_case_operators_become_capitals(writer: sample.Writer, monkeypatch):
    """Word by word; one that stands where none belongs, or that the end cuts off from its letter, is left out."""
    v2 = TRANSFORMS["caseops_v2"]
    said = v2.encode("We say NASA has an iPhone. ") + "x" + v2.operators[1] + "7 end" + v2.operators[0]
    letters = sorted({*said, "?"})
    table = SimpleNamespace(encode=lambda text: [], decode=lambda ids: "".join(letters[i - 2] for i in ids))
    monkeypatch.setattr(writer, "transform", v2)
    monkeypatch.setattr(writer, "sp", table)
    words = drawn(writer, [letters.index(c) + 2 for c in said], monkeypatch)
    assert "".join(words) == "We say NASA has an iPhone. x7 end" and {"We", " NASA", " an", " i", "Phone."} <= {*words}


def test_short_samples(single: Path):
    """From the run's own log, as a program asks for them."""
    found = sample.samples(single / "r.bin", ("def", "The"), characters=20)
    assert [text[:3] for text in found] == ["def", "The"] and all(3 < len(text) <= 20 for text in found)


def test_a_run_id_and_an_artifact_alone(single: Path, dataset: dict[str, str], tmp_path: Path, monkeypatch, called):
    """A prompt that is no UTF-8 is read; where there is no log, the tokenizer must be given."""
    shutil.copy(single / "r.bin", tmp_path / "alone.bin")
    monkeypatch.setenv("LOG_DIR", str(single))
    arguments = [b"if \xff".decode(errors="surrogateescape"), "LENGTH=9", "SEED=3", "TEMPERATURE=0.5"]
    status, out, err = called(sample.main, "sample", "r", *arguments)
    assert (status, err) == (0, "") and out.startswith("if ?") and len(out) > 5
    alone = tmp_path / "alone.bin"
    status, _, err = called(sample.main, "sample", alone, *arguments)
    assert status == 2 and "no dataset in data/datasets has" in err and err.count("\n") == 1
    status, out, _ = called(sample.main, "sample", alone, *arguments, f"TOKENIZER_PATH={dataset['tokenizer_path']}")
    assert status == 0 and out.startswith("if ?")


@pytest.mark.parametrize("arguments, expected", [
    ([], "expected RUN"), (["nowhere"], "nowhere: no such log"), (["{run}", "a", "b"], "b: expected one prompt"),
    (["{run}", "TEMPERATURE=-1"], "TEMPERATURE=-1: expected a number, 0 or more"),
    (["{run}", "TOP_K=2.5"], "TOP_K=2.5: expected a whole number"), (["{run}", "SEED="], "SEED=: expected a whole"),
    (["{run}", "TEMPRATURE=1"], "TEMPRATURE: no such knob; did you mean TEMPERATURE?"),
    (["{run}", "CASEOPS_ENABLED=1"], "which case operators the run had"), (["{run}", "VOCAB_SIZE=7"], "VOCAB_SIZE=7:"),
    (["{log}"], "other.bin: no such artifact")])
def test_bad_input_is_one_line(arguments: list[str], expected: str, single: Path, tmp_path: Path, called):
    (tmp_path / "other.jsonl").write_text((single / "r.jsonl").read_text())
    places = {"{run}": str(single / "r.bin"), "{log}": str(tmp_path / "other.jsonl")}
    status, out, err = called(sample.main, "sample", *(places.get(argument, argument) for argument in arguments))
    assert (status, out) == (2, "") and expected in err and err.count("\n") == 1
