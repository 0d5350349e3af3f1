"""`run.sh` sets up its own environment and harms no other."""
import shutil
import subprocess
from pathlib import Path

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
