"""Artifact: bytes to identical logits, hostile bytes to one clear line, shipped source, fit to the cap."""
import ast
import hashlib
import json
import lzma
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
from test_model import EVERYTHING, document, logits_of, noisy
from test_quantization import quantize, unit_sums

import train_gpt as tg
from tests.stress import fuzz

FIXED = tg.ARTIFACT_HEAD.size
BOMB = brotli.compress(bytes(10**8), quality=1)  # 18 KB that expand to 100 MB
SCALE = 0.02  # a global scale that suits noisy models and `unit_sums`


@pytest.fixture(scope="module")
def small() -> bytes:
    """A small artifact with every kind of tensor, by the range coder with a trellis."""
    return signed(fuzz.artifacts()[0])


def refused(blob: bytes) -> str:
    """`unpack` must raise `UserError` in one line; that line."""
    with pytest.raises(tg.UserError) as error:
        tg.unpack(blob, "some.bin")
    assert "\n" not in str(error.value) and "some.bin" in str(error.value)
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
                 head_bytes: int | None = None, version: int = tg.ARTIFACT_VERSION, content: bytes | None = None
                 ) -> bytes:
    """An artifact of these parts with a correct digest; lengths and the packed header may be lies."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    head = struct.pack("<I", len(text) if header_bytes is None else header_bytes)
    head += brotli.compress(text) if content is None else content
    fixed = struct.pack("<5sBI", b"PGOLF", version, len(head) if head_bytes is None else head_bytes)
    return signed(fixed + head + b"".join(streams))


# -- there and back ------------------------------------------------------------------------------------

@pytest.mark.parametrize("knobs", [
    {}, dict(EVERYTHING, trellis_states=4), dict(attn_gate="none", smear_gate_enabled=False)],
                         ids=["record", "everything", "few parts"])
@pytest.mark.parametrize("coder", tg.CODERS)
def test_a_packed_model_comes_back_with_the_same_bits(knobs: dict, coder: str, run: tg.Run):
    """Values, logits, knobs; the bytes are a function of the tensors; sizes are told."""
    cfg = tiny(**knobs)
    tensors, same = (quantize(noisy(cfg), cfg, run, SCALE) for _ in range(2))
    blob, again = (tg.pack(tg.pack_streams(t, cfg.trellis_states, [coder]), SCALE, cfg.trellis_states, cfg, "demo")
                   for t in (tensors, same))
    artifact, models = tg.unpack(blob), [tg.GPT(cfg), tg.GPT(cfg)]
    assert blob == again and artifact.preset == "demo"
    assert all(getattr(artifact.model, name) == getattr(cfg, name) for name in vars(tg.ModelKnobs()))
    assert list(artifact.tensors) == list(tensors)
    expected = {name: q.dequantize(SCALE) for name, q in tensors.items()}
    for name, values in artifact.tensors.items():
        assert values.dtype == torch.float32 and torch.equal(values, expected[name])
    batch = batch_of(np.array([document(seed, 24) for seed in range(3)]))
    for model, values in zip(models, (artifact.tensors, expected)):
        tg.load_tensors(model, values)
    assert torch.equal(*(logits_of(model, batch) for model in models))
    header, _ = taken_apart(blob)
    assert artifact.streams == {name: (raw // (2 - (name in ("int8", "scales"))), size)
                                for name, _, raw, size in header["streams"]}


# -- coders of codes -----------------------------------------------------------------------------------

def on_a_path(matrix: np.ndarray, states: int) -> np.ndarray:
    """The matrix with some codes changed by 1, so that each row is a path through the trellis."""
    if states == 1:
        return matrix
    changed, following = matrix.copy(), tg.Trellis.of(states).following.tolist()
    for row in changed:
        for j, code in enumerate(row.tolist()):
            if j % tg.SEGMENT == 0:
                state = 0
            row[j] = code ^ (code & 1) | (state & 1)
            state = following[state][(code >> 1) & 1]
    return changed


def come_back(matrices: list[np.ndarray]) -> None:
    for states in (1, 4):
        codes = [on_a_path(matrix, states) for matrix in matrices]
        for encode, decode in tg.CODERS.values():
            result = decode(encode(codes, states), [m.shape for m in codes], states)
            assert all(np.array_equal(a, b) and a.dtype == np.int16 for a, b in zip(result, codes, strict=True))


@pytest.mark.parametrize("matrices", [
    [np.zeros((5, 7), dtype=np.int16)],
    [np.full((3, 4), -6, dtype=np.int16), np.full((2, 2), -6, dtype=np.int16)],
    [np.array([[32767, -32767, -32768], [0, 1, -1]], dtype=np.int16)],
    [np.arange(-300, 300, dtype=np.int16)[:, None]],
    [np.array([[77]], dtype=np.int16)],
    [(np.logspace(0, 4, 90)[:, None] * np.random.default_rng(0).normal(size=(90, 80))).astype(np.int16)]])
def test_awkward_codes_come_back(matrices: list[np.ndarray]):
    come_back(matrices)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 140)), min_size=1, max_size=4),
                  seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 30.0, 5000.0]))
def test_any_codes_come_back(shapes: list[tuple[int, int]], seed: int, scale: float):
    rng = np.random.default_rng(seed)
    come_back([(scale * rng.standard_cauchy(shape)).clip(-32768, 32767).astype(np.int16) for shape in shapes])


def test_the_range_coder_comes_near_the_entropy_and_small_streams_take_the_smaller_one(monkeypatch):
    """Gaussian codes whose rows and columns differ in size; the bound is that of one who knows every deviation."""
    rng = np.random.default_rng(0)
    deviation = np.exp(rng.normal(1.2, 0.4, (600, 1)) + rng.normal(0, 0.3, (1, 400)))
    unlike = np.rint(deviation * rng.normal(size=(600, 400))).astype(np.int16)
    bound = np.log2(deviation * np.sqrt(2 * np.pi * np.e)).sum() / 8
    assert len(tg.range_pack([unlike], 1)) < min(1.02 * bound, 0.96 * len(tg.brotli_codes([unlike], 1)))
    alike = np.repeat(rng.normal(0, 3, (1, 64)).astype(np.int16), 120, axis=0)  # like rows are Brotli's

    def chosen(codes: np.ndarray, coders: tuple[str, ...]) -> str:
        none = torch.zeros(len(codes), dtype=torch.int8), torch.zeros(codes.shape[1], dtype=torch.int8)
        one = {"a": tg.Quantized("gptq:mlp", torch.from_numpy(codes), *none)}
        return tg.pack_streams(one, 1, coders)["gptq:mlp"].coder

    assert [chosen(codes, ("range", "brotli")) for codes in (alike, unlike)] == ["brotli", "range"]
    assert chosen(alike, ("range",)) == "range" and chosen(unlike, ("brotli",)) == "brotli"
    monkeypatch.setattr(tg, "TRY_BROTLI", alike.size - 1)  # nothing large is tried twice
    assert chosen(alike, ("range", "brotli")) == "range"


# -- damaged and hostile bytes -------------------------------------------------------------------------

def test_any_changed_missing_or_additional_byte_is_noticed(small: bytes):
    for at in [*range(0, 14), *range(14, len(small) - 17, len(small) // 20), *range(len(small) - 17, len(small))]:
        refused(small[:at] + bytes([small[at] ^ (1 << at % 8)]) + small[at + 1:])
    for length in [*range(0, 40), len(small) // 2, len(small) - 17, len(small) - 16, len(small) - 1]:
        refused(small[:length])
    for more in (b"\0", small[-16:], small):
        refused(small + more)
        refused(signed(small[:-16] + more))
    assert "not an artifact" in refused(signed(b"PGOLG" + small[5:-16]))
    assert "not an artifact" in refused(b"PK\3\4" + bytes(100))
    # The test can build a valid one.
    assert tg.unpack(put_together(*taken_apart(small))).tensors.keys() == tg.unpack(small).tensors.keys()


def peak_while_refusing(blob: bytes) -> int:
    """Bytes that Python held at most while `unpack` refused."""
    tracemalloc.start()
    try:
        refused(blob)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("lies", [
    dict(version=8), dict(head_bytes=2**32 - 1), dict(head_bytes=4), dict(header_bytes=2**32 - 1), dict(header_bytes=0),
    dict(header_bytes=1 << 20), dict(content=b""), dict(content=b"\xff" * 40), dict(content=BOMB),
    dict(content=BOMB, header_bytes=10**8)], ids=lambda lies: "-".join(lies))
def test_lies_about_the_header_are_refused(small: bytes, lies: dict):
    assert peak_while_refusing(put_together(*taken_apart(small), **lies)) < 1 << 24


@pytest.mark.parametrize("text", [
    b"", b"[]", b"{}", b"null", b"\xff", b"[" * 5000, b'{"model":[],"streams":[]}', b'{"model":{"no_such_knob":1}}',
    b'{"model":{},"preset":"x","global_scale":1,"trellis":1,"streams":[[1,2]]}',
    b'{"model":{},"preset":"x","global_scale":1,"trellis":1,"streams":[["a","brotli",Infinity,1]]}',
    b'{"model":{},"preset":"x","global_scale":1,"trellis":1,"streams":[["a","brotli",' + b"9" * 5000 + b',1]]}'],
    ids=lambda text: text[:40].decode("latin-1"))
def test_a_strange_header_is_refused(text: bytes):
    refused(put_together(text, []))


@pytest.mark.parametrize("target", ["artifact", "header", "range", "brotli"])
def test_mutants_are_refused_in_one_line_or_read(target: str, tmp_path: Path):
    """Within the fuzzer's bounds of memory and time, under a digest that fits. What is read is finite."""
    refusals = 0
    for _, data in fuzz.mutants(target, 200):
        outcome, read = fuzz.judge(target, data, tmp_path)
        refusals += outcome == "refused"
        tensors = read.values() if isinstance(read, dict) else []
        assert all(np.isfinite(np.frombuffer(values, np.float32)).all() for values in tensors)
    assert refusals > 60


EDITS: dict[str, Callable[[dict, list], object]] = {  # of the header and its list of streams
    "another model": lambda header, s: header["model"].update(num_layers=3),
    "no streams": lambda header, s: s.clear(),
    "a stream more": lambda header, s: s.append(["x", "brotli", 0, 0]),
    "a coder that is none": lambda header, s: s[-1].__setitem__(1, "lzma"),
    "a coder for other things": lambda header, s: s[0].__setitem__(1, "range"),
    "a trellis of 3 states": lambda header, s: header.update(trellis=3),
    "a scale of zero": lambda header, s: header.update(global_scale=0),
    "a scale that is no number": lambda header, s: header.update(global_scale=float("nan")),
    "a raw length off": lambda header, s: s[1].__setitem__(2, s[1][2] + 1),
    "a packed length off": lambda header, s: (s[0].__setitem__(3, s[0][3] - 1), s[1].__setitem__(3, s[1][3] + 1)),
    "a packed length negative": lambda header, s: (s[1].__setitem__(3, s[1][3] + s[0][3] + 9), s[0].__setitem__(3, -9)),
    "streams in another order": lambda header, s: s.reverse()}


@pytest.mark.parametrize("name", EDITS)
def test_a_header_that_does_not_fit_its_streams_or_model_is_refused(name: str):
    for body in fuzz.artifacts():
        header, streams = taken_apart(signed(body))
        EDITS[name](header, header["streams"])
        refused(put_together(header, streams))


@pytest.mark.parametrize("content", [b"", b"\xff" * 50, BOMB, brotli.compress(b"few")],
                         ids=["empty", "noise", "bomb", "few"])
@pytest.mark.parametrize("at, coder", [(0, "brotli"), (-1, "brotli"), (-1, "range")], ids=["values", "codes", "range"])
def test_a_stream_of_another_length_is_refused_before_it_is_unpacked_whole(small: bytes, at, coder, content):
    header, streams = taken_apart(small)
    streams[at], header["streams"][at][1], header["streams"][at][3] = content, coder, len(content)
    assert peak_while_refusing(put_together(header, streams)) < 1 << 24


def test_numbers_that_are_not_finite_are_refused(small: bytes):
    header, streams = taken_apart(small)
    at = [name for name, *_ in header["streams"]].index("fp16")
    raw = np.frombuffer(tg.join_bytes(brotli.decompress(streams[at])), dtype="<f2").copy()
    raw[len(raw) // 2] = np.inf
    streams[at] = brotli.compress(tg.split_bytes(raw.tobytes()))
    header["streams"][at][3] = len(streams[at])
    assert "finite" in refused(put_together(header, streams))


def test_a_knob_with_a_value_that_is_none_of_its_kind_is_refused(small: bytes):
    """Else it would surface later, as an exception of the forward; whatever else it holds, it is no exception here."""
    for field in vars(tg.ModelKnobs()):
        header, streams = taken_apart(small)
        header["model"][field] = 7 if isinstance(header["model"][field], str) else "seven"
        refused(put_together(header, streams))
        for value in (None, {"a": 1}, float("inf"), -10**30, 1e308):
            header["model"][field] = value
            try:
                tg.unpack(put_together(header, streams))
            except tg.UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("huge", [dict(num_layers=10**9), dict(num_loops=10**9, loop_start=0, loop_end=0),
                                  dict(vocab_size=65536, model_dim=2**17)], ids=["blocks", "loops", "gigabytes"])
def test_a_model_far_too_large_is_refused_before_it_is_built_or_unpacked(small: bytes, huge: dict, monkeypatch):
    """Also where the header fits its model, and a few bytes of Brotli could fulfil the claim."""
    header, streams = taken_apart(small)
    header["model"].update(huge)
    if "model_dim" in huge:
        sizes: dict[str, int] = {}
        for _, v, parameter in tg.shapes_of(tg.ModelKnobs(**header["model"])).tensors():
            for stream, size in tg.stream_parts(tg.route(parameter).stored, v.shape):
                sizes[stream] = sizes.get(stream, 0) + size
        header["streams"] = [[name, coder, sizes[name], size] for name, coder, _, size in header["streams"]]
        assert sum(sizes.values()) > 2**35
    else:
        monkeypatch.setattr(tg, "unroll_layers", lambda *args: pytest.fail("built"))
    inflate = tg.brotli_unpack
    monkeypatch.setattr(tg, "brotli_unpack", lambda data, size: inflate(data, size) if size < 2**20 else
                        pytest.fail("unpacked"))
    refused(put_together(header, streams))


# -- the shipped source --------------------------------------------------------------------------------

def payload(script: bytes) -> bytes:
    """What a packed script hands to the decompressor, read as Python reads the wrapper."""
    literals = [n.value for n in ast.walk(ast.parse(script)) if isinstance(n, ast.Constant)]
    return max((text for text in literals if isinstance(text, str)), key=len).encode("latin-1")


def test_the_packed_script_is_the_readable_one_without_docstrings_and_runs_alone(tmp_path: Path):
    class Strip(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
            return None if isinstance(node.value, ast.Constant) else node

    tree, script = Strip().visit(ast.parse((ROOT / "train_gpt.py").read_bytes())), tmp_path / "train_gpt.py"
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.body:
            node.body = [ast.Pass()]
    script.write_bytes(tg.shipped_source(ROOT / "train_gpt.py"))
    source = lzma.decompress(payload(script.read_bytes()))
    assert ast.dump(ast.parse(source)) == ast.dump(ast.parse(ast.unparse(tree)))
    assert tg.shipped_source(script) == script.read_bytes()  # packed once, packed for good
    done = subprocess.run([sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and all(f"  {name.upper()}=" in done.stdout for name in vars(tg.Config())), done.stderr


def test_every_payload_survives_the_wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All triples of the bytes that need care, and all bytes, with the compressor out of the way."""
    care = [bytes([c]) for c in b"\\\0\n\r\"078xN\x80"]
    data = b"".join(a + b + c for a in care for b in care for c in care) + bytes(range(256))
    monkeypatch.setattr(lzma, "compress", lambda *source, **how: data)
    (tmp_path / "source.py").write_text("pass\n")
    assert payload(tg.shipped_source(tmp_path / "source.py")) == data


# -- the cap -------------------------------------------------------------------------------------------

SMALL = dict(num_layers=2, model_dim=16, num_loops=0, parallel_start_layer=1, rope_dims=4)


@pytest.fixture(scope="module", params=["sdclip", "waterfill"])
def roomy(request: pytest.FixtureRequest) -> tuple[dict, tg.GPT, bytes]:
    """(knobs, model, artifact without a binding cap)."""
    knobs = dict(model_dim=64, num_heads=2, num_loops=0, quant=request.param)
    model = noisy(tiny(**knobs))
    return knobs, model, fitted(knobs, model, 10 ** 9, 0)


def fitted(knobs: dict, model: tg.GPT, cap: int, code_bytes: int) -> bytes:
    cfg = tiny(**knobs, artifact_bytes_cap=cap)
    with tg.Run(cfg, {}, log=False) as run:
        return tg.fit_to_cap(model, unit_sums(model), code_bytes, cfg, run)


def test_a_cap_that_does_not_bind_leaves_the_scales_alone(roomy: tuple):
    knobs, model, blob = roomy
    assert fitted(knobs, model, int(1.2 * len(blob)) + 5000, 5000) == blob


@pytest.mark.parametrize("share", [0.999, 0.6])
def test_a_cap_that_binds_is_met_from_below_and_nearly_used_up(roomy: tuple, share: float):
    knobs, model, free = roomy
    cap = int(share * len(free))
    blob = fitted(knobs, model, cap + 5000, 5000)
    assert 0.99 * cap <= len(blob) <= cap
    fine, coarse = tg.unpack(free), tg.unpack(blob)
    assert coarse.streams["fp16"] == fine.streams["fp16"]
    ratios = [float((values - fine.tensors[name]).std() / fine.tensors[name].std())
              for name, values in coarse.tensors.items() if name.startswith("blocks.")]
    assert 0 < min(ratios) and max(ratios) < 0.5


@pytest.mark.parametrize("quant, cap, code_bytes", [("sdclip", 500, 0), ("waterfill", 500, 0), ("waterfill", 10, 5000)])
def test_a_cap_that_nothing_fits_is_one_clear_line_with_the_sizes(quant: str, cap: int, code_bytes: int):
    with pytest.raises(tg.UserError, match=f"^ARTIFACT_BYTES_CAP={cap:,}: code {code_bytes:,} .*$"):
        fitted(dict(SMALL, quant=quant), noisy(tiny(**SMALL)), cap, code_bytes)


def test_waterfill_takes_the_bits_it_may_and_a_table_of_zeros_does_not_make_the_scales_finer():
    """Rows that no training text has met cost no bits, and the bits that they might have had go to nobody."""
    knobs = dict(model_dim=64, num_heads=2, num_loops=0)
    model = noisy(tiny(**knobs))
    with torch.no_grad():
        model.tok_emb[40:] = 0
    artifact = tg.unpack(fitted(knobs, model, 10 ** 9, 0))
    stored = [(name, values) for name, values, p in model.tensors() if tg.route(p).stored.startswith("gptq:")]
    bits = 8 * sum(size for name, (_, size) in artifact.streams.items() if name.startswith("gptq:"))
    assert bits / sum(int(v.count_nonzero()) for _, v in stored) == pytest.approx(5.0, abs=0.35)
    for name, values in stored:  # a uniform error of a step at 5 bits of a Gaussian is 0.03 of its deviation
        error = float((artifact.tensors[name] - values).square().mean().sqrt() / values.square().mean().sqrt())
        assert 0.003 < error < 0.1, name


@pytest.mark.parametrize("share", [0.99, 0.7, 0.45])
@pytest.mark.parametrize("curve", [lambda octaves: 1 - octaves / 6, lambda octaves: 8 ** -octaves,
                                   lambda octaves: (1 + octaves) ** -0.7], ids=["one bit an octave", "steep", "flat"])
def test_the_search_ends_within_a_thousandth_below_the_cap(curve: Callable[[float], float], share: float):
    """Whatever the size does when the scales grow, past the cap or short of it."""
    size, tried = 300_000, []
    cap = int(share * size)

    def pack_at(octaves):
        tried.append(octaves)
        return bytes(int(size * curve(octaves)))

    assert 0.999 * cap <= len(tg.search(pack_at, cap, 0.0, 0.0, size / 6, lambda: False)) <= cap
    assert len(tried) <= 15


def test_no_gptq_begins_that_would_end_beyond_the_budget(run: tg.Run, monkeypatch: pytest.MonkeyPatch):
    """What fits is taken though it leaves room; what the budget was overdrawn by is said, with the remedy."""
    sizes = iter([15000, 9000, 9500, 9995])
    assert len(tg.search(lambda octaves: bytes(next(sizes)), 10_000, 0.0, 0.0, 1e5, lambda: False)) == 9995
    sizes, late = iter([15000, 9000, 9500]), iter([True])
    assert len(tg.search(lambda octaves: bytes(next(sizes)), 10_000, 0.0, 0.0, 1e5, lambda: next(late))) == 9000
    cfg, texts = tiny(**SMALL, quant="sdclip", max_wallclock_seconds=600), []
    run.charged["train"] = 602.0
    monkeypatch.setattr(run, "log", lambda event, **values: texts.append(values.get("text", "")))
    tg.fit_to_cap(noisy(cfg), unit_sums(noisy(cfg)), 0, cfg, run)
    assert "s more than MAX_WALLCLOCK_SECONDS=600: set GPTQ_RESERVE_SECONDS=1" in texts[-1]
