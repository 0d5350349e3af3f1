"""Section 3, Data: shards, the order of an epoch, batches that do not depend on who builds them, the stamp."""
import json
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny, write_shard

import train_gpt as tg

BOS = tg.BOS_ID
LENGTHS = [5, 1, 40, 2, 1, 1, 90, 33, 7, 64, 3, 150, 31, 32, 20, 11]  # empty documents, some longer than a row
ENDS = np.cumsum(LENGTHS) + 2
DOCUMENTS = [[BOS, *range(end - n + 1, end)] for n, end in zip(LENGTHS, ENDS.tolist())]  # no other id occurs twice
ORDERS = ["window", "none"]


def write_shards(folder: Path, ids: np.ndarray, edges: list[int], split: str = "train") -> Path:
    for i, part in enumerate(np.split(np.asarray(ids), edges)):
        write_shard(folder / f"fineweb_{split}_{i:06d}.bin", part)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three training shards, in which documents run on from shard to shard."""
    return write_shards(tmp_path_factory.mktemp("corpus"), np.concatenate(DOCUMENTS), [100, 101])


def train_data(folder: Path, rank: int = 0, world: int = 1, **knobs: object) -> tg.TrainData:
    run = types.SimpleNamespace(rank=rank, world=world, is_cuda=False)
    return tg.TrainData(tiny(data_path=str(folder), vocab_size=8192, **knobs), run)


def epoch_of(data: tg.TrainData, epoch: int) -> list[np.ndarray]:
    return [data.row(epoch * data.rows_per_epoch + i) for i in range(data.rows_per_epoch)]


def shard(ids: list[int], magic: int = 20240520, version: int = 1, tokens: int = 3) -> bytes:
    """A shard's bytes, whose header may lie."""
    head = np.zeros(256, dtype="<i4")
    head[:3] = magic, version, tokens
    return head.tobytes() + np.array(ids, dtype="<u2").tobytes()


@pytest.mark.parametrize("content, problem", [
    (b"", "0 bytes"), (shard([])[:1000], "1000 bytes"), (shard([1, 2, 3], magic=20240521), "magic 20240521"),
    (shard([1, 2, 3], version=2), "version 2"), (shard([1, 2, 3])[:-1], "truncated"),
    (shard([1, 2, 3, 4]), "truncated or damaged"), (shard([1, 2, 3], tokens=-1), "damaged"),
    (shard([1, 2, 512]), "id 512, but VOCAB_SIZE=512"), (shard([2, 3, 4]), "no document start")])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bad_shard_is_one_line_that_names_the_file_and_the_remedy(content, problem, split, dataset, tmp_path, run):
    path = tmp_path / f"fineweb_{split}_000000.bin"
    path.write_bytes(content)
    cfg = tiny(data_path=str(tmp_path), tokenizer_path=dataset["tokenizer_path"])
    with pytest.raises(tg.UserError) as error:
        {"train": tg.TrainData, "val": tg.ValData.load}[split](cfg, run)
    message = str(error.value)
    assert str(path) in message and problem in message and "\n" not in message
    assert any(word in message for word in ("rebuild", "prepare", "another tokenizer"))


def test_a_folder_without_shards_is_one_line_with_the_remedy(tmp_path):
    with pytest.raises(tg.UserError, match=r"no fineweb_train_\*.bin in it; prepare or download .* DATA_PATH$"):
        tg.TokenStream(tmp_path, "fineweb_train")


@pytest.mark.parametrize("order", ORDERS)
def test_every_epoch_has_rows_enough_whatever_its_phase(order, tmp_path):
    for tokens in range(5, 14):
        data = train_data(write_shards(tmp_path, [BOS] + [2] * (tokens - 1), []), shuffle=order, train_seq_len=4,
                          train_batch_tokens=8, micro_batch_tokens=8)
        assert all(len(data.row(i)) == 5 for i in range(6 * data.rows_per_epoch))
    with pytest.raises(tg.UserError, match="13 training tokens make no row of TRAIN_SEQ_LEN=13"):
        train_data(tmp_path, shuffle=order, train_seq_len=13, train_batch_tokens=13, micro_batch_tokens=13)


def test_shards_are_read_as_one_stream_of_documents(tmp_path):
    """Any span, also across shards and over an empty one; a document also starts at the very beginning.

    Files of bytes are none of it, although `fineweb_train_*.bin` matches them; by their own prefix they are found.
    """
    ids = [7, 8, BOS, 9, 5, BOS, BOS, 6, 7, 8, 9, 10, BOS]
    write_shards(tmp_path, [3, 4], [], "train_bytes")
    stream = tg.TokenStream(write_shards(tmp_path, ids, [5, 5, 12]), "fineweb_train")
    assert len(stream) == 13 and stream.document_starts().tolist() == [0, 2, 5, 6, 12]
    assert all(stream.read(start, stop).tolist() == ids[start:stop] for start in range(14) for stop in range(start, 14))
    assert tg.TokenStream(tmp_path, "fineweb_train_bytes").read(0, 2).tolist() == [3, 4]


@pytest.mark.parametrize("order", ORDERS)
def test_an_epoch_reaches_every_shard_and_no_token_twice(order, tmp_path):
    """20 shards of 1 to 480 tokens; every id is its place in the stream, so that a row says where it is from.

    As a target a token comes once at most, and all do but those of less than two rows; without shuffling in order.
    """
    edges = np.cumsum(np.random.default_rng(0).integers(1, 480, 20))
    ids = np.where(np.arange(edges[-1]) % 97, np.arange(edges[-1]) + 2, BOS)
    data = train_data(write_shards(tmp_path, ids, edges[:-1]), shuffle=order)
    for epoch in (0, 1):
        targets = np.concatenate([row[1:] for row in epoch_of(data, epoch)])
        places = targets[targets != BOS].astype(np.int64) - 2
        assert len(set(places.tolist())) == len(places) and len(ids) - 1 - len(targets) < 2 * data.cfg.train_seq_len
        assert (np.diff(places) > 0).all() == (order == "none")
        reached = np.bincount(np.searchsorted(edges, places, side="right"), minlength=len(edges))
        assert (reached[np.diff(edges, prepend=0) > 4 * data.cfg.train_seq_len] > 0).all() and (reached > 0).sum() > 15


def test_the_order_depends_on_seed_and_epoch_alone(corpus):
    plans = [train_data(corpus, seed=seed).plan_epoch(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])
    assert plans[3] == train_data(corpus, 1, 3, seed=1).plan_epoch(1).tolist()


@pytest.mark.parametrize("world", [1, 5, 13])
def test_the_ranks_together_have_the_batch_of_one_process(world, corpus):
    """Row j of rank r is row r + j*world, in as many forwards of one shape; the third step begins an epoch."""
    single = train_data(corpus)
    ranks = [train_data(corpus, rank, world) for rank in range(world)]
    for step in range(3):
        rows = []
        for data in ranks:
            batches = data.step(step)
            assert len(batches) == data.num_micro == ranks[0].num_micro and data.micro_rows * 32 <= 128
            assert {b.ids.shape for b in batches} == {(data.micro_rows, 32)}
            rows.append([(ids.tolist(), targets.tolist()) for b in batches for ids, targets in zip(b.ids, b.targets)
                         if (targets != tg.IGNORE).any()])  # others are padding
        assert sum(map(len, rows)) == 12 and [rows[i % world][i // world] for i in range(12)] == [
            (row[:-1].tolist(), row[1:].tolist()) for row in (single.row(12 * step + i) for i in range(12))]


def test_a_batch_is_rows_and_the_segments_of_their_documents():
    """Counted by hand: targets are the next ids, padding has none; positions restart where rows and documents start."""
    rng, (num_rows, seq_len) = np.random.default_rng(0), (5, 9)
    for _ in range(50):  # the last row may be short, and some are missing
        sizes = [seq_len + 1] * int(rng.integers(0, num_rows)) + [int(rng.integers(2, seq_len + 2))]
        rows = [np.where(rng.random(n) < 0.3, BOS, rng.integers(2, 99, n)).astype(np.uint16) for n in sizes]
        batch, begins = tg.make_batch(rows, num_rows, seq_len), []
        for r, (ids, targets, positions) in enumerate(zip(*(tensor.tolist() for tensor in batch[:3]))):
            row = rows[r].tolist() if r < len(rows) else [BOS]
            real = len(row) - 1
            assert ids[:real] == row[:-1] and targets == row[1:] + [tg.IGNORE] * (seq_len - real)
            for t in range(seq_len):
                starts = t == 0 or (ids[t] == BOS if t < real else t == real)
                assert positions[t] == (0 if starts else positions[t - 1] + 1)
                begins += [seq_len * r + t] * starts
        assert batch.cu_seqlens.tolist() == [*begins, 45] and int(batch.ids.min()) >= 0
        assert batch.ids.dtype == batch.targets.dtype == torch.int64
        assert batch.positions.dtype == batch.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("first", [0, 5])
def test_batches_built_ahead_are_those_of_their_numbers(first, corpus, monkeypatch):
    """Their thread ends with the consumer, whom its errors reach."""
    data, before = train_data(corpus), set(threading.enumerate())
    batches = data.steps(first)
    for step in range(first, first + 4):
        number, ahead = next(batches)
        assert number == step
        for own, other in zip(ahead, data.step(step)):
            assert all(map(torch.equal, own[:4], other[:4]))
    assert set(threading.enumerate()) > before
    batches.close()
    assert set(threading.enumerate()) == before
    monkeypatch.setattr(data, "step", lambda number: [] if number == first else 1 / 0)
    batches = data.steps(first)
    assert next(batches) == (first, [])
    with pytest.raises(ZeroDivisionError):
        next(batches)


def stamped(folder: Path, **changes: object) -> Path:
    """A dataset of two shards with what `data verify` writes of them, or something else."""
    write_shards(folder, range(1, 600), [])
    write_shards(folder, [BOS, 5, 6], [], "val")
    stamp = {"shards_sha256": tg.shards_sha256(folder), "val_documents": 1, "shared_documents": 0, "shared_share": 0.0}
    (folder / "verified.json").write_text(json.dumps(stamp | changes))
    return folder


def warnings_of(folder: Path) -> list[str]:
    said: list[str] = []
    tg.check_stamp(tiny(data_path=str(folder)), types.SimpleNamespace(log=lambda _, text: said.append(text)))
    return said


def test_the_stamp_decides_whether_there_is_a_warning_or_no_run(tmp_path):
    assert warnings_of(stamped(tmp_path)) == [] == warnings_of(stamped(tmp_path, shared_share=0.01))
    for share in (0.011, 1.0):
        with pytest.raises(tg.UserError, match=rf"{share:.1%} of the validation tokens .* a score on them is void"):
            warnings_of(stamped(tmp_path, shared_share=share))
    (tmp_path / "verified.json").unlink()
    (warning,) = warnings_of(tmp_path)
    assert f"./run.sh data verify {tmp_path}" in warning


@pytest.mark.parametrize("change", ["content", "size", "name", "more", "less", "[]", "{", '{"shared_share": 0.0}'])
def test_a_stamp_of_other_shards_or_of_another_form_is_refused(change, tmp_path):
    path = stamped(tmp_path) / "fineweb_train_000000.bin"
    {"content": lambda: write_shard(path, np.arange(2, 601)), "size": lambda: write_shard(path, np.arange(1, 601)),
     "name": lambda: path.rename(tmp_path / "fineweb_train_000001.bin"), "less": path.unlink,
     "more": lambda: write_shards(tmp_path, range(1, 9), [3], "val")}.get(
        change, lambda: (tmp_path / "verified.json").write_text(change))()
    with pytest.raises(tg.UserError, match="verified.json: ") as error:
        warnings_of(tmp_path)
    assert "\n" not in str(error.value)
