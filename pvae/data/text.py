"""Text: one sentence a line, words to numbers by the vocabulary of the training split."""

from __future__ import annotations

import gzip
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pvae.errors import DataError, OptionError

__all__ = ["SPECIAL", "build_vocabulary", "encode", "read_lines", "sentences", "words_of"]

SPECIAL = ("<pad>", "<eos>", "<unk>")  # numbers 0, 1 and 2
_MIN_COUNT = 1
_MAX_WORDS = 2**20  # of a vocabulary: float32 still tells them apart

Lines = Sequence[str]


def read_lines(path: Path) -> list[str]:
    """The sentences of a text file, ``.gz`` or not; blank lines are left out with a warning.

    Raises:
        DataError: the file is missing, is not text in UTF-8, or has no sentence.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not text in UTF-8: save it as that") from None
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read ({reason}): check the path") from None
    lines = text.splitlines()
    kept = [line for line in lines if line.split()]
    if not kept:
        raise DataError(f"{path} has no sentence: give one a line, its words apart by spaces")
    if len(kept) < len(lines):
        warnings.warn(
            f"{path.name}: {len(lines) - len(kept)} of {len(lines)} lines are empty and left out",
            UserWarning,
            stacklevel=2,
        )
    return kept


def build_vocabulary(
    lines: Iterable[str], *, min_count: int = _MIN_COUNT, max_size: int | None = None
) -> tuple[str, ...]:
    """Padding, end and unknown, then the words of ``lines``, the most frequent first.

    Args:
        lines: The training sentences.
        min_count: Words that are rarer are unknown.
        max_size: Most entries, the three special ones counted.

    Raises:
        OptionError: ``min_count`` is below 1 or ``max_size`` below 4.
    """
    if min_count < 1 or (max_size is not None and max_size <= len(SPECIAL)):
        raise OptionError(
            f"min_count is at least 1 and max_size at least {len(SPECIAL) + 1}, got {min_count} "
            f"and {max_size}"
        )
    counts = Counter(word for line in lines for word in line.split())
    for word in SPECIAL:
        counts.pop(word, None)
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    kept = [word for word in ordered if counts[word] >= min_count]
    return (*SPECIAL, *kept[: (max_size or _MAX_WORDS) - len(SPECIAL)])


def _words(line: str) -> list[str]:
    words = line.split()
    return words[:-1] if words and words[-1] == "<eos>" else words


def encode(lines: Lines, vocabulary: Sequence[str], length: int | None = None) -> NDArray[np.int32]:
    """Word numbers with ``<eos>`` at the end of each sentence, padded: ``(N, T)``.

    Args:
        lines: Sentences; a last word ``<eos>`` is their end and not counted twice.
        vocabulary: From :func:`build_vocabulary`; other words are ``<unk>``.
        length: T; that of the longest sentence and its end, if left out.

    Raises:
        DataError: a sentence has more than T words with its end.
    """
    unknown, end = SPECIAL.index("<unk>"), SPECIAL.index("<eos>")
    numbers = {word: number for number, word in enumerate(vocabulary)}
    for word in SPECIAL:  # written in a line, a word that nobody knows
        numbers[word] = unknown
    rows = [[numbers.get(word, unknown) for word in _words(line)] + [end] for line in lines]
    longest = max(map(len, rows))
    if length is not None and longest > length:
        raise DataError(
            f"a sentence has {longest} words with its end, expected at most {length}: shorten it, "
            "or train on text with one as long"
        )
    x = np.zeros((len(rows), length or longest), np.int32)
    for place, row in enumerate(rows):
        x[place, : len(row)] = row
    return x


def sentences(
    name: str,
    parts: Mapping[str, Lines],
    *,
    min_count: int = _MIN_COUNT,
    max_size: int | None = None,
    vocabulary: Sequence[str] | None = None,
    length: int | None = None,
) -> dict[str, NDArray[np.generic]]:
    """The arrays of a set of sentences: a split each, and the vocabulary of ``train``.

    Words that training never saw are ``<unk>``; a warning counts them.

    Args:
        name: Of the set, for the warning.
        parts: ``train``, ``valid`` and ``test`` -> sentences.
        min_count: Words rarer in ``train`` are unknown.
        max_size: Most entries of the vocabulary.
        vocabulary: Another training's, instead of that of ``train``.
        length: See :func:`encode`.

    Raises:
        DataError: a sentence has more words than ``length`` holds.
    """  # fmt: skip
    is_given = vocabulary is not None
    others = [part for part in parts if is_given or part != "train"]
    if vocabulary is None:
        vocabulary = build_vocabulary(parts["train"], min_count=min_count, max_size=max_size)
    length = length or 1 + max(len(_words(line)) for lines in parts.values() for line in lines)
    known = set(vocabulary)
    words = [word for part in others for line in parts[part] for word in _words(line)]
    unseen = sum(word not in known for word in words)
    if unseen:
        warnings.warn(
            f"{name}: {unseen} of {len(words)} words {'' if is_given else 'of valid and test '}are "
            f"not in the vocabulary of train ({len(vocabulary)} entries) and count as <unk>",
            UserWarning,
            stacklevel=2,
        )
    arrays: dict[str, NDArray[np.generic]] = {
        part: encode(lines, vocabulary, length) for part, lines in parts.items()
    }
    return arrays | {"vocabulary": np.array(vocabulary), "padding": np.array(0)}


def words_of(x: Tensor, vocabulary: Sequence[str]) -> list[str]:
    """Word numbers ``(N, T)`` as sentences, each up to its end.

    Raises:
        DataError: a number is not in the vocabulary.
    """
    rows = x.long().tolist()
    if rows and not 0 <= min(map(min, rows)) <= max(map(max, rows)) < len(vocabulary):
        raise DataError(
            f"word numbers go from {min(map(min, rows))} to {max(map(max, rows))}, expected 0 to "
            f"{len(vocabulary) - 1}: give the vocabulary they were made with"
        )
    end = SPECIAL.index("<eos>")
    texts = []
    for row in rows:
        kept = row[: row.index(end)] if end in row else [number for number in row if number]
        texts.append(" ".join(vocabulary[number] for number in kept))
    return texts
