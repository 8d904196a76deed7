"""Published test log-likelihoods that may stand beside ours, each read in the paper itself.

A number is here only if data, split and binarisation are those of our named set: static MNIST rows
never stand beside dynamic ones. What differs in the protocol is said for each source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Published", "Source", "footnotes", "published"]


@dataclass(frozen=True)
class Source:
    """Where numbers were printed.

    Attributes:
        reference: Authors, venue and table.
        protocol: How their numbers were obtained, where that is not as ours.
    """

    reference: str
    protocol: str


@dataclass(frozen=True)
class Published:
    """One printed number.

    Attributes:
        name: The model, as the source calls it.
        log_p: Mean test log-likelihood, nats per datum.
        source: Where it was printed.
    """

    name: str
    log_p: float
    source: Source


_BURDA = Source(
    "Burda, Grosse & Salakhutdinov (2016), Importance weighted autoencoders, table 3",
    "3280 passes in batches of 20, learning rate 1e-3 falling to 1e-4; 50 latents and 2 x 200 tanh "
    "units (1 layer), or 100 and 50 latents (2 layers); 5000 importance samples",
)
_NEIGHBOURS = Source(
    "quoted by Burda, Grosse & Salakhutdinov (2016), section 5",
    "given there as about this much",
)
_VAMP = Source(
    "Tomczak & Welling (2018), VAE with a VampPrior, table 1",
    "40 latents (two layers of 40: HVAE), 2 x 300 gated units, 500 pseudo-inputs, at most 2000 "
    "passes in batches of 100 with early stopping; 5000 importance samples",
)
_REZENDE = Source(
    "Rezende & Mohamed (2015), as quoted by pythae's reproducibility page",
    "a deep latent Gaussian model with a diagonal posterior",
)
_HVAE = Source(
    "the Hamiltonian VAE paper, as quoted by pythae's reproducibility page",
    "Hamiltonian, not hierarchical; 1000 importance samples",
)
_PYTHAE = Source(
    "pythae (Chadebec et al. 2022), reproducibility page, commit 6419e21",
    "one trained model each, the checkpoint best on validation; 200 (VAE), 1000 (Hamiltonian) or "
    "5000 importance samples; its VAE has 40 latents and 400 ReLU units, its IWAE an extra drop of "
    "the learning rate",
)
_NADE_K = Source(
    "yaoli/nade_k, README",
    "an ensemble over 10 orderings of the pixels",
)
_ALTOSAAR = Source(
    "altosaar/variational-autoencoder, README",
    "a short recipe for a CPU: 65000 steps of a mean-field VAE",
)

_PUBLISHED: Mapping[str, Sequence[Published]] = {
    "mnist-static": (
        Published("VAE, 1 layer", -88.71, _BURDA),
        Published("VAE, 1 layer, 5 samples", -88.83, _BURDA),
        Published("VAE, 1 layer, 50 samples", -89.05, _BURDA),
        Published("IWAE-5, 1 layer", -87.63, _BURDA),
        Published("IWAE-50, 1 layer", -87.10, _BURDA),
        Published("VAE, 2 layers", -88.08, _BURDA),
        Published("IWAE-5, 2 layers", -86.17, _BURDA),
        Published("IWAE-50, 2 layers", -85.32, _BURDA),
        Published("deep belief net", -84.55, _NEIGHBOURS),
        Published("DARN", -84.13, _NEIGHBOURS),
        Published("VAE, VampPrior", -85.57, _VAMP),
        Published("hierarchical VAE, VampPrior", -83.19, _VAMP),
        Published("VAE", -89.9, _REZENDE),
        Published("Hamiltonian VAE", -86.40, _HVAE),
        Published("VAE", -89.78, _PYTHAE),
        Published("IWAE-50", -86.82, _PYTHAE),
        Published("VAE, VampPrior", -85.79, _PYTHAE),
        Published("Hamiltonian VAE", -86.21, _PYTHAE),
        Published("NADE-k, 1 hidden layer", -89.43, _NADE_K),
        Published("NADE-k, 2 hidden layers", -87.13, _NADE_K),
        Published("VAE, mean field", -97.10, _ALTOSAAR),
    ),
}


def published(data: str) -> Sequence[Published]:
    """The printed numbers on a named data set; none for most."""
    return _PUBLISHED.get(data, ())


def footnotes(shown: Sequence[Published]) -> Iterator[tuple[int, Source]]:
    """The sources of some numbers in their order, numbered from 1."""
    yield from enumerate(dict.fromkeys(entry.source for entry in shown), 1)
