"""IWAE bound, annealed importance sampling, BDMC gap and KDE on one decoder of static MNIST.

    PVAE_DATA=... python benchmarks/annealing.py [--weights pair.safetensors] [--images 16]

The pair is 784-200-200-50 and back, tanh, Bernoulli pixels, trained with the ELBO; ``--weights``
keeps it for the next run. Rows are as in Wu, Burda, Salakhutdinov & Grosse (2017): the bound of
5,000 importance weights, AIS, the gap of bidirectional Monte Carlo on as many simulated images, and
a kernel density on samples of the decoder. Pixels being binary, its kernel is that of Aitchison &
Aitken (1976), ``P(x | s) = prod_d (1 - h)^[x_d = s_d] h^[x_d != s_d]``, h chosen on validation.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pvae
from pvae.guides.gaussian import Gaussian
from pvae.models.vae import VAE

HIDDEN, X_DIM, Z_DIM = (200, 200), 784, 50
FLIPS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12)


def kernel_density(samples: Tensor, x: Tensor, flip: float) -> Tensor:
    """``log (1/S) sum_s P(x | s)``: ``(S, D), (N, D) -> (N,)``, nats."""
    unlike = x.sum(1, keepdim=True) + samples.sum(1) - 2 * x @ samples.T
    unlike = unlike.double()
    log_kernel = unlike * math.log(flip) + (x.shape[1] - unlike) * math.log1p(-flip)
    return log_kernel.logsumexp(1) - math.log(len(samples))


def trained(data: pvae.data.Dataset, options: argparse.Namespace) -> nn.ModuleDict:
    """The pair, from the file of an earlier run or by training."""
    torch.manual_seed(options.seed)
    model = VAE(X_DIM, z_dim=Z_DIM, hidden=HIDDEN, activation="tanh")
    guide = Gaussian(X_DIM, model.latents, hidden=HIDDEN, activation="tanh")
    pair = nn.ModuleDict({"model": model, "guide": guide})
    if options.weights is not None and options.weights.exists():
        pair.load_state_dict(load_file(options.weights))
        return pair
    pvae.fit(
        model, guide, data.train.x, objective=pvae.vae(), epochs=options.epochs, batch_size=100,
        lr_schedule="cosine", seed=options.seed, progress=False,
    )  # fmt: skip
    if options.weights is not None:
        save_file(pair.state_dict(), options.weights)
    return pair


def main() -> None:
    """Print the row and the seconds of each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--num-particles", type=int, default=5000)
    parser.add_argument("--num-chains", type=int, default=16)
    parser.add_argument("--num-temperatures", type=int, default=1000)
    parser.add_argument("--num-samples", type=int, default=10_000)
    parser.add_argument("--start", choices=("guide", "prior"), default="guide")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = pvae.data.load("mnist-static")
    chains = {
        "num_chains": options.num_chains,
        "num_temperatures": options.num_temperatures,
        "start": options.start,
        "seed": options.seed,
        "compiled": True,
    }
    clock = time.perf_counter()

    def say(name: str, words: str) -> None:
        nonlocal clock
        print(f"{name:22} {words}  ({time.perf_counter() - clock:.0f} s)", flush=True)
        clock = time.perf_counter()

    pair = trained(data, options)
    model, guide = pair["model"], pair["guide"]
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(options.seed))
    x = data.test.x[order[: options.images]]
    say("trained or loaded", f"{options.epochs} epochs, {len(x)} test images below")

    bound = pvae.evidence.importance(model, guide, x, options.num_particles, seed=options.seed)
    say(f"IWAE-{options.num_particles}", f"{bound.mean:9.3f} ± {bound.mean_stderr:.3f} nats, "
        f"own error {float(bound.stderr.mean()):.3f}, ELBO {float(bound.elbo.mean()):.3f}, "
        f"k-hat > 0.7: {100 * bound.unreliable:.0f} %")  # fmt: skip

    found = pvae.evidence.annealed(model, guide, x, **chains)
    above = found.log_evidence - bound.log_evidence
    say("AIS", f"{found.mean:9.3f} ± {found.mean_stderr:.3f} nats, own error "
        f"{float(found.stderr.mean()):.3f}, over the IWAE bound by {float(above.mean()):.3f} ± "
        f"{float(above.std()) / math.sqrt(len(x)):.3f}")  # fmt: skip

    sandwich = pvae.evidence.sandwich(model, guide, options.images, **chains)
    lower, upper = sandwich
    say("BDMC gap", f"{sandwich.mean_gap:9.3f} ± {sandwich.mean_gap_stderr:.3f} nats on "
        f"simulated images, lower {lower.mean:.3f}, upper {upper.mean:.3f}")  # fmt: skip
    weighed = pvae.evidence.importance(
        model, guide, sandwich.simulated.x, options.num_particles, seed=options.seed
    )
    say("IWAE bound there", f"{weighed.mean:9.3f} nats, below the forward chains by "
        f"{lower.mean - weighed.mean:.3f}, below the reverse ones by "
        f"{upper.mean - weighed.mean:.3f}")  # fmt: skip

    with torch.no_grad():
        samples = model(size=options.num_samples)
    scores = {flip: kernel_density(samples, data.valid.x[:1000], flip).mean() for flip in FLIPS}
    flip = max(FLIPS, key=lambda value: float(scores[value]))
    density = kernel_density(samples, x, flip)
    say("KDE", f"{float(density.mean()):9.3f} ± {float(density.std()) / math.sqrt(len(x)):.3f} "
        f"nats, h = {flip}, {options.num_samples} samples")  # fmt: skip
    print("AIS >= IWAE bound > KDE:", found.mean >= bound.mean > float(density.mean()))


if __name__ == "__main__":
    main()
