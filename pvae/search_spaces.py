"""Search spaces: what may vary in a sweep, each written as one word.

::

    log:1e-4..1e-2        a real number, uniform in its logarithm
    0.0..0.5              a real number
    2..32   log:2..64     a whole number, if both ends are written as one
    silu|tanh|relu        one of these
    layers:1..3x32..256   a list of 1 to 3 equal widths between 32 and 256

A name is an option of ``pvae train`` (``lr``), one of the model, guide or objective
(``model.z_dim``), or one that model and guide share (``both.hidden``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pvae.errors import OptionError

__all__ = [
    "Choice",
    "Dimension",
    "Layers",
    "Real",
    "Whole",
    "configure",
    "corners",
    "parse",
    "parse_all",
]

_FORMS = "a..b, log:a..b, one|two|three or layers:1..3x32..256"


class Dimension(Protocol):
    """What may vary: it asks a trial of Optuna for a value."""

    def suggest(self, trial: Any, name: str) -> Any:
        """A value for this trial."""


@dataclass(frozen=True)
class Real:
    """A real number in ``[low, high]``, uniform in it or in its logarithm."""

    low: float
    high: float
    log: bool = False

    def suggest(self, trial: Any, name: str) -> float:
        """A real number."""
        return float(trial.suggest_float(name, self.low, self.high, log=self.log))


@dataclass(frozen=True)
class Whole:
    """A whole number in ``low .. high``, both included."""

    low: int
    high: int
    log: bool = False

    def suggest(self, trial: Any, name: str) -> int:
        """A whole number."""
        return int(trial.suggest_int(name, self.low, self.high, log=self.log))


@dataclass(frozen=True)
class Choice:
    """One of several texts, read as the option would be read from a command line."""

    options: tuple[str, ...]

    def suggest(self, trial: Any, name: str) -> str:
        """One of the texts."""
        return str(trial.suggest_categorical(name, list(self.options)))


@dataclass(frozen=True)
class Layers:
    """Equal widths, as many as there are layers; depth and width are searched apart."""

    depth: Whole
    width: Whole

    def suggest(self, trial: Any, name: str) -> list[int]:
        """A list of widths."""
        depth = self.depth.suggest(trial, f"{name}.depth")
        return [self.width.suggest(trial, f"{name}.width")] * depth


def parse_all(texts: Sequence[str]) -> dict[str, Dimension]:
    """``["lr=log:1e-4..1e-2", "both.hidden=layers:1..3x32..256"]`` as name -> dimension.

    Raises:
        OptionError: There is none, a name is there twice, or a space is not understood.
    """
    if not texts:
        raise OptionError(
            f"a sweep needs something to vary: give --search NAME=SPACE, with SPACE {_FORMS}"
        )
    found: dict[str, Dimension] = {}
    for text in texts:
        name, equals, space = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or not name:
            raise OptionError(f"--search takes NAME=SPACE, got {text!r}: try lr=log:1e-4..1e-2")
        if name in found:
            raise OptionError(f"--search names {name} twice: keep one")
        found[name] = parse(name, space.strip())
    return found


def parse(name: str, text: str) -> Dimension:
    """One space; ``name`` is for the message.

    Raises:
        OptionError: It is not understood, or is empty.
    """
    if text.startswith("layers:"):
        depth, times, width = text.removeprefix("layers:").partition("x")
        if not times:
            raise OptionError(f"{name}: layers takes DEPTHxWIDTH, got {text!r}: try {_FORMS}")
        numbers = (_interval(name, depth), _interval(name, width))
        if not all(isinstance(n, Whole) and n.low >= 1 for n in numbers):
            raise OptionError(f"{name}: layers are counted in whole numbers >= 1, got {text!r}")
        deep, wide = numbers
        assert isinstance(deep, Whole)
        return Layers(deep, Whole(int(wide.low), int(wide.high), log=True))
    if ".." in text and "|" not in text:
        return _interval(name, text)
    options = tuple(dict.fromkeys(option.strip() for option in text.split("|")))
    if len(options) < 2 or not all(options):
        raise OptionError(f"{name}={text} varies nothing: SPACE is {_FORMS}")
    return Choice(options)


def _interval(name: str, text: str) -> Real | Whole:
    log = text.startswith("log:")
    low, dots, high = text.removeprefix("log:").partition("..")
    high = high if dots else low
    try:
        ends = float(low), float(high)
    except ValueError:
        raise OptionError(f"{name}: {text!r} has ends that are no numbers: try {_FORMS}") from None
    if not all(map(math.isfinite, ends)) or ends[0] > ends[1] or (log and ends[0] <= 0):
        rule = "0 < low <= high" if log else "low <= high"
        raise OptionError(f"{name}: an interval needs finite ends with {rule}, got {text!r}")
    if all(end.strip().lstrip("+-").isdigit() for end in (low, high)):
        return Whole(int(low), int(high), log=log)
    return Real(*ends, log=log)


def configure(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with a trial's values in it.

    ``model.z_dim`` goes to ``model_options``, ``both.hidden`` to those of model and guide, and a
    name without a dot to the configuration itself. Nothing of ``config`` is changed.

    Raises:
        OptionError: A name is no option of ``pvae train``.
    """
    made = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for name, value in values.items():
        component, dot, option = name.partition(".")
        if not dot:
            if name not in made or name.endswith("_options"):
                raise OptionError(
                    f"--search {name}: pvae train has no option --{name}; options of a program are "
                    f"model.{name}, guide.{name}, both.{name} or objective.{name}"
                )
            made[name] = _typed(name, value, made[name])
            continue
        owners = ("model", "guide") if component == "both" else (component,)
        for owner in owners:
            if f"{owner}_options" not in made:
                raise OptionError(
                    f"--search {name}: begin with model, guide, both or objective, got {owner!r}"
                )
            made[f"{owner}_options"][option] = value
    return made


def _typed(name: str, value: Any, example: Any) -> Any:
    """The text of a choice as the number or the nothing that a train option takes."""
    if isinstance(value, (int, float)):
        if isinstance(example, str) or (isinstance(example, int) and isinstance(value, float)):
            kind = "word" if isinstance(example, str) else "whole number"
            raise OptionError(f"--search {name}: {value!r} is no {kind}, which --{name} takes")
        return value
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return None
    if isinstance(example, str) or (example is None and not _is_number(value)):
        return value
    if not _is_number(value) or (isinstance(example, int) and not float(value).is_integer()):
        kind = "whole number" if isinstance(example, int) else "number"
        raise OptionError(f"--search {name}: {value!r} is no {kind}, which --{name} takes")
    return int(float(value)) if float(value).is_integer() and "." not in value else float(value)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def corners(space: Mapping[str, Dimension]) -> list[dict[str, Any]]:
    """A few value sets that touch every end and every choice, to try options before a sweep."""
    count = max((len(d.options) for d in space.values() if isinstance(d, Choice)), default=2)
    return [
        {name: dimension.suggest(_Corner(k), name) for name, dimension in space.items()}
        for k in range(max(count, 2))
    ]


@dataclass(frozen=True)
class _Corner:
    """A trial that takes the k-th choice, and the low or the high end in turn."""

    k: int

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        return high if self.k % 2 else low

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
        return high if self.k % 2 else low

    def suggest_categorical(self, name: str, options: Sequence[str]) -> str:
        return options[self.k % len(options)]
