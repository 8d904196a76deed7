"""Real processes: what a signal leaves of them, and what a refusal by the operating system does."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pvae
from pvae import checkpoints
from pvae.cli import main

ROOT = Path(__file__).parents[1]
WORDS = ["train", "factor-analysis", "--data", "digits", "--epochs", "4", "--batch-size", "32",
         "--model.z_dim", "2", "--guide.hidden", "[4]", "--engine", "eager", "--device", "cpu",
         "--checkpoint-every", "20 steps"]  # fmt: skip

# One line for each step when it has been taken; it lasts long enough for a signal to come in it.
SLOW = """
import sys, time
from pvae import loop
from pvae.cli import main
take = loop.Loop._take
def slow(each, index):
    print("step", each.place.step, flush=True)
    time.sleep(float(sys.argv[1]))
    return take(each, index)
loop.Loop._take = slow
sys.exit(main(sys.argv[2:]))
"""


@contextlib.contextmanager
def child(*words: str, seconds: float = 0.02) -> Iterator[subprocess.Popen[str]]:
    """A training in a process of its own, with the signals that Python sets whoever started us."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(seconds), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until_step(process: subprocess.Popen[str], number: int) -> int:
    """Read its lines until a step has begun."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1]) >= number:
            return int(line.split()[1])
    raise AssertionError(f"it ended before step {number}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The parameters of a training that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main([*WORDS, "--run-dir", str(folder)]) == 0
    return best(folder)


def best(folder: Path) -> bytes:
    return (folder / "checkpoints/best/tensors.safetensors").read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_within_a_step_and_the_run_resumes_to_the_same_bytes(
    tmp_path, whole, number, code
):
    folder = tmp_path / "run"
    with child(*WORDS, "--run-dir", str(folder)) as process:
        begun = until_step(process, 47)
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
    steps = [begun, *(int(line.split()[1]) for line in output.splitlines() if "step" in line[:5])]
    assert process.returncode == code
    saved = checkpoints.steps(folder / "checkpoints")[-1].name
    assert saved == f"step-{steps[-1] + 1:08d}"  # after the step at hand, and at once
    assert len(steps) <= 3, "the signal may come while a line is on its way to us"
    lines = [line for line in errors.splitlines() if line]
    assert "pvae: stopping after this step; again to leave at once" in lines
    assert f"pvae: {saved} is saved; go on by: pvae train --resume {folder}" in lines
    assert "Traceback" not in errors
    assert main(["train", "--resume", str(folder)]) == 0
    assert best(folder) == whole


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once_with_the_checkpoint_of_before(tmp_path, whole, first):
    """The step would last a minute."""
    folder = tmp_path / "run"
    with child(*WORDS, "--run-dir", str(folder)) as process:
        until_step(process, 25)
        process.send_signal(signal.SIGSTOP)  # so that both are there when it goes on
        process.send_signal(first)
        process.send_signal(signal.SIGTERM if first == signal.SIGINT else signal.SIGINT)
        before = {path.name for path in checkpoints.steps(folder / "checkpoints")}
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, 143)
    assert {path.name for path in checkpoints.steps(folder / "checkpoints")} == before
    assert "Traceback" not in errors
    assert main(["train", "--resume", str(folder)]) == 0
    assert best(folder) == whole


def test_a_long_step_is_left_by_the_second_signal(tmp_path):
    with child(*WORDS, "--run-dir", str(tmp_path / "run"), seconds=60) as process:
        until_step(process, 0)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        while "again to leave at once" not in process.stderr.readline():
            pass
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)  # the first one waits for the step
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert time.monotonic() - sent < 20
    assert process.returncode == 143


# --- what the operating system refuses -----------------------------------------------------------

# A file may not grow beyond so many bytes: what the system says to a disk that is full is said to
# a process that is root too.
LIMITED = """
import resource, signal, sys
from pvae.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def limited(size: int, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(size), *words], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip


def one_line(job: subprocess.CompletedProcess[str]) -> str:
    assert job.returncode == 74, job.stderr
    assert "Traceback" not in job.stderr
    (line,) = [line for line in job.stderr.splitlines() if line.startswith("pvae: error: ")]
    return line


@pytest.fixture
def half_way(tmp_path) -> Path:
    """A run that was interrupted, with its last checkpoint."""
    folder = tmp_path / "run"
    with child(*WORDS, "--run-dir", str(folder)) as process:
        until_step(process, 30)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    return folder


def loadable(folder: Path, newest: Path, whole: bytes) -> None:
    assert checkpoints.steps(folder / "checkpoints")[-1] == newest
    with pytest.warns(UserWarning, match="was interrupted in epoch"):
        assert pvae.load(folder).stopped == "interrupted"
    assert main(["train", "--resume", str(folder)]) == 0
    assert best(folder) == whole


def test_a_write_that_the_system_refuses_leaves_the_checkpoint_of_before(half_way, whole):
    newest = checkpoints.steps(half_way / "checkpoints")[-1]
    line = one_line(limited(6000, "train", "--resume", str(half_way)))
    assert os.strerror(errno.EFBIG) in line
    assert "tensors.safetensors" in line
    loadable(half_way, newest, whole)


@pytest.fixture
def immutable(half_way) -> Iterator[Path]:
    """A folder in which root cannot write either, where the file system knows how."""
    place = half_way / "checkpoints"
    if os.geteuid():
        place.chmod(0o555)
    elif subprocess.run(["chattr", "+i", place], capture_output=True, check=False).returncode:
        pytest.skip("nobody is refused anything: root, and no chattr +i on this file system")
    yield half_way
    if os.geteuid():
        place.chmod(0o755)
    else:
        subprocess.run(["chattr", "-i", place], check=True)


def test_a_read_only_folder_is_one_line_and_leaves_the_checkpoint_of_before(immutable):
    newest = checkpoints.steps(immutable / "checkpoints")[-1]
    line = one_line(limited(2**40, "train", "--resume", str(immutable)))
    assert os.strerror(errno.EPERM) in line or os.strerror(errno.EACCES) in line
    assert checkpoints.steps(immutable / "checkpoints")[-1] == newest
    with pytest.warns(UserWarning, match="was interrupted in epoch"):
        assert pvae.load(immutable).stopped == "interrupted"
