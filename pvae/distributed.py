"""Processes that work on one problem, and what becomes of them when one is lost.

A :class:`Group` adds tensors over its processes (ranks); it is all that training and evaluation
need. A thread of each rank counts up in a store that all of them see. A rank whose count stands
still is lost: whoever waits for it ends with its number in the message.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pvae.errors import LostRankError, OptionError
from pvae.launchers import launched

__all__ = ["Group", "agree", "alone", "join", "local_device"]

_BEAT = 1.0  # seconds between two counts
_SILENT = 5.0  # a rank that has not counted for so long did not survive a broken connection
_HUNG = 18.0  # and one that has not for so long is not waited for, even if nothing broke
_WAIT = 22.0  # the longest search for the rank that is to blame
_START = datetime.timedelta(minutes=5)  # for all ranks to come


class Group:
    """The processes of one problem.

    Args:
        rank: This one, from 0.
        size: How many there are.
        device: Where its tensors lie.

    Attributes:
        asked: The signal that asks this rank to end.
        heard: The signal that some rank had been sent before the last step.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.asked: int | None = None
        self.heard: int | None = None
        self._depth = 0
        # NCCL adds on a GPU alone; gloo wherever, and best on the host.
        self._wire = device if dist.get_backend() == "nccl" else torch.device("cpu")
        if dist.get_backend() == "nccl" and device.type != "cuda":
            raise OptionError(
                f"the process group speaks NCCL, which adds on GPUs alone, and this is {device}: "
                "use device='cuda', or a group that speaks gloo"
            )
        self._pulse = _Pulse(rank, size, self.share(uuid.uuid4().hex))

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor added over all ranks, on every rank the same bits; one message per type.

        Args:
            tensors: Of the same shapes and types on every rank.

        Raises:
            LostRankError: A rank did not answer.
        """
        sums: list[Tensor] = [tensor.detach() for tensor in tensors]
        for kind in dict.fromkeys(tensor.dtype for tensor in sums):
            places = [k for k, tensor in enumerate(sums) if tensor.dtype == kind]
            flat = torch.cat([sums[k].reshape(-1) for k in places])
            flat = flat.to(self._wire, torch.uint8 if kind == torch.bool else kind)
            with self._pulse.waiting():
                dist.all_reduce(flat)
                if flat.is_cuda:  # there it is only asked for
                    torch.cuda.current_stream(flat.device).synchronize()
            parts = torch.split(flat, [sums[k].numel() for k in places])
            for k, part in zip(places, parts, strict=True):
                sums[k] = part.view(sums[k].shape).to(sums[k].device, kind)
        return sums

    def lead(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by those of rank 0."""
        sent = self.sum([t if self.rank == 0 else torch.zeros_like(t) for t in tensors])
        with torch.no_grad():
            for tensor, value in zip(tensors, sent, strict=True):
                tensor.copy_(value)

    def gather(self, text: str) -> list[str]:
        """The text of every rank, by rank."""
        found: list[Any] = [None] * self.size
        if not hasattr(self, "_pulse"):
            dist.all_gather_object(found, text)
            return found
        with self._pulse.waiting():
            dist.all_gather_object(found, text)
        return found

    def share(self, text: str) -> str:
        """The text of rank 0."""
        return self.gather(text)[0]

    def meet(self) -> None:
        """Go on when every rank is here."""
        self.sum([torch.zeros(1)])

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Within it, an error that ends this rank is told to the others, who end with it."""
        if self._depth:
            yield
            return
        self._pulse.session += 1
        self._depth = 1
        try:
            yield
        except BaseException as error:
            self._pulse.end(error)
            raise
        finally:
            self._depth = 0


def agree(group: Group | None, what: str) -> None:
    """Refuse ranks that were given different work, described by ``what``.

    Raises:
        OptionError: Two ranks differ.
    """
    if group is None:
        return
    texts = group.gather(what)
    other = next((rank for rank, text in enumerate(texts) if text != texts[0]), None)
    if other is not None:
        raise OptionError(
            f"rank 0 has {texts[0]}, and rank {other} has {texts[other]}: give all ranks the same "
            "data and options"
        )


_joined: list[Group] = []  # of the process group there is
_apart = threading.local()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it, this process works by itself though a launcher started several."""
    before = getattr(_apart, "on", False)
    _apart.on = True
    try:
        yield
    finally:
        _apart.on = before


def join(device: torch.device) -> Group | None:
    """The group of this process, made where a launcher asks for one.

    It is the default process group of ``torch.distributed`` if there is one (Ray Train makes one).
    Otherwise the environment is read, see :func:`pvae.launchers.launched`, and the group lasts as
    long as the process: NCCL for a CUDA device, gloo for the rest.

    Args:
        device: Where the tensors of this rank lie.

    Returns:
        The group; ``None`` for a process that is alone, or within :func:`alone`.

    Raises:
        OptionError: The environment is incomplete.
        LostRankError: Some ranks did not come within 5 minutes.
    """
    if not dist.is_available() or getattr(_apart, "on", False):
        return None
    if not dist.is_initialized():
        place = launched()
        if place is None:
            return None
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                init_method=f"tcp://{place.address}:{place.port}" if _is_alone() else "env://",
                rank=place.rank,
                world_size=place.size,
                timeout=_START,
            )
        except (RuntimeError, OSError) as error:
            raise LostRankError(
                f"rank {place.rank} did not meet the other {place.size - 1} at {place.address}, "
                f"port {place.port} ({_first_line(error)}): start all of them"
            ) from None
        # From here on the counts say who is lost; a rank may take as long as it needs.
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(days=7))
        atexit.register(_leave)
    if dist.get_world_size() == 1:
        return None
    if not _joined or _joined[0].device != device:
        _joined[:] = [Group(dist.get_rank(), dist.get_world_size(), device)]
    return _joined[0]


def _is_alone() -> bool:
    """Whether no agent of torchrun keeps the store, so that rank 0 has to."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _leave() -> None:
    with contextlib.suppress(Exception):
        _joined.clear()
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """``cuda`` without a number is the GPU of this rank on its machine."""
    place = launched() if device.type == "cuda" and device.index is None else None
    local = os.environ.get("LOCAL_RANK") if place is None else str(place.local_rank)
    if device.type != "cuda" or device.index is not None or local is None:
        return device
    own = torch.device("cuda", int(local) % torch.cuda.device_count())
    torch.cuda.set_device(own)
    return own


class _Pulse:
    """Counts of all ranks in the store of the process group, and who stopped counting."""

    def __init__(self, rank: int, size: int, name: str) -> None:
        self.rank, self.size, self.name = rank, size, name
        self.session, self.since = 0, 0.0  # when the collective at hand began; 0 between two
        self.counts = [-1] * size
        self.seen = [time.monotonic()] * size  # when each count was last seen to change
        self.gone = False  # whether the store is
        self.lock = threading.Lock()
        self.store = _own_connection()
        self.store.add(self._key("beat", rank), 1)
        self.left = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="pvae pulse", daemon=True)
        self.thread.start()
        atexit.register(self.leave)

    def leave(self) -> None:
        """Stop counting: a thread within the store's C++ while Python ends would abort it."""
        self.left.set()
        self.thread.join(timeout=5)

    def _key(self, what: str, rank: int) -> str:
        return f"pvae/{self.name}/{what}/{rank}"

    def _beat(self) -> None:
        before = time.monotonic()
        while not (self.gone or self.left.wait(_BEAT)) and dist.is_initialized():
            now = time.monotonic()
            if now - before > _SILENT:  # this process slept: the others are not to blame
                self.seen = [now] * self.size
            before = now
            self._look()
            lost = self._lost(_HUNG)
            waits = self.since and now - self.since > _SILENT
            if waits and (lost is not None or (now - self.since > _HUNG and self.gone)):
                os.write(2, f"pvae: error: {lost or self._host()}\n".encode())
                os._exit(LostRankError.exit_code)

    def _look(self) -> None:
        """Count, and see who else has."""
        with self.lock:
            try:
                self.store.add(self._key("beat", self.rank), 1)
                for rank in range(self.size):
                    count = self.store.add(self._key("beat", rank), 0)
                    if count != self.counts[rank]:
                        self.counts[rank], self.seen[rank] = count, time.monotonic()
            except (RuntimeError, OSError):
                self.gone = True

    def _lost(self, most: float) -> str | None:
        """Who is lost, in words: one that said so, or one that is silent for ``most`` seconds."""
        for rank in range(self.size):
            reason = "" if rank == self.rank else self._reason(rank)
            if reason:
                return reason
        for rank, seen in enumerate(self.seen):
            if rank != self.rank and time.monotonic() - seen > most:
                return _in_words(rank, self.size)
        return None

    def _reason(self, rank: int) -> str:
        key = self._key(f"end/{self.session}", rank)
        with self.lock:
            try:
                return self.store.get(key).decode() if self.store.check([key]) else ""
            except (RuntimeError, OSError):
                self.gone = True
                return ""

    def _host(self) -> str:
        if _is_alone():
            return _in_words(0, self.size)
        return f"the launcher of these {self.size} ranks was lost: start the job again"

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a collective: what breaks in it is the fault of a rank, which is found."""
        self.since = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise LostRankError(self._blame(error)) from None
        finally:
            self.since = 0.0

    def _blame(self, error: RuntimeError) -> str:
        started, self.since = time.monotonic(), 0.0
        while time.monotonic() - started < _WAIT and not self.gone:
            self._look()
            lost = self._lost(_SILENT)
            if lost is not None:
                return lost
            time.sleep(_BEAT / 4)
        if self.gone:
            return self._host()
        return f"the ranks could not exchange their sums ({_first_line(error)}): start again"

    def end(self, error: BaseException) -> None:
        """Tell the others that this rank ends, and why."""
        reason = _first_line(error) or type(error).__name__
        if not isinstance(error, LostRankError):
            reason = f"rank {self.rank} of {self.size} ended ({reason}), and the others with it"
        if self.gone:
            return
        with self.lock, contextlib.suppress(RuntimeError, OSError):
            self.store.set(self._key(f"end/{self.session}", self.rank), reason)
        if self.rank == 0 and _is_alone() and isinstance(error, LostRankError):
            self._linger()

    def _linger(self) -> None:
        """The store goes with rank 0: the other survivors read from it first."""
        others = [self._key(f"end/{self.session}", rank) for rank in range(1, self.size)]
        started = time.monotonic()
        while time.monotonic() - started < _SILENT and self.size > 2:
            with self.lock, contextlib.suppress(RuntimeError, OSError):
                if sum(self.store.check([key]) for key in others) >= self.size - 2:
                    return
            time.sleep(_BEAT / 4)


def _in_words(rank: int, size: int) -> str:
    return (
        f"rank {rank} of {size} was lost (killed, or cut off), and the others end with it: start "
        "the job again, from its checkpoint by --resume"
    )


def _own_connection() -> Any:
    """A connection to the store that no collective of the main thread can block."""
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):  # prefixes before the names
        store = store.underlying_store
    return store.clone() if hasattr(store, "clone") else store


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
