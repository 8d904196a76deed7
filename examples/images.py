"""Image models side by side: an MLP decoder, a convolutional one, and a PixelCNN.

All three learn the same binarised digits and are judged by their test evidence. The PixelCNN draws
an image pixel by pixel, so its samples are bits; the others show the means of their pixels.

Run:  python examples/images.py        (writes runs/images-mnist; docs/images.md tells what it
shows); --data omniglot, --data digits or a folder of images by the same option.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pvae
from pvae import plots, runs
from pvae.guides.conv import Conv as ConvGuide
from pvae.guides.gaussian import Gaussian
from pvae.models.conv import Conv
from pvae.models.pixel_cnn import PixelCNN
from pvae.models.vae import VAE


def pairs(dataset: Any, z_dim: int) -> dict[str, tuple[Any, Any]]:
    """Name -> model and guide."""
    x_dim, shape = dataset.x_dim, dataset.image_shape
    known: dict[str, Any] = runs.statistics(dataset)
    torch.manual_seed(0)
    mlp = VAE(x_dim, z_dim=z_dim)
    conv = Conv(x_dim, shape, z_dim=z_dim)
    pixels = PixelCNN(x_dim, shape, z_dim=z_dim, width=12, layers=2)
    return {
        "mlp": (mlp, Gaussian(x_dim, mlp.latents, **known)),
        "conv": (conv, ConvGuide(x_dim, conv.latents, shape, **known)),
        "pixel-cnn": (pixels, ConvGuide(x_dim, pixels.latents, shape, **known)),
    }


def pictures(model: Any, size: int) -> Tensor:
    """Samples for the eye: means of the pixels where they have any, else draws."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        decoded = model.decode(model.latent_prior().sample((size,)))
        drawn: Tensor = decoded.sample() if isinstance(model, PixelCNN) else decoded.mean
        return drawn


def main(
    data: str = "mnist",
    rows: int = 20_000,
    epochs: tuple[int, int, int] = (10, 6, 2),
    z_dim: int = 16,
    test: int = 300,
    num_particles: int = 20,
    num_pictures: int = 36,
    out: str | None = None,
) -> dict[str, dict[str, float]]:
    """Train all three, estimate their evidence, and write the folder."""
    folder = Path(out or f"runs/images-{data}")
    dataset = pvae.data.load(data, binarize="dynamic")
    raw, x = dataset.train_raw[:rows], dataset.test.x[:test]
    table: dict[str, dict[str, float]] = {}
    shown, again = {}, {}
    for (name, (model, guide)), passes in zip(pairs(dataset, z_dim).items(), epochs, strict=True):
        run = pvae.fit(
            model, guide, raw, preprocess=dataset.preprocess, epochs=passes, batch_size=64,
            lr=2e-3, lr_schedule="cosine", engine="eager", run_dir=folder / name,
        )  # fmt: skip
        evidence = pvae.evidence.importance(model, guide, x, num_particles=num_particles)
        table[name] = {
            "log evidence": evidence.mean,
            "standard error": evidence.mean_stderr,
            "seconds": run.seconds,
            "parameters": float(run.num_parameters),
        }
        shown[name] = pictures(model, num_pictures)
        if name != "pixel-cnn":
            with torch.no_grad():
                again[name] = model.decode(guide.posterior(x[:12])["z"].mean).mean
        print(f"{name:10} log p(x) {evidence.mean:8.2f} +- {evidence.mean_stderr:.2f} nats")
    figures, shape = folder / "figures", dataset.image_shape
    plots.save(plots.samples_beside_data(shown, x[:num_pictures], shape), figures / "samples.png")
    plots.save(plots.reconstructions(x[:12], again, shape), figures / "reconstructions.png")
    (folder / "evidence.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {folder}")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    main(arguments.data, out=arguments.out)
