"""The auditor passes the program as it is and names what is wrong with a program that breaks one rule at a time."""
import base64
import copy
import dataclasses
import importlib.util
import json
import lzma
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from conftest import ROOT, environment, tiny, write_shard

import train_gpt as tg
from records.pr1485_illegal import train_on_validation
from tools import audit, common, evidence
from tools.common import ToolError

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
VOCAB = 40

SMALL = dict(vocab_size=VOCAB, num_layers=2, num_loops=0, parallel_start_layer=1, eval_seq_len=16, eval_stride=8,
             train_seq_len=16, train_batch_tokens=64, micro_batch_tokens=64, ngram_base_beta=0,
             ngram_rules="1:0.3:1,2:0.5:1", ttt_chunk_size="4", ttt_lora_rank=4, ttt_lora_alpha=8, ttt_lora_lr=0.05,
             ttt_lora_on="q,o,head", phased_ttt_num_phases=2, phased_ttt_prefix_docs=8, global_ttt_lr=0.05,
             ttt_chunk_tokens=40, ttt_lr=0.05, ttt_epochs=1)
"""Two blocks, and learning rates so large that every leak shows."""

MODES = {"none": dict(ttt="none"), "tilt": dict(ttt="none", ngram_base_beta=2), "sgd": dict(ttt="sgd"),
         "lora": dict(ttt="lora", ttt_context="recompute"), "cache": dict(ttt="lora", ttt_context="cache"),
         "lora and tilt": dict(ttt="lora", ngram_base_beta=2)}
ALONE = dict(phased_ttt_num_phases=0)  # adapters learn, nothing shared does


def stream() -> np.ndarray:
    """A stream of short documents: four in each phase, so that batches have several rows. Every third one is nearly
    the one before it, so that hints come true."""
    rng, texts = np.random.default_rng(0), []
    for number in range(10):
        text = rng.integers(2, VOCAB, rng.integers(4, 8)).tolist()
        texts.append(texts[-1][:-1] + text[:1] if number % 3 == 2 else text)
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


# -- the program as it is ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, knobs", [("tilt", {}), ("lora", ALONE), ("lora and tilt", {}), ("sgd", {})])
def test_the_program_passes(mode: str, knobs: dict):
    findings = audit.audit(subject(tg, **MODES[mode], **knobs))
    assert not failures(findings), evidence.table(findings)
    codes = {f.code for f in findings}
    assert codes == {"D1", "D2", "D3", "D4", "D5", "D6", "D7", "D8"} | ({"D9"} if "tilt" in mode else set())


def test_probes_look_where_something_was_learned():
    """Probed targets include states after adapters and shared weights learned, and hints right and wrong."""
    s = subject(tg, **MODES["lora and tilt"])
    base = s.score()
    positions = audit.choose(s, base, np.random.default_rng(0))
    assert len(np.unique(base.shared)) == 3 and len(np.unique(base.own)) > 8
    betas, hints = base.hints[1].numpy()[positions] > 0, base.hints[0].numpy()[positions]
    right = hints == s.ids[1:][positions]
    assert (betas & right).any() and (betas & ~right).any()
    assert (base.shared[positions] != base.shared[0]).any()


# -- programs that break a rule ------------------------------------------------------------------------


class Plant(NamedTuple):
    """A change of the program's text that breaks one ruling, and the probe and condition that must notice."""
    ruling: str
    mode: str
    edits: list[tuple[str, str]]
    expected: tuple[str, str]
    knobs: dict[str, object] = {}


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
LONGEST = [("documents, phases = np.arange(len(val.starts)), cfg.phased_ttt_num_phases",
            "phases = cfg.phased_ttt_num_phases\n"
            "    documents = np.argsort(val.starts - val.stops, kind='stable')"),
           ("starts = range(0, stop, cfg.ttt_chunk_tokens)",
            "starts = documents[:np.searchsorted(val.starts, stop)].tolist()"),
           ("sgd.learn(at, min(at + cfg.ttt_chunk_tokens, stop),",
            "sgd.learn(int(val.starts[at]), int(val.stops[at]),")]
CALIBRATE = 'with run.phase("calibrate", "train"):'

PLANTS = {
    "adapters learn before the score": Plant("A", "lora", [
        (SCORED, AGAIN + SCORED)], ("D2", "C3"), ALONE),
    "shared weights learn before the score": Plant("A", "sgd", [
        ("            score_windows(model, windows[cuts[c]:",
         "            sgd.learn(edges[c], edges[c + 1], cfg.ttt_lr)\n"
         "            score_windows(model, windows[cuts[c]:")], ("D2", "C3")),
    "minimum over two passes": Plant("B", "lora", [
        (SCORED, AGAIN + "                nats = torch.minimum(first, nats)\n" + SCORED)], ("D5", "C4"), ALONE),
    "a delta fitted to the window that is scored (SLOT)": Plant("D", "none", [
        ('logits = w.linear("head", None, hidden).flatten(0, -2)',
         'logits = w.linear("head", None, hidden).flatten(0, -2)' + SLOT)], ("D2", "C1")),
    "mass added to the hint alone": Plant("E", "tilt", [
        ("(nats + torch.log1p(p * torch.expm1(betas)) - betas", "(nats - betas")], ("D3", "C2")),
    "the lookup context holds the target": Plant("E", "tilt", [
        ("return hints[:-1], betas[:-1]", "return hints[1:], betas[1:]")], ("D2", "C2")),
    "hints counted from the whole stream": Plant("E", "tilt", [
        ("highest[:-1])[(index - 1).clamp_min_(0)]", "highest[:-1])[(index + 1).clamp_max_(len(order) - 1)]")],
        ("D9", "C1")),
    "tilt only where the hint comes true": Plant("F", "tilt", [
        (".clamp_max(1.0), betas.double()", ".clamp_max(1.0), betas.double() * (hints == targets)")], ("D3", "C2")),
    "smearing across documents": Plant("L", "none", [
        ("(batch.positions > 0).unsqueeze(-1)", "(batch.positions >= 0).unsqueeze(-1)")], ("D6", "C1")),
    "attention across documents": Plant("L", "none", [
        (MASK, "return (back >= 0).expand(len(batch.positions), 1, -1, -1)")], ("D6", "C1")),
    "attention to later ids": Plant("C1", "none", [
        (MASK, "return (back <= batch.positions[:, :, None])[:, None]")], ("D1", "C1")),
    "keys and values of the documents before": Plant("L", "cache", [
        ("cache = KeyValueCache(cfg.eval_seq_len) if",
         'cache = globals().setdefault(f"past{len(batch.documents)}", KeyValueCache(cfg.eval_seq_len)) if')],
        ("D6", "C1"), ALONE),
    "adapters averaged over the batch": Plant("P", "lora", [
        (UPDATED, UPDATED + "                for peer in w.parameters:\n"
         "                    peer.data.copy_(peer.data.mean(0, keepdim=True).expand_as(peer))\n")],
        ("D6", "C1"), ALONE),
    "the last chunk is not scored": Plant("C4", "lora", [
        ("    for begin, end in zip(batch.edges, batch.edges[1:]):\n",
         "    for begin, end in zip(batch.edges, batch.edges[1:-1]):\n")], ("D5", "C4"), ALONE),
    "shared weights learn from the longest documents": Plant("two orders", "lora", LONGEST, ("D1", "C3")),
    "shared weights learn from all parts": Plant("A", "lora", [
        ("starts = range(0, stop, cfg.ttt_chunk_tokens)", "starts = range(0, val.num_targets, cfg.ttt_chunk_tokens)"),
        ("sgd.learn(at, min(at + cfg.ttt_chunk_tokens, stop),",
         "sgd.learn(at, min(at + cfg.ttt_chunk_tokens, val.num_targets),")],
        ("D1", "C3")),
    "the ledger tells less than was learned": Plant("A", "sgd", [
        ("sgd.learn(edges[c], edges[c + 1], cfg.ttt_lr * cosine(c, count))",
         "sgd.learn(edges[c], min(2 * edges[c + 1], val.num_targets), cfg.ttt_lr * cosine(c, count))")], ("D2", "C3")),
    "updates are not in the ledger": Plant("A", "sgd", [
        ("scorer.ledger.note(Ledger.UPDATE, Ledger.BASE, begin, end)", "pass")], ("D4", "C3")),
    "the ledger counts a target twice": Plant("C4", "none", [
        ("scorer.ledger.note(Ledger.SCORE, Ledger.BASE, firsts, ends)",
         "scorer.ledger.note(Ledger.SCORE, Ledger.BASE, firsts - (firsts > 0), ends)")], ("D5", "C4")),
    "the length of a document sets its chunks": Plant("C1", "lora", [
        ("most, largest = cfg.ttt_batch_size, math.inf", "most, largest = 1, math.inf"),
        ("    return sorted((DocumentBatch(tuple(rows), tuple(edges[:longest + 1].tolist()),",
         "    size = dict(zip(documents.tolist(), lengths.tolist()))\n"
         "    return sorted((DocumentBatch(tuple(rows), tuple(range(0, size[rows[0]] + 4, "
         "2 if size[rows[0]] <= 8 else 4)),")], ("D1", "C1"), ALONE),
}


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory):
    """A function that returns the program with some of its text replaced."""
    folder = tmp_path_factory.mktemp("planted")

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


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_violation_is_named(name: str, plant):
    _, mode, edits, expected, knobs = PLANTS[name]
    findings = audit.audit(subject(plant(name, edits), **{**MODES[mode], **knobs}))
    assert expected in failures(findings), evidence.table(findings)


# -- rehearsal: data in the right order ----------------------------------------------------------------

REHEARSED = {
    "as it is": ([], set()),
    "calibrated on validation data": ([(CALIBRATE, CALIBRATE + "\n        data.stream = TokenStream("
                                        'cfg.dataset_dir, "fineweb_val")')], {("A2", "C3")}),
    "training data after the clock": ([(CALIBRATE, 'with run.phase("calibrate"):')], {("A2", "accounting")}),
    "training data while scoring": ([('        run.log("val_data"', "        TokenStream(cfg.dataset_dir, "
                                      '"fineweb_train").read(0, 9)\n        run.log("val_data"')],
                                    {("A2", "accounting")}),
    "the specimen of records/pr1485_illegal": ([], {("A2", "C3")}),
}


def rehearsed(module: ModuleType, ids: np.ndarray, dataset: dict[str, str]) -> list[evidence.Finding]:
    cfg = tiny(**{**SMALL, "vocab_size": 512, "ttt": "none", **dataset})
    return audit.rehearse(module, module.Config(**dataclasses.asdict(cfg)), ids, Path(dataset["tokenizer_path"]))


@pytest.mark.parametrize("name", REHEARSED)
def test_a_rehearsal_sees_who_reads_what_when(name: str, dataset: dict[str, str], plant, monkeypatch):
    edits, expected = REHEARSED[name]
    module = plant(name, edits)
    if "specimen" in name:
        monkeypatch.setattr(train_on_validation, "EPOCHS", 1)
        train_on_validation.break_the_rule(module)
    ids = tg.TokenStream(Path(dataset["data_path"]), "fineweb_val").read(0, 300).astype(np.int64)
    findings = rehearsed(module, ids, dataset)
    assert failures(findings) == expected, evidence.table(findings)
    assert module.TokenStream.__module__ == module.__name__  # nothing of the rehearsal stays behind


@pytest.mark.parametrize("edits, token, words", [
    ([], 5000, "status 2: train_gpt.py: "), ([(CALIBRATE, f"raise ValueError('broken')\n    {CALIBRATE}")], 5,
                                            "status 1: ValueError: broken")])
def test_a_rehearsal_that_fails_is_one_line(edits: list, token: int, words: str, dataset: dict[str, str], plant):
    """Ids outside the vocabulary; a bug, at which the trainer would end the process."""
    ids = np.where(np.arange(300) % 30, token, tg.BOS_ID)
    with pytest.raises(ToolError, match=f"the rehearsal ended with {words}"):
        rehearsed(plant(words, edits), ids, dataset)


# -- bytes ---------------------------------------------------------------------------------------------

TEXT_BYTES = 'len(text.encode("utf-8"))'
BYTE_PIECE = "base[i] = 1 if"


@pytest.mark.parametrize("name, edits", [
    ("as it is", []),
    ("the space counted twice", [(TEXT_BYTES, 'len(piece.replace("\\u2581", " ").encode("utf-8"))')]),
    ("byte pieces as three bytes", [(BYTE_PIECE, "base[i] = 3 if")]),
])
def test_bytes_are_recounted_from_the_text(name: str, edits: list, dataset: dict[str, str], plant):
    import sentencepiece
    sp = sentencepiece.SentencePieceProcessor(model_file=dataset["tokenizer_path"])
    texts = ["two  spaces and a caf\u00e9", "\u4e2d\u6587 \U0001f40d", " leading", "", "x"]
    ids = np.array([i for text in texts for i in (tg.BOS_ID, *sp.encode(text))])
    (finding,) = audit.probe_bytes(plant(name, edits), Path(dataset["tokenizer_path"]), ids, 512)
    assert finding.ok == (name == "as it is"), finding


def test_a_tokenizers_table_is_recounted(dataset: dict[str, str], monkeypatch: pytest.MonkeyPatch, plant):
    path = Path(dataset["tokenizer_path"])
    assert evidence.static_tokenizer(path).ok
    wrong = plant("byte pieces", [(BYTE_PIECE, "base[i] = 3 if")])
    monkeypatch.setattr(evidence, "load_module", lambda _: wrong)
    finding = evidence.static_tokenizer(path)
    assert not finding.ok and "wrong=256" in finding.figures


# -- logs ----------------------------------------------------------------------------------------------


def log(path: Path, edit: dict[str, object], gap: float = 0.0, order: str = "pack val_data") -> Path:
    """A finished run's JSON lines, with some figures of the verdict replaced."""
    end = 1100.0 + gap
    phase = {"event": "phase", "budget": "none"}
    lines = [{"seconds": 0.1, "event": "config", "max_wallclock_seconds": 600.0, "vocab_size": 8192,
              "caseops_enabled": False},
             {**phase, "seconds": 600.0, "name": "train", "phase_seconds": 600.0}]
    lines += [{"seconds": 600.0, "event": name} for name in order.split()]
    tokens, size = 40_540_803, 151_080_891
    verdict = dict(seconds=end, event="verdict", val_loss=2.7, val_bpb=2.7 / np.log(2) * tokens / size,
                   tokens=tokens, bytes=size, artifact_bytes=15_900_000, code_bytes=40_000, cap_bytes=16_000_000,
                   train_seconds=590.0, eval_seconds=500.0, total_seconds=end)
    lines += [{**phase, "seconds": end, "name": "score", "phase_seconds": 500.0}, {**verdict, **edit}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("name,edit,more,expected", [
    ("as it should be", {}, {}, ""), ("training over its budget", dict(train_seconds=602.0), {}, "A1"),
    ("evaluation over its budget", dict(eval_seconds=631.0), {}, "A1"), ("an untimed gap", {}, dict(gap=51.8), "A1"),
    ("validation first", {}, dict(order="val_data pack"), "A2"), ("another loss", dict(val_loss=2.6), {}, "A3"),
    ("probed while training", {}, dict(order="val_probe pack val_data"), "A2"),
    ("bytes counted twice", dict(bytes=176_332_748, val_bpb=2.7 / np.log(2) * 40_540_803 / 176_332_748), {}, "A3"),
    ("over the cap", dict(artifact_bytes=16_024_793, code_bytes=164_793), {}, "A4"),
    ("another artifact", dict(code_bytes=30_000), {}, "A4")])
def test_a_log_is_checked(name: str, edit: dict, more: dict, expected: str, tmp_path: Path):
    findings = evidence.audit_log(log(tmp_path / "r.jsonl", edit, **more), 15_860_000)
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


def test_lawful_sources_pass(tmp_path: Path):
    for source in ("loss = min(step, 3)\n", "def main():\n    serialize(model)\n    eval_val_ttt(model, val_tokens)\n",
                   "key = (ctx_hash ^ previous) & mask\n", "h = collect_hessians(model, train_loader)\n",
                   "n = len(piece.encode('utf-8'))\nm = n + has_leading_space[i]\n"):
        (tmp_path / "s.py").write_text(source)
        assert all(f.ok for f in evidence.static_audit(tmp_path / "s.py", {})), source


def test_our_own_source_has_no_certain_hit(tmp_path: Path):
    (tmp_path / "train_gpt.py").write_bytes(tg.shipped_source(ROOT / "train_gpt.py"))
    assert not failures(evidence.static_audit(tmp_path / "train_gpt.py", {}))


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


def test_the_command_audits_an_artifact(dataset: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture):
    """With a table, a last line for every condition, and status 0; knobs are those of a run."""
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
    assert lines[-1] == "verdict C1=pass C2=pass C3=pass C4=pass accounting=pass"
    assert {line.split()[0] for line in lines[1:-1]} == {"A2", *(f"D{i}" for i in range(1, 10))}


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
