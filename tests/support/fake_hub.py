"""The part of the Hub's HTTP interface that publishing and downloading need, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml
from huggingface_hub.utils import validate_repo_id

TOKEN = "hf_of_a_test"


@dataclass
class FakeHub:
    """Repositories by name, each a mapping from file to content."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    broken: str = ""
    """Paths that contain it answer with 500."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded by its SHA-256, and is in no commit yet."""


def card_problem(content: str) -> str | None:
    """Say what the Hub would refuse in a card's metadata."""
    front = yaml.safe_load(content.split("---\n")[1])
    if "base_model" in front:
        names = front["base_model"]
        names = names if isinstance(names, list) else [names]
        if not names:
            return '"base_model" does not contain any value'
        for name in names:
            validate_repo_id(name)
    for key in ("tags", "datasets"):
        if not all(isinstance(one, str) for one in front.get(key, [])):
            return f'"{key}" must be an array of strings'
    for name in front.get("datasets", []):
        validate_repo_id(name)
    licence = front.get("license", "apache-2.0")
    if licence not in ("apache-2.0", "mit", "other", "llama3.2"):
        return f'"license" must be one of …, not {licence}'
    return None


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def refused(self) -> bool:
        """Answer what is asked without a token, or of what is broken."""
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.hub.broken and self.hub.broken in self.path:
            self.body()
            self.answer(500, b"out of order")
            return True
        if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
            self.body()
            self.answer(401, b"no", X_Error_Message="Invalid token")
            return True
        return False

    def do_HEAD(self) -> None:
        self.do_GET()

    def send_file(self) -> None:
        """Answer with a file of ``/org/name/resolve/revision/file``, or the part asked for."""
        organization, name, _, _, file = self.path.split("?")[0].split("/", 5)[1:]
        content = self.hub.repositories.get(f"{organization}/{name}", {}).get(file)
        if content is None:
            self.answer(404, b"absent", X_Error_Code="EntryNotFound")
            return
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked:
            content = content[int(asked[1]) : int(asked[2]) + 1]
        self.answer(206 if asked else 200, content, ETag=tag, X_Repo_Commit="0" * 40)

    def do_GET(self) -> None:
        if self.refused():
            return
        if "/resolve/" in self.path:
            self.send_file()
            return
        name = "/".join(self.path.split("?")[0].split("/")[3:5])
        files = self.hub.repositories.get(name)
        if files is None:
            self.answer(404, b"absent", X_Error_Code="RepoNotFound")
        elif "/tree/" in self.path:
            found = [
                {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                for path, content in files.items()
            ]
            self.answer(200, json.dumps(found).encode())
        else:
            siblings = [{"rfilename": path} for path in files]
            self.answer(200, {"id": name, "sha": "0" * 40, "siblings": siblings, "tags": []})

    def do_PUT(self) -> None:
        content = self.body()
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self.answer(200)

    def do_POST(self) -> None:
        if self.refused():
            return
        content, path = self.body(), self.path.split("?")[0]
        if path == "/api/validate-yaml":
            problem = card_problem(json.loads(content)["content"])
            self.answer(400 if problem else 200, (problem or "{}").encode())
        elif path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.repositories.setdefault(name, {".gitattributes": b""})
            # Clients have called it both.
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.private.setdefault(name, bool(private))
            self.answer(200, {"url": f"{self.hub.address}/{name}"})
        elif "/preupload/" in path:
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(content)["files"]
            ]
            self.answer(200, {"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(content)["objects"]
            upload = f"{self.hub.address}/lfs"
            objects = [
                {**one, "actions": {"upload": {"href": upload, "header": {}}}} for one in wanted
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self.commit("/".join(path.split("/")[3:5]), content)
        else:
            self.answer(404, b"what?")

    def commit(self, name: str, content: bytes) -> None:
        files = self.hub.repositories[name]
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        self.answer(
            200,
            {"commitUrl": f"{self.hub.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40},
        )


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Run one for a while."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
