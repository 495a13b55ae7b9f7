"""The best recipe's tokens, vocabulary, character n-grams and batches of headlines of one length."""

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PAD, UNKNOWN = 0, 1
START, END = "<s>", "</s>"
MIN_COUNT = 2  # words rarer in the training split share the vector of UNKNOWN
TARGET_MIN_COUNT = 3  # rarer words are no target of the language model
CHAR_BUCKETS = 20_000
CHAR_NGRAMS = (3, 4, 5)
MAX_CHAR_NGRAMS = 60  # of a word
BATCH = 64

_TOKEN = re.compile(r"[^\W\d_]+(?:'(?!s\b)[^\W\d_]+)?|'s\b|\d[\d,.]*|[^\w\s]|_")


def tokenize(text: str) -> list[str]:
    """Words, "'s", numbers (every digit becomes 0) and punctuation marks, between START and END."""
    return [START, *(re.sub(r"\d", "0", token) for token in _TOKEN.findall(text)), END]


def char_ngrams(word: str) -> list[int]:
    """Hashes from 1 on of the character n-grams of <word>, shortest first; START and END have none."""
    if word in (START, END):
        return []
    marked = f"<{word}>"
    grams = (marked[k : k + n] for n in CHAR_NGRAMS for k in range(len(marked) - n + 1))
    return [zlib.crc32(gram.encode()) % CHAR_BUCKETS + 1 for gram in grams][:MAX_CHAR_NGRAMS]


class Vocabulary:
    """Word → index, by frequency.

    size: number of indices, PAD and UNKNOWN among them; indices below `targets` (less PAD and
    UNKNOWN) are the language model's targets.
    """

    def __init__(self, tokens: Sequence[Sequence[str]]) -> None:
        counts = Counter(word for line in tokens for word in line)
        kept = [word for word, n in counts.most_common() if n >= MIN_COUNT]
        self.indices = {word: k for k, word in enumerate(kept, 2)}
        self.size = len(kept) + 2
        self.targets = 2 + sum(counts[word] >= TARGET_MIN_COUNT for word in kept)


@dataclass
class Batch:
    """Headlines of one length, so that nothing is padded or masked."""

    words: Tensor  # (B, T) word indices
    types: Tensor  # (B, T) rows of `grams`
    grams: Tensor  # (distinct words, n-grams) hashed n-grams, padded with 0
    labels: Tensor  # (B,) float

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t.to(device) for t in (self.words, self.types, self.grams, self.labels)))


class Rows:
    """Headlines as indices, with their labels; nothing is fitted to them, n-grams are hashed."""

    def __init__(self, tokens: Sequence[Sequence[str]], labels: Sequence[int], vocabulary: Vocabulary) -> None:
        types = {word: k for k, word in enumerate(sorted({word for line in tokens for word in line}))}
        grams = [torch.tensor(char_ngrams(word), dtype=torch.long) for word in types]
        self.gram_counts = torch.tensor([len(line) for line in grams])
        self.grams = pad_sequence(grams, batch_first=True)
        self.words = [torch.tensor([vocabulary.indices.get(word, UNKNOWN) for word in line]) for line in tokens]
        self.types = [torch.tensor([types[word] for word in line]) for line in tokens]
        self.labels = torch.tensor(labels, dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.words)

    def index_batches(self, order: np.random.Generator | None = None) -> list[list[int]]:
        """Rows of each batch; shuffled, and the batches too, where a generator is given."""
        indices = np.arange(len(self)) if order is None else order.permutation(len(self))
        by_length: dict[int, list[int]] = {}
        for k in indices.tolist():
            by_length.setdefault(len(self.words[k]), []).append(k)
        cut = [rows[k : k + BATCH] for rows in by_length.values() for k in range(0, len(rows), BATCH)]
        return cut if order is None else [cut[k] for k in order.permutation(len(cut))]

    def batches(self, order: np.random.Generator | None = None) -> Iterator[Batch]:
        for rows in self.index_batches(order):
            used, inverse = torch.stack([self.types[k] for k in rows]).unique(return_inverse=True)
            width = max(1, int(self.gram_counts[used].max()))
            words = torch.stack([self.words[k] for k in rows])
            yield Batch(words, inverse, self.grams[used, :width], self.labels[rows])
