"""One optimisation step made fast: noise, loss, gradients, guard, update.

Ways to take it, behind one call ``step(index, step, beta) -> metrics``:

- ``eager``: Pyro's handlers run at every step. Works for every pair.
- ``staged``: model, guide, gradients and optimiser are traced once, through Pyro's handlers, into
  one graph of tensor operations, which is then run as it is.
- ``compiled``: that graph compiled by Inductor.
- ``cudagraph``: that, recorded once on a CUDA device and replayed without any Python.
- ``auto``: measures a few eager steps, then takes the one that pays over the whole run.

Whatever cannot be staged is run eagerly, with the reason said once. Randomness comes from
``(seed, step)`` alone, so that a step can be repeated, to find out what went wrong or to continue
a run. In this package: ``problem`` (what a step is about), ``eager``, ``staged`` with ``updates``
(the optimiser inside the graph), ``choice`` among them, and ``optimizers`` by name.
"""

from pvae.engine.choice import Auto, stage
from pvae.engine.eager import Eager, Step
from pvae.engine.optimizers import build_optimizer
from pvae.engine.problem import METRICS, Problem, metrics
from pvae.engine.staged import Staged
from pvae.seeds import mix, seed_noise
from pvae.staging import ENGINES

__all__ = [
    "ENGINES",
    "METRICS",
    "Auto",
    "Eager",
    "Problem",
    "Staged",
    "Step",
    "build_optimizer",
    "metrics",
    "mix",
    "seed_noise",
    "stage",
]
