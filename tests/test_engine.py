"""Every engine takes the same step: same noise, same loss, same gradients, same parameters."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pvae
from pvae.engine import Auto, Eager, Problem, Staged, build_optimizer, mix
from pvae.errors import NonFiniteError
from pvae.gradients import mixed, score_function
from pvae.guides.exact import Exact
from pvae.guides.gaussian import Gaussian
from pvae.models.factor_analysis import FactorAnalysis
from pvae.models.gaussian_mixture import GaussianMixture
from pvae.models.vae import VAE
from pvae.particles import parameters
from pvae.precision import precision_context
from pvae.schedules import Linear
from pvae.staging import StagingError

OBJECTIVES = {
    "elbo": pvae.vae(),
    "analytic kl": pvae.vae(analytic_kl=True),
    "iwae": pvae.iwae(4),
    "renyi": pvae.Objective(bound=pvae.bounds.renyi(0.5), num_particles=3),
    "dreg": pvae.dreg(4),
    "stl": pvae.stl(2),
    "resampled": pvae.recipes.resampled_iwae(2, num_particles=5),
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
    monkeypatch.setattr("pvae.engine.staged.lower", lambda graph, inputs: graph)
    inside = take_steps(Staged(make_problem(**given), torch.arange(10), compiled=True), count=8)
    assert_same(eager, inside, 1e-9)


def test_what_an_optimizer_does_not_hold_stays_and_is_clipped_by_in_no_engine(monkeypatch):
    monkeypatch.setattr("pvae.engine.staged.lower", lambda graph, inputs: graph)
    ends = []
    for engine in ("eager", "staged", "compiled"):
        model, guide = make_pair()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(guide.parameters(), lr=1e-2)
        run = pvae.fit(
            model, guide, data(), optimizer=optimizer, clip_norm=0.5, engine=engine, epochs=3,
            batch_size=10, progress=False,
        )  # fmt: skip
        assert run.num_parameters == sum(p.numel() for p in guide.parameters())
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        ends.append(torch.cat([p.detach().flatten() for p in guide.parameters()]))
    assert torch.allclose(ends[0], ends[1], atol=1e-10)
    assert torch.allclose(ends[0], ends[2], atol=1e-10)


@pytest.mark.parametrize("compiled", [False, True])
def test_clipping_weights_and_partial_batches(compiled, monkeypatch):
    monkeypatch.setattr("pvae.engine.staged.lower", lambda graph, inputs: graph)
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
    short = Auto(problem, torch.arange(10), total_steps=10, say=said.append)
    take_steps(short, 8)
    assert short.name == "eager"
    long = Auto(make_problem(), torch.arange(10), total_steps=20_000, say=said.append)
    long._compiling_pays = float("inf")
    take_steps(long, 8)
    assert long.name == "staged"
    assert len(said) == 2
    assert "would not pay" in said[0]


def test_auto_stages_the_usual_batch_though_it_decides_at_the_last_of_an_epoch(monkeypatch):
    monkeypatch.setattr(Auto, "_staging_pays", 0.0)
    monkeypatch.setattr(Auto, "_compiling_pays", float("inf"))
    staged: list[int] = []
    monkeypatch.setattr(Staged, "_verify", lambda step, index, before: staged.append(len(index)))
    pvae.fit(*make_pair(), data(), epochs=2, batch_size=9, progress=False)  # 9, 9, 9, 9, 4
    assert staged == [9]


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize("name", ["elbo", "iwae", "dreg", "stl", "resampled", "score function"])
def test_compiled_equals_eager_for_every_gradient(name):
    eager = take_steps(Eager(make_problem(objective=OBJECTIVES[name])))
    step = Staged(make_problem(objective=OBJECTIVES[name]), torch.arange(10), compiled=True)
    assert_same(eager, take_steps(step))
    if name == "iwae":
        after_two_hundred_steps(step)


def after_two_hundred_steps(compiled):
    eager = Eager(make_problem(objective=OBJECTIVES["iwae"]))
    take_steps(eager)  # the compiled one has taken these already
    ends = take_steps(eager, 200)[1], take_steps(compiled, 200)[1]
    for a, b in zip(*ends, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


@needs_compiler
@pytest.mark.parametrize("kind", ["full covariance", "exact", "mixture"])
def test_compiled_equals_eager_for_every_pair(kind):
    objective = pvae.Objective(gradient=mixed, num_particles=2)
    eager = take_steps(Eager(make_problem(kind, objective)))
    compiled = take_steps(Staged(make_problem(kind, objective), torch.arange(10), compiled=True))
    assert_same(eager, compiled)


def single_precision(engine, likelihood, activation, objective):
    """A step's metrics and the gradients it leaves, by plain SGD at a learning rate of one."""
    torch.manual_seed(0)
    x = (torch.rand(40, 30) < 0.4).float()
    model = VAE(30, z_dim=3, hidden=(16, 16), activation=activation, likelihood=likelihood)
    guide = Gaussian(30, model.latents, hidden=(16,), activation=activation)
    layout = objective.prepare(model, guide, x[:20])
    weights = parameters(model, guide, x[:20])
    before = [p.detach().clone() for p in weights.values()]
    optimizer = build_optimizer("sgd", list(weights.values()), lr=1.0)
    problem = Problem(
        model, guide, objective, optimizer, weights, layout, x, x.device, 0, len(x)
    )  # fmt: skip
    index = torch.arange(20)
    step = Eager(problem) if engine == "eager" else Staged(problem, index, compiled=True)
    found = step(index, 0, 1.0)
    return found, [b - p.detach() for b, p in zip(before, weights.values(), strict=True)]


@needs_compiler
@pytest.mark.parametrize(
    ("likelihood", "activation", "objective"),
    [("bernoulli", "tanh", pvae.iwae(5)), ("gaussian", "silu", pvae.stl(2))],
)
def test_compiled_single_precision_keeps_its_digits(likelihood, activation, objective):
    """The rewritten elementary functions are used here, and only here."""
    (ours, gradients), (theirs, expected) = (
        single_precision(engine, likelihood, activation, objective)
        for engine in ("compiled", "eager")
    )
    assert torch.allclose(ours, theirs, rtol=1e-5)
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_bfloat16_rounds_the_layers_and_nothing_else():
    seen = {}

    class Watched(VAE):
        def decode(self, z):
            likelihood = super().decode(z)
            seen["scale"] = likelihood.base_dist.scale
            return likelihood

    def build(precision):
        torch.manual_seed(0)
        problem = make_problem(data=data().float(), precision=precision)
        problem.model = Watched(6, z_dim=2, hidden=(8,), likelihood="gaussian")
        problem.guide = Gaussian(6, problem.model.latents, hidden=(8,))
        problem.parameters = parameters(problem.model, problem.guide, problem.data[:10])
        problem.optimizer = build_optimizer("adam", list(problem.parameters.values()), lr=1e-2)
        return problem

    full, rounded = Eager(build("full")), Eager(build("bfloat16"))
    plain, half = take_steps(full, 3), take_steps(rounded, 3)
    assert seen["scale"].dtype == torch.float32
    assert half[0].dtype == torch.float32
    assert not torch.allclose(plain[0], half[0], rtol=1e-6)
    assert torch.allclose(plain[0], half[0], rtol=2e-2, atol=0.5)
    staged = take_steps(Staged(build("bfloat16"), torch.arange(10), compiled=False), 3)
    assert_same(half, staged, 1e-5)
    for p in rounded.problem.parameters.values():
        assert p.dtype == torch.float32


def test_bfloat16_takes_layers_called_by_name():
    x, weight = torch.rand(3, 5), torch.rand(2, 5)
    with precision_context("bfloat16"):
        named = torch.nn.functional.linear(input=x, weight=weight)
        assert torch.equal(named, torch.nn.functional.linear(x, weight))
    assert not torch.equal(named, torch.nn.functional.linear(x, weight))


def test_double_precision_is_never_rounded():
    plain = take_steps(Eager(make_problem()))
    assert_same(plain, take_steps(Eager(make_problem(precision="bfloat16"))))


def test_a_graph_is_made_once_whatever_the_epochs_bring(monkeypatch):
    """Schedules, partial batches and validation never trace or compile again."""
    calls = []
    real = pvae.engine.staged.capture
    monkeypatch.setattr(
        "pvae.engine.staged.capture",
        lambda *given, **named: calls.append(1) or real(*given, **named),
    )
    monkeypatch.setattr("pvae.engine.staged.lower", lambda graph, inputs: calls.append(2) or graph)
    model, guide = make_pair()
    objective = pvae.beta_vae(Linear(steps=20))
    pvae.fit(model, guide, data(37), valid=data(5), objective=objective, epochs=6, batch_size=10,
             lr_schedule="cosine", engine="compiled", progress=False)  # fmt: skip
    assert calls == [1, 2]


@pytest.mark.parametrize("engine", ["eager", "staged"])
def test_two_thousand_steps_leave_memory_flat(engine):
    """In a process of its own; the first steps may still fill caches."""
    code = f"""
import resource, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_engine import Eager, Staged, make_problem
step = Eager(make_problem()) if {engine!r} == "eager" else Staged(
    make_problem(), torch.arange(10), compiled=False)
index = torch.arange(10)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
for number in range(300):
    step(index, number, 1.0)
before = resident()
for number in range(2000):
    step(index, number, 1.0)
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**20


def test_dict_and_tuple_batches_are_staged():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 6).double()

        def forward(self, x, weight):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), weight[:, None]).to_event(1), obs=x)

    class TwoGuide(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 2).double()

        def forward(self, x, weight):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.net(x), 0.5).to_event(1))

    ends = {}
    for engine in ("eager", "staged"):
        for form in ("tuple", "dict"):
            torch.manual_seed(0)
            model, guide = Two(), TwoGuide()
            parts = data(), 0.5 + torch.rand(40).double()
            batch = parts if form == "tuple" else dict(zip(("x", "weight"), parts, strict=True))
            run = pvae.fit(model, guide, batch, epochs=2, batch_size=10, engine=engine,
                           progress=False)  # fmt: skip
            assert run.engine.startswith(engine)
            ends[engine, form] = model.net.weight.detach()
    reference = ends["eager", "tuple"]
    assert all(torch.allclose(reference, end, rtol=1e-10) for end in ends.values())


def test_a_cuda_graph_without_cuda_says_so_and_trains(capsys, monkeypatch):
    monkeypatch.setattr("pvae.engine.staged.lower", lambda graph, inputs: graph)
    model, guide = make_pair()
    run = pvae.fit(model, guide, data(), epochs=1, batch_size=10, engine="cudagraph", device="cpu")
    assert run.engine == "compiled (a CUDA graph needs a CUDA device, and this is cpu)"
    assert capsys.readouterr().err.count("a CUDA graph needs a CUDA device") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_equals_eager_without_waiting():
    def build():
        problem = make_problem(data=data().cuda())
        for program in (problem.model, problem.guide):
            program.cuda()
        problem.device = torch.device("cuda")
        problem.optimizer = build_optimizer("adam", list(problem.parameters.values()), lr=1e-2)
        return problem

    index = torch.arange(10, device="cuda")
    eager, recorded = Eager(build()), Staged(build(), index, compiled=True, record=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(5):
            eager(index, number, 1.0)
            recorded(index, number, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    pairs = zip(
        eager.problem.parameters.values(), recorded.problem.parameters.values(), strict=True
    )
    assert all(torch.allclose(a, b, rtol=1e-8) for a, b in pairs)


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
