"""What a training has to remember to go on as if it had never stopped.

Noise and order of the data come from ``(seed, step)`` alone, so no random state is among it.
"""

from __future__ import annotations

import contextlib
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvae.checkpoints import Saved, steps, write_checkpoint
from pvae.engine import Problem
from pvae.errors import OptionError, RunError
from pvae.interrupts import leave
from pvae.locks import locked

__all__ = [
    "Every",
    "Place",
    "Saver",
    "as_every",
    "check_folder",
    "environment",
    "extras",
    "heed",
    "pack",
    "pack_optimizers",
    "put_back",
    "refuse_difference",
    "taken",
    "unpack",
    "unpack_optimizers",
    "unwritable",
]

_MOST = 6  # differences that a message lists
_FREE = ("epochs", "patience")  # may differ: they say when to stop, not what a step does


# --- when ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Every:
    """How often a checkpoint is written: ``"100 steps"``, ``"1 epoch"``, ``"5 minutes"``."""

    number: float
    unit: str


def as_every(text: str | None) -> Every | None:
    """Read ``"5 minutes"`` and its kind; ``None`` and ``"none"`` are never.

    Raises:
        OptionError: It is no number of steps, epochs or minutes.
    """
    if text is None or str(text).strip().lower() == "none":
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(step|epoch|minute)s?\s*", str(text))
    number = float(found[1]) if found else 0.0
    if found is None or number <= 0 or (found[2] != "minute" and not number.is_integer()):
        raise OptionError(
            "checkpoint_every takes a number of steps, epochs or minutes ('100 steps', '1 epoch', "
            f"'5 minutes') or 'none', got {text!r}"
        )
    return Every(number, found[2])


# --- what ----------------------------------------------------------------------------------------

_LATER = ("rollbacks", "rolled_back")  # older checkpoints lack them


@dataclass
class Place:
    """Where a training stands, apart from its tensors.

    Attributes:
        epoch: The epoch at hand, from 1.
        batch: Its batches that were taken.
        step: Steps that were taken.
        best: Best validation bound so far.
        best_epoch: The epoch it was reached in.
        seconds: Time of the training so far.
        epoch_seconds: Time of the epoch at hand so far.
        staging_seconds: Time spent on tracing and compiling so far.
        left_out: Rows of the epoch at hand whose steps were left out.
        rollbacks: How often a good state was put back so far.
        rolled_back: How often in the epoch at hand.
        engine: What took the steps.
    """

    epoch: int = 1
    batch: int = 0
    step: int = 0
    best: float | None = None
    best_epoch: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    staging_seconds: float = 0.0
    left_out: int = 0
    engine: str = ""
    rollbacks: int = 0
    rolled_back: int = 0

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Place:
        """From a manifest."""
        names = [f.name for f in fields(cls) if f.name in content or f.name not in _LATER]
        return cls(**{name: content[name] for name in names})


def extras(problem: Problem, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that steps change and ``state`` has not: buffers outside the state dict."""
    seen = {id(tensor) for tensor in state.values()}
    buffers = [buffer for buffer in problem.buffers() if id(buffer) not in seen]
    return {f"buffer.{k}": buffer for k, buffer in enumerate(buffers)}


def pack(
    state: Mapping[str, Tensor],
    best: Mapping[str, Tensor] | None,
    problems: Mapping[str, Problem],
    sums: Tensor,
) -> Saved:
    """Every tensor of a training by name, and what its optimisers keep besides."""
    tensors = {f"state.{name}": tensor for name, tensor in state.items()}
    tensors |= {f"extra.{n}": tensor for n, tensor in extras(problems["joint"], state).items()}
    tensors |= {f"best.{name}": tensor for name, tensor in (best or {}).items()}
    tensors["epoch.sums"] = sums
    kept, about = pack_optimizers({n: problem.optimizer for n, problem in problems.items()})
    return tensors | kept, about


def pack_optimizers(optimizers: Mapping[str, torch.optim.Optimizer]) -> Saved:
    """What optimisers keep for each parameter, by the optimiser's name: tensors, and the rest.

    Raises:
        OptionError: One of them keeps what no checkpoint can hold.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    on_cpu = []
    for owner, optimizer in optimizers.items():
        for k, weight in enumerate(_weights(optimizer)):
            for key, value in optimizer.state.get(weight, {}).items():
                name = f"optimizer.{owner}.{k}.{key}"
                if isinstance(value, Tensor):
                    tensors[name] = value
                    if value.device.type == "cpu" and weight.device.type != "cpu":
                        on_cpu.append(name)
                elif isinstance(value, (bool, int, float, str, type(None))):
                    values[name] = value
                else:
                    raise OptionError(
                        f"{type(optimizer).__name__} keeps a {type(value).__name__} {key!r}, which "
                        "no checkpoint can hold: pass checkpoint_every=None"
                    )
    return tensors, {"optimizer_values": values, "optimizer_on_cpu": on_cpu}


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def unpack(
    saved: Saved, state: Mapping[str, Tensor], problems: Mapping[str, Problem], folder: Path
) -> tuple[dict[str, Tensor] | None, Tensor]:
    """Copy a checkpoint into a pair and its optimisers.

    Args:
        saved: What :func:`pack` gave, loaded.
        state: The pair's own tensors by name.
        problems: Whose optimisers are filled.
        folder: Where it was read, for the message.

    Returns:
        The best tensors so far, and the sums of the epoch at hand.

    Raises:
        RunError: They are those of another pair.
    """
    tensors = saved[0]
    device = problems["joint"].device
    own = {f"state.{name}": tensor for name, tensor in state.items()}
    own |= {f"extra.{n}": tensor for n, tensor in extras(problems["joint"], state).items()}
    put_back(own, tensors, folder)
    unpack_optimizers(saved, {name: problem.optimizer for name, problem in problems.items()})
    best = {name: tensor.to(device) for name, tensor in _under("best.", tensors).items()}
    return best or None, tensors["epoch.sums"].to(device)


def unpack_optimizers(saved: Saved, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """Fill optimisers with what :func:`pack_optimizers` gave, loaded."""
    tensors, about = saved
    for owner, optimizer in optimizers.items():
        weights = _weights(optimizer)
        optimizer.state.clear()
        prefix = f"optimizer.{owner}."
        entries = _under(prefix, tensors) | _under(prefix, about["optimizer_values"])
        for name, value in sorted(entries.items(), key=lambda entry: entry[0]):
            index, _, key = name.partition(".")
            weight = weights[int(index)]
            on = torch.device("cpu") if prefix + name in about["optimizer_on_cpu"] else None
            optimizer.state[weight][key] = _like(value, weight, on)


def _under(prefix: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value
        for name, value in entries.items()
        if name.startswith(prefix)
    }


def put_back(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], folder: Path) -> None:
    """Copy the saved ``state.`` and ``extra.`` tensors into those of the same names.

    Raises:
        RunError: They are those of another pair.
    """
    kept = {name for name in saved if name.startswith(("state.", "extra."))}
    for name in sorted(own.keys() ^ kept):
        what = "lacks" if name in own else "has, and the pair has not,"
        raise RunError(f"checkpoint {folder} {what} the tensor {name!r}: was the model changed?")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape or tensor.dtype != saved[name].dtype:
            raise RunError(
                f"{name!r} is {saved[name].dtype} {tuple(saved[name].shape)} in checkpoint "
                f"{folder} and {tensor.dtype} {tuple(tensor.shape)} in the pair: was the model "
                "changed?"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _like(value: Any, weight: Tensor, device: torch.device | None) -> Any:
    """A state of an optimiser in memory as it would have made it itself."""
    if not isinstance(value, Tensor):
        return value
    device = weight.device if device is None else device
    if value.shape == weight.shape:
        made = torch.empty_like(
            weight, dtype=value.dtype, device=device, memory_format=torch.preserve_format,
            requires_grad=False,
        )  # fmt: skip
    else:
        made = torch.empty(value.shape, dtype=value.dtype, device=device)
    with torch.no_grad():
        return made.copy_(value)


# --- where ---------------------------------------------------------------------------------------


class Saver:
    """Writes the checkpoints of one training.

    Args:
        root: The folder of the run's checkpoints.
        every: How often.
        keep: How many stay.
        facts: What every manifest holds: the configuration, the environment.
        step: The step of the last one.
    """

    def __init__(
        self, root: Path, every: Every, keep: int, facts: Mapping[str, Any], *, step: int = 0
    ) -> None:
        self.root, self.every, self.keep, self.facts = root, every, keep, facts
        self.step, self.at = step, time.monotonic()

    def is_due(self, place: Place) -> bool:
        """Whether it is time for the next one."""
        if self.every.unit == "minute":
            return time.monotonic() - self.at >= 60 * self.every.number
        if self.every.unit == "step":
            return place.step - self.step >= self.every.number
        return place.batch == 0 and (place.epoch - 1) % self.every.number == 0

    def save(self, place: Place, saved: Saved, history: Sequence[Any], engine: Any) -> None:
        """Write one."""
        tensors, about = saved
        content = {
            **self.facts,
            **about,
            "place": asdict(place),
            "engine": engine,
            "history": list(history),
        }
        write_checkpoint(self.root, place.step, tensors, content, keep=self.keep)
        self.step, self.at = place.step, time.monotonic()


def heed(number: int | None, saver: Saver | None, place: Place, save: Callable[[], None]) -> None:
    """Between two steps: a checkpoint if it is time for one, and what a signal asks for.

    Args:
        number: That of the signal.
        saver: What writes the checkpoints.
        place: Where the training stands.
        save: Writes one by it.
    """
    if saver is not None and (number is not None or saver.is_due(place)):
        save()
    if number is not None:
        leave(number, f"interrupted after step {place.step}")


def environment(device: torch.device) -> dict[str, Any]:
    """What the bytes of a training depend on besides its configuration."""
    from importlib.metadata import version

    return {
        "device": str(device),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": version("pyro-ppl"),
    }


def refuse_difference(
    now: Mapping[str, Any], before: Mapping[str, Any], place: str, *, free: Sequence[str] = _FREE
) -> None:
    """Refuse another configuration than a run was started with.

    Raises:
        RunError: They differ in more than when to stop; the message lists the first differences.
    """
    before, now = _flat(before), _flat(now)
    keys = [key for key in {**before, **now} if key not in free]
    changed = [
        f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}"
        for key in keys
        if before.get(key) != now.get(key)
    ]
    if len(changed) > _MOST:
        changed = [*changed[:_MOST], f"{len(changed) - _MOST} more"]
    if changed:
        raise RunError(
            f"{place} was started under another configuration: {'; '.join(changed)} (resume it "
            "as it was, or train in another folder)"
        )


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an option as ``name.option``, so that what differs is seen."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": entry for name, entry in _flat(value).items()}
        else:
            found[key] = value
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- the run folder ------------------------------------------------------------------------------


def check_folder(folder: Path | None, *, resume: bool, keep: int) -> None:
    """Refuse a folder that holds a run already, unless it is to go on.

    Raises:
        OptionError: There is no folder to resume from, or no checkpoint is to stay.
        RunError: It holds a run.
    """
    if keep < 1:
        raise OptionError(f"keep_checkpoints must be at least 1, got {keep}")
    if resume and folder is None:
        raise OptionError("resume goes on with what is in a run folder: pass run_dir=")
    if folder is not None and not resume and steps(folder / "checkpoints"):
        raise RunError(
            f"{folder} holds a run already: go on with it by resume=True, or choose another folder"
        )


@contextlib.contextmanager
def taken(folder: Path) -> Iterator[None]:
    """The run folder, made if need be, for this process alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None
    with locked(folder, again=True):
        yield


def unwritable(folder: Path, error: OSError) -> OptionError:
    """That a run folder cannot be made."""
    return OptionError(
        f"run_dir {folder} cannot be written ({error.strerror}): choose another folder"
    )
