"""What a command works on and with: its data, its processes, its threads."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import runs
from pvae.errors import DataError

if TYPE_CHECKING:
    from pvae.data import Dataset
    from pvae.distributed import Group

__all__ = [
    "data_for", "grouped", "load_data", "threads", "warn_of_padding", "warn_of_unscored",
]  # fmt: skip

_SMALL = 1_000_000  # numbers of training data


def load_data(
    config: dict[str, Any], *, streams: bool = False, like: Dataset | None = None
) -> Dataset:
    """The data set of a configuration, whose path becomes absolute."""
    from pvae.data import sources

    dataset = runs.data_of(config, streams=streams, like=like)
    if config["data"] not in sources():
        config["data"] = str(Path(config["data"]).expanduser().absolute())
    _warn_of_constants(dataset)
    return dataset


def _warn_of_constants(dataset: Dataset) -> None:
    """A density of a feature that never varies is as high as its method's floor allows."""
    from pvae.data.mapped import MappedRows

    if dataset.kind != "continuous":
        return
    x: Any = dataset.train.x
    if isinstance(x, MappedRows):
        same = x.moments.low == x.moments.high
    else:
        same = (x == x[0]).all(0)
    constant = same.nonzero().flatten().tolist()
    if constant:
        warnings.warn(
            f"{len(constant)} of {dataset.x_dim} features never vary in the training data (the "
            f"first is number {constant[0]}): densities there tell of each method's floor alone, "
            "so leave them out before comparing",
            UserWarning,
            stacklevel=2,
        )


def warn_of_padding(model: Any, dataset: Dataset) -> None:
    """A model of tables scores what stands after the end of a sequence like all the rest."""
    if dataset.padding is None or getattr(model, "takes_padding", False):
        return
    share = 1 - dataset.num_dims(dataset.train) / dataset.x_dim
    fit = "text or language_model" if dataset.vocabulary is not None else "deep_markov"
    warnings.warn(
        f"{share:.0%} of the numbers in {dataset.name} stand after the end of a sequence, and a "
        "model without takes_padding = True scores them like the rest, while bits/dim leave them "
        f"out: for such data there is {fit}",
        UserWarning,
        stacklevel=2,
    )


def warn_of_unscored(model: Any, dataset: Dataset) -> None:
    """The change of scale counts all numbers of a datum, also those that a regression is given."""
    first = dataset.valid.log_det[:2]
    if not bool(first.any()):
        return
    labels = None if dataset.valid.labels is None else dataset.valid.labels[:2]
    scored = runs.num_scored(model, runs.batch_for(model, dataset.valid.x[:2], labels))
    if scored < dataset.x_dim:
        warnings.warn(
            f"the model scores {scored} of the {dataset.x_dim} numbers of a datum, and nats on the "
            "original scale count the change of scale of them all: train with --transform none",
            UserWarning,
            stacklevel=2,
        )


def data_for(config: dict[str, Any], other: str | None) -> Dataset:
    """The data of a run, or other data prepared alike."""
    if other is None:
        return _own_data(config)
    known = config["data_facts"]
    own = functools.cache(lambda: _own_data(config))
    is_text = other.endswith(".txt") and known["kind"] == "integer" and bool(own().vocabulary)
    like = own() if is_text else None
    dataset = load_data({**config, "data": other}, streams=True, like=like)
    _require_alike(dataset, known)
    if dataset.vocabulary is not None and dataset.vocabulary != own().vocabulary:
        raise DataError(
            f"{dataset.name} has a vocabulary of its own, so its numbers are other words: give its "
            "sentences as a .txt file"
        )
    same_scale = "standardize" not in dataset.treatment
    if dataset.kind != "continuous" or (same_scale and dataset.num_levels == known["num_levels"]):
        return dataset
    return _moved(dataset, own().transform)


def _own_data(config: dict[str, Any]) -> Dataset:
    from pvae.data import sources

    path = Path(config["data"]).expanduser()
    if config["data"] not in sources() and not path.exists():
        raise DataError(
            f"the data of the run, {path}, are not there: put them back, or say in the run's "
            "config.yaml where they are now"
        )
    dataset = load_data(config, streams=True)
    _require_alike(dataset, config["data_facts"])
    if runs.facts(dataset)["fingerprint"] != config["data_facts"]["fingerprint"]:
        warnings.warn(
            f"{dataset.name} has changed since the training: test data may have been trained on",
            UserWarning,
            stacklevel=2,
        )
    return dataset


def _require_alike(dataset: Dataset, known: Mapping[str, Any]) -> None:
    if dataset.x_dim != known["x_dim"]:
        raise DataError(
            f"the run was trained on {known['x_dim']} features, {dataset.name} has "
            f"{dataset.x_dim}: give data of the same width"
        )
    before, now = known["image_shape"], dataset.image_shape
    if before is not None and now is not None and tuple(before) != now:
        raise DataError(
            f"the run was trained on data of shape {tuple(before)}, {dataset.name} has {now}: give "
            "data of the same shape"
        )
    if dataset.kind != known["kind"]:
        raise DataError(
            f"the run was trained on {known['kind']} data, {dataset.name} is {dataset.kind}: give "
            "data of the same kind"
        )


def _moved(dataset: Dataset, transform: Any) -> Dataset:
    """Data moved to the model's scale as the training data were.

    Standardised by their own moments, data from elsewhere would look like those from here.
    """
    import dataclasses

    import torch

    from pvae.data import Split
    from pvae.data.mapped import MappedRows

    def moved(split: Any) -> Any:
        if isinstance(split.x, MappedRows):
            x: Any = split.x.then(lambda rows: transform(dataset.transform.inverse(rows)))
            offsets = [
                transform.log_abs_det_jacobian(dataset.transform.inverse(rows).double())
                for rows in split.x.blocks()
            ]
            return Split(x, torch.cat(offsets), split.labels)
        x = dataset.transform.inverse(split.x)
        return Split(transform(x), transform.log_abs_det_jacobian(x.double()), split.labels)

    parts = {name: moved(getattr(dataset, name)) for name in ("train", "valid", "test")}
    return dataclasses.replace(dataset, **parts, transform=transform)


@contextlib.contextmanager
def grouped(config: Mapping[str, Any]) -> Iterator[Group | None]:
    """The processes that a launcher started for this command; ``None`` without one."""
    from pvae.distributed import join
    from pvae.training import device_of

    group = join(device_of(config["device"]))
    with contextlib.nullcontext() if group is None else group.working():
        yield group


@contextlib.contextmanager
def threads(dataset: Dataset) -> Iterator[None]:
    """One thread for small data, where several only wait for each other; OMP_NUM_THREADS wins."""
    if dataset.train.x.numel() > _SMALL or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    import sklearn.utils  # its OpenMP must be loaded to be limited  # noqa: F401
    import torch
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
