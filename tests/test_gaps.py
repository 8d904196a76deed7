"""The gap ledger on factor analysis, whose posterior and best approximations are known."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import SE, Mixture

from pvae.errors import DataError, OptionError, ProgramError
from pvae.evidence import Evidence, gaps
from pvae.guides.exact import Exact
from pvae.models.factor_analysis import FactorAnalysis


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return FactorAnalysis(8, z_dim=3).double().requires_grad_(False)


@pytest.fixture(scope="module")
def x(model):
    torch.manual_seed(1)
    return model(size=60)


def best_diagonal_gap(model, x):
    """``KL(q* || p)`` of the best diagonal Gaussian: ``(sum log P_ii - log |P|) / 2``."""
    precision = model.posterior(x)["z"].precision_matrix
    diagonal = torch.diagonal(precision, dim1=-2, dim2=-1)
    return (diagonal.log().sum(-1) - torch.logdet(precision)) / 2


def diagonal_guide(model, move=0.5, widen=1.3):
    def guide(x):
        posterior = model.posterior(x)["z"]
        precision = torch.diagonal(posterior.precision_matrix, dim1=-2, dim2=-1)
        loc = posterior.mean + move * posterior.stddev
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, widen * precision.rsqrt()).to_event(1))

    return guide


def full_guide(model, move=0.5, widen=1.3):
    def guide(x):
        posterior = model.posterior(x)["z"]
        loc = posterior.mean + move * posterior.stddev
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=widen * posterior.scale_tril))

    return guide


def exact_evidence(model, x):
    return Evidence.exact(model.log_evidence(x))


def test_best_diagonal_gaussian_has_the_known_gap(model, x):
    found = gaps(model, diagonal_guide(model), x, log_evidence=exact_evidence(model, x),
                 tolerance=1e-4)  # fmt: skip
    row = next(row for row in found.rows() if row["part"] == "approximation")
    excess = row["nats"] - float(best_diagonal_gap(model, x).mean())
    assert -SE * row["noise"] < excess < SE * row["noise"] + 1e-3  # the search leaves under 1e-3
    assert found.converged
    assert found.shifted_sites == ()


def test_full_covariance_has_no_approximation_gap(model, x):
    found = gaps(model, full_guide(model), x, log_evidence=exact_evidence(model, x), tolerance=1e-4)
    assert abs(float(found.approximation.mean())) < 1e-3


def test_amortisation_gap_is_the_difference_of_known_divergences(model, x):
    guide = full_guide(model)
    found = gaps(model, guide, x, log_evidence=exact_evidence(model, x), tolerance=1e-4)
    move, widen, size = 0.5, 1.3, 3
    posterior = model.posterior(x)["z"]
    shift = move * posterior.stddev
    mahalanobis = torch.einsum("bi,bij,bj->b", shift, posterior.precision_matrix.expand(60, 3, 3),
                               shift)  # fmt: skip
    truth = (size * (widen**2 - 1 - 2 * math.log(widen)) + mahalanobis) / 2
    z = (found.amortisation - truth) / found.noise["amortisation"]
    assert float(z.abs().max()) < SE + 1
    row = next(row for row in found.rows() if row["part"] == "amortisation")
    assert abs(row["nats"] - float(truth.mean())) < SE * row["noise"] + 1e-3


def test_the_parts_add_up(model, x):
    found = gaps(model, diagonal_guide(model), x, num_particles=2000)
    parts = found.approximation + found.amortisation + found.estimation
    assert float((parts - found.total).abs().max()) < 1e-12
    own = found.log_evidence + found.estimation - found.elbo
    assert float((found.total - own).abs().max()) < 1e-9
    true_gap = model.log_evidence(x) - found.elbo
    z = (found.total - true_gap) / found.noise["log p(x)"]
    assert float(z.abs().max()) < SE
    rows = {row["part"]: row["nats"] for row in found.rows()}
    assert rows["gap"] == pytest.approx(rows["log p(x)"] - rows["ELBO"])


def test_noise_is_the_spread_over_seeds(model, x):
    """Errors of each part against the truth, in units of the reported noise."""
    truth = best_diagonal_gap(model, x).mean()
    guide = diagonal_guide(model, move=0.0, widen=1.0)
    scores = []
    for seed in range(6):
        found = gaps(model, guide, x[:20], num_particles=500, tolerance=1e9, seed=seed)
        row = next(row for row in found.rows() if row["part"] == "approximation")
        scores.append((row["nats"] - float(truth)) / row["noise"])
    assert float(torch.tensor(scores).square().mean()) < 1 + SE * math.sqrt(2 / 6)


def test_a_tight_bound_says_so(model, x):
    found = gaps(model, Exact(model), x)
    assert abs(float(found.total.mean())) < 1e-3
    assert "tight" in found.report()


def test_words_name_the_larger_part(model, x):
    far = gaps(model, full_guide(model, move=2.0), x, log_evidence=exact_evidence(model, x))
    assert "is amortisation" in str(far)
    near = gaps(model, diagonal_guide(model, 0.0, 1.0), x, log_evidence=exact_evidence(model, x))
    assert "is approximation" in str(near)


def gamma_model(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.full_like(x, 2.0), 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def gamma_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.Gamma(1.5 * (x + 2), torch.full_like(x, 3.0)))


def test_positive_latents_with_the_posterior_in_the_family():
    """Gamma-Poisson: the posterior is Gamma(x + 2, 2), which the search must find."""
    torch.manual_seed(0)
    x = torch.poisson(torch.distributions.Gamma(2.0, 1.0).sample((40,)).double())
    evidence = dist.NegativeBinomial(torch.tensor(2.0).double(), probs=torch.tensor(0.5).double())
    found = gaps(gamma_model, gamma_guide, x, tolerance=1e-4,
                 log_evidence=Evidence.exact(evidence.log_prob(x)))  # fmt: skip
    assert abs(float(found.approximation.mean())) < 2e-3
    assert float(found.amortisation.mean()) > 0.02


def hierarchical(x):
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros_like(x), 1.0))
        z1 = pyro.sample("z1", dist.Normal(0.8 * z2, 0.7))
        pyro.sample("x", dist.Normal(z1, 0.8), obs=x)


def test_dependent_sites_are_shifted_and_named():
    def guide(x):  # the true conditional of z2 given z1, moved; z1 moved too
        variance = 1 / (1 / (0.64 + 0.49) + 1 / 0.64)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(variance * x / 0.64 + 0.4, variance**0.5))
            sd2 = (1 / (1 + 0.64 / 0.49)) ** 0.5
            pyro.sample("z2", dist.Normal(sd2**2 * 0.8 / 0.49 * z1 - 0.3, sd2))

    torch.manual_seed(0)
    x = torch.randn(30, dtype=torch.float64) * 1.3
    truth = dist.Normal(0.0, (0.64 + 0.49 + 0.64) ** 0.5).log_prob(x)
    found = gaps(hierarchical, guide, x, log_evidence=Evidence.exact(truth), tolerance=1e-4)
    assert found.shifted_sites == ("z2",)
    assert abs(float(found.approximation.mean())) < 1e-3
    assert float(found.amortisation.mean()) > 0.1
    assert "z2 follow earlier draws" in found.report()


@pytest.mark.parametrize("family", ["lognormal", "affine", "masked"])
def test_other_classes_are_taken_apart(family):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(len(x), 2).to(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        base = dist.Normal(x * 0, 0.6)
        exp = dist.transforms.ExpTransform()
        with pyro.plate("data", len(x)):
            q = {
                "lognormal": lambda: dist.LogNormal(x * 0, 0.6).to_event(1),
                "affine": lambda: dist.TransformedDistribution(
                    base, [dist.transforms.AffineTransform(0.1, 0.9), exp]
                ).to_event(1),
                "masked": lambda: dist.LogNormal(x * 0, 0.6).mask(True).to_event(1),
            }[family]()
            pyro.sample("z", q)

    torch.manual_seed(0)
    x = (torch.randn(10, 2).exp() + 0.3).double()
    found = gaps(model, guide, x, num_particles=300, tolerance=0.01)
    assert float(found.amortisation.min()) > -SE * float(found.noise["amortisation"].max())
    assert float(found.amortisation.mean()) > 0.1
    assert found.shifted_sites == ()


def test_equal_seeds_give_equal_numbers_and_the_stream_is_untouched(model, x):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = gaps(model, diagonal_guide(model), x[:5], num_particles=50)
    assert torch.equal(torch.rand(2), expected)
    again = gaps(model, diagonal_guide(model), x[:5], num_particles=50)
    assert torch.equal(first.best_elbo, again.best_elbo)


def test_wrong_use_gets_one_sentence(model, x):
    guide = diagonal_guide(model)
    with pytest.raises(OptionError, match="at least 2"):
        gaps(model, guide, x, num_particles=1)
    with pytest.raises(DataError, match="of 5 data and x has 60 rows"):
        gaps(model, guide, x, log_evidence=Evidence.exact(torch.zeros(5)))
    mixture = Mixture().double()
    data = torch.randn(6, 3, dtype=torch.float64)
    with pytest.raises(ProgramError, match="drawn from a Categorical.*pass best_elbo="):
        gaps(mixture, mixture.posterior_guide, data)
    given = gaps(mixture, mixture.posterior_guide, data, best_elbo=mixture.log_evidence(data))
    assert abs(float(given.total.mean())) < 1e-9

    def point(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x[:, :3]).to_event(1))

    with pytest.raises(ProgramError, match=r"site 'z' .*no entropy.*pass best_elbo="):
        gaps(model, point, x)

    def shared(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(8).to(x), 1).to_event(1))
            pyro.sample("x", dist.Normal(z + w.unsqueeze(-1), 1).to_event(1), obs=x)

    def shared_guide(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1).to_event(1))

    with pytest.raises(ProgramError, match="'w' is shared by all data"):
        gaps(shared, shared_guide, x)
