"""The vector-quantised VAE: M latent positions, each one of C code vectors.

    k_m ~ Categorical(pi_m),  z_m = e_(k_m)   (m = 1 .. M),    x_d | z ~ likelihood(decoder(z)_d)

van den Oord, Vinyals & Kavukcuoglu (2017), Neural discrete representation learning. With the
vector_quantised guide, which puts all its mass on one code ``k*(x)``, the bound is

    log p(x) >= log p(x | z = e_k*) + log pi_k*,

tight up to ``-log p(k* | x)``. With the uniform prior the second term is the constant ``-M log C``;
:meth:`VQVAE.fit_prior` replaces it, after training, by the codes' own frequencies, which raises the
bound and is what makes draws of the model look like the data. With ``prior="autoregressive"`` it is
``sum_m log pi(k_m | k_1 ... k_(m-1))`` of a masked network (MADE, Germain et al. 2015, in the place
of the paper's PixelCNN), uniform at first, which learns beside the rest and by ``fit_prior``. The
bound holds whatever the prior, on data that it was not fitted to as on others.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae.codebooks import CodeVectors, DependentCodes, nearest_code
from pvae.errors import OptionError, did_you_mean
from pvae.likelihoods import likelihood, num_outputs
from pvae.networks import MLP, one_hot

__all__ = ["VQVAE"]

_PRIORS = ("independent", "autoregressive")


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
        prior: independent (positions with weights of their own) or autoregressive.
        prior_hidden: Width of each hidden layer of the latter's network.

    Raises:
        OptionError: there are no two codes, or no likelihood or prior is called so.
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
        prior: str = "independent",
        prior_hidden: Sequence[int] = (128,),
    ) -> None:
        super().__init__()
        if prior not in _PRIORS:
            raise OptionError(f"no prior is called {prior!r}: {did_you_mean(prior, _PRIORS)}")
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
        self.network: nn.Module | None = None
        if prior == "autoregressive":
            self.network = _masked(num_positions, num_codes, prior_hidden)

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"z": (self.logits.shape[0], self.codebook.shape[1])}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score ``x`` of shape ``(B, x_dim)``, or generate ``size`` data with ``x=None``."""
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", self.latent_prior())
            sampled: Tensor = pyro.sample("x", self.decode(z), obs=x)
        return sampled

    def latent_prior(self) -> CodeVectors:
        """``p(z)``: events of shape ``(M, code_dim)``."""
        if self.network is None:
            return CodeVectors(self.codebook, self.logits)
        return DependentCodes(self.codebook, self._conditionals, len(self.logits))

    def _conditionals(self, codes: Tensor) -> Tensor:
        """Logits of each position given the codes before it: ``(*, M, C)`` to ``(*, M, C)``."""
        assert self.network is not None  # noqa: S101
        logits: Tensor = self.network(codes.flatten(-2)).unflatten(-1, self.logits.shape)
        return logits

    def decode(self, z: Tensor) -> Any:
        """``p(x | z)`` for ``z`` of shape ``(*, M, code_dim)``: events of shape ``(x_dim,)``."""
        output = self.decoder(z.flatten(-2))
        return likelihood(self.likelihood, output, num_levels=self.num_levels)

    def fit_prior(self, z: Tensor, *, max_epochs: int = 200, patience: int = 10) -> None:
        """Fit the prior to code vectors of the training data, the rest being held.

        The independent prior becomes their frequencies, one more counted for each: the maximum of
        the bound's second term, up to that smoothing. The autoregressive one is trained by Adam
        until every tenth datum, held out, has not become likelier for ``patience`` passes.

        Args:
            z: Code vectors of the training data, ``(N, M, code_dim)``, as the guide draws them.
            max_epochs: Passes at most, for the network.
            patience: Passes without a better held-out likelihood before it stops.

        Raises:
            OptionError: the network is to be fitted to fewer than twenty data.
        """
        num_codes = len(self.codebook)
        codes = nearest_code(z, self.codebook).detach()
        known = one_hot(codes, num_codes, self.logits.dtype)
        if self.network is None:
            counts = known.sum(0) + 1
            self.logits.copy_((counts / counts.sum(-1, keepdim=True)).log())
            return
        if len(z) < 20:
            raise OptionError(f"a prior over codes is fitted to at least 20 data, got {len(z)}")
        held_out = torch.arange(len(known), device=known.device) % 10 == 9
        train, valid = known[~held_out], known[held_out]
        optimizer = torch.optim.Adam(self.network.parameters(), lr=2e-3)
        best, kept, waited = (
            self._log_mass(valid).detach(),
            copy.deepcopy(self.network.state_dict()),
            0,
        )
        for _ in range(max_epochs):
            for rows in torch.split(torch.randperm(len(train), device=known.device), 100):
                optimizer.zero_grad()
                with torch.enable_grad():
                    loss = -self._log_mass(train[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            found, waited = self._log_mass(valid).detach(), waited + 1
            if found > best:
                best, kept, waited = found, copy.deepcopy(self.network.state_dict()), 0
            if waited == patience:
                break
        self.network.load_state_dict(kept)

    def _log_mass(self, codes: Tensor) -> Tensor:
        """Mean log mass of codes ``(N, M, C)`` under the network, nats."""
        log_mass = (self._conditionals(codes).log_softmax(-1) * codes).sum((-1, -2))
        return log_mass.mean()


def _masked(num_positions: int, num_codes: int, hidden: Sequence[int]) -> nn.Module:
    """Indicators to logits, each position's by those before it; zero at first."""
    from zuko.nn import MaskedMLP

    position = torch.arange(num_positions).repeat_interleave(num_codes)
    network: nn.Module = MaskedMLP(position[:, None] > position, hidden, activation=nn.SiLU)
    last: Any = list(network.children())[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return network
