"""The `<seg>start, end</seg>` grammar: one byte automaton, and the host parser that runs it over a text.

A citation is `<seg>A, B</seg>`: two times in seconds, each of digits with at most one dot, a comma and any blanks
between (echo.md, section 1: `<seg>([\\d\\.]+,\\s*[\\d\\.]+)</seg>`, ASCII). `_CONTENT` is the only definition of it;
`NEXT` and `OP` are compiled from there; `parse` runs them over a text, `automaton.py` over sampled tokens on the
device.

Every `</seg>` ends a citation, and a `Reason` says whether audio can be inserted. What counts is the last `<seg>`
before it: a `<seg>` always starts anew, a second `</seg>` has no open tag.

Times are exact: the sample nearest to a time, `floor(16000 * time + 1/2)`. The time at which that changes is an odd
multiple of 0.00003125 s, so eight decimals decide, and what follows in a long number cannot change it; whole seconds
saturate at `MAX_SECONDS`, beyond any recording. All arithmetic fits in int32.
"""

from __future__ import annotations

import dataclasses
import enum
import fractions
import math
import re
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from echo_jax.model.frontend import SAMPLE_RATE

OPEN = b"<seg>"
CLOSE = b"</seg>"
MIN_CLIP_SAMPLES = 3_200  # 0.2 s, 5 audio tokens; Algorithm 1 inserts nothing shorter
MAX_SECONDS = 100_000

# A time is whole seconds and units of 1e-8 s; half a sample is a whole number of units, 3,125.
_UNITS_PER_SAMPLE = 10**8 // SAMPLE_RATE
FIRST_WEIGHT = 10**7  # of the digit behind the dot


class Reason(enum.IntEnum):
    """What became of a `</seg>`. The grammar knows the first four, the recording the next three."""

    VALID = 0
    NO_OPEN = 1  # no `<seg>` since the last `</seg>`
    MALFORMED = 2  # not two numbers with a comma: empty, negative, `1e9`, words
    BAD_NUMBER = 3  # digits and dots that are no number: `1.2.3`, `.`
    NOT_INCREASING = 4  # start >= end, in samples
    OUT_OF_RANGE = 5  # starts at or behind the end of the recording
    TOO_SHORT = 6  # less than 0.2 s of the recording
    # Only a sampler can say these.
    NO_TURNS_LEFT = 7  # the turn limit is reached
    NO_ROOM = 8  # the clip does not fit into what is left of the response's budget


class Op(enum.IntEnum):
    """What a transition does beside moving on. A `</seg>` is `CLOSE` plus the grammar's `Reason`."""

    NONE = 0
    BEGIN = 1  # `<seg>` is complete: forget all numbers
    WHOLE = 2  # a digit before the dot
    FRACTION = 3  # a digit behind the dot
    COMMA = 4  # the first number is complete
    CLOSE = 5


# The inside of a tag: state -> {bytes: next state}. What is not listed is malformed up to the next tag. `good` and
# `bad` are the states in which `</seg>` may follow; they are entered by its `<`.
_DIGITS, _BLANKS = b"0123456789", b" \t\n\r\f\v"
_SECOND: dict[bytes, str] = {_BLANKS: "space", _DIGITS: "whole2", b".": "dot2"}
_CONTENT: dict[str, dict[bytes, str]] = {
    "start": {_DIGITS: "whole1", b".": "dot1"},
    "whole1": {_DIGITS: "whole1", b".": "fraction1", b",": "comma"},
    "dot1": {_DIGITS: "fraction1", b".": "bad1", b",": "bad_comma"},
    "fraction1": {_DIGITS: "fraction1", b".": "bad1", b",": "comma"},
    "bad1": {_DIGITS + b".": "bad1", b",": "bad_comma"},
    "comma": _SECOND,
    "space": _SECOND,
    "whole2": {_DIGITS: "whole2", b".": "fraction2", b"<": "good"},
    "dot2": {_DIGITS: "fraction2", b".": "bad2", b"<": "bad"},
    "fraction2": {_DIGITS: "fraction2", b".": "bad2", b"<": "good"},
    "bad_comma": {_BLANKS: "bad_comma", _DIGITS + b".": "bad2"},
    "bad2": {_DIGITS + b".": "bad2", b"<": "bad"},
}
_VERDICTS = {
    "text": Reason.NO_OPEN,
    "malformed": Reason.MALFORMED,
    "good": Reason.VALID,
    "bad": Reason.BAD_NUMBER,
}
# A state is a place inside the content, or a context with the part of a tag read so far.
_State = str | tuple[str, bytes]


def is_partial(read: bytes) -> bool:
    """Whether a tag begins with `read` and goes on."""
    return any(tag.startswith(read) and read != tag for tag in (OPEN, CLOSE))


def _follow(context: str, read: bytes) -> tuple[_State, int]:
    """Where a context goes when `read`, a partial tag and one byte more, has been read."""
    if read == CLOSE:
        return ("text", b""), Op.CLOSE + _VERDICTS[context]
    if context in ("good", "bad"):
        if CLOSE.startswith(read):
            return (context, read), Op.NONE
        context = "malformed"
    if read == OPEN:
        return "start", Op.BEGIN
    if not is_partial(read):
        read = read[-1:] if is_partial(read[-1:]) else b""
    return (context, read), Op.NONE


def _step(state: _State, byte: int) -> tuple[_State, int]:
    """The grammar: next state and operation."""
    char = bytes([byte])
    if isinstance(state, tuple):
        context, read = state
        return _follow(context, read + char)
    for chars, target in _CONTENT[state].items():
        if char in chars:
            if target in ("good", "bad"):
                return (target, char), Op.NONE
            if target == "comma":
                return target, Op.COMMA
            if byte in _DIGITS and target.startswith(("whole", "fraction")):
                return target, Op.WHOLE if target.startswith("whole") else Op.FRACTION
            return target, Op.NONE
    return _follow("malformed", char)


def _compile() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`NEXT`, `OP` and `REST` by walking the grammar from plain text."""
    states: list[_State] = [("text", b""), ("malformed", b"")]
    index = {state: i for i, state in enumerate(states)}
    rows: list[list[tuple[int, int]]] = []
    for state in states:  # grows while it is walked
        row = []
        for byte in range(256):
            target, op = _step(state, byte)
            if target not in index:
                index[target] = len(states)
                states.append(target)
            row.append((index[target], int(op)))
        rows.append(row)
    table = np.array(rows, np.int32)
    rest = [
        len(state[1]) - 1 if isinstance(state, tuple) and _in_close(state[1]) else -1
        for state in states
    ]
    return table[..., 0], table[..., 1], np.array(rest, np.int32)


def _in_close(read: bytes) -> bool:
    return bool(read) and CLOSE.startswith(read)


# i32[num_states, 256] each: the state after a byte, and the `Op` on the way. State 0 is plain text.
# REST i32[num_states]: which of `RESTS` completes `</seg>`, -1 in states that are not inside of it.
NEXT, OP, REST = _compile()
NEXT_LISTS: list[list[int]] = NEXT.tolist()  # a Python loop reads lists faster than arrays
OP_LISTS: list[list[int]] = OP.tolist()
RESTS = tuple(CLOSE[k:] for k in range(1, len(CLOSE)))
OUTSIDE = (0, 1)  # the states of plain text and of malformed content, with no tag begun


def to_samples(whole: Any, units: Any) -> Any:
    """Sample nearest to a time: whole seconds plus units of 1e-8 s. On int, numpy or jax integers."""
    return whole * SAMPLE_RATE + (units + _UNITS_PER_SAMPLE // 2) // _UNITS_PER_SAMPLE


def seconds_to_samples(seconds: float) -> int:
    """Sample nearest to a time in seconds, as if its shortest decimal spelling stood in a tag.

    Raises:
      ValueError: negative or not finite.
    """
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"a time must be finite and not negative, not {seconds}")
    exact = fractions.Fraction(repr(float(seconds))) * SAMPLE_RATE + fractions.Fraction(1, 2)
    return min(math.floor(exact), MAX_SECONDS * SAMPLE_RATE)


def crop_samples(start_s: float, end_s: float, num_samples: int) -> tuple[int, int]:
    """The samples [begin, end) of a recording that a span in seconds names, clamped to its length."""
    begin, end = seconds_to_samples(start_s), seconds_to_samples(end_s)
    return min(begin, num_samples), min(end, num_samples)


def check_clip(
    reason: Any, begin: Any, end: Any, num_samples: Any, xp: ModuleType = jnp
) -> tuple[Any, Any, Any]:
    """Judges a closed tag against its recording: the rule of Algorithm 1 for inserting a clip.

    Args:
      reason: i32[...] `Reason` of the grammar.
      begin, end: i32[...] samples as written.
      num_samples: i32[...] length of the recording.
      xp: `jnp` on device, `np` on host.

    Returns:
      (begin, end, reason): end clamped to the recording, and the first `Reason` that applies.
    """
    clamped = xp.minimum(end, num_samples)
    verdict = xp.where(clamped - begin < MIN_CLIP_SAMPLES, int(Reason.TOO_SHORT), int(Reason.VALID))
    verdict = xp.where(begin >= num_samples, int(Reason.OUT_OF_RANGE), verdict)
    verdict = xp.where(begin >= end, int(Reason.NOT_INCREASING), verdict)
    return begin, clamped, xp.where(reason == Reason.VALID, verdict, reason)


@dataclasses.dataclass(frozen=True)
class Citation:
    """A `</seg>` in a text with what it closes.

    Attributes:
      start_s, end_s: the times in seconds as written, to the nearest sample; None where they are not two numbers.
      begin, end: the span in the text (characters, or bytes from `parse_bytes`), from its `<seg>` to behind its
        `</seg>`; the `</seg>` alone where there is no open tag.
      samples: the clip [begin, end) at 16 kHz, clamped to the recording; None where they are not two numbers.
      reason: whether audio can be inserted, or why not.
    """

    start_s: float | None
    end_s: float | None
    begin: int
    end: int
    samples: tuple[int, int] | None
    reason: Reason

    @property
    def valid(self) -> bool:
        """Whether audio can be inserted."""
        return self.reason == Reason.VALID


def parse_bytes(data: bytes, num_samples: int | None = None) -> list[Citation]:
    """Every `</seg>` of a text, in order; `num_samples` is the length of the recording, None for no bound."""
    recording = MAX_SECONDS * SAMPLE_RATE if num_samples is None else num_samples
    citations = []
    state = whole = units = first = opened = 0
    weight = FIRST_WEIGHT
    for i, byte in enumerate(data):
        state, op = NEXT_LISTS[state][byte], OP_LISTS[state][byte]
        if op == Op.NONE:
            continue
        if op == Op.WHOLE:
            whole = min(whole * 10 + byte - ord("0"), MAX_SECONDS)
        elif op == Op.FRACTION:
            units += (byte - ord("0")) * weight
            weight //= 10
        elif op in (Op.BEGIN, Op.COMMA):
            if op == Op.BEGIN:
                opened = i + 1 - len(OPEN)
            first = to_samples(whole, units)
            whole, units, weight = 0, 0, FIRST_WEIGHT
        else:
            reason = Reason(op - Op.CLOSE)
            begin = i + 1 - len(CLOSE) if reason == Reason.NO_OPEN else opened
            if reason != Reason.VALID:
                citations.append(Citation(None, None, begin, i + 1, None, reason))
                continue
            last = to_samples(whole, units)
            _, clamped, verdict = check_clip(reason, first, last, recording, np)
            citations.append(
                Citation(
                    first / SAMPLE_RATE,
                    last / SAMPLE_RATE,
                    begin,
                    i + 1,
                    (first, int(clamped)),
                    Reason(int(verdict)),
                )
            )
    return citations


def parse(text: str, num_samples: int | None = None) -> list[Citation]:
    """`parse_bytes` of a string, with character spans."""
    data = text.encode("utf-8", errors="replace")

    def chars(offset: int) -> int:  # tags are ASCII, so their edges are edges of characters
        return len(data[:offset].decode("utf-8"))

    return [
        dataclasses.replace(c, begin=chars(c.begin), end=chars(c.end))
        for c in parse_bytes(data, num_samples)
    ]


# Two runs of digits and dots between tags. Possessive, so linear in any text; in bytes \d and \s are ASCII.
_TWO_TIMES = re.compile(rb"<seg>([\d.]++),\s*+([\d.]++)</seg>")
_WHOLE_DIGITS = len(str(MAX_SECONDS))
_FRACTION_DIGITS = len(str(FIRST_WEIGHT))


def written_samples(data: bytes) -> np.ndarray:
    """The times, in samples and as written, of every citation that holds two numbers.

    They are those of `parse_bytes`, in its order, without a step for each byte: what a model wrote may be megabytes
    long.

    Returns:
      i64[N, 2], begin and end, neither ordered nor clamped to a recording.
    """
    pairs = _TWO_TIMES.findall(data)
    known = {number: _samples_of(number) for number in {n for pair in pairs for n in pair}}
    found = [(known[first], known[last]) for first, last in pairs]
    return np.array([pair for pair in found if None not in pair], np.int64).reshape(-1, 2)


def _samples_of(number: bytes) -> int | None:
    """The sample nearest to a time of digits and dots; None where it is no number."""
    whole, _, fraction = number.partition(b".")
    if b"." in fraction or not (whole or fraction):
        return None
    whole = whole.lstrip(b"0")
    saturated = len(whole) > _WHOLE_DIGITS
    seconds = MAX_SECONDS if saturated else min(int(whole or b"0"), MAX_SECONDS)
    units = int(fraction[:_FRACTION_DIGITS].ljust(_FRACTION_DIGITS, b"0"))
    return int(to_samples(seconds, units))
