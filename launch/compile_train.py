"""Compiles the steps of a training config for TPUs that are not there.

  python -m launch.compile_check --config=configs/grpo.py:echo_7b --topology=v5e:4x4 [--config.mesh.fsdp=8 ...]

The functions are those that `launch.train` runs, with the shapes and shardings of a real step and nothing in them: the
update of SFT; the update and the log-probabilities of GRPO. (Its rollouts are the sampler's programs, which the same
command checks without --config.) A line a program:

  peak, args    GiB a chip (`Compiled.memory_analysis`), and of them arguments: parameters, optimizer, batch.
  TFLOP         a chip: what the program asks for (`launch/operations.py`), over the same without recomputation and with
                plain attention, which are the model's own.
  sent          GB a chip that collectives bring or take, by kind (`launch/collectives.py`); an all-reduce goes round
                twice. Minimum: each trained language model weight gathered twice and its gradient scattered once, each
                other weight gathered once.
  step          seconds by roofline: the largest of operations, bytes read from HBM and bytes sent over the chip's
                peaks, and which it is; and the share of the peak that the model's own operations then have.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data.command_line import define_config
from data.command_line import run as command
from echo_jax import arrays
from echo_jax.arrays import Placement
from echo_jax.model import thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.sampler import Prompts
from echo_jax.text.tokenizer import Tokenizer
from echo_jax.train import replay, sft
from echo_jax.train.step import PRECISIONS
from launch import chat_stage, collectives, devices, grpo_stage, hlo, inputs, operations
from launch.checks import check_config
from launch.stage import Model, Updater, stored_specs
from launch.tpu_compiler import (
    HBM_GIB,
    DoesNotFitError,
    compile_for,
    model_config,
    prepare,
    topology_devices,
)

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted function and abstract arguments for it.

    Attributes:
      name: for the table.
      function: jitted.
      arguments: `jax.ShapeDtypeStruct`, sharded.
      trains: whether it has a backward pass.
    """

    name: str
    function: Any
    arguments: tuple[PyTree, ...]
    trains: bool


def abstract_model(
    config: ConfigDict, thinker_config: ThinkerConfig, tokenizer: Tokenizer, placement: Placement
) -> Model:
    """A model whose arrays are shapes."""
    specs = stored_specs(config, thinker_config)
    params = arrays.abstract_params(specs, placement.mesh, placement.rules)
    return Model(thinker_config, params, tokenizer, placement)


def update_arguments(updater: Updater, model: Model, batch: PyTree) -> tuple[PyTree, ...]:
    """Arguments of `Updater.update`: trainable, frozen, optimizer state, micro-batches."""
    trainable = updater.trainable(model.params)
    frozen = jax.tree.map(
        lambda leaf, kept: leaf if kept is None else None,
        model.params,
        trainable,
        is_leaf=lambda leaf: leaf is None,
    )
    return trainable, frozen, updater.abstract_state(model.params), batch


def abstract_batch(placement: Placement, *leading: str | None) -> Any:
    """A function (dtype, *shape) -> array whose axis after `leading` is the batch."""
    sharding = placement.sharding(*leading, "batch")

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return array


def chat_batch(config: ConfigDict, placement: Placement) -> sft.ChatBatch:
    """Micro-batches of the SFT stage: rows of data.max_tokens, one clip each, half of them targets."""
    count = config.micro_batches
    rows, length = config.batch_size // count, config.data.max_tokens
    array = abstract_batch(placement, None)
    targets = length // 2
    return sft.ChatBatch(
        tokens=array(jnp.int32, count, rows, length),
        positions=array(jnp.int32, count, rows, targets),
        clips=thinker.AudioClips(
            waveforms=array(jnp.float32, count, rows, inputs.clip_samples(config)),
            num_samples=array(jnp.int32, count, rows),
            row=array(jnp.int32, count, rows),
            start=array(jnp.int32, count, rows),
        ),
    )


def replay_batch(
    config: ConfigDict, placement: Placement, options: replay.ReplayOptions
) -> replay.ReplayBatch:
    """Micro-batches of the GRPO stage: full prompts, full answers, the least slots for clips."""
    count = config.queries_per_minibatch // config.queries_per_microbatch
    queries = config.queries_per_microbatch * options.copies
    rows = queries * options.group
    array = abstract_batch(placement, None)
    length = config.sampling.max_response_tokens + 1
    length = -(-length // options.token_multiple) * options.token_multiple
    sampled = config.sampling.max_response_tokens
    sampled = -(-sampled // options.target_multiple) * options.target_multiple
    shards = placement.num_shards("batch")
    local = rows // shards
    least = options.least_slots or (local, *[max(local // 8, 1)] * (len(options.buffers) - 1))
    segments = tuple(
        replay.SegmentSlots(*(array(jnp.int32, count, shards * slots) for _ in range(4)))
        for slots in least
    )
    return replay.ReplayBatch(
        prompts=Prompts(
            tokens=array(jnp.int32, count, queries, config.data.max_tokens),
            length=array(jnp.int32, count, queries),
            waveforms=array(jnp.float32, count, queries, inputs.clip_samples(config)),
            num_samples=array(jnp.int32, count, queries),
            audio_start=array(jnp.int32, count, queries),
        ),
        tokens=array(jnp.int32, count, rows, length),
        positions=array(jnp.int32, count, rows, sampled),
        stop_rest=array(jnp.int32, count, rows, sampled),
        old_logprob=array(jnp.float32, count, rows, sampled),
        advantage=array(jnp.float32, count, rows),
        segments=segments,
    )


def steps(config: ConfigDict, model: Model) -> list[Step]:
    """What a step of the config's stage runs."""
    if config.stage != "grpo":
        updater, _ = chat_stage.build(config, model)
        arguments = update_arguments(updater, model, chat_batch(config, model.placement))
        return [Step("update", updater.update, arguments, trains=True)]
    programs = grpo_stage.programs(config, model)
    batch = replay_batch(config, model.placement, programs.replay_options)
    reference = batch.old_logprob if config.loss.kl_coefficient else None
    arguments = update_arguments(programs.updater, model, (batch, reference))
    return [
        Step("log-probabilities", programs.logprobs, (model.params, batch), trains=False),
        Step("update", programs.updater.update, arguments, trains=True),
    ]


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of a chip, as its maker gives them.

    Attributes:
      flops: operations a second, bfloat16.
      hbm: bytes a second.
      links: bytes a second to other chips, all links together.
    """

    flops: float
    hbm: float
    links: float


CHIPS = {
    "v5e": Chip(197e12, 819e9, 200e9),
    "v5p": Chip(459e12, 2765e9, 600e9),
    "v6e": Chip(918e12, 1640e9, 448e9),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """A line of the table; everything is a chip's.

    Attributes:
      topology, mesh, program: what was compiled.
      hbm_gib, peak_gib, argument_gib: memory.
      hardware_flops, model_flops: operations asked for, and without recomputation.
      read_bytes: from HBM.
      sent: bytes by kind of collective.
      least_sent: what sharded weights cannot do without.
      compile_seconds: that the compiler took.
    """

    topology: str
    mesh: str
    program: str
    hbm_gib: float
    peak_gib: float
    argument_gib: float
    hardware_flops: float
    model_flops: float
    read_bytes: int
    sent: dict[str, int]
    least_sent: float
    compile_seconds: float

    @property
    def seconds(self) -> dict[str, float]:
        """By roofline, what each resource alone would take."""
        chip = CHIPS[self.topology.partition(":")[0]]
        rounds = {kind: 2 if kind == "all-reduce" else 1 for kind in self.sent}
        return {
            "operations": self.hardware_flops / chip.flops,
            "HBM": self.read_bytes / chip.hbm,
            "links": sum(rounds[kind] * size for kind, size in self.sent.items()) / chip.links,
        }

    def line(self) -> str:
        """A row of a Markdown table."""
        seconds = self.seconds
        bottleneck = max(seconds, key=seconds.__getitem__)
        chip = CHIPS[self.topology.partition(":")[0]]
        share = self.model_flops / seconds[bottleneck] / chip.flops
        sent = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in sorted(self.sent.items()))
        cells = [
            f"{self.topology}, {self.mesh}",
            self.program,
            "yes" if self.peak_gib <= self.hbm_gib else "no",
            f"{self.peak_gib:.1f} ({self.argument_gib:.1f}) of {self.hbm_gib:.2f}",
            f"{self.hardware_flops / 1e12:.0f} / {self.model_flops / 1e12:.0f} = "
            f"{self.hardware_flops / self.model_flops:.2f}",
            f"{sent}; minimum {self.least_sent / 1e9:.1f}",
            f"{seconds[bottleneck]:.2f} ({bottleneck}), {100 * share:.0f} %",
            f"{self.compile_seconds:.0f}",
        ]
        return f"| {' | '.join(cells)} |"


HEADER = (
    "| topology, data x fsdp x tensor | program | fits | GiB: peak (args) | TFLOP: asked / model | GB sent "
    "| step in s by roofline, model's share of the peak | compiled in s |\n|---|---|---|---|---|---|---|---|"
)


def least_sent(config: ConfigDict, model: Model, step: Step) -> float:
    """Bytes that a chip gathers of weights and scatters of gradients, at least, for all micro-batches."""
    placement = model.placement
    if placement.num_shards("embed") == 1:
        return 0.0
    tensor = placement.num_shards("mlp")
    width = jnp.dtype(PRECISIONS[config.precision].compute).itemsize
    language = arrays.count_parameters(thinker.param_specs(model.config)["language_model"])
    tower = arrays.count_parameters(thinker.param_specs(model.config)["audio_tower"])
    once = arrays.count_parameters(
        [
            spec
            for name, spec in thinker.param_specs(model.config)["language_model"].items()
            if name in ("embed", "lm_head")
        ]
    )
    # The tables are gathered once a pass; the layers again for the backward pass.
    weights = 3 * (language - once) + 2 * once + tower if step.trains else language + tower
    micro_batches = jax.tree.leaves(step.arguments[-1])[0].shape[0]
    return weights * width / tensor * micro_batches


def check(topology: str, config: ConfigDict, model: Model, hbm_gib: float) -> Iterator[Report]:
    """Compiles every program of a config for its mesh."""
    assert model.placement.mesh is not None
    chips = model.placement.mesh.size
    # The model's own operations: nothing recomputed, no kernel that computes scores twice.
    plain_config = copy.deepcopy(config)
    plain_config.remat, plain_config.attention = "none", "plain"
    for step, plain in zip(steps(config, model), steps(plain_config, model), strict=True):
        traced = step.function.trace(*step.arguments)
        lowered = traced.lower(lowering_platforms=("tpu",))
        compiled, seconds = compile_for(topology, step.name, lowered)
        program = hlo.Program(compiled.as_text())
        memory = compiled.memory_analysis()
        yield Report(
            topology=topology,
            mesh=" x ".join(str(size) for size in model.placement.mesh.shape.values()),
            program=step.name,
            hbm_gib=hbm_gib,
            peak_gib=memory.peak_memory_in_bytes / 2**30,
            argument_gib=memory.argument_size_in_bytes / 2**30,
            hardware_flops=operations.count(traced.jaxpr) / chips,
            model_flops=operations.count(plain.function.trace(*plain.arguments).jaxpr) / chips,
            read_bytes=hlo.total_bytes(program.reads(program.computations[program.entry])),
            sent=collectives.by_kind(collectives.collectives(program)),
            least_sent=least_sent(config, model, step),
            compile_seconds=seconds,
        )


# -------------------- command line --------------------


def define(values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    define_config(values, "The stage: configs/grpo.py:echo_7b.")
    flags.DEFINE_list("topology", list(HBM_GIB), "Such as v5e:4x4.", flag_values=values)
    flags.DEFINE_string(
        "model", "qwen2.5-omni-7b", "A preset of ThinkerConfig.", flag_values=values
    )
    flags.DEFINE_integer(
        "layers", None, "Of both towers, instead of the preset's.", flag_values=values
    )
    flags.DEFINE_string("json", None, "A file to write the table to, too.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Prints the table, a line as soon as its program is compiled.

    Raises:
      ValueError: the config, the topology or the mesh means nothing.
    """
    config = values.config
    check_config(config)
    if not config.data.max_tokens:
        raise ValueError(
            "config.data.max_tokens=0 measures records, of which there are none here; give a length"
        )
    if config.attention == "auto":
        config.attention = "splash"
    prepare()
    tokenizer = Tokenizer.from_qwen_wheel()
    thinker_config = model_config(values.model, values.layers, tokenizer)
    reports = []
    print(HEADER, flush=True)
    for topology in values.topology:
        chips = topology_devices(topology)
        shape = devices.mesh_shape(config.mesh, devices.AXES, len(chips), "mesh")
        mesh = Mesh(np.array(chips).reshape(shape), devices.AXES)
        placement = devices.placed_on(mesh, thinker_config)
        model = abstract_model(config, thinker_config, tokenizer, placement)
        for report in check(topology, config, model, HBM_GIB[topology.partition(":")[0]]):
            reports.append({**dataclasses.asdict(report), "seconds": report.seconds})
            print(report.line(), flush=True)
    if values.json:
        Path(values.json).write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status: 0, or 2 for a mistake in the call."""
    return command(
        argv,
        program="launch.compile_check",
        description=__doc__,
        define=define,
        main=run,
        required=("config", "topology"),
        expected=(DoesNotFitError,),
    )
