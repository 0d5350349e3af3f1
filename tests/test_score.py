"""Section 4, Score: bytes of every target, the ledger, and the tokenizer that belongs to the shards."""
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

TEXTS = ["the caf\u00e9 na\u00efve \u4e2d\u6587", "", "\U0001f680", "the \U0001f680 of \U0001f468\u200d\U0001f469 day",
         "", "", "a b c", "x", "\u00df\u0153\u00f8 \u0436\u0437", "of\nthe\tday", "12 34", "e\u0301", ""]
"""Frequent and rare multi-byte characters, emoji (bytes), single letters, empty documents."""


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
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def stream(documents: list[list[int]]) -> np.ndarray:
    return np.array([i for document in documents for i in [BOS, *document]], dtype=np.uint16)


# -- bytes of a target ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_document_has_as_many_bytes_as_its_decoded_text(text, sp):
    ids = sp.encode(text)
    counted = tg.TokenBytes.build(sp).of_targets(stream([ids]))
    assert counted.sum() == len(sp.decode(ids).encode("utf-8"))


def test_the_whole_stream_has_the_bytes_of_all_documents(sp):
    """Also around empty documents, consecutive BOS among them."""
    documents = [sp.encode(text) for text in TEXTS]
    counted = tg.TokenBytes.build(sp).of_targets(stream(documents))
    assert counted.sum() == sum(len(sp.decode(ids).encode("utf-8")) for ids in documents) > 80
    assert counted.shape == (len(stream(documents)) - 1,)


def test_the_tokenizer_of_these_tests_has_bytes_and_pieces_of_several_bytes(sp):
    """Otherwise the tests above would prove little."""
    ids = {i for text in TEXTS for i in sp.encode(text)}
    assert sum(sp.is_byte(i) for i in ids) > 10
    assert any(len(sp.id_to_piece(i).strip(SPACE)) < len(sp.id_to_piece(i).strip(SPACE).encode()) for i in ids)
    assert any(sp.id_to_piece(i) == SPACE for i in ids)


@pytest.mark.parametrize("pieces, expected", [
    (["the"], [3]),
    ([SPACE + "the"], [3]),
    (["the", SPACE + "the"], [3, 4]),
    ([SPACE], [0]),
    (["a", SPACE, "a"], [1, 1, 1]),
    (["a", SPACE, SPACE + "the"], [1, 1, 4]),
    ([SPACE, SPACE, "a"], [0, 1, 1]),
    (["<0xF0>", "<0x9F>", "<0x9A>", "<0x80>", SPACE + "the"], [1, 1, 1, 1, 4]),
    (["<0x20>", "<0xE2>", SPACE], [1, 1, 1]),
    (["<s>", SPACE + "the", "<s>", "<s>", SPACE], [0, 3, 0, 0, 0]),
    (["</s>", SPACE + "the"], [0, 3]),
    (["<pad>", SPACE], [0, 0]),
    (["<unk>", SPACE + "the", "<unk>"], [0, 3, 0]),
    ([SPACE + "caf\u00e9"], [5]),
    (["a", SPACE + "\u4e2d\u6587"], [1, 7]),
])
def test_a_space_is_free_after_a_boundary_and_a_byte_elsewhere(pieces, expected, sp):
    ids = [sp.piece_to_id(piece) for piece in pieces]
    assert [sp.id_to_piece(i) for i in ids] == pieces
    assert tg.TokenBytes.build(sp).of_targets(stream([ids])).tolist() == expected


def slow_bytes(sp: sentencepiece.SentencePieceProcessor, before: int, target: int) -> int:
    """Section 2 of the specification, word by word, for one target."""
    def is_boundary(i: int) -> bool:
        return sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
    if is_boundary(target):
        return 0
    if sp.is_byte(target):
        return 1
    piece = sp.id_to_piece(target)
    if not piece.startswith(SPACE):
        return len(piece.encode("utf-8"))
    return len(piece[1:].encode("utf-8")) + (0 if is_boundary(before) else 1)


def test_any_sequence_of_ids_has_the_bytes_of_the_slow_count(sp):
    ids = np.random.default_rng(0).integers(0, sp.vocab_size(), 5000).astype(np.uint16)
    ids[::9] = BOS
    counted = tg.TokenBytes.build(sp).of_targets(ids)
    assert counted.tolist() == [slow_bytes(sp, b, t) for b, t in zip(ids[:-1].tolist(), ids[1:].tolist())]


def test_validation_has_a_target_for_every_id_but_the_first_and_their_bytes(dataset, run):
    val = tg.ValData.load(tiny(**dataset), run)
    sp = sentencepiece.SentencePieceProcessor(model_file=dataset["tokenizer_path"])
    text = [sp.decode(part.tolist()) for part in np.split(val.ids, val.starts[1:])]
    assert val.num_targets == len(val.ids) - 1 == len(val.target_bytes) and len(text) == 8
    assert int(val.target_bytes.sum()) == sum(len(t.encode("utf-8")) for t in text)


# -- CaseOps -------------------------------------------------------------------------------------------


def caseops(folder: Path, ids: np.ndarray, sides: list[np.ndarray]) -> tg.Config:
    """A validation set with byte side files, and its config: no tokenizer is named."""
    write_shard(folder / "fineweb_val_000000.bin", ids)
    for i, side in enumerate(sides):
        write_shard(folder / f"fineweb_val_bytes_{i:06d}.bin", side)
    return tiny(data_path=str(folder), caseops_enabled=True)


def test_with_caseops_bytes_come_from_the_side_file(tmp_path, run):
    ids, side = np.array([BOS, 5, 6, BOS, 7, 8]), np.array([0, 3, 0, 0, 700, 1])
    val = tg.ValData.load(caseops(tmp_path, ids, np.split(side, [4])), run)
    assert val.target_bytes.tolist() == [3, 0, 0, 700, 1] and val.ids.tolist() == ids.tolist()


@pytest.mark.parametrize("length", [5, 7])
def test_a_side_file_of_another_length_is_refused(length, tmp_path, run):
    cfg = caseops(tmp_path, np.array([BOS, 5, 6, BOS, 7, 8]), [np.ones(length, dtype=np.uint16)])
    with pytest.raises(tg.UserError, match=f"{length} entries for 6 tokens"):
        tg.ValData.load(cfg, run)


def test_a_missing_side_file_is_refused(tmp_path, run):
    with pytest.raises(tg.UserError, match="no fineweb_val_bytes"):
        tg.ValData.load(caseops(tmp_path, np.array([BOS, 5]), []), run)


# -- the tokenizer of the shards -----------------------------------------------------------------------


def test_a_tokenizer_of_another_size_is_refused(model, sp):
    with pytest.raises(tg.UserError, match=f"has {sp.vocab_size()} pieces, VOCAB_SIZE=512") as error:
        tg.TokenBytes.load(model, 512)
    assert str(model) in str(error.value)


def test_a_tokenizer_without_the_bos_of_the_challenge_is_refused(tmp_path):
    other = train_tokenizer(tmp_path / "other.model", bos_id=2, eos_id=1)
    with pytest.raises(tg.UserError, match="BOS has id 2, expected 1"):
        tg.TokenBytes.load(tmp_path / "other.model", other.vocab_size())


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 5000])
def test_a_file_that_is_no_tokenizer_is_one_line(content, tmp_path):
    path = tmp_path / "broken.model"
    path.write_bytes(content)
    with pytest.raises(tg.UserError) as error:
        tg.TokenBytes.load(path, 300)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def with_manifest(folder: Path, manifest: object) -> Path:
    (folder / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    return folder


def test_only_the_tokenizer_that_made_the_shards_is_accepted(model, tmp_path):
    """By SHA-256, whatever the file is called."""
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    cfg = tiny(data_path=str(tmp_path), tokenizer_path=str(model))
    assert tg.tokenizer_path(cfg) == model
    with_manifest(tmp_path, {"tokenizer": {"path": "elsewhere.model", "sha256": digest}})
    assert tg.tokenizer_path(cfg) == model
    with_manifest(tmp_path, {"tokenizer": {"sha256": "0" * 64}})
    with pytest.raises(tg.UserError) as error:
        tg.tokenizer_path(cfg)
    message = str(error.value)
    assert all(part in message for part in (str(model), str(tmp_path), "TOKENIZER_PATH"))
    assert "\n" not in message


def test_the_manifest_names_the_tokenizer_unless_the_user_does(model, tmp_path):
    (tmp_path / "own.model").write_bytes(model.read_bytes())
    with_manifest(tmp_path, {"tokenizer": {"path": "own.model"}})
    assert tg.tokenizer_path(tiny(data_path=str(tmp_path))) == tmp_path / "own.model"
    assert tg.tokenizer_path(tiny(data_path=str(tmp_path), tokenizer_path=str(model))) == model


def test_without_a_manifest_the_tokenizer_is_found_by_its_size(model, tmp_path):
    (tmp_path / "tokenizers").mkdir()
    path = tmp_path / "tokenizers" / "fineweb_512_bpe.model"
    with pytest.raises(tg.UserError, match="fineweb_512_bpe.model: no such tokenizer; set TOKENIZER_PATH"):
        tg.tokenizer_path(tiny(data_dir=str(tmp_path)))
    path.write_bytes(model.read_bytes())
    assert tg.tokenizer_path(tiny(data_dir=str(tmp_path))) == path


@pytest.mark.parametrize("text", ["[]", "{", "\x00", '{"tokenizer": 3}', '{"tokenizer": {"path": 3}}'])
def test_a_manifest_of_another_form_is_one_line(text, model, tmp_path):
    cfg = tiny(data_path=str(with_manifest(tmp_path, text)), tokenizer_path=str(model))
    with pytest.raises(tg.UserError, match="manifest.json: .*; prepare the dataset again"):
        tg.tokenizer_path(cfg)


# -- score and ledger ----------------------------------------------------------------------------------


def test_bits_per_byte_are_nats_in_bits_over_bytes(run):
    """Of 4,000 nats over 1,000 tokens of 3,000 bytes; and one bit a byte is 1."""
    for nats, size, loss, bpb in ((4.0, 3, 4.0, 4 / math.log(2) / 3), (math.log(2), 1, math.log(2), 1.0)):
        ledger = ledger_of(1000)
        ledger.record(torch.arange(1000), torch.full((1000,), nats))
        score = ledger.close(np.full(1000, size), run)[0]
        assert score[1:3] == (1000, 1000 * size) and score[3:] == pytest.approx((loss, bpb), rel=1e-6)


def ledger_of(num_targets: int) -> tg.Ledger:
    """A ledger whose events say that plain weights scored everything at once."""
    ledger = tg.Ledger(num_targets, np.array([0]))
    ledger.note(tg.Ledger.SCORE, tg.Ledger.BASE, 0, num_targets)
    return ledger


def test_a_second_write_is_refused():
    ledger = ledger_of(4)
    ledger.record(torch.tensor([0, 2]), torch.tensor([1.0, 2.0]))
    with pytest.raises(AssertionError, match="twice"):
        ledger.record(torch.tensor([1, 2]), torch.tensor([1.0, 0.5]))


def test_a_gap_is_refused(run):
    ledger = ledger_of(4)
    ledger.record(torch.tensor([0, 3, 1]), torch.ones(3))
    with pytest.raises(AssertionError, match="1 targets"):
        ledger.close(np.ones(4, dtype=np.int32), run)


def test_a_target_scored_by_two_ranks_is_refused(run, monkeypatch):
    ledger = ledger_of(3)
    ledger.record(torch.arange(3), torch.ones(3))
    monkeypatch.setattr(run, "all_reduce", lambda t: t + torch.tensor([0, 1, 0]).to(t.dtype))
    with pytest.raises(AssertionError, match="1 targets"):
        ledger.close(np.ones(3, dtype=np.int32), run)


def test_the_total_does_not_depend_on_the_order_of_scoring(run):
    """Bit for bit, with losses of very different size."""
    nats, size = 20 * torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 9, np.full(1000, 3)
    totals = set()
    for seed in range(3):
        ledger = ledger_of(1000)
        for part in torch.randperm(1000, generator=torch.Generator().manual_seed(seed)).split(77):
            ledger.record(part, nats[part])
        totals.add(ledger.close(size, run)[0])
    (score,) = totals
    assert score.nats == pytest.approx(math.fsum(nats.tolist()), rel=1e-13) and score[1:3] == (1000, 3000)


def test_bytes_are_summed_without_overflow(run):
    ledger = ledger_of(2)
    ledger.record(torch.arange(2), torch.ones(2))
    assert ledger.close(np.full(2, 2 ** 31 - 1, dtype=np.int32), run)[0].bytes == 2 ** 32 - 2


@pytest.mark.parametrize("nats, size, message", [(math.nan, 1, "not finite"), (math.inf, 1, "not finite"),
                                                 (1.0, 0, "no bytes of text")])
def test_a_score_that_means_nothing_is_refused(nats, size, message, run):
    ledger = ledger_of(1)
    ledger.record(torch.tensor([0]), torch.tensor([nats]))
    with pytest.raises(tg.UserError, match=message):
        ledger.close(np.array([size]), run)


def test_a_target_twice_in_one_call_is_refused():
    with pytest.raises(AssertionError):
        ledger_of(2).record(torch.tensor([0, 0]), torch.ones(2))


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
