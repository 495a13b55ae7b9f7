"""How far a result may be from `nn.LSTM`'s, as (atol, rtol) of tensors scaled to a largest element of 1.

`nn.LSTM` runs in float32 or float64 for the half precisions, so that its own rounding does not add to theirs.
"""

import torch
from torch import Tensor

from lstm_triton.recurrence import rnn_precision

TOLERANCES = {
    "fp64": (1e-9, 1e-9),
    "fp32": (2e-5, 2e-5),
    # A product's operands rounded to 10 bits, as in fp16, in each of T steps.
    "tf32": (4e-3, 4e-3),
    "fp16": (4e-3, 4e-3),
    # h itself is rounded to 8 bits at each step.
    "bf16": (2e-2, 2e-2),
}

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """The name in `DTYPES` of what products are made in: "tf32" for float32 where PyTorch's setting for RNNs allows it.

    Raises:
        ValueError: kernels don't take the dtype.
    """
    if dtype == torch.float32:
        return "tf32" if rnn_precision(device) == "tf32" else "fp32"
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise ValueError(f"kernels take {', '.join(DTYPES)}, got {dtype}")


def excess(found: Tensor, expected: Tensor, atol: float, rtol: float) -> float | None:
    """The largest error of `found`, relative to the largest element of `expected`; None where all are tolerated."""
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    error = (found.to(expected) - expected).abs() / scale
    if (error <= atol + rtol * expected.abs() / scale).all():  # which NaN isn't
        return None
    return error.max().item()
