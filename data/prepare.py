"""
prepare.py -- get, make and judge the data that train_gpt.py reads.

    python data/prepare.py download --variant sp8192 --train-shards 80   # the challenge's published FineWeb export
    python data/prepare.py demo                                # text that every Python carries: offline
    python data/prepare.py text corpus/ --name mine            # your .txt, .jsonl[.gz|.zst], .parquet
    python data/prepare.py verify data/datasets/demo_sp1024    # everything a referee would ask; exit status 1 if not

A dataset is data/datasets/<name>/ (shards, manifest.json) and a model in data/tokenizers/. It appears there whole or
not at all; what is unfinished lies in a hidden folder beside it, from which the same command goes on.

This file is the command line; download.py, text.py and verify.py carry it out, documents.py and caseops.py are what
worker processes do. data/README.md has the formats.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

# Nothing heavy is imported here: worker processes import this file once more.


def refuse(message: str) -> None:
    from data.documents import refuse

    refuse(message)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message: str) -> Any:
        refuse(f"{message} (see {self.prog} --help)")


def parser() -> Parser:
    """The verbs and their options."""
    from data.documents import TRANSFORMS
    from data.download import VARIANTS
    from data.text import DEMO_VAL_SHARE, Options, available_cpus

    top = Parser(
        prog="prepare.py",
        description="Get, make and judge the token shards and tokenizers that train_gpt.py reads.",
        epilog="prepare.py VERB --help explains a verb; data/README.md explains the formats.",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    download = verbs.add_parser(
        "download",
        help="a published FineWeb export",
        description="Download the validation split and N training shards of a published export. Files are verified"
        " as they arrive; an interrupted download goes on with the same command, and a larger N adds shards."
        " MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX name another repository and folder in it.",
    )
    add = download.add_argument
    add("--variant", required=True, choices=list(VARIANTS), help="which tokenizer's export")
    add("--train-shards", type=int, default=80, metavar="N",
        help="training shards of 10**8 tokens, 200 MB each (%(default)s)")
    add("--workers", type=int, default=8, metavar="N", help="files that are fetched at a time (%(default)s)")
    demo = verbs.add_parser(
        "demo",
        help="a small dataset from text that this Python carries; nothing is downloaded",
        description="Make data/datasets/demo_sp1024 from the documentation topics and the standard library's"
        " sources of the Python that runs this. About ten seconds; a second call finds it made, and one with another"
        " Python replaces it.",
    )
    text = verbs.add_parser(
        "text",
        help="a dataset from your own files",
        description="Make a dataset from .txt (one document a file), .jsonl, .jsonl.gz, .jsonl.zst and"
        " .parquet files, and from folders of them. Equal documents are kept once. Validation documents are"
        " drawn by a hash of their content, unless --val-files names them.",
    )
    add = text.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="a file, or a folder that is searched")
    add("--name", required=True, help="for the dataset NAME_sp<V> and the tokenizer NAME_<V>_bpe.model")
    add("--text-field", default="text", metavar="FIELD", help="JSON field or Parquet column (%(default)s)")
    add("--vocab-size", type=int, metavar="V", help=f"pieces of a tokenizer to train ({Options.vocab_size})")
    add("--tokenizer", type=Path, metavar="MODEL", help="use this SentencePiece model; train none")
    add("--sample-bytes", type=int, default=Options.sample_bytes, metavar="N",
        help="most training text to train the tokenizer on, drawn by hash (%(default)s)")
    add("--transform", default="none", metavar="|".join(TRANSFORMS),
        help="capitals as operators (data/caseops.py); adds the byte side file (%(default)s)")
    add("--val-files", nargs="+", type=Path, metavar="INPUT", default=[],
        help="validate on all of these, train on all of the others")
    add("--seed", type=int, default=Options.seed, help="key of split, sample and order (%(default)s)")
    add("--order", default=Options.order, metavar="hash|input",
        help="documents shuffled by a hash of their content, or as they are read (%(default)s)")
    add("--shard-tokens", type=int, default=Options.shard_tokens, metavar="N",
        help="tokens per shard file (%(default)s)")
    for verb, share in ((demo, DEMO_VAL_SHARE), (text, Options.val_share)):
        add = verb.add_argument
        add("--val-share", type=float, metavar="X",
            help=f"share of the documents that validate, above 0, at most 0.5 ({share})")
        add("--workers", type=int, default=available_cpus(), metavar="N",
            help="processes that hash and encode; they change the time, not the result (%(default)s)")
        add("--force", action="store_true", help="replace an existing dataset of this name")
    for verb in (download, demo, text):
        verb.add_argument("--out", type=Path, default=HERE, metavar="DIR",
                          help="folder that gets datasets/ and tokenizers/ (the one that prepare.py is in)")
    look = verbs.add_parser(
        "verify",
        help="everything a referee would ask of a dataset",
        description="Recompute from the files: headers, sizes, ids, SHA-256, counts, BOS structure, the tokenizer's"
        " round trip and the bytes of all validation documents, and which of them are in training, too. Any folder"
        " in the challenge's layout will do. Exit status 1 if something is wrong.",
    )
    look.add_argument("directory", type=Path, metavar="DIR", help="for example data/datasets/demo_sp1024")
    look.add_argument("--tokenizer", type=Path, metavar="MODEL",
                      help="its SentencePiece model (the manifest's, or the one that the folder's name tells)")
    return top


def run(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Carries out a parsed command and returns the exit status."""
    if args.verb == "verify":
        from data import verify

        return verify.report(args.directory, verify.verify(args.directory, args.tokenizer))
    if args.verb == "download":
        from data import download

        print(download.download(args.variant, args.train_shards, args.out, args.workers,
                                repo=env.get("MATCHED_FINEWEB_REPO_ID", ""),
                                prefix=env.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets")))
        return 0
    from data import text

    print(text.summary(text.prepare(*(text.demo(args) if args.verb == "demo" else text.files(args)))))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a check failed, 2 a mistake in command or input, 130 interrupted."""
    sys.path.insert(0, str(HERE.parent))
    try:
        from train_gpt import UserError
    except ModuleNotFoundError as missing:  # the first thing that goes wrong outside the virtual environment
        print(f"prepare.py: package {missing.name!r} is missing: pip install -r requirements.txt", file=sys.stderr)
        return 2
    try:
        return run(parser().parse_args(argv), os.environ)
    except (UserError, OSError) as error:  # of OSError (disk full, no permission) the system's words name the file
        message, status = " ".join(str(error).split()), 2
    except ModuleNotFoundError as missing:
        message, status = f"package {missing.name!r} is missing: pip install -r requirements.txt", 2
    except KeyboardInterrupt:
        message, status = "interrupted; the same command goes on, nothing half-made is in place", 130
    print(f"prepare.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    # `kill` cleans up like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
