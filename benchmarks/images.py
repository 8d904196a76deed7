"""A convolutional VAE and an MLP VAE of images at equal process time, by their test evidence.

Both see the same binarised images, batches and learning-rate schedule; each trains for as many
epochs as fill the budget at the process seconds of its own step, timed first. Importance sampling
weighs the same test images for both, so the difference is paired.

Run:  python benchmarks/images.py --seconds 120 --data mnist omniglot --seeds 3
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from typing import Any

import torch

import pvae
from pvae import runs
from pvae.guides.conv import Conv as ConvGuide
from pvae.guides.gaussian import Gaussian
from pvae.models.conv import Conv
from pvae.models.vae import VAE

LR, Z_DIM = 2e-3, 16


def pair(kind: str, dataset: Any, seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    moments = runs.statistics(dataset)
    if kind == "mlp":
        model: Any = VAE(dataset.x_dim, z_dim=Z_DIM)
        return model, Gaussian(dataset.x_dim, model.latents, **moments)
    model = Conv(dataset.x_dim, dataset.image_shape, z_dim=Z_DIM)
    return model, ConvGuide(dataset.x_dim, model.latents, dataset.image_shape, **moments)


def train(kind: str, dataset: Any, seconds: float, batch_size: int, seed: int) -> dict[str, Any]:
    model, guide = pair(kind, dataset, seed)
    options = {
        "preprocess": dataset.preprocess,
        "batch_size": batch_size,
        "lr": LR,
        "engine": "eager",
    }
    raw = dataset.train_raw
    probe = copy.deepcopy((model, guide))
    pvae.fit(*probe, raw[: 2 * batch_size], epochs=2, progress=False, **options)
    started = time.process_time()
    pvae.fit(*probe, raw[: 20 * batch_size], epochs=1, progress=False, **options)
    step = (time.process_time() - started) / 20
    epochs = max(1, round(seconds / (step * math.ceil(len(raw) / batch_size))))
    started = time.process_time()
    run = pvae.fit(
        model, guide, raw, epochs=epochs, lr_schedule="cosine", seed=seed, progress=False, **options
    )
    spent = time.process_time() - started
    return {"run": run, "epochs": epochs, "seconds": spent, "step": 1e3 * step}


def compare(name: str, seed: int, arguments: argparse.Namespace) -> None:
    """Both pairs trained and weighed from one seed: their lines, and the difference."""
    dataset = pvae.data.load(name, binarize="dynamic")
    x, scores = dataset.test.x[: arguments.test], {}
    for kind in ("conv", "mlp"):
        found = train(kind, dataset, arguments.seconds, arguments.batch_size, seed)
        run = found["run"]
        evidence = pvae.evidence.importance(
            run.model, run.guide, x, num_particles=arguments.num_particles
        )
        scores[kind] = evidence.log_evidence
        print(
            f"{name:14} {seed:4}  {kind:5} {run.num_parameters:10,} {found['step']:8.1f} "
            f"{found['epochs']:7} {found['seconds']:10.0f}  "
            f"{evidence.mean:.2f} +- {evidence.mean_stderr:.2f}",
            flush=True,
        )
    gap = scores["conv"] - scores["mlp"]
    stderr = float(gap.std() / math.sqrt(len(gap)))
    print(f"{name:14} {seed:4}  conv - mlp: {float(gap.mean()):+.2f} +- {stderr:.2f} nats, paired",
          flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120, help="process seconds of a training")
    parser.add_argument("--data", nargs="+", default=["mnist", "fashion-mnist"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--test", type=int, default=1000, help="test images that are weighed")
    parser.add_argument("--num-particles", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("data           seed  pair  parameters  ms/step  epochs  process s  "
          "test log evidence (nats)")  # fmt: skip
    for name in arguments.data:
        for seed in range(arguments.seeds):
            compare(name, seed, arguments)


if __name__ == "__main__":
    main()
