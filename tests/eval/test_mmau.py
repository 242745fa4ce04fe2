"""The matcher on the public MMAU test-mini question file; the expected figures were counted once on that file."""

import hashlib
import json
import os
import random
from pathlib import Path

import pytest

from eval import scoring

PATH = Path(
    os.environ.get(
        "ECHO_JAX_MMAU_MINI",
        Path(__file__).parents[3] / "shared" / "benchmarks" / "mmau-test-mini.json",
    )
)
SHA256 = "9f18fda99f8dbc2bc5ecd6323fb5063309f54969810b5c6f1caeb3b8d904cf1c"


@pytest.fixture(scope="module")
def rows():
    if not PATH.is_file():
        pytest.skip("needs MMAU's mmau-test-mini.json: name it in ECHO_JAX_MMAU_MINI")
    content = PATH.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        pytest.skip("the figures were counted on another revision of mmau-test-mini.json")
    return json.loads(content)


def official(rows, predict):
    return sum(scoring.official_match(predict(row), row["answer"], row["choices"]) for row in rows)


def ours(rows, predict):
    return [
        scoring.score(f"<answer>{predict(row)}</answer>", row["answer"], row["choices"])
        for row in rows
    ]


def test_official_figures(rows):
    assert len(rows) == 1_000
    assert official(rows, lambda row: row["answer"]) == 1_000
    # 395 by text; in 3 more the first choice holds the answer's words in another order.
    assert official(rows, lambda row: row["choices"][0]) == 398
    assert sum(row["choices"][0].strip() == row["answer"].strip() for row in rows) == 395
    assert official(rows, lambda row: max(row["choices"], key=len)) == 396
    assert official(rows, lambda row: f"The answer is {row['answer']}.") == 1_000 - 93
    # One row lists the same words in four orders: the official matcher takes any order for right.
    assert official(rows, lambda row: " ".join(row["choices"])) == 1
    assert official(rows, lambda row: "") == 0


def test_our_score_of_choices_equals_the_official_one(rows):
    rng = random.Random(0)
    for predict in (
        lambda row: row["answer"],
        lambda row: row["choices"][0],
        lambda row: max(row["choices"], key=len),
        lambda row: rng.choice(row["choices"]),
    ):
        predictions = {row["id"]: predict(row) for row in rows}
        scores = ours(rows, lambda row: predictions[row["id"]])  # noqa: B023
        for row, score in zip(rows, scores, strict=True):
            expected = scoring.official_match(predictions[row["id"]], row["answer"], row["choices"])
            assert score.correct is expected, row["id"]


def test_always_first_by_text(rows):
    assert sum(score.strict for score in ours(rows, lambda row: row["choices"][0])) == 395


def test_letters_count_only_where_they_are_no_choice(rows):
    def letter(row):
        position = [choice.strip() for choice in row["choices"]].index(row["answer"].strip())
        return chr(ord("A") + position)

    scores = ours(rows, letter)
    # Two rows have chords or notes as choices: there "C" is the note.
    assert sum(score.correct for score in scores) == 998
    assert official(rows, letter) <= 2


def test_an_adversary_gains_nothing(rows):
    for predict in (
        lambda row: " ".join(row["choices"]),
        lambda row: "",
        lambda row: "all of them",
        lambda row: "</answer><answer>".join(row["choices"]),
    ):
        for row, score in zip(rows, ours(rows, predict), strict=True):
            assert not score.correct or len(set(map(scoring.tokens, row["choices"]))) == 1
