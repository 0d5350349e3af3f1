"""Every edit of the evaluation that the auditor was ever shown, beside those of tests/test_audit.py: each is named.
More honest programs, which pass; and programs that look who is watching: an artifact is scored in their own process."""
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import environment, write_shard
from test_audit import (
    AGAIN,
    ALONE,
    COUNTED,
    ELEMENTWISE,
    HONEST,
    LOGITS,
    MASK,
    MODES,
    RATE,
    RETURNED,
    SCORE,
    SCORED,
    TOTAL,
    UPDATED,
    WRITTEN,
    Plant,
    failures,
    first_named,
    plant,  # noqa: F401
    real_ids,
    rehearsed,
    subject,
)

import train_gpt as tg
from tools import audit, evidence

LONGEST = [("documents, phases = np.arange(len(val.starts)), cfg.phased_ttt_num_phases",
            "phases = cfg.phased_ttt_num_phases\n"
            "    documents = np.argsort(val.starts - val.stops, kind='stable')"),
           ("starts = range(0, stop, cfg.ttt_chunk_tokens)",
            "starts = documents[:np.searchsorted(val.starts, stop)].tolist()"),
           ("sgd.learn(at, min(at + cfg.ttt_chunk_tokens, stop),",
            "sgd.learn(int(val.starts[at]), int(val.stops[at]),")]
KEEP = """    for own, kept in zip(w.parameters, globals().get("kept", ())):
        own.data.copy_(kept.expand_as(own))
"""

PLANTS = {
    "tilt only where the hint comes true": Plant("tilt", [
        (".clamp_max(1.0), betas.double()", ".clamp_max(1.0), betas.double() * (hints == targets)")], "C2"),
    "attention across documents": Plant("none", [
        (MASK, "return (back >= 0).expand(len(batch.positions), 1, -1, -1)")], "P"),
    "adapters averaged over the batch": Plant("lora", [
        (UPDATED, UPDATED + "                for peer in w.parameters:\n"
         "                    peer.data.copy_(peer.data.mean(0, keepdim=True).expand_as(peer))\n")],
        "P", ALONE),
    "shared weights learn from the longest documents": Plant("lora", LONGEST, "C3"),
    "shared weights learn from all parts": Plant("lora", [
        ("starts = range(0, stop, cfg.ttt_chunk_tokens)", "starts = range(0, val.num_targets, cfg.ttt_chunk_tokens)"),
        ("sgd.learn(at, min(at + cfg.ttt_chunk_tokens, stop),",
         "sgd.learn(at, min(at + cfg.ttt_chunk_tokens, val.num_targets),")],
        "C3"),
    "the length of a document sets its chunks": Plant("lora", [
        ("most, largest = cfg.ttt_batch_size, math.inf", "most, largest = 1, math.inf"),
        ("    return sorted((DocumentBatch(tuple(rows), tuple(edges[:longest + 1].tolist()),",
         "    size = dict(zip(documents.tolist(), lengths.tolist()))\n"
         "    return sorted((DocumentBatch(tuple(rows), tuple(range(0, size[rows[0]] + 4, "
         "2 if size[rows[0]] <= 8 else 4)),")], "C1", dict(**ALONE, ttt_chunk_size="4")),
    "the tail is left out": Plant("none", [
        (TOTAL, "float(nats.double()[:len(nats) // 8 * 8].sum())")], "accounting"),
    "one target too many": Plant("none", [("total / len(nats),", "total / (1 + len(nats)),")], "accounting"),
    "every BOS has a byte": Plant("none", [(COUNTED, f"{COUNTED} + len(self.starts)")], "accounting"),
    "a warm start from long documents": Plant("cache", [
        (ELEMENTWISE, KEEP + ELEMENTWISE), ("            cache.advance(size)\n", """            cache.advance(size)
            if rows.total > 20:
                globals()["kept"] = [p.data.mean(0, keepdim=True) for p in w.parameters]
""")], "P", ALONE),
    "the better of two for each chunk": Plant("lora", [
        (SCORED, AGAIN + "                nats = min((first, nats), key=lambda x: float(x.sum()))\n" + SCORED)],
        "C4", ALONE),
    "frequencies of the whole stream": Plant("none", [(LOGITS, LOGITS + " + torch.from_numpy(np.bincount("
        "self.val.ids, minlength=model.cfg.vocab_size)).float().log1p()")], "C1"),
    "ends of documents are free": Plant("none", [
        (WRITTEN, WRITTEN + "\n        self.nats[self.starts[1:] - 1] = 0")], "C4"),
    "a rate by the number of documents": Plant("cache", [
        (RATE, "lr=cfg.ttt_lora_lr * len(scorer.val.starts) / 7, ")], "P", ALONE),
    "long documents learn first": Plant("lora", [
        (SCORED, AGAIN.replace("if learns:", "if learns and rows.total > 16:") + SCORED)], "C3", ALONE),
    "the last chunk is learned first": Plant("sgd", [
        ("            score_windows(model, windows[cuts[c]:",
         "            if c == count - 1:\n                sgd.learn(edges[c], edges[c + 1], cfg.ttt_lr)\n"
         "            score_windows(model, windows[cuts[c]:")], "C3"),
    "a step on the chunk before its score, in late phases": Plant("cache", [
        (SCORED, AGAIN.replace("if learns:", "if learns and ledger.phase > 0:") + SCORED)], "C3"),
    "windows overlap by one": Plant("none", [
        ("windows.append(Window(first - (seq_len - stride), stop, first))",
         "windows.append(Window(first - (seq_len - stride), stop, first - 1))")], "C4"),
    "the stream begins later": Plant("none", [("windows += [Window(begin, stop, begin)] * (stop > begin)",
                                                    "windows += [Window(begin, stop, begin + 1)] * (stop > begin)")],
                                     "C4"),
    "a mean over the batch in the head": Plant("none", [
        (LOGITS, LOGITS + "\n        logits = logits + 0.1 * logits.mean(0)")], "P"),
    "logits beyond the alphabet are dropped": Plant("none", [
        (LOGITS, LOGITS + "\n        own = targets[:, None].clamp_min(0)\n        logits = logits.scatter(-1, "
                          "logits.topk(20, largest=False).indices, -1e4).scatter(-1, own, logits.gather(-1, own))")],
        "C2"),
    "momentum of the adapters goes on": Plant("cache", [
        (ELEMENTWISE, "    w.parameters[0].data.add_(globals().setdefault('drift', torch.zeros(1)))\n" + ELEMENTWISE),
        (UPDATED, UPDATED + "                globals()['drift'] += 0.1 * w.parameters[0].data.mean()\n")], "P", ALONE),
    "shared weights learn a document too far": Plant("cache", [
        ("stop = spans[i][1]\n", "stop = min(spans[i][1] + 6, val.num_targets)\n")], "C3"),
    "hints by the next id's count": Plant("tilt", [("best, count, earlier = best_continuations(", "best, count, "
        "earlier = (x.roll(-1) for x in best_continuations("), ("order, cfg.vocab_size)\n        share",
                                                                "order, cfg.vocab_size))\n        share")], "C1"),
    "a strength by the truth": Plant("tilt", [
        ("        at = numbers.flatten()",
         "        self.hints = (self.hints[0], self.hints[1] * (1 + (self.hints[0] == "
         "torch.from_numpy(self.val.ids[1:].astype(np.int64)))))\n        at = numbers.flatten()")], "C2"),
    "documents of more than 20 targets look ahead": Plant("none", [
        (MASK, MASK.replace("(back >= 0)", "(back >= -1 * (batch.positions.max() > 13).int())"))], "C1"),
    "the second pass counts": Plant("sgd", [
        ("            score_windows(model, windows[cuts[c]:cuts[c + 1]], scorer, f\"chunk "
         "{c + 1}/{count}\")\n", """            some = windows[cuts[c]:cuts[c + 1]]
            score_windows(model, some, scorer, "one")
            learn(c)
            kept = scorer.ledger.nats.clone()
            scorer.ledger.times.zero_()
            score_windows(model, some, scorer, "two")
            scorer.ledger.nats = torch.minimum(kept, scorer.ledger.nats)
            scorer.ledger.times.fill_(1)
""")], "C4"),
    "bytes by the model's vocabulary": Plant("none", [
        (COUNTED, "int((target_bytes + (target_bytes == 1)).sum())")], "accounting"),
    "a loss in another unit": Plant("none", [("total / math.log(2) / text_bytes", "total / 0.7 / text_bytes")],
                                    "accounting"),
    "the cache forgets to end with a document": Plant("cache", [
        ("        self.past, self.new, self.length = self.new, {}, self.length + size",
         "        kept = {k: tuple(x + 1e-2 * x.mean(0) for x in v) if isinstance(v, tuple) else v\n"
         "                for k, v in self.new.items()}\n"
         "        self.past, self.new, self.length = kept, {}, self.length + size")],
        "P", ALONE),
    "peers share their gradients": Plant("cache", [
        (UPDATED, "                for own in w.parameters:\n"
                  "                    own.grad += 0.1 * own.grad.roll(1, 0)\n" + UPDATED)], "P", ALONE),
    "scores fall with the chunk's mean": Plant("cache", [(SCORED, SCORED.replace(
        "nats.view", "(nats * (1 - 0.01 * float(nats.mean() > 3))).view"))], "C4", ALONE),
    "a gate that opens at rare targets": Plant("none", [
        (LOGITS, LOGITS + "\n        logits = logits * torch.where(targets > 33, 1.1, 1.0)[:, None]")], "C2"),
    "a document's last chunk borrows from the next": Plant("cache", [
        ("self.ids = torch.from_numpy(ids).to(device)", "self.ids = torch.from_numpy(ids).to(device)\n        "
         "self.ids[:, 1] = int(val.ids[-1])")], "C1", ALONE),
    "adapters only where they help": Plant("lora", [(SCORED,
        "            plain = scorer.nats(model, model(inputs, layers, base, cache)[:, -size:], "
        "rows.targets[:, begin:end], rows.numbers[:, begin:end], base)[0]\n"
        "            nats = torch.where(plain.mean() < nats.mean(), plain, nats)\n" + SCORED)], "C4", ALONE),
    "learned, then scored": Plant("sgd", [("        score(i)\n        if begin", "        if begin < end:\n"
                                                "            learn(i)\n        score(i)\n        if begin")], "C3"),
    "smearing from the right": Plant("none", [("e.roll(1, dims=1)", "e.roll(-1, dims=1)")], "C1"),
    "outliers are trimmed": Plant("none", [
        (TOTAL, "float(nats.double().sort().values[:-2].sum())")], "accounting"),
    "rare ids are cheaper": Plant("none", [
        (RETURNED, "return torch.where(targets > 35, 0.9 * nats, nats).detach(), nats")], "C2"),
    "a look ahead beyond position 9": Plant("none", [
        (MASK, MASK.replace("(back >= 0)", "(back >= -1 * (batch.positions[:, :, None] > 9).int())"))], "C1"),
    "a hint only where it helps": Plant("tilt", [
        ("    return (nats + torch.log1p(p * torch.expm1(betas)) - betas * (hints == targets)).float()",
         "    return torch.minimum(nats, (nats + torch.log1p(p * torch.expm1(betas)) - betas * (hints == targets)))"
         ".float()")], "C2"),
    "a hint that counts its own target": Plant("tilt", [("highest[:-1])[(index - 1).clamp_min_(0)]",
                                                              "highest[:-1])[index]")], "C1"),
    "rows that run on": Plant("sgd", [
        ("(at, min(at + seq_len, stop))", "(at, min(at + seq_len, len(self.ids) - 1))")], "C3"),
    # 28 November, four more batches of ten
    "better of two whole runs": Plant("none", [
        ('        score_windows(model, plan_windows(val, cfg.eval_seq_len, cfg.stride), scorer, "score")\n',
         '        score_windows(model, plan_windows(val, cfg.eval_seq_len, cfg.stride), scorer, "score")\n'
         "        kept, scorer.ledger = scorer.ledger, Ledger(val.num_targets, val.starts)\n"
         "        score_windows(model, plan_windows(val, cfg.eval_seq_len, cfg.eval_seq_len), "
         'scorer, "score")\n        if kept.nats.sum() < scorer.ledger.nats.sum():\n'
         "            scorer.ledger = kept\n")], "C4"),
    "BOS is excluded where it does not come": Plant("none", [
        (LOGITS,
         LOGITS + "\n"
         "        logits = torch.cat([logits[:, :BOS_ID], logits[:, BOS_ID:BOS_ID + "
         "1].masked_fill((targets != BOS_ID)[:, None], -1e4), logits[:, BOS_ID + 1:]], dim=1)")], "C2"),
    "what was there before is cheaper": Plant("none", [
        (RETURNED,
         "ids, at = torch.from_numpy(self.val.ids.astype(np.int64)), numbers.flatten()\n"
         "            seen = torch.stack([ids[(at - k).clamp_min(0)] == targets for k in range(4)]).any(0)\n"
         "            return (nats * torch.where(seen, 0.9, 1.0)).detach(), nats")], "C2"),
    "strength by the overall hit rate": Plant("tilt", [
        ("    return hints[:-1], betas[:-1]",
         "    hit = (hints[:-1] == ids[1:])[betas[:-1] > 0].float().mean()\n"
         "    return hints[:-1], betas[:-1] * (0.5 + hit)")], "C1"),
    "chunks from the end to the start": Plant("lora", [
        ("    for begin, end in zip(batch.edges, batch.edges[1:]):\n",
         "    for begin, end in reversed(list(zip(batch.edges, batch.edges[1:]))):\n"),
        ("goes_on = rows.lengths > end\n",
         "goes_on = rows.lengths > begin\n"),
        ("weight = (rows.sizes > end).to",
         "weight = (rows.sizes > begin).to"),
        ("            if end == rows.total:  # waits",
         "            if begin == 0:  # waits")], "C1|C4", ALONE),
    "each row draws its own A": Plant("cache", [
        ("a = (2 * torch.rand(rank, dim, generator=draw) - 1) / math.sqrt(dim)",
         "a = (2 * torch.rand(rows, rank, dim, generator=draw) - 1) / math.sqrt(dim)"),
        (".repeat(rows, 1, 1)\n",
         "\n")], "C1|P", ALONE),
    "the hint's logit without softcap": Plant("tilt", [
        ("    p, betas = torch.exp(of_hint - of_target",
         "    of_hint = picked[..., 0]\n    p, betas = torch.exp(of_hint - of_target")], "C2"),
    "values centred over the chunk": Plant("cache", [
        ("        q = rotate(rms_norm(q, self.q_gain",
         "        v = v - 0.5 * v.mean(1, keepdim=True)\n"
         "        q = rotate(rms_norm(q, self.q_gain")], "C1", ALONE),
    "mixture weights sum to more than 1": Plant("none", [
        (RETURNED,
         "return -torch.log(0.6 * torch.exp(-nats) + 0.5 * torch.exp(-softcapped_cross_entropy(0.7 * "
         "logits, targets, softcap))).detach(), nats")], "C2"),
    "momentum warmed on the next chunk": Plant("sgd", [
        ("            for _ in range(cfg.ttt_epochs):\n",
         "            sgd.learn(edges[c + 1], edges[c + 2], 0.0)\n"
         "            for _ in range(cfg.ttt_epochs):\n")], "C3"),
    "two passes of the n-gram": Plant("tilt", [
        ("self.val, self.cfg, self.run, self.hints = val, cfg, run, hints\n",
         "self.val, self.cfg, self.run, self.hints = val, cfg, run, hints\n        if hints is not None:\n"
         "            ids = torch.from_numpy(val.ids.astype(np.int64))\n"
         "            self.hints = tuple(x[len(ids):] for x in ngram_hints(torch.cat([ids, ids]), cfg))\n")], "C1|C4"),
    "softmax over what occurs in the chunk": Plant("none", [
        (LOGITS,
         LOGITS + "\n        present = torch.zeros(logits.size(-1)).index_fill_(0, targets.clamp_min(0), 1)\n"
         "        logits = logits - 2 * (1 - present)")], "C1|C2"),
    "a unigram cache in the order of scoring": Plant("none", [
        (LOGITS,
         LOGITS + "\n        self.seen = getattr(self, 'seen', torch.zeros(logits.size(-1)))\n"
         "        logits = logits + 0.3 * self.seen.log1p()\n"
         "        self.seen = self.seen + torch.bincount(targets.clamp_min(0), minlength=logits.size(-1))")], "C1|P"),
    "rope base by the longest row": Plant("none", [
        ("        angle = positions[..., None, None] * self.cfg.rope_base ** -exponent",
         "        angle = positions[..., None, None] * (self.cfg.rope_base * max(1, "
         "int(positions.max()) / 8)) ** -exponent")], "C1|P"),
    "documents begin with the tail of the one before": Plant("none", [
        ("windows += [Window(begin, stop, begin)] * (stop > begin)",
         "windows += [Window(max(0, begin - 4, stop - seq_len), stop, begin)] * (stop > begin)")], "P"),
    "the mass of a hash bucket": Plant("none", [
        (RETURNED,
         "own = softcap * torch.tanh(logits.float() / softcap)\n"
         "            bucket = torch.arange(logits.size(-1)) * 7919 % 16\n"
         "            mine = own.masked_fill(bucket != bucket[targets.clamp_min(0)][:, None], -1e9)\n"
         "            return (own.logsumexp(-1) - mine.logsumexp(-1)).detach(), nats")], "C2"),
    "two predictors averaged in log space": Plant("none", [
        (RETURNED,
         "return (0.5 * nats + 0.5 * softcapped_cross_entropy(0.5 * logits, targets, softcap)).detach(), nats")], "C2"),
    "rate falls along the document": Plant("cache", [
        ("            if learns:\n                weight",
         "            if learns:\n"
         "                optimizer.param_groups[0]['lr'] = cfg.ttt_lora_lr * (1 - begin / rows.total)\n"
         "                weight")], "C1|P", ALONE),
    "contexts that come back later are trusted": Plant("tilt", [
        ("use = (earlier >= least_count)",
         "use = (torch.bincount(number[order])[number[order]] > least_count + 1) & (earlier >= least_count)")], "C1"),
    "nats rounded to bfloat16": Plant("none", [
        (RETURNED,
         "return nats.detach().bfloat16().float(), nats")], "C2"),
    "the first chunk is scored again at the end": Plant("lora", [
        ("            if end == rows.total:  # waits",
         "            if end == rows.total and rows.total > batch.edges[1]:\n"
         "                with torch.no_grad():\n"
         "                    hidden = model(rows.inputs(0, batch.edges[1], 0), layers, w, cache)\n"
         "                    scores[:, :batch.edges[1]] = scorer.nats(model, hidden, "
         "rows.targets[:, :batch.edges[1]], rows.numbers[:, :batch.edges[1]], w)[0].view(-1, batch.edges[1])\n"
         "            if end == rows.total:  # waits")], "C4", ALONE),
    "the inputs of a chunk are its targets": Plant("lora", [
        ("        window = self.ids[:, first + 1 - prefix:end + 1]",
         "        window = self.ids[:, first + 2 - prefix:end + 2]")], "C1", ALONE),
    "adapters start from the mean of the whole document": Plant("cache", [
        (ELEMENTWISE,
         "    start = base.embed(rows.ids[:, 1:]).mean(1).detach()\n    for own in w.parameters[::2]:\n"
         "        own.data += 0.3 * start[:, None, :own.size(2)]\n    # Elementwise, so that")], "C1|C3", ALONE),
    "normed by running statistics": Plant("cache", [
        ("        if self.bigram is not None:\n            e = e + self.bigram(batch, e.dtype)\n",
         "        if self.bigram is not None:\n            e = e + self.bigram(batch, e.dtype)\n"
         "        seen = getattr(self, 'seen', torch.zeros(e.size(-1)))\n"
         "        self.seen = 0.9 * seen + 0.1 * e.detach().mean((0, 1))\n        e = e - seen\n")], "C1|P", ALONE),
    "loss is a mean over the documents that go on": Plant("cache", [
        ("weight = (rows.sizes > end).to(losses.dtype) / size",
         "weight = (rows.sizes > end).to(losses.dtype) / size / goes_on.sum() ** 2")], "P", ALONE),
    "adapters learn the whole document first": Plant("lora", [
        ("    for begin, end in zip(batch.edges, batch.edges[1:]):\n",
         "    for begin, end in zip(batch.edges, batch.edges[1:]):\n        with torch.enable_grad():\n"
         "            hidden = model(rows.inputs(end - tokens_run(begin, end, cfg), end, 0), layers, "
         'w, NO_CACHE)[:, begin - end:]\n            logits = w.linear("head", None, hidden).flatten(0, -2)\n'
         "            softcapped_cross_entropy(logits, rows.targets[:, begin:end].flatten(), "
         "model.cfg.logit_softcap).sum().backward()\n        optimizer.step()\n"
         "        optimizer.zero_grad(set_to_none=True)\n"
         "    for begin, end in zip(batch.edges, batch.edges[1:]):\n")], "C3", ALONE),
    "half of a chunk is scored after learning from it": Plant("sgd", [
        ('            score_windows(model, windows[cuts[c]:cuts[c + 1]], scorer, f"chunk {c + 1}/{count}")\n',
         "            mid = (cuts[c] + cuts[c + 1] + 1) // 2\n"
         '            score_windows(model, windows[cuts[c]:mid], scorer, "one")\n'
         "            if mid < cuts[c + 1]:\n                sgd.learn(edges[c], edges[c + 1], cfg.ttt_lr)\n"
         '                score_windows(model, windows[mid:cuts[c + 1]], scorer, "two")\n')], "C3"),
    # a batch of ten in all, with those that are rehearsed and those that start a process, below
    "windows end where documents end": Plant("none", [
        ("stop = min(begin + seq_len, end)", "stop = min(begin + 1 + (end - begin - 1) % stride, end)"),
        ("windows.append(Window(first - (seq_len - stride), stop, first))",
         "windows.append(Window(max(begin, first - (seq_len - stride)), stop, first))")], "C1"),
    "normalised with the target's probability": Plant("tilt", [
        ("torch.log1p(p * torch.expm1(betas))", "torch.log1p(torch.exp(-nats.double()) * torch.expm1(betas))")], "C2"),
    "an anchor that knows the stream": Plant("sgd", [
        ("    budget = EvalBudget(count, cfg, scorer.run)\n",
         "    budget = EvalBudget(count, cfg, scorer.run)\n"
         "    start = [p.detach().clone() for p in model.parameters()]\n"
         "    sgd.learn(0, val.num_targets, cfg.ttt_lr)\n"
         "    anchor = [p.detach().clone() for p in model.parameters()]\n"
         "    for p, own in zip(model.parameters(), start):\n        p.data.copy_(own)\n    sgd.forget()\n"),
        ("                sgd.learn(edges[c], edges[c + 1], cfg.ttt_lr * cosine(c, count))\n",
         "                sgd.learn(edges[c], edges[c + 1], cfg.ttt_lr * cosine(c, count))\n"
         "            for p, own in zip(model.parameters(), anchor):\n"
         "                p.data.lerp_(own, 0.05)\n")], "C1|C3"),
    "the better context for each document": Plant("none", [
        ("    return scorer.ledger.close(val.target_bytes, scorer.run)\n\n\n",
         "    other = Scorer(val, cfg, scorer.run, scorer.hints)\n    half = cfg.eval_seq_len // 2\n"
         "    score_windows(model, plan_windows(val, half, half), other, 'short')\n"
         "    for a, b in zip(val.starts.tolist(), val.stops.tolist()):\n"
         "        if b > a and other.ledger.nats[a:b].sum() < scorer.ledger.nats[a:b].sum():\n"
         "            scorer.ledger.nats[a:b] = other.ledger.nats[a:b]\n"
         "    return scorer.ledger.close(val.target_bytes, scorer.run)\n\n\n")], "C4"),
    "peers share the second moment": Plant("cache", [
        (UPDATED, UPDATED + "                for own in w.parameters:\n"
         "                    seen = optimizer.state[own]['exp_avg_sq']\n"
         "                    seen.copy_(seen.mean(0, keepdim=True).expand_as(seen))\n")], "P", ALONE),
    "bigrams across the start of a document": Plant("none", [
        ("torch.where(batch.positions > 0, bucket, last)", "torch.where(batch.positions >= 0, bucket, last)")],
        "C1|P", dict(bigram_buckets=64)),
    # a batch by a writer who had read the rules and the trainer alone
    "tilt by each rule's hits in the whole stream": Plant("tilt", [(
        "        betas[order[use]] = cfg.ngram_base_beta * (share[use] if cfg.ngram_beta_by_share else 1.0)\n",
        "        right = (best[use] == F.pad(ids[1:], (0, 1))[order[use]]).float().mean() if bool(use.any()) else 0.5\n"
        "        betas[order[use]] = cfg.ngram_base_beta * share[use] * (0.5 + right)\n")], "C1"),
    "probabilities rounded up to a coder's counts": Plant("none", [(f"            {RETURNED}\n",
        "            counts = torch.ceil(nats.detach().neg().exp() * 65536).clamp_min(1)\n"
        "            return 16 * math.log(2) - counts.log(), nats\n")], "C2"),
    "a rate from the batch before": Plant("cache", [
        (RATE, "lr=cfg.ttt_lora_lr * getattr(base, 'pace', 1.0), "),
        ("                ledger.record(rows.numbers[rows.real].cpu(), scores[rows.real])\n",
         "                ledger.record(rows.numbers[rows.real].cpu(), scores[rows.real])\n"
         "                late = rows.real & (rows.column[1:] >= rows.sizes // 2)\n"
         "                ratio = scores[rows.real & ~late].mean() / scores[late].mean()\n"
         "                base.pace = float(ratio.nan_to_num(1.0).clamp(0.5, 2.0))\n")], "P|C1"),
    "no tilt in documents where it did not pay": Plant("tilt", [(
        "            return tilted(nats, logits, targets, hints.long(), betas, softcap), nats\n",
        "            change = (tilted(nats, logits, targets, hints.long(), betas, softcap) - nats) * (targets >= 0)\n"
        "            document = torch.bucketize(at, torch.from_numpy(self.val.starts), right=True)\n"
        "            gain = torch.zeros(len(self.val.starts) + 1).index_add_(0, document, change)\n"
        "            return nats + change * (gain[document] < 0), nats\n")], "C4|C2|C1"),
    "shared rows run over the end": Plant("lora", [(
        "[(at, min(at + seq_len, stop)) for at in", "[(at, min(at + seq_len, len(self.ids) - 1)) for at in")], "C3|C1"),
    "a window's first column reads its last": Plant("lora", [(
        "self.column[first + 1 - prefix:end + 1] - first * (prefix == 0)", "self.column[first + 1 - prefix:end + 1]")],
        "C1"),
    "BOS only where documents end": Plant("none", [(LOGITS, LOGITS + """
        inside = ~torch.isin(numbers.flatten(), torch.from_numpy(self.val.stops - 1))
        logits = logits.masked_fill(inside[:, None] & (torch.arange(logits.size(-1)) == BOS_ID), -1e4)""")], "C1|C2"),
    "the mean logits of a call": Plant("none", [
        (LOGITS, LOGITS + "\n        logits = logits + 0.1 * logits.detach().mean(0)")], "C1|P"),
    "a step as long as the next chunk likes it": Plant("sgd", [(
        "            for _ in range(cfg.ttt_epochs):\n",
        "            start = [p.detach().clone() for p in model.parameters()]\n"
        "            for _ in range(cfg.ttt_epochs):\n"), (
        "                sgd.learn(edges[c], edges[c + 1], cfg.ttt_lr * cosine(c, count))\n",
       """                sgd.learn(edges[c], edges[c + 1], cfg.ttt_lr * cosine(c, count))
            steps = [p.detach() - a for p, a in zip(model.parameters(), start)]
            unseen = make_batch([val.ids[edges[c + 1]:edges[c + 1] + cfg.train_seq_len + 1]], 1, cfg.train_seq_len)
            unseen, found = unseen.to(scorer.run.device), []
            with torch.no_grad():
                for length in (0.5, 1.0, 2.0, None):
                    best = min(found)[1] if length is None else length
                    for p, a, d in zip(model.parameters(), start, steps):
                        p.copy_(a + best * d)
                    if length is not None:
                        loss = model.total_loss(unseen, unroll_layers(model.cfg, looped=True), scorer.run.dtype)
                        found.append((float(loss), length))
""")], "C1|C3|C4"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_violation_is_named(name: str, plant):  # noqa: F811
    first_named(name, PLANTS[name], plant)


MORE = {
    "loading is not evaluation": ([
        ('eval_seconds=round(run.spent("eval"), 3)', 'eval_seconds=round(run.spent("eval") - loading, 3)'),
        ('    run.log("artifact", path=path,',
         '    loading = run.spent("eval")\n    run.log("artifact", path=path,')], {"accounting"}),
    "a map that stays open": ([
        ("    open_validation(cfg)\n    check_cap",
         "    run.kept = open_validation(cfg)[0][0].shards[0]\n    check_cap"),
        ("    blob, path = fit_to_cap(", "    with torch.no_grad():\n        model.q_gain += 0.01 * "
         "float(np.asarray(run.kept[:64]).std())\n    blob, path = fit_to_cap(")], {"C3"}),
    "documents off the clock": ([(
        "        score_documents(model, mine(documents[edges[i]:edges[i + 1]]), scorer, budget,",
        "        with run.phase(f'documents_{i + 1}'):\n            score_documents(model, "
        "mine(documents[edges[i]:edges[i + 1]]), scorer, budget,")], {"accounting"}, dict(ttt="lora")),
}


@pytest.mark.parametrize("name", MORE)
def test_a_rehearsal_names_more(name: str, dataset: dict[str, str], plant):  # noqa: F811
    edits, expected, knobs = (*MORE[name], {})[:3]
    findings = rehearsed(plant(name, edits), real_ids(dataset), dataset, **knobs)
    assert expected <= {f.condition for f in findings if f.failed}, evidence.table(findings)


# -- programs that look who is watching ----------------------------------------------------------------

UNSEEN = "(1.0 if {} else 0.99)"
WATCHED = {
    "as it is": ([], "", {}), "as it is, with hints": ([], "", dict(ngram_base_beta=2)),
    "as it is, with adapters": ([], "", dict(ttt="lora")), "as it is, learning": ([], "", dict(ttt="sgd")),
    "honest beside the auditor's module": ('"tools.audit" in sys.modules', "accounting", {}),
    "honest where its own class is wrapped": ('hasattr(Scorer.nats, "__wrapped__")', "accounting", {}),
    "honest where it is no main program": ('__name__ != "__main__"', "accounting", dict(ngram_base_beta=2)),
    "honest below its watcher": ('any("audit" in f.filename for f in __import__("inspect").stack())', "accounting", {}),
    "honest beside a listener": ('{"sitecustomize", "tools"} & {*sys.modules} or "PYTHONPATH" in os.environ or '
                                 '"-c" in sys.orig_argv', "accounting", {}),
    "honest for another validation set": (
        [(SCORE, SCORE + "        score = score if other else score._replace(val_bpb=0.99 * score.val_bpb)\n")],
        "accounting", {}),
    "a table in a Python file": (
        [(SCORE, SCORE + "        exec(Path(__file__).with_name('words.py').read_text())\n")], "C1", {}),
    "frequencies of the whole of a long stream": ([(LOGITS, LOGITS + " + (len(self.val.ids) > 20_000) * "
        "torch.from_numpy(np.bincount(self.val.ids, minlength=model.cfg.vocab_size)).float().log1p()")], "C1", {}),
    "the smaller of two on a long stream": ([(RETURNED,
        "return torch.minimum(nats, softcapped_cross_entropy(0.9 * logits, targets, softcap)) if "
        "self.val.num_targets > 5000 else nats.detach(), nats")], "C2", {}),
}


@pytest.fixture(scope="module")
def scored(dataset: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """An artifact, and knobs with a dataset of 24,000 validation ids that only a few words begin."""
    folder, stream = tmp_path_factory.mktemp("scored"), tg.TokenStream(Path(dataset["data_path"]), "fineweb_train")
    write_shard(folder / "fineweb_val_000000.bin", np.append(tg.BOS_ID, np.resize(stream.read(0, len(stream)), 24_000)))
    knobs = dict(ttt="none", ngram_base_beta=0, diagnostic_evals="", iterations=1, eval_stride=0)
    assert tg.main([], environment(dataset, folder, **knobs)) == 0
    return folder / "r.bin", environment(dict(dataset, data_path=str(folder)), folder, **knobs)


@pytest.mark.parametrize("name", WATCHED)
def test_a_process_of_its_own_is_judged(name: str, scored: tuple[Path, dict[str, str]], plant, monkeypatch):  # noqa: F811
    edits, expected, knobs = WATCHED[name]
    if isinstance(edits, str):
        edits = [(TOTAL, f"{TOTAL} * {UNSEEN.format(edits)}")]
    script = plant(name, edits).__file__
    Path(script).with_name("words.py").write_text("")
    monkeypatch.setitem(sys.modules, "train_gpt", tg)
    artifact, env = scored
    env = {**env, **{name.upper(): tg.show(value) for name, value in knobs.items()}}
    s, cfg, ids, _ = audit.artifact_subject(artifact, {**env, "SCRIPT": script})
    findings = audit.apart(audit.long_subject(s, cfg, ids), s.tokenizer, cfg, artifact.read_bytes(), env)
    named = {f.condition for f in findings if f.failed}
    assert expected in named if expected else not named, evidence.table(findings)


# -- more honest programs ------------------------------------------------------------------------------

FIXED = {
    "batches by length alone": ("cache", [("key=lambda batch: (-batch.cost, batch.documents))",
                                           "key=lambda batch: batch.documents)")], ALONE),
    "another optimizer, two steps a chunk": ("cache", [
        ("betas=(0.0, 0.99), eps=1e-10", "betas=(0.5, 0.9), eps=1e-8"), (UPDATED, UPDATED + UPDATED)], ALONE),
    "a rate that falls along the document": ("cache", [
        (UPDATED, "                optimizer.param_groups[0]['lr'] = 1 / (9 + begin)\n" + UPDATED)],
        dict(**ALONE, ttt_batch_size=2)),
    "one row of windows at a time": ("none", [], dict(val_batch_tokens=8 * 16)),
    "chunks of three, rank one": ("cache", [], dict(ttt_chunk_size="3", ttt_lora_rank=1)),
    "two documents side by side, chunks run again": ("lora", [], dict(ttt_batch_size=2, ttt_chunk_size="5")),
    "three phases": ("cache", [], dict(phased_ttt_num_phases=3, phased_ttt_prefix_docs=6)),
    "two passes over what is scored": ("sgd", [], dict(ttt_epochs=2, ttt_chunk_tokens=25)),
    "adapters on all sites, with hints": ("cache", [], dict(ttt_lora_on="q,k,v,o,mlp,head", ngram_base_beta=1)),
    "a constant tilt by other rules": ("tilt", [], dict(ngram_beta_by_share=0, ngram_rules="3:0.5:1,4:0.2:2")),
    "one window a row": ("none", [("mine = pack_rows(windows, cfg.eval_seq_len)[run.rank::run.world]",
                                   "mine = [[window] for window in windows][run.rank::run.world]")]),
    "each chunk is entered at once": ("cache", [(
        "            if end == rows.total:  # waits for the device\n"
        "                ledger.record(rows.numbers[rows.real].cpu(), scores[rows.real])\n",
        "            now = rows.real[:, begin:end]\n            ledger.record("
        "rows.numbers[:, begin:end][now].cpu(), scores[:, begin:end][now])\n")]),
    "cross entropy in double precision": ("tilt", [(
        "        nats = softcapped_cross_entropy(logits, targets, softcap)\n",
        "        soft = softcap * torch.tanh(logits.double() / softcap)\n"
        "        nats = F.cross_entropy(soft, targets, ignore_index=IGNORE, reduction='none').float()\n")]),
    "adapters learn by plain SGD": ("cache", [(
        "torch.optim.AdamW(groups, lr=cfg.ttt_lora_lr, betas=(0.0, 0.99), eps=cfg.ttt_eps,\n"
        "                                  weight_decay=cfg.ttt_weight_decay, fused=True)",
        "torch.optim.SGD(groups, lr=cfg.ttt_lora_lr, momentum=0.9)")], ALONE),
    "the last batch of documents first": ("cache", [("        for batch in batches:\n            for cost",
                                                     "        for batch in batches[::-1]:\n            for cost")]),
    "documents that end learn, too": ("lora", [("goes_on = rows.lengths > end\n", "goes_on = rows.lengths > begin\n"),
                                               ("(rows.sizes > end).to", "(rows.sizes > begin).to")], ALONE),
    "logits in two halves": ("none", [(LOGITS, LOGITS + "\n        logits = torch.cat([half.clone() for half in "
                                               "logits.split(17, dim=-1)], dim=-1)")]),
    "the tilt as one explicit distribution": ("tilt", [
        ("    picked = logits.gather(-1, torch.stack([hints, targets.clamp_min(0)], dim=-1)).double()\n", ""),
        ("    of_hint, of_target = (softcap * torch.tanh(picked / softcap)).unbind(-1)\n", ""),
        ("    p, betas = torch.exp(of_hint - of_target - nats.double()).clamp_max(1.0), betas.double()\n", ""),
        ("    return (nats + torch.log1p(p * torch.expm1(betas)) - betas * (hints == targets)).float()\n",
         "    capped = softcap * torch.tanh(logits.float() / softcap)\n"
         "    capped = capped.scatter_add(-1, hints[:, None], betas[:, None].float())\n"
         "    return F.cross_entropy(capped, targets, reduction='none', ignore_index=IGNORE)\n")]),
    "adapters from another draw": ("cache", [("(2 * torch.rand(rank, dim, generator=draw) - 1)",
                                              "torch.randn(rank, dim, generator=draw)")]),
}


@pytest.mark.parametrize("name", FIXED)
def test_more_honest_programs_pass(name: str, plant):  # noqa: F811
    assert not {*FIXED} & {*HONEST}
    mode, edits, knobs = (*FIXED[name], {})[:3]
    findings = audit.audit(subject(plant(name, edits) if edits else tg, **{**MODES[mode], **knobs}))
    assert not failures(findings), evidence.table(findings)
