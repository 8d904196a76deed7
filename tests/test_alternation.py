"""Variational EM: which half moves when, in every engine, and what cannot take turns."""

from __future__ import annotations

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import PyroStyleVAE, linear_gaussian
from torch import nn

import pvae
import pvae.engine
from pvae.alternation import Turns, as_alternate, split
from pvae.cli import main
from pvae.engine import Eager, Problem, Staged, build_optimizer
from pvae.errors import ObjectiveError, OptionError, ProgramError
from pvae.guides.exact import Exact
from pvae.guides.gaussian import Gaussian
from pvae.models.factor_analysis import FactorAnalysis
from pvae.models.vae import VAE
from pvae.particles import owned, parameters


def small_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = VAE(6, z_dim=2, hidden=(8,), likelihood="gaussian").double()
    return model, Gaussian(6, model.latents, hidden=(8,)).double()


def data(rows: int = 40) -> torch.Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1)).double()


def adam(tensors):
    return build_optimizer("adam", tensors, lr=1e-2)


def whole(model, guide, x, objective=None) -> Problem:
    goal = pvae.vae() if objective is None else objective
    layout = goal.prepare(model, guide, x[:10])
    weights = parameters(model, guide, x[:10])
    optimizer, cpu = adam(list(weights.values())), torch.device("cpu")
    return Problem(model, guide, goal, optimizer, weights, layout, x, cpu, 0, len(x))


def turns(plan, objective=None, make=lambda problem, steps, name: Eager(problem)) -> Turns:
    problem = whole(*small_pair(), data(), objective)
    problems = {"joint": problem} | split(problem, torch.arange(10), adam)
    return Turns(plan, problems, make, 100)


def phases(step: Turns, count: int) -> str:
    """Which half moved at each step, seen from the parameters: e, m or b for both."""
    problem, letters = step.problems["joint"], ""
    for number in range(count):
        before = {n: p.detach().clone() for n, p in problem.parameters.items()}
        step((torch.arange(10) * (number + 1)) % 40, number, 1.0)
        moved = {n.split(".")[0] for n, p in problem.parameters.items()
                 if not torch.equal(p, before[n])}  # fmt: skip
        letters += {("guide",): "e", ("model",): "m"}.get(tuple(sorted(moved)), "b")
    return letters


def check_turns(step: Turns) -> None:
    assert phases(step, 11) == "eeemmeeemme"


def test_phases_move_one_half_alone():
    check_turns(turns(pvae.Alternate(e_steps=3, m_steps=2)))


def test_a_half_that_is_not_held_is_caught():
    """Mutant: the E phase with the whole pair's optimiser and parameters."""

    def make(problem, steps, name):
        if name == "E phases":
            everything = {**problem.parameters, **problem.frozen}
            optimizer = adam(list(everything.values()))
            problem = dataclasses.replace(problem, parameters=everything, optimizer=optimizer)
        return Eager(problem)

    with pytest.raises(AssertionError):
        check_turns(turns(pvae.Alternate(e_steps=3, m_steps=2), make=make))


def test_a_frozen_half_gets_no_gradient_and_is_no_constant_of_the_graph():
    problem = whole(*small_pair(), data())
    for half in split(problem, torch.arange(10), adam).values():
        Eager(half)(torch.arange(10), 0, 1.0)
        assert all(p.grad is None for p in half.frozen.values())
        assert half.frozen
        for p in half.parameters.values():
            p.grad = None
        graph = Staged(half, torch.arange(10), compiled=False).run
        baked = [getattr(graph, n.target) for n in graph.graph.nodes if n.op == "get_attr"]
        held = {p.data_ptr() for p in problem.parameters.values()}
        assert not [t for t in baked if torch.is_tensor(t) and t.data_ptr() in held]


class Told:
    """A step whose bounds are given."""

    name, reason, seconds = "told", "", 0.0

    def __init__(self, bounds):
        self.bounds = bounds

    def __call__(self, index, step, beta):
        return torch.tensor([self.bounds(step) * len(index), 0.0, 0.0, 0.0])

    def finish(self):
        """Nothing."""


def lengths(plan, bounds, steps=60):
    step = turns(plan, make=lambda *_: Told(bounds))
    letters = ""
    for number in range(steps):
        letters += step.phase
        step(torch.arange(10), number, 1.0)
    return [len(run) for run in letters.replace("m", " ").split()]


def test_until_flat_lasts_while_windows_rise():
    plan = pvae.Alternate(e_steps="until-flat", window=5, most=40)
    # Rises up to step 12: the window of steps 15 to 19 is above the one before, the next is not.
    rising = lambda step: float(min(step, 12))  # noqa: E731
    assert lengths(plan, rising)[0] == 25
    assert lengths(plan, lambda step: 0.0)[:2] == [10, 10]
    assert lengths(plan, float)[0] == 40  # never flat: the longest
    assert lengths(dataclasses.replace(plan, most=7), float)[:2] == [7, 7]


def test_a_partial_batch_counts_by_its_rows():
    plan = pvae.Alternate(e_steps="until-flat", window=2)
    step = turns(plan, make=lambda *_: Told([0.0, 4.0, 1.0, 1.0].__getitem__))
    for number, rows in enumerate((30, 10, 10, 10)):  # means 1 and 1: flat
        step(torch.arange(rows), number, 1.0)
    assert step.phase == "m"


def test_history_tells_the_steps_of_each_phase_and_when_turns_end():
    model, guide = small_pair()
    run = pvae.fit(
        model, guide, data(), valid=data(10), batch_size=10, epochs=4, progress=False,
        alternate=pvae.Alternate(e_steps=3, epochs=2), engine="eager",
    )  # fmt: skip
    steps = [(row["e_steps"], row["m_steps"], row["joint_steps"]) for row in run.history]
    assert steps == [(3, 1, 0), (3, 1, 0), (0, 0, 4), (0, 0, 4)]
    assert run.engine.startswith("eager")


def test_turns_end_when_the_column_no_longer_rises():
    plan = pvae.Alternate(e_steps=1, while_rising="valid_bound")
    step = turns(plan)
    for epoch, value in enumerate((1.0, 2.0, 2.0)):
        assert step.phase != "joint"
        step.end_epoch({"epoch": epoch, "valid_bound": value})
    assert step.phase == "joint"


def fitted(engine, objective, alternate, x=None):
    model, guide = small_pair()
    run = pvae.fit(
        model, guide, data() if x is None else x, objective=objective, alternate=alternate,
        batch_size=10, epochs=3, engine=engine, lr=1e-2, progress=False,
    )  # fmt: skip
    numbers = [p.detach().flatten() for m in (run.model, run.guide) for p in m.parameters()]
    return torch.cat([*numbers, torch.tensor([row["bound"] for row in run.history])]), run


PLAN = pvae.Alternate(e_steps=2, m_steps=1, epochs=2)


@pytest.mark.parametrize("objective", [pvae.vae(), pvae.rws(3)], ids=["vae", "rws"])
def test_staged_and_compiled_take_the_steps_of_eager(objective, monkeypatch):
    """Compiled with the optimisers in the graphs, the compiler itself left out for speed."""
    monkeypatch.setattr("pvae.engine.staged.lower", lambda graph, inputs: graph)
    expected, _ = fitted("eager", objective, PLAN)
    for engine in ("staged", "compiled"):
        found, run = fitted(engine, objective, PLAN)
        assert run.engine.startswith(engine)
        assert torch.allclose(found, expected, rtol=0, atol=1e-9)


def test_a_compiled_half_sees_what_the_other_half_learned():
    """Compiled code does not see the later values of a graph's constants."""
    losses = []
    for make in (Eager, lambda p: Staged(p, torch.arange(10), compiled=True)):
        torch.manual_seed(0)
        model = FactorAnalysis(6, z_dim=2).double()
        guide = Gaussian(6, model.latents, hidden=()).double()
        problem = whole(model, guide, data(), pvae.wake_sleep())
        step = make(split(problem, torch.arange(10), adam)["e"])
        with torch.no_grad():
            model.loadings.mul_(3.0)  # what an M phase would have done
        losses.append(torch.stack([step(torch.arange(10), n, 1.0) for n in range(3)]))
    assert torch.allclose(*losses, rtol=0, atol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_graph_takes_the_steps_of_eager():
    ends = []
    for engine in ("eager", "cudagraph"):
        model, guide = small_pair()
        pvae.fit(model, guide, data(), alternate=PLAN, batch_size=10, epochs=3, engine=engine,
                 device="cuda", progress=False)  # fmt: skip
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, rtol=0, atol=1e-7)


def test_auto_takes_what_pays_for_each_half(monkeypatch):
    monkeypatch.setattr(pvae.engine.Auto, "_staging_pays", 0.0)
    found, run = fitted("auto", pvae.vae(), 1, data(100))
    assert run.engine.startswith("staged")
    assert torch.allclose(found, fitted("eager", pvae.vae(), 1, data(100))[0], rtol=0, atol=1e-9)


def test_same_seed_same_bytes():
    plan = pvae.Alternate(e_steps="until-flat", window=2, most=6)
    assert torch.equal(fitted("eager", pvae.vae(), plan)[0], fitted("eager", pvae.vae(), plan)[0])


def test_pyros_own_elbo_takes_turns_too():
    before, (model, guide) = [p.clone() for p in small_pair()[1].parameters()], small_pair()
    run = pvae.fit(model, guide, data(), objective=pyro.infer.Trace_ELBO(), alternate=2,
                   batch_size=10, epochs=1, progress=False)  # fmt: skip
    assert (run.history[0]["e_steps"], run.history[0]["m_steps"]) == (3, 1)
    moved = [not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True)]
    assert all(moved)


# --- whose parameter is it ----------------------------------------------------------------------


def halves_of(model, guide, x):
    weights = parameters(model, guide, x)
    of_model, of_guide = owned(model, guide, x, weights)
    return of_guide - of_model, set(weights) - (of_guide - of_model)


def test_one_module_with_both_programs_is_told_apart():
    module = PyroStyleVAE()
    guide, model = halves_of(module.model, module.guide, torch.randn(4, 5))
    assert guide == {"model.encoder.weight", "model.encoder.bias"}
    assert model == {"model.decoder.weight", "model.decoder.bias"}


def test_parameters_of_the_store_are_told_apart():
    def model(x):
        w = pyro.param("w", torch.ones(()))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)

    def guide(x):
        c = pyro.param("c", torch.zeros(()))
        scale = pyro.param("s", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(c * x, scale))

    assert halves_of(model, guide, torch.randn(4)) == ({"store.c", "store.s"}, {"store.w"})


def test_a_point_estimate_belongs_to_the_guide():
    """A Delta's log density does not move with its point; its draw does."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(pyro.param("w", torch.ones(())) * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(pyro.param("c", torch.zeros(())) * x))

    assert halves_of(model, guide, torch.randn(4)) == ({"store.c"}, {"store.w"})


class Tied(nn.Module):
    """A guide whose map is the transpose of the decoder's, with a shift of its own."""

    def __init__(self, model):
        super().__init__()
        self.model, self.shift = model, nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc = (x - self.model.offset) @ self.model.weight + self.shift
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))


def test_what_both_share_is_the_models():
    model, x = linear_gaussian()
    assert halves_of(model, Tied(model), x) == (
        {"guide.shift"}, {"model.weight", "model.offset", "model.log_noise"},
    )  # fmt: skip


# --- refusals, options, the command line ---------------------------------------------------------


def fit(model, guide, x, alternate, **options):
    return pvae.fit(model, guide, x, alternate=alternate, epochs=1, progress=False, **options)


def test_exact_guide_has_no_e_phase():
    model = FactorAnalysis(6, z_dim=2).double()
    with pytest.raises(ProgramError, match="takes the E-step exactly"):
        fit(model, Exact(model), data(), 2)


def test_model_without_parameters_has_no_m_phase():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand_by([]).to_event(1)
                        .mask(True), obs=x[:, :1])  # fmt: skip

    guide = Gaussian(6, {"z": (2,)}, hidden=(4,)).double()
    with pytest.raises(ProgramError, match="M phases"):
        fit(model, guide, data(), 2)


def test_objective_that_holds_the_guide_has_no_e_phase():
    with pytest.raises(ObjectiveError, match="guide_held gives 'guide"):
        fit(*small_pair(), data(), 2, objective=pvae.mcem(4))


@pytest.mark.parametrize(
    ("alternate", "words"),
    [
        (0, "e_steps of at least 1, a whole number, got 0"),
        ("until-falt", "'until-flat', got 'until-falt'"),
        (1.5, "got 1.5"),
        (True, "got True"),
    ],
)
def test_options_that_do_not_exist(alternate, words):
    with pytest.raises(OptionError, match=words):
        fit(*small_pair(), data(), alternate)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"m_steps": 0}, "m_steps of at least 1"),
        ({"epochs": 0}, "epochs of at least 1"),
        ({"e_steps": 2.5}, "e_steps of at least 1, a whole number, got 2.5"),
        ({"m_steps": 1.5}, "m_steps of at least 1, a whole number, got 1.5"),
        ({"while_rising": "valid_bund"}, "did you mean 'valid_bound'"),
    ],
)
def test_plans_that_do_not_exist(options, words):
    with pytest.raises(OptionError, match=words):
        pvae.Alternate(**options)


def test_optimizer_instance_and_missing_valid_are_refused():
    model, guide = small_pair()
    with pytest.raises(OptionError, match="by name or class"):
        fit(model, guide, data(), 1, optimizer=torch.optim.Adam(model.parameters()))
    with pytest.raises(OptionError, match="pass valid="):
        fit(model, guide, data(), pvae.Alternate(while_rising="valid_kl"))


def test_shorthands():
    assert as_alternate(None) is None
    assert as_alternate(3) == pvae.Alternate(e_steps=3)
    assert as_alternate("until-flat") == pvae.Alternate(e_steps="until-flat")


@pytest.mark.parametrize("given", ["3", "until-flat"])
def test_command_line(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [
        "--model.hidden",
        "[8]",
        "--guide.hidden",
        "[8]",
        "--epochs",
        "3",
        "--batch-size",
        "32",
    ]
    assert main(["train", "vae", *small, "--alternate", given, "--run-dir", "run"]) == 0
    run = pvae.load("run")
    steps = [sum(row[f"{phase}_steps"] for row in run.history) for phase in ("e", "m")]
    assert steps[0] > steps[1] > 0
    assert sum(steps) == run.history[-1]["step"]
    assert "E and" in capsys.readouterr().err
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert f"alternate: {given}" in text
    older = text.replace(f"alternate: {given}\n", "")
    (tmp_path / "run" / "config.yaml").write_text(older)
    pvae.load("run")  # a run of before there was the option
    assert main(["train", "vae", "--alternate", "sometimes"]) == 2
    assert "expected a whole number" in capsys.readouterr().err
