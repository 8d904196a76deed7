"""An interrupted training ends with the bytes of an uninterrupted one, in every engine."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from deaths import dying_after
from torch import Tensor, nn

import pvae
from pvae import checkpoints, loop, recipes, training
from pvae.cli import main
from pvae.engine import Auto
from pvae.errors import NonFiniteError, OptionError, RunError
from pvae.guides.gaussian import Gaussian
from pvae.guides.vector_quantised import VectorQuantised
from pvae.locks import locked
from pvae.models.vae import VAE
from pvae.models.vq_vae import VQVAE
from pvae.resumption import Every, as_every
from pvae.schedules import Linear


def data(rows: int = 23) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


def small_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = VAE(4, z_dim=2, hidden=(5,), likelihood="gaussian")
    return model, Gaussian(4, model.latents, hidden=(5,))


class Normalised(nn.Module):
    """A guide whose steps change buffers, one of them outside the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> None:
        with torch.no_grad():
            self.seen.add_(1)
        loc, log_scale = self.net(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + 1e-3 * self.seen, log_scale.exp()).to_event(1))


def normalised_pair() -> tuple[nn.Module, nn.Module]:
    model, _ = small_pair()
    return model, Normalised()


def store_pair():
    """Functions; the parameters live in Pyro's store."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), noise).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def bits_pair() -> tuple[nn.Module, nn.Module]:
    """A Bernoulli latent, whose gradient has a control variate that learns."""
    torch.manual_seed(0)
    model, guide = nn.Linear(3, 4), nn.Linear(4, 3)

    def generate(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(pyro.module("model", model)(z), 1.0).to_event(1), obs=x)

    def infer(x: Tensor) -> None:
        logits = pyro.module("guide", guide)(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    pyro.clear_param_store()
    return generate, infer


def averaged_pair() -> tuple[nn.Module, nn.Module]:
    """A codebook that moves by averages, and is seeded anew by chance."""
    torch.manual_seed(0)
    model = VQVAE(4, num_positions=2, num_codes=5, code_dim=2, hidden=(5,), likelihood="gaussian",
                  prior="autoregressive", prior_hidden=(6,))  # fmt: skip
    return model, VectorQuantised(4, model, hidden=(5,), decay=0.7)


CASES: dict[str, tuple] = {
    "eager": (small_pair, {"engine": "eager"}),
    "auto": (small_pair, {"engine": "auto"}),
    "sgd, linear, clipped": (
        small_pair,
        {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9}, "lr_schedule": "linear",
         "clip_norm": 1.0, "engine": "eager"},
    ),
    "nadam": (small_pair, {"optimizer": "nadam", "engine": "eager"}),
    "staged, warm-up": (small_pair, {"objective": pvae.beta_vae(Linear(9)), "engine": "staged"}),
    "dreg, cosine": (
        small_pair, {"objective": pvae.dreg(3), "lr_schedule": "cosine", "engine": "eager"}
    ),
    "alternating": (small_pair, {"alternate": 2, "engine": "eager"}),
    "until flat": (
        small_pair,
        {"alternate": pvae.Alternate("until-flat", window=2, most=5), "engine": "staged"},
    ),
    "alternating, then joint": (
        small_pair, {"alternate": pvae.Alternate(1, epochs=2), "engine": "eager"}
    ),
    "buffers": (normalised_pair, {"engine": "eager"}),
    "store": (store_pair, {"engine": "eager"}),
    "relax": (bits_pair, {"objective": recipes.relax(hidden=(5,)), "engine": "eager"}),
    "codebook": (averaged_pair, {"engine": "eager"}),
    "codebook, staged": (averaged_pair, {"engine": "staged"}),
    "relax, staged": (bits_pair, {"objective": recipes.relax(hidden=(5,)), "engine": "staged"}),
    "an ELBO of Pyro": (small_pair, {"objective": pyro.infer.Trace_ELBO(), "engine": "eager"}),
}  # fmt: skip


def fitted(folder: Path, make, *, valid: bool = True, **options):
    model, guide = make()
    held_out = data(30)[23:] if valid else None
    settings = {"epochs": 4, "batch_size": 6, "lr": 1e-2, "checkpoint_every": "1 step"} | options
    return pvae.fit(
        model, guide, data(), valid=held_out, run_dir=folder, progress=False, **settings
    )


def end(run) -> tuple[bytes, list[dict[str, float]], tuple]:
    """What has to be the same: parameters, history without its times, how it ended."""
    content = (run.run_dir / "checkpoints/best/tensors.safetensors").read_bytes()
    lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.history
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in run.history]
    return content, rows, (run.best_epoch, run.stopped)


@pytest.mark.parametrize("name", CASES)
def test_interrupted_anywhere_it_ends_with_the_same_bytes(name, tmp_path, monkeypatch):
    """At once, within an epoch, at its end, in the last step before the end."""
    make, options = CASES[name]
    if name == "auto":  # stage, whatever the times say
        monkeypatch.setattr(Auto, "_staging_pays", -1.0)
    whole = end(fitted(tmp_path / "whole", make, **options))
    deaths = (1, 6, 8, 15) if options["engine"] == "eager" else (2, 7)  # tracing takes long
    folder = tmp_path / "killed"
    for step in deaths:
        with dying_after(step):
            fitted(folder, make, resume=True, **options)
    found = end(fitted(folder, make, resume=True, **options))
    assert found[1] == whole[1]
    assert found == whole


def test_a_wrong_resume_is_caught(tmp_path, monkeypatch):
    """Without the optimiser's state, or a batch too far, the bytes are others."""
    whole = end(fitted(tmp_path / "whole", small_pair, engine="eager"))
    unpack = loop.unpack

    def forgetful(saved, state, problems, folder):
        found = unpack(saved, state, problems, folder)
        problems["joint"].optimizer.state.clear()
        return found

    place_of = loop.Place.of

    def shifted(content):
        place = place_of(content)
        place.step += 1
        return place

    for number, (name, wrong) in enumerate(
        {"unpack": forgetful, "Place": type("P", (), {"of": staticmethod(shifted)})}.items()
    ):
        folder = tmp_path / str(number)
        die_and_leave(folder)
        with monkeypatch.context() as context:
            context.setattr(loop, name, wrong)
            assert end(resumed(folder))[0] != whole[0]


def die_and_leave(folder: Path, step: int = 7, **options) -> None:
    with dying_after(step):
        fitted(folder, small_pair, engine="eager", **options)


def resumed(folder: Path, **options):
    return fitted(folder, small_pair, engine="eager", resume=True, **options)


def test_checkpoints_change_nothing(tmp_path):
    ends = [
        end(fitted(tmp_path / str(k), small_pair, engine="eager", checkpoint_every=every))
        for k, every in enumerate([None, "1 step", "2 epochs", "0.0001 minutes"])
    ]
    assert all(each == ends[0] for each in ends)


def test_early_stopping_goes_on_counting(tmp_path):
    options = {"epochs": 60, "patience": 3, "lr": 0.1, "checkpoint_every": "1 epoch"}
    whole = fitted(tmp_path / "whole", small_pair, engine="eager", **options)
    assert whole.stopped == "patience"
    steps = 4 * (whole.best_epoch + 2)  # two of the three epochs are over
    die_and_leave(tmp_path / "killed", steps, **options)
    assert end(resumed(tmp_path / "killed", **options)) == end(whole)


def test_a_torn_line_of_the_metrics_is_mended(tmp_path):
    whole = end(fitted(tmp_path / "whole", small_pair, engine="eager"))
    die_and_leave(tmp_path / "killed")
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "bou')
    assert end(resumed(tmp_path / "killed")) == whole


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path):
    whole = end(fitted(tmp_path / "whole", small_pair, engine="eager"))
    die_and_leave(tmp_path / "killed")
    path = tmp_path / "killed/checkpoints/step-00000007/tensors.safetensors"
    spoilt = path.read_bytes()[:-1]
    path.write_bytes(spoilt)
    with pytest.warns(UserWarning, match="step-00000007/tensors.safetensors is damaged"):
        assert end(resumed(tmp_path / "killed")) == whole
    kept = tmp_path / "killed/checkpoints/step-00000007.damaged-1/tensors.safetensors"
    assert kept.read_bytes() == spoilt


def test_more_epochs_are_those_of_a_longer_run(tmp_path):
    longer = end(fitted(tmp_path / "longer", small_pair, engine="eager", epochs=6))
    fitted(tmp_path / "run", small_pair, engine="eager", epochs=4)
    assert end(resumed(tmp_path / "run", epochs=6)) == longer
    with pytest.raises(RunError, match="has done 6 epochs already"):
        resumed(tmp_path / "run", epochs=5)


def test_a_finished_run_takes_no_step(tmp_path, monkeypatch):
    run = fitted(tmp_path / "run", small_pair, engine="eager")
    before = end(run)
    monkeypatch.setattr(loop.Loop, "_step", None)
    again = resumed(tmp_path / "run")
    assert end(again) == before
    assert again.engine == run.engine
    assert again.seconds == pytest.approx(run.seconds, abs=1.0)


def test_without_a_checkpoint_it_begins(tmp_path):
    whole = end(fitted(tmp_path / "whole", small_pair, engine="eager"))
    assert end(resumed(tmp_path / "new")) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, r"lr was \[0.01\] and is \[0.5\]"),
        ({"batch_size": 5}, "batch_size was 6 and is 5"),
        ({"objective": pvae.stl()}, "objective was 'Objective"),
        ({"seed": 3, "clip_norm": 2.0}, "clip_norm was None and is 2.0; seed was 0 and is 3"),
        ({"valid": False}, "valid was '[0-9a-f]{20,}"),
        ({"alternate": 2}, "alternate was None and is 'Alternate"),
        ({"valid_every": 2}, "valid_every was None and is 2"),
        ({"optimizer": "sgd"}, r"optimizer was \['Adam'\] and is \['SGD'\]"),
    ],
)
def test_another_configuration_is_refused_with_the_difference(tmp_path, changes, message):
    if not (tmp_path / "run").exists():
        fitted(tmp_path / "run", small_pair, engine="eager", epochs=1)
    with pytest.raises(RunError, match=message):
        resumed(tmp_path / "run", epochs=1, **changes)


def test_other_data_and_another_pair_are_refused(tmp_path):
    fitted(tmp_path / "run", small_pair, engine="eager", epochs=1)
    options = {"epochs": 1, "batch_size": 6, "lr": 1e-2, "engine": "eager", "progress": False}
    options |= {"run_dir": tmp_path / "run", "resume": True, "valid": data(30)[23:]}
    with pytest.raises(RunError, match="data was '[0-9a-f]+ *"):
        pvae.fit(*small_pair(), data() + 1, **options)
    torch.manual_seed(0)
    model = VAE(4, z_dim=2, hidden=(7,), likelihood="gaussian")
    with pytest.raises(
        RunError, match=r"parameters\.model\.decoder\.0\.weight was \[5, 2\] and is \[7, 2\]"
    ):
        pvae.fit(model, Gaussian(4, model.latents, hidden=(5,)), data(), **options)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    checkpoints.write_checkpoint(tmp_path / "checkpoints", 3, {"a": torch.zeros(1)}, {})
    with pytest.raises(RunError, match="step-00000003 is no checkpoint of a training"):
        resumed(tmp_path)


def test_a_run_is_not_overwritten(tmp_path):
    fitted(tmp_path / "run", small_pair, engine="eager", epochs=1)
    with pytest.raises(RunError, match="holds a run already"):
        fitted(tmp_path / "run", small_pair, engine="eager", epochs=1)


def test_another_machine_is_a_warning(tmp_path, monkeypatch):
    fitted(tmp_path / "run", small_pair, engine="eager", epochs=1)
    monkeypatch.setattr(training, "environment", lambda device: {"torch": "9.9"})
    with pytest.warns(UserWarning, match="goes on elsewhere than it began .torch was .* is 9.9"):
        resumed(tmp_path / "run", epochs=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint_every": "often"}, "got 'often'"),
        ({"checkpoint_every": "0 steps"}, "got '0 steps'"),
        ({"checkpoint_every": "1.5 epochs"}, "got '1.5 epochs'"),
        ({"keep_checkpoints": 0}, "at least 1, got 0"),
        ({"on_nan": "ignore"}, "'skip' or 'rollback', got 'ignore'"),
    ],
)
def test_options_that_are_refused(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        fitted(tmp_path / "run", small_pair, **options)
    assert not (tmp_path / "run").exists()
    with pytest.raises(OptionError, match="pass run_dir="):
        pvae.fit(*small_pair(), data(), resume=True)


def test_how_often_is_read():
    assert as_every("100 steps") == Every(100, "step")
    assert as_every("1epoch") == Every(1, "epoch")
    assert as_every("2.5 minutes") == Every(2.5, "minute")
    assert as_every("none") is as_every(None) is None


# --- signals and locks ---------------------------------------------------------------------------


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch):
    """Do something within a step; Python's own handlers, whatever the shell that started us set."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def arrange(step: int, action) -> None:
        take = loop.Loop._take

        def acting(each, index):
            if each.place.step == step:
                action()
            return take(each, index)

        monkeypatch.setattr(loop.Loop, "_take", acting)

    yield arrange
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_saves_after_the_step_at_hand(tmp_path, at_step, number, expected, monkeypatch):
    whole = end(fitted(tmp_path / "whole", small_pair, engine="eager"))
    handler = signal.getsignal(number)
    with monkeypatch.context():
        at_step(9, lambda: os.kill(os.getpid(), number))
        with pytest.raises(expected) as caught:
            fitted(tmp_path / "run", small_pair, engine="eager", checkpoint_every="1 epoch")
    if number == signal.SIGTERM:
        assert caught.value.code == 143
    assert signal.getsignal(number) is handler
    assert checkpoints.steps(tmp_path / "run/checkpoints")[-1].name == "step-00000010"
    monkeypatch.undo()
    assert end(resumed(tmp_path / "run", checkpoint_every="1 epoch")) == whole


def test_a_signal_during_validation_saves_too(tmp_path, monkeypatch, at_step):
    whole = end(fitted(tmp_path / "whole", small_pair, engine="eager"))
    validate = loop.Loop._validate

    def signalled(each):
        os.kill(os.getpid(), signal.SIGINT)
        return validate(each)

    monkeypatch.setattr(loop.Loop, "_validate", signalled)
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "run", small_pair, engine="eager", checkpoint_every="3 epochs")
    assert checkpoints.steps(tmp_path / "run/checkpoints")[-1].name == "step-00000004"
    monkeypatch.undo()
    assert end(resumed(tmp_path / "run", checkpoint_every="3 epochs")) == whole


def test_a_signal_in_the_last_step_ends_the_process_when_all_is_written(tmp_path, at_step):
    whole = end(fitted(tmp_path / "whole", small_pair, engine="eager", valid=False))
    at_step(15, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        fitted(tmp_path / "run", small_pair, engine="eager", valid=False)
    assert end(resumed(tmp_path / "run", valid=False)) == whole


def test_a_second_signal_leaves_at_once(tmp_path, at_step):
    after = []

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        after.append("went on")

    at_step(9, twice)
    with pytest.raises(SystemExit, match="143"):
        fitted(tmp_path / "run", small_pair, engine="eager", checkpoint_every="1 epoch")
    assert after == []
    assert checkpoints.steps(tmp_path / "run/checkpoints")[-1].name == "step-00000008"


def test_a_folder_at_work_is_refused(tmp_path):
    refused: list[Exception] = []

    def other() -> None:
        try:
            resumed(tmp_path)
        except RunError as error:
            refused.append(error)

    with locked(tmp_path), locked(tmp_path, again=True):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another process is at work in" in str(refused[0])
    resumed(tmp_path, epochs=1)


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", *WORDS, "--epochs", "1", "--run-dir", "run"]
    assert main(words) == 0
    command = [sys.executable, "-S", "-c", HOLDER, "run/.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert main(["train", "--resume", "run"]) == 66
        assert "another process is at work in run" in capsys.readouterr().err
        process.kill()
    assert main(["train", "--resume", "run"]) == 0


# --- not a number --------------------------------------------------------------------------------


class Poisoned(nn.Module):
    """Gives no number to a datum whose first feature is large."""

    latents = {"z": (2,)}

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            scale = torch.where(x[:, :1] > 50, torch.nan, 1.0)
            pyro.sample(
                "x", dist.Normal(self.net(z), scale, validate_args=False).to_event(1), obs=x
            )


def poisoned_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Poisoned()
    return model, Gaussian(4, model.latents, hidden=(5,))


@pytest.mark.parametrize("engine", ["eager", "staged"])
def test_skipped_steps_move_nothing_and_count_in_no_mean(tmp_path, monkeypatch, engine):
    x = data()
    x[3, 0] = 100.0
    options = {"epochs": 3, "batch_size": 6, "engine": engine, "progress": False}
    with pytest.raises(NonFiniteError, match="epoch 1, step"):
        pvae.fit(*poisoned_pair(), x, **options)
    with pytest.warns(UserWarning, match="left out: epoch 1, step"):
        run = pvae.fit(*poisoned_pair(), x, on_nan="skip", **options)
    assert all(-60 < row["bound"] < 0 for row in run.history)
    assert all(row["left_out"] in (5, 6) for row in run.history)  # the batch of row 3
    assert run.history[-1]["step"] == 12
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


class Masked(Normalised):
    """As far as its batch is finite, a guide; its buffers take in all of it."""

    def forward(self, x: Tensor) -> None:
        super().forward(torch.where(x > 50, torch.inf, x))


@pytest.mark.parametrize("engine", ["eager", "staged"])
def test_skipped_steps_leave_buffers_as_they_were(engine):
    x = data()
    x[20, 0] = 100.0  # the pair is looked at on the first rows
    torch.manual_seed(0)
    model, guide = poisoned_pair()[0], Masked()
    options = {"epochs": 2, "batch_size": 6, "engine": engine, "progress": False}
    with pytest.warns(UserWarning, match="left out: epoch 1, step"):
        run = pvae.fit(model, guide, x, valid=data(30)[23:], on_nan="skip", **options)
    assert all(bool(torch.isfinite(buffer).all()) for buffer in guide.buffers())
    assert all(math.isfinite(row["valid_bound"]) for row in run.history)


def test_an_epoch_of_which_nothing_was_taken_has_no_bound():
    x = data()
    x[3, 0] = 100.0
    options = {"epochs": 2, "batch_size": len(x), "engine": "eager", "progress": False}
    with pytest.warns(UserWarning, match="left out"):
        run = pvae.fit(*poisoned_pair(), x, on_nan="skip", **options)
    assert [row["left_out"] for row in run.history] == [len(x)] * 2
    assert all(math.isnan(row["bound"]) for row in run.history)


# --- the command line ----------------------------------------------------------------------------

WORDS = ["factor-analysis", "--epochs", "3", "--model.z_dim", "2", "--guide.hidden", "[4]",
         "--engine", "eager"]  # fmt: skip


@pytest.mark.parametrize("game", [(), ("--game", "avb")])
def test_what_is_refused_of_a_run_is_not_written_into_it(tmp_path, monkeypatch, game):
    monkeypatch.chdir(tmp_path)
    words = ["vae", *game, "--epochs", "2", "--model.hidden", "[4]", "--run-dir", "run"]
    assert main(["train", *words]) == 0
    written = Path("run/config.yaml").read_bytes()
    for option, value in (("epochs", "1"), ("epochs", "0"), ("keep_checkpoints", "0")):
        assert main(["train", "--resume", "run", f"--{option}", value]) in (2, 66)
        assert Path("run/config.yaml").read_bytes() == written
    assert main(["train", "--resume", "run"]) == 0


def test_the_command_line_resumes(tmp_path, monkeypatch, at_step, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *WORDS, "--run-dir", "whole"]) == 0
    with monkeypatch.context() as context:
        take = loop.Loop._take

        def signalled(each, index):
            if each.place.step == 30:
                os.kill(os.getpid(), signal.SIGINT)
            return take(each, index)

        context.setattr(loop.Loop, "_take", signalled)
        assert main(["train", *WORDS, "--run-dir", "run"]) == 130
    errors = capsys.readouterr().err.splitlines()
    assert errors[-2] == "pvae: step-00000031 is saved; go on by: pvae train --resume run"
    assert errors[-1] == "pvae: interrupted"
    with pytest.warns(UserWarning, match="run was interrupted in epoch 2"):
        assert pvae.load("run").stopped == "interrupted"
    for words, message in {
        ("--lr", "0.5"): "lr was 0.002 and is 0.5",
        ("--guide.hidden", "[5]"): "guide_options.hidden was [4] and is [5]",
        ("--data", "digits", "--binarize", "fixed"): "binarize was None and is 'fixed'",
        ("vae",): "model was 'factor_analysis' and is 'vae'",
        ("--run-dir", "other"): "leave --run-dir out",
    }.items():
        assert main(["train", "--resume", "run", *words]) in (2, 66)
        assert message in capsys.readouterr().err
    assert main(["train", "--resume", "run", "--engine", "eager"]) == 0
    name = "checkpoints/best/tensors.safetensors"
    assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()
    capsys.readouterr()
    assert main(["train", "--resume", "run"]) == 0
    assert "run was finished already" in capsys.readouterr().out
    assert main(["train", "--resume", "gone"]) == 66
    assert main(["train", *WORDS, "--run-dir", "run"]) == 66
    assert "go on with it by --resume" in capsys.readouterr().err
