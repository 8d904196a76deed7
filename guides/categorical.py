"""An amortised posterior for discrete latent sites: Bernoulli, categorical, one-hot.

q(z | x) = prod_site Categorical(z_site; softmax(logits_site(x))), or Bernoulli
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.errors import ProgramError
from pvae.networks import Encoder
from pvae.particles import site_priors
from pvae.relaxations import RelaxedBernoulli, RelaxedOneHot, check_relaxation

__all__ = ["Categorical"]


class Categorical(nn.Module):
    """A factorised discrete distribution of the model's own kind for each of its latent sites.

    Without a relaxation, draws have no pathwise derivative: train with
    ``gradient=score_function`` or ``mixed``, or let wake-sleep do it. With one, draws are discrete
    all the same and the bound is exact; the gradient is biased (see :mod:`pvae.relaxations`), and
    what the model makes of a draw must be differentiable in it: an embedding as ``z @ table``, not
    ``table[z]``. A one-hot prior's own log mass passes no derivative in torch, which matters where
    it is not uniform: use ``analytic_kl=True`` there.

    Args:
        x_dim: Number of features of a datum.
        model: The model; its sites' kinds and numbers of categories are read off one draw.
        relaxation: none, straight_through or gumbel_softmax.
        temperature: Of gumbel_softmax; a small one has less bias and more variance.
        hidden: Width of each layer of the encoder.
        activation: Its non-linearity.
        x_mean: Mean of the data, subtracted from the encoder's input, ``(x_dim,)``.
        x_scale: Standard deviation of the data, by which the input is divided, ``(x_dim,)``.

    Raises:
        OptionError: no relaxation is called so, or the temperature is not positive.
        ProgramError: a site is not discrete, or is an integer and is to be relaxed.
    """

    def __init__(
        self,
        x_dim: int,
        model: Any,
        *,
        relaxation: str = "none",
        temperature: float = 1.0,
        hidden: Sequence[int] = (200, 200),
        activation: str = "silu",
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_relaxation(relaxation, temperature)
        self.relaxation, self.temperature = relaxation, temperature
        self.kinds: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.encoder = Encoder(
            x_dim, hidden, activation_name=activation, x_mean=x_mean, x_scale=x_scale
        )
        self.heads = nn.ModuleDict()
        for name, prior in _priors(model).items():
            self.kinds[name], self.shapes[name] = _kind(name, prior, relaxed=relaxation != "none")
            size = math.prod(self.shapes[name])
            self.heads[name] = nn.Linear(self.encoder.out_features, size)

    def forward(self, x: Tensor) -> None:
        """Sample every latent site given ``x`` of shape ``(B, x_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            for name, posterior in self.posterior(x).items():
                pyro.sample(name, posterior)

    def posterior(self, x: Tensor) -> dict[str, Any]:
        """``q(z_site | x)`` for every site, batch shape ``(B,)``."""
        features = self.encoder(x)
        return {name: self._site(name, head(features)) for name, head in self.heads.items()}

    def _site(self, name: str, output: Tensor) -> Any:
        logits = output.reshape(output.shape[:-1] + torch.Size(self.shapes[name]))
        options: dict[str, Any] = {"relaxation": self.relaxation, "temperature": self.temperature}
        relaxed, kind = self.relaxation != "none", self.kinds[name]
        if kind == "bernoulli":
            units = (
                RelaxedBernoulli(logits, **options) if relaxed else dist.Bernoulli(logits=logits)
            )
            return units.to_event(logits.dim() - 1)
        if kind == "one-hot":
            units = (
                RelaxedOneHot(logits, **options)
                if relaxed
                else dist.OneHotCategorical(logits=logits)
            )
            return units.to_event(logits.dim() - 2)
        return dist.Categorical(logits=logits).to_event(logits.dim() - 2)


def _priors(model: Any) -> dict[str, Any]:
    """Latent site -> its prior, from one draw of the model."""
    if not hasattr(model, "latents"):
        raise ProgramError(
            f"{type(model).__name__} does not name its latent sites: give it a 'latents' property "
            "(site -> event shape)"
        )
    return site_priors(model, model.latents)


def _kind(name: str, prior: Any, *, relaxed: bool) -> tuple[str, tuple[int, ...]]:
    """A site's kind and the shape of its logits."""
    while isinstance(prior, torch.distributions.Independent) or hasattr(prior, "base_dist"):
        prior = prior.base_dist
    family = type(prior).__name__
    if isinstance(prior, torch.distributions.Bernoulli):
        return "bernoulli", tuple(prior.batch_shape[1:])
    if isinstance(prior, torch.distributions.OneHotCategorical):
        return "one-hot", tuple(prior.logits.shape[1:]) or tuple(prior.event_shape)
    if isinstance(prior, torch.distributions.Categorical):
        if relaxed:
            raise ProgramError(
                f"site {name!r} ({family}) is an integer, which no derivative passes: write it as "
                "OneHotCategorical in the model, or use relaxation='none'"
            )
        return "integer", tuple(prior.logits.shape[1:])
    raise ProgramError(
        f"site {name!r} is {family}, but the categorical guide draws Bernoulli, Categorical and "
        "OneHotCategorical sites: use the gaussian guide for real ones"
    )
