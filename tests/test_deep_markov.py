"""The deep Markov model and its guides: exact where linear, blind to padding, in each engine."""

from __future__ import annotations

import pytest
import torch
from linear_chains import FEATURES, STEPS, ExactChain, kalman, linear_model, parts

import pvae
from pvae.guides.forward_backward import ForwardBackward
from pvae.markov import GaussianChain, Padded, num_steps, step_mask
from pvae.models.deep_markov import DeepMarkov
from pvae.models.vae import VAE

GUIDES = [
    {"direction": direction, "structured": structured}
    for direction in ("backward", "forward", "both")
    for structured in (True, False)
]


def small_pair(**options):
    torch.manual_seed(1)
    model = DeepMarkov(
        24, image_shape=(6, 4), z_dim=3, transition_hidden=5, emission_hidden=7
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, ForwardBackward(model, hidden=8, **options).double()


def rolls(*lengths: int) -> torch.Tensor:
    torch.manual_seed(2)
    x = torch.bernoulli(torch.full((len(lengths), 6, 4), 0.4)).double()
    for row, length in zip(x, lengths, strict=True):
        row[length:] = -1
    return x


def test_linear_chain_has_the_kalman_evidence_at_every_particle():
    model = linear_model()
    x = model(size=4).detach()
    weights = pvae.draw(model, ExactChain(model), x, 20).log_weights
    truth = kalman(model, x.reshape(4, STEPS, FEATURES))
    assert (weights - truth).abs().max() < 1e-10


@pytest.mark.parametrize("planted", ["start", "noise", "transition"])
def test_a_wrong_linear_chain_misses_the_kalman_evidence(planted):
    model, wrong = linear_model(), linear_model()
    x = model(size=4).detach()
    with torch.no_grad():
        if planted == "start":
            wrong.start.zero_()
        elif planted == "noise":
            wrong.log_noise[0] += 0.1
        else:
            wrong.transition.linear.weight.copy_(model.transition.linear.weight.T)
    weights = pvae.draw(wrong, ExactChain(model), x, 20).log_weights
    assert (weights - kalman(model, x.reshape(4, STEPS, FEATURES))).abs().max() > 1e-3


def test_density_in_parallel_is_that_of_the_loop():
    model, guide = small_pair()
    x = rolls(6, 3)
    q = guide.posterior(x)["z"]
    z = q.expand([5, 2]).rsample()
    before, total = guide.start.expand(5, 2, -1), 0.0
    for t in range(6):
        step = q.at(t, before).log_prob(z[..., t, :])
        total = total + torch.where(step_mask(x)[:, t], step, 0.0)
        before = z[..., t, :]
    assert torch.allclose(q.log_prob(z), total, atol=1e-12)
    assert q.log_prob(z).shape == (5, 2)


def test_chain_draws_have_the_moments_of_the_chain():
    model = linear_model()
    a, b, q, *_, start = (part.detach() for part in parts(model))
    chain = GaussianChain(model.transition, model.start, 3)
    draws = chain.rsample((20_000,)).detach()
    mean, cov = start, torch.zeros_like(q)
    for t in range(3):
        mean, cov = a @ mean + b, a @ cov @ a.T + q
        found = draws[:, t]
        error = (cov.diagonal() / len(draws)).sqrt()
        assert ((found.mean(0) - mean).abs() < 4.5 * error).all()
        spread = cov.diagonal() * (2 / len(draws)) ** 0.5
        assert ((found.var(0) - cov.diagonal()).abs() < 4.5 * spread).all()


def test_kl_along_paths_is_the_difference_of_log_densities_with_less_noise():
    model, guide = small_pair()
    x = rolls(6, 3)
    q, p = guide.posterior(x)["z"].expand([4000, 2]), model.chain(step_mask(x))
    z = q.rsample()
    along, difference = q.kl_along(z, p), q.log_prob(z) - p.log_prob(z)
    error = (along - difference).std(0) / len(z) ** 0.5
    assert ((along - difference).mean(0).abs() < 4.5 * error).all()
    assert (along.std(0) < 0.5 * difference.std(0)).all()
    assert torch.equal(q.kl_along(z, q), torch.zeros(4000, 2).double())
    objective = pvae.vae(analytic_kl=True)
    layout = objective.prepare(model, guide, x)
    torch.manual_seed(0)
    loss = objective.evaluate(model, guide, x, layout=layout)
    torch.manual_seed(0)
    draw = pvae.draw(model, guide, x, 1).values["z"]
    fresh = guide.posterior(x)["z"].kl_along(draw, p)[0]  # its moments taken anew
    assert torch.allclose(loss.kl, fresh, atol=1e-12)


def test_density_of_a_draw_has_the_gradient_of_any_other_value():
    """What the draw left behind is what the density would find again."""
    model, guide = small_pair()
    x = rolls(6, 3)
    gradients = []
    for kept in (True, False):
        torch.manual_seed(0)
        q = guide.posterior(x)["z"]
        z = q.rsample()
        log_prob = q.log_prob(z if kept else z + 0)
        gradients.append(torch.autograd.grad(log_prob.sum(), list(guide.parameters())))
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, atol=1e-10)


@pytest.mark.parametrize("options", GUIDES, ids=str)
def test_padding_never_changes_a_weight(options):
    model, guide = small_pair(**options)
    x = rolls(6, 4, 1, 3)
    short = x[[3]][:, :3]
    torch.manual_seed(0)
    alone = pvae.draw(model, guide, short, 1)
    values = torch.zeros(1, 4, 6, 3, dtype=torch.float64).normal_()
    values[0, 3, :3] = alone.values["z"][0, 0]
    found = _weights(model, guide, x, values)[3]
    assert torch.allclose(found, alone.log_weights[0, 0], atol=1e-12)
    other = x.clone()
    other[3, 3:] = -7  # whatever stands at padding, as long as it is negative
    assert torch.equal(_weights(model, guide, other, values), _weights(model, guide, x, values))
    zeros = x.clamp(min=0)
    by_length = _weights(model, guide, (zeros, torch.tensor([6, 4, 1, 3])), values)
    assert torch.equal(by_length, _weights(model, guide, x, values))


def _weights(model, guide, batch, values):
    args = batch if isinstance(batch, tuple) else (batch,)
    mask = model.mask(args[0], *args[1:])
    log_p = model.chain(mask).log_prob(values)[0]
    log_p = log_p + Padded(model.decode(values), mask).log_prob(args[0].flatten(1))[0]
    return log_p - guide.posterior(*args)["z"].expand([1, 4]).log_prob(values)[0]


def test_padding_that_is_counted_is_caught():
    """The check above fails for a model that forgets its mask."""
    model, guide = small_pair()
    x = rolls(6, 4, 1, 3)
    values = torch.randn(1, 4, 6, 3, dtype=torch.float64)
    forgetful = Padded(model.decode(values), torch.ones(4, 6, dtype=torch.bool))
    right = Padded(model.decode(values), step_mask(x))
    zeros = x.clamp(min=0)
    assert not torch.allclose(
        forgetful.log_prob(zeros.flatten(1)), right.log_prob(zeros.flatten(1))
    )


def test_backward_guide_sees_the_future_alone_and_forward_the_past():
    x = rolls(6, 5)
    for direction, seen in (("backward", range(2, 6)), ("forward", range(3))):
        model, guide = small_pair(direction=direction, structured=False)
        changed = []
        before = guide.posterior(x)["z"].base_dist.base_dist.loc[0, 2]
        for t in range(6):
            other = x.clone()
            other[0, t] = 1 - other[0, t]
            after = guide.posterior(other)["z"].base_dist.base_dist.loc[0, 2]
            if not torch.equal(before, after):
                changed.append(t)
        assert changed == list(seen)


@pytest.mark.parametrize("options", GUIDES[:2], ids=str)
def test_staged_training_is_eager_training(options):
    histories = []
    for engine in ("eager", "staged"):
        model, guide = small_pair(**options)
        run = pvae.fit(
            model.float(), guide.float(), rolls(3, 2, 1, 3, 3)[:, :3].float(), epochs=2,
            batch_size=3, lr=1e-2, engine=engine, progress=False,
        )  # fmt: skip
        assert run.engine.startswith(engine)
        histories.append([row["bound"] for row in run.history])
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)


def test_training_approaches_the_evidence_of_a_linear_chain():
    model = linear_model()
    x = model(size=200).detach()
    guide = ForwardBackward(model, hidden=32).double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    pvae.fit(model, guide, x, epochs=40, batch_size=50, lr=2e-2, engine="eager", progress=False)
    truth = kalman(model, x.reshape(-1, STEPS, FEATURES)).mean()
    found = pvae.evidence.importance(model, guide, x, 100)
    assert float(truth) - 0.5 < float(found.elbo.mean()) < float(truth)
    error = (found.stderr.square().sum().sqrt() / len(x)).item()
    assert abs(found.mean - float(truth)) < 4.5 * error + 0.02


def test_generated_sequences_have_the_length_and_start_where_the_model_says():
    model, _ = small_pair()
    x = model(size=3)
    assert x.shape == (3, 24)
    assert set(x.unique().tolist()) <= {0.0, 1.0}
    assert num_steps(rolls(6, 2, 1), 4).tolist() == [6, 2, 1]
    chain = linear_model()
    with torch.no_grad():
        chain.transition.log_scale.fill_(-20)
        chain.log_noise.fill_(-20)
    a, b, _, c, d, _, start = (part.detach() for part in parts(chain))
    first = chain(size=2).reshape(2, STEPS, FEATURES)[:, 0]
    assert torch.allclose(first, (c @ (a @ start + b) + d).expand(2, -1), atol=1e-6)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: DeepMarkov(6, transition="gatd"), "transition is 'gated' or 'linear'"),
        (lambda: DeepMarkov(6, likelihood="bernouli"), "did you mean 'bernoulli'"),
        (lambda: DeepMarkov(6, image_shape=(4, 2)), "steps, features"),
        (lambda: ForwardBackward(DeepMarkov(6), direction="up"), "direction is one of"),
        (lambda: ForwardBackward(VAE(6)), "chain of states"),
    ],
)
def test_wrong_arguments_are_one_sentence(build, match):
    with pytest.raises(pvae.PvaeError, match=match) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_a_value_that_is_no_bit_is_refused():
    model, guide = small_pair()
    x = rolls(6, 4)
    x[1, 2, 1] = 0.5
    with pytest.raises(pvae.PvaeError, match="row 1 of the data has"):
        pvae.draw(model, guide, x)
