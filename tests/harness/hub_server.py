"""A hub on loopback: the part of its protocol that the installed huggingface_hub speaks when it downloads.

Listing and revision from ``/api/models``, files from ``/REPO/resolve/REVISION/PATH``: small ones behind a redirect on
the same host, LFS files behind one to another host (here ``localhost`` for ``127.0.0.1``), with ``X-Repo-Commit``,
``X-Linked-Etag``, ``X-Linked-Size``, ``Range`` and ``X-Error-Code``. No Xet headers: the plain HTTP path.
"""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath

MEMBER, STRANGER = "hf_member", "hf_stranger"
"""Tokens: of an account that accepted the licence, and of one that did not. Any other is invalid."""

LFS = (".safetensors", ".npz", "tokenizer.json")
PAGE = 4
"""Entries of a listing that one answer holds."""


@dataclass
class Repo:
    commit: str
    files: dict[str, bytes]
    gated: bool = False


@dataclass
class Fault:
    """What goes wrong with the requests whose path holds ``where``.

    :ivar times: with how many of them; the rest is answered as always.
    :ivar status: is answered instead, with ``headers``.
    :ivar cut: the connection is closed after this many bytes of the body.
    :ivar body: is sent instead of the file's bytes.
    """

    where: str
    times: int = 10**9
    method: str = "GET"
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    body: bytes | None = None


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Hub:
    """What is served, what goes wrong, and what was asked."""

    repos: dict[str, Repo]
    faults: list[Fault] = field(default_factory=list)
    requests: list[Seen] = field(default_factory=list)
    address: tuple[str, int] = ("", 0)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.address[1]}"

    @property
    def store(self) -> str:
        """Of LFS files: another origin, to which a token must not be sent."""
        return f"http://localhost:{self.address[1]}/lfs"

    def asked(self, where: str, method: str = "GET") -> list[Seen]:
        return [seen for seen in self.requests if where in seen.path and seen.method == method]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def serving(repos: dict[str, Repo]) -> Iterator[Hub]:
    """A hub with these repositories, on a port of its own."""
    hub = Hub(repos)

    class Handler(_Handler):
        served = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = server.server_address[0], server.server_address[1]  # type: ignore[assignment]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.served.requests.append(Seen(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        fault = self._fault()
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        if fault and fault.status:
            self._error(fault.status, "", "scripted", fault.headers)
        elif parts[0] == "lfs":
            files = [content for repo in self.served.repos.values() for content in repo.files.values()]
            content = next(content for content in files if sha256(content) == parts[1])
            self._file(content, {"ETag": f'"{parts[1]}"'}, fault)
        elif parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4], parts[5], urllib.parse.parse_qs(url.query))
        elif parts[:2] == ["api", "resolve-cache"]:
            self._small("/".join(parts[3:5]), "/".join(parts[6:]), fault)
        elif parts[2:3] == ["resolve"]:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._error(404, "", f"this hub does not know {self.path}")

    def _fault(self) -> Fault | None:
        for fault in self.served.faults:
            if fault.where in self.path and fault.method == self.command and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def _repo(self, name: str, revision: str, content: bool) -> Repo | None:
        """The repository, or the refusal is sent; a gated one shows its listing and not its content."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repo = self.served.repos.get(name)
        if token not in ("", MEMBER, STRANGER):
            self._error(401, "", "Invalid credentials in Authorization header")
        elif repo is None:
            # Whoever is not logged in is not told that there is no such repository.
            status, said = (404, "Repository not found") if token else (401, "Invalid username or password.")
            self._error(status, "RepoNotFound", said)
        elif repo.gated and content and token != MEMBER:
            said = f"Access to model {name} is restricted and you are not in the authorized list. Visit its page."
            self._error(403 if token else 401, "GatedRepo", said)
        elif revision not in ("main", repo.commit):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repo
        return None

    def _api(self, name: str, what: str, revision: str, query: dict[str, list[str]]) -> None:
        if (repo := self._repo(name, revision, content=False)) is None:
            return
        if what == "revision":
            self._json({"id": name, "modelId": name, "sha": repo.commit, "siblings": []})
            return
        entries = _tree(repo)
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):
            more = f"/api/models/{name}/tree/{revision}?recursive=True&expand=False&cursor={start + PAGE}"
            headers["Link"] = f'<{self.served.endpoint}{more}>; rel="next"'
        self._json(entries[start : start + PAGE], headers)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if (repo := self._repo(name, revision, content=True)) is None:
            return
        if path not in repo.files:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repo.commit})
            return
        content = repo.files[path]
        lfs = path.endswith(LFS)
        digest = sha256(content) if lfs else git_digest(content)
        where = f"{self.served.store}/{digest}" if lfs else f"/api/resolve-cache/models/{name}/{repo.commit}/{path}"
        self.send_response(302 if lfs else 307)
        self.send_header("X-Repo-Commit", repo.commit)
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Location", where)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _small(self, name: str, path: str, fault: Fault | None) -> None:
        repo = self.served.repos[name]
        content = repo.files[path]
        self._file(content, {"ETag": f'"{git_digest(content)}"', "X-Repo-Commit": repo.commit}, fault)

    def _file(self, content: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        content = fault.body if fault and fault.body is not None else content
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        if start >= len(content) > 0:
            self._error(416, "", "beyond the end", {"Content-Range": f"bytes */{len(content)}"})
            return
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for key, value in {"Accept-Ranges": "bytes", **headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = fault.cut if fault else None
        self.wfile.write(content[start:] if cut is None else content[start : start + cut])
        self.close_connection = cut is not None

    def _json(self, data: object, headers: dict[str, str] | None = None, status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str, said: str, headers: dict[str, str] | None = None) -> None:
        told = {"X-Error-Message": said} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        self._json({"error": said}, told, status)


def _tree(repo: Repo) -> list[dict[str, object]]:
    """The listing: folders, and files of which an LFS one is a pointer of its own."""
    folders = {str(folder) for path in repo.files for folder in PurePosixPath(path).parents} - {"."}
    entries: list[dict[str, object]] = [
        {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in sorted(folders)
    ]
    for path, content in sorted(repo.files.items()):
        entry: dict[str, object] = {"type": "file", "size": len(content), "path": path, "oid": git_digest(content)}
        if path.endswith(LFS):
            pointer = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n"
            )
            entry["oid"] = git_digest(pointer.encode())
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer)}
        entries.append(entry)
    return entries
