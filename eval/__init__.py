"""Evaluation: ask a checkpoint, score what it says, check where it listened, and show it."""
