"""A mixture of diagonal Gaussians as a program with an enumerable discrete site.

component ~ Categorical(weights),    x | component=c ~ Normal(loc_c, diag(scale_c^2))
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["GaussianMixture"]


class GaussianMixture(nn.Module):
    """A Gaussian mixture with diagonal covariances, trained by summing the component out.

    Train it with ``objective=pyro.infer.TraceEnum_ELBO()`` and an empty guide, or, as
    ``pvae train`` does, with the exact posterior as guide.

    Args:
        x_dim: Number of features D.
        num_components: Number of components C.
    """

    train_defaults = {
        "guide": "exact",
        "objective_options": {"gradient": "mixed", "num_particles": 4},
    }

    def __init__(self, x_dim: int, *, num_components: int = 10) -> None:
        super().__init__()
        self.x_dim, self.num_components = x_dim, num_components
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(torch.randn(num_components, x_dim))
        self.log_scale = nn.Parameter(torch.zeros(num_components, x_dim))

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"component": ()}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score ``x`` of shape ``(B, D)``, or generate ``size`` data with ``x=None``."""
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            component = pyro.sample(
                "component", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"}
            )
            sampled: Tensor = pyro.sample("x", self.decode(component), obs=x)
        return sampled

    def decode(self, component: Tensor) -> Any:
        """``p(x | component)`` for integer ``component`` of shape ``(*,)``."""
        return dist.Normal(self.loc[component], self.log_scale[component].exp()).to_event(1)

    def log_joint(self, x: Tensor) -> Tensor:
        """``log p(x, component=c)`` for every c: ``(B, D) -> (B, C)``."""
        density = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        log_prob: Tensor = self.logits.log_softmax(-1) + density.log_prob(x[:, None])
        return log_prob

    def posterior(self, x: Tensor) -> dict[str, Any]:
        """``p(component | x)``, a Categorical of batch shape ``(B,)``."""
        return {"component": dist.Categorical(logits=self.log_joint(x))}

    def log_evidence(self, x: Tensor) -> Tensor:
        """``log sum_c p(x, component=c)``: ``(B, D) -> (B,)``, nats, exact."""
        return self.log_joint(x).logsumexp(-1)
