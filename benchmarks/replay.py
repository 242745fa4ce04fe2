"""How much faster GRPO's replay is when a prompt is run once for all answers of its group than with whole rows.

  python -m benchmarks.replay [--prompt 200 800] [--answer 64] [--queries 8] [--group 8] [--repeats 3]

Both take the gradient of the same sum of the answers' final hidden states, for the language model of the tiny preset;
their largest relative difference is printed with the ratio. Compilation is not timed; the best of the repeats counts.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import best_of, finished
from echo_jax import arrays
from echo_jax.arrays import Params
from echo_jax.model import language_model
from echo_jax.model.config import ThinkerConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one line a length of prompt: seconds with whole rows and with shared prompts, and their ratio."""
    parser = argparse.ArgumentParser(prog="benchmarks.replay", description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompt", type=int, nargs="+", default=[200, 800], help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="answers a query")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)

    config = ThinkerConfig.preset("tiny").text
    params = arrays.init_params(language_model.param_specs(config), jax.random.key(0))
    rng = np.random.default_rng(0)
    for prompt in args.prompt:
        x_qpe, x_bte = (
            rng.normal(size=(rows, length, config.hidden_size)).astype(np.float32)
            for rows, length in (
                (args.queries, prompt),
                (args.queries * args.group, args.answer),
            )
        )

        def whole(params: Params, x_qpe: jax.Array, x_bte: jax.Array) -> jax.Array:
            rows = jnp.concatenate([jnp.repeat(x_qpe, args.group, axis=0), x_bte], axis=1)
            hidden = language_model.forward(config, params, rows)
            return hidden[:, x_qpe.shape[1] :].sum()

        def shared(params: Params, x_qpe: jax.Array, x_bte: jax.Array) -> jax.Array:
            lengths = jnp.full(len(x_qpe), x_qpe.shape[1])
            return language_model.forward_continuations(config, params, x_qpe, lengths, x_bte).sum()

        found, seconds = [], []
        for loss in (whole, shared):
            gradient = functools.partial(jax.jit(jax.grad(loss)), params, x_qpe, x_bte)
            result, best = best_of(args.repeats, functools.partial(finished, gradient))
            found.append(result["layers"])
            seconds.append(best)
        differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(a).max(), *found)
        print(
            f"prompt {prompt}, {args.group} answers of {args.answer}: whole rows {seconds[0]:.2f} s, "
            f"shared prompt {seconds[1]:.2f} s, {seconds[0] / seconds[1]:.1f} times as fast; "
            f"gradients differ by {max(jax.tree.leaves(differences)):.1e}"
        )


if __name__ == "__main__":
    main()
