"""What every test starts from: a clean parameter store, validation on, float32, one seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import pyro  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """No test sees what another left in Pyro's store, torch's dtype or the random stream."""
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)
    pyro.set_rng_seed(20)
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Where the named data sets lie: ``PVAE_DATA``, else ``shared/data`` beside the repository."""
    root = Path(os.environ.get("PVAE_DATA", ROOT.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no data sets here: set PVAE_DATA to their folder (looked in {root.name!r})")
    return root
