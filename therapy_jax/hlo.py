"""What a compiled program sends between chips, read from its text (XLA's HLO).

A program is a list of computations. Each line of one is an instruction; a `while`, a `fusion` or a `call` names the
computations that it runs. So the walk starts at the entry, follows the names, and multiplies by the trips of each loop.

Bytes are what one chip sends, were each collective a ring over its group of n chips (Patarasuk & Yuan 2009, "Bandwidth
optimal all-reduce algorithms"): (n-1)/n of the whole array to gather it or to sum and scatter it, twice that to sum it
everywhere. XLA may do it otherwise, but not with less.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z\-]*)\(")
ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
CONDITION = re.compile(r"condition=%?([\w.\-]+)")


class Collective(NamedTuple):
    """One collective instruction."""

    kind: str  # of KINDS
    bytes: float  # sent by one chip each time
    times: int  # how often it runs, as far as the loops around it say
    certain: (
        bool  # False: in a loop whose trips depend on data; `times` counts their limit, or one trip where none is known
    )


def collectives(text: str) -> list[Collective]:
    """The text of a compiled program -> every collective that it runs."""
    parts, entry = computations(text)
    found = re.search(r"num_partitions=(\d+)", text)
    return list(_walk(parts, entry, int(found.group(1)) if found else 1, 1, True, set()))


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """-> (the lines of each computation by its name, the name of the entry)."""
    parts: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if header := HEADER.match(line):
            lines = parts.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith(" "):
            lines.append(line)
    return parts, entry


def _walk(
    parts: dict[str, list[str]], name: str, chips: int, times: int, certain: bool, seen: set[str]
) -> Iterator[Collective]:
    """seen: chains met so far. XLA cuts one collective into a chain of steps, each inside a fusion with other work, and writes
    it down in every one."""
    for line in parts.get(name, []):
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        _, result, operation = match.groups()
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            chain = re.search(r'chain_id="(\w+)"', line)
            if chain is not None:
                if chain.group(1) in seen:
                    continue
                seen.add(chain.group(1))
            if kind == "all-reduce" and name.startswith(
                "all-reduce-scatter"
            ):  # a TPU's reduce-scatter: the sum, then a slice
                kind = "reduce-scatter"
                sent = _size(result) / _group(line, chips)
            else:
                sent = _size(result, started=operation.endswith("-start") and kind != "all-reduce")
            yield Collective(kind, sent * _share(kind, _group(line, chips)), times, certain)
        elif operation == "while":
            condition, body = CONDITION.search(line), CALLED.search(line)
            if condition is None or body is None:
                continue
            trips, sure = _trips(line, parts.get(condition.group(1), []), parts.get(body.group(1), []))
            yield from _walk(parts, body.group(1), chips, times * trips, certain and sure, seen)
        elif operation in ("fusion", "call", "async-start", "conditional"):
            branches = BRANCHES.search(line)
            called = CALLED.findall(line) + (re.findall(r"[\w.\-]+", branches.group(1)) if branches else [])
            for other in called:
                yield from _walk(parts, other, chips, times, certain and operation != "conditional", seen)


def _share(kind: str, n: int) -> float:
    """Bytes sent by one of n chips per byte of the result."""
    if kind == "collective-permute":
        return 1.0
    return {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": float(n - 1)}.get(kind, (n - 1) / n)


def _size(shape: str, started: bool = False) -> float:
    """Bytes of an array, or of all arrays of a tuple. started: of what a started collective will make, which stands behind
    what it reads; scalars beside them are its own."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * BITS.get(dtype, int(re.sub(r"\D", "", dtype[:3]) or 8)) / 8
        for dtype, dims in ARRAY.findall(re.sub(r"/\*.*?\*/|\{[^{}]*\}", "", shape))
    ]
    if started:
        sizes = [size for size in sizes if size > 4]
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def _group(line: str, chips: int) -> int:
    """Chips that work together in a collective."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed.group(1).count(",") + 1
    if grid := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(grid.group(1))
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh.group(1))}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh.group(2))
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    return chips


def _trips(line: str, condition: list[str], body: list[str]) -> tuple[int, bool]:
    """-> (trips of a loop, whether that is certain). Counting loops go on while i < n, from 0; the body adds to i, 1 or as many
    rounds as it was unrolled to. A loop that may also end for another reason has n as its limit; one that goes on while i <
    something computed counts as one trip."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line):
        return int(known.group(1)), True
    constants = _constants(condition)
    for text in condition:
        compared = re.search(r" compare\((?:\S+ )?%?([\w.\-]+), (?:\S+ )?%?([\w.\-]+)\), direction=LT", text)
        if compared and compared.group(2) in constants:
            step = _step(body, _index(condition, compared.group(1)))
            return -(-constants[compared.group(2)] // step), text.lstrip().startswith("ROOT")
    return 1, False


def _constants(lines: list[str]) -> dict[str, int]:
    found = (re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", line) for line in lines)
    return {match.group(1): int(match.group(2)) for match in found if match}


def _index(condition: list[str], name: str) -> int:
    """Which part of the loop's tuple the condition compares."""
    for line in condition:
        if re.match(rf"^\s+%?{re.escape(name)} = ", line) and (
            place := re.search(r"index=(\d+)", line.split("(", 1)[1])
        ):
            return int(place.group(1))
    return 0


def _step(body: list[str], index: int) -> int:
    """What the body adds to that part; 1 where it cannot be seen."""
    root = next((line for line in body if line.startswith("  ROOT ")), "")
    operands = re.findall(r"%([\w.\-]+)", root.partition(" tuple(")[2].partition(")")[0])
    name = operands[index] if index < len(operands) else ""
    constants = _constants(body)
    for line in body:
        if (added := re.match(rf"^\s+%{re.escape(name)} = \S+ add\((.*?)\)", line)) and name:
            known = [constants[x] for x in re.findall(r"%([\w.\-]+)", added.group(1)) if x in constants]
            return known[0] if known else 1
    return 1
