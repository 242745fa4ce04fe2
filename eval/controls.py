"""Controls: change what the model hears, and see whether its answers change.

Each control alters the sampler's input and nothing else; questions, seeds and scoring stay. If
accuracy does not fall when the audio that comes back after a citation is wrong, the model is not
listening to it.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from echo_jax.sampler import Prompts

FORMATS = ("conditioned", "grounded", "interleaved")


@dataclasses.dataclass(frozen=True)
class Control:
    """One control.

    Attributes:
        name: as in configs and tables.
        description: one line for a report.
        apply: what it does to a batch; gets one integer per row that depends on the question only.
        inserts: False switches insertion off.
        formats: formats for which it means anything.
    """

    name: str
    description: str
    apply: Callable[[Prompts, np.ndarray], Prompts]
    inserts: bool = True
    formats: tuple[str, ...] = FORMATS


def _unchanged(prompts: Prompts, numbers: np.ndarray) -> Prompts:
    del numbers
    return prompts


def _silence(prompts: Prompts, numbers: np.ndarray) -> Prompts:
    del numbers
    return prompts.replace(insert_waveforms=np.zeros_like(prompts.waveforms))


def _other_span(prompts: Prompts, numbers: np.ndarray) -> Prompts:
    """Segments start a quarter to three quarters of the recording later, wrapping round."""
    share = 0.25 + 0.5 * (numbers % 1_000) / 1_000
    shift = (share * np.asarray(prompts.num_samples)).astype(np.int32)
    return prompts.replace(insert_shift_samples=shift)


def _no_audio(prompts: Prompts, numbers: np.ndarray) -> Prompts:
    del numbers
    silence = np.zeros_like(prompts.waveforms)
    return prompts.replace(waveforms=silence, insert_waveforms=silence)


CONTROLS: dict[str, Control] = {
    control.name: control
    for control in (
        Control("none", "nothing is changed", _unchanged),
        Control(
            "silence",
            "cited clips are replaced by silence of the same length",
            _silence,
            formats=("interleaved",),
        ),
        Control(
            "other_span",
            "cited clips are replaced by another span of the same length and recording",
            _other_span,
            formats=("interleaved",),
        ),
        Control("no_audio", "the recording and all clips are replaced by silence", _no_audio),
        Control(
            "no_insertion",
            "citations bring no audio back",
            _unchanged,
            inserts=False,
            formats=("interleaved",),
        ),
    )
}


def get(name: str, answer_format: str) -> Control:
    """Returns a control.

    Raises:
        ValueError: there is none of that name, or it means nothing for the format.
    """
    if answer_format not in FORMATS:
        raise ValueError(f"unknown format {answer_format!r}; choose one of {', '.join(FORMATS)}")
    if name not in CONTROLS:
        raise ValueError(f"unknown control {name!r}; choose one of {', '.join(CONTROLS)}")
    if answer_format not in CONTROLS[name].formats:
        allowed = ", ".join(CONTROLS[name].formats)
        raise ValueError(f"control {name!r} needs the format {allowed}, not {answer_format}")
    return CONTROLS[name]
