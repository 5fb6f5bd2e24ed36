"""A server on 127.0.0.1 that speaks the Hub's protocol as huggingface-hub uses it.

A test can order a fault.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"


class Hub(BaseHTTPRequestHandler):
    """One repository, owner/tiny, whose files lie in `folder`.

    Requests for weights are redirected, as they are for large files on the Hub.
    """

    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.hub = self.server.hub

    def do_HEAD(self):
        self.resolve()

    def do_GET(self):
        if self.path.startswith("/cdn/"):
            self.send_blob()
        elif (
            self.path.startswith("/api/whoami")
            and self.headers["Authorization"] != f"Bearer {TOKEN}"
        ):
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif self.path.startswith("/api/whoami"):
            self.answer(
                200, {"name": "owner", "type": "user", "auth": {"accessToken": {"role": "write"}}}
            )
        elif self.path.startswith("/api/models/"):
            self.describe_repository()
        elif self.path.startswith("/api/"):  # huggingface-hub asks what does not matter here.
            self.answer(404, {"error": "not found"})
        else:
            self.resolve()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.requests.append((self.command, self.path))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.hub.fault == "push 403":
            self.answer(
                403, {"error": "You don't have the rights to create a model under this namespace"}
            )
        elif self.path == "/api/repos/create":
            self.create_repository(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self.hub.card = json.loads(body)["content"]
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["size"] > 10_000 else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{self.hub.url}/put/{o['oid']}"}},
                }
                for o in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif self.path.endswith("/commit/main"):
            if self.hub.fault == "commit 500":
                return self.answer(500, {"error": "internal"})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.hub.uploaded[line["value"]["path"]] = base64.b64decode(
                        line["value"]["content"]
                    )
                elif line["key"] == "lfsFile":
                    self.hub.uploaded[line["value"]["path"]] = self.hub.blobs[line["value"]["oid"]]
            self.answer(
                200, {"commitUrl": f"{self.hub.url}/owner/new/commit/{COMMIT}", "commitOid": COMMIT}
            )
        else:
            self.answer(404, {"error": "not found"})
        return None

    def describe_repository(self):
        repo, _, question = self.path.removeprefix("/api/models/").partition("/auth-check/")
        repo = repo.partition("?")[0]
        if repo not in self.hub.repositories:
            self.answer(404, {"error": "no such"}, {"X-Error-Code": "RepoNotFound"})
        elif question == "write" and self.hub.fault == "push 403":
            self.answer(403, {"error": "You have read access only"})
        else:
            private = self.hub.repositories[repo]
            self.answer(200, {"id": repo, "private": private, "sha": COMMIT, "siblings": []})

    def create_repository(self, wanted):
        repo = f"{wanted['organization']}/{wanted['name']}"
        if repo in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo"})
        # Versions of huggingface-hub before 1.0 send "private".
        private = wanted.get("visibility") == "private" or wanted.get("private", False)
        self.hub.repositories[repo] = private
        return self.answer(200, {"url": f"{self.hub.url}/{repo}", "id": repo})

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.blobs[hashlib.sha256(data).hexdigest()] = data
        self.answer(200, {})

    def resolve(self):
        self.hub.requests.append((self.command, self.path))
        match = re.fullmatch(r"/owner/(\w+)/resolve/([^/]+)/(.+)", self.path)
        repo, revision, name = match.groups() if match else ("", "", "")
        fault, token = self.hub.fault, self.headers["Authorization"]
        if fault in ("429", "500"):
            return self.answer(int(fault), {"error": fault})
        if fault == "401" and token != f"Bearer {TOKEN}":
            return self.answer(401, {"error": fault}, {"X-Error-Code": "RepoNotFound"})
        if fault == "gated" and token != f"Bearer {TOKEN}":
            return self.answer(
                401,
                {"error": "gated"},
                {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"},
            )
        if repo != "tiny":
            return self.answer(401, {"error": "no such"}, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v1", COMMIT):
            return self.answer(404, {"error": "no such"}, {"X-Error-Code": "RevisionNotFound"})
        path = self.hub.folder / name
        if not path.is_file():
            return self.answer(
                404,
                {"error": "no such"},
                {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT},
            )
        data = path.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not name.endswith(".json"):
            sha = hashlib.sha256(data).hexdigest()
            self.hub.blobs[sha] = data
            headers |= {
                "X-Linked-Etag": f'"{sha}"',
                "X-Linked-Size": str(len(data)),
                "Location": f"{self.hub.cdn}/cdn/{sha}",
            }
            return self.answer(302, None, headers)
        etag = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return self.answer(200, data, headers | {"ETag": f'"{etag}"'})

    def send_blob(self):
        data = self.hub.blobs[self.path.rpartition("/")[2]]
        start = int(re.search(r"\d+", self.headers.get("Range", "bytes=0-"))[0])
        self.hub.starts.append(start)
        fault, half = self.hub.fault, len(data) // 2
        if fault == "wrong hash":
            data = data[:-4] + b"\0\0\0\0"
        if fault == "wrong size":
            data = data[:half]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if fault == "cut" or (fault == "cut once" and len(self.hub.starts) == 1):
            self.wfile.write(data[start : max(half, start)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(data[start:])

    def answer(self, status, body, headers=None):
        if body is None:
            body = b""
        elif not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


class State:
    """What a test sets, such as a fault, and what it sees, such as requests and uploaded files."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        self.fault: str | None = None
        self.cdn = url.replace("127.0.0.1", "localhost")  # Large files are on another host.
        self.blobs: dict[str, bytes] = {}
        self.uploaded: dict[str, bytes] = {}
        self.starts: list[int] = []
        self.requests: list[tuple[str, str]] = []
        self.repositories = {"owner/tiny": False}  # and whether each is private
        self.card = ""


@contextmanager
def serve(folder: Path, certificate: Path | None = None) -> Iterator[State]:
    """Serve a folder as the repository owner/tiny while the context lasts.

    With a file that holds a certificate and its key, the connection is encrypted.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    scheme = "http"
    if certificate is not None:
        scheme = "https"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.hub = State(folder, f"{scheme}://127.0.0.1:{server.server_port}")
    # shutdown() waits for up to one polling interval, so this one is short.
    polling = {"poll_interval": 0.01}
    threading.Thread(target=server.serve_forever, kwargs=polling, daemon=True).start()
    yield server.hub
    server.shutdown()
    server.server_close()
