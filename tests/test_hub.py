"""Downloads from a local server that speaks the Hub's protocol.

The cache, revisions, tokens, interrupted downloads, and a line for each fault.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, assert_one_line, randomize, run_python
from hub_server import COMMIT, TOKEN, serve
from safetensors.torch import load_file, save_file

from minivit import Preprocess, ViT, load_pretrained, save_pretrained
from minivit.checkpoints.network import explain_failure

FETCH = """
import hashlib, sys, time
time.sleep = lambda seconds: None  # between huggingface-hub's attempts
from minivit.errors import UserError
from minivit.checkpoints.hub import fetch
try:
    files = fetch(sys.argv[1], (sys.argv + [None])[2])
except UserError as error:
    sys.exit(str(error))
hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (files.config, *files.weights)]
print(files.commit, *hashes)
assert "torch" not in sys.modules  # what makes these tests fast
"""
LOAD = """
import sys
from minivit import load_pretrained
model = load_pretrained(sys.argv[1])
print(model.origin.commit, len(model.labels), model.head.bias.sum().item())
"""


def get(hub, cache, *args, **environment):
    """Fetch a checkpoint's files in a new process."""
    return run_python(["-c", FETCH, *(args or ("owner/tiny",))], hub, cache, **environment)


def expected(folder: Path, weights=("model.safetensors",)) -> str:
    hashes = (
        hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("config.json", *weights)
    )
    return " ".join([COMMIT, *hashes]) + "\n"


def test_what_is_fetched_is_loaded(hub, tmp_path, tiny_folder):
    done = run_python(["-c", LOAD, "owner/tiny"], hub, tmp_path / "cache")
    assert done.stdout == f"{COMMIT} 5 {load_pretrained(tiny_folder).head.bias.sum().item()}\n", (
        done.stderr
    )


def incomplete_or_whole(cache: Path) -> list[Path]:
    """Return every file in the cache that claims to be a whole file of weights."""
    return [path for path in cache.rglob("*.safetensors") if path.exists()]


def test_a_download_shows_its_progress_and_is_cached_for_offline_use(hub, tmp_path, tiny_folder):
    master, slave = os.openpty()  # bars are for terminals
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }
    environment["HF_HUB_OFFLINE"] = "0"
    command = [sys.executable, "-c", FETCH, "owner/tiny"]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=slave,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )
    assert done.stdout == expected(tiny_folder)
    assert os.read(master, 100_000).decode().count("100%") == 3  # a bar for each file
    os.close(master), os.close(slave)
    hub.requests.clear()
    offline = get(hub, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert offline.stdout == expected(tiny_folder), offline.stderr
    assert hub.requests == []
    assert "it is not in the local cache" in get(hub, tmp_path / "empty", HF_HUB_OFFLINE="1").stderr


def test_a_revision_is_pinned_and_its_commit_recorded(hub, tmp_path, tiny_folder):
    done = get(hub, tmp_path / "cache", "owner/tiny", "v1")
    assert done.stdout == expected(tiny_folder), done.stderr
    assert all("/v1/" in path or f"/{COMMIT}/" in path for _, path in hub.requests)
    # All later files come from the commit of the first one.
    assert sum(f"/{COMMIT}/" in path for _, path in hub.requests) > 1
    wrong = get(hub, tmp_path / "cache", "owner/tiny", "v9")
    assert f"no revision 'v9' on {hub.url}" in wrong.stderr


def test_shards_and_pickles_come_from_the_hub_too(hub, tmp_path, tiny_folder):
    tensors = load_file(tiny_folder / "model.safetensors")
    names = sorted(tensors)
    (tiny_folder / "model.safetensors").unlink()
    weight_map = {}
    for i, part in enumerate((names[:50], names[50:])):
        save_file({name: tensors[name] for name in part}, tiny_folder / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    index = tiny_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    shards = ("model-0.safetensors", "model-1.safetensors")
    assert get(hub, tmp_path / "1").stdout == expected(tiny_folder, shards)
    index.unlink()
    torch.save(tensors, tiny_folder / "pytorch_model.bin")
    done, pickled = get(hub, tmp_path / "2"), ("pytorch_model.bin",)
    assert done.stdout == expected(tiny_folder, pickled), done.stderr
    assert get("http://127.0.0.1:9", tmp_path / "2").stdout == expected(
        tiny_folder, pickled
    )  # offline, by its cached names
    (tiny_folder / "pytorch_model.bin").unlink()
    assert "or pytorch_model.bin on" in get(hub, tmp_path / "3").stderr


def test_a_download_cut_in_the_middle_goes_on_where_it_ended(tmp_path):
    # The file has 28 MB, of which huggingface-hub keeps 10 MB at a time.
    model = randomize(ViT(replace(TINY, embed_dim=384, mlp_dim=1536, depth=4)))
    model.labels, model.preprocess = tuple("abcde"), Preprocess((32, 32))
    save_pretrained(model, tmp_path)
    with serve(tmp_path) as hub:
        hub.fault = "cut once"
        done = get(hub, tmp_path / "cache")
    assert done.stdout == expected(tmp_path), done.stderr
    assert len(hub.starts) == 2
    assert hub.starts[1] >= 10_000_000


def test_a_download_that_stays_cut_loads_nothing_and_resumes_later(hub, tmp_path, tiny_folder):
    hub.fault = "cut"
    done = get(hub, tmp_path / "cache")
    assert_one_line(done, "cannot fetch model.safetensors from", "try again")
    assert incomplete_or_whole(tmp_path / "cache") == []
    assert get(hub, tmp_path / "cache", HF_HUB_OFFLINE="1").returncode == 1
    hub.fault = None
    done = get(hub, tmp_path / "cache")
    assert done.stdout == expected(tiny_folder), done.stderr


FAULTS = {
    "401": ("no such model on", "hf auth login"),
    "gated": ("a gated model", "ask for access at", "HF_TOKEN"),
    "429": ("it answers 429, too many requests", "try later"),
    "500": ("it answers 500", "try later"),
    "wrong size": ("cannot fetch model.safetensors", "try again"),
    "wrong hash": ("is damaged: its SHA-256 is", "it was deleted, so try again"),
}


@pytest.mark.parametrize("fault, parts", FAULTS.items(), ids=FAULTS)
def test_a_fault_of_the_hub_is_one_line_that_says_what_to_do(
    fault, parts, hub, tmp_path, tiny_folder
):
    hub.fault = fault
    assert_one_line(get(hub, tmp_path / "cache"), hub.url, *parts)
    assert incomplete_or_whole(tmp_path / "cache") == []
    if fault in ("401", "gated"):
        done = get(hub, tmp_path / "cache", HF_TOKEN=TOKEN)
        assert done.stdout == expected(tiny_folder), done.stderr
    else:
        hub.fault = None
        assert get(hub, tmp_path / "cache").stdout == expected(tiny_folder)
        hub.fault = fault  # what is cached does not need the Hub
        assert get(hub, tmp_path / "cache").stdout == expected(tiny_folder)


FULL = """
import builtins, io, sys
class Full(io.FileIO):
    def write(self, data): raise OSError(28, "No space left on device")
real = io.open
def opened(file, mode="r", *args, **more):
    full = str(file).endswith(".incomplete") and mode in ("ab", "wb", "r+b")
    return Full(file, "w") if full else real(file, mode, *args, **more)
builtins.open = io.open = opened
import pathlib
pathlib.Path.open = lambda self, mode="r", *args, **more: opened(str(self), mode, *args, **more)
"""


def test_a_full_disk_is_one_line_that_says_what_to_do(hub, tmp_path):
    done = run_python(["-c", FULL + FETCH, "owner/tiny"], hub, tmp_path / "cache")
    assert_one_line(done, "No space left on device", "make room, or set HF_HOME to another disk")
    assert incomplete_or_whole(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_to_is_one_line_that_says_what_to_do(hub, tmp_path):
    (tmp_path / "home").write_text("a file stands for a folder that may not be written to")
    done = get(hub, tmp_path / "home" / "cache")
    assert_one_line(done, "set HF_HOME to a folder that you may write to")


def test_a_hub_id_that_is_none_is_one_line(hub, tmp_path):
    assert_one_line(
        get(hub, tmp_path / "cache", "a/b/c/d"), "neither a folder or file here nor a Hub id"
    )
    assert_one_line(
        get(hub, tmp_path / "cache", "owner/other"),
        "no such folder here",
        "no such model on",
    )


@pytest.mark.parametrize("how", ["refused", "silent"])
def test_a_hub_that_does_not_answer_is_asked_once_for_a_few_seconds(how, tmp_path):
    code = (
        "from minivit.checkpoints import hub; assert hub.TIMEOUT_S < 10; hub.TIMEOUT_S = 0.3\n"
        + FETCH
    )
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if how == "silent":
            silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        timeouts = {
            "HF_HUB_ETAG_TIMEOUT": "9999",
            "HF_HUB_DOWNLOAD_TIMEOUT": "9999",
        }  # huggingface-hub's own
        done = run_python(["-c", code, "owner/tiny"], url, tmp_path, **timeouts)
    assert_one_line(
        done,
        f"cannot fetch config.json from {url}",
        "refuses the connection" if how == "refused" else "does not answer in time",
        "--model FOLDER",
    )


def test_a_certificate_that_is_not_trusted_is_named(tmp_path, tiny_folder):
    """Its authority can then be named, and nothing else has to be."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl, which makes the certificate")
    certificate = tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-keyout", certificate, "-out", tmp_path / "own.pem", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    with certificate.open("ab") as file:
        file.write((tmp_path / "own.pem").read_bytes())
    with serve(tiny_folder, certificate) as hub:
        refused = get(hub, tmp_path / "cache")
        authority = {"SSL_CERT_FILE": str(tmp_path / "own.pem")}
        authority["REQUESTS_CA_BUNDLE"] = authority["SSL_CERT_FILE"]
        trusted = get(hub, tmp_path / "cache", **authority)
    assert_one_line(refused, f"{hub.url} (its certificate is not trusted (self", "SSL_CERT_FILE")
    assert trusted.stdout == expected(tiny_folder), trusted.stderr


CAUSES = {
    "offline mode": ({"HF_HUB_OFFLINE": "1"}, "(offline mode is on: unset HF_HUB_OFFLINE"),
    "SOCKS proxy": ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "(the proxy socks5://127.0.0.1:9 "),
    "proxy": ({"HTTP_PROXY": "http://me:secret@127.0.0.1:9"}, "(the proxy 127.0.0.1:9 refuses"),
    "token": ({"HF_TOKEN": "hf_é"}, "(HF_TOKEN holds a character that no HTTP header can"),
    "name": ({"HF_ENDPOINT": "http://a.invalid"}, "(the name of a.invalid cannot be resolved"),
    "no address": ({"HF_ENDPOINT": "huggingface.co"}, "(HF_ENDPOINT is no address of a server"),
}


@pytest.mark.parametrize("environment, reason", CAUSES.values(), ids=CAUSES)
def test_what_keeps_the_hub_away_is_named(environment, reason, hub, tmp_path):
    done = get(hub, tmp_path / "cache", **{"NO_PROXY": "", "no_proxy": ""} | environment)
    assert_one_line(done, reason, "it is not in the local cache")
    assert "secret" not in done.stderr
    assert hub.requests == []


def chain(*errors):
    """Return the first error, caused by the second, and so on."""
    for error, cause in zip(errors, errors[1:]):
        error.__cause__ = cause
    return errors[0]


class ConnectError(Exception):
    """What an HTTP library raises for most causes."""


def answer(status):
    error = OSError(f"an answer of {status}")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    "error, reason",
    [
        (answer(429), "it answers 429, too many requests: try later"),
        (answer(502), "it answers 502, an error on its side: try later"),
        (answer(407), "the proxy answers 407"),
        (answer(404), "an answer of 404"),
        (chain(ConnectError("x"), ssl.SSLError(1, "wrong version")), "no encrypted connection"),
        (chain(ConnectError("x"), OSError(errno.ENETUNREACH, "x")), "it cannot be reached from"),
        (chain(ConnectError("x"), ConnectionResetError(errno.ECONNRESET, "x")), "it cut the"),
        (chain(ConnectError("x"), TimeoutError("timed out")), "it does not answer in time"),
        (chain(ConnectError("x"), socket.gaierror(-2, "x")), "the name of hub.test cannot be"),
        (ValueError("Unknown scheme for proxy URL"), "does not let it through"),
        (ConnectError("a line\nand another"), "a line"),
        (ConnectError(), "ConnectError"),
    ],
    ids=str,
)
def test_each_cause_of_a_failure_has_its_reason(error, reason, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    assert reason in explain_failure(error, "http://hub.test")


def test_a_reason_is_that_of_the_proxy_where_there_is_one(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy.test:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    error = chain(ConnectError("x"), ConnectionRefusedError(errno.ECONNREFUSED, "x"))
    reason = explain_failure(error, "http://hub.test")
    assert reason == "the proxy proxy.test:3128 refuses the connection: nothing listens there"
    monkeypatch.setenv("no_proxy", "hub.test")
    assert explain_failure(error, "http://hub.test").startswith("it refuses the connection")
