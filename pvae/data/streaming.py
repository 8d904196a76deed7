"""A data set whose rows stay in their file: split, prepared and measured without being held.

All of it is what :func:`pvae.data.load` does, row by row. Fixed noise is that of a row's own
stream, so the numbers of a dequantised or binarised split differ from those of the file in memory;
others are the same.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvae.data.dataset import Dataset, Dequantize, Split
from pvae.data.files import map_array
from pvae.data.mapped import MappedRows
from pvae.data.tensors import all_finite
from pvae.data.transforms import Chain, Logit, Scale, Standardize
from pvae.errors import DataError

__all__ = ["MAX_LEVELS", "levels_of", "open_rows", "streamed"]

MAX_LEVELS = 2**16  # float32 still resolves the noise between two levels


def open_rows(path: Path) -> MappedRows:
    """The rows of an ``.npy`` file, flattened, every one of them seen to be finite.

    Raises:
        DataError: The file is no array of rows of real numbers.
    """
    array = map_array(path)
    if array.ndim < 2:
        raise DataError(
            f"{path.name}: x has shape {array.shape}, expected (N, features): reshape it to (N, 1) "
            "if each number is a datum"
        )
    return MappedRows(array, f"{path.name}: x", prepare=_flat)


def _flat(x: Tensor, rows: Tensor) -> Tensor:
    return x.flatten(1)


def levels_of(rows: MappedRows) -> tuple[int | None, float, float]:
    """Levels of whole numbers from 0 up, as :func:`pvae.data.load` counts them; the range.

    Raises:
        DataError: A row holds a NaN or an infinity.
    """
    whole, low, high = True, torch.inf, -torch.inf
    for block in rows.blocks():
        low, high = min(low, float(block.min())), max(high, float(block.max()))
        whole = whole and not (block.is_floating_point() and bool((block != block.floor()).any()))
    if not whole or low < 0:
        return None, low, high
    if high > 1 and rows.dtype == torch.uint8:
        return 256, low, high
    return (max(int(high), 1) + 1 if high < MAX_LEVELS else None), low, high


def streamed(
    rows: MappedRows,
    index: Mapping[str, Tensor],
    *,
    name: str,
    num_levels: int | None,
    spread: tuple[float, float],
    binarize: str | None,
    steps: Sequence[str],
    seed: int,
) -> Dataset:
    """The data set of mapped rows.

    Args:
        rows: All rows, from :func:`open_rows`.
        index: Split -> its rows.
        name: Of the file.
        num_levels: Levels of whole numbers.
        spread: The smallest and the largest number.
        binarize: As in :func:`pvae.data.load`; ``None`` for data that are bits already.
        steps: Of the transform, in order; none where nothing is to be done.
        seed: Of all fixed noise.

    Raises:
        DataError: The data are unfit for the options.
    """
    parts = {part: rows.like(order=chosen) for part, chosen in index.items()}
    shape = tuple(rows.array.shape[1:])
    about: dict[str, Any] = {
        "name": name, "image_shape": shape if len(shape) > 1 else None, "num_levels": num_levels,
    }  # fmt: skip
    if binarize is not None:
        return _binarized(parts, about, binarize, num_levels, spread, seed)
    if not steps:
        kind = "continuous" if num_levels is None else "binary" if num_levels == 2 else "integer"
        return _dataset(
            {part: each.then(_float) for part, each in parts.items()}, Chain(), about, kind
        )
    chain, noisy = Chain(), "dequantize" in steps
    draw = functools.partial(_drawn, parts, seed=seed if noisy else None)
    if noisy:
        chain += Scale(_levels(name, num_levels, spread))
    elif "logit" in steps:
        _require_unit_interval(name, spread, "transform='logit'")
    if "logit" in steps:
        chain += Logit()
    if "standardize" in steps:
        chain += _standardize(draw("train", chain))
    finished = {part: draw(part, chain).then(_to_float) for part in parts}
    raw = parts["train"].then(_float) if noisy else None
    about |= {"preprocess": Dequantize(chain) if noisy else None, "treatment": ",".join(steps)}
    log_det = {part: _log_det(draw(part, Chain()), chain) for part in parts}
    return _dataset(finished, chain, about, "continuous", raw, log_det)


def _binarized(
    parts: Mapping[str, MappedRows], about: dict[str, Any], how: str, num_levels: int | None,
    spread: tuple[float, float], seed: int,
) -> Dataset:  # fmt: skip
    if num_levels is None:
        _require_unit_interval(about["name"], spread, f"binarize={how!r}")
    top = (num_levels or 2) - 1
    grey = {part: rows.then(lambda x: x.float() / top) for part, rows in parts.items()}
    if how == "threshold":
        bits = {part: rows.then(lambda x: (x > 0.5).float()) for part, rows in grey.items()}
    else:
        bits = {part: _noisy(rows, part, seed, _less) for part, rows in grey.items()}
    dynamic = how == "dynamic"
    about |= {"preprocess": torch.bernoulli if dynamic else None, "treatment": f"binarize {how}"}
    return _dataset(bits, Chain(), about, "binary", grey["train"] if dynamic else None)


def _float(x: Tensor) -> Tensor:
    return x.float()


def _less(grey: Tensor, noise: Tensor) -> Tensor:
    return (noise < grey).float()


def _add(x: Tensor, noise: Tensor) -> Tensor:
    return x.double() + noise


def _drawn(
    parts: Mapping[str, MappedRows], part: str, chain: Chain, *, seed: int | None
) -> MappedRows:
    """``T(x + u)`` in float64, one fixed u for each row; ``u = 0`` without a seed."""
    rows = parts[part]
    noisy = rows.then(torch.Tensor.double) if seed is None else _noisy(rows, part, seed, _add)
    return noisy.then(chain)


def _noisy(rows: MappedRows, part: str, seed: int, use: Any) -> MappedRows:
    """Rows with uniform noise, each from the stream of its own number."""
    before = rows.prepare
    digest = hashlib.sha256(f"{seed} {part}".encode()).digest()
    first = int.from_bytes(digest[:6], "big")

    def prepare(x: Tensor, numbers: Tensor) -> Tensor:
        assert before is not None
        x = before(x, numbers)
        kind = x.dtype if x.is_floating_point() and use is _less else torch.float64
        noise = torch.empty(x.shape, dtype=kind)
        generator = torch.Generator()
        for row, number in zip(noise, numbers.tolist(), strict=True):
            row.uniform_(generator=generator.manual_seed(first + number))
        made: Tensor = use(x, noise)
        return made

    return rows.like(prepare=prepare)


def _to_float(x: Tensor) -> Tensor:
    """To float32, where a value that is too large is refused."""
    made = x.float()
    if not all_finite(made):
        raise DataError(
            f"a value becomes {float(x[~made.isfinite()][0]):g}, too large for float32: rescale or "
            "drop its feature"
        )
    return made


def _standardize(rows: MappedRows) -> Standardize:
    found = rows.moments
    return Standardize.of_moments(found.mean, found.std, found.low, found.high)


def _log_det(rows: MappedRows, chain: Chain) -> Tensor:
    """``log |det dT/dx|`` ``(N,)``; one number for all rows unless the logit is in the chain."""
    if any(isinstance(each, Logit) for each in chain.parts):
        return torch.cat([chain.log_abs_det_jacobian(block) for block in rows.blocks()])
    return chain.log_abs_det_jacobian(rows[:1]).expand(len(rows)).clone()


def _levels(name: str, num_levels: int | None, spread: tuple[float, float]) -> int:
    if num_levels is None:
        raise DataError(
            f"{name} holds numbers from {spread[0]:g} to {spread[1]:g}, expected whole numbers "
            f"from 0 to {MAX_LEVELS - 1} to dequantize: take transform='standardize'"
        )
    return num_levels


def _require_unit_interval(name: str, spread: tuple[float, float], option: str) -> None:
    if spread[0] < 0 or spread[1] > 1:
        raise DataError(
            f"{name} holds numbers from {spread[0]:g} to {spread[1]:g}, expected grey between 0 "
            f"and 1, or whole numbers from 0 to {MAX_LEVELS - 1}, for {option}: rescale the data"
        )


def _dataset(
    x: Mapping[str, MappedRows],
    chain: Chain,
    about: Mapping[str, Any],
    kind: str,
    train_raw: MappedRows | None = None,
    log_det: Mapping[str, Tensor] | None = None,
) -> Dataset:
    zeros = {part: torch.zeros(len(rows), dtype=torch.float64) for part, rows in x.items()}
    splits: dict[str, Any] = {
        part: Split(rows, (log_det or zeros)[part])  # type: ignore[arg-type]
        for part, rows in x.items()
    }
    raw: Any = splits["train"].x if train_raw is None else train_raw
    options = {"preprocess": None, "treatment": "none"} | dict(about)
    return Dataset(**splits, kind=kind, train_raw=raw, transform=chain, **options)
