"""Decode photos in another process while this one imports torch and loads the model.

The other process does nothing but write the store that store.prepare() looks for, under the same
lock and with the same code. What it does not know or cannot do, it leaves: store.prepare() then
decodes the photos itself, or says what is wrong with them. So the photos, their order and all
messages are the same with it and without it. Nothing here imports torch.

All photos are decoded before the first step, also those of the test. One that cannot be read is
reported before anything is trained, and what a resumed run is recognised by does not count it.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..settings import TrainSettings
from ..system.workers import silent_process

if TYPE_CHECKING:
    from ..data.preprocess import Preprocess

    if sys.platform == "win32":
        from multiprocessing.connection import PipeConnection as Connection
    else:
        from multiprocessing.connection import Connection

# Where cores are few, decoding steps back behind the process that imports torch.
NICENESS = 5


@contextlib.contextmanager
def decode_ahead(settings: TrainSettings) -> Iterator[Callable[[], None] | None]:
    """Start to decode the photos of a run; yield a function that waits until they are decoded.

    Yields None where that is not worth it. When the context ends early, decoding ends, too, and
    leaves nothing behind.
    """
    if not _is_worth_it(settings):
        yield None
        return
    folder = Path(os.path.expanduser(settings.data), ".minivit")
    is_new = not os.path.lexists(folder)
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    try:
        with silent_process(_decode_at_low_priority, settings, sender):
            sender.close()  # The other process has a copy: the pipe ends when that is closed.
            yield functools.partial(_wait, receiver)
    finally:
        if is_new:
            _remove_if_unused(folder)


def _is_worth_it(settings: TrainSettings) -> bool:
    """Return whether photos may have to be decoded, and there is something to do meanwhile."""
    if "torch" in sys.modules:  # as in a notebook
        return False
    is_rank_0 = os.environ.get("RANK", "0") == "0"  # Only that one decodes.
    return is_rank_0 and not settings.dry_run and not settings.resume


def _remove_if_unused(folder: Path) -> None:
    """Remove a folder in which nothing but a lock has been made."""
    with contextlib.suppress(OSError):  # There is no such folder, or it belongs to somebody else.
        if os.listdir(folder) == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()


def _wait(receiver: Connection) -> None:
    """Wait until the other process has ended, and show on a terminal how far it is."""
    from ..data.store import show_decoding

    with contextlib.suppress(EOFError), show_decoding(receiver.recv()) as bar:
        while True:
            bar.update(receiver.recv())


def _decode_at_low_priority(settings: TrainSettings, sender: Connection) -> None:
    """Decode at a lower priority, which this process and its workers keep until they end."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    _decode(settings, sender)


def _decode(settings: TrainSettings, sender: Connection) -> None:
    """Write the store of a run's photos, if it is missing and the preprocessing is known.

    This runs in a process of its own. What goes wrong here goes wrong again in the process that
    trains, which reports it.
    """
    from ..data import store
    from ..data.datasets import split_data
    from ..data.listing import list_data

    preprocess = _read_preprocess(settings)
    if preprocess is None:
        return
    data = split_data(list_data(settings.data), seed=settings.seed, skip_bad=settings.skip_bad)
    store.prepare_ahead(
        data,
        preprocess,
        workers=settings.workers,
        cap_gib=settings.store_gib,
        report=sender.send,
    )


def _read_preprocess(settings: TrainSettings) -> Preprocess | None:
    """Return how the model's photos are decoded, or None if that takes more than its config files.

    Nothing is downloaded.
    """
    from ..checkpoints.hub import fetch, find_local, read_preprocess
    from ..system.files import read_json

    source = find_local(settings.model, settings.revision)
    if source is None:
        return None
    files = fetch(source, None, weights=False)
    if files.config is None or files.preprocessor is None or files.is_lone:
        return None
    preprocess = read_preprocess(files.preprocessor, read_json(files.config)["model_type"])
    return preprocess if settings.img_size is None else preprocess.at(settings.img_size)
