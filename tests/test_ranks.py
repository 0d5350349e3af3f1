"""Several processes train, score, stop and go on as one. Each launch does several runs, one after the other."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import QUICK, ROOT, environment, events
from test_checkpoint import stop_after, trained

import train_gpt as tg


def launch(folder: Path, jobs: list[dict], *launchers: list[str]) -> str:
    """Runs the jobs under torchrun, once for each list of its arguments at the same time; returns standard error."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run"]
    nodes = [subprocess.Popen([*command, *launcher, __file__, str(folder)], cwd=ROOT, env=env, text=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for launcher in launchers]
    return "".join(node.communicate(timeout=300)[1] for node in nodes)


def work(folder: Path) -> None:
    """What each rank does: the jobs' runs; a job may plant SIGTERM on rank 0, or an error on rank 1."""
    for i, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        with pytest.MonkeyPatch.context() as patch:
            if job.pop("STOP", "") and os.environ["RANK"] == "0":
                stop_after(patch, 3)
            if job.pop("FAIL", "") and os.environ["RANK"] == "1":
                patch.setattr(tg, "muon_momentum", lambda cfg, step: 0.9 if step < 2 else 1 / 0)
            # As after a restart by torchrun: the keys of the run before are still in its store.
            code = tg.main([], {**os.environ, **job, "TORCHELASTIC_RESTART_COUNT": str(i)})
        (folder / f"{i}.{os.environ['RANK']}").write_text(str(code))
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


def same_score(folder: Path, single: Path, within: float) -> None:
    """The same targets in the same ledger, each score within so many nats (batches of other shapes round otherwise)."""
    own, other = (events(f, "verdict")[0] for f in (folder, single))
    assert own["val_loss"] == pytest.approx(other["val_loss"], abs=within)
    assert all(own[name] == other[name] for name in ("tokens", "bytes", "ledger_sha256"))


def eval_only(dataset: dict[str, str], folder: Path, artifact: Path, **knobs: object) -> dict[str, str]:
    knobs = {"eval_only": str(artifact), "diagnostic_evals": "", **knobs}
    return {name: value for name, value in environment(dataset, folder, **knobs).items()
            if name.lower() not in tg.kinds(tg.ModelKnobs)}


def test_two_ranks_train_score_stop_and_go_on_as_one(single, whole, dataset, tmp_path):
    """And the error of one of them is told with its rank, phase and step, and ends all."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert tg.main([], environment(dataset, tmp_path / "one stopped", **QUICK)) == 143
    err = launch(tmp_path, [
        environment(dataset, tmp_path / "all", diagnostic_evals="quantized"),
        eval_only(dataset, tmp_path / "lora", single / "r.bin"),
        environment(dataset, tmp_path / "one stopped", resume="1", **QUICK),
        {**environment(dataset, tmp_path / "two stopped", **QUICK), "STOP": "1"},
        {**environment(dataset, tmp_path / "failed", **QUICK), "FAIL": "1"}], ["--standalone", "--nproc_per_node=2"])
    assert codes(tmp_path, 5) == [*[["0", "0"]] * 3, ["143", "143"], []], err
    assert "train_gpt.py: rank 1 failed in phase train step 3: ZeroDivisionError" in err
    same_run(tmp_path / "all", single)
    same_score(tmp_path / "all", single, within=3e-2)  # adaptation amplifies what differs between the two artifacts
    same_score(tmp_path / "lora", single, within=2e-3)
    assert tg.main([], environment(dataset, tmp_path / "two stopped", resume="1", **QUICK)) == 0
    for folder in ("one stopped", "two stopped"):
        assert [e["step"] for e in events(tmp_path / folder, "resume")] == [3]
        same_run(tmp_path / folder, whole)


def test_three_ranks_on_two_nodes_train_and_adapt_all_weights_as_one(single, whole, dataset, tmp_path):
    knobs = dict(ttt="sgd", ttt_chunk_tokens=300, ttt_lr=0.05, ttt_epochs=2)
    assert tg.main([], eval_only(dataset, tmp_path / "one", single / "r.bin", **knobs)) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={probe.getsockname()[1]}"]
    err = launch(tmp_path, [environment(dataset, tmp_path / "all", **QUICK),
                            eval_only(dataset, tmp_path / "sgd", single / "r.bin", **knobs)],
                 [*common, "--node_rank=0", "--nproc_per_node=1"], [*common, "--node_rank=1", "--nproc_per_node=2"])
    assert codes(tmp_path, 2) == [["0"] * 3] * 2, err
    same_run(tmp_path / "all", whole)
    same_score(tmp_path / "sgd", tmp_path / "one", within=2e-3)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
