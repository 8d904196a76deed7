"""The adversarial loop and its games: who moves, who rests, and what is learned."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import pvae
from pvae.adversarial import Game, Moves, Player, _collapse, _is_spreading, _step, play
from pvae.checkpoints import load_tensors
from pvae.convolutions import ConvolutionalEncoder
from pvae.engine import build_optimizer
from pvae.errors import NonFiniteError, OptionError, ProgramError, RunError
from pvae.games import _gates, adversarial_autoencoder, avb, gan, vae_gan
from pvae.guides.conv import Conv as ConvGuide
from pvae.guides.gaussian import Gaussian
from pvae.models.conv import Conv
from pvae.models.vae import VAE
from pvae.networks import MLP


def images(size=32):
    return torch.rand(size, 16, generator=torch.Generator().manual_seed(0))


def trio():
    torch.manual_seed(2)
    model = Conv(16, z_dim=2, channels=(3,), hidden=0)
    guide = ConvGuide(16, model.latents, channels=(3,), hidden=0)
    return model, guide, ConvolutionalEncoder(model.shape, 1, (3,))


def own_gradients(game: Game, x: Tensor) -> dict[str, list[Tensor]]:
    moves = game.moves(x)
    return {
        player.name: torch.autograd.grad(
            moves.losses[player.name], list(player.parameters), retain_graph=True
        )
        for player in game.players
    }


# --- the VAE-GAN of Larsen et al. ----------------------------------------------------------------


def by_hand(model, guide, discriminator, x, gamma, beta):
    """The three losses of the paper, each with the others' parameters detached by hand."""
    torch.manual_seed(5)
    posterior = guide.posterior(x)["z"]
    z_q = posterior.rsample()
    z_p = model.latent_prior().sample((len(x),))

    def frozen(module):
        return {n: p.detach() for n, p in module.named_parameters()}

    call = torch.func.functional_call

    class Means(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, z):
            return self.inner.decode(z).mean

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = discriminator

        def forward(self, y):
            hidden = self.inner.features(y)
            return hidden, self.inner.output(hidden)[..., 0]

    means, hidden = Means(), Hidden()
    still_means, still_hidden = (lambda z: call(means, frozen(means), z)), (
        lambda y: call(hidden, frozen(hidden), y)
    )  # fmt: skip
    kl = torch.distributions.kl_divergence(posterior, model.latent_prior()).mean()
    d_x = still_hidden(x)[0]
    distance = 0.5 * (d_x - still_hidden(still_means(z_q))[0]).square().sum(-1).mean()
    encoder = torch.autograd.grad(beta * kl + distance, list(guide.parameters()))
    x_q, x_p = means(z_q.detach()), means(z_p)
    distance = 0.5 * (d_x - still_hidden(x_q)[0]).square().sum(-1).mean()
    fooled = softplus(-torch.cat([still_hidden(x_q)[1], still_hidden(x_p)[1]])).mean()
    decoder = torch.autograd.grad(gamma * distance + fooled, list(model.parameters()))
    x_q, x_p = x_q.detach(), x_p.detach()
    told = softplus(-hidden(x)[1]).mean()
    told = told + softplus(torch.cat([hidden(x_q)[1], hidden(x_p)[1]])).mean()
    return encoder, decoder, torch.autograd.grad(told, list(discriminator.parameters()))


def test_each_loss_reaches_its_own_parameters_and_no_others():
    model, guide, discriminator = trio()
    x = images()
    expected = by_hand(model, guide, discriminator, x, 0.3, 0.7)
    torch.manual_seed(5)
    game = vae_gan(model, guide, discriminator, gamma=0.3, beta=0.7, margin=None)
    found = own_gradients(game, x)
    for name, truth in zip(("encoder", "decoder", "discriminator"), expected, strict=True):
        for ours, theirs in zip(found[name], truth, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6), name


def test_a_loss_that_leaks_into_the_discriminator_is_caught():
    """One backward pass of the sum, as a single optimiser would have it, is another gradient."""
    model, guide, discriminator = trio()
    x = images()
    torch.manual_seed(5)
    moves = vae_gan(model, guide, discriminator, margin=None).moves(x)
    summed = torch.autograd.grad(sum(moves.losses.values()), list(discriminator.parameters()))
    right = by_hand(model, guide, discriminator, x, 0.02, 1.0)[2]
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(summed, right, strict=True))


@pytest.mark.parametrize(
    ("on_data", "on_samples", "expected"),
    [(0.68, 0.68, (1, 1)), (0.1, 0.6, (0, 1)), (0.6, 0.1, (0, 1)), (1.2, 0.6, (1, 0)),
     (0.6, 1.2, (1, 0)), (0.1, 1.2, (1, 1))],
)  # fmt: skip
def test_the_gates_let_the_weaker_side_move(on_data, on_samples, expected):
    flags = _gates(torch.tensor(on_data), torch.tensor(on_samples), 0.68, 0.4)
    assert (float(flags["discriminator"]), float(flags["decoder"])) == expected


def test_a_player_at_rest_does_not_move_even_by_momentum():
    weights = {name: nn.Parameter(torch.ones(3)) for name in ("left", "right")}
    flag = torch.tensor(1.0)
    players = tuple(Player(name, [weight]) for name, weight in weights.items())
    game = Game(
        players,
        lambda x: Moves({n: w.square().sum() for n, w in weights.items()}, active={"left": flag}),
    )
    optimizers = {p.name: build_optimizer("adam", list(p.parameters), lr=0.1) for p in players}
    _step(game, optimizers, None)
    assert (weights["left"] < 1).all()
    kept = weights["left"].detach().clone()
    flag.zero_()
    _step(game, optimizers, None)
    assert torch.equal(weights["left"], kept)
    assert (weights["right"] < kept).all()


def test_players_may_not_share_parameters():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(OptionError, match="share a parameter"):
        Game((Player("a", [weight]), Player("b", [weight])), lambda x: Moves({}))


# --- the loop ------------------------------------------------------------------------------------


def test_a_run_depends_on_its_seed_alone_and_leaves_a_folder(tmp_path, capsys):
    found = []
    for seed in (0, 0, 1):
        model, guide, discriminator = trio()
        torch.rand(3)
        state = torch.get_rng_state()
        game = vae_gan(model, guide, discriminator)
        folder = tmp_path / str(len(found))
        contest = play(game, images(), epochs=2, batch_size=8, seed=seed, run_dir=folder)
        assert torch.equal(state, torch.get_rng_state())
        found.append([{k: v for k, v in r.items() if k != "seconds"} for r in contest.history])
    assert found[0] == found[1]
    assert found[0] != found[2]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    tensors, _ = load_tensors(folder / "checkpoints" / "best")
    assert torch.equal(tensors["model.decoder.head.0.weight"], model.decoder.head[0].weight)
    assert "accuracy" in capsys.readouterr().err


def test_options_programs_and_numbers_that_cannot_be(tmp_path):
    model, guide, discriminator = trio()
    with pytest.raises(OptionError, match="batch_size at least 2"):
        play(gan(model, discriminator), images(), batch_size=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot be written"):
        play(gan(model, discriminator), images(), run_dir=tmp_path / "file" / "x")
    with pytest.raises(ProgramError, match="has no features"):
        vae_gan(model, guide, MLP(16, 1))
    with pytest.raises(ProgramError, match="has no latent_prior"):
        gan(discriminator, discriminator)
    with pytest.raises(OptionError, match="the data have no image_shape"):
        gan(model)
    with pytest.raises(OptionError, match="needs a discriminator, or x_dim"):
        avb(model, guide)
    with torch.no_grad():
        model.decoder.head[0].weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="epoch 1: .*generator.* is not finite"):
        play(gan(model, discriminator), images(), epochs=1, batch_size=8, progress=False)


def test_programs_that_a_game_cannot_use_are_named():
    model, guide, discriminator = trio()
    x = images(8)

    class Sites(nn.Linear):
        """A guide that gives sites, as a derived one does."""

        def forward(self, x):
            return {"z": super().forward(x)}

    with pytest.raises(ProgramError, match="Sites gives no codes"):
        adversarial_autoencoder(model, Sites(16, 2)).moves(x)
    student = torch.distributions.Independent(torch.distributions.StudentT(torch.ones(8, 2)), 1)
    guide.posterior = lambda x: {"z": student}
    with pytest.raises(ProgramError, match="not known in closed form"):
        vae_gan(model, guide, discriminator).moves(x)
    guide.posterior = lambda x: {"z": student, "w": student}
    with pytest.raises(ProgramError, match="one latent site, and the guide has z, w"):
        avb(model, guide, x_dim=16).moves(x)
    model.decode = lambda z: object()
    with pytest.raises(ProgramError, match="has no mean of p"):
        gan(model, discriminator).moves(x)


def test_discriminators_are_made_for_the_data_where_none_is_given():
    model, guide, _ = trio()
    x = torch.bernoulli(images(8))
    for game in (
        gan(model, image_shape=(4, 4), channels=(3,)),
        vae_gan(model, guide, image_shape=(4, 4), channels=(3,), spectral=False),
        adversarial_autoencoder(model, guide, hidden=(5,)),
        avb(model, guide, x_dim=16, hidden=(5,)),
    ):
        assert all(torch.isfinite(loss) for loss in game.moves(x).losses.values())
        assert game.on_means is (game.players[-2].average > 0)


def test_a_collapse_of_either_side_is_said_in_one_line_once(capsys):
    class Stubborn(nn.Module):
        """Tells everything, and never learns."""

        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            is_data = (x == x.round()).all(-1, keepdim=True)
            return (2 * is_data.float() - 1) * 9 + 0 * self.unused

    torch.manual_seed(0)
    bits = torch.bernoulli(images())
    contest = play(gan(VAE(16, z_dim=2), Stubborn()), bits, epochs=3, batch_size=8)
    said = [line for line in capsys.readouterr().err.splitlines() if "tells 100%" in line]
    assert len(said) == 1
    assert any("tells 100%" in text for text in contest.collapsed)
    healthy = {"epoch": 1.0, "accuracy": 0.7, "logit_spread": 1.0, "sample_spread": 0.9}
    assert not _collapse(healthy)
    assert not play(gan(VAE(16, z_dim=2), Stubborn()), bits, epochs=1, progress=False).collapsed
    few = [{"sample_spread": 0.05}, {"sample_spread": 0.2}]
    assert _is_spreading(few)  # an untrained generator is no collapsed one
    assert not _is_spreading(few[::-1])
    assert (
        "same of everything"
        in _collapse(healthy | {"logit_spread": 0.001})["discriminator is mute"]
    )
    assert "collapsed on few" in _collapse(healthy | {"sample_spread": 0.05})["samples are alike"]


class Stop(Exception):
    """What ends a training in a test."""


def stopping(after: int):
    """A preprocess that lets so many batches through."""
    calls = iter(range(after))

    def one(x: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise Stop
        return x

    return one


def test_an_interrupted_game_ends_with_the_bytes_of_one_that_was_not(tmp_path):
    """Stopped within an epoch, at the end of one, and thrice; averages and sums are kept too."""
    options = {"epochs": 3, "batch_size": 8, "checkpoint_every": "1 step", "progress": False}

    def start(folder: str, **changed: Any):
        model, guide, discriminator = trio()
        for layer in (discriminator.body[0], discriminator.output):
            torch.nn.utils.parametrizations.spectral_norm(layer)  # its buffers change each step
        game = vae_gan(model, guide, discriminator, average=0.9)
        return play(game, images(), run_dir=tmp_path / folder, **(options | changed))

    whole = start("whole")
    truth = load_tensors(tmp_path / "whole" / "checkpoints" / "best")[0]
    for number, stops in enumerate(((6,), (4,), (1, 2, 3))):
        for k, after in enumerate(stops):
            with pytest.raises(Stop):
                start(f"run{number}", preprocess=stopping(after), resume=k > 0)
        contest = start(f"run{number}", resume=True)
        found = load_tensors(tmp_path / f"run{number}" / "checkpoints" / "best")[0]
        assert found.keys() == truth.keys()
        assert all(torch.equal(found[name], truth[name]) for name in truth)
        for ours, theirs in zip(contest.history, whole.history, strict=True):
            assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_a_game_is_resumed_as_it_was_or_not_at_all(tmp_path):
    model, guide, discriminator = trio()
    options = {"epochs": 1, "batch_size": 8, "progress": False, "run_dir": tmp_path}
    play(vae_gan(model, guide, discriminator), images(), **options)
    with pytest.raises(RunError, match="holds a run already"):
        play(vae_gan(model, guide, discriminator), images(), **options)
    with pytest.raises(RunError, match=r"decoder.lr was 0.001 and is 0.01"):
        play(vae_gan(model, guide, discriminator, lr=0.01), images(), resume=True, **options)
    with pytest.raises(RunError, match="data was"):
        play(vae_gan(model, guide, discriminator), images(24), resume=True, **options)
    with pytest.raises(OptionError, match="pass run_dir="):
        play(vae_gan(model, guide, discriminator), images(), resume=True)
    assert len(play(vae_gan(*trio()), images(), resume=True, **options).history) == 1


def test_a_signal_saves_the_step_at_hand(tmp_path):
    def interrupted(x: Tensor) -> Tensor:
        if not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), signal.SIGINT)
        return x

    options = {"epochs": 2, "batch_size": 8, "progress": False, "run_dir": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        play(vae_gan(*trio()), images(), preprocess=interrupted, **options)
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()
    game = vae_gan(*trio())
    resumed = play(game, images(), preprocess=interrupted, resume=True, **options)
    assert [row["epoch"] for row in resumed.history] == [1, 2]


def test_a_signal_in_the_last_step_ends_the_process_when_all_is_written(tmp_path):
    def interrupted(x: Tensor) -> Tensor:
        seen.append(x)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return x

    seen: list[Tensor] = []
    options = {"epochs": 1, "batch_size": 8, "progress": False, "run_dir": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        play(vae_gan(*trio()), images(), preprocess=interrupted, **options)
    assert (tmp_path / "run" / "checkpoints" / "best").is_dir()
    assert len(seen) == 4


def test_a_damaged_checkpoint_is_set_aside_and_never_kept_instead_of_a_good_one(tmp_path):
    options = {"epochs": 2, "batch_size": 8, "progress": False, "run_dir": tmp_path}
    options |= {"checkpoint_every": "1 step", "keep_checkpoints": 2}
    with pytest.raises(Stop):
        play(vae_gan(*trio()), images(), preprocess=stopping(6), **options)
    file = tmp_path / "checkpoints" / "step-00000006" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    options |= {"resume": True, "keep_checkpoints": 1, "checkpoint_every": "100 steps"}
    with pytest.warns(UserWarning, match="step-00000006/tensors.safetensors is damaged"):
        play(vae_gan(*trio()), images(), **options)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-00000006.damaged-1", "step-00000008"]


# --- averages and trackers -----------------------------------------------------------------------


def falling(average: float) -> tuple[nn.Parameter, Game]:
    """One parameter that falls by 1 each step, so that its average is known."""
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    options: Any = {"optimizer": "sgd", "lr": 1.0, "optimizer_options": {}, "average": average}
    return weight, Game((Player("one", [weight], **options),), lambda x: Moves({"one": weight}))


def test_a_player_ends_with_the_moving_average_of_its_parameters():
    weight, game = falling(0.6)
    play(game, images(40), epochs=2, batch_size=8, progress=False)
    mean = 0.0
    for step in range(1, 11):
        decay = min(0.6, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * -step
    assert float(weight.detach()) == pytest.approx(mean, abs=1e-12)
    assert mean > -9.0  # not the last step's
    weight, game = falling(0.0)
    play(game, images(40), epochs=2, batch_size=8, progress=False)
    assert float(weight.detach()) == -10.0
    with pytest.raises(OptionError, match="at least 0 and below 1"):
        falling(1.0)


def test_trackers_are_shown_the_average_and_change_nothing():
    said: list[float] = []

    class Notes:
        def start(self, run):
            said.append(float(weight.detach()))

        def epoch(self, run, row):
            assert run.history[-1] is row
            said.append(float(weight.detach()))

        def finish(self, run):
            said.append(run.best_epoch)

    weight, game = falling(0.6)
    play(game, images(40), epochs=2, batch_size=8, progress=False, trackers=[Notes()])
    ended = float(weight.detach())
    assert said[0] == 0.0
    assert -5.0 < said[1] < -2.0  # after five steps
    assert said[2:] == [ended, 2]
    weight, game = falling(0.6)
    play(game, images(40), epochs=2, batch_size=8, progress=False)
    assert float(weight.detach()) == ended


# --- what the games learn ------------------------------------------------------------------------


class Affine(nn.Module):
    """``x = shift + scale z`` as a model: the smallest generator."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))

    def latent_prior(self):
        return torch.distributions.Independent(
            torch.distributions.Normal(torch.zeros(1), torch.ones(1)), 1
        )

    def decode(self, z):
        return torch.distributions.Normal(self.shift + self.scale * z, 1.0)


class Quadratic(nn.Module):
    """Logits ``a + b x + c x^2``: enough to tell two Gaussians at best."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(2, 1)

    def forward(self, x):
        return self.weights(torch.cat([x, x.square()], -1))


def test_a_gan_learns_the_mean_and_deviation_of_a_gaussian():
    torch.manual_seed(0)
    data = 1.0 + 1.5 * torch.randn(4096, 1)
    model = Affine()
    game = gan(model, Quadratic())
    players = tuple(  # plain gradient steps shrink with the gradient, so the game comes to rest
        replace(player, optimizer="sgd", lr=0.1, optimizer_options={}) for player in game.players
    )
    contest = play(replace(game, players=players), data, epochs=25, batch_size=256, progress=False)
    assert float(model.shift.detach()) == pytest.approx(1.0, abs=0.1)
    assert abs(float(model.scale.detach())) == pytest.approx(1.5, abs=0.15)
    assert abs(contest.history[-1]["accuracy"] - 0.5) < 0.05


def test_avb_discriminator_becomes_the_log_ratio_of_posterior_and_prior():
    """With the encoder held, ``T*(x, z) = log q(z | x) - log p(z)``; here it is quadratic in z."""
    torch.manual_seed(0)

    class Ratio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Linear(5, 1)

        def forward(self, both):
            x, z = both.chunk(2, -1)
            return self.weights(torch.cat([x, z, x * z, x * x, z * z], -1))

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def posterior(self, x):
            normal = torch.distributions.Normal(0.5 * x + 0 * self.unused, 0.8)
            return {"z": torch.distributions.Independent(normal, 1)}

    x, guide, ratio = torch.randn(8192, 1), Held(), Ratio()
    model = Affine()
    decode = model.decode
    model.decode = lambda z: torch.distributions.Independent(decode(z), 1)
    for lr in (1e-2, 1e-3):
        game = avb(model, guide, ratio, adaptive=False, lr=lr)
        play(game, x, epochs=10, batch_size=512, progress=False)
    some = x[:500]
    z = guide.posterior(some)["z"].sample()
    truth = guide.posterior(some)["z"].log_prob(z) - model.latent_prior().log_prob(z)
    found = ratio(torch.cat([some, z], -1))[:, 0]
    assert float((found - truth).square().mean().sqrt().detach()) < 0.1
    assert float(truth.std().detach()) > 0.3


def test_an_adversarial_autoencoder_brings_its_codes_to_the_prior():
    torch.manual_seed(0)
    data = torch.bernoulli(torch.rand(2048, 1).expand(-1, 6))
    model = VAE(6, z_dim=1, hidden=(16,))
    guide = Gaussian(6, model.latents, hidden=(16,))
    with torch.no_grad():
        guide.heads["z"].bias[0] = 4.0  # the codes start far from the prior
    before = guide.posterior(data)["z"].mean.mean()
    game = adversarial_autoencoder(model, guide, MLP(1, 1, (16,)), weight=5.0, lr=3e-3)
    contest = play(game, data, epochs=25, batch_size=128, progress=False)
    codes = guide.posterior(data)["z"].sample()
    assert float(before.detach()) > 2.5
    assert abs(float(codes.mean())) < 0.5
    assert 0.5 < float(codes.std()) < 1.6
    assert contest.history[-1]["decoder"] < contest.history[0]["decoder"]


def test_the_trained_decoder_is_a_model_whose_evidence_is_estimated():
    model, guide, discriminator = trio()
    bits = torch.bernoulli(images(6))
    play(vae_gan(model, guide, discriminator), images(), epochs=1, batch_size=8, progress=False)
    evidence = pvae.evidence.annealed(
        model, guide, bits, num_chains=4, num_temperatures=5, num_leapfrog=2
    )
    assert torch.isfinite(evidence.log_evidence).all()


def test_with_adaptive_contrast_a_gaussian_posterior_leaves_nothing_to_learn():
    """A discriminator that says nothing gives the ELBO; contrasted with the prior, no KL at all."""
    torch.manual_seed(0)
    model = VAE(6, z_dim=2, hidden=(8,), likelihood="gaussian").double()
    guide = Gaussian(6, model.latents, hidden=(8,)).double()
    silent = nn.Linear(8, 1).double()
    nn.init.zeros_(silent.weight)
    nn.init.zeros_(silent.bias)
    x = torch.randn(50, 6, dtype=torch.float64)
    found = {}
    for adaptive in (True, False):
        torch.manual_seed(1)
        found[adaptive] = avb(model, guide, silent, adaptive=adaptive).moves(x).watched["bound"]
    torch.manual_seed(1)
    posterior = guide.posterior(x)["z"]
    z = posterior.rsample()
    reconstruction = model.decode(z).log_prob(x)
    kl = posterior.log_prob(z) - model.latent_prior().log_prob(z)
    assert torch.allclose(found[True], (reconstruction - kl).mean(), rtol=0, atol=1e-10)
    assert torch.allclose(found[False], reconstruction.mean(), rtol=0, atol=1e-10)


class Implicit(nn.Module):
    """Draws whose density nobody knows: a network of x and of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.noise = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.slope * x + self.noise * torch.randn_like(x)


def test_an_implicit_posterior_becomes_the_exact_one():
    """``z ~ N(0, 1), x ~ N(z, 1)``: slope and variance of the posterior are one half."""
    torch.manual_seed(0)
    model, guide = Affine(), Implicit()
    model.decode = lambda z: torch.distributions.Independent(torch.distributions.Normal(z, 1.0), 1)
    x = 2**0.5 * torch.randn(4096, 1)
    for lr in (1e-2, 1e-3):
        game = avb(model, guide, x_dim=1, hidden=(16,), num_draws=64, lr=lr)
        play(game, x, epochs=10, batch_size=256, progress=False)
    assert float(guide.slope.detach()) == pytest.approx(0.5, abs=0.03)
    assert float(guide.noise.detach()) ** 2 == pytest.approx(0.5, abs=0.05)
