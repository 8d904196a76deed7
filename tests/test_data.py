"""load, its splits, noise and Jacobians, files and downloads, batches, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import importlib
import math
import os
import pickle
import re
import socket
import struct
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import pvae.data
from pvae.data import as_batch, load, num_rows, require_binary, sources, take
from pvae.data.downloads import Remote, provide
from pvae.data.files import read_idx
from pvae.data.sources import SOURCES
from pvae.data.tensors import all_finite
from pvae.data.transforms import Chain, Logit, Scale, Standardize
from pvae.errors import DataError, OptionError

SIGMAS = 4.5

named = importlib.import_module("pvae.data.sources")


@pytest.fixture(autouse=True)
def _no_shelf(monkeypatch, tmp_path):
    """No test sees the machine's data, cache or proxies unless it asks to."""
    monkeypatch.delenv("PVAE_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def save(path: Path, **arrays) -> Path:
    if path.suffix == ".npy":
        np.save(path, arrays["x"])
    else:
        np.savez(path, **arrays)
    return path


def grid(rows: int = 30, features: int = 2) -> np.ndarray:
    """Distinct continuous rows, whose first feature tells which row it was."""
    rng = np.random.default_rng(0)
    return np.column_stack([np.arange(rows) + 0.5, rng.normal(size=(rows, features - 1))])


def same(first: pvae.data.Dataset, second: pvae.data.Dataset) -> bool:
    parts = ("train", "valid", "test")
    return all(torch.equal(getattr(first, p).x, getattr(second, p).x) for p in parts)


# Transforms


def transforms() -> list[Chain]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(50, 4, generator=generator, dtype=torch.float64)
    standardize = Standardize.fit(3 * x - 7)
    unit = Chain((Scale(17), Logit()))
    return [
        Chain(),
        Chain((Scale(17),)),
        Chain((Scale(17), Logit(0.05))),
        unit,
        Chain((standardize,)),
        Chain((Scale(17), Standardize.fit(x))),
        unit + Standardize.fit(unit(17 * x)),
    ]


@pytest.mark.parametrize("transform", transforms(), ids=repr)
def test_transform_round_trip_and_jacobian(transform):
    x = 17 * torch.rand(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = transform(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(transform.inverse(y), x, atol=1e-8, rtol=1e-10)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda r: transform(r[None])[0], row) for row in x]
    )
    log_det = transform.log_abs_det_jacobian(x)
    assert log_det.shape == (5,)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian)[1], atol=1e-8, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transform_keeps_precision(dtype):
    for transform in transforms():
        x = torch.full((3, 4), 8.5, dtype=dtype)
        assert transform(x).dtype == transform.inverse(x / 17).dtype == dtype
        assert transform.log_abs_det_jacobian(x).dtype == dtype


def test_density_on_the_original_scale_integrates_to_one():
    x = torch.linspace(0, 17, 2_000_001, dtype=torch.float64)[:, None]
    transform = Chain((Scale(17), Logit())) + Standardize(
        torch.tensor([0.3]).double(), torch.tensor([2.0]).double()
    )
    log_p_model = torch.distributions.Normal(0, 1).log_prob(transform(x)).squeeze(1)
    density = (log_p_model + transform.log_abs_det_jacobian(x)).exp()
    assert float(torch.trapezoid(density, x.squeeze(1))) == pytest.approx(1, abs=1e-6)


def test_logit_is_finite_at_both_ends():
    ends = torch.tensor([[0.0, 1.0]])
    y = Logit()(ends)
    assert all_finite(y)
    torch.testing.assert_close(y[0, 0], -y[0, 1])
    assert all_finite(Logit().log_abs_det_jacobian(ends))


def test_standardize_leaves_constant_features():
    x = torch.stack([torch.full((7,), 0.1), torch.arange(7.0)], 1)
    transform = Standardize.fit(x)
    assert transform.std.tolist() == [1.0, 2.0]
    assert transform(x)[:, 0].abs().max() == 0


def test_transform_repr():
    chain = Chain((Scale(17), Logit()))
    assert repr(chain) == "Scale(levels=17) -> Logit(squeeze=1e-06)"
    assert repr(Chain()) == "identity"


# Digits


def test_digits(digits):
    assert [len(s) for s in (digits.train, digits.valid, digits.test)] == [1257, 180, 360]
    assert (digits.x_dim, digits.image_shape, digits.num_levels) == (64, (8, 8), 17)
    assert digits.kind == "continuous"
    assert digits.train.x.dtype == torch.float32
    assert digits.train.labels.dtype == torch.int64
    expected = "digits: 1257/180/360 x 64, continuous (dequantize), original 0..16"
    assert digits.description() == expected
    assert repr(digits) == f"Dataset({expected})"
    assert repr(digits.valid) == "Split(180 x 64)"


def test_splits_are_a_partition_with_their_labels():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = load("digits", transform="none")
    known = sorted((*row, label) for row, label in zip(bunch.data, bunch.target, strict=True))
    splits = (data.train, data.valid, data.test)
    seen = sorted((*r.tolist(), int(y)) for s in splits for r, y in zip(s.x, s.labels, strict=True))
    assert seen == known


def test_dequantized_integers_come_back(digits):
    integers = load("digits", transform="none")
    assert integers.kind == "integer"
    assert torch.equal(digits.train_raw, integers.train.x)
    for part in ("train", "valid", "test"):
        x = getattr(digits, part).x
        assert float(x.min()) >= 0
        assert float(x.max()) <= 1
        noise = digits.transform.inverse(x.double()) - getattr(integers, part).x
        assert float(noise.min()) > -1e-6
        assert float(noise.max()) < 1 + 1e-6


def test_preprocess_adds_fresh_uniform_noise(digits):
    torch.manual_seed(0)
    first, second = (digits.preprocess(digits.train_raw) for _ in range(2))
    assert not torch.equal(first, second)
    noise = digits.transform.inverse(first.double()) - digits.train_raw
    stderr = math.sqrt(1 / 12 / noise.numel())
    assert abs(float(noise.mean()) - 0.5) < SIGMAS * stderr
    assert abs(float(noise.square().mean()) - 1 / 3) < SIGMAS * math.sqrt(4 / 45 / noise.numel())
    torch.manual_seed(0)
    assert torch.equal(first, digits.preprocess(digits.train_raw))


def test_bits_per_dim_of_the_uniform_density(digits):
    """A density of one on the unit cube is one of 17^-D per integer unit: log2(17) bits."""
    log_p_original = torch.zeros(len(digits.test)) + digits.test.log_det
    bits = digits.bits_per_dim(log_p_original)
    assert bits.shape == (360,)
    torch.testing.assert_close(bits, torch.full_like(bits, math.log2(17)))


@pytest.mark.parametrize("steps", ["logit", "dequantize,standardize", "logit,standardize"])
def test_log_det_belongs_to_x(steps):
    data = load("digits", transform=steps)
    original = data.transform.inverse(data.test.x.double())
    log_det = data.transform.log_abs_det_jacobian(original)
    assert data.test.log_det.dtype == torch.float64
    torch.testing.assert_close(data.test.log_det, log_det, atol=2e-3, rtol=1e-5)
    batch = data.preprocess(data.train_raw[:9])
    assert all_finite(batch)
    assert batch.shape == (9, 64)


def test_standardize_uses_training_rows_only(tmp_path):
    x = grid(20, 3)
    path = save(tmp_path / "a.npz", train=x, valid=x + 100, test=x + 100)
    data = load(path)
    assert data.treatment == "standardize"
    torch.testing.assert_close(data.train.x.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(data.train.x.std(0, correction=0), torch.ones(3))
    assert float(data.test.x[:, 0].min()) > 10
    assert data.preprocess is None
    assert data.train_raw is data.train.x
    log_det = torch.full((20,), -float(np.log(x.std(0)).sum()), dtype=torch.float64)
    torch.testing.assert_close(data.test.log_det, log_det)


# Splits and seeds


def test_reproducible_and_independent_of_the_global_stream():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load("digits", transform="logit")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, load("digits", transform="logit"))
    other = load("digits", transform="logit", seed=1)
    assert not torch.equal(first.test.labels, other.test.labels)


def test_noise_of_the_splits_is_not_shared(tmp_path):
    x = np.zeros((40, 30), dtype=np.int64)
    x[0, 0] = 5
    data = load(save(tmp_path / "a.npz", train=x, valid=x, test=x))
    assert not torch.equal(data.valid.x, data.test.x)
    assert not torch.equal(data.valid.x, data.train.x)


def test_fractions(tmp_path):
    path = save(tmp_path / "a.npy", x=grid(100))
    assert 0.07 * 100 > 7
    data = load(path, transform="none", valid_fraction=0.07, test_fraction=0.5)
    assert [len(s) for s in (data.train, data.valid, data.test)] == [43, 7, 50]
    seen = torch.cat([data.train.x, data.valid.x, data.test.x])[:, 0]
    assert seen.sort().values.tolist() == grid(100)[:, 0].tolist()


def test_own_splits_stay_in_order(tmp_path):
    parts = {name: grid(rows) for name, rows in (("train", 10), ("valid", 4), ("test", 5))}
    labels = {"train_labels": np.arange(10), "valid_y": np.arange(4), "test_labels": np.arange(5)}
    data = load(save(tmp_path / "a.npz", **parts, **labels), transform="none")
    for name, rows in parts.items():
        torch.testing.assert_close(getattr(data, name).x, torch.tensor(rows).float())
        assert getattr(data, name).labels.tolist() == list(range(len(rows)))


def test_valid_is_carved_from_train(tmp_path):
    path = save(tmp_path / "a.npz", train=grid(20), test=grid(5) + 1000)
    data = load(path, transform="none", valid_fraction=0.25)
    assert [len(s) for s in (data.train, data.valid, data.test)] == [15, 5, 5]
    assert float(data.valid.x[:, 0].max()) < 100 < float(data.test.x[:, 0].min())


def test_options_that_would_be_ignored_are_refused(tmp_path):
    own = save(tmp_path / "a.npz", train=grid(), valid=grid(), test=grid())
    with pytest.raises(OptionError, match=r"a\.npz has its own test split: leave out test_frac"):
        load(own, test_fraction=0.3)
    with pytest.raises(OptionError, match="exclude each other"):
        load("digits", binarize="fixed", transform="logit")


# Binarisation


def test_dynamic_binarization():
    data = load("digits", binarize="dynamic")
    assert (data.kind, data.num_levels, data.treatment) == ("binary", 17, "binarize dynamic")
    for split in (data.train, data.valid, data.test):
        require_binary(split.x)
        assert split.log_det.abs().sum() == 0
    torch.manual_seed(3)
    draws = torch.stack([data.preprocess(data.train_raw) for _ in range(30)])
    assert not torch.equal(draws[0], draws[1])
    pixel = draws.sum((0, 1))
    grey = data.train_raw.double()
    stderr = (30 * (grey * (1 - grey)).sum(0)).sqrt()
    assert ((pixel - 30 * grey.sum(0)).abs() <= SIGMAS * stderr + 1e-2).all()
    torch.manual_seed(4)
    assert same(data, load("digits", binarize="dynamic"))


def test_fixed_and_threshold_binarization():
    integers = load("digits", transform="none").test.x
    fixed = load("digits", binarize="fixed")
    assert fixed.preprocess is None
    assert fixed.train_raw is fixed.train.x
    assert torch.equal(fixed.test.x, load("digits", binarize="dynamic").test.x)
    threshold = load("digits", binarize="threshold")
    assert torch.equal(threshold.test.x, (integers > 8).float())


@pytest.mark.parametrize("how", ["dynamic", "fixed", "threshold", None])
def test_binarizing_bits_does_nothing(tmp_path, how):
    bits = np.random.default_rng(0).integers(0, 2, (12, 5)).astype(bool)
    path = save(tmp_path / "a.npz", train=bits, valid=bits, test=bits)
    data = load(path, binarize=how)
    assert (data.kind, data.preprocess, data.treatment) == ("binary", None, "none")
    assert torch.equal(data.train.x, torch.tensor(bits).float())


def test_binarize_grey_floats(tmp_path):
    grey = np.random.default_rng(0).random((400, 6))
    data = load(save(tmp_path / "a.npy", x=grey), binarize="dynamic")
    assert data.num_levels is None
    torch.testing.assert_close(data.train_raw.mean(), torch.tensor(0.5), atol=0.05, rtol=0)


def test_require_binary_names_the_entry():
    x = torch.tensor([[0.0, 1.0], [1.0, 0.25]])
    message = "x: row 1, feature 1 is 0.25, expected 0 or 1: load the data with binarize="
    with pytest.raises(DataError, match=re.escape(message)):
        require_binary(x)


# Automatic choices


@pytest.mark.parametrize(
    ("x", "treatment", "num_levels"),
    [
        (np.arange(24, dtype=np.uint8).reshape(12, 2), "dequantize", 256),
        (np.arange(24).reshape(12, 2), "dequantize", 24),
        (np.arange(24.0).reshape(12, 2), "dequantize", 24),
        (np.arange(24).reshape(12, 2) - 1, "standardize", None),
        (np.arange(24).reshape(12, 2) * 10_000, "standardize", None),
        (np.arange(24).reshape(12, 2) / 2, "standardize", None),
        (np.zeros((12, 2)), "none", 2),
    ],
)
def test_automatic_transform(tmp_path, x, treatment, num_levels):
    data = load(save(tmp_path / "a.npy", x=x))
    assert (data.treatment, data.num_levels) == (treatment, num_levels)


def test_image_shape_is_kept(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (10, 3, 4), dtype=np.uint8)
    data = load(save(tmp_path / "a.npy", x=x), transform="none")
    assert data.image_shape == (3, 4)
    assert data.x_dim == 12
    flat = {tuple(image.ravel().tolist()) for image in x}
    assert {tuple(row.int().tolist()) for row in data.train.x} <= flat


def test_to_moves_every_tensor(digits):
    for data in (digits, load("digits", transform="logit,standardize")):
        moved = data.to("meta")
        assert moved.test.log_det.is_meta
        assert moved.train.labels.is_meta
        assert moved.preprocess(moved.train_raw[:4]).is_meta
        assert moved.transform.inverse(moved.test.x).is_meta


def test_data_set_can_be_pickled(digits):
    again = pickle.loads(pickle.dumps(load("digits", binarize="dynamic")))
    assert again.preprocess is torch.bernoulli
    assert same(digits, pickle.loads(pickle.dumps(digits)))


# Files


@pytest.mark.parametrize(
    "text",
    [
        "0.5,1\n2.5,3\n4.5,5\n6.5,7\n",
        "a,b\n0.5,1\n2.5,3\n4.5,5\n6.5,7\n",
        '\ufeff"a, first",b\r\n0.5, 1\r\n"2.5",3\r\n\r\n4.5,5\r\n6.5,7e0',
    ],
)
def test_csv(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8", newline="")
    data = load(path, transform="none")
    rows = torch.cat([data.train.x, data.valid.x, data.test.x])
    assert sorted(map(tuple, rows.tolist())) == [(0.5, 1), (2.5, 3), (4.5, 5), (6.5, 7)]


def test_npz_labels(tmp_path):
    x = grid(9)
    for key in ("labels", "y"):
        data = load(save(tmp_path / "a.npz", x=x, **{key: np.arange(9)}), transform="none")
        assert torch.equal(data.train.x[:, 0] - 0.5, data.train.labels.float())


def with_entry(value: float) -> np.ndarray:
    x = grid(10, 3)
    x[4, 2] = value
    return x


ROWS = grid(10)
BAD_ARRAYS = [
    (with_entry(math.nan), {}, "x: row 4, feature 2 is nan, expected finite numbers"),
    (with_entry(-math.inf), {}, "x: row 4, feature 2 is -inf, expected finite numbers"),
    (with_entry(1e300), {"transform": "none"}, "becomes 1e+300, too large for float32"),
    (with_entry(1e300), {}, "has a standard deviation of inf, expected a positive finite one"),
    (np.zeros((0, 3)), {}, "x is empty, shape (0, 3): give at least one row"),
    (np.zeros((3, 0)), {}, "x is empty, shape (3, 0): give at least one number in each row"),
    (np.array([["a", "b"]] * 5), {}, "x has dtype <U1, expected numbers"),
    (ROWS.astype(complex), {}, "x has dtype complex128, expected real numbers"),
    (ROWS.astype(np.longdouble), {}, "expected real numbers of at most 64 bits"),
    (np.array(3.0), {}, "x is a single number, expected rows (N, ...): add a dimension"),
    (np.arange(9.0), {}, "x has shape (9,), expected (N, features): reshape it to (N, 1)"),
    (ROWS[:2], {}, "has 2 rows, expected at least 3 and some left for training"),
    (ROWS[:4], {"valid_fraction": 0.3, "test_fraction": 0.5}, "has 4 rows, expected at least 3"),
    (
        ROWS,
        {"binarize": "fixed"},
        "expected grey between 0 and 1, or whole numbers from 0 to 65535",
    ),
    (ROWS, {"transform": "logit"}, "for transform='logit': rescale the data"),
    (ROWS, {"transform": "dequantize"}, "expected whole numbers from 0 to 65535 to dequantize"),
    (-np.ones((9, 2)), {"binarize": "dynamic"}, "is -1, expected grey between 0 and 1"),
]


@pytest.mark.parametrize(("x", "options", "message"), BAD_ARRAYS)
def test_bad_arrays(tmp_path, x, options, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load(save(tmp_path / "a.npy", x=x), **options)
    assert "\n" not in str(caught.value)


def test_bad_value_is_named_in_its_split(tmp_path):
    grey = np.arange(20).reshape(10, 2) / 20
    path = save(tmp_path / "a.npz", train=grey, valid=grey, test=2 * grey)
    message = "a.npz: test row 5, feature 1 is 1.1, expected grey between 0 and 1"
    with pytest.raises(DataError, match=re.escape(message)):
        load(path, binarize="dynamic")


BAD_NPZ = [
    ({"data": ROWS}, "holds data, expected the key x, or train and test (and valid)"),
    ({"train": ROWS, "valid": ROWS}, "holds train, valid, expected the key x, or train and test"),
    ({"train": ROWS, "test": grid(5, 3)}, "test has rows of shape (3,) but train has (2,)"),
    ({"x": ROWS, "y": np.arange(4)}, "labels are torch.int64 of shape (4,), expected integers of"),
    ({"x": ROWS, "y": ROWS[:, 0]}, "labels are torch.float64 of shape (10,), expected integers"),
]


@pytest.mark.parametrize(("arrays", "message"), BAD_NPZ)
def test_bad_npz(tmp_path, arrays, message):
    with pytest.raises(DataError, match=re.escape(message)):
        load(save(tmp_path / "a.npz", **arrays))


BAD_CSV = [
    ("", "x is empty, shape (0, 0)"),
    ("a,b\n", "x is empty, shape (0, 2)"),
    ("age,sex\n1,2\n3,f\n", "row 1 (line 3), column 1 'sex' is 'f', expected a number: encode"),
    ("1,2\n3,\n", "row 1 (line 2), column 1 is '', expected a number"),
    ("1,x\n3,4\n", "row 0 (line 1), column 1 is 'x', expected a number"),
    ("1,2\n3_0,4\n", "column 0 is '3_0', expected a number"),
    ("1,2\n3\n", "row 1 (line 2) has 1 cells, expected 2: mend the line"),
    ("1,2\n3,4\n5,nan\n", "x: row 2, feature 1 is nan"),
    ("1,2\n3,\udcff\n", "cannot be read as csv ("),
]


@pytest.mark.parametrize(("text", "message"), BAD_CSV)
def test_bad_csv(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=re.escape(message)):
        load(path)


class Trap:
    """Unpickling this would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_refused_unopened(tmp_path):
    for path in (tmp_path / "a.npy", tmp_path / "a.npz"):
        save(path, x=np.array([[Trap(tmp_path / "sprung")]] * 5, dtype=object))
        with pytest.raises(DataError, match="Object arrays cannot be loaded"):
            load(path)
    path = tmp_path / "b.npz"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(DataError, match=r"b\.npz cannot be read as npz"):
        load(path)
    assert not (tmp_path / "sprung").exists()


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(DataError, match=r"a\.npy is not a file: check the path"):
        load(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"gone does not exist: check the path"):
        load(tmp_path / "gone")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"folder\.csv is not a file"):
        load(tmp_path / "folder.csv")
    with pytest.raises(DataError, match=r"ends in '\.pkl', expected \.npz, \.npy, \.csv or \.txt"):
        load(tmp_path / "a.pkl")
    np.save(tmp_path / "a.npy", ROWS)
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(DataError, match="holds a single array, expected an npz: name it .npy"):
        load(tmp_path / "a.npz")


BAD_OPTIONS = [
    ("mnits", {}, "'mnits' is neither a named data set, a folder of images nor the path of a .npz, "
     ".npy, .csv or .txt file: did you mean 'mnist'?"),
    ("digits", {"binarize": "dinamic"}, "unknown binarize 'dinamic': did you mean 'dynamic'?"),
    ("digits", {"transform": "logits"}, "unknown transform 'logits': did you mean 'logit'?"),
    ("digits", {"transform": "logit,dequantize"}, "is out of order, expected each step once and in "
     "the order dequantize,logit,standardize"),
    ("digits", {"transform": "logit,logit"}, "is out of order"),
    ("digits", {"valid_fraction": 0.0}, "expected positive shares that leave some rows"),
    ("digits", {"valid_fraction": 0.5, "test_fraction": 0.5}, "0.5 and 0.5, expected positive"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "message"), BAD_OPTIONS)
def test_bad_options(name, options, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        load(name, **options)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_damaged_files_load_or_are_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        np.savetxt(path, grid(8), delimiter=",")
    else:
        save(path, x=grid(8))
    whole = path.read_bytes()
    rng = np.random.default_rng(5)
    messages = []
    for _ in range(60):
        damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load(path)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert not [message for message in messages if "\n" in message]


# Named sets


def write_idx(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))
    return path


def write_mnist(folder: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (30, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.arange(30, dtype=np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (4, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(4, dtype=np.uint8),
    }
    for name, array in arrays.items():
        write_idx(folder / f"{name}.gz", array)
    return arrays


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_sets_from_the_shelf(tmp_path, monkeypatch, name):
    arrays = write_mnist(tmp_path / name.replace("-", "_"))
    monkeypatch.setenv("PVAE_DATA", str(tmp_path))
    data = load(name, transform="none")
    assert [len(s) for s in (data.train, data.valid, data.test)] == [25, 5, 4]
    assert (data.image_shape, data.num_levels) == ((28, 28), 256)
    images = torch.tensor(arrays["train-images-idx3-ubyte"]).flatten(1).float()
    assert torch.equal(torch.cat([data.train.x, data.valid.x]), images)
    assert data.valid.labels.tolist() == [25, 26, 27, 28, 29]


def test_mnist_is_downloaded_once(tmp_path, monkeypatch):
    write_mnist(tmp_path / "mirror")
    files = sorted((tmp_path / "mirror").iterdir())
    hashes = {f.stem: hashlib.sha256(gzip.decompress(f.read_bytes())).hexdigest() for f in files}
    monkeypatch.setattr(named, "_MNIST", (tmp_path / "mirror").as_uri() + "/")
    monkeypatch.setattr(named, "_MNIST_SHA256", hashes)
    first = load("mnist", root=tmp_path / "cache")
    for file in files:
        file.unlink()
    assert same(first, load("mnist", root=tmp_path / "cache"))
    assert len(list((tmp_path / "cache" / "mnist").iterdir())) == 4


def test_static_mnist_from_either_form(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    sizes = {"train": 5, "valid": 2, "test": 3}
    bits = {part: rng.integers(0, 2, (n, 784), dtype=np.uint8) for part, n in sizes.items()}
    text, packed = (tmp_path / form / "mnist_static_binary" for form in ("text", "packed"))
    for folder in (text, packed):
        folder.mkdir(parents=True)
    for part, array in bits.items():
        np.savetxt(text / f"binarized_mnist_{part}.amat", array, fmt="%d")
    np.savez(
        packed / "binarized_mnist_packed.npz",
        **{part: np.packbits(array, axis=1) for part, array in bits.items()},
    )
    for folder in (text, packed):
        data = load("mnist-static", root=folder.parent)
        assert (data.kind, data.image_shape, data.preprocess) == ("binary", (28, 28), None)
        for part, array in bits.items():
            assert torch.equal(getattr(data, part).x, torch.tensor(array).float())
    (text / "binarized_mnist_valid.amat").write_text("0 1 2 1\n")
    with pytest.raises(DataError, match="is not lines of 784 zeros and ones: fetch it anew"):
        load("mnist-static", root=text.parent)
    np.savez(packed / "binarized_mnist_packed.npz", train=np.ones((2, 98)), test=np.ones((2, 98)))
    with pytest.raises(DataError, match="cannot be read as packed bits"):
        load("mnist-static", root=packed.parent)


def density_set(folder, name="nltcs", width=16):
    """Small splits of a binary set for density estimation, as packed bits and as lines of text."""
    rng = np.random.default_rng(1)
    sizes = {"train": 6, "valid": 2, "test": 3}
    bits = {part: rng.integers(0, 2, (n, width), dtype=np.uint8) for part, n in sizes.items()}
    for form in ("text", "packed"):
        (folder / form / "binary_density").mkdir(parents=True)
    for part, array in bits.items():
        path = folder / "text" / "binary_density" / f"{name}.{part}.data"
        np.savetxt(path, array, fmt="%d", delimiter=",")
    packed = {part: np.packbits(array, axis=1) for part, array in bits.items()}
    np.savez(folder / "packed" / "binary_density" / f"{name}.npz", **packed, n_vars=width)
    return bits


def test_binary_density_from_either_form(tmp_path):
    bits = density_set(tmp_path)
    for form in ("text", "packed"):
        data = load("nltcs", root=tmp_path / form)
        assert (data.kind, data.image_shape, data.preprocess) == ("binary", None, None)
        for part, array in bits.items():
            assert torch.equal(getattr(data, part).x, torch.tensor(array).float())
    (tmp_path / "text" / "binary_density" / "nltcs.test.data").write_text("0,1,2\n")
    with pytest.raises(DataError, match="is not lines of 16 zeros and ones: fetch it anew"):
        load("nltcs", root=tmp_path / "text")


def test_binary_density_is_downloaded_once_and_its_bits_are_hashed(tmp_path, monkeypatch):
    bits = density_set(tmp_path)
    mirror = tmp_path / "mirror"
    (tmp_path / "text" / "binary_density").rename(tmp_path / "text" / "nltcs")
    (tmp_path / "text").rename(mirror)
    hashes = {part: hashlib.sha256(array.tobytes()).hexdigest() for part, array in bits.items()}
    monkeypatch.setattr(named, "_DENSITY", mirror.as_uri() + "/")
    monkeypatch.setitem(named._DENSITY_SETS, "nltcs", (16, hashes, "a line"))
    monkeypatch.setitem(SOURCES, "nltcs", named._binary_density("nltcs"))
    first = load("nltcs", root=tmp_path / "cache")
    assert torch.equal(first.test.x, torch.tensor(bits["test"]).float())
    again = density_set(tmp_path / "again")["test"].copy()
    again[0, 0] ^= 1
    np.savetxt(mirror / "nltcs" / "nltcs.test.data", again, fmt="%d", delimiter=",")
    assert same(first, load("nltcs", root=tmp_path / "cache"))
    with pytest.raises(DataError, match="has SHA-256 .*, expected .*, and was not kept"):
        load("nltcs", root=tmp_path / "other")
    kept = {path.name for path in (tmp_path / "other").rglob("*.data")}
    assert kept == {"nltcs.train.data", "nltcs.valid.data"}


def test_damaged_idx(tmp_path):
    path = write_idx(tmp_path / "a.gz", np.zeros((3, 4), dtype=np.uint8))
    content = gzip.decompress(path.read_bytes())
    assert read_idx(path).shape == (3, 4)
    path.write_bytes(gzip.compress(content[:-5]))
    with pytest.raises(DataError, match=re.escape("7 bytes, expected 12 for shape (3, 4)")):
        read_idx(path)
    path.write_bytes(gzip.compress(b"\x00\x00\x0b\x02" + content[4:]))
    with pytest.raises(DataError, match="does not begin like an idx file of bytes"):
        read_idx(path)
    for damaged in (gzip.compress(content)[:-9], b"", gzip.compress(content[:3])):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read as idx"):
            read_idx(path)


def test_sources_are_described():
    described = sources()
    assert list(described) == sorted(SOURCES)
    assert all(40 < len(line) < 100 for line in described.values())


# Downloads


@pytest.fixture
def remote(tmp_path):
    """A small gzip file served on the loopback, with the hash of what it holds."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.gz").write_bytes(gzip.compress(b"content"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    class Silent(http.server.ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            """The faults are the test's own."""

    server = Silent(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/a.gz"
    yield Remote("set/a.gz", url, hashlib.sha256(b"content").hexdigest())
    server.shutdown()
    server.server_close()


def test_download(tmp_path, remote):
    path = provide("set", remote, tmp_path / "cache")
    assert path == tmp_path / "cache" / "set" / "a.gz"
    assert gzip.decompress(path.read_bytes()) == b"content"
    assert list(path.parent.iterdir()) == [path]
    of_file = hashlib.sha256(path.read_bytes()).hexdigest()
    again = Remote(remote.path, remote.url, of_file)
    assert provide("set", again, tmp_path / "other").is_file()


def test_download_of_wrong_content_leaves_nothing(tmp_path, remote):
    wrong = Remote(remote.path, remote.url, "0" * 64)
    with pytest.raises(DataError, match=f"expected {'0' * 64}, and was not kept: try again, or"):
        provide("set", wrong, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_cut_download_leaves_nothing(tmp_path, remote, monkeypatch):
    def cut(source, sink):
        sink.write(source.read(3))
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr("pvae.data.downloads.shutil.copyfileobj", cut)
    with pytest.raises(DataError, match="reset by peer"):
        provide("set", remote, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_refused_connection_names_both_ways(tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    monkeypatch.setattr(named, "_FASHION_MNIST", url)
    with pytest.raises(DataError) as caught:
        load("fashion-mnist", root=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "set PVAE_DATA to a folder that holds it, or try again with a connection" in message
    assert f"{url}train-images-idx3-ubyte.gz" in message
    assert str(tmp_path) in message


def test_missing_page_is_refused(tmp_path, remote):
    gone = Remote("set/b.gz", remote.url.replace("a.gz", "b.gz"), remote.sha256)
    with pytest.raises(DataError, match="set needs set/b.gz, .* could not be downloaded"):
        provide("set", gone, tmp_path / "cache")


def test_shelf_comes_before_cache(tmp_path, monkeypatch):
    for folder in ("shelf", "cache"):
        (tmp_path / folder / "set").mkdir(parents=True)
        (tmp_path / folder / "set" / "a.gz").write_text(folder)
    found = Remote("set/a.gz", "http://127.0.0.1:9/", "0" * 64)
    assert provide("set", found, tmp_path / "cache").read_text() == "cache"
    monkeypatch.setenv("PVAE_DATA", str(tmp_path / "shelf"))
    assert provide("set", found, tmp_path / "cache").read_text() == "shelf"


# Batches


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.ones((3, 2)), torch.float64),
        (np.ones((3, 2), np.float32), torch.float32),
        (np.ones((3, 2), np.float16), torch.float16),
        (np.ones((3, 2), ">f8"), torch.float64),
        (np.ones((3, 2), np.int32), torch.int32),
        (np.ones((3, 2), np.uint8), torch.uint8),
        (np.ones((3, 2), np.uint16), torch.int32),
        (np.ones((3, 2), bool), torch.bool),
        (np.ones((3, 2))[::-1], torch.float64),
        (np.ones(3), torch.float64),
        (torch.ones(3, 2, dtype=torch.int64), torch.int64),
    ],
)
def test_as_batch_keeps_types(array, dtype):
    batch = as_batch(array)
    assert batch.dtype == dtype
    assert batch.shape == array.shape
    assert bool((batch == 1).all())
    assert num_rows(batch) == 3


def test_as_batch_of_read_only_memory():
    array = np.arange(6.0).reshape(3, 2)
    array.flags.writeable = False
    assert as_batch(array).tolist() == array.tolist()


def test_structures():
    x, y = torch.arange(6.0).reshape(3, 2), np.arange(3)
    index = torch.tensor([2, 0])
    pair = as_batch((x, y))
    assert isinstance(pair, tuple)
    assert num_rows(pair) == 3
    assert [part.tolist() for part in take(pair, index)] == [[[4, 5], [0, 1]], [2, 0]]
    named_batch = as_batch({"x": x, "y": y})
    assert num_rows(named_batch) == 3
    taken = take(named_batch, index)
    assert {key: part.tolist() for key, part in taken.items()} == {
        "x": [[4, 5], [0, 1]],
        "y": [2, 0],
    }
    assert take(as_batch(x), index).tolist() == [[4, 5], [0, 1]]
    assert as_batch(x) is x


def test_as_batch_of_data_sets(digits):
    assert as_batch(digits) is digits.train.x
    assert as_batch(digits.test) is digits.test.x


BAD_BATCHES = [
    (torch.tensor([[1.0, 2.0], [3.0, math.nan]]), "x: row 1, feature 1 is nan, expected finite"),
    (torch.tensor([1.0, math.inf]), "x: row 1 is inf, expected finite numbers: drop or impute"),
    ({"a": torch.tensor([[math.nan]])}, "x['a']: row 0, feature 0 is nan"),
    ((torch.ones(3), torch.ones(4)), "x[1] has 4 rows but x[0] has 3, expected one row per datum"),
    ({"a": torch.ones(3), "b": torch.ones(2)}, "x['b'] has 2 rows but x['a'] has 3"),
    (torch.tensor(1.0), "x is a single number, expected rows (N, ...): add a dimension"),
    (torch.ones(0, 3), "x is empty, shape (0, 3): give at least one row"),
    ((), "x holds no tensors, expected at least one"),
    ({}, "x holds no tensors, expected at least one"),
    (np.array([1 + 2j]), "x has dtype complex128, expected real numbers"),
    (torch.ones(2, dtype=torch.complex64), "x is a tensor of torch.complex64 and torch.strided"),
    (torch.eye(2).to_sparse(), "expected dense real numbers: convert it first"),
    (np.array(["a"]), "x has dtype <U1, expected numbers"),
    (np.array([None]), "x has dtype object, expected real numbers"),
    (np.array([2**63], np.uint64), "x has dtype uint64, expected real numbers"),
    ([1.0, 2.0], "x[0] is of type float, expected a tensor or a numpy array: convert it first"),
    (3, "x is of type int, expected a tensor or a numpy array: convert it first"),
    (None, "x is of type NoneType"),
]


@pytest.mark.parametrize(("data", "message"), BAD_BATCHES)
def test_bad_batches(data, message):
    with pytest.raises(DataError, match=re.escape(message)):
        as_batch(data)


def test_public_names_are_sorted_and_there():
    assert pvae.data.__all__ == sorted(pvae.data.__all__)
    assert all(getattr(pvae.data, name).__doc__ for name in pvae.data.__all__ if name != "Batch")


# Real data

REAL_DATA = os.environ.get("PVAE_DATA")


@pytest.fixture
def shelf(monkeypatch) -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(REAL_DATA) if REAL_DATA else beside
    if not (folder / "mnist").is_dir():
        pytest.skip("set PVAE_DATA to a folder with mnist and mnist_static_binary")
    monkeypatch.setenv("PVAE_DATA", str(folder))
    return folder


def test_real_mnist(shelf):
    for file, sha256 in named._MNIST_SHA256.items():
        content = gzip.decompress((shelf / "mnist" / f"{file}.gz").read_bytes())
        assert hashlib.sha256(content).hexdigest() == sha256
    data = load("mnist", binarize="dynamic")
    assert data.description() == (
        "mnist: 50000/10000/10000 x 784, binary (binarize dynamic), original 0..255"
    )
    assert data.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert float(data.train_raw.double().mean()) == pytest.approx(0.1307, abs=1e-3)


def test_real_static_mnist(shelf):
    data = load("mnist-static")
    assert (
        data.description() == "mnist-static: 50000/10000/10000 x 784, binary (none), original 0..1"
    )
    for part in ("valid", "test"):
        bits = getattr(data, part).x.numpy().astype(np.uint8)
        text = np.full((len(bits), 2 * 784), ord(" "), np.uint8)
        text[:, ::2], text[:, -1] = bits + ord("0"), ord("\n")
        assert hashlib.sha256(text.tobytes()).hexdigest() == named._STATIC_SHA256[part]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("nltcs", "16181/2157/3236 x 16"),
        ("plants", "17412/2321/3482 x 69"),
        ("accidents", "12758/1700/2551 x 111"),
        ("mushrooms", "2000/500/5624 x 112"),
        ("dna", "1600/400/1186 x 180"),
        ("baudio", "15000/2000/3000 x 100"),
    ],
)
def test_real_binary_density(shelf, name, shape):
    if not (shelf / "binary_density").is_dir():
        pytest.skip("set PVAE_DATA to a folder with binary_density")
    data = load(name)
    assert data.description() == f"{name}: {shape}, binary (none), original 0..1"
    _, hashes, line = named._DENSITY_SETS[name]
    assert f"by {data.x_dim} " in line or f"{data.x_dim} bits" in line
    for part in ("train", "valid", "test"):
        split = getattr(data, part)
        assert f"{len(split)} {part}" in line
        bits = split.x.numpy().astype(np.uint8).tobytes()
        assert hashlib.sha256(bits).hexdigest() == hashes[part]


def test_a_folder_of_other_files_is_not_searched_to_its_end(tmp_path, monkeypatch):
    from pvae.data.files import files_below

    monkeypatch.setattr("pvae.data.files._MOST_OTHERS", 5)
    for name in ("a", "b", "c", ".hidden"):
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number}.txt").touch()
    (tmp_path / "c" / "x.png").touch()
    assert not files_below(tmp_path, (".png",))
    (tmp_path / "a" / "y.PNG").touch()
    (tmp_path / ".hidden" / "z.png").touch()
    assert files_below(tmp_path, (".png",)) == [tmp_path / "a/y.PNG", tmp_path / "c/x.png"]


def test_a_whole_disk_is_refused_and_a_folder_named_by_where_it_is(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="is a whole disk"):
        load("/")
    Image = pytest.importorskip("PIL.Image")
    (tmp_path / "faces").mkdir()
    for number in range(12):
        Image.new("L", (4, 4), color=number).save(tmp_path / "faces" / f"{number}.png")
    monkeypatch.chdir(tmp_path / "faces")
    assert load(".").name == "faces"
