"""Echo in JAX: audio language models that listen again while they think."""
