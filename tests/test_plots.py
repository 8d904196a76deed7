from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Text

from pvae import plots
from pvae.baselines import PPCA, KernelDensity
from pvae.comparison import Board, Row
from pvae.errors import DataError
from pvae.evidence import Evidence


def history(*bounds, valid=()):
    rows = [{"epoch": k + 1, "bound": b} for k, b in enumerate(bounds)]
    return [row | {"valid_bound": v} for row, v in zip(rows, valid, strict=True)] if valid else rows


def evidence(log_p, khat=None):
    log_p = torch.tensor(log_p, dtype=torch.float64)
    khat = torch.zeros_like(log_p) if khat is None else torch.tensor(khat).double()
    return Evidence(log_p, log_p * 0, log_p * 0 + 8, khat, log_p - 1, 16)


def words(figure):
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(match=lambda a: hasattr(a, "get_text"))]


def overlaps(figure):
    """Pairs of drawn texts whose boxes intersect, and drawn texts that leave the canvas."""
    figure.canvas.draw()
    drawn, draw = {}, Text.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", lambda t, *a, **k: (drawn.update({id(t): t}), draw(t, *a, **k)))
        figure.canvas.draw()
    texts = [t for t in drawn.values() if t.get_visible() and t.get_text().strip()]
    boxes = [(t.get_text(), t.get_window_extent().padded(-1)) for t in texts]
    width, height = figure.canvas.get_width_height()
    cut = [s for s, b in boxes if b.x0 < 0 or b.y0 < 0 or b.x1 > width or b.y1 > height]
    return [(s, t) for k, (s, a) in enumerate(boxes) for t, b in boxes[:k] if a.overlaps(b)] + cut


def row(name, mean, stderr=1.0, kind="exact", **options):
    base = {"difference": mean + 10, "difference_stderr": 0.5, "elbo": None, "unreliable": None}
    base |= {"bits_per_dim": 1.0, "num_parameters": 3, "fit_seconds": None, "score_seconds": 0.1}
    return Row(name=name, mean=mean, stderr=stderr, kind=kind, **(base | options))


def board(*rows):
    return Board(rows, {row.name: evidence([0.0, 1.0]) for row in rows}, 2, 3, "2 test data")


@pytest.fixture(autouse=True)
def _no_pyplot(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


def test_png_is_written_whole_and_equal_for_equal_figures(tmp_path):
    figures = [plots.training_curves({"a": history(1.0, 2.0)}) for _ in range(2)]
    paths = [plots.save(f, tmp_path / "new" / f"{k}.png") for k, f in enumerate(figures)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    height, width = imread(paths[0]).shape[:2]
    assert (400 < height < 1200, 600 < width < 1600) == (True, True)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["0.png", "1.png"]


def test_training_curves_mark_the_best_epoch_and_the_units():
    figure = plots.training_curves(
        {"one": history(1.0, 2.0, 3.0, valid=(0.0, 2.5, 1.0)), "other": history(1.0, 1.5)}
    )
    axes = figure.axes[0]
    best = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    assert [(float(b.get_xdata()[0]), float(b.get_ydata()[0])) for b in best] == [(2, 2.5)]
    assert "nats per datum" in axes.get_ylabel()
    assert {"one", "other", "training", "validation", "best epoch"} <= set(words(figure))
    assert overlaps(figure) == []


def test_training_curves_leave_out_the_plunge_and_say_so():
    settled = [-100 + math.log(k) for k in range(1, 30)]
    plunge = plots.training_curves({"a": history(-9000.0, *settled)})
    assert plunge.axes[0].get_ylim()[0] > -150
    assert "the first epochs lie below the axis" in words(plunge)
    level = plots.training_curves({"a": history(*settled)})
    assert "the first epochs lie below the axis" not in words(level)


def test_mosaics_show_the_very_pixels():
    x = torch.arange(16.0).reshape(4, 4)
    figure = plots.samples_beside_data({"model": x.flip(0)}, x, (2, 2))
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert np.array_equal(shown[0][:2, :2], x[0].reshape(2, 2))
    assert np.array_equal(shown[0][3:, 3:], x[3].reshape(2, 2))
    assert np.array_equal(shown[1][:2, :2], x[3].reshape(2, 2))
    assert [axes.get_title() for axes in figure.axes] == ["data", "model"]


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 5, 3), (1, 4, 15)])
def test_images_of_every_layout(shape):
    x = torch.rand(6, 60)
    figure = plots.reconstructions(x, {"model": x}, shape)
    assert len(figure.axes) == 2
    assert overlaps(figure) == []


def test_colour_images_keep_their_channels():
    x = torch.zeros(4, 3, 2, 2)
    x[:, 0] = 1
    for images, shape in ((x, (3, 2, 2)), (x.permute(0, 2, 3, 1), (2, 2, 3))):
        figure = plots.samples_beside_data({}, images, shape)
        assert np.allclose(figure.axes[0].images[0].get_array()[:2, :2], (1, 0, 0))


def test_reconstructions_stay_in_the_order_of_the_data():
    x = torch.arange(12.0).reshape(3, 4)
    figure = plots.reconstructions(x, {"half": x / 2}, (2, 2))
    first, second = (axes.images[0].get_array() for axes in figure.axes)
    assert np.array_equal(first[:2, :2], x[0].reshape(2, 2))
    assert np.array_equal(second[:2, -2:], x[2].reshape(2, 2) / 2)


@pytest.mark.parametrize(("width", "count"), [(1, 2), (2, 1), (40, 3)])
def test_tables_become_marginals_and_clouds(width, count):
    torch.manual_seed(0)
    samples = {f"model number {k}": torch.randn(50, width) for k in range(count)}
    figure = plots.samples_beside_data(samples, torch.randn(60, width))
    titles = [axes.get_title() for axes in figure.axes]
    assert any("25 to 75 %" in title for title in titles)
    assert [t for t in titles if t in samples] == (list(samples) if width > 1 else [])
    assert ("feature (the first 16 of 40)" in words(figure)) == (width == 40)
    assert overlaps(figure) == []


def test_one_datum_is_a_picture_too(tmp_path):
    for figure in (
        plots.samples_beside_data({"model": torch.randn(50, 3)}, torch.randn(1, 3)),
        plots.latent_scatter(torch.randn(1, 3)),
    ):
        plots.save(figure, tmp_path / "one.png")


def test_reconstructed_tables_tell_the_error():
    x = torch.randn(20, 3)
    figure = plots.reconstructions(x, {"a": x + 0.5, "b": x})
    assert "root mean square error 0.5" in figure.axes[0].get_title()
    assert overlaps(figure) == []


def test_latents_are_projected_and_the_axes_say_so():
    torch.manual_seed(0)
    z = torch.randn(200, 5) * torch.tensor([0.1, 3.0, 0.1, 1.0, 0.1])
    figure = plots.latent_scatter(z, torch.arange(200) % 10)
    axes = figure.axes[0]
    points = np.concatenate([c.get_offsets() for c in axes.collections])
    assert points[:, 0].std() == pytest.approx(3, rel=0.2)
    assert "principal component 1 of 5 dimensions" in axes.get_xlabel()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [str(k) for k in range(10)]
    looks = {
        (to_hex(c.get_facecolor()[0]), str(c.get_paths()[0].vertices)) for c in axes.collections
    }
    assert len(looks) == 10
    assert overlaps(figure) == []


def test_two_latents_are_shown_as_they_are():
    z = torch.randn(30, 2)
    axes = plots.latent_scatter(z).axes[0]
    assert np.allclose(axes.collections[0].get_offsets(), z)
    assert (axes.get_xlabel(), axes.get_legend()) == ("z[0]", None)


def test_numeric_labels_get_a_colour_bar_and_one_latent_a_histogram():
    coloured = plots.latent_scatter(torch.randn(90, 3), torch.rand(90))
    assert len(coloured.axes) == 2
    lone = plots.latent_scatter(torch.randn(90, 1), torch.arange(90) % 2)
    assert (lone.axes[0].get_xlabel(), lone.axes[0].get_ylabel()) == ("z", "data")


def test_evidence_against_tells_the_paired_difference():
    figure = plots.evidence_against(
        evidence([-1.0, -2.0, -3.0], [0.1, 0.9, 0.2]), evidence([-2.0, -3.0, -7.0]), ("a", "b")
    )
    difference = np.array([1.0, 1.0, 4.0])
    stderr = difference.std(ddof=1) / math.sqrt(3)
    assert f"+{difference.mean():.3g} ± {stderr:.2g} nats" in figure.axes[0].get_title()
    trusted, doubtful = figure.axes[0].collections
    assert np.allclose(doubtful.get_offsets(), [[-3, -2]])
    assert np.allclose(sorted(trusted.get_offsets().tolist()), [[-7, -3], [-2, -1]])
    assert figure.axes[0].get_xlim() == figure.axes[0].get_ylim()
    assert overlaps(figure) == []


def test_evidence_far_out_is_drawn_on_the_edge_and_counted():
    values = [-1.0 - k / 100 for k in range(200)]
    figure = plots.evidence_against(evidence([*values, -900.0]), evidence([*values, -math.inf]))
    assert figure.axes[0].get_xlim()[0] > -10
    assert "drawn on their edge" not in figure.axes[0].get_xlabel()
    figure = plots.evidence_against(evidence([*values, -900.0]), evidence([*values, -2.0]))
    assert "1 values beyond the axes" in figure.axes[0].get_xlabel()


def test_board_shows_two_standard_errors():
    figure = plots.board(board(row("best", -10.0, 0.3), row("other", -12.0, 1.5, "estimate")))
    left, right = figure.axes
    for axes, centre, half in ((left, -12.0, 3.0), (right, -2.0, 1.0)):
        segments = [c.get_segments()[0] for c in axes.collections]
        ends = sorted(segments[1][:, 0])
        assert ends == pytest.approx([centre - half, centre + half])
    assert [t.get_text() for t in left.get_yticklabels()] == ["best", "other"]
    assert left.get_ylim()[0] > left.get_ylim()[1]
    assert {"exact", "estimate"} <= set(words(figure))


@pytest.mark.parametrize("count", [1, 3, 14])
def test_board_has_room_for_its_names(count):
    rows = [
        row(f"entry {k} with $a$ long name_x", -10.0 - k, kind="estimate", elbo=-11.0 - k)
        for k in range(count)
    ]
    assert overlaps(plots.board(board(*rows))) == []


def test_board_leaves_out_a_density_of_zero():
    figure = plots.board(board(row("a", -1.0), row("zero", -math.inf, math.nan)))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["a"]


def test_diagnostics_count_what_lies_above_the_line():
    khat = [0.1, 0.69, 0.71, 5.0, -math.inf]
    figure = plots.weights_diagnostics(evidence([0.0] * 5, khat))
    left, right = figure.axes
    assert left.get_title() == "40.0 % of 5 data above 0.7"
    assert "1 without a tail" in left.get_xlabel()
    assert "1 above 2" in left.get_xlabel()
    bars = {to_hex(p.get_facecolor()) for p in left.patches if p.get_height() > 0}
    assert len(bars) == 2
    above = [p for p in left.patches if p.get_height() and p.get_x() >= 0.7 - 1e-9]
    assert sum(p.get_height() for p in above) == 2
    assert right.get_title() == "median effective share 50.0 %"
    assert overlaps(figure) == []


def test_diagnostics_of_exact_evidence_are_drawn_too():
    figure = plots.weights_diagnostics(Evidence.exact(torch.zeros(4)))
    assert "4 without a tail" in figure.axes[0].get_xlabel()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.training_curves({"a": []}), "no epoch"),
        (
            lambda: plots.samples_beside_data({"m": torch.zeros(4, 3)}, torch.zeros(4, 4)),
            "4 features but 'm' has 3",
        ),
        (
            lambda: plots.samples_beside_data({}, torch.zeros(4, 5), (2, 2)),
            r"5 features do not make up an image of shape \(2, 2\)",
        ),
        (
            lambda: plots.reconstructions(torch.zeros(4, 8), {"m": torch.zeros(4, 8)}, (2, 2, 2)),
            "1 or 3 channels",
        ),
        (
            lambda: plots.reconstructions(torch.zeros(4, 8), {"m": torch.zeros(0, 8)}, (2, 4)),
            "'m' is empty",
        ),
        (lambda: plots.latent_scatter(torch.zeros(4, 2), torch.zeros(3)), "4 latents .* got 3"),
        (lambda: plots.evidence_against(evidence([0.0]), evidence([0.0, 1.0])), "1 and 2 data"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_selection_curves_ring_the_choice_and_leave_out_what_had_none():
    rng = np.random.default_rng(0)
    x, valid = rng.normal(size=(80, 5)), rng.normal(size=(40, 5))
    densities = {
        "PPCA": PPCA([1, 2, 3]).fit(x, valid),
        "kernels": KernelDensity().fit(x, valid),
        "fixed": PPCA(2).fit(x),
    }
    figure = plots.selection_curves(densities)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["PPCA", "kernels"]
    ring = shown[0].lines[-1]
    chosen = densities["PPCA"].chosen
    assert ring.get_xdata()[0] == chosen
    assert ring.get_ydata()[0] == densities["PPCA"].selection[chosen]
    with pytest.raises(DataError, match="give several n_components"):
        plots.selection_curves({"fixed": densities["fixed"]})
