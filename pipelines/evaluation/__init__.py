"""Benchmarks with lm-evaluation-harness: the student as its model, the paper's tasks, scores beside its table."""
