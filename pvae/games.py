"""Adversarial games over the models and guides that ``pvae.fit`` trains, one short function each.

Each gives a :class:`pvae.adversarial.Game` for :func:`pvae.adversarial.play`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.nn.functional import softplus

from pvae.adversarial import Game, Moves, Player
from pvae.errors import ProgramError

__all__ = ["adversarial_autoencoder", "avb", "gan", "vae_gan"]


def gan(model: Any, discriminator: nn.Module, *, lr: float = 1e-3) -> Game:
    """A generative adversarial network: the means of a model's decoder against a discriminator.

    The generator lowers ``-log D(G(z))`` (the non-saturating loss), the discriminator
    ``-log D(x) - log(1 - D(G(z)))``. Goodfellow et al. (2014).

    Args:
        model: With ``latent_prior()`` and ``decode(z)``, as those in ``models/``.
        discriminator: Rows ``(B, x_dim)`` to logits ``(B, 1)``.
        lr: Learning rate of both.
    """
    _require(model, "latent_prior", "decode")

    def moves(x: Tensor) -> Moves:
        fake = model.decode(_prior_draws(model, x)).mean
        real_logits, fake_logits = _logits(discriminator, x, fake)
        losses = {"generator": _is_real(fake_logits).mean()}
        losses["discriminator"] = _is_real(real_logits).mean() + _is_fake(fake_logits).mean()
        return Moves(losses, _watched(real_logits, fake_logits, x, fake))

    players = (_player("generator", model, lr), _player("discriminator", discriminator, lr))
    return Game(players, moves, {"model": model, "discriminator": discriminator})


def vae_gan(
    model: Any,
    guide: Any,
    discriminator: Any,
    *,
    gamma: float = 0.05,
    beta: float = 1.0,
    equilibrium: float = 0.68,
    margin: float | None = 0.4,
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
        gamma: Weight of the reconstruction in the decoder's loss.
        beta: Weight of the KL in the encoder's loss.
        equilibrium: Nats of a loss at which the two sides are even.
        margin: Nats either way within which both move; ``None``: both always do.
        lr: Learning rate of all three.

    Raises:
        ProgramError: One of the three lacks a method it is asked by.
    """
    _require(model, "latent_prior", "decode")
    _require(guide, "posterior")
    _require(discriminator, "features", "output")

    def moves(x: Tensor) -> Moves:
        posterior = _only_site(guide.posterior(x))
        from_q = model.decode(posterior.rsample()).mean
        from_p = model.decode(_prior_draws(model, x)).mean
        features = discriminator.features(torch.cat([x, from_q, from_p]))
        real, near, _ = features.chunk(3)
        real_logits, q_logits, p_logits = discriminator.output(features).chunk(3)
        fake_logits = torch.cat([q_logits, p_logits])
        on_data, on_samples = _is_real(real_logits).mean(), _is_fake(fake_logits).mean()
        distance = 0.5 * (real - near).square().sum(-1).mean()
        kl = kl_divergence(posterior, model.latent_prior()).mean()
        losses = {
            "encoder": beta * kl + distance,
            "decoder": gamma * distance + _is_real(fake_logits).mean(),
            "discriminator": on_data + on_samples,
        }
        watched = _watched(real_logits, p_logits, x, from_p) | {"kl": kl, "distance": distance}
        return Moves(losses, watched, _gates(on_data, on_samples, equilibrium, margin))

    players = (
        _player("encoder", guide, lr),
        _player("decoder", model, lr),
        _player("discriminator", discriminator, lr),
    )
    return Game(players, moves, {"model": model, "guide": guide, "discriminator": discriminator})


def adversarial_autoencoder(
    model: Any, guide: Any, discriminator: nn.Module, *, weight: float = 1.0, lr: float = 1e-3
) -> Game:
    """An autoencoder whose codes, taken together, are made to look like the prior's.

    The discriminator tells ``z ~ p(z)`` from ``z ~ q(z | x)``, ``x`` from the data; the decoder
    lowers ``-log p(x | z)``, the encoder that and ``-weight log D(z)``. Makhzani et al. (2016).

    Args:
        model: With ``latent_prior()`` and ``decode(z)``.
        guide: With ``posterior(x)``, or any function of x that gives codes ``(B, z_dim)``.
        discriminator: Codes ``(B, z_dim)`` to logits ``(B, 1)``.
        weight: Of the game against reconstruction, whose unit is nats.
        lr: Learning rate of all three.
    """
    _require(model, "latent_prior", "decode")

    def moves(x: Tensor) -> Moves:
        codes, draws = _codes(guide, x), _prior_draws(model, x)
        prior_logits, code_logits = _logits(discriminator, draws, codes)
        error = -model.decode(codes).log_prob(x).mean()
        losses = {
            "encoder": error + weight * _is_real(code_logits).mean(),
            "decoder": error,
            "discriminator": _is_real(prior_logits).mean() + _is_fake(code_logits).mean(),
        }
        return Moves(losses, _watched(prior_logits, code_logits, draws, codes))

    players = (
        _player("encoder", guide, lr),
        _player("decoder", model, lr),
        _player("discriminator", discriminator, lr),
    )
    return Game(players, moves, {"model": model, "guide": guide, "discriminator": discriminator})


def avb(model: Any, guide: Any, discriminator: nn.Module, *, lr: float = 1e-3) -> Game:
    """Adversarial variational Bayes: a posterior that can be drawn from but has no density.

    The discriminator T tells ``(x, z ~ q(z | x))`` from ``(x, z ~ p(z))``; at its best
    ``T(x, z) = log q(z | x) - log p(z)``, so that ``E_q[log p(x | z) - T(x, z)]`` is the ELBO,
    which encoder and decoder raise. Mescheder, Nowozin & Geiger (2017).

    Args:
        model: With ``latent_prior()`` and ``decode(z)``.
        guide: A module that takes x to draws ``(B, z_dim)`` by noise of its own, or one with
            ``posterior(x)``.
        discriminator: ``[x, z]`` side by side ``(B, x_dim + z_dim)`` to T ``(B, 1)``.
        lr: Learning rate of encoder and decoder; the discriminator's is three times that.
    """
    _require(model, "latent_prior", "decode")

    def moves(x: Tensor) -> Moves:
        codes, draws = _codes(guide, x), _prior_draws(model, x)
        beside = functools.partial(torch.cat, dim=-1)
        posterior_logits, prior_logits = _logits(
            discriminator, beside([x, codes]), beside([x, draws])
        )
        bound = (model.decode(codes).log_prob(x) - posterior_logits).mean()
        losses = {
            "encoder": -bound,
            "decoder": -bound,
            "discriminator": _is_real(posterior_logits).mean() + _is_fake(prior_logits).mean(),
        }
        watched = _watched(posterior_logits, prior_logits, draws, codes)
        return Moves(losses, watched | {"bound": bound})

    players = (
        _player("encoder", guide, lr),
        _player("decoder", model, lr),
        _player("discriminator", discriminator, 3 * lr),
    )
    return Game(players, moves, {"model": model, "guide": guide, "discriminator": discriminator})


# --- parts ---------------------------------------------------------------------------------------


def _player(name: str, module: Any, lr: float) -> Player:
    return Player(name, [p for p in module.parameters() if p.requires_grad], lr=lr)


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
    if callable(getattr(guide, "posterior", None)):
        codes: Tensor = _only_site(guide.posterior(x)).rsample()
    else:
        codes = guide(x)
    return codes


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
