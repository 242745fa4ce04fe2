"""Checksums of arrays: what they notice, and what they must not depend on."""

import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.train.checksum import checksums

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint32, jnp.int8, jnp.bool_)


def by_definition(array: np.ndarray) -> int:
    """The sum in arbitrary precision, with plain loops."""
    flat = np.ascontiguousarray(array).reshape(-1)
    bits = flat.view(f"u{flat.dtype.itemsize}")
    total = 0
    for index, value in enumerate(bits.tolist()):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            index = (index ^ (index >> shift)) * factor % 2**32
        total += value * ((index ^ (index >> 16)) | 1)
    return total % 2**32


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 4)])
def test_equals_the_definition(dtype, shape):
    rng = np.random.default_rng(0)
    array = np.asarray(jnp.asarray(rng.normal(size=shape) * 100).astype(dtype))
    assert checksums({"a": jnp.asarray(array)}) == {"a": by_definition(array)}
    assert checksums({"a": array}) == {"a": by_definition(array)}


def test_every_single_bit_shows():
    rng = np.random.default_rng(1)
    array = rng.normal(size=(2, 3)).astype(np.float32)
    right = checksums([array])["0"]
    for element in range(array.size):
        for bit in range(32):
            other = array.copy()
            other.reshape(-1).view(np.uint32)[element] ^= np.uint32(1 << bit)
            assert checksums([other])["0"] != right


def test_order_shape_and_sign_of_zero_show():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    right = checksums([array])["0"]
    assert checksums([array[::-1].copy()])["0"] != right
    assert checksums([array[:, ::-1].copy()])["0"] != right
    assert checksums([np.zeros(3, np.float32)]) != checksums([-np.zeros(3, np.float32)])
    nan = np.full(2, np.nan, np.float32)
    assert checksums([nan]) == checksums([nan.copy()])


def test_names_are_those_of_the_tree():
    tree = {"b": (np.zeros(1), None), "a": {"x": np.ones(1, np.int8)}}
    tree["b"] = (np.zeros(1, np.float32), None)
    assert list(checksums(tree)) == ["a/x", "b/0"]
