"""What can go wrong by a user's hand.

Every message says what was expected, what came and what to do, in one sentence. The command line
prints it as one line and exits with the class's ``exit_code``::

    PvaeError
    ├── ProgramError      a model or guide that pvae cannot run, or that do not fit each other
    ├── ObjectiveError    an unsound combination of bound, gradient and pair
    ├── DataError         data that are missing, malformed or unfit for the model
    ├── OptionError       a name or value that does not exist
    ├── RunError          a run folder that is missing, damaged or of another kind
    ├── LostRankError     a process of a group that did not answer, which ends the others
    └── NonFiniteError    a NaN or an infinity, stopped before it reached the parameters
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "DataError",
    "LostRankError",
    "NonFiniteError",
    "ObjectiveError",
    "OptionError",
    "ProgramError",
    "PvaeError",
    "RunError",
    "did_you_mean",
    "first_line",
]


class PvaeError(ValueError):
    """Base of every error that a user can mend."""

    exit_code = 2


class ProgramError(PvaeError):
    """A model or a guide that pvae cannot run, or that do not fit each other."""


class ObjectiveError(PvaeError):
    """An unsound combination of bound, gradient estimator and pair."""


class DataError(PvaeError):
    """Data that are missing, malformed or unfit for the model."""

    exit_code = 65


class OptionError(PvaeError):
    """A name or a value that does not exist."""


class RunError(PvaeError):
    """A run folder that is missing, damaged or of another kind."""

    exit_code = 66


class LostRankError(PvaeError):
    """A process of a group that was killed or cut off; the others end with it."""

    exit_code = 75


class NonFiniteError(PvaeError):
    """A NaN or an infinity in a bound or a gradient; the parameters are as before the step."""

    exit_code = 70


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The nearest known word as a hint, else the whole list: ``"did you mean 'adam'?"``."""
    names = sorted(known)
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"


def first_line(error: Exception) -> str:
    """The first line of what an error says, which may be nothing."""
    return (str(error).strip().splitlines() or [""])[0]
