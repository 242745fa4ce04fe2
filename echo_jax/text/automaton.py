"""The `<seg>` grammar on the device: what a sampler does with it at each token, over the tokens of a vocabulary.

The grammar itself, its tables and its host parser are in `segments.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from echo_jax.text import segments
from echo_jax.text.segments import CLOSE, NEXT_LISTS, OP_LISTS, OPEN, RESTS, Op, Reason


@flax.struct.dataclass
class Carry:
    """The automaton of each row. All fields have the rows' shape, i32 but for `closed`.

    `closed`, `reason`, `begin` and `end` speak of the last `</seg>` that the newest token completed, if it did.

    Attributes:
      state: index into `NEXT`.
      whole, units, weight: the number being read: seconds, units of 1e-8 s, worth of the next decimal.
      first: samples of the number before the comma.
      closed: bool, whether the newest token completed a `</seg>`.
      reason: the grammar's `Reason`; `segments.check_clip` goes on from here.
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
        return cls(
            segments.NEXT | segments.OP << 8,
            table,
            length,
            segments.REST,
            stop_mask,
            stop_tokens,
            canonical,
        )

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
        """The loop body of `segments.parse_bytes` on rows."""
        packed = jnp.asarray(self.transition)[carry.state, byte]
        state, op = packed & 0xFF, packed >> 8
        digit = byte - ord("0")
        sample = segments.to_samples(carry.whole, carry.units)
        fresh = (op == Op.BEGIN) | (op == Op.COMMA)
        fraction = op == Op.FRACTION
        whole = jnp.where(
            op == Op.WHOLE, jnp.minimum(carry.whole * 10 + digit, segments.MAX_SECONDS), carry.whole
        )
        closes, valid = op >= Op.CLOSE, op == Op.CLOSE + Reason.VALID
        return Carry(
            state=state,
            whole=jnp.where(fresh, 0, whole),
            units=jnp.where(fresh, 0, carry.units + jnp.where(fraction, digit * carry.weight, 0)),
            weight=jnp.where(
                fresh, segments.FIRST_WEIGHT, jnp.where(fraction, carry.weight // 10, carry.weight)
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

    def event_logit(self, logits: jax.Array, rest: jax.Array, events: jax.Array) -> jax.Array:
        """Logit of events of `stop_event`: the log-sum over the tokens of a stop, else the token's own.

        Less the log-sum over the vocabulary, or from normalized logits, it is the log-probability.

        Args:
          logits: f32[..., V] of the distribution the tokens are drawn from.
          rest, events: i32[...] as in `stop_event`.

        Returns:
          f32[...].
        """
        own = jnp.take_along_axis(logits, events[..., None], -1)[..., 0]
        stops = (rest >= 0) & (events == jnp.asarray(self.canonical)[rest])
        ids = jnp.asarray(self.stop_tokens)[rest]
        members = jnp.take_along_axis(logits, jnp.maximum(ids, 0), -1)
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
    everywhere = tuple(range(len(segments.NEXT)))
    memo: dict[tuple[tuple[int, ...], int], tuple[tuple[int, ...], bool]] = {}
    result = []
    for piece in token_bytes:
        states, kept = everywhere, bytearray()
        for i, byte in enumerate(piece):
            if all(state in segments.OUTSIDE for state in states):
                kept += _open_end(piece[i:])
                break
            if (states, byte) not in memo:
                after = tuple(NEXT_LISTS[state][byte] for state in states)
                acts = any(OP_LISTS[state][byte] for state in states)
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
    return tail if segments.is_partial(tail) else b""
