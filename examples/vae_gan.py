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
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pvae
from pvae import plots, runs
from pvae import sample_quality as quality
from pvae.adversarial import play
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


def train(
    data: str, grey: Tensor, folder: Path, epochs: tuple[int, int], z_dim: int, seed: int
) -> tuple[dict[str, tuple[Conv, ConvGuide]], list[str]]:
    """Both pairs from the same start, and what was said of a collapse."""
    bits = pvae.data.load(data, binarize="dynamic")
    trained = {name: pair(bits, z_dim, seed) for name in ("VAE", "VAE-GAN")}
    pvae.fit(
        *trained["VAE"], grey, preprocess=torch.bernoulli, epochs=epochs[0], batch_size=64,
        lr=2e-3, lr_schedule="cosine", engine="eager", seed=seed, run_dir=folder / "vae",
    )  # fmt: skip
    game = vae_gan(*trained["VAE-GAN"], image_shape=bits.image_shape)
    contest = play(game, grey, epochs=epochs[1], seed=seed, run_dir=folder)
    for program in (part for both in trained.values() for part in both):
        program.eval()
    return trained, contest.collapsed


def reconstructions(trained: dict[str, tuple[Conv, ConvGuide]], x: Tensor) -> dict[str, Tensor]:
    """Means of ``p(x | z)`` at the posterior's mean."""
    with torch.no_grad():
        return {
            name: model.decode(guide.posterior(x)["z"].mean).mean
            for name, (model, guide) in trained.items()
        }


def main(
    data: str = "mnist",
    rows: int = 20_000,
    vae_epochs: int = 4,
    gan_epochs: int = 6,
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
    shape, top = dataset.image_shape, float((dataset.num_levels or 2) - 1)
    grey, labels = dataset.train.x[:rows] / top, dataset.train.labels
    order = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(0))
    held_out = dataset.test.x[order] / top
    real, more = held_out[:num_samples], held_out[num_samples : 2 * num_samples]
    assert labels is not None
    features = train_classifier(grey, labels[:rows], shape).features
    trained, collapsed = train(data, grey, folder, (vae_epochs, gan_epochs), z_dim, seed)
    pictures = {name: samples(model, num_samples) for name, (model, _) in trained.items()}
    again = reconstructions(trained, real)
    table = {
        name: judge(x, real, features, shape) for name, x in (pictures | {"data": more}).items()
    }
    log_p: dict[str, Tensor] = {}
    bits = torch.bernoulli(held_out[:ais_data], generator=torch.Generator().manual_seed(0))
    for name, (model, guide) in trained.items():
        sharp = quality.gradient_energy(again[name], shape).mean()
        table[name]["sharpness of reconstructions"] = float(
            sharp / quality.gradient_energy(real, shape).mean()
        )
        evidence = pvae.evidence.annealed(
            model, guide, bits, num_chains=16, num_temperatures=ais_temperatures
        )
        table[name]["log p(x) by AIS, nats"] = evidence.mean
        table[name]["its standard error"] = evidence.mean_stderr
        log_p[name] = evidence.log_evidence
    price = log_p["VAE"] - log_p["VAE-GAN"]
    stderr = float(price.std() / math.sqrt(len(price)))
    figures = folder / "figures"
    plots.save(plots.samples_beside_data(pictures, real[:64], shape), figures / "samples.png")
    plots.save(plots.reconstructions(real[:12], again, shape), figures / "reconstructions.png")
    settings = {"data": data, "rows": rows, "vae_epochs": vae_epochs, "gan_epochs": gan_epochs,
                "z_dim": z_dim, "seed": seed}  # fmt: skip
    (folder / "config.yaml").write_text("".join(f"{k}: {v}\n" for k, v in settings.items()))
    (folder / "quality.json").write_text(json.dumps(table, indent=1) + "\n")
    show(table, collapsed)
    print(f"the price of sharpness: {float(price.mean()):.1f} +- {stderr:.1f} nats, paired")
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
                         ("vae-epochs", int), ("gan-epochs", int), ("ais-data", int),
                         ("ais-temperatures", int)):  # fmt: skip
        parser.add_argument(f"--{option}", type=kind, default=argparse.SUPPRESS)
    main(**vars(parser.parse_args()))
