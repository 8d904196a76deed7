"""Where the files of named sets lie: ``$PVAE_DATA``, else a cache folder that is filled once."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import shutil
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from pvae.errors import DataError

__all__ = ["Remote", "find", "provide"]

_TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True)
class Remote:
    """A public file.

    Attributes:
        path: Its place below a data folder, ``mnist/train-images-idx3-ubyte.gz``.
        url: Where it is downloaded from.
        sha256: Of the file or, for a ``.gz``, of what it holds: mirrors compress differently.
        content: Where given, ``sha256`` is that of the bytes that it reads from the file.
    """

    path: str
    url: str
    sha256: str
    content: Callable[[Path], bytes] | None = None


def _cache(root: str | Path | None) -> Path:
    return Path(root or "~/.cache/pvae").expanduser()


def find(path: str, root: str | Path | None) -> Path | None:
    """The file under ``$PVAE_DATA`` or the cache folder (``root``), if it is there."""
    shelf = os.environ.get("PVAE_DATA")
    folders = [Path(shelf).expanduser()] if shelf else []
    places = [folder / path for folder in [*folders, _cache(root)]]
    return next((place for place in places if place.is_file()), None)


def provide(name: str, remote: Remote, root: str | Path | None) -> Path:
    """The file where it is found, else downloaded into the cache folder.

    Args:
        name: Of the data set, for messages.
        remote: The file.
        root: Cache folder; ``~/.cache/pvae``.

    Raises:
        DataError: It is not here and cannot be downloaded, or has a wrong hash.
    """
    found = find(remote.path, root)
    if found is not None:
        return found
    destination = _cache(root) / remote.path
    try:
        _download(remote, destination)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"{name} needs {remote.path}, which is neither in $PVAE_DATA "
            f"({os.environ.get('PVAE_DATA') or 'not set'}) nor in {_cache(root)}, and could not be "
            f"downloaded from {remote.url} ({reason}): set PVAE_DATA to a folder that holds it, "
            "or try again with a connection"
        ) from error
    return destination


def _download(remote: Remote, destination: Path) -> None:
    part = destination.with_name(f"{destination.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(remote.url, timeout=_TIMEOUT) as source:
            destination.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        digests = _digests(part, remote)
        if remote.sha256 not in digests:
            raise DataError(
                f"{remote.url} has SHA-256 {digests[-1]}, expected {remote.sha256}, and was not "
                f"kept: try again, or put the right file at {destination}"
            )
        os.replace(part, destination)
    finally:
        part.unlink(missing_ok=True)


def _digests(path: Path, remote: Remote) -> list[str]:
    if remote.content is not None:
        return [hashlib.sha256(remote.content(path)).hexdigest()]
    with path.open("rb") as file:
        digests = [hashlib.file_digest(file, "sha256").hexdigest()]
    if remote.path.endswith(".gz"):
        with contextlib.suppress(OSError, EOFError, zlib.error), gzip.open(path) as content:
            digests.append(hashlib.file_digest(content, "sha256").hexdigest())
    return digests
