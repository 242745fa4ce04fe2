"""Memory and time of loading a checkpoint into sharded arrays, and of writing these back.

  python -m benchmarks.loading [--model qwen2.5-omni-3b] [--layers N] [--dtype bfloat16] [--folder DIR]

Generates a checkpoint of that shape (random bf16, a temporary folder), loads it onto 8 simulated CPU devices over which
the `embed` axis is divided, as the trainer divides it, and exports it again; then the same with two processes of 4
devices. The exported files must equal the generated ones, byte for byte.

Printed: the peak of the resident memory minus what it was before the load and minus the bytes of the arrays; seconds,
and bytes of the checkpoint a second; and how many bytes of it each process asked for. The system may still hold the
files in its cache; it reads whole pages of 4 KB, of which a process that holds some columns uses a part.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.lib.stride_tricks import as_strided

from echo_jax import arrays, huggingface
from echo_jax.arrays import ArraySpec, Params, ShardingRules
from echo_jax.model import thinker
from echo_jax.model.config import ThinkerConfig

GB = 1e9
DEVICES = 8
# Beyond the two checkpoints on disk.
SPARE_DISK_BYTES = 1 << 30


def main(argv: Sequence[str] | None = None) -> None:
    """Prints two lines (load, export) for one process, and two for each of two processes."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.loading", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--model", default="qwen2.5-omni-3b", help="a preset of ThinkerConfig")
    parser.add_argument("--layers", type=int, help="so many layers instead of the preset's")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the checkpoints go; removed afterwards, by default in the system's",
    )
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.process is not None:
        measure(args)
        return

    config = _config(args.model, args.layers)
    stored = arrays.count_parameters(thinker.param_specs(config)) * 2
    exported = stored * jnp.dtype(args.dtype).itemsize // 2
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        need, free = stored + exported + SPARE_DISK_BYTES, shutil.disk_usage(folder).free
        if free < need:
            raise SystemExit(
                f"benchmarks.loading: {folder.parent} has {free / GB:.1f} GB free and {need / GB:.1f} GB are needed; "
                "give another --folder, fewer --layers or a smaller --model"
            )
        started = time.monotonic()
        huggingface.save_pretrained(folder / "generated", config, generated(config))
        print(
            f"{args.model}, {config.text.num_layers} layers: a checkpoint of {stored / GB:.2f} GB, generated in "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
        for processes in (1, 2):
            _run(args, folder, processes)
            if args.dtype == "bfloat16":
                _compare(folder)
            shutil.rmtree(folder / "exported")


def _config(model: str, layers: int | None) -> ThinkerConfig:
    config = ThinkerConfig.preset(model)
    if layers is None:
        return config
    return dataclasses.replace(
        config,
        audio=dataclasses.replace(config.audio, num_layers=layers),
        text=dataclasses.replace(config.text, num_layers=layers),
    )


def generated(config: ThinkerConfig) -> Params:
    """A parameter tree that takes next to no memory: each array is a window over the same random bf16 numbers.

    Rows and layers begin at other places of it, so that no two of them are equal.
    """
    bits = np.random.default_rng(0).integers(0, 1 << 16, 1 << 22, dtype=np.uint16)
    # Sign and mantissa are random, the exponent is one of a few around 1.
    pool = ((bits & 0x81FF) | 0x3E00).view(np.dtype(jnp.bfloat16))

    def window(spec: ArraySpec) -> np.ndarray:
        steps = (401, 53, 7, 1)[-len(spec.shape) :]
        return as_strided(pool, spec.shape, [2 * step for step in steps], writeable=False)

    return jax.tree.map(window, thinker.param_specs(config), is_leaf=arrays.is_spec)


def _run(args: argparse.Namespace, folder: Path, processes: int) -> None:
    """Measures in so many processes at once, and prints what they found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={DEVICES // processes}"
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.loading"),
                *(f"--dtype={args.dtype}", f"--folder={folder}", f"--coordinator={coordinator}"),
                *(f"--process={process}", f"--processes={processes}"),
            ],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    for number, process in enumerate(started):
        output = process.communicate()[0]
        if process.returncode:
            for other in started:
                other.kill()
            raise SystemExit(f"benchmarks.loading: process {number} of {processes} failed")
        # Libraries may print more, before it and behind.
        (line,) = (line for line in output.splitlines() if line.startswith("{"))
        found = json.loads(line)
        whole = found["checkpoint_bytes"]
        print(
            f"process {number + 1} of {processes}, {DEVICES // processes} devices, {args.dtype}: "
            f"{found['array_bytes'] / GB:.2f} GB of arrays; read {found['read_bytes'] / GB:.2f} of "
            f"{whole / GB:.2f} GB ({found['read_bytes'] / whole:.0%})"
        )
        for what in ("load", "export"):
            beyond, seconds = found[what]["beyond_bytes"], found[what]["seconds"]
            print(
                f"  {what}: beyond the arrays {beyond / GB:.2f} GB, {seconds:.1f} s, "
                f"{whole / GB / seconds:.2f} GB/s",
                flush=True,
            )


def measure(args: argparse.Namespace) -> None:
    """One process: loads and exports, and prints what that took as JSON."""
    if args.processes > 1:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    rules = ShardingRules(embed="fsdp")
    read: list[int] = []
    found: dict[str, Any] = {}

    def load() -> tuple[ThinkerConfig, Params]:
        return huggingface.load_pretrained(
            args.folder / "generated",
            jnp.dtype(args.dtype),
            lambda config: arrays.shardings(thinker.param_specs(config), mesh, rules),
            read.append,
        )

    before = _resident_bytes("VmRSS")
    (config, params), found["load"] = _watched(load)
    held = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
    )
    _, found["export"] = _watched(
        lambda: huggingface.save_pretrained(args.folder / "exported", config, params)
    )
    for what in ("load", "export"):
        found[what]["beyond_bytes"] = found[what].pop("peak_bytes") - before - held
    found |= {
        "array_bytes": held,
        "read_bytes": sum(read),
        "checkpoint_bytes": arrays.count_parameters(thinker.param_specs(config)) * 2,
    }
    print(json.dumps(found))


def _watched(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `run` returns, its seconds, and the largest resident memory while it ran."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets earlier peaks
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    return result, {"seconds": seconds, "peak_bytes": _resident_bytes("VmHWM")}


def _resident_bytes(field: str) -> int:
    """Resident memory of this process as Linux counts it: VmRSS, now, or VmHWM, the most so far.

    Mapped files are in it. Unlike ru_maxrss it does not start with what the parent process had.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _compare(folder: Path) -> None:
    """Raises SystemExit unless the exported files of tensors equal the generated ones."""
    for file in sorted((folder / "generated").glob("model*")):
        if not filecmp.cmp(file, folder / "exported" / file.name, shallow=False):
            raise SystemExit(f"benchmarks.loading: {file.name} was exported differently")


if __name__ == "__main__":
    main()
