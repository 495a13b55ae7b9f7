"""Triton as cells want it: there, or standing in for itself where it isn't installed and no kernel will run."""

from typing import Any

try:
    import triton
    import triton.language as tl

    from lstm_triton.kernels.blocks import tanh
    from lstm_triton.kernels.units import normalized, through_norm
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise

    class triton:  # type: ignore[no-redef]
        @staticmethod
        def jit(function: Any) -> None:
            return None

    class tl:  # type: ignore[no-redef]
        @staticmethod
        def constexpr(value: Any) -> Any:
            return value

    tanh = normalized = through_norm = None

__all__ = ["normalized", "tanh", "through_norm", "tl", "triton"]
