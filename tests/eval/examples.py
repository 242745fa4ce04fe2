"""Questions to vary."""

from data.records import EaqaRecord, Event

CHOICES = ("a bell", "a dog", "rain", "a horn")
COT = "<think>First <seg>0.5, 1.5</seg> a bell rings.</think><answer>a bell</answer>"


def make_record(number, **changes):
    fields = {
        "id": f"q{number}",
        "audio_path": f"audio/{number}.wav",
        "duration_s": 2.0 + 0.25 * (number % 3),
        "question": "Which sound comes first?",
        "choices": CHOICES,
        "answer": CHOICES[number % 2],
        "cot": COT,
        "kind": "order" if number % 2 else "count",
        "events": (Event(0.5, 1.5, "a bell"),),
        "evidence": ((0.5, 1.5),),
        "difficulty": 1,
        "split": "test",
        "source": "synthetic",
    }
    return EaqaRecord(**{**fields, **changes})


def released_row(number):
    """A question in the released format, about a file of `conftest.data` if number is below 11."""
    return {
        "id": f"r{number}",
        "audio_path": f"audio/{number}.wav",
        "question": "Which?",
        "multi_choice": ["a bell", "a dog"],
        "answer": "a bell",
    }
