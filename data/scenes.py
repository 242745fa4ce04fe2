"""Labelled scenes as ordinary audio files, with strong labels in AudioSet-Strong's TSV layout.

`plan_scene` decides everything about a scene from (seed, split, index) and costs microseconds; `render_scene`
turns a plan into a waveform. Labels come from the plans, so they never need the audio. Under the root:

    audio/<split>/<segment id>.{wav,flac}
    audioset_<split>_strong.tsv    segment_id, start_time_seconds, end_time_seconds, label (a mid)
    mid_to_display_name.tsv        mid, display name (no header, as AudioSet has it)
    recordings_<split>.tsv         segment_id, file, duration_seconds, sampling_rate, channels, origin
    scenes.json                    the config that made them, and a hash of the recordings in them
    skipped_recordings.jsonl       recordings that were left out, and why (with `recordings_root` only)
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import json
import multiprocessing
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import scipy.fft
import soundfile

from data import recordings, sounds
from data.records import Event, Scene, write_jsonl
from echo_jax import ranges

SPLITS = tuple(sounds.SPLIT_BANDS)
NOISE_SLOPES = {"white": 0.0, "pink": 0.5, "brown": 1.0}  # amplitude falls as f ** -slope
RENDER_CHUNK = 32
# Sounds reach up to 7.5 kHz; what is beyond the highest no player knows.
_RATE = ranges.Range(least=16_000, most=192_000, whole=True)
FILE_FORMATS = ("wav", "flac")
SKIPPED_RECORDINGS = "skipped_recordings.jsonl"


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """What scenes are made of. Times are multiples of 0.1 s.

    Attributes:
      seed: with split and index, decides a scene entirely.
      counts: scenes per split.
      classes: names in `sounds.LIBRARY`, and labels of recordings in `recordings_root`;
        () = the whole library.
      recordings_root: folder of extracted real recordings (see `data.recordings`), "" for none.
      duration_s, event_s, num_events: inclusive ranges for the scene, one event, and the events of a scene.
      min_gap_s: silence (background only) between events that do not overlap.
      overlap_probability: share of scenes in which one event starts before the one before it has ended.
      repeat_probability: chance that an event repeats a class that the scene already has.
      event_db: range of an event's RMS in dB full scale.
      noise_kinds: background colours to choose from ("white", "pink", "brown"); () = none.
      snr_db: range of the mean event level over the background's RMS, in dB.
      sampling_rates, file_formats, channels: choices for the file; repeat an entry to weight it.
    """

    seed: int = 0
    counts: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"train": 100, "validation": 20, "test": 20}
    )
    classes: tuple[str, ...] = ()
    recordings_root: str = ""
    duration_s: tuple[float, float] = (10.0, 10.0)
    event_s: tuple[float, float] = (0.5, 1.2)
    num_events: tuple[int, int] = (4, 7)
    min_gap_s: float = 0.2
    overlap_probability: float = 0.0
    repeat_probability: float = 0.0
    event_db: tuple[float, float] = (-28.0, -18.0)
    noise_kinds: tuple[str, ...] = ("white", "pink", "brown")
    snr_db: tuple[float, float] = (10.0, 25.0)
    sampling_rates: tuple[int, ...] = (16_000, 22_050, 44_100, 48_000)
    file_formats: tuple[str, ...] = ("wav", "flac")
    channels: tuple[int, ...] = (1, 2)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SceneConfig:
        """From a config section; lists become tuples, an unknown field raises and is named."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"scenes.{unknown[0]} is not a field; use one of {sorted(names)}")
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in values.items()
        }
        if "counts" in plain:
            plain["counts"] = dict(plain["counts"])
        return cls(**plain)

    def __post_init__(self) -> None:
        ranges.check("scenes.seed", self.seed, ranges.Range(least=0, whole=True))
        if unknown := [s for s in self.counts if s not in SPLITS]:
            raise ValueError(f"scenes.counts.{unknown[0]} is not a split; use {list(SPLITS)}")
        for split, count in self.counts.items():
            ranges.check(f"scenes.counts.{split}", count, ranges.Range(least=0, whole=True))
        ranges.check_span("scenes.duration_s", self.duration_s, ranges.NOT_NEGATIVE)
        ranges.check_span("scenes.event_s", self.event_s, ranges.Range(least=0.2))
        ranges.check_span("scenes.num_events", self.num_events, ranges.COUNT)
        ranges.check("scenes.min_gap_s", self.min_gap_s, ranges.NOT_NEGATIVE)
        _check_tenths("scenes.duration_s", *self.duration_s)
        _check_tenths("scenes.event_s", *self.event_s)
        _check_tenths("scenes.min_gap_s", self.min_gap_s)
        ranges.check("scenes.overlap_probability", self.overlap_probability, ranges.SHARE)
        ranges.check("scenes.repeat_probability", self.repeat_probability, ranges.SHARE)
        ranges.check_span("scenes.event_db", self.event_db)
        ranges.check_span("scenes.snr_db", self.snr_db)
        if self.noise_kinds != ():
            ranges.check_choices("scenes.noise_kinds", self.noise_kinds, NOISE_SLOPES)
        ranges.check_choices("scenes.file_formats", self.file_formats, FILE_FORMATS)
        ranges.check_choices("scenes.channels", self.channels, (1, 2))
        if not isinstance(self.sampling_rates, tuple) or not self.sampling_rates:
            raise ValueError(
                f"scenes.sampling_rates={self.sampling_rates!r} must name one or more rates in Hz"
            )
        for rate in self.sampling_rates:
            ranges.check("scenes.sampling_rates: each", rate, _RATE)
        self._check_classes()
        longest = max([self.event_s[1]] + [_min_seconds(c) for c in self.class_names])
        needed = self.num_events[1] * (longest + self.min_gap_s)
        if needed > self.duration_s[0]:
            raise ValueError(
                f"scenes: {self.num_events[1]} events of up to {longest:g} s with gaps of {self.min_gap_s:g} s "
                f"need {needed:.1f} s, but duration_s starts at {self.duration_s[0]:g} s"
            )

    def _check_classes(self) -> None:
        if not isinstance(self.classes, tuple):
            raise ValueError(f"scenes.classes must be a list of names, got {self.classes!r}")
        for i, name in enumerate(self.classes):
            if name in self.classes[:i]:
                raise ValueError(f"scenes.classes: {name!r} is there twice; name each class once")
            if not self.recordings_root and name not in sounds.LIBRARY:
                raise ValueError(f"scenes.classes: {name!r} is not in the sound library")
        if len(self.class_names) < 2:
            raise ValueError(f"scenes.classes: name two or more, got {list(self.classes)}")
        if not self.repeat_probability and self.num_events[1] > len(self.class_names):
            raise ValueError(
                f"scenes.num_events: {self.num_events[1]} exceeds the number of classes, {len(self.class_names)}; "
                "ask for fewer or allow repeats (scenes.repeat_probability)"
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes in use, the whole library if none were named."""
        return self.classes or tuple(sounds.LIBRARY)

    @property
    def recorded_classes(self) -> tuple[str, ...]:
        """The classes whose sounds are real recordings."""
        return tuple(name for name in self.class_names if name not in sounds.LIBRARY)

    def fingerprint(self) -> dict[str, Any]:
        """The fields that decide a scene's content (not how many there are)."""
        fields = dataclasses.asdict(self)
        del fields["counts"]
        return json.loads(json.dumps(fields))


@dataclasses.dataclass(frozen=True)
class ScenePlan:
    """A scene before it is rendered: its labels, its file, and what rendering needs."""

    scene: Scene
    sampling_rate: int
    channels: int
    seed: tuple[int, int, int]
    event_db: tuple[float, ...]
    noise_kind: str
    noise_db: float


def _check_tenths(field: str, *seconds: float) -> None:
    for value in seconds:
        if abs(value * 10 - round(value * 10)) > 1e-6:
            raise ValueError(f"{field}: times are multiples of 0.1 s, got {value!r}")


def _min_seconds(name: str) -> float:
    return sounds.LIBRARY[name].min_seconds if name in sounds.LIBRARY else 0.3


def mid_of(label: str) -> str:
    """The machine id of a label: `/s/...` for synthetic classes, `/r/...` for recordings."""
    if label in sounds.LIBRARY:
        return sounds.LIBRARY[label].mid
    return "/r/" + label.replace(" ", "_")


def _tenths(rng: np.random.Generator, span: tuple[float, float]) -> int:
    return int(rng.integers(round(span[0] * 10), round(span[1] * 10) + 1))


def _draw_labels(config: SceneConfig, rng: np.random.Generator, count: int) -> list[str]:
    """Labels in time order; neighbours differ, or they would sound like one event with a pause."""
    fresh = [str(name) for name in rng.permutation(config.class_names)]
    labels: list[str] = []
    for _ in range(count):
        repeat = bool(labels) and (not fresh or rng.random() < config.repeat_probability)
        known = [name for name in dict.fromkeys(labels) if name != labels[-1]]
        if repeat and known:
            labels.append(known[rng.integers(len(known))])
        else:
            labels.append(fresh.pop())
    return labels


def plan_scene(config: SceneConfig, split: str, index: int) -> ScenePlan:
    """Decide scene number `index` of `split`. Deterministic per (config, split, index)."""
    seed = (config.seed, zlib.crc32(split.encode()), index)
    rng = np.random.default_rng(seed)
    count = int(rng.integers(config.num_events[0], config.num_events[1] + 1))
    total = _tenths(rng, config.duration_s)
    labels = _draw_labels(config, rng, count)
    lengths = [
        max(_tenths(rng, config.event_s), int(np.ceil(_min_seconds(name) * 10 - 1e-9)))
        for name in labels
    ]
    gaps = [0] + [round(config.min_gap_s * 10)] * (count - 1)
    if count > 1 and rng.random() < config.overlap_probability:
        i = int(rng.integers(1, count))
        longest = min(lengths[i - 1], lengths[i]) - 1
        if longest >= 2:
            gaps[i] = -int(rng.integers(2, longest + 1))
    slack = total - sum(lengths) - sum(gaps)
    # Spread the remaining time over the gaps, the start and the end; an overlap stays as drawn.
    cuts = np.sort(rng.integers(0, slack + 1, count))
    extra = np.diff(cuts, prepend=0)
    events, now = [], 0
    for i in range(count):
        now += gaps[i] + (int(extra[i]) if gaps[i] >= 0 else 0)
        events.append(Event(now / 10, (now + lengths[i]) / 10, labels[i]))
        now += lengths[i]
    levels = tuple(float(rng.uniform(*config.event_db)) for _ in range(count))
    kind = str(rng.choice(config.noise_kinds)) if config.noise_kinds else ""
    noise_db = float(np.mean(levels) - rng.uniform(*config.snr_db))
    extension = str(rng.choice(config.file_formats))
    name = f"{split}_{index:06d}"
    real = any(label not in sounds.LIBRARY for label in labels)
    scene = Scene(
        id=name,
        audio_path=f"audio/{split}/{name}.{extension}",
        duration_s=total / 10,
        events=tuple(events),
        split=split,
        source="recorded" if real else "synthetic",
    )
    rate, channels = int(rng.choice(config.sampling_rates)), int(rng.choice(config.channels))
    return ScenePlan(scene, rate, channels, seed, levels, kind, noise_db)


@functools.lru_cache(maxsize=16)
def _colour(size: int, sampling_rate: int, slope: float) -> np.ndarray:
    """Amplitude of coloured noise at the frequencies of an rfft of `size`, flat below 40 Hz: f32[size // 2 + 1]."""
    hz = np.fft.rfftfreq(size, 1 / sampling_rate)
    return (np.maximum(hz, 40.0) ** -slope).astype(np.float32)


def _noise(rng: np.random.Generator, n: int, sampling_rate: int, slope: float) -> np.ndarray:
    """Coloured noise with RMS 1: f32[n]."""
    noise = rng.standard_normal(n, dtype=np.float32)
    if slope:
        size = scipy.fft.next_fast_len(n, real=True)
        spectrum = scipy.fft.rfft(noise, size) * _colour(size, sampling_rate, slope)
        noise = scipy.fft.irfft(spectrum, size)[:n]
    return noise / np.sqrt(np.mean(noise**2))


def render_scene(plan: ScenePlan, source: recordings.Recordings | None = None) -> np.ndarray:
    """The waveform of a plan: f32[n, channels], peak at most 0.98. Deterministic."""
    rate, scene = plan.sampling_rate, plan.scene
    n = round(scene.duration_s * rate)
    wave = np.zeros((n, plan.channels), np.float32)
    for i, (event, level) in enumerate(zip(scene.events, plan.event_db, strict=True)):
        rng = np.random.default_rng((*plan.seed, i))
        if event.label in sounds.LIBRARY:
            sound = sounds.synthesize(event.label, rng, scene.split, event.duration_s, rate)
        else:
            assert source is not None
            excerpt = source.excerpt(event.label, rng, scene.split, event.duration_s, rate)
            sound = sounds.finish(excerpt, rate)
        begin = round(event.start_s * rate)
        sound = sound[: n - begin] * (10 ** (level / 20) / sounds.RMS)
        pan = rng.uniform(0.7, 1.3)
        gains = (1.0,) if plan.channels == 1 else (pan, 2 - pan)
        wave[begin : begin + len(sound)] += sound[:, None] * np.array(gains, np.float32)
    if plan.noise_kind:
        rng = np.random.default_rng((*plan.seed, 1_000))
        noise = _noise(rng, n, rate, NOISE_SLOPES[plan.noise_kind])
        wave += (noise * 10 ** (plan.noise_db / 20))[:, None].astype(np.float32)
    return wave * min(1.0, 0.98 / max(float(np.abs(wave).max()), 1e-9))


def _write_chunk(root: Path, plans: list[ScenePlan], source: recordings.Recordings | None) -> int:
    """Render what is not there yet; a file appears under its name only when it is complete."""
    written = 0
    for plan in plans:
        path = root / plan.scene.audio_path
        if path.exists():
            continue
        # What a kill leaves of it is written over: the scene is still missing.
        part = path.with_name(f".{path.name}.part")
        form = path.suffix[1:].upper()
        soundfile.write(part, render_scene(plan, source), plan.sampling_rate, "PCM_16", format=form)
        part.replace(path)
        written += 1
    return written


def _check_stamp(stamp: Path, made_from: Mapping[str, Any]) -> None:
    """Raises ValueError if the scenes there were made from something else, or if nobody can tell."""
    if not stamp.exists():
        return
    try:
        there = json.loads(stamp.read_text())
    except ValueError:
        there = None
    if not isinstance(there, dict):
        raise ValueError(
            f"{stamp} is damaged, so what its scenes were made from is not known; "
            f"restore it, or give another root or remove {stamp.parent}"
        )
    names = dict.fromkeys([*made_from, *there])
    changed = [name for name in names if made_from.get(name) != there.get(name)]
    if changed == ["recordings"]:
        raise ValueError(
            f"{stamp} was made with other recordings than {made_from['recordings_root']} now holds for its classes; "
            f"restore them, or give another root or remove {stamp.parent}"
        )
    if changed:
        raise ValueError(
            f"{stamp} was made by another config (scenes.{changed[0]} differs); "
            f"give another root or remove {stamp.parent}"
        )


def _check_recordings(config: SceneConfig, source: recordings.Recordings) -> None:
    """Every class that is not synthetic needs a recording in each split that has scenes."""
    splits = [split for split, count in config.counts.items() if count]
    usable = source.labels(splits)
    lacking = [name for name in config.recorded_classes if name not in usable]
    if lacking:
        each = "; ".join(f"{name!r} ({source.describe(name)})" for name in lacking)
        raise ValueError(
            f"scenes.classes: not in the sound library, and without recordings in each of {splits} under "
            f"{config.recordings_root}: {each}; take them out or add recordings; usable: {usable}"
        )


def write_scenes(
    config: SceneConfig,
    root: Path,
    num_processes: int = 2,
    progress: Callable[[int, int], None] | None = None,
    max_bad_fraction: float = 0.02,
) -> dict[str, int]:
    """Write all scenes and labels under `root`, skipping audio files that exist.

    Args:
      progress: called with (scenes done, scenes in all) now and then.
      max_bad_fraction: share of the recordings of the config's classes that may be unusable; they are left out and
        named in `skipped_recordings.jsonl`.

    Returns:
      {"written": files rendered now, "kept": files that were there}.

    Raises:
      ValueError: no scene is asked for, `root` holds scenes that another config or other recordings made, too many
        recordings are unusable, or a class lacks some.
    """
    if not any(config.counts.values()):
        raise ValueError("scenes.counts asks for no scene; give one split or more a number above 0")
    made_from, source = config.fingerprint(), None
    if config.recordings_root:
        source = recordings.Recordings.load(Path(config.recordings_root), config.recorded_classes)
        made_from["recordings"] = source.digest
    root.mkdir(parents=True, exist_ok=True)
    stamp = root / "scenes.json"
    _check_stamp(stamp, made_from)
    plans = []
    for split, count in config.counts.items():
        (root / "audio" / split).mkdir(parents=True, exist_ok=True)
        plans += [plan_scene(config, split, i) for i in range(count)]
    missing = [plan for plan in plans if not (root / plan.scene.audio_path).exists()]
    if source and missing:
        source, left_out = source.usable(max_bad_fraction, num_processes)
        write_jsonl(root / SKIPPED_RECORDINGS, left_out)
        _check_recordings(config, source)
    with _whole(stamp) as file:
        file.write(json.dumps(made_from, indent=1))
    chunks = [missing[i : i + RENDER_CHUNK] for i in range(0, len(missing), RENDER_CHUNK)]
    done = len(plans) - len(missing)
    if num_processes > 1 and len(chunks) > 1:
        # Spawned, not forked: the caller may already run threads of an accelerator library.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(num_processes, context) as pool:
            jobs = [pool.submit(_write_chunk, root, chunk, source) for chunk in chunks]
            for job in concurrent.futures.as_completed(jobs):
                done += job.result()
                if progress:
                    progress(done, len(plans))
    else:
        for chunk in chunks:
            done += _write_chunk(root, chunk, source)
            if progress:
                progress(done, len(plans))
    _write_labels(config, root, plans)
    return {"written": len(missing), "kept": len(plans) - len(missing)}


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[IO[str]]:
    """A text file to write, which appears under its name only when it is complete."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", newline="") as file:
        yield file
    part.replace(path)


def _write_labels(config: SceneConfig, root: Path, plans: list[ScenePlan]) -> None:
    for split in config.counts:
        mine = [plan for plan in plans if plan.scene.split == split]
        with _whole(root / f"audioset_{split}_strong.tsv") as file:
            rows = csv.writer(file, delimiter="\t", lineterminator="\n")
            rows.writerow(["segment_id", "start_time_seconds", "end_time_seconds", "label"])
            for plan in mine:
                for event in plan.scene.events:
                    times = f"{event.start_s:.3f}", f"{event.end_s:.3f}"
                    rows.writerow([plan.scene.id, *times, mid_of(event.label)])
        with _whole(root / f"recordings_{split}.tsv") as file:
            rows = csv.writer(file, delimiter="\t", lineterminator="\n")
            rows.writerow(
                ["segment_id", "file", "duration_seconds", "sampling_rate", "channels", "origin"]
            )
            for plan in mine:
                scene, form = plan.scene, (plan.sampling_rate, plan.channels)
                rows.writerow([scene.id, scene.audio_path, scene.duration_s, *form, scene.source])
    with _whole(root / "mid_to_display_name.tsv") as file:
        rows = csv.writer(file, delimiter="\t", lineterminator="\n")
        rows.writerows([mid_of(name), name] for name in config.class_names)


def read_scenes(root: Path, split: str) -> list[Scene]:
    """Read the labelled scenes of a split back from the TSV files.

    Raises:
      ValueError: a file is missing, or a row does not parse; the message names file and line.
    """
    names = {row[0]: row[1] for _, row in _rows(root / "mid_to_display_name.tsv", 2)}
    events: dict[str, list[Event]] = {}
    path = root / f"audioset_{split}_strong.tsv"
    for number, (segment, start, end, mid) in _rows(path, 4, header=True):
        try:
            event = Event(float(start), float(end), names[mid])
        except (ValueError, KeyError):
            raise ValueError(f"{path}:{number}: bad time or unknown label {mid!r}") from None
        events.setdefault(segment, []).append(event)
    scenes = []
    path = root / f"recordings_{split}.tsv"
    for number, (segment, file, duration, _, _, origin) in _rows(path, 6, header=True):
        try:
            length = float(duration)
        except ValueError:
            raise ValueError(f"{path}:{number}: bad duration {duration!r}") from None
        timed = sorted(events.get(segment, []), key=lambda event: (event.start_s, event.end_s))
        scenes.append(Scene(segment, file, length, tuple(timed), split, origin))
    return scenes


def _rows(path: Path, width: int, header: bool = False) -> Iterator[tuple[int, list[str]]]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; make the scenes first (python -m data.build)")
    with path.open(newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t"), 1):
            if len(row) != width:
                raise ValueError(f"{path}:{number}: expected {width} columns, got {len(row)}")
            if not (header and number == 1):
                yield number, row
