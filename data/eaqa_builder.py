"""TFDS builder of EAQA records over labelled scenes, stored as ArrayRecord; TensorFlow is not needed.

    root/audio/…, root/*.tsv           the scenes (see data.scenes)
    root/tfds/eaqa_scenes/<config>/…   the records, one ArrayRecord set per split
    root/skipped.jsonl                 every audio file that was left out, with its reason

Splits are those of the scenes: train, validation and test share neither scenes nor recordings nor sound parameters.
The name of `<config>` holds a hash of everything that decides the records, so a changed config is another dataset.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from data.audio_files import LENGTH_TOLERANCE_S, SAMPLING_RATE, AudioFileError, read_audio
from data.drafts import QuestionConfig
from data.questions import make_questions
from data.records import EaqaRecord, Event, Scene, write_jsonl
from data.scenes import SPLITS, read_scenes


class TooManySkipped(RuntimeError):
    """A larger share of the files than the config allows could not be used."""


@dataclasses.dataclass
class EaqaConfig(tfds.core.BuilderConfig):
    """What the builder makes.

    Attributes:
      root: folder of the scenes.
      questions: how records are made from their labels.
      max_bad_fraction: share of the files that may be unusable before the build stops.
      max_seconds: longer files are left out.
    """

    root: str = ""
    questions: QuestionConfig = dataclasses.field(default_factory=QuestionConfig)
    max_bad_fraction: float = 0.02
    max_seconds: float = 300.0


def check_audio(
    root: Path, scenes: Sequence[Scene], max_bad_fraction: float, max_seconds: float
) -> tuple[list[Scene], list[dict[str, str]]]:
    """Decode every file once; return the usable scenes and a row {"audio_path", "reason", "detail"} per skipped one.

    Raises:
      TooManySkipped: more than `max_bad_fraction` of the files are unusable; names the first of them.
    """

    def check(scene: Scene) -> AudioFileError | None:
        path = root / scene.audio_path
        try:
            wave = read_audio(path, SAMPLING_RATE, max_seconds)
        except AudioFileError as error:
            return error
        seconds = len(wave) / SAMPLING_RATE
        if abs(seconds - scene.duration_s) > LENGTH_TOLERANCE_S:
            detail = f"{seconds:.2f} s, its labels say {scene.duration_s:.2f} s"
            return AudioFileError(path, "truncated", detail)
        return None

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(check, scenes))
    usable, skipped = [], []
    for scene, error in zip(scenes, errors, strict=True):
        if error is None:
            usable.append(scene)
            continue
        logging.warning("skipped: %s", error)
        skipped.append(
            {"audio_path": scene.audio_path, "reason": error.reason, "detail": error.detail}
        )
    if len(skipped) > max_bad_fraction * len(scenes):
        first = skipped[0]
        raise TooManySkipped(
            f"{len(skipped)} of {len(scenes)} audio files are unusable, more than max_bad_fraction="
            f"{max_bad_fraction:g} allows; the first is {first['audio_path']} ({first['reason']})"
        )
    return usable, skipped


class EaqaScenes(tfds.core.GeneratorBasedBuilder):
    """Multiple-choice questions about timed sounds, with reasoning that cites segments."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (the interface of TFDS)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        seconds = tfds.features.Scalar(np.float32)
        features = {
            "id": text(doc="Scene, number of the question, kind."),
            "audio_path": text(doc="File, relative to the dataset root."),
            "duration_s": seconds,
            "question": text(),
            "choices": tfds.features.Sequence(text()),
            "answer": text(doc="Text of exactly one choice."),
            "cot": text(doc="Assistant text with citations; empty for RL-only records."),
            "kind": text(
                doc="order, before, after, count, gap, duration, overlap, moment or span."
            ),
            "events": {
                "start_s": tfds.features.Sequence(seconds),
                "end_s": tfds.features.Sequence(seconds),
                "label": tfds.features.Sequence(text()),
            },
            "evidence": tfds.features.Tensor(
                shape=(None, 2), dtype=np.float32, doc="Spans in seconds needed to answer."
            ),
            "difficulty": tfds.features.Scalar(
                np.int32, doc="Number of events to tell apart, 0 where unknown."
            ),
            "split": text(),
            "source": text(doc="synthetic, recorded, or the name of a corpus."),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        config = self.builder_config
        root = Path(config.root)
        generators, skipped = {}, []
        for split in SPLITS:
            if not (root / f"recordings_{split}.tsv").exists():
                continue
            scenes = read_scenes(root, split)
            usable, bad = check_audio(root, scenes, config.max_bad_fraction, config.max_seconds)
            skipped += bad
            if usable:
                generators[split] = self._generate_examples(usable)
        write_jsonl(root / "skipped.jsonl", skipped)
        return generators

    def _generate_examples(self, scenes: Sequence[Scene]) -> Iterator[tuple[int, dict[str, Any]]]:
        vocabulary = sorted({event.label for scene in scenes for event in scene.events})
        records = make_questions(scenes, self.builder_config.questions, vocabulary)
        number = -1
        for number, record in enumerate(records):
            yield number, _to_features(record)
        if number < 0:
            raise ValueError(
                f"the scenes of split {scenes[0].split!r} give no question; ask other config.questions.kinds, allow "
                "fewer config.questions.min_choices, or make more scenes"
            )


def _to_features(record: EaqaRecord) -> dict[str, Any]:
    row = record.to_json()
    row["choices"] = list(record.choices)
    row["events"] = {
        name: [getattr(event, name) for event in record.events]
        for name in ("start_s", "end_s", "label")
    }
    row["evidence"] = np.array(record.evidence, np.float32).reshape(-1, 2)
    return row


def _from_features(row: dict[str, Any]) -> EaqaRecord:
    def text(value: Any) -> str:
        return value.decode() if isinstance(value, bytes) else str(value)

    def seconds(value: Any) -> float:
        return round(float(value), 3)  # stored in 32 bits

    events = row["events"]
    spans = zip(events["start_s"], events["end_s"], events["label"], strict=True)
    return EaqaRecord(
        id=text(row["id"]),
        audio_path=text(row["audio_path"]),
        duration_s=seconds(row["duration_s"]),
        question=text(row["question"]),
        choices=tuple(text(choice) for choice in row["choices"]),
        answer=text(row["answer"]),
        cot=text(row["cot"]),
        kind=text(row["kind"]),
        events=tuple(Event(seconds(a), seconds(b), text(label)) for a, b, label in spans),
        evidence=tuple((seconds(a), seconds(b)) for a, b in row["evidence"]),
        difficulty=int(row["difficulty"]),
        split=text(row["split"]),
        source=text(row["source"]),
    )


class RecordSource(Sequence):
    """Random access to the records of one split, read from ArrayRecord one at a time."""

    def __init__(self, source: Sequence[dict[str, Any]]):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: SupportsIndex) -> EaqaRecord:  # type: ignore[override]
        i = index.__index__()
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return _from_features(self._source[i % len(self)])


def builder(
    root: Path | str,
    questions: QuestionConfig,
    max_bad_fraction: float = 0.02,
    max_seconds: float = 300.0,
) -> EaqaScenes:
    """The builder of the records that `questions` makes of the scenes under `root`."""
    root = Path(root)
    labels = [
        p.read_text() for p in sorted(root.glob("*.tsv")) if p.name.startswith(("audio", "rec"))
    ]
    if not labels:
        raise ValueError(f"{root} holds no scenes; make them with python -m data.build")
    # `max_bad_fraction` decides whether there are records, not which.
    decides = {"questions": dataclasses.asdict(questions), "max_seconds": float(max_seconds)}
    key = json.dumps(decides, sort_keys=True) + "".join(labels)
    digest = hashlib.sha256(key.encode()).hexdigest()[:10]
    config = EaqaConfig(
        name=f"{questions.style}_{questions.strategy}_{digest}",
        root=str(root),
        questions=questions,
        max_bad_fraction=max_bad_fraction,
        max_seconds=max_seconds,
    )
    return EaqaScenes(config=config, data_dir=str(root / "tfds"), file_format="array_record")


def build_records(made: EaqaScenes) -> dict[str, int]:
    """Prepare the dataset unless it is there already; return the number of records per split."""
    tfds.disable_progress_bar()
    # TFDS writes beside the final name. What a killed build left there may look like a second dataset.
    for left in Path(made.data_dir).parent.glob("incomplete.*"):
        shutil.rmtree(left)
    made.download_and_prepare()
    return {name: int(split.num_examples) for name, split in made.info.splits.items()}


def load_records(made: tfds.core.DatasetBuilder, split: str) -> RecordSource:
    """Records of a split; `split` may be sliced, e.g. "train[:80%]".

    Args:
      made: from `builder`, or from `tfds.builder_from_directory` of a dataset that was built.

    Raises:
      ValueError: the dataset was not built, has no such split, or lacks one of its files.
    """
    name = split.split("[")[0]
    if name not in made.info.splits:
        raise ValueError(
            f"{made.data_dir}: no split {name!r}; build it with python -m data.build, "
            f"splits there: {sorted(made.info.splits)}"
        )
    try:
        return RecordSource(made.as_data_source(split=split))
    except (RuntimeError, OSError) as error:  # what ArrayRecord raises for a file that is not there
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{made.data_dir}: the records cannot be read ({reason}); delete the folder and make them again with "
            "python -m data.build"
        ) from None
