"""From what a model wrote to right or wrong, and how sure a count of rights is.

An answer passes three gates, each a pure function of text:

1. `extract_answer`: the text inside `<answer>…</answer>`.
2. `map_to_choice`: that text to exactly one of the choices (exact, normalized, letter, unique
   token-set match). Nothing or more than one is *unparsed*, and unparsed is wrong: there is no
   default choice, because the first choice alone is right for 39.5 % of MMAU test-mini.
3. `official_match`: the matcher of the MMAU and MMAR scripts, applied to the text of the mapped
   choice. It looks at sets of words, so it also accepts a wrong choice made of the same words in
   another order; `Score.strict` does not.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

How = Literal[
    "exact", "normalized", "letter", "tokens", "no_answer", "several_answers", "none", "ambiguous"
]
PARSED: tuple[How, ...] = ("exact", "normalized", "letter", "tokens")

# Innermost pairs: an opening tag that is never closed does not swallow the next answer.
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_WORD = re.compile(r"\b\w+\b")
# Marks that only surround an answer. Signs that carry meaning ("C#", "-3", "50 %") are kept.
_SURROUNDING = " \t\r\n\"'`.,;:!?*()[]{}<>“”‘’«»"
_LETTER_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:,]?")
_LETTER_AND_TEXT = re.compile(
    r"(?:[(\[]([A-Za-z])[)\]][.:]?|([A-Za-z])[.:)\]])\s+(\S.*)", re.DOTALL
)

Z_95 = 1.959963984540054
"""Standard normal quantile at 0.975: the z of a two-sided 95 % interval."""


@dataclass(frozen=True)
class ChoiceMatch:
    """Which choice an answer text names, and by which rule.

    Attributes:
        choice: text of the choice as it stands in the question, or None when the answer is
            unparsed.
        index: first position of that text among the choices, or None.
        how: the rule that decided; `PARSED` lists those that name a choice.
    """

    choice: str | None
    index: int | None
    how: How

    @property
    def parsed(self) -> bool:
        """Whether the answer names a choice."""
        return self.choice is not None


@dataclass(frozen=True)
class Score:
    """One scored response.

    Attributes:
        answer_text: text inside `<answer>`, stripped; None if there is none or several that differ.
        match: the choice it names.
        correct: whether the official matcher accepts that choice; False when unparsed.
        strict: whether that choice is the text of the answer but for surrounding blanks.
    """

    answer_text: str | None
    match: ChoiceMatch
    correct: bool
    strict: bool


@dataclass(frozen=True)
class PairedTest:
    """Two runs on the same questions: McNemar's exact test.

    Attributes:
        only_first: questions that only the first run has right.
        only_second: questions that only the second run has right.
        p_value: two-sided; probability of so uneven a split if both runs were equally good.
    """

    only_first: int
    only_second: int
    p_value: float


def tokens(text: str) -> frozenset[str]:
    r"""Returns the set of `\b\w+\b` of the lower-cased text: the official scripts' view of a string."""
    return frozenset(_WORD.findall(text.lower()))


def official_match(prediction: str, answer: str, choices: Sequence[str]) -> bool:
    """Returns what MMAU's and MMAR's evaluation scripts return for one prediction.

    Right if the prediction's tokens are not empty, hold every token of the answer, and hold none
    that occurs only in wrong choices. A wrong choice is one whose tokens differ from the answer's.
    Source: `string_match` in Sakshi113/MMAU and ddlBoJack/MMAR.
    """
    said, right = tokens(prediction), tokens(answer)
    wrong: set[str] = set()
    for choice in choices:
        if (of_choice := tokens(choice)) != right:
            wrong |= of_choice - right
    return bool(said) and right <= said and not (said & wrong)


def answer_texts(response: str) -> list[str]:
    """Returns the distinct stripped texts inside `<answer>…</answer>`, in order of appearance."""
    return list(dict.fromkeys(text.strip() for text in _ANSWER.findall(response)))


def extract_answer(response: str) -> str | None:
    """Returns the text inside `<answer>…</answer>`, stripped.

    None if there is no complete pair of tags, or several whose texts differ: choosing one of them
    would be guessing.
    """
    texts = answer_texts(response)
    return texts[0] if len(texts) == 1 else None


def normalize(text: str) -> str:
    """Returns the text in compatibility form, case folded, blanks collapsed, surrounding marks removed."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(_SURROUNDING)


def map_to_choice(text: str, choices: Sequence[str]) -> ChoiceMatch:
    """Maps an answer text to exactly one choice.

    The first rule that any choice satisfies decides; if it is satisfied by choices of different
    text, the answer is ambiguous. A choice that the question repeats counts once.

    1. exact: equal but for surrounding blanks.
    2. normalized: equal after `normalize`.
    3. letter: a letter alone (`B`, `(b)`, `B.`), or a letter before the text of the same choice
       (`B. a dog`). A letter before the text of another choice is ambiguous.
    4. tokens: the one choice that `official_match` would accept as the answer.
    """
    distinct = list(dict.fromkeys(choices))
    stripped = text.strip()
    if not stripped:
        return ChoiceMatch(None, None, "none")
    wanted = normalize(stripped)
    if exact := [choice for choice in distinct if choice.strip() == stripped]:
        return _one_of(exact, choices, "exact")
    if wanted and (equal := [choice for choice in distinct if normalize(choice) == wanted]):
        return _one_of(equal, choices, "normalized")
    if alone := _LETTER_ALONE.fullmatch(stripped):
        position = _letter_position(alone.group(1))
        if position < len(choices):
            return _one_of([choices[position]], choices, "letter")
        return ChoiceMatch(None, None, "none")
    if led := _LETTER_AND_TEXT.fullmatch(stripped):
        position = _letter_position(led.group(1) or led.group(2))
        if position < len(choices):
            rest = map_to_choice(led.group(3), choices)
            if rest.choice == choices[position]:
                return _one_of([choices[position]], choices, "letter")
            return ChoiceMatch(None, None, "ambiguous" if rest.parsed else rest.how)
    accepted = [choice for choice in distinct if official_match(stripped, choice, choices)]
    return _one_of(accepted, choices, "tokens") if accepted else ChoiceMatch(None, None, "none")


def score(response: str, answer: str, choices: Sequence[str]) -> Score:
    """Scores a whole response: extract, map, match.

    Raises:
        ValueError: if no choice has the official tokens of the answer, so that nothing could be
            right.
    """
    if not any(tokens(choice) == tokens(answer) for choice in choices):
        raise ValueError(f"the answer {answer!r} is not among the choices {list(choices)!r}")
    texts = answer_texts(response)
    if len(texts) != 1:
        how: How = "several_answers" if texts else "no_answer"
        return Score(None, ChoiceMatch(None, None, how), correct=False, strict=False)
    match = map_to_choice(texts[0], choices)
    if match.choice is None:
        return Score(texts[0], match, correct=False, strict=False)
    correct = official_match(match.choice, answer, choices)
    return Score(texts[0], match, correct, strict=match.choice.strip() == answer.strip())


def explain(result: Score, answer: str) -> str:
    """Returns one sentence, for a reader, on why a response was scored as it was."""
    verdict = "right" if result.correct else "wrong"
    if result.match.choice is not None:
        rule = {
            "exact": "is the text of a choice",
            "normalized": "is the text of a choice but for case, blanks or surrounding marks",
            "letter": "names a choice by its letter",
            "tokens": "holds the words of exactly one choice",
        }[result.match.how]
        relation = "" if result.correct else f", and the right one is “{answer}”"
        return f"The answer text {rule}, “{result.match.choice}”{relation}: {verdict}."
    reason = {
        "no_answer": "There is no complete <answer>…</answer>",
        "several_answers": "There are several <answer>…</answer> with different texts",
        "none": "The answer text names none of the choices",
        "ambiguous": "The answer text fits more than one choice",
    }[result.match.how]
    return f"{reason}: unparsed, which counts as {verdict}."


def wilson_interval(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Returns Wilson's score interval of a proportion, as two fractions; (0, 1) when total is 0.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".

    Raises:
        ValueError: unless 0 <= correct <= total.
    """
    if not 0 <= correct <= total:
        raise ValueError(f"correct must be between 0 and total, got {correct} of {total}")
    if total == 0:
        return 0.0, 1.0
    p = correct / total
    scale = 1 + z * z / total
    centre = (p + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    # At 0 and at total one bound is exactly the proportion; rounding must not move it.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Compares two runs question by question (McNemar's test, exact binomial form).

    Args:
        first: whether the first run has each question right.
        second: the same of the second run, in the same order.

    Raises:
        ValueError: if the runs differ in length.
    """
    if len(first) != len(second):
        raise ValueError(
            f"a paired test needs the same questions: {len(first)} and {len(second)} answers"
        )
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    # Integers until the last division: 2 ** discordant overflows a float beyond 1,023 questions.
    p_value = min(1.0, 2 * tail / 2**discordant)
    return PairedTest(only_first, only_second, p_value)


def _letter_position(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def _one_of(candidates: Sequence[str], choices: Sequence[str], how: How) -> ChoiceMatch:
    """Returns the only candidate (candidates equal but for blanks are one), else an ambiguous match."""
    if len({candidate.strip() for candidate in candidates}) > 1:
        return ChoiceMatch(None, None, "ambiguous")
    return ChoiceMatch(candidates[0], list(choices).index(candidates[0]), how)
