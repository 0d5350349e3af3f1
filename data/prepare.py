"""
prepare.py -- get, make and check the data that train_gpt.py reads.

    ./run.sh data download --variant sp8192 --train-shards 80   # the challenge's published FineWeb export
    ./run.sh data demo                                  # text that every Python carries: offline
    ./run.sh data text corpus/ --name mine              # your .txt, .md, .jsonl, .jsonl.gz, .parquet
    ./run.sh data verify data/datasets/demo_sp1024      # everything a referee would ask; exit status 1 if not

This file is the command line; data/README.md has the formats.
"""
from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.common import ToolError, program

# Nothing heavy is imported here: worker processes import this file once more, and --help needs none of it.


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message: str) -> Any:
        raise ToolError(f"{message} (see {self.prog} --help)")


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """A converter of arguments: a number of this kind in [low, high]."""
    def convert(text: str) -> Any:
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text}: expected {low:,} to {high:,}")
        return value
    convert.__name__ = kind.__name__  # for argparse's message: "invalid int value"
    return convert


def utf8_path(text: str) -> Path:
    """The argument of an option whose path SentencePiece is given."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text}: expected a name in UTF-8; rename it") from None
    return Path(text)


def separator(text: str) -> str:
    r"""The argument of --split-on, in which \n and \t are written as in Python."""
    if not text:
        raise argparse.ArgumentTypeError(r"empty: expected a text such as '\n\n'")
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


def parser() -> Parser:
    """The verbs and their options."""
    top = Parser(prog="./run.sh data", epilog="./run.sh data VERB --help explains a verb; data/README.md the formats.",
                 description="Get, make and check the token shards and tokenizers that train_gpt.py reads.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    download = verbs.add_parser(
        "download", help="a published FineWeb export", description="Download validation and N training shards of a"
        " published export. The same command goes on after an interruption; a larger N adds shards."
        " MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX name another repository and folder in it.")
    add = download.add_argument
    add("--variant", required=True, choices=["sp1024", "sp4096", "sp8192", "caseops"], help="which tokenizer's export")
    add("--train-shards", type=number(int, 1), default=80, metavar="N",
        help="training shards of 10**8 tokens, 200 MB each (%(default)s)")
    demo = verbs.add_parser(
        "demo", help="a small dataset from text that this Python carries; nothing is downloaded",
        description="Make data/datasets/demo_sp1024 from the topics and the standard library of the running Python.")
    # About 120,000 of the demo's 4.3 M tokens validate, which a CPU scores in seconds. Modules differ much in length;
    # of 1,500 seeds 40 keeps validation within 119,000 to 136,000 tokens on Python 3.10 to 3.13.
    demo.set_defaults(name="demo", inputs=[], val_files=[], val_share=0.0275, seed=40, tokenizer=None,
                      transform="none", force=False)
    text = verbs.add_parser(
        "text", help="a dataset from your own files",
        description="Make a dataset from .txt and .md (one document a file, unless --split-on cuts them), .jsonl,"
        " .jsonl.gz, .parquet and folders of them.")
    add, split = text.add_argument, text.add_mutually_exclusive_group().add_argument
    model = text.add_mutually_exclusive_group().add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="a file, or a folder that is searched")
    add("--name", required=True, help="for the dataset NAME_sp<V> and the tokenizer NAME_<V>_bpe.model")
    add("--text-field", metavar="FIELD", help="JSON field or Parquet column (%(default)s)")
    add("--split-on", type=separator, metavar="TEXT",
        help=r"cut .txt and .md into documents wherever they have TEXT, such as '\n\n' or '<|endoftext|>'")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="key of split, sample and order (%(default)s)")
    # Controls, bytes and a piece are 261; ids are uint16.
    model("--vocab-size", type=number(int, 261, 65_536), metavar="V",
          help="pieces of a tokenizer to train (%(default)s)")
    model("--tokenizer", type=utf8_path, metavar="MODEL", help="use this SentencePiece model; train none")
    add("--transform", choices=["none", "caseops_v1", "caseops_v2"],
        help="capitals as operators (data/caseops.py); adds the byte side file (caseops_v2; with --tokenizer none)")
    split("--val-share", type=number(float, 1e-12, 0.5), default=0.01, metavar="X",
          help="share of the documents that validate, at most 0.5 (%(default)s)")
    split("--val-files", nargs="+", type=Path, metavar="INPUT", default=[],
          help="validate on all of these, train on all of the others")
    add("--force", action="store_true", help="replace an existing dataset of this name")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for verb in (demo, text):
        verb.set_defaults(text_field="text", split_on=None, vocab_size=1024)
        verb.add_argument("--workers", type=number(int, 1), default=cpus, metavar="N",
                          help="processes that encode; they change the time, not the result (%(default)s)")
    for verb in (download, demo, text):
        verb.add_argument("--out", type=utf8_path, default=Path("data"), metavar="DIR",
                          help="folder that gets datasets/ and tokenizers/ (%(default)s)")
    look = verbs.add_parser(
        "verify", help="everything a referee would ask of a dataset", description="Recompute everything from the files"
        " of any folder in the challenge's layout; leave verified.json there. Exit status 1 if something is wrong.")
    look.add_argument("directory", type=utf8_path, metavar="DIR", help="for example data/datasets/demo_sp1024")
    look.add_argument("--tokenizer", type=utf8_path, metavar="MODEL", help="its SentencePiece model (the manifest's)")
    return top


def main(arguments: Sequence[str]) -> int:
    """Carry out a command. Exit status: 0 done, 1 a check failed; errors are ToolError and OSError."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    options = parser().parse_args(arguments)
    try:
        if options.verb == "verify":
            from data.verify import table, verify
            checks = verify(options.directory, options.tokenizer)
            print(table(options.directory, checks))
            return int(any(check.problem for check in checks))
        if options.verb == "download":
            from data.download import download
            print(download(options.variant, options.train_shards, options.out))
        else:
            from data.text import prepare, summary
            print(summary(prepare(options)))
        return 0
    except ModuleNotFoundError as missing:  # the first thing that goes wrong outside the virtual environment
        raise ToolError(f"no {missing.name} here: pip install -r requirements.txt -r requirements-data.txt") from None


if __name__ == "__main__":
    # `kill` cleans up like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(program(main, "data"))
