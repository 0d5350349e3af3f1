"""`run.sh` sets up its own environment and harms no other."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def test_a_linked_environment_is_never_emptied(tmp_path: Path):
    """`venv --clear` follows a link: where the packages do not fit, setup says so and leaves them alone."""
    other, clone = tmp_path / "other", tmp_path / "clone"
    (other / "bin").mkdir(parents=True)
    (other / "bin" / "python").write_text("#!/bin/sh\necho Python 3\n")
    (other / "bin" / "python").chmod(0o755)
    clone.mkdir()
    shutil.copy(ROOT / "run.sh", clone)
    (clone / "requirements.txt").write_text("")
    (clone / ".venv").symlink_to(other)
    done = subprocess.run([clone / "run.sh", "setup"], capture_output=True, text=True)
    assert done.returncode == 2 and f".venv is a link to {other}" in done.stderr
    assert (other / "bin" / "python").exists() and (clone / ".venv").is_symlink()


@pytest.mark.parametrize("seen, wanted", [(0, ".venv/requirements.txt"), (1, "requirements.txt")])
def test_a_torch_is_borrowed_only_where_the_new_environment_sees_it(tmp_path: Path, seen: int, wanted: str):
    """That of an interpreter which is an environment itself stays there."""
    for name in ("run.sh", "requirements.txt", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
case "$0 $*" in
  *hashlib*) exec {sys.executable} "$@" ;;
  *.venv*"import torch"*) exit {seen} ;;
  *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"-m pip"*) shift 3; echo PIP "$@" ;;
esac
""")
    python.chmod(0o755)
    done = subprocess.run(["./run.sh", "setup"], cwd=tmp_path, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)})
    assert done.returncode == 0 and done.stdout.splitlines()[-1].split()[-2:] == ["-r", wanted], done.stderr
    assert ("does not see it" in done.stderr) == bool(seen)


# What each verb answers without torch: the script, arguments, the exit status.
LIGHT = {
    "audit": ("records/audit.py --static bench/scaling.py", 0), "check": ("records/submission.py check nowhere", 2),
    "compare": ("records/compare.py 1.1,1.2 1.0,1.0", 0), "doctor": ("records/doctor.py nonsense", 2),
    "mirror": ("records/mirror.py nowhere wandb", 2), "replay": ("records/replay.py nowhere", 2),
    "report": ("records/report.py nowhere", 2), "show": ("records/summary.py nowhere", 2),
    "submit": ("records/submission.py submit X nowhere", 2), "sweep": ("records/sweep.py nonsense", 2),
    "tune": ("records/tune.py nonsense", 2)}
NEEDS_TORCH = {"demo", "train", "data", "bench", "knobs", "test"}
"""They run train_gpt.py, or read its formats and knobs."""


def test_every_verb_says_whether_it_needs_torch():
    verbs = set(re.findall(r"^  (\w+)\)", (ROOT / "run.sh").read_text(), re.M)) - {"setup", "lock", "help"}
    assert verbs == LIGHT.keys() | NEEDS_TORCH and not LIGHT.keys() & NEEDS_TORCH


@pytest.mark.parametrize("verb", LIGHT)
def test_a_verb_starts_without_torch(verb: str, tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    command, status = LIGHT[verb]
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True,
                          env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert done.returncode == status and done.stdout + done.stderr, done.stdout + done.stderr
    assert "torch was imported" not in done.stderr and "Traceback" not in done.stderr
