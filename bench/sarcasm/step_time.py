"""`python -m bench.sarcasm.step_time`: the published recipe's training step against a per-step PyTorch loop.

Both train the same model on the same batches, in turns, in one process; what is compared is forward,
loss, backward and the optimizer's step together.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.environment import environment
from bench.files import write_atomically
from bench.sarcasm import data
from bench.sarcasm.published import DROPOUT, Classifier, Corpus, Training, optimizer

TOLERANCE = 1e-5  # of float32 logits, absolute and relative


class LoopLayer(nn.Module):
    """An LSTM layer as the review writes it: a Python loop over time, autograd's backward.

    `forward` takes (B, T, I) and returns (B, T, H).
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.x_gates = nn.Linear(input_size, 4 * hidden_size)
        self.h_gates = nn.Linear(hidden_size, 4 * hidden_size)

    def forward(self, input: Tensor) -> Tensor:
        h = c = input.new_zeros(input.size(0), self.hidden_size)
        outputs = []
        for x in input.unbind(1):
            gates = self.x_gates(x) + self.h_gates(F.dropout(h, DROPOUT, self.training))
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, 1)


class LoopClassifier(nn.Module):
    """`Classifier` with its weights, written as a per-step loop."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(*model.embedding.weight.shape), nn.Linear(32, 2)
        self.layers = nn.ModuleList([LoopLayer(16, 32), LoopLayer(32, 32)])
        self.embedding.load_state_dict(model.embedding.state_dict())
        self.linear.load_state_dict(model.linear.state_dict())
        weights = model.rnn.state_dict()
        for k, layer in enumerate(self.layers):
            for part, suffix in (("x_gates", "ih"), ("h_gates", "hh")):
                linear = getattr(layer, part)
                linear.load_state_dict({n: weights[f"{n}_{suffix}_l{k}"] for n in ("weight", "bias")})

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.linear(F.dropout(x[:, -1], DROPOUT, self.training))


def measure(headlines: data.Headlines, batches: int, threads: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a training step of both, over the first `batches` of an epoch.

    Raises:
        AssertionError: the two do not give the same logits (without dropout).
    """
    torch.set_num_threads(threads)
    corpus = Corpus(headlines)
    ours, loop = (Training(corpus, 0, "auto", device) for _ in range(2))
    loop.model = LoopClassifier(ours.model).to(device)  # type: ignore[assignment]
    loop.optimizer = optimizer(loop.model)
    order = [corpus.train[k] for k in torch.randperm(len(corpus.train), generator=ours.order).tolist()]
    prepared = [(t.to(device), y.to(device)) for (t, y), _ in zip(corpus.batches(order), range(batches), strict=False)]
    with torch.no_grad():
        logits = [training.model.eval()(prepared[0][0]) for training in (ours, loop)]
    torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=TOLERANCE)
    for training in (ours, loop):
        training.model.train()
    times: dict[str, list[float]] = {"triton_lstm": [], "loop": []}
    warm_up = prepared[:10]
    for k, (tokens, labels) in enumerate([*warm_up, *prepared]):
        pair = [("triton_lstm", ours), ("loop", loop)]
        for name, training in pair if k % 2 else pair[::-1]:
            seconds = timed(training, tokens, labels)
            if k >= len(warm_up):
                times[name].append(seconds)
    result: dict[str, Any] = {"data": headlines.name, "batches": len(prepared), "threads": threads}
    for name, values in times.items():
        fifths = [1000 * seconds for seconds in statistics.quantiles(values, n=5)]
        result[f"{name}_ms"] = {"p20": fifths[0], "median": 1000 * statistics.median(values), "p80": fifths[3]}
    result["ratio"] = result["triton_lstm_ms"]["median"] / result["loop_ms"]["median"]
    return result


def timed(training: Training, tokens: Tensor, labels: Tensor) -> float:
    """Seconds of one training step, its work on the device included."""
    cuda = tokens.is_cuda
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    training.step(tokens, labels)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sarcasm.step_time", description=__doc__)
    parser.add_argument("--data", metavar="PATH|synthetic", help="as of python -m bench.sarcasm")
    parser.add_argument("--batches", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both; default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder of step_time.json; default: as of python -m bench.sarcasm")
    args = parser.parse_args()
    try:
        headlines = data.load(args.data)
    except data.DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = measure(headlines, args.batches, args.threads, device)
    out = args.out or data.default_out(headlines)
    result["environment"] = environment()
    write_atomically(out / "step_time.json", json.dumps(result, indent=2) + "\n")
    for name, label in (("triton_lstm", "TritonLSTM(backend='auto')"), ("loop", "per-step PyTorch loop")):
        ms = result[f"{name}_ms"]
        print(f"{label:27} {ms['median']:7.2f} ms a training step (p20 {ms['p20']:.2f}, p80 {ms['p80']:.2f})")
    print(f"ratio of the medians {result['ratio']:.3f} ({headlines.name}, {device.type}, {args.threads} thread(s))")
    return 0


if __name__ == "__main__":
    sys.exit(main())
