"""Section 1, Config: every knob is documented, read and checked; published run commands start unchanged."""
import ast
import dataclasses
import re
import subprocess
import sys
import typing

import pytest
from conftest import ROOT, tiny

import train_gpt as tg

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
TYPES = typing.get_type_hints(tg.Config)
KNOBS = sorted(TYPES)


def config(**knobs: str) -> tg.Config:
    """A config from variables given by their lower-case names."""
    return tg.Config.from_env({name.upper(): text for name, text in knobs.items()})[0]


def refusal(env: dict[str, str]) -> str:
    """The one line that refuses this environment."""
    with pytest.raises(tg.UserError) as error:
        tg.Config.from_env(env)
    message = str(error.value)
    assert "\n" not in message and error.value.exit_code == 2
    return message


def variables(command: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in command.split())


def section_lines() -> dict[int, range]:
    """Section number -> its lines (from 1), found by the banners."""
    rule = "# " + "-" * 100
    lines = SOURCE.splitlines()
    heads = {int(m[1]): i + 1 for i, line in enumerate(lines)
             if (m := re.match(r"# (\d+) \w", line)) and lines[i - 1] == rule == lines[i + 1]}
    ends = [*list(heads.values())[1:], len(lines) + 1]
    return {number: range(begin, end) for (number, begin), end in zip(heads.items(), ends)}


SECTIONS = section_lines()


# -- knobs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knob", tg.knobs(), ids=lambda knob: knob.name)
def test_every_knob_says_what_it_is(knob):
    assert len(knob.doc) > 10 and knob.doc[-1] in ".)" and knob.kind in ("str", "int", "float", "bool")


def knobs_read() -> set[str]:
    """Fields that some code reads: cfg.x anywhere, self.x in a property of section 1, the knobs named by ROUTES."""
    checks = {line for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
              for line in range(node.lineno, node.end_lineno + 1)}
    found = {field for row in tg.ROUTES for field in (row.lr, row.wd)}
    for node in ast.walk(TREE):
        if isinstance(node, ast.Attribute) and node.lineno not in checks:
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if owner == "cfg" or (owner == "self" and node.lineno in SECTIONS[1]):
                found.add(node.attr)
    return found


def test_every_knob_is_read_by_some_code():
    """A check of its value is no reader."""
    assert sorted(set(KNOBS) - knobs_read()) == []


def test_every_derived_value_of_the_config_is_read_outside_its_section():
    """A knob whose only reader is a property that nobody reads is a dead knob."""
    outside = {node.attr for node in ast.walk(TREE)
               if isinstance(node, ast.Attribute) and node.lineno not in SECTIONS[1]}
    derived = {name for group in (tg.Config, tg.ModelKnobs) for name, value in vars(group).items()
               if isinstance(value, property) or name == "grid"}
    assert len(derived) >= 6 and derived <= outside


RECORD_1855 = variables(
    "ADAM_EPS=1e-08 ADAM_WD=0.02 ARTIFACT_DIR= ATTN_CLIP_SIGMAS=13.0 BETA1=0.9 BETA2=0.99 DATA_DIR=./data "
    "EMA_DECAY=0.9965 EMBED_BITS=7 EMBED_CLIP_SIGMAS=14.0 EMBED_WD=0.085 ENABLE_LOOPING_AT=0.35 EVAL_SEQ_LEN=2048 "
    "EVAL_STRIDE=64 GATED_ATTN_INIT_STD=0.01 GATE_WINDOW=12 GPTQ_CALIBRATION_BATCHES=16 GRAD_CLIP_NORM=0.3 "
    "ITERATIONS=20000 LN_SCALE=1 LOGIT_SOFTCAP=30 LOOP_END=5 LOOP_START=3 MATRIX_BITS=6 MATRIX_LR=0.026 "
    "MAX_WALLCLOCK_SECONDS=600 MIN_LR=0.1 MLP_CLIP_SIGMAS=11.5 MLP_MULT=4 MODEL_DIM=512 MUON_BACKEND_STEPS=5 "
    "MUON_MOMENTUM=0.97 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 MUON_ROW_NORMALIZE=1 "
    "MUON_WD=0.095 NUM_HEADS=8 NUM_KV_HEADS=4 NUM_LAYERS=11 NUM_LOOPS=2 PARALLEL_FINAL_LANE=mean "
    "PARALLEL_START_LAYER=8 QK_GAIN_INIT=5.0 ROPE_BASE=10000 ROPE_DIMS=16 ROPE_TRAIN_SEQ_LEN=2048 ROPE_YARN=0 "
    "SCALAR_LR=0.02 SEED=1337 SKIP_GATES_ENABLED=1 SMEAR_GATE_ENABLED=1 SPARSE_ATTN_GATE_SCALE=0.5 "
    "TIED_EMBED_INIT_STD=0.005 TIED_EMBED_LR=0.03 TRAIN_BATCH_TOKENS=786432 TRAIN_LOG_EVERY=500 TRAIN_SEQ_LEN=2048 "
    "VAL_BATCH_TOKENS=524288 VAL_LOSS_EVERY=0 VOCAB_SIZE=8192 WARMDOWN_FRAC=0.85 WARMUP_STEPS=20 XSA_LAST_N=11")
"""Values in the run of record #1855. Not among them: paths, RUN_ID, CASEOPS_ENABLED, and GPTQ_RESERVE_SECONDS (0.5)."""
OURS = dict(
    gptq_reserve_seconds=8.0, attn_gate="sparse", parallel_residual="two", muon_coefficients="polar", mlp_slope=0.5,
    normuon_beta2=0.0, cautious_wd=False, bigram_buckets=0, gptq_damp=0.01, artifact_bytes_cap=16_000_000)
"""Knobs that #1855 does not have by this name, at what it does; the reserve is #1868's."""


def test_the_defaults_are_the_values_of_record_1855():
    defaults = tg.Config()
    different = {name for name, text in RECORD_1855.items()
                 if getattr(defaults, name.lower()) != tg.parse(name.lower(), TYPES[name.lower()], text)}
    assert different == set()
    assert {name: getattr(defaults, name) for name in OURS} == OURS
    assert config() == defaults


def test_a_config_never_changes():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tg.Config().seed = 1


def test_a_preset_is_overridden_by_variables_and_overrides_the_defaults():
    demo = config(preset="demo")
    assert demo.preset == "demo" and all(getattr(demo, name) == value for name, value in tg.PRESETS["demo"].items())
    mine = config(preset="demo", num_layers="7", matrix_lr="0.5")
    assert dataclasses.asdict(mine) == {**dataclasses.asdict(demo), "num_layers": 7, "matrix_lr": 0.5}
    assert config(preset="record") == tg.Config()
    assert refusal({"PRESET": "dmeo"}) == "PRESET=dmeo: expected one of record, demo"


def test_what_an_artifact_holds_overrides_the_preset_and_cannot_be_contradicted():
    stored = {**dataclasses.asdict(tg.ModelKnobs(num_layers=9, xsa_last_n=3)), "preset": "demo"}
    cfg, _ = tg.Config.from_env({"NUM_LAYERS": "9", "EVAL_STRIDE": "32"}, stored)
    assert (cfg.preset, cfg.num_layers, cfg.xsa_last_n, cfg.eval_stride) == ("demo", 9, 3, 32)
    assert cfg.eval_seq_len == tg.PRESETS["demo"]["eval_seq_len"]
    with pytest.raises(tg.UserError, match="XSA_LAST_N=4: the artifact was made with 3; unset it"):
        tg.Config.from_env({"XSA_LAST_N": "4"}, stored)


def test_help_lists_every_knob_once_under_its_group():
    lines, expected = tg.help_text().splitlines(), []
    for group in tg.GROUPS:
        expected += [group.__doc__, *(field.name.upper() for field in dataclasses.fields(group))]
    titles = {group.__doc__ for group in tg.GROUPS}
    found = [m[1] if (m := re.match(r"  ([A-Z0-9_]+)=", line)) else line for line in lines
             if line in titles or re.match(r"  [A-Z0-9_]+=", line)]
    assert found == expected and sorted(name.lower() for name in found if name not in titles) == KNOBS
    assert max(map(len, lines)) <= 120


def test_help_shows_defaults_and_the_values_of_the_demo():
    text = tg.help_text()
    layers = tg.PRESETS["demo"]["num_layers"]
    assert f"  NUM_LAYERS={tg.Config.num_layers} (int) [{layers}]\n" in text and layers != tg.Config.num_layers
    assert "  MUON_WD=0.095 (float)\n" in text and "  SKIP_GATES_ENABLED=1 (bool)\n" in text


# -- values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_is_set_by_its_variable(name):
    """The text arrives under its field, from the variable in capitals only."""
    assert tg.translate({name.upper(): "text"}, set(TYPES)) == ({name: "text"}, [])
    assert tg.translate({name: "text", name.title(): "text"}, set(TYPES))[0] == {}


@pytest.mark.parametrize("variable, text, value", [
    ("ITERATIONS", "12", 12), ("ITERATIONS", " 1_000 ", 1000), ("MATRIX_LR", "2e-2", 0.02), ("MATRIX_LR", "1", 1.0),
    ("LN_SCALE", "0", False), ("LN_SCALE", "1", True), ("RUN_ID", "a=b", "a=b"), ("DATA_DIR", "", "")])
def test_a_value_is_read_as_its_type(variable, text, value):
    found = getattr(tg.Config.from_env({variable: text})[0], variable.lower())
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("variable, texts, expected", [
    ("LN_SCALE", ["true", "yes", "2", "", "on"], "expected 0 or 1"),
    ("ITERATIONS", ["1.5", "many", "", "1e3", "0x10"], "expected an integer"),
    ("MATRIX_LR", ["fast", "", "nan", "inf", "-inf", "1,5"], "expected a number"),
])
def test_a_value_that_does_not_parse_is_one_line_with_knob_and_value(variable, texts, expected):
    for text in texts:
        assert refusal({variable: text}) == f"{variable}={text!r}: {expected}"


@pytest.mark.parametrize("knobs, blamed", [
    ("NUM_HEADS=3", "MODEL_DIM=512"),
    ("NUM_HEADS=0", "MODEL_DIM=512"),
    ("MODEL_DIM=0", "MODEL_DIM=0"),
    ("ADAM_EPS=0", "ADAM_EPS=0.0: expected a positive number"),
    ("NUM_KV_HEADS=3", "NUM_KV_HEADS=3"),
    ("MODEL_DIM=500", "MODEL_DIM=500"),
    ("NUM_LAYERS=0 NUM_LOOPS=0 PARALLEL_RESIDUAL=none", "NUM_LAYERS=0: expected at least 2"),
    ("NUM_LAYERS=4", "LOOP_START=3 LOOP_END=5"),
    ("LOOP_START=6", "LOOP_START=6 LOOP_END=5"),
    ("LOOP_START=-1", "LOOP_START=-1"),
    ("NUM_LOOPS=-1", "NUM_LOOPS=-1"),
    ("PARALLEL_START_LAYER=5", "PARALLEL_START_LAYER=5 lies inside the loop"),
    ("PARALLEL_START_LAYER=4", "PARALLEL_START_LAYER=4 lies inside the loop"),
    ("PARALLEL_START_LAYER=12", "PARALLEL_START_LAYER=12"),
    ("ROPE_DIMS=15", "ROPE_DIMS=15"),
    ("ROPE_DIMS=66", "ROPE_DIMS=66"),
    ("MLP_MULT=0.001", "MLP_MULT=0.001"),
    ("GATE_WINDOW=513", "GATE_WINDOW=513"),
    ("MLP_RANK=513", "MLP_RANK=513"),
    ("MLP_RANK=-1", "MLP_RANK=-1"),
    ("QAT_START=1.1 QUANT=sdclip", "QAT_START=1.1"),
    ("QAT_START=0.9", "QUANT=sdclip"),
    ("QAT_START=0.9 QUANT=sdclip N_INT6_LAYERS=9", "N_INT6_LAYERS=0"),
    ("VOCAB_SIZE=65537", "VOCAB_SIZE=65537"),
    ("LOGIT_SOFTCAP=0", "LOGIT_SOFTCAP=0"),
    ("BIGRAM_BUCKETS=1", "BIGRAM_BUCKETS=1"),
    ("TRAIN_BATCH_TOKENS=786431", "nearest: 786432"),
    ("TRAIN_BATCH_TOKENS=1000", "nearest: 2048"),
    ("MICRO_BATCH_TOKENS=2047", "MICRO_BATCH_TOKENS=2047"),
    ("EVAL_STRIDE=2049", "EVAL_STRIDE=2049"),
    ("EVAL_STRIDE=-1", "EVAL_STRIDE=-1"),
    ("GPTQ_RESERVE_SECONDS=600", "GPTQ_RESERVE_SECONDS=600"),
    ("MAX_WALLCLOCK_SECONDS=8", "GPTQ_RESERVE_SECONDS=8"),
    ("MAX_WALLCLOCK_SECONDS=-1", "MAX_WALLCLOCK_SECONDS=-1"),
    ("MUON_BACKEND_STEPS=6", "MUON_BACKEND_STEPS=6"),
    ("ITERATIONS=0", "ITERATIONS=0"),
    ("TRAIN_LOG_EVERY=0", "TRAIN_LOG_EVERY=0"),
    ("MATRIX_BITS=1", "MATRIX_BITS=1"),
    ("EMBED_BITS=9", "EMBED_BITS=9"),
    ("ATTN_CLIP_SIGMAS=0", "ATTN_CLIP_SIGMAS=0"),
    ("MLP_CLIP_SIGMAS=-1", "MLP_CLIP_SIGMAS=-1"),
    ("EMBED_CLIP_SIGMAS=0", "EMBED_CLIP_SIGMAS=0"),
    ("GPTQ_DAMP=0", "GPTQ_DAMP=0"),
    ("GRAD_CLIP_NORM=-0.1", "GRAD_CLIP_NORM=-0.1"),
    ("MATRIX_LR=-0.1", "MATRIX_LR=-0.1"),
    ("BETA2=1", "BETA2=1"),
    ("EMA_DECAY=1", "EMA_DECAY=1"),
    ("WARMDOWN_FRAC=1.1", "WARMDOWN_FRAC=1.1"),
    ("MIN_LR=1.1", "MIN_LR=1.1"),
    ("MIN_LR=-0.1", "MIN_LR=-0.1"),
    ("XSA_LAST_N=-1", "XSA_LAST_N=-1"),
    ("THREADS=-1", "THREADS=-1"),
])
def test_an_impossible_value_or_combination_is_one_line_that_names_it(knobs, blamed):
    assert blamed in refusal(variables(knobs))


@pytest.mark.parametrize("name", sorted(tg.CHOICES))
def test_a_choice_is_one_of_its_list(name):
    message = refusal({name.upper(): "neither"})
    assert message == f"{name.upper()}=neither: expected one of {', '.join(tg.CHOICES[name])}"


@pytest.mark.parametrize("knobs", [
    "NUM_LAYERS=4 NUM_LOOPS=0 PARALLEL_START_LAYER=3", "PARALLEL_START_LAYER=3", "PARALLEL_START_LAYER=6",
    "PARALLEL_START_LAYER=3 PARALLEL_RESIDUAL=single", "PARALLEL_START_LAYER=4 NUM_LOOPS=0",
    "PARALLEL_START_LAYER=99 PARALLEL_RESIDUAL=none", "MUON_BACKEND_STEPS=6 MUON_COEFFICIENTS=classic",
    "MAX_WALLCLOCK_SECONDS=0 GPTQ_RESERVE_SECONDS=600", "EVAL_STRIDE=2048", "EVAL_STRIDE=0", "MICRO_BATCH_TOKENS=2048",
    "WARMDOWN_FRAC=0", "WARMDOWN_FRAC=1 MIN_LR=1", "ROPE_DIMS=0", "ROPE_DIMS=64", "GRAD_CLIP_NORM=0 EMA_DECAY=0",
    "NUM_HEADS=1 NUM_KV_HEADS=1", "MLP_RANK=512", "QAT_START=0 QUANT=sdclip MATRIX_BITS=2",
    "LOOP_START=0 LOOP_END=10 PARALLEL_START_LAYER=0", "VOCAB_SIZE=65536"])
def test_the_limits_themselves_are_possible(knobs):
    cfg, _ = tg.Config.from_env(variables(knobs))
    assert all(tg.show(getattr(cfg, name.lower())) == text for name, text in variables(knobs).items())


def test_derived_values_follow_from_the_knobs():
    cfg = tiny(train_batch_tokens=384, train_seq_len=32, val_batch_tokens=1024, eval_seq_len=32, mlp_mult=2.5)
    assert (cfg.train_rows, cfg.eval_rows, cfg.head_dim, cfg.mlp_dim) == (12, 4, 16, 80)
    assert str(config(data_dir="d").dataset_dir) == "d/datasets/fineweb10B_sp8192"
    assert str(config(data_dir="d", caseops_enabled="1").dataset_dir) == \
        "d/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
    assert str(config(data_dir="d", data_path="p").dataset_dir) == "p"
    assert config(attn_clip_sigmas="3", matrix_bits="5").grid("attn") == (5, 3.0)
    assert config(mlp_clip_sigmas="4", matrix_bits="5").grid("mlp") == (5, 4.0)
    assert config(embed_clip_sigmas="7", embed_bits="8").grid("embed") == (8, 7.0)


# -- misspelt names, foreign names ---------------------------------------------------------------------


def misspelt(name: str) -> list[str]:
    """A letter missing, a letter too many; two letters swapped where the name is long enough to be sure."""
    middle = len(name) // 2
    swapped = name[:middle] + name[middle + 1] + name[middle] + name[middle + 2:]
    return [name[:middle] + name[middle + 1:], name[:middle] + "X" + name[middle:],
            *([swapped] if len(name) > 8 else [])]


@pytest.mark.parametrize("knob", [name.upper() for name in KNOBS])
def test_a_misspelt_knob_is_refused_and_the_nearest_is_named(knob):
    for name in misspelt(knob):
        if name.lower() not in TYPES:
            message = refusal({name: "1"})
            assert message.startswith(f"{name}=1: no such knob; did you mean {knob}?")


@pytest.mark.parametrize("name", ["GPTQ_RESERVE", "MUON_FOO", "ATTN_GATES_ON", "WARMDOWN_TOKENS", "QK_GAIN",
                                  "EVAL_WINDOW", "LOOP_OVER"])
def test_a_stranger_with_the_prefix_of_a_knob_is_refused(name):
    assert refusal({name: "1"}).startswith(f"{name}=1: no such knob; did you mean ")


FOREIGN = """PATH HOME LANG LC_ALL PWD OLDPWD USER LOGNAME SHELL TERM TZ SHLVL _ EDITOR PAGER DISPLAY HOSTNAME TMPDIR
    OMP_NUM_THREADS OMP_WAIT_POLICY MKL_NUM_THREADS NCCL_NET NCCL_DEBUG NCCL_IB_DISABLE CUDA_VISIBLE_DEVICES CUDA_HOME
    CUDA_DEVICE_ORDER LD_LIBRARY_PATH LD_PRELOAD PYTHONPATH PYTHONHASHSEED PYTHONUNBUFFERED VIRTUAL_ENV CONDA_PREFIX
    PYTORCH_CUDA_ALLOC_CONF TORCHINDUCTOR_CACHE_DIR TORCH_LOGS TRITON_CACHE_DIR HF_HOME HF_TOKEN XDG_CACHE_HOME
    RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT GROUP_RANK ROLE_RANK TORCHELASTIC_RUN_ID
    SLURM_JOB_ID SLURM_NTASKS SLURM_PROCID SLURM_NODELIST SLURM_CPUS_PER_TASK SLURM_ARRAY_TASK_ID PBS_JOBID
    KUBERNETES_SERVICE_HOST CI GITHUB_ACTIONS GITHUB_RUN_ID GITHUB_SHA GITHUB_WORKSPACE RUNNER_OS RUNNER_TEMP GITLAB_CI
    CI_JOB_ID CI_COMMIT_SHA CI_PROJECT_DIR BUILD_ID BUILD_NUMBER JOB_NAME JENKINS_HOME WORKSPACE NODE_NAME TRAVIS
    CIRCLECI BUILDKITE DEBIAN_FRONTEND NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES WANDB_API_KEY WANDB_PROJECT
    SSH_AUTH_SOCK SSH_CONNECTION SUDO_USER LS_COLORS LESSOPEN MAIL HISTSIZE COLUMNS LINES PS1 MAKEFLAGS MAKELEVEL
    NPROC VERBOSE DEBUG BATCH_SIZE LEARNING_RATE EPOCHS JAVA_HOME GOPATH MANPATH INFOPATH
    lower_case Mixed_Case""".split()


@pytest.mark.parametrize("name", FOREIGN)
def test_the_rest_of_the_environment_is_none_of_our_business(name):
    assert tg.Config.from_env({name: "anything"}) == (tg.Config(), [])


@pytest.mark.parametrize("name", ["LEARNING_RATE", "NUM_THREADS", "EPOCHS"])
def test_a_typed_argument_must_be_a_knob(name):
    assert refusal({name: "1", "KNOBS_TYPED": f"SEED {name}"}).startswith(f"{name}=1: no such knob; did you mean ")
    typed = {"SEED": "7", "WARMDOWN_ITERS": "3", "SMEAR_GATE": "1", "NCCL_NET": "Socket"}
    assert tg.Config.from_env(typed | {"KNOBS_TYPED": " ".join(typed)})[0].seed == 7


# -- variables of published run commands ---------------------------------------------------------------


COMMANDS = {
    1285: "NCCL_NET=Socket DATA_DIR=./data SEED=42 MIXED_QUANT=1 N_INT6_LAYERS=66 MUON_WD=0.090 EMBED_WD=0.090 "
          "RECUR_LAYERS=4,5",
    1394: "RUN_ID=1337 SEED=1337",
    1493: "SEED=42 QK_GAIN_INIT=5.25 TTT_ENABLED=1 TTT_LR=0.005 TTT_EPOCHS=3",
    1514: "NCCL_NET=Socket MUON_MOMENTUM=0.97 QK_GAIN_INIT=5.0 PARALLEL_RESIDUAL_START=7 LOOP_START=3 LOOP_END=5 "
          "TTT_ENABLED=1 TTT_LR=0.005 TTT_EPOCHS=3 TTT_CHUNK_TOKENS=32768 TTT_FREEZE_BLOCKS=0 NGRAM_TILT_ENABLED=1 "
          "NGRAM_WITHIN_BETA=0.0 NGRAM_WORD_BETA=0.0 SEED=1234",
    1855: "DATA_DIR=./data VOCAB_SIZE=8192 "
          "DATA_PATH=./data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved "
          "TOKENIZER_PATH=./data/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model CASEOPS_ENABLED=1 "
          "ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600 PHASED_TTT_ENABLED=1 PHASED_TTT_PREFIX_DOCS=2500 "
          "PHASED_TTT_NUM_PHASES=3 EMBED_BITS=7 MATRIX_LR=0.026 MIN_LR=0.1 MLP_CLIP_SIGMAS=11.5 ATTN_CLIP_SIGMAS=13.0 "
          "EMBED_CLIP_SIGMAS=14.0 GRAD_CLIP_NORM=0.3 TTT_CHUNK_SIZE=48 WARMUP_STEPS=20 MUON_BACKEND_STEPS=5 "
          "GLOBAL_TTT_MOMENTUM=0.9 WARMDOWN_FRAC=0.85 BETA2=0.99 TTT_BETA2=0.99 TTT_WEIGHT_DECAY=0.5 TTT_LORA_RANK=80 "
          "SPARSE_ATTN_GATE_SCALE=0.5 GPTQ_RESERVE_SECONDS=0.5 GPTQ_CALIBRATION_BATCHES=16 VAL_LOSS_EVERY=0 "
          "GATED_ATTN_QUANT_GATE=1 SPARSE_ATTN_GATE_ENABLED=1 GATE_WINDOW=12 SMEAR_GATE_ENABLED=1 LQER_ENABLED=1 "
          "LQER_ASYM_ENABLED=1 LQER_RANK=4 LQER_FACTOR_BITS=4 LQER_ASYM_GROUP=64 LQER_TOP_K=3 FUSED_CE_ENABLED=1 "
          "COMPRESSOR=pergroup NCCL_NET=Socket SEED=42",
}
MAPPED = {
    "MIXED_QUANT": dict(quant="sdclip"),
    "RECUR_LAYERS": dict(loop_start=4, loop_end=5, num_loops=1),
    "PARALLEL_RESIDUAL_START": dict(parallel_residual="single", parallel_start_layer=7),
    "SPARSE_ATTN_GATE_ENABLED": dict(attn_gate="sparse"),
    "TTT_ENABLED": {},  # what it means depends on its neighbours: tested below
    "PHASED_TTT_ENABLED": {},
}


@pytest.mark.parametrize("record", COMMANDS)
def test_no_variable_of_a_records_command_vanishes(record):
    """Each is honoured, mapped, or named in exactly one warning; NCCL_NET is none of ours."""
    env = variables(COMMANDS[record])
    cfg, warnings = tg.Config.from_env(env)
    named = [name for warning in warnings for name in warning.split(":")[0].split(", ")]
    assert all(re.fullmatch(r"[A-Z0-9_, ]+: no effect here: .{10,}", warning) for warning in warnings)
    honoured = {name for name in env if name.lower() in TYPES}
    for name in honoured:
        kind = TYPES[name.lower()]
        assert getattr(cfg, name.lower()) == (env[name] == "1" if kind is bool else kind(env[name])), name
    for name in MAPPED.keys() & env.keys():
        assert {field: getattr(cfg, field) for field in MAPPED[name]} == MAPPED[name]
    assert sorted(named) == sorted(env.keys() - honoured - MAPPED.keys() - {"NCCL_NET"})


OTHERS_OF_THE_RECORDS = """
    ASYMMETRIC_LOGIT ATTN_OUT_GATE_SRC COMPRESSOR CONTROL_TENSOR_NAME_PATTERNS DISABLE_LAYER0_ATTN
    EMBEDDING_DIM EMBED_LR ETLB_CLIP ETLB_ENABLED ETLB_LR ETLB_STEPS FUSED_CE_ENABLED GATED_ATTN_QUANT_GATE
    GATE_ATTN_SRC GATE_MLP_OUT GLOBAL_TTT_DOC_LIMIT GLOBAL_TTT_RESPECT_DOC_BOUNDARIES GLOBAL_TTT_WARMUP_CHUNKS
    GLOBAL_TTT_WARMUP_START_LR GPTQ_ENABLED HEAD_LR HESSIAN_CLIP_LAMBDA INT5_LAYERS LQER_ASYM_ENABLED
    LQER_ASYM_GROUP LQER_ENABLED LQER_FACTOR_BITS LQER_RANK LQER_TOP_K MUON_BETA2
    NGRAM_AGREE_BONUS NGRAM_OPEN_TABLE_BITS NGRAM_ORDER_STRIDE NGRAM_WITHIN_BETA NGRAM_WITHIN_THRESHOLD
    NGRAM_WORD_BETA NGRAM_WORD_THRESHOLD PARALLEL_START_LAYER_IS_PHYSICAL PREQUANT_ONLY
    RECUR_START_STEP RECUR_WARMUP_STEPS REPEAT_UNTIE_MLP REPEAT_UNTIE_MLP_LAYERS SAVE_QUANT_STATE
    SKIP_POST_TRAIN_EVAL SPARSE_ATTN_GATE_INIT_STD TIE_EMBEDDINGS TRAIN_FILES TTT_DEBUG_BYPASS TTT_DOC_LIMIT
    TTT_EVAL_BATCHES TTT_EVAL_ONLY TTT_HEARTBEAT_SECONDS TTT_ONLY TTT_ONLY_EVAL TTT_OUTPUT_DIR
    TTT_WARM_START_A VALUE_RESIDUAL VAL_BATCH_SIZE VAL_DOC_FRACTION VAL_FILES VE_DIM VE_ENABLED VE_LAYERS
    WARMDOWN_ITERS WD_TAPER_FINAL_MULT WD_TAPER_START_FRAC""".split()
"""What the records' scripts read (annex A) and this program neither has nor maps."""


def test_every_other_variable_of_the_records_is_named_in_one_warning():
    """Set together, each is in exactly one warning and none changes the config."""
    cfg, warnings = tg.Config.from_env({name: "1" for name in OTHERS_OF_THE_RECORDS})
    named = [name for warning in warnings for name in warning.split(":")[0].split(", ")]
    assert cfg == tg.Config() and sorted(named) == sorted(OTHERS_OF_THE_RECORDS)


@pytest.mark.parametrize("env, expected", [
    ("MIXED_QUANT=1 N_INT6_LAYERS=60", dict(quant="sdclip", n_int6_layers=60)),
    ("MIXED_QUANT=0 N_INT6_LAYERS=32", dict(quant="waterfill", n_int6_layers=0)),
    ("TTT_ENABLED=0", dict(ttt="none")),
    ("TTT_ENABLED=1", dict(ttt="lora")),
    ("TTT_ENABLED=1 TTT_LR=0.005 TTT_EPOCHS=3", dict(ttt="sgd", ttt_lr=0.005, ttt_epochs=3)),
    ("TTT_ENABLED=1 TTT_CHUNK_TOKENS=1024", dict(ttt="sgd", ttt_chunk_tokens=1024)),
    ("TTT_ENABLED=0 TTT_LR=0.005", dict(ttt="none")),
    ("TTT_ENABLED=1 TTT_LR=0.005 TTT=lora", dict(ttt="lora")),
    ("PHASED_TTT_ENABLED=0", dict(phased_ttt_num_phases=0)),
    ("PHASED_TTT_ENABLED=1", dict(phased_ttt_num_phases=3)),
    ("TTT_K_LORA=0", dict(ttt_lora_on="q,v,o,mlp,head")),
    ("TTT_MASK=no_qv", dict(ttt_lora_on="k,o,mlp,head")),
    ("TTT_MASK=no_q TTT_MLP_LORA=0 TTT_O_LORA=1", dict(ttt_lora_on="k,v,o,head")),
    ("TTT_EVAL_SEQ_LEN=2560", dict(eval_seq_len=2560)),
    ("TOKEN_ORDER=16 TOKEN_THRESHOLD=0.8 TOKEN_BOOST=2.625",
     dict(ngram_rules="15:0.8:1", ngram_base_beta=2.625, ngram_beta_by_share=False)),
    ("PREQUANT_TTT_ENABLED=1 PREQUANT_TTT_EPOCHS=2", dict(prequant_ttt=True, prequant_ttt_epochs=2)),
])
def test_variables_of_adaptation_become_knobs(env, expected):
    cfg, warnings = tg.Config.from_env(variables(env))
    assert {name: getattr(cfg, name) for name in expected} == expected and not warnings


@pytest.mark.parametrize("env, named", [
    ("TTT_CHUNK_SIZE=0", "TTT_CHUNK_SIZE=0: expected a number such as 48"),
    ("TTT_CHUNK_SIZE=256:8", "TTT_CHUNK_SIZE=256:8"), ("TTT_CHUNK_SIZE=256:8,2000:0,48", "TTT_CHUNK_SIZE=256:8,2000:0"),
    ("NGRAM_RULES=8:0.7", "NGRAM_RULES=8:0.7: expected length:share:count"), ("NGRAM_RULES=8:1.2:1", "NGRAM_RULES"),
    ("NGRAM_RULES=8:0.5:1,8:0.6:2", "NGRAM_RULES"), ("NGRAM_RULES=", "NGRAM_RULES"),
    ("SEED=9223372036854775808", "SEED=9223372036854775808: expected less than 2^63"),
    ("RECUR_LAYERS=\u00b2", "RECUR_LAYERS=\u00b2: expected consecutive blocks"),
    *((f"CHECKPOINT_EVERY={text}", f"CHECKPOINT_EVERY={text}: expected seconds such as 60, or steps such as 500steps")
      for text in ("-1", "inf", "nan", "steps", "-2steps", "1.5steps", "5minutes", "")),
    ("TTT_LORA_ON=", "TTT_LORA_ON=: expected some of"), ("TTT_LORA_ON=,", "TTT_LORA_ON=,: expected some of"),
    ("TTT_LORA_ON=q,w", "TTT_LORA_ON=q,w: expected some of q,k,v,o,mlp,head"), ("EVAL_LADDER=ema,ema", "EVAL_LADDER"),
    ("TTT_MASK=qv", "TTT_MASK=qv: expected such as no_qv"), ("TTT=yes", "TTT=yes: expected one of none, lora, sgd"),
    ("TTT_ENABLED=yes", "TTT_ENABLED='yes': expected 0 or 1"), ("TTT_LORA_RANK=0", "TTT_LORA_RANK=0"),
    ("EVAL_SECONDS_BUDGET=0", "EVAL_SECONDS_BUDGET=0.0: expected a positive number"),
    ("TTT_FREEZE_BLOCKS=12", "TTT_FREEZE_BLOCKS=12"),
])
def test_impossible_adaptation_is_one_line(env, named):
    line = refusal(variables(env))
    assert line.startswith(named) and "\n" not in line


@pytest.mark.parametrize("switches, gate", [
    ("SPARSE_ATTN_GATE_ENABLED=1", "sparse"), ("SPARSE_ATTN_GATE_ENABLED=0", "none"),
    ("GATED_ATTN_ENABLED=1", "dense"), ("ATTN_OUT_GATE_ENABLED=1", "output"), ("GATE_ATTN_OUT=1", "output"),
    ("GATED_ATTN=1", "dense"), ("GATED_ATTN_ENABLED=0", "sparse"), ("ATTN_OUT_GATE_ENABLED=0", "sparse"),
    ("SPARSE_ATTN_GATE_ENABLED=0 GATED_ATTN_ENABLED=1", "dense"),
    ("SPARSE_ATTN_GATE_ENABLED=1 GATED_ATTN_ENABLED=0 ATTN_OUT_GATE_ENABLED=0", "sparse"),
    ("SPARSE_ATTN_GATE_ENABLED=0 GATED_ATTN_ENABLED=0", "none"), ("GATED_ATTN_ENABLED=1 GATED_ATTN=1", "dense"),
])
def test_gate_switches_become_one_choice(switches, gate):
    """One that is off takes away only its own gate."""
    assert tg.Config.from_env(variables(switches))[0].attn_gate == gate


@pytest.mark.parametrize("switches", ["SPARSE_ATTN_GATE_ENABLED=1 GATED_ATTN_ENABLED=1",
                                      "GATE_ATTN_OUT=1 GATED_ATTN=1", "ATTN_OUT_GATE_ENABLED=1 GATED_ATTN_ENABLED=1"])
def test_two_gates_at_once_are_refused(switches):
    assert "ATTN_GATE takes one of them" in refusal(variables(switches))


def test_a_gate_switch_is_0_or_1():
    assert refusal({"SPARSE_ATTN_GATE_ENABLED": "yes"}) == "SPARSE_ATTN_GATE_ENABLED='yes': expected 0 or 1"


@pytest.mark.parametrize("env, expected", [
    ("GATED_ATTN=1", dict(attn_gate="dense", gated_attn_bias=2.0)),
    ("GATED_ATTN=0", dict(attn_gate="sparse", gated_attn_bias=0.0)),
    ("GATED_ATTN=1 GATED_ATTN_BIAS=2.94", dict(gated_attn_bias=2.94)),
    ("GATED_ATTENTION=1", dict(attn_gate="dense", gated_attn_bias=4.0)),
    ("PARALLEL_RESIDUAL_START=7", dict(parallel_residual="single", parallel_start_layer=7)),
    ("PARALLEL_RESIDUAL_START=0", dict(parallel_residual="single", parallel_start_layer=0)),
    ("PARALLEL_RESIDUAL_START=4", dict(parallel_residual="single", parallel_start_layer=4)),
    ("PARALLEL_RESIDUAL_START=-1", dict(parallel_residual="none")),
    ("PARALLEL_RESIDUAL=0", dict(parallel_residual="none")),
    ("PARALLEL_RESIDUAL=1 PARALLEL_START_LAYER=7", dict(parallel_residual="two", parallel_start_layer=7)),
    ("PARALLEL_RESIDUAL=single", dict(parallel_residual="single")),
    ("RECUR_LAYERS=4,5", dict(loop_start=4, loop_end=5, num_loops=1)),
    ("RECUR_LAYERS=6 NUM_LOOPS=2", dict(loop_start=6, loop_end=6, num_loops=2)),
    ("MATRIX_CLIP_SIGMAS=12.85", dict(attn_clip_sigmas=12.85, mlp_clip_sigmas=12.85, embed_clip_sigmas=14.0)),
    ("MATRIX_CLIP_SIGMAS=12.85 MLP_CLIP_SIGMAS=9", dict(attn_clip_sigmas=12.85, mlp_clip_sigmas=9.0)),
    ("USE_POLAR_EXPRESS=0", dict(muon_coefficients="classic")),
    ("USE_POLAR_EXPRESS=1 MUON_BACKEND_STEPS=5", dict(muon_coefficients="polar")),
    ("SLIDING_WINDOW_ENABLED=0", dict(eval_stride=0)),
    ("SLIDING_WINDOW_ENABLED=1", dict(eval_stride=64)),
    ("SLIDING_WINDOW_ENABLED=1 EVAL_STRIDE=32", dict(eval_stride=32)),
    ("SLIDING_WINDOW_ENABLED=1 PRESET=demo", dict(eval_stride=tg.PRESETS["demo"]["eval_stride"])),
    ("SMEAR_GATE=0", dict(smear_gate_enabled=False)),
    ("SMEAR_GATE_WIDTH=8", dict(gate_window=8)),
    ("GATE_WIDTH=8", dict(gate_window=8)),
    ("BIGRAM_VOCAB_SIZE=3072", dict(bigram_buckets=3072)),
    ("DATASETS_DIR=some/where", dict(data_path="some/where")),
    ("EVAL_ONLY_PATH=some.bin", dict(eval_only="some.bin")),
    ("MUON_WEIGHT_DECAY=0.04", dict(muon_wd=0.04)),
    ("ADAM_WEIGHT_DECAY=0.04", dict(adam_wd=0.04)),
    ("WARMDOWN_FRACTION=0.2", dict(warmdown_frac=0.2)),
])
def test_names_of_older_records_are_mapped(env, expected):
    cfg, warnings = tg.Config.from_env(variables(env))
    assert {field: getattr(cfg, field) for field in expected} == expected and warnings == []


@pytest.mark.parametrize("layers", ["", "4,6", "5,4", "four", "4;5"])
def test_a_recurrence_that_is_no_range_of_blocks_is_refused(layers):
    assert refusal({"RECUR_LAYERS": layers}).startswith(f"RECUR_LAYERS={layers}: expected consecutive blocks")


# -- the file ------------------------------------------------------------------------------------------


def test_the_source_is_python_3_10():
    ast.parse(SOURCE, feature_version=(3, 10))


def test_sections_are_those_of_the_table_and_say_what_is_safe_to_change():
    lines, docstring = SOURCE.splitlines(), ast.get_docstring(TREE)
    assert list(SECTIONS) == list(range(1, 13))
    for number, where in SECTIONS.items():
        title = re.match(r"# \d+ ([^:]+)", lines[where.start - 1])[1]
        prose = "\n".join(lines[where.start:where.start + 12])
        assert re.search(rf"\b{number} {title}\b", docstring) and "Safe to change:" in prose


def test_the_environment_is_read_at_the_two_ends_of_the_file_only():
    ends = [node for node in TREE.body if isinstance(node, ast.If)
            and ast.unparse(node.test) == "__name__ == '__main__'"]
    allowed = {line for node in ends for line in range(node.lineno, node.end_lineno + 1)}
    reads = [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Attribute) and node.attr in
             ("environ", "environb", "getenv", "putenv")]
    assert len(ends) == 2 and len(reads) == 2 and set(reads) <= allowed


def test_only_section_2_knows_of_processes():
    """torch.distributed under any name, but for its import."""
    uses = [node.lineno for node in ast.walk(TREE) if (isinstance(node, ast.Name) and node.id == "dist")
            or (isinstance(node, ast.Attribute) and node.attr == "distributed")]
    imports = [node.lineno for node in ast.walk(TREE) if isinstance(node, (ast.Import, ast.ImportFrom))
               and "torch.distributed" in ast.unparse(node)]
    assert len(uses) > 5 and all(line in SECTIONS[2] for line in uses) and len(imports) == 1


def test_no_temporary_folder_is_named_in_the_file():
    """Two runs on one machine share nothing but their inputs."""
    texts = [node.value for node in ast.walk(TREE) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert [text for text in texts if "/tmp" in text or "/dev/shm" in text] == []


def test_import_prints_nothing_and_needs_nothing_optional():
    """Packages that a laptop may lack are blocked; nothing of them is imported."""
    code = ("import sys\n"
            "optional = 'triton', 'flash_attn', 'flash_attn_interface', 'sentencepiece', 'brotli'\n"
            "sys.modules.update(dict.fromkeys(optional))\n"
            "import train_gpt\n"
            "assert all(sys.modules[name] is None for name in optional)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("knobs", [
    "WARMDOWN_FRAC=-0.5", "ENABLE_LOOPING_AT=-0.1", "SEED=-1", "PARALLEL_START_LAYER=11",
    "NUM_LAYERS=1 NUM_LOOPS=0 PARALLEL_RESIDUAL=none", "ROPE_BASE=0", "ADAM_EPS=-1", "BIGRAM_BUCKETS=16 BIGRAM_DIM=0",
    "ROPE_TRAIN_SEQ_LEN=0 ROPE_YARN=1", "ARTIFACT_BYTES_CAP=0", "DIST_TIMEOUT_SECONDS=0",
    "SLIDING_WINDOW_ENABLED=2", "USE_POLAR_EXPRESS=2", "ATTN_GATE=none SPARSE_ATTN_GATE_ENABLED=1",
    "SMEAR_GATE=0 SMEAR_GATE_ENABLED=1", "GATE_WIDTH=8 SMEAR_GATE_WIDTH=9", "DEIVCE=cpu", "DTYEP=float32"])
def test_a_value_out_of_range_or_a_contradiction_is_refused(knobs):
    assert knobs.split("=")[0] in refusal(variables(knobs))


@pytest.mark.parametrize("name", ["PARALLEL_PID", "PARALLEL_SEQ", "PARALLEL_JOBSLOT", "MATRIX_OS", "COMPILER", "TYPE",
                                  "NTHREADS", "NUM_THREADS", "JAVA_PATH", "ARTIFACTS_DIR"])
def test_a_name_near_a_knob_that_others_use_is_left_alone(name):
    assert tg.Config.from_env({name: "x"}) == (tg.Config(), [])


@pytest.mark.parametrize("value", [" 1", "1 "])
def test_switches_strip_like_knobs(value):
    assert tg.Config.from_env({"GATED_ATTN_ENABLED": value})[0].attn_gate == "dense"


def test_show_is_what_one_would_type():
    assert all(float(tg.show(x)) == x for x in (0.0261234567, 1234567.5))
