"""Two and three processes train, score, stop and go on as one. One launch does all runs, one after the other."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import QUICK, ROOT, environment, events
from test_checkpoint import stop_after, trained

import train_gpt as tg


def launch(folder: Path, jobs: list[dict]) -> str:
    """Runs the jobs, of three ranks or of the first WORLD_SIZE of them, under torchrun; returns standard error."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", __file__]
    return subprocess.run([*command, str(folder)], cwd=ROOT, env=env, text=True, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, timeout=300).stderr


def work(folder: Path) -> None:
    """What each rank does: the jobs' runs; a job may plant SIGTERM on rank 0, or an error on rank 1."""
    rank = os.environ["RANK"]
    for i, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        if int(rank) >= int(job.get("WORLD_SIZE", 3)):
            continue
        while i and not (folder / f"{i - 1}.0").exists():  # a rank that was not wanted waits for the others
            time.sleep(0.05)
        with pytest.MonkeyPatch.context() as patch:
            if job.pop("STOP", "") and rank == "0":
                stop_after(patch, 3)
            if job.pop("FAIL", "") and rank == "1":
                patch.setattr(tg, "muon_momentum", lambda cfg, step: 0.9 if step < 2 else 1 / 0)
            # As after a restart by torchrun: the keys of the run before are still in its store.
            code = tg.main([], {**os.environ, **job, "TORCHELASTIC_RESTART_COUNT": str(i)})
        (folder / f"{i}.{rank}").write_text(str(code))
        if dist.is_initialized():
            dist.destroy_process_group()


def codes(folder: Path, jobs: int) -> list[list[str]]:
    """What every rank's `main` returned, job by job."""
    return [[path.read_text() for path in sorted(folder.glob(f"{job}.*"))] for job in range(jobs)]


def same_run(folder: Path, single: Path) -> None:
    """Losses of every step within 2e-4 nats, norms within 1e-3: fp32 sums in another order, in up to six Muon steps."""
    own, other = trained(folder), trained(single)
    assert own.keys() == other.keys()
    for step, (loss, norm, scale) in own.items():
        assert (loss, scale) == pytest.approx((other[step][0], other[step][2]), abs=2e-4)
        assert norm == pytest.approx(other[step][1], abs=1e-3)


def same_score(folder: Path, single: Path) -> None:
    """The same targets in the same ledger, scores within 2e-3 nats (batches of other shapes round otherwise)."""
    own, other = (events(f, "verdict")[0] for f in (folder, single))
    assert own["val_loss"] == pytest.approx(other["val_loss"], abs=2e-3)
    assert all(own[name] == other[name] for name in ("tokens", "bytes", "ledger_sha256"))


def eval_only(dataset: dict[str, str], folder: Path, artifact: Path, **knobs: object) -> dict[str, str]:
    knobs = {"eval_only": str(artifact), "diagnostic_evals": "", **knobs}
    return {name: value for name, value in environment(dataset, folder, **knobs).items()
            if name.lower() not in tg.kinds(tg.ModelKnobs)}


def test_several_ranks_train_score_stop_and_go_on_as_one(single, whole, dataset, tmp_path):
    """And the error of one of them is told with its rank, phase and step, and ends all."""
    sgd = dict(ttt="sgd", ttt_chunk_tokens=300, ttt_lr=0.05, ttt_epochs=2)
    assert tg.main([], eval_only(dataset, tmp_path / "one", single / "r.bin", **sgd)) == 0
    two, unscored = {"WORLD_SIZE": "2"}, dict(ttt="none", eval_stride=0, ngram_base_beta=0, diagnostic_evals="")
    err = launch(tmp_path, [
        environment(dataset, tmp_path / "three", **QUICK),
        eval_only(dataset, tmp_path / "sgd", single / "r.bin", **sgd),
        {**environment(dataset, tmp_path / "two", **unscored), **two},
        {**eval_only(dataset, tmp_path / "lora", single / "r.bin"), **two},
        {**environment(dataset, tmp_path / "stopped", **QUICK), **two, "STOP": "1"},
        environment(dataset, tmp_path / "stopped", resume="1", **QUICK),
        {**environment(dataset, tmp_path / "failed", **QUICK), **two, "FAIL": "1"}])
    assert codes(tmp_path, 7) == [["0"] * 3, ["0"] * 3, *[["0"] * 2] * 2, ["143"] * 2, ["0"] * 3, []], err
    assert "train_gpt.py: rank 1 failed in phase train step 3: ZeroDivisionError" in err
    same_run(tmp_path / "three", whole)
    same_score(tmp_path / "sgd", tmp_path / "one")
    same_run(tmp_path / "two", single)
    same_score(tmp_path / "lora", single)
    assert [e["step"] for e in events(tmp_path / "stopped", "resume")] == [3]
    same_run(tmp_path / "stopped", whole)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
