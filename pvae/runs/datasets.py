"""The data of a configuration: what a model has to know of them, and batches as it takes them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pvae.errors import DataError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from pvae.data import Dataset, Split

__all__ = [
    "batch_for",
    "data_of",
    "example_rows",
    "facts",
    "keep_labels",
    "statistics",
    "test_batch",
    "training_data",
]

_EXAMPLE = 8  # rows of the data that a guide may be derived from


def data_of(
    config: dict[str, Any], *, streams: bool = False, like: Dataset | None = None
) -> Dataset:
    """The data set of a configuration; its split does not depend on the seed of the training.

    With ``streams``, the rows of a large file stay there; for ``like`` see :func:`pvae.data.load`.
    """
    from pvae.data import load as load_data

    return load_data(
        config["data"],
        binarize=config["binarize"],
        transform=config["transform"],
        size=config.get("data_size"),
        unreadable=config.get("data_unreadable", "stop"),
        streams=streams,
        like=like,
        seed=0,
    )


def facts(dataset: Dataset) -> dict[str, Any]:
    """What a model may have to know of its data, and a fingerprint of the test split."""
    return {
        "x_dim": dataset.x_dim,
        "num_levels": dataset.num_levels,
        "num_classes": _num_classes(dataset),
        "image_shape": None if dataset.image_shape is None else list(dataset.image_shape),
        "kind": dataset.kind,
        "fingerprint": _fingerprint(dataset.test),
    }


def _num_classes(dataset: Dataset) -> int | None:
    labels = [split.labels for split in (dataset.train, dataset.valid, dataset.test)]
    return max((int(part.max()) + 1 for part in labels if part is not None), default=None)


def _fingerprint(split: Split) -> str:
    from pvae.data.mapped import MappedRows

    digest = hashlib.sha256()
    for block in split.x.blocks() if isinstance(split.x, MappedRows) else [split.x]:
        digest.update(block.contiguous().numpy().tobytes())
    digest.update(split.log_det.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def statistics(dataset: Dataset) -> dict[str, Tensor]:
    """``x_mean`` and ``x_scale`` of the training split, ``(D,)``; constant features get scale 1."""
    from pvae.data.mapped import MappedRows

    x: Any = dataset.train.x
    if isinstance(x, MappedRows):
        mean, scale = x.moments.mean.float(), x.moments.std.float()
    else:
        mean, scale = x.mean(0), x.std(0, correction=0)
    scale = scale.where(scale > 0, scale.new_ones(()))
    return {"x_mean": mean, "x_scale": scale}


def example_rows(dataset: Dataset) -> dict[str, Tensor]:
    """``example_batch`` and ``example_labels``: a few rows, for guides derived from a model."""
    found = {"example_batch": dataset.train.x[:_EXAMPLE].clone()}
    if dataset.train.labels is not None:
        found["example_labels"] = dataset.train.labels[:_EXAMPLE].clone()
    return found


def batch_for(model: Any, x: Tensor, labels: Tensor | None) -> Any:
    """Data as a model takes them: ``x``, or ``(x, labels)`` where its program has a ``y``.

    Raises:
        DataError: the model needs labels, and the data have none.
    """
    if "y" not in inspect.signature(getattr(model, "forward", model)).parameters:
        return x
    if labels is None:
        raise DataError(
            f"{type(model).__name__} needs a label for each datum, and the data have none: put "
            "them into the .npz file as 'labels'"
        )
    return x, labels


def test_batch(model: Any, dataset: Dataset, count: int) -> Any:
    """The first test data, as the model takes them."""
    labels = dataset.test.labels
    return batch_for(model, dataset.test.x[:count], None if labels is None else labels[:count])


def training_data(config: dict[str, Any], model: Any, dataset: Dataset) -> dict[str, Any]:
    """``train``, ``valid``, ``preprocess`` and ``bucket_by`` as :func:`pvae.fit` takes them.

    Raises:
        OptionError: The rows have no lengths, or there are not as many labels as are kept, or the
            model takes none.
    """
    labels = dataset.train.labels
    if labels is not None:
        labels = keep_labels(labels, config["labels"])
    train, preprocess = batch_for(model, dataset.train_raw, labels), dataset.preprocess
    if train is dataset.train_raw and config["labels"] is not None:
        raise OptionError(
            f"labels={config['labels']} is for a model whose program has a y, and "
            f"{type(model).__name__} has none: leave it out"
        )
    if train is not dataset.train_raw and preprocess is not None:
        preprocess = _of_first(preprocess)
    valid = batch_for(model, dataset.valid.x, dataset.valid.labels)
    lengths = _lengths(config["bucket_by"], dataset)
    return {"train": train, "valid": valid, "preprocess": preprocess, "bucket_by": lengths}


def _lengths(bucket_by: str | None, dataset: Dataset) -> Tensor | None:
    """Of the training rows, for batches of like ones: ``(N,)``, or ``None``."""
    if bucket_by is None:
        return None
    if bucket_by != "length":
        raise OptionError(f"bucket_by is 'length' or none, got {bucket_by!r}")
    if dataset.vocabulary is None:
        raise OptionError(f"bucket_by=length is for sentences, and {dataset.name} has none")
    from pvae.sentences import num_words

    return num_words(dataset.train_raw)


def _of_first(preprocess: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same treatment of the first tensor of a batch."""
    return lambda batch: (preprocess(batch[0]), *batch[1:])


def keep_labels(labels: Tensor, count: int | None) -> Tensor:
    """Labels ``(N,)`` of which ``count`` are kept, evenly over the classes; the others are -1.

    Raises:
        OptionError: there are not that many.
    """
    import torch

    if count is None:
        return labels
    if not 0 <= count <= len(labels):
        raise OptionError(f"labels must be from 0 to the {len(labels)} training data, got {count}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    # Each row's rank within its class: the first of every class, then the second of every class.
    ranks = torch.zeros_like(labels)
    for label in torch.unique(labels):  # type: ignore[no-untyped-call]
        rows = order[labels[order] == label]
        ranks[rows] = torch.arange(len(rows))
    kept = order[ranks[order].argsort(stable=True)[:count]]
    return torch.full_like(labels, -1).index_copy(0, kept, labels[kept])
