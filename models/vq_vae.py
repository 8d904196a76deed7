"""The vector-quantised VAE: M latent positions, each one of C code vectors.

    k_m ~ Categorical(pi_m),  z_m = e_(k_m)   (m = 1 .. M),    x_d | z ~ likelihood(decoder(z)_d)

van den Oord, Vinyals & Kavukcuoglu (2017), Neural discrete representation learning. With the
vector_quantised guide, which puts all its mass on one code ``k*(x)``, the bound is

    log p(x) >= log p(x | z = e_k*) + log pi_k*,

tight up to ``-log p(k* | x)``. With the uniform prior the second term is the constant ``-M log C``;
:meth:`VQVAE.fit_prior` replaces it, after training, by the codes' own frequencies, which raises the
bound and is what makes draws of the model look like the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae.codebooks import CodeVectors, nearest_code
from pvae.errors import OptionError
from pvae.likelihoods import likelihood, num_outputs
from pvae.networks import MLP

__all__ = ["VQVAE"]


class VQVAE(nn.Module):
    """Code vectors at M positions from a categorical prior, ``x | z`` from a decoder network.

    Args:
        x_dim: Number of features of a datum.
        num_positions: M.
        num_codes: C.
        code_dim: Number of dimensions of a code vector.
        hidden: Width of each hidden layer of the decoder.
        activation: Its non-linearity.
        likelihood: bernoulli, continuous_bernoulli, gaussian or discretized_logistic.
        num_levels: Number of integer levels, for discretized_logistic.

    Raises:
        OptionError: there are no two codes, or no likelihood is called so.
    """

    logits: Tensor

    train_defaults = {"guide": "vector_quantised"}

    def __init__(
        self,
        x_dim: int,
        *,
        num_positions: int = 8,
        num_codes: int = 32,
        code_dim: int = 8,
        hidden: Sequence[int] = (200, 200),
        activation: str = "silu",
        likelihood: str = "bernoulli",
        num_levels: int = 256,
    ) -> None:
        super().__init__()
        if num_codes < 2 or num_positions < 1 or code_dim < 1:
            raise OptionError(
                "a codebook needs num_codes >= 2, num_positions >= 1 and code_dim >= 1, got "
                f"{num_codes}, {num_positions} and {code_dim}"
            )
        self.x_dim, self.likelihood, self.num_levels = x_dim, likelihood, num_levels
        outputs = x_dim * num_outputs(likelihood)
        self.decoder = MLP(num_positions * code_dim, outputs, hidden, activation_name=activation)
        self.codebook = nn.Parameter(torch.randn(num_codes, code_dim))
        self.register_buffer("logits", torch.zeros(num_positions, num_codes))

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"z": (self.logits.shape[0], self.codebook.shape[1])}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score ``x`` of shape ``(B, x_dim)``, or generate ``size`` data with ``x=None``."""
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", CodeVectors(self.codebook, self.logits))
            sampled: Tensor = pyro.sample("x", self.decode(z), obs=x)
        return sampled

    def decode(self, z: Tensor) -> Any:
        """``p(x | z)`` for ``z`` of shape ``(*, M, code_dim)``: events of shape ``(x_dim,)``."""
        output = self.decoder(z.flatten(-2))
        return likelihood(self.likelihood, output, num_levels=self.num_levels)

    @torch.no_grad()
    def fit_prior(self, z: Tensor) -> None:
        """Set the prior to the frequencies of the codes, one more counted for each.

        It is the maximum over pi of the bound's second term, up to that smoothing.

        Args:
            z: Code vectors of the training data, ``(N, M, code_dim)``, as the guide draws them.
        """
        num_codes = len(self.codebook)
        codes = nearest_code(z, self.codebook)
        counts = nn.functional.one_hot(codes, num_codes).sum(0).to(self.logits.dtype) + 1
        self.logits.copy_((counts / counts.sum(-1, keepdim=True)).log())
