"""What a training step costs on 1 to 64 GPUs, on paper: measured parts of one rank, stated speeds of the links.

    ./run.sh bench scaling [JSON of ./run.sh bench, one GPU] [--nvlink GB/s] [--network GB/s]

Without a JSON the parts are those of the public record #1855 (17 visits, 8xH100: 140.9 ms a step of 98,304 tokens a
GPU, of which its log leaves 14.6 ms that do not depend on the number of visits, here taken as independent of rows; its
own collectives are in them, too). Links: NVLink 350 GB/s (data sheet of the H100: 450), the ports of a node 400 GB/s
(eight of 400 Gb/s, one a GPU, as in a DGX H100; its rings use all of them); a step of a ring takes 3.4 us within a node
and 14 us between nodes (NCCL's tuning table, protocol Simple). Nothing overlaps, so the links' share is an upper bound.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import train_gpt as tg
from bench.common import Row, show
from bench.step import newton_schulz_flops
from tools.common import program

RECORD_ROW_MS, RECORD_FIXED_MS = (140.9 - 14.6) / 48, 14.6
"""Milliseconds of a row of 2,048 tokens, forward and backward, and of what else a step does (see above)."""
SLOW_NEWTON_SCHULZ = 250e12
"""FLOP/s of Newton-Schulz where it was not measured: small square products on an H100."""


def ring_ms(moved: float, world: int, rounds: int, nvlink: float, network: float, gpus: int = 8) -> float:
    """A collective of `moved` bytes on a ring: `rounds` 1 (reduce-scatter, all-gather) or 2 (all-reduce)."""
    if world == 1:
        return 0.0
    between = -(-world // gpus) if world > gpus else 0  # ring steps that cross nodes, of world - 1
    bandwidth = 1e9 * (min(nvlink, network) if between else nvlink)  # of the slowest link that all data crosses
    latency = 14e-6 * between + 3.4e-6 * max(0, world - 1 - between)
    return 1e3 * rounds * ((world - 1) / world * moved / bandwidth + latency)


def parts(path: Path | None) -> tuple[float, float, float]:
    """(ms of a row, ms that every step costs, FLOP/s of Newton-Schulz) from a bench's JSON, or the record's.

    Raises `UserError` for another file.
    """
    if path is None:
        return RECORD_ROW_MS, RECORD_FIXED_MS, SLOW_NEWTON_SCHULZ
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        tables = {title: {row["name"]: row for row in rows} for title, rows in report["tables"].items()}
        off, on = tables.get("unlooped", tables.get("step")), tables.get("step")
        tg.require(on is not None and report["world"] == 1, f"{path}: expected one process's ./run.sh bench, with "
                   f"`step`")
        rows = report["tokens_a_rank"] // report["knobs"]["train_seq_len"]
        few = -(-rows // 8)
        many_ms, few_ms = off["forward"]["ms"] + off["backward"]["ms"], off["forward and backward, few rows"]["ms"]
        launch = max(0.0, few_ms - few * (many_ms - few_ms) / max(1, rows - few))  # the line through both, at no rows
        each = (on["forward"]["ms"] + on["backward"]["ms"] - launch) / rows
        rest = on["optimizer"]["ms"] - on["newton_schulz"]["ms"] + on["ema"]["ms"]
        return each, launch + rest, 1e12 * on["newton_schulz"]["tflop_s"]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise tg.UserError(f"{path}: not the JSON of a ./run.sh bench with `step` ({type(error).__name__}: "
                           f"{tg.one_line(error)})") from None


def scaling_rows(cfg: tg.Config, each: float, fixed: float, speed: float, nvlink: float, network: float) -> list[Row]:
    """Rows by world size for the config's global batch."""
    model = tg.shapes_of(cfg)
    banks = [p for name, p in model.named_parameters() if tg.route(name).rule == "muon"]
    small = 4.0 * (sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in banks))
    rows: list[Row] = []
    for world in (1, 2, 4, 8, 16, 24, 32, 48, 64):
        own = [bank[:1].expand(-(-len(bank) // world), *bank.shape[1:]) for bank in banks]
        padded = sum(slices.numel() for slices in own) * world
        compute = each * -(-cfg.train_rows // world) + fixed
        orthogonal = 1e3 * newton_schulz_flops(own, cfg.muon_backend_steps) / speed
        # gradients in fp32 are scattered, updates in bf16 gathered bank by bank, the small parameters all-reduced
        moving = sum(ring_ms(4.0 * world * s.numel(), world, 1, nvlink, network)
                     + ring_ms(2.0 * world * s.numel(), world, 1, nvlink, network) for s in own)
        moving += ring_ms(small, world, 2, nvlink, network)
        step = compute + orthogonal + moving
        rows.append({"name": f"{world} GPUs", "nodes": math.ceil(world / 8), "rows": -(-cfg.train_rows // world),
                     "compute_ms": compute, "newton_schulz_ms": orthogonal, "links_ms": moving, "step_ms": step,
                     "padding": padded / sum(bank.numel() for bank in banks) - 1,
                     "efficiency": (rows[0]["step_ms"] if rows else step) / step / world,
                     "m_tok_s": cfg.train_batch_tokens / step / 1e3})
    return rows


def main(arguments: Sequence[str]) -> int:
    """The table and its JSON."""
    parser = argparse.ArgumentParser(prog="./run.sh bench scaling", description=__doc__.split("\n\n")[0])
    parser.add_argument("report", nargs="?", type=Path, help="JSON of ./run.sh bench, measured on one GPU")
    parser.add_argument("--nvlink", type=float, default=350.0, help="GB/s of a GPU's bus within a node")
    parser.add_argument("--network", type=float, default=400.0, help="GB/s of all ports of a node together")
    asked = parser.parse_args(arguments)
    tg.require(asked.report is None or asked.report.is_file(), f"{asked.report}: no such file")
    tg.require(asked.nvlink > 0 and asked.network > 0,
               f"--nvlink {asked.nvlink:g} --network {asked.network:g}: expected positive numbers of GB/s")
    cfg = tg.Config()
    rows = scaling_rows(cfg, *parts(asked.report), asked.nvlink, asked.network)
    show(f"a step of {cfg.train_batch_tokens:,} tokens, loop on, {asked.report or 'record #1855'}", rows)
    print(json.dumps({"nvlink": asked.nvlink, "network": asked.network, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "bench"))
