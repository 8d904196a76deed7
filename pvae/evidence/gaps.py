r"""The gap ledger: where ``log p(x) - ELBO`` of a trained pair goes.

    log p(x) - ELBO(q_encoder) = [log p(x) - ELBO(q*)] + [ELBO(q*) - ELBO(q_encoder)]
                                   approximation           amortisation

``q*`` is the best member of the guide's own family for one datum, found by optimising that datum's
parameters. What is left is the noise of the estimates. Cremer, Li & Duvenaud (2018), Inference
suboptimality in variational autoencoders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae import log_weights as algebra
from pvae.data import as_batch, num_rows, take
from pvae.errors import DataError, OptionError, ProgramError
from pvae.evidence.importance import Evidence, evaluation
from pvae.families import is_whole_family, offsets, shifted
from pvae.particles import Layout, draw, inspect, latent_sites, module_of, rewritten, sum_terms

__all__ = ["Gaps", "gaps"]

Progress = Callable[[int, int], None]
Moves = dict[str, dict[str, Tensor]]  # site -> parameter -> (B, ...), in unconstrained space

_STREAM = 101 * 10**7  # apart from that of data simulated with the same small seed
_MAX_PAIRS = 2**13  # particles x data held at once, forward and backward
_ROUND = 20  # steps between two looks at the objective
_HALVINGS = 5  # the learning rate is halved so often before a block is done
_JUDGES = 512  # common draws by which two members of the family are compared


@dataclass(frozen=True)
class Gaps:
    """``log p(x) - ELBO`` of N data in parts, nats per datum.

    ``total = approximation + amortisation + estimation``, for every datum.

    Attributes:
        log_evidence: ``(N,)`` the estimate of ``log p(x)`` that the parts are measured from.
        elbo: ``(N,)`` ELBO of the guide.
        best_elbo: ``(N,)`` ELBO of the best member of its family.
        approximation: ``(N,)`` ``log_evidence - best_elbo``: what the family costs.
        amortisation: ``(N,)`` ``best_elbo - elbo``: what one encoder for all data costs.
        estimation: ``(N,)`` by how much the estimate of ``log p(x)`` falls short of it on average,
            ``stderr^2 / 2`` (Nowozin 2018); zero where it is exact.
        noise: Part -> ``(N,)`` its standard error over the draws.
        log_evidence_method: How ``log p(x)`` was found.
        pareto_k: ``(N,)`` tail index of that estimate; above 0.7 it may be far too low.
        shifted_sites: Sites whose distribution follows from earlier draws or passes through a
            learned transform: their family was searched by shifting the guide's parameters.
        num_steps: Steps of the optimisation, the largest over the blocks of data.
        converged: Whether it stopped by its own rule for all data.
        num_particles: Draws per datum of each ELBO.
    """

    log_evidence: Tensor
    elbo: Tensor
    best_elbo: Tensor
    approximation: Tensor
    amortisation: Tensor
    estimation: Tensor
    noise: Mapping[str, Tensor]
    log_evidence_method: str
    pareto_k: Tensor
    shifted_sites: tuple[str, ...]
    num_steps: int
    converged: bool
    num_particles: int

    def __len__(self) -> int:
        return len(self.elbo)

    @property
    def total(self) -> Tensor:
        """``log p(x) - ELBO``, ``(N,)``, nats."""
        return self.approximation + self.amortisation + self.estimation

    def rows(self) -> list[dict[str, Any]]:
        """The ledger as a table: mean over the data, its SE over the data and over the draws."""
        parts = {
            "log p(x)": self.log_evidence + self.estimation,
            "ELBO": self.elbo,
            "gap": self.total,
            "approximation": self.approximation,
            "amortisation": self.amortisation,
            "estimation": self.estimation,
        }
        return [
            {
                "part": name,
                "nats": float(value.mean()),
                "stderr": _stderr(value),
                "noise": _mean_noise(self.noise[name]),
            }
            for name, value in parts.items()
        ]

    def report(self) -> str:
        """The ledger in words: which part is the larger, and what would close it."""
        return "\n".join([*_table(self.rows()), *_conclusions(self)])

    __str__ = report


def gaps(
    model: Any,
    guide: Any,
    x: Any,
    *,
    log_evidence: Evidence | None = None,
    best_elbo: Tensor | None = None,
    num_particles: int = 1000,
    tolerance: float = 1e-3,
    max_steps: int = 2000,
    lr: float = 0.1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Gaps:
    r"""Split ``log p(x) - ELBO`` into approximation gap, amortisation gap and estimation noise.

    The guide is run as it is. The parameters of every latent site's distribution (whatever its
    class: mean and scale, concentration, Cholesky factor, under any fixed transform) get an offset
    per datum in unconstrained space. Adam maximises each datum's ELBO over its offsets with the
    path derivative (Roeder et al. 2017), whose noise vanishes as q nears the posterior. Every 20
    steps the members are compared on common draws; each datum keeps its best, the encoder's own to
    begin with. Where the mean gain is below ``tolerance`` the learning rate is halved, and after
    five halvings the search is over. The ELBOs are then taken on fresh draws, the two of a datum
    on the same noise.

    Where a site depends on earlier draws (``z1`` given ``z2``), the offsets move its conditional
    parameters for each datum alike over those draws; where a learned transform (a flow) lies above
    the parameters, it is kept as the guide gives it. The approximation gap is then at most what is
    reported, and the result names the sites.

    Args:
        model: The generative program.
        guide: The inference program.
        x: Data: an array, tensor, tuple or dict of them, N rows.
        log_evidence: Evidence of the same data, on the scale of ``x``; importance sampling from
            the best member if ``None``, which is closer to the posterior than the encoder.
        best_elbo: ``(N,)`` ELBO of the best member where it is known by other means; nothing is
            optimised then.
        num_particles: Draws per datum of each ELBO (and of the evidence).
        tolerance: Mean gain per datum and 20 steps, in nats, below which the search slows down.
        max_steps: Steps at most.
        lr: Adam's learning rate at the start, in unconstrained space.
        seed: Seed of the draws; the caller's random stream is untouched.
        progress: Called with (data done, N).

    Raises:
        ProgramError: The programs do not fit each other, a latent site is discrete or shared by
            all data, or its distribution cannot be built again with other parameters.
        DataError: ``log_evidence`` or ``best_elbo`` is of other data.
        OptionError: A number is out of range.
    """
    if num_particles < 2 or max_steps < 1 or not lr > 0 or not tolerance > 0:
        raise OptionError(
            f"num_particles must be at least 2, max_steps at least 1, lr and tolerance positive, "
            f"got {num_particles}, {max_steps}, {lr} and {tolerance}"
        )
    device = _device(model, guide)
    batch = as_batch(x, device=device, model=model)
    total = num_rows(batch)
    _check_length("log_evidence", log_evidence, total)
    _check_length("best_elbo", best_elbo, total)
    size = max(1, min(total, 256))
    columns, shifted_sites, num_steps, converged = [], set[str](), 0, True
    with evaluation(model, guide, seed=_STREAM + seed, device=device):
        layout = inspect(model, guide, take(batch, torch.arange(size, device=device)))
        _refuse(layout, search=best_elbo is None)
        for start in range(0, total, size):
            index = torch.arange(start, min(start + size, total), device=device)
            rows = take(batch, index)
            moves: Moves = {}
            if best_elbo is None:
                moves, names = _family(model, guide, rows, layout)
                shifted_sites |= names
                steps, done = _optimise(model, guide, rows, layout, moves, max_steps, lr, tolerance)
                num_steps, converged = max(num_steps, steps), converged and done
            columns.append(_weigh(model, guide, rows, layout, moves, num_particles))
            if progress is not None:
                progress(int(index[-1]) + 1, total)
    found = {name: torch.cat([each[name] for each in columns]).cpu() for name in columns[0]}
    return _ledger(
        found, log_evidence, best_elbo, tuple(sorted(shifted_sites)), num_steps, num_particles,
        converged=converged,
    )  # fmt: skip


def _device(model: Any, guide: Any) -> torch.device:
    modules = [m for m in (module_of(model), module_of(guide)) if m is not None]
    return next((p.device for m in modules for p in m.parameters()), torch.device("cpu"))


def _check_length(name: str, value: Any, total: int) -> None:
    if value is not None and len(value) != total:
        raise DataError(
            f"{name} is of {len(value)} data and x has {total} rows: pass the same data"
        )


def _refuse(layout: Layout, *, search: bool) -> None:
    if layout.globals:
        raise ProgramError(
            f"site {layout.globals[0]!r} is shared by all data, so there is no gap of one datum: "
            "move it inside the data plate, or condition on it"
        )
    if search and layout.score_sites:
        name, family = next(iter(layout.score_sites.items()))
        raise ProgramError(
            f"site {name!r} is drawn from a {family}, which has no pathwise derivative, so the "
            "best member of the family is not searched: pass best_elbo=, or sum the site out"
        )


# --- the best member of the family ---------------------------------------------------------------


def _family(model: Any, guide: Any, rows: Any, layout: Layout) -> tuple[Moves, set[str]]:
    """Zero offsets of every guide site, and the sites whose family they reach in part only."""
    moves: Moves = {}

    def start(name: str, distribution: Any) -> Any:
        moves[name] = offsets(name, distribution)
        return distribution

    try:
        draw(model, rewritten(guide, start), rows, 1, layout=_one_by_one(layout))
    except ProgramError as error:  # Pyro adds its table of shapes to every message
        raise ProgramError(str(error).partition("\nTrace Shapes")[0]) from error
    partial = set()
    for name, site in latent_sites(model, guide, rows, 2, layout).items():
        here = site.posterior.log_prob(site.value[:1].expand_as(site.value))
        follows = not torch.allclose(here[0], here[1], rtol=1e-5, atol=1e-5)
        if follows or not is_whole_family(site.posterior):
            partial.add(name)
    return moves, partial


def _one_by_one(layout: Layout) -> Layout:
    """The same layout without a particle dimension, in which parameters have their own shape."""
    import dataclasses

    return dataclasses.replace(layout, vectorize=False)


def _member(guide: Any, moves: Moves) -> Any:
    return rewritten(guide, lambda name, distribution: shifted(distribution, moves[name]))


def _optimise(
    model: Any,
    guide: Any,
    rows: Any,
    layout: Layout,
    moves: Moves,
    max_steps: int,
    lr: float,
    tolerance: float,
) -> tuple[int, bool]:
    """Maximise each datum's ELBO over its offsets, in place: steps taken, and whether it ended."""
    leaves = [leaf for site in moves.values() for leaf in site.values()]
    num_data = num_rows(rows)
    particles = max(1, min(16, _MAX_PAIRS // num_data))
    judge = int(torch.randint(2**31, ()))
    best = [leaf.clone() for leaf in leaves]
    best_value = _judged(model, guide, rows, layout, moves, judge)
    state = [(torch.zeros_like(leaf), torch.zeros_like(leaf)) for leaf in leaves]
    rate, step, since = lr, 0, 0
    while step < max_steps and rate >= lr / 2**_HALVINGS:
        means = [torch.zeros_like(leaf) for leaf in leaves]
        count = min(_ROUND, max_steps - step)
        for _ in range(count):
            step, since = step + 1, since + 1
            gradients = _path_gradients(model, guide, rows, layout, moves, leaves, particles)
            for leaf, gradient, moments, mean in zip(leaves, gradients, state, means, strict=True):
                leaf += rate * _adam(gradient, moments, since)
                mean += leaf / count
        for leaf, mean in zip(leaves, means, strict=True):
            leaf.copy_(mean)
        value = _judged(model, guide, rows, layout, moves, judge)
        better = value > best_value  # false for a NaN
        gain = float(torch.where(better, value - best_value, 0.0).mean())
        best_value = torch.where(better, value, best_value)
        _keep(leaves, best, better, layout, moves)
        if gain < tolerance:
            rate, since = rate / 2, 0
            for leaf, kept, (first, second) in zip(leaves, best, state, strict=True):
                leaf.copy_(kept)
                first.zero_()
                second.zero_()
    for leaf, kept in zip(leaves, best, strict=True):
        leaf.copy_(kept)
    return step, rate < lr / 2**_HALVINGS


def _path_gradients(
    model: Any,
    guide: Any,
    rows: Any,
    layout: Layout,
    moves: Moves,
    leaves: list[Tensor],
    particles: int,
) -> list[Tensor]:
    """``d ELBO / d offset`` by the path alone: the score of log q has mean zero and is left out."""
    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_(True)
        drawn = draw(model, _member(guide, moves), rows, particles, score=True, layout=layout)
        score = sum_terms(drawn.score or {})
        surrogate = (drawn.log_weights + score - score.detach()).mean(0).sum()
        gradients = torch.autograd.grad(surrogate, leaves, allow_unused=True)
        for leaf in leaves:
            leaf.requires_grad_(False)
    return [
        torch.zeros_like(leaf) if gradient is None else gradient.nan_to_num(0, 0, 0)
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]


def _adam(gradient: Tensor, moments: tuple[Tensor, Tensor], step: int) -> Tensor:
    first, second = moments
    first.lerp_(gradient, 0.1)
    second.lerp_(gradient**2, 0.01)
    return (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)


def _judged(model: Any, guide: Any, rows: Any, layout: Layout, moves: Moves, seed: int) -> Tensor:
    """``(B,)`` ELBO on the common draws."""
    log_weights = _log_weights(model, _member(guide, moves), rows, layout, _JUDGES, seed)
    return log_weights.mean(0)


def _keep(
    leaves: list[Tensor], best: list[Tensor], better: Tensor, layout: Layout, moves: Moves
) -> None:
    """Where a datum's member is the better one, it becomes its best."""
    for leaf, kept in zip(leaves, best, strict=True):
        rows = better.reshape(_at_data(leaf, len(better), layout))
        kept.copy_(torch.where(rows, leaf, kept))


def _at_data(leaf: Tensor, num_data: int, layout: Layout) -> list[int]:
    """The shape in which ``(B,)`` lies along an offset's data dimension."""
    depth = -layout.particle_dim - 1  # batch dimensions without the particles
    shape = [1] * leaf.dim()
    shape[depth + layout.data_dim if depth else 0] = num_data
    return shape


def _log_weights(
    model: Any, guide: Any, rows: Any, layout: Layout, num_particles: int, seed: int
) -> Tensor:
    """``(K, B)`` in float64, the same noise for the same seed."""
    chunk = max(1, _MAX_PAIRS // num_rows(rows))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.cat(
            [
                draw(model, guide, rows, min(chunk, num_particles - k), layout=layout)
                .log_weights.double()
                for k in range(0, num_particles, chunk)
            ]
        )  # fmt: skip


# --- the parts -----------------------------------------------------------------------------------


def _weigh(
    model: Any, guide: Any, rows: Any, layout: Layout, moves: Moves, num_particles: int
) -> dict[str, Tensor]:
    """ELBO of encoder and best member on the same noise; evidence from the better of the two."""
    seed = int(torch.randint(2**31, ()))
    encoder = _log_weights(model, guide, rows, layout, num_particles, seed)
    best = encoder
    if moves:
        best = _log_weights(model, _member(guide, moves), rows, layout, num_particles, seed)
    root = math.sqrt(num_particles)
    log_evidence = algebra.log_mean_exp(best)
    return {
        "log_evidence": log_evidence,
        "stderr": algebra.stderr(best),
        "pareto_k": algebra.pareto_k(best.cpu()),
        "elbo": encoder.mean(0),
        "elbo_noise": encoder.std(0) / root,
        "best_elbo": best.mean(0),
        "best_noise": best.std(0) / root,
        "amortisation_noise": (best - encoder).std(0) / root,
        "approximation_noise": _gap_noise(best, log_evidence),
        "gap_noise": _gap_noise(encoder, log_evidence if best is encoder else None, best),
    }


def _gap_noise(
    log_weights: Tensor, log_evidence: Tensor | None, other: Tensor | None = None
) -> Tensor:
    """SE of ``log p - mean log w`` where both come from the same draws (delta method)."""
    source = log_weights if other is None else other
    centre = algebra.log_mean_exp(source) if log_evidence is None else log_evidence
    influence = (source - centre).exp() - log_weights
    return influence.std(0) / math.sqrt(len(log_weights))


def _ledger(
    found: dict[str, Tensor],
    evidence: Evidence | None,
    best_elbo: Tensor | None,
    shifted_sites: tuple[str, ...],
    num_steps: int,
    num_particles: int,
    *,
    converged: bool,
) -> Gaps:
    own = evidence is None
    log_evidence = found["log_evidence"] if evidence is None else evidence.log_evidence
    stderr = found["stderr"] if evidence is None else evidence.stderr
    best, best_noise = found["best_elbo"], found["best_noise"]
    if best_elbo is not None:
        best = best_elbo.detach().double().cpu()
        best_noise = torch.zeros_like(best)
        found["amortisation_noise"] = found["elbo_noise"]
        found["approximation_noise"] = stderr
    elif not own:
        found["approximation_noise"] = torch.hypot(stderr, best_noise)
    finite = stderr.isfinite()
    estimation = torch.where(finite, stderr**2 / 2, 0.0)
    noise = {
        "log p(x)": stderr,
        "ELBO": found["elbo_noise"],
        "gap": found["gap_noise"] if own else torch.hypot(stderr, found["elbo_noise"]),
        "approximation": found["approximation_noise"],
        "amortisation": found["amortisation_noise"],
        "estimation": torch.zeros_like(stderr),
    }
    return Gaps(
        log_evidence=log_evidence,
        elbo=found["elbo"],
        best_elbo=best,
        approximation=log_evidence - best,
        amortisation=best - found["elbo"],
        estimation=estimation,
        noise=noise,
        log_evidence_method=f"importance, K = {num_particles}, from the best member"
        if evidence is None
        else evidence.method,
        pareto_k=found["pareto_k"] if evidence is None else evidence.pareto_k,
        shifted_sites=shifted_sites,
        num_steps=num_steps,
        converged=converged,
        num_particles=num_particles,
    )


# --- in words ------------------------------------------------------------------------------------


def _stderr(value: Tensor) -> float:
    return math.inf if len(value) < 2 else float(value.std() / math.sqrt(len(value)))


def _mean_noise(noise: Tensor) -> float:
    """SE of a mean over the data, from independent errors ``(N,)``."""
    return float(noise.square().sum().sqrt() / len(noise))


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'nats per datum':<16}{'mean':>12}{'SE (data)':>12}{'SE (draws)':>12}"]
    for row in rows:
        lines.append(
            f"{row['part']:<16}{row['nats']:>12.4f}{row['stderr']:>12.4f}{row['noise']:>12.4f}"
        )
    return lines


def _conclusions(ledger: Gaps) -> list[str]:
    family, encoder = float(ledger.approximation.mean()), float(ledger.amortisation.mean())
    total = float(ledger.total.mean())
    lines = []
    if total < 0.01:
        lines.append("The bound is tight: the ELBO is within 0.01 nat of log p(x).")
    elif encoder > family:
        lines.append(
            f"Most of the gap ({encoder / total:.0%}) is amortisation: a larger encoder, longer "
            "training or per-datum refinement would close it; a richer family would not."
        )
    else:
        lines.append(
            f"Most of the gap ({family / total:.0%}) is approximation: a richer family (full "
            "covariance, a flow) or more particles (iwae) would close it; a larger encoder would "
            "not."
        )
    doubtful = float((ledger.pareto_k > 0.7).double().mean())
    if doubtful > 0:
        lines.append(
            f"For {doubtful:.1%} of the data k-hat of log p(x) exceeds 0.7: their gap may be "
            "larger than reported; pass log_evidence= of a stronger estimator."
        )
    if ledger.shifted_sites:
        lines.append(
            f"Sites {', '.join(ledger.shifted_sites)} follow earlier draws or a learned transform: "
            "their family was searched by per-datum shifts of the guide's parameters, so part of "
            "the approximation gap may be amortisation."
        )
    if not ledger.converged:
        lines.append(
            f"The search was cut off after {ledger.num_steps} steps: raise max_steps for the "
            "amortisation gap in full."
        )
    return lines
