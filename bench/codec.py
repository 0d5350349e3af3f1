"""Bytes and seconds of the coders of quantized codes, against general compressors, on the codes of an artifact.

    ./run.sh bench codec ARTIFACT

One row a coder: bytes of each family of matrices and of all, ratio to the range coder, seconds per million codes. All
get the same symbols: with a trellis what is left to say of a code whose parity is known, which only the range coder
gains from. xz and lrzip read them as int8 (int16 where they do not fit), columns first, family by family, as the public
records feed lrzip. `entropy` is the histogram's bound, matrix by matrix, without side information.
"""
from __future__ import annotations

import lzma
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import train_gpt as tg
from bench.common import Row, show
from tools.common import program

Matrices = Sequence[np.ndarray]


def codes_of(blob: bytes) -> tuple[dict[str, list[np.ndarray]], int]:
    """(int16 codes of each family as the artifact holds them, states of its trellis)."""
    found: list[list[np.ndarray]] = []
    states = []

    def spy(unpack: Callable[..., list[np.ndarray]]) -> Callable[..., list[np.ndarray]]:
        def call(data: bytes, shapes: Sequence[Sequence[int]], number: int) -> list[np.ndarray]:
            states.append(number)
            found.append(unpack(data, shapes, number))
            return found[-1]
        return call

    kept = dict(tg.CODERS)
    try:
        tg.CODERS.update({name: (pack, spy(unpack)) for name, (pack, unpack) in kept.items()})
        streams = tg.unpack(blob).streams
    finally:
        tg.CODERS.update(kept)
    return dict(zip((name for name in streams if name.startswith("gptq:")), found)), states[0]


def plain_bytes(matrices: Matrices, states: int) -> bytes:
    """Symbols for a general compressor."""
    flat = np.concatenate([(matrix >> (states > 1)).T.reshape(-1) for matrix in matrices])
    return flat.astype(np.int8 if np.abs(flat).max() < 128 else np.int16).tobytes()


def lrzip(data: bytes) -> bytes:
    """`lrzip -z -L 9` (ZPAQ) in a file of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "codes"
        path.write_bytes(data)
        subprocess.run(["lrzip", "-q", "-z", "-L", "9", str(path)], check=True, stdout=subprocess.DEVNULL)
        return path.with_suffix(".lrz").read_bytes()


def unlrzip(data: bytes) -> bytes:
    """Inverse of `lrzip`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "codes.lrz"
        path.write_bytes(data)
        subprocess.run(["lrzip", "-q", "-d", str(path)], check=True, stdout=subprocess.DEVNULL)
        return path.with_suffix("").read_bytes()


def code_entropy(codes: np.ndarray, states: int) -> float:
    """Bits of a matrix's int16 codes by their histogram; where a trellis tells the parity, it is known."""
    bits = 0.0
    for some in (codes[codes & 1 == 0], codes[codes & 1 == 1]) if states > 1 else (codes,):
        counts = np.bincount(some.reshape(-1).astype(np.int64) + 2 ** 15).astype(np.float64)
        bits -= float((counts * np.log2(counts.clip(1) / max(1, some.size))).sum())
    return bits


def coder_rows(families: dict[str, list[np.ndarray]], states: int) -> list[Row]:
    """A row for each coder; every one must give back what it got."""
    def own(name: str) -> tuple[Callable[[Matrices], bytes], Callable[[bytes, Matrices], bool]]:
        pack, unpack = tg.CODERS[name]
        return (lambda matrices: pack(matrices, states), lambda data, matrices: all(
            np.array_equal(a, b) for a, b in zip(unpack(data, [m.shape for m in matrices], states), matrices)))

    def general(pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]
                ) -> tuple[Callable[[Matrices], bytes], Callable[[bytes, Matrices], bool]]:
        return (lambda matrices: pack(plain_bytes(matrices, states)),
                lambda data, matrices: unpack(data) == plain_bytes(matrices, states))

    coders = {"range": own("range"), "brotli": own("brotli"),
              "xz -9e": general(lambda d: lzma.compress(d, preset=9 | lzma.PRESET_EXTREME), lzma.decompress)}
    if shutil.which("lrzip"):
        coders["lrzip -z -L 9"] = general(lrzip, unlrzip)
    millions = sum(m.size for matrices in families.values() for m in matrices) / 1e6
    rows: list[Row] = []
    for name, (pack, unpack) in coders.items():
        begin = time.perf_counter()
        packed = {family: pack(matrices) for family, matrices in families.items()}
        middle = time.perf_counter()
        if not all(unpack(packed[family], matrices) for family, matrices in families.items()):
            raise AssertionError(f"{name}: the codes do not come back")
        end = time.perf_counter()
        sizes = {family: len(data) for family, data in packed.items()}
        rows.append({"coder": name, **sizes, "all": sum(sizes.values()), "ratio": 0.0, "pack_s_per_million":
                     (middle - begin) / millions, "unpack_s_per_million": (end - middle) / millions})
    entropy = {family: round(sum(code_entropy(m, states) for m in matrices) / 8)
               for family, matrices in families.items()}
    rows.append({"coder": "entropy", **entropy, "all": sum(entropy.values())})
    for row in rows:
        row["ratio"] = row["all"] / rows[0]["all"]
    return rows


def main(arguments: Sequence[str]) -> int:
    """Exit status 0."""
    tg.require(len(arguments) == 1 and Path(arguments[0]).is_file(), "expected the path of one artifact, such as "
               "logs/RUN_ID.bin")
    families, states = codes_of(Path(arguments[0]).read_bytes())
    show(f"{arguments[0]}: {sum(m.size for f in families.values() for m in f):,} codes, trellis of {states} states",
         coder_rows(families, states))
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "bench"))
