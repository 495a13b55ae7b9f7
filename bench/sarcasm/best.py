"""The best recipe: one bidirectional LSTM trained from scratch in two phases on the training split.

Phase 1 trains the model as a language model: the LSTM's forward half predicts the next word, its
backward half the previous one, among the batch's targets and random negatives. Phase 2 trains it as
the classifier, with vectors of hashed word bigrams added to the input; a moving average over this
phase is the final model.

The recipe was chosen on 90/10 cuts of the training split alone (the report has the figures), then
frozen. The test split is evaluated once a seed, at the very end, and nothing is chosen by it; the
vocabulary is built on the training split. EPOCHS and --epochs are those of phase 2: the learning
rate decays over them. Phase 1 always has LM_EPOCHS.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.sarcasm import cells
from bench.sarcasm.best_text import CHAR_BUCKETS, PAD, UNKNOWN, Batch, Rows, Vocabulary, tokenize
from bench.sarcasm.data import Headlines
from bench.sarcasm.published import split_facts, verified_split
from lstm_triton import TritonLSTM

NAME = "best"
EPOCHS = 4
LM_EPOCHS = 4
LM_LEARNING_RATE = 3e-3
LM_NEGATIVES = 500
LEARNING_RATE = 2e-3
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
WARM_UP = 100  # steps
LOWEST_FACTOR = 0.02  # of the learning rate
CLIP_NORM = 1.0
AVERAGE_DECAY = 0.995
LABEL_SMOOTHING = 0.05
EMBEDDING = 128
HIDDEN = 128
BIGRAM_BUCKETS = 40_000
EMBEDDING_STD = 0.1  # twice that for character n-grams, half for bigrams
WORD_DROPOUT = 0.1  # words read as UNKNOWN; their character n-grams stay
INPUT_DROPOUT = 0.4  # one mask for all words of a headline
BIGRAM_DROPOUT = 0.3  # whole vectors
OUTPUT_DROPOUT = 0.5


class Corpus:
    """The data set as the model sees it.

    train, test: Rows; vocabulary: of the training split.
    """

    def __init__(self, headlines: Headlines) -> None:
        tokens = [tokenize(text) for text in headlines.texts]
        train, test = verified_split(headlines)
        self.vocabulary = Vocabulary([tokens[k] for k in train])
        self.train, self.test = (
            Rows([tokens[k] for k in rows], [headlines.labels[k] for k in rows], self.vocabulary)
            for rows in (train, test)
        )
        self.facts = {
            **split_facts(headlines, train, test),
            "vocabulary": self.vocabulary.size,
            "unknown_test_tokens_percent": 100 * float((torch.cat(self.test.words) == UNKNOWN).double().mean()),
            "parameters": sum(p.numel() for p in Classifier(self.vocabulary).parameters()),
            "language_model_epochs": LM_EPOCHS,
            "test_evaluations_per_seed": 1,
            "note": (
                f"epochs counts phase 2 (classification) alone; phase 1 has {LM_EPOCHS}. The test split is evaluated "
                "once a seed, after the last epoch: best_accuracy and last_accuracy are both that one figure. "
                "seconds_per_epoch is training alone, over both phases."
            ),
        }


class Classifier(nn.Module):
    """Vectors of words, character n-grams and bigrams, a bidirectional LSTM, its max and mean over time, Linear.

    `forward` takes a Batch and returns (B,) logits of label 1; `language_loss` is phase 1's.
    """

    def __init__(self, vocabulary: Vocabulary, backend: str = "auto") -> None:
        super().__init__()
        self.targets = vocabulary.targets
        self.word = nn.Embedding(vocabulary.size, EMBEDDING, padding_idx=PAD)
        self.char = nn.EmbeddingBag(CHAR_BUCKETS + 1, EMBEDDING, mode="mean", padding_idx=0)
        self.bigram = nn.Embedding(BIGRAM_BUCKETS, EMBEDDING)
        nn.init.normal_(self.word.weight, std=EMBEDDING_STD)
        nn.init.normal_(self.char.weight, std=2 * EMBEDDING_STD)
        nn.init.normal_(self.bigram.weight, std=0.5 * EMBEDDING_STD)
        with torch.no_grad():
            self.word.weight[:2] = 0
            self.char.weight[0] = 0
        self.lstm = TritonLSTM(EMBEDDING, HIDDEN, batch_first=True, bidirectional=True, backend=backend)
        self.linear = nn.Linear(4 * HIDDEN, 1)
        # Phase 1 alone uses these.
        self.next = nn.Linear(HIDDEN, EMBEDDING)
        self.previous = nn.Linear(HIDDEN, EMBEDDING)
        self.target_weight = nn.Parameter(torch.randn(vocabulary.targets, EMBEDDING) * 0.05)
        self.target_bias = nn.Parameter(torch.zeros(vocabulary.targets))

    def forward(self, batch: Batch) -> Tensor:
        h = self.states(batch, with_bigrams=True)
        pooled = torch.cat([h.max(dim=1).values, h.mean(dim=1)], dim=1)
        return self.linear(F.dropout(pooled, OUTPUT_DROPOUT, self.training)).squeeze(1)

    def states(self, batch: Batch, with_bigrams: bool) -> Tensor:
        """The LSTM's output, (B, T, 2 * HIDDEN)."""
        words = batch.words
        if self.training:
            words = words.masked_fill(torch.rand(words.shape, device=words.device) < WORD_DROPOUT, UNKNOWN)
        x = self.word(words) + self.char(batch.grams)[batch.types]
        if with_bigrams:
            x = x + self.bigrams(words)
        if self.training:
            keep = 1 - INPUT_DROPOUT
            x = x * (torch.rand(x.size(0), 1, x.size(2), device=x.device) < keep) / keep
        return self.lstm(x)[0]

    def bigrams(self, words: Tensor) -> Tensor:
        """(B, T, EMBEDDING) vectors of (previous word, word); zero where either is unknown, and at the first."""
        left, right = words[:, :-1], words[:, 1:]
        vectors = self.bigram((left * 1_000_003 + right * 7_919) % BIGRAM_BUCKETS)
        keep = (left != UNKNOWN) & (right != UNKNOWN)
        if self.training:
            keep = keep & (torch.rand(keep.shape, device=keep.device) > BIGRAM_DROPOUT)
        return F.pad(vectors * keep.unsqueeze(-1), (0, 0, 1, 0))

    def language_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Mean cross entropy of the next and the previous word, and over how many words it is.

        Bigrams stay out: they would show the backward half its target.
        """
        ahead, back = self.states(batch, with_bigrams=False).chunk(2, dim=-1)
        z = torch.cat([self.next(ahead[:, :-1]).flatten(0, 1), self.previous(back[:, 1:]).flatten(0, 1)])
        targets = torch.cat([batch.words[:, 1:].flatten(), batch.words[:, :-1].flatten()])
        wanted = (targets != UNKNOWN) & (targets < self.targets)
        z, targets = z[wanted], targets[wanted]
        negatives = torch.randint(2, self.targets, (LM_NEGATIVES,), device=targets.device)
        candidates = torch.cat([targets, negatives]).unique()
        logits = F.linear(z, self.target_weight[candidates], self.target_bias[candidates])
        return F.cross_entropy(logits, torch.searchsorted(candidates, targets)), len(targets)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy against the smoothed labels."""
    return F.binary_cross_entropy_with_logits(logits, labels * (1 - 2 * LABEL_SMOOTHING) + LABEL_SMOOTHING)


def learning_rate_factor(step: int, total: int) -> float:
    """Linear warm-up times cosine decay, never below LOWEST_FACTOR."""
    warm_up = min(1.0, (step + 1) / WARM_UP)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    return max(LOWEST_FACTOR, warm_up * cosine)


class Training:
    """One seed's training; `state_dict` has all that going on after an interruption needs, less torch's generators.

    Args:
        corpus: the data.
        seed: fixes initialisation, order of the batches, dropout and negatives.
        backend: TritonLSTM's.
        device: where the model runs.
        epochs: of phase 2.
        cell: the recipe has the LSTM alone; ValueError for another one.
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
        if cell != cells.LSTM:
            raise ValueError(f"the cell is {cells.LSTM!r} here, got {cell!r}")
        torch.manual_seed(seed)
        self.order = np.random.default_rng(seed)
        self.corpus, self.device = corpus, device
        self.model = Classifier(corpus.vocabulary, backend).to(device)
        self.optimizer = self.fresh_optimizer()
        self.average: dict[str, Tensor] = {}  # of the weights, in phase 2
        self.batches_per_epoch = len(corpus.train.index_batches())
        self.done, self.total_epochs = 0, LM_EPOCHS + epochs

    def fresh_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)

    def epoch(self, advance: Callable[[], None]) -> dict[str, float]:
        """The next epoch's row of results; calls `advance` after each batch. The last one tests, too."""
        begin = time.perf_counter()
        self.model.train()
        if self.done < LM_EPOCHS:
            row = {"phase": 1.0} | self.language_epoch(advance)
        else:
            if self.done == LM_EPOCHS:
                self.optimizer = self.fresh_optimizer()
                self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
            row = {"phase": 2.0} | self.classifier_epoch(advance)
        self.done += 1
        row["seconds"] = time.perf_counter() - begin
        if self.done == self.total_epochs:
            self.model.load_state_dict(self.average)
            row["test_accuracy"] = self.test()
        return row

    def language_epoch(self, advance: Callable[[], None]) -> dict[str, float]:
        loss_sum, count = 0.0, 0
        first, total = self.done * self.batches_per_epoch, LM_EPOCHS * self.batches_per_epoch
        for step, batch in enumerate(self.corpus.train.batches(self.order), first):
            loss, words = self.model.language_loss(batch.to(self.device))
            self.update(loss, LM_LEARNING_RATE * learning_rate_factor(step, total))
            loss_sum, count = loss_sum + loss.item() * words, count + words
            advance()
        return {"train_loss": loss_sum / count}

    def classifier_epoch(self, advance: Callable[[], None]) -> dict[str, float]:
        loss_sum, correct = 0.0, 0
        first = (self.done - LM_EPOCHS) * self.batches_per_epoch
        total = (self.total_epochs - LM_EPOCHS) * self.batches_per_epoch
        for step, batch in enumerate(self.corpus.train.batches(self.order), first):
            batch = batch.to(self.device)
            logits = self.model(batch)
            loss = classification_loss(logits, batch.labels)
            self.update(loss, LEARNING_RATE * learning_rate_factor(step, total))
            decay = min(AVERAGE_DECAY, (step + 2) / (step + 11))
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
            loss_sum, correct = loss_sum + loss.item() * len(logits), correct + right(logits, batch.labels)
            advance()
        count = len(self.corpus.train)
        return {"train_loss": loss_sum / count, "train_accuracy": 100 * correct / count}

    def update(self, loss: Tensor, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()

    @torch.no_grad()
    def test(self) -> float:
        """Accuracy (percent) on the test split."""
        self.model.eval()
        batches = (batch.to(self.device) for batch in self.corpus.test.batches())
        return 100 * sum(right(self.model(batch), batch.labels) for batch in batches) / len(self.corpus.test)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "done": self.done,
            "order": self.order.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = {name: value.to(self.device) for name, value in state["average"].items()}
        self.done = state["done"]
        self.order.bit_generator.state = state["order"]


def right(logits: Tensor, labels: Tensor) -> int:
    """How many logits are on their label's side."""
    return int(((logits > 0) == (labels > 0.5)).sum())
