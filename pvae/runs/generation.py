"""Draws from a trained model, and reconstructions through a guide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pvae.errors import ProgramError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["generate", "num_scored"]


def num_scored(model: Any, example: Any) -> int:
    """How many numbers of each datum of an example the model's observed sites score."""
    import torch
    from pyro import poutine

    from pvae.evidence.importance import evaluation
    from pvae.particles import arguments, module_of

    module = module_of(model)
    device = next((p.device for p in module.parameters()), None) if module is not None else None
    args = tuple(part.to(device) for part in arguments(example)[0])
    with evaluation(model, None, seed=0, device=args[0].device), poutine.block():
        trace = poutine.trace(model).get_trace(*args)
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample"]
    observed = [torch.as_tensor(node["value"]) for node in nodes if node["is_observed"]]
    return sum(int(value.numel()) for value in observed) // len(args[0])


def generate(
    model: Any, example: Any, *, guide: Any = None, seed: int = 0
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Draw data from a model, or, with a guide, reconstruct the example through its latents.

    Any program will do: the observed site is drawn instead of scored.

    Args:
        model: The generative program.
        example: ``(B, D)``, or a tuple that begins with it; only its shape matters without a guide.
        guide: Draws the latent sites given the example, instead of the model's prior.
        seed: Seed of the draws; the caller's random stream is untouched.

    Returns:
        Draws ``(B, D)``; the means of ``p(x | z)``, if it has any; the guide's posterior means of
        all real latent sites, flattened to ``(B, L)``.

    Raises:
        ProgramError: no observed site has the shape of the example.
    """
    from pyro import poutine

    from pvae.evidence.importance import evaluation
    from pvae.particles import arguments, module_of

    modules = [m for m in (module_of(model), module_of(guide)) if m is not None]
    device = next((p.device for m in modules for p in m.parameters()), None)
    args = tuple(part.to(device) for part in arguments(example)[0])
    example = args[0]
    with evaluation(model, guide, seed=seed, device=example.device), poutine.block():
        program, latent = poutine.uncondition(model), None
        if guide is not None:
            guide_trace = poutine.trace(guide).get_trace(*args)
            program = poutine.replay(program, trace=guide_trace)
            latent = _latent_means(guide_trace, len(example))
        trace = poutine.trace(program).get_trace(*args)
    for node in trace.nodes.values():
        observed = node["type"] == "sample" and node["infer"].get("was_observed")
        if observed and node["value"].shape == example.shape:
            return node["value"].cpu(), _mean(node["fn"], example.shape), latent
    raise ProgramError(
        "the model observes no site of the shape of its data, so it cannot make any by itself: "
        "call it from Python on the inputs you want (pvae.load)"
    )


def _mean(distribution: Any, shape: Any) -> Tensor | None:
    try:
        mean: Tensor = distribution.mean
    except (NotImplementedError, AttributeError):
        return None
    return mean.cpu() if mean.shape == shape else None


def _latent_means(trace: Any, rows: int) -> Tensor | None:
    import torch

    columns = []
    for node in trace.nodes.values():
        if node["type"] != "sample" or not node["value"].is_floating_point():
            continue
        if node["value"].shape[:1] == (rows,):
            mean = _mean(node["fn"], node["value"].shape)
            columns.append((node["value"].cpu() if mean is None else mean).reshape(rows, -1))
    return torch.cat(columns, 1) if columns else None
