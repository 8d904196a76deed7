"""Sprites: drawn characters whose factors of variation are known, in a full factorial design.

Every frame is composed from layers of pixel art: a body, bottom wear, top wear and hair of six
kinds each, in nine actions (walking, casting a spell, slashing; seen from the front, left and
right) of eight frames: 6^4 x 9 x 8 = 93312 frames. Li & Mandt (2018), Disentangled sequential
autoencoder, whose split by character this is: 1000 to learn from, 296 for test. The last 100 of the
1000 are valid.

A label is a frame's number in the design; :func:`factors` gives the six factors. A video is the
eight frames of a character's action, and its label the number of the first.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvae.data.downloads import find
from pvae.data.files import Arrays, reading
from pvae.errors import DataError

__all__ = ["FACTORS", "Layer", "compose", "factors", "sprites", "sprites_32", "sprites_video"]

FACTORS: Mapping[str, int] = {
    "body": 6, "bottom": 6, "top": 6, "hair": 6, "action": 9, "frame": 8
}  # fmt: skip

_LAYERS = ("body", "bottomwear", "topwear", "hair", "shoes")  # from the skin outward
_FILE = "sprites/sprites_layers.npz"
_SHA256 = "6c1f91e4b36d21e1f83fba93fc7977f709437c4535a61ae29660cad4d66e4a29"
_TRAIN, _VALID = 900, 1000  # characters up to here, in the order of the split
_FRAMES = 72

Image = NDArray[np.uint8]


def factors(labels: Tensor) -> Tensor:
    """Labels ``(N,)`` as the values of the six :data:`FACTORS`, ``(N, 6)``.

    Raises:
        DataError: A label is no frame's number.
    """
    total = math.prod(FACTORS.values())
    if (
        labels.dim() != 1
        or labels.is_floating_point()
        or bool(((labels < 0) | (labels >= total)).any())
    ):
        raise DataError(
            f"labels of sprites are whole numbers (N,) from 0 to {total - 1}, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}"
        )
    columns = []
    for size in list(FACTORS.values())[::-1]:
        columns.append(labels % size)
        labels = labels.div(size, rounding_mode="floor")
    return torch.stack(columns[::-1], 1)


def sprites(root: str | Path | None) -> Arrays:
    """93312 drawn figures of 3x64x64 pixels with six known factors; 64800 train, 7200, 21312.

    A gigabyte of bytes, several once they are real numbers: ``sprites-32`` is a quarter of it.
    """
    return _read(root, 1)


def sprites_32(root: str | Path | None) -> Arrays:
    """The figures of sprites at 3x32x32 pixels: means over squares of four, rounded."""
    return _read(root, 2)


def sprites_video(root: str | Path | None) -> Arrays:
    """11664 videos of 8 frames of 3x32x32 pixels, a character's action each; 8100 train, 900, 2664.

    The figures of sprites-32, ``(N, 8, 3, 32, 32)``; no character is in two splits.
    """
    arrays: Arrays = {}
    for name, array in _read(root, 2).items():
        if name.endswith("_labels"):
            arrays[name] = array[:: FACTORS["frame"]]
        else:
            arrays[name] = array.reshape(-1, FACTORS["frame"], *array.shape[1:])
    return arrays


class Layer(NamedTuple):
    """The pixels that a layer paints: most of it is clear.

    Attributes:
        pixels: Their places in the flattened frames, ``(n,)``.
        colour: ``(n, 3)`` bytes.
        opacity: ``(n, 1)`` bytes; ``None`` where all are opaque.
    """

    pixels: NDArray[np.int64]
    colour: Image
    opacity: Image | None

    @classmethod
    def of(cls, array: NDArray[Any]) -> Layer:
        """From ``(..., 4)`` bytes of red, green, blue and opacity."""
        flat = array.reshape(-1, 4)
        pixels = flat[:, 3].nonzero()[0]
        colour, opacity = flat[pixels, :3], flat[pixels, 3:]
        return cls(pixels, colour, None if (opacity == 255).all() else opacity)


def compose(layers: Sequence[Layer], shape: Sequence[int]) -> Image:
    """Layers laid over black, the first at the bottom: ``(*shape, 3)`` bytes."""
    image: Image = np.zeros((math.prod(shape), 3), np.uint8)
    for pixels, colour, opacity in layers:
        if opacity is None:
            image[pixels] = colour
            continue
        over = opacity.astype(np.int32)
        image[pixels] = (colour * over + image[pixels] * (255 - over) + 127) // 255
    return image.reshape(*shape, 3)


def _read(root: str | Path | None, shrink: int) -> Arrays:
    path = find(_FILE, root)
    if path is None:
        raise DataError(
            f"sprites needs {_FILE}, which is neither in $PVAE_DATA "
            f"({os.environ.get('PVAE_DATA') or 'not set'}) nor in the cache folder, and cannot be "
            "downloaded in this form: set PVAE_DATA to a folder that holds it"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise DataError(
            f"{path} has SHA-256 {digest}, expected {_SHA256}: put the right file there"
        )
    with reading(path, "npz"), np.load(path, allow_pickle=False) as file:
        kinds = [[Layer.of(kind) for kind in file[name]] for name in _LAYERS]
        order = file["train_test_permutation"]
    chosen = {"train": order[:_TRAIN], "valid": order[_TRAIN:_VALID], "test": order[_VALID:]}
    arrays: Arrays = {}
    for part, characters in chosen.items():
        arrays[part] = np.concatenate([_frames(kinds, int(each), shrink) for each in characters])
        numbers = characters.astype(np.int64)[:, None] * _FRAMES + np.arange(_FRAMES)
        arrays[f"{part}_labels"] = numbers.reshape(-1)
    return arrays


def _frames(kinds: Sequence[Sequence[Layer]], character: int, shrink: int) -> Image:
    """All frames of a character, ``(72, 3, 64 / shrink, 64 / shrink)``."""
    numbers = (character // 216, character // 36 % 6, character // 6 % 6, character % 6, 0)
    layers = [each[number] for each, number in zip(kinds, numbers, strict=True)]
    image: NDArray[Any] = compose(layers, (_FRAMES, 64, 64))
    if shrink > 1:
        corners = itertools.product(range(shrink), repeat=2)
        parts = [image[:, down::shrink, across::shrink] for down, across in corners]
        total: Any = np.sum(parts, 0, dtype=np.uint16)
        image = (total + shrink**2 // 2) // shrink**2
    return np.ascontiguousarray(np.moveaxis(image, -1, 1), np.uint8)
