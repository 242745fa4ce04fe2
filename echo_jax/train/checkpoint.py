"""Checkpoints: everything a run needs to go on exactly, as one orbax step.

A step holds three items: `arrays` (parameters, optimizer state, random key), `host` (step, timers, config, metrics, and
the shape, dtype and checksum of every array) and `iterator` (the position in the data). Orbax writes to a temporary
folder and renames it, so a run that is killed while writing leaves the checkpoint before it intact. What was damaged
later shows by its checksums: it is named, set aside, and the checkpoint before it is taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from echo_jax import disk
from echo_jax.train.checksum import checksums, named_leaves
from echo_jax.train.retention import Retention, policy
from echo_jax.train.sealed import sealed, unsealed

PyTree = Any
_log = logging.getLogger(__name__)

# Where damaged steps are set aside, beside the steps.
DAMAGED = "damaged"
KEEP_LAST = Retention()


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run remembers of its own course.

    Attributes:
        train_seconds: spent in the finished steps, those that were trained again counted once.
        restarts: how often the run went on from a checkpoint; starts that reached no checkpoint of their own are not
            among them.
        skipped_updates: updates that were skipped because loss or gradient was not finite.
        skipped_in_a_row: how many of them were the last ones.
    """

    train_seconds: float = 0.0
    restarts: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0


@flax.struct.dataclass
class TrainState:
    """What changes from step to step.

    Attributes:
        step: finished steps; a Python int.
        params: the whole parameter tree, frozen parts included.
        opt_state: of the trainable part.
        key: typed key from which the next step derives its randomness.
        progress: timers and counters.
    """

    step: int = flax.struct.field(pytree_node=False)
    params: PyTree
    opt_state: PyTree
    key: jax.Array
    progress: Progress = flax.struct.field(pytree_node=False, default=Progress())


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message is one line for the person who started the run."""


class _DamagedError(Exception):
    """What is wrong with the files of one step."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: made when it is missing; on several processes the same for all of them.
        retention: which of them stay.
        asynchronous: write in the background while training goes on.
        data_shards: into how many parts the processes divide the data. 1: every process draws the whole batches, and
            the run may go on with any number of processes. Else it is the number of processes, each of which has its
            own iterator, and the run goes on with as many.
    """

    def __init__(
        self,
        directory: Path,
        retention: Retention = KEEP_LAST,
        asynchronous: bool = True,
        data_shards: int = 1,
    ) -> None:
        if data_shards not in (1, jax.process_count()):
            raise ValueError(
                f"data_shards={data_shards} must be 1 or the number of processes, {jax.process_count()}"
            )
        self._directory = directory.absolute()
        self._retention = retention
        self._data_shards = data_shards
        self._asynchronous = asynchronous
        # Step -> its metrics, by which the best are found.
        self._metrics: dict[int, Mapping[str, float]] = {}
        # The step that was handed over last and its size, for the message when it cannot be written.
        self._writing = (0, 0)
        self._failed = False
        self._quiet = _QuietOrbax()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy(retention, self._metrics),
                # Always: orbax's own way of saving at once does not wait for the folder of every item.
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                # Nothing inside a step is read before it is asked for: it may be damaged.
                lightweight_initialize=True,
            ),
            item_handlers={
                "arrays": ocp.StandardCheckpointHandler(),
                "host": ocp.JsonCheckpointHandler(),
                "iterator": ocp.JsonCheckpointHandler(),
            },
        )
        for step in self._manager.all_steps():
            with contextlib.suppress(_DamagedError):
                self._metrics[step] = self._host(step)["metrics"]

    # ---------------------------------------------------------------------------------------- write

    def save(
        self,
        state: TrainState,
        iterator: Any,
        config: dict[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Writes `state.step`; a step that is already there is left alone.

        Args:
            state: of the run; its arrays may be donated to the next step as soon as this returns. On several processes
                each of them lies on the devices of all.
            iterator: a grain iterator, positioned after the last batch that `state` has seen.
            config: plain values that survive JSON.
            metrics: of the step; one of them says which checkpoints are the best.

        Raises:
            DiskFullError: no space for it, or for the one before.
        """
        self.wait()
        if state.step in self._manager.all_steps():
            return
        arrays = _arrays(state)
        sums = checksums(arrays)
        leaves = named_leaves(arrays)
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        host = {
            "step": state.step,
            "config": config,
            "progress": dataclasses.asdict(state.progress),
            "metrics": numbers,
            "arrays": {
                name: [list(leaf.shape), str(leaf.dtype), sums[name]]
                for name, leaf in leaves.items()
            },
        }
        positions = {"positions": self._positions(iterator)}
        self._metrics[state.step] = numbers
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
        self._writing = (state.step, size)
        with self._naming_failures():
            self._manager.save(
                state.step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays),
                    host=ocp.args.JsonSave(sealed(host)),
                    iterator=ocp.args.JsonSave(sealed(positions)),
                ),
            )
        if not self._asynchronous:
            self.wait()

    def _positions(self, iterator: Any) -> list[str]:
        """The iterator's state, of each process if each has its own part of the data."""
        own = json.dumps(iterator.get_state())
        if self._data_shards == 1:
            return [own]
        coded = np.frombuffer(own.encode(), np.uint8)
        longest = int(multihost_utils.process_allgather(np.array(coded.size)).max())
        # JSON with spaces behind it is the same JSON.
        padded = np.pad(coded, (0, longest - coded.size), constant_values=ord(" "))
        return [row.tobytes().decode() for row in multihost_utils.process_allgather(padded)]

    def check(self) -> None:
        """Raises what went wrong in the background since the last call; returns at once.

        Raises:
            DiskFullError: no space for the last checkpoint.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for what is still being written; raises as `check`."""
        with self._naming_failures():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is still being written; raises as `check`."""
        try:
            with self._naming_failures():
                self._manager.close()
        finally:
            self._quiet.end(self._failed)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        # What ends the block is the news; that a checkpoint failed as well is said only when nothing else is wrong.
        with contextlib.suppress(*([Exception] if kind else [])):
            self.close()

    @contextlib.contextmanager
    def _naming_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed = True
            if not (reason := disk.full(error)):
                raise
            step, size = self._writing
            # What lies on the disk: the step that this one was to replace is still there.
            there = [int(p.name) for p in self._directory.iterdir() if p.name.isdigit()]
            then = (
                f"the checkpoint of step {max(there)} is intact: free space, and start again to go on from it"
                if there
                else "there is no checkpoint before it: free space, and start again"
            )
            raise disk.named(reason, self._directory / str(step), size, then) from error

    # ----------------------------------------------------------------------------------------- read

    def latest_step(self) -> int | None:
        """The newest finished step, damaged or not; None when there is none."""
        return self._manager.latest_step()

    def restore(
        self,
        template: TrainState,
        iterator: Any,
        check: Callable[[dict[str, Any], int], None] = lambda config, step: None,
    ) -> TrainState:
        """The newest step that is whole, bit for bit; moves `iterator` to where it stood.

        Newer steps that are damaged are named in a line each and moved to the folder `damaged` beside them.

        Args:
            template: a state of the same shapes and dtypes; the arrays come back with its shardings, which need not be
                those that they were saved with. Its leaves are arrays or `jax.ShapeDtypeStruct`; those without a
                sharding come back on the first device.
            iterator: a grain iterator over the same data with the same settings.
            check: called with the stored config and its step before the arrays are read; what it raises is raised.

        Raises:
            CheckpointError: there is no checkpoint, none is whole (then nothing is moved), or it does not fit the
                template or the number of processes.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise CheckpointError(f"no checkpoint in {self._directory}")
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                state = self._read(step, template, iterator, check)
            except _DamagedError as error:
                damaged[step] = str(error)
                continue
            self._set_aside(damaged, step)
            return state
        reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
        raise CheckpointError(
            f"{self._directory} holds no checkpoint that is whole ({reasons}); give another --workdir, or remove this "
            "folder to start anew"
        )

    def _read(
        self,
        step: int,
        template: TrainState,
        iterator: Any,
        check: Callable[[dict[str, Any], int], None],
    ) -> TrainState:
        """One step; raises _DamagedError, on every process, if any of them cannot read its part."""
        wanted = jax.tree.map(_placed, _arrays(template))
        host, positions, arrays, reason = None, None, None, ""
        try:
            host, positions = self._host(step), self._item(step, "iterator")["positions"]
        except _DamagedError as error:
            reason = str(error)
        self._agree(reason)
        assert host is not None
        assert positions is not None
        check(host["config"], step)
        self._check_fit(step, host, wanted)
        position = self._position(step, positions)
        try:
            arrays = self._stored_arrays(step, host, wanted)
        except _DamagedError as error:
            reason = str(error)
        self._agree(reason)
        iterator.set_state(json.loads(position))
        arrays = jax.tree.map(_released, arrays, _arrays(template))
        progress = Progress(**host["progress"])
        return TrainState(
            step=step,
            params=arrays["params"],
            opt_state=arrays["opt_state"],
            key=jax.random.wrap_key_data(arrays["key"]),
            progress=dataclasses.replace(progress, restarts=progress.restarts + 1),
        )

    def _host(self, step: int) -> dict[str, Any]:
        host = self._item(step, "host")
        if host["step"] != step:
            raise _DamagedError(f"host: it is of step {host['step']}")
        return host

    def _item(self, step: int, name: str) -> dict[str, Any]:
        """The content of a JSON item.

        Raises:
            _DamagedError: it is not there, or not what was written.
        """
        try:
            return unsealed((self._directory / str(step) / name / "metadata").read_bytes())
        except (OSError, ValueError) as error:
            raise _DamagedError(f"{name}: {_first_line(error)}") from error

    def _stored_arrays(self, step: int, host: dict[str, Any], wanted: PyTree) -> PyTree:
        """The arrays of a step; raises _DamagedError unless they are what was written."""
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted))
            )
            arrays = restored["arrays"]
            found = checksums(arrays)
        except Exception as error:  # what a damaged file raises has no narrower type
            self._failed = True
            raise _DamagedError(f"arrays: {_first_line(error)}") from error
        for name, (_, _, checksum) in host["arrays"].items():
            if found[name] != checksum:
                raise _DamagedError(f"arrays: {name} is not what was written")
        return arrays

    def _check_fit(self, step: int, host: dict[str, Any], wanted: PyTree) -> None:
        """Raises CheckpointError about the first array whose shape or dtype is another one in the template."""
        stored = {
            name: f"{dtype}{tuple(shape)}" for name, (shape, dtype, _) in host["arrays"].items()
        }
        expected = {
            name: f"{leaf.dtype}{tuple(leaf.shape)}" for name, leaf in named_leaves(wanted).items()
        }
        for name in sorted(stored.keys() | expected.keys()):
            if stored.get(name) != expected.get(name):
                there, here = stored.get(name, "not there"), expected.get(name, "not")
                raise CheckpointError(
                    f"checkpoint {self._directory / str(step)} does not fit this config ({name} is {there}, {here} in "
                    "this run); use another --workdir"
                )

    def _position(self, step: int, positions: list[str]) -> str:
        """The iterator's state for this process.

        Raises:
            CheckpointError: the processes divide the data in another way than those that wrote it.
        """
        if len(positions) != self._data_shards:
            raise CheckpointError(
                f"checkpoint {self._directory / str(step)} was written by a run whose data was divided among "
                f"{len(positions)} processes, not {self._data_shards}; go on with as many"
            )
        return positions[jax.process_index() if self._data_shards > 1 else 0]

    def _agree(self, reason: str) -> None:
        """Raises _DamagedError on all processes if one of them has found a reason to."""
        bad = np.array(bool(reason))
        if jax.process_count() > 1:
            bad = multihost_utils.process_allgather(bad).any()
        if bad:
            raise _DamagedError(reason or "another process cannot read its part")

    def _set_aside(self, damaged: Mapping[int, str], good: int) -> None:
        """Moves damaged steps out of the way, so that they are not met again, and says so."""
        for step, reason in damaged.items():
            self._metrics.pop(step, None)
            if jax.process_index() == 0:
                folder = self._directory / str(step)
                target = _unused(self._directory / DAMAGED / str(step))
                target.parent.mkdir(exist_ok=True)
                folder.rename(target)
                _log.warning(
                    "checkpoint %s is damaged (%s); it is now %s, and the run goes on from step %d",
                    folder,
                    reason,
                    target,
                    good,
                )
        if damaged:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self._manager.reload()


# ------------------------------------------------------------------------------------------------
# Parts
# ------------------------------------------------------------------------------------------------


def _arrays(state: TrainState) -> dict[str, PyTree]:
    # Orbax stores plain arrays; a typed key travels as its data.
    key = state.key
    if isinstance(key, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, key)
        data = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)
    else:
        data = jax.random.key_data(key)
    return {"params": state.params, "opt_state": state.opt_state, "key": data}


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """A leaf of the template with a sharding: without one orbax would take that of the run that saved it."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
        jax.local_devices()[0]
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _released(leaf: jax.Array, like: Any) -> jax.Array:
    """The leaf, free to move where a program needs it if the template's is: what is read from a file never is."""
    if isinstance(like, jax.Array) and not like.committed:
        return jnp.asarray(np.asarray(leaf))
    return leaf


def _first_line(error: BaseException) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    # What tensorstore adds is a page about its own state.
    for addition in (". See full", " [tensorstore_spec", " [source locations"):
        reason = reason.partition(addition)[0]
    return reason


def _unused(path: Path) -> Path:
    """The path itself, or with a number behind it where there is something already."""
    number, found = 0, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


class _QuietOrbax:
    """Keeps to one line what orbax says when it fails: it raises the error, and prints traces of it besides.

    Some it logs, in its threads. Others come from the many arrays that it handles at once: one that fails leaves the
    rest unawaited, and each of those prints a trace, some as late as the end of the process.
    """

    def __init__(self) -> None:
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._without_leftovers
        self._loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
        for logger in self._loggers:
            logger.addFilter(_without_trace)

    def _without_leftovers(self, unraisable: sys.UnraisableHookArgs) -> None:
        late = str(unraisable.exc_value) == "Event loop is closed"
        if not late and not inspect.iscoroutine(unraisable.object):
            self._hook(unraisable)

    def end(self, failed: bool) -> None:
        """Ends it, but not after a failure: something may come late."""
        if failed:
            return
        sys.unraisablehook = self._hook
        for logger in self._loggers:
            logger.removeFilter(_without_trace)


def _without_trace(record: logging.LogRecord) -> bool:
    of_orbax = "orbax" in record.pathname or "orbax" in record.getMessage()
    return not (record.exc_info and of_orbax)
