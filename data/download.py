"""
download.py -- the published FineWeb exports, from the Hugging Face hub: `prepare.py download`.

An export is a folder of a dataset repository: manifest.json, datasets/<name>/fineweb_{train,val}_%06d.bin, tokenizers/.
One commit of it is looked up, and everything is fetched from that commit. A file is verified when it arrives (size,
SHA-256 where the hub has one, header) and waits in a hidden folder until all are there and their ids are those of the
tokenizer; the same command goes on after an interruption, file by file. The client itself goes on within a file when a
connection breaks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import huggingface_hub
from huggingface_hub.hf_api import RepoFile
from tqdm import tqdm
from data.verify import FORMAT, UserError, examine, file_sha256, load_tokenizer, open_shard, require, save_keys, shown


class Variant(NamedTuple):
    """A published export."""

    repo: str
    """Dataset repository on the hub."""
    dataset: str
    """Its name in the export's manifest, and that of the local folder."""
    transform: str = "none"
    """What was done to the text (documents.TRANSFORMS); anything but none comes with a byte side file."""


VARIANTS = {
    "sp1024": Variant("willdepueoai/parameter-golf", "fineweb10B_sp1024"),
    "sp4096": Variant("kevclark/parameter-golf", "fineweb10B_sp4096"),
    "sp8192": Variant("kevclark/parameter-golf", "fineweb10B_sp8192"),
    "caseops": Variant("romeerp/parameter-golf-caseops-v1", "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
                       "caseops_v1"),
}


class Hub(NamedTuple):
    """One commit of a dataset repository."""

    api: huggingface_hub.HfApi
    repo: str
    revision: str

    def sizes(self, paths: Sequence[str]) -> list[RepoFile]:
        """Size and, for large files, SHA-256 of each path. UserError if one is not there."""
        found = {}
        for first in range(0, len(paths), 500):
            some = list(paths[first : first + 500])
            for info in self.api.get_paths_info(self.repo, some, repo_type="dataset", revision=self.revision):
                found[info.path] = info
        for path in paths:
            require(path in found, f"{self.repo} has no {path} at {self.revision[:12]}; fewer --train-shards, or"
                    " another MATCHED_FINEWEB_REPO_ID")
        return [found[path] for path in paths]

    def fetch(self, path: str, folder: Path, bar: type[tqdm] | None = None) -> Path:
        """`path` as a file below `folder`; nothing is transferred if it is there already."""
        return Path(self.api.hf_hub_download(self.repo, path, repo_type="dataset", revision=self.revision,
                                             local_dir=folder, tqdm_class=bar))


@contextlib.contextmanager
def one_line_errors(what: str) -> Any:
    """Whatever the client or the system raises about `what` becomes a UserError of one line."""
    try:
        yield
    except huggingface_hub.errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise UserError(f"{what}: the hub answers {status} ({str(error).splitlines()[0]}); is the name right? is it"
                        " public, or HF_TOKEN set?") from error
    except huggingface_hub.errors.HFValidationError as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}; MATCHED_FINEWEB_REPO_ID is such as"
                        " kevclark/parameter-golf") from error
    except (OSError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        cause = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise UserError(f"{what}: {cause}; the same command goes on where this stopped") from error


def listed(
    export: bytes, variant: Variant, train_shards: int, source: str
) -> tuple[dict[str, list[str]], list[str], Any]:
    """What an export's manifest says of a variant: (shard names by split, tokenizer files, statistics)."""
    try:
        export = json.loads(export)
        dataset = next((d for d in export["datasets"] if d["name"] == variant.dataset), None)
        require(dataset is not None, f"{source}: no dataset {variant.dataset}; it has "
                f"{', '.join(d['name'] for d in export['datasets'])}")
        tokenizer = next(t for t in export["tokenizers"] if t["name"] == dataset["tokenizer_name"])
        models = [tokenizer[key] for key in ("model_path", "vocab_path") if tokenizer.get(key)]
        stats = dataset["stats"]
        counts = {"train": train_shards, "val": int(stats["files_val"])}
        require(train_shards <= int(stats["files_train"]),
                f"--train-shards {train_shards}: {source} has {stats['files_train']} of {variant.dataset}")
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise UserError(f"{source}: not an export's manifest ({type(error).__name__}: {error})") from error
    if variant.transform != "none":
        counts["val_bytes"] = counts["val"]
    return {s: [f"fineweb_{s}_{i:06d}.bin" for i in range(n)] for s, n in counts.items()}, models, stats


def download(variant_name: str, train_shards: int, out: Path, workers: int = 8, repo: str = "",
             prefix: str = "datasets", endpoint: str | None = None) -> str:
    """Fetches a variant into `out`/datasets and `out`/tokenizers; returns a summary.

    Args:  repo      instead of the variant's;  prefix  folder of the export in it;  endpoint  None: HF_ENDPOINT's.
    UserError on anything that goes wrong; then nothing new is under a final name.
    """
    variant = VARIANTS[variant_name]
    repo = repo or variant.repo
    require(train_shards >= 1, f"--train-shards {train_shards}: expected 1 or more")
    require(workers >= 1, f"--workers {workers}: expected 1 or more")
    huggingface_hub.logging.set_verbosity_error()  # it warns of each broken connection that it takes up again
    target = out / "datasets" / variant.dataset
    work = out / "datasets" / f".{variant.dataset}.download"
    # A smaller number than before takes nothing away.
    train_shards = max(train_shards, len(list(target.glob("fineweb_train_*.bin"))))
    root = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
    with one_line_errors(f"{repo}: {root}manifest.json"):
        api = huggingface_hub.HfApi(endpoint=endpoint)
        hub = Hub(api, repo, api.repo_info(repo, repo_type="dataset").sha)
        export = hub.fetch(f"{root}manifest.json", work).read_bytes()
    splits, models, stats = listed(export, variant, train_shards, f"{repo}: {root}manifest.json")
    homes = {f"{root}{path}": out / "tokenizers" / Path(path).name for path in models}
    homes |= {f"{root}datasets/{variant.dataset}/{name}": target / name for names in splits.values() for name in names}
    with one_line_errors(repo):
        files = hub.sizes(list(homes))

    missing = [file for file in files if not is_file(homes[file.path], file)]
    needed = sum(file.size for file in missing if not is_file(work / file.path, file))
    free = shutil.disk_usage(work).free
    print(f"{'needed':<12}{needed / 1e9:,.3f} GB for {len(missing)} of {len(files)} files; {free / 1e9:,.3f} GB free in"
          f" {shown(out)}", flush=True)
    require(needed < free, f"{shown(out)}: {needed:,} bytes needed, {free:,} free; make room, choose another --out, or"
            " fewer --train-shards")
    for file in missing:
        home = homes[file.path]
        require(not home.exists() or home.parent == target, f"{shown(home)} exists and is another tokenizer than that"
                f" of {repo}; move it away, or choose another --out")
    model = next(file for file in files if file.path.endswith(".model"))
    places = {file.path: homes[file.path] for file in files} | fetch_all(hub, missing, work, workers)

    tokenizer = load_tokenizer(places[model.path])
    entries: dict[str, Any] = {}
    for split, names in splits.items():
        paths = [places[f"{root}datasets/{variant.dataset}/{name}"] for name in names]
        ids_below = 1 << 16 if split == "val_bytes" else tokenizer.vocab_size()
        with ThreadPoolExecutor(workers) as pool:
            shards = list(pool.map(examine, paths, repeat(None), repeat(ids_below), repeat(None)))
            sums = list(pool.map(file_sha256, paths))
        for path, shard in zip(paths, shards):
            require(not shard.problem, f"{shown(path)}: {shard.problem}; tokenizer and shards of {repo} do not belong"
                    " together")
        entries[split] = {"files": [{"name": name, "tokens": shard.tokens, "sha256": digest}
                                    for name, shard, digest in zip(names, shards, sums)]}
        if split != "val_bytes":
            entries[split] |= {"documents": sum(s.documents for s in shards), "tokens": sum(s.tokens for s in shards)}
    require(entries["val"]["documents"] == stats.get("docs_val", entries["val"]["documents"]),
            f"{repo}: {entries['val']['documents']:,} validation documents, its manifest says {stats.get('docs_val')}")
    manifest = {
        "format": FORMAT, "name": variant.dataset, "vocab_size": tokenizer.vocab_size(), "bos_id": tokenizer.bos_id(),
        "tokenizer": {"path": os.path.relpath(homes[model.path], target), "sha256": file_sha256(places[model.path]),
                      "training": None},
        "source": {"kind": "hub", "repo": repo, "revision": hub.revision, "prefix": prefix},
        **({} if variant.transform == "none" else {"transform": variant.transform}), **entries,
    }
    install(manifest, {places[path]: home for path, home in homes.items() if places[path] != home}, target)
    shutil.rmtree(work)
    return "\n".join([
        *(f"{split:<12}{entry['documents']:,} documents, {entry['tokens']:,} tokens in {len(entry['files'])} files"
          for split, entry in entries.items() if split != "val_bytes"),
        f"{'dataset':<12}{shown(target)}", f"{'tokenizer':<12}{shown(homes[model.path])}",
        f"{'next':<12}python data/prepare.py verify {shown(target)}"])


def is_file(path: Path, file: RepoFile) -> bool:
    """Whether a local file is that of the hub, by size and, where the hub has one, SHA-256."""
    return path.is_file() and path.stat().st_size == file.size and (
        file.lfs is None or file_sha256(path) == file.lfs.sha256)


def fetch_all(hub: Hub, files: Sequence[RepoFile], work: Path, workers: int) -> dict[str, Path]:
    """Fetches files into `work`, several at a time, and verifies each: its place by its path.

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

    def get(file: RepoFile) -> Path:
        with one_line_errors(f"{hub.repo}: {file.path}"):
            path = hub.fetch(file.path, work, Part)
        wrong = "" if path.stat().st_size == file.size else f"{path.stat().st_size:,} bytes, the hub says {file.size:,}"
        if not wrong and file.lfs and file_sha256(path) != file.lfs.sha256:
            wrong = "its SHA-256 is not the hub's"
        if not wrong and path.suffix == ".bin":
            try:
                open_shard(path)
            except UserError as error:
                wrong = str(error).removeprefix(f"{path}: ")
        if wrong:
            path.unlink()
            raise UserError(f"{hub.repo}: {file.path}: {wrong}; the same command fetches it anew")
        return path

    first: list[BaseException] = []

    def get_or_stop(file: RepoFile) -> Path | None:
        try:
            return None if stopped.is_set() else get(file)
        except BaseException as error:
            if not stopped.is_set():  # else it only fell with the first
                first.append(error)
            stopped.set()
            return None

    with total, ThreadPoolExecutor(workers) as pool:
        try:
            found = list(pool.map(get_or_stop, files))
        except KeyboardInterrupt:
            stopped.set()
            raise
    if first:
        raise first[0]
    return {file.path: path for file, path in zip(files, found)}


def install(manifest: dict[str, Any], moves: dict[Path, Path], target: Path) -> None:
    """Moves verified files to their places; the manifest, which makes them a dataset, comes last."""
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    shards = {path: home for path, home in moves.items() if home.parent == target}
    for path, home in moves.items():
        if path not in shards or target.exists():
            home.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, home)
    folder = target if target.exists() else next(iter(shards)).parent
    (folder / "manifest.new").write_text(text)
    os.replace(folder / "manifest.new", folder / "manifest.json")
    save_keys(folder)
    if folder != target:
        os.rename(folder, target)
