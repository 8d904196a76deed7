"""The adversarial loop and its games: who moves, who rests, and what is learned."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import pvae
from pvae.adversarial import Game, Moves, Player, _collapse, _step, play
from pvae.checkpoints import load_tensors
from pvae.convolutions import ConvolutionalEncoder
from pvae.engine import build_optimizer
from pvae.errors import NonFiniteError, OptionError, ProgramError
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
    with torch.no_grad():
        model.decoder.head[0].weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="epoch 1: .*generator.* is not finite"):
        play(gan(model, discriminator), images(), epochs=1, batch_size=8, progress=False)


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
    assert (
        "same of everything"
        in _collapse(healthy | {"logit_spread": 0.001})["discriminator is mute"]
    )
    assert "collapsed on few" in _collapse(healthy | {"sample_spread": 0.05})["samples are alike"]


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
        play(avb(model, guide, ratio, lr=lr), x, epochs=10, batch_size=512, progress=False)
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
