"""A training that dies between two steps, as a killed process would."""

from __future__ import annotations

import contextlib

import pytest

from pvae import loop


class Death(Exception):
    """The process would be gone here."""


@contextlib.contextmanager
def dying_after(step: int):
    """The training within dies after a step, when its checkpoint is written."""
    heed = loop.Loop._heed

    def dying(each) -> None:
        heed(each)
        if each.place.step == step:
            raise Death

    with pytest.MonkeyPatch.context() as context:
        context.setattr(loop.Loop, "_heed", dying)
        with contextlib.suppress(Death):
            yield
            pytest.fail("it ended before its death")
