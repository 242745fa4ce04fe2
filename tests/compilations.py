"""Hears what JAX compiles."""

import contextlib
from collections.abc import Iterator

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """A list that grows by the name of each function that is compiled, or loaded from the cache on disk."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: object) -> None:
        if event == _EVENT:
            names.append(str(kwargs["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
