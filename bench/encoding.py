"""What `prepare.py text` costs beside the raw SentencePiece call, and its peak memory by the size of the input.

    python bench/encoding.py MODEL CORPUS [MB ...]      CORPUS: .jsonl[.gz|.zst], .parquet, .txt; default sizes 10

One line of JSON: CPU seconds per MB of one process, alternating in five rounds over the same documents (median), as
ratios to SentencePiece's `encode`; then, for each size in MB, a corpus of so many copies, each text with the number of
its copy in front, is prepared by a run of its own: wall time, and memory of its largest process.
"""
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))

import documents


def cpu_seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def costs(rows: Sequence[documents.Row], model: str) -> dict[str, float]:
    """CPU seconds per MB of each part, for the documents of `rows`."""
    tokenizer = documents.worker_tokenizer(model)
    texts = [documents.document(row, "text")[0] for row in rows]
    parts = {
        "sentencepiece": lambda: [tokenizer.encode(text) for text in texts],
        "scan": lambda: documents.scan_batch(rows, "text", None, 0.01, 0, 0),
        "encode": lambda: documents.encode_batch(rows, "text", b"\1" * len(rows), model, "none", 0),
    }
    rounds = [{name: cpu_seconds(part) for name, part in parts.items()} for _ in range(5)]
    size = sum(len(text.encode()) for text in texts) / 1e6
    return {name: statistics.median(one[name] for one in rounds) / size for name in parts}


def prepared(rows: Sequence[documents.Row], model: str, megabytes: float, folder: Path) -> dict[str, Any]:
    """Seconds and MiB of `prepare.py text` on a corpus of that size."""
    texts, size, copy = [documents.document(row, "text")[0] for row in rows], 0, 0
    with (folder / "corpus.jsonl").open("w") as file:
        while size < megabytes * 1e6:
            for number, text in enumerate(texts):
                size += file.write(json.dumps({"text": f"{copy} {number} {text}"}) + "\n")
            copy += 1
    command = [sys.executable, ROOT / "data" / "prepare.py", "text", folder / "corpus.jsonl", "--name", "b", "--force",
               "--tokenizer", model, "--out", folder]
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)  # of the largest among it and its workers
    if status:
        sys.exit("encoding.py: prepare.py failed, see above")
    return {"mb": round(size / 1e6), "seconds": round(time.perf_counter() - start, 1),
            "peak_mib": round(usage.ru_maxrss / 1024)}


def main() -> None:
    """One line of JSON."""
    model, corpus, *sizes = sys.argv[1:]
    rows, size = [], 0
    for row in documents.file_rows(documents.input_files([Path(corpus)]), "text"):
        rows.append(row)
        if (size := size + len(row.content)) > 5e6:
            break
    found = costs(rows, model)
    with tempfile.TemporaryDirectory() as folder:
        runs = [prepared(rows, model, float(mb), Path(folder)) for mb in sizes or ("10",)]
    print(json.dumps({"cpu_seconds_per_mb": {name: round(value, 4) for name, value in found.items()},
                      "encode_to_sentencepiece": round(found["encode"] / found["sentencepiece"], 3),
                      "scan_to_sentencepiece": round(found["scan"] / found["sentencepiece"], 3), "runs": runs}))


if __name__ == "__main__":
    main()
