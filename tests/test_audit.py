"""The auditor passes the program as it is and names what is wrong with a program that breaks one rule at a time."""
import base64
import bz2
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from conftest import ROOT, environment, tiny, write_shard

import train_gpt as tg
from data.caseops import TRANSFORMS
from records.pr1485_illegal import train_on_validation
from tools import audit, common, evidence
from tools.common import ToolError

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
VOCAB = 40

SMALL = dict(vocab_size=VOCAB, num_layers=2, num_loops=0, parallel_start_layer=1, eval_seq_len=16, eval_stride=8,
             train_seq_len=16, train_batch_tokens=64, micro_batch_tokens=64, ngram_base_beta=0,
             ngram_rules="1:0.3:1,2:0.5:1", ttt_chunk_size="8", ttt_lora_rank=4, ttt_lora_alpha=8, ttt_lora_lr=0.05,
             ttt_lora_on="q,o,head", phased_ttt_num_phases=2, phased_ttt_prefix_docs=4, global_ttt_lr=0.05,
             ttt_chunk_tokens=40, ttt_lr=0.05, ttt_epochs=1)
"""Two blocks, and learning rates so large that every leak shows."""

MODES = {"none": dict(ttt="none"), "tilt": dict(ttt="none", ngram_base_beta=2), "sgd": dict(ttt="sgd"),
         "lora": dict(ttt="lora", ttt_context="recompute"), "cache": dict(ttt="lora", ttt_context="cache"),
         "lora and tilt": dict(ttt="lora", ngram_base_beta=2)}
ALONE = dict(phased_ttt_num_phases=0)  # adapters learn, nothing shared does


def stream() -> np.ndarray:
    """Seven documents, of which two roll over several windows and chunks, and one is a single id; some ids never occur.
    Two begin as an earlier one does, so that hints come true."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, VOCAB - 4, n).tolist() for n in (6, 27, 9, 1, 14, 18, 9)]
    texts[4][:12], texts[6][:7] = texts[1][:12], texts[2][:7]
    return np.array([i for text in texts for i in (tg.BOS_ID, *text)])


def noisy(cfg: tg.Config) -> dict[str, tg.torch.Tensor]:
    """Weights with noise on every one, so that no zero hides a path."""
    tg.torch.manual_seed(0)
    return {name: values + 0.2 * tg.torch.randn_like(values) for name, values in tg.GPT(cfg).state_dict().items()}


def subject(module: object, **knobs: object) -> audit.Subject:
    """A noisy tiny model under that module's evaluation."""
    cfg = tiny(**{**SMALL, **knobs})
    if module is not tg:
        cfg = module.Config(**dataclasses.asdict(cfg))
        module.violations = lambda *_: []  # the auditor has to find it without the program's own check
    values = noisy(cfg)

    def make_model() -> object:
        model = module.GPT(cfg)
        model.load_state_dict(copy.deepcopy(values))
        return model

    return audit.Subject(module, cfg, stream(), make_model)


def failures(findings: list[evidence.Finding]) -> set[tuple[str, str]]:
    """(probe, condition) of all that failed."""
    return {(f.code, f.condition) for f in findings if f.failed}


# -- edits of the program's text -----------------------------------------------------------------------

MASK = "return ((back >= 0) & (back <= batch.positions[:, :, None]))[:, None]"
SCORED = "            scores[:, begin:end] = nats.view(-1, size)\n"
UPDATED = "                optimizer.step()\n"
SLOT = """
        with torch.enable_grad():
            delta = torch.zeros(logits.size(-1), requires_grad=True)
            loss = softcapped_cross_entropy(logits.detach() + delta, targets.flatten(), 30.0).mean()
            logits = logits - 0.5 * torch.autograd.grad(loss, delta)[0]"""
AGAIN = """
            if learns:
                (losses.view(-1, size) * torch.from_numpy(goes_on / size).to(losses)[:, None]).sum().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    hidden = model(inputs, layers, w, cache)[:, -size:]
                    first, (nats, losses) = nats, scorer.nats(model, hidden, rows.targets[:, begin:end],
                                                              rows.numbers[:, begin:end], w)
"""
"""A second look at a chunk, after a step on it, whose scores take the place of the first ones."""
CALIBRATE = 'with run.phase("calibrate", "train"):'

RETURNED, WRITTEN = "return nats.detach(), nats", "self.nats[targets] = nats.detach().float().cpu()"
TOTAL, COUNTED = "float(nats.double().sum())", "int(target_bytes.sum(dtype=np.int64))"
LOGITS, ELEMENTWISE = 'logits = w.linear("head", None, hidden).flatten(0, -2)', "    # Elementwise, so that"
RATE = "lr=cfg.ttt_lora_lr, "


# -- the program as it is, and honest variants of it ---------------------------------------------------

HONEST: dict[str, tuple] = {
    "none": ("none", []), "tilt": ("tilt", []), "sgd": ("sgd", []), "lora and tilt": ("lora and tilt", []),
    "adapters alone": ("lora", [], ALONE), "whole windows": ("none", [], dict(eval_stride=0)),
    "rows in another order": ("none", [("sorted(windows, key=lambda w: (w.begin - w.end, w.begin))",
                                        "sorted(windows, key=lambda w: w.begin)")]),
    "a temperature": ("none", [(LOGITS, f"{LOGITS}\n        logits = 0.9 * logits.double()")]),
    "plain SGD without clipping": ("sgd", [("            clip_([flat], flat.norm(), self.CLIP)\n", "")],
                                   dict(ttt_chunk_tokens=60)),
    "hints of the latest continuation": ("tilt", [("last_place(highest[1:] > h", "last_place(highest[1:] >= h")]),
    "strength by the model's confidence": ("tilt", [
        ("    return (nats + torch.log1p(p", "    betas = betas * (1 - p)\n    return (nats + torch.log1p(p")]),
}
"""Mode, edits and knobs: the same evaluation in other words, and other lawful evaluations."""


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_passes(name: str, plant):
    mode, edits, knobs = (*HONEST[name], {})[:3]
    findings = audit.audit(subject(plant(name, edits) if edits else tg, **{**MODES[mode], **knobs}))
    assert not failures(findings), evidence.table(findings)
    codes = {f.code for f in findings}
    assert codes == {"D1", "D2", "D3", "D4", "D5", "D6", "D7", "D8"} | ({"D9"} if "tilt" in mode else set()) or \
        not edits


def test_probes_look_where_something_was_learned():
    """Probed targets include states after adapters and shared weights learned, and hints right and wrong."""
    s = subject(tg, **MODES["lora and tilt"])
    base, positions = s.plain, s.positions
    assert len(np.unique(base.shared)) == 3 and len(np.unique(base.own)) > 8
    betas, hints = base.hints[1].numpy()[positions] > 0, base.hints[0].numpy()[positions]
    right = hints == s.ids[1:][positions]
    assert (betas & right).any() and (betas & ~right).any()
    assert (base.shared[positions] != base.shared[0]).any()
    assert (s.ends - s.starts).max() > s.cfg.eval_seq_len + s.cfg.eval_stride  # several windows


# -- programs that break a rule ------------------------------------------------------------------------


class Plant(NamedTuple):
    """A change of the program's text that breaks one ruling, and the condition that must be named."""
    mode: str
    edits: list[tuple[str, str]]
    expected: str
    knobs: dict[str, object] = {}


PLANTS = {
    "adapters learn before the score": Plant("lora", [
        (SCORED, AGAIN + SCORED)], "C3", ALONE),
    "shared weights learn before the score": Plant("sgd", [
        ("            score_windows(model, windows[cuts[c]:",
         "            sgd.learn(edges[c], edges[c + 1], cfg.ttt_lr)\n"
         "            score_windows(model, windows[cuts[c]:")], "C3"),
    "minimum over two passes": Plant("lora", [
        (SCORED, AGAIN + "                nats = torch.minimum(first, nats)\n" + SCORED)], "C4", ALONE),
    "a delta fitted to the window that is scored (SLOT)": Plant("none", [
        ('logits = w.linear("head", None, hidden).flatten(0, -2)',
         'logits = w.linear("head", None, hidden).flatten(0, -2)' + SLOT)], "C1"),
    "mass added to the hint alone": Plant("tilt", [
        ("(nats + torch.log1p(p * torch.expm1(betas)) - betas", "(nats - betas")], "C2"),
    "the lookup context holds the target": Plant("tilt", [
        ("return hints[:-1], betas[:-1]", "return hints[1:], betas[1:]")], "C2"),
    "hints counted from the whole stream": Plant("tilt", [
        ("highest[:-1])[(index - 1).clamp_min_(0)]", "highest[:-1])[(index + 1).clamp_max_(len(order) - 1)]")],
        "C1"),
    "smearing across documents": Plant("none", [
        ("(batch.positions > 0).unsqueeze(-1)", "(batch.positions >= 0).unsqueeze(-1)")], "P"),
    "attention to later ids": Plant("none", [
        (MASK, "return (back <= batch.positions[:, :, None])[:, None]")], "C1"),
    "keys and values of the documents before": Plant("cache", [
        ("cache, forward, compiles = KeyValueCache(cfg.eval_seq_len),",
         'cache, forward, compiles = globals().setdefault(f"past{len(batch.documents)}", '
         'KeyValueCache(cfg.eval_seq_len)),')],
        "P", ALONE),
    "the last chunk is not scored": Plant("lora", [
        ("    for begin, end in zip(batch.edges, batch.edges[1:]):\n",
         "    for begin, end in zip(batch.edges, batch.edges[1:-1]):\n")], "C4", ALONE),
    "the ledger tells less than was learned": Plant("sgd", [
        ("sgd.learn(edges[c], edges[c + 1], cfg.ttt_lr * cosine(c, count))",
         "sgd.learn(edges[c], min(2 * edges[c + 1], val.num_targets), cfg.ttt_lr * cosine(c, count))")], "C3"),
    "updates are not in the ledger": Plant("sgd", [
        ("scorer.ledger.note(Ledger.UPDATE, Ledger.BASE, begin, end)", "pass")], "C3"),
    "the ledger counts a target twice": Plant("none", [
        ("scorer.ledger.note(Ledger.SCORE, Ledger.BASE, firsts, ends)",
         "scorer.ledger.note(Ledger.SCORE, Ledger.BASE, firsts - (firsts > 0), ends)")], "C4"),
    "losses are clamped": Plant("none", [(RETURNED, "return nats.detach().clamp_max(3.0), nats")], "C2"),
    "the ledger clamps losses": Plant("none", [(WRITTEN, f"{WRITTEN}.clamp_max(3.0)")], "C4"),
    "special targets are left out": Plant("none", [
        (TOTAL, "float(nats.double()[target_bytes > 1].sum())")], "accounting"),
    "a temperature for each chunk": Plant("none", [
        (RETURNED, "return min((softcapped_cross_entropy(logits, targets, softcap * s) for s in (0.9, 1.0, 1.1)), "
                   "key=lambda x: float(x.sum())).detach(), nats")], "C1"),
    "hidden states see targets": Plant("none", [("        return rms_norm(x)\n\n    def total_loss",
        "        return rms_norm(x + 0.3 * self.tok_emb[batch.targets.clamp_min(0)])\n\n    def total_loss")], "C1"),
    "a rate by the score so far": Plant("cache", [
        (RATE, "lr=cfg.ttt_lora_lr * (1 + float(scorer.ledger.nats.mean())), ")], "P", ALONE),
    "the truth as a hint here and there": Plant("tilt", [
        ("return hints[:-1], betas[:-1]", "betas[3:-1:7], hints[3:-1:7] = cfg.ngram_base_beta, ids[4::7].int()\n"
                                          "    return hints[:-1], betas[:-1]")], "C1"),
    "a sum that is clamped": Plant("tilt", [(".clamp_max(1.0), betas", ".clamp_max(0.1), betas")], "C2"),
    "an update that is entered in advance": Plant("sgd", [
        ("        score(i)\n        if begin < end",
         "        scorer.ledger.note(Ledger.UPDATE, Ledger.BASE, begin, end)\n"
         "        score(i)\n        if begin < end")], "C4"),
    "weights are nudged while scoring": Plant("none", [
        (RETURNED, "model.q_gain.data.mul_(1.0001)\n            return nats.detach(), nats")], "C3"),
    "windows belong to the chunk of their end": Plant("sgd", [
        ("[window.first for window in windows]", "[window.end - 1 for window in windows]")], "C3"),
    "a mask that is off by one": Plant("cache", [
        ("return ((back >= 0) & (back < self.cache_len))", "return ((back >= -1) & (back < self.cache_len))")],
        "C1", ALONE),
    # missed at first sight, or by another condition's name
    "the last window reaches back": Plant("none", [(
        "Window(first - (seq_len - stride), stop, first)",
        "Window(max(begin, min(first, stop - seq_len)) if stop == end else first - (seq_len - stride), stop, first)")],
        "C1"),
    "short documents take two steps": Plant("cache", [(UPDATED, "                for _ in range(2 if rows.total "
        "<= 16 else 1):\n    " + UPDATED)], "C1", ALONE),
    "hints are weaker near the end of a document": Plant("tilt", [
        ("        hints, betas = (t[at].to(nats.device) for t in self.hints)\n", """
        hints, betas = (t[at] for t in self.hints)
        stops = np.repeat(self.val.stops, self.val.stops - self.val.starts)
        betas = betas * (torch.from_numpy(stops - np.arange(len(stops)))[at] / 8).clamp_max(1.0)
""")], "C1"),
    "adapters learn the next target, too": Plant("lora", [("                weight = (rows.sizes > end)", """
                ahead = F.pad(rows.targets, (0, 1), value=IGNORE)[:, begin + 1:end + 1].flatten()
                logits = w.linear("head", None, hidden).flatten(0, -2)
                losses = softcapped_cross_entropy(logits, ahead, model.cfg.logit_softcap)
                weight = (rows.sizes > end)""")], "C3", ALONE),
    "gradients are clipped over the batch": Plant("cache", [
        (UPDATED, "                torch.nn.utils.clip_grad_norm_(w.parameters, 1.0)\n" + UPDATED)], "P", ALONE),
    "every score is a thousandth better": Plant("none", [(RETURNED, "return nats.detach() - 0.001, nats")], "C2"),
    "no tilt where a document ends": Plant("tilt", [
        (".clamp_max(1.0), betas.double()", ".clamp_max(1.0), betas.double() * (targets != BOS_ID)")], "C2"),
    "mean of document means": Plant("none", [("    total, text_bytes = float(nats.double().sum()), ",
        "    own = [float(x.double().mean()) for x in nats.tensor_split(self.starts[1:].tolist()) if len(x)]\n"
        "        total, text_bytes = sum(own) / len(own) * len(nats), ")], "accounting"),
}


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory):
    """A function that returns the program with some of its text replaced."""
    folder = tmp_path_factory.mktemp("planted") / "tests"  # modules elsewhere are read for constants by hypothesis
    folder.mkdir()

    def planted(name: str, edits: list[tuple[str, str]]) -> ModuleType:
        source = SOURCE
        for old, new in edits:
            times = source.count(old)
            assert times == 1, (f"plant {name!r} cannot be set: train_gpt.py holds {old!r} {times} times, not once; "
                                f"adapt the plant in tests/test_audit.py to the new text")
            source = source.replace(old, new)
        path = folder / f"planted_{''.join(c if c.isalnum() else '_' for c in name)}.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # dataclasses look modules up
        spec.loader.exec_module(module)
        return module

    return planted


def first_named(name: str, edit: Plant, plant: Callable) -> None:
    """Look until the right condition (one of `a|b`) is named."""
    found = []
    for finding in audit.looks(subject(plant(name, edit.edits), **{**MODES[edit.mode], **edit.knobs})):
        found.append(finding)
        if finding.failed and finding.condition in edit.expected.split("|"):
            return
    pytest.fail(evidence.table(found))


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_violation_is_named(name: str, plant):
    first_named(name, PLANTS[name], plant)


# -- rehearsal: data in the right order ----------------------------------------------------------------

SCORE = "score, digest = adapted_score(model, scorer)\n"
VAL_FILE = 'np.fromfile(next(cfg.dataset_dir.glob("fineweb_val_0*")), dtype="<u2", offset=1024)'
REHEARSED = {
    "as it is": ([], set()), "as it is, with hints": ([], set(), dict(ngram_base_beta=2)),
    "calibrated on validation data": ([(CALIBRATE, CALIBRATE + "\n        data.starts = lambda _: range(9)\n        "
                                        'data.stream = TokenStream(cfg.dataset_dir, "fineweb_val")')], {"C3"}),
    "training data after the clock": ([(CALIBRATE, 'with run.phase("calibrate"):')], {"accounting"}),
    "training data while scoring": ([('        run.log("val_data"', "        TokenStream(cfg.dataset_dir, "
                                      '"fineweb_train").read(0, 9)\n        run.log("val_data"')], {"accounting"}),
    "the specimen of records/pr1485_illegal": ([], {"C3"}),
    # the third ten
    "the weights before quantization": ([(SCORE, SCORE.replace("model", "average or model"))], {"accounting"}),
    "hints off the clock": ([('with run.phase("ngram", "eval"):', 'with run.phase("ngram"):')], {"accounting"},
                            dict(ngram_base_beta=2)),
    "a side door to validation": ([(CALIBRATE, f"{CALIBRATE}\n        {VAL_FILE}")], {"C3"}),
    "a file beside the artifact": ([(SCORE, SCORE + '        (Path(cfg.log_dir).parent / "cache.txt").write_text("x")'
                                     "\n")], {"C1"}),
    "half of the time": ([("self.charged[self.budget] += now - self.charged_until",
                           "self.charged[self.budget] += 0.5 * (now - self.charged_until)")], {"accounting"}),
    "weights that know validation": ([("    blob, path = fit_to_cap(", "    with torch.no_grad():\n        "
        f"model.q_gain += 0.01 * float({VAL_FILE}.std())\n    blob, path = fit_to_cap(")], {"C3"}),
    "a verdict of its own": ([(SCORE, SCORE + "        score = score._replace(val_loss=0.99 * score.val_loss)\n")],
                             {"accounting"}),
    "controls have bytes": ([("base, space = np.zeros(n, dtype=np.int32)", "base, space = np.ones(n, dtype=np.int32)")],
                            {"accounting"}),
    "the space counted twice": ([('len(text.encode("utf-8"))', 'len(piece.replace("\\u2581", " ").encode("utf-8"))')],
                                {"accounting"}),
    "byte pieces as three bytes": ([("base[i] = 1 if", "base[i] = 3 if")], {"accounting"}),
    "spaces after BOS": ([(" & ~self.boundary[before])", ")")], {"accounting"}),
    "bytes of the inputs": ([("target = ids[:-1], ids[1:]", "target = np.roll(ids, 1)[:-1], ids[:-1]")],
                            {"accounting"}),
    "the side file is read one place early": ([("side[0].read(1, len(ids))", "side[0].read(0, len(ids) - 1)")],
                                              {"accounting"}, dict(caseops_enabled=True)),
    "shared learning off the clock": ([('"shared_sgd", "eval"', '"shared_sgd"')], {"accounting"}, dict(ttt="lora")),
    "the best of the diagnostics": ([(
        'for of in ("val_bpb", "val_loss", "tokens", "bytes")},',
        'for of in ("val_loss", "tokens", "bytes")}, val_bpb=min(score.val_bpb, *diagnostics.values()),')],
        {"accounting"}),
    "code is not counted": ([("artifact_bytes=len(blob) + code_bytes,\n", "artifact_bytes=len(blob),\n")],
                            {"accounting"}),
    "another program": ([(SCORE, SCORE + '        __import__("subprocess").run(["true"])\n')], {"accounting"}),
    "a stream cut short": ([("        ids = stream.read(0, len(stream))\n        target_bytes = side",
                             "        ids = stream.read(0, len(stream) // 32 * 32)\n        target_bytes = side")],
                           {"accounting"}),
}
"""Edits, the conditions that must be named, knobs."""


def real_ids(dataset: dict[str, str]) -> np.ndarray:
    """Five documents of text with everything that bytes are counted wrongly of."""
    sp = tg.load_sentencepiece(Path(dataset["tokenizer_path"]))
    return np.concatenate([[tg.BOS_ID, *[sp.piece_to_id("\u2581")] * (text[:1] == " "), *sp.encode(text)] for text in (
        "two  spaces and a caf\u00e9", "\u4e2d\u6587 \U0001f40d", " leading", "", "x" * 200)])


def rehearsed(module: ModuleType, ids: np.ndarray, dataset: dict[str, str], **knobs: object) -> list[evidence.Finding]:
    module.shipped_source = lambda _: b"x"  # it takes longer than all else
    cfg = tiny(**{**SMALL, "vocab_size": 512, "ttt": "none", **knobs, **dataset})
    return audit.rehearse(module, module.Config(**dataclasses.asdict(cfg)), ids, Path(dataset["tokenizer_path"]))


@pytest.mark.parametrize("name", REHEARSED)
def test_a_rehearsal_sees_who_reads_what_when(name: str, dataset: dict[str, str], plant, monkeypatch):
    edits, expected, knobs = (*REHEARSED[name], {})[:3]
    module = plant(name, edits)
    before = vars(module.TokenStream)["read"]
    if "specimen" in name:
        monkeypatch.setattr(train_on_validation, "EPOCHS", 1)
        train_on_validation.break_the_rule(module)
    findings = rehearsed(module, real_ids(dataset), dataset, **knobs)
    assert expected <= {f.condition for f in findings if f.failed}, evidence.table(findings)
    assert expected or not failures(findings), evidence.table(findings)
    assert vars(module.TokenStream)["read"] is before and not audit.WATCHERS  # nothing of the rehearsal stays behind


@pytest.mark.parametrize("edits, token, words", [
    ([], 5000, "status 2: train_gpt.py: "), ([(CALIBRATE, f"raise ValueError('broken')\n    {CALIBRATE}")], 5,
                                            "status 1: ValueError: broken")])
def test_a_rehearsal_that_fails_is_one_line(edits: list, token: int, words: str, dataset: dict[str, str], plant):
    """Ids outside the vocabulary; a bug, at which the trainer would end the process."""
    ids = np.where(np.arange(300) % 30, token, tg.BOS_ID)
    with pytest.raises(ToolError, match=f"the rehearsal ended with {words}"):
        rehearsed(plant(words, edits), ids, dataset)


# -- bytes ---------------------------------------------------------------------------------------------


def test_a_tokenizers_table_is_recounted(dataset: dict[str, str], monkeypatch: pytest.MonkeyPatch, plant):
    path = Path(dataset["tokenizer_path"])
    assert evidence.static_tokenizer(path).ok
    wrong = plant("byte pieces", REHEARSED["byte pieces as three bytes"][0])
    monkeypatch.setattr(evidence, "load_module", lambda _: wrong)
    finding = evidence.static_tokenizer(path)
    assert not finding.ok and "wrong=256" in finding.figures


@pytest.mark.parametrize("said, ok", [(lambda n, d: n, True), (lambda n, d: n + n // 50, False),
                                      (lambda n, d: n + d % 2 - (d % 4 == 3) * 2, False)])
def test_a_side_file_is_recounted_from_the_text(said, ok: bool, dataset: dict[str, str]):
    """As it should be; 2 % more everywhere; a byte more or less in half of the documents."""
    sp, ids, sizes = tg.load_sentencepiece(Path(dataset["tokenizer_path"])), [], []
    for number in range(41):
        text = f"The NASA of {number} McDonalds, and a long sentence in which nothing happens at all. " * 3
        own = [tg.BOS_ID, *sp.encode(TRANSFORMS["caseops_v1"].encode(text.strip()))]
        ids, sizes = ids + own, [*sizes, said(len(text.strip()), number), *[0] * (len(own) - 1)]
    (finding,) = audit.probe_side_file(Path(dataset["tokenizer_path"]), np.array(ids), np.array(sizes), tg.BOS_ID)
    assert finding.ok == ok, finding
    assert audit.probe_side_file(None, np.array(ids), np.array(sizes), tg.BOS_ID)[0].suspect


# -- logs ----------------------------------------------------------------------------------------------


def log(path: Path, edit: dict[str, object], gap: float = 0.0, order: str = "pack val_data", **events: dict) -> Path:
    """A finished run's JSON lines, with some figures of the verdict and of other events replaced."""
    end, tokens, size = 1100.0 + gap, 40_540_803, 151_080_891
    phase = {"event": "phase", "budget": "none"}
    verdict = dict(val_loss=2.7, val_bpb=2.7 / np.log(2) * tokens / size, tokens=tokens, bytes=size,
                   artifact_bytes=15_900_000, code_bytes=40_000, cap_bytes=16_000_000, train_seconds=600.0,
                   eval_seconds=500.0, total_seconds=end) | edit
    sums = dict(targets=[tokens], bytes=[verdict["bytes"]], nats=[2.7 * tokens])
    config = dict(max_wallclock_seconds=600.0, vocab_size=8192, caseops_enabled=False, ttt="lora")
    told = {"start": {}, "config": config,
            "artifact": dict(sha256=hashlib.sha256(BLOB).hexdigest()), "places": dict(position=sums, length=sums),
            "val_data": dict(targets=tokens, bytes=verdict["bytes"]), "score": dict(val_loss=verdict["val_loss"]),
            "warning": {}, "pack": {}, "val_probe": {}}
    told = {name: {"event": name, **values, **events.get(name, {})} for name, values in told.items()}
    lines = [(0.0, told["start"]), (0.1, told["config"]), (0.2, told["warning"]),
             (600.0, {**phase, "name": "train", "budget": "train", "phase_seconds": 600.0}),
             *((600.0, told[name]) for name in order.split()), (600.0, told["artifact"]),
             (end, {**phase, "name": "score", "budget": "eval", "phase_seconds": 500.0}), (end, told["places"]),
             (end, told["score"]), (end, {"event": "verdict", **verdict})]
    path.write_text("\n".join(json.dumps({"seconds": seconds, **event}) for seconds, event in lines))
    return path


BLOB = bytes(15_860_000)
FORGED = {
    "as it should be": ({}, {}, ""), "training over its budget": (dict(train_seconds=602.0), {}, "A1"),
    "evaluation over its budget": (dict(eval_seconds=631.0), {}, "A1"), "an untimed gap": ({}, dict(gap=51.8), "A1"),
    "validation first": ({}, dict(order="val_data pack"), "A2"), "another loss": (dict(val_loss=2.6), {}, "A3"),
    "probed while training": ({}, dict(order="val_probe pack val_data"), "A2"),
    "bytes counted twice": (dict(bytes=176_332_748, val_bpb=2.7 / np.log(2) * 40_540_803 / 176_332_748), {}, "A3"),
    "over the cap": (dict(artifact_bytes=16_024_793, code_bytes=164_793), {}, "A4"),
    "another size": (dict(code_bytes=30_000), {}, "A4"),
    "nothing": (dict(val_bpb=None), {}, "A3"), "endless": (dict(eval_seconds=1e300), {}, "A1"),
    "a few bytes more": (dict(bytes=151_210_000, val_bpb=2.7 / np.log(2) * 40_540_803 / 151_210_000), {}, "A3"),
    "half the loss": (dict(val_loss=1.35, val_bpb=1.35 / np.log(2) * 40_540_803 / 151_080_891), {}, "A3"),
    "a budget of its own": (dict(train_seconds=3000.0), dict(config=dict(max_wallclock_seconds=3600.0)), "A1"),
    "less time than its phases": (dict(train_seconds=90.0), {}, "A1"),
    "another artifact": ({}, dict(artifact=dict(sha256="0" * 64)), "A4"),
    "other knobs": ({}, dict(config=dict(ttt="sgd")), "A4"),
    "a marked run": ({}, dict(warning=dict(text="this run is illegal (C3)")), "A2"),
    "another stream": ({}, dict(val_data=dict(targets=9_662_464)), "A3"),
    "another score": ({}, dict(score=dict(val_loss=2.9)), "A3"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_log_is_checked(name: str, tmp_path: Path):
    edit, more, expected = FORGED[name]
    findings = evidence.audit_log(log(tmp_path / "r.jsonl", edit, **more), BLOB, dict(ttt="lora"))
    wanted = {(expected, "C3" if expected == "A2" else "accounting")} if expected else set()
    assert failures(findings) == wanted, evidence.table(findings)


# -- sources -------------------------------------------------------------------------------------------

SPECIMENS = {
    "syntax of 3.12": ("""x = 1\nmatch = f'{x!r:{'a'}}'\n""", ("S1", "accounting"), False),
    "network": ("from huggingface_hub import hf_hub_download\n", ("S2", "accounting"), False),
    "a compiler": ("import subprocess\nsubprocess.run(['gcc', 'x.c'])\n", ("S2", "accounting"), True),
    "pre-quantization learning": ("def main():\n    ttt_adapt(model, val_tokens)\n    serialize(model)\n",
                                  ("S2", "C3"), False),
    "named so": ("def main():\n    prequant_ttt(model)\n    serialize(model)\n", ("S2", "C3"), True),
    "target in the key": ("def f(ctx_hash, target):\n    return (ctx_hash ^ (target * 7919)) & 1023\n",
                          ("S2", "C2"), False),
    "smaller of two": ("import torch\nbest_nll = torch.minimum(nll_first, nll_second)\n", ("S2", "C4"), False),
    "word table at the target": ("gate = starts_new_word_lut[target]\n", ("S2", "C1"), True),
    "validation calibration": ("h = collect_hessians(model, val_tokens)\n", ("S2", "C3"), False),
    "space twice": ("for i in range(9):\n    base[i] = len(piece.encode('utf-8')) + 1\n"
                    "count = base[tgt] + (has_leading_space[tgt] & ~boundary[prev])\n", ("S2", "accounting"), False),
}


@pytest.mark.parametrize("name", SPECIMENS)
def test_a_source_is_scanned(name: str, tmp_path: Path):
    """Also inside a wrapper that extracts itself. Suspects are no failures."""
    source, expected, suspect = SPECIMENS[name]
    script = tmp_path / "train_gpt.py"
    packed = base64.b85encode(lzma.compress(source.encode())).decode()
    wrapper = f"import lzma,base64\nexec(lzma.decompress(base64.b85decode({packed!r})))\n"
    for text in (source, wrapper):
        script.write_text(text)
        bad = [f for f in evidence.static_audit(script, {}) if not f.ok]
        assert {(f.code, f.condition, f.suspect) for f in bad} == {(*expected, suspect)}, bad


HIDDEN = "import socket\n"
PACKED = base64.b64encode(HIDDEN.encode()).decode()
CONCEALED = {
    "a string that is run": {"train_gpt.py": f"exec({HIDDEN!r})"},
    "base64": {"train_gpt.py": f"import base64\nexec(base64.b64decode({PACKED!r}))"},
    "bz2 behind a name": {
        "train_gpt.py": f"import bz2\nx = {bz2.compress(HIDDEN.encode())!r}\nexec(bz2.decompress(x))"},
    "a wrapper in a wrapper": {"train_gpt.py": "import zlib\nexec(zlib.decompress(" + repr(zlib.compress(
        f"import zlib\nexec(zlib.decompress({zlib.compress(HIDDEN.encode())!r}))".encode())) + "))"},
    "written backwards": {"train_gpt.py": f"exec({HIDDEN[::-1]!r}[::-1])"},
    "a file that is run": {"train_gpt.py": "exec(open('model.bin').read())"},
    "a computed name": {"train_gpt.py": "__import__('so' + 'cket')"},
    "a package": {"train_gpt.py": "from parts.net import x\n", "parts/__init__.py": "", "parts/net.py": HIDDEN},
    "the second script": {"train_gpt.py": "x = 1\n", "train_gpt_eval.py": HIDDEN},
    "a folder below": {"train_gpt.py": "x = 1\n", "tools/fetch.py": HIDDEN},
    "another library": {"train_gpt.py": "import httpx\n"},
    "weights in two files": {"train_gpt.py": "x = 1\n", "a.bin": "x" * 9_000_000, "b.bin": "x" * 9_000_000},
    "a table in a text": {"train_gpt.py": "x = 1\n", "a.bin": "x" * 9_000_000, "table.txt": "x" * 9_000_000},
    "a library of machine code": {"train_gpt.py": "x = 1\n", "fast.so": "x"},
}


@pytest.mark.parametrize("name", CONCEALED)
def test_what_is_packed_or_hidden_is_named_or_suspect(name: str, tmp_path: Path):
    for file, text in {"model.bin": "x", **CONCEALED[name]}.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    assert {f.condition for f in evidence.static_audit(tmp_path, {}) if not f.ok} == {"accounting"}


def test_lawful_sources_pass(tmp_path: Path):
    for source in ("loss = min(step, 3)\n", "def main():\n    serialize(model)\n    eval_val_ttt(model, val_tokens)\n",
                   "key = (ctx_hash ^ previous) & mask\n", "h = collect_hessians(model, train_loader)\n",
                   "n = len(piece.encode('utf-8'))\nm = n + has_leading_space[i]\n"):
        (tmp_path / "s.py").write_text(source)
        assert all(f.ok for f in evidence.static_audit(tmp_path / "s.py", {})), source


def test_our_own_source_has_no_certain_hit(tmp_path: Path):
    (tmp_path / "train_gpt.py").write_bytes(tg.shipped_source(ROOT / "train_gpt.py"))
    assert not failures(evidence.static_audit(tmp_path / "train_gpt.py", {}))
    phases = set(re.findall(r'run\.phase\("(\w+)"\)', (ROOT / "train_gpt.py").read_text(encoding="utf-8")))
    assert phases == audit.PAUSES | {"setup", "load_train", "warmup"}  # what stops a budget's clock is known


def test_everything_that_is_imported_counts(tmp_path: Path):
    (tmp_path / "train_gpt.py").write_text("import helper\n")
    (tmp_path / "helper.py").write_text("x = 1\n" + "#" * 60_000)
    (tmp_path / "model.bin").write_bytes(bytes(15_900_000))
    for stars, expected, figure in ((9_000, (True, False), "files=3"),  # 15,969,000 and a little
                                    (30_000, (False, True), ""), (60_000, (False, False), "16,0")):
        (tmp_path / "tilt.c").write_text("/*" + "*" * stars)
        (finding,) = [f for f in evidence.static_audit(tmp_path, {}) if f.code == "S3"]
        assert (finding.ok, finding.suspect) == expected and figure in finding.figures


@pytest.mark.parametrize("changes, ok, words", [
    ({}, True, "no document"), (dict(shared_documents=1), False, "ruling N"),
    (dict(shards_sha256="0"), False, "other shards")])
def test_shared_documents_are_read_from_the_stamp(changes: dict, ok: bool, words: str, tmp_path: Path):
    write_shard(tmp_path / "fineweb_val_000000.bin", np.array([1, 5, 6, 7, 1, 8, 9]))
    with pytest.raises(ToolError, match="data verify"):
        evidence.static_overlap(tmp_path)
    stamp = dict(shards_sha256=tg.shards_sha256(tmp_path), val_documents=2, shared_documents=0, shared_share=0.0)
    (tmp_path / "verified.json").write_text(json.dumps({**stamp, **changes}))
    finding = evidence.static_overlap(tmp_path)
    assert finding.ok == ok and words in finding.text


# -- the command ---------------------------------------------------------------------------------------


def test_the_command_audits_an_artifact(dataset: dict[str, str], tmp_path: Path, capsys, monkeypatch):
    """With a table, a last line for every condition, and status 0; knobs are those of a run."""
    monkeypatch.setattr(tg, "shipped_source", lambda _: b"x")
    monkeypatch.setattr(audit, "piece_of_stream", functools.partial(audit.piece_of_stream, documents=8))
    shape = dict(num_layers=2, num_loops=0, parallel_start_layer=1, model_dim=16, rope_dims=4, iterations=1, ttt="none",
                 ngram_base_beta=0, diagnostic_evals="")
    assert tg.main([], environment(dataset, tmp_path, **shape)) == 0
    capsys.readouterr()
    knobs = [f"{k.upper()}={v}" for k, v in dataset.items()]
    knobs += ["TTT=none", "NGRAM_BASE_BETA=2", "EVAL_SEQ_LEN=64", "EVAL_STRIDE=32", "TRAIN_SEQ_LEN=64",
              "TRAIN_BATCH_TOKENS=64", "MICRO_BATCH_TOKENS=64", "NGRAM_RULES=4:0.5:1"]
    with pytest.raises((ToolError, tg.UserError), match="LEARNING_RATE=1: no such knob"):
        audit.main([str(tmp_path / "r.bin"), *knobs, "LEARNING_RATE=1"])
    assert audit.main([str(tmp_path / "r.bin"), *knobs, f"SCRIPT={tg.__file__}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["probe", "condition", "verdict", "figures"]
    assert lines[-1] == "verdict C1=pass C2=pass C3=pass C4=pass P=pass accounting=pass"
    subject, cfg, ids, _ = audit.artifact_subject(tmp_path / "r.bin", {k.upper(): v for k, v in dataset.items()})
    long = audit.long_subject(subject, cfg, ids)
    long.base = long.score()
    text = (tmp_path / "r.jsonl").read_text(encoding="utf-8")
    for said, expected in ((text, set()), (re.sub(r'("nats": \[)\d', r"\g<1>9", text), {("A3", "accounting")})):
        (tmp_path / "r.jsonl").write_text(said, encoding="utf-8")
        assert failures(audit.probe_first_documents(tmp_path / "r.jsonl", long)) == expected
    blob = (tmp_path / "r.bin").read_bytes()
    for marks, expected in (({}, set()), (dict(pre_quant_ttt=1), {("A4", "C3")})):
        assert failures(audit.probe_header(tg, audit.remarked(tg, blob, **marks), cfg, tg.unpack(blob))) == expected
    assert {line.split()[0] for line in lines[1:-1]} == {"A2", "A4", *(f"D{i}" for i in range(1, 10))}


@pytest.mark.parametrize("arguments,message", [
    (["no.bin"], "no.bin: no such artifact"),
    ([__file__], "not an artifact of this program"),
    (["--static", "nowhere"], "nowhere: no such script"),
    (["--static", __file__, "X=1"], "X: --static takes"),
    ([__file__, "LOG"], "LOG: expected KNOB=value"),
])
def test_user_errors_are_one_line(arguments: list[str], message: str, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["audit.py", *arguments])
    assert common.program(audit.main, "audit.py") == 2
    error = capsys.readouterr().err
    assert error.startswith("audit.py: ") and message in error and error.count("\n") == 1


def test_a_failed_probe_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "s.py").write_text("import socket\n")
    assert audit.main(["--static", str(tmp_path / "s.py")]) == 1
    assert "accounting=FAIL(S2)" in capsys.readouterr().out
