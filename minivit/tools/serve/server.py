"""The page over HTTP: who may ask, how much may be sent, and in how much time.

A request must name this computer as its Host, so that no other site's name can be made to lead
here, and it must hold the token of the printed address. Only this page itself may send photos.
"""

from __future__ import annotations

import contextlib
import errno
import io
import ipaddress
import json
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from ...data.photos import MAX_BYTES
from ...errors import UserError, printable
from ...figures.explorer import TEMPLATE as EXPLORER
from ...figures.pages import content_hash, fill_template, read_template

if TYPE_CHECKING:
    from .answers import Answers

PAGE = Path(__file__).with_name("page.html")
MAX_NAME = 200  # characters of a photo's name
MAX_CONNECTIONS = 200
HOST = re.compile(r"(?:\[([\da-f:.]+)\]|([^\[\]:/@\s]+))(?::\d+)?", re.IGNORECASE)
# Seconds until a request's head must be here, until an answer must have been taken, and for which
# what a client still sends is read after its answer. Otherwise the answer might get lost.
HEAD_LIMIT = 10
ANSWER_LIMIT = 60
REST_LIMIT = 2
# Seconds until a photo must be here, and the bytes a second for which there are more of them.
PHOTO_LIMIT = 10
SLOWEST = 50_000
RETRY_AFTER = 2  # seconds


class Refusal(Exception):
    """A request is refused, with a status and one line for the user."""

    def __init__(self, status: HTTPStatus, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class Server(ThreadingMixIn, TCPServer):
    """Listens at one address, and answers each request in a thread. `answers` is set before.

    Raises UserError if it cannot listen there. This is ThreadingHTTPServer, which however would
    ask the network for the full name of this computer.
    """

    answers: Answers
    daemon_threads = True
    request_queue_size = 64
    # On Windows, this would let two programs listen at one port.
    allow_reuse_address = sys.platform != "win32"

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.token = secrets.token_urlsafe(16)
        self.connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self.address_family, *_, address = found[0]
            super().__init__(address, Handler)  # type: ignore[arg-type]  # IPv6 has four parts
        except UnicodeError:
            raise UserError(f"--host {host}: expected the name or number of a host") from None
        except OSError as error:
            raise UserError(_why_not(error, host, port)) from error
        self.address = ipaddress.ip_address(str(self.server_address[0]))

    def urls(self) -> list[str]:
        """Return the addresses of the page, the one for this computer's own browser first."""
        hosts = [self.address]
        if self.address.is_unspecified:
            own = "::1" if self.address.version == 6 else "127.0.0.1"
            hosts = [ipaddress.ip_address(own), *_network_addresses(self.address_family)]
        port = self.server_address[1]
        urls = []
        for host in hosts:
            name = f"[{host}]" if host.version == 6 else host
            urls.append(f"http://{name}:{port}/{self.token}")
        return urls

    def knows_host(self, name: str) -> bool:
        """Return whether a name or number in a request's Host means this computer.

        The name of another site may be made to lead here. A number leads only where it says. The
        port is not compared, because a tunnel has one of its own.
        """
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            names = {"localhost"}
            if not self.address.is_loopback:
                names |= {self.host, socket.gethostname(), f"{socket.gethostname()}.local"}
            return name.lower() in {each.lower() for each in names}
        return address.is_loopback or not self.address.is_loopback

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.close_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Say that the answer is over, wait until the client has said so too, and close."""
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(REST_LIMIT)
            end = time.monotonic() + REST_LIMIT
            while time.monotonic() < end and request.recv(1 << 20):
                pass
        self.close_request(request)
        self.connections.release()

    def handle_error(self, *_: object) -> None:
        # A client that has gone away, or is too slow, is not worth a word.
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()

    @cached_property
    def page(self) -> bytes:
        """The page, with what its script must know."""
        data = {
            "models": [model.origin.source for model in self.answers.plan.models],
            "keeps": self.answers.folder is not None,
            "max_bytes": MAX_BYTES,
        }
        return fill_template(PAGE, data).encode()

    @cached_property
    def policy(self) -> str:
        """The Content-Security-Policy of the page, which the explorer's frame inherits."""
        pages = [read_template(path) for path in (PAGE, EXPLORER)]
        scripts = " ".join(f"'{content_hash(page, 'script')}'" for page in pages)
        styles = " ".join(f"'{content_hash(page, 'style')}'" for page in pages)
        return (
            f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )


def _why_not(error: OSError, host: str, port: int) -> str:
    """Say why it is not possible to listen at an address."""
    if error.errno == errno.EADDRINUSE:
        return (
            f"--port {port}: another program uses it at {host}, perhaps an earlier serve; "
            "end that, or choose another port (0 takes a free one)"
        )
    if error.errno == errno.EACCES:
        return f"--port {port}: {error.strerror}; expected a port from 1024 on"
    return (
        f"--host {host}: {error.strerror}; expected an address of this computer, as 127.0.0.1, "
        "or 0.0.0.0 for all that it has"
    )


def _network_addresses(family: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Return this computer's address in its network, if it is in one. Nothing is sent."""
    somewhere = "2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1"
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((somewhere, 9))
            return [ipaddress.ip_address(probe.getsockname()[0])]
    except OSError:
        return []


class TimedReads(io.RawIOBase):
    """What a client sends until a deadline, however slowly; then it is a TimeoutError."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.deadline = 0.0

    def allow(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self.connection.settimeout(seconds)
        return self.connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """Answers one request, and closes the connection."""

    server: Server
    default_request_version = "HTTP/1.0"  # Answers to older or broken requests have a status too.

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.reads = TimedReads(self.connection)
        self.reads.allow(HEAD_LIMIT)
        self.rfile = io.BufferedReader(self.reads)

    def do_GET(self) -> None:
        self._answer(self._send_page)

    do_HEAD = do_GET  # _send leaves the body out.

    def do_POST(self) -> None:
        self._answer(self._answer_photo)

    def _answer(self, job: Any) -> None:
        try:
            self._check_sender()
            job(self._path_behind_token())
        except Refusal as refusal:
            self._send(refusal.status, "text/plain", f"{refusal}\n".encode(), refusal.headers)

    def _check_sender(self) -> None:
        """Refuse a request that does not mean this computer, or that another site's page sends."""
        hosts = self.headers.get_all("Host", [])
        match = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None:
            raise Refusal(HTTPStatus.BAD_REQUEST, "expected one Host")
        if not self.server.knows_host(match[1] or match[2]):
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                f"{printable(hosts[0])} is not the address of this page; open the printed address",
            )
        origins = self.headers.get_all("Origin", [])
        if origins and origins != [f"http://{hosts[0]}"]:
            raise Refusal(HTTPStatus.FORBIDDEN, "a page of another site may not ask here")

    def _path_behind_token(self) -> str:
        path = urlsplit(self.path).path.encode("latin-1", "replace")
        token, _, rest = path.removeprefix(b"/").partition(b"/")
        if not secrets.compare_digest(token, self.server.token.encode()):
            raise Refusal(
                HTTPStatus.NOT_FOUND,
                "expected the whole address that was printed when this program was started; "
                "each start has its own",
            )
        return rest.decode("latin-1")

    def _send_page(self, path: str) -> None:
        if path == "photo":
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "expected a POST of a photo", Allow="POST")
        if path:
            raise Refusal(HTTPStatus.NOT_FOUND, "there is nothing at this address")
        self._send(HTTPStatus.OK, "text/html", self.server.page)

    def _answer_photo(self, path: str) -> None:
        if path != "photo":
            raise Refusal(
                HTTPStatus.METHOD_NOT_ALLOWED, "photos are sent to .../photo", Allow="GET, HEAD"
            )
        size = self._photo_size()
        names = parse_qs(urlsplit(self.path).query).get("name", ["photo"])
        name = printable(names[0])[:MAX_NAME]
        places = self.server.answers.places
        if not places.acquire(blocking=False):
            raise Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "too many photos are waiting; try again in a moment",
                **{"Retry-After": str(RETRY_AFTER)},
            )
        try:
            answer = self._compute(self._read_photo(size), name)
        finally:
            places.release()
        self._send(HTTPStatus.OK, "application/json", json.dumps(answer).encode())

    def _photo_size(self) -> int:
        sizes = self.headers.get_all("Content-Length", [])
        if not sizes or "Transfer-Encoding" in self.headers:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if len(sizes) > 1 or not re.fullmatch(r"[0-9]{1,18}", sizes[0]):
            raise Refusal(HTTPStatus.BAD_REQUEST, "expected one Content-Length, a whole number")
        if int(sizes[0]) > MAX_BYTES:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"expected a photo of at most {MAX_BYTES:,} bytes, found {int(sizes[0]):,}",
            )
        return int(sizes[0])

    def _read_photo(self, size: int) -> bytes:
        self.reads.allow(PHOTO_LIMIT + size / SLOWEST)
        try:
            data = self.rfile.read(size)
        except TimeoutError:
            raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "the photo came too slowly") from None
        if len(data) < size:
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                f"expected {size:,} bytes as announced, and {len(data):,} came",
            )
        return data

    def _compute(self, data: bytes, name: str) -> dict:
        try:
            return self.server.answers.answer(data, name)
        except UserError as error:
            status, message = HTTPStatus.UNPROCESSABLE_ENTITY, printable(error)
        except Exception as error:  # a defect of ours, which must not end the service
            traceback.print_exc()
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            message = f"{name}: failed ({type(error).__name__}); the terminal shows where"
        raise Refusal(status, message)

    def _send(
        self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self.connection.settimeout(ANSWER_LIMIT)
        self.send_response(status)
        all_headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": self.server.policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            "Connection": "close",
            **(headers or {}),
        }
        for name, value in all_headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, *_: object) -> None:
        """Answer a request that http.server cannot read, or whose method nobody knows."""
        line = printable(message or HTTPStatus(code).phrase)
        self._send(code, "text/plain", f"{line}\n".encode())

    def version_string(self) -> str:
        return "minivit"

    def log_message(self, *_: object) -> None:
        """Print nothing: the page shows what became of a photo."""
