import jax.numpy as jnp
import numpy as np

from echo_jax.train import sft


def test_cross_entropy_by_hand():
    # Uniform logits over 4 tokens: log 4 a target; the first column is never a target.
    logits = jnp.zeros((1, 4, 4))
    result = sft.cross_entropy(logits, jnp.array([[1, 2, 0, 3]]), jnp.array([[1.0, 1.0, 0.0, 1.0]]))
    np.testing.assert_allclose(result["loss"][0], 2 * np.log(4), rtol=1e-6)
    assert result["loss"][1] == 2
    assert result["accuracy"] == (0.0, 2.0)


def test_only_marked_targets_count_and_micro_batches_add_up():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 6, 7)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 7, (4, 6)))
    mask = jnp.asarray(rng.random((4, 6)) < 0.5, jnp.float32)
    whole = sft.cross_entropy(logits, tokens, mask)["loss"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = sum(
        -np.log(p[b, t - 1, tokens[b, t]]) for b in range(4) for t in range(1, 6) if mask[b, t]
    )
    np.testing.assert_allclose(whole[0], want, rtol=1e-5)
    halves = [
        sft.cross_entropy(logits[i : i + 2], tokens[i : i + 2], mask[i : i + 2])["loss"]
        for i in (0, 2)
    ]
    np.testing.assert_allclose(halves[0][0] + halves[1][0], whole[0], rtol=1e-6)
    assert halves[0][1] + halves[1][1] == whole[1]


def test_accuracy_counts_likeliest_tokens():
    logits = jnp.eye(3)[None] * 5.0
    result = sft.cross_entropy(logits, jnp.array([[0, 0, 2]]), jnp.ones((1, 3)))
    assert result["accuracy"] == (1.0, 2.0)
