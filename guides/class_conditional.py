"""A class drawn from a classifier, and Gaussian latents given data and class.

q(y, z | x) = Categorical(y; classifier(x)) prod_site Normal(z_site; encoder(x, y)_site)

For models with one categorical site and real ones: a mixture's component, or a label that may be
known (Kingma et al. 2014). Where the batch is ``(x, y)``, a known label (``y >= 0``) takes the
place of the draw, and in training ``alpha log q(y | x)`` is added to its bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pvae.errors import ProgramError
from pvae.mean_field import normal_sites, num_outputs
from pvae.networks import MLP, join, one_hot
from pvae.particles import site_priors

__all__ = ["ClassConditional"]


class ClassConditional(nn.Module):
    """``q(y | x) q(z | x, y)``: train it by ``gradient=mixed``, or sum y out by TraceEnum_ELBO.

    Args:
        x_dim: Number of features of a datum.
        latents: Latent site -> event shape, as a model's ``latents`` gives it.
        model: The model, whose one categorical site is looked up.
        hidden: Width of each hidden layer of classifier and encoder.
        activation: Their non-linearity.
        alpha: Weight of ``log q(y | x)`` of a known label; Kingma et al. take 0.1 N / N_known.
        x_mean: Mean of the data, subtracted from the input, ``(x_dim,)``.
        x_scale: Standard deviation of the data, by which the input is divided, ``(x_dim,)``.

    Raises:
        ProgramError: the model does not have exactly one categorical site.
    """

    x_mean: Tensor
    x_scale: Tensor

    def __init__(
        self,
        x_dim: int,
        latents: Mapping[str, Sequence[int]],
        model: Any,
        *,
        hidden: Sequence[int] = (200, 200),
        activation: str = "silu",
        alpha: float = 1.0,
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        priors = site_priors(model, latents)
        classes = [n for n, p in priors.items() if isinstance(p, torch.distributions.Categorical)]
        if len(classes) != 1:
            raise ProgramError(
                f"the class_conditional guide needs a model with one categorical site, "
                f"{type(model).__name__} has {len(classes)}: use another guide"
            )
        self.site, self.alpha = classes[0], alpha
        self.num_classes = int(priors[self.site].probs.shape[-1])
        self.latents = {n: tuple(s) for n, s in latents.items() if n != self.site}
        self.register_buffer("x_mean", torch.zeros(x_dim) if x_mean is None else x_mean.clone())
        self.register_buffer("x_scale", torch.ones(x_dim) if x_scale is None else x_scale.clone())
        outputs = num_outputs(self.latents)
        self.classifier = MLP(x_dim, self.num_classes, hidden, activation_name=activation)
        if self.latents:
            width = x_dim + self.num_classes
            self.encoder = MLP(width, outputs, hidden, activation_name=activation)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        """Sample the class and every latent site given ``x`` ``(B, x_dim)``; y as for the model."""
        classifier = dist.Categorical(logits=self.classify(x))
        enumerated = {"enumerate": "parallel"}
        with pyro.plate("data", len(x), dim=-1):
            if y is None:
                label = pyro.sample(self.site, classifier, infer=enumerated)
            else:
                known = y >= 0
                with poutine.mask(mask=~known):
                    drawn = pyro.sample(self.site, classifier, infer=enumerated)
                given = y.clamp(min=0)
                label = torch.where(known, given, drawn)
                if self.training and self.alpha:
                    # A factor of the guide is subtracted, as log q is.
                    score = classifier.log_prob(given).masked_fill(~known, 0.0)
                    pyro.factor("classification", -self.alpha * score, has_rsample=True)
            for name, posterior in self.posterior(x, label).items():
                pyro.sample(name, posterior)

    def classify(self, x: Tensor) -> Tensor:
        """``log q(y | x)`` of every class up to a constant: ``(B, x_dim) -> (B, C)``."""
        logits: Tensor = self.classifier((x - self.x_mean) / self.x_scale)
        return logits

    def posterior(self, x: Tensor, label: Tensor) -> dict[str, Any]:
        """``q(z_site | x, y)`` for integer ``label`` ``(*, B)``: batch shape ``(*, B)``."""
        if not self.latents:
            return {}
        standard = (x - self.x_mean) / self.x_scale
        output = self.encoder(join(standard, one_hot(label, self.num_classes, x.dtype)))
        return normal_sites(output, self.latents)
