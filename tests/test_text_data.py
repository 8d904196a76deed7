"""Text files and named sets of sequences: words to numbers, padding, and wrong inputs."""

from __future__ import annotations

import gzip
import warnings

import numpy as np
import pytest
import torch

import pvae
from pvae.data import text
from pvae.data.sequences import padded

LINES = ["the cat sat", "the dog sat down", "a cat", "the bird", "a dog ran"] * 8


def write(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_vocabulary_is_by_frequency_then_alphabet_and_of_training_alone(tmp_path):
    assert text.build_vocabulary(["b a b", "c b a"]) == ("<pad>", "<eos>", "<unk>", "b", "a", "c")
    assert text.build_vocabulary(["b a b", "c b a"], min_count=2)[3:] == ("b", "a")
    assert text.build_vocabulary(["b a b", "c b a"], max_size=4)[3:] == ("b",)
    assert text.build_vocabulary(["<unk> a <unk>"])[3:] == ("a",)
    with pytest.warns(UserWarning, match="1 of 2 words of valid and test are not in"):
        arrays = text.sentences("t", {"train": ["a b"], "valid": ["a"], "test": ["zebra"]})
    assert "zebra" not in arrays["vocabulary"]
    assert arrays["test"].tolist() == [[2, 1, 0]]


def test_words_come_back_as_they_were():
    vocabulary = text.build_vocabulary(LINES)
    x = torch.from_numpy(text.encode(LINES, vocabulary))
    assert text.words_of(x, vocabulary) == LINES
    assert (x == 1).sum(1).eq(1).all()  # each sentence ends once
    cut = torch.tensor([[3, 4]])  # a sentence without its end
    assert len(text.words_of(cut, vocabulary)[0].split()) == 2


def test_a_text_file_is_a_data_set(tmp_path):
    dataset = pvae.data.load(write(tmp_path / "mine.txt", LINES))
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (28, 4, 8)
    assert dataset.padding == 0
    assert dataset.x_dim == 5
    assert dataset.num_levels == len(dataset.vocabulary)
    words = sorted(
        line
        for split in (dataset.train, dataset.valid, dataset.test)
        for line in text.words_of(split.x, dataset.vocabulary)
    )
    assert words == sorted(LINES)
    again = pvae.data.load(tmp_path / "mine.txt")
    assert torch.equal(dataset.train.x, again.train.x)
    counted = float((dataset.test.x != 0).sum()) / 8
    bits = dataset.bits_per_dim(torch.tensor(-10.0))
    assert float(bits) == pytest.approx(10 / counted / np.log(2))


def test_bits_per_dim_of_a_uniform_density_leave_the_padding_out_everywhere(tmp_path):
    dataset = pvae.data.load(write(tmp_path / "mine.txt", LINES))

    class Uniform(torch.nn.Module):
        def log_evidence(self, x):
            return -np.log(8) * (x != 0).sum(1)

    for split in (dataset.train, dataset.valid, dataset.test):
        log_p = Uniform().log_evidence(split.x).double().mean()
        assert float(dataset.bits_per_dim(log_p, split)) == pytest.approx(3)
    board = pvae.compare({"uniform": Uniform()}, dataset)
    assert board["uniform"].bits_per_dim == pytest.approx(3)


def test_empty_lines_are_left_out_with_one_sentence(tmp_path):
    with pytest.warns(UserWarning, match="2 of 42 lines are empty and left out"):
        dataset = pvae.data.load(write(tmp_path / "mine.txt", [*LINES, "", "   "]))
    assert len(dataset.train) + len(dataset.valid) + len(dataset.test) == 40


def test_compressed_text_and_byte_order_marks_are_read(tmp_path):
    path = tmp_path / "mine.txt.gz"
    path.write_bytes(gzip.compress("\ufeffa b\nc\n".encode()))
    assert text.read_lines(path) == ["a b", "c"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\xff\xfe\x00", "not text in UTF-8"),
        (b"\n \n", "has no sentence"),
        (b"one\n", "expected at least"),
        (None, "cannot be read"),
    ],
)
def test_wrong_text_files_are_one_sentence(tmp_path, content, match):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(pvae.PvaeError, match=match) as caught:
        pvae.data.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", [{"transform": "standardize"}, {"binarize": "fixed"}])
def test_sentences_are_not_transformed(tmp_path, option):
    path = write(tmp_path / "mine.txt", LINES)
    with pytest.raises(pvae.PvaeError, match="padded sequences"):
        pvae.data.load(path, **option)
    assert pvae.data.load(path, transform="none").kind == "integer"


def test_wrong_numbers_are_one_sentence():
    with pytest.raises(pvae.PvaeError, match="min_count is at least 1"):
        text.build_vocabulary(LINES, min_count=0)
    with pytest.raises(pvae.PvaeError, match="expected at most 2"):
        text.encode(["a b c"], ("<pad>", "<eos>", "<unk>"), 2)
    with pytest.raises(pvae.PvaeError, match="expected 0 to 2"):
        text.words_of(torch.tensor([[7]]), ("<pad>", "<eos>", "<unk>"))


def test_sequences_are_padded_to_one_length():
    arrays = padded({"train": [np.ones((2, 3)), np.zeros((4, 3))], "test": [np.ones((1, 3))]})
    assert arrays["train"].shape == (2, 4, 3)
    assert arrays["test"][0, :, 0].tolist() == [1, -1, -1, -1]
    with pytest.raises(pvae.PvaeError, match="at least one step"):
        padded({"train": [np.ones((2, 3)), np.ones((2, 4))]})
    with pytest.raises(pvae.PvaeError, match="at least one step"):
        padded({"train": [np.ones((0, 3))]})


# NUMBERS of the published tables: without them a comparison would be of something else.
@pytest.mark.parametrize(
    ("name", "counts", "test_steps"),
    [("jsb", (229, 76, 77), 4725), ("nottingham", (694, 173, 170), 44463),
     ("piano-midi", (87, 12, 25), 19036)],
)  # fmt: skip
def test_music_has_the_published_counts(data_root, monkeypatch, name, counts, test_steps):
    monkeypatch.setenv("PVAE_DATA", str(data_root))
    from pvae.data.sources import SOURCES

    arrays = SOURCES[name](None)
    assert tuple(len(arrays[part]) for part in ("train", "valid", "test")) == counts
    assert int((arrays["test"][..., 0] >= 0).sum()) == test_steps
    assert arrays["train"].shape[2] == 88
    assert set(np.unique(arrays["test"])) == {-1, 0, 1}


def test_ptb_is_the_published_file(data_root, monkeypatch):
    monkeypatch.setenv("PVAE_DATA", str(data_root))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every word of valid and test is in the vocabulary
        dataset = pvae.data.load("ptb")
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (42068, 3370, 3761)
    assert int((dataset.test.x != 0).sum()) == 78_669 + 3_761
    assert dataset.num_levels == 10_001  # 9999 words, <unk> among them, the end and padding


def test_a_damaged_named_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PVAE_DATA", str(tmp_path))
    (tmp_path / "ptb").mkdir()
    for part in ("train", "valid", "test"):
        (tmp_path / "ptb" / f"ptb.{part}.txt.gz").write_bytes(gzip.compress(b"not it\n"))
    with pytest.raises(pvae.PvaeError, match="holds text of SHA-256"):
        pvae.data.load("ptb")


def test_special_words_in_a_line_are_words_like_others():
    vocabulary = text.build_vocabulary(["a b", "b <pad> c", "a <eos>"])
    assert vocabulary[:3] == text.SPECIAL
    a, b, c = (vocabulary.index(word) for word in "abc")
    x = text.encode(["a <pad> b", "a <eos>", "c <eos> <unk>"], vocabulary)
    assert x.tolist() == [[a, 2, b, 1], [a, 1, 0, 0], [c, 2, 2, 1]]


def test_other_text_takes_the_vocabulary_and_width_of_the_first(tmp_path):
    lines = ["the cat sat down here"] * 10 + ["a dog"] * 5
    own = pvae.data.load(write(tmp_path / "own.txt", lines))
    other = write(tmp_path / "other.txt", ["dog cat zebra"] * 10)
    with pytest.warns(UserWarning, match=r"10 of 30 words are not in the"):
        found = pvae.data.load(other, like=own)
    assert (found.x_dim, found.vocabulary) == (own.x_dim, own.vocabulary)
    assert pvae.data.text.words_of(found.test.x[:1], own.vocabulary) == ["dog cat <unk>"]
    long = write(tmp_path / "long.txt", ["the cat sat the cat sat the cat"] * 10)
    with pytest.raises(pvae.PvaeError, match="9 words with its end, expected at most 6"):
        pvae.data.load(long, like=own)
    with pytest.raises(pvae.PvaeError, match="like is for a .txt file"):
        pvae.data.load("digits", like=own)
