"""The default roster of ``pvae compare``: the classical densities and VAEs that suit a data set.

Binary data: a Bernoulli mixture; VAEs trained by the ELBO, by IWAE-5 and by IWAE-5 with doubly
reparameterised gradients (DReG). Other data: Gaussian mixtures, factor analysis, PPCA and kernel
density, and mixtures of factor analysers and of Student t densities; VAEs trained by the ELBO and
by IWAE-5 DReG.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import runs
from pvae.errors import DataError, PvaeError

if TYPE_CHECKING:
    from pvae.data import Dataset
    from pvae.training import Run

__all__ = ["Entry", "fit"]

Entry = tuple[Any, float]  # a run or a fitted baseline, and the seconds that its fit took
Fit = Callable[[], Any]

_LARGE = 4_000_000  # numbers of training data


def fit(
    dataset: Dataset,
    config: Mapping[str, Any],
    folder: Path,
    train: Callable[[dict[str, Any], Path], Run],
) -> dict[str, Entry]:
    """Fit every entry of the roster; one that does not suit the data is left out, with a warning.

    Args:
        dataset: What every entry is fitted to.
        config: How the data is prepared, and the epochs and the seed of every fit.
        folder: Where each VAE has a run folder of its own.
        train: A configuration and a run folder -> the trained run.

    Returns:
        Name -> the fitted entry and its seconds, classical densities first.

    Raises:
        DataError: Nothing in the roster could be fitted, or the data are sequences.
    """
    if dataset.padding is not None:
        raise DataError(
            f"{dataset.name} holds padded sequences, for which the roster has no density: train "
            "models of sequences and compare their runs (pvae compare RUN RUN)"
        )
    roster = _densities(dataset, config["seed"]) | _networks(dataset, config, folder, train)
    entries: dict[str, Entry] = {}
    for number, (name, make) in enumerate(roster.items(), 1):
        started = time.perf_counter()
        _note(f"[{number}/{len(roster)}] {name}")
        try:
            entry = make()
        except PvaeError as error:
            warnings.warn(f"{name} was left out: {error}", UserWarning, stacklevel=2)
            continue
        seconds = time.perf_counter() - started
        entries[name] = (entry, seconds)
        _note(f"[{number}/{len(roster)}] {name}: {_in_words(entry)}{seconds:.1f} s")
    if not entries:
        raise DataError(f"nothing in the roster could be fitted to {dataset.name}")
    return entries


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _in_words(entry: Any) -> str:
    """What the fit chose."""
    from pvae.training import Run

    if isinstance(entry, Run):
        return f"best epoch {entry.best_epoch} of {len(entry.history)}, "
    option, chosen = getattr(entry, "option", None), getattr(entry, "chosen", None)
    if option is None:
        return ""
    value = f"{chosen:.3g}" if isinstance(chosen, float) else str(chosen)
    floor = "".join(
        f"{name} {getattr(entry, name):g}, "
        for name in ("reg_covar", "min_noise")
        if hasattr(entry, name)
    )
    return f"{option} {value} (best of {max(1, len(entry.selection))}), {floor}"


# --- classical densities -------------------------------------------------------------------------


def _densities(dataset: Dataset, seed: int) -> dict[str, Fit]:
    from pvae import baselines

    rows, width = dataset.train.x.shape
    if dataset.kind == "binary":
        sizes = _sizes(10, 20, 50, 100, below=rows)
        return {
            "Bernoulli mixture": _classical(baselines.BernoulliMixture(sizes, seed=seed), dataset)
        }
    factors = _sizes(2, 5, 10, 20, 30, 40, below=width)
    few = _sizes(1, 2, 5, 10, 20, below=rows // 2)
    many = _sizes(1, 5, 10, 20, 40, 80, 120, below=rows // 2)
    mixture, floors = baselines.GaussianMixture, (1e-6, 1e-4, 1e-3)
    found = {
        "Gaussian mixture, diagonal": _best_floor(
            dataset, mixture, many, floors, covariance_type="diag", seed=seed
        ),
        "Gaussian mixture, full": _best_floor(
            dataset, mixture, few, floors, covariance_prior=10.0, seed=seed
        ),
        "factor analysis": _classical(baselines.FactorAnalysis(factors, seed=seed), dataset),
        "PPCA": _classical(baselines.PPCA(factors), dataset),
        "kernel density": _classical(baselines.KernelDensity(), dataset),
        "Student t mixture, diagonal": _best_floor(
            dataset, baselines.StudentTMixture, many, floors, covariance_type="diag", seed=seed
        ),
    }
    if width > 6:
        found["mixture of factor analysers"] = _best_floor(
            dataset, baselines.MixtureOfFactorAnalyzers, _sizes(5, 10, 20, 40, below=rows // 4),
            (1e-5, 1e-4, 1e-3), floor="min_noise", num_factors=6, seed=seed,
        )  # fmt: skip
    if rows * width > _LARGE:
        for name in ("Gaussian mixture, full", "kernel density"):
            found.pop(name)
            print(f"{name} is left out: too slow for {rows} x {width} numbers", flush=True)
    return found


def _sizes(*candidates: int, below: int) -> list[int]:
    return [size for size in candidates if size < below] or [1]


def _classical(density: Any, dataset: Dataset) -> Fit:
    return lambda: density.fit(dataset.train.x, dataset.valid.x)


def _best_floor(
    dataset: Dataset,
    density: type[Any],
    sizes: list[int],
    floors: tuple[float, ...],
    *,
    floor: str = "reg_covar",
    **options: Any,
) -> Fit:
    """The best number of components and floor of the variances, by the validation split."""
    tried = [density(sizes, **{floor: value}, **options) for value in floors]
    return lambda: max(
        (_classical(each, dataset)() for each in tried),
        # Where there is one size, nothing was selected and nothing judged yet.
        key=lambda fitted: float(fitted.score_samples(dataset.valid.x).mean()),
    )


# --- VAEs ----------------------------------------------------------------------------------------


def _networks(
    dataset: Dataset,
    config: Mapping[str, Any],
    folder: Path,
    train: Callable[[dict[str, Any], Path], Run],
) -> dict[str, Fit]:
    def vae(name: str, objective: str, **options: Any) -> Fit:
        return lambda: train(_vae(config, objective, options), folder / name)

    found = {
        "VAE, ELBO": vae("vae-elbo", "vae"),
        "VAE, IWAE-5": vae("vae-iwae", "iwae", num_particles=5),
        "VAE, IWAE-5 DReG": vae("vae-dreg", "dreg", num_particles=5),
    }
    if dataset.kind != "binary":
        found.pop("VAE, IWAE-5")
    return found


def _vae(config: Mapping[str, Any], objective: str, options: dict[str, Any]) -> dict[str, Any]:
    """The VAE of the roster: the defaults of ``pvae train vae``."""
    chosen = {"model": "vae", "objective": objective, "objective_options": options}
    return {**runs.DEFAULTS, **config, **chosen}
