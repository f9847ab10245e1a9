"""A hub on this machine: as much of its protocol as huggingface_hub needs for uploads without xet."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_a_test"


@dataclass
class Hub:
    """What it holds, what it was asked, and what it refuses."""

    address: str = ""
    repos: dict[str, dict[str, Any]] = field(default_factory=dict)  # by id: private, files (path to content)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    licences: dict[str, str] = field(default_factory=dict)  # of base models
    puts: list[str] = field(default_factory=list)  # SHA-256 of what was sent
    refuse_puts_after: int | None = None
    refuse_commits: int | None = None  # with this status


@contextmanager
def hub() -> Iterator[Hub]:
    held = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": held}))
    held.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/api/models/").removesuffix("/revision/main")
        if name in self.hub.licences:
            self._answer({"id": name, "cardData": {"license": self.hub.licences[name]}})
        elif name in self.hub.repos:
            self._answer({"id": name, "private": self.hub.repos[name]["private"], "sha": "0" * 40})
        else:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_PUT(self) -> None:
        content, digest = self._body(), self.path.rpartition("/")[2]
        if self.hub.refuse_puts_after is not None and len(self.hub.puts) >= self.hub.refuse_puts_after:
            self._answer({"error": "no room"}, 507)
            return
        assert hashlib.sha256(content).hexdigest() == digest
        self.hub.puts.append(digest)
        self.hub.large[digest] = content
        self._answer({})

    def do_POST(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/preupload/main"):
            self._preupload(path.split("/", 3)[3].removesuffix("/preupload/main"), json.loads(body)["files"])
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._where(each) for each in json.loads(body)["objects"]]})
        elif path.endswith("/commit/main"):
            self._commit(path.split("/", 3)[3].removesuffix("/commit/main"), body)
        else:
            self._answer({"error": f"no such address: {path}"}, 404)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        there = name in self.hub.repos
        self.hub.repos.setdefault(name, {"private": wanted["visibility"] == "private", "files": {}})
        self._answer({"url": f"{self.hub.address}/{name}"}, 409 if there else 200)

    def _preupload(self, repo: str, files: list[dict[str, Any]]) -> None:
        answers = []
        for file in files:
            large = file["path"].endswith(".safetensors")
            content = self.hub.repos[repo]["files"].get(file["path"])
            oid = None
            if content is not None:
                blob = b"blob %d\0" % len(content) + content
                oid = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(blob).hexdigest()
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": answers})

    def _where(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.large:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{wanted['oid']}"}}}

    def _commit(self, repo: str, body: bytes) -> None:
        if self.hub.refuse_commits is not None:
            self._answer({"error": "not yours"}, self.hub.refuse_commits)
            return
        new = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                new[value["path"]] = self.hub.large[value["oid"]]
            else:
                assert item["key"] == "header"
        self.hub.repos[repo]["files"].update(new)
        self._answer({"commitUrl": f"{self.hub.address}/{repo}/commit/1", "commitOid": "1" * 40, "hookOutput": ""})
