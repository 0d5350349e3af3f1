"""What ./run.sh check says of a run before it: layers, FLOPs, bytes, memory; and mistakes in one line."""
import pytest
import torch
from conftest import TINY, batch_of, tiny
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as tg
from tools import predict


def test_the_plan_of_the_record():
    """Blocks 3 to 5 run three times; from block 8 on in two lanes; the second half mixes in the first, innermost first.
    """
    cfg = tg.Config()
    assert predict.plan_text(tg.unroll_layers(cfg, False)) == "0 1 2 3 4 5<4 6<3 7<2 8=<1 9=<0 10="


def test_predicted_bytes_are_those_of_every_parameter_and_give_way_to_the_cap():
    cfg = tiny(artifact_bytes_cap=10 ** 7, bits_per_weight=8)
    sizes = predict.predicted_bytes(tg, cfg, 1000)
    for name, p in tg.shapes_of(cfg).named_parameters():
        if tg.route(name).stored == "fp16":
            sizes["fp16"] -= 2 * p.numel()
        elif tg.route(name).stored == "int8":
            sizes["int8"] -= p.numel()
        else:
            sizes[tg.route(name).stored.removeprefix("gptq:")] -= p.numel()
    assert sizes.pop("scales") > 0 and set(sizes.values()) == {0}
    tight = predict.predicted_bytes(tg, tiny(artifact_bytes_cap=20_000, bits_per_weight=8), 1000)
    assert sum(tight.values()) == pytest.approx(19_000, abs=5)


def test_fewer_bits_and_coarser_clips_are_fewer_bytes():
    def codes(**knobs: object) -> int:
        return predict.predicted_bytes(tg, tiny(quant="sdclip", artifact_bytes_cap=10 ** 7, **knobs), 0)["mlp"]

    assert codes(matrix_bits=4) < codes(matrix_bits=6) and codes(mlp_clip_sigmas=20) < codes(mlp_clip_sigmas=10)


def test_memory_grows_with_what_each_knob_holds(run):
    """The stretch whose knob is raised needs more; a checkpoint holds weights, their average and the optimizer."""
    base = predict.predicted_memory(tg, tiny(), run, 1000)
    assert set(base) == {"train", "quantize", "evaluate", "adapt", "shared_sgd"}
    for stretch, knobs in {"train": dict(micro_batch_tokens=384), "evaluate": dict(val_batch_tokens=1 << 16),
                           "adapt": dict(ttt_batch_size=4096)}.items():
        assert predict.predicted_memory(tg, tiny(**knobs), run, 1000)[stretch] > base[stretch]
        assert predict.MEMORY_KNOBS[stretch] in knobs
    weights = 4 * sum(p.numel() for p in tg.shapes_of(tiny()).parameters())
    assert 3 * weights < predict.checkpoint_bytes(tg, tiny()) < 4 * weights + (1 << 17)


@pytest.mark.parametrize("knobs, status, said", [
    ([], 0, "warning: the data are not ready"), (["NUM_HEADS=3"], 2, "MODEL_DIM=32"),
    (["SEEDS=1"], 2, "did you mean SEED?"), (["NPROC=0"], 2, "NPROC=0: exp"),
    (["LOG_DIR=run.sh/x"], 0, "run.sh is no folder"), (["EVAL_ONLY=x.bin"], 2, "EVAL_ONLY"),
    (["BETA1=0.5"], 0, "BETA1: no effect"), (["ARTIFACT_BYTES_CAP=9"], 2, "ARTIFACT_BYTES_CAP=9: code takes")])
def test_on_the_command_line(knobs, status, said, called):
    tiny_knobs = [f"{name.upper()}={value}" for name, value in TINY.items() if name.upper() not in str(knobs)]
    ended, out, err = called(predict.main, "check", *tiny_knobs, "DATA_DIR=/nowhere", *knobs)
    assert ended == status and said in (err if status else out), out + err
    if status:
        assert out == "" and err.startswith("check: ") and err.count("\n") == 1
    else:
        assert "predicted artifact:" in out and "loop on" in out and "qo_bank" in out


@pytest.mark.parametrize("knobs", [
    {}, dict(bigram_buckets=64, bigram_dim=24, num_kv_heads=2, mlp_mult=3)])
def test_flops_are_those_that_torch_counts(knobs: dict, run: tg.Run):
    """Backward of a model without gates: twice the forward's products; attention computes all T keys of a row."""
    cfg = tiny(attn_gate="none", smear_gate_enabled=False, **knobs)
    model, batch, layers = tg.GPT(cfg), batch_of(torch.randint(2, 512, (3, 33)).numpy()), tg.unroll_layers(cfg, True)
    model.kernels = tg.pick_kernels(cfg, run)
    with FlopCounterMode(display=False) as counter:
        loss = model.total_loss(batch, layers, torch.float32)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    products = 3 * 32 * predict.forward_flops(cfg, layers, 0)  # without attention's, which a kernel may hide
    assert forward >= products and counter.get_total_flops() >= 2 * products
    attention = 3 * 32 * (predict.forward_flops(cfg, layers, 32) - predict.forward_flops(cfg, layers, 0))
    assert forward in (products, products + attention)
