"""What every picture starts from: colours, empty figures, axes, legends, and a file."""

from __future__ import annotations

import io
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae.checkpoints import write_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "GREY",
    "INK",
    "MARKERS",
    "empty_figure",
    "grid_of_axes",
    "legend_beside",
    "polish",
    "rows_and_columns",
    "save",
    "shortened",
    "single_axes",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*", "<", ">")
GREY = "#8A8A8A"
INK = "#333333"


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all; its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_aside(path, content.getvalue())
    return path


def empty_figure(width: float, height: float) -> Figure:
    """A figure without axes, in inches, that no window and no ``pyplot`` knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def single_axes(width: float, height: float) -> tuple[Figure, Any]:
    """A figure with one pair of axes."""
    figure = empty_figure(width, height)
    axes = figure.subplots()
    polish(axes)
    return figure, axes


def grid_of_axes(
    rows: int, columns: int, *, width: float, height: float, bare: bool = True
) -> tuple[Figure, list[Any]]:
    """A figure with axes in rows and columns; bare ones show nothing of themselves."""
    figure = empty_figure(width, height)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off() if bare else polish(axes)
    return figure, grid


def rows_and_columns(count: int) -> tuple[int, int]:
    """At most four in a row, the rows as even as can be."""
    rows = math.ceil(count / 4)
    return rows, math.ceil(count / rows)


def polish(axes: Any) -> None:
    """Quiet spines, small ticks and a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(visible=True, color="#EEEEEE", lw=0.8)
    axes.set_axisbelow(True)


def legend_beside(axes: Any, **options: Any) -> None:
    """A legend on the right of the axes."""
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    axes.legend(frameon=False, fontsize=9, **place, **options)


def shortened(name: str, width: int = 24) -> str:
    """A name as it is (no mathematics in it), cut where it is too long for a picture."""
    return textwrap.shorten(str(name), width=max(width, 8), placeholder="…").replace("$", r"\$")
