"""A kernel's TTIR, from Triton's own frontend."""

from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

# The frontend wants to know a GPU; nothing of the TTIR depends on which.
_TARGET = GPUTarget("cuda", 90, 32)


def ttir(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> str:
    """The text of a kernel's TTIR, inlined and simplified, with the places in its source.

    Args:
        kernel: a `triton.jit` function.
        signature: the type of each parameter as Triton writes it, "constexpr" for constants.
        constants: the values of these.
    """
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    backend = make_backend(_TARGET)
    options = backend.parse_options({"enable_fp_fusion": True})  # Triton 3.9 warns where it isn't said
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    functions["min_dot_size"] = lambda a, b: (1, 1, 1)  # a GPU's tensor cores want 16 rows; a CPU doesn't
    module = source.make_ir(_TARGET, options, functions, backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))
