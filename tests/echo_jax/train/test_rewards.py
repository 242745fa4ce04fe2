import dataclasses
import math
import random
import re
import time

import pytest

from echo_jax.train import rewards
from echo_jax.train.rewards import Response, RewardOptions

TEN_SECONDS = 160_000
DEFAULT = RewardOptions()
RELEASED = RewardOptions(pay_uninsertable=True, ordered_tags=False)


def text(*citations: str, answer: str = "a bell", follower: str = " which") -> str:
    cited = "".join(f"I hear <seg>{c}</seg>{follower} rings. " for c in citations)
    return f"<think>{cited}</think><answer>{answer}</answer>"


def response(answer_text: str, probability: float | None = 0.7, inserted: int | None = None):
    return Response(answer_text, "a bell", TEN_SECONDS, probability, inserted)


def total(name: str, answer_text: str, probability: float = 0.7, options=DEFAULT):
    return rewards.get_reward(name)(response(answer_text, probability), options)["total"]


RIGHT = text("1.0, 2.0", "2.0, 4.0")
WRONG = text("1.0, 2.0", "2.0, 4.0", answer="a buzz")
# c = 0.7: right 0.5 (1 - 0.3^2) = 0.455, wrong -0.5 x 0.49 = -0.245; disjoint citations: spread 0.5.
BY_HAND = {
    "base": (1.0, 0.5),
    "1": (1.0, 0.5),
    "2": (1.5, 0.5),
    "3": (1.5, 0.5),
    "paper": (1.5, 0.5),
    "6": (0.5 + 0.455 * 2, 0.5 - 0.245),
    "10": (0.5 + 0.35, 0.5 - 0.35),
    "11": (0.5 + 0.455 * 2 + 0.5, 0.5 - 0.245 + 0.5),
    "12": (0.5 + 0.455 * (1 + 2 / 3) + 0.5, 0.5 - 0.245 + 0.5),
}


def test_every_id_is_here():
    assert set(rewards.REWARDS) == set(BY_HAND)


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_by_hand(name):
    assert total(name, RIGHT) == pytest.approx(BY_HAND[name][0])
    assert total(name, WRONG) == pytest.approx(BY_HAND[name][1])


def released_score(name: str, solution: str, truth: str, c: float) -> float:
    """The released formulas, with the text rules as regular expressions."""
    spans = re.findall(r"<seg>([\d\.]+,\s*[\d\.]+)</seg>", solution)
    times = sorted(tuple(map(float, pair.split(","))) for pair in spans)
    # Released, a reversed span counts less than nothing; here it lasts 0 s.
    times = [(start, max(start, end)) for start, end in times]
    followers = re.findall(r"</seg>(?=(.))", solution, re.DOTALL)
    inconsistent = sum(follower.isupper() or follower == "<" for follower in followers)
    summed = sum(e - s for s, e in times)
    union, reached = 0.0, -math.inf
    for s, e in times:
        union += max(0.0, e - max(s, reached))
        reached = max(reached, e)
    thinks = re.findall(r"<think>(.*?)</think>", solution, re.DOTALL)
    answers = re.findall(r"<answer>(.*?)</answer>", solution, re.DOTALL)
    form = accuracy = 0.0
    if len(thinks) == 1 and len(answers) == 1:
        form, right = 0.5, answers[0].strip() == truth
        if name in ("6", "11", "12"):
            accuracy = 0.5 * (1 - (c - 1) ** 2) if right else -0.5 * c**2
        elif name == "10":
            accuracy = 0.5 * c if right else -0.5 * c
        else:
            accuracy = 0.5 if right else 0.0
    segment = 0.0
    if accuracy > 0:
        full = {"11": 2, "12": 3}.get(name, 1)
        segment = accuracy * min(len(spans), full) / full
    consistency = -min(inconsistent, 5) / 10
    spread = 0.5 * union / summed if summed > 0 else 0.0
    return {
        "base": form + accuracy,
        "1": form + accuracy + consistency,
        "2": form + accuracy + segment,
        "3": form + accuracy + segment + consistency,
        "6": form + accuracy + segment + consistency,
        "10": form + accuracy,
        "11": form + accuracy + segment + consistency + spread,
        "12": form + accuracy + segment + consistency + spread,
    }[name]


TEXTS = [
    RIGHT,
    WRONG,
    text(),
    text("1.0, 3.0", "2.0, 5.0", "2.5, 2.9"),
    text("0.4, 2.5", follower=" The"),
    text("0.4, 2.5", "3, 4", follower="A"),
    text(*["1, 2"] * 8, follower="<b"),
    RIGHT + "<answer>a bell</answer>",
    "<think>no answer 1.0, 2.0</think>",
    "<answer>a bell</answer>",
    "",
    "<think>\nmany\nlines <seg>1.0,2.5</seg>,\n</think>\n<answer>\n a bell \n</answer>\n",
]


RELEASED_NAMES = sorted(set(BY_HAND) - {"paper"})


@pytest.mark.parametrize("name", RELEASED_NAMES)
@pytest.mark.parametrize("index", range(len(TEXTS)))
def test_released_options_equal_released_formulas(name, index):
    got = total(name, TEXTS[index], 0.3, RELEASED)
    assert got == pytest.approx(released_score(name, TEXTS[index], "a bell", 0.3))


def random_text(rng: random.Random) -> str:
    pieces = []
    for _ in range(rng.randrange(6)):
        start, end = (rng.randrange(120) / 10 for _ in range(2))
        pieces += [
            rng.choice(["First", "then", "", "\n"]),
            f"<seg>{start}, {end}</seg>",
            rng.choice([" a bell", "A bell", "<seg>", "</seg>", "\n", "Ä", ", and"]),
        ]
    answer = rng.choice(["a bell", " a bell\n", "a buzz", "A bell", ""])
    tags = [
        rng.choice(["<think>"] * 6 + ["", "<think><think>"]),
        *pieces,
        rng.choice(["</think>"] * 6 + ["", "</think><think>x</think>"]),
        rng.choice(["<answer>"] * 6 + ["", "<think>"]),
        answer,
        rng.choice(["</answer>"] * 6 + ["", "</answer><answer>a bell</answer>"]),
    ]
    return "".join(tags)


@pytest.mark.parametrize("name", RELEASED_NAMES)
def test_released_formulas_on_random_texts(name):
    rng = random.Random(sum(map(ord, name)))
    totals = set()
    for _ in range(3000):
        solution, c = random_text(rng), rng.random()
        want = released_score(name, solution, "a bell", c)
        assert total(name, solution, c, RELEASED) == pytest.approx(want, abs=1e-9), solution
        # What is stricter never pays more; the spread is of other spans.
        if name not in ("11", "12"):
            assert total(name, solution, c) <= want + 1e-9, solution
        totals.add(round(want, 6))
    assert len(totals) > 2


def test_parts_add_up_and_statistics_are_there():
    scored = rewards.get_reward("paper")(
        response(text("1.0, 3.0", "2.0, 4.0", follower="The")), RewardOptions()
    )
    assert scored["total"] == pytest.approx(sum(scored[part] for part in rewards.PARTS))
    assert scored["consistency"] == pytest.approx(-0.2)
    assert (scored["segments"], scored["total_s"], scored["mean_s"], scored["union_s"]) == (
        2,
        4.0,
        2.0,
        3.0,
    )
    assert scored["overlap"] == pytest.approx(0.25)
    assert scored["correct"] == 1.0


def test_range_of_the_paper_reward():
    worst = text(*["1.0, 2.0"] * 9, follower="A").replace("</answer>", "")
    assert total("paper", worst) == pytest.approx(-0.5)
    assert total("paper", RIGHT) == pytest.approx(1.5)


@pytest.mark.parametrize(
    "citation",
    [
        "4.0, 2.0",
        "1.2.3, 4.0",
        "2.0, 2.0",
        "3.0, 3.1",
        "11.0, 12.0",
        "., .",
        "..., 9",
        "1, 2, 3",
        "-1, 2",
    ],
)
def test_what_cannot_be_inserted_is_not_paid(citation):
    assert total("paper", text(citation)) == pytest.approx(1.0)
    assert rewards.get_reward("12")(response(text(citation)), DEFAULT)["spread"] == 0.0


def test_released_option_pays_reversed_times_but_not_the_default():
    assert total("paper", text("4.0, 2.0"), options=RELEASED) == pytest.approx(1.5)


def test_repeated_spans_are_paid_once_and_ends_are_clamped():
    scored = rewards.get_reward("12")(response(text("8.0, 99.0", "8.0, 99.0")), DEFAULT)
    assert scored["segment"] == pytest.approx(scored["accuracy"] / 3)
    # Both were heard: 4 s in all, of which 2 s are different, so half is overlap and spread pays half.
    assert (scored["segments"], scored["total_s"], scored["union_s"]) == (2, 4.0, 2.0)
    assert scored["overlap"] == 0.5
    assert scored["spread"] == 0.25


def test_only_inserted_spans_count_where_the_rollout_says_how_many():
    got = rewards.get_reward("paper")(response(RIGHT, inserted=0), DEFAULT)
    assert got["segment"] == 0.0
    assert rewards.get_reward("paper")(response(RIGHT, inserted=1), DEFAULT)["segments"] == 1


@pytest.mark.parametrize(
    "hostile",
    [
        "<think><think>x</think></think><answer>a bell</answer>",
        "<think>x</think><answer><answer>a bell</answer></answer>",
        "<answer>a bell</answer><think>x</think>",
        "<think><answer>a bell</answer></think>",
        "</think><think></answer><answer>a bell",
        "<think>x</think><answer>a bell",
        "<think>\x00\ud800</think><answer>a bell\ud800</answer>",
        "<think>١.٢, ٣.٤ <seg>١.٢, ٣.٤</seg></think><answer>a bel</answer>",
    ],
)
@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_hostile_strings_do_not_pay(name, hostile):
    assert total(name, hostile) <= 0.5
    rewards.get_reward(name)(response(hostile), RELEASED)


HUGE = 10_000_000
# CPU seconds for 10 MB, some times what they take: what is quadratic takes hours.
MOST_SECONDS = 3.0


def cpu_seconds(name: str, huge: str, options: RewardOptions) -> float:
    started = time.process_time()  # not the clock: others may need the machine too
    assert rewards.get_reward(name)(response(huge), options)["total"] <= 0.5
    return time.process_time() - started


@pytest.mark.parametrize("options", [DEFAULT, RELEASED], ids=["default", "released"])
@pytest.mark.parametrize(
    "piece",
    [
        "<think>",
        "<answer>",
        "<answer></answer>",
        "<seg>",
        "</seg>",
        "</seg>A",
        "<seg>1.2.3, ",
        "<seg>1, 2</seg>",
        "<seg>3, 2</seg>",
        "1",
        "é",
        "<",
        "\x00",
    ],
)
def test_megabytes_take_linear_time(piece, options):
    assert cpu_seconds("12", piece * (HUGE // len(piece)), options) < MOST_SECONDS


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_megabytes_in_every_reward(name):
    huge = "<think>" * 2 + "<seg>1.2.3, 4</seg>A" * (HUGE // 20) + "</think><answer>a bell</answer>"
    assert cpu_seconds(name, huge, DEFAULT) < MOST_SECONDS


@pytest.mark.parametrize("inside", ["0", "9", ".", "1.", ", ", "1 "])
def test_megabytes_inside_of_one_tag(inside):
    huge = f"<seg>{inside * (HUGE // len(inside))}, 2</seg>"
    for options in (DEFAULT, RELEASED):
        assert cpu_seconds("12", huge, options) < MOST_SECONDS


def test_overlong_numbers_do_not_crash():
    digits = "9" * 5000
    for citation in (f"0, {digits}", f"{digits}, {digits}9", f"0.{digits}, 1.{digits}"):
        for options in (DEFAULT, RELEASED):
            assert math.isfinite(total("12", text(citation), options=options))


def test_overlong_answers_pay_linearly():
    options = RewardOptions(overlong_buffer=40, overlong_penalty=0.5, max_response_tokens=100)
    # 60 tokens are free; then 1 / 80 each, up to 0.5 at 100.
    for num_tokens, penalty in ((0, 0.0), (60, 0.0), (61, -0.0125), (80, -0.25), (100, -0.5)):
        answer = dataclasses.replace(response(RIGHT), num_tokens=num_tokens)
        scored = rewards.get_reward("paper")(answer, options)
        assert scored["overlong"] == pytest.approx(penalty)
        assert scored["total"] == pytest.approx(1.5 + penalty)
        assert rewards.get_reward("paper")(answer, DEFAULT)["total"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"overlong_buffer": 101},
            "config.reward.overlong_buffer=101 must be a whole number in [0, 100]",
        ),
        ({"overlong_buffer": -1}, "config.reward.overlong_buffer=-1 must be a whole number"),
        ({"overlong_penalty": -1.0}, "config.reward.overlong_penalty=-1.0 must be a finite number"),
    ],
)
def test_options_that_mean_nothing_are_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardOptions(max_response_tokens=100, **change)


def test_missing_probability_is_an_error_of_the_caller():
    with pytest.raises(ValueError, match="answer_probability"):
        rewards.get_reward("6")(response(RIGHT, None), DEFAULT)
    assert rewards.get_reward("6")(response("no format", None), DEFAULT)["total"] == 0.0
    assert rewards.needs_probability("6")
    assert not rewards.needs_probability("paper")


def test_unknown_reward_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown reward '4'; known rewards: 1, 10, 11"):
        rewards.get_reward("4")


VOCABULARY = [
    b"<think>",
    b"x",
    b"</think>",
    b"<an",
    b"swer",
    b">",
    b">a",
    b" bell",
    b" buzz",
    b"a",
    b"</",
    b"answer>",
    b"s",
    b"",
]


def probability_of(pieces: list[bytes], truth: str) -> float:
    tokens = [VOCABULARY.index(p) for p in pieces]
    logprobs = [math.log((i + 1) / 100) for i in range(len(tokens))]
    return rewards.answer_probability(tokens, logprobs, VOCABULARY, truth)


def test_answer_probability_finds_the_deciding_token():
    start = [b"<think>", b"x", b"</think>", b"<an", b"swer"]
    end = [b"</", b"answer>"]
    # Right: the first token after the tag, also where that token closes the tag.
    assert probability_of([*start, b">", b"a", b" bell", *end], "a bell") == pytest.approx(0.07)
    assert probability_of([*start, b">a", b" bell", *end], "a bell") == pytest.approx(0.06)
    # Wrong: where the bytes part: inside " buzz" (" b" is shared), after a prefix, or at once.
    assert probability_of([*start, b">a", b" buzz", *end], "a bell") == pytest.approx(0.07)
    assert probability_of([*start, b">a", b" bell", b"s", *end], "a bell") == pytest.approx(0.08)
    assert probability_of([*start, b">a", *end], "a bell") == pytest.approx(0.07)
    assert probability_of([*start, b">", b"x", *end], "a bell") == pytest.approx(0.07)


def test_answer_probability_of_answers_that_are_not_there():
    assert probability_of([b"x"], "a") == 0.0
    assert probability_of([b"<an", b"swer", b">"], "a") == 0.0
    assert probability_of([], "a") == 0.0
    # An empty control token passes; an unfinished answer counts by what is there.
    assert probability_of([b"<an", b"", b"swer", b">", b"x"], "a") == pytest.approx(0.05)


def test_summary_is_the_mean():
    assert rewards.summarize([{"total": 1.0}, {"total": 0.5}]) == {"total": 0.75}
    with pytest.raises(ValueError, match="at least one"):
        rewards.summarize([])
