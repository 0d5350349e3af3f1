"""The forward against a float64 restatement of its definition; causality, isolation of documents, unrolled layers."""
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
# Knobs that give the tiny model a parameter of every kind.
EVERYTHING = dict(attn_gate="dense", gated_attn_bias=1.5, bigram_buckets=16, bigram_dim=6, mlp_rank=12)
BY_HAND = tg.Kernels(rms_norm=tg.EagerRmsNorm.apply)  # what an eager run has; a new model has the references


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


def looped_layers(model: tg.GPT) -> tuple[tg.Layer, ...]:
    return tg.unroll_layers(model.cfg, looped=True)


def logits_of(model: tg.GPT, batch: tg.Batch, w: tg.Weights | None = None) -> Tensor:
    """[M, V] before the softcap, the loop on."""
    w = w or tg.Weights(model, torch.float32)
    return w.linear("head", None, model(batch, looped_layers(model), w)).flatten(0, 1)


def nats_of(model: tg.GPT, batch: tg.Batch, w: tg.Weights | None = None) -> Tensor:
    """[R, T] losses."""
    flat = tg.softcapped_cross_entropy(logits_of(model, batch, w), batch.targets.flatten(), model.cfg.logit_softcap)
    return flat.view_as(batch.targets)


@torch.no_grad()
def hidden(model: tg.GPT, batch: tg.Batch) -> Tensor:
    return model(batch, looped_layers(model), tg.Weights(model, torch.float32))


@torch.no_grad()
def losses(model: tg.GPT, batch: tg.Batch) -> Tensor:
    return nats_of(model, batch)


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
            e[t] += p["smear_lambda"] * sigmoid(p["smear_gate"][0] @ raw[t, :tg.GATE_CHANNELS]) * raw[t - 1]
        if cfg.bigram_buckets:
            last = cfg.bigram_buckets - 1
            bucket = ((36313 * ids[t]) ^ (27191 * ids[t - 1])) % last if t > 0 else last
            e[t] += p["bigram.scale"] * (p["bigram.proj"] @ p["bigram.table"][bucket])
    return rms(e)


def rope(x: np.ndarray, position: int, cfg: tg.ModelKnobs) -> np.ndarray:
    """One head's vector, turned; pairs are (j, j + ROPE_DIMS / 2)."""
    dims, x = cfg.rope_dims, x.copy()
    for j in range(dims // 2):
        angle = position * cfg.rope_base ** (-2 * j / dims)
        a, b = x[j], x[j + dims // 2]
        x[j], x[j + dims // 2] = a * math.cos(angle) + b * math.sin(angle), b * math.cos(angle) - a * math.sin(angle)
    return x


def reference_attention(p: dict[str, np.ndarray], cfg: tg.ModelKnobs, i: int, n: np.ndarray) -> np.ndarray:
    layers, heads, width, few = cfg.num_layers, cfg.num_heads, cfg.head_dim, n[:, :tg.GATE_CHANNELS]
    q, k, v = ((n @ m.T).reshape(len(n), -1, width)
               for m in (p["qo_bank"][i], p["kv_bank"][i], p["kv_bank"][layers + i]))
    y = np.zeros_like(q)
    for h in range(heads):
        group = h // (heads // cfg.num_kv_heads)
        keys = np.array([rope(rms(k[t, group]), t, cfg) for t in range(len(n))])
        for t in range(len(n)):
            query = p["q_gain"][i, h] * rope(rms(q[t, h]), t, cfg)
            weights = np.exp(keys[:t + 1] @ query / math.sqrt(width))
            y[t, h] = weights @ v[:t + 1, group] / weights.sum()
            if i >= layers - cfg.xsa_last_n:
                direction = v[t, group] / np.linalg.norm(v[t, group])
                y[t, h] -= (y[t, h] @ direction) * direction
            if cfg.attn_gate == "output":
                y[t, h] *= 2 * sigmoid(p["gate.weight"][i, h] @ few[t])
            elif cfg.attn_gate == "sparse":
                y[t, h] *= sigmoid(0.5 * (p["gate.weight"][i, h] @ few[t]))
            elif cfg.attn_gate == "dense":
                y[t, h] *= sigmoid(p["gate.weight"][i, h] @ n[t] + p.get("gate.bias", np.zeros((layers, heads)))[i, h])
    return p["attn_scale"][i] * (y.reshape(len(n), -1) @ p["qo_bank"][layers + i].T)


def reference_mlp(p: dict[str, np.ndarray], cfg: tg.ModelKnobs, i: int, z: np.ndarray) -> np.ndarray:
    up, down = p["mlp_up_bank"][i], p["mlp_down_bank"][i]
    if cfg.mlp_rank:
        up, down = up @ p["mlp_up_in_bank"][i], down @ p["mlp_down_in_bank"][i]
    a = z @ up.T
    return p["mlp_scale"][i] * ((np.maximum(a, 0) + cfg.mlp_slope * np.minimum(a, 0)) ** 2 @ down.T)


def reference_hidden(p: dict[str, np.ndarray], cfg: tg.ModelKnobs, ids: list[int], looped: bool) -> np.ndarray:
    """Final hidden states of one document; spec of record #1855 with its variants."""
    first, last = cfg.loop_start, cfg.loop_end
    order = list(range(cfg.num_layers))
    if looped and cfg.num_loops:
        order = [*range(first), *list(range(first, last + 1)) * (cfg.num_loops + 1), *range(last + 1, cfg.num_layers)]
    x = x0 = reference_embedding(p, cfg, ids)
    other, saved = None, []
    for number, i in enumerate(order):
        decoder = number - len(order) // 2
        lanes = cfg.parallel_residual if i >= cfg.parallel_start_layer else "none"
        if lanes == "two" and other is None:
            other = x
        if decoder >= 0 and saved:
            skip = p["skip_weights"][decoder] * saved.pop()
            x = x + skip
            if cfg.skip_gates_enabled:
                g = sigmoid(p["skip_gates"][decoder])
                x = (1 - g) * skip + g * (x - skip)
        s = 1 / math.sqrt(i + 1) if cfg.ln_scale else 1.0
        u = p["resid_mix"][i, 0] * x + p["resid_mix"][i, 1] * x0
        a = reference_attention(p, cfg, i, s * rms(u))
        if lanes == "none":
            x = u + a + reference_mlp(p, cfg, i, s * rms(u + a))
        elif lanes == "single":
            x = u + a + reference_mlp(p, cfg, i, s * rms(u))
        else:
            m = reference_mlp(p, cfg, i, s * rms(other))
            (r0, r1), ((p00, p01), (p10, p11)) = p["parallel_resid_lambdas"][i], p["parallel_post_lambdas"][i]
            x, other = r0 * x + p00 * a + p10 * m, r1 * other + p01 * a + p11 * m
        if decoder < 0:
            saved.append(x)
    return rms(x if other is None else 0.5 * (x + other))


def reference_losses(p: dict[str, np.ndarray], cfg: tg.ModelKnobs, h: np.ndarray, targets: list[int]) -> list[float]:
    z = cfg.logit_softcap * np.tanh(h @ p["tok_emb"].T / cfg.logit_softcap)
    return [math.log(np.exp(row).sum()) - row[y] for row, y in zip(z, targets)]


VARIANTS = {
    "as the record": {},
    "no gate, xsa nowhere": dict(attn_gate="none", xsa_last_n=0),
    "output gate, four heads on two": dict(attn_gate="output", num_heads=4, num_kv_heads=2),
    "dense gate, as many kv heads": dict(attn_gate="dense", num_kv_heads=2),
    "dense gate with bias": dict(attn_gate="dense", gated_attn_bias=1.5),
    "one lane, added skips": dict(parallel_residual="none", skip_gates_enabled=False),
    "parallel on one lane": dict(parallel_residual="single", parallel_start_layer=1),
    "two lanes from the encoder on": dict(parallel_start_layer=1),
    "two lanes from the first block on, no loop": dict(parallel_start_layer=0, num_loops=0),
    "three passes": dict(num_loops=2, num_layers=5, loop_start=1, loop_end=3, parallel_start_layer=4),
    "odd number of blocks": dict(num_layers=3, loop_start=1, loop_end=1, parallel_start_layer=2, xsa_last_n=2),
    "low-rank MLP, no smear": dict(mlp_rank=5, smear_gate_enabled=False),
    "bigram, no ln scale": dict(bigram_buckets=16, bigram_dim=6, ln_scale=False),
    "no rope": dict(rope_dims=0),
    "rope on all dimensions": dict(rope_dims=16),
    "other constants": dict(mlp_slope=0.2, mlp_mult=1.5, logit_softcap=5, rope_base=100),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_losses_equal_the_restatement_document_by_document(name: str):
    """With the references and by hand, the loop off and on."""
    cfg = tiny(**VARIANTS[name])
    model = noisy(cfg)
    p = {n: v.detach().double().numpy() for n, v in model.named_parameters()}
    documents = [document(1, 7), document(2, 1), document(3, 5)]
    row = [i for d in documents for i in d] + [BOS]
    batch, w = packed(row, document(4, 9)), tg.Weights(model, torch.float32)
    for looped in (False, True):
        expected = np.concatenate([reference_hidden(p, cfg, ids, looped) for ids in documents])
        for kernels in (tg.Kernels(), BY_HAND):
            model.kernels = kernels
            with torch.no_grad():
                states = model(batch, tg.unroll_layers(cfg, looped), w)[0]
                nats = tg.softcapped_cross_entropy(w.linear("head", None, states), batch.targets[0], cfg.logit_softcap)
            assert states.dtype == nats.dtype == torch.float32
            np.testing.assert_allclose(states, expected, rtol=0, atol=2e-5)
            np.testing.assert_allclose(nats, reference_losses(p, cfg, expected, row[1:]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("knobs", [{}, EVERYTHING, dict(rope_dims=0, attn_gate="none", num_heads=4, num_kv_heads=2)],
                         ids=["record", "everything", "few parts"])
def test_gradients_by_hand_are_those_of_the_references(knobs: dict):
    """Of every parameter, with segments, padding and a looped block in the batch."""
    grads, cfg = [], tiny(**knobs)
    batch = packed([*document(1, 7), *document(2, 1), *document(3, 9), BOS], document(4, 9))
    for kernels in (tg.Kernels(), BY_HAND):
        model = noisy(cfg)
        model.kernels = kernels
        model.total_loss(batch, looped_layers(model), torch.float32).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kernels", [tg.Kernels(), BY_HAND], ids=["references", "by hand"])
def test_bfloat16_is_near_float32(kernels: tg.Kernels):
    """Loss and gradient; parameters and their gradients stay fp32."""
    model, batch, results = noisy(tiny(**EVERYTHING), scale=0.1), packed([*document(1, 7), *document(2, 24), BOS]), []
    model.kernels = kernels
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        loss = model.total_loss(batch, looped_layers(model), dtype)
        loss.backward()
        assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in model.parameters())
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, grad), (rounded_loss, rounded_grad) = results
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


def test_a_row_that_starts_inside_a_document_is_a_segment_of_its_own():
    """Its first token takes nothing from the row before it: no smear, the bigram's last bucket, position 0."""
    model, ids = noisy(tiny(**EVERYTHING)), document(16, 12)[1:]
    below = hidden(model, packed(document(17, 11), ids))[1]
    torch.testing.assert_close(below, hidden(model, packed(ids))[0], rtol=2e-5, atol=2e-5)


# -- recording -----------------------------------------------------------------------------------------


class Spy(tg.Weights):
    """Plain weights that keep every input."""
    plain = False

    def __init__(self, model: tg.GPT, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        self.inputs: dict[tuple[str, int], list[Tensor]] = collections.defaultdict(list)

    def linear(self, name: str, layer: tg.Layer | None, x: Tensor, side: Tensor | None = None) -> Tensor:
        self.inputs[name, layer.block if layer else 0].append(x.detach().flatten(0, -2).double())
        return super().linear(name, layer, x, side)


@pytest.mark.parametrize("rank", [0, 6])
@torch.no_grad()
def test_recording_changes_no_bit_and_sums_all_layers(rank: int):
    model = noisy(tiny(num_loops=2, mlp_rank=rank))
    recording, spy = tg.RecordingWeights(model, torch.float32), Spy(model, torch.float32)
    for seed in (18, 20):
        batch = batch_of(np.array([document(seed, 20), document(seed + 1, 20)]))
        assert torch.equal(*(nats_of(model, batch, w) for w in (recording, spy)))
    layers = {(name, i): 2 * (1 + 2 * (name != "head" and 1 <= i <= 2)) for name, i in recording.matrices}
    assert {key: len(inputs) for key, inputs in spy.inputs.items()} == layers
    assert recording.gram.keys() == spy.inputs.keys()
    for key, inputs in spy.inputs.items():
        x = torch.cat(inputs)
        assert recording.tokens[key] == len(x)
        torch.testing.assert_close(recording.gram[key].double(), x.T @ x, rtol=1e-5, atol=1e-4)


# -- layers, counts, start -----------------------------------------------------------------------------


def test_the_record_runs_its_blocks_in_the_known_order():
    on, off = (tg.unroll_layers(tg.ModelKnobs(), looped) for looped in (True, False))
    assert [v.block for v in on] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [v.skip_from for v in on] == [None] * 8 + [7, 6, 5, 4, 3, 2, 1, 0, None]
    assert [v.skip_slot for v in on] == [None] * 8 + [0, 1, 2, 3, 4, 5, 6, 7, None]
    assert [v.block for v in off] == list(range(11))
    assert [v.skip_from for v in off] == [None] * 5 + [4, 3, 2, 1, 0, None]
    assert [v.lanes for v in off] == ["none"] * 8 + ["two"] * 3


@pytest.mark.parametrize("layers, loops", [(2, 0), (4, 1), (5, 1), (6, 2), (7, 3)])
def test_every_encoder_layer_is_taken_up_once_and_every_slot_used_once(layers: int, loops: int):
    cfg = tiny(num_layers=layers, num_loops=loops, loop_start=1, loop_end=layers - 2, parallel_residual="none")
    for looped in (False, True):
        unrolled = tg.unroll_layers(cfg, looped)
        pairs = [(i, v.skip_from, v.skip_slot) for i, v in enumerate(unrolled) if v.skip_from is not None]
        encoder = len(unrolled) // 2
        assert pairs == [(encoder + j, encoder - 1 - j, j) for j in range(encoder)]
        assert all((v.skip_from is None) == (v.skip_slot is None) and v.number == i for i, v in enumerate(unrolled))
    assert encoder == tg.GPT(cfg).skip_weights.size(0)


def test_docstrings_show_what_happens():
    result = doctest.testmod(tg)
    assert result.attempted >= 2 and result.failed == 0


def test_the_record_has_the_known_number_of_parameters():
    counts = {name: p.numel() for name, p in tg.shapes_of(tg.ModelKnobs()).named_parameters()}
    large = {"qo_bank": 5_767_168, "kv_bank": 2_883_584, "mlp_up_bank": 11_534_336, "mlp_down_bank": 11_534_336,
             "tok_emb": 4_194_304}
    assert {name: counts[name] for name in large} == large
    assert sum(counts.values()) == 35_945_671


def test_stored_tensors_partition_the_parameters():
    """A matrix is the row of its bank that the table of matrices says; sizes are those of the table, too."""
    model = noisy(tiny(**EVERYTHING))
    stored, layers, elements = list(model.tensors()), model.cfg.num_layers, collections.Counter()
    for _, values, parameter in stored:
        elements[parameter] += values.numel()
    assert elements == {name: p.numel() for name, p in model.named_parameters()}
    matrices = {name: values for name, values, _ in stored}
    assert len(matrices) == len(stored)
    places = {"q": ("qo", 0), "o": ("qo", 1), "k": ("kv", 0), "v": ("kv", 1), "up": ("mlp_up", 0),
              "down": ("mlp_down", 0), "up_in": ("mlp_up_in", 0), "down_in": ("mlp_down_in", 0)}
    assert places.keys() == tg.MATRICES.keys() == tg.matrix_shapes(model.cfg).keys()
    assert tg.matrix_shapes(tiny()).keys() == places.keys() - {"up_in", "down_in"}
    for name, (bank, half) in places.items():
        for i in range(layers):
            values = matrices[f"blocks.{i}.{name}"]
            assert torch.equal(values, getattr(model, f"{bank}_bank")[half * layers + i])
            rows, inputs = tg.matrix_shapes(model.cfg)[name]
            assert values.shape == (rows.stop - rows.start, inputs)


@pytest.mark.parametrize("knobs", [{}, EVERYTHING], ids=["record", "everything"])
def test_a_new_model_guesses_uniformly_and_every_parameter_learns(knobs: dict, run: tg.Run):
    """Gradients reach all parameters from the first step on, and all rows and kinds once nothing is zero."""
    cfg = tiny(**knobs)
    batch = batch_of(np.array([document(s, 33) for s in range(8)]))
    assert abs(losses(tg.build_model(cfg, run), batch).mean().item() - math.log(512)) < 0.02
    for model, moving in ((tg.build_model(cfg, run), False), (noisy(cfg), True)):
        model.total_loss(batch, looped_layers(model), torch.float32).backward()
        for name, p in model.named_parameters():
            assert p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all(), name
            assert not moving or p.grad.any(), name
        assert not moving or all(p.grad[i].any() for p in (model.qo_bank, model.kv_bank) for i in range(p.size(0)))


def test_the_seed_alone_decides_the_initial_weights(run: tg.Run):
    cfg = tiny(**EVERYTHING)
    first = tg.build_model(cfg, run).state_dict()
    torch.rand(17)
    again, other = tg.build_model(cfg, run).state_dict(), tg.build_model(tiny(**EVERYTHING, seed=7), run).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in ("tok_emb", "kv_bank", "gate.weight")
               if first[name].any())


def test_sums_of_losses_are_not_touched_by_padding():
    """A shorter row, padded, and a missing row contribute their own targets and nothing else."""
    model, full, short = noisy(tiny()), document(22, 20), document(23, 8)
    padded = tg.make_batch([np.array(r, dtype=np.uint16) for r in (full, short)], 4, 19)
    expected = losses(model, packed(full)).sum() + losses(model, packed(short)).sum()
    torch.testing.assert_close(model.total_loss(padded, looped_layers(model), torch.float32), expected,
                               rtol=1e-5, atol=1e-4)
