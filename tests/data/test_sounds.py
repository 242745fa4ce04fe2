from __future__ import annotations

import itertools

import numpy as np
import pytest

from data import sounds


def test_library_has_groups_of_similar_classes():
    groups: dict[str, int] = {}
    for sound in sounds.LIBRARY.values():
        groups[sound.group] = groups.get(sound.group, 0) + 1
    assert len(sounds.LIBRARY) >= 14
    assert sum(size > 1 for size in groups.values()) >= 5
    assert len({sound.mid for sound in sounds.LIBRARY.values()}) == len(sounds.LIBRARY)


@pytest.mark.parametrize("name", sorted(sounds.LIBRARY))
def test_a_sound_is_finite_level_set_and_deterministic(name):
    for rate in (16_000, 44_100):
        wave = sounds.synthesize(name, np.random.default_rng(1), "train", 0.7, rate)
        again = sounds.synthesize(name, np.random.default_rng(1), "train", 0.7, rate)
        assert wave.dtype == np.float32
        assert len(wave) == round(0.7 * rate)
        assert np.isfinite(wave).all()
        assert np.sqrt(np.mean(wave**2)) == pytest.approx(sounds.RMS, rel=1e-3)
        np.testing.assert_array_equal(wave, again)


@pytest.mark.parametrize("name", sorted(sounds.LIBRARY))
def test_splits_never_share_a_parameter_value(name):
    values: dict[str, dict[str, set[float]]] = {}
    for split in sounds.SPLIT_BANDS:
        for seed in range(40):
            draw = sounds.Draw(np.random.default_rng(seed), split)
            sounds.LIBRARY[name].make(draw, 0.6, 16_000)
            assert draw.values
            for parameter, value in draw.values.items():
                values.setdefault(parameter, {}).setdefault(split, set()).add(value)
    for by_split in values.values():
        everything = [(value, split) for split, some in by_split.items() for value in some]
        everything.sort()
        span = everything[-1][0] - everything[0][0]
        for (low, one), (high, other) in itertools.pairwise(everything):
            if one != other:
                assert high - low > 0.003 * span


def test_most_energy_lies_below_the_lowest_nyquist_frequency():
    for name in sounds.LIBRARY:
        wave = sounds.synthesize(name, np.random.default_rng(0), "test", 0.8, 48_000)
        power = np.abs(np.fft.rfft(wave)) ** 2
        hz = np.fft.rfftfreq(len(wave), 1 / 48_000)
        assert power[hz > 8000].sum() < 0.1 * power.sum(), name


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="sound class 'moo' is unknown"):
        sounds.synthesize("moo", np.random.default_rng(0), "train", 1.0, 16_000)
    with pytest.raises(ValueError, match=r"needs 0\.5 s"):
        sounds.synthesize("slow knocks", np.random.default_rng(0), "train", 0.2, 16_000)
    with pytest.raises(ValueError, match="split 'dev' is unknown"):
        sounds.Draw(np.random.default_rng(0), "dev")
