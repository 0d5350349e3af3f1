"""
caseops.py -- write capitals as operators, without loss, so that a word has one piece whatever its case.

    from data.caseops import TRANSFORMS
    v2 = TRANSFORMS["caseops_v2"]
    ids, sizes = v2.tokenize(sp, text)      # what a shard and its byte side file hold
    text == v2.decode(v2.encode(text))

    original   The NASA Launch (an iPhone). A test
    v1         1the 2nasa 1launch (an i3phone). 1a test     1 2 3 are U+E001 to U+E003; U+E004 escapes
    v2         ^the! nasa^ launch (an i^phone).^ a test     ^ is U+21E7, ! is U+21EA; U+241B escapes

v1 is the published `lossless_caps_caseops_v1` (tokenizer `fineweb_8192_bpe_lossless_caps_caseops_v1_reserved`), for
data made with it. v2 needs fewer tokens (docs/LOG.md): " The" keeps the piece of " the", and its operators are ordinary
characters, which join the punctuation before them (the piece ".^" ends one sentence and begins another).
Only ASCII letters change: of the capitals in web text, about one in 600 is another.
Safe to change: nothing of v1; of v2 nothing once data are made with it. A new version is a new entry of TRANSFORMS.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tools.common import ToolError


class CaseOps(NamedTuple):
    """One version of the transform. `decode(encode(text)) == text` for every string."""
    operators: str  # its operator characters, of which the last escapes a literal one; they count no bytes of the text
    encode: Callable[[str], str]  # leaves no ASCII capitals but those that the normaliser could join to a mark
    decode: Callable[[str], str]  # raises ValueError at an operator that `encode` cannot have written there
    training: Mapping[str, Any]  # what SentencePieceTrainer.train needs besides its usual arguments
    raw_bytes: bool = False  # its side files count bytes before normalisation (indentation is a fifth of code's)

    def byte_costs(self, text: str) -> np.ndarray:
        """[len(text)] int64: bytes of the original that each character of transformed `text` stands for."""
        code = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        costs = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000).astype(np.int64)
        places = np.flatnonzero(np.isin(code, [ord(c) for c in self.operators]))
        costs[places] = 0
        if len(places) and (code[places] == ord(self.operators[-1])).any():  # rare: it frees the operator behind it
            for match in re.finditer(f"{self.operators[-1]}(.)", text, re.S):
                costs[match.start(1)] = len(match[1].encode())
        return costs

    def tokenize(self, sp: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids, bytes of each) of one document, BOS not included: what the shard and its side file hold.

        `sp` is a SentencePieceProcessor, `text` the original; both arrays are uint16. A token has the UTF-8 bytes of
        the part of the original that it stands for; operators have none. What the normaliser drops counts on a
        neighbour, and a character spelt in byte pieces on one of them, so that the sum is the document's, unless the
        normaliser leaves no token of it. Raises ToolError for a token of more than 65,535 bytes.
        """
        coded = self.encode(text)
        found = sp.encode(coded, return_type="offset_mapping")
        ends = np.fromiter((end for _, end in found["offsets"]), dtype=np.int64, count=len(found["ids"]))
        ends[-1:] = len(coded)
        sizes = np.diff(np.append(0, np.cumsum(self.byte_costs(coded)))[ends], prepend=0)
        if sizes.max(initial=0) > 0xFFFF:
            raise ToolError(f"{text[:40]!r}...: a token of {sizes.max():,} bytes; the side file holds at most 65,535")
        return np.array(found["ids"], dtype=np.uint16), sizes.astype(np.uint16)


# -- v1: the published transform -----------------------------------------------------------------------
# A maximal run of ASCII letters is one word: lower case stays, ALL CAPITALS (two or more) get ALLCAPS, Title case and
# the single capital TITLE. Otherwise CAPNEXT precedes every capital but the first letter's, which gets TITLE.

TITLE, ALLCAPS, CAPNEXT, ESCAPE = "\ue001\ue002\ue003\ue004"
CAPITALS_V1 = re.compile(f"[A-Z][A-Za-z]*|[{TITLE}-{ESCAPE}]")
OPERATORS_V1 = re.compile(f"{ESCAPE}([{TITLE}-{ESCAPE}])|{ALLCAPS}([a-z]{{2,}})|[{TITLE}{CAPNEXT}]([a-z])|"
                          f"[{TITLE}-{ESCAPE}]")


def encode_v1(text: str) -> str:
    """`text` with capitals as TITLE, ALLCAPS and CAPNEXT, which follow the space before the word."""
    def operate(match: re.Match[str]) -> str:
        word, before = match[0], match.string[match.start() - 1:match.start()]
        if not word.isascii():
            return ESCAPE + word
        inside = before.isascii() and before.isalpha()  # the run began in lower case
        if not inside and (word[1:].islower() or len(word) == 1):
            return TITLE + word.lower()
        if not inside and word.isupper():
            return ALLCAPS + word.lower()
        first = CAPNEXT if inside else TITLE
        return first + word[0].lower() + "".join(CAPNEXT + c.lower() if c.isupper() else c for c in word[1:])
    return CAPITALS_V1.sub(operate, text)


# -- v2: before the space ------------------------------------------------------------------------------
# SHIFT makes the next letter a capital, LOCK the next run of letters (two or more); white space between the operator
# and its word stays between them. Where a run is neither Title nor ALL CAPITALS, each capital has its SHIFT.
# The characters are of the script "Common", as punctuation is, so that SentencePiece may join the two.
# What the normaliser (nmt_nfkc) does afterwards must not change a decoded case. It may join a letter to a mark behind
# it, or drop what separates two words; so a letter is left alone where what follows could be such a character.

SHIFT, LOCK, ESCAPE_V2 = "\u21e7\u21ea\u241b"
SPACE = r"\s\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2581\ufeff\ufffd"
SAFE = r"\t\n\r -~\xa0-\xa9\xab\xac\xae-\xb9\xbb-\xbf\u2010-\u2027\u2030-\u203a"
CAPITALS_V2 = re.compile(rf"[A-Z][A-Za-z]*(?![^{SAFE}])|[{SHIFT}{LOCK}{ESCAPE_V2}]")
SPACED = re.compile(rf"[{SPACE}](?<=[^{SPACE}].)[{SPACE}]*[{SHIFT}{LOCK}]", re.S)  # its first character: found fast
OPERATORS_V2 = re.compile(rf"{ESCAPE_V2}([{SHIFT}{LOCK}{ESCAPE_V2}])|{LOCK}([{SPACE}]*[a-z]{{2,}})|"
                          rf"{SHIFT}([{SPACE}]*[a-z])|[{SHIFT}{LOCK}{ESCAPE_V2}]")


def encode_v2(text: str) -> str:
    """`text` with capitals as SHIFT and LOCK, which precede the white space before the word."""
    def operate(match: re.Match[str]) -> str:
        word = match[0]
        if not word.isascii():
            return ESCAPE_V2 + word
        if word[1:].islower() or len(word) == 1:
            return SHIFT + word.lower()
        if word.isupper() and not match.string[match.end():match.end() + 1].islower():
            return LOCK + word.lower()
        return "".join(SHIFT + c.lower() if c.isupper() else c for c in word)
    return SPACED.sub(lambda match: match[0][-1] + match[0][:-1], CAPITALS_V2.sub(operate, text))


def decoder(operators: re.Pattern[str]) -> Callable[[str], str]:
    """The inverse of both: groups are an escaped character and two stretches of letters that become capitals."""
    def restore(match: re.Match[str]) -> str:
        if match.lastindex is None:
            raise ValueError(f"character {match.start()}: operator U+{ord(match[0]):04X}: not a transformed text")
        return match[1] or match[match.lastindex].upper()
    return lambda text: operators.sub(restore, text)


TRANSFORMS = {
    "none": CaseOps("", str, str, {}),  # leaves the text as it is
    "caseops_v1": CaseOps(TITLE + ALLCAPS + CAPNEXT + ESCAPE, encode_v1, decoder(OPERATORS_V1),
                          {"user_defined_symbols": [TITLE, ALLCAPS, CAPNEXT, ESCAPE]}, raw_bytes=True),
    "caseops_v2": CaseOps(SHIFT + LOCK + ESCAPE_V2, encode_v2, decoder(OPERATORS_V2),
                          {"required_chars": SHIFT + LOCK + ESCAPE_V2}),
}
