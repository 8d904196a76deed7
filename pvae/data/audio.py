"""Sounds: the Free Spoken Digit Dataset, and folders of a user's own ``.wav`` files.

Clips have one length: longer ones are cut, shorter ones end in zeros, and ``*_lengths`` says where.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvae.data.downloads import find
from pvae.data.files import PARTS, Arrays, files_below, reading
from pvae.errors import DataError, OptionError

__all__ = ["fsdd", "has_wavs", "read_wav", "read_wav_folder", "spoken_digits", "write_wav"]

FSDD_RATE = 8000
FSDD_SAMPLES = 6144  # 0.77 s; 73 of the 3000 clips are longer
_FILE = "fsdd/fsdd.npz"
_SHA256 = "b1ab0c92a87a55a3d69ba066254aec6433d9b1ede33effb36858e785ec918fdb"
_SHORTEST = 256  # samples; below it there is hardly a frame
_LONGEST = 2**16  # samples of a clip, where no length is asked for

Clips = list[NDArray[np.float32]]


def fsdd(root: str | Path | None) -> Arrays:
    """3000 spoken digits at 8 kHz, 6144 samples each, 6 speakers; 2400 train, 300 valid and test.

    Jackson et al. (2018), Free spoken digit dataset. Its own test set, recordings 0 to 4 of every
    digit and speaker; 5 to 9 are valid.
    """
    arrays = spoken_digits(root)
    return {name: array for name, array in arrays.items() if not name.endswith("_lengths")}


def spoken_digits(root: str | Path | None = None) -> Arrays:
    """The clips of fsdd ``(N, 6144)`` between -1 and 1, ``*_labels`` and ``*_lengths`` in samples.

    Raises:
        DataError: The file is not here, or is another one.
    """
    path = find(_FILE, root)
    if path is None:
        raise DataError(
            f"fsdd needs {_FILE}, which no public address offers in this form: set PVAE_DATA to a "
            "folder that holds it"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise DataError(
            f"{path} has SHA-256 {digest}, expected {_SHA256}: put the right file there"
        )
    with reading(path, "npz"), np.load(path, allow_pickle=False) as file:
        clips = np.split(file["audio"].astype(np.float32) / 2**15, file["offsets"][1:-1])
        digits, index = file["digit"].astype(np.int64), file["index"]
    chosen = {"train": index >= 10, "valid": (index >= 5) & (index < 10), "test": index < 5}
    arrays: Arrays = {}
    for part, rows in chosen.items():
        kept = [clips[row] for row in rows.nonzero()[0]]
        arrays[part], arrays[f"{part}_lengths"] = _one_length(kept, FSDD_SAMPLES)
        arrays[f"{part}_labels"] = digits[rows]
    return arrays


def has_wavs(folder: Path) -> bool:
    """Whether it is a folder with ``.wav`` files in it or below."""
    return folder.is_dir() and bool(_wavs(folder))


def read_wav_folder(
    folder: str | Path, *, samples: int | None = None, rate: int | None = None
) -> Arrays:
    """The ``.wav`` files of a folder and its sub-folders, in the order of their names.

    A file that cannot be read, is too short or has another sample rate than most is left out with a
    warning; of several channels the mean is taken. Files in ``train`` and ``test`` (and ``valid``)
    keep that split; other sub-folders are labels, numbered in the order of their names.

    Args:
        folder: The folder.
        samples: Length of the clips; that of the longest file, at most 65536.
        rate: Samples a second; that of most files.

    Returns:
        ``x`` (or ``train``, ``valid``, ``test``) ``(N, samples)``, lengths, labels, ``rate``.

    Raises:
        DataError: No file is left.
        OptionError: A length or rate that cannot be, or soundfile is not installed.
    """
    folder = Path(folder).expanduser()
    if (samples is not None and samples < _SHORTEST) or (rate is not None and rate < 1):
        raise OptionError(
            f"samples is a number from {_SHORTEST} up and rate from 1 up, got {samples} and {rate}"
        )
    splits = [part for part in PARTS if (folder / part).is_dir()]
    roots = {part: folder / part for part in splits} if len(splits) > 1 else {"x": folder}
    read = {part: [*_readable(_wavs(root))] for part, root in roots.items()}
    rates = [each for files in read.values() for _, _, each in files]
    if not rates:
        raise DataError(f"{folder} holds no .wav file that can be used: give a folder of sounds")
    common = rate or max(sorted(set(rates)), key=rates.count)
    arrays: Arrays = {"rate": np.array(common)}
    kept = {part: _of_rate(files, common) for part, files in read.items()}
    longest = max((len(clip) for files in kept.values() for _, clip in files), default=0)
    cut = sum(len(clip) > (samples or _LONGEST) for files in kept.values() for _, clip in files)
    if cut:
        warnings.warn(
            f"{cut} clips are cut to {samples or _LONGEST} samples", UserWarning, stacklevel=2
        )
    names = {part: [_label(path, roots[part]) for path, _ in kept[part]] for part in kept}
    labels = sorted({name for each in names.values() for name in each})
    for part, files in kept.items():
        if not files:
            raise DataError(
                f"{roots[part]} holds no .wav file of {common} samples a second: convert them"
            )
        clips, lengths = _one_length([clip for _, clip in files], samples or min(longest, _LONGEST))
        prefix = "" if part == "x" else f"{part}_"
        arrays |= {part: clips, f"{prefix}lengths": lengths}
        if labels != ["."]:
            arrays[f"{prefix}labels"] = np.array([labels.index(name) for name in names[part]])
    return arrays


def read_wav(path: str | Path) -> tuple[NDArray[np.float32], int]:
    """Samples ``(n,)`` between -1 and 1, the mean over channels, and samples a second.

    Raises:
        DataError: The file is missing, damaged, silent of samples, or holds a NaN.
        OptionError: soundfile is not installed.
    """
    path = Path(path)
    soundfile = _soundfile()
    if not path.is_file():
        raise DataError(f"{path} is not a file: check the path")
    with reading(path, "wav"):
        _require_whole(path)
        clip, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono: NDArray[np.float32] = clip.mean(1)
    if len(mono) < _SHORTEST:
        raise DataError(f"{path} has {len(mono)} samples, expected at least {_SHORTEST}: record it")
    if not np.isfinite(mono).all():
        raise DataError(f"{path} holds a NaN or an infinity: save it anew")
    return mono, int(rate)


def _require_whole(path: Path) -> None:
    """Of a file that was cut off, soundfile reads what there is without a word."""
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return  # what it is instead, soundfile says
        size = path.stat().st_size
        while len(chunk := file.read(8)) == 8:
            length = int.from_bytes(chunk[4:], "little")
            streamed = length >= 2**32 - 2**12  # written before its length was known
            if chunk[:4] == b"data" and not streamed and file.tell() + length > size:
                raise DataError(
                    f"{path} is cut off: {length} bytes of samples are promised and "
                    f"{size - file.tell()} are there: save it anew"
                )
            file.seek(length + length % 2, 1)


def write_wav(path: str | Path, clip: Any, rate: int) -> Path:
    """Write samples ``(n,)`` between -1 and 1, cut off beyond, as 16 bits a sample.

    Raises:
        OptionError: soundfile is not installed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.clip(np.asarray(clip, dtype=np.float32), -1, 1)
    _soundfile().write(path, samples, rate, subtype="PCM_16")
    return path


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise OptionError(
            ".wav files need the package soundfile, which is not installed: "
            "pip install 'pvae-toolkit[audio]'"
        ) from error
    return soundfile


def _wavs(folder: Path) -> Sequence[Path]:
    return files_below(folder, (".wav",))


def _readable(paths: Sequence[Path]) -> Any:
    for path in paths:
        try:
            clip, rate = read_wav(path)
        except DataError as error:
            warnings.warn(f"a file is left out: {error}", UserWarning, stacklevel=3)
            continue
        yield path, clip, rate


def _of_rate(
    files: Sequence[tuple[Path, NDArray[np.float32], int]], common: int
) -> list[tuple[Path, NDArray[np.float32]]]:
    for path, _, rate in files:
        if rate != common:
            warnings.warn(
                f"a file is left out: {path} has {rate} samples a second, expected {common}: "
                "convert it",
                UserWarning,
                stacklevel=3,
            )
    return [(path, clip) for path, clip, rate in files if rate == common]


def _label(path: Path, root: Path) -> str:
    return path.relative_to(root).parent.as_posix()


def _one_length(clips: Clips, samples: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    lengths = np.array([min(len(clip), samples) for clip in clips], np.int64)
    table = np.zeros((len(clips), samples), np.float32)
    for row, clip, length in zip(table, clips, lengths, strict=True):
        row[:length] = clip[:length]
    return table, lengths
