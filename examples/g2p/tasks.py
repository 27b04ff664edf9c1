"""The tasks: CMUdict, and a generated task of long sequences. Both map a string to symbols."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import data
from .data import Split, Vocabulary, Words

CMUDICT, REVERSE = "cmudict", "reverse-words"

# Sizes of the generated task.
_SENTENCES = Split(20_000, 500, 500)
_CHARACTERS = (80, 200)  # of a sentence
_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwz", "aeiou"


@dataclass(frozen=True)
class Task:
    """``rule`` says how errors are counted."""

    name: str
    parts: Split
    vocabulary: Vocabulary
    description: str
    rule: str

    @property
    def max_length(self) -> int:
        return longest_output(self.name)

    def fingerprint(self) -> str:
        """A hash of all data that training reads: a checkpoint continues only on the same data."""
        digest = hashlib.sha256()
        for part in (self.parts.train, self.parts.validation):
            digest.update(repr(list(part.items())).encode())
        return digest.hexdigest()[:16]


# The defaults of training that differ between the tasks.
DEFAULTS: dict[str, dict[str, Any]] = {
    CMUDICT: {"batch_size": 128, "epochs": 10},
    REVERSE: {"batch_size": 16, "epochs": 2},
}


def longest_output(name: str) -> int:
    """The number of symbols, the end included, after which a search stops."""
    return {CMUDICT: 40, REVERSE: _CHARACTERS[1] + 20}[name]


def load(name: str, dictionary: Path | None = None, sentences: Split = _SENTENCES) -> Task:
    """Raises ValueError for an unknown name, FileNotFoundError where CMUdict is missing."""
    if name == CMUDICT:
        return _cmudict(dictionary or data.dictionary_file())
    if name == REVERSE:
        return _reverse_words(sentences)
    raise ValueError(f"tasks.load: name must be one of {', '.join(map(repr, DEFAULTS))}, got {name!r}")


def _cmudict(dictionary: Path) -> Task:
    known = data.read_dictionary(dictionary)
    return Task(CMUDICT, data.split(known), Vocabulary(data.phoneme_set(known)), data.DESCRIPTION, data.RULE)


def _reverse_words(sentences: Split) -> Task:
    """Sentences of invented words. Each word is written backwards in its place: "pa lito" -> "ap otil"."""
    generator = random.Random(0)
    parts: Split = Split({}, {}, {})
    seen: set[str] = set()
    for part, count in zip(parts, sentences, strict=True):
        while len(part) < count:
            sentence = _sentence(generator, generator.randint(*_CHARACTERS))
            if sentence not in seen:
                seen.add(sentence)
                part[sentence] = [tuple(" ".join(word[::-1] for word in sentence.split(" ")))]
    letters = " " + "".join(sorted(_CONSONANTS + _VOWELS))
    return Task(
        REVERSE,
        parts,
        Vocabulary(list(letters), letters, separator=""),
        "generated: sentences of 80 to 200 characters, each word of which is to be written backwards",
        "PER: edits / characters. WER: sentences with at least one edit.",
    )


def _sentence(generator: random.Random, length: int) -> str:
    text = ""
    while len(text) < length:
        syllables = (generator.choice(_CONSONANTS) + generator.choice(_VOWELS) for _ in range(generator.randint(1, 4)))
        text += "".join(syllables) + " "
    return text[:length].strip()


def words_of(task: Task, part: str, count: int | None) -> Words:
    """A fixed random subset of a part, or with None all of it."""
    words: Words = getattr(task.parts, part)
    return words if count is None else {word: words[word] for word in data.subset(words, count)}
