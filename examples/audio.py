"""A VAE of spoken digits: log-mel spectrograms of any length in, sounds to listen to out.

The spectrograms are those of pvae/audio.py; the model says how long a sound is and what each frame
holds (models/spectrogram.py), the guide reads the frames that count. Whether a digit can still be
recognised in a reconstruction is asked of a classifier that has only seen originals.

Run:  PVAE_DATA=... python examples/audio.py         (the spoken digits of fsdd)
      python examples/audio.py --data my/folder      (the .wav files of a folder)
      python examples/audio.py --data chirps         (toy sounds, no file needed)
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import pvae
from pvae import runs
from pvae.audio import LogMel, num_frames
from pvae.data.audio import FSDD_RATE, read_wav_folder, spoken_digits, write_wav
from pvae.guides.spectrogram import Spectrogram as Guide
from pvae.models.spectrogram import Spectrogram as Model


def chirps(size: int, seed: int, samples: int = 2048) -> dict[str, Any]:
    """Toy sounds at 8 kHz: tones that rise, fall or stay, from a tenth to a quarter of a second."""
    random = np.random.default_rng(seed)
    kinds, lengths = random.integers(0, 3, size), random.integers(samples // 3, samples, size)
    x = np.zeros((size, samples), np.float32)
    for row, kind, n in zip(x, kinds, lengths, strict=True):
        pitch = random.uniform(400, 1200) * np.exp(np.linspace(0, (kind - 1) * 1.2, n))
        row[:n] = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 8000) + random.normal(0, 0.01, n)
    return {"x": x, "lengths": lengths, "labels": kinds}


@dataclass
class Sounds:
    """Log-mel spectrograms ``(N, T, F)``, their numbers of frames, perhaps their labels."""

    x: Tensor
    lengths: Tensor
    labels: Tensor | None

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        """What the model scores."""
        return self.x.flatten(1), self.lengths


def load(data: str) -> tuple[dict[str, Any], int]:
    """Clips of train, valid and test, and their sample rate."""
    if data == "chirps":
        parts = {part: chirps(120, seed) for seed, part in enumerate(("train", "valid", "test"))}
        return {
            f"{p}_{key}": value for p, part in parts.items() for key, value in part.items()
        }, 8000
    if data == "fsdd":
        arrays: dict[str, Any] = spoken_digits()
        return {f"{k}_x" if "_" not in k else k: v for k, v in arrays.items()}, FSDD_RATE
    arrays = read_wav_folder(data)
    rate = int(arrays.pop("rate"))
    if "x" not in arrays:
        raise pvae.PvaeError(f"{data} holds splits of its own: give a folder without them")
    order = np.random.default_rng(0).permutation(len(arrays["x"]))
    cuts = [math.ceil(0.7 * len(order)), math.ceil(0.8 * len(order))]
    found: dict[str, Any] = {}
    for part, rows in zip(("train", "valid", "test"), np.split(order, cuts), strict=True):
        if len(rows) == 0:
            raise pvae.PvaeError(f"{data} holds {len(order)} sounds, expected at least 5: add some")
        found |= {f"{part}_{key}": value[rows] for key, value in arrays.items()}
    return found, rate


def prepare(arrays: dict[str, Any], part: str, mel: LogMel) -> Sounds:
    """Log-mel spectrograms, silent after the end of each clip."""
    x = mel(torch.as_tensor(arrays[f"{part}_x"]))
    lengths = num_frames(torch.as_tensor(arrays[f"{part}_lengths"]), mel.spectrogram.hop)
    counts = torch.arange(mel.frames) < lengths[:, None]
    labels = arrays.get(f"{part}_labels")
    return Sounds(
        x.masked_fill(~counts[..., None], mel.silence),
        lengths,
        None if labels is None else torch.as_tensor(labels),
    )


def statistics(sounds: Sounds) -> dict[str, Tensor]:
    """Mean and standard deviation of every band over the frames that count, ``(T * F,)`` each."""
    counts = torch.arange(sounds.x.shape[1]) < sounds.lengths[:, None]
    frames, times = sounds.x[counts], sounds.x.shape[1]
    return {"x_mean": frames.mean(0).repeat(times), "x_scale": frames.std(0).repeat(times)}


def recognised(train: Sounds, versions: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    """Share of right answers of a support vector machine that has learned the originals."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    judge = make_pipeline(StandardScaler(), SVC(C=10))
    judge.fit(train.x.flatten(1).numpy(), train.labels)
    return {
        name: float((judge.predict(x.flatten(1).numpy()) == labels.numpy()).mean())
        for name, x in versions.items()
    }


def pictures(rows: dict[str, tuple[Tensor, Tensor]], seconds: float) -> Any:
    """Time to the right, pitch upward: a row for each kind."""
    columns = max(len(x) for x, _ in rows.values())
    figure, grid = plt.subplots(
        len(rows), columns, figsize=(1.7 * columns, 1.5 * len(rows)), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    low, high = -9.0, float(next(iter(rows.values()))[0].max())
    for line, (name, (x, _)) in zip(grid, rows.items(), strict=True):
        for axes, one in zip(line, x, strict=False):
            axes.imshow(
                one.T.numpy(), origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high,
                extent=(0, seconds, 0, one.shape[-1]),
            )  # fmt: skip
        line[0].set_ylabel(f"{name}\nmel band", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("seconds", fontsize=8)
    return figure


@torch.no_grad()
def listen(run: pvae.Run, test: Sounds, mel: LogMel, count: int) -> dict[str, Any]:
    """Spectrograms and lengths: originals, reconstructions, samples and a path between two."""
    model, guide = run.model.eval(), run.guide.eval()
    z = guide.posterior(*test.batch)["z"].mean
    torch.manual_seed(1)
    chosen = torch.randperm(len(z))[:count]
    drawn = torch.randn(count, model.z_dim)
    steps = torch.linspace(0, 1, count)[:, None]
    path = z[chosen[0]] * (1 - steps) + z[chosen[-1]] * steps
    return {
        "original": (test.x[chosen], test.lengths[chosen]),
        "reconstruction": model.mean(z[chosen]),
        "sample": model.mean(drawn),
        "interpolation": model.mean(path),
    }


@torch.no_grad()
def judged(run: pvae.Run, train: Sounds, test: Sounds, mel: LogMel) -> dict[str, float]:
    """The classifier on originals, on what is left of them in the model, and on the sounds made."""
    if test.labels is None:
        return {}
    rebuilt, lengths = run.model.mean(run.guide.posterior(*test.batch)["z"].mean)

    def heard(x: Tensor, ends: Tensor) -> Tensor:
        counts = torch.arange(mel.frames) < ends[:, None]
        return mel(mel.inverse(x, ends)).masked_fill(~counts[..., None], mel.silence)

    versions = {
        "originals": test.x,
        "originals, as sounds made from their log-mel": heard(test.x, test.lengths),
        "reconstructions": rebuilt,
        "reconstructions, as sounds": heard(rebuilt, lengths),
    }
    return recognised(train, versions, test.labels)


def main(
    data: str = "fsdd",
    epochs: int = 40,
    z_dim: int = 32,
    channels: tuple[int, ...] = (64, 96, 128),
    num_particles: int = 200,
    count: int = 6,
    out: str | None = None,
) -> None:
    """Train, judge, and write sounds; everything lands in one folder."""
    final = Path(out) if out else runs.next_folder("example-audio")
    settings = {name: value for name, value in locals().items() if name not in ("final", "out")}
    arrays, rate = load(data)
    mel = LogMel(rate, arrays["train_x"].shape[1])
    sets = {part: prepare(arrays, part, mel) for part in ("train", "valid", "test")}
    train, test = sets["train"], sets["test"]
    print(f"{len(train.x)} sounds to learn from, {mel.frames} frames of {mel.bands} mel bands")
    with runs.create(final) as folder:
        runs.write_json(folder / "config.json", settings)
        torch.manual_seed(0)
        model = Model(
            mel.frames * mel.bands, image_shape=(mel.frames, mel.bands), z_dim=z_dim,
            channels=channels, padding=mel.silence, **statistics(train),
        )  # fmt: skip
        run = pvae.fit(
            model, Guide(model, channels=channels), train.batch, valid=sets["valid"].batch,
            epochs=epochs, batch_size=64, lr=2e-3, lr_schedule="cosine", engine="eager",
            run_dir=folder, checkpoint_every=None,
        )  # fmt: skip
        evidence = pvae.evidence.importance(run.model, run.guide, test.batch, num_particles)
        shares = judged(run, train, test, mel)
        found = {
            "nats per frame of log-mel": float(evidence.log_evidence.sum() / test.lengths.sum()),
            "nats per clip": float(evidence.log_evidence.mean()),
            "share recognised": shares,
        }
        runs.write_json(folder / "results.json", found)
        shown = listen(run, test, mel, count)
        for name, (x, lengths) in shown.items():
            for number, clip in enumerate(mel.inverse(x, lengths)):
                write_wav(folder / "wavs" / f"{name}_{number}.wav", clip, rate)
        seconds = mel.samples / rate
        figure = pictures(shown, seconds)
        pvae.plots.save(figure, folder / "figures" / "spectrograms.png")
        plt.close(figure)
        curves = pvae.plots.training_curves({"spectrogram VAE": run.history})
        pvae.plots.save(curves, folder / "figures" / "training_curves.png")
    print(f"{found['nats per frame of log-mel']:.2f} nats a frame of {mel.bands} log-mel numbers")
    for name, share in shares.items():
        print(f"{share:6.1%} recognised: {name}")
    print(f"wrote {final}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="fsdd", help="fsdd, a folder of .wav files, or chirps")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", help="folder to write (runs/example-audio-<n>)")
    main(**vars(parser.parse_args()))
