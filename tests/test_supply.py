"""What the program is made of and talks to: pinned files, known licences, no network but for downloads and mirrors.

    PYTHONPATH=tests python tests/test_supply.py        writes LICENSES.md anew, from what is installed
"""
import ast
import hashlib
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


# -- licences -------------------------------------------------------------------------------------------


def licence(found: metadata.Distribution) -> str:
    """In the words of the package's own metadata: the expression, else the classifiers, else a text's first lines."""
    said = found.metadata
    classified = [c.rpartition(" :: ")[2] for c in said.get_all("Classifier") or () if c.startswith("License")]
    files = [file.read_text() for file in found.files or () if ".dist-info/licenses/" in str(file)]
    text = [line.strip() for line in (said.get("License") or "".join(files[:1])).splitlines() if line.strip()]
    return said.get("License-Expression") or ", ".join(classified) or ", ".join(text[:2])


def licences() -> str:
    """LICENSES.md: what the requirements files ask for, and what that needs on the machine where this runs."""
    wanted, rows = [canonicalize_name(pin.name) for pin in PINS], {}
    direct = set(wanted)
    while wanted:
        name = wanted.pop()
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another platform
        if name not in rows:
            rows[name] = (found.version.split("+")[0], licence(found))
            needs = [Requirement(line) for line in found.requires or ()]
            wanted += [canonicalize_name(r.name) for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    lines = [f"| {'**' * (n in direct)}{n}{'**' * (n in direct)} | {version} | {text.replace('|', '/')} |"
             for n, (version, text) in sorted(rows.items())]
    return "\n".join([
        "# Licences of what this program needs", "",
        "The program itself is under the licence in `LICENSE`. Packages that the requirements files name are bold, the",
        "others are needed by them; the words are their own metadata's, under Linux with Python "
        f"{sys.version_info.major}.{sys.version_info.minor}. torch's", "builds for CUDA also bring NVIDIA's libraries, "
        "under NVIDIA's licences. Nothing of this is part of the counted bytes.", "",
        "| package | version | licence |", "|---|---|---|", *lines, "",
        "Made by `PYTHONPATH=tests .venv/bin/python tests/test_supply.py`.", ""])


def test_every_requirement_has_a_licence_on_the_list():
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


@pytest.mark.parametrize("source, found", [
    ("import http.client", {"http.client"}), ("def f():\n from urllib import request", {"urllib"}),
    ("g = importlib.import_module('requests')", {"requests"}), ("__import__('socket')", {"socket"}),
    ("subprocess.run(['curl', url])", {"curl"}), ("os.system('wget -q x')", {"wget -q x"}),
    ("import httpish; print('the socket', ['curl'])", {"curl"}), ("x = {'requests': 1}", set())])
def test_what_reaches_out_is_seen(source, found):
    assert reaching(source) == found


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
    knobs = {name.upper(): value for name, value in TINY.items()} | {
        "DATA_PATH": str(tmp_path / "datasets" / "t_sp512"), "LOG_DIR": str(tmp_path / "logs"), "RUN_ID": "r",
        "TTT": "none", "DIAGNOSTIC_EVALS": "", "NGRAM_BASE_BETA": "0", "ITERATIONS": "2"}
    for command in (["-m", "data.prepare", "text", str(tmp_path / "text"), "--name", "t", "--vocab-size", "512",
                     "--val-share", "0.2", "--workers", "1", "--out", str(tmp_path)],
                    ["train_gpt.py"], ["-m", "tools.show", str(tmp_path / "logs" / "r.jsonl")]):
        done = off(tmp_path, *command, **knobs)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert not (tmp_path / "reached").exists()


def test_the_guard_sees_who_calls_out(tmp_path: Path):
    done = off(tmp_path, "-c", "import urllib.request; urllib.request.urlopen('http://192.0.2.1', timeout=2)")
    assert done.returncode and "192.0.2.1" in (tmp_path / "reached").read_text()


if __name__ == "__main__":
    (ROOT / "LICENSES.md").write_text(licences(), encoding="utf-8")
