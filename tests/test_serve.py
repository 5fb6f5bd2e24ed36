"""The page to drop a photo on: who may ask what over HTTP, and the page in a real browser.

The browser tests need what test_explorer.py says.
"""

from __future__ import annotations

import base64
import concurrent.futures
import http.client
import io
import json
import os
import re
import socket
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from conftest import TINY, draw_photo, make_tiny, randomize
from PIL import Image
from test_explorer import (
    HOSTILE,
    browser,  # noqa: F401  # a fixture
    find,
    press,
    texts,
    too_wide,
    wait_for,
)
from test_fuzz import mutate, valid_photos

from minivit import Preprocess, ViT, __main__, look, save_pretrained
from minivit.data.photos import PhotoError, open_photo, open_sent_photo
from minivit.figures.explorer import TEMPLATE
from minivit.figures.pages import content_hash, read_template
from minivit.system.files import whole_file
from minivit.tools.serve import answers, command, server
from minivit.tools.serve.answers import Answers
from minivit.tools.serve.server import PAGE, Server

CPU = ("cpu", "off")


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


PHOTO = jpeg(draw_photo(60, 40))


@contextmanager
def running(found: Answers, host: str = "127.0.0.1"):
    """Serve in a thread of this process."""
    with Server(host, 0) as page:
        page.answers = found
        thread = threading.Thread(target=page.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield page
        finally:
            page.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def tiny_answers(tiny_saved) -> Answers:
    return Answers(str(tiny_saved), None, *CPU, None)


@pytest.fixture(scope="module")
def page(tiny_answers):
    """A running server with a tiny model."""
    with running(tiny_answers) as server:
        yield server


@pytest.fixture(scope="module")
def pair(tiny_saved, tmp_path_factory):
    """A running server that compares a tiny model with another one, whose labels are hostile."""
    folder = tmp_path_factory.mktemp("other") / "<b>run"
    folder.mkdir()
    model = randomize(make_tiny(), seed=1)
    hostile = (HOSTILE[key][:500] for key in ("markup", "end of script", "quotes", "long"))
    model.labels = (*hostile, "猫")
    save_pretrained(model, folder)
    with running(Answers(str(folder), str(tiny_saved), *CPU, None)) as server:
        yield server


def ask(page: Server, method="GET", path=None, body=None, **headers) -> tuple[int, dict, bytes]:
    """Send one request; return the status, the headers in lower case, and the body."""
    connection = http.client.HTTPConnection(*page.server_address[:2], timeout=20)
    with closing(connection):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, f"/{page.token}" if path is None else path, body, headers)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, response.read()


def send(page: Server, data=PHOTO, name="cat.jpg", **headers):
    return ask(page, "POST", f"/{page.token}/photo?name={quote(name)}", data, **headers)


def ask_raw(page: Server, request: bytes, *, ends=False) -> bytes:
    """Send these bytes and return all that comes back; with `ends`, say that no more will come."""
    with socket.create_connection(page.server_address[:2], timeout=20) as connection:
        connection.sendall(request)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read()


def post_head(page: Server, *lines: str) -> bytes:
    head = [f"POST /{page.token}/photo HTTP/1.1", "Host: localhost", *lines, "", ""]
    return "\r\n".join(head).encode()


def status_of(answer: bytes) -> int:
    return int(answer.split()[1])


def last_line(answer: bytes) -> str:
    return answer.decode().splitlines()[-1]


# Photos from bytes


def test_sent_bytes_give_the_same_photo_as_their_file(tmp_path):
    for form, data in valid_photos().items():
        (tmp_path / "photo").write_bytes(data)
        sent, read = open_sent_photo(data, "sent"), open_photo(tmp_path / "photo")
        assert sent.size == read.size, form
        assert sent.tobytes() == read.tobytes(), form


def test_the_name_of_sent_bytes_is_never_opened(tmp_path):
    pointer = tmp_path / "pointer.jpg"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(PhotoError, match="not a photo in a known format"):
        open_sent_photo(b"something else", str(pointer))
    with pytest.raises(PhotoError, match=r"^a\.jpg: a Git LFS pointer"):
        open_sent_photo(pointer.read_bytes(), "a.jpg")
    with pytest.raises(PhotoError, match="the file is empty"):
        open_sent_photo(b"", str(tmp_path))


# The answer


def test_the_answer_is_that_of_infer(page, tiny_answers, tmp_path):
    (tmp_path / "cat.jpg").write_bytes(PHOTO)
    status, headers, body = send(page)
    answer = json.loads(body)
    models = tiny_answers.plan.models
    photo = look.prepare_photo(open_photo(tmp_path / "cat.jpg"), models)
    blocks = tiny_answers.plan.blocks
    [expected] = look.explain_photos(models[0], [photo], 0, blocks)
    assert status == 200
    assert headers["content-type"] == "application/json; charset=utf-8"
    assert (answer["photo"], answer["size"]) == ("cat.jpg", [60, 40])
    [model] = answer["models"]
    assert [each["label"] for each in model["predictions"]] == [
        label for label, _, _ in expected.predictions(5)
    ]
    probabilities = [each["probability"] for each in model["predictions"]]
    assert probabilities == pytest.approx([p for _, _, p in expected.predictions(5)], abs=1e-5)
    assert model["notes"] == []
    assert list(blocks) == [8, 9, 10, 11]
    for method in ("attention", "rollout", "relevance"):
        assert f'"name":"{method}"' in answer["page"]


def test_a_photo_is_turned_upright(page):
    exif = Image.Exif()
    exif[0x0112] = 6
    answer = json.loads(send(page, jpeg(draw_photo(60, 40), exif=exif))[2])
    assert answer["size"] == [40, 60]
    thumbnail = base64.b64decode(answer["thumbnail"].partition(",")[2])
    assert Image.open(io.BytesIO(thumbnail)).size == (40, 60)


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_hostile_names_are_only_ever_text(page, name):
    name = name.encode("utf-8", "replace").decode()
    _, _, body = send(page, name=name)
    answer = json.loads(body)
    assert answer["photo"].isprintable()
    assert len(answer["photo"]) <= 200
    assert answer["page"].count("<script") == 2
    assert "<img src=x" not in answer["page"]
    status, headers, body = send(page, b"no photo", name)
    assert (status, headers["content-type"]) == (422, "text/plain; charset=utf-8")
    assert body.decode().count("\n") == 1


def test_a_photo_without_a_name_is_called_photo(page):
    for path in ("photo", "photo?name=", "photo?other=1"):
        body = ask(page, "POST", f"/{page.token}/{path}", PHOTO)[2]
        assert json.loads(body)["photo"] == "photo"


def test_a_model_without_a_classifier_gives_maps_and_a_note(tmp_path):
    model = randomize(ViT(replace(TINY, num_classes=0)))
    model.preprocess = Preprocess((32, 32))
    save_pretrained(model, tmp_path)
    found = Answers(str(tmp_path), None, *CPU, None)
    [model] = found.answer(PHOTO, "cat.jpg")["models"]
    assert model["predictions"] == []
    assert model["notes"] == ["This model has no classifier, so it gives no names."]


def test_two_models_are_answered_in_the_order_before_and_after(pair, tiny_saved):
    answer = json.loads(send(pair)[2])
    assert [each["model"] for each in answer["models"]] == [
        str(tiny_saved),
        pair.answers.plan.models[1].origin.source,
    ]
    assert answer["page"].count("<script") == 2


# Who may ask


def test_the_page_forbids_all_but_its_own_script_and_style(page):
    status, headers, body = ask(page)
    text = body.decode()
    assert status == 200
    policy = dict(part.split(maxsplit=1) for part in headers["content-security-policy"].split(";"))
    for tag in ("script", "style"):
        hashes = [content_hash(read_template(file), tag) for file in (PAGE, TEMPLATE)]
        assert policy[f"{tag}-src"].split() == [f"'{each}'" for each in hashes]
    others = ("default-src", "base-uri", "form-action", "frame-ancestors")
    assert {policy[name] for name in others} == {"'none'"}
    assert policy["connect-src"] == "'self'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert "Python" not in headers["server"]
    assert not re.search(r"https?:|@import|url\(|\son[a-z]+=|\sstyle=|innerHTML", text)
    assert page.token not in text and "SHARED_STYLE" not in text


def test_a_head_is_the_page_without_its_body(page):
    get, head = ask(page), ask(page, "HEAD")
    date = {"date": get[1]["date"]}
    assert (head[0], head[1] | date, head[2]) == (200, get[1], b"")


HOSTS = {
    "127.0.0.1": 200,
    "localhost:9999": 200,  # a tunnel has a port of its own
    "LOCALHOST": 200,
    "[::1]:80": 200,
    "evil.example": 403,
    "localhost.evil.example": 403,
    "127.0.0.1.evil.example": 403,
    "192.0.2.1": 403,
    "evil.example@localhost": 400,
    "localhost:x": 400,
    "": 400,
}


@pytest.mark.parametrize("host", HOSTS)
def test_only_names_of_this_computer_are_answered(page, host):
    status, _, body = ask(page, Host=host)
    assert status == HOSTS[host], body
    assert (b"<html" in body) == (status == 200)


def test_a_request_without_a_host_or_with_two_is_refused(page):
    for lines in ("", "Host: localhost\r\nHost: localhost\r\n"):
        request = f"GET /{page.token} HTTP/1.0\r\n{lines}\r\n"
        assert status_of(ask_raw(page, request.encode())) == 400


ORIGINS = {
    "http://evil.example": 403,
    "null": 403,
    "http://localhost:1": 403,
    "https://localhost:8000": 403,
    "http://localhost:8000": 200,
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_only_the_page_itself_may_send_photos(page, origin):
    status, headers, body = send(page, Host="localhost:8000", Origin=origin)
    assert status == ORIGINS[origin], body
    assert not [name for name in headers if name.startswith("access-control")]


def test_the_token_is_needed_for_everything(page):
    for path in ("/", "/x", "//", f"/{page.token[:-1]}", f"/{page.token}x", "/é", "*", "?"):
        for method, body in (("GET", None), ("POST", PHOTO)):
            path = quote(path, safe="/*?")
            for tail in ("", "/photo"):
                status, _, found = ask(page, method, path + tail, body)
                assert status == 404, (method, path)
                assert page.token.encode() not in found
    assert len(page.token) >= 20
    with Server("127.0.0.1", 0) as other:
        assert other.token != page.token


REQUESTS = {
    "an unknown path": ("GET", "/x", 404),
    "a photo that is asked for": ("GET", "/photo", 405),
    "a photo that is sent to the page": ("POST", "", 405),
    "a method that is not used": ("DELETE", "", 501),
    "the question before a request from elsewhere": ("OPTIONS", "/photo", 501),
    "a method that nobody knows": ("<B>", "", 501),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_other_requests_are_refused_in_one_line(page, what):
    method, path, expected = REQUESTS[what]
    status, headers, body = ask(page, method, f"/{page.token}{path}", PHOTO)
    assert status == expected
    assert headers["content-type"] == "text/plain; charset=utf-8"
    assert headers["x-content-type-options"] == "nosniff"
    assert body.endswith(b"\n")
    assert body.count(b"\n") == 1
    if status == 405:
        assert headers["allow"]


GARBAGE = {
    "no request": (b"\0\1\2 <script>\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "a long address": (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
    "a long header": (b"GET / HTTP/1.1\r\nA: " + b"a" * 70_000 + b"\r\n\r\n", 431),
    "many headers": (b"GET / HTTP/1.1\r\n" + b"A: a\r\n" * 200 + b"\r\n", 431),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "a proxy's request": (b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_what_is_no_request_is_refused_in_one_line(page, what, capfd):
    request, expected = GARBAGE[what]
    answer = ask_raw(page, request)
    assert status_of(answer) == expected, answer
    assert b"nosniff" in answer
    assert b"<script" not in answer
    assert ask(page)[0] == 200
    assert capfd.readouterr() == ("", "")


# How much, and in how much time

LENGTHS = {
    "none": ([], 411),
    "chunked": (["Transfer-Encoding: chunked"], 411),
    "chunked and counted": (["Transfer-Encoding: chunked", "Content-Length: 5"], 411),
    "negative": (["Content-Length: -5"], 400),
    "with a sign": (["Content-Length: +5"], 400),
    "no number": (["Content-Length: 5x"], 400),
    "other digits": (["Content-Length: ٥"], 400),
    "endless": (["Content-Length: " + "9" * 5000], 400),
    "two": (["Content-Length: 5", "Content-Length: 6"], 400),
    "2 GB": (["Content-Length: 2000000000"], 413),
    "one byte too many": (["Content-Length: 390000001"], 413),
    "more than comes": (["Content-Length: 9999"], 400),
    "zero": (["Content-Length: 0"], 422),
    "less than comes": (["Content-Length: 5"], 422),
}


@pytest.mark.parametrize("what", LENGTHS)
def test_a_length_that_is_wrong_is_refused_before_it_is_read(page, what):
    lines, expected = LENGTHS[what]
    answer = ask_raw(page, post_head(page, *lines) + PHOTO, ends=True)
    assert status_of(answer) == expected, answer
    assert page.answers.places._value == answers.MAX_PHOTOS


def test_the_refusal_of_2_gb_arrives_while_they_are_still_sent(page):
    with socket.create_connection(page.server_address[:2], timeout=20) as connection:
        connection.sendall(post_head(page, "Content-Length: 2000000000"))
        for _ in range(20):
            connection.sendall(bytes(1 << 20))
        answer = connection.makefile("rb").read()
    assert status_of(answer) == 413
    assert last_line(answer) == (
        "expected a photo of at most 390,000,000 bytes, found 2,000,000,000"
    )


def test_slow_clients_are_dropped_and_hinder_nobody(page, monkeypatch, capfd):
    monkeypatch.setattr(server, "HEAD_LIMIT", 0.5)
    monkeypatch.setattr(server, "PHOTO_LIMIT", 0.5)
    monkeypatch.setattr(server, "REST_LIMIT", 0.1)
    silent = [socket.create_connection(page.server_address[:2]) for _ in range(30)]
    dripping = socket.create_connection(page.server_address[:2])
    sending = socket.create_connection(page.server_address[:2])
    sending.sendall(post_head(page, "Content-Length: 20") + b"slow")
    assert send(page)[0] == 200
    begun = time.monotonic()
    try:
        while time.monotonic() < begun + 10:
            dripping.send(b"G")
            time.sleep(0.05)
    except OSError:
        pass
    assert time.monotonic() < begun + 5
    for connection in silent:
        connection.settimeout(5)
        assert connection.recv(1) == b""
        connection.close()
    answer = sending.makefile("rb").read()
    assert status_of(answer) == 408
    assert last_line(answer) == "the photo came too slowly"
    dripping.close()
    sending.close()
    assert capfd.readouterr() == ("", "")


def test_more_connections_than_the_limit_are_closed(tiny_answers, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    with running(tiny_answers) as page:
        held = [socket.create_connection(page.server_address[:2]) for _ in range(3)]
        with socket.create_connection(page.server_address[:2], timeout=5) as refused:
            assert refused.recv(1) == b""
        for connection in held:
            connection.close()
        wait_until(lambda: page.connections._value == 3)
        assert ask(page)[0] == 200


def wait_until(holds) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_queue_that_is_full_asks_to_come_again(page):
    for _ in range(answers.MAX_PHOTOS):
        page.answers.places.acquire()
    try:
        status, headers, body = send(page)
        assert ask(page)[0] == 200
    finally:
        page.answers.places.release(answers.MAX_PHOTOS)
    assert (status, headers["retry-after"]) == (503, "2")
    assert body == b"too many photos are waiting; try again in a moment\n"
    assert send(page)[0] == 200


def test_photos_are_computed_one_at_a_time(page, monkeypatch):
    computing = []
    explain_image = answers.explain_image

    def watch(*args):
        computing.append(1)
        assert len(computing) == 1
        time.sleep(0.05)
        found = explain_image(*args)
        computing.pop()
        return found

    monkeypatch.setattr(answers, "explain_image", watch)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: send(page, name=f"{i}.jpg"), range(6)))
    assert [json.loads(body)["photo"] for _, _, body in found] == [f"{i}.jpg" for i in range(6)]


def test_a_tab_that_closes_leaves_no_word_and_no_place_behind(page, monkeypatch, capfd):
    begun, go_on = threading.Event(), threading.Event()
    explain_image = answers.explain_image

    def wait(*args):
        begun.set()
        go_on.wait(20)
        return explain_image(*args)

    monkeypatch.setattr(answers, "explain_image", wait)
    before_the_answer = socket.create_connection(page.server_address[:2])
    before_the_answer.sendall(post_head(page, f"Content-Length: {len(PHOTO)}") + PHOTO)
    begun.wait(20)
    reset(before_the_answer)
    go_on.set()
    before_the_photo = socket.create_connection(page.server_address[:2])
    before_the_photo.sendall(post_head(page, "Content-Length: 1000") + PHOTO[:10])
    time.sleep(0.1)
    reset(before_the_photo)
    wait_until(lambda: page.answers.places._value == answers.MAX_PHOTOS)
    assert send(page)[0] == 200
    assert capfd.readouterr() == ("", "")


def reset(connection: socket.socket) -> None:
    """Close a connection as a browser that is killed does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


def test_a_defect_is_shown_and_does_not_end_the_service(page, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(answers, "explain_image", lambda *_: 1 / 0)
        status, _, body = send(page)
    assert (status, body) == (
        500,
        b"cat.jpg: failed (ZeroDivisionError); the terminal shows where\n",
    )
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert send(page)[0] == 200


# What is kept

_opened: list[tuple] | None = None


def _watch_files(event: str, arguments: tuple) -> None:
    if _opened is not None and event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        _opened.append(arguments)


def test_nothing_is_written_to_disk(page):
    global _opened
    sys.addaudithook(_watch_files)
    _opened = []
    try:
        for data in (PHOTO, b"no photo", *list(valid_photos().values())[::6]):
            send(page, data)
        written = _opened
    finally:
        _opened = None
    assert written == []


def test_photos_are_kept_with_their_answers_if_asked_for(tiny_saved, tmp_path, monkeypatch):
    folder = tmp_path / "kept" / "here"
    found = Answers(str(tiny_saved), None, *CPU, str(folder))
    for name in ("../../Kätze & <b>.jpg", "con", "..", "猫" * 200, "cat.jpg"):
        answer = found.answer(PHOTO, name)
    with pytest.raises(PhotoError):
        found.answer(b"no photo", "bad.jpg")
    files = sorted(folder.iterdir())
    photos = [path for path in files if path.suffix != ".json"]
    assert len(photos) == 5
    assert {path.read_bytes() for path in photos} == {PHOTO}
    assert [re.sub(r"^\d{8}-\d{6}-\d{9}-", "", path.name) for path in photos] == [
        ".._.._Kätze & _b_.jpg",
        "_con",
        "_",
        "猫" * 40,
        "cat.jpg",
    ]
    kept = [json.loads(path.with_name(f"{path.name}.json").read_text()) for path in photos]
    assert kept[0]["photo"] == "../../Kätze & <b>.jpg"
    assert kept[4]["models"] == answer["models"]
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]


def test_a_photo_that_cannot_be_kept_is_answered_all_the_same(
    tiny_saved, tmp_path, monkeypatch, capfd
):
    found = Answers(str(tiny_saved), None, *CPU, str(tmp_path))

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(answers, "whole_file", full)
    [model] = found.answer(PHOTO, "cat.jpg")["models"]
    assert model["notes"] == ["The photo could not be kept (No space left on device)."]
    assert model["predictions"]
    assert capfd.readouterr().err.endswith("could not be kept (No space left on device).\n")
    assert whole_file is not full


# The command


def run_serve(monkeypatch, *flags) -> int:
    """Run the command up to where it would wait for requests."""
    monkeypatch.setattr(Server, "serve_forever", lambda self: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # which the command would set for good
    return __main__.main(["serve", "--device", "cpu", "--amp", "off", *flags])


def test_the_command_prints_where_the_page_is(tiny_saved, monkeypatch, capsys, tmp_path):
    flags = ("--model", str(tiny_saved), "--port", "0")
    assert run_serve(monkeypatch, *flags) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{22}\n", out)
    assert re.fullmatch(rf"model: {tiny_saved}\nready after .* s; Ctrl-C ends it\n", err)

    assert run_serve(monkeypatch, *flags, "--host", "0.0.0.0", "--keep", str(tmp_path)) == 0
    out, err = capsys.readouterr()
    for line in out.splitlines():
        assert re.fullmatch(r"http://[\d.]+:\d+/[\w-]{22}", line)
        assert "0.0.0.0" not in line
    assert (
        "--host 0.0.0.0: everybody who can reach this computer and knows the address below may "
        "send photos; what is sent is not encrypted\n"
    ) in err
    assert f"photos are kept in {tmp_path}\n" in err


def test_what_stops_the_command_is_said_in_one_line(tiny_saved, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    with Server("127.0.0.1", 0) as other:
        port = str(other.server_address[1])
        cases = {
            "another program uses it at 127.0.0.1": ("--port", port),
            "expected an address of this computer": ("--host", "192.0.2.1"),
            "expected the name or number of a host": ("--host", "x" * 70 + ".example"),
            "file: File exists": ("--keep", str(tmp_path / "file")),
            "neither a folder or file here": ("--model", str(tmp_path / "none")),
        }
        for expected, flags in cases.items():
            flags = ("--model", str(tiny_saved), "--port", "0", *flags)
            assert run_serve(monkeypatch, *flags) == 2, expected
            err = capsys.readouterr().err
            assert expected in err.splitlines()[-1], err
            assert len([line for line in err.splitlines() if "model: " not in line]) == 1


@pytest.mark.parametrize("port", ["-1", "65536", "x", "8_0", "٨٠"])
def test_a_port_is_a_number_from_0_to_65535(port, capsys):
    assert __main__.main(["serve", "--port", port]) == 2
    assert "expected a port from 0 to 65535" in capsys.readouterr().err


def test_a_browser_is_opened_only_where_somebody_sits(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stdout", type("Terminal", (), {"isatty": lambda self: True})())
    assert not command.can_show_a_browser()
    monkeypatch.setenv("DISPLAY", ":0")
    assert command.can_show_a_browser()
    monkeypatch.setenv("SSH_CONNECTION", "1 2 3 4")
    assert not command.can_show_a_browser()


def test_the_page_is_served_over_ipv6(tiny_answers):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with running(tiny_answers, "::1") as page:
        [url] = page.urls()
        assert url.startswith("http://[::1]:")
        assert ask(page, Host=urlsplit(url).netloc)[0] == 200
        assert send(page, Origin=url.rpartition("/")[0])[0] == 200
        assert ask(page, Host="evil.example")[0] == 403


def test_a_server_for_the_network_knows_its_names_and_numbers():
    with Server("0.0.0.0", 0) as page:
        for host in ("192.0.2.1", "localhost", "::1", socket.gethostname().upper()):
            assert page.knows_host(host), host
        assert not page.knows_host("evil.example")
        assert page.urls()[0].startswith("http://127.0.0.1:")


# In a browser


@pytest.fixture
def visit(browser):  # noqa: F811
    """Return a function that opens a server's page.

    After the test, the page must have logged no error and asked nobody but its server. `expect`
    holds statuses of answers that the browser may log.
    """
    servers = []
    expect = []

    def open_page(page: Server, width=1280, height=900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", size | {"mobile": width < 500}
        )
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width < 500})
        servers.append(page)
        browser.get(page.urls()[0])
        return browser

    open_page.expect = expect
    browser.get("about:blank")
    (browser.get_log("browser"), browser.get_log("performance"))
    yield open_page
    assert browser.execute_script("return window.pwned") is None
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    errors = browser.get_log("browser")
    unexpected = [
        entry for entry in errors if not any(f"status of {s}" in entry["message"] for s in expect)
    ]
    assert unexpected == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    own = tuple(page.urls()[0].rpartition("/")[0] for page in servers)
    assert [url for url in asked if not url.startswith((*own, "data:", "about:"))] == []
    browser.get("about:blank")


def add_script(name: str) -> str:
    """Return a script that makes a DataTransfer of photos, given as [[name, base64], ...]."""
    return f"""
        const {name} = new DataTransfer();
        for (const [name, data] of arguments[0]) {{
          const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
          {name}.items.add(new File([bytes], name));
        }}
    """


DROP = """
    const at = document.querySelector("h1");
    for (const type of ["dragenter", "dragover", "drop"]) {
      at.dispatchEvent(new DragEvent(type, {dataTransfer: made, bubbles: true}));
    }
"""
PASTE = "document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: made, bubbles: true}));"


def pack(files: dict[str, bytes]) -> list[list[str]]:
    return [[name, base64.b64encode(data).decode()] for name, data in files.items()]


def drop(tab, files: dict[str, bytes]) -> None:
    tab.execute_script(add_script("made") + DROP, pack(files))


def paste(tab, files: dict[str, bytes]) -> None:
    tab.execute_script(add_script("made") + PASTE, pack(files))


def wait_for_answers(tab, count: int) -> None:
    script = "photos.every(({state}) => state === 'done' || state === 'failed')"
    wait_for(tab, f"return photos.length === {count} && {script}")


def in_frame(tab, script: str, *args):
    """Run a script in the explorer, once it has drawn its maps and told its height."""
    # Before that, the frame still loads, and a script that runs there may never return.
    # A frame that is out of sight tells no height.
    tab.execute_script("document.querySelector('iframe').scrollIntoView()")
    wait_for(tab, "return document.querySelector('iframe').style.height")
    tab.switch_to.frame(find(tab, "iframe"))
    try:
        assert tab.execute_script("return window.minivit?.maps.length > 0")
        return tab.execute_script(script, *args)
    finally:
        tab.switch_to.default_content()


def test_dropped_photos_get_names_and_the_explorer(visit, page):
    tab = visit(page)
    assert find(tab, "b").text == "Add a photo"
    assert not find(tab, "#photos").is_displayed()
    names = [HOSTILE["markup"], "two.jpg"]
    drop(tab, {name: jpeg(draw_photo(60, 40 + i)) for i, name in enumerate(names)})
    wait_for_answers(tab, 2)
    assert texts(tab, ".strip bdi.small") == names
    assert find(tab, "#count").text == "2 photos"
    best = json.loads(send(page, jpeg(draw_photo(60, 40)))[2])["models"][0]["predictions"][0]
    shown = " ".join(texts(tab, ".name > *"))
    assert shown == f"{best['label']} {100 * best['probability']:.1f}%"
    assert in_frame(tab, "return document.querySelector('h1').textContent") == names[0]
    assert in_frame(tab, "return minivit.maps.length") == 1
    assert in_frame(tab, "return origin") == "null"  # The frame can reach nothing of the page.
    assert find(tab, "#status").get_attribute("textContent").startswith("two.jpg: thing")
    assert not tab.execute_script("return document.body.classList.contains('dragging')")


def test_a_frame_is_as_tall_as_its_explorer(visit, page):
    def is_as_tall() -> bool:
        """Compare both now: the page inside still grows, as when its pictures are decoded."""
        inside = in_frame(tab, "return Math.ceil(document.body.getBoundingClientRect().height)")
        frame = tab.execute_script("return document.querySelector('iframe').style.height")
        return abs(float(frame.removesuffix("px") or 0) - inside) <= 1

    for width, height in ((1280, 900), (390, 844)):
        tab = visit(page, width, height)
        drop(tab, {"cat.jpg": PHOTO})
        wait_for_answers(tab, 1)
        wait_until(is_as_tall)
        assert too_wide(tab) <= 0
        hidden = "document.documentElement.scrollHeight - innerHeight"
        assert in_frame(tab, f"return {hidden}") <= 0


def test_a_photo_is_pasted(visit, page):
    tab = visit(page)
    paste(tab, {"image.png": PHOTO})
    wait_for_answers(tab, 1)
    paste(tab, {})
    assert find(tab, "#problem").text == "There is no photo in the clipboard."


def test_photos_that_are_dropped_or_pasted_on_the_explorer_are_answered(visit, page):
    tab = visit(page)
    drop(tab, {"first.jpg": PHOTO})
    wait_for_answers(tab, 1)
    for count, (name, event) in enumerate({"second.jpg": DROP, "third.jpg": PASTE}.items(), 2):
        # The page replaces the frame at once, and the script must have returned by then.
        later = f"{add_script('made')} setTimeout(() => {{ {event} }})"
        in_frame(tab, later, pack({name: PHOTO}))
        wait_for_answers(tab, count)
    assert texts(tab, ".strip bdi.small") == [
        "first.jpg",
        "second.jpg",
        "third.jpg",
    ]


def test_a_link_that_is_dropped_is_explained(visit, page):
    tab = visit(page)
    drop(tab, {})
    assert find(tab, "#problem").text.startswith("That was no photo.")
    assert tab.execute_script("return photos.length") == 0


def test_the_same_photo_is_chosen_twice_and_removed(visit, page, tmp_path):
    (tmp_path / "cat.jpg").write_bytes(PHOTO)
    tab = visit(page)
    for count in (1, 2):
        find(tab, "#files").send_keys(str(tmp_path / "cat.jpg"))
        wait_for_answers(tab, count)
    find(tab, "#clear").click()
    assert not find(tab, "#photos").is_displayed()
    assert not find(tab, "#answer").is_displayed()
    assert tab.execute_script("return document.activeElement.id") == "files"


def test_the_page_is_used_without_a_mouse(visit, page):
    tab = visit(page)
    reached = []
    for _ in range(2):
        press(tab, "\ue004")
        reached.append(tab.execute_script("return document.activeElement.id"))
    assert reached == ["files", "camera"]
    outline = "getComputedStyle(document.activeElement.closest('.button, button')).outlineStyle"
    assert tab.execute_script(f"return {outline}") == "solid"
    drop(tab, {f"{i}.jpg": PHOTO for i in range(3)})
    wait_for_answers(tab, 3)
    tab.execute_script("photos[0].button.focus()")
    press(tab, "\ue014")
    press(tab, "\ue014")
    press(tab, "\ue012")
    assert tab.execute_script("return [shown.name, document.activeElement === shown.button]")
    current = tab.execute_script("return [...document.querySelectorAll('[aria-current]')]")
    assert [button.get_attribute("title") for button in current] == ["1.jpg"]


@pytest.mark.parametrize("width", [1280, 390])
def test_before_and_after_stand_side_by_side(visit, pair, width):
    tab = visit(pair, width, 844)
    drop(tab, {HOSTILE["right to left"]: PHOTO})
    wait_for_answers(tab, 1)
    assert in_frame(tab, "return minivit.maps.length") == 2
    cards = tab.find_elements("css selector", ".models article")
    assert [card.text[:7] for card in cards] == ["before:", "after: "]
    left = [card.rect["x"] for card in cards]
    assert (left[0] < left[1]) == (width == 1280)
    assert too_wide(tab) <= 0
    assert in_frame(tab, "return document.documentElement.scrollWidth - innerWidth") <= 0
    labels = {label.text for label in tab.find_elements("css selector", ".name bdi")}
    assert len(labels) == 2
    assert all(card.rect["height"] < 260 for card in cards)  # whatever the length of a name


def test_a_camera_that_is_denied_is_explained(visit, page):
    tab = visit(page)
    permission = {"permission": {"name": "camera"}, "origin": page.urls()[0].rpartition("/")[0]}
    tab.execute_cdp_cmd("Browser.setPermission", permission | {"setting": "denied"})
    find(tab, "#camera").click()
    wait_for(tab, "return document.getElementById('problem').textContent")
    assert find(tab, "#problem").text.startswith("The camera was not allowed.")
    assert not find(tab, "dialog").is_displayed()

    tab.execute_cdp_cmd("Browser.setPermission", permission | {"setting": "granted"})
    find(tab, "#camera").click()
    wait_for(tab, "return !document.getElementById('shoot').disabled")
    find(tab, "#shoot").click()
    wait_for_answers(tab, 1)
    assert find(tab, "#problem").text == ""
    assert texts(tab, ".strip bdi.small")[0].startswith("camera ")
    assert tab.execute_script("return video.srcObject") is None


def test_a_phone_is_offered_its_own_camera(visit, page, tmp_path):
    (tmp_path / "image.jpg").write_bytes(PHOTO)
    tab = visit(page, 390, 844)
    assert not find(tab, "#camera").is_displayed()
    assert find(tab, "#native").is_displayed()
    assert find(tab, "#capture").get_attribute("capture") == "environment"
    assert not find(tab, ".mouse").is_displayed()
    find(tab, "#capture").send_keys(str(tmp_path / "image.jpg"))
    wait_for_answers(tab, 1)


def bad_photos(count: int) -> dict[str, bytes]:
    """Return broken photos, which cannot be read, of every format."""
    rng, valid, bad = np.random.default_rng(0), valid_photos(), {}
    forms = list(valid)
    for case in range(10_000):
        form = forms[case % len(forms)]
        data = mutate(valid[form], list(valid.values()), rng)
        try:
            open_sent_photo(data, form)
        except PhotoError:
            bad[f"{len(bad)} {form}.jpg"] = data
        if len(bad) == count:
            break
    return bad


def test_30_bad_files_are_named_one_by_one(visit, page):
    visit.expect.append(422)
    tab = visit(page)
    bad = bad_photos(30)
    drop(tab, bad | {"cat.jpg": PHOTO})
    wait_for_answers(tab, 31)
    states = tab.execute_script("return photos.map(({state, error}) => [state, error])")
    assert [state for state, _ in states] == ["failed"] * 30 + ["done"]
    for name, (_, error) in zip(bad, states):
        assert error.startswith(f"{name}: ")
        assert len(error) < 300
    assert find(tab, "#answer [role=alert]").text == states[0][1]
    assert too_wide(tab) <= 0


def test_two_tabs_are_both_answered(visit, page, monkeypatch):
    visit.expect.append(503)
    monkeypatch.setattr(page.answers, "places", threading.BoundedSemaphore(1))
    monkeypatch.setattr(server, "RETRY_AFTER", 0.05)
    tab = visit(page)
    first = tab.current_window_handle
    tab.switch_to.new_window("tab")
    try:
        tab.get(page.urls()[0])
        photos = {f"{i}.jpg": PHOTO for i in range(4)}
        drop(tab, photos)
        second = tab.current_window_handle
        tab.switch_to.window(first)
        drop(tab, photos)
        for handle in (first, second):
            tab.switch_to.window(handle)
            wait_for_answers(tab, 4)
            assert tab.execute_script("return photos.every(({state}) => state === 'done')")
    finally:
        tab.switch_to.window(second)
        tab.close()
        tab.switch_to.window(first)


def test_a_photo_that_is_too_large_is_not_sent(visit, page):
    tab = visit(page)
    tab.execute_script("data.max_bytes = 1000000; ")
    drop(tab, {"large.jpg": bytes(1_000_001)})
    wait_for_answers(tab, 1)
    assert find(tab, "#answer [role=alert]").text == (
        "large.jpg: expected a photo of at most 1 MB; scale it down"
    )


def test_a_server_that_has_ended_is_named(visit, tiny_answers, monkeypatch):
    # Browsers hold a spare connection, which outlives the server in this process.
    monkeypatch.setattr(server, "HEAD_LIMIT", 0.2)
    with running(tiny_answers) as ended:
        tab = visit(ended)
        time.sleep(0.5)
    drop(tab, {"cat.jpg": PHOTO})
    wait_for_answers(tab, 1)
    assert find(tab, "#answer [role=alert]").text == (
        "cat.jpg: no answer; is minivit still running?"
    )
    tab.get_log("browser")  # that the connection was refused


@pytest.mark.slow
def test_a_photo_of_64_megapixels_is_answered(visit, page, tmp_path):
    Image.new("RGB", (9248, 6936), "teal").save(tmp_path / "phone.jpg", quality=30)
    tab = visit(page)
    find(tab, "#files").send_keys(str(tmp_path / "phone.jpg"))
    wait_for_answers(tab, 1)
    assert tab.execute_script("return photos[0].answer.size") == [9248, 6936]
    assert len(Path(tmp_path / "phone.jpg").read_bytes()) < 2_000_000
