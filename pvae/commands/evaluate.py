"""``pvae evaluate``: the log evidence of held-out data."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import runs
from pvae.commands.preparing import data_for, grouped, warn_of_unscored
from pvae.commands.programs import has_encoder, need_encoder
from pvae.commands.saying import say, watched
from pvae.errors import OptionError
from pvae.launchers import leads

if TYPE_CHECKING:
    from pvae.data import Dataset
    from pvae.distributed import Group
    from pvae.training import Run

__all__ = ["evaluate"]

_BLOCK = 1024  # rows scored at once where the density is exact
_FEWEST = 20  # rows of the curve, however few particles there are


def evaluate(arguments: argparse.Namespace) -> None:
    """``pvae evaluate``: the log evidence of held-out data, written into the run folder."""
    folder = Path(arguments.run)
    config = runs.read_config(folder)
    if arguments.num_particles is None:  # draws from the exact posterior all weigh log p(x)
        arguments.num_particles = 2 if config.get("guide") == "exact" else 5000
    _check(arguments)
    if arguments.method != "annealed":
        need_encoder(config, folder, "say --method annealed, which then starts from the prior")
    run = runs.load(folder)
    if not has_encoder(config, folder):
        run.guide = None
    dataset = data_for(config, arguments.data)
    warn_of_unscored(run.model, dataset)
    split = getattr(dataset, arguments.split)
    started = time.perf_counter()
    from pvae.evidence.sweep import tensors_of

    device = next((t.device for t in tensors_of(run.model, run.guide)), "cpu")
    with grouped({"device": str(device)}) as group:
        evidence, curve = _estimate(arguments, run, split, group)
    if not leads(group):
        return
    seconds = time.perf_counter() - started
    about = _evidence_facts(evidence, dataset, split) | {
        "split": arguments.split,
        "data": dataset.description(),
        "seed": arguments.seed,
        "seconds": seconds,
    }
    if callable(getattr(run.model, "log_evidence", None)):
        about["exact_log_evidence"] = float((_exact(run.model, split.x) + split.log_det).mean())
    if curve is not None:
        shift = float(split.log_det[:200].mean())
        bounds = [bound + shift for bound in curve.bounds]
        about["curve"] = {"k": list(curve.sizes), "bound": bounds, "stderr": list(curve.stderr)}
    _write_evidence(run, dataset, split, evidence, about, folder)
    say(_evidence_in_words(about))
    if evidence.methods is not None:
        from pvae.evidence import escalation_report

        say(escalation_report(evidence))
    say(f"wrote {folder}: evidence.json, evidence.nc, figures/evidence.png")


def _exact(model: Any, x: Any) -> Any:
    """``model.log_evidence`` of all rows, ``(N,)``, without what only training does (dropout)."""
    import torch

    from pvae.evidence.importance import evaluation
    from pvae.evidence.sweep import tensors_of

    device = next((t.device for t in tensors_of(model)), torch.device("cpu"))
    with evaluation(model, None, seed=0, device=device):
        pieces = [model.log_evidence(rows.to(device)).double().cpu() for rows in _pieces(x)]
    return torch.cat(pieces)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse numbers out of their range, and those that the method has no use for."""
    method = arguments.method
    if arguments.num_particles < 1:
        raise OptionError(f"--num-particles must be at least 1, got {arguments.num_particles}")
    if arguments.tolerance is not None:
        if method != "auto":
            raise OptionError(f"--tolerance is for --method auto, got {method}: leave one out")
        if not arguments.tolerance > 0:
            raise OptionError(f"--tolerance must be positive nats, got {arguments.tolerance:g}")
    if arguments.budget is not None and method != "auto":
        raise OptionError(f"--budget is for --method auto, got {method}: leave one out")
    if arguments.num_temperatures is not None:
        if method not in ("annealed", "smc"):
            raise OptionError(
                f"--num-temperatures is for --method annealed or smc, got {method}: leave one out"
            )
        if arguments.num_temperatures < 2:
            raise OptionError(
                f"--num-temperatures must be at least 2, got {arguments.num_temperatures}"
            )


def _pieces(x: Any) -> Iterator[Any]:
    """All rows, some at a time."""
    from pvae.data.mapped import MappedRows

    for block in x.blocks() if isinstance(x, MappedRows) else (x,):
        yield from block.split(_BLOCK)


def _estimate(
    arguments: argparse.Namespace, run: Run, split: Any, group: Group | None
) -> tuple[Any, Any]:
    """Evidence by the method asked for, on the original scale, and L_k where weights allow it."""
    import torch

    from pvae import evidence
    from pvae.data import take

    batch = runs.batch_for(run.model, split.x, split.labels)
    method, pair, seed = arguments.method, (run.model, run.guide, batch), arguments.seed

    def shared(estimator: Any) -> Any:
        return functools.partial(evidence.in_parts, estimator=estimator) if group else estimator

    if method in ("annealed", "smc"):
        estimator = shared(getattr(evidence, method))
        temperatures = arguments.num_temperatures or 1000
        with watched(f"{method}, {temperatures} temperatures") as progress:
            start = {"start": "prior"} if run.guide is None else {}
            found = estimator(
                *pair, num_temperatures=temperatures, seed=seed, progress=progress, **start
            )
        return found.shifted(split.log_det), None
    if method == "auto":
        tolerance = 0.1 if arguments.tolerance is None else arguments.tolerance
        budget = 20_000 if arguments.budget is None else arguments.budget
        with watched("escalating where the error is too large") as progress:
            found = shared(evidence.auto)(
                *pair, tolerance=tolerance, budget=budget, seed=seed,
                num_particles=min(arguments.num_particles, 1000),
                progress=lambda rung, done, total: progress(done, total),
            )  # fmt: skip
    else:
        with watched(f"importance sampling, K = {arguments.num_particles}") as progress:
            found = shared(evidence.importance)(
                *pair, arguments.num_particles, seed=seed, progress=progress
            )
    if not leads(group):
        return found.shifted(split.log_det), None
    as_costly = len(split) * found.num_particles // evidence.curve_cost()  # as the estimate itself
    first = take(batch, torch.arange(min(200, max(_FEWEST, as_costly), len(split))))
    curve = evidence.measured_curve(run.model, run.guide, first, seed=seed)
    return found.shifted(split.log_det), curve


def _evidence_facts(evidence: Any, dataset: Dataset, split: Any) -> dict[str, Any]:
    log_p = evidence.log_evidence.mean()
    return {
        "log_evidence": evidence.mean,
        "stderr": evidence.mean_stderr,
        "bits_per_dim": float(dataset.bits_per_dim(log_p, split)),
        "elbo": float(evidence.elbo.mean()),
        "pareto_k_above_0.7": evidence.unreliable,
        "median_ess": float(evidence.ess.median()),
        "num_data": len(evidence),
        "num_particles": evidence.num_particles,
        "kind": evidence.kind,
        "method": evidence.method,
        "units": "nats per datum, on the original scale",
    }


def _evidence_in_words(about: Mapping[str, Any]) -> str:
    method = about["method"]
    more = {"importance": "--num-particles", "auto": "--budget"}.get(method, "--num-temperatures")
    mean = "ELBO" if method == "importance" else "mean log w"
    lines = [
        f"{about['data']}; {about['split']} split, {about['num_data']} data",
        f"log evidence   {about['log_evidence']:.3f} ± {about['stderr']:.3f} nats per datum "
        f"({about['kind']}, K = {about['num_particles']})",
        f"               {about['bits_per_dim']:.4f} bits/dim on the original scale",
        f"{mean:<14} {about['elbo']:.3f} nats per datum",
        f"k-hat > 0.7    {100 * about['pareto_k_above_0.7']:.1f} % of the data"
        + (f": raise {more}" if about["pareto_k_above_0.7"] > 0.1 else ""),
        f"{about['seconds']:.1f} s",
    ]
    if "exact_log_evidence" in about:
        exact = about["exact_log_evidence"]
        lines.insert(3, f"exact          {exact:.3f} nats per datum (model.log_evidence)")
    if "curve" in about:
        steps = zip(about["curve"]["k"], about["curve"]["bound"], strict=True)
        bounds = ", ".join(f"L_{k} {bound:.2f}" for k, bound in steps)
        lines.insert(-1, f"as K grows     {bounds} (the first 200 data)")
    return "\n".join(lines)


def _write_evidence(
    run: Run, dataset: Dataset, split: Any, evidence: Any, about: Mapping[str, Any], folder: Path
) -> None:
    from pvae import arviz, plots
    from pvae.data.mapped import MappedRows

    is_streamed = isinstance(split.x, MappedRows)  # what stays in its file is not written again
    first = 1000 if is_streamed else len(split)
    labels = split.labels if split.labels is None else split.labels[:first]
    with runs.publish(folder) as aside:
        runs.write_json(aside / "evidence.json", about)
        arviz.to_netcdf(
            aside / "evidence.nc",
            posterior=None
            if run.guide is None
            else arviz.posterior_draws(
                run.model,
                run.guide,
                runs.batch_for(run.model, split.x[:first], labels),
                seed=about["seed"],
            ),
            evidence=evidence,
            observed=None if is_streamed else dataset.transform.inverse(split.x),
            labels=split.labels,
            attrs={key: about[key] for key in ("data", "split", "seed")},
        )
        runs.save_figure(
            lambda: plots.weights_diagnostics(evidence), aside / "figures" / "evidence.png"
        )
