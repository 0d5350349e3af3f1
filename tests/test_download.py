"""data/download.py: what arrives is verified, faults are one line, nothing unfinished has a final name.

Through the real client library, against a server in this process that speaks the hub's protocol.
"""
import functools
import hashlib
import json
import shutil
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from conftest import write_shard
from test_prepare import command

import train_gpt as tg
from data import download, verify
from tools.common import ToolError

NAME, COMMIT = "fineweb10B_sp1024", "0123456789abcdef0123456789abcdef01234567"
SHARDS, MODEL = f"datasets/datasets/{NAME}", "datasets/tokenizers/fineweb_1024_bpe.model"


class Hub(ThreadingHTTPServer):
    """A dataset repository of files by path, with faults by path; counts what it is asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.faults, self.asked, self.ranges = files, {}, Counter(), []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        files, faults = self.server.files, self.server.faults
        if self.path.startswith("/api/datasets/"):
            siblings = [{"rfilename": path, "size": len(data), "blobId": "0" * 40,
                         "lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134}}
                        for path, data in files.items()]
            return self.reply(200, json.dumps({"id": "some/repo", "sha": COMMIT, "siblings": siblings}).encode(),
                              Content_Type="application/json")
        path = self.path.split(f"/resolve/{COMMIT}/")[-1]
        if path not in files:
            return self.reply(404, b"Not found")
        data, status = files[path], 200
        headers = {"ETag": f'"{sha256(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "GET":
            self.server.asked[path] += 1
            if span := self.headers.get("Range"):
                self.server.ranges.append(span)
                start, status = int(span.removeprefix("bytes=").split("-")[0]), 206
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                data = data[start:]
            if (fault := faults.get(path)) == "refused":
                return self.reply(403, b"Forbidden")
            if fault == "changed":
                data = data[:-2] + b"\x05\x00"
            if fault in ("broken", "broken once"):  # half of the file, then the connection ends
                headers["Content-Length"], self.close_connection = str(len(data)), True
                data = data[:len(data) // 2]
            if fault == "broken once":
                faults.clear()
        self.reply(status, data, **headers)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub(dataset, tmp_path, monkeypatch):
    """An export: four training shards, a validation shard, the tokenizer."""
    files = {}
    for i in range(4):
        write_shard(tmp_path / ".shard", np.array([tg.BOS_ID, 300 + i] + [301 + i] * (50_000 + i)))
        files[f"{SHARDS}/fineweb_train_{i:06d}.bin"] = (tmp_path / ".shard").read_bytes()
    files[f"{SHARDS}/fineweb_val_000000.bin"] = (Path(dataset["data_path"]) / "fineweb_val_000000.bin").read_bytes()
    files[MODEL] = Path(dataset["tokenizer_path"]).read_bytes()
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr(download, "VAL_DOCUMENTS", 8)
    with Hub(files) as server:
        monkeypatch.setattr("huggingface_hub.HfApi", functools.partial(huggingface_hub.HfApi, endpoint=server.url))
        yield server
        server.shutdown()


def get(out: Path, train_shards: int = 3) -> str:
    return download.download("sp1024", train_shards, out)


def refused_with(words: str, out: Path, train_shards: int = 3) -> None:
    """The one line of a download that fails and leaves nothing that can be seen."""
    before = visible(out)
    with pytest.raises((ToolError, tg.UserError), match=words) as error:
        get(out, train_shards)
    assert "\n" not in str(error.value) and visible(out) == before


def visible(out: Path) -> list[str]:
    """Files below `out` that are not in a hidden folder."""
    paths = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


EXPECTED = [f"datasets/{NAME}/fineweb_train_{i:06d}.bin" for i in range(3)] + [
    f"datasets/{NAME}/fineweb_val_000000.bin", f"datasets/{NAME}/manifest.json", f"datasets/{NAME}/verified.json",
    "tokenizers/fineweb_1024_bpe.model"]


def test_a_download_is_a_verified_dataset_which_a_second_call_leaves_or_adds_to(hub, tmp_path):
    out, target = tmp_path / "out", tmp_path / "out" / "datasets" / NAME
    assert f"./run.sh train DATA_PATH={target} VOCAB_SIZE=512" in get(out) and visible(out) == EXPECTED
    assert all(path.read_bytes() == hub.files[f"{SHARDS}/{path.name}"] for path in target.glob("*.bin"))
    manifest = json.loads((target / "manifest.json").read_text())
    assert sha256((target / manifest["tokenizer"]["path"]).read_bytes()) == manifest["tokenizer"]["sha256"]
    assert manifest["source"]["repo"] == "willdepueoai/parameter-golf" and manifest["source"]["revision"] == COMMIT
    assert verify.damage(target) == "" and list(target.parent.iterdir()) == [target]
    hub.asked.clear()
    get(out, 1)  # a smaller number takes nothing away
    assert not hub.asked and verify.damage(target) == ""
    get(out, 4)
    assert set(hub.asked) == {f"{SHARDS}/fineweb_train_000003.bin"} and verify.damage(target) == ""
    assert not any(path.is_symlink() for path in out.rglob("*")) and len(visible(out)) == len(EXPECTED) + 1


def test_a_broken_connection_is_taken_up_within_the_file(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # else 10 MB are the smallest progress
    path = f"{SHARDS}/fineweb_train_000001.bin"
    hub.faults[path] = "broken once"
    get(tmp_path)
    assert hub.asked[path] == 2 and hub.ranges == [f"bytes={len(hub.files[path]) // 2 // 1000 * 1000}-"]
    assert visible(tmp_path) == EXPECTED


@pytest.mark.parametrize("path, fault, words", [
    (f"{SHARDS}/fineweb_train_000001.bin", "broken", "goes on where"), (MODEL, "broken", "goes on where"),
    (f"{SHARDS}/fineweb_train_000001.bin", "changed", "SHA-256 or size"), (MODEL, "refused", "403")])
def test_a_fault_is_one_line_leaves_nothing_and_the_next_call_goes_on(path, fault, words, hub, tmp_path):
    hub.faults[path] = fault
    refused_with(f"{path}: .*{words}", tmp_path)
    assert visible(tmp_path) == [] and not list(tmp_path.rglob("*.incomplete"))
    hub.faults.clear()
    arrived = set(hub.asked) - {path}
    hub.asked.clear()
    get(tmp_path)
    assert visible(tmp_path) == EXPECTED and not arrived & set(hub.asked)


def test_a_dataset_that_is_not_what_it_says_is_refused(hub, tmp_path, monkeypatch):
    path = f"{SHARDS}/fineweb_train_000001.bin"
    good = hub.files[path]
    for bad, words in ((good[:-2] + b"\xff\xff", "id 65535 is outside the vocabulary of 512"),
                       (good[:8] + b"\x01" + good[9:], "truncated or damaged")):
        hub.files[path] = bad
        refused_with(words, tmp_path)
    hub.files[path] = good
    monkeypatch.setattr(download, "VAL_DOCUMENTS", 9)
    refused_with("expected 9 documents", tmp_path)


def test_what_cannot_succeed_is_seen_before_anything_is_fetched(hub, tmp_path, monkeypatch, capsys):
    refused_with("--train-shards 5: .* has 4 of fineweb10B_sp1024", tmp_path, 5)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr(download.shutil, "disk_usage", lambda _: usage)
        refused_with("bytes needed, 1,000 free", tmp_path)
    assert "GB for 5 of 5 files; 0.000 GB free" in capsys.readouterr().out
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "fineweb_1024_bpe.model").write_bytes(b"of another dataset")
    refused_with("exists and is another tokenizer", tmp_path)
    hub.files.pop(f"{SHARDS}/fineweb_val_000000.bin")
    refused_with("no tokenizer and shards of fineweb10B_sp1024", tmp_path)
    assert not hub.asked and visible(tmp_path) == ["tokenizers/fineweb_1024_bpe.model"]


def test_the_command_line_honours_the_published_variables(hub, tmp_path, monkeypatch, capsys):
    hub.files = {path.replace("datasets/", "50B/", 1): data for path, data in hub.files.items()}
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "me/mine")
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "50B")
    assert command(capsys, "download", "--variant", "sp1024", "--train-shards", 3, "--out", tmp_path)[0] == 0
    assert visible(tmp_path) == EXPECTED
    assert json.loads((tmp_path / EXPECTED[4]).read_text())["source"]["repo"] == "me/mine"


def test_mistakes_on_the_command_line_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "a b")
    for arguments, words in [("--variant sp1", "invalid choice: 'sp1'"), ("--train-shards 3", "--variant"),
                             ("--variant sp1024 --train-shards 0", "--train-shards: 0: expected 1"),
                             *[(f"--variant {variant}", "a b: ") for variant in download.VARIANTS]]:
        status, _, error = command(capsys, "download", *arguments.split(), "--out", tmp_path)
        assert status == 2 and words in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())
