"""A kernel's TTIR as a C function that runs one program instance.

A tensor's elements are computed where something needs them in memory: stores, products, the values
that a loop carries on, and what is costly and needed in more than one loop. All that is wanted at one
place in the kernel becomes one loop nest, over whose indices everything else is an expression. So loads
and stores of different elements may change places up to the next barrier, as they may on a GPU.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lstm_triton.cpu.ir import Block, Function, Op, Type, Unsupported, Value, walk
from lstm_triton.cpu.operations import (
    BYTES,
    HALF,
    HEAVY,
    VIEWS,
    constant,
    expression,
    interval,
    is_zero,
    kept,
    loaded,
    stride,
    value_type,
)  # fmt: skip

Index = tuple[str, ...]
Element = tuple[Value, Index]

_ALIGN = 64
_PANEL = 32  # columns of the widest panel of any processor
_LAST = 2**31  # after every operation
_ORDERS = {"relaxed": "RELAXED", "acquire": "ACQUIRE", "release": "RELEASE", "acq_rel": "ACQ_REL"}
_TERMINATORS = ("scf.yield", "scf.condition", "tt.return", "tt.reduce.return")
_BARRIERS = ("gpu.barrier", "ttg.barrier", "ttg.local_barrier")
# Operations with an effect, or whose results are in memory from the start. All others are expressions.
_ROOTS = {
    "tt.store", "tt.dot", "tt.reduce", "tt.atomic_rmw", "tt.atomic_cas", "scf.for", "scf.if", "scf.while",
    *_BARRIERS, *_TERMINATORS,
}  # fmt: skip
_LEAVES = ("arith.constant", "tt.make_range")
MOST_MASKS = 2  # of whole rows that a loop is written for each case of


@dataclass(frozen=True)
class Buffer:
    """A tensor in the program's scratch memory: row by row, or in panels of columns as products read it."""

    name: str
    type: Type
    panels: bool = False

    def at(self, index: Index) -> str:
        """The C lvalue of an element; a reshaped one has ("flat", its place)."""
        if index and index[0] == "flat":
            return f"{self.name}[{index[1]}]"
        return f"{self.name}[{_linear(self.type.shape, index)}]"

    def in_panel(self, index: Index, split: bool) -> str:
        """The same for a buffer in panels; `split`: p1 is the first column of the element's panel."""
        rows, columns = self.type.shape
        row, column = index
        width = f"PANEL({self.type.element}, {columns})"
        first = "p1" if split else f"({column} / {width} * {width})"
        return f"{self.name}[{first} * {rows} + {row} * {width} + {column} - {first}]"


@dataclass
class Root:
    """What a loop nest is for: a store of the kernel's, or a value into a buffer."""

    value: Value
    number: int  # its place in the kernel's order
    store: Op | None = None
    into: Buffer | None = None
    keeps: bool = True  # whether the value can be read from `into` from then on


@dataclass
class Nest:
    """Roots of one shape that are to be written as one loop nest."""

    shape: tuple[int, ...]
    roots: list[Root] = field(default_factory=list)
    unrolled: int = 0  # trailing dimensions that have no loop

    def indices(self) -> Iterator[Index]:
        """The element that a root is at, inside the loops: several where dimensions are unrolled."""
        looped = len(self.shape) - self.unrolled
        index = tuple(f"i{d}" for d in range(looped))
        for k in range(2**self.unrolled):
            yield (*index, *(str(k >> (self.unrolled - 1 - d) & 1) for d in range(self.unrolled)))


class Lowering:
    """Writes the C of one kernel."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.code: list[str] = []
        self.depth = 1
        self.count = 0
        self.scratch = 0
        self.names: dict[Value, str] = {}  # of scalars
        self.buffers: dict[Value, Buffer] = {}  # of tensors in memory
        self.done: set[Op] = set()  # roots that are written
        self.sums: dict[Op, Buffer] = {}  # of products that have begun
        self.loads: list[Value] = []  # of tensors, read so far
        self.nest: Nest | None = None

    def write(self) -> str:
        """The C source.

        Raises:
            Unsupported: the target lacks an operation; the message names it and its place in the kernel.
        """
        for k, argument in enumerate(self.function.body.arguments):
            if argument.type.element in HALF:
                raise Unsupported(f"{self.function.name}: the CPU target takes no scalars of {argument.type.element}")
            name, c_type = f"arg{k}", value_type(argument.type)
            self.names[argument] = name
            self.line(f"{c_type} {name} = *({c_type} const *)(args + {k});")
        self.block(self.function.body)
        body = "\n".join(self.code)
        return (
            f'#include "program.h"\n\nconst size_t scratch_bytes = {self.scratch};\n\n'
            "void kernel(const void *const *args, const int32_t *pid, const int32_t *grid, char *scratch) {\n"
            f"{body}\n}}\n"
        )

    # Lines, names, scratch memory

    def line(self, text: str) -> None:
        self.code.append("  " * self.depth + text)

    def open(self, text: str) -> None:
        self.line(text)
        self.depth += 1

    def close(self, text: str = "}") -> None:
        self.depth -= 1
        self.line(text)

    def fresh(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def buffer(self, type_: Type, panels: bool = False) -> Buffer:
        if type_.is_pointer:
            raise Unsupported(f"{self.function.name}: the CPU target keeps no tensors of pointers")
        name, c_type = self.fresh("m"), value_type(type_)
        self.line(f"{c_type} *const {name} = ({c_type} *)(scratch + {self.scratch});")
        # A line more than needed: else buffers of a power of two would all begin in the same set of the cache.
        size = type_.size
        if panels:  # of which the last may not be full; as many columns as the widest have
            size = type_.shape[0] * -(-type_.shape[1] // _PANEL) * _PANEL
        self.scratch += -(-size * BYTES[c_type] // _ALIGN) * _ALIGN + _ALIGN
        return Buffer(name, type_, panels)

    # Operations in order

    def block(self, block: Block) -> None:
        """All of a block but its terminator, which is for the operation that has the block."""
        for op in block.ops:
            if op.name in _TERMINATORS:
                continue
            if op.name in _ROOTS:
                self.root(op)
            elif not op.results:
                raise Unsupported(f"{op}: the CPU target has no such operation")
            elif not op.results[0].shape:
                self.scalar(op)
            elif op.name == "tt.load":
                self.loads.append(op.results[0])
            elif op.name not in VIEWS and op.name not in _LEAVES:
                expression(op, ["x"] * len(op.operands))  # raises where it lacks the operation
        if block is self.function.body:
            self.flush()

    def region(self, block: Block, end: Callable[[Op], None]) -> None:
        """A block in braces of its own; `end` writes its terminator."""
        outside = dict(self.buffers)
        self.block(block)
        if block.ops and block.ops[-1].name in _TERMINATORS:  # one without operands isn't printed
            end(block.ops[-1])
            self.done.add(block.ops[-1])
        self.flush()
        self.buffers = outside  # what got memory inside is unknown outside

    def root(self, op: Op) -> None:
        if op.name == "tt.store":
            self.store(op)
            return
        if op.name != "tt.dot" and op.name != "tt.reduce":
            self.flush()
            self.settle(op)
        if op.name in _BARRIERS:  # a program is one thread here
            self.line('__asm__ volatile("" ::: "memory");')
        elif op.name.startswith("tt.atomic"):
            self.atomic(op)
        else:
            getattr(self, op.name.split(".")[1] + "_")(op)
        self.done.add(op)

    def scalar(self, op: Op) -> None:
        """A scalar is computed where it stands."""
        value = op.results[0]
        if op.name == "arith.constant":
            self.names[value] = constant(op)
            return
        if op.name in ("tt.get_program_id", "tt.get_num_programs"):
            which = "pid" if op.name == "tt.get_program_id" else "grid"
            text = f"{which}[{'xyz'.index(op.attributes['words'][-1])}]"
        elif op.name == "tt.load":
            self.flush()
            text = self.load_text(op, [self.names[v] for v in op.operands])
        elif op.name == "tt.unsplat":
            self.need(op.operands)
            text = self.buffers[op.operands[0]].at(("flat", "0"))
        else:
            text = expression(op, [self.names[v] for v in op.operands])
        name = self.names[value] = self.fresh("s")
        self.line(f"{value_type(value.type)} {name} = {text};")

    def load_text(self, op: Op, a: list[str]) -> str:
        text = loaded(f"*{a[0]}", op.results[0].type.element)
        if len(a) == 1 or interval(op.operands[1]) == (1, 1):
            return text
        return f"({a[1]} ? {text} : {a[2] if len(a) > 2 else '0'})"

    def store(self, op: Op) -> None:
        pointer, value, *mask = op.operands
        if pointer.shape:
            self.add(Root(value, op.number, store=op))
            return
        self.flush()
        text = f"*{self.names[pointer]} = {kept(self.names[value], value.type.element)};"
        self.line(f"if ({self.names[mask[0]]}) {text}" if mask else text)
        self.done.add(op)

    # What is needed, and when

    def in_memory(self, value: Value) -> bool:
        return value in self.buffers or value in self.names

    def costly(self, value: Value, memo: dict[Value, bool] | None = None) -> bool:
        """Whether an element takes a load or as much to compute; not if it is in memory."""
        memo = {} if memo is None else memo
        if value not in memo:
            op = value.op
            memo[value] = (
                op is not None
                and not self.in_memory(value)
                and (op.name in HEAVY or any(self.costly(v, memo) for v in op.operands))
            )
        return memo[value]

    def outstanding(self, value: Value, kept_now: Iterable[Value] = ()) -> bool:
        """Whether something still to be written computes with the value, other than by those `kept_now`."""
        stack, seen = [value], {value}
        while stack:
            for user in stack.pop().users:
                if user.name in _ROOTS:
                    if user not in self.done:
                        return True
                    continue
                for result in user.results:
                    if result not in seen and not self.in_memory(result) and result not in kept_now:
                        seen.add(result)
                        stack.append(result)
        return False

    def need(self, values: Iterable[Value]) -> None:
        """Has each tensor in memory."""
        for value in values:
            if not self.in_memory(value):
                panels = _only_right_factor(value)
                if panels:
                    self.flush()
                assert value.op is not None
                self.add(Root(value, value.op.number, into=self.buffer(value.type, panels)))
                if panels:
                    self.flush()
        self.flush()

    def settle(self, op: Op) -> None:
        """Before something that may change memory, or a loop: what was loaded, and what is computed once outside."""
        inside = [x for region in op.regions for x in walk(region)]
        used = dict.fromkeys(v for x in inside for v in x.operands if v.shape and not _within(v, op))
        self.need([v for v in used if not v.type.is_pointer and self.costly(v)])
        self.need([v for v in self.loads if not self.in_memory(v) and self.outstanding(v)])

    def add(self, root: Root) -> None:
        """To the open nest if it has this shape, else to a new one."""
        if self.nest is not None and self.nest.shape != root.value.shape:
            self.flush()
        if self.nest is None:
            self.nest = Nest(root.value.shape)
        self.nest.roots.append(root)

    # Loop nests

    def flush(self) -> None:
        """Writes the open nest, and with it what is costly and wanted later, too."""
        nest, self.nest = self.nest, None
        if nest is None:
            return
        self.done.update(root.store for root in nest.roots if root.store)
        nest.unrolled = self.joins(nest)
        needed = self.needed(nest)
        kept_now = {root.value for root in nest.roots if root.into and root.keeps}
        last = max((root.number for root in nest.roots if root.store), default=0)
        earlier = [(v, ()) for v in self.loads if v.op and v.op.number < last]
        apart: list[Value] = []
        looped = len(nest.shape) - nest.unrolled
        for value, index in sorted([*needed, *earlier], key=lambda e: -_number(e[0])):
            if not value.shape or value.type.is_pointer or self.in_memory(value) or value in kept_now or value in apart:
                continue
            if not self.costly(value) or not self.outstanding(value, kept_now):
                continue
            if value.shape == nest.shape and (not index or index[:looped] == next(nest.indices())[:looped]):
                nest.roots.append(Root(value, _number(value), into=self.buffer(value.type)))
                kept_now.add(value)
            else:
                apart.append(value)
        self.need(apart[::-1])
        self.loops(nest)
        self.buffers.update({root.value: root.into for root in nest.roots if root.into and root.keeps})

    def needed(self, nest: Nest) -> list[Element]:
        """All elements that the roots are computed from. What is reshaped and costly gets memory first."""
        while True:
            found: dict[Element, None] = {}
            tight: dict[Value, None] = {}
            for index in nest.indices():
                for root in nest.roots:
                    for value in root.store.operands if root.store else [root.value]:
                        self.gather((value, index), found, tight)
            if not tight:
                return list(found)
            self.need(tight)

    def gather(self, top: Element, found: dict[Element, None], tight: dict[Value, None]) -> None:
        stack = [top]
        while stack:
            value, index = self.viewed(stack.pop(), tight)
            if (value, index) in found:
                continue
            found[value, index] = None
            if not self.in_memory(value) and value.op is not None:
                below = index[:-1] if value.op.name == "tt.join" else index
                stack.extend((v, below if v.shape else ()) for v in value.op.operands)

    def viewed(self, element: Element, tight: dict[Value, None] | None = None) -> Element:
        """The element behind operations that only rearrange."""
        value, index = element
        while value.op is not None and not self.in_memory(value):
            op = value.op
            if op.name == "tt.splat":
                value, index = op.operands[0], ()
            elif op.name == "tt.expand_dims":
                axis = op.attributes["axis"]
                value, index = op.operands[0], index[:axis] + index[axis + 1 :]
            elif op.name == "tt.broadcast":
                value = op.operands[0]
                index = tuple("0" if n == 1 else i for n, i in zip(value.shape, index, strict=True))
            elif op.name == "tt.trans":
                order = op.attributes["order"]
                value, index = op.operands[0], tuple(index[order.index(d)] for d in range(len(order)))
            elif op.name == "tt.reshape":
                place, source = _linear(value.shape, index), op.operands[0]
                if source in self.buffers:
                    return source, ("flat", place)
                if tight is not None and self.costly(source):
                    tight[source] = None
                value, index = source, _delinearised(source.shape, place)
            elif op.name == "tt.split":
                value, index = op.operands[0], (*index, str(value.index))
            elif op.name == "tt.join" and index[-1] in ("0", "1"):
                value, index = op.operands[int(index[-1])], index[:-1]
            elif op.name == "arith.andi" and (1, 1) in map(interval, op.operands) and value.type.element == "i1":
                value = op.operands[interval(op.operands[0]) == (1, 1)]
            else:
                break
        return value, index

    def joins(self, nest: Nest) -> int:
        """How many trailing dimensions come from joins: their two elements are written side by side, without a loop."""
        most = 0
        for root in nest.roots:
            stack, seen = [(root.value, 0)], {root.value}
            while stack:
                value, depth = stack.pop()
                op = value.op
                shape = nest.shape[: len(nest.shape) - depth]
                if op is None or self.in_memory(value) or value.shape != shape:
                    continue
                depth += op.name == "tt.join"
                most = max(most, depth)
                stack.extend((v, depth) for v in op.operands if v not in seen)
                seen.update(op.operands)
        return most

    def element(self, element: Element, name: Callable[[Element], str]) -> str:
        """The C expression of an element; `name` has those that it is computed from."""
        value, index = element
        op = value.op
        if value in self.names:
            return self.names[value]
        if value in self.buffers:
            return self.buffers[value].at(index)
        assert op is not None
        if op.name == "arith.constant":
            return constant(op)
        if op.name == "tt.make_range":
            return f"({op.attributes['start']} + {index[0]})"
        if op.name == "tt.join":
            a, b = (name((v, index[:-1])) for v in op.operands)
            return f"({index[-1]} ? {b} : {a})"
        texts = [name((v, index if v.shape else ())) for v in op.operands]
        return self.load_text(op, texts) if op.name == "tt.load" else expression(op, texts)

    def loops(self, nest: Nest) -> None:
        """The C of a nest: each expression in the outermost loop whose index it has no need of."""
        looped = len(nest.shape) - nest.unrolled
        order = list(range(looped))
        if looped == 2 and all(_reads_columns(root) for root in nest.roots):
            order.reverse()  # memory is read along its rows
        panels = any(root.into and root.into.panels for root in nest.roots)
        split = panels and order == [0, 1]
        # Joined elements come in short rows: one loop over all of them.
        flat = looped == 2 and nest.unrolled > 0
        levels: list[list[tuple[int, str]]] = [[] for _ in range(2 if flat else looped + 1)]
        names: dict[Element, str] = {}
        rows: set[str] = set()  # what is computed once for the innermost loop

        def name(element: Element) -> str:
            return names[self.viewed(element)]

        for element in sorted(self.needed(nest), key=lambda e: _number(e[0])):
            value, index = element
            text = self.element(element, name)
            if value in self.names or (value not in self.buffers and value.op is not None and value.op.name in _LEAVES):
                names[element] = text
                continue
            dims = [int(d) for i in index for d in re.findall(r"\bi(\d)\b", i)]
            level = max((order.index(d) + 1 for d in dims), default=0)
            names[element] = self.fresh("v")
            number = -1 if value in self.buffers else _number(value)
            line = f"{value_type(value.type)} {names[element]} = {text};"
            levels[min(level, 1) if flat else level].append((number, line))
            if level < looped:
                rows.add(names[element])
        for root in nest.roots:
            for index in nest.indices():
                text = name((root.value, index))
                if root.store:
                    pointer, value, *mask = root.store.operands
                    text = f"*{name((pointer, index))} = {kept(text, value.type.element)};"
                    if mask and interval(mask[0]) != (1, 1):
                        text = f"if ({name((mask[0], index))}) {text}"
                else:
                    assert root.into is not None
                    place = root.into.in_panel(index, split) if root.into.panels else root.into.at(index)
                    text = f"{place} = {text};"
                levels[-1].append((root.number, text))
        self.open("{")
        self.lines(levels[0])
        if split:
            columns, width = nest.shape[1], f"PANEL({nest.roots[0].value.type.element}, {nest.shape[1]})"
            self.open(f"for (int p1 = 0; p1 < {columns}; p1 += {width}) {{")
            end = f"p1 + {width}"
            if columns & (columns - 1):  # the last panel may not be full
                self.line(f"const int end = {end} < {columns} ? {end} : {columns};")
                end = "end"
        if flat:
            self.line("IVDEP")
            self.open(f"for (int j = 0; j < {nest.shape[0] * nest.shape[1]}; j++) {{")
            self.line(f"int i0 = j / {nest.shape[1]}, i1 = j % {nest.shape[1]};")
            self.lines(levels[1])
            self.close()
        else:
            for level, dim in enumerate(order[:-1], 1):
                self.open(f"for (int i{dim} = 0; i{dim} < {nest.shape[dim]}; i{dim}++) {{")
                self.lines(levels[level])
            last = order[-1]
            head = f"for (int i{last} = 0; i{last} < {nest.shape[last]}; i{last}++) {{"
            if split:
                head = f"for (int i1 = p1; i1 < {end}; i1++) {{"
            masks = [n for (v, _), n in names.items() if n in rows and v.type.element == "i1"]
            self.innermost(head, levels[-1], masks)
            for _ in order[:-1]:
                self.close()
        if split:
            self.close()
        self.close()

    def innermost(self, head: str, body: list[tuple[int, str]], masks: list[str]) -> None:
        """A nest's innermost loop, once for each case of the `masks` that hold for all of it.

        The compiler vectorises no loop in which such a mask is a branch.
        """
        masks = [name for name in masks if any(re.search(rf"\b{name}\b", text) for _, text in body)]
        if len(masks) > MOST_MASKS:
            masks = []
        known = re.compile(rf"\b({'|'.join(masks)})\b") if masks else None
        for case in range(2 ** len(masks)):
            so = {name: 1 - (case >> k & 1) for k, name in enumerate(masks)}
            if known:
                self.open("if (" + " && ".join(name if so[name] else f"!{name}" for name in masks) + ") {")
                self.line(" ".join(f"const _Bool known_{name} = {so[name]};" for name in masks))
            self.line("IVDEP")
            self.open(head)
            self.lines([(number, known.sub(r"known_\1", text)) if known else (number, text) for number, text in body])
            self.close()
            if known:
                self.close()

    def lines(self, numbered: list[tuple[int, str]]) -> None:
        for _, text in sorted(numbered, key=lambda line: line[0]):
            self.line(text)

    # Products, reductions, atomics

    def dot_(self, op: Op) -> None:
        left, right, start = op.operands
        if len(left.shape) != 2 or op.results[0].type.element not in ("f32", "f64"):
            raise Unsupported(f"{op}: the CPU target has products of matrices into f32 and f64 only")
        element = op.results[0].type.element
        if left.type.element == "f64" and element != "f64" or left.type.element[0] == "i":
            raise Unsupported(f"{op}: the CPU target has no products of {left.type.element} into {element}")
        rows, inner = left.shape
        columns = right.shape[1]
        source = self.left_source(op)
        transposed = source is not left
        self.flush()
        self.need(self.ready(op))
        a, b = self.buffers[source], self.buffers[right]
        strides = f"1, {rows}" if transposed else f"{inner}, 1"
        if start in self.buffers and start.block is op.block and not self._wanted_besides(start, op):
            out = self.buffers[start]  # added to where it is
        elif is_zero(start):
            out = self.buffer(op.results[0].type)
            self.line(f"memset({out.name}, 0, {out.type.size} * sizeof *{out.name});")
        else:
            self.begin(op)
            out = self.sums[op]
        panel = f"PANEL({element}, {columns})"
        places = f"{panel}, {inner} * {panel}" if b.panels else f"{columns}, {panel}"
        sizes = f"{rows}, {columns}, {inner}"
        self.line(f"dot_{element}({a.name}, {strides}, {b.name}, {places}, {out.name}, {columns}, {sizes});")
        self.buffers[op.results[0]] = out

    def left_source(self, op: Op) -> Value:
        """What a product reads its left factor from: a transposed one from what is transposed."""
        left = op.operands[0]
        transposed = left.op is not None and left.op.name == "tt.trans" and not self.in_memory(left)
        return left.op.operands[0] if transposed and left.op else left

    def ahead(self, op: Op) -> Iterator[Op]:
        """The operation and the products and reductions that come next: what they want is written in common loops."""
        for other in op.block.ops[op.block.ops.index(op) :]:
            if other.name in ("tt.dot", "tt.reduce"):
                yield other
            elif other.name in _ROOTS:
                break

    def ready(self, op: Op) -> list[Value]:
        """What the products and reductions from `op` on read and can be had by now, of one shape after the other."""
        values = [
            value
            for other in self.ahead(op)
            for value in ((self.left_source(other), other.operands[1]) if other.name == "tt.dot" else other.operands)
            if _number(value) < op.number
        ]
        return sorted(dict.fromkeys(values), key=lambda value: value.shape != values[0].shape)

    def begin(self, op: Op) -> None:
        """Writes what a product is added to; also for those after it that are ready, in one loop nest."""
        if op in self.sums:
            return
        for other in self.ahead(op):
            if other.name == "tt.dot" and other.results[0].type == op.results[0].type:
                start = other.operands[2]
                if other is op or (_number(start) < op.number and not self.in_memory(start) and not is_zero(start)):
                    self.sums[other] = self.buffer(other.results[0].type)
                    self.add(Root(start, _LAST, into=self.sums[other], keeps=False))
        self.flush()

    def _wanted_besides(self, value: Value, op: Op) -> bool:
        self.done.add(op)
        wanted = self.outstanding(value)
        self.done.discard(op)
        return wanted

    def reduce_(self, op: Op) -> None:
        if len(op.operands) != 1:
            raise Unsupported(f"{op}: the CPU target reduces one tensor at a time")
        source, result, axis = op.operands[0], op.results[0], op.attributes["axis"]
        self.flush()
        self.need(self.ready(op))
        read, c_type = self.buffers[source], value_type(result.type)
        body = op.regions[0]

        def combined(a: str, b: str) -> str:
            texts = dict(zip(body.arguments, (a, b), strict=True))
            for inner in body.ops[:-1]:
                if inner.name == "arith.constant":
                    texts[inner.results[0]] = constant(inner)
                else:
                    texts[inner.results[0]] = expression(inner, [texts[v] for v in inner.operands])
            return texts[body.ops[-1].operands[0]]

        rest = [d for d in range(len(source.shape)) if d != axis]
        index = [f"i{d}" for d in range(len(source.shape))]
        at = read.at(tuple(index))
        first = read.at(tuple("0" if d == axis else i for d, i in enumerate(index)))
        loop = f"for (int i{axis} = 1; i{axis} < {source.shape[axis]}; i{axis}++)"
        if not rest:
            name = self.names[result] = self.fresh("s")
            self.line(f"{c_type} {name} = {first};")
            self.line(f"{_simd(body, name)}{loop} {name} = {combined(name, at)};")
            return
        out = self.buffer(result.type)
        target = out.at(tuple(index[d] for d in rest))
        around = [f"for (int i{d} = 0; i{d} < {source.shape[d]}; i{d}++)" for d in rest]
        along = axis == len(source.shape) - 1
        if not along:  # the inner of the loops around it is the one to vectorise, so that sums are in registers
            around.insert(-1, '\n_Pragma("omp simd")\n')
        self.open(" ".join(around) + " {")
        self.line(f"{c_type} sum = {first};")
        self.line(f"{_simd(body, 'sum') if along else ''}{loop} sum = {combined('sum', at)};")
        self.line(f"{target} = sum;")
        self.close()
        self.buffers[result] = out

    def atomic(self, op: Op) -> None:
        words, result = op.attributes["words"], op.results[0]
        swaps = op.name == "tt.atomic_cas"
        kind, order = ("cas", words[0]) if swaps else (words[0], words[1])
        if kind not in ("add", "fadd", "and", "or", "xor", "exch", "max", "min", "umax", "umin", "cas"):
            raise Unsupported(f"{op}: the CPU target has no atomic {kind!r}")
        c_type = value_type(result.type)
        if result.type.element in HALF:
            raise Unsupported(f"{op}: the CPU target has no atomics on {result.type.element}")
        function = f"atomic_{kind}_{result.type.element}"
        order = f"__ATOMIC_{_ORDERS[order]}"

        def call(a: list[str]) -> str:
            mask = a[2] if not swaps and len(a) > 2 else ""
            text = f"{function}({', '.join(a if swaps else a[:2])}, {order})"
            return f"({mask} ? {text} : 0)" if mask and mask != "1" else text

        if not result.shape:
            name = self.names[result] = self.fresh("s")
            self.line(f"{c_type} {name} = {call([self.names[v] for v in op.operands])};")
            return
        if len(result.shape) != 1:
            raise Unsupported(f"{op}: the CPU target has atomics on scalars and vectors only")
        # One after the other: the addresses may be the same.
        values = [v for v in op.operands if not v.type.is_pointer]
        pointer = op.operands[0]
        self.need(values)
        out = self.buffers[result] = self.buffer(result.type)
        nest = Nest(result.shape)
        self.open(f"for (int i0 = 0; i0 < {result.shape[0]}; i0++) {{")
        found: dict[Element, None] = {}
        names: dict[Element, str] = {}
        self.gather((pointer, ("i0",)), found, {})
        for element in sorted(found, key=lambda e: _number(e[0])):
            text = self.element(element, lambda e: names[self.viewed(e)])
            names[element] = self.fresh("v")
            self.line(f"{value_type(element[0].type)} {names[element]} = {text};")
        a = [names[self.viewed((pointer, ("i0",)))], *(self.buffers[v].at(("i0",)) for v in values)]
        self.line(f"{out.at(next(nest.indices()))} = {call(a)};")
        self.close()

    # Control flow

    def place_for(self, value: Value) -> Buffer | str:
        """Where a result of control flow is: a buffer, or the name of a variable declared here."""
        if value.shape:
            place: Buffer | str = self.buffer(value.type)
        else:
            place = self.fresh("s")
            self.line(f"{value_type(value.type)} {place};")
        return place

    def bind(self, values: Sequence[Value], places: Sequence[Buffer | str]) -> None:
        for value, place in zip(values, places, strict=True):
            if isinstance(place, Buffer):
                self.buffers[value] = place
            else:
                self.names[value] = place

    def assign(self, values: Sequence[Value], places: Sequence[Buffer | str]) -> None:
        """Writes the values to the places, all of them read before any is written."""
        pairs = list(zip(values, places, strict=True))
        moved = []
        for value, place in pairs:
            if isinstance(place, str) and self.names[value] != place:
                moved.append((place, self.fresh("s")))
                self.line(f"{value_type(value.type)} {moved[-1][1]} = {self.names[value]};")
        tensors = [(v, p) for v, p in pairs if isinstance(p, Buffer) and self.buffers.get(v) != p]
        if tensors and not self.assign_in_place(tensors):
            self.need([v for v, _ in tensors])
            targets = [p for _, p in tensors]
            sources = []
            for value, _ in tensors:
                source = self.buffers[value]
                if source in targets:  # overwritten by another of them
                    source = self.buffer(value.type)
                    self.copy(source, self.buffers[value])
                sources.append(source)
            for (_, place), source in zip(tensors, sources, strict=True):
                self.copy(place, source)
        for name, new in moved:
            self.line(f"{name} = {new};")

    def assign_in_place(self, pairs: list[tuple[Value, Buffer]]) -> bool:
        """Where each element depends on no other element of what is overwritten, nor on what has another shape."""
        if any(self.buffers[v].panels for v, _ in pairs if v in self.buffers):
            return False
        if self.nest and self.nest.shape not in [v.shape for v, _ in pairs]:
            self.flush()
        groups: dict[tuple[int, ...], list[Root]] = {self.nest.shape: []} if self.nest else {}
        for value, place in pairs:
            groups.setdefault(value.shape, []).append(Root(value, _LAST, into=place, keeps=False))
        targets = {place for _, place in pairs}
        for shape, roots in groups.items():
            trial = Nest(shape, [*(self.nest.roots if self.nest and self.nest.shape == shape else []), *roots])
            trial.unrolled = self.joins(trial)
            own, indices = {root.into for root in roots}, set(trial.indices())
            for value, index in self.needed(trial):
                read = self.buffers.get(value)
                if read in targets and (read not in own or index not in indices):
                    return False
        for roots in groups.values():
            for root in roots:
                self.add(root)
            self.flush()
        return True

    def copy(self, target: Buffer, source: Buffer) -> None:
        self.line(f"memcpy({target.name}, {source.name}, {target.type.size} * sizeof *{target.name});")

    def for_(self, op: Op) -> None:
        low, high, step = (self.names[v] for v in op.operands[:3])
        body = op.regions[0]
        variable, *carried = body.arguments
        places = [self.place_for(v) for v in carried]
        self.assign(op.operands[3:], places)
        self.bind(carried, places)
        name, c_type = self.fresh("s"), value_type(variable.type)
        self.names[variable] = name
        self.open(f"for ({c_type} {name} = {low}; {name} < {high}; {name} += {step}) {{")
        self.region(body, lambda end: self.assign(end.operands, places))
        self.close()
        self.bind(op.results, places)

    def if_(self, op: Op) -> None:
        places = [self.place_for(v) for v in op.results]
        self.open(f"if ({self.names[op.operands[0]]}) {{")
        for k, branch in enumerate(op.regions):
            if k:
                self.close("} else {")
                self.depth += 1
            self.region(branch, lambda end: self.assign(end.operands, places))
        self.close()
        self.bind(op.results, places)

    def while_(self, op: Op) -> None:
        before, after = op.regions
        places = [self.place_for(v) for v in before.arguments]
        results = [self.place_for(v) for v in op.results]
        self.assign(op.operands, places)
        self.bind(before.arguments, places)
        # Programs that wait for others leave them the processor.
        waits = any(x.name.startswith("tt.atomic") for region in op.regions for x in walk(region))
        rounds = self.fresh("s")
        if waits:
            self.line(f"unsigned {rounds} = 0;")
        self.open("while (1) {")
        if waits:
            self.line(f"give_way(&{rounds});")

        def condition(end: Op) -> None:
            self.assign(end.operands[1:], results)
            self.flush()
            self.line(f"if (!{self.names[end.operands[0]]}) break;")

        self.region(before, condition)
        self.bind(after.arguments, results)
        self.region(after, lambda end: self.assign(end.operands, places))
        self.close()
        self.bind(op.results, results)


def _number(value: Value) -> int:
    return value.op.number if value.op else 0


def _within(value: Value, op: Op) -> bool:
    """Whether a value is defined in a region of the operation."""
    block = value.block
    while block is not None and block.owner is not None:
        if block.owner is op:
            return True
        block = block.owner.block
    return False


def _only_right_factor(value: Value) -> bool:
    """Whether the value is nothing but the right factor of products."""
    return len(value.shape) == 2 and all(
        user.name == "tt.dot" and user.operands[1] is value and value not in (user.operands[0], user.operands[2])
        for user in value.users
    )


def _reads_columns(root: Root) -> bool:
    """Whether a value is loaded from memory in which its columns lie one element after the other, not its rows."""
    value: Value | None = root.value
    while value is not None and value.op is not None and root.into is not None:
        if value.op.name == "tt.load":
            pointer = value.op.operands[0]
            return stride(pointer, 0) == 1 and stride(pointer, 1) != 1
        value = value.op.operands[0] if len(value.op.operands) == 1 and value.op.name.startswith("arith.") else None
    return False


def _simd(body: Block, name: str) -> str:
    """Lets a sum or extremum of a row be taken in any order."""
    sign = {"arith.addf": "+", "arith.addi": "+"}.get(body.ops[0].name) if len(body.ops) == 2 else None
    return f'_Pragma("omp simd reduction({sign}:{name})") ' if sign else ""


def _linear(shape: Sequence[int], index: Sequence[str]) -> str:
    """The place of an element in a row-major tensor."""
    terms = []
    step = 1
    for n, i in reversed(list(zip(shape, index, strict=True))):
        if i != "0":
            terms.append(i if step == 1 else f"{i} * {step}")
        step *= n
    return f"({' + '.join(reversed(terms))})" if terms else "0"


def _delinearised(shape: Sequence[int], place: str) -> Index:
    index = []
    step = 1
    for n in reversed(shape):
        text = place if step == 1 else f"({place} / {step})"
        index.append("0" if n == 1 else f"({text} % {n})")
        step *= n
    return tuple(reversed(index))
