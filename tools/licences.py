"""Prints LICENSES.md anew, from what is installed: python -m tools.licences > LICENSES.md"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.common import program

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Licences of what this program needs

The program itself is under the licence in `LICENSE`. Packages that the requirements files name are bold, the
others are needed by them; the words are their own metadata's, under Linux with Python {0.major}.{0.minor}. torch's
builds for CUDA also bring NVIDIA's libraries, under NVIDIA's licences. Nothing of this is part of the counted bytes.

| package | version | licence |
|---|---|---|"""


def licence(found: metadata.Distribution) -> str:
    """In the words of the package's own metadata: the expression, else the classifiers, else a text's first lines."""
    said = found.metadata
    classified = [c.rpartition(" :: ")[2] for c in said.get_all("Classifier") or () if c.startswith("License")]
    files = [file.read_text() for file in found.files or () if ".dist-info/licenses/" in str(file)]
    text = [line.strip() for line in (said.get("License") or "".join(files[:1])).splitlines() if line.strip()]
    return said.get("License-Expression") or ", ".join(classified) or ", ".join(text[:2])


def main(arguments: Sequence[str]) -> None:
    """What the requirements files ask for, and what that needs on the machine where this runs."""
    lines = [line for path in sorted(ROOT.glob("requirements*.txt")) for line in path.read_text().splitlines()]
    wanted = [canonicalize_name(Requirement(line).name) for line in lines if line and line[0] != "#"]
    direct, rows = set(wanted), {}
    while wanted:
        name = wanted.pop()
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another platform
        if name not in rows:
            rows[name] = (found.version.split("+")[0], licence(found).replace("|", "/"))
            needs = [Requirement(line) for line in found.requires or ()]
            wanted += [canonicalize_name(r.name) for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    print(HEAD.format(sys.version_info))
    for name, (version, text) in sorted(rows.items()):
        print(f"| {f'**{name}**' if name in direct else name} | {version} | {text} |")
    print("\nMade by `.venv/bin/python -m tools.licences`.")


if __name__ == "__main__":
    sys.exit(program(main, "licences.py", __doc__))
