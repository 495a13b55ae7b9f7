"""The review's recipe: its tokens, vocabulary, split, batches, model and training."""

import hashlib
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bench.sarcasm import cells
from bench.sarcasm.data import Headlines

NAME = "published"
EPOCHS = 30
VOCABULARY = 1000
MIN_FREQUENCY = 2
UNKNOWN = 0  # the review pads with it, too
LIMIT = 120  # tokens; the longest headline has 60
BATCH = 32
DROPOUT = 0.5
LEARNING_RATE = 1e-3
PARAMETERS = 30_914
SPLIT_SHA256 = "091de9d59815c370f5d1177bc53de7ad295fdb5135a50c7e9b94b50a9a931698"

# torchtext's get_tokenizer("basic_english"), in its order.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\'", " '  "),
        (r"\"", ""),
        (r"\.", " . "),
        (r"<br \/>", " "),
        (r",", " , "),
        (r"\(", " ( "),
        (r"\)", " ) "),
        (r"\!", " ! "),
        (r"\?", " ? "),
        (r"\;", " "),
        (r"\:", " "),
        (r"\s+", " "),
    ]
]


def tokenize(text: str) -> list[str]:
    """The tokens of a headline by torchtext's `basic_english` rules."""
    text = text.lower()
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text.split()


def build_vocabulary(tokens: Iterable[Sequence[str]], size: int = VOCABULARY) -> dict[str, int]:
    """Token → index for the `size - 1` most frequent, ties by the token; index 0 is `<UNK>`."""
    counts = Counter(token for line in tokens for token in line)
    frequent = sorted((-n, token) for token, n in counts.items() if n >= MIN_FREQUENCY)[: size - 1]
    return {"<UNK>": UNKNOWN} | {token: k for k, (_, token) in enumerate(frequent, 1)}


def split(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Training and test indices, stratified by label."""
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=123)
    return list(train), list(test)


def verified_split(headlines: Headlines) -> tuple[list[int], list[int]]:
    """`split`; RuntimeError where the real data set's is not the review's."""
    train, test = split(headlines.labels)
    if not headlines.synthetic and split_hash(test) != SPLIT_SHA256:
        raise RuntimeError("the train/test split differs from the review's: scikit-learn splits differently")
    return train, test


def split_facts(headlines: Headlines, train: Sequence[int], test: Sequence[int]) -> dict[str, float]:
    """What the summary says of the split."""
    seen = {headlines.texts[k] for k in train}
    ones = sum(headlines.labels[k] for k in test)
    return {
        "train_headlines": len(train),
        "test_headlines": len(test),
        "test_headlines_also_in_train": sum(headlines.texts[k] in seen for k in test),
        "majority_baseline": 100 * max(ones, len(test) - ones) / len(test),
    }


def split_hash(test: Iterable[int]) -> str:
    """sha256 (hex) of the comma-joined sorted test indices."""
    return hashlib.sha256(",".join(map(str, sorted(test))).encode()).hexdigest()


class Corpus:
    """The data set as the model sees it.

    rows: for each headline its token indices, (length,) int64; labels: (headlines,) int64.
    train, test: indices of headlines; vocabulary: token → index.
    """

    def __init__(self, headlines: Headlines) -> None:
        tokens = [tokenize(text)[:LIMIT] for text in headlines.texts]
        self.vocabulary = build_vocabulary(tokens)
        self.rows = [torch.tensor([self.vocabulary.get(token, UNKNOWN) for token in line]) for line in tokens]
        self.labels = torch.tensor(headlines.labels)
        self.train, self.test = verified_split(headlines)
        self.facts = {
            **split_facts(headlines, self.train, self.test),
            "vocabulary": len(self.vocabulary),
            "unknown_tokens_percent": 100 * float((torch.cat(self.rows) == UNKNOWN).double().mean()),
        }

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(rows, longest row) token indices, padded on the right with 0, and (rows,) labels."""
        return pad_sequence([self.rows[k] for k in indices], True, UNKNOWN), self.labels[list(indices)]

    def batches(self, indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of 32 in the order of `indices`; the last one may be smaller."""
        for start in range(0, len(indices), BATCH):
            yield self.batch(indices[start : start + BATCH])


class Classifier(nn.Module):
    """Embedding, two LSTM layers with recurrent dropout, the last h of the top one, Linear.

    `cell` names another one of `bench.sarcasm.cells` in the LSTM's place. `forward` takes (B, T) token
    indices and returns (B, 2) logits. As in the review nothing masks the padding: the state after the
    last padded step is used.
    """

    def __init__(self, backend: str = "auto", cell: str = cells.LSTM) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.rnn = cells.build(cell, 16, 32, num_layers=2, recurrent_dropout=DROPOUT, backend=backend)
        self.linear = nn.Linear(32, 2)
        for name, parameter in self.rnn.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:  # gains and peepholes, which the review has not, stay as their module has them
                nn.init.xavier_uniform_(parameter)
        assert cell != cells.LSTM or sum(p.numel() for p in self.parameters()) == PARAMETERS

    def forward(self, tokens: Tensor) -> Tensor:
        _, state = self.rnn(self.embedding(tokens))
        h = state[0] if isinstance(state, tuple) else state
        return self.linear(F.dropout(h[-1], DROPOUT, self.training))


class Meter:
    """Sums over the batches of a pass."""

    def __init__(self) -> None:
        self.samples = self.correct = 0
        self.batch_means = self.total = 0.0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        mean, rows = float(loss), len(labels)
        self.samples += rows
        self.correct += int((logits.argmax(1) == labels).sum())
        self.batch_means += mean
        self.total += mean * rows

    def results(self, prefix: str) -> dict[str, float]:
        """Mean cross entropy (nats), the review's unit of it, and accuracy (percent).

        The review adds the means of the batches and divides by the number of samples, which is
        the mean cross entropy divided by about the batch size.
        """
        return {
            f"{prefix}_loss": self.total / self.samples,
            f"{prefix}_loss_review": self.batch_means / self.samples,
            f"{prefix}_accuracy": 100 * self.correct / self.samples,
        }


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Adam; fused, for in a step this short PyTorch's loop over the parameters takes as long as the layers."""
    return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)


class Training:
    """One seed's training; `state_dict` has all that going on after an interruption needs, less torch's generators.

    Args:
        corpus: the data.
        seed: fixes initialisation, order of the batches and dropout.
        backend: the layers'.
        device: where the model runs.
        epochs: how many there will be.
        cell: of `bench.sarcasm.cells`.
    """

    def __init__(
        self,
        corpus: Corpus,
        seed: int,
        backend: str,
        device: torch.device,
        epochs: int = EPOCHS,
        cell: str = cells.LSTM,
    ) -> None:
        torch.manual_seed(seed)
        self.corpus, self.device = corpus, device
        self.model = Classifier(backend, cell).to(device)
        self.optimizer = optimizer(self.model)
        # Its own generator: the batches are the same whatever dropout draws, and on whatever device.
        self.order = torch.Generator().manual_seed(seed)
        self.total_epochs = epochs
        self.batches_per_epoch = math.ceil(len(corpus.train) / BATCH) + math.ceil(len(corpus.test) / BATCH)

    def epoch(self, advance: Callable[[], None]) -> dict[str, float]:
        """Trains on all batches, tests, and returns a row of results; calls `advance` after each batch."""
        begin = time.perf_counter()
        shuffled = torch.randperm(len(self.corpus.train), generator=self.order).tolist()
        # As in the review, training accuracy is that met on the way, with dropout on.
        train, test = Meter(), Meter()
        self.model.train()
        for tokens, labels in self.corpus.batches([self.corpus.train[k] for k in shuffled]):
            train.add(*self.step(tokens.to(self.device), labels.to(self.device)))
            advance()
        self.model.eval()
        with torch.no_grad():
            for tokens, labels in self.corpus.batches(self.corpus.test):
                tokens, labels = tokens.to(self.device), labels.to(self.device)
                logits = self.model(tokens)
                test.add(F.cross_entropy(logits, labels), logits, labels)
                advance()
        seconds = time.perf_counter() - begin
        return train.results("train") | test.results("test") | {"seconds": seconds}

    def step(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One training step; returns loss, logits and labels."""
        logits = self.model(tokens)
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach(), logits.detach(), labels

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.set_state(state["order"])
