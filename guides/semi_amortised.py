"""A Gaussian posterior started by an encoder and improved for each datum by a few steps.

q(z | x) = prod_site Normal(z_site; loc_k(x), diag(scale_k(x)^2)), k steps from the encoder's
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.errors import OptionError, ProgramError
from pvae.networks import Encoder

__all__ = ["SemiAmortised"]

_State = dict[str, tuple[Tensor, Tensor]]  # site -> mean and log standard deviation, (B, size)


class SemiAmortised(nn.Module):
    """Mean-field Gaussians: the encoder's, then gradient steps on each datum's own ELBO.

    Kim, Wiseman, Miller, Sontag & Rush (2018), Semi-amortized variational autoencoders. A step is
    along the natural gradient of the ELBO of two mirrored draws, ``loc += r scale clip(scale g)``
    and ``log scale += r clip(g') / 2``, each clipped to ±1: no unit of the latents or the data
    enters, and no coordinate moves by more than r standard deviations, where r falls from
    ``step_size`` as one over the square root of the steps taken. The steps are taken at evaluation
    as well. Their draws are made of numbers fixed at construction, so that q is one distribution,
    the same whenever it is asked for; all particles of a datum share it.

    Args:
        x_dim: Number of features of a datum.
        model: The model, whose density the steps climb; real latent sites, named by ``latents``.
        steps: Number k of steps.
        step_size: Of the first.
        through: Differentiate through the steps (second derivatives of the model); ``False`` takes
            them as constants added to the encoder's output.
        hidden: Width of each layer of the encoder.
        activation: Its non-linearity.
        x_mean: Mean of the data, subtracted from the encoder's input, ``(x_dim,)``.
        x_scale: Standard deviation of the data, by which the input is divided, ``(x_dim,)``.

    Raises:
        OptionError: ``steps`` or ``step_size`` is not positive.
        ProgramError: the model does not name its latent sites.
    """

    noise: Tensor

    def __init__(
        self,
        x_dim: int,
        model: Any,
        *,
        steps: int = 5,
        step_size: float = 0.3,
        through: bool = True,
        hidden: Sequence[int] = (200, 200),
        activation: str = "silu",
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise OptionError(
                f"steps must be at least 1, got {steps}: without any it is the gaussian guide"
            )
        if not step_size > 0:
            raise OptionError(f"step_size must be positive, got {step_size}")
        if not getattr(model, "latents", None):
            raise ProgramError(
                f"{type(model).__name__} does not name its latent sites: give it a 'latents' "
                "property (site -> event shape)"
            )
        self.model, self.steps, self.step_size, self.through = model, steps, step_size, through
        self.latents = {name: tuple(shape) for name, shape in model.latents.items()}
        self.encoder = Encoder(
            x_dim, hidden, activation_name=activation, x_mean=x_mean, x_scale=x_scale
        )
        width = self.encoder.out_features
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, 2 * math.prod(s)) for name, s in self.latents.items()}
        )

        total = sum(math.prod(shape) for shape in self.latents.values())
        self.register_buffer("noise", torch.randn(steps, total))

    def forward(self, x: Tensor) -> None:
        """Sample every latent site given ``x`` of shape ``(B, x_dim)``."""
        state = self.refined(x)
        with pyro.plate("data", len(x), dim=-1):
            for name, (loc, log_scale) in state.items():
                shape = loc.shape[:-1] + torch.Size(self.latents[name])
                normal = dist.Normal(loc.reshape(shape), log_scale.exp().reshape(shape))
                pyro.sample(name, normal.to_event(len(self.latents[name])))

    def start(self, x: Tensor) -> _State:
        """The encoder's means and log standard deviations, each ``(B, size)``."""
        features = self.encoder(x)
        found = {}
        for name, head in self.heads.items():
            loc, raw_scale = head(features).chunk(2, -1)
            found[name] = loc, (softplus(raw_scale) + 1e-4).log()
        return found

    def refined(self, x: Tensor) -> _State:
        """The same after the steps."""
        differentiated = torch.is_grad_enabled()
        state = self.start(x)
        if not self.through:
            encoded, state = state, {n: (a.detach(), b.detach()) for n, (a, b) in state.items()}
        with torch.enable_grad():
            for taken in range(self.steps):
                state = self._step(x, state, taken, create_graph=self.through and differentiated)
        if not self.through:
            state = {
                name: (encoded[name][0] + (loc - encoded[name][0]).detach(),
                       encoded[name][1] + (log_scale - encoded[name][1]).detach())
                for name, (loc, log_scale) in state.items()
            }  # fmt: skip
        return state

    def _step(self, x: Tensor, state: _State, taken: int, *, create_graph: bool) -> _State:
        if not create_graph:
            state = {name: (a.detach(), b.detach()) for name, (a, b) in state.items()}
        points = [
            t if t.requires_grad else t.requires_grad_() for pair in state.values() for t in pair
        ]
        slopes = torch.autograd.grad(self._elbo(x, state, taken), points, create_graph=create_graph)
        moved, size = {}, self.step_size / (taken + 1) ** 0.5
        for index, (name, (loc, log_scale)) in enumerate(state.items()):
            scale = log_scale.exp()
            up, wider = slopes[2 * index], slopes[2 * index + 1]
            moved[name] = (
                loc + size * scale * (scale * up).clamp(-1, 1),
                log_scale + size * wider.clamp(-1, 1) / 2,
            )
        return moved

    def _elbo(self, x: Tensor, state: _State, taken: int) -> Tensor:
        """The ELBO of two mirrored draws, summed over the data, up to a constant."""
        draws = {}
        entropy = x.new_zeros(())
        noise = self.noise[taken].split([loc.shape[-1] for loc, _ in state.values()])  # type: ignore[no-untyped-call]
        for (name, (loc, log_scale)), unit in zip(state.items(), noise, strict=True):
            step = log_scale.exp() * unit
            z = torch.cat([loc + step, loc - step])
            draws[name] = z.reshape(z.shape[:-1] + torch.Size(self.latents[name]))
            entropy = entropy + log_scale.sum()
        with poutine.block():
            conditioned = poutine.condition(self.model, draws)
            trace = poutine.trace(conditioned).get_trace(torch.cat([x, x]))
        terms = [
            node["fn"].log_prob(node["value"]).sum() / 2
            for node in trace.nodes.values()
            if node["type"] == "sample" and node["is_observed"]
        ]
        total: Tensor = sum(terms, start=entropy)
        return total
