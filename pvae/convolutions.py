"""Convolutional networks between flattened images and vectors; none of them knows of distributions.

Images travel as rows ``(*, x_dim)``, row-major in the layout that their data set states; inside a
network they are ``(N, C, H, W)``. Batch normalisation is not offered: with it a datum's log weight
would depend on the other data of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.parametrizations import spectral_norm

from pvae.errors import OptionError, did_you_mean
from pvae.networks import activation_module

__all__ = [
    "ConvolutionalDecoder",
    "ConvolutionalEncoder",
    "GatedPixelLayer",
    "ImageShape",
    "image_shape_of",
]

_NORMALIZATIONS = ("group", "layer", "none")
_GROUP = 8  # channels that share their statistics, at most


class ImageShape(NamedTuple):
    """How a row of features is an image.

    Attributes:
        channels: Number of channels C.
        height: Number of pixel rows H.
        width: Number of pixel columns W.
        channels_last: Whether the row runs through ``(H, W, C)`` rather than ``(C, H, W)``.
    """

    channels: int
    height: int
    width: int
    channels_last: bool

    @property
    def pixels(self) -> int:
        """Number of pixels, H W."""
        return self.height * self.width

    def to_images(self, rows: Tensor) -> Tensor:
        """Rows ``(*, x_dim)`` as images ``(N, C, H, W)``, leading dimensions folded into N."""
        channels, height, width, last = self
        if last:
            return rows.reshape(-1, height, width, channels).movedim(-1, 1)
        return rows.reshape(-1, channels, height, width)

    def to_rows(self, images: Tensor, batch_shape: Sequence[int]) -> Tensor:
        """Images ``(N, C, H, W)`` as rows ``(*batch_shape, x_dim)``."""
        images = images.movedim(1, -1) if self.channels_last else images
        return images.reshape(*batch_shape, self.channels * self.pixels)

    def halved(self, times: int) -> tuple[int, int]:
        """Height and width after ``times`` strides of two, rounded up."""
        return math.ceil(self.height / 2**times), math.ceil(self.width / 2**times)


def image_shape_of(x_dim: int, image_shape: Sequence[int] | None = None) -> ImageShape:
    """The image that ``x_dim`` features make up.

    Args:
        x_dim: Number of features of a datum.
        image_shape: ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)`` as the data set states it; three
            numbers have their channels first if there are 1 or 3 of them. Left out, a square grey
            image.

    Raises:
        OptionError: They make up no such image.
    """
    if image_shape is None:
        side = math.isqrt(x_dim)
        if side * side != x_dim:
            raise OptionError(
                f"{x_dim} features are no square image: give image_shape=(height, width), or take "
                "a model for tables"
            )
        image_shape = (side, side)
    shape = tuple(image_shape)
    if len(shape) not in (2, 3) or min(shape) < 1 or math.prod(shape) != x_dim:
        raise OptionError(
            f"image_shape {shape} is no image of {x_dim} features: expected (H, W), (C, H, W) or "
            "(H, W, C) whose product is that number"
        )
    if len(shape) == 2:
        return ImageShape(1, shape[0], shape[1], channels_last=False)
    if shape[0] in (1, 3):
        return ImageShape(shape[0], shape[1], shape[2], channels_last=False)
    return ImageShape(shape[2], shape[0], shape[1], channels_last=True)


class ConvolutionalEncoder(nn.Module):
    """Images to vectors: strided convolutions, residual blocks, a linear map.

    Rows ``(*, x_dim)`` become ``(*, out_features)``. Each entry of ``channels`` halves height and
    width (rounded up).

    Args:
        shape: The image of a row.
        out_features: Size of the last dimension of the output.
        channels: Channels after each halving; at least one.
        blocks: Residual blocks after each halving (He et al. 2016, pre-activation).
        activation: Non-linearity after each convolution.
        normalization: none, group (of 8 channels) or layer (all channels of an image together).
        hidden: Width of a layer between convolutions and output; 0 for none.
        spectral: Divide every weight by its largest singular value (Miyato et al. 2018).

    Raises:
        OptionError: A size, activation or normalisation that cannot be.
    """

    def __init__(
        self,
        shape: ImageShape,
        out_features: int,
        channels: Sequence[int] = (16, 32),
        *,
        blocks: int = 0,
        activation: str = "silu",
        normalization: str = "none",
        hidden: int = 0,
        spectral: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(channels, blocks)
        self.shape = shape
        layers: list[nn.Module] = []
        width = shape.channels
        for size in channels:
            layers += [nn.Conv2d(width, size, 3, stride=2, padding=1)]
            layers += [*_normalized(normalization, size), activation_module(activation)]
            layers += [_Residual(size, activation, normalization) for _ in range(blocks)]
            width = size
        layers += [nn.Flatten()]
        features = width * math.prod(shape.halved(len(channels)))
        if hidden:
            layers += [nn.Linear(features, hidden), activation_module(activation)]
        self.body = nn.Sequential(*layers)
        self.output = nn.Linear(hidden or features, out_features)
        if spectral:
            for module in list(self.modules()):
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    spectral_norm(module)

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer: ``(*, x_dim)`` to ``(*, F)``."""
        hidden: Tensor = self.body(self.shape.to_images(x))
        return hidden.reshape(*x.shape[:-1], -1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network: ``(*, x_dim)`` to ``(*, out_features)``."""
        y: Tensor = self.output(self.features(x))
        return y


class ConvolutionalDecoder(nn.Module):
    """Vectors to images of numbers: the encoder's mirror, with transposed convolutions.

    ``(*, in_features)`` become ``(N, out_channels, H, W)`` with the leading dimensions folded into
    N. Each entry of ``channels`` doubles height and width.

    Args:
        in_features: Size of the last dimension of the input.
        shape: The image of a row.
        out_channels: Numbers for each pixel.
        channels: Channels before each doubling, as the encoder has them: widest last.
        blocks: Residual blocks before each doubling.
        activation: Non-linearity after each convolution.
        normalization: none, group (of 8 channels) or layer (all channels of an image together).
        hidden: Width of a layer between input and convolutions; 0 for none.

    Raises:
        OptionError: A size, activation or normalisation that cannot be.
    """

    def __init__(
        self,
        in_features: int,
        shape: ImageShape,
        out_channels: int,
        channels: Sequence[int] = (16, 32),
        *,
        blocks: int = 0,
        activation: str = "silu",
        normalization: str = "none",
        hidden: int = 0,
    ) -> None:
        super().__init__()
        _check_sizes(channels, blocks)
        self.shape, self.start = shape, (channels[-1], *shape.halved(len(channels)))
        head: list[nn.Module] = []
        if hidden:
            head += [nn.Linear(in_features, hidden), activation_module(activation)]
        head += [nn.Linear(hidden or in_features, math.prod(self.start))]
        self.head = nn.Sequential(*head)
        self.stages = nn.ModuleList()
        for width, size in zip(channels[::-1], [*channels[-2::-1], out_channels], strict=True):
            layers: list[nn.Module] = [
                _Residual(width, activation, normalization) for _ in range(blocks)
            ]
            layers += [*_normalized(normalization, width), activation_module(activation)]
            self.stages.append(nn.Sequential(*layers, nn.ConvTranspose2d(width, size, 4, 2, 1)))

    def forward(self, z: Tensor) -> Tensor:
        """Apply the network: ``(*, in_features)`` to ``(N, out_channels, H, W)``."""
        y: Tensor = self.head(z.reshape(-1, z.shape[-1])).reshape(-1, *self.start)
        for left, stage in zip(range(len(self.stages) - 1, -1, -1), self.stages, strict=True):
            height, width = self.shape.halved(left)
            y = stage(y)[..., :height, :width]
        return y


class GatedPixelLayer(nn.Module):
    """Two stacks of gated, masked convolutions: rows above, and pixels to the left in the row.

    Van den Oord et al. (2016), Conditional image generation with PixelCNN decoders, where one stack
    alone would leave a blind spot.

    ``y = tanh(f) * sigmoid(g)`` with ``(f, g)`` a convolution of the stack plus one of the code.
    The vertical stack sees all rows above and its own; what it hands to the horizontal one is taken
    from the row above, so that no pixel sees itself or a later one.

    Args:
        channels: Channels of the input.
        width: Channels of the output.
        kernel: Side of the square that the masks cut.
        first: The input is the image itself, so a pixel's own value is masked too.
    """

    def __init__(self, channels: int, width: int, kernel: int, *, first: bool) -> None:
        super().__init__()
        self.reach, self.first = kernel // 2, first
        self.down = nn.Conv2d(channels, 2 * width, (self.reach + 1, kernel))
        self.left = nn.Conv2d(channels, 2 * width, (1, self.reach + (not first)))
        self.down_to_left = nn.Conv2d(2 * width, 2 * width, 1)
        self.code = nn.Conv2d(width, 4 * width, 1)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, down: Tensor, left: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """Both stacks ``(N, channels, H, W)`` and the code ``(N, width, H, W)``."""
        reach = self.reach
        code_down, code_left = self.code(code).chunk(2, 1)
        below = self.down(pad(down, (reach, reach, reach, 0)))
        above = pad(below, (0, 0, 1, 0))[..., :-1, :]
        beside = self.left(pad(left, (reach, 0, 0, 0)))
        beside = beside[..., :-1] if self.first else beside
        mixed: Tensor = self.mix(_gated(beside + self.down_to_left(above) + code_left))
        return _gated(below + code_down), mixed if self.first else left + mixed


def _gated(y: Tensor) -> Tensor:
    values, gates = y.chunk(2, 1)
    return torch.tanh(values) * torch.sigmoid(gates)


class _Residual(nn.Module):
    """``y + f(y)`` with two 3 x 3 convolutions, each after normalisation and non-linearity."""

    def __init__(self, channels: int, activation: str, normalization: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [*_normalized(normalization, channels), activation_module(activation)]
            layers += [nn.Conv2d(channels, channels, 3, padding=1)]
        self.change = nn.Sequential(*layers)

    def forward(self, y: Tensor) -> Tensor:
        """Images to images of the same shape."""
        changed: Tensor = y + self.change(y)
        return changed


def _normalized(name: str, channels: int) -> list[nn.Module]:
    if name not in _NORMALIZATIONS:
        hint = did_you_mean(name, _NORMALIZATIONS)
        raise OptionError(f"no normalization is called {name!r}: {hint}")
    if name == "none":
        return []
    groups = channels // _GROUP if name == "group" and channels % _GROUP == 0 else 1
    return [nn.GroupNorm(max(groups, 1), channels)]


def _check_sizes(channels: Sequence[int], blocks: int) -> None:
    if not channels or min(channels) < 1 or blocks < 0:
        raise OptionError(
            f"channels are numbers of at least 1, one for each halving, and blocks is not "
            f"negative; got channels={tuple(channels)}, blocks={blocks}"
        )
