"""The record types that pass between scenes, questions, storage and training."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

KINDS = ("order", "before", "after", "count", "gap", "duration", "overlap", "moment", "span")


class RecordError(ValueError):
    """A row that cannot be a record; the message names file, line and field."""


@dataclasses.dataclass(frozen=True)
class Event:
    """A sound with its time span in seconds, 0.1 s resolution."""

    start_s: float
    end_s: float
    label: str

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return round(self.end_s - self.start_s, 3)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A recording with timed labels.

    Attributes:
      id: segment id, unique in the dataset.
      audio_path: file, relative to the dataset root (or absolute).
      duration_s: length of the file in seconds.
      events: sorted by start.
      split: "train", "validation" or "test".
      source: where the sounds come from, e.g. "synthetic".
    """

    id: str
    audio_path: str
    duration_s: float
    events: tuple[Event, ...]
    split: str
    source: str


@dataclasses.dataclass(frozen=True)
class EaqaRecord:
    """One question about one recording.

    Attributes:
      answer: text of exactly one of `choices`.
      cot: the whole assistant text, `<think>…</think><answer>…</answer>`; "" for RL-only records.
      kind: one of `KINDS`, or "" where the source does not say.
      evidence: spans (start_s, end_s) that must be heard to answer.
      difficulty: number of events that a listener must tell apart; 0 where unknown.
    """

    id: str
    audio_path: str
    duration_s: float
    question: str
    choices: tuple[str, ...]
    answer: str
    cot: str
    kind: str
    events: tuple[Event, ...]
    evidence: tuple[tuple[float, float], ...]
    difficulty: int
    split: str
    source: str

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values; `from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> EaqaRecord:
        """Inverse of `to_json`.

        Raises:
          RecordError: a field is missing or of the wrong type; the message names it.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        where = f"record {row.get('id', '?')!r}"
        if missing := sorted(names - row.keys()):
            raise RecordError(f"{where} lacks the field {missing[0]!r}")
        values = {}
        for name in sorted(names):
            try:
                values[name] = _READERS.get(name, _text)(row[name])
            except (TypeError, ValueError, KeyError) as error:
                raise RecordError(f"{where}: field {name!r} is wrong: {error}") from None
        return cls(**values)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{value!r} is no list of texts")
    return tuple(_text(choice) for choice in value)


def _event(value: Mapping[str, Any]) -> Event:
    return Event(*_span((value["start_s"], value["end_s"])), _text(value["label"]))


def _span(value: Any) -> tuple[float, float]:
    start_s, end_s = (float(time) for time in value)
    # A NaN fails the comparison too.
    if not 0.0 <= start_s <= end_s < math.inf:
        raise ValueError(f"({start_s:g}, {end_s:g}) is not a time span")
    return start_s, end_s


def _duration(value: Any) -> float:
    duration_s = float(value)
    if not 0.0 < duration_s < math.inf:
        raise ValueError(f"{duration_s:g} is not a length in seconds")
    return duration_s


# Every other field is a text.
_READERS: dict[str, Callable[[Any], Any]] = {
    "duration_s": _duration,
    "choices": _choices,
    "events": lambda value: tuple(_event(event) for event in value),
    "evidence": lambda value: tuple(_span(span) for span in value),
    "difficulty": int,
}


def write_jsonl(path: Path, rows: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
    """Write rows as JSON lines; the file appears only when it is complete."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    part.replace(path)


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row); a line that is not a JSON object raises `RecordError`."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except json.JSONDecodeError as error:
                raise RecordError(f"{path}:{number}: not JSON ({error.msg})") from None
            except UnicodeDecodeError as error:
                raise RecordError(f"{path}:{number}: not UTF-8 ({error.reason})") from None
            if not isinstance(row, dict):
                raise RecordError(f"{path}:{number}: expected a JSON object")
            yield number, row


def read_records(path: Path) -> list[EaqaRecord]:
    """All records of a file of JSON lines; `RecordError` names the line that is wrong."""
    records = []
    for number, row in read_jsonl(path):
        try:
            records.append(EaqaRecord.from_json(row))
        except RecordError as error:
            raise RecordError(f"{path}:{number}: {error}") from None
    return records
