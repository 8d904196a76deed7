"""Whether VAE-GAN training is stable: the same small run from several seeds.

Each seed trains a VAE-GAN for a few hundred steps, and its samples are judged as in
examples/vae_gan.py, in pixels (no classifier is needed): sharpness relative to the data's, kernel
discrepancy, and whether a side collapsed.

Run:  python benchmarks/vae_gan.py --seeds 5
"""

from __future__ import annotations

import argparse

import torch

import pvae
from pvae import runs
from pvae import sample_quality as quality
from pvae.adversarial import play
from pvae.convolutions import ConvolutionalEncoder
from pvae.games import vae_gan
from pvae.guides.conv import Conv as ConvGuide
from pvae.models.conv import Conv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--rows", type=int, default=6400)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bits = pvae.data.load(arguments.data, binarize="dynamic")
    grey = bits.train_raw[: arguments.rows]
    real = bits.train_raw[-1000:]
    known = {"image_shape": bits.image_shape, **runs.statistics(bits)}
    print("seed  accuracy  sample spread  sharpness  MMD^2 (pixels)  seconds  collapsed")
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        torch.manual_seed(seed)
        model = Conv(bits.x_dim, bits.image_shape)
        guide = ConvGuide(bits.x_dim, model.latents, **known)
        discriminator = ConvolutionalEncoder(
            model.shape, 1, (16, 32), activation="leaky_relu", spectral=True
        )
        game = vae_gan(model, guide, discriminator)
        contest = play(game, grey, epochs=arguments.epochs, seed=seed, progress=False)
        with torch.no_grad():
            made = model.decode(model.latent_prior().sample((1000,))).mean
        sharp = quality.gradient_energy(made, bits.image_shape).mean()
        sharp = sharp / quality.gradient_energy(real, bits.image_shape).mean()
        last = contest.history[-1]
        print(
            f"{seed:4} {last['accuracy']:9.2f} {last['sample_spread']:14.2f} {float(sharp):10.2f} "
            f"{quality.mmd2(real, made):15.4f} {contest.seconds:8.0f}  "
            f"{'; '.join(contest.collapsed) or 'no'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
