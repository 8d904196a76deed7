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
from pvae import runs
from pvae.data import as_batch, is_streamed, num_rows, take
from pvae.data.mapped import MappedRows
from pvae.errors import DataError
from pvae.guides.gaussian import Gaussian
from pvae.models.factor_analysis import FactorAnalysis
from pvae.models.vae import VAE

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
from pvae.models.vae import VAE

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


# --- from the command line -----------------------------------------------------------------------


@pytest.fixture
def small_is_large(monkeypatch):
    """Every file is mapped, and read in blocks of a few rows."""
    monkeypatch.setattr("pvae.data.loading._LARGE", 0)
    monkeypatch.setattr("pvae.data.mapped._BLOCK", 200)


def both(path, **options):
    """The data set with its rows in the file, and in memory."""
    return (pvae.data.load(path, streams=streams, **options) for streams in (True, False))


KINDS = {
    "real": (lambda g: g.normal(3, 2, size=(60, 4)).astype(np.float32), {}),
    "double": (lambda g: g.normal(3, 2, size=(60, 4)), {"transform": "none"}),
    "bits": (lambda g: g.integers(0, 2, size=(60, 4)).astype(np.uint8), {}),
    "images of bytes": (lambda g: g.integers(0, 256, size=(60, 2, 3)).astype(np.uint8), {}),
    "counts": (lambda g: g.poisson(3.0, size=(60, 4)), {"transform": "none"}),
    "grey, logit": (lambda g: g.uniform(size=(60, 4)), {"transform": "logit,standardize"}),
    "bytes, logit": (
        lambda g: g.integers(0, 9, size=(60, 4)).astype(np.uint8), {"transform": "logit"}
    ),
    "threshold": (lambda g: g.uniform(size=(60, 4)), {"binarize": "threshold"}),
    "dynamic": (lambda g: g.uniform(size=(60, 4)), {"binarize": "dynamic"}),
    "fixed": (lambda g: g.integers(0, 17, size=(60, 4)), {"binarize": "fixed"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_in_a_file_is_the_one_in_memory(tmp_path, small_is_large, kind):
    make, options = KINDS[kind]
    np.save(tmp_path / "x.npy", make(np.random.default_rng(0)))
    there, here = both(tmp_path / "x.npy", **options)
    assert isinstance(there.train.x, MappedRows)
    assert there.description() == here.description()
    assert there.image_shape == here.image_shape
    assert (there.preprocess is None) == (here.preprocess is None)
    noisy = "dequantize" in here.treatment or here.treatment in (
        "binarize dynamic",
        "binarize fixed",
    )
    for part in ("train", "valid", "test"):
        mapped, held = getattr(there, part), getattr(here, part)
        assert mapped.x.shape == held.x.shape
        assert mapped.x.dtype == torch.float32
        x = mapped.x[:]
        assert torch.equal(x, mapped.x[:]), "fixed noise is fixed"
        assert torch.equal(x[5:8] if len(x) > 8 else x[5:], mapped.x.part(5, 8)[:])
        if not noisy:
            torch.testing.assert_close(x, held.x, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(mapped.log_det, held.log_det, rtol=1e-9, atol=1e-9)
        back = there.transform.inverse(x.double())
        if here.kind == "continuous" and noisy:  # the noise was added to the same whole numbers
            whole = here.transform.inverse(held.x.double())
            assert torch.equal((back + 1e-4).floor(), (whole + 1e-4).floor())
            exact = there.transform.log_abs_det_jacobian(back)
            torch.testing.assert_close(mapped.log_det, exact, rtol=1e-2, atol=1e-2)
    if not noisy or here.preprocess is not None:
        torch.testing.assert_close(there.train_raw[:], here.train_raw)
    found, x = runs.statistics(there), there.train.x[:]
    torch.testing.assert_close(found["x_mean"], x.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["x_scale"], x.std(0, correction=0), rtol=1e-5, atol=1e-5)
    prints = [runs.facts(each)["fingerprint"] for each in (there, here)]
    if kind in ("bits", "counts", "double", "threshold"):
        assert prints[0] == prints[1]


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (lambda x: x.__setitem__((17, 2), np.nan), {}, "row 17 holds nan"),
        (lambda x: x.__setitem__((17, 2), 1.5), {"binarize": "fixed"}, "to 1.5, expected grey"),
        (lambda x: x.__setitem__((17, 2), -1), {"transform": "dequantize"}, "from -1 to"),
    ],
)
def test_what_is_unfit_in_a_file_is_one_line(tmp_path, small_is_large, spoil, options, words):
    x = np.random.default_rng(0).uniform(size=(40, 3))
    spoil(x)
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(DataError, match=words):
        pvae.data.load(tmp_path / "x.npy", streams=True, **options)


def test_a_support_is_checked_in_every_row_of_a_file(tmp_path):
    x = np.random.default_rng(0).integers(0, 2, size=(50, 6)).astype(np.float32)
    x[43, 1] = 0.5
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    model = VAE(6, z_dim=2, hidden=(4,), likelihood="bernoulli")
    with pytest.raises(DataError, match="row 43 of the data has 0.5"):
        pvae.fit(model, Gaussian(6, model.latents), mapped, epochs=1, progress=False)


def test_the_command_line_trains_and_evaluates_as_in_memory(
    tmp_path, monkeypatch, capsys, small_is_large
):
    from pvae.cli import main

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("x.npy", (rng.normal(size=(90, 2)) @ rng.normal(size=(2, 5)) > 0).astype(np.uint8))
    found = []
    for name, large in (("mapped", 0), ("held", 2**40)):
        monkeypatch.setattr("pvae.data.loading._LARGE", large)
        words = ["train", "vae", "--data", "x.npy", "--epochs", "2", "--engine", "eager",
                 "--run-dir", name]  # fmt: skip
        assert main(words) == 0
        assert main(["evaluate", name, "--num-particles", "20"]) == 0
        evidence = json.loads(Path(name, "evidence.json").read_text())["log_evidence"]
        tensors = Path(name, "checkpoints/best/tensors.safetensors").read_bytes()
        found.append((tensors, evidence))
        for command in ("doctor", "sample", "reconstruct", "encode"):
            assert main([command, name]) == 0, capsys.readouterr().err
        assert main(["evaluate", name, "--method", "annealed", "--num-temperatures", "5"]) == 0
    assert found[0] == found[1]
    monkeypatch.setattr("pvae.data.loading._LARGE", 0)
    assert main(["train", "--resume", "mapped", "--epochs", "3"]) == 0
    assert main(["evaluate", "mapped", "--data", "x.npy", "--num-particles", "20"]) == 0


def test_other_data_are_moved_as_the_training_data_were(
    tmp_path, monkeypatch, capsys, small_is_large
):
    from pvae.cli import main

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("x.npy", rng.normal(2, 3, size=(90, 5)))
    np.save("y.npy", rng.normal(5, 1, size=(60, 5)))
    words = ["train", "factor_analysis", "--data", "x.npy", "--epochs", "2", "--engine", "eager"]
    assert main([*words, "--run-dir", "run"]) == 0
    found = []
    for large in (0, 2**40):
        monkeypatch.setattr("pvae.data.loading._LARGE", large)
        assert main(["evaluate", "run", "--data", "y.npy", "--num-particles", "20"]) == 0
        about = json.loads(Path("run/evidence.json").read_text())
        found.append((about["log_evidence"], about["exact_log_evidence"]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
