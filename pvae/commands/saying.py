"""What a command says while it works: lines, and a line that is redrawn."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from pvae.launchers import launched

__all__ = ["say", "watched"]


def say(text: str) -> None:
    """One line on standard output, at once."""
    print(text, flush=True)


@contextlib.contextmanager
def watched(title: str) -> Iterator[Callable[[int, int], None]]:
    """A line redrawn on a terminal; elsewhere the title alone."""
    from rich.console import Console

    console = Console(stderr=True)
    place = launched()
    if place is not None and place.rank:
        yield lambda done, total: None
        return
    if not console.is_terminal:
        print(title, file=sys.stderr, flush=True)
        yield lambda done, total: None
        return
    with console.status(title) as status:
        yield lambda done, total: status.update(f"{title}: {done}/{total}")
