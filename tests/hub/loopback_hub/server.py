"""The HTTP side of the loopback Hub: the requests that the real client makes, and failures on demand."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from loopback_hub.store import RefusedError, Store, is_large, oid, pipeline_tag


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"


@dataclass
class Fault:
    """What goes wrong with requests that a pattern finds, as in `"PUT /lfs/"`.

    Attributes:
        pattern: Regular expression, searched for in method and path.
        status: Answer with this status; 0 drops the connection.
        times: How often; after that all is well.
        after: Requests of this kind that go well before.
        headers: Sent along with the status.
        body: Sent along with the status; an error page of a proxy by default.
        wait: Seconds before anything is answered.
        hangs: Whether nothing is ever answered.
    """

    pattern: str
    status: int | None = None
    times: float = float("inf")
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: str = "<html>an error page</html>"
    wait: float = 0.0
    hangs: bool = False


class LoopbackHub(ThreadingHTTPServer):
    """A Hub on a free port of this machine; use it in a `with`.

    Attributes:
        store: What it remembers.
        faults: What is to go wrong.
        requests: Method and path of every request so far.
        clock: When each of them came.
        mistakes: Errors of its own, which no test wants to see.
        takes_large_files: Whether large files go to a storage of their own, or into the commit as small ones do.
    """

    daemon_threads = True

    def __init__(self, *, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.store = Store()
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.clock: list[float] = []
        self.mistakes: list[BaseException | None] = []
        self.takes_large_files = True
        self.lock = threading.RLock()
        self._closed = threading.Event()
        self._sockets: set[socket.socket] = set()

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Go down, with every connection that is still open."""
        self._closed.set()
        self.shutdown()
        self.server_close()
        for connection in list(self._sockets):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def fail(self, pattern: str, status: int | None = None, **details: Any) -> Fault:
        """Let requests go wrong from now on."""
        fault = Fault(pattern, status, **details)
        self.faults.append(fault)
        return fault

    def count(self, pattern: str) -> int:
        """Count the requests so far that a pattern finds."""
        return sum(re.search(pattern, request) is not None for request in self.requests)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Return what a repository holds."""
        return self.store.repositories[name].files(revision)

    def pending_fault(self, request: str) -> Fault | None:
        """Note a request, and return what is to go wrong with it."""
        with self.lock:
            self.requests.append(request)
            self.clock.append(time.monotonic())
            for fault in self.faults:
                if fault.times <= 0 or not re.search(fault.pattern, request):
                    continue
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def get_request(self) -> tuple[socket.socket, Any]:
        """Remember connections, to be able to cut them."""
        connection, address = super().get_request()
        self._sockets.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection that is over."""
        self._sockets.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about clients that have gone; anything else is a mistake of this Hub's own."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.mistakes.append(error)

    def until_closed(self) -> None:
        """Wait for the end of this Hub."""
        self._closed.wait()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, status: int, body: bytes | Any = b"", headers: dict[str, str] | None = None) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self) -> None:
        fault = self.server.pending_fault(f"{self.command} {self.path}")
        body = self._body()
        if fault is not None:
            time.sleep(fault.wait)
            if fault.hangs:
                self.server.until_closed()
            if fault.hangs or fault.status == 0:
                self.close_connection = True
                return
            if fault.status is not None:
                self._answer(fault.status, fault.body.encode(), fault.headers)
                return
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        try:
            with self.server.lock:
                for method, pattern, route in _ROUTES:
                    if self.command in method and (found := re.fullmatch(pattern, url.path)):
                        route(self, body, **{key: unquote(value or "") for key, value in found.groupdict().items()})
                        return
            raise RefusedError(404, f"Nothing here: {self.command} {url.path}", "EntryNotFound")
        except RefusedError as refusal:
            headers = {"X-Error-Message": refusal.text, "Content-Type": "application/json"}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
            self._answer(refusal.status, {"error": refusal.text}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    @property
    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    # ---- Routes ----

    def whoami(self, _body: bytes) -> None:
        user = self.server.store.user(self._token)
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        self._answer(200, {"type": "user", "name": user.name, "auth": {"accessToken": {"role": user.role}}})

    def create(self, body: bytes) -> None:
        name, is_new = self.server.store.create(self._token, json.loads(body))
        self._answer(200 if is_new else 409, {"url": f"{self.server.url}/{name}", "name": name})

    def validate_card(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        errors = [] if content.count("---") >= 2 else [{"message": "no metadata"}]
        self._answer(200 if not errors else 400, {"errors": errors, "warnings": []})

    def branch(self, _body: bytes, name: str, revision: str) -> None:
        repository = self.server.store.find(self._token, name, write=True)
        if revision in repository.branches:
            raise RefusedError(409, "Reference already exists")
        repository.branches[revision] = repository.branches["main"]
        self._answer(200, {})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        repository = self.server.store.find(self._token, name, write=True)
        present = repository.files(revision)
        files = []
        for wanted in json.loads(body)["files"]:
            path = wanted["path"]
            entry = {"path": path, "uploadMode": self._storage_of(path), "shouldIgnore": False}
            files.append(entry | ({"oid": oid(path, present[path])} if path in present else {}))
        self._answer(200, {"files": files})

    def _storage_of(self, path: str) -> str:
        return "lfs" if self.server.takes_large_files and is_large(path) else "regular"

    def large_batch(self, body: bytes, name: str) -> None:
        self.server.store.find(self._token, name, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            sha256 = wanted["oid"]
            urls = {action: {"href": f"{self.server.url}/lfs/{action}/{sha256}"} for action in ("upload", "verify")}
            missing = sha256 not in self.server.store.large
            objects.append({"oid": sha256, "size": wanted["size"]} | ({"actions": urls} if missing else {}))
        self._answer(200, {"transfer": "basic", "objects": objects})

    def large_upload(self, body: bytes, sha256: str) -> None:
        self.server.store.upload(sha256, body)
        self._answer(200)

    def large_verify(self, body: bytes, sha256: str) -> None:
        content = self.server.store.large.get(sha256)
        if content is None or len(content) != json.loads(body)["size"]:
            raise RefusedError(404, "Not uploaded")
        self._answer(200)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self.server.store.find(self._token, name, write=True)
        changes, header = self.server.store.changes([json.loads(line) for line in body.splitlines()])
        commit = repository.commit(revision, changes, header["summary"])
        url = f"{self.server.url}/{name}/commit/{commit}"
        self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def info(self, _body: bytes, name: str, revision: str = "main") -> None:
        repository = self.server.store.find(self._token, name)
        commit = repository.resolve(revision)
        files = repository.files(commit)
        answer = {"id": name, "sha": commit, "private": repository.private, "tags": [], "library_name": "transformers"}
        answer |= {"siblings": [{"rfilename": path} for path in files], "pipeline_tag": pipeline_tag(files)}
        self._answer(200, answer)

    def tree(self, _body: bytes, name: str, revision: str, folder: str = "") -> None:
        repository = self.server.store.find(self._token, name)
        inside = f"{folder}/" if folder else ""
        files = {path: content for path, content in repository.files(revision).items() if path.startswith(inside)}
        if not files:
            raise RefusedError(404, f"{folder} does not exist", "EntryNotFound")
        is_recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        shown = {path: content for path, content in files.items() if is_recursive or "/" not in path[len(inside) :]}
        entries = []
        for path, content in shown.items():
            name_of_content = oid(path, content)
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": name_of_content}
            if is_large(path):
                entry["lfs"] = {"oid": name_of_content, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._answer(200, entries)

    def resolve(self, _body: bytes, name: str, revision: str, path: str) -> None:
        repository = self.server.store.find(self._token, name)
        commit = repository.resolve(revision)
        content = repository.files(commit).get(path)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            self._answer(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
            return
        headers |= {"ETag": f'"{oid(path, content)}"', "Accept-Ranges": "bytes"}
        if is_large(path):
            headers |= {"X-Linked-Etag": f'"{oid(path, content)}"', "X-Linked-Size": str(len(content))}
        self._answer(200, content, headers)


_Route = tuple[tuple[str, ...], str, Callable[..., None]]
_ROUTES: list[_Route] = [
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate_card),
    (("POST",), rf"/api/models/{NAME}/branch/(?P<revision>[^/]+)", _Handler.branch),
    (("POST",), rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.large_batch),
    (("PUT",), r"/lfs/upload/(?P<sha256>\w+)", _Handler.large_upload),
    (("POST",), r"/lfs/verify/(?P<sha256>\w+)", _Handler.large_verify),
    (("POST",), rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (("GET",), rf"/api/models/{NAME}", _Handler.info),
    (("GET",), rf"/api/models/{NAME}/revision/(?P<revision>[^/]+)", _Handler.info),
    (("GET",), rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    (("GET", "HEAD"), rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
