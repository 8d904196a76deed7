"""Every engine takes the same step: same noise, same loss, same gradients, same parameters."""

from __future__ import annotations

import re
import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pvae
import pvae.engine
from pvae.engine import Auto, Eager, Problem, Staged, build_optimizer, mix
from pvae.errors import NonFiniteError
from pvae.gradients import mixed, score_function
from pvae.guides.exact import Exact
from pvae.guides.gaussian import Gaussian
from pvae.models.factor_analysis import FactorAnalysis
from pvae.models.gaussian_mixture import GaussianMixture
from pvae.models.vae import VAE
from pvae.particles import parameters
from pvae.schedules import Linear
from pvae.staging import StagingError

OBJECTIVES = {
    "elbo": pvae.vae(),
    "analytic kl": pvae.vae(analytic_kl=True),
    "iwae": pvae.iwae(4),
    "renyi": pvae.Objective(bound=pvae.bounds.renyi(0.5), num_particles=3),
    "dreg": pvae.dreg(4),
    "stl": pvae.stl(2),
    "score function": pvae.Objective(gradient=score_function, num_particles=3),
    "free bits": pvae.vae(free_bits=0.5),
}


def make_pair(kind: str = "vae") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    if kind == "vae":
        model: nn.Module = VAE(6, z_dim=2, hidden=(8,), likelihood="gaussian").double()
        return model, Gaussian(6, model.latents, hidden=(8,)).double()
    if kind == "full covariance":
        model = FactorAnalysis(6, z_dim=3).double()
        return model, Gaussian(6, model.latents, hidden=(8,), covariance="full").double()
    model = FactorAnalysis(6, z_dim=2).double() if kind == "exact" else GaussianMixture(6).double()
    return model, Exact(model)


def data(rows: int = 40) -> torch.Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1)).double()


def make_problem(kind="vae", objective=None, optimizer="adam", **options):
    model, guide = make_pair(kind)
    x = options.pop("data", data())
    goal = objective or pvae.vae()
    layout = goal.prepare(model, guide, x[:10])
    weights = parameters(model, guide, x[:10])
    optim = build_optimizer(
        optimizer, list(weights.values()), lr=1e-2, options=options.pop("optimizer_options", None)
    )
    device = torch.device("cpu")
    return Problem(model, guide, goal, optim, weights, layout, x, device, 0, len(x), **options)


def take_steps(step, count=5, rows=10, beta=1.0):
    found = []
    for number in range(count):
        index = (torch.arange(rows) * (number + 1)) % 40
        found.append(step(index, number, beta))
    step.finish()
    return torch.stack(found), [p.detach().clone() for p in step.problem.parameters.values()]


def assert_same(first, second, tolerance=1e-10):
    for ours, theirs in zip(first[1], second[1], strict=True):
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    assert torch.allclose(first[0], second[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_staged_equals_eager_for_every_objective(name):
    eager = take_steps(Eager(make_problem(objective=OBJECTIVES[name])))
    problem = make_problem(objective=OBJECTIVES[name])
    staged = take_steps(Staged(problem, torch.arange(10), compiled=False))
    assert_same(eager, staged)


@pytest.mark.parametrize("kind", ["full covariance", "exact", "mixture"])
def test_staged_equals_eager_for_every_pair(kind):
    objective = pvae.Objective(gradient=mixed, num_particles=2)
    eager = take_steps(Eager(make_problem(kind, objective)))
    staged = take_steps(Staged(make_problem(kind, objective), torch.arange(10), compiled=False))
    assert_same(eager, staged)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adam", {"weight_decay": 0.1}),
        ("adamw", {"weight_decay": 0.1, "betas": (0.8, 0.95)}),
        ("adam", {"amsgrad": True}),
        ("sgd", {}),
        ("sgd", {"momentum": 0.9, "weight_decay": 0.01}),
        ("rmsprop", {"alpha": 0.9}),
        ("rmsprop", {"momentum": 0.5}),
        ("nadam", {}),
        ("adagrad", {}),
    ],
)
def test_every_optimizer_moves_alike_in_and_after_the_graph(optimizer, options, monkeypatch):
    """In the graph, whose compiler is left out here for speed, and after it."""
    given = {"optimizer": optimizer, "optimizer_options": options}
    eager = take_steps(Eager(make_problem(**given)), count=8)
    after = take_steps(Staged(make_problem(**given), torch.arange(10), compiled=False), count=8)
    assert_same(eager, after, 1e-9)
    monkeypatch.setattr(pvae.engine, "lower", lambda graph, inputs: graph)
    inside = take_steps(Staged(make_problem(**given), torch.arange(10), compiled=True), count=8)
    assert_same(eager, inside, 1e-9)


@pytest.mark.parametrize("compiled", [False, True])
def test_clipping_weights_and_partial_batches(compiled, monkeypatch):
    monkeypatch.setattr(pvae.engine, "lower", lambda graph, inputs: graph)
    given = {"clip_norm": 0.5, "objective": pvae.iwae(3)}
    eager = Eager(make_problem(**given))
    staged = Staged(make_problem(**given), torch.arange(10), compiled=compiled)
    for step in (eager, staged):
        step(torch.arange(10), 0, 0.3)
        step(torch.arange(7), 1, 0.7)  # another size: taken eagerly, on the same optimiser state
        step(torch.arange(10, 20), 2, 1.0)
    assert_same(take_steps(eager, 2), take_steps(staged, 2), 1e-9)


def test_preprocessing_noise_is_fresh_at_each_replay():
    torch.manual_seed(0)

    def noisy(x):
        return x + torch.rand_like(x)

    eager = take_steps(Eager(make_problem(preprocess=noisy)))
    staged = take_steps(Staged(make_problem(preprocess=noisy), torch.arange(10), compiled=False))
    assert_same(eager, staged)
    assert len(set(staged[0][:, 0].tolist())) == 5


def test_tracing_leaves_parameters_buffers_and_streams_as_they_were():
    problem = make_problem()
    before = [p.detach().clone() for p in problem.parameters.values()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    Staged(problem, torch.arange(10), compiled=False)
    assert torch.equal(torch.rand(2), expected)
    for old, new in zip(before, problem.parameters.values(), strict=True):
        assert torch.equal(old, new)


def test_batch_normalisation_and_dropout_are_staged():
    def build():
        problem = make_problem()
        problem.guide.encoder.append(nn.BatchNorm1d(8).double())
        problem.guide.encoder.append(nn.Dropout(0.3))
        return problem

    eager, staged = build(), build()
    first = take_steps(Eager(eager))
    second = take_steps(Staged(staged, torch.arange(10), compiled=False))
    assert_same(first, second)
    for ours, theirs in zip(eager.buffers(), staged.buffers(), strict=True):
        assert torch.allclose(ours.double(), theirs.double())


def test_non_finite_step_leaves_the_parameters():
    problem = make_problem()
    problem.data = data()
    step = Staged(problem, torch.arange(10), compiled=False)
    step(torch.arange(10), 0, 1.0)
    before = [p.detach().clone() for p in problem.parameters.values()]
    problem.data[5, 2] = float("nan")
    unchecked = pyro.validation_enabled(False)
    with unchecked, pytest.raises(NonFiniteError, match=r"step 1: .*data rows 5"):
        step(torch.arange(10), 1, 1.0)
    for old, new in zip(before, problem.parameters.values(), strict=True):
        assert torch.equal(old, new)


class Branching(VAE):
    """Reads a value from its data, as no graph can."""

    def forward(self, x=None, size=1):
        if x is not None and float(x.mean()) > 100:
            return None
        return super().forward(x, size)


class Baked(VAE):
    """Computes something outside torch, which a trace would freeze."""

    def forward(self, x=None, size=1):
        offset = 0.0 if x is None else torch.as_tensor(x.detach().numpy().mean(1, keepdims=True))
        return super().forward(None if x is None else x + 3 * offset, size)


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [(Branching, "branches on data"), (Baked, "does not reproduce the program|numpy")],
)
def test_what_cannot_be_staged_trains_eagerly_with_the_reason(model_class, reason, capsys):
    def run(engine):
        torch.manual_seed(0)
        model = model_class(6, z_dim=2, hidden=(8,), likelihood="gaussian").double()
        guide = Gaussian(6, model.latents, hidden=(8,)).double()
        return pvae.fit(model, guide, data(), epochs=2, batch_size=10, engine=engine)

    staged, eager = run("staged"), run("eager")
    assert capsys.readouterr().err.count("engine eager instead of staged") == 1
    assert staged.engine.startswith("eager")
    assert re.search(reason, staged.engine)
    for ours, theirs in zip(staged.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_pyros_own_elbo_falls_back():
    model, guide = make_pair()
    run = pvae.fit(model, guide, data(), objective=pyro.infer.Trace_ELBO(), epochs=1,
                   engine="staged", progress=False)  # fmt: skip
    assert run.engine.startswith("eager")


def test_fit_by_any_engine_ends_at_the_same_parameters():
    ends = []
    for engine in ("eager", "staged", "auto"):
        model, guide = make_pair()
        objective = pvae.beta_vae(Linear(steps=20))
        run = pvae.fit(model, guide, data(), objective=objective, epochs=50, batch_size=16,
                       lr_schedule="cosine", engine=engine, progress=False)  # fmt: skip
        ends.append([p.detach() for p in model.parameters()])
        assert run.history[0]["beta"] < 1
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


def test_auto_takes_what_pays():
    problem = make_problem()
    said = []
    short = Auto(problem, total_steps=10, say=said.append)
    take_steps(short, 8)
    assert short.name == "eager"
    long = Auto(make_problem(), total_steps=20_000, say=said.append)
    long._compiling_pays = float("inf")
    take_steps(long, 8)
    assert long.name == "staged"
    assert len(said) == 2
    assert "would not pay" in said[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_equals_eager():
    eager = take_steps(Eager(make_problem(objective=pvae.dreg(3))))
    problem = make_problem(objective=pvae.dreg(3))
    compiled = take_steps(Staged(problem, torch.arange(10), compiled=True))
    assert_same(eager, compiled)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_failing_compiler_falls_back_to_the_graph(monkeypatch, capsys):
    import torch._inductor.compile_fx as inductor

    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(inductor, "compile_fx", fail)
    model, guide = make_pair()
    run = pvae.fit(model, guide, data(), epochs=2, batch_size=10, engine="compiled")
    assert run.engine.startswith("staged")
    assert "no C++ compiler found" in capsys.readouterr().err


def test_staging_error_is_not_shown_as_a_traceback():
    problem = make_problem()
    problem.model = Branching(6, z_dim=2, hidden=(8,), likelihood="gaussian").double()
    problem.parameters = parameters(problem.model, problem.guide, problem.data)
    problem.optimizer = torch.optim.Adam(list(problem.parameters.values()))
    with pytest.raises(StagingError, match="branches on data"):
        Staged(problem, torch.arange(10), compiled=False)


def test_several_sites_and_masks_are_staged():
    class TwoSites(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 6).double()

        def forward(self, x):
            with pyro.plate("data", len(x)):
                zeros = torch.zeros(2, dtype=x.dtype)
                z2 = pyro.sample("z2", dist.Normal(zeros, 1).to_event(1))
                z1 = pyro.sample("z1", dist.Normal(z2, 1).to_event(1))
                with pyro.poutine.mask(mask=x[:, 0] > -1):
                    pyro.sample("x", dist.Normal(self.net(z1), 1).to_event(1), obs=x)

    class TwoGuide(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 2).double()
            self.second = nn.Linear(2, 2).double()

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z1 = pyro.sample("z1", dist.Normal(self.first(x), 0.5).to_event(1))
                pyro.sample("z2", dist.Normal(self.second(z1), 0.7).to_event(1))

    def build():
        torch.manual_seed(0)
        problem = make_problem(objective=pvae.dreg(3))
        problem.model, problem.guide = TwoSites(), TwoGuide()
        problem.layout = problem.objective.prepare(problem.model, problem.guide, problem.data[:10])
        problem.parameters = parameters(problem.model, problem.guide, problem.data[:10])
        problem.optimizer = build_optimizer("adam", list(problem.parameters.values()), lr=1e-2)
        return problem

    eager = take_steps(Eager(build()))
    staged = take_steps(Staged(build(), torch.arange(10), compiled=False))
    assert_same(eager, staged)


def test_seeds_of_neighbouring_steps_are_unrelated():
    seeds = {mix(seed, step) for seed in range(30) for step in range(-3, 300)}
    assert len(seeds) == 30 * 303
    bits = torch.tensor([[mix(0, step) >> bit & 1 for bit in range(63)] for step in range(2000)])
    share = bits.double().mean(0)
    assert (share - 0.5).abs().max() < 4.5 * 0.5 / 2000**0.5
