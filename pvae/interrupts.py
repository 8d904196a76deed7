"""SIGINT and SIGTERM, heeded where it is safe."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupts", "leave"]

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Within it, a first SIGINT or SIGTERM is noted in ``number``; a second one leaves at once.

    One that nobody has heeded, since it came too late, ends the process when the block is done.
    Outside the main thread, where Python has no signals, nothing changes.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _NUMBERS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self.number is not None:
            leave(self.number, "interrupted after the last step")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            leave(number)
        self.number = number
        # print is not for signal handlers: they may interrupt another print
        os.write(2, b"\npvae: stopping after this step; again to leave at once\n")


def leave(number: int, reason: str = "") -> None:
    """End as the signal asks: ``KeyboardInterrupt``, or ``SystemExit`` with 128 + its number."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt(reason)
    raise SystemExit(128 + number)
