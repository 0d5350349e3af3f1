"""Artifact: bytes to identical logits, hostile bytes to one clear line, shipped source, fit to the cap."""
import ast
import dataclasses
import hashlib
import json
import lzma
import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import brotli
import hypothesis
import numpy as np
import pytest
import torch
from conftest import ROOT, batch_of, tiny
from hypothesis import strategies as st
from test_model import EVERYTHING, document, noisy
from test_quantization import unit_sums
from torch import Tensor

import train_gpt as tg

SMALL = dict(vocab_size=512, num_layers=2, model_dim=16, num_loops=0, parallel_start_layer=1, rope_dims=4,
             gate_window=5, trellis_states=8, gptq_two_sided=True)
FIXED = tg.ARTIFACT_HEAD.size
BOMB = brotli.compress(bytes(10**8), quality=1)
"""18 KB that expand to 100 MB."""


def logits(model: tg.GPT) -> Tensor:
    """Of a fixed batch."""
    w, batch = tg.Weights(model, torch.float32), batch_of(np.array([document(s, 24) for s in range(3)]))
    with torch.no_grad():
        return w.linear("head", None, model.hidden(batch, tg.layer_plan(model.cfg, looped=True), w))


UNIT = 0.02
"""A unit that suits noisy models and `unit_sums`."""


def quantized(cfg: tg.Config) -> dict[str, tg.Quantized]:
    """A noisy model's tensors as they are stored."""
    model = noisy(cfg)
    with tg.Run(cfg, {}, log=False) as run:
        return tg.Quantizer(model, unit_sums(model), cfg, run).quantize(UNIT)


@pytest.fixture(scope="module", params=["brotli", "range"])
def small(request: pytest.FixtureRequest) -> bytes:
    """A small artifact, by either coder."""
    cfg = tiny(**SMALL)
    return tg.pack(quantized(cfg), UNIT, cfg.trellis_states, request.param, cfg, "record")


def refused(blob: bytes) -> str:
    """`unpack` must raise `UserError` in one line; that line."""
    with pytest.raises(tg.UserError) as error:
        tg.unpack(blob, "some.bin")
    assert "\n" not in str(error.value)
    return str(error.value)


def signed(body: bytes) -> bytes:
    """Body with the digest that fits it."""
    return body + hashlib.blake2b(body, digest_size=tg.DIGEST_BYTES).digest()


def taken_apart(blob: bytes) -> tuple[dict, list[bytes]]:
    """(header, packed streams), by the format's description alone."""
    _, _, head_bytes = struct.unpack_from("<5sBI", blob)
    header = json.loads(brotli.decompress(blob[FIXED + 4:FIXED + head_bytes]))
    at, streams = FIXED + head_bytes, []
    for *_, size in header["streams"]:
        streams.append(blob[at:at + size])
        at += size
    assert at + tg.DIGEST_BYTES == len(blob)
    return header, streams


def put_together(header: object, streams: list[bytes], header_bytes: int | None = None,
                 head_bytes: int | None = None, version: int = 3, packed: bytes | None = None) -> bytes:
    """An artifact of these parts with a correct digest; lengths and the packed header may be lies."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    head = struct.pack("<I", len(text) if header_bytes is None else header_bytes)
    head += brotli.compress(text) if packed is None else packed
    fixed = struct.pack("<5sBI", b"PGOLF", version, len(head) if head_bytes is None else head_bytes)
    return signed(fixed + head + b"".join(streams))


# -- there and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [{}, EVERYTHING, dict(attn_gate="none", smear_gate_enabled=False), SMALL],
                         ids=["record", "everything", "few parts", "small"])
@pytest.mark.parametrize("codec", tg.CODERS)
def test_a_packed_model_comes_back_with_the_same_bits(knobs: dict, codec: str):
    cfg = tiny(**knobs)
    tensors = quantized(cfg)
    reference = tg.GPT(cfg)
    tg.load_tensors(reference, {name: q.dequantize(UNIT) for name, q in tensors.items()})
    artifact = tg.unpack(tg.pack(tensors, UNIT, cfg.trellis_states, codec, cfg, "demo", "a mark"))
    assert (artifact.preset, artifact.illegal) == ("demo", "a mark")
    assert all(getattr(artifact.model, name) == getattr(cfg, name) for name in vars(tg.ModelKnobs()))
    assert list(artifact.tensors) == list(tensors)
    for name, values in artifact.tensors.items():
        assert values.dtype == torch.float32 and torch.equal(values, tensors[name].dequantize(UNIT))
    loaded = tg.GPT(artifact.model)
    tg.load_tensors(loaded, artifact.tensors)
    assert torch.equal(logits(loaded), logits(reference))


def test_a_fresh_process_reads_the_same_model_from_the_file(small: bytes, tmp_path: Path):
    path = tmp_path / "a.bin"
    path.write_bytes(small)
    script = ("import hashlib, sys; from pathlib import Path; import conftest, test_artifact, train_gpt as tg\n"
              "artifact = tg.unpack(Path(sys.argv[1]).read_bytes())\n"
              "model = tg.GPT(artifact.model); tg.load_tensors(model, artifact.tensors)\n"
              "print(hashlib.sha256(test_artifact.logits(model).numpy().tobytes()).hexdigest())")
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    artifact = tg.unpack(small)
    model = tg.GPT(artifact.model)
    tg.load_tensors(model, artifact.tensors)
    assert done.stdout.strip() == hashlib.sha256(logits(model).numpy().tobytes()).hexdigest()


def test_streams_hold_what_they_say(small: bytes):
    header, streams = taken_apart(small)
    found = tg.unpack(small).streams
    assert {name: stream.packed for name, stream in found.items()} == {n: size for n, *_, size in header["streams"]}
    expected = {"fp16": 0, "steps": 0}
    for _, stored, shape in header["tensors"]:
        if stored == "fp16":
            expected["fp16"] += 2 * int(np.prod(shape))
        else:
            expected[stored] = expected.get(stored, 0) + int(np.prod(shape)) * (1 if stored == "int8" else 2)
            expected["steps"] += int(np.prod(shape[:-1])) + (0 if stored == "int8" else shape[-1])
    assert {name: raw for name, _, raw, _ in header["streams"]} == expected
    for (_, coder, raw, _), data in zip(header["streams"], streams):
        assert coder == "range" or len(brotli.decompress(data)) == raw


@pytest.mark.parametrize("states", [1, 8])
def test_the_table_of_sizes_adds_up_and_knows_the_entropy(states: int):
    """Codes of two matrices with known histograms; with a trellis, each parity has its own."""
    codes = [on_a_path(np.random.default_rng(k).normal(0, 4, (40, 64)).astype(np.int16), states) for k in range(2)]
    for matrix in codes:
        expected = 0.0
        for parity in (0, 1) if states > 1 else (None,):
            some = matrix[matrix % 2 == parity] if parity is not None else matrix
            share = np.unique(some, return_counts=True)[1] / some.size
            expected -= some.size * float((share * np.log2(share)).sum())
        assert tg.code_entropy(matrix, states) == pytest.approx(expected, rel=1e-9)
    assert tg.code_entropy(np.full((3, 3), 7, dtype=np.int16), states) == 0
    cfg = tiny(**SMALL)
    blob = tg.pack(quantized(cfg), UNIT, 8, "range", cfg, "demo")
    artifact = tg.unpack(blob)
    lines = [line.split() for line in tg.size_table(artifact, len(blob), 77)[1:]]
    sizes = {name: int(cells[len(cells) > 1].replace(",", "")) for name, *cells in lines}
    assert sizes.pop("all") == len(blob) + 77 == sum(sizes.values()) and sizes["code"] == 77
    assert sum(s.values for s in artifact.streams.values() if s.entropy) == sum(
        v.numel() for v, (_, stored, _) in zip(artifact.tensors.values(), taken_apart(blob)[0]["tensors"])
        if stored.startswith("gptq:"))


# -- coders of codes -----------------------------------------------------------------------------------

AWKWARD = {
    "zeros": [np.zeros((5, 7), dtype=np.int16)],
    "one symbol": [np.full((3, 4), -6, dtype=np.int16), np.full((2, 2), -6, dtype=np.int16)],
    "largest": [np.array([[32767, -32767, -32768], [0, 1, -1]], dtype=np.int16)],
    "one row": [np.arange(-300, 300, dtype=np.int16)[None]],
    "one column": [np.arange(-300, 300, dtype=np.int16)[:, None]],
    "one code": [np.array([[77]], dtype=np.int16)],
    "two symbols": [np.eye(60, dtype=np.int16)],
    "rows of very different size": [(np.logspace(0, 4, 90)[:, None] * np.random.default_rng(0).normal(size=(90, 80))
                                     ).astype(np.int16)],
}


def on_a_path(matrix: np.ndarray, states: int) -> np.ndarray:
    """The matrix with some codes changed by 1, so that each row is a path through the trellis."""
    if states == 1:
        return matrix
    found, following = matrix.copy(), tg.Trellis.of(states).following.tolist()
    for row in found:
        state = 0
        for j, code in enumerate(row.tolist()):
            state = state if j % tg.SEGMENT else 0
            row[j] = code ^ (code & 1) | (state & 1)
            state = following[state][(code >> 1) & 1]
    return found


@pytest.mark.parametrize("codec", tg.CODERS)
@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("states", [1, 4, 8])
def test_awkward_codes_come_back(name: str, codec: str, states: int):
    encode, decode = tg.CODERS[codec]
    codes = [on_a_path(matrix, states) for matrix in AWKWARD[name]]
    data = encode(codes, states)
    found = decode(data, [m.shape for m in codes], states)
    assert all(np.array_equal(a, b) and a.dtype == np.int16 for a, b in zip(found, codes, strict=True))
    assert encode(codes, states) == data


@pytest.mark.parametrize("codec", tg.CODERS)
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 140)), min_size=1, max_size=4),
                  seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 30.0, 5000.0]),
                  states=st.sampled_from([1, 4, 8]))
def test_any_codes_come_back(codec: str, shapes: list[tuple[int, int]], seed: int, scale: float, states: int):
    rng = np.random.default_rng(seed)
    matrices = [on_a_path((scale * rng.standard_cauchy(shape)).clip(-32768, 32767).astype(np.int16), states)
                for shape in shapes]
    found = tg.CODERS[codec][1](tg.CODERS[codec][0](matrices, states), shapes, states)
    assert all(np.array_equal(a, b) for a, b in zip(found, matrices, strict=True))


def test_the_range_coder_comes_near_the_entropy_and_beats_brotli():
    """Gaussian codes whose rows and columns differ in size; the bound is that of one who knows every deviation."""
    rng = np.random.default_rng(0)
    deviation = np.exp(rng.normal(1.2, 0.4, (600, 1)) + rng.normal(0, 0.3, (1, 400)))
    codes = np.rint(deviation * rng.normal(size=(600, 400))).astype(np.int16)
    bound = np.log2(deviation * np.sqrt(2 * np.pi * np.e)).sum() / 8
    size, other = len(tg.range_pack([codes], 1)), len(tg.brotli_codes([codes], 1))
    assert size < 1.02 * bound and size < 0.96 * other


def test_auto_keeps_the_smaller_coder_of_small_streams(monkeypatch: pytest.MonkeyPatch):
    """Like rows are Brotli's, independent codes the range coder's; nothing large is tried twice."""
    rng = np.random.default_rng(0)
    unlike = (rng.uniform(1, 9, (400, 1)) * rng.normal(0, 1, (400, 200))).astype(np.int16)
    alike = np.repeat(rng.normal(0, 3, (1, 64)).astype(np.int16), 120, axis=0)
    for matrix, expected in ((alike, "brotli"), (unlike, "range")):
        coder, data = tg.pack_codes([matrix], 1, "auto")
        assert coder == expected and len(data) == min(len(pack([matrix], 1)) for pack, _ in tg.CODERS.values())
        assert [tg.pack_codes([matrix], 1, name)[0] for name in ("range", "brotli")] == ["range", "brotli"]
    monkeypatch.setattr(tg, "TRY_BROTLI", alike.size - 1)
    assert tg.pack_codes([alike], 1, "auto")[0] == "range"


@pytest.mark.parametrize("states", [1, 8])
def test_damaged_codes_are_a_user_error_or_other_codes(states: int):
    rng = np.random.default_rng(0)
    codes = on_a_path(rng.normal(0, 3, (64, 64)).astype(np.int16), states)
    good = tg.range_pack([codes], states)
    for number in range(300):
        data = bytearray(good)
        for _ in range(rng.integers(1, 5)):
            data[rng.integers(0, 60 if number % 3 else len(data))] = rng.integers(0, 256)
        data = bytes(data[:len(data) - int(rng.integers(0, 9)) * (number % 2)])
        try:
            (found,) = tg.range_unpack(data, [(64, 64)], states)
            assert found.shape == (64, 64)
        except tg.UserError as error:
            assert "\n" not in str(error)


def test_packing_is_a_function_of_the_tensors():
    cfg = tiny(**SMALL)
    first, second = (tg.pack(quantized(cfg), UNIT, 8, "range", cfg, "demo") for _ in range(2))
    assert first == second


@pytest.mark.parametrize("data", [b"", b"ab", bytes(range(256))])
def test_split_bytes_come_back_together(data: bytes):
    assert tg.join_bytes(tg.split_bytes(data)) == data and tg.split_bytes(data)[:1] == data[1:2]


# -- damaged and hostile bytes -------------------------------------------------------------------------


def test_any_changed_byte_is_noticed(small: bytes):
    for at in [*range(0, 14), *range(14, len(small) - 17, len(small) // 20), *range(len(small) - 17, len(small))]:
        refused(small[:at] + bytes([small[at] ^ (1 << at % 8)]) + small[at + 1:])


def test_any_missing_or_additional_byte_is_noticed(small: bytes):
    for length in [*range(0, 40), len(small) // 2, len(small) - 17, len(small) - 16, len(small) - 1]:
        refused(small[:length])
    for more in (b"\0", small[-16:], small):
        refused(small + more)
        refused(signed(small[:-16] + more))


def test_the_name_of_the_file_is_in_the_message(small: bytes):
    for blob in (b"", b"PK\3\4" + bytes(100), small[:-1], signed(small[:5] + b"\4" + small[6:-16])):
        assert "some.bin" in refused(blob)
    assert "not an artifact" in refused(signed(b"PGOLG" + small[5:-16]))


def test_the_test_can_build_a_valid_artifact(small: bytes):
    assert tg.unpack(put_together(*taken_apart(small))).tensors.keys() == tg.unpack(small).tensors.keys()


@pytest.mark.parametrize("lies", [
    dict(version=2), dict(version=4), dict(head_bytes=2**32 - 1), dict(head_bytes=0), dict(head_bytes=4),
    dict(header_bytes=2**32 - 1), dict(header_bytes=0), dict(header_bytes=7), dict(header_bytes=1 << 20),
    dict(packed=b""), dict(packed=b"\xff" * 40), dict(packed=brotli.compress(bytes(10**7), quality=1))],
    ids=lambda d: "-".join(f"{k}={str(v)[:12]}" for k, v in d.items()))
def test_lies_about_the_header_are_refused(small: bytes, lies: dict):
    refused(put_together(*taken_apart(small), **lies))


@pytest.mark.parametrize("text", [
    b"", b"[]", b"{}", b"null", b"\xff", b"[" * 5000, b'{"model":{}}', b'{"model":[],"tensors":[],"streams":[]}',
    b'{"model":{"no_such_knob":1}}', b'{"model":{},"preset":"x","illegal":"","unit":1,"tensors":[],"streams":[[1,2]]}',
    b'{"model":{},"preset":"x","illegal":"","unit":1,"tensors":[],"streams":[["a","brotli",Infinity,1]]}',
    b'{"model":{},"preset":"x","illegal":"","unit":1,"tensors":[],"streams":[["a","brotli",' + b"9" * 5000 + b',1]]}'],
    ids=lambda text: text[:40].decode("latin-1"))
def test_a_strange_header_is_refused(small: bytes, text: bytes):
    refused(put_together(text, []))


def test_mutated_containers_are_refused_or_hold_finite_numbers(small: bytes):
    """500 of each coder, with a digest that fits: flipped bits, cut and repeated parts, numbers set to extremes."""
    rng, refusals = np.random.default_rng(0), 0
    for number in range(500):
        body = bytearray(small[:-tg.DIGEST_BYTES])
        at, length = (int(rng.integers(0, n)) for n in (len(body) if number % 2 else 700, 40))
        match number % 5:
            case 0 | 1:
                body[at % len(body)] ^= 1 << int(rng.integers(0, 8))
            case 2:
                del body[at:at + length]
            case 3:
                body[at:at] = body[at:at + length]
            case 4:
                body[at:at + 4] = struct.pack("<I", rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))
        if number % 5 == 4:  # tracing is slow
            tracemalloc.start()
        try:
            artifact = tg.unpack(signed(bytes(body)), "some.bin")
            assert all(values.isfinite().all() for values in artifact.tensors.values())
        except tg.UserError as error:
            assert "\n" not in str(error)
            refusals += 1
        finally:
            assert tracemalloc.get_traced_memory()[1] < 1 << 24
            tracemalloc.stop()
    assert refusals > 250


def changed(where: str, change: Callable[[list], object]) -> Callable[[dict, list[bytes]], object]:
    """An edit of one list of the header."""
    return lambda header, streams: change(header[where])


def reverse_streams(header: dict, streams: list[bytes]) -> None:
    """Streams out of step with their list."""
    streams.reverse()


EDITS: dict[str, Callable[[dict, list[bytes]], object]] = {
    "a tensor less": changed("tensors", lambda t: t.pop()),
    "a tensor more": changed("tensors", lambda t: t.append(["x", "fp16", [1]])),
    "another shape": changed("tensors", lambda t: t[0][2].reverse()),
    "another order": changed("tensors", lambda t: t.insert(0, t.pop())),
    "another storage": changed("tensors", lambda t: t[0].__setitem__(1, "fp16")),
    "another model": lambda header, streams: header["model"].update(num_layers=3),
    "a knob missing": lambda header, streams: header.update(model={"vocab_size": 512}),
    "no streams": lambda header, streams: header["streams"].clear(),
    "a stream more": lambda header, streams: (header["streams"].append(["x", "brotli", 0, 1]), streams.append(b"\x06")),
    "a coder that is none": changed("streams", lambda s: s[-1].__setitem__(1, "lzma")),
    "a coder for other things": changed("streams", lambda s: s[0].__setitem__(1, "range")),
    "no trellis": lambda header, streams: header.pop("trellis"),
    "a trellis of 3 states": lambda header, streams: header.update(trellis=3),
    "a trellis that is true": lambda header, streams: header.update(trellis=True),
    "no unit": lambda header, streams: header.pop("unit"),
    "a unit of zero": lambda header, streams: header.update(unit=0),
    "a unit that is no number": lambda header, streams: header.update(unit=float("nan")),
    "a unit without end": lambda header, streams: header.update(unit=float("inf")),
    "a negative unit": lambda header, streams: header.update(unit=-1.0),
    "a stream twice": lambda header, streams: (header["streams"].append(header["streams"][0]),
                                               streams.append(streams[0])),
    "a raw length off": changed("streams", lambda s: s[1].__setitem__(2, s[1][2] + 1)),
    "a raw length huge": changed("streams", lambda s: s[1].__setitem__(2, 10**15)),
    "a packed length off": changed("streams", lambda s: (s[0].__setitem__(3, s[0][3] - 1),
                                                         s[1].__setitem__(3, s[1][3] + 1))),
    "a packed length negative": changed("streams", lambda s: (s[1].__setitem__(3, s[1][3] + s[0][3] + 9),
                                                              s[0].__setitem__(3, -9))),
    "streams in another order": reverse_streams,
}


@pytest.mark.parametrize("name", EDITS)
def test_a_header_that_does_not_fit_its_streams_or_model_is_refused(small: bytes, name: str):
    header, streams = taken_apart(small)
    EDITS[name](header, streams)
    refused(put_together(header, streams))


def peak_while_refusing(blob: bytes) -> int:
    """Bytes that Python held at most while `unpack` refused."""
    tracemalloc.start()
    try:
        refused(blob)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("content", [b"", b"\xff" * 50, BOMB, brotli.compress(b"few")],
                         ids=["empty", "noise", "bomb", "few"])
def test_a_stream_of_another_length_is_refused_before_it_is_unpacked_whole(small: bytes, content: bytes):
    header, streams = taken_apart(small)
    streams[0], header["streams"][0][3] = content, len(content)
    assert peak_while_refusing(put_together(header, streams)) < 1 << 24


def test_a_header_of_implausible_length_is_refused_before_it_is_unpacked(small: bytes):
    _, streams = taken_apart(small)
    assert peak_while_refusing(put_together(b"", streams, header_bytes=10**8, packed=BOMB)) < 1 << 24


@pytest.mark.parametrize("head_bytes", [0, 4, 10**9])
def test_a_header_that_does_not_fit_into_the_file_is_named(small: bytes, head_bytes: int):
    assert "the header is longer than the file" in refused(put_together(*taken_apart(small), head_bytes=head_bytes))


@pytest.mark.parametrize("size", [0, 2, 10**9])
def test_unpacking_stops_one_byte_after_the_claimed_size(size: int):
    data = BOMB if size < 10**9 else brotli.compress(b"abc")
    with pytest.raises(tg.UserError):
        tg.brotli_unpack(data, size)
    assert tg.brotli_unpack(brotli.compress(b"abc"), 3) == b"abc" and tg.brotli_unpack(brotli.compress(b""), 0) == b""


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_numbers_that_are_not_finite_are_refused(small: bytes, value: float):
    header, streams = taken_apart(small)
    at = [name for name, *_ in header["streams"]].index("fp16")
    raw = np.frombuffer(tg.join_bytes(brotli.decompress(streams[at])), dtype="<f2").copy()
    raw[len(raw) // 2] = value
    streams[at] = brotli.compress(tg.split_bytes(raw.tobytes()))
    header["streams"][at][3] = len(streams[at])
    assert "finite" in refused(put_together(header, streams))


@pytest.mark.parametrize("field", sorted(vars(tg.ModelKnobs())))
def test_a_knob_with_a_value_that_is_none_of_its_kind_is_refused(small: bytes, field: str):
    """Else it would surface later, as an exception of the forward; whatever else it holds, it is no exception here."""
    header, streams = taken_apart(small)
    header["model"][field] = "seven"
    refused(put_together(header, streams))
    for value in (None, [], {"a": 1}, float("inf"), -10**30, 1e308):
        header["model"][field] = value
        try:
            tg.unpack(put_together(header, streams))
        except tg.UserError as error:
            assert "\n" not in str(error)


def fail(*args: object) -> None:
    raise AssertionError("this must not be reached")


@pytest.mark.parametrize("huge", [dict(num_layers=10**9), dict(num_loops=10**9, loop_start=0, loop_end=0)],
                         ids=["blocks", "loops"])
def test_a_plan_far_too_long_is_refused_before_it_is_built(small: bytes, huge: dict, monkeypatch: pytest.MonkeyPatch):
    """It would take all memory."""
    header, streams = taken_apart(small)
    header["model"].update(huge)
    monkeypatch.setattr(tg, "layer_plan", fail)
    monkeypatch.setattr(tg, "orthogonal", fail)
    refused(put_together(header, streams))


def test_a_claim_of_many_gigabytes_is_refused_before_it_is_unpacked(small: bytes, monkeypatch: pytest.MonkeyPatch):
    """The header fits its model, and a few bytes of Brotli could fulfil the claim."""
    header, streams = taken_apart(small)
    header["model"].update(vocab_size=65536, model_dim=2**17)
    tensors = tg.shapes_of(tg.ModelKnobs(**header["model"])).tensors()
    header["tensors"] = [[name, tg.route(parameter).stored, list(v.shape)] for name, v, parameter in tensors]
    sizes: dict[str, int] = {}
    for _, stored, shape in header["tensors"]:
        for stream, size in tg.stream_parts(stored, shape):
            sizes[stream] = sizes.get(stream, 0) + size
    header["streams"] = [[name, coder, sizes[name], packed] for name, coder, _, packed in header["streams"]]
    assert sum(sizes.values()) > 2**35
    unpack_stream = tg.brotli_unpack
    monkeypatch.setattr(tg, "brotli_unpack", lambda data, size: unpack_stream(data, size) if size < 2**20 else fail())
    refused(put_together(header, streams))


def test_random_damage_never_surfaces_as_anything_but_a_user_error(small: bytes):
    """Half of the mutations carry a correct digest; those may also yield finite tensors, changed codes for example."""
    rng, survived = random.Random(0), 0
    for number in range(300):
        blob = bytearray(small[:-16])
        for _ in range(rng.randint(1, 4)):
            at = rng.choice([rng.randrange(0, 40), rng.randrange(len(blob))]) % len(blob)
            kind = rng.randrange(4)
            if kind == 0:
                blob[at] = rng.randrange(256)
            elif kind == 1:
                blob[at:at] = rng.randbytes(rng.randint(1, 9))
            elif kind == 2:
                del blob[at:at + rng.choice([1, 4, 400])]
            else:
                other = rng.randrange(len(blob))
                blob[at:at + 8] = blob[other:other + 8]
            blob = blob or bytearray(1)
        if bytes(blob) == small[:-16]:
            continue
        try:
            artifact = tg.unpack(signed(bytes(blob)) if number % 2 else bytes(blob) + small[-16:])
        except tg.UserError as error:
            assert "\n" not in str(error)
        else:
            assert number % 2 and all(t.isfinite().all() for t in artifact.tensors.values())
            survived += 1
    assert survived < 100


# -- the shipped source --------------------------------------------------------------------------------


def payload(packed: bytes) -> bytes:
    """What a packed script hands to the decompressor, read as Python reads the wrapper."""
    literals = [n.value for n in ast.walk(ast.parse(packed)) if isinstance(n, ast.Constant)]
    return max((text for text in literals if isinstance(text, str)), key=len).encode("latin-1")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed script, alone in a folder."""
    path = tmp_path_factory.mktemp("shipped") / "train_gpt.py"
    path.write_bytes(tg.shipped_source(ROOT / "train_gpt.py"))
    return path


def test_shipped_source_is_the_readable_one_without_docstrings(shipped: Path):
    class Strip(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
            return None if isinstance(node.value, ast.Constant) else node

    tree = Strip().visit(ast.parse((ROOT / "train_gpt.py").read_bytes()))
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.body:
            node.body = [ast.Pass()]
    source = lzma.decompress(payload(shipped.read_bytes()))
    assert ast.dump(ast.parse(source)) == ast.dump(ast.parse(ast.unparse(tree)))


def test_packing_the_packed_source_changes_nothing(shipped: Path):
    assert tg.shipped_source(shipped) == shipped.read_bytes()
    assert len(shipped.read_bytes()) < (ROOT / "train_gpt.py").stat().st_size / 3


def test_the_packed_script_runs_alone_and_counts_its_own_bytes(shipped: Path, tmp_path: Path):
    """`--help` names every knob under headings that are one short line; `--check` knows the file's length."""
    done = subprocess.run([sys.executable, str(shipped), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {knob.name}={tg.show(knob.default)} (" in done.stdout for knob in tg.knobs())
    assert max(map(len, done.stdout.splitlines())) <= 120
    done = subprocess.run([sys.executable, str(shipped), "--check"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"code_bytes={shipped.stat().st_size}" in done.stdout


def test_every_payload_survives_the_wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All triples of the bytes that need care, and all bytes, with the compressor out of the way."""
    care = [bytes([c]) for c in b"\\\0\n\r\"078xN\x80"]
    data = b"".join(a + b + c for a in care for b in care for c in care) + bytes(range(256))
    monkeypatch.setattr(lzma, "compress", lambda *source, **how: data)
    (tmp_path / "source.py").write_text("pass\n")
    assert payload(tg.shipped_source(tmp_path / "source.py")) == data


@pytest.mark.parametrize("source", [
    "", "'''only a docstring'''\n", "x = 1\n# comment\n", "s = '\\x00\\xff caf\\u00e9 \\\\01 \\\\'\n",
    "def f():\n    '''doc'''\n\n\nclass A:\n    '''doc'''\n    b: int = 2\n    '''doc'''\n\n\nx, y = A.b, f()\n"])
def test_a_packed_source_does_what_the_readable_one_does(source: str, tmp_path: Path):
    path = tmp_path / "source.py"
    path.write_text(source)
    plain: dict[str, object] = {}
    packed: dict[str, object] = {}
    exec(compile(source, "plain", "exec"), plain)
    exec(compile(tg.shipped_source(path), "packed", "exec"), packed)
    for name in plain.keys() - {"__doc__", "__builtins__", "__annotations__"}:
        assert packed[name] == plain[name] or callable(plain[name]) and callable(packed[name])


# -- the file ------------------------------------------------------------------------------------------


def test_the_written_file_is_what_every_rank_gets(run: tg.Run, small: bytes, tmp_path: Path):
    path = tmp_path / "logs" / "a.b.bin"
    before = set(path.parent.iterdir())
    assert tg.write_artifact(small, path, run) == small == path.read_bytes()
    assert tg.write_artifact(b"newer", path, run) == b"newer" == path.read_bytes()
    assert set(path.parent.iterdir()) == before | {path}


@pytest.mark.parametrize("where", ["no such folder", "under a file", "a folder"])
def test_a_path_that_cannot_be_written_is_one_clear_line_and_leaves_nothing_there(
        run: tg.Run, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory):
    """What training has made is saved elsewhere, if that can be."""
    spare = tmp_path_factory.mktemp("spare")
    monkeypatch.setattr(tg.tempfile, "tempdir", str(spare))
    (tmp_path / "file").touch()
    (tmp_path / "folder.bin").mkdir()
    path = tmp_path / {"no such folder": "none/a.bin", "under a file": "file/a.bin", "a folder": "folder.bin"}[where]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(tg.UserError, match="cannot write the artifact") as error:
        tg.write_artifact(b"bytes", path, run)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
    (saved,) = spare.rglob("*.bin")
    assert saved.read_bytes() == b"bytes" and f"EVAL_ONLY={saved} scores" in str(error.value)
    monkeypatch.setattr(tg.tempfile, "tempdir", str(spare / "none"))
    with pytest.raises(tg.UserError, match="cannot write the artifact") as error:
        tg.write_artifact(b"bytes", path, run)
    assert "EVAL_ONLY" not in str(error.value)


def test_a_failed_write_leaves_the_old_file(run: tg.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tg.os, "fsync", full)
    with pytest.raises(tg.UserError, match="No space left"):
        tg.write_artifact(b"new", path, run)
    assert path.read_bytes() == b"old" and not list(tmp_path.glob("*.tmp"))


# -- the cap -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sdclip", "waterfill"])
def roomy(request: pytest.FixtureRequest) -> tuple[dict, tg.GPT, bytes]:
    """(knobs, model, artifact without a binding cap)."""
    knobs = dict(model_dim=64, num_heads=2, num_loops=0, quant=request.param)
    model = noisy(tiny(**knobs))
    return knobs, model, fitted((knobs, model, b""), 10 ** 9, 0)


def fitted(roomy: tuple[dict, tg.GPT, bytes], cap: int, code_bytes: int) -> bytes:
    knobs, model, _ = roomy
    cfg = tiny(**knobs, artifact_bytes_cap=cap)
    with tg.Run(cfg, {}, log=False) as run:
        return tg.fit_to_cap(model, unit_sums(model), code_bytes, cfg, run)


@pytest.mark.parametrize("code_bytes", [0, 5000])
def test_a_cap_that_does_not_bind_leaves_the_steps_alone(roomy: tuple, code_bytes: int):
    assert fitted(roomy, int(1.2 * len(roomy[2])) + code_bytes, code_bytes) == roomy[2]


def test_without_a_binding_cap_waterfill_takes_the_bits_it_may(roomy: tuple):
    knobs, model, blob = roomy
    if knobs["quant"] == "waterfill":
        weights = sum(v.numel() for _, v, p in model.tensors() if tg.route(p).stored.startswith("gptq:"))
        codes = sum(s.packed for name, s in tg.unpack(blob).streams.items() if name.startswith("gptq:"))
        assert 8 * codes / weights == pytest.approx(5.0, abs=0.35)  # side information of a small model included


@pytest.mark.parametrize("share", [0.0, 0.02])
def test_a_table_of_zeros_does_not_make_the_steps_finer(share: float):
    """Rows that no training text has met cost no bits, and the bits that they might have had go to nobody."""
    knobs = dict(model_dim=64, num_heads=2, num_loops=0, bigram_buckets=8192, bigram_dim=16)
    model = noisy(tiny(**knobs))
    with torch.no_grad():
        table = next(p for name, p in model.named_parameters() if "bigram" in name and len(p) == 8192)
        table *= (torch.rand(8192, 1) < share)
    blob = fitted((knobs, model, b""), 10 ** 9, 0)
    found = tg.unpack(blob).tensors
    stored = [(name, values) for name, values, p in model.tensors() if tg.route(p).stored.startswith("gptq:")]
    weights = sum(int(values.count_nonzero()) for _, values in stored)
    assert 8 * tg.code_bytes_of(blob) / weights == pytest.approx(5.0, abs=0.35)
    for name, values in stored:  # a uniform error of a step at 5 bits of a Gaussian is 0.03 of its deviation
        error = float((found[name] - values).square().mean().sqrt() / values.square().mean().sqrt().clamp_min(1e-9))
        assert 0.003 < error < 0.1 or not values.any(), name


@pytest.mark.parametrize("share", [0.999, 0.95, 0.8, 0.6])
def test_a_cap_that_binds_is_met_from_below_and_nearly_used_up(roomy: tuple, share: float):
    cap = int(share * len(roomy[2]))
    blob = fitted(roomy, cap + 5000, 5000)
    assert 0.99 * cap <= len(blob) <= cap
    found, free = tg.unpack(blob), tg.unpack(roomy[2])
    assert found.streams["fp16"] == free.streams["fp16"]
    ratios = {name: float((found.tensors[name] - free.tensors[name]).std() / free.tensors[name].std())
              for name in found.tensors if name.startswith("blocks.")}
    assert 0 < min(ratios.values()) and max(ratios.values()) < 0.5


@pytest.mark.parametrize("share", [0.99, 0.7, 0.45])
@pytest.mark.parametrize("curve", [lambda octaves: 1 - octaves / 6, lambda octaves: 8 ** -octaves,
                                   lambda octaves: (1 + octaves) ** -0.7], ids=["one bit an octave", "steep", "flat"])
def test_the_search_for_the_unit_ends_within_a_thousandth_below_the_cap(
        curve: Callable[[float], float], share: float, monkeypatch: pytest.MonkeyPatch):
    """Whatever the size does when the steps grow, past the cap or short of it."""
    cfg = tiny(model_dim=64, quant="sdclip")
    model = noisy(cfg)
    size = 6 / 8 * sum(v.numel() for _, v, p in model.tensors() if tg.route(p).stored.startswith("gptq:"))
    tried = []
    monkeypatch.setattr(tg.Quantizer, "quantize", lambda self, unit: tried.append(unit) or unit)
    monkeypatch.setattr(tg, "pack", lambda unit, *rest: bytes(int(size * curve(float(np.log2(unit))))))
    cap = int(share * size)
    cfg = tiny(model_dim=64, quant="sdclip", artifact_bytes_cap=cap + 700)
    with tg.Run(cfg, {}, log=False) as run:
        assert 0.999 * cap <= len(tg.fit_to_cap(model, unit_sums(model), 700, cfg, run)) <= cap
    assert len(tried) <= 15


def test_no_gptq_begins_that_would_end_beyond_the_budget(monkeypatch: pytest.MonkeyPatch):
    """What fits is taken though it leaves room; what the budget was overdrawn by is said, with the remedy."""
    sizes = iter([15000, 9000, 9500, 9995])
    monkeypatch.setattr(tg.Quantizer, "quantize", lambda self, unit: unit)
    monkeypatch.setattr(tg, "pack", lambda unit, *rest: bytes(next(sizes)))
    cfg = tiny(model_dim=64, quant="sdclip", artifact_bytes_cap=10_000)
    model, said = noisy(cfg), []
    with tg.Run(cfg, {}, log=False) as run:
        monkeypatch.setattr(run, "log", lambda event, **values: said.append(values.get("text", "")))
        assert len(tg.fit_to_cap(model, unit_sums(model), 0, cfg, run)) == 9995 and not any(said)
        sizes = iter([15000, 9000, 9500])
        cfg = dataclasses.replace(cfg, max_wallclock_seconds=600.0)
        run.phases.append(tg.Phase("train", "train", 0.0, 602.6, 0, 602.6))
        assert len(tg.fit_to_cap(model, unit_sums(model), 0, cfg, run)) == 9000 and next(sizes) == 9500
    assert "s more than MAX_WALLCLOCK_SECONDS=600: set GPTQ_RESERVE_SECONDS=12" in said[-1]


@pytest.mark.parametrize("cap,code_bytes", [(3000, 0), (10**6, 999_000), (10, 50_000)])
def test_a_cap_that_nothing_fits_is_one_clear_line_with_the_sizes(roomy: tuple, cap: int, code_bytes: int):
    with pytest.raises(tg.UserError) as error:
        fitted(roomy, cap, code_bytes)
    message = str(error.value)
    assert "\n" not in message and f"ARTIFACT_BYTES_CAP={cap:,}" in message and f"code {code_bytes:,}" in message


@pytest.mark.parametrize("knobs", [dict(quant="sdclip"), {}, dict(artifact_bytes_cap=120_000)])
def test_predicted_bytes_foresee_a_gaussian_model(knobs: dict):
    cfg = tiny(model_dim=128, num_heads=2, num_loops=0, vocab_size=1024, **knobs)
    torch.manual_seed(0)
    model = tg.GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    with tg.Run(cfg, {}, log=False) as run:
        blob = tg.fit_to_cap(model, unit_sums(model), 0, cfg, run)
    predicted, found = tg.predicted_bytes(cfg, 0), {n: s.packed for n, s in tg.unpack(blob).streams.items()}
    assert predicted.keys() == found.keys()
    assert sum(predicted.values()) == pytest.approx(len(blob), rel=0.05)
