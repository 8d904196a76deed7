"""Sprites: how frames are composed and numbered, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pvae.data import load, sources
from pvae.data import sprites as named
from pvae.data.sprites import FACTORS, Layer, compose, factors
from pvae.errors import DataError


def test_layers_cover_what_lies_below_as_far_as_they_are_opaque():
    below, above = np.zeros((2, 2, 2, 4), np.uint8)
    below[...] = (200, 100, 40, 255)
    above[0, 0] = (10, 20, 30, 255)
    above[0, 1] = (10, 20, 30, 128)
    image = compose([Layer.of(below), Layer.of(above)], (2, 2))
    assert image[0, 0].tolist() == [10, 20, 30]
    expected = [(c * 128 + b * 127 + 127) // 255 for c, b in ((10, 200), (20, 100), (30, 40))]
    assert image[0, 1].tolist() == expected
    assert image[1].tolist() == [[200, 100, 40]] * 2
    assert compose([Layer.of(above)], (2, 2))[1].max() == 0


def test_labels_are_the_design_in_mixed_radix():
    assert factors(torch.tensor([0])).tolist() == [[0] * 6]
    assert factors(torch.tensor([6**4 * 72 - 1])).tolist() == [[5, 5, 5, 5, 8, 7]]
    character = 2 * 216 + 3 * 36 + 1 * 6 + 4
    assert factors(torch.tensor([(character * 9 + 7) * 8 + 5])).tolist() == [[2, 3, 1, 4, 7, 5]]
    every = factors(torch.arange(6**4 * 72))
    assert len(every.unique(dim=0)) == 6**4 * 72
    assert (every.amax(0) + 1).tolist() == list(FACTORS.values())


@pytest.mark.parametrize("labels", [torch.tensor([-1]), torch.tensor([93312]), torch.tensor([0.5])])
def test_what_is_no_label_is_refused(labels):
    with pytest.raises(DataError, match="from 0 to 93311"):
        factors(labels)


def test_another_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PVAE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="neither in"):
        load("sprites", root=tmp_path)
    (tmp_path / "sprites").mkdir()
    (tmp_path / "sprites" / "sprites_layers.npz").write_bytes(b"something else")
    with pytest.raises(DataError, match="has SHA-256 .* expected 6c1f91e4"):
        load("sprites-32", root=tmp_path)
    assert {"sprites", "sprites-32"} <= set(sources())


def test_the_frames_of_a_few_characters(data_root, monkeypatch):
    """Against the compositing of whole frames in one go, and means of four pixels."""
    path = data_root / "sprites" / "sprites_layers.npz"
    if not path.is_file():
        pytest.skip("no sprites here")
    monkeypatch.setenv("PVAE_DATA", str(data_root))
    monkeypatch.setattr(named, "_TRAIN", 2)
    monkeypatch.setattr(named, "_VALID", 3)
    with np.load(path) as file:
        few = {**file, "train_test_permutation": file["train_test_permutation"][:4]}
    monkeypatch.setattr(np, "load", lambda *_, **__: _Opened(few))
    large, small = named.sprites(None), named.sprites_32(None)
    assert large["train"].shape == (144, 3, 64, 64)
    assert small["test"].shape == (72, 3, 32, 32)
    row = 72 + 4 * 8 + 3  # second character, fifth action, fourth frame
    body, bottom, top, hair, action, frame = factors(torch.from_numpy(large["train_labels"]))[row]
    expected = np.zeros((64, 64, 3), int)
    for name, kind in (("body", body), ("bottomwear", bottom), ("topwear", top), ("hair", hair),
                       ("shoes", 0)):  # fmt: skip
        layer = few[name][int(kind), action, frame].astype(int)
        opacity = layer[..., 3:]
        expected = (layer[..., :3] * opacity + expected * (255 - opacity) + 127) // 255
    assert (large["train"][row].transpose(1, 2, 0) == expected).all()
    means = expected.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(small["train"][row].transpose(1, 2, 0) - means).max() <= 0.5


class _Opened(dict):
    """An opened npz file."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None
