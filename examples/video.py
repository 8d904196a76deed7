"""Videos taken apart: what a character looks like, and how it moves; then put together anew.

A disentangled sequential VAE (models/disentangled_sequence.py) learns drawn characters in nine
actions. Given two videos it shows the character of one in the motion of the other. Whether that is
what came out is asked of a classifier of action and looks that has only seen originals.

Run:  PVAE_DATA=... python examples/video.py         (sprites, 8 frames of 3x32x32 pixels)
      python examples/video.py --data my/folder      (a folder of .gif files, all of one size)
      python examples/video.py --data squares        (toy videos, no file needed)
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pvae
from pvae import runs
from pvae.data.sprites import FACTORS, factors, sprites_video
from pvae.data.videos import contact_sheet, read_video_folder, write_gif, write_png
from pvae.guides.disentangled_sequence import DisentangledSequence as Guide
from pvae.models.disentangled_sequence import DisentangledSequence as Model

FRAMES = 8


@dataclass
class Videos:
    """Videos ``(N, T, C, H, W)`` between 0 and 1; what they show, ``(N, factors)``, motion last."""

    x: Tensor
    shown: Tensor | None


def squares(size: int, seed: int) -> Videos:
    """Toy videos: a square of one of three colours that goes right, down or both."""
    random = np.random.default_rng(seed)
    x = np.zeros((size, FRAMES, 3, 12, 12), np.float32)
    colours, motions = random.integers(0, 3, size), random.integers(0, 3, size)
    for video, colour, motion in zip(x, colours, motions, strict=True):
        for t, frame in enumerate(video):
            down, across = (t if motion > 0 else 4), (t if motion != 1 else 4)
            frame[colour, down : down + 4, across : across + 4] = 1
    return Videos(torch.as_tensor(x), torch.as_tensor(np.stack([colours, motions], 1)))


def load(data: str, characters: int) -> dict[str, Videos]:
    """Videos of train, valid and test."""
    if data == "squares":
        return {part: squares(90, seed) for seed, part in enumerate(("train", "valid", "test"))}
    if data == "sprites":
        arrays = sprites_video(None)
        counts = {"train": 9 * characters, "valid": 180, "test": len(arrays["test"])}
        found = {}
        for part, count in counts.items():
            shown = factors(torch.as_tensor(arrays[f"{part}_labels"][:count]))
            x = torch.as_tensor(arrays[part][:count]).float() / 255
            found[part] = Videos(x, shown[:, : list(FACTORS).index("action") + 1])
        return found
    every = torch.as_tensor(read_video_folder(data, frames=FRAMES)["x"]).float() / 255
    if len(every) < 5:
        raise pvae.PvaeError(f"{data} holds {len(every)} videos, expected at least 5: add some")
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    cuts = (-(-7 * len(every) // 10), -(-8 * len(every) // 10))
    pieces = order.tensor_split(cuts)
    return {
        part: Videos(every[rows], None)
        for part, rows in zip(("train", "valid", "test"), pieces, strict=True)
    }


class Judge(nn.Module):
    """Names what a video shows: all frames side by side as channels of one picture.

    Args:
        shape: ``(T, C, H, W)`` of a video.
        sizes: Number of values of each factor.
    """

    def __init__(self, shape: tuple[int, ...], sizes: list[int]) -> None:
        super().__init__()
        self.sizes, width, layers = sizes, shape[0] * shape[1], []
        for size in (32, 48, 64):
            layers += [nn.Conv2d(width, size, 3, stride=2, padding=1), nn.ReLU()]
            width = size
        self.body = nn.Sequential(
            *layers, nn.Flatten(), nn.LazyLinear(128), nn.ReLU(), nn.Linear(128, sum(sizes))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(N, T, C, H, W)`` to the logits of each factor."""
        return list(self.body(x.flatten(1, 2)).split(self.sizes, 1))

    @torch.no_grad()
    def names(self, x: Tensor) -> Tensor:
        """``(N, T, C, H, W)`` to the likeliest values ``(N, factors)``."""
        return torch.stack([each.argmax(1) for each in self(x.clamp(0, 1))], 1)


def judge(train: Videos, steps: int) -> Judge | None:
    """A classifier of originals."""
    if train.shown is None:
        return None
    torch.manual_seed(0)
    made = Judge(tuple(train.x.shape[1:]), (train.shown.amax(0) + 1).tolist())
    made(train.x[:1])
    optimizer = torch.optim.Adam(made.parameters(), 2e-3)
    for _ in range(steps):
        rows = torch.randint(len(train.x), (64,))
        told = zip(made(train.x[rows]), train.shown[rows].T, strict=True)
        loss = torch.stack([cross_entropy(logits, truth) for logits, truth in told]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return made


def clip(x: Tensor, frame: int, length: int = 2) -> Tensor:
    """A few frames in a row of each video ``(B, T * frame)``: more characters in the same time."""
    frames = x.reshape(len(x), -1, frame)
    first = int(torch.randint(frames.shape[1] - length + 1, ()))
    return frames[:, first : first + length].flatten(1)


@torch.no_grad()
def swapped(run: pvae.Run, looks: Tensor, moves: Tensor) -> Tensor:
    """Videos with the looks of one ``(N, T, C, H, W)`` and the motion of the other."""
    run.guide.eval()  # in training it sees random mixtures of the colours
    f = run.guide.posterior(looks.flatten(1))["f"].mean
    z = run.guide.posterior(moves.flatten(1))["z"].mean
    mean: Tensor = run.model.decode(f, z).mean
    return mean.reshape(looks.shape)


@torch.no_grad()
def generated(run: pvae.Run, count: int, seen: Tensor | None = None) -> Tensor:
    """Videos of the model's own, no noise on the pixels: motion from its prior, and looks.

    The looks are from their prior too or, given videos, from the aggregated posterior: that of one
    of them, drawn at random. Between the characters seen in training f has holes.
    """
    run.guide.eval()
    torch.manual_seed(2)
    f = torch.randn(count, run.model.f_dim)
    if seen is not None:
        f = run.guide.posterior(seen[torch.randperm(len(seen))[:count]].flatten(1))["f"].sample()
    z = run.model.chain().rsample((count,))
    mean: Tensor = run.model.decode(f, z).mean
    return mean.reshape(count, run.model.length, *run.model.frame_shape)


def judged(run: pvae.Run, expert: Judge | None, test: Videos, count: int) -> dict[str, Any]:
    """Shares of right names: motion, and each of the factors of looks, in originals and swaps."""
    if expert is None or test.shown is None:
        return {}
    torch.manual_seed(1)
    one, two = (torch.randperm(len(test.x))[:count] for _ in range(2))
    expected = torch.cat([test.shown[one, :-1], test.shown[two, -1:]], 1)
    found = {}
    for name, videos, truth in (
        ("originals", test.x[one], test.shown[one]),
        ("reconstructions", swapped(run, test.x[one], test.x[one]), test.shown[one]),
        ("swaps", swapped(run, test.x[one], test.x[two]), expected),
    ):
        right = (expert.names(videos) == truth).float().mean(0).tolist()
        found[name] = {"motion": right[-1], "looks": sum(right[:-1]) / len(right[:-1])}
        found[name] |= {f"looks {number}": share for number, share in enumerate(right[:-1])}
    return found


def write_pictures(run: pvae.Run, train: Videos, test: Videos, folder: Path, count: int) -> None:
    """Contact sheets and animations of reconstructions, swaps and videos of the model's own."""
    torch.manual_seed(3)
    one, two = test.x[torch.randperm(len(test.x))[: 2 * count]].chunk(2)
    zoom = max(1, 64 // one.shape[-1])
    rebuilt, mixed = swapped(run, one, one), swapped(run, one, two)
    rows = [video for four in zip(one, rebuilt, two, mixed, strict=True) for video in four]
    sheets = {
        "swaps": torch.stack(rows),
        "generated": generated(run, 2 * count, train.x),
        "prior": generated(run, 2 * count),
    }
    for name, videos in sheets.items():
        write_png(folder / "figures" / f"{name}.png", contact_sheet(videos), zoom=zoom)
    for number, four in enumerate(zip(one, rebuilt, two, mixed, strict=True)):
        write_gif(folder / "gifs" / f"swap_{number}.gif", torch.cat(four, -1), zoom=zoom)
    for number, video in enumerate(sheets["generated"]):
        write_gif(folder / "gifs" / f"generated_{number}.gif", video, zoom=zoom)


def main(
    data: str = "sprites",
    epochs: int = 36,
    characters: int = 300,
    f_dim: int = 32,
    z_dim: int = 4,
    channels: tuple[int, ...] = (16, 32, 64),
    judge_steps: int = 600,
    count: int = 4,
    out: str | None = None,
) -> None:
    """Train, swap, judge; everything lands in one folder."""
    final = Path(out) if out else runs.next_folder("example-video")
    settings = {name: value for name, value in locals().items() if name not in ("final", "out")}
    sets = load(data, characters)
    train, test = sets["train"], sets["test"]
    shape = tuple(train.x.shape[1:])
    print(f"{len(train.x)} videos to learn from, (frames, channels, height, width) = {shape}")
    with runs.create(final) as folder:
        runs.write_json(folder / "config.json", settings)
        torch.manual_seed(0)
        model = Model(
            train.x[0].numel(), image_shape=shape, f_dim=f_dim, z_dim=z_dim, channels=channels
        )
        run = pvae.fit(
            model, Guide(model, channels=channels), train.x.flatten(1),
            valid=sets["valid"].x.flatten(1), valid_every=max(1, epochs // 18), epochs=epochs,
            batch_size=16, preprocess=partial(clip, frame=math.prod(shape[1:])), lr=3e-3,
            lr_schedule="cosine", engine="eager", run_dir=folder, checkpoint_every=None,
        )  # fmt: skip
        held = test.x[:: max(1, len(test.x) // 200)].flatten(1)
        evidence = pvae.evidence.importance(run.model, run.guide, held, 20)
        found: dict[str, Any] = {
            "nats per frame": float(evidence.log_evidence.mean()) / shape[0],
            "share recognised": judged(run, judge(train, judge_steps), test, 500),
        }
        runs.write_json(folder / "results.json", found)
        write_pictures(run, train, test, folder, count)
        curves = pvae.plots.training_curves({"disentangled sequence": run.history})
        pvae.plots.save(curves, folder / "figures" / "training_curves.png")
    print(f"{found['nats per frame']:.0f} nats a frame of pixels between 0 and 1 (IWAE, K = 20)")
    for name, shares in found["share recognised"].items():
        print(f"{name:16} motion {shares['motion']:6.1%}  looks {shares['looks']:6.1%}")
    print(f"wrote {final}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="sprites", help="sprites, a folder of .gif, or squares")
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--characters", type=int, default=300, help="to learn from, at most 900")
    parser.add_argument("--out", help="folder to write (runs/example-video-<n>)")
    main(**vars(parser.parse_args()))
