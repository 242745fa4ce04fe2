import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from echo_jax.model.execution import PLAIN
from echo_jax.train import sft, step


def test_cross_entropy_by_hand():
    # Uniform logits over 4 tokens: log 4 a target.
    result = sft.cross_entropy(
        jnp.zeros((1, 3, 4)), jnp.array([[2, 0, 3]]), jnp.array([[1.0, 0.0, 1.0]])
    )
    np.testing.assert_allclose(result["loss"][0], 2 * np.log(4), rtol=1e-6)
    assert result["loss"][1] == 2
    assert result["accuracy"] == (0.0, 2.0)


def test_only_marked_targets_count_and_micro_batches_add_up():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 6, 7)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 7, (4, 6)))
    mask = jnp.asarray(rng.random((4, 6)) < 0.5)
    whole = sft.cross_entropy(logits, tokens, mask)["loss"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = sum(-np.log(p[b, t, tokens[b, t]]) for b in range(4) for t in range(6) if mask[b, t])
    np.testing.assert_allclose(whole[0], want, rtol=1e-5)
    halves = [
        sft.cross_entropy(logits[i : i + 2], tokens[i : i + 2], mask[i : i + 2])["loss"]
        for i in (0, 2)
    ]
    np.testing.assert_allclose(halves[0][0] + halves[1][0], whole[0], rtol=1e-6)
    assert halves[0][1] + halves[1][1] == whole[1]


def test_accuracy_counts_likeliest_tokens():
    result = sft.cross_entropy(jnp.eye(3)[None] * 5.0, jnp.array([[0, 0, 2]]), jnp.ones((1, 3)))
    assert result["accuracy"] == (2.0, 3.0)


def chat_batch(tokenizer, prompts):
    """The prompts as chats with an answer; row 1 has no clip of its own."""
    rng = np.random.default_rng(0)
    longest = prompts.tokens.shape[1]
    tokens = np.full((4, longest + 8), tokenizer.pad_id, np.int32)
    mask = np.zeros(tokens.shape, np.float32)
    batch = {
        "tokens": tokens,
        "loss_mask": mask,
        "waveforms": np.zeros((4, prompts.waveforms.shape[1]), np.float32),
        "num_samples": np.zeros(4, np.int32),
        "clip_row": np.zeros(4, np.int32),
        "clip_start": np.zeros(4, np.int32),
    }
    for slot, (row, source) in enumerate([(0, 0), (2, 1), (3, 2)]):
        slot = row
        batch["waveforms"][slot] = prompts.waveforms[source]
        batch["num_samples"][slot] = prompts.num_samples[source]
        batch["clip_row"][slot] = row
        batch["clip_start"][slot] = prompts.audio_start[source]
        length = prompts.length[source]
        tokens[row, :length] = prompts.tokens[source, :length]
        answer = 3 + row
        tokens[row, length : length + answer] = rng.integers(0, 50, answer)
        mask[row, length : length + answer] = 1
    tokens[1, :6] = rng.integers(0, 50, 6)
    mask[1, 2:6] = 1
    return batch


@pytest.mark.parametrize("chunk", [0, 3, 32, 100])
def test_chat_loss_equals_whole_logits(model, tokenizer, prompts, chunk):
    from echo_jax.model import thinker

    config, params = model
    batch = chat_batch(tokenizer, prompts)
    micro = jax.tree.map(lambda x: jnp.asarray(x[0]), sft.stack_micro_batches(batch, 1))
    total, count = sft.chat_loss(config, PLAIN, chunk, params, micro)["loss"]
    logits = thinker.forward(config, params, micro.tokens, (micro.clips,))
    logp = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(logp, micro.tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(total, -(picked * batch["loss_mask"][:, 1:]).sum(), rtol=1e-5)
    assert count == batch["loss_mask"].sum()


def test_accumulated_update_equals_the_whole(model, tokenizer, prompts):
    config, params = model
    batch = chat_batch(tokenizer, prompts)
    optimizer = optax.sgd(1.0)
    update = jax.jit(
        step.make_update(functools.partial(sft.chat_loss, config, PLAIN, 0), optimizer)
    )
    nothing = jax.tree.map(lambda _: None, params)
    results = [
        update(params, nothing, optimizer.init(params), sft.stack_micro_batches(batch, count))
        for count in (1, 2)
    ]
    for other in results[1:]:
        compare = functools.partial(np.testing.assert_allclose, atol=2e-5)
        jax.tree.map(compare, results[0][0], other[0])
        np.testing.assert_allclose(results[0][2]["loss"], other[2]["loss"], rtol=1e-5)
        np.testing.assert_allclose(results[0][2]["grad_norm"], other[2]["grad_norm"], rtol=1e-4)


def test_micro_batches_must_divide_the_batch(tokenizer, prompts):
    with pytest.raises(ValueError, match="micro_batches=3 does not divide the batch of 4 rows"):
        sft.stack_micro_batches(chat_batch(tokenizer, prompts), 3)
