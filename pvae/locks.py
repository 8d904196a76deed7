"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from pvae.errors import RunError

__all__ = ["locked"]

_held: dict[Path, int] = {}  # folder -> the thread of this process that has it


@contextlib.contextmanager
def locked(
    folder: Path, *, again: bool = False, remedy: str = "wait for it, or choose another folder"
) -> Iterator[None]:
    """The folder for this thread alone; the lock goes when the process does, however it ends.

    Where there is no ``flock``, nothing keeps two processes apart.

    Args:
        folder: It must exist; ``.lock`` is made in it.
        again: A thread that has it already may have it.
        remedy: What to do if it is taken, in words.

    Raises:
        RunError: Another process or thread has it.
    """
    place, mine = folder.resolve(), threading.get_ident()
    taken = RunError(f"another process is at work in {folder}: {remedy}")
    if place in _held:
        if not again or _held[place] != mine:
            raise taken
        yield
        return
    try:
        import fcntl
    except ImportError:  # not POSIX
        yield
        return
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        except OSError:  # a file system without locks
            yield
            return
        _held[place] = mine
        try:
            yield
        finally:
            del _held[place]
