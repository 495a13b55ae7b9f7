"""A kernel for tests of programs that wait for each other: an LSTM whose hidden units are split over them."""

import triton
import triton.language as tl

from lstm_triton.kernels.blocks import dot
from lstm_triton.kernels.cells import lstm_forward

# Each way to get the barrier wrong leaves reads and writes of h that nothing orders.
MUTANTS = ("relaxed", "relaxed release", "relaxed acquire", "none", "early arrival", "one buffer")


@triton.jit
def arrive(counter_ptr, MUTANT: tl.constexpr):
    """Says that all this program wrote may be read."""
    tl.debug_barrier()
    if MUTANT == "relaxed" or MUTANT == "relaxed release":
        tl.atomic_add(counter_ptr, 1, sem="relaxed")
    else:
        tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def wait(counter_ptr, arrivals, rounds, MUTANT: tl.constexpr):
    """Returns once so many have arrived, or after so many rounds; what is left of them, 0 for too late."""
    there = 0
    while (there < arrivals) & (rounds > 0):
        if MUTANT == "relaxed" or MUTANT == "relaxed acquire":
            there = tl.atomic_add(counter_ptr, 0, sem="relaxed")
        else:
            there = tl.atomic_add(counter_ptr, 0, sem="acquire")
        rounds -= 1
    tl.debug_barrier()
    return tl.where(there < arrivals, 0, rounds + 1)


@triton.jit(do_not_specialize=["T", "B", "rounds", "late"])
def forward_kernel(
    gates_ptr,  # (T, B, 4H) input products
    h_ptr,  # (2, B, H) in: the initial h, then scratch; step s reads s % 2 and writes the other
    c_ptr,  # (B, H) in: the initial c; out: the last
    w_ptr,  # (4H, H)
    y_ptr,  # (T, B, H) out
    counter_ptr,  # (groups of the batch) int32 zeros
    failed_ptr,  # (1) int32: out, programs that waited in vain
    T, B, rounds, late,  # how often to look for the others in all; arrivals to wait for beside the true ones
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, MUTANT: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_H units of BLOCK_B rows; those of the same rows meet at a barrier after each step."""
    group = tl.program_id(1)
    counter_ptr += group
    rows = group * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    ks = tl.arange(0, BLOCK_K)
    cell = (rows < B)[:, None] & (units < H)[None, :]
    w_mask = (ks < H)[:, None] & (units < H)[None, :]
    w_at = w_ptr + units[None, :] * H + ks[:, None]
    w_i = tl.load(w_at, mask=w_mask, other=0.0)
    w_f = tl.load(w_at + H * H, mask=w_mask, other=0.0)
    w_g = tl.load(w_at + 2 * H * H, mask=w_mask, other=0.0)
    w_o = tl.load(w_at + 3 * H * H, mask=w_mask, other=0.0)
    cell_at = rows[:, None] * H + units[None, :]
    h_at = rows[:, None] * H + ks[None, :]
    h_mask = (rows < B)[:, None] & (ks < H)[None, :]
    c = tl.load(c_ptr + cell_at, mask=cell, other=0.0)
    for s in range(T):
        source = 0 if MUTANT == "one buffer" else s % 2
        target = 0 if MUTANT == "one buffer" else 1 - s % 2
        h = tl.load(h_ptr + source * B * H + h_at, mask=h_mask, other=0.0)
        g_at = gates_ptr + (s * B + rows)[:, None] * 4 * H + units[None, :]
        a_i = dot(h, w_i, tl.load(g_at, mask=cell, other=0.0), "ieee")
        a_f = dot(h, w_f, tl.load(g_at + H, mask=cell, other=0.0), "ieee")
        a_g = dot(h, w_g, tl.load(g_at + 2 * H, mask=cell, other=0.0), "ieee")
        a_o = dot(h, w_o, tl.load(g_at + 3 * H, mask=cell, other=0.0), "ieee")
        _, _, _, _, c, q = lstm_forward(a_i, a_f, a_g, a_o, c)
        tl.store(y_ptr + s * B * H + cell_at, q, mask=cell)
        if MUTANT == "early arrival":
            arrive(counter_ptr, MUTANT)
        tl.store(h_ptr + target * B * H + cell_at, q, mask=cell)
        if MUTANT != "none":
            if MUTANT != "early arrival":
                arrive(counter_ptr, MUTANT)
            # Who has waited in vain doesn't wait again: a kernel whose programs don't meet ends all the same.
            rounds = wait(counter_ptr, (s + 1) * tl.num_programs(0) + late, rounds, MUTANT)
    tl.store(c_ptr + cell_at, c, mask=cell)
    if rounds == 0:
        tl.atomic_add(failed_ptr, 1, sem="relaxed")
