"""An estimate of the evidence spread over the processes of a group, each with data of its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pvae.data import as_batch, num_rows, share
from pvae.distributed import Group, join, local_device
from pvae.errors import OptionError
from pvae.evidence.importance import Evidence, importance
from pvae.evidence.sweep import tensors_of
from pvae.parts import cut, own
from pvae.seeds import mix

__all__ = ["in_parts"]

_COLUMNS = ("log_evidence", "stderr", "ess", "pareto_k", "elbo")


def in_parts(
    model: Any,
    guide: Any,
    x: Any,
    *args: Any,
    estimator: Callable[..., Evidence] = importance,
    parts: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Evidence:
    """The evidence of N data by any estimator, the data cut into parts that processes share.

    Part ``p`` is estimated with a seed made of ``(seed, p)``, so the same number of parts gives the
    same numbers on any number of processes, and other numbers than another number of parts.

    Args:
        model: The generative program.
        guide: The inference program.
        x: Data: an array, tensor, tuple or dict of them, N rows, the same on every rank.
        *args: Further arguments of the estimator, such as the number of particles.
        estimator: :func:`importance`, :func:`annealed`, :func:`smc`, :func:`auto`, … .
        parts: How many; the number of processes if left out.
        seed: Seed of all parts.
        **options: Options of the estimator.

    Returns:
        The evidence of all N data, on every rank.

    Raises:
        OptionError: There are fewer parts than processes.
        LostRankError: Another process was killed or cut off.
    """
    device = next((t.device for t in tensors_of(model, guide)), torch.device("cpu"))
    group = join(local_device(device))
    size = 1 if group is None else group.size
    parts = size if parts is None else parts
    if parts < size:
        raise OptionError(f"parts must be at least the number of processes ({size}), got {parts}")
    if group is None:
        return _joined(group, model, guide, x, args, estimator, parts, seed, options)
    with group.working():
        return _joined(group, model, guide, x, args, estimator, parts, seed, options)


def _joined(
    group: Group | None,
    model: Any,
    guide: Any,
    x: Any,
    args: tuple[Any, ...],
    estimator: Callable[..., Evidence],
    parts: int,
    seed: int,
    options: dict[str, Any],
) -> Evidence:
    batch = as_batch(x, model=model, streams=True)
    blocks = cut(torch.arange(num_rows(batch)), parts)
    found = {}
    for part, rows in own(group, blocks):
        data = share(batch, int(rows[0]), int(rows[-1]) + 1)
        found[part] = estimator(model, guide, data, *args, seed=mix(seed, -5, part), **options)
    columns: dict[str, Any] = {n: _column(group, blocks, found, n) for n in _COLUMNS}
    words = _words(group, len(blocks), found)
    methods = [word.pop("methods") for word in words]
    joined = None if methods[0] is None else tuple(itertools.chain.from_iterable(methods))
    return Evidence(**columns, **words[0], methods=joined)


def _column(group: Any, blocks: Any, found: dict[int, Evidence], name: str) -> Tensor:
    """``(N,)`` float64; zeros stand where another rank has numbers."""
    parts = [
        getattr(found[part], name).double() if part in found else torch.zeros(len(rows)).double()
        for part, rows in enumerate(blocks)
    ]
    whole = torch.cat(parts)
    return whole if group is None else group.sum([whole])[0]


def _words(group: Any, count: int, found: dict[int, Evidence]) -> list[dict[str, Any]]:
    """What is no number per datum, for each part."""
    names = ("kind", "method", "num_particles", "methods")
    mine = {part: {name: getattr(each, name) for name in names} for part, each in found.items()}
    texts = [json.dumps(mine)] if group is None else group.gather(json.dumps(mine))
    all_parts = {int(part): words for text in texts for part, words in json.loads(text).items()}
    return [all_parts[part] for part in range(count)]
