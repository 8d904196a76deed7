"""Adversarial games over the models and guides that ``pvae.fit`` trains, one short function each.

Each gives a :class:`pvae.adversarial.Game` for :func:`pvae.adversarial.play`. On the command line
(``--game``) a game is a function that returns one: ``model``, ``guide``, ``x_dim`` and
``image_shape`` are given to it where it has arguments so called, all others are options.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.nn.functional import softplus

from pvae.adversarial import Game, Moves, Player
from pvae.convolutions import ConvolutionalEncoder, image_shape_of
from pvae.errors import OptionError, ProgramError
from pvae.networks import MLP

__all__ = ["adversarial_autoencoder", "avb", "gan", "vae_gan"]


def gan(
    model: Any,
    discriminator: Any = None,
    *,
    image_shape: Sequence[int] | None = None,
    channels: Sequence[int] = (16, 32),
    spectral: bool = True,
    average: float = 0.99,
    lr: float = 1e-3,
) -> Game:
    """A generative adversarial network: the means of a model's decoder against a discriminator.

    The generator lowers ``-log D(G(z))`` (the non-saturating loss), the discriminator
    ``-log D(x) - log(1 - D(G(z)))``. Goodfellow et al. (2014).

    Args:
        model: With ``latent_prior()`` and ``decode(z)``, as those in ``models/``.
        discriminator: Rows ``(B, x_dim)`` to logits ``(B, 1)``.
        image_shape: Of the data, for a discriminator that is made here.
        channels: Of the discriminator that is made where none is given, after each halving of
            height and width.
        spectral: Normalise its weights spectrally (Miyato et al. 2018).
        average: Decay of the moving average that the generator ends with; 0 for none.
        lr: Learning rate of both.

    Raises:
        ProgramError: The model lacks a method it is asked by.
        OptionError: There is no discriminator, and the data are no images to make one for.
    """
    _require(model, "latent_prior", "decode")
    judge = discriminator or _of_images("gan", image_shape, channels, spectral=spectral)

    def moves(x: Tensor) -> Moves:
        fake = _means(model, _prior_draws(model, x))
        real_logits, fake_logits = _logits(judge, x, fake)
        losses = {"generator": _is_real(fake_logits).mean()}
        losses["discriminator"] = _is_real(real_logits).mean() + _is_fake(fake_logits).mean()
        return Moves(losses, _watched(real_logits, fake_logits, x, fake))

    players = (_player("generator", model, lr, average), _player("discriminator", judge, lr))
    return Game(players, moves, {"model": model, "discriminator": judge}, on_means=True)


def vae_gan(
    model: Any,
    guide: Any,
    discriminator: Any = None,
    *,
    image_shape: Sequence[int] | None = None,
    channels: Sequence[int] = (16, 32),
    spectral: bool = True,
    gamma: float = 0.05,
    beta: float = 1.0,
    equilibrium: float = 0.68,
    margin: float | None = 0.4,
    average: float = 0.99,
    lr: float = 1e-3,
) -> Game:
    """A VAE whose decoder is a GAN's generator, and whose errors are measured by its discriminator.

    With ``d`` the discriminator's last hidden layer, ``x_q`` the decoder's mean at ``z ~ q(z | x)``
    and ``x_p`` at ``z ~ p(z)``,

        ``L_prior = KL(q(z | x) || p(z))``, ``L_rec = |d(x) - d(x_q)|^2 / 2``,
        ``L_gan = -log D(x) - (log(1 - D(x_q)) + log(1 - D(x_p))) / 2``:

    the encoder lowers ``beta L_prior + L_rec``, the decoder ``gamma L_rec - (log D(x_q) +
    log D(x_p)) / 2``, the discriminator ``L_gan``; nobody else's parameters are moved by any of
    them. Larsen, Sonderby, Larochelle & Winther (2016). The discriminator rests where its loss on
    data or on samples is below ``equilibrium - margin``, the decoder where it is above
    ``equilibrium + margin``; where both would rest, both move.

    Args:
        model: With ``latent_prior()`` and ``decode(z)``, as those in ``models/``.
        guide: With ``posterior(x)``, as those in ``guides/``.
        discriminator: Rows to logits ``(B, 1)``, with ``features(x)`` and ``output(features)``, as
            :class:`pvae.convolutions.ConvolutionalEncoder` has them.
        image_shape: Of the data, for a discriminator that is made here.
        channels: Of the discriminator that is made where none is given, after each halving of
            height and width.
        spectral: Normalise its weights spectrally (Miyato et al. 2018).
        gamma: Weight of the reconstruction in the decoder's loss.
        beta: Weight of the KL in the encoder's loss.
        equilibrium: Nats of a loss at which the two sides are even.
        margin: Nats either way within which both move; ``None``: both always do.
        average: Decay of the moving averages that decoder and encoder end with; 0 for none.
        lr: Learning rate of all three.

    Raises:
        ProgramError: One of the three lacks a method it is asked by.
        OptionError: There is no discriminator, and the data are no images to make one for.
    """
    _require(model, "latent_prior", "decode")
    _require(guide, "posterior")
    judge = discriminator or _of_images("vae_gan", image_shape, channels, spectral=spectral)
    _require(judge, "features", "output")

    def moves(x: Tensor) -> Moves:
        posterior = _only_site(guide.posterior(x))
        from_q = _means(model, posterior.rsample())
        from_p = _means(model, _prior_draws(model, x))
        features = judge.features(torch.cat([x, from_q, from_p]))
        real, near, _ = features.chunk(3)
        real_logits, q_logits, p_logits = judge.output(features).chunk(3)
        fake_logits = torch.cat([q_logits, p_logits])
        on_data, on_samples = _is_real(real_logits).mean(), _is_fake(fake_logits).mean()
        distance = 0.5 * (real - near).square().sum(-1).mean()
        kl = _kl(posterior, model.latent_prior())
        losses = {
            "encoder": beta * kl + distance,
            "decoder": gamma * distance + _is_real(fake_logits).mean(),
            "discriminator": on_data + on_samples,
        }
        watched = _watched(real_logits, p_logits, x, from_p) | {"kl": kl, "distance": distance}
        return Moves(losses, watched, _gates(on_data, on_samples, equilibrium, margin))

    players = (
        _player("encoder", guide, lr, average),
        _player("decoder", model, lr, average),
        _player("discriminator", judge, lr),
    )
    modules = {"model": model, "guide": guide, "discriminator": judge}
    return Game(players, moves, modules, on_means=True)


def adversarial_autoencoder(
    model: Any,
    guide: Any,
    discriminator: Any = None,
    *,
    hidden: Sequence[int] = (200, 200),
    weight: float = 1.0,
    average: float = 0.0,
    lr: float = 1e-3,
) -> Game:
    """An autoencoder whose codes, taken together, are made to look like the prior's.

    The discriminator tells ``z ~ p(z)`` from ``z ~ q(z | x)``, ``x`` from the data; the decoder
    lowers ``-log p(x | z)``, the encoder that and ``-weight log D(z)``. Makhzani et al. (2016).

    Args:
        model: With ``latent_prior()`` and ``decode(z)``.
        guide: With ``posterior(x)``, or any function of x that gives codes ``(B, z_dim)``.
        discriminator: Codes ``(B, z_dim)`` to logits ``(B, 1)``.
        hidden: Width of each hidden layer of the discriminator that is made where none is given.
        weight: Of the game against reconstruction, whose unit is nats.
        average: Decay of the moving averages that decoder and encoder end with; 0 for none.
        lr: Learning rate of all three.

    Raises:
        ProgramError: The model lacks a method it is asked by.
    """
    _require(model, "latent_prior", "decode")
    judge = discriminator or _of_vectors(_code_size(model), hidden)

    def moves(x: Tensor) -> Moves:
        codes, draws = _codes(guide, x), _prior_draws(model, x)
        prior_logits, code_logits = _logits(judge, draws, codes)
        error = -model.decode(codes).log_prob(x).mean()
        losses = {
            "encoder": error + weight * _is_real(code_logits).mean(),
            "decoder": error,
            "discriminator": _is_real(prior_logits).mean() + _is_fake(code_logits).mean(),
        }
        return Moves(losses, _watched(prior_logits, code_logits, draws, codes))

    players = (
        _player("encoder", guide, lr, average),
        _player("decoder", model, lr, average),
        _player("discriminator", judge, lr),
    )
    return Game(players, moves, {"model": model, "guide": guide, "discriminator": judge})


def avb(
    model: Any,
    guide: Any,
    discriminator: Any = None,
    *,
    x_dim: int | None = None,
    hidden: Sequence[int] = (200, 200),
    adaptive: bool = True,
    num_draws: int = 16,
    average: float = 0.0,
    lr: float = 1e-3,
) -> Game:
    """Adversarial variational Bayes: a posterior that can be drawn from but has no density.

    The discriminator T tells ``(x, z ~ q(z | x))`` from ``(x, z ~ r(z | x))``; at its best
    ``T(x, z) = log q(z | x) - log r(z | x)``, so that ``E_q[log p(x, z) - log r(z | x) - T(x, z)]``
    is the ELBO, which encoder and decoder raise. Adaptive contrast takes for r the normal density
    of q's own mean and scale, and shows T standardised z: what T has to learn is q's shape alone.
    Otherwise r is the prior, which T tells from a narrow q too easily to say by how much.
    Mescheder, Nowozin & Geiger (2017), sections 3.1 and 3.3.

    Args:
        model: With ``latent_prior()`` and ``decode(z)``.
        guide: A module that takes x to draws ``(B, z_dim)`` by noise of its own, or one with
            ``posterior(x)``.
        discriminator: ``[x, z]`` side by side ``(B, x_dim + z_dim)`` to T ``(B, 1)``.
        x_dim: Number of features of a datum, for a discriminator that is made here.
        hidden: Width of each hidden layer of the discriminator that is made where none is given.
        adaptive: Whether r is q's normal approximation, not the prior.
        num_draws: From which mean and scale are taken where the posterior does not tell them.
        average: Decay of the moving averages that decoder and encoder end with; 0 for none.
        lr: Learning rate of encoder and decoder; the discriminator's is three times that.

    Raises:
        ProgramError: The model lacks a method it is asked by.
        OptionError: There is neither a discriminator nor ``x_dim``, or there are too few draws.
    """
    _require(model, "latent_prior", "decode")
    if discriminator is None and x_dim is None:
        raise OptionError("avb needs a discriminator, or x_dim to make one: give it either")
    if num_draws < 2:
        raise OptionError(f"a scale takes at least 2 draws, got num_draws={num_draws}")
    judge = discriminator or _of_vectors((x_dim or 0) + _code_size(model), hidden)

    def moves(x: Tensor) -> Moves:
        posterior = _posterior(guide, x)
        codes, draws = _drawn(posterior, guide, x), _prior_draws(model, x)
        shown, others, log_ratio = codes, draws, torch.zeros(())
        if adaptive:
            loc, scale = _moments(posterior, guide, x, num_draws)
            shown, others = (codes - loc) / scale, torch.randn_like(codes)
            log_r = dist.Normal(loc, scale).to_event(1).log_prob(codes)
            log_ratio = log_r - model.latent_prior().log_prob(codes)
        beside = functools.partial(torch.cat, dim=-1)
        posterior_logits, other_logits = _logits(judge, beside([x, shown]), beside([x, others]))
        bound = (model.decode(codes).log_prob(x) - log_ratio - posterior_logits).mean()
        losses = {
            "encoder": -bound,
            "decoder": -bound,
            "discriminator": _is_real(posterior_logits).mean() + _is_fake(other_logits).mean(),
        }
        watched = _watched(posterior_logits, other_logits, draws, codes)
        # A posterior may well be apart from its contrast: telling them is no collapse.
        watched["told_apart"] = watched.pop("accuracy")
        if adaptive:  # of a Gaussian there is nothing more to say
            watched.pop("logit_spread")
        return Moves(losses, watched | {"bound": bound})

    players = (
        _player("encoder", guide, lr, average),
        _player("decoder", model, lr, average),
        _player("discriminator", judge, 3 * lr),
    )
    return Game(players, moves, {"model": model, "guide": guide, "discriminator": judge})


# --- parts ---------------------------------------------------------------------------------------


def _player(name: str, module: Any, lr: float, average: float = 0.0) -> Player:
    own = [p for p in module.parameters() if p.requires_grad]
    return Player(name, own, lr=lr, average=average)


def _of_images(
    game: str, image_shape: Sequence[int] | None, channels: Sequence[int], *, spectral: bool
) -> ConvolutionalEncoder:
    """A convolutional discriminator: rows to logits ``(B, 1)``."""
    if image_shape is None:
        raise OptionError(
            f"the discriminator of {game} looks at images, and the data have no image_shape: take "
            "adversarial_autoencoder or avb, or pass a discriminator of your own"
        )
    shape = image_shape_of(math.prod(image_shape), image_shape)
    return ConvolutionalEncoder(shape, 1, channels, activation="leaky_relu", spectral=spectral)


def _of_vectors(size: int, hidden: Sequence[int]) -> MLP:
    return MLP(size, 1, hidden, activation_name="leaky_relu")


def _code_size(model: Any) -> int:
    return int(math.prod(model.latent_prior().event_shape))


def _require(program: Any, *methods: str) -> None:
    for method in methods:
        if not callable(getattr(program, method, None)):
            raise ProgramError(
                f"{type(program).__name__} has no {method}(), by which this game asks it: see "
                "models/conv.py, guides/conv.py and pvae.convolutions.ConvolutionalEncoder"
            )


def _only_site(posterior: Mapping[str, Any]) -> Any:
    if len(posterior) != 1:
        raise ProgramError(
            f"the game is about one latent site, and the guide has {', '.join(posterior)}: join "
            "them into one"
        )
    return next(iter(posterior.values()))


def _codes(guide: Any, x: Tensor) -> Tensor:
    """Draws ``(B, z_dim)`` of an encoder, differentiable in its parameters."""
    return _drawn(_posterior(guide, x), guide, x)


def _posterior(guide: Any, x: Tensor) -> Any:
    """``q(z | x)`` of an encoder that has one, else ``None``."""
    has_one = callable(getattr(guide, "posterior", None))
    return _only_site(guide.posterior(x)) if has_one else None


def _drawn(posterior: Any, guide: Any, x: Tensor) -> Tensor:
    if posterior is None:
        codes = guide(x)
    else:
        codes = posterior.rsample() if posterior.has_rsample else None
    if not isinstance(codes, Tensor):
        raise ProgramError(
            f"{type(guide).__name__} gives no codes that its parameters can be moved by: take a "
            "guide of one real latent site with posterior(x), such as gaussian or conv"
        )
    return codes


def _moments(posterior: Any, guide: Any, x: Tensor, num_draws: int) -> tuple[Tensor, Tensor]:
    """Mean and scale of an encoder's codes, ``(B, z_dim)`` each, held: known, or of some draws."""
    try:
        loc, scale = posterior.mean.detach(), posterior.stddev.detach()
    except (AttributeError, NotImplementedError):
        with torch.no_grad():
            draws = torch.stack([_drawn(posterior, guide, x) for _ in range(num_draws)])
        loc, scale = draws.mean(0), draws.std(0)
    return loc, scale.clamp_min(1e-6)


def _means(model: Any, z: Tensor) -> Tensor:
    """Means ``(B, x_dim)`` of ``p(x | z)``, differentiable in z."""
    try:
        means: Tensor = model.decode(z).mean
    except (NotImplementedError, AttributeError):
        raise ProgramError(
            f"{type(model).__name__} has no mean of p(x | z) to be shown to a discriminator: take "
            "another likelihood or model, such as conv"
        ) from None
    return means


def _kl(posterior: Any, prior: Any) -> Tensor:
    try:
        return kl_divergence(posterior, prior).mean()
    except NotImplementedError:
        raise ProgramError(
            "the KL divergence of this guide's posterior from this prior is not known in closed "
            "form: take a Gaussian guide (gaussian, conv) and a normal prior"
        ) from None


def _prior_draws(model: Any, x: Tensor) -> Tensor:
    draws: Tensor = model.latent_prior().sample((len(x),))
    return draws


def _logits(discriminator: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """What the discriminator says of both, ``(B,)`` each, in one pass."""
    both = discriminator(torch.cat([real, fake]))[..., 0]
    return both[: len(real)], both[len(real) :]


def _is_real(logits: Tensor) -> Tensor:
    """``-log D``, nats."""
    return softplus(-logits)


def _is_fake(logits: Tensor) -> Tensor:
    """``-log(1 - D)``, nats."""
    return softplus(logits)


def _watched(real: Tensor, fake: Tensor, data: Tensor, samples: Tensor) -> dict[str, Tensor]:
    right = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
    spread = samples.std(0).mean() / data.std(0).mean().clamp_min(1e-12)
    return {
        "accuracy": right,
        "logit_spread": torch.cat([real, fake]).std(),
        "sample_spread": spread,
    }


def _gates(
    on_data: Tensor, on_samples: Tensor, equilibrium: float, margin: float | None
) -> dict[str, Tensor]:
    """Who moves, by the discriminator's losses: 0 or 1 on the device, nothing read from it."""
    if margin is None:
        return {}
    low, high = equilibrium - margin, equilibrium + margin
    ahead = (on_data < low) | (on_samples < low)
    behind = (on_data > high) | (on_samples > high)
    both = ahead & behind
    return {
        "discriminator": (~ahead | both).to(on_data.dtype).detach(),
        "decoder": (~behind | both).to(on_data.dtype).detach(),
    }
