"""Answers are derived again from the labels by code that shares nothing with the generator."""

from __future__ import annotations

import collections
import re

import pytest

from data import drafts, questions, scenes, wordings
from data.records import KINDS, EaqaRecord, Event, Scene

CONFIG = scenes.SceneConfig(
    counts={}, num_events=(4, 7), overlap_probability=0.3, repeat_probability=0.3
)
SCENES = [scenes.plan_scene(CONFIG, "train", i).scene for i in range(150)]
ALL_KINDS = dict.fromkeys(KINDS, 1.0)
TAG = re.compile(r"<seg>(\d+\.\d), (\d+\.\d)</seg>")


def _config(**fields) -> drafts.QuestionConfig:
    return drafts.QuestionConfig(**({"kinds": ALL_KINDS, "per_scene": 4} | fields))


def _slots(record: EaqaRecord) -> tuple[str, dict[str, str]]:
    """Form and slots of a question, by matching it against the wordings."""
    for form, texts in wordings.QUESTIONS.items():
        for text in texts:
            pattern = re.escape(text).replace(r"\{", "{").replace(r"\}", "}")
            names = dict.fromkeys(re.findall(r"{(\w)}", pattern))
            for name in names:
                values = "|".join(wordings.ORDINALS) if name == "k" else ".+?"
                pattern = pattern.replace("{" + name + "}", f"(?P<{name}>{values})")
            if match := re.fullmatch(pattern, record.question):
                return form, match.groupdict()
    raise AssertionError(record.question)


def _solve(record: EaqaRecord) -> str:
    events = sorted(record.events, key=lambda e: e.start_s)
    form, slots = _slots(record)
    by_name = {e.label: e for e in events}
    if form == "kth":
        rank = int(slots["n"]) if "n" in slots else wordings.ORDINALS.index(slots["k"]) + 1
        return events[rank - 1].label
    if form == "last":
        return max(events, key=lambda e: e.end_s).label
    if form == "after":
        end = by_name[slots["x"]].end_s
        return min((e for e in events if e.start_s >= end), key=lambda e: e.start_s).label
    if form == "before":
        start = by_name[slots["x"]].start_s
        return max((e for e in events if e.end_s <= start), key=lambda e: e.end_s).label
    if form == "count_label":
        n = sum(e.label == slots["x"] for e in events)
        return "once" if n == 1 else "twice" if n == 2 else f"{n} times"
    if form == "count_which":
        times = {"twice": 2}.get(slots["n"]) or int(slots["n"].split()[0])
        right = [c for c in record.choices if sum(e.label == c for e in events) == times]
        assert len(right) == 1
        return right[0]
    if form == "count_before":
        return str(sum(e.start_s < by_name[slots["x"]].start_s for e in events))
    if form == "gap":
        return f"{by_name[slots['y']].start_s - by_name[slots['x']].end_s:.1f} seconds"
    if form in ("longest", "shortest"):
        best = max if form == "longest" else min
        return best(record.choices, key=lambda c: by_name[c].end_s - by_name[c].start_s)
    if form == "moment":
        then = float(slots["m"])
        heard = [e.label for e in events if e.start_s <= then <= e.end_s]
        assert len(heard) == 1
        return heard[0]
    if form == "span":
        asked = (float(slots["s"]), float(slots["e"]))
        heard = [e.label for e in events if e.start_s < asked[1] and e.end_s > asked[0]]
        assert len(heard) == 1
        return heard[0]
    x = by_name[slots["x"]]
    shared = [e for e in events if e is not x and e.start_s < x.end_s and e.end_s > x.start_s]
    assert len(shared) == 1
    return shared[0].label


@pytest.mark.parametrize("style", drafts.STYLES)
@pytest.mark.parametrize("strategy", drafts.STRATEGIES)
def test_every_answer_is_right_unique_and_told(style, strategy):
    records = list(questions.make_questions(SCENES, _config(style=style, strategy=strategy)))
    assert {record.kind for record in records} == set(KINDS)
    for record in records:
        assert _solve(record) == record.answer, record
        assert len(record.choices) == 4 == len(set(record.choices))
        assert record.choices.count(record.answer) == 1
        assert record.cot.endswith(f"</think><answer>{record.answer}</answer>")
        assert re.fullmatch(r"<think>.*</think><answer>.*</answer>", record.cot)


@pytest.mark.parametrize("style", drafts.STYLES)
@pytest.mark.parametrize("strategy", ["direct", "scan"])
def test_citations_name_what_is_there_after_the_tag(style, strategy):
    for record in questions.make_questions(SCENES, _config(style=style, strategy=strategy)):
        tags = list(TAG.finditer(record.cot))
        assert 1 <= len(tags) <= 7
        assert record.cot.count("<seg>") == len(tags)
        spans = {(e.start_s, e.end_s): e.label for e in record.events}
        cited = set()
        for tag, following in zip(tags, [*tags[1:], None], strict=True):
            span = (float(tag[1]), float(tag[2]))
            cited.add(span)
            tail = record.cot[tag.end() : following.start() if following else None]
            assert re.match(r"[,;] ?|\s[a-z]", tail)
            sentence = tail.split(". ")[0]
            assert spans[span] in sentence
        if strategy == "direct":
            assert cited == set(record.evidence)


def test_full_reasoning_has_the_length_of_the_papers():
    records = list(questions.make_questions(SCENES, _config(style="full")))
    words = [len(record.cot.split()) for record in records]
    assert min(words) >= 25
    assert max(words) <= 120
    assert 40 <= sum(words) / len(words) <= 90
    assert len({record.cot for record in records}) > 0.95 * len(records)


def test_an_answer_that_is_not_known_from_the_question_is_named_only_after_its_tag():
    for record in questions.make_questions(SCENES, _config(style="full")):
        if record.kind in ("after", "before", "overlap", "order", "moment", "span"):
            *_, answer_tag = TAG.finditer(record.cot)
            assert record.answer not in record.cot[: answer_tag.start()]


def test_positions_are_balanced_and_wrong_choices_come_from_the_scene():
    many = [scenes.plan_scene(CONFIG, "train", i).scene for i in range(700)]
    records = list(questions.make_questions(many, drafts.QuestionConfig()))
    places = [record.choices.index(record.answer) for record in records]
    for place in range(4):
        assert 0.2 < places.count(place) / len(places) < 0.3
    for record in records:
        present = {event.label for event in record.events}
        if len(present) >= 5:
            assert set(record.choices) <= present


def test_a_record_depends_on_its_own_scene_only():
    config = _config()
    alone = list(questions.make_questions(SCENES[7:8], config))
    among = [r for r in questions.make_questions(SCENES, config) if r.id.startswith(SCENES[7].id)]
    assert alone == among
    assert all(EaqaRecord.from_json(record.to_json()) == record for record in among)


def test_ambiguous_scenes_give_no_question():
    twins = (Event(0.5, 1.0, "cough"), Event(2.0, 2.6, "siren"), Event(3.0, 3.5, "cough"))
    scene = Scene("s", "s.wav", 5.0, twins, "train", "synthetic")
    config = drafts.QuestionConfig(kinds={"after": 1.0}, per_scene=9)
    asked = list(questions.make_questions([scene], config))
    assert [record.answer for record in asked] == ["cough"]  # after the siren; the cough is twofold
    blurred = (Event(0.5, 1.2, "cough"), Event(1.0, 2.6, "siren"), Event(3.0, 3.5, "drum"))
    scene = Scene("s", "s.wav", 5.0, blurred, "train", "synthetic")
    for record in questions.make_questions([scene], config):
        assert _solve(record) == record.answer


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match=r"questions\.stile is not a field"):
        drafts.QuestionConfig.from_mapping({"stile": "short"})
    with pytest.raises(ValueError, match=r"questions\.kinds\.colour is unknown"):
        drafts.QuestionConfig(kinds={"colour": 1.0})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", -1, "must be a whole number, at least 0"),
        ("per_scene", 0, "must be a whole number, at least 1"),
        ("kinds", {"span": -1.0}, ".span=-1.0 must be a finite number, at least 0"),
        ("kinds", {"span": 0.0}, " asks for nothing"),
        ("min_choices", 1, "must be a whole number, at least 2"),
        ("num_choices", 3, "must be a whole number, at least 4"),
        ("max_citations", 0, "must be a whole number, at least 1"),
        ("ordinals", 10, "must be a whole number in [1, 9]"),
    ],
)
def test_a_bad_value_is_refused_with_its_field(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        drafts.QuestionConfig(**{field: value})
    assert str(caught.value).startswith(f"questions.{field}")


def test_text_alone_does_not_give_the_answer():
    """Majority over the choices' text, their set and their order, learned on other scenes, stays near chance."""
    config = drafts.QuestionConfig(kinds=ALL_KINDS, per_scene=4)

    def make(split: str, count: int) -> list[EaqaRecord]:
        planned = (scenes.plan_scene(CONFIG, split, i).scene for i in range(count))
        return list(questions.make_questions(planned, config, reasoning=False))

    offered, right = collections.Counter(), collections.Counter()
    ranks: dict[str, collections.Counter] = {kind: collections.Counter() for kind in KINDS}
    for record in make("train", 2_000):
        offered.update((record.kind, choice) for choice in record.choices)
        right[record.kind, record.answer] += 1
        ranks[record.kind][sorted(record.choices).index(record.answer)] += 1
    hits = collections.Counter()
    for record in (unseen := make("test", 700)):
        rate = {c: right[record.kind, c] / max(offered[record.kind, c], 1) for c in record.choices}
        hits["prior"] += max(rate, key=rate.__getitem__) == record.answer
        rank = ranks[record.kind].most_common(1)[0][0]
        hits["rank"] += sorted(record.choices)[rank] == record.answer
        hits["longest"] += max(record.choices, key=len) == record.answer
    for name, count in hits.items():
        assert 0.22 < count / len(unseen) < 0.28, name
