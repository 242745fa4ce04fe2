"""A parametric library of short sounds, in groups of classes that are easy to confuse.

Every class is a function ``(draw, seconds, sampling_rate) -> f32[n]``. All of its free parameters
(pitch, roughness, rates, envelopes, brightness) come from ``draw(name, low, high)``, and `Draw` gives each
split its own bands of every range: a parameter of a test sound never had a training value, while the
class, which is defined by the whole range, stays the same. Energy lies below 7.5 kHz, so that
a class sounds the same at every sampling rate from 16 kHz up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.signal

# Offsets inside each of `PERIODS` equal cells of a parameter range; the unused parts are guard bands.
SPLIT_BANDS: dict[str, tuple[float, float]] = {
    "train": (0.0, 0.55),
    "validation": (0.60, 0.72),
    "test": (0.78, 0.95),
}
PERIODS = 4
RMS = 0.1
FADE_S = 0.008


class Draw:
    """Random parameters of one sound, taken from the bands that belong to one split.

    Attributes:
      rng: the generator, also used by sounds for their noise.
      values: name -> value of everything drawn so far (for tests and reports).
    """

    def __init__(self, rng: np.random.Generator, split: str):
        if split not in SPLIT_BANDS:
            raise ValueError(f"split {split!r} is unknown; use one of {sorted(SPLIT_BANDS)}")
        self.rng = rng
        self.values: dict[str, float] = {}
        self._band = SPLIT_BANDS[split]

    def __call__(self, name: str, low: float, high: float) -> float:
        """A value in [low, high], inside this split's bands of that range."""
        cell = self.rng.integers(PERIODS)
        fraction = (cell + self.rng.uniform(*self._band)) / PERIODS
        value = low + (high - low) * fraction
        self.values[name] = value
        return value


SoundFn = Callable[[Draw, float, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SoundClass:
    """One class: `name` is its spoken label, `group` joins classes that are easily confused."""

    name: str
    group: str
    make: SoundFn
    min_seconds: float

    @property
    def mid(self) -> str:
        """Machine id in the style of AudioSet's `/m/...` labels."""
        return "/s/" + self.name.replace(" ", "_")


LIBRARY: dict[str, SoundClass] = {}


def _sound(name: str, group: str, min_seconds: float = 0.3) -> Callable[[SoundFn], SoundFn]:
    def register(make: SoundFn) -> SoundFn:
        LIBRARY[name] = SoundClass(name, group, make, min_seconds)
        return make

    return register


def synthesize(
    name: str, rng: np.random.Generator, split: str, seconds: float, sampling_rate: int
) -> np.ndarray:
    """One sound of class `name`: f32[round(seconds * sampling_rate)], RMS 0.1, short fades at both ends.

    Raises:
      ValueError: unknown class or split, or fewer seconds than the class needs to be recognised.
    """
    if name not in LIBRARY:
        raise ValueError(f"sound class {name!r} is unknown; use one of {sorted(LIBRARY)}")
    sound = LIBRARY[name]
    if seconds < sound.min_seconds - 1e-9:
        raise ValueError(f"sound class {name!r} needs {sound.min_seconds} s, got {seconds:.3f} s")
    wave = sound.make(Draw(rng, split), seconds, sampling_rate)
    return finish(wave, sampling_rate)


def finish(wave: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Fade both ends over 8 ms and set the RMS to 0.1: f32[n]."""
    fade = min(int(FADE_S * sampling_rate), len(wave) // 2)
    wave = np.array(wave, np.float64)
    ramp = np.linspace(0.0, 1.0, fade, endpoint=False)
    wave[:fade] *= ramp
    wave[len(wave) - fade :] *= ramp[::-1]
    level = np.sqrt(np.mean(wave**2))
    return (wave * (RMS / max(level, 1e-9))).astype(np.float32)


# ----------------------------------------------------------------------------- building blocks


def _time(seconds: float, sampling_rate: int) -> np.ndarray:
    return np.arange(round(seconds * sampling_rate)) / sampling_rate


def _phase(frequency_hz: np.ndarray, sampling_rate: int) -> np.ndarray:
    return 2 * np.pi * np.cumsum(frequency_hz) / sampling_rate


def _harmonics(phase: np.ndarray, pitch_hz: float, decay: float, count: int) -> np.ndarray:
    """Sum of sin(k phase) / k**decay over the harmonics below 7 kHz."""
    # sin((k + 1) x) = 2 cos(x) sin(k x) - sin((k - 1) x): a product where a sine would be ten times slower.
    twice_cosine, before, now = 2 * np.cos(phase), np.zeros_like(phase), np.sin(phase)
    wave = now.copy()
    for k in range(2, min(count, int(7000 / pitch_hz)) + 1):
        before, now = now, twice_cosine * now - before
        wave += now / k**decay
    return wave


def _band(
    rng: np.random.Generator, n: int, sampling_rate: int, low_hz: float, high_hz: float
) -> np.ndarray:
    """Gaussian noise between two frequencies: f64[n]."""
    sos = scipy.signal.butter(
        2, [low_hz, min(high_hz, 7500.0)], "bandpass", fs=sampling_rate, output="sos"
    )
    return scipy.signal.sosfilt(sos, rng.standard_normal(n))


def _resonances(
    wave: np.ndarray, sampling_rate: int, centres_hz: tuple[float, ...], q: float
) -> np.ndarray:
    """Sum of two-pole resonators (formants) applied to `wave`."""
    out = np.zeros_like(wave)
    for centre in centres_hz:
        b, a = scipy.signal.iirpeak(centre, q, fs=sampling_rate)
        out += scipy.signal.lfilter(b, a, wave)
    return out


def _bursts(t: np.ndarray, rate_hz: float, attack_s: float, decay_s: float) -> np.ndarray:
    """An envelope of bursts at a steady rate, each rising over attack_s and dying over decay_s."""
    since = np.mod(t, 1.0 / rate_hz)
    return np.minimum(since / attack_s, 1.0) * np.exp(-since / decay_s)


def _arch(t: np.ndarray, seconds: float, power: float) -> np.ndarray:
    return np.sin(np.pi * np.clip((t + 1e-4) / seconds, 0, 1)) ** power


# ----------------------------------------------------------------------------- beeps and whistles


def _beep(draw: Draw, seconds: float, sampling_rate: int, pitch_hz: float) -> np.ndarray:
    t = _time(seconds, sampling_rate)
    wave = np.sin(2 * np.pi * pitch_hz * t)
    wave += draw("second_harmonic", 0.0, 0.35) * np.sin(4 * np.pi * pitch_hz * t)
    wave += draw("third_harmonic", 0.0, 0.25) * np.sin(6 * np.pi * pitch_hz * t)
    return wave * np.minimum(t / draw("attack_s", 0.005, 0.05), 1.0)


@_sound("low beep", "beep")
def low_beep(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """A steady tone near 700 Hz."""
    return _beep(draw, seconds, sampling_rate, draw("pitch_hz", 675, 725))


@_sound("high beep", "beep")
def high_beep(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """A steady tone near 880 Hz."""
    return _beep(draw, seconds, sampling_rate, draw("pitch_hz", 850, 910))


@_sound("whistle", "whistle")
def whistle(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """A breathy tone between 1.5 and 2.1 kHz with slow vibrato."""
    t = _time(seconds, sampling_rate)
    pitch = draw("pitch_hz", 1500, 2100)
    vibrato = draw("vibrato_depth", 0.005, 0.02) * np.sin(
        2 * np.pi * draw("vibrato_hz", 4.5, 7) * t
    )
    tone = np.sin(_phase(pitch * (1 + vibrato), sampling_rate))
    breath = _band(draw.rng, len(t), sampling_rate, 0.9 * pitch, 1.1 * pitch)
    return _arch(t, seconds, 0.3) * (tone + draw("breath", 0.1, 0.4) * breath)


@_sound("trill", "whistle", 0.4)
def trill(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """A bird-like tone that jumps fast between two pitches."""
    t = _time(seconds, sampling_rate)
    low = draw("pitch_hz", 1900, 2500)
    square = np.sign(np.sin(2 * np.pi * draw("trill_hz", 13, 20) * t))
    pitch = low * (1 + draw("jump", 0.12, 0.22) * (square + 1) / 2)
    return _arch(t, seconds, 0.3) * np.sin(_phase(pitch, sampling_rate))


# ----------------------------------------------------------------------------- buzzes and hums


def _buzz(draw: Draw, seconds: float, sampling_rate: int, depth: float) -> np.ndarray:
    t = _time(seconds, sampling_rate)
    pitch = draw("pitch_hz", 105, 165)
    wave = _harmonics(2 * np.pi * pitch * t, pitch, draw("brightness", 0.6, 1.0), 40)
    roughness = 1 - depth * (0.5 + 0.5 * np.sin(2 * np.pi * draw("roughness_hz", 24, 36) * t))
    return wave * roughness


@_sound("smooth buzz", "buzz")
def smooth_buzz(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """A bright harmonic drone without beating."""
    return _buzz(draw, seconds, sampling_rate, draw("depth", 0.0, 0.08))


@_sound("rough buzz", "buzz")
def rough_buzz(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """The same drone, beating 24 to 36 times a second."""
    return _buzz(draw, seconds, sampling_rate, draw("depth", 0.75, 0.98))


@_sound("engine hum", "engine", 0.4)
def engine_hum(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """Low harmonics of a firing rate, with a slow throb and some noise."""
    t = _time(seconds, sampling_rate)
    pitch = draw("pitch_hz", 45, 75)
    drift = 1 + draw("drift", -0.05, 0.05) * t / seconds
    wave = _harmonics(_phase(pitch * drift, sampling_rate), pitch, draw("brightness", 0.9, 1.3), 12)
    throb = 1 + draw("throb", 0.1, 0.4) * np.sin(2 * np.pi * draw("throb_hz", 7, 13) * t)
    return wave * throb + draw("noise", 0.1, 0.4) * _band(draw.rng, len(t), sampling_rate, 60, 400)


@_sound("horn", "engine")
def horn(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """Two harmonic tones a third apart, like a car horn."""
    t = _time(seconds, sampling_rate)
    pitch = draw("pitch_hz", 330, 430)
    decay = draw("brightness", 0.5, 0.9)
    other = pitch * draw("interval", 1.2, 1.27)
    chord = _harmonics(2 * np.pi * pitch * t, pitch, decay, 14)
    chord += _harmonics(2 * np.pi * other * t, other, decay, 14)
    return np.minimum(t / draw("attack_s", 0.01, 0.05), 1.0) * chord


# ----------------------------------------------------------------------------- bells and strings


def _bell(
    draw: Draw, seconds: float, sampling_rate: int, pitch_hz: float, ratios: tuple[float, ...]
) -> np.ndarray:
    """Inharmonic partials, higher ones dying faster; struck again every `strike_s`."""
    t = _time(seconds, sampling_rate)
    since = np.mod(t, draw("strike_s", 0.28, 0.5))
    decay = draw("decay_s", 0.18, 0.5)
    tilt = draw("tilt", 0.4, 1.0)
    wave = np.zeros_like(t)
    for k, ratio in enumerate(ratios):
        if ratio * pitch_hz < 7200:
            partial = np.sin(2 * np.pi * ratio * pitch_hz * t)
            wave += partial * np.exp(-since * (1 + 0.6 * k) / decay) / (1 + k) ** tilt
    return wave * np.minimum(since / 0.002, 1.0)


@_sound("small bell", "bell")
def small_bell(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """A hand bell: partials from about 1.6 kHz up."""
    return _bell(
        draw, seconds, sampling_rate, draw("pitch_hz", 1500, 1800), (1.0, 1.52, 2.37, 3.1, 4.2)
    )


@_sound("large bell", "bell")
def large_bell(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """A church bell: hum, minor third and upper partials from about 500 Hz up."""
    return _bell(
        draw, seconds, sampling_rate, draw("pitch_hz", 440, 560), (1.0, 1.19, 1.5, 2.0, 2.74, 4.1)
    )


@_sound("plucked string", "string", 0.4)
def plucked_string(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """Harmonics that die faster the higher they are; one pluck about every 0.4 s."""
    t = _time(seconds, sampling_rate)
    since = np.mod(t, draw("pluck_s", 0.35, 0.5))
    pitch = draw("pitch_hz", 190, 290)
    decay, tilt = draw("decay_s", 0.25, 0.45), draw("tilt", 0.5, 0.9)
    wave = np.zeros_like(t)
    for k in range(1, 16):
        wave += (
            np.sin(2 * np.pi * k * pitch * t) * np.exp(-since * (0.5 + 0.5 * k) / decay) / k**tilt
        )
    return wave * np.minimum(since / 0.002, 1.0)


# ----------------------------------------------------------------------------- chirps and sirens


def _sweep(draw: Draw, seconds: float, sampling_rate: int, rising: bool) -> np.ndarray:
    t = _time(seconds, sampling_rate)
    low, octaves = draw("low_hz", 450, 700), draw("octaves", 1.1, 1.7)
    # Repeated sweeps keep the slope the same in short and in long events.
    where = np.mod(t, draw("sweep_s", 0.22, 0.34)) / draw.values["sweep_s"]
    pitch = low * 2 ** (octaves * (where if rising else 1 - where))
    wave = np.sin(_phase(pitch, sampling_rate))
    wave += draw("second_harmonic", 0.0, 0.3) * np.sin(2 * _phase(pitch, sampling_rate))
    return wave * np.minimum(np.minimum(where, 1 - where) / 0.06, 1.0)


@_sound("rising chirp", "chirp", 0.4)
def rising_chirp(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """Tones that sweep upwards, over and over."""
    return _sweep(draw, seconds, sampling_rate, True)


@_sound("falling chirp", "chirp", 0.4)
def falling_chirp(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """Tones that sweep downwards, over and over."""
    return _sweep(draw, seconds, sampling_rate, False)


@_sound("siren", "chirp", 0.5)
def siren(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """A tone that swings smoothly up and down, two to three times a second."""
    t = _time(seconds, sampling_rate)
    swing = np.sin(2 * np.pi * (draw("swing_hz", 2.0, 3.0) * t + draw("phase", 0, 1)))
    pitch = draw("pitch_hz", 800, 1000) * 2 ** (draw("depth", 0.35, 0.55) * swing)
    return _harmonics(_phase(pitch, sampling_rate), 1000, draw("brightness", 1.2, 2.0), 4)


# ----------------------------------------------------------------------------- knocks and drums


def _knock(draw: Draw, seconds: float, sampling_rate: int, rate_hz: float) -> np.ndarray:
    t = _time(seconds, sampling_rate)
    pitch = draw("pitch_hz", 220, 420)
    envelope = _bursts(t, rate_hz, 0.001, draw("decay_s", 0.015, 0.035))
    body = np.sin(2 * np.pi * pitch * t) + 0.5 * np.sin(2 * np.pi * 2.3 * pitch * t)
    click = _band(draw.rng, len(t), sampling_rate, 800, draw("click_hz", 2500, 5000))
    return envelope * (body + draw("click", 0.3, 0.9) * click)


@_sound("slow knocks", "knock", 0.5)
def slow_knocks(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """Wooden knocks, four to five a second."""
    return _knock(draw, seconds, sampling_rate, draw("rate_hz", 4.0, 5.2))


@_sound("fast knocks", "knock", 0.4)
def fast_knocks(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """The same knocks, nine to twelve a second."""
    return _knock(draw, seconds, sampling_rate, draw("rate_hz", 9.0, 12.0))


@_sound("drum", "knock", 0.4)
def drum(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """Deep beats whose pitch falls, three to four a second."""
    t = _time(seconds, sampling_rate)
    rate = draw("rate_hz", 3.0, 4.2)
    since = np.mod(t, 1 / rate)
    pitch = draw("pitch_hz", 70, 105) * (1 + 1.2 * np.exp(-since / draw("drop_s", 0.02, 0.04)))
    skin = _band(draw.rng, len(t), sampling_rate, 100, 900)
    return _bursts(t, rate, 0.002, draw("decay_s", 0.08, 0.15)) * (
        np.sin(_phase(pitch, sampling_rate)) + draw("skin", 0.05, 0.25) * skin
    )


@_sound("rattle", "noise", 0.4)
def rattle(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """Grains of bright noise, about twenty a second, none quite like the last."""
    t = _time(seconds, sampling_rate)
    rate = draw("rate_hz", 16, 24)
    grains = draw.rng.uniform(0.3, 1.0, int(seconds * rate) + 2)
    envelope = _bursts(t, rate, 0.002, draw("decay_s", 0.008, 0.016))
    envelope *= grains[(t * rate).astype(int)]
    return envelope * _band(draw.rng, len(t), sampling_rate, draw("low_hz", 2500, 3500), 7000)


# ----------------------------------------------------------------------------- voices


def _voice(
    draw: Draw, t: np.ndarray, sampling_rate: int, pitch: np.ndarray, noise: float
) -> np.ndarray:
    """A harmonic source with noise: f64[n]."""
    mean = float(np.mean(pitch))
    source = _harmonics(_phase(pitch, sampling_rate), mean, 0.5, 40)
    source /= max(float(np.std(source)), 1e-9)
    return source + noise * draw.rng.standard_normal(len(t))


@_sound("dog bark", "bark", 0.4)
def dog_bark(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """Short voiced bursts whose pitch rises and falls, through two formants."""
    t = _time(seconds, sampling_rate)
    rate = draw("rate_hz", 2.6, 3.6)
    where = np.clip(np.mod(t, 1 / rate) / 0.16, 0, 1)
    pitch = draw("pitch_hz", 300, 420) * (1 + 0.5 * np.sin(np.pi * where))
    source = _voice(draw, t, sampling_rate, pitch, draw("noise", 0.3, 0.6))
    formants = (draw("formant1_hz", 650, 850), draw("formant2_hz", 1400, 1800))
    return np.sin(np.pi * where) * _resonances(source, sampling_rate, formants, 4.0)


@_sound("cough", "bark", 0.4)
def cough(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """Unvoiced bursts with the rhythm of a bark: a sharp start and a breathy tail."""
    t = _time(seconds, sampling_rate)
    envelope = _bursts(t, draw("rate_hz", 2.6, 3.6), 0.008, draw("decay_s", 0.05, 0.09))
    noise = draw.rng.standard_normal(len(t))
    formants = (draw("formant1_hz", 650, 950), draw("formant2_hz", 1500, 2100))
    rasp = _band(draw.rng, len(t), sampling_rate, 2000, 5000)
    return envelope * (
        _resonances(noise, sampling_rate, formants, 1.5) + draw("rasp", 0.05, 0.2) * rasp
    )


@_sound("duck quack", "bark", 0.4)
def duck_quack(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """Nasal, buzzing bursts with a falling pitch."""
    t = _time(seconds, sampling_rate)
    rate = draw("rate_hz", 3.4, 4.6)
    where = np.clip(np.mod(t, 1 / rate) / 0.18, 0, 1)
    pitch = draw("pitch_hz", 190, 250) * (1.25 - 0.5 * where)
    source = _voice(draw, t, sampling_rate, pitch, draw("noise", 0.05, 0.15))
    formants = (draw("formant1_hz", 1050, 1250), draw("formant2_hz", 2500, 3000))
    return np.sin(np.pi * where) ** 0.5 * _resonances(source, sampling_rate, formants, 8.0)


# ----------------------------------------------------------------------------- noises


@_sound("running water", "noise", 0.4)
def running_water(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """Broad noise with many short rising bubbles."""
    t = _time(seconds, sampling_rate)
    wave = 0.5 * _band(draw.rng, len(t), sampling_rate, 500, draw("bright_hz", 4000, 6000))
    for _ in range(int(seconds * draw("bubbles_per_s", 25, 45))):
        start, length = draw.rng.integers(len(t)), int(sampling_rate * draw.rng.uniform(0.01, 0.03))
        bubble = t[: min(length, len(t) - start)]
        pitch = draw.rng.uniform(700, 1800) * (1 + 12 * bubble)
        wave[start : start + len(bubble)] += np.sin(2 * np.pi * pitch * bubble) * np.exp(
            -bubble / 0.008
        )
    return wave


@_sound("steam hiss", "noise")
def steam_hiss(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """Steady high noise."""
    t = _time(seconds, sampling_rate)
    hiss = _band(draw.rng, len(t), sampling_rate, draw("low_hz", 3000, 4200), 7400)
    return hiss * (1 + draw("swell", 0.0, 0.3) * np.sin(2 * np.pi * draw("swell_hz", 1, 3) * t))


@_sound("cricket", "noise", 0.4)
def cricket(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """A high tone in fast pulses, grouped into chirps."""
    t = _time(seconds, sampling_rate)
    tone = np.sin(2 * np.pi * draw("pitch_hz", 4000, 4800) * t)
    pulses = 0.5 + 0.5 * np.sin(2 * np.pi * draw("pulse_hz", 38, 52) * t)
    chirps = np.mod(t * draw("chirp_hz", 4.5, 6.5), 1.0) < draw("duty", 0.5, 0.65)
    return tone * pulses * chirps


@_sound("phone ring", "ring", 0.4)
def phone_ring(draw: Draw, seconds: float, sampling_rate: int) -> np.ndarray:
    """Two tones in turn, about twenty-two times a second, like an electronic telephone."""
    t = _time(seconds, sampling_rate)
    low, ratio = draw("pitch_hz", 1150, 1350), draw("ratio", 1.2, 1.3)
    square = np.sin(2 * np.pi * draw("warble_hz", 9.0, 12.0) * t) > 0
    phase = _phase(np.where(square, low, low * ratio), sampling_rate)
    return np.sin(phase) + draw("third_harmonic", 0.1, 0.3) * np.sin(3 * phase)
