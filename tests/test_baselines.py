from __future__ import annotations

import copy
import itertools
import math
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.decomposition import FactorAnalysis as SklearnFactors
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KernelDensity as SklearnKernels
from torch.distributions import MultivariateNormal

import pvae.data
from pvae import baselines, roster
from pvae.baselines import (
    PPCA,
    BernoulliMixture,
    CategoricalMixture,
    FactorAnalysis,
    GaussianMixture,
    KernelDensity,
    MixtureOfFactorAnalyzers,
    NegativeBinomialMixture,
    PoissonMixture,
    StudentTMixture,
)
from pvae.baselines.density import watch_convergence
from pvae.errors import DataError, OptionError, PvaeError, RunError

NUM_STDERRS = 4.5
EYE = torch.eye(4, dtype=torch.float64)
COVARIANCES = ("full", "tied", "diag", "spherical")


def rows(n=300, width=4, seed=0):
    """Two skewed, correlated clumps: not Gaussian, and not symmetric under any swap of features."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width))
    centres = np.where(rng.random((n, 1)) < 0.3, 3.0, -1.0) * np.arange(1, width + 1)
    return centres + (rng.normal(size=(n, width)) + rng.exponential(size=(n, width))) @ mixing


def bits(n=400, width=6, seed=0):
    rng = np.random.default_rng(seed)
    means = np.array([np.linspace(0.1, 0.9, width), np.linspace(0.8, 0.05, width)])
    return (rng.random((n, width)) < means[(rng.random(n) < 0.35).astype(int)]).astype(np.float64)


def counts(n=300, width=4, seed=0):
    rng = np.random.default_rng(seed)
    means = np.array([[2.0, 9, 1, 4], [11.0, 2, 6, 3]])[(rng.random(n) < 0.4).astype(int), :width]
    return rng.poisson(rng.gamma(3.0, means / 3.0)).astype(np.float64)


def levels(n=300, width=4, seed=0):
    rng = np.random.default_rng(seed)
    shares = np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
    each = [rng.choice(3, size=width, p=shares[int(rng.random() < 0.4)]) for _ in range(n)]
    return np.array(each, dtype=np.float64)


def fitted():
    x = rows()
    return [
        *(GaussianMixture(3, covariance_type=c).fit(x) for c in COVARIANCES),
        FactorAnalysis(2).fit(x),
        PPCA(2).fit(x),
        KernelDensity(0.4).fit(x),
        BernoulliMixture(3).fit(bits()),
        MixtureOfFactorAnalyzers(2, num_factors=2, max_iterations=300).fit(x),
        StudentTMixture(2, covariance_type="tied").fit(x),
        StudentTMixture(2).fit(x),
        CategoricalMixture(2).fit(levels()),
        PoissonMixture(2).fit(counts()),
        NegativeBinomialMixture(2).fit(counts()),
    ]


@pytest.fixture(scope="module", params=range(14), ids=lambda i: f"baseline{i}")
def baseline(request, all_fitted):
    return all_fitted[request.param]


@pytest.fixture(scope="module")
def all_fitted():
    return fitted()


MAKERS = {
    BernoulliMixture: bits,
    CategoricalMixture: levels,
    PoissonMixture: counts,
    NegativeBinomialMixture: counts,
}


def train(baseline, **options):
    return MAKERS.get(type(baseline), rows)(**options)


# ------------------------------------------------------------------------------- every baseline


def test_protocol_holds_for_every_baseline(baseline):
    assert isinstance(baseline, baselines.Baseline)
    assert baseline.kind == "exact"
    assert baselines.get(baseline.name) is type(baseline)
    assert baseline.converged is True
    scores = baseline.score_samples(train(baseline)[:7])
    assert scores.shape == (7,)
    assert scores.dtype == torch.float64


def test_rows_are_scored_one_by_one(baseline):
    x = torch.from_numpy(train(baseline)[:5])
    alone = torch.cat([baseline.score_samples(x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(baseline.score_samples(x), alone, rtol=1e-10, atol=1e-10)


def test_numpy_and_torch_agree_even_when_read_only_or_reversed(baseline):
    x = train(baseline)[:6]
    frozen = x.copy()
    frozen.flags.writeable = False
    expected = baseline.score_samples(torch.from_numpy(x))
    assert torch.equal(baseline.score_samples(frozen), expected)
    torch.testing.assert_close(
        baseline.score_samples(x[::-1]), expected.flip(0), rtol=0, atol=1e-10
    )


def test_copies_score_alike(baseline):
    x = train(baseline)[:6]
    for twin in (copy.deepcopy(baseline), pickle.loads(pickle.dumps(baseline))):
        assert torch.equal(twin.score_samples(x), baseline.score_samples(x))


def test_saved_densities_are_restored_whole(baseline, tmp_path):
    x = train(baseline)[:6]
    twin = baselines.load(baseline.save(tmp_path / "density"))
    assert type(twin) is type(baseline)
    assert torch.equal(twin.score_samples(x), baseline.score_samples(x))
    assert torch.equal(twin.sample(9, seed=2), baseline.sample(9, seed=2))
    assert repr(twin) == repr(baseline)
    assert twin.num_parameters == baseline.num_parameters
    assert twin.fit(x).score_samples(x).isfinite().all()  # and it can be fitted again


def test_damaged_or_foreign_folders_are_refused(tmp_path):
    from pvae.checkpoints import save_tensors

    folder = PPCA(2).fit(rows()).save(tmp_path / "density")
    content = bytearray((folder / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "tensors.safetensors").write_bytes(content)
    with pytest.raises(RunError, match="tensors.safetensors is damaged"):
        baselines.load(folder)
    with pytest.raises(RunError, match="has no readable manifest.json"):
        baselines.load(tmp_path / "nowhere")
    save_tensors(tmp_path / "other", {"a": torch.zeros(1)}, {})
    with pytest.raises(RunError, match="holds no density"):
        baselines.load(tmp_path / "other")


def test_equal_seeds_sample_alike_in_the_dtype_fitted(baseline):
    first, again, other = (baseline.sample(40, seed=s) for s in (3, 3, 4))
    assert first.dtype == torch.float64
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    single = copy.copy(baseline).fit(torch.from_numpy(train(baseline)).float())
    assert single.sample(2).dtype == torch.float32


def component_moments(b):
    """Means ``(K, D)`` and covariances ``(K, D, D)`` of a mixture's components."""
    eye = torch.eye(b._shape[1], dtype=torch.float64)
    if isinstance(b, (GaussianMixture, StudentTMixture)):
        covariances = {
            "full": lambda c: c,
            "tied": lambda c: c.expand(b.chosen, -1, -1),
            "diag": torch.diag_embed,
            "spherical": lambda c: c[:, None, None] * eye,
        }[b.covariance_type](b.covariances)
        if isinstance(b, StudentTMixture):
            covariances = covariances * (b.dof / (b.dof - 2))[:, None, None]
        return b.means, covariances
    if isinstance(b, MixtureOfFactorAnalyzers):
        return b.means, b.loadings @ b.loadings.mT + torch.diag_embed(b.noise)
    if isinstance(b, BernoulliMixture):
        return b.means, torch.diag_embed(b.means * (1 - b.means))
    if isinstance(b, PoissonMixture):
        return b.rates, torch.diag_embed(b.rates)
    if isinstance(b, NegativeBinomialMixture):
        return b.rates, torch.diag_embed(b.rates + b.rates**2 / b.dispersion)
    level = torch.arange(b.probabilities.shape[2], dtype=torch.float64)
    mean = b.probabilities @ level
    return mean, torch.diag_embed(b.probabilities @ level**2 - mean**2)


def second_moments(b):
    """``E[x]`` and ``E[x x']`` of a fitted density, from its parameters."""
    if hasattr(b, "weights"):
        means, covariances = component_moments(b)
        second = covariances + means[:, :, None] * means[:, None]
        return (b.weights @ means).numpy(), torch.tensordot(b.weights, second, 1).numpy()
    x = rows()
    mean = x.mean(0)
    if isinstance(b, KernelDensity):
        return mean, x.T @ x / len(x) + b.chosen**2 * np.eye(x.shape[1])
    noise = b.noise_variance.expand(4) if isinstance(b, PPCA) else b.noise_variance
    covariance = (b.loadings @ b.loadings.T + noise.diag()).numpy()
    return mean, covariance + np.outer(mean, mean)


def test_samples_have_the_moments_of_the_density(baseline):
    x = baseline.sample(20_000, seed=5).numpy()
    mean, second = second_moments(baseline)
    products = (x[:, :, None] * x[:, None, :]).reshape(len(x), -1)
    statistics, truth = np.hstack([x, products]), np.concatenate([mean, second.ravel()])
    stderr = statistics.std(0) / math.sqrt(len(x))
    assert (np.abs(statistics.mean(0) - truth) < NUM_STDERRS * stderr).all()
    half = len(x) // 2  # the rows come in no order: both halves have the same mean
    gap = x[:half].mean(0) - x[half:].mean(0)
    assert (np.abs(gap) < NUM_STDERRS * x.std(0) * math.sqrt(2 / half)).all()


@pytest.mark.parametrize(
    ("index", "count"),
    [
        (0, 2 + 12 + 30),  # full, K 3, D 4: weights, means, covariances
        (1, 2 + 12 + 10),
        (2, 2 + 12 + 12),
        (3, 2 + 12 + 3),
        (4, 8 + 8 - 1),  # factor analysis, q 2
        (5, 5 + 8 - 1),
        (6, 300 * 4 + 1),
        (7, 2 + 3 * 6),
        (8, 1 + 2 * (4 + 4 + 8 - 1)),  # factor analysers, K 2, q 2
        (9, 1 + 8 + 10 + 2),
        (10, 1 + 8 + 20 + 2),
        (11, 1 + 2 * 4 * 2),
        (12, 1 + 8),
        (13, 1 + 16),
    ],
)
def test_num_parameters(all_fitted, index, count):
    assert all_fitted[index].num_parameters == count


def test_repr_tells_options_choice_and_state():
    mixture = GaussianMixture([2, 3], covariance_type="diag", reg_covar=1e-4)
    assert "n_components=[2, 3]" in repr(mixture)
    mixture.fit(rows(), rows(seed=1))
    assert f"n_components={mixture.chosen}" in repr(mixture)
    assert "reg_covar=0.0001" in repr(mixture)
    assert "num_features=4, converged=True" in repr(mixture)


@pytest.mark.parametrize(
    "baseline",
    [
        GaussianMixture([1, 2, 40]),
        FactorAnalysis([1, 2, 3]),
        PPCA([1, 2, 3]),
        KernelDensity("valid"),
        KernelDensity([0.01, 0.7, 50]),
        BernoulliMixture([1, 2, 50], smoothing=0.01),
    ],
    ids=lambda b: f"{b.name}",
)
def test_size_is_chosen_by_valid(baseline):
    make = bits if isinstance(baseline, BernoulliMixture) else rows
    x, valid = make(n=100), make(n=100, seed=1)
    baseline.fit(x, valid)
    assert baseline.selection[baseline.chosen] == max(baseline.selection.values())
    assert float(baseline.score_samples(valid).mean()) == baseline.selection[baseline.chosen]
    for value, score in baseline.selection.items():
        alone = type(baseline)(value).fit(x)
        if isinstance(baseline, BernoulliMixture):
            alone = BernoulliMixture(value, smoothing=0.01).fit(x)
        assert float(alone.score_samples(valid).mean()) == pytest.approx(score, abs=1e-12)


def test_choice_differs_from_the_one_by_training_data():
    x, valid = rows(n=100), rows(n=100, seed=1)
    assert GaussianMixture([2, 40]).fit(x, valid).chosen == 2
    assert GaussianMixture([2, 40]).fit(x, x).chosen == 40
    assert GaussianMixture([40, 2]).fit(x, valid).chosen == 2


def test_one_size_leaves_valid_unused_but_checked():
    assert PPCA(2).fit(rows(), rows(seed=1)).selection == {}
    with pytest.raises(DataError, match="valid must have the 4 features"):
        PPCA(2).fit(rows(), rows(width=3))


def test_failed_fit_leaves_the_density_as_it_was():
    density = PPCA(3).fit(rows())
    before = density.score_samples(rows(seed=1))
    with pytest.raises(OptionError):
        density.fit(rows(width=2))
    assert torch.equal(density.score_samples(rows(seed=1)), before)


def test_constant_features_have_finite_densities_within_the_stated_floor():
    x = load_digits().data[:500]
    assert (x.std(0) == 0).any()
    for density in (GaussianMixture(2), FactorAnalysis(5), PPCA(5), KernelDensity(3.0)):
        assert density.fit(x).score_samples(x).isfinite().all()


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.int64, np.float16, np.float32])
def test_number_types_of_bits_agree(dtype):
    x = bits()
    expected = BernoulliMixture(2).fit(x).score_samples(x)
    scores = BernoulliMixture(2).fit(x.astype(dtype)).score_samples(x.astype(dtype))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------ Gaussian densities


def test_factor_analysis_equals_scikit_learn_and_its_normal():
    x, test = rows(), rows(seed=1)
    density = FactorAnalysis(2, seed=7).fit(x)
    theirs = SklearnFactors(2, random_state=7).fit(x)
    scores = density.score_samples(test)
    np.testing.assert_allclose(scores.numpy(), theirs.score_samples(test), rtol=0, atol=1e-10)
    normal = MultivariateNormal(
        torch.from_numpy(theirs.mean_), torch.from_numpy(theirs.get_covariance())
    )
    torch.testing.assert_close(scores, normal.log_prob(torch.from_numpy(test)), rtol=0, atol=1e-10)


def test_factor_analysis_floors_the_noise():
    x = rows()
    x[:, 2] = 5.0
    assert FactorAnalysis(1, min_noise=0.25).fit(x).noise_variance.min() == 0.25


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ppca_is_the_normal_with_covariance_ww_plus_noise(size):
    density, test = PPCA(size).fit(rows()), torch.from_numpy(rows(seed=1))
    covariance = density.loadings @ density.loadings.T + density.noise_variance * EYE
    expected = MultivariateNormal(density.mean, covariance).log_prob(test)
    torch.testing.assert_close(density.score_samples(test), expected, rtol=0, atol=1e-10)


def test_ppca_equals_scikit_learn_with_variances_over_n():
    x, test = rows(), rows(seed=1)
    theirs = PCA(2).fit(x)
    shrink = (len(x) - 1) / len(x)  # scikit-learn takes the unbiased covariance, not the ML one
    theirs.explained_variance_ = theirs.explained_variance_ * shrink
    theirs.noise_variance_ = theirs.noise_variance_ * shrink
    scores = PPCA(2).fit(x).score_samples(test)
    np.testing.assert_allclose(scores.numpy(), theirs.score_samples(test), rtol=0, atol=1e-10)


def test_ppca_maximises_the_training_likelihood():
    x = torch.from_numpy(rows())
    density = PPCA(2).fit(x)
    loadings, noise = density.loadings.requires_grad_(), density.noise_variance.requires_grad_()
    mean = density.mean.requires_grad_()
    covariance = loadings @ loadings.T + noise * EYE
    likelihood = MultivariateNormal(mean, covariance).log_prob(x).mean()
    for gradient in torch.autograd.grad(likelihood, [mean, loadings, noise]):
        assert gradient.abs().max() < 1e-10


def test_ppca_of_fewer_rows_than_features_counts_all_features():
    x = torch.from_numpy(rows(n=5, width=8))
    centred = x - x.mean(0)
    total = centred.square().sum() / 5
    top = torch.linalg.eigvalsh(centred.T @ centred / 5)[-2:].sum()
    torch.testing.assert_close(PPCA(2).fit(x).noise_variance, (total - top) / 6)


@pytest.mark.parametrize("bandwidth", [0.1, 1.0])
def test_kernel_density_equals_scikit_learn_in_two_dimensions(bandwidth):
    x, test = rows(width=2), rows(width=2, seed=1)
    theirs = SklearnKernels(bandwidth=bandwidth).fit(x).score_samples(test)
    ours = KernelDensity(bandwidth).fit(x).score_samples(test)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("width", "bandwidth"), [(64, 0.1), (64, 1.0), (300, 0.3)])
def test_kernel_density_is_the_exact_mixture_in_high_dimension(width, bandwidth):
    rng = np.random.default_rng(0)
    x, test = torch.from_numpy(rng.random((1000, width))), torch.from_numpy(rng.random((9, width)))
    test[0] = 40.0  # far from every row
    squares = (test[:, None] - x).square().sum(-1)
    log_kernels = -0.5 * squares / bandwidth**2 - width / 2 * math.log(2 * math.pi * bandwidth**2)
    expected = torch.logsumexp(log_kernels, 1) - math.log(len(x))
    scores = KernelDensity(bandwidth).fit(x).score_samples(test)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("make", [lambda: GaussianMixture(3), lambda: KernelDensity(0.3)])
def test_density_of_the_line_integrates_to_one(make):
    grid = torch.linspace(-40, 40, 40_001, dtype=torch.float64)[:, None]
    density = make().fit(rows(width=1)).score_samples(grid).exp()
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1, abs=1e-8)


def test_convergence_warning_becomes_an_attribute():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = GaussianMixture(5, max_iterations=1, tolerance=0.0).fit(rows())
        factors = FactorAnalysis(2, max_iterations=1).fit(rows())
    assert short.converged is False
    assert factors.converged is False
    assert "converged=False" in repr(short)


def test_only_convergence_warnings_are_held_back():
    def fit():
        warnings.warn("slow", ConvergenceWarning, stacklevel=1)
        warnings.warn("odd", UserWarning, stacklevel=1)
        return 3

    with pytest.warns(UserWarning, match="odd") as caught:
        assert watch_convergence(fit) == (3, False)
    assert len(caught) == 1


# --------------------------------------------------------------------------- Bernoulli mixture


def test_bernoulli_mixture_sums_to_one():
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    density = BernoulliMixture(4).fit(bits())
    assert density.score_samples(every).exp().sum().item() == pytest.approx(1, abs=1e-10)


def brute_force_step(x, weights, means, smoothing):
    """One EM step and the objective before it, by loops over rows, components and bits."""
    n, width, size = len(x), len(x[0]), len(weights)
    global_mean = [sum(row[d] for row in x) / n for d in range(width)]
    counts, ones, objective = [0.0] * size, [[0.0] * width for _ in range(size)], 0.0
    for row in x:
        joint = [
            weights[k] * math.prod(means[k][d] if row[d] else 1 - means[k][d] for d in range(width))
            for k in range(size)
        ]
        objective += math.log(sum(joint))
        for k in range(size):
            counts[k] += joint[k] / sum(joint)
            for d in range(width):
                ones[k][d] += joint[k] / sum(joint) * row[d]
    for k, d in itertools.product(range(size), range(width)):
        m, mu = global_mean[d], means[k][d]
        objective += smoothing * (m * math.log(mu) + (1 - m) * math.log(1 - mu))
    new_means = [
        [
            min(
                max((ones[k][d] + smoothing * global_mean[d]) / (counts[k] + smoothing), 1e-3),
                0.999,
            )
            for d in range(width)
        ]
        for k in range(size)
    ]
    return [c / n for c in counts], new_means, objective / n


def from_means(means, **options):
    """A Bernoulli mixture of equal weights, to start from."""
    means = torch.as_tensor(means, dtype=torch.float64)
    weights = means.new_full((len(means),), 1 / len(means))
    return BernoulliMixture(len(means), **options)._set(means.shape[1], weights, {"means": means})


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 3.0])
def test_em_equals_brute_force(smoothing):
    x, start = bits(n=9, width=3), [[0.25, 0.75, 0.25], [0.75, 0.25, 0.75]]
    options = {"smoothing": smoothing, "max_iterations": 3, "tolerance": 0.0}
    density = BernoulliMixture(2, start=from_means(start), **options).fit(x)
    weights, means, objectives = [0.5, 0.5], start, []
    for _ in range(4):
        last = weights, means
        weights, means, objective = brute_force_step(x.tolist(), *last, smoothing)
        objectives.append(objective)
    np.testing.assert_allclose(density.history, objectives, rtol=0, atol=1e-12)
    np.testing.assert_allclose(density.weights, last[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(density.means, last[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_em_is_monotone_with_empty_and_full_columns(dtype, smoothing):
    x = torch.from_numpy(bits(width=20)).to(dtype)
    x[:, 3], x[:, 7] = 0, 1
    density = BernoulliMixture(6, smoothing=smoothing, max_iterations=60, tolerance=0.0).fit(x)
    slack = 1e-12 if dtype == torch.float64 else 1e-4
    assert (np.diff(density.history) > -slack).all()
    assert density.history[-1] - density.history[0] > 0.1
    assert density.score_samples(x).isfinite().all()
    assert density.means.min() >= 1e-3
    assert density.means.max() <= 1 - 1e-3


def log_bernoulli(x, means):
    return -torch.nn.functional.binary_cross_entropy(means, x.expand_as(means), reduction="none")


def test_objective_is_that_of_the_parameters_kept():
    x = torch.from_numpy(bits())
    density = BernoulliMixture(3, smoothing=0.7, max_iterations=4).fit(x)
    prior = 0.7 * log_bernoulli(x.mean(0), density.means).sum()
    expected = density.score_samples(x).mean() + prior / len(x)
    assert density.objective == pytest.approx(expected.item(), abs=1e-12)


right_m_step = BernoulliMixture.maximise


def unnormalised(self, counts, statistics):
    return {"means": statistics[0].clamp(1e-3, 1 - 1e-3)}


def fault_in_component_one(self, counts, statistics):
    means = right_m_step(self, counts, statistics)["means"].clone()
    means[1] = 1 - means[1]
    return {"means": means}


def not_a_number(self, counts, statistics):
    return {"means": right_m_step(self, counts, statistics)["means"] * math.nan}


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (unnormalised, r"nats per datum at iteration 1, most in component \d"),
        (fault_in_component_one, "at iteration 1, most in component 1:"),
        (not_a_number, "EM stopped: row 0 has a log density that is not finite"),
    ],
)
def test_wrong_m_steps_are_caught(monkeypatch, wrong, text):
    monkeypatch.setattr(BernoulliMixture, "maximise", wrong)
    with pytest.raises(PvaeError, match=text):
        BernoulliMixture(3, tolerance=0.0).fit(bits())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fall_of_a_few_hundred_thousandths_of_a_nat_is_no_rounding(monkeypatch, dtype):
    calls = itertools.count()

    def off_from_the_second_call(self, counts, statistics):
        means = right_m_step(self, counts, statistics)["means"]
        return {"means": means - (2e-3 if next(calls) else 0)}

    monkeypatch.setattr(BernoulliMixture, "maximise", off_from_the_second_call)
    with pytest.raises(PvaeError, match=r"changed by -2\.5\de-05 nats per datum at iteration 2"):
        BernoulliMixture(1, tolerance=0.0).fit(torch.from_numpy(bits(width=3)).to(dtype))


def test_restarts_keep_the_best_objective():
    x = bits(n=60, width=12)
    options = {"smoothing": 0.1, "max_iterations": 30}
    finals = [BernoulliMixture(5, seed=7919 * k, **options).fit(x).objective for k in range(6)]
    assert max(finals) - min(finals) > 0.01
    assert finals[0] < max(finals)
    best = BernoulliMixture(5, restarts=6, **options).fit(x)
    assert best.objective == max(finals)
    again = BernoulliMixture(5, **options).fit(x, seed=0, restarts=6)
    assert torch.equal(again.means, best.means)


def test_two_components_are_recovered():
    rng = np.random.default_rng(0)
    means = np.array([np.linspace(0.05, 0.95, 12), np.linspace(0.7, 0.1, 12)])
    second = rng.random(20_000) < 0.3
    x = (rng.random((20_000, 12)) < means[second.astype(int)]).astype(np.float64)
    density = BernoulliMixture(2, max_iterations=300, tolerance=1e-9).fit(x)
    order = density.weights.argsort(descending=True)
    assert density.converged
    np.testing.assert_allclose(density.weights[order], [0.7, 0.3], atol=0.02)
    np.testing.assert_allclose(density.means[order], means, atol=0.03)


def test_one_component_is_the_product_of_smoothed_bits():
    x = bits()
    density = BernoulliMixture(1).fit(x)
    product = torch.distributions.Bernoulli(torch.from_numpy(x.mean(0)))
    expected = product.log_prob(torch.from_numpy(x)).sum(1)
    torch.testing.assert_close(density.score_samples(x), expected, rtol=0, atol=1e-10)


def test_blocks_of_rows_change_nothing(monkeypatch):
    x = bits()
    whole = BernoulliMixture(3).fit(x)
    monkeypatch.setattr("pvae.baselines.em._BLOCK_ENTRIES", 20)
    blocked = BernoulliMixture(3).fit(x)
    torch.testing.assert_close(blocked.means, whole.means, rtol=0, atol=1e-10)
    torch.testing.assert_close(blocked.score_samples(x), whole.score_samples(x))


def test_progress_hears_every_iteration():
    heard = []
    density = BernoulliMixture(3, progress=lambda i, objective: heard.append((i, objective)))
    density.fit(bits())
    assert heard == list(enumerate(density.history))
    assert "progress" not in repr(density)


def test_iterations_and_tolerance_stop_em():
    short = BernoulliMixture(3, max_iterations=2, tolerance=0.0).fit(bits())
    assert (len(short.history), short.converged) == (3, False)
    loose = BernoulliMixture(3, tolerance=10.0).fit(bits())
    assert (len(loose.history), loose.converged) == (2, True)


# -------------------------------------------------------------------------- names and errors


def test_available_names_every_baseline_and_its_class():
    names = baselines.available()
    expected = (
        "bernoulli-mixture categorical-mixture factor-analysis gaussian-mixture kernel-density "
        "mixture-of-factor-analysers negative-binomial-mixture poisson-mixture ppca "
        "student-t-mixture"
    )
    assert list(names) == expected.split()
    assert all(line and "\n" not in line for line in names.values())
    assert all(baselines.get(name).name == name for name in names)
    assert all(getattr(baselines, name) for name in baselines.__all__)


def test_import_costs_neither_torch_nor_scikit_learn():
    code = (
        "import sys, pvae.baselines; pvae.baselines.available();"
        "print({'torch', 'sklearn'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_floor_is_chosen_by_validation_where_there_is_one_size(tmp_path):
    """A feature that hardly varies in few training rows, and more in the others."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    x[:, 2] = np.where(np.arange(40) < 28, 1e-4, 0.2) * x[:, 2]
    parts = {"train": x[:28], "valid": x[28:34], "test": x[34:]}
    np.savez(tmp_path / "x.npz", **parts)
    dataset = pvae.data.load(tmp_path / "x.npz", transform="none")
    floors = (1e-6, 1e-4, 1e-1)
    best = roster._best_floor(dataset, GaussianMixture, [1], floors, covariance_type="diag")()
    assert best.reg_covar == 1e-1


GREY = bits()
GREY[4, 2] = 0.5
GAP = rows()
GAP[3, 1] = np.nan
FLAT = np.full((9, 3), 0.1)

ERRORS = [
    (
        lambda: baselines.get("pca"),
        OptionError,
        "no baseline is called 'pca': did you mean 'ppca'?",
    ),
    (lambda: GaussianMixture(0), OptionError, "n_components must be a whole number of at least 1"),
    (
        lambda: PPCA(np.array([2.5]).tolist()),
        OptionError,
        "n_components must be a whole number .*, got 2.5",
    ),
    (lambda: FactorAnalysis([]), OptionError, "got an empty sequence"),
    (
        lambda: GaussianMixture(2, covariance_type="ful"),
        OptionError,
        "no covariance_type is called 'ful': did you mean 'full'?",
    ),
    (lambda: GaussianMixture(2, reg_covar=-1), OptionError, "reg_covar must be finite and at leas"),
    (lambda: BernoulliMixture(2, smoothing=math.nan), OptionError, "smoothing must be finite"),
    (lambda: BernoulliMixture(2, restarts=0), OptionError, "restarts must be a whole number"),
    (lambda: KernelDensity(0), OptionError, "bandwidth must be a positive number.*got 0"),
    (lambda: KernelDensity("scott"), OptionError, "bandwidth must be .*got 'scott'"),
    (lambda: GaussianMixture([1, 2]).fit(rows()), OptionError, "2 values of n_components to choo"),
    (lambda: KernelDensity().fit(rows()), OptionError, "15 values of bandwidth to choose from"),
    (lambda: KernelDensity().fit(FLAT, FLAT), DataError, "no spread in 9 equal rows"),
    (lambda: GaussianMixture(9).fit(rows(n=5)), OptionError, "needs at least 9 rows, got 5"),
    (
        lambda: GaussianMixture(1, reg_covar=0).fit(np.hstack([rows(), np.ones((300, 1))])),
        DataError,
        "reg_covar=0.* singular covariance in component 0 .feature 4 is constant.: raise",
    ),
    (lambda: BernoulliMixture(9).fit(bits(n=5)), OptionError, "needs at least 9 rows, got 5"),
    (lambda: FactorAnalysis(5).fit(rows()), OptionError, "needs at least 5 features, got 4"),
    (
        lambda: FactorAnalysis(1, min_noise=0).fit(FLAT),
        DataError,
        "no density for feature 0, which is constant",
    ),
    (lambda: PPCA(4).fit(rows()), OptionError, "needs more than 4 features, got 4"),
    (lambda: PPCA(2).fit(rows(n=3)), DataError, "leaves no variance for the noise in 3 rows"),
    (lambda: PPCA(1).fit(FLAT), DataError, "leaves no variance for the noise"),
    (lambda: BernoulliMixture(2).fit(GREY), DataError, "got 0.5 in row 4, feature 2 of x: binari"),
    (lambda: BernoulliMixture(2).fit(bits(), GREY), DataError, "row 4, feature 2 of valid"),
    (lambda: BernoulliMixture(2).fit(bits()).score_samples(GREY), DataError, "got 0.5 in row 4"),
    (lambda: PPCA(1).fit(GAP), DataError, "x must be finite, got nan in row 3, feature 1"),
    (lambda: PPCA(1).fit(rows()).score_samples(GAP), DataError, "got nan in row 3, feature 1"),
    (lambda: PPCA(1).fit(np.zeros((0, 3))), DataError, r"non-empty .*shape \(0, 3\)"),
    (lambda: PPCA(1).fit(torch.zeros(5, 2, 2)), DataError, r"shape \(5, 2, 2\): flatten each"),
    (lambda: PPCA(1).fit(np.array([["a", "b"]])), DataError, "x must be a matrix of numbers"),
    (lambda: PPCA(1).fit(rows() * 1j), DataError, "non-empty real matrix"),
    (
        lambda: PPCA(1).fit(rows()).score_samples(rows(width=3)),
        DataError,
        "4 features of the rows fitted, got 3",
    ),
    (lambda: PPCA(1).score_samples(rows()), DataError, "PPCA is not fitted: call"),
    (lambda: PPCA(1).sample(3), DataError, "PPCA is not fitted: call"),
    (lambda: PPCA(1).num_parameters, DataError, "PPCA is not fitted: call"),
    (lambda: PPCA(1).fit(rows()).sample(0), OptionError, "n must be a whole number of at least 1"),
]


@pytest.mark.parametrize(("act", "error", "text"), ERRORS)
def test_errors_say_what_was_expected_and_what_came(act, error, text):
    with pytest.raises(error, match=text) as caught:
        act()
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
