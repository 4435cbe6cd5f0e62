"""A stand-in for the model hub on this machine: what `jaxsp push` and `hf://` ask of it, and no more."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_aSecretOfTheTests"
SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Repository:
    private: bool = True
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)


class Server(http.server.ThreadingHTTPServer):
    """Repositories by their names, and the requests so far."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.refused: dict[str, int] = {}
        """Status with which requests whose path has this part are refused."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Any

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def go(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        knows = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        for part, status in self.server.refused.items():
            if part in path:
                return self.answer({"error": "no"}, status)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.command == "POST" and not knows:
            return self.answer(
                {"error": "no"}, 401, X_Error_Message="Invalid credentials in Authorization header"
            )
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("visibility", "private" if asked.get("private") else "public") == "private"
            self.server.repositories[name] = Repository(private)
            return self.answer({"url": f"{self.server.url}/{name}"})
        found = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(/.*)?", path)
        repository = self.server.repositories.get(found[1]) if found else None
        if found is None or repository is None or (repository.private and not knows):
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return self.of_repository(found[1], repository, found[2] or "", body)

    def of_repository(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        if rest == "/preupload/main":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self.answer({"files": modes})
        if rest == "/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del repository.files[value["path"]]
            return self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{SHA}", "commitOid": SHA})
        if rest in ("", "/revision/main"):
            siblings = [{"rfilename": file} for file in repository.files]
            about = {"id": name, "sha": SHA, "private": repository.private, "siblings": siblings}
            return self.answer(about)
        if rest.startswith("/tree/"):
            return self.answer(
                [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in repository.files.items()
                ]
            )
        data = repository.files.get(rest.removeprefix(f"/resolve/{SHA}/"))
        if data is None:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        return self.answer(data, X_Repo_Commit=SHA, ETag=f'"{hashlib.sha1(data).hexdigest()}"')

    do_GET = do_HEAD = do_POST = go

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A stand-in that is running."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
