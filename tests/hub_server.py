"""A small Hub on loopback, enough of it for `huggingface_hub` to push model repositories and pull them again.

It keeps repositories in memory, knows users by their tokens, and speaks the part of the protocol that pushing and
pulling use: who am I, create, preupload, Git LFS, commit, revision, tree and resolve.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".png")


@dataclass
class Repository:
    """One model repository: its files, and which of them are stored by LFS."""

    owner: str
    private: bool = False
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(json.dumps([self.owner, self.commits]).encode()).hexdigest()


class HubServer:
    """Start with `with HubServer({"token": "user"}) as hub:`; `hub.url` is the endpoint."""

    def __init__(self, users: dict[str, str]) -> None:
        self.users = users
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Refusal(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        hub = self.server_hub
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                try:
                    action(self, **match.groupdict())
                except _Refusal as refusal:
                    self._answer(
                        refusal.status,
                        {"error": str(refusal)},
                        {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)},
                    )
                return
        hub.unknown.append(f"{self.command} {path}")
        self._answer(404, {"error": "no such page"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- who may do what --------------------------------------------------------------------------------------------

    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if token and token not in self.server_hub.users:
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        return self.server_hub.users.get(token)

    def _repository(self, name: str, write: bool = False) -> Repository:
        user = self._user()
        found = self.server_hub.repositories.get(name)
        if found is None or (found.private and user != found.owner):
            # like the Hub, which does not tell strangers whether a private repository is there
            raise _Refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and user != found.owner:
            raise _Refusal(403, "", "You are not allowed to write to this repository")
        return found

    # --- pages ------------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise _Refusal(401, "", "Invalid username or password.")
        self._answer(200, {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        user = self._user()
        if user is None:
            raise _Refusal(401, "", "Invalid username or password.")
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or user
        if owner != user:
            raise _Refusal(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{wanted['name']}"
        found = {"url": f"{self.server_hub.url}/{name}", "name": name}
        if name in self.server_hub.repositories:
            self._answer(409, {"error": "You already created this model repo", **found})
            return
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.server_hub.repositories[name] = Repository(owner, private=private, commits=["created"])
        self._answer(200, found)

    def validate_yaml(self) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        self._repository(repo, write=True)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._answer(200, {"files": files, "commitOid": self.server_hub.repositories[repo].sha})

    def lfs_batch(self, repo: str) -> None:
        self._repository(repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            href = f"{self.server_hub.url}/lfs/{wanted['oid']}"
            actions = {} if wanted["oid"] in self.server_hub.objects else {"actions": {"upload": {"href": href}}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **actions})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, "", "the content is not what its name says")
        self.server_hub.objects[oid] = self.body
        self._answer(200, {})

    def commit(self, repo: str, revision: str) -> None:
        found = self._repository(repo, write=True)
        files = dict(found.files)
        summary = ""
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server_hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        found.files = files
        found.commits.append(summary + hashlib.sha1(self.body).hexdigest())
        url = f"{self.server_hub.url}/{repo}/commit/{found.sha}"
        self._answer(200, {"success": True, "commitOid": found.sha, "commitUrl": url, "hookOutput": ""})

    def info(self, repo: str, revision: str = "main") -> None:
        found = self._revision(repo, revision)
        self._answer(
            200,
            {
                "id": repo,
                "modelId": repo,
                "sha": found.sha,
                "private": found.private,
                "siblings": [{"rfilename": path} for path in sorted(found.files)],
                "tags": [],
                "downloads": 0,
                "likes": 0,
            },
        )

    def tree(self, repo: str, revision: str, folder: str | None) -> None:
        found = self._revision(repo, revision)
        self._answer(
            200,
            [
                {"type": "file", "path": path, **self._identity(path, data)}
                for path, data in sorted(found.files.items())
                if path.startswith(folder or "")
            ],
        )

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._revision(repo, revision)
        if found.gated:
            raise _Refusal(403, "GatedRepo", f"Access to model {repo} is restricted")
        data = found.files.get(path)
        if data is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        identity = self._identity(path, data)
        headers = {"X-Repo-Commit": found.sha, "ETag": f'"{identity["oid"]}"', "Accept-Ranges": "none"}
        if "lfs" in identity:
            headers |= {"X-Linked-Etag": f'"{identity["lfs"]["oid"]}"', "X-Linked-Size": str(len(data))}
        self._answer(200, data, {"Content-Type": "application/octet-stream", **headers})

    def _revision(self, repo: str, revision: str) -> Repository:
        found = self._repository(repo)
        if revision not in ("main", found.sha):
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    @staticmethod
    def _identity(path: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found: dict[str, Any] = {"oid": blob, "size": len(data)}
        if path.endswith(LFS_SUFFIXES):
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return found


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.lfs_upload),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    ("GET", rf"/api/models/{_REPO}/revision/{_REVISION}", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}(/(?P<folder>.+))?", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("GET HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
