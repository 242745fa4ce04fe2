"""What a run leaves to read: a live line, JSON lines and TensorBoard, written by process 0.

Two JSON-lines files: ``metrics.jsonl`` holds what is determined by seed, data and config, so that a
run that was killed and went on ends with the very same file; ``timings.jsonl`` holds what depends
on the clock.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from echo_jax import disk

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"


def truncate_beyond(path: Path, step: int) -> None:
    """Drops the lines of steps after ``step``, and a last line that was torn by a kill. A missing
    file stays missing."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not line.endswith("\n") or record["step"] > step:
            break
        kept.append(line)
    partial, text = path.with_name(path.name + ".partial"), "".join(kept)
    with disk.naming(path, len(text), "free space, and start again to go on"):
        partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All records of a JSON-lines file, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def format_duration(seconds: float) -> str:
    """``7s``, ``3m05s`` or ``2h10m``; ``?`` for what is not known."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class _Board:
    """An event file of TensorBoard, written step by step.

    tensorboardX's own SummaryWriter hands its events to a thread, which ends when the disk is full; the run would wait
    for it for ever.

    Args:
        folder: made when it is missing.
        first_step: events of later steps, from before a restart, are hidden.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        # Here, because evaluation and tests that only read metrics need no TensorBoard.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._folder = folder
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # The names of files have seconds in them; two starts in one second must not share a file.
        self._writer = EventsWriter(str(folder / "events"), f".from-step-{first_step}")
        if first_step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(self._event(step=first_step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of one step; raises DiskFullError."""
        scalars = [self._summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]
        self._add(self._event(step=step, summary=self._summary(value=scalars)))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        with disk.naming(self._folder, event.ByteSize(), "free space, and start again to go on"):
            self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class MetricWriter:
    """Writes one step at a time; `close` (or leaving the ``with`` block) flushes everything.

    Args:
        workdir: holds the two JSON-lines files and ``tensorboard/``.
        total_steps: for "step/total" and the ETA.
        first_step: the step restored from a checkpoint, 0 for a new run; lines beyond it are
            removed.
        shown: names of the metrics in the live line, in order; those a step lacks are left out.
        active: False on every process but the first: then nothing is written.
        stream: where the live line goes; standard output by default.
    """

    def __init__(
        self,
        workdir: Path,
        total_steps: int,
        first_step: int = 0,
        shown: tuple[str, ...] = ("loss",),
        active: bool = True,
        stream: IO[str] | None = None,
    ) -> None:
        self._total_steps = total_steps
        self._first_step = first_step
        self._shown = shown
        self._stream = stream or sys.stdout
        self._started = time.monotonic()
        self._workdir = workdir
        self._board: _Board | None = None
        if active:
            workdir.mkdir(parents=True, exist_ok=True)
            for name in (METRICS_FILE, TIMINGS_FILE):
                truncate_beyond(workdir / name, first_step)
            self._board = _Board(workdir / "tensorboard", first_step)

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        timings: Mapping[str, float],
        ids: list[str] | None = None,
    ) -> None:
        """Records one step.

        Args:
            step: 1 for the first.
            metrics: deterministic values.
            timings: values that depend on the clock, in seconds or per second; ``tokens_per_s`` is
                shown live.
            ids: ids of the records of the step, kept beside the metrics.

        Raises:
            DiskFullError: no space for a line.
        """
        if self._board is None:
            return
        record: dict[str, Any] = {
            "step": step,
            **{name: float(value) for name, value in metrics.items()},
        }
        if ids is not None:
            record["ids"] = ids
        timing_record = {"step": step, **{name: float(value) for name, value in timings.items()}}
        for name, content in ((METRICS_FILE, record), (TIMINGS_FILE, timing_record)):
            path, line = self._workdir / name, json.dumps(content) + "\n"
            # Opened anew each time: a killed process loses nothing, and a full disk shows at once.
            with (
                disk.naming(path, len(line), "free space, and start again to go on"),
                open(path, "a", encoding="utf-8") as file,
            ):
                file.write(line)
        times = {f"timings/{name}": value for name, value in timings.items()}
        self._board.write(step, {**metrics, **times})
        print(self._live_line(step, metrics, timings), file=self._stream, flush=True)

    def _live_line(
        self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]
    ) -> str:
        done = step - self._first_step
        remaining = (time.monotonic() - self._started) / max(done, 1) * (self._total_steps - step)
        fields = [f"step {step}/{self._total_steps}"]
        fields += [f"{name} {metrics[name]:.4g}" for name in self._shown if name in metrics]
        if "tokens_per_s" in timings:
            fields.append(f"{timings['tokens_per_s']:.0f} tokens/s")
        fields.append(f"ETA {format_duration(remaining)}")
        return "  ".join(fields)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        # What ends the block is the news; on a full disk closing fails too.
        with contextlib.suppress(*([OSError] if kind else [])):
            self.close()
