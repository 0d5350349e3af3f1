"""
download.py -- the published FineWeb exports, from the Hugging Face hub: the verb `download`.

An export is a folder of a dataset repository: datasets/<name>/fineweb_{train,val}_%06d.bin, tokenizers/*.model.
One commit of it is looked up, and everything is fetched from that commit into a hidden folder. A file is checked when
it arrives (size, SHA-256 where the hub has one); when all are there, `verify` looks at them together, and they move to
their places. The same command goes on after an interruption, file by file; the client itself goes on within a file
when a connection breaks.
"""
from __future__ import annotations

import contextlib
import fnmatch
import functools
import itertools
import os
import re
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors
from tqdm import tqdm

from data.documents import one_line, require
from data.verify import FORMAT, VAL_DOCUMENTS, damage, load_tokenizer, write_json
from tools.common import ToolError
from train_gpt import BOS_ID, file_sha256, open_shard

VARIANTS = {  # dataset repository on the hub; name of the dataset in it, and of the local folder
    "sp1024": ("willdepueoai/parameter-golf", "fineweb10B_sp1024"),
    "sp4096": ("kevclark/parameter-golf", "fineweb10B_sp4096"),
    "sp8192": ("kevclark/parameter-golf", "fineweb10B_sp8192"),
    "caseops": ("romeerp/parameter-golf-caseops-v1", "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"),
}


@contextlib.contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turn whatever the client or the system raises about `what` into a ToolError of one line."""
    try:
        yield
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        cause = one_line(error.__cause__ or error) or type(error).__name__
        raise ToolError(f"{what}: {cause}; once that is mended, the same command goes on where it stopped") from error


def named(paths: Collection[str], root: str, name: str, most: int, source: str) -> tuple[str, dict[str, list[str]]]:
    """(path of the tokenizer, paths of the shards by split) among those of a repository, by the published names."""
    size, rest = re.fullmatch(r"fineweb10B_sp(\d+)(\w*)", name).groups()
    model = f"{root}tokenizers/fineweb_{size}_bpe{rest}.model"
    splits = {split: sorted(fnmatch.filter(paths, f"{root}datasets/{name}/fineweb_{split}_{'[0-9]' * 6}.bin"))
              for split in ("train", "val", *["val_bytes"] * ("caseops" in name))}
    require(model in paths and all(splits.values()), f"{source}: no tokenizer and shards of {name} in it")
    require(most <= len(splits["train"]), f"--train-shards {most}: {source} has {len(splits['train'])} of {name}")
    return model, {**splits, "train": splits["train"][:most]}


def download(variant: str, train_shards: int, out: Path) -> str:
    """Fetch a variant into `out`/datasets and `out`/tokenizers. Returns the command that trains on it.

    Raises ToolError on anything that goes wrong; then nothing new is under a final name.
    """
    published, name = VARIANTS[variant]
    repo = os.environ.get("MATCHED_FINEWEB_REPO_ID") or published
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets")
    huggingface_hub.logging.set_verbosity_error()  # it warns of each broken connection that it takes up again
    huggingface_hub.utils.disable_progress_bars()  # one bar for all files instead
    target, tokenizers = out / "datasets" / name, out / "tokenizers"
    work = target.with_name(f".{name}.download")
    # A smaller number than before takes nothing away.
    train_shards = max(train_shards, len(list(target.glob("fineweb_train_*.bin"))))
    with one_line_errors(repo):
        api = huggingface_hub.HfApi()
        info = api.dataset_info(repo, files_metadata=True)
    fetch = functools.partial(api.hf_hub_download, repo, repo_type="dataset", revision=info.sha, local_dir=work)
    files = {file.rfilename: file for file in info.siblings}
    root = f"{prefix.strip('/')}/".lstrip("/")
    model, splits = named(files, root, name, train_shards, f"{repo}/{root}")
    homes = {path: target / Path(path).name for path in itertools.chain(*splits.values())}
    homes[model] = tokenizers / Path(model).name
    for path, home in homes.items():  # what was fetched before, so that `verify` sees old and new in one folder
        if home.exists() and not (work / path).exists():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).symlink_to(home.resolve())
    missing = [path for path in homes if not is_file(work / path, files[path])]
    require(model not in missing or not homes[model].exists(), f"{homes[model]} exists and is another tokenizer than"
            f" that of {repo}; move it away, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    needed, free = sum(files[path].size for path in missing), shutil.disk_usage(out).free
    print(f"{'needed':<12}{needed / 1e9:,.3f} GB for {len(missing)} of {len(homes)} files; {free / 1e9:,.3f} GB free in"
          f" {out}", flush=True)
    require(needed < free, f"{out}: {needed:,} bytes needed, {free:,} free; make room, choose another --out, or fewer"
            " --train-shards")

    def get(path: str) -> None:
        (work / path).unlink(missing_ok=True)
        with one_line_errors(f"{repo}: {path}"):
            fetch(path)
        if not is_file(work / path, files[path]):
            (work / path).unlink()
            raise ToolError(f"{repo}: {path}: its SHA-256 or size is not the hub's; the same command fetches it anew")

    with ThreadPoolExecutor(8) as pool:  # the first to fail ends the rest; what is in transfer still arrives
        for _ in tqdm(pool.map(get, missing), "download", len(missing), unit=" files", leave=False, disable=None):
            pass

    manifest: dict[str, Any] = {
        "format": FORMAT, "name": name, "bos_id": BOS_ID, "vocab_size": load_tokenizer(work / model).vocab_size(),
        "tokenizer": {"path": os.path.relpath(homes[model], target), "sha256": file_sha256(work / model),
                      "training": None},
        "source": {"kind": "hub", "repo": repo, "revision": info.sha, "prefix": prefix}}
    for split, paths in splits.items():
        manifest[split] = {"files": [{"name": Path(path).name, "tokens": len(open_shard(work / path)),
                                      "sha256": file_sha256(work / path)} for path in paths]}
    if repo == published:
        manifest["val"]["documents"] = VAL_DOCUMENTS
    knobs = f"DATA_PATH={target} VOCAB_SIZE={manifest['vocab_size']}"
    if "caseops" in name:
        manifest["transform"] = "caseops_v1"
        knobs += " CASEOPS_ENABLED=1"
    folder = work / root / "datasets" / name
    write_json(folder / "manifest.json", manifest)
    problem = damage(folder, work / model)
    require(not problem, f"{repo}: {problem}")
    tokenizers.mkdir(exist_ok=True)
    if not homes[model].exists():
        os.rename(work / model, homes[model])
    if target.exists():
        for path in sorted(folder.iterdir()):  # the manifest and verified.json after the shards
            if not path.is_symlink():
                os.replace(path, target / path.name)
    else:
        os.rename(folder, target)
    shutil.rmtree(work)
    return f"{'next':<12}./run.sh train {knobs}"


def is_file(path: Path, file: Any) -> bool:
    """Whether a local file is that of the hub, by size and, where the hub has one, SHA-256."""
    return path.is_file() and path.stat().st_size == file.size and (
        file.lfs is None or file_sha256(path) == file.lfs.sha256)
