"""data/download.py: what arrives is verified, faults are one line, nothing unfinished has a final name.

Through the real client library, against a server in this process that speaks the hub's protocol.
"""
import hashlib
import json
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_shard

import train_gpt as tg
from data import download, prepare, verify
from test_prepare import command
from tools.common import ToolError

NAME, COMMIT = "fineweb10B_sp1024", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """A dataset repository of files by path, with faults by path; counts what it is asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.faults, self.asked, self.ranges = files, {}, Counter(), []
        self.sums = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


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

    def do_POST(self) -> None:
        """Sizes and SHA-256 of paths."""
        from urllib.parse import parse_qs
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        files = self.server.files
        self.reply(200, json.dumps([
            {"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40,
             "lfs": {"oid": self.server.sums[path], "size": len(files[path]), "pointerSize": 134}}
            for path in form["paths"] if path in files]).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path.startswith("/api/datasets/"):
            return self.reply(200, json.dumps({"id": "some/repo", "sha": COMMIT, "siblings": []}).encode(),
                              Content_Type="application/json")
        path = self.path.split(f"/resolve/{COMMIT}/")[-1]
        if path not in self.server.files:
            return self.reply(404, b"Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        data, fault = self.server.files[path], self.server.faults.get(path)
        headers = {"ETag": f'"{self.server.sums[path]}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if self.command == "GET":
            self.server.asked[path] += 1
            if wanted := self.headers.get("Range"):
                self.server.ranges.append(wanted)
                start, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if fault:
                return fault(self, data[start:], headers)
        self.reply(status, data[start:], **headers)


def broken_once(answer: Answer, data: bytes, headers: dict[str, str]) -> None:
    """Half of the file, then the connection ends; the next request is answered well."""
    answer.server.faults.clear()
    broken(answer, data, headers)


def broken(answer: Answer, data: bytes, headers: dict[str, str]) -> None:
    answer.send_response(200)
    for name, value in {**headers, "Content-Length": str(len(data))}.items():
        answer.send_header(name, value)
    answer.end_headers()
    answer.wfile.write(data[:len(data) // 2])
    answer.close_connection = True


def short(answer: Answer, data: bytes, headers: dict[str, str]) -> None:
    """A whole answer that is not the whole file."""
    answer.reply(200, data[:-10], **headers)


def changed(answer: Answer, data: bytes, headers: dict[str, str]) -> None:
    answer.reply(200, data[:-2] + b"\x05\x00", **headers)


def refused(answer: Answer, data: bytes, headers: dict[str, str]) -> None:
    answer.reply(403, b"Forbidden")


def gone(answer: Answer, data: bytes, headers: dict[str, str]) -> None:
    answer.reply(404, b"Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)


def export(dataset: dict[str, str], folder: Path, train: int = 4) -> dict[str, bytes]:
    """The files of an export: a manifest, `train` training shards, a validation shard, the tokenizer."""
    for i in range(train):
        write_shard(folder / f"train_{i}", np.array([tg.BOS_ID, 300 + i] + [301 + i] * (50_000 + i)))
    files = {f"datasets/datasets/{NAME}/fineweb_train_{i:06d}.bin": (folder / f"train_{i}").read_bytes()
             for i in range(train)}
    files[f"datasets/datasets/{NAME}/fineweb_val_000000.bin"] = (
        Path(dataset["data_path"]) / "fineweb_val_000000.bin").read_bytes()
    files["datasets/tokenizers/fineweb_1024_bpe.model"] = Path(dataset["tokenizer_path"]).read_bytes()
    files["datasets/manifest.json"] = json.dumps({
        "datasets": [{"name": NAME, "tokenizer_name": "sp", "stats": {"files_train": train, "files_val": 1,
                                                                      "docs_val": 8}}],
        "tokenizers": [{"name": "sp", "model_path": "tokenizers/fineweb_1024_bpe.model"}]}).encode()
    return files


@pytest.fixture
def hub(dataset, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    with Hub(export(dataset, tmp_path_factory.mktemp("made"))) as server:
        yield server
        server.shutdown()


def get(hub: Hub, out: Path, train_shards: int = 3, **options: object) -> str:
    return download.download("sp1024", train_shards, out, endpoint=hub.url, **options)


def visible(out: Path) -> list[str]:
    """Files below `out` that are not in a hidden folder."""
    found = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


EXPECTED = [f"datasets/{NAME}/fineweb_train_{i:06d}.bin" for i in range(3)] + [
    f"datasets/{NAME}/fineweb_val_000000.bin", f"datasets/{NAME}/manifest.json", f"datasets/{NAME}/verified.json",
    "tokenizers/fineweb_1024_bpe.model"]


def test_a_download_is_a_verified_dataset_with_its_tokenizer(hub, tmp_path):
    said = get(hub, tmp_path / "out")
    assert "8 documents" in said and visible(tmp_path / "out") == EXPECTED
    target = tmp_path / "out" / "datasets" / NAME
    for path in target.glob("*.bin"):
        assert path.read_bytes() == hub.files[f"datasets/datasets/{NAME}/{path.name}"]
    manifest = json.loads((target / "manifest.json").read_text())
    model = target / manifest["tokenizer"]["path"]
    assert hashlib.sha256(model.read_bytes()).hexdigest() == manifest["tokenizer"]["sha256"]
    assert manifest["source"] == {"kind": "hub", "repo": "willdepueoai/parameter-golf", "revision": COMMIT,
                                  "prefix": "datasets"}
    assert not [row for row in verify.verify(target)[0] if row.problem]
    assert [p.name for p in (tmp_path / "out" / "datasets").iterdir()] == [NAME]


def test_a_second_call_fetches_nothing_and_more_shards_are_added(hub, tmp_path):
    get(hub, tmp_path)
    hub.asked.clear()
    get(hub, tmp_path, 1)  # a smaller number takes nothing away
    assert set(hub.asked) == {"datasets/manifest.json"}
    assert not [row for row in verify.verify(tmp_path / "datasets" / NAME)[0] if row.problem]
    get(hub, tmp_path, 4)
    assert set(hub.asked) - {"datasets/manifest.json"} == {f"datasets/datasets/{NAME}/fineweb_train_000003.bin"}
    assert not [row for row in verify.verify(tmp_path / "datasets" / NAME)[0] if row.problem]


def test_a_broken_connection_is_taken_up_within_the_file(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # else 10 MB are the smallest progress
    path = f"datasets/datasets/{NAME}/fineweb_train_000001.bin"
    hub.faults[path] = broken_once
    get(hub, tmp_path)
    assert hub.asked[path] == 2 and hub.ranges == [f"bytes={len(hub.files[path]) // 2 // 1000 * 1000}-"]
    assert visible(tmp_path) == EXPECTED


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault, words", [
    (broken, "goes on where this stopped"),
    (short, "goes on where this stopped"),
    (changed, "SHA-256 or size"),
    (refused, "the hub answers 403"),
    (gone, "the hub answers 404"),
    (full, "No space left on device"),
])
@pytest.mark.parametrize("file", [f"datasets/{NAME}/fineweb_train_000001.bin", "tokenizers/fineweb_1024_bpe.model"])
def test_a_fault_is_one_line_leaves_nothing_and_the_next_call_goes_on(fault, words, file, hub, tmp_path, monkeypatch):
    path = f"datasets/{file}"
    with monkeypatch.context() as patch:
        if fault is full:
            patch.setattr("huggingface_hub.file_download.http_get", full)
            path = ""
        hub.faults[path] = fault
        with pytest.raises((ToolError, tg.UserError)) as error:
            get(hub, tmp_path, workers=1)
    message = str(error.value)
    assert words in message and "\n" not in message and (path in message or fault is full)
    assert visible(tmp_path) == []
    assert not list(tmp_path.rglob("*.incomplete"))
    hub.faults.clear()
    had = {p for p, n in hub.asked.items() if n and p != path and p != "datasets/manifest.json"}
    hub.asked.clear()
    get(hub, tmp_path)
    assert visible(tmp_path) == EXPECTED
    assert not had & set(hub.asked)  # what had arrived is not fetched again


def test_a_shard_of_another_tokenizer_and_a_header_that_lies_are_refused(hub, tmp_path):
    path = f"datasets/datasets/{NAME}/fineweb_train_000001.bin"
    good = hub.files[path]
    for bad, words in ((good[:-2] + b"\xff\xff", "id 65535 is outside the vocabulary of 512"),
                       (good[:8] + b"\x01" + good[9:], "truncated or damaged"),
                       (good[:-2], "truncated or damaged")):
        hub.files[path], hub.sums[path] = bad, hashlib.sha256(bad).hexdigest()
        with pytest.raises((ToolError, tg.UserError), match=words):
            get(hub, tmp_path / words[:4])
        assert visible(tmp_path / words[:4]) == []


def test_no_room_is_seen_before_anything_is_fetched(hub, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises((ToolError, tg.UserError), match="bytes needed, 1,000 free"):
        get(hub, tmp_path)
    assert set(hub.asked) == {"datasets/manifest.json"} and visible(tmp_path) == []
    assert "GB for 5 of 5 files; 0.000 GB free" in capsys.readouterr().out


@pytest.mark.parametrize("change, words", [
    (lambda h: h.files.pop("datasets/manifest.json"), "manifest.json: the hub answers 404"),
    (lambda h: h.files.update({"datasets/manifest.json": b"[]"}), "not an export's manifest"),
    (lambda h: h.files.update({"datasets/manifest.json": b"not JSON"}), "not an export's manifest"),
    (lambda h: h.files.pop(f"datasets/datasets/{NAME}/fineweb_train_000002.bin"), "has no datasets/datasets"),
    (lambda h: h.files.update({"datasets/manifest.json": h.files["datasets/manifest.json"].replace(b"8}", b"9}")}),
     "the manifest says 9 documents"),
])
def test_an_export_that_is_not_what_it_says_is_refused(change: Callable, words, hub, tmp_path):
    change(hub)
    with pytest.raises((ToolError, tg.UserError), match=words) as error:
        get(hub, tmp_path)
    assert "\n" not in str(error.value) and visible(tmp_path) == []


def test_another_tokenizer_of_that_name_is_not_replaced(hub, tmp_path):
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "fineweb_1024_bpe.model").write_bytes(b"of another dataset")
    with pytest.raises((ToolError, tg.UserError), match="exists and is another tokenizer"):
        get(hub, tmp_path)
    assert visible(tmp_path) == ["tokenizers/fineweb_1024_bpe.model"]


def test_the_command_line_honours_the_published_variables(hub, tmp_path, monkeypatch, capsys):
    """Repository, prefix and HF_ENDPOINT, which the client reads when it is loaded."""
    import subprocess
    for name in [p for p in hub.files if p.startswith("datasets/")]:
        new = name.replace("datasets/", "50B/", 1)
        hub.files[new], hub.sums[new] = hub.files.pop(name), hub.sums[name]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "MATCHED_FINEWEB_REPO_ID": "me/mine",
           "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": "50B"}
    command = [sys.executable, "-m", "data.prepare", "download", "--variant", "sp1024", "--train-shards", "3"]
    done = subprocess.run([*command, "--out", tmp_path], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert visible(tmp_path / "datasets") == [p.removeprefix("datasets/") for p in EXPECTED[:-1]]
    assert json.loads((tmp_path / EXPECTED[4]).read_text())["source"]["repo"] == "me/mine"


def test_the_command_line_names_every_variant():
    parse = prepare.parser().parse_args
    for variant in download.VARIANTS:
        assert parse(["download", "--variant", variant]).variant == variant


@pytest.mark.parametrize("arguments, words", [
    ("--variant sp1", "invalid choice: 'sp1'"), ("--train-shards 3", "--variant"),
    ("--variant sp1024 --train-shards 0", "--train-shards: 0: expected 1 or more"),
])
def test_mistakes_on_the_command_line_are_one_line(arguments, words, tmp_path, capsys):
    status, _, error = command(capsys, "download", *arguments.split(), "--out", tmp_path)
    assert status == 2
    assert words in error and error.count("\n") == 1


def test_too_many_shards_are_refused_with_the_number_there_is(hub, tmp_path):
    with pytest.raises((ToolError, tg.UserError), match="--train-shards 5: .* has 4 of fineweb10B_sp1024"):
        get(hub, tmp_path, 5)


@pytest.mark.parametrize("name", ["a/b/c", "a b", "--x", "me/mine.git"])
def test_a_name_that_is_none_of_a_repository_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", name)
    status, _, error = command(capsys, "download", "--variant", "sp1024", "--out", tmp_path)
    assert status == 2
    assert f"{name}: " in error and "MATCHED_FINEWEB_REPO_ID is such as" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
