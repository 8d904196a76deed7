"""Importance sampling against exact evidence."""

from __future__ import annotations

import math
import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import data_in_columns

import pvae
from pvae.errors import DataError, OptionError, ProgramError
from pvae.evidence import Evidence, importance
from pvae.guides.exact import Exact
from pvae.guides.gaussian import Gaussian
from pvae.models.factor_analysis import FactorAnalysis
from pvae.models.gaussian_mixture import GaussianMixture
from pvae.models.vae import VAE

STANDARD_ERRORS = 4.5


@pytest.fixture
def pair():
    torch.manual_seed(0)
    model = FactorAnalysis(8, z_dim=3).double()
    with torch.no_grad():
        x = model(size=60)

    def guide(x: torch.Tensor) -> None:
        exact = model.posterior(x)["z"]
        with pyro.plate("data", len(x)):
            tril = 1.3 * exact.scale_tril
            pyro.sample("z", dist.MultivariateNormal(exact.mean + 0.1, scale_tril=tril))

    return model, guide, x


def test_estimate_lies_within_its_own_standard_errors(pair):
    model, guide, x = pair
    found = importance(model, guide, x, 2000)
    z = (found.log_evidence - model.log_evidence(x).detach()) / found.stderr
    assert z.abs().max() < STANDARD_ERRORS
    assert 0.5 < z.std() < 1.5  # the errors are neither too large nor too small
    assert (found.pareto_k < 0.7).all()
    assert (found.elbo <= found.log_evidence).all()
    assert found.ess.min() > 200


def test_exact_guide_gives_the_truth_without_error():
    for model in (FactorAnalysis(5, z_dim=2).double(), GaussianMixture(5).double()):
        x = torch.randn(7, 5, dtype=torch.float64)
        found = importance(model, Exact(model), x, 30)
        assert (found.log_evidence - model.log_evidence(x)).abs().max() < 1e-10
        assert found.stderr.max() < 1e-6
        assert (found.pareto_k == -math.inf).all()
        assert found.unreliable == 0


@pytest.mark.parametrize("num_particles", [1, 7, 64, 300])
@pytest.mark.parametrize("max_pairs", [1, 13, 100, 10**6])
def test_exactly_k_draws_whatever_the_pieces(pair, num_particles, max_pairs):
    """T4: with a constant weight of one, anything but K draws would show as log(K'/K)."""
    model, _, x = pair
    calls = []

    def counting(x: torch.Tensor) -> None:
        calls.append(model(x))

    found = importance(counting, Exact(model), x[:5], num_particles, max_pairs=max_pairs)
    assert (found.log_evidence - model.log_evidence(x[:5])).abs().max() < 1e-9
    assert found.num_particles == num_particles


def test_pieces_of_the_model_do_not_change_the_numbers(pair):
    model, guide, x = pair
    block = {"num_particles": 50, "seed": 3}
    whole = importance(model, guide, x[:4], max_pairs=10**6, **block)
    pieces = importance(model, guide, x[:4], max_pairs=60, **block)  # 4 data, 15 particles at once
    assert torch.allclose(whole.log_evidence, pieces.log_evidence, atol=1e-12)


def test_the_encoder_runs_once_per_datum_and_the_model_within_the_cap(pair):
    model, guide, x = pair
    encoded, decoded = [], []

    def watched_guide(x: torch.Tensor) -> None:
        encoded.append(len(x))
        guide(x)

    def watched_model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=x.dtype), 1).to_event(1))
            decoded.append(math.prod(z.shape[:-1]))
            pyro.sample("x", model.decode(z), obs=x)

    importance(watched_model, watched_guide, x, 100, max_pairs=150)
    checks = 2  # inspect() runs the pair twice, on the first block
    blocks = encoded[checks:]
    assert sum(blocks) == len(x)
    assert max(decoded) <= 150


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_every_engine_uses_the_same_draws(likelihood, recwarn):
    """Blocks of 13 data and one of 7; pieces of 15 particles and one that reaches back."""
    torch.manual_seed(0)
    model = VAE(6, z_dim=2, hidden=(8,), likelihood=likelihood).double()
    guide = Gaussian(6, model.latents, hidden=(8,)).double()
    x = (torch.rand(33, 6) < 0.5).double()
    found = {
        engine: importance(model, guide, x, 10_000, max_pairs=13 * 15, seed=3, engine=engine)
        for engine in ("eager", "staged", "auto")
    }
    for engine in ("staged", "auto"):
        for column in ("log_evidence", "stderr", "pareto_k", "elbo"):
            ours, theirs = getattr(found[engine], column), getattr(found["eager"], column)
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), (engine, column)
    assert not recwarn.list


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_evaluation_equals_eager():
    torch.manual_seed(0)
    model = VAE(6, z_dim=2, hidden=(8,))
    guide = Gaussian(6, model.latents, hidden=(8,))
    x = (torch.rand(20, 6) < 0.5).float()
    ours, theirs = (
        importance(model, guide, x, 500, max_pairs=600, engine=engine)
        for engine in ("compiled", "eager")
    )
    assert torch.allclose(ours.log_evidence, theirs.log_evidence, rtol=1e-5)
    assert torch.allclose(ours.elbo, theirs.elbo, rtol=1e-5)


def test_what_cannot_be_staged_is_evaluated_eagerly_with_the_reason(pair):
    model, guide, x = pair

    def branching(x: torch.Tensor) -> None:
        if float(x.mean()) > 100:
            return
        model(x)

    def baked(x: torch.Tensor) -> None:
        model(x - torch.as_tensor(x.numpy().mean(1, keepdims=True)))

    for program, reason in ((branching, "branches on data"), (baked, "reproduce|numpy")):
        expected = importance(program, guide, x, 100, engine="eager")
        with pytest.warns(UserWarning, match=reason):
            found = importance(program, guide, x, 100, engine="staged")
        assert torch.equal(found.log_evidence, expected.log_evidence)


def test_data_of_the_same_small_seed_do_not_share_the_stream():
    """Noise of x and of z from one stream would make the guide look far too good or bad."""
    torch.manual_seed(0)
    x = torch.randn(2000, 1, dtype=torch.float64)
    seen = {}

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1).to_event(1))
            seen["z"] = z
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1).double(), 1).to_event(1))

    importance(model, guide, x, 1, seed=0, engine="eager")
    correlation = torch.corrcoef(torch.stack([x.flatten(), seen["z"].flatten()]))[0, 1]
    assert abs(correlation) < STANDARD_ERRORS / 2000**0.5


def test_float32_sums_are_safe():
    """10 000 particles in float32: the mean weight keeps its digits."""
    torch.manual_seed(0)
    model = FactorAnalysis(8, z_dim=3)
    with torch.no_grad():
        x = model(size=5)
    found = importance(model, Exact(model), x, 10_000)
    exact = importance(model.double(), Exact(model), x.double(), 2)
    assert found.log_evidence.dtype == torch.float64
    assert (found.log_evidence - exact.log_evidence).abs().max() < 1e-4


def test_same_seed_same_numbers_and_the_callers_stream_is_untouched(pair):
    model, guide, x = pair
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    first = importance(model, guide, x, 20, seed=5)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first.log_evidence, importance(model, guide, x, 20, seed=5).log_evidence)
    other = importance(model, guide, x, 20, seed=6)
    assert not torch.equal(first.log_evidence, other.log_evidence)


def test_modules_are_put_in_evaluation_mode_and_back():
    torch.manual_seed(0)
    model = FactorAnalysis(4, z_dim=2)
    guide = Gaussian(4, model.latents, hidden=(8,))
    guide.encoder.append(torch.nn.Dropout(0.9))
    x = torch.randn(6, 4)
    first = importance(model, guide, x, 10)
    assert guide.training
    assert torch.equal(first.log_evidence, importance(model, guide, x, 10).log_evidence)


def test_one_by_one_agrees_in_distribution(pair):
    model, guide, x = pair
    found = importance(model, guide, x[:10], 200, vectorize=False)
    z = (found.log_evidence - model.log_evidence(x[:10]).detach()) / found.stderr
    assert z.abs().max() < STANDARD_ERRORS


def test_tuple_batches_and_progress(pair):
    model, guide, x = pair
    seen = []
    found = importance(
        lambda x, _: model(x),
        lambda x, _: guide(x),
        (x, torch.zeros(len(x))),
        50,
        max_pairs=20,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(found) == len(x)
    assert seen[-1] == (60, 60)
    assert len(seen) > 1


def test_summary_and_scale(pair):
    model, guide, x = pair
    found = importance(model, guide, x, 100)
    moved = found.shifted(torch.full((60,), 2.0))
    assert moved.mean == pytest.approx(found.mean + 2)
    assert moved.elbo.mean() == pytest.approx(float(found.elbo.mean()) + 2)
    assert f"{found.mean:.3f}" in repr(found)
    assert Evidence.exact(torch.zeros(3)).kind == "exact"
    assert found.mean_stderr == pytest.approx(float(found.log_evidence.std()) / math.sqrt(60))


def test_wrong_use_gets_one_sentence(pair):
    model, guide, x = pair
    with pytest.raises(OptionError, match="at least 1"):
        importance(model, guide, x, 0)
    with pytest.raises(DataError, match="row 3"):
        importance(model, guide, x.index_fill(0, torch.tensor([3]), math.nan), 5)

    def shared(x: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(8, dtype=x.dtype), 1).to_event(1))
            pyro.sample("x", dist.Normal(z + w.unsqueeze(-1), 1).to_event(1), obs=x)

    def shared_guide(x: torch.Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1).to_event(1))

    with pytest.raises(ProgramError, match="'w' is shared by all data"):
        importance(shared, shared_guide, x, 5)


def test_a_plate_that_is_not_over_the_rows_is_refused():
    def guide(x):
        with pyro.plate("data", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(x.mean(0), 0.4))

    with pytest.raises(ProgramError, match="holds 5 data where the batch has 3 rows"):
        importance(data_in_columns, guide, torch.randn(3, 5), num_particles=10)


def test_importance_weighted_bounds_rise_to_the_evidence(pair):
    """RELIABILITY C12, importance side: L_k is monotone in k and ends at log p(x)."""
    model, guide, x = pair
    layout_batch = x[:20]
    truth = float(model.log_evidence(layout_batch).mean().detach())
    torch.manual_seed(0)
    means, errors = [], []
    for k in (1, 4, 16, 64):
        draws = torch.stack(
            [
                pvae.bounds.iw_elbo(pvae.draw(model, guide, layout_batch, k).log_weights).detach()
                for _ in range(200)
            ]
        )
        per_repeat = draws.mean(1)
        means.append(float(per_repeat.mean()))
        errors.append(float(per_repeat.std()) / math.sqrt(200))
    for low, high, a, b in zip(means, means[1:], errors, errors[1:], strict=False):
        assert high > low - STANDARD_ERRORS * math.hypot(a, b)
    assert means[0] < truth - 0.05
    assert abs(means[-1] - truth) < 0.02
