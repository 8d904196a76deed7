"""A model of one's own, in one file: robust factor analysis with heavy-tailed noise.

    z ~ Normal(0, I),    x | z ~ StudentT(nu, W z + b, scale)

From Python:          python examples/own_model.py
From the shell:       pvae train ./examples/own_model.py:RobustFactors --data digits --epochs 20
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


class RobustFactors(nn.Module):
    """Linear decoder, Student-t noise with learned degrees of freedom.

    Args:
        x_dim: Number of features.
        z_dim: Number of factors.
    """

    def __init__(self, x_dim: int, *, z_dim: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(z_dim, x_dim)
        self.raw_scale = nn.Parameter(torch.zeros(x_dim))
        self.raw_df = nn.Parameter(torch.tensor(3.0))
        self.latents = {"z": (z_dim,)}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score ``x``, or generate ``size`` data with ``x=None``."""
        with pyro.plate("data", size if x is None else len(x)):
            z_dim = self.linear.in_features
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([z_dim]).to_event(1))
            noise = softplus(self.raw_scale) + 1e-3
            likelihood = dist.StudentT(2 + softplus(self.raw_df), self.linear(z), noise)
            sampled: Tensor = pyro.sample("x", likelihood.to_event(1), obs=x)
        return sampled


def main(epochs: int = 150) -> None:
    """Train on digits, compare with factor analysis, print the table."""
    import pvae
    from pvae.guides.gaussian import Gaussian

    digits = pvae.data.load("digits")
    torch.manual_seed(0)
    model = RobustFactors(digits.x_dim)
    guide = Gaussian(digits.x_dim, model.latents, covariance="full")
    run = pvae.fit(
        model, guide, digits.train_raw, preprocess=digits.preprocess, valid=digits.valid,
        epochs=epochs, batch_size=64, lr=1e-2, lr_schedule="cosine",
    )  # fmt: skip
    rival = pvae.baselines.FactorAnalysis(n_components=8).fit(digits.train.x)
    print(pvae.compare({"robust factors": run, "factor analysis": rival}, digits.test))


if __name__ == "__main__":
    main()
