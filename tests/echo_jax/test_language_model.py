import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax import arrays
from echo_jax.model import language_model
from echo_jax.model.config import TextConfig

CONFIG = TextConfig(
    vocab_size=40,
    hidden_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    ffn_dim=40,
)


@pytest.mark.parametrize("remat", [False, True])
def test_continuations_of_one_prefix_equal_whole_rows(remat):
    params = arrays.init_params(language_model.param_specs(CONFIG), jax.random.key(0))
    lengths, group, prefix, answer = np.array([5, 9, 1]), 3, 9, 7
    rng = np.random.default_rng(0)
    x_qpe = rng.normal(size=(3, prefix, 24)).astype(np.float32)
    x_bte = rng.normal(size=(9, answer, 24)).astype(np.float32)
    rows = np.zeros((9, prefix + answer, 24), np.float32)
    columns = np.repeat(lengths, group)[:, None] + np.arange(answer)
    for b, length in enumerate(np.repeat(lengths, group)):
        rows[b, :length] = x_qpe[b // group, :length]
        rows[b, length : length + answer] = x_bte[b]

    def whole(params, rows):
        hidden = language_model.forward(CONFIG, params, rows)
        return jnp.take_along_axis(hidden, columns[..., None], axis=1)

    def shared(params, x_qpe, x_bte):
        return language_model.forward_continuations(CONFIG, params, x_qpe, lengths, x_bte, remat)

    np.testing.assert_allclose(
        shared(params, x_qpe, x_bte), whole(params, rows), atol=1e-5, rtol=1e-5
    )
    target = rng.normal(size=x_bte.shape)
    expected = jax.grad(lambda p: (whole(p, rows) * target).sum())(params)
    got = jax.grad(lambda p: (shared(p, x_qpe, x_bte) * target).sum())(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), got, expected)
