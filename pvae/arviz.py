"""The seam to ArviZ: posterior draws, observed data and evidence in one netCDF file.

Files open with ``arviz.from_netcdf`` of ArviZ 0.x (an ``InferenceData``) and 1.x (a ``DataTree``).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pvae.checkpoints import write_aside
from pvae.data import as_batch, num_rows, take
from pvae.errors import DataError, OptionError
from pvae.evidence.importance import Evidence, evaluation
from pvae.particles import Layout, inspect, module_of, sample_guide

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["posterior_draws", "to_inference_data", "to_netcdf"]

_COLUMNS = ("log_evidence", "stderr", "ess", "pareto_k", "elbo")


def posterior_draws(
    model: Any,
    guide: Any,
    x: Any,
    num_draws: int = 100,
    *,
    max_data: int = 1000,
    seed: int = 0,
    layout: Layout | None = None,
) -> dict[str, Tensor]:
    """Draws of ``q(z | x)``: latent site -> ``(num_draws, N, ...)``, for the first data.

    They come from the guide and are not weighed: they are draws of the posterior only as far as
    the guide is exact.

    Args:
        model: The generative program.
        guide: The inference program.
        x: Data, N rows.
        num_draws: Draws for each datum.
        max_data: Take at most so many data.
        seed: Seed of the draws; the caller's random stream is untouched.
        layout: What :func:`pvae.particles.inspect` found for this pair; spares looking.

    Raises:
        OptionError: ``num_draws`` or ``max_data`` is below one.
        ProgramError: The programs do not fit each other.
    """
    if num_draws < 1 or max_data < 1:
        raise OptionError(
            f"num_draws and max_data must be at least 1, got {num_draws} and {max_data}"
        )
    modules = [module for module in map(module_of, (model, guide)) if module is not None]
    weights = (p for module in modules for p in module.parameters())
    device = next((p.device for p in weights), torch.device("cpu"))
    batch = as_batch(x, device=device)
    rows = take(batch, torch.arange(min(max_data, num_rows(batch)), device=device))
    with evaluation(model, guide, seed=seed, device=device):
        layout = inspect(model, guide, rows) if layout is None else layout
        values = _draw(guide, rows, num_draws, layout)
    return {name: _by_datum(values[name], layout, name) for name in layout.latents}


def _draw(guide: Any, rows: Any, num_draws: int, layout: Layout) -> dict[str, Tensor]:
    if layout.vectorize:
        return sample_guide(guide, rows, num_draws, layout)[0]
    runs = [sample_guide(guide, rows, 1, layout)[0] for _ in range(num_draws)]
    return {name: torch.stack([run[name] for run in runs]) for name in layout.latents}


def _by_datum(value: Tensor, layout: Layout, name: str) -> Tensor:
    """``(K, inner plates, B, inner plates, event)`` to ``(K, B, inner plates, event)``."""
    data_dim = value.dim() - layout.event_dims[name] + layout.data_dim
    return value.movedim(data_dim, 1).cpu()


def to_inference_data(
    *,
    posterior: Mapping[str, Any] | None = None,
    evidence: Evidence | Mapping[str, Evidence] | None = None,
    observed: Any = None,
    labels: Any = None,
    attrs: Mapping[str, Any] | None = None,
    max_data: int = 1000,
) -> Any:
    """Groups ``posterior``, ``observed_data`` and ``marginal_evidence``, as ArviZ holds them.

    Args:
        posterior: Latent site -> draws ``(draws, N, ...)``; dimensions there are chain (of length
            1), draw, datum and ``{site}_dim_k``.
        evidence: Evidence of N data: its columns per datum; of several entries, by name, with a
            dimension ``entry`` in front.
        observed: Observed data ``(N, ...)``.
        labels: ``(N,)`` labels, a coordinate along datum in every group.
        attrs: Attributes of every group (numbers and strings).
        max_data: Posterior draws of at most so many data, the first ones, are kept.

    Returns:
        An ``arviz.InferenceData`` with ArviZ 0.x, an ``xarray.DataTree`` with ArviZ 1.x.

    Raises:
        DataError: There is nothing to keep, or shapes disagree.
    """
    groups = _groups(posterior, evidence, observed, labels, dict(attrs or {}), max_data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 0.23 advertises 1.0 once a day
        import arviz

    if hasattr(arviz, "InferenceData"):
        return arviz.InferenceData(**groups)
    import xarray as xr

    return xr.DataTree.from_dict(groups)


def to_netcdf(
    path: str | Path,
    *,
    posterior: Mapping[str, Any] | None = None,
    evidence: Evidence | Mapping[str, Evidence] | None = None,
    observed: Any = None,
    labels: Any = None,
    attrs: Mapping[str, Any] | None = None,
    max_data: int = 1000,
) -> Path:
    """Write what :func:`to_inference_data` builds to one netCDF file, whole or not at all."""
    data = to_inference_data(
        posterior=posterior, evidence=evidence, observed=observed, labels=labels, attrs=attrs,
        max_data=max_data,
    )  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder) / "data.nc"
        data.to_netcdf(str(aside), engine="h5netcdf")
        write_aside(path, aside.read_bytes())
    return path


def _groups(
    posterior: Mapping[str, Any] | None,
    evidence: Evidence | Mapping[str, Evidence] | None,
    observed: Any,
    labels: Any,
    attrs: dict[str, Any],
    max_data: int,
) -> dict[str, xr.Dataset]:
    tag = None if labels is None else _array(labels)
    groups = {}
    if posterior:
        groups["posterior"] = _posterior(posterior, tag, max_data)
    if observed is not None:
        x = _array(observed)
        groups["observed_data"] = _dataset({"x": (_dims("x", x, ("datum",)), x)}, tag)
    if evidence is not None:
        groups["marginal_evidence"] = _evidence(evidence, tag)
    if not groups:
        raise DataError("there is nothing to keep: pass posterior, evidence or observed")
    from pvae import __version__

    inference = {"inference_library": "pvae", "inference_library_version": __version__}
    return {name: group.assign_attrs(inference | attrs) for name, group in groups.items()}


def _array(value: ArrayLike | Tensor) -> NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _dims(name: str, array: NDArray[Any], leading: tuple[str, ...]) -> tuple[str, ...]:
    if array.ndim < len(leading):
        raise DataError(
            f"{name!r} must have dimensions ({', '.join(leading)}, ...), got shape {array.shape}"
        )
    return leading + tuple(f"{name}_dim_{k}" for k in range(array.ndim - len(leading)))


def _posterior(draws: Mapping[str, Any], tag: NDArray[Any] | None, max_data: int) -> xr.Dataset:
    variables = {}
    for name, value in draws.items():
        array = _array(value)
        dims = _dims(name, array, ("draw", "datum"))
        variables[name] = (("chain", *dims), array[None, :, :max_data])
    return _dataset(variables, None if tag is None else tag[:max_data])


def _evidence(evidence: Evidence | Mapping[str, Evidence], tag: NDArray[Any] | None) -> xr.Dataset:
    if isinstance(evidence, Evidence):
        variables = {name: (("datum",), _array(getattr(evidence, name))) for name in _COLUMNS}
        facts = {name: getattr(evidence, name) for name in ("method", "num_particles", "kind")}
        return _dataset(variables, tag).assign_attrs(units="nats", **facts)
    if len({len(each) for each in evidence.values()}) != 1:
        raise DataError("evidence of several entries must be of the same data")
    entries = list(evidence.values())
    stacked = {
        name: (("entry", "datum"), np.stack([_array(getattr(each, name)) for each in entries]))
        for name in _COLUMNS
    }
    about = {
        name: ("entry", [getattr(each, name) for each in entries])
        for name in ("method", "num_particles", "kind")
    }
    dataset = _dataset(stacked, tag).assign_coords(entry=list(evidence), **about)
    return dataset.assign_attrs(units="nats")


def _dataset(variables: Mapping[str, Any], tag: NDArray[Any] | None) -> xr.Dataset:
    import xarray as xr

    try:
        dataset = xr.Dataset(dict(variables))
        coords = {name: np.arange(size) for name, size in dataset.sizes.items() if name != "entry"}
        labels = {} if tag is None else {"label": ("datum", tag)}
        return dataset.assign_coords(coords | labels)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"draws, data and labels disagree about the data ({reason})") from None
