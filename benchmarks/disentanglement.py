"""Disentanglement of a VAE and of beta-VAEs on Sprites, whose factors are known.

    PVAE_DATA=... python benchmarks/disentanglement.py [--betas 1,4,8] [--seeds 2] [--epochs 25]

Figures of 3x32x32 grey levels in [0, 1], continuous Bernoulli, 3072-256-256-10 and back. Each run
learns from the same frames of training characters; the scores are those of posterior means of
frames of test characters, all six factors (body, bottom, top, hair, action, frame). What each score
estimates is stated in ``pvae.disentanglement``.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import pvae
from pvae.data import load
from pvae.data.sprites import FACTORS, factors
from pvae.disentanglement import disentanglement
from pvae.guides.gaussian import Gaussian
from pvae.latents import encode
from pvae.models.vae import VAE


def main() -> None:
    """Print a row for each beta: means over seeds, with their range where there are several."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--betas", default="1,4,8")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--test", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load("sprites-32", transform="none")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(data.train), generator=generator)[: options.train]
    held = torch.randperm(len(data.test), generator=generator)[: options.test]
    train, test = data.train.x[rows] / 255, data.test.x[held] / 255
    known = factors(data.test.labels[held])
    print(f"{data.name}: {len(train)} train, {len(test)} test; factors {', '.join(FACTORS)}")
    del data
    header = None
    for beta in (float(text) for text in options.betas.split(",")):
        found, started = [], time.perf_counter()
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            likelihood = "continuous_bernoulli"
            model = VAE(train.shape[1], z_dim=10, hidden=(256, 256), likelihood=likelihood)
            guide = Gaussian(train.shape[1], model.latents, hidden=(256, 256), x_mean=train.mean(0))
            pvae.fit(
                model, guide, train, objective=pvae.beta_vae(beta), epochs=options.epochs,
                batch_size=128, lr=1e-3, seed=seed, engine="staged",
            )  # fmt: skip
            codes = encode(model, guide, test)
            scores = disentanglement(codes.matrix(), known, seed=seed).rows()
            active = codes.matrix().var(0) > 0.01
            found.append(scores | {"active": float(active.sum())})
        if header is None:
            header = list(found[0])
            print(f"{'beta':>5}  " + "  ".join(f"{name:>19}" for name in header) + "  seconds")
        cells = []
        for name in header:
            values = [each[name] for each in found]
            spread = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        seconds = (time.perf_counter() - started) / options.seeds
        print(f"{beta:>5g}  " + "  ".join(f"{cell:>19}" for cell in cells) + f"  {seconds:.0f}")


if __name__ == "__main__":
    main()
