"""A linear-Gaussian state-space model with its exact answers, for tests of everything in time."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.models.deep_markov import DeepMarkov

STEPS, STATES, FEATURES = 5, 2, 3


def linear_model(seed: int = 0) -> DeepMarkov:
    """A deep Markov model that is a linear-Gaussian chain, float64."""
    torch.manual_seed(seed)
    model = DeepMarkov(
        STEPS * FEATURES, image_shape=(STEPS, FEATURES), z_dim=STATES, transition="linear",
        emission_hidden=0, likelihood="gaussian",
    ).double()  # fmt: skip
    with torch.no_grad():
        model.transition.linear.weight.copy_(torch.tensor([[0.9, 0.3], [-0.2, 0.7]]))
        model.transition.linear.bias.copy_(torch.tensor([0.1, -0.2]))
        model.transition.log_scale.copy_(torch.tensor([-0.5, 0.2]))
        model.start.copy_(torch.tensor([0.4, -1.0]))
        model.log_noise.copy_(torch.tensor([-0.3, 0.1, 0.4]))
        model.emission[0].bias.normal_()
    return model


def parts(model: DeepMarkov):
    emission = model.emission[0]
    return (
        model.transition.linear.weight, model.transition.linear.bias,
        (2 * model.transition.log_scale).exp().diag(), emission.weight, emission.bias,
        (2 * model.log_noise).exp().diag(), model.start,
    )  # fmt: skip


@torch.no_grad()
def kalman(model: DeepMarkov, x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """``log p(x_1 ... x_T)`` by prediction and correction, ``(B, T, D) -> (B,)``."""
    a, b, q, c, d, r, start = parts(model)
    out = []
    for n, row in enumerate(x):
        mean, cov, total = start, torch.zeros_like(q), torch.zeros((), dtype=x.dtype)
        for value in row[: len(row) if lengths is None else int(lengths[n])]:
            mean, cov = a @ mean + b, a @ cov @ a.T + q
            spread = c @ cov @ c.T + r
            total = total + dist.MultivariateNormal(c @ mean + d, spread).log_prob(value)
            gain = cov @ c.T @ torch.linalg.inv(spread)
            mean, cov = mean + gain @ (value - c @ mean - d), cov - gain @ c @ cov
        out.append(total)
    return torch.stack(out)


class ExactChain(nn.Module):
    """``p(z_1 ... z_T | x)`` as one Gaussian, from the joint precision of states and data."""

    def __init__(self, model: DeepMarkov) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> None:
        steps = x.reshape(len(x), -1, FEATURES)
        a, b, q, c, d, r, start = parts(self.model)
        length = steps.shape[1]
        size = length * STATES
        # z = shift z + drive + noise, so (1 - shift) z has mean drive and block covariance q.
        shift = torch.zeros(size, size, dtype=x.dtype)
        for t in range(1, length):
            shift[t * STATES : (t + 1) * STATES, (t - 1) * STATES : t * STATES] = a
        drive = b.repeat(length)
        drive = torch.cat([drive[:STATES] + a @ start, drive[STATES:]])
        unmixed = torch.eye(size, dtype=x.dtype) - shift
        inner = torch.block_diag(*[torch.linalg.inv(q)] * length)
        seen = torch.block_diag(*[c.T @ torch.linalg.inv(r) @ c] * length)
        precision = unmixed.T @ inner @ unmixed + seen
        pull = (steps - d) @ torch.linalg.inv(r) @ c
        right = (unmixed.T @ inner @ drive) + pull.flatten(1)
        mean = torch.linalg.solve(precision, right.T).T
        flat = dist.MultivariateNormal(mean, precision_matrix=(precision + precision.T) / 2)
        reshape = dist.transforms.ReshapeTransform((size,), (length, STATES))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.TransformedDistribution(flat, [reshape]))
