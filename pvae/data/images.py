"""Named sets of images (OMNIGLOT, CIFAR-10) and folders of a user's own image files."""

from __future__ import annotations

import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvae.data.downloads import Remote, find, provide
from pvae.data.files import Arrays, files_below, reading
from pvae.errors import DataError, OptionError

__all__ = ["cifar10", "omniglot", "read_cifar10", "read_image_folder"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MOST_PIXELS = 2**14  # a side

_OMNIGLOT = "omniglot/omniglot28_area_derived.npz"
_CIFAR10 = Remote(
    "cifar-10/cifar-10-binary.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
_CIFAR10_ROW = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes


def omniglot(root: str | Path | None) -> Arrays:
    """32460 handwritten characters of 28x28 pixels, grey 0 to 255; 1623 kinds, 20 of each.

    Lake, Salakhutdinov & Tenenbaum (2015): their background set (964 kinds) is train, their
    evaluation set (659 other kinds) test. The 105x105 originals are averaged over areas, so numbers
    are not comparable with tables made on the 28x28 file of Burda et al. (2016).
    """
    path = find(_OMNIGLOT, root)
    if path is None:
        raise DataError(
            f"omniglot needs {_OMNIGLOT}, which is nowhere to be downloaded: set PVAE_DATA to a "
            "folder that holds it (arrays background and evaluation, (kinds, 20, 28, 28) bytes)"
        )
    with reading(path, "npz"), np.load(path, allow_pickle=False) as file:
        parts = {"train": file["background"], "test": file["evaluation"]}
    arrays, first = {}, 0
    for part, images in parts.items():
        kinds, drawers = images.shape[:2]
        arrays[part] = images.reshape(kinds * drawers, *images.shape[2:])
        arrays[f"{part}_labels"] = np.repeat(np.arange(first, first + kinds), drawers)
        first += kinds
    return arrays


def cifar10(root: str | Path | None) -> Arrays:
    """60000 photographs of 10 kinds of things, 32x32 pixels, 3 colours, 0 to 255; 10000 test.

    Krizhevsky (2009), in the binary version: nothing is unpickled.
    """
    return read_cifar10(provide("cifar-10", _CIFAR10, root))


def read_cifar10(path: Path) -> Arrays:
    """The images ``(N, 3, 32, 32)`` and labels of an archive in CIFAR-10's binary version.

    Rows of 3073 bytes, a label and three planes, in members ``data_batch_1.bin`` and so on for
    train, ``test_batch.bin`` for test. Nothing of the archive is written to the disk.

    Raises:
        DataError: The archive is damaged, or lacks a part.
    """
    rows: dict[str, list[NDArray[np.uint8]]] = {"train": [], "test": []}
    with reading(path, "CIFAR-10's binary version"), tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda each: each.name):
            name = Path(member.name).name
            if not member.isfile() or not (_is_train(name) or name == "test_batch.bin"):
                continue
            file = archive.extractfile(member)
            content = np.frombuffer(file.read() if file else b"", np.uint8)
            if content.size == 0 or content.size % _CIFAR10_ROW:
                raise DataError(
                    f"{path}: {name} holds {content.size} bytes, expected rows of {_CIFAR10_ROW}: "
                    "fetch it anew"
                )
            part = "train" if _is_train(name) else "test"
            rows[part].append(content.reshape(-1, _CIFAR10_ROW))
    arrays = {}
    for part, pieces in rows.items():
        if not pieces:
            raise DataError(f"{path} holds no {part} batch: fetch the binary version anew")
        table = np.concatenate(pieces)
        arrays[part] = table[:, 1:].reshape(-1, 3, 32, 32)
        arrays[f"{part}_labels"] = table[:, 0].astype(np.int64)
    return arrays


def _is_train(name: str) -> bool:
    return name.startswith("data_batch_") and name.endswith(".bin")


# --- a folder ------------------------------------------------------------------------------------


def read_image_folder(
    folder: Path, size: Sequence[int] | int | str | None = None, *, unreadable: str = "stop"
) -> Arrays:
    """The image files of a folder and its sub-folders, in the order of their names.

    Files directly in the folder make one set; files in ``train`` and ``test`` (and ``valid``) keep
    that split. Sub-folders other than these are labels, numbered in the order of their names.
    Images become grey if all of them are, else red, green and blue; bytes 0 to 255, of sixteen bits
    the upper eight, and 0 and 1 where all is black or white. What is transparent is white; of
    several pictures in a file the first is taken.

    Args:
        folder: The folder.
        size: ``(height, width)`` or ``"HxW"`` to resize all images to, or one number for a square;
            ``None`` takes them as they are, and then they must agree.
        unreadable: ``"stop"`` at the first file that is no image, or ``"skip"`` it with a warning.

    Raises:
        OptionError: An option that cannot be.
        DataError: There is no image, one cannot be read, or their sizes differ.
    """
    height_width = _size(size)
    if unreadable not in ("stop", "skip"):
        raise OptionError(f"unreadable is 'stop' or 'skip', got {unreadable!r}")
    splits = [part for part in ("train", "valid", "test") if (folder / part).is_dir()]
    if {"train", "test"} <= set(splits):
        roots = {part: folder / part for part in splits}
    else:
        roots = {"x": folder}
    found = {part: _files(root) for part, root in roots.items()}
    images = {part: _read_all(files, height_width, unreadable) for part, files in found.items()}
    _require_one_size(folder, images, height_width)
    colours = any(mode != "L" for part in images.values() for _, mode, _ in part)
    kinds = _kinds(roots, images)
    arrays: Arrays = {}
    for part, read in images.items():
        arrays[part] = np.stack([_bytes(image, colours=colours) for _, _, image in read])
        if kinds:
            labels = [kinds[_kind(path, roots[part])] for path, _, _ in read]
            arrays["labels" if part == "x" else f"{part}_labels"] = np.array(labels)
    if all(((arrays[part] == 0) | (arrays[part] == 255)).all() for part in images):
        arrays |= {part: arrays[part] // 255 for part in images}
    return arrays


def _size(size: Sequence[int] | int | str | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair: tuple[Any, ...] = tuple(size.split("x")) if isinstance(size, str) else ()
    pair = pair or ((size,) if isinstance(size, int) else tuple(size))
    try:
        numbers = [int(number) for number in pair]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not 1 <= min(numbers) <= max(numbers) <= _MOST_PIXELS:
        raise OptionError(
            f"size is a number of pixels up to {_MOST_PIXELS}, or a height and a width as in "
            f"32x48, got {size!r}"
        )
    return numbers[0], numbers[-1]


def _files(root: Path) -> list[Path]:
    files = files_below(root, SUFFIXES)
    if not files:
        raise DataError(
            f"{root} holds no image file ({', '.join(SUFFIXES)}): give a folder of images, or an "
            ".npz file"
        )
    return files


_Read = tuple[Path, str, Any]


def _read_all(files: list[Path], size: tuple[int, int] | None, unreadable: str) -> list[_Read]:
    """Path, ``"L"`` or ``"RGB"``, and the decoded image of each file."""
    read, num_moving = [], 0
    for path in files:
        try:
            mode, image, moves = _decode(path, size)
            num_moving += moves
            read.append((path, mode, image))
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            problem = f"{path} cannot be read as an image ({reason})"
            if unreadable == "stop":
                raise DataError(f"{problem}: mend or remove it, or skip such files") from error
            warnings.warn(f"{problem} and is left out", UserWarning, stacklevel=3)
    if not read:
        raise DataError(f"none of {len(files)} files like {files[0]} can be read as an image")
    if num_moving:
        warnings.warn(
            f"{num_moving} of {len(files)} files hold several pictures, of which the first is "
            "taken; pvae.data.videos.read_video_folder takes them all",
            UserWarning,
            stacklevel=3,
        )
    return read


def _decode(path: Path, size: tuple[int, int] | None) -> tuple[str, Any, bool]:
    """``"L"`` or ``"RGB"``, the image in it, and whether the file has more of them."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            is_grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I;16")
            mode = "L" if is_grey else "RGB"
            plain, moves = _plain(image, mode), getattr(image, "n_frames", 1) > 1
    if size is not None and plain.size != size[::-1]:
        # Averages over the areas of the new pixels where it shrinks.
        plain = plain.resize(size[::-1], Image.Resampling.BOX)
    return mode, plain, moves


def _plain(image: Any, mode: str) -> Any:
    """Eight bits a channel, on white where it is transparent."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(f"its pixels are 32-bit numbers (mode {image.mode}): save it with 8 bits")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        whole = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
    return image.convert(mode)


def _require_one_size(
    folder: Path, images: dict[str, list[_Read]], size: tuple[int, int] | None
) -> None:
    first = next(iter(images.values()))[0]
    for path, _, image in (entry for part in images.values() for entry in part):
        if size is None and image.size != first[2].size:
            width, height = image.size
            raise DataError(
                f"{path} is {height} x {width} pixels but {first[0].relative_to(folder)} is "
                f"{first[2].size[1]} x {first[2].size[0]}: give a size to bring them all to"
            )


def _bytes(image: Any, *, colours: bool) -> NDArray[np.uint8]:
    array = np.asarray(image.convert("RGB") if colours else image, dtype=np.uint8)
    return np.moveaxis(array, -1, 0) if colours else array


def _kind(path: Path, root: Path) -> str:
    return path.relative_to(root).parent.as_posix()


def _kinds(roots: dict[str, Path], images: dict[str, list[_Read]]) -> dict[str, int]:
    """Sub-folder -> number; nothing where no file lies in one."""
    names = {_kind(path, roots[part]) for part, read in images.items() for path, _, _ in read}
    return {} if names == {"."} else {name: k for k, name in enumerate(sorted(names))}
