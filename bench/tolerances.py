"""How far a provider may be from `nn.LSTM`, as (atol, rtol) of tensors scaled to a largest element of 1.

`nn.LSTM` runs in float32 for the half precisions, so that its own rounding does not add to theirs.
"""

TOLERANCES = {
    "fp64": (1e-9, 1e-9),
    "fp32": (2e-5, 2e-5),
    # A product's operands rounded to 10 bits, as in fp16, in each of T steps.
    "tf32": (4e-3, 4e-3),
    "fp16": (4e-3, 4e-3),
    # h itself is rounded to 8 bits at each step.
    "bf16": (2e-2, 2e-2),
}
