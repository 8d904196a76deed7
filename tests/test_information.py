"""KL, mutual information, active units and collapse, against closed forms."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import SE
from pyro import poutine

from pvae.errors import OptionError, ProgramError
from pvae.evidence import information

STRENGTHS = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)


def model(x):
    """``z ~ N(0, I)``, ``x_j | z ~ N(a_j z_j, 1)``: every dimension on its own."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3).to(x), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(STRENGTHS * z, 1.0).to_event(1), obs=x)


def posterior(x):
    variance = 1 / (1 + STRENGTHS**2)
    return variance * STRENGTHS * x, variance.sqrt().expand_as(x)


def exact(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(*posterior(x)).to_event(1))


def exact_full(x):
    loc, scale = posterior(x)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(scale)))


def data(size=1500, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, size, 3, generator=generator, dtype=torch.float64)
    return STRENGTHS * noise[0] + noise[1]


@pytest.mark.parametrize("guide", [exact, exact_full])
def test_exact_posterior_has_the_known_information(guide):
    """``I(x; z_j) = log(1 + a_j^2) / 2``, the mean KL too, and the aggregate is the prior."""
    num_data = 1500 if guide is exact else 300
    found = information(model, guide, data(num_data), num_draws=2)
    truth = (0.5 * torch.log1p(STRENGTHS**2)).tolist()
    for each, value in zip(found.dimensions, truth, strict=True):
        assert abs(each.kl - value) < SE * each.kl_stderr
        in_sample = math.exp(2 * value) / num_data  # the finite mixture lies nearer its own points
        slack = SE * each.mutual_information_stderr + in_sample
        assert abs(each.mutual_information - value) < slack
        assert abs(each.marginal_kl) < SE * each.marginal_kl_stderr + in_sample
        assert each.kl == pytest.approx(each.mutual_information + each.marginal_kl)
    assert found.active_units == 3
    assert found.collapsed == {}
    assert "collapse" not in found.report().replace("not collapsed", "")
    assert abs(found.kl - sum(truth)) < SE * found.kl_stderr


def test_aggregate_that_is_not_the_prior():
    """q(z|x) = N(x, s): the aggregate is N(0, 1 + a^2 + s^2), in closed form."""
    sd = 0.7

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, sd).to_event(1))

    found = information(model, guide, data(2000), num_draws=2)
    for each, strength in zip(found.dimensions, STRENGTHS.tolist(), strict=True):
        variance = 1 + strength**2 + sd**2
        marginal = (variance - 1 - math.log(variance)) / 2
        mutual = math.log(variance / sd**2) / 2
        assert abs(each.marginal_kl - marginal) < SE * each.marginal_kl_stderr + 0.01
        assert abs(each.mutual_information - mutual) < SE * each.mutual_information_stderr + 0.01


def test_activity_is_the_variance_of_the_posterior_mean():
    x = data(500)
    found = information(model, exact, x)
    expected = posterior(x)[0].var(0)
    for each, value in zip(found.dimensions, expected.tolist(), strict=True):
        assert each.activity == pytest.approx(value)


@pytest.mark.parametrize("seed", range(5))
def test_collapse_is_named_where_it_is_and_only_there(seed):
    def collapsed(x):
        loc, scale = posterior(x)
        keep = torch.tensor([1.0, 0.0, 1.0]).to(x)
        jitter = 0.01 * torch.sin(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc * keep + jitter * (1 - keep),
                                         scale * keep + (1 - keep)).to_event(1))  # fmt: skip

    def all_collapsed(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * 0, 1).to_event(1))

    x = data(300, seed)
    assert information(model, collapsed, x, seed=seed).collapsed == {"z": (1,)}
    text = information(model, collapsed, x, seed=seed).report()
    assert "Posterior collapse: site 'z', 1 of 3 dimensions (1)" in text
    assert "all its dimensions" in information(model, all_collapsed, x, seed=seed).report()
    healthy = information(model, exact, x, seed=seed)
    assert healthy.collapsed == {}
    assert "Posterior collapse" not in healthy.report()


def test_cost_without_information_is_named():
    def stuck(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * 0 + 0.8, 0.6).to_event(1))

    found = information(model, stuck, data(200))
    assert found.collapsed == {}
    assert found.active_units == 0
    assert "cost KL but do not vary with the data" in found.report()


def test_dependent_sites_are_counted_together():
    def chain(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros_like(x), 1.0))
            z1 = pyro.sample("z1", dist.Normal(0.8 * z2, 0.6))
            pyro.sample("x", dist.Normal(z1, 0.5), obs=x)

    def guide(x):
        variance = 1 / (1 / 1.0 + 1 / 0.25)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(variance * x / 0.25, variance**0.5))
            pyro.sample("z2", dist.Normal(0.8 * z1, 0.6))

    x = math.sqrt(1.25) * torch.randn(1000, dtype=torch.float64)
    found = information(chain, guide, x, num_draws=2)
    truth = 0.5 * math.log(1 / 0.2)  # I(x; z1, z2) = I(x; z1)
    assert abs(found.mutual_information - truth) < SE * (found.kl_stderr + found.marginal_kl_stderr)
    rows = {each.site: each for each in found.dimensions}
    assert rows["z2"].mutual_information is None
    assert rows["z1"].mutual_information is None  # its prior follows z2


def test_sites_that_are_masked_out():
    """A site that no datum has carries nothing; one that some have is refused."""

    def masked(x, known):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=known):
                pyro.sample("extra", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            model_z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(STRENGTHS * model_z, 1.0).to_event(1), obs=x)

    def guide(x, known):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=known):
                pyro.sample("extra", dist.Normal(x[:, :2], 0.5).to_event(1))
            pyro.sample("z", dist.Normal(*posterior(x)).to_event(1))

    x = data(300)
    none, some = torch.zeros(300, dtype=torch.bool), torch.arange(300) < 150
    found = information(masked, guide, (x, none), num_draws=2)
    assert {each.site for each in found.dimensions} == {"z"}
    truth = float(0.5 * torch.log1p(STRENGTHS**2).sum())
    assert abs(found.kl - truth) < SE * found.kl_stderr
    with pytest.raises(ProgramError, match="'extra' is masked out for some"):
        information(masked, guide, (x, some))


def test_information_never_exceeds_its_ceiling():
    def sharp(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1e-3).to_event(1))

    found = information(model, sharp, data(50))
    assert found.mutual_information <= math.log(50) + 1e-9
    assert found.saturated
    assert "ceiling" in found.report()


def test_wrong_use():
    with pytest.raises(OptionError, match="max_data 2"):
        information(model, exact, data(5), max_data=1)
    with pytest.raises(OptionError, match="at least two data"):
        information(model, exact, data(1))
