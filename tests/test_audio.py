"""Sound: spectrograms and back, mel bands, wavs in and out, and a VAE of sounds that end."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import torch

import pvae
from pvae.audio import LogMel, Spectrogram, fit_length, griffin_lim, mel_filterbank, num_frames
from pvae.data import audio as named
from pvae.data import load
from pvae.data.audio import read_wav, read_wav_folder, spoken_digits, write_wav
from pvae.errors import DataError, OptionError, ProgramError
from pvae.guides.forward_backward import ForwardBackward
from pvae.guides.spectrogram import Spectrogram as Guide
from pvae.models.spectrogram import Spectrogram as Model
from pvae.models.vae import VAE
from pvae.models.waveform import Waveform

soundfile = pytest.importorskip("soundfile")


def tone(pitch: float, samples: int = 2048, rate: int = 8000) -> torch.Tensor:
    return 0.3 * torch.sin(2 * math.pi * pitch * torch.arange(samples, dtype=torch.float64) / rate)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# --- spectrograms --------------------------------------------------------------------------------


@pytest.mark.parametrize("size_hop", [(384, 128), (256, 64), (64, 32)])
@pytest.mark.parametrize("shape", [(2048,), (3, 1000), (2, 2, 777)])
def test_a_spectrogram_is_inverted_exactly(size_hop, shape):
    spectrogram, x = Spectrogram(*size_hop), noise(*shape)
    frames = spectrogram(x)
    assert frames.shape == (*shape[:-1], shape[-1] // size_hop[1] + 1, size_hop[0] // 2 + 1)
    assert (spectrogram.inverse(frames, shape[-1]) - x).abs().max() < 1e-10


def test_a_frame_is_the_windowed_sum_of_its_formula():
    spectrogram, x = Spectrogram(64, 16), noise(400)
    t, k = 9, 5
    n = torch.arange(64, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / 64)
    piece = window * x[t * 16 - 32 : t * 16 + 32]
    expected = (piece * torch.exp(-2j * math.pi * k * n / 64)).sum()
    assert (spectrogram(x)[t, k] - expected).abs() < 1e-10


def test_a_wrong_hop_is_no_inverse():
    x = noise(1024)
    frames = Spectrogram(64, 16)(x)
    assert (Spectrogram(64, 32).inverse(frames, 1024) - x).abs().max() > 0.1


def test_griffin_lim_finds_a_clip_of_that_magnitude():
    spectrogram = Spectrogram(256, 64)
    x = torch.stack([tone(440) + tone(1300), noise(2048) * tone(100)])
    wanted = spectrogram(x).abs()

    def miss(clip):
        return (
            (spectrogram(clip).abs() - wanted).square().sum((-2, -1)).sqrt()
        ) / wanted.square().sum((-2, -1)).sqrt()

    few, many = (griffin_lim(wanted, spectrogram, 2048, steps=n) for n in (0, 100))
    assert (miss(many) < 0.2 * miss(few)).all()
    assert miss(many)[0] < 0.05
    assert torch.equal(many, griffin_lim(wanted, spectrogram, 2048, steps=100))


def test_mel_bands_have_unit_sums_and_cover_every_bin_between_them():
    filters = mel_filterbank(40, 384, 8000)
    assert filters.shape == (40, 193)
    assert (filters >= 0).all()
    assert (filters.sum(1) - 1).abs().max() < 1e-12
    assert (filters.sum(0)[1:-1] > 0).all()
    peaks = filters.argmax(1)
    assert (peaks.diff() > 0).all()
    # Evenly spaced in mel: a thousand hertz is a thousand mel, by the scale's definition.
    assert 2595 * math.log10(1 + 1000 / 700) == pytest.approx(1000, abs=0.1)
    with pytest.raises(OptionError, match="200 mel bands are too many for 33 bins"):
        mel_filterbank(200, 64, 8000)


def test_a_tone_lights_its_band_and_white_noise_all_alike():
    mel = LogMel(8000, 2048, bands=20)
    bands = mel(tone(1000))[4:12].mean(0)
    centres = mel.filters @ torch.linspace(0, 4000, 193, dtype=torch.float64)
    assert abs(float(centres[bands.argmax()]) - 1000) < 100
    power = mel(0.1 * noise(400, 2048))[:, 4:12].exp().mean((0, 1))
    expected = 0.01 * float(torch.hann_window(384, dtype=torch.float64).square().sum())
    assert (power[1:-1] / expected - 1).abs().max() < 0.06


def test_log_mel_goes_to_a_sound_of_about_the_same_log_mel():
    mel = LogMel(8000, 2048)
    x = torch.stack([tone(500) + 0.01 * noise(2048), 0.1 * noise(2048)])
    first = mel(x)
    assert first.shape == (2, 16, 40)
    again = mel(mel.inverse(first))
    assert (again - first)[:, 1:-1].abs().mean() < 0.8
    assert (mel(torch.zeros(2048)) == mel.silence).all()
    silent = mel.inverse(first, torch.tensor([8, 16]))
    assert silent[0, 9 * 128 + 192 :].abs().max() < 1e-6 < silent[1, 9 * 128 + 192 :].abs().max()


def test_lengths_count_the_frames_whose_centre_is_sound():
    assert num_frames(torch.tensor([1, 128, 129, 2048]), 128).tolist() == [1, 1, 2, 16]
    clip, kept = fit_length(torch.ones(5), 3)
    assert (clip.tolist(), kept) == ([1, 1, 1], 3)
    clip, kept = fit_length(torch.ones(2), 4)
    assert (clip.tolist(), kept) == ([1, 1, 0, 0], 2)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: Spectrogram(64, 16)(torch.zeros(32)), DataError, "32 samples, expected more than"),
        (lambda: Spectrogram(64, 40), OptionError, "hop at most half"),
        (lambda: LogMel(8000, 2048)(torch.zeros(2000)), DataError, "2000 samples, expected 2048"),
        (lambda: fit_length(torch.zeros(0), 4), DataError, "at least one"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


# --- files ---------------------------------------------------------------------------------------


def test_a_wav_comes_back_and_stereo_is_the_mean(tmp_path):
    clip = tone(440).float().numpy()
    write_wav(tmp_path / "mono.wav", clip, 8000)
    back, rate = read_wav(tmp_path / "mono.wav")
    assert rate == 8000
    assert np.abs(back - clip).max() < 2**-15
    both = np.stack([clip, 0 * clip], 1)
    soundfile.write(tmp_path / "stereo.wav", both, 16000)
    back, rate = read_wav(tmp_path / "stereo.wav")
    assert rate == 16000
    assert np.abs(back - clip / 2).max() < 2**-15
    write_wav(tmp_path / "loud.wav", 3 * clip / np.abs(clip).max(), 8000)
    assert np.abs(read_wav(tmp_path / "loud.wav")[0]).max() == pytest.approx(1, abs=2**-14)


def folder_of_wavs(folder):
    for name, samples, rate in [("a/1", 900, 8000), ("b/2", 600, 8000), ("b/3", 700, 8000)]:
        write_wav(folder / f"{name}.wav", tone(300, samples), rate)
    return folder


def test_a_folder_of_wavs_is_a_data_set(tmp_path):
    arrays = read_wav_folder(folder_of_wavs(tmp_path))
    assert arrays["x"].shape == (3, 900)
    assert arrays["lengths"].tolist() == [900, 600, 700]
    assert arrays["labels"].tolist() == [0, 1, 1]
    assert (int(arrays["rate"]), arrays["x"][1, 600:].max()) == (8000, 0)
    with pytest.warns(UserWarning, match="2 clips are cut to 650 samples"):
        assert read_wav_folder(tmp_path, samples=650)["lengths"].tolist() == [650, 600, 650]
    for number in range(12):
        write_wav(tmp_path / "c" / f"{number}.wav", noise(900) / 9, 8000)
    with pytest.warns(UserWarning, match=r"2 of 15 clips are shorter than 900 .*\(4% of all"):
        dataset = load(tmp_path, transform="none")
    assert (dataset.x_dim, dataset.kind) == (900, "continuous")
    with pytest.raises(OptionError, match="are for images, and .* holds sounds"):
        load(tmp_path, size=8)


def test_a_file_that_was_cut_off_is_left_out(tmp_path):
    whole = write_wav(tmp_path / "whole.wav", tone(440, 900), 8000)
    content = whole.read_bytes()
    (tmp_path / "cut.wav").write_bytes(content[:-600])
    with pytest.raises(DataError, match="cut off: 1800 bytes of samples are promised and 1200"):
        read_wav(tmp_path / "cut.wav")
    with pytest.warns(UserWarning, match="a file is left out: .*cut off"):
        assert len(read_wav_folder(tmp_path)["x"]) == 1
    streamed = content.replace((1800).to_bytes(4, "little"), b"\xff" * 4)
    (tmp_path / "cut.wav").write_bytes(streamed)  # of a recorder that never went back
    assert len(read_wav(tmp_path / "cut.wav")[0]) == 900


def test_files_that_cannot_be_used_are_left_out_with_a_sentence(tmp_path):
    folder_of_wavs(tmp_path)
    (tmp_path / "broken.wav").write_bytes(b"RIFF and then nothing of the sort")
    write_wav(tmp_path / "fast.wav", tone(300, 900), 16000)
    write_wav(tmp_path / "short.wav", tone(300, 20), 8000)
    with pytest.warns(UserWarning, match="a file is left out") as caught:
        arrays = read_wav_folder(tmp_path)
    said = " | ".join(str(each.message) for each in caught)
    assert len(arrays["x"]) == 3
    assert "broken.wav cannot be read as wav" in said
    assert "fast.wav has 16000 samples a second, expected 8000" in said
    assert "short.wav has 20 samples, expected at least 256" in said
    with pytest.raises(DataError, match="no .wav file of 44100 samples a second"), pytest.warns():
        read_wav_folder(tmp_path, rate=44100)
    with pytest.raises(DataError, match="holds no .wav file"):
        read_wav_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is not a file"):
        read_wav(tmp_path / "none.wav")


def test_without_soundfile_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(OptionError, match=r"pip install 'pvae-toolkit\[audio\]'"):
        read_wav(tmp_path / "x.wav")


def test_spoken_digits_are_split_by_recording(data_root, monkeypatch):
    if not (data_root / "fsdd" / "fsdd.npz").is_file():
        pytest.skip("no spoken digits here")
    monkeypatch.setenv("PVAE_DATA", str(data_root))
    arrays = spoken_digits()
    sizes = {part: len(arrays[part]) for part in ("train", "valid", "test")}
    assert sizes == {"train": 2400, "valid": 300, "test": 300}
    for part, size in sizes.items():
        assert np.bincount(arrays[f"{part}_labels"]).tolist() == [size // 10] * 10
        ends = arrays[f"{part}_lengths"]
        assert ends.max() == 6144
        past = np.arange(6144) >= ends[:, None]
        assert np.abs(arrays[part][past]).max() == 0 < np.abs(arrays[part]).max() <= 1
    assert sum(int((arrays[f"{p}_lengths"] == 6144).sum()) for p in sizes) == 73


def test_another_file_of_spoken_digits_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PVAE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="set PVAE_DATA to a folder that holds it"):
        load("fsdd", root=tmp_path)
    (tmp_path / "fsdd").mkdir()
    (tmp_path / "fsdd" / "fsdd.npz").write_bytes(b"something else")
    with pytest.raises(DataError, match="has SHA-256 .* expected b1ab0c92"):
        load("fsdd", root=tmp_path)
    assert named.FSDD_RATE == 8000


# --- the model and its guide ---------------------------------------------------------------------


def small_pair():
    torch.manual_seed(1)
    model = Model(21, image_shape=(7, 3), z_dim=2, channels=(4, 5), padding=-9.0).double()
    return model, Guide(model, channels=(4, 5), width=8).double()


def test_shapes_and_what_stands_after_the_end():
    model, guide = small_pair()
    torch.manual_seed(2)
    x, lengths = model(size=50)
    assert (x.shape, lengths.shape) == ((50, 21), (50,))
    assert int(lengths.min()) >= 1
    assert int(lengths.max()) <= 7
    past = ~model.mask(lengths)
    assert (x.reshape(50, 7, 3)[past] == -9).all()
    assert (x.reshape(50, 7, 3)[~past] != -9).all()
    mean, ends = model.mean(torch.zeros(4, 2, 2, dtype=torch.float64))
    assert (mean.shape, ends.shape) == ((4, 2, 7, 3), (4, 2))


def test_the_density_is_that_of_its_formula_and_blind_to_padding():
    model, guide = small_pair()
    x, lengths = model(size=4)
    particles = pvae.draw(model, guide, (x, lengths), 3)
    z = particles.values["z"]
    loc, noise_scale = model.decoder(z), model.log_noise.exp()
    normal = torch.distributions.Normal(loc, noise_scale)
    steps = normal.log_prob(x.reshape(4, 7, 3)).sum(-1)
    expected = torch.stack([steps[:, b, :n].sum(-1) for b, n in enumerate(lengths)], 1)
    expected += model.ending(z).log_softmax(-1)[:, range(4), lengths - 1]
    expected += torch.distributions.Normal(0, 1).log_prob(z).sum(-1)
    expected -= guide.posterior(x, lengths)["z"].log_prob(z)
    assert (particles.log_weights - expected).abs().max() < 1e-10
    other = torch.where(model.mask(lengths)[..., None], x.reshape(4, 7, 3), 5.0).flatten(1)
    torch.manual_seed(0)
    first = pvae.draw(model, guide, (x, lengths), 3).log_weights
    torch.manual_seed(0)
    assert torch.equal(pvae.draw(model, guide, (other, lengths), 3).log_weights, first)


def test_a_model_that_forgets_where_sounds_end_is_caught(monkeypatch):
    """The check above fails for it."""
    model, guide = small_pair()
    x, lengths = model(size=4)[0], torch.tensor([2, 3, 1, 5])
    other = torch.where(model.mask(lengths)[..., None], x.reshape(4, 7, 3), 5.0).flatten(1)
    monkeypatch.setattr(model, "mask", lambda n: torch.ones(*n.shape, 7, dtype=torch.bool))
    found = []
    for batch in (x, other):
        torch.manual_seed(0)
        found.append(pvae.draw(model, guide, (batch, lengths), 3).log_weights)
    assert not torch.allclose(*found)


def test_staged_training_is_eager_training():
    histories = []
    for engine in ("eager", "staged"):
        model, guide = small_pair()
        torch.manual_seed(3)
        batch = tuple(part.detach() for part in small_pair()[0](size=24))
        run = pvae.fit(
            model, guide, batch, epochs=3, batch_size=8, engine=engine, lr=1e-2, progress=False
        )
        assert run.engine.startswith(engine)
        histories.append([row["bound"] for row in run.history])
    assert histories[0] == pytest.approx(histories[1], rel=1e-8)


def test_programs_that_do_not_fit_say_so():
    with pytest.raises(ProgramError, match="spectrograms that end, which VAE does not generate"):
        Guide(VAE(6))
    with pytest.raises(OptionError, match="spectrogram of 6 numbers"):
        Model(6, image_shape=(4, 2))
    with pytest.raises(OptionError, match="channels are"):
        Model(6, channels=())


# --- samples, frame by frame ---------------------------------------------------------------------


def waveform_pair():
    torch.manual_seed(1)
    model = Waveform(20, image_shape=(5, 4), z_dim=2, width=6).double()
    return model, ForwardBackward(model, hidden=5).double()


def test_the_density_of_samples_is_that_of_its_formula():
    model, guide = waveform_pair()
    torch.manual_seed(2)
    x, lengths = model(size=3).detach(), torch.tensor([5, 2, 4])
    assert x.shape == (3, 20)
    particles = pvae.draw(model, guide, (x, lengths), 2)
    z, frames = particles.values["z"], x.reshape(3, 5, 4)
    normal, expected = torch.distributions.Normal, torch.zeros(2, 3, dtype=torch.float64)
    for row, length in enumerate(lengths):
        state, before = model.start.expand(2, 2), torch.zeros(2, 4, dtype=torch.float64)
        for t in range(length):
            step = normal(*model.transition(state)).log_prob(z[:, row, t]).sum(-1)
            state = z[:, row, t]
            loc = model.emission(torch.cat([state, 4 * before], -1))
            scale = model.loudness(state).exp() + 1e-3
            step = step + normal(loc, scale).log_prob(frames[row, t]).sum(-1)
            expected[:, row] += step
            before = frames[row, t].expand(2, 4)
    expected = expected - guide.posterior(x, lengths)["z"].log_prob(z)
    assert (particles.log_weights - expected).abs().max() < 1e-9


def test_sounds_generated_and_scored_have_one_density():
    """What is drawn frame by frame is scored all at once, under the same states."""
    model, _ = waveform_pair()
    trace = pyro.poutine.trace(model).get_trace(size=4)
    x, z = trace.nodes["_RETURN"]["value"], trace.nodes["z"]["value"]
    drawn = sum(
        site["fn"].log_prob(site["value"])
        for name, site in trace.nodes.items()
        if name.startswith("x_")
    )
    again = pyro.poutine.trace(pyro.poutine.condition(model, {"z": z})).get_trace(x)
    assert torch.allclose(again.nodes["x"]["fn"].log_prob(x), drawn)
    shuffled = x.reshape(4, 5, 4).flip(1).flatten(1)  # frames that no longer follow each other
    assert not torch.allclose(again.nodes["x"]["fn"].log_prob(shuffled), drawn)


def test_a_sound_is_cut_into_frames_where_none_are_asked_for():
    for samples, frames in ((20, (20, 1)), (600, (100, 6)), (6144, (96, 64)), (65536, (128, 512))):
        model = Waveform(samples, z_dim=2, width=6)
        assert (model.length, model.num_features) == frames
    with pytest.raises(OptionError, match="cut the clips to a multiple of 96"):
        Waveform(2371)


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    path = write_wav(tmp_path / "a.wav", tone(440, 900), 8000)
    monkeypatch.setattr(named, "_require_whole", refuse)
    with pytest.raises(DataError, match="a.wav cannot be read as wav .*Permission denied"):
        read_wav(path)


def test_staged_training_of_waveforms_is_eager_training():
    histories = []
    for engine in ("eager", "staged"):
        model, guide = waveform_pair()
        torch.manual_seed(3)
        x = waveform_pair()[0](size=16).detach()
        batch = (x, torch.arange(16) % 5 + 1)
        run = pvae.fit(
            model, guide, batch, epochs=2, batch_size=8, engine=engine, lr=1e-2, progress=False
        )
        assert run.engine.startswith(engine)
        histories.append([row["bound"] for row in run.history])
    assert histories[0] == pytest.approx(histories[1], rel=1e-8)
    with pytest.raises(OptionError, match="a sound of 20 samples"):
        Waveform(20, image_shape=(5, 5))
