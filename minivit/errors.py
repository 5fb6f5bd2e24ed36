"""The error that a user can mend, and helpers that put names and text into its message."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can correct, reported in one line and with exit code 2.

    The message says what was expected, what was found and what to do. Defects of minivit itself
    raise other exceptions.
    """


def first_few(names: Iterable[object], limit: int = 3, separator: str = ", ") -> str:
    """Return the first `limit` names in one string, with "..." at the end if there are more."""
    shown = [str(name) for name in names]
    if len(shown) > limit:
        shown[limit:] = ["..."]
    return separator.join(shown)


def printable(text: object) -> str:
    """Return text as one line that is safe to print to a terminal.

    Control characters and bytes that could not be decoded are replaced by escapes.
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode()
        for char in line
    )
