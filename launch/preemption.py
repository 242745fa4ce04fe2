"""A run that is asked to stop: SIGTERM or Ctrl-C, once to save and stop, twice to stop at once."""

from __future__ import annotations

import os
import signal
import threading
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: stopped on request, everything is saved, start again.
EXIT_STATUS = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
    """The run was asked to stop and did; the message is one line."""


class StopRequest:
    """Listens for SIGTERM and SIGINT inside its ``with`` block.

    The first is remembered; the second ends the process at once, with 128 + its number. A thread listens, because a
    handler of Python's own would wait for the end of whatever the main thread computes or compiles.

    Enter it on the main thread, and after `jax.distributed.initialize`, which has a handler of its own.
    """

    def __init__(self) -> None:
        self._received = ""

    def __enter__(self) -> StopRequest:
        reader, self._writer = os.pipe()
        # Python demands it: a handler must never wait.
        os.set_blocking(self._writer, False)
        # Python writes the number of a signal to the pipe only where it has a handler.
        self._handlers: dict[int, Any] = {
            number: signal.signal(number, lambda number, frame: None) for number in SIGNALS
        }
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writer)  # which ends the thread

    def _listen(self, reader: int) -> None:
        while received := os.read(reader, 1):
            number = received[0]
            if number not in SIGNALS:
                continue
            if self._received:
                os._exit(128 + number)
            self._received = signal.Signals(number).name
            print(
                f"{self._received}: this step is finished and saved; once more to stop at once",
                flush=True,
            )
        os.close(reader)

    def agreed(self) -> str:
        """The name of the signal if any process has received one, "" if none has.

        All processes call it between the same two steps and get the same answer, so they save the same step.
        """
        own = signal.Signals[self._received].value if self._received else 0
        if jax.process_count() > 1:
            own = int(multihost_utils.process_allgather(np.array(own)).max())
        return signal.Signals(own).name if own else ""
