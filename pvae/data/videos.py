"""Videos: a user's folder of animated pictures, arrays of videos as one, and animations written.

Frames are ``(T, C, H, W)`` with C = 3, bytes 0 to 255 in a file.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvae.data.files import Arrays, reading
from pvae.errors import DataError, OptionError

__all__ = ["contact_sheet", "read_video_folder", "stack_videos", "write_gif", "write_png"]

_SUFFIXES = (".gif", ".png", ".webp")

Video = NDArray[Any]


def stack_videos(videos: Sequence[Video], names: Sequence[str] | None = None) -> Video:
    """Videos ``(T, C, H, W)`` of one size as ``(N, T, C, H, W)``.

    Args:
        videos: The videos.
        names: How messages call them; their numbers by default.

    Raises:
        DataError: There is none, one is no video, or two differ in size.
    """
    if not len(videos):
        raise DataError("there is no video: give at least one")
    called = names or [f"video {number}" for number in range(len(videos))]
    for name, video in zip(called, videos, strict=True):
        if video.ndim != 4 or min(video.shape) < 1:
            raise DataError(
                f"{name} has shape {video.shape}, expected (frames, channels, height, width)"
            )
        if video.shape != videos[0].shape:
            raise DataError(
                f"{name} has shape {video.shape} and {called[0]} {videos[0].shape}, expected one "
                "(frames, channels, height, width): cut or resize them"
            )
    return np.stack(videos)


def read_video_folder(folder: str | Path, *, frames: int) -> Arrays:
    """The animated ``.gif``, ``.png`` and ``.webp`` files of a folder, by name: their first frames.

    A file that cannot be read or has fewer frames is left out with a warning.

    Args:
        folder: The folder.
        frames: Frames of a video.

    Returns:
        ``x``, bytes ``(N, frames, 3, H, W)``.

    Raises:
        DataError: No video is left, or they differ in size.
        OptionError: No frames are asked for.
    """
    folder = Path(folder).expanduser()
    if frames < 1:
        raise OptionError(f"frames is a number from 1 up, got {frames}")
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in _SUFFIXES)
    videos, names = [], []
    for path in paths:
        try:
            videos.append(_read(path, frames))
        except DataError as error:
            warnings.warn(f"a file is left out: {error}", UserWarning, stacklevel=2)
            continue
        names.append(str(path))
    if not videos:
        raise DataError(
            f"{folder} holds no animated picture of {frames} frames ({', '.join(_SUFFIXES)}): give "
            "a folder of them, or fewer frames"
        )
    return {"x": stack_videos(videos, names)}


def write_gif(path: str | Path, video: Any, *, rate: float = 8, zoom: int = 1) -> Path:
    """Write ``(T, C, H, W)`` between 0 and 1 as an animation that repeats.

    Args:
        path: File to write.
        video: Frames, grey or coloured; what lies outside 0 to 1 is cut off.
        rate: Frames a second.
        zoom: Pixels of the file for each pixel.
    """
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [Image.fromarray(_pixels(frame, zoom)) for frame in np.asarray(video)]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=round(1000 / rate), loop=0
    )
    return path


def write_png(path: str | Path, image: Any, *, zoom: int = 1) -> Path:
    """Write ``(C, H, W)`` between 0 and 1 as a picture."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_pixels(np.asarray(image), zoom)).save(path)
    return path


def contact_sheet(videos: Any, *, gap: int = 1) -> NDArray[np.float32]:
    """Videos ``(N, T, C, H, W)`` as one picture ``(C, h, w)``: a row each, time to the right."""
    frames = np.asarray(videos, dtype=np.float32)
    edges = [(0, 0), (0, 0), (0, 0), (0, gap), (0, gap)]
    padded = np.pad(frames, edges, constant_values=1.0)
    count, length, channels, height, width = padded.shape
    sheet: NDArray[np.float32] = padded.transpose(2, 0, 3, 1, 4).reshape(
        channels, count * height, length * width
    )
    return sheet


def _read(path: Path, frames: int) -> Video:
    from PIL import Image, ImageSequence

    with reading(path, "an animated picture"), Image.open(path) as file:
        shown, stays = [], []
        for frame in ImageSequence.Iterator(file):
            shown.append(np.asarray(frame.convert("RGB"), dtype=np.uint8))
            stays.append(max(float(frame.info.get("duration", 0)), 1.0))
            if len(shown) == frames:
                break
    # A file holds frames that are alike as one that stays longer.
    counts = [round(each / min(stays)) for each in stays]
    found = [frame for frame, count in zip(shown, counts, strict=True) for _ in range(count)]
    if len(found) < frames:
        raise DataError(f"{path} has {len(found)} frames, expected {frames}")
    return np.ascontiguousarray(np.stack(found[:frames]).transpose(0, 3, 1, 2))


def _pixels(frame: Video, zoom: int) -> NDArray[np.uint8]:
    scaled = (np.clip(frame, 0, 1) * 255 + 0.5).astype(np.uint8).repeat(zoom, 1).repeat(zoom, 2)
    return scaled[0] if len(scaled) == 1 else np.ascontiguousarray(scaled.transpose(1, 2, 0))
