"""Data sets: three disjoint splits on the model's scale, and the way back to the original scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pvae.data.transforms import Transform

__all__ = ["Dataset", "Dequantize", "Preprocess", "Split"]

Preprocess = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Split:
    """The rows for training, validation or test.

    Attributes:
        x: ``(N, D)`` float32 on the model's scale, with one fixed draw of all noise.
        log_det: ``(N,)`` float64, ``log |det dT/dx|``: what is added to a log density of ``x`` to
            get that of the original data, ``log p_original = log p_model(x) + log_det``, in nats.
        labels: ``(N,)`` int64, or ``None``.
    """

    x: Tensor
    log_det: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def __repr__(self) -> str:
        return f"Split({self.x.shape[0]} x {self.x.shape[1]})"

    def to(self, device: torch.device | str) -> Split:
        """The same rows on ``device``."""
        labels = None if self.labels is None else self.labels.to(device)
        return Split(self.x.to(device), self.log_det.to(device), labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint splits of one source, prepared alike.

    Train on ``train_raw`` with ``preprocess``: both are right for every data set, whether there is
    noise to redraw or not.

    Attributes:
        name: Name of the source, or of the file.
        train: Rows to learn from.
        valid: Rows to choose by.
        test: Rows to report on.
        kind: What a likelihood sees in ``x``: ``"binary"``, ``"continuous"`` or ``"integer"``.
        image_shape: ``(8, 8)`` say, flattened row-major in ``x``; ``None`` for tables.
        train_raw: ``(N, D)`` float32, what ``preprocess`` takes; ``train.x`` without one.
        preprocess: Fresh noise for a batch of ``train_raw`` (dynamic binarisation, dequantisation)
            from torch's global stream; ``None`` where there is nothing to redraw.
        transform: From the original scale, noise added, to the model's scale.
        num_levels: Number of grey levels or counts, 0 to ``num_levels - 1``, of integer sources.
        treatment: What was done, in the words of :func:`load`.
        padding: The number in ``x`` after the end of a sequence; ``None`` where rows have no end.
        vocabulary: Of text, the words that the numbers in ``x`` stand for.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    kind: str
    image_shape: tuple[int, ...] | None
    train_raw: Tensor
    preprocess: Preprocess | None
    transform: Transform
    num_levels: int | None
    treatment: str
    padding: int | None = None
    vocabulary: tuple[str, ...] | None = None

    @property
    def x_dim(self) -> int:
        """Number of features D."""
        return self.train.x.shape[1]

    def num_dims(self, part: Split | None = None) -> float:
        """D; of sequences the mean number of dimensions of a split that are not padding.

        Args:
            part: The split; test if ``None``.
        """
        part = self.test if part is None else part
        if self.padding is None:
            return self.x_dim
        return float((part.x != self.padding).sum()) / len(part)

    def bits_per_dim(self, log_p: Tensor, part: Split | None = None) -> Tensor:
        """``-log_p / (D ln 2)``: nats per datum to bits per dimension, D that of ``num_dims``."""
        return -log_p / (self.num_dims(part) * math.log(2))

    def description(self) -> str:
        """One line: ``digits: 1257/180/360 x 64, continuous (dequantize), original 0..16``."""
        sizes = "/".join(str(len(split)) for split in (self.train, self.valid, self.test))
        levels = "" if self.num_levels is None else f", original 0..{self.num_levels - 1}"
        return f"{self.name}: {sizes} x {self.x_dim}, {self.kind} ({self.treatment}){levels}"

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set with every tensor, those of ``preprocess`` too, on ``device``."""
        preprocess = self.preprocess
        return replace(
            self,
            train=self.train.to(device),
            valid=self.valid.to(device),
            test=self.test.to(device),
            train_raw=self.train_raw.to(device),
            preprocess=preprocess.to(device) if isinstance(preprocess, Dequantize) else preprocess,
            transform=self.transform.to(device),
        )

    def __repr__(self) -> str:
        return f"Dataset({self.description()})"


@dataclass(frozen=True)
class Dequantize:
    """``T(x + u)`` with ``u ~ Uniform[0, 1)``: integers ``(B, D)`` to the model's scale.

    Theis, van den Oord & Bethge (2016), A note on the evaluation of generative models: the mean log
    density of ``x + u`` is a lower bound on the log probability of the integers ``x``.
    """

    transform: Transform

    def __call__(self, raw: Tensor) -> Tensor:
        """Fresh noise from torch's global stream: integers ``(B, D)`` to ``(B, D)``."""
        return self.transform(raw + torch.rand_like(raw))

    def to(self, device: torch.device | str) -> Dequantize:
        """The same map with its constants on ``device``."""
        return Dequantize(self.transform.to(device))
