"""Section 3, Data: shards, the order of an epoch, batches that do not depend on who builds them."""
import json
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import batch_of, tiny, write_shard

import train_gpt as tg

BOS = tg.BOS_ID


def process(rank: int = 0, world: int = 1) -> types.SimpleNamespace:
    """As much of a `Run` as the data ask for."""
    return types.SimpleNamespace(rank=rank, world=world, is_cuda=False, is_main=rank == 0)


def documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents of so many ids, BOS included; no other id occurs twice."""
    ends = np.cumsum(lengths) + 2
    return [np.append(BOS, np.arange(end - n + 1, end)) for n, end in zip(lengths, ends)]


LENGTHS = [5, 1, 40, 2, 1, 1, 90, 33, 7, 64, 3, 150, 31, 32, 20, 11]
"""Of the corpus below: empty documents, some longer than a row, 491 ids."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three training shards, in which documents run on from shard to shard."""
    folder, ids = tmp_path_factory.mktemp("corpus"), np.concatenate(documents(LENGTHS))
    for i, part in enumerate(np.split(ids, [100, 101])):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", part)
    return folder


def train_data(folder: Path, rank: int = 0, world: int = 1, **knobs: object) -> tg.TrainData:
    return tg.TrainData(tiny(data_path=str(folder), vocab_size=8192, **knobs), process(rank, world))


# -- shards --------------------------------------------------------------------------------------------


def header(**words: int) -> bytes:
    """A shard's header for three tokens, with some words changed."""
    head = np.zeros(256, dtype="<i4")
    head[:3] = [words.get("magic", 20240520), words.get("version", 1), words.get("tokens", 3)]
    return head.tobytes()


def ids_of(*ids: int) -> bytes:
    return np.array(ids, dtype="<u2").tobytes()


@pytest.mark.parametrize("content, problem", [
    (b"", "0 bytes"),
    (header()[:1000], "1000 bytes"),
    (header(magic=20240521) + ids_of(1, 2, 3), "magic 20240521"),
    (header(version=2) + ids_of(1, 2, 3), "version 2"),
    (header() + ids_of(1, 2, 3)[:-1], "truncated"),
    (header() + ids_of(1, 2, 3, 4), "truncated or damaged"),
    (header(tokens=-1) + ids_of(1, 2, 3), "damaged"),
    (header() + ids_of(1, 2, 512), "id 512, but VOCAB_SIZE=512"),
    (header() + ids_of(2, 3, 4), "no document start"),
])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bad_shard_is_one_line_that_names_the_file_and_the_remedy(content, problem, split, dataset, tmp_path):
    path = tmp_path / f"fineweb_{split}_000000.bin"
    path.write_bytes(content)
    cfg = tiny(data_path=str(tmp_path), tokenizer_path=dataset["tokenizer_path"])
    with pytest.raises(tg.UserError) as error:
        (tg.TrainData if split == "train" else tg.ValData.load)(cfg, process())
    message = str(error.value)
    assert str(path) in message and problem in message and "\n" not in message
    assert any(word in message for word in ("rebuild", "prepare", "another tokenizer"))


def test_a_missing_folder_and_an_empty_one_are_one_line_with_the_remedy(tmp_path):
    for folder, problem in ((tmp_path / "absent", "no such dataset folder"), (tmp_path, "no fineweb_train_*.bin in it")):
        with pytest.raises(tg.UserError) as error:
            tg.TokenStream(folder, "fineweb_train")
        message = str(error.value)
        assert message.startswith(f"{folder}: {problem}") and "DATA_PATH" in message and "\n" not in message


def test_too_few_tokens_for_a_row_are_refused(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", np.array([BOS] + [2] * 31))
    with pytest.raises(tg.UserError, match="32 training tokens make no row of TRAIN_SEQ_LEN=32"):
        train_data(tmp_path)


def test_byte_files_are_not_validation_shards(tmp_path):
    """`fineweb_val_*.bin` also matches them; and the other way round they are found."""
    for name in ("val_bytes_000000", "val_bytes_000001", "val_000001", "val_000000"):
        write_shard(tmp_path / f"fineweb_{name}.bin", np.array([BOS, 2]))
    assert [p.name for p in tg.TokenStream(tmp_path, "fineweb_val").paths] == [
        "fineweb_val_000000.bin", "fineweb_val_000001.bin"]
    assert [p.name for p in tg.TokenStream(tmp_path, "fineweb_val_bytes").paths] == [
        "fineweb_val_bytes_000000.bin", "fineweb_val_bytes_000001.bin"]


def test_shards_are_read_as_one_stream(tmp_path):
    """Any span, also across shards and over an empty one."""
    ids = np.arange(1, 14, dtype=np.uint16)
    for i, part in enumerate(np.split(ids, [5, 5, 12])):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    stream = tg.TokenStream(tmp_path, "fineweb_train")
    assert len(stream) == 13
    for start in range(14):
        for stop in range(start, 14):
            assert stream.read(start, stop).tolist() == ids[start:stop].tolist()


def test_documents_start_at_bos_in_every_shard_and_at_the_very_beginning(tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", np.array([7, 8, BOS, 9]))
    write_shard(tmp_path / "fineweb_val_000001.bin", np.array([BOS, BOS, 5]))
    assert tg.TokenStream(tmp_path, "fineweb_val").document_starts().tolist() == [0, 2, 4, 5]


# -- the order of an epoch -----------------------------------------------------------------------------


def plain_data(folder: Path, tokens: int, seq_len: int, **knobs: object) -> tg.TrainData:
    """One document of so many ids, as training data."""
    write_shard(folder / "fineweb_train_000000.bin", np.array([BOS] + [2] * (tokens - 1)))
    return train_data(folder, train_seq_len=seq_len, train_batch_tokens=2 * seq_len, micro_batch_tokens=2 * seq_len,
                      eval_stride=0, **knobs)


@pytest.mark.parametrize("tokens, seq_len", [(5, 4), (8, 4), (9, 4), (100, 7), (1000, 32)])
@pytest.mark.parametrize("order", ["window", "coprime", "none"])
def test_rows_of_an_epoch_do_not_overlap_and_leave_out_less_than_two_rows(tokens, seq_len, order, tmp_path):
    data = plain_data(tmp_path, tokens, seq_len, shuffle=order)
    for epoch in range(20):
        rows = np.sort(data.plan_epoch(epoch)[0])
        assert len(rows) >= data.rows_per_epoch >= 1 and rows[0] >= 0 and rows[-1] + seq_len < tokens
        assert (np.diff(rows) >= seq_len).all()
        assert tokens - 1 - seq_len * len(rows) < (1 if order == "none" else 2) * seq_len


@pytest.mark.parametrize("order", ["window", "document", "coprime", "none"])
def test_an_epoch_reaches_every_shard_and_no_token_twice(order, tmp_path):
    """20 shards of 1 to 480 tokens; every id is its place in the stream, so that a row says where it is from.

    As a target a token comes once at most, and all do but those of less than two rows.
    """
    edges = np.cumsum(np.random.default_rng(0).integers(1, 480, 20))
    ids = np.where(np.arange(edges[-1]) % 97, np.arange(edges[-1]) + 2, BOS)
    for i, part in enumerate(np.split(ids, edges[:-1])):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    data = train_data(tmp_path, shuffle=order)
    for epoch in (0, 1):
        targets = np.concatenate([data.row(epoch * data.rows_per_epoch + i)[1:] for i in range(data.rows_per_epoch)])
        places = targets[targets != BOS].astype(np.int64) - 2
        assert len(set(places.tolist())) == len(places) and (ids[places] == places + 2).all()
        assert len(ids) - 1 - len(targets) < 2 * data.cfg.train_seq_len
        reached = np.bincount(np.searchsorted(edges, places, side="right"), minlength=len(edges))
        assert (reached[np.diff(edges, prepend=0) > 4 * data.cfg.train_seq_len] > 0).all() and (reached > 0).sum() > 15


def test_a_coprime_epoch_is_one_stride_around_the_corpus(tmp_path):
    """The same step between all rows, and another one in the next epoch."""
    data, strides = plain_data(tmp_path, 10_000, 32, shuffle="coprime"), []
    for epoch in range(8):
        rows = data.plan_epoch(epoch)[0]
        steps = set((np.diff((rows - rows.min()) // 32) % len(rows)).tolist())
        assert len(steps) == 1 and np.gcd(min(steps), len(rows)) == 1
        strides += steps
    assert len(set(strides)) > 4


@pytest.mark.parametrize("order", ["window", "document", "coprime"])
def test_the_order_depends_on_seed_and_epoch_alone(order, corpus):
    plans = [train_data(corpus, shuffle=order, seed=seed).plan_epoch(epoch)[0].tolist() for seed in (0, 1)
             for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])
    assert plans[3] == train_data(corpus, 1, 3, shuffle=order, seed=1).plan_epoch(1)[0].tolist()


def test_without_shuffling_rows_come_in_stream_order(corpus):
    data, ids = train_data(corpus, shuffle="none"), np.concatenate(documents(LENGTHS))
    for i in range(data.rows_per_epoch):
        assert data.row(i).tolist() == ids[32 * i:32 * i + 33].tolist()


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_document_epoch_holds_every_document_whole_and_once(epoch, corpus):
    """Rows are the exact concatenation of documents in random order; only the last row's rest is left out."""
    data, whole = train_data(corpus, shuffle="document"), [d.tolist() for d in documents(LENGTHS)]
    rows = [data.row(epoch * data.rows_per_epoch + i) for i in range(data.rows_per_epoch)]
    for row, following in zip(rows, rows[1:]):
        assert row[-1] == following[0]
    stream = np.concatenate([row[:-1] for row in rows] + [rows[-1][-1:]])
    parts = [part.tolist() for part in np.split(stream, np.flatnonzero(stream == BOS)[1:])]
    cut = parts.pop()
    assert all(d in whole for d in parts) and cut in [d[:len(cut)] for d in whole]
    assert parts != whole[:len(parts)]
    left_out = list(whole)
    for document in parts:
        left_out.remove(document)
    assert sum(map(len, left_out)) - len(cut) < 32


@pytest.mark.parametrize("shuffle", ["window", "document", "coprime", "none"])
def test_every_epoch_has_rows_enough_whatever_its_phase(shuffle, tmp_path):
    for tokens in range(5, 20):
        data = plain_data(tmp_path, tokens, 4, shuffle=shuffle)
        assert all(len(data.row(i)) == 5 for i in range(6 * data.rows_per_epoch))


# -- batches -------------------------------------------------------------------------------------------


def rows_of(batches: list[tg.Batch]) -> list[tuple[list[int], list[int]]]:
    """(ids, targets) of the rows that are not padding."""
    return [(ids.tolist(), targets.tolist()) for b in batches for ids, targets in zip(b.ids, b.targets)
            if (targets != tg.IGNORE).any()]


@pytest.mark.parametrize("shuffle", ["window", "document", "coprime", "none"])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_ranks_together_have_the_batch_of_one_process(world, shuffle, corpus):
    """Row j of rank r is row r + j*world; every rank has as many forwards; the third step begins an epoch."""
    single = train_data(corpus, shuffle=shuffle)
    ranks = [train_data(corpus, rank, world, shuffle=shuffle) for rank in range(world)]
    assert single.cfg.train_rows == 12 and len({data.num_micro for data in ranks}) == 1
    for step in range(3):
        rows = [rows_of(data.step(step)) for data in ranks]
        together = [rows[i % world][i // world] for i in range(12)]
        assert sum(map(len, rows)) == 12 and together == rows_of(single.step(step))
        assert together == [(row[:-1].tolist(), row[1:].tolist()) for row in map(single.row, range(12 * step,
                                                                                              12 * step + 12))]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 12, 13])
def test_a_rank_forwards_batches_of_one_shape_within_its_memory(world, corpus):
    for rank in {0, world - 1}:
        data = train_data(corpus, rank, world)
        batches = data.step(0)
        assert len(batches) == data.num_micro and {b.ids.shape for b in batches} == {(data.micro_rows, 32)}
        assert data.micro_rows * 32 <= 128


def test_targets_are_the_next_ids_and_padding_has_none():
    rows = [np.array([BOS, 5, 6, BOS, 7], dtype=np.uint16), np.array([8, 9, 10], dtype=np.uint16)]
    batch = tg.make_batch(rows, 3, 4)
    none = tg.IGNORE
    assert batch.ids[0].tolist() == [BOS, 5, 6, BOS] and batch.targets[0].tolist() == [5, 6, BOS, 7]
    assert batch.ids[1, :2].tolist() == [8, 9] and batch.targets[1].tolist() == [9, 10, none, none]
    assert batch.targets[2].tolist() == [none] * 4
    assert 0 <= int(batch.ids.min()) and batch.ids.dtype == batch.targets.dtype == torch.int64


def random_rows(rng: np.random.Generator, num_rows: int, seq_len: int) -> list[np.ndarray]:
    """Rows with many document starts; the last may be short, and some are missing."""
    lengths = [seq_len + 1] * int(rng.integers(0, num_rows)) + [int(rng.integers(2, seq_len + 2))]
    return [np.where(rng.random(n) < 0.3, BOS, rng.integers(2, 99, n)).astype(np.uint16) for n in lengths]


def test_positions_and_segments_restart_at_row_starts_and_document_starts():
    """Counted by hand; a segment never crosses a row, and their list is filled up with R*T."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = random_rows(rng, num_rows=5, seq_len=9)
        batch, begins = tg.make_batch(rows, 5, 9), []
        for r, (ids, positions) in enumerate(zip(batch.ids.tolist(), batch.positions.tolist())):
            real = len(rows[r]) - 1 if r < len(rows) else 0
            for t in range(9):
                starts = t == 0 or (ids[t] == BOS if t < real else t == real)
                assert positions[t] == (0 if starts else positions[t - 1] + 1)
                begins += [9 * r + t] if starts else []
        segments = batch.cu_seqlens.tolist()
        assert segments == begins + [45] * (len(segments) - len(begins)) and segments[-1] == 45
        assert batch.positions.dtype == batch.cu_seqlens.dtype == torch.int32


def test_the_list_of_segments_has_one_of_few_lengths():
    """A compiled graph has one length."""
    rng = np.random.default_rng(1)
    lengths = {len(tg.make_batch(random_rows(rng, 8, 64), 8, 64).cu_seqlens) for _ in range(100)}
    assert len(lengths) <= 8 and {n % 32 for n in lengths} == {1}
    assert batch_of(np.full((4, 9), 5)).cu_seqlens.tolist() == [0, 8, 16, 24] + [32] * 13


@pytest.mark.parametrize("first", [0, 5])
def test_batches_built_ahead_are_those_of_their_numbers(first, corpus):
    data = train_data(corpus)
    batches = data.steps(first)
    for step in range(first, first + 4):
        number, built = next(batches)
        for ahead, direct in zip(built, data.step(step)):
            assert number == step and all(torch.equal(a, b) for a, b in zip(ahead, direct))
    batches.close()


def test_the_thread_that_builds_ahead_ends_with_its_consumer(corpus):
    before = set(threading.enumerate())
    batches = train_data(corpus).steps()
    next(batches)
    assert set(threading.enumerate()) > before
    batches.close()
    assert set(threading.enumerate()) == before


def test_an_error_while_building_ahead_reaches_the_consumer(corpus, monkeypatch):
    data = train_data(corpus)

    def step(number: int) -> list[tg.Batch]:
        if number:
            raise OSError("the disk is gone")
        return []

    monkeypatch.setattr(data, "step", step)
    batches = data.steps()
    assert next(batches) == (0, [])
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


# -- the stamp of verification -------------------------------------------------------------------------


def stamped(folder: Path, **changes: object) -> Path:
    """A dataset of two shards with what `data verify` writes of them, or something else."""
    write_shard(folder / "fineweb_train_000000.bin", np.arange(1, 600))
    write_shard(folder / "fineweb_val_000000.bin", np.array([BOS, 5, 6]))
    stamp = {"shards_sha256": tg.shards_sha256(folder), "val_documents": 1, "shared_documents": 0, "shared_share": 0.0}
    (folder / "verified.json").write_text(json.dumps(stamp | changes))
    return folder


def warnings_of(folder: Path) -> list[str]:
    said: list[str] = []
    run = types.SimpleNamespace(log=lambda event, text: said.append(f"{event}: {text}"))
    tg.check_stamp(tiny(data_path=str(folder)), run)
    return said


def test_verified_shards_are_trained_on_without_a_word(tmp_path):
    assert warnings_of(stamped(tmp_path)) == [] and warnings_of(stamped(tmp_path, shared_share=0.01)) == []


def test_without_a_stamp_the_command_that_writes_it_is_named(tmp_path):
    (stamped(tmp_path) / "verified.json").unlink()
    (warning,) = warnings_of(tmp_path)
    assert warning.startswith("warning: ") and f"./run.sh data verify {tmp_path}" in warning


@pytest.mark.parametrize("share", [0.011, 0.8, 1.0])
def test_validation_that_training_has_too_is_refused(share, tmp_path):
    with pytest.raises(tg.UserError, match=rf"{share:.1%} of the validation tokens .* a score on them is void"):
        warnings_of(stamped(tmp_path, shared_share=share))


@pytest.mark.parametrize("change", ["content", "size", "name", "more", "less"])
def test_a_stamp_of_other_shards_is_refused(change, tmp_path):
    path = stamped(tmp_path) / "fineweb_train_000000.bin"
    ids = np.arange(1, 600) + (np.arange(599) == 9)
    {"content": lambda: write_shard(path, ids), "size": lambda: write_shard(path, np.arange(1, 601)),
     "name": lambda: path.rename(tmp_path / "fineweb_train_000001.bin"),
     "more": lambda: write_shard(tmp_path / "fineweb_val_000001.bin", ids), "less": path.unlink}[change]()
    with pytest.raises(tg.UserError, match="verified.json: .*other shards .* ./run.sh data verify") as error:
        warnings_of(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stamp", ["[]", "{", '{"shards_sha256": "0"}', '{"shared_share": null}'])
def test_a_stamp_of_another_form_is_refused(stamp, tmp_path):
    (stamped(tmp_path) / "verified.json").write_text(stamp)
    with pytest.raises(tg.UserError, match="verified.json"):
        warnings_of(tmp_path)
