"""Run configurations: one function a stage, the exact command at the top of each file."""
