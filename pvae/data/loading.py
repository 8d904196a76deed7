"""From the name of a source or the path of a file to a prepared :class:`Dataset`."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pvae.data.audio import has_wavs, read_wav_folder
from pvae.data.dataset import Dataset, Dequantize, Preprocess, Split
from pvae.data.files import FORMATS, PARTS, Arrays, read_arrays
from pvae.data.images import read_image_folder
from pvae.data.sources import SOURCES
from pvae.data.streaming import MAX_LEVELS as _MAX_LEVELS
from pvae.data.streaming import levels_of, open_rows, streamed
from pvae.data.tensors import all_finite, locate, to_tensor
from pvae.data.text import read_lines, sentences
from pvae.data.transforms import Chain, Logit, Scale, Standardize, Transform
from pvae.errors import DataError, OptionError, did_you_mean

__all__ = ["load"]

_BINARIZE = ("dynamic", "fixed", "threshold")
_STEPS = ("dequantize", "logit", "standardize")  # in the only order that makes sense
_LARGE = 2**28  # bytes of a file that is read whole although it could be mapped
_BLOCK = 256  # rows transformed at once, in float64, within a processor's cache


def load(
    name_or_path: str | Path,
    *,
    binarize: str | None = None,
    transform: str | None = None,
    valid_fraction: float | None = None,
    test_fraction: float | None = None,
    size: Sequence[int] | int | str | None = None,
    unreadable: str = "stop",
    streams: bool = False,
    like: Dataset | None = None,
    seed: int = 0,
    root: str | Path | None = None,
) -> Dataset:
    """Load a named data set (:func:`sources`), a user's array or text file, or a folder of images.

    An array file (``.npz``, ``.npy`` or ``.csv``) holds ``x`` of shape ``(N, ...)``, or an ``.npz``
    its own ``train``, ``test`` and perhaps ``valid``; labels are ``labels`` or ``y``, and
    ``train_labels`` or ``train_y`` and so on. What is random here depends on ``seed`` alone, and
    torch's global stream is left as it was.

    A ``.txt`` file holds one sentence a line, its words apart by spaces. Sentences are numbers of
    words (:mod:`pvae.data.text`), padded, as they are in the named sets of text; neither these nor
    the sets of padded sequences are transformed.

    A folder of ``.wav`` files is read as :func:`pvae.data.audio.read_wav_folder` says.

    Args:
        name_or_path: Name, or path of a file or folder.
        binarize: ``"dynamic"`` draws ``Bernoulli(grey)`` anew for every training batch, once for
            valid and test (Burda, Grosse & Salakhutdinov 2016); ``"fixed"`` draws it once for all;
            ``"threshold"`` is ``grey > 0.5``. Grey is the level over the largest one. On data that
            are 0 or 1 already it does nothing.
        transform: ``"none"``; or one or more, comma-separated, of ``"dequantize"`` (uniform noise
            added to integers, then over the number of levels: into the unit interval), ``"logit"``
            (of the unit interval, squeezed by 1e-6; dequantises integers first) and
            ``"standardize"`` (mean 0 and variance 1 over the training rows). ``None``: nothing for
            binary data, dequantize for whole numbers from 0 up (below 65536), else standardize.
        valid_fraction: Share of the rows for validation where the set has no such split; 0.1.
        test_fraction: Share of the rows for test where the set has no such split; 0.2.
        size: ``(height, width)``, ``"HxW"`` or one number, to which the images of a folder are
            resized; see :func:`pvae.data.images.read_image_folder`.
        unreadable: ``"stop"`` at a file of a folder that is no image, or ``"skip"`` it.
        streams: Leave the rows of an ``.npy`` file of more than 256 MiB in the file (see
            :mod:`pvae.data.streaming`); ``x`` of a split is then a
            :class:`pvae.data.mapped.MappedRows`, which training and evidence take.
        like: Text whose vocabulary and width another ``.txt`` file is to have, such as that which a
            model was trained on.
        seed: Seed of the split and of all fixed noise.
        root: Cache folder of downloaded sets; ``~/.cache/pvae``. ``$PVAE_DATA`` is searched first.

    Returns:
        The data set.

    Raises:
        OptionError: A name or an option that does not exist or does not fit.
        DataError: The data are missing, damaged, or unfit for the options.
    """
    steps = _check_options(binarize, transform, valid_fraction, test_fraction)
    if not str(name_or_path):
        raise OptionError("the name of the data is empty: give that of a data set or a path")
    path = Path(name_or_path).expanduser()
    if streams and _is_large(name_or_path, path):
        return _streamed(path, binarize, steps, valid_fraction, test_fraction, seed)
    if path.suffix == ".txt" and name_or_path not in SOURCES:
        name, arrays = path.name, _read_text(path, valid_fraction, test_fraction, seed, like)
        valid_fraction = test_fraction = None
    elif like is not None:
        raise OptionError(f"like is for a .txt file, not for {name_or_path}: leave it out")
    else:
        name, arrays = _read(name_or_path, root, size, unreadable)
    rows = _Rows.of(name, arrays).split(valid_fraction, test_fraction, seed)
    if "padding" in arrays:
        if steps or binarize is not None:
            raise OptionError(
                f"{name} holds padded sequences, which have no transform: leave out "
                f"{'transform' if steps else 'binarize'}"
            )
        return _sequences(rows, arrays)
    num_levels = _num_levels(rows.x)
    if num_levels == 2 and not steps:
        return _untouched(rows, num_levels, "binary")
    if binarize is not None:
        return _binarize(rows, num_levels, binarize, seed)
    if steps == ():
        kind = "continuous" if num_levels is None else "integer"
        return _untouched(rows, num_levels, kind)
    return _transform(rows, num_levels, _chosen(steps, num_levels), seed)


def _chosen(steps: tuple[str, ...] | None, num_levels: int | None) -> tuple[str, ...]:
    """The steps of the transform that the data decide on."""
    if steps is None:
        return ("standardize",) if num_levels is None else ("dequantize",)
    if "logit" in steps and num_levels is not None:
        return tuple(step for step in _STEPS if step in {"dequantize", *steps})
    return steps


def _is_large(name: str | Path, path: Path) -> bool:
    is_array = name not in SOURCES and path.suffix.lower() == ".npy" and path.is_file()
    return is_array and path.stat().st_size > _LARGE


def _streamed(
    path: Path,
    binarize: str | None,
    steps: tuple[str, ...] | None,
    valid_fraction: float | None,
    test_fraction: float | None,
    seed: int,
) -> Dataset:
    rows = open_rows(path)
    num_levels, *spread = levels_of(rows)
    if num_levels == 2 and not steps:
        binarize, steps = None, ()
    elif binarize is None:
        steps = _chosen(steps, num_levels) if steps != () else ()
    shares = {
        "valid": 0.1 if valid_fraction is None else valid_fraction,
        "test": 0.2 if test_fraction is None else test_fraction,
    }
    return streamed(
        rows, _partition(path.name, len(rows), shares, seed), name=path.name, binarize=binarize,
        num_levels=num_levels, spread=(spread[0], spread[1]), steps=steps or (), seed=seed,
    )  # fmt: skip


def _check_options(
    binarize: str | None, transform: str | None, *fractions: float | None
) -> tuple[str, ...] | None:
    """The steps of the transform: ``()`` for "none", ``None`` to be chosen by the data."""
    if binarize is not None and binarize not in _BINARIZE:
        raise OptionError(f"unknown binarize {binarize!r}: {did_you_mean(binarize, _BINARIZE)}")
    shares = [fraction for fraction in fractions if fraction is not None]
    if not all(0 < share < 1 for share in shares) or sum(shares) >= 1:
        raise OptionError(
            f"valid_fraction and test_fraction are {' and '.join(map(str, shares))}, expected "
            "positive shares that leave some rows for training"
        )
    if transform in (None, "none"):
        return None if transform is None else ()
    steps = tuple(step.strip() for step in transform.split(","))
    for step in steps:
        if step not in _STEPS:
            known = (*_STEPS, "none")
            raise OptionError(f"unknown transform {step!r}: {did_you_mean(step, known)}")
    if steps != tuple(step for step in _STEPS if step in steps):
        raise OptionError(
            f"transform {transform!r} is out of order, expected each step once and in the order "
            f"{','.join(_STEPS)}"
        )
    if binarize is not None:
        raise OptionError(
            f"binarize={binarize!r} and transform={transform!r} exclude each other: give one"
        )
    return steps


def _read(
    name_or_path: str | Path,
    root: str | Path | None,
    size: Sequence[int] | int | str | None,
    unreadable: str,
) -> tuple[str, Arrays]:
    source = SOURCES.get(str(name_or_path))
    path = Path(name_or_path).expanduser()
    folder = path.resolve()
    name = folder.name if path.name in ("", "..") else path.name
    if source is None and folder == folder.parent:
        raise DataError(f"{path} is a whole disk: give the folder of the images or sounds")
    if source is None and has_wavs(path):
        if size is not None or unreadable != "stop":
            raise OptionError(f"size and unreadable are for images, and {path} holds sounds")
        return name, _read_sounds(path)
    if source is None and path.is_dir() and path.suffix.lower() not in FORMATS:
        return name, read_image_folder(path, size, unreadable=unreadable)
    if size is not None:
        raise OptionError(f"size={size!r} is for a folder of images, not for {name_or_path}")
    if unreadable != "stop":
        raise OptionError(
            f"unreadable={unreadable!r} is for a folder of images, not for {name_or_path}"
        )
    if source is not None:
        return str(name_or_path), source(root)
    if isinstance(name_or_path, str) and not path.suffix and len(path.parts) < 2:
        raise OptionError(
            f"{name_or_path!r} is neither a named data set, a folder of images nor the path of a "
            f".npz, .npy, .csv or .txt file: {did_you_mean(name_or_path, SOURCES)}"
        )
    return path.name, read_arrays(path)


def _read_sounds(folder: Path) -> Arrays:
    """Clips of one length; what a table of them does not tell is said."""
    arrays = read_wav_folder(folder)
    samples = np.concatenate([n for key, n in arrays.items() if key.endswith("lengths")])
    width = next(clips.shape[1] for part, clips in arrays.items() if part in ("x", *PARTS))
    short = int((samples < width).sum())
    if short:
        warnings.warn(
            f"{short} of {len(samples)} clips are shorter than {width} samples and end in zeros "
            f"({1 - samples.mean() / width:.0%} of all numbers), which a model scores like sound: "
            "cut them to one length, or give the lengths from Python",
            UserWarning,
            stacklevel=2,
        )
    return arrays


def _read_text(
    path: Path,
    valid_fraction: float | None,
    test_fraction: float | None,
    seed: int,
    like: Dataset | None,
) -> Arrays:
    """A user's sentences, split before their words are counted."""
    lines = read_lines(path)
    shares = {
        "valid": 0.1 if valid_fraction is None else valid_fraction,
        "test": 0.2 if test_fraction is None else test_fraction,
    }
    index = _partition(path.name, len(lines), shares, seed)
    parts = {part: [lines[row] for row in rows.tolist()] for part, rows in index.items()}
    if like is None:
        return sentences(path.name, parts)
    if like.vocabulary is None:
        raise OptionError(f"like={like.name} is no text, and {path.name} is: leave it out")
    return sentences(path.name, parts, vocabulary=like.vocabulary, length=like.x_dim)


@dataclass(frozen=True)
class _Rows:
    """Checked rows ``(N, D)`` on the original scale, by split (or all of them as ``"x"``)."""

    name: str
    x: Mapping[str, Tensor]
    image_shape: tuple[int, ...] | None
    labels: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, arrays: Arrays) -> _Rows:
        """Check the arrays of a source."""
        keys = ["x"] if "x" in arrays else [part for part in PARTS if part in arrays]
        x = {key: to_tensor(arrays[key], f"{name}: {key}") for key in keys}
        for key in keys:
            if x[key].ndim < 2:
                raise DataError(
                    f"{name}: {key} has shape {tuple(x[key].shape)}, expected (N, features): "
                    "reshape it to (N, 1) if each number is a datum"
                )
            if x[key].shape[1:] != x[keys[0]].shape[1:]:
                raise DataError(
                    f"{name}: {key} has rows of shape {tuple(x[key].shape[1:])} but {keys[0]} has "
                    f"{tuple(x[keys[0]].shape[1:])}, expected the same: mend the file"
                )
        shape = tuple(x[keys[0]].shape[1:])
        image_shape = shape if len(shape) > 1 else None
        labels = {
            key: _labels(name, arrays[label], len(x[key]))
            for key in keys
            if (label := "labels" if key == "x" else f"{key}_labels") in arrays
        }
        return cls(name, {key: rows.flatten(1) for key, rows in x.items()}, image_shape, labels)

    def split(self, valid_fraction: float | None, test_fraction: float | None, seed: int) -> _Rows:
        """The same rows as train, valid and test."""
        fractions = {"valid": valid_fraction, "test": test_fraction}
        for part, fraction in fractions.items():
            if part in self.x and fraction is not None:
                raise OptionError(
                    f"{self.name} has its own {part} split: leave out {part}_fraction={fraction}"
                )
        if "valid" in self.x:
            return self
        whole = "x" if "x" in self.x else "train"
        shares = {"valid": 0.1 if valid_fraction is None else valid_fraction}
        if whole == "x":
            shares["test"] = 0.2 if test_fraction is None else test_fraction
        index = _partition(self.name, len(self.x[whole]), shares, seed)
        x, labels = dict(self.x), dict(self.labels)
        rows, tags = x.pop(whole), labels.pop(whole, None)
        for part, chosen in index.items():
            x[part] = rows[chosen]
            if tags is not None:
                labels[part] = tags[chosen]
        return replace(self, x=x, labels=labels)

    def entry(self, part: str, bad: Tensor) -> str:
        """``"mine.npy: train row 3, feature 1 is 7.5"``: the first entry marked in ``bad``."""
        return f"{self.name}: {part} {locate(bad)} is {self.x[part][bad][0].item():g}"


def _labels(name: str, array: object, num_rows: int) -> Tensor:
    labels = to_tensor(array, f"{name}: labels")
    if labels.is_floating_point() or labels.shape != (num_rows,):
        raise DataError(
            f"{name}: labels are {labels.dtype} of shape {tuple(labels.shape)}, expected integers "
            f"of shape ({num_rows},): number the classes"
        )
    return labels.long()


def _partition(name: str, total: int, shares: Mapping[str, float], seed: int) -> dict[str, Tensor]:
    """Disjoint row indices of train and of each share; shares are rounded up."""
    # 0.1 * 30 is a little more than 3 in floating point.
    sizes = {part: math.ceil(share * total - 1e-9) for part, share in shares.items()}
    sizes = {"train": total - sum(sizes.values()), **sizes}
    if sizes["train"] < 1:
        raise DataError(
            f"{name} has {total} rows, expected at least {len(sizes)} and some left for training: "
            "give more rows or smaller fractions"
        )
    order = torch.randperm(total, generator=_generator(seed, "split"))
    return dict(zip(sizes, torch.split(order, list(sizes.values())), strict=True))


def _generator(seed: int, purpose: str) -> torch.Generator:
    """A stream of its own for each purpose, the same on every machine."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def _num_levels(parts: Mapping[str, Tensor]) -> int | None:
    """Levels of whole numbers from 0 up: 256 for bytes, else the largest + 1, at least 2."""
    for rows in parts.values():
        broken = rows.is_floating_point() and bool((rows != rows.floor()).any())
        if broken or bool((rows < 0).any()):
            return None
    largest = max(int(rows.max()) for rows in parts.values())
    if largest > 1 and all(rows.dtype == torch.uint8 for rows in parts.values()):
        return 256
    return max(largest, 1) + 1 if largest < _MAX_LEVELS else None


def _untouched(rows: _Rows, num_levels: int | None, kind: str) -> Dataset:
    drawn = {part: (x, _zeros(x)) for part, x in rows.x.items()}
    return _assemble(rows, drawn, kind=kind, num_levels=num_levels, treatment="none")


def _sequences(rows: _Rows, arrays: Arrays) -> Dataset:
    """Padded sequences: words where there is a vocabulary, binary steps where there is none."""
    words = tuple(map(str, arrays["vocabulary"])) if "vocabulary" in arrays else None
    num_levels = 2 if words is None else len(words)
    plain = _untouched(rows, num_levels, "binary" if words is None else "integer")
    padding = int(arrays["padding"])
    treatment = "steps" if words is None else "words"
    return replace(plain, padding=padding, vocabulary=words, treatment=treatment)


def _binarize(rows: _Rows, num_levels: int | None, how: str, seed: int) -> Dataset:
    if num_levels is None:
        _require_unit_interval(rows, f"binarize={how!r}")
    grey = {part: x.float() / ((num_levels or 2) - 1) for part, x in rows.x.items()}
    drawn = {}
    for part, x in grey.items():
        bits = x > 0.5 if how == "threshold" else x.bernoulli(generator=_generator(seed, part))
        drawn[part] = (bits, _zeros(x))
    return _assemble(
        rows,
        drawn,
        kind="binary",
        num_levels=num_levels,
        treatment=f"binarize {how}",
        preprocess=torch.bernoulli if how == "dynamic" else None,
        train_raw=grey["train"] if how == "dynamic" else None,
    )


def _transform(rows: _Rows, num_levels: int | None, steps: Sequence[str], seed: int) -> Dataset:
    noisy = "dequantize" in steps

    def draw(part: str, chain: Chain) -> tuple[Tensor, Tensor]:
        return _draw(rows.x[part], chain, _generator(seed, part) if noisy else None)

    chain = Chain()
    if noisy:
        chain += Scale(_require_levels(rows, num_levels))
    elif "logit" in steps:
        _require_unit_interval(rows, "transform='logit'")
    if "logit" in steps:
        chain += Logit()
    if "standardize" in steps:
        chain += Standardize.fit(draw("train", chain)[0])
    return _assemble(
        rows,
        {part: draw(part, chain) for part in PARTS},
        kind="continuous",
        num_levels=num_levels,
        treatment=",".join(steps),
        transform=chain,
        preprocess=Dequantize(chain) if noisy else None,
        train_raw=rows.x["train"].float() if noisy else None,
    )


def _require_levels(rows: _Rows, num_levels: int | None) -> int:
    if num_levels is not None:
        return num_levels
    bad = {part: (x < 0) | (x >= _MAX_LEVELS) | (x % 1 != 0) for part, x in rows.x.items()}
    part = next(part for part, entries in bad.items() if bool(entries.any()))
    raise DataError(
        f"{rows.entry(part, bad[part])}, expected whole numbers from 0 to {_MAX_LEVELS - 1} to "
        "dequantize: take transform='standardize'"
    )


def _require_unit_interval(rows: _Rows, option: str) -> None:
    for part, x in rows.x.items():
        bad = (x < 0) | (x > 1)
        if bool(bad.any()):
            raise DataError(
                f"{rows.entry(part, bad)}, expected grey between 0 and 1, or whole numbers from 0 "
                f"to {_MAX_LEVELS - 1}, for {option}: rescale the data"
            )


def _zeros(x: Tensor) -> Tensor:
    """``log |det dT/dx|`` where nothing was done."""
    return torch.zeros(len(x), dtype=torch.float64)


def _draw(
    values: Tensor, transform: Transform, noise: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """``T(values + u)`` and ``log |det dT/dx|`` there, both float64; ``u = 0`` without."""
    x, log_det = [], []
    for rows in torch.split(values, _BLOCK):
        block = rows.double()
        if noise is not None:
            block = block + torch.rand(block.shape, generator=noise, dtype=torch.float64)
        x.append(transform(block))
        log_det.append(transform.log_abs_det_jacobian(block))
    return torch.cat(x), torch.cat(log_det)


def _assemble(
    rows: _Rows,
    drawn: Mapping[str, tuple[Tensor, Tensor]],
    *,
    kind: str,
    num_levels: int | None,
    treatment: str,
    transform: Transform | None = None,
    preprocess: Preprocess | None = None,
    train_raw: Tensor | None = None,
) -> Dataset:
    splits = {}
    for part, (exact, log_det) in drawn.items():
        x = exact.float()
        if not all_finite(x):
            bad = ~x.isfinite()
            raise DataError(
                f"{rows.name}: {part} {locate(bad)} becomes {exact[bad][0].item():g}, too large "
                "for float32: rescale or drop this feature"
            )
        splits[part] = Split(x, log_det, rows.labels.get(part))
    return Dataset(
        rows.name,
        splits["train"],
        splits["valid"],
        splits["test"],
        kind=kind,
        image_shape=rows.image_shape,
        train_raw=splits["train"].x if train_raw is None else train_raw,
        preprocess=preprocess,
        transform=transform or Chain(),
        num_levels=num_levels,
        treatment=treatment,
    )
