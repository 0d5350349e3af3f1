"""
download.py -- the published FineWeb exports, from the Hugging Face hub: the verb `download`.

An export is a folder of a dataset repository: manifest.json, datasets/<name>/fineweb_{train,val}_%06d.bin, tokenizers/.
One commit of it is looked up, and everything is fetched from that commit into a hidden folder. A file is checked when
it arrives (size, SHA-256 where the hub has one); when all are there, `verify` looks at them together, and they move to
their places. The same command goes on after an interruption, file by file; the client itself goes on within a file
when a connection breaks.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import errors
from tqdm import tqdm

from data.documents import one_line, require
from data.verify import FORMAT, load_tokenizer, shown, verify, write_json
from tools.common import ToolError
from train_gpt import BOS_ID, file_sha256, open_shard


class Variant(NamedTuple):
    """A published export."""

    repo: str  # dataset repository on the hub
    dataset: str  # its name in the export's manifest, and that of the local folder
    transform: str = "none"  # what was done to the text; anything but none comes with a byte side file


VARIANTS = {
    "sp1024": Variant("willdepueoai/parameter-golf", "fineweb10B_sp1024"),
    "sp4096": Variant("kevclark/parameter-golf", "fineweb10B_sp4096"),
    "sp8192": Variant("kevclark/parameter-golf", "fineweb10B_sp8192"),
    "caseops": Variant("romeerp/parameter-golf-caseops-v1", "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
                       "caseops_v1"),
}


@contextlib.contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turn whatever the client or the system raises about `what` into a ToolError of one line."""
    try:
        yield
    except errors.HfHubHTTPError as error:
        status = "no answer" if error.response is None else error.response.status_code
        raise ToolError(f"{what}: the hub answers {status} ({str(error).splitlines()[0]}); is the name right? is it"
                        " public, or HF_TOKEN set?") from error
    except errors.HFValidationError as error:
        raise ToolError(f"{what}: {one_line(error)}; MATCHED_FINEWEB_REPO_ID is such as kevclark/parameter-golf"
                        ) from error
    except (OSError, errors.HTTPError) as error:
        cause = one_line(error.__cause__ or error) or type(error).__name__
        raise ToolError(f"{what}: {cause}; the same command goes on where this stopped") from error


def listed(text: bytes, variant: Variant, train_shards: int, source: str
           ) -> tuple[dict[str, list[str]], list[str], dict[str, Any]]:
    """What an export's manifest says of a variant: (shard names by split, tokenizer files, statistics)."""
    try:
        export = json.loads(text)
        datasets = {entry["name"]: entry for entry in export["datasets"]}
        require(variant.dataset in datasets, f"{source}: no dataset {variant.dataset}; it has {', '.join(datasets)}")
        dataset = datasets[variant.dataset]
        tokenizer = next(entry for entry in export["tokenizers"] if entry["name"] == dataset["tokenizer_name"])
        models = [tokenizer[key] for key in ("model_path", "vocab_path") if tokenizer.get(key)]
        stats = dataset["stats"]
        counts = {"train": train_shards, "val": int(stats["files_val"])}
        require(train_shards <= int(stats["files_train"]),
                f"--train-shards {train_shards}: {source} has {stats['files_train']} of {variant.dataset}")
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise ToolError(f"{source}: not an export's manifest ({type(error).__name__}: {error})") from error
    if variant.transform != "none":
        counts["val_bytes"] = counts["val"]
    return {s: [f"fineweb_{s}_{i:06d}.bin" for i in range(n)] for s, n in counts.items()}, models, stats


def download(variant_name: str, train_shards: int, out: Path, workers: int = 8, repo: str = "",
             prefix: str = "datasets", endpoint: str | None = None) -> str:
    """Fetch a variant into `out`/datasets and `out`/tokenizers. Returns a summary.

    Args:  repo      instead of the variant's;  prefix  folder of the export in it;  endpoint  None: HF_ENDPOINT's.
    Raises ToolError on anything that goes wrong; then nothing new is under a final name.
    """
    variant = VARIANTS[variant_name]
    repo = repo or variant.repo
    huggingface_hub.logging.set_verbosity_error()  # it warns of each broken connection that it takes up again
    target, tokenizers = out / "datasets" / variant.dataset, out / "tokenizers"
    work = target.with_name(f".{variant.dataset}.download")
    # A smaller number than before takes nothing away.
    train_shards = max(train_shards, len(list(target.glob("fineweb_train_*.bin"))))
    root = f"{prefix.strip('/')}/".lstrip("/")
    with one_line_errors(f"{repo}: {root}manifest.json"):
        api = huggingface_hub.HfApi(endpoint=endpoint)
        at = {"repo_type": "dataset", "revision": api.repo_info(repo, repo_type="dataset").sha}
        fetch = functools.partial(api.hf_hub_download, repo, local_dir=work, **at)
        export = Path(fetch(f"{root}manifest.json")).read_bytes()
    splits, models, stats = listed(export, variant, train_shards, f"{repo}: {root}manifest.json")
    folder = f"{root}datasets/{variant.dataset}"
    homes = {f"{root}{path}": tokenizers / Path(path).name for path in models}
    homes |= {f"{folder}/{name}": target / name for names in splits.values() for name in names}
    files: dict[str, Any] = {}  # size and, for large ones, SHA-256 of each
    with one_line_errors(repo):
        for paths in (list(homes)[first:first + 500] for first in range(0, len(homes), 500)):
            files |= {info.path: info for info in api.get_paths_info(repo, paths, **at)}
    for path in homes:
        require(path in files, f"{repo} has no {path} at {at['revision'][:12]}; fewer --train-shards, or another"
                " MATCHED_FINEWEB_REPO_ID")

    for path, home in homes.items():
        second_name(home, work / path)
    missing = [file for file in files.values() if not is_file(work / file.path, file)]
    for file in missing:
        (work / file.path).unlink(missing_ok=True)
        home = homes[file.path]
        require(not home.exists() or home.parent == target, f"{shown(home)} exists and is another tokenizer than that"
                f" of {repo}; move it away, or choose another --out")
    needed, free = sum(file.size for file in missing), shutil.disk_usage(work).free
    print(f"{'needed':<12}{needed / 1e9:,.3f} GB for {len(missing)} of {len(files)} files; {free / 1e9:,.3f} GB free in"
          f" {shown(out)}", flush=True)
    require(needed < free, f"{shown(out)}: {needed:,} bytes needed, {free:,} free; make room, choose another --out, or"
            " fewer --train-shards")
    fetch_all(fetch, repo, missing, workers)

    model = next(path for path in homes if path.endswith(".model"))
    manifest: dict[str, Any] = {
        "format": FORMAT, "name": variant.dataset, "bos_id": BOS_ID,
        "vocab_size": load_tokenizer(work / model).vocab_size(),
        "tokenizer": {"path": os.path.relpath(homes[model], target), "sha256": file_sha256(work / model),
                      "training": None},
        "source": {"kind": "hub", "repo": repo, "revision": at["revision"], "prefix": prefix}}
    if variant.transform != "none":
        manifest["transform"] = variant.transform
    for split, names in splits.items():
        paths = [work / folder / name for name in names]
        manifest[split] = {"files": [{"name": path.name, "tokens": len(open_shard(path)), "sha256": file_sha256(path)}
                                     for path in paths]}
    if "docs_val" in stats:
        manifest["val"]["documents"] = stats["docs_val"]
    checks, totals = verify(work / folder, work / model, manifest)
    for check in checks:
        require(not check.problem, f"{repo}: {check.what}: {check.result} ({check.problem})")
    for split in ("train", "val"):
        manifest[split] |= {"documents": totals[split].documents, "tokens": totals[split].tokens}
    write_json(work / folder / "manifest.json", manifest)
    install(work / folder, target, {work / path: home for path, home in homes.items() if home.parent == tokenizers})
    shutil.rmtree(work)
    knobs = f"DATA_PATH={shown(target)} VOCAB_SIZE={manifest['vocab_size']}"
    knobs += " CASEOPS_ENABLED=1" * ("transform" in manifest)
    return "\n".join([*(f"{check.what:<12}{check.result}" for check in checks), f"{'next':<12}./run.sh train {knobs}"])


def second_name(home: Path, path: Path) -> None:
    """Give a file that was fetched before a name in the work folder, so that `verify` sees old and new in one."""
    if home.exists() and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(home, path)
        except OSError:  # a file system without hard links
            shutil.copyfile(home, path)


def is_file(path: Path, file: Any) -> bool:
    """Whether a local file is that of the hub, by size and, where the hub has one, SHA-256."""
    return path.is_file() and path.stat().st_size == file.size and (
        file.lfs is None or file_sha256(path) == file.lfs.sha256)


def fetch_all(fetch: Callable[..., str], repo: str, files: Sequence[Any], workers: int) -> None:
    """Fetch files of a repository, several at a time, and check each.

    The first to go wrong ends the others; what has arrived stays for the next time.
    """
    stopped = threading.Event()
    total = tqdm(total=sum(file.size for file in files), desc="download", unit="B", unit_scale=True, leave=False,
                 disable=None)

    class Part(tqdm):
        """What the client reports of one file, added to the one bar; also where a file in transfer can be ended."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if stopped.is_set():
                raise OSError("ended, because another file failed")
            total.update(n)

    def get(file: Any) -> None:
        with one_line_errors(f"{repo}: {file.path}"):
            path = Path(fetch(file.path, tqdm_class=Part))
        if not is_file(path, file):
            size = path.stat().st_size
            path.unlink()
            raise ToolError(f"{repo}: {file.path}: its SHA-256 or size ({size:,} bytes) is not the hub's"
                            f" ({file.size:,}); the same command fetches it anew")

    failures: list[BaseException] = []

    def get_or_stop(file: Any) -> None:
        try:
            if not stopped.is_set():
                get(file)
        except BaseException as error:
            failures.append(error)  # those after the first only fell with it
            stopped.set()

    with total, ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(get_or_stop, files))
        finally:
            stopped.set()  # Ctrl-C ends the files in transfer, too
    if failures:
        raise failures[0]


def install(built: Path, target: Path, tokenizer: dict[Path, Path]) -> None:
    """Move verified files to their places; the manifest and verified.json come after the shards."""
    for path, home in tokenizer.items():
        home.parent.mkdir(exist_ok=True)
        os.replace(path, home)
    if not target.exists():
        os.rename(built, target)
        return
    for path in sorted(built.iterdir()):  # a name for a file that is there already moves nothing
        os.replace(path, target / path.name)
