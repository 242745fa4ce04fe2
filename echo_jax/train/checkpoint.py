"""Checkpoints: everything a run needs to go on exactly, as one orbax step.

A step holds the parameters, the optimizer state, the step, the random key, the position of the data
iterator and the config. Orbax writes to a temporary directory and renames it, so a run that is
killed while writing leaves the checkpoint before it intact.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.struct
import grain.checkpoint
import jax
import orbax.checkpoint as ocp

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """What changes from step to step.

    Attributes:
        step: finished steps; a Python int.
        params: the whole parameter tree, frozen parts included.
        opt_state: of the trainable part.
        key: typed key from which the next step derives its randomness.
    """

    step: int = flax.struct.field(pytree_node=False)
    params: PyTree
    opt_state: PyTree
    key: jax.Array


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message is one line for the person who started the run."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: made when it is missing.
        keep_last: how many of the newest steps stay.
        asynchronous: write in the background while training goes on.
    """

    def __init__(self, directory: Path, keep_last: int = 2, asynchronous: bool = True) -> None:
        if keep_last < 1:
            raise CheckpointError(f"checkpoint.keep_last must be at least 1, not {keep_last}")
        self._directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep_last,
                enable_async_checkpointing=asynchronous,
                cleanup_tmp_directories=True,
            ),
            item_handlers={
                "arrays": ocp.StandardCheckpointHandler(),
                "host": ocp.JsonCheckpointHandler(),
                "iterator": grain.checkpoint.CheckpointHandler(),
            },
        )

    def latest_step(self) -> int | None:
        """The newest finished step, None when there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, iterator: Any, config: dict[str, Any]) -> None:
        """Writes `state.step`; a step that is already there is left alone.

        Args:
            state: of the run; its arrays may be donated to the next step as soon as this returns.
            iterator: a grain iterator, positioned after the last batch that `state` has seen.
            config: plain values that survive JSON, kept for `stored_config`.
        """
        if state.step in self._manager.all_steps():
            return
        self._manager.save(
            state.step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(_arrays(state)),
                host=ocp.args.JsonSave(
                    {"step": state.step, "config": json.loads(json.dumps(config))}
                ),
                iterator=grain.checkpoint.CheckpointSave(iterator),
            ),
        )

    def restore(self, template: TrainState, iterator: Any) -> TrainState:
        """The newest step, bit for bit; moves `iterator` to where it stood.

        Args:
            template: a state of the same shapes, dtypes and shardings; its arrays may be
                `jax.ShapeDtypeStruct`.
            iterator: a grain iterator over the same data with the same settings.

        Raises:
            CheckpointError: there is no checkpoint, it does not fit the template, or it is damaged
            (the message names the directory).
        """
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"no checkpoint in {self._directory}")
        wanted = _arrays(template)
        if other := self._other_array(step, wanted):
            raise CheckpointError(
                f"checkpoint {self._directory / str(step)} does not fit this config ({other}); use another --workdir"
            )
        restored = self._read(
            step,
            ocp.args.Composite(
                arrays=ocp.args.StandardRestore(wanted),
                iterator=grain.checkpoint.CheckpointRestore(iterator),
            ),
        )
        arrays = restored["arrays"]
        return TrainState(
            step=step,
            params=arrays["params"],
            opt_state=arrays["opt_state"],
            key=jax.random.wrap_key_data(arrays["key"]),
        )

    def stored_config(self) -> dict[str, Any]:
        """The config of the newest step.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.
        """
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"no checkpoint in {self._directory}")
        host = self._read(step, ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]
        if not isinstance(host, dict) or not isinstance(host.get("config"), dict):
            raise self._damaged(step, "it holds no config")
        return host["config"]

    def _read(self, step: int, args: ocp.args.Composite) -> Any:
        """Items of a step.

        Raises:
            CheckpointError: one cannot be read; the message says how to go on without this step.
        """
        try:
            with _quiet_readers():
                return self._manager.restore(step, args=args)
        except Exception as error:  # what a damaged file raises has no narrower type
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            # What tensorstore adds is a page about its own state.
            raise self._damaged(step, reason.partition(". See full")[0]) from error

    def _damaged(self, step: int, reason: str) -> CheckpointError:
        earlier = [other for other in self._manager.all_steps() if other < step]
        where = f"go on from step {max(earlier)}" if earlier else "start anew"
        return CheckpointError(
            f"checkpoint {self._directory / str(step)} is damaged ({reason}); remove this folder to {where}"
        )

    def _other_array(self, step: int, wanted: PyTree) -> str:
        """The first array whose shape differs between a step and the template; "" if none does or none can be read."""
        with contextlib.suppress(Exception):
            stored = _shapes(self._manager.item_metadata(step)["arrays"].tree)
            expected = _shapes(wanted)
            for name in sorted(stored.keys() | expected.keys()):
                if stored.get(name) != expected.get(name):
                    there, here = stored.get(name, "not there"), expected.get(name, "not")
                    return f"{name} is {there}, {here} in this run"
        return ""

    def close(self) -> None:
        """Waits for what is still being written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


@contextlib.contextmanager
def _quiet_readers() -> Iterator[None]:
    """Keeps to one line what a failed read says: orbax reads many arrays at once, and one that fails leaves the others.

    Those print a trace each, some as late as the end of the process; so only a read that succeeds puts the hook back.
    """
    before = sys.unraisablehook

    def others_only(unraisable: sys.UnraisableHookArgs) -> None:
        late = str(unraisable.exc_value) == "Event loop is closed"
        if not late and not inspect.iscoroutine(unraisable.object):
            before(unraisable)

    sys.unraisablehook = others_only
    yield
    sys.unraisablehook = before


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Array name -> shape, alike for dictionaries and the named tuples that were stored as such."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _arrays(state: TrainState) -> dict[str, PyTree]:
    # Orbax stores plain arrays; a typed key travels as its data.
    key = state.key
    data = (
        jax.eval_shape(jax.random.key_data, key)
        if isinstance(key, jax.ShapeDtypeStruct)
        else jax.random.key_data(key)
    )
    return {"params": state.params, "opt_state": state.opt_state, "key": data}
