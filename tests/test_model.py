"""The forward against a float64 restatement of its definition; causality, document isolation, layer plan, counts."""
import collections
import doctest
import math

import numpy as np
import pytest
import torch
from conftest import batch_of, tiny
from torch import Tensor

import train_gpt as tg

BOS = tg.BOS_ID
EVERYTHING = dict(attn_gate="dense", gated_attn_bias=1.5, bigram_buckets=16, bigram_dim=6, mlp_rank=12)
"""Knobs that give the tiny model a parameter of every kind."""


def noisy(cfg: tg.ModelKnobs, seed: int = 0, scale: float = 0.2) -> tg.GPT:
    """A model with noise on every parameter, so that no zero hides a path."""
    torch.manual_seed(seed)
    model = tg.GPT(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def document(seed: int, length: int) -> list[int]:
    """BOS and random ids."""
    return [BOS, *np.random.default_rng(seed).integers(2, 512, length - 1).tolist()]


def packed(*rows: list[int]) -> tg.Batch:
    """One row of ids (the last one only a target) each."""
    return tg.make_batch([np.array(row, dtype=np.uint16) for row in rows], len(rows), max(map(len, rows)) - 1)


BY_HAND = tg.Kernels(tg.dense_attention(), tg.eager_rms_norm, tg.EagerLeakyReluSquared.apply,
                     tg.EagerCrossEntropy.apply)
"""The twins of an eager run; a new model has the references."""


@torch.no_grad()
def hidden(model: tg.GPT, batch: tg.Batch, looped: bool = True) -> Tensor:
    return model.hidden(batch, tg.layer_plan(model.cfg, looped), tg.Weights(model, torch.float32))


@torch.no_grad()
def losses(model: tg.GPT, batch: tg.Batch) -> Tensor:
    """[R, T] nats."""
    flat = model.losses(hidden(model, batch).flatten(0, 1), batch.targets.flatten(), tg.Weights(model, torch.float32))
    return flat.view_as(batch.targets)


# -- the forward, restated in float64 for one document -------------------------------------------------


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + np.finfo(np.float32).eps)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def reference_embedding(p: dict[str, np.ndarray], cfg: tg.ModelKnobs, ids: list[int]) -> np.ndarray:
    raw = p["tok_emb"][ids]
    e = raw.copy()
    for t in range(len(ids)):
        if cfg.smear_gate_enabled and t > 0:
            e[t] += p["smear_lambda"] * sigmoid(p["smear_gate"][0] @ raw[t, :cfg.gate_window]) * raw[t - 1]
        if cfg.bigram_buckets:
            last = cfg.bigram_buckets - 1
            bucket = ((36313 * ids[t]) ^ (27191 * ids[t - 1])) % last if t > 0 else last
            e[t] += p["bigram.scale"] * (p["bigram.proj"] @ p["bigram.table"][bucket])
    return rms(e)


def rope(x: np.ndarray, position: int, cfg: tg.ModelKnobs, row_length: int) -> np.ndarray:
    """One head's vector, turned; pairs are (j, j + ROPE_DIMS / 2)."""
    dims, base, x = cfg.rope_dims, cfg.rope_base, x.copy()
    if cfg.rope_yarn and row_length > cfg.rope_train_seq_len:
        base *= (row_length / cfg.rope_train_seq_len) ** (dims / (dims - 2))
    for j in range(dims // 2):
        angle = position * base ** (-2 * j / dims)
        a, b = x[j], x[j + dims // 2]
        x[j], x[j + dims // 2] = a * math.cos(angle) + b * math.sin(angle), b * math.cos(angle) - a * math.sin(angle)
    return x


def reference_attention(p: dict[str, np.ndarray], cfg: tg.ModelKnobs, i: int, n: np.ndarray, row_length: int
                        ) -> np.ndarray:
    layers, heads, width = cfg.num_layers, cfg.num_heads, cfg.model_dim // cfg.num_heads
    q, k, v = ((n @ m.T).reshape(len(n), -1, width)
               for m in (p["qo_bank"][i], p["kv_bank"][i], p["kv_bank"][layers + i]))
    y = np.zeros_like(q)
    for h in range(heads):
        group = h // (heads // cfg.num_kv_heads)
        keys = np.array([rope(rms(k[t, group]), t, cfg, row_length) for t in range(len(n))])
        for t in range(len(n)):
            query = p["q_gain"][i, h] * rope(rms(q[t, h]), t, cfg, row_length)
            weights = np.exp(keys[:t + 1] @ query / math.sqrt(width))
            y[t, h] = weights @ v[:t + 1, group] / weights.sum()
            if i >= layers - cfg.xsa_last_n:
                direction = v[t, group] / np.linalg.norm(v[t, group])
                y[t, h] -= (y[t, h] @ direction) * direction
            if cfg.attn_gate == "output":
                y[t, h] *= 2 * sigmoid(p["gate.weight"][i, h] @ n[t, :cfg.gate_window])
            elif cfg.attn_gate == "sparse":
                y[t, h] *= sigmoid(cfg.sparse_attn_gate_scale * (p["gate.weight"][i, h] @ n[t, :cfg.gate_window]))
            elif cfg.attn_gate == "dense":
                bias = p["gate.bias"][i, h] if cfg.gated_attn_bias else 0.0
                y[t, h] *= sigmoid(p["gate.weight"][i, h] @ n[t] + bias)
    return p["attn_scale"][i] * (y.reshape(len(n), -1) @ p["qo_bank"][layers + i].T)


def reference_mlp(p: dict[str, np.ndarray], cfg: tg.ModelKnobs, i: int, z: np.ndarray) -> np.ndarray:
    up, down = p["mlp_up_bank"][i], p["mlp_down_bank"][i]
    if cfg.mlp_rank:
        up, down = up @ p["mlp_up_in_bank"][i], down @ p["mlp_down_in_bank"][i]
    a = z @ up.T
    return p["mlp_scale"][i] * ((np.maximum(a, 0) + cfg.mlp_slope * np.minimum(a, 0)) ** 2 @ down.T)


def reference_hidden(p: dict[str, np.ndarray], cfg: tg.ModelKnobs, ids: list[int], looped: bool, row_length: int
                     ) -> np.ndarray:
    """Final hidden states of one document; spec of record #1855 with its variants."""
    first, last = cfg.loop_start, cfg.loop_end
    order = [*range(first), *list(range(first, last + 1)) * (cfg.num_loops + 1), *range(last + 1, cfg.num_layers)] \
        if looped and cfg.num_loops else list(range(cfg.num_layers))
    x = x0 = reference_embedding(p, cfg, ids)
    other, saved = None, []
    for step, i in enumerate(order):
        decoder_step = step - len(order) // 2
        lanes = cfg.parallel_residual if i >= cfg.parallel_start_layer else "none"
        if lanes == "two" and other is None:
            other = x
        if decoder_step >= 0 and saved:
            skip = p["skip_weights"][decoder_step] * saved.pop()
            g = sigmoid(p["skip_gates"][decoder_step]) if cfg.skip_gates_enabled else None
            x = x + skip if g is None else (1 - g) * skip + g * x
        s = 1 / math.sqrt(i + 1) if cfg.ln_scale else 1.0
        u = p["resid_mix"][i, 0] * x + p["resid_mix"][i, 1] * x0
        a = reference_attention(p, cfg, i, s * rms(u), row_length)
        if lanes == "none":
            x = u + a + reference_mlp(p, cfg, i, s * rms(u + a))
        elif lanes == "single":
            x = u + a + reference_mlp(p, cfg, i, s * rms(u))
        else:
            m = reference_mlp(p, cfg, i, s * rms(other))
            (r0, r1), ((p00, p01), (p10, p11)) = p["parallel_resid_lambdas"][i], p["parallel_post_lambdas"][i]
            x, other = r0 * x + p00 * a + p10 * m, r1 * other + p01 * a + p11 * m
        if decoder_step < 0:
            saved.append(x)
    if other is not None:
        x = {"mean": 0.5 * (x + other), "attn": x, "mlp": other}[cfg.parallel_final_lane]
    return rms(x)


def reference_losses(p: dict[str, np.ndarray], cfg: tg.ModelKnobs, h: np.ndarray, targets: list[int]) -> list[float]:
    z = cfg.logit_softcap * np.tanh(h @ p["tok_emb"].T / cfg.logit_softcap)
    return [math.log(np.exp(row).sum()) - row[y] for row, y in zip(z, targets)]


VARIANTS = {
    "as the record": {},
    "no gate": dict(attn_gate="none"),
    "output gate": dict(attn_gate="output"),
    "dense gate": dict(attn_gate="dense"),
    "dense gate with bias": dict(attn_gate="dense", gated_attn_bias=1.5),
    "one lane": dict(parallel_residual="none"),
    "parallel on one lane": dict(parallel_residual="single", parallel_start_layer=1),
    "final lane attn": dict(parallel_final_lane="attn"),
    "final lane mlp": dict(parallel_final_lane="mlp"),
    "two lanes from the encoder on": dict(parallel_start_layer=1),
    "two lanes from the first block on, no loop": dict(parallel_start_layer=0, num_loops=0),
    "added skips": dict(skip_gates_enabled=False),
    "no loop": dict(num_loops=0),
    "three passes": dict(num_loops=2, num_layers=5, loop_start=1, loop_end=3, parallel_start_layer=4),
    "odd number of blocks": dict(num_layers=3, loop_start=1, loop_end=1, parallel_start_layer=2),
    "xsa nowhere": dict(xsa_last_n=0),
    "low-rank MLP": dict(mlp_rank=5),
    "xsa on two blocks": dict(xsa_last_n=2),
    "no smear": dict(smear_gate_enabled=False),
    "bigram": dict(bigram_buckets=16, bigram_dim=6),
    "no ln scale": dict(ln_scale=False),
    "no rope": dict(rope_dims=0),
    "rope on all dimensions": dict(rope_dims=16),
    "grown rope base": dict(rope_yarn=True, rope_train_seq_len=4),
    "rope base kept in short rows": dict(rope_yarn=True, rope_train_seq_len=64),
    "as many kv heads": dict(num_kv_heads=2),
    "four heads on two": dict(num_heads=4, num_kv_heads=2),
    "other constants": dict(mlp_slope=0.2, mlp_mult=1.5, logit_softcap=5, rope_base=100, gate_window=3,
                            sparse_attn_gate_scale=1.5),
}


@pytest.mark.parametrize("kernels", ["references", "by hand"])
@pytest.mark.parametrize("looped", [False, True], ids=["loop off", "loop on"])
@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_losses_equal_the_restatement_document_by_document(name: str, looped: bool, kernels: str):
    cfg = tiny(**VARIANTS[name])
    model = noisy(cfg)
    model.kernels = BY_HAND if kernels == "by hand" else model.kernels
    p = {n: v.detach().double().numpy() for n, v in model.named_parameters()}
    documents = [document(1, 7), document(2, 1), document(3, 5)]
    row = [i for d in documents for i in d] + [BOS]
    batch = packed(row, document(4, 9))
    w = tg.Weights(model, torch.float32)
    found = model.hidden(batch, tg.layer_plan(cfg, looped), w)
    found, nats = found.detach(), model.losses(found[0], batch.targets[0], w).detach()
    assert found.dtype == nats.dtype == torch.float32
    at = 0
    for ids in documents:
        expected = reference_hidden(p, cfg, ids, looped, row_length=len(row) - 1)
        stop = at + len(ids)
        np.testing.assert_allclose(found[0, at:stop], expected, rtol=0, atol=2e-5)
        np.testing.assert_allclose(nats[at:stop], reference_losses(p, cfg, expected, row[at + 1:stop + 1]),
                                   rtol=2e-5, atol=2e-5)
        at = stop


@pytest.mark.parametrize("knobs", [{}, EVERYTHING, dict(rope_dims=0, attn_gate="none", num_heads=4, num_kv_heads=2)],
                         ids=["record", "everything", "few parts"])
def test_gradients_are_those_of_the_references(knobs: dict):
    """Of every parameter, with pieces, padding and a looped block in the batch."""
    grads, cfg = [], tiny(**knobs)
    batch = packed([*document(1, 7), *document(2, 1), *document(3, 9), BOS], document(4, 9))
    for kernels in (None, BY_HAND):
        model = noisy(cfg)
        model.kernels = kernels or model.kernels
        model.total_loss(batch, tg.layer_plan(cfg, looped=True), torch.float32).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kernels", ["references", "by hand"])
def test_bfloat16_is_near_float32(kernels: str):
    """Loss and gradient; parameters and their gradients stay fp32."""
    model, batch, found = noisy(tiny(**EVERYTHING), scale=0.1), packed([*document(1, 7), *document(2, 24), BOS]), []
    model.kernels = BY_HAND if kernels == "by hand" else model.kernels
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        loss = model.total_loss(batch, tg.layer_plan(model.cfg, looped=True), dtype)
        loss.backward()
        assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in model.parameters())
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, grad), (rounded_loss, rounded_grad) = found
    assert rounded_loss == pytest.approx(loss, rel=0.01)
    assert torch.cosine_similarity(grad, rounded_grad, dim=0) > 0.99


# -- what may not depend on what -----------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [{}, EVERYTHING], ids=["record", "everything"])
def test_hidden_states_do_not_depend_on_later_ids(knobs: dict):
    model, ids = noisy(tiny(**knobs)), np.array([document(5, 21)])
    before = hidden(model, batch_of(ids))
    for at in (1, 8, 19):
        changed = ids.copy()
        changed[0, at] = 3 + ids[0, at] % 500
        after = hidden(model, batch_of(changed))
        assert torch.equal(after[:, :at], before[:, :at])
        assert not torch.equal(after[:, at], before[:, at])


def test_losses_do_not_depend_on_other_targets():
    model, batch = noisy(tiny()), batch_of(np.array([document(6, 15), document(7, 15)]))
    before = losses(model, batch)
    batch.targets[0, 4] = 3 + batch.targets[0, 4] % 500
    changed = losses(model, batch) != before
    assert changed.nonzero().tolist() == [[0, 4]]


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_documents_of_one_row_do_not_see_each_other(changed: int):
    """Smear, bigram and positions included: not even the tokens next to a boundary notice."""
    model = noisy(tiny(**EVERYTHING))
    documents = [document(8, 6), document(9, 5), document(10, 7)]
    before = losses(model, packed([*documents[0], *documents[1], *documents[2], BOS]))[0]
    documents[changed] = document(11, len(documents[changed]))
    after = losses(model, packed([*documents[0], *documents[1], *documents[2], BOS]))[0]
    owner = torch.arange(3).repeat_interleave(torch.tensor([6, 5, 7]))
    assert torch.equal(after[owner != changed], before[owner != changed])
    assert (after[owner == changed] != before[owner == changed]).all()


def test_a_document_has_the_same_losses_alone_and_at_any_offset_of_a_packed_row():
    model, ids = noisy(tiny(**EVERYTHING)), document(12, 9)
    alone = losses(model, packed([*ids, BOS]))[0]
    for before in (1, 4, 13):
        row = losses(model, packed([*document(13, before), *ids, *document(14, 6)], document(15, 30)))[0]
        torch.testing.assert_close(row[before:before + 9], alone, rtol=2e-5, atol=2e-5)


def test_a_row_that_starts_inside_a_document_is_a_piece_of_its_own():
    """Its first token takes nothing from the row before it: no smear, the bigram's last bucket, position 0."""
    model, ids = noisy(tiny(**EVERYTHING)), document(16, 12)[1:]
    below = hidden(model, packed(document(17, 11), ids))[1]
    torch.testing.assert_close(below, hidden(model, packed(ids))[0], rtol=2e-5, atol=2e-5)


# -- recording -----------------------------------------------------------------------------------------


class Spy(tg.Weights):
    """Plain weights that keep every input."""

    def __init__(self, model: tg.GPT, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        self.inputs: dict[tuple[str, int], list[Tensor]] = collections.defaultdict(list)

    def linear(self, name: str, visit: tg.Visit | None, x: Tensor, side: Tensor | None = None) -> Tensor:
        self.inputs[name, visit.block if visit else 0].append(x.detach().flatten(0, -2).double())
        return super().linear(name, visit, x, side)


@pytest.mark.parametrize("rank", [0, 6])
@torch.no_grad()
def test_recording_changes_no_bit_and_sums_all_visits(rank: int):
    cfg = tiny(num_loops=2, mlp_rank=rank)
    model, plan = noisy(cfg), tg.layer_plan(cfg, looped=True)
    batches = [batch_of(np.array([document(s, 20), document(s + 1, 20)])) for s in (18, 20)]
    recording, spy = tg.RecordingWeights(model, torch.float32), Spy(model, torch.float32)
    for batch in batches:
        out = [model.hidden(batch, plan, w) for w in (recording, spy)]
        nats = [model.losses(h.flatten(0, 1), batch.targets.flatten(), w) for h, w in zip(out, (recording, spy))]
        assert torch.equal(*out) and torch.equal(*nats)
    visits = {(name, i): 2 * (3 if name != "head" and 1 <= i <= 2 else 1) for name, i in recording.matrices}
    assert {key: len(inputs) for key, inputs in spy.inputs.items()} == visits
    assert recording.gram.keys() == spy.inputs.keys()
    for key, inputs in spy.inputs.items():
        x = torch.cat(inputs)
        torch.testing.assert_close(recording.gram[key].double(), x.T @ x, rtol=1e-5, atol=1e-4)


# -- plan, counts, start -------------------------------------------------------------------------------


def test_the_record_visits_its_blocks_in_the_known_order():
    on, off = (tg.layer_plan(tg.ModelKnobs(), looped) for looped in (True, False))
    assert [v.block for v in on] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [v.skip_from for v in on] == [None] * 8 + [7, 6, 5, 4, 3, 2, 1, 0, None]
    assert [v.skip_slot for v in on] == [None] * 8 + [0, 1, 2, 3, 4, 5, 6, 7, None]
    assert [v.block for v in off] == list(range(11))
    assert [v.skip_from for v in off] == [None] * 5 + [4, 3, 2, 1, 0, None]
    assert [v.lanes for v in off] == ["none"] * 8 + ["two"] * 3


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("layers,loops", [(2, 0), (4, 1), (5, 1), (6, 2), (7, 3)])
def test_every_encoder_visit_is_taken_up_once_and_every_slot_used_once(layers: int, loops: int, looped: bool):
    cfg = tiny(num_layers=layers, num_loops=loops, loop_start=1, loop_end=layers - 2, parallel_residual="none")
    plan = tg.layer_plan(cfg, looped)
    pairs = [(i, v.skip_from, v.skip_slot) for i, v in enumerate(plan) if v.skip_from is not None]
    encoder = len(plan) // 2
    assert pairs == [(encoder + j, encoder - 1 - j, j) for j in range(encoder)]
    assert all((v.skip_from is None) == (v.skip_slot is None) for v in plan)
    assert encoder <= tg.GPT(cfg).skip_weights.size(0) == tg.num_skips(cfg)


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("gates", [False, True])
def test_the_innermost_skips_stay_and_every_weight_of_them_is_trained(kept: int, gates: bool, run: tg.Run):
    cfg = tiny(max_skips=kept, skip_gates_enabled=gates)
    full = tg.layer_plan(tiny(), looped=True)
    for before, after in zip(full, tg.layer_plan(cfg, looped=True)):
        stays = before.skip_slot is not None and before.skip_slot < kept
        assert (after.skip_from, after.skip_slot) == ((before.skip_from, before.skip_slot) if stays else (None, None))
    model = noisy(cfg)
    assert model.skip_weights.shape == (kept, cfg.model_dim)
    model.total_loss(batch_of(np.array([document(0, 24)])), tg.layer_plan(cfg, looped=True), torch.float32).backward()
    assert not kept or bool((model.skip_weights.grad != 0).any(-1).all())
    tg.ShardedOptimizer(model, cfg, run).step(1.0, 0.9)  # also where there is none


def test_docstrings_show_what_happens():
    result = doctest.testmod(tg)
    assert result.attempted >= 2 and result.failed == 0


def test_the_record_has_the_known_number_of_parameters():
    counts = {name: p.numel() for name, p in tg.shapes_of(tg.ModelKnobs()).named_parameters()}
    large = {"qo_bank": 5_767_168, "kv_bank": 2_883_584, "mlp_up_bank": 11_534_336, "mlp_down_bank": 11_534_336,
             "tok_emb": 4_194_304}
    assert {name: counts[name] for name in large} == large
    assert sum(n for name, n in counts.items() if name not in large) == 31_943
    assert sum(counts.values()) == 35_945_671


def test_stored_tensors_partition_the_parameters():
    model = noisy(tiny(**EVERYTHING))
    stored = list(model.tensors())
    assert len({name for name, _, _ in stored}) == len(stored)
    elements = collections.Counter()
    for _, values, parameter in stored:
        elements[parameter] += values.numel()
    assert elements == {name: p.numel() for name, p in model.named_parameters()}
    matrices = {name: values for name, values, _ in stored}
    layers = model.cfg.num_layers
    for i in range(layers):
        assert torch.equal(matrices[f"blocks.{i}.q"], model.qo_bank[i])
        assert torch.equal(matrices[f"blocks.{i}.o"], model.qo_bank[layers + i])
        assert torch.equal(matrices[f"blocks.{i}.k"], model.kv_bank[i])
        assert torch.equal(matrices[f"blocks.{i}.v"], model.kv_bank[layers + i])
        assert torch.equal(matrices[f"blocks.{i}.up"], model.mlp_up_bank[i])
        assert torch.equal(matrices[f"blocks.{i}.down"], model.mlp_down_bank[i])
        assert torch.equal(matrices[f"blocks.{i}.down_in"], model.mlp_down_in_bank[i])


@pytest.mark.parametrize("knobs", [{}, EVERYTHING], ids=["record", "everything"])
def test_the_first_loss_is_that_of_a_uniform_guess(knobs: dict, run: tg.Run):
    cfg = tiny(**knobs)
    nats = losses(tg.build_model(cfg, run), batch_of(np.array([document(s, 33) for s in range(8)])))
    assert abs(nats.mean().item() - math.log(512)) < 0.02


@pytest.mark.parametrize("knobs", [{}, EVERYTHING], ids=["record", "everything"])
def test_every_parameter_is_float32_and_learns(knobs: dict, run: tg.Run):
    """Gradients reach all parameters from the first step on, and all rows and kinds once nothing is zero."""
    cfg = tiny(**knobs)
    batch = batch_of(np.array([document(s, 33) for s in range(8)]))
    for model, moving in ((tg.build_model(cfg, run), False), (noisy(cfg), True)):
        model.total_loss(batch, tg.layer_plan(cfg, looped=True), torch.float32).backward()
        for name, p in model.named_parameters():
            assert p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all(), name
            assert not moving or p.grad.any(), name
        assert not moving or all(p.grad[i].any() for p in (model.qo_bank, model.kv_bank) for i in range(p.size(0)))


def test_the_seed_alone_decides_the_initial_weights(run: tg.Run):
    cfg = tiny(**EVERYTHING, gated_attn_init_std=0.5)
    first = tg.build_model(cfg, run).state_dict()
    torch.rand(17)
    again, other = tg.build_model(cfg, run).state_dict(), tg.build_model(tiny(**EVERYTHING, seed=7), run).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tok_emb"], other["tok_emb"]) and not torch.equal(first["kv_bank"], other["kv_bank"])


def test_sums_of_losses_are_not_touched_by_padding(run: tg.Run):
    """A shorter row, padded, and a missing row contribute their own targets and nothing else."""
    model = noisy(tiny())
    full, short = document(22, 20), document(23, 8)
    plan = tg.layer_plan(model.cfg, looped=True)
    padded = tg.make_batch([np.array(r, dtype=np.uint16) for r in (full, short)], 4, 19)
    expected = losses(model, packed(full)).sum() + losses(model, packed(short)).sum()
    torch.testing.assert_close(model.total_loss(padded, plan, torch.float32), expected, rtol=1e-5, atol=1e-4)
