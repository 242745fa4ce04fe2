"""Rows in the formats that Echo's authors released, as records.

    EAQA-RL    {"id", "audio_path", "question", "multi_choice", "answer"}      JSON lines
    EAQA-SFT   {"messages": [{"role", "content"}, …], "audios": [path]}        JSON lines or a JSON list (ms-swift);
               the user's content holds the placeholder `<audio>`

Both are read as they are. A row that cannot be used is skipped, named by file and line, and returned.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import soundfile
from absl import logging

from data.records import EaqaRecord, RecordError

AUDIO_PLACEHOLDER = "<audio>"
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_CHOICES = re.compile(r"\[\s*['\"].*['\"]\s*\]", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class SkippedRow:
    """A row that no record was made of; `str` is one line that says where and why.

    Attributes:
      where: "file:line".
      id, audio_path: as far as the row says them, else "".
      reason: why.
    """

    where: str
    id: str
    audio_path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def _text(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, (str, int)) or value == "":
        raise RecordError(f"field {field!r} is missing or is no text")
    return str(value)


def _duration(root: Path, audio_path: str) -> float:
    try:
        return float(soundfile.info(root / audio_path).duration)
    except (soundfile.SoundFileError, OSError, RuntimeError) as error:
        raise RecordError(f"audio file {audio_path}: {str(error).splitlines()[0]}") from None


def rl_record(row: dict[str, Any], root: Path, source: str) -> EaqaRecord:
    """A row of EAQA-RL.

    Raises:
      RecordError: a field is missing, the answer is not exactly one of the choices, or the audio does not open.
    """
    choices = row.get("multi_choice")
    if not isinstance(choices, list) or len(choices) < 2:
        raise RecordError("field 'multi_choice' is not a list of at least two choices")
    texts = tuple(str(choice).strip() for choice in choices)
    answer = _text(row, "answer").strip()
    if texts.count(answer) != 1:
        raise RecordError(f"answer {answer!r} is {texts.count(answer)} times among the choices")
    audio_path = _text(row, "audio_path")
    return EaqaRecord(
        id=_text(row, "id"),
        audio_path=audio_path,
        duration_s=_duration(root, audio_path),
        question=_text(row, "question"),
        choices=texts,
        answer=answer,
        cot="",
        kind="",
        events=(),
        evidence=(),
        difficulty=0,
        split="train",
        source=source,
    )


def _listed_choices(text: str) -> tuple[str, ...]:
    """The Python list of strings that the prompt prints, () if there is none."""
    match = _CHOICES.search(text)
    try:
        found = ast.literal_eval(match[0]) if match else ()
    except (ValueError, SyntaxError):
        return ()
    return tuple(str(choice) for choice in found) if isinstance(found, list) else ()


def sft_record(row: dict[str, Any], root: Path, source: str, number: int) -> EaqaRecord:
    """A row of ms-swift chat data. The user's text is kept as it is: `question` is the whole prompt, `choices` is ().

    Raises:
      RecordError: not one clip, no user or assistant turn, or an answer that its own list of choices lacks.
    """
    audios, messages = row.get("audios"), row.get("messages")
    if not isinstance(audios, list) or len(audios) != 1:
        raise RecordError("field 'audios' is not a list of one path")
    if not isinstance(messages, list):
        raise RecordError("field 'messages' is not a list")
    turns = {m.get("role"): m.get("content") for m in messages if isinstance(m, dict)}
    user, cot = turns.get("user"), turns.get("assistant")
    if not isinstance(user, str) or not isinstance(cot, str):
        raise RecordError("field 'messages' lacks a user or an assistant turn with text")
    if user.count(AUDIO_PLACEHOLDER) != 1:
        raise RecordError(f"the user turn holds {AUDIO_PLACEHOLDER} {user.count('<audio>')} times")
    answers = _ANSWER.findall(cot)
    answer = answers[-1].strip() if answers else ""
    choices = _listed_choices(user)
    if choices and answer and answer not in choices:
        raise RecordError(f"answer {answer!r} is not among the choices of its prompt")
    audio_path = str(audios[0])
    return EaqaRecord(
        id=str(row.get("id", f"{source}_{number:06d}")),
        audio_path=audio_path,
        duration_s=_duration(root, audio_path),
        question=user.replace(AUDIO_PLACEHOLDER, "").strip(),
        choices=(),
        answer=answer,
        cot=cot,
        kind="",
        events=(),
        evidence=(),
        difficulty=0,
        split="train",
        source=source,
    )


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line or position, row) of JSON lines or of a JSON list; a broken line is given as a `RecordError`."""
    with path.open(encoding="utf-8", errors="replace") as file:
        if file.read(1) == "[":
            file.seek(0)
            try:
                yield from enumerate(json.load(file), 1)
            except json.JSONDecodeError as error:
                raise RecordError(f"{path}: not JSON ({error.msg}, line {error.lineno})") from None
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    yield number, RecordError(f"not JSON ({error.msg})")


def is_released(path: Path) -> bool:
    """Whether a file of rows is in a released format; else its rows are records of our own (`EaqaRecord.to_json`).

    Raises:
      RecordError: no line of it is a JSON object.
    """
    for _, row in _rows(path):
        if isinstance(row, dict):
            return "messages" in row or "multi_choice" in row
    raise RecordError(f"{path} is no file of JSON lines: no line of it is a JSON object")


def _skipped(where: str, row: Any, reason: str) -> SkippedRow:
    fields = row if isinstance(row, dict) else {}
    audios = fields.get("audios")
    path = fields.get("audio_path") or (audios[0] if isinstance(audios, list) and audios else "")
    return SkippedRow(where, str(fields.get("id", "")), str(path), reason)


def load_released(path: Path, root: Path) -> tuple[list[EaqaRecord], list[SkippedRow]]:
    """Read a file in either released format.

    Args:
      path: the rows.
      root: folder that relative audio paths start from.

    Returns:
      (records, the rows that were left out).

    Raises:
      RecordError: the file is missing, is a broken JSON list, or gives no record at all.
    """
    if not path.is_file():
        raise RecordError(f"{path} is missing")
    source = path.stem
    records: list[EaqaRecord] = []
    skipped: list[SkippedRow] = []
    for number, row in _rows(path):
        try:
            if isinstance(row, RecordError):
                raise row
            if not isinstance(row, dict):
                raise RecordError("not a JSON object")
            if "messages" in row:
                records.append(sft_record(row, root, source, number))
            else:
                records.append(rl_record(row, root, source))
        except RecordError as error:
            skipped.append(_skipped(f"{path}:{number}", row, str(error)))
            logging.warning("skipped %s", skipped[-1])
    if not records:
        reason = str(skipped[0]) if skipped else f"{path}: no rows"
        raise RecordError(f"no usable row; the first: {reason}")
    return records, skipped
