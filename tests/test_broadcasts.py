"""What is spread over particles is computed before it is spread."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.distributions import Normal
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from pvae.staging import capture, lower

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def rewrite():
    from pvae import broadcasts, rewrites  # imports the compiler

    def apply(function, *tensors):
        """The graph before and after, and the shapes at which each operator works after."""
        graph = capture(function, *tensors, flat=True)
        before = graph(*tensors)
        FakeTensorProp(graph).propagate(*tensors)
        hold, softplus = torch.ops.pvae.hold.default, torch.ops.aten.softplus.default
        broadcasts.compute_before_broadcast(graph.graph, hold, dear=(softplus,))
        graph.recompile()
        shapes = {}
        for node in graph.graph.nodes:
            if node.op == "call_function":
                name = str(node.target).removeprefix("aten.").removeprefix("pvae.")
                shapes.setdefault(name, []).append(tuple(node.meta["val"].shape))
        return before, graph(*tensors), shapes

    assert rewrites
    return apply


def density(loc, raw, noise):
    scale = torch.nn.functional.softplus(raw) + 1e-4
    normal = Normal(loc, scale, validate_args=False).expand(noise.shape)
    z = loc + scale * noise
    return z, normal.log_prob(z).sum(-1)


def test_a_normals_logarithm_and_variance_are_of_one_datum(rewrite):
    torch.manual_seed(0)
    loc, raw, noise = torch.randn(6, 3), torch.randn(6, 3), torch.randn(40, 6, 3)
    before, after, shapes = rewrite(density, loc, raw, noise)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    assert shapes["log.default"] == [(6, 3)]
    assert shapes["pow.Tensor_Scalar"] == [(6, 3), (40, 6, 3)]
    assert shapes["hold.default"] == [(6, 3), (6, 3)]  # scale and log(scale)


def test_what_is_cheap_or_hardly_spread_is_left_alone(rewrite):
    def function(x, y):
        few = x.exp().expand(3, *x.shape) * y[:3]  # three times: below the least
        return few, (x + 1).expand_as(y) * y  # cheap: no buffer

    x, y = torch.randn(5), torch.randn(8, 5)
    before, after, shapes = rewrite(function, x, y)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    assert "hold.default" not in shapes


def test_two_broadcasts_meet_before_they_are_spread(rewrite):
    def function(x, y, big):
        return ((x.expand_as(big) * y.expand_as(big)).exp() + big,)

    x, y, big = torch.randn(4, 1), torch.randn(3), torch.randn(50, 4, 3)
    before, after, shapes = rewrite(function, x, y, big)
    assert torch.allclose(before[0], after[0])
    assert shapes["exp.default"] == [(4, 3)]
    assert shapes["hold.default"] == [(4, 3)]


def test_an_outer_product_is_not_made_smaller_by_itself(rewrite):
    def function(x, y):
        return ((x[:, None].expand(20, 20) * y.expand(20, 20)).exp(),)

    x, y = torch.randn(20), torch.randn(20)
    before, after, shapes = rewrite(function, x, y)
    assert torch.allclose(before[0], after[0])
    assert shapes["exp.default"] == [(20, 20)]


WRITERS = {
    "index_put": lambda z: torch.index_put(z, (torch.tensor([1, 2]),), torch.tensor(-1.0)),
    "index_copy": lambda z: z.index_copy(0, torch.tensor([1, 2]), -torch.ones(2, 5)),
    "index_fill": lambda z: z.index_fill(0, torch.tensor([3]), 7.0),
    "index_add": lambda z: z.index_add(0, torch.tensor([1, 1]), torch.ones(2, 5)),
    "as_strided": lambda z: torch.as_strided(z, (20, 5), (10, 1)) + 1,
    "slice": lambda z: torch.slice_scatter(z, torch.ones(3, 5), 0, 2, 5),
}


@pytest.fixture(scope="module")
def written():
    """All in one graph, because compiling is what takes time."""

    def every(x):
        return tuple(write(x.expand(40, 5) * 2 + 1) for write in WRITERS.values())

    x = torch.arange(5.0)
    return every(x), lower(capture(every, x, flat=True), [x])(x)


@pytest.mark.parametrize("name", WRITERS)
def test_what_writes_or_takes_apart_memory_has_its_own(written, name):
    expected, found = (part[list(WRITERS).index(name)] for part in written)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


def test_what_is_given_back_has_its_own_memory():
    def function(x):
        return (x[:, None].expand(5, 40) * 2,)

    x = torch.randn(5)
    (found,) = lower(capture(function, x, flat=True), [x])(x)
    assert found.is_contiguous()
    assert torch.equal(found.add_(1), x[:, None].expand(5, 40) * 2 + 1)


def test_compiled_gradients_are_those_of_the_program():
    def function(loc, raw, noise):
        with torch.enable_grad():
            loc, raw = loc.detach().requires_grad_(), raw.detach().requires_grad_()
            bound = density(loc, raw, noise)[1].logsumexp(0).sum()
            return (bound.detach(), *torch.autograd.grad(bound, (loc, raw)))

    torch.manual_seed(0)
    tensors = [torch.randn(6, 3), torch.randn(6, 3), torch.randn(40, 6, 3)]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        given = [t.to(dtype) for t in tensors]
        run = lower(capture(function, *given, flat=True), given)
        for found, truth in zip(run(*given), function(*given), strict=True):
            assert torch.allclose(found, truth, rtol=tolerance, atol=tolerance)
