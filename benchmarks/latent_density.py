"""The evidence of held-out data with a prior fitted to the latents, beside that with N(0, I).

    python benchmarks/latent_density.py [--data digits] [--binarize threshold] [--epochs 60]

One VAE is trained; a mixture of Gaussians and a neural spline flow are fitted to its encoded
training data; each is put in the prior's place. Differences are paired over the test data; seconds
are those of the fit of the density.
"""

from __future__ import annotations

import argparse
import time

import torch

import pvae
from pvae.data import load
from pvae.evidence import importance
from pvae.guides.gaussian import Gaussian
from pvae.latent_density import fit_latent_density, with_prior
from pvae.models.vae import VAE


def main() -> None:
    """Print a row for each prior."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--binarize", default="threshold")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--z-dim", type=int, default=8)
    parser.add_argument("--num-data", type=int, default=1000)
    parser.add_argument("--num-particles", type=int, default=500)
    parser.add_argument("--flow-epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = load(options.data, binarize=options.binarize)
    torch.manual_seed(options.seed)
    model = VAE(data.x_dim, z_dim=options.z_dim)
    guide = Gaussian(data.x_dim, model.latents, x_mean=data.train.x.mean(0))
    run = pvae.fit(
        model, guide, data.train_raw, valid=data.valid, preprocess=data.preprocess,
        epochs=options.epochs, batch_size=100, seed=options.seed,
    )  # fmt: skip
    test = data.test.x[: options.num_data]
    base = importance(model, guide, test, options.num_particles)
    print(f"{data.description()}; {run.seconds:.0f} s of training, {len(test)} test data")
    print(f"{'N(0, I)':<10} {base.mean:9.3f} ± {base.mean_stderr:.3f}   {base}")
    for kind in ("mixture", "flow"):
        started = time.perf_counter()
        density = fit_latent_density(
            model, guide, data.train, kind=kind, max_epochs=options.flow_epochs, num_draws=2
        )
        seconds = time.perf_counter() - started
        found = importance(with_prior(model, density), guide, test, options.num_particles)
        gain = found.log_evidence - base.log_evidence
        stderr = float(gain.std() / len(gain) ** 0.5)
        print(
            f"{kind:<10} {found.mean:9.3f} ± {found.mean_stderr:.3f}   paired "
            f"{float(gain.mean()):+.3f} ± {stderr:.3f}, {seconds:.0f} s, "
            f"{100 * found.unreliable:.1f} % with k-hat > 0.7, chosen by {density.history}"
        )


if __name__ == "__main__":
    main()
