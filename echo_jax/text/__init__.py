"""Text: the Qwen byte-level BPE, the chat template with its prompt presets, and the `<seg>` grammar."""
