import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax import arrays
from echo_jax.model import language_model
from echo_jax.model.config import TextConfig
from echo_jax.model.execution import Execution

CONFIG = TextConfig(
    vocab_size=40,
    hidden_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    ffn_dim=40,
)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
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
        return language_model.forward_continuations(
            CONFIG, params, x_qpe, lengths, x_bte, Execution(remat)
        )

    np.testing.assert_allclose(
        shared(params, x_qpe, x_bte), whole(params, rows), atol=1e-5, rtol=1e-5
    )
    target = rng.normal(size=x_bte.shape)
    expected = jax.grad(lambda p: (whole(p, rows) * target).sum())(params)
    got = jax.grad(lambda p: (shared(p, x_qpe, x_bte) * target).sum())(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), got, expected)


def test_packed_rows_equal_rows_of_their_own():
    params = arrays.init_params(language_model.param_specs(CONFIG), jax.random.key(0))
    rng = np.random.default_rng(0)
    lengths = (5, 1, 7)
    single = [rng.normal(size=(1, length, 24)).astype(np.float32) for length in lengths]
    padding = rng.normal(size=(1, 3, 24)).astype(np.float32)
    packing = language_model.Packing(
        positions=np.concatenate([np.arange(n) for n in (*lengths, 3)])[None],
        segments=np.repeat(np.arange(1, 5) % 4, (*lengths, 3))[None],
    )
    packed = np.concatenate([*single, padding], axis=1)
    got = language_model.forward(CONFIG, params, packed, packing)
    begin = 0
    for x in single:
        expected = language_model.forward(CONFIG, params, x)
        length = x.shape[1]
        np.testing.assert_allclose(got[:, begin : begin + length], expected, atol=1e-5)
        begin += length


@pytest.mark.parametrize("chunk", [6, 14])
@pytest.mark.parametrize("copies", [1, 2])
def test_chunks_of_named_rows_land_where_they_belong(chunk, copies):
    """Rows grow up to their last slot, padding reaches beyond it, and a row is named twice."""
    params = arrays.init_params(language_model.param_specs(CONFIG), jax.random.key(0))
    slots, lengths = 12, np.array([0, 7, 3, 10, 5])
    named, num_new = np.array([3, 1, 1, 4]), np.array([2, 0, 5, 4])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, slots, 24)).astype(np.float32)
    x_new = rng.normal(size=(4, chunk, 24)).astype(np.float32)
    specs = language_model.KVCache.specs(CONFIG, 5, slots, copies=copies)
    empty = jax.tree.map(
        lambda spec: jnp.zeros(spec.shape, spec.dtype), specs, is_leaf=arrays.is_spec
    )
    # The prompts are as long as the cache: slots beyond a row's length hold what no query may see.
    before = language_model.prefill(CONFIG, params, empty, x, lengths, np.arange(5)[:, None])[1]
    hidden, after = language_model.extend(CONFIG, params, before, x_new, num_new, rows=named)

    grown = dict(zip(named[num_new > 0], np.flatnonzero(num_new), strict=True))
    np.testing.assert_array_equal(after.length, lengths + np.array([0, 5, 0, 2, 4]))
    for row, length in enumerate(lengths):
        end = length + (num_new[grown[row]] if row in grown else 0)
        # Nothing but the new slots is touched, to the bit.
        untouched = np.r_[:length, end:slots]
        for old, new in ((before.k, after.k), (before.v, after.v)):
            np.testing.assert_array_equal(old[:, row, untouched], new[:, row, untouched])
        if row in grown:
            entry = grown[row]
            whole = np.concatenate([x[row, :length], x_new[entry, : num_new[entry]]])[None]
            expected = language_model.forward(CONFIG, params, whole)[0, length:]
            np.testing.assert_allclose(hidden[entry, : num_new[entry]], expected, atol=1e-5)
