"""OMNIGLOT, CIFAR-10's binary version and folders of image files."""

from __future__ import annotations

import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import pvae
from pvae.cli import main
from pvae.data import downloads, images
from pvae.data.images import read_cifar10, read_image_folder
from pvae.errors import DataError, OptionError

# --- CIFAR-10 ------------------------------------------------------------------------------------


def archive(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def batch(labels, seed):
    planes = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), np.uint8)
    return np.concatenate([np.array(labels, np.uint8)[:, None], planes], 1)


@pytest.fixture
def small(tmp_path):
    parts = {
        "data_batch_2.bin": batch([3, 4], 2), "data_batch_1.bin": batch([1, 2], 1),
        "test_batch.bin": batch([9], 3),
    }  # fmt: skip
    members = {name: rows.tobytes() for name, rows in parts.items()} | {"readme.html": b"<html>"}
    return archive(tmp_path / "cifar-10-binary.tar.gz", members), parts


def test_cifar10_rows_are_a_label_and_three_planes(small):
    path, parts = small
    arrays = read_cifar10(path)
    assert arrays["train_labels"].tolist() == [1, 2, 3, 4]
    assert arrays["test_labels"].tolist() == [9]
    assert arrays["train"].shape == (4, 3, 32, 32)
    second = parts["data_batch_2.bin"][0]
    assert arrays["train"][2, 1, 5, 7] == second[1 + 1024 + 5 * 32 + 7]  # green, row 5, column 7


@pytest.mark.parametrize(
    ("members", "words"),
    [({"test_batch.bin": bytes(3073)}, "no train batch"),
     ({"data_batch_1.bin": bytes(3073)}, "no test batch"),
     ({"data_batch_1.bin": bytes(3072), "test_batch.bin": bytes(3073)}, "3072 bytes")],
)  # fmt: skip
def test_an_archive_that_lacks_something_is_refused(tmp_path, members, words):
    with pytest.raises(DataError, match=words):
        read_cifar10(archive(tmp_path / "c.tar.gz", members))


def test_a_damaged_archive_is_refused(small):
    path, _ = small
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read as CIFAR-10's binary version"):
        read_cifar10(path)


def test_cifar10_is_downloaded_once_and_its_hash_checked(small, tmp_path, monkeypatch):
    path, _ = small
    content = path.read_bytes()
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(downloads.urllib.request, "urlopen", urlopen)
    monkeypatch.delenv("PVAE_DATA", raising=False)
    root = tmp_path / "cache"
    with pytest.raises(DataError, match="expected c4a38c50"):
        pvae.data.load("cifar-10", root=root)
    assert not list(root.rglob("*.gz"))
    right = images._CIFAR10
    monkeypatch.setattr(
        images, "_CIFAR10",
        downloads.Remote(right.path, right.url, hashlib.sha256(content).hexdigest()),
    )  # fmt: skip
    data = pvae.data.load("cifar-10", root=root, transform="none", valid_fraction=0.25)
    assert data.image_shape == (3, 32, 32)
    assert (data.kind, data.num_levels, len(data.train), len(data.test)) == ("integer", 256, 3, 1)
    pvae.data.load("cifar-10", root=root)
    assert len(asked) == 2


# --- OMNIGLOT ------------------------------------------------------------------------------------


def test_omniglot_keeps_kinds_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("PVAE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="omniglot needs"):
        pvae.data.load("omniglot", root=tmp_path / "none")
    (tmp_path / "omniglot").mkdir()
    draw = np.random.default_rng(0)
    background = draw.integers(0, 256, (3, 20, 28, 28), np.uint8)
    evaluation = draw.integers(0, 256, (2, 20, 28, 28), np.uint8)
    np.savez(
        tmp_path / "omniglot" / "omniglot28_area_derived.npz",
        background=background, evaluation=evaluation,
    )  # fmt: skip
    data = pvae.data.load("omniglot", transform="none")
    assert data.image_shape == (28, 28)
    assert data.test.labels.tolist() == [3] * 20 + [4] * 20
    assert torch.equal(data.test.x[21], torch.tensor(evaluation[1, 1].reshape(-1)).float())


def test_real_omniglot_has_its_published_size(data_root, monkeypatch):
    monkeypatch.setenv("PVAE_DATA", str(data_root))
    data = pvae.data.load("omniglot", transform="none")
    assert len(data.train) + len(data.valid) == 964 * 20
    assert len(data.test) == 659 * 20
    assert 0.03 < float((data.test.x / 255).mean()) < 0.15  # ink is bright, and rare


# --- folders -------------------------------------------------------------------------------------


def picture(path, size=(6, 4), mode="L", value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = int.from_bytes(path.name.encode()[-8:], "big") % 2**32
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    array = array if value is None else np.full_like(array, value)
    Image.fromarray(array).save(path)
    return array


def test_a_folder_is_read_in_order_with_its_sub_folders_as_labels(tmp_path):
    arrays = [picture(tmp_path / kind / f"{k}.png") for kind in ("cat", "dog") for k in range(3)]
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    picture(tmp_path / ".hidden" / "x.png", size=(1, 1))
    found = read_image_folder(tmp_path)
    assert np.array_equal(found["x"], np.stack(arrays))
    assert found["labels"].tolist() == [0, 0, 0, 1, 1, 1]


def test_splits_and_colours_are_kept(tmp_path):
    grey = picture(tmp_path / "train" / "a.png")
    red = picture(tmp_path / "test" / "b.png", mode="RGB")
    found = read_image_folder(tmp_path)
    assert set(found) == {"train", "test"}
    assert np.array_equal(found["train"][0], np.stack([grey] * 3))
    assert np.array_equal(found["test"][0], np.moveaxis(red, -1, 0))


def test_sizes_agree_or_are_brought_together(tmp_path):
    picture(tmp_path / "a.png", value=80)
    picture(tmp_path / "b.png", size=(12, 8), value=90)
    with pytest.raises(DataError, match=r"b.png is 8 x 12 pixels but a.png is 4 x 6: give a size"):
        read_image_folder(tmp_path)
    for size in ((2, 3), "2x3"):
        found = read_image_folder(tmp_path, size)["x"]
        assert found.shape == (2, 2, 3)
        assert (found[0] == 80).all()
        assert (found[1] == 90).all()
    assert read_image_folder(tmp_path, 5)["x"].shape == (2, 5, 5)


@pytest.mark.parametrize("size", [0, "big", (1, 2, 3), "3x-1"])
def test_a_size_that_cannot_be_is_refused(tmp_path, size):
    with pytest.raises(OptionError, match="size is a number of pixels"):
        read_image_folder(tmp_path, size)


def test_unreadable_images_stop_the_run_or_are_left_out_as_asked(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(DataError, match="broken.png cannot be read as an image"):
        read_image_folder(tmp_path)
    with pytest.warns(UserWarning, match="left out") as caught:
        assert len(read_image_folder(tmp_path, unreadable="skip")["x"]) == 1
    assert len(caught) == 2
    assert all("\n" not in str(each.message) for each in caught)
    with pytest.raises(OptionError, match="'stop' or 'skip'"):
        read_image_folder(tmp_path, unreadable="maybe")


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no image file"):
        pvae.data.load(tmp_path)


def test_only_a_folder_can_be_resized():
    with pytest.raises(OptionError, match="for a folder of images"):
        pvae.data.load("digits", size=8)


def test_a_folder_trains_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for k in range(20):
        picture(tmp_path / "photos" / f"{k}.png", size=(9, 7))
    (tmp_path / "photos" / "bad.png").write_bytes(b"no")
    command = ["train", "conv", "--guide", "conv", "--data", "photos", "--epochs", "1"]
    assert main([*command, "--run-dir", "r"]) == 65
    assert "bad.png cannot be read" in capsys.readouterr().err
    options = ["--data.size", "6x8", "--data.unreadable", "skip", "--transform", "none"]
    assert main([*command, *options, "--run-dir", "r"]) == 0
    assert main(["evaluate", "r", "--num-particles", "5"]) == 0
    assert main(["sample", "r"]) == 0
    config = (tmp_path / "r" / "config.yaml").read_text()
    assert "data_size: 6x8" in config
    assert "discretized_logistic" in config


def test_sixteen_bits_lose_the_lower_eight(tmp_path):
    deep = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    arrays = read_image_folder(tmp_path)
    assert arrays["x"].shape == (1, 8, 8)
    assert np.array_equal(arrays["x"][0], deep >> 8)
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "deeper.tif")
    with pytest.raises(DataError, match="32-bit numbers"):
        read_image_folder(tmp_path)


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (200, 10, 10, 255)
    pixels[2:] = (7, 8, 9, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    x = read_image_folder(tmp_path)["x"][0]
    assert x[:, 0, 0].tolist() == [200, 10, 10]
    assert (x[:, 2:] == 255).all()


def test_of_an_animation_the_first_picture_is_taken_with_a_warning(tmp_path):
    frames = [Image.new("L", (4, 4), color) for color in (0, 100, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="1 of 1 files hold several pictures"):
        assert len(read_image_folder(tmp_path)["x"]) == 1


def test_a_size_is_no_larger_than_a_picture(tmp_path):
    with pytest.raises(OptionError, match="up to 16384"):
        read_image_folder(tmp_path, 99_999_999)


def test_black_and_white_images_are_bits(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, (12, 5, 5)).astype(bool)
    for number, image in enumerate(bits):
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
    assert np.array_equal(read_image_folder(tmp_path)["x"], bits)
    assert pvae.data.load(tmp_path).kind == "binary"
