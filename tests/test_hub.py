"""A hub id, against a hub of one model on this machine: the real client, real downloads, a cache that is used again."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from looplm import LoopedConfig
from looplm.checkpoints import load_checkpoint, save_pretrained
from looplm.model import LoopedTransformer

COMMIT = "0" * 39 + "1"


class _Hub(http.server.BaseHTTPRequestHandler):
    """The two questions a client asks: which files a repository has, and for one of them."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        files = sorted(self.folder.iterdir())
        if self.path.startswith("/api/models/owner/tiny/tree/"):
            entries = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": ""} for path in files]
            content, tag = json.dumps(entries).encode(), "tree"
        elif self.path.startswith("/api/models/owner/tiny"):
            names = [{"rfilename": path.name} for path in files]
            content = json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": names, "tags": []}).encode()
            tag = "list"
        elif self.path.startswith("/owner/tiny/resolve/"):
            content = (self.folder / self.path.rsplit("/", 1)[1]).read_bytes()
            tag = hashlib.sha1(content).hexdigest()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{tag}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, LoopedTransformer, list[str]]]:
    folder = tmp_path / "tiny"
    model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=8, num_heads=2, ffn_width=8))
    save_pretrained(model, folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that must not even be fetched")
    handler = type("Hub", (_Hub,), {"folder": folder, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", model, handler.asked
        server.shutdown()
        thread.join()


def _import(name: str, output: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    home = output.parent / "home"
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment = {name: value for name, value in environment.items() if "proxy" not in name.lower()}
    command = [sys.executable, "-m", "looplm", "import", name, str(output)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_hub_id_is_fetched_once_and_never_a_pickle(hub: tuple[str, LoopedTransformer, list[str]], tmp_path) -> None:
    endpoint, model, asked = hub
    done = _import("owner/tiny", tmp_path / "model.ckpt", endpoint)
    assert done.returncode == 0, done.stderr
    loaded = load_checkpoint(tmp_path / "model.ckpt").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    assert any("model.safetensors" in line for line in asked)
    assert not any("pytorch_model.bin" in line for line in asked)
    del asked[:]
    assert _import("owner/tiny", tmp_path / "again.ckpt", endpoint).returncode == 0
    assert not any(line.startswith("GET") and "resolve" in line for line in asked)  # the weights are in the cache


def test_an_unknown_id_is_one_line(hub: tuple[str, LoopedTransformer, list[str]], tmp_path) -> None:
    done = _import("owner/other", tmp_path / "model.ckpt", hub[0])
    assert done.returncode == 2
    assert "owner/other" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "model.ckpt").exists()
