"""What the program is made of and talks to: pinned files, known licences, no network but for downloads and mirrors.

Each verb starts with the packages of its groups alone, and most without torch.
"""
import ast
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, ROOT, environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SHELL = (ROOT / "run.sh").read_text()
FILES = ["requirements.txt", *(f"requirements-{group}.txt" for group in ("data", "tools", "dev"))]


def pins(file: str) -> list[Requirement]:
    """What a requirements file names."""
    return [Requirement(line) for line in (ROOT / file).read_text().splitlines() if line and line[0] != "#"]


PINS = [pin for file in FILES for pin in pins(file)]
BUILDS = {"torch", "triton"}
"""Not in the lock: their builds for CPUs, CUDA and ROCm share a version and have different files."""
PYTHONS, MACHINES = ("3.10", "3.11", "3.12", "3.13"), (("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"))
NETWORK = {"socket", "ssl", "socketserver", "http", "urllib", "ftplib", "smtplib", "xmlrpc", "asyncio", "webbrowser",
           "requests", "httpx", "httpx2", "urllib3", "aiohttp", "huggingface_hub", "hf_xet", "anyio", "wandb"}
PROGRAMS = {"curl", "wget", "ssh", "scp", "rsync", "git", "nc"}

# -- pinned files ---------------------------------------------------------------------------------------

def lock_of(file: str) -> Path:
    return ROOT / file.replace(".txt", ".lock")


def locked(file: str) -> list[tuple[Requirement, list[str]]]:
    """(pin, SHA-256 of its files) of every entry of a requirements file's lock."""
    text = re.sub(r"^#.*\n", "", lock_of(file).read_text(), flags=re.M).replace("\\\n", "")
    return [(Requirement(line.split("--hash")[0].strip()), re.findall(r"--hash=sha256:([0-9a-f]{64})", line))
            for line in text.splitlines()]


def applies(pin: Requirement, python: str, system: str, machine: str) -> bool:
    """Whether a pin is for such a machine."""
    return pin.marker is None or pin.marker.evaluate({
        "python_version": python, "python_full_version": f"{python}.1", "platform_system": system, "platform_machine":
        machine, "sys_platform": system.lower(), "implementation_name": "cpython", "os_name": "posix", "extra": "",
        "platform_python_implementation": "CPython"})


@pytest.mark.parametrize("file", FILES)
def test_a_lock_was_made_from_its_requirements_and_neither_names_an_index(file):
    digest = hashlib.sha256((ROOT / file).read_bytes()).hexdigest()
    assert f"\n# of {digest}\n" in lock_of(file).read_text(), "run ./run.sh lock"
    for path in (ROOT / file, lock_of(file)):
        assert not re.search(r"://|--(extra-)?index|--find-links|^-", path.read_text(), flags=re.M)


def test_every_machine_gets_the_pinned_versions_with_hashes():
    """One version of each package wherever the program runs, whatever groups are installed; that of its pin."""
    entries = [entry for file in FILES for entry in locked(file)]
    assert len(entries) > 50 and all(hashes for _, hashes in entries)
    for python in PYTHONS:
        for machine in MACHINES:
            wanted = {(canonicalize_name(p.name), str(p.specifier)) for p in PINS if applies(p, python, *machine)}
            solved = {(canonicalize_name(p.name), str(p.specifier)) for p, _ in entries if applies(p, python, *machine)}
            assert len(dict(solved)) == len(solved)
            assert {name for name, _ in wanted - solved} == {name for name, _ in wanted} & BUILDS


# -- verbs ----------------------------------------------------------------------------------------------

# Module, arguments that need neither data nor torch, the exit status; by verb.
LIGHT = {
    "train": ("tools.launch train SEEDS=1", 2), "data": ("data.prepare text --help", 0),
    "check": ("tools.submission check records/pr1485_illegal", 1),
    "audit": ("tools.audit --static bench/codec.py", 0), "compare": ("tools.compare 1.1,1.2 1.0,1.0", 0),
    "doctor": ("tools.doctor nonsense", 2), "mirror": ("tools.mirror nowhere wandb", 2),
    "replay": ("tools.replay nowhere", 2), "report": ("tools.report nowhere", 2), "runs": ("tools.runs --help", 0),
    "show": ("tools.show nowhere", 2), "sample": ("tools.sample nowhere", 2), "knobs": ("tools.knobs LORA", 0),
    "submit": ("tools.submission submit X nowhere", 2), "sweep": ("tools.sweep nonsense", 2),
    "tune": ("tools.tune nonsense", 2)}
NEEDS_TORCH = {"demo", "bench", "test"}
"""They run train_gpt.py, or read its formats."""


def groups(verb: str) -> list[str]:
    """The groups that run.sh installs for a verb, besides requirements.txt."""
    own = re.search(rf"^  {verb}\)(?:.*\n)*?.*start (?:\"\"|(\w+)) tools\.", SHELL, re.M)
    return [own[1]] if own and own[1] else []


def test_every_verb_says_whether_it_needs_torch():
    verbs = set(re.findall(r"^  (\w+)\)", SHELL, re.M)) - {"setup", "lock", "help"}
    assert verbs == LIGHT.keys() | NEEDS_TORCH and not LIGHT.keys() & NEEDS_TORCH


def test_no_package_is_in_two_groups():
    named = [sorted({pin.name for pin in pins(file)}) for file in FILES]
    assert len(set(sum(named, []))) == len(sum(named, []))
    assert set(named[0]) == set("torch numpy sentencepiece brotli constriction tqdm safetensors".split())


@pytest.mark.parametrize("verb", LIGHT)
def test_a_verb_starts_without_torch_and_without_the_other_groups(verb: str, tmp_path: Path):
    own = {pin.name for group in groups(verb) for pin in pins(f"requirements-{group}.txt")}
    for module in {"torch", *(pin.name for file in FILES[1:] for pin in pins(file))} - own:
        (tmp_path / f"{module}.py").write_text(f"raise SystemExit('{module} was imported')")
    command, status = LIGHT[verb]
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True,
                          env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert done.returncode == status and done.stdout + done.stderr, done.stdout + done.stderr
    assert "was imported" not in done.stderr and "Traceback" not in done.stderr


def test_help_fits_a_screen():
    short, full = (subprocess.run(["./run.sh", "help", *more], cwd=ROOT, capture_output=True, text=True, check=True
                                  ).stdout.splitlines() for more in ([], ["all"]))
    assert len(short) <= 24 and max(map(len, short)) <= 100 and full[:len(short)] == short
    for verb in set(re.findall(r"^  (\w+)\)", SHELL, re.M)) - {"demo", "help"}:
        assert any(line.startswith(f"./run.sh {verb}") for line in full), verb


# -- licences -------------------------------------------------------------------------------------------

def test_every_requirement_has_a_licence_on_the_list():
    """`python -m tools.licences` writes it anew."""
    rows = {row[0].strip(" *"): row[1:] for line in (ROOT / "LICENSES.md").read_text().splitlines()
            if len(row := [cell.strip() for cell in line.strip("|").split("|")]) == 3}
    for name in {canonicalize_name(pin.name) for pin in PINS}:
        version, text = rows[name]
        assert text and version in {str(pin.specifier)[2:] for pin in PINS if canonicalize_name(pin.name) == name}


# -- network --------------------------------------------------------------------------------------------

def reaching(source: str) -> set[str]:
    """What a source imports, or names in a call (`import_module("requests")`, `run(["curl", ...])`), of NETWORK."""
    nodes = list(ast.walk(ast.parse(source)))
    named = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    named |= {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    given = [a for n in nodes if isinstance(n, ast.Call) for a in n.args]
    given += [part for a in given if isinstance(a, (ast.List, ast.Tuple)) for part in a.elts]
    named |= {a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name for name in named if re.split(r"[. ]", name)[0] in NETWORK | PROGRAMS}


def test_only_the_download_and_the_mirror_can_reach_a_network():
    """The mirror where WANDB=1 asks for it; bench/same.py has git check out a commit of this repository."""
    for path in [ROOT / "train_gpt.py", *(p for f in ("data", "tools", "bench") for p in (ROOT / f).rglob("*.py"))]:
        found = reaching(path.read_text(encoding="utf-8"))
        asked = path in (ROOT / "data" / "download.py", ROOT / "tools" / "mirror.py", ROOT / "bench" / "same.py")
        assert bool(found) == asked, f"{path}: {found}"


GUARD = """
import os, sys

def watch(event, values):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        where = values[1] if event == "socket.connect" else values[0]
        where = where[0] if isinstance(where, tuple) else where
        if where not in ("localhost", "127.0.0.1", "::1", None) and not str(where).startswith("/"):
            with open(os.environ["REACHED"], "a") as file:
                file.write(f"{event} {where}\\n")
            raise OSError(f"the network is off: {event} {where}")

sys.addaudithook(watch)
"""


def off(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess:
    """A Python command without a network: none in its namespace where Linux lets us, and attempts are written down."""
    (folder / "guard").mkdir(exist_ok=True)
    (folder / "guard" / "sitecustomize.py").write_text(GUARD)
    alone = ["unshare", "-rn"] if shutil.which("unshare") and not subprocess.run(
        ["unshare", "-rn", "true"], capture_output=True).returncode else []
    return subprocess.run([*alone, sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env={
        "PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder / "guard"),
        "REACHED": str(folder / "reached"), "PYTHONDONTWRITEBYTECODE": "1", **env})


def test_text_becomes_a_scored_artifact_without_a_network(tmp_path: Path):
    (tmp_path / "text").mkdir()
    for number, part in enumerate((ROOT / "README.md").read_text(encoding="utf-8").split("\n\n")):
        (tmp_path / "text" / f"{number}.txt").write_text(part, encoding="utf-8")
    knobs = environment({"data_path": str(tmp_path / "datasets" / "t_sp512")}, tmp_path / "logs", **QUICK)
    for command in (["-m", "data.prepare", "text", str(tmp_path / "text"), "--name", "t", "--vocab-size", "512",
                     "--val-share", "0.2", "--workers", "1", "--out", str(tmp_path)],
                    ["train_gpt.py"], ["-m", "tools.show", str(tmp_path / "logs" / "r.jsonl")]):
        done = off(tmp_path, *command, **knobs)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert not (tmp_path / "reached").exists()


def test_the_guard_sees_who_calls_out(tmp_path: Path):
    done = off(tmp_path, "-c", "import urllib.request; urllib.request.urlopen('http://192.0.2.1', timeout=2)")
    assert done.returncode and "192.0.2.1" in (tmp_path / "reached").read_text()
