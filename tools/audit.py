"""Audits a submission: does its score obey the conditions C1..C4 and the accounting rules? Each probe tries to refute.

    python -m tools.audit ARTIFACT [KNOB=value ...] [LOG=logs/<run_id>.jsonl] [BUDGET=600] [SCRIPT=train_gpt.py]
    python -m tools.audit --static FOLDER_OR_SCRIPT [TOKENIZER=file.model] [DATA_PATH=folder]

The dynamic audit runs the script's own evaluation on a short piece of the real validation stream, again and again with
ids changed, and looks at what the scores, the states behind them and the ledger do; then on a long piece, which a
process of the script's own must score alike; then it trains and scores a tiny model and watches what is read. Knobs are
those of the run (DEVICE=cpu and DTYPE=float32 unless given: what is compared is exact). The static audit reads sources
alone. Exit status: 0 nothing refuted, 1 a probe failed, 2 the audit could not be made.

  C1  a score depends on the artifact and on earlier ids alone    D1 D2 D6 D9 A2 S2
  C2  one normalised distribution, fixed before its target        D2 D3 D8 S2
  C3  scored first, learned from afterwards                       D1 D2 D4 D5 A2 A4 S2
  C4  one pass from left to right, each target once               D5 D7 S2
  P   documents know of one another through the ledger alone      D5 D6 D7
"""
from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

from tools.common import ToolError, program
from tools.evidence import (
    ROOT,
    TRACK_SECONDS,
    Finding,
    audit_log,
    charged,
    failed,
    load_module,
    spelled,
    static_main,
    table,
)
from tools.knobs import typed_text
from tools.logs import events, find_log, last, log_folder, pairs, readable

if __name__ == "__main__" and sys.argv[1:2] == ["--static"]:  # torch takes longer to import than sources to read
    sys.exit(program(lambda arguments: static_main(arguments[1:]), "audit.py"))

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

EXACT = 1e-5
"""Largest change of a score, in nats, that counts as none where all shapes stay the same."""
LAYOUT = 1e-3
"""The same where documents change length and so are batched otherwise: rounding, amplified by what learns."""


# -- one observed run of the evaluation -----------------------------------------------------------------


class Outcome(NamedTuple):
    """What one run of the evaluation did; T targets."""
    nats: np.ndarray  # [T] float64: the ledger's scores
    shared: np.ndarray  # [T] int64: fingerprint of the shared weights that gave each target the score in the ledger
    own: np.ndarray  # [T] int64: fingerprint of the adapters that did; 0 without any
    first: np.ndarray  # [T] float64: what the scorer returned when it first saw each target; nan if it never did
    timeline: list[tuple]  # ("nats", targets), ("step",), ("note", kind, states, begins, ends) in the order of time
    events: np.ndarray  # [E, 6]: the ledger
    full: dict[int, np.ndarray]  # probed target -> [V] nats of every id in its place, from the state that scored it
    hints: Any
    total: Any  # what the program made of it: its `Score`; None where it objected
    hidden: float  # largest change of a hidden state when all targets of its batch are garbage; nan: never looked at
    rows: float  # largest change of a score when most targets of its batch are the likeliest or least likely ids
    refusal: str  # what the program itself objected to; empty: nothing


def fingerprint(tensors: Sequence[torch.Tensor], rows: int = 1) -> torch.Tensor:
    """Return [rows] int64 checksums of the bits of tensors whose first axis is split into `rows`."""
    total = torch.zeros(rows, dtype=torch.int64)
    for t in tensors:
        flat, size = t.detach().contiguous().view(rows, -1), t.element_size()
        odd = (flat.size(1) * size | flat.storage_offset() * size) % 8  # pairs are summed twenty times as fast
        bits = flat.view((torch.int16 if size == 2 else torch.int32) if odd else torch.int64)
        total = total * 1_000_003 + bits.sum(1, dtype=torch.int64).cpu()
    return total


class Watch:
    """Records which state scored what, and when, from outside: the program's own classes stay what they are."""

    def __init__(self, module: ModuleType, targets: int, probes: Sequence[int], deep: float) -> None:
        """probes: targets whose whole distributions are taken; deep: share of batches that get garbage targets, too."""
        self.module, self.probes, self.deep = module, list(probes), deep
        self.first = np.full(targets, np.nan)
        self.shared, self.own = np.zeros(targets, dtype=np.int64), np.zeros(targets, dtype=np.int64)
        self.timeline: list[tuple] = []
        self.full: dict[int, np.ndarray] = {}
        self.later: list[tuple[np.ndarray, np.ndarray, int, np.ndarray]] = []
        self.hidden = self.rows = np.nan
        self.busy, self.dice = False, torch.Generator().manual_seed(0)

    def due(self, seen: float) -> bool:
        """Whether to look closely now: the first time, then at random."""
        return self.deep > 0 and (np.isnan(seen) or float(torch.rand((), generator=self.dice)) < self.deep)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Look on while the program runs: at scores, ledger, forwards, and at every step of any torch optimizer."""
        scorer, ledger, gpt = self.module.Scorer, self.module.Ledger, self.module.GPT
        nats, note, forward = scorer.nats, ledger.note, gpt.forward

        @functools.wraps(nats)
        def seen_nats(own: Any, *arguments: Any) -> Any:
            if self.busy:
                return nats(own, *arguments)
            self.closely = self.due(self.rows)
            before = self.state(arguments) if self.closely else 0
            out = nats(own, *arguments)
            if self.closely and self.state(arguments) != before:
                self.timeline.append(("touched",))
            self.busy = True
            self.see(functools.partial(nats, own), out, *arguments)
            self.busy = False
            return out

        @functools.wraps(note)
        def seen_note(own: Any, kind: int, states: Any, begins: Any, ends: Any) -> None:
            self.timeline.append(("note", kind, *(np.atleast_1d(x) for x in (states, begins, ends))))
            note(own, kind, states, begins, ends)

        @functools.wraps(forward)
        def seen_forward(model: Any, batch: Any, layers: Any, w: Any, *cache: Any) -> Any:
            garbage = None
            if batch.targets is not None and self.due(self.hidden):
                with torch.no_grad():
                    other = batch._replace(targets=torch.randint(2, model.cfg.vocab_size, batch.targets.shape,
                                                                 generator=self.dice))  # nobody else's throw changes
                    garbage = forward(model, other, layers, w, *copy.deepcopy(cache))
            hidden = forward(model, batch, layers, w, *cache)
            if garbage is not None:
                self.hidden = np.fmax(self.hidden, largest(garbage.float().numpy(), hidden.detach().float().numpy()))
            return hidden

        step = register_optimizer_step_post_hook(lambda *_: self.timeline.append(("step",)))
        try:
            with mock.patch.object(scorer, "nats", seen_nats), mock.patch.object(ledger, "note", seen_note), \
                    mock.patch.object(gpt, "forward", seen_forward if self.deep else forward):
                yield
        finally:
            step.remove()

    def state(self, arguments: Sequence[Any]) -> int:
        """Return the fingerprint of all weights of a call."""
        model, w = arguments[0], arguments[-1]
        return int(fingerprint([*model.parameters(), *getattr(w, "parameters", ()), *w.matrices.values()]))

    def see(self, nats: Callable, out: Any, model: Any, hidden: Any, targets: Any, numbers: Any, w: Any) -> None:
        """Enter what one call of the scorer did; `nats` is that call with other arguments."""
        flat, scores = numbers.flatten().cpu().numpy(), out[0].detach().flatten().double().cpu().numpy()
        real = np.flatnonzero((targets.flatten() != self.module.IGNORE).cpu().numpy())  # the rest is padding
        rows = hidden.size(0) if hidden.dim() == 3 else 1
        own_R = fingerprint(getattr(w, "parameters", []), rows)
        own = own_R.repeat_interleave(len(flat) // rows).numpy()
        shared = int(fingerprint([*w.matrices.values(), *model.parameters()]))
        unseen = np.isnan(self.first[flat[real]])
        again, new = real[~unseen], real[unseen]
        if len(again):
            self.later.append((flat[again], scores[again], shared, own[again]))
        if not len(new):
            return
        at = flat[new]
        self.first[at], self.shared[at], self.own[at] = scores[new], shared, own[new]
        self.timeline.append(("nats", at))
        with torch.no_grad():
            for i in new[np.isin(at, self.probes)]:
                self.full[int(flat[i])] = self.everything(nats, model, hidden, int(i), int(flat[i]), w)
            logits = w.linear("head", None, hidden).flatten(0, -2) if self.closely else hidden
            for parity, extreme in enumerate((logits.argmax(-1), logits.argmin(-1))) if self.closely else ():
                swapped, kept = targets.flatten().clone(), real[parity::4]
                swapped[np.setdiff1d(real, kept)] = extreme[np.setdiff1d(real, kept)]  # moves the chunk's loss most
                other = nats(model, hidden, swapped.view_as(targets), numbers, w)[0].flatten().double().cpu().numpy()
                self.rows = np.fmax(self.rows, largest(scores[kept], other[kept]))

    def attribute(self, entered: np.ndarray) -> None:
        """Where a later call gave the ledger's score, its state is the one that counts."""
        for at, scores, shared, own in self.later:
            use = (np.abs(entered[at] - scores) <= 1e-6) & (np.abs(entered[at] - self.first[at]) > 1e-6)
            self.shared[at[use]], self.own[at[use]] = shared, own[use]

    def everything(self, nats: Callable, model: Any, hidden: Any, i: int, number: int, w: Any) -> np.ndarray:
        """Return [V] nats of every id as the target at flat position i."""
        vocab, parts = model.cfg.vocab_size, []
        r, c = divmod(i, hidden.size(-2)) if hidden.dim() == 3 else (0, i)
        spot = hidden[..., c:c + 1, :]
        for at in range(0, vocab, 512):
            ids = torch.arange(at, min(at + 512, vocab), device=hidden.device)
            shape = (*spot.shape[:-2], len(ids))
            scores = nats(model, spot.expand(*shape, -1), ids.expand(shape),
                          torch.full(shape, number, device=hidden.device), w)[0]
            parts.append(scores.view(-1, len(ids))[r])
        return torch.cat(parts).double().cpu().numpy()


class Subject:
    """A module's evaluation of one artifact on a short stream of validation ids, as often as asked."""

    def __init__(self, module: ModuleType, cfg: Any, ids: np.ndarray, make_model: Callable[[], Any],
                 tokenizer: Path | None = None, seed: int = 0, scaled: bool = True) -> None:
        """ids [N] start with BOS; make_model() returns a fresh copy of the artifact's model on the run's device; `seed`
        chooses positions and ids; `scaled`: knobs are scaled to a short stream."""
        self.module, self.make_model, self.tokenizer = module, make_model, tokenizer
        self.ids = np.asarray(ids, dtype=np.int64)
        self.cfg = miniature(module, cfg, self.ids) if scaled else cfg
        self.run = module.Run(self.cfg, {}, log=False)
        self.starts = np.flatnonzero(self.ids == module.BOS_ID)
        self.ends = np.append(self.starts[1:], len(self.ids) - 1)
        """Targets of document d: starts[d]..ends[d]-1."""
        self.rng = np.random.default_rng(seed)
        self.apart: dict[str, Any] = dict(ngram_base_beta=0.0, phased_ttt_num_phases=0)
        """Knobs with which nothing learns across documents."""
        if cfg.ttt == "sgd":
            self.apart["ttt"] = "none"
        self.one_row: dict[str, Any] = dict(self.apart, ttt_batch_size=1, val_batch_tokens=8 * self.cfg.eval_seq_len)
        """The same with every document, or row of windows, in a batch of its own."""

    @functools.cached_property
    def shares(self) -> bool:
        """Whether documents learn from one another at all."""
        return bool(self.apart.items() - vars(self.cfg).items())

    def document(self, target: Any) -> Any:
        """Return the number of the document whose input predicts this target; of arrays, too."""
        return np.searchsorted(self.starts, target, side="right") - 1

    def score(self, ids: np.ndarray | None = None, probes: Sequence[int] = (), deep: float = 0.0, **knobs: Any
              ) -> Outcome:
        """Run the production path once on `ids` (default: the stream) with some knobs replaced."""
        m, run = self.module, self.run
        ids = self.ids if ids is None else ids
        cfg = dataclasses.replace(self.cfg, **knobs)
        sizes = 1 + np.arange(len(ids) - 1, dtype=np.int32) % 5  # the sum tells which ones are missing
        val = m.ValData(ids.astype(np.uint16), np.flatnonzero(ids == m.BOS_ID), sizes)
        hints = m.ngram_hints(torch.from_numpy(ids).to(run.device), cfg) if cfg.ngram_base_beta else None
        model, scorer, watch = self.make_model(), m.Scorer(val, cfg, run, hints), None
        watch, total, refusal = Watch(m, len(ids) - 1, probes, deep), None, ""
        with watch.looking(), run.phase("score", "eval"):
            try:
                total = m.adapted_score(model, scorer)[0]
            except AssertionError as error:  # the program's own ledger objects: a finding, and the probes go on
                refusal = str(error)
        entered = scorer.ledger.nats.double().numpy()
        watch.attribute(entered)
        events = np.concatenate([np.empty((0, 6), dtype=np.int64), *scorer.ledger.events])
        return Outcome(entered, watch.shared, watch.own, watch.first, watch.timeline, events, watch.full, hints, total,
                       watch.hidden, watch.rows, refusal)

    @property
    def affordable(self) -> int:
        """Whole distributions that one run may take: each costs the vocabulary squared."""
        return max(12, (1 << 22) // self.cfg.vocab_size ** 2)

    @functools.cached_property
    def plain(self) -> Outcome:
        """The stream as it is, with nothing but eyes on it."""
        return self.score()

    @functools.cached_property
    def positions(self) -> list[int]:
        """Targets worth probing one by one."""
        return choose(self, self.plain, self.rng)

    @functools.cached_property
    def base(self) -> Outcome:
        """The stream as it is, looked at closely; sums are taken where hints, or the model, were most right, too."""
        right = self.plain.nats if self.plain.hints is None else \
            self.plain.nats - 99.0 * (self.plain.hints[1].cpu().numpy() > 0)
        return self.score(probes=[*self.positions, *right.argsort()[:min(64, self.affordable)]], deep=1.0)

    @functools.cached_property
    def cuts(self) -> list[dict[int, int]]:
        """Rounds of one target in each document (document -> target): first, last, behind an edge, half, any."""
        places = []
        for edge in ("first", "last", "edge", "half", "any"):
            cut = {}
            for d, (begin, end) in enumerate(zip(self.starts.tolist(), self.ends.tolist())):
                most = end - begin - 1 - (d < len(self.starts) - 1)  # the last target is the next document's BOS
                if most < 0:
                    continue
                window = self.cfg.eval_seq_len if most > self.cfg.eval_seq_len else max(1, self.cfg.ttt_chunk_size)
                cut[d] = begin + {"first": 0, "last": most, "edge": most // window * window,
                                  "half": most // 2, "any": int(self.rng.integers(most + 1))}[edge]
            places.append(cut)
        return places

    @functools.cached_property
    def single(self) -> Outcome:
        """The stream with nothing that learns across documents, and each of them in a batch of its own."""
        return self.score(**self.one_row)

    @functools.cached_property
    def alone(self) -> Outcome:
        """The stream with nothing that learns across documents, looked at closely; as many of the cuts as are cheap."""
        cuts = [t for cut in self.cuts for t in cut.values()]
        cuts = self.rng.permutation(sorted({*cuts}))[:self.affordable].tolist()
        return self.score(probes=cuts, deep=1.0, **self.apart)


def miniature(module: ModuleType, cfg: Any, ids: np.ndarray) -> Any:
    """Scale what counts documents or tokens in a run's knobs to a short stream; no clock decides anything."""
    documents, targets = int((ids == module.BOS_ID).sum()), len(ids) - 1
    prefix = max(1, min(cfg.phased_ttt_prefix_docs, documents - 2))
    window = min(cfg.eval_seq_len, max(64, 2 * cfg.ttt_chunk_size if cfg.ttt == "lora" else 0))
    stride = min(window, max(cfg.eval_stride * window // cfg.eval_seq_len, window // 4)) if cfg.eval_stride else 0
    return dataclasses.replace(
        cfg, phased_ttt_prefix_docs=prefix, phased_ttt_num_phases=min(cfg.phased_ttt_num_phases, prefix, 2),
        eval_seq_len=window, eval_stride=stride, ttt_chunk_tokens=min(cfg.ttt_chunk_tokens, -(-targets // 4)),
        eval_seconds_budget=1e9)


def piece_of_stream(module: ModuleType, cfg: Any, ids: np.ndarray, documents: int = 18, seed: int = 0) -> np.ndarray:
    """Cut a short stream [N] out of the first documents of `ids`: a few chunks of each, several windows of three. With
    the tilt on it holds each of fewer documents four times, slightly altered, so that contexts come back."""
    starts = np.append(np.flatnonzero(ids == module.BOS_ID), len(ids))
    length = 120
    if cfg.ttt == "lora":
        length = max(length, 2 * cfg.ttt_chunk_size + 24)
    window = miniature(module, cfg, ids).eval_seq_len
    spans = [(a, b) for a, b in zip(starts[:-1].tolist(), starts[1:].tolist()) if b - a > 8]
    pieces = [ids[a:min(b, a + length)].astype(np.int64) for a, b in spans]
    pieces = pieces[:max(2, documents // 4) if cfg.ngram_base_beta else documents]
    if not pieces:
        raise ToolError("the validation stream holds no document of 8 tokens; another dataset is needed")
    long = [(a, b) for a, b in spans[len(pieces):] + spans if b - a > 2 * window][:3]
    for place, (a, b) in zip((1, len(pieces) // 2 + 1, len(pieces) - 1), long):
        pieces[place % len(pieces)] = ids[a:min(b, a + 3 * window + window // 2)].astype(np.int64)
    if cfg.ngram_base_beta:
        rng, originals = np.random.default_rng(seed), list(pieces)
        for original in 3 * originals:
            again = original[:length].copy()
            hit = 1 + np.flatnonzero(rng.random(len(again) - 1) < 1 / 24)
            again[hit] = other_ids(module, again[hit], cfg.vocab_size, rng)
            pieces.append(again)
    return np.concatenate(pieces)


def other_ids(module: ModuleType, ids: np.ndarray, vocab: int, rng: np.random.Generator) -> np.ndarray:
    """Draw another id for each; BOS stays BOS, and nothing becomes BOS."""
    allowed = np.setdiff1d(np.arange(vocab), [module.BOS_ID])
    drawn = allowed[rng.integers(0, len(allowed) - 1, len(ids))]
    drawn = np.where(drawn == ids, allowed[-1], drawn)
    return np.where(ids == module.BOS_ID, ids, drawn)


# -- dynamic probes -------------------------------------------------------------------------------------


def largest(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference; infinite where one of them is not a number. 0 for nothing."""
    gap = np.abs(a - b)
    return float(np.where(np.isnan(gap), np.inf, gap).max(initial=0.0))


def choose(subject: Subject, base: Outcome, rng: np.random.Generator) -> list[int]:
    """Choose targets worth probing: in every state that there is, with hints right and wrong, in and beyond the first
    window, in the longest document, at a document's end, behind an update. The last one's state has learned most."""
    targets = np.arange(len(base.nats))
    bos, number = subject.module.BOS_ID, subject.document(np.arange(len(base.nats)))
    eligible = (subject.ids[1:] != bos) & (subject.ids[:-1] != bos) & ~np.isnan(base.first)
    eligible[-2:] = False  # something must follow
    adapted = base.own != base.own[subject.starts[number]]
    shared = base.shared != base.shared[next(what[0][0] for kind, *what in base.timeline if kind == "nats")]
    kinds, sure = [~adapted & ~shared, adapted & ~shared, shared & ~adapted, adapted & shared], None
    if base.hints is not None:
        hinted, right = base.hints[1].cpu().numpy() > 0, base.hints[0].cpu().numpy() == subject.ids[1:]
        sure = hinted & right  # of these the one that the hint helps most
        kinds += [sure, hinted & ~right]
    if subject.shares:  # else `Subject.cuts` are probed
        left, longest = subject.ends[number] - targets, np.argmax(subject.ends - subject.starts)
        kinds += [targets - subject.starts[number] >= subject.cfg.eval_seq_len, left == 2, number == longest]
        kinds += [base.shared == state for state in np.unique(base.shared)[:4]]
        learned = base.events[(base.events[:, 2] != subject.module.Ledger.SCORE) & (
            base.events[:, 3] == subject.module.Ledger.BASE), 5]
        kinds += [(targets >= end) & (targets < end + 8) for end in np.unique(learned)[:2]]  # just not learned from
    chosen: list[int] = []
    for kind in kinds:
        some = np.setdiff1d(np.flatnonzero(kind & eligible), chosen)
        if len(some):
            chosen.append(int(some[base.nats[some].argmin()] if kind is sure else rng.choice(some)))
    return sorted(chosen, key=lambda t: (adapted[t], shared[t], t))


def undeclared(subject: Subject, base: Outcome, changed: int, targets: np.ndarray) -> list[int]:
    """Return the targets whose score knew `changed` though the ledger has no update from it before their score: of the
    shared weights in an earlier phase, or of the document's adapters from earlier targets."""
    ledger = subject.module.Ledger
    scored, updates = {}, []
    for phase, _, kind, state, begin, end in base.events.tolist():
        if kind == ledger.SCORE:
            scored.update(dict.fromkeys(range(begin, end), phase))
        elif end > changed:
            updates.append((phase, state, end))

    return [t for t in targets[targets > changed].tolist() if not any(
        phase < scored.get(t, -1) if state == ledger.BASE else state == subject.document(t) and end <= t
        for phase, state, end in updates)]


def probe_calls(subject: Subject) -> list[Finding]:
    """D2 at every place: in each forward and each call of the scorer other targets are garbage, and nothing moves."""
    hidden = np.fmax(subject.base.hidden, subject.alone.hidden)
    rows = np.fmax(subject.base.rows, subject.alone.rows)
    return [Finding("D2", "C1", not hidden > 0 and rows <= EXACT, f"hidden_change={hidden:.2g} max_change={rows:.2g}",
                    "nothing but its own score may depend on a target when it is scored: rulings A, D")]


def probe_number(subject: Subject) -> list[Finding]:
    """D8: the program's totals against our own sums over what its scorer first gave."""
    base, targets = subject.base, len(subject.ids) - 1
    if base.total is None:
        return []
    nats, size = float(base.first.sum()), int((1 + np.arange(targets) % 5).sum())
    expected = dict(nats=nats, tokens=targets, bytes=size, val_loss=nats / targets, val_bpb=nats / np.log(2) / size)
    wrong = [name for name, value in expected.items() if not abs(getattr(base.total, name) / value - 1) <= 1e-6]
    return [Finding("D8", "accounting", not wrong, f"targets={targets} nats={nats:.4f} wrong={','.join(wrong) or 0}",
                    "nats, targets, bytes and ratios must be the sums of what was scored: ruling O")]


def flip(subject: Subject, base: Outcome, cut: Mapping[int, int], number: int, shared: bool) -> np.ndarray:
    """Return the stream with other targets at a cut: rare, frequent or likely ids; at every second place what follows
    is replaced as well, up to the document's end or, where documents learn from one another, the stream's."""
    ids, vocab = subject.ids.copy(), subject.cfg.vocab_size
    counts = np.bincount(ids, minlength=vocab)
    counts[:2] = len(ids)  # neither padding nor BOS
    order = np.argsort(-counts[2:], kind="stable") + 2
    for d, t in cut.items():
        likely = base.full[t].argsort()[:2] if t in base.full else order[:8]
        rare = order[counts[order] == counts.min()]
        values = subject.rng.permutation((likely, order[:8], rare)[(number + d) % 3])
        values = values[(values != ids[t + 1]) & (values > 1)]
        ids[t + 1] = values[0] if len(values) else ids[t + 1]
        if (number + d) % 2:
            stop = len(ids) if shared else int(subject.ends[d]) + (d == len(subject.ends) - 1)
            ids[t + 2:stop] = other_ids(subject.module, ids[t + 2:stop], vocab, subject.rng)
    return ids


def probe_targets(subject: Subject, shared: bool) -> list[Finding]:
    """D1..D5: replace targets, or them and what follows; look at what came before, at the states, at the distributions.
    In every document at a time where nothing is shared; with `shared`, where documents learn of one another, one."""
    base, cuts = subject.alone, subject.cuts
    if shared:
        base, cuts = subject.base, [{int(subject.document(t)): t} for t in subject.positions if subject.shares]
    earlier = moved = spot = 0.0
    states, hidden, carried = 0, set[int](), set[int]()
    number_of = subject.document(np.arange(len(base.nats)))
    for number, cut in enumerate(cuts):
        ids = flip(subject, base, cut, number, shared)
        full = [t for t in cut.values() if t in base.full]
        other = subject.score(ids, probes=full, **({} if shared else subject.apart))
        changed = np.flatnonzero((base.shared != other.shared) | (base.own != other.own))
        for d, t in cut.items():
            begin, end = (0, len(base.nats)) if shared else (int(subject.starts[d]), int(subject.ends[d]))
            earlier = max(earlier, largest(base.nats[begin:t], other.nats[begin:t]))
            states += int(((changed >= begin) & (changed <= t)).sum())
            if (number + d) % 2 == 0:  # nothing but one target was changed
                hidden.update(undeclared(subject, base, t, changed[(changed >= begin) & (changed < end)]))
                same = np.ones(len(base.nats), dtype=bool)
                if base.hints is not None:
                    same = ((base.hints[0] == other.hints[0]) & (base.hints[1] == other.hints[1])).cpu().numpy()
                gone = same & (np.abs(base.nats - other.nats) > EXACT) & (number_of != d)
                carried.update(undeclared(subject, base, t, np.flatnonzero(gone)) if shared else ())
        for t in full:
            own = base.full[t]
            moved = max(moved, largest(own, other.full.get(t, np.full_like(own, np.nan))))
            spot = max(spot, abs(own[ids[t + 1]] - other.nats[t]), abs(own[subject.ids[t + 1]] - base.nats[t]))
    text, sums = f"flips={sum(map(len, cuts))}", [float(np.exp(-own).sum()) for own in base.full.values()]
    worst = max(sums, key=lambda s: abs(s - 1), default=1.0)
    return [Finding("D1", "C1", earlier <= EXACT, f"{text} max_change={earlier:.2g}",
                    "a score may not depend on its target's later ids: rulings A, D"),
            Finding("D1", "C3", not states, f"{text} states_changed={states}",
                    "no state may have learned from a target that it scores, or from a later one: rulings A, B, P"),
            Finding("D2", "C1", moved <= EXACT, f"{text} max_change={moved:.2g}",
                    "a distribution may not know which id comes true: rulings D, F"),
            Finding("D2", "C2", max(moved, spot) <= EXACT, f"{text} max_gap={max(moved, spot):.2g}",
                    "a score must be the entry of a distribution that is fixed before its target: rulings E, F"),
            Finding("D3", "C2", abs(worst - 1) <= 1e-4, f"targets={len(sums)} worst_sum={worst:.6f}",
                    "the probabilities of all ids must sum to 1: rulings E, F, G"),
            Finding("D5", "C3", not hidden, f"{text} undeclared={len(hidden)} first={min(hidden, default='none')}",
                    "a state may learn from what the ledger says alone"),
            Finding("D5", "P", not carried, f"{text} carried={len(carried)} first={min(carried, default='none')}",
                    "documents may know of others through the ledger alone")]


def probe_ends(subject: Subject) -> list[Finding]:
    """D1: documents that end at each cut, by themselves; where things are shared, other ends of later documents, as
    many as before, so that phases stay."""
    ids, bos, ends = subject.ids, subject.module.BOS_ID, 0.0
    for cut in subject.cuts:
        spans = [(int(subject.starts[d]), t + 2) for d, t in cut.items()]
        short, at = subject.score(np.concatenate([ids[a:b] for a, b in spans]), **subject.one_row), 0
        for a, b in spans:
            ends = max(ends, largest(subject.single.nats[a:b - 1], short.nats[at:at + b - 1 - a]))
            at += b - a
    t = subject.positions[-1]
    tail = other_ids(subject.module, ids[t + 2:], subject.cfg.vocab_size, subject.rng)
    begins = int((tail == bos).sum())
    for first in (0, len(tail) - begins) if subject.shares else ():  # at once, or nearly at the end of the stream
        text = np.where(tail == bos, 2, tail)
        text[first:first + begins] = bos
        other = subject.score(np.concatenate([ids[:t + 2], text]))
        ends = max(ends, largest(subject.base.nats[:t + 1], other.nats[:t + 1]))
    return [Finding("D1", "C1", ends <= LAYOUT, f"rounds={len(subject.cuts)} max_change={ends:.2g}",
                    "a score may not depend on where a document ends")]


def probe_documents(subject: Subject) -> list[Finding]:
    """D6: rewrite every second document, score them in other orders and by themselves: without all that learns across
    documents the others stay, with it what comes before the first rewritten one."""
    plain, base, number = subject.alone, subject.base, subject.document(np.arange(len(subject.ids)))
    rewritten = other_ids(subject.module, subject.ids, subject.cfg.vocab_size, subject.rng)
    apart = orders = 0.0
    for part in (0, 1):
        other = subject.score(np.where(number % 2 == part, rewritten, subject.ids), **subject.apart)
        rest = number[:-1] % 2 != part
        apart = max(apart, largest(plain.nats[rest], other.nats[rest]))
    sizes, count = subject.ends - subject.starts, len(subject.starts)
    every = list(range(count))
    longest, shortest = int(np.argmax(sizes)), int(np.argmin(np.where(sizes > 1, sizes, sizes.max())))
    for order in (every[::-1], subject.rng.permutation(count).tolist(), [longest], [shortest]):
        spans = [(int(subject.starts[d]), int(subject.starts[d + 1]) if d + 1 < count else len(subject.ids))
                 for d in order]
        other, at = subject.score(np.concatenate([subject.ids[a:b] for a, b in spans]), **subject.apart), 0
        for a, b in spans:
            orders = max(orders, largest(plain.nats[a:b - 1], other.nats[at:at + b - 1 - a]))
            at += b - a
    half = count // 2
    later = subject.score(np.where(number >= half, rewritten, subject.ids))
    before = largest(base.nats[:subject.starts[half]], later.nats[:subject.starts[half]])
    return [Finding("D6", "P", apart <= EXACT and orders <= LAYOUT, f"documents={count} max_change={apart:.2g} "
                    f"in_other_orders={orders:.2g}",
                    "a document's score may not depend on others where nothing learns across them: rulings L, P"),
            Finding("D6", "C1", before <= EXACT, f"documents={half} max_change={before:.2g}",
                    "a document's score may not depend on a later document: rulings A, P")]


def probe_states(subject: Subject) -> list[Finding]:
    """D4: between two scores a state changes only where the ledger has an update of it; no step goes unrecorded."""
    ledger, base = subject.module.Ledger, subject.plain
    seen: dict[int, int] = {}
    updated: set[int] = set()
    pending = steps = 0
    faults = Counter({"states changed by the scorer itself": [*subject.base.timeline].count(("touched",))})
    for kind, *what in base.timeline:
        if kind == "step":
            pending, steps = pending + 1, steps + 1
        elif kind == "note" and what[0] == ledger.UPDATE:
            updated.update(what[1].tolist())
            pending = 0
        elif kind == "nats":
            faults["optimizer steps before a score without an entry"] += pending
            pending = 0
            states = {ledger.BASE: int(base.shared[what[0][0]])}
            states.update((int(subject.document(t)), int(base.own[t])) for t in what[0].tolist())
            for state, now in states.items():
                if seen.get(state, now) != now and state not in updated:
                    faults["states changed without an entry"] += 1
                seen[state] = now
            updated -= set(states)
    text = "; ".join(f"{name}: {n}" for name, n in faults.items() if n)
    return [Finding("D4", "C3", not text, f"steps={steps} states={len(seen)} {text}".rstrip(),
                    "scoring must leave every state as it was, and every step must be in the ledger: ruling A")]


def recheck(events: np.ndarray, num_targets: int, ledger: Any) -> list[str]:
    """Say what is illegal about a ledger, target by target; independent of the module's own check."""
    when, faults = dict[int, tuple[int, int]](), set[str]()
    for phase, sequence, kind, _, begin, end in events.tolist():
        when.update(dict.fromkeys(range(begin, end) if kind == ledger.SCORE else (), (phase, sequence)))
    if set(when) != set(range(num_targets)):
        return ["C4: targets are left out"]
    for *now, kind, state, begin, end in events.tolist():
        read = range(0 if state == ledger.BASE else begin, end) if kind == ledger.UPDATE else ()
        for t in (t for t in read if when[t] > tuple(now)):
            faults.add("C3: a state learned from unscored targets" if t >= begin else
                       "C1: an earlier target is scored by weights that know a later one")
    return sorted(faults)


def probe_ledger(subject: Subject) -> list[Finding]:
    """D5: the ledger's own verdict, ours, and whether its scores are those that the scorer first gave."""
    base, targets = subject.plain, len(subject.plain.nats)
    ledger = subject.module.Ledger
    faults = recheck(base.events, targets, ledger)
    times = Counter(t for kind, *what in base.timeline if kind == "note" and what[0] == ledger.SCORE
                    for b, e in zip(what[2].tolist(), what[3].tolist()) for t in range(b, e))
    faults += ["C4: targets are scored again"] * (max(times.values(), default=0) > 1)
    faults += [fault if fault.startswith(("C1", "C3", "C4")) else f"C4: {fault}"
               for fault in base.refusal.split("; ") if fault]
    unseen = int(np.isnan(base.first).sum())
    rescored = int((np.abs(base.nats - base.first) > 1e-6).sum())
    own = {condition: "; ".join(fault for fault in faults if fault.startswith(condition))
           for condition in ("C1", "C3", "C4")}
    return [Finding("D5", condition, not text, f"events={len(base.events)} targets={targets} {text}".rstrip(),
                    "every target must be entered once, in one order, before anything learns from it")
            for condition, text in own.items()] + [
        Finding("D5", "C4", not unseen and not rescored, f"never_scored={unseen} rescored={rescored}",
                "the ledger must hold the first score of every target: ruling B")]


def probe_replay(s: Subject) -> list[Finding]:
    """D7: two runs, and a third with one row in each batch."""
    again, layout = (largest(a.nats, b.nats) for a, b in ((s.base, s.plain), (s.alone, s.single)))
    return [Finding("D7", "C4", again <= EXACT, f"max_change={again:.2g}", "a second run must give the same scores"),
            Finding("D7", "P", layout <= LAYOUT, f"max_change={layout:.2g}",
                    "a score may not depend on which documents share a batch: ruling P")]


def probe_side_file(tokenizer: Path | None, ids: np.ndarray, sizes: np.ndarray, bos: int) -> list[Finding]:
    """D8 where a side file counts: bytes of whole documents against the text that case operators stand for. What the
    normaliser drops is in the file and not in the ids: nearly all documents agree to the byte, not each."""
    if tokenizer is None or not tokenizer.is_file():
        return [Finding("D8", "accounting", False, "tokenizer=none", "bytes of the side file cannot be recounted: give "
                        "TOKENIZER_PATH", suspect=True)]
    from sentencepiece import SentencePieceProcessor

    from data.caseops import TRANSFORMS
    sp = SentencePieceProcessor(model_file=str(tokenizer))
    edges = np.flatnonzero(ids == bos)[:200].tolist()
    texts = [spelled(sp, ids[a + 1:b].tolist()).decode(errors="replace") for a, b in zip(edges, edges[1:])]
    said = [int(sizes[a:b].sum()) for a, b in zip(edges, edges[1:])]
    best, gap = 0, 1.0
    for name in ("caseops_v1", "caseops_v2"):
        with contextlib.suppress(ValueError):  # operators of the other version
            true = [len(TRANSFORMS[name].decode(text).encode()) for text in texts]
            if (equal := sum(map(int.__eq__, true, said))) >= best:
                best, gap = equal, abs(sum(said) / max(1, sum(true)) - 1)
    return [Finding("D8", "accounting", gap <= 2e-3 and best >= 0.6 * len(texts), f"documents={len(texts)} "
                    f"equal={best} gap={gap:.2%}", "bytes of the side file must be those of the text: ruling O")]


def probe_hints(subject: Subject) -> list[Finding]:
    """D9: hints up to a target stay when it and all that follows are replaced; at as many targets as is cheap."""
    if not subject.cfg.ngram_base_beta:
        return []
    wrong, count = set[int](), len(subject.ids) - 1
    hints, betas = subject.plain.hints
    cuts = subject.rng.permutation(count)[:max(16, 200_000 // count)].tolist()
    for t in cuts:
        ids = subject.ids.copy()
        ids[t + 1:] = other_ids(subject.module, ids[t + 1:], subject.cfg.vocab_size, subject.rng)
        others, strengths = subject.module.ngram_hints(torch.from_numpy(ids).to(hints.device), subject.cfg)
        same = ((betas == strengths) & ((hints == others) | (betas == 0)))[:t + 1]
        wrong.update(np.flatnonzero(~same.cpu().numpy()).tolist())
    return [Finding("D9", "C1", not wrong, f"cuts={len(cuts)} hints={int((betas > 0).sum())} wrong={len(wrong)}",
                    "a hint may not depend on its target or on later ids: rulings E, F")]


PROBES = (probe_ledger, probe_states, probe_hints, probe_number, probe_calls, probe_documents,
          functools.partial(probe_targets, shared=False),
          probe_replay, functools.partial(probe_targets, shared=True), probe_ends)
"""The cheap ones first."""


def looks(subject: Subject) -> Iterator[Finding]:
    """Make every dynamic probe of one subject, one after the other. Raises `ToolError` without a target."""
    if not subject.positions:
        raise ToolError(f"a stream of {len(subject.ids)} ids has no target to probe; give longer documents")
    for probe in PROBES:
        yield from probe(subject)


def audit(subject: Subject) -> list[Finding]:
    """Return the findings of every dynamic probe, by their codes."""
    return sorted(looks(subject), key=lambda f: f.code)


# -- rehearsal: who reads what when, and whose score it is ---------------------------------------------

TRAINING = {"load_train", "warmup", "train", "calibrate", "factorize", "allocate", "gptq", "pack"}
"""Phases in which validation shards are not even opened; their headers are looked at before, their digest behind."""
ON_THE_CLOCK = {"unpack": "eval", "load_tensors": "eval", "ngram_hints": "eval", "adapted_score": "eval",
                "calibrate": "train", "fit_to_cap": "none", "ShardedOptimizer.step": "train",
                "Quantizer.quantize": "train"}
"""What is charged to which budget; inside `fit_to_cap` phases of their own are charged."""
PAUSES = {"pack", "val_probe", "warmup_adapters", "warmup_sgd"}
"""Writing, diagnostics, compilation: off the clock inside what is charged."""
OUTSIDE_WORLD = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect",
                 "socket.getaddrinfo", "urllib.Request"}
WATCHERS: list[Callable[[str, tuple], None]] = []
"""Whoever listens to the interpreter's audit events now; a hook cannot be taken away again."""


@functools.cache
def listen() -> None:
    """Let WATCHERS hear of every file that is opened, whoever opens it, and of other programs and sockets."""
    def hook(event: str, arguments: tuple) -> None:
        if WATCHERS and (event == "open" or event in OUTSIDE_WORLD):
            for watcher in [*WATCHERS]:
                watcher(event, arguments)

    sys.addaudithook(hook)


class Stage:
    """What happens to data, files and clocks while the program trains and scores in miniature, by condition."""

    def __init__(self, module: ModuleType, folder: Path, tokenizer: Path | None) -> None:
        self.module, self.folder, self.tokenizer = module, str(folder), os.path.abspath(str(tokenizer))
        self.faults: dict[str, list[str]] = {"C1": [], "C3": [], "accounting": []}
        self.open_phases = [("no phase", "none")]
        self.frozen = self.trained = False
        self.script = os.path.realpath(str(module.__file__))
        own = {os.path.abspath(p) for p in (sys.prefix, sys.base_prefix, *sys.path[1:], os.environ.get("TMPDIR")) if p}
        self.known = (*own - {os.getcwd(), os.path.dirname(self.script)}, "/proc", "/sys", "/dev", "/etc", "/usr",
                      "/lib", str(ROOT / "bench"), str(ROOT / "tools"))

    def fault(self, condition: str, text: str) -> None:
        """Enter a fault, with the phase it happened in."""
        self.faults[condition].append(text.replace("PHASE", self.open_phases[-1][0]))

    def findings(self) -> list[Finding]:
        """Return what was seen, by condition."""
        rule = {"C1": "scoring opens the artifact, the validation shards and the tokenizer alone",
                "C3": "validation tokens are read after the artifact is written",
                "accounting": "training tokens and all work are on their clocks"}
        return [Finding("A2", condition, not own, f"faults={len(own)} {'; '.join([*dict.fromkeys(own)][:2])}".rstrip(),
                        rule[condition]) for condition, own in self.faults.items()]

    def shard(self, name: str, opened: bool = False) -> None:
        """A shard is opened, or its tokens are read."""
        phase, budget = self.open_phases[-1]
        if name.startswith("fineweb_val") and (phase in TRAINING if opened else not self.frozen):
            self.fault("C3", f"{name} read in PHASE, before the artifact was written: rulings A, C, H")
        elif name.startswith("fineweb_val") and budget != "eval" and not opened:
            self.fault("accounting", f"{name} read in PHASE, off the evaluation's clock: ruling J")
        if name.startswith("fineweb_train") and (self.frozen or (self.trained and budget != "train")):
            self.fault("accounting", f"{name} read in PHASE, off the training clock: ruling H")

    def opened(self, event: str, arguments: tuple) -> None:
        """Hear of an audit event."""
        if event != "open":
            self.fault("accounting", f"{event} in PHASE: outside code must be counted")
            return
        if not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        name = os.path.basename(path)
        if path == self.tokenizer or path.endswith(".py") and path in {  # tracebacks and decorators look at sources
                self.script, *(getattr(module, "__file__", None) for module in [*sys.modules.values()])}:
            return
        if not path.startswith(self.folder):
            if not path.startswith(self.known):
                self.fault("C1" if self.frozen else "accounting", f"{path} opened in PHASE: not in the artifact")
        elif name.startswith(("fineweb_val", "fineweb_train")):
            self.shard(name, opened=True)
        elif name not in ("manifest.json", "verified.json") and \
                not path.startswith(os.path.join(self.folder, "logs")):
            self.fault("C1", f"{name} opened in PHASE: not in the artifact")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch phases, tokens, files and clocks of the program while it runs."""
        m, stage, patches = self.module, self, contextlib.ExitStack()
        phase, read, starts = m.Run.phase, m.TokenStream.read, m.TokenStream.document_starts

        @functools.wraps(phase)
        @contextlib.contextmanager
        def seen_phase(own: Any, name: str, budget: str = "none") -> Iterator[None]:
            stage.trained = stage.trained or budget == "train"
            if budget != stage.open_phases[-1][1] != "none" and name not in PAUSES:
                stage.fault("accounting", f"{name} stops the clock of PHASE: rulings I, J")
            stage.open_phases.append((name, budget))
            try:
                with phase(own, name, budget):
                    time.sleep(0.05 * (budget != "none"))  # so that the verdict's time shows a phase that it leaves out
                    yield
            finally:
                stage.open_phases.pop()

        def seen(method: Callable) -> Callable:
            @functools.wraps(method)
            def of_stream(own: Any, *rest: Any) -> Any:
                stage.shard(own.paths[0].name)
                return method(own, *rest)
            return of_stream

        def timed(name: str, function: Callable) -> Callable:
            @functools.wraps(function)
            def on_the_clock(*arguments: Any, **more: Any) -> Any:
                where, budget = stage.open_phases[-1]
                if ON_THE_CLOCK[name] not in ("none", budget) and where != "warmup":
                    stage.fault("accounting", f"{name} in PHASE, which is not charged to {ON_THE_CLOCK[name]}: "
                                              f"rulings H, I, J")
                out = function(*arguments, **more)
                stage.frozen = stage.frozen or name == "fit_to_cap"
                return out
            return on_the_clock

        listen()
        with patches:
            patches.enter_context(mock.patch.object(m.Run, "phase", seen_phase))
            patches.enter_context(mock.patch.object(m.TokenStream, "read", seen(read)))
            patches.enter_context(mock.patch.object(m.TokenStream, "document_starts", seen(starts)))
            for name in ON_THE_CLOCK:
                owner, _, method = name.rpartition(".")
                holder = getattr(m, owner) if owner else m
                patches.enter_context(mock.patch.object(holder, method, timed(name, getattr(holder, method))))
            WATCHERS.append(self.opened)
            try:
                yield
            finally:
                WATCHERS.remove(self.opened)


def rehearsal_knobs(cfg: Any, folder: Path, tokenizer: Path | None) -> dict[str, str]:
    """Return the run's knobs around a model of a few thousand parameters and one step on the data in `folder`. Its
    embedding is large, so that rounding shows in the score."""
    small = dict(
        data_path=folder, tokenizer_path=tokenizer or "", log_dir=folder / "logs", run_id="", eval_only="", resume="0",
        num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, num_loops=0, parallel_start_layer=1, rope_dims=8,
        bigram_buckets=min(cfg.bigram_buckets, 16), iterations=1, max_wallclock_seconds=0, warmup_steps=0,
        train_seq_len=32, train_batch_tokens=64, micro_batch_tokens=64, gptq_calibration_batches=1, eval_seq_len=32,
        eval_stride=min(cfg.eval_stride, 16), val_loss_every=min(cfg.val_loss_every, 1),
        phased_ttt_num_phases=min(cfg.phased_ttt_num_phases, 1), phased_ttt_prefix_docs=1, ttt_chunk_size=16,
        ttt_lora_rank=min(cfg.ttt_lora_rank, 4), tied_embed_init_std=0.5, eval_seconds_budget=1e9,
        dtype="float32", device="cpu", compile="off")
    return {name.upper(): typed_text(value) for name, value in {**dataclasses.asdict(cfg), **small}.items()}


def perform(module: ModuleType, knobs: Mapping[str, str]) -> tuple[Path, list[dict[str, Any]]]:
    """Run the whole program in this process; return its files' stem and its log. Raises `ToolError` if it fails."""
    def fail(status: int) -> None:
        last_line = screen.getvalue().strip().rpartition("\n")[2]
        raise ToolError(f"the rehearsal ended with status {status}: {last_line}")

    screen = io.StringIO()
    with mock.patch("os._exit", fail), contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        status = module.main([], knobs)  # a bug would end this process
    if status:
        fail(status)
    path = max(Path(knobs["LOG_DIR"]).glob("*.jsonl"), key=lambda p: p.stat().st_mtime_ns)
    return path.with_suffix(""), events(path)


def rehearse(module: ModuleType, cfg: Any, ids: np.ndarray, tokenizer: Path | None) -> list[Finding]:
    """A2, D8: train, pack and score in miniature; see who reads what in which phase, and whose score the verdict is.
    ids [N] are written as training and as validation shards. The validation's tokens may be read only after
    `fit_to_cap` has returned the artifact, training's only before that and, once training has started, on its clock.
    The same training beside other validation tokens must give the same weights; and the verdict must be our own sum."""
    from bench.common import write_shard  # the format is the challenge's, whatever the module under audit is
    rng, ids = np.random.default_rng(0), ids.astype(np.int64)
    sizes = 1 + np.arange(len(ids)) % 5

    def better(*arguments: Any) -> Any:
        """A diagnostic's score, half of what it is: the verdict has no use for it."""
        score = fixed(*arguments)
        return score._replace(nats=score.nats / 2, val_loss=score.val_loss / 2, val_bpb=score.val_bpb / 2)

    code, fixed = functools.cache(module.shipped_source), module.score_fixed  # the first takes longer than all else
    with tempfile.TemporaryDirectory() as name, mock.patch.multiple(module, shipped_source=code, score_fixed=better):
        folders = [Path(name).resolve() / part for part in ("data", "other")]
        for folder in folders:
            (folder / "logs").mkdir(parents=True)
            own = ids if folder.name != "other" else other_ids(module, ids, cfg.vocab_size, rng)
            write_shard(folder / "fineweb_val_000000.bin", own)
            write_shard(folder / "fineweb_train_000000.bin", np.tile(ids, -(-256 // len(ids))))
            if cfg.caseops_enabled:
                write_shard(folder / "fineweb_val_bytes_000000.bin", sizes)
        knobs = rehearsal_knobs(cfg, folders[0], tokenizer)
        stage, begun = Stage(module, folders[0], tokenizer), time.perf_counter()
        with stage.watching():
            stem, log = perform(module, knobs)
        spent = time.perf_counter() - begun
        if any(stage.faults.values()):
            return stage.findings()
        verdict, artifact = last(log, "verdict"), module.unpack(stem.with_suffix(".bin").read_bytes())
        cfg = module.Config.from_env(knobs)
        nats = Subject(module, cfg, ids, lambda: loaded(module, artifact, cfg), scaled=False).plain.nats
        sums = sums_of(log, nats, ids, byte_count(module, ids, sizes if cfg.caseops_enabled else None, tokenizer),
                       artifact_bytes=stem.with_suffix(".bin").stat().st_size + len(code(Path(module.__file__))))
        by_phase = charged([e for e in log if e["event"] == "phase"])
        slow = [budget for budget in ("train", "eval") if verdict[f"{budget}_seconds"] < by_phase[budget] - 0.03]
        if slow or sum(by_phase.values()) < 0.8 * spent - 0.1:
            stage.fault("accounting", f"the log has less time {' '.join(slow)} than was spent: rulings I, J")
        if failed([sums, *stage.findings()]):
            return [*stage.findings(), sums]
        with mock.patch.object(module, "evaluate", lambda *_: None):
            other = perform(module, rehearsal_knobs(cfg, folders[1], tokenizer))[0]
        weights = module.unpack(other.with_suffix(".bin").read_bytes()).tensors
        if any(not torch.equal(values, weights[name]) for name, values in artifact.tensors.items()):
            stage.fault("C3", "the artifact's weights depend on the validation tokens: rulings A, C, H, K")
        return [*stage.findings(), sums]


def byte_count(module: ModuleType, ids: np.ndarray, sizes: np.ndarray | None, tokenizer: Path | None) -> int:
    """Return the bytes of all targets of ids [N], by sizes [N] where a side file has them, else by their text."""
    if sizes is not None:
        return int(sizes[1:].sum())
    from sentencepiece import SentencePieceProcessor
    sp, edges = SentencePieceProcessor(model_file=str(tokenizer)), np.flatnonzero(ids == module.BOS_ID)[1:]
    return sum(len(spelled(sp, own[1:].tolist())) for own in np.split(ids, edges))


def sums_of(log: Sequence[Mapping[str, Any]], nats: np.ndarray, ids: np.ndarray, size: int, **more: int) -> Finding:
    """D8: what a log says of a stream ids [T + 1] with `size` bytes against our own sums of nats [T], and `more`."""
    verdict, loss, starts = last(log, "verdict") or {}, float(nats.sum()) / len(nats), np.flatnonzero(ids == ids[0])
    expected = dict(tokens=len(nats), bytes=size, val_loss=loss, val_bpb=loss * len(nats) / np.log(2) / max(1, size))
    wrong = [name for name, value in {**expected, **more}.items() if abs((verdict[name] or 0) / value - 1) > 1e-5]
    place = np.arange(len(nats)) - np.repeat(starts, np.diff(starts, append=len(nats)))
    sums = {"first_documents": nats.cumsum()[np.append(starts[1:], len(nats))[:16] - 1],
            "places": np.bincount(np.log2(place + 1).astype(int), weights=nats)}
    for name, own in sums.items():
        said = last(log, name) or {}
        said = np.array(said.get("position", said).get("nats", []))
        if said.shape != own.shape or largest(said, own) > 1e-5 * max(1.0, *own):
            wrong.append(name)
    return Finding("D8", "accounting", not wrong, f"targets={len(nats)} val_loss={verdict['val_loss']} "
                   f"own={loss:.6f} wrong={','.join(wrong) or 0}",
                   "a log must have our own sums over the shards and the audited ledger: rulings O, Q")


def loaded(module: ModuleType, artifact: Any, cfg: Any) -> Any:
    """Return a model with an artifact's weights."""
    model = module.GPT(artifact.model)
    module.load_tensors(model, artifact.tensors)
    model.kernels = module.pick_kernels(cfg, module.Run(cfg, {}, log=False))
    return model


# -- a long stream, and a process that nobody is inside of ---------------------------------------------

LONG_SECONDS, LONG_IDS = 10.0, (1 << 13, 1 << 17)
"""CPU time of one run over the long stream; its least and most ids."""
OWN_SECONDS = 1_800.0
"""After so long the script's own process is stopped."""
LISTENER = """import os, sys
def hear(event, arguments):
    sys.modules.pop("sitecustomize", None)
    name = os.path.abspath(os.fsdecode(arguments[0])) if event == "open" and not isinstance(arguments[0], int) else ""
    if event in {events} and (event != "open" or name and (arguments[1] or not arguments[2] & os.O_EXCL)):
        os.write({told}, (repr((event, name)) + "\\n").encode())
site, _, others = os.environ.pop("PYTHONPATH").partition(os.pathsep)
sys.path.remove(site)
if others:
    os.environ["PYTHONPATH"] = others
del site, others
sys.addaudithook(hear)
"""
"""What Python runs before a script: it tells of files, but not of tempfile's trials, and leaves nothing to be found."""


def remarked(module: ModuleType, blob: bytes, **marks: Any) -> bytes:
    """Return an artifact with other fields in its header."""
    *head, size = module.ARTIFACT_HEAD.unpack_from(blob)
    text = json.dumps({**header_of(module, blob), **marks}).encode()
    text = len(text).to_bytes(4, "little") + module.brotli_pack(text)
    body = module.ARTIFACT_HEAD.pack(*head, len(text)) + text + blob[module.ARTIFACT_HEAD.size + size:-16]
    return body + hashlib.blake2b(body, digest_size=16).digest()


def long_subject(subject: Subject, cfg: Any, ids: np.ndarray) -> Subject:
    """Return the subject on as long a stream as there is time for, to be flipped from the middle of one document on."""
    m, begun = subject.module, time.process_time()
    assert Subject(m, cfg, ids[:1 << 11], subject.make_model, scaled=False).plain
    ids = ids[:int(np.clip(LONG_SECONDS / (time.process_time() - begun) * min(len(ids), 1 << 11), *LONG_IDS))]
    small = miniature(m, cfg, ids)
    cfg = dataclasses.replace(cfg, eval_seconds_budget=36_000.0, **{name: getattr(small, name) for name in (
        "phased_ttt_prefix_docs", "phased_ttt_num_phases", "ttt_chunk_tokens")})
    long = Subject(m, cfg, ids, subject.make_model, scaled=False)
    odd = max(1, len(long.starts) // 4 * 2 - 1) % len(long.starts)  # what follows a target is replaced there as well
    long.positions, long.shares = [int(long.starts[odd] + long.ends[odd]) // 2], True
    return long


def apart(long: Subject, tokenizer: Path | None, cfg: Any, blob: bytes, env: Mapping[str, str]) -> list[Finding]:
    """Ask of a long stream what is affordable, while the script scores the same stream as a user starts it: from a
    folder with these shards alone, in a process that is watched from outside."""
    from bench.common import write_shard
    m, ids, sizes, script = long.module, long.ids, None, Path(str(long.module.__file__)).resolve()
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryFile() as heard:
        home = Path(name).resolve()
        folder, logs, site = home / "datasets" / cfg.dataset_dir.resolve().name, home / "logs", home / "site"
        for path in (folder, logs, site):
            path.mkdir(parents=True)
        write_shard(folder / "fineweb_val_000000.bin", ids)
        if cfg.caseops_enabled:
            sizes = m.TokenStream(cfg.dataset_dir, "fineweb_val_bytes").read(0, len(ids))
            write_shard(folder / "fineweb_val_bytes_000000.bin", sizes)
        own_cfg = dataclasses.replace(long.cfg, data_path=str(folder), log_dir=str(logs), run_id="", resume="0",
                                      tokenizer_path=str(tokenizer.resolve() if tokenizer else ""),
                                      eval_only=str(logs / "artifact.bin"))
        blob = remarked(m, blob, validation=m.validation_digest(own_cfg))
        Path(own_cfg.eval_only).write_bytes(blob)
        (site / "sitecustomize.py").write_text(LISTENER.format(told=heard.fileno(), events={"open", *OUTSIDE_WORLD}))
        changed = {name.upper(): typed_text(value) for name, value in vars(own_cfg).items()
                   if value != getattr(cfg, name)}
        changed.update(PYTHONPATH=os.pathsep.join([str(site), *filter(None, [env.get("PYTHONPATH")])]),
                       OMP_NUM_THREADS=str(torch.get_num_threads()))
        with subprocess.Popen([sys.executable, str(script)], env={**MACHINE, **env, **changed}, cwd=script.parent,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=[heard.fileno()]) as process:
            try:
                some = long.rng.integers(len(ids) - 1, size=long.affordable).tolist()
                long.base = long.plain = long.alone = long.score(probes=[*long.positions, *some], deep=0.2)
                findings = [f for probe in PROBES[:5] for f in probe(long)] + probe_targets(long, shared=True)
                screen = process.communicate(timeout=OWN_SECONDS)[0].decode(errors="replace").splitlines()
            except subprocess.TimeoutExpired:
                raise ToolError(f"{script}: EVAL_ONLY did not end within {OWN_SECONDS:,.0f} s on a stream that takes "
                                f"{LONG_SECONDS:.0f} s: its score cannot be checked") from None
            finally:
                process.kill()  # nothing, where it has ended
        if failed(findings):
            return findings
        if process.returncode:
            raise ToolError(f"{script}: EVAL_ONLY ended with status {process.returncode}: {screen[-1:]}")
        heard.seek(0)
        stage = Stage(m, home, tokenizer)
        stage.frozen, stage.open_phases = True, [("a process of its own", "eval")]
        for event, opened in map(ast.literal_eval, heard.read().decode().splitlines()):
            stage.opened(event, (opened,))
        path = next(logs.glob("*.jsonl"), None)
        if path is None or not last(events(path), "verdict"):
            raise ToolError(f"{script}: EVAL_ONLY wrote no log with a verdict to LOG_DIR, as the trainer does")
        return [*findings, *(f for f in audit_log(path, blob, seconds=float("inf")) if f.failed), *stage.findings(),
                sums_of(events(path), long.plain.nats, ids, byte_count(m, ids, sizes, tokenizer))]


# -- the artifact, and the log that it is said to have ---------------------------------------------------

MACHINE = {"DEVICE": "cpu", "DTYPE": "float32", "COMPILE": "off"}
HEADER = {"preset", "global_scale", "trellis", "score", "validation", "model", "streams"}
"""What this program writes into the header of an artifact."""


def header_of(module: ModuleType, blob: bytes) -> dict[str, Any]:
    """Return what an artifact's header holds."""
    begin = module.ARTIFACT_HEAD.size
    size = int.from_bytes(blob[begin:begin + 4], "little")
    return json.loads(module.brotli_unpack(blob[begin + 4:begin + module.ARTIFACT_HEAD.unpack_from(blob)[2]], size))


def probe_header(module: ModuleType, blob: bytes, cfg: Any, artifact: Any) -> list[Finding]:
    """A4: what the artifact says of itself: nothing that the program does not write, these knobs, this validation."""
    header = header_of(module, blob)
    strange = sorted(set(header) - HEADER)
    told = " ".join(f"{name}={json.dumps(header[name])[:60]}" for name in strange)
    changed = [name for name, value in artifact.knobs.items() if getattr(cfg, name) != value and name != "preset"]
    other = artifact.validation not in ("", module.validation_digest(cfg))
    return [Finding("A4", "C3", not strange, f"fields={len(header)} {told}".rstrip(),
                    "the header may hold what the program writes alone"),
            Finding("A4", "accounting", not changed and not other, f"knobs={len(artifact.knobs)} {' '.join(changed)}",
                    "to be audited with the artifact's own knobs, on its validation set", suspect=True)]


def probe_first_documents(log: Path, long: Subject) -> list[Finding]:
    """A3: what the artifact makes of the documents before anything shared has learned, against what the log has."""
    held, rows = events(log), long.base.events
    said, start = last(held, "first_documents") or {}, last(held, "start") or {}
    first = rows[(rows[:, 0] == 0) & (rows[:, 2] == long.module.Ledger.SCORE), 5].max()
    config = last(held, "config") or {}
    phases, documents = (int(config.get(f"phased_ttt_{name}") or 0) for name in ("num_phases", "prefix_docs"))
    ends = long.ends[:-1][long.ends[:-1] <= first][:len(said.get("nats", ""))]
    ends = ends[:documents // phases if phases else None]  # the run's own first phase
    if not len(ends):
        return [Finding("A3", "accounting", False, "first_documents=none", "the log cannot be refuted", suspect=True)]
    worst = max(abs(a / b - 1) for a, b in zip(said["nats"], long.base.nats.cumsum()[ends - 1].tolist()))
    most = 0.1 if last(held, "adaptation_cut") else 3e-3 if start.get("dtype") == "float32" else 2e-2
    return [Finding("A3", "accounting", worst <= most, f"documents={len(ends)} max_gap={worst:.2%}",
                    "the artifact must make of the first documents what the log says: ruling Q")]


def artifact_subject(path: Path, env: Mapping[str, str]) -> tuple[Subject, Any, np.ndarray, list[Finding]]:
    """Return the subject of an artifact on the dataset of its knobs, the knobs, the stream, and what the files say. The
    script's own `UserError` passes through."""
    env, blob = dict(env), path.read_bytes()
    module = load_module(Path(env.pop("SCRIPT", ROOT / "train_gpt.py")))
    artifact = module.unpack(blob, str(path))
    cfg = module.Config.from_env({**MACHINE, **env}, artifact.knobs)
    cfg = module.on_its_data(cfg, artifact.validation, env)
    stream = module.TokenStream(cfg.dataset_dir, "fineweb_val")
    ids = stream.read(0, min(len(stream), 1 << 20)).astype(np.int64)
    model, findings, tokenizer = loaded(module, artifact, cfg), probe_header(module, blob, cfg, artifact), None
    with contextlib.suppress(module.UserError):  # with a side file scoring needs no tokenizer
        tokenizer = module.tokenizer_path(cfg)
    if cfg.caseops_enabled:
        side = module.TokenStream(cfg.dataset_dir, "fineweb_val_bytes").read(1, len(ids))
        findings += probe_side_file(tokenizer, ids, side, module.BOS_ID)
        tokenizer = None
    return Subject(module, cfg, piece_of_stream(module, cfg, ids), lambda: copy.deepcopy(model), tokenizer), cfg, ids, \
        findings


def main(arguments: Sequence[str]) -> int:
    """Print the audit; return 0 where nothing is refuted, 1 where a probe failed."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    if arguments[0] == "--static":
        return static_main(arguments[1:])
    path, knobs = Path(arguments[0]), pairs(arguments[1:])
    if not path.is_file():
        raise ToolError(f"{path}: no such artifact; give a .bin that a run has written")
    log, seconds = knobs.pop("LOG", ""), knobs.pop("BUDGET", f"{TRACK_SECONDS:g}")
    env = {**{name: value for name, value in os.environ.items() if name != "SCRIPT"}, **knobs}
    subject, cfg, ids, findings = artifact_subject(path, env)
    module, blob = subject.module, path.read_bytes()
    if sum(p.numel() for p in subject.make_model().parameters()) < 10_000_000:
        torch.set_num_threads(1)  # small products: threads that wait for one another cost more than they save
    unknown = sorted(set(knobs) - {"SCRIPT"} - {name.upper() for name in module.kinds(module.Config)})
    if unknown:
        raise ToolError(f"{unknown[0]}={knobs[unknown[0]]}: no such knob; ./run.sh knobs lists them")
    if log:
        log = find_log(log, log_folder())
        findings += readable(log, audit_log, log, blob, module.unpack(blob).knobs, float(seconds))
    findings += audit(subject)
    long = long_subject(subject, cfg, ids)
    findings += apart(long, subject.tokenizer, cfg, blob, env) + rehearse(module, cfg, ids[:1 << 12], subject.tokenizer)
    if log:
        findings += readable(log, probe_first_documents, log, long)
    print(table(findings))
    return failed(findings)


if __name__ == "__main__":
    sys.exit(program(main, "audit.py"))
