"""Variables of published run commands become knobs; what has no effect is named, what is misspelt refused."""
import re

import pytest
from conftest import refusal

from tools import foreign, knobs

NAMES = {knob.name for knob in knobs.read()}


def variables(command: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in command.split())


def refused(env: str, typed: tuple[str, ...] = ()) -> str:
    """The one line that refuses this environment."""
    return refusal(foreign.translate, variables(env), typed)


COMMANDS = {
    1285: "NCCL_NET=Socket DATA_DIR=./data SEED=42 MIXED_QUANT=1 N_INT6_LAYERS=66 MUON_WD=0.090 EMBED_WD=0.090 "
          "RECUR_LAYERS=4,5",
    1493: "SEED=42 QK_GAIN_INIT=5.25 TTT_ENABLED=1 TTT_LR=0.005 TTT_EPOCHS=3",
    1514: "NCCL_NET=Socket MUON_MOMENTUM=0.97 QK_GAIN_INIT=5.0 PARALLEL_RESIDUAL_START=7 LOOP_START=3 LOOP_END=5 "
          "TTT_ENABLED=1 TTT_LR=0.005 TTT_EPOCHS=3 TTT_CHUNK_TOKENS=32768 TTT_FREEZE_BLOCKS=0 NGRAM_TILT_ENABLED=1 "
          "NGRAM_WITHIN_BETA=0.0 NGRAM_WORD_BETA=0.0 SEED=1234",
    1855: "DATA_DIR=./data VOCAB_SIZE=8192 DATA_PATH=./data/datasets/fineweb10B_sp8192 TOKENIZER_PATH=x.model "
          "CASEOPS_ENABLED=1 ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600 PHASED_TTT_ENABLED=1 EMBED_BITS=7 "
          "MATRIX_LR=0.026 TTT_CHUNK_SIZE=48 GLOBAL_TTT_MOMENTUM=0.9 BETA2=0.99 TTT_BETA2=0.99 TTT_WEIGHT_DECAY=0.5 "
          "SPARSE_ATTN_GATE_SCALE=0.5 VAL_LOSS_EVERY=0 GATED_ATTN_QUANT_GATE=1 SPARSE_ATTN_GATE_ENABLED=1 "
          "GATE_WINDOW=12 SMEAR_GATE_ENABLED=1 LQER_ENABLED=1 LQER_RANK=4 LQER_TOP_K=3 FUSED_CE_ENABLED=1 "
          "COMPRESSOR=pergroup NCCL_NET=Socket SEED=42",
}
MAPPED = {"MIXED_QUANT": "QUANT=sdclip", "RECUR_LAYERS": "LOOP_START=4 LOOP_END=5 NUM_LOOPS=1", "NGRAM_TILT_ENABLED":
          "NGRAM_BASE_BETA=2", "PARALLEL_RESIDUAL_START": "PARALLEL_RESIDUAL=single PARALLEL_START_LAYER=7",
          "SPARSE_ATTN_GATE_ENABLED": "ATTN_GATE=sparse", "TTT_ENABLED": "", "PHASED_TTT_ENABLED": ""}
NEAREST = {1285: "pr1260", 1493: "pr1514", 1514: "pr1514", 1855: "pr1855"}
SILENT = set("TTT_FREEZE_BLOCKS GLOBAL_TTT_MOMENTUM TTT_BETA2 SPARSE_ATTN_GATE_SCALE GATE_WINDOW".split())
"""Set to what is done anyway."""


@pytest.mark.parametrize("record", COMMANDS)
def test_no_variable_of_a_records_command_vanishes(record):
    """Each is a knob, mapped, what is done anyway, or named in exactly one warning; NCCL_NET is none of ours."""
    env = variables(COMMANDS[record])
    ours, warnings = foreign.translate(env, env)
    if any("->" in warning for warning in warnings):
        mapped = warnings.pop(0)
        assert f"`./run.sh train records/{NEAREST[record]}` has the knobs of the record nearest" in mapped
    assert all(re.fullmatch(r"[A-Z0-9_, ]+: no effect here: .{10,}", warning) for warning in warnings)
    named = [name for warning in warnings for name in warning.split(":")[0].split(", ")]
    honoured = {name for name in env if name in NAMES}
    assert {name: ours[name] for name in honoured} == {name: env[name] for name in honoured}
    expected = variables(" ".join(MAPPED[name] for name in MAPPED.keys() & env.keys()))
    assert {name: ours[name] for name in expected} == expected
    assert sorted(named) == sorted(env.keys() - honoured - MAPPED.keys() - SILENT - {"NCCL_NET"})
    assert all(name in NAMES | {"NCCL_NET"} for name in ours)


def test_every_value_of_a_dropped_knob_is_taken_as_it_was():
    """The old default is silent, however it is written; anything else is one warning; none reaches the trainer."""
    defaults = {name: values.split(" ")[0] for name, (values, _) in foreign.FIXED.items()}
    assert len(defaults) > 25 and not NAMES & defaults.keys()
    assert foreign.translate(defaults, defaults) == ({}, [])
    assert foreign.translate({"ADAM_EPS": "0.00000001", "GATE_WINDOW": "12.0", "CODEC": "range"}) == ({}, [])
    for name in defaults:
        ours, (warning,) = foreign.translate({name: "77"})
        assert ours == {} and warning.startswith(f"{name}: no effect here: ")


def test_every_variable_without_effect_is_named_once():
    patterns = [p.replace("*", "X") for names, _ in foreign.NO_EFFECT for p in names.split()]
    ours, warnings = foreign.translate(dict.fromkeys(patterns, "1"))
    named = [name for warning in warnings for name in warning.split(":")[0].split(", ")]
    assert ours == {} and sorted(named) == sorted(patterns) and len(warnings) == len(foreign.NO_EFFECT)


def test_what_is_mapped_to_is_a_knob_and_no_knob_is_foreign():
    targets = {ours for ours, _ in foreign.RENAMED.values()} - {"OMP_NUM_THREADS"}
    assert targets <= NAMES
    assert {name for name in NAMES if foreign.is_published(name)} <= {"PARALLEL_RESIDUAL"}  # 0 and 1 are published


@pytest.mark.parametrize("env, expected", [
    ("MIXED_QUANT=1 N_INT6_LAYERS=60", "QUANT=sdclip N_INT6_LAYERS=60"),
    ("MIXED_QUANT=0 N_INT6_LAYERS=32", "N_INT6_LAYERS=0"),
    ("TTT_ENABLED=0", "TTT=none"), ("TTT_ENABLED=1", "TTT=lora"), ("TTT_ENABLED=0 TTT_LR=0.005", "TTT=none"),
    ("TTT_ENABLED=1 TTT_CHUNK_TOKENS=1024", "TTT=sgd TTT_CHUNK_TOKENS=1024"),
    ("TTT_ENABLED=1 TTT_FREEZE_BLOCKS=0", "TTT=sgd"), ("TTT_ENABLED=1 TTT_LR=0.005 TTT=lora", "TTT=lora"),
    ("PHASED_TTT_ENABLED=0", "PHASED_TTT_NUM_PHASES=0"), ("PHASED_TTT_ENABLED=1", ""),
    ("TTT_K_LORA=0", "TTT_LORA_ON=q,v,o,mlp,head"), ("TTT_MASK=no_qv", "TTT_LORA_ON=k,o,mlp,head"),
    ("TTT_MASK=no_q TTT_MLP_LORA=0 TTT_O_LORA=1", "TTT_LORA_ON=k,v,o,head"),
    ("TOKEN_ORDER=16 TOKEN_THRESHOLD=0.8 TOKEN_BOOST=2.625",
     "NGRAM_RULES=15:0.8:1 NGRAM_BASE_BETA=2.625 NGRAM_BETA_BY_SHARE=0"),
    ("NGRAM_TILT_ENABLED=0 NGRAM_BASE_BETA=2", "NGRAM_BASE_BETA=0"), ("NGRAM_TILT_ENABLED=1", "NGRAM_BASE_BETA=2"),
    ("MATRIX_CLIP_SIGMAS=9 MLP_CLIP_SIGMAS=8", "ATTN_CLIP_SIGMAS=9 MLP_CLIP_SIGMAS=8"),
    ("PARALLEL_RESIDUAL=1", "PARALLEL_RESIDUAL=two"), ("PARALLEL_RESIDUAL=single", "PARALLEL_RESIDUAL=single"),
    ("PARALLEL_RESIDUAL_START=-1", "PARALLEL_RESIDUAL=none PARALLEL_START_LAYER=0"),
    ("SLIDING_WINDOW_ENABLED=0", "EVAL_STRIDE=0"), ("SLIDING_WINDOW_ENABLED=1", ""),
    ("DATASET=mine_sp512 DATA_DIR=d", "DATA_DIR=d DATA_PATH=d/datasets/mine_sp512"), ("DATASET=", ""),
    ("DATASET=x", "DATA_PATH=./data/datasets/x"), ("THREADS=3", "OMP_NUM_THREADS=3"), ("THREADS=0", ""),
    ("SPARSE_ATTN_GATE_ENABLED=1", "ATTN_GATE=sparse"), ("SPARSE_ATTN_GATE_ENABLED=0", "ATTN_GATE=none"),
    ("ATTN_OUT_GATE_ENABLED=1", "ATTN_GATE=output"), ("GATED_ATTN_ENABLED=0", ""),
    ("GATED_ATTN=1", "ATTN_GATE=dense GATED_ATTN_BIAS=2.0"), ("GATED_ATTN_ENABLED=1", "ATTN_GATE=dense"),
    ("SPARSE_ATTN_GATE_ENABLED=0 GATED_ATTN_ENABLED=0", "ATTN_GATE=none"),
])
def test_variables_become_knobs(env, expected):
    asked = variables(env)
    unchanged = {name: value for name, value in asked.items() if name in NAMES}
    ours, warnings = foreign.translate(asked)
    assert ours == {**unchanged, **variables(expected)} and len(warnings) <= 1
    new = [pair for pair in expected.split() if pair not in env.split() and not pair.startswith("OMP")]
    told = [pair for pair in new if pair.split("=")[0] not in asked or "PARALLEL" in pair]
    assert bool(told) == bool(warnings) and all(f" {pair}" in warnings[0].partition("->")[2] for pair in told)


@pytest.mark.parametrize("env, said", [
    ("SPARSE_ATTN_GATE_ENABLED=1 GATED_ATTN_ENABLED=1", "are both switched on"),
    ("ATTN_GATE=none SPARSE_ATTN_GATE_ENABLED=1", "means ATTN_GATE=sparse, but ATTN_GATE=none is set too"),
    ("SMEAR_GATE=0 SMEAR_GATE_ENABLED=1", "SMEAR_GATE=0 means SMEAR_GATE_ENABLED=0, but"),
    ("TTT_CHUNK_TOKENS=1 GLOBAL_TTT_CHUNK_TOKENS=2", "GLOBAL_TTT_CHUNK_TOKENS=2 means TTT_CHUNK_TOKENS=2, but"),
    ("SLIDING_WINDOW_ENABLED=2", "SLIDING_WINDOW_ENABLED=2: expected one of 0, 1"),
    ("TTT_ENABLED=yes", "TTT_ENABLED='yes': expected 0 or 1"), ("TTT_MASK=qv", "expected such as no_qv"),
    ("PARALLEL_RESIDUAL_START=x", "PARALLEL_RESIDUAL_START='x': expected an integer"),
    ("PREQUANT_TTT=1", "illegal"), ("PREQUANT_TTT_ENABLED=1", "illegal"),
    *((f"RECUR_LAYERS={text}", "expected consecutive blocks") for text in ("4,6", "5,4", "four", "4;5", "\u00b2", ""))])
def test_what_contradicts_or_cannot_be_is_refused(env, said):
    assert said in refused(env)


def test_a_typed_name_must_be_known_and_the_nearest_is_named():
    """Whoever types it means this program; what the environment holds besides is none of our business."""
    assert refused("SEEDS=1", ("SEEDS",)).startswith("SEEDS: no such knob; did you mean SEED?")
    assert "MATRIX_LR" in refused("MARTIX_LR=1", ("MARTIX_LR",))
    env = variables("SEED=7 WARMDOWN_ITERS=3 SMEAR_GATE=1 NCCL_NET=Socket NPROC=2 AUDIT=1 WANDB=1 OMP_NUM_THREADS=1")
    assert foreign.translate(env, env)[0]["SEED"] == "7"
    others = {"HOME": "/root", "LEARNING_RATE": "1", "SEEDS": "3", "lower": "x", "NOTE": " spaces stay "}
    assert foreign.translate(others) == (others, [])
