"""Schedules, step by step."""

from __future__ import annotations

import pytest
import torch

from pvae.errors import OptionError
from pvae.schedules import Constant, Cyclical, Linear, as_schedule, free_bits


def test_constant():
    assert [Constant(0.3)(step) for step in (0, 7)] == [0.3, 0.3]
    assert as_schedule(0.25)(100) == 0.25


def test_a_callable_is_a_schedule_as_it_is():
    def schedule(step):
        return step / 2

    assert as_schedule(schedule) is schedule


def test_linear_ends_at_stop_exactly():
    warm_up = Linear(10, start=0.2, stop=0.8)
    assert [warm_up(step) for step in (0, 5, 10, 10_000)] == pytest.approx([0.2, 0.5, 0.8, 0.8])
    assert Linear(7)(7) == 1.0
    assert Linear(1)(0) == 0.0


def test_cyclical_ramps_and_ends_at_stop():
    cyclical = Cyclical(40, cycles=4, ratio=0.5)
    values = [cyclical(step) for step in range(60)]
    assert values[:11] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 0])
    assert values[10:20] == pytest.approx(values[:10])
    assert values[40:] == [1.0] * 20


def test_cyclical_stays_in_range_where_cycles_do_not_divide_steps():
    cyclical = Cyclical(101, cycles=7, ratio=1.0, start=0.1, stop=0.9)
    values = [cyclical(step) for step in range(101)]
    assert min(values) >= 0.1
    assert max(values) <= 0.9
    assert sum(a > b for a, b in zip(values, values[1:], strict=False)) == 6


@pytest.mark.parametrize(
    "build",
    [
        lambda: Linear(0),
        lambda: Cyclical(0),
        lambda: Cyclical(10, cycles=0),
        lambda: Cyclical(10, ratio=0.0),
        lambda: Cyclical(10, ratio=1.5),
    ],
)
def test_empty_schedules_are_refused(build):
    with pytest.raises(OptionError, match="steps >= 1"):
        build()


def test_schedules_are_values():
    assert Linear(10) == Linear(10)
    assert hash(Cyclical(10)) == hash(Cyclical(10))


def test_free_bits_cost_at_least_their_nats_and_have_no_gradient_below():
    for kl, expected, slope in [(0.1, 0.5, 0.0), (0.9, 0.9, 1.0)]:
        term = torch.full((3, 4), kl, requires_grad=True)
        value = free_bits(term, 0.5)
        assert value.shape == ()
        assert value.item() == pytest.approx(expected)
        value.backward()
        assert float(term.grad.sum()) == pytest.approx(slope)


def test_free_bits_look_at_the_mean_over_the_batch():
    kl = torch.tensor([[0.0, 2.0]])
    assert float(free_bits(kl, 0.5)) == 1.0
