"""Weights that other programs wrote, read without running any code of theirs.

A ``.pt`` file is a pickle, which can run any program when it is opened. It is opened by torch's own
unpickler of plain tensors (``weights_only=True``), after its archive was found to be no bomb.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae.checkpoints import read_safetensors
from pvae.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["import_weights"]


def import_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a state dict that ``torch.save`` wrote.

    They go where you put them, for instance ``model.load_state_dict(import_weights("old.pt"))``.

    Args:
        path: The file.

    Returns:
        Name -> tensor, on the CPU; the names of nested dicts are joined by dots.

    Raises:
        RunError: It is missing, holds anything but tensors, is of torch's formats of before 2020,
            or unpacks to more than it is.
    """
    import torch

    place = Path(path)
    if not place.is_file():
        raise RunError(f"there is no file {place}: give a .pt or .safetensors file")
    if place.suffix == ".safetensors":
        return read_safetensors(place)
    _check_archive(place)
    try:
        content = torch.load(place, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RunError(
            f"{place} holds more than tensors, or is damaged, and was not opened ({reason}): save "
            "its state dict alone"
        ) from None
    found = dict(_tensors(content, ""))
    if not found:
        raise RunError(f"{place} holds no named tensors: save a state dict")
    return found


def _check_archive(path: Path) -> None:
    """An archive as torch writes it, whose entries are stored as they are."""
    old = RunError(
        f"{path} is not in the format that torch.save writes since 1.6: save it again by a newer "
        "torch, or as safetensors"
    )
    if not zipfile.is_zipfile(path):
        raise old
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError):
        raise old from None
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise RunError(f"{path} unpacks to more than it is, which no file of torch.save does")


def _tensors(content: Any, prefix: str) -> list[tuple[str, Tensor]]:
    import torch

    if isinstance(content, torch.Tensor):
        return [(prefix, content)]
    if not isinstance(content, Mapping):
        return []
    joint = f"{prefix}." if prefix else ""
    return [each for name, entry in content.items() for each in _tensors(entry, f"{joint}{name}")]
