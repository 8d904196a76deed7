"""Classical densities behind one protocol: the opponent that a deep model has to beat.

Each is fitted to rows ``x`` of shape ``(N, D)`` and gives exact log densities in nats per datum, on
the same data as a VAE's bound, so that :func:`pvae.compare` may set them side by side::

    baseline = pvae.baselines.GaussianMixture(n_components=[5, 10, 20]).fit(train, valid)
    baseline.score_samples(test)  # (N,) float64
    baseline.save("mixture")  # and pvae.baselines.load("mixture")

One class in one file of this folder is one more of them: a class with a ``name`` is found by
itself, and a density written elsewhere needs no more than the members of :class:`Baseline`. torch
and scikit-learn are imported when a density is first asked for.
"""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, runtime_checkable

from pvae.baselines.density import Density as Density
from pvae.errors import OptionError, RunError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from pvae.baselines.bernoulli_mixture import BernoulliMixture as BernoulliMixture
    from pvae.baselines.categorical_mixture import CategoricalMixture as CategoricalMixture
    from pvae.baselines.count_mixtures import NegativeBinomialMixture as NegativeBinomialMixture
    from pvae.baselines.count_mixtures import PoissonMixture as PoissonMixture
    from pvae.baselines.density import Rows
    from pvae.baselines.factor_analysis import PPCA as PPCA
    from pvae.baselines.factor_analysis import FactorAnalysis as FactorAnalysis
    from pvae.baselines.factor_analyzers import (
        MixtureOfFactorAnalyzers as MixtureOfFactorAnalyzers,
    )
    from pvae.baselines.gaussian_mixture import GaussianMixture as GaussianMixture
    from pvae.baselines.kernel_density import KernelDensity as KernelDensity
    from pvae.baselines.student_mixture import StudentTMixture as StudentTMixture


class _Listed(NamedTuple):
    cls: str
    module: str
    line: str


@functools.cache
def _listed() -> dict[str, _Listed]:
    """Short name -> class, module and first line of the docstring, read without importing."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            name = _short_name(node) if isinstance(node, ast.ClassDef) else None
            if isinstance(node, ast.ClassDef) and name is not None:
                line = (ast.get_docstring(node) or "").partition("\n")[0]
                found[name] = _Listed(node.name, path.stem, line)
    return dict(sorted(found.items()))


def _short_name(node: ast.ClassDef) -> str | None:
    """The constant that a class body gives to ``name``."""
    for line in node.body:
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant):
            if [target.id for target in line.targets if isinstance(target, ast.Name)] == ["name"]:
                return str(line.value.value)
    return None


def available() -> dict[str, str]:
    """Short name -> one line, sorted by name."""
    return {name: listed.line for name, listed in _listed().items()}


def get(name: str) -> type[Density]:
    """The class behind a short name, ``"ppca"`` say.

    Raises:
        OptionError: no baseline has that name.
    """
    if name not in _listed():
        raise OptionError(f"no baseline is called {name!r}: {did_you_mean(name, _listed())}")
    found: type[Density] = __getattr__(_listed()[name].cls)
    return found


def load(folder: str | Path) -> Density:
    """A fitted density that :meth:`Density.save` wrote; its bytes are verified, nothing is run.

    Raises:
        RunError: The folder is missing or damaged, or holds something else.
    """
    from pvae.checkpoints import load_tensors

    tensors, manifest = load_tensors(Path(folder))
    name = manifest.get("baseline")
    if name not in _listed():
        raise RunError(
            f"{folder} holds no density of pvae.baselines (its manifest names {name!r}): give a "
            "folder that Density.save wrote"
        )
    return get(name)._restored(tensors, manifest)


def __getattr__(name: str) -> Any:
    for listed in _listed().values():
        if listed.cls == name:
            return getattr(importlib.import_module(f"pvae.baselines.{listed.module}"), name)
    raise AttributeError(f"module 'pvae.baselines' has no attribute {name!r}")


def __dir__() -> list[str]:
    classes = [listed.cls for listed in _listed().values()]
    return sorted([*classes, "Baseline", "Density", "available", "get", "load"])


__all__ = __dir__()  # type: ignore[no-redef]  # noqa: PLE0605


@runtime_checkable
class Baseline(Protocol):
    """A density with a tractable likelihood; any object with these members will do."""

    @property
    def name(self) -> str:
        """Short name for tables."""

    @property
    def kind(self) -> str:
        """How ``score_samples`` relates to the log density: ``"exact"``."""

    @property
    def num_parameters(self) -> int:
        """Number of free parameters of the fitted density."""

    def fit(
        self,
        x: Rows,
        valid: Rows | None = None,
        *,
        seed: int | None = None,
        restarts: int | None = None,
    ) -> Self:
        """Estimate from rows ``(N, D)``, choosing among sizes on ``valid``; returns itself."""

    def score_samples(self, x: Rows) -> Tensor:
        """Log density of each row, nats per datum: ``(N, D) -> (N,)`` float64."""

    def sample(self, n: int) -> Tensor:
        """``n`` rows drawn from the fitted density: ``(n, D)``."""
