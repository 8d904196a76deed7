"""The likelihood of a datum's features given a decoder's output."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Tensor
from torch.nn.functional import softplus

from pvae.distributions import DiscretizedLogistic
from pvae.errors import OptionError, did_you_mean

__all__ = ["LIKELIHOODS", "likelihood", "outputs_per_feature"]

# Name -> numbers that the decoder gives for each feature.
LIKELIHOODS = {
    "bernoulli": 1,
    "continuous_bernoulli": 1,
    "discretized_logistic": 2,
    "gaussian": 2,
}


def outputs_per_feature(name: str) -> int:
    """How many numbers a decoder gives for each feature.

    Raises:
        OptionError: no likelihood is called so.
    """
    if name not in LIKELIHOODS:
        raise OptionError(f"no likelihood is called {name!r}: {did_you_mean(name, LIKELIHOODS)}")
    return LIKELIHOODS[name]


def likelihood(name: str, output: Tensor, *, num_levels: int = 256) -> Any:
    """``p(x | z)`` from a decoder's output: events of shape ``(x_dim,)``.

    Args:
        name: bernoulli (binary data), continuous_bernoulli (grey values in [0, 1]), gaussian (real
            data, mean and variance learned) or discretized_logistic (integer levels).
        output: ``(*, outputs_per_feature(name) * x_dim)``.
        num_levels: Number of integer levels, for discretized_logistic.
    """
    if name == "bernoulli":
        return dist.Bernoulli(logits=output).to_event(1)
    if name == "continuous_bernoulli":
        return dist.ContinuousBernoulli(logits=output).to_event(1)
    loc, raw_scale = output.chunk(2, -1)
    scale = softplus(raw_scale) + 1e-3
    if name == "gaussian":
        return dist.Normal(loc, scale).to_event(1)
    centre, width = (loc + 0.5) * num_levels, scale * num_levels / 8
    return DiscretizedLogistic(centre, width, num_levels).to_event(1)
