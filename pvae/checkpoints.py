"""Tensors on disk: safetensors beside a manifest with the SHA-256 of every file.

Nothing is ever unpickled, no path is taken from a file, and every byte is verified before it is
parsed. Files are written aside, flushed to the disk and renamed; so are whole checkpoints::

    checkpoints/step-00000400/tensors.safetensors    every tensor of the training
    checkpoints/step-00000400/manifest.json          hashes, shapes, everything that is no tensor

The manifest's own SHA-256 stands in it; it is that of the file with 64 zeros in its place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Saved",
    "fingerprint",
    "load_tensors",
    "newest",
    "read_safetensors",
    "save_tensors",
    "set_aside_after",
    "steps",
    "write_aside",
    "write_checkpoint",
]

Saved = tuple[dict[str, "Tensor"], dict[str, Any]]

_FORMAT = 2
_MOST_MANIFEST = 256 << 20  # bytes
_MOST_HEADER = 16 << 20
_SEAL = b'"manifest_sha256": "'
_BLANK = b"0" * 64
_NAME = re.compile(r"step-(\d{8,18})(?:-(\d{1,9}))?")


# --- writing -------------------------------------------------------------------------------------


def write_aside(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, on the disk when this returns.

    Raises:
        OSError: It cannot be written; what was there before is there still.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        _write(temporary, content)
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        raise _named(error, path) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is; some systems cannot open one."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _named(error: OSError, path: Path) -> OSError:
    """The error with the file's name, which a failed write does not tell."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Save ``tensors.safetensors`` with ``manifest.json``: hashes, sizes, shapes, ``about``."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    content = save(_apart(tensors))
    manifest = {
        "format": _FORMAT,
        "manifest_sha256": _BLANK.decode(),
        "files": {"tensors.safetensors": hashlib.sha256(content).hexdigest()},
        "bytes": {"tensors.safetensors": len(content)},
        "tensors": {name: list(value.shape) for name, value in tensors.items()},
        **about,
    }
    text = json.dumps(manifest, indent=2).encode()
    sealed = text.replace(_SEAL + _BLANK, _SEAL + _digest(text), 1)
    write_aside(folder / "tensors.safetensors", content)
    write_aside(folder / "manifest.json", sealed)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and without shared memory, which the format cannot hold."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone() if place in seen else value
        seen.add(place)
    return found


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def write_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Save a checkpoint in ``root/step-<step>``, whole or not at all, then remove older ones.

    Args:
        root: The folder of the run's checkpoints.
        step: Steps taken; beside an older checkpoint of that step it is ``step-<step>-2``.
        tensors: Name -> tensor.
        about: Everything else: numbers, words, lists and dicts.
        keep: Checkpoints that stay, this one counted.

    Raises:
        OSError: It cannot be written; the earlier checkpoints are there still.
    """
    same = [_order(path)[1] for path in steps(root) if _order(path)[0] == step]
    final = root / (f"step-{step:08d}" + (f"-{max(same) + 1}" if same else ""))
    aside = root / ".step.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in (aside, *root.glob(".step-*.old")):
            _remove(left)
        save_tensors(aside, tensors, {"step": step, **about})
        aside.replace(final)
        _flush_folder(root)
    except OSError as error:
        raise _named(error, Path(error.filename or final)) from None
    finally:
        _remove(aside)
    for older in steps(root)[: -keep or None]:
        _discard(older)
    return final


def _discard(folder: Path) -> None:
    """Remove a checkpoint so that a half-removed one is never taken for one."""
    gone = folder.with_name(f".{folder.name}.old")
    _remove(gone)
    with contextlib.suppress(OSError):
        folder.replace(gone)
    _remove(gone)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def steps(root: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in root.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_order)


def _order(folder: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(folder.name)
    assert found is not None
    return int(found[1]), int(found[2] or 1)


def set_aside_after(good: Path) -> None:
    """Rename the checkpoints after a good one, which are damaged; nothing is deleted.

    New ones can then take their place, and none is kept instead of a good one.
    """
    for folder in [path for path in steps(good.parent) if _order(path) > _order(good)]:
        number = 1
        while (other := folder.with_name(f"{folder.name}.damaged-{number}")).exists():
            number += 1
        folder.replace(other)


# --- reading -------------------------------------------------------------------------------------


def newest(root: Path) -> tuple[Path, Saved] | None:
    """The newest checkpoint whose every byte is as it was written; ``None`` if there is none.

    A damaged one is named in a warning and left where it is.

    Raises:
        RunError: There are checkpoints, and all are damaged.
    """
    first: RunError | None = None
    for folder in reversed(steps(root)):
        try:
            saved = load_tensors(folder)
            if saved[1].get("step") != _order(folder)[0]:
                raise RunError(
                    f"{folder} is damaged (its manifest is that of step {saved[1].get('step')})"
                )
        except RunError as error:
            warnings.warn(f"{error}; an earlier checkpoint is looked for", stacklevel=2)
            first = first or error
            continue
        return folder, saved
    if first is not None:
        raise first
    return None


def load_tensors(folder: Path) -> Saved:
    """The tensors and the manifest of a folder, every byte verified.

    Raises:
        RunError: A file is missing or its bytes are not those that were written.
    """
    path = folder / "tensors.safetensors"
    text = _read(folder / "manifest.json", _MOST_MANIFEST)
    manifest, expected, size = _parse(folder / "manifest.json", text)
    content = _read(path, size)
    if hashlib.sha256(content).hexdigest() != expected:
        raise RunError(
            f"{path} is damaged (its SHA-256 is not the manifest's): restore it from a copy or "
            "train the run again"
        )
    tensors = _decode(path, content)
    if {name: list(value.shape) for name, value in tensors.items()} != manifest["tensors"]:
        raise RunError(f"{path} holds other tensors than its manifest says: restore it")
    return tensors, manifest


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that has no manifest.

    Raises:
        RunError: It is missing, or no safetensors file.
    """
    return _decode(path, _read(path, None))


def _decode(path: Path, content: bytes) -> dict[str, Tensor]:
    """The header's length is checked before it is parsed, its offsets by safetensors itself."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(_MOST_HEADER, len(content) - 8):
        raise RunError(f"{path} is no safetensors file (a header of {length} bytes): restore it")
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no safetensors file ({error}): restore it") from None


def _read(path: Path, most: int | None) -> bytes:
    """A regular file of at most so many bytes."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise RunError(f"{path} is no regular file: restore it from a copy")
        if most is not None and about.st_size > most:
            raise RunError(f"{path} is damaged ({about.st_size} bytes instead of {most})")
        with path.open("rb") as file:
            return file.read(about.st_size)
    except OSError as error:
        raise RunError(
            f"checkpoint {path.parent} has no readable {path.name} ({error.strerror}): restore it "
            "from a copy or train the run again"
        ) from None


def _parse(path: Path, text: bytes) -> tuple[dict[str, Any], str, int | None]:
    """The manifest, with the hash and the size that it gives for the tensors."""
    damaged = RunError(f"{path} is damaged: restore it from a copy or train the run again")
    try:
        manifest = json.loads(text)
        files, sizes = manifest["files"], manifest.get("bytes", {})
        expected, size = files["tensors.safetensors"], sizes.get("tensors.safetensors")
        shapes = manifest["tensors"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged from None
    foreign = [name for name in files if name != "tensors.safetensors"]
    if foreign:
        raise RunError(f"{path} names a file that is no part of a checkpoint: {foreign[0]!r}")
    is_sealed = "format" in manifest or "manifest_sha256" in manifest
    if is_sealed and not (manifest.get("format") == _FORMAT and _seal_is_whole(text)):
        raise damaged
    if not (isinstance(shapes, dict) and isinstance(size, (int, type(None)))):
        raise damaged
    return manifest, expected, size


def _seal_is_whole(text: bytes) -> bool:
    start = text.find(_SEAL) + len(_SEAL)
    blank = text[:start] + _BLANK + text[start + len(_BLANK) :]
    return _SEAL in text and text[start : start + len(_BLANK)] == _digest(blank)


def fingerprint(batch: Any) -> str:
    """SHA-256 of tensors: their types, shapes and bytes; of rows in a file, those of a few."""
    import torch
    from torch.utils import _pytree

    digest = hashlib.sha256()
    for tensor in _pytree.tree_leaves(batch):
        rows: Any = tensor if isinstance(tensor, torch.Tensor) else tensor.outline()
        flat = rows.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(memoryview(flat.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
