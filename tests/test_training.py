"""fit: what it reaches, what it reports, what it refuses, and that it can be repeated."""

from __future__ import annotations

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pvae
import pvae.loop
import pvae.progress
from pvae.errors import DataError, NonFiniteError, OptionError, ProgramError
from pvae.guides.exact import Exact
from pvae.guides.gaussian import Gaussian
from pvae.models.factor_analysis import FactorAnalysis
from pvae.models.gaussian_mixture import GaussianMixture
from pvae.models.vae import VAE
from pvae.objectives import as_objective
from pvae.schedules import Linear


def small_pair(x_dim: int = 6) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = VAE(x_dim, z_dim=2, hidden=(8,), likelihood="gaussian")
    return model, Gaussian(x_dim, model.latents, hidden=(8,))


def small_data(rows: int = 50, x_dim: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, x_dim, generator=generator)


def parameters_of(run) -> list[torch.Tensor]:
    return [p.detach().clone() for m in (run.model, run.guide) for p in m.parameters()]


def principal_digits() -> torch.Tensor:
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA

    projected = torch.tensor(PCA(10, random_state=0).fit_transform(load_digits().data))
    return projected / projected.std()


def test_linear_gaussian_vae_reaches_the_maximum_likelihood_of_factor_analysis():
    """RELIABILITY C13: within 1e-3 nat per datum of scikit-learn, on 10 directions of digits."""
    from sklearn.decomposition import FactorAnalysis as Reference

    x = principal_digits()
    reference = Reference(4, tol=1e-12, max_iter=50_000, svd_method="lapack").fit(x.numpy())
    torch.manual_seed(0)
    model = FactorAnalysis(10, z_dim=4).double()
    guide = Gaussian(10, model.latents, hidden=(), covariance="full").double()
    run = pvae.fit(
        model, guide, x, objective=pvae.stl(), epochs=400, batch_size=600, lr=2e-2,
        lr_schedule="cosine", progress=False,
    )  # fmt: skip
    reached = float(model.log_evidence(x).mean().detach())
    expected = float(reference.score(x.numpy()))
    assert abs(reached - expected) < 1e-3
    assert abs(run.history[-1]["bound"] - expected) < 3e-3  # the guide is exact in the limit


def test_mixture_with_enumeration_reaches_em_from_the_same_start():
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture as Reference

    x = PCA(4, random_state=0).fit_transform(load_digits().data)[:600]
    x = x / x.std(0)
    start = KMeans(3, n_init=1, random_state=0).fit(x).cluster_centers_
    reference = Reference(
        3, covariance_type="diag", means_init=start, weights_init=np.full(3, 1 / 3),
        precisions_init=np.ones((3, 4)), tol=1e-9, max_iter=5000, reg_covar=0,
    ).fit(x)  # fmt: skip
    model = GaussianMixture(4, num_components=3).double()
    with torch.no_grad():
        model.loc.copy_(torch.tensor(start))
    data = torch.tensor(x)

    def guide(x: torch.Tensor) -> None:
        """Everything is summed out."""

    pvae.fit(
        model, guide, data, objective=pyro.infer.TraceEnum_ELBO(max_plate_nesting=1), epochs=600,
        batch_size=600, lr=3e-2, lr_schedule="cosine", progress=False,
    )  # fmt: skip
    reached = float(model.log_evidence(data).mean().detach())
    assert abs(reached - reference.score(x)) < 1e-2


def test_exact_guide_makes_the_elbo_the_evidence():
    x = small_data(40).double()
    torch.manual_seed(0)
    model = FactorAnalysis(6, z_dim=2).double()
    run = pvae.fit(model, Exact(model), x, valid=x, epochs=3, lr=1e-2, progress=False)
    assert run.history[-1]["valid_bound"] == pytest.approx(
        float(model.log_evidence(x).mean().detach()), abs=1e-9
    )


def test_history_counts_a_partial_batch_by_its_rows():
    """T3: the epoch mean weighs data, not batches."""
    x = small_data(33).double()
    torch.manual_seed(0)
    model = FactorAnalysis(6, z_dim=2).double()
    expected = float(model.log_evidence(x).mean().detach())
    run = pvae.fit(
        model, Exact(model), x, epochs=1, batch_size=16, lr=1e-13, optimizer="sgd", progress=False
    )
    assert run.history[0]["bound"] == pytest.approx(expected, abs=1e-9)
    assert run.history[0]["step"] == 3


@pytest.mark.parametrize(("rows", "held_out"), [(33, 16), (32, 5)], ids=["last", "held out"])
@pytest.mark.parametrize("objective", [pvae.vae(), Trace_ELBO()], ids=["ours", "pyros"])
def test_programs_of_one_batch_size_are_refused_before_they_meet_another(objective, rows, held_out):
    model, guide = small_pair()

    def fixed(x):
        guide(x.view(16, 6))

    short = min(rows % 16 or 16, held_out)
    with pytest.raises(ProgramError, match=f"fail on a batch of {short} rows, .*shape '.16, 6.'"):
        pvae.fit(
            model, fixed, small_data(rows), valid=small_data(held_out), objective=objective,
            epochs=1, batch_size=16, progress=False,
        )  # fmt: skip


def test_same_seed_same_bytes_and_another_seed_others():
    runs = []
    for seed in (0, 0, 1):
        model, guide = small_pair()
        runs.append(pvae.fit(model, guide, small_data(), epochs=3, seed=seed, progress=False))
    same = zip(parameters_of(runs[0]), parameters_of(runs[1]), strict=True)
    other = zip(parameters_of(runs[0]), parameters_of(runs[2]), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert not all(torch.equal(a, b) for a, b in other)


def test_the_callers_random_stream_is_untouched():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model, guide = small_pair()
    torch.manual_seed(7)
    pvae.fit(model, guide, small_data(), epochs=1, valid=small_data(10), progress=False)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "optimizer",
    ["adam", "adamw", "sgd", "rmsprop", "adagrad", "adamax", "nadam", torch.optim.RAdam],
)
def test_optimizers_by_name_and_class(optimizer):
    model, guide = small_pair()
    run = pvae.fit(model, guide, small_data(), optimizer=optimizer, epochs=2, progress=False)
    assert math.isfinite(run.history[-1]["bound"])


def test_optimizer_instance_schedule_and_clipping():
    model, guide = small_pair()
    optimizer = torch.optim.SGD([*model.parameters(), *guide.parameters()], lr=0.1, momentum=0.9)
    run = pvae.fit(
        model, guide, small_data(), optimizer=optimizer, epochs=3, clip_norm=1e-9,
        lr_schedule="linear", progress=False,
    )  # fmt: skip
    rates = [row["lr"] for row in run.history]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.1
    assert optimizer.param_groups[0]["lr"] == 0.1  # for whoever goes on with it
    model_again, _ = small_pair()
    moved = [
        float((a - b).detach().abs().max())
        for a, b in zip(model.parameters(), model_again.parameters(), strict=True)
    ]
    assert max(moved) < 1e-7  # clipped to almost nothing


def test_best_parameters_are_kept_and_patience_stops():
    model, guide = small_pair()
    train, valid = small_data(20), small_data(20) + 0.5
    run = pvae.fit(
        model, guide, train, valid=valid, epochs=300, patience=5, lr=3e-2, progress=False
    )
    bounds = [row["valid_bound"] for row in run.history]
    assert run.stopped == "patience"
    assert run.best_epoch == 1 + int(np.argmax(bounds))
    assert len(bounds) == run.best_epoch + 5
    again = pvae.fit(model, guide, train, valid=valid, epochs=1, lr=1e-12, optimizer="sgd",
                     progress=False)  # fmt: skip
    assert again.history[0]["valid_bound"] == pytest.approx(max(bounds), abs=1e-4)


def test_kl_weight_that_does_not_end_at_one_is_said_and_the_elbo_logged():
    model, guide = small_pair()
    with pytest.warns(UserWarning, match="KL weight ends at 4"):
        run = pvae.fit(model, guide, small_data(), objective=pvae.beta_vae(4.0), epochs=1,
                       progress=False)  # fmt: skip
    row = run.history[0]
    assert row["beta"] == 4
    assert row["elbo"] == pytest.approx(row["reconstruction"] - row["kl"], abs=1e-5)
    assert row["bound"] == pytest.approx(row["reconstruction"] - 4 * row["kl"], abs=1e-4)
    warmup = pvae.beta_vae(Linear(steps=2))
    run = pvae.fit(model, guide, small_data(), objective=warmup, epochs=4, batch_size=25,
                   progress=False)  # fmt: skip
    assert run.history[-1]["beta"] == 1


def test_validation_now_and_then_and_at_the_end(tmp_path):
    x = small_data()
    every, seldom = (
        pvae.fit(
            *small_pair(), x, valid=x[:20], valid_every=each, epochs=8, batch_size=25, lr=1e-2,
            engine="eager", progress=False,
        )
        for each in (1, 3)
    )  # fmt: skip
    judged = [row["epoch"] for row in seldom.history if "valid_bound" in row]
    assert judged == [3, 6, 8]
    for one, other in zip(every.history, seldom.history, strict=True):
        assert one["bound"] == other["bound"]
        assert other.get("valid_bound", one["valid_bound"]) == one["valid_bound"]
    assert seldom.best_epoch in judged
    assert pvae.plots.training_curves({"a": seldom.history}).axes
    with pytest.raises(OptionError, match="valid_every must be at least 1"):
        pvae.fit(*small_pair(), x, valid=x, valid_every=0)


def test_validation_bound_has_weight_one_whatever_beta_is():
    model, guide = small_pair()
    x = small_data()
    with pytest.warns(UserWarning, match="KL weight"):
        run = pvae.fit(
            model, guide, x, valid=x, objective=pvae.beta_vae(0.01), epochs=1, progress=False
        )
    row = run.history[0]
    assert row["valid_bound"] == pytest.approx(row["valid_elbo"], abs=1e-5)


def test_preprocess_draws_anew_each_epoch():
    seen = []

    def binarize(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.bernoulli(x))
        return seen[-1]

    torch.manual_seed(0)
    model = VAE(6, z_dim=2, hidden=(8,))
    guide = Gaussian(6, model.latents, hidden=(8,))
    grey = torch.full((8, 6), 0.5)
    pvae.fit(model, guide, grey, preprocess=binarize, epochs=2, batch_size=8, progress=False)
    assert len(seen) >= 3  # one look, two epochs
    assert not torch.equal(seen[-1], seen[-2])


def test_batches_of_similar_rows_hold_each_row_once_an_epoch():
    seen: list[torch.Tensor] = []

    def look(x):
        seen.append(x[:, 0].clone())
        return x

    x = small_data(50)
    x[:, 0] = torch.arange(50).float()[torch.randperm(50)]
    for size in (x[:, 0], x[:, 0].tolist(), None):
        seen.clear()
        pvae.fit(
            *small_pair(), x, epochs=2, batch_size=8, preprocess=look, bucket_by=size,
            engine="eager", progress=False,
        )  # fmt: skip
        epochs = [seen[-14:-7], seen[-7:]]
        for epoch in epochs:
            assert torch.cat(epoch).sort().values.tolist() == list(range(50))
            assert [len(batch) for batch in epoch] == [8] * 6 + [2]
        spread = torch.stack([batch.std() for batch in epochs[0][:-1]]).mean()
        assert (spread < 8) == (size is not None)  # 14 where batches are of any rows
        assert not torch.equal(epochs[0][0], epochs[1][0])
    with pytest.raises(OptionError, match="a number for each of 50 training rows"):
        pvae.fit(*small_pair(), x, bucket_by=torch.arange(3))


@pytest.mark.parametrize("size", [None, torch.arange(50)])
def test_the_order_of_an_epoch_is_moved_to_the_device_once(monkeypatch, size):
    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            copies.append(func is torch.Tensor.to)
            return func(*args, **(kwargs or {}))

    def watched(loop, epoch):
        with Watch():
            batches = list(make(loop, epoch))
        return iter(batches)

    copies: list[bool] = []
    make = pvae.loop.Loop._batches
    monkeypatch.setattr(pvae.loop.Loop, "_batches", watched)
    pvae.fit(*small_pair(), small_data(50), epochs=1, batch_size=8, bucket_by=size, progress=False)
    assert sum(copies) == 1


def test_metrics_file_has_one_strict_json_line_per_epoch(tmp_path):
    model, guide = small_pair()
    run = pvae.fit(
        model, guide, small_data(), valid=small_data(9), epochs=3, run_dir=tmp_path / "r",
        progress=False,
    )  # fmt: skip
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.history
    for name in ("bound", "elbo", "reconstruction", "kl", "valid_bound", "lr", "beta", "seconds"):
        assert name in run.history[0]


def test_plain_lines_off_a_terminal(capsys):
    model, guide = small_pair()
    pvae.fit(model, guide, small_data(), valid=small_data(9), epochs=2)
    error = capsys.readouterr().err
    assert "epoch 2/2: bound" in error
    assert "nats/datum" in error
    assert "\x1b" not in error


def test_a_bar_on_a_terminal_shows_bound_parts_and_speed(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(pvae.progress, "_INTERVAL", 0.0)
    model, guide = small_pair()
    pvae.fit(model, guide, small_data(), epochs=3, batch_size=5)
    error = capsys.readouterr().err
    assert "epoch 3/3: bound" in error
    with pvae.progress.Reporter(2, 10) as reporter:
        assert reporter.bar is not None
        reporter.step(torch.tensor([-50.0, -50.0, -40.0, 10.0]), 10)
        assert reporter.bar.tasks[0].description.startswith("bound -5.0 (rec -4.0, KL 1.0) nats,")
        reporter.step(torch.tensor([-50.0, -50.0, math.nan, math.nan]), 10)
        assert "rec" not in reporter.bar.tasks[0].description
        reporter.say("engine eager instead of staged: [aten.mm] of [/x]")
    assert "[aten.mm] of [/x]" in capsys.readouterr().err


class Poisoned(nn.Module):
    """Gives a NaN density to the data whose first feature is large."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(6))

    def forward(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            scale = torch.where(x[:, :1] > 50, math.nan, 1.0)
            loc = self.loc + z.sum(-1, keepdim=True)
            pyro.sample("x", dist.Normal(loc, scale, validate_args=False).to_event(1), obs=x)


def test_non_finite_density_stops_before_the_parameters_are_spoilt():
    x = small_data(40)
    x[33, 0] = 100.0
    _, guide = small_pair()
    guide.latents = {"z": (2,)}
    model = Poisoned()
    with pytest.raises(NonFiniteError, match=r"epoch 1, step \d+: model site 'x'.* 1 of"):
        pvae.fit(model, guide, x, epochs=1, batch_size=8, progress=False)
    for module in (model, guide):
        assert all(torch.isfinite(p).all() for p in module.parameters())


def test_diverging_rate_is_stopped_with_finite_parameters():
    model, guide = small_pair()
    with pytest.raises(NonFiniteError, match="lower lr"):
        pvae.fit(model, guide, small_data(), lr=1e20, optimizer="sgd", epochs=50, progress=False)
    assert all(torch.isfinite(p).all() for p in guide.parameters())


def test_pyro_elbos_are_objectives_and_equal_ours():
    results = []
    for objective in (pvae.vae(), pyro.infer.Trace_ELBO()):
        model, guide = small_pair()
        run = pvae.fit(model, guide, small_data(), objective=objective, epochs=3, progress=False)
        results.append(parameters_of(run))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_mean_field_elbo_of_pyro_equals_analytic_kl():
    rows = []
    for objective in (pvae.vae(analytic_kl=True), pyro.infer.TraceMeanField_ELBO()):
        model, guide = small_pair()
        run = pvae.fit(model, guide, small_data(), objective=objective, epochs=2, progress=False)
        rows.append(run.history[-1]["bound"])
    assert rows[0] == pytest.approx(rows[1], abs=1e-4)


def test_pyro_elbo_under_a_plate_that_counts_all_data_is_still_a_mean_per_datum():
    x = small_data(40)
    base, guide = small_pair()

    def build(size):
        def model(x: torch.Tensor) -> None:
            with pyro.plate("data", size or len(x), subsample=x):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
                pyro.sample("x", base.decode(z), obs=x)

        def posterior(x: torch.Tensor) -> None:
            with pyro.plate("data", size or len(x), subsample=x):
                pyro.sample("z", guide.posterior(x)["z"])

        return model, posterior

    bounds = []
    for size in (None, 40):
        model, posterior = build(size)
        objective = pyro.infer.Trace_ELBO()
        wrapped = as_objective(objective)
        wrapped.prepare(model, posterior, x[:10])
        torch.manual_seed(0)
        bounds.append(float(wrapped.evaluate(model, posterior, x[:10]).bound.mean()))
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-5)


def test_store_style_program_trains():
    encoder = nn.Linear(6, 4)
    decoder = nn.Linear(2, 6)

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), noise).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    before = decoder.weight.detach().clone()
    run = pvae.fit(model, guide, small_data(), epochs=5, lr=1e-2, progress=False)
    assert run.num_parameters == 28 + 18 + 1
    assert not torch.equal(before, decoder.weight)
    assert float(pyro.param("noise").detach()) != 1.0
    assert run.history[-1]["bound"] > run.history[0]["bound"]


def test_tuple_and_dict_batches_train():
    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def forward(self, inputs: torch.Tensor, y: torch.Tensor) -> None:
            with pyro.plate("data", len(inputs)):
                z = pyro.sample("z", dist.Normal(self.net(inputs), 1).to_event(1))
                pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    class Posterior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(5, 2)

        def forward(self, inputs: torch.Tensor, y: torch.Tensor) -> None:
            with pyro.plate("data", len(inputs)):
                loc = self.net(torch.cat([inputs, y], -1))
                pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    inputs, y = small_data(30, 3), small_data(30, 2)
    bounds = []
    for batch in ((inputs, y), {"inputs": inputs, "y": y}):
        torch.manual_seed(0)
        run = pvae.fit(Regression(), Posterior(), batch, epochs=2, progress=False)
        bounds.append(run.history[-1]["bound"])
    assert bounds[0] == bounds[1]


def test_scale_of_the_program_weighs_the_loss_and_not_the_bound():
    """poutine.scale halves the gradient, and the quoted bound stays the bound."""
    x = small_data(20)
    model, guide = small_pair()
    half_model = pyro.poutine.scale(model, 0.5)
    half_guide = pyro.poutine.scale(guide, 0.5)
    objective = pvae.iwae(4)
    gradients = []
    for m, g in ((model, guide), (half_model, half_guide)):
        layout = objective.prepare(m, g, x)
        torch.manual_seed(0)
        loss = objective.evaluate(m, g, x, layout=layout)
        gradients.append(torch.autograd.grad(loss.loss, list(guide.parameters())))
        bound = loss.bound
    torch.manual_seed(0)
    expected = pvae.bounds.iw_elbo(pvae.draw(model, guide, x, 4).log_weights)
    assert torch.allclose(bound, expected)
    for full, half in zip(*gradients, strict=True):
        assert torch.allclose(0.5 * full, half, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"epochs": 0}, OptionError, "epochs and batch_size must be at least 1"),
        ({"batch_size": 0}, OptionError, "epochs and batch_size must be at least 1"),
        ({"lr": 0.0}, OptionError, "lr must be positive"),
        ({"optimizer": "adm"}, OptionError, "did you mean"),
        ({"optimizer_options": {"momentun": 1}}, OptionError, "refused its options"),
        ({"lr_schedule": "cosinus"}, OptionError, "did you mean 'cosine'"),
        ({"patience": 3}, OptionError, "needs held-out data"),
        ({"lr_schedule": None}, OptionError, "no lr_schedule is called None"),
        ({"clip_norm": 0.0}, OptionError, "clip_norm must be positive"),
        ({"clip_norm": -1.0}, OptionError, "clip_norm must be positive"),
        ({"clip_norm": math.nan}, OptionError, "clip_norm must be positive"),
        ({"optimizer": torch.optim.LBFGS}, OptionError, "LBFGS needs a closure"),
        ({"optimizer": torch.optim.SparseAdam}, OptionError, "SparseAdam needs"),
        ({"optimizer": pyro.optim.Adam({"lr": 1e-3})}, OptionError, "a name in torch.optim"),
        (
            {"optimizer": torch.optim.Adam([torch.zeros(1, requires_grad=True)])},
            OptionError,
            "holds no parameter",
        ),
        ({"optimizer_options": {"differentiable": True}}, OptionError, "refused its options"),
        ({"bucket_by": [1.0, 2.0]}, OptionError, "a number for each of 50 training rows"),
        ({"engine": "warp"}, OptionError, "no engine is called 'warp'"),
        ({"device": "cuda:7"}, OptionError, "cannot be used"),
        ({"device": "nonsense"}, OptionError, "cannot be used"),
        ({"objective": "elbo"}, pvae.PvaeError, "must be a pvae.Objective"),
    ],
)
def test_bad_options_are_refused_before_anything_happens(tmp_path, options, error, words):
    model, guide = small_pair()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error, match=words) as caught:
        pvae.fit(model, guide, small_data(), run_dir=tmp_path / "run", progress=False, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_bad_data_are_refused(tmp_path):
    model, guide = small_pair()
    x = small_data()
    x[7, 3] = math.nan
    with pytest.raises(DataError, match="row 7"):
        pvae.fit(model, guide, x, progress=False)
    bernoulli = VAE(6, z_dim=2, hidden=(8,))
    grey = torch.zeros(500, 6)
    grey[499, 2] = 0.3  # far outside the first batch
    with pytest.raises(DataError, match=r"row 499 of the data has 0\.3; binarise"):
        pvae.fit(bernoulli, guide, grey, batch_size=8, progress=False)
    with pytest.raises(ProgramError, match="nothing to train"):
        pvae.fit(_fixed_model, _fixed_guide, small_data(), progress=False)


def _fixed_model(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(6), 1).to_event(1))
        pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)


def _fixed_guide(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1).to_event(1))


def test_held_out_data_outside_the_support_are_refused():
    torch.manual_seed(0)
    model = VAE(6, z_dim=2, hidden=(8,), likelihood="bernoulli")
    bits = (small_data() > 0).float()
    for preprocess in (None, torch.bernoulli):
        with pytest.raises(DataError, match=r"valid: .*site 'x'.* row 1 of the data has 0.5"):
            pvae.fit(
                model, Gaussian(6, model.latents, hidden=(8,)), bits, epochs=1,
                valid=torch.tensor([[0.0] * 6, [0.5] * 6]), preprocess=preprocess, progress=False,
            )  # fmt: skip


def test_fewer_rows_than_a_batch_is_one_batch():
    model, guide = small_pair()
    run = pvae.fit(model, guide, small_data(3), epochs=2, batch_size=128, progress=False)
    assert run.history[-1]["step"] == 2


def test_two_models_in_one_process_share_nothing():
    """T8: training one leaves the other's bytes alone."""
    first, first_guide = small_pair()
    second, second_guide = small_pair()
    before = [p.detach().clone() for p in second.parameters()]
    pvae.fit(first, first_guide, small_data(), epochs=2, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, second.parameters(), strict=True))


def test_memory_stays_flat():
    """T10: no tensor survives a step."""
    import gc

    model, guide = small_pair()
    counts = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        if len(counts) in (20, 380):
            gc.collect()
            counts.append(sum(type(o) in (torch.Tensor, nn.Parameter) for o in gc.get_objects()))
        else:
            counts.append(0)
        return x

    pvae.fit(
        model,
        guide,
        small_data(40),
        preprocess=watch,
        batch_size=4,
        epochs=40,
        engine="eager",
        progress=False,
    )
    measured = [c for c in counts if c]
    assert measured[1] <= measured[0] + 10
