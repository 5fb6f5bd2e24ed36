"""Find folders in which something of this user's can be kept, also for users without a home."""

from __future__ import annotations

import getpass
import os
import stat
import sys
import tempfile
from pathlib import Path


def ensure_home() -> None:
    """Give this process a temporary home and a user name where it has none.

    A container that runs under a number of its own has neither HOME nor an entry in the list of
    users. Libraries that keep caches would then write into a folder that is literally named `~`,
    and torch.compile would fail. A home that is made up is named on stderr.
    """
    try:
        getpass.getuser()
    except (KeyError, ImportError, OSError):  # From Python 3.13 on, always the last.
        os.environ["USER"] = _temporary_home().name
    home = Path(os.path.expanduser("~"))
    if not home.is_absolute():
        folder = _make_temporary_home()
        variable = "USERPROFILE" if sys.platform == "win32" else "HOME"
        os.environ[variable] = str(folder)
        message = f"{variable} is not set; what is kept for later runs goes into {folder}"
        print(message, file=sys.stderr)
    elif not os.access(home, os.W_OK) and "MPLCONFIGDIR" not in os.environ:
        # matplotlib would make a temporary folder in each process, and complain.
        os.environ["MPLCONFIGDIR"] = str(_make_temporary_home() / "matplotlib")


def cache_folders() -> list[Path]:
    """Return the folders in which files can be kept for later runs, best first.

    They are the user's cache folder and one for temporary files. Either may not exist or not be
    writable, or be missing from the list: the first without a home, the second if its name is
    taken.
    """
    folders = []
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    # Without a home, `~` stays as it is. The standard wants relative paths ignored.
    if cache.is_absolute():
        folders.append(cache / "minivit")
    temporary = _temporary_home()
    if not os.path.lexists(temporary) or _is_own_folder(temporary):
        folders.append(temporary)
    return folders


def _temporary_home() -> Path:
    """Return the path of a folder for temporary files that is the same for each of our runs."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    return Path(tempfile.gettempdir(), f"minivit-{user}")


def _make_temporary_home() -> Path:
    """Make the folder for temporary files, or one of another name if that one is taken."""
    folder = _temporary_home()
    if not _is_own_folder(folder):
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            folder = Path(tempfile.mkdtemp(prefix="minivit-"))
    return folder


def _is_own_folder(path: Path) -> bool:
    """Return whether this is a folder of this user's, and not a link that somebody else made."""
    try:
        status = path.lstat()
    except OSError:
        return False
    is_own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return stat.S_ISDIR(status.st_mode) and is_own
