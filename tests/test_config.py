"""Section 1, Config: every knob is documented, read and checked; what is wrong is one line that names the knob."""
import dataclasses
import inspect
import re
import typing

import pytest
from conftest import ROOT, tiny

import train_gpt as tg
from tools import knobs as listing
from tools.common import ToolError

KINDS = tg.kinds(tg.Config)


def config(text: str) -> tg.Config:
    """A config from `NAME=value ...`."""
    return tg.Config.from_env(dict(pair.split("=", 1) for pair in text.split()))


def refusal(env: dict[str, str]) -> str:
    """The one line that refuses this environment."""
    with pytest.raises(tg.UserError) as error:
        tg.Config.from_env(env)
    message = str(error.value)
    assert "\n" not in message and error.value.exit_code == 2
    return message


def test_help_and_the_table_have_each_of_at_most_110_knobs_with_default_bound_and_comment(capsys):
    """The tools read them from the source, without torch."""
    with pytest.raises(SystemExit, match="0"):
        tg.main(["--help"], {})
    first, _, *lines = capsys.readouterr().out.splitlines()
    knobs = listing.read()
    assert all(preset in first for preset in tg.PRESETS) and lines == listing.text().splitlines()
    fields = [field for group in tg.GROUPS for field in dataclasses.fields(group)]
    assert [(k.name.lower(), k.default) for k in knobs] == [(f.name, f.default) for f in fields]
    assert len(knobs) <= 110 and [knob.name for knob in knobs if len(knob.doc) < 10] == []
    assert all(listing.typed_text(k.default) == tg.show(k.default) for k in knobs)
    assert listing.preset("demo") == {name.upper(): value for name, value in tg.PRESETS["demo"].items()}
    assert (ROOT / "docs" / "knobs.md").read_text(encoding="utf-8") == listing.markdown(), \
        "make it anew: python -m tools.knobs --markdown > docs/knobs.md"


def test_words_choose_knobs():
    """By name, expectation or text, in any case, under the heading of their group."""
    (heading, knob, doc) = listing.text(["LORA", "decay"]).splitlines()
    assert heading.startswith("Evaluation: ") and knob == "  TTT_WEIGHT_DECAY=0.5  (0 or more)" and "lora" in doc
    with pytest.raises(ToolError, match="^no-such word: no knob"):
        listing.text(["no-such", "word"])


def test_every_knob_and_every_value_derived_from_knobs_is_read_by_some_code():
    """A check of its value is no reader: these are all self.x, as are derived values."""
    derived = {name: value for group in (tg.Config, tg.ModelKnobs) for name, value in vars(group).items()
               if isinstance(value, property) or name == "grid"}
    deriving = "".join(inspect.getsource(getattr(value, "fget", value)) for value in derived.values())
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    names = {*re.findall(r"\bcfg\.(\w+)", source), *re.findall(r"\bself\.(\w+)", deriving)}
    names |= {knob for row in tg.ROUTES for knob in (row.lr, row.wd)}
    assert len(derived) >= 5 and {*KINDS, *derived} - names == set()


def test_a_preset_overrides_the_defaults_and_variables_the_preset():
    assert config("PRESET=record") == config("") == tg.Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        tg.Config().seed = 1
    demo = config("PRESET=demo")
    assert demo == dataclasses.replace(tg.Config(), preset="demo", **tg.PRESETS["demo"]) != tg.Config()
    assert config("PRESET=demo NUM_LAYERS=7 MATRIX_LR=0.5") == dataclasses.replace(demo, num_layers=7, matrix_lr=0.5)
    assert refusal({"PRESET": "dmeo"}) == "PRESET=dmeo: expected one of record, demo"


def test_what_an_artifact_holds_overrides_the_preset_and_cannot_be_contradicted():
    stored = {**vars(tg.ModelKnobs(num_layers=9, xsa_last_n=3)), "preset": "demo"}
    cfg = tg.Config.from_env({"NUM_LAYERS": "9", "EVAL_STRIDE": "32"}, stored)
    assert (cfg.preset, cfg.num_layers, cfg.xsa_last_n, cfg.eval_stride) == ("demo", 9, 3, 32)
    assert cfg.eval_seq_len == tg.PRESETS["demo"]["eval_seq_len"]
    with pytest.raises(tg.UserError, match="XSA_LAST_N=4: the artifact was made with 3; unset it"):
        tg.Config.from_env({"XSA_LAST_N": "4"}, stored)


def test_a_value_is_read_as_its_type():
    for variable, text, value in (
            ("ITERATIONS", "12", 12), ("ITERATIONS", " 1_000 ", 1000), ("MATRIX_LR", "2e-2", 0.02),
            ("MATRIX_LR", "1", 1.0), ("LN_SCALE", "0", False), ("LN_SCALE", "1 ", True), ("RUN_ID", "a=b", "a=b")):
        read = getattr(tg.Config.from_env({variable: text}), variable.lower())
        assert read == value and type(read) is type(value)


@pytest.mark.parametrize("variable, texts, expected", [
    ("LN_SCALE", ["true", "yes", "2", "", "on"], "0 or 1"), ("MATRIX_LR", ["fast", "", "1,5"], "a number"),
    ("ITERATIONS", ["1.5", "many", "", "1e3", "0x10"], "an integer"), ("MATRIX_LR", ["nan", "inf", "-1"], "0 or more")])
def test_a_value_that_does_not_fit_is_one_line_with_knob_and_value(variable, texts, expected):
    for text in texts:
        message = refusal({variable: text})
        assert message.startswith(f"{variable}=") and message.endswith(f": expected {expected}")


# Texts of which every annotation but plain text forbids some.
CANDIDATES = ["-1", "0", "1", "1.5", "9", "65537", "9223372036854775808", "nan", "inf", "true", "a/b", "q,,neither"]


def accepts(name: str, text: str) -> bool:
    """Whether the knob's own annotation takes this text."""
    kind = KINDS[name]
    try:
        value = tg.parse(name, kind, text)
    except tg.UserError:
        return False
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    return all(bound.holds(value) for bound in getattr(kind, "__metadata__", ()))


def test_every_knob_takes_its_default_and_refuses_by_its_name_what_its_annotation_forbids():
    for name, kind in KINDS.items():
        default = tg.show(getattr(tg.Config, name))
        assert accepts(name, default) and tg.Config.from_env({name.upper(): default}) == tg.Config()
        wrong = [text for text in CANDIDATES if not accepts(name, text)]
        assert wrong or kind is str
        for text in wrong[:1] + wrong[-1:]:
            assert re.match(rf"{name.upper()}=.*: expected ", refusal({name.upper(): text}))


@pytest.mark.parametrize("knobs", [
    # bounds of one value, one of each kind
    "NUM_LAYERS=1", "NUM_LOOPS=65", "VOCAB_SIZE=65537", "SEED=9223372036854775808", "BIGRAM_BUCKETS=1", "MATRIX_BITS=1",
    "ROPE_BASE=0", "LOGIT_SOFTCAP=inf", "BETA2=1", "MIN_LR=1.1", "TRELLIS_STATES=2", "TTT=yes",
    # combinations
    "MODEL_DIM=500", "NUM_KV_HEADS=3", "ROPE_DIMS=15", "ROPE_DIMS=66", "MLP_MULT=0.001",
    "LOOP_START=6", "LOOP_START=3 NUM_LAYERS=4", "PARALLEL_START_LAYER=11", "PARALLEL_START_LAYER=4",
    "PARALLEL_START_LAYER=5", "N_INT6_LAYERS=9 MATRIX_BITS=2", "QAT_START=0.9", "QAT_START=0.9 QUANT=sdclip "
    "N_INT6_LAYERS=9", "TRAIN_BATCH_TOKENS=786431", "MICRO_BATCH_TOKENS=2047", "EVAL_STRIDE=2049",
    "TTT_CHUNK_SIZE=2049", "MUON_BACKEND_STEPS=6", "GPTQ_RESERVE_SECONDS=600", "RESUME=1", "RESUME=auto RUN_ID=r "
    "EVAL_ONLY=r.bin",
    # texts with a form of their own
    "CHECKPOINT_EVERY=", "CHECKPOINT_EVERY=-1", "CHECKPOINT_EVERY=1.5", "NGRAM_RULES=", "NGRAM_RULES=8:0.7",
    "NGRAM_RULES=8:1.2:1", "NGRAM_RULES=8:0.5:1,8:0.6:2", "NGRAM_RULES=65:0.5:1", "TTT_LORA_ON=q,w",
    "DIAGNOSTIC_EVALS=ema,ema"])
def test_an_impossible_value_or_combination_is_one_line_that_names_it(knobs):
    message = refusal(dict(pair.split("=", 1) for pair in knobs.split()))
    assert message.startswith(knobs.split("=")[0]) and "expected" in message
    assert "786432" in message or not knobs.startswith("TRAIN_BATCH_TOKENS=786431")  # the nearest that fits


@pytest.mark.parametrize("knobs", [
    "NUM_LAYERS=4 NUM_LOOPS=0 PARALLEL_START_LAYER=3", "PARALLEL_START_LAYER=3", "PARALLEL_START_LAYER=6",
    "PARALLEL_START_LAYER=4 PARALLEL_RESIDUAL=single", "PARALLEL_START_LAYER=4 NUM_LOOPS=0",
    "MAX_WALLCLOCK_SECONDS=0 GPTQ_RESERVE_SECONDS=600", "EVAL_STRIDE=2048", "EVAL_STRIDE=0", "MICRO_BATCH_TOKENS=2048",
    "WARMDOWN_FRAC=1 MIN_LR=1", "ROPE_DIMS=0", "ROPE_DIMS=64", "QAT_START=0 QUANT=sdclip MATRIX_BITS=2",
    "VOCAB_SIZE=65536", "CHECKPOINT_EVERY=500", "RESUME=auto RUN_ID=r", "TTT_CHUNK_SIZE=4096 TTT=none"])
def test_the_limits_themselves_are_possible(knobs):
    cfg = config(knobs)
    for name, value in (pair.split("=") for pair in knobs.split()):
        assert tg.show(getattr(cfg, name.lower())) == value


def test_derived_values_follow_from_the_knobs():
    cfg = tiny(train_batch_tokens=384, train_seq_len=32, mlp_mult=2.5)
    assert (cfg.train_rows, cfg.head_dim, cfg.mlp_dim) == (12, 16, 80)
    assert (config("EVAL_STRIDE=0").stride, config("EVAL_STRIDE=8").stride) == (2048, 8)
    assert str(config("DATA_DIR=d").dataset_dir) == "d/datasets/fineweb10B_sp8192"
    assert str(config("DATA_DIR=d CASEOPS_ENABLED=1").dataset_dir) == \
        "d/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
    assert str(config("DATA_DIR=d DATA_PATH=p").dataset_dir) == "p"
    cfg = config("ATTN_CLIP_SIGMAS=3 MLP_CLIP_SIGMAS=4 MATRIX_BITS=5 EMBED_CLIP_SIGMAS=7 EMBED_BITS=8")
    assert [cfg.grid(family) for family in ("attn", "mlp", "embed")] == [(5, 3.0), (5, 4.0), (8, 7.0)]


def test_show_is_what_one_would_type():
    values = (0.0261234567, 1234567.5, 1e-8, True, 3, 600.0, "a")
    assert [tg.show(x) for x in values] == ["0.0261234567", "1234567.5", "1e-08", "1", "3", "600", "a"]


def test_a_misspelt_knob_is_refused_and_the_nearest_is_named():
    """A letter missing, one too many; two letters swapped where the name is long enough to be sure."""
    for knob in [name.upper() for name in KINDS if len(name) > 4][::9]:
        middle = len(knob) // 2
        swapped = knob[:middle] + knob[middle + 1] + knob[middle] + knob[middle + 2:]
        names = {knob[:middle] + knob[middle + 1:], knob[:middle] + "X" + knob[middle:], *[swapped] * (len(knob) > 8)}
        for name in names:
            if name.lower() not in KINDS:
                assert refusal({name: "1"}).startswith(f"{name}=1: no such knob; did you mean {knob}?")
    for name in ("GPTQ_RESERVE", "MUON_FOO", "ATTN_GATES_ON", "TTT_ENABLED", "LQER_RANK"):  # as a knob begins
        assert refusal({name: "1"}).startswith(f"{name}=1: no such knob; did you mean ")
    assert "did you mean MATRIX_LR?" in refusal({"matrix_lr": "0.1"})
    assert config("") == tg.Config.from_env({"device": "x"})


@pytest.mark.parametrize("name", """PATH _ TZ OMP_NUM_THREADS NCCL_NET CUDA_VISIBLE_DEVICES LD_LIBRARY_PATH TORCH_LOGS
    PYTORCH_CUDA_ALLOC_CONF HF_TOKEN RANK LOCAL_RANK MASTER_ADDR SLURM_JOB_ID CI BUILD_ID COLUMNS MAKEFLAGS NPROC
    BATCH_SIZE LEARNING_RATE PARALLEL_PID PARALLEL_JOBSLOT COMPILER NUM_THREADS lower_case Mixed_Case""".split())
def test_the_rest_of_the_environment_is_none_of_our_business(name):
    """Among it what GNU parallel, CI systems and batch systems set."""
    assert tg.Config.from_env({name: "anything"}) == tg.Config()
