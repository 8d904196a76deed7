"""Data that stay in a file: the same numbers as data in memory, and little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pvae
from pvae.data import as_batch, is_streamed, num_rows, take
from pvae.data.mapped import MappedRows
from pvae.errors import DataError
from pvae.guides.gaussian import Gaussian
from pvae.models.factor_analysis import FactorAnalysis

ROOT = Path(__file__).parents[1]


def pair(x_dim: int = 6):
    torch.manual_seed(2)
    model = FactorAnalysis(x_dim, z_dim=2)
    return model, Gaussian(x_dim, model.latents)


@pytest.fixture
def mapped(tmp_path):
    """``(100, 6)``, on a disk."""
    x = np.random.default_rng(1).normal(size=(100, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


@pytest.mark.parametrize("engine", ["eager", "staged"])
@pytest.mark.parametrize("parts", [1, 2])
def test_training_on_a_file_is_training_on_its_array(mapped, engine, parts):
    histories = []
    for x in (mapped, np.array(mapped), mapped[:][::1]):
        run = pvae.fit(
            *pair(), x, valid=x[:40], epochs=3, batch_size=32, engine=engine, parts=parts,
            progress=False, device="cpu",
        )  # fmt: skip
        assert run.engine.startswith(engine)
        wanted = ("bound", "elbo", "valid_bound")
        histories.append([[row[name] for name in wanted] for row in run.history])
    assert histories[0] == histories[1] == histories[2]


def test_evidence_of_a_file_is_that_of_its_array(mapped):
    for estimate in (pvae.evidence.importance, pvae.evidence.in_parts):
        options = {"parts": 3} if estimate is pvae.evidence.in_parts else {}
        found = estimate(*pair(), mapped, 10, **options)
        assert torch.equal(
            found.log_evidence, estimate(*pair(), np.array(mapped), 10, **options).log_evidence
        )


def test_rows_are_taken_wherever_they_lie(mapped):
    for array in (mapped, mapped[20:], mapped[::-3], mapped[:, ::2]):
        rows = as_batch(array, streams=True)
        assert is_streamed(rows)
        assert isinstance(rows, MappedRows)
        index = torch.tensor([3, 0, num_rows(rows) - 1, 3])
        assert torch.equal(take(rows, index), torch.from_numpy(np.array(array))[index])
    both = as_batch({"x": mapped, "y": np.arange(100)}, streams=True)
    assert is_streamed(both)
    assert take(both, torch.tensor([7]))["y"].tolist() == [7]
    assert not is_streamed(as_batch(mapped))


def test_resuming_knows_the_file_again(mapped, tmp_path):
    options = {"progress": False, "device": "cpu", "run_dir": tmp_path / "run", "engine": "eager"}
    pvae.fit(*pair(), mapped, epochs=1, **options)
    other = np.load(tmp_path / "x.npy")
    other[50] += 1
    np.save(tmp_path / "y.npy", other)
    changed = np.load(tmp_path / "y.npy", mmap_mode="r")
    with pytest.raises(pvae.PvaeError, match="data was"):
        pvae.fit(*pair(), changed, epochs=2, resume=True, **options)
    assert len(pvae.fit(*pair(), mapped, epochs=2, resume=True, **options).history) == 2


def test_a_row_that_is_not_finite_is_named_when_it_is_read(tmp_path):
    x = np.zeros((50, 6), np.float32)
    x[37, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with pytest.raises(DataError, match="row 37 holds nan"):
        pvae.fit(*pair(), mapped, epochs=1, batch_size=10, progress=False, device="cpu")
    rows = as_batch(mapped, streams=True, model=type("Model", (), {"takes_missing": True}))
    assert torch.isnan(take(rows, torch.tensor([37]))).sum() == 1


@pytest.mark.parametrize("array", [np.zeros((0, 3)), np.array(["a", "b"]), np.zeros(3, complex)])
def test_files_of_other_things_are_refused(tmp_path, array):
    path = tmp_path / "x.npy"
    mapped = np.lib.format.open_memmap(path, "w+", array.dtype, (2, *array.shape[1:]))
    with pytest.raises(DataError):
        as_batch(mapped[: len(array)], streams=True)


MEMORY = """
import json, sys, threading
import numpy as np, torch, pvae, pvae.data.mapped
from pvae.guides.gaussian import Gaussian
from pvae.models.factor_analysis import FactorAnalysis

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024

def peak(x):
    torch.manual_seed(1)
    model = FactorAnalysis(x.shape[1], z_dim=2)
    guide = Gaussian(x.shape[1], model.latents, hidden=(8,))
    most, over = [resident()], threading.Event()
    def watch():
        while not over.wait(0.005):
            most.append(resident())
    thread = threading.Thread(target=watch); thread.start()
    pvae.fit(model, guide, x, epochs=1, batch_size=1024, engine="eager", progress=False,
             device="cpu")
    over.set(); thread.join()
    return max(most) - most[0], max(most)

torch.set_num_threads(1)
x = np.load(sys.argv[1], mmap_mode="r")
peak(np.array(x[:2000]))  # what training takes without a file
pvae.data.mapped._KEPT = int(sys.argv[2]) * 2**20
found = [peak(x)]
if "all" in sys.argv:
    pvae.data.mapped._KEPT = 2**60  # nothing is given back
    found.append(peak(x))
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_file_is_never_held_whole(tmp_path):
    """256 MiB, of which 32 may stay beside what training takes; without a limit all do."""
    path = tmp_path / "x.npy"
    x = np.lib.format.open_memmap(path, "w+", np.float32, (2**17, 512))
    del x
    command = [sys.executable, "-c", MEMORY, path, "32", "all"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    (limited, _), (unlimited, _) = json.loads(found.stdout)
    assert limited < 100
    assert unlimited > 200
