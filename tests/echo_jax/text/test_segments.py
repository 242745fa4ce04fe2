"""The `<seg>` grammar against a regular expression: on the host, and on device over the real Qwen vocabulary."""

import fractions
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.text import segments
from echo_jax.text.automaton import Automaton, essential_bytes
from echo_jax.text.segments import Reason
from echo_jax.text.tokenizer import Tokenizer

RECORDING = 160_000  # 10 s
CONTENT = re.compile(rb"([\d.]+),\s*([\d.]+)")
NUMBER = re.compile(rb"\d+\.?\d*|\.\d+")


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return Tokenizer.from_qwen_wheel()


@pytest.fixture(scope="module")
def automaton(qwen: Tokenizer) -> Automaton:
    return Automaton.build(qwen.token_bytes)


# --------------------------------------------------------------------------------------------------- oracle


def oracle_samples(number: bytes) -> int:
    whole, _, decimals = number.partition(b".")
    time = min(int(whole or b"0"), 100_000) + fractions.Fraction(
        int(decimals or b"0"), 10 ** len(decimals)
    )
    return int(time * 16_000 + fractions.Fraction(1, 2))


def oracle(data: bytes, num_samples: int) -> list[tuple[int, Reason, int, int]]:
    """(end of the tag, reason, begin and end in samples before clamping) of every `</seg>`."""
    result, done = [], 0
    while (close := data.find(b"</seg>", done)) >= 0:
        opened = data.rfind(b"<seg>", done, close)
        done = close + 6
        begin = end = 0
        if opened < 0:
            reason = Reason.NO_OPEN
        elif not (match := CONTENT.fullmatch(data[opened + 5 : close])):
            reason = Reason.MALFORMED
        elif not all(NUMBER.fullmatch(number) for number in match.groups()):
            reason = Reason.BAD_NUMBER
        else:
            begin, end = map(oracle_samples, match.groups())
            if begin >= end:
                reason = Reason.NOT_INCREASING
            elif begin >= num_samples:
                reason = Reason.OUT_OF_RANGE
            elif min(end, num_samples) - begin < 3_200:
                reason = Reason.TOO_SHORT
            else:
                reason = Reason.VALID
        result.append((done, reason, begin, end))
    return result


# ---------------------------------------------------------------------------------------- random sequences


def random_number(rng: random.Random) -> bytes:
    kind = rng.randrange(12)
    if kind == 0:
        return rng.choice(
            [b"1.2.3", b"1e9", b"-1", b"", b".", b"..", b"5.", b".5", b"+2", b"1 ", b"0x1", b"nan"]
        )
    if kind == 1:
        return b"%d" % rng.randrange(10**59, 10**60)
    if kind == 2:
        return b"%d.%d" % (rng.randrange(12), rng.randrange(10**59, 10**60))
    if kind == 3:  # near the edge between two samples
        return (
            f"{fractions.Fraction(2 * rng.randrange(160_000) + 1, 32_000).__float__():.8f}".encode()
        )
    return f"{rng.uniform(0, 11):.{rng.randrange(4)}f}".encode()


def random_bytes(rng: random.Random) -> bytes:
    data = b""
    for _ in range(rng.randrange(1, 7)):
        kind = rng.randrange(10)
        blanks = rng.choice([b" ", b"", b"  ", b"\n", b"\t \r\n", b"\xc2\xa0"])
        if kind < 4:
            tag = b"<seg>" + random_number(rng) + b"," + blanks + random_number(rng) + b"</seg>"
            if rng.randrange(3) == 0:  # break it
                at = rng.randrange(len(tag))
                tag = (
                    tag[:at]
                    + rng.choice([b"", b"<", b">", b"<seg>", b"</seg>", b",", b"/", b"\xff"])
                    + tag[at + 1 :]
                )
            data += tag
        elif kind < 6:
            data += rng.choice(
                [
                    b"<seg>",
                    b"</seg>",
                    b"<seg",
                    b"</se",
                    b"<",
                    b"</",
                    b">",
                    b"<seg<seg>1, 2",
                    b"1, 2</seg>",
                ]
            )
        elif kind < 8:
            data += bytes(rng.choice(b"<>/seg0123.,  a") for _ in range(rng.randrange(1, 12)))
        elif kind < 9:
            data += bytes(rng.randrange(256) for _ in range(rng.randrange(1, 6)))
        else:
            data += rng.choice(
                [b" and then, ", b"\n</think><answer>", "é音".encode(), b">,", b"eggs</", b"(<"]
            )
    return data


class Splitter:
    """Spells bytes in random tokens of a vocabulary."""

    def __init__(self, token_bytes: list[bytes]):
        self.ids = {piece: i for i, piece in enumerate(token_bytes) if piece and len(piece) <= 8}

    def __call__(self, rng: random.Random, data: bytes) -> list[int]:
        tokens, at = [], 0
        while at < len(data):
            sizes = [
                n for n in range(1, min(8, len(data) - at) + 1) if data[at : at + n] in self.ids
            ]
            size = rng.choice(sizes)
            tokens.append(self.ids[data[at : at + size]])
            at += size
        return tokens


def run_device(automaton: Automaton, tokens: np.ndarray) -> tuple[np.ndarray, ...]:
    """(closed, reason, begin, end) after every token, each [B, L]."""

    @jax.jit
    def run(tokens):
        def step(carry, token):
            carry = automaton.advance(carry, token)
            begin, end, reason = segments.check_clip(
                carry.reason, carry.begin, carry.end, RECORDING
            )
            return carry, (carry.closed, reason, carry.begin, carry.end, begin, end)

        return jax.lax.scan(step, automaton.init(tokens.shape[:1]), tokens.T)[1]

    return tuple(np.asarray(x).T for x in run(tokens))


def check_against_oracle(qwen: Tokenizer, automaton: Automaton, seed: int, count: int) -> None:
    rng = random.Random(seed)
    split = Splitter(qwen.token_bytes)
    ids = sorted(split.ids.values())
    sequences = []
    for _ in range(count):
        if rng.randrange(8):
            sequence = split(rng, random_bytes(rng))
        else:  # any tokens, among pieces of tags
            parts = [
                split(rng, rng.choice([b"<seg>", b"</seg>", b"1, 2", b"</"])) for _ in range(8)
            ]
            sequence = [t for part in parts for t in [*part, *rng.choices(ids, k=rng.randrange(2))]]
        sequences.append(sequence)
    length = -(-max(map(len, sequences)) // 512) * 512
    tokens = np.full(
        (count, length), qwen.audio_id, np.int32
    )  # control tokens have no bytes and do nothing
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    closed, reason, begin, end, clip_begin, clip_end = run_device(automaton, tokens)
    seen = set()
    for row, sequence in enumerate(sequences):
        pieces = [qwen.token_bytes[token] for token in sequence]
        data = b"".join(pieces)
        expected = oracle(data, RECORDING)
        seen |= {why for _, why, _, _ in expected}
        host = segments.parse_bytes(data, RECORDING)
        assert [(c.end, c.reason) for c in host] == [(at, why) for at, why, _, _ in expected], data
        times = [
            (segments.seconds_to_samples(c.start_s), segments.seconds_to_samples(c.end_s))
            if c.start_s is not None and c.end_s is not None
            else (0, 0)
            for c in host
        ]
        assert times == [(a, b) for _, _, a, b in expected], data
        edges = np.cumsum([len(piece) for piece in pieces])
        at_token = [int(np.searchsorted(edges, at)) for at, _, _, _ in expected]
        assert np.flatnonzero(closed[row]).tolist() == at_token, data
        for token, citation, (_, why, a, b) in zip(at_token, host, expected, strict=True):
            assert (reason[row, token], begin[row, token], end[row, token]) == (why, a, b), data
            if citation.samples:
                assert (clip_begin[row, token], clip_end[row, token]) == citation.samples, data
    assert seen == set(Reason) - {Reason.NO_TURNS_LEFT, Reason.NO_ROOM}


def test_device_and_host_equal_the_regular_expression(
    qwen: Tokenizer, automaton: Automaton
) -> None:
    check_against_oracle(qwen, automaton, seed=0, count=5_000)


@pytest.mark.slow
def test_device_and_host_equal_the_regular_expression_100k(
    qwen: Tokenizer, automaton: Automaton
) -> None:
    for seed in range(1, 21):
        check_against_oracle(qwen, automaton, seed=seed, count=5_000)


# ----------------------------------------------------------------------------------------------------- host


def test_written_samples_are_those_of_the_automaton() -> None:
    rng = random.Random(7)
    long = (
        b"0" * 40 + b"1.5",
        b"0" * 9,
        b"000100000.25",
        b"99999.99999999",
        b"0.",
        b"." + b"3" * 30,
    )
    found = 0
    for _ in range(20_000):
        data = random_bytes(rng)
        if rng.randrange(4) == 0:
            data += b"<seg>%b,\t %b</seg>" % (rng.choice(long), rng.choice(long))
        want = [
            [round(c.start_s * 16_000), round(c.end_s * 16_000)]
            for c in segments.parse_bytes(data)
            if c.start_s is not None and c.end_s is not None
        ]
        got = segments.written_samples(data)
        assert got.dtype == np.int64
        assert got.shape == (len(want), 2)
        assert got.tolist() == want, data
        found += len(want)
    assert found > 10_000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<seg>0.4, 2.5</seg>", Reason.VALID),
        ("<seg>.5,\n 2.</seg>", Reason.VALID),
        ("<seg<seg>1, 2</seg>", Reason.VALID),
        ("<seg>1, <seg>1, 2</seg>", Reason.VALID),
        ("<seg>9, " + "9" * 60 + "</seg>", Reason.VALID),
        ("</seg>", Reason.NO_OPEN),
        ("<seg>1.2.3, 4</seg>", Reason.BAD_NUMBER),
        ("<seg>1, .</seg>", Reason.BAD_NUMBER),
        ("<seg>1, 1e9</seg>", Reason.MALFORMED),
        ("<seg>-1, 2</seg>", Reason.MALFORMED),
        ("<seg>, </seg>", Reason.MALFORMED),
        ("<seg></seg>", Reason.MALFORMED),
        ("<seg>1 , 2</seg>", Reason.MALFORMED),
        ("<seg>1, 2 </seg>", Reason.MALFORMED),
        ("<seg>1, 2<</seg>", Reason.MALFORMED),
        ("<seg>١, ٢</seg>", Reason.MALFORMED),  # digits, but not ASCII
        ("<seg>2, 1</seg>", Reason.NOT_INCREASING),
        ("<seg>2, 2.0</seg>", Reason.NOT_INCREASING),
        ("<seg>10, 11</seg>", Reason.OUT_OF_RANGE),
        ("<seg>9.9, 11</seg>", Reason.TOO_SHORT),
        ("<seg>1, 1.1999</seg>", Reason.TOO_SHORT),
        ("<seg>1, 1.2</seg>", Reason.VALID),
    ],
)
def test_reasons(text: str, reason: Reason) -> None:
    (citation,) = segments.parse(text, RECORDING)
    assert citation.reason == reason
    assert citation.valid == (reason == Reason.VALID)


def test_parse_gives_character_spans_and_clips() -> None:
    text = "é音 <seg>0.4, 2.41</seg>, dann <seg>9, 30</seg> </seg> <seg>1"
    first, second, third = segments.parse(text, RECORDING)
    assert text[first.begin : first.end] == "<seg>0.4, 2.41</seg>"
    assert (first.start_s, first.end_s, first.samples) == (0.4, 2.41, (6_400, 38_560))
    assert text[second.begin : second.end] == "<seg>9, 30</seg>"
    assert (second.end_s, second.samples) == (30.0, (144_000, 160_000))
    assert text[third.begin : third.end] == "</seg>"
    assert (third.start_s, third.samples) == (None, None)
    assert segments.parse(text)[1].samples == (144_000, 480_000)


def test_second_close_has_no_open_tag() -> None:
    reasons = [c.reason for c in segments.parse("<seg>1, 2</seg></seg>", RECORDING)]
    assert reasons == [Reason.VALID, Reason.NO_OPEN]


def test_crop_samples_is_the_rule_of_the_tags() -> None:
    rng = random.Random(0)
    for _ in range(2_000):
        start, end = (round(rng.uniform(0, 12), rng.randrange(1, 7)) for _ in range(2))
        (citation,) = segments.parse(f"<seg>{start:f}, {end:f}</seg>", RECORDING)
        assert citation.samples is not None
        begin, finish = segments.crop_samples(float(f"{start:f}"), float(f"{end:f}"), RECORDING)
        assert (min(citation.samples[0], RECORDING), citation.samples[1]) == (begin, finish)
    assert segments.crop_samples(2.3, 2.41, RECORDING) == (36_800, 38_560)
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and not negative"):
            segments.seconds_to_samples(bad)


# --------------------------------------------------------------------------------------------------- tables


def test_stop_tables_of_the_real_vocabulary(qwen: Tokenizer, automaton: Automaton) -> None:
    assert [rest.decode() for rest in segments.RESTS] == ["/seg>", "seg>", "eg>", "g>", ">"]
    assert automaton.stop_mask.sum(1).tolist() == [0, 0, 0, 0, 266]
    assert automaton.canonical.tolist() == [-1, -1, -1, -1, 29]
    assert not any(segments.CLOSE in piece for piece in qwen.token_bytes)
    for ids, mask in zip(automaton.stop_tokens, automaton.stop_mask, strict=True):
        assert ids[ids >= 0].tolist() == np.flatnonzero(mask).tolist()
    assert all(qwen.token_bytes[i].startswith(b">") for i in np.flatnonzero(automaton.stop_mask[4]))
    assert automaton.token_bytes.shape == (
        qwen.vocab_size,
        5,
    )  # what a decode step reads of a token


def test_essential_bytes_act_like_the_whole_token(qwen: Tokenizer) -> None:
    """From every state, for every token of the vocabulary: same end, same operations."""

    def run(pieces: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort([-len(piece) for piece in pieces], kind="stable")
        states = np.repeat(np.arange(len(segments.NEXT))[:, None], len(pieces), 1)
        trace = np.zeros(
            states.shape, np.uint64
        )  # a hash of the operations with the digits they take
        for at in range(max(map(len, pieces))):
            live = np.array([i for i in order if len(pieces[i]) > at])
            byte = np.array([pieces[i][at] for i in live])
            op = segments.OP[states[:, live], byte]
            code = op * 256 + np.where((op == 2) | (op == 3), byte, 0)
            trace[:, live] = np.where(
                op > 0,
                trace[:, live] * np.uint64(1_000_003) + code.astype(np.uint64),
                trace[:, live],
            )
            states[:, live] = segments.NEXT[states[:, live], byte]
            order = live
        return states, trace

    pieces = [piece for piece in qwen.token_bytes if piece]
    rng = random.Random(0)
    pieces += [random_bytes(rng) for _ in range(5_000)]  # with whole tags inside
    essential = essential_bytes(pieces)
    assert sum(map(len, essential[: qwen.vocab_size])) < 1.6 * qwen.vocab_size
    for whole, short in zip(run(pieces), run(essential), strict=True):
        np.testing.assert_array_equal(whole, short)


def test_padding_ids_do_nothing(qwen: Tokenizer) -> None:
    automaton = Automaton.build(qwen.token_bytes, 152_064)
    assert automaton.stop_mask.shape == (5, 152_064)
    carry = automaton.init((1,))
    for token in [*qwen.encode("<seg>1, 2</seg")]:
        carry = automaton.advance(carry, jnp.array([token]))
    for token in (152_000, qwen.audio_id, qwen.im_end_id):
        after = automaton.advance(carry, jnp.array([token]))
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), after, carry))
    with pytest.raises(ValueError, match="num_logits 7 is less"):
        Automaton.build(qwen.token_bytes, 7)


def test_vocabularies_that_cannot_stop_exactly_are_refused() -> None:
    single = [bytes([i]) for i in range(256)]
    with pytest.raises(ValueError, match=r"token 256 \(b'</seg>,'\) goes on behind </seg>"):
        Automaton.build([*single, b"</seg>,"])
    with pytest.raises(ValueError, match=r"token 256 begins with b'g>', which is no token itself"):
        Automaton.build([*single, b"g>."])


def test_tokens_that_hold_whole_tags() -> None:
    pieces = [
        *(bytes([i]) for i in range(256)),
        b"</seg>",
        b" x<seg>1",
        b"23</seg><seg>4,5</seg>",
        b"<seg>",
    ]
    automaton = Automaton.build(pieces)
    carry = automaton.init(())
    for token in (257, ord(","), ord("2"), ord("0"), 256):
        carry = automaton.advance(carry, jnp.int32(token))
    assert (bool(carry.closed), int(carry.begin), int(carry.end)) == (True, 16_000, 320_000)
    carry = automaton.advance(carry, jnp.int32(258))
    assert (int(carry.reason), int(carry.begin), int(carry.end)) == (Reason.VALID, 64_000, 80_000)
    assert not automaton.advance(carry, jnp.int32(65)).closed


# ---------------------------------------------------------------------------------------------- stop events


def test_stop_events(qwen: Tokenizer, automaton: Automaton) -> None:
    carry = automaton.init((3,))
    close = qwen.encode("</seg>")
    assert [qwen.token_bytes[t] for t in close] == [b"</", b"seg", b">"]
    opened = qwen.encode("<seg>1, 2")
    for column in [*opened, close[0], close[1]]:
        rows = jnp.array([column, column, opened[0]])
        carry = automaton.advance(carry, rows)
    rest = automaton.rest_index(carry)
    assert rest.tolist() == [4, 4, 0]  # `>` is wanted twice; the last row has read `<`
    tail = qwen.token_bytes.index(b">,")
    drawn = jnp.array([tail, 0, tail])
    events = automaton.stop_event(rest, drawn)
    assert events.tolist() == [29, 0, tail]
    after = automaton.advance(carry, events)
    assert after.closed.tolist() == [True, False, False]
    assert (int(after.begin[0]), int(after.end[0])) == (16_000, 32_000)


def test_event_probabilities_sum_to_one_and_have_gradients(
    qwen: Tokenizer, automaton: Automaton
) -> None:
    logits = jax.random.normal(jax.random.key(0), (qwen.vocab_size,)) * 3
    log_probs = jax.nn.log_softmax(logits)
    members = np.flatnonzero(automaton.stop_mask[4])
    stop = automaton.event_logit(log_probs, jnp.int32(4), jnp.int32(29))
    np.testing.assert_allclose(
        np.exp(stop), np.exp(np.asarray(log_probs, np.float64)[members]).sum(), rtol=1e-5
    )
    np.testing.assert_allclose(
        np.exp(stop) + np.exp(log_probs[~automaton.stop_mask[4]]).sum(), 1, rtol=1e-5
    )
    for rest, event in [(-1, 29), (4, 0), (1, 26865), (0, 29)]:
        value = automaton.event_logit(log_probs, jnp.int32(rest), jnp.int32(event))
        assert float(value) == float(log_probs[event])

    def loss(logits, rest, events):
        return automaton.event_logit(jax.nn.log_softmax(logits), rest, events).sum()

    batch = jnp.broadcast_to(logits, (3, qwen.vocab_size))
    gradient = jax.grad(loss)(batch, jnp.array([4, 1, -1]), jnp.array([29, 5, 29]))
    assert np.isfinite(gradient).all()
    probabilities = np.exp(log_probs)
    inside = probabilities[members] / probabilities[members].sum()
    np.testing.assert_allclose(gradient[0, members], inside - probabilities[members], atol=1e-6)


def test_advance_under_vmap_and_while_loop(qwen: Tokenizer, automaton: Automaton) -> None:
    text = "a <seg>0.4, 2.5</seg>, b <seg>1.2.3, 4</seg>."
    tokens = jnp.array([qwen.encode(text), qwen.encode(text)[::-1]])

    @jax.jit
    def loop(tokens):
        def body(state):
            i, carry, closed = state
            carry = jax.vmap(automaton.advance)(carry, tokens[:, i])
            return i + 1, carry, closed.at[:, i].set(carry.closed)

        start = (0, automaton.init(tokens.shape[:1]), jnp.zeros(tokens.shape, bool))
        return jax.lax.while_loop(lambda state: state[0] < tokens.shape[1], body, start)

    _, carry, closed = loop(tokens)
    expected = run_device(automaton, np.asarray(tokens))[0]
    np.testing.assert_array_equal(closed, expected)
    assert closed.sum(1).tolist() == [2, 0]
    assert carry.state.shape == (2,)
