"""Asks a model questions: a stream through the rows of the interleaved sampler, resumable after a kill."""

import dataclasses
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from data import pipeline
from data.audio_files import AudioFileError
from data.audio_store import AudioStore
from data.records import EaqaRecord
from echo_jax import huggingface, ranges
from echo_jax.arrays import Params
from echo_jax.model import frontend
from echo_jax.model.config import ThinkerConfig
from echo_jax.sampler import (
    Answer,
    FinishReason,
    Prompts,
    Request,
    Rollout,
    Sampler,
    SamplingOptions,
    stream,
)
from echo_jax.text import prompts as prompts_lib
from echo_jax.text import segments
from echo_jax.text.tokenizer import Tokenizer
from eval import controls, results
from eval.questions import QuestionSet
from eval.responses import Response, ResponseLog
from eval.results import Sample

# Lengths to which prompts are padded: the longest of a group, its half and so on, each of them a compiled prefill.
PROMPT_MULTIPLE = 16
LEAST_PROMPT = 64
FINISH_NAMES = {
    FinishReason.END: "end",
    FinishReason.TOKEN_BUDGET: "token_budget",
    FinishReason.TURN_LIMIT: "turn_limit",
}


class Answerer(Protocol):
    """What a run needs of a sampler: answers to a group of questions, as they finish."""

    def __call__(self, requests: Iterable[Request], group: "PlannedGroup") -> Iterable[Answer]:
        """Answers each request once."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to ask; the fields are those of `configs/eval.py`.

    Attributes:
        prompts: format -> name of the prompt preset.
        batch_size: answers in the making at a time.
        refill: questions that are prefilled together; 0 for an eighth of the batch.
        clip_seconds: capacities for recordings, ascending; each is one compiled program.
        max_bad_fraction: share of the questions whose recording may be unusable before the run
            stops.
    """

    format: str
    control: str
    seed: int
    prompts: Mapping[str, str]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    max_turns: int
    max_response_tokens: int
    insertion_slots: int
    insertion_patience: int
    segment_seconds: tuple[float, ...]
    batch_size: int
    refill: int
    clip_seconds: tuple[float, ...]
    max_bad_fraction: float

    def __post_init__(self) -> None:
        controls.get(self.control, self.format)
        prompts_lib.preset(self.prompt)
        ranges.check("batch_size", self.batch_size, ranges.COUNT)
        ranges.check("refill", self.refill, ranges.Range(least=0, most=self.batch_size, whole=True))
        if not self.clip_seconds or list(self.clip_seconds) != sorted(set(self.clip_seconds)):
            raise ValueError(f"clip_seconds must be ascending, got {self.clip_seconds}")
        ranges.check("max_bad_fraction", self.max_bad_fraction, ranges.SHARE)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Takes the fields from a config; the config may hold more."""
        fields = {field.name: config[field.name] for field in dataclasses.fields(cls)}
        fields["prompts"] = dict(fields["prompts"])
        for name in ("segment_seconds", "clip_seconds"):
            fields[name] = tuple(float(value) for value in fields[name])
        return cls(**fields)

    @property
    def prompt(self) -> str:
        """Name of the prompt preset of the format."""
        return self.prompts[self.format]

    @property
    def sampling(self) -> SamplingOptions:
        """The sampler's options."""
        insert = self.format == "interleaved" and controls.CONTROLS[self.control].inserts
        return SamplingOptions(
            max_response_tokens=self.max_response_tokens,
            max_turns=self.max_turns,
            insert_audio=insert,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            insertion_slots=self.insertion_slots,
            insertion_patience=self.insertion_patience,
            segment_seconds=self.segment_seconds,
        )

    def deciding(self) -> dict[str, Any]:
        """The fields that decide what is answered; the others decide how fast."""
        names = ("format", "control", "seed", "prompt", "temperature", "top_k", "top_p", "min_p")
        return {name: getattr(self, name) for name in (*names, "max_turns", "max_response_tokens")}


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint in memory: `sha256` is of all files of its directory that decide answers."""

    path: Path
    config: ThinkerConfig
    params: Params
    tokenizer: Tokenizer
    sha256: str

    @classmethod
    def load(cls, checkpoint: str) -> "Model":
        """Reads a model directory, a finished workdir, or a repository id.

        Raises:
            FileNotFoundError, ValueError, KeyError: there is no complete model; one line.
        """
        path = huggingface.resolve(checkpoint)
        tokenizer = Tokenizer.from_directory(path)
        config, params = huggingface.load_pretrained(path)
        digest = hashlib.sha256()
        for file in sorted(path.iterdir()):
            if file.suffix in (".safetensors", ".json", ".txt"):
                digest.update(file.name.encode())
                with file.open("rb") as stream:
                    while block := stream.read(1 << 20):
                        digest.update(block)
        return cls(path, config, jax.device_put(params), tokenizer, digest.hexdigest())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run: its figures, its scored answers, and where they are."""

    results: dict[str, Any]
    samples: list[Sample]
    output: Path


class Runner:
    """Runs models and controls over one question set, sharing decoded audio and compiled programs.

    Example:
        runner = Runner(questions.load(data, "test"))
        outcome = runner.run(Model.load(checkpoint), settings, output)
    """

    def __init__(self, question_set: QuestionSet, report: Callable[[str], None] = print):
        """Args: question_set: what to ask; report: takes progress lines."""
        self.question_set = question_set
        self._report = report
        # Bad files are judged by this room's own limit, over questions.
        self.store = AudioStore(question_set.audio_root, max_bad=len(question_set.records))
        self._samplers: dict[Any, Sampler] = {}

    def run(self, model: Model, settings: Settings, output: Path) -> Outcome:
        """Asks every question that has no answer in `output` yet, then scores all of them.

        Writes `responses.jsonl` as answers come, and at the end `samples.jsonl`, `results.json` and
        `timing.json`. Samples and results are the same whether or not the run was interrupted.

        Raises:
            ValueError: a setting does not fit the data or the model, `output` holds another run, or
                too many recordings are unusable.
        """
        sampler = self._sampler(model, settings)
        compiled = len(sampler.programs)

        def answerer(requests: Iterable[Request], group: PlannedGroup) -> Iterator[Answer]:
            return stream(
                sampler,
                model.params,
                requests,
                rows=settings.batch_size,
                prompt_tokens=group.prompt_tokens,
                samples=group.samples,
                refill=settings.refill or None,
            )

        facts = {"model": str(model.path), "model_sha256": model.sha256}
        outcome = self.ask(answerer, model.tokenizer, settings, output, facts)
        new = sampler.programs[compiled:]
        self._report(f"compiled {len(new)} programs" + "".join(f"\n  {name}" for name in new))
        return outcome

    def ask(
        self,
        answerer: Answerer,
        tokenizer: Tokenizer,
        settings: Settings,
        output: Path,
        facts: Mapping[str, str],
    ) -> Outcome:
        """`run` with any sampler.

        Args:
            answerer: answers requests, in any order.
            tokenizer: its vocabulary.
            settings: how to ask.
            output: folder of the run.
            facts: `model`, for people, and `model_sha256`, which tells runs apart.
        """
        identity = {
            **settings.deciding(),
            "model_sha256": facts["model_sha256"],
            "questions_sha256": self.question_set.sha256,
        }
        log = ResponseLog(output / "responses.jsonl", identity)
        planned = list(plan(self.question_set.records, tokenizer, settings))
        skipped = [dict(row) for row in self.question_set.unaskable]
        for row in skipped:
            self._report(f"not asked: {row['id']}: {row['reason']}")
        self._check_skipped(skipped, settings)
        began, asked_before = time.monotonic(), len(log.responses)
        for group in planned:
            for response in self._answers(answerer, group, tokenizer, settings, log, skipped):
                log.add([response])
                if (len(log.responses) - asked_before) % settings.batch_size == 0:
                    self._progress(log, len(skipped), asked_before, began)
        if (len(log.responses) - asked_before) % settings.batch_size:
            self._progress(log, len(skipped), asked_before, began)
        seconds = time.monotonic() - began
        answered_now = len(log.responses) - asked_before
        samples = [
            results.make_sample(record, log.responses[record.id])
            for record in self.question_set.records
            if record.id in log.responses
        ]
        found = {
            "task": self.question_set.name,
            **results.summarize(samples, sorted(skipped, key=lambda skip: skip["id"])),
            "unusable_at_build": [dict(row) for row in self.question_set.unusable_at_build],
            "run": identity,
            "model": facts["model"],
            "control": controls.CONTROLS[settings.control].description,
            "settings": dataclasses.asdict(settings),
            "versions": versions(),
        }
        _write(output / "samples.jsonl", "".join(json.dumps(s) + "\n" for s in samples))
        _write(output / "results.json", json.dumps(found, indent=2, sort_keys=True) + "\n")
        timing = {
            "seconds": round(seconds, 3),
            "answers": answered_now,
            "answers_per_s": round(answered_now / seconds, 3) if answered_now else None,
        }
        _write(output / "timing.json", json.dumps(timing, indent=2) + "\n")
        return Outcome(found, samples, output)

    def _sampler(self, model: Model, settings: Settings) -> Sampler:
        spelling = hashlib.sha256(repr(model.tokenizer.token_bytes).encode()).digest()
        key = (model.config, spelling, settings.sampling)
        if key not in self._samplers:
            self._samplers[key] = Sampler(model.config, model.tokenizer, settings.sampling)
        return self._samplers[key]

    def _answers(
        self,
        answerer: Answerer,
        group: "PlannedGroup",
        tokenizer: Tokenizer,
        settings: Settings,
        log: ResponseLog,
        skipped: list[dict[str, str]],
    ) -> Iterator[Response]:
        """Asks what of a group has no response yet; recordings are read as rows become free."""
        asked: list[tuple[str, int]] = []

        def requests() -> Iterator[Request]:
            for record, chat in zip(group.records, group.chats, strict=True):
                if record.id in log.responses:
                    continue
                wave = self._read(record, skipped, settings)
                if wave is not None:
                    asked.append((record.id, len(wave)))
                    yield make_request(record, chat, wave, settings)

        for answer in answerer(requests(), group):
            yield _response(*asked[answer.index], answer.rollout, tokenizer)

    def _read(
        self, record: EaqaRecord, skipped: list[dict[str, str]], settings: Settings
    ) -> np.ndarray | None:
        """Returns the recording of a question; names one that cannot be used."""
        wanted = pipeline.num_samples_of(record.duration_s)
        try:
            wave = self.store.read(record.audio_path, record.duration_s, record.duration_s)
        except AudioFileError as error:
            skipped.append(
                {"id": record.id, "audio_path": record.audio_path, "reason": error.reason}
            )
            self._report(f"not asked: {record.id}: {error}")
            self._check_skipped(skipped, settings)
            return None
        fitted = np.zeros(wanted, np.float32)
        fitted[: len(wave)] = wave[:wanted]
        return fitted

    def _check_skipped(self, skipped: Sequence[Mapping[str, str]], settings: Settings) -> None:
        total = len(self.question_set.records) + len(self.question_set.unaskable)
        if len(skipped) > settings.max_bad_fraction * total:
            raise ValueError(
                f"{len(skipped)} of {total} questions cannot be asked, more than "
                f"max_bad_fraction={settings.max_bad_fraction:g} allows; the first is "
                f"{skipped[0]['id']}: {skipped[0]['audio_path']} ({skipped[0]['reason']})"
            )

    def _progress(self, log: ResponseLog, num_skipped: int, before: int, began: float) -> None:
        # Scored anew each time: thousands of short texts take milliseconds, a batch takes seconds.
        scored = [
            results.make_sample(record, log.responses[record.id])
            for record in self.question_set.records
            if record.id in log.responses
        ]
        found = results.summarize(scored, [])
        rate = (len(scored) - before) / max(time.monotonic() - began, 1e-9)
        total = len(self.question_set.records) + len(self.question_set.unaskable)
        left = total - num_skipped - len(scored)
        self._report(
            f"answered {len(scored)}/{total}  accuracy "
            f"{100 * found['accuracy']:.1f} %  parsed {100 * found['parse_rate']:.1f} %  "
            f"{rate:.2f} answers/s  ETA {left / rate:.0f} s"
        )


# ---------------------------------------------------------------- questions


@dataclasses.dataclass(frozen=True)
class PlannedGroup:
    """Questions whose recordings share a capacity, those with similar prompts side by side.

    Attributes:
        records: the questions.
        chats: their encoded prompts.
        prompt_tokens: capacities for prompts, ascending.
        samples: capacity for a recording.
    """

    records: tuple[EaqaRecord, ...]
    chats: tuple[prompts_lib.EncodedChat, ...]
    prompt_tokens: tuple[int, ...]
    samples: int


def plan(
    records: Sequence[EaqaRecord], tokenizer: Tokenizer, settings: Settings
) -> Iterator[PlannedGroup]:
    """Groups questions of similar length; the plan depends on the questions and settings alone.

    Raises:
        ValueError: a recording is longer than the last of `clip_seconds`, or too short for a token.
    """
    groups: dict[int, list[tuple[EaqaRecord, prompts_lib.EncodedChat]]] = {}
    split_tags = prompts_lib.preset(settings.prompt).split_tags
    capacities = [
        pipeline.num_samples_of(seconds) // frontend.HOP_SAMPLES * frontend.HOP_SAMPLES
        for seconds in settings.clip_seconds
    ]
    for record in records:
        samples = pipeline.num_samples_of(record.duration_s)
        capacity = next((c for c in capacities if samples <= c), None)
        if capacity is None:
            raise ValueError(
                f"question {record.id!r}: {record.audio_path} has {record.duration_s:g} s, more than "
                f"the last of clip_seconds={settings.clip_seconds}; add a longer one"
            )
        messages = pipeline.prompt_messages(record, settings.prompt)
        try:
            chat = prompts_lib.encode_chat(tokenizer, messages, True, split_tags)
        except ValueError as error:
            raise ValueError(f"question {record.id!r}: {record.audio_path}: {error}") from None
        groups.setdefault(capacity, []).append((record, chat))
    for capacity, group in sorted(groups.items()):
        group.sort(key=lambda pair: len(pair[1].tokens))
        lengths = [-(-len(group[-1][1].tokens) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE]
        while lengths[0] // 2 >= LEAST_PROMPT:
            lengths.insert(0, -(-lengths[0] // 2 // PROMPT_MULTIPLE) * PROMPT_MULTIPLE)
        yield PlannedGroup(
            tuple(record for record, _ in group),
            tuple(chat for _, chat in group),
            tuple(lengths),
            capacity,
        )


def make_request(
    record: EaqaRecord, chat: prompts_lib.EncodedChat, wave: np.ndarray, settings: Settings
) -> Request:
    """What the sampler is asked; the control is applied, and a question's randomness is its own."""
    # Whole mel frames, as the sampler wants them.
    waveform = np.zeros(
        (1, -(-len(wave) // frontend.HOP_SAMPLES) * frontend.HOP_SAMPLES), np.float32
    )
    waveform[0, : len(wave)] = wave
    prompts = Prompts(
        tokens=chat.tokens[None],
        length=np.array([len(chat.tokens)], np.int32),
        waveforms=waveform,
        num_samples=np.array([len(wave)], np.int32),
        audio_start=np.array([chat.audio_starts[0]], np.int32),
        # Always given, so that a control runs the very program of the run without it.
        insert_waveforms=waveform,
        insert_shift_samples=np.zeros(1, np.int32),
    )
    number = _number(record.id)
    prompts = controls.CONTROLS[settings.control].apply(prompts, np.array([number], np.uint32))
    return Request(prompts, jax.random.fold_in(jax.random.key(settings.seed), number))


def _number(question_id: str) -> int:
    """A number of 31 bits that depends on the question's id alone."""
    return int.from_bytes(hashlib.sha256(question_id.encode()).digest()[:4], "big") >> 1


def _response(
    question_id: str, num_samples: int, rollout: Rollout, tokenizer: Tokenizer
) -> Response:
    """Reads the one row of a rollout."""
    begin, end = int(rollout.prompt_length[0]), int(rollout.length[0])
    sampled = np.asarray(rollout.sampled[0, begin:end])
    text = tokenizer.decode(np.asarray(rollout.tokens[0, begin:end])[sampled])
    clips = np.asarray(rollout.segment_samples[0, : int(rollout.num_segments[0])])
    return {
        "id": question_id,
        "text": text,
        "segments": [_segment(found) for found in segments.parse(text, num_samples)],
        "inserted": (clips / frontend.SAMPLE_RATE).tolist(),
        "num_tokens": int(sampled.sum()),
        "num_audio_tokens": int((~sampled).sum()),
        "finish_reason": FINISH_NAMES[FinishReason(int(rollout.finish_reason[0]))],
    }


def _segment(citation: segments.Citation) -> dict[str, Any]:
    """A citation as JSON; the times of one with readable times are those of its clip."""
    start_s, end_s = citation.start_s, citation.end_s
    if citation.valid and citation.samples is not None:
        start_s, end_s = (sample / frontend.SAMPLE_RATE for sample in citation.samples)
    return {
        "start_s": start_s,
        "end_s": end_s,
        "begin": citation.begin,
        "end": citation.end,
        "valid": citation.valid,
        "reason": citation.reason.name.lower(),
    }


# ---------------------------------------------------------------- files


def versions() -> dict[str, str]:
    """Returns the versions of what computes the answers."""
    names = ("echo-jax", "jax", "jaxlib", "numpy", "librosa", "soundfile")
    found = {"backend": jax.default_backend()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _write(path: Path, text: str) -> None:
    """Writes a file that appears only when it is complete."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
