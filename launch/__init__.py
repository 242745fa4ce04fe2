"""What a person runs: train, ask, demo."""
