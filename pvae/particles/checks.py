"""What a pair is refused for when it is first looked at."""

from __future__ import annotations

from typing import Any

from pyro.distributions import constraints

from pvae.errors import ProgramError
from pvae.particles.densities import attempted_log_prob
from pvae.particles.plates import count_data
from pvae.particles.running import reason, replay, run_guide
from pvae.particles.supports import base_family, in_words, support_of
from pvae.particles.traces import in_braces, latent_nodes, random_nodes, values_to_replay
from pvae.particles.types import Batch, Layout, Program

__all__ = ["check_latent_supports", "check_shapes", "check_sites", "check_vectorized"]


def check_sites(model_trace: Any, guide_trace: Any) -> None:
    """Model and guide must name the same latent sites, and the model observe something."""
    latents, drawn = latent_nodes(model_trace), latent_nodes(guide_trace)
    if not latents:
        raise ProgramError(
            "the model has no latent site: give it at least one pyro.sample without obs"
        )
    if len(latents) == len(random_nodes(model_trace)):
        raise ProgramError("the model has no observed site: pass obs=x to one of its pyro.sample")
    auxiliary = {n for n, node in drawn.items() if node["infer"].get("is_auxiliary")}
    missing = [n for n in latents if n not in drawn]
    extra = [n for n in drawn if n not in latents and n not in auxiliary]
    if missing and all(latents[n]["infer"].get("enumerate") for n in missing):
        raise ProgramError(
            f"the guide does not draw {in_braces(missing)}, which the model enumerates: train with "
            "objective=pyro.infer.TraceEnum_ELBO(), or draw them in the guide"
        )
    if missing:
        raise ProgramError(
            f"guide draws sites {in_braces(drawn)} but the model has latents {in_braces(latents)}: "
            f"add {', '.join(map(repr, missing))} to the guide or pass latents=model.latents"
        )
    if extra:
        raise ProgramError(
            f"guide draws {in_braces(extra)}, which the model (latents {in_braces(latents)}) "
            "lacks: remove it from the guide or mark it infer={'is_auxiliary': True}"
        )


def check_shapes(model_trace: Any, guide_trace: Any) -> None:
    """Both must draw values of the same shape, with the same dimensions of one event."""
    for name, node in latent_nodes(model_trace).items():
        expected, came = tuple(node["value"].shape), tuple(guide_trace.nodes[name]["value"].shape)
        if expected != came:
            raise ProgramError(
                f"site {name!r}: the model expects values of shape {expected}, the guide draws "
                f"{came}: give both the same size (and the same plates)"
            )
        event_dim = node["fn"].event_dim
        guide_dim = guide_trace.nodes[name]["fn"].event_dim
        if event_dim != guide_dim:
            raise ProgramError(
                f"site {name!r}: the model treats its last {event_dim} dimensions as one event, "
                f"the guide its last {guide_dim}: add .to_event({event_dim}) in the guide"
            )


def check_latent_supports(model_trace: Any, guide_trace: Any) -> None:
    """The guide's draws must be possible under the model: integers, positive numbers, ..."""
    for name, node in latent_nodes(model_trace).items():
        _check_latent_support(name, node["fn"], guide_trace.nodes[name])


def _check_latent_support(name: str, prior: Any, drawn: Any) -> None:
    try:
        support = prior.support
    except NotImplementedError:
        return
    families = type(base_family(prior)).__name__, type(base_family(drawn["fn"])).__name__
    own = support_of(drawn["fn"])
    if support is None or bool(support.check(drawn["value"]).all()):
        if support in _SURFACES or getattr(support, "is_discrete", False) or own not in _SURFACES:
            return
        raise ProgramError(
            f"site {name!r}: the guide ({families[1]}) draws on {in_words(own)}, a surface in the "
            f"space of the model's {families[0]}, so their densities cannot be compared: use a "
            "guide of the model's support, or a prior of the guide's"
        )
    raise ProgramError(
        f"site {name!r}: the model ({families[0]}) takes values in {in_words(support)}, the guide "
        f"({families[1]}) draws values outside it: use a guide of that support"
    )


_SURFACES = (constraints.sphere, constraints.simplex)  # of no volume in the space around them


def check_vectorized(model: Program, guide: Program, batch: Batch, layout: Layout) -> None:
    """Two particles at once: the shapes must come out as ``(2, B)`` at every site."""
    num_particles = 2 if layout.vectorize else 1
    remedy = "write it so that a leading particle dimension passes through, or pass vectorize=False"
    try:
        guide_trace = run_guide(guide, batch, num_particles, layout, detach=False)
        values = values_to_replay(guide_trace)
        model_trace = replay(model, batch, values, num_particles, layout)
    except Exception as error:
        raise ProgramError(
            f"the programs do not run with {num_particles} particles at once "
            f"({reason(error)}): {remedy}"
        ) from error
    for role, trace in (("model", model_trace), ("guide", guide_trace)):
        _check_terms(role, trace, layout, num_particles, count_data(model_trace, layout, batch))


def _check_terms(role: str, trace: Any, layout: Layout, num_particles: int, rows: int) -> None:
    for name, node in random_nodes(trace).items():
        if name in layout.outside:
            continue
        shape = tuple(attempted_log_prob(role, node).shape)
        excess = len(shape) + layout.particle_dim
        at_data = shape[layout.data_dim] if len(shape) >= -layout.data_dim else 1
        if excess > 0 or at_data not in (1, rows):
            raise ProgramError(
                f"{role} site {name!r} has a log density of shape {shape}, which does not end in "
                f"the data dimension of size {rows}: add .to_event(n) for its own dimensions, or a "
                "plate"
            )
        if name in layout.latents and at_data != rows:
            raise ProgramError(
                f"{role} site {name!r} is one value for all {rows} data: draw it inside the "
                '"data" plate, one per datum'
            )
