"""Semi-supervised learning with a deep generative model of data and their labels (M2).

    y ~ Categorical(pi),    z ~ Normal(0, I),    x_d | y, z ~ likelihood(decoder(y, z)_d)

Kingma, Rezende, Mohamed & Welling (2014), Semi-supervised learning with deep generative models. A
batch is ``(x, y)``; ``y = -1`` where the label is not known. A known label is observed, an unknown
one is latent: one program for both, by masks on its two sites ``y_observed`` and ``y``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pvae.likelihoods import likelihood as build_likelihood
from pvae.likelihoods import num_outputs
from pvae.networks import MLP, join, one_hot

__all__ = ["SemiSupervised"]


class SemiSupervised(nn.Module):
    """A class ``y`` and a style ``z`` give ``x``; a label may be missing.

    Train it with the class_conditional guide and ``gradient=mixed``, or sum the classes out with
    ``pyro.infer.TraceEnum_ELBO()``, which is Kingma et al.'s objective.

    Args:
        x_dim: Number of features of a datum.
        num_classes: Number of classes C.
        z_dim: Number of dimensions of the style.
        hidden: Width of each hidden layer of the decoder.
        activation: Its non-linearity.
        likelihood: bernoulli, continuous_bernoulli, gaussian or discretized_logistic.
        num_levels: Number of integer levels, for discretized_logistic.

    Raises:
        OptionError: no likelihood is called so.
    """

    train_defaults = {
        "guide": "class_conditional",
        "objective_options": {"gradient": "mixed", "num_particles": 4},
    }

    def __init__(
        self,
        x_dim: int,
        *,
        num_classes: int = 10,
        z_dim: int = 10,
        hidden: Sequence[int] = (200, 200),
        activation: str = "silu",
        likelihood: str = "bernoulli",
        num_levels: int = 256,
    ) -> None:
        super().__init__()
        self.x_dim, self.z_dim, self.num_classes = x_dim, z_dim, num_classes
        self.likelihood, self.num_levels = likelihood, num_levels
        self.class_logits = nn.Parameter(torch.zeros(num_classes))
        outputs = x_dim * num_outputs(likelihood)
        self.decoder = MLP(num_classes + z_dim, outputs, hidden, activation_name=activation)
        self.register_buffer("prior_loc", torch.zeros(z_dim))

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"y": (), "z": (self.z_dim,)}

    def forward(
        self, x: Tensor | None = None, y: Tensor | None = None, size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Score ``x`` ``(B, x_dim)`` and labels ``y`` ``(B,)``, or generate ``size`` data of both.

        Labels are integers from 0 to C - 1, or -1; ``None`` is -1 for all.
        """
        rows = size if x is None else len(x)
        if y is None:
            y = torch.full((rows,), -1, device=self.class_logits.device)
        known, prior = y >= 0, dist.Categorical(logits=self.class_logits)
        with pyro.plate("data", rows, dim=-1):
            with poutine.mask(mask=known):
                given = pyro.sample("y_observed", prior, obs=y.clamp(min=0))
            with poutine.mask(mask=~known):
                drawn = pyro.sample("y", prior, infer={"enumerate": "parallel"})
            label = torch.where(known, given, drawn)
            z = pyro.sample("z", dist.Normal(self.prior_loc, 1.0).to_event(1))
            sampled: Tensor = pyro.sample("x", self.decode(label, z), obs=x)
        return sampled, label

    def decode(self, y: Tensor, z: Tensor) -> Any:
        """``p(x | y, z)`` for integers ``y`` ``(*,)`` and ``z`` ``(*, z_dim)``: events (x_dim,)."""
        output = self.decoder(join(one_hot(y, self.num_classes, z.dtype), z))
        return build_likelihood(self.likelihood, output, self.num_levels)

    def example_batch(self, size: int) -> tuple[Tensor, Tensor]:
        """``size`` data of the model, the labels of every second one unknown."""
        x, y = self(size=size)
        return x, torch.where(torch.arange(size) % 2 == 0, y, -1)
