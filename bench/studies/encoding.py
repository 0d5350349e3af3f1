"""What `./run.sh data text` costs beside the raw SentencePiece call, and its peak memory by the size of the input.

    python -m bench.studies.encoding MODEL CORPUS [MB ...]    CORPUS: .jsonl[.gz|.zst], .parquet, .txt; default 10 MB

One line of JSON: CPU seconds per MB of one process, alternating in five rounds over the same documents (median), as
ratios to SentencePiece's `encode`; then, for each size in MB, a corpus of so many copies, each text with the number of
its copy in front, is prepared by a run of its own: wall time, and memory of its largest process.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import train_gpt as tg
from data import documents
from data.documents import require
from data.text import Corpus
from tools.common import program

ROOT = Path(__file__).resolve().parents[2]


def cpu_seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def costs(texts: Sequence[str], model: str) -> dict[str, float]:
    """CPU seconds per MB of each part, for these texts."""
    tokenizer = documents.worker_tokenizer(model)

    def scan() -> None:
        with tempfile.TemporaryDirectory() as folder:
            corpus = Corpus(Path(folder) / "corpus", 0, 0.01)
            for text in texts:
                corpus.add(text, None)
            corpus.unique()
            corpus.db.close()

    parts = {
        "sentencepiece": lambda: [tokenizer.encode(text) for text in texts],
        "scan": scan,
        "encode": lambda: documents.encode_batch(texts, model, "none"),
    }
    rounds = [{name: cpu_seconds(part) for name, part in parts.items()} for _ in range(5)]
    size = sum(len(text.encode()) for text in texts) / 1e6
    return {name: statistics.median(one[name] for one in rounds) / size for name in parts}


def prepared(texts: Sequence[str], model: str, megabytes: float, folder: Path) -> dict[str, Any]:
    """Seconds and MiB of `data text` on a corpus of that size."""
    size, copy = 0, 0
    with (folder / "corpus.jsonl").open("w") as file:
        while size < megabytes * 1e6:
            for number, text in enumerate(texts):
                size += file.write(json.dumps({"text": f"{copy} {number} {text}"}) + "\n")
            copy += 1
    command = [sys.executable, "-m", "data.prepare", "text", folder / "corpus.jsonl", "--name", "b", "--force",
               "--tokenizer", model, "--out", folder]
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    _, status, usage = os.wait4(child.pid, 0)  # of the largest among it and its workers
    require(status == 0, "`data text` failed, see above")
    return {"mb": round(size / 1e6), "seconds": round(time.perf_counter() - start, 1),
            "peak_mib": round(usage.ru_maxrss / 1024)}


def main(arguments: Sequence[str]) -> int:
    """One line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.encoding", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, help="a SentencePiece model")
    parser.add_argument("corpus", type=Path, help=".jsonl, .jsonl.gz, .parquet or .txt")
    parser.add_argument("sizes", nargs="*", type=float, metavar="MB", default=[10.0], help="of corpora (default 10)")
    asked = parser.parse_args(arguments)
    require(min(asked.sizes) > 0, f"{min(asked.sizes):g}: expected a positive number of MB")
    tg.load_sentencepiece(asked.model)
    texts, size = [], 0
    for _, text in documents.read_documents(documents.input_files([asked.corpus]), "text"):
        texts.append(text)
        if (size := size + len(text)) > 5e6:
            break
    require(size > 0, f"{asked.corpus}: holds no text")
    found = costs(texts, str(asked.model))
    with tempfile.TemporaryDirectory() as folder:
        runs = [prepared(texts, str(asked.model), mb, Path(folder)) for mb in asked.sizes]
    print(json.dumps({"cpu_seconds_per_mb": {name: round(value, 4) for name, value in found.items()},
                      "encode_to_sentencepiece": round(found["encode"] / found["sentencepiece"], 3),
                      "scan_to_sentencepiece": round(found["scan"] / found["sentencepiece"], 3), "runs": runs}))
    return 0


if __name__ == "__main__":
    sys.exit(program(main, "encoding"))
