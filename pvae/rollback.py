"""The last good states of a training, to one of which it goes back when a number is not finite.

A copy of parameters, buffers and optimiser state is kept in memory every :data:`INTERVAL` steps, if
all of it is finite; two of them, since the later one may be where the trouble began. Steps go on
being counted when a copy is put back, so that the noise and the rows of those that follow are new.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pvae.checkpoints import Saved
from pvae.engine import Problem
from pvae.errors import RunError
from pvae.resumption import Place, pack, unpack

__all__ = ["INTERVAL", "MOST", "GoodStates", "rate_factor"]

INTERVAL = 100  # steps between two copies
MOST = 10  # rollbacks of one training


def rate_factor(rollbacks: int) -> float:
    """Of the learning rate: the first rollback changes noise and rows alone, each later one halves.

    Args:
        rollbacks: How many there have been.
    """
    return 0.5 ** max(0, rollbacks - 1)


@dataclass
class _Good:
    """One copy.

    Attributes:
        step: Steps that were taken when it was made.
        since: Steps that were taken when the training last stood there.
        epoch: The epoch then.
        batch: Its batches that had been taken.
        left_out: Its rows that had been left out.
        tried: Whether the training has gone back to it.
        saved: As :func:`pvae.resumption.pack` gives it, with the sums of the epoch then.
    """

    step: int
    since: int
    epoch: int
    batch: int
    left_out: int
    tried: bool
    saved: Saved


class GoodStates:
    """The last two copies.

    Args:
        state: The pair's own tensors by name.
        problems: With the optimisers.
    """

    def __init__(self, state: Mapping[str, Tensor], problems: Mapping[str, Problem]) -> None:
        self.state, self.problems = state, problems
        self.kept: list[_Good] = []

    def is_due(self, step: int) -> bool:
        """Whether it is time for the next copy."""
        return not self.kept or step - self.kept[-1].since >= INTERVAL

    def keep(self, place: Place, sums: Tensor) -> bool:
        """Make a copy, unless something is not finite; the one look at the device in an interval.

        Returns:
            Whether it was made.
        """
        weights = list(self.problems["joint"].parameters.values())
        norm = torch.nn.utils.get_total_norm(weights)
        if not bool(torch.isfinite(norm) & torch.isfinite(sums[0])):
            return False
        tensors, about = pack(self.state, None, self.problems, sums)
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        where = (place.step, place.step, place.epoch, place.batch, place.left_out, False)
        self.kept = [*self.kept[-1:], _Good(*where, (copies, about))]
        return True

    def put_back(self) -> int:
        """Put the newest copy back, or the one before it if that has been tried; its step."""
        if self.kept[-1].tried and len(self.kept) > 1:
            self.kept.pop()
        good = self.kept[-1]
        good.tried = True
        unpack(good.saved, self.state, self.problems, _MEMORY)
        return good.step

    def clean(self, place: Place) -> tuple[Tensor, int, int]:
        """Sums, batches and rows left out of the epoch at hand when all was last seen finite."""
        good = self.kept[-1]
        sums = good.saved[0]["epoch.sums"]
        if good.epoch != place.epoch:
            return torch.zeros_like(sums), 0, 0
        return sums.clone(), good.batch, good.left_out

    def stand(self, place: Place, sums: Tensor) -> None:
        """The training goes on here from the newest copy."""
        good = self.kept[-1]
        good.since, good.epoch, good.batch = place.step, place.epoch, place.batch
        good.left_out = place.left_out
        good.saved[0]["epoch.sums"] = sums.clone()

    def pack(self) -> Saved:
        """All copies for a checkpoint."""
        tensors: dict[str, Tensor] = {}
        about = []
        for k, good in enumerate(self.kept):
            kept, words = good.saved
            tensors |= {f"good.{k}.{name}": tensor for name, tensor in kept.items()}
            numbers = {key: value for key, value in vars(good).items() if key != "saved"}
            about.append({**numbers, "about": words})
        return tensors, {"good": about}

    def unpack(self, saved: Saved) -> None:
        """Those of a checkpoint.

        Raises:
            RunError: It has none.
        """
        tensors, about = saved
        if "good" not in about:
            raise RunError("the checkpoint holds no good state to go back to: resume it as it was")
        device = self.problems["joint"].device
        self.kept = []
        for k, entry in enumerate(about["good"]):
            prefix, words = f"good.{k}.", dict(entry)
            on_cpu = words["about"]["optimizer_on_cpu"]
            kept = {
                name: tensor if name in on_cpu else tensor.to(device)
                for name, tensor in (
                    (full.removeprefix(prefix), each)
                    for full, each in tensors.items()
                    if full.startswith(prefix)
                )
            }
            saved_then = (kept, words.pop("about"))
            self.kept.append(_Good(**words, saved=saved_then))


_MEMORY = Path("in memory")
