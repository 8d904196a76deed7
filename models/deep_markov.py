r"""The deep Markov model: a state-space model whose transition and emission are networks.

    z_t | z_{t-1} ~ Normal(loc(z_{t-1}), diag(scale(z_{t-1})^2)),    z_0 learned
    x_t | z_t     ~ Bernoulli(emission(z_t))   or   Normal(emission(z_t), noise)

with the gated transition of Krishnan, Shalit & Sontag (2017), Structured inference networks for
nonlinear state space models:

    loc = (1 - g) * (A z + b) + g * h(z),    g = sigmoid(MLP(z)),    scale = softplus(C relu(h) + d)

All of ``z`` is one latent site ``(T, z_dim)``, so that given the draws every step is scored at
once. A sequence shorter than T is padded, with -1 where the data are binary, or comes with its
length; padding adds nothing to any density.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from pvae.errors import OptionError, did_you_mean
from pvae.markov import GaussianChain, Padded, step_mask
from pvae.networks import MLP

__all__ = ["DeepMarkov"]

_LIKELIHOODS = ("bernoulli", "gaussian")


class GatedTransition(nn.Module):
    """``z_{t-1} -> loc, scale`` by a gate between a linear map and a network.

    Args:
        z_dim: Number of state dimensions.
        hidden: Width of the networks.
    """

    def __init__(self, z_dim: int, hidden: int = 200) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(z_dim, hidden), nn.ReLU(), nn.Linear(hidden, z_dim))
        self.proposal = nn.Sequential(nn.Linear(z_dim, hidden), nn.ReLU(), nn.Linear(hidden, z_dim))
        self.linear = nn.Linear(z_dim, z_dim)
        self.raw_scale = nn.Linear(z_dim, z_dim)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """``(*, z_dim)`` to mean and standard deviation ``(*, z_dim)``."""
        gate, proposal = torch.sigmoid(self.gate(z)), self.proposal(z)
        loc = torch.lerp(self.linear(z), proposal, gate)
        return loc, softplus(self.raw_scale(relu(proposal))) + 1e-4


class LinearTransition(nn.Module):
    """``z_{t-1} -> A z_{t-1} + b`` with a constant scale: the linear-Gaussian chain.

    Args:
        z_dim: Number of state dimensions.
    """

    def __init__(self, z_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(z_dim, z_dim)
        self.log_scale = nn.Parameter(torch.zeros(z_dim))

    def forward(self, z: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """``(*, z_dim)`` to mean and standard deviation ``(*, z_dim)``."""
        loc = self.linear(z)
        return loc, self.log_scale.exp().expand_as(loc)


class DeepMarkov(nn.Module):
    """A Markov chain of states ``z``, one datum a sequence ``(T, D)``, flattened or not.

    Args:
        x_dim: Numbers in a padded sequence, ``T * D``.
        image_shape: ``(T, D)``; D is one if it is left out.
        z_dim: Number of state dimensions.
        transition: gated, or linear (with constant noise).
        transition_hidden: Width of the networks of the gated transition.
        emission_hidden: Width of the two hidden layers of the emission; 0 for a linear map.
        likelihood: bernoulli (binary data) or gaussian (real data, a noise for each feature).

    Raises:
        OptionError: no transition or likelihood is called so, or the shape does not fit.
    """

    takes_padding = True
    train_defaults = {"guide": "forward_backward"}

    def __init__(
        self,
        x_dim: int,
        *,
        image_shape: tuple[int, ...] | None = None,
        z_dim: int = 64,
        transition: str = "gated",
        transition_hidden: int = 128,
        emission_hidden: int = 100,
        likelihood: str = "bernoulli",
    ) -> None:
        super().__init__()
        if likelihood not in _LIKELIHOODS:
            raise OptionError(
                f"no likelihood is called {likelihood!r}: {did_you_mean(likelihood, _LIKELIHOODS)}"
            )
        if transition not in ("gated", "linear"):
            raise OptionError(f"transition is 'gated' or 'linear', got {transition!r}")
        shape = (x_dim, 1) if image_shape is None else tuple(image_shape)
        if len(shape) != 2 or shape[0] * shape[1] != x_dim:
            raise OptionError(
                f"image_shape is the (steps, features) of a sequence of {x_dim} numbers, got "
                f"{shape}: give data of shape (N, steps, features)"
            )
        self.length, self.num_features = shape
        self.z_dim, self.likelihood = z_dim, likelihood
        self.transition: nn.Module = LinearTransition(z_dim)
        if transition == "gated":
            self.transition = GatedTransition(z_dim, transition_hidden)
        self.start = nn.Parameter(torch.zeros(z_dim))
        hidden = (emission_hidden,) * 2 if emission_hidden else ()
        self.emission = MLP(z_dim, self.num_features, hidden, activation_name="relu")
        if likelihood == "gaussian":
            self.log_noise = nn.Parameter(torch.zeros(self.num_features))

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes, for sequences of the full length."""
        return {"z": (self.length, self.z_dim)}

    def forward(
        self, x: Tensor | None = None, lengths: Tensor | None = None, size: int = 1
    ) -> Tensor:
        """Score ``x`` of shape ``(B, T * D)`` or ``(B, T, D)``, or generate with ``x=None``.

        Args:
            x: Sequences; their steps T may be fewer than those of the data set.
            lengths: Steps of each, ``(B,)``; without them, negative numbers mark the padding of
                binary data and real data have none.
            size: How many to generate, of the full length.
        """
        if x is None:
            mask = torch.ones(size, self.length, dtype=torch.bool, device=self.start.device)
        else:
            x = x.flatten(1).to(self.start.dtype)
            mask = self.mask(x.reshape(len(x), -1, self.num_features), lengths)
        with pyro.plate("data", len(mask), dim=-1):
            z = pyro.sample("z", self.chain(mask))
            sampled: Tensor = pyro.sample("x", Padded(self.decode(z), mask), obs=x)
        return sampled

    def mask(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Which steps of ``x`` ``(B, T, D)`` are data: ``(B, T)``."""
        if lengths is None and self.likelihood == "gaussian":
            return torch.ones_like(x[..., 0], dtype=torch.bool)
        return step_mask(x, lengths)

    def chain(self, mask: Tensor) -> GaussianChain:
        """``p(z)`` of sequences whose steps are marked in ``mask`` ``(B, T)``."""
        return GaussianChain(self.transition, self.start, mask.shape[-1], mask=mask)

    def decode(self, z: Tensor) -> Any:
        """``p(x_t | z_t)`` for ``z`` of shape ``(*, z_dim)``: events of shape ``(D,)``."""
        output = self.emission(z)
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=output).to_event(1)
        return dist.Normal(output, self.log_noise.exp()).to_event(1)
