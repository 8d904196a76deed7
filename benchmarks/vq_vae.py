"""Vector-quantised VAEs of binary 8 x 8 digits: how the codebook learns, and the prior over codes.

For each way of learning, the parts of the bound on test data, nats per datum: ``log p(x | z)``,
``log p(z)`` under frequencies of each position and under the autoregressive prior, both fitted to
the training data's codes afterwards, and the bound with the latter. The number of codes in use is
that of the training data.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits

import pvae
from pvae.codebooks import nearest_code
from pvae.guides.vector_quantised import VectorQuantised
from pvae.models.vq_vae import VQVAE

CODEBOOKS = {
    "by its loss": {},
    "averages": {"decay": 0.99, "dead": 0.0},
    "averages, dead codes seeded": {"decay": 0.99},
    "averages, dead codes seeded, decay 0.95": {"decay": 0.95},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--positions", type=int, nargs="*", default=[4, 8])
    options = parser.parse_args()
    x = (torch.as_tensor(load_digits().data) > 7).float()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    train, test = x[:1400], x[1400:]
    print(
        "positions  codebook                                   x|z    freq.     net   bound  codes"
    )
    for positions in options.positions:
        for name, ways in CODEBOOKS.items():
            for seed in range(options.seeds):
                found = measure(train, test, positions, ways, options.epochs, seed)
                numbers = "".join(f"{value:8.2f}" for value in found[:-1])
                print(f"{positions:9d}  {name:40s}{numbers}{found[-1]:7.0f}", flush=True)


def measure(
    train: torch.Tensor,
    test: torch.Tensor,
    positions: int,
    ways: dict[str, float],
    epochs: int,
    seed: int,
) -> tuple[float, ...]:
    """The parts of the bound, and the number of codes in use."""
    torch.manual_seed(seed)
    wide = (100, 100)
    model = VQVAE(64, num_positions=positions, hidden=wide, prior="autoregressive")
    guide = VectorQuantised(64, model, hidden=wide, **ways)
    pvae.fit(model, guide, train, epochs=epochs, batch_size=100, lr=2e-3, seed=seed,
             engine="staged", progress=False)  # fmt: skip
    guide.eval()  # its codebook follows the data no more
    with torch.no_grad():
        codes = pvae.draw(model, guide, train).values["z"][0]
        model.fit_prior(codes)
        particles = pvae.draw(model, guide, test)
        likelihood, prior = particles.log_likelihood.mean(), particles.log_prior.mean()
        plain = VQVAE(64, num_positions=positions, hidden=wide)
        plain.codebook.copy_(model.codebook)
        plain.fit_prior(codes)
        independent = plain.latent_prior().log_prob(particles.values["z"]).mean()
        used = len(nearest_code(codes, model.codebook).unique())
    return tuple(map(float, (likelihood, independent, prior, likelihood + prior, used)))


if __name__ == "__main__":
    main()
