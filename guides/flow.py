"""An amortised normalising-flow posterior for any set of real latent sites.

q(z | x) = prod_l q(z_l | z_<l, x), each factor a flow conditioned on encoder features
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyro
from torch import Tensor, nn

from pvae.errors import OptionError
from pvae.flows import ConditionalFlow
from pvae.networks import Encoder, join

__all__ = ["Flow"]


class Flow(nn.Module):
    """A normalising flow per latent site, given the data and the sites before it.

    Rezende & Mohamed (2015), Variational inference with normalizing flows; Kingma et al. (2016),
    Improved variational inference with inverse autoregressive flow. Of the kinds, ``iaf``, ``nsf``
    and ``coupling`` draw in one pass, which is what an ELBO or an IW-ELBO needs. The
    stick-the-landing and DReG gradients weigh fixed draws as well: prefer ``nsf`` or ``coupling``
    for them, which invert in two passes.

    Args:
        x_dim: Number of features of a datum.
        latents: Latent site -> event shape, as a model's ``latents`` gives it.
        kind: iaf, nsf, maf or coupling; see :class:`pvae.flows.ConditionalFlow`.
        transforms: Number of transformations of each site.
        transform_hidden: Width of each hidden layer of a transformation's network.
        hidden: Width of each layer of the encoder.
        activation: Non-linearity of both.
        x_mean: Mean of the data, subtracted from the encoder's input, ``(x_dim,)``.
        x_scale: Standard deviation of the data, by which the input is divided, ``(x_dim,)``.

    Raises:
        OptionError: ``latents`` is empty, or an option of the flow does not exist.
    """

    def __init__(
        self,
        x_dim: int,
        latents: Mapping[str, Sequence[int]],
        *,
        kind: str = "iaf",
        transforms: int = 2,
        transform_hidden: Sequence[int] = (64, 64),
        hidden: Sequence[int] = (200, 200),
        activation: str = "silu",
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not latents:
            raise OptionError(
                "the guide needs at least one latent site: pass latents=model.latents"
            )
        self.encoder = Encoder(
            x_dim, hidden, activation_name=activation, x_mean=x_mean, x_scale=x_scale
        )
        self.latents = {name: tuple(shape) for name, shape in latents.items()}
        width = self.encoder.out_features
        self.flows = nn.ModuleDict()
        for name, shape in latents.items():
            flow = ConditionalFlow(
                shape,
                width,
                kind=kind,
                transforms=transforms,
                hidden=transform_hidden,
                activation=activation,
            )
            self.flows[name] = flow
            width += flow.size

    def forward(self, x: Tensor) -> None:
        """Sample every latent site given ``x`` of shape ``(B, x_dim)``."""
        context, last = self.encoder(x), list(self.flows)[-1]
        with pyro.plate("data", len(x), dim=-1):
            for name, flow in self.flows.items():
                z = pyro.sample(name, flow(context))
                if name != last:
                    batch = z.shape[: z.dim() - len(self.latents[name])]
                    context = join(context, z.reshape(batch + (-1,)))
