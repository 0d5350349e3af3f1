"""Turns the variables of published run commands into this program's knobs.

`./run.sh train` and `./run.sh check` hand their environment through `translate`; the trainer itself knows its own knobs
alone. Earlier names of ours are treated in the same way: what a dropped knob said by default is what happens, another
value is named in a warning.
"""
from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from tools import knobs
from tools.common import ToolError

# Name -> (our name, {value: ours} or None for as it is).
RENAMED: dict[str, tuple[str, dict[str, str] | None]] = {
    "EVAL_ONLY_PATH": ("EVAL_ONLY", None),
    "EVAL_ONLY_QUANTIZED_PATH": ("EVAL_ONLY", None),
    "EVAL_LADDER": ("DIAGNOSTIC_EVALS", None),
    "DATASETS_DIR": ("DATA_PATH", None),
    "SMEAR_GATE": ("SMEAR_GATE_ENABLED", None),
    "BIGRAM_VOCAB_SIZE": ("BIGRAM_BUCKETS", None),
    "MUON_WEIGHT_DECAY": ("MUON_WD", None),
    "ADAM_WEIGHT_DECAY": ("ADAM_WD", None),
    "WARMDOWN_FRACTION": ("WARMDOWN_FRAC", None),
    "USE_POLAR_EXPRESS": ("MUON_COEFFICIENTS", {"0": "classic", "1": "polar"}),
    "PARALLEL_RESIDUAL": ("PARALLEL_RESIDUAL", {"0": "none", "1": "two"}),
    "SLIDING_WINDOW_ENABLED": ("EVAL_STRIDE", {"0": "0", "1": "64"}),
    "TTT_EVAL_SEQ_LEN": ("EVAL_SEQ_LEN", None),
    "GLOBAL_TTT_CHUNK_TOKENS": ("TTT_CHUNK_TOKENS", None),
    "TOKEN_BOOST": ("NGRAM_BASE_BETA", None),
    "THREADS": ("OMP_NUM_THREADS", None),
}
GATE_SWITCHES = {"SPARSE_ATTN_GATE_ENABLED": "sparse", "GATED_ATTN_ENABLED": "dense", "GATED_ATTN": "dense",
                 "GATED_ATTENTION": "dense", "ATTN_OUT_GATE_ENABLED": "output", "GATE_ATTN_OUT": "output"}
# Initial bias of the switches that mean the dense gate's bias form (#1514, #549).
GATE_BIASES = {"GATED_ATTN": "2.0", "GATED_ATTENTION": "4.0"}
LORA_SWITCHES = ("TTT_Q_LORA", "TTT_K_LORA", "TTT_V_LORA", "TTT_O_LORA", "TTT_MLP_LORA")
# Taken apart by hand in `translate`.
SPECIAL = ("PARALLEL_RESIDUAL_START RECUR_LAYERS MATRIX_CLIP_SIGMAS TTT_ENABLED PHASED_TTT_ENABLED TTT_MASK "
           "TOKEN_ORDER TOKEN_THRESHOLD MIXED_QUANT NGRAM_TILT_ENABLED DATASET PREQUANT_TTT "
           "PREQUANT_TTT_ENABLED").split()

# What the program always does, by the name of the knob that said so: (the values that mean it, what that is).
FIXED: dict[str, tuple[str, str]] = {
    "ARTIFACT_DIR": ("", "the artifact lies beside the log, in LOG_DIR"),
    "ROPE_YARN": ("0", "the rotary base does not depend on the length of a row"),
    "GATE_WINDOW": ("12", "gates read 12 channels"),
    "GATE_WIDTH": ("12", "gates read 12 channels"),
    "SMEAR_GATE_WIDTH": ("12", "gates read 12 channels"),
    "GATED_ATTN_INIT_STD": ("0.01", "the dense gate starts with this spread"),
    "SPARSE_ATTN_GATE_SCALE": ("0.5", "the sparse gate has this factor"),
    "ATTN_WINDOWS": ("0", "attention sees the whole document"),
    "MAX_SKIPS": ("64", "every U-Net skip is there"),
    "PARALLEL_FINAL_LANE": ("mean", "two lanes end in their mean"),
    "CAUTIOUS_WD": ("0", "weights decay whatever the sign of their update"),
    "BETA1": ("0.9", "AdamW has this first-moment decay"),
    "ADAM_EPS": ("1e-8", "AdamW has this epsilon"),
    "DETERMINISTIC": ("0", "torch's own algorithms; a CPU's are deterministic"),
    "TRAIN_SEQ_SCHEDULE": ("", "every row has TRAIN_SEQ_LEN tokens"),
    "MAX_SKIPPED_STEPS": ("3", "so many gradients that are not finite are left out"),
    "SEQ_CHANGE_WARMUP_STEPS": ("0", "every row has TRAIN_SEQ_LEN tokens"),
    "GPTQ_TWO_SIDED": ("0", "GPTQ feeds errors forward along the columns alone"),
    "GPTQ_DAMP": ("0.01", "the Hessian is damped by this"),
    "ROW_SOFTNESS": ("0.7", "the rows' Fisher information has this exponent"),
    "CODEC": ("auto range", "the range coder, and Brotli where it is smaller"),
    "TTT_OPTIMIZER": ("adam", "adapters learn by AdamW"),
    "TTT_BETA1": ("0", "the adapters' AdamW has this first-moment decay"),
    "TTT_BETA2": ("0.99", "the adapters' AdamW has this second-moment decay"),
    "TTT_GRAD_STEPS": ("1", "adapters take one step on a chunk"),
    "TTT_FREEZE_BLOCKS": ("0", "every block learns"),
    "TTT_MOMENTUM": ("0.9", "SGD on what is scored has this momentum"),
    "TTT_BATCH_SEQS": ("32", "SGD on what is scored takes so many rows a step"),
    "TTT_GRAD_CLIP": ("1", "SGD on what is scored clips its gradient to this norm"),
    "GLOBAL_TTT_MOMENTUM": ("0.9", "SGD on what is scored has this momentum"),
    "GLOBAL_TTT_BATCH_SEQS": ("32", "SGD on what is scored takes so many rows a step"),
    "GLOBAL_TTT_GRAD_CLIP": ("1", "SGD on what is scored clips its gradient to this norm"),
    "GLOBAL_TTT_EPOCHS": ("1", "a phase is one pass over its documents"),
    "NGRAM_GAMMA": ("0", "the tilt does not depend on the model's probability of the hint"),
}

# Variables without effect here, and why (patterns; the reason is printed once).
NO_EFFECT: tuple[tuple[str, str], ...] = (
    ("ROPE_TRAIN_SEQ_LEN", "the rotary base does not depend on the length of a row"),
    ("PREQUANT_TTT_*", "the trainer has no illegal path"),
    ("TTT_WARM_START_*", "a document's adapters never learn from another document of its part"),
    ("TTT_SHORT_* TTT_TRAIN_* TTT_LOCAL_LR_MULT", "what a document's length decides depends on ids to come"),
    ("TTT_EVAL_BATCHES TTT_DEBUG_BYPASS TTT_DOC_LIMIT GLOBAL_TTT_DOC_LIMIT TTT_HEARTBEAT_SECONDS TTT_ONLY "
     "TTT_ONLY_EVAL TTT_EVAL_ONLY TTT_OUTPUT_DIR VAL_DOC_FRACTION", "every document is scored; EVAL_ONLY scores alone"),
    ("GLOBAL_TTT_RESPECT_DOC_BOUNDARIES GLOBAL_TTT_WARMUP_CHUNKS GLOBAL_TTT_WARMUP_START_LR",
     "documents are always separate, and this SGD has no warm-up"),
    ("NGRAM_WITHIN_* NGRAM_WORD_* NGRAM_AGREE_BONUS WITHIN_* WORD_*", "hints come from whole tokens alone"),
    ("NGRAM_OPEN_TABLE_BITS NGRAM_ORDER_STRIDE", "counts are exact, and NGRAM_RULES lists the contexts"),
    ("ETLB_* ASYMMETRIC_LOGIT ASYM_LOGIT_RESCALE", "no record ever trained this scale; here there is none"),
    ("LQER_* AWQ_LITE_* HESSIAN_CLIP_LAMBDA INT5_LAYERS",
     "QUANT chooses the steps by what an error costs; there is no separate correction"),
    ("LATE_QAT* QAT QAT_ENABLED QAT_THRESHOLD QAT_FRACTION QAT_START_FRAC QAT_BITS QAT_AFTER_STEP",
     "QAT_START says from when on training sees rounded matrices"),
    ("COMPRESSOR", "codes are packed by the range coder, no external program is needed"),
    ("GATED_ATTN_QUANT_GATE", "gates are always stored in int8 with one scale a row"),
    ("FUSED_CE_ENABLED", "the kernels are chosen by what the machine has; see the log"),
    ("GPTQ_ENABLED", "GPTQ is always on"),
    ("EMBED_LR HEAD_LR TIE_EMBEDDINGS EMBEDDING_DIM", "the output matrix is always the embedding, of width MODEL_DIM"),
    ("MUON_BETA2 NORMUON_BETA2", "rows of the update are not rescaled by a second moment: no record here does"),
    ("VAL_BATCH_SIZE", "the batch of evaluation is VAL_BATCH_TOKENS"),
    ("WARMDOWN_ITERS WARMDOWN_STEPS", "the warm-down is a fraction of the budget, WARMDOWN_FRAC"),
    ("WD_TAPER_* SWA_ENABLED SWA_EVERY", "retired by the later records"),
    ("VE_* VALUE_RESIDUAL DISABLE_LAYER0_ATTN REPEAT_UNTIE_MLP REPEAT_UNTIE_MLP_LAYERS GATE_MLP_OUT",
     "the model has no such part"),
    ("ATTN_OUT_GATE_SRC GATE_ATTN_SRC SPARSE_ATTN_GATE_INIT_STD",
     "the gates read the block's normed input, and start at zero"),
    ("RECUR_START_STEP RECUR_WARMUP_STEPS", "the loop starts at the fraction ENABLE_LOOPING_AT of the budget"),
    ("PARALLEL_START_LAYER_IS_PHYSICAL", "it always is"),
    ("TRAIN_SEQ_SCHEDULE_MODE COMPILE_SHAPE_WARMUP*",
     "every row has TRAIN_SEQ_LEN tokens, and every graph is compiled before the clock starts"),
    ("TRAIN_FILES VAL_FILES SAVE_QUANT_STATE PREQUANT_ONLY SKIP_POST_TRAIN_EVAL EVAL_INCLUDE_TAIL",
     "every shard of DATA_PATH is used, and every target is scored"),
    ("CONTROL_TENSOR_NAME_PATTERNS INT8_KEEP_FLOAT_FP32_NAME_PATTERNS", "ROUTES says how each parameter is treated"),
    ("MATCHED_FINEWEB_*", "this is a variable of the data scripts"),
    ("INT4_* INT6_* MTP_* MLP_HIDDEN MLP_GROUPS EMBED_DIM EMA_ENABLED EVAL_BATCH_SEQS "
     "EVAL_DEPTH_RECURRENCE FP16_EMBED_EXPORT GPTQ_RESERVE_MS LOOP_PHASE2_AT LORA_RANK POST_GPTQ_EVAL_ONLY ROPE_TYPE "
     "BIGRAM_HASH TARGET_MB USE_GPTQ USE_ZSTD VAL_MAX_TOKENS YARN_MAX_LEN ACTIVATION ADAM_LR ATTN_PROJ_TYPE "
     "BATCH_SCHEDULE_FRACTION BATCH_TOKENS_START BITNET_* CHURN_LOG_EVERY COMPILE_MODE CORR_WEIGHT_LR DIFF_ATTN "
     "FP_STORAGE LOGIT_HEAD_TYPE MATRIX_OPTIMIZER REFINER REFINER_KERNEL SEQ_LEN_START SEQ_SCHEDULE_FRACTION "
     "SLIDING_BATCH_SIZE SLIDING_EVAL SLIDING_EVAL_STRIDE SMEAR SOFTCAP_TYPE TEMP_SCALING TVERSKY_* "
     "TRAINING_DEPTH_RECURRENCE UNTIE_AT_FRACTION",
     "a part of older scripts that this program does not have"),
)
# Prefixes of other programs' variables, which published commands set beside the knobs.
LIBRARY_PREFIXES = ("CUDA_", "GLOO_", "GOMP_", "HF_", "NCCL_", "OMP_", "PYTORCH_", "TORCH", "TRITON_", "WANDB_")
# What ./run.sh itself reads.
LAUNCHER = frozenset("NPROC AUDIT PYTHON WANDB TENSORBOARD".split())
RECORDS = Path(__file__).resolve().parents[1] / "records"


def no_effect(name: str) -> str:
    """Why a published variable does nothing here; empty for any other name."""
    return next((why for patterns, why in NO_EFFECT if any(fnmatch.fnmatchcase(name, p) for p in patterns.split())), "")


def is_published(name: str) -> bool:
    """Whether published run commands set this variable, and `translate` takes it."""
    return name in {*RENAMED, *GATE_SWITCHES, *LORA_SWITCHES, *SPECIAL, *FIXED} or bool(no_effect(name))


def check_typed(names: Collection[str], known: Collection[str]) -> None:
    """Raise `ToolError` for a typed name that is neither a knob nor published nor of a library or of run.sh."""
    for name in names:
        if not (name in known or name in LAUNCHER or name.startswith(LIBRARY_PREFIXES) or is_published(name)):
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ToolError(f"{name}: no such knob; did you mean {nearest}? (./run.sh knobs lists them; what is for "
                            f"other programs goes before the command)")


class _Translation:
    """The environment on its way from foreign names to ours."""

    def __init__(self, env: Mapping[str, str], defaults: Mapping[str, str]) -> None:
        self.asked = {name: value.strip() for name, value in env.items()}
        self.ours = {name: self.asked[name] if name in defaults else value for name, value in env.items()
                     if name in defaults or not is_published(name)}
        self.defaults = defaults
        self.mapped: dict[str, str] = {}  # "TTT_ENABLED=1 ->" -> " TTT=sgd"

    def __contains__(self, name: str) -> bool:
        return name in self.asked

    def means(self, source: str, name: str, value: str) -> None:
        """Take over what the variable `source` says of a knob; a knob that says otherwise itself is a contradiction."""
        known = self.ours.get(name, value)
        self.suggests(source, name, value)
        if known != value:
            raise ToolError(f"{source}={self.asked[source]} means {name}={value}, but {name}={known} is set too")

    def suggests(self, source: str, name: str, value: str) -> None:
        """Take over what the variable `source` implies for a knob that is not set itself."""
        if name not in self.ours:
            self.ours[name] = value
            if name in self.defaults:
                arrow = f"{source}={self.asked[source]} ->"
                self.mapped[arrow] = self.mapped.get(arrow, "") + f" {name}={value}"

    def switch(self, name: str) -> bool:
        """The value of a variable that is 0 or 1."""
        if self.asked[name] not in ("0", "1"):
            raise ToolError(f"{name}={self.asked[name]!r}: expected 0 or 1")
        return self.asked[name] == "1"

    def integer(self, name: str) -> int:
        """The value of a variable that is an integer."""
        try:
            return int(self.asked[name])
        except ValueError:
            raise ToolError(f"{name}={self.asked[name]!r}: expected an integer") from None


def translate(env: Mapping[str, str], typed: Collection[str] = ()) -> tuple[dict[str, str], list[str]]:
    """The environment with our knobs in place of foreign variables, and warnings of those without effect.

    `typed` are the names that the user gave as arguments: each must be a knob, published, or of a library. Raises
    `ToolError` for one that is not, for contradictions, and for what would silently give another result.

    >>> translate({"TTT_ENABLED": "0", "HOME": "/", "BETA1": "0.9"})[0]
    {'HOME': '/', 'TTT': 'none'}
    """
    defaults = {knob.name: knobs.typed_text(knob.default) for knob in knobs.read()}
    check_typed(typed, defaults)
    names = _Translation(env, defaults)
    for part in (_renamed, _gates, _model, _adaptation, _data):
        part(names)
    return names.ours, _warnings(names)


def _renamed(names: _Translation) -> None:
    for name, (ours, values) in RENAMED.items():
        if name not in names or name == "THREADS" and names.asked[name] == "0":
            continue
        value = names.asked[name]
        if values is not None:
            if name != ours and value not in values:
                raise ToolError(f"{name}={value}: expected one of {', '.join(values)}")
            value = values.get(value, value)
        if name == ours:
            if names.ours.pop(ours) != value:
                names.suggests(name, ours, value)
            names.ours[ours] = value
        elif (name, value) != ("SLIDING_WINDOW_ENABLED", "64"):  # on is what EVAL_STRIDE says anyway
            names.means(name, ours, value)


def _gates(names: _Translation) -> None:
    """Switches of single gates -> ATTN_GATE; one that is off takes away its own gate only."""
    switches = {name: names.switch(name) for name in GATE_SWITCHES if name in names}
    on = [name for name, value in switches.items() if value]
    if len({GATE_SWITCHES[name] for name in on}) > 1:
        raise ToolError(f"{' and '.join(on)} are both switched on; ATTN_GATE takes one of them")
    for name in on:
        names.means(name, "ATTN_GATE", GATE_SWITCHES[name])
        if name in GATE_BIASES:
            names.suggests(name, "GATED_ATTN_BIAS", GATE_BIASES[name])
    for name in switches:
        if not on and GATE_SWITCHES[name] == names.defaults["ATTN_GATE"]:
            names.suggests(name, "ATTN_GATE", "none")


def _model(names: _Translation) -> None:
    if "PARALLEL_RESIDUAL_START" in names:
        start = names.integer("PARALLEL_RESIDUAL_START")
        names.means("PARALLEL_RESIDUAL_START", "PARALLEL_RESIDUAL", "single" if start >= 0 else "none")
        names.means("PARALLEL_RESIDUAL_START", "PARALLEL_START_LAYER", str(max(start, 0)))
    if "RECUR_LAYERS" in names:
        parts = names.asked["RECUR_LAYERS"].split(",")
        blocks = [int(part) for part in parts if re.fullmatch("[0-9]+", part.strip())]
        if not blocks or len(blocks) < len(parts) or blocks != list(range(blocks[0], blocks[-1] + 1)):
            raise ToolError(f"RECUR_LAYERS={names.asked['RECUR_LAYERS']}: expected consecutive blocks such as 4,5")
        names.means("RECUR_LAYERS", "LOOP_START", str(blocks[0]))
        names.means("RECUR_LAYERS", "LOOP_END", str(blocks[-1]))
        names.suggests("RECUR_LAYERS", "NUM_LOOPS", "1")
    if "MATRIX_CLIP_SIGMAS" in names:  # every matrix is one of attention or MLP, whose own knobs come first
        for family in ("ATTN", "MLP"):
            names.suggests("MATRIX_CLIP_SIGMAS", f"{family}_CLIP_SIGMAS", names.asked["MATRIX_CLIP_SIGMAS"])
    if "MIXED_QUANT" in names:
        if names.switch("MIXED_QUANT"):
            names.means("MIXED_QUANT", "QUANT", "sdclip")
        else:
            names.ours["N_INT6_LAYERS"] = "0"


def _adaptation(names: _Translation) -> None:
    if "TTT_ENABLED" in names:
        whole = {"TTT_EPOCHS", "TTT_CHUNK_TOKENS", "TTT_LR", "TTT_FREEZE_BLOCKS"} & set(names.asked)
        names.suggests("TTT_ENABLED", "TTT", "none" if not names.switch("TTT_ENABLED") else "sgd" if whole else "lora")
    if "PHASED_TTT_ENABLED" in names and not names.switch("PHASED_TTT_ENABLED"):
        names.means("PHASED_TTT_ENABLED", "PHASED_TTT_NUM_PHASES", "0")
    masked = {name.removeprefix("TTT_").removesuffix("_LORA").lower() for name in LORA_SWITCHES
              if name in names and not names.switch(name)}
    mask = names.asked.get("TTT_MASK", "")
    if mask and not re.fullmatch("no_[qkv]+", mask):
        raise ToolError(f"TTT_MASK={mask}: expected such as no_qv")
    masked |= set(mask.removeprefix("no_"))
    if masked:
        source = next(name for name in ("TTT_MASK", *LORA_SWITCHES) if name in names)
        names.suggests(source, "TTT_LORA_ON", ",".join(part for part in names.defaults["TTT_LORA_ON"].split(",")
                                               if part not in masked))
    if "TOKEN_ORDER" in names or "TOKEN_THRESHOLD" in names:
        order = names.integer("TOKEN_ORDER") if "TOKEN_ORDER" in names else 16
        source = "TOKEN_ORDER" if "TOKEN_ORDER" in names else "TOKEN_THRESHOLD"
        names.suggests(source, "NGRAM_RULES", f"{order - 1}:{names.asked.get('TOKEN_THRESHOLD', '0.8')}:1")
        names.suggests(source, "NGRAM_BETA_BY_SHARE", "0")
    if "NGRAM_TILT_ENABLED" in names:
        if names.switch("NGRAM_TILT_ENABLED"):
            names.suggests("NGRAM_TILT_ENABLED", "NGRAM_BASE_BETA", "2")
        else:
            names.ours["NGRAM_BASE_BETA"] = "0"
    if any(name in names and names.switch(name) for name in ("PREQUANT_TTT", "PREQUANT_TTT_ENABLED")):
        raise ToolError("PREQUANT_TTT: training on the validation data before it is scored is illegal, and the trainer "
                        "cannot do it; records/pr1485_illegal has the specimen")


def _data(names: _Translation) -> None:
    if names.asked.get("DATASET"):
        names.means("DATASET", "DATA_PATH", f"{names.asked.get('DATA_DIR') or './data'}/datasets/"
                                            f"{names.asked['DATASET']}")


def _same(text: str, fixed: str) -> bool:
    """Whether a value says what is done anyway; numbers are compared as numbers."""
    try:
        return float(text) == float(fixed)
    except ValueError:
        return text in fixed.split() or text == fixed


def nearest_record(ours: Mapping[str, str]) -> str:
    """The folder of records/ whose knobs agree with most of these and contradict fewest; empty: with none."""
    def agreement(folder: Path) -> int:
        lines = (line.partition("=") for line in (folder / "config.env").read_text().splitlines())
        return sum(1 if _same(ours[name], value) else -1 for name, _, value in lines if name in ours)
    folders = {f"records/{path.parent.name}": agreement(path.parent) for path in sorted(RECORDS.glob("*/config.env"))
               if "illegal" not in path.parent.name}
    best = max(folders, key=lambda name: folders[name], default="")
    return best if folders.get(best, 0) > 0 else ""


def _warnings(names: _Translation) -> list[str]:
    """What was mapped, in one line; and one for each reason, with all variables that have no effect for it."""
    mapped = []
    if names.mapped:
        where = nearest_record({name: names.ours[name] for name in names.ours if name in names.defaults})
        shown = ", ".join(map("".join, names.mapped.items()))
        mapped = [f"{shown}; a published script has other defaults than this one"
                  + f": `./run.sh train {where}` has the knobs of the record nearest to these" * bool(where)]
    reasons: dict[str, list[str]] = {}
    for name in sorted(names.asked):
        if name in names.defaults:
            continue
        if name in FIXED:
            values, why = FIXED[name]
            if not _same(names.asked[name], values):
                shown = values.split()[0] if values else ""
                reasons.setdefault(f"{why} ({name}={shown})", []).append(name)
        elif name not in (*RENAMED, *SPECIAL) and (why := no_effect(name)):
            reasons.setdefault(why, []).append(name)
    return mapped + [f"{', '.join(group)}: no effect here: {why}" for why, group in reasons.items()]
