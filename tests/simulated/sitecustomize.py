"""Let minivit's modules see what Windows or macOS would show them, as far as Linux allows.

Python imports this file by itself when it starts with this folder in PYTHONPATH, in worker
processes too. SIMULATED_PLATFORM is win32 or darwin, SIMULATED_ROOT the folder whose files behave
as they do on Windows. Only what minivit itself imports is changed, so that the libraries, which
are written for each system, go on as they are.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import pathlib
import signal
import sys
import warnings

PLATFORM = os.environ.get("SIMULATED_PLATFORM", "win32")
ROOT = os.path.realpath(os.environ.get("SIMULATED_ROOT", "/nonexistent"))
WINDOWS = PLATFORM == "win32"

# What Linux has, and what neither Windows nor, if it is not in NOT_ON_WINDOWS, macOS has.
LINUX_ONLY = {
    "os": """sched_getaffinity sched_setaffinity posix_fadvise posix_fallocate pipe2 memfd_create
        sendfile getrandom setresuid""",
    "signal": "sigtimedwait sigwaitinfo SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT SIGPOLL",
    "modules": "spwd",
}
NOT_ON_WINDOWS = {
    "os": """fork forkpty getuid geteuid getgid getegid getgroups setuid setgid setsid getpgid
        setpgid getpgrp killpg nice getpriority uname getloadavg sysconf confstr statvfs fstatvfs
        mkfifo mknod chown lchown fchown fchmod fchdir chroot wait wait3 wait4 WNOHANG WIFEXITED
        register_at_fork openpty ttyname ctermid pread pwrite readv writev lockf sync
        fdatasync posix_spawn set_blocking get_blocking O_NONBLOCK O_NOFOLLOW O_DIRECTORY O_CLOEXEC
        O_SYNC O_DSYNC""",
    "signal": """pthread_sigmask pthread_kill sigpending sigwait alarm setitimer getitimer pause
        siginterrupt""",
    "modules": """fcntl resource pwd grp termios tty pty readline crypt nis ossaudiodev posix
        syslog curses""",
}
WINDOWS_SIGNALS = {"SIGINT", "SIGTERM", "SIGABRT", "SIGFPE", "SIGILL", "SIGSEGV", "SIGBREAK"}


def missing(kind: str) -> set[str]:
    names = set(LINUX_ONLY[kind].split())
    return names | set(NOT_ON_WINDOWS[kind].split()) if WINDOWS else names


class Module:
    """A module of the standard library as minivit sees it: without some names, with others."""

    def __init__(self, real, absent: set[str], **own) -> None:
        vars(self).update(_real=real, _absent=absent, _own=own)

    def __getattr__(self, name: str):
        if name in self._own:
            return self._own[name]
        is_foreign_signal = self._real is signal and WINDOWS and name.startswith("SIG")
        is_foreign_signal = is_foreign_signal and name[3] != "_" and name not in WINDOWS_SIGNALS
        if name in self._absent or is_foreign_signal:
            raise AttributeError(f"module {self._real.__name__!r} has no {name!r} on {PLATFORM}")
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._real, name, value)


# Files

real_open, real_os_open, real_read, real_kill = io.open, os.open, os.read, os.kill
real_listdir, real_readlink, real_fsync = os.listdir, os.readlink, os.fsync
O_BINARY = 0x8000
text_descriptors: set[int] = set()
scanned: set[str] = set()


def denied(path: str) -> PermissionError:
    return PermissionError(errno.EACCES, "Access is denied", path)


def in_use(path: str) -> bool:
    """Return whether this process has a file, or one in a folder, open or mapped into memory."""
    held = []
    for descriptor in real_listdir("/proc/self/fd"):
        try:
            held.append(real_readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # the one that has just listed the folder
            continue
    with real_open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        held += [line.rstrip("\n").split(maxsplit=5)[-1] for line in maps]
    return any(each == path or each.startswith(path + os.sep) for each in held)


def is_ours(path: object) -> bool:
    return os.path.realpath(os.fspath(path)).startswith(ROOT + os.sep)


def changing(real, number_of_paths: int):
    """Return a function that renames or removes files, as Windows lets it."""

    def change(*paths, **keywords):
        named = [os.fspath(path) for path in paths[:number_of_paths]]
        if "dir_fd" not in keywords and all(isinstance(path, str) for path in named):
            for path in map(os.path.realpath, filter(is_ours, named)):
                if in_use(path):
                    raise denied(path)
            target = named[-1]
            if number_of_paths == 2 and is_ours(target) and target not in scanned:
                scanned.add(target)  # A virus scanner looks at each new file for a moment.
                raise denied(target)
        return real(*paths, **keywords)

    return change


def open_as_there(file, mode="r", *arguments, **keywords):
    if isinstance(file, (str, os.PathLike)) and os.fspath(file).startswith("/proc"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", os.fspath(file))
    caller = sys._getframe(1).f_globals["__name__"]
    names_encoding = "b" in mode or len(arguments) >= 2 or keywords.get("encoding") is not None
    if not names_encoding and caller.partition(".")[0] == "minivit":
        raise EncodingWarning(f"{file} is opened without an encoding")
    has_newline = len(arguments) >= 4 or keywords.get("newline") is not None
    writes_text = "b" not in mode and "r" not in mode
    if WINDOWS and writes_text and not has_newline and not isinstance(file, int) and is_ours(file):
        keywords["newline"] = "\r\n"
    return real_open(file, mode, *arguments, **keywords)


def os_open(path, flags, *arguments, **keywords):
    if pathlib.Path(path).is_dir():
        raise denied(path)
    descriptor = real_os_open(path, flags & ~O_BINARY, *arguments, **keywords)
    if flags & O_BINARY:
        text_descriptors.discard(descriptor)
    else:
        text_descriptors.add(descriptor)
    return descriptor


def os_read(descriptor: int, n: int) -> bytes:
    data = real_read(descriptor, n)
    if descriptor in text_descriptors:
        data = data.replace(b"\r\n", b"\n").partition(b"\x1a")[0]
    return data


def os_kill(process: int, number: int) -> None:
    if number == 0:
        raise AssertionError("os.kill(process, 0) sends Ctrl-C on Windows")
    real_kill(process, number)


def os_fsync(descriptor: int) -> None:
    if pathlib.Path(f"/proc/self/fd/{descriptor}").is_dir():
        raise denied("a folder")
    real_fsync(descriptor)


def set_wakeup_fd(descriptor: int, **keywords) -> int:
    os.set_blocking(descriptor, False)  # Windows does not ask for that, and Linux does.
    return signal.set_wakeup_fd(descriptor, **keywords)


class Kernel:
    """What is asked of ctypes.WinDLL("kernel32")."""

    def __init__(self, name: str) -> None:
        import ctypes

        assert name == "kernel32"

        def get_current_process() -> int:
            return ctypes.c_size_t(-1).value

        def get_memory(process, counters, size) -> int:
            assert process == get_current_process() and size == ctypes.sizeof(counters._obj)
            counters._obj.sizes[0] = 3 * 2**29
            return 1

        self.GetCurrentProcess = get_current_process
        self.K32GetProcessMemoryInfo = get_memory


# Imports

own_os = {"name": "nt"} if WINDOWS else {}
if WINDOWS:
    own_os |= {"open": os_open, "read": os_read, "kill": os_kill, "fsync": os_fsync}
    own_os["O_BINARY"] = O_BINARY
own_signal = {"SIGBREAK": signal.SIGTTIN, "set_wakeup_fd": set_wakeup_fd} if WINDOWS else {}
modules = {
    "sys": Module(sys, {"abiflags"} if WINDOWS else set(), platform=PLATFORM),
    "os": Module(os, missing("os"), **own_os),
    "signal": Module(signal, missing("signal"), **own_signal),
}
absent_modules = missing("modules")
real_import = builtins.__import__


def import_as_there(name, globals=None, locals=None, fromlist=(), level=0):
    importer = globals or {}
    package = importer.get("__package__") or importer.get("__name__") or ""
    if package.partition(".")[0] == "minivit" and level == 0:
        if name in absent_modules:
            raise ModuleNotFoundError(f"No module named {name!r} on {PLATFORM}")
        if name in modules:
            return modules[name]
        module = real_import(name, globals, locals, fromlist, level)
        if name == "multiprocessing":
            real_import("multiprocessing.context").context._concrete_contexts.pop("fork", None)
        if name == "ctypes" and WINDOWS:
            module.WinDLL = Kernel
        return module
    return real_import(name, globals, locals, fromlist, level)


builtins.__import__ = import_as_there
builtins.open = io.open = open_as_there
if WINDOWS:
    os.replace = changing(os.replace, 2)
    os.rename = changing(os.rename, 2)
    os.unlink = os.remove = changing(os.unlink, 1)
if sys.version_info < (3, 11):  # There pathlib has functions of its own.
    accessor = pathlib._NormalAccessor
    accessor.open = staticmethod(io.open)
    for name in ("replace", "rename", "unlink"):
        setattr(accessor, name, staticmethod(getattr(os, name)))
# Each text file is opened with its encoding named, because the default one differs. pathlib warns
# of those that are opened by its methods, and open_as_there of the others.
warnings.filterwarnings("error", category=EncodingWarning, module="minivit")
