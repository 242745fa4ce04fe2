"""The questions of a run: a split of a data set that `data.build` made, or a file of JSON lines."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data import released
from data.records import EaqaRecord, read_jsonl, read_records
from eval import scoring


@dataclass(frozen=True)
class QuestionSet:
    """Questions that a run asks.

    Attributes:
        name: for people.
        records: in the order of the source.
        audio_root: what their `audio_path` is relative to.
        sha256: of the whole source split, so that a run with a limit is a part of the run without.
        unaskable: questions of the source that cannot be asked, each with `id`, `audio_path` and
            `reason`; they count as wrong.
        unusable_at_build: what the data set left out when it was made, each with `audio_path` and
            `reason`; no question is about it.
    """

    name: str
    records: tuple[EaqaRecord, ...]
    audio_root: Path
    sha256: str
    unaskable: tuple[dict[str, str], ...] = ()
    unusable_at_build: tuple[dict[str, Any], ...] = ()

    def limited(self, count: int) -> "QuestionSet":
        """Returns `count` of the questions, unaskable ones included, chosen by a hash of their ids; all of them for 0.

        The first questions of a file would all be of one kind or of one recording, and the choice
        for a smaller count is part of that for a larger one.
        """
        if count < 0:
            raise ValueError(f"limit must not be negative, got {count}")
        every = [record.id for record in self.records] + [row["id"] for row in self.unaskable]
        if count == 0 or count >= len(every):
            return self
        ids = set(sorted(every, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])
        return replace(
            self,
            records=tuple(record for record in self.records if record.id in ids),
            unaskable=tuple(row for row in self.unaskable if row["id"] in ids),
        )


def load(data: Path, split: str) -> QuestionSet:
    """Reads the questions.

    Args:
        data: a folder that `data.build` wrote (or one record set below its `tfds`), or a `.jsonl`
            file with one record a line (`EaqaRecord.to_json`), audio paths relative to its folder.
        split: split of a folder; of a file, the records whose `split` it is ("all" takes every
            one).

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it holds no questions, or one that cannot be scored; the message names it.
    """
    if data.is_file():
        return _from_file(data, split)
    if not data.is_dir():
        raise FileNotFoundError(
            f"{data}: no such folder; make a data set with python -m data.build"
        )
    return _from_folder(data, split)


def _from_file(data: Path, split: str) -> QuestionSet:
    if released.is_released(data):
        records, skipped = released.load_released(data, data.parent)
        unaskable = tuple(
            {"id": row.id or row.where, "audio_path": row.audio_path, "reason": str(row)}
            for row in skipped
        )
        return _checked(data.stem, records, data.parent, unaskable=unaskable)
    rows = read_records(data)
    records = [record for record in rows if split in ("all", record.split)]
    if not records:
        there = ", ".join(sorted({record.split for record in rows})) or "none"
        raise ValueError(f"{data}: no question of split {split!r}; splits there: {there}")
    return _checked(data.stem, records, data.parent)


def _from_folder(data: Path, split: str) -> QuestionSet:
    # Importing TFDS takes seconds, which a file of JSON lines need not pay.
    import tensorflow_datasets as tfds

    from data import eaqa_builder

    found = sorted(path.parent for path in data.rglob("dataset_info.json"))
    if not found:
        raise ValueError(f"{data} holds no questions; make them with python -m data.build")
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(data)) for path in found)
        raise ValueError(f"{data} holds {len(found)} record sets; name one of them: {names}")
    records = eaqa_builder.load_records(tfds.builder_from_directory(found[0]), split)
    # root/tfds/eaqa_scenes/<config>/<version>: audio paths are relative to root.
    root = next((path for path in (data, *data.parents) if (path / "tfds").is_dir()), data)
    skipped = root / "skipped.jsonl"
    unusable = tuple(row for _, row in read_jsonl(skipped)) if skipped.is_file() else ()
    return _checked(
        root.name, [records[i] for i in range(len(records))], root, unusable_at_build=unusable
    )


def _checked(
    name: str,
    records: Sequence[EaqaRecord],
    root: Path,
    unaskable: tuple[dict[str, str], ...] = (),
    unusable_at_build: tuple[dict[str, Any], ...] = (),
) -> QuestionSet:
    digest = hashlib.sha256()
    seen: set[str] = set()
    for row in unaskable:
        if row["id"] in seen:
            raise ValueError(f"{name}: question {row['id']!r} occurs twice; ids must be unique")
        seen.add(row["id"])
        digest.update(json.dumps(row["id"]).encode())
    for record in records:
        where = f"{name}: question {record.id!r}"
        if record.id in seen:
            raise ValueError(f"{where} occurs twice; ids must be unique")
        seen.add(record.id)
        if not any(scoring.tokens(c) == scoring.tokens(record.answer) for c in record.choices):
            raise ValueError(f"{where}: the answer {record.answer!r} is not among its choices")
        if len(set(record.choices)) < 2:
            raise ValueError(f"{where} has one choice only, so every answer would be right")
        audio = root / record.audio_path
        size = audio.stat().st_size if audio.is_file() else -1
        digest.update(json.dumps([record.to_json(), size], sort_keys=True).encode())
    return QuestionSet(name, tuple(records), root, digest.hexdigest(), unaskable, unusable_at_build)
