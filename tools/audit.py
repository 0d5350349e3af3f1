"""Audits a submission: does its score obey the conditions C1..C4 and the accounting rules? Each probe tries to refute.

    python -m tools.audit ARTIFACT [KNOB=value ...] [LOG=logs/<run_id>.jsonl] [SCRIPT=train_gpt.py]
    python -m tools.audit --static FOLDER_OR_SCRIPT [TOKENIZER=file.model] [DATA_PATH=folder]

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
from unittest import mock

from tools.common import ToolError, program
from tools.evidence import ROOT, Finding, audit_log, failed, finding, load_module, spelled, static_main, table
from tools.knobs import typed_text
from tools.logs import find_log, log_folder, pairs, readable

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
    """Return [rows] int64 checksums of the bits of tensors whose first axis is split into `rows`."""
    total = torch.zeros(rows, dtype=torch.int64)
    for t in tensors:
        bits = t.detach().contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32)
        total = total * 1_000_003 + bits.reshape(rows, -1).sum(1, dtype=torch.int64).cpu()
    return total


def watching(module: ModuleType) -> type:
    """Return a subclass of the module's `Scorer` that records which state scored what, and when."""

    class Watch(module.Scorer):
        def __init__(self, val: Any, cfg: Any, run: Any, hints: Any, probes: Sequence[int]) -> None:
            super().__init__(val, cfg, run, hints)
            targets = val.num_targets
            self.first = np.full(targets, np.nan)
            self.shared, self.own = np.zeros(targets, dtype=np.int64), np.zeros(targets, dtype=np.int64)
            self.timeline: list[tuple] = []
            self.full: dict[int, np.ndarray] = {}
            self.later: list[tuple[np.ndarray, np.ndarray, int, np.ndarray]] = []
            self.probes = list(probes)
            note = self.ledger.note

            def noted(kind: int, states: Any, begins: Any, ends: Any) -> None:
                self.timeline.append(("note", kind, *(np.atleast_1d(x) for x in (states, begins, ends))))
                note(kind, states, begins, ends)

            self.ledger.note = noted

        def nats(self, model: Any, hidden: Any, targets: Any, numbers: Any, w: Any) -> Any:
            out = super().nats(model, hidden, targets, numbers, w)
            flat, scores = numbers.flatten().cpu().numpy(), out[0].detach().flatten().double().cpu().numpy()
            real = np.flatnonzero((targets.flatten() != module.IGNORE).cpu().numpy())  # the rest is padding
            rows = hidden.size(0) if hidden.dim() == 3 else 1
            own_R = fingerprint(getattr(w, "parameters", []), rows)
            own = own_R.repeat_interleave(len(flat) // rows).numpy()
            shared = int(fingerprint([*w.matrices.values(), *model.parameters()]))
            unseen = np.isnan(self.first[flat[real]])
            again, new = real[~unseen], real[unseen]
            if len(again):
                self.later.append((flat[again], scores[again], shared, own[again]))
            if not len(new):
                return out
            at = flat[new]
            self.first[at], self.shared[at], self.own[at] = scores[new], shared, own[new]
            self.timeline.append(("nats", at))
            for i in new[np.isin(at, self.probes)]:
                self.full[int(flat[i])] = self.everything(model, hidden, int(i), int(flat[i]), w)
            return out

        def attribute(self) -> None:
            """Where a later call gave the ledger's score, its state is the one that counts."""
            entered = self.ledger.nats.double().numpy()
            for at, scores, shared, own in self.later:
                use = (np.abs(entered[at] - scores) <= 1e-6) & (np.abs(entered[at] - self.first[at]) > 1e-6)
                self.shared[at[use]], self.own[at[use]] = shared, own[use]

        @torch.no_grad()
        def everything(self, model: Any, hidden: Any, i: int, number: int, w: Any) -> np.ndarray:
            """Return [V] nats of every id as the target at flat position i."""
            vocab, parts = model.cfg.vocab_size, []
            r, c = divmod(i, hidden.size(-2)) if hidden.dim() == 3 else (0, i)
            spot = hidden[..., c:c + 1, :]
            for at in range(0, vocab, 512):
                ids = torch.arange(at, min(at + 512, vocab), device=hidden.device)
                shape = (*spot.shape[:-2], len(ids))
                scores = super().nats(model, spot.expand(*shape, -1), ids.expand(shape),
                                      torch.full(shape, number, device=hidden.device), w)[0]
                parts.append(scores.view(-1, len(ids))[r])
            return torch.cat(parts).double().cpu().numpy()

    return Watch


@contextlib.contextmanager
def counting_steps(timeline: list[tuple]) -> Iterator[None]:
    """Enter every step of any torch optimizer into the timeline, whatever the ledger says."""
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
        self.ends = np.append(self.starts[1:], len(self.ids) - 1)
        """Targets of document d: starts[d]..ends[d]-1."""
        self.watch = watching(module)

    def document(self, target: Any) -> Any:
        """Return the number of the document whose input predicts this target; of arrays, too."""
        return np.searchsorted(self.starts, target, side="right") - 1

    def score(self, ids: np.ndarray | None = None, probes: Sequence[int] = (), **knobs: Any) -> Outcome:
        """Run the production path once on `ids` (default: the stream) with some knobs replaced."""
        m, run = self.module, self.run
        ids = self.ids if ids is None else ids
        cfg = dataclasses.replace(self.cfg, **knobs)
        val = m.ValData(ids.astype(np.uint16), np.flatnonzero(ids == m.BOS_ID), np.ones(len(ids) - 1, dtype=np.int32))
        hints = m.ngram_hints(torch.from_numpy(ids).to(run.device), cfg) if cfg.ngram_base_beta else None
        model = self.make_model()
        scorer, refusal = self.watch(val, cfg, run, hints, probes), ""
        with counting_steps(scorer.timeline), run.phase("score", "eval"):
            try:
                m.adapted_score(model, scorer)
            except AssertionError as error:  # the program's own ledger objects: a finding, and the probes go on
                refusal = str(error)
        scorer.attribute()
        events = np.concatenate([np.empty((0, 6), dtype=np.int64), *scorer.ledger.events])
        return Outcome(scorer.ledger.nats.double().numpy(), scorer.shared, scorer.own, scorer.first, scorer.timeline,
                       events, scorer.full, hints, refusal)


def miniature(module: ModuleType, cfg: Any, ids: np.ndarray) -> Any:
    """Scale what counts documents or tokens in a run's knobs to a short stream; no clock decides anything."""
    documents, targets = int((ids == module.BOS_ID).sum()), len(ids) - 1
    prefix = max(1, min(cfg.phased_ttt_prefix_docs, documents - 2))
    return dataclasses.replace(
        cfg, phased_ttt_prefix_docs=prefix, phased_ttt_num_phases=min(cfg.phased_ttt_num_phases, prefix, 2),
        ttt_chunk_tokens=min(cfg.ttt_chunk_tokens, max(1, targets // 3)), eval_seconds_budget=1e9)


def piece_of_stream(module: ModuleType, cfg: Any, ids: np.ndarray, documents: int = 18, seed: int = 0) -> np.ndarray:
    """Cut a short stream [N] out of the first documents of `ids`, a few chunks of each.

    With the tilt on it holds each of fewer documents four times, slightly altered, so that contexts come back.
    """
    starts = np.append(np.flatnonzero(ids == module.BOS_ID), len(ids))
    length = 120
    if cfg.ttt == "lora":
        length = max(length, 2 * cfg.ttt_chunk_size + 24)
    pieces = [ids[a:min(b, a + length)].astype(np.int64) for a, b in zip(starts[:-1], starts[1:]) if b - a > 8]
    pieces = pieces[:max(2, documents // 4) if cfg.ngram_base_beta else documents]
    if not pieces:
        raise ToolError("the validation stream holds no document of 8 tokens; another dataset is needed")
    if cfg.ngram_base_beta:
        rng, originals = np.random.default_rng(seed), list(pieces)
        for original in 3 * originals:
            again = original.copy()
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


def has_learned(base: Outcome) -> np.ndarray:
    """Return [T] bool: whether the shared weights that scored a target are not those that scored the very first one."""
    begin = next(what[0] for kind, *what in base.timeline if kind == "nats")
    return base.shared != base.shared[begin[0]]


def choose(subject: Subject, base: Outcome, rng: np.random.Generator) -> list[int]:
    """Choose targets worth probing: in every state that there is, with hints that are right and wrong.

    The last one was scored by the state that has learned most.
    """
    targets = np.arange(len(base.nats))
    bos = subject.module.BOS_ID
    eligible = (subject.ids[1:] != bos) & (subject.ids[:-1] != bos) & ~np.isnan(base.first)
    eligible[-2:] = False  # something must follow
    adapted, shared = base.own != base.own[subject.starts[subject.document(targets)]], has_learned(base)
    kinds = [~adapted & ~shared, adapted & ~shared, shared & ~adapted, adapted & shared]
    if base.hints is not None:
        hinted, right = base.hints[1].cpu().numpy() > 0, base.hints[0].cpu().numpy() == subject.ids[1:]
        kinds += [hinted & right, hinted & ~right]
    chosen: list[int] = []
    for kind in kinds:
        some = np.setdiff1d(np.flatnonzero(kind & eligible), chosen)
        if len(some):
            chosen.append(int(rng.choice(some)))
    return sorted(chosen, key=lambda t: (adapted[t], shared[t], t))


def learned(base: Outcome, other: Outcome) -> np.ndarray:
    """Return the targets that were scored by another state in the other run."""
    return np.flatnonzero((base.shared != other.shared) | (base.own != other.own))


def undeclared(subject: Subject, base: Outcome, changed: int, targets: np.ndarray) -> list[int]:
    """Return the targets whose state knew `changed` though the ledger has no update from it before their score."""
    ledger = subject.module.Ledger
    scored, updates = {}, []
    for phase, _, kind, state, begin, end in base.events.tolist():
        if kind == ledger.SCORE:
            scored.update(dict.fromkeys(range(begin, end), phase))
        elif end > changed:
            updates.append((phase, state, end))

    def declared(target: int) -> bool:
        """Whether the shared weights learned in an earlier phase, or the document's adapters from earlier targets."""
        return any(phase < scored.get(target, -1) if state == ledger.BASE
                   else state == subject.document(target) and end <= target for phase, state, end in updates)

    return [target for target in targets[targets > changed].tolist() if not declared(target)]


def probe_targets(subject: Subject, base: Outcome, positions: Sequence[int], rng: np.random.Generator) -> list[Finding]:
    """D2, D3, and D5 as far as it can be refuted from outside: replace single targets, look at everything else."""
    bos, ids = subject.module.BOS_ID, subject.ids
    earlier = full = spot = 0.0
    first_bad, hidden, flips, states = "", set(), 0, 0
    sums = []
    for number, t in enumerate(positions):
        own, truth = base.full[t], int(ids[t + 1])
        sums.append(float(np.exp(-own).sum()))
        hinted = base.hints is not None and float(base.hints[1][t]) > 0
        likely = int(base.hints[0][t] if hinted else own.argmin())
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
                states += int((moved <= t).sum())
                hidden.update(undeclared(subject, base, t, moved))
    worst, flipped_text = max(sums, key=lambda s: abs(s - 1)), f"flips={flips}"
    return [finding("D2", "C1", earlier <= EXACT, f"{flipped_text} max_change={earlier:.2g}",
                    "a target's id changes the score of earlier ones: rulings A, D" + first_bad,
                    "earlier scores do not depend on a target's id"),
            finding("D2", "C3", not states, f"{flipped_text} states_changed={states}",
                    "weights or adapters had learned from a target when it was scored: rulings A, B, P",
                    "the state that scores a target does not know it"),
            finding("D2", "C2", max(full, spot) <= EXACT, f"{flipped_text} max_change={full:.2g} max_gap={spot:.2g}",
                    "the distribution depends on which id comes true: rulings E, F",
                    "the whole distribution stays when the target's id changes, and gives the reported scores"),
            finding("D3", "C2", abs(worst - 1) <= 1e-4, f"targets={len(sums)} worst_sum={worst:.6f}",
                    "the probabilities of all ids do not sum to 1: rulings E, F, G",
                    "probabilities of all ids sum to 1"),
            finding("D5", "C3", not hidden, f"{flipped_text} undeclared={len(hidden)}",
                    f"the ledger hides an update: target {min(hidden, default=0)} was scored by a state that knew a "
                    f"later-declared one", "states learn from what the ledger says, and from nothing else")]


def probe_future(subject: Subject, base: Outcome, positions: Sequence[int], rng: np.random.Generator) -> list[Finding]:
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
    for first in (0, len(tail) - begins):  # the document ends at once, or nearly reaches the end of the stream
        text = np.where(tail == bos, 2, tail)
        text[first:first + begins] = bos
        other = subject.score(np.concatenate([after[:t + 2], text]))
        ends = max(ends, largest(base.nats[:t + 1], other.nats[:t + 1]))
    flips = f"flips={len(positions) + 2}"
    return [finding("D1", "C1", same <= EXACT, f"{flips} max_change={same:.2g}",
                    "a score depends on later ids: rulings A, D, P", "scores do not depend on later ids"),
            finding("D1", "C1", ends <= LAYOUT, f"{flips} max_change={ends:.2g}",
                    "a score depends on where its document ends",
                    "scores do not depend on where documents end later on"),
            finding("D1", "C3", not moved, f"{flips} states_changed={moved}",
                    "weights or adapters had learned from later targets: rulings A, B, P",
                    "the state that scores a target does not know later ones")]


def probe_documents(subject: Subject, base: Outcome, rng: np.random.Generator) -> list[Finding]:
    """D6: rewrite every second document. With all that learns across documents off, the others may not change; with
    it on, nothing may change before the first document that was rewritten."""
    alone = dict(ngram_base_beta=0.0, phased_ttt_num_phases=0,
                 ttt="none" if subject.cfg.ttt == "sgd" else subject.cfg.ttt)
    plain, number = subject.score(**alone), subject.document(np.arange(len(subject.ids)))
    rewritten = other_ids(subject.module, subject.ids, subject.cfg.vocab_size, rng)
    apart = 0.0
    for part in (0, 1):
        other = subject.score(np.where(number % 2 == part, rewritten, subject.ids), **alone)
        rest = number[:-1] % 2 != part
        apart = max(apart, largest(plain.nats[rest], other.nats[rest]))
    half = len(subject.starts) // 2
    later = subject.score(np.where(number >= half, rewritten, subject.ids))
    before = largest(base.nats[:subject.starts[half]], later.nats[:subject.starts[half]])
    return [finding("D6", "C1", apart <= EXACT, f"documents={len(subject.starts)} max_change={apart:.2g}",
                    "a document's score depends on another one though nothing learns across them: rulings L, P",
                    "documents are scored apart where nothing learns across them"),
            finding("D6", "C1", before <= EXACT, f"documents={half} max_change={before:.2g}",
                    "a document's score depends on a later document: rulings A, P",
                    "no document depends on a later one")]


def probe_states(subject: Subject, base: Outcome) -> list[Finding]:
    """D4: between two scores a state changes only where the ledger has an update of it; no step goes unrecorded."""
    ledger = subject.module.Ledger
    seen: dict[int, int] = {}
    updated: set[int] = set()
    pending = steps = 0
    faults: Counter[str] = Counter()
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
    return [finding("D4", "C3", not text, f"steps={steps} states={len(seen)}", f"{text}: ruling A",
                    "scoring leaves every state as it was; every step is in the ledger")]


def recheck(events: np.ndarray, starts: Sequence[int], num_targets: int, module: ModuleType) -> list[str]:
    """Say what is illegal about a ledger, target by target in plain loops; independent of the module's own check."""
    ledger, faults = module.Ledger, set()
    when: dict[int, tuple[int, int]] = {}
    stops = [*starts[1:], num_targets]
    for phase, sequence, kind, state, begin, end in events.tolist():
        if state != ledger.BASE and not starts[state] <= begin <= end <= stops[state]:
            faults.add("C1: adapters of one document reach into another")
        for t in range(begin, end) if kind == ledger.SCORE else ():
            if t in when:
                faults.add("C4: a target is scored twice")
            when[t] = phase, sequence
    if set(when) != set(range(num_targets)):
        return sorted({*faults, "C4: targets are left out"})
    for phase, sequence, kind, state, begin, end in events.tolist():
        now = phase, sequence
        if kind == ledger.UPDATE and state == ledger.BASE:
            if any(when[t] > now for t in range(begin, end)):
                faults.add("C3: the shared weights learned from unscored targets")
            if any(when[t] > now for t in range(end)):
                faults.add("C1: an earlier target is scored by weights that know a later one")
        elif kind == ledger.UPDATE and any(when[t] >= now for t in range(begin, end)):
            faults.add("C3: adapters learned from unscored targets")
    at: dict[int, int] = {}
    for _, _, state, begin in sorted((phase, sequence, state, begin) for phase, sequence, kind, state, begin, _ in
                                     events.tolist() if kind == ledger.SCORE and state != ledger.BASE):
        if begin < at.get(state, 0):
            faults.add("C1: a document is scored backwards while its adapters learn")
        at[state] = begin
    return sorted(faults)


def probe_ledger(subject: Subject, base: Outcome) -> list[Finding]:
    """D5: the ledger's own verdict, ours, and whether its scores are those that the scorer first gave."""
    ledger, targets = subject.module.Ledger, len(base.nats)
    faults = list(subject.module.violations(base.events, subject.starts, targets))
    if base.refusal and base.refusal not in "; ".join(faults):
        faults.append(base.refusal)
    faults = [fault if fault.startswith(("C1", "C3", "C4")) else f"C4: {fault}" for fault in faults]
    faults += recheck(base.events, subject.starts.tolist(), targets, subject.module)
    unseen = int(np.isnan(base.first).sum())
    rescored = int((np.abs(base.nats - base.first) > 1e-6).sum())
    times = Counter(t for kind, *what in base.timeline if kind == "note" and what[0] == ledger.SCORE
                    for b, e in zip(what[2].tolist(), what[3].tolist()) for t in range(b, e))
    once = len(times) == targets and set(times.values()) == {1}
    own = {condition: [fault for fault in faults if fault.startswith(condition)] for condition in ("C1", "C3", "C4")}
    figures = f"events={len(base.events)} targets={targets}"
    return [finding("D5", "C1", not own["C1"], figures, "; ".join(own["C1"]), "one order for all states"),
            finding("D5", "C3", not own["C3"], figures, "; ".join(own["C3"]), "updates come from scored targets"),
            finding("D5", "C4", not own["C4"], figures, "; ".join(own["C4"]), "each target is entered once"),
            finding("D5", "C4", once and not unseen and not rescored, f"never_scored={unseen} rescored={rescored}",
                    "targets are left out, or scored again and the better score taken: ruling B",
                    "the ledger holds the first score of every target")]


def probe_replay(subject: Subject, before: Outcome, base: Outcome) -> list[Finding]:
    """D7: two runs, and a third with one row in each batch."""
    again = largest(base.nats, before.nats)
    layout = largest(base.nats, subject.score(ttt_batch_size=1, val_batch_tokens=8 * subject.cfg.eval_seq_len).nats)
    return [finding("D7", "C4", again <= EXACT, f"max_change={again:.2g}", "a second run gives other scores",
                    "a second run gives the same scores"),
            finding("D7", "C4", layout <= LAYOUT, f"max_change={layout:.2g}",
                    "scores depend on which documents share a batch: ruling P", "scores do not depend on the batch")]


@torch.no_grad()
def probe_reference(subject: Subject) -> list[Finding]:
    """D8: nats of fixed weights against one document at a time in float32, from the logits up."""
    m, cfg = subject.module, subject.cfg
    nats = subject.score(ttt="none", ngram_base_beta=0.0).nats
    model = subject.make_model()
    w, layers = m.Weights(model, torch.float32), m.unroll_layers(model.cfg, looped=True)
    worst, count, cap = 0.0, 0, model.cfg.logit_softcap
    for begin, end in zip(subject.starts.tolist(), subject.ends.tolist()):
        end = min(end, begin + cfg.eval_seq_len)  # later targets have windows of their own
        if end == begin:
            continue
        row = subject.ids[begin:end + 1].astype(np.uint16)
        hidden = model(m.make_batch([row], 1, end - begin).to(subject.run.device), layers, w)[0]
        logits = cap * torch.tanh(w.linear("head", None, hidden).double() / cap)
        targets = torch.from_numpy(subject.ids[begin + 1:end + 1]).to(logits.device)
        expected = -torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]
        worst, count = max(worst, largest(nats[begin:end], expected.cpu().numpy())), count + end - begin
    most = 1e-4 if subject.run.dtype == torch.float32 else 0.2
    return [finding("D8", "C2", worst <= most, f"targets={count} max_gap={worst:.2g}",
                    "nats differ from those of each document by itself: rulings E, L",
                    "nats equal those of each document by itself")]


def probe_bytes(module: ModuleType, tokenizer: Path, ids: np.ndarray, vocab: int) -> list[Finding]:
    """D8: bytes of every document's targets against its decoded text."""
    from sentencepiece import SentencePieceProcessor
    sp = SentencePieceProcessor(model_file=str(tokenizer))
    sizes = module.TokenBytes.build(module.load_sentencepiece(tokenizer, vocab)).of_targets(ids)
    starts = np.flatnonzero(ids == module.BOS_ID)
    bad, total, expected = 0, 0, 0
    for begin, end in zip(starts.tolist(), [*starts[1:].tolist(), len(ids)]):
        text = spelled(sp, ids[begin + 1:end].tolist())
        if text is None:
            continue
        with contextlib.suppress(UnicodeDecodeError):  # a document that is cut inside a character
            bad += text.decode().lstrip(" ") != sp.decode(ids[begin + 1:end].tolist()).lstrip(" ")
        size = int(sizes[begin:end].sum())  # the last one is the next BOS, or nothing
        bad += size != len(text)
        total, expected = total + size, expected + len(text)
    return [finding("D8", "accounting", not bad, f"bytes={total} expected={expected}",
                    "bytes of the targets are not those of the text: ruling O",
                    "bytes of the targets are those of the text")]


def naive_hints(ids: Sequence[int], cfg: Any, module: ModuleType) -> tuple[list[int], list[float]]:
    """Return hint and strength of every target by dictionaries, one target after the other."""
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
        for length in {rule[0] for rule in rules if rule[0] <= t + 1}:  # the target counts from here on
            context, target = tuple(ids[t + 1 - length:t + 1]), ids[t + 1]
            counts = seen.setdefault(context, Counter())
            counts[target] += 1
            if counts[target] > counts.get(leader.get(context, -1), 0):
                leader[context] = target
    return hints, betas


def probe_hints(subject: Subject, base: Outcome) -> list[Finding]:
    """D9 for exact counts: there are no tables to shrink, so the hints are compared with plain dictionaries."""
    hints, betas = naive_hints(subject.ids.tolist(), subject.cfg, subject.module)
    own_hints, own_betas = base.hints[0].cpu().numpy(), base.hints[1].cpu().numpy()
    live = (np.array(betas) > 0) | (own_betas > 0)
    bad = int(((np.abs(own_betas - betas) > 1e-5) | ((own_hints != hints) & live)).sum())
    return [finding("D9", "C1", not bad, f"hints={int(live.sum())} wrong={bad}",
                    "a hint is not what the ids before its target say: rulings E, F",
                    "hints are those of plain dictionaries over the ids before the target")]


def audit(subject: Subject, seed: int = 0) -> list[Finding]:
    """Run every dynamic probe of one subject; `seed` chooses positions and ids. Raises `ToolError` without a target."""
    rng = np.random.default_rng(seed)
    before = subject.score()
    positions = choose(subject, before, rng)
    if not positions:
        raise ToolError(f"a stream of {len(subject.ids)} ids has no target to probe; give longer documents")
    base = subject.score(probes=positions)
    shared = np.flatnonzero(has_learned(base)[:-2])
    turns = {positions[0], *shared[:1].tolist()} - {positions[-1]}
    findings = probe_future(subject, base, [*sorted(turns), positions[-1]], rng)
    findings += probe_targets(subject, base, positions, rng)
    findings += probe_states(subject, base) + probe_ledger(subject, base) + probe_documents(subject, base, rng)
    findings += probe_replay(subject, before, base) + probe_reference(subject)
    if subject.cfg.ngram_base_beta:
        findings += probe_hints(subject, base)
    if subject.tokenizer is not None:
        findings += probe_bytes(subject.module, subject.tokenizer, subject.ids, subject.cfg.vocab_size)
    return findings


# -- rehearsal: who reads which data when ---------------------------------------------------------------


def rehearsal_knobs(cfg: Any, folder: Path, tokenizer: Path | None) -> dict[str, str]:
    """Return the run's knobs around a model of a few thousand parameters and one step on the data in `folder`."""
    small = dict(
        data_path=folder, tokenizer_path=tokenizer or "", log_dir=folder, run_id="rehearsal", eval_only="", resume="0",
        num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, num_loops=0, parallel_start_layer=1, rope_dims=8,
        bigram_buckets=min(cfg.bigram_buckets, 16), iterations=1, max_wallclock_seconds=0, warmup_steps=0,
        train_seq_len=32, train_batch_tokens=64, micro_batch_tokens=64, gptq_calibration_batches=1, eval_seq_len=32,
        eval_stride=min(cfg.eval_stride, 16), diagnostic_evals="", val_loss_every=min(cfg.val_loss_every, 1),
        phased_ttt_num_phases=min(cfg.phased_ttt_num_phases, 1), ttt_lora_rank=min(cfg.ttt_lora_rank, 4),
        ttt_chunk_size=16, dtype="float32", device="cpu", compile="off")
    return {name.upper(): typed_text(value) for name, value in {**dataclasses.asdict(cfg), **small}.items()}


def rehearse(module: ModuleType, cfg: Any, ids: np.ndarray, tokenizer: Path | None) -> list[Finding]:
    """A2: train, pack and score in miniature, and see which tokens are read in which phase.

    ids [N] are written as training and as validation shards. The validation's tokens may be read only after
    `fit_to_cap` has returned the artifact, training's only before that and, once training has started, on its clock.
    """
    from bench.common import write_shard  # the format is the challenge's, whatever the module under audit is
    faults: dict[str, list[str]] = {"C3": [], "accounting": []}
    open_phases = [("no phase", "none")]
    frozen = trained = False

    class Stream(module.TokenStream):
        def __init__(self, folder: Path, prefix: str) -> None:
            super().__init__(folder, prefix)
            self.prefix = prefix

        def see(self) -> None:
            name, budget = open_phases[-1]
            if self.prefix.startswith("fineweb_val") and not frozen:
                faults["C3"].append(f"validation tokens read in {name}, before the artifact was written: rulings A, C, "
                                    f"H")
            if self.prefix == "fineweb_train" and (frozen or (trained and budget != "train")):
                faults["accounting"].append(f"training tokens read in {name}, off the training clock: ruling H")

        def read(self, start: int, stop: int) -> np.ndarray:
            self.see()
            return super().read(start, stop)

        def document_starts(self) -> np.ndarray:
            self.see()
            return super().document_starts()

    class Rehearsal(module.Run):
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

    def freeze(*arguments: Any) -> Any:
        nonlocal frozen
        blob = fit_to_cap(*arguments)
        frozen = True
        return blob

    def fail(status: int) -> None:
        last_line = screen.getvalue().strip().rpartition("\n")[2]
        raise ToolError(f"the rehearsal ended with status {status}: {last_line}")

    fit_to_cap, screen = module.fit_to_cap, io.StringIO()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shard(folder / "fineweb_train_000000.bin", np.tile(ids, -(-256 // len(ids))))
        write_shard(folder / "fineweb_val_000000.bin", ids)
        if cfg.caseops_enabled:
            write_shard(folder / "fineweb_val_bytes_000000.bin", np.ones(len(ids)))
        with mock.patch.multiple(module, TokenStream=Stream, Run=Rehearsal, fit_to_cap=freeze), \
                mock.patch("os._exit", fail), \
                contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):  # a bug would end this process
            status = module.main([], rehearsal_knobs(cfg, folder, tokenizer))
        if status:
            fail(status)
    right = {"C3": "validation tokens are read after the artifact is written",
             "accounting": "training tokens are read on the training clock alone"}
    return [finding("A2", condition, not own, f"reads_out_of_turn={len(own)}", "; ".join([*dict.fromkeys(own)][:2]),
                    right[condition]) for condition, own in faults.items()]


def artifact_subject(path: Path, env: Mapping[str, str]) -> Subject:
    """Return the subject of an artifact, on the dataset of its knobs; the script's own `UserError` passes through."""
    env = dict(env)
    module = load_module(Path(env.pop("SCRIPT", ROOT / "train_gpt.py")))
    artifact = module.unpack(path.read_bytes(), str(path))
    cfg = module.Config.from_env({"DEVICE": "cpu", "DTYPE": "float32", "COMPILE": "off", **env}, artifact.knobs)
    cfg = module.on_its_data(cfg, artifact.validation, env)
    stream = module.TokenStream(cfg.dataset_dir, "fineweb_val")
    ids = stream.read(0, min(len(stream), 1 << 20)).astype(np.int64)
    model = module.GPT(artifact.model)
    module.load_tensors(model, artifact.tensors)

    def make_model() -> Any:
        fresh = copy.deepcopy(model).to(subject.run.device)
        fresh.kernels = module.pick_kernels(cfg, subject.run)
        return fresh

    tokenizer = None if cfg.caseops_enabled else module.tokenizer_path(cfg)
    subject = Subject(module, cfg, piece_of_stream(module, cfg, ids), make_model, tokenizer)
    return subject


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
    log = knobs.pop("LOG", "")
    environment = {name: value for name, value in os.environ.items() if name != "SCRIPT"}
    subject = artifact_subject(path, {**environment, **knobs})
    unknown = sorted(set(knobs) - {"SCRIPT"} - {name.upper() for name in subject.module.kinds(subject.module.Config)})
    if unknown:
        raise ToolError(f"{unknown[0]}={knobs[unknown[0]]}: no such knob; ./run.sh knobs lists them")
    findings = audit(subject) + rehearse(subject.module, subject.cfg, subject.ids, subject.tokenizer)
    if log:
        findings += readable(log, audit_log, find_log(log, log_folder()), path.stat().st_size)
    print(table(findings))
    return failed(findings)


if __name__ == "__main__":
    sys.exit(program(main, "audit.py"))
