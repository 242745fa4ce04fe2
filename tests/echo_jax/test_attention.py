import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.model import attention
from echo_jax.model.execution import Execution


def inputs(queries: int, keys: int, heads: int = 4, kv_heads: int = 2, width: int = 128):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, queries, heads, width)).astype(np.float32)
    k, v = (rng.normal(size=(2, keys, kv_heads, width)).astype(np.float32) for _ in range(2))
    ids = np.sort(rng.integers(0, 3, (2, keys)), axis=1).astype(np.int32)
    return q, k, v, ids[:, keys - queries :], ids


def by_hand(q, k, v, ids_q, ids_kv):
    """One query at a time, over the keys that it may see."""
    out = np.zeros_like(q)
    queries, keys = q.shape[1], k.shape[1]
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = [s for s in range(t + keys - queries + 1) if ids_kv[b, s] == ids_q[b, t]]
        group = h * k.shape[2] // q.shape[2]
        scores = k[b, seen, group] @ q[b, t, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v[b, seen, group] / weights.sum()
    return out


@pytest.mark.parametrize("queries", [6, 10])
def test_segments_see_themselves_and_what_came_before(queries):
    given = inputs(queries, 10, width=8)
    got = attention.by_segment(*given, Execution())
    np.testing.assert_allclose(got, by_hand(*given), atol=1e-5)


@pytest.mark.parametrize("queries", [128, 256])
def test_the_splash_kernel_agrees_with_plain_attention(queries):
    *given, ids_q, ids_kv = inputs(queries, 256)
    target = np.random.default_rng(1).normal(size=given[0].shape)

    def loss(q, k, v, kind):
        return (
            attention.by_segment(q, k, v, ids_q, ids_kv, Execution(attention=kind)) * target
        ).sum()

    for kind in ("plain", "splash_interpreted"):
        out = attention.by_segment(*given, ids_q, ids_kv, Execution(attention=kind))
        gradients = jax.grad(loss, (0, 1, 2))(*map(jnp.asarray, given), kind)
        if kind == "plain":
            expected = (out, *gradients)
        else:
            for one, other in zip((out, *gradients), expected, strict=True):
                np.testing.assert_allclose(one, other, atol=2e-4)


def test_lengths_that_the_splash_kernel_cannot_cut_are_named():
    with pytest.raises(ValueError, match="splash attention of 100 queries and 100 keys"):
        attention.by_segment(*inputs(100, 100), Execution(attention="splash"))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"config\.remat='all' must be one of none, full, dots"):
        Execution(remat="all")
    with pytest.raises(ValueError, match=r"config\.attention='flash' must be one of plain"):
        Execution(attention="flash")
