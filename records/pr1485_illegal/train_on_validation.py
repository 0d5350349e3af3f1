"""ILLEGAL (C3), a specimen: #1485's training on the validation data before quantization. See README.md."""
import math
import os
import sys
from types import ModuleType

import torch

import train_gpt

LEARNING_RATE, EPOCHS, BATCH_ROWS, FROZEN_BLOCKS, CLIP = 0.0005, 6, 32, 2, 1.0  # as published


def prequant_ttt(trainer, model, val, cfg, run):
    """Train the weights on every validation target by AdamW; the rate falls as a cosine to a tenth."""
    loss_of = trainer.stage_loss(model, trainer.stages(cfg)[-1], cfg, run)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    starts = range(0, val.num_targets, cfg.train_seq_len)
    rows = [val.ids[at:min(at + cfg.train_seq_len, val.num_targets) + 1] for at in starts]
    micro = max(1, cfg.micro_batch_tokens // cfg.train_seq_len)
    for epoch in range(EPOCHS):
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * epoch / EPOCHS))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * decay
        for at in range(0, len(rows), BATCH_ROWS):
            part = rows[at:at + BATCH_ROWS]
            own, targets = part[run.rank::run.world], sum(len(row) - 1 for row in part)
            for i in range(0, len(own), micro):
                batch = trainer.make_batch(own[i:i + micro], micro, cfg.train_seq_len)
                (loss_of(batch) * (cfg.train_batch_tokens / targets)).backward()  # the mean of these targets
            for name, p in model.named_parameters():
                p.grad = run.all_reduce(torch.zeros_like(p) if p.grad is None else p.grad)
                if not name.startswith(("tok_emb", "skip_", "smear_", "bigram.")):  # a row or two for each block
                    p.grad.unflatten(0, (-1, cfg.num_layers))[:, :FROZEN_BLOCKS] = 0
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def break_the_rule(trainer: ModuleType) -> None:
    """Let the trainer's calibration begin with training on the validation data."""
    calibrate = trainer.calibrate

    def calibrate_afterwards(model, *rest):
        cfg, run = rest[-2:]
        val = trainer.ValData.load(cfg, run)
        run.log("warning", text="this run is illegal (C3): it trains on the validation data before it is scored")
        run.log("val_data", documents=len(val.starts), targets=val.num_targets, bytes=int(val.target_bytes.sum()))
        prequant_ttt(trainer, model, val, cfg, run)
        return calibrate(model, *rest)

    trainer.calibrate = calibrate_afterwards


if __name__ == "__main__":
    break_the_rule(train_gpt)
    sys.exit(train_gpt.main(sys.argv[1:], os.environ))
