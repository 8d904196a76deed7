"""Readers of array files. Whatever is wrong with a file, its reader raises a ``DataError``.

Each returns named arrays: ``x``, or ``train``, ``test`` and perhaps ``valid``; perhaps labels.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import math
import os
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvae.errors import DataError

__all__ = [
    "FORMATS",
    "PARTS",
    "Arrays",
    "files_below",
    "map_array",
    "read_amat",
    "read_arrays",
    "read_idx",
    "reading",
]

Arrays = dict[str, NDArray[Any]]

FORMATS = (".csv", ".npy", ".npz")
PARTS = ("train", "valid", "test")
_MOST_OTHERS = 100_000  # files of a folder that are not looked for
_LABELS = {"labels": "labels", "y": "labels"} | {
    f"{part}_{suffix}": f"{part}_labels" for part in PARTS for suffix in ("labels", "y")
}


def files_below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files in a folder and below that end in one of ``suffixes``, in the order of names.

    Names that begin with a dot are left out. A folder whose first 100,000 files are all others (a
    whole disk, say) is not searched to its end.
    """
    found: list[Path] = []
    others = 0
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        wanted = [name for name in names if Path(name).suffix.lower() in suffixes]
        paths = (Path(place, name) for name in wanted if not name.startswith("."))
        found += (path for path in paths if path.is_file())
        others += len(names)
        if not found and others > _MOST_OTHERS:
            break
    return sorted(found)


def read_arrays(path: Path) -> Arrays:
    """The arrays of a user's ``.npz``, ``.npy`` or ``.csv`` file.

    Raises:
        DataError: The file is missing, of another kind, damaged, or not numbers.
    """
    readers = {".npz": _read_npz, ".npy": _read_npy, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if not (path.suffix or path.exists()):
        raise DataError(f"{path} does not exist: check the path")
    if reader is None:
        suffix = repr(path.suffix) if path.suffix else "no suffix"
        raise DataError(
            f"{path} ends in {suffix}, expected .npz, .npy, .csv or .txt: save it as one of these"
        )
    if not path.is_file():
        raise DataError(f"{path} is not a file: check the path")
    with reading(path, reader.__name__.removeprefix("_read_")):
        return reader(path)


@contextlib.contextmanager
def reading(path: Path, form: str) -> Iterator[None]:
    """Turn what numpy, zipfile, zlib and csv make of a damaged file into a one-line DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"{path} cannot be read as {form} ({reason}): save it anew") from error


def _read_npy(path: Path) -> Arrays:
    with path.open("rb") as file:
        return {"x": np.lib.format.read_array(file, allow_pickle=False)}


def map_array(path: Path) -> np.memmap[Any, Any]:
    """The array of an ``.npy`` file, which stays in the file.

    Raises:
        DataError: The file is damaged, or holds something else.
    """
    with reading(path, "npy"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap):
            raise DataError(f"{path} holds no array of numbers: save it anew")
        return array


def _read_npz(path: Path) -> Arrays:
    with path.open("rb") as stream:
        file = np.load(stream, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"{path} holds a single array, expected an npz: name it .npy")
        wanted = ("x",) if "x" in file.files else PARTS
        if "x" not in file.files and not {"train", "test"} <= set(file.files):
            raise DataError(
                f"{path} holds {', '.join(file.files) or 'nothing'}, expected the key x, "
                "or train and test (and valid): rename its arrays"
            )
        names = {key: key for key in wanted} | _LABELS
        return {name: file[key] for key, name in names.items() if key in file.files}


def _read_csv(path: Path) -> Arrays:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        lines = ((reader.line_num, cells) for cells in reader if cells)
        number, first = next(lines, (0, []))
        is_header = bool(first) and all(_number(cell) is None for cell in first)
        names = first if is_header else [""] * len(first)
        rows: list[NDArray[np.float64]] = []
        if first and not is_header:
            rows.append(_csv_row(path, 0, number, first, names))
        for number, cells in lines:
            rows.append(_csv_row(path, len(rows), number, cells, names))
    return {"x": np.array(rows).reshape(len(rows), len(names))}


def _csv_row(
    path: Path, row: int, line: int, cells: list[str], names: list[str]
) -> NDArray[np.float64]:
    where = f"{path}: row {row} (line {line})"
    if len(cells) != len(names):
        raise DataError(f"{where} has {len(cells)} cells, expected {len(names)}: mend the line")
    numbers = [_number(cell) for cell in cells]
    if None in numbers:
        column = numbers.index(None)
        name = f" {names[column]!r}" if names[column] else ""
        parts = cells[column].replace(";", " ").split()
        if len(parts) > 1 and all(_number(part.replace(",", ".")) is not None for part in parts):
            raise DataError(
                f"{where}, column {column}{name} is {cells[column]!r}, several numbers: put commas "
                "between cells, and a point before decimals"
            )
        raise DataError(
            f"{where}, column {column}{name} is {cells[column]!r}, expected a number: "
            "encode or drop this column"
        )
    return np.array(numbers, dtype=np.float64)


def _number(cell: str) -> float | None:
    # float() takes "2024_01" for 202401.
    if "_" in cell:
        return None
    try:
        return float(cell)
    except ValueError:
        return None


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of bytes in the idx format of MNIST, gzipped or not.

    Raises:
        DataError: The file is damaged.
    """
    with reading(path, "idx"):
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        zeros, kind, ndim = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{ndim}I", data, 4)
        body = np.frombuffer(data, np.uint8, offset=4 + 4 * ndim)
    if (zeros, kind) != (0, 8):
        raise DataError(f"{path} does not begin like an idx file of bytes: fetch it anew")
    if body.size != math.prod(shape):
        raise DataError(
            f"{path} holds {body.size} bytes, expected {math.prod(shape)} for shape {shape}: "
            "fetch it anew"
        )
    return body.reshape(shape)


def read_amat(path: Path, width: int) -> NDArray[np.uint8]:
    """A text file of ``0`` and ``1``, one row of ``width`` a line, commas or not: ``(N, width)``.

    Raises:
        DataError: The file is something else.
    """
    with reading(path, "amat"):
        text = np.frombuffer(path.read_bytes(), np.uint8)
    bits = text[(text > ord(" ")) & (text != ord(","))] - ord("0")
    if bits.size % width or (bits > 1).any():
        raise DataError(f"{path} is not lines of {width} zeros and ones: fetch it anew")
    rows: NDArray[np.uint8] = bits.reshape(-1, width)
    return rows
