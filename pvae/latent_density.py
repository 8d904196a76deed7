r"""A density fitted to the latents of training data, in the prior's place.

What a trained decoder meets is the aggregate posterior ``q(z) = 1/N sum_n q(z | x_n)``, not the
prior: samples from a density fitted to it look more like data (two-stage VAE, Dai & Wipf 2019;
ex-post density estimation, Ghosh et al. 2020). Swapping the prior gives another model of the data,
with an evidence of its own, and the fit raises its ELBO on the training data: for any density r,
``mean_n E_q[log r(z) - log p(z)]`` is what the ELBO gains.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.baselines import GaussianMixture
from pvae.data import as_batch, num_rows
from pvae.errors import OptionError, ProgramError, did_you_mean
from pvae.evidence.importance import evaluation
from pvae.evidence.sweep import tensors_of
from pvae.latents import encode, repeated
from pvae.particles import generate, inspect, latent_sites, rewritten
from pvae.seeds import mix

__all__ = ["KINDS", "LatentDensity", "fit_latent_density", "with_prior"]

KINDS = ("flow", "mixture")

_VALID = 10  # every tenth datum judges the fit
_BATCH = 256
_BLOCK = 2**12  # data drawn at once


@dataclass(frozen=True)
class LatentDensity:
    """A density of one latent site, fitted to the guide's draws on training data.

    Attributes:
        model: The generative program, with its own prior.
        guide: The inference program.
        site: The latent site.
        event_shape: Of the site.
        kind: ``"mixture"`` or ``"flow"``.
        build: Makes the distribution, events of ``event_shape``, on a device.
        history: Mean log density of the held-out draws: by iteration of the flow's fit, by number
            of components of the mixture; nats.
    """

    model: Any
    guide: Any
    site: str
    event_shape: tuple[int, ...]
    kind: str
    build: Callable[[torch.device], Any]
    history: Mapping[int, float]

    def log_prob(self, z: Any) -> Tensor:
        """``log r(z)`` of latents ``(N, *event_shape)``: ``(N,)``, nats."""
        value = torch.as_tensor(z)
        with torch.no_grad():
            found: Tensor = self.build(value.device).log_prob(value)
        return found

    def sample_latents(self, n: int, *, seed: int = 0) -> Tensor:
        """``n`` draws, ``(n, *event_shape)``, equal for equal seeds."""
        _at_least_one(n)
        device = torch.device("cpu")
        with evaluation(None, None, seed=seed, device=device):
            drawn: Tensor = self.build(device).sample((n,))
        return drawn

    def sample(self, n: int, *, seed: int = 0, like: Any = None) -> Any:
        """``n`` data drawn from the model with this density as its prior, in a batch's form.

        Args:
            n: How many.
            seed: Seed of the draws; the caller's random stream is untouched.
            like: Data of the form that the model takes, one row or n, where the model is not
                called as ``model(size=n)``, or reads more than what it observes.

        Raises:
            OptionError: ``n`` is below one, or ``like`` has another number of rows.
            ProgramError: The model does not generate.
        """
        _at_least_one(n)
        program = with_prior(self.model, self)
        example = None if like is None else repeated(like, n)
        device = _device(self.model, self.guide)
        pieces = []
        with evaluation(self.model, self.guide, seed=seed, device=device):
            for start in range(0, n, _BLOCK):
                stop = min(start + _BLOCK, n)
                rows = (
                    None if example is None else _cut(as_batch(example, device=device), start, stop)
                )
                batch, _, _ = generate(program, self.guide, stop - start, rows)
                pieces.append(batch)
        return torch.utils._pytree.tree_map(lambda *parts: torch.cat(parts).cpu(), *pieces)

    def __repr__(self) -> str:
        return f"LatentDensity({self.kind} over {self.site!r}, {self.event_shape})"


def with_prior(model: Any, density: LatentDensity) -> Any:
    """The model with ``density`` as the prior of its site: a program like any other.

    Its evidence is that of the new model: pass it to :func:`pvae.evidence.importance` with the
    guide of the old one, whose draws are as good for it.

    Raises:
        ProgramError: When it is run, the site has another shape than the density.
    """
    prior = density.build(_device(model, density.guide))

    def change(name: str, distribution: Any) -> Any:
        if name != density.site:
            return distribution
        if tuple(distribution.event_shape) != density.event_shape:
            raise ProgramError(
                f"site {name!r} has events of shape {tuple(distribution.event_shape)}, the density "
                f"is one of {density.event_shape}: fit it to latents of this model"
            )
        return prior.expand(distribution.batch_shape)

    return rewritten(model, change)


def fit_latent_density(
    model: Any,
    guide: Any,
    x: Any,
    *,
    kind: str = "mixture",
    site: str | None = None,
    num_draws: int = 4,
    n_components: int | Sequence[int] = (1, 5, 10, 20, 40),
    hidden: Sequence[int] = (64, 64),
    transforms: int = 3,
    max_epochs: int = 60,
    patience: int = 5,
    lr: float = 2e-3,
    seed: int = 0,
) -> LatentDensity:
    """Fit a mixture of Gaussians (by EM) or a normalising flow to draws of ``q(z | x_n)``.

    Draws, not posterior means: the prior has to cover what the posteriors cover. Every tenth datum
    is held out to choose the number of components, or to stop the flow (a neural spline flow,
    Durkan et al. 2019), whose best iteration is kept.

    Args:
        model: The generative program.
        guide: The inference program.
        x: Training data, N rows.
        kind: ``"mixture"`` or ``"flow"``.
        site: The latent site whose prior is to be replaced, if there are several. The priors of
            sites that follow from it stay as they are.
        num_draws: Draws per datum.
        n_components: Of the mixture: one number, or several to choose from.
        hidden: Widths of the flow's networks.
        transforms: Number of the flow's spline transforms.
        max_epochs: Passes of the flow's fit over the draws.
        patience: Passes without a better held-out density before it stops.
        lr: Its learning rate (Adam).
        seed: Of draws and fit; the caller's random stream is untouched.

    Raises:
        OptionError: An unknown kind, or a number out of its range.
        ProgramError: There is no such site, it must be named, or it does not take all real values.
    """
    if kind not in KINDS:
        raise OptionError(f"no latent density is called {kind!r}: {did_you_mean(kind, KINDS)}")
    if num_draws < 1 or max_epochs < 1 or patience < 1 or not lr > 0:
        raise OptionError(
            "num_draws, max_epochs and patience must be at least 1 and lr positive, got "
            f"{num_draws}, {max_epochs}, {patience} and {lr}"
        )
    total = num_rows(as_batch(x, model=model))
    if total < 2 * _VALID:
        raise OptionError(f"a latent density needs at least {2 * _VALID} data, got {total}")
    name = _site(model, guide, x, site)
    draws = encode(model, guide, x, num_draws=num_draws, seed=seed).draws[name]
    event_shape = tuple(draws.shape[2:])
    flat = draws.flatten(2) if event_shape else draws[..., None]
    held_out = torch.arange(flat.shape[1]) % _VALID == _VALID - 1
    train, valid = (flat[:, rows].flatten(0, 1) for rows in (~held_out, held_out))
    if kind == "mixture":
        build, history = _mixture(train, valid, n_components, seed)
    else:
        device = _device(model, guide)
        flow = _Flow(train, tuple(hidden), transforms, mix(seed, 104)).to(device)
        history = _fit_flow(
            flow, train.to(device), valid.to(device), max_epochs, patience, lr, seed
        )
        build = _mover(flow)
    if len(event_shape) != 1:
        build = _reshaped(build, flat.shape[-1], event_shape)
    return LatentDensity(model, guide, name, event_shape, kind, build, history)


def _site(model: Any, guide: Any, x: Any, wanted: str | None) -> str:
    """The site, once it is known that a density of real vectors can stand in its prior's place."""
    device = _device(model, guide)
    rows = _cut(as_batch(x, device=device, model=model), 0, 2)
    with evaluation(model, guide, seed=0, device=device):
        layout = inspect(model, guide, rows)
        sites = latent_sites(model, guide, rows, 2, layout)
    if wanted is None and len(sites) != 1:
        raise ProgramError(
            f"the model has the latent sites {', '.join(sites) or 'of no datum'}: say which one's "
            "prior is to be replaced, by site="
        )
    name = next(iter(sites)) if wanted is None else wanted
    if name not in sites:
        raise ProgramError(f"no latent site is called {name!r}: {did_you_mean(name, sites)}")
    prior = sites[name].prior
    if math.prod(prior.batch_shape) != 4:  # two draws of two data
        raise ProgramError(f"site {name!r} lies in a plate of its own: its prior is not replaced")
    support = prior.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if not isinstance(support, type(torch.distributions.constraints.real)):
        raise ProgramError(
            f"site {name!r} ({type(prior).__name__}) does not take all real values, so no mixture "
            "of Gaussians or flow can be its prior"
        )
    return name


def _mixture(
    train: Tensor, valid: Tensor, n_components: int | Sequence[int], seed: int
) -> tuple[Callable[[torch.device], Any], dict[int, float]]:
    fitted = GaussianMixture(n_components, seed=seed).fit(train, valid)
    weights, means = fitted.weights.to(train), fitted.means.to(train)
    factors = torch.linalg.cholesky(fitted.covariances).to(train)
    history = fitted.selection or {fitted.chosen: float(fitted.score_samples(valid).mean())}

    def build(device: torch.device) -> Any:
        components = dist.MultivariateNormal(means.to(device), scale_tril=factors.to(device))
        return dist.MixtureSameFamily(dist.Categorical(probs=weights.to(device)), components)

    return build, {int(size): float(value) for size, value in history.items()}


class _Flow(nn.Module):
    """A neural spline flow of standardised rows, whose splines act within five deviations."""

    shift: Tensor
    scale: Tensor

    def __init__(self, x: Tensor, hidden: tuple[int, ...], transforms: int, seed: int) -> None:
        super().__init__()
        import zuko

        scale, shift = torch.std_mean(x, 0)
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale.clamp(min=1e-6))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            flow = zuko.flows.NSF(x.shape[1], transforms=transforms, hidden_features=hidden)
        self.flow = flow.to(x)

    def log_prob(self, z: Tensor) -> Tensor:
        """``(*, L) -> (*,)``, nats."""
        value: Tensor = self.flow().log_prob((z - self.shift) / self.scale)
        return value - self.scale.log().sum()

    def draw(self, shape: torch.Size) -> Tensor:
        """``shape + (L,)``."""
        value: Tensor = self.flow().sample(shape)
        return value * self.scale + self.shift


class _FlowPrior(dist.TorchDistribution):  # type: ignore[misc]
    """The flow as a distribution of Pyro's, independent over its batch."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, flow: _Flow, batch_shape: Any = torch.Size()) -> None:  # noqa: B008
        self.flow = flow
        super().__init__(torch.Size(batch_shape), flow.shift.shape, validate_args=False)

    @property
    def support(self) -> Any:
        """All real vectors."""
        return torch.distributions.constraints.real_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> _FlowPrior:
        """The same distribution with a larger batch shape."""
        return _FlowPrior(self.flow, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """``(*, L) -> (*,)``, nats."""
        log_prob = self.flow.log_prob(value)
        return torch.broadcast_to(log_prob, _broadcast(log_prob.shape, self.batch_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``sample_shape + batch_shape + (L,)``."""
        with torch.no_grad():
            return self.flow.draw(torch.Size(sample_shape) + self.batch_shape)


def _fit_flow(
    flow: _Flow,
    train: Tensor,
    valid: Tensor,
    max_epochs: int,
    patience: int,
    lr: float,
    seed: int,
) -> dict[int, float]:
    """Maximum likelihood by Adam; the flow is left at its best held-out density."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(mix(seed, 105))
    history: dict[int, float] = {}
    best, kept = -math.inf, copy.deepcopy(flow.state_dict())
    for epoch in range(1, max_epochs + 1):
        with torch.enable_grad():
            order = torch.randperm(len(train), generator=generator).to(train.device)
            for rows in torch.split(order, _BATCH):
                optimizer.zero_grad()
                loss = -flow.log_prob(train[rows]).mean()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        with torch.no_grad():
            parts = [flow.log_prob(rows).double() for rows in torch.split(valid, _BLOCK)]
        history[epoch] = float(torch.cat(parts).mean())
        if history[epoch] > best:
            best, kept = history[epoch], copy.deepcopy(flow.state_dict())
        if epoch - max(history, key=lambda each: history[each]) >= patience:
            break
    flow.load_state_dict(kept)
    flow.requires_grad_(False)
    return history


def _mover(flow: _Flow) -> Callable[[torch.device], Any]:
    def build(device: torch.device) -> Any:
        here = flow if flow.shift.device == device else copy.deepcopy(flow).to(device)
        return _FlowPrior(here)

    return build


def _reshaped(
    build: Callable[[torch.device], Any], size: int, shape: tuple[int, ...]
) -> Callable[[torch.device], Any]:
    transform = torch.distributions.ReshapeTransform(torch.Size((size,)), torch.Size(shape))
    return lambda device: dist.TransformedDistribution(build(device), [transform])


def _broadcast(*shapes: Any) -> torch.Size:
    return torch.Size(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _device(model: Any, guide: Any) -> torch.device:
    return next((t.device for t in tensors_of(model, guide)), torch.device("cpu"))


def _cut(batch: Any, start: int, stop: int) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf[start:stop], batch)


def _at_least_one(n: int) -> None:
    if n < 1:
        raise OptionError(f"n must be at least 1, got {n}")
