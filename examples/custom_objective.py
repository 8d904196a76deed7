"""Objectives are a bound, a gradient estimator and a KL weight; here is one of one's own.

A bound is any function of the log weights ``(K, B) -> (B,)``. This one averages the ELBO and the
importance-weighted ELBO. The second half hands an objective to Pyro's own SVI.

Run:  python examples/custom_objective.py
"""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

import pvae
from pvae.guides.gaussian import Gaussian
from pvae.models.vae import VAE


def halfway(log_weights: Tensor) -> Tensor:
    """The mean of the ELBO and the IW-ELBO: ``(K, B) -> (B,)``."""
    return 0.5 * (pvae.bounds.elbo(log_weights) + pvae.bounds.iw_elbo(log_weights))


def build(x_dim: int) -> tuple[VAE, Gaussian]:
    """A small Bernoulli VAE."""
    torch.manual_seed(0)
    model = VAE(x_dim, z_dim=8, hidden=(64,))
    return model, Gaussian(x_dim, model.latents, hidden=(64,))


def main(epochs: int = 20) -> None:
    """Train with the custom bound, then take Pyro's own SVI through ten steps."""
    digits = pvae.data.load("digits", binarize="fixed")
    model, guide = build(digits.x_dim)
    objective = pvae.Objective(bound=halfway, num_particles=5)
    pvae.fit(model, guide, digits.train.x, valid=digits.valid.x, objective=objective, epochs=epochs)
    print(pvae.evidence.importance(model, guide, digits.test.x, num_particles=200))

    model, guide = build(digits.x_dim)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=pvae.dreg(5))
    losses = [svi.step(digits.train.x[:100]) / 100 for _ in range(10)]
    print(f"SVI with pvae.dreg(5): {losses[0]:.2f} -> {losses[-1]:.2f} nats/datum")


if __name__ == "__main__":
    main()
