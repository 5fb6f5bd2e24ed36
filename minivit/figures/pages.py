"""What the HTML pages share: one style, untrusted names as data, and a policy against all else.

A page's template is an HTML file with SHARED_STYLE in its <style>, and PAGE_DATA where its script
reads JSON. SCRIPT_HASH and STYLE_HASH stand in its Content-Security-Policy.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from ..system.files import whole_file

STYLE = Path(__file__).with_name("pages.css")


def read_template(path: Path) -> str:
    """Return a template with its style and with the hashes that its policy allows."""
    page = path.read_text(encoding="utf-8")
    page = page.replace("SHARED_STYLE", STYLE.read_text(encoding="utf-8").strip())
    for tag in ("script", "style"):
        page = page.replace(f"{tag.upper()}_HASH", content_hash(page, tag))
    return page


def content_hash(page: str, tag: str) -> str:
    """Return the hash by which a Content-Security-Policy allows a page's <script> or <style>."""
    content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    digest = hashlib.sha256(content.encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode()


def fill_template(path: Path, data: Mapping[str, object]) -> str:
    """Return the page of a template with data, in which no text can end the page's <script>."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return read_template(path).replace("PAGE_DATA", text)


def write_page(path: Path, page: str) -> None:
    """Write a page, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_bytes(page.encode())


def encode_jpeg(picture: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def data_url(jpeg: bytes) -> str:
    """Return the bytes of a JPEG as a URL that a page shows without loading anything."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def thumbnail_url(photo: Image.Image, side: int) -> str:
    """Return a small copy of a photo, with sides of up to `side` pixels, as a data URL."""
    small = photo.copy()
    small.thumbnail((side, side))
    return data_url(encode_jpeg(small, quality=80))
