"""``on_nan="rollback"``: back to the last good state and on with other noise, or a reason."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from deaths import dying_after
from torch import Tensor, nn

import pvae
from pvae import rollback
from pvae.doctor import Doctor, examine_history
from pvae.engine import Problem
from pvae.errors import NonFiniteError, RunError
from pvae.guides.gaussian import Gaussian
from pvae.models.vae import VAE
from pvae.nonfinite import first_operation

ENGINES = ["eager", "staged"] + (["compiled"] if shutil.which("g++") else [])


def data(rows: int = 46) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


def pair():
    torch.manual_seed(0)
    model = VAE(4, z_dim=2, hidden=(5,), likelihood="gaussian")
    return model, Gaussian(4, model.latents, hidden=(5,))


class Rare(nn.Module):
    """Now and then, by its noise, the logarithm of a negative number."""

    latents = {"z": (2,)}

    def __init__(self, below: float = -2.0) -> None:
        super().__init__()
        self.net, self.below = nn.Linear(2, 4), below

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            scale = 1 + torch.where(z[..., :1] < self.below, z[..., :1], 1.0).log()
            pyro.sample(
                "x", dist.Normal(self.net(z), scale, validate_args=False).to_event(1), obs=x
            )


def rare_pair(below: float = -2.0):
    torch.manual_seed(0)
    model = Rare(below)
    return model, Gaussian(4, model.latents, hidden=(5,))


def fitted(make=rare_pair, x=None, **options):
    settings = {"epochs": 10, "batch_size": 6, "lr": 1e-3, "engine": "eager", "progress": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = pvae.fit(
            *make(), data() if x is None else x, on_nan="rollback", **{**settings, **options}
        )
    return run, [str(each.message) for each in caught if "rolled back" in str(each.message)]


@pytest.fixture(autouse=True)
def _short_interval(monkeypatch):
    monkeypatch.setattr(rollback, "INTERVAL", 5)


def parameters(run) -> Tensor:
    return torch.cat(
        [p.detach().flatten() for p in [*run.model.parameters(), *run.guide.parameters()]]
    )  # noqa: E501


def test_it_changes_nothing_where_all_is_well():
    plain = pvae.fit(
        *pair(), data(), epochs=3, batch_size=6, engine="eager", progress=False, device="cpu"
    )
    run, said = fitted(pair, epochs=3)
    assert said == []
    assert torch.equal(parameters(run), parameters(plain))
    assert all("rolled_back" not in row for row in run.history)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rare_accident_is_survived_in_every_engine(engine):
    run, said = fitted(engine=engine)
    assert run.engine.startswith(engine)
    rows = [row for row in run.history if "rolled_back" in row]
    assert sum(row["rolled_back"] for row in rows) == len(said) >= 2
    assert all(row["left_out"] >= row["rolled_back"] for row in rows)
    assert [row["epoch"] for row in run.history] == list(range(1, 11))
    assert bool(torch.isfinite(parameters(run)).all())
    assert run.history[-1]["lr"] == pytest.approx(1e-3 * 0.5 ** (len(said) - 1))
    assert "(1 of at most 10 times): epoch" in said[0]
    assert "(2 of at most 10 times, from here on with 0.5 of the learning rate)" in said[1]
    assert "model site 'x' has a log density that is not finite in 1 of" in said[0]


def test_the_state_put_back_is_the_one_that_was_kept(monkeypatch):
    """Parameters and the optimiser's moments, to the last bit."""
    kept, found = {}, []
    keep, put_back = rollback.GoodStates.keep, rollback.GoodStates.put_back

    def snapshot(good):
        tensors, about = rollback.pack(good.state, None, good.problems, torch.zeros(4))
        return {name: each.detach().clone() for name, each in tensors.items()}

    def keeping(good, place, sums):
        kept[place.step] = snapshot(good)
        return keep(good, place, sums)

    def putting(good):
        before = snapshot(good)
        step = put_back(good)
        after = snapshot(good)
        assert after.keys() == kept[step].keys()
        assert all(torch.equal(after[name], kept[step][name]) for name in after)
        found.append(any(not torch.equal(after[n], before[n]) for n in after.keys() & before))
        return step

    monkeypatch.setattr(rollback.GoodStates, "keep", keeping)
    monkeypatch.setattr(rollback.GoodStates, "put_back", putting)
    fitted()
    assert any(found)


def test_a_second_failure_goes_back_further():
    good = rollback.GoodStates({}, {})
    blank = ({}, {})
    good.kept = [
        rollback._Good(step, step, 1, step, 0, tried=False, saved=blank) for step in (5, 10)
    ]
    with pytest.MonkeyPatch.context() as context:
        context.setattr(rollback, "unpack", lambda *_: None)
        assert [good.put_back() for _ in range(4)] == [10, 5, 5, 5]


def test_a_row_that_is_never_finite_ends_it_with_its_number():
    x = data()
    x[17, 0] = 1e30  # its square is not in float32
    with pytest.raises(NonFiniteError) as caught:
        fitted(pair, x, epochs=30)
    said = str(caught.value)
    assert said.startswith("epoch 11, step")
    assert "site 'z' has a log density that is not finite in 1 of" in said
    assert "(data rows 17); first in the operation" in said
    assert said.endswith("10 rollbacks, the last at 0.002 of the learning rate, did not help")


def test_a_learning_rate_that_explodes_is_lowered_until_it_does_not():
    options = {"optimizer": "sgd", "lr": 30.0, "epochs": 6, "device": "cpu"}
    with pytest.raises(NonFiniteError):
        pvae.fit(*pair(), data(), batch_size=6, engine="eager", progress=False, **options)
    run, said = fitted(pair, **options)
    assert 1 < len(said) <= 10
    assert run.history[-1]["lr"] < 30
    assert run.history[-1]["bound"] > run.history[0]["bound"]
    assert bool(torch.isfinite(parameters(run)).all())


def test_the_state_at_the_end_of_a_failure_is_the_last_good_one():
    model, guide = rare_pair(below=9.0)  # never a number: the logarithm of every negative draw
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NonFiniteError, match="operation log .test_rollback.py, line"):
            pvae.fit(model, guide, data(), on_nan="rollback", engine="eager", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "options", [{"alternate": 2}, {"parts": 2}, {"optimizer": "rprop"}, {"optimizer": "sgd"}]
)
def test_alternation_parts_and_other_optimisers(options):
    run, said = fitted(lambda: rare_pair(-2.3), **options)
    assert 1 <= len(said) <= 5
    assert bool(torch.isfinite(parameters(run)).all())


# --- resumed -------------------------------------------------------------------------------------


def end(run) -> tuple[bytes, list[dict[str, float]]]:
    folder = run.run_dir
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    return (folder / "checkpoints/best/tensors.safetensors").read_bytes(), rows


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("more", [{}, {"alternate": 2}], ids=["joint", "alternating"])
def test_a_resumed_run_rolls_back_to_the_same_bytes(tmp_path, engine, more):
    """Killed before, between and right after rollbacks, whose states lie before the checkpoints."""
    if more and engine == "compiled":
        pytest.skip("alternation is no matter of the engine")
    options = {"engine": engine, "valid": data(60)[46:], "checkpoint_every": "3 steps", **more}
    whole, said = fitted(run_dir=tmp_path / "whole", **options)
    steps = [int(re.search(r"epoch \d+, step (\d+)", text)[1]) for text in said]  # type: ignore[index]
    assert len(steps) >= 2
    assert any(int(re.search(r"to step (\d+)", t)[1]) < s for t, s in zip(said, steps, strict=True))  # type: ignore[index]  # noqa: E501
    deaths = sorted({3, steps[0], steps[0] + 1, steps[1] - 1, steps[-1] + 1})
    for step in deaths if engine == "eager" else deaths[1:2]:
        with dying_after(step):
            fitted(run_dir=tmp_path / "killed", resume=True, **options)
    found, _ = fitted(run_dir=tmp_path / "killed", resume=True, **options)
    assert end(found) == end(whole)


def test_without_the_copies_a_resumed_run_would_differ(tmp_path, monkeypatch):
    options = {"checkpoint_every": "3 steps"}
    whole, said = fitted(run_dir=tmp_path / "whole", **options)
    step = int(re.search(r"epoch \d+, step (\d+)", said[0])[1])  # type: ignore[index]
    with dying_after(step):
        fitted(run_dir=tmp_path / "killed", **options)
    monkeypatch.setattr(rollback.GoodStates, "unpack", lambda *_: None)
    found, _ = fitted(run_dir=tmp_path / "killed", resume=True, **options)
    assert end(found)[0] != end(whole)[0]


def test_a_checkpoint_without_copies_is_refused(tmp_path):
    good = rollback.GoodStates({}, {})
    with pytest.raises(RunError, match="no good state to go back to"):
        good.unpack(({}, {}))


# --- devices whose steps are not waited for ------------------------------------------------------


@pytest.mark.parametrize("engine", ["eager", "staged"])
def test_where_no_step_is_waited_for_it_is_found_within_an_interval(monkeypatch, engine):
    """As on a GPU: the flag is read once an interval, and the step found by taking them again."""
    monkeypatch.setattr(Problem, "waits", property(lambda _: False))
    run, said = fitted(engine=engine, epochs=10)
    assert len(said) >= 1
    assert all("model site 'x' has a log density that is not finite in 1 of" in s for s in said)
    assert all(torch.isfinite(torch.tensor(row["bound"])) for row in run.history)
    assert sum(row.get("rolled_back", 0) for row in run.history) == len(said)
    assert all(0 < row["left_out"] <= 46 for row in run.history if "rolled_back" in row)
    assert bool(torch.isfinite(parameters(run)).all())


# --- what is said --------------------------------------------------------------------------------


def test_the_doctor_counts_rollbacks_and_fit_alone_warns():
    doctor = Doctor()
    run, said = fitted(trackers=[doctor])
    (finding,) = [f for f in examine_history(run.history) if "rolled back" in f.name]
    assert f"not finite {len(said)} times" in finding.evidence
    assert finding.name in [each.name for each in doctor.findings]
    assert all(text.startswith("rolled back to step") for text in said)


def test_the_command_line_takes_it(tmp_path, monkeypatch, capsys):
    from pvae.cli import main

    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import pyro, pyro.distributions as dist, torch\nfrom torch import nn\n"
        "class Mine(nn.Module):\n"
        "    latents = {'z': (2,)}\n"
        "    def __init__(self, x_dim):\n"
        "        super().__init__()\n"
        "        self.net = nn.Linear(2, x_dim)\n"
        "    def forward(self, x):\n"
        "        with pyro.plate('data', len(x)):\n"
        "            z = pyro.sample('z', dist.Normal(torch.zeros(2), 1).to_event(1))\n"
        "            s = 1 + torch.where(z[..., :1] < -5.2, z[..., :1], 1.0).log()\n"
        "            d = dist.Normal(self.net(z), s, validate_args=False).to_event(1)\n"
        "            pyro.sample('x', d, obs=x)\n"
    )
    words = ["train", "./mine.py:Mine", "--guide", "gaussian", "--guide.hidden", "[4]", "--epochs",
             "4", "--engine", "eager", "--on-nan", "rollback", "--run-dir", "run"]  # fmt: skip
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "pvae: warning: rolled back to step" in said
    assert "first in the operation log (mine.py, line 11)" in said
    assert main(["doctor", "run"]) == 0
    assert "the training was rolled back" in Path("run/doctor.md").read_text()


@pytest.mark.parametrize(
    ("work", "named"),
    [
        (lambda x: (x - 2).log().exp(), "log"),
        (lambda x: (1e30 * x) * (1e30 * x), "mul"),
        (lambda x: x.exp() / 0.0, "div"),
        (lambda x: torch.empty(9).fill_(1.0) + x.sum(), None),
        (lambda x: (x * torch.nan) + 1, "mul"),
    ],
)
def test_the_first_operation_is_named(work, named):
    found = first_operation(lambda: work(torch.ones(3)))
    assert found is None if named is None else found.startswith(f"{named} (test_rollback.py, line")


def test_a_backward_pass_is_watched_too():
    x = torch.zeros(3, requires_grad=True)

    def work():
        torch.autograd.grad(x.abs().sqrt().sum() * 0.0, x)

    found = first_operation(work)
    assert found is not None
    assert found.startswith(("div", "mul"))


def test_a_value_of_the_data_is_made_by_no_operation():
    x = torch.tensor([1.0, torch.nan])
    assert first_operation(lambda: (x[1] + 1).exp()) is None
