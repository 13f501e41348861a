"""Checkpoints as the hub has them, opened as stock transformers models: what both stages need of a model."""
