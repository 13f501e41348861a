"""Benchmarks of a student with lm-evaluation-harness: the model, the paper's tasks and settings, results beside its table."""
