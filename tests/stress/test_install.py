"""Installation by `run.sh`, with interpreters that say what they would do."""
import glob
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(folder: Path, lends_torch: bool = False, sees_torch: bool = False) -> Path:
    """An interpreter that makes an environment of itself and prints what pip would install."""
    path = folder / "python"
    path.write_text(f"""#!/bin/sh
case "$0 $*" in
  *hashlib*) exec {sys.executable} "$@" ;;
  *.venv*"import torch"*) exit {int(not sees_torch)} ;;
  *"import torch"*) exit {int(not lends_torch)} ;;
  *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python
               case "$*" in *system-site*) echo "include-system-site-packages = true" >.venv/pyvenv.cfg ;; esac ;;
  *"-m pip config"*) echo "$PIP_CONFIG" ;;
  *urllib*) exit $OFFLINE ;;
  *"-m pip"*) shift 3; echo PIP "$@" ;;
  *-VV*) echo Python 3 ;;
esac
""")
    path.chmod(0o755)
    return path


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for path in (ROOT / "run.sh", *ROOT.glob("requirements*")):
        shutil.copy(path, tmp_path)
    return tmp_path


TORCH = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
CPU = "--index-url https://download.pytorch.org/whl/cpu"


def setup(clone: Path, *groups: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(["./run.sh", "setup", *groups], cwd=clone, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", **env})


def installed(done: subprocess.CompletedProcess) -> list[str]:
    """What pip was asked for: files, and torch with the index that it comes from."""
    assert done.returncode == 0, done.stderr
    form = {"PIP", "--disable-pip-version-check", "--quiet", "--require-hashes", "-r"}
    return [" ".join(word for word in line.split() if word not in form) for line in done.stdout.splitlines()]


def test_a_group_is_installed_once_by_hash_until_it_changes(clone: Path):
    own = str(python(clone))
    done = setup(clone, PYTHON=own, TORCH_INDEX="")
    assert installed(done) == ["requirements.lock", TORCH, ".venv/wanted.txt"] and "--require-hashes" in done.stdout
    assert installed(setup(clone, "tools")) == ["requirements-tools.lock", ".venv/wanted.txt"]
    assert installed(setup(clone, "tools", PYTHON=own)) == []
    with (clone / "requirements-tools.txt").open("a") as file:
        file.write("another==1.0\n")
    done = setup(clone, "tools")
    assert installed(done) == [".venv/wanted.txt"] and "installing without hashes" in done.stderr
    assert setup(clone, "nothing").returncode == 2


@pytest.mark.parametrize("sees", [True, False])
def test_a_torch_is_borrowed_only_where_the_new_environment_sees_it(clone: Path, sees: bool):
    """That of an interpreter which is an environment itself stays there."""
    done = setup(clone, PYTHON=str(python(clone, lends_torch=True, sees_torch=sees)))
    assert installed(done) and ("does not see" in done.stderr) != sees
    wanted = (clone / ".venv" / "wanted.txt").read_text()
    assert ("torch==" in wanted) != sees and "numpy==" in wanted


@pytest.mark.skipif(sys.platform != "linux" or bool(glob.glob("/dev/nvidia*")), reason="a GPU, or no Linux")
@pytest.mark.parametrize("env, index, told", [
    ({}, f"{CPU} ", "comes from https://download.pytorch.org/whl/cpu: about 200 MB"),
    ({"OFFLINE": "1"}, "", "cannot be reached"),
    ({"PIP_CONFIG": "global.extra-index-url='file:///mine'\nother='x'"}, "", "comes from the index of pip"),
    ({"TORCH_INDEX": ""}, "", "comes from the index of pip"),
    ({"TORCH_INDEX": "https://mine"}, "--index-url https://mine ", "comes from https://mine")])
def test_without_a_gpu_torch_is_the_build_for_cpus(env: dict[str, str], index: str, told: str, clone: Path):
    """Unless pip has an index of its own, or the user names one; where it does not answer, pip's index serves."""
    done = setup(clone, PYTHON=str(python(clone)), **env)
    assert installed(done)[1] == index + TORCH and told in done.stderr


def test_with_a_gpu_torch_comes_from_the_index_of_pip(clone: Path):
    smi = clone / "nvidia-smi"
    smi.write_text("")
    smi.chmod(0o755)
    done = setup(clone, PYTHON=str(python(clone)), PATH=f"{clone}:/usr/bin:/bin")
    assert installed(done)[1] == TORCH


def test_a_linked_environment_is_never_changed(clone: Path, tmp_path_factory):
    """`venv --clear` follows a link, and so does pip: setup says so and leaves it alone."""
    other = tmp_path_factory.mktemp("other")
    (other / "bin").mkdir()
    shutil.copy(python(clone), other / "bin" / "python")
    (clone / ".venv").symlink_to(other)
    done = setup(clone)
    assert done.returncode == 2 and f".venv is a link to {other}" in done.stderr
    assert [path.name for path in other.iterdir()] == ["bin"] and (clone / ".venv").is_symlink()


def test_a_python_that_is_too_old_is_named(clone: Path):
    old = clone / "old"
    old.write_text('#!/bin/sh\ncase "$*" in -V*) echo Python 3.8 ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    assert "Python 3.8 is too old" in setup(clone, PYTHON=str(old)).stderr
