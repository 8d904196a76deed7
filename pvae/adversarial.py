"""Adversarial training: one loop over players, each with parameters and a loss of its own.

All players move at once on one forward pass, and each loss is differentiated by its player's own
parameters alone: what a loss does not own it cannot move, however far its graph reaches. A recipe
(those of :mod:`pvae.games`, or one of your own) is a short function
that gives a :class:`Game`; the models and guides are those that ``pvae.fit`` trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae.allocation import keep_large_blocks
from pvae.checkpoints import fingerprint, newest, save_tensors, set_aside_after
from pvae.data import as_batch, num_rows, take
from pvae.engine import build_optimizer, mix, seed_noise
from pvae.errors import NonFiniteError, OptionError, RunError
from pvae.interrupts import Interrupts
from pvae.loop import compare_environments, open_metrics
from pvae.progress import Reporter
from pvae.resumption import (
    Place,
    Saver,
    as_every,
    check_folder,
    environment,
    heed,
    pack_optimizers,
    put_back,
    refuse_difference,
    taken,
    unpack_optimizers,
)
from pvae.trackers import Tracker
from pvae.training import device_of

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
        average: Decay of a moving average of its parameters over the steps, which are what it
            ends with, and what trackers are shown; 0: the parameters of the last step. Early on
            the average is over the last ninth of the steps at most. Yazici et al. (2019), The
            unusual effectiveness of averaging in GAN training.
    """

    name: str
    parameters: Sequence[Tensor]
    optimizer: str = "adam"
    lr: float = 3e-4
    optimizer_options: Mapping[str, Any] = field(default_factory=lambda: {"betas": (0.5, 0.999)})
    average: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.average < 1:
            raise OptionError(f"average is a decay of at least 0 and below 1, got {self.average}")


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
        modules: Name -> network, put on the device and kept in checkpoints; ``"model"`` and
            ``"guide"`` are those that trackers are shown and ``pvae.load`` finds again.
        on_means: Whether data are set beside means of ``p(x | z)``, so that grey values are not to
            be made bits for it.
    """

    players: tuple[Player, ...]
    moves: Callable[[Tensor], Moves]
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    on_means: bool = False

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

    A tracker is told of it as of a :class:`pvae.training.Run`, with which it shares these names.

    Attributes:
        model: The game's module of that name, if it has one.
        guide: Likewise.
        history: One dict per epoch: each player's loss, what was watched, seconds.
        collapsed: What was said of a side that had given up for two epochs, in words.
        seconds: Time of the training.
        run_dir: Its folder, if it has one.
    """

    model: Any = None
    guide: Any = None
    history: list[dict[str, float]] = field(default_factory=list)
    collapsed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    run_dir: Path | None = None

    @property
    def best_epoch(self) -> int:
        """The last: no loss of a game says which epoch is better."""
        return len(self.history)


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
    resume: bool = False,
    checkpoint_every: str | None = "5 minutes",
    keep_checkpoints: int = 2,
    progress: bool = True,
    trackers: Sequence[Tracker] = (),
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
        device: Where the networks and data lie, as :func:`pvae.fit` takes it.
        seed: Seed of order and noise.
        run_dir: Folder for ``metrics.jsonl`` and ``checkpoints/``. With it, a first SIGINT or
            SIGTERM writes a checkpoint after the step at hand and ends the training.
        resume: Go on from the newest good checkpoint in ``run_dir``, from the beginning if there
            is none, to the bytes of a training that was never interrupted. The game has to be
            built as it was then; another ``epochs`` is taken.
        checkpoint_every: ``"100 steps"``, ``"1 epoch"``, ``"5 minutes"``; ``None`` for no
            checkpoints of the training, ``checkpoints/best`` at its end alone.
        keep_checkpoints: How many of the newest ones stay.
        progress: Show progress on standard error.
        trackers: Told of each epoch, see :mod:`pvae.trackers`.

    Returns:
        The history, with what was said of a collapse.

    Raises:
        OptionError: A number that cannot be.
        RunError: ``run_dir`` is at work in another process, holds a run that ``resume`` was not
            asked for, or one that was started under another configuration.
        NonFiniteError: A loss became NaN or infinite.
    """
    started = time.perf_counter()
    if epochs < 1 or batch_size < 2:
        raise OptionError(
            f"epochs is at least 1 and batch_size at least 2, got epochs={epochs}, "
            f"batch_size={batch_size}"
        )
    folder, every = None if run_dir is None else Path(run_dir), as_every(checkpoint_every)
    check_folder(folder, resume=resume, keep=keep_checkpoints)
    where = device_of(device)
    keep_large_blocks()
    data = as_batch(train, device=where)
    for module in game.modules.values():
        module.to(where)
    loop = _Loop(game, data, epochs, batch_size, preprocess, where, seed, trackers)
    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(taken(folder))
            loop.contest.run_dir = folder
            facts = loop.facts() if every is not None or resume else {}
            if resume:
                loop.resume(folder / "checkpoints", facts)
            if every is not None:
                root = folder / "checkpoints"
                loop.saver = Saver(root, every, keep_checkpoints, facts, step=loop.place.step)
                loop.interrupts = stack.enter_context(Interrupts())
        stack.enter_context(torch.random.fork_rng([where] if where.type == "cuda" else []))
        stack.enter_context(pyro.validation_enabled(False))
        loop.reporter = stack.enter_context(
            Reporter(epochs, loop.steps, enabled=progress, done=loop.place.step, describe=_describe)
        )
        loop.run_all(started)
    return loop.contest


class _Loop:
    """The epochs of one call of :func:`play`."""

    reporter: Reporter

    def __init__(
        self,
        game: Game,
        data: Any,
        epochs: int,
        batch_size: int,
        preprocess: Callable[[Any], Any] | None,
        device: torch.device,
        seed: int,
        trackers: Sequence[Tracker],
    ) -> None:
        self.game, self.data, self.epochs, self.batch_size = game, data, epochs, batch_size
        self.preprocess, self.device, self.seed, self.trackers = preprocess, device, seed, trackers
        self.total = num_rows(data)
        self.steps = max(self.total // batch_size, 1)
        self.optimizers = {
            player.name: build_optimizer(
                player.optimizer, list(player.parameters), lr=player.lr,
                options=player.optimizer_options,
            )
            for player in game.players
        }  # fmt: skip
        self.averages = {
            player.name: [weight.detach().clone() for weight in player.parameters]
            for player in game.players
            if player.average
        }
        self.contest = Contest(game.modules.get("model"), game.modules.get("guide"))
        self.place = Place()
        self.sums: dict[str, Tensor] = {}
        self.suspected: list[str] = []
        self.said: list[str] = []
        self.saver: Saver | None = None
        self.interrupts = Interrupts()
        self.begun = 0.0

    def run_all(self, started: float) -> None:
        """Train to the end, from where the loop stands; averages then take their players' place."""
        self.begun = started - self.place.seconds
        contest, place, told = self.contest, self.place, [*self.trackers]
        with contextlib.ExitStack() as stack:
            log = open_metrics(contest.run_dir, contest.history)
            if log is not None:
                stack.enter_context(log)
            for tracker in told:
                tracker.start(contest)  # type: ignore[arg-type]
            while place.epoch <= self.epochs:
                row = self._epoch()
                contest.history.append(row)
                if log is not None:
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                self.reporter.epoch(row)
                _check_finite(row)
                self._say_what_collapsed(row)
                if told:
                    with self._averaged():
                        for tracker in told:
                            tracker.epoch(contest, row)  # type: ignore[arg-type]
                place.epoch, place.batch = place.epoch + 1, 0
                place.epoch_seconds, self.sums = 0.0, {}
                if place.epoch <= self.epochs:
                    heed(self.interrupts.number, self.saver, place, self._save)
            self._save()
        contest.seconds = place.seconds = time.perf_counter() - self.begun
        self._put_means()
        if contest.run_dir is not None:
            about = {"epoch": len(contest.history), "step": place.step, "stopped": "epochs"}
            save_tensors(contest.run_dir / "checkpoints" / "best", self._state(), about)
        for tracker in told:
            tracker.finish(contest)  # type: ignore[arg-type]

    def _epoch(self) -> dict[str, float]:
        place, began = self.place, time.perf_counter() - self.place.epoch_seconds
        generator = torch.Generator().manual_seed(mix(self.seed, -2, place.epoch))
        order = torch.randperm(self.total, generator=generator).to(self.device)
        for k in range(place.batch, self.steps):
            seed_noise(self.device, self.seed, place.step)
            batch = take(self.data, order[k * self.batch_size : (k + 1) * self.batch_size])
            batch = batch if self.preprocess is None else self.preprocess(batch)
            for name, value in _step(self.game, self.optimizers, batch).items():
                self.sums[name] = self.sums[name] + value if name in self.sums else value
            place.step, place.batch = place.step + 1, k + 1
            self._average()
            self.reporter.advance()
            place.epoch_seconds = time.perf_counter() - began
            if place.batch < self.steps:
                heed(self.interrupts.number, self.saver, place, self._save)
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        return {"epoch": place.epoch, **means, "seconds": place.epoch_seconds}

    def _say_what_collapsed(self, row: Mapping[str, float]) -> None:
        """One epoch may be the start of the training; two in a row are a side that gave up."""
        found = _collapse(row)
        if "samples are alike" in found and _is_spreading(self.contest.history):
            del found["samples are alike"]
        for kind, sentence in found.items():
            if kind in self.suspected and kind not in self.said:
                self.said.append(kind)
                self.contest.collapsed.append(f"epoch {row['epoch']}: {sentence}")
                self.reporter.say(self.contest.collapsed[-1])
        self.suspected = list(found)

    # --- averages ---

    def _average(self) -> None:
        step = self.place.step
        with torch.no_grad():
            for player in self.game.players:
                decay = min(player.average, (1 + step) / (10 + step))
                means = self.averages.get(player.name, [])
                for mean, weight in zip(means, player.parameters, strict=False):
                    mean.lerp_(weight, 1 - decay)

    def _means(self) -> list[tuple[Tensor, Tensor]]:
        """Each averaged parameter with its average."""
        return [
            pair
            for player in self.game.players
            if player.average
            for pair in zip(player.parameters, self.averages[player.name], strict=True)
        ]

    def _put_means(self) -> None:
        with torch.no_grad():
            for weight, mean in self._means():
                weight.copy_(mean)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within it, averages stand in their parameters' place."""
        kept = [(weight, weight.detach().clone()) for weight, _ in self._means()]
        self._put_means()
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, value in kept:
                    weight.copy_(value)

    # --- checkpoints ---

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the training it belongs to."""
        words: dict[str, Any] = {
            "epochs": self.epochs, "batch_size": self.batch_size, "seed": self.seed,
            "data": fingerprint(self.data),
        }  # fmt: skip
        for player in self.game.players:
            about = dataclasses.asdict(dataclasses.replace(player, parameters=()))
            shapes = [list(weight.shape) for weight in player.parameters]
            words[player.name] = json.loads(json.dumps(about | {"parameters": shapes}, default=str))
        return {"configuration": words, "environment": environment(self.device)}

    def resume(self, root: Path, facts: Mapping[str, Any]) -> None:
        """Go on from the newest good checkpoint, if there is one.

        Raises:
            RunError: It is of another configuration or game, or all of them are damaged.
        """
        found = newest(root)
        if found is None:
            return
        folder, (tensors, about) = found
        try:
            refuse_difference(facts["configuration"], about["configuration"], str(root.parent))
            compare_environments(facts["environment"], about["environment"])
            put_back({f"state.{n}": t for n, t in self._state().items()}, tensors, folder)
            unpack_optimizers((tensors, about), self.optimizers)
            for name, means in self.averages.items():
                for k, mean in enumerate(means):
                    mean.copy_(tensors[f"average.{name}.{k}"])
            sums = {n.removeprefix("sums."): t for n, t in tensors.items() if n[:5] == "sums."}
            self.sums = {name: tensor.to(self.device) for name, tensor in sums.items()}
            self.place = Place.of(about["place"])
            self.suspected, self.said = about["suspected"], about["said"]
            self.contest.history = list(about["history"])
            self.contest.collapsed = list(about["collapsed"])
        except (KeyError, TypeError, AttributeError, IndexError):
            raise RunError(f"{folder} is no checkpoint of a game") from None
        if self.epochs < self.place.epoch - 1:
            raise RunError(
                f"{root.parent} has done {self.place.epoch - 1} epochs already: epochs must be at "
                f"least that, got {self.epochs}"
            )
        set_aside_after(folder)

    def _save(self) -> None:
        if self.saver is None or self.saver.step == self.place.step:
            return
        self.place.seconds = time.perf_counter() - self.begun
        self.place.best_epoch = len(self.contest.history)
        tensors = {f"state.{name}": tensor.clone() for name, tensor in self._state().items()}
        with self._averaged():
            if self.averages:
                best = {f"best.{n}": tensor.clone() for n, tensor in self._state().items()}
                tensors |= best
        for name, means in self.averages.items():
            tensors |= {f"average.{name}.{k}": mean for k, mean in enumerate(means)}
        tensors |= {f"sums.{name}": value for name, value in self.sums.items()}
        kept, about = pack_optimizers(self.optimizers)
        about |= {
            "suspected": self.suspected, "said": self.said, "collapsed": self.contest.collapsed
        }  # fmt: skip
        self.saver.save(self.place, (tensors | kept, about), self.contest.history, None)

    def _state(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the game's networks, each once.

        Those of model and guide are called as in other runs, all others ``game.``.
        """
        named: dict[int, tuple[str, Tensor]] = {}
        for role, module in self.game.modules.items():
            start = role if role in ("model", "guide") else f"game.{role}"
            own = itertools.chain(module.named_parameters(), module.named_buffers())
            kept = module.state_dict()
            for name, tensor in own:
                if name in kept:
                    named.setdefault(id(tensor), (f"{start}.{name}", tensor.detach()))
        return dict(named.values())


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


def _is_spreading(history: Sequence[Mapping[str, float]]) -> bool:
    """Whether samples differ more than they did, as those of an untrained generator come to."""
    last = [row["sample_spread"] for row in history[-2:]]
    return len(last) == 2 and last[1] > 1.25 * last[0]


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
