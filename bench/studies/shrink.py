"""From weights to an artifact and back: calibration, factors, GPTQ, packing, unpacking (part of bench/all.py)."""
from __future__ import annotations

import dataclasses

import torch

import train_gpt as tg
from bench.common import Machine, Row, row, summary, timed
from tools import predict


def shrink_rows(cfg: tg.Config, run: tg.Run, roof: Machine, repeats: int = 3) -> list[Row]:
    """Rows of the stages. The weights are random, so that all codes have work in them."""
    cfg = dataclasses.replace(cfg, gptq_calibration_batches=min(2, cfg.gptq_calibration_batches))
    data, model = tg.TrainData(cfg, run), tg.build_model(cfg, run)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    times: dict[str, list[float]] = {}
    for i in range(repeats):
        sums = timed(times, "calibrate", run, tg.calibrate, model, data, 0, cfg, run)
        quantizer = timed(times, "factorize", run, tg.Quantizer, model, sums, cfg, run)
        unit = 2.0 ** timed(times, "allocate", run, quantizer.octaves_for, cfg.bits_per_weight * quantizer.weights) \
            if cfg.quant == "waterfill" else 1.0
        tensors = timed(times, "gptq" if i else "gptq, cold", run, quantizer.quantize, unit, quantizer.solved)
        streams = timed(times, "pack", run, tg.pack_streams, tensors, quantizer.states, ("range", "brotli"))
        blob = tg.pack(streams, unit, quantizer.states, cfg, cfg.preset)
        timed(times, "unpack", run, tg.unpack, blob)
    tokens = max(1, cfg.gptq_calibration_batches * cfg.micro_batch_tokens // cfg.train_seq_len) * cfg.train_seq_len
    grams = sum(2 * gram.size(0) ** 2 for gram in sums.gram.values())  # over stored products; visits of the loop: more
    plan = tg.unroll_layers(cfg, looped=True)
    counted = {"calibrate": tokens * (2 * predict.forward_flops(cfg, plan, cfg.train_seq_len / 2) + grams),
               # each column's error goes to the columns after it: C^2 / 2 multiply-adds a row
               "gptq": sum(g.weights[..., 0].numel() * g.weights.size(2) ** 2 for g in quantizer.groups)}
    each = {"calibrate": tokens, "pack": quantizer.weights, "unpack": quantizer.weights}
    rows = []
    for name, seconds in times.items():
        sample, flops = summary(seconds), counted.get(name.split(",")[0], 0.0)
        rows.append(row(name, sample, roof, flops, items_s=each.get(name, 0) / sample.median or None,
                        bytes=len(blob) if name == "pack" else None))
    return rows
