"""Test log-likelihood on the digits by posterior family and by prior, short runs of one seed.

    python benchmarks/families.py --epochs 100

Binary 8 x 8 digits; log p(x) by importance sampling with 1,000 draws, nats.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits

import pvae
from pvae.guides.bottom_up import BottomUp
from pvae.guides.downward import Downward
from pvae.guides.flow import Flow
from pvae.guides.gaussian import Gaussian
from pvae.guides.low_rank import LowRank
from pvae.guides.mixture import Mixture
from pvae.guides.semi_amortised import SemiAmortised
from pvae.guides.shared import Shared
from pvae.guides.top_down import TopDown
from pvae.guides.vector_quantised import VectorQuantised
from pvae.guides.von_mises_fisher import VonMisesFisher
from pvae.models.hierarchical import Hierarchical
from pvae.models.ladder import Ladder
from pvae.models.two_layer import TwoLayer
from pvae.models.vae import VAE
from pvae.models.vq_vae import VQVAE

D, WIDE = 64, (100, 100)


def vae(**options: Any) -> VAE:
    return VAE(D, z_dim=8, hidden=WIDE, **options)


def two_layer() -> TwoLayer:
    return TwoLayer(D, z_dims=(16, 8), hidden=WIDE, upper_hidden=(50, 50))


def hierarchical(prior: str) -> Hierarchical:
    return Hierarchical(
        D, z_dims=(8, 8), hidden=WIDE, upper_hidden=(50,), prior=prior, prior_components=50
    )


def ladder() -> Ladder:
    return Ladder(D, z_dims=(16, 8), widths=(100, 50))


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "gaussian": (vae, lambda m: Gaussian(D, m.latents, hidden=WIDE)),
    "full": (vae, lambda m: Gaussian(D, m.latents, hidden=WIDE, covariance="full")),
    "low_rank": (vae, lambda m: LowRank(D, m.latents, hidden=WIDE)),
    "mixture": (vae, lambda m: Mixture(D, m.latents, hidden=WIDE)),
    "iaf": (vae, lambda m: Flow(D, m.latents, hidden=WIDE)),
    "nsf": (vae, lambda m: Flow(D, m.latents, hidden=WIDE, kind="nsf")),
    "semi_amortised": (vae, lambda m: SemiAmortised(D, m, hidden=WIDE, steps=3)),
    "mixture prior": (
        lambda: vae(prior="mixture"),
        lambda m: Gaussian(D, m.latents, hidden=WIDE),
    ),
    "vamp prior": (lambda: vae(prior="vamp", prior_components=50), Shared),
    "flow prior": (lambda: vae(prior="flow"), lambda m: Gaussian(D, m.latents, hidden=WIDE)),
    "sphere": (
        lambda: vae(prior="hyperspherical"),
        lambda m: VonMisesFisher(D, m.latents, hidden=WIDE),
    ),
    "two_layer, bottom_up": (two_layer, lambda m: BottomUp(D, m.latents, hidden=WIDE)),
    "hierarchical, vamp": (
        lambda: hierarchical("vamp"),
        lambda m: Downward(D, m, hidden=WIDE, lower_hidden=(50,)),
    ),
    "hierarchical, normal": (
        lambda: hierarchical("normal"),
        lambda m: Downward(D, m, hidden=WIDE, lower_hidden=(50,)),
    ),
    "ladder, top_down": (ladder, lambda m: TopDown(D, m, hidden=WIDE)),
    "vq_vae": (lambda: VQVAE(D, hidden=WIDE), lambda m: VectorQuantised(D, m, hidden=WIDE)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--only", nargs="*", choices=PAIRS, default=list(PAIRS))
    options = parser.parse_args()
    x = (torch.as_tensor(load_digits().data) > 7).float()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    train, test = x[:1400], x[1400:]
    for name in options.only:
        build, guide_of = PAIRS[name]
        torch.manual_seed(0)
        model = build()
        guide = guide_of(model)
        started = time.perf_counter()
        pvae.fit(model, guide, train, epochs=options.epochs, batch_size=100, lr=2e-3,
                 engine="staged", progress=False)  # fmt: skip
        seconds = time.perf_counter() - started
        if isinstance(model, VQVAE):  # its guide is deterministic: the bound, with a fitted prior
            with torch.no_grad():
                model.fit_prior(pvae.draw(model, guide, train).values["z"][0])
                bound = pvae.draw(model, guide, test).log_weights[0]
            mean, error = bound.mean(), bound.std() / len(test) ** 0.5
        else:
            found = pvae.evidence.importance(model, guide, test, 1000, seed=0).log_evidence
            mean, error = found.mean(), found.std() / len(test) ** 0.5
        print(f"{name:22s} {mean:8.2f} ± {error:.2f}   {seconds:5.0f} s", flush=True)


if __name__ == "__main__":
    main()
