"""Recipes and artifacts on the Hub: over HTTP, to a hub that runs in this process."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants

import foveate
from foveate.core.artifact import Artifact, Fingerprint
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from tests.suite.bodies import BODIES, ONE

COMMIT = "0" * 40
NUMBERS = Artifact(
    "alvts",
    Fingerprint("llava", 4, 48, 64, {"layers.0": (0.5,)}),
    {"order": [1, 0], "gates": torch.arange(3.0)},
    {"steps": 2},
)


class Hub(ThreadingHTTPServer):
    """As much of the Hub as files of a few kilobytes need.

    Attributes:
        repos: content by path, by repository.
        address: where it listens.
        commits: how many were made.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits = 0
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        files = self.server.repos.get(found[1]) if found else None
        if found is None or files is None:
            return self._say(404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"})
        if found[2] not in files:
            return self._say(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        content = files[found[2]]
        self._say(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self._say(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            there = repo in self.server.repos
            self.server.repos.setdefault(repo, {})
            return self._say(409 if there else 200, {"url": f"{self.server.address}/{repo}"})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path)
        assert found is not None, self.path
        if found[2] == "preupload":
            asked = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            return self._say(200, {"files": asked})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repos[found[1]][line["value"]["path"]] = content
        self.server.commits += 1
        self._say(
            200, {"commitUrl": f"{self.server.address}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""}
        )

    def _say(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quietly."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.file_download, "HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    yield server
    server.shutdown()
    server.server_close()


def test_a_recipe_comes_back_from_the_hub(hub: Hub) -> None:
    recipe = Recipe.parse("hiprune(keep=64) + shortv(layers=(1, 2))")

    assert recipe.push_to_hub("someone/quick").endswith(COMMIT)
    assert Recipe.from_hub("someone/quick") == Recipe.of("someone/quick") == recipe
    assert hub.repos["someone/quick"]["recipe.yaml"].decode() == recipe.to_yaml()


def test_a_card_says_how_to_use_it_and_is_left_alone_where_there_is_one(hub: Hub) -> None:
    Recipe.parse("fastv").push_to_hub("someone/quick")
    card = ModelCard(hub.repos["someone/quick"]["README.md"].decode())
    assert card.data.library_name == "foveate"
    assert 'foveate.attach(model, "someone/quick")' in card.text

    hub.repos["someone/quick"]["README.md"] = b"mine"
    Recipe.parse("scope").push_to_hub("someone/quick")
    assert hub.repos["someone/quick"]["README.md"] == b"mine"
    assert hub.commits == 2


def test_attach_takes_a_recipe_of_the_hub(hub: Hub) -> None:
    Recipe.parse("hiprune(keep=5)").push_to_hub("someone/quick")
    body = BODIES["llava-clip"]
    model = body.model()
    with foveate.attach(model, "someone/quick") as session:
        model(**body.inputs(ONE))
    assert session.report.visual_tokens[0] == 5


@pytest.mark.parametrize("tensors", [True, False])
def test_numbers_come_back_from_the_hub(hub: Hub, tensors: bool) -> None:
    numbers = NUMBERS if tensors else Artifact("shortv", NUMBERS.fingerprint, {"order": [1, 0]})
    numbers.push_to_hub("someone/checkpoint")
    found = Artifact.from_hub("someone/checkpoint", numbers.method)

    assert (found.method, found.fingerprint, found.parameters) == (numbers.method, numbers.fingerprint, numbers.parameters)
    assert found.fingerprint.weights == numbers.fingerprint.weights
    assert found.numbers["order"] == [1, 0]
    assert not tensors or torch.equal(found.numbers["gates"], torch.arange(3.0))
    assert len(hub.repos["someone/checkpoint"]) == (3 if tensors else 2)


def test_files_beside_numbers_come_back_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    block = tmp_path / "block-00.safetensors"
    block.write_bytes(b"what stands for weights")
    numbers = Artifact("rtn", NUMBERS.fingerprint, {"blocks": 1}, files={block.name: block})
    numbers.push_to_hub("someone/checkpoint")
    found = Artifact.from_hub("someone/checkpoint", "rtn")

    assert found.files[block.name] != block
    assert found.files[block.name].read_bytes() == block.read_bytes()
    assert "foveate/rtn/block-00.safetensors" in hub.repos["someone/checkpoint"]


def test_what_is_not_there_is_named_in_one_line(hub: Hub) -> None:
    hub.repos["someone/empty"] = {}
    for ask in (
        lambda: Recipe.of("someone/nothing"),
        lambda: Recipe.from_hub("someone/empty"),
        lambda: Artifact.from_hub("someone/empty", "alvts"),
    ):
        with pytest.raises(FoveateError, match=r"^Hub 'someone/\w+': .* cannot be fetched \(.*\); check the name") as error:
            ask()
        assert "\n" not in str(error.value)


def test_a_recipe_of_the_hub_that_is_none_is_refused(hub: Hub) -> None:
    hub.repos["someone/odd"] = {"recipe.yaml": b"fastv: 3"}
    with pytest.raises(FoveateError, match="YAML must be a list"):
        Recipe.from_hub("someone/odd")


def test_without_a_connection_both_ways_say_so() -> None:
    with pytest.raises(FoveateError, match=r"Hub 'someone/quick': recipe.yaml cannot be fetched"):
        Recipe.of("someone/quick")
    with pytest.raises(FoveateError, match=r"Hub 'someone/quick': cannot be written to"):
        Recipe.parse("fastv").push_to_hub("someone/quick")
