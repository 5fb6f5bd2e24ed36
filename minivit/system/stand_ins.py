"""Recognise what an incomplete download leaves in place of a file."""

from __future__ import annotations

from pathlib import Path

# How such a file begins, in lower case, what it then is, and what to do.
STAND_INS = (
    (
        b"version https://git-lfs.github.com/spec",
        "a Git LFS pointer in place of the file; run `git lfs pull` where it was cloned",
    ),
    (b"<!doctype html", "a web page in place of the file; download it again"),
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


def stand_in(path: Path) -> str:
    """Say what a file is if it only stands in for another, and what to do; "" for any other file.

    Never raises: it is called to explain why a file could not be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(200).lstrip().lower()
    except OSError:
        return ""
    for beginning, explanation in STAND_INS:
        if start.startswith(beginning):
            return explanation
    return ""
