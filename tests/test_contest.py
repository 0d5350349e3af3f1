"""bench/contest.py: runs paired by seed, made once, by the clock of their own CPU. The trainer is a stand-in."""
import json
import subprocess
import textwrap
from pathlib import Path

import pytest
from conftest import events

from bench import contest

TRAINER = """
import json, os, pathlib, time
began, env = time.perf_counter(), os.environ
time.sleep(0.4)
better = 0.2 * (int(env["SEED"]) - 0.5) * (env["MLP_MULT"] == "3")  # 0.1, 0.3
fits = env["VOCAB_SIZE"] == "512" and (pathlib.Path(env["DATA_PATH"]) / "manifest.json").is_file()
made = [{"event": "val_probe", "step": 3, "val_bpb": 4}, {"event": "train_end", "train_seconds": 6},
        {"event": "adaptation_cut"}] * fits + [
    {"event": "verdict", "steps": 3, "val_bpb": 3 - 2 * better, "bytes": 9, "tokens": 3, "artifact_bytes": 99,
     "slept": time.perf_counter() - began, "diagnostic_evals": {"sliding": 3 + int(env["SEED"]) - better}}] * fits
with open(f"{env['LOG_DIR']}/{env['RUN_ID']}.jsonl", "x") as log:
    log.writelines(json.dumps(event) + "\\n" for event in made)
"""


@pytest.fixture
def command(tmp_path: Path, dataset: dict, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a contest of two seeds, whose logs are in the temporary folder."""
    for name, module in (("train", textwrap), ("val", subprocess)):
        parts = Path(module.__file__).read_text().split("\n\n\n")
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in parts))
    (tmp_path / "train_gpt.py").write_text(TRAINER)
    monkeypatch.setattr(contest, "ROOT", tmp_path)
    monkeypatch.setattr("tools.sweep.ROOT", tmp_path)
    monkeypatch.setenv("LOG_DIR", str(tmp_path / "logs"))
    monkeypatch.setitem(contest.VAL_BYTES, "small", 2000)
    return ["--data", tmp_path / "train.jsonl", "--val", tmp_path / "val.jsonl", "--tokenizer",
            dataset["tokenizer_path"], "--seeds", "2", "--steps", "3"]


def test_a_variant_is_paired_with_the_base_and_no_run_is_made_twice(tmp_path: Path, command, called, monkeypatch):
    monkeypatch.setitem(contest.SIZES, "small", {**contest.SIZES["small"], "MLP_MULT": "4"})
    status, out, _ = called(contest.main, "contest", *command, "narrow: MLP_MULT=3")
    base, narrow = json.loads((tmp_path / "logs/contest/small.json").read_text())["rows"]
    assert status == 0 and out.count("running ") == 4 and "-0.2000 ±0.1000 n=2" in out
    assert base["sliding"] == 4.5 and narrow["sliding"] == pytest.approx(4.3) and narrow["raw"] == 4
    assert narrow["d_adapted"] == pytest.approx({"mean": -0.4, "error": 0.2, "n": 2}) and "d_adapted" not in base
    assert (narrow["steps"], narrow["s_step"], narrow["bytes"], narrow["cut"], narrow["ema"]) == (3, 2, 99, 2, None)
    assert all(events(log.parent, "verdict", log.stem)[0]["slept"] < 0.2
               for log in (tmp_path / "logs/contest/small").glob("*.jsonl"))
    status, out, _ = called(contest.main, "contest", *command, "other-name: MLP_MULT=3")
    assert status == 0 and "running" not in out and "-0.2000 ±0.1000 n=2" in out


@pytest.mark.parametrize("more, said", [
    (["wide"], "wide: expected a name"), (["base: MLP_MULT=3"], "expected a name"), (["a: SEED=3"], "expected a name"),
    (["a: MODEL_DIM=129"], "MODEL_DIM=129: expected a multiple"), (["a: DEVICE=cpu"], "the same run as"),
    (["a: MLP_MULT=3", "a: MLP_MULT=2"], "two variants have one name"), (["--val", "none"], "No such file")])
def test_a_mistake_is_one_line_before_anything_is_spent(more, said: str, tmp_path: Path, command, called):
    status, _, err = called(contest.main, "contest", *command, *more)
    assert status == 2 and said in err and err.count("\n") == 1 and not (tmp_path / "logs").exists()
