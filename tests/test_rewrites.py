"""Compiled elementary functions against double precision."""

from __future__ import annotations

import math
import shutil
import time

import pytest
import torch
from torch.nn import functional

from pvae.staging import StagingError, capture, lower

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

FUNCTIONS = {
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "softplus": functional.softplus,
    "softplus, linear early": lambda x: functional.softplus(x, threshold=1.0),
    "logsigmoid": functional.logsigmoid,
    "bernoulli": lambda x: functional.binary_cross_entropy_with_logits(
        x, torch.full_like(x, 0.3), reduction="none"
    ),
}


@pytest.fixture(scope="module")
def compiled():
    """All of them in one graph, because compiling is what takes time."""

    def every(x, wide):
        return (
            *(function(x) for function in FUNCTIONS.values()),
            wide.sum(0),
            wide.sum(0, keepdim=True),
            functional.linear(wide, wide[:5], x[:5]),
        )

    far = torch.tensor([0.0, 100.0, -100.0])
    x = torch.cat([torch.linspace(-30, 30, 20_001), torch.randn(1000) * 1e-4, far])
    wide = torch.randn(100, 7)
    graph = capture(every, x, wide, flat=True)
    return x, wide, lower(graph, [x, wide])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_single_precision_is_kept(compiled, name):
    x, wide, run = compiled
    found = run(x, wide)[list(FUNCTIONS).index(name)]
    truth = FUNCTIONS[name](x.double())
    assert found.dtype == torch.float32
    error = (found.double() - truth).abs()
    assert (error <= 3e-7 * truth.abs() + 1e-7).all()


def test_what_is_not_finite_stays_so(compiled):
    x, wide, run = compiled
    special = x.clone()
    special[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    for name, found in zip(FUNCTIONS, run(special, wide), strict=False):
        assert found[0].isnan()
        limits = FUNCTIONS[name](special[1:3].double())
        if name != "bernoulli":  # inf - inf there, not finite either way
            same = (found[1:3] == limits) | ((found[1:3] - limits).abs() < 1e-6)
            assert (same | limits.isnan()).all(), name


def test_sums_and_biases(compiled):
    x, wide, run = compiled
    *_, total, kept, layer = run(x, wide)
    assert torch.allclose(total, wide.sum(0), atol=1e-5)
    assert kept.shape == (1, 7)
    assert torch.allclose(layer, functional.linear(wide, wide[:5], x[:5]), atol=1e-4)


def test_the_compilers_cache_is_used():
    """A graph that the cache passes by is compiled anew in every process."""
    from torch._dynamo.utils import counters

    counters.clear()
    x = torch.ones(3)
    lower(capture(lambda x: (torch.tanh(x),), x, flat=True), [x])
    assert not counters["inductor"]["fxgraph_cache_bypass"]
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"]


def test_the_cache_forgets_code_of_other_rewrites(monkeypatch):
    from torch._dynamo.utils import counters

    from pvae import rewrites

    def misses():
        counters.clear()
        lower(capture(lambda x: (torch.tanh(x) + 1,), x, flat=True), [x])
        return counters["inductor"]["fxgraph_cache_miss"]

    x = torch.ones(3)
    misses()
    assert misses() == 0
    monkeypatch.setattr(rewrites.Pass, "uuid", lambda self: str(time.time_ns()))
    assert misses() == 1


def test_large_products_are_those_of_one_dnn(monkeypatch):
    """Forward, towards inputs and weights; of a piece of a matrix; of few rows."""
    from torch._inductor.utils import run_and_get_code

    from pvae import rewrites

    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")

    def products(x, weight, gradient):
        whole = (x @ weight.t(), gradient @ weight, gradient.t() @ x)
        return *whole, gradient[:, 1:] @ weight[1:], x[:7] @ weight.t()

    torch.manual_seed(0)
    x, weight, gradient = torch.randn(600, 128), torch.randn(160, 128), torch.randn(600, 160)
    graph = capture(products, x, weight, gradient, flat=True)
    # Code that is in the cache already is not shown.
    monkeypatch.setattr(rewrites.Pass, "uuid", lambda self: str(time.time_ns()))
    run, code = run_and_get_code(lambda: lower(graph, [x, weight, gradient]))
    assert "".join(code).count("cpu__linear_pointwise(") == 2
    exact = products(x.double(), weight.double(), gradient.double())
    for found, truth in zip(run(x, weight, gradient), exact, strict=True):
        assert torch.allclose(found.double(), truth, atol=1e-4)


def test_double_precision_is_exact():
    x = torch.linspace(-30, 30, 1001).double()
    graph = capture(lambda x: (torch.tanh(x), functional.softplus(x)), x, flat=True)
    tanh, softplus = lower(graph, [x])(x)
    assert torch.allclose(tanh, torch.tanh(x), rtol=1e-14)
    assert torch.allclose(softplus, functional.softplus(x), rtol=1e-13)


def test_capture_refuses_what_reads_a_value():
    def branching(x):
        return x + 1 if float(x.sum()) > 0 else x

    with pytest.raises(StagingError, match="branches on data"):
        capture(branching, torch.ones(3))


def test_captured_noise_is_fresh_and_follows_the_seed():
    graph = capture(lambda x: x + torch.randn_like(x), torch.zeros(5))
    torch.manual_seed(0)
    first, second = graph(torch.zeros(5)), graph(torch.zeros(5))
    torch.manual_seed(0)
    assert torch.equal(graph(torch.zeros(5)), first)
    assert not torch.equal(first, second)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_where_cpp_cannot_call_the_kernels_python_does(monkeypatch, capfd):
    """The C++ wrapper fails, the compiled graph does not; nothing of it is said."""
    import torch._inductor.compile_fx as inductor
    import torch._inductor.config as settings

    tried, compile_fx = [], inductor.compile_fx

    def without_cpp(*args, **kwargs):
        tried.append(settings.cpp_wrapper)
        if settings.cpp_wrapper:
            raise RuntimeError("an operator without a C++ interface")
        return compile_fx(*args, **kwargs)

    monkeypatch.setattr(inductor, "compile_fx", without_cpp)
    x = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    graph = capture(lambda x: (torch.linalg.cholesky(x),), x, flat=True)
    (found,) = lower(graph, [x])(x)
    assert tried == [True, False]
    torch.testing.assert_close(found, torch.linalg.cholesky(x))
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_operator_without_a_cpp_interface_is_called_silently(capfd):
    x = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    graph = capture(lambda x: (torch.linalg.cholesky(x),), x, flat=True)
    torch.testing.assert_close(lower(graph, [x])(x)[0], torch.linalg.cholesky(x))
    assert capfd.readouterr().err == ""
