"""Say in plain words why the Hub could not be reached, whatever HTTP library huggingface-hub uses.

An error's type says little: for most causes it is the same "connect error". The cause is an
exception further down its chain.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
CUT = (errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED)


def status_of(error: BaseException) -> int:
    """Return the HTTP status of an error, or 0 if there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def explain_failure(error: BaseException, endpoint: str) -> str:
    """Say why a request to `endpoint` failed, and what to do where that is known.

    Of a cause that is not known, this is the first line that the library says.
    """
    status = status_of(error)
    if status:
        return _explain_status(status, error)
    for cause in _chain(error):
        reason = _explain_cause(cause, endpoint)
        if reason:
            return reason
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what caused it, and so on."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _explain_status(status: int, error: BaseException) -> str:
    if status == 429:
        return "it answers 429, too many requests: try later"
    if status >= 500:
        return f"it answers {status}, an error on its side: try later"
    if status == 407:
        return "the proxy answers 407: it asks for a user and a password in HTTPS_PROXY"
    return first_line(error)


def _explain_cause(cause: BaseException, endpoint: str) -> str:
    """Say what one exception of a chain means, or return "" if it tells too little."""
    kind = type(cause).__name__
    words = first_line(cause)
    if kind == "OfflineModeIsEnabled":
        return "offline mode is on: unset HF_HUB_OFFLINE to allow downloads"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({cause.verify_message}): if your network has a "
            "certificate authority of its own, name its file in SSL_CERT_FILE and "
            "REQUESTS_CA_BUNDLE"
        )
    if isinstance(cause, ssl.SSLError):
        return f"no encrypted connection ({words}): check HF_ENDPOINT and HTTPS_PROXY"
    if _is_about_header(cause):
        return f"{_token_name()} holds a character that no HTTP header can: set it again"
    if "SOCKS" in words:
        return f"{_proxy_name(endpoint)} is a SOCKS proxy, which needs another package ({words})"
    if kind in ("UnsupportedProtocol", "MissingSchema", "InvalidSchema", "InvalidURL"):
        return f"HF_ENDPOINT is no address of a server ({words})"
    if kind == "ProxyError" or "proxy" in words.lower():
        return f"{_proxy_name(endpoint)} does not let it through ({words})"
    return _explain_system_error(cause, endpoint)


def _is_about_header(cause: BaseException) -> bool:
    """Return whether a header, of which only that of the token is the user's, cannot be sent."""
    if isinstance(cause, UnicodeEncodeError):
        return "Bearer" in cause.object
    return type(cause).__name__ in ("LocalProtocolError", "InvalidHeader")


def _explain_system_error(cause: BaseException, endpoint: str) -> str:
    """Say what an error of the operating system means for a connection."""
    subject = _proxy_name(endpoint) or "it"
    if isinstance(cause, socket.gaierror):
        host = _proxy_name(endpoint) or urlsplit(endpoint).hostname
        return f"the name of {host} cannot be resolved: check the connection"
    if isinstance(cause, TimeoutError):
        return f"{subject} does not answer in time: check the connection"
    if isinstance(cause, ConnectionRefusedError):
        return f"{subject} refuses the connection: nothing listens there"
    if not isinstance(cause, OSError):
        return ""
    if cause.errno in UNREACHABLE:
        return f"{subject} cannot be reached from this network: check the connection"
    if cause.errno in CUT:
        return f"{subject} cut the connection: try again"
    certificates = os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")
    if cause.errno == errno.ENOENT and certificates and not Path(certificates).exists():
        return f"SSL_CERT_FILE or SSL_CERT_DIR names {certificates}, which does not exist"
    return ""


def _proxy_name(endpoint: str) -> str:
    """Return how messages call the proxy that the environment names for an address, if any.

    A user and a password in it are left out.
    """
    parts = urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    if not address or urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    return f"the proxy {address.rpartition('@')[2]}"


def _token_name() -> str:
    """Return where the token lies that huggingface-hub sends."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return name
    return "the saved token (`hf auth login`)"
