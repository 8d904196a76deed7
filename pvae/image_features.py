"""Features of images by a small classifier trained here, for judging samples offline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pvae.convolutions import ConvolutionalEncoder, image_shape_of
from pvae.errors import DataError
from pvae.seeds import mix

__all__ = ["ImageClassifier", "train_classifier"]

_BLOCK = 1000


class ImageClassifier:
    """A trained classifier and its last hidden layer.

    Args:
        network: Rows to logits.
    """

    def __init__(self, network: ConvolutionalEncoder) -> None:
        self.network = network.eval()

    def features(self, x: Tensor) -> Tensor:
        """Rows ``(N, x_dim)`` to ``(N, F)``."""
        with torch.no_grad():
            return torch.cat(
                [self.network.features(rows) for rows in torch.split(x.float(), _BLOCK)]
            )

    def predict(self, x: Tensor) -> Tensor:
        """The most probable class of each row, ``(N,)``."""
        with torch.no_grad():
            logits = [self.network(rows) for rows in torch.split(x.float(), _BLOCK)]
        return torch.cat(logits).argmax(-1)

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """Share of rows whose class is right."""
        return float((self.predict(x) == labels).double().mean())


def train_classifier(
    x: Tensor,
    labels: Tensor,
    image_shape: Sequence[int] | None = None,
    *,
    num_features: int = 64,
    epochs: int = 2,
    batch_size: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
) -> ImageClassifier:
    """A small convolutional classifier of images, by cross-entropy.

    Args:
        x: Rows ``(N, x_dim)``.
        labels: Classes ``(N,)`` from 0 up.
        image_shape: ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``; a square if left out.
        num_features: F, size of the last hidden layer.
        epochs: Passes over the data.
        batch_size: Data per step.
        lr: Learning rate at the start; it falls to zero.
        seed: Seed of parameters and order; the caller's random stream is untouched.

    Raises:
        DataError: There is not one label for each row.
    """
    if len(labels) != len(x):
        raise DataError(f"{len(x)} images need as many labels, got {len(labels)}")
    shape = image_shape_of(x.shape[1], image_shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, 1))
        network = ConvolutionalEncoder(
            shape, int(labels.max()) + 1, (16, 32), hidden=num_features, activation="relu"
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=lr)
        steps = epochs * -(-len(x) // batch_size)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(x)), batch_size):
                loss = nn.functional.cross_entropy(network(x[rows].float()), labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return ImageClassifier(network)
