"""The `<seg>start, end</seg>` grammar: one byte automaton for the host parser and for the device.

A citation is `<seg>A, B</seg>`: two times in seconds, each of digits with at most one dot, a comma and any blanks
between (echo.md, section 1: `<seg>([\\d\\.]+,\\s*[\\d\\.]+)</seg>`, ASCII). `_CONTENT` is the only definition of it;
`NEXT` and `OP` are compiled from there, `parse` runs them over a text, `Automaton.advance` over sampled tokens.

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
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from echo_jax.model.frontend import SAMPLE_RATE

OPEN = b"<seg>"
CLOSE = b"</seg>"
MIN_CLIP_SAMPLES = 3_200  # 0.2 s, 5 audio tokens; Algorithm 1 inserts nothing shorter
MAX_SECONDS = 100_000

# A time is whole seconds and units of 1e-8 s; half a sample is a whole number of units, 3,125.
_UNITS_PER_SAMPLE = 10**8 // SAMPLE_RATE
_FIRST_WEIGHT = 10**7


class Reason(enum.IntEnum):
    """What became of a `</seg>`. The grammar knows the first four, the recording the next three."""

    VALID = 0
    NO_OPEN = 1  # no `<seg>` since the last `</seg>`
    MALFORMED = 2  # not two numbers with a comma: empty, negative, `1e9`, words
    BAD_NUMBER = 3  # digits and dots that are no number: `1.2.3`, `.`
    NOT_INCREASING = 4  # start >= end, in samples
    OUT_OF_RANGE = 5  # starts at or behind the end of the recording
    TOO_SHORT = 6  # less than 0.2 s of the recording
    NO_TURNS_LEFT = 7  # the turn limit is reached; only a sampler can say so


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


def _is_partial(read: bytes) -> bool:
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
    if not _is_partial(read):
        read = read[-1:] if _is_partial(read[-1:]) else b""
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
RESTS = tuple(CLOSE[k:] for k in range(1, len(CLOSE)))
_TEXT, _MALFORMED = 0, 1


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
    weight = _FIRST_WEIGHT
    for i, byte in enumerate(data):
        state, op = _NEXT_LISTS[state][byte], _OP_LISTS[state][byte]
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
            whole, units, weight = 0, 0, _FIRST_WEIGHT
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


_NEXT_LISTS: list[list[int]] = NEXT.tolist()  # a Python loop reads lists faster than arrays
_OP_LISTS: list[list[int]] = OP.tolist()


@flax.struct.dataclass
class Carry:
    """The automaton of each row. All fields have the rows' shape, i32 but for `closed`.

    `closed`, `reason`, `begin` and `end` speak of the last `</seg>` that the newest token completed, if it did.

    Attributes:
      state: index into `NEXT`.
      whole, units, weight: the number being read: seconds, units of 1e-8 s, worth of the next decimal.
      first: samples of the number before the comma.
      closed: bool, whether the newest token completed a `</seg>`.
      reason: the grammar's `Reason`; `check_clip` goes on from here.
      begin, end: samples as written, 0 where `reason` is not VALID.
    """

    state: jax.Array
    whole: jax.Array
    units: jax.Array
    weight: jax.Array
    first: jax.Array
    closed: jax.Array
    reason: jax.Array
    begin: jax.Array
    end: jax.Array


@flax.struct.dataclass
class Automaton:
    """The grammar over a vocabulary: a pytree of tables, and what a sampler does with them at each token.

    Attributes:
      transition: i32[num_states, 256], `NEXT` with `OP` above its low 8 bits, so that a byte is one look-up.
      token_bytes: u8[V, n], the bytes of each token that can matter, see `essential_bytes`; zeros behind them.
      token_length: i32[V].
      rest: i32[num_states], `REST`.
      stop_mask: bool[len(RESTS), V], tokens whose bytes begin with that rest of `</seg>`: one event, a stop.
      stop_tokens: i32[len(RESTS), n], the same as lists of ids, -1 behind their end.
      canonical: i32[len(RESTS)], the token that is exactly the rest, -1 if none (then no token begins with it).
    """

    transition: Any
    token_bytes: Any
    token_length: Any
    rest: Any
    stop_mask: Any
    stop_tokens: Any
    canonical: Any

    @classmethod
    def build(cls, token_bytes: Sequence[bytes], num_logits: int | None = None) -> Automaton:
        """Tables of a vocabulary, as numpy arrays.

        In the real Qwen vocabulary no token holds more of `</seg>` than `</` or `seg`, digits stand alone, and 266
        tokens begin with `>`: it is the only rest with tokens, and `essential_bytes` needs 5 bytes at most.

        Args:
          token_bytes: bytes of each id, empty for control tokens (`Tokenizer.token_bytes`).
          num_logits: size V of the model's vocabulary where it is larger; the ids beyond do nothing.

        Raises:
          ValueError: `num_logits` is too small, or the vocabulary cannot stop exactly at `</seg>`: a token goes on
            behind it, or begins with a rest for which there is no token of its own.
        """
        size = len(token_bytes) if num_logits is None else num_logits
        if size < len(token_bytes):
            raise ValueError(f"num_logits {size} is less than the vocabulary of {len(token_bytes)}")
        for index, piece in enumerate(token_bytes):
            if CLOSE in piece and not piece.endswith(CLOSE):
                raise ValueError(
                    f"token {index} ({piece!r}) goes on behind {CLOSE.decode()}; take another vocabulary"
                )
        stop_mask = np.zeros((len(RESTS), size), bool)
        canonical = np.full(len(RESTS), -1, np.int32)
        for row, rest in enumerate(RESTS):
            begins = [index for index, piece in enumerate(token_bytes) if piece.startswith(rest)]
            exact = [index for index in begins if token_bytes[index] == rest]
            if begins and not exact:
                raise ValueError(
                    f"token {begins[0]} begins with {rest!r}, which is no token itself; take another vocabulary"
                )
            stop_mask[row, begins] = True
            canonical[row] = exact[0] if exact else -1
        stop_tokens = np.full((len(RESTS), max(1, stop_mask.sum(1).max())), -1, np.int32)
        for row, mask in enumerate(stop_mask):
            stop_tokens[row, : mask.sum()] = np.flatnonzero(mask)
        pieces = essential_bytes(token_bytes)
        length = np.zeros(size, np.int32)
        length[: len(pieces)] = [len(piece) for piece in pieces]
        table = np.zeros((size, max(1, length.max())), np.uint8)
        for index, piece in enumerate(pieces):
            table[index, : len(piece)] = list(piece)
        return cls(NEXT | OP << 8, table, length, REST, stop_mask, stop_tokens, canonical)

    def init(self, shape: tuple[int, ...]) -> Carry:
        """Rows at the beginning of an answer."""
        zero = jnp.zeros(shape, jnp.int32)
        return Carry(
            state=zero,
            whole=zero,
            units=zero,
            weight=zero,
            first=zero,
            closed=jnp.zeros(shape, bool),
            reason=zero,
            begin=zero,
            end=zero,
        )

    def advance(self, carry: Carry, tokens: jax.Array) -> Carry:
        """Reads one token a row: i32, the rows' shape. Jittable; rows are independent, so it vmaps too.

        Unrolled over the few bytes of `token_bytes`. A row that must stand still keeps its old carry (`jnp.where`).
        """
        table = jnp.asarray(self.token_bytes)[tokens].astype(jnp.int32)
        length = jnp.asarray(self.token_length)[tokens]
        carry = dataclasses.replace(carry, closed=jnp.zeros_like(carry.closed))
        for i in range(table.shape[-1]):
            after = self._advance_byte(carry, table[..., i])
            carry = jax.tree.map(
                lambda new, old, i=i: jnp.where(i < length, new, old), after, carry
            )
        return carry

    def _advance_byte(self, carry: Carry, byte: jax.Array) -> Carry:
        """`parse_bytes`'s loop body on rows."""
        packed = jnp.asarray(self.transition)[carry.state, byte]
        state, op = packed & 0xFF, packed >> 8
        digit = byte - ord("0")
        sample = to_samples(carry.whole, carry.units)
        fresh = (op == Op.BEGIN) | (op == Op.COMMA)
        fraction = op == Op.FRACTION
        whole = jnp.where(
            op == Op.WHOLE, jnp.minimum(carry.whole * 10 + digit, MAX_SECONDS), carry.whole
        )
        closes, valid = op >= Op.CLOSE, op == Op.CLOSE + Reason.VALID
        return Carry(
            state=state,
            whole=jnp.where(fresh, 0, whole),
            units=jnp.where(fresh, 0, carry.units + jnp.where(fraction, digit * carry.weight, 0)),
            weight=jnp.where(
                fresh, _FIRST_WEIGHT, jnp.where(fraction, carry.weight // 10, carry.weight)
            ),
            first=jnp.where(fresh, sample, carry.first),
            closed=carry.closed | closes,
            reason=jnp.where(closes, op - Op.CLOSE, carry.reason),
            begin=jnp.where(closes, jnp.where(valid, carry.first, 0), carry.begin),
            end=jnp.where(closes, jnp.where(valid, sample, 0), carry.end),
        )

    def rest_index(self, carry: Carry) -> jax.Array:
        """i32 of the rows' shape: the row of `stop_mask` that would complete `</seg>` now, -1 if none."""
        return jnp.asarray(self.rest)[carry.state]

    def stop_event(self, rest: jax.Array, tokens: jax.Array) -> jax.Array:
        """The event that drawn tokens stand for: the canonical token where they complete `</seg>`, else themselves.

        Algorithm 1 stops at the *string* `</seg>`, so what a token such as `>,` holds behind it is never read.

        Args:
          rest: i32[...] `rest_index` before the token.
          tokens: i32[...].
        """
        stops = (rest >= 0) & jnp.asarray(self.stop_mask)[rest, tokens]
        return jnp.where(stops, jnp.asarray(self.canonical)[rest], tokens)

    def event_log_prob(self, log_probs: jax.Array, rest: jax.Array, events: jax.Array) -> jax.Array:
        """Log-probability of events of `stop_event`: the log-sum over the tokens of a stop, else the token's own.

        Args:
          log_probs: f32[..., V] of the distribution the tokens are drawn from.
          rest, events: i32[...] as in `stop_event`.

        Returns:
          f32[...].
        """
        own = jnp.take_along_axis(log_probs, events[..., None], -1)[..., 0]
        stops = (rest >= 0) & (events == jnp.asarray(self.canonical)[rest])
        ids = jnp.asarray(self.stop_tokens)[rest]
        members = jnp.take_along_axis(log_probs, jnp.maximum(ids, 0), -1)
        members = jnp.where(ids >= 0, members, -jnp.inf)
        # Where nothing stops, zeros keep the gradient of the unused branch finite.
        total = jax.nn.logsumexp(jnp.where(stops[..., None], members, 0.0), -1)
        return jnp.where(stops, total, own)


def essential_bytes(token_bytes: Sequence[bytes]) -> list[bytes]:
    """Each token cut to the bytes that can matter, at most a handful, so that the device reads few.

    The automaton is run from all states at once. A byte is left out where it changes no state and does nothing. As
    soon as only plain text and malformed content are left, only a tag begun at the end of the token matters (or
    all that follows, if it holds a whole tag). Digits always stay.
    """
    everywhere = tuple(range(len(NEXT)))
    memo: dict[tuple[tuple[int, ...], int], tuple[tuple[int, ...], bool]] = {}
    result = []
    for piece in token_bytes:
        states, kept = everywhere, bytearray()
        for i, byte in enumerate(piece):
            if all(state in (_TEXT, _MALFORMED) for state in states):
                kept += _open_end(piece[i:])
                break
            if (states, byte) not in memo:
                after = tuple(_NEXT_LISTS[state][byte] for state in states)
                acts = any(_OP_LISTS[state][byte] for state in states)
                memo[states, byte] = after, acts or after != states
            states, matters = memo[states, byte]
            if matters:
                kept.append(byte)
        result.append(bytes(kept))
    return result


def _open_end(text: bytes) -> bytes:
    """What of a text, read outside of tags, leaves a trace: a partial tag at its end; all, if it holds a whole tag."""
    if OPEN in text or CLOSE in text:
        return text
    tail = text[max(text.rfind(b"<"), 0) :]
    return tail if _is_partial(tail) else b""
