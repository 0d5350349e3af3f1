"""README.md says what is true: its table of knobs is the source's. `python tests/test_readme.py` writes it anew."""
import re
from pathlib import Path

from conftest import ROOT

import train_gpt as tg

README = ROOT / "README.md"
MARKS = re.compile(r"(<!-- knobs -->\n).*(<!-- /knobs -->)", re.S)


def table() -> str:
    """Every knob by group, as Markdown."""
    lines, group = [], None
    for knob in tg.knobs():
        if knob.group != group:
            group = knob.group
            lines += ["", f"**{group}**", "", "| knob | default | demo | meaning |", "|---|---|---|---|"]
        demo = tg.PRESETS["demo"].get(knob.name.lower(), knob.default)
        shown = tg.show(demo) if demo != knob.default else ""
        text = " ".join(knob.doc.replace("|", "\\|").split())  # a row is one line
        lines.append(f"| `{knob.name}` | {tg.show(knob.default)} | {shown} | {text} |")
    return "\n".join(lines) + "\n\n"


def test_the_table_of_knobs_is_generated_from_the_source():
    assert MARKS.search(README.read_text()).group(0) == f"<!-- knobs -->\n{table()}<!-- /knobs -->"


def test_every_file_and_verb_that_the_readme_names_exists():
    text = README.read_text()
    shell = (ROOT / "run.sh").read_text()
    for verb in set(re.findall(r"\./run\.sh ([a-z]+)", text)):
        assert f"  {verb})" in shell or f"  {verb} |" in shell, verb
    for name in set(re.findall(r"`((?:data|records|bench|tests)/[\w./]*|[\w]+\.(?:py|sh|txt|md|toml))`", text)):
        assert (ROOT / name).exists() or name.startswith(("data/datasets", "data/tokenizers")), name


if __name__ == "__main__":
    Path(README).write_text(MARKS.sub(lambda m: m.group(1) + table() + m.group(2), README.read_text()))
