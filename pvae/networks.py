"""Networks that map tensors to tensors; none of them knows of distributions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pvae.errors import OptionError, did_you_mean

__all__ = ["ACTIVATIONS", "MLP", "Encoder", "activation_module", "join", "one_hot"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def activation_module(name: str) -> nn.Module:
    """The activation called ``name``: elu, gelu, leaky_relu, relu, silu, softplus or tanh.

    Raises:
        OptionError: there is none of that name.
    """
    if name not in ACTIVATIONS:
        raise OptionError(f"no activation is called {name!r}: {did_you_mean(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class MLP(nn.Sequential):
    """A multilayer perceptron ``(*, in_features) -> (*, out_features)``.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        hidden: Width of each hidden layer; empty for a linear map.
        activation_name: Non-linearity after each hidden layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (200, 200),
        *,
        activation_name: str = "tanh",
    ) -> None:
        layers: list[nn.Module] = []
        width = in_features
        for size in hidden:
            layers += [nn.Linear(width, size), activation_module(activation_name)]
            width = size
        super().__init__(*layers, nn.Linear(width, out_features))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network: ``(*, in_features) -> (*, out_features)``."""
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return y


def join(*parts: Tensor) -> Tensor:
    """Features ``(*, n_i)`` of several sources side by side: ``(*, n_1 + n_2 + ...)``.

    Batch shapes are broadcast, so that ``(K, B, n)`` and ``(B, m)`` give ``(K, B, n + m)``.
    """
    shapes = [part.shape[:-1] for part in parts]
    batch = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)


def one_hot(index: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Integers ``(*,)`` as indicators ``(*, num_classes)``.

    Unlike torch's own it reads nothing back from the device, so that a step can be staged; an
    integer out of range gives zeros.
    """
    classes = torch.arange(num_classes, device=index.device)
    return (index[..., None] == classes).to(dtype)


class Encoder(nn.Module):
    """Data to features: standardised, then a multilayer perceptron that ends in its non-linearity.

    ``features``: ``(*, x_dim) -> (*, out_features)``.

    Args:
        x_dim: Number of features of a datum.
        hidden: Width of each layer, the last of which is ``out_features``; empty for the
            standardised data themselves.
        activation_name: Non-linearity after each layer.
        x_mean: Subtracted from the data, ``(x_dim,)``; none by default.
        x_scale: By which they are divided, ``(x_dim,)``; none by default.
    """

    x_mean: Tensor
    x_scale: Tensor

    def __init__(
        self,
        x_dim: int,
        hidden: Sequence[int] = (200, 200),
        *,
        activation_name: str = "silu",
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features = hidden[-1] if hidden else x_dim
        self.register_buffer("x_mean", torch.zeros(x_dim) if x_mean is None else x_mean.clone())
        self.register_buffer("x_scale", torch.ones(x_dim) if x_scale is None else x_scale.clone())
        self.body: nn.Module = nn.Identity()
        if hidden:
            layers = MLP(x_dim, hidden[-1], hidden[:-1], activation_name=activation_name)
            self.body = nn.Sequential(layers, activation_module(activation_name))

    def forward(self, x: Tensor) -> Tensor:
        """Features of ``x``: ``(*, x_dim) -> (*, out_features)``."""
        features: Tensor = self.body((x - self.x_mean) / self.x_scale)
        return features
