"""A model of which every axis can be divided by the meshes of the tests."""

import jax
import numpy as np

from echo_jax import arrays
from echo_jax.arrays import Params
from echo_jax.model import thinker
from echo_jax.model.config import AudioConfig, TextConfig, ThinkerConfig

CONFIG = ThinkerConfig(
    audio=AudioConfig(num_layers=4, d_model=32, num_heads=4, ffn_dim=40, output_dim=64),
    text=TextConfig(
        vocab_size=96,
        hidden_size=64,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=12,
        ffn_dim=56,
    ),
    im_start_id=0,
    im_end_id=1,
    audio_token_id=2,
    audio_bos_id=3,
    audio_eos_id=4,
    pad_id=5,
)
# Several files to a checkpoint.
SHARD_BYTES = 100_000


def random_params(dtype: str = "float32", seed: int = 0) -> Params:
    """Numpy arrays of CONFIG."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda spec: rng.standard_normal(spec.shape, np.float32).astype(dtype),
        thinker.param_specs(CONFIG),
        is_leaf=arrays.is_spec,
    )


def assert_same_bits(tree: Params, other: Params) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
