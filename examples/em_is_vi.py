"""EM is variational inference whose guide is the exact posterior; here are both on one picture.

A Gaussian mixture and factor analysis are Pyro programs that know their posterior. EM takes the
expectation under it in closed form, and maximises in closed form; ``pvae.fit`` draws from it
(``guides.Exact``) and takes a gradient step. Both climb log p(x), and so does a VAE whose decoder
is linear and whose encoder can hold the posterior.

Run:  python examples/em_is_vi.py        (writes em_is_vi.png; docs/em.md tells what it shows)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import pvae
from pvae.guides.exact import Exact
from pvae.guides.gaussian import Gaussian
from pvae.models.factor_analysis import FactorAnalysis
from pvae.models.gaussian_mixture import GaussianMixture

Curves = dict[str, list[float]]


def principal_digits(directions: int = 10) -> Tensor:
    """Ten principal directions of the digits' training images, on one scale: ``(1257, 10)``."""
    x = pvae.data.load("digits", transform="none").train.x.double()
    x = x - x.mean(0)
    basis: Tensor = torch.linalg.svd(x, full_matrices=False).Vh[:directions]
    projected = x @ basis.T
    return projected / projected.std()


# --- EM: the E-step is the posterior that the guide draws from, the M-step has a closed form ------


def maximise_mixture(model: GaussianMixture, x: Tensor) -> None:
    """``argmax E_p(c|x)[log p(x, c)]``: weighted counts, means and variances."""
    weights = model.posterior(x)["component"].probs
    counts = weights.sum(0)[:, None]
    loc = weights.T @ x / counts
    model.logits.copy_(counts[:, 0].log())
    model.log_scale.copy_(0.5 * (weights.T @ x**2 / counts - loc**2).log())
    model.loc.copy_(loc)


def maximise_factors(model: FactorAnalysis, x: Tensor) -> None:
    """``argmax E_p(z|x)[log p(x, z)]`` (Rubin & Thayer 1982): a regression of x on (z, 1)."""
    posterior = model.posterior(x)["z"]
    z = torch.cat([posterior.mean, torch.ones_like(x[:, :1])], 1)
    second = z.T @ z / len(x)
    second[:-1, :-1] += posterior.covariance_matrix.mean(0)
    cross = x.T @ z / len(x)
    both = torch.linalg.solve(second, cross, left=False)
    model.loadings.copy_(both[:, :-1])
    model.offset.copy_(both[:, -1])
    model.log_noise.copy_(0.5 * ((x**2).mean(0) - (both * cross).sum(1)).log())


def em(model: Any, x: Tensor, maximise: Callable[..., None], iterations: int) -> list[float]:
    """Mean log p(x) before each iteration and after the last; one iteration is one data pass."""
    passed = []
    with torch.no_grad():
        for _ in range(iterations):
            passed.append(float(model.log_evidence(x).mean()))
            maximise(model, x)
        passed.append(float(model.log_evidence(x).mean()))
    return passed


# --- the same programs by gradients ---------------------------------------------------------------


def start(kind: str, x: Tensor) -> Any:
    """The same parameters whoever trains them."""
    torch.manual_seed(0)
    if kind == "factors":
        return FactorAnalysis(x.shape[1], z_dim=4).double()
    model = GaussianMixture(x.shape[1], num_components=10).double()
    with torch.no_grad():
        model.loc.copy_(x[torch.randperm(len(x))[:10]])
    return model


def climb(model: Any, guide: Any, x: Tensor, **options: Any) -> list[float]:
    """The bound on all data after each pass; with the exact guide it is log p(x)."""
    run = pvae.fit(
        model, guide, x, valid=x, batch_size=128, lr=2e-2, lr_schedule="cosine", progress=False,
        **options,
    )  # fmt: skip
    return [row["valid_bound"] for row in run.history]


def mixture(x: Tensor, passes: int) -> Curves:
    """EM, and stochastic gradient steps on draws from the same posterior."""
    curves = {"EM": em(start("mixture", x), x, maximise_mixture, passes)}
    model = start("mixture", x)
    curves["exact guide, gradient steps"] = climb(
        model, Exact(model), x, objective=pvae.mcem(8), epochs=passes
    )
    return curves


def factors(x: Tensor, passes: int) -> Curves:
    """The same, and a linear VAE: amortised, trained jointly and by turns."""
    curves = {"EM": em(start("factors", x), x, maximise_factors, passes)}
    model = start("factors", x)
    curves["exact guide, gradient steps"] = climb(
        model, Exact(model), x, objective=pvae.stl(), epochs=passes
    )
    for name, turns in {"amortised guide (a linear VAE)": None, "the same by turns": 2}.items():
        model = start("factors", x)
        guide = Gaussian(x.shape[1], model.latents, hidden=(), covariance="full").double()
        curves[name] = climb(model, guide, x, objective=pvae.stl(), epochs=passes, alternate=turns)
        reached = float(model.log_evidence(x).mean().detach())
        print(f"{name}: log p(x) {reached:.4f} nats per datum")
    return curves


# --- the picture ----------------------------------------------------------------------------------

COLOURS = ("#333333", "#0072B2", "#D55E00", "#009E73")
STYLES = ("-", "--", "-.", ":")


def draw(panels: Mapping[str, Curves], path: Path) -> None:
    """What is left to the best value reached, against data passes."""
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 4.2), constrained_layout=True)
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        top = max(max(values) for values in curves.values())
        for (name, values), colour, style in zip(curves.items(), COLOURS, STYLES, strict=False):
            _line(axis, name, values, top, colour, style)
        axis.set(xlabel="data passes", title=title, xscale="log", yscale="log")
        axis.set_ylim(1e-5, None)
        axis.legend(frameon=False, fontsize=9, loc="lower left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("short of the best log p(x) (nats per datum)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(axis: Any, name: str, values: Sequence[float], top: float, *look: str) -> None:
    first = 1 + (name != "EM")  # a fit is looked at after its first pass, EM before it
    passes = range(first, first + len(values))
    short = [max(top - value, 1e-6) for value in values]
    axis.plot(passes, short, color=look[0], linestyle=look[1], lw=1.8, label=name)


def main(passes: int = 60, path: str = "em_is_vi.png") -> None:
    """Fit everything, print where it ends, draw the curves."""
    x = principal_digits()
    panels = {
        "Gaussian mixture, 10 components": mixture(x, passes),
        "Factor analysis, 4 factors": factors(x, passes),
    }
    for title, curves in panels.items():
        for name, values in curves.items():
            print(f"{title}: {name}: {values[0]:.4f} -> {values[-1]:.4f} nats per datum")
    draw(panels, Path(path))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
