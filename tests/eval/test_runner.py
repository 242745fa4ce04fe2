import json

import jax
import numpy as np
import pytest
import soundfile

from echo_jax.sampler import Answer, FinishReason, Rollout
from eval import controls, questions, runner
from eval.runner import Runner
from tests.eval.examples import released_row

FACTS = {"model": "fake", "model_sha256": "0"}


class Killed(Exception):
    """Stands for SIGKILL."""


class FakeSampler:
    """Cites 0.5 to 1.5 s and answers by a draw from the question's own key; remembers what it was asked.

    Answers come in another order than the questions, as they do from rows of different length.
    """

    def __init__(self, tokenizer, kill_at=None):
        self.tokenizer, self.kill_at = tokenizer, kill_at
        self.asked, self.groups = [], []

    def __call__(self, requests, group):
        self.groups.append(group)
        requests = list(enumerate(requests))
        for index, request in requests[1::2] + requests[::2]:
            if self.kill_at == len(self.asked):
                raise Killed
            self.asked.append(request.prompts)
            yield Answer(index, 0, self._rollout(request))

    def _rollout(self, request):
        prompts = request.prompts
        drawn = int(jax.random.randint(request.key, (), 0, 2))
        said = self.tokenizer.encode("<think>at <seg>0.5, 1.5</seg>")
        audio = [
            self.tokenizer.audio_bos_id,
            self.tokenizer.audio_id,
            self.tokenizer.audio_eos_id,
        ]
        rest = self.tokenizer.encode(f" so.</think><answer>{['a bell', 'a dog'][drawn]}</answer>")
        response = [*said, *audio, *rest, self.tokenizer.im_end_id]
        tokens = np.append(prompts.tokens, np.array([response], np.int32), axis=1)
        begin = int(prompts.length[0])
        sampled = np.arange(tokens.shape[1])[None] >= begin
        sampled[0, begin + len(said) : begin + len(said) + 3] = False
        zeros = np.zeros(tokens.shape, np.float32)
        return Rollout(
            tokens=tokens,
            prompt_length=prompts.length,
            length=np.array([tokens.shape[1]]),
            logprob=zeros,
            model_logprob=zeros,
            sampled=sampled,
            stop_rest=zeros - 1,
            stop_reason=zeros - 1,
            segment_samples=np.tile(np.array([[[8_000, 24_000]]], np.int32), (1, 7, 1)),
            segment_token_start=np.zeros((1, 7), np.int32),
            num_segments=np.ones(1, np.int32),
            finish_reason=np.full(1, FinishReason.END, np.int32),
            num_turns=np.full(1, 2, np.int32),
            num_decode_steps=np.int32(1),
            num_insert_steps=np.int32(1),
        )


@pytest.fixture
def quiet(data):
    def make():
        return Runner(questions.load(data, "test"), report=lambda line: None)

    return make


def test_answers_are_read_and_scored(quiet, tokenizer, settings, tmp_path):
    fake = FakeSampler(tokenizer)
    outcome = quiet().ask(fake, tokenizer, settings(), tmp_path / "out", FACTS)
    sample = outcome.samples[0]
    assert sample["text"].startswith("<think>at <seg>0.5, 1.5</seg> so.</think><answer>a ")
    assert sample["segments"] == [
        {"start_s": 0.5, "end_s": 1.5, "begin": 10, "end": 29, "valid": True, "reason": "valid"}
    ]
    assert sample["inserted"] == [[0.5, 1.5]]
    assert sample["num_audio_tokens"] == 3
    assert sample["iou"] == pytest.approx(1.0)
    assert sample["finish_reason"] == "end"
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["num_questions"] == 11
    assert found["parse_rate"] == 1.0
    assert found["num_correct"] == sum(s["correct"] for s in outcome.samples)
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"q{i}" for i in range(11)]


def test_every_question_has_its_own_recording(quiet, tokenizer, settings, tmp_path):
    fake = FakeSampler(tokenizer)
    one = quiet()
    outcome = one.ask(fake, tokenizer, settings(), tmp_path / "out", FACTS)
    assert len(fake.asked) == len(outcome.samples) == 11
    (group,) = fake.groups
    for prompts in fake.asked:
        span = prompts.tokens[0, prompts.audio_start[0] :]
        assert span[0] == tokenizer.audio_id
        assert prompts.tokens[0, prompts.audio_start[0] - 1] == tokenizer.audio_bos_id
        prompts.check()
        assert prompts.tokens.shape[1] <= group.prompt_tokens[-1]
        assert prompts.waveforms.shape[1] <= group.samples
    waves = [one.store.read(f"audio/{i}.wav") for i in range(11)]
    for wave in waves:
        assert (
            sum(
                prompts.num_samples[0] == len(wave)
                and np.array_equal(prompts.waveforms[0, : len(wave)], wave)
                for prompts in fake.asked
            )
            >= 1
        )


def test_an_answer_does_not_depend_on_batch_size_or_neighbours(
    quiet, tokenizer, settings, tmp_path
):
    texts = []
    for size in (1, 4, 16):
        fake = FakeSampler(tokenizer)
        out = tmp_path / str(size)
        outcome = quiet().ask(fake, tokenizer, settings(batch_size=size), out, FACTS)
        texts.append({s["id"]: s["text"] for s in outcome.samples})
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0].values())) == 2
    other = quiet().ask(FakeSampler(tokenizer), tokenizer, settings(seed=1), tmp_path / "s", FACTS)
    assert {s["id"]: s["text"] for s in other.samples} != texts[0]


@pytest.mark.parametrize("torn", [0, 40])
def test_a_killed_run_goes_on_and_ends_with_the_same_files(
    quiet, tokenizer, settings, tmp_path, torn
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    quiet().ask(FakeSampler(tokenizer), tokenizer, settings(), whole, FACTS)
    with pytest.raises(Killed):
        quiet().ask(FakeSampler(tokenizer, kill_at=8), tokenizer, settings(), cut, FACTS)
    log = cut / "responses.jsonl"
    if torn:
        log.write_bytes(log.read_bytes()[:-torn])
    again = FakeSampler(tokenizer)
    quiet().ask(again, tokenizer, settings(), cut, FACTS)
    # 8 of 11 were answered; a torn line costs its own question and no other.
    assert len(again.asked) == (4 if torn else 3)
    for name in ("results.json", "samples.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    done = FakeSampler(tokenizer)
    quiet().ask(done, tokenizer, settings(), cut, FACTS)
    assert done.asked == []


def test_more_questions_can_be_asked_into_the_same_folder(data, tokenizer, settings, tmp_path):
    everything = questions.load(data, "test")
    fake = FakeSampler(tokenizer)
    for limit, answered in ((5, 5), (0, 11)):
        one = Runner(everything.limited(limit), report=lambda line: None)
        outcome = one.ask(fake, tokenizer, settings(), tmp_path / "out", FACTS)
        assert outcome.results["num_answered"] == answered
    assert len(fake.asked) == 11


def test_another_setting_is_another_run(quiet, tokenizer, settings, tmp_path):
    fake = FakeSampler(tokenizer)
    quiet().ask(fake, tokenizer, settings(), tmp_path, FACTS)
    for changes, name in (({"seed": 1}, "seed"), ({"control": "silence"}, "control")):
        with pytest.raises(ValueError, match=f"another run \\({name} was"):
            quiet().ask(fake, tokenizer, settings(**changes), tmp_path, FACTS)
    # What only decides the speed is not.
    quiet().ask(fake, tokenizer, settings(batch_size=2, insertion_slots=1), tmp_path, FACTS)


def test_broken_recordings_are_named_and_count_as_wrong(data, tokenizer, settings, tmp_path):
    (data.parent / "audio" / "2.wav").write_bytes(b"RIFF")
    (data.parent / "audio" / "4.wav").unlink()
    soundfile.write(data.parent / "audio" / "6.wav", np.ones(16_000), 16_000)
    soundfile.write(data.parent / "audio" / "10.wav", np.ones(80_000), 16_000)
    cut = data.parent / "audio" / "8.wav"
    cut.write_bytes(cut.read_bytes()[:-2])
    said = []
    one = Runner(questions.load(data, "test"), report=said.append)
    found = one.ask(FakeSampler(tokenizer), tokenizer, settings(), tmp_path / "out", FACTS).results
    assert found["num_questions"] == 11
    assert found["num_answered"] == 6
    assert {(s["id"], s["reason"]) for s in found["skipped"]} == {
        ("q2", "unreadable"),
        ("q4", "missing"),
        ("q6", "truncated"),
        ("q8", "truncated"),
        ("q10", "overlong"),
    }
    assert found["accuracy"] == pytest.approx(found["num_correct"] / 11)
    assert sum("not asked: q" in line for line in said) == 5
    with pytest.raises(ValueError, match=r"1 of 11 questions cannot be asked.*\d.wav"):
        one.ask(
            FakeSampler(tokenizer), tokenizer, settings(max_bad_fraction=0.0), tmp_path / "b", FACTS
        )


def test_rows_that_give_no_question_count_as_wrong(data, tokenizer, settings, tmp_path):
    rows = [released_row(number) for number in (1, 2, 77, 88)]
    path = data.parent / "released.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = Runner(questions.load(path, "test"), report=lambda line: None)
    found = one.ask(FakeSampler(tokenizer), tokenizer, settings(), tmp_path / "out", FACTS).results
    assert (found["num_questions"], found["num_answered"], found["num_skipped"]) == (4, 2, 2)
    assert {skip["id"] for skip in found["skipped"]} == {"r77", "r88"}
    assert found["accuracy"] == found["num_correct"] / 4
    fake = FakeSampler(tokenizer)
    with pytest.raises(ValueError, match=r"2 of 4 questions cannot be asked.*r77"):
        one.ask(fake, tokenizer, settings(max_bad_fraction=0.4), tmp_path / "b", FACTS)
    assert not fake.asked


def test_controls_change_what_is_heard_and_nothing_else(quiet, tokenizer, settings, tmp_path):
    seen = {}
    for name in controls.CONTROLS:
        fake = FakeSampler(tokenizer)
        quiet().ask(fake, tokenizer, settings(control=name), tmp_path / name, FACTS)
        seen[name] = fake.asked
    for name, asked in seen.items():
        for prompts, plain in zip(asked, seen["none"], strict=True):
            for field in ("tokens", "length", "num_samples", "audio_start"):
                np.testing.assert_array_equal(getattr(prompts, field), getattr(plain, field))
            # The same structure and shapes, so that a control runs the same compiled program.
            assert jax.tree.structure(prompts) == jax.tree.structure(plain)
            if name != "no_audio":
                np.testing.assert_array_equal(prompts.waveforms, plain.waveforms)
    for plain in seen["none"]:
        np.testing.assert_array_equal(plain.insert_waveforms, plain.waveforms)
        assert not plain.insert_shift_samples.any()
    assert not any(prompts.insert_waveforms.any() for prompts in seen["silence"])
    assert not any(prompts.waveforms.any() for prompts in seen["no_audio"])
    assert not any(prompts.insert_waveforms.any() for prompts in seen["no_audio"])
    shifts = [
        float(prompts.insert_shift_samples[0] / prompts.num_samples[0])
        for prompts in seen["other_span"]
    ]
    assert all(0.24 <= shift < 0.76 for shift in shifts)
    assert len(set(shifts)) == 11
    assert settings(control="no_insertion").sampling.insert_audio is False
    assert settings().sampling.insert_audio is True
    assert settings(format="grounded").sampling.insert_audio is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "spoken"}, "unknown format 'spoken'"),
        ({"control": "noise"}, "unknown control 'noise'"),
        ({"format": "grounded", "control": "silence"}, "needs the format interleaved"),
        ({"prompts": {"interleaved": "large"}}, "unknown prompt preset 'large'"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number, at least 1"),
        ({"refill": 5}, r"refill=5 must be a whole number in \[0, 4\]"),
        ({"clip_seconds": (5.0, 2.0)}, "clip_seconds must be ascending"),
    ],
)
def test_settings_that_make_no_sense(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_a_recording_that_fits_nowhere_is_named(quiet, tokenizer, settings, tmp_path):
    with pytest.raises(ValueError, match=r"question 'q1': audio/1.wav has 2.25 s, more than"):
        quiet().ask(
            FakeSampler(tokenizer), tokenizer, settings(clip_seconds=(2.1,)), tmp_path, FACTS
        )


def test_recordings_of_similar_length_are_asked_together(data, tokenizer, settings):
    records = questions.load(data, "test").records
    groups = list(runner.plan(records, tokenizer, settings(clip_seconds=(2.1, 2.6))))
    assert sum(len(group.records) for group in groups) == len(records)
    assert [group.samples for group in groups] == [33_600, 41_600]
    for group, most, least in zip(groups, (2.1, 2.6), (0.0, 2.1), strict=True):
        assert all(least < record.duration_s <= most for record in group.records)
        lengths = [len(chat.tokens) for chat in group.chats]
        assert lengths == sorted(lengths)
        assert group.prompt_tokens[-1] - 16 < lengths[-1] <= group.prompt_tokens[-1]
        assert list(group.prompt_tokens) == sorted(set(group.prompt_tokens))
