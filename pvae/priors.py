"""Priors of one latent vector: modules that give ``p(z)`` when called.

A model takes one by its name or as an object, ``VAE(784, prior="mixture")`` or
``VAE(784, z_dim=8, prior=priors.Flow(8, kind="nsf"))``; whatever is a module and returns a
distribution over vectors of ``z_dim`` numbers will do.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.errors import OptionError, did_you_mean
from pvae.flows import ConditionalFlow
from pvae.mixtures import DiagonalNormalMixture
from pvae.von_mises_fisher import HypersphericalUniform

__all__ = ["PRIORS", "Flow", "Hyperspherical", "Mixture", "Normal", "Vamp", "named"]


class Normal(nn.Module):
    """``z ~ Normal(0, I)``.

    Args:
        z_dim: Number of latent dimensions.
    """

    def __init__(self, z_dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(z_dim))

    def forward(self) -> Any:
        """``p(z)``: events of shape ``(z_dim,)``."""
        return dist.Normal(self.loc, 1.0).to_event(1)


class Mixture(nn.Module):
    """``z ~ sum_c pi_c Normal(mu_c, diag(sigma_c^2))``, all its numbers learned.

    The MoG prior of Tomczak & Welling (2018), VAE with a VampPrior.

    Args:
        z_dim: Number of latent dimensions.
        num_components: Number of components.

    Raises:
        OptionError: there is no component.
    """

    def __init__(self, z_dim: int, *, num_components: int = 10) -> None:
        super().__init__()
        _check_components(num_components)
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(torch.randn(num_components, z_dim))
        width = torch.full((num_components, z_dim), math.log(math.expm1(1.0)))
        self.raw_scale = nn.Parameter(width)

    def forward(self) -> Any:
        """``p(z)``: events of shape ``(z_dim,)``."""
        scale = softplus(self.raw_scale) + 1e-3
        return DiagonalNormalMixture(self.logits, self.loc, scale, reparameterized=False)


class Vamp(nn.Module):
    """``z ~ (1/C) sum_c q(z | u_c)``: the encoder's own posteriors at learned pseudo-inputs.

    Tomczak & Welling (2018), VAE with a VampPrior. Model and guide share the encoder: pass
    :class:`pvae.guides.shared.Shared` of the model as guide. The pseudo-inputs are free numbers,
    uniform in [0, 1] at first, or what ``pseudo_inputs`` holds (rows of the data).

    Args:
        z_dim: Number of latent dimensions.
        encoder: A guide with ``posterior(x) -> {site: distribution}`` and one site, such as
            ``guides.gaussian.Gaussian``.
        x_dim: Number of features of a datum.
        num_components: Number C of pseudo-inputs, where none are given.
        pseudo_inputs: Where they start, ``(C, x_dim)``.

    Raises:
        OptionError: there is no pseudo-input, or they are of another size than the data.
    """

    def __init__(
        self,
        z_dim: int,
        *,
        encoder: nn.Module,
        x_dim: int,
        num_components: int = 500,
        pseudo_inputs: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_components(num_components)
        start = torch.rand(num_components, x_dim) if pseudo_inputs is None else pseudo_inputs
        if start.dim() != 2 or start.shape[-1] != x_dim:
            raise OptionError(
                f"pseudo_inputs are rows of {x_dim} features, got shape {tuple(start.shape)}: pass "
                "some rows of the training data"
            )
        self.z_dim, self.encoder = z_dim, encoder
        self.pseudo_inputs = nn.Parameter(start.detach().clone())

    def forward(self) -> Any:
        """``p(z)``: events of shape ``(z_dim,)``."""
        encoder: Any = self.encoder
        (components,) = encoder.posterior(self.pseudo_inputs).values()
        logits = torch.zeros_like(self.pseudo_inputs[:, 0])
        normal = getattr(components, "base_dist", None)
        if isinstance(normal, torch.distributions.Normal) and len(components.event_shape) == 1:
            return DiagonalNormalMixture(logits, normal.loc, normal.scale, reparameterized=False)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)


class Flow(nn.Module):
    """``z = f(e)``, ``e ~ Normal(0, I)``, with f a normalising flow of :mod:`pvae.flows`.

    Chen et al. (2017), Variational lossy autoencoder, have the autoregressive case. ``maf``, the
    default, weighs the guide's draws in one pass.

    Args:
        z_dim: Number of latent dimensions.
        kind: maf, nsf, coupling or iaf.
        transforms: Number of transformations.
        hidden: Width of each hidden layer of a transformation's network.

    Raises:
        OptionError: no flow is called so.
    """

    def __init__(
        self,
        z_dim: int,
        *,
        kind: str = "maf",
        transforms: int = 2,
        hidden: tuple[int, ...] = (64, 64),
    ) -> None:
        super().__init__()
        self.flow = ConditionalFlow((z_dim,), kind=kind, transforms=transforms, hidden=hidden)

    def forward(self) -> Any:
        """``p(z)``: events of shape ``(z_dim,)``."""
        return self.flow()


class Hyperspherical(nn.Module):
    """``z`` uniform on the unit sphere in ``z_dim`` dimensions, for the von Mises-Fisher guide.

    Davidson et al. (2018), Hyperspherical variational auto-encoders.

    Args:
        z_dim: Number of dimensions of the space around the sphere, at least 2.

    Raises:
        OptionError: ``z_dim`` is one, and there is no sphere.
    """

    def __init__(self, z_dim: int) -> None:
        super().__init__()
        if z_dim < 2:
            raise OptionError(f"a sphere needs z_dim of at least 2, got {z_dim}")
        self.register_buffer("origin", torch.zeros(z_dim))

    def forward(self) -> HypersphericalUniform:
        """``p(z)``: events of shape ``(z_dim,)``."""
        return HypersphericalUniform(self.origin)  # type: ignore[arg-type]


PRIORS: dict[str, type[nn.Module]] = {
    "flow": Flow,
    "hyperspherical": Hyperspherical,
    "mixture": Mixture,
    "normal": Normal,
    "vamp": Vamp,
}


def named(
    prior: str | nn.Module,
    z_dim: int,
    *,
    num_components: int = 10,
    x_dim: int | None = None,
    encoder: Callable[[], nn.Module] | None = None,
) -> nn.Module:
    """The prior itself, or the one that has this name.

    Args:
        prior: A module, or one of flow, hyperspherical, mixture, normal, vamp.
        z_dim: Number of latent dimensions.
        num_components: Number of components of a mixture, or of pseudo-inputs of a VampPrior.
        x_dim: Number of features of a datum, for a VampPrior.
        encoder: Makes the encoder of a VampPrior; without it the model has no such prior.

    Raises:
        OptionError: no prior is called so, or the model does not offer it.
    """
    if isinstance(prior, nn.Module):
        return prior
    known = {name: kind for name, kind in PRIORS.items() if kind is not Vamp or encoder is not None}
    if prior not in known:
        raise OptionError(f"no prior is called {prior!r}: {did_you_mean(prior, known)}")
    takes = inspect.signature(known[prior]).parameters
    options: dict[str, Any] = {"num_components": num_components, "x_dim": x_dim}
    if "encoder" in takes and encoder is not None:
        options["encoder"] = encoder()
    return known[prior](z_dim, **{name: v for name, v in options.items() if name in takes})


def _check_components(num_components: int) -> None:
    if num_components < 1:
        raise OptionError(f"num_components must be at least 1, got {num_components}")
