"""Objectives: a bound, a gradient estimator and a KL weight, for any pair.

An :class:`Objective` is never a model: beta-VAE, IWAE, DReG and annealing are one line each.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from numbers import Integral, Real
from typing import Any

import pyro
import torch
from pyro.params import param_with_module_name
from pyro.poutine.messenger import unwrap
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd as _Dropout

from pvae.bounds import RenyiBound, check_bound, elbo
from pvae.errors import ObjectiveError
from pvae.gradients import Gradient, Terms, pathwise, stick_the_landing
from pvae.kl_terms import FreeBits, KLTerm
from pvae.particles import (
    Layout,
    Particles,
    arguments,
    attempt,
    check_dreams,
    draw,
    glance,
    inspect,
    leading_size,
    module_of,
    plate_scale,
    quiet,
    reason,
    sum_terms,
    tensors_of,
)
from pvae.penalties import Penalty
from pvae.schedules import Schedule, as_schedule

__all__ = ["Loss", "Objective", "PyroObjective", "as_objective"]


@dataclass(frozen=True)
class Loss:
    """One evaluation of an objective on a batch.

    Attributes:
        loss: ``()``, minus the mean bound per datum, and the penalty if there is one;
            differentiate this.
        bound: ``(B,)`` the quoted bound at the current KL weight, nats per datum; terms of sites
            shared by all data are in the loss alone.
        elbo: ``(B,)`` the ELBO at KL weight one.
        reconstruction: ``(B,)`` mean over particles of ``log p(x|z)``.
        kl: ``(B,)`` mean over particles of ``log q(z|x) - log p(z)``, or its closed form.
        log_weights: ``(K, B)``, for finding what went wrong; ``None`` for Pyro's own ELBOs.
    """

    loss: Tensor
    bound: Tensor
    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor
    particles: Particles | None = None


@dataclass(frozen=True)
class Objective:
    r"""A bound on the log evidence, with the estimator of its gradient.

    The quoted value is ``bound(log w)`` with
    ``log w = log p(x|z) + beta (log p(z) - log q(z|x))``, per datum, in nats; positive is better.

    Args:
        bound: ``(K, B) -> (B,)``; see :mod:`pvae.bounds`.
        gradient: How it is differentiated; see :mod:`pvae.gradients`.
        num_particles: K.
        beta: Weight of the KL, a number or a schedule ``step -> weight``.
        free_bits: Nats below which a latent site's KL costs nothing (ELBO only).
        kl_term: What the KL costs instead of ``beta * KL`` (ELBO only); see :mod:`pvae.kl_terms`.
        penalty: Added to the loss, not to the quoted bound; see :mod:`pvae.penalties`.
        analytic_kl: Use the closed form of each site's KL where Pyro knows it (ELBO only).
        data_plate: Name of the plate that indexes the data, where several could.
        vectorize: Run all particles at once.

    Raises:
        ObjectiveError: The combination is unsound; the message names the alternative.
    """

    bound: Callable[[Tensor], Tensor] = elbo
    gradient: Gradient = pathwise
    num_particles: int = 1
    beta: float | Schedule = 1.0
    free_bits: float = 0.0
    kl_term: KLTerm | None = None
    penalty: Penalty | None = None
    analytic_kl: bool = False
    data_plate: str | None = None
    vectorize: bool = True
    _seen: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.num_particles, Integral) or self.num_particles < 1:
            raise ObjectiveError(
                f"num_particles must be a whole number of at least 1, got {self.num_particles!r}"
            )
        is_schedule = callable(self.beta) and not isinstance(self.beta, type)
        if not is_schedule and not (isinstance(self.beta, Real) and 0 <= self.beta < inf):
            raise ObjectiveError(
                "beta must be finite and not negative, or a schedule step -> such a number, got "
                f"{self.beta!r}"
            )
        self._check_kinds()
        check_bound(self.bound, self.num_particles)
        self.gradient.check(self.bound, self.num_particles)
        if not self.gradient.tempers and self.beta != 1:
            raise ObjectiveError(
                f"{self.gradient!r} follows the posterior of the model as it is, got beta="
                f"{self.beta!r}: leave beta at 1, or use gradient=score_function"
            )
        self._check_terms()
        if self.analytic_kl and not (self.additive and self.gradient == pathwise):
            raise ObjectiveError(
                "analytic_kl holds for bound=elbo with gradient=pathwise, got "
                f"{self.bound!r} with {self.gradient!r}: use analytic_kl=False"
            )

    def _check_kinds(self) -> None:
        """A word, or a function that was not called, is no part of an objective."""
        kinds = {"gradient": Gradient, "kl_term": KLTerm | None, "penalty": Penalty | None}
        for name, kind in kinds.items():
            found = getattr(self, name)
            if not isinstance(found, kind):
                module = {"gradient": "gradients", "kl_term": "kl_terms", "penalty": "penalties"}
                raise ObjectiveError(
                    f"{name} is one of pvae.{module[name]}, with its arguments where it takes any, "
                    f"got {found!r}"
                )

    def _check_terms(self) -> None:
        """Terms of the KL and penalties want the ELBO, or draws that can be differentiated."""
        plain = self.additive and self.gradient in (pathwise, stick_the_landing)
        if self.free_bits and self.kl_term is not None:
            raise ObjectiveError(
                f"free_bits is a kl_term of its own, got kl_term={self.kl_term!r} as well: leave "
                "one of them out"
            )
        if self._term is not None and not plain:
            name = "free_bits" if self.free_bits else f"kl_term={self.kl_term!r}"
            raise ObjectiveError(
                f"{name} holds for bound=elbo with gradient=pathwise or stick_the_landing, got "
                f"{self.bound!r} with {self.gradient!r}"
            )
        if self.kl_term is not None and self.kl_term.steers and self.beta != 1:
            raise ObjectiveError(
                f"{self.kl_term!r} has a schedule of its own, got beta={self.beta!r}: leave beta "
                "at 1"
            )
        if self.penalty is not None and not (self.gradient.has_path and self.vectorize):
            raise ObjectiveError(
                f"{self.penalty!r} is differentiated through the draws of all particles at once, "
                f"got {self.gradient!r} with vectorize={self.vectorize}: use gradient=pathwise"
            )

    @property
    def _term(self) -> KLTerm | None:
        return FreeBits(self.free_bits) if self.free_bits else self.kl_term

    @property
    def additive(self) -> bool:
        """Whether the bound is linear in log w, as only the ELBO is."""
        return isinstance(self.bound, RenyiBound) and self.bound.additive

    @property
    def schedule(self) -> Schedule:
        """The KL weight as a function of the step, or what the KL's term has in its place."""
        term = self.kl_term
        return term.schedule if term is not None and term.steers else as_schedule(self.beta)

    def parameters(self) -> dict[str, Any]:
        """What the objective learns by itself (a discriminator), after :meth:`prepare`."""
        return {
            f"objective.{role}.{name}": parameter
            for role, network in self._networks().items()
            for name, parameter in network.named_parameters()
        }

    def _networks(self) -> dict[str, torch.nn.Module]:
        of_penalty = {} if self.penalty is None else self.penalty.networks()
        return of_penalty | self.gradient.networks()

    def prepare(self, model: Any, guide: Any, batch: Any) -> Layout:
        """Look at a pair once: its layout, refused where the objective is unsound for it.

        Raises:
            ProgramError: The programs do not fit each other.
            ObjectiveError: They fit, but not this objective.
        """
        layout = inspect(model, guide, batch, data_plate=self.data_plate, vectorize=self.vectorize)
        self.gradient.check_pair(layout)
        if layout.globals and not self.additive:
            raise ObjectiveError(
                f"site {layout.globals[0]!r} is shared by all data, and {self.bound!r} does not "
                "add up over data: use bound=elbo, or move the site inside the data plate"
            )
        for name in self.gradient.score_sites(layout) & set(layout.globals):
            raise ObjectiveError(
                f"site {name!r} is shared by all data, and {self.gradient!r} rewards each datum on "
                "its own: use gradient=pathwise, or mixed where only local sites are discrete"
            )
        if layout.globals and self.kl_term is not None and self.kl_term.steers:
            raise ObjectiveError(
                f"site {layout.globals[0]!r} is shared by all data, and {self.kl_term!r} counts "
                "the KL of each datum's own sites: use beta="
            )
        if self._term is not None and not self._term.steers:
            self._refuse_shared_kl(model, guide, batch, layout)
        if self.gradient.dreams:
            check_dreams(model, batch)
            self._check_weight_of_dreams(model, guide, batch, layout)
        if self.penalty is not None:
            sites = glance(model, guide, batch, layout)
            self.penalty.check(sites, layout)
            self.penalty.start(sites)
        if self.gradient.learns:
            self.gradient.start(glance(model, guide, batch, layout))
        if self.gradient.rescores and len(layout.event_dims) > 1:
            self._refuse_layers(guide, "weighs a guide of several sites twice", _Dropout)
        if self.gradient.reruns:
            self._refuse_layers(model, "runs the model twice", _Dropout, _BatchNorm)
        return layout

    def _refuse_shared_kl(self, model: Any, guide: Any, batch: Any, layout: Layout) -> None:
        """A density of the guide alone is part of no single site's KL."""
        with quiet(batch):
            particles = draw(model, guide, batch, 1, layout=layout)
        known = {*particles.log_p, *particles.global_log_p}
        for name in (*particles.log_q, *particles.global_log_q):
            if name not in known:
                raise ObjectiveError(
                    f"site {name!r} is the guide's own and its density belongs to several sites' "
                    f"KL, which {self._term!r} looks at one by one: use beta="
                )

    def _refuse_layers(self, program: Any, why: str, *kinds: type) -> None:
        """Layers whose outputs would differ between two runs."""
        module = module_of(program)
        for name, part in () if module is None else module.named_modules():
            if isinstance(part, kinds) and getattr(part, "p", 1.0) > 0:
                raise ObjectiveError(
                    f"{self.gradient!r} {why}, and {type(part).__name__} ({name!r}) would differ "
                    "between the two: use gradient=pathwise"
                )

    def _check_weight_of_dreams(self, model: Any, guide: Any, batch: Any, layout: Layout) -> None:
        """A guide that never draws what the model dreams of would learn from minus infinity."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            dreams = draw(model, guide, batch, 1, layout=layout, dream=True).dreams
        if dreams is not None and not bool(torch.isfinite(dreams).all()):
            raise ObjectiveError(
                f"the guide gives latents that the model draws no density, so {self.gradient!r} "
                "cannot teach it by them: use gradient=pathwise or wake_phi"
            )

    def evaluate(
        self,
        model: Any,
        guide: Any,
        batch: Any,
        *,
        layout: Layout,
        beta: Any = 1.0,
        num_data: int | None = None,
        penalise: bool = True,
    ) -> Loss:
        """The objective on one batch, with everything that is logged about it.

        Args:
            model: The generative program.
            guide: The inference program.
            batch: As for :func:`pvae.draw`.
            layout: From :meth:`prepare`.
            beta: KL weight at this step.
            num_data: N, by which global sites are divided; the batch's own size if ``None``.
            penalise: Whether the loss has its penalty, which the bound never has.
        """
        penalised = penalise and self.penalty is not None
        wanted = {"analytic_kl": self.analytic_kl, "sites": penalised}
        options = {name: True for name, want in wanted.items() if want}
        particles = self.gradient.draw(
            model, guide, batch, self.num_particles, layout=layout, **options
        )
        self._check_particles(particles)
        factor = _relative(particles.scale, particles.plate_scale)
        surrogate = self._surrogate(particles, layout, beta)
        steered = self.kl_term is not None and self.kl_term.steers
        weight = 1.0 if steered else beta
        quoted = self._quoted(particles, weight)
        inner = particles.inner_scale
        kl = _times(inner, "q", self._site_kl(particles, particles.log_q))
        reconstruction = sum_terms(_times(inner, "p", particles.likelihood)).mean(0)
        total_kl = sum_terms(kl).mean(0)
        per_datum = (factor * surrogate).mean() + self._globals(particles, beta, num_data)
        value = (factor * quoted).mean() + self._globals(particles, beta, num_data)
        loss = -(per_datum - per_datum.detach() + value.detach())
        if self.penalty is not None and particles.sites is not None:
            rows = particles.shape[1] * particles.plate_scale
            penalty = self.penalty(
                particles.sites, weight, num_data if num_data is not None else rows
            )
            loss = loss + torch.as_tensor(factor).mean() * penalty
        return Loss(
            loss=loss,
            bound=quoted.detach(),
            elbo=(reconstruction - total_kl).detach(),
            reconstruction=reconstruction.detach(),
            kl=total_kl.detach().expand_as(reconstruction),
            particles=particles,
        )

    def _check_particles(self, particles: Particles) -> None:
        """Refuse factors inside a logarithm, which a pair's layout does not tell."""
        if particles.relative_scale and (not self.additive or self.gradient.weighs):
            role, site = next(iter(particles.relative_scale))
            if (role, site) in particles.inner_scale:
                raise ObjectiveError(
                    f"site {site!r} is in a plate that picks a part of each datum, which "
                    f"{self.bound!r} with {self.gradient!r} cannot make up for outside a "
                    "logarithm: use bound=elbo with another gradient, or let the plate span all "
                    "of it"
                )
            raise ObjectiveError(
                f"site {site!r} has a poutine.scale of its own, which {self.bound!r} with "
                f"{self.gradient!r} cannot honour outside a logarithm: use beta= for a KL weight, "
                "or bound=elbo with another gradient"
            )

    def _site_kl(self, particles: Particles, log_q: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each latent site's KL, ``(K, B)``; auxiliary guide sites count with ``log q``."""
        if particles.kl is not None:
            return particles.kl
        log_p = particles.log_p
        return {n: term - log_p[n] if n in log_p else term for n, term in log_q.items()}

    def _quoted(self, particles: Particles, beta: Any) -> Tensor:
        if particles.kl is not None:
            kl = sum_terms(_scaled(particles, "q", particles.kl))
        else:
            prior = sum_terms(_scaled(particles, "p", particles.prior))
            kl = sum_terms(_scaled(particles, "q", particles.log_q)) - prior
        likelihood = sum_terms(_scaled(particles, "p", particles.likelihood))
        value: Tensor = self.bound(likelihood - beta * kl)
        return value

    def _surrogate(self, particles: Particles, layout: Layout, beta: Any) -> Tensor:
        weight = None
        if (chosen := particles.chosen) is not None:
            weight, own = chosen.weight, ("log_p", "log_q", "score")
            particles = replace(particles, **{name: getattr(chosen, name) for name in own})
        log_q = _scaled(particles, "q", particles.log_q)
        held = self._held(particles)
        if particles.kl is not None or self._term is not None:
            kl = _scaled(particles, "q", self._site_kl(particles, held or particles.log_q))
            return self._elbo(particles, kl, beta)
        likelihood = sum_terms(_scaled(particles, "p", particles.likelihood))
        prior = sum_terms(_scaled(particles, "p", particles.prior))
        score_sites = self.gradient.score_sites(layout)
        terms = Terms(
            log_joint=likelihood + beta * prior,
            log_q=sum_terms(log_q),
            held=None if held is None else sum_terms(_scaled(particles, "q", held)),
            score=sum_terms({n: t for n, t in particles.log_q.items() if n in score_sites}),
            dreams=particles.dreams,
            relaxed=particles.relaxed,
            sites=particles.sites,
            weight=weight,
        )
        return self.gradient.surrogate(self.bound, terms, beta, particles.gate)

    def _held(self, particles: Particles) -> dict[str, Tensor] | None:
        """``log q`` with the guide's parameters held: the value minus its score."""
        if particles.score is None:
            return None
        score = particles.score
        return {
            n: t - (score[n] - score[n].detach()) if n in score else t
            for n, t in particles.log_q.items()
        }

    def _elbo(self, particles: Particles, kl: dict[str, Tensor], beta: Any) -> Tensor:
        reconstruction = sum_terms(_scaled(particles, "p", particles.likelihood)).mean(0)
        cost = beta * sum_terms(kl).mean(0) if self._term is None else self._term(kl, beta)
        value: Tensor = reconstruction - cost
        return value

    def _globals(self, particles: Particles, beta: Any, num_data: int | None) -> Any:
        """The share of one datum in the terms outside the data plate, a scalar."""
        if not particles.global_log_p and not particles.global_log_q:
            return 0.0
        total: Any = 0.0
        scale = particles.global_scale
        for name, term in particles.global_log_p.items():
            weight = scale["p", name] * (1.0 if name in particles.observed else beta)
            total = total + weight * term
        for name, term in particles.global_log_q.items():
            total = total - scale["q", name] * beta * term
        rows = particles.shape[1] * particles.plate_scale
        return total.mean() / (num_data if num_data is not None else rows)

    def __call__(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss that ``pyro.infer.SVI`` minimises: minus the bound, summed and scaled.

        ``-sum_b scale_b * bound_b``, as Pyro's own ELBOs count it. Plain modules are registered
        with Pyro's parameter store on the way, since SVI trains what is there.
        """
        pair, batch = (model, guide), args if args else kwargs
        if args and kwargs:
            model, guide = (functools.partial(program, **kwargs) for program in pair)
        state = self._state(pair, model, guide, batch)
        for program in pair:
            module = module_of(program)
            registers_itself = isinstance(module, pyro.nn.PyroModule) and unwrap(program) is module
            if module is not None and not registers_itself:
                _register(module)
        for network in self._networks().values():
            _register(network)
        loss = self.evaluate(
            model, guide, batch, layout=state["layout"], beta=self.schedule(state["step"])
        )
        if torch.is_grad_enabled():
            state["step"] += 1
        particles = loss.particles
        rows = particles.shape[1] if particles is not None else loss.bound.shape[0]
        return loss.loss * rows * (particles.plate_scale if particles is not None else 1.0)

    def _state(self, pair: Any, model: Any, guide: Any, batch: Any) -> dict[str, Any]:
        if pair not in self._seen:
            layout = self.prepare(model, guide, batch)
            self._seen[pair] = {"layout": layout, "step": 0}
        state: dict[str, Any] = self._seen[pair]
        return state


_STORE_NAMES: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
_STORE_COUNT = iter(range(10**9))


def _store_name(module: torch.nn.Module) -> str:
    """A name in Pyro's store that no other module of this process ever has."""
    if module not in _STORE_NAMES:
        _STORE_NAMES[module] = f"pvae.{type(module).__name__}.{next(_STORE_COUNT)}"
    return _STORE_NAMES[module]


def _register(module: torch.nn.Module) -> None:
    """What ``pyro.module`` does, without its warning about parameters that are frozen."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            pyro.param(param_with_module_name(_store_name(module), name), parameter)


def _relative(scale: Any, plate_scale: float) -> Any:
    """``poutine.scale`` alone: what is left of the common factor without the data plate's N/B."""
    return scale / plate_scale


def _scaled(particles: Particles, role: str, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Terms times their own factor where it differs from the common one."""
    return _times(particles.relative_scale, role, terms)


def _times(
    factors: Mapping[tuple[str, str], Any], role: str, terms: dict[str, Tensor]
) -> dict[str, Tensor]:
    if not factors:
        return terms
    return {n: t * factors[role, n] if (role, n) in factors else t for n, t in terms.items()}


@dataclass(frozen=True)
class PyroObjective:
    """One of ``pyro.infer``'s own ELBOs behind the interface of :class:`Objective`.

    Only the total is known then: reconstruction and KL are not told apart.
    """

    elbo: Any
    _full_size: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    @property
    def schedule(self) -> Schedule:
        """Pyro's ELBOs have no KL weight: one."""
        return as_schedule(1.0)

    def parameters(self) -> dict[str, Any]:
        """They learn nothing by themselves."""
        return {}

    def prepare(self, model: Any, guide: Any, batch: Any) -> None:
        """N, and whether Pyro can differentiate its loss of this pair.

        Raises:
            ProgramError: The model or the guide fails on the batch.
            ObjectiveError: Pyro's loss of the pair fails.
        """
        scale = plate_scale(model, batch)
        self._full_size.clear()
        if scale != 1:  # Pyro scales its loss to N, whatever the batch
            self._full_size["data"] = scale * leading_size(batch)
        args, kwargs = arguments(batch)
        with quiet(batch):
            attempt("guide", guide, batch)
        try:
            with quiet(batch), torch.enable_grad():
                self.elbo.differentiable_loss(model, guide, *args, **kwargs)
        except Exception as error:
            raise ObjectiveError(
                f"{type(self.elbo).__name__} failed on the batch ({reason(error)}): give it the "
                "options that it asks for, or use pvae.vae(), which says more"
            ) from error

    def evaluate(
        self,
        model: Any,
        guide: Any,
        batch: Any,
        *,
        layout: Any = None,
        beta: Any = 1.0,
        num_data: int | None = None,
        penalise: bool = True,
    ) -> Loss:
        """Pyro's differentiable loss over the number of data it counts: the mean per datum."""
        args, kwargs = arguments(batch)
        rows = leading_size(batch)
        if torch.is_grad_enabled():
            total = self.elbo.differentiable_loss(model, guide, *args, **kwargs)
        else:  # differentiable_loss of TraceEnum_ELBO refuses what has no gradient
            device = next(tensors_of(batch)).device
            total = torch.as_tensor(
                self.elbo.loss(model, guide, *args, **kwargs), dtype=torch.float64, device=device
            )
        loss = total / self._full_size.get("data", rows)
        bound = -loss.detach().expand(rows)
        unknown = torch.full_like(bound, float("nan"))
        return Loss(loss=loss, bound=bound, elbo=bound, reconstruction=unknown, kl=unknown)


def as_objective(objective: Any) -> Objective | PyroObjective:
    """An Objective as it is; a ``pyro.infer`` ELBO behind the same interface.

    Raises:
        ObjectiveError: it is neither.
    """
    if isinstance(objective, (Objective, PyroObjective)):
        return objective
    if isinstance(objective, pyro.infer.ReweightedWakeSleep):
        raise ObjectiveError(
            "pyro.infer.ReweightedWakeSleep has two losses and no differentiable one: use "
            "pvae.rws() or pvae.wake_sleep()"
        )
    if isinstance(objective, pyro.infer.RenyiELBO):
        raise ObjectiveError(
            "pyro.infer.RenyiELBO weighs a batch as one datum and has no differentiable loss: use "
            f"pvae.renyi_vae({objective.alpha:g}, num_particles={objective.num_particles})"
        )
    if isinstance(objective, pyro.infer.ELBO):
        if not hasattr(objective, "differentiable_loss"):
            raise ObjectiveError(
                f"{type(objective).__name__} has no differentiable loss: use pvae.vae(), or "
                "pvae.vae(2, gradient=pvae.gradients.mixed) where a site is discrete"
            )
        return PyroObjective(objective)
    raise ObjectiveError(
        f"objective must be a pvae.Objective or a pyro.infer ELBO, got {objective!r}: try "
        "pvae.vae()"
    )
