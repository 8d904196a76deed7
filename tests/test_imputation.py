"""Imputation against the conditional of a Gaussian, known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae.errors import DataError, OptionError
from pvae.guides.gaussian import Gaussian
from pvae.guides.masked import Masked
from pvae.imputation import impute
from pvae.models.factor_analysis import FactorAnalysis
from pvae.models.tabular import Tabular

X_DIM, Z_DIM, NOISE = 4, 2, 0.6
SIGMAS = 4.5


def linear() -> tuple[Tabular, Masked]:
    """A linear decoder of constant noise: ``x ~ N(b, W W' + noise^2)``; a guide near the prior."""
    torch.manual_seed(0)
    model = Tabular(X_DIM, z_dim=Z_DIM, hidden=()).double()
    layer = model.decoder[0]
    with torch.no_grad():
        layer.weight[X_DIM:] = 0.0
        layer.bias[:X_DIM] = torch.tensor([1.0, -1.0, 0.5, 2.0])
        layer.bias[X_DIM:] = torch.tensor(NOISE - 1e-2).expm1().log()
    guide = Masked(X_DIM, model.latents, hidden=()).double()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.zero_()
        guide.encoder[0].bias[Z_DIM:] = 0.8
    return model, guide


def truth(model: Tabular, x: Tensor) -> tuple[Tensor, Tensor]:
    """Conditional mean and covariance of the missing cells of one row."""
    layer: nn.Linear = model.decoder[0]
    loadings, offset = layer.weight[:X_DIM], layer.bias[:X_DIM]
    covariance = loadings @ loadings.T + NOISE**2 * torch.eye(X_DIM).double()
    seen = ~x.isnan()
    gain = torch.linalg.solve(covariance[seen][:, seen], covariance[seen][:, ~seen]).T
    mean = offset[~seen] + gain @ (x[seen] - offset[seen])
    return mean, covariance[~seen][:, ~seen] - gain @ covariance[seen][:, ~seen]


ROW = torch.tensor([[2.0, torch.nan, -0.5, torch.nan]], dtype=torch.float64)


class TestLinear:
    def test_means_are_the_conditional_means(self):
        model, guide = linear()
        found = impute(model, guide, ROW, 50_000, num_draws=0)
        mean, covariance = truth(model, ROW[0])
        error = SIGMAS * (covariance.diagonal() / found.ess).sqrt()
        assert ((found.mean[0, [1, 3]] - mean).abs() < error).all()
        assert torch.equal(found.mean[0, [0, 2]], ROW[0, [0, 2]])
        # What observed cells tell is not what the column alone would: the error would be seen.
        assert ((model.decoder[0].bias[[1, 3]] - mean).abs() > error).any()

    def test_draws_have_the_conditional_covariance(self):
        model, guide = linear()
        found = impute(model, guide, ROW.expand(40, -1), 20_000, num_draws=100)
        draws = found.draws[..., [1, 3]].reshape(-1, 2)
        mean, covariance = truth(model, ROW[0])
        count = min(len(draws), 40 * float(found.ess.mean()) / 4)
        error = SIGMAS * (covariance.diagonal() / count).sqrt()
        assert ((draws.mean(0) - mean).abs() < error).all()
        assert torch.allclose(draws.T.cov(), covariance, atol=0.1)
        assert torch.equal(found.draws[:, :, 0], ROW[0, 0].expand(100, 40))

    def test_unweighted_draws_would_be_caught(self):
        """The planted error: the guide's own draws, without their weights."""
        model, guide = linear()
        with torch.no_grad():
            z = torch.randn(50_000, Z_DIM).double()
            plain = model.decode(z).mean[:, [1, 3]].mean(0)
        mean, covariance = truth(model, ROW[0])
        assert ((plain - mean).abs() > SIGMAS * (covariance.diagonal() / 1000).sqrt()).any()

    def test_seeds_and_the_callers_stream(self):
        model, guide = linear()
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first, second, third = (impute(model, guide, ROW, 100, seed=s) for s in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first.mean, second.mean)
        assert torch.equal(first.draws, second.draws)
        assert not torch.equal(first.mean, third.mean)


def test_names_are_imputed_by_the_most_probable_one():
    torch.manual_seed(0)
    model = Tabular(3, columns=("categorical:3", "binary", "real"), z_dim=2, hidden=())
    with torch.no_grad():
        model.decoder[0].weight.zero_()
        bias = {"real": [0.5, 0.0], "binary": [-1.0], "categorical": [0.0, 0.2, 1.0]}
        order = [value for kind in model.sizes for value in bias[kind]]
        model.decoder[0].bias.copy_(torch.tensor(order))
    guide = Masked(3, model.latents, hidden=(4,))
    x = torch.tensor([[torch.nan, torch.nan, torch.nan], [1.0, 1.0, torch.nan]])
    found = impute(model, guide, x, 2000)
    assert found.mean[0, :2].tolist() == [2.0, 0.0]
    assert found.mean[1, :2].tolist() == [1.0, 1.0]
    assert found.mean[:, 2].tolist() == pytest.approx([0.5, 0.5], abs=1e-5)
    share = (found.draws[:, 0, 0] == 2).double().mean()
    assert 0.2 < share < 0.9


def test_whole_rows_stay_and_draws_are_counted():
    model, guide = linear()
    x = torch.randn(3, X_DIM, dtype=torch.float64)
    found = impute(model, guide, x, 10, num_draws=4)
    assert torch.equal(found.mean, x)
    assert found.draws.shape == (4, 3, X_DIM)
    assert torch.equal(found.draws[2], x)


def test_learned_imputation_beats_the_column_mean():
    from sklearn.datasets import load_wine

    x = torch.tensor(load_wine().data).float()
    x = (x - x.mean(0)) / x.std(0)
    generator = torch.Generator().manual_seed(0)
    x = x[torch.randperm(len(x), generator=generator)]
    missing = torch.rand(x.shape, generator=generator) < 0.3
    holes = x.masked_fill(missing, torch.nan)
    torch.manual_seed(0)
    model = Tabular(13, z_dim=4, hidden=(32,))
    guide = Masked(13, model.latents, hidden=(32,))
    pvae.fit(model, guide, holes[:140], objective=pvae.iwae(10), epochs=60, batch_size=35, lr=5e-3,
             engine="staged", progress=False)  # fmt: skip
    found = impute(model, guide, holes[140:], 500, num_draws=0).mean
    gone, mean = missing[140:], holes[:140].nanmean(0)
    error = [(guess - x[140:])[gone].square().mean().sqrt() for guess in (found, mean)]
    assert error[0] < 0.9 * error[1]


def test_mistakes_are_refused():
    model, guide = linear()
    with pytest.raises(OptionError, match="num_particles must be at least 1"):
        impute(model, guide, ROW, 0)
    plain = FactorAnalysis(X_DIM).double()
    with pytest.raises(DataError, match="expected finite numbers"):
        impute(plain, Gaussian(X_DIM, plain.latents).double(), ROW)
