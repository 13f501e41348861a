"""Checkpoints of the hub, opened as stock transformers models."""
