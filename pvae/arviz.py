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
from pvae.errors import DataError, OptionError, ProgramError
from pvae.evidence.importance import Evidence, evaluation
from pvae.particles import (
    Layout,
    by_datum,
    draw,
    inspect,
    module_of,
    sample_guide,
    sample_observed,
)

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["posterior_draws", "stream_netcdf", "to_inference_data", "to_netcdf"]

_BLOCK = 2**20  # numbers of a block that is made and written at once
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
    batch = as_batch(x, device=device, model=model)
    rows = take(batch, torch.arange(min(max_data, num_rows(batch)), device=device))
    with evaluation(model, guide, seed=seed, device=device):
        layout = inspect(model, guide, rows) if layout is None else layout
        values = _draw(guide, rows, num_draws, layout)
    return {name: by_datum(values[name], layout, name).cpu() for name in layout.latents}


def _draw(guide: Any, rows: Any, num_draws: int, layout: Layout) -> dict[str, Tensor]:
    if layout.vectorize:
        return sample_guide(guide, rows, num_draws, layout)[0]
    runs = [sample_guide(guide, rows, 1, layout)[0] for _ in range(num_draws)]
    return {name: torch.stack([run[name] for run in runs]) for name in layout.latents}


def to_inference_data(
    *,
    posterior: Mapping[str, Any] | None = None,
    log_likelihood: Mapping[str, Any] | None = None,
    posterior_predictive: Mapping[str, Any] | None = None,
    evidence: Evidence | Mapping[str, Evidence] | None = None,
    observed: Any = None,
    labels: Any = None,
    attrs: Mapping[str, Any] | None = None,
    max_data: int = 1000,
) -> Any:
    """Groups as ArviZ holds them, and ``marginal_evidence``, a group of pvae's own.

    ``log_likelihood`` holds ``log p(x_n | z_n)``, conditional on the datum's own latent.
    ``arviz.loo`` of it asks how well x_n is predicted from other draws of *its own* latent, which
    no new datum has: it is no measure of a model with local latents. Compare models by
    ``marginal_evidence``.

    Args:
        posterior: Latent site -> draws ``(draws, N, ...)``; dimensions there are chain (of length
            1), draw, datum and ``{site}_dim_k``.
        log_likelihood: Observed site -> ``log p(x | z)`` of the same draws, ``(draws, N)``.
        posterior_predictive: Observed site -> draws of data ``(draws, N, ...)``.
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
    drawn = {
        "posterior": posterior,
        "log_likelihood": log_likelihood,
        "posterior_predictive": posterior_predictive,
    }
    groups = _groups(drawn, evidence, observed, labels, dict(attrs or {}), max_data)
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
    log_likelihood: Mapping[str, Any] | None = None,
    posterior_predictive: Mapping[str, Any] | None = None,
    evidence: Evidence | Mapping[str, Evidence] | None = None,
    observed: Any = None,
    labels: Any = None,
    attrs: Mapping[str, Any] | None = None,
    max_data: int = 1000,
) -> Path:
    """Write what :func:`to_inference_data` builds to one netCDF file, whole or not at all."""
    data = to_inference_data(
        posterior=posterior, log_likelihood=log_likelihood,
        posterior_predictive=posterior_predictive, evidence=evidence, observed=observed,
        labels=labels, attrs=attrs, max_data=max_data,
    )  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder) / "data.nc"
        data.to_netcdf(str(aside), engine="h5netcdf")
        write_aside(path, aside.read_bytes())
    return path


def _groups(
    drawn: Mapping[str, Mapping[str, Any] | None],
    evidence: Evidence | Mapping[str, Evidence] | None,
    observed: Any,
    labels: Any,
    attrs: dict[str, Any],
    max_data: int,
) -> dict[str, xr.Dataset]:
    tag = None if labels is None else _array(labels)
    groups = {n: _posterior(draws, tag, max_data) for n, draws in drawn.items() if draws}
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
        if evidence.methods is not None:
            variables["estimator"] = (("datum",), np.array(evidence.methods, dtype=object))
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


# --- streaming -----------------------------------------------------------------------------------


def stream_netcdf(
    path: str | Path,
    model: Any,
    guide: Any,
    x: Any,
    *,
    num_draws: int = 100,
    predictive: bool = False,
    evidence: Evidence | Mapping[str, Evidence] | None = None,
    observed: Any = None,
    labels: Any = None,
    attrs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write draws of all data to one netCDF file, in blocks: never more than a block in memory.

    The groups are those of :func:`to_inference_data`: ``posterior`` (draws of the guide),
    ``log_likelihood`` (``log p(x | z)`` of the same draws, summed over the observed sites, as
    variable ``x``), ``posterior_predictive`` if asked for, ``observed_data`` and
    ``marginal_evidence``. The file appears whole or not at all.

    Args:
        path: The file.
        model: The generative program.
        guide: The inference program.
        x: Data: an array, tensor, tuple or dict of them, N rows.
        num_draws: Draws per datum.
        predictive: Also draw data, ``num_draws`` for each datum.
        evidence: As in :func:`to_inference_data`.
        observed: Observed data ``(N, ...)``; ``x`` itself, where it is one array, if ``None``.
        labels: ``(N,)`` labels.
        attrs: Attributes of every group.
        seed: Seed of the draws; the caller's random stream is untouched.

    Raises:
        OptionError: ``num_draws`` is below one.
        ProgramError: The programs do not fit each other.
        DataError: Shapes disagree.
    """
    import h5netcdf

    if num_draws < 1:
        raise OptionError(f"num_draws must be at least 1, got {num_draws}")
    modules = [m for m in (module_of(model), module_of(guide)) if m is not None]
    device = next((p.device for m in modules for p in m.parameters()), torch.device("cpu"))
    batch = as_batch(x, device=device, model=model)
    if observed is None and isinstance(batch, Tensor):
        observed = batch
    facts = dict(attrs or {})
    small = _groups({}, evidence, observed, labels, facts, 0) if (
        evidence is not None or observed is not None
    ) else {}  # fmt: skip
    tag = None if labels is None else _array(labels)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    try:
        with h5netcdf.File(aside, "w") as file:
            for name, dataset in small.items():
                _write_dataset(file.create_group(name), dataset)
            with evaluation(model, guide, seed=seed, device=device):
                _stream(
                    file, model, guide, batch, num_draws, tag, facts, device,
                    predictive=predictive,
                )  # fmt: skip
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _write_dataset(group: Any, dataset: Any) -> None:
    group.dimensions = {str(name): size for name, size in dataset.sizes.items()}
    for name, variable in dataset.variables.items():
        values = variable.values
        if values.dtype.kind in "OU":
            import h5py  # type: ignore[import-untyped]

            made = group.create_variable(str(name), variable.dims, dtype=h5py.string_dtype())
            made[...] = values.astype(object)
        else:
            group.create_variable(str(name), variable.dims, data=values)
    group.attrs.update({key: value for key, value in dataset.attrs.items() if value is not None})


def _stream(
    file: Any,
    model: Any,
    guide: Any,
    batch: Any,
    num_draws: int,
    tag: NDArray[Any] | None,
    facts: dict[str, Any],
    device: torch.device,
    *,
    predictive: bool,
) -> None:
    total = num_rows(batch)
    probe = take(batch, torch.arange(min(2, total), device=device))
    layout = inspect(model, guide, probe)
    if predictive and layout.particle_dim != -2:
        raise ProgramError(
            "predictive draws need the data plate to be the only one: leave out predictive=True"
        )
    _, _, values = _block(model, guide, probe, 1, layout, predictive=predictive)
    width = sum(value[0].numel() for value in values) / num_rows(probe)
    # To weigh a draw the model makes a datum, whether that is kept or not.
    width += sum(rows[0].numel() for rows in torch.utils._pytree.tree_leaves(probe))
    block = max(1, min(total, int(_BLOCK / (width * num_draws))))
    written: dict[tuple[str, str], Any] = {}
    for start in range(0, total, block):
        stop = min(start + block, total)
        rows = take(batch, torch.arange(start, stop, device=device))
        names, groups, values = _block(model, guide, rows, num_draws, layout, predictive=predictive)
        for name, group, value in zip(names, groups, values, strict=True):
            if (group, name) not in written:
                shape = (1, num_draws, total, *value.shape[2:])
                written[group, name] = _variable(file, group, name, shape, block, value, tag, facts)
            written[group, name][0, :, start:stop] = value.numpy()


def _block(
    model: Any, guide: Any, rows: Any, num_draws: int, layout: Layout, *, predictive: bool
) -> tuple[list[str], list[str], list[Tensor]]:
    """One block's variables: their names, their groups and their values ``(draws, B, ...)``."""
    particles = draw(model, guide, rows, num_draws, layout=layout)
    found = [("posterior", n, by_datum(particles.values[n], layout, n)) for n in layout.latents]
    found.append(("log_likelihood", "x", particles.log_likelihood))
    if predictive:
        made = sample_observed(model, rows, particles.values, num_draws, layout)
        found += [("posterior_predictive", n, v) for n, v in made.items()]
    groups, names, values = zip(*found, strict=True)
    return list(names), list(groups), [value.cpu() for value in values]


def _variable(
    file: Any,
    group: str,
    name: str,
    shape: tuple[int, ...],
    block: int,
    value: Tensor,
    tag: NDArray[Any] | None,
    facts: dict[str, Any],
) -> Any:
    """An empty variable of a group, which is made with its coordinates if need be."""
    from pvae import __version__

    fresh = group not in file.groups
    here = file.create_group(group) if fresh else file.groups[group]
    dims = ("chain", "draw", "datum", *(f"{name}_dim_{k}" for k in range(len(shape) - 3)))
    for dim, size in zip(dims, shape, strict=True):
        if dim not in here.dimensions:
            here.dimensions[dim] = size
            here.create_variable(dim, (dim,), data=np.arange(size))
    if fresh:
        if tag is not None:
            if len(tag) != shape[2]:
                raise DataError(f"labels are of {len(tag)} data and x has {shape[2]} rows")
            here.create_variable("label", ("datum",), data=tag)
        about = {"inference_library": "pvae", "inference_library_version": __version__, **facts}
        here.attrs.update(about)
    dtype = value.numpy().dtype
    chunks = (1, shape[1], min(block, shape[2]), *shape[3:])
    return here.create_variable(name, dims, dtype=dtype, chunks=chunks)
