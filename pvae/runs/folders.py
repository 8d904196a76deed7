"""Where a run is written: a new folder, or files that replace those of one."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pvae.errors import RunError

__all__ = ["begin", "create", "next_folder", "publish"]


def next_folder(name: str, parent: str | Path = "runs") -> Path:
    """The first of ``runs/<name>-1``, ``runs/<name>-2``, … that does not exist."""
    number = 1
    while (Path(parent) / f"{name}-{number}").exists():
        number += 1
    return Path(parent) / f"{name}-{number}"


@contextlib.contextmanager
def create(path: str | Path) -> Iterator[Path]:
    """A new folder, built aside and renamed when the block ends; nothing is left if it fails.

    Args:
        path: The final place.

    Yields:
        The folder to write to.

    Raises:
        RunError: the place is taken, or cannot be written.
    """
    final = Path(path)
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise RunError(f"{final} exists already: choose another --run-dir, or remove it")
    made = [parent for parent in [final, *final.parents][1:] if not parent.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        _remove_empty(made)
        raise RunError(
            f"{final} cannot be written ({error.strerror}): choose another --run-dir"
        ) from None
    try:
        yield aside
        aside.chmod(0o755)
        aside.replace(final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        _remove_empty(made)
        raise


@contextlib.contextmanager
def begin(path: str | Path) -> Iterator[None]:
    """A new run folder, locked; removed if the block fails before there is a checkpoint to keep.

    Raises:
        RunError: The place is taken, or cannot be written.
    """
    from pvae.checkpoints import steps
    from pvae.locks import locked

    final = Path(path)
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise RunError(
            f"{final} exists already: choose another --run-dir, remove it, or go on with it by "
            "--resume"
        )
    made = [place for place in [final, *final.parents] if not place.exists()]
    try:
        final.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(made)
        raise RunError(
            f"{final} cannot be written ({error.strerror}): choose another --run-dir"
        ) from None
    with locked(final):
        try:
            yield
        except BaseException:
            if not steps(final / "checkpoints"):
                for child in final.iterdir():
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
                _remove_empty(made)
            raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def publish(run_dir: Path) -> Iterator[Path]:
    """A folder aside whose files replace those of an existing run folder when the block ends."""
    aside = Path(tempfile.mkdtemp(prefix=".aside.", dir=run_dir))
    try:
        yield aside
        for file in sorted(path for path in aside.rglob("*") if path.is_file()):
            target = run_dir / file.relative_to(aside)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
