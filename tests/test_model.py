"""The forward against a float64 restatement of its definition; causality, isolation of documents, unrolled layers."""
import collections
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import batch_of, tiny
from torch import Tensor

import train_gpt as tg

BOS = tg.BOS_ID
# Knobs that give the tiny model a parameter of every kind.
EVERYTHING = dict(attn_gate="dense", gated_attn_bias=1.5, bigram_buckets=16, bigram_dim=6, conv_taps=3)


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


def convolved(x: np.ndarray, taps: np.ndarray | None) -> np.ndarray:
    """x [T, C] plus taps [K, C] times itself and the tokens before it."""
    y = x.copy()
    for t, j in itertools.product(range(len(x)), range(0 if taps is None else len(taps))):
        y[t] += taps[j] * x[t - j] if j <= t else 0
    return y


def reference_attention(p: dict[str, np.ndarray], cfg: tg.ModelKnobs, i: int, n: np.ndarray) -> np.ndarray:
    layers, heads, width, few = cfg.num_layers, cfg.num_heads, cfg.head_dim, n[:, :tg.GATE_CHANNELS]
    taps = np.split(p["kv_conv"][i], 2, axis=-1) if cfg.conv_taps else [None, None]
    q, k, v = (convolved(n @ m.T, own).reshape(len(n), -1, width) for m, own in zip(
        (p["qo_bank"][i], p["kv_bank"][i], p["kv_bank"][layers + i]), [None, *taps]))
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
    up, down, z = p["mlp_up_bank"][i], p["mlp_down_bank"][i], convolved(z, p["mlp_conv"][i] if cfg.conv_taps else None)
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
    "no gate, xsa nowhere, no rope": dict(attn_gate="none", xsa_last_n=0, rope_dims=0),
    "output gate, four heads on two": dict(attn_gate="output", num_heads=4, num_kv_heads=2),
    "dense gate, as many kv heads, rope on all dimensions": dict(attn_gate="dense", num_kv_heads=2, rope_dims=16),
    "dense gate with bias, other constants": dict(attn_gate="dense", gated_attn_bias=1.5, mlp_slope=0.2, mlp_mult=1.5,
                                                  logit_softcap=5, rope_base=100),
    "one lane, added skips": dict(parallel_residual="none", skip_gates_enabled=False),
    "parallel on one lane": dict(parallel_residual="single", parallel_start_layer=1),
    "two lanes from the encoder on": dict(parallel_start_layer=1),
    "two lanes from the first block on, no loop": dict(parallel_start_layer=0, num_loops=0),
    "three passes": dict(num_loops=2, num_layers=5, loop_start=1, loop_end=3, parallel_start_layer=4),
    "odd number of blocks": dict(num_layers=3, loop_start=1, loop_end=1, parallel_start_layer=2, xsa_last_n=2),
    "no smear": dict(smear_gate_enabled=False),
    "bigram, no ln scale": dict(bigram_buckets=16, bigram_dim=6, ln_scale=False),
}


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_losses_equal_the_restatement_document_by_document(name: str):
    """With the loop off and on; a row that starts inside a document knows nothing of it."""
    cfg = tiny(**VARIANTS[name])
    model = noisy(cfg)
    p = {n: v.detach().double().numpy() for n, v in model.named_parameters()}
    documents, inside = [document(1, 7), document(2, 1), document(3, 5)], document(4, 9)[1:]
    row = [i for d in documents for i in d] + [BOS]
    batch, w, targets = packed(row, inside), tg.Weights(model, torch.float32), row[1:] + inside[1:]
    for looped in (False, True):
        expected = np.concatenate([reference_hidden(p, cfg, ids, looped) for ids in (*documents, inside[:-1])])
        states = model(batch, tg.unroll_layers(cfg, looped), w).flatten(0, 1)[:len(targets)]
        nats = tg.softcapped_cross_entropy(w.linear("head", None, states), torch.tensor(targets), cfg.logit_softcap)
        assert states.dtype == nats.dtype == torch.float32
        np.testing.assert_allclose(states, expected, rtol=0, atol=2e-5)
        np.testing.assert_allclose(nats, reference_losses(p, cfg, expected, targets), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("knobs", [{}, EVERYTHING, dict(rope_dims=0, attn_gate="none", num_heads=4, num_kv_heads=2)],
                         ids=["record", "everything", "few parts"])
def test_gradients_in_bfloat16_are_near_those_in_fp32(knobs: dict):
    """With segments, padding and a looped block in the batch; every gradient is kept in fp32."""
    cfg, results = tiny(**knobs), []
    batch = packed([*document(1, 7), *document(2, 1), *document(3, 9), BOS], document(4, 9))
    for dtype in (torch.float32, torch.bfloat16):
        model = noisy(cfg, scale=0.1)
        loss = model.total_loss(batch, looped_layers(model), dtype)
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        assert all(t.dtype == torch.float32 for t in (loss, *grads.values()))
        results.append((loss.item(), torch.cat([grad.flatten() for grad in grads.values()])))
    (loss, flat), (rounded_loss, rounded) = results
    assert rounded_loss == pytest.approx(loss, rel=0.01)
    assert torch.cosine_similarity(flat, rounded, dim=0) > 0.99


@torch.no_grad()
@pytest.mark.parametrize("knobs", [{}, EVERYTHING], ids=["record", "everything"])
def test_an_id_is_seen_from_its_place_to_the_end_of_its_document_and_nowhere_else(knobs: dict):
    """Not to a bit: neither by earlier ids nor by the tokens next to a boundary, with smear, bigram and positions."""
    model, ids = noisy(tiny(**knobs)), [*document(8, 6), *document(9, 5), *document(10, 7), BOS]
    w, layers = tg.Weights(model, torch.float32), looped_layers(model)
    before = model(packed(ids), layers, w)
    for at, end in ((1, 6), (5, 6), (8, 11), (12, 18), (17, 18)):
        changed = [*ids[:at], 3 + ids[at] % 500, *ids[at + 1:]]
        seen = (model(packed(changed), layers, w) != before)[0].any(-1)
        assert seen.nonzero().flatten().tolist() == list(range(at, end))


# -- recording -----------------------------------------------------------------------------------------

@torch.no_grad()
def test_recording_changes_no_bit_and_sums_the_input_of_every_product_of_all_layers():
    """Weights that are listened to take every product by itself, whatever kernel there is for several."""
    model, inputs = noisy(tiny(num_loops=2)), collections.defaultdict(list)

    class Spy(tg.Weights):
        plain = False

        def linear(self, name: str, layer: tg.Layer | None, x: Tensor, side: Tensor | None = None) -> Tensor:
            inputs[name, layer.block if layer else 0].append(x.flatten(0, -2).double())
            return super().linear(name, layer, x, side)

    model.kernels = tg.Kernels(mlp=lambda *args: pytest.fail("not by itself"))
    recording, spy = tg.RecordingWeights(model, torch.float32), Spy(model, torch.float32)
    for seed in (18, 20):
        batch = batch_of(np.array([document(seed, 20), document(seed + 1, 20)]))
        assert torch.equal(*(nats_of(model, batch, w) for w in (recording, spy)))
    layers = {(name, i): 2 * (1 + 2 * (name != "head" and 1 <= i <= 2)) for name, i in recording.matrices}
    assert {key: len(of) for key, of in inputs.items()} == layers and recording.gram.keys() == inputs.keys()
    for key, of in inputs.items():
        x = torch.cat(of)
        assert recording.tokens[key] == len(x)
        torch.testing.assert_close(recording.gram[key].double(), x.T @ x, rtol=1e-5, atol=1e-4)


# -- layers, counts, start -----------------------------------------------------------------------------

def test_the_record_has_the_known_parameters_and_runs_its_blocks_in_the_known_order():
    counts = {name: p.numel() for name, p in tg.shapes_of(tg.ModelKnobs()).named_parameters()}
    more = counts["kv_conv"] + counts["mlp_conv"]  # not the record's
    assert counts["qo_bank"] == 5_767_168 and sum(counts.values()) - more == 35_945_671 and more == 45_056
    on, off = (tg.unroll_layers(tg.ModelKnobs(), looped) for looped in (True, False))
    assert [v.block for v in on] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [v.skip_from for v in on] == [None] * 8 + [7, 6, 5, 4, 3, 2, 1, 0, None]
    assert [v.skip_slot for v in on] == [None] * 8 + [0, 1, 2, 3, 4, 5, 6, 7, None]
    assert [v.block for v in off] == [v.number for v in off] == list(range(11))
    assert [v.skip_from for v in off] == [None] * 5 + [4, 3, 2, 1, 0, None]
    assert [v.lanes for v in off] == ["none"] * 8 + ["two"] * 3


def test_stored_tensors_partition_the_parameters():
    """A matrix is the row of its bank that the table of matrices says; sizes are those of the table, too."""
    model = noisy(tiny(**EVERYTHING))
    stored, elements = {}, collections.Counter()
    for name, values, parameter in model.tensors():
        elements[parameter] += values.numel() * (name not in stored)
        stored[name] = values
    assert elements == {name: p.numel() for name, p in model.named_parameters()}
    places = {"q": ("qo", 0), "o": ("qo", 1), "k": ("kv", 0), "v": ("kv", 1), "up": ("mlp_up", 0),
              "down": ("mlp_down", 0)}
    assert places.keys() == tg.MATRICES.keys() == tg.matrix_shapes(model.cfg).keys()
    for name, (bank, half) in places.items():
        rows, inputs = tg.matrix_shapes(model.cfg)[name]
        for i in range(model.cfg.num_layers):
            values = stored[f"blocks.{i}.{name}"]
            assert torch.equal(values, getattr(model, f"{bank}_bank")[half * model.cfg.num_layers + i])
            assert values.shape == (rows.stop - rows.start, inputs)


@pytest.mark.parametrize("knobs", [{}, EVERYTHING, dict(num_layers=2, num_loops=0, parallel_start_layer=1),
                                   dict(num_layers=2, num_loops=0, parallel_start_layer=0),
                                   dict(num_loops=3, loop_start=0, loop_end=2, parallel_residual="none")], ids=str)
def test_a_new_model_guesses_uniformly_and_every_parameter_of_any_topology_learns(knobs: dict, run: tg.Run):
    """Loop off and on: gradients reach all parameters from the first step on, and all kinds once nothing is zero."""
    cfg, batch = tiny(**knobs), batch_of(np.array([document(s, 33) for s in range(8)]))
    assert abs(losses(tg.build_model(cfg, run), batch).mean().item() - math.log(512)) < 0.02
    for looped, moving in itertools.product((False, True), (False, True)):
        model = noisy(cfg) if moving else tg.build_model(cfg, run)
        model.total_loss(batch, tg.unroll_layers(cfg, looped), torch.float32).backward()
        for name, p in model.named_parameters():
            assert p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all(), name
            assert not moving or p.grad.any(), name
        assert not moving or all(p.grad[i].any() for p in (model.qo_bank, model.kv_bank) for i in range(p.size(0)))
        assert math.isfinite(tg.ShardedOptimizer(model, cfg, run).step(1.0, 0.9))
