"""A VAE and a VAE-GAN with the same decoder, side by side: sharper samples, and their price.

Both learn grey images. The VAE is trained by ``pvae.fit`` on bits drawn from the grey values; the
VAE-GAN (Larsen et al. 2016) by ``pvae.adversarial.play`` on the grey values themselves. Samples are
judged by what no training saw: sharpness, kernel and classifier two-sample tests, precision and
recall on the features of a small classifier. What a VAE is for, the likelihood, is estimated for
both decoders by annealed importance sampling of test images.

Run:  python examples/vae_gan.py        (writes runs/vae-gan-mnist; docs/images.md tells what it
shows); --data fashion-mnist, --seed 1 and so on by the arguments of ``main``.
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
from pvae import sample_quality as quality
from pvae.adversarial import play
from pvae.convolutions import ConvolutionalEncoder
from pvae.games import vae_gan
from pvae.guides.conv import Conv as ConvGuide
from pvae.image_features import train_classifier
from pvae.models.conv import Conv


def pair(data: Any, z_dim: int, seed: int) -> tuple[Conv, ConvGuide]:
    """The same decoder and encoder for both, from the same start."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"channels": (16, 32), "hidden": 128}
    model = Conv(data.x_dim, data.image_shape, z_dim=z_dim, likelihood="bernoulli", **options)
    known = {"image_shape": data.image_shape, **runs.statistics(data)}
    return model, ConvGuide(data.x_dim, model.latents, **known, **options)


def samples(model: Conv, size: int, seed: int = 7) -> Tensor:
    """Means of ``p(x | z)`` at draws from the prior: the decoder's pictures."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        z = model.latent_prior().sample((size,))
        return torch.cat([model.decode(part).mean for part in torch.split(z, 500)])


def judge(pictures: Tensor, data: Tensor, features: Any, shape: Any) -> dict[str, float]:
    """Every measure of samples against as many test images."""
    real, made = features(data), features(pictures)
    kernel = quality.kernel_test(real, made, permutations=200)
    classifier = quality.classifier_two_sample_test(real, made)
    near, dense = quality.precision_recall(real, made), quality.density_coverage(real, made)
    sharp = float(quality.gradient_energy(pictures, shape).mean())
    return {
        "sharpness, share of the data's": sharp
        / float(quality.gradient_energy(data, shape).mean()),
        "MMD^2": kernel.mmd2,
        "MMD^2 p-value": kernel.p_value,
        "C2ST accuracy": classifier.accuracy,
        "C2ST low": classifier.low,
        "C2ST high": classifier.high,
        "precision": near.precision,
        "recall": near.recall,
        "density": dense.density,
        "coverage": dense.coverage,
        "Frechet distance (own classifier)": quality.frechet_distance(real, made),
    }


def main(
    data: str = "mnist",
    rows: int = 20_000,
    vae_epochs: int = 6,
    gan_epochs: int = 10,
    num_samples: int = 1000,
    ais_data: int = 20,
    ais_temperatures: int = 100,
    z_dim: int = 16,
    seed: int = 0,
    out: str | None = None,
) -> dict[str, dict[str, float]]:
    """Train both, judge both, and write the folder."""
    folder = Path(out or f"runs/vae-gan-{data}")
    dataset = pvae.data.load(data, transform="none")
    top = float((dataset.num_levels or 2) - 1)
    grey, held_out = dataset.train.x[:rows] / top, dataset.test.x / top
    classifier = train_classifier(grey, dataset.train.labels[:rows], dataset.image_shape)  # type: ignore[index]
    bits = pvae.data.load(data, binarize="dynamic")
    trained: dict[str, tuple[Conv, ConvGuide]] = {}
    trained["VAE"] = pair(bits, z_dim, seed)
    pvae.fit(
        *trained["VAE"], grey, preprocess=torch.bernoulli, epochs=vae_epochs, batch_size=64,
        lr=2e-3, lr_schedule="cosine", seed=seed, run_dir=folder / "vae",
    )  # fmt: skip
    trained["VAE-GAN"] = pair(bits, z_dim, seed)
    shape = trained["VAE"][0].shape
    discriminator = ConvolutionalEncoder(shape, 1, (32, 64), activation="leaky_relu", spectral=True)
    game = vae_gan(*trained["VAE-GAN"], discriminator)
    contest = play(game, grey, epochs=gan_epochs, seed=seed, run_dir=folder)
    table: dict[str, dict[str, float]] = {}
    some = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))]
    pictures, again = {}, {}
    for name, (model, guide) in trained.items():
        model.eval(), guide.eval()
        pictures[name] = samples(model, num_samples)
        with torch.no_grad():
            again[name] = model.decode(guide.posterior(some[:100])["z"].mean).mean
        table[name] = judge(
            pictures[name], some[:num_samples], classifier.features, dataset.image_shape
        )
        table[name]["reconstructions' sharpness"] = float(
            quality.gradient_energy(again[name], dataset.image_shape).mean()
            / quality.gradient_energy(some[:100], dataset.image_shape).mean()
        )
        evidence = pvae.evidence.annealed(
            model, guide, bits.test.x[:ais_data], num_chains=16, num_temperatures=ais_temperatures
        )
        table[name]["log p(x) by AIS, nats"] = evidence.mean
        table[name]["its standard error"] = evidence.mean_stderr
    table["data"] = judge(
        some[num_samples : 2 * num_samples], some[:num_samples], classifier.features,
        dataset.image_shape,
    )  # fmt: skip
    figures = folder / "figures"
    image_shape = dataset.image_shape
    plots.save(plots.samples_beside_data(pictures, some[:64], image_shape), figures / "samples.png")
    plots.save(
        plots.reconstructions(some[:12], again, image_shape), figures / "reconstructions.png"
    )
    settings = {"data": data, "rows": rows, "vae_epochs": vae_epochs, "gan_epochs": gan_epochs,
                "z_dim": z_dim, "seed": seed}  # fmt: skip
    (folder / "config.yaml").write_text("".join(f"{k}: {v}\n" for k, v in settings.items()))
    (folder / "quality.json").write_text(json.dumps(table, indent=1) + "\n")
    show(table, contest.collapsed)
    print(f"wrote {folder}")
    return table


def show(table: dict[str, dict[str, float]], collapsed: list[str]) -> None:
    """The table on the terminal, a measure a line."""
    print(f"{'':36}" + "".join(f"{name:>10}" for name in table))
    for measure in table["VAE"]:
        values = [table[name].get(measure, float("nan")) for name in table]
        print(f"{measure:36}" + "".join(f"{value:10.3g}" for value in values))
    print("\n".join(collapsed) or "no side collapsed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for option, kind in (("data", str), ("seed", int), ("out", str), ("rows", int),
                         ("vae-epochs", int), ("gan-epochs", int)):  # fmt: skip
        parser.add_argument(f"--{option}", type=kind, default=argparse.SUPPRESS)
    main(**vars(parser.parse_args()))
