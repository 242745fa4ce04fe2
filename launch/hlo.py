"""Reads the scheduled HLO text of a compiled program: what it reads from memory in a loop, and what it copies.

The text is that of `jax.stages.Compiled.as_text()`. Where an array lies stands in its layout: `S(1)` is a TPU's VMEM,
other numbers are smaller memories on the chip, and without one it is in HBM. A fusion is one pass over its operands.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence

_BITS = re.compile(r"[a-z]+(\d+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.*)$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_COMMENT = re.compile(r"/\*.*?\*/")
_NAME = re.compile(r"%([\w.\-]+)")
_INTEGER = re.compile(r"-?\d+")

# Nothing is read or written, or what is belongs to the instructions that follow.
_FREE = {
    "parameter",
    "constant",
    "iota",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
}
_HANDING_ON = (_FREE - {"constant", "iota"}) | {"while", "conditional", "call"}
_UPDATES = ("dynamic-update-slice", "scatter")
_SLICES = ("dynamic-slice", "slice", "gather", "dynamic-slice-start", "slice-start")


class HloError(ValueError):
    """The text is not what this module understands."""


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's type in HLO text.

    Attributes:
      dtype: HLO's name, e.g. "bf16".
      dims: logical dimensions.
      minor_to_major: the dimensions as they lie in memory, fastest first.
      tile: the first tile of the layout; empty without tiles.
      space: number of the memory it lies in; 0 is the main one.
    """

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        """Number of scalars, without padding."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size in memory, with the padding of its tiles."""
        order = self.minor_to_major or tuple(reversed(range(len(self.dims))))
        sizes = [self.dims[axis] for axis in order]
        tile = tuple(reversed(self.tile))
        sizes += [1] * (len(tile) - len(sizes))
        for axis, size in enumerate(tile):
            sizes[axis] = -(-sizes[axis] // size) * size
        return math.ceil(math.prod(sizes) * _bits(self.dtype) / 8)


Shape = Array | tuple["Shape", ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without "%".
      shape: of its result.
      opcode: e.g. "fusion".
      operands: names of instructions of the same computation.
      literal: what stands between the parentheses of a constant or parameter.
      attributes: the rest of the line.
      is_root: whether it is the computation's result.
    """

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    @property
    def arrays(self) -> list[Array]:
        """The arrays of the result, in order."""
        return list(_leaves(self.shape))

    @property
    def written(self) -> list[Array]:
        """The arrays that it writes: of the start of an asynchronous operation, which also hands its operands on, the
        results.
        """
        if not self.opcode.endswith("-start") or isinstance(self.shape, Array):
            return self.arrays
        return list(_leaves(self.shape[0 if self.opcode == "copy-start" else 1]))

    def called(self, attribute: str = "calls") -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def branches(self) -> list[str]:
        """The computations that a conditional chooses from."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if found:
            return _NAME.findall(found[1])
        both = [self.called(name) for name in ("true_computation", "false_computation")]
        return [name for name in both if name]

    @property
    def index(self) -> int:
        """Which element a get-tuple-element takes, or which parameter this is."""
        if self.opcode == "parameter":
            return int(self.literal)
        found = re.search(r"\bindex=(\d+)", self.attributes)
        if not found:
            raise HloError(f"%{self.name} has no index")
        return int(found[1])


class Computation:
    """A list of instructions, in the order in which they run."""

    def __init__(self, name: str, instructions: Sequence[Instruction]):
        self.name = name
        self.instructions = list(instructions)
        self.by_name = {instruction.name: instruction for instruction in instructions}
        self.users: dict[str, list[Instruction]] = {name: [] for name in self.by_name}
        for instruction in instructions:
            for operand in dict.fromkeys(instruction.operands):
                if operand in self.users:
                    self.users[operand].append(instruction)

    @property
    def root(self) -> Instruction:
        """The result."""
        return next(instruction for instruction in self.instructions if instruction.is_root)

    def parameter(self, index: int) -> Instruction:
        """A parameter by its number."""
        for instruction in self.instructions:
            if instruction.opcode == "parameter" and instruction.index == index:
                return instruction
        raise HloError(f"%{self.name} has no parameter {index}")


@dataclasses.dataclass(frozen=True)
class Read:
    """Bytes that one instruction reads from the main memory, for all times that it runs.

    Attributes:
      instruction: its name.
      opcode: e.g. "fusion".
      bytes: for all `times` together.
      times: how often it runs in one pass of the outer loop.
      source: `op_name` of its metadata, empty if none.
    """

    instruction: str
    opcode: str
    bytes: int
    times: int
    source: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop and the computation that holds it."""

    instruction: Instruction
    computation: Computation
    body: Computation


class Program:
    """The computations of a compiled module."""

    def __init__(self, text: str):
        """Parses `as_text()`.

        Raises:
          HloError: there is no entry computation, or a line cannot be read.
        """
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        name, lines = "", list[Instruction]()
        for line in text.splitlines():
            header = _COMPUTATION.match(line)
            if header:
                name, lines = header[2], []
                self.entry = name if header[1] else self.entry
            elif line == "}" and name:
                self.computations[name] = Computation(name, lines)
                name = ""
            elif name and (found := _INSTRUCTION.match(line)):
                lines.append(_parse_instruction(found[2], found[3], bool(found[1])))
        if not self.entry:
            raise HloError("the text holds no ENTRY computation; give that of compiled.as_text()")

    def _named(self, instruction: Instruction, attribute: str) -> Computation:
        name = instruction.called(attribute)
        if name is None or name not in self.computations:
            raise HloError(f"%{instruction.name} names no computation as its {attribute}")
        return self.computations[name]

    # -------------------------------------------------------------------------------------------- structure

    def scheduled(self) -> Iterator[Computation]:
        """The computations that run as they stand, from the entry through loops, branches and calls."""
        todo, seen = [self.entry], set()
        while todo:
            name = todo.pop(0)
            if name in seen or name not in self.computations:
                continue
            seen.add(name)
            computation = self.computations[name]
            yield computation
            for instruction in computation.instructions:
                if instruction.opcode == "while":
                    todo += [self._named(instruction, part).name for part in ("condition", "body")]
                elif instruction.opcode == "conditional":
                    todo += instruction.branches
                elif instruction.opcode == "call":
                    todo.append(self._named(instruction, "to_apply").name)

    def loops(self) -> list[Loop]:
        """All while loops, outer ones before inner ones, and in the order in which they run."""
        return [
            Loop(instruction, computation, self._named(instruction, "body"))
            for computation in self.scheduled()
            for instruction in computation.instructions
            if instruction.opcode == "while"
        ]

    def trip_count(self, loop: Loop) -> int | None:
        """How often a loop that counts up between two constants runs, as those of scans do; None for others."""
        known = re.search(r'known_trip_count\D+"(\d+)"', loop.instruction.attributes)
        if known:
            return int(known[1])
        condition = self._named(loop.instruction, "condition")
        test = condition.root
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, bound = (condition.by_name[name] for name in test.operands)
        first, end = (self._start_value(loop, value) for value in (counter, bound))
        if first is None or end is None or counter.opcode != "get-tuple-element":
            return None
        return max(0, -(-(end - first) // self._step(loop, counter.index)))

    def _step(self, loop: Loop, index: int) -> int:
        """By how much a loop's counter grows: 1, but where the compiler has unrolled it."""
        root = loop.body.root
        if root.opcode != "tuple":
            return 1
        grown = loop.body.by_name[root.operands[index]]
        if grown.opcode != "add":
            return 1
        literals = [
            value.literal
            for value in (loop.body.by_name.get(name) for name in grown.operands)
            if value is not None and value.opcode == "constant"
        ]
        return int(literals[0]) if literals and _INTEGER.fullmatch(literals[0]) else 1

    def _start_value(self, loop: Loop, value: Instruction) -> int | None:
        """The integer that an operand of a loop's condition has before the first iteration, if it is a constant."""
        if value.opcode == "get-tuple-element":
            start = loop.computation.by_name[loop.instruction.operands[0]]
            if start.opcode != "tuple":
                return None
            value = loop.computation.by_name[start.operands[value.index]]
            while value.opcode in ("bitcast", "copy"):
                value = loop.computation.by_name[value.operands[0]]
        is_integer = value.opcode == "constant" and _INTEGER.fullmatch(value.literal)
        return int(value.literal) if is_integer else None

    # -------------------------------------------------------------------------------------------- reads

    def reads(self, computation: Computation, times: int = 1) -> list[Read]:
        """What each instruction of a computation reads from the main memory, inner loops and calls included.

        An operand counts whole, padding included, once for each instruction that takes it. Where it is only sliced or
        gathered from, alone or inside a fusion, the result counts instead, and nothing where it is only updated. A loop
        counts as often as it runs, a conditional as its most expensive branch. Operands in other memories do not
        count: what brought them there did.

        Raises:
          HloError: an inner loop does not run a constant number of times.
        """
        found = []
        for instruction in computation.instructions:
            if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
                continue
            if instruction.opcode == "while":
                body = self._named(instruction, "body")
                count = self.trip_count(Loop(instruction, computation, body))
                if count is None:
                    raise HloError(f"loop %{instruction.name} has no constant number of iterations")
                found += self.reads(body, times * count)
            elif instruction.opcode == "conditional":
                branches = [
                    self.reads(self.computations[name], times) for name in instruction.branches
                ]
                found += max(branches, key=total_bytes)
            elif instruction.opcode == "call":
                found += self.reads(self._named(instruction, "to_apply"), times)
            else:
                count = self._reads_of(computation, instruction)
                if count:
                    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
                    found.append(
                        Read(
                            instruction.name,
                            instruction.opcode,
                            count * times,
                            times,
                            source[1] if source else "",
                        )
                    )
        return found

    def _reads_of(self, computation: Computation, instruction: Instruction) -> int:
        operands = [computation.by_name[name] for name in instruction.operands]
        return sum(
            self._read_of_operand(instruction, place, operand)
            for place, operand in enumerate(operands)
            if any(array.space == 0 for array in operand.arrays)
        )

    def _read_of_operand(self, user: Instruction, place: int, operand: Instruction) -> int:
        whole = sum(array.bytes for array in operand.arrays if array.space == 0)
        if user.opcode in _SLICES and place == 0:
            return min(whole, sum(array.bytes for array in user.written))
        if user.opcode in _UPDATES and place == 0:
            return 0
        called = self.computations.get(user.called("calls") or "")
        return whole if called is None else min(whole, self._read_of_parameter(called, place))

    def _read_of_parameter(self, computation: Computation, index: int) -> int:
        """Bytes of a parameter that a fused computation reads."""
        parameter = computation.parameter(index)
        total, todo = 0, [parameter]
        while todo:
            value = todo.pop()
            if value.is_root:
                total += sum(array.bytes for array in parameter.arrays)
            for user in computation.users[value.name]:
                if user.opcode == "bitcast":
                    todo.append(user)
                    continue
                for place, name in enumerate(user.operands):
                    if name == value.name:
                        total += self._read_of_operand(user, place, parameter)
        return total

    # -------------------------------------------------------------------------------------------- copies

    def copies(self, elements: int) -> list[Instruction]:
        """Instructions that write a whole buffer of `elements` scalars, or several, to a new place.

        That is every instruction of the schedule whose result has that size, or some equal parts that have it together
        (a split, a transposed, converted or padless copy; also one into another memory), but for those that hand
        buffers on or update one in place: a dynamic-update-slice or scatter, alone or as the result of a fusion, of an
        operand. (Where the operand is needed afterwards, the compiler puts a `copy` before it.)
        """
        found = []
        for computation in self.scheduled():
            for instruction in computation.instructions:
                if instruction.opcode in _HANDING_ON or instruction.opcode.endswith("-done"):
                    continue
                new = [
                    array.elements
                    for place, array in enumerate(instruction.written)
                    if not self._is_update(instruction, place)
                ]
                if any(size and size * new.count(size) % elements == 0 for size in new):
                    found.append(instruction)
        return found

    def _is_update(self, instruction: Instruction, place: int) -> bool:
        """Whether a result is an operand with some of its elements replaced."""
        if instruction.opcode in _UPDATES:
            return True
        if instruction.opcode != "fusion":
            return False
        inner = self._named(instruction, "calls")
        value = inner.root
        if value.opcode == "tuple":
            value, place = inner.by_name[value.operands[place]], 0
        value = _before_bitcasts(inner, value)
        if not self._is_update(value, place):
            return False
        return _before_bitcasts(inner, inner.by_name[value.operands[0]]).opcode == "parameter"


def total_bytes(reads: Iterable[Read]) -> int:
    """The sum of some reads."""
    return sum(read.bytes for read in reads)


def _before_bitcasts(computation: Computation, value: Instruction) -> Instruction:
    while value.opcode == "bitcast":
        value = computation.by_name[value.operands[0]]
    return value


def _leaves(shape: Shape) -> Iterator[Array]:
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from _leaves(part)


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    if dtype in ("token", "opaque"):
        return 0
    found = _BITS.match(dtype)
    if not found:
        raise HloError(f"unknown element type {dtype!r}")
    return int(found[1])


def parse_shape(text: str) -> tuple[Shape, str]:
    """Reads a type at the start of a text; returns it and the rest.

    Raises:
      HloError: there is none.
    """
    text = text.lstrip()
    if text.startswith("("):
        parts, text = [], _COMMENT.sub("", text[1:]).lstrip()
        while not text.startswith(")"):
            part, text = parse_shape(text)
            parts.append(part)
            text = text.lstrip().removeprefix(",").lstrip()
        return tuple(parts), text[1:]
    found = _ARRAY.match(text)
    if not found:
        raise HloError(f"no HLO type at {text[:60]!r}")
    order, _, properties = (found[3] or "").partition(":")
    space = re.search(r"S\((\d+)\)", properties)
    tile = re.search(r"T\(([\d,]+)\)", properties)
    array = Array(
        dtype=found[1],
        # A bound of a dynamic dimension is written <=N.
        dims=tuple(int(size.strip("<= ")) for size in found[2].split(",") if size.strip()),
        minor_to_major=tuple(int(axis) for axis in order.split(",") if axis.strip()),
        tile=tuple(int(size) for size in tile[1].split(",")) if tile else (),
        space=int(space[1]) if space else 0,
    )
    return array, text[found.end() :]


def _parse_instruction(name: str, text: str, is_root: bool) -> Instruction:
    shape, rest = parse_shape(text)
    found = _OPCODE.match(rest)
    if not found:
        raise HloError(f"no operation in the line of %{name}")
    depth, end = 1, found.end()
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    inside = rest[found.end() : end - 1]
    return Instruction(
        name=name,
        shape=shape,
        opcode=found[1],
        operands=() if found[1] in ("parameter", "constant") else tuple(_NAME.findall(inside)),
        literal=inside if found[1] in ("parameter", "constant") else "",
        attributes=rest[end:],
        is_root=is_root,
    )
