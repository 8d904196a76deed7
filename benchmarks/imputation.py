"""Missing cells imputed on scikit-learn's tables: errors beside column means and other methods.

    OMP_NUM_THREADS=1 python benchmarks/imputation.py --first-seed 100 --seeds 8

Cells are removed completely at random, in the training rows too. Every method learns from the
incomplete training rows (80 %) and imputes the missing cells of the others. Reported are the root
mean squared error of real columns in units of their standard deviation (NRMSE) and the error rate
of the columns that are names, each the mean over seeds of split, mask and model +- its standard
error; last, what NRMSE a method has above ``gmm``, seed by seed. ``gmm`` is the conditional mean of
a Gaussian mixture fitted to mean-imputed rows, its size chosen by held-out rows before; ``gmm-all``
of one that has seen the training rows whole, which no other method has; ``iterative`` is
scikit-learn's IterativeImputer. To both a name is a number, rounded.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Sequence

import numpy as np
import sklearn.datasets
import torch
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from torch import Tensor

import pvae
from pvae.baselines import GaussianMixture
from pvae.guides.masked import Masked
from pvae.imputation import impute
from pvae.models.tabular import Tabular

METHODS = ("mean", "gmm", "gmm-all", "iterative", "vae")


def table(name: str) -> tuple[Tensor, list[str]]:
    """Rows and the kind of each column; the target joins as a column where it is a name."""
    bunch = getattr(sklearn.datasets, f"load_{name}")()
    x, columns = torch.tensor(bunch.data), ["real"] * bunch.data.shape[1]
    if name == "diabetes":
        x[:, 1] = (x[:, 1] > 0).double()
        columns[1] = "binary"
    else:
        classes = int(bunch.target.max()) + 1
        x = torch.cat([x, torch.tensor(bunch.target)[:, None].double()], 1)
        columns.append("binary" if classes == 2 else f"categorical:{classes}")
    varied = x.std(0) > 0
    return x[:, varied], [c for c, kept in zip(columns, varied.tolist(), strict=True) if kept]


def conditional_mean(mixture: GaussianMixture, x: Tensor) -> Tensor:
    """``E[x_mis | x_obs]`` under a mixture of full covariance: ``(N, D)`` with NaN -> whole."""
    filled = x.clone()
    for row, cells in enumerate(x):
        seen = ~cells.isnan()
        log_weight, means = mixture.weights.log(), mixture.means
        guesses = means[:, ~seen]
        if bool(seen.any()):
            covariance = mixture.covariances
            within = covariance[:, seen][:, :, seen]
            apart = cells[seen] - means[:, seen]
            density = torch.distributions.MultivariateNormal(means[:, seen], within)
            log_weight = log_weight + density.log_prob(cells[seen])
            solved = torch.linalg.solve(within, apart[..., None])
            guesses = guesses + (covariance[:, ~seen][:, :, seen] @ solved)[..., 0]
        filled[row, ~seen] = log_weight.softmax(0) @ guesses
    return filled


def mixture_of(rows: Tensor, seed: int) -> GaussianMixture:
    """Its size chosen by a fifth of the rows, then fitted to all."""
    cut = len(rows) // 5
    chosen = GaussianMixture([1, 2, 4, 8], reg_covar=1e-2, seed=seed).fit(rows[cut:], rows[:cut])
    return GaussianMixture(len(chosen.weights), reg_covar=1e-2, seed=seed).fit(rows)


def vae(
    train: Tensor, test: Tensor, columns: list[str], options: argparse.Namespace, seed: int
) -> Tensor:
    """MIWAE's bound on all rows; at each step as large a share of the observed cells is hidden."""
    torch.manual_seed(seed)
    hide = float(train.isnan().double().mean())
    width = train.shape[1]
    model = Tabular(
        width, columns=columns, z_dim=options.z_dim, hidden=(64,), robust=True, skip=True
    )
    guide = Masked(width, model.latents, hidden=(64,))
    pvae.fit(
        model, guide, train.float(), objective=pvae.iwae(20), epochs=options.epochs, batch_size=32,
        optimizer="adamw", optimizer_options={"weight_decay": 0.1}, lr=3e-3,
        lr_schedule="cosine", engine="staged", seed=seed, progress=False,
        preprocess=lambda x: x.masked_fill(torch.rand_like(x) < hide, torch.nan),
    )  # fmt: skip
    return impute(model, guide, test.float(), 10_000, num_draws=0, seed=seed).mean.double()


def one(
    name: str, fraction: float, seed: int, options: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """Method -> NRMSE and error rate of one split and mask."""
    x, columns = table(name)
    names = torch.tensor([column != "real" for column in columns])
    generator = torch.Generator().manual_seed(seed)
    x = x[torch.randperm(len(x), generator=generator)]
    missing = torch.rand(x.shape, generator=generator) < fraction
    cut = len(x) - len(x) // 5
    seen = x[:cut].masked_fill(missing[:cut], torch.nan)
    mean = torch.where(names, 0.0, seen.nanmean(0))
    scale = torch.where(names, 1.0, (seen - mean).square().nanmean(0).sqrt())
    whole, x = (x[:cut] - mean) / scale, (x - mean) / scale
    train, test = (
        x.masked_fill(missing, torch.nan)[rows] for rows in (slice(cut), slice(cut, None))
    )
    centre = train.nanmean(0)
    centre[names] = train[:, names].nanmedian(0).values
    for place in names.nonzero().flatten().tolist():
        centre[place] = train[:, place][~train[:, place].isnan()].mode().values
    imputed = {"mean": torch.where(test.isnan(), centre, test)}
    filled = torch.where(train.isnan(), train.nanmean(0), train)
    imputed["gmm"] = conditional_mean(mixture_of(filled, seed), test)
    imputed["gmm-all"] = conditional_mean(mixture_of(whole, seed), test)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        imputer = IterativeImputer(random_state=seed, max_iter=20).fit(train.numpy())
    imputed["iterative"] = torch.from_numpy(imputer.transform(test.numpy()))
    imputed["vae"] = vae(train, test, columns, options, seed)
    truth, gone = x[cut:], missing[cut:]
    found = {}
    for method, guess in imputed.items():
        error = (guess - truth)[gone & ~names].square().mean().sqrt()
        wrong = (guess.round() != truth)[gone & names].double().mean()
        found[method] = (float(error), float(wrong))
    return found


def in_words(values: Sequence[float]) -> str:
    """Mean and standard error; without seeds whose mask took no cell."""
    values = [value for value in values if not math.isnan(value)]
    spread = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{np.mean(values):.3f} +- {spread:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ("breast_cancer", "diabetes", "digits", "wine")
    parser.add_argument(
        "--data", nargs="+", default=["wine", "breast_cancer", "diabetes"], choices=known
    )
    parser.add_argument("--missing", nargs="+", type=float, default=[0.1, 0.3, 0.5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--z-dim", type=int, default=10)
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    print(f"{'data':14} {'missing':>7}  {'method':10} {'NRMSE':>16} {'error rate':>16} "
          f"{'NRMSE above gmm':>17}")  # fmt: skip
    for name in options.data:
        for fraction in options.missing:
            started = time.perf_counter()
            runs = [one(name, fraction, seed, options) for seed in seeds]
            for method in METHODS:
                errors, wrong = zip(*(run[method] for run in runs), strict=True)
                above = [run[method][0] - run["gmm"][0] for run in runs]
                print(f"{name:14} {fraction:7.0%}  {method:10} {in_words(errors):>16} "
                      f"{in_words(wrong):>16} {in_words(above):>17}", flush=True)  # fmt: skip
            print(f"{'':14} {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
