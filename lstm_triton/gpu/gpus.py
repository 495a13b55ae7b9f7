"""GPUs as plans see them: what a chip has, with where each number comes from.

Sizes are what vendors state; cycles and bytes a clock of the L2 are measurements that others have published, and what
nobody has measured is marked as assumed. (3080lab and flash-vla are lblommesteyn/3080lab and revollllt/flash-vla on
GitHub.) `lstm_triton.gpu.model` turns all of it into times.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch

KIB, MIB = 1024, 1024**2
# What CUDA keeps of a program's shared memory for itself (CUDA C++ Programming Guide, compute capabilities).
RESERVED_BYTES = 1 * KIB


class Limits(NamedTuple):
    """What an architecture gives to a multiprocessor (AMD: compute unit) and to a program on it."""

    shared_per_sm: int  # bytes of shared memory (AMD: LDS)
    shared_per_program: int  # bytes, of these
    registers: int  # of 32 bits, of a multiprocessor
    threads: int  # that a multiprocessor holds
    warp: int  # threads of a warp (AMD: wave)


class Cache(NamedTuple):
    """The L2 that programs talk through."""

    cycles: int  # of a load that hits, in the half of the cache that is farther away
    bytes_per_clock: float  # of a multiprocessor, where all of them load


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the tuning guides of
# Ampere, Ada, Hopper and Blackwell. AMD: CDNA 2 and CDNA 3 white papers (LDS, vector registers and waves of a CU).
_LIMITS = {
    "sm_80": Limits(164 * KIB, 163 * KIB, 64 * KIB, 2048, 32),
    "sm_86": Limits(100 * KIB, 99 * KIB, 64 * KIB, 1536, 32),
    "sm_89": Limits(100 * KIB, 99 * KIB, 64 * KIB, 1536, 32),
    "sm_90": Limits(228 * KIB, 227 * KIB, 64 * KIB, 2048, 32),
    "sm_100": Limits(228 * KIB, 227 * KIB, 64 * KIB, 2048, 32),
    "sm_120": Limits(100 * KIB, 99 * KIB, 64 * KIB, 1536, 32),
    "gfx90a": Limits(64 * KIB, 64 * KIB, 128 * KIB, 2048, 64),
    "gfx942": Limits(64 * KIB, 64 * KIB, 128 * KIB, 2048, 64),
}

_CACHES = {
    # Two halves, as sm_90: its far cycles assumed, as of 2026; NVIDIA A100 white paper: 5120 bytes a clock, of which
    # the part that sm_90 reaches of its own peak is assumed.
    "sm_80": Cache(414, 24),
    # 3080lab (RTX 3080): 250 cycles with 45 from place to place; 2.0 to 2.2 TB/s at 1.965 GHz with 68 SMs.
    "sm_86": Cache(272, 15.5),
    # Alpay and Basaran 2026 (arXiv 2606.22588, L40): 222 to 339 cycles. Bytes a clock assumed as sm_86, as of 2026.
    "sm_89": Cache(339, 15.5),
    # Luo et al. 2025 (arXiv 2501.12084, H800): 258.0 near, 414.1 far; 4472 bytes a clock with 114 SMs.
    "sm_90": Cache(414, 39),
    # Both assumed as sm_90 (the mean over both dies that others report, 279 to 324 cycles, bounds what is far only).
    "sm_100": Cache(414, 39),
    # Assumed as sm_89, as of 2026.
    "sm_120": Cache(339, 15.5),
    # Assumed, as of 2026: 128 bytes a clock of each of 16 or 32 channels, by half; cycles of MI210 and MI300X between
    # the L2 of a die and the memory-side cache, through which dies see each other's stores.
    "gfx90a": Cache(300, 10),
    "gfx942": Cache(700, 10),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU, or one die of it where dies are devices of their own."""

    name: str
    target: str  # as of Triton: sm_90, gfx942
    sms: int  # multiprocessors
    clock_ghz: float  # boost
    l2_mib: float
    memory_gbs: float  # GB/s
    tensor_flops: int  # a clock of a multiprocessor: 16-bit operands, float32 sums, dense; float32 as TF32 half of it
    source: str  # of these numbers
    limits: Limits
    l2: Cache

    @property
    def is_nvidia(self) -> bool:
        return self.target.startswith("sm_")

    def programs_per_sm(self, shared_bytes: int, warps: int, registers: int = 255) -> int:
        """How many programs a multiprocessor holds at a time.

        Args:
            shared_bytes: of a program.
            warps: of a program.
            registers: of a thread; the most there can be where it isn't known.
        """
        threads = warps * self.limits.warp
        by_shared = self.limits.shared_per_sm // (shared_bytes + RESERVED_BYTES)
        by_registers = self.limits.registers // (-(-registers // 8) * 8 * threads)
        return min(by_shared, by_registers, self.limits.threads // threads)


class _Chip(NamedTuple):
    target: str
    sms: int
    clock_ghz: float
    l2_mib: float
    memory_gbs: float
    tensor_flops: int
    source: str


# Dense 16-bit products with float32 sums, from the stated TFLOP/s: A100 312, RTX 3090 71, A10 125, L4 121, L40S 362,
# RTX 4090 165, RTX 5090 209. Of sm_90 it is what mma.sync reaches, 63 % of what wgmma does (flash-vla, H100: 2680);
# tiles of few rows take mma.sync. MI210 181, MI250X 191 of a die, MI300X 1307.
_CHIPS = {
    "a100": _Chip("sm_80", 108, 1.410, 40, 2039, 2048, "NVIDIA A100 white paper and data sheet (80 GB, SXM)"),
    "rtx3090": _Chip("sm_86", 82, 1.695, 6, 936, 512, "NVIDIA GA102 white paper"),
    "a10": _Chip("sm_86", 72, 1.695, 6, 600, 1024, "NVIDIA A10 data sheet, GA102 white paper"),
    "l4": _Chip("sm_89", 58, 2.040, 48, 300, 1024, "NVIDIA L4 data sheet"),
    "l40s": _Chip("sm_89", 142, 2.520, 96, 864, 1024, "NVIDIA L40S data sheet"),
    "rtx4090": _Chip("sm_89", 128, 2.520, 72, 1008, 512, "NVIDIA Ada white paper"),
    # The data sheet has no clock; nvidia-smi shows 1980 MHz at most (and 2157 cycles are 1089 ns in flash-vla).
    "h100": _Chip("sm_90", 132, 1.980, 50, 3352, 2680, "NVIDIA H100 white paper and data sheet (SXM)"),
    "h100-pcie": _Chip("sm_90", 114, 1.755, 50, 2039, 2680, "NVIDIA H100 white paper (PCIe)"),
    "h200": _Chip("sm_90", 132, 1.980, 50, 4800, 2680, "NVIDIA H200 data sheet; chip as H100's"),
    "gh200": _Chip("sm_90", 132, 1.980, 50, 4000, 2680, "NVIDIA GH200 data sheet (96 GB); chip as H100's"),
    # Tensor cores through mma.sync, the rest's own instruction being out of reach of few rows: assumed as sm_90's.
    "b200": _Chip("sm_100", 148, 1.965, 126, 7700, 2680, "NVIDIA Blackwell brief; SMs, L2, clocks as devices report"),
    "rtx5090": _Chip("sm_120", 170, 2.407, 96, 1792, 512, "NVIDIA RTX Blackwell white paper"),
    "mi210": _Chip("gfx90a", 104, 1.700, 8, 1638, 1024, "AMD Instinct MI210 data sheet"),
    "mi250x": _Chip("gfx90a", 110, 1.700, 8, 1638, 1024, "AMD Instinct MI250X data sheet, one of two dies"),
    "mi300x": _Chip("gfx942", 304, 2.100, 32, 5300, 2048, "AMD Instinct MI300X data sheet; eight dies of 4 MiB L2"),
}

GPUS = {name: Gpu(name, *chip, _LIMITS[chip.target], _CACHES[chip.target]) for name, chip in _CHIPS.items()}

# Of a GPU that isn't in the table, by target: the one there with the fewest multiprocessors and the slowest memory.
_LIKE = {"sm_80": "a100", "sm_86": "a10", "sm_89": "l4", "sm_90": "h100-pcie", "sm_100": "b200", "sm_120": "rtx5090"}
# Words of the names that drivers give, by which a device is found in the table; the first that fits.
_NAMES = (
    (r"gh200", "gh200"), (r"h200", "h200"), (r"h100.*pcie", "h100-pcie"), (r"h100", "h100"), (r"b200", "b200"),
    (r"a100", "a100"), (r"rtx 3090", "rtx3090"), (r"\ba10\b", "a10"), (r"\bl4\b", "l4"), (r"l40s", "l40s"),
    (r"rtx 4090", "rtx4090"), (r"rtx 5090", "rtx5090"), (r"mi210", "mi210"), (r"mi250", "mi250x"),
    (r"mi300x", "mi300x"),
)  # fmt: skip


def named(name: str) -> Gpu:
    """A GPU by its name in the table, such as "h100", "H100" or "RTX 4090".

    Raises:
        ValueError: it isn't there; the message lists those that are.
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower()) if isinstance(name, str) else None
    for known, gpu in GPUS.items():
        if plain == known.replace("-", ""):
            return gpu
    raise ValueError(f"gpu should be one of {', '.join(GPUS)}, got {name!r}")


def of(device: torch.device | int | None = None) -> Gpu:
    """The GPU of this machine that `device` is; None: the current one.

    What the driver says (multiprocessors, shared memory, L2) goes before the table; the rest of a GPU that the table
    doesn't have is that of its architecture's least.

    Raises:
        RuntimeError: PyTorch finds no GPU.
    """
    index = torch.cuda._utils._get_device_index(device, optional=True)
    return _of(index)


@cache
def _of(index: int) -> Gpu:
    return like(torch.cuda.get_device_properties(index))


def like(properties: Any) -> Gpu:
    """The GPU that has such `torch.cuda.get_device_properties`."""
    arch = getattr(properties, "gcnArchName", "").split(":")[0]
    short = name_of(properties.name)
    known = GPUS[short] if short else None
    target = arch if arch.startswith("gfx") else f"sm_{properties.major}{properties.minor}"
    if known is None or known.target != target:
        known = replace(_fallback(target), name=properties.name, target=target, source="the driver; else assumed")
    limits = known.limits._replace(
        shared_per_sm=getattr(properties, "shared_memory_per_multiprocessor", known.limits.shared_per_sm),
        shared_per_program=getattr(properties, "shared_memory_per_block_optin", known.limits.shared_per_program),
        registers=getattr(properties, "regs_per_multiprocessor", known.limits.registers),
        threads=getattr(properties, "max_threads_per_multi_processor", known.limits.threads),
        warp=getattr(properties, "warp_size", known.limits.warp),
    )
    l2 = getattr(properties, "L2_cache_size", 0) / MIB or known.l2_mib
    return replace(known, sms=properties.multi_processor_count, l2_mib=l2, limits=limits)


def name_of(device: str) -> str | None:
    """The table's name of a device that drivers call `device`, such as "NVIDIA H100 80GB HBM3"; None if it has none."""
    return next((short for words, short in _NAMES if re.search(words, device.lower())), None)


def _fallback(target: str) -> Gpu:
    """What stands in for a GPU of which the target alone is known: never one that has more than it."""
    if target.startswith("gfx"):
        return GPUS["mi300x" if target >= "gfx94" else "mi210"]
    major, minor = int(target[3:-1]), int(target[-1])
    if (major, minor) in ((8, 0), (9, 0), (10, 0), (10, 3)):
        return GPUS[_LIKE[f"sm_{major}0"]]
    near = {8: "sm_89" if minor == 9 else "sm_86"}.get(major, "sm_120" if major >= 12 else "sm_86")
    found = GPUS[_LIKE[near]]
    if major < 8:  # as Turing has it: 64 KiB, and no bfloat16
        found = replace(found, limits=Limits(64 * KIB, 64 * KIB, 64 * KIB, 1024, 32))
    return found
