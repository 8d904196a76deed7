"""Tensors on disk: safetensors beside a manifest with the SHA-256 of every file.

Nothing is ever unpickled. Files are written aside, flushed to the disk and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pvae.errors import RunError

__all__ = ["load_tensors", "save_tensors", "write_aside"]


def write_aside(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Save tensors as ``tensors.safetensors`` with ``manifest.json`` (hash, shapes, ``about``)."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    content = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    manifest = {
        "files": {"tensors.safetensors": hashlib.sha256(content).hexdigest()},
        "tensors": {name: list(value.shape) for name, value in tensors.items()},
        **about,
    }
    write_aside(folder / "tensors.safetensors", content)
    write_aside(folder / "manifest.json", json.dumps(manifest, indent=2).encode())


def load_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the manifest of a folder, every byte verified.

    Raises:
        RunError: a file is missing or its bytes are not those that were written.
    """
    from safetensors.torch import load

    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        expected = manifest["files"]["tensors.safetensors"]
        content = (folder / "tensors.safetensors").read_bytes()
    except OSError as error:
        name = Path(error.filename or folder).name
        raise RunError(f"checkpoint {folder} has no readable {name}: train the run again") from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{folder / 'manifest.json'} is damaged: train the run again") from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise RunError(
            f"{folder / 'tensors.safetensors'} is damaged (its SHA-256 is not the manifest's): "
            "restore it from a copy or train the run again"
        )
    return load(content), manifest
