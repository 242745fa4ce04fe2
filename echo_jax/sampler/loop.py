"""The interleaved loop: Algorithm 1 of the Echo paper (arXiv 2602.11909) for a batch of rows, on device.

One `lax.while_loop` runs from the prompt to the last token, and goes back and forth between two things:

  decode   every row that does not wait takes one token. The tag automaton reads its bytes; a row that closes a valid
           `<seg>a, b</seg>` starts to wait. Only that part of the cache is read which the longest row has reached,
           in steps of an eighth of its length.
  insert   once enough rows wait for audio, or one has waited long, or none can decode: up to `insertion_slots` waiting
           rows get their clip. It is cut from the row's own waveform, gets its own log-mel, goes through the audio
           tower in a fixed-length buffer, and extends the row's cache in one chunk.

In Algorithm 1 generation stops at the string `</seg>`, so a token such as `>,` loses its tail. Here every token whose
bytes begin with the rest of `</seg>` is one *stop event*: a token is drawn from the ordinary distribution, replaced by
the token that spells exactly the rest, and the log-probability is that of the whole event.

On a mesh every data shard runs this loop on its own rows, with its own insertion slots. What to do next is decided
together (a few numbers are reduced each step), so that all devices run the same programs at the same time.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echo_jax.arrays import Params, ShardingRules, is_spec
from echo_jax.model import frontend, language_model, thinker
from echo_jax.model.config import TextConfig, ThinkerConfig
from echo_jax.sampler.sampling import NEVER, draw, sampling_logits
from echo_jax.sampler.state import FinishReason, Prompts, Rollout, SamplerState, SamplingOptions
from echo_jax.text import segments
from echo_jax.text.automaton import Automaton
from echo_jax.text.tokenizer import Tokenizer

_NO_LIMIT = np.iinfo(np.int32).max
# The cache is read in steps of an eighth of its length, but not in smaller ones than this.
_LEAST_CACHE_STEP = 256


class Sampler:
    """Answers batches of prompts with one model configuration and one set of options.

    Example:
      sampler = Sampler(config, tokenizer, SamplingOptions(temperature=0.0))
      rollout = sampler(params, prompts, jax.random.key(0))

    Attributes:
      config, options, mesh, rules: as given.
      automaton: the tag grammar over the vocabulary.
      sampleable: bool[V], the tokens that an answer may hold.
      programs: one line for each program that has been compiled so far, with its shapes.
    """

    def __init__(
        self,
        config: ThinkerConfig,
        tokenizer: Tokenizer,
        options: SamplingOptions,
        mesh: Mesh | None = None,
        rules: ShardingRules | None = None,
    ):
        """Builds the tables of the vocabulary; nothing is compiled before the first call.

        Args:
          config: sizes of the model.
          tokenizer: its vocabulary.
          options: how to sample.
          mesh: devices to run on; None for one device. Parameters then come sharded by `rules`.
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
        self._head_copies = _head_copies(config.text, mesh, self.rules)
        # The state is donated: its cache, by far the largest buffer, is updated in place from call to call.
        self._empty = jax.jit(self._empty_impl, static_argnums=0)
        self._admit = jax.jit(self._admit_impl, donate_argnames="state")
        self._run = jax.jit(self._run_impl, donate_argnames="state")

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
        prompts.check_shapes()
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
        prompts.check_shapes()
        count, length = prompts.tokens.shape
        room = state.tokens.shape[1] - self.options.max_response_tokens
        if length > room or prompts.waveforms.shape[1] > state.waveforms.shape[1]:
            raise ValueError(
                f"prompts of {length} tokens and {prompts.waveforms.shape[1]} samples do not fit a state made for "
                f"{room} tokens and {state.waveforms.shape[1]} samples"
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
          min_finished: stop as soon as so many rows have finished (refilling of rows).
        """
        limits = [_NO_LIMIT if limit is None else limit for limit in (max_steps, min_finished)]
        return self._run(params, state, np.array(limits, np.int32))

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
            head_copies=self._head_copies,
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
            self._admit_rows, PartitionSpec(), self._rows_specs(), split, split, split
        )
        return self._constrained(admit(params, state, prompts, keys, rows))

    def _admit_rows(
        self,
        params: Params,
        state: SamplerState,
        prompts: Prompts,
        keys: jax.Array,
        rows: jax.Array,
    ) -> SamplerState:
        config, options = self.config, self.options
        count, group = rows.shape
        tokens = jnp.asarray(prompts.tokens)
        padding = jnp.arange(tokens.shape[1]) >= jnp.asarray(prompts.length)[:, None]
        tokens = jnp.where(padding, config.pad_id, tokens)
        clips = [
            thinker.AudioClips(
                jnp.asarray(prompts.waveforms),
                jnp.asarray(prompts.num_samples),
                jnp.arange(count),
                jnp.asarray(prompts.audio_start),
            )
        ]
        if prompts.other_clips is not None:
            others = prompts.other_clips
            clips.append(
                others.replace(row=jnp.arange(len(others.row)) // (len(others.row) // count))
            )
        x = thinker.embed_tokens(config, params, tokens, tuple(clips))
        # All but the last token: the last one is the first pending token.
        _, cache = language_model.prefill(
            config.text,
            params["language_model"],
            state.cache,
            x,
            jnp.asarray(prompts.length) - 1,
            rows,
        )
        at = rows.reshape(-1)

        def put(old: jax.Array, new: Any, fill: int = 0) -> jax.Array:
            """Writes a value a prompt, [Q, ...], into the rows; shorter ones are filled up."""
            new = jnp.asarray(new)
            missing = [have - len_ for have, len_ in zip(old.shape[1:], new.shape[1:], strict=True)]
            new = jnp.pad(new, [(0, 0), *((0, n) for n in missing)], constant_values=fill)
            return old.at[at].set(jnp.repeat(new, group, axis=0), mode="drop")

        def reset(old: jax.Array, value: Any) -> jax.Array:
            return old.at[at].set(value, mode="drop")

        def limit(given: Any, most: int) -> jax.Array:
            return jnp.full(count, most, jnp.int32) if given is None else jnp.clip(given, 1, most)

        shift = prompts.insert_shift_samples
        return state.replace(
            cache=cache,
            waveforms=put(
                state.waveforms,
                prompts.waveforms if prompts.insert_waveforms is None else prompts.insert_waveforms,
            ),
            num_samples=put(state.num_samples, prompts.num_samples),
            insert_shift=put(
                state.insert_shift, jnp.zeros(count, jnp.int32) if shift is None else shift
            ),
            budget=put(
                state.budget, limit(prompts.max_response_tokens, options.max_response_tokens)
            ),
            max_turns=put(state.max_turns, limit(prompts.max_turns, options.max_turns)),
            tokens=put(state.tokens, tokens, config.pad_id),
            prompt_length=put(state.prompt_length, prompts.length),
            length=put(state.length, prompts.length),
            logprob=reset(state.logprob, 0.0),
            model_logprob=reset(state.model_logprob, 0.0),
            sampled=reset(state.sampled, False),
            stop_rest=reset(state.stop_rest, -1),
            stop_reason=reset(state.stop_reason, -1),
            tag=jax.tree.map(reset, state.tag, self.automaton.init(())),
            waiting=reset(state.waiting, False),
            waited=reset(state.waited, 0),
            num_turns=reset(state.num_turns, 1),
            num_segments=reset(state.num_segments, 0),
            segment_samples=reset(state.segment_samples, 0),
            segment_token_start=reset(state.segment_token_start, 0),
            finish_reason=reset(state.finish_reason, int(FinishReason.ACTIVE)),
            keys=reset(state.keys, keys.reshape(-1)),
        )

    # ------------------------------------------------------------------------------------------------ loop

    def _run_impl(self, params: Params, state: SamplerState, limits: jax.Array) -> SamplerState:
        self.programs.append(
            f"loop over {len(state.tokens)} rows of {state.tokens.shape[1]} tokens and "
            f"{_seconds(state.waveforms)} s"
        )
        run = self._on_shards(self._run_rows, PartitionSpec(), self._rows_specs(), PartitionSpec())
        return self._constrained(run(params, state, limits))

    def _run_rows(self, params: Params, state: SamplerState, limits: jax.Array) -> SamplerState:
        last_step = state.num_decode_steps + state.num_insert_steps
        last_step = jnp.where(limits[0] < _NO_LIMIT - last_step, last_step + limits[0], _NO_LIMIT)
        capacity = state.tokens.shape[1]
        step = max(_LEAST_CACHE_STEP, -(-capacity // 8))

        def goes_on(state: SamplerState, now: "_Situation") -> jax.Array:
            steps = state.num_decode_steps + state.num_insert_steps
            return now.active & (steps < last_step) & (now.finished < limits[1])

        def decode_while_short(
            visible: int, carry: tuple[SamplerState, _Situation]
        ) -> tuple[SamplerState, _Situation]:
            def short(carry: tuple[SamplerState, _Situation]) -> jax.Array:
                now = carry[1]
                return goes_on(*carry) & ~now.insert & (now.longest <= visible)

            def decode(carry: tuple[SamplerState, _Situation]) -> tuple[SamplerState, _Situation]:
                state = self._decode(params, carry[0], visible)
                return state, self._situation(state)

            return jax.lax.while_loop(short, decode, carry)

        def insert_while_due(
            carry: tuple[SamplerState, _Situation],
        ) -> tuple[SamplerState, _Situation]:
            def due(carry: tuple[SamplerState, _Situation]) -> jax.Array:
                return goes_on(*carry) & carry[1].insert

            def insert(carry: tuple[SamplerState, _Situation]) -> tuple[SamplerState, _Situation]:
                state = self._insert(params, carry[0])
                return state, self._situation(state)

            # A loop and no `cond`: it works on the cache in place for certain.
            return jax.lax.while_loop(due, insert, carry)

        def round_(carry: tuple[SamplerState, _Situation]) -> tuple[SamplerState, _Situation]:
            for visible in [*range(step, capacity, step), capacity]:
                carry = decode_while_short(visible, carry)
            return insert_while_due(carry) if self.options.insert_audio else carry

        state, _ = jax.lax.while_loop(
            lambda carry: goes_on(*carry), round_, (state, self._situation(state))
        )
        return state

    def _situation(self, state: SamplerState) -> "_Situation":
        waiting = state.waiting & state.active
        full = waiting.sum() >= min(self.options.insertion_slots, len(waiting))
        late = jnp.where(waiting, state.waited, 0).max() >= self.options.insertion_patience
        most = jnp.stack(
            [
                state.active.any().astype(jnp.int32),
                (state.active & ~waiting).any().astype(jnp.int32),
                (full | late).astype(jnp.int32),
                jnp.where(state.active, state.length, 0).max(),
            ]
        )
        finished = (state.finish_reason >= FinishReason.END).sum()
        if self._data_axes:
            most = jax.lax.pmax(most, self._data_axes)
            finished = jax.lax.psum(finished, self._data_axes)
        active, moving, due, longest = most
        return _Situation(active > 0, (due > 0) | (moving == 0), longest, finished)

    def _decode(self, params: Params, state: SamplerState, visible: int) -> SamplerState:
        """One token for every row that is neither finished nor waiting; all are at most `visible` tokens long."""
        config, options = self.config, self.options
        rows = jnp.arange(len(state.tokens))
        moving = state.active & ~state.waiting
        pending = state.tokens[rows, state.length - 1]
        logits, cache = thinker.decode_step(config, params, state.cache, pending, moving, visible)
        logits = jnp.where(self.sampleable, logits, NEVER)
        drawn_from = sampling_logits(logits, options)
        # A row's randomness depends on its own key and position alone, not on the step of the loop.
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.length - state.prompt_length)
        token = draw(drawn_from, keys, options)
        rest = jnp.full_like(token, -1)
        if options.insert_audio:
            rest = self.automaton.rest_index(state.tag)
            token = self.automaton.stop_event(rest, token)
            # Kept only where the token is the stop event, so that a replay needs no second look at the tables.
            rest = jnp.where(token == jnp.asarray(self.automaton.canonical)[rest], rest, -1)

        def log_prob(logits: jax.Array) -> jax.Array:
            return self.automaton.event_logit(logits, rest, token) - jax.nn.logsumexp(logits, -1)

        logprob = log_prob(drawn_from)
        model_logprob = logprob if drawn_from is logits else log_prob(logits)

        write_at = jnp.where(moving, state.length, state.tokens.shape[1])
        length = state.length + moving
        tag = jax.tree.map(
            lambda new, old: jnp.where(moving, new, old),
            self.automaton.advance(state.tag, token),
            state.tag,
        )
        finish = state.finish_reason
        num_turns, waiting, segment_samples = state.num_turns, state.waiting, state.segment_samples
        reason = jnp.full_like(token, -1)
        if options.insert_audio:
            closed = moving & tag.closed
            last_turn = closed & (num_turns >= state.max_turns)
            num_turns = num_turns + (closed & ~last_turn)
            begin, end, reason = segments.check_clip(
                tag.reason, tag.begin, tag.end, state.num_samples
            )
            audio_tokens = frontend.num_audio_tokens(end - begin)
            # <|audio_bos|>, the audio and <|audio_eos|> fit whole or not at all, with room for a token after them.
            fits = length - state.prompt_length + audio_tokens + 2 < state.budget
            reason = jnp.where(
                reason != segments.Reason.VALID,
                reason,
                jnp.where(
                    last_turn,
                    segments.Reason.NO_TURNS_LEFT,
                    jnp.where(fits, segments.Reason.VALID, segments.Reason.NO_ROOM),
                ),
            )
            reason = jnp.where(closed, reason, -1)
            insert = reason == segments.Reason.VALID
            waiting = waiting | insert
            slot = jnp.where(insert, state.num_segments, segment_samples.shape[1])
            segment_samples = segment_samples.at[rows, slot].set(
                jnp.stack([begin, end], -1), mode="drop"
            )
            finish = jnp.where(reason == segments.Reason.NO_ROOM, FinishReason.TOKEN_BUDGET, finish)
            finish = jnp.where(last_turn, FinishReason.TURN_LIMIT, finish)
        used_up = moving & (length - state.prompt_length >= state.budget)
        ended = moving & (token == config.im_end_id)
        finish = jnp.where(
            used_up & (finish == FinishReason.ACTIVE), FinishReason.TOKEN_BUDGET, finish
        )
        finish = jnp.where(ended, FinishReason.END, finish)

        def written(record: jax.Array, value: Any) -> jax.Array:
            return record.at[rows, write_at].set(value, mode="drop")

        return state.replace(
            cache=cache,
            tokens=written(state.tokens, token),
            length=length,
            logprob=written(state.logprob, logprob),
            model_logprob=written(state.model_logprob, model_logprob),
            sampled=written(state.sampled, True),
            stop_rest=written(state.stop_rest, rest),
            stop_reason=written(state.stop_reason, reason),
            tag=tag,
            waiting=waiting & (finish == FinishReason.ACTIVE),
            waited=jnp.where(state.waiting, state.waited + 1, 0),
            num_turns=num_turns,
            segment_samples=segment_samples,
            finish_reason=finish,
            num_decode_steps=state.num_decode_steps + 1,
        )

    def _insert(self, params: Params, state: SamplerState) -> SamplerState:
        """Puts their clip into the context of up to `insertion_slots` waiting rows, those that wait longest first."""
        count = min(self.options.insertion_slots, len(state.tokens))
        # The slots that are left over name rows that do not wait, and write nothing.
        row = jnp.argsort(jnp.where(state.waiting, -state.waited, 1), stable=True)[:count]
        used = state.waiting[row]
        span = state.segment_samples[
            row, jnp.minimum(state.num_segments[row], state.segment_samples.shape[1] - 1)
        ]
        begin, num_samples = span[:, 0], jnp.where(used, span[:, 1] - span[:, 0], 0)
        longest = num_samples.max()
        if self._data_axes:
            longest = jax.lax.pmax(longest, self._data_axes)
        buffers = self.options.segment_buffers(state.waveforms.shape[1])
        bucket = jnp.searchsorted(jnp.asarray(buffers), longest)
        branches = [functools.partial(self._insert_clips, params, buffer) for buffer in buffers]
        return jax.lax.switch(bucket, branches, state, row, begin, num_samples)

    def _insert_clips(
        self,
        params: Params,
        buffer_samples: int,
        state: SamplerState,
        row: jax.Array,
        begin: jax.Array,
        num_samples: jax.Array,
    ) -> SamplerState:
        config = self.config
        clip = cut_segments(
            state.waveforms,
            state.num_samples,
            state.insert_shift,
            row,
            begin,
            num_samples,
            buffer_samples,
        )
        audio = thinker.encode_audio(config, params, clip, num_samples)
        num_audio = jnp.where(num_samples > 0, frontend.num_audio_tokens(num_samples), 0)

        # The chunk that is fed: the pending `>` of the tag, <|audio_bos|>, the clip. <|audio_eos|> becomes pending.
        pending = state.tokens[row, state.length[row] - 1]
        head = jnp.stack([pending, jnp.full_like(pending, config.audio_bos_id)], axis=1)
        head = language_model.embed(params["language_model"], head)
        x = jnp.concatenate([head, audio.astype(head.dtype)], axis=1)
        num_new = jnp.where(num_samples > 0, num_audio + 2, 0)
        _, cache = language_model.extend(
            config.text, params["language_model"], state.cache, x, num_new, rows=row
        )

        offsets = jnp.arange(audio.shape[1] + 2)
        inserted = jnp.where(offsets == 0, config.audio_bos_id, config.audio_token_id)
        inserted = jnp.where(offsets == num_audio[:, None] + 1, config.audio_eos_id, inserted)
        columns = jnp.where(
            offsets < num_new[:, None], state.length[row][:, None] + offsets, state.tokens.shape[1]
        )
        slot = jnp.where(
            num_samples > 0, state.num_segments[row], state.segment_token_start.shape[1]
        )
        return state.replace(
            cache=cache,
            tokens=state.tokens.at[row[:, None], columns].set(inserted, mode="drop"),
            length=state.length.at[row].add(num_new),
            waiting=state.waiting.at[row].set(False),
            waited=state.waited.at[row].set(0),
            segment_token_start=state.segment_token_start.at[row, slot].set(
                state.length[row] + 1, mode="drop"
            ),
            num_segments=state.num_segments.at[row].add(num_samples > 0),
            num_insert_steps=state.num_insert_steps + 1,
        )


def _seconds(waveforms: Any) -> str:
    return f"{waveforms.shape[1] / frontend.SAMPLE_RATE:g}"


class _Situation(NamedTuple):
    """What decides the next step, the same on all devices.

    Attributes:
      active: bool, whether a row is not finished.
      insert: bool, whether waiting rows get their audio next.
      longest: i32, tokens of the longest active row.
      finished: i32, rows that hold a finished answer.
    """

    active: jax.Array
    insert: jax.Array
    longest: jax.Array
    finished: jax.Array


def decode_rules(
    config: TextConfig, mesh: Mesh, data: str = "data", tensor: str = "tensor"
) -> ShardingRules:
    """Shardings for sampling: rows over `data`; heads, FFN and vocabulary over `tensor`; the rest on every device.

    Where the mesh has more tensor shards than the model has key/value heads, their projections are on every device, and
    the cache holds each head once for every shard that needs it.
    """
    few = mesh.shape[tensor] > config.num_kv_heads
    return ShardingRules(
        batch=data,
        vocab=tensor,
        heads=tensor,
        kv_heads=None if few else tensor,
        cache_heads=tensor,
        mlp=tensor,
    )


def _head_copies(config: TextConfig, mesh: Mesh | None, rules: ShardingRules) -> int:
    """How often the cache holds a key/value head: once, or as often as shards of the cache share it."""
    axes = rules.cache_heads or ()
    names = (axes,) if isinstance(axes, str) else axes
    shards = math.prod(mesh.shape[axis] for axis in names) if mesh else 1
    if config.num_heads % shards:
        raise ValueError(
            f"{config.num_heads} heads cannot be divided over {shards} shards of the cache; use a smaller tensor axis"
        )
    if config.num_kv_heads % shards == 0:
        return 1
    if shards % config.num_kv_heads == 0:
        return shards // config.num_kv_heads
    raise ValueError(
        f"{config.num_kv_heads} key/value heads and {shards} shards of the cache do not divide each other; use another "
        "tensor axis"
    )


def cut_segments(
    waveforms: jax.Array,
    recording_samples: jax.Array,
    shift_samples: jax.Array,
    row: jax.Array,
    begin: jax.Array,
    num_samples: jax.Array,
    buffer_samples: int,
) -> jax.Array:
    """Cuts clips from recordings.

    Args:
      waveforms: f32[R, S], the recordings.
      recording_samples: i32[R], their lengths.
      shift_samples: i32[R], how much later than `begin` to cut, wrapping round so that clips stay whole (a control).
      row: i32[C], whose recording.
      begin: i32[C], first sample.
      num_samples: i32[C], length, at most buffer_samples.
      buffer_samples: length of the result.

    Returns:
      f32[C, buffer_samples], zero beyond num_samples.
    """
    places = jnp.maximum(recording_samples[row] - num_samples + 1, 1)
    begin = (begin + shift_samples[row]) % places
    offsets = jnp.arange(buffer_samples)
    clip = (
        jnp.asarray(waveforms)
        .at[row[:, None], begin[:, None] + offsets]
        .get(mode="fill", fill_value=0.0)
    )
    return jnp.where(offsets < num_samples[:, None], clip, 0.0)
