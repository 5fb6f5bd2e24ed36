"""Recognise what an incomplete download leaves in place of a file."""

from __future__ import annotations

import os

# How such a file begins, in lower case, what it then is, and what to do.
STAND_INS = (
    (
        b"version https://git-lfs.github.com/spec",
        "a Git LFS pointer in place of the file; run `git lfs pull` where it was cloned",
    ),
    (b"<!doctype html", "a web page in place of the file; download it again"),
    (b"bplist00", "what iCloud leaves in place of a file; download the file from there"),
    (b"<html", "a web page in place of the file; download it again"),
    (b"entry not found", "the Hub's answer that there is no such file; check its name and address"),
    (b"repository not found", "the Hub's answer that there is no such repository; check its name"),
    (
        b"invalid username or password",
        "the Hub's refusal in place of the file; log in with `hf auth login`, then get it again",
    ),
    (
        b"access to model",
        "the Hub's refusal in place of the file; ask for access, then get it again",
    ),
)


def stand_in(path: str | os.PathLike[str]) -> str:
    """Say what a file is if it only stands in for another, and what to do; "" for any other file.

    Never raises and never waits: it is called to explain why a file could not be read.
    """
    try:
        # Without this flag, opening a named pipe would wait for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return ""
    try:
        start = os.read(descriptor, 200)
    except OSError:  # a folder, for example
        return ""
    finally:
        os.close(descriptor)
    return explain_stand_in(start)


def explain_stand_in(data: bytes) -> str:
    """Say the same of a file that begins with these bytes."""
    start = data[:200].lstrip().lower()
    for beginning, explanation in STAND_INS:
        if start.startswith(beginning):
            return explanation
    return ""
