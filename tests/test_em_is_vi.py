"""EM and variational inference on the same pair meet at the same maximum, from both sides."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae.guides.exact import Exact
from pvae.models.factor_analysis import FactorAnalysis

NAT = 1e-3
"""What a stochastic optimiser's end may be short of the maximum, nats per datum."""


def data() -> Tensor:
    """600 data of 8 features with unequal noise, so that PCA and factor analysis differ."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(600, 3, generator=generator, dtype=torch.float64)
    loadings = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    noise = torch.linspace(0.4, 1.4, 8, dtype=torch.float64)
    x = z @ loadings + noise * torch.randn(600, 8, generator=generator, dtype=torch.float64)
    return x - x.mean(0)


def digits() -> Tensor:
    """The 61 features of scikit-learn's digits that vary, in units of their common scale."""
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().data)
    x = x[:, x.std(0) > 0]
    return (x - x.mean(0)) / x.std()


class Affine(nn.Module):
    """``q(z | x) = Normal(A x + a, T T')``: an encoder that holds every posterior of the model."""

    def __init__(self, x_dim: int, z_dim: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.zeros(z_dim, x_dim))
        self.shift = nn.Parameter(torch.zeros(z_dim))
        self.raw = nn.Parameter(torch.zeros(z_dim, z_dim))

    def forward(self, x: Tensor) -> None:
        tril = self.raw.tril(-1) + torch.diag_embed(self.raw.diagonal().exp())
        loc = x @ self.map.T + self.shift
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))


def mean_evidence(model: FactorAnalysis, x: Tensor) -> float:
    return float(model.log_evidence(x).mean().detach())


def ppca_maximum(x: Tensor, z_dim: int) -> float:
    """Tipping & Bishop (1999): the mean log-likelihood at the maximum, from eigenvalues alone."""
    eigenvalues = torch.linalg.eigvalsh(x.T.cov(correction=0)).flip(0)
    noise = eigenvalues[z_dim:].mean()
    log_det = eigenvalues[:z_dim].log().sum() + (len(eigenvalues) - z_dim) * noise.log()
    return float(-0.5 * (len(eigenvalues) * (1 + math.log(2 * math.pi)) + log_det))


def em(model: FactorAnalysis, x: Tensor, iterations: int) -> list[float]:
    """EM of Rubin & Thayer (1982), its E-step the model's own posterior; the evidence it passes.

    The data are centred, so that the offset stays where it is, at zero.
    """
    passed = [mean_evidence(model, x)]
    with torch.no_grad():
        square = (x**2).mean(0)
        for _ in range(iterations):
            posterior = model.posterior(x)["z"]
            mean = posterior.mean
            second = posterior.covariance_matrix.mean(0) + mean.T @ mean / len(x)
            cross = x.T @ mean / len(x)
            model.loadings.copy_(torch.linalg.solve(second, cross, left=False))
            noise = square - (model.loadings * cross).sum(1)
            if model.log_noise.numel() == 1:
                noise = noise.mean(0, keepdim=True)
            model.log_noise.copy_(0.5 * noise.log())
            passed.append(mean_evidence(model, x))
    return passed


def pair(x_dim: int, z_dim: int, kind: str, *, isotropic: bool) -> tuple[FactorAnalysis, object]:
    """A model at its usual start, with the exact guide or one that can become exact."""
    torch.manual_seed(0)
    model = FactorAnalysis(x_dim, z_dim=z_dim, isotropic=isotropic).double()
    if kind == "exact":
        return model, Exact(model)
    return model, Affine(x_dim, z_dim).double()


def maximum(x: Tensor, z_dim: int, *, isotropic: bool, iterations: int = 1000) -> float:
    if isotropic:
        return ppca_maximum(x, z_dim)
    model, _ = pair(x.shape[1], z_dim, "exact", isotropic=False)
    return em(model, x, iterations)[-1]


@pytest.mark.parametrize("isotropic", [True, False], ids=["ppca", "factor analysis"])
def test_em_climbs_and_its_maximum_is_the_known_one(isotropic):
    """Never a step down; for PPCA the end is the closed form, for FA that of scikit-learn."""
    x = data()
    model, _ = pair(8, 3, "exact", isotropic=isotropic)
    passed = em(model, x, 1000)
    assert min(b - a for a, b in zip(passed, passed[1:], strict=False)) > -1e-12
    if isotropic:
        expected = ppca_maximum(x, 3)
    else:
        from sklearn.decomposition import FactorAnalysis as Reference

        reference = Reference(3, tol=1e-12, max_iter=20_000, svd_method="lapack")
        expected = float(reference.fit(x.numpy()).score(x.numpy()))
    assert passed[-1] == pytest.approx(expected, abs=1e-6)
    assert passed[-1] < expected + 1e-9


OPTIONS = {"batch_size": 600, "lr": 1e-1, "lr_schedule": "cosine", "engine": "staged",
           "progress": False}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "isotropic", "objective", "alternate", "epochs"),
    [
        ("exact", False, pvae.stl(4), None, 500),
        ("exact", True, pvae.mcem(8), None, 400),
        ("amortised", False, pvae.stl(4), None, 600),
        ("amortised", True, pvae.stl(4), None, 600),
        ("amortised", False, pvae.stl(4), 1, 1000),
    ],
    ids=["exact guide", "Monte-Carlo EM", "amortised", "amortised ppca", "variational EM"],
)
def test_a_vae_with_a_linear_decoder_reaches_it(kind, objective, alternate, epochs, isotropic):
    x = data()
    top = maximum(x, 3, isotropic=isotropic)
    model, guide = pair(8, 3, kind, isotropic=isotropic)
    pvae.fit(model, guide, x, objective=objective, alternate=alternate, epochs=epochs, **OPTIONS)
    reached = mean_evidence(model, x)
    assert top - NAT < reached < top + 1e-9


def test_real_data_from_both_sides():
    """Digits, PPCA with 10 components: EM and the VAE end within 1e-3 nat of the closed form."""
    x = digits()
    top = ppca_maximum(x, 10)
    model, guide = pair(61, 10, "amortised", isotropic=True)
    climbed = em(model, x, 600)[-1]
    assert top - NAT < climbed < top + 1e-9
    model, guide = pair(61, 10, "amortised", isotropic=True)
    pvae.fit(model, guide, x, objective=pvae.stl(2), epochs=800,
             **{**OPTIONS, "batch_size": 1797, "lr": 5e-2})  # fmt: skip
    assert top - NAT < mean_evidence(model, x) < top + 1e-9
