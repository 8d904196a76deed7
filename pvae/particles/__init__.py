"""The waist: a model and a guide, run on a batch, become log importance weights ``(K, B)``.

Everything above this package is a pure function of :class:`Particles`; this package alone knows
Pyro's handlers. Plate and ``poutine.scale`` factors are kept apart, so that they multiply a
datum's bound and never enter a logarithm. Its modules, each importing only from those before it::

    types          particles, layout, gate
    batches        what a program is called with
    traces         what it leaves behind: sites, values, plates, masks
    supports       the values a site may take
    running        a program under handlers: with K particles, at given values
    plates         the plate that indexes the data
    densities      a trace's log densities as (K, B)
    checks         what a pair is refused for when it is first looked at
    inspection     a pair looked at once: its layout
    reading        a model read alone
    ownership      parameters, and the program they belong to
    programs       one program's draws, densities and distributions
    simulation     data drawn in a batch's form; dreams
    weighing       two traces become particles
    choosing       a few particles of each datum, weighed with their gradients
    drawing        a pair run on a batch, every step
    unconstrained  latents as one flat vector of free numbers
    generation     data a model draws by itself, with their exact posterior draws
"""

from pvae.particles.batches import arguments, leading_size, tensors_of
from pvae.particles.drawing import draw, glance, latent_sites
from pvae.particles.generation import generate
from pvae.particles.inspection import check_follows, inspect
from pvae.particles.ownership import module_of, named_tensors, owned, parameters
from pvae.particles.plates import plate_scale
from pvae.particles.programs import (
    log_guide,
    log_joint,
    observed_families,
    observed_sites,
    prior_of,
    rewritten,
    sample_guide,
    site_priors,
)
from pvae.particles.reading import ModelSite, read_dependencies, read_model
from pvae.particles.running import attempt, quiet, reason
from pvae.particles.simulation import check_dreams, sample_observed, simulate
from pvae.particles.supports import base_family, check_support, support_of
from pvae.particles.types import (
    Batch,
    Chosen,
    Gate,
    LatentSite,
    Layout,
    Particles,
    Program,
    Relaxed,
    Scale,
    by_datum,
    by_program,
    sum_terms,
)
from pvae.particles.unconstrained import check_continuous, path_ends, unconstrain

__all__ = [
    "Batch",
    "Chosen",
    "Gate",
    "LatentSite",
    "Layout",
    "ModelSite",
    "Particles",
    "Program",
    "Relaxed",
    "Scale",
    "arguments",
    "attempt",
    "base_family",
    "by_datum",
    "by_program",
    "check_continuous",
    "check_dreams",
    "check_follows",
    "check_support",
    "draw",
    "generate",
    "glance",
    "inspect",
    "latent_sites",
    "leading_size",
    "log_guide",
    "log_joint",
    "module_of",
    "named_tensors",
    "observed_families",
    "observed_sites",
    "owned",
    "parameters",
    "path_ends",
    "plate_scale",
    "prior_of",
    "quiet",
    "read_dependencies",
    "read_model",
    "reason",
    "rewritten",
    "sample_guide",
    "sample_observed",
    "simulate",
    "site_priors",
    "sum_terms",
    "support_of",
    "tensors_of",
    "unconstrain",
]
