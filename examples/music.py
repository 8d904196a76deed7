"""A deep Markov model of polyphonic music: states that follow each other, notes that they emit.

The guide is the deep Kalman smoother, whose recurrent network reads each piece backward. Test
pieces are judged in nats a time step in the three ways of the literature, by importance sampling
and by a particle filter; then the model composes.

Run:  python examples/music.py                       (the chorales of jsb)
      python examples/music.py --epochs 600          (ten minutes of a core; near what is published)
      python examples/music.py --data nottingham
      python examples/music.py --data scales         (toy music, no file needed)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import pvae
from pvae import runs
from pvae.guides.forward_backward import ForwardBackward
from pvae.markov import num_steps, step_mask
from pvae.models.deep_markov import DeepMarkov
from pvae.schedules import Linear
from pvae.sequences import PerStep, per_step

KEYS = 88
_NAMES = ("A", "A#", "B", "C", "C#", "D", "D#", "E", "F", "F#", "G", "G#")  # key 0 is A0


def scales(size: int, seed: int, length: int = 12) -> Tensor:
    """Toy music: a major scale up or down with its third, from a random key."""
    torch.manual_seed(seed)
    major = torch.tensor([0, 2, 4, 5, 7, 9, 11, 12])
    x = torch.full((size, length, KEYS), -1.0)
    for row in x:
        steps = int(torch.randint(6, length + 1, ()))
        first = int(torch.randint(20, 50, ()))
        row[:steps] = 0
        for t in range(steps):
            place = t % 7
            row[t, first + major[place]] = row[t, first + major[(place + 2) % 8]] = 1
    return x


def load(data: str) -> dict[str, Tensor]:
    """Padded piano rolls ``(N, T, 88)`` of each split."""
    if data == "scales":
        return {part: scales(40, seed) for seed, part in enumerate(("train", "valid", "test"))}
    dataset = pvae.data.load(data)
    return {
        part: getattr(dataset, part).x.reshape(-1, *(dataset.image_shape or ()))
        for part in ("train", "valid", "test")
    }


def trim(x: Tensor) -> Tensor:
    """The steps up to the end of the longest piece of a batch."""
    return x[:, : int(step_mask(x).sum(-1).max())]


def judge(run: pvae.Run, test: Tensor, num_particles: int) -> dict[str, Any]:
    """Nats a step on the test pieces, by two estimators of the same number of particles."""
    steps = num_steps(test, KEYS)
    found = {
        "importance sampling": pvae.evidence.importance(run.model, run.guide, test, num_particles),
        "particle filter": pvae.evidence.filtered(
            run.model, run.guide, test, num_particles=num_particles, num_groups=2
        ),
    }
    return {name: vars(per_step(evidence, steps)) for name, evidence in found.items()}


def in_words(roll: Tensor) -> str:
    """The notes of each step, ``A4`` say, a step a line."""
    lines = []
    for step in roll:
        keys = step.nonzero().flatten().tolist()
        lines.append(" ".join(f"{_NAMES[key % 12]}{(key + 9) // 12}" for key in keys) or "-")
    return "\n".join(lines)


def piano_rolls(rolls: dict[str, list[Tensor]]) -> Any:
    """Time to the right, keys upward: a row for each kind."""
    columns = max(map(len, rolls.values()))
    figure, grid = plt.subplots(
        len(rolls), columns, figsize=(3.4 * columns, 2.1 * len(rolls)), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    used = torch.cat([roll.amax(0)[None] for row in rolls.values() for roll in row]).amax(0)
    low, high = int(used.nonzero().min()), int(used.nonzero().max())
    for row, (name, pieces) in zip(grid, rolls.items(), strict=True):
        for axes in row:
            axes.set_axis_off()
        for axes, roll in zip(row, pieces, strict=False):
            axes.set_axis_on()
            axes.imshow(
                roll.T.numpy(), origin="lower", aspect="auto", cmap="Greys", vmin=0, vmax=1,
                interpolation="nearest", extent=(0, len(roll), -0.5, KEYS - 0.5),
            )  # fmt: skip
            axes.set(ylim=(low - 2, high + 2))
        row[0].set_ylabel(f"{name}\nkey")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    return figure


@torch.no_grad()
def composed(run: pvae.Run, test: Tensor, count: int = 3) -> dict[str, list[Tensor]]:
    """Test pieces, the chances of each note given their states, and pieces of the model's own."""
    model, guide = run.model.eval(), run.guide.eval()
    torch.manual_seed(1)
    chosen = test[:count]
    steps = num_steps(chosen, KEYS).tolist()
    z = guide.posterior(chosen)["z"].rsample()
    chances = torch.sigmoid(model.emission(z))
    own = model(size=count).reshape(count, -1, KEYS)
    return {
        "test": [roll[:n] for roll, n in zip(chosen, steps, strict=True)],
        "given its states": [roll[:n] for roll, n in zip(chances, steps, strict=True)],
        "composed": [roll[: max(steps)] for roll in own],
    }


def main(
    data: str = "jsb",
    epochs: int = 120,
    z_dim: int = 64,
    hidden: int = 200,
    dropout: float = 0.2,
    num_particles: int = 200,
    out: str | None = None,
) -> None:
    """Train, judge, compose; everything lands in one folder."""
    final = Path(out) if out else runs.next_folder("example-music")
    settings = {name: value for name, value in locals().items() if name not in ("final", "out")}
    with runs.create(final) as folder:
        runs.write_json(folder / "config.json", settings)
        rolls = load(data)
        print(
            {part: f"{len(x)} pieces, {int(step_mask(x).sum())} steps" for part, x in rolls.items()}
        )
        length = rolls["train"].shape[1]
        torch.manual_seed(0)
        model = DeepMarkov(
            length * KEYS, image_shape=(length, KEYS), z_dim=z_dim, transition_hidden=2 * z_dim
        )
        guide = ForwardBackward(model, hidden=hidden, dropout=dropout)
        steps = epochs * -(-len(rolls["train"]) // 20)
        warm_up = Linear(min(1500, max(1, steps // 4)), start=0.1)
        # The KL of each step in closed form, and pieces of like length together.
        run = pvae.fit(
            model, guide, rolls["train"], valid=trim(rolls["valid"]), preprocess=trim,
            bucket_by=num_steps(rolls["train"], KEYS), valid_every=max(1, epochs // 60),
            objective=pvae.vae(beta=warm_up, analytic_kl=True), epochs=epochs, batch_size=20,
            lr=5e-3, lr_schedule="cosine", clip_norm=10.0, engine="eager", run_dir=folder,
        )  # fmt: skip
        found = judge(run, rolls["test"], num_particles)
        runs.write_json(folder / "results.json", found)
        pieces = composed(run, rolls["test"])
        (folder / "samples.txt").write_text("\n\n".join(map(in_words, pieces["composed"])) + "\n")
        curves = pvae.plots.training_curves({"deep Markov model": run.history})
        pvae.plots.save(curves, folder / "figures" / "training_curves.png")
        figure = piano_rolls(pieces)
        pvae.plots.save(figure, folder / "figures" / "piano_rolls.png")
        plt.close(figure)
    print("nats a step          estimate (bound) {mean of sequences}")
    for name, row in found.items():
        print(f"{name:20} {PerStep(**row)}")
    print(f"wrote {final}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="jsb", help="jsb, nottingham, …, or scales")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--dropout", type=float, default=0.2, help="of what the guide has read")
    parser.add_argument("--out", help="folder to write (runs/example-music-<n>)")
    main(**vars(parser.parse_args()))
