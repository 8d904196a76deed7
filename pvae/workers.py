"""Pieces of work in processes of their own, several at a time.

Each process is ``python -m pvae COMMAND FOLDER`` and reads its configuration from standard input,
which stays open while the parent lives: a process whose parent is gone ends itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

__all__ = ["Outcome", "num_cores", "read_configuration", "run_all"]

_POLL = 0.05  # seconds
_ASK = 0.5  # seconds between two looks at what others have claimed
_GRACE = 5.0  # seconds to end after SIGTERM


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        index: Which piece of work it was.
        reason: One line on what went wrong; ``None`` if nothing did.
        seconds: How long it took; ``None`` where another command did it.
    """

    index: int
    reason: str | None
    seconds: float | None


Claim = Callable[[int], "IO[bytes] | Literal['taken', 'done']"]
"""The number of a piece of work -> a claim on it, or that another command has it or has done it."""


@dataclass
class _Worker:
    index: int
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    started: float
    claim: IO[bytes] | None


def run_all(
    work: Sequence[tuple[Path, Mapping[str, Any]]],
    *,
    jobs: int,
    command: Sequence[str] = ("board", "--run-cell"),
    started: Any = None,
    waited: Callable[[], None] | None = None,
    claim: Claim | None = None,
) -> Iterator[Outcome]:
    """Do every piece of work, at most ``jobs`` at a time; outcomes come as they end.

    However the loop over them ends, no process is left running.

    Args:
        work: The folder to write and the configuration of each.
        jobs: Processes at a time; the cores are shared among them.
        command: Words of ``pvae`` that come before the folder.
        waited: Called again and again while all processes are at work.
        started: Called with the index of a piece when its process starts.
        claim: Asked before a piece is begun, where several commands share the work. What another
            has is asked for again until it is done, or its owner is gone.
    """
    waiting = list(enumerate(work))
    running: list[_Worker] = []
    environment = _environment(jobs)
    try:
        while waiting or running:
            left = []
            for index, (folder, config) in waiting:
                mine: Any = None if claim is None or len(running) >= jobs else claim(index)
                if len(running) >= jobs or mine == "taken":
                    left.append((index, (folder, config)))
                elif mine == "done":
                    yield Outcome(index, None, None)
                else:
                    running.append(_start(index, folder, config, environment, command, mine))
                    if started is not None:
                        started(index)
            waiting = left
            ended = [worker for worker in running if worker.process.poll() is not None]
            for worker in ended:
                running.remove(worker)
                yield _outcome(worker)
            if not ended:
                if waited is not None:
                    waited()
                time.sleep(_POLL if running else _ASK)
    finally:
        _end(running)


def _environment(jobs: int) -> dict[str, str]:
    """The cores shared among the processes, which see the package that this one sees."""
    package = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    threads = str(max(1, num_cores() // jobs))
    return {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": path}


def num_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def _start(
    index: int,
    folder: Path,
    config: Mapping[str, Any],
    environment: dict[str, str],
    command: Sequence[str],
    claim: IO[bytes] | None,
) -> _Worker:
    errors = tempfile.TemporaryFile()
    process = subprocess.Popen(
        [sys.executable, "-m", "pvae", *command, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env=environment,
        start_new_session=True,  # an interrupt from the terminal reaches this process alone
        # The claim lasts as long as the work: a killed parent may be gone a moment before it.
        pass_fds=() if claim is None else (claim.fileno(),),
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(config).encode() + b"\n")
        process.stdin.flush()
    return _Worker(index, process, errors, time.perf_counter(), claim)


def _outcome(worker: _Worker) -> Outcome:
    seconds = time.perf_counter() - worker.started
    code = worker.process.returncode
    worker.errors.seek(0)
    said = worker.errors.read().decode(errors="replace").splitlines()
    _close(worker)
    if code == 0:
        return Outcome(worker.index, None, seconds)
    if code < 0:
        reason = f"its process was ended by {signal.Signals(-code).name}"
        return Outcome(worker.index, reason, seconds)
    lines = [line for line in said if line.startswith("pvae: error: ")] or said or ["no reason"]
    return Outcome(worker.index, lines[-1].removeprefix("pvae: error: "), seconds)


def _end(running: Sequence[_Worker]) -> None:
    for worker in running:
        worker.process.terminate()
    until = time.monotonic() + _GRACE
    for worker in running:
        try:
            worker.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
        _close(worker)


def _close(worker: _Worker) -> None:
    worker.errors.close()
    if worker.claim is not None:
        worker.claim.close()
    assert worker.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        worker.process.stdin.close()


def read_configuration() -> dict[str, Any]:
    """The configuration of this process, which will end itself when its parent is gone."""
    config: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    descriptor = sys.stdin.fileno()

    def end_with_parent() -> None:
        while os.read(descriptor, 1):
            pass
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    return config
