"""Audits a submission: does its score obey the conditions C1..C4 and the accounting rules? Each probe tries to refute.

    python records/audit.py ARTIFACT [KNOB=value ...] [LOG=logs/<run_id>.jsonl] [SCRIPT=train_gpt.py]
    python records/audit.py --static FOLDER_OR_SCRIPT [TOKENIZER=file.model] [DATA_PATH=folder]

The dynamic audit runs the script's own evaluation on a short piece of the real validation stream, again and again with
single ids changed, and looks at what the scores, the states behind them and the ledger do. Knobs are those of the run
(DEVICE=cpu and DTYPE=float32 unless given: what is compared is exact). The static audit reads sources without running
them. Exit status: 0 nothing refuted, 1 a probe failed, 2 the audit could not be made.

  C1  a score depends on the artifact and on earlier ids alone    D1 D6 D9 S2
  C2  one normalised distribution, fixed before its target        D2 D3 D8 S2
  C3  scored first, learned from afterwards                       D2 D4 D5 A2 S2
  C4  one pass from left to right, each target once               D5 D7 S2
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

from tools.evidence import (
    AuditError,
    Finding,
    audit_log,
    failed,
    load_module,
    readable,
    spelled,
    static_main,
    table,
)
from tools.logs import InputError, find_log, log_folder, pairs, typed

if __name__ == "__main__" and sys.argv[1:2] == ["--static"]:  # torch takes longer to import than sources to read
    sys.exit(static_main(sys.argv[2:]))

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
    nats: np.ndarray
    """[T] float64: the ledger's scores."""
    shared: np.ndarray
    """[T] int64: fingerprint of the shared weights that gave each target the score in the ledger."""
    own: np.ndarray
    """[T] int64: fingerprint of the adapters that did; 0 without any."""
    first: np.ndarray
    """[T] float64: what the scorer returned when it first saw each target; nan if it never did."""
    timeline: list[tuple]
    """("nats", targets), ("step",), ("note", kind, states, begins, ends) in the order of time."""
    events: np.ndarray
    """[E, 6]: the ledger."""
    full: dict[int, np.ndarray]
    """Probed target -> [V] nats of every id in its place, from the state that scored it."""
    hints: Any
    refusal: str
    """What the program itself objected to; empty: nothing."""


def fingerprint(tensors: Sequence[torch.Tensor], rows: int = 1) -> torch.Tensor:
    """[rows] int64 checksums of the bits of tensors whose first axis is split into `rows`."""
    total = torch.zeros(rows, dtype=torch.int64)
    for t in tensors:
        bits = t.detach().contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32)
        total = total * 1_000_003 + bits.reshape(rows, -1).sum(1, dtype=torch.int64).cpu()
    return total


def watching(module: ModuleType) -> type:
    """A subclass of the module's `Scorer` that records which state scored what, and when."""

    class Watch(module.Scorer):
        def __init__(self, val: Any, cfg: Any, run: Any, hints: Any, probes: Sequence[int]) -> None:
            super().__init__(val, cfg, run, hints)
            targets = val.num_targets
            self.first = np.full(targets, np.nan)
            self.shared, self.own = np.zeros(targets, dtype=np.int64), np.zeros(targets, dtype=np.int64)
            self.timeline: list[tuple] = []
            self.full: dict[int, np.ndarray] = {}
            self.later: list[tuple[np.ndarray, np.ndarray, int, np.ndarray]] = []
            self.probes = set(probes)
            note = self.ledger.note

            def noted(kind: int, states: Any, begins: Any, ends: Any) -> None:
                self.timeline.append(("note", kind, *(np.atleast_1d(x) for x in (states, begins, ends))))
                note(kind, states, begins, ends)

            self.ledger.note = noted

        def nats(self, model: Any, hidden: Any, targets: Any, numbers: Any, w: Any) -> Any:
            out = super().nats(model, hidden, targets, numbers, w)
            flat, scores = numbers.flatten().cpu().numpy(), out[0].detach().flatten().double().cpu().numpy()
            real = np.flatnonzero((targets.flatten() != module.IGNORE).cpu().numpy())  # the rest is padding
            rows, adapters = hidden.size(0) if hidden.dim() == 3 else 1, getattr(w, "adapters", None)
            own_R = fingerprint(adapters.parameters(), rows) if adapters is not None else torch.zeros(rows).long()
            own = own_R.repeat_interleave(len(flat) // rows).numpy()
            shared = int(fingerprint([*w.matrices.values(), w.table]))
            unseen = np.isnan(self.first[flat[real]])
            again, new = real[~unseen], real[unseen]
            if len(again):
                self.later.append((flat[again], scores[again], shared, own[again]))
            if not len(new):
                return out
            at = flat[new]
            self.first[at], self.shared[at], self.own[at] = scores[new], shared, own[new]
            self.timeline.append(("nats", at))
            for i in new[np.isin(at, list(self.probes))]:
                self.full[int(flat[i])] = self.everything(model, hidden, int(i), int(flat[i]), w)
            return out

        def settle(self) -> None:
            """Where a later call gave the ledger's score, its state is the one that counts."""
            kept = self.ledger.nats.double().numpy()
            for at, scores, shared, own in self.later:
                use = (np.abs(kept[at] - scores) <= 1e-6) & (np.abs(kept[at] - self.first[at]) > 1e-6)
                self.shared[at[use]], self.own[at[use]] = shared, own[use]

        @torch.no_grad()
        def everything(self, model: Any, hidden: Any, i: int, number: int, w: Any) -> np.ndarray:
            """[V] nats of every id as the target at flat position i."""
            vocab, found = model.cfg.vocab_size, []
            r, c = divmod(i, hidden.size(-2)) if hidden.dim() == 3 else (0, i)
            spot = hidden[..., c:c + 1, :]
            for at in range(0, vocab, 512):
                ids = torch.arange(at, min(at + 512, vocab), device=hidden.device)
                shape = (*spot.shape[:-2], len(ids))
                scores = super().nats(model, spot.expand(*shape, -1), ids.expand(shape),
                                      torch.full(shape, number, device=hidden.device), w)[0]
                found.append(scores.view(-1, len(ids))[r])
            return torch.cat(found).double().cpu().numpy()

    return Watch


@contextlib.contextmanager
def counting_steps(timeline: list[tuple]) -> Iterator[None]:
    """Every step of any torch optimizer goes into the timeline, whatever the ledger says."""
    handle = register_optimizer_step_post_hook(lambda *_: timeline.append(("step",)))
    try:
        yield
    finally:
        handle.remove()


class Subject:
    """A module's evaluation of one artifact on a short stream of validation ids, as often as asked."""

    def __init__(self, module: ModuleType, cfg: Any, ids: np.ndarray, make_model: Callable[[], Any],
                 tokenizer: Path | None = None) -> None:
        """ids [N] start with BOS; make_model() returns a fresh copy of the artifact's model on the run's device."""
        self.module, self.make_model, self.tokenizer = module, make_model, tokenizer
        self.ids = np.asarray(ids, dtype=np.int64)
        self.cfg = miniature(module, cfg, self.ids)
        self.run = type("Quiet", (module.Run,), {"write": lambda self, line: None})(self.cfg, {}, log=False)
        self.starts = np.flatnonzero(self.ids == module.BOS_ID)
        self.watch = watching(module)
        self.runs = 0

    def document(self, target: int) -> int:
        """Number of the document whose input predicts this target."""
        return int(np.searchsorted(self.starts, target, side="right")) - 1

    def score(self, ids: np.ndarray | None = None, probes: Sequence[int] = (), **knobs: Any) -> Outcome:
        """One run of the production path on `ids` (default: the stream) with some knobs replaced."""
        m, run = self.module, self.run
        self.runs += 1
        ids = self.ids if ids is None else ids
        cfg = dataclasses.replace(self.cfg, **knobs)
        val = m.ValData(ids.astype(np.uint16), np.flatnonzero(ids == m.BOS_ID), np.ones(len(ids) - 1, dtype=np.int32))
        hints = m.ngram_hints(torch.from_numpy(ids).to(run.device), cfg) if cfg.ngram_tilt_enabled else None
        model = self.make_model()
        scorer, refusal = self.watch(val, cfg, run, hints, probes), ""
        with counting_steps(scorer.timeline), run.phase("score", "eval"):
            try:
                m.adapted_score(model, val, cfg, run, scorer)
            except AssertionError as error:  # the program's own ledger objects: a finding, and the probes go on
                refusal = str(error)
        scorer.settle()
        events = np.concatenate([np.empty((0, 6), dtype=np.int64), *scorer.ledger.events])
        return Outcome(scorer.ledger.nats.double().numpy(), scorer.shared, scorer.own, scorer.first, scorer.timeline,
                       events, scorer.full, hints, refusal)


def miniature(module: ModuleType, cfg: Any, ids: np.ndarray) -> Any:
    """The knobs of a run, with what counts documents or tokens scaled to a short stream; no clock decides anything."""
    documents, targets = int((ids == module.BOS_ID).sum()), len(ids) - 1
    prefix = max(1, min(cfg.phased_ttt_prefix_docs, documents - 2))
    return dataclasses.replace(
        cfg, phased_ttt_prefix_docs=prefix, phased_ttt_num_phases=min(cfg.phased_ttt_num_phases, prefix, 2),
        ttt_chunk_tokens=min(cfg.ttt_chunk_tokens, max(1, targets // 3)),
        global_ttt_chunk_tokens=min(cfg.global_ttt_chunk_tokens, max(1, targets // 2)), eval_seconds_budget=1e9)


def piece_of_stream(module: ModuleType, cfg: Any, ids: np.ndarray, documents: int = 18, seed: int = 0) -> np.ndarray:
    """A short stream [N] of the first documents of `ids`, each cut to a few chunks.

    With the tilt on it holds each of fewer documents four times, slightly altered, so that contexts come back.
    """
    starts = np.append(np.flatnonzero(ids == module.BOS_ID), len(ids))
    length = 120
    if cfg.ttt == "lora":
        length = max(length, module.chunk_edges(10_000, cfg.ttt_chunk_size)[2] + 24)
    found = [ids[a:min(b, a + length)].astype(np.int64) for a, b in zip(starts[:-1], starts[1:]) if b - a > 8]
    found = found[:max(2, documents // 4) if cfg.ngram_tilt_enabled else documents]
    if not found:
        raise AuditError("the validation stream holds no document of 8 tokens; another dataset is needed")
    if cfg.ngram_tilt_enabled:
        rng, originals = np.random.default_rng(seed), list(found)
        for _ in range(3):
            for original in originals:
                again = original.copy()
                hit = np.flatnonzero(rng.random(len(again)) < 1 / 24)
                again[hit[hit > 0]] = other_ids(module, again[hit[hit > 0]], cfg.vocab_size, rng)
                found.append(again)
    return np.concatenate(found)


def other_ids(module: ModuleType, ids: np.ndarray, vocab: int, rng: np.random.Generator) -> np.ndarray:
    """For each id another one, at random; BOS stays BOS, and nothing becomes BOS."""
    allowed = np.setdiff1d(np.arange(vocab), [module.BOS_ID])
    drawn = allowed[rng.integers(0, len(allowed) - 1, len(ids))]
    drawn = np.where(drawn == ids, allowed[-1], drawn)
    return np.where(ids == module.BOS_ID, ids, drawn)


# -- dynamic probes -------------------------------------------------------------------------------------


def largest(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference; infinite where one of them is not a number. 0 for nothing."""
    gap = np.abs(a - b)
    return float(np.where(np.isnan(gap), np.inf, gap).max(initial=0.0))


def has_learned(base: Outcome) -> np.ndarray:
    """[T] bool: whether the shared weights that scored a target are not those that scored the very first one."""
    begin = next(what[0] for kind, *what in base.timeline if kind == "nats")
    return base.shared != base.shared[begin[0]]


def choose(subject: Subject, base: Outcome, rng: np.random.Generator) -> list[int]:
    """Targets worth probing: in every state that there is, with hints that are right and wrong.

    The last one was scored by the state that has learned most.
    """
    targets = np.arange(len(base.nats))
    bos = subject.module.BOS_ID
    eligible = (subject.ids[1:] != bos) & (subject.ids[:-1] != bos) & ~np.isnan(base.first)
    eligible[-2:] = False  # something must follow
    opening = base.own[subject.starts[np.searchsorted(subject.starts, targets, side="right") - 1]]
    adapted, shared = base.own != opening, has_learned(base)
    kinds = [~adapted & ~shared, adapted & ~shared, shared & ~adapted, adapted & shared]
    if base.hints is not None:
        hinted, right = base.hints.betas.cpu().numpy() > 0, base.hints.ids.cpu().numpy() == subject.ids[1:]
        kinds += [hinted & right, hinted & ~right]
    found: list[int] = []
    for kind in kinds:
        some = np.setdiff1d(np.flatnonzero(kind & eligible), found)
        if len(some):
            found.append(int(rng.choice(some)))
    return sorted(found, key=lambda t: (adapted[t], shared[t], t))


def learned(base: Outcome, other: Outcome) -> np.ndarray:
    """Targets that were scored by another state in the other run."""
    return np.flatnonzero((base.shared != other.shared) | (base.own != other.own))


def undeclared(subject: Subject, base: Outcome, changed: int, targets: np.ndarray) -> list[int]:
    """Targets after `changed` whose state may not know it: the ledger has no update from it before their score."""
    ledger = subject.module.Ledger
    updates = base.events[base.events[:, 2] == ledger.UPDATE].tolist()
    scored = {}
    for phase, _, kind, _, begin, end in base.events.tolist():
        if kind == ledger.SCORE:
            scored.update(dict.fromkeys(range(begin, end), phase))
    found = []
    for s in targets[targets > changed].tolist():
        told = any(end > changed and (phase < scored.get(s, -1) if state == ledger.BASE
                                      else state == subject.document(s) and end <= s)
                   for phase, _, _, state, _, end in updates)
        if not told:
            found.append(s)
    return found


def probe_targets(subject: Subject, base: Outcome, positions: Sequence[int], rng: np.random.Generator
                  ) -> list[Finding]:
    """D2, D3, and D5 as far as it can be refuted from outside: replace single targets, look at everything else."""
    bos, ids = subject.module.BOS_ID, subject.ids
    earlier = state = full = spot = 0.0
    first_bad, untold, flips = "", set(), 0
    sums = []
    for number, t in enumerate(positions):
        own, truth = base.full[t], int(ids[t + 1])
        sums.append(float(np.exp(-own).sum()))
        hinted = base.hints is not None and float(base.hints.betas[t]) > 0
        likely = int(base.hints.ids[t] if hinted else own.argmin())
        values = [likely] if number % 2 == 0 and likely != truth else [int(rng.integers(2, len(own)))]
        values += [bos] if t == positions[-1] else []
        spot = max(spot, abs(own[truth] - base.nats[t]))
        for v in (v for v in values if v != truth):
            flipped = ids.copy()
            flipped[t + 1] = v
            other = subject.score(flipped, probes=[t])
            flips += 1
            slack = EXACT / LAYOUT if v == bos else 1.0  # a new document is batched otherwise
            gap = slack * largest(base.nats[:t], other.nats[:t])
            if gap > max(EXACT, earlier):
                first_bad = f" (target {t} -> id {v})"
            earlier = max(earlier, gap)
            full = max(full, slack * largest(own, other.full.get(t, np.full_like(own, np.nan))))
            spot = max(spot, slack * abs(own[v] - other.nats[t]))
            if v != bos:
                moved = learned(base, other)
                state += int((moved <= t).sum())
                untold.update(undeclared(subject, base, t, moved))
    worst = max(sums, key=lambda s: abs(s - 1))
    return [
        Finding("D2", "C1", earlier <= EXACT, f"flips={flips} max_change={earlier:.2g}",
                "a target's id changes the score of earlier ones: rulings A, D" + first_bad if earlier > EXACT else
                "earlier scores do not depend on a target's id"),
        Finding("D2", "C3", state == 0, f"flips={flips} states_changed={int(state)}",
                "weights or adapters had learned from a target when it was scored: rulings A, B, P" if state else
                "the state that scores a target does not know it"),
        Finding("D2", "C2", max(full, spot) <= EXACT, f"flips={flips} max_change={full:.2g} max_gap={spot:.2g}",
                "the distribution depends on which id comes true: rulings E, F" if max(full, spot) > EXACT else
                "the whole distribution stays when the target's id changes, and gives the reported scores"),
        Finding("D3", "C2", abs(worst - 1) <= 1e-4, f"targets={len(sums)} worst_sum={worst:.6f}",
                "the probabilities of all ids do not sum to 1: rulings E, F, G" if abs(worst - 1) > 1e-4 else
                "probabilities of all ids sum to 1"),
        Finding("D5", "C3", not untold, f"flips={flips} undeclared={len(untold)}",
                f"the ledger hides an update: target {min(untold)} was scored by a state that knew a later-declared one"
                if untold else "states learn from what the ledger says, and from nothing else"),
    ]


def probe_future(subject: Subject, base: Outcome, positions: Sequence[int], rng: np.random.Generator
                 ) -> list[Finding]:
    """D1: replace everything after a target; for the last one also with other ends of documents.

    There are as many documents as before, so that only the lengths of those that end after the target change.
    """
    bos, vocab = subject.module.BOS_ID, subject.cfg.vocab_size
    same = ends = 0.0
    moved = 0
    for t in positions:
        after = subject.ids.copy()
        after[t + 2:] = other_ids(subject.module, after[t + 2:], vocab, rng)
        other = subject.score(after)
        same = max(same, largest(base.nats[:t + 1], other.nats[:t + 1]))
        moved += int((learned(base, other) <= t).sum())
    tail = after[t + 2:]
    begins = int((tail == bos).sum())
    text = np.where(tail == bos, 2, tail)
    for first in (0, len(tail) - begins):  # the document ends at once, or nearly reaches the end of the stream
        text_and_ends = text.copy()
        text_and_ends[first:first + begins] = bos
        other = subject.score(np.concatenate([after[:t + 2], text_and_ends]))
        ends = max(ends, largest(base.nats[:t + 1], other.nats[:t + 1]))
    runs = f"flips={len(positions) + 2} "
    return [
        Finding("D1", "C1", same <= EXACT, runs + f"max_change={same:.2g}",
                "a score depends on later ids: rulings A, D, P" if same > EXACT else
                "scores do not depend on later ids"),
        Finding("D1", "C1", ends <= LAYOUT, runs + f"max_change={ends:.2g}",
                "a score depends on where its document ends" if ends > LAYOUT else
                "scores do not depend on where documents end later on"),
        Finding("D1", "C3", moved == 0, runs + f"states_changed={moved}",
                "weights or adapters had learned from later targets: rulings A, B, P" if moved else
                "the state that scores a target does not know later ones"),
    ]


def probe_documents(subject: Subject, base: Outcome, rng: np.random.Generator) -> list[Finding]:
    """D6: rewrite every second document. With all that learns across documents off, the others may not change; with
    it on, nothing may change before the first document that was rewritten."""
    alone = dict(ngram_tilt_enabled=False, phased_ttt_num_phases=0,
                 ttt="none" if subject.cfg.ttt == "sgd" else subject.cfg.ttt)
    plain, targets = subject.score(**alone), np.arange(len(base.nats))
    number = np.searchsorted(subject.starts, np.arange(len(subject.ids)), side="right") - 1
    rewritten = other_ids(subject.module, subject.ids, subject.cfg.vocab_size, rng)
    apart = 0.0
    for part in (0, 1):
        other = subject.score(np.where(number % 2 == part, rewritten, subject.ids), **alone)
        rest = targets[number[targets] % 2 != part]
        apart = max(apart, largest(plain.nats[rest], other.nats[rest]))
    half = len(subject.starts) // 2
    later = subject.score(np.where(number >= half, rewritten, subject.ids))
    before = largest(base.nats[:subject.starts[half]], later.nats[:subject.starts[half]])
    return [
        Finding("D6", "C1", apart <= EXACT, f"documents={len(subject.starts)} max_change={apart:.2g}",
                "a document's score depends on another one though nothing learns across them: rulings L, P"
                if apart > EXACT else "documents are scored apart where nothing learns across them"),
        Finding("D6", "C1", before <= EXACT, f"documents={half} max_change={before:.2g}",
                "a document's score depends on a later document: rulings A, P" if before > EXACT else
                "no document depends on a later one"),
    ]


def probe_states(subject: Subject, base: Outcome) -> Finding:
    """D4: between two scores a state changes only where the ledger has an update of it; no step goes unrecorded."""
    ledger = subject.module.Ledger
    last: dict[int, int] = {}
    fresh: set[int] = set()
    pending = steps = 0
    faults: Counter[str] = Counter()
    for kind, *what in base.timeline:
        if kind == "step":
            pending, steps = pending + 1, steps + 1
        elif kind == "note" and what[0] == ledger.UPDATE:
            fresh.update(what[1].tolist())
            pending = 0
        elif kind == "nats":
            faults["optimizer steps before a score without an entry"] += pending
            pending = 0
            states = {ledger.BASE: int(base.shared[what[0][0]])}
            states.update((subject.document(t), int(base.own[t])) for t in what[0].tolist())
            for state, now in states.items():
                if last.get(state, now) != now and state not in fresh:
                    faults["states changed without an entry"] += 1
                last[state] = now
            fresh -= set(states)
    text = "; ".join(f"{name}: {n}" for name, n in faults.items() if n)
    return Finding("D4", "C3", not text, f"steps={steps} states={len(last)}",
                   f"{text}: ruling A" if text else "scoring leaves every state as it was; every step is in the ledger")


def recheck(events: np.ndarray, starts: Sequence[int], num_targets: int, module: ModuleType) -> list[str]:
    """What is illegal about a ledger, target by target in plain loops; independent of the module's own check."""
    ledger, found = module.Ledger, set()
    when: dict[int, tuple[int, int]] = {}
    stops = [*starts[1:], num_targets]
    for phase, sequence, kind, state, begin, end in events.tolist():
        if state != ledger.BASE and not starts[state] <= begin <= end <= stops[state]:
            found.add("C1: adapters of one document reach into another")
        for t in range(begin, end) if kind == ledger.SCORE else ():
            if t in when:
                found.add("C4: a target is scored twice")
            when[t] = phase, sequence
    if len(when) != num_targets or any(t not in when for t in range(num_targets)):
        found.add("C4: targets are left out")
        return sorted(found)
    for phase, sequence, kind, state, begin, end in events.tolist():
        if kind == ledger.UPDATE and state == ledger.BASE:
            if any(when[t] > (phase, sequence) for t in range(begin, end)):
                found.add("C3: the shared weights learned from unscored targets")
            if any(when[t] > (phase, sequence) for t in range(end)):
                found.add("C1: an earlier target is scored by weights that know a later one")
        elif kind == ledger.UPDATE and any(when[t] >= (phase, sequence) for t in range(begin, end)):
            found.add("C3: adapters learned from unscored targets")
    own = sorted((phase, sequence, state, begin) for phase, sequence, kind, state, begin, _ in events.tolist()
                 if kind == ledger.SCORE and state != ledger.BASE)
    at: dict[int, int] = {}
    for _, _, state, begin in own:
        if begin < at.get(state, 0):
            found.add("C1: a document is scored backwards while its adapters learn")
        at[state] = begin
    return sorted(found)


def probe_ledger(subject: Subject, base: Outcome) -> list[Finding]:
    """D5: the ledger's own verdict, ours, and whether its scores are those that the scorer first gave."""
    targets = len(base.nats)
    theirs = subject.module.violations(base.events, subject.starts, targets)
    theirs += [base.refusal] if base.refusal and base.refusal not in "; ".join(theirs) else []
    ours = recheck(base.events, subject.starts.tolist(), targets, subject.module)
    unseen = int(np.isnan(base.first).sum())
    other = int((np.abs(base.nats - base.first) > 1e-6).sum())
    times = Counter(t for kind, *what in base.timeline if kind == "note" and what[0] == subject.module.Ledger.SCORE
                    for b, e in zip(what[2].tolist(), what[3].tolist()) for t in range(b, e))
    once = len(times) == targets and set(times.values()) == {1}
    conditions = {c: [m for m in (*theirs, *ours) if m.startswith(c)] for c in ("C1", "C3", "C4")}
    conditions["C4"] += [m for m in theirs if not m.startswith(("C1", "C3", "C4"))]
    figures = f"events={len(base.events)} targets={targets}"
    findings = [Finding("D5", c, not found, figures, "; ".join(found) or
                        {"C1": "one order for all states", "C3": "updates come from scored targets",
                         "C4": "each target is entered once"}[c]) for c, found in conditions.items()]
    bad = unseen or other or not once
    findings.append(Finding("D5", "C4", not bad, f"never_scored={unseen} rescored={other}",
                            "targets are left out, or scored again and the better score kept: ruling B" if bad else
                            "the ledger holds the first score of every target"))
    return findings


def probe_replay(subject: Subject, before: Outcome, base: Outcome) -> list[Finding]:
    """D7: two runs, and a third with one row in each batch."""
    again = largest(base.nats, before.nats)
    layout = largest(base.nats, subject.score(ttt_batch_size=1, val_batch_tokens=8 * subject.cfg.eval_seq_len).nats)
    return [
        Finding("D7", "C4", again <= EXACT, f"max_change={again:.2g}",
                "a second run gives other scores" if again > EXACT else "a second run gives the same scores"),
        Finding("D7", "C4", layout <= LAYOUT, f"max_change={layout:.2g}",
                "scores depend on which documents share a batch: ruling P" if layout > LAYOUT else
                "scores do not depend on the batch"),
    ]


@torch.no_grad()
def probe_reference(subject: Subject) -> Finding:
    """D8: nats of fixed weights against one document at a time in float32, from the logits up."""
    m, cfg = subject.module, subject.cfg
    found = subject.score(ttt="none", ngram_tilt_enabled=False).nats
    model = subject.make_model()
    w, plan = m.Weights(model, torch.float32), m.layer_plan(model.cfg, looped=True)
    worst, count = 0.0, 0
    for begin, end in zip(subject.starts.tolist(), [*subject.starts[1:].tolist(), len(found)]):
        end = min(end, begin + cfg.eval_seq_len)  # later targets have windows of their own
        if end == begin:
            continue
        row = subject.ids[begin:end + 1].astype(np.uint16)
        hidden = model.hidden(m.make_batch([row], 1, end - begin).to(subject.run.device), plan, w)[0]
        logits = model.cfg.logit_softcap * torch.tanh(w.linear("head", None, hidden).double() / model.cfg.logit_softcap)
        targets = torch.from_numpy(subject.ids[begin + 1:end + 1]).to(logits.device)
        expected = -torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]
        worst, count = max(worst, largest(found[begin:end], expected.cpu().numpy())), count + end - begin
    limit = 1e-4 if subject.run.dtype == torch.float32 else 0.2
    return Finding("D8", "C2", worst <= limit, f"targets={count} max_gap={worst:.2g}",
                   "nats differ from those of each document by itself: rulings E, L" if worst > limit else
                   "nats equal those of each document by itself")


def probe_bytes(module: ModuleType, tokenizer: Path, ids: np.ndarray, vocab: int) -> Finding:
    """D8: bytes of every document's targets against its decoded text."""
    from sentencepiece import SentencePieceProcessor
    sp = SentencePieceProcessor(model_file=str(tokenizer))
    counted = module.TokenBytes.load(tokenizer, vocab).of_targets(ids)
    starts = np.flatnonzero(ids == module.BOS_ID)
    bad, total, expected_total = 0, 0, 0
    for begin, end in zip(starts.tolist(), [*starts[1:].tolist(), len(ids)]):
        text = spelled(sp, ids[begin + 1:end].tolist())
        if text is None:
            continue
        with contextlib.suppress(UnicodeDecodeError):  # a document that is cut inside a character
            bad += text.decode().lstrip(" ") != sp.decode(ids[begin + 1:end].tolist()).lstrip(" ")
        found = int(counted[begin:end].sum())  # the last one is the next BOS, or nothing
        bad += found != len(text)
        total, expected_total = total + found, expected_total + len(text)
    return Finding("D8", "accounting", not bad, f"bytes={total} expected={expected_total}",
                   "bytes of the targets are not those of the text: ruling O" if bad else
                   "bytes of the targets are those of the text")


def naive_hints(ids: Sequence[int], cfg: Any, module: ModuleType) -> tuple[list[int], list[float]]:
    """Hint and strength of every target by dictionaries, one target after the other."""
    rules = sorted(module.ngram_rules(cfg.ngram_rules), reverse=True)
    seen: dict[tuple[int, ...], Counter[int]] = {}
    leader: dict[tuple[int, ...], int] = {}
    hints, betas = [], []
    for t in range(len(ids) - 1):
        hint, beta = 0, 0.0
        for length, least_share, least_count in rules:
            context = tuple(ids[t + 1 - length:t + 1]) if length <= t + 1 else ()
            counts = seen.get(context)
            if counts is None or sum(counts.values()) < least_count:
                continue
            share = np.float32(counts[leader[context]]) / np.float32(sum(counts.values()))
            if share >= np.float32(least_share):
                hint, beta = leader[context], cfg.ngram_base_beta * (share if cfg.ngram_beta_by_share else 1.0)
                break
        hints.append(hint)
        betas.append(float(beta))
        for length in {rule[0] for rule in rules if rule[0] <= t + 1}:  # the target is known from here on
            context, target = tuple(ids[t + 1 - length:t + 1]), ids[t + 1]
            counts = seen.setdefault(context, Counter())
            counts[target] += 1
            if counts[target] > counts.get(leader.get(context, -1), 0):
                leader[context] = target
    return hints, betas


def probe_hints(subject: Subject, base: Outcome) -> Finding:
    """D9 for exact counts: there are no tables to shrink, so the hints are compared with plain dictionaries."""
    hints, betas = naive_hints(subject.ids.tolist(), subject.cfg, subject.module)
    got_ids, got = base.hints.ids.cpu().numpy(), base.hints.betas.cpu().numpy()
    live = (np.array(betas) > 0) | (got > 0)
    bad = int(((np.abs(got - betas) > 1e-5) | ((got_ids != hints) & live)).sum())
    return Finding("D9", "C1", not bad, f"hints={int(live.sum())} wrong={bad}",
                   "a hint is not what the ids before its target say: rulings E, F" if bad else
                   "hints are those of plain dictionaries over the ids before the target")


def audit(subject: Subject, seed: int = 0) -> list[Finding]:
    """Every dynamic probe of one subject; `seed` chooses positions and ids. Raises `AuditError` without a target."""
    rng = np.random.default_rng(seed)
    before = subject.score()
    positions = choose(subject, before, rng)
    if not positions:
        raise AuditError(f"a stream of {len(subject.ids)} ids has no target to probe; give longer documents")
    base = subject.score(probes=positions)
    shared = np.flatnonzero(has_learned(base)[:-2])
    turns = {positions[0], positions[-1], *shared[:1].tolist()} - {positions[-1]}
    findings = probe_future(subject, base, [*sorted(turns), positions[-1]], rng)
    findings += probe_targets(subject, base, positions, rng)
    findings += [probe_states(subject, base), *probe_ledger(subject, base), *probe_documents(subject, base, rng),
                 *probe_replay(subject, before, base), probe_reference(subject)]
    if subject.cfg.ngram_tilt_enabled:
        findings.append(probe_hints(subject, base))
    if subject.tokenizer is not None:
        findings.append(probe_bytes(subject.module, subject.tokenizer, subject.ids, subject.cfg.vocab_size))
    return findings


# -- rehearsal: who reads which data when ---------------------------------------------------------------


def rehearsal_config(module: ModuleType, cfg: Any, folder: Path, tokenizer: Path | None) -> Any:
    """The run's knobs around a model of a few thousand parameters and one step on the data in `folder`."""
    return dataclasses.replace(
        cfg, data_path=str(folder), tokenizer_path=str(tokenizer or ""), log_dir=str(folder), artifact_dir="",
        run_id="rehearsal", eval_only="", num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, num_loops=0,
        parallel_start_layer=1, rope_dims=8, gate_window=8, bigram_buckets=min(cfg.bigram_buckets, 16), iterations=1,
        max_wallclock_seconds=0.0, warmup_steps=0, train_seq_len=32, train_batch_tokens=64, micro_batch_tokens=64,
        gptq_calibration_batches=1, eval_seq_len=32, eval_stride=min(cfg.eval_stride, 16), eval_ladder="",
        val_loss_every=min(cfg.val_loss_every, 1), phased_ttt_num_phases=min(cfg.phased_ttt_num_phases, 1),
        ttt_freeze_blocks=0, prequant_ttt_freeze_blocks=0, prequant_ttt_epochs=min(cfg.prequant_ttt_epochs, 1),
        ttt_lora_rank=min(cfg.ttt_lora_rank, 4), ttt_chunk_size="16", dtype="float32", device="cpu", threads=1,
        compile="off")


def rehearse(module: ModuleType, cfg: Any, ids: np.ndarray, tokenizer: Path | None) -> list[Finding]:
    """A2: train, pack and judge in miniature, and see which tokens are read in which phase.

    ids [N] are written as training and as validation shards. The validation's tokens may be read only after
    `write_artifact` has begun, training's only before that and, once training has started, on its clock.
    """
    sys.path.append(str(ROOT))
    from bench.common import write_shard  # the format is the challenge's, whatever the module under audit is
    reads: list[tuple[str, str]] = []
    open_phases: list[tuple[str, str]] = []
    frozen = trained = False

    class Stream(module.TokenStream):
        def __init__(self, folder: Path, prefix: str) -> None:
            super().__init__(folder, prefix)
            self.prefix = prefix

        def see(self) -> None:
            name, budget = open_phases[-1] if open_phases else ("no phase", "none")
            if self.prefix.startswith("fineweb_val") and not frozen:
                reads.append(("C3", f"validation tokens read in {name}, before the artifact was written: "
                              f"rulings A, C, H"))
            if self.prefix == "fineweb_train" and (frozen or (trained and budget != "train")):
                reads.append(("accounting", f"training tokens read in {name}, off the training clock: ruling H"))

        def read(self, start: int, stop: int) -> np.ndarray:
            self.see()
            return super().read(start, stop)

        def document_starts(self) -> np.ndarray:
            self.see()
            return super().document_starts()

    class Rehearsal(module.Run):
        def write(self, line: str) -> None:
            """Nothing on screen."""

        @contextlib.contextmanager
        def phase(self, name: str, budget: str = "none") -> Iterator[None]:
            nonlocal trained
            trained = trained or budget == "train"
            open_phases.append((name, budget))
            try:
                with super().phase(name, budget):
                    yield
            finally:
                open_phases.pop()

    def freeze(*arguments: Any) -> bytes:
        nonlocal frozen
        blob = write_artifact(*arguments)
        frozen = True
        return blob

    write_artifact = module.write_artifact
    originals = module.TokenStream, write_artifact
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repeats = -(-256 // len(ids))
        write_shard(folder / "fineweb_train_000000.bin", np.tile(ids, repeats))
        write_shard(folder / "fineweb_val_000000.bin", ids)
        if cfg.caseops_enabled:
            write_shard(folder / "fineweb_val_bytes_000000.bin", np.ones(len(ids)))
        small = rehearsal_config(module, cfg, folder, tokenizer)
        module.TokenStream, module.write_artifact = Stream, freeze
        try:
            with Rehearsal(small, {}) as run, contextlib.redirect_stdout(io.StringIO()):
                model = module.build_model(small, run)
                blob, figures = module.produce(small, run, model, 0)
                module.judge(blob, model, small, run, 0, figures)
        finally:
            module.TokenStream, module.write_artifact = originals
    mark = module.unpack(blob).illegal
    findings = []
    for condition, good in (("C3", "validation tokens are read after the artifact is written"),
                            ("accounting", "training tokens are read on the training clock alone")):
        bad = list(dict.fromkeys(text for c, text in reads if c == condition))
        findings.append(Finding("A2", condition, not bad, f"reads_out_of_turn={sum(c == condition for c, _ in reads)}",
                                "; ".join(bad[:2]) or good))
    if mark:
        findings.append(Finding("A2", "C3", False, "illegal=1", f"the artifact says so itself: {mark}"))
    return findings


def artifact_subject(path: Path, env: Mapping[str, str]) -> tuple[Subject, Any]:
    """(subject, config of the run) of an artifact on the dataset of its knobs; `UserError` as the script's own."""
    env = dict(env)
    script = Path(env.pop("SCRIPT", ROOT / "train_gpt.py"))
    module = load_module(script)
    blob = path.read_bytes()
    artifact = module.unpack(blob, str(path))
    stored = {**dataclasses.asdict(artifact.model), "preset": artifact.preset}
    cfg = module.Config.from_env({"DEVICE": "cpu", "DTYPE": "float32", "COMPILE": "off", **env}, stored)[0]
    stream = module.TokenStream(cfg.dataset_dir, "fineweb_val")
    ids = stream.read(0, min(len(stream), 1 << 20)).astype(np.int64)
    tokenizer = None if cfg.caseops_enabled else module.tokenizer_path(cfg)
    model = module.GPT(artifact.model)
    module.load_tensors(model, artifact.tensors)

    def make_model() -> Any:
        fresh = copy.deepcopy(model).to(subject.run.device)
        fresh.kernels = module.pick_kernels(cfg, subject.run)
        return fresh

    subject = Subject(module, cfg, piece_of_stream(module, cfg, ids), make_model, tokenizer)
    return subject, cfg


def main(arguments: Sequence[str]) -> int:
    """Exit status 0: nothing refuted, 1: a probe failed, 2: the audit could not be made."""
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(__doc__)
            return 0 if arguments else 2
        if arguments[0] == "--static":
            return static_main(arguments[1:])
        path, given = Path(arguments[0]), pairs(arguments[1:])
        if not path.is_file():
            raise AuditError(f"{path}: no such artifact; give a .bin that a run has written")
        log = given.pop("LOG", "")
        knobs = {name: value for name, value in os.environ.items() if name != "SCRIPT"}
        subject, cfg = artifact_subject(path, {**knobs, **typed(given)})
        findings = audit(subject) + rehearse(subject.module, cfg, subject.ids, subject.tokenizer)
        if log:
            findings += readable(log, audit_log, find_log(log, log_folder()), path.stat().st_size)
        print(table(findings))
        return failed(findings)
    except (InputError, OSError) as error:
        print(f"audit.py: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if "UserError" not in (kind.__name__ for kind in type(error).__mro__):  # of whichever module is audited
            raise
        print(f"audit.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
