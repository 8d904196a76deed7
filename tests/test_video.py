"""Videos: sprites in motion, swaps that are what they say, files in and out, each engine alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_sprites import _Opened

import pvae
from pvae.data import sprites as named
from pvae.data.sprites import factors, sprites_32, sprites_video
from pvae.data.videos import (
    contact_sheet,
    read_video_folder,
    stack_videos,
    write_gif,
    write_png,
)
from pvae.errors import DataError, OptionError, ProgramError
from pvae.guides.disentangled_sequence import DisentangledSequence as Guide
from pvae.models.disentangled_sequence import DisentangledSequence as Model
from pvae.models.vae import VAE
from pvae.plots.images import as_images, aspect_ratio

SHAPE = (4, 2, 6, 5)


def small_pair(*, context: bool = False):
    torch.manual_seed(1)
    model = Model(240, image_shape=SHAPE, f_dim=3, z_dim=2, channels=(4, 5)).double()
    guide = Guide(model, channels=(4, 5), width=6, context=context).double()
    return model, guide.eval()


def videos(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 240, generator=torch.Generator().manual_seed(2)).double()


def swap(model, guide, looks, moves):
    f, z = guide.posterior(looks)["f"].mean, guide.posterior(moves)["z"].mean
    return model.decode(f, z).mean


# --- the pair ------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [False, True])
def test_shapes(context):
    model, guide = small_pair(context=context)
    x = videos()
    particles = pvae.draw(model, guide, x, 3)
    assert particles.log_weights.shape == (3, 6)
    assert particles.values["f"].shape == (3, 6, 3)
    assert particles.values["z"].shape == (3, 6, 4, 2)
    assert model(size=5).shape == (5, 240)
    assert model.decoder(*(torch.zeros(7, *n).double() for n in ((3,), (9, 2)))).shape == (
        7,
        9,
        *SHAPE[1:],
    )


def test_the_density_is_that_of_its_formula():
    model, guide = small_pair()
    x = videos()
    particles = pvae.draw(model, guide, x, 3)
    f, z = particles.values["f"], particles.values["z"]
    normal = torch.distributions.Normal
    expected = normal(0, 1).log_prob(f).sum(-1)
    before = model.start.expand(3, 6, 2)
    for t in range(4):
        expected = expected + normal(*model.transition(before)).log_prob(z[..., t, :]).sum(-1)
        before = z[..., t, :]
        loc = model.decoder(f, z[..., t : t + 1, :]).flatten(2)
        scale = torch.nn.functional.softplus(model.raw_noise) + 0.01
        frame = x.reshape(6, 4, -1)[:, t]
        expected = expected + normal(loc, scale).log_prob(frame).sum(-1)
    for name, posterior in guide.posterior(x).items():
        expected = expected - posterior.log_prob(particles.values[name])
    assert (particles.log_weights - expected).abs().max() < 1e-8


def test_a_video_swapped_with_itself_is_its_reconstruction_and_a_swap_swaps_back():
    model, guide = small_pair()
    x, y = videos(), videos().flip(0)
    q = guide.posterior(x)
    rebuilt = model.decode(q["f"].mean, q["z"].mean).mean
    assert torch.equal(swap(model, guide, x, x), rebuilt)
    there = swap(model, guide, x, y)
    assert torch.allclose(there, swap(model, guide, y, x).flip(0))
    assert not torch.allclose(swap(model, guide, x, y), rebuilt)
    assert not torch.allclose(swap(model, guide, x, y), swap(model, guide, y, x))


def test_looks_do_not_depend_on_the_order_of_the_frames_and_motion_follows_it():
    model, guide = small_pair()
    x = videos()
    turned = x.reshape(6, *SHAPE).flip(1).flatten(1)
    one, two = guide.posterior(x), guide.posterior(turned)
    assert (one["f"].mean - two["f"].mean).abs().max() < 1e-12
    assert (one["z"].mean - two["z"].mean.flip(1)).abs().max() < 1e-12
    assert not torch.allclose(one["z"].mean, two["z"].mean)


def test_the_check_of_order_catches_looks_that_weigh_the_frames(monkeypatch):
    """It fails for a guide whose looks come from the first half of a video."""
    model, guide = small_pair()
    x = videos()
    turned = x.reshape(6, *SHAPE).flip(1).flatten(1)
    looks = guide.looks
    late = (torch.arange(4) > 1).repeat(6)[:, None, None, None]
    monkeypatch.setattr(guide, "looks", _Scaled(looks, 1 + late))
    found = [guide.posterior(each)["f"].mean for each in (x, turned)]
    assert (found[0] - found[1]).abs().max() > 1e-6


class _Scaled(torch.nn.Module):
    def __init__(self, network, factor):
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x):
        return self.network(x) * self.factor


def test_motion_is_read_in_any_colour():
    """In training through a random mixture, drawn anew; else in grey, so that channels may swap."""
    _, guide = small_pair()
    x = videos()
    swapped = x.reshape(6, *SHAPE).flip(2).flatten(1)
    one, two = guide.posterior(x), guide.posterior(swapped)
    assert (one["z"].mean - two["z"].mean).abs().max() < 1e-12
    assert (one["f"].mean - two["f"].mean).abs().max() > 1e-6
    guide.train()
    first, second = (guide.posterior(x)["z"].mean for _ in range(2))
    assert (first - second).abs().max() > 1e-6


def test_frames_are_read_alone_or_in_context():
    for context in (False, True):
        _, guide = small_pair(context=context)
        x = videos(1).reshape(1, *SHAPE)
        other = x.clone()
        other[:, 3] = 0.5
        change = (
            guide.posterior(x.flatten(1))["z"].mean - guide.posterior(other.flatten(1))["z"].mean
        )
        assert bool(change[:, 3].abs().max() > 0)
        assert bool(change[:, :3].abs().max() > 0) == context


def test_a_frame_is_its_parts_in_their_colours():
    """Pixel by pixel; and looks that make all parts of one colour leave no motion to be seen."""
    model, _ = small_pair()
    decoder, f, z = model.decoder, torch.randn(3, 3).double(), torch.randn(3, 4, 2).double()
    masks = decoder.masks(z)
    assert masks.shape == (3, 4, 24, *SHAPE[2:])
    assert (masks.sum(2) - 1).abs().max() < 1e-12
    frames, colours = decoder(f, z), decoder.colours(f).reshape(3, SHAPE[1], 24)
    expected = sum(colours[:, None, :, k, None, None] * masks[:, :, None, k] for k in range(24))
    assert (frames - expected).abs().max() < 1e-12
    assert frames.std(1).min() > 1e-6
    with torch.no_grad():
        decoder.colours[-1].weight.zero_()
        decoder.colours[-1].bias.fill_(0.3)
    assert (decoder(f, z) - 0.3).abs().max() < 1e-12


def test_a_clip_of_some_frames_is_scored_as_a_video_of_that_length():
    model, guide = small_pair()
    clip = videos().reshape(6, *SHAPE)[:, 1:3].flatten(1)
    torch.manual_seed(1)
    short = Model(120, image_shape=(2, *SHAPE[1:]), f_dim=3, z_dim=2, channels=(4, 5)).double()
    short.load_state_dict(model.state_dict())
    particles = pvae.draw(model, guide, clip, 2)
    assert particles.values["z"].shape == (2, 6, 2, 2)
    torch.manual_seed(0)
    here = pvae.draw(model, guide, clip, 2).log_weights
    torch.manual_seed(0)
    assert torch.equal(here, pvae.draw(short, guide, clip, 2).log_weights)


def test_looks_know_how_high_up_a_colour_is():
    """A patch of one colour, moved down, is another look; moved to the side it is the same."""
    _, guide = small_pair()
    still = torch.zeros(3, *SHAPE, dtype=torch.float64)
    for video, (down, across) in zip(still, ((0, 0), (0, 4), (4, 0)), strict=True):
        video[:, 0, down, across] = 1
    alone = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1), torch.nn.Tanh()).double()
    guide.looks, guide.static = alone, torch.nn.Identity()
    looks = guide.posterior(still.flatten(1))["f"].mean
    assert (looks[0] - looks[1]).abs().max() < 1e-12
    assert (looks[0] - looks[2]).abs().max() > 1e-3


def test_staged_training_is_eager_training():
    histories = []
    for engine in ("eager", "staged"):
        model, guide = small_pair(context=True)
        run = pvae.fit(
            model, guide, videos(16), epochs=3, batch_size=8, engine=engine, lr=1e-2,
            progress=False,
        )  # fmt: skip
        assert run.engine.startswith(engine)
        histories.append([row["bound"] for row in run.history])
    assert histories[0] == pytest.approx(histories[1], rel=1e-6)


def test_programs_that_do_not_fit_say_so():
    with pytest.raises(ProgramError, match="videos with the sites f and z, and those of VAE are z"):
        Guide(VAE(6))
    with pytest.raises(OptionError, match="a video of 240 numbers"):
        Model(240, image_shape=(4, 2, 6, 6))
    with pytest.raises(OptionError, match="channels are"):
        Model(240, image_shape=SHAPE, channels=())
    with pytest.raises(OptionError, match="parts must be at least 1, got 0"):
        Model(240, image_shape=SHAPE, parts=0)
    with pytest.raises(OptionError, match="channels are"):
        Guide(Model(240, image_shape=SHAPE), channels=(0,))


# --- data ----------------------------------------------------------------------------------------


def test_sprites_in_motion(data_root, monkeypatch):
    path = data_root / "sprites" / "sprites_layers.npz"
    if not path.is_file():
        pytest.skip("no sprites here")
    monkeypatch.setenv("PVAE_DATA", str(data_root))
    monkeypatch.setattr(named, "_TRAIN", 2)
    monkeypatch.setattr(named, "_VALID", 3)
    with np.load(path) as file:
        few = {**file, "train_test_permutation": file["train_test_permutation"][:4]}
    monkeypatch.setattr(np, "load", lambda *_, **__: _Opened(few))
    frames, moving = sprites_32(None), sprites_video(None)
    assert moving["train"].shape == (18, 8, 3, 32, 32)
    assert (moving["train"].reshape(-1, 3, 32, 32) == frames["train"]).all()
    shown = factors(torch.as_tensor(moving["test_labels"]))
    assert shown[:, 4].tolist() == list(range(9))
    assert shown[:, 5].tolist() == [0] * 9
    characters = [
        {tuple(row[:4]) for row in factors(torch.as_tensor(moving[f"{part}_labels"])).tolist()}
        for part in ("train", "valid", "test")
    ]
    assert [len(each) for each in characters] == [2, 1, 1]
    assert not set.intersection(*characters)


def test_animations_are_written_and_read(tmp_path):
    x = np.zeros((5, 3, 7, 6), np.float32)
    for t, frame in enumerate(x):
        frame[t % 3, t] = 1
    write_gif(tmp_path / "a.gif", x)
    write_gif(tmp_path / "b.gif", 1 - x)
    found = read_video_folder(tmp_path, frames=4)["x"]
    assert (found.shape, found.dtype) == ((2, 4, 3, 7, 6), np.uint8)
    assert np.abs(found[0] / 255 - x[:4]).max() == 0
    assert np.abs(found[1] / 255 - (1 - x[:4])).max() == 0
    write_gif(tmp_path / "grey" / "large.gif", x[:, :1], zoom=3)
    with Image.open(tmp_path / "grey" / "large.gif") as file:
        assert file.size == (18, 21)
    still = read_video_folder(tmp_path / "grey", frames=5)["x"][0]  # two frames of it are alike
    assert (still == (255 * x[:, :1]).repeat(3, 1).repeat(3, 2).repeat(3, 3)).all()


def test_a_contact_sheet_shows_every_frame_at_its_place(tmp_path):
    x = np.random.default_rng(0).random((2, 3, 3, 4, 5)).astype(np.float32)
    sheet = contact_sheet(x, gap=1)
    assert sheet.shape == (3, 10, 18)
    assert (sheet[:, 5:9, 12:17] == x[1, 2]).all()
    write_png(tmp_path / "sheet.png", sheet, zoom=2)
    with Image.open(tmp_path / "sheet.png") as file:
        assert file.size == (36, 20)


def test_pictures_of_videos_have_their_frames_side_by_side():
    x = np.random.default_rng(0).random((2, 3, 3, 4, 5))
    images = as_images(x.reshape(2, -1), x.shape[1:])
    assert images.shape == (2, 4, 15, 3)
    assert (images[1, :, 5:10] == x[1, 1].transpose(1, 2, 0)).all()
    assert aspect_ratio(x.shape[1:]) == pytest.approx(4 / 15)


def test_files_that_cannot_be_used_are_left_out_with_a_sentence(tmp_path):
    x = np.random.default_rng(0).random((5, 3, 7, 6))
    write_gif(tmp_path / "a.gif", x)
    write_gif(tmp_path / "short.gif", x[:2])
    (tmp_path / "broken.gif").write_bytes(b"GIF89a and no more")
    with pytest.warns(UserWarning, match="a file is left out") as caught:
        assert len(read_video_folder(tmp_path, frames=5)["x"]) == 1
    said = " | ".join(str(each.message) for each in caught)
    assert "short.gif has 2 frames, expected 5" in said
    assert "broken.gif cannot be read as an animated picture" in said
    write_gif(tmp_path / "wide.gif", x.repeat(2, -1))
    with (
        pytest.raises(DataError, match=r"wide.gif has shape \(5, 3, 7, 12\) and .*a.gif"),
        pytest.warns(UserWarning, match="left out"),
    ):
        read_video_folder(tmp_path, frames=5)
    with pytest.raises(DataError, match="no animated picture of 3 frames"):
        read_video_folder(tmp_path / "nowhere", frames=3)
    with pytest.raises(OptionError, match="frames is a number from 1 up"):
        read_video_folder(tmp_path, frames=0)
    with pytest.raises(DataError, match="video 1 has shape"):
        stack_videos([x, x[:3]])
    with pytest.raises(DataError, match="expected \\(frames, channels, height, width\\)"):
        stack_videos([x[0]])
    with pytest.raises(DataError, match="there is no video"):
        stack_videos([])
