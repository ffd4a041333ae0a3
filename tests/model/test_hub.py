"""Downloads with the real huggingface_hub against a small server that speaks the Hub's protocol, here on loopback."""

import functools
import logging
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from csm_core.errors import CheckpointError, CorruptFileError, GatedRepoError, MissingFileError
from csm_core.model import hub
from csm_core.model.checkpoint import find_checkpoint, load_codec_state, load_model
from csm_core.model.hub import Repo
from tests.model import published

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "f" * 40
JUNK = ["ckpt.pt", "README.md", "prompts/conversational_a.wav", "tokenizer_config.json"]


class FakeHub(ThreadingHTTPServer):
    """``repos``: id -> {path: bytes}; ``refused``: id -> (status, error code) for everybody. ``sent`` are the GETs.

    ``main`` is a commit, and becomes LATER once the file ``moves_after`` was sent.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.refused, self.sent = {}, {}, []
        self.main, self.moves_after = COMMIT, None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(with_body=True)

    def do_HEAD(self):
        self.answer(with_body=False)

    def answer(self, with_body):
        repo, revision, path = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path).groups()
        files = self.server.repos.get(repo)
        if repo in self.server.refused:
            return self.refuse(*self.server.refused[repo])
        if files is None:
            return self.refuse(404, "RepoNotFound")
        if revision not in ("main", COMMIT, *hub.REVISIONS.values()):
            return self.refuse(404, "RevisionNotFound")
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        body = files[path]
        if with_body:
            self.server.sent.append((repo, path))
        self.send_response(200)
        self.send_header("ETag", f'"{hash(body):x}"')
        self.send_header("X-Repo-Commit", self.server.main if revision == "main" else revision)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)
            if path == self.server.moves_after:
                self.server.main = LATER
        return None

    def refuse(self, status, code):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub of our own; the cache is empty and nobody is logged in."""
    running = FakeHub()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    download = functools.partial(
        huggingface_hub.hf_hub_download, endpoint=running.url, cache_dir=tmp_path / "cache", token=False
    )
    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def model():
    return published.csm()


@pytest.fixture(scope="module")
def transformers_files(tmp_path_factory, model):
    """As in sesame/csm-1b: both layouts and much that nobody needs."""
    folder = tmp_path_factory.mktemp("transformers")
    published.write_transformers(folder, model)
    return {**contents(folder), "model.safetensors": b"original names", **dict.fromkeys(JUNK, b"junk")}


def test_only_the_needed_files_are_downloaded_and_then_none(server, transformers_files):
    server.repos["sesame/csm-1b"] = transformers_files
    found = find_checkpoint("sesame/csm-1b")
    shards = {name for name in transformers_files if name.startswith("transformers-")}
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "transformers.safetensors.index.json", *shards}
    assert {path for _, path in server.sent} == wanted
    assert len(server.sent) == len(wanted)
    assert (found.name, found.layout) == ("sesame/csm-1b", "transformers")
    load_model(found, "cpu", torch.float32)
    server.refused["sesame/csm-1b"] = (503, "")
    assert find_checkpoint("sesame/csm-1b").directory == found.directory  # pinned and cached: nobody is asked
    assert len(server.sent) == len(wanted)


def test_gated_repository_says_what_to_do(server, transformers_files):
    server.refused["sesame/csm-1b"] = (401, "GatedRepo")
    with pytest.raises(GatedRepoError, match=r"https://huggingface.co/sesame/csm-1b .*HF_TOKEN.*unsloth/csm-1b"):
        find_checkpoint("sesame/csm-1b")
    server.refused["someone/private"] = (403, "")  # a fine-grained token without the right
    with pytest.raises(GatedRepoError, match="fine-grained") as caught:
        find_checkpoint("someone/private")
    assert "unsloth" not in str(caught.value)


@pytest.mark.parametrize("model_name", ["csm-1b", "auto"])
def test_mirror_when_the_gate_is_closed(server, transformers_files, model_name, caplog):
    server.refused["sesame/csm-1b"] = (401, "GatedRepo")
    server.repos["unsloth/csm-1b"] = transformers_files
    with caplog.at_level(logging.INFO, "csm_core"):
        assert find_checkpoint(model_name, device="cuda:0").name == "unsloth/csm-1b"
    assert [record.message[:27] for record in caplog.records if "checkpoint" in record.name] == [
        "model unsloth/csm-1b, becau"
    ]
    server.refused.clear()
    server.repos["sesame/csm-1b"] = transformers_files
    assert find_checkpoint(model_name, device="cuda:0").name == "sesame/csm-1b"


def test_what_is_not_pinned_says_its_commit_and_can_be_held_there(server, transformers_files, caplog):
    server.repos["unsloth/csm-1b"] = server.repos["sesame/csm-1b"] = transformers_files
    with caplog.at_level(logging.INFO, "csm_core.model.hub"):
        found = find_checkpoint("unsloth/csm-1b")
        assert caplog.messages == [f"unsloth/csm-1b follows main, now {COMMIT}; unsloth/csm-1b@{COMMIT} stays there"]
        caplog.clear()
        assert find_checkpoint(f"unsloth/csm-1b@{COMMIT}").directory == found.directory
        find_checkpoint("sesame/csm-1b")
        assert caplog.messages == []


def test_all_files_are_of_one_commit(server, transformers_files):
    server.repos["unsloth/csm-1b"], server.moves_after = transformers_files, "config.json"
    found = find_checkpoint("unsloth/csm-1b")
    assert server.main == LATER
    assert {file.parent.name for file in (found.tokenizer_file, *found.lm_files.values())} == {COMMIT}


def test_auto_without_cuda_asks_nobody(server, caplog):
    with caplog.at_level(logging.INFO, "csm_core"):
        try:
            assert find_checkpoint("auto", device="cpu").directory.name == "bundled"
        except MissingFileError as error:  # while the voice is not yet trained
            assert "bundled" in str(error)
    assert caplog.records[0].message == "model bundled, because the device is cpu"
    assert server.sent == []


def test_original_layout_fetches_mimi_when_the_codec_is_needed(
    server, model, tiny_codec_state, tiny_codec_config, tmp_path
):
    published.write_original(tmp_path / "made", model)
    save_file(tiny_codec_state, tmp_path / "mimi")
    server.repos["someone/csm"] = contents(tmp_path / "made")
    server.repos[hub.MIMI_REPO.id] = {hub.MIMI_FILE: (tmp_path / "mimi").read_bytes(), "model.safetensors": b"moshi"}
    found = find_checkpoint(f"someone/csm@{COMMIT}")
    load_model(found, "cpu", torch.float32)
    assert found.layout == "original"
    assert {repo for repo, _ in server.sent} == {"someone/csm"}
    assert load_codec_state(found).keys() == tiny_codec_state.keys()
    assert server.sent[-1] == (hub.MIMI_REPO.id, hub.MIMI_FILE)


def test_what_is_not_there(server, transformers_files):
    with pytest.raises(MissingFileError, match="no model repository nobody/nothing"):
        find_checkpoint("nobody/nothing")
    server.repos["someone/csm"] = {name: b for name, b in transformers_files.items() if name != "tokenizer.json"}
    with pytest.raises(MissingFileError, match=f"someone/csm has no file tokenizer.json at revision {COMMIT}"):
        find_checkpoint("someone/csm")
    with pytest.raises(MissingFileError, match="no revision v9"):
        find_checkpoint("someone/csm@v9")
    with pytest.raises(MissingFileError, match="not the name of a repository"):
        find_checkpoint("someone/a..b")


def test_hub_out_of_reach(server, transformers_files, monkeypatch):
    server.repos["unsloth/csm-1b"] = transformers_files
    found = find_checkpoint("unsloth/csm-1b")
    server.shutdown()
    server.server_close()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub tries again, for 23 s
    with pytest.raises(MissingFileError, match="cannot be reached"):
        find_checkpoint("someone/csm")
    assert find_checkpoint("csm-1b").directory == found.directory  # neither is asked for, one is cached


def test_damaged_file_in_the_cache_is_downloaded_again(server, transformers_files):
    server.repos["sesame/csm-1b"] = transformers_files
    found = find_checkpoint("sesame/csm-1b")
    shard = next(iter(found.lm_files.values()))
    shard.resolve().write_bytes(shard.read_bytes()[:-1])
    server.sent.clear()
    load_model(find_checkpoint("sesame/csm-1b"), "cpu", torch.float32)
    assert server.sent == [("sesame/csm-1b", shard.name)]


def test_file_that_is_damaged_at_its_source(server, transformers_files):
    shard = next(name for name in transformers_files if name.startswith("transformers-"))
    server.repos["someone/csm"] = {**transformers_files, shard: transformers_files[shard][:-1]}
    with pytest.raises(CorruptFileError, match=shard):
        find_checkpoint("someone/csm")


def test_hf_transfer_that_is_not_installed(server, transformers_files, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ENABLE_HF_TRANSFER", True, raising=False)  # huggingface_hub 1 has it not
    monkeypatch.setitem(sys.modules, "hf_transfer", None)
    server.repos["someone/csm"] = transformers_files
    with pytest.raises(CheckpointError, match="pip install hf-transfer"):
        find_checkpoint("someone/csm")


def test_names_of_repositories():
    assert Repo.parse("sesame/csm-1b") == Repo("sesame/csm-1b", hub.REVISIONS["sesame/csm-1b"])
    assert Repo.parse("sesame/csm-1b@main") == Repo("sesame/csm-1b", "main")
    assert Repo.parse("some.one/a_b") == Repo("some.one/a_b", "main")
    for text in ("csm", "a/b/c", "../a", "./a", "a/b@", "/a/b", "~/a", "a/b c"):
        assert Repo.parse(text) is None
    assert all(re.fullmatch("[0-9a-f]{40}", revision) for revision in hub.REVISIONS.values())
