"""Shared pieces of the tests: tiny configurations, a tiny dataset of real text, runs in this process and in others."""
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels then run on the CPU

import train_gpt as tg  # noqa: E402
from bench.common import text_dataset, write_shard  # noqa: E402, F401
from tools.common import ToolError, program  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: they may not depend on who else is at work

# A model of every part in a few milliseconds a step: knobs as environment text. The trellis takes a second at any size:
# tests that are about it ask for it.
TINY = dict(vocab_size="512", num_layers="4", model_dim="32", num_heads="2", num_kv_heads="1", loop_start="1",
            loop_end="2", num_loops="1", parallel_start_layer="3", train_seq_len="32", train_batch_tokens="384",
            micro_batch_tokens="128", eval_seq_len="32", eval_stride="8", val_batch_tokens="1024",
            max_wallclock_seconds="0", iterations="4", warmup_steps="1", gptq_calibration_batches="2",
            ema_decay="0.5", dtype="float32", enable_looping_at="0.5", rope_dims="8", device="cpu",
            diagnostic_evals="ema,quantized,sliding", ttt_chunk_size="32", ttt_context="cache", ttt_lora_rank="4",
            ttt_lora_lr="0.002", ttt_lora_alpha="8", phased_ttt_num_phases="2", phased_ttt_prefix_docs="5",
            ttt_chunk_tokens="64", global_ttt_lr="0.01", ngram_base_beta="2", ngram_rules="2:0.5:1,4:0.5:1",
            trellis_states="1")

# A run in which everything that has a memory changes: loop, rounding, momentum, average.
QUICK = dict(num_layers=2, loop_start=0, loop_end=0, parallel_start_layer=1, ttt="none", ngram_base_beta=0,
             diagnostic_evals="", enable_looping_at=0.4, iterations=6, eval_stride=0, quant="sdclip",
             qat_start=0.5)

# A parameter for the device of tests that run on a GPU where there is one.
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(),
                                                                        reason="torch sees no CUDA device")])


def tiny(**knobs: object) -> tg.Config:
    """A `Config` from TINY and overrides given as field=value."""
    return tg.Config.from_env({name.upper(): tg.show(value) for name, value in {**TINY, **knobs}.items()})


def environment(dataset: dict[str, str], folder: Path, **knobs: object) -> dict[str, str]:
    """Environment of a tiny run `r` that leaves its files in `folder`."""
    values = {**TINY, **dataset, "log_dir": str(folder), "run_id": "r", **knobs}
    return {name.upper(): tg.show(value) for name, value in values.items()}


def events(folder: Path, name: str, run_id: str = "r") -> list[dict]:
    """All events of that name in a run's log."""
    lines = (folder / f"{run_id}.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def refusal(command: Callable, *arguments: object) -> str:
    """The one line that refuses a command."""
    with pytest.raises(ToolError) as error:
        command(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def batch_of(ids: np.ndarray) -> tg.Batch:
    """[R, T+1] ids -> a batch of R rows of T tokens."""
    return tg.make_batch(list(ids.astype(np.uint16)), len(ids), ids.shape[1] - 1)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Calls a `main` as a program of its own, but in this process; the exit status, stdout and stderr."""
    def call(main: Callable[[Sequence[str]], int | None], name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            status = program(main, name)
        except SystemExit as ended:  # argparse's own
            status = ended.code
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def run(tmp_path: Path) -> tg.Run:
    """A single CPU process in fp32 that logs to a temporary folder."""
    with tg.Run(tiny(log_dir=str(tmp_path / "logs"), run_id="r"), {}) as started:
        yield started


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """DATA_PATH and TOKENIZER_PATH of a small dataset: standard-library sources, a 512-piece SentencePiece model.

    Eight validation documents of at most 200 ids: what is scored here takes most of the time.
    """
    folder = tmp_path_factory.mktemp("data")
    knobs = text_dataset(folder)
    val = tg.TokenStream(folder, "fineweb_val")
    documents = np.split(val.read(0, len(val)), val.document_starts()[1:])
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate([ids[:200] for ids in documents]))
    return knobs


@pytest.fixture(scope="session")
def single(dataset: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run in this process, which opened validation after the artifact was frozen."""
    folder, load, frozen = tmp_path_factory.mktemp("single"), tg.ValData.load, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg.ValData, "load", lambda cfg, run: frozen.append(run.path(".bin").exists()) or load(cfg, run))
        assert tg.main([], environment(dataset, folder)) == 0
    assert frozen == [True]
    return folder


@pytest.fixture(scope="session")
def whole(dataset: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished QUICK run."""
    folder = tmp_path_factory.mktemp("whole")
    assert tg.main([], environment(dataset, folder, **QUICK)) == 0
    return folder
