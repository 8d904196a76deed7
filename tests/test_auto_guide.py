"""The derived guide: what it derives, that it is exact where it can be, and what it refuses."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from derived_programs import ROWS, SemiSupervised, SmallVAE, groups, state_space, zoo
from pyro import poutine
from torch import Tensor

import pvae
from pvae import catalogue
from pvae.errors import DataError, OptionError, ProgramError
from pvae.guides.derived import Auto
from pvae.guides.gaussian import Gaussian
from pvae.particles import inspect as inspect_pair
from pvae.particles import latent_sites
from pvae.staging import capture
from pvae.structure import read

NAMES = list(zoo())


def derive(name: str, rows: int = ROWS, **options):
    torch.manual_seed(0)
    pyro.clear_param_store()
    model, batch = zoo(rows)[name]()
    torch.manual_seed(1)
    options = {"hidden": (16,), **options}
    return model, pvae.guides.auto(model, batch, **options), batch


def total(particles: pvae.Particles) -> Tensor:
    """The ELBO of the whole batch, global terms included."""
    shared = [*particles.global_log_p.values(), *(-q for q in particles.global_log_q.values())]
    return particles.log_weights.mean(0).sum() + sum(term.mean() for term in shared)


# --- every program of the zoo --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
class TestZoo:
    def test_weighs_every_particle_and_reaches_every_parameter(self, name):
        model, guide, batch = derive(name)
        particles = pvae.draw(model, guide, batch, 3)
        assert particles.shape == (3, ROWS)
        assert torch.isfinite(particles.log_weights).all()
        (particles.log_weights.logsumexp(0).sum() + total(particles)).backward()
        for key, parameter in guide.named_parameters():
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
        assert all(site in guide.explain() for site in guide.latents)

    def test_other_rows_state_dict_and_copy(self, name):
        model, guide, _ = derive(name)
        _, other = zoo(5)[name]()
        if name != "m2_labelled":
            assert pvae.draw(model, guide, other, 2).shape == (2, 5)
        fresh = derive(name)[1]
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.add_(0.01)
        fresh.load_state_dict(guide.state_dict())
        batch = zoo()[name]()[1]
        weights = []
        for candidate in (guide, fresh, copy.deepcopy(guide)):
            torch.manual_seed(2)
            weights.append(pvae.draw(model, candidate, batch, 2).log_weights)
        assert torch.equal(weights[0], weights[1])
        assert torch.equal(weights[0], weights[2])


def factorisation(guide: Auto) -> dict[str, tuple[str, ...]]:
    return {r.site.name: tuple(n for n in r.factor.given if n is not None) for r in guide.recipes}


EXPECTED = {
    "vae": {"z": ()},
    "two_layer": {"z2": (), "z1": ("z2",)},
    "gmm_vae": {"c": (), "z": ("c",)},
    "groups": {"mu": (), "u": ("mu",)},
    "state_space": {"z_0": (), **{f"z_{t}": (f"z_{t - 1}",) for t in range(1, 5)}},
    "eight_schools": {"mu": (), "tau": (), "theta": ("mu", "tau")},
    "baseball": {"mean": (), "strength": (), "skill": ("mean", "strength")},
    "single_cell": {"z2": (), "y": ("z2",), "z1": ("z2", "y"), "l": ("z1",)},
    "positive_parts": {
        "rate": (), "share": ("rate",), "size": ("rate", "share"),
        "corner": ("rate", "share", "size"),
    },
    "item_response": {"difficulty": (), "ability": ("difficulty",)},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_factorisation_is_the_faithful_inverse(name):
    assert factorisation(derive(name)[1]) == EXPECTED[name]


ENCODERS = {
    "vae": "VectorEncoder",
    "pictures": "ImageEncoder",
    "state_space": "SequenceEncoder",
    "groups": "SetEncoder",
    "latent_dirichlet": "SetEncoder",
    "prodlda": "VectorEncoder",
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_follows_the_shape_of_the_data(name):
    encoder = derive(name)[1].encoders["input_0"]
    assert type(encoder).__name__ == ENCODERS[name]
    assert encoder.scaled.counts == (name == "prodlda")
    assert encoder.scaled.categories == (8 if name == "latent_dirichlet" else 0)


def test_a_target_beside_its_inputs_is_a_column_and_no_step():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x[:, 0], 1.0))
            pyro.sample("y", dist.Poisson(z.exp()), obs=x[:, -1])

    torch.manual_seed(0)
    batch = torch.cat([torch.randn(ROWS, 2), torch.poisson(torch.ones(ROWS, 1))], 1)
    guide = pvae.guides.auto(model, batch)
    encoder = guide.encoders["input_0"]
    assert type(encoder).__name__ == "VectorEncoder"
    assert not encoder.scaled.counts  # the inputs are negative too
    assert torch.isfinite(pvae.draw(model, guide, batch, 3).log_weights).all()


def test_a_loop_shares_one_head():
    _, guide, _ = derive("state_space")
    assert list(guide.heads) == ["z_each"]
    assert [r.pieces[0].step for r in guide.recipes] == list(range(5))


def test_set_guide_takes_sets_of_another_size():
    _, guide, _ = derive("groups")
    assert pvae.draw(groups, guide, torch.randn(3, 9), 2).shape == (2, 3)


def test_data_of_another_shape_are_refused():
    model, guide, _ = derive("vae")
    with pytest.raises(ProgramError, match=r"derived for data of shape \(9,\), got \(8,\)"):
        guide(torch.zeros(2, 8))
    assert isinstance(model, SmallVAE)


def test_masked_steps_weigh_nothing():
    model, guide, batch = derive("deep_markov")
    particles = pvae.draw(model, guide, batch, 2)
    mask = batch[1]
    for step in range(4):
        log_q = particles.log_q[f"z_{step + 1}"]
        assert torch.equal(log_q == 0, ~mask[:, step].expand(2, -1))


def test_hidden_labels_do_not_reach_the_guide():
    """Where ``known`` is false, another label in the batch changes nothing."""
    model, guide, (x, y, known) = derive("m2_masked")
    weights = []
    for labels in (y, torch.where(known, y, (y + 1) % 3)):
        torch.manual_seed(3)
        weights.append(pvae.draw(model, guide, (x, labels, known), 4).log_weights)
    assert torch.equal(*weights)
    log_q = pvae.draw(model, guide, (x, y, known), 4).log_q["y_unobserved"]
    assert torch.equal(log_q == 0, known.expand(4, -1))


def test_one_guide_with_labels_and_without():
    torch.manual_seed(0)
    model, x, y = SemiSupervised(), torch.rand(6, 9).bernoulli(), torch.eye(3)[torch.arange(6) % 3]
    guide = pvae.guides.auto(model, (x,), also=[(x, y)], hidden=(16,))
    assert factorisation(guide) == {"y": (), "z": ("y",)}
    assert set(pvae.draw(model, guide, (x,), 2).values) == {"y", "z"}
    labelled = pvae.draw(model, guide, (x, y), 2)
    assert set(labelled.values) == {"z"}
    layout = inspect_pair(model, guide, (x, y))
    sites = latent_sites(model, guide, (x, y), 1, layout)
    other = latent_sites(model, guide, (x, y.roll(1, 1)), 1, layout)
    assert not torch.allclose(sites["z"].posterior.mean, other["z"].posterior.mean)
    with pytest.raises(ProgramError, match="was derived for"):
        guide(y=y)


# --- families ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["diagonal", "full", "low_rank", "flow"])
@pytest.mark.parametrize("name", ["positive_parts", "gmm_vae", "state_space"])
def test_families_weigh_and_learn(family, name):
    model, guide, batch = derive(name, family=family)
    particles = pvae.draw(model, guide, batch, 3)
    assert torch.isfinite(particles.log_weights).all()
    total(particles).backward()
    for key, parameter in guide.named_parameters():
        assert parameter.grad is not None, key
    assert {r.family for r in guide.recipes} <= {family, "discrete"}


def test_family_by_site():
    _, guide, _ = derive("two_layer", family={"z1": "full"})
    assert {r.site.name: r.family for r in guide.recipes} == {"z1": "full", "z2": "diagonal"}


@pytest.mark.parametrize("family", ["diagonal", "full", "low_rank", "flow"])
@pytest.mark.parametrize(
    "prior",
    [dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.Gamma(2.0, 1.0), dist.Uniform(-1.0, 3.0)],
    ids=["real", "positive", "interval"],
)
def test_density_of_a_head_integrates_to_one(family, prior):
    """Importance sampling from the prior: the mean of q / p is one, within 4.5 standard errors."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            z = z.sum(-1) if prior.event_shape else z
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    torch.manual_seed(0)
    guide = pvae.guides.auto(model, torch.randn(4), hidden=(8,), family=family)
    site = poutine.trace(guide).get_trace(torch.zeros(2)).nodes["z"]["fn"]
    draws = prior.expand((2,)).sample((20_000,))
    ratio = (site.log_prob(draws) - prior.log_prob(draws)).exp().double()
    z = (ratio.mean(0) - 1) / (ratio.std(0) / math.sqrt(len(ratio)))
    assert z.abs().max() < 4.5
    assert ratio.std(0).max() < 50


def test_zero_outputs_are_the_prior():
    """A head begins near the prior: with its outputs at zero, q is at 0.69 times its scale."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor([3.0, -40.0]), 2.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    torch.manual_seed(0)
    guide = pvae.guides.auto(model, torch.randn(4))
    with torch.no_grad():
        for parameter in guide.heads.parameters():
            parameter.zero_()
    posterior = poutine.trace(guide).get_trace(torch.randn(4)).nodes["z"]["fn"]
    assert (posterior.mean - torch.tensor([3.0, -40.0])).abs().max() < 0.4
    assert (posterior.base_dist.scale / (2 * math.log(2)) - 1).abs().max() < 0.15


# --- exact where it can be -----------------------------------------------------------------------


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def normal(loc, scale: float):
    return dist.Normal(torch.as_tensor(loc, dtype=torch.float64), number(scale))


def collider(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", normal(0.0, 1.0))
        b = pyro.sample("b", normal(0.0, 1.0))
        pyro.sample("x", normal(a + b, 0.5), obs=x[:, 0])


def chain(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        upper = pyro.sample("upper", normal(0.0, 1.0))
        lower = pyro.sample("lower", normal(0.9 * upper, 0.5))
        pyro.sample("x", normal(lower, 0.5), obs=x[:, 0])


def fork(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        root = pyro.sample("root", normal(0.0, 1.0))
        left = pyro.sample("left", normal(root, 0.5))
        right = pyro.sample("right", normal(-root, 0.5))
        pyro.sample("x", normal(left, 0.5), obs=x[:, 0])
        pyro.sample("y", normal(right, 0.5), obs=x[:, 1])


# By hand: precision of the latents given the data; how the data enter it; covariance of the data.
GAUSSIAN = {
    collider: ("ab", [[1 + 4, 4], [4, 1 + 4]], [[4], [4]], [[2.25]]),
    chain: (["upper", "lower"], [[1 + 0.81 * 4, -0.9 * 4], [-0.9 * 4, 8]], [[0], [4]],
            [[0.81 + 0.5]]),
    fork: (["root", "left", "right"], [[1 + 8, -4, 4], [-4, 8, 0], [4, 0, 8]],
           [[0, 0], [4, 0], [0, 4]], [[1.5, -1], [-1, 1.5]]),
}  # fmt: skip


def gap(model, guide, x: Tensor, covariance: Tensor) -> Tensor:
    """``log p(x) - ELBO``, nats per datum."""
    evidence = dist.MultivariateNormal(torch.zeros_like(x[0]), covariance).log_prob(x)
    torch.manual_seed(9)
    with torch.no_grad():
        return (evidence - pvae.draw(model, guide, x, 4000).log_weights.mean(0)).mean()


def best_factorised(sites, precision: Tensor, enters: Tensor):
    """Mean field, and here also the factorisation along the model's own edges, at its optimum."""

    def guide(x):
        loc = torch.linalg.solve(precision, enters @ x.T)
        with pyro.plate("data", len(x)):
            for index, name in enumerate(sites):
                scale = precision[index, index].rsqrt()
                pyro.sample(name, dist.Normal(loc[index], scale))

    return guide


@pytest.mark.parametrize("model", GAUSSIAN, ids=lambda m: m.__name__)
def test_exact_posterior_where_mean_field_cannot_be(model):
    """The derived guide closes the gap; the best factorised Gaussian leaves what theory says."""
    sites, *numbers = GAUSSIAN[model]
    precision, enters, covariance = (torch.tensor(n, dtype=torch.float64) for n in numbers)
    torch.manual_seed(0)
    x = dist.MultivariateNormal(torch.zeros_like(covariance[0]), covariance).sample((64,))
    lost = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    assert lost > 0.1
    naive = best_factorised(sites, precision, enters)
    assert abs(gap(model, naive, x, covariance) - lost) < 0.02
    torch.manual_seed(1)
    guide = pvae.guides.auto(model, x, hidden=())
    pvae.fit(model, guide, x, objective=pvae.stl(num_particles=4), epochs=450, batch_size=64,
             lr=0.05, lr_schedule="cosine", engine="eager", progress=False)  # fmt: skip
    assert abs(gap(model, guide, x, covariance)) < 1e-3


def test_one_real_site_gives_the_hand_written_guide():
    """For a VAE, equal seeds give the weights, draws and densities of ``guides.gaussian``."""
    torch.manual_seed(0)
    model, x = SmallVAE(), torch.rand(6, 9).bernoulli()
    moments = {"x_mean": x.mean(0), "x_scale": torch.full((9,), 0.5)}
    weights = []
    for build in (
        lambda: pvae.guides.auto(model, x, **moments),
        lambda: Gaussian(9, {"z": (3,)}, **moments),
    ):
        torch.manual_seed(1)
        guide = build()
        torch.manual_seed(2)
        weights.append(pvae.draw(model, guide, x, 4).log_weights)
    assert torch.equal(*weights)


def test_data_keep_their_precision():
    torch.manual_seed(0)
    x = torch.randn(5, 1, dtype=torch.float64)
    guide = pvae.guides.auto(collider, x)
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    assert pvae.draw(collider, guide, x, 2).log_weights.dtype == torch.float64


# --- engines and other inference -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("groups", {"family": "full"}), ("pictures", {}),
        ("state_space", {}), ("gmm_vae", {}),
    ],
)  # fmt: skip
def test_staged_is_eager(name, options):
    parameters = []
    for engine in ("eager", "staged"):
        model, guide, batch = derive(name, **options)
        gradient = pvae.gradients.mixed if name == "gmm_vae" else pvae.gradients.pathwise
        objective = pvae.Objective(gradient=gradient, num_particles=2)
        run = pvae.fit(model, guide, batch, objective=objective, epochs=2, batch_size=ROWS,
                       engine=engine, progress=False)  # fmt: skip
        assert run.engine.startswith(engine)
        parameters.append([p.detach().clone() for p in guide.parameters()])
    for one, other in zip(*parameters, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_flow_can_be_staged():
    """Its draws and densities as one graph of tensor operations."""
    model, guide, batch = derive("vae", family="flow")
    layout = inspect_pair(model, guide, batch)

    def weights(x):
        return pvae.draw(model, guide, x, 2, layout=layout).log_weights

    with torch.no_grad():
        graph = capture(weights, batch)
        found = []
        for function in (weights, graph):
            torch.manual_seed(4)
            found.append(function(batch))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)


def test_enumeration_of_a_discrete_site_in_the_guide():
    """TraceEnum_ELBO sums out what the model marks, in the derived guide too."""
    model, batch = zoo()["latent_dirichlet"]()
    torch.manual_seed(0)
    guide = pvae.guides.auto(model, batch, hidden=(8,))
    pyro.set_rng_seed(0)
    loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=2).differentiable_loss(model, guide, batch)
    loss.backward()
    head = guide.heads["word_topics"].trunk.linear.weight
    assert torch.isfinite(loss)
    assert head.grad.abs().max() > 0


def test_a_closed_form_kl_is_used_where_there_is_one():
    model, guide, batch = derive("two_layer")
    objective = pvae.Objective(num_particles=1, analytic_kl=True)
    run = pvae.fit(model, guide, batch, objective=objective, epochs=2, batch_size=ROWS,
                   engine="eager", progress=False)  # fmt: skip
    assert math.isfinite(run.history[-1]["elbo"])


# --- refusals ------------------------------------------------------------------------------------


def with_site(draw):
    def model(x):
        with pyro.plate("data", len(x)):
            z = draw(x)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


def random_branch(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    return pyro.sample("sometimes", dist.Normal(0.0, 1.0)) if bool((z > 0).all()) else z


def random_length(x):
    total, index = torch.zeros(()), 0
    while pyro.sample(f"go_{index}", dist.Bernoulli(0.5)).sum() > len(x) / 2:
        index += 1
    return total


def endless(x, depth: int = 0):
    return endless(x, depth + 1) + pyro.sample(f"step_{depth}", dist.Normal(0.0, 1.0))


def unbounded(x):
    index, total = 0, torch.zeros(())
    while True:
        total = total + pyro.sample(f"step_{index}", dist.Normal(0.0, 1.0))
        index += 1


def moving_bound(x):
    z = pyro.sample("z", dist.Gamma(2.0, 1.0))
    return pyro.sample("below", dist.Uniform(torch.zeros(()), z))


def outside(x):
    return pyro.sample("wide", dist.Normal(torch.zeros(5, 1), 1.0).expand([5, len(x)])).sum(0)


def hidden_mask(x):
    with poutine.mask(mask=torch.arange(len(x)) % 2 == 0):
        return pyro.sample("masked", dist.Normal(0.0, 1.0))


REFUSED = {
    "branch": (random_branch, "site 'sometimes' is drawn at some runs of the model and not at"),
    "random length": (random_length, "site 'go_1' is drawn at some runs"),
    "recursion": (endless, r"and the model still goes on: bound its recursion"),
    "loop": (unbounded, r"site 'step_\d+' comes after 4001 sites and the model still goes on"),
    "poisson": (
        lambda x: pyro.sample("count", dist.Poisson(3.0)),
        r"site 'count' \(Poisson\) is discrete and cannot be enumerated .*: cut it off",
    ),
    "moving support": (moving_bound, "site 'below' has a support that is not the same"),
    "no plate": (outside, r"site 'wide' has a batch dimension of size 5 \(dim -2\) that is in no"),
    "delta": (
        lambda x: pyro.sample("fixed", dist.Delta(torch.zeros(()))),
        "site 'fixed' is a Delta, .*: use pyro.deterministic",
    ),
    "circle": (
        lambda x: pyro.sample("angle", dist.VonMises(0.0, 1.0)),
        r"site 'angle' \(VonMises\) lives on a circle",
    ),
    "mask": (hidden_mask, "site 'masked' is masked by a tensor that is not in the batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_site_and_remedy(name):
    draw, message = REFUSED[name]
    with pytest.raises(ProgramError, match=message) as caught:
        pvae.guides.auto(with_site(draw), torch.randn(4))
    assert "\n" not in str(caught.value)


def discrete(x):
    return pyro.sample("c", dist.Categorical(torch.ones(3))) * pyro.sample("z", normal(0.0, 1.0))


def test_families_that_do_not_fit_are_refused():
    model, x = with_site(discrete), torch.randn(4)
    assert pvae.guides.auto(model, x, family="flow").recipes[0].family == "discrete"
    with pytest.raises(ProgramError, match=r"'flow' does not fit site 'c', which is discrete"):
        pvae.guides.auto(model, x, family={"c": "flow"})
    alone = with_site(lambda x: pyro.sample("c", dist.Categorical(torch.ones(3))))
    with pytest.raises(ProgramError, match=r"'full' does not fit site 'c'"):
        pvae.guides.auto(alone, x, family="full")
    with pytest.raises(OptionError, match=r"no family is called 'flwo': did you mean 'flow'\?"):
        pvae.guides.auto(model, x, family="flwo")
    with pytest.raises(OptionError, match="names site 'y', which is not latent"):
        pvae.guides.auto(model, x, family={"y": "full"})
    with pytest.raises(ProgramError, match="site 'mu' is shared by all data and has no context"):
        derive("eight_schools", family={"mu": "flow"})


def test_a_subsampled_inner_plate_is_refused():
    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("part", 10, subsample_size=3, dim=-1):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(u, 1.0), obs=x[:, :3])

    with pytest.raises(ProgramError, match="site 'u' is in plate 'part', which takes 3 of 10"):
        pvae.guides.auto(model, torch.randn(4, 10))


def test_data_outside_the_support_are_refused():
    with pytest.raises(DataError, match=r"Bernoulli likelihood of site 'x'.*binarise the data"):
        pvae.guides.auto(SmallVAE(), torch.rand(4, 9))


def test_unknown_encoder_and_single_row_are_refused():
    with pytest.raises(OptionError, match=r"no encoder is called 'imag': did you mean 'image'\?"):
        derive("vae", encoder="imag")
    with pytest.raises(OptionError, match=r"encoder 'image' does not fit data of shape \(9,\)"):
        derive("vae", encoder="image")
    with pytest.raises(ProgramError, match="at least 2 data"):
        derive("vae", rows=1)


# --- dependencies that one way of looking misses -------------------------------------------------


def test_dependency_through_a_buffer_is_found():
    """Labels do not follow a value written into a buffer; drawing it anew shows it."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            buffer = torch.zeros(2, *z.shape)
            buffer[0], buffer[1] = z, w
            pyro.sample("x", dist.Normal(buffer.sum(0), 1.0), obs=x)

    assert read(model, torch.randn(4)).parents["x"] == {"z", "w"}


def test_dependency_with_a_weight_of_zero_is_found():
    """Drawing anew shows nothing at a weight of zero; labels do."""
    weight = torch.zeros(())

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)

    assert read(model, torch.randn(4)).parents["x"] == {"z"}


# --- data as they come ---------------------------------------------------------------------------


def test_badly_scaled_and_missing_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            seen = torch.where(x.isnan(), torch.zeros_like(x), x)
            loc = z.unsqueeze(-1) + torch.zeros(3)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=seen)

    torch.manual_seed(0)
    x = torch.randn(8, 3) * torch.tensor([1e6, 1e-6, 0.0])
    x[0, 0] = float("nan")
    guide = pvae.guides.auto(model, x)
    with torch.no_grad():
        inner = guide.encoders["input_0"].scaled(x)
    assert torch.isfinite(inner).all()
    assert (inner[..., 0].std(0)[:2] - 1).abs().max() < 0.2
    assert torch.isfinite(pvae.draw(model, guide, x, 2).log_q["z"]).all()


# --- the command line ----------------------------------------------------------------------------


def test_catalogue_finds_it_by_name():
    assert "auto" in catalogue.listing("guide")
    assert "derived" not in catalogue.listing("guide")
    found = catalogue.find("guide", "auto")
    assert found.factory is Auto
    assert found.reference == "auto"


def test_train_and_load_by_the_command_line(tmp_path, capsys):
    from pvae.cli import main

    run_dir = tmp_path / "run"
    arguments = ["train", "vae", "--data", "digits", "--guide", "auto", "--epochs", "1",
                 "--guide.hidden", "[16]", "--guide.family", "full",
                 "--run-dir", str(run_dir), "--engine", "eager"]  # fmt: skip
    assert not main(arguments)
    run = pvae.load(run_dir)
    assert isinstance(run.guide, Auto)
    x = torch.rand(5, 64)
    first = pvae.draw(run.model, run.guide, x, 2).log_weights
    assert torch.isfinite(first).all()
    assert run.guide.recipes[0].family == "full"


def test_state_space_guide_is_near_the_smoother():
    """A short training on a random walk beats the prior by far."""
    torch.manual_seed(0)
    x = torch.randn(64, 5, 2).cumsum(1)
    guide = pvae.guides.auto(state_space, x, hidden=(32,))
    before = pvae.draw(state_space, guide, x, 20).log_weights.mean()
    run = pvae.fit(state_space, guide, x, epochs=60, batch_size=64, lr=0.01, engine="eager",
                   progress=False)  # fmt: skip
    after = pvae.draw(state_space, run.guide, x, 20).log_weights
    assert after.mean() > before + 5
    assert after.std(0).mean() < 3
