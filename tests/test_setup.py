"""`run.sh` installs what a verb needs: each starts with the packages of its groups alone, and most without torch."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHELL = (ROOT / "run.sh").read_text()
MODULES = {name.lower(): name for name in "pyarrow huggingface_hub rich packaging optuna scipy "
           "triton pytest hypothesis atheris".split()}
"""What the groups bring, by distribution (its module has the same name)."""

# Module, arguments that need neither data nor torch, the exit status; by verb.
LIGHT = {
    "train": ("tools.launch train SEEDS=1", 2), "check": ("tools.submission check nowhere", 2),
    "audit": ("tools.audit --static bench/codec.py", 0), "compare": ("tools.compare 1.1,1.2 1.0,1.0", 0),
    "doctor": ("tools.doctor nonsense", 2), "mirror": ("tools.mirror nowhere wandb", 2),
    "replay": ("tools.replay nowhere", 2), "report": ("tools.report nowhere", 2), "runs": ("tools.runs --help", 0),
    "show": ("tools.show nowhere", 2), "sample": ("tools.sample nowhere", 2), "knobs": ("tools.knobs LORA", 0),
    "submit": ("tools.submission submit X nowhere", 2), "sweep": ("tools.sweep nonsense", 2),
    "tune": ("tools.tune nonsense", 2)}
NEEDS_TORCH = {"demo", "data", "bench", "test"}
"""They run train_gpt.py, or read its formats."""


def groups(verb: str) -> list[str]:
    """The groups that run.sh installs for a verb, besides requirements.txt."""
    own = re.search(rf"^  {verb}\)(?:.*\n)*?.*start (?:\"\"|(\w+)) tools\.", SHELL, re.M)
    return [own[1]] if own and own[1] else []


def packages(file: str) -> set[str]:
    """Distributions that a requirements file names."""
    lines = (ROOT / file).read_text().splitlines()
    return {re.split("[=;]", line)[0].strip() for line in lines if line and line[0] != "#"}


def test_every_verb_says_whether_it_needs_torch():
    verbs = set(re.findall(r"^  (\w+)\)", SHELL, re.M)) - {"setup", "lock", "help"}
    assert verbs == LIGHT.keys() | NEEDS_TORCH and not LIGHT.keys() & NEEDS_TORCH


def test_no_package_is_in_two_groups():
    files = ["requirements.txt", *(f"requirements-{group}.txt" for group in ("data", "tools", "dev"))]
    named = [name for file in files for name in packages(file)]
    assert len(set(named)) == len(named) and packages("requirements.txt") == set(
        "torch numpy sentencepiece brotli constriction tqdm safetensors".split())
    assert {p.lower() for file in files[1:] for p in packages(file)} <= MODULES.keys() | {"pytest-xdist"}


@pytest.mark.parametrize("verb", LIGHT)
def test_a_verb_starts_without_torch_and_without_the_other_groups(verb: str, tmp_path: Path):
    own = {p for group in groups(verb) for p in packages(f"requirements-{group}.txt")}
    for module in {"torch", *MODULES.values()} - own:
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
