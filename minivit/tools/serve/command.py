"""The command line of `serve`. What a model makes of a photo is in answers.py, HTTP in server.py.

This module imports neither torch nor NumPy before the job starts, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import webbrowser
from collections.abc import Sequence

from ... import cli
from ...errors import printable
from ...system import torch_start

LOOPBACK = "127.0.0.1"


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(
        "serve",
        description="Serve a page to drop a photo on, which shows its names and the explorer.",
    )
    parser.add_model_flags("another model, whose answer is shown first")
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        help="the address to listen at; 0.0.0.0 lets other computers and phones in",
    )
    parser.add_argument(
        "--port", type=port_number, default=8000, help="the port to listen at; 0 takes a free one"
    )
    parser.add_argument(
        "--keep",
        type=cli.folder,
        metavar="DIR",
        help="keep the photos, with their answers, in this folder; without it, none is kept",
    )
    parser.add_device_flags()
    return cli.run(serve, parser, argv)


def port_number(text: str) -> int:
    """Parse an argument: the number of a port, or 0."""
    if not (text.isascii() and text.isdecimal() and int(text) < 65_536):
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, found {text!r}")
    return int(text)


def serve(args: argparse.Namespace) -> int:
    """Load the models, say where the page is, and answer until a signal ends this process."""
    started = time.perf_counter()
    # A browser may keep the cores busy, too. Threads that wait for each other actively, as torch's
    # do by default, then take many times as long. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch_start.start(args.device)
    from .server import Server

    # A port that is taken is found before the models are loaded. Browsers wait until they are.
    with Server(args.host, args.port) as server:
        from .answers import Answers

        server.answers = Answers(args.model, args.compare, args.device, args.amp, args.keep)
        seconds = time.perf_counter() - started
        if not server.address.is_loopback:
            print(
                f"--host {args.host}: everybody who can reach this computer and knows the address "
                "below may send photos; what is sent is not encrypted",
                file=sys.stderr,
            )
        if args.keep:
            print(f"photos are kept in {printable(args.keep)}", file=sys.stderr)
        print(f"ready after {seconds:.1f} s; Ctrl-C ends it", file=sys.stderr)
        print(*server.urls(), sep="\n", flush=True)
        if can_show_a_browser():
            threading.Thread(target=webbrowser.open, args=server.urls()[:1], daemon=True).start()
        server.serve_forever()
    return 0


def can_show_a_browser() -> bool:
    """Return whether somebody sits at this computer's screen, as far as that can be known.

    Without a screen, a browser might start in the terminal and take it over.
    """
    if not sys.stdout.isatty() or "SSH_CONNECTION" in os.environ:
        return False
    has_screen = "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    return sys.platform in ("darwin", "win32") or has_screen
