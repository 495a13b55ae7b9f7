"""What PyTorch's operator does on a GPU, predicted, and what others have measured of LSTMs.

`nn.LSTM`, `nn.GRU` and `nn.RNN` on NVIDIA GPUs are cuDNN's, of which PyTorch picks one of three algorithms
(aten/src/ATen/native/cudnn/RNN.cpp): one that is persistent as ours, one for few hidden units, and the standard one, a
GEMM and a pointwise kernel a step. How they do it isn't public; the times here are those of the same work by the same
constants as in `lstm_triton.gpu.model`. Of GRU and RNN nothing was published to compare them with.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from lstm_triton.gpu.gpus import Gpu
from lstm_triton.gpu.model import (
    CELL_CYCLES,
    OPERATOR_LAUNCH_US,
    Prediction,
    Work,
    between_launches,
    l2_rate,
    predict,
    product_cycles,
    with_surroundings,
)
from lstm_triton.planning import Plan

# By the start of an operator's name: the most hidden units that PyTorch has for few of them, forward and backward.
SMALL = {"lstm": (192, 128), "gru": (192, 128), "rnn": (384, 256)}


class Published(NamedTuple):
    """What others have measured: µs a time step, forward and backward."""

    name: str
    gpu: str  # of `gpus.GPUS`
    batch: int
    steps: int
    hidden: int
    dtype: str
    forward: float
    backward: float
    source: str


_FLASHRNN = "Pöppel, Beck, Hochreiter: FlashRNN, arXiv 2412.07752"
PUBLISHED = (
    Published("nn.LSTM (cuDNN)", "h100", 16, 1024, 768, "fp16", 2.0, 3.1, _FLASHRNN),
    Published("FlashRNN, fused", "h100", 16, 1024, 768, "bf16", 4.8, 8.5, _FLASHRNN),
    Published("Haste", "h100", 16, 1024, 768, "fp32", 18.0, 25.0, _FLASHRNN),
)


def cudnn_algorithm(gpu: Gpu, work: Work, layers: int = 1, backward: bool = False) -> str:
    """Which of cuDNN's algorithms PyTorch takes for a padded batch: "persistent", "small" or "standard"."""
    if work.size != work.hidden:
        return "standard"
    mode = (work.cell.operator or "lstm").partition("_")[0]
    half, single = work.dtype == torch.float16, layers == work.directions == 1
    sizes = work.hidden <= 1024 and work.hidden % 128 == work.features % 128 == 0
    wide = gpu.target != "sm_86" and gpu.sms >= 98
    poor = mode == "gru" or (mode == "rnn" and work.batch >= 96 and work.hidden >= 896)
    if half and single and sizes and wide and work.batch % 8 == 0 and work.batch <= 128 and not poor:
        return "persistent"
    return "small" if work.hidden <= SMALL[mode][backward] else "standard"


def predict_operator(
    gpu: Gpu, work: Work, layers: int = 1, backward: bool = False
) -> tuple[str, Prediction] | tuple[None, None]:
    """The algorithm of PyTorch's operator and a layer's time step by it.

    None on AMD GPUs, whose MIOpen isn't known, and where PyTorch has no operator.
    """
    if not gpu.is_nvidia or not work.has_operator:
        return None, None
    algorithm = cudnn_algorithm(gpu, work, layers, backward)
    if algorithm == "standard":
        return algorithm, two_launches(gpu, work, backward)
    block_k = 1 << (work.hidden - 1).bit_length()
    if algorithm == "small":
        plan = Plan("persistent", 16, max(16, block_k), max(16, block_k), 8)
    else:
        # As many units a program as leave room for all tiles of the batch at a time.
        rows = min(32, -(-work.batch // 16) * 16)
        tiles = -(-work.batch // rows)
        units = next(u for u in (8, 16, 32, 64, 128, 256) if -(-work.hidden // u) * tiles <= gpu.sms)
        plan = Plan("cooperative", rows, units, work.hidden, 4, slices=4)
    found = predict(gpu, plan, work, backward)
    launches = {"launches": 2 * OPERATOR_LAUNCH_US / work.steps}
    return algorithm, Prediction(found.terms | launches)


def two_launches(gpu: Gpu, work: Work, backward: bool = False, launch_us: float = OPERATOR_LAUNCH_US) -> Prediction:
    """A step as a GEMM, which reads all weights, and a pointwise kernel: cuDNN's standard algorithm, Haste."""
    item, rows = work.dtype.itemsize, -(-work.batch // 16) * 16
    numbers = work.products * work.hidden * work.size * work.directions
    weights = numbers * item
    clock = gpu.clock_ghz * 1e3
    from_l2 = weights / (l2_rate(gpu, gpu.sms) * gpu.sms)
    if weights > gpu.l2_mib * 2**20:
        from_l2 = weights / (gpu.memory_gbs / gpu.clock_ghz)
    parts = -(-numbers // gpu.sms)
    terms = {
        "weights from L2": (3 * gpu.l2.cycles + from_l2) / clock,
        "arithmetic": product_cycles(gpu, work, rows, 64, -(-parts // 64), 1, 8) / clock,
        "pointwise": (CELL_CYCLES["backward" if backward else "forward"] + gpu.l2.cycles) / clock,
    }
    terms["launches"] = between_launches(gpu, 2, launch_us, sum(terms.values()))
    return Prediction(with_surroundings(gpu, terms, work, backward, 1))


def predict_published(entry: Published, gpu: Gpu, backward: bool) -> Prediction:
    """What the constants say of a published figure's work."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[entry.dtype]
    work = Work(entry.batch, entry.hidden, entry.hidden, entry.hidden, entry.steps, dtype)
    if entry.name == "Haste":
        return two_launches(gpu, work, backward)
    if entry.name.startswith("nn.LSTM"):
        found = predict_operator(gpu, work, backward=backward)[1]
        assert found is not None
        return found
    # FlashRNN splits the sum of a product over programs, too: a barrier more, and what it orders.
    found = predict(gpu, Plan("cooperative", 16, 8, entry.hidden, 4, slices=4), work, backward)
    more = {name: 2 * found.terms[name] for name in ("barrier", "publish")}
    more["h from L2"] = found.terms["h from L2"] + gpu.l2.cycles / gpu.clock_ghz * 1e-3
    return replace(found, terms=found.terms | more)
