"""What single operations are in C, and what can be known of their results beforehand."""

import re
import struct

from lstm_triton.cpu.ir import Op, Type, Unsupported, Value

# float16 and bfloat16 are computed as float and rounded where an operation of theirs ends.
VALUE = {
    "f16": "float", "bf16": "float", "f32": "float", "f64": "double",
    "i1": "_Bool", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t", "index": "int64_t",
}  # fmt: skip
MEMORY = VALUE | {"f16": "uint16_t", "bf16": "uint16_t"}
BYTES = {"float": 4, "double": 8, "_Bool": 1, "int8_t": 1, "int16_t": 2, "int32_t": 4, "int64_t": 8}
HALF = ("f16", "bf16")

_INFIX = {
    "arith.addf": "+", "arith.subf": "-", "arith.mulf": "*", "arith.divf": "/", "tt.precise_divf": "/",
    "arith.andi": "&", "arith.ori": "|", "arith.xori": "^",
}  # fmt: skip
_WRAPPING = {"arith.addi": "+", "arith.subi": "-", "arith.muli": "*"}
_UNSIGNED = {"arith.divui": "/", "arith.remui": "%", "arith.shrui": ">>"}
_SIGNED = {"arith.divsi": "/", "arith.remsi": "%", "arith.shrsi": ">>"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_MINMAX_INT = {"arith.maxsi": (">", ""), "arith.minsi": ("<", ""), "arith.maxui": (">", "u"), "arith.minui": ("<", "u")}
_MINMAX_FLOAT = {
    "arith.maxnumf": "maxnum", "arith.minnumf": "minnum", "arith.maximumf": "maximum", "arith.minimumf": "minimum",
}  # fmt: skip
_OWN_MATH = ("exp", "exp2", "log", "log2", "tanh", "rsqrt")  # kernel.h's, vectorised
_LIBM = ("sqrt", "sin", "cos", "erf", "floor", "ceil")
_CASTS = (
    "arith.extsi", "arith.trunci", "arith.sitofp", "arith.fptosi", "arith.extf", "arith.truncf",
    "arith.index_cast", "tt.fp_to_fp",
)  # fmt: skip
_UNSIGNED_CASTS = ("arith.extui", "arith.uitofp", "arith.fptoui", "arith.index_castui")
_BITCASTS = ("arith.bitcast", "tt.bitcast", "tt.int_to_ptr", "tt.ptr_to_int")

# Operations that only say which element of an operand is meant.
VIEWS = (
    "tt.splat", "tt.expand_dims", "tt.broadcast", "tt.trans", "tt.reshape", "tt.split", "tt.join", "tt.cat",
    "tt.unsplat",
)  # fmt: skip
# Worth memory where more than one loop needs them.
HEAVY = {
    "tt.load", "tt.mulhiui", "arith.divf", "tt.precise_divf", "arith.divsi", "arith.remsi", "arith.divui",
    "arith.remui", "tt.precise_sqrt", *(f"math.{f}" for f in (*_OWN_MATH, *_LIBM)), "tt.extern_elementwise",
}  # fmt: skip


def is_elementwise(name: str) -> bool:
    """Whether an element of such an operation's result is computed from those at its place in its operands."""
    prefix = name.split(".")[0]
    return (prefix in ("arith", "math") and name != "arith.constant") or name in (
        "tt.addptr", "tt.bitcast", "tt.int_to_ptr", "tt.ptr_to_int", "tt.fp_to_fp", "tt.clampf", "tt.mulhiui",
        "tt.precise_sqrt", "tt.precise_divf", "tt.extern_elementwise",
    )  # fmt: skip


def value_type(type_: Type) -> str:
    """The C type of one element."""
    return MEMORY[type_.element[1:]] + " *" if type_.is_pointer else VALUE[type_.element]


def rounded(text: str, element: str) -> str:
    return f"round_{element}({text})" if element in HALF else text


def constant(op: Op) -> str:
    """The C literal of an `arith.constant`, all of whose elements are one number."""
    literal, element = op.attributes["literal"], op.results[0].type.element
    if literal.startswith('"') or literal.startswith("["):
        raise Unsupported(f"{op}: the CPU target has no constants of differing elements")
    if literal in ("true", "false"):
        return str(int(literal == "true"))
    if element in ("f16", "bf16", "f32", "f64"):
        number = _number(literal, element)
        if number != number:
            return "NAN"
        if number in (float("inf"), float("-inf")):
            return "INFINITY" if number > 0 else "(-INFINITY)"
        text = number.hex() + ("" if element == "f64" else "f")
        return f"({text})" if number < 0 else text
    number = int(literal)
    if element == "i64":
        return f"INT64_C({number})" if number != -(2**63) else "INT64_MIN"
    return f"({number})" if number != -(2**31) else "INT32_MIN"


def is_zero(value: Value) -> bool:
    """Whether it is a constant of floating-point zeros."""
    return value.op is not None and value.op.name == "arith.constant" and constant(value.op).strip("()f") == "0x0.0p+0"


def _number(literal: str, element: str) -> float:
    code, unsigned = {"f16": ("e", "H"), "bf16": ("f", "I"), "f32": ("f", "I"), "f64": ("d", "Q")}[element]
    if not literal.startswith("0x"):
        # A decimal has no more digits than tell it from the dtype's other numbers.
        number = struct.unpack(code, struct.pack(code, float(literal)))[0]
        if element != "bf16":
            return number
        bits = struct.unpack(unsigned, struct.pack(code, number))[0] + 0x8000 & 0xFFFF0000
    else:
        bits = int(literal, 16) << (16 if element == "bf16" else 0)
    return struct.unpack(code, struct.pack(unsigned, bits))[0]


def expression(op: Op, a: list[str]) -> str:
    """One element of an elementwise operation's result, from those of its operands.

    Raises:
        Unsupported: there is no such operation here.
    """
    name, result = op.name, op.results[0].type
    c_type = value_type(result)
    short = name.removeprefix("arith.").removeprefix("math.").removeprefix("tt.")
    width = "f64" if result.element == "f64" else "f32"
    if name in _INFIX:
        return rounded(f"({a[0]} {_INFIX[name]} {a[1]})", result.element)
    if name in _WRAPPING:
        if result.element == "i1":
            return f"({a[0]} {'&' if name == 'arith.muli' else '^'} {a[1]})"
        if interval(op.results[0]) is not None:  # can't overflow: C may know so, too
            return f"({a[0]} {_WRAPPING[name]} {a[1]})"
        return f"({c_type})({_wide(c_type)}{a[0]} {_WRAPPING[name]} {_wide(c_type)}{a[1]})"
    if name == "arith.shli":
        return f"({c_type})({_wide(c_type)}{a[0]} << {_wide(c_type)}{a[1]})"
    if name in _UNSIGNED:
        return f"({c_type})((u{c_type}){a[0]} {_UNSIGNED[name]} (u{c_type}){a[1]})"
    if name in _SIGNED:
        return f"({c_type})({a[0]} {_SIGNED[name]} {a[1]})"
    if name in ("arith.cmpi", "arith.cmpf"):
        return _comparison(op, a)
    if name in _MINMAX_INT:
        sign, unsigned = _MINMAX_INT[name]
        kind = f"({unsigned}{c_type})"
        return f"({kind}{a[0]} {sign} {kind}{a[1]} ? {a[0]} : {a[1]})"
    if name in _MINMAX_FLOAT:
        return f"{_MINMAX_FLOAT[name]}_{width}({a[0]}, {a[1]})"
    if name == "arith.select":
        return f"({a[0]} ? {a[1]} : {a[2]})"
    if name == "arith.negf":
        return f"(-{a[0]})"
    if name in _CASTS:
        return _cast(op, a[0])
    if name in _UNSIGNED_CASTS:
        source = value_type(op.operands[0].type)
        if name == "arith.fptoui":
            return f"({c_type})(u{c_type}){a[0]}"
        text = a[0] if source == "_Bool" else f"(u{source}){a[0]}"
        return rounded(f"({c_type}){text}", result.element)
    if name in _BITCASTS:
        return _bitcast(op, a[0])
    if name == "tt.addptr":
        return f"({a[0]} + (int64_t){a[1]})"
    if name == "tt.mulhiui":
        return f"({c_type})mulhi_{'u64' if result.element == 'i64' else 'u32'}({a[0]}, {a[1]})"
    if name == "math.absf":
        return f"{'fabs' if width == 'f64' else 'fabsf'}({a[0]})"
    if name == "math.absi":
        return f"({c_type})({a[0]} < 0 ? -(u{c_type}){a[0]} : (u{c_type}){a[0]})"
    if name == "math.fma":
        return rounded(f"({a[0]} * {a[1]} + {a[2]})", result.element)
    if name == "tt.clampf":
        return f"minnum_{width}(maxnum_{width}({a[0]}, {a[1]}), {a[2]})"
    if name == "tt.precise_sqrt":
        short = "sqrt"
    elif name == "tt.extern_elementwise":
        short = op.attributes.get("symbol", "").removeprefix("__nv_").removesuffix("f")
    elif not name.startswith("math."):
        raise Unsupported(f"{op}: the CPU target has no such operation")
    if short in _OWN_MATH:
        return rounded(f"{short}_{width}({a[0]})", result.element)
    if short in _LIBM:
        return rounded(f"{short}{'' if width == 'f64' else 'f'}({a[0]})", result.element)
    raise Unsupported(f"{op}: the CPU target has no function {short!r}")


def _wide(c_type: str) -> str:
    """The cast under which an operation wraps around: C makes a signed int of what is narrower than that."""
    return f"(u{c_type})" if BYTES[c_type] >= 4 else "(uint32_t)"


def _comparison(op: Op, a: list[str]) -> str:
    predicate, source = op.attributes["words"][0], value_type(op.operands[0].type)
    if op.name == "arith.cmpi":
        if predicate in ("eq", "ne"):
            return f"({a[0]} {_COMPARE[predicate]} {a[1]})"
        kind = f"(u{source})" if predicate[0] == "u" and source != "_Bool" else ""
        return f"({kind}{a[0]} {_COMPARE[predicate[1:]]} {kind}{a[1]})"
    if predicate in ("true", "false"):
        return str(int(predicate == "true"))
    unordered = f"({a[0]} != {a[0]} || {a[1]} != {a[1]})"
    if predicate in ("ord", "uno"):
        return f"(!{unordered})" if predicate == "ord" else unordered
    kind = _COMPARE[predicate[1:]]
    if predicate == "one":
        return f"({a[0]} < {a[1]} || {a[0]} > {a[1]})"
    if predicate[0] == "o" or predicate == "une":
        return f"({a[0]} {kind} {a[1]})"
    if predicate == "ueq":
        return f"(!({a[0]} < {a[1]} || {a[0]} > {a[1]}))"
    opposite = {"lt": ">=", "le": ">", "gt": "<=", "ge": "<"}[predicate[1:]]
    return f"(!({a[0]} {opposite} {a[1]}))"


def _cast(op: Op, text: str) -> str:
    source, target = op.operands[0].type.element, op.results[0].type.element
    if target in HALF:
        if source == "f64":
            return f"round_{target}(f32_odd_of_f64({text}))"  # not rounded twice
        return f"round_{target}((float){text})"
    if source == "i1" and op.name in ("arith.extsi", "arith.sitofp"):
        return f"({value_type(op.results[0].type)})-(int){text}"
    return f"({value_type(op.results[0].type)}){text}" if target != "i1" else f"(_Bool)({text} & 1)"


def _bitcast(op: Op, text: str) -> str:
    source, result = op.operands[0].type, op.results[0].type
    if source.is_pointer and result.is_pointer:
        return f"({value_type(result)}){text}"
    if op.name == "tt.int_to_ptr" or op.name == "tt.ptr_to_int":
        return f"({value_type(result)})(intptr_t){text}"
    if source.element == result.element:
        return text
    if source.element in HALF:
        text = f"{source.element}_of_f32({text})"
    elif source.element[0] == "f":
        text = f"bits_of_{source.element}({text})"
    if result.element in HALF:
        return f"f32_of_{result.element}((uint16_t){text})"
    if result.element[0] == "f":
        return f"{result.element}_of_bits({text})"
    return f"({value_type(result)}){text}"


def loaded(text: str, element: str) -> str:
    """The value of an element in memory."""
    return f"f32_of_{element}({text})" if element in HALF else text


def kept(text: str, element: str) -> str:
    """The element of memory for a value."""
    return f"{element}_of_f32({text})" if element in HALF else text


def interval(value: Value, depth: int = 0) -> tuple[int, int] | None:
    """The least and largest that any element of an integer can be, where that is known and fits."""
    op = value.op
    if op is None or depth > 60 or value.type.is_pointer or value.type.element[0] != "i":
        return None
    if op.name == "arith.constant":
        literal = op.attributes["literal"]
        if re.fullmatch(r"-?\d+", literal):
            return int(literal), int(literal)
        return {"true": (1, 1), "false": (0, 0)}.get(literal)
    if op.name == "tt.make_range":
        return op.attributes["start"], op.attributes["end"] - 1
    if op.name == "arith.extsi" and op.operands[0].type.element == "i1":
        return None  # true is -1
    operands = [interval(v, depth + 1) for v in op.operands]
    if not operands or operands[0] is None:
        return None
    (a, b), second = operands[0], operands[1] if len(operands) > 1 else None
    if op.name in ("tt.splat", "tt.expand_dims", "tt.broadcast", "tt.trans", "tt.reshape", "arith.extsi"):
        return a, b
    if second is None:
        return None
    c, d = second
    if op.name == "arith.cmpi":
        return _decided(op.attributes["words"][0], a, b, c, d)
    if op.name == "arith.andi" and value.type.element == "i1":
        return (a & c, b & d) if min(a, c) >= 0 else None
    corners = {
        "arith.addi": lambda: (a + c, b + d),
        "arith.subi": lambda: (a - d, b - c),
        "arith.muli": lambda: (min(a * c, a * d, b * c, b * d), max(a * c, a * d, b * c, b * d)),
        "arith.divsi": lambda: (a // d, b // c) if a >= 0 and c > 0 else None,
        "arith.remsi": lambda: (0, d - 1) if a >= 0 and c > 0 else None,
    }.get(op.name, lambda: None)()
    limit = {"i8": 2**7, "i16": 2**15, "i32": 2**31}.get(value.type.element, 2**62)
    return corners if corners and -limit <= corners[0] and corners[1] < limit else None


def _decided(predicate: str, a: int, b: int, c: int, d: int) -> tuple[int, int] | None:
    """What is known of a comparison of a number in a … b with one in c … d."""
    always, never = {
        "slt": (b < c, a >= d), "sle": (b <= c, a > d), "sgt": (a > d, b <= c), "sge": (a >= d, b < c),
    }.get(predicate, (False, False))  # fmt: skip
    return (1, 1) if always else (0, 0) if never else (0, 1)


def stride(value: Value, dim: int, depth: int = 0) -> int | None:
    """By how much an integer or address grows from one element to the next along `dim`, where that is one number."""
    op = value.op
    if dim < 0 or not value.shape or value.shape[dim] == 1:
        return 0
    if op is None or depth > 60:
        return None
    if op.name in ("tt.splat", "arith.constant"):
        return 0
    if op.name == "tt.make_range":
        return 1
    source = op.operands[0] if op.operands else None
    if source is None:
        return None
    if op.name == "tt.expand_dims":
        axis = op.attributes["axis"]
        return 0 if dim == axis else stride(source, dim - (dim > axis), depth + 1)
    if op.name == "tt.broadcast":
        return 0 if source.shape[dim] == 1 else stride(source, dim, depth + 1)
    if op.name == "tt.trans":
        return stride(source, op.attributes["order"][dim], depth + 1)
    if op.name in ("arith.extsi", "arith.trunci"):
        return stride(source, dim, depth + 1)
    if op.name in ("arith.addi", "arith.subi", "tt.addptr"):
        a, b = (stride(v, dim, depth + 1) for v in op.operands)
        return None if a is None or b is None else a - b if op.name == "arith.subi" else a + b
    if op.name == "arith.muli":
        a, b = (stride(v, dim, depth + 1) for v in op.operands)
        if a == 0 and b == 0:
            return 0
        for s, other in ((a, op.operands[1]), (b, op.operands[0])):
            factor = interval(other)
            if s is not None and factor and factor[0] == factor[1]:
                return s * factor[0]
    return None
