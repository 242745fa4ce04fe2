"""Compiles the sampler for TPUs that are not there, and says whether it fits and what a decode step reads.

  python -m launch.compile_check --topology v5e:4x4 v6e:2x4 v5p:2x2x2 --model qwen2.5-omni-7b --tensor 4 --batch 64 \
      --positions 4096

The TPU compiler of libtpu runs without a TPU and without weights: it gets the `Sampler`'s own two programs, the loop
and an admission, with the shapes and shardings of their arguments. The table has one line a topology:

  peak, temp    GiB a chip of both programs, the larger number (`Compiled.memory_analysis`); peak holds the arguments,
                among them weights and cache, which are donated and updated in place.
  copies        instructions of either schedule that write what a layer holds of a cache buffer, a multiple of it, or
                all of its parts, to a new place (`hlo.Program.copies`); 0 is what is wanted.
  read / need   bytes that a decode step reads from HBM over weights and live cache. Read is summed over the schedule
                of the decode loop that reads all positions, with the scan over layers as often as it runs
                (`hlo.Program.reads`): an instruction reads its operands whole, with the padding of their tiles, or
                only the slice where it slices them. Operands in VMEM are free, and what brought them there is not.
                Need is what each chip holds of the language model, without the embeddings where they are a table of
                their own, and of the keys and values of a batch whose rows are all full.
  insertion     GB that an insertion reads, audio tower included, for the segment buffer that reads most.

It exits with 1 if something does not fit, is copied, or reads more than --max-ratio.

With --config=configs/grpo.py:echo_7b it compiles the steps of that config instead (`launch/compile_train.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from echo_jax import arrays
from echo_jax.arrays import ArraySpec, ShardingRules
from echo_jax.model import frontend, thinker
from echo_jax.sampler import Prompts, Sampler, SamplerState, SamplingOptions, decode_rules
from echo_jax.text.tokenizer import Tokenizer
from launch import compile_train, hlo
from launch.tpu_compiler import (
    HBM_GIB,
    DoesNotFitError,
    compile_for,
    model_config,
    prepare,
    topology_devices,
)

PROGRAM = "launch.compile_check"
TOPOLOGIES = ("v5e:4x4", "v6e:2x4", "v5p:2x2x2")
_GIB, _GB = 2**30, 1e9


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What is sampled.

    Attributes:
      batch: rows.
      positions: slots of the cache a row.
      prompt_tokens: of the positions, room for the prompt; the others are the response's budget.
      seconds: room for a recording.
      admitted: prompts of one admission.
    """

    batch: int
    positions: int
    prompt_tokens: int
    seconds: float
    admitted: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program.

    Attributes:
      seconds: that the compiler took.
      peak_bytes, temp_bytes: a chip.
      program: its schedule.
    """

    seconds: float
    peak_bytes: int
    temp_bytes: int
    program: hlo.Program


@dataclasses.dataclass(frozen=True)
class Report:
    """A line of the table; bytes are a chip's.

    Attributes:
      topology: as it was asked for.
      mesh: data and tensor shards.
      hbm_gib: of a chip.
      loop, admission: the programs.
      copies: instructions that copy a cache buffer.
      step: what a decode step reads at full length.
      needed_bytes: what it cannot do without.
      insertion_bytes: what an insertion reads.
    """

    topology: str
    mesh: tuple[int, int]
    hbm_gib: float
    loop: Compiled
    admission: Compiled
    copies: list[hlo.Instruction]
    step: list[hlo.Read]
    needed_bytes: int
    insertion_bytes: int

    @property
    def peak_gib(self) -> float:
        """Of the larger program."""
        return max(self.loop.peak_bytes, self.admission.peak_bytes) / _GIB

    @property
    def ratio(self) -> float:
        """Bytes read over bytes needed."""
        return hlo.total_bytes(self.step) / self.needed_bytes

    def line(self) -> str:
        """A row of a Markdown table."""
        temp = max(self.loop.temp_bytes, self.admission.temp_bytes) / _GIB
        cells = [
            f"{self.topology}, {self.mesh[0]} x {self.mesh[1]}",
            "yes" if self.peak_gib <= self.hbm_gib else "no",
            f"{self.peak_gib:.2f} of {self.hbm_gib:.2f}",
            f"{temp:.2f}",
            str(len(self.copies)),
            f"{hlo.total_bytes(self.step) / _GB:.2f} / {self.needed_bytes / _GB:.2f} = {self.ratio:.3f}",
            f"{self.insertion_bytes / _GB:.2f}",
            f"{self.loop.seconds:.0f} + {self.admission.seconds:.0f}",
        ]
        return f"| {' | '.join(cells)} |"


HEADER = (
    "| topology, data x tensor | fits | peak GiB a chip | temp GiB | copies of the cache | GB a step: read / need "
    "| GB an insertion | compiled in s |\n|---|---|---|---|---|---|---|---|"
)


def make_mesh(topology: str, data: int | None, tensor: int) -> Mesh:
    """The devices of a topology such as "v5e:4x4" as data x tensor; data None takes what tensor leaves.

    Raises:
      ValueError: there is no such topology, or it does not have that many chips.
    """
    chips = topology_devices(topology)
    if data is None:
        data = len(chips) // tensor
    if data * tensor != len(chips):
        raise ValueError(
            f"--topology {topology} has {len(chips)} chips, not {data} x {tensor} (data x tensor); change --data or "
            "--tensor"
        )
    return Mesh(np.array(chips).reshape(data, tensor), ("data", "tensor"))


def make_sampler(
    model: str, layers: int | None, options: SamplingOptions, mesh: Mesh, tokenizer: Tokenizer
) -> Sampler:
    """The sampler of a model preset, with fewer layers if asked."""
    config = model_config(model, layers, tokenizer)
    return Sampler(config, tokenizer, options, mesh, decode_rules(config.text, mesh))


def check(topology: str, sampler: Sampler, shapes: Shapes, texts: Path | None = None) -> Report:
    """Compiles a sampler's programs for its mesh.

    Args:
      topology: what to call the mesh's devices.
      sampler: on a mesh of axes data and tensor.
      shapes: what it samples.
      texts: a folder to write the schedules to.

    Raises:
      DoesNotFitError: a program needs more memory than a chip has.
      ValueError: the shapes do not fit the mesh.
    """
    mesh, rules = _placed(sampler)
    specs = jax.tree.map(
        lambda spec: dataclasses.replace(spec, dtype=jnp.bfloat16),
        thinker.param_specs(sampler.config),
        is_leaf=arrays.is_spec,
    )
    params = arrays.abstract_params(specs, mesh, rules)
    samples = round(shapes.seconds * frontend.SAMPLE_RATE)
    state = abstract_state(sampler, params, shapes, samples)

    def rows(dtype: Any, *shape: int) -> Any:
        return _array(mesh, PartitionSpec("data"), dtype, *shape)

    count = shapes.admitted
    prompts = Prompts(
        tokens=rows(jnp.int32, count, shapes.prompt_tokens),
        length=rows(jnp.int32, count),
        waveforms=rows(jnp.float32, count, samples),
        num_samples=rows(jnp.int32, count),
        audio_start=rows(jnp.int32, count),
    )
    keys = rows(state.keys.dtype, count, 1)
    limits = _array(mesh, PartitionSpec(), jnp.int32, 2)
    # The sampler's own jitted functions: what is checked is what runs.
    admission = _compile(
        topology, sampler._admit, (params, state, prompts, keys, rows(jnp.int32, count, 1)), texts
    )
    loop = _compile(topology, sampler._run, (params, state, limits), texts)

    buffer = _shard(state.cache.k)
    steps = list(_steps(loop.program, sampler, shapes, buffer))
    decode = [reads for is_decode, reads in steps if is_decode]
    insertions = [hlo.total_bytes(reads) for is_decode, reads in steps if not is_decode]
    if not decode:
        raise hlo.HloError("no decode loop found in the schedule")
    return Report(
        topology=topology,
        mesh=(mesh.shape["data"], mesh.shape["tensor"]),
        hbm_gib=HBM_GIB[topology.partition(":")[0]],
        loop=loop,
        admission=admission,
        copies=[
            instruction
            for compiled in (loop, admission)
            for instruction in compiled.program.copies(math.prod(buffer[1:]))
        ],
        step=max(decode, key=hlo.total_bytes),
        needed_bytes=_needed_bytes(params["language_model"], state),
        insertion_bytes=max(insertions, default=0),
    )


def abstract_state(
    sampler: Sampler, params: arrays.Params, shapes: Shapes, samples: int
) -> SamplerState:
    """Shapes and shardings of the sampler's state.

    Raises:
      ValueError: the rows cannot be divided over the mesh.
    """
    mesh, rules = _placed(sampler)
    state = jax.eval_shape(
        lambda: sampler.empty(
            params, shapes.batch, shapes.prompt_tokens, samples, jax.random.key(0)
        )
    )

    def place(spec: ArraySpec, array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return _array(mesh, rules.partition_spec(spec.logical_axes), array.dtype, *array.shape)

    specs = SamplerState.specs(sampler.config, sampler.options, 1, 1, 1)
    return jax.tree.map(place, specs, state, is_leaf=arrays.is_spec)


def _placed(sampler: Sampler) -> tuple[Mesh | AbstractMesh, ShardingRules]:
    if sampler.mesh is None:
        raise ValueError("the sampler has no mesh; make one with make_mesh")
    return sampler.mesh, sampler.rules


def _array(
    mesh: Mesh | AbstractMesh, spec: PartitionSpec, dtype: Any, *shape: int
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _shard(array: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """What one device holds of an array."""
    sharding = array.sharding
    assert sharding is not None
    return sharding.shard_shape(array.shape)


def _shard_bytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(_shard(array)) * array.dtype.itemsize


def _needed_bytes(params: arrays.Params, state: SamplerState) -> int:
    """Weights and live cache of a decode step of full rows."""
    weights = sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(params))
    if "lm_head" in params:
        # A few rows are looked up.
        weights -= _shard_bytes(params["embed"]["embedding"])
    return weights + _shard_bytes(state.cache.k) + _shard_bytes(state.cache.v)


def _compile(
    topology: str, function: Any, arguments: Sequence[Any], texts: Path | None
) -> Compiled:
    lowered = function.trace(*arguments).lower(lowering_platforms=("tpu",))
    compiled, seconds = compile_for(topology, function.__name__, lowered)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if texts is not None:
        texts.mkdir(parents=True, exist_ok=True)
        name = f"{topology.replace(':', '_')}.{function.__name__.strip('_')}.hlo"
        (texts / name).write_text(text, encoding="utf-8")
    return Compiled(
        seconds, memory.peak_memory_in_bytes, memory.temp_size_in_bytes, hlo.Program(text)
    )


def _steps(
    program: hlo.Program, sampler: Sampler, shapes: Shapes, buffer: tuple[int, ...]
) -> Iterator[tuple[bool, list[hlo.Read]]]:
    """The steps of the sampler's loop: whether it decodes, and what it reads.

    Each is the computation around a scan over layers that works on the cache. That of a decode step carries one hidden
    vector a row; that of an insertion, a chunk a slot.
    """
    hidden = sampler.config.text.hidden_size
    one_a_row = shapes.batch // sampler.num_shards * hidden
    for loop in program.loops():
        sizes = [array.elements for array in loop.instruction.arrays]
        if (
            sizes.count(math.prod(buffer)) < 2
            or program.trip_count(loop) != sampler.config.text.num_layers
        ):
            continue
        yield one_a_row in sizes, program.reads(loop.computation)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=(__doc__ or "").split("\n\n", maxsplit=1)[0]
    )
    parser.add_argument(
        "--topology", nargs="+", default=list(TOPOLOGIES), metavar="KIND:CHIPS", help="as v5e:4x4"
    )
    parser.add_argument("--model", default="qwen2.5-omni-7b", help="a preset of ThinkerConfig")
    parser.add_argument("--layers", type=int, help="of both towers, instead of the preset's")
    parser.add_argument("--data", type=int, help="shards of the batch; chips / tensor by default")
    parser.add_argument("--tensor", type=int, default=4, help="shards of heads, FFN and vocabulary")
    parser.add_argument("--batch", type=int, default=64, help="rows")
    parser.add_argument("--positions", type=int, default=4096, help="a row: prompt and response")
    parser.add_argument("--prompt-tokens", type=int, help="of the positions; half by default")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a recording")
    parser.add_argument("--admitted", type=int, help="prompts at once; an eighth of the batch")
    parser.add_argument("--max-ratio", type=float, default=1.2, help="of bytes read to needed")
    parser.add_argument("--reads", type=int, default=0, help="list the largest so many of a step")
    parser.add_argument("--hlo", type=Path, help="folder to write the schedules to")
    args = parser.parse_args(argv)
    for name in ("layers", "data", "tensor", "batch", "positions", "prompt_tokens", "admitted"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if args.prompt_tokens is None:
        args.prompt_tokens = args.positions // 2
    if not 0 < args.prompt_tokens < args.positions:
        parser.error(
            f"--prompt-tokens {args.prompt_tokens}: leave some of the {args.positions} --positions to the response"
        )
    if args.seconds * frontend.SAMPLE_RATE % frontend.HOP_SAMPLES or args.seconds <= 0:
        parser.error(f"--seconds {args.seconds}: give a multiple of 0.01")
    return args


def run(args: argparse.Namespace) -> bool:
    """Prints the table, a line as soon as its topology is compiled; returns whether all is well."""
    prepare()
    meshes = [make_mesh(topology, args.data, args.tensor) for topology in args.topology]
    shapes = []
    for mesh in meshes:
        shards = mesh.shape["data"]
        shape = Shapes(
            batch=args.batch,
            positions=args.positions,
            prompt_tokens=args.prompt_tokens,
            seconds=args.seconds,
            admitted=args.admitted or -(-args.batch // 8 // shards) * shards,
        )
        for flag, value in (("batch", shape.batch), ("admitted", shape.admitted)):
            if value % shards:
                raise ValueError(
                    f"--{flag} {value} cannot be divided over {shards} data shards; give a multiple"
                )
        shapes.append(shape)
    tokenizer = Tokenizer.from_qwen_wheel()
    options = SamplingOptions(max_response_tokens=args.positions - args.prompt_tokens)
    samplers = [make_sampler(args.model, args.layers, options, mesh, tokenizer) for mesh in meshes]
    wrong: list[str] = []
    print(HEADER, flush=True)
    for topology, sampler, shape in zip(args.topology, samplers, shapes, strict=True):
        try:
            report = check(topology, sampler, shape, args.hlo)
        except DoesNotFitError as error:
            wrong.append(str(error))
            continue
        print(report.line(), flush=True)
        for read in sorted(report.step, key=lambda read: -read.bytes)[: args.reads]:
            print(
                f"  {read.bytes / 1e6:8.2f} MB  {read.times} x {read.instruction}  {read.source}",
                file=sys.stderr,
            )
        wrong += [
            f"{topology}: %{copied.name} ({copied.opcode}) copies the cache"
            for copied in report.copies
        ]
        if report.ratio > args.max_ratio:
            wrong.append(
                f"{topology}: a step reads {report.ratio:.2f} times what it needs (--max-ratio {args.max_ratio:g}); "
                "--reads 20 shows the largest reads"
            )
    for line in wrong:
        print(f"{PROGRAM}: {line}", file=sys.stderr)
    return not wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 if a program is not as wanted, 2 for a mistake in the call."""
    given = sys.argv[1:] if argv is None else list(argv)
    if any(argument.startswith("--config") for argument in given):
        return compile_train.main([PROGRAM, *given])
    args = parse_args(given)
    try:
        return 0 if run(args) else 1
    except (OSError, ValueError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
