"""A function of tensors as one graph of tensor operations, traced through Pyro's handlers or not.

What is traced is what runs: no handler, no Python. Randomness stays random (each call of the graph
draws anew from the default generator), and whatever depends on a tensor's *value* outside torch is
refused rather than frozen.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["COMPILING_PAYS", "ENGINES", "STAGING_PAYS", "StagingError", "capture", "lower"]

ENGINES = ("auto", "compiled", "cudagraph", "eager", "staged")
STAGING_PAYS = 2.0  # seconds of eager work ahead, above which tracing once is worth it
COMPILING_PAYS = 60.0  # likewise for the compiler, which takes 8 to 25 s


class StagingError(RuntimeError):
    """A function cannot be staged; the message is the reason, in words."""


def capture(function: Callable[..., Any], *examples: Any, flat: bool = False) -> Any:
    """Trace ``function(*examples)`` into a graph of tensor operations, derivatives included.

    Tensors that the function reaches without taking them as arguments (a module's parameters) are
    constants of the graph by identity: it sees their later values, but compiled code does not.

    Args:
        function: Takes nests (tuples, lists, dicts) of tensors, gives nests of tensors.
        examples: Arguments of the shapes and types that it will be called with.
        flat: The graph takes and gives flat lists of tensors, as :func:`lower` wants it.

    Returns:
        A ``torch.fx.GraphModule`` to be called as ``function`` is.

    Raises:
        StagingError: it reads a tensor's value, or fails; the message says which.
    """
    from pyro import validation_enabled
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        with _own_noise(examples), validation_enabled(False):
            graph = make_fx(lambda *inputs: function(*inputs), tracing_mode="real")(*examples)
    except Exception as error:
        raise StagingError(_why_not(error)) from error
    graph.graph.eliminate_dead_code()
    if flat:
        graph.graph.set_codegen(torch.fx.graph.CodeGen())
    graph.recompile()
    return graph


def lower(graph: Any, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    """A graph of tensor operations through Inductor, its noise drawn as torch draws it.

    What calls the kernels is compiled as well on a CPU; where Inductor cannot, it is Python.

    Args:
        graph: A ``torch.fx.GraphModule`` that takes a flat list of tensors.
        inputs: Tensors of the shapes and types that it will be called with.

    Raises:
        StagingError: there is no C++ compiler, or it failed.
    """
    on_cpu = not any(tensor.is_cuda for tensor in inputs)
    for cpp_wrapper in (True, False) if on_cpu else (False,):
        try:
            return _compile(graph, inputs, cpp_wrapper=cpp_wrapper)
        except Exception as error:
            failure = error
    reason = str(failure).strip().splitlines() or [""]
    raise StagingError(f"the compiler failed ({type(failure).__name__}: {reason[0]})") from failure


def _compile(graph: Any, inputs: list[torch.Tensor], *, cpp_wrapper: bool) -> Callable[..., Any]:
    with torch.no_grad(), _own_noise(inputs), _quiet():
        import torch._inductor.config as settings
        from torch._guards import TracingContext, tracing
        from torch._inductor.compile_fx import compile_fx
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        from pvae import rewrites

        options = {
            "cpp.enable_floating_point_contract_flag": "fast", "cpp_wrapper": cpp_wrapper,
            "fallback_random": True, "post_grad_custom_pre_pass": rewrites.Pass(),
            # So that a Bernoulli log-likelihood is summed as it is computed, and not stored first.
            "realize_opcount_threshold": 80,
        }  # fmt: skip
        # Inductor looks into its cache only where shapes are tracked, fixed as they are here.
        shapes = FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True))
        with settings.patch(options), tracing(TracingContext(shapes)), rewrites.in_place():
            run: Callable[..., Any] = compile_fx(graph, inputs)  # type: ignore[arg-type,assignment]
            run(*inputs)  # compiles here and not at the first step
    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's deprecations, and what it says of operators that C++ calls by a detour."""
    log = logging.getLogger("torch._inductor.ir")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


def _own_noise(examples: Any) -> Any:
    """Leaves the caller's random streams where they are."""
    tensors = torch.utils._pytree.tree_leaves(examples)
    devices = {t.device.index or 0 for t in tensors if getattr(t, "is_cuda", False)}
    return torch.random.fork_rng(sorted(devices))


def _why_not(error: Exception) -> str:
    text = str(error)
    if "_local_scalar_dense" in text or "data-dependent" in text:
        return (
            "the program reads a value from a tensor (.item(), if, int()), so it branches on data"
        )
    return f"{type(error).__name__}: {text.strip().splitlines()[0] if text.strip() else ''}"
