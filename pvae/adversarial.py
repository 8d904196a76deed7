"""Adversarial training: one loop over players, each with parameters and a loss of its own.

All players move at once on one forward pass, and each loss is differentiated by its player's own
parameters alone: what a loss does not own it cannot move, however far its graph reaches. A recipe
(:func:`gan`, :func:`vae_gan`, :func:`adversarial_autoencoder`, :func:`avb`) is a short function
that gives a :class:`Game`; the models and guides are those that ``pvae.fit`` trains.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae.checkpoints import save_tensors
from pvae.data import as_batch, num_rows, take
from pvae.engine import build_optimizer, mix, seed_noise
from pvae.errors import NonFiniteError, OptionError
from pvae.progress import Reporter

__all__ = [
    "Contest",
    "Game",
    "Moves",
    "Player",
    "play",
]

_TELLS_ALL, _SAYS_NOTHING, _ALL_ALIKE = 0.98, 0.02, 0.25


@dataclass(frozen=True)
class Player:
    """One side of a game.

    Attributes:
        name: What it is called in the log.
        parameters: What it moves, and nobody else.
        optimizer: Name in ``torch.optim``.
        lr: Learning rate.
        optimizer_options: Further arguments of the optimiser.
    """

    name: str
    parameters: Sequence[Tensor]
    optimizer: str = "adam"
    lr: float = 3e-4
    optimizer_options: Mapping[str, Any] = field(default_factory=lambda: {"betas": (0.5, 0.999)})


@dataclass(frozen=True)
class Moves:
    """What one batch tells the players.

    Attributes:
        losses: Player -> what it lowers, ``()``.
        watched: Name -> number for the log, ``()``; ``accuracy`` (of the discriminator, 1/2 where
            it guesses), ``logit_spread`` and ``sample_spread`` are what a collapse is told by.
        active: Player -> whether it moves at this step, a tensor ``()`` of 0 or 1; always if it is
            not there.
    """

    losses: Mapping[str, Tensor]
    watched: Mapping[str, Tensor] = field(default_factory=dict)
    active: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Game:
    """Players and the forward pass that gives all their losses.

    Attributes:
        players: Who moves.
        moves: From a batch, with the step's noise, to the losses.
        modules: Name -> network, put on the device and kept in checkpoints.
    """

    players: tuple[Player, ...]
    moves: Callable[[Tensor], Moves]
    modules: Mapping[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        owners: dict[int, str] = {}
        for player in self.players:
            for parameter in player.parameters:
                other = owners.setdefault(id(parameter), player.name)
                if other != player.name:
                    raise OptionError(
                        f"{player.name!r} and {other!r} share a parameter of shape "
                        f"{tuple(parameter.shape)}: give it to one of them"
                    )


@dataclass
class Contest:
    """What :func:`play` leaves; the networks are trained in place.

    Attributes:
        history: One dict per epoch: each player's loss, what was watched, seconds.
        collapsed: What was said of a side that had given up for two epochs, in words.
        seconds: Time of the training.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    collapsed: list[str] = field(default_factory=list)
    seconds: float = 0.0


# --- the loop ------------------------------------------------------------------------------------


def play(
    game: Game,
    train: Any,
    *,
    epochs: int = 10,
    batch_size: int = 64,
    preprocess: Callable[[Any], Any] | None = None,
    device: str = "cpu",
    seed: int = 0,
    run_dir: str | Path | None = None,
    progress: bool = True,
) -> Contest:
    """Let the players move in turn with the batches until the epochs are over.

    The order of the data and all noise come from ``(seed, step)`` alone, and the caller's random
    streams are left untouched. Nothing is read from the device within an epoch.

    Args:
        game: From :mod:`pvae.games`, or your own.
        train: Tensor or array ``(N, ...)``, a tuple or dict of them, or a split of a data set.
        epochs: Passes over the data.
        batch_size: Data per step; the last, smaller batch of an epoch is left out.
        preprocess: Applied to each batch, with the step's noise.
        device: Where the networks and data lie.
        seed: Seed of order and noise.
        run_dir: Folder for ``metrics.jsonl`` and ``checkpoints/best``.
        progress: Show progress on standard error.

    Returns:
        The history, with what was said of a collapse.

    Raises:
        OptionError: A number that cannot be.
        NonFiniteError: A loss became NaN or infinite.
    """
    if epochs < 1 or batch_size < 2:
        raise OptionError(
            f"epochs is at least 1 and batch_size at least 2, got epochs={epochs}, "
            f"batch_size={batch_size}"
        )
    where = torch.device(device)
    data = as_batch(train, device=where)
    total = num_rows(data)
    steps = max(total // batch_size, 1)
    for module in game.modules.values():
        module.to(where)
    optimizers = {
        player.name: build_optimizer(
            player.optimizer, list(player.parameters), lr=player.lr,
            options=player.optimizer_options,
        )
        for player in game.players
    }  # fmt: skip
    contest, started = Contest(), time.perf_counter()
    suspected: set[str] = set()
    said: set[str] = set()
    log = _open(run_dir)
    with (
        torch.random.fork_rng([where] if where.type == "cuda" else []),
        pyro.validation_enabled(False),
        Reporter(epochs, steps, enabled=progress, describe=_describe) as reporter,
    ):
        for epoch in range(1, epochs + 1):
            sums: dict[str, Tensor] = {}
            began = time.perf_counter()
            generator = torch.Generator().manual_seed(mix(seed, -2, epoch))
            order = torch.randperm(total, generator=generator).to(where)
            for k in range(steps):
                seed_noise(where, seed, (epoch - 1) * steps + k)
                batch = take(data, order[k * batch_size : (k + 1) * batch_size])
                batch = batch if preprocess is None else preprocess(batch)
                for name, value in _step(game, optimizers, batch).items():
                    sums[name] = sums[name] + value if name in sums else value
                reporter.advance()
            row = {"epoch": float(epoch)} | {n: float(v) / steps for n, v in sums.items()}
            row |= {"seconds": time.perf_counter() - began}
            contest.history.append(row)
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            reporter.epoch(row)
            _check_finite(row)
            found = _collapse(row)
            # One epoch may be the start of the training; two in a row are a side that has given up.
            for kind in (found.keys() & suspected) - said:
                said.add(kind)
                contest.collapsed.append(found[kind])
                reporter.say(f"epoch {epoch}: {found[kind]}")
            suspected = set(found)
    contest.seconds = time.perf_counter() - started
    if run_dir is not None:
        save_tensors(Path(run_dir) / "checkpoints" / "best", _state(game), {"epoch": epochs})
    return contest


def _step(
    game: Game, optimizers: Mapping[str, torch.optim.Optimizer], batch: Any
) -> dict[str, Tensor]:
    """One move of every player; the losses and what is watched, detached."""
    moves = game.moves(batch)
    for player in game.players:
        parameters = list(player.parameters)
        active = moves.active.get(player.name)
        loss = moves.losses[player.name]
        loss = loss if active is None else loss * active
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    for player in game.players:
        active = moves.active.get(player.name)
        if active is None:
            optimizers[player.name].step()
            continue
        # An optimiser with momentum moves on a gradient of zero: a player at rest is put back.
        before = [parameter.detach().clone() for parameter in player.parameters]
        optimizers[player.name].step()
        with torch.no_grad():
            for parameter, kept in zip(player.parameters, before, strict=True):
                parameter.copy_(torch.where(active > 0, parameter, kept))
    shares = {f"{name}_active": flag for name, flag in moves.active.items()}
    told = {**moves.losses, **moves.watched, **shares}
    return {name: value.detach() for name, value in told.items()}


def _open(run_dir: str | Path | None) -> Path | None:
    if run_dir is None:
        return None
    path = Path(run_dir) / "metrics.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    except OSError as error:
        raise OptionError(
            f"run_dir {run_dir} cannot be written ({error.strerror}): choose another folder"
        ) from None
    return path


def _describe(row: Mapping[str, float]) -> str:
    parts = [
        f"{name} {value:.3g}"
        for name, value in row.items()
        if name not in ("epoch", "seconds") and not name.endswith("_active")
    ]
    return ", ".join(parts)


def _check_finite(row: Mapping[str, float]) -> None:
    bad = [name for name, value in row.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(
            f"epoch {row['epoch']:.0f}: {', '.join(bad)} is not finite: lower the players' lr"
        )


def _collapse(row: Mapping[str, float]) -> dict[str, str]:
    """Kind -> a sentence, for each side that seems to have given up by the means of an epoch."""
    found = {}
    accuracy = row.get("accuracy", 0.75)
    if accuracy > _TELLS_ALL:
        found["discriminator wins"] = (
            f"the discriminator tells {accuracy:.0%} of samples from data, so the generator learns "
            "little from it: lower its lr, or normalise it (spectral=True)"
        )
    if row.get("logit_spread", 1.0) < _SAYS_NOTHING:
        found["discriminator is mute"] = (
            "the discriminator says the same of everything, so the generator learns nothing from "
            "it: raise its lr, or give it more channels"
        )
    if row.get("sample_spread", 1.0) < _ALL_ALIKE:
        found["samples are alike"] = (
            f"samples vary {row['sample_spread']:.0%} as much as data do: the generator has "
            "collapsed on few of them; lower its lr, or normalise the discriminator"
        )
    return found


def _state(game: Game) -> dict[str, Tensor]:
    return {
        f"{role}.{name}": tensor.detach()
        for role, module in game.modules.items()
        for name, tensor in module.state_dict().items()
    }
