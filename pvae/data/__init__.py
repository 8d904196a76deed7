"""Data: named sets and a user's files, split, prepared, and with the Jacobian of what was done."""

from __future__ import annotations

from pvae.data.batches import Batch, as_batch, is_streamed, num_rows, share, take
from pvae.data.dataset import Dataset, Split
from pvae.data.loading import load
from pvae.data.sources import sources
from pvae.data.tensors import require_binary
from pvae.data.transforms import Transform

__all__ = [
    "Batch",
    "Dataset",
    "Split",
    "Transform",
    "as_batch",
    "is_streamed",
    "load",
    "num_rows",
    "require_binary",
    "share",
    "sources",
    "take",
]
