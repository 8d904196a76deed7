"""Tables of mixed columns: densities by scipy, missing cells left out exactly, finite gradients."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Normal

import pvae
from pvae.errors import DataError, OptionError
from pvae.evidence import Evidence, Rung, annealed, auto, gaps, information, standard_ladder
from pvae.guides.gaussian import Gaussian
from pvae.guides.masked import Masked
from pvae.latents import encode
from pvae.models.factor_analysis import FactorAnalysis
from pvae.models.tabular import Tabular
from pvae.out_of_distribution import detect

COLUMNS = ("count", "real", "categorical:3", "positive", "binary", "categorical:2")
X_DIM = len(COLUMNS)
SIGMAS = 4.5


def table(*, robust: bool = False, skip: bool = False) -> Tabular:
    torch.manual_seed(0)
    moments = {
        "x_mean": torch.tensor([3.0, -1.0, 0.0, 2.0, 0.5, 0.0]),
        "x_scale": torch.tensor([2.0, 2.0, 1.0, 1.0, 0.5, 1.0]),
    }
    options = {"columns": COLUMNS, "z_dim": 2, "hidden": (6,), "robust": robust, "skip": skip}
    return Tabular(X_DIM, **options, **moments).double()


def rows(model: Tabular, size: int = 8) -> Tensor:
    with torch.no_grad():
        return model(size=size)


def every_mask(x: Tensor) -> Tensor:
    """One row masked in all ``2^D`` ways, the empty and the full one too."""
    masks = torch.tensor(list(itertools.product([False, True], repeat=X_DIM)))
    return x[:1].expand(len(masks), -1).masked_fill(masks, torch.nan)


def by_hand(model: Tabular, z: Tensor, x: Tensor) -> np.ndarray:
    """Log density of every cell, ``(B, D)``, from the decoder's output alone."""
    output = model.decoder(z).detach()
    if model.skip is not None:
        output = output + z @ model.skip.weight.detach().t()
    real, positive, binary, categories, count = (
        part.numpy() for part in output.split([2, 2, 1, 6, 1], -1)
    )
    cells = np.zeros(x.shape)
    values = x.numpy()
    scale = 2.0 * (np.log1p(np.exp(real[:, 1])) + 1e-2)
    cells[:, 1] = scipy.stats.norm.logpdf(values[:, 1], -1.0 + 2.0 * real[:, 0], scale)
    spread = np.sqrt(np.log1p((1.0 / 2.0) ** 2))
    middle = np.log(2.0) - spread**2 / 2 + spread * positive[:, 0]
    width = spread * (np.log1p(np.exp(positive[:, 1])) + 1e-2)
    cells[:, 3] = scipy.stats.lognorm.logpdf(values[:, 3], width, scale=np.exp(middle))
    cells[:, 4] = scipy.stats.bernoulli.logpmf(values[:, 4], 1 / (1 + np.exp(-binary[:, 0])))
    for place, logits in ((2, categories[:, :3]), (5, categories[:, 3:5])):
        normed = logits - scipy.special.logsumexp(logits, -1, keepdims=True)
        cells[:, place] = normed[np.arange(len(x)), values[:, place].astype(int)]
    dispersion = np.exp(model.log_dispersion.detach().numpy())
    mean = 3.0 * np.exp(count[:, 0])
    cells[:, 0] = scipy.stats.nbinom.logpmf(
        values[:, 0], dispersion, dispersion / (dispersion + mean)
    )
    return cells


@pytest.mark.parametrize("skip", [False, True])
def test_density_of_whole_rows(skip):
    model = table(skip=skip)
    x, z = rows(model), torch.randn(8, 2, dtype=torch.float64)
    found = model.decode(z).log_prob(x).detach().numpy()
    cells = by_hand(model, z, x)
    assert np.abs(found - cells.sum(-1)).max() < 1e-5
    assert np.abs(found - cells[:, 1:].sum(-1)).max() > 1e-2


def test_missing_cells_are_left_out():
    model = table()
    x = every_mask(rows(model))
    z = torch.randn(1, 2, dtype=torch.float64).expand(len(x), -1)
    cells = by_hand(model, z, x.nan_to_num(0.0) * 0 + rows_of(x))
    expected = np.where(x.isnan(), 0.0, cells).sum(-1)
    assert np.abs(model.decode(z).log_prob(x).detach().numpy() - expected).max() < 1e-5


def rows_of(x: Tensor) -> Tensor:
    """The whole row that ``every_mask`` began with: its first."""
    return x[:1].expand_as(x)


def test_leaving_a_category_out_is_summing_over_it():
    model = table()
    x, z = rows(model), torch.randn(8, 2, dtype=torch.float64)
    each = []
    for value in range(3):
        filled = x.clone()
        filled[:, 2] = value
        each.append(model.decode(z).log_prob(filled))
    x[:, 2] = torch.nan
    assert (model.decode(z).log_prob(x) - torch.stack(each).logsumexp(0)).abs().max() < 1e-10


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("objective", ["vae", "iwae", "dreg", "stl"])
def test_gradients_are_finite_under_every_mask(robust, objective):
    """All 64 masks of a row at once, and every column missing from the whole batch in turn."""
    model = table(robust=robust, skip=robust)
    guide = Masked(X_DIM, model.latents, hidden=(6,)).double()
    goal = getattr(pvae, objective)(num_particles=2)
    whole = every_mask(rows(model))
    batches = [whole]
    for column in range(X_DIM):
        batches.append(whole.clone())
        batches[-1][:, column] = torch.nan
    layout = goal.prepare(model, guide, whole)
    for batch in batches:
        loss = goal.evaluate(model, guide, batch, layout=layout).loss
        loss.backward()
        for parameter in (*model.parameters(), *guide.parameters()):
            assert parameter.grad.isfinite().all()


def test_a_mask_after_the_density_would_not_do():
    """The planted error that the test above is for: 0 * NaN in the backward pass."""
    loc = torch.zeros(3, requires_grad=True)
    x = torch.tensor([1.0, torch.nan, 0.0])
    log_prob = torch.distributions.Normal(loc, 1.0, validate_args=False).log_prob(x)
    torch.where(x.isnan(), 0.0, log_prob).sum().backward()
    assert loc.grad.isnan().any()


def test_evidence_of_an_empty_row_is_zero():
    model = table()
    guide = Masked(X_DIM, model.latents, hidden=(6,)).double()
    x = torch.full((4, X_DIM), torch.nan, dtype=torch.float64)
    found = pvae.evidence.importance(model, guide, x, 5000)
    assert (found.log_evidence.abs() < SIGMAS * found.stderr).all()


@pytest.mark.parametrize("engine", ["eager", "staged"])
def test_trains_with_missing_cells(engine):
    model = table().float()
    guide = Masked(X_DIM, model.latents, hidden=(6,))
    torch.manual_seed(1)
    x = model.example_batch(64).detach()
    run = pvae.fit(model, guide, x, valid=x[:16], epochs=4, lr=1e-2, engine=engine, progress=False)
    assert run.engine.startswith(engine)
    assert run.history[-1]["bound"] > run.history[0]["bound"]


def test_values_outside_a_column_are_refused():
    model = table().float()
    guide = Masked(X_DIM, model.latents, hidden=(6,))
    x = model.example_batch(8).detach()
    x[3] = torch.tensor([1.0, 0.0, 7.0, 1.0, 0.0, 1.0])
    with pytest.raises(DataError, match="row 3 of the data has 7"):
        pvae.fit(model, guide, x, epochs=1, progress=False)


def test_missing_cells_are_for_models_that_take_them():
    model = FactorAnalysis(3)
    guide = Gaussian(3, model.latents)
    x = torch.tensor([[1.0, torch.nan, 0.0]] * 4)
    with pytest.raises(DataError, match="expected finite numbers"):
        pvae.fit(model, guide, x, epochs=1, progress=False)
    x = torch.tensor([[1.0, torch.inf, 0.0]] * 4)
    tabular = Tabular(3)
    with pytest.raises(DataError, match="inf"):
        pvae.fit(tabular, Masked(3, tabular.latents), x, epochs=1, progress=False)


def test_all_that_judges_a_pair_takes_missing_cells():
    torch.manual_seed(1)
    model = Tabular(3, z_dim=1, hidden=(6,)).double()
    guide = Masked(3, model.latents, hidden=(6,)).double()
    x = torch.randn(6, 3).double()
    x[0, 1], x[2, 0], x[3] = torch.nan, torch.nan, torch.nan
    z = torch.linspace(-8, 8, 2001).double()
    with torch.no_grad():
        joint = model.decode(z[:, None, None]).log_prob(x) + Normal(0.0, 1.0).log_prob(z)[:, None]
    truth = Evidence.exact(joint.logsumexp(0) + (z[1] - z[0]).log())

    def short(model, guide, x, *, seed):
        return annealed(model, guide, x, num_chains=100, num_temperatures=10, num_leapfrog=3)

    ladder = [standard_ladder(100)[0], Rung("annealed", 1, short)]
    found = auto(model, guide, x, tolerance=0.01, budget=None, ladder=ladder)
    assert {method.partition(";")[0] for method in found.methods} == {"importance", "annealed"}
    error = (found.log_evidence - truth.log_evidence).abs()
    assert float((error / (found.stderr + 1e-6)).max()) < SIGMAS
    ledger = gaps(model, guide, x, log_evidence=truth, num_particles=50, max_steps=1)
    assert bool(ledger.total.isfinite().all())
    assert math.isfinite(information(model, guide, x).kl)
    board = pvae.compare({"table": (model, guide)}, x, num_particles=50)
    assert math.isfinite(board["table"].mean)
    found = detect(model, guide, x[:3], x[3:], reference=x, num_particles=50)
    assert bool(found["typicality"].outside.isfinite().all())
    assert encode(model, guide, x).mean["z"].shape == (6, 1)
    plain = FactorAnalysis(3).double()
    with pytest.raises(DataError, match="'plain'.*expected finite numbers"):
        pvae.compare({"table": (model, guide), "plain": plain}, x, num_particles=50)
    with pytest.raises(OptionError, match="'odd'"):
        pvae.compare({"table": (model, guide), "odd": ()}, x, num_particles=50)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("real", "reel"), "did you mean 'real'"),
        (("real", "categorical"), "write categorical with its number"),
        (("real:3", "real"), "write categorical with its number"),
        (("real",), "names 1 kinds, the data have 2"),
    ],
)
def test_column_kinds_are_checked(columns, message):
    with pytest.raises(OptionError, match=message):
        Tabular(2, columns=columns)
