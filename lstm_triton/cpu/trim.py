"""Takes the padding off a kernel's tensors before it becomes C.

Triton's tensors are powers of two long. What lies past the real length is masked off wherever it would count: where
it is stored, added up, or multiplied along a product's inner dimension. Where that can be seen for all axes that go
together, such as those of units, they are cut there.
"""

from collections.abc import Sequence

from lstm_triton.cpu.ir import Block, Function, Op, Type, Value, walk
from lstm_triton.cpu.operations import interval, is_elementwise, is_zero

# Lengths are multiples of this, which vectors and products' tiles want: of 8 and 16 the faster for most sizes.
GRAIN = 8

Axis = tuple[Value, int]


def trim(function: Function) -> None:
    """Cuts the axes of a kernel's tensors, in place."""
    _part(function)
    classes = _Classes()
    for op in walk(function.body):
        _relate(op, classes)
    classes.cut()


class _Classes:
    """Axes that have to be equally long, and what is known of where they may end."""

    def __init__(self) -> None:
        self.parents: dict[Axis, Axis] = {}
        self.ends: list[tuple[Axis, int | None]] = []  # what counts from there on is nothing; None: all of it counts

    def root(self, axis: Axis) -> Axis:
        found = axis
        while (parent := self.parents.setdefault(found, found)) != found:
            found = parent
        while self.parents[axis] != found:  # shorter ways for the next time
            self.parents[axis], axis = found, self.parents[axis]
        return found

    def join(self, a: Value, dim_a: int, b: Value, dim_b: int) -> None:
        if a.shape[dim_a] == b.shape[dim_b] > 1:
            self.parents[self.root((a, dim_a))] = self.root((b, dim_b))

    def same(self, values: Sequence[Value]) -> None:
        """Tensors of one shape, all of whose axes go together."""
        tensors = [v for v in values if v.shape]
        for value in tensors[1:]:
            for dim in range(len(value.shape)):
                self.join(tensors[0], dim, value, dim)

    def end(self, value: Value, dim: int, place: int | None) -> None:
        if value.shape[dim] > 1:
            self.ends.append(((value, dim), place))

    def keep(self, values: Sequence[Value]) -> None:
        for value in values:
            for dim in range(len(value.shape)):
                self.end(value, dim, None)

    def cut(self) -> None:
        found: dict[Axis, int | None] = {}
        for axis, place in self.ends:
            root = self.root(axis)
            known = found.get(root, 0)
            found[root] = None if place is None or known is None else max(place, known)
        for value, dim in list(self.parents):
            place = found.get(self.root((value, dim)))
            if place is None:
                continue
            length = min(value.shape[dim], max(-(-place // GRAIN), 1) * GRAIN)
            shape = list(value.shape)
            shape[dim] = length
            value.type = Type(tuple(shape), value.type.element)
            if value.op is not None and value.op.name == "tt.make_range":
                value.op.attributes["end"] = value.op.attributes["start"] + length


# What Triton's frontend makes once for all who want the same, though an axis is rows to one and units to another.
_SHARED = ("tt.make_range", "tt.splat", "tt.broadcast", "tt.expand_dims", "arith.constant")


def _part(function: Function) -> None:
    """Gives each user of such a tensor one of its own."""
    for user in list(walk(function.body)):
        _part_operands(user)


def _part_operands(user: Op) -> None:
    for k, value in enumerate(user.operands):
        op = value.op
        if op is None or op.name not in _SHARED or not value.shape or len(value.users) == 1:
            continue
        own = Op(op.name, list(op.operands), [], dict(op.attributes), op.block, op.number, op.place)
        own.results.append(Value(value.type, own, 0, [user], value.block))
        for operand in own.operands:
            operand.users.append(own)
        op.block.ops.insert(op.block.ops.index(op), own)
        value.users.remove(user)
        user.operands[k] = own.results[0]
        _part_operands(own)


def _relate(op: Op, classes: _Classes) -> None:
    """Which axes an operation puts together, and where it lets them end."""
    name, operands, results = op.name, op.operands, op.results
    for value in results:
        for dim in range(len(value.shape)):
            if value.shape[dim] > 1:
                classes.root((value, dim))
    if is_elementwise(name) or name == "tt.load" or _reshapes_nothing(op):
        classes.same([*operands, *results])
    elif name == "tt.store":
        classes.same(operands)
        pointer, mask = operands[0], operands[2] if len(operands) > 2 else None
        for dim in range(len(pointer.shape)):
            classes.end(pointer, dim, None if mask is None else false_from(mask, dim))
    elif name == "tt.make_range":
        if op.attributes["start"] != 0:
            classes.keep(results)
    elif name == "tt.expand_dims":
        axis = op.attributes["axis"]
        for dim in range(len(operands[0].shape)):
            classes.join(operands[0], dim, results[0], dim + (dim >= axis))
    elif name == "tt.broadcast":
        for dim in range(len(results[0].shape)):
            classes.join(operands[0], dim, results[0], dim)
    elif name == "tt.trans":
        for dim, source in enumerate(op.attributes["order"]):
            classes.join(operands[0], source, results[0], dim)
    elif name == "tt.dot" and len(operands[0].shape) == 2:
        a, b, start = operands
        classes.same([start, results[0]])
        classes.join(a, 0, results[0], 0)
        classes.join(b, 1, results[0], 1)
        classes.join(a, 1, b, 0)
        places = [p for p in (zero_from(a, 1), zero_from(b, 0)) if p is not None]
        classes.end(a, 1, min(places, default=None))
    elif name == "tt.reduce" and len(operands) == 1:
        axis = op.attributes["axis"]
        for dim in range(len(operands[0].shape)):
            if dim != axis and results[0].shape:
                classes.join(operands[0], dim, results[0], dim - (dim > axis))
        adds = op.regions[0].ops[0].name == "arith.addf" and len(op.regions[0].ops) == 2
        classes.end(operands[0], axis, zero_from(operands[0], axis) if adds else None)
    elif name == "scf.for":
        body = op.regions[0]
        _carried(classes, operands[3:], body.arguments[1:], _ended(body), results)
    elif name == "scf.if":
        _carried(classes, results, *(_ended(region) for region in op.regions))
    elif name == "scf.while":
        before, after = op.regions
        _carried(classes, operands, before.arguments, _ended(after))
        _carried(classes, _ended(before)[1:], after.arguments, results)
    elif name not in ("tt.splat", "arith.constant", "scf.yield", "scf.condition", "tt.reduce.return"):
        classes.keep([*operands, *results])


def _reshapes_nothing(op: Op) -> bool:
    """As a sum over all of a vector has it."""
    return op.name == "tt.reshape" and op.operands[0].shape == op.results[0].shape


def _ended(region: Block) -> list[Value]:
    """What a region's terminator hands on; one without operands isn't printed."""
    return region.ops[-1].operands if region.ops and region.ops[-1].name in ("scf.yield", "scf.condition") else []


def _carried(classes: _Classes, *lists: Sequence[Value]) -> None:
    for values in zip(*lists, strict=False):
        classes.same(values)


def false_from(mask: Value, dim: int) -> int | None:
    """The least index along an axis from which on a mask is known to be false; None where it isn't."""
    op = mask.op
    if op is None:
        return None
    if op.name == "arith.andi":
        places = [p for p in (false_from(v, dim) for v in op.operands) if p is not None]
        return min(places, default=None)
    if op.name == "arith.cmpi":
        predicate, (a, b) = op.attributes["words"][0], op.operands
        if predicate in ("sgt", "sge"):
            predicate, a, b = {"sgt": "slt", "sge": "sle"}[predicate], b, a
        limit = interval(b)
        if predicate not in ("slt", "sle") or limit is None or not _counts(a, dim):
            return None
        return max(0, limit[1] + (predicate == "sle"))
    viewed = _viewed(mask, dim)
    return None if viewed is None else false_from(*viewed)


def zero_from(value: Value, dim: int, depth: int = 0) -> int | None:
    """The same for where a tensor's elements are known to be zero."""
    op = value.op
    if op is None or depth > 60:
        return None
    if op.name == "arith.constant":
        return 0 if is_zero(value) else None
    if op.name == "tt.load" and len(op.operands) == 3:
        return false_from(op.operands[1], dim) if _is_zero_everywhere(op.operands[2]) else None
    if op.name in ("arith.extf", "arith.truncf", "tt.fp_to_fp", "arith.negf"):
        return zero_from(op.operands[0], dim, depth + 1)
    if op.name in ("arith.addf", "arith.subf", "arith.mulf"):
        places = [zero_from(v, dim, depth + 1) for v in op.operands]
        known = [p for p in places if p is not None]
        if op.name == "arith.mulf":
            return min(known, default=None)
        return max(known) if len(known) == 2 else None
    if op.name == "arith.select":
        mask, other = false_from(op.operands[0], dim), zero_from(op.operands[2], dim, depth + 1)
        return None if mask is None or other is None else max(mask, other)
    viewed = _viewed(value, dim)
    return None if viewed is None else zero_from(*viewed, depth + 1)


def _is_zero_everywhere(value: Value) -> bool:
    while value.op is not None and value.op.name in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
        value = value.op.operands[0]
    return is_zero(value)


def _counts(value: Value, dim: int) -> bool:
    """Whether a tensor is 0, 1, 2 … along an axis."""
    op = value.op
    if op is not None and op.name == "tt.make_range":
        return bool(op.attributes["start"] == 0)
    if op is not None and op.name == "arith.extsi":
        return _counts(op.operands[0], dim)
    viewed = _viewed(value, dim)
    return viewed is not None and _counts(*viewed)


def _viewed(value: Value, dim: int) -> Axis | None:
    """Where an axis comes from through operations that only rearrange; None where it has no one source."""
    op = value.op
    if op is None:
        return None
    if op.name == "tt.expand_dims":
        axis = op.attributes["axis"]
        return None if dim == axis else (op.operands[0], dim - (dim > axis))
    if op.name == "tt.broadcast":
        return (op.operands[0], dim) if op.operands[0].shape[dim] == value.shape[dim] else None
    if op.name == "tt.trans":
        return op.operands[0], op.attributes["order"][dim]
    return (op.operands[0], dim) if _reshapes_nothing(op) else None
