"""EM: equal to scikit-learn's, stationary where it stops, monotone, and it finds what is there."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture as SklearnMixture

from pvae.baselines import (
    BernoulliMixture,
    CategoricalMixture,
    GaussianMixture,
    MixtureOfFactorAnalyzers,
    NegativeBinomialMixture,
    PoissonMixture,
    StudentTMixture,
)
from pvae.baselines.density import as_rows
from pvae.baselines.em import log_joint, normalise
from pvae.baselines.kmeans import assign, kmeans
from pvae.errors import DataError, NonFiniteError, OptionError, PvaeError

COVARIANCES = ("full", "tied", "diag", "spherical")


def clumps(n=600, width=4, size=3, seed=0, spread=3.0):
    """Correlated clumps of different shapes."""
    rng = np.random.default_rng(seed)
    parts = [
        rng.normal(size=(n // size, width)) @ rng.normal(size=(width, width))
        + spread * rng.normal(size=width)
        for _ in range(size)
    ]
    return np.concatenate(parts)


def heavy(n=600, width=3, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.standard_t(4, size=(n // 2, width)) + 6 * k for k in range(2)])


def factors(n=600, width=5, size=2, seed=0):
    """Clumps along one direction each, with noise in every feature."""
    rng = np.random.default_rng(seed)
    parts = [
        rng.normal(size=(n // size, 1)) * np.linspace(-2, 2, width)[:: (-1) ** k]
        + rng.normal(size=(n // size, width)) * np.linspace(0.5, 1, width)
        + 5 * k
        for k in range(size)
    ]
    return np.concatenate(parts)


def bits(n=400, width=6, seed=0):
    rng = np.random.default_rng(seed)
    means = np.array([np.linspace(0.1, 0.9, width), np.linspace(0.8, 0.05, width)])
    return (rng.random((n, width)) < means[(rng.random(n) < 0.35).astype(int)]).astype(np.float64)


def counts(n=400, width=4, seed=0):
    rng = np.random.default_rng(seed)
    means = np.array([[2.0, 9, 1, 4], [11.0, 2, 6, 3]])[(rng.random(n) < 0.4).astype(int), :width]
    return rng.poisson(rng.gamma(3.0, means / 3.0)).astype(np.float64)


def levels(n=400, width=5, seed=0):
    rng = np.random.default_rng(seed)
    shares = np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])[(rng.random(n) < 0.4).astype(int)]
    draws = rng.random((n, width))
    return (draws[:, :, None] > shares.cumsum(1)[:, None]).sum(2).astype(np.float64)


# ------------------------------------------------------------------------------- scikit-learn


def one_step(x, covariance_type):
    """Parameters near a k-means start, to begin both from."""
    start = GaussianMixture(3, covariance_type=covariance_type, max_iterations=1, tolerance=0)
    return start.fit(x)


def theirs(start, x, iterations, **options):
    covariances = start.covariances.numpy()
    dense = start.covariance_type in ("full", "tied")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SklearnMixture(
            3,
            covariance_type=start.covariance_type,
            weights_init=start.weights.numpy(),
            means_init=start.means.numpy(),
            precisions_init=np.linalg.inv(covariances) if dense else 1 / covariances,
            max_iter=iterations,
            tol=0,
            **options,
        ).fit(x)


def test_responsibilities_are_taken_in_blocks_of_an_e_step(monkeypatch):
    ours = GaussianMixture(3, covariance_type="full").fit(clumps())
    whole, taken = ours.responsibilities(clumps(seed=1)), []

    def counting(joint):
        taken.append(len(joint))
        return normalise(joint)

    monkeypatch.setattr("pvae.baselines.mixture.normalise", counting)
    monkeypatch.setattr("pvae.baselines.em._BLOCK_ENTRIES", 250 * 3 * 4)
    in_parts = ours.responsibilities(clumps(seed=1))
    assert taken == [250, 250, 100]
    torch.testing.assert_close(in_parts, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("covariance_type", COVARIANCES)
@pytest.mark.parametrize("iterations", [1, 9, 80])
@pytest.mark.parametrize("reg_covar", [1e-6, 0.3])
def test_gaussian_mixture_follows_scikit_learn_from_one_start(
    covariance_type, iterations, reg_covar
):
    x, test = clumps(), clumps(seed=1)
    start = one_step(x, covariance_type)
    reference = theirs(start, x, iterations, reg_covar=reg_covar)
    ours = GaussianMixture(
        3, covariance_type=covariance_type, start=start, reg_covar=reg_covar, tolerance=0,
        max_iterations=iterations,
    ).fit(x)  # fmt: skip
    assert len(ours.history) == iterations + 1
    np.testing.assert_allclose(ours.weights, reference.weights_, rtol=0, atol=1e-10)
    np.testing.assert_allclose(ours.means, reference.means_, rtol=0, atol=1e-10)
    np.testing.assert_allclose(ours.covariances, reference.covariances_, rtol=0, atol=1e-10)
    scores = ours.score_samples(test)
    np.testing.assert_allclose(scores, reference.score_samples(test), rtol=0, atol=1e-8)
    np.testing.assert_allclose(
        ours.responsibilities(test), reference.predict_proba(test), rtol=0, atol=1e-10
    )
    assert ours.objective == pytest.approx(reference.score(x), abs=1e-10)


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_single_precision_far_from_zero_loses_a_thousandth_of_a_nat_at_most(covariance_type):
    x = (clumps() + 1e4).astype(np.float32)
    start = one_step(x.astype(np.float64), covariance_type)
    reference = theirs(start, x.astype(np.float64), 60)
    ours = GaussianMixture(
        3, covariance_type=covariance_type, start=start, max_iterations=60, tolerance=0
    ).fit(x)
    np.testing.assert_allclose(
        ours.score_samples(x), reference.score_samples(x.astype(np.float64)), rtol=0, atol=1e-3
    )
    assert ours.sample(2).dtype == torch.float32


# ------------------------------------------------------------------------------- stationarity


def converged(density, x, tolerance=1e-13):
    density.tolerance, density.max_iterations = tolerance, 3000
    return density.fit(x)


FAMILIES = [
    *((GaussianMixture(3, covariance_type=c, reg_covar=0), clumps) for c in COVARIANCES),
    *(
        (
            GaussianMixture(
                3, covariance_type=c, reg_covar=0, covariance_prior=9, weight_concentration=3
            ),
            clumps,
        )
        for c in COVARIANCES
    ),
    *((StudentTMixture(2, covariance_type=c, reg_covar=0), heavy) for c in COVARIANCES),
    (MixtureOfFactorAnalyzers(2, num_factors=1), factors),
    (BernoulliMixture(2), bits),
    (CategoricalMixture(2), levels),
    (PoissonMixture(2), counts),
    (NegativeBinomialMixture(2), counts),
]


def ids(family):
    return (
        f"{family.name}-{getattr(family, 'covariance_type', '')}" if hasattr(family, "name") else ""
    )


@pytest.mark.parametrize(("density", "make"), FAMILIES, ids=ids)
def test_em_stops_where_the_objective_is_flat(density, make):
    """The derivative along feasible directions of log-likelihood plus priors, as torch has it."""
    x = torch.from_numpy(make())
    density = converged(density, x)
    state = {"weights": density.weights.log(), **density._parameters()}
    free = {name: value.clone().requires_grad_() for name, value in state.items()}
    parameters = {name: value for name, value in free.items() if name != "weights"}
    weights = free["weights"].softmax(0)
    if isinstance(density, CategoricalMixture):
        logits = density.probabilities.log().requires_grad_()
        free["probabilities"], parameters["probabilities"] = logits, logits.softmax(-1)
    joint, _ = log_joint(density, weights, parameters, torch.float64)(x)
    prior = density.log_prior(parameters)
    prior = prior + (density.weight_concentration - 1) * weights.log().sum()
    objective = joint.logsumexp(1).mean() + prior / len(x)
    assert objective.item() == pytest.approx(density.objective, abs=1e-9)
    gradients = dict(zip(free, torch.autograd.grad(objective, list(free.values())), strict=True))
    for name, gradient in gradients.items():
        if name == "covariances" and gradient.ndim > 1 and gradient.shape[-1] == gradient.shape[-2]:
            gradient = gradient + gradient.mT
        scale = state[name].abs().clamp(min=1e-2)
        assert (gradient * scale).abs().max() < 2e-6, name


@pytest.mark.parametrize(("density", "make"), FAMILIES, ids=ids)
def test_the_objective_never_falls(density, make):
    density.tolerance, density.max_iterations = 0.0, 60
    history = density.fit(make(), seed=3).history
    assert (np.diff(history) > -1e-12).all()
    assert history[-1] > history[0] + 1e-3


class Stale(NegativeBinomialMixture):
    """Its dispersion does not move with its mean."""

    def maximise(self, counts, statistics):
        found = super().maximise(counts, statistics)
        return found | {"dispersion": found["dispersion"].flip(1)}


class Shrunk(GaussianMixture):
    """Divides by one row too many, as a careless correction of the variance does."""

    def over_mass(self, scatter, mass):
        return super().over_mass(scatter, mass + 0.2 * mass.sum())


class WideFactors(MixtureOfFactorAnalyzers):
    """Takes the second moment of z for a third more than it is."""

    def score(self, parameters, dtype):
        right = super().score(parameters, dtype)

        def score(x):
            log_density, summarize = right(x)

            def wrong(responsibilities):
                second, products, squares = summarize(responsibilities)
                return second * 1.3, products, squares

            return log_density, wrong

        return score


class TwiceScattered(StudentTMixture):
    """Doubles the scatter of x about zero, but not its mean."""

    def score(self, parameters, dtype):
        right = super().score(parameters, dtype)

        def score(x):
            log_density, summarize = right(x)

            def wrong(responsibilities):
                first, second, precision, tail = summarize(responsibilities)
                return first, 2 * second, precision, tail

            return log_density, wrong

        return score


@pytest.mark.parametrize(
    ("density", "x"),
    [
        (Stale(2), counts()),
        (Shrunk(3), clumps()),
        (WideFactors(2, num_factors=2), clumps(size=2)),
        (TwiceScattered(2), heavy()),
    ],
    ids=lambda v: type(v).__name__,
)
def test_wrong_steps_are_caught(density, x):
    density.tolerance = 0.0
    with pytest.raises(PvaeError, match=r"EM must not lower its objective.*component \d"):
        density.fit(x)


def test_a_large_floor_is_no_fault():
    x = load_digits().data[:400]
    for floor in (1e-6, 0.3):
        for covariance in COVARIANCES:
            mixture = GaussianMixture(
                5, covariance_type=covariance, reg_covar=floor, tolerance=0, max_iterations=30
            )
            assert np.isfinite(mixture.fit(x).history).all()


# ------------------------------------------------------------------------------- recovery


def matched(truth, found):
    distance = torch.cdist(truth, found)
    return torch.from_numpy(linear_sum_assignment(distance.numpy())[1])


def z_scores(seed):
    """Estimates of a known mixture of Gaussians against it, in standard errors.

    The components hardly overlap: the errors are those of samples from each component alone.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    means = 12 * torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    variances = torch.tensor([[0.5, 1, 2], [1, 1, 1], [2, 0.3, 1]], dtype=torch.float64)
    truth = GaussianMixture.from_parameters(weights, means, variances, covariance_type="diag")
    n = 4000
    x = truth.sample(n, seed=int(torch.randint(2**31, (), generator=generator)))
    found = GaussianMixture(3, covariance_type="diag", restarts=3, seed=seed).fit(x)
    order = matched(means, found.means)
    rows = n * weights[:, None]
    return torch.cat(
        [
            ((found.means[order] - means) / (variances / rows).sqrt()).flatten(),
            ((found.covariances[order] - variances) / (variances * (2 / rows).sqrt())).flatten(),
            (found.weights[order] - weights) / (weights * (1 - weights) / n).sqrt(),
        ]
    )


def test_known_gaussian_mixtures_are_recovered_in_twenty_seeds():
    """420 comparisons: all within 4.5 standard errors (0.3 % chance of a false alarm), and 98.5 %
    of them within 3, where the normal law has 99.7 %; their mean square is that of the law.
    """
    z = torch.cat([z_scores(seed) for seed in range(20)])
    assert z.abs().max() < 4.5
    assert (z.abs() < 3).double().mean() > 0.985
    assert abs(float(z.square().mean()) - 1) < 4.5 * math.sqrt(2 / len(z))


@pytest.mark.parametrize("kind", ["bernoulli", "poisson", "factors", "student"])
def test_other_known_mixtures_are_recovered(kind):
    """Each within 4.5 standard errors of the truth, taken as from the components' own rows."""
    generator = torch.Generator().manual_seed(4)
    n, weights = 6000, torch.tensor([0.4, 0.6], dtype=torch.float64)
    which = (torch.rand(n, generator=generator) > 0.4).long()
    rows = n * weights[:, None]
    if kind == "bernoulli":
        means = torch.tensor([[0.1, 0.9] * 8, [0.8, 0.2] * 8], dtype=torch.float64)
        x = torch.bernoulli(means[which], generator=generator)
        found, name, stderr = (
            BernoulliMixture(2, smoothing=0),
            "means",
            (means * (1 - means)).sqrt(),
        )
    elif kind == "poisson":
        means = torch.tensor([[2.0, 30, 5], [20.0, 3, 6]], dtype=torch.float64)
        x = torch.poisson(means[which], generator=generator)
        found, name, stderr = PoissonMixture(2, smoothing=0), "rates", means.sqrt()
    elif kind == "factors":
        means = torch.tensor([[0.0] * 5, [25.0] * 5], dtype=torch.float64)
        loadings = torch.randn(2, 5, 2, generator=generator, dtype=torch.float64)
        z = torch.randn(n, 2, 1, generator=generator, dtype=torch.float64)
        noise = torch.randn(n, 5, generator=generator, dtype=torch.float64)
        x = means[which] + (loadings[which] @ z).squeeze(2) + noise
        found, name = MixtureOfFactorAnalyzers(2, num_factors=2), "means"
        stderr = (loadings.square().sum(2) + 1).sqrt()
    else:
        means = torch.tensor([[0.0] * 4, [40.0] * 4], dtype=torch.float64)
        noise = np.random.default_rng(3).standard_t(5, size=(n, 4))
        x = means[which] + torch.from_numpy(noise)
        found, name = StudentTMixture(2, covariance_type="diag"), "means"
        stderr = torch.full_like(means, math.sqrt(5 / 3))
    found = found.fit(x, restarts=2)
    estimate = getattr(found, name)
    z = (estimate[matched(means, estimate)] - means) / (stderr / rows.sqrt())
    assert z.abs().max() < 4.5


def test_outliers_move_a_gaussian_and_not_a_student():
    clean = heavy()[:300]
    x = np.concatenate([clean, np.random.default_rng(2).uniform(-100, 100, size=(15, 3))])
    student = StudentTMixture(1).fit(x).score_samples(clean).mean()
    gaussian = GaussianMixture(1).fit(x).score_samples(clean).mean()
    assert student > gaussian + 2


def test_the_negative_binomial_finds_the_dispersion_and_is_poisson_without():
    x = counts(n=2000)[:, :2]
    found = NegativeBinomialMixture(2, max_iterations=600, tolerance=1e-7).fit(x)
    assert ((found.dispersion > 2.2) & (found.dispersion < 4.2)).all()  # 3 made them
    poisson = torch.poisson(torch.full((1000, 2), 4.0), generator=torch.Generator().manual_seed(0))
    negative = NegativeBinomialMixture(1, max_iterations=300, tolerance=1e-8).fit(poisson)
    simple = PoissonMixture(1).fit(poisson)
    gap = negative.score_samples(poisson).mean() - simple.score_samples(poisson).mean()
    assert 0 <= gap + 1e-6 < 2e-3


def test_one_factor_analyser_is_factor_analysis():
    from pvae.baselines import FactorAnalysis

    x = factors(size=1, n=300)
    ours = converged(MixtureOfFactorAnalyzers(1, num_factors=1), x)
    reference = FactorAnalysis(1, max_iterations=20_000, tolerance=1e-10).fit(x)
    gap = (ours.score_samples(x) - reference.score_samples(x)).abs().max()
    assert gap < 1e-4


# ------------------------------------------------------------------------------- hard data


def test_constant_columns_duplicate_rows_and_zero_columns_are_handled():
    x = np.repeat(clumps(n=30), 8, 0)
    x[:, 1] = 0.0
    for density in (
        *(GaussianMixture(4, covariance_type=c) for c in COVARIANCES),
        StudentTMixture(4, covariance_type="diag"),
        MixtureOfFactorAnalyzers(4, num_factors=2),
    ):
        assert density.fit(x).score_samples(x).isfinite().all(), density.name
    few = np.repeat(clumps(n=3), 40, 0)  # fewer different rows than components
    assert GaussianMixture(6, covariance_type="diag").fit(few).score_samples(few).isfinite().all()
    zeros = counts()
    zeros[:, 2] = 0
    for density in (PoissonMixture(2), NegativeBinomialMixture(2), CategoricalMixture(2)):
        assert density.fit(zeros).score_samples(zeros).isfinite().all(), density.name
    empty = bits()
    empty[:, 0], empty[:, 1] = 0, 1
    assert BernoulliMixture(3).fit(empty).score_samples(1 - empty).isfinite().all()


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_a_component_without_rows_is_started_again(covariance_type):
    x = clumps()
    start = one_step(x, covariance_type)
    start.means[1] = 1e4
    mixture = GaussianMixture(3, covariance_type=covariance_type, start=start, tolerance=1e-6)
    mixture.max_iterations = 300
    mixture.fit(x)
    assert mixture.reseeded >= 1
    fresh = GaussianMixture(3, covariance_type=covariance_type, tolerance=1e-6, restarts=3).fit(x)
    assert mixture.objective > fresh.objective - 0.3
    assert mixture.weights.min() > 0.01


@pytest.mark.parametrize(
    ("density", "make"),
    [
        (BernoulliMixture(2), bits),
        (PoissonMixture(2), counts),
        (NegativeBinomialMixture(2), counts),
        (CategoricalMixture(2), levels),
        (MixtureOfFactorAnalyzers(2, num_factors=1), clumps),
        (StudentTMixture(2), heavy),
    ],
    ids=ids,
)
def test_every_family_can_start_a_component_again(density, make):
    x = torch.from_numpy(make())
    density.fit(x)
    before = density._parameters()
    after = density.seeded(before, torch.tensor([1]), x[:1])
    assert after.keys() == before.keys()
    for name in before:
        assert torch.equal(after[name][0], before[name][0])
    again = type(density)(
        2, start=density, **({"num_factors": 1} if "factor" in density.name else {})
    )
    density.weights, changed = torch.tensor([1.0, 1e-300]).double(), dict(after)
    vars(density).update(changed)
    assert again.fit(x).reseeded >= 1


# ------------------------------------------------------------------------------- stepwise EM


@pytest.mark.parametrize(
    ("density", "make"),
    [
        (GaussianMixture(3), lambda: clumps(n=6000)),
        (GaussianMixture(3, covariance_type="diag"), lambda: clumps(n=6000)),
        (MixtureOfFactorAnalyzers(2, num_factors=1), lambda: factors(n=4000)),
        (StudentTMixture(2), lambda: heavy(n=4000)),
        (BernoulliMixture(2), lambda: bits(n=4000)),
        (PoissonMixture(2), lambda: counts(n=4000)),
        (NegativeBinomialMixture(2), lambda: counts(n=3000)),
    ],
    ids=ids,
)
def test_stepwise_em_ends_near_full_em(density, make):
    x = make()
    full = converged(density, x, 1e-6)
    best = float(full.score_samples(x).mean())
    density.batch_size, density.max_iterations, density.tolerance = 200, 20, 0.0
    density.fit(x)
    assert len(density.history) <= 20
    assert float(density.score_samples(x).mean()) > best - 1e-2


def test_rows_mapped_from_a_file_are_not_copied(tmp_path):
    np.save(tmp_path / "x.npy", clumps(n=3000))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    rows = as_rows(mapped, "x")
    assert rows.data_ptr() == mapped.ctypes.data
    mixture = GaussianMixture(3, batch_size=500, max_iterations=5).fit(mapped)
    again = GaussianMixture(3, batch_size=500, max_iterations=5).fit(np.array(mapped))
    assert torch.equal(mixture.means, again.means)


# ------------------------------------------------------------------------------- choosing K


def test_bic_finds_the_number_of_components():
    x = clumps(n=3000, spread=8.0)
    mixture = GaussianMixture([1, 2, 3, 4, 6], restarts=3).fit(x, criterion="bic")
    assert mixture.chosen == 3
    theirs = SklearnMixture(3, n_init=3, random_state=0).fit(x)
    assert -2 * len(x) * mixture.selection[3] == pytest.approx(theirs.bic(x), rel=1e-4)


def test_seeds_and_restarts_of_fit_replace_the_constructors():
    x = clumps()
    first = GaussianMixture(5, max_iterations=2, tolerance=0).fit(x, seed=1)
    second = GaussianMixture(5, max_iterations=2, tolerance=0, seed=1).fit(x)
    assert torch.equal(first.means, second.means)
    other = GaussianMixture(5, max_iterations=2, tolerance=0).fit(x, seed=2)
    assert not torch.equal(first.means, other.means)
    assert GaussianMixture(5).fit(x, restarts=4).restarts == 4


# ------------------------------------------------------------------------------- k-means


def test_kmeans_finds_separate_clumps_and_spreads_over_copies():
    centres = torch.tensor([[0.0, 0], [50, 0], [0, 50], [50, 50]], dtype=torch.float64)
    noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = centres.repeat(100, 1) + noise
    for seed in range(10):
        found = kmeans(x, 4, torch.Generator().manual_seed(seed))
        assert torch.cdist(centres, found).min(1).values.max() < 1
    distance, label = assign(x, centres)
    assert torch.equal(label, torch.arange(4).repeat(100))
    torch.testing.assert_close(distance, noise.square().sum(1))
    copies = torch.ones(9, 2, dtype=torch.float64)
    assert torch.equal(kmeans(copies, 3, torch.Generator().manual_seed(0)), copies[:3])


# ------------------------------------------------------------------------------- wrong inputs


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (
            lambda: GaussianMixture(2, batch_size=0),
            OptionError,
            "batch_size must be a whole number",
        ),
        (
            lambda: GaussianMixture(2, weight_concentration=0.5),
            OptionError,
            "at least 1 .no prior.",
        ),
        (
            lambda: GaussianMixture(2, covariance_prior=-1),
            OptionError,
            "covariance_prior must be fi",
        ),
        (
            lambda: GaussianMixture(2, start=3),
            OptionError,
            "start must be a fitted GaussianMixture",
        ),
        (
            lambda: GaussianMixture(2, start=one_step(clumps(), "full")).fit(clumps()),
            OptionError,
            "start has 3 components of 4 features, expected 2 of 4",
        ),
        (
            lambda: GaussianMixture.from_parameters([1.0], [[0.0, 1.0]], [[1.0]]),
            OptionError,
            r"full covariances must have shape \(1, 2, 2\), got \(1, 1\)",
        ),
        (
            lambda: GaussianMixture.from_parameters([1.0], [0.0], [1.0]),
            OptionError,
            r"means must have shape \(1, D\)",
        ),
        (lambda: GaussianMixture(2).fit(clumps(), criterion="aic"), OptionError, "no criterion is"),
        (lambda: MixtureOfFactorAnalyzers(2, num_factors=0), OptionError, "num_factors must be a"),
        (
            lambda: MixtureOfFactorAnalyzers(2, num_factors=4).fit(clumps()),
            OptionError,
            "needs more than 4 features, got 4",
        ),
        (lambda: MixtureOfFactorAnalyzers(2, min_noise=0), OptionError, "min_noise must be finite"),
        (lambda: PoissonMixture(2).fit(-counts()), DataError, "whole numbers from 0 up, got -"),
        (lambda: NegativeBinomialMixture(2).fit(clumps()), DataError, "leave the data untransform"),
        (lambda: CategoricalMixture(2).fit(levels() / 2), DataError, "whole numbers from 0 up"),
        (
            lambda: CategoricalMixture(2).fit(levels()).score_samples(levels() + 1),
            DataError,
            "knows levels 0 to 2, got 3 in row",
        ),
        (
            lambda: CategoricalMixture(2, num_levels=2).fit(levels()),
            DataError,
            "levels 0 to 1, got",
        ),
        (
            lambda: GaussianMixture(2).fit(np.array([[1e300], [-1e300], [0.0]])),
            (NonFiniteError, DataError),
            "not finite|singular",
        ),
    ],
)
def test_errors_say_what_was_expected_and_what_came(act, error, text):
    with pytest.raises(error, match=text) as caught:
        act()
    assert "\n" not in str(caught.value)
