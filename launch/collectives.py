"""What a compiled program sends between chips, from its scheduled HLO."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator

from launch.hlo import Computation, Instruction, Loop, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction, for all times that it runs.

    Attributes:
      kind: one of KINDS.
      dims: of its largest array.
      bytes: that a chip ends up with or starts from, whichever is more; the same for a gather of a weight and the
        scatter of its gradient. A ring sends that much once; twice for an all-reduce.
      times: how often it runs.
      source: `op_name` of its metadata, empty if none.
    """

    kind: str
    dims: tuple[int, ...]
    bytes: int
    times: int
    source: str


def collectives(program: Program) -> list[Collective]:
    """All of a program, loops as often as they run (once where that is not known)."""
    return list(_walk(program, program.computations[program.entry], 1))


def by_kind(found: list[Collective]) -> dict[str, int]:
    """Bytes of each kind."""
    total: collections.Counter[str] = collections.Counter()
    for collective in found:
        total[collective.kind] += collective.bytes
    return dict(total)


def _walk(program: Program, computation: Computation, times: int) -> Iterator[Collective]:
    for instruction in computation.instructions:
        if instruction.opcode == "while":
            body = program.computations[instruction.called("body") or ""]
            count = program.trip_count(Loop(instruction, computation, body)) or 1
            yield from _walk(program, body, times * count)
        elif instruction.opcode == "conditional":
            for name in instruction.branches:
                yield from _walk(program, program.computations[name], times)
        elif instruction.opcode == "call":
            called = program.computations[instruction.called("to_apply") or ""]
            yield from _walk(program, called, times)
        elif instruction.opcode == "fusion":
            # A collective that starts beside other work stands in a fusion whose result is its start.
            inner = program.computations[instruction.called() or ""]
            if "AsyncCollectiveStart" in inner.root.attributes:
                yield from _walk(program, inner, times)
        elif instruction.opcode.removesuffix("-start") in KINDS:
            yield _collective(computation, instruction, times)


def _collective(computation: Computation, instruction: Instruction, times: int) -> Collective:
    given = [
        array
        for name in instruction.operands
        if name in computation.by_name
        for array in computation.by_name[name].arrays
    ]
    # The start of an asynchronous one hands its operands on, too.
    written = instruction.written
    largest = max([*written, *given], key=lambda array: array.bytes)
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(
        kind=instruction.opcode.removesuffix("-start"),
        dims=largest.dims,
        bytes=times * max(sum(a.bytes for a in written), sum(a.bytes for a in given)),
        times=times,
        source=source[1] if source else "",
    )
