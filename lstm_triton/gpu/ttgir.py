"""What a kernel loads from global memory, read from the text of Triton's GPU dialect."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_LOCATION = re.compile(r"\s+loc\(.*$")
_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
_LOAD = re.compile(r"\w*\.(?!local_)\w*(?:load|copy_global_to_local|gather|atomic)")


@dataclass
class _Region:
    op: str
    results: list[str]
    carried: list[str]  # arguments of a loop's body
    passed: list[str]  # of scf.while: what its condition hands on


def loads(text: str, arguments: Sequence[str]) -> list[tuple[str, bool, int]]:
    """The loads of a kernel from global memory: from which argument, whether in a loop, how many bytes.

    A load's pointers are followed back to the kernel's arguments, through loops and branches. Bytes are those of a
    program's tile, masked elements among them; a load in a loop counts once.

    Args:
        text: the kernel in that dialect.
        arguments: names of its arguments, in order.

    Raises:
        NotImplementedError: there are loops that aren't structured.
    """
    lines = [_LOCATION.sub("", line).strip() for line in text.splitlines()]
    head = next(k for k, line in enumerate(lines) if line.startswith("tt.func"))
    origins = {value: {name} for value, name in zip(_NAME.findall(_head(text)), arguments, strict=True)}
    while True:
        known = sum(map(len, origins.values()))
        found = _loads(lines[head + 1 :], origins)
        if sum(map(len, origins.values())) == known:  # a loop may carry what its end only says
            return found


def _head(text: str) -> str:
    """The kernel's arguments, each followed by its location."""
    line = next(line for line in text.splitlines() if line.lstrip().startswith("tt.func"))
    return re.sub(r'"[^"]*"', "", line)


def _loads(lines: Sequence[str], origins: dict[str, set[str]]) -> list[tuple[str, bool, int]]:
    """One pass over a kernel's operations, which adds to `origins`: from which arguments each value derives."""
    found = []
    regions: list[_Region] = []
    labels = set()

    def derive(values: Sequence[str], sources: Sequence[str]) -> None:
        for value, source in zip(values, sources, strict=False):
            if source in origins:
                origins.setdefault(value, set()).update(origins[source])

    for line in lines:
        if line.startswith("}"):
            if not regions:
                break
            if not line.endswith("{"):  # else the other branch, or a loop's body behind its condition
                regions.pop()
            continue
        if line.startswith("^"):
            labels.add(line[1:].split("(")[0].rstrip(":"))
            if regions and regions[-1].op == "scf.while":
                derive(_NAME.findall(line), regions[-1].passed)
            continue
        left, _, text = line.partition(" = ") if line.startswith("%") else ("", "", line)
        named = re.match(r'"?([\w.]+)', text)
        if not named:
            continue
        op, operands, results = named[1], _NAME.findall(text), _results(left)
        if op in ("cf.br", "cf.cond_br") and labels & set(re.findall(r"\^(\w+)", text)):
            raise NotImplementedError(f"a loop that isn't structured: {line}")
        if op == "scf.yield":
            region = regions[-1]
            derive(region.carried, operands)
            if region.op != "scf.while":
                derive(region.results, operands)
        elif op == "scf.condition":
            regions[-1].passed = operands[1:]
            derive(regions[-1].results, operands[1:])
        elif op in ("scf.for", "scf.while", "scf.if") or text.endswith("{"):
            pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.#-]+)", text)[op == "scf.for" :]  # the first is its variable
            carried, starts = [a for a, _ in pairs], [b for _, b in pairs]
            derive(carried, starts)
            if op == "scf.for":
                derive(results, starts)
            regions.append(_Region(op, results, carried, []))
        elif _LOAD.match(op):
            in_loop = any(region.op in ("scf.for", "scf.while") for region in regions)
            sources = set().union(*(origins.get(operand, set()) for operand in operands))
            found += [(name, in_loop, _bytes(text)) for name in sorted(sources)]
        else:
            for operand in operands:
                derive(results, [operand] * len(results))
    return found


def _results(left: str) -> list[str]:
    """The names of an operation's results: "%x", "%x, %y" or "%x:2"."""
    if ":" in left:
        name, count = left.split(":")
        return [f"{name}#{k}" for k in range(int(count))]
    return _NAME.findall(left)


def _bytes(text: str) -> int:
    """Of the tile that a load takes, from its types."""
    sizes = [0]
    for shape, bits in re.findall(r"<((?:\d+x)*)(?:!tt\.ptr<)?[a-z]+(\d+)\b", text.rsplit(" : ", 1)[-1]):
        size = int(bits) // 8
        for extent in shape.split("x")[:-1]:
            size *= int(extent)
        sizes.append(size)
    return max(sizes)
