"""One process at a time in a folder, or at a piece of work."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pvae.errors import RunError

__all__ = ["Taken", "claim", "locked"]


class Taken(RunError):
    """Another process or thread is at work there."""


_held: dict[Path, int] = {}  # folder -> the thread of this process that has it


@contextlib.contextmanager
def locked(
    folder: Path,
    *,
    again: bool = False,
    waits: bool = False,
    remedy: str = "wait for it, or choose another folder",
) -> Iterator[None]:
    """The folder for this thread alone; the lock goes when the process does, however it ends.

    Where there is no ``flock``, nothing keeps two processes apart.

    Args:
        folder: It must exist; ``.lock`` is made in it.
        again: A thread that has it already may have it.
        waits: Wait until another process lets it go.
        remedy: What to do if it is taken, in words.

    Raises:
        Taken: Another process or thread has it.
    """
    place, mine = folder.resolve(), threading.get_ident()
    taken = Taken(f"another process is at work in {folder}: {remedy}")
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
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
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


def claim(path: Path) -> IO[bytes] | None:
    """Claim a piece of work by a file of its own, made if need be; ``None`` if another has it.

    The claim lasts until the file is closed in this process and in those it was passed to, so that
    the work of one that died can be taken over. Machines that share a folder see each other's
    claims where the file system has locks; where there are none, nobody is kept apart.

    Args:
        path: The file, which is left empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except (ImportError, OSError):
        pass
    return file
