"""Reads the knobs from the trainer's source, without torch.

    ./run.sh knobs [WORD ...]                          for the screen, all or those with these words in them
    python -m tools.knobs --markdown > docs/knobs.md   the table

A knob is one line of a class whose name ends in Knobs: `matrix_lr: NonNegative = 0.026  # what it does`.
"""
from __future__ import annotations

import ast
import functools
import io
import sys
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.common import ToolError, program

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ROOT / "train_gpt.py"
HEAD = """# Knobs

Every knob is an environment variable, or an argument of `./run.sh train`. The value is the default, which is the
preset `record`; where `PRESET=demo` has another, it stands in brackets. Made from `train_gpt.py` by
`.venv/bin/python -m tools.knobs --markdown > docs/knobs.md`; a test compares the two."""


WORDS = {"bool": "0 or 1", "int": "an integer", "float": "a number", "str": "text"}


class Knob(NamedTuple):
    """One knob as the source has it; `name` is the environment variable, `kind` says what it takes."""
    group: str
    name: str
    kind: str
    default: Any
    doc: str


def typed_text(value: Any) -> str:
    """A value as one would type it for a knob.

    >>> [typed_text(value) for value in (True, 0.0026, 10_000.0, 1_000_000, "")]
    ['1', '0.0026', '10000', '1000000', '']
    """
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return next(text for text in (f"{value:g}", repr(value)) if float(text) == value)
    return str(value)


def kind_text(annotation: ast.expr, aliases: dict[str, ast.expr]) -> str:
    """What an annotation allows, in words: a bound's text, the choices of a Literal, or the plain type's."""
    if isinstance(annotation, ast.Name):
        if annotation.id in aliases:
            return kind_text(aliases[annotation.id], aliases)
        return WORDS.get(annotation.id, annotation.id)
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        if annotation.value.id == "Literal":
            choices = ast.literal_eval(annotation.slice)
            return "one of " + ", ".join(map(str, choices if isinstance(choices, tuple) else (choices,)))
        bound = next((node for node in ast.walk(annotation) if isinstance(node, ast.Call)), None)
        if annotation.value.id == "Annotated" and bound is not None:
            return ast.literal_eval(bound.args[0])
    return ast.unparse(annotation)


@functools.cache
def read(source: str | None = None) -> list[Knob]:
    """All knobs, in the order of the source; half a second for the trainer's, once."""
    source = TRAINER.read_text(encoding="utf-8") if source is None else source
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string[1:].strip() for token in tokens if token.type == tokenize.COMMENT}
    knobs, tree = [], ast.parse(source)
    aliases = {node.targets[0].id: node.value for node in tree.body
               if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    for group in tree.body:
        if not isinstance(group, ast.ClassDef) or not group.name.endswith("Knobs"):
            continue
        for field in group.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.value is not None:
                knobs.append(Knob((ast.get_docstring(group) or group.name).splitlines()[0], field.target.id.upper(),
                                  kind_text(field.annotation, aliases), ast.literal_eval(field.value),
                                  comments.get(field.end_lineno or field.lineno, "")))
    return knobs


def preset(name: str, source: str | None = None) -> dict[str, Any]:
    """Knob -> value of a preset, read from the one assignment to PRESETS."""
    source = TRAINER.read_text(encoding="utf-8") if source is None else source
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "PRESETS":
            presets = node.value
            assert isinstance(presets, ast.Dict)
            values = {ast.literal_eval(key): value for key, value in zip(presets.keys, presets.values) if key}[name]
            if isinstance(values, ast.Call):  # dict(num_layers=3, ...)
                return {word.arg.upper(): ast.literal_eval(word.value) for word in values.keywords if word.arg}
            return {key.upper(): value for key, value in ast.literal_eval(values).items()}
    raise ToolError(f"{TRAINER}: no PRESETS")


def markdown() -> str:
    """The table of all knobs, by group."""
    lines, demo, group = [HEAD], preset("demo"), ""
    for knob in read():
        if knob.group != group:
            group = knob.group
            lines += ["", f"## {group}", "", "| knob | value | expected | meaning |", "|---|---|---|---|"]
        value = f"`{typed_text(knob.default)}`" if knob.default != "" else ""
        if demo.get(knob.name, knob.default) != knob.default:
            value += f" [`{typed_text(demo[knob.name])}`]"
        kind, doc = knob.kind.removeprefix("one of "), knob.doc.replace("<", "&lt;")
        kind, doc = (cell.replace("|", "\\|") for cell in (kind, doc))
        lines.append(f"| `{knob.name}` | {value} | {kind} | {doc} |")
    return "\n".join(lines) + "\n"


def text(words: Sequence[str] = ()) -> str:
    """The knobs by group, as the trainer's --help has them; only those whose two lines have all the words, in any case.

    Raises `ToolError` where none has.
    """
    lines, group = [], ""
    for knob in read():
        own = f"  {knob.name}={typed_text(knob.default)}  ({knob.kind})\n      {knob.doc}"
        if all(word.lower() in own.lower() for word in words):
            lines += ["", knob.group] * (knob.group != group) + [own]
            group = knob.group
    if not lines:
        raise ToolError(f"{' '.join(words)}: no knob with that in its name or text; ./run.sh knobs lists them all")
    return "\n".join(lines[1:])


def main(arguments: Sequence[str]) -> None:
    """Print the table, or the text."""
    if list(arguments) == ["--markdown"]:
        print(markdown(), end="")
    else:
        print(text(arguments))


if __name__ == "__main__":
    sys.exit(program(main, "knobs", __doc__))
