"""A Hub on loopback: the part of the Hugging Face Hub's HTTP interface that downloads, uploads and loading need.

    with HubServer() as hub:
        hub.add_repo("org/name", {"config.json": b"...", "model.safetensors": b"..."})
        ...  # a process with HF_ENDPOINT=hub.url

Faults are switched on by attributes; `hub.requests` records what was asked.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repo:
    branches: dict[str, str]  # name → commit
    commits: dict[str, Files]  # commit → all its files
    private: bool = False
    gated: bool = False
    messages: list[str] = field(default_factory=list)

    def resolve(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None

    def commit(self, branch: str, files: Files, message: str) -> str:
        content = repr((message, len(self.commits), sorted(files))).encode() + b"".join(files.values())
        oid = hashlib.sha1(content).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid


class HubServer:
    """The server, on a free port of this machine; a context manager.

    token: wanted for private and gated repositories and for writing. fault, of the weights' bytes:
    "truncate" (fewer bytes than announced), "die" (the connection closes half way, then gives nothing more), "flip"
    (one byte altered), "error" (500), "drip" (a byte now and then), "slow" (all of it, in two seconds), "endless" (more
    and more). etag: what weights are called instead of their SHA-256. read_only: writes are refused with 403.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # uploaded large files by SHA-256
        self.requests: list[tuple[str, str]] = []
        self.token: str | None = None
        self.fault: str | None = None
        self.etag: str | None = None
        self.read_only = False
        self.died = False
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_repo(self, name: str, files: Files, private: bool = False, gated: bool = False) -> str:
        """Make or replace a repository; returns its commit."""
        self.repos[name] = Repo({}, {}, private, gated)
        return self.repos[name].commit("main", dict(files), "initial commit")

    def files(self, name: str, revision: str = "main") -> Files:
        repo = self.repos[name]
        return repo.commits[repo.resolve(revision)]

    def downloads(self) -> int:
        """The number of requests for the bytes of weights."""
        return sum(method == "GET" and path.endswith(".safetensors") for method, path in self.requests)


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        try:
            for pattern, action in _ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    return action(self, body, *match.groups())
            raise _Refused(404)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, b'{"error": "refused"}', headers)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, _status: int = 200, **content) -> None:
        self._send(_status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _authorised(self) -> bool:
        return not self.hub.token or self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._authorised()):
            raise _Refused(404, "RepoNotFound") if self._authorised() else _Refused(401, "RepoNotFound")
        return repo

    def _commit(self, name: str, revision: str) -> tuple[str, Files]:
        repo = self._repo(name)
        commit = repo.resolve(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound")
        return commit, repo.commits[commit]

    def _writable(self) -> None:
        if not self._authorised():
            raise _Refused(401, message="Invalid username or password.")
        if self.hub.read_only:
            raise _Refused(403, message="You do not have the required permissions.")

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        commit, files = self._commit(name, revision)
        if self._repo(name).gated and not self._authorised():
            raise _Refused(401, "GatedRepo", "Access to this repository is restricted.")
        if path not in files:
            raise _Refused(404, "EntryNotFound")
        content = files[path]
        large = path.endswith(".safetensors")
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha256(content).hexdigest() if large else _blob_id(content)}"',
            "Accept-Ranges": "bytes",
        }
        if large and self.hub.etag:
            headers["ETag"] = f'"{self.hub.etag}"'
        if self.command == "HEAD":
            self.send_response(200)
            for header, value in {"Content-Length": len(content), **headers}.items():
                self.send_header(header, str(value))
            self.end_headers()
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        fault = self.hub.fault if large else None
        if fault == "error":
            raise _Refused(500)
        if fault == "flip":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        part = content[start:]
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if fault == "truncate":
            part = part[: len(part) // 2]
            headers.pop("Content-Range", None)
        if fault == "endless":
            self.close_connection = True
            self.send_response(200)
            for header, value in headers.items():
                self.send_header(header, str(value))
            self.end_headers()
            with contextlib.suppress(OSError):
                while self.hub.fault == fault:
                    self.wfile.write(bytes(1 << 22))
                    time.sleep(0.02)
            return
        if fault in ("drip", "slow"):
            self.close_connection = True
            self.send_response(206 if asked else 200)
            for header, value in {"Content-Length": len(part), **headers}.items():
                self.send_header(header, str(value))
            self.end_headers()
            size = 1 if fault == "drip" else len(part) // 10 + 1
            with contextlib.suppress(OSError):  # the client has gone
                for at in range(0, len(part), size):
                    self.wfile.write(part[at : at + size])
                    time.sleep(0.2)
                    if self.hub.fault != fault:
                        return
            return
        if fault == "die":
            self.close_connection = True
            if self.hub.died:  # if more bytes came, the client would retry without end
                return
            self.hub.died = True
            self.send_response(206 if asked else 200)
            for header, value in {"Content-Length": len(part), **headers}.items():
                self.send_header(header, str(value))
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            return
        self._send(206 if asked else 200, part, headers)

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        commit, files = self._commit(name, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        self._json(id=name, modelId=name, sha=commit, private=self._repo(name).private, siblings=siblings, tags=[])

    def tree(self, body: bytes, name: str, revision: str) -> None:
        commit, files = self._commit(name, revision)
        entries = [
            {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": _blob_id(content),
                **(
                    {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
                    if path.endswith(".safetensors")
                    else {}
                ),
            }
            for path, content in files.items()
        ]
        self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json", "X-Repo-Commit": commit})

    def create(self, body: bytes) -> None:
        self._writable()
        asked = json.loads(body)
        name = "/".join(part for part in (asked.get("organization") or "me", asked["name"]) if part)
        if name in self.hub.repos:
            return self._json(409, url=f"{self.hub.url}/{name}", error="exists")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo({}, {}, bool(private))
        self.hub.repos[name].commit("main", {}, "initial commit")
        self._json(url=f"{self.hub.url}/{name}", id=name, name=name)

    def whoami(self, body: bytes) -> None:
        if not self._authorised():
            raise _Refused(401, message="Invalid username or password.")
        self._json(type="user", name="me", orgs=[{"name": "lab"}])

    def branch(self, body: bytes, name: str, branch: str) -> None:
        self._writable()
        repo = self._repo(name)
        if branch in repo.branches:
            return self._json(409, error="exists")
        repo.branches[branch] = repo.branches["main"]
        self._json(ref=f"refs/heads/{branch}")

    def tag(self, body: bytes, name: str, revision: str) -> None:
        self._writable()
        repo = self._repo(name)
        commit, _ = self._commit(name, revision)
        repo.branches[json.loads(body)["tag"]] = commit
        self._json()

    def remove_tag(self, body: bytes, name: str, tag: str) -> None:
        self._writable()
        del self._repo(name).branches[tag]
        self._json()

    def settings(self, body: bytes, name: str) -> None:
        self._writable()
        asked = json.loads(body)
        self._repo(name).private = asked.get("private", asked.get("visibility") == "private")
        self._json()

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        self._writable()
        self._commit(name, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json(files=files)

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {**thing, "actions": {"upload": {"href": f"{self.hub.url}/objects/{thing['oid']}"}}}
            for thing in json.loads(body)["objects"]
        ]
        self._json(transfer="basic", objects=objects)

    def put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400)
        self.hub.objects[oid] = body
        self._send(200, b"")

    def post_commit(self, body: bytes, name: str, revision: str) -> None:
        self._writable()
        _, files = self._commit(name, revision)
        files, message = dict(files), ""
        for line in filter(None, body.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        oid = self._repo(name).commit(revision, files, message)
        self._json(success=True, commitOid=oid, commitUrl=f"{self.hub.url}/{name}/commit/{oid}", hookOutput="")

    def yaml(self, body: bytes) -> None:
        self._json(errors=[], warnings=[])


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"GET /api/models/{_NAME}/revision/(.+)", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    (r"POST /api/repos/create", _Handler.create),
    (rf"POST /api/models/{_NAME}/branch/(.+)", _Handler.branch),
    (rf"POST /api/models/{_NAME}/tag/(.+)", _Handler.tag),
    (rf"DELETE /api/models/{_NAME}/tag/(.+)", _Handler.remove_tag),
    (rf"PUT /api/models/{_NAME}/settings", _Handler.settings),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /objects/(\w+)", _Handler.put),
    (rf"POST /api/models/{_NAME}/commit/(.+)", _Handler.post_commit),
    (r"POST /api/validate-yaml", _Handler.yaml),
]
