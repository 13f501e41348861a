"""The loop: checks, steps, checkpoints, what is watched, held-out scores."""
