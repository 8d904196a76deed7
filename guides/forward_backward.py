r"""Posteriors of state-space models: recurrent networks read the sequence, the state follows.

    q(z | x) = prod_t Normal(z_t; loc(z_{t-1}, h_t), diag(scale(z_{t-1}, h_t)^2))

where ``h_t`` comes from a network that runs backward over ``x_t, ..., x_T`` (the deep Kalman
smoother, DKS: the true posterior has this form), forward over ``x_1, ..., x_t`` (ST-L), or from
both (ST-LR). Without ``structured`` the states are independent given the data (mean field: MF-LR).
Krishnan, Shalit & Sontag (2017), Structured inference networks for nonlinear state space models.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.errors import OptionError, ProgramError
from pvae.markov import GaussianChain
from pvae.recurrent import LSTM

__all__ = ["ForwardBackward"]

_DIRECTIONS = ("backward", "forward", "both")


class ForwardBackward(nn.Module):
    """A Gaussian for each state, given the state before and recurrent summaries of the data.

    Args:
        model: A model whose latent site ``z`` has the shape ``(T, z_dim)`` and that says by
            ``mask`` which steps of a batch are data, as ``DeepMarkov`` does.
        hidden: Width of the recurrent network, in each direction.
        direction: backward (DKS), forward (ST-L) or both (ST-LR, MF-LR).
        structured: Let each state depend on the one before; else mean field.
        dropout: Share of the recurrent features that are dropped in training.

    Raises:
        OptionError: no direction is called so.
        ProgramError: the model's latents are no chain of states.
    """

    def __init__(
        self,
        model: Any,
        *,
        hidden: int = 200,
        direction: str = "backward",
        structured: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if direction not in _DIRECTIONS:
            raise OptionError(f"direction is one of {', '.join(_DIRECTIONS)}, got {direction!r}")
        latents = getattr(model, "latents", {})
        if [len(shape) for shape in latents.values()] != [2] or not hasattr(model, "chain"):
            raise ProgramError(
                f"the forward-backward guide is for a chain of states, and the latents of "
                f"{type(model).__name__} are {dict(latents)}: use the gaussian guide"
            )
        (self.site,) = latents
        self.num_features, self.structured = model.num_features, structured
        self._mask = model.mask
        z_dim = latents[self.site][1]
        wanted = ("backward", "forward") if direction == "both" else (direction,)
        self.readers = nn.ModuleDict(
            {f"{name}_reader": LSTM(self.num_features, hidden, batch_first=True) for name in wanted}
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, 2 * z_dim)
        self.z_dim = z_dim
        if structured:
            self.start = nn.Parameter(torch.zeros(z_dim))
            self.from_state = nn.Linear(z_dim, hidden)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> None:
        """Sample the states given ``x`` of shape ``(B, T * D)`` or ``(B, T, D)``."""
        with pyro.plate("data", len(x), dim=-1):
            for name, posterior in self.posterior(x, lengths).items():
                pyro.sample(name, posterior)

    def posterior(self, x: Tensor, lengths: Tensor | None = None) -> dict[str, Any]:
        """``q(z | x)``, batch shape ``(B,)``, events ``(T, z_dim)``."""
        steps = x.reshape(len(x), -1, self.num_features).to(self.head.weight.dtype)
        mask = self._mask(steps, lengths)
        context = self.dropout(self._read(steps.masked_fill(~mask[..., None], 0), mask))
        if not self.structured:
            loc, scale = self._moments(context)
            normal = dist.Normal(loc, scale).mask(mask[..., None]).to_event(2)
            return {self.site: normal}
        length = mask.shape[1]
        chain = GaussianChain(self._step, self.start, length, context=context, mask=mask)
        return {self.site: chain}

    def _read(self, x: Tensor, mask: Tensor) -> Tensor:
        """The mean of what each direction makes of the data, ``(B, T, hidden)``."""
        found = []
        for name, reader in self.readers.items():
            order = _reversal(mask)[..., None] if name == "backward_reader" else None
            given = x if order is None else x.gather(1, order.expand_as(x))
            output, _ = reader(given)
            found.append(output if order is None else output.gather(1, order.expand_as(output)))
        return torch.stack(found).mean(0)

    def _step(self, previous: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        weight = 1 / (1 + len(self.readers))  # all that is joined counts alike
        return self._moments(torch.lerp(context, torch.tanh(self.from_state(previous)), weight))

    def _moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = self.head(features).chunk(2, -1)
        return loc, softplus(raw) + 1e-4


def _reversal(mask: Tensor) -> Tensor:
    """Indices ``(B, T)`` that turn the data of each row round and leave its padding behind."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    turned = mask.sum(1, keepdim=True) - 1 - steps
    return torch.where(mask, turned, steps)
