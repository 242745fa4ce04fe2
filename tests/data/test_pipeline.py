from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from data import pipeline
from data.audio_store import AudioStore, TooManyBadFiles
from tests.data.conftest import CONFIG, LISTENING


def _stage(name, root, train_scenes, records, tokenizer, **fields):
    store = AudioStore(root)
    if name == "base":
        return pipeline.base_dataset(
            train_scenes,
            store,
            tokenizer,
            config=LISTENING,
            vocabulary=CONFIG.class_names,
            scene_seconds=8.0,
            naming_tokens=160,
            scene_tokens=304,
            **({"batch_size": 3} | fields),
        )
    make = pipeline.sft_dataset if name == "sft" else pipeline.prompt_dataset
    fields = {"prompt": "tiny", "batch_size": 4, "clip_seconds": 8.0} | fields
    return make(records, store, tokenizer, **fields)


def _check_clips(tokens, waveforms, num_samples, rows, starts, tokenizer):
    """Each used slot points at a run of <|AUDIO|> of the right length."""
    from echo_jax.model.frontend import num_audio_tokens

    for slot in np.flatnonzero(num_samples):
        n = int(num_audio_tokens(int(num_samples[slot])))
        row, start = tokens[rows[slot]], int(starts[slot])
        assert row[start - 1] == tokenizer.audio_bos_id
        assert (row[start : start + n] == tokenizer.audio_id).all()
        assert row[start + n] == tokenizer.audio_eos_id
        assert not waveforms[slot, num_samples[slot] :].any()
        assert np.std(waveforms[slot, : num_samples[slot]]) > 1e-4
    assert not waveforms[num_samples == 0].any()


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_chat_batches(stage, root, train_scenes, records, tokenizer):
    shapes = set()
    for batch in itertools.islice(_stage(stage, root, train_scenes, records, tokenizer), 6):
        shapes.add((batch["tokens"].shape, batch["waveforms"].shape))
        _check_clips(
            batch["tokens"],
            batch["waveforms"],
            batch["num_samples"],
            batch["clip_row"],
            batch["clip_start"],
            tokenizer,
        )
        assert batch["loss_mask"].sum(1).min() > 0
        target = batch["tokens"][batch["loss_mask"] > 0]
        assert tokenizer.im_end_id in target
        assert tokenizer.audio_id not in target
        assert tokenizer.pad_id not in target
    assert len(shapes) == (2 if stage == "base" else 1)


def test_sft_targets_spell_the_reasoning(root, train_scenes, records, tokenizer):
    by_id = {record.id: record for record in records}
    batch = next(iter(_stage("sft", root, train_scenes, records, tokenizer)))
    for row, name in enumerate(batch["ids"]):
        mask = batch["loss_mask"][row] > 0
        assert tokenizer.decode(batch["tokens"][row][mask]) == by_id[name].cot


def test_evaluation_sees_every_record_once_in_order(root, train_scenes, records, tokenizer):
    fields = {"epochs": 1, "shuffle": False, "batch_size": 5}
    batches = list(_stage("eval", root, train_scenes, records, tokenizer, **fields))
    assert [record for batch in batches for record in batch["records"]] == records
    last = batches[-1]
    assert last["prompt_tokens"].shape[0] == 5
    used = len(last["records"])
    np.testing.assert_array_equal(
        last["prompt_tokens"][used:], last["prompt_tokens"][[0] * (5 - used)]
    )
    for batch in batches:
        rows = np.arange(5)
        _check_clips(
            batch["prompt_tokens"],
            batch["waveforms"],
            batch["num_samples"],
            rows,
            batch["clip_start"],
            tokenizer,
        )


@pytest.mark.parametrize("stage", ["base", "sft", "rl"])
def test_a_restored_iterator_goes_on_exactly(stage, root, train_scenes, records, tokenizer):
    straight = iter(_stage(stage, root, train_scenes, records, tokenizer))
    for _ in range(4):
        next(straight)
    state = straight.get_state()
    restored = iter(_stage(stage, root, train_scenes, records, tokenizer))
    restored.set_state(state)
    for _ in range(7):
        one, two = next(straight), next(restored)
        for key, value in one.items():
            np.testing.assert_array_equal(value, two[key])


def test_epochs_are_shuffled_differently(root, train_scenes, records, tokenizer):
    dataset = _stage("sft", root, train_scenes, records, tokenizer, batch_size=1, epochs=2)
    order = [batch["ids"][0] for batch in dataset]
    first, second = order[: len(records)], order[len(records) :]
    assert sorted(first) == sorted(second) == sorted(record.id for record in records)
    assert first != second


def test_what_does_not_fit_is_named(root, train_scenes, records, tokenizer):
    with pytest.raises(pipeline.TooLong, match="raise the clip seconds"):
        next(iter(_stage("sft", root, train_scenes, records, tokenizer, clip_seconds=2.0)))
    with pytest.raises(pipeline.TooLong, match="do not fit max_tokens=64"):
        next(iter(_stage("sft", root, train_scenes, records, tokenizer, max_tokens=64)))
    bare = [dataclasses.replace(records[0], cot="")]
    with pytest.raises(ValueError, match="has no reasoning"):
        _stage("sft", root, train_scenes, bare, tokenizer)


def test_bad_files_are_skipped_until_there_are_too_many(root, records, tokenizer):
    gone = dataclasses.replace(records[0], audio_path="audio/train/gone.wav")
    store = AudioStore(root, max_bad=1)
    fields = {"prompt": "tiny", "batch_size": 2, "clip_seconds": 8.0}
    fields |= {"epochs": 1, "shuffle": False}
    batches = list(pipeline.prompt_dataset([gone, *records[1:4]], store, tokenizer, **fields))
    assert [record for batch in batches for record in batch["records"]] == records[1:4]
    assert store.bad == {"audio/train/gone.wav": "missing"}
    short = dataclasses.replace(records[1], duration_s=records[1].duration_s + 0.5)
    store = AudioStore(root, max_bad=1)
    list(pipeline.prompt_dataset([short, records[2]], store, tokenizer, **fields))
    assert store.bad == {short.audio_path: "truncated"}
    store = AudioStore(root, max_bad=1)
    other = dataclasses.replace(records[1], audio_path="audio/train/gone_too.wav")
    with pytest.raises(TooManyBadFiles, match="2 audio files"):
        list(pipeline.prompt_dataset([gone, other], store, tokenizer, **fields))
