"""The Qwen2.5-Omni thinker (audio tower and language model) as pure functions over one pytree."""
