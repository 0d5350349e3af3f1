"""The benches: FLOPs are counted right, every bench runs at tiny size, a trace is taken apart as it should be."""
import functools
import importlib
import json
import math
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment

import bench.all as bench
import train_gpt as tg
from bench.common import Machine, setting
from bench.studies import caseops, scaling
from bench.studies.profiling import UPDATE, analyze, gpu_work
from tests.stress import faults
from tools.common import ToolError

# -- every part ------------------------------------------------------------------------------------------

def test_every_part_measures_something_and_scaling_takes_it(dataset, tmp_path: Path, capsys, monkeypatch):
    """What `--gpu` runs, at tiny size: in one graph, too, but without the compiler's code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(bench, "machine", lambda run: Machine("any", 1e12, 1e12, None))  # slow in bfloat16 on a CPU
    monkeypatch.setattr(bench, "cuda_tests", functools.partial(bench.cuda_tests, ["tests/test_cuda.py"]))
    out, compiled = tmp_path / "bench.json", ["rotary", "kernels", "step"]
    for compile_, names in (("on", compiled), ("off", [name for name in bench.LIMITS if name not in compiled])):
        small = environment(dataset, tmp_path, ttt_lora_rank=2, num_layers=2, loop_start=0, loop_end=0, quant="sdclip",
                            parallel_start_layer=1, bigram_buckets=64, dtype="bfloat16", compile=compile_)
        with setting(small) as (cfg, run):
            bench.measure(cfg, run, small | {"ITERATIONS": "1", "TTT": "none", "NGRAM_BASE_BETA": "0"}, names, out,
                          time.time() + 10_000, repeats=1)
    report, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert report["left_out"] == {} and list(tmp_path.iterdir()) == [out]
    assert set(report["tables"]) == set(bench.LIMITS)
    for title, rows in report["tables"].items():
        assert all(row.get("ms", 1) > 0 for row in rows if "gaps" not in row["name"]), title
        assert f"\n{title} (" in shown
        assert all(any(name in row["name"] for name in ("fa3", "fa4", "varlen", "flash"))
                   for row in rows if "failed" in row), title
    for part in ("step", "unlooped"):
        step = {row["name"]: row for row in report["tables"][part]}
        assert {"data", "forward", "backward", "newton_schulz", "optimizer", "ema", "step"} <= set(step)
        assert step["step"]["floor_ms"] > step["forward"]["floor_ms"] and step["step"]["tok_s"] > 0
        assert {f"profile: {kind}" for kind in ("gemm", "newton-schulz", "optimizer, ema", "gaps")} <= set(step)
        assert 0 < step["profile: explained"]["share"] < 1.5
    tests, *said = report["tables"]["tests"]
    assert tests["status"] == 0 and (torch.cuda.is_available() or any("no CUDA device" in r["name"] for r in said))
    assert report["tables"]["text"][0]["val_bpb"] > 0
    assert "rms_norm: reference, compiled" in {row["name"] for row in report["tables"]["kernels"]}
    assert scaling.main([str(out)]) == 0 and "64 GPUs" in capsys.readouterr().out


def test_a_part_that_is_late_fails_or_kills_its_process_costs_only_itself(tmp_path: Path, run: tg.Run, monkeypatch):
    """Too late, wrong, too slow, in want of something, and dead: a process without a device plays all of it."""
    def play(*_, **__) -> dict:
        return {"versions": lambda: 1 / 0, "blocks": lambda: time.sleep(9), "rotary": lambda: [{"name": "fine"}],
                "attention": lambda: tg.require(False, "no text"), "kernels": lambda: os._exit(7), "sgd": list}

    def start(names: list[str]) -> int:
        child = os.fork()
        if child == 0:
            bench.measure(run.cfg, run, {}, names, out, time.time() + 60)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    out = tmp_path / "r.json"
    monkeypatch.setattr(bench, "machine", lambda run: Machine("any", 1e12, 1e12, None))
    monkeypatch.setattr(bench, "bodies_of", play)
    monkeypatch.setattr(bench, "LIMITS", dict.fromkeys(play(), 0.2) | {"step": 100})
    bench.supervised(["versions", "blocks", "attention", "kernels", "step", "rotary"], out, math.inf, start)
    report = json.loads(out.read_text())
    assert report["left_out"] == {"attention": "no text", "step": "60 s are left"}
    assert {name: rows[0].get("failed") for name, rows in report["tables"].items()} == {
        "versions": "ZeroDivisionError: division by zero", "blocks": "OutOfTime: stopped after 0 s",
        "kernels": "the process ended with status 7", "rotary": None}


@pytest.mark.parametrize("command, env, said", [
    ("all --out nowhere/x.json --gpu loader", {"DEVICE": "cpu"}, "--gpu: torch sees no CUDA device"),
    ("all --out nowhere/x.json stpe", {}, "stpe: no such part; expected some of versions"),
    ("encoding README.md run.sh", {}, "README.md: not a SentencePiece model"),
    ("ngram 0.001", {"NGRAM_RULES": "x"}, "NGRAM_RULES=x: expected"),
    ("scaling README.md", {}, "README.md: not the JSON of"),
    ("evaluation README.md x", {}, "x: expected a number of targets")])
def test_a_mistake_at_a_bench_is_one_line(command: str, env: dict[str, str], said: str, monkeypatch, called):
    """No traceback and status 2, and nothing is made."""
    name, *arguments = command.split()
    place = "bench" if (ROOT / "bench" / f"{name}.py").exists() else "bench.studies"
    module = importlib.import_module(f"{place}.{name}")
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(ROOT)
    main = (lambda arguments: bench.main(arguments, os.environ)) if name == "all" else module.main
    status, _, err = called(main, "bench", *arguments)
    assert status == 2 and said in err.splitlines()[-1] and "Traceback" not in err, err
    assert not (ROOT / "nowhere").exists()


def test_every_program_has_the_same_frame():
    """Whatever is run as `python -m` ends by `program`, and edits no path."""
    for path in [p for folder in ("bench", "tools", "data", "tests/stress") for p in (ROOT / folder).rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        _, own, body = text.partition('if __name__ == "__main__":')
        assert (not own or "sys.exit(program(" in body) and "sys.path.insert" not in text, path


def test_a_bench_whose_run_fails_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the trainer's own lines the first, or its status; what they print is above."""
    monkeypatch.setattr(faults, "finish", lambda process: (2, "x\ntrain_gpt.py: no luck\nTraceback\n"))
    monkeypatch.setattr(faults, "launch", lambda *_: None)
    monkeypatch.setattr(faults, "text_dataset", lambda folder: {})
    failed = functools.partial(subprocess.CompletedProcess, [], 3, "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **more: failed())
    for body, words in ((lambda: faults.main([]), "run on 1 ranks fails: no luck"),
                        (lambda: caseops.val_bpb(tmp_path, "v1", 2, 1, {}), "v1-2-1: the run fails with status 3")):
        with pytest.raises((tg.UserError, ToolError), match=words):
            body()


# -- the profile -----------------------------------------------------------------------------------------

def event(cat: str, name: str, ts: float, dur: float, **more: object) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, **more}


def test_kernels_are_grouped_by_kind_and_by_who_launched_them():
    """Two steps of 100 us; kernels run after their launch, so that the update's run when it is over."""
    launches = [("cuda_runtime", 1, 10), ("cuda_driver", 2, 20), ("cuda_runtime", 3, 30), ("cuda_runtime", 4, 62),
                ("cuda_driver", 5, 64), ("cuda_runtime", 6, 40), ("cuda_runtime", 7, 45)]
    kernels = [("nvjet_tst_128x256", 1, 50, 40), ("triton_poi_fused_add_mul_7", 2, 90, 20), ("mystery", 7, 168, 2),
               ("void cutlass::device_kernel<flash::FlashAttnFwdSm90>", 3, 110, 30), ("sm90_xmma_gemm", 4, 140, 10),
               ("triton_poi_fused_lerp_2", 5, 145, 15), ("triton_red_fused_log_softmax_tanh_1", 6, 160, 8)]
    trace = [event(cat, "launch", ts, 1, args={"correlation": i}) for cat, i, ts in launches]
    trace += [event("kernel", name, ts, dur, args={"correlation": i}) for name, i, ts, dur in kernels]
    trace += [event("gpu_memcpy", "Memcpy HtoD", 180, 6), event("user_annotation", UPDATE, 60, 10),
              event("gpu_user_annotation", UPDATE, 140, 20), event("cpu_op", "aten::mm", 5, 50), {"ph": "M"}]
    rows = {row["name"]: row for row in analyze(*gpu_work(trace), 2, 0.1)}
    found = {name: round(2000 * row["ms"]) for name, row in rows.items() if "ms" in row and ":" not in name}
    assert found == {"gemm": 40, "norm, elementwise": 20, "attention": 30, "newton-schulz": 10, "optimizer, ema": 15,
                     "cross-entropy": 8, "other": 2, "copies": 6, "gaps": 200 - 131, "step": 200}
    assert rows["explained"]["share"] == pytest.approx(129 / 200) and rows["gemm"]["calls"] == 0.5


# -- scaling ---------------------------------------------------------------------------------------------

def test_more_gpus_share_the_rows_until_the_rest_is_all_there_is():
    rows = scaling.scaling_rows(tg.Config(), 2.0, 10.0, 1e12, 350, 400)
    assert rows[0]["compute_ms"] == 2.0 * 384 + 10 and rows[-1]["rows"] == 6 and rows[-1]["compute_ms"] == 22
    assert rows[0]["links_ms"] == 0 and rows[0]["efficiency"] == 1
    for less, more in zip(rows, rows[1:]):
        assert more["links_ms"] > less["links_ms"] and more["efficiency"] < less["efficiency"]
        assert more["newton_schulz_ms"] <= less["newton_schulz_ms"]
