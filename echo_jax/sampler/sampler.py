"""The sampler that callers hold: compiles the loop and the prefill, on one device or on a mesh."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from echo_jax.arrays import Params, ShardingRules, is_spec
from echo_jax.model import frontend
from echo_jax.model.config import ThinkerConfig
from echo_jax.sampler import admission
from echo_jax.sampler.loop import NO_LIMIT, Loop
from echo_jax.sampler.sharding import head_copies
from echo_jax.sampler.state import FinishReason, Prompts, Rollout, SamplerState, SamplingOptions
from echo_jax.text.automaton import Automaton
from echo_jax.text.tokenizer import Tokenizer


class Sampler:
    """Answers batches of prompts with one model configuration and one set of options.

    Example:
      sampler = Sampler(config, tokenizer, SamplingOptions(temperature=0.0))
      rollout = sampler(params, prompts, jax.random.key(0))

    Attributes:
      config, options, mesh, rules: as given.
      automaton: the tag grammar over the vocabulary.
      sampleable: bool[V], the tokens that an answer may hold.
      programs: one line for each prefill and each loop that has been compiled so far, with its shapes.
    """

    def __init__(
        self,
        config: ThinkerConfig,
        tokenizer: Tokenizer,
        options: SamplingOptions,
        mesh: Mesh | AbstractMesh | None = None,
        rules: ShardingRules | None = None,
    ):
        """Builds the tables of the vocabulary; nothing is compiled before the first call.

        Args:
          config: sizes of the model.
          tokenizer: its vocabulary.
          options: how to sample.
          mesh: devices to run on, its axes of type Auto; None for one device. Parameters come sharded by `rules`.
          rules: for the mesh, e.g. `decode_rules`; `batch` names the axes over which rows are divided, and
            `cache_heads` the one over which the cache's heads are.

        Raises:
          ValueError: model and tokenizer do not belong together, the vocabulary cannot stop at `</seg>`, or the mesh
            does not divide the heads.
        """
        for name in ("im_end_id", "audio_token_id", "audio_bos_id", "audio_eos_id"):
            model_id, id_ = getattr(config, name), tokenizer.config_ids[name]
            if model_id != id_:
                raise ValueError(
                    f"the model's {name} is {model_id} but the tokenizer's is {id_}; load both from one checkpoint"
                )
        if (mesh is None) != (rules is None):
            raise ValueError("mesh and rules go together: give both, or neither for one device")
        if mesh is not None and any(kind != AxisType.Auto for kind in mesh.axis_types):
            raise ValueError(
                f"the mesh's axes are {mesh.axis_types}; make it with jax.sharding.Mesh, or with axis_types Auto"
            )
        self.config = config
        self.options = options
        self.mesh = mesh
        self.rules = rules or ShardingRules()
        self.automaton = Automaton.build(tokenizer.token_bytes, config.text.vocab_size)
        # No control token but <|im_end|> can be sampled: a literal <|AUDIO|> in an answer would be taken for sound.
        self.sampleable = tokenizer.sampleable(config.text.vocab_size)
        self.programs: list[str] = []
        axes = self.rules.batch or ()
        self._data_axes = (axes,) if isinstance(axes, str) else tuple(axes)
        self._copies = head_copies(config.text, mesh, self.rules)
        # The state is donated: its cache, by far the largest buffer, is updated in place from call to call.
        self._empty = jax.jit(self._empty_impl, static_argnums=0)
        self._admit = jax.jit(self._admit_impl, donate_argnames="state")
        self._run = jax.jit(self._run_impl, donate_argnames="state")
        self._take = jax.jit(self._take_impl, donate_argnames="state")

    @property
    def num_shards(self) -> int:
        """Over how many data shards the rows are divided."""
        return math.prod(self.mesh.shape[axis] for axis in self._data_axes) if self.mesh else 1

    def __call__(
        self, params: Params, prompts: Prompts, key: jax.Array, num_samples: int = 1
    ) -> Rollout:
        """Answers every prompt `num_samples` times.

        Args:
          params: the model's arrays.
          prompts: Q questions.
          key: one typed random key; row r uses `fold_in(key, r)`. Or a key array [Q * num_samples], one a row.
          num_samples: answers a prompt (the G of GRPO); they share one prefill.

        Returns:
          Q * num_samples rows; rows [q * num_samples, (q + 1) * num_samples) answer prompt q.

        Raises:
          ValueError: the keys or the prompts have the wrong shape; see `start`.
        """
        return self.finish(self.run(params, self.start(params, prompts, key, num_samples)))

    def start(
        self, params: Params, prompts: Prompts, key: jax.Array, num_samples: int = 1
    ) -> SamplerState:
        """Prefills the prompts and returns the state before the first sampled token.

        Raises:
          ValueError: num_samples is not positive, `key` is no typed key or not one a row, the prompts' arrays do not
            fit each other, or they cannot be divided over the mesh.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples {num_samples} must be at least 1")
        prompts.check()
        count, prompt_tokens = prompts.tokens.shape
        rows = count * num_samples
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"key has dtype {key.dtype}; make a typed key with jax.random.key(seed)"
            )
        if key.ndim == 0:
            key = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
        if key.shape != (rows,):
            raise ValueError(
                f"key has shape {key.shape}; give one key, or one for each of the {rows} rows"
            )
        state = self.empty(params, rows, prompt_tokens, prompts.waveforms.shape[1], key[0])
        here = np.arange(rows, dtype=np.int32).reshape(count, num_samples)
        here = here % (rows // self.num_shards)
        return self.admit(params, state, prompts, key.reshape(count, num_samples), here)

    def empty(
        self, params: Params, rows: int, prompt_tokens: int, samples: int, key: jax.Array
    ) -> SamplerState:
        """Returns a state of `rows` rows without questions.

        Args:
          params: the model's arrays, whose dtype the cache takes.
          rows: B, a multiple of the mesh's data shards.
          prompt_tokens: room for a prompt.
          samples: room for a recording, a multiple of 160.
          key: any key of the kind that will be admitted.

        Raises:
          ValueError: the rows cannot be divided over the mesh.
        """
        if rows % self.num_shards:
            raise ValueError(
                f"{rows} rows cannot be divided over the mesh's {self.num_shards} data shards; give a multiple"
            )
        dtype = params["language_model"]["embed"]["embedding"].dtype
        return self._empty((rows, prompt_tokens, samples, dtype), key)

    def admit(
        self,
        params: Params,
        state: SamplerState,
        prompts: Prompts,
        keys: jax.Array,
        rows: np.ndarray,
    ) -> SamplerState:
        """Prefills prompts into rows of the state, over whatever these held. Consumes `state`.

        Args:
          params: the model's arrays.
          state: B rows.
          prompts: Q prompts, no longer than the state has room for. On a mesh, the first Q / shards of them go to the
            first data shard's rows, and so on.
          keys: typed keys [Q, G], one an answer.
          rows: i32[Q, G], the rows of each prompt's G answers, counted inside the shard; numbers beyond the shard's
            rows leave an answer out.

        Raises:
          ValueError: the prompts do not fit the state, or cannot be divided over the mesh.
        """
        prompts.check()
        count, length = prompts.tokens.shape
        room = state.tokens.shape[1] - self.options.max_response_tokens
        if length > room or prompts.waveforms.shape[1] > state.waveforms.shape[1]:
            raise ValueError(
                f"prompts of {length} tokens and {prompts.waveforms.shape[1]} samples do not fit a state made for "
                f"{room} tokens and {state.waveforms.shape[1]} samples"
            )
        for name in ("max_response_tokens", "max_turns"):
            given, most = getattr(prompts, name), getattr(self.options, name)
            if isinstance(given, np.ndarray) and ((given < 1) | (given > most)).any():
                raise ValueError(
                    f"prompts.{name} is {given.tolist()}; all must lie in [1, {most}], the options' own"
                )
        if count % self.num_shards:
            raise ValueError(
                f"{count} prompts cannot be divided over the mesh's {self.num_shards} data shards; give a multiple"
            )
        return self._admit(params, state, prompts, keys, rows)

    def run(
        self,
        params: Params,
        state: SamplerState,
        max_steps: int | None = None,
        min_finished: int | None = None,
    ) -> SamplerState:
        """Runs until no row is active. Consumes `state`.

        Args:
          params: the model's arrays.
          state: of `start`, `admit` or an earlier call.
          max_steps: stop after so many steps of the loop (streaming of single tokens).
          min_finished: stop as soon as so many rows hold a finished answer, old ones included (refilling of rows).
        """
        limits = [NO_LIMIT if limit is None else limit for limit in (max_steps, min_finished)]
        return self._run(params, state, np.array(limits, np.int32))

    def take(self, state: SamplerState, rows: np.ndarray) -> tuple[SamplerState, Rollout]:
        """Takes answers out of a state, whose rows are empty from then on. Consumes `state`.

        Args:
          state: of `run`.
          rows: i32[N], rows that have finished, counted over all shards; numbers of B or more leave places out.

        Returns:
          The state, and N rows (meaningless where a place was left out).
        """
        return self._take(state, rows)

    @staticmethod
    def finish(state: SamplerState) -> Rollout:
        """Keeps what a trainer or an evaluator needs of a state."""
        return Rollout(**{name: getattr(state, name) for name in Rollout.__dataclass_fields__})

    # ------------------------------------------------------------------------------------------------ mesh

    def _on_shards(self, function: Callable[..., Any], *specs: Any) -> Callable[..., Any]:
        """A function on each data shard's part of its arguments; other mesh axes are the compiler's."""
        if not self._data_axes:
            return function
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=specs,
            out_specs=self._rows_specs(),
            axis_names=set(self._data_axes),
            check_vma=False,
        )

    def _state_specs(self, rules: ShardingRules) -> SamplerState:
        """A `PartitionSpec` for each array of the state."""
        specs = SamplerState.specs(self.config, self.options, 1, 1, 1)
        return jax.tree.map(
            lambda spec: rules.partition_spec(spec.logical_axes), specs, is_leaf=is_spec
        )

    def _constrained(self, state: SamplerState) -> SamplerState:
        if self.mesh is None:
            return state
        shardings = jax.tree.map(
            functools.partial(NamedSharding, self.mesh),
            self._state_specs(self.rules),
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )
        return jax.lax.with_sharding_constraint(state, shardings)

    def _rows_specs(self) -> SamplerState:
        return self._state_specs(ShardingRules(batch=self.rules.batch))

    # ------------------------------------------------------------------------------------------------ admit

    def _empty_impl(self, sizes: tuple[int, int, int, Any], key: jax.Array) -> SamplerState:
        rows, prompt_tokens, samples, dtype = sizes
        specs = SamplerState.specs(
            self.config,
            self.options,
            rows,
            prompt_tokens,
            samples,
            dtype,
            head_copies=self._copies,
        )
        state = jax.tree.map(
            lambda spec: jnp.zeros(spec.shape, spec.dtype),
            specs.replace(keys=None),
            is_leaf=is_spec,
        )
        return self._constrained(
            state.replace(
                finish_reason=jnp.full_like(state.finish_reason, FinishReason.EMPTY),
                keys=jnp.broadcast_to(key, specs.keys.shape),
            )
        )

    def _admit_impl(
        self,
        params: Params,
        state: SamplerState,
        prompts: Prompts,
        keys: jax.Array,
        rows: jax.Array,
    ) -> SamplerState:
        count, length = prompts.tokens.shape
        self.programs.append(
            f"prefill of {count} prompts of {length} tokens and {_seconds(prompts.waveforms)} s, "
            f"{rows.shape[1]} answers each, into {len(state.tokens)} rows"
        )
        split = PartitionSpec(self._data_axes)
        admit = self._on_shards(
            functools.partial(admission.admit, self.config, self.options, self.automaton),
            PartitionSpec(),
            self._rows_specs(),
            split,
            split,
            split,
        )
        return self._constrained(admit(params, state, prompts, keys, rows))

    def _run_impl(self, params: Params, state: SamplerState, limits: jax.Array) -> SamplerState:
        self.programs.append(
            f"loop over {len(state.tokens)} rows of {state.tokens.shape[1]} tokens and "
            f"{_seconds(state.waveforms)} s"
        )
        loop = Loop(self.config, self.options, self.automaton, self.sampleable, self._data_axes)
        run = self._on_shards(loop.run, PartitionSpec(), self._rows_specs(), PartitionSpec())
        return self._constrained(run(params, state, limits))

    def _take_impl(self, state: SamplerState, rows: jax.Array) -> tuple[SamplerState, Rollout]:
        taken = jax.tree.map(
            lambda x: x.at[rows].get(mode="clip") if x.ndim else x, self.finish(state)
        )
        emptied = state.finish_reason.at[rows].set(int(FinishReason.EMPTY), mode="drop")
        # Constrained as everywhere, or the next call would find another sharding and compile again.
        return self._constrained(state.replace(finish_reason=emptied)), taken


def _seconds(waveforms: Any) -> str:
    return f"{waveforms.shape[1] / frontend.SAMPLE_RATE:g}"
