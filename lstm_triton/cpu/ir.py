"""Triton's TTIR, read from its text into operations, values and blocks."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


class Unsupported(NotImplementedError):
    """A kernel uses what the CPU target lacks."""


@dataclass(frozen=True)
class Type:
    """A scalar (shape ()) or a tensor; `element` is as MLIR writes it, "!" before it stands for a pointer to it."""

    shape: tuple[int, ...]
    element: str

    @property
    def is_pointer(self) -> bool:
        return self.element.startswith("!")

    @property
    def pointee(self) -> "Type":
        return Type(self.shape, self.element[1:])

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(eq=False)
class Value:
    """What an operation returns, or an argument of a function or block."""

    type: Type
    op: "Op | None" = None  # that defines it; None for arguments
    index: int = 0  # among the results of `op`, or among the arguments
    users: list["Op"] = field(default_factory=list)
    block: "Block | None" = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape


@dataclass(eq=False)
class Block:
    """Operations in order. `owner` is the operation that has it as a region."""

    owner: "Op | None" = None
    arguments: list[Value] = field(default_factory=list)
    ops: list["Op"] = field(default_factory=list)


@dataclass(eq=False)
class Op:
    """One operation; `number` grows in the order of the text."""

    name: str
    operands: list[Value]
    results: list[Value]
    attributes: dict[str, Any]
    block: Block
    number: int
    place: str  # in the kernel's source: file:line
    regions: list[Block] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name} at {self.place}"


@dataclass
class Function:
    """A kernel."""

    name: str
    body: Block  # its arguments are the kernel's


def walk(block: Block) -> Iterator[Op]:
    """A block's operations and those in their regions, in the order of the text."""
    for op in block.ops:
        yield op
        for region in op.regions:
            yield from walk(region)


_LOCATION = re.compile(r'loc\((?:[^()"]|"[^"]*"|\((?:[^()"]|"[^"]*"|\([^()]*\))*\))*\)')
_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
_TYPE = re.compile(
    r"tensor<[\dx]*x?(?:!tt\.ptr<\w+(?:, \d+)?>|\w+)>|!tt\.ptr<\w+(?:, \d+)?>|\b(?:index|[a-z]+\d+\w*)\b"
)


def parse(text: str) -> Function:
    """The one kernel of a module.

    Raises:
        Unsupported: the text has a construct that isn't known here.
    """
    return _Parser(text).function


def parse_type(text: str) -> Type:
    text = text.strip()
    match = re.fullmatch(r"tensor<((?:\d+x)*)(.*)>", text)
    shape, element = (match[1], match[2]) if match else ("", text)
    pointer = re.fullmatch(r"!tt\.ptr<(\w+)(?:, \d+)?>", element)
    return Type(tuple(int(n) for n in shape.split("x") if n), "!" + pointer[1] if pointer else element)


class _Parser:
    """Reads line by line: each operation, region end and block label has one of its own."""

    def __init__(self, text: str) -> None:
        self.places = dict(re.findall(r"^(#loc\d*) = (.*)$", text, re.MULTILINE))
        self.values: dict[str, Value] = {}
        self.count = 0
        self.function: Function
        self.lines = [line.strip() for line in _joined(text)]
        self.at = 0
        while self.at < len(self.lines):
            line = self.lines[self.at]
            self.at += 1
            if line.startswith("tt.func"):
                self._function(line)
                return
        raise Unsupported("the module has no kernel")

    def _function(self, line: str) -> None:
        head = _LOCATION.sub("", line)
        match = re.match(r"tt\.func \w* ?@(\w+)\((.*?)\)\s*(?:attributes.*)?\{$", head)
        if not match:
            raise Unsupported(f"cannot read the kernel's signature: {head}")
        body = Block()
        for k, (name, kind) in enumerate(re.findall(r"(%[\w$.-]+): (!tt\.ptr<\w+(?:, \d+)?>|\w+)", match[2])):
            self._argument(body, name, kind, k)
        self.function = Function(match[1], body)
        self._block(body)

    def _argument(self, block: Block, name: str, kind: str, index: int) -> Value:
        value = self.values[name] = Value(parse_type(kind), None, index, block=block)
        block.arguments.append(value)
        return value

    def _block(self, block: Block) -> str:
        """Reads operations up to the end of the region; returns the line that ends it."""
        while True:
            line = self.lines[self.at]
            self.at += 1
            if line.startswith("}"):
                return line
            if line.startswith("^"):  # the label of a block, with its arguments
                for k, (name, kind) in enumerate(re.findall(r"(%[\w$.-]+): ([^,()]+)", _LOCATION.sub("", line))):
                    self._argument(block, name, kind, k)
            else:
                self._op(line, block)

    def _op(self, line: str, block: Block) -> None:
        place = self._place(line)
        text = _LOCATION.sub("", line).strip()
        results, _, rest = text.partition(" = ") if text.startswith("%") else ("", "", text)
        match = re.match(r'"?([\w.]+)"?(.*)$', rest, re.DOTALL)
        if not match:
            raise Unsupported(f"cannot read {text!r}")
        name, rest = match[1], match[2]
        self.count += 1
        op = Op(name, [], [], {}, block, self.count, place)
        block.ops.append(op)
        names = [n.strip() for n in results.split(",")] if results else []
        if name in ("scf.for", "scf.while", "scf.if"):
            types = getattr(self, "_" + name.replace(".", "_"))(op, rest)
        elif rest.endswith("({"):  # the generic form of an operation with a region
            self._use(op, rest)
            op.attributes.update(_attributes(rest))
            region = Block(op)
            op.regions.append(region)
            last = self._block(region)
            op.place = self._place(last)
            end = _LOCATION.sub("", last)
            types = _types(end.rsplit("->", 1)[-1])
        else:
            body, trailer = _split_types(rest)
            self._use(op, body)
            op.attributes.update(_attributes(body))
            types = _result_types(op, body, trailer)
        if len(names) == 1 and ":" in names[0]:
            names = [f"{names[0].split(':')[0]}#{k}" for k in range(int(names[0].split(":")[1]))]
        if len(names) > len(types):
            raise Unsupported(f"{op}: cannot read the types of its results")
        for k, (n, type_) in enumerate(zip(names, types, strict=False)):
            self.values[n] = Value(type_, op, k, block=block)
            op.results.append(self.values[n])

    def _use(self, op: Op, text: str) -> None:
        for name in _NAME.findall(text):
            value = self.values[name]
            op.operands.append(value)
            value.users.append(op)

    def _scf_for(self, op: Op, rest: str) -> list[Type]:
        match = re.match(r" (?:unsigned )?(%\S+) = (%\S+) to (%\S+) step (%\S+)\s*(.*)\{$", rest)
        if not match:
            raise Unsupported(f"{op}: cannot read its bounds")
        variable, low, high, step, tail = match.groups()
        carried, types = [], []
        if "iter_args(" in tail:
            pairs, after = tail.split("iter_args(", 1)[1].split(")", 1)
            carried = [p.split(" = ") for p in pairs.split(", ")]
            types = _types(_parenthesised(after.split("->", 1)[1]))
            kind = (
                after.rsplit(":", 1)[1] if after.rstrip().endswith("i32") or after.rstrip().endswith("i64") else "i32"
            )
        else:
            kind = tail.strip(" :") or "index"
        self._use(op, " ".join([low, high, step, *(start for _, start in carried)]))
        region = Block(op)
        op.regions.append(region)
        self._argument(region, variable, kind, 0)
        for k, ((name, _), type_) in enumerate(zip(carried, types, strict=True)):
            self.values[name] = Value(type_, None, k + 1, block=region)
            region.arguments.append(self.values[name])
        self._block(region)
        return types

    def _scf_if(self, op: Op, rest: str) -> list[Type]:
        types = _types(rest.split("->", 1)[1]) if "->" in rest else []
        self._use(op, rest)
        op.regions.append(Block(op))
        if "else" in self._block(op.regions[0]):
            op.regions.append(Block(op))
            self._block(op.regions[1])
        return types

    def _scf_while(self, op: Op, rest: str) -> list[Type]:
        head, _, kinds = rest.rpartition(" : (")
        inputs, results = ("(" + kinds).split("->", 1)
        pairs = [p.split(" = ") for p in re.findall(r"%[\w$.-]+ = %[\w$.#-]+", head)]
        self._use(op, " ".join(start for _, start in pairs))
        before, after = Block(op), Block(op)
        op.regions += [before, after]
        for k, ((name, _), type_) in enumerate(zip(pairs, _types(inputs), strict=True)):
            self.values[name] = Value(type_, None, k, block=before)
            before.arguments.append(self.values[name])
        self._block(before)
        self._block(after)
        return _types(results)

    def _place(self, line: str) -> str:
        """file:line of an operation, and of the calls that lead there."""
        found = _LOCATION.findall(line)
        return " called from ".join(dict.fromkeys(self._resolved(found[-1]))) if found else "an unknown place"

    def _resolved(self, location: str) -> Iterator[str]:
        for match in re.finditer(r'"([^"]+)":(\d+):\d+|#loc\d*', location):
            if match[1]:
                yield f"{match[1]}:{match[2]}"
            else:
                yield from self._resolved(self.places.get(match[0], ""))


def _joined(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.strip() and not line.startswith("#") and not line.startswith("module"):
            yield line


def _parenthesised(text: str) -> str:
    """What the first pair of parentheses holds, or all up to a brace or colon."""
    text = text.strip()
    if not text.startswith("("):
        return text
    depth = 0
    for k, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[1:k]
    return text


def _types(text: str) -> list[Type]:
    return [parse_type(t) for t in _TYPE.findall(text)]


def _split_types(text: str) -> tuple[str, str]:
    """An operation's text before and after the colon of its types, which is outside of all brackets."""
    depth = 0
    for k in range(len(text) - 1, -1, -1):
        c = text[k]
        depth += (c in ")}]") - (c in "({[")
        if depth == 0 and text.startswith(" : ", k):
            return text[:k], text[k + 3 :]
    return text, ""


def _attributes(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for body in re.findall(r"<?\{([^{}]*)\}>?", text):
        for key, numbers in re.findall(r"(\w+) = array<i32: ([\d, ]+)>", body):
            found[key] = tuple(int(n) for n in numbers.split(","))
        for key, number in re.findall(r"(\w+) = (-?\d+) : i\d+", body):
            found[key] = int(number)
        for key, word in re.findall(r'(\w+) = "([^"]*)"', body):
            found[key] = word
        for key, word in re.findall(r"(\w+) = (true|false)\b", body):
            found[key] = word == "true"
    return found


def _result_types(op: Op, body: str, trailer: str) -> list[Type]:
    """The types of the results, from what the pretty form of each kind of operation prints."""
    name = op.name
    words = re.findall(r"\b\w+\b", re.sub(r"%[\w$.#-]+|\{.*\}", " ", body))
    if name in (
        "arith.cmpi",
        "arith.cmpf",
        "tt.get_program_id",
        "tt.get_num_programs",
        "tt.atomic_rmw",
        "tt.atomic_cas",
    ):
        op.attributes["words"] = words
    if name == "arith.constant":
        literal = re.sub(r"^\s*(?:dense<(.*)>|(.*?))\s*$", lambda m: m[1] or m[2], body)
        op.attributes["literal"] = literal
        return _types(trailer) if trailer else [Type((), "i1")]
    if not trailer:
        return []
    if "->" in trailer:
        return _types(trailer.rsplit("->", 1)[1]) * (2 if name == "tt.split" else 1)
    if re.search(r"\bto\b", trailer):
        return _types(trailer.rsplit(" to ", 1)[1])
    types = _types(trailer)
    if not types:
        raise Unsupported(f"{op}: cannot read its type {trailer!r}")
    if name in ("arith.cmpi", "arith.cmpf"):
        return [Type(types[0].shape, "i1")]
    if name == "tt.load":
        return [types[0].pointee]
    if name == "arith.select":
        return [types[-1]]
    return [types[0]]
