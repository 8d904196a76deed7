"""Tensor operations that Inductor compiles badly on a CPU, written so that it compiles them well.

Single precision on a CPU only. Elementary functions go through polynomials of single-precision
accuracy, which compile to a few vector instructions where a library call costs two to four times as
much, a linear layer's bias is added where its output is used, instead of being copied into the
output first, and large matrix products are oneDNN's where it is faster than the BLAS.

Importing this module imports the compiler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir, mkldnn_ir
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import decompositions
from torch._inductor.lowering import make_pointwise, register_lowering
from torch._inductor.virtualized import ops

from pvae import broadcasts

__all__ = ["Pass", "hold", "in_place"]

_LARGE_PRODUCT = 2**23  # multiplications from which on oneDNN's calls cost less than they gain
_MANY_ROWS = 512  # likewise where the second factor is transposed, as in a layer's forward pass
# 2^f for f in [0, 1]: relative error 8e-8.
_EXP2 = (0.9999999269249813, 0.6931529681766547, 0.2401545298866001, 0.05582360446256551,
         0.008992584031074146, 0.00187623294527459)  # fmt: skip
# log1p(t) = t P(t), fitted for t in [0, 1]: relative error 2e-8.
_LOG1P = (0.9999999834884304, -0.4999965336093213, 0.333217870040895, -0.24861106814227546,
          0.1916677848846332, -0.13774932602496176, 0.07937487112700282, -0.030127509879629342,
          0.005371120129003162)  # fmt: skip
# tanh(x) = x P(x^2) / Q(x^2): the rational function that Eigen uses, exact to a few units in the
# last place up to where tanh is one in single precision.
_TANH_END = 7.90531110763549805
_TANH_P = (4.89352455891786e-03, 6.37261928875436e-04, 1.48572235717979e-05,
           5.12229709037114e-08, -8.60467152213735e-11, 2.00018790482477e-13,
           -2.76076847742355e-16)  # fmt: skip
_TANH_Q = (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04,
           1.19825839466702e-06)  # fmt: skip


class Pass(CustomGraphPass):  # type: ignore[misc]
    """The rewriting of whole graphs, and these files as part of the key of Inductor's cache.

    The key has no decompositions: without it, a new version of this file would find the old code.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        """See :mod:`pvae.broadcasts`."""
        ours = torch.ops.pvae
        dear = (ours.sigmoid.default, ours.softplus_tail.default, ours.tanh.default)
        broadcasts.compute_before_broadcast(graph, ours.hold.default, dear)

    def uuid(self) -> Any:
        """A hash of these files."""
        return get_hash_for_files((__file__, broadcasts.__file__))


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """Puts ours in the place of Inductor's own decompositions while it compiles.

    Handed over as an argument they would keep it from looking into its cache.
    """
    aten = torch.ops.aten
    ours: dict[Any, Callable[..., Any]] = {
        aten.addmm.default: _addmm,
        aten.binary_cross_entropy_with_logits.default: _binary_cross_entropy_with_logits,
        aten.log_sigmoid_forward.default: _log_sigmoid_forward,
        aten.mm.default: _mm,
        aten.sigmoid.default: _sigmoid,
        aten.softplus.default: _softplus,
        aten.tanh.default: _tanh,
    }
    theirs = {op: decompositions.get(op) for op in ours}
    decompositions.update({op: _unless_unfit(mine, theirs[op]) for op, mine in ours.items()})
    try:
        yield
    finally:
        for op, own in theirs.items():
            decompositions.pop(op)
            if own is not None:
                decompositions[op] = own


def _unless_unfit(mine: Callable[..., Any], theirs: Callable[..., Any] | None) -> Any:
    """``mine`` for single precision on a CPU, ``theirs`` (or no decomposition) for the rest."""

    def decompose(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        fits = x.dtype == torch.float32 and x.device.type == "cpu"
        found = mine(x, *args, **kwargs) if fits else NotImplemented
        if found is NotImplemented and theirs is not None:
            return theirs(x, *args, **kwargs)
        return found

    return decompose


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if beta != 1 or alpha != 1:
        return NotImplemented
    return torch.mm(a, b) - (-bias)  # a plus would be matched and made an addmm again


def _mm(a: Tensor, b: Tensor) -> Any:
    rows, transposed = len(a), b.t().is_contiguous()
    large = rows * b.numel() >= _LARGE_PRODUCT and (rows >= _MANY_ROWS or not transposed)
    plain = a.is_contiguous() and (transposed or b.is_contiguous())
    if not (large and plain and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return NotImplemented
    return torch.ops.pvae.product(a, b.t())


def _binary_cross_entropy_with_logits(
    x: Tensor, target: Tensor, weight: Any = None, pos_weight: Any = None, reduction: int = 1
) -> Any:
    if weight is not None or pos_weight is not None or reduction != 0:
        return NotImplemented
    return torch.relu(x) - x * target + torch.ops.pvae.softplus_tail(x)


def _softplus(x: Tensor, beta: Any = 1, threshold: Any = 20) -> Any:
    if beta != 1 or threshold < 20:  # below it the linear part is another function
        return NotImplemented
    return x.clamp(min=0) + torch.ops.pvae.softplus_tail(x)


def _log_sigmoid_forward(x: Tensor) -> Any:
    return x.clamp(max=0) - torch.ops.pvae.softplus_tail(x), x.new_empty(0)


def _sigmoid(x: Tensor) -> Any:
    return torch.ops.pvae.sigmoid(x)


def _tanh(x: Tensor) -> Any:
    return torch.ops.pvae.tanh(x)


def _constant(value: float) -> Any:
    return ops.constant(value, torch.float32)


def _polynomial(coefficients: Sequence[float], x: Any) -> Any:
    total = _constant(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = ops.add(ops.mul(total, x), _constant(coefficient))
    return total


def _exp_of_minus_abs(x: Any) -> Any:
    """``exp(-|x|) = 2^n 2^f``, with n the exponent bits of a float; not below 1e-38."""
    y = ops.maximum(ops.mul(ops.abs(x), _constant(-1.4426950408889634)), _constant(-126.0))
    n = ops.floor(y)
    exponent = ops.add(ops.to_dtype(n, torch.int32), ops.constant(127, torch.int32))
    bits = ops.bitwise_left_shift(exponent, ops.constant(23, torch.int32))
    power = ops.to_dtype_bitcast(bits, torch.float32, torch.int32)
    return ops.mul(_polynomial(_EXP2, ops.sub(y, n)), power)


def _sigmoid_kernel(x: Any) -> Any:
    t = _exp_of_minus_abs(x)
    above = ops.where(ops.lt(x, _constant(0.0)), t, _constant(1.0))
    return ops.truediv(above, ops.add(t, _constant(1.0)))


def _softplus_tail_kernel(x: Any) -> Any:
    t = _exp_of_minus_abs(x)
    return ops.mul(t, _polynomial(_LOG1P, t))


def _tanh_kernel(x: Any) -> Any:
    x = ops.maximum(ops.minimum(x, _constant(_TANH_END)), _constant(-_TANH_END))
    square = ops.mul(x, x)
    return ops.truediv(ops.mul(x, _polynomial(_TANH_P, square)), _polynomial(_TANH_Q, square))


def _register(name: str, plain: Callable[[Tensor], Tensor], kernel: Callable[[Any], Any]) -> None:
    _library.define(f"{name}(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
    _library.impl(name, plain, "CompositeExplicitAutograd")
    register_lowering(getattr(torch.ops.pvae, name))(make_pointwise(kernel))


# Operators of their own, because Inductor would otherwise store each exponential in memory.
_library: Any = torch.library.Library("pvae", "DEF")  # type: ignore[no-untyped-call]
_register("sigmoid", torch.sigmoid, _sigmoid_kernel)
_register("softplus_tail", lambda x: torch.log1p(torch.exp(-x.abs())), _softplus_tail_kernel)
_register("tanh", torch.tanh, _tanh_kernel)
_library.define("product(Tensor x, Tensor weight) -> Tensor")
_library.impl("product", lambda x, weight: x @ weight.t(), "CompositeExplicitAutograd")


@register_lowering(torch.ops.pvae.product)  # type: ignore[untyped-decorator]
def _product(x: Any, weight: Any) -> Any:
    x = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))
    weight = ir.ExternKernel.realize_input(weight)
    size = [x.get_size()[0], weight.get_size()[0]]
    layout = ir.FixedLayout(device=x.get_device(), dtype=x.get_dtype(), size=size)
    node = mkldnn_ir.LinearUnary(layout, [x, weight], (None, "none", [-1], ""))
    created = mkldnn_ir._create_output_node(node)  # type: ignore[no-untyped-call]
    return ir.TensorBox.create(created)


_library.define("hold(Tensor x) -> Tensor")
_library.impl("hold", torch.clone, "CompositeExplicitAutograd")


@register_lowering(torch.ops.pvae.hold)  # type: ignore[untyped-decorator]
def _hold(x: Any) -> Any:
    x.realize()
    return x


def hold(x: Tensor) -> Tensor:
    """``x``, which Inductor computes once and stores, not once for each of its uses."""
    held: Tensor = torch.ops.pvae.hold(x)
    return held
