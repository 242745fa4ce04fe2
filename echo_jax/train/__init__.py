"""Losses, rewards, optimizers, checkpoints and metrics; knows nothing of where data came from."""
