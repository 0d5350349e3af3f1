"""Section 4, Score: bytes of every target, the ledger, and the tokenizer that belongs to the shards."""
import contextlib
import hashlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import tiny, write_shard

import train_gpt as tg

BOS = tg.BOS_ID
SPACE = "\u2581"

# Frequent and rare multi-byte characters, emoji (bytes), single letters, empty documents.
TEXTS = ["the caf\u00e9 na\u00efve \u4e2d\u6587", "", "\U0001f680", "the \U0001f680 of \U0001f468\u200d\U0001f469 day",
         "", "", "a b c", "x", "\u00df\u0153\u00f8 \u0436\u0437", "of\nthe\tday", "12 34", "e\u0301", ""]


def train_tokenizer(path: Path, **options: object) -> sentencepiece.SentencePieceProcessor:
    """A model with pieces of several bytes: one for each of the frequent characters, bytes for the others."""
    text = ["the caf\u00e9 na\u00efve \u4e2d\u6587 text of the day"] * 20 + ["of the\u00e9 a b c x"]
    model, defaults = io.BytesIO(), dict(
        model_type="bpe", vocab_size=300, byte_fallback=True, split_digits=True, add_dummy_prefix=False, bos_id=1,
        normalization_rule_name="nmt_nfkc", character_coverage=1.0, pad_id=0, eos_id=2, unk_id=3,
        hard_vocab_limit=False, num_threads=1, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **defaults | options)
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "words.model"
    train_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def sp(model: Path) -> sentencepiece.SentencePieceProcessor:
    return tg.load_sentencepiece(model)


def test_documents_have_as_many_bytes_as_their_decoded_text(sp):
    """Each alone, and all together around empty documents, consecutive BOS among them."""
    documents, table = [np.array([BOS, *sp.encode(text)], dtype=np.uint16) for text in TEXTS], tg.TokenBytes.build(sp)
    sizes, ids = [len(sp.decode(ids.tolist()).encode("utf-8")) for ids in documents], np.concatenate(documents)
    assert [table.of_targets(ids).sum() for ids in documents] == sizes
    counted = table.of_targets(ids)
    assert counted.sum() == sum(sizes) > 80 and counted.shape == (len(ids) - 1,)
    seen = set(ids.tolist())  # else the above would prove little
    assert sum(sp.is_byte(i) for i in seen) > 10 and sp.piece_to_id(SPACE) in seen
    assert any(not sp.is_byte(i) and not sp.id_to_piece(i).strip(SPACE).isascii() for i in seen)


def slow_bytes(sp: sentencepiece.SentencePieceProcessor, before: int, target: int) -> int:
    """The rule, word by word, for one target."""
    after, bare = (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in (before, target))
    if bare or sp.is_byte(target):
        return int(not bare)
    piece = sp.id_to_piece(target)
    return len(piece.replace(SPACE, " ", 1).encode("utf-8")) - (piece.startswith(SPACE) and after)


def test_any_sequence_of_ids_has_the_bytes_of_the_slow_count(sp):
    """And a few by hand: a space is free after a boundary and a byte elsewhere."""
    table, ids = tg.TokenBytes.build(sp), np.random.default_rng(0).integers(0, sp.vocab_size(), 20_000).astype("uint16")
    ids[::9] = BOS
    counted = table.of_targets(ids).tolist()
    assert counted == [slow_bytes(sp, b, t) for b, t in zip(ids[:-1].tolist(), ids[1:].tolist())]
    pieces = f"<s> {SPACE} {SPACE}the <0x20> {SPACE} </s> {SPACE}caf\u00e9 <pad> <unk> {SPACE}the".split()
    by_hand = np.array([sp.piece_to_id(piece) for piece in pieces], dtype=np.uint16)
    assert table.of_targets(by_hand).tolist() == [0, 4, 1, 1, 0, 5, 0, 0, 3]


@pytest.mark.parametrize("cuts, sizes, problem", [
    ([], 8, ""), ([4], 8, ""), ([2, 5], 8, ""), ([4], 7, "7 entries for 8 tokens"), ([], 9, "9 entries for 8 tokens"),
    ([], 0, "no fineweb_val_bytes")])
def test_documents_may_cross_shards_and_with_caseops_bytes_come_from_a_side_file(cuts, sizes, problem, tmp_path, run):
    """No tokenizer is named; the first shard may lack its BOS; the side file is as long as the stream."""
    ids, side = np.array([5, 6, BOS, 7, 8, 9, BOS, 4]), np.arange(sizes)
    for name, values in (("", ids), ("_bytes", side)):
        for i, part in enumerate(np.split(values, cuts) if len(values) else []):
            write_shard(tmp_path / f"fineweb_val{name}_{i:06d}.bin", part)
    cfg = tiny(data_path=str(tmp_path), caseops_enabled=True)
    with pytest.raises(tg.UserError, match=problem) if problem else contextlib.nullcontext():
        tg.open_validation(cfg)
        val = tg.ValData.load(cfg, run)
        assert val.ids.tolist() == ids.tolist() and val.starts.tolist() == [0, 2, 6] and val.stops.tolist() == [2, 6, 7]
        assert val.target_bytes.tolist() == side[1:].tolist()


@pytest.mark.parametrize("kind", ["", "_bytes"])
def test_validation_is_scored_on_the_files_that_the_manifest_lists(kind, tmp_path, run):
    paths = [tmp_path / f"fineweb_val{of}_000000.bin" for of in ("", "_bytes")]
    for path in paths:
        write_shard(path, np.array([BOS, 5, 6, 7]))
    listed = [{"name": path.name, "sha256": tg.file_sha256(path)} for path in paths]
    (tmp_path / "manifest.json").write_text(json.dumps({"transform": "caseops_v1", "val": {"files": listed}}))
    cfg = tiny(data_path=str(tmp_path), caseops_enabled=True)
    assert tg.ValData.load(cfg, run).num_targets == 3
    write_shard(tmp_path / f"fineweb_val{kind}_000000.bin", np.array([BOS, 5, 7, 6]))
    with pytest.raises(tg.UserError, match=f"fineweb_val{kind}_000000.bin: not the file that .*manifest.json lists"):
        tg.ValData.load(cfg, run)


def test_what_is_no_tokenizer_or_one_of_another_size_or_bos_is_refused_in_one_line(model, sp, tmp_path):
    with pytest.raises(tg.UserError, match=f"{model}: .* has {sp.vocab_size()} pieces, VOCAB_SIZE=512"):
        tg.load_sentencepiece(model, 512)
    other = train_tokenizer(tmp_path / "other.model", bos_id=2, eos_id=1)
    with pytest.raises(tg.UserError, match="BOS has id 2, expected 1"):
        tg.load_sentencepiece(tmp_path / "other.model", other.vocab_size())
    for content in (b"", b"not a model", b"\x00" * 5000):
        (tmp_path / "broken.model").write_bytes(content)
        with pytest.raises(tg.UserError, match="^.*broken.model: .*$"):
            tg.load_sentencepiece(tmp_path / "broken.model", 300)


def test_only_the_tokenizer_that_made_the_shards_is_accepted(model, tmp_path):
    """By SHA-256, whatever the file is called; the manifest names it unless the user does. Without one, by its size."""
    cfg, own = tiny(data_path=str(tmp_path), tokenizer_path=str(model)), tmp_path / "own.model"
    assert tg.tokenizer_path(cfg) == model
    with pytest.raises(tg.UserError, match="fineweb_512_bpe.model: no such tokenizer; set TOKENIZER_PATH"):
        tg.tokenizer_path(tiny(data_dir=str(tmp_path)))
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers/fineweb_512_bpe.model").touch()
    assert tg.tokenizer_path(tiny(data_dir=str(tmp_path))) == tmp_path / "tokenizers/fineweb_512_bpe.model"
    own.write_bytes(model.read_bytes())
    made_with = {"path": own.name, "sha256": hashlib.sha256(model.read_bytes()).hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": made_with}))
    assert tg.tokenizer_path(cfg) == model and tg.tokenizer_path(tiny(data_path=str(tmp_path))) == own
    own.write_bytes(b"another")
    with pytest.raises(tg.UserError, match=f"{own}: not the tokenizer that the shards in {tmp_path} .*TOKENIZER_PATH"):
        tg.tokenizer_path(tiny(data_path=str(tmp_path)))


def test_a_score_is_tied_to_validation_shards_and_tokenizer_wherever_they_lie(model, tmp_path):
    digests = []
    for folder, ids, tokenizer in (("a", [BOS, 5], model), ("b", [BOS, 5], tmp_path / "copy.model"),
                                   ("c", [BOS, 6], model), ("d", [BOS, 5], tmp_path / "other.model")):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "fineweb_val_000000.bin", np.array(ids))
        (tmp_path / "copy.model").write_bytes(model.read_bytes())
        (tmp_path / "other.model").write_bytes(model.read_bytes() + b"\0")
        cfg = tiny(data_path=str(tmp_path / folder), tokenizer_path=str(tokenizer))
        digests.append(tg.validation_digest(cfg))
    assert digests[0] == digests[1] and len(set(digests)) == 3


@pytest.mark.parametrize("text", ["[]", "{", "\x00", '{"tokenizer": 3}', '{"tokenizer": {"path": 3}}',
                                  '{"val": {"files": [null]}}'])
def test_a_manifest_of_another_form_is_one_line(text, model, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(tg.UserError, match="manifest.json: .*; prepare the dataset again"):
        tg.tokenizer_path(tiny(data_path=str(tmp_path), tokenizer_path=str(model)))
        tg.open_validation(tiny(data_path=str(tmp_path), tokenizer_path=str(model)))


def ledger_of(num_targets: int) -> tg.Ledger:
    """A ledger whose events say that plain weights scored everything at once."""
    ledger = tg.Ledger(num_targets, np.array([0]))
    ledger.note(tg.Ledger.SCORE, tg.Ledger.BASE, 0, num_targets)
    return ledger


@pytest.mark.parametrize("targets", [[1, 1], [2, 0]])
def test_a_second_write_is_refused(targets):
    """In one call, and of what an earlier one wrote."""
    ledger = ledger_of(4)
    ledger.record(torch.tensor([0, 3]), torch.ones(2))
    with pytest.raises(AssertionError, match="twice"):
        ledger.record(torch.tensor(targets), torch.ones(2))


@pytest.mark.parametrize("others, nats, size, error, message", [
    ([0, 0, 0], 1, 1, AssertionError, "1 targets"), ([1, 1, 1], 1, 1, AssertionError, "2 targets"),
    ([0, 1, 0], math.nan, 1, tg.UserError, "not finite"), ([0, 1, 0], math.inf, 1, tg.UserError, "not finite"),
    ([0, 1, 0], 1, 0, tg.UserError, "no bytes of text")])
def test_a_gap_a_target_scored_by_two_ranks_and_a_score_that_means_nothing_are_refused(
        others, nats, size, error, message, run, monkeypatch):
    """`others`: how often the other ranks scored each target; this one scored the first and the last."""
    ledger = ledger_of(3)
    ledger.record(torch.tensor([0, 2]), torch.tensor([1, nats]))
    monkeypatch.setattr(run, "all_reduce", lambda t: t if t.dtype.is_floating_point else t + torch.tensor(others))
    with pytest.raises(error, match=message):
        ledger.close(np.full(3, size), run)


@pytest.mark.parametrize("size", [3, 2 ** 31 - 1])
def test_a_score_is_nats_in_bits_over_bytes_to_the_bit_whatever_the_order(size: int, run):
    """With losses of very different size; bytes are summed without overflow."""
    nats, totals = 20 * torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 9, set()
    for seed in range(3):
        ledger = ledger_of(1000)
        for part in torch.randperm(1000, generator=torch.Generator().manual_seed(seed)).split(77):
            ledger.record(part, nats[part])
        totals.add(ledger.close(np.full(1000, size, dtype=np.int32), run)[0])
    (score,), total, many = totals, math.fsum(nats.tolist()), 1000 * size
    assert score == pytest.approx((total, 1000, many, total / 1000, total / math.log(2) / many), rel=1e-13)


def test_a_score_is_taken_apart_by_position_and_length():
    """Against a loop over targets, with a document of one target and one that ends the stream."""
    rng = np.random.default_rng(0)
    starts, total = np.array([0, 1, 4, 20, 21]), 90
    nats, size = rng.random(total).astype(np.float32), rng.integers(0, 9, total).astype(np.uint16)
    places = tg.by_place(nats, size, tg.ValData(np.zeros(total + 1), starts, size))
    expected = {what: np.zeros((3, 7)) for what in places}
    for begin, end in zip(starts, [*starts[1:], total]):
        for t in range(begin, end):
            for what, n in (("position", t - begin + 1), ("length", end - begin)):
                k = int(n).bit_length() - 1
                expected[what][:, k] += 1, nats[t], size[t]
    for what in places:
        assert np.allclose([places[what][name] for name in ("targets", "nats", "bytes")], expected[what])
