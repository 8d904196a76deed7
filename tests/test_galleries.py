"""Galleries: what is drawn where, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pvae import galleries
from pvae.errors import DataError
from pvae.latent_paths import Traversal
from pvae.out_of_distribution import Auroc, Detection


def drawn(figure):
    """The arrays of the images in a figure, NaN where nothing was drawn."""
    figure.canvas.draw()
    return [image.get_array().filled(np.nan) for axes in figure.axes for image in axes.images]


def words(figure):
    figure.canvas.draw()
    return [t.get_text() for t in figure.findobj(match=lambda a: hasattr(a, "get_text"))]


def traversal(dims=3, steps=4, data=2, size=4):
    """Dimension k adds k times the step to every feature."""
    change = torch.arange(dims)[:, None] * torch.arange(steps)
    decoded = change[:, :, None, None].expand(dims, steps, data, size).double()
    names = tuple(("z", k) for k in range(dims))
    return Traversal(names, torch.linspace(0.1, 0.9, steps), change, {"x": decoded})


def test_samples_are_laid_out_row_by_row():
    x = torch.arange(5.0)[:, None].expand(5, 4)
    (mosaic,) = drawn(galleries.sample_grid(x, (2, 2), title="five"))
    cells = mosaic[::3, ::3]
    assert np.array_equal(cells[:2, :3].reshape(-1)[:5], np.arange(5.0))
    assert np.isnan(cells[1, 2])
    assert len(drawn(galleries.sample_grid(torch.rand(4, 12), (3, 2, 2)))) == 1


def test_each_datum_stands_beside_its_reconstruction():
    x = torch.arange(5.0)[:, None].expand(5, 4)
    pictures = drawn(galleries.pairs(x, x + 10, (2, 2), columns=2))
    assert np.array_equal(pictures[0][::3, ::3], [[0, 10], [2, 12], [4, 14]])
    assert np.array_equal(pictures[1][::3, ::3][:2], [[1, 11], [3, 13]])
    assert np.isnan(pictures[1][::3, ::3][2]).all()


def test_a_path_runs_from_left_to_right():
    steps = torch.arange(3.0)[:, None, None] + 10 * torch.arange(2.0)[:, None]
    (mosaic,) = drawn(galleries.interpolations(steps.expand(3, 2, 4), (2, 2)))
    assert np.array_equal(mosaic[::3, ::3], [[0, 1, 2], [10, 11, 12]])
    first, *_ = drawn(galleries.interpolations(steps.expand(3, 2, 4)))
    assert np.array_equal(first, np.tile([0, 1, 2], (4, 1)))


def test_the_dimension_that_does_most_comes_first():
    figure = galleries.traversals(traversal(), "x", (2, 2))
    (mosaic,) = drawn(figure)
    assert np.array_equal(mosaic[::3, ::3], [[0, 2, 4, 6], [0, 1, 2, 3], [0, 0, 0, 0]])
    said = words(figure)
    assert said.index("z[2]") < said.index("z[1]") < said.index("z[0]")
    assert {"10 %", "90 %"} <= set(said)
    change, *_ = drawn(galleries.traversals(traversal(), "x"))
    assert np.array_equal(change, [[6] * 4, [3] * 4, [0] * 4])


def test_scores_are_shown_with_their_areas():
    found = Detection(torch.randn(50), 3 + torch.randn(40), Auroc(0.987, 0.012))
    figure = galleries.scores({"evidence": found, "typicality": found})
    assert words(figure).count("AUROC 0.987 ± 0.012") == 2
    heights = [sum(p.get_height() for p in c) for c in figure.axes[0].containers]
    assert heights == pytest.approx([1, 1])  # every datum is somewhere
    constant = Detection(torch.zeros(3), torch.zeros(3), Auroc(0.5, 0.0))
    assert galleries.scores({"evidence": constant})


def test_importances_are_named():
    figure = galleries.importances(np.eye(3)[:, :2], ["body", "hair"])
    assert np.array_equal(drawn(figure)[0], np.eye(3)[:, :2])
    assert {"body", "hair"} <= set(words(figure))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: galleries.sample_grid(torch.zeros(0, 4), (2, 2)), "nothing to draw"),
        (lambda: galleries.sample_grid(torch.zeros(3, 5), (2, 2)), "do not make up an image"),
        (lambda: galleries.pairs(torch.zeros(3, 4), torch.zeros(2, 4), (2, 2)), "of each datum"),
        (lambda: galleries.interpolations(torch.zeros(3, 4)), "paths are"),
        (lambda: galleries.traversals(traversal(), "y"), "no observed site is called 'y'"),
        (lambda: galleries.traversals(traversal(), "x", datum=2), "is of 2 data, got datum 2"),
        (lambda: galleries.scores({}), "no score to draw"),
        (lambda: galleries.importances(np.eye(2), ["a"]), "needs as many names"),
    ],
)
def test_what_cannot_be_drawn_is_said(draw, message):
    with pytest.raises(DataError, match=message):
        draw()
