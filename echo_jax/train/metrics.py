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
        self._active = active
        self._stream = stream or sys.stdout
        self._started = time.monotonic()
        self._workdir = workdir
        self._board: Any = None
        if active:
            # Here, because evaluation and tests that only read metrics need no TensorBoard.
            from tensorboardX import SummaryWriter

            workdir.mkdir(parents=True, exist_ok=True)
            for name in (METRICS_FILE, TIMINGS_FILE):
                truncate_beyond(workdir / name, first_step)
            self._board = SummaryWriter(
                str(workdir / "tensorboard"),
                purge_step=first_step + 1 if first_step else None,
                # Its thread ends when the disk is full; a short queue would then hold up the run for ever.
                max_queue=1 << 20,
            )

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
        if not self._active:
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
        for name, value in {
            **metrics,
            **{f"timings/{name}": value for name, value in timings.items()},
        }.items():
            self._board.add_scalar(name, float(value), step)
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
        # What ends the block is the news: on a full disk closing fails too, and does not say where.
        with contextlib.suppress(*([OSError] if kind else [])):
            self.close()
