"""A Hugging Face hub on loopback: repositories with commits, branches and tags, and connections that break."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclasses.dataclass
class Repository:
    """Commit -> folder of its files, and branch or tag -> commit."""

    commits: dict[str, Path]
    refs: dict[str, str]
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub:
    """Serves while the `with` block runs.

    Attributes:
        repositories: by owner/name; tests may change them.
        breaks: file name -> how many of its next downloads break off, half of what was asked for having been sent.
        silent: file names of which nothing is sent but the headers.
        requests: (method, path, range) of what was asked for.
    """

    def __init__(self, repositories: dict[str, Repository]) -> None:
        self.repositories = repositories
        self.breaks: dict[str, int] = {}
        self.silent: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answer(hub, self)

            def do_HEAD(self) -> None:
                answer(hub, self)

            def log_message(self, *unused: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self) -> list[str]:
        """Names of the files that were asked for with GET."""
        return [
            path.rpartition("/")[2]
            for method, path, _ in self.requests
            if "/resolve/" in path and method == "GET"
        ]


def answer(hub: Hub, request: BaseHTTPRequestHandler) -> None:
    path = unquote(urlsplit(request.path).path)
    hub.requests.append((request.command, path, request.headers.get("Range")))
    if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
        name, kind, revision = found[1], found[2], found[3] or "main"
        file = None
    elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40}|[^/]+)/(.+)", path):
        (name, revision, file), kind = found.groups(), "file"
    else:
        return fail(request, 404, "EntryNotFound")
    repository = hub.repositories.get(name)
    if repository is None:
        return fail(request, 401, "RepoNotFound")
    if repository.gated:
        return fail(request, 403, "GatedRepo")
    commit = repository.commit(revision)
    if commit is None:
        return fail(request, 404, "RevisionNotFound")
    folder = repository.commits[commit]
    if file is not None:
        if not (folder / file).is_file():
            return fail(request, 404, "EntryNotFound")
        return send_file(hub, request, folder / file, commit)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    if kind == "tree":
        send_json(
            request,
            [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": etag(f)}
                for n, f in zip(names, files, strict=True)
            ],
        )
    else:
        siblings = [{"rfilename": n} for n in names]
        send_json(request, {"_id": "1", "id": name, "sha": commit, "siblings": siblings})
    return None


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def fail(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
    request.send_response(status)
    request.send_header("X-Error-Code", code)
    request.send_header("X-Error-Message", code)
    request.send_header("Content-Length", "0")
    request.end_headers()


def send_json(request: BaseHTTPRequestHandler, content: object) -> None:
    body = json.dumps(content).encode()
    request.send_response(200)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def send_file(hub: Hub, request: BaseHTTPRequestHandler, file: Path, commit: str) -> None:
    body = file.read_bytes()
    first = 0
    if found := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")):
        first = int(found[1])
        request.send_response(206)
        request.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
    else:
        request.send_response(200)
    request.send_header("ETag", f'"{etag(file)}"')
    request.send_header("X-Repo-Commit", commit)
    request.send_header("Accept-Ranges", "bytes")
    request.send_header("Content-Length", str(len(body) - first))
    request.end_headers()
    if request.command == "HEAD":
        return
    rest = body[first:]
    if file.name in hub.silent:
        rest = b""
    elif hub.breaks.get(file.name):
        hub.breaks[file.name] -= 1
        rest = rest[: len(rest) // 2]
    request.wfile.write(rest)
    # Less than was announced: the client finds the connection closed.
    request.close_connection = len(rest) < len(body) - first
