"""The one exception that means "the user can mend this", and how anything is said in one line."""


class UserError(ValueError):
    """Says what was expected, what was found and what to do; never a defect of ours."""


def printable(text: object) -> str:
    """Return text as one line that cannot steer a terminal: control characters and undecodable bytes as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in str(text)
    )
