"""README.md is short, and what it names is there."""
import re

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = (ROOT / "run.sh").read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert len(README.encode()) <= 10_240


def test_every_verb_that_the_readme_names_is_one_of_run_sh():
    verbs = set(re.findall(r"\./run\.sh ([a-z]+)", README))
    cases = set(re.findall(r"^  ([a-z][a-z |-]*)\)", SHELL, re.MULTILINE))
    assert verbs and verbs <= {verb for case in cases for verb in case.split(" | ")}


def test_every_file_that_the_readme_names_exists():
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    names = re.findall(r"`((?:data|records|bench|tests|tools|docs)/[\w./]*|[\w]+\.(?:py|sh|txt|md|toml))`", README)
    made = ("data/datasets", "data/tokenizers")  # by a command
    missing = {name for name in links + names if not (ROOT / name).exists() and not name.startswith(made)}
    assert links + names and missing == set()
