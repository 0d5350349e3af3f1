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


def stream(documents: list[list[int]]) -> np.ndarray:
    return np.array([i for document in documents for i in [BOS, *document]], dtype=np.uint16)


def test_documents_have_as_many_bytes_as_their_decoded_text(sp):
    """Each alone, and all together around empty documents, consecutive BOS among them."""
    documents, table = [sp.encode(text) for text in TEXTS], tg.TokenBytes.build(sp)
    sizes = [len(sp.decode(ids).encode("utf-8")) for ids in documents]
    assert [table.of_targets(stream([ids])).sum() for ids in documents] == sizes
    counted = table.of_targets(stream(documents))
    assert counted.sum() == sum(sizes) > 80 and counted.shape == (len(stream(documents)) - 1,)
    seen = {i for ids in documents for i in ids}  # else the above would prove little
    assert sum(sp.is_byte(i) for i in seen) > 10 and sp.piece_to_id(SPACE) in seen
    assert any(not sp.is_byte(i) and not sp.id_to_piece(i).strip(SPACE).isascii() for i in seen)


@pytest.mark.parametrize("pieces, expected", [
    (["the", SPACE + "the"], [3, 4]), ([SPACE + "the"], [3]), (["a", SPACE, SPACE + "the"], [1, 1, 4]),
    ([SPACE, SPACE, "a"], [0, 1, 1]), (["<0xF0>", "<0x9F>", "<0x9A>", "<0x80>", SPACE + "the"], [1, 1, 1, 1, 4]),
    (["<0x20>", "<0xE2>", SPACE], [1, 1, 1]), (["<s>", SPACE + "the", "<s>", "<s>", SPACE], [0, 3, 0, 0, 0]),
    (["</s>", SPACE + "the"], [0, 3]), (["<pad>", SPACE], [0, 0]), (["<unk>", SPACE + "the", "<unk>"], [0, 3, 0]),
    ([SPACE + "caf\u00e9"], [5]), (["a", SPACE + "\u4e2d\u6587"], [1, 7])])
def test_a_space_is_free_after_a_boundary_and_a_byte_elsewhere(pieces, expected, sp):
    ids = [sp.piece_to_id(piece) for piece in pieces]
    assert [sp.id_to_piece(i) for i in ids] == pieces
    assert tg.TokenBytes.build(sp).of_targets(stream([ids])).tolist() == expected


def slow_bytes(sp: sentencepiece.SentencePieceProcessor, before: int, target: int) -> int:
    """The rule, word by word, for one target."""
    boundary = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in (before, target)]
    if boundary[1]:
        return 0
    if sp.is_byte(target):
        return 1
    piece = sp.id_to_piece(target)
    free_space = piece.startswith(SPACE) and boundary[0]
    return len(piece.replace(SPACE, " ", 1).encode("utf-8")) - free_space


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


@pytest.mark.parametrize("side, problem", [
    ([0, 3, 0, 0, 700, 1], ""), ([1] * 5, "5 entries for 6 tokens"), ([1] * 7, "7 entries for 6 tokens"),
    ([], "no fineweb_val_bytes")])
def test_with_caseops_bytes_come_from_a_side_file_of_the_same_length(side, problem, tmp_path, run):
    """No tokenizer is named."""
    write_shard(tmp_path / "fineweb_val_000000.bin", np.array([BOS, 5, 6, BOS, 7, 8]))
    for i, part in enumerate(np.split(np.array(side), [4])):
        if len(side):
            write_shard(tmp_path / f"fineweb_val_bytes_{i:06d}.bin", part)
    cfg = tiny(data_path=str(tmp_path), caseops_enabled=True)
    with pytest.raises(tg.UserError, match=problem) if problem else contextlib.nullcontext():
        tg.open_validation(cfg)
        assert tg.ValData.load(cfg, run).target_bytes.tolist() == side[1:]


@pytest.mark.parametrize("cuts", [[], [4], [2, 5]])
def test_documents_may_run_on_into_the_next_shard_and_the_first_may_lack_its_bos(cuts, tmp_path, run):
    ids = np.array([5, 6, BOS, 7, 8, 9, BOS, 4])
    for i, (part, sizes) in enumerate(zip(np.split(ids, cuts), np.split(np.arange(8), cuts))):
        write_shard(tmp_path / f"fineweb_val_{i:06d}.bin", part)
        write_shard(tmp_path / f"fineweb_val_bytes_{i:06d}.bin", sizes)
    val = tg.ValData.load(tiny(data_path=str(tmp_path), caseops_enabled=True), run)
    assert val.ids.tolist() == ids.tolist() and val.starts.tolist() == [0, 2, 6] and val.stops.tolist() == [2, 6, 7]
    assert val.target_bytes.tolist() == [1, 2, 3, 4, 5, 6, 7]


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


def test_a_tokenizer_of_another_size_or_without_the_bos_of_the_challenge_is_refused(model, sp, tmp_path):
    with pytest.raises(tg.UserError, match=f"{model}: .* has {sp.vocab_size()} pieces, VOCAB_SIZE=512"):
        tg.load_sentencepiece(model, 512)
    other = train_tokenizer(tmp_path / "other.model", bos_id=2, eos_id=1)
    with pytest.raises(tg.UserError, match="BOS has id 2, expected 1"):
        tg.load_sentencepiece(tmp_path / "other.model", other.vocab_size())


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 5000])
def test_a_file_that_is_no_tokenizer_is_one_line(content, tmp_path):
    (tmp_path / "broken.model").write_bytes(content)
    with pytest.raises(tg.UserError, match="^.*broken.model: .*$"):
        tg.load_sentencepiece(tmp_path / "broken.model", 300)


def test_only_the_tokenizer_that_made_the_shards_is_accepted(model, tmp_path):
    """By SHA-256, whatever the file is called; the manifest names it unless the user does."""
    cfg, own = tiny(data_path=str(tmp_path), tokenizer_path=str(model)), tmp_path / "own.model"
    assert tg.tokenizer_path(cfg) == model
    own.write_bytes(model.read_bytes())
    made_with = {"path": own.name, "sha256": hashlib.sha256(model.read_bytes()).hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": made_with}))
    assert tg.tokenizer_path(cfg) == model and tg.tokenizer_path(tiny(data_path=str(tmp_path))) == own
    own.write_bytes(b"another")
    with pytest.raises(tg.UserError, match=f"{own}: not the tokenizer that the shards in {tmp_path} .*TOKENIZER_PATH"):
        tg.tokenizer_path(tiny(data_path=str(tmp_path)))


def test_without_a_manifest_the_tokenizer_is_found_by_its_size(model, tmp_path):
    path = tmp_path / "tokenizers" / "fineweb_512_bpe.model"
    with pytest.raises(tg.UserError, match="fineweb_512_bpe.model: no such tokenizer; set TOKENIZER_PATH"):
        tg.tokenizer_path(tiny(data_dir=str(tmp_path)))
    path.parent.mkdir()
    path.write_bytes(model.read_bytes())
    assert tg.tokenizer_path(tiny(data_dir=str(tmp_path))) == path


@pytest.mark.parametrize("text", ["[]", "{", "\x00", '{"tokenizer": 3}', '{"tokenizer": {"path": 3}}'])
def test_a_manifest_of_another_form_is_one_line(text, model, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(tg.UserError, match="manifest.json: .*; prepare the dataset again"):
        tg.tokenizer_path(tiny(data_path=str(tmp_path), tokenizer_path=str(model)))


def test_bits_per_byte_are_nats_in_bits_over_bytes(run):
    """Of 4,000 nats over 1,000 tokens of 3,000 bytes; and one bit a byte is 1."""
    many = 2 ** 31 - 1  # bytes are summed without overflow
    for nats, size, loss, bpb in ((4.0, 3, 4.0, 4 / math.log(2) / 3), (math.log(2), 1, math.log(2), 1.0),
                                  (4.0, many, 4.0, 4 / math.log(2) / many)):
        ledger = ledger_of(1000)
        ledger.record(torch.arange(1000), torch.full((1000,), nats))
        score = ledger.close(np.full(1000, size, dtype=np.int32), run)[0]
        assert score[1:3] == (1000, 1000 * size) and score[3:] == pytest.approx((loss, bpb), rel=1e-6)


def ledger_of(num_targets: int) -> tg.Ledger:
    """A ledger whose events say that plain weights scored everything at once."""
    ledger = tg.Ledger(num_targets, np.array([0]))
    ledger.note(tg.Ledger.SCORE, tg.Ledger.BASE, 0, num_targets)
    return ledger


@pytest.mark.parametrize("targets", [[0, 0], [1, 2]])
def test_a_second_write_is_refused(targets):
    """In one call, and of what an earlier one wrote."""
    ledger = ledger_of(4)
    ledger.record(torch.tensor([2, 3]), torch.tensor([1.0, 2.0]))
    with pytest.raises(AssertionError, match="twice"):
        ledger.record(torch.tensor(targets), torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize("others, wrong", [([0, 0, 0, 0], 1), ([1, 1, 1, 0], 2)])
def test_a_gap_and_a_target_scored_by_two_ranks_are_refused(others, wrong, run, monkeypatch):
    """`others`: how often the other ranks scored each target; this one scored the first, second and fourth."""
    ledger = ledger_of(4)
    ledger.record(torch.tensor([0, 3, 1]), torch.ones(3))
    monkeypatch.setattr(run, "all_reduce", lambda t: t + torch.tensor(others).to(t.dtype))
    with pytest.raises(AssertionError, match=f"{wrong} targets"):
        ledger.close(np.ones(4, dtype=np.int32), run)


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


@pytest.mark.parametrize("nats, size, message", [(math.nan, 1, "not finite"), (math.inf, 1, "not finite"),
                                                 (1.0, 0, "no bytes of text")])
def test_a_score_that_means_nothing_is_refused(nats, size, message, run):
    ledger = ledger_of(1)
    ledger.record(torch.tensor([0]), torch.tensor([nats]))
    with pytest.raises(tg.UserError, match=message):
        ledger.close(np.array([size]), run)


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
