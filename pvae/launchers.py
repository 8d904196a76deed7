"""What a launcher says about this process: torchrun, Slurm's ``srun``, or variables set by hand."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvae.errors import OptionError

if TYPE_CHECKING:
    from pvae.distributed import Group

__all__ = ["Launched", "launched", "leads"]


@dataclass(frozen=True)
class Launched:
    """The place of a process among those that a launcher started.

    Attributes:
        rank: From 0.
        size: Number of processes.
        local_rank: Its number on its machine, which is that of its GPU.
        address: Where rank 0, or the launcher, keeps the store by which they find each other.
        port: Its port.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def launched(environment: Mapping[str, str] | None = None) -> Launched | None:
    """Read ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``, or Slurm's own names.

    Slurm's are those of a step (``srun``), ``SLURM_PROCID`` and ``SLURM_STEP_NUM_TASKS``: a script
    of ``sbatch`` itself is one process, however many tasks the job may start.

    Args:
        environment: Variables; those of the process if ``None``.

    Returns:
        The place, or ``None`` for a process that is alone.

    Raises:
        OptionError: A variable is no number, or one is missing.
    """
    given = os.environ if environment is None else environment
    if "RANK" in given and "WORLD_SIZE" in given:
        keys, remedy = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "start all processes by torchrun"
    elif "SLURM_PROCID" in given and "SLURM_STEP_NUM_TASKS" in given:
        keys = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        remedy = "export MASTER_ADDR and MASTER_PORT before srun"
    else:
        return None
    size = _number(given, keys[1])
    if size == 1:
        return None
    if keys[0] == "SLURM_PROCID" and "MASTER_ADDR" not in given:  # an array of tasks, perhaps
        warnings.warn(
            f"this is one of {size} tasks of a Slurm step, and works alone: for one problem on all "
            f"of them, {remedy}",
            UserWarning,
            stacklevel=2,
        )
        return None
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if not given.get(key):
            raise OptionError(f"{keys[1]} is {size}, and {key} is not set: {remedy}")
    rank, local = _number(given, keys[0]), _number(given, keys[2], 0)
    if not 0 <= rank < size:
        raise OptionError(f"{keys[0]} is {rank}, expected 0 to {size - 1}: {remedy}")
    return Launched(rank, size, local, given["MASTER_ADDR"], _number(given, "MASTER_PORT"))


def leads(group: Group | None) -> bool:
    """Whether this process writes and prints: rank 0, or one that is alone."""
    return group is None or group.rank == 0


def _number(given: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = given.get(key, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"{key} is {text!r}, expected a whole number: unset it") from None
