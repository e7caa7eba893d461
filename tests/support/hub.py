"""A hub on loopback with the part of the protocol that huggingface_hub uses for listings and downloads."""

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MEMBER, STRANGER = "hf_member", "hf_stranger"
"""Tokens of an account that accepted the licence, and of one that did not."""
LFS = (".safetensors", ".npz", "tokenizer.json")


@dataclass
class Repo:
    commit: str
    files: dict[str, bytes]
    gated: bool = False


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose path holds ``where``.

    :ivar status: the response has this status and no content.
    :ivar cut: the connection is closed after this many bytes of the body.
    :ivar body: is sent instead of the file's bytes.
    """

    where: str
    times: int = 10**9
    status: int = 0
    cut: int | None = None
    body: bytes | None = None


@dataclass
class Hub:
    """The repositories, what goes wrong, and the paths of the GET requests."""

    repos: dict[str, Repo]
    fault: Fault | None = None
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""


def digest(path: str, content: bytes) -> str:
    """The name of a file's content on the hub: sha256 for LFS files, git's own digest for others."""
    if path.endswith(LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def serving(repos: dict[str, Repo]) -> Iterator[Hub]:
    """A hub with these repositories, on a port of its own."""
    hub = Hub(repos)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if self.command == "GET":
            self.hub.asked.append(path)
        fault = self._fault(path)
        parts = path.strip("/").split("/")
        if fault and fault.status:
            self._send(fault.status, b"{}", {})
        elif parts[:2] == ["api", "models"]:
            if repo := self._repo("/".join(parts[2:4]), parts[5], content=False):
                # Since 1.25, huggingface_hub takes the names from the tree.
                names = [{"rfilename": path} for path in sorted(repo.files)]
                info = {"id": "x", "sha": repo.commit, "siblings": names}
                listing = info if parts[4] == "revision" else _tree(repo)
                self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
        elif repo := self._repo("/".join(parts[:2]), parts[3], content=True):
            self._file(repo, "/".join(parts[4:]), fault)

    def _fault(self, path: str) -> Fault | None:
        fault = self.hub.fault
        if fault is None or fault.where not in path or not fault.times or not (fault.status or self.command == "GET"):
            return None
        fault.times -= 1
        return fault

    def _repo(self, name: str, revision: str, content: bool) -> Repo | None:
        """The repository, or None after a refusal was sent; of a gated one the listing is public."""
        token, repo = self.headers.get("Authorization", "").removeprefix("Bearer "), self.hub.repos.get(name)
        if repo is None:  # without a token, the hub answers 401 here
            self._send(404 if token else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif repo.gated and content and token != MEMBER:
            self._send(403 if token else 401, b"{}", {"X-Error-Code": "GatedRepo"})
        elif revision not in ("main", repo.commit):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return repo
        return None

    def _file(self, repo: Repo, path: str, fault: Fault | None) -> None:
        if path not in repo.files:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit})
            return
        content = repo.files[path]
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{digest(path, content)}"'}
        sent = fault.body if fault and fault.body is not None else content
        self._send(200, sent, headers, fault.cut if fault else None)

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        self.close_connection = cut is not None


def _tree(repo: Repo) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = []
    for path, content in sorted(repo.files.items()):
        entry: dict[str, object] = {"type": "file", "size": len(content), "path": path, "oid": "0" * 40}
        if path.endswith(LFS):
            entry["lfs"] = {"oid": digest(path, content), "size": len(content), "pointerSize": 130}
        else:
            entry["oid"] = digest(path, content)
        entries.append(entry)
    return entries
