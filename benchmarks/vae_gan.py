"""Whether VAE-GAN training is stable, and what it is better at than a VAE with the same decoder.

From each seed a VAE and a VAE-GAN are trained from the same start for as many steps on the same
images, and samples of both are judged against test images: sharpness relative to theirs, and by the
hidden layer of a small classifier the kernel discrepancy and how well a classifier tells the two
apart (0.5 where it guesses).

Run:  python benchmarks/vae_gan.py --seeds 5
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pvae
from pvae import plots, runs
from pvae import sample_quality as quality
from pvae.adversarial import Contest, play
from pvae.games import vae_gan
from pvae.guides.conv import Conv as ConvGuide
from pvae.image_features import train_classifier
from pvae.models.conv import Conv


def pair(bits: Any, seed: int) -> tuple[Conv, ConvGuide]:
    """Model and guide, alike for the same seed."""
    torch.manual_seed(seed)
    model = Conv(bits.x_dim, bits.image_shape)
    known = {"image_shape": bits.image_shape, **runs.statistics(bits)}
    return model, ConvGuide(bits.x_dim, model.latents, **known)


def train(bits: Any, grey: Tensor, epochs: int, seed: int) -> tuple[dict[str, Conv], Contest]:
    """Both decoders, and how the game went."""
    vae, other = pair(bits, seed), pair(bits, seed)
    pvae.fit(
        *vae, grey, preprocess=torch.bernoulli, epochs=epochs, batch_size=64, lr=2e-3,
        lr_schedule="cosine", engine="eager", seed=seed, progress=False,
    )  # fmt: skip
    game = vae_gan(*other, image_shape=bits.image_shape)
    contest = play(game, grey, epochs=epochs, seed=seed, progress=False)
    return {"VAE": vae[0], "VAE-GAN": other[0]}, contest


def samples(model: Conv) -> Tensor:
    """1000 means of ``p(x | z)``, the same z for every model."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        means: Tensor = model.decode(model.latent_prior().sample((1000,))).mean
        return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--rows", type=int, default=6400)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--pictures", type=Path, help="a folder for samples of each seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bits = pvae.data.load(arguments.data, binarize="dynamic")
    levels = pvae.data.load(arguments.data, transform="none")
    top = float((levels.num_levels or 2) - 1)
    grey, labels = bits.train_raw[: arguments.rows], levels.train.labels
    order = torch.randperm(len(levels.test), generator=torch.Generator().manual_seed(0))
    real = levels.test.x[order[:1000]] / top
    assert labels is not None
    features = train_classifier(grey, labels[: arguments.rows], bits.image_shape).features
    energy = float(quality.gradient_energy(real, bits.image_shape).mean())
    print("seed  model    sharpness    MMD^2  two-sample test  accuracy  seconds  collapsed")
    found: dict[str, list[tuple[float, ...]]] = {"VAE": [], "VAE-GAN": []}
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        decoders, contest = train(bits, grey, arguments.epochs, seed)
        pictures = {name: samples(model) for name, model in decoders.items()}
        for name, made in pictures.items():
            sharp = float(quality.gradient_energy(made, bits.image_shape).mean()) / energy
            mmd2 = quality.mmd2(features(real), features(made))
            told = quality.classifier_two_sample_test(features(real), features(made)).accuracy
            found[name].append((sharp, mmd2, told))
            line = f"{seed:4}  {name:8} {sharp:8.2f} {mmd2:9.4f} {told:12.3f}"
            if name == "VAE-GAN":
                line += f" {contest.history[-1]['accuracy']:13.2f} {contest.seconds:8.0f}"
                line += f"  {'; '.join(contest.collapsed) or 'no'}"
            print(line, flush=True)
        if arguments.pictures is not None:
            figure = plots.samples_beside_data(pictures, real[:64], bits.image_shape)
            plots.save(figure, arguments.pictures / f"samples-{seed}.png")
    for name, rows in found.items():
        means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
        print(f"mean  {name:8} {means[0]:8.2f} {means[1]:9.4f} {means[2]:12.3f}")


if __name__ == "__main__":
    main()
