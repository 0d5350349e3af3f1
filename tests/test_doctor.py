"""The doctor names what a run would trip over, with the remedy, and what it predicts is what its clock says."""
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY, tiny

import train_gpt as tg
from tools import doctor, predict


def levels(lines) -> dict[str, str]:
    return {line.name: line.level for line in lines}


def the(lines, name: str) -> doctor.Line:
    (found,) = [line for line in lines if line.name == name]
    return found


def test_packages_against_their_pins(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    pins = tmp_path / "requirements.txt"
    pins.write_text("# a comment\nnumpy==0.1\nno-such-thing==1\ntorch==2.9.0\nabsent==1; python_version < '3'\n")
    lines = list(doctor.python_lines())
    assert levels(lines) == {"python": "ok", "numpy": "warning", "no-such-thing": "failure", "torch": "ok"}
    assert str(pins) in the(lines, "no-such-thing").remedy
    pins.write_text(f"numpy=={doctor.importlib.metadata.version('numpy')}\n")
    assert the(doctor.python_lines(), "packages").level == "ok"
    pins.write_text("torch==2.13.0\n")  # may be the machine's own
    for version, level in (("2.8.1", "failure"), ("2.9.0+cu128", "ok"), ("2.13.0", "ok"), ("3.0.0", "warning")):
        monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: version)  # noqa: B023
        assert the(doctor.python_lines(), "torch").level == level


TOPOLOGY = "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m\nGPU0\t X \tNV18\t{}\tPIX\t0-15\n" \
           "GPU1\tNV18\t X \tNV18\tSYS\t0-15\nGPU2\t{}\tNV18\t X \tSYS\t0-15\nNIC0\tPIX\tSYS\tSYS\t X \n"


def test_gpus_in_use_and_pairs_without_a_link_are_named(monkeypatch):
    rows = "NVIDIA H100 80GB HBM3, 81559, 3, 570.1, 0\nNVIDIA H100 80GB HBM3, 81559, 40000, 570.1, 97\n"
    monkeypatch.setattr(doctor, "output", lambda *c: TOPOLOGY.format("NV18", "NV18") if "topo" in c else rows)
    lines = list(doctor.gpu_lines())
    assert [line.level for line in lines] == ["ok", "warning", "ok"]
    assert lines[0].found.startswith("2 x NVIDIA H100") and lines[1].found.startswith("GPU 1 is in use: 40000")
    assert lines[2].found == "NV18 between all pairs"
    slow = doctor.links_line(TOPOLOGY.format("SYS", "SYS"))
    assert slow.level == "warning" and "1 of 3 pairs of GPUs have no NVLink" in slow.found


def test_room_and_load(tmp_path, monkeypatch):
    lines = list(doctor.machine_lines({"LOG_DIR": tmp_path / "not" / "yet", "data": tmp_path}))
    assert levels(lines)["disk: LOG_DIR"] == levels(lines)["disk: data"] == "ok"
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0, 0))
    monkeypatch.setattr(os, "access", lambda *a: False)
    lines = list(doctor.machine_lines({"LOG_DIR": tmp_path}))
    assert levels(lines)["cpu"] == "warning" and "cannot be written" in the(lines, "disk: LOG_DIR").found


@pytest.mark.parametrize("build, remedy", [(None, "PIP_EXTRA_INDEX_URL"), ("13.0", "update the driver")])
def test_a_torch_that_does_not_see_the_gpus(build, remedy):
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False), version=SimpleNamespace(cuda=build))
    (line,) = doctor.cuda_lines(torch, driver=True)
    assert line.level == "failure" and remedy in line.remedy and not list(doctor.cuda_lines(torch, driver=False))


def test_kernels_and_the_wheel_of_the_faster_one(run, monkeypatch):
    lines = list(doctor.kernel_lines(tg, tiny(), run))
    assert levels(lines) == {"attention": "ok", "kernels": "ok", "coder": "ok"}
    assert the(lines, "attention").found == tg.pick_kernels(tiny(), run).attention.name
    monkeypatch.setattr(doctor, "installed", lambda package: "")
    assert the(doctor.kernel_lines(tg, tiny(), run), "coder").level == "warning"
    cuda = SimpleNamespace(get_device_capability=lambda device: (9, 0))
    fake = SimpleNamespace(
        torch=SimpleNamespace(cuda=cuda, __version__="2.9.1+cu128", version=SimpleNamespace(cuda="12.8")),
        pick_kernels=lambda cfg, run: SimpleNamespace(attention=SimpleNamespace(name="sdpa"), fused="plain"))
    gpu = SimpleNamespace(is_cuda=True, device="cuda", compiles=True, dtype=tg.torch.bfloat16)
    lines = list(doctor.kernel_lines(fake, tiny(), gpu))
    assert [line.level for line in lines] == ["warning"] * 3 and lines[0].remedy.endswith("/cu128_torch291")
    assert lines[0].found == "sdpa, though this is a Hopper GPU" and lines[1].found.endswith(", compiled, bfloat16")


def test_room_is_what_the_run_itself_asks_for(dataset, run, monkeypatch):
    """Processes share a machine's memory: as many as fit have room, twice as many have not."""
    assert list(predict.resource_warnings(tg, tiny(), run, 1000)) == []
    need = max(predict.predicted_memory(tg, tiny(), run, 1000).values())
    monkeypatch.setattr(predict, "memory_left", lambda run: 4 * need)
    assert list(predict.resource_warnings(tg, tiny(), run, 1000, 4)) == []
    assert len(list(predict.resource_warnings(tg, tiny(), run, 1000, 8))) == 1 and run.world == 1
    monkeypatch.setattr(predict, "memory_left", lambda run: 1)
    monkeypatch.setattr(predict.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    lines = [line for line in doctor.data_lines(tg, tiny(**dataset), run) if line.name == "room"]
    assert [line.level for line in lines] == ["warning"] * 2
    assert "MiB a process" in lines[0].found and "bytes free, a run may need" in lines[1].found


def test_data_and_tokenizer(dataset, run, tmp_path):
    lines = list(doctor.data_lines(tg, tiny(**dataset), run))
    assert {"data": "ok", "tokenizer": "ok"}.items() <= levels(lines).items()
    for path in Path(dataset["data_path"]).glob("fineweb_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = tmp_path / "fineweb_train_000000.bin"
    broken.write_bytes(broken.read_bytes()[:-2])
    (line,) = doctor.data_lines(tg, tiny(**{**dataset, "data_path": str(tmp_path)}), run)
    assert line.level == "failure" and f"{broken}: header says" in line.found


@pytest.mark.parametrize("stamp, level", [
    (None, "warning"), ("[]", "failure"), ("no", "failure"), ("{}", "failure"),
    (dict(shards_sha256="b", val_documents=9, shared_documents=0, shared_share=0.0), "failure"),
    (dict(shards_sha256="a", val_documents=9, shared_documents=1, shared_share=0.02), "failure"),
    (dict(shards_sha256="a", val_documents=9, shared_documents=1, shared_share=0.005), "ok")])
def test_what_verification_has_written_down_is_read(stamp, level, tmp_path):
    """No stamp: nobody has looked; one of other shards or with a leak: training refuses."""
    if stamp is not None:
        (tmp_path / "verified.json").write_text(stamp if isinstance(stamp, str) else json.dumps(stamp))
    line = doctor.overlap_line(SimpleNamespace(shards_sha256=lambda folder: "a"), SimpleNamespace(dataset_dir=tmp_path))
    assert line.level == level and (level == "ok" or "other" in line.remedy or "data verify" in line.remedy)


@pytest.mark.parametrize("knobs, remedy", [
    ({"PRESET": "demo"}, "./run.sh data demo"), ({}, "./run.sh data download --variant sp8192"),
    ({"VOCAB_SIZE": "1024"}, "./run.sh data download --variant sp1024"),
    ({"CASEOPS_ENABLED": "1"}, "./run.sh data download --variant caseops"), ({"DATA_PATH": "x"}, "see data/README.md")])
def test_missing_data_comes_with_the_command_that_gets_it(knobs, remedy, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the demo's data may lie in this folder
    cfg = tg.Config.from_env({"DATA_DIR": str(tmp_path), **knobs})
    (line,) = doctor.data_lines(tg, cfg, run)
    assert (line.level, line.remedy) == ("failure", remedy)


def test_predicted_steps_are_the_seconds_of_each_stage():
    """100 s: 10 at 0.1 s a step, 20 with the loop at 0.2, 70 rounded at 0.5."""
    cfg = tiny(max_wallclock_seconds=110, gptq_reserve_seconds=10, enable_looping_at=0.1, iterations=10 ** 6,
               quant="sdclip", qat_start=0.3)
    each = {"loop off": 0.1, "loop on": 0.2, "loop on, weights rounded": 0.5}
    assert doctor.predicted_steps(tg, cfg, each) == (100 + 100 + 140, 100.0)
    assert doctor.predicted_steps(tg, tiny(iterations=7), {"loop off": 1.0, "loop on": 1.0})[0] == 7


def test_the_probe_times_every_stage_and_leaves_nothing(run, monkeypatch):
    """Its clock is the run's: a step that sleeps is measured as that long."""
    cfg = tiny(quant="sdclip", qat_start=0.8)
    step = tg.ShardedOptimizer.step
    monkeypatch.setattr(tg.ShardedOptimizer, "step", lambda *a: (doctor.time.sleep(0.05), step(*a))[1])
    found = doctor.measure(tg, cfg, run, 0.3)
    assert set(found) == {doctor.stage_name(at) for at in tg.stages(cfg)} and len(found) == 3
    assert all(seconds > 0.05 for seconds in found.values())


def test_of_a_batch_for_gpus_a_cpu_runs_a_part(run, monkeypatch):
    """One row of twelve is run, and its time counts twelve times; that of the optimizer once."""
    cfg, ran, loss = tiny(num_loops=0), [], tg.Tensor.backward
    monkeypatch.setattr(doctor, "PROBE_TOKENS", cfg.train_seq_len)
    monkeypatch.setattr(doctor, "time", SimpleNamespace(perf_counter=lambda: 0.05 * len(ran)))  # a backward's
    monkeypatch.setattr(tg.Tensor, "backward", lambda t: (ran.append(1), loss(t))[1])
    (seconds,) = set(doctor.measure(tg, cfg, run, 0.1).values())
    assert seconds == pytest.approx(12 * 0.05) and len(ran) <= 2 + 2 + 2 + 1


@pytest.mark.parametrize("seconds, knobs, level", [
    (1.0, {}, "warning"), (0.1, {}, "ok"), (1.0, dict(iterations=50), "ok"), (1.0, dict(max_wallclock_seconds=0), "ok"),
    (60.0, {}, "warning")])
def test_too_few_steps_are_a_warning(seconds: float, knobs: dict, level: str, monkeypatch):
    """What the clock cuts short is told with what to change; what was asked for in steps, or takes its time, is not."""
    told = json.dumps({"seconds": {"loop off": seconds, "loop on": seconds}, "mib": 700})
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0, stdout=told, stderr=""))
    cfg = tiny(**{"max_wallclock_seconds": 110, "gptq_reserve_seconds": 10, "iterations": 10 ** 6, **knobs})
    line = doctor.speed_line(tg, cfg, {}, 1)
    assert line.level == level and f"MAX_WALLCLOCK_SECONDS={500 * seconds + 10:.0f}, " in line.remedy
    steps = min(cfg.iterations, int((100 if cfg.max_wallclock_seconds else 600) / seconds + 1e-6))
    assert f"predicts {steps:,} steps in" in line.found


def test_a_probe_that_fails_is_a_line():
    env = {**os.environ, **{k.upper(): v for k, v in TINY.items()}, "NUM_HEADS": "3"}
    line = doctor.speed_line(tg, tiny(), env, 1)
    assert line.level == "failure" and "NUM_HEADS = 6" in line.found


def test_on_the_command_line(dataset, tmp_path, called):
    """One line for each part, plain where piped; only data that is there passes; nothing is written."""
    knobs = {**TINY, "log_dir": str(tmp_path / "logs"), "run_id": "r", **dataset}
    knobs = [f"{k.upper()}={v}" for k, v in knobs.items()]
    status, out, _ = called(doctor.main, "doctor", "--quick", *knobs, "NPROC=1")
    assert status == 0 and "\x1b" not in out and out.splitlines()[-1].endswith("0 failure") and "ok       token" in out
    status, out, _ = called(doctor.main, "doctor", "--quick", "DATA_PATH=/nowhere", *knobs[:-2])
    assert status == 1 and "failure  data " in out
    for mistake, said in ((["x"], "x: no config.env"), (["NPROC=x"], "NPROC=x: expected a number of processes"),
                          (["LEARNING_RATE=1", "NPROC=2"], "LEARNING_RATE: no such knob")):
        status, _, err = called(doctor.main, "doctor", "--quick", *mistake)
        assert status == 2 and err.startswith(f"doctor: {said}") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_first_lines_need_no_torch(monkeypatch):
    for module in ("torch", "train_gpt"):
        monkeypatch.setitem(sys.modules, module, None)
    lines = list(doctor.examine({}, [], True))
    assert "disk: data" in levels(lines) and lines[-1].name == "trainer" and lines[-1].level == "failure"
