"""Benchmarks with lm-evaluation-harness: the paper's tasks, scores beside its table."""
