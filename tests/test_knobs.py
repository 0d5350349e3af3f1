"""docs/knobs.md and what the tools read without torch are the trainer's own knobs."""
import dataclasses

import pytest
from conftest import ROOT

import train_gpt as tg
from tools import knobs
from tools.common import ToolError

SOURCE = '''
Rate = Annotated[float, Bound("0 or more", lambda x: x >= 0)]
class ToyKnobs:
    """Toy: what it is for"""
    first_rate: Rate = 1e-3  # how fast, in # of steps (#12)
    mode: Literal["a", "b"] = "a"  # one | other
    big: int = 1_000
    """no knob"""
    def method(self): x: int = 3
class Other:
    y: int = 2
PRESETS: dict = {"record": {}, "demo": dict(mode="b", big=5)}
'''


def test_knobs_are_read_from_a_source():
    first, mode, big = knobs.read(SOURCE)
    assert first == ("Toy: what it is for", "FIRST_RATE", "0 or more", 1e-3, "how fast, in # of steps (#12)")
    assert mode[1:4] == ("MODE", "one of a, b", "a") and big == ("Toy: what it is for", "BIG", "an integer", 1000, "")
    assert knobs.preset("demo", SOURCE) == {"MODE": "b", "BIG": 5} and knobs.preset("record", SOURCE) == {}


def test_they_are_those_of_the_trainer():
    fields = [field for group in tg.GROUPS for field in dataclasses.fields(group)]
    assert [(k.name.lower(), k.default) for k in knobs.read()] == [(f.name, f.default) for f in fields]
    kinds = tg.kinds(tg.Config)
    assert all(k.kind == tg.expectation(kinds[k.name.lower()]) for k in knobs.read())
    assert knobs.preset("demo") == {name.upper(): value for name, value in tg.PRESETS["demo"].items()}
    assert all(knobs.typed_text(k.default) == tg.show(k.default) for k in knobs.read())


def test_the_table_of_knobs_is_that_of_the_source():
    assert (ROOT / "docs" / "knobs.md").read_text(encoding="utf-8") == knobs.markdown(), \
        "make it anew: python -m tools.knobs --markdown > docs/knobs.md"


def test_the_screen_shows_what_the_trainers_help_does():
    assert knobs.text().splitlines() == tg.help_text().splitlines()[2:]


def test_words_choose_knobs():
    """By name, expectation or text, in any case, under the heading of their group."""
    (heading, knob, doc) = knobs.text(["LORA", "decay"]).splitlines()
    assert heading.startswith("Evaluation: ") and knob == "  TTT_WEIGHT_DECAY=0.5  (0 or more)" and "lora" in doc
    with pytest.raises(ToolError, match="^no-such word: no knob"):
        knobs.text(["no-such", "word"])
