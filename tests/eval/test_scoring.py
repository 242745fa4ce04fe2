import math
import random

import pytest

from eval import scoring

ANIMALS = ["a dog", "a cat", "two dogs", "a cow"]


@pytest.mark.parametrize(
    ("prediction", "answer", "choices", "right"),
    [
        ("Woman", "Man", ["Man", "Woman"], False),
        ("Male", "Female", ["Male", "Female"], False),
        ("Not clear", "Clear", ["Clear", "Not clear"], False),
        ("Clear", "Not clear", ["Clear", "Not clear"], False),
        ("Subtonic", "Tonic", ["Tonic", "Subtonic"], False),
        ("20", "2", ["2", "20"], False),
        ("It is a man, surely", "Man", ["Man", "Woman"], True),
        ("man woman", "Man", ["Man", "Woman"], False),
        ("", "Man", ["Man", "Woman"], False),
        ("...", "Man", ["Man", "Woman"], False),
        (" MAN. ", "Man ", ["Man", "Woman"], True),
        # A repeated choice of the answer's tokens takes nothing away.
        ("man", "Man", ["Man", "man", "Woman"], True),
        # The same words in another order are the same set: the official scripts accept them.
        ("b then a", "a then b", ["a then b", "b then a"], True),
    ],
)
def test_official_match(prediction, answer, choices, right):
    assert scoring.official_match(prediction, answer, choices) is right


@pytest.mark.parametrize(
    ("text", "choices", "choice", "how"),
    [
        ("a dog", ANIMALS, "a dog", "exact"),
        (" a dog\n", ANIMALS, "a dog", "exact"),
        ("A  Dog.", ANIMALS, "a dog", "normalized"),
        ("“two dogs”", ANIMALS, "two dogs", "normalized"),
        ("B", ANIMALS, "a cat", "letter"),
        ("(c)", ANIMALS, "two dogs", "letter"),
        ("D.", ANIMALS, "a cow", "letter"),
        ("B. a cat", ANIMALS, "a cat", "letter"),
        ("(b) A cat!", ANIMALS, "a cat", "letter"),
        ("B. a dog", ANIMALS, None, "ambiguous"),
        ("B. a horse", ANIMALS, None, "none"),
        ("E", ANIMALS, None, "none"),
        ("It must be a cow", ANIMALS, "a cow", "tokens"),
        ("the dog", ANIMALS, None, "none"),
        ("a dog or a cat", ANIMALS, None, "none"),
        ("", ANIMALS, None, "none"),
        ("...", ANIMALS, None, "none"),
        ("not clear", ["Clear", "Not clear"], "Not clear", "normalized"),
        ("it is not clear to me", ["Clear", "Not clear"], "Not clear", "tokens"),
        ("Female", ["Male", "Female"], "Female", "exact"),
        # A choice that is a letter goes before the place that the letter has.
        ("C", ["A", "C", "B"], "C", "exact"),
        ("b", ["C", "B", "A"], "B", "normalized"),
        # Repeated choices are one choice.
        ("yes", ["Yes", "Yes", "No"], "Yes", "normalized"),
        ("yes ", ["yes", "yes ", "no"], "yes", "exact"),
        ("yes", ["YES", "Yes", "No"], None, "ambiguous"),
        ("it was c", ["C", "C#", "D"], None, "ambiguous"),
        ("-3", ["3", "-3"], "-3", "exact"),
    ],
)
def test_map_to_choice(text, choices, choice, how):
    match = scoring.map_to_choice(text, choices)
    assert (match.choice, match.how) == (choice, how)
    assert match.parsed is (choice is not None)
    assert match.index == (None if choice is None else choices.index(choice))


@pytest.mark.parametrize(
    ("response", "text", "how", "right"),
    [
        ("<think>x</think><answer>a dog</answer>", "a dog", "exact", True),
        ("<answer>\na dog\n</answer> a cat", "a dog", "exact", True),
        ("<answer>a dog</answer><answer> a dog </answer>", "a dog", "exact", True),
        ("<answer>a cat</answer>", "a cat", "exact", False),
        ("a dog", None, "no_answer", False),
        ("<answer>a dog", None, "no_answer", False),
        ("<answer>a cat</answer><answer>a dog</answer>", None, "several_answers", False),
        ("<answer></answer>", "", "none", False),
        ("<answer>a cat <answer>a dog</answer>", "a dog", "exact", True),
    ],
)
def test_score(response, text, how, right):
    result = scoring.score(response, "a dog", ANIMALS)
    assert (result.answer_text, result.match.how, result.correct) == (text, how, right)
    assert result.strict is right
    assert scoring.explain(result, "a dog").endswith("right." if right else "wrong.")


def test_score_refuses_an_answer_that_is_no_choice():
    with pytest.raises(ValueError, match=r"'a horse' is not among the choices"):
        scoring.score("<answer>a dog</answer>", "a horse", ANIMALS)


def test_strict_is_stricter_than_the_official_matcher():
    result = scoring.score("<answer>b then a</answer>", "a then b", ["a then b", "b then a"])
    assert result.correct
    assert not result.strict


def test_nothing_that_a_model_writes_raises():
    rng = random.Random(0)
    pieces = ["<answer>", "</answer>", "a", " dog", "(", "B.", "\x00", "É", "<", "😀", "\n", "12"]
    for _ in range(2_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        result = scoring.score(text, "a dog", ANIMALS)
        assert result.correct <= result.match.parsed


def test_wilson_interval_against_published_values():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for correct, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert scoring.wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
    assert scoring.wilson_interval(0, 0) == (0.0, 1.0)
    assert scoring.wilson_interval(7, 7)[1] == 1.0
    with pytest.raises(ValueError, match="4 of 3"):
        scoring.wilson_interval(4, 3)


def test_mcnemar():
    first = [True] * 8 + [False] * 2 + [True] * 5
    second = [False] * 8 + [True] * 2 + [True] * 5
    test = scoring.mcnemar(first, second)
    assert (test.only_first, test.only_second) == (8, 2)
    assert test.p_value == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert scoring.mcnemar([True], [True]).p_value == 1.0
    # More discordant pairs than a float can count in powers of two.
    many = scoring.mcnemar([True] * 3_000 + [False] * 10, [False] * 3_000 + [True] * 10)
    assert math.isfinite(many.p_value)
    assert many.p_value < 1e-100
    with pytest.raises(ValueError, match="3 and 2"):
        scoring.mcnemar([True] * 3, [True] * 2)
