"""Runs the sampler on meshes of eight CPU devices and on one device, and compares; run by `test_mesh.py`.

python -m tests.echo_jax.sampler.on_mesh
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from echo_jax import arrays
from echo_jax.model import thinker
from echo_jax.sampler import Request, Sampler, SamplingOptions, decode_rules, stream
from tests import compilations
from tests.echo_jax.sampler.test_loop import assert_same_answers
from tests.echo_jax.sampler.test_stream import alone
from tests.models import citing_model, citing_tokenizer, noise_prompts

OPTIONS = SamplingOptions(
    max_response_tokens=48, max_turns=4, insertion_slots=2, segment_seconds=()
)
SAMPLES = 25_600


def main() -> None:
    """Prints one line a mesh.

    Raises:
      AssertionError: an answer differs.
    """
    tokenizer = citing_tokenizer()
    config, params = citing_model(tokenizer)
    config = dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, num_heads=4, num_kv_heads=2, head_dim=8),
        audio=dataclasses.replace(config.audio, num_heads=4),
    )
    specs = thinker.param_specs(config)
    drawn = arrays.init_params(specs, jax.random.key(1))
    # The head and the embedding that make citations likely; sizes that the mesh divides for the rest.
    for name in ("embed", "lm_head", "final_norm"):
        if name in params["language_model"]:
            drawn["language_model"][name] = params["language_model"][name]
    params = jax.device_get(drawn)
    rng = np.random.default_rng(0)
    questions = [(int(rng.integers(4_800, SAMPLES)), " What?") for _ in range(8)]
    prompts = noise_prompts(tokenizer, questions, capacity=SAMPLES)
    keys = jax.random.split(jax.random.key(5), 16)
    want = jax.device_get(Sampler(config, tokenizer, OPTIONS)(params, prompts, keys, 2))
    print(f"one device: {int(want.num_segments.sum())} insertions in {len(want.length)} answers")
    assert want.num_segments.sum() >= 4

    for data, tensor in ((8, 1), (4, 2), (2, 4)):
        mesh = Mesh(np.array(jax.devices()).reshape(data, tensor), ("data", "tensor"))
        rules = decode_rules(config.text, mesh)
        sampler = Sampler(config, tokenizer, OPTIONS, mesh, rules)
        sharded = jax.tree.map(
            lambda spec, x, mesh=mesh, rules=rules: jax.device_put(
                x, NamedSharding(mesh, rules.partition_spec(spec.logical_axes))
            ),
            specs,
            params,
            is_leaf=arrays.is_spec,
        )
        got = sampler(sharded, prompts, keys, 2)
        state = sampler.start(sharded, prompts, keys, 2)
        heads = state.cache.k.sharding.shard_shape(state.cache.k.shape)[3]
        assert_same_answers(jax.device_get(got), want)
        one_key = [jax.random.fold_in(keys[i], 0) for i in range(8)]
        wanted = jax.device_get(
            Sampler(config, tokenizer, OPTIONS)(params, prompts, jax.numpy.stack(one_key))
        )
        with compilations.heard() as compiled:
            answers = stream(
                sampler,
                sharded,
                [Request(alone(prompts, i), keys[i]) for i in range(8)],
                rows=8,
                prompt_tokens=(prompts.tokens.shape[1],),
                samples=SAMPLES,
                refill=data,
            )
            for answer in answers:
                one = jax.tree.map(
                    lambda x, i=answer.index: x[i : i + 1] if np.ndim(x) else x, wanted
                )
                assert_same_answers(answer.rollout, one)
        # One shape, one program: nothing that a call returns makes the next one compile again.
        for name in ("empty", "admit", "run", "take"):
            assert compiled.count(f"jit(_{name}_impl)") == 1, compiled
        print(f"data {data} x tensor {tensor}: equal, {heads} cache heads a device")


if __name__ == "__main__":
    main()
